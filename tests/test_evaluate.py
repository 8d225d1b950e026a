"""The measures against float64 and against whole steps of the model; resuming; bad input."""
import functools
import importlib.util
import json
import math
import os
import re
from dataclasses import replace
from types import SimpleNamespace

import oracle
import pytest
import tiny
import torch
from steps import qkv

from evaluation import ablation, drift, evaluate, fidelity, kept, ruler, tables, texts
from evaluation.fidelity import (
    Case,
    Chosen,
    against_dense,
    by_head,
    filled,
    needle_mass,
    probe,
    read,
    wave,
)
from generate import eager_step, generate, prefill, sampler
from model import DenseCache, load, make_caches
from retroinfer import (
    PART_II_OFF,
    PLAIN,
    InputError,
    RetroConfig,
    WaveIndex,
    gather_clusters,
    limits_of,
    tripartite_attention,
)

TINY = RetroConfig(sink=2, local=6, update=8, segment=64, cluster=4, iterations=3, retrieve=0.1,
                   min_retrieve=3, estimate=0.4)
METHODS = {"dense": DenseCache, "wave": functools.partial(wave, TINY),
           "window": functools.partial(Chosen, functools.partial(fidelity.window, n=40)),
           "oracle": functools.partial(Chosen, functools.partial(fidelity.oracle, n=40)),
           "quest": functools.partial(Chosen, functools.partial(fidelity.quest, n=3))}
needs_data = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("long_context_eval", "wonderwords", "nltk",
                                                        "llama_index", "matplotlib", "aa_lcr")),
    reason="needs the packages of requirements-eval.txt")


@pytest.fixture(scope="module")
def model(checkpoint):
    return load(checkpoint(max_position_embeddings=4096), device="cpu")[0]


@pytest.fixture(scope="module")
def case(model):
    ids = torch.randint(3, 300, (231,), generator=torch.Generator().manual_seed(0))
    return read(model, ids, 10)


@pytest.fixture(params=METHODS, ids=str)
def make(request):
    return METHODS[request.param]


def test_a_case_holds_what_dense_attention_makes_of_the_text(model, case):
    every = [DenseCache(231) for _ in model.layers]
    hidden = model(case.ids[None], torch.arange(231)[None], [c.prefill for c in every])
    torch.testing.assert_close(case.hidden, hidden[0, case.n:-1], rtol=1e-4, atol=1e-4)
    assert (case.n, case.T) == (220, 10)
    for cache, (_, k, _), (q, *_) in zip(every, case.past, case.steps, strict=True):
        torch.testing.assert_close(cache.k[:, :, :220], k, rtol=1e-4, atol=1e-4)
        assert q.shape[2] == 10


