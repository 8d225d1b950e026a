"""All methods of this project on one page: KL to dense, against bytes read and bytes resident.

    python -m evaluation.pareto                 # four texts of 4,096 tokens: results/pareto.json
    python -m evaluation.pareto --kinds code --length 8000 --out results/pareto-code.json

All methods read a text side by side (answers.py). Attention to the prompt is exact, and the same
for all. Then they are fed the same tokens one by one, and their logits are compared with those of
dense attention.
Each method is measured at several budgets. AnTKV makes its codebooks from the text itself.

Bytes are those of live rows of K, V and index, and of codes and codebooks; a number counts 16 bits,
unless a method keeps fewer. Resident is what a method keeps anywhere, also what it can bring from a
host. Read is what the last step needs: of what the query heads of a kv head read, the union.

    H kv heads   G query heads per kv head   D head dim   n tokens
"""
import functools
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from antkv import CHANNELS, AnchorCache, AnchorConfig
from app.command import Parser, run_command
from bench.timing import positive, table, where, write_json
from evaluation import fidelity, texts
from evaluation.answers import side_by_side
from generate import eager_step, prefill
from model import DEFAULT_NAME, DenseCache, load
from retrieval_attention import GraphCache, GraphConfig, search
from retroinfer import InputError, RetroConfig, WaveIndex

OUT = Path(__file__).parent.parent / "results" / "pareto.json"
HEAD = ["method", "budget", "bytes read", "bytes resident", "KL to dense"]
TIMES = 0.5, 1, 2, 4                    # of the default budget
SHARES = 0.06, 0.12, 0.25               # of the tokens, for methods without a default
ID = 2                                  # a row's number has 32 bits: two numbers
TICKS = 5, 10, 20, 50, 100              # per cent
LEAST = 2048                            # tokens before the steps: of fewer, some methods index none


# ---------------------------------------------------------------- methods and their budgets

class Counted(GraphCache):
    """A GraphCache that remembers what its latest step found."""

    def search(self, *args):
        self.found = search(*args)
        return self.found


def methods(n, D):
    """{(name, budget): function that makes its cache} for texts of n tokens and heads of D dims.
    Dense is the first."""
    ours, graph = RetroConfig(), GraphConfig(index="qcivf")
    waves = {"ours": ours, "ours, 8 bits": replace(ours, store_bits=8),
             "paper": RetroConfig.paper()}
    made = {("dense", "all"): DenseCache}
    for times in TIMES:
        made |= {(name, f"{times:g}x"): functools.partial(fidelity.wave, wider(config, times))
                 for name, config in waves.items()}
        made["qcIVF", f"{times:g}x"] = functools.partial(
            Counted, replace(graph, visits=int(times * graph.visits)))
    made["graph", "1x"] = functools.partial(Counted, GraphConfig())
    for share in SHARES:
        for choose in fidelity.oracle, fidelity.window:
            made[choose.__name__, f"{share:.0%}"] = functools.partial(
                fidelity.Chosen, functools.partial(choose, n=round(share * n)))
    for bits, channels in CHANNELS.items():
        if D % max(channels) == 0:
            made["AnTKV", "1 bit" if bits == 1 else f"{bits:g} bits"] = functools.partial(
                AnchorCache, AnchorConfig(bits))
    return made


def wider(config, times):
    """A RetroConfig that retrieves so many times as many clusters."""
    return replace(config, retrieve=times * config.retrieve,
                   min_retrieve=max(round(times * config.min_retrieve), 1))


# ---------------------------------------------------------------- bytes, as shares of dense

def read_share(cache):
    """Bytes that the latest step of a cache needed, over those of dense attention."""
    if isinstance(cache, AnchorCache):
        return cache.true_bits() / 16
    rows = graph_rows(cache) if isinstance(cache, Counted) else fidelity.rows_read(cache)
    return rows / (2 * int(cache.n_tokens[0]))


def graph_rows(cache):
    """Rows of D numbers that the latest step read for one head, on average over heads."""
    c, found, (n_lists, P) = cache.config, cache.found, cache.index.lists.shape[2:]
    G, D = found.rows.shape[2], cache.index.centroids.shape[3]
    compared = (found.seen[0, ..., :-1] >= 0).any(1).sum(-1).float().mean().item()
    attended = sum(len(rows.unique()) for rows in found.rows[0]) / len(found.rows[0])
    n_steady = int(cache.n_tokens[0] - cache.n_indexed[0])
    ids = min(c.visits if c.index == "qcivf" else c.fallback, n_lists) * P
    ids += c.hops * c.width * c.degree if c.index == "graph" else 0
    return 2 * n_steady + compared + attended + n_lists + G * ids * ID / D


