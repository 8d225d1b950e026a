"""The pictures of notebook 07."""
import matplotlib.pyplot as plt
import numpy as np
import torch
from plots import (
    BLUE,
    DARK,
    LIGHT,
    MIDDLE,
    SHADES,
    arrow,
    axes,
    box,
    canvas,
    heatmap,
    label,
    note,
    strip,
)


def draw_buffer():
    """Where the blocks of a step come from, and where missing ones go."""
    ax = canvas("A step finds most blocks on the device; the others cross the bus", 15, 5.6)
    box(ax, 0.2, 0.3, 8.2, 4.6, "", "white")
    note(ax, 0.4, 4.6, "device")
    box(ax, 10.6, 0.3, 4.2, 4.6, "", "white")
    note(ax, 10.8, 4.6, "host")
    box(ax, 0.6, 3, 2.2, 1, "ranking:\nblocks asked for")
    strip(ax, 3.9, 3.2, [BLUE if n % 3 else LIGHT for n in range(9)], width=0.42)
    note(ax, 3.9, 4.1, "block cache: S slots")
    strip(ax, 11, 3.2, [LIGHT if n % 4 else DARK for n in range(9)], width=0.38)
    note(ax, 11, 4.1, "all keys and values")
    box(ax, 4.2, 0.7, 3.6, 0.9, "execution buffer → attention", LIGHT)
    arrow(ax, (2.8, 3.5), (3.9, 3.5))
    arrow(ax, (5, 3.2), (5, 1.6), "hits", BLUE)
    arrow(ax, (12.4, 3.2), (7.8, 1.3))
    note(ax, 8.6, 0.9, "misses,\nover the bus", fontsize=8.5)
    arrow(ax, (7, 1.6), (7, 3.2))
    note(ax, 7.15, 2.4, "admit,\nlater", fontsize=8.5)
    plt.show()


def plot_asked(sets, n_clusters, repeats, n_rows, lot=8):
    """Which clusters (in lots) each step asks for; sets: of each step the clusters."""
    grid = torch.zeros(n_rows, len(sets))
    for t, clusters in enumerate(sets):
        grid[list(clusters), t] = 1
    lots = grid.view(-1, lot, len(sets)).sum(1)
    ax = axes(f"One head: {repeats:.0%} of a step's clusters were asked for by the step before",
              "step", "cluster, along the text")
    heatmap(ax, lots.masked_fill(lots == 0, torch.nan), f"asked for, of {lot}", vmin=1, vmax=lot,
            cmap=SHADES, extent=(0, len(sets), 0, len(grid)))
    ax.set_ylim(0, n_clusters)
    plt.show()


def plot_policies(ratios, curves, control, step_share, claim):
    """Hit ratios by size and policy. control: LRU's, of the same steps in random order."""
    ax = axes(claim, "block cache, share of a head's store [%]", "blocks hit [%]", size=(7.5, 3.9))
    percent = [100 * ratio for ratio in ratios]
    for (name, curve), style, color in zip(curves.items(), ("o-", "s:", "^--", "D-."),
                                           (DARK, MIDDLE, BLUE, MIDDLE), strict=True):
        ax.plot(percent, [100 * x for x in curve], style, color=color, markersize=4, label=name)
    ax.plot(percent, [100 * x for x in control], "x-", color=LIGHT, markersize=5, zorder=0,
            label="LRU, steps in random order")
    ax.axvline(100 * step_share, color=LIGHT, linewidth=1)
    label(ax, 100 * step_share, 96, "one step's\nblocks", dx=-6, ha="right", color=MIDDLE)
    ax.set(xscale="log", ylim=(0, 102))
    ax.set_xticks(percent, [f"{x:g}" for x in percent])
    ax.minorticks_off()
    ax.legend(loc="lower right", fontsize=9)
    plt.show()


def plot_steps(rows, weights_end, name):
    """rows {name: (total ms, parts {part: ms}, when the misses start)}: a step as bars."""
    none, cached, beside, _ = (total for total, *_ in rows.values())
    ax = axes(f"Predicted: the cache saves {none - cached:.0f} of {none:.0f} ms, the overlap "
              f"{cached - beside:.1f} more", f"predicted time of a step, one sequence, {name} [ms]",
              "", size=(7.5, 3.8))
    shades = {"weights": LIGHT, "index, attention": MIDDLE, "hits": DARK}
    for row, (total, parts, miss_start) in enumerate(rows.values()):
        at = 0
        for part, color in shades.items():
            ax.barh(-row, parts[part], left=at, height=0.34, color=color)
            at += parts[part]
        ax.barh(-row - 0.36, parts["misses"], left=miss_start, height=0.34, color=BLUE)
        label(ax, total, -row - 0.18, f"{total:.1f}")
    label(ax, 0, 0, "weights", color=DARK)
    label(ax, weights_end, 0.2, "index, attention", dx=-20, dy=6, va="bottom", color=MIDDLE)
    label(ax, cached - rows["cache"][1]["misses"], -1, "hits", color=DARK)
    label(ax, none, -0.36, "misses, over the bus", dx=-8, ha="right", color="white")
    ax.set_yticks([-row - 0.18 for row in range(len(rows))], list(rows))
    ax.set(ylim=(-len(rows) + 0.3, 0.65), xlim=(0, none * 1.08))
    ax.tick_params(axis="y", length=0)
    plt.show()


def plot_gpus(names, speeds, fits):
    """speeds {name: tokens/s of each GPU}: without a cache, with one, with all on the device."""
    none, cached, room = np.array(list(speeds.values()))
    ax = axes(f"Predicted: with the cache {(cached / room).min():.0%} or more of the speed with "
              "room for all", "", "predicted tokens/s, one sequence", size=(7.5, 3.8))
    for i, (name, color) in enumerate(zip(speeds, (LIGHT, DARK, "white"), strict=True)):
        at = np.arange(len(names)) + 0.27 * (i - 1)
        ax.bar(at, speeds[name], 0.25, color=color, edgecolor=DARK, linewidth=0.8, label=name)
        for x, y, is_room in zip(at, speeds[name], fits, strict=True):
            words = "" if is_room or i < 2 else "\nno room"
            label(ax, x, y, f"{y:.0f}{words}", dx=0, dy=3, ha="center", va="bottom")
    ax.set_xticks(range(len(names)), names)
    ax.set_ylim(0, 1.35 * room.max())
    ax.legend(loc="upper left", ncols=3, fontsize=9, columnspacing=1.2)
    plt.show()
    return none, cached, room


def plot_trust(measured, by_bytes, by_both, at_its_own, claim):
    """Tokens a second by cache ratio: measured, and what the model says."""
    ax = axes(claim, "block cache, share of a head's store [%]",
              "tokens/s, 8 sequences, A100-PCIe")
    percent = [100 * ratio for ratio in measured]
    for values, name, style, color in (
            (by_bytes, "bytes only", "^:", MIDDLE),
            (list(measured.values()), "measured", "o-", DARK),
            (by_both, "bytes and a time on the host", "s--", BLUE)):
        ax.plot(percent, values, style, color=color, markersize=5, label=name)
    ax.plot([5], [at_its_own], "x", color=DARK, markersize=9, markeredgewidth=2,
            label="the same, with the hits in its own log")
    ax.set(xscale="log", ylim=(0, 1.25 * max(by_bytes + list(measured.values()))))
    ax.set_xticks(percent, [f"{x:g}" for x in percent])
    ax.minorticks_off()
    ax.legend(loc="lower right", fontsize=9)
    plt.show()
