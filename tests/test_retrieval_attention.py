"""RetrievalAttention: the graph, its search, the sample, and the cache that holds them."""
import argparse
import json
import math
from collections import Counter
from dataclasses import replace

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import EVERYTHING, generated, qkv

import retrieval_attention as ra
from evaluation import fidelity, retrieval
from model import load
from retrieval_attention import GraphCache, GraphConfig, Index
from retroinfer import InputError, attend_causally

TINY = {"sink": 2, "local": 4, "update": 32, "top": 12, "beam": 24, "degree": 6, "candidates": 16,
        "entries": 4, "width": 4, "hops": 6, "coarse": 8, "wanted": 10, "centroids": 12,
        "listed": 16, "visits": 2}


def drawn(N, D, seed, low=-3, high=4):
    """Whole numbers (N, D) in fp32: sums of their products are exact, and many are equal."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (N, D), generator=g).float()


def index_of(q, k, config, bias=None):
    """The Index of one head, as a batch of one."""
    N, M = len(k), config.degree if config.index == "graph" else 0
    bias = torch.zeros(N) if bias is None else bias
    part = ra.build(q, k, bias, torch.full((N, M), -1, dtype=torch.int32), config)
    return Index(*(x[None, None] for x in part))


# ---------------------------------------------------------------- the graph

def reference_neighbours(points, wanted, old, config):
    """RoarGraph's projection in loops: {node: neighbours}, of nodes that an edge touches."""
    points, edges = points.double(), Counter()
    table = {node: [x for x in row if x >= 0] for node, row in enumerate(old.tolist())}
    for row in wanted.tolist():
        for rank in (0, 1, 3, 7, 15, 31):
            if rank < len(row):
                edges.update((row[rank], other) for other in row)
    for _ in range(2):
        nodes = sorted({source for source, _ in edges})
        edges.update((node, other) for node in nodes for other in table[node])
        for node in nodes:
            table[node] = reference_prune(points, node, edges, config) or table[node]
        edges = Counter((other, node) for node in nodes for other in table[node])
    return table


def reference_prune(points, node, edges, config):
    def apart(a, b):
        return (points[a] - points[b]).square().sum().item()

    frequent = sorted((-n, target) for (source, target), n in edges.items()
                      if source == node != target)[:config.candidates]
    near = [target for *_, target in sorted((apart(node, t), *rest, t) for *rest, t in frequent)]
    taken = []
    for c in near:
        if all(apart(c, t) >= apart(c, node) for t in taken):
            taken.append(c)
    return (taken + [c for c in near if c not in taken])[:config.degree]


@settings(deadline=None, max_examples=60)
@given(N=st.integers(2, 40), Q=st.integers(0, 12), seed=st.integers(0, 999), old=st.booleans())
def test_neighbours_are_those_of_loops(N, Q, seed, old):
    config, points = GraphConfig(**TINY), drawn(N, 5, seed)
    wanted = ra.best_keys(drawn(Q, 5, seed + 1), points, torch.zeros(N), config.wanted)
    before = torch.full((N, config.degree), -1, dtype=torch.int32)
    if old:
        more = ra.best_keys(drawn(5, 5, seed + 2), points, torch.zeros(N), config.wanted)
        before = ra.project(points, more, before, config)
    expected = reference_neighbours(points, wanted, before, config)
    found = ra.project(points, wanted, before, config).tolist()
    assert {node: [x for x in row if x >= 0] for node, row in enumerate(found)} == expected


