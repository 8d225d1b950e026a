# %% [markdown]
# # Can keys be indexed?
#
# **Goal.** Group the keys of a text so that a query, by looking at the groups' means alone, finds
# the few tokens it will attend to. Build the clustering in ten lines, compare it with the
# library's, and see what makes it work.
#
# **You need.** Notebook 01: a step needs few tokens, but not always the same. k-means is explained
# here.
#
# **Time.** A minute to run, half an hour to read.
#
# **Paper.** RetroInfer, [arXiv 2505.02922](https://arxiv.org/abs/2505.02922), section 4.2, the
# wave index.
#
# **Before and after.** [01 where attention goes](01_where_attention_goes.ipynb) ·
# [03 three zones](03_three_zones.ipynb)
#
# **Predict first.** A text is cut into groups of about 8 tokens. A query may open one group in
# seventeen, 6 % of them. Of the 100 tokens that it attends to most, how many are in these groups,
# if tokens are put into groups by chance? And how many, if the groups are clusters of keys?

# %%
import sys; sys.path[:0] = [".."]

import torch
import torch.nn.functional as F
import figures_02 as figures
from capture import captured
from checks import agree
from plots import versions

from model import Rope, rotate
from retroinfer import RetroConfig, cluster_segment, limits_of, spherical_kmeans, weigh_channels

texts, config = [captured("lighthouse"), captured("expedition")], RetroConfig()
n_layers, H, T, D = texts[0].k.shape
G = texts[0].q.shape[1] // H
print(versions())

# %% [markdown]
# We index equally many keys of each of two texts. The first and the latest tokens (the steady zone)
# are left out, because a step always reads them. The queries are those of the answer, because they
# look for something in the text. Queries are divided by √D, so the product of a query and a key is
# a logit of attention. We look at every fourth layer.

# %%
n_keys = (texts[0].n_prompt - config.sink - config.local) // config.cluster * config.cluster
C = n_keys // config.cluster            # clusters a head, of 8 tokens on average
R = int(limits_of(config, torch.tensor(n_keys))[0])             # clusters that a query may open
layers = range(0, n_layers, 4)

def layer(text, n):
    """Keys (H, n_keys, D) to be indexed, and queries (H, G, Tq, D) of the answer, scaled."""
    q, k, _ = text.layer(n)
    q = q[0].unflatten(0, (H, G))[:, :, text.n_prompt:] / D**0.5
    return k[0, :, config.sink:config.sink + n_keys], q

cases = [(text, n) for text in texts for n in layers]
assert round(C / R) == 17
print(f"{n_keys:,} keys a head: {C} clusters, {R} to open")
figures.idea()

# %% [markdown]
# ## Keys share a direction
#
# Keys of one head are not spread evenly around zero: their mean is far from zero. The mean adds the
# same number to every logit of a query, and this changes no softmax. So we take the mean away.

# %%
def mean_cosine(x):
    """Mean cosine (H,) of two rows of x (H, n, D): the square of the mean unit vector."""
    return F.normalize(x, dim=-1).mean(1).square().sum(-1)

def centred(x):
    """x (H, n, D) minus its mean."""
    return x - x.mean(1, keepdim=True)

raw, without = (torch.cat([mean_cosine(change(layer(*case)[0])) for case in cases])
                for change in (lambda x: x, centred))
figures.shared_direction(raw, without)
assert (raw > 0.1).all() and (without < 0.05).all()
keys, queries = layer(texts[0], 8)
logits, shifted = (queries.flatten(1, 2) @ x.mT for x in (keys, centred(keys)))
torch.testing.assert_close(logits.softmax(-1), shifted.softmax(-1))

# %% [markdown]
# ## What a query wants lies together
#
# Draw the keys of one head in the two directions in which they differ most. Blue are the 100 keys
# that one query attends to most: the query that has to say the first digit of the answer.

# %%
HEAD = 1
torch.manual_seed(0)                                            # pca_lowrank draws
x = centred(keys)[HEAD]                                         # (n_keys, D)
flat = x @ torch.pca_lowrank(x, 2, center=False)[2]             # (n_keys, 2)
answer = texts[0].pieces[texts[0].n_prompt:]
ask = next(t for t, piece in enumerate(answer) if piece.isdigit()) - 1
figures.keys_in_a_plane(flat, (queries[HEAD, 0, ask] @ keys[HEAD].mT).topk(100).indices)

