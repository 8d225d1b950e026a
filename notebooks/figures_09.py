"""The pictures of notebook 09."""
import matplotlib.pyplot as plt
import torch
from plots import BLUE, DARK, LIGHT, MIDDLE, arrow, axes, box, canvas, label, note, panels, strip


def draw_codes():
    """A key becomes eight bytes; anchors, first and latest tokens stay whole."""
    ax = canvas("A code says which codeword stands for eight channels; a few tokens stay exact",
                15, 5.2)
    strip(ax, 0.3, 3.9, [DARK] * 2 + [LIGHT if n % 7 - 3 else BLUE for n in range(26)] + [DARK] * 4,
          width=0.45)
    note(ax, 0.3, 4.8, "tokens: black are the first and the latest, blue are anchors: all exact")
    for n in range(8):
        box(ax, 1.4 + 0.9 * n, 1.9, 0.85, 0.7, "8 ch.", LIGHT, fontsize=7.5)
        box(ax, 1.4 + 0.9 * n, 0.4, 0.85, 0.7, f"{(37 * n * n + 11) % 256}", "white")
        arrow(ax, (1.82 + 0.9 * n, 1.9), (1.82 + 0.9 * n, 1.1), color=MIDDLE)
    arrow(ax, (4.9, 3.9), (4.9, 2.6), "a key of 64 channels: 1,024 bits")
    note(ax, 8.9, 0.75, "its code: 8 bytes, 64 bits,\n1 bit a number")
    box(ax, 11.6, 1.6, 3.1, 1.3, "codebook of each group:\n256 codewords\nof 8 channels")
    arrow(ax, (11.6, 2.2), (8.7, 2.2))
    note(ax, 10.15, 2.5, "nearest", ha="center")
    plt.show()


def plot_truth(truth, scores, claim):
    """truth (n,), scores {name: (n,)} of tokens of one head: a panel for each score."""
    def ranks(x):
        return x.argsort().argsort().double()
    alike = [torch.corrcoef(torch.stack([ranks(truth), ranks(score)]))[0, 1]
             for score in scores.values()]
    names = [f"{name}, rank corr. {x:.2f}" for name, x in zip(scores, alike, strict=True)]
    every = panels(claim, names, "score, share of the largest",
                   "true damage,\nshare of the largest", size=(9.5, 3.0))
    for ax, score in zip(every, scores.values(), strict=True):
        x, y = ((a / a.max()).clamp(min=1e-6) for a in (score, truth))
        ax.plot(x, y, ".", color=DARK, markersize=3)
        ax.set(xscale="log", yscale="log", xlim=(1e-4, 1.5), ylim=(1e-5, 1.5))
    plt.show()


def plot_found(found, claim):
    """found {score: share of all damage in the best 1 % by that score, of each head}."""
    ax = axes(claim, "of all damage, in the 1 % of the tokens that a score chooses [%]", "",
              size=(7.5, 3.0))
    for row, shares in enumerate(found.values()):
        percent = 100 * torch.tensor(shares)
        ax.barh(row, percent.mean(), 0.6, color=LIGHT)
        ax.plot(percent, [row] * len(percent), "|", color=DARK, markersize=8)
    ax.set(yticks=range(len(found)), yticklabels=found, ylim=(len(found) - 0.5, -0.5))
    plt.show()


def plot_bits(lengths, bits, claim):
    """bits {part: bits a number at each length}, stacked."""
    ax = axes(claim, "tokens", "true bits a number")
    ax.stackplot(lengths, list(bits.values()), labels=list(bits),
                 colors=[BLUE, DARK, MIDDLE, LIGHT])
    ax.set(xscale="log", xlim=(lengths[0], lengths[-1]), ylim=(0, 7))
    ax.legend(loc="upper right", fontsize=9)
    plt.show()


def plot_kl(anchors, found, claim):
    """found {bits: {text: KL at each share of anchors}}."""
    ax = axes(claim, "anchors, share of the tokens [%]", "KL to dense [nats]")
    marks = dict(zip(next(iter(found.values())), ("o-", "s--", "^:"), strict=False))
    for (bits, by), colour in zip(found.items(), (BLUE, DARK), strict=True):
        for text, kl in by.items():
            ax.plot([100 * a for a in anchors], kl, marks[text], color=colour, markersize=4)
            label(ax, 100 * anchors[-1], kl[-1], f"{bits:g} bit, {text}", color=colour)
    ax.set(yscale="log")
    plt.show()


def plot_ladder(ladder, claim):
    """ladder {rung: (bytes read for a token, errors (n,))}: medians, and 8 of 10 errors."""
    ax = axes(claim, "bytes read for a token of the past",
              "output error, relative\n(line: 8 of 10 queries)")
    for name, (size, errors) in ladder.items():
        low, middle, high = (float(errors.quantile(p)) for p in (0.1, 0.5, 0.9))
        ax.plot([size, size], [low, high], color=MIDDLE, linewidth=1)
        ax.plot(size, middle, "o", color=BLUE)
        is_code = name.startswith("code")
        at = high if name.endswith("anchors") else middle       # else it crosses the centroid's
        label(ax, size, at, name, dx=-8 if is_code else 8, dy=-6 if name == "code" else 6,
              ha="right" if is_code else "left")
    ax.set(xscale="symlog", ylim=(-0.05, None))
    ax.set_xlim(-1, 900)
    plt.show()
