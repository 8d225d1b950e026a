# %% [markdown]
# # Why do vector indexes fail on attention?
#
# **Goal.** A decode step wants the keys with the largest products q·k. Vector indexes find such
# vectors fast, for search engines. Measure which of them fail here, and why. Build the graph of
# RetrievalAttention, which is made for queries, in stages. Ask what the keys that are left out
# would have said.
#
# **You need.** [02](02_clusters.ipynb): keys, queries and clusters. No knowledge of vector search.
#
# **Time.** About 40 seconds.
#
# **Paper.** Liu et al., RetrievalAttention, [arXiv 2409.10516](https://arxiv.org/abs/2409.10516);
# Chen et al., RoarGraph (PVLDB 17(11), 2024);
# CTkvr, [arXiv 2512.15550](https://arxiv.org/abs/2512.15550); Zharkov et al., SoftmaxLift, 2026.
# What this project measured at length is in
# [docs/retrieval_attention.md](../docs/retrieval_attention.md).
#
# **Before and after.** [07](07_the_wave_buffer.ipynb) moved keys to the host;
# [09](09_one_bit.ipynb) keeps them in a bit a number.
#
# **Predict first.** An index lets a key look for its 100 best keys, and a query look for its 100
# best keys. Both compare a fifth of all keys. Who finds more of them: the key or the query?

# %%
import sys; sys.path[:0] = [".."]
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from capture import captured
from checks import agree
from figures_08 import (
    draw_idea,
    plot_distances,
    plot_plane,
    plot_recalls,
    plot_stages,
    plot_tail,
    plot_toy,
)
from plots import versions

# %%
import retrieval_attention as ra
from evaluation.retrieval import Head, built, ivf_curve, mahalanobis, plain_index, point
from model import load
from retroinfer import attend_causally, spherical_kmeans

text, config = captured(), ra.GraphConfig(hops=8, width=16)
print(versions())

# %%
draw_idea()

# %% [markdown]
# ## Keys, queries, and a changed topic
#
# We index the keys of a text that the model has read, but for the first and the latest ones, which
# are always exact. Queries of the last 1,024 tokens may train an index. The queries of the next 32
# tokens test it. In a conversation the topic can change. So there is a second test: the model reads
# 32 tokens of a recipe after the same text, and we keep their queries.
#
# In `GraphConfig`, a search remembers its best keys, and a *hop* reads the neighbours of the best
# `width` keys that were not read yet. `hops` says how many hops a search takes.

# %%
N_STEPS = 32
n_layers, H, T, D = text.k.shape
n = T - N_STEPS                                         # tokens before the steps
RECIPE = ("Melt the butter, whisk the eggs with sugar until pale, fold in the flour and a pinch of "
          "salt, then bake the cake for forty minutes and let it cool on a rack before you cut it.")

def queries_after(words):
    """Queries (layers, H*G, N_STEPS, D) of words that follow the first n tokens of the text."""
    model, tokenizer = load(dtype=torch.float32, device="cpu")
    ids, asked = torch.tensor(tokenizer.encode(words * 2)[:N_STEPS]), []
    def attend(q, k, v):
        layer = len(asked)
        asked.append(q[0])
        past = (x[layer:layer + 1, :, :n].float() for x in (text.k, text.v))
        k, v = (torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True))
        return attend_causally(q, k, v)
    model(ids[None], torch.arange(n, n + N_STEPS)[None], [attend] * n_layers)
    return torch.stack(asked)

# %%
def head_of(layer, h, asked=None):
    """(Head: indexed keys, training queries, test queries; keys (Q, D) that are left out)."""
    q, k, _ = text.layer(layer)
    q = q[0].unflatten(0, (H, -1))[h] * D ** -0.5                           # (G, T, D)
    now = q[:, n:] if asked is None else asked[layer].unflatten(0, (H, -1))[h] * D ** -0.5
    train = q[:, n - config.train:n].transpose(0, 1).flatten(0, 1)
    keys, left_out = k[0, h, config.sink:n - config.local], k[0, h, n - config.local:n]
    return Head(keys, train, now.flatten(0, 1)), left_out

HEADS = [(layer, i % H) for i, layer in enumerate(range(4, n_layers, 7))]
head, left_out = head_of(*HEADS[2])
print(f"{len(head.k):,} keys a head, {len(head.train):,} queries to train, "
      f"{len(head.asked)} to test")

