"""What a device asks of the code, held without one: no float64 where there is none, no mask as
large as the text, sums that do not depend on their order, and no memory that is used no more."""
import weakref
from unittest import mock

import pytest
import torch
from steps import SMALL, qkv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import retroinfer
from app.plan import plan
from buffer import WaveBuffer, pinned_blocks, plain
from generate import sampler
from retroinfer import RetroConfig, WaveIndex, attend_causally, round_up


class NoFloat64(TorchDispatchMode):
    """Refuses float64 as MPS does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
                raise TypeError(f"{function} makes float64")
        return out


def test_a_device_without_float64_reads_decodes_indexes_and_counts(monkeypatch):
    monkeypatch.setattr(retroinfer, "widest", lambda device: torch.float32)
    q, k, v = qkv(300)
    wave, other = (WaveIndex(RetroConfig(**SMALL), 300) for _ in range(2))
    with NoFloat64():
        wave.prefill(*(x[:, :, :200] for x in (q, k, v)))
        room = 0
        for t in range(200, 300):
            room = (room or wave.update()) - 1
            wave.decode(*(x[:, :, t:t + 1] for x in (q, k, v)))
        assert wave.facts()["bytes_read"] > 0
        other.restore(wave.state(0))
    assert other.n_indexed > 200 and retroinfer.widest(torch.device("mps")) == torch.float32


def test_a_draw_makes_float64_on_the_host_alone():
    logits = mock.Mock(spec=["cpu", "device"], device=torch.device("cpu"))
    logits.cpu.return_value = torch.tensor([[0., 9., 0.]])
    assert sampler(temperature=0.1)(logits) == 1


def test_a_mask_of_a_device_takes_no_memory(monkeypatch):
    """And says the same: a query sees its own past, the last one all."""
    attend = mock.Mock()
    monkeypatch.setattr(retroinfer.F, "scaled_dot_product_attention", attend)
    q, k = torch.empty(1, 2, 3, 8, device="meta"), torch.empty(1, 2, 5, 8, device="meta")
    attend_causally(q, k, k)
    mask = attend.call_args.args[3]
    assert mask.nbytes < 100
    assert mask._materialize().equal(torch.ones(3, 5, dtype=torch.bool).tril(2))


@pytest.mark.parametrize("values", [0.0, 0.3])
def test_what_is_left_to_a_mean_does_not_depend_on_the_order_of_sums(values):
    """A GPU adds with atomics, in another order every time."""
    g = torch.Generator().manual_seed(0)
    config = RetroConfig(values=values)
    sizes = torch.tensor([[[40, 1, 25, 62]]])
    ends, N = sizes.cumsum(-1), 128
    w_r, v_r = torch.rand(1, 1, 3, N, generator=g) / 300, torch.randn(1, 1, N, 8, generator=g)
    w_e = torch.rand(1, 1, 3, 9, generator=g) / 300
    budget = retroinfer.Budget(None, None, values, 4, 9, N)

    def left(order):
        return retroinfer.share_values(w_r[..., order], v_r[:, :, order], w_e, ends, budget,
                                       config.method())[2]

    starts = [0, 40, 41, 66]
    orders = [torch.cat([torch.randperm(n, generator=g) + s for s, n in zip(
        starts, sizes.flatten().tolist(), strict=True)]) for _ in range(9)]
    first = left(torch.arange(N))
    assert all(left(order).equal(first) for order in orders)
    if not values:
        truth = torch.stack([part.double().sum(-1) for part in w_r.split([40, 1, 25, 62], -1)], -1)
        torch.testing.assert_close((first - w_e)[..., :4].double(), truth, rtol=0, atol=1e-7)


# ---------------------------------------------------------------- the wave buffer's memory

@pytest.mark.parametrize("n, nbytes", [(64, 272 << 20), (64, 256 << 20), (160, 3 << 20),
                                       (2, 5), (1, 7), (3, 1)])
def test_pinned_memory_holds_a_store_in_few_blocks(n, nbytes):
    """Each a power of two, so that none is rounded up; of a whole model 7 % go unused at most."""
    sizes = list(pinned_blocks(n, nbytes))
    assert all(size & (size - 1) == 0 for size in sizes) and len(sizes) < 12
    assert sum(size // nbytes for size in sizes) >= n
    assert n < 60 or sum(sizes) <= 1.07 * n * nbytes


def test_tensors_of_one_block_do_not_overlap(monkeypatch):
    made, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda n, pin_memory, **how: made.append(n) or empty(
        n, **how))
    tensors = plain(7, 48, is_pinned=True)
    for i, x in enumerate(tensors):
        x.fill_(i)
    assert made == [256, 64, 64] and len(tensors) == 7
    assert all(x.shape == (48,) and (x == i).all() for i, x in enumerate(tensors))


def test_a_plan_counts_pinned_memory_as_torch_takes_it():
    from app.plan import GIB, Run, shape
    run = Run(shape("Llama-3.1-8B"), capacity=139264, chunk=2048, cache_ratio=0.05)
    there, on_cpu = (plan(x).host["store"] / GIB for x in (run, Run(**vars(run) | {
        "is_cpu": True})))
    assert on_cpu == 17 and 17 < there <= 17.5


def test_what_went_back_to_the_host_is_not_held():
    """The last layer's keys and values would be held until the next prefill."""
    wave = WaveIndex(RetroConfig(**SMALL), 100, make_store=WaveBuffer)
    wave.allocate(torch.zeros(1, 2, 0, 8))
    wave.store.is_near = False                      # as where the store is on another device
    k = torch.ones(1, 2, round_up(50), 8)
    held = weakref.ref(k)
    wave.store.put(0, 0, k, k)
    del k
    assert held() is None and wave.store.k[0, 0, 0, 0] == 1
