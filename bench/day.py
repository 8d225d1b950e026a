"""All that is to be measured on a GPU, within eight minutes: what comes first is worth most.

    python -m bench.day                                 # or: make gpu-day; one H100 or H200
    TRITON_INTERPRET=1 python -m bench.day --dry-run    # tiny, each timed once; also on a CPU
    python -m bench.day --table results                 # README rows beside the predictions

Each part is a process with a time limit of its own. It writes its numbers after every one of them.
So a part that is cut, or fails, leaves what it has, and the next part begins. Writes day-PART.json,
day.json, day.md and day.png to the folder --out.

    kernels   60 s   a step against float64 at real sizes; compute-sanitizer if it is installed
    capture   60 s   a step as one CUDA graph beside the same step launched, over two index updates
    layers   120 s   a layer's attention beside SDPA; the slow compilers come last
    model    130 s   a whole model, the largest batch of dense caches and batch 1; then prefill
    offload   60 s   K and V on the host: hits and misses one after the other, or overlapped

Why so long: a process begins in 10 s. A kernel compiles in 1 to 3 s, and there are 9. A cell of
layers builds its index in about a second for each 131,072 tokens of a sequence, and its clocks take
a second. Inductor needs 30 s for the whole step, and there are three in `model`. A prefill of
122,880 tokens through four layers is 3 s.

Does not include: AnTKV, RetrievalAttention.
"""
import contextlib
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import triton

from app.command import Parser, run_command
from bench import gpu
from bench.timing import figure, table, write_json
from buffer import OFFLOADED, offload
from generate import CapturedStep, compiled_step, decode, eager_step, prefill
from retroinfer import PLAIN, InputError, WaveIndex

SECONDS = {"kernels": 60, "capture": 60, "layers": 120, "model": 130, "offload": 60}
CELLS = [(131072, 1), (131072, 8), (32768, 1), (524288, 1), (1048576, 1), (8192, 1), (32768, 8),
         (8192, 8), (524288, 8), (1048576, 8)]          # tokens, batch
LLAMA = "Llama-3-8B"
PREDICTED = Path("results/predicted.json")


# ---------------------------------------------------------------- the parts: each yields facts

def kernels_part(scope):
    """Errors of a step to float64; the sanitizer's verdict."""
    for tokens, batch in scope.cells[:2]:
        for model in scope.shapes:
            cell = gpu.Cell(scope, model, tokens, batch)
            yield "errors", cell.name | cell.check()
    if shutil.which("compute-sanitizer") and gpu.IS_GPU:
        done = subprocess.run(["compute-sanitizer", "--tool", "memcheck", sys.executable, "-m",
                               "pytest", "-q", "tests/test_kernels.py", "-k", "plain"],
                              capture_output=True, text=True, check=False)
        yield "sanitizer", {"status": done.returncode, "said": done.stdout.splitlines()[-1:]}


def capture_part(scope):
    """Whether replays of one graph answer as launched steps do, and milliseconds of each."""
    config = replace(scope.config, num_hidden_layers=scope.n_layers)
    retro = replace(scope.retro, segment=2 * scope.retro.update)
    n_read, n = scope.prefills[0] // 4, 2 * retro.update + 8        # two index updates
    model = gpu.random_model(config)
    ids = torch.randint(config.vocab_size, (n_read,), device=gpu.DEVICE)
    launched = compiled_step if gpu.IS_GPU else eager_step
    captured = CapturedStep(launched, None if gpu.IS_GPU else run_again)
    found = {}
    for name, step in (("launched", launched), ("captured", captured)):
        hot = gpu.TRITON if gpu.IS_GPU else PLAIN       # interpreted, steps take seconds
        caches = [WaveIndex(retro, n_read + n, hot=hot) for _ in model.layers]
        found[name] = answer(model, caches, ids, n, step)
        yield "steps", {"how": name, "ms": 1e3 * statistics.median(found[name][1])}
    a, b = (x[0] for x in found.values())
    yield "verdict", {"tokens": n, "same": int((a == b).sum()), "said": captured.words()}


def run_again(run):
    """In place of a CUDA graph on a CPU: a replay is a step."""
    out = torch.empty(0)

    def replay():
        logits = run()
        out.resize_(logits.shape).copy_(logits)
    return replay, out


def answer(model, caches, ids, n, step):
    """n tokens behind a text, and the seconds of each step but the first two, which compile."""
    clocks, tokens = [], []
    logits = prefill(model, caches, [ids])
    for token in decode(model, caches, logits, n, lambda x: x.max(-1).indices, step):
        tokens.append(token)
        if gpu.IS_GPU:
            torch.cuda.synchronize()
        clocks.append(time.perf_counter())
    return torch.cat(tokens), [b - a for a, b in itertools.pairwise(clocks[2:])]