# %% [markdown]
# ## Where the queries are
#
# A picture first: one head, in the plane of two directions. Then a number for every head. The
# *Mahalanobis distance* measures how far a vector is from a cloud, in units of the cloud's width in
# each direction. Keys that are in the text but not in the cloud are the first control. (For larger
# models the paper reports that queries are more than ten times as far away as such keys.)
#
# The order of the keys by inner product does not change if a query gets longer. So a query must not
# count as far away because it is long. The second control is the same queries, scaled to the mean
# length of the keys.

# %%
plot_plane(head.k, head.asked * D ** 0.5, left_out,
           "A head's queries stand beside its keys, not among them")

# %%
def distance(x, cloud):
    """Mean Mahalanobis distance of vectors x (Q, D) to a cloud (N, D)."""
    away = (x - cloud.mean(0)).double()
    spread = torch.cov(cloud.double().T)
    squares = (away @ torch.linalg.inv(spread) * away).sum(-1)
    return squares.sqrt().mean().item()

mine, theirs = distance(left_out, head.k), mahalanobis(left_out, head.k)
torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=0)

far = []
for layer in range(n_layers):
    for h in range(H):
        one, out = head_of(layer, h)
        short = one.asked * (one.k.norm(dim=-1).mean() / one.asked.norm(dim=-1).mean())
        far.append([mahalanobis(x, one.k) for x in (one.asked * D ** 0.5, out, short)])
by_queries, by_keys, by_short = zip(*far, strict=True)

# %%
plot_distances(by_queries, by_keys)
further, still = (sum(q > k for q, k in zip(by, by_keys, strict=True))
                  for by in (by_queries, by_short))
print(f"mean distance: queries {sum(by_queries) / len(far):.0f}, as long as keys "
      f"{sum(by_short) / len(far):.0f}, keys left out {sum(by_keys) / len(far):.0f}")
print(f"further than keys left out: queries in {further}, as long as keys in {still} of "
      f"{len(far)} heads")
assert min(further, still) > 0.9 * len(far)

# %% [markdown]
# ## Three indexes by hand
#
# *Flat* compares every key: it finds all, and reads all. *IVF* (inverted file) clusters the keys. A
# query is compared with the means of the clusters, and then with the members of the best few. A
# *graph* links each key to 32 others. A search begins at some keys. It takes the best keys that it
# has seen, looks at their neighbours, and repeats.
#
# Which 32? A search engine for inner products (HNSW with that metric) links a vector to those with
# the largest products. The other choice is the nearest keys, by distance. The measure is the share
# of vectors compared, means included, against the share of the true best 100 keys that are found.

# %%
def ivf_by_hand(head, visits):
    """(share compared, recall): the members of the best clusters of each query."""
    C = int(len(head.k) ** 0.5)
    ids = spherical_kmeans((head.k - head.k.mean(0))[None, None], C, 10)[0, 0]      # (N,)
    means = torch.stack([head.k[ids == c].sum(0) / max(int((ids == c).sum()), 1)
                         for c in range(C)])
    scores = (head.asked @ means.mT).masked_fill(ids.bincount(minlength=C) == 0, -torch.inf)
    best = scores.topk(visits).indices                                      # (Q, visits)
    is_read = (ids == best[..., None]).any(1)                               # (Q, N)
    found = is_read.gather(1, head.truth).float().mean()
    return ((is_read.sum(1).float().mean() + C) / len(head.k)).item(), found.item()

torch.testing.assert_close(ivf_by_hand(head, 8), ivf_curve(head, config)[7])

# %%
def linked(k, score, M=32):
    """Links (N, M) of each key to the keys with the best score, itself left out."""
    scores = score(k)
    return scores.fill_diagonal_(-torch.inf).topk(M).indices

def by_product(k):
    return k @ k.mT

def by_distance(k):
    return -torch.cdist(k, k)

# %%
def walk(head, links, config, entries=None):
    """(share compared, recall) of a search along links from some keys, spread over the text."""
    if entries is None:
        entries = torch.linspace(0, len(head.k) - 1, config.entries).long()
    nothing = torch.zeros(1, 1, len(head.k))
    lists = torch.zeros(1, 1, 0, D), torch.zeros(1, 1, 0, 1, dtype=torch.int32)
    index = ra.Index(links.int()[None, None], entries[None, None], *lists, nothing)
    found = ra.search(head.asked[None, None], head.k[None, None], index,
                      replace(config, fallback=0))
    share = (found.seen[..., :-1] >= 0).float().mean().item()
    return share, head.recall(found.rows[0, 0], found.scores[0, 0])

