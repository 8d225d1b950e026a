"""How a command ends: its status, its last line, and what it leaves behind."""
import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from steps import LONG

from app import cli
from app.command import Tolerant, run_command
from retroinfer import InputError

ROOT = Path(__file__).parent.parent
FUZZ = ROOT / "tests/fuzz.py"


# ---------------------------------------------------------------- in this process

def failing(error):
    def work():
        raise error
    return work


@pytest.mark.parametrize("error, status, line", [
    (InputError("no such thing: give another"), 2, "name: no such thing: give another"),
    (ModuleNotFoundError("No module named 'x'"), 2, "name: No module named 'x'"),
    (PermissionError(13, "Permission denied", "/x"), 2, "name: /x: Permission denied"),
    (RuntimeError("can't allocate memory: you tried\nmuch"), 2,
     "name: the memory or the device failed: can't allocate memory: you tried"),
    (MemoryError(), 2, "name: the memory or the device failed: no more is said"),
    (KeyboardInterrupt(), 130, None)], ids=lambda x: type(x).__name__)
def test_what_a_person_or_a_machine_causes_is_one_line(capsys, error, status, line):
    assert run_command("name", failing(error)) == status
    assert capsys.readouterr().err == (f"{line}\n" if line else "")


@pytest.mark.parametrize("error", [ValueError("zip() argument 2 is shorter"), KeyError("x"),
                                   RuntimeError("shape mismatch"), ImportError("circular")])
def test_a_fault_of_ours_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run_command("name", failing(error))


def test_every_error_of_ours_for_a_person_is_an_input_error(checkpoint, monkeypatch, capsys):
    """A ValueError inside the command line is a fault: it is not printed as if it were a hint."""
    monkeypatch.setattr(cli, "what_is_asked", lambda *_: list(zip([1], [1, 2], strict=True)))
    prompt = str(ROOT / "examples/lighthouse.txt")
    with pytest.raises(ValueError, match="zip"):
        cli.main(["--prompt-file", prompt, "--model", str(checkpoint(**LONG)), "--beyond-context",
                  "--device", "cpu"])


def test_messages_that_nobody_can_get_cost_nothing():
    class Full:
        encoding = "utf-8"

        def write(self, *_):
            raise OSError(28, "No space left on device")
        flush = write
    stream = Tolerant(Full())
    stream.write("x"), stream.flush()
    assert stream.encoding == "utf-8"


# ---------------------------------------------------------------- as a process

@pytest.fixture
def command(checkpoint, tmp_path):
    """The words of a plain run of the tiny model."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("the cat sat on the mat and the dog sat on the log. " * 40, "utf-8")
    return [sys.executable, str(ROOT / "retroinfer.py"), "--prompt-file", str(prompt), "--model",
            str(checkpoint(**LONG)), "--device", "cpu", "--max-new-tokens", "30"]


def shell(command, redirection, **env):
    """(status, standard output, standard error) with a redirection of the shell."""
    words = " ".join(f"'{word}'" for word in command)
    done = subprocess.run(["bash", "-c", f"{words} {redirection}; exit ${{PIPESTATUS[0]}}"],
                          capture_output=True, check=False, env=os.environ | env)
    return done.returncode, done.stdout, done.stderr.decode()


def test_a_reader_that_leaves_ends_it_quietly(command):
    status, _, err = shell(command, "| head -c 0")
    assert status == 141 and "Error" not in err and "retroinfer:" not in err


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line(command):
    status, _, err = shell(command, "> /dev/full")
    assert status == 2 and err.endswith("retroinfer: the output: No space left on device\n")
    assert "Error" not in err


@pytest.mark.slow
@pytest.mark.parametrize("redirection, env", [
    ("2>&-", {}), ("2>/dev/full", {}), ("", {"PYTHONIOENCODING": "ascii"}), ("", {"LC_ALL": "C"}),
    ("", {"HOME": "/nowhere"}), ("", {"CXX": "no-such-compiler"}),
    ("</dev/null", {"ATEN_CPU_CAPABILITY": "default"})], ids=str)
def test_the_answer_comes_whatever_is_closed_full_or_missing(command, redirection, env):
    rounds = {name: x for name, x in env.items() if name == "ATEN_CPU_CAPABILITY"}
    whole = shell(command, "", **rounds)[1].decode()        # other instructions, another rounding
    status, out, err = shell(command, redirection, **env)
    assert status == 0 and "Traceback" not in err
    wanted = whole.encode("ascii", "replace") if "PYTHONIOENCODING" in env else whole.encode()
    assert out == wanted


def content(path):
    """What a file of tensors says and holds; safetensors writes the header's words in any order."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), zlib.crc32(raw[end:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM], ids=lambda x: x.name)
def test_a_stopped_run_leaves_nothing_half_written(command, tmp_path, kind):
    """At ten moments: while modules are imported, the prompt is read, the index is saved."""
    path, draw = tmp_path / "text.safetensors", random.Random(0)
    subprocess.run([*command, "--save-index", path], check=True, capture_output=True)
    whole, names, statuses = content(path), sorted(os.listdir(tmp_path)), set()
    for n in range(10):
        child = subprocess.Popen([*command, "--save-index", path], stdout=subprocess.DEVNULL,
                                 stderr=subprocess.PIPE)
        time.sleep(draw.uniform(0.1, 0.5) if n < 3 else draw.uniform(0.5, 6))
        child.send_signal(kind)
        err = child.communicate()[1].decode()
        assert "Traceback" not in err, err
        statuses.add(child.returncode)
        assert content(path) == whole and sorted(os.listdir(tmp_path)) == names
    assert statuses <= {0, 128 + kind, -kind} and statuses != {0}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM], ids=lambda x: x.name)
def test_a_signal_while_the_interpreter_ends_prints_nothing(kind):
    code = ("import atexit, os; from app.command import run_command;"
            f"atexit.register(os.kill, os.getpid(), {kind:d}); run_command('name', lambda: 0)")
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                           text=True, check=False)
    assert (child.returncode, child.stderr) == (-kind, "")


@pytest.mark.slow
def test_ctrl_c_ends_an_answer_and_a_second_one_the_chat(command):
    child = subprocess.Popen([*command, "--chat", "--max-new-tokens", "3000"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout.read(1)                                     # it speaks
    child.send_signal(signal.SIGINT)
    child.stdin.write(b"the dog\n")
    child.stdin.flush()
    while child.stdout.read(1) != b"\n":                            # the first answer ends
        pass
    assert child.stdout.read(1)                                     # and it answers the next line
    child.send_signal(signal.SIGINT)
    time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and b"Traceback" not in err


@pytest.mark.slow
def test_two_runs_at_once_share_an_empty_cache(command, tmp_path):
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    runs = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for _ in range(2)]
    said = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0] and said[0] == said[1] and said[0].strip()


# ---------------------------------------------------------------- damaged files

@pytest.mark.parametrize("n", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_files_are_refused_or_do_no_harm(n):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, FUZZ, "index", "gguf", "directory", "--n", str(n)],
                          env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("no fault\n") == 3, done.stderr[-3000:]