def layers_part(scope):
    """A layer's attention at each size that fits; then what must be compiled."""
    bandwidth = gpu.copy_bandwidth(scope)
    yield "copy", {"bytes_per_s": bandwidth}
    for tokens, batch in scope.cells:
        if gpu.cell_bytes(scope, LLAMA, tokens, batch) < 0.9 * gpu.free_memory():
            cell = gpu.Cell(scope, LLAMA, tokens, batch)
            yield "cells", gpu.layer_facts(cell, scope.step_ms, bandwidth)
            del cell                                    # before the next one comes
            gpu.make_room()
    cell = gpu.Cell(scope, LLAMA, *scope.cells[0])
    for name, run in cell.compiled_runners().items():
        yield "compiled", cell.name | {"name": name, "ms": scope.step_ms(run)}


def model_part(scope):
    """Steps of a whole model; the index's share of a prefill."""
    for batch in (None, 1):
        yield "decode", gpu.decode_facts(scope, batch)
    gpu.make_room()
    few = replace(scope.config, num_hidden_layers=scope.n_layers)
    for tokens in scope.prefills:
        yield "prefill", gpu.prefill_facts(scope, few, tokens)


def offload_part(scope):
    """A layer's step with its store on the host, overlapped or not, beside one on the device."""
    H, G, D = scope.shapes[LLAMA]
    one = replace(scope.config, num_hidden_layers=1, num_key_value_heads=H,
                  num_attention_heads=H * G, head_dim=D)
    model, retro = gpu.random_model(one), replace(scope.retro, **OFFLOADED)
    for tokens, batch in scope.cells[:2]:
        for name in ("on the device", "one after the other", "overlapped"):
            make = gpu.retroinfer.Store if name == "on the device" else offload(
                model, tokens + 64, batch, overlap=name == "overlapped", cache_ratio=0.1)
            wave = WaveIndex(retro, tokens + 64, batch, gpu.TRITON, make)
            yield "layers", {"tokens": tokens, "batch": batch, "store": name,
                             **offloaded(wave, tokens, (H, G, D), scope.step_ms)}


def offloaded(wave, tokens, shape, step_ms):
    """Milliseconds and hit ratio of steps whose query wanders."""
    (H, G, D), batch = shape, len(wave.n_tokens)
    gpu.fill(wave, tokens, H, D)
    q, k, v = (torch.randn(batch, n, 1, D, device=gpu.DEVICE).to(gpu.DTYPE) for n in (H * G, H, H))
    walk = torch.randn(16, *q.shape, device=gpu.DEVICE).to(gpu.DTYPE)
    place = torch.zeros((), dtype=torch.int64, device=gpu.DEVICE)

    def run():
        q.add_(walk.index_select(0, place.view(1))[0], alpha=0.1)
        place.copy_((place + 1) % len(walk))
        wave.n_tokens.fill_(tokens)                     # every run is the same step
        return wave.decode(q, k, v)

    ms, facts = step_ms(run), wave.store.facts()
    if not facts:
        return {"ms": ms}
    return {"ms": ms, "hit_ratio": facts["hits"] / max(facts["asked"], 1)}


PARTS = {"kernels": kernels_part, "capture": capture_part, "layers": layers_part,
         "model": model_part, "offload": offload_part}


# ---------------------------------------------------------------- limits

def scope_of(is_dry):
    """What is measured, and how."""
    scope = gpu.TINY if is_dry else gpu.FULL
    return replace(scope, cells=scope.cells if is_dry else CELLS)


def run_part(name, scope, folder):
    """Run a part here, and write its facts after each of them."""
    facts = {}
    for kind, fact in PARTS[name](scope):
        facts.setdefault(kind, []).append(fact)
        write_json(folder / f"day-{name}.json", facts)
        print(name, kind, fact, flush=True)


def run_day(names, args):
    """Each part as a process. Writes all facts there are after each."""
    where = torch.cuda.get_device_name() if gpu.IS_GPU else "a dry run on a CPU"
    day = {"where": f"{where}, torch {torch.__version__}, Triton {triton.__version__}",
           "parts": {}}
    for name in names:
        (args.out / f"day-{name}.json").unlink(missing_ok=True)
    for name in names:
        how = run_limited(name, args)
        path = args.out / f"day-{name}.json"
        facts = json.loads(path.read_text()) if path.exists() else {}
        day["parts"][name] = how | {"limit": args.share * SECONDS[name], "facts": facts}
        write_json(args.out / "day.json", day)
        print(f"-- {name}: {how['ended']} after {how['seconds']:.0f} s", flush=True)
    return day


def run_limited(name, args):
    """How a part ended, and after how many seconds."""
    command = [sys.executable, "-m", "bench.day", "--part", name, "--out", str(args.out)]
    start = time.monotonic()
    try:
        done = subprocess.run([*command, *["--dry-run"] * args.dry_run], check=False, text=True,
                              stderr=subprocess.PIPE, timeout=args.share * SECONDS[name])
        said = done.stderr.strip().splitlines() or ["nothing"]
        ended = "done" if done.returncode == 0 else f"failed, it said: {said[-1]}"
    except subprocess.TimeoutExpired:
        ended = "cut at its limit"
    return {"ended": ended, "seconds": time.monotonic() - start}


# ---------------------------------------------------------------- for a person

def found(day, part, kind):
    """The facts of a kind, or [] where there are none."""
    return day["parts"].get(part, {}).get("facts", {}).get(kind, [])