# %%
VISITS, HOPS = (1, 4, 8, 16, 28), (1, 2, 4, 8)
KINDS = {"graph by product": by_product, "graph by distance": by_distance}
curves = {name: {"queries": [], "keys": []} for name in ("IVF", *KINDS)}
for place in HEADS:
    one, out = head_of(*place)
    asks = {"queries": one, "keys": one.as_control(out[:len(one.asked)])}
    for who, asked in asks.items():
        whole = ivf_curve(asked, config)
        curves["IVF"][who].append([whole[v - 1] for v in VISITS])
    for name, score in KINDS.items():
        links = linked(one.k, score)
        for who, asked in asks.items():
            curves[name][who].append([walk(asked, links, replace(config, hops=hops))
                                      for hops in HOPS])

# %%
def recall_at(points, share):
    """Recall at a share of vectors compared, on the line through points (share, recall)."""
    points = [(0.0, 0.0), *points]
    for (a, low), (b, high) in pairwise(points):
        if a <= share <= b:
            return low + (high - low) * (share - a) / (b - a)
    return points[-1][1]

at = {name: {who: torch.tensor([recall_at(points, 0.2) for points in heads])
             for who, heads in by.items()} for name, by in curves.items()}
for name, by in at.items():
    print(f"{name:20}", *(f"asked by {who}: {x.mean():.0%} ({x.min():.0%} to {x.max():.0%})   "
                          for who, x in by.items()))

# %%
product = at["graph by product"]
plot_recalls(curves, "Linked by products, a fifth of the vectors finds "
             f"{product['keys'].mean():.0%} for keys, {product['queries'].mean():.0%} for queries")
assert product["keys"].mean() > 2 * product["queries"].mean()
assert at["graph by distance"]["queries"].mean() > 2 * product["queries"].mean()

# %% [markdown]
# The graph by product finds nearly all for a key and little for a query. IVF finds a little less
# for queries than for keys. The graph by distance finds more for queries than for keys. So of the
# three, only the graph by product fails. But all of them compare a fifth of all vectors here, and a
# search engine compares 1 to 3 %. That hurts in long texts. The documentation page has measured
# 131,072 made-up keys: IVF must compare a quarter of the vectors to find 95 % of the best keys, and
# HNSW never finds as many.
#
# ## A walk that gets stuck
#
# Why? Sixty points in two dimensions show it. Keys stand in three groups. The query is a direction:
# the best key is the one furthest to the right. The simplest walk goes to the best neighbour as
# long as that is better than where it stands.

# %%
def climb(keys, query, links, at):
    """Keys on the way of the simplest walk."""
    path = [at]
    while True:
        ahead = [m for m in links[path[-1]].tolist() if m >= 0]
        best = max(ahead, key=lambda m: float(keys[m] @ query))
        if keys[best] @ query <= keys[path[-1]] @ query:
            return path
        path.append(best)

dice = torch.Generator().manual_seed(5)
centres = torch.tensor([[0.0, 0.0], [2.0, 2.2], [4.0, -0.5]])
keys = torch.cat([c + 0.45 * torch.randn(20, 2, generator=dice) for c in centres])
query = torch.tensor([1.0, 0.0])
near = linked(keys, by_distance, 4)
stuck = climb(keys, query, near, 0)

# %% [markdown]
# No path of links leads to the third group, so the walk ends before it. Now let
# training queries link keys, as RoarGraph does. Queries that look about to the right want the
# rightmost keys of all groups. A key that one query wants is linked to the other keys that the
# query wants.

# %%
train = F.normalize(query + 0.9 * torch.randn(64, 2, generator=dice), dim=-1)
wanted = (train @ keys.mT).topk(12).indices                                 # (queries, 12)
points = torch.cat([keys, torch.zeros(len(keys), 1)], 1)
old = F.pad(near, (0, config.degree - 4), value=-1).int()
roar = ra.project(points, wanted, old, config)
free = climb(keys, query, roar, 0)
plot_toy(keys, query, {"linked to near keys": (near, stuck), "linked by queries too": (roar, free)},
         "Near keys lead nowhere; keys that one query wants lead on")
best = int((keys @ query).argmax())
assert stuck[-1] != best and free[-1] == best

