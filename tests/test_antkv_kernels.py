"""The Triton twins in antkv.py: interpreted against PyTorch, and compiled for real targets."""
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from steps import assert_as_exact, qkv, random_book, read

import antkv
from antkv import AnchorCache, AnchorConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def kernels():
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")   # Triton loads parts of itself when they run
        import antkv_kernels
        yield antkv_kernels


def step(bits, share, T, D=32, G=3, B=2):
    """What antkv.attend takes, of a cache that holds T tokens."""
    q, k, v = qkv(T + 1, B=B, G=G, D=D)
    config = AnchorConfig(bits, share, sink=2, window=8, update=16)
    cache = AnchorCache(config, T + 1, B, random_book(bits, D=D))
    read(cache, *(x[:, :, :T] for x in (q, k, v)))
    cache.update()
    live = torch.arange(cache.k_steady.shape[2]) < (cache.n_tokens - cache.n_indexed)[:, None]
    bias = torch.zeros_like(live, dtype=torch.float32).masked_fill(~live, -math.inf)
    steady = cache.k_steady, cache.v_steady, bias[:, None, None].expand(-1, 2, -1, -1)
    return q[:, :, T].unflatten(1, (2, G)), steady, cache.past(), cache.book


@pytest.mark.parametrize("bits, share, T, D, G", [
    (4, 0.05, 90, 32, 3), (2, 0, 70, 32, 1), (1, 0.1, 200, 24, 4), (0.375, 1, 50, 32, 3),
    (1, 0.1, 6, 32, 3)])
