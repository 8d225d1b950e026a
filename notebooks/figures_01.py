"""The figures of notebook 01."""
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
    heatmap,
    label,
    note,
    panels,
    strip,
)


def idea():
    """One decode step and what it reads."""
    ax = canvas("One new token reads every weight, and every key and value before it", 13, 5)
    box(ax, 0.2, 2, 2, 1, "new token")
    box(ax, 4, 3.4, 3, 1.1, "weights", MIDDLE)
    note(ax, 7.3, 3.95, "the same for all texts of a batch:\nread once a step")
    box(ax, 4, 1.9, 3, 1.1, "one step", DARK)
    strip(ax, 4, 0.75, [LIGHT] * 17, width=0.4, height=0.35)
    strip(ax, 4, 0.3, [LIGHT] * 17, width=0.4, height=0.35)
    note(ax, 11, 0.7, "keys\nvalues")
    note(ax, 0.2, 0.7, "cache of this text:\none column a token")
    arrow(ax, (2.2, 2.5), (4, 2.5))
    arrow(ax, (5.5, 3.4), (5.5, 3))
    arrow(ax, (5.5, 1.1), (5.5, 1.9))
    arrow(ax, (7, 2.5), (9.6, 2.5))
    box(ax, 9.6, 2, 2.4, 1, "next token")
    plt.show()


def bytes_by_length(lengths, reads, weights, cross):
    """reads: {batch: bytes for each length}."""
    batch = max(reads)
    ax = axes(f"In a batch of {batch}, past {cross:,.0f} tokens the caches outweigh the model",
              "tokens in each text", "read for one step [GB]")
    for (n, y), colour in zip(reads.items(), (MIDDLE, DARK), strict=True):
        ax.plot(lengths, y / 1e9, color=colour)
        label(ax, lengths[-1], y[-1] / 1e9, f"batch {n}")
    ax.axhline(weights / 1e9, color=BLUE, linestyle="--")
    label(ax, lengths[-1], weights / 1e9, "weights", dy=-8, color=BLUE)
    ax.axvline(cross, color=LIGHT, zorder=0)
    ax.set(ylim=0, xlim=(0, lengths[-1]))
    plt.show()


def roofline(bandwidth, compute, points):
    """points: {name: (flop/byte, flop/s)}."""
    ridge = compute / bandwidth
    ax = axes("With few queries per key, a step computes far below the machine's speed",
              "operations per byte read [flop/byte]", "speed [Gflop/s]")
    x = torch.logspace(-0.5, 4, 200)
    ax.loglog(x, (x * bandwidth).clamp(max=compute) / 1e9, color=MIDDLE)
    label(ax, 1, bandwidth / 1e9, "limit: reading", dx=-8, dy=6, ha="right")
    label(ax, 2 * ridge, compute / 1e9, "limit: computing", dx=0, dy=9)
    for name, (intensity, speed) in points.items():
        ax.plot(intensity, speed / 1e9, "o", color=DARK, markersize=7)
        label(ax, intensity, speed / 1e9, name, dx=7, dy=-5)
    ax.axvline(ridge, color=LIGHT, zorder=0)
    low = min(speed for _, speed in points.values()) / 1e9 / 2
    label(ax, ridge, low, f"ridge: {ridge:.0f}", dx=4, dy=7, color=MIDDLE)
    ax.set(ylim=(low, compute / 1e9 * 3), yticks=(1, 10, 100), yticklabels=(1, 10, 100))
    ax.minorticks_off()
    plt.show()