# %% [markdown]
# ## The graph in stages
#
# Now on real keys. Three kinds of queries search the graph at each stage: the training queries
# themselves, the next queries of the text, and the queries of the recipe.
#
# 1. A query's best key is linked to its other keys: the naive projection.
# 2. The keys of six ranks are linked to all of them, and links are pruned: a neighbour that is
#    nearer to a kept neighbour than to the key is left out, so links go different ways.
# 3. The search begins at the keys that most links lead to.
# 4. Keys that no path leads to are kept in lists of similar keys. A search reads the best list.
#
# The control is the whole graph, built by the same steps from as many keys in place of queries. The
# control and the first stage take twice as many hops as the others. Then the control compares more
# vectors than the last stage, and the first stage about as many.

# %%
def naive(head):
    """Links (N, 32): the best key of a training query to its other best keys."""
    links = torch.full((len(head.k), config.degree), -1)
    wanted = ra.best_keys(head.train, head.k, torch.zeros(len(head.k)), config.degree + 1)
    links[wanted[:, 0]] = wanted[:, 1:]                         # the last query of a key counts
    return links

# %%
def stages(head):
    """Yield (name, function of a Head that returns (share compared, recall))."""
    nothing = torch.zeros(len(head.k))
    wanted = ra.best_keys(head.train, head.k, nothing, config.wanted)
    points, empty = F.pad(head.k, (0, 1)), torch.full((len(head.k), config.degree), -1).int()
    links = ra.project(points, wanted, empty, config)
    whole = ra.build(head.train, head.k, nothing, empty, config)
    some = torch.linspace(0, len(head.k) - 1, len(head.train)).long()   # as many keys as queries
    by_keys = ra.build(head.k[some], head.k, nothing, empty, config)
    yield "control: keys train", lambda x: point(x, plain_index(by_keys), many)
    for name, c, *graph in (("best key to others", many, naive(head), None),
                            ("six ranks, pruned", few, links, None),
                            ("entries", few, links, whole.entries)):
        yield name, lambda x, c=c, graph=graph: walk(x, graph[0], c, graph[1])
    yield "lists of lost keys", lambda x: point(x, plain_index(whole), few)

# %%
recipe, few, many = queries_after(RECIPE), replace(config, hops=4), replace(config, hops=8)
found, shares = {}, {}
for place in HEADS:
    one, _ = head_of(*place)
    ask = {"training queries": Head(one.k, one.train, one.train[::32]), "next queries": one,
           "changed topic": head_of(*place, recipe)[0]}
    for name, recall in stages(one):
        for who, x in ask.items():
            share, part = recall(x)
            found.setdefault(name, {}).setdefault(who, []).append(part)
            shares.setdefault(name, []).append(share)

# %%
means = {name: {who: sum(x) / len(x) for who, x in by.items()} for name, by in found.items()}
control, last = means["control: keys train"], means["lists of lost keys"]
plot_stages(found, f"Recall of the next queries: {control['next queries']:.0%} if keys train the "
            f"graph, {last['next queries']:.0%} if queries do")
for name, by in means.items():
    print(f"{name:20} compares {sum(shares[name]) / len(shares[name]):.0%}: ",
          *(f"{who} {x:.0%}  " for who, x in by.items()))

# %%
now = {name: by["next queries"] for name, by in means.items()}
compared = {name: sum(x) / len(x) for name, x in shares.items()}
keys_train, naive_one, pruned, _, whole = now
by_head = [found[name]["next queries"] for name in (whole, keys_train)]
assert all(queries > keys for queries, keys in zip(*by_head, strict=True)), "in every head"
assert now[whole] > max(now[keys_train], now[naive_one]) + 0.03
assert compared[keys_train] > compared[whole] and compared[naive_one] > 0.8 * compared[whole]
assert now[pruned] - now[naive_one] > abs(now[whole] - now[pruned]), "the second stage gains most"
assert compared[whole] < 0.2 and now[whole] > at["IVF"]["queries"].mean()
assert last["training queries"] > last["next queries"]

# %% [markdown]
# Queries train a better graph than keys in each of the four heads (the dots), for fewer
# comparisons. In one head the difference is large. The second stage gains most. The third and the
# fourth gain less than the heads differ. The whole graph compares fewer vectors than IVF did above,
# and finds more.
#
# The queries that trained the graph find most, since it was made for them. So always test with
# others. Does a changed topic hurt? Compare the last two figures of each line. A few points either
# way are less than the heads differ. With this text and this recipe, a change of topic costs little
# or nothing.
#
# ## qcIVF, in ten lines
#
# There is a simpler way to use the prompt's queries (CTkvr). The latest queries are the centroids,
# and the list of each is its best keys. A new query reads the lists of the queries that are most
# like it.

