"""The pictures of notebook 10."""
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LinearSegmentedColormap
from plots import BLUE, DARK, LIGHT, MIDDLE, arrow, axes, box, canvas, label, note, panels


def draw_harness():
    """One seam, every method, and what is measured of it."""
    ax = canvas("Every method is a cache with the same three calls", 15, 4.8)
    box(ax, 0.2, 1.7, 3, 1.4, "dense attention\nreads a text once")
    box(ax, 5.4, 1.7, 3.4, 1.4, "a cache:\nprefill, update, decode", BLUE)
    box(ax, 11.2, 1.7, 3.5, 1.4, "the model's\nnext tokens")
    arrow(ax, (3.2, 2.4), (5.4, 2.4))
    arrow(ax, (8.8, 2.4), (11.2, 2.4))
    note(ax, 4.3, 2.7, "q, k, v", ha="center")
    note(ax, 10, 2.7, "outputs", ha="center")
    for x, end, words in ((6.4, 5.0, "bytes that a step reads"), (7.8, 9.2, "bytes kept")):
        arrow(ax, (x, 1.7), (end, 0.9), color=MIDDLE)
        note(ax, end, 0.6, words, ha="center")
    arrow(ax, (12.9, 3.1), (12.9, 3.9), color=MIDDLE)
    note(ax, 12.9, 4.2, "KL to dense attention", ha="center")
    plt.show()


def plot_map(found, claim):
    """found {method: (read, kept, low, mean, high)}: KL against both shares of dense."""
    both = panels(claim, ["bytes that a step reads", "bytes kept"],
                  "share of dense attention's [%]", "KL to dense [nats]", size=(9.5, 4.6))
    for ax, which in zip(both, (0, 1), strict=True):
        for name, row in found.items():
            x, (low, mean, high) = 100 * row[which], (max(n, 1e-6) for n in row[2:])
            colour = BLUE if name.startswith("wave") else DARK
            ax.plot([x, x], [low, high], color=LIGHT, linewidth=3, zorder=0)
            ax.plot(x, mean, "o", color=colour, markersize=5)
            is_left = name in ("window, 1/4", "wave, paper's") or (which == 1 and name == "wave")
            label(ax, x, mean, name, dx=-5 if is_left else 5, dy=4, color=colour, fontsize=8,
                  ha="right" if is_left else "left")
        ax.set(yscale="log", xscale="log", xlim=(8, 400), xticks=(10, 20, 50, 100),
               xticklabels=(10, 20, 50, 100))
        ax.minorticks_off()
    plt.show()


def plot_failures(found, claim):
    """found {method: {case: error}} as a table of greys; NaN is a dash."""
    names, cases = list(found), list(next(iter(found.values())))
    errors = torch.tensor([[by[case] for case in cases] for by in found.values()])
    _, ax = plt.subplots(figsize=(8.5, 0.42 * len(names) + 1.1))
    shades = LinearSegmentedColormap.from_list("errors", ["white", DARK])
    ax.imshow(errors.nan_to_num().clamp(max=4).sqrt(), cmap=shades, vmin=0, vmax=2.2, aspect="auto")
    for (row, column), x in zip(((r, c) for r in range(len(names)) for c in range(len(cases))),
                                errors.flatten().tolist(), strict=True):
        ax.text(column, row, f"{x:.2f}" if x == x else "-", ha="center", va="center", fontsize=9,
                color="white" if x > 1 else DARK)
    ax.set(xticks=range(len(cases)), xticklabels=cases, yticks=range(len(names)),
           yticklabels=names)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.set_title(claim, pad=28)
    plt.show()


def plot_roofline(points, bandwidth, claim):
    """points {name: [(bytes, least ms, median ms, most ms)]} above the line bytes / bandwidth."""
    ax = axes(claim, "bytes that a step of one layer must read [MB]", "measured time [ms]")
    for (name, rows), colour, mark in zip(points.items(), (DARK, BLUE), "os", strict=True):
        for size, low, middle, high in rows:
            ax.plot([size / 1e6] * 2, [low, high], color=MIDDLE, linewidth=1)
            ax.plot(size / 1e6, middle, mark, color=colour, markersize=5,
                    label=name if size == rows[0][0] else None)
    most = max(row[0] for rows in points.values() for row in rows)
    x = [most / 1e6 * n for n in (1e-2, 1)]
    ax.plot(x, [n * 1e6 / bandwidth * 1e3 for n in x], color=LIGHT, zorder=0)
    label(ax, x[1], x[1] * 1e6 / bandwidth * 1e3, "memory alone", color=MIDDLE, dy=-34,
          dx=0, ha="right")
    ax.set(xscale="log", yscale="log")
    ax.legend(loc="upper left", fontsize=9)
    plt.show()
