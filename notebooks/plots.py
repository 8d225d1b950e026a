"""How the notebooks draw: one style that reads in grey, a claim as the title, units on the axes.

    from plots import DARK, LIGHT, axes, label
    ax = axes("Decoding waits for memory", "flop per byte read", "Gflop/s")
    ax.plot(x, y, color=DARK)
    label(ax, x[-1], y[-1], "measured")

A drawn idea has boxes, arrows and strips of tokens on a canvas. A notebook's own figures are in a
module of the same number, figures_01.py, so that a cell calls one function.
"""
import platform

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LinearSegmentedColormap

DARK, BLUE, MIDDLE, LIGHT = "#1a1a1a", "#2b6cb0", "#8a8a8a", "#d0d0d0"     # dark to light in grey
SHADES = LinearSegmentedColormap.from_list("shades", [LIGHT, DARK])     # on white, none is lost
BLUES = LinearSegmentedColormap.from_list("blues", ["white", BLUE])

plt.rcParams.update({
    "figure.dpi": 90, "savefig.dpi": 90, "figure.constrained_layout.use": True,
    "font.size": 10, "axes.titlesize": 11.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlepad": 10, "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MIDDLE, "xtick.color": "#444444", "ytick.color": "#444444",
    "legend.frameon": False, "lines.linewidth": 1.8, "image.cmap": "Greys"})


def versions():
    """What the outputs were made with, in one line."""
    return f"Python {platform.python_version()}, torch {torch.__version__}"


# ---------------------------------------------------------------- plots

def axes(claim, x, y, size=(7.5, 3.6)):
    """Axes of a new figure, titled with its claim. x and y name what is measured, and its unit."""
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


def band(ax, x, values, color=DARK, name=None, **style):
    """The median of each column of values (n, len(x)), over a band that holds 8 of 10 rows."""
    values = torch.as_tensor(values).double()
    low, middle, high = (values.quantile(p, 0) for p in (0.1, 0.5, 0.9))
    ax.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    ax.plot(x, middle, color=color, label=name, **style)
    return middle


def heatmap(ax, values, scale, **options):
    """Values (rows, columns) as greys, the first row at the bottom, with a named colour scale."""
    picture = ax.imshow(values, origin="lower", aspect="auto", interpolation="nearest", **options)
    ax.figure.colorbar(picture, ax=ax, label=scale, pad=0.02)


# ---------------------------------------------------------------- drawn ideas

def canvas(claim, width, height, scale=0.62):
    """An empty drawing, titled with its claim: width x height units, y upwards, no axes."""
    _, ax = plt.subplots(figsize=(width * scale, height * scale + 0.35))
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal", title=claim)
    ax.axis("off")
    return ax


def box(ax, x, y, width, height, text="", fill="white", **style):
    """A box with its lower left corner at x, y, and text in its middle. Text on dark is white."""
    ink = "white" if fill in (DARK, BLUE, MIDDLE) else DARK
    ax.add_patch(plt.Rectangle((x, y), width, height, facecolor=fill, edgecolor=DARK, linewidth=1))
    ax.text(x + width / 2, y + height / 2, text, **{
        "ha": "center", "va": "center", "fontsize": 9, "color": ink, **style})


def arrow(ax, start, end, text="", color=DARK, **style):
    """An arrow from start (x, y) to end (x, y), with text beside its middle."""
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.3,
                                            "shrinkA": 1, "shrinkB": 1})
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    ax.annotate(text, (x, y), (5, 0), textcoords="offset points", **{
        "va": "center", "fontsize": 8.5, "color": color, **style})


def strip(ax, x, y, fills, width=0.4, height=0.6):
    """A row of tokens from x, y to the right, one small box for each fill."""
    for n, fill in enumerate(fills):
        ax.add_patch(plt.Rectangle((x + n * width, y), width, height, facecolor=fill,
                                   edgecolor="white", linewidth=1))


def note(ax, x, y, text, **style):
    """Words at a place of a drawing."""
    ax.text(x, y, text, **{"va": "center", "fontsize": 9, "color": DARK, **style})


def passage(claim, pieces, strength, columns=88):
    """A text as a picture, each token shaded by its strength, 0 to 1."""
    placed, row, column = [], 0, 0
    for piece, s in zip(pieces, strength, strict=True):
        words = piece.replace("\n", " ")
        if column + len(words) > columns:
            row, column, words = row + 1, 0, words.lstrip()
        placed.append((row, column, words, float(s)))
        column += len(words)
    ax = canvas(claim, columns, 1.9 * (row + 1), scale=0.088)
    for row, column, words, s in placed:
        y = ax.get_ylim()[1] - 1.9 * (row + 1)
        ax.add_patch(plt.Rectangle((column, y), len(words), 1.7, color=BLUES(s), linewidth=0))
        for n, letter in enumerate(words):
            ax.text(column + n + 0.5, y + 0.8, letter, ha="center", va="center", fontsize=8,
                    family="monospace", color="white" if s > 0.6 else DARK)
