"""The pictures of notebook 10."""
import matplotlib.pyplot as plt
import torch
from plots import BLUE, DARK, LIGHT, MIDDLE, arrow, axes, box, canvas, label, note, panels


def draw_harness():
    """One seam, every method, and what is measured of it."""
    ax = canvas("Every method is a cache behind the same three calls", 15, 4.8)
    box(ax, 0.2, 1.7, 3, 1.4, "dense attention\nreads a text once")
    box(ax, 5.4, 1.7, 3.4, 1.4, "a cache:\nprefill, update, decode", BLUE)
    box(ax, 11.2, 1.7, 3.5, 1.4, "the model's\nnext tokens")
    arrow(ax, (3.2, 2.4), (5.4, 2.4), "q, k, v")
    arrow(ax, (8.8, 2.4), (11.2, 2.4), "outputs")
    for n, (x, words) in enumerate(((5.9, "bytes that a step reads"), (8.2, "bytes kept"))):
        arrow(ax, (6.4 + 1.4 * n, 1.7), (x + 0.3, 0.9), color=MIDDLE)
        note(ax, x, 0.6, words, ha="center" if n else "right")
    arrow(ax, (12.9, 3.1), (12.9, 3.9), color=MIDDLE)
    note(ax, 12.9, 4.2, "KL to dense attention's", ha="center")
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
            label(ax, x, mean, name, dx=5, dy=4, color=colour, fontsize=8)
        ax.set(yscale="log", xscale="log", xlim=(3, 400), xticks=(5, 10, 20, 50, 100),
               xticklabels=(5, 10, 20, 50, 100))
        ax.minorticks_off()
    plt.show()


def plot_failures(found, claim):
    """found {method: {case: error}} as a table of greys."""
    names, cases = list(found), list(next(iter(found.values())))
    errors = torch.tensor([[by[case] for case in cases] for by in found.values()])
    _, ax = plt.subplots(figsize=(8.5, 0.42 * len(names) + 1.1))
    ax.set_title(claim)
    ax.imshow(errors.clamp(max=1), cmap="Greys", vmin=0, vmax=1.3, aspect="auto")
    for (row, column), x in zip(((r, c) for r in range(len(names)) for c in range(len(cases))),
                                errors.flatten().tolist(), strict=True):
        ax.text(column, row, f"{x:.2f}", ha="center", va="center", fontsize=9,
                color="white" if x > 0.7 else DARK)
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
    x = [most / 1e6 * n for n in (1e-3, 1)]
    ax.plot(x, [n * 1e6 / bandwidth * 1e3 for n in x], color=LIGHT, zorder=0)
    label(ax, x[1], x[1] * 1e6 / bandwidth * 1e3, "memory alone", color=MIDDLE, dy=-8, dx=-50)
    ax.set(xscale="log", yscale="log")
    ax.legend(loc="upper left", fontsize=9)
    plt.show()