# %%
def qcivf(head, n_centroids=512, listed=200, visits=4):
    """The 100 best keys that each test query finds: their rows (Q, 100)."""
    centroids = head.train[-n_centroids:]
    lists = (centroids @ head.k.mT).topk(listed).indices                    # (C, listed)
    like = (head.asked @ F.normalize(centroids, dim=-1).mT).topk(visits).indices
    is_read = torch.zeros(len(head.asked), len(head.k), dtype=torch.bool)
    is_read.scatter_(1, lists[like].flatten(1), True)
    return (head.asked @ head.k.mT).masked_fill(~is_read, -torch.inf).topk(100).indices

c = replace(config, index="qcivf")
theirs = ra.search(head.asked[None, None], head.k[None, None], built(head, c), c).rows[0, 0]
torch.testing.assert_close(qcivf(head).sort(-1).values, theirs.sort(-1).values)

# %%
for name, topic in (("next queries", None), ("changed topic", recipe)):
    share, recall = zip(*(point(one, built(one, c), c) for one, _ in (
        head_of(*place, topic) for place in HEADS)), strict=True)
    print(f"qcIVF, {name}: recall {sum(recall) / len(recall):.0%}, {min(recall):.0%} to "
          f"{max(recall):.0%}, comparing {sum(share) / len(share):.0%} of the vectors")
    assert abs(sum(recall) / len(recall) - last[name]) < 0.1, "about what the graph finds"

# %% [markdown]
# ## What the other keys would have said
#
# Suppose the best 100 keys are found. The other keys are many, and together they may weigh much.
# Attention to the best keys alone forgets them. *SoftmaxLift* reads as many keys, but draws them at
# random. Each key gets a priority w / u, where w = exp(logit) and u is a random number in (0, 1].
# The keys with the largest priorities are read. Let tau be the largest priority of the others. A
# key that was read and has w < tau counts as if its w were tau. Then both sums of the softmax are
# right on average. (To choose, both rivals look at the logits of all keys here.)

# %%
def best(logits, v, K):
    """Outputs (Q, D) of attention to the K best keys alone."""
    x, rows = logits.topk(K)
    return (x.softmax(-1)[..., None] * v[rows]).sum(1)

def lifted(logits, v, K, u):
    """Outputs (Q, D) from a sample of K keys."""
    priority, rows = (logits - u.log()).topk(K + 1)                         # log(w / u)
    x, tau = logits.gather(1, rows[:, :K]), priority[:, K:]
    return (x.maximum(tau).softmax(-1)[..., None] * v[rows[:, :K]]).sum(1)

# %%
def as_library(head, v, K, u):
    """lifted, by the library's functions."""
    c = replace(config, index="flat", lift=True, top=K)
    index = ra.Index(*(torch.zeros(1, 1, 0, 0),) * 4, -u.log()[None, None])
    found = ra.search(head.asked[None, None], head.k[None, None], index, c)
    _, weights = ra.weigh(found, index.bias, c)
    rows = found.rows[0, 0, :, :K]
    return (weights[0, 0].softmax(-1)[..., None] * v[rows]).sum(1)

u = 1 - torch.rand(len(head.k), generator=dice)
v = text.layer(HEADS[2][0])[2][0, HEADS[2][1], config.sink:n - config.local]
mine = lifted(head.asked @ head.k.mT, v, 100, u)
torch.testing.assert_close(mine, as_library(head, v, 100, u), rtol=1e-3, atol=1e-4)

# %%
SIZES = 25, 50, 100, 200, 400
errors = {"the best keys": [], "a sample": []}
for place in HEADS:
    one, _ = head_of(*place)
    logits = one.asked @ one.k.mT
    v = text.layer(place[0])[2][0, place[1], config.sink:n - config.local]
    u = 1 - torch.rand(len(one.k), generator=dice)
    right = logits.softmax(-1) @ v
    for name, outputs in (("the best keys", [best(logits, v, K) for K in SIZES]),
                          ("a sample", [lifted(logits, v, K, u) for K in SIZES])):
        away = [(o - right).norm(dim=-1) / right.norm(dim=-1) for o in outputs]
        errors[name].append(torch.stack(away, 1))                           # (Q, sizes)
