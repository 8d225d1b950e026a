"""What the benchmarks share: clocks, tables, figures, the machine's facts, and the command line.

Runners take turns, because the speed of a machine drifts: so the drift is the same for all. A time
is the median over repeats. A ratio is the median of the repeats' own ratios.
"""
import argparse
import json
import platform
import re
import statistics
import time
from pathlib import Path

import torch

from retroinfer import WaveIndex

# ---------------------------------------------------------------- time

def clock(run):
    """Seconds of one run()."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def take_turns(runners, repeats):
    """{name: seconds of each repeat} of functions. Each is called once before, which compiles."""
    for run in runners.values():
        run()
    seconds = {name: [] for name in runners}
    for _ in range(repeats):
        for name, run in runners.items():
            seconds[name].append(clock(run))
    return seconds


def speed_up(ours, theirs):
    """How many times as fast we are: the median over repeats that were run side by side."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


# ---------------------------------------------------------------- the machine

def memory_bandwidth():
    """Bytes a second of the host's memory: a compiled sum over 1 GiB, read in four streams."""
    x = torch.ones(4, 2**26)
    total = torch.compile(lambda x: (x[0] + x[1] + x[2] + x[3]).sum())
    return x.nbytes / min(take_turns({"sum": lambda: total(x)}, 7)["sum"])


def cpu_name():
    """The processor's name, and the instructions that PyTorch uses on it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    if not found:
        return platform.processor() or platform.machine()
    return f"{found[1]} ({torch.backends.cpu.get_cpu_capability()})"


def where(what):
    """One line: what is measured on which processor, with how many threads and which torch."""
    return f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}: {what}"


# ---------------------------------------------------------------- results

def table(head, rows):
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def figure(size, columns=1):
    """(figure, its axes without a frame), drawn without a screen."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    page, axes = plt.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)
    for one in axes[0]:
        one.spines[["top", "right"]].set_visible(False)
    return page, axes[0]


def write_json(path, facts):
    Path(path).write_text(json.dumps(facts, indent=1) + "\n", "utf-8")


# ---------------------------------------------------------------- caches

def keys_and_values(cache, row=0):
    """Views k, v (1, H, n, D) of the n tokens that a sequence of a cache holds, in its order."""
    n = int(cache.n_tokens[row])
    if isinstance(cache, WaveIndex):
        return cache.store.view(row, 0, n)
    return [x[row:row + 1, :, :n] for x in (cache.k, cache.v)]


# ---------------------------------------------------------------- the command line

def run_section(args, sections, what):
    """Run the section that a person chose, and write its numbers if --save asks for them."""
    place = where(what)
    print(place, flush=True)
    found = sections[args.section](args)
    if args.save:
        write_json(args.save, {"where": place, **found})


def positive(text):
    """The whole number, at least 1, that an argument says."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def new_file(text):
    """The path of a file in a folder that exists: known before a long run, not after it."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent} for {path.name}")
    return path