# %% [markdown]
# That is one query. Do real queries do this, or does every vector do it? For *any* vector, the keys
# with the largest products lie on one side. So the control is the best 100 keys of random vectors.
# These keys are more alike than two keys by chance. In the lower half of the layers, the best keys
# of real queries are still more alike. In the upper half they are about as alike as the control's.

# %%
def alike(q, keys):
    """Mean cosine of two of the best 100 keys of the queries q (H, n, D)."""
    x, best = F.normalize(centred(keys), dim=-1), (q @ keys.mT).topk(100).indices
    return torch.stack([x[h][best[h]].mean(1).square().sum(-1) for h in range(H)]).mean()

torch.manual_seed(0)
cosines = torch.tensor([[alike(q.flatten(1, 2), k), alike(torch.randn_like(q.flatten(1, 2)), k),
                         mean_cosine(centred(k)).mean()] for k, q in (layer(*c) for c in cases)])
own, random, any_two = cosines.view(2, len(layers), 3).mean(0).T         # mean of the texts
figures.together(layers, {"queries": own, "random vectors": random, "any two keys": any_two})
lower, upper = ((own / random)[half].mean() for half in (slice(0, 4), slice(4, 8)))
print(f"queries over random vectors: {lower:.1f} in the lower half, {upper:.1f} in the upper half")
assert lower > 1.4 > upper > 0.8 and (random > any_two + 0.1).all()

# %% [markdown]
# ## Spherical k-means in ten lines
#
# Seeds are keys at even distances along the text. Each key goes to the centroid with the largest
# inner product. A centroid becomes the mean of its keys, made a unit vector again. Centroids are
# unit vectors because a longer one would win keys by its length.

# %%
def kmeans(x, C, iterations):
    """Cluster ids (n,) of centred keys x (n, D)."""
    seeds = (2 * torch.arange(C) + 1) * len(x) // (2 * C)
    centroids = F.normalize(x[seeds], dim=-1)                    # (C, D)
    for _ in range(iterations - 1):
        ids = (x @ centroids.T).argmax(-1)                       # (n,)
        sums = torch.zeros_like(centroids).index_add_(0, ids, x)
        has_members = ids.bincount(minlength=C) > 0
        centroids = torch.where(has_members[:, None], F.normalize(sums, dim=-1), centroids)
    return (x @ centroids.T).argmax(-1)

mine = torch.stack([kmeans(x, C, config.iterations) for x in centred(keys)])    # (H, n_keys)

# %% [markdown]
# The library's function does the same for all heads of a batch. It sums in another order, so one
# key in many thousands, at equal distance from two centroids, may fall to the other side.

# %%
def cluster(keys, C=C, iterations=config.iterations):
    """Cluster ids (H, n) of keys (H, n, D), by the library."""
    return spherical_kmeans(centred(keys)[None], C, iterations)[0]

ids = cluster(keys)
same = (mine == ids).float().mean()
torch.testing.assert_close(same, torch.tensor(1.0), atol=1e-3, rtol=0)
print(f"{same:.2%} of the keys are in the same cluster")

# %% [markdown]
# ## Sizes
#
# Cluster sizes vary: a repeated topic makes a large cluster. A table with room for *P* tokens per
# cluster, twice the mean, would lose the tokens beyond P. The library cuts a large cluster into
# pieces of even size instead (`cluster_segment`). Is every token still there? We give
# `cluster_segment` positions in place of values, and look for each position in the result.

# %%
place = torch.arange(n_keys).float().view(1, 1, -1, 1).expand(1, H, -1, 2)
index, _, in_order = cluster_segment(keys[None], place, config)
before = torch.cat([i.bincount(minlength=C) for i in ids])              # (H*C,)
after = index.sizes[index.sizes > 0].long()
lost = float((before - config.largest).clamp(min=0).sum() / before.sum()) * 100
figures.sizes(before, after, config.largest, lost)
print(f"{(before > config.largest).sum()} of {len(before)} clusters are too large")
assert lost > 0.1 and after.max() <= config.largest
held = index.offsets[0, :, -1] + index.sizes[0, :, -1].long()           # tokens in all clusters
assert (in_order[0, :, :, 0].sort().values == torch.arange(n_keys)).all() and (held == n_keys).all()

# %% [markdown]
# ## Is it an index?
#
# A query ranks the clusters by their centroids alone, and opens the best. We count how many of its
# 100 best tokens are inside, and how many tokens it has read. The query heads of a group open
# clusters together: each head takes a softmax over the centroids, and the sum of these ranks them.

