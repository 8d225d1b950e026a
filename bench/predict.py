"""What a step should take on a GPU, from its launches and its bytes, written before it is measured.

    python -m bench.predict                             # tables; about a minute, no GPU
    python -m bench.predict --save results/predicted.json

Launches are counted by bench/recorder.py in an eager step at real sizes on the meta device: an
operator of PyTorch counts once. Inductor fuses most of the small ones, which is not counted.
Bytes are those of the ledger in kernels.py's docstring, with every head at its mean of retrieved
tokens, and of the model's weights. Dense attention reads K and V once.

    captured     bytes / bandwidth: one CUDA graph, whose kernels follow one another at once
    gaps         the same, 2 us for each kernel of kernels.py (a graph has gaps), and the halvings
    launched     the larger of launches x 2 us and bytes / bandwidth: the host runs ahead

Bandwidths are what a copy gets: 3.0 TB/s on an H100, 4.3 on an H200. A selection halves intervals
about 20 times. One multiprocessor a head compares all weights each time, at 1.7 GHz: 128 bytes of
them a cycle while they fit its first cache, else 64, and 0.25 us to add up and go on. This is a
model of ours, as nothing of it was measured.
"""
import functools
import re
from pathlib import Path

import torch

import kernels
from app import plan
from app.command import Parser, run_command
from bench.recorder import recorded
from bench.timing import table, write_json
from buffer import OFFLOADED, RATIO
from generate import eager_step
from retroinfer import PLAIN, RetroConfig, limits_of

MACHINES = {"H100": (3.0e12, 80), "H200": (4.3e12, 140)}        # bytes a second, GB of memory
PROGRAMS = 4 * 132                                              # of both, as kernels.programs
LAUNCH = 2e-6                                                   # seconds
HALVINGS, ROUND, CLOCK = 20, 0.25e-6, 1.7e9                     # seconds a halving, cycles a second
NEAR = 200e3                                                    # bytes of a first cache
CELLS = [(tokens, batch) for tokens in (8192, 32768, 131072, 524288, 1048576) for batch in (1, 8)]
MODEL, TOKENS = "Llama-3.1-8B", 122880


# ---------------------------------------------------------------- bytes

@functools.cache
def ledger():
    """{kernel: formulas of bytes read and written, for a head} of kernels.py's docstring, where
    some values are read."""
    parts = [{name: formulas for name, *formulas in re.findall(
        r"^    (\w+) +(\S[^:]+?) read, (.+) written$", part, re.M)}
        for part in kernels.__doc__.split("in place of these")]
    return parts[0] | parts[1]


