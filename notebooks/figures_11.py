"""The figures of notebook 11."""
import matplotlib.pyplot as plt
import torch
from plots import BLUE, DARK, LIGHT, MIDDLE, arrow, axes, band, box, canvas, label, note, panels


def idea():
    """Tokens left out, as wide as the index guesses, and draws that fall on them."""
    ax = canvas("A few draws among the tokens left out say how far the output may be off", 16, 6.2)
    note(ax, 0, 5.4, "tokens")
    box(ax, 2.2, 5.1, 2.2, 0.6, "read", DARK)
    box(ax, 4.4, 5.1, 11.4, 0.6, "left out: thousands", LIGHT)
    note(ax, 0, 3.4, "width:\nits chance")
    widths = [3.1, 0.5, 1.7, 0.3, 2.4, 0.3, 0.9, 0.3, 1.3, 0.6]
    left = 4.4
    for n, width in enumerate(widths):
        box(ax, left, 3.1, width, 0.6, "", (LIGHT, "white")[n % 2])
        left += width
    arrow(ax, (4.4, 5.1), (4.4, 3.7), color=MIDDLE)
    arrow(ax, (15.8, 5.1), (15.8, 3.7), color=MIDDLE)
    note(ax, 10.1, 4.4, "each token is as wide as the index thinks that it may weigh", ha="center")
    for n in range(6):
        arrow(ax, (4.4 + 11.4 * (n + 0.35) / 6, 2.2), (4.4 + 11.4 * (n + 0.35) / 6, 3.1),
              color=BLUE)
    note(ax, 0, 1.9, "draws", color=BLUE)
    note(ax, 10.1, 1.9, "only these keys and values are read", ha="center", color=BLUE)
    box(ax, 2.2, 0.2, 13.6, 0.9, "each draw: (true term - counted term) / chance.    "
        "Mean: the error.    Spread: its standard error.")
    arrow(ax, (10.1, 1.6), (10.1, 1.1), color=BLUE)
    plt.show()


def true_errors(layers, errors, names):
    """errors (layers of both texts, steps, H, G), relative: a band for each text."""
    ax = axes("True errors differ more within a layer than from layer to layer", "layer",
              "error over the output's length [%]")
    for name, colour, x in zip(names, (DARK, BLUE), errors.chunk(2), strict=True):
        band(ax, layers, 100 * x.flatten(1).T, colour, name=name)
    ax.set(yscale="log", xticks=layers, xlim=(layers[0], layers[-1]), yticks=(0.1, 1, 10),
           yticklabels=(0.1, 1, 10))
    ax.legend(loc="lower right", fontsize=9)
    note(ax, 0.02, 0.95, "lines: medians of heads and steps; bands: 8 of 10", fontsize=8.5,
         transform=ax.transAxes)
    plt.show()


def ratios(found):
    """found {how: (noted number over the mass, chance)} of each token: what a draw notes."""
    both = panels("Most even draws note next to nothing; draws by guess are near the mass",
                  list(found), "noted number, w/p, over the true mass", "draws [%]",
                  size=(8.5, 3.2))
    bins = torch.logspace(-4, 3, 36, dtype=torch.float64)
    for ax, (x, p), colour in zip(both, found.values(), (DARK, BLUE), strict=True):
        ax.hist(x.clamp(1e-4, 999), bins=bins, color=colour, weights=100 * p)
        ax.axvline(1, color=MIDDLE, linewidth=1)
        ax.set_xscale("log")
    note(both[0], 0.08, 0.93, "and less", transform=both[0].transAxes, fontsize=8.5)
    plt.show()