def test_layer_by_layer_is_what_whole_steps_give(model, case, make):
    """Each layer hears all steps before the next one begins; the model steps token by token."""
    caches = [filled(make, *past, 10) for past in case.past]
    expected, room = [], 0
    for token in case.ids[case.n:-1]:
        room = room or min(cache.update() for cache in caches)
        expected.append(eager_step(model, caches, token[None])[0].double().log_softmax(-1))
        room -= 1
    p = model.logits(case.hidden).double().log_softmax(-1)
    q, ids = torch.stack(expected), case.ids[case.n + 1:]
    found = against_dense(model, case, make)
    kl = [sum(math.exp(a) * (a - b) for a, b in zip(x.tolist(), y.tolist(), strict=True))
          for x, y in zip(p, q, strict=True)]
    assert found["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-7)
    assert found["nll"] == pytest.approx([-q[t, i].item() for t, i in enumerate(ids)], abs=1e-4)
    assert found["same"] == [a.argmax() == b.argmax() for a, b in zip(p, q, strict=True)]


def test_layers_with_a_window_keep_it_in_every_measure(tmp_path):
    """Whole steps of the model, with make_caches, are the truth."""
    net = load(tiny.save(tmp_path, "gemma3_text", max_position_embeddings=4096, sliding_window=16,
                         num_hidden_layers=2, num_key_value_heads=1, head_dim=16,
                         layer_types=["sliding_attention", "full_attention"]), device="cpu")[0]
    case = read(net, torch.randint(3, 300, (231,), generator=torch.Generator().manual_seed(0)), 10)
    every = make_caches(net.config, lambda: DenseCache(231), 231)
    hidden = net(case.ids[None], torch.arange(231)[None], [cache.prefill for cache in every])
    torch.testing.assert_close(case.hidden, hidden[0, case.n:-1], rtol=1e-4, atol=1e-4)
    assert max(against_dense(net, case, DenseCache)["kl"]) < 1e-9
    make = functools.partial(wave, TINY)
    caches, expected, room = fidelity.caches_of(case, make, 10), [], 0
    for token in case.ids[case.n:-1]:
        room = room or min(cache.update() for cache in caches)
        expected.append(eager_step(net, caches, token[None])[0].double().log_softmax(-1))
        room -= 1
    nll = [-q[i].item() for q, i in zip(expected, case.ids[case.n + 1:], strict=True)]
    assert against_dense(net, case, make)["nll"] == pytest.approx(nll, abs=1e-3)
    assert len(by_head(case, make)["error"]) == 1                   # of the layer that sees all
    with pytest.raises(InputError, match="see a window only"):
        fidelity.refuse_windows(net)


def test_a_cache_filled_from_keys_is_one_that_read_the_text(model, case):
    config = replace(TINY, segment=256)                     # the text is within its first segment
    caches = [WaveIndex(config, 230) for _ in model.layers]
    prefill(model, caches, [case.ids[:220]])
    for read_cache, past in zip(caches, case.past, strict=True):
        made = filled(functools.partial(wave, config), *past, 10)
        for cache in (read_cache, made):
            cache.update()
        torch.testing.assert_close(made.q_energy, read_cache.q_energy, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(made.index.sizes, read_cache.index.sizes)
        torch.testing.assert_close(made.store.k, read_cache.store.k, rtol=1e-4, atol=1e-4)


def test_one_reading_serves_every_length(model, case):
    short, whole = fidelity.read_at(model, case.ids, [231, 120], 10)
    for found, alone in ((short, read(model, case.ids[:120], 10)), (whole, case)):
        assert torch.equal(found.ids, alone.ids) and found.n == alone.n
        torch.testing.assert_close(found.hidden, alone.hidden, rtol=1e-4, atol=1e-4)
        for mine, theirs in zip(found.past + found.steps, alone.past + alone.steps, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="the last 10 of 130 tokens begin within a text of 120"):
        fidelity.read_at(model, case.ids, [120, 130], 10)


def test_what_was_kept_is_not_read_again(checkpoint, tmp_path, monkeypatch):
    model, tokenizer = load(checkpoint(max_position_embeddings=4096), device="cpu")
    ids = torch.randint(3, 300, (200,), generator=torch.Generator().manual_seed(0))

    def cases(lengths):
        return kept.cases(model, tokenizer, ids, lengths, 8, tmp_path / "new")
    first = cases([100, 200])
    assert max(os.path.getsize(path) for path in (tmp_path / "new").iterdir()) < 1.2 * sum(
        2 * k.nbytes for _, k, _ in first[1].past) + 2**18      # two lengths share their keys
    monkeypatch.setattr(fidelity, "read_at", None)              # nobody may read
    for mine, theirs in zip(cases([200, 100]), first, strict=True):
        assert torch.equal(mine.hidden, theirs.hidden)
        torch.testing.assert_close(mine.past + mine.steps, theirs.past + theirs.steps)
        assert against_dense(model, mine, DenseCache)["kl"] == pytest.approx([0] * 8, abs=1e-9)
    with pytest.raises(TypeError):
        cases([200])                                            # another file


def test_a_directory_that_cannot_keep_anything_is_one_line(model, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot keep what dense attention read"):
        kept.save(tmp_path / "file" / "x.pt", [])

    def full(*_):
        raise RuntimeError("write failed: no space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match="no space left"):
        kept.save(tmp_path / "x.pt", [])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_dense_loses_nothing(model, case):
    found = against_dense(model, case, DenseCache)
    assert max(found["kl"]) < 1e-9 and all(found["same"])
    assert found["nll"] == pytest.approx(found["nll_dense"], abs=1e-5)
    assert found["share"] == pytest.approx(1, abs=0.01)
    heads = by_head(case, DenseCache)
    assert torch.tensor(heads["error"]).max() < 1e-4
    assert torch.tensor(heads["mass"]).min() > 0.999 and torch.tensor(heads["recall"]).min() == 1


def test_errors_mass_and_recall_are_those_of_float64(case, make):
    found, layer = by_head(case, make), 1
    (_, k, v), (q, k1, v1, _) = case.past[layer], case.steps[layer]
    keys, values = (torch.cat(x, 2)[0].double() for x in ((k, k1), (v, v1)))
    seen = [item for item in probe(case, make) if item[0] == layer]
    for head in range(4):
        error, mass, recall, h = [], [], [], head // 2
        for _, t, _, _, is_read, relative, _ in seen:
            n = case.n + t + 1
            p = (keys[h, :n] @ q[0, head, t].double() / 4).softmax(-1)
            mass.append(sum(p[i].item() for i in range(n) if is_read[h, i]))
            best = sorted(range(n), key=lambda i: -p[i])[:100]
            recall.append(sum(bool(is_read[h, i]) for i in best) / 100)
            error.append(relative[head].item())
        assert found["mass"][layer][head] == pytest.approx(sum(mass) / 10, abs=1e-4)
        assert found["recall"][layer][head] == pytest.approx(sum(recall) / 10, abs=1e-4)
        assert found["error"][layer][head] == pytest.approx(sum(error) / 10, abs=1e-4)
    dense = oracle.dense(q, keys[None], values[None])
    assert dense.shape == case.steps[layer][3].shape
    torch.testing.assert_close(dense.float(), case.steps[layer][3], rtol=1e-3, atol=1e-4)


def test_what_is_read_exactly_is_all_that_an_index_without_estimates_attends_to(case):
    config = replace(TINY, estimate=0.0, values=1.0)
    (_, k, v), (q, k1, v1, dense) = case.past[0], case.steps[0]
    keys, values = (torch.cat(x, 2)[0].double() for x in ((k, k1), (v, v1)))
    n_read = set()
    for layer, t, _, _, is_read, relative, _ in probe(case, functools.partial(wave, config)):
        for head in range(4 if layer == 0 else 0):
            kept = is_read[head // 2].nonzero()[:, 0]
            p = (keys[head // 2, kept] @ q[0, head, t].double() / 4).softmax(-1)
            true = dense[0, head, t].double()
            expected = (p @ values[head // 2, kept] - true).norm() / true.norm()
            assert relative[head].item() == pytest.approx(expected.item(), abs=1e-3)
            n_read.add(len(kept))
    assert min(n_read) > 20 and max(n_read) < 80


# ---------------------------------------------------------------- references and budgets

def scores_of(seed=0, n=64):
    torch.manual_seed(seed)
    q, k = torch.randn(1, 2, 3, 16), torch.randn(1, 2, n, 16)
    return q, k, q @ k.mT


def test_no_choice_holds_more_mass_than_the_oracle():
    q, _, logits = scores_of()
    mass = logits.softmax(-1).sum(2)
    best = (mass * fidelity.oracle(None, q, logits, 20)).sum(-1)
    assert (best >= (mass * fidelity.window(None, q, logits, 20)).sum(-1)).all()
    for seed in range(20):
        torch.manual_seed(seed)
        assert (best >= mass[..., torch.randperm(64)[:20]].sum(-1)).all()


def test_a_window_is_sink_and_latest():
    q, _, logits = scores_of()
    kept = fidelity.window(None, q, logits, 20)[0, 0].nonzero()[:, 0].tolist()
    assert kept == [0, 1, 2, 3, *range(48, 64)]


def test_pages_are_ranked_by_a_bound_of_their_products():
    q, k, logits = scores_of(n=70)
    cache = Chosen(None, 70)
    cache.k = k
    kept = fidelity.quest(cache, q, logits, 2)
    low, high = cache.bounds
    bound = torch.maximum(q[..., None, :] * low[:, :, None], q[..., None, :] * high[:, :, None])
    true = logits[..., :64].unflatten(-1, (4, 16)).amax(-1)
    assert (bound.sum(-1) >= true - 1e-5).all()
    best = bound.sum(-1).amax(2).topk(2).indices
    for h in range(2):
        pages = {i // 16 for i in kept[0, h].nonzero()[:, 0].tolist()}
        assert pages == {*best[0, h].tolist(), 4} and kept[0, h].sum() == 2 * 16 + 6


@pytest.mark.parametrize("share", [0.1, 0.2, 0.4])
@pytest.mark.parametrize("n", [2000, 4000])
def test_methods_keep_to_the_bytes_they_are_given(n, share):
    torch.manual_seed(0)
    k, v, q = (torch.randn(1, heads, n + 8, 64) for heads in (2, 2, 4))
    past = q[:, :, :1], k[:, :, :n], v[:, :, :n]
    steps = [(q[:, :, n:], k[:, :, n:], v[:, :, n:], None)]
    case = SimpleNamespace(past=[past], steps=steps, windows=[0])
    for name, make in fidelity.methods_at(share * 2 * n, n, 8, case).items():
        cache = filled(make, q[:, :, :1], k[:, :, :n], v[:, :, :n], 8)
        rows = [fidelity.rows_read(cache) for _ in fidelity.feed(
            cache, *(x[:, :, n:] for x in (q, k, v)))]
        assert sum(rows) / 8 == pytest.approx(share * 2 * n, rel=1 / 8), name
        if name in ("ours", "paper"):           # its buffers are larger than what is live
            assert max(rows) * 2 * 64 * 4 <= cache.bytes_read()


def test_too_few_bytes_for_an_index_leave_the_method_out():
    assert set(fidelity.methods_at(0.02 * 4000, 2000, 8)) == {"window", "oracle"}


def test_rows_of_ours_are_those_a_step_reads():
    torch.manual_seed(0)
    q, k, v = qkv(5008, G=1, D=64)
    past = q[:, :, :1], k[:, :, :5000], v[:, :, :5000]
    steps = [(*(x[:, :, 5000:] for x in (q, k, v)), None)]
    full = fidelity.fullness(SimpleNamespace(past=[past], steps=steps, windows=[0]), RetroConfig())
    assert 1 < full < 2
    cache = filled(functools.partial(wave, RetroConfig()), *past, 8)
    rows = [fidelity.rows_read(cache) for _ in fidelity.feed(
        cache, *(x[:, :, 5000:] for x in (q, k, v)))]
    assert sum(rows) / 8 == pytest.approx(fidelity.ours_rows(5000, 8, full), rel=0.05)


@pytest.mark.parametrize("bits", [4, 16])
def test_rows_count_the_tokens_fetched_and_numbers_by_their_bits(bits):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 1100, 64) for _ in range(3))
    config = RetroConfig(bits=bits, retrieve=0.05, estimate=0.2)
    past = q[:, :, :1], k[:, :, :-1], v[:, :, :-1]
    cache = filled(functools.partial(wave, config), *past, 1)
    fetched = []

    def attend(q, steady, index, stores, budget, method):
        def fetch(ids, ends):
            fetched.append(ends[..., -1].float().mean())
            return gather_clusters(index, stores, budget.N, ids, ends)
        cache.watch(q, steady, index, stores, budget, method)
        return tripartite_attention(q, steady, index, budget, fetch, method)
    cache.hot = PLAIN._replace(attend=attend)
    _, = fidelity.feed(cache, *(x[:, :, -1:] for x in (q, k, v)))
    clusters = (cache.index.sizes > 0).sum(-1).float().mean()
    (_, n_ranked), vector = limits_of(config, cache.n_indexed), 64 * bits / 8       # bytes
    steady, retrieved = 1100 - cache.n_indexed, fetched[0]
    n_bytes = ((2 * steady + 1.2 * retrieved) * 128 + clusters * (vector + 8) + n_ranked * vector)
    assert fidelity.rows_read(cache) * 128 == pytest.approx(n_bytes.item())


# ---------------------------------------------------------------- needles

def test_a_needle_out_of_the_window_is_not_read_and_dense_reads_it(case):
    where = torch.arange(60, 70)
    assert needle_mass(case, METHODS["dense"], where)["kept"] == pytest.approx(1)
    assert needle_mass(case, METHODS["window"], where)["kept"] == 0
    assert needle_mass(case, METHODS["window"], torch.arange(210, 220))["kept"] == pytest.approx(1)


def test_the_rank_of_a_needle_is_that_of_its_best_cluster():
    """Keys of the needle point where the query does: its cluster comes first, its opposite last."""
    torch.manual_seed(0)
    k, v, q = (torch.randn(1, heads, 200, 16) for heads in (2, 2, 4))
    k[:, :, 40:44], q[:, :, -1:] = 3.0, 0.5
    k[:, :, 80:84] = -3.0
    steps = [(q[:, :, -1:], k[:, :, -1:], v[:, :, -1:], q[:, :, -1:])]
    case = Case(None, [(q[:, :, :1], k[:, :, :-1], v[:, :, :-1])], steps, torch.zeros(1, 3), [0])
    found = needle_mass(case, METHODS["wave"], torch.arange(40, 44))
    assert found["kept"] == pytest.approx(1) and found["ranks"] == [0, 0]
    (_, _, now, _, _, _, cache), = probe(case, METHODS["wave"])
    last = cache.ranks(now[None], torch.arange(80, 84)).tolist()
    assert last == [int((cache.index.sizes[1, h] > 0).sum()) - 1 for h in range(2)]


@pytest.mark.slow
@needs_data
def test_a_needle_is_where_its_positions_say(smollm2):
    tokenizer = smollm2[1]
    for depth in (0, 50, 100):
        ids, where, n_answer = evaluate.needle_prompt(tokenizer, 1500, depth, 0)
        value = tokenizer.decode(ids[-n_answer:].tolist()).strip()
        assert len(ids) == 1500 and value.isdigit() and len(value) == 7
        said = tokenizer.decode(ids[where].tolist())
        assert said.startswith(" One of the special magic numbers for") and f"is: {value}." in said


# ---------------------------------------------------------------- results and the command line

def test_an_interval_holds_its_mean_and_narrows_with_more_values():
    torch.manual_seed(0)
    few, many = torch.randn(4, 8) + 1, torch.randn(16, 200) + 1
    for values in (few, many):
        center, low, high = tables.interval(values.tolist(), 0)
        assert low < center < high
        assert center == pytest.approx(values.mean().item(), abs=1e-6)
    width = [high - low for _, low, high in (tables.interval(x.tolist(), 0) for x in (few, many))]
    assert width[1] < width[0] / 2
    assert tables.interval(few.tolist(), 7) == tables.interval(few.tolist(), 7)


def test_keys_that_are_clustered_again_are_not_assigned_again(monkeypatch):
    asked, own = [], fidelity.PLAIN.nearest
    monkeypatch.setattr(fidelity, "PLAIN", fidelity.PLAIN._replace(
        nearest=lambda *xs: asked.append(1) or own(*xs)))
    fidelity.remembered.cache_clear()
    nearest, (x, y) = fidelity.remembered(), torch.randn(2, 1, 2, 9, 4)
    for keys in (x, y, x.clone(), x):
        assert torch.equal(nearest(keys, keys[:, :, :3]), own(keys, keys[:, :, :3]))
    assert len(asked) == 2
    fidelity.remembered.cache_clear()
    assert fidelity.remembered() is not nearest


def test_results_go_on_behind_the_last_whole_line(tmp_path):
    path, header = tmp_path / "results" / "x.jsonl", {"settings": {"steps": 3}}
    first = evaluate.Results(path, header)
    first.add("a/b", {"kl": 1})
    first.add("a/c", {"kl": 2})
    path.write_text(path.read_text()[:-5])                      # stopped while it wrote
    again = evaluate.Results(path, header)
    assert again.cells == {"a/b": {"kl": 1}}
    again.add("a/c", {"kl": 3})
    assert evaluate.Results(path, header).cells == {"a/b": {"kl": 1}, "a/c": {"kl": 3}}
    with pytest.raises(ValueError, match="made by other code or settings: remove it"):
        evaluate.Results(path, {"settings": {"steps": 4}})


@pytest.mark.slow
@needs_data
def test_a_run_that_was_stopped_goes_on_and_ends_in_tables_and_plots(
        checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "QUICK", evaluate.QUICK | {
        "depths": [50], "shares": [0.4], "errors": True})
    out = tmp_path / "x.jsonl"
    words = ["--model", str(checkpoint(max_position_embeddings=4096)), "--lengths", "1200",
             "--steps", "2", "--out", str(out)]
    assert evaluate.main([*words, "--minutes", "0"]) == 0
    assert len(out.read_text().splitlines()) == 1 and "|" not in capsys.readouterr().out
    assert evaluate.main([*words, "--parts", "texts", "--methods", "dense", "quest"]) == 0
    cells = [key for line in out.read_text().splitlines()[1:] for key in json.loads(line)]
    assert {key.split("/", 3)[3] for key in cells} == {"named/dense", "named/quest"}
    assert not (tmp_path / "x.png").exists()                    # at one budget only
    assert evaluate.main([*words, "--parts", "texts"]) == 0
    assert "needle's mass" not in capsys.readouterr().out
    assert not (tmp_path / "x-needles.png").exists()
    assert evaluate.main(words) == 0
    table = capsys.readouterr().out
    assert "| ours | " in table and "1,200 tokens, 4 texts" in table
    head, *lines = out.read_text().splitlines()
    assert json.loads(head)["settings"]["seed"] == 0 and "torch" in json.loads(head)["versions"]
    assert len({key for line in lines for key in json.loads(line)}) == len(lines) > 40
    model, tokenizer = load(words[1], device="cpu")
    ids, _, n_answer = evaluate.needle_prompt(tokenizer, 1200, 50, 0)
    hidden = model(ids[None], torch.arange(1200)[None],
                   [DenseCache(1200).prefill for _ in model.layers])
    p = model.logits(hidden)[0, -n_answer - 1:-1].softmax(-1).gather(-1, ids[-n_answer:, None])
    needle, = (cell for line in lines for key, cell in json.loads(line).items()
               if key == "needle/1200/50/dense")
    assert needle["answer"] == pytest.approx(p.mean().item(), rel=1e-3)
    for name in ("x.png", "x-needles.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    out.write_text("\n".join([head, *lines[:-1], lines[-1][:20]]))
    assert evaluate.main(words) == 0
    assert len(capsys.readouterr().err.splitlines()) == 2       # one cell anew, and where all are
    assert {**json.loads(out.read_text().splitlines()[-1])}.keys() == json.loads(lines[-1]).keys()


@needs_data
def test_numbers_that_are_given_are_those_of_ours(checkpoint, tmp_path, capsys):
    words = ["--model", str(checkpoint(max_position_embeddings=4096)), "--lengths", "1200",
             "--steps", "2", "--parts", "texts", "--methods", "ours"]
    read = {}
    for more in ([], ["--set", "values=1"], ["--set", "retrieve=1", "values=1"]):
        out = tmp_path / f"{len(more)}.jsonl"
        assert evaluate.main([*words, *more, "--out", str(out)]) == 0
        capsys.readouterr()
        first, *lines = map(json.loads, out.read_text().splitlines())
        assert first["settings"].get("config", {}) == {
            word.partition("=")[0]: 1.0 for word in more[1:]}
        read[len(more)] = lines[0]["dense/prose/1200/named/ours"]
    assert read[0]["bytes"] < read[2]["bytes"] < read[3]["bytes"]
    assert max(map(abs, read[3]["kl"])) < 1e-6 < min(read[0]["kl"])
    with pytest.raises(ValueError, match="by other code or settings"):
        evaluate.evaluate(evaluate.parse_args([*words, "--out", str(tmp_path / "2.jsonl")]))


@needs_data
def test_ruler_is_asked_of_every_method_behind_one_reading(checkpoint, tmp_path, monkeypatch):
    model, tokenizer = load(checkpoint(max_position_embeddings=4096), device="cpu")
    sample, = ruler.generate("fwe", lambda text: len(tokenizer.encode(text)), 2500, 1)
    said, score = [], ruler.score
    monkeypatch.setattr(ruler, "score", lambda name, text, refs: said.append(text) or score(
        name, text, refs))
    all_ = functools.partial(wave, RetroConfig(retrieve=1.0, values=1.0))
    methods = {"dense": DenseCache, "all": all_}
    points = evaluate.ruler_points(model, tokenizer, "fwe", sample, methods)
    prompt = torch.tensor(tokenizer.encode(ruler.ask("fwe", sample)))    # it has no chat template
    caches = [DenseCache(len(prompt) + 50) for _ in model.layers]
    tokens = list(generate(model, caches, [prompt], 50, step=eager_step))
    assert said == [tokenizer.decode(torch.cat(tokens).tolist())] * 2
    assert points == {"dense": score("fwe", said[0], sample["outputs"])} | {"all": points["dense"]}

    monkeypatch.setattr(ruler, "TASKS", {"fwe": ruler.TASKS["fwe"]})
    settings = {"ruler_lengths": [2500], "ruler_samples": 2, "dialect": "new", "seed": 0}
    results = evaluate.Results(tmp_path / "x.jsonl", {"settings": settings})
    run = evaluate.Run(model, tokenizer, settings, results)
    for job in run.jobs(["ruler"]):
        job()
    assert results.cells.keys() == {"ruler/fwe/2500/0", "ruler/fwe/2500/1"}
    for row in ("fwe", "all tasks"):
        assert re.search(rf"\| {row} \| 2,500 \| 2 \| 0.0 \| 0.0 \| \+0.0 \(",
                         tables.ruler_table(results, settings))
    evaluate.ruler_cell(run, "fwe", 150, 0)
    assert "| fwe | 150 | 0 | no sample fits |" in tables.ruler_table(
        results, settings | {"ruler_lengths": [150]})


@pytest.mark.parametrize("words,line", [
    (["--lengths", "500"], "a text of 500 tokens is nearly all in the exact window"),
    (["--lengths", "1500"], "1,500 tokens, the model's context is 64: give smaller --lengths"),
    (["--steps", "0"], "--steps is 0: give 1 to 256"),
    (["--dtype", "bfloat16"], "give --parts ruler with it"),
    (["--set", "values=1"], "other methods have the bytes of the default: give --methods ours"),
    (["--methods", "ours", "--set", "values=2"], "values is 2.0: give a number between 0 and 1"),
    (["--model", "no/such/place"], "no/such/place")], ids=lambda x: " ".join(x)[:20])
def test_bad_input_is_one_line(checkpoint, tmp_path, capsys, words, line):
    model = [] if "--model" in words else ["--model", str(checkpoint())]
    assert evaluate.main([*model, *words, "--out", str(tmp_path / "x.jsonl")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and line in said[0]


def test_other_settings_go_to_another_file():
    files = [evaluate.own_file(evaluate.settings_of(evaluate.parse_args(words)))
             for words in ([], [], ["--minutes", "9"], ["--steps", "16"], ["--full"])]
    assert len(set(files)) == 3 and files[0] == files[1] == files[2]
    ignored = (evaluate.ROOT / ".gitignore").read_text().split()
    assert {f"{file.parent.name}/" for file in files} <= {*ignored}


def test_a_missing_package_names_the_command(checkpoint, tmp_path, capsys, monkeypatch):
    def missing(name):
        raise texts.InputError("x is not installed: pip install --no-deps x==1")
    monkeypatch.setattr(texts, "read_data", missing)
    words = ["--model", str(checkpoint(max_position_embeddings=4096)), "--lengths", "1200"]
    assert evaluate.main([*words, "--out", str(tmp_path / "x.jsonl")]) == 2
    assert "pip install --no-deps x==1" in capsys.readouterr().err


@needs_data
@pytest.mark.parametrize("kind", texts.KINDS)
def test_the_halves_of_a_text_share_no_paragraph(kind):
    one, other = (texts.KINDS[kind](half) for half in ("choose", "final"))
    assert min(len(one), len(other)) > 30_000
    assert not {x for x in one.splitlines() if len(x) > 120} & set(other.splitlines())
    assert texts.KINDS[kind]("final") == other


# ---------------------------------------------------------------- ablation

def ablation_words(checkpoint, *more):
    model = checkpoint(max_position_embeddings=4096, num_hidden_layers=6)
    return ["--model", str(model), "--length", "2100", "--steps", "2", "--texts", "code", *more]


@pytest.mark.slow
def test_the_ablation_has_every_refinement_at_equal_bytes(checkpoint, monkeypatch, capsys):
    rows, show = {}, ablation.show

    def keep(kind, dense_rows, name, kl, n_rows, base):
        rows[name] = n_rows / base[1]
        show(kind, dense_rows, name, kl, n_rows, base)
    monkeypatch.setattr(ablation, "show", keep)
    assert ablation.main(ablation_words(checkpoint)) == 0
    chosen = [name for name, off in PART_II_OFF.items() if getattr(RetroConfig(), name) != off]
    removed = [f"ours without {name}" for name in chosen]
    added = [f"paper with {name}" for name in chosen]
    assert list(rows) == ["ours", *removed, "paper at the bytes of ours", "paper", *added]
    _, _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines] == list(rows)
    is_marked = {name: "not at equal bytes" in line for name, line in zip(rows, lines, strict=True)}
    assert [name for name in rows if is_marked[name]] == ["ours without bits"]
    # The index of small clusters in 16 bits alone is larger than what ours reads.
    assert rows.pop("ours without bits") > 1.1
    assert all(abs(ratio - 1) <= 0.01 for ratio in rows.values()), rows


def test_shares_of_layers_differ_by_less_than_a_cluster_and_their_mean_is_the_share():
    config = RetroConfig(retrieve=0.1)
    make = ablation.spread_over_layers(config, 2000)
    shares = torch.tensor([make(100).config.retrieve for _ in range(30)])
    cluster = config.cluster / 2000
    assert shares.max() - shares.min() < cluster
    assert shares.mean() == pytest.approx(0.1, abs=cluster / 30)


@pytest.mark.parametrize("more, line", [
    (["--length", "500"], "--length is 500: give 2,048 or more"),
    (["--length", "5000"], "5,000 tokens, the model's context is 4,096: give a smaller --length"),
    (["--steps", "0"], "--steps is 0: give 1 to 512"),
    (["--set", "values=2"], "values is 2.0: give a number between 0 and 1"),
    (["--model", "no/such/place"], "no/such/place")], ids=lambda x: " ".join(x)[:20])
def test_bad_input_of_the_ablation_is_one_line(checkpoint, capsys, more, line):
    assert ablation.main(ablation_words(checkpoint, *more)) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and line in said[0]


def test_the_ablation_refuses_a_text_that_is_too_short(checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(texts.KINDS, "code", lambda half: "x = 1\n" * 100)
    assert ablation.main(ablation_words(checkpoint)) == 2
    assert re.search(r"the text code has [\d,]+ tokens, 2,100 are needed", capsys.readouterr().err)


# ---------------------------------------------------------------- drift.py

def test_dense_attention_does_not_drift_and_likes_best_what_it_wrote(checkpoint, tmp_path, capsys,
                                                                     monkeypatch):
    """The control rows are known: no KL, and the nats that dense attention itself drew with."""
    monkeypatch.setattr(drift.texts, "ids", lambda *args: torch.arange(args[-1]) % 250 + 3)
    out, path = tmp_path / "drift.json", checkpoint(max_position_embeddings=4096)
    drift.main(["--model", str(path), "--prompt", "150", "--steps", "60", "--tokens", "40",
                "--seeds", "2", "--window", "20", "--out", str(out)])
    assert "forced: KL to dense | to 20 | to 40 | to 60" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["forced"]["dense"] == pytest.approx([0] * 3, abs=1e-9)
    assert found["free"].keys() == {"ours", "paper", "dense"}
    model = load(path, device="cpu")[0]
    case = read(model, torch.arange(211) % 250 + 3, 60)
    tokens = [list(generate(model, [DenseCache(190) for _ in model.layers], [case.ids[:151]], 40,
                            no_end(model, seed), eager_step)) for seed in range(2)]
    nats = [drift.means(drift.likelihood(model, case, torch.cat(row)), 20) for row in tokens]
    assert found["free"]["dense"] == pytest.approx(torch.tensor(nats).mean(0).tolist(), abs=1e-4)


def no_end(model, seed):
    draw = sampler(1.0, seed=seed)
    return lambda logits: draw(logits.index_fill(-1, torch.tensor(sorted(model.config.eos_ids)),
                                                 -math.inf))


@pytest.mark.parametrize("args, words", [
    (["--steps", "9000"], "the model's context is"), (["--window", "90000"], "--window is 90000")])
def test_drift_that_cannot_be_measured_is_one_line(checkpoint, capsys, args, words):
    path = checkpoint(max_position_embeddings=4096)
    assert drift.main(["--model", str(path), "--prompt", "90", "--steps", "60", *args]) == 2
    assert words in capsys.readouterr().err
