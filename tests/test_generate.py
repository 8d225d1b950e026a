"""Generation: what is yielded, when it ends, and that a step compiles once for all layers."""
import pytest
import torch
from test_wave_index import ALL, SMALL

from model import DenseCache, load
from retroinfer import RetroConfig, WaveIndex, call, decode, generate, prefill, sampler

LONG = {"max_position_embeddings": 4096}


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
        assert len(list(generate(model, held, ids, 200, pick, call))) == 200
    assert held[0].n_clusters and held[0].n_indexed > 6 * 32
    torch.testing.assert_close(torch.cat(said["wave"]), torch.cat(said["dense"]),
                               rtol=1e-4, atol=1e-4)


def test_a_batch_gives_each_what_it_gives_alone(model):
    ids = torch.randint(3, 320, (3, 70), generator=torch.Generator().manual_seed(5))
    batch, alone = [], []
    for into, rows in ((batch, ids), (alone, ids[1:2])):
        def pick(logits, into=into):
            into.append(logits)
            return torch.full((len(logits),), 7)
        list(generate(model, caches(model, wave(retrieve=0.2, estimate=0.3)), rows, 50, pick, call))
    torch.testing.assert_close(torch.cat([x[1:2] for x in batch]), torch.cat(alone),
                               rtol=1e-4, atol=1e-4)


def test_an_end_token_ends_the_text(model, ids):
    tokens = iter([5, 6, 2, 7])                         # 2 is the model's end
    pick = lambda _: torch.tensor([next(tokens)])  # noqa: E731
    out = [t.item() for t in generate(model, caches(model, wave()), ids, 10, pick, call)]
    assert out == [5, 6, 2]


def test_full_caches_are_reported(model, ids):
    pick = lambda _: torch.tensor([7])  # noqa: E731
    with pytest.raises(ValueError, match="caches are full after 5 tokens"):
        list(generate(model, caches(model, wave(capacity=95)), ids, 10, pick, call))


def test_a_step_compiles_once_for_all_layers_and_never_again(model, ids):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    run = torch.compile(call, backend=counter, fullgraph=True, dynamic=False)
    held, logits = caches(model, wave(retrieve=0.1, estimate=0.2)), []
    pick = lambda x: record(x, logits)  # noqa: E731
    list(generate(model, held, ids, 120, pick, run))
    assert counter.frame_count == 2                     # a layer, the output product
    eager = []
    pick = lambda x: record(x, eager)  # noqa: E731
    list(generate(model, caches(model, wave(retrieve=0.1, estimate=0.2)), ids, 120, pick, call))
    torch.testing.assert_close(torch.cat(logits), torch.cat(eager), rtol=1e-4, atol=1e-4)


def test_one_row_as_a_sum_is_the_product(model, ids):
    """Inductor's decode, with products written as sums, against eager matrix products."""
    torch._dynamo.reset()
    said = []
    for run in (torch.compile(call, fullgraph=True, dynamic=False), call):
        held = caches(model, wave(retrieve=0.1, estimate=0.2))
        first, got = prefill(model, held, ids), []
        pick = lambda x, got=got: record(x, got)  # noqa: E731
        list(decode(model, held, first, 90, 6, pick, run))
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
