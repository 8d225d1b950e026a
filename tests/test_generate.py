"""Generation: what is yielded, when it ends, and that a step compiles once for all layers."""
import functools
from itertools import count

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from steps import ALL, LONG, SMALL, fixed

from generate import call, compiled_step, decode, eager_step, generate, prefill, sampler, step
from model import DenseCache, load
from retroinfer import RetroConfig, WaveIndex

PER_FUNCTION = [HealthCheck.function_scoped_fixture]


@pytest.fixture
def model(checkpoint):
    return load(checkpoint(**LONG), device="cpu")[0]


@pytest.fixture
def ids():
    return torch.randint(3, 320, (1, 90), generator=torch.Generator().manual_seed(4))


def caches(model, make):
    return [make() for _ in model.layers]


def wave(capacity=400, **budget):
    return lambda: WaveIndex(RetroConfig(**SMALL, **budget or ALL), capacity)


def record(logits, into):
    into.append(logits)
    return torch.tensor([len(into) % 300 + 3])          # any token that does not end the text


def test_all_retrieved_gives_dense_logits_through_many_updates(model, ids):
    said = {}
    for name, make in {"dense": lambda: DenseCache(400), "wave": wave()}.items():
        said[name] = []
        pick = lambda logits, into=said[name]: record(logits, into)  # noqa: E731
        held = caches(model, make)
        assert len(list(generate(model, held, ids, 200, pick, eager_step))) == 200
    assert held[0].n_clusters[0] and held[0].n_indexed[0] > 6 * 32
    torch.testing.assert_close(torch.cat(said["wave"]), torch.cat(said["dense"]),
                               rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@settings(max_examples=8, deadline=None, suppress_health_check=PER_FUNCTION)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=4))
