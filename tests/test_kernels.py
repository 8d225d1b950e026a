"""The Triton twins are as exact as PyTorch, on a GPU or interpreted, and compile for real GPUs.

Without a GPU conftest.py imports Triton as its interpreter. footprint.py makes machine code in
processes of its own, while the other tests run.
"""
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from test_wave_index import ALL, SMALL, config_budget, qkv, read

kernels = pytest.importorskip("kernels", reason="needs Triton")
import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import interpreter_builder as BUILDER  # noqa: E402

import buffer  # noqa: E402
import footprint  # noqa: E402
import retroinfer  # noqa: E402
from retroinfer import Budget, Index, RetroConfig, WaveIndex, before  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CAPABILITIES = (80, 90, 100)


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


def assert_as_exact(mine, eager, truth):
    """The error to float64 is at most twice that of PyTorch."""
    mine, eager = (((x.double().cpu() - truth).abs().max().item()) for x in (mine, eager))
    assert mine <= 2 * eager + 1e-6, (mine, eager)


# ---------------------------------------------------------------- a decode step

class Case:
    """A step over random clusters that lie anywhere in the store, and its PyTorch and float64.

    shares (B, 2): clusters each sequence retrieves, retrieves or estimates. lives (B, 2): steady
    slots and clusters it has. Everything else is NaN, or an offset far outside the store. bits: 4,
    or 16 and ranked as in the paper.
    """

    def __init__(self, shape, caps, shares, lives, dtype=torch.float32, largest=9, bits=4):
        B, H, G, D, W, C = shape
        g = torch.Generator().manual_seed(0)

        def randn(*size):
            return torch.randn(B, H, *size, D, generator=g).to(dtype)

        sizes = torch.randint(0, largest + 1, (B, H, C), generator=g)
        sizes *= torch.arange(C) < torch.tensor(lives)[:, 1, None, None]
        order = torch.rand(B, H, C, generator=g).argsort(-1)            # how they lie in the store
        ends = sizes.gather(-1, order).cumsum(-1)
        offsets = torch.empty_like(sizes).scatter_(-1, order, before(ends) + 3)
        T = int(sizes.sum(-1).max()) + 7
        shares = torch.tensor(shares).T.contiguous()
        self.q, self.budget = 2 * randn(G), Budget(*caps, *shares, bits == 4)
        is_free = torch.arange(W) >= torch.tensor(lives)[:, :1]                     # (B, W)
        bias = torch.zeros(B, W).masked_fill(is_free, -math.inf)[:, None, None].expand(B, H, 1, W)
        self.steady = randn(W), randn(W), bias
        self.stores = randn(T), randn(T)
        spreads = 2 * torch.rand(B, H, C, generator=g)
        vectors = randn(C), randn(C)
        (centroids, of_key), (means, of_value) = (
            retroinfer.pack(x) if bits == 4 else (x, torch.ones(B, H, C)) for x in vectors)
        self.index = Index(centroids, means, sizes.float(), offsets, spreads.bfloat16(),
                           torch.stack([of_key, of_value], -1).bfloat16())
        row = torch.arange(T).expand(B, H, T)
        self.is_free_row = (row < 3) | (row >= 3 + ends[..., -1:])

    def eager(self):
        """PyTorch's answer."""
        return retroinfer.attend(self.q, self.steady, self.index, self.budget, self.stores)

    def kernel(self):
        """The kernels' answer, with all that is free poisoned."""
        def poison(x, is_free):
            return x.masked_fill(is_free[..., None], math.nan if x.is_floating_point() else 255)

        k, v, bias = self.steady
        is_free, is_empty = bias[:, :, 0].isinf(), self.index.sizes == 0
        steady = poison(k, is_free), poison(v, is_free), bias
        centroids, means, sizes, offsets, spreads, scales = self.index
        index = Index(poison(centroids, is_empty), poison(means, is_empty), sizes,
                      offsets.masked_fill(is_empty, 2**40), spreads.masked_fill(is_empty, math.nan),
                      poison(scales, is_empty))
        stores = [poison(x, self.is_free_row) for x in self.stores]
        budget = self.budget._replace(n_retrieve=self.budget.n_retrieve.to(DEVICE),
                                      n_ranked=self.budget.n_ranked.to(DEVICE))
        steady, index, stores = ([x.to(DEVICE) for x in xs] for xs in (steady, index, stores))
        return kernels.attend(self.q.to(DEVICE), steady, Index(*index), budget, stores).cpu()

    def truth(self):
        """(B, H, G, D) in float64: every head a loop over its clusters in order of rank."""
        o = torch.zeros(self.q.shape, dtype=torch.float64)
        for b in range(self.q.shape[0]):
            for h in range(self.q.shape[1]):
                o[b, h] = self.head(b, h)
        return o

    def head(self, b, h):
        """(G, D) in float64."""
        q = self.q[b, h].double() * self.q.shape[-1] ** -0.5
        k_s, v_s, bias = (x[b, h].double() for x in self.steady)
        k_all, v_all = (x[b, h].double() for x in self.stores)
        scales = self.index.scales[b, h].double()
        centroids, means = (
            scales[:, i, None] * torch.cat(retroinfer.halves(x), -1)[b, h]
            if x.dtype == torch.uint8 else x[b, h].double() for i, x in enumerate(self.index[:2]))
        sizes, offsets = (x[b, h].long().tolist() for x in self.index[2:4])
        live = [c for c, n in enumerate(sizes) if n]
        logits = q @ centroids[live].T                                              # (G, live)
        half = q.square().sum(-1, keepdim=True) / 2                                 # (G, 1)
        worth = {c: sizes[c] * (1 + half * self.index.spreads[b, h, c].double()) for c in live}
        mass = logits + torch.cat([half[:, :0], *worth.values()], -1).log()
        near = q @ k_s[bias[0] == 0].T
        share = torch.cat([mass, near], -1) if self.budget.by_mass else logits
        share = share.softmax(-1).sum(0)[:len(live)]
        rank = [live[i] for i in share.argsort(descending=True).tolist()]
        n_retrieve, n_ranked = int(self.budget.n_retrieve[b]), int(self.budget.n_ranked[b])
        is_in = bias[0] == 0
        k, v, room = [k_s[is_in]], [v_s[is_in]], self.budget.tokens
        bias = [torch.zeros(len(q), int(is_in.sum()), dtype=q.dtype)]               # (G, ...) each
        for i, c in enumerate(rank[:n_ranked]):
            span = slice(offsets[c], offsets[c] + sizes[c])
            room = room - sizes[c] if i < n_retrieve and sizes[c] <= room else -1
            one = centroids[c:c + 1], means[c:c + 1], worth[c].log()
            for all_, x in zip((k, v, bias), one if room < 0 else
                               (k_all[span], v_all[span], q.new_zeros(len(q), sizes[c])),
                               strict=True):
                all_.append(x)
        return (q @ torch.cat(k).T + torch.cat(bias, -1)).softmax(-1) @ torch.cat(v)


