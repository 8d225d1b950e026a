"""The figures of notebook 04."""
import matplotlib.pyplot as plt
from plots import (
    BLUE,
    DARK,
    LIGHT,
    MIDDLE,
    arrow,
    axes,
    canvas,
    heatmap,
    label,
    note,
    passage,
    strip,
)


def idea():
    """Where tokens are, before and after an update."""
    ax = canvas("Tokens move into clusters when enough of them are older than the window", 15, 6)
    rows = ((4.6, "after the prompt", 14, 0, "the prompt is in clusters"),
            (3.1, "some steps later", 14, 7, "new tokens wait in the steady zone"),
            (1.6, "steady zone full", 14, 9, "update() must run"),
            (0.1, "after update()", 23, 0, "in clusters; old clusters are as before"))
    for y, name, clustered, waiting, what in rows:
        note(ax, 0, y + 0.3, name)
        fills = [DARK] * 2 + [BLUE] * clustered + [MIDDLE] * waiting + [DARK] * 3
        strip(ax, 3, y, fills, width=0.27)
        note(ax, 3 + 0.27 * len(fills) + 0.2, y + 0.3, what, fontsize=8.5)
    for y in (4.6, 3.1, 1.6):
        arrow(ax, (2.6, y), (2.6, y - 0.8))
    note(ax, 3, 5.5, "black: sink and local window     blue: in clusters     grey: waiting",
         fontsize=8.5)
    plt.show()


def steady_zone(tokens, indexed, config):
    """How many tokens are exact in each step."""
    moves = int((indexed.diff() > 0).sum())
    ax = axes(f"{moves} times the steady zone is full and about {config.update} tokens move",
              "tokens read or generated", "tokens exact in a step", (7.5, 3))
    ax.plot(tokens, tokens - indexed, color=DARK)
    ax.axhline(config.steady, color=BLUE, linestyle="--", linewidth=1)
    label(ax, tokens[0], config.steady, f"room in the steady zone: {config.steady}", dx=4, dy=9)
    ax.axhline(config.sink + config.local, color=MIDDLE, linestyle=":", linewidth=1)
    label(ax, tokens[-1], config.sink + config.local, "sink and\nlocal window")
    ax.set(ylim=(0, config.steady * 1.2), xlim=(tokens[0], tokens[-1]))
    plt.show()


def grown_and_fresh(tokens, grown, fresh, updates):
    """Errors (layers, steps), in %, of an index that grew and of one built at the end."""
    n = fresh.shape[1]
    a, b = grown[:, -n:].mean(), fresh.mean()
    ax = axes(f"In the last {n} steps the grown index errs by {a:.1f} %, a fresh one by {b:.1f} %",
              "tokens read or generated", "error to dense attention [%]\nmean of 32 steps")
    for x, colour, name in ((grown, DARK, "grown"), (fresh, BLUE, "fresh")):
        smooth = x.mean(0).unfold(0, 32, 1).mean(-1)                    # (steps - 31,)
        ax.plot(tokens[-len(smooth):], smooth, color=colour, linestyle="--" if x is fresh else "-")
        label(ax, tokens[-1], smooth[-1], name, color=colour, dy=7 if name == "grown" else -7)
    for t in updates:
        ax.axvline(t, color=MIDDLE, linewidth=0.8, linestyle=":")
    note(ax, 0.01, 0.05, "mean of five layers; dotted: updates", transform=ax.transAxes,
         fontsize=8.5)
    ax.set(ylim=0, xlim=(tokens[0], tokens[-1]))
    plt.show()


def ranks(above, found, chance):
    """above: {text: (layers,) share of other passages that a layer reads less of}, in per cent."""
    counts = " and ".join(str(n) for n in found)
    n_layers = len(next(iter(above.values())))
    ax = axes(f"{counts} of {n_layers} layers prefer the sentence to 95 % of the passages; "
              f"by chance: {chance:.1f}", "layer", "passages of which it\nreads less [%]", (7.5, 3))
    for (name, y), colour, sign in zip(above.items(), (DARK, BLUE), "os", strict=True):
        ax.plot(range(n_layers), y, sign, color=colour, markersize=5, label=name, alpha=0.7)
    ax.axhline(95, color=MIDDLE, linestyle="--", linewidth=1)
    ax.legend(loc="center right")
    ax.set(ylim=(-4, 104), xlim=(-1, n_layers + 5), xticks=range(0, n_layers, 5))
    plt.show()


def any_token(counts, ours):
    """In how many layers some token of a passage is read: all passages, and the sentence."""
    ax = axes(f"Some token of the sentence is read in {ours} layers; of the median passage, in "
              f"{counts.float().median():.0f}", "layers that read a token of a passage",
              "passages [%]", (7.5, 2.6))
    height = counts.bincount(minlength=31) / len(counts) * 100
    ax.bar(range(len(height)), height, color=LIGHT, width=0.9)
    ax.axvline(ours, color=BLUE)
    label(ax, ours, height.max(), "the sentence with the answer", color=BLUE)
    plt.show()


def map_of_reads(rows, needle, width=16):
    """rows (layers, T): the share of a layer's heads that retrieve each token."""
    n_layers, T = rows.shape
    binned = rows[:, :T // width * width].view(n_layers, -1, width).mean(-1) * 100
    ax = axes("What each layer retrieves when it writes the first digit",
              "position in the text [tokens]", "layer", size=(7.5, 3.8))
    heatmap(ax, binned, "retrieved by the heads [%]", vmin=0, vmax=100,
            extent=(0, T // width * width, -0.5, n_layers - 0.5))
    ax.set_ylim(-0.5, n_layers + 0.5)
    ax.plot(needle[0], n_layers - 0.2, "v", color=BLUE, clip_on=False)
    label(ax, needle[0], n_layers - 0.2, "the sentence", color=BLUE)
    plt.show()


def passages(pieces, shades):
    """shades: {layer: (tokens,) share of its heads that retrieve each token}."""
    for n, shade in shades.items():
        passage(f"Layer {n}: the darker a token, the more heads retrieve it", pieces, shade)
        plt.show()
