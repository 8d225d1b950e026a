"""A store of 8 bits: what it keeps, what a step makes of it, and who cannot have one."""
from dataclasses import replace

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from steps import ALL, BACKENDS, CLOSE, SMALL, generated, qkv, read

from app.questions import spread
from error_bars import CheckedIndex
from evaluation.fidelity import Watched
from evaluation.residuals import Kind, Rounded
from retroinfer import ByteStore, InputError, RetroConfig, Store, WaveIndex

CONFIG = RetroConfig(**SMALL, store_bits=8)
EXACT = RetroConfig(**SMALL)


def stored(k, v):
    """A ByteStore of keys and values (1, H, T, D)."""
    store = ByteStore(WaveIndex(CONFIG, 64), k.shape[2], k)
    store.put(0, 0, k, v)
    return store


@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-6, 0.1, 1, 300, 1e6]),
       loud=st.sampled_from([0, 100]), T=st.integers(1, 40))
def test_a_number_is_kept_within_half_a_step(seed, scale, loud, T):
    """The step of a row is a 127th of its largest number, in bfloat16. A channel that is large in
    every key costs nothing."""
    g = torch.Generator().manual_seed(seed)
    k, v = scale * torch.randn(2, 1, 3, T, 16, generator=g)
    k[..., 5] += loud * scale
    found = stored(k, v).view(0, 0, T)
    for x, kept, mean in zip((k, v), found, (k.mean(2, keepdim=True), 0), strict=True):
        step = (x - mean).abs().amax(-1, keepdim=True) / 127
        assert ((kept - x).abs() <= 0.51 * step + 1e-6 * x.abs().max()).all()


def test_the_simulation_of_the_evaluation_loses_as_much():
    q, k, v = qkv(270, D=32)
    config = RetroConfig(**SMALL | {"retrieve": 0.5, "estimate": 0.3})
    caches = [Watched(config, 270, 1), Rounded(Kind(8, is_residual=False), config, 270, 1),
              WaveIndex(replace(config, store_bits=8), 270)]
    exact, rounded, mine = (generated(cache, q, k, v, 260)[:, :, 260:] for cache in caches)
    assert 0.5 < (mine - exact).norm() / (rounded - exact).norm() < 2