# (B, H, G, D, W, C), (N, R, R+E), then of each sequence: (retrieved, ranked), (steady, clusters)
CASES = {
    "plain": ((1, 2, 4, 64, 40, 90), (64, 12, 60), [(12, 60)], [(40, 90)]),
    "three queries, 80 dims": ((1, 2, 3, 80, 37, 53), (50, 7, 33), [(7, 33)], [(36, 53)]),
    "one query, 96 dims": ((1, 1, 1, 96, 65, 130), (70, 20, 129), [(20, 129)], [(1, 130)]),
    "twenty queries": ((1, 1, 20, 64, 16, 40), (30, 5, 20), [(5, 20)], [(16, 40)]),
    "256 dims": ((1, 1, 2, 256, 20, 30), (30, 4, 20), [(4, 20)], [(20, 30)]),
    "ragged": ((3, 1, 3, 16, 40, 60), (64, 20, 50), [(3, 9), (20, 50), (1, 1)],
               [(40, 60), (7, 44), (1, 2)]),
    "no index yet": ((2, 1, 2, 16, 33, 20), (32, 4, 16), [(4, 16)] * 2, [(33, 0), (1, 20)]),
    "one token": ((1, 1, 1, 16, 1, 1), (16, 1, 1), [(1, 1)], [(1, 0)]),
    "one cluster": ((1, 1, 3, 16, 5, 1), (16, 1, 1), [(1, 1)], [(0, 1)]),
    "none retrieved": ((1, 2, 2, 32, 8, 70), (64, 8, 70), [(0, 70)], [(8, 70)]),
    "no room": ((1, 2, 2, 32, 8, 70), (16, 40, 70), [(40, 70)], [(8, 70)]),
    "many clusters": ((1, 1, 2, 16, 4, 300), (1310, 295, 300), [(295, 300)], [(4, 300)]),
    "all retrieved": ((1, 2, 2, 32, 8, 70), (640, 70, 70), [(70, 70)], [(8, 70)]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_as_exact_as_pytorch(name, dtype):
    case = Case(*CASES[name], dtype)
    assert_as_exact(case.kernel(), case.eager(), case.truth())


@pytest.mark.parametrize("name", ["plain", "ragged", "no index yet", "no room"])
def test_a_step_ranked_as_in_the_paper_is_as_exact_as_pytorch(name):
    case = Case(*CASES[name], bits=16)
    assert_as_exact(case.kernel(), case.eager(), case.truth())


def test_the_two_rankings_differ():
    case = Case(*CASES["plain"])
    by_mass = case.truth()
    case.budget = case.budget._replace(by_mass=False)
    assert (by_mass - case.truth()).abs().max() > 0.01


@pytest.mark.parametrize("largest, tokens", [(300, 64), (300, 301), (1, 8)])
def test_clusters_of_any_size_are_read_or_estimated(largest, tokens):
    """Giants before any split: all too large, one or two that fit; and single tokens."""
    case = Case((1, 2, 2, 16, 4, 12), (tokens, 9, 11), [(9, 11)], [(4, 12)], largest=largest)
    assert_as_exact(case.kernel(), case.eager(), case.truth())


def test_a_sequence_with_nothing_to_attend_harms_no_other():
    """NaN for it, as a softmax over nothing has it, and for it alone."""
    case = Case((2, 1, 2, 16, 8, 20), (32, 4, 12), [(4, 12)] * 2, [(0, 0), (8, 20)])
    mine = case.kernel()
    assert mine[0].isnan().all() and case.eager()[0].isnan().all()
    assert_as_exact(mine[1], case.eager()[1], case.truth()[1])


@pytest.mark.parametrize("n_programs", [1, 3, 1000])
def test_the_number_of_splits_changes_nothing_but_rounding(n_programs, monkeypatch):
    case = Case(*CASES["ragged"])
    monkeypatch.setattr(kernels, "programs", lambda device: n_programs)
    torch.testing.assert_close(case.kernel(), case.eager(), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(kernels.IS_COMPILED, reason="the interpreter counts")
def test_the_docstring_counts_the_bytes_of_each_kernel(monkeypatch):
    """Its formulas, with every slot live and every share used, are what is loaded and stored."""
    B, H, G, D, W, C, R, E, S, size, e = 1, 2, 3, 64, 40, 96, 10, 20, 3, 4, 4
    N = R * size
    monkeypatch.setattr(kernels, "splits", lambda device, heads, n_tiles: S)
    case = Case((B, H, G, D, W, C), (N, R, R + E), [(R, R + E)], [(W, C)])
    sizes = torch.full((B, H, C), float(size))
    offsets = torch.arange(C).expand(B, H, C) * size
    case.index = case.index._replace(sizes=sizes, offsets=offsets)
    case.stores = [torch.randn(B, H, C * size, D) for _ in range(2)]
    with footprint.counted() as moved:
        kernels.attend(case.q, case.steady, case.index, case.budget, case.stores)
    ledger = re.findall(r"^    (\w+) +(.+) read, (.+) written$", kernels.__doc__, re.M)
    assert {f"{name}_kernel" for name, *_ in ledger} == set(moved)
    names = {name: x for name, x in locals().items() if len(name) == 1}
    for name, *formulas in ledger:
        assert moved[f"{name}_kernel"] == [B * H * eval(x, {}, names) for x in formulas], name


def test_tensors_of_two_dtypes_are_refused():
    case = Case(*CASES["one token"])
    case.q = case.q.half()
    with pytest.raises(ValueError, match=r"float16.*float32.*cast to one"):
        case.kernel()


def test_inductor_compiles_the_step_as_one_graph(monkeypatch):
    case = Case(*CASES["three queries, 80 dims"])
    expected = case.kernel()
    fast = torch.compile(kernels.attend, fullgraph=True, dynamic=False)
    monkeypatch.setattr(kernels, "attend", fast)
    assert torch.equal(case.kernel(), expected)


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


def test_decode_with_kernels_compiles_whole_and_never_again():
    torch._dynamo.reset()
    q, k, v = (x.to(DEVICE) for x in qkv(60))
    counter = torch._dynamo.testing.CompileCounter()
    wave = WaveIndex(RetroConfig(**TINY), 60, hot=kernels)
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


@pytest.mark.parametrize("op", ["attend", "nearest", "segment_sum", "copy_rows"])
def test_operators_pass_opcheck(op):
    case = Case(*CASES["one token"])
    x, ids = case.q.to(DEVICE), torch.zeros(1, 1, 1, dtype=torch.int64, device=DEVICE)
    steady, index, stores = ([x.to(DEVICE) for x in xs]
                             for xs in (case.steady, case.index, case.stores))
    shares = [n.to(DEVICE) for n in case.budget[3:5]]
    args = {"attend": (x, steady, index, stores, shares, list(case.budget[:3]), True),
            "nearest": (x, x), "segment_sum": (x, ids, ids + 1), "copy_rows": (x, x, ids)}[op]
    torch.library.opcheck(getattr(kernels, f"{op}_op"), args)


def test_the_benchmark_runs_dry(tmp_path):
    """Tiny and without a clock: every runner and kernel, the check against float64, the files."""
    done = subprocess.run([sys.executable, "bench_gpu.py", "--dry-run", "--out", tmp_path],
                          cwd=Path(kernels.__file__).parent, capture_output=True, text=True,
                          env=os.environ | ({"TRITON_INTERPRET": "1"} if DEVICE == "cpu" else {}),
                          check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "gpu.json").read_text())
    assert [cell["model"] for cell in facts["cells"]] == ["Llama-3-8B", "Qwen2.5-7B"]
    for cell in facts["cells"]:
        assert {"kernels", "SDPA, grouped", "SDPA, flash"} <= set(cell["ms"])
        assert set(cell["kernels"]) == {"rank", "weigh", "pack", "attend", "combine"}
    assert "Llama-3-8B" in (tmp_path / "gpu.md").read_text() and (tmp_path / "gpu.png").exists()


def test_without_a_gpu_the_benchmark_says_so():
    done = subprocess.run([sys.executable, "bench_gpu.py"], cwd=Path(kernels.__file__).parent,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True,
                          text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "bench_gpu: a CUDA GPU is needed, and torch finds none\n"


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


# ---------------------------------------------------------------- machine code

@pytest.fixture(scope="module", autouse=True)
def compilers():
    """Processes that compile every kernel for a target each, begun before the first test."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(kernels.__file__).with_name("footprint.py")
    yield (running := {n: subprocess.Popen([sys.executable, script, str(n)], env=env, text=True,
                                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                       for n in CAPABILITIES})
    for process in running.values():
        process.kill()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles_within_a_gpus_limits(compilers, capability):
    out, err = compilers[capability].communicate()
    assert not compilers[capability].returncode, err
    found = [json.loads(line) for line in out.splitlines()]
    names = {f.__name__ for f in vars(kernels).values() if hasattr(f, "arg_names")}
    assert {facts["kernel"] for facts in found} == names - {"absorb", "grow"}
    for facts in found:
        is_huge = facts.get("BG", 0) * facts.get("BD", 0) * (facts["dtype"] == "fp32") > 8192
        assert facts["shared"] <= (163 if is_huge else 99) * 1024, facts    # of sm_80, of sm_86 too
        assert facts["registers"] <= 255, facts
        must_not = facts["kernel"] == "attend_kernel" and facts["dtype"] != "fp32"
        assert facts["spilled"] <= (0 if must_not and facts["D"] == 128 else 16), facts
