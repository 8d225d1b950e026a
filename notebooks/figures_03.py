"""The figures of notebook 03."""
import matplotlib.pyplot as plt
import torch
from plots import (
    BLUE,
    DARK,
    LIGHT,
    MIDDLE,
    arrow,
    axes,
    band,
    box,
    canvas,
    label,
    note,
    panels,
    strip,
)

STYLES = {"retrieved": (DARK, "-"), "as many bytes": (BLUE, "--"),
          "and estimated": (DARK, "-"), "oracle": (BLUE, "--")}
NAMES = {"as many bytes": "retrieved, and more tokens", "and estimated": "retrieved, and estimated"}


def idea():
    """Three zones, one softmax."""
    ax = canvas("A cluster becomes one entry: its mean key, its mean value, log(size)", 15, 5.6)
    note(ax, 0, 4.9, "tokens")
    strip(ax, 1.8, 4.6, [DARK] * 3 + [BLUE] * 6 + [MIDDLE] * 12 + [LIGHT] * 9, width=0.4)
    for x, text in ((1.8, "steady"), (3, "retrieved"), (5.4, "estimated: 3 clusters of 4 tokens"),
                    (10.2, "dropped")):
        note(ax, x, 4.3, text, fontsize=8.5)
    note(ax, 0, 2.5, "entries of\nthe softmax")
    strip(ax, 1.8, 2.2, [DARK] * 3 + [BLUE] * 6, width=0.4)
    for n in range(3):
        box(ax, 6 + n * 1.1, 2.2, 0.9, 0.6, "c, m", MIDDLE)
        arrow(ax, (6.2 + n * 1.6, 4.1), (6.45 + n * 1.1, 2.8))
    arrow(ax, (3.6, 4.1), (3.6, 2.8))
    note(ax, 9.6, 2.5, "c: mean key     m: mean value\nlogit: q·c + log(4)")
    box(ax, 1.8, 0.4, 7.4, 0.9, "one softmax over all entries, one mean of values")
    arrow(ax, (5.5, 2.2), (5.5, 1.3))
    plt.show()


def estimates(true, estimate, share):
    """Weight of each cluster's tokens and of its estimate, of one query; share (queries,)."""
    ax = axes("No cluster's estimate is above the weight of its tokens", "weight of its tokens",
              "weight of its estimate", size=(5.6, 4))
    ax.loglog(true, estimate, ".", color=DARK, markersize=4)
    ends = torch.stack([true.min(), true.max()])
    ax.loglog(ends, ends, color=BLUE, linewidth=1)
    label(ax, ends[1], ends[1], "equal", dx=-40, color=BLUE)
    low, middle, high = (share.quantile(p) * 100 for p in (0.1, 0.5, 0.9))
    note(ax, 0.35, 0.06, f"all estimates of a query together:\n{middle:.0f} % of the true weight\n"
         f"(8 of 10 queries: {low:.0f} to {high:.0f} %)", transform=ax.transAxes, va="bottom")
    plt.show()


def by_layer(layers, errors, gain, more):
    """errors: {name: (cases, layers)} of outputs, in per cent."""
    all_axes = panels(f"Estimates take {gain:.0f} % of the error away; as many bytes of tokens "
                      f"{more:.0f} %", ("reading alone", "estimates, and the oracle"), "layer",
                      "error, mean of the heads [%]", (7.5, 3.8))
    for name, x in errors.items():
        ax = all_axes[0 if name in ("retrieved", "as many bytes") else 1]
        colour, dash = STYLES[name]
        text = f"{NAMES.get(name, name)}: mean {x.mean():.1f} %"
        band(ax, layers, x, colour, name=text, linestyle=dash)
        ax.legend(loc="upper right", fontsize=9)
    note(all_axes[0], 0.97, 0.76, "lines: median of queries and texts\nbands: 8 of 10", ha="right",
         fontsize=8.5, transform=all_axes[0].transAxes)
    ax.set(ylim=0, xlim=(layers[0], layers[-1]), xticks=layers[::2])
    plt.show()


def against_oracle(needed, ratio, is_first, first, others):
    """For each head: tokens it needs, and our error over the oracle's."""
    ax = axes(f"In the first layer {first:.0f} % of the heads beat the oracle, in the others "
              f"{others:.0f} %", "tokens that hold 90 % of the attention",
              "our error / oracle's", (7.5, 3.4))
    ax.loglog(needed[~is_first], ratio[~is_first], ".", color=MIDDLE, label="other layers")
    ax.loglog(needed[is_first], ratio[is_first], "o", color=DARK, markersize=5,
              label="the first layer")
    ax.legend(loc="upper right")
    ax.axhline(1, color=BLUE, linestyle="--", linewidth=1)
    label(ax, float(needed.min()), 1, "equal", dx=0, dy=-8, color=BLUE)
    plt.show()


def ranked(true, retrieved, ranked):
    """Weights of the clusters of one query, in the order of their ranks, by zone."""
    true = true / true.sum() * 100
    zones = (slice(0, retrieved), slice(retrieved, ranked), slice(ranked, None))
    cover = [float(true[zone].sum()) for zone in zones]
    ax = axes(f"One query: {cover[0]:.0f} % of the clusters' attention is read, {cover[1]:.0f} % "
              f"estimated, {cover[2]:.0f} % dropped", "cluster, the best first", "attention [%]",
              (7.5, 2.8))
    for zone, colour, name in zip(zones, (BLUE, MIDDLE, LIGHT),
                                  ("retrieved", "estimated", "dropped"), strict=True):
        ax.bar(range(len(true))[zone], true[zone], color=colour, width=1, label=name)
    ax.set(yscale="log", ylim=(1e-4, 200), xlim=(-1, int((true > 0).sum())))
    ax.legend(ncols=3, loc="upper right")
    plt.show()


def shortfall(variance, short):
    """How far an estimate is below the truth, over the variance of its tokens' logits."""
    ax = axes("The more the logits of a cluster vary, the more its estimate falls short",
              "variance of their logits, σ²", "shortfall, log(true / estimate)", size=(7.5, 3.2))
    pick = torch.randperm(len(short), generator=torch.Generator().manual_seed(0))[:6000]
    ax.loglog(variance[pick], short[pick], ".", color=DARK, markersize=1.5)
    line = torch.tensor([1e-3, float(variance.max())])
    ax.loglog(line, line / 2, color=BLUE, linewidth=1)
    label(ax, line[1], line[1] / 2, "σ²/2", dx=4, color=BLUE)
    ax.set_ylim(bottom=3e-4)
    plt.show()


def with_spread(layers, errors, fall):
    """errors: {how: (cases, layers)} of outputs, in per cent."""
    names = [f"{name}: {x.mean():.1f} %" for name, x in errors.items()]
    all_axes = panels(f"Counting a spread takes away another {fall:.0f} % of the error", names,
                      "layer", "error, mean of the heads [%]", (7.5, 3.2))
    for ax, x in zip(all_axes, errors.values(), strict=True):
        band(ax, layers, x)
    ax.set(ylim=0, xlim=(layers[0], layers[-1]), xticks=layers[::3])
    plt.show()
