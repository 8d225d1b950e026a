"""How the notebooks draw: one style that reads in grey, a claim as the title, units on the axes.

    from plots import DARK, LIGHT, axes, label
    ax = axes("Decoding waits for memory", "flop per byte read", "Gflop/s")
    ax.plot(x, y, color=DARK)
    label(ax, x[-1], y[-1], "measured")
"""
import html

import matplotlib.pyplot as plt
from matplotlib.colors import LinearSegmentedColormap

DARK, BLUE, MIDDLE, LIGHT = "#1a1a1a", "#2b6cb0", "#8a8a8a", "#d0d0d0"     # dark to light in grey
SHADES = LinearSegmentedColormap.from_list("shades", [LIGHT, DARK])     # on white, none is lost

plt.rcParams.update({
    "figure.dpi": 90, "savefig.dpi": 90, "figure.constrained_layout.use": True,
    "font.size": 10, "axes.titlesize": 11.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlepad": 10, "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MIDDLE, "xtick.color": "#444444", "ytick.color": "#444444",
    "legend.frameon": False, "lines.linewidth": 1.8, "image.cmap": "Greys"})


def axes(claim, x, y, size=(7.5, 3.6)):
    """Axes of a new figure, titled with what it shows; x and y say what is measured, in what."""
    _, ax = plt.subplots(figsize=size)
    ax.set_title(claim)
    ax.set(xlabel=x, ylabel=y)
    return ax


def panels(claim, names, x, y, size=(7.5, 3.6)):
    """Axes side by side under one claim, each with a name, that share their scales."""
    figure, all_axes = plt.subplots(1, len(names), figsize=size, sharex=True, sharey=True)
    figure.suptitle(claim, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    for ax, name in zip(all_axes, names, strict=True):
        ax.set_title(name, fontsize=10, fontweight="normal")
        ax.set_xlabel(x)
    all_axes[0].set_ylabel(y)
    return all_axes


def label(ax, x, y, text, dx=6, dy=0, **style):
    """Write beside a point what it is: no legend to look up. dx, dy in points."""
    ax.annotate(text, (x, y), (dx, dy), textcoords="offset points",
                **{"va": "center", "fontsize": 9, **style})


def heatmap(ax, values, scale, **options):
    """Values (rows, columns) as greys, the first row at the bottom, with a named colour scale."""
    picture = ax.imshow(values, origin="lower", aspect="auto", interpolation="nearest", **options)
    ax.figure.colorbar(picture, ax=ax, label=scale, pad=0.02)


def marked(pieces, strength, threshold=0.02):
    """A text as HTML, each token shaded by its strength, 0 to 1, and unshaded below threshold."""
    def span(piece, s):
        words = html.escape(piece).replace("\n", "<br>")
        shade = f"background:rgba(43,108,176,{s:.2f});color:{'white' if s > 0.6 else 'inherit'}"
        return f'<span style="{shade}">{words}</span>' if s >= threshold else words

    body = "".join(map(span, pieces, strength))
    return f'<div style="font:13px/1.7 serif;max-width:46em;border:1px solid #ccc;' \
           f'padding:0.6em 1em">{body}</div>'
