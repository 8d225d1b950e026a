"""The seam: every cache, given everything to read, does what dense attention does, on any backend.
"""
import math

import oracle
import pytest
import torch
from steps import ALL, EVERYTHING, SMALL, qkv, random_book, read

import retroinfer
from antkv import AnchorCache, AnchorConfig
from app.plan import ByteCounter
from model import DenseCache
from retrieval_attention import GraphCache, GraphConfig
from retroinfer import RetroConfig, WaveIndex, attend_causally

ANCHORS = AnchorConfig(bits=2, anchors=1.0, sink=2, window=4, update=32)
CACHES = {"dense": DenseCache,
          "wave": lambda *shape: WaveIndex(RetroConfig(**SMALL, **ALL), *shape),
          "graph": lambda *shape: GraphCache(GraphConfig(**EVERYTHING), *shape),
          "qcivf": lambda *shape: GraphCache(GraphConfig("qcivf", **EVERYTHING), *shape),
          "anchor": lambda *shape: AnchorCache(ANCHORS, *shape, book=random_book(ANCHORS.bits))}


CHUNKS = [[90], [1] * 8 + [82], [45, 45], [40, 1, 49], [7] * 12 + [6]]
QUICK = [*((name, "eager") for name in CACHES), ("wave", "native")]
TRACED = [(name, "compiled") for name in CACHES]


@pytest.fixture(params=CACHES, ids=str)
def make(request):
    return CACHES[request.param]


@pytest.mark.parametrize("make, backend, chunks", [
    *((*where, chunks) for chunks in CHUNKS for where in QUICK),
    *((*where, [40, 1, 49]) for where in TRACED),
    pytest.param("graph", "inductor", [40, 1, 49], marks=pytest.mark.slow),
    pytest.param("wave", "kernels", [40, 1, 49], marks=pytest.mark.slow)],
    indirect=["make", "backend"], ids=str)
