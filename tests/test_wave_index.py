"""The wave index against float64 loops: limits that must hold exactly, then the general case."""
import itertools
import math
from contextlib import nullcontext
from dataclasses import replace

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import (
    ALL,
    BACKENDS,
    CLOSE,
    SMALL,
    WHOLE,
    config_budget,
    generated,
    members,
    qkv,
    read,
    run,
)

import generate
import retroinfer
from generate import COMPILE
from retroinfer import (
    PLAIN,
    Index,
    RetroConfig,
    WaveIndex,
    attend,
    cluster_segment,
    count,
    gather_clusters,
    in_bytes,
    log_possible_mass,
    measure_spreads,
    pack,
    scores,
    spherical_kmeans,
    split_large,
    weigh_channels,
)


def n_clusters(config, tokens):
    """Clusters retrieved, retrieved or estimated, of texts of so many tokens."""
    return retroinfer.limits_of(config, tokens)


# ---------------------------------------------------------------- the index

@pytest.mark.parametrize("L", [4, 8, 60, 64, 68, 256])
def test_every_token_is_in_one_cluster(L):
    _, k, v = qkv(L, B=2)
    v[..., 0] = torch.arange(L)                                 # a token's name
    index, k_sorted, v_sorted = cluster_segment(k, v, RetroConfig(**SMALL))
    order = v_sorted[..., 0].long()
    assert (order.sort(-1).values == torch.arange(L)).all()     # none lost, none twice
    assert torch.equal(k_sorted, k.gather(2, order[..., None].expand_as(k)))
    assert torch.equal(v_sorted, v.gather(2, order[..., None].expand_as(v)))
    assert (index.sizes.sum(-1) == L).all()
    assert torch.equal(index.offsets, index.sizes.cumsum(-1) - index.sizes)   # and lie end to end


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
def test_a_centroid_is_the_mean_of_its_members(spread):
    q, k, v = qkv(300, B=2, spread=spread)
    wave, _ = run(RetroConfig(**WHOLE), q, k, v, 299)
    live = wave.index.sizes > 0
    for b, h in ((0, 0), (1, 1)):
        keys, values = zip(*members(wave, b, h), strict=True)
        means = torch.stack([x.double().mean(0) for x in keys])
        torch.testing.assert_close(wave.index.centroids[b, h][live[b, h]].double(), means, **CLOSE)
        means = torch.stack([x.double().mean(0) for x in values])
        torch.testing.assert_close(wave.index.means[b, h][live[b, h]].double(), means, **CLOSE)




@pytest.mark.parametrize("spread", [0.0, 0.05, 1.0])
def test_no_cluster_is_larger_than_twice_the_mean(spread):
    config = RetroConfig(**SMALL)
    _, k, v = qkv(500, spread=spread)
    index, _, _ = cluster_segment(k, v, config)
    assert index.sizes.max() <= config.largest
    assert index.sizes.shape[-1] == config.slots(500)


def test_a_large_cluster_is_cut_into_even_pieces():
    ids = torch.tensor([0] * 9 + [1] * 2 + [5] * 8).view(1, 1, -1)              # P = 8
    pieces = split_large(ids, RetroConfig(**SMALL), slots=100)
    assert count(pieces, 5)[0, 0].tolist() == [5, 4, 2, 8, 0]


def test_one_giant_cluster_fits_the_slots():
    config = RetroConfig(**SMALL)
    pieces = split_large(torch.zeros(1, 1, 400, dtype=torch.long), config, config.slots(400))
    assert pieces.max() < config.slots(400)
    uneven = torch.tensor(list(range(30)) + [30] * 90).view(1, 1, -1)           # 30 + 12 pieces
    pieces = split_large(uneven, config, config.slots(120))                     # above 34 slots
    assert count(pieces, 30)[0, 0].tolist() == [4] * 30


def test_two_runs_give_one_index():
    q, k, v = qkv(700, B=2)
    (one, first), (two, second) = (run(RetroConfig(**SMALL), q, k, v, 600) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.index, two.index, strict=True))
    assert torch.equal(one.store.k, two.store.k) and torch.equal(first, second)


