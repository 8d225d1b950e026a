"""What the wave index loses if its store is in a few bits: the rounding, and its limits."""
import pytest
import torch
from steps import SMALL, generated, qkv

from evaluation import residuals
from evaluation.fidelity import Watched
from evaluation.residuals import Kind, Rounded
from retroinfer import RetroConfig

CONFIG = RetroConfig(**SMALL | {"retrieve": 0.5, "estimate": 0.3})


def outputs(kind):
    q, k, v = qkv(200, D=32)
    cache = Rounded(kind, CONFIG, 200, 1) if kind else Watched(CONFIG, 200, 1)
    return generated(cache, q, k, v, 190)[:, :, 190:]


@pytest.mark.parametrize("bits, most", [(8, 0.01), (4, 0.12), (2, 0.4), (1, 0.65)])
def test_a_row_of_normal_numbers_loses_what_theory_says(bits, most):
    """The best uniform levels of 4, 2 and 1 bits leave .0115, .119 and .363 of the energy."""
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    back = residuals.rounded(x, bits)
    assert (back - x).norm() < most * x.norm()
    assert all(len(row.unique()) <= 2**bits for row in back)


def test_a_store_of_16_bits_is_the_wave_index():
    assert torch.equal(outputs(Kind(16)), outputs(None))


def test_fewer_bits_lose_more_and_signs_lie_between():
    want, error = outputs(None), {}
    for kind in (Kind(8), Kind(8, full=0.5), Kind(4), Kind(2), Kind(2, is_residual=False)):
        error[kind] = float((outputs(kind) - want).norm() / want.norm())
    assert 0 < error[Kind(8)] < error[Kind(4)] < error[Kind(2)] < 0.5
    assert error[Kind(8)] < error[Kind(8, full=0.5)]
    assert error[Kind(2)] < error[Kind(2, is_residual=False)]


def test_bytes_of_a_retrieved_token_are_counted():
    """Of 64 dims: a key and a fifth of a value; in 8 bits, with 16 of a scale; with signs."""
    assert residuals.row_cost(Kind(16), 64, 0.2) == pytest.approx(1.2)
    assert residuals.row_cost(Kind(8), 64, 0.2) == pytest.approx(1.2 * (512 + 16) / 1024)
    signs = residuals.row_cost(Kind(8, full=0.5), 64, 0.2)
    assert signs == pytest.approx((80 + 0.7 * (512 + 16)) / 1024)