errors = {name: torch.cat(x) for name, x in errors.items()}

# %%
at_100 = {name: float(x[:, SIZES.index(100)].median()) for name, x in errors.items()}
plot_tail(SIZES, errors, f"100 keys: error {at_100['the best keys']:.2f} of the best, "
          f"{at_100['a sample']:.2f} of a sample")
assert at_100["a sample"] < at_100["the best keys"]

# %% [markdown]
# Here nothing else is read exactly. In a real step the first and the latest tokens are exact too,
# so less is left to forget, and all errors are smaller. The sample stays better: the documentation
# page has the same comparison for the next token of the model.
#
# ## Takeaway
#
# - Queries are far from the keys. A graph that links keys by inner product serves keys, and finds
#   little for a query. Clusters and a graph by distance find more, but compare many vectors.
# - Queries know what queries want. A graph that is linked by the prompt's queries finds more keys
#   with fewer comparisons. Lists of the best keys of earlier queries find about as many, but
#   compare more.
# - Test an index with other queries than those that built it, and on a changed topic too.
# - The best keys are not all. A sample of the same size speaks for the keys that it leaves out.

# %%
print(f"recall of the graph: training {last['training queries']:.0%}, next "
      f"{last['next queries']:.0%}, changed topic {last['changed topic']:.0%}")

# %% [markdown]
# ## Exercises
#
# **1.** Write the walk with a *beam*: it remembers the `beam` best keys that it has seen. Each turn
# it takes the best of them that it has not opened yet, opens it, and sees its neighbours. It ends
# when all keys of the beam are open. Return the set of keys in the beam.

# %%
def beam_walk(score, links, start, beam):
    """score: of each key, a list. links: of each key, a list of keys. start: a key."""
    ...                                 # your code


# %%
def check(answer):
    """Whether it finds what a beam of that size finds, in the two toys and on a detour."""
    score, cases = (keys @ query).tolist(), []
    toys = {"near": (score, near.tolist()),
            "roar": (score, [[m for m in x if m >= 0] for x in roar.tolist()]),
            "detour": ([0, 2, 1, 3], [[1, 2], [0], [3], [2]])}  # by the worse key to the best
    five = sorted(range(60), key=lambda n: -score[n])[:5]
    for name, beam, right in (("near", 1, [stuck[-1]]), ("roar", 1, [free[-1]]),
                              ("roar", 5, sorted(five)), ("roar", 60, list(range(60))),
                              ("detour", 1, [1]), ("detour", 2, [1, 3])):
        found = answer(*toys[name], 0, beam)
        cases.append((f"{name}, beam {beam}", None if found is None else sorted(found), right))
    return agree(cases)

print("right" if check(beam_walk) else "not yet")

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def beam_walk(score, links, start, beam):
#     seen, opened, best = {start}, set(), [start]
#     while set(best) - opened:
#         now = next(n for n in best if n not in opened)
#         opened.add(now)
#         seen |= set(links[now])
#         best = sorted(seen, key=lambda n: -score[n])[:beam]
#     return set(best)
# ```
# </details>
#
# **2.** A query's Mahalanobis distance uses the covariance of the keys. What is it if the metric is
# that of the queries? Measure how far keys are from the cloud of the queries.
#
# <details><summary>Answer</summary>
#
# Far, too: neither cloud covers the other.
#
# ```python
# q = head.train * D ** 0.5
# print(f"keys from queries: {distance(head.k, q):.0f}, queries from queries: "
#       f"{distance(head.asked * D ** 0.5, q):.0f}")
# ```
# </details>
#
# **3.** Is the sample right on average? Draw it 200 times for one query, and average the outputs.
#
# <details><summary>Answer</summary>
#
# Nearly: numerator and denominator of the softmax are right on average, their quotient almost.
#
# ```python
# logits, v = head.asked[:1] @ head.k.mT, torch.randn(len(head.k), D, generator=dice)
# right = logits.softmax(-1) @ v
# drawn = [lifted(logits, v, 100, 1 - torch.rand(len(v), generator=dice)) for _ in range(200)]
# one = torch.stack([(o - right).norm() for o in drawn]).mean()
# mean = (torch.stack(drawn).mean(0) - right).norm()
# print(f"error of one sample {one:.3f}, of the mean of 200 {mean:.3f}")
# assert mean < one / 3
# ```
# </details>
