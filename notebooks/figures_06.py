"""The pictures of notebook 06."""
import matplotlib.pyplot as plt
from plots import BLUE, DARK, LIGHT, MIDDLE, arrow, axes, box, canvas, label, note, strip


def draw_split():
    """One program a head, and many: who reads what, and what is joined."""
    ax = canvas("Many programs share the tokens of a head; what each knows is joined at the end",
                15, 5.4)
    fills = [(LIGHT, MIDDLE, BLUE)[n // 2 % 3] for n in range(24)]
    strip(ax, 2.6, 4.1, fills, width=0.5)
    note(ax, 0.1, 4.4, "tokens, in blocks")
    for n, fill in enumerate((LIGHT, MIDDLE, BLUE)):
        x = 2.9 + 4.2 * n
        for block in range(4):
            arrow(ax, (3.1 + n + 3 * block, 4.1), (x + 1.5, 3.2), color=MIDDLE)
        box(ax, x, 2.2, 3, 1, f"part {n}: largest logit m,\nsum s, weighted values", fill)
        arrow(ax, (x + 1.5, 2.2), (8.6, 1.2))
    box(ax, 6.6, 0.2, 4, 1, "combine: all fade\nto the largest m")
    plt.show()


def plot_parts(S, busy, extra, enough):
    """The share of time that processors work, and the bytes added, by parts a head."""
    ax = axes(f"Model: {enough} parts a head keep the device {busy[enough - 1]:.0f} % busy; "
              "one more starts a second round", "parts S of each of 8 heads", "share [%]")
    ax.plot(S, busy, color=DARK, linewidth=1.2)
    ax.plot(S, extra, color=BLUE, linestyle="--")
    label(ax, 20, 38, "work done, of what 132\nmultiprocessors could do", dx=0)
    label(ax, 44, extra[43], "bytes more", dx=0, dy=10, color=BLUE)
    ax.axvline(enough, color=LIGHT, zorder=0)
    ax.set(ylim=(-4, 108), xlim=(1, 64), xticks=[1, enough, 32, 48, 64])
    plt.show()


def plot_ledger(bars, floor):
    """bars {name: {part: bytes}}; the least is the last."""
    totals = {name: sum(parts.values()) / floor for name, parts in bars.items()}
    eager, compiled, _, ours, _ = totals.values()
    ax = axes(f"Bytes over the least: eager {eager:.0f} times, compiled {compiled:.0f} times, "
              f"kernels {ours:.1f} times", "moved in one layer's step [MB]", "", size=(8, 3.5))
    most = max(totals.values()) * floor
    for y, parts in enumerate(bars.values()):
        left = 0
        for i, (name, n) in enumerate(sorted(parts.items(), key=lambda item: -item[1])):
            ax.barh(y, n / 1e6, 0.6, left / 1e6, color=(MIDDLE, LIGHT)[i % 2], edgecolor="white",
                    linewidth=0.5)
            if n > 0.08 * most:
                ax.text((left + n / 2) / 1e6, y, name, ha="center", va="center", fontsize=9)
            left += n
        label(ax, left / 1e6, y, f"{left / 1e6:.2f}")
    ax.set(yticks=range(len(bars)), yticklabels=bars, ylim=(len(bars) - 0.5, -0.5))
    plt.show()


def plot_tiles(facts, limits):
    """facts {device: [needs of a block]}, limits {device: KB}: the largest blocks that fit."""
    fits = {name: max(n["BN"] for n in facts[name]
                      if n["shared"] <= 1024 * kb and not n["spilled"])
            for name, kb in limits.items()}
    ax = axes("The largest blocks that fit: " + ", ".join(f"{n} on {name}"
                                                          for name, n in fits.items()),
              "tokens in a block", "shared memory of a program [KB]", size=(7.5, 4))
    for (name, by_block), style, colour in zip(facts.items(), ("o-", "s--", "^:"),
                                               (DARK, BLUE, MIDDLE), strict=True):
        BN, shared = zip(*((n["BN"], n["shared"] / 1024) for n in by_block), strict=True)
        ax.loglog(BN, shared, style, color=colour, base=2, markersize=5, label=f"needs on {name}")
        for n, kb in zip(by_block, shared, strict=True):
            if n["spilled"]:
                ax.plot(n["BN"], kb, "x", color=colour, markersize=12)
        ax.axhline(limits[name], color=colour, linestyle=style[1:], linewidth=1)
        label(ax, BN[0], limits[name], f"limit of {name}", dx=0, dy=7, color=colour)
    ax.plot([], [], "x", color=MIDDLE, markersize=9, linestyle="", label="spills registers")
    ax.set(xlim=(13, 330), ylim=(10, 400), xticks=BN, xticklabels=BN, yticks=(16, 64, 256),
           yticklabels=(16, 64, 256))
    ax.legend(loc="lower right", fontsize=9)
    plt.show()
    return fits
