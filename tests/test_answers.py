"""Methods that answer side by side, against each of them alone."""
import copy
import importlib.util
import json
import re

import pytest
import torch

from evaluation import answers, many, ruler
from generate import decode, eager_step, generate, prefill, sampler
from model import DenseCache, RingCache, load
from retrieval_attention import search

N_DOCUMENT, N_ANSWER = 1900, 12
needs_data = pytest.mark.skipif(not importlib.util.find_spec("wonderwords"),
                                reason="needs the packages of requirements-eval.txt")


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load(checkpoint(max_position_embeddings=4096), device="cpu")


def alone(model, make, document, question):
    """Ids that a method writes, greedily, to its first end token or N_ANSWER of them."""
    capacity = len(document) + len(question) + N_ANSWER
    caches = [RingCache(layer.window, capacity) if layer.window else make(capacity)
              for layer in model.layers]
    prefill(model, caches, [document])
    logits = prefill(model, caches, [question])
    return torch.cat(list(decode(model, caches, logits, N_ANSWER, sampler(), eager_step)))


@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])
def test_each_method_answers_as_it_would_alone(checkpoint, arch, monkeypatch):
    """Two questions behind one document: the first one leaves no trace."""
    monkeypatch.setattr(answers.QuickGraph, "search", staticmethod(search))     # not compiled
    model, tokenizer = load(checkpoint(arch, max_position_embeddings=4096), device="cpu")
    dice = torch.Generator().manual_seed(0)
    document, *questions = (torch.randint(3, model.config.vocab_size, (n,), generator=dice)
                            for n in (N_DOCUMENT, 30, 50))
    made = answers.methods(answers.NAMES)
    caches = answers.side_by_side(model, made, N_DOCUMENT + 50 + N_ANSWER)
    prefill(model, caches, [document])
    for ids in questions:
        found = answers.answer(model, tokenizer, made, copy.deepcopy(caches), ids, N_ANSWER)
        wanted = {name: alone(model, make, document, ids) for name, make in made.items()}
        assert found == {name: tokenizer.decode(row.tolist()) for name, row in wanted.items()}
    if arch == "llama":                         # where methods differ at all
        assert len({tuple(row.tolist()) for row in wanted.values()}) > 2


@needs_data
def test_many_questions_are_asked_of_one_text(checkpoint, loaded, tmp_path, monkeypatch, capsys):
    """Dense attention answers as behind the whole prompt, and each answer meets its own truth."""
    model, tokenizer = loaded
    seen = []
    monkeypatch.setattr(ruler, "score", lambda task, text, truths: seen.append(
        (task, text, truths)) or float(len(seen)))
    out = tmp_path / "many.json"
    words = ["--model", str(checkpoint(max_position_embeddings=4096)), "--length", "1900",
             "--questions", "2", "--methods", "qcivf", "--out", str(out)]
    assert many.main(words) == 0
    hidden = many.fit(tokenizer, 1900, "numbers")
    asked = list(many.questions(tokenizer, hidden, 2, "numbers"))
    assert len(seen) == 8 and len(asked) == 4
    for (task, ids, truths), found in zip(asked, seen[::2], strict=True):
        caches = [DenseCache(len(ids) + many.N_ANSWER) for _ in model.layers]
        said = torch.cat(list(generate(model, caches, [ids], many.N_ANSWER, step=eager_step)))
        ends = [i for i, token in enumerate(said.tolist()) if token in model.config.eos_ids]
        said = said[:ends[0] + 1] if ends else said
        assert found == (task, tokenizer.decode(said.tolist()), truths)
        whole = tokenizer.decode(ids.tolist())
        assert all(f"{key} is: {value}." in whole
                   for key, value in hidden.items() if value in truths)
    facts = json.loads(out.read_text())
    assert facts["scores"]["niah_multikey_2"] == {"dense": [1, 3], "qcivf": [2, 4]}
    assert "| niah_multiquery | qcivf | 7.0 | +1.0 |" in capsys.readouterr().out


@needs_data
def test_needles_may_be_identifiers(checkpoint):
    tokenizer = load(checkpoint(max_position_embeddings=4096), torch.float32, "cpu")[1]
    hidden = many.fit(tokenizer, 3000, "uuids")
    form = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
    assert len(hidden) >= 8 and all(map(form.fullmatch, [*hidden, *hidden.values()]))
    (task, ids, (truth,)), other = many.questions(tokenizer, hidden, 2, "uuids")
    text = tokenizer.decode(ids.tolist())
    key = next(key for key, value in hidden.items() if value == truth)
    assert task == "niah_multikey_3" and len(ids) + many.N_ANSWER <= 3000 and other[2] != [truth]
    assert text.count(key) == 3 and text.count(truth) == 1      # hidden, asked for, its opening


@pytest.mark.parametrize("words, line", [
    (["--length", "9000"], "9,000 tokens, the model's context is 4,096: give a smaller --length"),
    pytest.param(["--length", "100"], "100 tokens hold fewer than 8 needles: give more --length",
                 marks=needs_data),
    (["--methods", "best"], "invalid choice: 'best'")], ids=lambda x: x[-1][:20])
def test_a_question_that_cannot_be_asked_is_one_line(checkpoint, capsys, words, line):
    path = str(checkpoint(max_position_embeddings=4096))
    assert many.main(["--model", path, *words]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and line in said[0]