@settings(deadline=None, max_examples=60)
@given(N=st.integers(1, 60), Q=st.integers(0, 30), seed=st.integers(0, 999))
def test_every_key_is_on_a_path_or_in_one_list(N, Q, seed):
    g, config = torch.Generator().manual_seed(seed), GraphConfig(**TINY)
    q, k = torch.randn(Q, 4, generator=g) + 1, torch.randn(N, 4, generator=g)
    index = Index(*(x[0, 0] for x in index_of(q, k, config)))
    rows = index.neighbours.tolist()
    assert index.neighbours.shape == (N, config.degree)                     # the degree bound
    for node, row in enumerate(rows):
        linked = [x for x in row if x >= 0]
        assert node not in linked and len(set(linked)) == len(linked)
        assert all(x < N for x in linked) and row[len(linked):] == [-1] * (len(row) - len(linked))
    path = set(index.entries.tolist())
    while grown := {x for node in path for x in rows[node] if x >= 0} - path:
        path |= grown
    listed = [x for x in index.lists.flatten().tolist() if x >= 0]
    assert sorted([*path, *listed]) == list(range(N))
    for centroid, members in zip(index.centroids, index.lists, strict=True):
        torch.testing.assert_close(centroid, k[members[members >= 0]].mean(0))


def test_a_key_that_no_query_wanted_is_found_in_its_list():
    config = GraphConfig(**TINY)
    q, k = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), drawn(200, 8, 0)
    q[:, 0], k[:, 0] = 3.0, k[:, 0].abs()
    k[77] = torch.tensor([-9.0, 0, 0, 0, 0, 0, 0, 9.0])                     # far from all queries
    index = index_of(q, k, config)
    assert (index.neighbours != 77).all()
    asked, keys = k[77][None, None, None], k[None, None]
    assert ra.search(asked, keys, index, config).rows[0, 0, 0, 0] == 77
    without = ra.search(asked, keys, index, replace(config, fallback=0))
    assert (without.rows[without.scores > -math.inf] != 77).all()


# ---------------------------------------------------------------- search

def reference_walk(q, k, index, config):
    """{row: score} of the keys that a query reads, hop by hop."""
    lists = [(float(q @ c), i) for i, c in enumerate(index.centroids[0, 0])]
    best = sorted(lists, reverse=True)[:config.fallback]
    ahead = {*index.entries[0, 0].tolist(),
             *(x for _, i in best for x in index.lists[0, 0, i].tolist() if x >= 0)}
    read, done = {}, set()
    for _ in range(config.hops + 1):
        read |= {row: float(q @ k[row] + index.bias[0, 0, row]) for row in ahead}
        beam = sorted(read, key=read.get, reverse=True)[:config.beam]
        chosen = [row for row in beam if row not in done][:config.width]
        done.update(chosen)
        ahead = {x for row in chosen for x in index.neighbours[0, 0, row].tolist() if x >= 0}
    return read


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 999), lift=st.booleans())
def test_a_walk_reads_what_loops_read(seed, lift):
    g, config = torch.Generator().manual_seed(seed), GraphConfig(**TINY, lift=lift)
    q, k = torch.randn(60, 6, generator=g) + 1, torch.randn(150, 6, generator=g)
    bias = -torch.rand(150, generator=g).log() * lift
    index = index_of(q[:40], k, config, bias)
    found = ra.search(q[None, None, 40:43], k[None, None], index, config)
    for i in range(3):
        read = reference_walk(q[40 + i], k, index, config)
        assert set((found.seen[0, 0, i, :-1] >= 0).nonzero()[:, 0].tolist()) == set(read)
        best = sorted(read, key=read.get, reverse=True)[:config.returned]
        n = len(best)
        assert found.rows[0, 0, i, :n].tolist() == best
        torch.testing.assert_close(found.scores[0, 0, i, :n], torch.tensor([read[x] for x in best]))
        assert (found.scores[0, 0, i, n:] == -math.inf).all()


def test_qcivf_reads_the_lists_of_the_nearest_queries():
    config = GraphConfig("qcivf", **TINY)
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(30, 6, generator=g), torch.randn(150, 6, generator=g)
    q = q * (1 + 9 * (torch.arange(30) % 2))[:, None]       # its length changes no query's list
    index, past = index_of(q, k, config), q[-12:]
    for asked in torch.randn(20, 6, generator=g):
        near = torch.nn.functional.cosine_similarity(past, asked[None]).topk(2).indices
        rows = {x for i in near for x in (k @ past[i]).topk(16).indices.tolist()}
        best = sorted(rows, key=(-(k @ asked)).tolist().__getitem__)[:12]
        found = ra.search(asked[None, None, None], k[None, None], index, config)
        assert set((found.seen[0, 0, 0, :-1] >= 0).nonzero()[:, 0].tolist()) == rows
        assert found.rows.flatten().tolist() == best


