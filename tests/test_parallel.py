"""Ranks share the heads of a model, and answer as one process does."""
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from steps import LONG

import parallel
from antkv import fit_words
from app import cli
from model import load
from retrieval_attention import GraphCache, GraphConfig
from retroinfer import InputError

ROOT = Path(__file__).parent.parent
HEADS = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, **LONG}
COMMON = ["--backend", "eager", "--device", "cpu", "--dtype", "float32", "--json",
          "--max-new-tokens", "20"]
SMALL = ["--set", "segment=64", "update=16", "min_retrieve=2"]
# Several command lines one after another, for loading torch takes longer than they do.
DRIVER = """
import atexit, json, os, sys
import parallel
from app import cli
from app.command import run_command
def work():
    return sum(cli.answer(cli.parse_args(argv)) for argv in json.loads(sys.argv[1]))
# The threads of a group that stands at the end may abort the interpreter.
atexit.register(lambda: (parallel.TALK or parallel.dist.is_initialized()) and os._exit(77))
raise SystemExit(run_command("retroinfer", lambda: parallel.run(work)))
"""


# A step is traced, for Inductor is slow; then its graphs are counted.
TRACED = """
import functools
import torch
import generate
from app import choose
choose.try_compiler = lambda: None
choose.compiled_step = torch.compile(functools.partial(generate.step, run=generate.region()),
                                     backend="eager", fullgraph=True, dynamic=False)
""" + DRIVER.replace("raise SystemExit", "status = ") + """
print(*torch._dynamo.utils.counters["graph_break"], "breaks", sep="")
print(torch._dynamo.utils.counters["stats"]["unique_graphs"], "graphs")
raise SystemExit(status)
"""


# Rank 0 ends first, the others at the end of their input.
LATE = """
import sys
import parallel
from app.command import run_command
from retroinfer import InputError
def work():
    if parallel.RANK:
        sys.stdin.read()
    raise InputError("it is bad")
raise SystemExit(run_command("retroinfer", lambda: parallel.run(work)))
"""


def start(n, commands, stdin="", driver=DRIVER, torchrun=True):
    """n ranks that run command lines. With torchrun their store outlives them, else it is rank 0's.
    """
    store = parallel.dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = os.environ | {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": str(store.port), "OMP_NUM_THREADS": "1",
                           "TORCHELASTIC_USE_AGENT_STORE": str(torchrun), "PYTHONPATH": str(ROOT)}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    ranks = [subprocess.Popen([sys.executable, "-c", driver, json.dumps(commands)], text=True,
                              env=shared | {"RANK": str(rank)}, **pipes) for rank in range(n)]
    ranks[0].stdin.write(stdin)
    ranks[0].store = torchrun and store             # it lives as long as they do
    return ranks


def finish(ranks, seconds=300):
    """(exit status, standard output, standard error) of each rank."""
    try:
        return [(rank.wait(), out, err) for rank in ranks
                for out, err in [rank.communicate(timeout=seconds)]]
    finally:
        for rank in ranks:
            rank.kill()


def facts(out):
    return [json.loads(line) for line in out.splitlines() if line.startswith('{"answers"')]