def test_chunks_attend_exactly_to_all_before(make, backend, chunks):
    q, k, v = qkv(96, B=2)
    cache, outputs, start = make(96, 2), [], 0
    for n in chunks:
        outputs.append(read(cache, *(x[:, :, start:start + n] for x in (q, k, v))))
        start += n
    for t in range(start, 96):
        cache.update()
        outputs.append(cache.decode(*(x[:, :, t:t + 1] for x in (q, k, v))))
    torch.testing.assert_close(torch.cat(outputs, 2).double(), oracle.dense(q, k, v),
                               rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make, backend", QUICK + TRACED, indirect=True)
def test_turns_go_on_where_decoding_stopped(make, backend):
    q, k, v = qkv(200)
    cache, outputs, t = make(200), [], 0
    for n_read, n_said in ((60, 40), (3, 45), (50, 2)):
        outputs.append(cache.prefill(*(x[:, :, t:t + n_read] for x in (q, k, v))))
        t += n_read
        for _ in range(n_said):
            cache.update()
            outputs.append(cache.decode(*(x[:, :, t:t + 1] for x in (q, k, v))))
            t += 1
    torch.testing.assert_close(torch.cat(outputs, 2).double(), oracle.dense(q, k, v),
                               rtol=1e-4, atol=1e-5)


def test_update_tells_how_many_steps_fit(make):
    q, k, v = qkv(64)
    cache = make(64)
    cache.prefill(q[:, :, :50], k[:, :, :50], v[:, :, :50])
    room = cache.update()
    assert 0 < room <= 14
    for t in range(50, 50 + room):
        cache.decode(q[:, :, t:t + 1], k[:, :, t:t + 1], v[:, :, t:t + 1])


def test_rows_of_a_batch_do_not_mix(make):
    q, k, v = qkv(80, B=3)
    together, alone = make(80, 3), make(80)
    o = read(together, q, k, v)
    torch.testing.assert_close(alone.prefill(q[1:2], k[1:2], v[1:2]), o[1:2])


def test_bytes_read_are_those_of_the_tensors():
    q, k, v = qkv(2000)
    config = RetroConfig(**SMALL, retrieve=0.02, estimate=0.2)
    dense, wave = DenseCache(2000), WaveIndex(config, 2000)
    for cache in (dense, wave):
        cache.prefill(q, k, v)
    assert dense.bytes_read() == 2 * 2 * 2000 * 16 * 4              # K and V, 2 heads, fp32
    wave.update()
    W, C, (R, ranked) = wave.k_steady.shape[2], wave.index.sizes.shape[2], (10, 109)    # of 496
    expected = 0
    for sizes in wave.index.sizes[0].int().tolist():                # of a head: the 10 largest
        n = sum(sorted(sizes)[-R:])
        exact = (2 * W + n + math.ceil(n / 5)) * 16 * 4             # of a fifth of them the values
        vectors, numbers = (C + ranked) * 16 // 2, 8 * C + 8 * R
        expected += exact + vectors + numbers + 2 * ranked
    assert wave.bytes_read() == expected
    assert wave.bytes_read() < dense.bytes_read() / 2


@pytest.mark.parametrize("rows", [1, 7, 40, 1000])
def test_queries_are_masked_in_parts_of_any_size(monkeypatch, rows):
    q, k, v = qkv(200)
    monkeypatch.setattr(retroinfer, "MASK", rows * 200)
    mine = attend_causally(q[:, :, 130:], k, v)
    torch.testing.assert_close(mine.double(), oracle.dense(q, k, v)[:, :, 130:], rtol=1e-4,
                               atol=1e-5)


def test_the_memory_of_a_mask_does_not_grow_with_the_text():
    """All of what 4,096 queries need beside their output, over 8 and 32 thousand keys."""
    peaks = []
    for T in (8192, 32768):
        q, k, v = torch.randn(1, 2, 4096, 16), *torch.randn(2, 1, 1, T, 16)
        with ByteCounter() as counter:
            peaks.append(counter.peak(lambda q=q, k=k, v=v: attend_causally(q, k, v)))
    assert max(peaks) < 6 * retroinfer.MASK + 4 * q.nbytes
    assert max(peaks) < 4096 * 32768                # a mask of them all, in bytes


def test_tensors_that_ask_for_gradients_are_taken(make):
    """A copying user has no torch.no_grad() around it."""
    q, k, v = (torch.nn.Parameter(x) for x in qkv(80))
    cache = make(90)
    o = cache.prefill(q[:, :, :70], k[:, :, :70], v[:, :, :70])
    cache.update()
    for t in range(70, 80):
        o = cache.decode(q[:, :, t:t + 1], k[:, :, t:t + 1], v[:, :, t:t + 1])
    assert not o.requires_grad


@pytest.mark.parametrize("backend", ["eager", "compiled", "native"], indirect=True)
def test_steps_too_many_write_nowhere_else_and_are_found_out(backend):
    """update() says how many steps may follow. Far more are taken: no crash, and then an error."""
    q, k, v = qkv(300)
    wave = WaveIndex(RetroConfig(**SMALL), 300)
    wave.prefill(q[:, :, :100], k[:, :, :100], v[:, :, :100])
    assert wave.update() < 40
    for t in range(100, 300):
        wave.decode(q[:, :, t:t + 1], k[:, :, t:t + 1], v[:, :, t:t + 1])
    with pytest.raises(ValueError, match="more steps were taken"):
        wave.update()


def test_steps_past_the_capacity_are_found_out():
    q, k, v = qkv(140)
    wave = WaveIndex(RetroConfig(**SMALL), 100)
    wave.prefill(q[:, :, :99], k[:, :, :99], v[:, :, :99])
    assert wave.update() == 1
    while int(wave.n_tokens - wave.n_indexed) < wave.config.steady:     # update() has work to do
        t = int(wave.n_tokens)
        wave.decode(q[:, :, t:t + 1], k[:, :, t:t + 1], v[:, :, t:t + 1])
    with pytest.raises(ValueError, match="more steps were taken"):
        wave.update()


def test_a_steady_zone_is_no_larger_than_the_cache():
    wave = WaveIndex(RetroConfig(**SMALL | {"update": 2**30}), 100)
    wave.allocate(qkv(1)[1])
    assert wave.k_steady.shape[2] == 128
