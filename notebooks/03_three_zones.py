# %% [markdown]
# # What is lost if most tokens are only estimated?
#
# **Goal.** Put the three zones into one softmax: tokens that are read, clusters that stand for
# their tokens, and clusters that are left out. See why an estimate is always a little too small,
# compare it with a judge who knows the best tokens beforehand, and find where it fails.
#
# **Predict first.** Read only the best sixteen clusters of a text, and be wrong by some error. Now
# add one estimated entry for each of the next clusters, up to a quarter of all. By what share does
# the error fall? And how much better is someone who may pick the very best tokens, as many as we
# read, but estimates nothing?

# %%
import sys; sys.path[:0] = [".."]
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
from capture import captured
from ipywidgets import interact
from plots import BLUE, DARK, LIGHT, MIDDLE, axes, label

from retroinfer import (
    Budget,
    RetroConfig,
    cluster_segment,
    gather_clusters,
    limits_of,
    tripartite_attention,
)

text = captured()                       # clusters kept, ranked and estimated as in the paper
config = replace(RetroConfig.paper(), iterations=3, min_retrieve=16)
n_layers, H, T, D = text.k.shape
G = text.q.shape[1] // H
N = (text.n_prompt - config.sink - config.local) // config.cluster * config.cluster
R, ranked = (int(n) for n in limits_of(config, torch.tensor(N)))
E = ranked - R
print(f"of {N // config.cluster} clusters {R} are retrieved and {E} estimated")

# %% [markdown]
# One layer, ready for a step: the queries of the answer's tokens, the steady zone, and the text in
# clusters, their tokens side by side in a *store*.

# %%
class Layer:
    """What a step meets in layer n: queries, the steady zone, and clusters of the text."""

    def __init__(self, n, config=config):
        q, k, v = text.layer(n)
        middle = slice(config.sink, config.sink + N)
        self.q = q[0].view(H, G, T, D)[:, :, text.n_prompt:]            # (H, G, Tq, D)
        self.k, self.v = (torch.cat([x[:, :, :config.sink], x[:, :, config.sink + N:]], 2)
                          for x in (k, v))                              # (1, H, W, D)
        self.index, self.k_store, self.v_store = cluster_segment(
            k[:, :, middle], v[:, :, middle], config)                   # (1, H, N, D)
        sizes = self.index.sizes[0].long()                              # (H, C)
        self.ids = torch.stack([torch.arange(len(n)).repeat_interleave(n) for n in sizes])

layers = {n: Layer(n) for n in range(0, n_layers, 3)}
a = layers[9]

# %% [markdown]
# ## An estimate never outweighs its tokens
#
# A token's weight before normalisation is exp(q·k). A cluster of *s* tokens with the mean key *c*
# stands for them with s·exp(q·c). The exponential curves upwards, so the mean of exponentials is
# at least the exponential of the mean (Jensen's inequality): the estimate is never too large. It
# is right when all the tokens score alike.

# %%
def masses(a, t, head, g):
    """True and estimated weight (C,) of each cluster, before normalisation."""
    q = a.q[head, g, t].double() / D**0.5
    true = torch.zeros(a.index.sizes.shape[2], dtype=q.dtype).index_add_(
        0, a.ids[head], (a.k_store[0, head].double() @ q).exp())
    estimate = a.index.sizes[0, head] * (a.index.centroids[0, head].double() @ q).exp()
    return true, estimate

true, estimate = masses(a, t=7, head=0, g=0)
live = true > 0
ax = axes("No cluster's estimate is above its tokens' weight", "weight of its tokens",
          "weight of its estimate", size=(5.2, 4.2))
ax.loglog(true[live], estimate[live], ".", color=DARK, markersize=4)
ends = torch.stack([true[live].min(), true[live].max()])
ax.loglog(ends, ends, color=BLUE, linewidth=1)
label(ax, ends[1], ends[1], "equal", dx=-40, dy=0, color=BLUE)
plt.show()
assert (estimate[live] <= true[live] * (1 + 1e-6)).all()
print(f"all estimates together: {estimate.sum() / true.sum():.0%} of the true weight")

# %% [markdown]
# ## One softmax
#
# The three zones need no second pass. A centroid is a key like any other once log(s) is added to
# its logit, for s·exp(q·c) = exp(q·c + log s); its value is the mean of the values.

