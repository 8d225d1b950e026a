"""The figures of notebook 02."""
import matplotlib.pyplot as plt
import torch
from plots import BLUE, DARK, LIGHT, MIDDLE, SHADES, axes, canvas, label, note, panels


def idea():
    """Keys in clusters, and a query that compares itself with the centroids."""
    dice = torch.Generator().manual_seed(3)
    middles = torch.tensor([[2.2, 3.6], [4.6, 4.3], [6.6, 3.2], [4.2, 1.6], [8.6, 4.4], [7.6, 1.2]])
    ax = canvas("A query is compared with centroids, and opens the best clusters", 13, 5.6)
    for n, middle in enumerate(middles):
        is_open = n in (2, 4)
        keys = middle + 0.42 * torch.randn(8, 2, generator=dice).clamp(-1.6, 1.6)
        ax.plot(*keys.T, "o", color=BLUE if is_open else MIDDLE, markersize=5)
        ax.plot(*keys.mean(0), "x", color=DARK, markersize=9, markeredgewidth=2)
        ax.add_patch(plt.Circle(middle.tolist(), 0.95, fill=False, linewidth=1,
                                color=BLUE if is_open else LIGHT))
    ax.annotate("", (12.2, 4.2), (9.9, 2.2), arrowprops={"arrowstyle": "-|>", "color": DARK})
    note(ax, 10.6, 1.9, "query: which way\nare its best keys?")
    note(ax, 0.2, 0.9, "dots: keys\ncrosses: centroids (means)\nblue: clusters that it opens")
    plt.show()


def shared_direction(raw, centred):
    """Mean cosine of two keys of a head, for each head."""
    ax = axes(f"Two keys of a head have a mean cosine of {raw.median():.2f}; without the mean key, "
              f"{abs(centred.median()):.2f}", "mean cosine of two keys of a head", "heads",
              size=(7.5, 2.6))
    bins = torch.linspace(-0.05, 0.7, 31)
    for x, colour, name in ((raw, MIDDLE, "as they are"), (centred, DARK, "minus their mean")):
        height = torch.histogram(x, bins).hist
        ax.stairs(height, bins, color=colour, fill=True)
        label(ax, bins[height.argmax()], height.max(), name, dx=14, dy=6)
    ax.set_ylim(0, 70)
    plt.show()


def keys_in_a_plane(flat, best):
    """flat (n, 2) keys; best: those that a query attends to most."""
    ax = axes("For one query, most of the 100 best keys lie side by side",
              "first principal direction of the keys", "second principal direction", (6, 3.9))
    shade = ax.scatter(*flat.T, c=torch.arange(len(flat)), s=5, cmap=SHADES)
    ax.scatter(*flat[best].T, s=14, color=BLUE)
    ax.figure.colorbar(shade, label="place in the text [tokens]", pad=0.02)
    plt.show()


def together(layers, cosines):
    """cosines: {whose best keys: (layers,) mean cosine of two of them}."""
    names = list(cosines)
    ax = axes("In lower layers, best keys of queries are more alike than those of random vectors",
              "layer", "mean cosine of two keys", size=(7.5, 3))
    for name, colour in zip(names, (BLUE, MIDDLE, LIGHT), strict=True):
        ax.plot(layers, cosines[name], "o-", color=colour, markersize=4)
        label(ax, layers[-1], cosines[name][-1], name, dy=7 if name == names[0] else -4)
    ax.set_ylim(-0.03, 0.8)
    plt.show()


def sizes(before, after, largest, lost):
    """Tokens in a cluster before and after large ones are cut."""
    ax = axes(f"A table with room for {largest} tokens per cluster would lose {lost:.1f} % of the "
              "keys", "tokens in a cluster", "clusters", size=(7.5, 2.8))
    bins = torch.arange(0, int(before.max()) + 3) - 0.5
    ax.stairs(torch.histogram(before.float(), bins).hist, bins, fill=True, color=LIGHT)
    ax.stairs(torch.histogram(after.float(), bins).hist, bins, color=DARK)
    ax.axvline(largest + 0.5, color=BLUE, linestyle="--")
    label(ax, largest + 0.5, ax.get_ylim()[1] * 0.9, f"P = {largest}", color=BLUE)
    label(ax, largest + 2, ax.get_ylim()[1] * 0.15,
          "grey: as k-means made them; line: after the cut")
    plt.show()


