"""LongBench: metrics against values worked out by hand; a copy of ours in the published format."""
import importlib.util
import json

import pytest
import torch

from evaluation import longbench
from evaluation.longbench import classes, code_line, cut, f1, numbers, rouge_l, score

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("rouge", "rapidfuzz"))),
    reason="needs the packages of requirements-eval.txt")


@pytest.mark.parametrize("metric, answer, truth, expected", [
    (f1, "The red house, on a hill.", "red house", 2 * 2 / (4 + 2)),
    (f1, "red red house", "red", 2 * 1 / (3 + 1)),
    (f1, "The", "an", 0.0),
    (rouge_l, "one two three four", "one three five four", 3 / 4),
    (rouge_l, "", "one", 0.0),
    (rouge_l, " . ", "one", 0.0),
    (numbers, "Paragraph 3, or 7, or 3", "Paragraph 3", 2 / 3),
    (numbers, "none", "Paragraph 3", 0.0),
    (code_line, "```python\n# a comment\nx = 1\ny = 2", "x = 1", 1.0),
    (code_line, "x = 10\n", "x = 1", round(100 * 10 / 11) / 100),
    (code_line, "# only", "x", 0.0)])
def test_metrics_are_those_of_hand(metric, answer, truth, expected):
    assert metric(answer, truth, {}) == pytest.approx(expected, abs=1e-4)


def test_a_class_counts_less_when_others_are_named_too():
    sample = {"all_classes": ["Food", "Other Food", "City", "Date"]}
    assert classes("It is a City", "City", sample) == 1
    assert classes("City or Date", "City", sample) == 0.5
    assert classes("Food", "City", sample) == 0
    assert classes("Other Food", "Other Food", sample) == 1
    assert classes("Other Food, with Food", "Other Food", sample) == 1  # a part of the true name


def test_the_best_of_several_truths_counts_and_some_tasks_look_at_one_line():
    sample = {"answers": ["Paris", "the city of Paris"]}
    assert score("hotpotqa", "Paris", sample) == 100
    assert score("triviaqa", "\nParis\nLondon", sample) == 100
    assert score("hotpotqa", "Paris\nLondon", sample) == pytest.approx(200 / 3)


def test_a_long_prompt_loses_its_middle():
    assert cut(list(range(10)), 10) == list(range(10))
    assert cut(list(range(10)), 5) == [0, 1, 7, 8, 9]


@pytest.fixture
def copy(tmp_path):
    """Two questions of one task, as the published files have them."""
    (tmp_path / "data").mkdir()
    (tmp_path / "config").mkdir()
    sample = {"input": "who?", "context": "a cat sat on the mat. " * 40, "answers": ["a cat"],
              "all_classes": None, "length": 240, "dataset": "hotpotqa"}
    (tmp_path / "data" / "hotpotqa.jsonl").write_text(f"{json.dumps(sample)}\n" * 2)
    (tmp_path / "config" / "dataset2prompt.json").write_text(
        json.dumps({"hotpotqa": "{context}\nQuestion: {input}\nAnswer:"}))
    (tmp_path / "config" / "dataset2maxlen.json").write_text(json.dumps({"hotpotqa": 6}))
    return tmp_path


def test_every_method_answers_the_questions_of_a_copy(copy, checkpoint, capsys, monkeypatch):
    seen = []
    own = longbench.answer
    monkeypatch.setattr(longbench, "answer", lambda *given: seen.append(given[4]) or own(*given))
    path = checkpoint(max_position_embeddings=4096)
    assert longbench.main([str(copy), "--model", str(path), "--length", "120"]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert [line.split(" | ")[1] for line in lines[2:5]] == ["dense", "ours", "paper"]
    assert [len(ids) for ids in seen] == [114, 114] and torch.equal(*seen)


@pytest.mark.parametrize("file, text, words", [
    ("data/hotpotqa.jsonl", "{}", "line 1 of .* is no question with input, context, answers"),
    ("data/hotpotqa.jsonl", "[1", "line 1 of .* is no question"),
    ("data/hotpotqa.jsonl", '{"input": "", "context": "", "answers": []}', "is no question"),
    ("config/dataset2prompt.json", "{", "cannot be read as JSON"),
    ("config/dataset2maxlen.json", "{}", "does not have hotpotqa"),
    ("config/dataset2maxlen.json", None, "has no dataset2maxlen.json")])
def test_a_damaged_copy_is_one_line(copy, file, text, words):
    if text is None:
        (copy / file).unlink()
    else:
        (copy / file).write_text(text)
    with pytest.raises(longbench.InputError, match=words):
        longbench.measure(longbench.parse_args([str(copy)]))