# %%
def three_zones(a, t, head, g, order):
    """Output (D,) of one query head; order: the clusters as the group ranks them."""
    q = a.q[head, g, t] / D**0.5
    n = text.n_prompt + t + 1 - N                                   # steady tokens seen by token t
    is_read = torch.isin(a.ids[head], order[:R])
    far, size = order[R:R + E], a.index.sizes[0, head]
    k = [a.k[0, head, :n], a.k_store[0, head, is_read], a.index.centroids[0, head, far]]
    v = [a.v[0, head, :n], a.v_store[0, head, is_read], a.index.means[0, head, far]]
    bias = [torch.zeros(n + int(is_read.sum())), size[far].log()]
    return (torch.cat(k) @ q + torch.cat(bias)).softmax(0) @ torch.cat(v)

def ranking(a, t, head):
    """Clusters from the most to the least likely for the query heads of a group together."""
    logits = a.q[head, :, t] / D**0.5 @ a.index.centroids[0, head].mT       # (G, C)
    logits[:, a.index.sizes[0, head] == 0] = -torch.inf
    return logits.softmax(-1).sum(0).argsort(descending=True)

mine = torch.stack([torch.stack([three_zones(a, 7, h, g, ranking(a, 7, h)) for g in range(G)])
                    for h in range(H)])                                     # (H, G, D)

# %% [markdown]
# The library does it for a batch, with shapes that never change: a *budget* says how many clusters
# are read and ranked, and `fetch` brings the tokens of those that are read.

# %%
def library(a, t, by_mass=False):
    """Output (H, G, D) of the library."""
    n = text.n_prompt + t + 1 - N
    steady = a.k[:, :, :n], a.v[:, :, :n], torch.zeros(1, H, 1, n)
    budget = Budget(torch.tensor([[R]]), torch.tensor([[R + E]]), values=1.0, R=R, K=R + E,
                    N=R * config.largest)
    stores = a.k_store, a.v_store
    def fetch(ids, ends):
        return gather_clusters(a.index, stores, budget.N, ids, ends)
    method = replace(config, by_mass=by_mass).method()
    return tripartite_attention(a.q[None, :, :, t], steady, a.index, budget, fetch, method)[0]

torch.testing.assert_close(mine, library(a, 7))

# %% [markdown]
# ## Against a judge who knows
#
# Take away the estimates, and see what they were worth. Then let an *oracle* choose: for every
# query head, the tokens with the largest weights, exactly as many as we read. No index could do
# that, for it takes all the keys to know.

# %%
def outputs(a, t, n_read):
    """Outputs (H, G, D) by name, and how many tokens a head reads: n_read clusters of them."""
    q, n = a.q[:, :, t] / D**0.5, text.n_prompt + t + 1 - N
    v = torch.cat([a.v[0, :, :n], a.v_store[0], a.index.means[0]], 1)
    steady, x = q @ a.k[0, :, :n].mT, q @ a.k_store[0].mT                   # (H, G, N)
    far = q @ a.index.centroids[0].mT + a.index.sizes[0, :, None].log()     # (H, G, C)
    rank = torch.stack([ranking(a, t, h) for h in range(H)]).argsort(-1)[:, None]   # (H, 1, C)
    is_read = (rank < n_read).gather(-1, a.ids[:, None])                    # (H, 1, N)
    nth = x.sort(-1, descending=True).values.gather(
        -1, is_read.sum(-1, keepdim=True).expand(-1, G, -1) - 1)            # (H, G, 1)

    def softmax(tokens, clusters):
        x_tokens, x_far = x.where(tokens, -torch.inf), far.where(clusters, -torch.inf)
        return torch.cat([steady, x_tokens, x_far], -1).softmax(-1) @ v

    none, is_far = torch.zeros_like(rank, dtype=bool), (rank >= n_read) & (rank < R + E)
    return {"dense": softmax(torch.ones_like(is_read), none), "retrieved": softmax(is_read, none),
            "and estimated": softmax(is_read, is_far), "oracle": softmax(x >= nth, none)}

torch.testing.assert_close(outputs(a, 7, R)["and estimated"], mine)

# %%
def errors(a, n_read=R):
    """|output - dense| / |dense| (Tq, H, G) by name, over the tokens of the answer."""
    found = [outputs(a, t, n_read) for t in range(0, a.q.shape[2], 2)]
    return {name: torch.stack([(o[name] - o["dense"]).norm(dim=-1) / o["dense"].norm(dim=-1)
                               for o in found]) for name in found[0] if name != "dense"}