@pytest.fixture
def prompt(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("".join(f"the cat {n} sat on mat {n * n % 83}, and the dog on a log. "
                            for n in range(40)), "utf-8")
    return str(path)


@pytest.fixture
def commands(checkpoint, prompt, tmp_path):
    """Command lines of each kind, of a model with 3 key heads and every bias."""
    model = checkpoint("llama", **HEADS, attention_bias=True, mlp_bias=True)
    said = ["--model", str(model), *COMMON]
    ask = ["--prompt-file", prompt, *said]
    saved = str(tmp_path / "index.safetensors")
    return [[*ask, *SMALL],
            [*ask, *SMALL, "--temperature", "1.5", "--seed", "3"],
            [*ask, *SMALL, "--offload", "--cache-ratio", "0.2"],
            [*ask, "--method", "graph", "--set", "sink=4", "local=16", "update=16", "top=16",
             "lift=yes"],
            [*ask, "--method", "antkv", "--set", "bits=1"],
            [*ask, *SMALL, "--prompt-file", prompt],
            [*ask, *SMALL, "--save-index", saved],
            [*said, *SMALL, "--load-index", saved, "--chat"]]


LINES = "what did the cat do?\nand the dog?\n"


@pytest.fixture
def expected(commands, monkeypatch, capsys, tmp_path):
    """What one process says to these command lines."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(LINES))
    for argv in commands:
        assert cli.main(argv) == 0
    return facts(capsys.readouterr().out)


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_answer_as_one_process_does(n, commands, expected, one_thread, tmp_path):
    """Of 3 key heads each rank of 2 has another number of them."""
    (status, out, err), *others = finish(start(n, commands, LINES))
    assert status == 0, err
    assert [(status, out, err) for status, out, err in others] == (n - 1) * [(0, "", "")]
    found = facts(out)
    assert len(found) == len(commands) == len(expected)
    for mine, theirs, argv in zip(found, expected, commands, strict=True):
        assert mine["answers"] == theirs["answers"], argv
        assert mine["dense_bytes_a_step"] == theirs["dense_bytes_a_step"]
    names = {path.name for path in tmp_path.glob("index*")}
    assert names == {"index.safetensors", *(f"index-{r + 1}of{n}.safetensors" for r in range(n))}


@pytest.mark.slow
def test_a_step_on_two_ranks_is_one_graph(commands, capsys, one_thread):
    assert cli.main(commands[0]) == 0
    expected = facts(capsys.readouterr().out)
    ranks = finish(start(2, [[*commands[0], "--backend", "compile"]], driver=TRACED))
    assert [status for status, *_ in ranks] == [0, 0], ranks
    out = ranks[0][1]
    assert facts(out)[0]["answers"] == expected[0]["answers"]
    assert out.splitlines()[-2:] == ["breaks", "1 graphs"]


@pytest.mark.parametrize("part", [slice(0, 1), slice(1, 3)])
def test_a_part_of_the_heads_draws_what_the_whole_layer_does(part):
    g = torch.Generator().manual_seed(0)
    x, weights = torch.randn(3, 600, 8, generator=g), torch.rand(3, 600, generator=g)
    words = fit_words(x[part], weights[part], 4, heads=(part.start, 3))
    torch.testing.assert_close(words, fit_words(x, weights, 4)[part])
    caches = [GraphCache(GraphConfig(lift=True), 64) for _ in range(2)]
    caches[0].heads = part.start, 3
    for cache, like in zip(caches, (x[part], x), strict=True):
        cache.allocate(like[None])
    assert caches[0].lift.equal(caches[1].lift[part])


# ---------------------------------------------------------------- the part of a model

@pytest.mark.parametrize("n, kind", [(2, "folder"), (3, "gguf"), (2, "quantised")])
def test_parts_of_weights_make_the_whole(n, kind, checkpoint, tmp_path, monkeypatch):
    """A rank keeps its rows and columns, converted as the whole tensor is."""
    path = checkpoint("llama", **HEADS, attention_bias=True, mlp_bias=True)
    if kind != "folder":
        import gguf
        one = gguf.GGMLQuantizationType
        path = tiny.write_gguf(tmp_path / "x.gguf", tiny.oracle(path),
                               one.F32 if kind == "gguf" else one.Q8_0)
    whole, parts = load(path, device="cpu")[0].state_dict(), []
    monkeypatch.setattr(parallel, "SIZE", n)
    for rank in range(n):
        monkeypatch.setattr(parallel, "RANK", rank)
        parts.append(parallel.load_part(path, None, "cpu")[0].state_dict())
    for name, x in whole.items():
        found, module = [part[name] for part in parts], name.split(".")[-2]
        if module in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            assert torch.cat(found).equal(x), name
        elif module in ("o_proj", "down_proj"):
            summed = sum(found) if name.endswith("bias") else torch.cat(found, 1)
            assert summed.equal(x) and found[0].is_contiguous(), name
        else:
            assert all(part.equal(x) for part in found), name


def test_more_ranks_than_key_heads_are_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(parallel, "SIZE", 4)
    with pytest.raises(InputError, match="4 ranks cannot share 3 key heads: start 3"):
        parallel.load_part(checkpoint("llama", **HEADS), None, "cpu")


@pytest.mark.parametrize("words", [["--check"], ["--max-err", "0.1"]])
def test_bars_of_some_heads_are_refused(monkeypatch, words):
    monkeypatch.setattr(parallel, "SIZE", 2)
    with pytest.raises(InputError, match=f"{words[0]} sees the heads of one process"):
        cli.parse_args(["--prompt-file", "x", *words])


def test_codebooks_of_a_file_are_refused(monkeypatch):
    monkeypatch.setattr(parallel, "SIZE", 2)
    with pytest.raises(InputError, match="--codebooks are those of one process"):
        cli.parse_args(["--prompt-file", "x", "--method", "antkv", "--codebooks", "y"])


# ---------------------------------------------------------------- when something goes wrong

@pytest.mark.slow
def test_an_error_that_all_ranks_meet_is_printed_once(tmp_path):
    ranks = finish(start(2, [["--prompt-file", str(tmp_path / "none")]]))
    assert [status for status, *_ in ranks] == [2, 2]
    said = "".join(err for *_, err in ranks)
    assert said == f"retroinfer: cannot read the prompt {tmp_path / 'none'}: No such file or " \
                   "directory\n"


@pytest.mark.slow
def test_an_error_met_when_rank_0_has_ended_is_no_traceback():
    first, late = start(2, [], driver=LATE, torchrun=False)
    assert first.wait(60) == 2 and first.stderr.read() == "retroinfer: it is bad\n"
    (status, _, err), = finish([late])
    assert status == 2 and "Traceback" not in err


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_ends_the_others_with_a_line(victim, commands):
    """Here rank 0 waits for a person, and rank 1 for rank 0."""
    ask = commands[0]
    ranks = start(2, [[*ask, "--chat", "--max-new-tokens", "3"]], "what?\n")
    ranks[0].stdin.flush()
    ranks[0].stdout.readline()                      # it has answered
    ranks[victim].kill()
    ranks[0].stdin.write("what?\n" * 3)
    begin = time.monotonic()
    (status, _, err), = finish([ranks[1 - victim]], 30)
    ranks[victim].wait()
    assert status == 2 and time.monotonic() - begin < 30
    assert re.search(rf"retroinfer: rank {1 - victim} ends, it lost another", err)
    assert "Traceback" not in err


@pytest.mark.slow
def test_under_torchrun_a_killed_rank_ends_the_run(commands):
    flags = ["--standalone", "--nproc-per-node", "2", str(ROOT / "retroinfer.py")]
    run = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *flags, *commands[0],
                            "--max-new-tokens", "2000"], text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.stdout.read(20)                      # the answer has begun
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = run.communicate(timeout=30)
    assert run.returncode and re.search(r"retroinfer: rank \d ends", err)
