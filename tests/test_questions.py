"""Many questions over one index: answers are those one by one, and the index is there once."""
import json
from pathlib import Path

import pytest
import torch
from steps import LONG, SMALL

from app import cli
from app.questions import read_questions, share, spread, whole_pages
from generate import decode, eager_step, prefill, sampler
from model import load
from retroinfer import RetroConfig, WaveIndex

TEXT = "the cat sat on the mat and the dog sat on the log. " * 8
QUESTIONS = ["Who sat?", "the theory of the thing that they thought" * 6, "12 cats?"]
MANY = [f"{n} cats{' more' * n}?" for n in range(16)]


@pytest.fixture
def run(capsys, checkpoint, tmp_path):
    """run(*flags): (status, standard output, standard error) of the command line, tiny model."""
    base = ["--model", checkpoint(**LONG), "--backend", "eager", "--device", "cpu", "--dtype",
            "float32", "--set", *(f"{name}={value}" for name, value in SMALL.items())]

    def run(*flags):
        status = cli.main([*map(str, base), *map(str, flags)])
        return status, *capsys.readouterr()
    (tmp_path / "text.txt").write_text(TEXT)
    index = tmp_path / "text.safetensors"
    assert run("--prompt-file", tmp_path / "text.txt", "--save-index", index,
               "--max-new-tokens", 1)[0] == 0
    run.index, run.file = index, tmp_path / "questions.txt"
    return run


@pytest.mark.parametrize("questions", [
    pytest.param(QUESTIONS, id="three"), pytest.param(QUESTIONS[:1], id="one"),
    pytest.param(MANY, id="sixteen", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("one_thread")
def test_answers_are_those_one_by_one(run, questions):
    run.file.write_text("\n\n".join(questions) + "\n")
    more = "--load-index", run.index, "--max-new-tokens", 20, "--json"
    status, out, _ = run(*more, "--questions", run.file)
    together = json.loads(out.splitlines()[-1])
    alone = [json.loads(run(*more, "--question", q)[1].splitlines()[-1]) for q in questions]
    assert status == 0
    assert together["answers"] == [facts["answers"][0] for facts in alone]
    for name in ("context_tokens", "read_tokens", "generated_tokens", "indexed_tokens", "ends"):
        assert together[name] == [facts[name][0] for facts in alone], name
    if len(questions) == 3:
        assert len(set(together["indexed_tokens"])) > 1         # each grew by itself
    if len(questions) > 1:
        assert all(f"== {q}\n{answer}" in out
                   for q, answer in zip(questions, together["answers"], strict=True))


def test_an_answer_that_ends_early_waits_for_the_others(checkpoint, one_thread):
    model, _ = load(checkpoint(**LONG), device="cpu")
    config = RetroConfig(**SMALL)
    ids = torch.randint(3, 320, (300,), generator=torch.Generator().manual_seed(0))
    asked = [ids[:9], ids[9:40], ids[40:90]]

    def answer(questions):
        caches = [WaveIndex(config, 448) for _ in model.layers]
        prefill(model, caches, [ids])
        for cache in caches:
            spread(cache, len(questions))
        logits = prefill(model, caches, questions)
        return torch.stack(list(decode(model, caches, logits, 40, sampler(), eager_step)), 1)
    alone = [answer([question])[0] for question in asked]
    object.__setattr__(model.config, "eos_ids", frozenset([int(alone[0][3])]))
    together = answer(asked)
    assert (together[0, alone[0].tolist().index(alone[0][3]):] == alone[0][3]).all()
    n = together.shape[1]
    for row, tokens in enumerate(alone[1:], 1):
        stop = (tokens[:n] == alone[0][3]).nonzero().flatten().tolist() or [n]
        assert together[row, :stop[0]].equal(tokens[:stop[0]])


def used():
    """Bytes of memory that this process has, with its share of what is mapped more than once."""
    rows = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(row.split()[1]) for row in rows if row.startswith("Pss:"))


def test_sixteen_sequences_take_the_memory_of_one():
    config, capacity = RetroConfig(), whole_pages(RetroConfig(), 8000)
    cache = WaveIndex(config, capacity)
    for _ in range(3):
        cache.prefill(None, *(torch.randn(1, 8, 2500, 64) for _ in "kv"))
    before, one = used(), sum(cache.nbytes().values())
    steady = 15 * cache.nbytes()["steady zone"]
    spread(cache, 16)
    grown = used() - before
    assert cache.store.k.shape[0] == 16 and cache.store.k[15].equal(cache.store.k[0])
    assert one > 30e6 and grown - steady < 0.2 * one


def test_what_a_sequence_writes_no_other_sees():
    x = share(torch.arange(4096.0)[None], 3)
    x[1, 7] = -1
    assert x[:, 7].tolist() == [7, -1, 7] and x[2].equal(torch.arange(4096.0))
    assert share(torch.ones(1, 3, dtype=torch.bfloat16), 2).equal(torch.ones(2, 3).bfloat16())


def test_a_question_is_a_line(tmp_path):
    path = tmp_path / "q"
    path.write_bytes("Who wrote\u2028this?\r\n\n When?\f \x85no\n".encode())
    assert read_questions(path) == ["Who wrote\u2028this?", "When?\f \x85no"]


@pytest.mark.parametrize("flags, words", [
    (["--questions", "FILE"], "give --load-index"),
    (["--questions", "FILE", "--load-index", "INDEX", "--question", "a"], "leave out --question"),
    (["--questions", "FILE", "--load-index", "INDEX", "--chat"], "leave out --chat"),
    (["--questions", "nowhere", "--load-index", "INDEX"], "cannot read the questions nowhere"),
    (["--questions", "EMPTY", "--load-index", "INDEX"], "give one question a line"),
    (["--questions", "BYTES", "--load-index", "INDEX"], "not UTF-8"),
    (["--questions", "FILE", "--load-index", "INDEX", "--capacity", "20"], "--capacity is 20")])
def test_what_cannot_be_asked_is_one_line(run, tmp_path, flags, words):
    run.file.write_text("Who?\n")
    (tmp_path / "empty").write_text("\n \n"), (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    names = {"FILE": run.file, "INDEX": run.index, "EMPTY": tmp_path / "empty",
             "BYTES": tmp_path / "bytes"}
    status, out, err = run(*(names.get(x, x) for x in flags))
    assert status == 2 and out == "" and words in err
    assert err.count("\n") == 1 and "Traceback" not in err