@example(lengths=[1, 70, 300])
def test_unequal_prompts_get_the_logits_they_get_alone(model, lengths):
    """With all retrieved: a batch rounds queries otherwise, and where ranks decide two clusters may
    swap. Those are compared from the same queries (test_unequal_texts_get_what_they_get_alone)."""
    more = wave(400)
    prompts = [torch.randint(3, 320, (n,), generator=torch.Generator().manual_seed(n))
               for n in lengths]
    said = []
    for texts in (prompts, *([one] for one in prompts)):
        held = [WaveIndex(c.config, 400, len(texts)) for c in caches(model, more)]
        got = []
        list(generate(model, held, texts, 50, lambda x, got=got: fixed(x, got), eager_step))
        said.append(torch.stack(got, 1))                                # (B, 50, V)
    torch.testing.assert_close(said[0], torch.cat(said[1:]), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@settings(max_examples=10, deadline=None, suppress_health_check=PER_FUNCTION)
@given(turns=st.lists(st.tuples(st.integers(1, 120), st.integers(0, 60)), min_size=1, max_size=4))
@example(turns=[(70, 0), (1, 40), (120, 60)])
def test_turns_of_any_length_give_what_one_prompt_gives(model, turns):
    """Each turn reads some tokens and makes the caches generate others; nothing is read again."""
    held, text, tokens = caches(model, wave(1000)), torch.empty(0, dtype=torch.int64), count(3)
    for n_read, n_said in turns:
        turn = torch.tensor([next(tokens) % 317 + 3 for _ in range(n_read)])
        logits = prefill(model, held, [turn], chunk=50)
        text = torch.cat([text, turn])
        whole = prefill(model, caches(model, lambda: DenseCache(1000)), [text])
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
        said = torch.cat(list(decode(
            model, held, logits, n_said, lambda _: torch.tensor([next(tokens) % 317 + 3]),
            eager_step)) or [text[:0]])
        text = torch.cat([text, said[:-1]])                             # the last is in no cache


def test_sequences_end_on_their_own(model, ids):
    prompts, wanted = [ids[0, :40], ids[0]], iter([[5, 6], [2, 7], [9, 8], [9, 2], [9, 9]])
    held = [WaveIndex(RetroConfig(**SMALL), 200, 2) for _ in model.layers]
    pick = lambda _: torch.tensor(next(wanted))  # noqa: E731
    out = torch.stack(list(generate(model, held, prompts, 10, pick, eager_step)), 1)
    assert out.tolist() == [[5, 2, 2, 2], [6, 7, 8, 2]]         # 2 is the model's end


def test_an_end_token_ends_the_text(model, ids):
    tokens = iter([5, 6, 2, 7])                         # 2 is the model's end
    pick = lambda _: torch.tensor([next(tokens)])  # noqa: E731
    out = [t.item() for t in generate(model, caches(model, wave()), ids, 10, pick, eager_step)]
    assert out == [5, 6, 2]


def test_full_caches_are_reported(model, ids):
    pick = lambda _: torch.tensor([7])  # noqa: E731
    with pytest.raises(ValueError, match="caches are full after 5 tokens"):
        list(generate(model, caches(model, wave(capacity=95)), ids, 10, pick, eager_step))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("lengths", [
    (90,), pytest.param((1, 30, 90, 250), marks=pytest.mark.slow)], ids=str)
def test_a_step_is_one_graph_and_never_compiles_again(model, lengths):
    """Over more than four updates of the index; layers share one region."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    region = functools.partial(step, run=torch.compiler.nested_compile_region(call))
    fast = torch.compile(region, backend=counter, fullgraph=True, dynamic=False)
    prompts = [torch.randint(3, 320, (n,), generator=torch.Generator().manual_seed(n))
               for n in lengths]
    said, indexed = [], None
    for one_step, n in ((fast, N_LONG), (eager_step, 60)):
        config = RetroConfig(**SMALL | {"update": 128}, retrieve=0.1,
                             estimate=0.2)
        held = [WaveIndex(config, N_LONG + 260, len(lengths)) for _ in model.layers]
        got = []
        list(generate(model, held, prompts, n, lambda x, got=got: fixed(x, got), one_step))
        said.append(torch.stack(got[:60]))
        indexed = indexed or held[0].n_indexed.tolist()
    assert counter.frame_count == 1
    assert all(n >= 4 * 128 for n in indexed)
    torch.testing.assert_close(*said, rtol=1e-4, atol=1e-4)


N_LONG = 700


def test_inductor_gives_what_eager_gives(model, ids):
    """The shipped step, with products written as sums, against eager matrix products."""
    torch._dynamo.reset()
    said = []
    for one_step in (compiled_step, eager_step):
        held = caches(model, wave(bits=16, retrieve=0.1, estimate=0.2))     # none is a step apart
        first, got = prefill(model, held, ids), []
        pick = lambda x, got=got: record(x, got)  # noqa: E731
        list(decode(model, held, first, 6, pick, one_step))
        said.append(torch.cat(got))
    torch.testing.assert_close(*said, rtol=1e-4, atol=1e-4)


def test_chunked_prefill_gives_the_same_logits(model, ids):
    whole = prefill(model, caches(model, wave()), ids)
    for chunk in (1, 7, 45, 89, 90, 200):
        torch.testing.assert_close(prefill(model, caches(model, wave()), ids, chunk), whole,
                                   rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- sampling

def test_zero_temperature_takes_the_best():
    assert sampler()(torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])).tolist() == [1, 0]


def test_top_p_draws_only_from_the_smallest_set_that_holds_it():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    drawn = [sampler(1.0, 0.6, seed)(logits).item() for seed in range(200)]
    assert set(drawn) == {0, 1}                         # 0.5 alone is less than 0.6
    share = drawn.count(0) / 200
    assert abs(share - 0.5 / 0.8) < 0.12                # three and a half standard deviations


def test_temperature_flattens():
    logits = torch.tensor([[2.0, 0.0]])
    share = [sum(sampler(t, 1.0, s)(logits).item() == 0 for s in range(300)) / 300
             for t in (0.5, 1.0, 4.0)]
    expected = [1 / (1 + torch.tensor(-2 / t).exp().item()) for t in (0.5, 1.0, 4.0)]
    assert share == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("flags", [(-1, 1), (float("nan"), 1), (1, 0), (1, 1.5)])
def test_sampling_out_of_range_is_refused(flags):
    with pytest.raises(ValueError, match="temperature"):
        sampler(*flags)


@pytest.mark.slow
def test_a_loop_over_texts_may_give_every_cache_another_capacity(checkpoint):
    """Twelve capacities: torch allows a function eight graphs unless it is told otherwise."""
    model, _ = load(checkpoint(**LONG), device="cpu")
    traced = torch.compile(functools.partial(step, run=call), backend="eager", fullgraph=True,
                           dynamic=False)
    for n in range(100, 2500, 200):
        caches = [WaveIndex(RetroConfig(), n + 4) for _ in model.layers]
        ids = torch.randint(3, 320, (n,))
        assert len(list(generate(model, caches, [ids], 3, step=traced))) == 3


def test_each_sequence_draws_what_it_would_draw_alone():
    logits = 3 * torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together, alone = sampler(1.0, 0.9, 7), [sampler(1.0, 0.9, 7) for _ in logits]
    for _ in range(20):
        assert together(logits).tolist() == [int(pick(row[None])) for pick, row in zip(
            alone, logits, strict=True)]


@pytest.mark.parametrize("temperature", [1e-40, 1e-300, 1e-8])
def test_a_temperature_next_to_nothing_is_greedy(temperature):
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    assert sampler(temperature)(logits).equal(logits.argmax(-1))