def test_kmeans_finds_clumps():
    g = torch.Generator().manual_seed(0)
    names = torch.arange(240) % 8
    x = torch.eye(8)[names] * 5 + 0.1 * torch.randn(240, 8, generator=g)
    ids = spherical_kmeans((x - x.mean(0)).view(1, 1, 240, 8), 8, 10).flatten()
    for name in range(8):
        assert len(ids[names == name].unique()) == 1            # a clump is never torn apart


def test_unit_seeds_leave_few_clusters_empty():
    _, k, _ = qkv(2048, D=32)
    k = k * torch.rand(1, 2, 2048, 1) * 4 + 3                   # norms differ, as real keys' do
    ids = spherical_kmeans(k - k.mean(2, keepdim=True), 128, 2)
    assert (count(ids, 128) == 0).float().mean() < 0.1          # raw seeds leave more than half


def test_channels_weigh_by_the_queries_mean_square_alike_in_a_rope_pair():
    squares = torch.tensor([[1, 2, 3, 5, 6, 0], [0] * 6], dtype=torch.float64)      # by head
    pairs = [6, 8, 3, 6, 8, 3]                              # channels d and d + 3 turn into another
    weights = weigh_channels(squares, RetroConfig(channel_power=0.5))[0, :, 0].tolist()
    assert weights[0] == pytest.approx([math.sqrt(x * 6 / 34) for x in pairs])
    assert weights[1] == [1] * 6                            # no query has been heard
    louder = weigh_channels(1e9 * squares, RetroConfig(channel_power=0.5))
    assert louder[0, 0, 0].tolist() == pytest.approx(weights[0])
    assert weigh_channels(squares, RetroConfig(channel_power=0.0)).eq(1).all()


def test_a_spread_is_the_variance_of_the_logits():
    """Times |q|^2, for queries that are loud where keys vary little. The mean variance of the
    channels is far from it."""
    g = torch.Generator().manual_seed(0)
    loud = torch.rand(8, generator=g, dtype=torch.float64).add(0.2).repeat(2)
    q = torch.randn(1, 1, 5000, 16, generator=g, dtype=torch.float64) * loud
    k = torch.randn(1, 1, 64, 16, generator=g, dtype=torch.float64) / loud
    order, sizes = torch.arange(64).expand(1, 1, 64), torch.full((1, 1, 1), 64)
    energy = q.square().sum((1, 2))                             # (H, D)
    spread = measure_spreads(k, k.mean(2, keepdim=True), order, sizes, energy, PLAIN)
    true = (q @ k.mT).var(-1, correction=0).mean()
    length = q.square().sum(-1).mean()
    assert (length * spread).item() == pytest.approx(true.item(), rel=0.1)
    mean = k.var(2, correction=0).mean()
    assert length * mean > 1.5 * true


@pytest.mark.parametrize("n_prompt", [1, 40, 66, 140])
def test_the_first_segment_s_queries_are_heard_however_they_come(n_prompt):
    q, k, v = qkv(150, B=2)
    wave, _ = run(RetroConfig(**SMALL), q, k, v, n_prompt)
    for b, h, d in ((0, 0, 0), (1, 0, 15), (1, 1, 7)):
        heard = sum(q[b, 3 * h + g, t, d].item() ** 2 for g in range(3) for t in range(2 + 64))
        assert wave.q_energy[b, h, d].item() == pytest.approx(heard / 3)


def test_what_queries_do_not_look_at_does_not_part_what_they_look_for():
    """Keys have one of 16 themes in half of their channels and louder noise in the other half,
    where queries are quiet. A cluster is to hold one theme."""
    g = torch.Generator().manual_seed(0)
    looks = (torch.arange(16) % 8 < 4).float()              # 0..3, and the others of their pairs
    themes = torch.arange(326) % 16
    k = torch.randn(16, 16, generator=g)[themes] * looks
    k = (k + 3 * torch.randn(326, 16, generator=g) * (1 - looks)).expand(1, 1, -1, -1)
    q = torch.randn(1, 3, 326, 16, generator=g) * (0.05 + looks)
    v, pure = themes.float()[:, None].expand(1, 1, -1, 16), {}
    for power in (0.0, RetroConfig().channel_power):
        wave = WaveIndex(RetroConfig(**SMALL | {"segment": 320, "bits": 16},
                                     channel_power=power), 326)
        wave.prefill(q, k.contiguous(), v.contiguous())
        found = [values[:, 0].long().bincount().max().item() for _, values in members(wave, 0, 0)]
        pure[power] = sum(found) / 320
    assert pure[0.0] < 0.55 and pure[RetroConfig().channel_power] > 0.85


