"""Does each refinement pay? One removed from ours, one added to the paper, at equal bytes.

    python -m evaluation.ablation                               # the default model
    python -m evaluation.ablation --model qwen.gguf --lengths 6000 --texts code

Dense attention reads a text once. Every variant then reads the same keys and values and is fed the
same tokens. A variant retrieves more or fewer clusters until it reads as many bytes as the method
that it is compared with, to within one per cent. So ours has no least number of clusters here.
"""
import argparse
import functools
import sys
from dataclasses import replace
from pathlib import Path

import torch

from app.settings import parse_settings
from evaluation import fidelity, texts
from model import DEFAULT_NAME, load
from retroinfer import PART_II_OFF, RetroConfig

TRIES = 4               # trials until a variant reads as many bytes
CLOSE = 0.01            # of them, what is close enough


def variants(base):
    """{name: config} of what is compared with ours: each entry of Part II removed."""
    paper = RetroConfig.paper()
    removed = {f"ours without {name}": replace(base, **{name: value})
               for name, value in PART_II_OFF.items()}
    ours = RetroConfig()
    added = {f"paper with {name}": replace(paper, **{name: getattr(ours, name)})
             for name in PART_II_OFF}
    return removed, added


def measure(model, case, config):
    """(KL to dense, rows that a head reads in a step)."""
    found = fidelity.against_dense(model, case, functools.partial(fidelity.wave, config))
    rows = found["share"] * (2 * case.n + len(case.logp))
    return sum(found["kl"]) / len(found["kl"]), rows


def at_rows(model, case, config, wanted):
    """(KL, rows) of a config whose retrieved share is changed until it reads so many rows."""
    tried = {}
    for _ in range(TRIES):
        kl, rows = measure(model, case, config)
        tried[config.retrieve] = kl, rows
        if abs(rows / wanted - 1) <= CLOSE:
            break
        config = replace(config, retrieve=next_share(tried, config, case.n, wanted))
    return min(tried.values(), key=lambda found: abs(found[1] - wanted))


def next_share(tried, config, n, wanted):
    """The retrieved share that reads so many rows: by a line through the two latest trials."""
    (share, (_, rows)), *older = reversed(list(tried.items()))
    slope = (1 + config.values) * n                 # rows for each share of the clusters
    if older and older[0][0] != share:
        slope = (rows - older[0][1][1]) / (share - older[0][0]) or slope
    return min(max(share + (wanted - rows) / slope, 1e-4), 1.0)


def compare(model, case, base, show):
    """Rows of the table for one text, as {name: (KL, KL over that of the method it varies)}."""
    removed, added = variants(base)
    for name, config, others in (("ours", base, removed), ("paper", RetroConfig.paper(), added)):
        kl, rows = measure(model, case, config)
        total = 2 * case.n + len(case.logp)
        show(name, kl, rows / total, 1.0)
        for other, changed in others.items():
            if changed == config:
                continue
            own, own_rows = at_rows(model, case, changed, rows)
            show(other, own, own_rows / total, own / kl)
        if name == "ours":
            own, own_rows = at_rows(model, case, RetroConfig.paper(), rows)
            show("paper at the bytes of ours", own, own_rows / total, own / kl)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default=DEFAULT_NAME, help="directory or .gguf file")
    add("--texts", nargs="+", choices=texts.KINDS, default=["code", "documents"])
    add("--half", choices=["final", "choose"], default="final", help="of the texts")
    add("--length", type=int, default=6000, help="tokens of a text")
    add("--steps", type=int, default=32, help="tokens fed one by one behind each text")
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="changes ours")
    args = parser.parse_args(argv)
    try:
        base = RetroConfig(**{"min_retrieve": 1} | parse_settings(args.set))
        torch.set_grad_enabled(False)
        model, tokenizer = load(args.model, getattr(torch, args.dtype), "cpu")
        print("| text | method | KL to dense | bytes of dense | KL over that of ours or the paper |"
              "\n|---|---|---|---|---|")
        for kind in args.texts:
            ids = tokenizer.encode(texts.KINDS[kind](args.half)[:12 * args.length])[:args.length]
            case = fidelity.read(model, torch.tensor(ids), args.steps)
            compare(model, case, base, functools.partial(show, kind))
    except (ValueError, ImportError) as e:
        print(f"{Path(__file__).stem}: {e}", file=sys.stderr)
        return 2
    return 0


def show(kind, name, kl, share, ratio):
    print(f"| {kind} | {name} | {kl:.4f} | {share:.1%} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
