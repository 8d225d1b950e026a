"""The Triton twins are as exact as PyTorch, on a GPU or interpreted.

Without a GPU conftest.py imports Triton as its interpreter. tests/test_footprint.py compiles the
kernels for GPUs that are not here.
"""
import functools
import math
import re

import numpy as np
import oracle
import pytest
import torch
from steps import ALL, CASES, SMALL, Case, assert_as_exact, config_budget, qkv, read

pytest.importorskip("triton")
import triton.language as tl
from triton.runtime.interpreter import interpreter_builder as BUILDER

import buffer
import kernels
import retroinfer
from bench import footprint
from retroinfer import RetroConfig, Store, WaveIndex, before, gather_clusters

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def first_of(values):
    """The first is tried in make test, the others in make test-all: the interpreter is slow."""
    return [values[0], *(pytest.param(x, marks=pytest.mark.slow) for x in values[1:])]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What torch.empty hands out is NaN, or the largest integer, in every test of this file."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")     # Triton loads parts of itself when they run
        mend_bfloat16(monkeypatch)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def mend_bfloat16(monkeypatch):
    """tl.dot, which the interpreter does on the bits of bfloat16, on their values, as a GPU does.

    Its rounding to bfloat16 too, down in place of to the nearest.
    """
    builder, dot, cast = BUILDER, BUILDER.create_dot, BUILDER.cast_impl

    def to_fp32(x):
        return cast(x, tl.float32) if x.dtype == tl.bfloat16 else x

    def rounded(x, dtype):
        if dtype.scalar == tl.bfloat16 and x.dtype.scalar == tl.float32:
            near = torch.from_numpy(np.atleast_1d(x.data)).bfloat16().view(torch.uint16).numpy()
            return type(x)(near.reshape(x.data.shape), tl.bfloat16)
        return cast(x, dtype)

    monkeypatch.setattr(builder, "create_dot",
                        lambda a, b, *rest: dot(to_fp32(a), to_fp32(b), *rest))
    monkeypatch.setattr(builder, "cast_impl", rounded)


# ---------------------------------------------------------------- a decode step

def kernel(case):
    """The kernels' answer to a Case."""
    return case.twin(kernels.attend, DEVICE)


