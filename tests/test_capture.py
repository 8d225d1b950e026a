"""A step can be captured in a CUDA graph, held without a GPU: its operators, repeated on the same
tensors with no Python between them, answer as eager steps do; and it never asks the host."""
from dataclasses import replace

import pytest
import torch
from steps import LONG, SMALL

from app.plan import ByteCounter, Run, cache_on_meta, on_meta, shape
from bench.recorder import Recorder, recorded
from buffer import CLOCK, offload
from generate import CapturedStep, eager_step, generate
from kernels import attend, tripartite_attention
from model import load
from retroinfer import PLAIN, RetroConfig, Store, WaveIndex

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = RetroConfig(**SMALL | {"cluster": 16}, retrieve=.1, estimate=.2)
KERNELS = PLAIN._replace(attend=attend, tripartite_attention=tripartite_attention)


@pytest.fixture
def model(checkpoint):
    return load(checkpoint(**LONG), device="cpu")[0]


def state(cache):
    """All tensors that a cache or its store keeps, by name."""
    owners = [cache, cache.store, getattr(cache.store, "cache", None)]
    owners += [getattr(owners[-1], "policy", None)]
    for owner in filter(None, owners):
        for name, x in vars(owner).items():
            for i, y in enumerate(x if isinstance(x, (tuple, list)) else [x]):
                if isinstance(y, torch.Tensor):
                    yield f"{type(owner).__name__}.{name}.{i}", y


def capture(caches, run):
    """As torch.cuda.graph: what run() does is noted and not done."""
    kept = [(x, x.clone()) for cache in caches for _, x in state(cache)]
    with Recorder() as seen:
        out = run()
    for x, before in kept:
        x.copy_(before)
    return seen.replay, out


def say(model, make, step, n=80, config=CONFIG, hot=PLAIN):
    """(caches, tokens, addresses of the state after every step) behind a ragged batch."""
    prompts = [torch.randint(3, 320, (n,), generator=torch.Generator().manual_seed(n))
               for n in (30, 250)]
    caches, places = [WaveIndex(config, 400, 2, hot, make) for _ in model.layers], []

    def noted(*args):
        out = step(*args)
        places.append({name: x.data_ptr() for cache in caches for name, x in state(cache)})
        return out
    said = torch.stack(list(generate(model, caches, prompts, n, step=noted)))
    return caches, said, places


def stores(model):
    return {"device": Store, "LRU": offload(model, 400, 2, cache_ratio=.3),
            "CLOCK": offload(model, 400, 2, cache_ratio=.3, policy=CLOCK)}


@pytest.mark.parametrize("where", ["device", "LRU", pytest.param("CLOCK",
                                                                 marks=pytest.mark.slow)])
def test_a_captured_step_answers_as_eager_steps_over_index_updates(model, where):
    _, truth, _ = say(model, stores(model)[where], eager_step)
    make, held = stores(model)[where], []

    def hold(model, caches, tokens):
        held[:] = caches
        return eager_step(model, caches, tokens)

    step = CapturedStep(hold, lambda run: capture(held, run))
    caches, said, places = say(model, make, step)
    assert said.equal(truth) and (caches[0].n_indexed >= 2 * 32).all()
    assert all(place == places[0] for place in places) and len(places[0]) >= 15
    assert step.words() == "78 of 79 steps were replays of one CUDA graph"


@pytest.mark.slow
def test_a_captured_step_answers_with_kernels_and_a_buffer(model, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")     # Triton loads parts of itself when they run
    given, held = (12, replace(CONFIG, update=8, cluster=8), KERNELS), []

    def hold(model, caches, tokens):
        held[:] = caches
        return eager_step(model, caches, tokens)

    step = CapturedStep(hold, lambda run: capture(held, run))
    caches, said, _ = say(model, stores(model)["LRU"], step, *given)
    assert said.equal(say(model, stores(model)["LRU"], eager_step, *given)[1])
    assert (caches[0].n_indexed >= 32).all() and step.n_replayed == 10      # an update between


def test_a_step_that_takes_a_number_from_the_host_is_found_out(model):
    """A planted fault: how many tokens there are, as a number, stays what it was."""
    def stale(model, caches, tokens):
        logits = eager_step(model, caches, tokens)
        return logits + 99 * (torch.arange(320) == int(caches[0].n_tokens[0]) % 320)

    _, truth, _ = say(model, Store, stale, 8)
    held = []

    def hold(model, caches, tokens):
        held[:] = caches
        return stale(model, caches, tokens)
    step = CapturedStep(hold, lambda run: capture(held, run))
    assert not say(model, Store, step, 8)[1].equal(truth)


def test_other_caches_are_captured_anew(model):
    """And those before are let go."""
    captured, step = [], None

    def count(run):
        captured.append(run())
        return (lambda: None), captured[-1]

    step = CapturedStep(eager_step, count)
    for n in (1, 2):
        say(model, Store, step, 8)
        assert len(captured) == n and len(step.held) == 1 + len(model.layers)
    assert step.n_replayed == 12 and step.n_steps == 14


@pytest.mark.parametrize("ratio", [None, 0.05])
def test_a_step_keeps_no_memory_and_asks_the_host_for_no_number(ratio):
    """At the size of Llama-3.1-8B, on the meta device, where such a question fails. Attention is
    that of the kernels, with K and V on the device and on the host."""
    run = Run(shape("Llama-3.1-8B"), capacity=131072, cache_ratio=ratio)
    model, cache = on_meta(run.model, run.dtype), cache_on_meta(run)
    cache.hot, cache.is_in_store = KERNELS, [False]
    token = torch.empty(1, dtype=torch.int64, device="meta")
    before = {name: x.untyped_storage()._cdata for name, x in state(cache)}
    with recorded() as seen, ByteCounter() as counter:
        logits = eager_step(model, [cache], token)
        assert {"rank_kernel", "choose_kernel", "attend_kernel"} < set(seen.launches())
        assert ratio is None or seen.launches().count("copy_rows_kernel") == 4
        seen.calls.clear()
        assert counter.now == logits.nbytes
    assert before == {name: x.untyped_storage()._cdata for name, x in state(cache)}


def test_the_recorder_counts_launches_and_no_views():
    x = torch.randn(4, 6)
    with Recorder() as seen:
        y = x.view(24)[2:].mT if x.ndim == 3 else x.view(24)[2:]
        y.add_(1)
        (torch.empty(3), x.T @ x)
    assert seen.launches() == ["add_", "mm"]
    want = x + 1
    want.view(24)[:2] = x.view(24)[:2]
    seen.replay()
    assert x.equal(want)