# %%
def centroids_of(keys, ids):
    """Means (H, C, D) of the keys of each cluster, and their sizes (H, C)."""
    C = int(ids.max()) + 1
    sizes = torch.zeros(H, C).scatter_add_(1, ids, torch.ones(ids.shape))
    sums = torch.zeros(H, C, D).scatter_add_(1, ids[..., None].expand(-1, -1, D), keys)
    return sums / sizes.clamp(min=1)[..., None], sizes

def search(queries, keys, ids, n_open=R, top=100):
    """What the opened clusters hold: of a query's best tokens, and of all tokens, in per cent."""
    centroids, sizes = centroids_of(keys, ids)
    logits = (queries @ centroids.mT[:, None]).masked_fill(sizes[:, None, None] == 0, -torch.inf)
    p = logits.softmax(-1).sum(1)                                           # (H, Tq, C)
    is_open = torch.zeros_like(p).scatter_(-1, p.topk(n_open).indices, 1)   # (H, Tq, C)
    is_read = is_open.gather(-1, ids[:, None].expand(-1, p.shape[1], -1))   # (H, Tq, n)
    best = (queries @ keys.mT[:, None]).topk(top).indices                   # (H, G, Tq, top)
    found = is_read[:, None].expand(-1, G, -1, -1).gather(-1, best)
    return torch.stack([found.mean(), is_read.mean()]) * 100

# %% [markdown]
# Two controls read as many tokens. *Runs of text* are groups of eight tokens in a row. Their means
# are centroids too, so this control shows what clustering adds. *Chance* reads tokens at random: it
# finds the same share of the best tokens as of all tokens.