def ways(found, claim, what):
    """found {way: standard errors of pairs}: a dot for the median, a line for 8 of 10."""
    ax = axes(claim, what, "", size=(8.5, 0.42 * len(found) + 1.2))
    for row, (name, x) in enumerate(found.items()):
        low, middle, high = (float(100 * x.quantile(p)) for p in (0.1, 0.5, 0.9))
        is_chosen = "guess" in name or "group" in name
        colour = MIDDLE if "another" in name else BLUE if is_chosen else DARK
        ax.plot([low, high], [row, row], color=colour, linewidth=2, alpha=0.5)
        ax.plot(middle, row, "o", color=colour, markersize=6)
        label(ax, middle, row, f"{middle:.3g} %", dx=0, dy=9, color=colour, fontsize=8.5,
              ha="center")
    ax.set_xscale("log")
    left, right = ax.get_xlim()
    ticks = [n for n in (1, 2, 5, 10, 20, 50, 100, 200) if left < n < right]
    ax.set(yticks=range(len(found)), yticklabels=found,
           ylim=(len(found) - 0.5, -0.7))
    ax.minorticks_off()
    ax.set(xticks=ticks, xticklabels=ticks)
    plt.show()


def predicted(observed, mean, typical):
    """Of each pair: standard errors, observed over many sets of draws and predicted by them."""
    ax = axes("Predictions are right on average, and too small in a typical set of draws",
              "observed standard error, over the output's length [%]", "predicted / observed")
    ax.semilogx(100 * observed, typical / observed, "o", color=LIGHT, markersize=4,
                label="a typical set (the median)")
    ax.semilogx(100 * observed, mean / observed, ".", color=DARK, markersize=4,
                label="all sets together (root mean square)")
    ax.axhline(1, color=BLUE, linewidth=1)
    label(ax, 100 * float(observed.max()), 1, "equal", color=BLUE)
    ax.set(ylim=(0, 1.5), xticks=(1, 10, 100), xticklabels=(1, 10, 100))
    ax.legend(loc="upper left", fontsize=9)
    plt.show()


def coverage(promised, reached, heads, names):
    """reached (texts, layers, promises), and shares (heads,) at 95 %."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
    figure.suptitle("Over all heads, 95 % of the bars hold; in a few heads many fail", x=0.01,
                    ha="left", fontsize=11.5, fontweight="bold")
    x = [100 * p for p in promised]
    left.plot(x, x, color=MIDDLE, linewidth=1)
    label(left, x[2], x[2], "equal", dy=-8, color=MIDDLE)
    for name, by, colour in zip(names, reached, (DARK, BLUE), strict=True):
        band(left, x, 100 * by, colour, name, marker=".")
    left.set(xlabel="promised [%]", ylabel="bars that hold [%]", ylim=(45, 107))
    left.legend(loc="lower right", fontsize=9)
    note(left, 0.03, 0.97, "lines: medians of layers; bands: 8 of 10", fontsize=8.5,
         transform=left.transAxes)
    right.plot(range(1, len(heads) + 1), 100 * heads.sort().values, ".", color=DARK)
    right.axhline(95, color=BLUE, linewidth=1)
    label(right, len(heads), 95, "promised", color=BLUE, dx=-4, dy=-9, ha="right")
    right.set(xlabel="heads of both texts, the worst first", ylabel="bars of 95 % that hold [%]",
              ylim=(0, 103))
    plt.show()


def needle(sizes, hidden, expected, n_left, evenly):
    """Shares of bars that see it, over the number of draws, and what theory says."""
    ax = axes("Few draws do not see a needle that the index hides", "draws of a kv head",
              "bars that see it [%]", size=(7.5, 3.2))
    x = torch.logspace(1.6, 5, 60)
    ax.semilogx(x, 100 * (1 - torch.exp(-evenly * x / n_left)), color=MIDDLE, linewidth=1)
    label(ax, 1.2e4, 24, "the chance to draw it", color=MIDDLE)
    ax.plot(sizes, [100 * y for y in hidden], "o", color=DARK)
    label(ax, sizes[0], 100 * hidden[0], "hidden", dy=10, dx=0)
    ax.plot(sizes[:len(expected)], [100 * y for y in expected], "o", color=BLUE)
    label(ax, sizes[0], 100 * expected[0], "control: expected by the index", dy=-12, dx=0,
          color=BLUE)
    ax.axvline(n_left, color=LIGHT, linewidth=1)
    label(ax, n_left, 60, "as many draws as tokens left out", dx=-4, color=MIDDLE, ha="right")
    ax.set(ylim=(-3, 105))
    plt.show()