def test_attention_from_codes_is_that_of_pytorch(kernels, bits, share, T, D, G):
    """Nothing has a code in the last case: all splits are empty."""
    args = step(bits, share, T, D, G)
    for mine, want in zip(kernels.attend(*args), antkv.attend(*args), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tiles", [1, 3])
def test_the_number_of_splits_changes_nothing_but_rounding(kernels, monkeypatch, tiles):
    args = step(2, 0.05, 250)
    want = kernels.attend(*args)[0]
    monkeypatch.setattr(kernels, "SPLITS", tiles)
    torch.testing.assert_close(kernels.attend(*args)[0], want, rtol=1e-4, atol=1e-5)


def test_each_sequence_may_have_a_codebook_of_its_own(kernels):
    q, steady, past, book = step(2, 0.05, 90)
    other = random_book(2, D=32, seed=1)
    both = antkv.Codebook(*(torch.cat(x) for x in zip(book, other, strict=True)))
    torch.testing.assert_close(kernels.attend(q, steady, past, both)[0],
                               antkv.attend(q, steady, past, both)[0], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the attention a token receives

@pytest.fixture
def poison():
    """What torch.empty hands out is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def received(q, k, first):
    """The scores in float64, by the backward pass of attention: dV = Aᵀ dO, with dO of ones."""
    H, T, Tq = *k.shape[1:3], q.shape[2]
    v = torch.zeros(1, H, 1, T, 1, dtype=torch.float64, requires_grad=True)
    seen = torch.ones(Tq, T, dtype=torch.bool).tril(T - Tq)
    rows = q.double().unflatten(1, (H, -1))                                 # (1, H, G, Tq, D)
    o = torch.nn.functional.scaled_dot_product_attention(rows, k.double()[:, :, None], v, seen)
    o.sum().backward()
    return v.grad[0, :, 0, first:, 0]


# T, Tq, first, G, D: whole texts, then chunks that begin later, of whose columns some are wanted.
SCORES = [(150, 150, 0, 3, 64), (129, 129, 5, 1, 128), (1, 1, 0, 2, 32), (64, 64, 0, 4, 80),
          (200, 70, 130, 4, 64), (260, 33, 2, 3, 24), (190, 1, 189, 8, 16), (140, 128, 77, 2, 256)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("T, Tq, first, G, D", SCORES)
def test_scores_are_as_exact_as_those_of_pytorch(kernels, poison, T, Tq, first, G, D, dtype):
    q, k, _ = (x.to(dtype) for x in qkv(T, G=G, D=D))
    q = q[:, :, T - Tq:]
    mine, plain = (scores(q, k, first) for scores in (kernels.anchor_scores, antkv.anchor_scores))
    assert mine.shape == (2, T - first) and mine.dtype == torch.float32
    torch.testing.assert_close(mine, plain, rtol=1e-5, atol=2e-5)
    assert_as_exact(mine, plain, received(q, k, first))


def test_loud_logits_make_scores_that_sum_to_the_number_of_queries(kernels):
    """Where exponentials without their row's maximum would overflow."""
    q, k, _ = qkv(90, G=2, D=32)
    scores = kernels.anchor_scores(200 * q, k)
    torch.testing.assert_close(scores.sum(1), torch.full((2,), 2.0 * 90))


def test_a_gpu_takes_the_twins_and_a_cpu_pytorch(kernels):
    for plain in (antkv.attend, antkv.anchor_scores):
        assert antkv.twin(plain, torch.device("cpu")) is plain
        assert antkv.twin(plain, torch.device("cuda")) is getattr(kernels, plain.__name__)


def test_a_cache_that_scores_by_the_kernel_keeps_the_same_anchors(kernels, monkeypatch):
    """A prompt in chunks, the first as long as the window."""
    q, k, v = qkv(90)
    caches = [AnchorCache(AnchorConfig(2, 0.1, sink=2, window=8, update=16), 90, 1,
                          random_book(2)) for _ in range(2)]
    for cache, scores in zip(caches, (antkv.anchor_scores, kernels.anchor_scores), strict=True):
        monkeypatch.setattr(antkv, "anchor_scores", scores)
        for start, end in ((0, 8), (8, 60), (60, 90)):
            cache.prefill(*(x[:, :, start:end] for x in (q, k, v)))
    mine, other = caches
    assert int(mine.n_anchors) == 8 and torch.equal(mine.anchors, other.anchors)


# ---------------------------------------------------------------- machine code

COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import antkv_kernels as kernels
names = kernels.attend_codes.arg_names
for capability in (80, 90, 100):
    for D, G, CK, CV in ((64, 3, 8, 8), (128, 4, 8, 8), (128, 4, 2, 2), (128, 8, 16, 32)):
        BG, BD = kernels.tile_sizes(G, D)
        given = {"D": D, "G": G, "CK": CK, "CV": CV, "BG": BG, "BD": BD, "BN": kernels.BN}
        kinds = ["*fp32", "*u8", "*u8", "*fp16", "*fp16", "*u8", "*fp32", "*fp32"] + 3 * ["i32"]
        kinds += len(given) * ["constexpr"]
        source = ASTSource(kernels.attend_codes, dict(zip(names, kinds, strict=True)), given)
        done = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert done.asm["cubin"] and done.metadata.shared <= 99 * 1024, done.metadata.shared
"""


COMPILE_SCORES = """
import torch
import antkv_kernels as kernels
from bench.footprint import compile_one, source
sums = torch.empty(1)
for dtype, D in ((torch.bfloat16, 64), (torch.bfloat16, 80), (torch.bfloat16, 128),
                 (torch.bfloat16, 256), (torch.float16, 128), (torch.float32, 64),
                 (torch.float32, 128), (torch.float32, 256)):
    x, (BD, BT) = torch.empty(1, dtype=dtype), kernels.score_tile(dtype, D)
    for kernel, args in ((kernels.sum_rows, (x, x, sums, 8191, 131072, 4)),
                         (kernels.sum_columns, (x, x, sums, sums, 8191, 131072, 4, 68))):
        code, options = source(kernel, args, {"D": D, "BD": BD, "BT": BT})
        for capability in (80, 90, 100):
            facts = compile_one(code, options, capability)
            assert facts["shared"] <= 99 * 1024 and not facts["spilled"], (dtype, D, facts)
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", [COMPILE, COMPILE_SCORES], ids=["attention", "scores"])
def test_the_kernels_compile_for_real_targets(program):
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