# %%
ours, runs = [], (torch.arange(n_keys) // config.cluster).expand(H, -1)
by_text = []
for text, n in cases:
    keys, queries = layer(text, n)
    ours.append(search(queries, keys, cluster(keys)))
    n_runs = round(float(ours[-1][1]) / 100 * C)                # as many tokens
    by_text.append(search(queries, keys, runs, n_open=n_runs))
ours, by_text = (torch.stack(x).view(2, -1, 2) for x in (ours, by_text))    # (texts, layers, 2)
figures.found(layers, {"clusters of keys": ours[..., 0], "runs of text": by_text[..., 0],
                       "chance": ours[..., 1]}, ours[..., 1].mean())
assert (ours[..., 0] > 5 * ours[..., 1]).all() and (ours[..., 0] > by_text[..., 0]).all()
assert ours[..., 0].mean() > by_text[..., 0].mean() + 10

# %% [markdown]
# What was your number? Two steps of the recipe can be left out, to see what each is worth. The
# first step takes the mean away. The second moves the centroids: without it, each key goes to the
# nearest seed, and that is all.

# %%
def without_mean(keys):
    """As cluster, but of the keys as they are."""
    return spherical_kmeans(keys[None], C, config.iterations)[0]

def gain_over(change):
    """Points that `change` finds more than cluster() (cases,)."""
    found = [search(q, k, change(k))[0] for k, q in (layer(*case) for case in cases)]
    return torch.stack(found) - ours[..., 0].flatten()

for name, change in (("with the mean", without_mean), ("seeds alone", lambda k: cluster(k, C, 1))):
    gain = gain_over(change)
    print(f"{name:14} {gain.mean():+.1f} points, from {gain.min():+.1f} to {gain.max():+.1f}")
    assert gain.mean() < -0.5
    assert (ours[..., 0].flatten() + gain > 3 * ours[..., 1].flatten()).all(), "3 times chance"

# %% [markdown]
# Both steps matter a little. If one is left out, clusters still find far more than chance.
#
# ## What queries look at
#
# k-means treats all channels alike. A query does not: in a channel where queries are nearly zero,
# keys may differ without changing a logit. So the library multiplies each channel of the keys by a
# weight, and clusters the products. The weight is the mean square of the queries in this channel,
# to a power. The library's power was found by trial, so the plot shows other powers too.
#
# The queries of the first segment (the first 2,048 tokens) give the weights. The queries of the
# answer test them. There are two controls. One gives each channel the weight of another channel.
# The other takes the weights from the mean squares of the keys.

# %%
def of_queries(text, n):
    """Sums of squares (H, D) of the queries of the first segment, by channel."""
    q = text.layer(n)[0][0].unflatten(0, (H, G))[:, :, :config.sink + config.segment]
    return q.double().square().sum((1, 2))

def of_keys(text, n):
    """Sums of squares (H, D) of the keys, by channel."""
    return centred(layer(text, n)[0]).double().square().sum(1)

def weighted(power, squares=of_queries, order=slice(None)):
    """Points found more than without weights (cases,)."""
    found = []
    for case in cases:
        keys, queries = layer(*case)
        w = weigh_channels(squares(*case), RetroConfig(channel_power=power))[0]     # (H, 1, D)
        found.append(search(queries, keys, cluster(keys * w[..., order]))[0])
    return torch.stack(found) - ours[..., 0].flatten()

# %%
mixed = torch.randperm(D // 2, generator=torch.Generator().manual_seed(0))
mixed = torch.cat([mixed, mixed + D // 2])                      # RoPE's pairs stay together
powers, chosen = [0.0, 0.2, config.channel_power, 0.5, 1.0], config.channel_power
gain = torch.stack([torch.zeros(len(cases)), *map(weighted, powers[1:])])   # (powers, cases)
controls = {"other channels' weights": weighted(chosen, order=mixed),
            "weights from the keys": weighted(chosen, squares=of_keys)}
figures.gains(powers, gain, controls, chosen)
best = gain[powers.index(chosen)]
print(f"power {chosen}: {best.mean():+.1f} points, better in {int((best > 0).sum())} of "
      f"{len(cases)} cases; controls", *(f"{x.mean():+.1f}" for x in controls.values()))
assert best.mean() > 0.5 and (best > 0).float().mean() > 0.7 and gain[-1].mean() < 0
assert all(x.mean() < 0 for x in controls.values())

# %% [markdown]
# The powers 0.2 to 0.5 can hardly be told apart here. They find about two tokens of a hundred more.
# [docs/defaults.md](../docs/defaults.md) measures what the weights are worth for whole models.
#
# Runs of text are no bad index either. Why?
#
# ## RoPE gives every key a place
#
# RoPE turns a key by an angle that grows with its position. So two similar tokens that stand far
# apart in the text have different keys. A cluster then holds similar tokens *of one place*. To
# check this, we turn the keys back and cluster them again. We measure how far a token stands from
# the middle of its cluster. The control keeps the cluster sizes, and draws the tokens by chance.

# %%
def turned_back(text, n):
    """The keys of a layer (H, n_keys, D) as they were before RoPE."""
    k = text.layer(n)[1]
    cos, sin = Rope(text.config.rope, D)(torch.arange(k.shape[2])[None])    # (1, 1, T, D)
    return rotate(k, cos, -sin)[0, :, config.sink:config.sink + n_keys]

def middles(ids):
    """For each token the mean position (H, n_keys) of its cluster."""
    place = torch.arange(n_keys).float().expand(H, -1)[..., None].expand(-1, -1, D)
    return centroids_of(place, ids)[0][..., 0].gather(1, ids)

# %%
def by_kind(case):
    """{kind of keys: the middle of each token's cluster (H, n_keys)}."""
    ids = cluster(layer(*case)[0])
    return {"with RoPE": middles(ids), "turned back": middles(cluster(turned_back(*case))),
            "by chance": middles(ids[:, torch.randperm(n_keys)])}

torch.manual_seed(0)
place, found = torch.arange(n_keys), [by_kind(case) for case in cases[::2]]
apart = {kind: torch.stack([(x[kind] - place).abs().mean() for x in found]) for kind in found[0]}
figures.places(place, {kind: x[HEAD] for kind, x in found[1].items()},
               {kind: x.mean() for kind, x in apart.items()})
ratio = apart["turned back"] / apart["with RoPE"]
print(f"turned back, {ratio.min():.1f} to {ratio.max():.1f} times as far in {len(ratio)} cases")
assert ratio.min() > 1 and ratio.median() > 2
assert apart["with RoPE"].max() < 0.5 * apart["by chance"].min()

# %% [markdown]
# ## Segments
#
# If clusters are local, a text need not be clustered as a whole. Cut it into segments and cluster
# each segment alone. A key is then compared with the centroids of its segment only, so there are
# fewer comparisons. And a segment can be indexed as soon as it has been read. How much less does
# such an index find? All keys are in it. The last segment may be shorter.

# %%
def cluster_segments(keys, L):
    """Cluster ids (H, n) of keys (H, n, D), segment by segment of at most L tokens."""
    parts, n_before = [], 0
    for part in keys.split(L, 1):
        n = part.shape[1] // config.cluster
        parts.append(cluster(part, n) + n_before)
        n_before += n
    return torch.cat(parts, 1)

def comparisons(L):
    """Comparisons of a key with a centroid in one pass, in per cent of those without segments."""
    parts = [len(part) for part in torch.arange(n_keys).split(L)]
    return 100 * sum(n * (n // config.cluster) for n in parts) / (n_keys * C)

lengths = [280, 560, 1136, 2048]
loss = torch.stack([-gain_over(lambda keys, L=L: cluster_segments(keys, L)) for L in lengths])
work = [comparisons(L) for L in lengths]                        # loss: (lengths, cases)

# %%
figures.segments(lengths, loss, work)
print(f"lost with the shortest segments: {loss[0].min():.1f} to {loss[0].max():.1f} points by case")
assert abs(loss[3].mean()) < 1, "segments of 2,048, the library's default"
assert loss[3].mean() < loss[0].mean() < 5 and work == sorted(work)

# %% [markdown]
# ## Takeaway
#
# - Keys can be indexed. Cluster them by direction, and a query that looks at the centroids alone
#   finds most of the tokens that it attends to.
# - RoPE makes clusters local. So they can be built segment by segment, while the text is read.
# - To weigh channels by the queries helps a little.
# - It is not a perfect index. In the worst layer a large part of the best tokens is not found.
#   Notebook 03 says what is done about the clusters that are not opened.

# %%
worst = ours[..., 0].min(1).values
print("found in the worst layer of each text:", ", ".join(f"{x:.0f} %" for x in worst))
assert (worst < 70).all() and ours[..., 0].mean() > 60

# %% [markdown]
# ## Exercises
#
# **1.** Clusters of the given sizes are cut into pieces. No piece may hold more than `largest`
# tokens, and there are no more pieces than needed. Write `pieces(sizes, largest)`: the number of
# all pieces.

# %%
def pieces(sizes, largest):
    """The number of pieces of all clusters together; sizes is a tensor of integers."""
    ...                                 # your code


# %%
def check(answer):
    """Whether it counts what the library has built, and gets the edges right."""
    return agree([("the head sizes above", answer(before, config.largest), len(after)),
                  ("32, 33, 0 and 1 with room for 32", answer(torch.tensor([32, 33, 0, 1]), 32), 4),
                  ("one of 100 with room for 7", answer(torch.tensor([100]), 7), 15)])

print("right" if check(pieces) else "not yet")

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def pieces(sizes, largest):
#     return int(((sizes + largest - 1) // largest).sum())
# ```
# </details>
#
# **2.** The published code starts from the keys as they are, not from unit vectors. Leave the
# first `F.normalize` out of `kmeans` and count the empty clusters after the second pass. Why?
#
# <details><summary>Answer</summary>
#
# After one pass, centroids are unit vectors. But a seed that has no members after this pass is
# still as long as a key: several times longer than a unit vector. It wins far too many keys in the
# next pass. The control starts from unit vectors.
#
# ```python
# x = centred(layer(texts[0], 8)[0])[HEAD]
# seeds = x[(2 * torch.arange(C) + 1) * n_keys // (2 * C)]
# ids1 = (x @ seeds.T).argmax(-1)
# sums = torch.zeros_like(seeds).index_add_(0, ids1, x)
# has_members = (ids1.bincount(minlength=C) > 0)[:, None]
# ids2 = (x @ torch.where(has_members, F.normalize(sums, dim=-1), seeds).T).argmax(-1)
# n_empty = int((ids2.bincount(minlength=C) == 0).sum())
# n_unit = int((kmeans(x, C, 2).bincount(minlength=C) == 0).sum())
# print(f"{n_empty} of {C} clusters are empty after the second pass; from unit seeds {n_unit}")
# assert n_empty > 2 * n_unit
# ```
# </details>
#
# **3.** Are clusters of 8 tokens a better index than clusters of 16, or of 32? Compare them fairly:
# let each index open clusters with about the same number of tokens. What do small clusters cost?
#
# <details><summary>Answer</summary>
#
# Smaller clusters find more with as many tokens. But the index grows, because a step reads and
# ranks the centroid of each cluster.
#
# ```python
# by_size = {}
# for size in (8, 16, 32):
#     found = [search(q, k, cluster(k, n_keys // size), n_open=R * config.cluster // size)
#              for k, q in (layer(*case) for case in cases[::5])]
#     by_size[size] = torch.stack(found).mean(0)
#     print(f"{size:2} tokens a cluster: {by_size[size][0]:.0f} % found, "
#           f"{by_size[size][1]:.1f} % read, {n_keys // size} centroids")
# assert by_size[8][0] > by_size[32][0]
# ```
# </details>
