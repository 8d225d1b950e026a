"""bench/cpu.py on a tiny model and few tokens: it runs, and times what it says."""
import functools
import sys
from argparse import Namespace

import pytest
import tiny
import torch

from antkv import AnchorConfig, encode
from app.command import run_command
from bench import cpu, start, timing
from model import DenseCache, load
from retroinfer import RetroConfig, WaveIndex


@pytest.fixture
def tiny_model(checkpoint, monkeypatch, one_thread):
    """The benchmarks load a tiny model in place of the default one, and this returns it."""
    path = checkpoint(max_position_embeddings=4096)
    monkeypatch.setattr(cpu, "load", functools.partial(load, path))
    return load(path, torch.float32, "cpu")[0]


def test_a_prefill_times_its_index(tiny_model):
    dense, wave = (cpu.one_prefill(name, 512, "float32") for name in ("dense", "wave index"))
    assert dense["indexing"] == 0
    assert 0 < wave["indexing"] < wave["seconds"]
    assert wave["peak"] >= 2**20                        # bytes


def test_a_reloaded_index_is_timed_beside_the_text(tiny_model, capsys):
    found = cpu.reload(Namespace(tokens=[600], dtype="float32", repeats=1))
    read, loaded = (found[name][0] for name in ("text read", "index loaded"))
    assert f"| index loaded | {loaded:.2f} | {read / loaded:.1f} |" in capsys.readouterr().out
    sizes = (tiny.SIZES[name] for name in ("num_hidden_layers", "num_key_value_heads", "head_dim"))
    assert found["bytes"] > 2 * 4 * 600 * functools.reduce(int.__mul__, sizes)  # K and V, fp32


@pytest.mark.parametrize("kind", [DenseCache, functools.partial(WaveIndex, RetroConfig())])
def test_a_long_cache_holds_copies_of_the_keys_that_were_read(kind, tiny_model):
    c, g = tiny_model.config, torch.Generator().manual_seed(0)
    shape = 1, c.num_key_value_heads, 40, c.head_dim
    k, v = (torch.randn(shape, generator=g) for _ in range(2))
    cache = kind(100)
    cache.prefill(None, k, v)
    cpu.repeat_keys(cache, 100)
    assert cache.n_tokens == 100
    for held, x in zip(timing.keys_and_values(cache), (k, v), strict=True):
        assert torch.equal(held, torch.cat([x, x, x[:, :, :20]], 2))


def test_a_layer_holds_its_tokens_and_has_the_default_models_budget():
    cache, k, v = cpu.clumped_layer(1500, seed=0)
    assert k.shape == v.shape == (1, cpu.H, 1500, cpu.D) and cache.n_tokens == 1500
    budget = cache.budget()
    share = RetroConfig().retrieve * int(cache.n_indexed) // RetroConfig().cluster
    assert (budget.retrieve - max(share, RetroConfig().min_retrieve)).abs().max() <= 1


def test_a_layer_from_codes_holds_the_bytes_that_were_planned(one_thread, monkeypatch):
    """In pieces, the last of which is shorter, and as the cache itself would have encoded them."""
    monkeypatch.setattr(cpu, "REAL", 800)
    T, config = 1900, AnchorConfig(bits=1)
    cache = cpu.coded_layer(T, config, 2)
    held = cache.bytes_held()
    assert held == cpu.planned_bytes(T, config) and cache.n_tokens == T
    assert sum(held.values()) < sum(cache.nbytes().values()) < 1.5 * sum(held.values())
    k, v = (torch.cat(x, 2) for x in zip(*cpu.clumped(T, torch.Generator().manual_seed(0)),
                                         strict=True))
    n, book = int(cache.n_indexed), cache.book_of(0)
    assert torch.equal(cache.store.k[..., :700], encode(k[:, :, 4:704] - book.centre, book.k))
    assert torch.equal(cache.store.v[..., n - 700:n], encode(v[:, :, n - 696:n + 4], book.v))


@pytest.mark.slow
def test_a_step_from_codes_is_timed_beside_dense_attention(one_thread, monkeypatch, capsys):
    """With half the free memory for it, dense attention has fewer tokens."""
    monkeypatch.setattr(cpu, "free_memory", lambda device: 2 * 4 * cpu.H * cpu.D * 600)
    found = cpu.codes(Namespace(tokens=[900], repeats=2))
    assert {name: len(x) for name, x in found["seconds"].items()} == {
        cpu.LOOK_UP: 2, "dense, ours": 2, "dense, SDPA": 2}
    out = capsys.readouterr().out
    assert "900 tokens, " in out and "| dense, SDPA | 600 | " in out and "| all | " in out
    assert [sum(x[i] for name, x in found["bytes"].items() if name != "all") for i in range(3)] == \
        found["bytes"]["all"]


@pytest.mark.parametrize("given, problem", [
    (["model", "--steps", "2"], "--steps is 2: at least 3"),
    (["attention", "--tokens", "0"], "argument --tokens: invalid positive value: '0'"),
    (["reload", "--save", "no/where.json"], "argument --save: there is no folder no "),
    (["speed"], "argument section: invalid choice")])
def test_a_wrong_argument_is_one_line(given, problem, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.cpu", *given])
    assert run_command("bench.cpu", cpu.main) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bench.cpu: {problem}") and error.count("\n") == 1


def test_runners_take_turns_behind_a_first_call_each():
    calls = []
    seconds = timing.take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert "".join(calls) == "abababab" and [len(x) for x in seconds.values()] == [3, 3]


def test_a_ratio_is_the_median_of_the_repeats_own_ratios():
    assert timing.speed_up([1, 1, 2], [3, 4, 20]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wave index", cpu.BEST])
def test_a_step_over_several_layers_compiles(name):
    """As the benchmark of one layer runs it: layers of one sequence in one graph."""
    layers = [cpu.clumped_layer(3000, seed) for seed in range(2)]
    cpu.attention_runners(layers, 3000)[name]()
    assert [int(layer.cache.n_tokens) for layer in layers] == [3001, 3001]


def test_what_a_newcomer_meets_is_measured():
    one = start.peak_of_prefill(9000)
    assert one["cache"] > 2 * 2 * 9000 * 2 * 16 * 4 and one["seconds"] > 0 <= one["beyond"]
    with pytest.raises(ZeroDivisionError):              # the other program ends in any case
        start.beside("import time; time.sleep(60)", lambda: 1 / 0)