@pytest.mark.parametrize("index", ["graph", "qcivf"])
def test_an_index_finds_nearly_all_that_flat_finds(index):
    """Of the queries behind those that built it, at a fraction of the keys."""
    q, k, _ = qkv(3000, H=1, G=2)
    q = (q + 2 * torch.randn(16, generator=torch.Generator().manual_seed(9))) / 4
    config = GraphConfig(index, top=50)
    train = q[0, :, :2900].transpose(0, 1).flatten(0, 1)
    asked = q[:, None, :, 2900:].flatten(2, 3)                              # (1, 1, 200, D)
    found = ra.search(asked, k, index_of(train[-2000:], k[0, 0], config), config)
    truth = (asked @ k.mT).topk(50).indices
    hit = (found.rows[..., None] == truth[..., None, :]).any(-2)
    assert hit.float().mean() > 0.9
    assert (found.seen >= 0).float().mean() < 0.3


# ---------------------------------------------------------------- attention and the sample

def step_of(n_seeds, T=400, top=40, D=8):
    """Queries (1, n, 1, D), keys and values (1, n, T, D) of one head, a lift for each of n seeds;
    what a flat search found, and logits, weights."""
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(D, generator=g), *torch.randn(2, T, D, generator=g)
    bias = -(1 - torch.rand(1, n_seeds, T, generator=g)).log()
    config = GraphConfig("flat", top=top, lift=True)
    q, k, v = (x.expand(1, n_seeds, -1, D) for x in (q[None], k, v))
    none = torch.zeros(1, n_seeds, 0, D), torch.zeros(1, n_seeds, 0, 1)
    index = Index(none[1], none[1], *none, bias)
    found = ra.search(q[:, :, :1], k, index, config)
    return q, k, v, found, *ra.weigh(found, bias, config)


def test_sums_over_a_sample_are_right_on_average():
    q, k, v, found, _, weights = step_of(4000)
    rows = found.rows[0, :, 0, :40]
    total, numerator = weights.exp().sum(-1).flatten(), (
        weights[0, :, 0].exp()[..., None] * v[0, 0][rows]).sum(1)           # (4000, D)
    masses = (q[0, 0] @ k[0, 0].mT).exp()                                   # (1, T)
    for mine, truth in ((total, masses.sum()), (numerator, (masses @ v[0, 0])[0])):
        error = mine.std(0) / math.sqrt(4000)
        assert ((mine.mean(0) - truth).abs() < 4 * error).all()
        assert (error < 0.01 * masses.sum()).all()
    best = masses.topk(40).values.sum()
    assert (best - masses.sum()).abs() > 20 * total.std() / math.sqrt(4000)     # top-k alone is not


def test_the_error_bar_holds_what_it_says():
    q, k, v, found, logits, weights = step_of(2000)
    steady = k[:, :, :3], v[:, :, :3], torch.zeros(1, 2000, 1, 3)
    values = v[0, 0][found.rows[..., :40]]
    o, shares = ra.attend(q[:, :, :1], steady, weights, values)
    bar = ra.error_bar(o, logits, weights, shares, values).flatten()
    x = torch.cat([k[0, 0], k[0, 0, :3]]) @ q[0, 0, 0]
    error = (o[0, :, 0] - x.softmax(-1) @ torch.cat([v[0, 0], v[0, 0, :3]])).norm(dim=-1)
    assert 0.93 < (error < bar).float().mean() < 1
    deviation = (bar / ra.DEVIATIONS).square().mean().sqrt()                # as a bar estimates it
    assert 0.85 < deviation / error.square().mean().sqrt() < 1.15