def test_what_is_kept_again_stays_as_it_is():
    k, v = qkv(200)[1:]
    store = stored(k, v)
    once = store.view(0, 0, 200)
    store.put(0, 50, *(x[:, :, 50:120] for x in once))
    for x, again in zip(once, store.view(0, 0, 200), strict=True):
        torch.testing.assert_close(again, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("share", [{}, ALL], ids=["few", "all"])
def test_a_step_attends_to_what_is_kept(backend, share):
    """As an index in 16 bits of the rounded keys and values."""
    q, k, v = qkv(290, B=2)
    config = {**SMALL, "retrieve": 0.2, "estimate": 0.3} | share
    mine, wide = WaveIndex(RetroConfig(**config, store_bits=8), 300, 2), WaveIndex(
        RetroConfig(**config), 300, 2)
    read(mine, *(x[:, :, :270] for x in (q, k, v)))
    for row in range(2):
        mine.update()
        wide.restore({name: x.clone() for name, x in mine.state(row).items()}, row=row)
    mine.update(), wide.update()
    assert isinstance(wide.store, Store) and not isinstance(wide.store, ByteStore)
    for t in range(270, 290):
        o = [cache.decode(*(x[:, :, t:t + 1] for x in (q, k, v))) for cache in (mine, wide)]
        torch.testing.assert_close(*o, **CLOSE)


def test_answers_are_close_to_dense_through_chunks_turns_and_updates():
    q, k, v = qkv(300)
    wave = WaveIndex(RetroConfig(**SMALL, **ALL, store_bits=8), 300)
    o, truth = generated(wave, q, k, v, 100), oracle.dense(q, k, v)
    assert 1e-4 < (o - truth).norm() / truth.norm() < 0.01
    assert int(wave.n_indexed[0]) > 200         # its own tokens too
    chunks = WaveIndex(RetroConfig(**SMALL, **ALL, store_bits=8), 300)
    parts = [chunks.prefill(*(x[:, :, i:i + 60] for x in (q, k, v))) for i in range(0, 300, 60)]
    assert (torch.cat(parts, 2) - truth).norm() / truth.norm() < 0.01


def test_what_was_read_last_and_first_is_kept_too():
    """A prompt shorter than the sink, and one token at a time."""
    q, k, v = qkv(40)
    wave = WaveIndex(RetroConfig(**SMALL, **ALL, store_bits=8), 40)
    o, truth = generated(wave, q, k, v, 1), oracle.dense(q, k, v)
    assert (o - truth).norm() / truth.norm() < 0.01


def test_an_index_is_saved_and_restored():
    """In 16 bits: what is restored is rounded again."""
    q, k, v = qkv(200)
    wave, again = WaveIndex(CONFIG, 200), WaveIndex(CONFIG, 300)
    wave.prefill(*(x[:, :, :190] for x in (q, k, v)))
    again.restore({name: x.clone() for name, x in wave.state(0).items()})
    for cache in (wave, again):
        cache.update()
    for t in range(190, 200):
        o = [cache.decode(*(x[:, :, t:t + 1] for x in (q, k, v))) for cache in (wave, again)]
        torch.testing.assert_close(*o, rtol=0, atol=2e-3)


def test_a_sequence_may_start_with_no_token():
    q, k, v = qkv(1)
    wave = WaveIndex(CONFIG, 100, batch=2)
    wave.prefill(q, k, v, row=0)
    wave.update()
    o = wave.decode(*(x.repeat(2, 1, 1, 1) for x in (q, k, v)))
    torch.testing.assert_close(o[1], o[0], rtol=0, atol=2e-2)           # equal tokens


def test_sequences_that_share_an_index_read_what_one_reads():
    q, k, v = qkv(200)
    one, many = WaveIndex(CONFIG, 300), WaveIndex(CONFIG, 300)
    for cache in (one, many):
        cache.prefill(*(x[:, :, :190] for x in (q, k, v)))
    spread(many, 3)
    for t in range(190, 200):
        new = [x[:, :, t:t + 1] for x in (q, k, v)]
        one.update(), many.update()
        o = many.decode(*(x.expand(3, -1, -1, -1) for x in new))
        torch.testing.assert_close(o[2:], one.decode(*new), **CLOSE)


def test_bytes_are_those_of_the_rows():
    q, k, v = qkv(2000)
    both = [WaveIndex(c, 2000) for c in (CONFIG, EXACT)]
    for cache in both:
        cache.prefill(q, k, v)
        cache.update()
    mine, exact = (cache.nbytes()["store"] for cache in both)
    assert mine == 2 * 2 * 2048 * 18 and exact == 2 * 2 * 2048 * 16 * 4
    rest = 2 * both[0].k_steady.nbytes          # and the index: alike in both
    assert both[0].facts()["dense_bytes"] == both[1].facts()["dense_bytes"]
    less = both[1].bytes_read() - both[0].bytes_read()
    rows = less / (64 - 18)                     # of retrieved tokens, and a fifth of their values
    assert rows == int(rows) and rows * 64 + rest < both[1].bytes_read()


@pytest.mark.parametrize("make", [
    lambda: RetroConfig(store_bits=4), lambda: CheckedIndex(CONFIG, 64),
    lambda: Watched(CONFIG, 64, 2),
    lambda: WaveIndex(CONFIG, 64, make_store=lambda *_: None)],
    ids=["4", "bars", "evaluation", "offload"])
def test_who_cannot_have_one_is_told(make):
    with pytest.raises(InputError, match="store_bits"):
        make()
