"""The Triton twin of antkv.attend: interpreted against PyTorch, and compiled for real targets."""
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from steps import qkv, random_book, read

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


@pytest.mark.slow
def test_the_kernel_compiles_for_real_targets():
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=env, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