def test_the_paper_clusters_keys_whatever_the_queries():
    q, k, v = qkv(400)
    loud = q * torch.arange(16)
    for config, is_same in ((replace(RetroConfig.paper(), segment=320), True),
                            (RetroConfig(segment=320), False)):
        one, two = WaveIndex(config, 400), WaveIndex(config, 400)
        one.prefill(q, k, v), two.prefill(loud, k, v)
        assert one.n_indexed == 320 and torch.equal(one.store.k, two.store.k) == is_same


@pytest.mark.parametrize("n", [1, 3, 8, 16])
@pytest.mark.parametrize("deviation", [0.0, 0.5, 2.0, 6.0, 30.0])
def test_what_a_cluster_may_hold_is_between_the_typical_and_the_mean(n, deviation):
    g = torch.Generator().manual_seed(0)
    q, shape = torch.full((1, 1, 1, 4), deviation / 2), (1, 1, 1)
    index = Index(None, None, torch.full(shape, float(n)), None, torch.ones(shape), None,
                  None)
    mine = float(log_possible_mass(q, index))
    sums = (deviation * torch.randn(4000, n, generator=g).double()).logsumexp(-1)
    assert sums.median() - 0.05 <= mine <= math.log(n) + deviation ** 2 / 2 + 1e-5
    assert mine == pytest.approx(oracle.hope(n, deviation ** 2), abs=1e-5)


# ---------------------------------------------------------------- limits

PROMPTS = [1, 2, 5, 6, 7, 37, 38, 39, 69, 70, 71, 101, 102, 103, 230]


@pytest.mark.parametrize("backend, n_prompt", [
    *itertools.product(["eager", "native"], PROMPTS), ("compiled", 70)], indirect=["backend"])
