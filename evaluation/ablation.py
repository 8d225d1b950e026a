"""Does each refinement pay? One is removed from ours, or one is added to the paper, at equal bytes.

    python -m evaluation.ablation                               # the default model
    python -m evaluation.ablation --model qwen.gguf --length 6000 --texts code

Dense attention reads a text once. Every variant then reads the same keys and values and is fed the
same tokens. The retrieved share of a variant is changed until a step reads as many bytes as a step
of the method that the variant is compared with, to within one per cent. So ours has no least number
of clusters here. A variant whose index alone takes more bytes is marked in the table.
"""
import functools
import itertools
from dataclasses import replace

import torch

from app.command import Parser, run_command
from app.settings import parse_settings
from evaluation import fidelity, kept, texts
from model import DEFAULT_NAME, load
from retroinfer import PART_II_OFF, InputError, RetroConfig

TRIES = 4               # retrieved shares that are tried until the bytes are equal
CLOSE = 0.01            # relative difference of bytes that counts as equal
SHORTEST = 2048         # tokens of a text: in a shorter one the paper indexes little or nothing
GOLDEN = 0.618034       # its multiples, without their whole part, are spread evenly from 0 to 1


def variants(ours):
    """{name: config}: each refinement removed alone from ours; each added alone to the paper."""
    paper = RetroConfig.paper()
    removed = {f"ours without {name}": replace(ours, **{name: value})
               for name, value in PART_II_OFF.items()}
    added = {f"paper with {name}": replace(paper, **{name: getattr(ours, name)})
             for name in PART_II_OFF}
    return removed, added


def measure(model, case, make):
    """(KL to dense, rows that a head reads in a step) of the caches that `make` makes."""
    found = fidelity.against_dense(model, case, make)
    rows = found["share"] * (2 * case.n + case.T)
    return sum(found["kl"]) / len(found["kl"]), rows


def spread_over_layers(config, n):
    """Makes a cache for each layer in turn. Some layers retrieve one cluster more than others.

    A layer retrieves a whole number of clusters, and one cluster is several per cent of the bytes.
    So each layer's share is shifted by a part of a cluster, and the mean over layers is smooth.
    """
    layers = itertools.count()

    def make(capacity, batch=1):
        shift = (next(layers) * GOLDEN) % 1 - 0.5                   # of one cluster
        share = config.retrieve + shift * config.cluster / n
        return fidelity.wave(replace(config, retrieve=min(max(share, 0.0), 1.0)), capacity, batch)
    return make


def is_close(rows, wanted):
    return abs(rows / wanted - 1) <= CLOSE


def at_rows(model, case, config, wanted):
    """(KL, rows) of a config whose retrieved share is changed until it reads so many rows."""
    kl, rows = measure(model, case, functools.partial(fidelity.wave, config))
    if is_close(rows, wanted):
        return kl, rows
    slope = (1 + config.values) * case.n                # rows for a share of 1
    share, tried = next_share(config.retrieve, rows, wanted, slope), {}
    while share not in tried and len(tried) < TRIES:
        make = spread_over_layers(replace(config, retrieve=share), case.n)
        tried[share] = measure(model, case, make)
        rows = tried[share][1]
        if is_close(rows, wanted):
            break
        if len(tried) > 1:
            slope = slope_of(tried) or slope
        share = next_share(share, rows, wanted, slope)
    return min(tried.values(), key=lambda found: abs(found[1] - wanted))


def next_share(share, rows, wanted, slope):
    return min(max(share + (wanted - rows) / slope, 1e-4), 1.0)


def slope_of(tried):
    """Rows for a share of 1, from the two latest of {share: (KL, rows)}."""
    (old, (_, old_rows)), (new, (_, new_rows)) = list(tried.items())[-2:]
    return max((new_rows - old_rows) / (new - old), 0)


def compare(model, case, ours, show):
    """Calls show(name, KL, rows, the (KL, rows) of what it is compared with) for each variant."""
    paper = RetroConfig.paper()
    for name, config, others in zip(("ours", "paper"), (ours, paper), variants(ours), strict=True):
        base = measure(model, case, functools.partial(fidelity.wave, config))
        show(name, *base, base)
        if name == "ours":
            others["paper at the bytes of ours"] = paper
        for other, changed in others.items():
            if changed != config:
                show(other, *at_rows(model, case, changed, base[1]), base)


def show(kind, dense_rows, name, kl, rows, base):
    """Prints a row of the table."""
    base_kl, base_rows = base
    mark = "" if is_close(rows, base_rows) else " (not at equal bytes)"
    print(f"| {kind} | {name} | {kl:.4f} | {rows / dense_rows:.2%} | {kl / base_kl:.2f}{mark} |",
          flush=True)


def parse_args(argv):
    parser = Parser(prog="python -m evaluation.ablation", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default=DEFAULT_NAME, help="name, directory or .gguf file")
    add("--texts", nargs="+", choices=texts.KINDS, default=["code", "documents"])
    add("--half", choices=["final", "choose"], default="final", help="of the texts")
    add("--length", type=int, default=6000, help="tokens of a text, its steps among them")
    add("--steps", type=int, default=32, help="tokens fed one by one behind each text")
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--keep", metavar="DIR", help="keep there what dense attention makes of a text")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="numbers of ours")
    return parser.parse_args(argv)


def ablate(args):
    ours = RetroConfig(**{"min_retrieve": 1} | parse_settings(args.set))
    if args.length < SHORTEST:
        raise InputError(f"--length is {args.length:,}: give {SHORTEST:,} or more")
    if not 1 <= args.steps <= SHORTEST // 4:
        raise InputError(f"--steps is {args.steps}: give 1 to {SHORTEST // 4}")
    model, tokenizer = load(args.model, getattr(torch, args.dtype), "cpu")
    if args.length > model.config.context:
        raise InputError(f"{args.length:,} tokens, the model's context is "
                         f"{model.config.context:,}: give a smaller --length")
    print("| text | method | KL to dense | bytes of dense | KL over that of ours or the paper |")
    print("|---|---|---|---|---|")
    for kind in args.texts:
        ids = texts.ids(tokenizer, kind, args.half, args.length)
        case, = kept.cases(model, tokenizer, ids, [args.length], args.steps, args.keep)
        dense_rows = 2 * case.n + case.T
        compare(model, case, ours, functools.partial(show, kind, dense_rows))


def main(argv=None):
    """The exit status."""
    return run_command("ablation", lambda: ablate(parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