def layer_bytes(config, tokens, batch, retro):
    """{kernel: bytes of a step of one layer} of `tokens` indexed tokens in 16 bits."""
    H, D, e = config.num_key_value_heads, config.head_dim, 2
    retrieve, ranked = (int(n) for n in limits_of(retro, torch.tensor(tokens)))
    sizes = {"G": config.num_attention_heads // H, "D": D, "e": e, "R": retrieve,
             "C": tokens // retro.cluster, "E": ranked - retrieve, "W": retro.steady,
             "N": retrieve * retro.cluster}
    sizes["M"] = -(-sizes["N"] * round(1000 * retro.values) // 1000)
    tile = kernels.tile_sizes(sizes["G"], D, e)
    BN = kernels.tile_rows(tile["BG"], tile["BD"], e)
    n_tiles = dict.fromkeys(("rank", "choose"), -(-sizes["C"] // BN))
    n_look = sum(-(-n // BN) for n in (sizes["W"], sizes["N"], ranked))
    moved = {}
    for name, formulas in ledger().items():
        sizes["S"] = max(min(-(-PROGRAMS // (batch * H)), n_tiles.get(name, n_look), 128), 1)
        moved[name] = batch * H * sum(int(eval(f"({x})", {}, sizes)) for x in formulas)
    return moved


def halving_seconds(config, tokens, batch, retro):
    """Of the two selections of a layer: of clusters, and of tokens that give values."""
    retrieve, _ = limits_of(retro, torch.tensor(tokens))
    rounds = -(-batch * config.num_key_value_heads * 4 // PROGRAMS)     # of multiprocessors
    seconds = 0
    for n in (tokens // retro.cluster, int(retrieve) * retro.cluster):
        rate = (128 if 4 * n < NEAR else 64) * CLOCK
        seconds += HALVINGS * (ROUND + 4 * n / rate)
    return rounds * seconds


def dense_bytes(config, tokens, batch):
    """K and V of one layer."""
    return 4 * batch * tokens * config.num_key_value_heads * config.head_dim


# ---------------------------------------------------------------- launches

def launches(config, tokens, hot, ratio=None):
    """(launches of a layer's cache, of a whole step), eager. ratio: of an offloaded store."""
    retro = RetroConfig(**OFFLOADED if ratio else {})
    run = plan.Run(config, tokens, cache_ratio=ratio, retro=retro)
    model, cache = plan.on_meta(config, run.dtype), plan.cache_on_meta(run)
    cache.hot, cache.is_in_store = hot, [False]
    heads, D = (config.num_attention_heads, config.num_key_value_heads), config.head_dim
    q, k = (torch.empty(1, n, 1, D, dtype=run.dtype, device="meta") for n in heads)
    counts, layer = [], []

    def counted(function, *args):
        before = len(seen.launches())
        out = function(*args)
        layer.append(len(seen.launches()) - before)
        return out

    for work in (lambda: cache.decode(q, k, k), lambda: plan_step(model, cache, counted)):
        with recorded() as seen:
            work()
            counts.append(len(seen.launches()))
    return counts[0], counts[1] + (config.num_hidden_layers - 1) * layer[0]


def plan_step(model, cache, run):
    """One step of a model of one layer."""
    token = torch.empty(1, dtype=torch.int64, device="meta")
    return eager_step.func(model, [cache], token, run)


# ---------------------------------------------------------------- time

def times(moved, n_kernels, n_launches, serial=0):
    """Milliseconds {machine: {captured, gaps, launched}} of so many bytes."""
    found = {}
    for name, (rate, _) in MACHINES.items():
        best = moved / rate
        ways = {"captured": best, "gaps": best + n_kernels * LAUNCH + serial,
                "launched": max(best, n_launches * LAUNCH)}
        found[name] = {way: 1e3 * seconds for way, seconds in ways.items()}
    return found


def layer_facts(config, retro, n_launches):
    """Predictions for one layer's attention: a list with one entry a cell."""
    facts = []
    for tokens, batch in CELLS:
        ours = layer_bytes(config, tokens, batch, retro)
        serial = halving_seconds(config, tokens, batch, retro)
        facts.append({"tokens": tokens, "batch": batch, "bytes": sum(ours.values()),
                      "dense_bytes": dense_bytes(config, tokens, batch), "parts": ours,
                      "ms": times(sum(ours.values()), len(ours), n_launches, serial),
                      "dense_ms": times(dense_bytes(config, tokens, batch), 1, 1)})
    return facts


def dense_batch(config, machine):
    """The most sequences whose dense caches fit beside the weights, nine tenths of the rest."""
    free = MACHINES[machine][1] * 1e9 - plan.weights(config)
    return int(0.9 * free / (config.num_hidden_layers * dense_bytes(config, TOKENS, 1)))


def model_facts(config, retro, n_launches):
    """Predictions for a whole step, on each machine at batch 1 and at the largest dense batch."""
    weights, layers, facts = plan.weights(config), config.num_hidden_layers, []
    weights -= 2 * config.vocab_size * config.hidden_size       # of the embedding a row is read
    for machine in MACHINES:
        for batch in (1, dense_batch(config, machine)):
            parts = layer_bytes(config, TOKENS, batch, retro)
            moved = {"ours": weights + layers * sum(parts.values()),
                     "dense": weights + layers * dense_bytes(config, TOKENS, batch)}
            n_kernels = layers * len(parts)
            serial = layers * halving_seconds(config, TOKENS, batch, retro)
            facts.append({"machine": machine, "batch": batch, "bytes": moved, "ms": {
                "ours": times(moved["ours"], n_kernels, n_launches, serial)[machine],
                "dense": times(moved["dense"], layers, n_launches)[machine]}})
    return facts


def predictions():
    """All predictions, as --save writes them."""
    config, retro, counts = plan.shape(MODEL), RetroConfig(), {}
    triton = PLAIN._replace(attend=kernels.attend,
                            tripartite_attention=kernels.tripartite_attention)
    for name, hot, ratio in (("PyTorch", PLAIN, None), ("Triton", triton, None),
                             ("offloaded", triton, RATIO)):
        counts[name] = dict(zip(("layer", "step"), launches(config, TOKENS, hot, ratio),
                                strict=True))
    return {"model": MODEL, "launches": counts,
            "layers": layer_facts(config, retro, counts["Triton"]["layer"]),
            "steps": model_facts(config, retro, counts["Triton"]["step"])}


# ---------------------------------------------------------------- for a person

def page(facts):
    """The tables."""
    counts = [[name, n["layer"], n["step"], 1] for name, n in facts["launches"].items()]
    rows = [[f"{x['tokens']:,}", x["batch"], f"{x['bytes'] / 1e6:.1f}",
             f"{x['dense_bytes'] / 1e6:.1f}", *cells(x)] for x in facts["layers"]]
    whole = [[x["machine"], x["batch"], f"{x['bytes']['ours'] / 1e9:.1f}",
              f"{x['bytes']['dense'] / 1e9:.1f}",
              *(f"{x['ms']['ours'][way]:.2f}" for way in ("captured", "gaps", "launched")),
              f"{x['ms']['dense']['captured']:.2f}",
              f"{x['ms']['dense']['captured'] / x['ms']['ours']['gaps']:.1f}"]
             for x in facts["steps"]]
    machines = [f"{name} {what}" for name in MACHINES for what in ("ms", "with gaps", "x dense")]
    return [f"Launches of {facts['model']}, batch 1, {TOKENS:,} tokens",
            table(["attention", "a layer's cache, eager", "a step, eager", "a step, captured"],
                  counts),
            "One layer's attention",
            table(["tokens", "batch", "MB", "dense MB", *machines], rows),
            f"A whole step behind {TOKENS:,} tokens, ms",
            table(["machine", "batch", "GB", "dense GB", "captured", "with gaps", "launched",
                   "dense", "times as fast"], whole)]


def cells(x):
    """A layer on each machine: ms captured, ms with gaps, and how much faster the latter is."""
    for name in MACHINES:
        ms, dense = x["ms"][name], x["dense_ms"][name]
        yield from (f"{ms['captured']:.4f}", f"{ms['gaps']:.4f}",
                    f"{dense['gaps'] / ms['gaps']:.1f}")


def main():
    parser = Parser(prog="python -m bench.predict", description=__doc__.splitlines()[0])
    parser.add_argument("--save", metavar="FILE", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    facts = predictions()
    print(*page(facts), sep="\n\n")
    if args.save:
        write_json(args.save, facts)


if __name__ == "__main__":
    raise SystemExit(run_command("bench.predict", main))
