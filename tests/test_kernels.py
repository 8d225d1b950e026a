"""The Triton twins are as exact as PyTorch, on a GPU or interpreted, and compile for real GPUs.

Without a GPU conftest.py imports Triton as its interpreter. aot.py makes machine code in processes
of its own, while the other tests run.
"""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from test_wave_index import ALL, SMALL, config_budget, qkv, read

kernels = pytest.importorskip("kernels", reason="needs Triton")
import buffer  # noqa: E402
import retroinfer  # noqa: E402
from retroinfer import Budget, Index, RetroConfig, WaveIndex, before  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
CAPABILITIES = (80, 90, 100)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What torch.empty hands out is NaN, or the largest integer, in every test of this file."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")     # Triton loads parts of itself when they run
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_as_exact(mine, eager, truth):
    """The error to float64 is at most twice that of PyTorch."""
    mine, eager = (((x.double().cpu() - truth).abs().max().item()) for x in (mine, eager))
    assert mine <= 2 * eager + 1e-6, (mine, eager)


# ---------------------------------------------------------------- a decode step

class Case:
    """A step over random clusters that lie anywhere in the store, and its PyTorch and float64.

    shares (B, 2): clusters each sequence retrieves, retrieves or estimates. lives (B, 2): steady
    slots and clusters it has. Everything else is NaN, or an offset far outside the store.
    """

    def __init__(self, shape, caps, shares, lives, dtype=torch.float32, largest=9, seed=0):
        B, H, G, D, W, C = shape
        g = torch.Generator().manual_seed(seed)

        def randn(*size):
            return torch.randn(B, H, *size, D, generator=g).to(dtype)

        sizes = torch.randint(0, largest + 1, (B, H, C), generator=g)
        sizes *= torch.arange(C) < torch.tensor(lives)[:, 1, None, None]
        order = torch.rand(B, H, C, generator=g).argsort(-1)            # how they lie in the store
        ends = sizes.gather(-1, order).cumsum(-1)
        offsets = torch.empty_like(sizes).scatter_(-1, order, before(ends) + 3)
        T = int(sizes.sum(-1).max()) + 7
        self.q, self.budget = 2 * randn(G), Budget(*caps, *torch.tensor(shares).T.contiguous())
        is_free = torch.arange(W) >= torch.tensor(lives)[:, :1]                     # (B, W)
        bias = torch.zeros(B, W).masked_fill(is_free, -math.inf)[:, None, None].expand(B, H, 1, W)
        self.steady = randn(W), randn(W), bias
        self.stores = randn(T), randn(T)
        self.index = Index(randn(C), randn(C), sizes.float(), offsets)
        row = torch.arange(T).expand(B, H, T)
        self.is_free_row = (row < 3) | (row >= 3 + ends[..., -1:])

    def eager(self):
        """PyTorch's answer."""
        return retroinfer.attend(self.q, self.steady, self.index, self.budget, self.stores)

    def kernel(self):
        """The kernels' answer, with all that is free poisoned."""
        def poison(x, is_free):
            return x.masked_fill(is_free[..., None], math.nan)

        k, v, bias = self.steady
        is_free, is_empty = bias[:, :, 0].isinf(), self.index.sizes == 0
        steady = poison(k, is_free), poison(v, is_free), bias
        centroids, means, sizes, offsets = self.index
        index = Index(poison(centroids, is_empty), poison(means, is_empty), sizes,
                      offsets.masked_fill(is_empty, 2**40))
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
        centroids, means = (x[b, h].double() for x in self.index[:2])
        sizes, offsets = (x[b, h].long().tolist() for x in self.index[2:])
        live = [c for c, n in enumerate(sizes) if n]
        weight = (q @ centroids[live].T).softmax(-1).sum(0)
        rank = [live[i] for i in weight.argsort(descending=True).tolist()]
        n_retrieve, n_ranked = int(self.budget.n_retrieve[b]), int(self.budget.n_ranked[b])
        is_in = bias[0] == 0
        k, v, bias, room = [k_s[is_in]], [v_s[is_in]], [bias[0, is_in]], self.budget.tokens
        for i, c in enumerate(rank[:n_ranked]):
            span = slice(offsets[c], offsets[c] + sizes[c])
            room = room - sizes[c] if i < n_retrieve and sizes[c] <= room else -1
            one = centroids[c:c + 1], means[c:c + 1], k_s.new_full((1,), math.log(sizes[c]))
            for all_, x in zip((k, v, bias), one if room < 0 else
                               (k_all[span], v_all[span], k_s.new_zeros(sizes[c])), strict=True):
                all_.append(x)
        return (q @ torch.cat(k).T + torch.cat(bias)).softmax(-1) @ torch.cat(v)


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


def test_tensors_of_two_dtypes_are_refused():
    case = Case(*CASES["one token"])
    case.q = case.q.half()
    with pytest.raises(ValueError, match=r"float16.*float32.*cast to one"):
        case.kernel()


def test_the_step_is_one_graph():
    case = Case(*CASES["three queries, 80 dims"])
    expected = case.kernel()
    fast = torch.compile(kernels.attend, backend="aot_eager", fullgraph=True, dynamic=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "attend", fast)
        assert torch.equal(case.kernel(), expected)


# ---------------------------------------------------------------- building the index

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
    shares = [n.to(DEVICE) for n in case.budget[3:]]
    args = {"attend": (x, steady, index, stores, shares, list(case.budget[:3])),
            "nearest": (x, x), "segment_sum": (x, ids, ids + 1), "copy_rows": (x, x, ids)}[op]
    torch.library.opcheck(getattr(kernels, f"{op}_op"), args)


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
    script = Path(__file__).with_name("aot.py")
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
    names = {f.__name__ for f in vars(kernels).values() if hasattr(f, "arg_names")} - {"absorb"}
    assert {facts["kernel"] for facts in found} == names
    for facts in found:
        assert facts["shared"] <= 99 * 1024, facts              # of sm_86, sm_89 and sm_120 too
        assert facts["registers"] <= 255, facts
        if facts["kernel"] == "attend_kernel" and facts["shape"][-1] == 128:
            assert facts["spilled"] == 0, facts                 # in bfloat16 and float16
