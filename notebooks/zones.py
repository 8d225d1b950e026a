"""The README's opening picture: one real row of attention, and the zones in which it is computed.

    python notebooks/zones.py                   # or: make picture; writes results/zones.png

The default model has read examples/lighthouse.txt and is about to write the first digit of its
answer. The row is that of one query head over every token; HEAD was chosen because it uses all
zones: many find the number and little else, many look nowhere in particular.
"""
import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).parent.parent)]
import matplotlib.pyplot as plt
import torch
from capture import captured
from plots import BLUE, DARK, LIGHT, MIDDLE, label

from retroinfer import RetroConfig, cluster_segment, limits_of, rank_clusters

LAYER, HEAD = 23, (2, 1)                        # kv head, query head of its group
ANSWER = "94826"
COLOURS = {"exact": DARK, "retrieved": BLUE, "estimated": MIDDLE, "dropped": LIGHT}


def attention_row(text, config):
    """Of one step: weights (T,) of the tokens, and of its clusters, best first, what a plot needs.

    zones (T,) are indices into COLOURS; a cluster has members, its share, its estimated share and
    its zone.
    """
    (h, g), H, D = HEAD, *text.k.shape[1::2]
    now = next(t for t in range(text.n_prompt, len(text.pieces)) if text.pieces[t + 1] == ANSWER[0])
    q, k, _ = (x[:, :, :now + 1] for x in text.layer(LAYER))
    first = config.sink + config.segment
    heard = q[0, :, :first].reshape(H, -1, D).double()                      # (H, G*first, D)
    q = q[:, :, now].view(1, H, -1, D) * D**-0.5                            # (B, H, G, D)
    n_text = (text.n_prompt - config.sink - config.local) // config.cluster * config.cluster
    middle = torch.arange(config.sink, config.sink + n_text)
    place = middle.float()[:, None].expand(1, H, -1, 2)         # values that say where they were
    index, _, place = cluster_segment(k[:, :, middle], place, config, energy=heard.square().sum(1))
    method = config.method()
    R, ranked = (int(n) for n in limits_of(config, torch.tensor(n_text)))
    near = torch.cat([k[:, :, :config.sink], k[:, :, config.sink + n_text:]], 2)
    far = method.centroid_logits(q, index, method)                              # (B, H, G, C)
    order = rank_clusters(q, far, q @ near.mT, index, index.sizes.shape[2], method)
    mass = far + method.log_count(q, index)
    logits = k[0, h] @ q[0, h, g]                                           # (T,)
    weights = logits.softmax(0)
    zones, clusters = torch.zeros(now + 1, dtype=torch.int64), []
    for rank, c in enumerate(order[0, h].tolist()):
        size, first = int(index.sizes[0, h, c]), int(index.offsets[0, h, c])
        if not size:
            break
        members = place[0, h, first:first + size, 0].long()
        zone = 1 if rank < R else 2 if rank < ranked else 3
        zones[members] = zone
        clusters.append(SimpleNamespace(
            size=size, share=float(weights[members].sum()), zone=zone,
            estimate=float((mass[0, h, g, c] - logits.logsumexp(0)).exp())))
    return weights, zones, clusters


def draw_row(ax, text, weights, zones):
    """Every token of the text where it stands; the weights of a zone in its colour."""
    for zone in (3, 2, 1, 0):
        at = (zones == zone).nonzero()[:, 0]
        ax.vlines(at, 1e-3, weights[at] * 100, color=list(COLOURS.values())[zone],
                  linewidth=(1.6, 1.6, 0.9, 0.7)[zone])
    found = text.find(ANSWER)
    top = max(found, key=lambda t: weights[t])
    label(ax, top, float(weights[top]) * 100, f"“{ANSWER}”, the answer", dx=7, dy=-2, color=BLUE,
          fontweight="bold")
    label(ax, 0, float(weights[0]) * 100, "first tokens: always read", dx=7, dy=-2)
    label(ax, len(weights) - 1, float(weights[-64:].max()) * 100, "latest tokens: always read",
          dx=0, dy=12, ha="right")
    ax.set_xlabel("every token, where it stands in the text")
    ax.set_ylabel("its attention [%]")


def draw_clusters(ax, clusters):
    """Every cluster in its rank, as wide as it has tokens; a line is what is estimated of it."""
    left = 0
    for c in clusters:
        ax.bar(left, c.share * 100, c.size, align="edge", color=list(COLOURS.values())[c.zone],
               linewidth=0)
        if c.zone == 2:
            ax.hlines(c.estimate * 100, left, left + c.size, color=DARK, linewidth=1.3)
        left += c.size
    names = ("retrieved: every key is read", "estimated: a centroid stands for them",
             "dropped")
    colours = list(COLOURS.values())[1:]
    for zone, (name, colour) in enumerate(zip(names, colours, strict=True), 1):
        share = sum(c.share for c in clusters if c.zone == zone)
        ax.bar(0, 0, color=colour, label=f"{name}, {share * 100:.0f} % of the attention")
    ax.plot([], [], color=DARK, linewidth=1.3, label="what the centroid says")
    ax.legend(loc="upper right", fontsize=9)
    ax.set_xlabel("the same tokens in clusters, as the query ranks them")
    ax.set_ylabel("a cluster's attention [%]")


def draw(path):
    """Write the picture."""
    text, config = captured(), RetroConfig()
    weights, zones, clusters = attention_row(text, config)
    share = [float(weights[zones == zone].sum()) * 100 for zone in range(4)]
    tokens = [int((zones == zone).sum()) for zone in range(4)]
    entries = sum(c.zone == 2 for c in clusters)
    figure, both = plt.subplots(2, 1, figsize=(9, 5.4))
    figure.suptitle(
        f"This step reads {tokens[0] + tokens[1]} of {len(weights):,} keys, "
        f"{share[0] + share[1]:.0f} % of its attention; {entries} centroids stand for "
        f"{share[2]:.0f} % more", x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    draw_row(both[0], text, weights, zones)
    draw_clusters(both[1], clusters)
    for ax in both:
        ax.set(yscale="log", ylim=(1e-3, 200), xlim=(-25, len(weights) + 25),
               yticks=(0.01, 1, 100), yticklabels=("0.01", "1", "100"))
        ax.minorticks_off()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/zones.png"))
    draw(parser.parse_args().out)