by_layer = {n: errors(a) for n, a in layers.items()}
every = {name: torch.stack([e[name] for e in by_layer.values()]) for name in by_layer[0]}
mean = {name: float(e.mean()) * 100 for name, e in every.items()}
gain = 1 - mean["and estimated"] / mean["retrieved"]

ax = axes(f"Estimates take {gain * 100:.0f} % of the error away, no token more is read",
          "layer", "error, mean of the heads [%]")
for name, colour, dash, dy in (("retrieved", MIDDLE, "-", 6), ("and estimated", DARK, "-", 4),
                               ("oracle", BLUE, "--", -8)):
    y = every[name].mean((1, 2, 3)) * 100
    ax.plot(list(layers), y, color=colour, linestyle=dash)
    label(ax, list(layers)[-1], y[-1], f"{name}: {mean[name]:.1f} %", dy=dy)
ax.set(ylim=0, xlim=0, xticks=list(layers))
plt.show()
assert gain > 0.2 and every["and estimated"][0].mean() < every["oracle"][0].mean()
assert mean["oracle"] < mean["and estimated"] < mean["retrieved"]

# %% [markdown]
# In the first layer the oracle is beaten: attention is spread over so many tokens there that the
# best few, even the very best, are not enough, and a rough idea of all is worth more. Is that the
# rule? For every head, count the tokens that it needs for 90 % of its attention.

# %%
def tokens_needed(a):
    """Tokens of the text (Tq, H, G) that hold 90 % of a query's attention to it."""
    w = (a.q[:, :, ::2] @ a.k_store[0, :, None].mT / D**0.5).softmax(-1)    # (H, G, Tq, N)
    return ((w.sort(-1, descending=True).values.cumsum(-1) < 0.9).sum(-1) + 1).permute(2, 0, 1)

needed = torch.stack([tokens_needed(a) for a in layers.values()]).float().mean(1).flatten()
ours, oracle = (every[name].mean(1).flatten() for name in ("and estimated", "oracle"))
wide = needed > needed.quantile(0.9)
wins, others = ((ours < oracle)[heads].float().mean() for heads in (wide, ~wide))

# %%
ax = axes(f"Of the tenth of the heads that look widest {wins * 100:.0f} % beat the oracle, of the "
          f"rest {others * 100:.0f} %", "tokens that hold 90 % of the attention",
          "our error / oracle's")
ax.loglog(needed[~wide], (ours / oracle)[~wide], ".", color=MIDDLE)
ax.loglog(needed[wide], (ours / oracle)[wide], "o", color=DARK, markersize=5)
ax.axhline(1, color=BLUE, linestyle="--", linewidth=1)
label(ax, float(needed.min()), 1, "equal", dx=0, dy=-8, color=BLUE)
plt.show()
assert wins > 0.6 and others < 0.3

# %% [markdown]
# ## What an estimate saves
#
# Without estimates one can reach the same error by reading more. How much more?

# %%
budgets = (4, 8, 16, 24, 32, 48)
probe = [layers[n] for n in (3, 12, 21)]
curve = {n: {name: float(torch.stack([e[name] for e in (errors(a, n) for a in probe)]).mean()) * 100
             for name in every} for n in budgets}
target = curve[R]["and estimated"]
as_good = next(n for n in budgets if n == budgets[-1] or curve[n]["retrieved"] <= target)
ax = axes(f"Without estimates, {as_good} clusters must be read to do what {R} do with them",
          "clusters read exactly", "error, 3 layers [%]", size=(7.5, 3.2))
for name, colour, dash, dy in (("retrieved", MIDDLE, "-", 8), ("and estimated", DARK, "-", 3),
                               ("oracle", BLUE, "--", -6)):
    ax.plot(budgets, [curve[n][name] for n in budgets], "o", color=colour, linestyle=dash,
            markersize=4)
    label(ax, budgets[-1], curve[budgets[-1]][name], name, dy=dy)
ax.plot([R, as_good], [target, target], color=LIGHT, zorder=0)
ax.set(ylim=0, xlim=0, xticks=budgets)
plt.show()
assert as_good > R and curve[as_good]["retrieved"] <= target

# %% [markdown]
# ## Turn the knob
#
# The zones over one query's attention: each bar is a cluster, ranked by its centroid; its height
# is the weight of its tokens. Run the cell after this one in Jupyter and move the slider.

