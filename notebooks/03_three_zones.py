# %% [markdown]
# # What is lost if most tokens are only estimated?
#
# **Goal.** Put three zones into one softmax: the steady zone, the tokens of retrieved clusters, and
# estimated clusters. One entry stands for all tokens of an estimated cluster. The other clusters
# are dropped. See why an estimate is never too large. Compare estimates with an oracle that knows
# beforehand which tokens weigh most. Find where estimates fail.
#
# **You need.** Notebook 02: keys in clusters, ranked by their centroids.
#
# **Time.** A minute to run, half an hour to read.
#
# **Paper.** RetroInfer, [arXiv 2505.02922](https://arxiv.org/abs/2505.02922), section 4.2,
# tripartite attention (equations 2 to 4).
#
# **Before and after.** [02 clusters](02_clusters.ipynb) ·
# [04 the wave index](04_the_wave_index.ipynb)
#
# **Predict first.** Read only the best sixteen clusters of a text: the output has some error. Now
# add one estimated entry for each of the next clusters, until a quarter of all clusters is used. By
# what share does the error fall? An oracle reads as many tokens as sixteen clusters hold, but those
# with the largest weights. It estimates nothing. Is its error smaller than that with estimates?

# %%
import sys; sys.path[:0] = [".."]
from dataclasses import replace

import torch
import figures_03 as figures
from capture import captured
from checks import agree
from ipywidgets import interact
from plots import versions

from retroinfer import (
    Budget, RetroConfig, cluster_segment, gather_clusters, limits_of, tripartite_attention,
)

# %% [markdown]
# Clusters are made, ranked and estimated as in the paper, for two texts and every third layer. So a
# cluster has 16 tokens on average, not 8 as in notebook 02. Two settings differ from the paper's.
# k-means has 3 passes, not 10. And a step retrieves 16 clusters: the paper's 1.8 % of the clusters
# are fewer than ten in such short texts. (We also keep each cluster's spread, which the paper does
# not have, for the end of the notebook. The spreads change no cluster.)

# %%
texts = [captured("lighthouse"), captured("expedition")]
paper = replace(RetroConfig.paper(), iterations=3, min_retrieve=16)
config = replace(paper, by_mass=True)                   # the same clusters, with their spreads
n_layers, H, T, D = texts[0].k.shape
G = texts[0].q.shape[1] // H
R = 16                                                  # clusters retrieved
layers = list(range(0, n_layers, 3))
print(versions())
figures.idea()

# %% [markdown]
# One layer, ready for a step: the queries of the answer's tokens, the steady zone, and the text in
# clusters. The tokens of a cluster lie side by side in a *store*.

# %%
class Layer:
    """What a step meets in layer n of a text."""
    def __init__(self, text, n):
        (q, k, v), c = text.layer(n), config
        self.n_keys = (text.n_prompt - c.sink - c.local) // c.cluster * c.cluster    # in clusters
        middle = slice(c.sink, c.sink + self.n_keys)
        q = q[0].unflatten(0, (H, G))                                   # (H, G, T, D)
        self.n_prompt, self.q = text.n_prompt, q[:, :, text.n_prompt:]  # queries of the answer
        early = q[:, :, :c.sink + c.segment].double()                   # for the spreads alone
        self.k, self.v = (torch.cat([x[:, :, :c.sink], x[:, :, c.sink + self.n_keys:]], 2)
                          for x in (k, v))                              # (1, H, W, D)
        self.index, self.k_store, self.v_store = cluster_segment(       # (1, H, n_keys, D)
            k[:, :, middle], v[:, :, middle], c, energy=early.square().sum((1, 2)))
        sizes = self.index.sizes[0].long()                              # (H, C)
        self.ids = torch.stack([torch.arange(len(m)).repeat_interleave(m) for m in sizes])
        self.RE = int(limits_of(paper, torch.tensor(self.n_keys))[1])   # clusters used: R + E

    def n_steady(self, t):
        """Tokens of the steady zone that token t of the answer sees."""
        return self.n_prompt + t + 1 - self.n_keys

# %%
cases = [Layer(text, n) for text in texts for n in layers]
times = (1, 4, 7, 10)                                   # tokens of the answer that we look at
a = cases[3]                                            # layer 9 of the log book
print(f"of {a.n_keys // config.cluster} clusters {R} are retrieved and {a.RE - R} estimated")

# %% [markdown]
# ## An estimate never outweighs its tokens
#
# A token's weight before normalisation is exp(q·k), with q divided by √D. A cluster of *s* tokens
# with the mean key *c* counts as s·exp(q·c). The exponential curves upwards, so the mean of
# exponentials is at least the exponential of the mean (Jensen's inequality). So the estimate is
# never too large. It is exact when all tokens have the same logit.