def rows_of(day, predicted):
    """Rows of the README: what, goal, predicted, measured."""
    machine = "H100" if "H100" in day["where"] else "H200"
    rows = []
    for cell in predicted["layers"]:
        ms, dense = (cell[name][machine]["gaps"] for name in ("ms", "dense_ms"))
        rows.append([f"a layer's attention, {cell['tokens']:,} tokens x {cell['batch']}, beside "
                     "FlashAttention", "8 x" if cell["tokens"] == 131072 else "",
                     f"{dense / ms:.1f} x", measured_layer(day, cell)])
    for step in (x for x in predicted["steps"] if x["machine"] == machine):
        ms = step["ms"]["dense"]["captured"] / step["ms"]["ours"]["gaps"]
        speeds = [f"{x['speed_up']:.1f} x" for x in found(day, "model", "decode")
                  if x and (x["batch"] == 1) == (step["batch"] == 1)]
        rows.append([f"a whole step, 122,880 tokens x {step['batch']}, beside dense",
                     "" if step["batch"] == 1 else "4.5 x", f"{ms:.1f} x", *(speeds[:1] or [NOT])])
    shares = [f"{x['index_share']:.1%}" for x in found(day, "model", "prefill")]
    rows.append(["the index's share of a prefill", "5 %", "", *(shares[-1:] or [NOT])])
    return [*rows, *offload_rows(day)]


NOT = "not measured yet"


def measured_layer(day, cell):
    """How many times as fast as FlashAttention, and the share of the copy bandwidth."""
    for x in found(day, "layers", "cells"):
        if (x["tokens"], x["batch"]) == (cell["tokens"], cell["batch"]):
            speed = x["ms"]["SDPA, flash"] / x["ms"]["kernels"]
            return f"{speed:.1f} x, {x['of_bandwidth']:.0%} of copy bandwidth"
    return NOT


def offload_rows(day):
    """What the host costs, where it was measured."""
    layers, rows = found(day, "offload", "layers"), []
    for x in layers:
        near = [y["ms"] for y in layers if y["store"] == "on the device"
                and (y["tokens"], y["batch"]) == (x["tokens"], x["batch"])]
        if near and "hit_ratio" in x:
            rows.append([f"offload, {x['store']}, {x['tokens']:,} tokens x {x['batch']}, beside "
                         "all on the device", "1.15 x as long at .9 hits", "",
                         f"{x['ms'] / near[0]:.2f} x as long, {x['hit_ratio']:.2f} hits"])
    return rows


def page(day, predicted):
    """The day for a person: how each part ended, and the README's rows."""
    ends = [[name, f"{x['limit']:.0f}", f"{x['seconds']:.0f}", x["ended"]]
            for name, x in day["parts"].items()]
    return [day["where"], table(["part", "limit s", "took s", "ended"], ends),
            table(["what", "goal", "predicted", "measured"], rows_of(day, predicted))]


def plot(day, path):
    """Milliseconds of a layer's attention against tokens, batch 1."""
    cells = sorted((x for x in found(day, "layers", "cells") if x["batch"] == 1),
                   key=lambda x: x["tokens"])
    with contextlib.suppress(ModuleNotFoundError):      # without matplotlib the numbers are enough
        drawing, (axes,) = figure((6, 4))
        for name in dict.fromkeys(name for x in cells for name in x["ms"]):
            axes.loglog([x["tokens"] for x in cells], [x["ms"][name] for x in cells], marker="o",
                        label=name)
        axes.set(title="Llama-3-8B, batch 1", xlabel="tokens", ylabel="ms a layer")
        axes.legend()
        drawing.savefig(path, dpi=110)


def read(path):
    """The facts of a file. InputError if there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        raise InputError(f"there are no numbers in {path}: run bench.day, or bench.predict "
                         f"--save {PREDICTED}") from None


def parse_args():
    parser = Parser(prog="python -m bench.day", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("results"), help="where files go")
    add("--part", choices=PARTS, help="run one part here, without a limit")
    add("--table", type=Path, metavar="FOLDER", help="print the README's rows, run nothing")
    add("--share", type=float, default=1, help="of each time limit that is given")
    add("--dry-run", action="store_true", help="tiny, each timed once")
    args = parser.parse_args()
    if not (args.dry_run or args.table or gpu.IS_GPU):
        raise InputError("a CUDA GPU is needed, and torch finds none")
    if not args.out.is_dir():
        raise InputError(f"there is no folder {args.out}: make it, or give another with --out")
    return args


def main():
    args = parse_args()
    if args.part:
        torch.manual_seed(0)
        return run_part(args.part, scope_of(args.dry_run), args.out)
    predicted = read(PREDICTED)
    if args.table:
        return print(*page(read(args.table / "day.json"), predicted), sep="\n\n")
    day = run_day(list(PARTS), args)
    pages = page(day, predicted)
    (args.out / "day.md").write_text("\n\n".join([*pages, ""]))
    plot(day, args.out / "day.png")
    return print(*pages, sep="\n\n")


if __name__ == "__main__":
    raise SystemExit(run_command("bench.day", main))