def found(layers, results, read):
    """results: {name: (texts, layers) best tokens found, in per cent}; read: tokens read."""
    names = list(results)
    ours = results[names[0]].mean()
    ax = axes(f"Reading {read:.0f} % of the tokens, clusters find {ours:.0f} of the best 100",
              "layer", "best 100 tokens found [%]")
    for name, colour in zip(names, (DARK, MIDDLE, BLUE), strict=True):
        ax.plot(layers, results[name][0], color=colour, marker="o", markersize=4)
        ax.plot(layers, results[name][1], color=colour, marker="o", markersize=4, linestyle="--")
        label(ax, layers[-1], results[name][0][-1], f"{name}: {results[name].mean():.0f} %", dx=9)
    note(ax, 1, 102, "solid: lighthouse, dashed: expedition")
    ax.set(ylim=(0, 107), xlim=(-0.5, layers[-1] + 0.5))
    plt.show()


def gains(powers, gain, controls, ours):
    """gain (powers, cases): points gained over power 0; controls: {name: (cases,) the same}."""
    ax = axes("With small powers, weights from the queries find more; the controls find less",
              "power of the queries' mean square",
              "best 100 tokens found,\ngain over power 0 [points]", size=(7.5, 3))
    ax.axhline(0, color=MIDDLE, linewidth=1)
    middle, spread = gain.mean(1), gain.std(1)
    ax.errorbar(powers, middle, spread, fmt="o-", color=DARK, capsize=3)
    for (name, x), place in zip(controls.items(), (ours + 0.015, ours + 0.03), strict=True):
        ax.errorbar([place], [x.mean()], [x.std()], fmt="s", color=BLUE, capsize=3)
        label(ax, place, x.mean(), f"control: {name}", dx=9, color=BLUE)
    n = powers.index(ours)
    label(ax, ours, middle[n] + spread[n], f"the library: {ours}", dx=0, dy=8, ha="center")
    note(ax, 0, ax.get_ylim()[0] * 0.85, "bars: standard deviation over layers and texts",
         fontsize=8.5)
    ax.set_ylim(top=float((middle + spread).max()) + 1)
    plt.show()


def places(place, centres, apart):
    """centres: {name: (n,) middle of each token's cluster}; apart: mean distance, all cases."""
    for ax, (name, x) in zip(panels("RoPE ties clusters to places: a token's mean distance "
                                    "from its cluster's middle", centres,
                                    "token's place [tokens]", "middle of its cluster [tokens]"),
                             centres.items(), strict=True):
        ax.plot(place, x, ".", color=DARK, markersize=1.5)
        ax.set_title(f"{name}: {apart[name]:.0f} tokens", fontsize=10, fontweight="normal")
    plt.show()


def segments(lengths, loss, work):
    """loss (lengths, cases): points lost against one segment; work: comparisons, in per cent."""
    ax = axes(f"Segments of {lengths[-1]:,} tokens lose {loss[-1].mean():.1f} of 100 on average, "
              f"of {lengths[0]} tokens {loss[0].mean():.1f}",
              "tokens clustered together", "best 100 tokens found,\nloss [points]", (7.5, 3))
    ax.axhline(0, color=MIDDLE, linewidth=1)
    ax.errorbar(lengths, loss.mean(1), loss.std(1), fmt="o-", color=DARK, capsize=3)
    for length, y, share in zip(lengths, loss.mean(1), work, strict=True):
        label(ax, length, y, f"{share:.0f} %", dx=5, dy=12)
    note(ax, 0.98, 0.93, "bars: standard deviation over layers and texts\nbeside the points: "
         "comparisons, of those without segments", transform=ax.transAxes, fontsize=8.5, ha="right",
         va="top")
    ax.set(xscale="log", xticks=lengths, xticklabels=[f"{x:,}" for x in lengths])
    ax.minorticks_off()
    plt.show()