@pytest.mark.parametrize("dtype", first_of(DTYPES), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_as_exact_as_pytorch(name, dtype):
    case = Case(*CASES[name], dtype)
    assert_as_exact(kernel(case), case.eager(), case.truth())


@pytest.mark.parametrize("dtype", first_of(DTYPES[::-2]), ids=str)
@pytest.mark.parametrize("values", first_of([0.3, 0.05, 0.0]))
@pytest.mark.parametrize("name", CASES)
def test_a_step_that_reads_some_values_is_as_exact_as_pytorch(name, values, dtype):
    case = Case(*CASES[name], dtype, values=values)
    assert_as_exact(kernel(case), case.eager(), case.truth())


@pytest.mark.parametrize("values", [1.0, 0.3])
@pytest.mark.parametrize("name", ["plain", "ragged", "no index yet", "none estimated"])
def test_a_step_ranked_as_in_the_paper_is_as_exact_as_pytorch(name, values):
    case = Case(*CASES[name], bits=16, by_mass=False, values=values)
    assert_as_exact(kernel(case), case.eager(), case.truth())


@pytest.mark.parametrize("values", [1.0, 0.3])
@pytest.mark.parametrize("name", CASES)
def test_a_step_behind_a_fetch_is_as_exact_as_pytorch(name, values):
    """Behind the tokens a fetch brings NaN. It is asked in order of rank, as in PyTorch."""
    case, asked = Case(*CASES[name], values=values), []

    def gather(index, stores, N, ids, ends):
        asked.append([ids.masked_fill(ends == before(ends), -1).cpu(), ends.cpu()])
        return gather_clusters(index, stores, N, ids, ends)

    fetch = functools.partial(gather, case.index, case.stores, case.budget.N)
    eager = retroinfer.tripartite_attention(case.q, case.steady, case.index, case.budget, fetch,
                                            case.method)
    mine = case.twin(functools.partial(attend_fetched, gather), DEVICE)
    assert_as_exact(mine, eager, case.truth())
    assert all(map(torch.equal, *asked))


def attend_fetched(gather, q, steady, index, stores, budget, method):
    """kernels.attend behind a fetch."""
    def fetch(ids, ends):
        k, v, bias = gather(index, stores, budget.N, ids, ends)
        return *(x.masked_fill(bias.mT.isinf(), math.nan) for x in (k, v)), bias
    return kernels.tripartite_attention(q, steady, index, budget, fetch, method)


@pytest.mark.parametrize("values", [1.0, 0.3])
def test_an_odd_number_of_dims_is_as_exact_as_pytorch(values):
    case = Case((1, 2, 3, 45, 37, 53), (7, 33, 9), [(7, 33)], [(36, 53)], bits=16, values=values)
    assert_as_exact(kernel(case), case.eager(), case.truth())


def test_the_two_rankings_differ():
    case = Case(*CASES["plain"])
    by_mass = case.truth()
    case.method = RetroConfig.paper().method()
    assert (by_mass - case.truth()).abs().max() > 0.01


@pytest.mark.parametrize("values", [1.0, 0.3])
@pytest.mark.parametrize("largest", [300, 1])
def test_clusters_of_any_size_are_read(largest, values):
    """Giants, and single tokens."""
    case = Case((1, 2, 2, 16, 4, 12), (9, 11, largest), [(9, 11)], [(4, 12)], values=values)
    assert_as_exact(kernel(case), case.eager(), case.truth())


@pytest.mark.parametrize("values", [1.0, 0.3])
def test_a_sequence_with_nothing_to_attend_harms_no_other(values):
    """NaN for it, as a softmax over nothing has it, and for it alone."""
    case = Case((2, 1, 2, 16, 8, 20), (4, 12, 9), [(4, 12)] * 2, [(0, 0), (8, 20)],
                values=values)
    mine = kernel(case)
    assert mine[0].isnan().all() and case.eager()[0].isnan().all()
    assert_as_exact(mine[1], case.eager()[1], case.truth()[1])


@pytest.mark.parametrize("values", [1.0, 0.3])
@pytest.mark.parametrize("n_programs", [1, 3, 1000])
def test_the_number_of_splits_changes_nothing_but_rounding(n_programs, values, monkeypatch):
    case = Case(*CASES["ragged"], values=values)
    monkeypatch.setattr(kernels, "programs", lambda device: n_programs)
    torch.testing.assert_close(kernel(case), case.eager(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("values", [1.0, 0.3])
def test_two_steps_are_one_bit_for_bit(values):
    case = Case(*CASES["plain"], values=values)
    assert torch.equal(kernel(case), kernel(case))


@pytest.mark.parametrize("values", [0.3, 0.0])
def test_of_equal_tokens_it_does_not_matter_which_give_values(values):
    """Every value is the mean: no weight is lost, and none counts twice."""
    case = Case(*CASES["plain"], values=values, bits=16)
    k, v = case.stores
    k[:], v[:] = k[:, :, :1], v[:, :, :1]
    case.index.means[:] = v[:, :, :1]
    want = case.truth()
    case.give_values(1.0)
    torch.testing.assert_close(want, case.truth())
    case.give_values(values)
    assert_as_exact(kernel(case), case.eager(), want)


@pytest.mark.skipif(kernels.IS_COMPILED, reason="the interpreter counts")
@pytest.mark.parametrize("values", [1.0, 0.3])
def test_the_docstring_counts_the_bytes_of_each_kernel(values, monkeypatch):
    """Its formulas, with every slot live and every share used, are what is loaded and stored."""
    B, H, G, D, W, C, R, E, S, size, e = 1, 2, 3, 64, 40, 96, 10, 20, 3, 4, 4
    N = R * size
    M = math.ceil(N * values)
    monkeypatch.setattr(kernels, "splits", lambda device, heads, n_tiles: S)
    case = Case((B, H, G, D, W, C), (R, R + E, size), [(R, R + E)], [(W, C)], values=values)
    retrieve, ranked = (torch.tensor([[n]]) for n in (R, R + E))        # of every head
    case.budget = case.budget._replace(retrieve=retrieve, ranked=ranked)
    sizes = torch.full((B, H, C), float(size))
    offsets = torch.arange(C).expand(B, H, C) * size
    case.index = case.index._replace(sizes=sizes, offsets=offsets)
    case.stores = [torch.randn(B, H, C * size, D) for _ in range(2)]
    with footprint.counted() as moved:
        kernels.attend(case.q, case.steady, case.index, case.stores, case.budget, case.method)
    every, some = ({name: formulas for name, *formulas in re.findall(
        r"^    (\w+) +(\S[^:]+?) read, (.+) written$", part, re.M)}
        for part in kernels.__doc__.split("in place of these"))
    ledger = every if M == N else every | some
    assert {f"{name}_kernel" for name in ledger} == set(moved)
    names = {name: x for name, x in locals().items() if len(name) == 1}
    for name, formulas in ledger.items():
        expected = [B * H * eval(f"({x})", {}, names) for x in formulas]
        assert moved[f"{name}_kernel"] == expected, name


def test_tensors_of_two_dtypes_are_refused():
    case = Case(*CASES["one token"])
    case.q = case.q.half()
    with pytest.raises(ValueError, match=r"float16.*float32.*cast to one"):
        kernel(case)


@pytest.mark.parametrize("attend, values", [
    (kernels.attend, 1.0), (functools.partial(attend_fetched, gather_clusters), 0.3)],
    ids=["device", "fetched"])
def test_inductor_compiles_the_step_as_one_graph(attend, values):
    case = Case(*CASES["three queries, 80 dims"], values=values)
    fast = torch.compile(attend, fullgraph=True, dynamic=False)
    assert torch.equal(case.twin(fast, DEVICE), case.twin(attend, DEVICE))


# ---------------------------------------------------------------- selections

def shares(kind, n):
    """Weights (1, 2, n), fp32, of two heads, and where rows are free."""
    g = torch.Generator().manual_seed(n)
    ranks = torch.rand(1, 2, n, generator=g).argsort(-1)
    x = {"distinct": (ranks + 1) / n,
         "few of them": torch.randint(1, 4, (1, 2, n), generator=g) / 8,
         "all equal": torch.full((1, 2, n), 0.25),
         "hardly any left": (ranks / n).masked_fill(ranks < 0.9 * n, 0),
         }[kind]
    return x, torch.rand(1, 2, n, generator=g) < 0.2


def logits_of(x, is_free):
    """Logits (1, 2, n, 1) of such weights, and stats (1, 2, 1, 2, 1) that leave them as they are:
    exp(-200) is 0."""
    stats = torch.tensor([0.0, 1.0]).expand(1, 2, 1, 2)[..., None].contiguous()
    return [y.to(DEVICE) for y in (
        x.log().clamp(min=-200).masked_fill(is_free, -math.inf)[..., None], stats)]


def best(weights, is_free, n):
    """Whether a row is one of the n largest, of equals the first, in their order: (1, 2, rows)."""
    order = weights.masked_fill(is_free, -1).sort(dim=-1, descending=True, stable=True).indices
    return (order.argsort(-1) < n) & ~is_free


KINDS = ["distinct", "few of them", "all equal", "hardly any left"]
SIZES = [1, 90, pytest.param(9000, marks=pytest.mark.slow)]     # more than registers hold


@pytest.mark.parametrize("n_tokens", [0, *SIZES])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_selected_exactly_and_of_equals_the_first(kind, n_tokens):
    """Behind those that fit lies room: NaN."""
    N, counters = max(n_tokens, 1) + 80, torch.zeros(1, 2, 2, dtype=torch.int32, device=DEVICE)
    x, _ = shares(kind, N)
    is_free = (torch.arange(N) >= n_tokens).expand(1, 2, N)
    logits, stats = logits_of(x, is_free)
    logits = logits.masked_fill(is_free[..., None].to(DEVICE), math.nan)
    fits = torch.tensor([[[5, n_tokens, 9]] * 2], dtype=torch.int32, device=DEVICE)
    weights, cuts = torch.empty_like(logits[..., 0]), torch.empty_like(counters)
    for values in (1000, 300, 0):
        kernels.select(kernels.share_kernel, N, logits, stats, fits, weights, counters, cuts,
                       values, N, 1)
        bits = weights.cpu().view(torch.int32)
        low, end = (y[..., None] for y in cuts.cpu().unbind(-1))
        mine = (bits > low) | ((bits == low) & (torch.arange(N) < end))
        want = best(weights.cpu(), is_free, -(-n_tokens * values // 1000))
        assert torch.equal(mine & ~is_free, want) and not counters.any()
    torch.testing.assert_close(weights.cpu(), x.masked_fill(is_free, -1))


@pytest.mark.parametrize("C", [1, 90, pytest.param(1100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_clusters_are_chosen_exactly_and_their_tokens_listed(kind, C):
    """Retrieved ones first, then the estimated ones, both as they are numbered."""
    (x, is_free), g = shares(kind, C), torch.Generator().manual_seed(C)
    sizes = torch.randint(1, 5, (1, 2, C), generator=g) * ~is_free
    offsets = torch.randint(0, 10**6, (1, 2, C), generator=g)
    R, K = max(C // 5, 1), max(C // 2, 1)
    limits = [torch.tensor([[n, max(n - 3, 0)]]).to(DEVICE) for n in (R, K)]
    counters = torch.zeros(1, 2, 2, dtype=torch.int32, device=DEVICE)
    index = kernels_index(sizes.float(), offsets)
    for values in (1000, 200):
        found = kernels.choose(*logits_of(x, is_free), index, limits, counters,
                               [4 * R, R, K, values])
        _, order, rows, owners, fits = (y.cpu() for y in found)
        for h in (0, 1):
            read, ranked = (best(x, is_free, int(n[0, h]))[0, h].nonzero()[:, 0] for n in limits)
            guessed = ranked[~torch.isin(ranked, read)]
            n = sizes[0, h, read]
            want = torch.cat([torch.arange(o, o + m) for o, m in zip(
                offsets[0, h, read].tolist(), n.tolist(), strict=True)] or [read])
            assert fits[0, h].tolist() == [len(read), int(n.sum()), len(ranked)]
            assert order[0, h, :len(ranked)].tolist() == [*read.tolist(), *guessed.tolist()]
            assert rows[0, h, :len(want)].tolist() == want.tolist()
            if values < 1000:
                assert owners[0, h, :len(want)].tolist() == read.repeat_interleave(n).tolist()


def kernels_index(sizes, offsets):
    """An Index of which nothing else is read."""
    return retroinfer.Index(None, None, sizes.to(DEVICE), offsets.to(DEVICE), None, None, None)


# ---------------------------------------------------------------- building the index

def test_inductor_compiles_the_building_of_an_index_as_one_graph():
    def build(x, centroids, order):
        ids = kernels.nearest(x, centroids)
        return ids, kernels.segment_sum(x, order, retroinfer.count(ids, 9))

    x, order = torch.randn(1, 2, 40, 16).to(DEVICE), torch.rand(1, 2, 40).argsort(-1).to(DEVICE)
    fast, args = torch.compile(build, fullgraph=True, dynamic=False), (x, x[:, :, :9], order)
    assert all(map(torch.equal, fast(*args), build(*args)))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("L, C, D", [(1, 1, 16), (70, 1, 16), (129, 33, 20), (64, 130, 80)])
def test_the_nearest_centroid_is_as_near_as_pytorchs(L, C, D, dtype):
    g = torch.Generator().manual_seed(L)
    x, centroids = (torch.randn(2, 2, n, D, generator=g).to(DEVICE, dtype) for n in (L, C))
    products = x.double() @ centroids.double().mT
    best = products.amax(-1).cpu()
    mine, eager = (products.gather(-1, f(x, centroids)[..., None])[..., 0]
                   for f in (kernels.nearest, retroinfer.nearest))
    assert_as_exact(mine, eager, best)


def test_of_equally_near_centroids_the_first_counts():
    x = torch.randn(1, 1, 40, 16, device=DEVICE)
    assert not kernels.nearest(x, torch.zeros(1, 1, 150, 16, device=DEVICE)).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [[1], [0, 5, 0], [1] * 20, [0, 90, 1, 0, 16, 17], [40]], ids=str)
def test_sums_over_runs_are_as_exact_as_pytorchs(sizes, dtype):
    L, sizes = sum(sizes), torch.tensor([[sizes, sizes[::-1]]], device=DEVICE)
    x, order = torch.randn(1, 2, L, 20), torch.rand(1, 2, L).argsort(-1).to(DEVICE)
    x = x.to(DEVICE, dtype)
    truth = retroinfer.segment_sum(x.cpu(), order.cpu(), sizes.cpu())
    mine = kernels.segment_sum(x, order, sizes)
    spans = sizes.cumsum(-1) - sizes
    truth = torch.stack([torch.stack([x[0, h, order[0, h, i:i + n]].double().sum(0) for i, n in zip(
        spans[0, h].tolist(), sizes[0, h].tolist(), strict=True)]) for h in range(2)])[None].cpu()
    assert_as_exact(mine, retroinfer.segment_sum(x, order, sizes), truth)
    assert torch.equal(mine, kernels.segment_sum(x, order, sizes))              # bit for bit


# ---------------------------------------------------------------- the wave index on kernels

TINY = SMALL | {"update": 8, "segment": 32}     # so that few tokens bring an update


def run(wave, q, k, v, n_prompt, decode=None):
    """Outputs of a prefill of n_prompt tokens and one decode step for each of the others."""
    outputs, room = [read(wave, *(x[:, :, :n_prompt] for x in (q, k, v)))], 0
    for t in range(n_prompt, k.shape[2]):
        room = room or wave.update()
        outputs.append((decode or wave.decode)(*(x[:, :, t:t + 1] for x in (q, k, v))))
        room -= 1
    return torch.cat(outputs, 2).cpu()


def test_all_retrieved_is_dense_with_kernels():
    q, k, v = qkv(56, B=2, H=1)
    wave = WaveIndex(RetroConfig(**TINY, **ALL), 56, batch=2, hot=kernels)
    o = run(wave, *(x.to(DEVICE) for x in (q, k, v)), 46)
    assert (wave.n_indexed == 48).all()                         # a segment and two updates
    torch.testing.assert_close(o.double(), oracle.dense(q, k, v), rtol=1e-4, atol=1e-5)


def test_kernels_build_pytorchs_index():
    q, k, v = (x.to(DEVICE) for x in qkv(101))
    waves = [WaveIndex(RetroConfig(**TINY, retrieve=0.1, estimate=0.3), 101, hot=hot)
             for hot in (kernels, retroinfer.PLAIN)]
    mine, eager = (run(wave, q, k, v, 98) for wave in waves)
    assert config_budget(waves[0])[1] > config_budget(waves[0])[0] > 0
    for a, b in zip(waves[0].index, waves[1].index, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make_store", first_of([
    functools.partial(buffer.WaveBuffer, cache_ratio=.3), Store]), ids=["host", "device"])
def test_decode_with_kernels_compiles_whole_and_never_again(make_store):
    torch._dynamo.reset()
    q, k, v = (x.to(DEVICE) for x in qkv(60))
    counter = torch._dynamo.testing.CompileCounter()
    wave = WaveIndex(RetroConfig(**TINY), 60, hot=kernels, make_store=make_store)
    run(wave, q, k, v, 46,
        torch.compile(wave.decode, backend=counter, fullgraph=True, dynamic=False))
    assert counter.frame_count == 1 and wave.n_indexed == 48    # over 14 tokens and two updates


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_captured_step_grows_with_its_sequence():
    """One CUDA graph, replayed over tokens and an index update, does what eager steps do."""
    q, k, v = (x.to(DEVICE) for x in qkv(220))
    eager = run(WaveIndex(RetroConfig(**TINY), 220, hot=retroinfer.PLAIN), q, k, v, 150)
    wave = WaveIndex(RetroConfig(**TINY), 220, hot=kernels)
    now, graph = [x[:, :, :1].clone() for x in (q, k, v)], torch.cuda.CUDAGraph()
    held = {}

    def replay(*token):
        for x, new in zip(now, token, strict=True):
            x.copy_(new)
        if not held:
            n = wave.n_tokens.clone()
            wave.decode(*now)                                   # compiles
            wave.n_tokens.copy_(n)
            with torch.cuda.graph(graph):
                held["o"] = wave.decode(*now)
            wave.n_tokens.copy_(n)
        graph.replay()
        return held["o"].clone()

    torch.testing.assert_close(run(wave, q, k, v, 150, replay), eager, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("op", ["choose", "attend", "attend some", "nearest", "segment_sum",
                                "copy_rows"])
def test_operators_pass_opcheck(op):
    case = Case(*CASES["one token"])
    x, ids = case.q.to(DEVICE), torch.zeros(1, 1, 1, dtype=torch.int64, device=DEVICE)
    steady, index, stores = ([x.to(DEVICE) for x in xs]
                             for xs in (case.steady, case.index, case.stores))
    shares = [n.to(DEVICE) for n in case.budget[:2]]                        # (1, 1) each
    sizes = [case.budget.N, case.budget.R, case.budget.K]
    every, some = ((x, steady, index, [*sizes, n]) for n in (1000, 200))
    _, *chosen = kernels.choose_op(*some, shares, True)
    args = {"choose": (*some, shares, True), "attend": (*every, stores, chosen),
            "attend some": (*some, stores, chosen),
            "nearest": (x, x), "segment_sum": (x, ids, ids + 1), "copy_rows": (x, x, ids)}[op]
    torch.library.opcheck(getattr(kernels, f"{op.split()[0]}_op"), args)


# ---------------------------------------------------------------- fetching

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, T, D", [(1, 1, 1), (16, 40, 64), (37, 50, 80), (130, 9, 20)])
def test_rows_are_copied_as_by_pytorch_and_none_else(N, T, D, dtype):
    """Two sources fill what is theirs, in either order; rows of neither stay as they were."""
    g = torch.Generator().manual_seed(N)
    out, host, slots = (torch.randn(2, 3, n, D, generator=g).to(dtype) for n in (N, T, T))
    rows = torch.randint(-3, T, (2, 3, N), generator=g)
    is_hit = torch.rand(2, 3, N, generator=g) < .5
    misses, hits = rows.masked_fill(is_hit, -1), rows.masked_fill(~is_hit, -8)
    host[:, :, 1:][:, :, :2] = math.nan                     # read or not, it must arrive as it is
    want = buffer.copy_rows(buffer.copy_rows(out, host, misses), slots, hits)
    if DEVICE == "cuda":
        host = host.pin_memory()
    misses, hits, slots = (x.to(DEVICE) for x in (misses, hits, slots))
    for order in ((host, misses, slots, hits), (slots, hits, host, misses)):
        mine = out.clone().to(DEVICE)
        assert kernels.copy_rows(mine, *order[:2]) is mine
        kernels.copy_rows(mine, *order[2:])
        assert torch.equal(mine.cpu().nan_to_num(7.), want.nan_to_num(7.))