# %%
def draw(retrieved=R):
    """The clusters of a query in the order of their ranks, by zone; title: what is covered."""
    head, g, t = 0, 0, 7
    order = ranking(a, t, head)
    true = masses(a, t, head, g)[0][order]
    true = true / true.sum() * 100
    zones = (slice(0, retrieved), slice(retrieved, R + E), slice(R + E, None))
    cover = [float(true[zone].sum()) for zone in zones]
    ax = axes(f"{cover[0]:.0f} % of the clusters' attention is read, {cover[1]:.0f} % estimated, "
              f"{cover[2]:.0f} % dropped", "cluster, the best first", "attention [%]", (7.5, 2.8))
    for zone, colour, name in zip(zones, (DARK, MIDDLE, LIGHT),
                                  ("retrieved", "estimated", "dropped"), strict=True):
        ax.bar(range(len(true))[zone], true[zone], color=colour, width=1, label=name)
    ax.set(yscale="log", ylim=(1e-4, 200), xlim=(-1, int((true > 0).sum())))
    ax.legend(ncols=3, loc="upper right")
    plt.show()
    assert abs(sum(cover) - 100) < 1e-3

draw()

# %%
_ = interact(draw, retrieved=(1, R + E))

# %% [markdown]
# ## Where it fails
#
# An estimate goes wrong where the tokens of a cluster do *not* score alike. If their logits vary
# by σ², the estimate is too small by about σ²/2 in the exponent.

# %%
def spread(a, t, head, g):
    """Variance (C,) of the logits of each cluster's tokens."""
    x, C = a.k_store[0, head] @ a.q[head, g, t] / D**0.5, a.index.sizes.shape[2]
    n = a.index.sizes[0, head].clamp(min=1)
    first, second = (torch.zeros(C).index_add_(0, a.ids[head], y) / n for y in (x, x * x))
    return second - first**2

points = [(spread(a, 7, h, 0), *masses(a, 7, h, 0)) for a in layers.values() for h in range(H)]
variance, true, estimate = (torch.cat(x) for x in zip(*points, strict=True))
keep = (true > 0) & (variance > 1e-3)
shortfall = (true / estimate)[keep].log()
ax = axes("An estimate falls short where the tokens of a cluster disagree",
          "variance of their logits, σ²", "shortfall, log(true / estimate)", size=(7.5, 3.4))
ax.loglog(variance[keep], shortfall, ".", color=DARK, markersize=1.5)
line = torch.tensor([1e-3, float(variance.max())])
ax.loglog(line, line / 2, color=BLUE, linewidth=1)
label(ax, line[1], line[1] / 2, "σ²/2", dx=4, color=BLUE)
ax.set_ylim(bottom=3e-4)
plt.show()
together = torch.stack([variance[keep].double().log(), shortfall.log()]).corrcoef()[0, 1]
print(f"correlation of the logarithms: {together:.2f}")
assert together > 0.9

# %% [markdown]
# ## One number more a cluster
#
# The shortfall follows σ², so let us add it back. Were the logits of a cluster normal, their mean
# exponential would be exp(σ²/2) times that of their centroid. Real ones have thinner tails, and
# where σ² is large that factor flies off; 1 + σ²/2 starts alike and stays tame. σ² itself differs
# from query to query, but one number a cluster gives a fair idea of it: the mean variance of its
# keys along the D axes, times |q|². That is what the library does unless it is told not to
# (`by_mass`).
#
# An estimate should be tame; a guess at what to open should be bold. One token far above the mean
# is all that some heads look for, so clusters are ranked by what they *may* hold
# (`log_possible_mass`): n exp(σ²/2) as long as n tokens are enough to have such logits, and beyond
# that the largest of n, which lies about √(2 log n) deviations above the mean.

# %%
wide = replace(config, by_mass=True)
spreads = Layer(9, wide).index.spreads.float()                              # (1, H, C)
x, q, c = a.k_store[0, 0], a.q[0, 0, 7] / D**0.5, a.index.sizes[0, 0].argmax()
members = x[a.ids[0] == c]                                                  # (n, D)
torch.testing.assert_close(members.var(0, correction=0).mean(), spreads[0, 0, c], rtol=0.01, atol=0)
print(f"the largest cluster: σ² is {(members @ q).var(correction=0):.2f} for this query, "
      f"and {spreads[0, 0, c] * q @ q:.2f} from its one number")