def test_all_retrieved_is_dense(backend, n_prompt):
    """Prompts around every boundary (sink, local, first index, one to three segments), grown."""
    q, k, v = qkv(n_prompt + 120, B=2)
    wave, o = run(RetroConfig(**SMALL, **ALL), q, k, v, n_prompt)
    assert (wave.n_indexed >= 96).all()                         # three updates happened
    torch.testing.assert_close(o.double(), oracle.dense(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_prompt", [1, 4, 68, 69, 1091, 1092, 1093])
def test_paper_boundaries_are_dense_when_all_is_retrieved(n_prompt):
    config = RetroConfig(**ALL, update=1024, local=64)
    q, k, v = qkv(n_prompt + 3, H=1, G=2, D=8)
    wave, _ = run(config, *(x[:, :, :n_prompt + 1] for x in (q, k, v)), n_prompt)
    assert wave.n_indexed == (1024 if n_prompt >= 1092 else 0)              # paper §5.1
    _, o = run(config, q, k, v, n_prompt)
    torch.testing.assert_close(o[:, :, -4:].double(), oracle.dense(q[:, :, -4:], k, v),
                               rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["eager", "native"])
def test_more_clusters_asked_for_than_there_are_are_all_read(name):
    q, k, v = qkv(220)
    hot = generate.hot_functions(torch.device("cpu"), name)
    wave = WaveIndex(RetroConfig(**SMALL | {"min_retrieve": 100}, values=1.0), 220, len(k), hot)
    o = generated(wave, q, k, v, 130)
    slots = wave.config.slots(wave.n_indexed)
    assert config_budget(wave) == (slots[0], slots[0]) and slots[0] < 100
    torch.testing.assert_close(o[:, :, 130:].double(), oracle.dense(q[:, :, 130:], k, v), **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_equal_keys_make_estimation_exact(backend):
    q, k, v = qkv(200)
    k[:, :, 2:] = k[:, :, 2:3]                                  # every token but the sink
    wave, o = run(RetroConfig(**WHOLE, retrieve=0.0, estimate=1.0, values=1.0), q, k, v, 190)
    assert wave.budget().R == 1 and config_budget(wave)[1] > 30
    torch.testing.assert_close(o[:, :, 190:].double(), oracle.dense(q[:, :, 190:], k, v), **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_one_token_a_cluster_is_exact(backend):
    q, k, v = qkv(160)
    config = RetroConfig(**WHOLE | {"cluster": 1}, retrieve=0.0, estimate=1.0)
    wave, o = run(config, q, k, v, 155)
    assert (wave.index.sizes <= 2).all()
    single = wave.index.sizes[:, :, :int(wave.n_clusters)]
    exact = (single == 1).sum() / (single > 0).sum()
    error = (o[:, :, 155:].double() - oracle.dense(q[:, :, 155:], k, v)).abs().max()
    assert exact == 1 and error < 1e-4


def test_estimated_mass_is_never_above_true_mass():
    q, k, v = qkv(400, spread=2.0)
    wave, _ = run(RetroConfig(**SMALL), q, k, v, 399)
    query, scale = q[0, 0, -1].double(), 16 ** -0.5
    for keys, _ in members(wave, 0, 0):
        true = (keys.double() @ query * scale).exp().sum()
        assert len(keys) * (keys.double().mean(0) @ query * scale).exp() <= true * (1 + 1e-9)


# ---------------------------------------------------------------- the general case

SHARES = [(0.0, 0.0), (0.05, 0.0), (0.1, 0.3), (0.3, 0.7)]
RANKINGS = [(16, False), (16, True), (4, True)]         # bits, by mass


@pytest.mark.parametrize("backend, shares, ranking", [
    *itertools.product(["eager", "native"], SHARES, RANKINGS),
    *itertools.product(["kernels"], SHARES[2:3], RANKINGS),
    ("compiled", SHARES[2], RANKINGS[2]),
    pytest.param("inductor", SHARES[2], RANKINGS[2], marks=pytest.mark.slow)],
    indirect=["backend"], ids=str)
def test_tripartite_attention_is_the_papers_sum(backend, shares, ranking):
    """Or, by mass, that sum with each centroid's weight corrected for its cluster's spread."""
    (retrieve, estimate), (bits, by_mass) = shares, ranking
    q, k, v = qkv(300, B=2)
    q[:, 3:] *= 2.7
    config = RetroConfig(**SMALL | {"bits": bits, "by_mass": by_mass}, retrieve=retrieve,
                         estimate=estimate)
    wave, o = run(config, q, k, v, 299)
    n = int(wave.n_tokens[0] - wave.n_indexed[0])
    for b in range(2):
        for h in range(2):
            n_retrieve, n_ranked = config_budget(wave, b)
            steady = wave.k_steady[b, h, :n], wave.v_steady[b, h, :n]
            queries = q[b, 3 * h:3 * h + 3, -1]
            asked = oracle.in_bytes(queries) if bits == 4 else queries
            budget = n_retrieve, n_ranked - n_retrieve, round(1000 * config.values)
            mine = oracle.tripartite(queries, steady, members(wave, b, h), budget,
                                     (*stored(wave.index, b, h), asked) if by_mass else None)
            torch.testing.assert_close(o[b, 3 * h:3 * h + 3, -1].double(), mine, **CLOSE)


def stored(index, b, h):
    """Centroids, means and spreads of the clusters of one head, as numbers."""
    live = index.sizes[b, h] > 0
    rows = [index.centroids[b, h, live], index.means[b, h, live]]
    if rows[0].dtype == torch.uint8:
        rows = [torch.tensor([[byte % 16 - 8 for byte in row] + [byte // 16 - 8 for byte in row]
                              for row in x.tolist()]) for x in rows]
    scales = index.scales[b, h, live].double()
    return (*(x * scales[:, i:i + 1] for i, x in enumerate(rows)),
            index.spreads[b, h, live].double(), index.centre[b, h, 0])


def test_what_four_bits_keep_is_within_half_a_step():
    """Of the mean keys and values, and their spread, that the tokens have."""
    q, k, v = qkv(300)
    wave, _ = run(RetroConfig(**SMALL), q, k, v, 299)
    for h in range(2):
        tokens, live = members(wave, 0, h), wave.index.sizes[0, h] > 0
        kept, steps = stored(wave.index, 0, h), wave.index.scales[0, h, live].double()
        for i in range(2):
            true = torch.stack([x[i].double().mean(0) for x in tokens])
            true -= wave.index.centre[0, h].double() * (i == 0)
            assert ((kept[i] - true).abs() <= 0.501 * steps[:, i:i + 1] + 1e-6).all()
            assert (steps[:, i] <= true.abs().amax(-1) / 7 * 1.01).all()
        energy = q[0, 3 * h:3 * h + 3, :2 + 64].double().square().sum((0, 1))
        loud = energy + torch.cat([energy[8:], energy[:8]])     # RoPE's pairs
        true = torch.stack([x.double().var(0, correction=0) @ loud for x, _ in tokens])
        torch.testing.assert_close(kept[2], true / loud.sum(), rtol=0.005, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "native"], indirect=True)
def test_what_is_large_in_every_key_changes_no_answer(backend):
    """As biases make it. Without the centre, 4 bits would keep nothing else."""
    q, k, v = qkv(400)
    large = 40 * torch.randn(16, generator=torch.Generator().manual_seed(1))
    config = RetroConfig(**SMALL, retrieve=0.1, estimate=0.3)
    (_, plain), (wave, shifted) = (run(config, q, x, v, 390) for x in (k, k + large))
    torch.testing.assert_close(shifted[:, :, 390:], plain[:, :, 390:], rtol=1e-3, atol=1e-3)
    wave.index.centre.zero_()
    lost = wave.decode(q[:, :, -1:], (k + large)[:, :, -1:], v[:, :, -1:])
    assert (lost - plain[:, :, -1:]).abs().max() > 0.1


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_shape_is_dense_when_all_is_retrieved(data):
    def some(low, high):
        return data.draw(st.integers(low, high))

    cluster = some(1, 20)
    config = RetroConfig(sink=some(0, 5), local=some(1, 9), update=cluster * some(1, 8),
                         segment=cluster * some(1, 12), cluster=cluster,
                         iterations=some(1, 4), **ALL)
    n_prompt, n_more = some(1, 150), some(0, 60)
    q, k, v = qkv(n_prompt + n_more, B=some(1, 2), H=some(1, 2), G=some(1, 3), D=2 * some(1, 8))
    _, o = run(config, q, k, v, n_prompt)
    torch.testing.assert_close(o.double(), oracle.dense(q, k, v), rtol=1e-4, atol=1e-4)


def test_retrieved_clusters_come_back_whole():
    q, k, v = qkv(300)
    wave, _ = run(RetroConfig(**SMALL), q, k, v, 299)
    ids = torch.tensor([[[3, 0, 7], [1, 2, 40]]])
    ends = wave.index.sizes.gather(-1, ids).long().cumsum(-1)
    stores = wave.store.k, wave.store.v
    keys, values, bias = gather_clusters(wave.index, stores, 40, ids, ends)
    for h in range(2):
        rows = [torch.arange(int(n)) + start for start, n in zip(
            wave.index.offsets[0, h, ids[0, h]], wave.index.sizes[0, h, ids[0, h]], strict=True)]
        live = bias[0, h, 0] == 0
        assert torch.equal(keys[0, h][live], wave.store.k[0, h, torch.cat(rows)])
        assert torch.equal(values[0, h][live], wave.store.v[0, h, torch.cat(rows)])


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_free_slots_never_speak(backend):
    """With no index at all, and budgets that reach into free slots, only the steady zone counts."""
    q, k, v = qkv(30)
    wave, o = run(RetroConfig(**SMALL, retrieve=0.5, estimate=0.5), q, k, v, 20)
    assert wave.n_indexed == 0
    torch.testing.assert_close(o.double(), oracle.dense(q, k, v), **CLOSE)


def test_estimation_lowers_the_error():
    q, k, v = qkv(2000, D=32, spread=0.7)
    truth = oracle.dense(q[:, :, -1:], k, v)
    errors = []
    for estimate in (0.0, 0.25):
        config = RetroConfig(**SMALL | {"segment": 2000, "cluster": 16}, retrieve=0.05,
                             estimate=estimate)
        _, o = run(config, q, k, v, 1999)
        errors.append((o[:, :, -1:].double() - truth).norm())
    assert errors[1] < 0.7 * errors[0]


def test_decode_compiles_whole_and_never_again():
    torch._dynamo.reset()
    q, k, v = qkv(400)
    config = RetroConfig(**SMALL)
    eager = run(config, q, k, v, 300)[1]
    decode = WaveIndex.decode
    counter = torch._dynamo.testing.CompileCounter()
    WaveIndex.decode = torch.compile(decode, backend=counter, fullgraph=True, dynamic=False)
    try:
        compiled = run(config, q, k, v, 300)[1]
    finally:
        WaveIndex.decode = decode
    assert counter.frame_count == 1                             # over 100 tokens and three updates
    torch.testing.assert_close(compiled, eager)


# ---------------------------------------------------------------- limits of use

def test_more_tokens_than_capacity_are_refused():
    q, k, v = qkv(40)
    wave = WaveIndex(RetroConfig(**SMALL), 30)
    with pytest.raises(ValueError, match="40 tokens do not fit a cache of 30"):
        wave.prefill(q, k, v)


@pytest.mark.parametrize("field, value", [
    ("sink", -1), ("local", 0), ("update", 0), ("cluster", 0), ("segment", 0), ("iterations", 0),
    ("min_retrieve", 0), ("bits", 8), ("retrieve", 1.5), ("estimate", -0.1),
    ("segment", 100), ("update", 20)])
def test_budgets_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        RetroConfig(**{field: value})


def test_paper_settings():
    c = RetroConfig.paper()
    assert (c.sink, c.local, c.cluster, c.segment, c.iterations) == (4, 64, 16, 8192, 10)
    assert (c.retrieve, c.estimate, c.update) == (0.018, 0.232, 1024)
    assert [int(n) for n in n_clusters(c, torch.tensor(131072))] == [147, 2048]


def test_a_short_text_keeps_the_least_clusters():
    tokens = torch.tensor([0, 72, 1024, 4096, 131072])
    assert n_clusters(RetroConfig(growth=1.0), tokens)[0].tolist() == [1, 10, 28, 30, 950]
    assert n_clusters(RetroConfig.paper(), tokens)[0].tolist() == [1, 1, 1, 5, 147]


def test_behind_8192_tokens_clusters_grow_by_a_power_of_the_text():
    short, long = torch.tensor([300, 4096, 8192]), 8192 * 2 ** torch.arange(8)
    even, slow, none = (RetroConfig(growth=x) for x in (1.0, 0.7, 0.0))
    assert RetroConfig() == slow
    assert n_clusters(slow, short)[0].tolist() == n_clusters(even, short)[0].tolist()
    for config, power in ((even, 1.0), (slow, 0.7), (none, 0.0)):
        found = n_clusters(config, long)[0]
        expected = [0.058 * 1024 * 2 ** (power * i) for i in range(8)]
        assert found.tolist() == pytest.approx(expected, abs=0.51)
        assert n_clusters(config, long)[1].tolist() == n_clusters(even, long)[1].tolist()
    ours, paper = (int(n_clusters(c, torch.tensor(131072))[0]) * c.cluster
                   for c in (slow, RetroConfig.paper()))
    assert (1 + RetroConfig().values) * ours < 2 * paper                # rows of keys and values


@pytest.mark.parametrize("growth", [0.0, 0.7, 1.0])
def test_all_clusters_are_retrieved_of_any_text_if_all_are_wanted(growth):
    config, tokens = RetroConfig(retrieve=1.0, growth=growth), torch.tensor([1024, 8192, 1048576])
    assert n_clusters(config, tokens)[0].tolist() == config.slots(tokens).tolist()


def packed_scores(q, codes):
    """Inner products of q (B, H, G, D) and packed rows (B, H, N, D/2)."""
    return scores(q, torch.cat(retroinfer.unpack(codes), -1))


@given(st.integers(0, 2**31), st.sampled_from([2, 64, 80, 256]))
def test_queries_in_bytes_are_within_half_a_step_and_their_sums_are_exact(seed, D):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(1, 1, 3, D, generator=g) * 10.0 ** torch.randint(-5, 6, (1,), generator=g)
    q[0, 0, 2] = 0
    numbers, unit = in_bytes(q)
    assert torch.equal(numbers, numbers.round()) and not numbers[0, 0, 2].any()
    assert numbers.abs().amax(-1)[0, 0].tolist() == [127, 127, 0]
    assert ((numbers * unit - q).abs() <= unit * 0.5001).all()
    codes = torch.randint(17, 256, (1, 1, 9, D // 2), generator=g).to(torch.uint8)
    exact = numbers.long() @ torch.cat([codes & 15, codes >> 4], -1).long().sub(8).mT
    assert torch.equal(packed_scores(numbers, codes).long(), exact)


def test_bytes_add_less_than_a_hundredth_to_the_variance_of_four_bits():
    q, k, _ = qkv(2000, D=64)
    q, (codes, scale) = q.view(1, 2, -1, 64), pack(k)
    numbers, unit = in_bytes(q)
    scale = scale.float()[:, :, None]
    exact, packed, both = (q @ k.mT, packed_scores(q, codes) * scale,
                           packed_scores(numbers, codes) * unit * scale)
    assert 0 < (both - packed).var() < 0.01 * (packed - exact).var()


# ---------------------------------------------------------------- batches, chunks, turns

@pytest.mark.parametrize("backend", ["eager", "compiled", "native"], indirect=True)
def test_unequal_texts_get_what_they_get_alone(backend):
    """From 1 token to many segments, through updates that fall on different steps."""
    config, lengths, n_more = RetroConfig(**SMALL, retrieve=0.1, estimate=0.3), (1, 40, 75, 333), 80
    texts = [qkv(n + n_more, seed=n) for n in lengths]
    batch, alone = WaveIndex(config, 500, batch=4), [WaveIndex(config, 500) for _ in lengths]
    for row, (n, text) in enumerate(zip(lengths, texts, strict=True)):
        chunk = [x[:, :, :n] for x in text]
        assert torch.equal(batch.prefill(*chunk, row), alone[row].prefill(*chunk))
    for t in range(n_more):
        batch.update(), [one.update() for one in alone]
        now = [[x[:, :, n + t:n + t + 1] for x in text]
               for n, text in zip(lengths, texts, strict=True)]
        together = batch.decode(*(torch.cat(xs) for xs in zip(*now, strict=True)))
        for row, one in enumerate(alone):
            torch.testing.assert_close(together[row:row + 1], one.decode(*now[row]), **CLOSE)
    assert torch.equal(batch.n_indexed, torch.cat([one.n_indexed for one in alone]))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=8))
def test_chunks_build_the_index_of_the_whole(chunks):
    """Segments are cut where the text is, not where a chunk ends: bit for bit one index."""
    n = sum(chunks)
    q, k, v = qkv(n)
    whole, parts = (WaveIndex(RetroConfig(**SMALL), n + 1) for _ in range(2))
    whole.prefill(q, k, v)
    for chunk in zip(*(x.split(chunks, 2) for x in (q, k, v)), strict=True):
        parts.prefill(*chunk)
    whole.update(), parts.update()
    assert torch.equal(whole.store.k, parts.store.k) and torch.equal(whole.v_steady, parts.v_steady)
    assert all(torch.equal(a, b) for a, b in zip(whole.index, parts.index, strict=True))


@pytest.mark.parametrize("n_prompt", [1, 70, 198])
def test_an_index_grown_by_updates_is_the_one_built_at_once(n_prompt):
    """Updates as long as segments meet the same tokens, so nothing differs by a bit."""
    config = RetroConfig(**SMALL | {"update": 64}, retrieve=0.2)
    q, k, v = qkv(700)
    grown, _ = run(config, q, k, v, n_prompt)
    whole = WaveIndex(config, 700)
    read(whole, q, k, v)
    assert grown.n_indexed == whole.n_indexed == 640
    theirs = grown.state(0)
    torch.testing.assert_close(theirs.pop("q_energy"), whole.q_energy[0])
    for name, x in theirs.items():
        assert x.equal(whole.state(0)[name]), name


def test_a_cluster_is_its_members_mean_however_long_the_index_grows():
    """No sum is carried from update to update, so rounding does not add up: one bf16 rounding of
    the mean is all there is."""
    config = RetroConfig(**WHOLE, retrieve=0.1)
    q, k, v = (x.bfloat16() for x in qkv(1500))
    wave, _ = run(config, q, k, v, 10)
    assert wave.n_clusters[0] >= 40 * 8 and wave.n_indexed[0] == 46 * 32
    for h in range(2):
        ids = wave.index.sizes[0, h].nonzero()[:, 0]
        assert wave.index.sizes[0, h].sum() == wave.n_indexed[0]
        for c, (keys, values) in zip(ids, members(wave, 0, h), strict=True):
            for mean, rows in ((wave.index.centroids, keys), (wave.index.means, values)):
                exact = rows.double().mean(0)
                torch.testing.assert_close(mean[0, h, c].double(), exact, rtol=2**-8, atol=1e-6)


def test_what_an_index_reads_does_not_depend_on_its_capacity():
    q, k, v = qkv(300)
    config, outputs = RetroConfig(**SMALL, retrieve=0.1, estimate=0.3), []
    for capacity in (300, 500, 3000):
        wave = WaveIndex(config, capacity)
        wave.prefill(q[:, :, :299], k[:, :, :299], v[:, :, :299])
        wave.update()
        outputs.append(wave.decode(q[:, :, 299:], k[:, :, 299:], v[:, :, 299:]))
    torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)
    torch.testing.assert_close(outputs[2], outputs[0], **CLOSE)


def read_ahead(config, n):
    """A wave index of n tokens, and q, k, v of the next."""
    q, k, v = qkv(n + 1)
    wave = WaveIndex(config, n + 1, hot=PLAIN._replace(attend=generate.attend))
    wave.prefill(*(x[:, :, :n] for x in (q, k, v)))
    wave.update()
    return wave, *(x[:, :, n:].contiguous() for x in (q, k, v))


def reads_the_host(q, steady, index, *args):
    """A planted fault."""
    return attend(q * index.sizes.max().item(), steady, index, *args)


@pytest.mark.parametrize("plain, error", [
    (attend, nullcontext()), (reads_the_host, pytest.raises(RuntimeError, match="meta"))])
def test_a_step_waits_for_no_device(plain, error):
    """It says the same of tensors that hold nothing, where to read one is an error."""
    wave, *now = read_ahead(RetroConfig(**SMALL), 100)
    wave.hot, wave.index = PLAIN._replace(attend=plain), Index(*(x.to("meta") for x in wave.index))
    for owner in (wave, wave.store):
        for name, x in vars(owner).items():
            setattr(owner, name, x.to("meta") if torch.is_tensor(x) else x)
    wave.limits = [x.to("meta") for x in wave.limits]
    with error:
        assert wave.decode(*(x.to("meta") for x in now)).shape == now[0].shape


@pytest.mark.slow
def test_a_step_on_a_cpu_takes_what_its_clusters_hold(monkeypatch):
    """One graph for all sizes, and the answer of a step that has the shapes of the caps."""
    torch._dynamo.reset()
    wave, *now = read_ahead(RetroConfig(**SMALL, retrieve=0.4), 2000)
    decode, sizes, fill = torch.compile(wave.decode, **COMPILE), [], generate.fill
    full = wave.budget().retrieve.clone()
    for share in (1, 3, 8):
        n_tokens = wave.n_tokens.clone()
        wave.limits[0].copy_(full * share // 8)
        with torch.compiler.set_stance("default" if share == 1 else "fail_on_recompile"):
            fitted = decode(*now)
        wave.n_tokens.copy_(n_tokens)
        with monkeypatch.context() as patch:
            patch.setattr(generate, "fit", lambda budget: budget)
            patch.setattr(generate, "fill", lambda ends, budget: (
                sizes.append(fill(ends, budget)), budget.N)[1])
            torch.testing.assert_close(fitted, wave.decode(*now))
        wave.n_tokens.copy_(n_tokens)
    assert sizes[0] < sizes[1] < sizes[2] <= wave.most[2]