def test_a_merge_by_log_sum_exp_is_the_one_softmax():
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(2, 3, 4, 8, generator=g), *torch.randn(2, 2, 3, 9, 8, generator=g)
    bias = torch.zeros(2, 3, 1, 9).masked_fill(torch.rand(2, 3, 1, 9, generator=g) < 0.3, -math.inf)
    weights, far = 3 * torch.randn(2, 3, 4, 7, generator=g), torch.randn(2, 3, 4, 7, 8, generator=g)
    weights[0, 0], weights[1, 2, 3, 4:] = -math.inf, -math.inf              # nothing found, and few
    one, merged = (f(q, (k, v, bias), weights, far) for f in (ra.attend, ra.attend_merged))
    for mine, theirs in zip(one, merged, strict=True):
        torch.testing.assert_close(mine, theirs)


# ---------------------------------------------------------------- the cache

@pytest.mark.parametrize("lift", [False, True])
@pytest.mark.parametrize("index", ra.INDEXES)
def test_a_search_that_covers_all_is_dense(index, lift):
    """With and without a sample: what speaks for all that was left out then says nothing."""
    q, k, v = qkv(150, B=2)
    cache = GraphCache(GraphConfig(index, lift=lift, **EVERYTHING | {"top": 255}), 150, 2)
    torch.testing.assert_close(generated(cache, q, k, v, 100).double(), oracle.dense(q, k, v),
                               rtol=1e-4, atol=1e-5)
    assert cache.n_indexed.tolist() == [126, 126] and not cache.facts()["is_dense"]
    assert not lift or (cache.error == 0).all()


def test_a_text_shorter_than_the_window_is_dense_and_says_so():
    q, k, v = qkv(200)
    cache = GraphCache(GraphConfig(sink=20, local=80, update=100), 200)
    torch.testing.assert_close(generated(cache, q, k, v, 150).double(), oracle.dense(q, k, v),
                               rtol=1e-4, atol=1e-5)
    assert cache.facts()["is_dense"] and cache.facts()["indexed_tokens"] == [0]


@pytest.mark.parametrize("index", ["graph", "qcivf"])
def test_a_long_generation_is_as_near_to_dense_as_flat(index):
    """Past eight merges. The queries of the test point anywhere, so qcivf needs many lists."""
    q, k, v = qkv(400)
    many = {"top": 24, "centroids": 96, "listed": 64, "visits": 4}
    config, truth = GraphConfig(**TINY | many), oracle.dense(q, k, v)[:, :, 120:]
    errors = {}
    for kind in (index, "flat"):
        cache = GraphCache(replace(config, index=kind), 400)
        o = generated(cache, q, k, v, 120)[:, :, 120:].double()
        errors[kind] = ((o - truth).norm(dim=-1) / truth.norm(dim=-1)).mean()
        assert cache.n_indexed.item() == 370
    assert errors["flat"] < errors[index] < 2.5 * errors["flat"]


def test_merges_keep_every_key_on_a_path_or_in_a_list():
    q, k, v = qkv(330)
    cache = GraphCache(GraphConfig(**TINY), 330)
    generated(cache, q, k, v, 100)
    end = 2 + cache.n_indexed.item()
    for h in range(2):
        part = Index(*(x[0, h] for x in cache.index))
        on_path = ra.reachable(part.neighbours, part.entries)
        listed = part.lists[part.lists >= 0]
        rows = torch.cat([on_path.nonzero()[:, 0], listed]).sort().values
        assert rows.tolist() == list(range(2, end))
        assert (part.bias[2:end] == 0).all() and part.bias.isinf().sum() == len(part.bias) - end + 2


