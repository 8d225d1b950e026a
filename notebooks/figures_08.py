"""The pictures of notebook 08."""
import matplotlib.pyplot as plt
import torch
from plots import BLUE, DARK, LIGHT, MIDDLE, arrow, axes, canvas, label, note, panels


def draw_idea():
    """Keys linked to near keys, and a query that looks from outside."""
    ax = canvas("Keys know the keys near them; a query comes from elsewhere", 15, 5.8)
    dice = torch.Generator().manual_seed(3)
    keys = torch.randn(26, 2, generator=dice) * torch.tensor([1.5, 1.0]) + torch.tensor([4, 2.5])
    near = torch.cdist(keys, keys).topk(4, largest=False).indices[:, 1:]
    for n, others in enumerate(near.tolist()):
        for m in others:
            ax.plot(*keys[[n, m]].T, color=LIGHT, linewidth=1, zorder=0)
    ax.plot(*keys.T, "o", color=DARK, markersize=5)
    ax.plot([12.5], [2.6], "*", color=BLUE, markersize=16)
    note(ax, 12.5, 1.9, "a query", ha="center", color=BLUE)
    note(ax, 4, 5.5, "keys, each linked to its nearest keys", ha="center")
    wanted = keys[(keys @ torch.tensor([1.0, 0.1])).topk(3).indices]
    for point in wanted.tolist():
        ax.plot(*point, "o", color=BLUE, markersize=8)
        arrow(ax, (12.1, 2.6), point, color=BLUE)
    note(ax, 9.6, 4.2, "its best keys: those that\nlie furthest its way", ha="center", color=BLUE)
    plt.show()


def plot_plane(k, asked, held_out, claim):
    """Keys (N, D), queries and keys left out, on the axis between their means and the widest axis
    of the keys."""
    towards = torch.nn.functional.normalize(asked.mean(0) - k.mean(0), dim=0)
    rest = k - k.mean(0)
    rest = rest - (rest @ towards)[:, None] * towards
    widest = torch.linalg.svd(rest, full_matrices=False).Vh[0]
    ax = axes(claim, "from the mean key towards the mean query", "the keys' widest direction")
    for x, colour, name, size in ((k, LIGHT, "keys", 5), (held_out, DARK, "keys left out", 9),
                                  (asked, BLUE, "queries", 9)):
        away = x - k.mean(0)
        ax.scatter(away @ towards, away @ widest, s=size, color=colour, label=name)
    ax.legend(loc="upper right")
    plt.show()


def plot_distances(queries, keys):
    """Mahalanobis distances of every head: of its queries against those of keys left out."""
    ax = axes(f"In {sum(q > k for q, k in zip(queries, keys, strict=True))} of {len(keys)} heads "
              "queries are further from the keys than keys are",
              "keys left out: distance [widths of the cloud]",
              "queries: distance\n[widths of the cloud]")
    ax.plot(keys, queries, "o", color=BLUE, markersize=4)
    top = max(*queries, *keys) * 1.05
    ax.plot([0, max(keys) * 1.2], [0, max(keys) * 1.2], color=LIGHT, zorder=0)
    label(ax, max(keys) * 1.2, max(keys) * 1.2, "equal", color=MIDDLE)
    ax.set(xlim=(0, None), ylim=(0, top))
    plt.show()


def plot_recalls(curves, claim):
    """curves {name: {"queries": points (share, recall), "keys": points}} of heads: means."""
    both = panels(claim, ["asked by queries", "asked by keys left out"],
                  "vectors compared [%]", "of the best 100 keys found [%]", size=(8.5, 3.6))
    for (name, by), style, colour in zip(curves.items(), ("o-", "s--", "^:"), (DARK, BLUE, MIDDLE),
                                         strict=False):
        for ax, points in zip(both, by.values(), strict=True):
            share, recall = torch.tensor(points).mean(0).T * 100          # (points,)
            ax.plot(share, recall, style, color=colour, label=name, markersize=4)
    both[0].set(ylim=(0, 103), xlim=(0, 60))
    both[1].legend(loc="lower right", fontsize=9)
    plt.show()


def plot_toy(keys, query, graphs, claim):
    """graphs {name: (links, path)} of 2-D keys: what a walk sees, and where it ends."""
    both = panels(claim, list(graphs), "", "", size=(8.5, 3.8))
    best = int((keys @ query).argmax())
    for ax, (links, path) in zip(both, graphs.values(), strict=True):
        for n, others in enumerate(links.tolist()):
            for m in others:
                if m >= 0:
                    ax.plot(*keys[[n, m]].T, color=LIGHT, linewidth=0.8, zorder=0)
        ax.plot(*keys.T, "o", color=MIDDLE, markersize=3)
        ax.plot(*keys[path].T, "o-", color=BLUE, markersize=5)
        ax.plot(*keys[best], "*", color=DARK, markersize=13)
        label(ax, *keys[best].tolist(), "best key", dx=-9, dy=-4, ha="right")
        label(ax, *keys[path[-1]].tolist(), f"ends after {len(path) - 1} steps", dx=5, dy=-11,
              color=BLUE)
        ax.set(xticks=[], yticks=[])
        ax.annotate("", (0.2, 0.9), (0.03, 0.9), xycoords="axes fraction",
                    arrowprops={"arrowstyle": "-|>", "color": DARK})
        ax.text(0.11, 0.93, "query", transform=ax.transAxes, ha="center", fontsize=9)
    plt.show()


def plot_stages(found, claim):
    """found {stage: {who asks: recalls of heads}}: means, and each head as a dot."""
    ax = axes(claim, "of the best 100 keys found [%]", "", size=(8, 3.9))
    colours = dict(zip(next(iter(found.values())), (LIGHT, DARK, BLUE), strict=True))
    for row, by in enumerate(found.values()):
        for n, (who, recalls) in enumerate(by.items()):
            y, percent = row + 0.26 * (n - 1), 100 * torch.tensor(recalls)
            ax.barh(y, percent.mean(), 0.24, color=colours[who], alpha=0.85,
                    label=who if not row else None)
            ax.plot(percent, [y] * len(percent), "o", color="white", markeredgecolor=DARK,
                    markersize=3.5, markeredgewidth=0.7)
    ax.set(yticks=range(len(found)), yticklabels=found, ylim=(len(found) - 0.5, -0.5),
           xlim=(0, 101))
    ax.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3, fontsize=9)
    ax.set_title(claim, pad=28)
    plt.show()


def plot_tail(sizes, errors, claim):
    """errors {name: (heads and queries, sizes)}: the median, and what 9 of 10 stay below."""
    ax = axes(claim, "keys attended to, of a head", "output error, relative")
    for (name, values), colour in zip(errors.items(), (DARK, BLUE), strict=True):
        for part, style in ((0.5, "o-"), (0.9, "o--")):
            line = values.quantile(part, 0)
            ax.plot(sizes, line, style, color=colour, markersize=4)
            if part == 0.5:
                label(ax, sizes[-1], float(line[-1]), name, color=colour)
    ax.text(0.02, 0.05, "solid: median; dashed: 9 of 10 queries are below", fontsize=9,
            transform=ax.transAxes)
    ax.set(xscale="log", yscale="log", xticks=sizes, xticklabels=sizes)
    ax.minorticks_off()
    plt.show()
