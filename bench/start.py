"""What a newcomer meets: the first word, a busy machine, a long prompt. On a CPU.

    python -m bench.start first         # seconds to the second token, and of a whole answer
    python -m bench.start busy          # tokens a second, quiet and beside a job of two threads
    python -m bench.start long          # peak memory of a prefill of a tiny model

first: the command line as a process, with an empty cache of what is compiled and with a full one,
as it is and with --backend native, which compiles before it speaks. busy: app/threads.py at work,
and without it. --save FILE writes the numbers as JSON.
"""
import functools
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from app.command import Parser, run_command
from app.session import Session
from app.threads import Threads
from bench.timing import new_file, positive, run_section, table
from generate import CHUNK, compiled_step, hot_functions, prefill, sampler
from model import Llama, ModelConfig, load
from retroinfer import RetroConfig, WaveIndex

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples/lighthouse.txt"
STORY = "Write a long story about the keeper of the light."
BUSY = "import torch\nx = torch.randn(1200, 1200)\nwhile True: x @ x"


# ---------------------------------------------------------------- the first word

def first(args):
    """Seconds of the command line on the example, by answer, cache and backend."""
    rows, found = [], []
    for n, flags in ((16, []), (args.steps, ["--question", STORY])):
        for name, more in (("default", []), ("--backend native", ["--backend", "native"])):
            with tempfile.TemporaryDirectory() as cache:
                for state in ("empty", "full"):
                    facts = answer([*flags, *more, "--max-new-tokens", str(n)], cache)
                    found.append({"tokens": n, "backend": name, "cache": state, **facts})
                    rows.append([n, name, state, *(f"{facts[key]:.1f}" for key in (
                        "before", "prefill_s", "first_step_s", "after"))])
                    print(rows[-1], file=sys.stderr, flush=True)
    head = ["tokens", "backend", "cache", "before s", "prefill s", "second token after s",
            "whole answer after s"]
    print(table(head, rows))
    return {"runs": found}


def answer(flags, cache):
    """What a run of the command line took, with this cache directory."""
    command = [sys.executable, "retroinfer.py", "--prompt-file", str(EXAMPLE), "--json", *flags]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
                          capture_output=True, text=True, check=True)
    whole = time.perf_counter() - start
    facts = json.loads(done.stdout.splitlines()[-1])
    after = facts["decode_s"]
    kept = {name: facts[name] for name in ("prefill_s", "first_step_s", "generated_tokens",
                                           "backend")}
    return kept | {"after": after, "before": whole - facts["prefill_s"] - after}


# ---------------------------------------------------------------- a busy machine

def busy(args):
    """Speed of the default model, quiet and beside a job that takes both cores."""
    model, _ = load(device="cpu")
    ids = torch.randint(100, 40000, (args.tokens or [2000])[0:1])
    give_way = functools.partial(Threads, torch.float32)
    cases = {"quiet": (None, give_way), "quiet, threads fixed": (None, fixed_threads),
             "beside a job": (BUSY, give_way), "beside a job, threads fixed": (BUSY, fixed_threads)}
    speeds = {name: [] for name in cases}
    for _ in range(args.repeats + 1):           # the first of each compiles
        for name, (program, make) in cases.items():
            speeds[name].append(beside(program, functools.partial(speed, model, ids, make)))
    found = {name: [statistics.median(x) for x in zip(*runs[1:], strict=True)]
             for name, runs in speeds.items()}
    quiet = found["quiet, threads fixed"]
    rows = [[name, f"{read:.1f}", f"{decode:.1f}", f"{quiet[0] / read:.2f}",
             f"{decode / quiet[1]:.2f}"] for name, (read, decode) in found.items()]
    print(table(["machine", "prefill s", "tokens/s", "prefill x", "decode x"], rows))
    return found


def fixed_threads():
    """Threads that never give way."""
    return Threads(torch.float32, lambda is_one: None)


def beside(program, work):
    """work(), beside a process that runs a program."""
    other = program and subprocess.Popen([sys.executable, "-c", program])
    try:
        time.sleep(4 if other else 0)
        return work()
    finally:
        if other:
            other.kill()
            other.wait()


def speed(model, ids, make_threads):
    """(seconds of a prefill of ids, tokens a second)."""
    hot = hot_functions(torch.device("cpu"))
    session = Session(model, lambda: WaveIndex(RetroConfig(), len(ids) + 1024, hot=hot), sampler(),
                      compiled_step)
    session.threads = make_threads()
    session.read([ids])
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < 10 and n < 256:
        n += len(session.answer(8)[0]) - 1
    return session.prefill_seconds, session.speed()


# ---------------------------------------------------------------- a long prompt

def long(args):
    """Peak memory and seconds of a prefill of a tiny model, each length in its own process."""
    rows, found = [], {}
    for T in args.tokens or (32768, 65536, 131072):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[T] = one = pool.apply(peak_of_prefill, (T,))
        rows.append([f"{T:,}", f"{one['seconds']:.1f}", *(f"{one[key] / 2**20:.0f}" for key in (
            "cache", "beyond"))])
        print(rows[-1], file=sys.stderr, flush=True)
    print(f"{CHUNK:,} tokens at a time\n\n"
          f"{table(['tokens', 'prefill s', 'cache MiB', 'peak beyond it MiB'], rows)}")
    return found


def peak_of_prefill(T):
    """Seconds, bytes of the caches, and the most bytes beyond them and the model."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "context": T, "trained": T}
    model = Llama(ModelConfig(320, 64, 128, 2, 4, 2, 16, 1e-5, T, rope, False, False, False, False,
                              False, frozenset([2]))).requires_grad_(False)
    caches = [WaveIndex(RetroConfig(), T) for _ in model.layers]
    prefill(model, caches, [torch.zeros(8, dtype=torch.int64)])     # allocates
    prefill(model, [WaveIndex(RetroConfig(), 4096) for _ in model.layers],
            [torch.randint(320, (4096,))])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    prefill(model, caches, [torch.randint(320, (T - 8,))])
    cache = sum(sum(cache.nbytes().values()) for cache in caches)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": time.perf_counter() - start, "cache": cache,
            "beyond": max(peak - before - cache, 0)}


SECTIONS = {"first": first, "busy": busy, "long": long}


def main():
    parser = Parser(prog="python -m bench.start", description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--tokens", type=positive, nargs="+", help="of a prompt")
    parser.add_argument("--steps", type=positive, default=700, help="tokens of the long answer")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--save", metavar="FILE", type=new_file, help="write the numbers as JSON")
    args = parser.parse_args()
    run_section(args, SECTIONS, "SmolLM2-135M-Instruct, float32")


if __name__ == "__main__":
    raise SystemExit(run_command("bench.start", main))