# %%
def masses(a, t):
    """True and estimated weight (H, G, C) of each cluster, before normalisation."""
    q = a.q[:, :, t].double() / D**0.5                                      # (H, G, D)
    weight = (q @ a.k_store[0].double().mT).exp()                           # (H, G, n_keys)
    true = torch.zeros(H, G, a.index.sizes.shape[2], dtype=q.dtype)
    true.scatter_add_(-1, a.ids[:, None].expand_as(weight), weight)
    estimate = a.index.sizes[0, :, None] * (q @ a.index.centroids[0].double().mT).exp()
    return true, estimate

# %%
pairs = [masses(a, t) for a in cases for t in times]
for true, estimate in pairs:
    assert (estimate <= true * (1 + 1e-5)).all()
share = torch.cat([(estimate.sum(-1) / true.sum(-1)).flatten() for true, estimate in pairs])
true, estimate = (x[0, 0] for x in masses(a, 7))
figures.estimates(true[true > 0], estimate[true > 0], share)
print(f"checked: {sum(x.numel() for x, _ in pairs):,} estimates, of {len(share):,} queries")

# %% [markdown]
# ## One softmax
#
# The three zones need no second softmax. A centroid is a key like any other once log(s) is added to
# its logit, because s·exp(q·c) = exp(q·c + log s). The value of this entry is the mean of the
# values of its tokens.

# %%
def three_zones(a, t, head, g, order):
    """Output (D,) of one query head; order: the clusters as the group ranks them."""
    q, n = a.q[head, g, t] / D**0.5, a.n_steady(t)
    is_read = torch.isin(a.ids[head], order[:R])
    far, size = order[R:a.RE], a.index.sizes[0, head]
    k = [a.k[0, head, :n], a.k_store[0, head, is_read], a.index.centroids[0, head, far]]
    v = [a.v[0, head, :n], a.v_store[0, head, is_read], a.index.means[0, head, far]]
    bias = [torch.zeros(n + int(is_read.sum())), size[far].log()]
    return (torch.cat(k) @ q + torch.cat(bias)).softmax(0) @ torch.cat(v)

def ranking(a, t):
    """Clusters (H, C), the most likely first for the query heads of a group together."""
    logits = a.q[:, :, t] / D**0.5 @ a.index.centroids[0].mT                # (H, G, C)
    logits = logits.masked_fill(a.index.sizes[0, :, None] == 0, -torch.inf)
    return logits.softmax(-1).sum(1).argsort(descending=True)

mine = torch.stack([torch.stack([three_zones(a, 7, h, g, ranking(a, 7)[h]) for g in range(G)])
                    for h in range(H)])                                     # (H, G, D)

# %% [markdown]
# The library does it for a batch, with shapes that never change. A *budget* says how many clusters
# are read and how many are ranked. `fetch` returns the keys and values of the clusters to be read.

# %%
def library(a, t, by_mass=False):
    """Output (H, G, D) of the library."""
    n = a.n_steady(t)
    steady = a.k[:, :, :n], a.v[:, :, :n], torch.zeros(1, H, 1, n)
    budget = Budget(torch.tensor([[R]]), torch.tensor([[a.RE]]), values=1.0, R=R, K=a.RE,
                    N=R * config.largest)
    stores = a.k_store, a.v_store
    def fetch(ids, ends):
        return gather_clusters(a.index, stores, budget.N, ids, ends)
    method = replace(config, by_mass=by_mass).method()
    return tripartite_attention(a.q[None, :, :, t], steady, a.index, budget, fetch, method)[0]

torch.testing.assert_close(mine, library(a, 7))

# %% [markdown]
# ## Against two rivals
#
# Take away the estimates, and see what they were worth. But an estimate is not free: it reads a
# mean key and a mean value. So the first rival spends these bytes on *reading* more tokens. The
# second rival is an *oracle*. For every query head it reads the tokens with the largest weights, as
# many tokens as our R clusters hold. No index can do that: to find these tokens takes all keys.

# %%
def attend(a, t, is_read, is_estimated):
    """Output (H, G, D) from the steady zone, tokens (H, G or 1, n_keys) and clusters (H, 1, C)."""
    q, n = a.q[:, :, t] / D**0.5, a.n_steady(t)
    near, x = q @ a.k[0, :, :n].mT, q @ a.k_store[0].mT  # (H, G, W), (H, G, n_keys)
    far = q @ a.index.centroids[0].mT + a.index.sizes[0, :, None].log()     # (H, G, C)
    x, far = x.where(is_read, -torch.inf), far.where(is_estimated, -torch.inf)
    v = torch.cat([a.v[0, :, :n], a.v_store[0], a.index.means[0]], 1)
    return torch.cat([near, x, far], -1).softmax(-1) @ v

