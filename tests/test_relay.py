"""An answer begins with eager steps and goes on with compiled ones: the same tokens."""
import pytest
import torch
from steps import LONG

from app import relay
from app.relay import Relay, Spec, best_hot
from generate import decode, eager_step, prefill, reason, sampler
from model import load
from retroinfer import RetroConfig, WaveIndex

CONFIG = RetroConfig(update=32, segment=64, local=8, min_retrieve=2)


@pytest.fixture
def model(checkpoint):
    return load(checkpoint(**LONG), device="cpu")[0]


@pytest.fixture
def spec(model):
    return Spec(model.config, torch.float32, CONFIG, 512, 1)


def greedy(model, step, n=40, hot=None):
    ids = torch.randint(3, 320, (200,), generator=torch.Generator().manual_seed(0))
    caches = [WaveIndex(CONFIG, 512, hot=hot) for _ in model.layers]
    logits = prefill(model, caches, [ids])
    return [t.item() for t in decode(model, caches, logits, n, sampler(), step)]


def settle(relay, seconds=60):
    """Wait until nothing is compiled any more."""
    relay.has_begun.set()
    relay.worker.join(seconds)
    assert not relay.worker.is_alive()


def test_a_short_answer_is_eager_and_no_child_is_started(model, spec, monkeypatch):
    monkeypatch.setattr(Relay, "compile_beside", lambda *_: pytest.fail("a child"))
    step = Relay(spec, 40)
    settle(step)
    assert greedy(model, step) == greedy(model, eager_step, hot=best_hot(spec)[0])
    assert step.words().endswith("39 eager steps") and not step.is_over


@pytest.fixture
def over(spec, monkeypatch, tmp_path):
    """over(compiled, loading=0): a Relay that is ready to go over to `compiled`, which stands for
    generate.compiled_step. The child is tested below."""
    def make(compiled, loading=0.0):
        monkeypatch.setattr(relay, "compiled_step", compiled)
        monkeypatch.setattr(relay, "LOADING", loading)
        monkeypatch.setattr(relay, "stamp", lambda _: tmp_path / "none")
        monkeypatch.setattr(Relay, "compile_beside", lambda *_: None)
        step = Relay(spec, 300)
        settle(step)
        return step
    return make


def test_it_goes_over_when_compiled_steps_are_ready_and_pay(model, spec, over):
    calls = []

    def compiled(*args):
        calls.append(args)
        return eager_step(*args)
    step = over(compiled)
    assert greedy(model, step) == greedy(model, eager_step, hot=best_hot(spec)[0])
    assert len(calls) == 38 and step.words().endswith("1 eager steps, 38 compiled")
    greedy(model, over(compiled, loading=1e9))                      # would not pay
    assert len(calls) == 38


def test_what_does_not_compile_is_said_and_the_answer_is_eager(model, spec, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(relay.sys, "executable", "false")
    step = Relay(spec, 300)
    settle(step)
    assert len(greedy(model, step)) == 40
    assert "39 eager steps; compiling failed: no message" in step.words()


def test_a_cache_that_is_no_good_after_all_costs_no_answer(model, spec, over):
    def fails(*_):
        raise torch._dynamo.exc.TorchDynamoException("the file is gone")
    step = over(fails)
    assert greedy(model, step) == greedy(model, eager_step, hot=best_hot(spec)[0])
    assert step.words().endswith("39 eager steps; compiling failed: the file is gone")


def test_the_line_that_says_most():
    said = "CppCompileError: C++\n x.h:3: fatal error: no y.h\nb"
    assert reason(said) == "x.h:3: fatal error: no y.h"
    assert reason("Traceback\n\nKeyError: 3\n") == "KeyError: 3" and reason("") == "no message"


@pytest.mark.slow
def test_a_child_fills_the_cache_and_leaves_its_stamp(model, spec, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert not relay.stamp(spec).exists()
    step = Relay(spec, 300)
    settle(step, 300)
    assert step.is_ready and step.problem is None and relay.stamp(spec).exists()
    monkeypatch.setattr(Relay, "compile_beside", lambda *_: pytest.fail("a second child"))
    settle(again := Relay(spec, 300))
    assert again.is_ready
    monkeypatch.setattr(relay, "LOADING", 0.0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert greedy(model, again) == greedy(model, eager_step, hot=best_hot(spec)[0])
    counters = torch._dynamo.utils.counters["inductor"]
    assert counters["fxgraph_cache_hit"] and not counters["fxgraph_cache_miss"]