def resident_share(cache):
    """Bytes that a cache keeps, over those of dense attention."""
    n = int(cache.n_tokens[0])
    if isinstance(cache, AnchorCache):
        return cache.true_bits() / 16
    if isinstance(cache, WaveIndex):
        clusters = (cache.index.sizes[0] > 0).sum(-1).float().mean().item()
        steady, whole = int(n - cache.n_indexed[0]), replace(cache.config, values=1.0)
        rows = fidelity.wave_rows(whole, steady, n - steady, clusters, clusters,
                                  cache.k_steady.shape[3])
        return rows / (2 * n)
    if isinstance(cache, Counted):
        index, D = cache.index, cache.index.centroids.shape[3]
        ids = index.lists[0, 0].numel() + n * index.neighbours.shape[3] + index.entries.shape[2]
        return 1 + (index.lists.shape[2] + ids * ID / D) / (2 * n)
    if isinstance(cache, fidelity.Chosen) and cache.choose.func is fidelity.window:
        return fidelity.rows_read(cache) / (2 * n)          # the others may be forgotten
    return 1.0


# ---------------------------------------------------------------- measuring

def measure(model, ids, made, n_steps):
    """Yield (method, budget, share read, share resident, KL) behind a text ids (N,), the last
    n_steps + 1 of which are steps: the last one is not read."""
    n = len(ids) - n_steps - 1
    caches = side_by_side(model, made, len(ids))
    prefill(model, caches, [ids[:n]], n)
    total, room = torch.zeros(len(made), dtype=torch.float64), 0
    for token in tqdm(ids[n:-1], unit="step", leave=False):
        room = room or min(cache.update() for cache in caches)
        logits = eager_step(model, caches, token.expand(len(made)))
        logs, room = logits.double().log_softmax(-1), room - 1                  # (methods, V)
        total += (logs[0].exp() * (logs[0] - logs)).sum(-1)
    wide = [layer.caches for layer in caches if not layer.window]
    for i, name in enumerate(made):
        shares = [(read_share(layer[i]), resident_share(layer[i])) for layer in wide]
        read, resident = torch.tensor(shares).mean(0).tolist()
        yield *name, read, resident, total[i].item() / n_steps


def mean_rows(found):
    """The mean rows over texts, of a list of rows for each text."""
    return [[*same[0][:2], *(sum(x) / len(x) for x in list(zip(*same, strict=True))[2:])]
            for same in zip(*found, strict=True)]


def draw(rows, title, path):
    """Two panels: a line for each method over its budgets."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, column, label in zip(panels, (2, 3), HEAD[2:4], strict=True):
        for name in dict.fromkeys(row[0] for row in rows[1:]):
            mine = sorted([100 * row[column], row[4]] for row in rows if row[0] == name)
            axes.plot(*zip(*mine, strict=True), "o-", label=name, markersize=4)
        axes.set(xscale="log", yscale="log", xlabel=f"{label}, % of dense")
        axes.set_xticks(TICKS, TICKS)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="KL to dense, nats a token", title=title)
    panels[1].legend(frameon=False, fontsize=8, loc="lower left")
    figure.savefig(path, dpi=120)


def run(args):
    if args.length - args.steps < LEAST:
        raise InputError(f"{args.length - args.steps:,} tokens before the steps are too few: give "
                         f"{LEAST:,} or more")
    model, tokenizer = load(args.model, torch.float32, "cpu")
    if args.length > model.config.context:
        raise InputError(f"{args.length:,} tokens, the model's context is "
                         f"{model.config.context:,}: give a smaller --length")
    found, made = {}, methods(args.length, model.config.head_dim)
    for kind in args.kinds:
        ids = texts.ids(tokenizer, kind, "final", args.length)
        found[kind] = list(measure(model, ids, made, args.steps))
    rows = mean_rows(found.values())
    print(table(HEAD, [[*row[:2], *(f"{x:.1%}" for x in row[2:4]), f"{row[4]:.4f}"]
                       for row in rows]))
    facts = {"machine": where("quality only"), "model": str(args.model), "tokens": args.length,
             "steps": args.steps, "columns": HEAD, "mean": rows, "texts": found}
    write_json(args.out, facts)
    draw(rows, f"{args.length:,} tokens, {len(found)} texts", args.out.with_suffix(".png"))


def parse_args(argv):
    parser = Parser(prog="python -m evaluation.pareto", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default=DEFAULT_NAME, help="name, directory or .gguf file")
    add("--kinds", nargs="+", choices=texts.KINDS, default=list(texts.FOUR), help="of texts")
    add("--length", type=positive, default=4096, help="tokens of a text, its steps among them")
    add("--steps", type=positive, default=32, help="tokens fed one by one behind each text")
    add("--out", type=Path, default=OUT, help="results, as JSON; the plot goes beside it")
    return parser.parse_args(argv)


def main(argv=None):
    """The exit status."""
    return run_command("pareto", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