def oracle_tokens(a, t, n_read):
    """Whether each token (H, G, n_keys) is one of a query head's n_read (H, 1) best."""
    x = a.q[:, :, t] @ a.k_store[0].mT
    nth = n_read[:, None].expand(-1, G, -1) - 1
    return x >= x.sort(-1, descending=True).values.gather(-1, nth)

# %%
def outputs(a, t):
    """Outputs (H, G, D) by name."""
    rank = ranking(a, t).argsort(-1)[:, None]                               # (H, 1, C)
    def members(n):
        return (rank < n).gather(-1, a.ids[:, None])                        # (H, 1, n_keys)
    none, far = rank < 0, (rank >= R) & (rank < a.RE)
    more = R + -(-(a.RE - R) // config.cluster)         # E entries are E tokens: E/16 clusters
    best = oracle_tokens(a, t, members(R).sum(-1))
    return {"dense": attend(a, t, members(10**6), none),
            "retrieved": attend(a, t, members(R), none),
            "as many bytes": attend(a, t, members(more), none),
            "and estimated": attend(a, t, members(R), far), "oracle": attend(a, t, best, none)}

torch.testing.assert_close(outputs(a, 7)["and estimated"], mine)

# %%
def error(o, dense):
    """|o - dense| / |dense| (H, G), in per cent."""
    return (o - dense).norm(dim=-1) / dense.norm(dim=-1) * 100

runs = [[outputs(a, t) for t in times] for a in cases]
errors = {name: torch.stack([torch.stack([error(o[name], o["dense"]) for o in run])
                             for run in runs]).unflatten(0, (2, -1))        # (2, layers, 4, H, G)
          for name in ("retrieved", "as many bytes", "and estimated", "oracle")}
mean = {name: e.mean() for name, e in errors.items()}
gain, more = (100 * (1 - mean[name] / mean["retrieved"])
              for name in ("and estimated", "as many bytes"))

# %%
by_query = {name: e.mean((-2, -1)).transpose(1, 2).flatten(0, 1) for name, e in errors.items()}
figures.by_layer(layers, by_query, gain, more)
print(f"of the error, estimates take away {gain:.0f} %, as many bytes of tokens {more:.0f} %")
assert gain > 20 and gain > 1.5 * more and mean["oracle"] < mean["and estimated"]
for text in range(2):                                   # in each text, and in most of its layers
    ours, reading = (errors[name][text].mean((1, 2, 3))
                     for name in ("and estimated", "as many bytes"))
    n_better = int((ours < reading).sum())
    print(f"text {text}: better than reading in {n_better} of {len(layers)} layers")
    assert ours.mean() < reading.mean() and n_better >= 0.7 * len(layers)

# %% [markdown]
# What were your numbers? In the first layer the oracle loses. Is the reason that its attention is
# *wide*, that is, spread over many tokens? Then wide heads of the other layers should beat the
# oracle, too. For every head, count the tokens that it needs for 90 % of its attention to the text.
# Then compare the widest tenth of the heads of the other layers with the rest of them.

# %%
def tokens_needed(a):
    """Tokens (4, H, G) that hold 90 % of a query's attention to the text."""
    q = a.q[:, :, list(times)].transpose(1, 2)                              # (H, 4, G, D)
    w = (q @ a.k_store[0, :, None].mT / D**0.5).softmax(-1)                 # (H, 4, G, n_keys)
    return ((w.sort(-1, descending=True).values.cumsum(-1) < 0.9).sum(-1) + 1).transpose(0, 1)

needed = torch.stack([tokens_needed(a) for a in cases]).float().mean(1).flatten()
ours, oracle = (errors[name].mean(2).flatten() for name in ("and estimated", "oracle"))
is_first = torch.zeros(2, len(layers), H * G, dtype=torch.bool)
is_first[:, 0] = True
is_first, is_won = is_first.flatten(), ours < oracle
is_wide = ~is_first & (needed > needed[~is_first].quantile(0.9))
first, wide, rest = (is_won[heads].float().mean() * 100
                     for heads in (is_first, is_wide, ~is_first & ~is_wide))
others = is_won[~is_first].float().mean() * 100
figures.against_oracle(needed, ours / oracle, is_first, first, others)
print(f"heads that beat the oracle: {first:.0f} % in the first layer;\nin the other layers "
      f"{wide:.0f} % of the widest tenth and {rest:.0f} % of the rest")
assert first > 80 and first > 2 * max(wide, rest) and wide < rest + 20
assert needed[is_first].median() > 2 * needed[is_wide].median()

# %% [markdown]
# In the other layers the oracle mostly wins, and wide heads beat it no more often than the rest. So
# width alone does not decide it. But the heads of the first layer are wider still: their median is
# more than twice that of the widest tenth elsewhere.
#
# ## One query
#
# Each bar is a cluster, ranked by its centroid. The height of the bar is the weight of its tokens.
# In a running notebook, move the slider to retrieve more or fewer clusters.

# %%
def draw(retrieved=R):
    """The clusters of a query in the order of their ranks, by zone."""
    figures.ranked(masses(a, 7)[0][0, 0][ranking(a, 7)[0]], retrieved, a.RE)

draw()

# %%
_ = interact(draw, retrieved=(1, a.RE))

# %% [markdown]
# ## Where it fails
#
# An estimate goes wrong where the tokens of a cluster have *different* logits. Its *shortfall* is
# log(true weight / estimate). If the logits have a small variance σ², the shortfall is
# about σ²/2. As a control, we correlate the shortfall with the size of the cluster, too.

# %%
def spread(a, t):
    """Variance (H, G, C) of the logits of each cluster's tokens."""
    x = (a.q[:, :, t] / D**0.5 @ a.k_store[0].mT).double()                  # (H, G, n_keys)
    zeros = torch.zeros(H, G, a.index.sizes.shape[2], dtype=x.dtype)
    ids, n = a.ids[:, None].expand_as(x), a.index.sizes[0, :, None].clamp(min=1)
    first, second = (zeros.scatter_add(-1, ids, y) / n for y in (x, x * x))
    return second - first**2

points = [(spread(a, 7), *masses(a, 7), a.index.sizes[0, :, None].expand(-1, G, -1)) for a in cases]
variance, true, estimate, size = (torch.cat([x.flatten() for x in xs])
                                  for xs in zip(*points, strict=True))
keep = (size > 1) & (variance > 1e-3)
short = (true / estimate)[keep].log()

# %%
def correlation(x, y):
    """Of the logarithms of x and y."""
    return float(torch.stack([x.double().log(), y.double().log()]).corrcoef()[0, 1])

figures.shortfall(variance[keep], short)
by_variance, by_size = correlation(variance[keep], short), correlation(size[keep], short)
print(f"correlation with the variance {by_variance:.2f}, with the size {by_size:.2f}")
assert by_variance > 0.9 > abs(by_size) + 0.3

# %% [markdown]
# ## One number more a cluster
#
# The shortfall follows σ², so let us add it back. If a cluster had very many tokens with normally
# distributed logits, its true weight would be exp(σ²/2) times the estimate. But a cluster has few
# tokens. The plot shows that for a large σ² this factor is too large. The factor 1 + σ²/2 is almost
# the same for a small σ², and grows slowly.
#
# σ² differs from query to query, so it cannot be stored. But |q|² times one stored number per
# cluster, its *spread*, approximates σ². The spread is the variance of the cluster's keys, averaged
# over the D channels. A channel in which queries are large counts more. By default, the library
# multiplies an estimate by 1 + spread·|q|²/2 (`by_mass`). It then also *ranks* clusters by the most
# that they may hold (`log_possible_mass`), because some heads look for a single token whose logit
# is far above the mean of its cluster.
#
# How good is the approximation? We compare spread·|q|² with the true σ², over all clusters and
# queries. The control takes the spread of the next cluster.

# %%
def from_spreads(a, t, shift=0):
    """σ² (H, G, C) as the one number of each cluster, or of another cluster, has it."""
    q = a.q[:, :, t] / D**0.5                                               # (H, G, D)
    return q.square().sum(-1, keepdim=True) * a.index.spreads[0, :, None].float().roll(shift, -1)

one_number, of_another = (torch.cat([from_spreads(a, 7, shift).flatten() for a in cases])[keep]
                          for shift in (0, 1))
low, middle, high = (one_number / variance[keep]).quantile(torch.tensor([0.1, 0.5, 0.9]).double())
is_live = of_another > 0                                # the slot after the last cluster is empty
own = correlation(one_number, variance[keep])
other = correlation(of_another[is_live], variance[keep][is_live])
print(f"spread·|q|² over σ²: {middle:.2f}, 8 of 10 between {low:.2f} and {high:.2f};\n"
      f"correlation {own:.2f}, with another's spread {other:.2f}")
assert 0.7 < middle < 1.4 and own > 0.7 and own > other + 0.02

# %% [markdown]
# Most of the agreement comes from |q|² and from the layer, since the control has both. By how much
# do spreads lower the error of the output? Again the control gives each cluster the spread of
# *another* cluster.

# %%
def errors_by(by_mass, order=None):
    """Errors (2, layers, 4) of the library, in %; order: whose spread each cluster gets."""
    found = []
    for a, run in zip(cases, runs, strict=True):
        index = a.index
        if order is not None:
            live = int((index.sizes > 0).sum(-1).min())
            mixed = torch.cat([torch.randperm(live, generator=order),
                               torch.arange(live, index.sizes.shape[2])])
            a.index = index._replace(spreads=index.spreads[:, :, mixed])
        found.append(torch.stack([error(library(a, t, by_mass), o["dense"]).mean()
                                  for t, o in zip(times, run, strict=True)]))
        a.index = index
    return torch.stack(found).unflatten(0, (2, -1))

# %%
ways = {"size alone": errors_by(False), "size and spread": errors_by(True),
        "control: another's spread": errors_by(True, torch.Generator().manual_seed(0))}
torch.testing.assert_close(ways["size alone"].mean(), mean["and estimated"], rtol=1e-3, atol=0)
size_alone, with_spread, control = ways.values()
fall = 100 * (1 - with_spread.mean() / size_alone.mean())
figures.with_spread(layers, {k: x.transpose(1, 2).flatten(0, 1) for k, x in ways.items()}, fall)
better = (with_spread.mean(2) < size_alone.mean(2)).float().mean()
print(f"better in {better:.0%} of the layers of both texts; control: "
      f"{100 * (1 - control.mean() / size_alone.mean()):.0f} % less error than size alone")
assert fall > 10 and better > 0.8 and with_spread.mean() < control.mean() < size_alone.mean()
assert (with_spread.mean((1, 2)) < 0.95 * size_alone.mean((1, 2))).all(), "in each text"

# %% [markdown]
# The control does nearly as well. So most of the gain comes from a typical spread, in the ranking
# and in the estimates. That the spread is the cluster's own adds a little.
#
# ## Takeaway
#
# - One softmax holds all entries: a token as it is, an estimated cluster as one entry whose logit
#   has log(size) added.
# - An estimate by the centroid alone is never too large. It is too small where a cluster's tokens
#   have different logits. A spread per cluster makes up for part of that.
# - Estimates take away more of the error than the same bytes spent on reading.
# - In the first layer, where attention is widest, estimates beat even an oracle that reads the
#   tokens with the largest weights. In most heads of other layers the oracle is better: there a
#   better choice of tokens would help.
#
# ## Exercises
#
# **1.** Write `logit(q, k)`: the logit with which one entry stands for the tokens k (n, D). The
# query q (D,) is divided by √D already.

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
    far, true = answer(q, k), (k @ q).logsumexp(0)
    return agree([("seven equal keys", answer(q, same), (same @ q).logsumexp(0)),
                  ("five keys", far, k.mean(0) @ q + torch.tensor(5.0).log()),
                  ("below the true weight", far if far is None else far < true, True)])

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
# **2.** The value of an entry is the *mean* of its tokens' values. If it were their *sum*, the size
# would count twice, because the logit has log(size) already. How wrong is the output then?
#
# <details><summary>Answer</summary>
#
# The numerator has size², and the denominator has size. So the output is many times too long.
#
# ```python
# a, index = cases[3], cases[3].index
# dense = outputs(a, 7)["dense"]
# right = error(library(a, 7), dense).mean()
# a.index = index._replace(means=index.means * index.sizes[..., None])
# wrong, a.index = error(library(a, 7), dense).mean(), index
# print(f"error {right:.1f} % as it should be, {wrong:.1f} % with the size counted twice")
# assert wrong > 2 * right
# ```
# </details>
#
# **3.** A step reads whole clusters. How many tokens does it read, compared with R clusters of the
# mean size? Are large clusters retrieved more often than small ones?
#
# <details><summary>Answer</summary>
#
# No. Here the best R clusters hold about as many tokens as R clusters of the mean size.
#
# ```python
# tokens = torch.stack([a.index.sizes[0].gather(-1, ranking(a, 7)[:, :R]).sum(-1) for a in cases])
# print(f"{tokens.float().mean():.0f} tokens a head, {R * config.cluster} of mean clusters")
# assert abs(tokens.float().mean() / (R * config.cluster) - 1) < 0.1
# ```
# </details>
