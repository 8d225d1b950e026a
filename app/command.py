"""What every command shares: flags, and how a program ends.

    parser = Parser(prog="python -m app.plan")          # a wrong flag is an InputError
    raise SystemExit(run_command("plan", lambda: show(parser.parse_args())))

The exit status is 0; 2 after one line that says what was given and what to do; 130 after Ctrl-C,
143 after SIGTERM, 141 where nobody reads the output any more. A fault of this program keeps its
traceback.
"""
import argparse
import os
import signal
import sys
import warnings
from pathlib import Path

from retroinfer import InputError

MEMORY = ("can't allocate memory", "not enough memory", "out of memory")     # torch's own words


class Parser(argparse.ArgumentParser):
    """A parser whose errors are InputErrors: run_command() makes one line of them."""

    def error(self, message):
        raise InputError(message)


class Tolerant:
    """A stream for messages. A person who cannot get them still gets the answer."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self.attempt(self.stream.write, text)

    def flush(self):
        return self.attempt(self.stream.flush)

    @staticmethod
    def attempt(function, *args):
        try:
            return function(*args)
        except OSError:
            return None


def run_command(name, work):
    """The exit status of a command: that of work(), None for 0."""
    prepare_streams()
    warnings.formatwarning = lambda message, *_, **__: f"{name}: {message}\n"
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = work() or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:                 # the reader has what it wanted
        forget_output()
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (InputError, ModuleNotFoundError) as e:
        return complain(name, e)
    except OSError as e:
        forget_output()
        return complain(name, f"{e.filename or 'the output'}: {e.strerror or e}")
    except (MemoryError, RuntimeError) as e:
        if not is_of_the_machine(e):
            raise
        said = str(e).splitlines() or ["no more is said"]
        return complain(name, f"the memory or the device failed: {said[0]}")
    finally:                        # the interpreter takes itself down: nothing is left to unwind
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def is_of_the_machine(e):
    """Whether an error says that memory is short or a GPU failed."""
    import torch
    kinds = MemoryError, torch.OutOfMemoryError, torch.AcceleratorError
    return isinstance(e, kinds) or any(words in str(e) for words in MEMORY)


def read_text(path, what):
    """The text of a UTF-8 file, `what` in words; of standard input, if path is -. InputError if it
    cannot be read."""
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return raw.decode("utf-8-sig")
    except OSError as e:
        raise InputError(f"cannot read {what} {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise InputError(f"{what} {path}: not UTF-8 text (byte {e.start})") from None


def complain(name, e):
    print(f"{name}: {e}", file=sys.stderr)
    return 2


def stop(*_):
    """SIGTERM ends the program as Ctrl-C does: nothing stays half-written."""
    raise SystemExit(128 + signal.SIGTERM)


def prepare_streams():
    """Streams that take any text, and that exist."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull)        # noqa: SIM115 (it lives as long as the program)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")                # noqa: SIM115
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")        # of an encoding without these letters
        setattr(sys, name, stream)
    if not isinstance(sys.stderr, Tolerant):
        sys.stderr = Tolerant(sys.stderr)


def forget_output():
    """Make sure that the interpreter does not fail at its end, when it writes the rest of the
    output once more."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
