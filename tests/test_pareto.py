"""All methods on one page: the KL of each is that of the method alone; its bytes are counted."""
import json

import pytest
import torch
from steps import qkv

from antkv import AnchorCache, AnchorConfig
from evaluation import fidelity, pareto
from evaluation.pareto import Counted, read_share, resident_share
from generate import eager_step, prefill
from model import load
from retrieval_attention import GraphConfig
from retroinfer import RetroConfig

N, STEPS = 2052, 3


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load(checkpoint(max_position_embeddings=4096), device="cpu")[0]


def test_the_kl_is_that_of_each_method_alone(loaded):
    ids = torch.randint(3, 300, (N,), generator=torch.Generator().manual_seed(0))
    made, logs = pareto.methods(N, 16), {}
    for name, make in made.items():
        caches, n = [make(N) for _ in loaded.layers], N - STEPS - 1
        prefill(loaded, caches, [ids[:n]], n)
        found = []
        for token in ids[n:-1]:
            for cache in caches:
                cache.update()
            found.append(eager_step(loaded, caches, token[None])[0].double().log_softmax(-1))
        logs[name] = torch.stack(found)
    dense = logs["dense", "all"]
    found = {tuple(row[:2]): row[2:] for row in pareto.measure(loaded, ids, made, STEPS)}
    assert list(found) == list(made)
    for name, mine in logs.items():
        want = torch.nn.functional.kl_div(mine, dense, log_target=True, reduction="sum") / STEPS
        assert found[name][2] == pytest.approx(float(want), rel=1e-3, abs=1e-7), name
    assert found["dense", "all"] == (1, 1, 0)
    assert found["window", "25%"][0] == pytest.approx(0.25, abs=0.01) == found["window", "25%"][1]
    assert found["oracle", "25%"][1] == 1 > found["oracle", "25%"][0]


def step(cache, n=2100, D=64):
    """The cache behind n tokens and one step."""
    q, k, v = qkv(n + 1, G=2, D=D)
    cache.prefill(*(x[:, :, :n] for x in (q, k, v)))
    cache.update()
    cache.decode(*(x[:, :, n:] for x in (q, k, v)))
    return cache


@pytest.mark.parametrize("index", ["qcivf", "graph"])
def test_what_a_search_reads_is_counted_once_for_a_kv_head(index):
    """Bytes by hand: a key counts once, however many query heads of its kv head compare it."""
    config = GraphConfig(index=index, centroids=50, listed=60, visits=2, coarse=40)
    cache = step(Counted(config, 2101))
    numbers, twice = [], 0
    for head in range(2):
        keys, values = set(), set()
        for seen, rows in zip(cache.found.seen[0, head], cache.found.rows[0, head], strict=True):
            more = set((seen[:-1] >= 0).nonzero()[:, 0].tolist())
            twice += len(keys & more)
            keys |= more
            values |= set(rows.tolist())
        n_open = 2101 - int(cache.n_indexed[0])
        lists, P = cache.index.lists.shape[2:]
        ids = 2 * 2 * P if index == "qcivf" else 2 * (P + 16 * 8 * config.degree)
        numbers.append(64 * (2 * n_open + len(keys) + len(values) + lists) + 2 * ids)
    assert read_share(cache) == pytest.approx(sum(numbers) / 2 / (64 * 2 * 2101))
    assert twice
    kept = 64 * cache.index.lists.shape[2] + 2 * cache.index.lists[0, 0].numel()
    kept += 2 * (2101 * config.degree + config.entries) if index == "graph" else 0
    assert resident_share(cache) == pytest.approx(1 + kept / (64 * 2 * 2101))


def test_a_store_of_bytes_is_read_and_kept_in_half_of_the_bytes():
    """A row of 64 numbers in 8 bits has a scale of 16 bits; the steady zone and the index do not
    change."""
    rest = []
    for bits, row in (16, 1), (8, (8 * 64 + 16) / (16 * 64)):
        cache = step(fidelity.wave(RetroConfig(values=1.0, store_bits=bits), 2101))
        n_read, n_kept = float(cache.fetched[1].sum()) / 2, int(cache.n_indexed)
        rest.append([2101 * read_share(cache) - row * n_read,
                     2101 * resident_share(cache) - row * n_kept])
        assert n_read > 20
    assert rest[0] == pytest.approx(rest[1], rel=0.02) and 41 < rest[0][0] < rest[0][1] < 200


def test_codes_are_all_read():
    cache = step(AnchorCache(AnchorConfig(1), 2101))
    assert read_share(cache) == resident_share(cache) == cache.true_bits() / 16 < 0.5


def test_the_command_writes_the_mean_of_its_texts_and_a_plot(checkpoint, tmp_path, monkeypatch):
    few = {("dense", "all"): 0, ("ours", "1x"): 0, ("window", "6%"): 0, ("AnTKV", "1 bit"): 0}
    every = pareto.methods
    monkeypatch.setattr(pareto, "methods", lambda n, D: {
        name: make for name, make in every(n, D).items() if name in few})
    monkeypatch.setattr(pareto.texts, "ids", lambda _, kind, half, n: (
        torch.arange(n) * {"code": 3, "prose": 7}[kind] % 290 + 3))
    out, path = tmp_path / "x.json", checkpoint(max_position_embeddings=4096)
    assert pareto.main(["--model", str(path), "--length", str(N), "--steps", "2",
                        "--kinds", "code", "prose", "--out", str(out)]) == 0
    facts = json.loads(out.read_text())
    assert {(row[0], row[1]) for row in facts["mean"]} == set(few)
    for mean, code, prose in zip(facts["mean"], *facts["texts"].values(), strict=True):
        assert mean[4] == pytest.approx((code[4] + prose[4]) / 2)
    assert out.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize("words, line", [
    (["--length", "5000"], "5,000 tokens, the model's context is 4,096: give a smaller --length"),
    (["--length", "1040"], "1,008 tokens before the steps are too few: give 2,048 or more"),
    (["--model", "no/such/place"], "no/such/place")], ids=lambda x: " ".join(x)[:20])
def test_bad_input_is_one_line(checkpoint, capsys, words, line):
    path = str(checkpoint(max_position_embeddings=4096))
    assert pareto.main(["--model", path, *words]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and line in said[0]