def tokens_needed(shares, control):
    """shares, control: {text: (n, heads) tokens that a head needs, as a share of all}."""
    typical = torch.cat(list(shares.values())).median() * 100
    chance = torch.cat(list(control.values())).median() * 100
    ax = axes(f"A typical head needs {typical:.0f} % of the tokens; with another head's query "
              f"{chance:.0f} %", "tokens for 90 % of the attention [% of all]", "heads below [%]")
    for runs, colour, name in ((shares, DARK, "its own queries"),
                               (control, MIDDLE, "control: queries of\nanother kv head")):
        for run, dash in zip(runs.values(), ("-", "--"), strict=True):
            x = run.flatten().sort().values * 100
            ax.semilogx(x, torch.linspace(0, 100, len(x)), color=colour, linestyle=dash)
        own = colour == DARK
        label(ax, x[len(x) // 2], 50, name, dx=-12 if own else 12, dy=0 if own else -20,
              ha="right" if own else "left")
    ax.set(ylim=(0, 100), xlim=(0.03, 100))
    note(ax, 0.035, 92, "solid, dashed: " + ", ".join(shares))
    plt.show()


def needed_by_layer(share):
    """share (layers, heads), in per cent."""
    ax = axes("Most heads of the first layer need many tokens, most later heads few",
              "layer", "query head", size=(7.5, 3))
    heatmap(ax, share.T.clamp(max=50), "tokens needed [%], black: 50 or more", vmin=0, vmax=50)
    ax.set_yticks(range(0, share.shape[1], 2))
    plt.show()


def errors_of_choice(errors, kept):
    """errors: {how tokens were chosen: (layers, heads) output errors}."""
    names, x = list(errors), [e.flatten() * 100 for e in errors.values()]
    middle = [float(e.median()) for e in x]
    ax = axes(f"Median error: {middle[0]:.0f} % from the best {kept} tokens, "
              f"{min(middle[1:]):.0f} % or more from as many others", "",
              "output error of a head [%]", size=(7.5, 3.2))
    ax.boxplot(x, whis=(10, 90), showfliers=False, widths=0.5, medianprops={"color": BLUE})
    ax.set_xticks(range(1, len(x) + 1), names)
    for n, m in enumerate(middle):
        label(ax, n + 1.26, m, f"{m:.0f} %", dx=4, color=BLUE)
    note(ax, 0.55, 1.0, "boxes: the middle half of the heads\nwhiskers: 8 of 10 heads",
         fontsize=8.5, transform=ax.transAxes, ha="right", va="top")
    ax.set_ylim(bottom=0)
    plt.show()


def zones_by_layer(zones):
    """zones: {zone: (texts and tokens, layers) share of the attention, in per cent}."""
    upper = {name: float(x[:, x.shape[1] // 2:].mean()) for name, x in zones.items()}
    names = list(zones)
    all_axes = panels(f"In the upper half the {names[0]} take {upper[names[0]]:.0f} %, the "
                      f"{names[1]} {upper[names[1]]:.0f} %", names, "layer",
                      "attention [%], mean of the heads", size=(7.5, 3))
    for ax, x in zip(all_axes, zones.values(), strict=True):
        band(ax, range(x.shape[1]), x)
    note(ax, 29, 96, "band: 8 of 10 tokens", fontsize=8.5, ha="right")
    ax.set(ylim=(0, 100), xlim=(0, x.shape[1] - 1))
    plt.show()


def one_head(rows, head):
    """rows: {text: (weights (T,), place of the number, its words)} of one head."""
    _, all_axes = plt.subplots(len(rows), 1, figsize=(7.5, 4))
    all_axes[0].set_title(f"Layer {head[0]}, head {head[1]} finds the number in both texts")
    for ax, (name, (w, place, words)) in zip(all_axes, rows.items(), strict=True):
        ax.vlines(range(len(w)), 0, w * 100, color=DARK, linewidth=1.2)
        label(ax, place, w[place] * 100, f"“{words}”")
        label(ax, 0, 90, f"{name}", dx=2, color=MIDDLE)
        ax.set(xlim=(-40, len(w) + 60), ylim=(0, 105), ylabel="weight [%]")
    all_axes[-1].set_xlabel("position in the text [tokens]")
    plt.show()