def test_what_is_written_replaces_all_that_was_known():
    q, k, _ = qkv(60, H=1, G=1)
    config, none = GraphConfig(**TINY), torch.full((60, 6), -1, dtype=torch.int32)
    few, many = (ra.build(q[0, 0, :n], k[0, 0], torch.zeros(60), none, config) for n in (60, 3))
    assert len(few.lists) < len(many.lists) and len(few.entries) == 4
    caches = GraphCache(config, 60), GraphCache(config, 60)
    for cache, parts in zip(caches, ([many, few._replace(entries=few.entries[:2])],
                                     [few._replace(entries=few.entries[:2])]), strict=True):
        cache.allocate(k)
        for part in parts:
            cache.write(0, 0, slice(0, 60), part)
    for mine, theirs in zip(*(cache.index for cache in caches), strict=True):
        live = slice(None) if mine is not caches[0].index.centroids else slice(len(few.lists))
        assert torch.equal(mine[0, 0, live], theirs[0, 0, live])


def test_a_merge_goes_on_from_the_graph_so_far():
    q, k, v = qkv(134, H=1, G=2)
    config, old = GraphConfig(**TINY), torch.full((94, 6), -1, dtype=torch.int32)
    cache = GraphCache(config, 134)
    generated(cache, q, k, v, 100)
    for heard, end in ((slice(0, 100), 96), (slice(94, 132), 128)):    # 94 and 126 keys indexed
        old = torch.nn.functional.pad(old, (0, 0, 0, end - 2 - len(old)), value=-1)
        asked = q[0, :, heard].transpose(0, 1).flatten(0, 1) / 4
        part = ra.build(asked, k[0, 0, 2:end], torch.zeros(end - 2), old, config)
        old = part.neighbours
    assert cache.n_indexed.item() == 126
    assert torch.equal(cache.index.neighbours[0, 0, 2:128], ra.moved(part.neighbours, 2))
    assert torch.equal(cache.index.entries[0, 0], part.entries + 2)


def test_the_latest_queries_are_kept_in_order():
    q, k, v = qkv(70, G=2, H=1)
    cache = GraphCache(GraphConfig(**TINY, train=16), 70)

    def heard(n):
        """Those of the last 16 of n tokens that are behind the indexed ones."""
        first = n - min(16, n - cache.n_indexed.item())
        expected = q[0, :, first:n].transpose(0, 1).flatten(0, 1) / 4
        torch.testing.assert_close(cache.heard(0)[0], expected)

    for part in (slice(0, 5), slice(5, 30), slice(30, 41)):
        cache.prefill(q[:, :, part], k[:, :, part], v[:, :, part])
        heard(part.stop)
    for t in range(41, 53):
        cache.update()
        cache.decode(*(x[:, :, t:t + 1] for x in (q, k, v)))
        heard(t + 1)