# %%
def error_by(by_mass, every=2):
    """|output - dense| / |dense| (layers, Tq, H, G) of the library, ranked by mass or centroid."""
    found = []
    for n in layers:
        b = Layer(n, replace(wide, by_mass=by_mass))
        for t in range(0, b.q.shape[2], every):
            dense = outputs(b, t, R)["dense"]
            o = library(b, t, by_mass)
            found.append((o - dense).norm(dim=-1) / dense.norm(dim=-1))
    return torch.stack(found).view(len(layers), -1, H, G)

centroid, mass = (error_by(by_mass).mean((1, 2, 3)) * 100 for by_mass in (False, True))
fall = 1 - float(mass.mean() / centroid.mean())
ax = axes(f"Counting the spread takes away another {fall * 100:.0f} % of the error", "layer",
          "error, mean of the heads [%]")
for y, colour, name, dy in ((centroid, MIDDLE, "size alone", 6),
                            (mass, DARK, "size and spread", -6)):
    ax.plot(list(layers), y, color=colour)
    label(ax, list(layers)[-1], y[-1], f"{name}: {y.mean():.1f} %", dy=dy)
ax.set(ylim=0, xlim=0, xticks=list(layers))
plt.show()
assert fall > 0.1 and (mass < centroid).sum() >= len(layers) - 1
torch.testing.assert_close(centroid.mean(), torch.tensor(mean["and estimated"]), rtol=1e-3, atol=0)

# %% [markdown]
# ## Takeaway
#
# - One softmax holds all: tokens as they are, a cluster as one entry with log(size) on its logit.
# - An estimate by the centroid alone is never too large, and too small where a cluster's tokens
#   score differently. One number a cluster, its spread, makes up for much of that.
# - At equal exact reads, estimates take away a good part of the error. They help most where
#   attention is wide, and there they can beat the best possible choice of tokens; where it is
#   narrow, choosing well is what counts, and the oracle shows how much is left to gain.

# %%
print(", ".join(f"{name} {x:.1f} %" for name, x in mean.items()))

# %% [markdown]
# ## Exercises
#
# **1.** Write `logit(q, k)`: the logit with which one entry stands for the tokens k (n, D), as
# seen by a query q (D,), scaled already.

# %%
def logit(q, k):
    """The logit of a cluster's entry: its exponential estimates the tokens' weight."""
    ...                                 # your code


# %%
def check(answer):
    """Whether it gives the library's estimate, is exact for equal keys, and never too large."""
    dice = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, D, generator=dice) for n in (1, 5))
    q, same = q[0], k[:1].expand(7, -1)
    if answer(q, k) is None:
        return False
    return bool(torch.isclose(answer(q, same), (same @ q).logsumexp(0))
                and torch.isclose(answer(q, k), k.mean(0) @ q + torch.tensor(5.0).log())
                and answer(q, k) < (k @ q).logsumexp(0))

print("right" if check(logit) else "not yet")

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def logit(q, k):
#     return k.mean(0) @ q + torch.tensor(float(len(k))).log()
# ```
# </details>
#
# **2.** Size counts twice if the value of an entry is the *sum* of its tokens' values while its
# logit has log(size) too. How wrong is the output then?
#
# <details><summary>Answer</summary>
#
# The numerator has size², the denominator size: an output that is many times too long.
#
# ```python
# means = a.index.means
# a.index = a.index._replace(means=means * a.index.sizes[..., None])
# twice = library(a, 7)
# a.index = a.index._replace(means=means)
# dense = outputs(a, 7, R)["dense"]
# wrong, right = ((o - dense).norm() / dense.norm() for o in (twice, mine))
# print(f"error {right:.1%} as it should be, {wrong:.1%} with the size counted twice")
# assert wrong > 2 * right
# ```
# </details>
#
# **3.** A step reads whole clusters. How many tokens is that, beside R clusters of the mean size?
# Why is it more?
#
# <details><summary>Answer</summary>
#
# A cluster with many tokens near the query has a good chance to be among the best: large clusters
# are asked for more often than small ones.
#
# ```python
# best = torch.stack([ranking(a, 7, h)[:R] for h in range(H)])
# tokens = a.index.sizes[0].gather(-1, best).sum(-1)
# print(f"{tokens.float().mean():.0f} tokens a head, {R * config.cluster} of mean clusters")
# ```
# </details>