def test_tokens_that_did_not_attend_are_indexed_too():
    q, k, v = qkv(120)
    cache = GraphCache(GraphConfig(**EVERYTHING), 120)
    cache.prefill(None, k[:, :, :119], v[:, :, :119])
    cache.update()
    o = cache.decode(q[:, :, 119:], k[:, :, 119:], v[:, :, 119:])
    torch.testing.assert_close(o.double(), oracle.dense(q[:, :, 119:], k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("index", ra.INDEXES)
def test_a_ragged_batch_is_what_each_text_is_alone(index):
    q, k, v = qkv(200, B=2)
    config, lengths = GraphConfig(index, lift=True, **TINY), (150, 90)

    def outputs(rows):
        capacity = 200 if len(rows) > 1 else 300            # changes nothing
        cache, found = GraphCache(config, capacity, len(rows)), []
        for i, row in enumerate(rows):
            cache.prefill(*(x[row:row + 1, :, :lengths[row]] for x in (q, k, v)), i)
        for t in range(40):
            cache.update()
            step = [torch.cat([x[r:r + 1, :, lengths[r] + t:][:, :, :1] for r in rows])
                    for x in (q, k, v)]
            found.append(cache.decode(*step))
        return torch.cat(found, 2)

    together = outputs([0, 1])
    for row in (0, 1):
        torch.testing.assert_close(together[row:row + 1], outputs([row]))


@pytest.mark.parametrize("index", ra.INDEXES)
def test_threads_do_not_change_the_result(index):
    q, k, v = qkv(1500, D=64)
    found, n = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        cache = GraphCache(GraphConfig(index, lift=True, sink=4, local=32, update=256), 1500)
        found.append((generated(cache, q, k, v, 1495)[:, :, 1495:], *cache.index))
    torch.set_num_threads(n)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("backend", ["compiled"], indirect=True)
def test_a_sampled_step_is_one_graph(backend):
    q, k, v = qkv(150)
    found = {}
    for compiled in (True, False):
        cache = GraphCache(GraphConfig(**TINY, lift=True), 150)
        decode = cache.decode if compiled else GraphCache.decode.__wrapped__.__get__(cache)
        cache.prefill(q[:, :, :100], k[:, :, :100], v[:, :, :100])
        for t in range(100, 150):
            cache.update()
            o = decode(*(x[:, :, t:t + 1] for x in (q, k, v)))
        found[compiled] = o, cache.error
        assert (cache.error > 0).all()
    torch.testing.assert_close(found[True], found[False])


def test_bytes_read_are_those_of_the_tensors():
    q, k, v = qkv(600)
    cache = GraphCache(GraphConfig(**TINY), 600)
    cache.prefill(q, k, v)
    cache.update()
    W, C, G, row = cache.k_steady.shape[2], cache.index.centroids.shape[2], 3, 16 * 4
    keys, links = 4 + 8 + 6 * 4 * 6, 8 + 6 * 4 * 6      # entries, a list; hops x width x degree
    assert cache.bytes_read() == 2 * (2 * W * row + G * (keys + 12) * row + C * row + 4 * G * links)
    assert cache.facts()["dense_bytes"] == 2 * 2 * 600 * row
    assert cache.nbytes()["index"] == sum(x.nbytes for x in cache.index)


# ---------------------------------------------------------------- errors

@pytest.mark.parametrize("wrong, message", [
    ({"index": "hnsw"}, "index is hnsw: give graph, qcivf, flat"),
    ({"top": 0}, "top is 0: at least 1"), ({"sink": -1}, "sink is -1: at least 0"),
    ({"beam": 100, "lift": True}, "beam is 100: give at least 101"),
    ({"width": 300}, "beam is 256: give at least 300"),
    ({"visits": 200}, "a search would read 40,000 keys at a time: at most 32,767"),
    ({"index": "qcivf", "visits": 1, "listed": 64}, "1 lists of 64 keys hold fewer than the 100")])
def test_a_config_that_cannot_work_is_one_line(wrong, message):
    with pytest.raises(InputError, match=message) as e:
        GraphConfig(**wrong)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_keys_that_are_no_numbers_are_an_error(bad):
    q, k, v = qkv(100)
    k[0, 1, 50, 3] = bad
    cache = GraphCache(GraphConfig(**TINY), 100)
    cache.prefill(q, k, v)
    with pytest.raises(InputError, match="the keys hold NaN or infinity"):
        cache.update()


# ---------------------------------------------------------------- evaluation/retrieval.py

def test_a_curve_is_read_at_the_recall_wanted():
    curve = [(0.4, 1.0), (0.1, 0.5), (0.2, 0.9)]
    assert retrieval.needed(curve) == pytest.approx(0.3)
    assert retrieval.needed(curve[1:]) is None


def test_ivf_finds_all_when_it_visits_all_lists():
    q, k = retrieval.cones(400, 60, D=16, rank=4)
    curve = retrieval.ivf_curve(retrieval.Head(k, q[:40], q[40:]), None)
    shares, recalls = zip(*curve, strict=True)
    assert len(curve) == 20 and curve[-1] == (pytest.approx(1 + 20 / 400), 1.0)
    assert list(shares) == sorted(shares) and list(recalls) == sorted(recalls)
    assert recalls[4] < 0.9                                 # of the queries' other cone


def test_queries_of_another_cone_are_far_from_the_keys():
    g = torch.Generator().manual_seed(0)
    white = torch.randn(20000, 8, generator=g)
    assert retrieval.mahalanobis(3 * white[:1000], white) == pytest.approx(
        3 * white[:1000].norm(dim=-1).mean().item(), rel=0.02)
    q, k = retrieval.cones(4000, 200)
    away = retrieval.mahalanobis(q * 128 ** 0.5, k), retrieval.mahalanobis(k[:100], k[100:])
    assert away[0] > 2 * away[1]


@pytest.mark.parametrize("given, said", [
    (["scans"], "section scans: give scan, tail or synthetic"),
    (["scan", "--length", "900"], "--length is 900: give 2,048 or more")])
def test_a_wrong_command_is_one_line(given, said, capsys):
    assert retrieval.main(given) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_the_page_repeats_what_was_measured():
    found = json.loads(retrieval.OUT.read_text("utf-8"))
    page = (retrieval.OUT.parent.parent / "docs/retrieval_attention.md").read_text("utf-8")
    for row in found["tail"]["methods"]:
        kl = f"{row['kl']:.4f}" if "kl" in row else ""
        numbers = f"{row['error']:.3f} | {row['p95']:.3f} | {kl} |"
        assert f"| {row['top']} | {row['method']} | {numbers}" in page
    sizes = found["synthetic, graph with 128 links"]["sizes"]
    seconds = " | ".join(f"{row['build_s']:.1f}" for row in sizes)
    assert f"| build a graph, seconds | {seconds} |" in page
    for model in "", ", qwen2.5-coder-1.5b":
        for key, n in ("", "1,024"), (", queries of 4,096 tokens", "4,096"):
            heads = [head["graph"] for head in found[f"scan{model}{key}"]["heads"]]
            share = sum(1 if x is None else x for x in heads) / len(heads)
            row = f"| graph, of the latest {n} tokens' queries | {len(heads)} | {share:.1%} |"
            line, = (line for line in page.splitlines() if line.startswith(row))
            assert line.endswith(f" | {sum(x is None for x in heads)} |")


def test_queries_behind_a_kept_text_are_those_of_the_whole(checkpoint, tmp_path, monkeypatch):
    model, tokenizer = load(checkpoint(max_position_embeddings=4096), device="cpu")
    ids = torch.randint(3, 300, (120,), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(retrieval.texts, "ids", lambda *args: ids)
    args = argparse.Namespace(model=model, text="code", length=120, steps=9, asked=3, train=40,
                              keep=tmp_path)
    whole, heard = fidelity.read(model, ids, 9), []

    def attend(q, k, v):
        heard.append(q)
        return attend_causally(q, k, v)
    fidelity.follow(model, ids[:110], 0, [attend] * len(model.layers))
    for _ in "read", "kept":
        case = retrieval.read(args, tokenizer)
        assert case.T == 3 and case.n == 110 and torch.equal(case.ids, ids[:114])
        for mine, theirs, q in zip(case.past, whole.past, heard, strict=True):
            torch.testing.assert_close(mine[0], q[:, :, 70:])
            assert torch.equal(mine[1], theirs[1]) and torch.equal(mine[2], theirs[2])
        assert torch.equal(case.hidden, whole.hidden[:3])
        for mine, theirs in zip(case.steps, whole.steps, strict=True):
            assert all(torch.equal(x, y[:, :, :3]) for x, y in zip(mine, theirs, strict=True))


def test_without_faiss_the_command_goes_on_and_names_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(retrieval.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(retrieval.SECTIONS, "synthetic", lambda case, args: {"sizes": []})
    assert retrieval.hnsw_curve(None, None) == []
    assert retrieval.main(["synthetic", "--save", str(tmp_path / "x.json")]) == 0
    assert "pip install --no-deps faiss-cpu" in capsys.readouterr().err
    assert json.loads((tmp_path / "x.json").read_text())["synthetic"]["sizes"] == []
