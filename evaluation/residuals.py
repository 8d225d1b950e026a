"""What the wave index loses if its store is in a few bits: KL to dense, bytes read, bytes resident.

    python -m evaluation.residuals                              # the default model
    python -m evaluation.residuals --length 4000 --texts code --json results/antkv_residuals.jsonl

A key of the store is kept as what it differs by from its cluster's centroid, and a value as what it
differs by from the cluster's mean value, with one scale a row. The index has both vectors already.
The rows are rounded when a step fetches them, so this measures quality and counts bytes; it saves
no memory. Steady tokens stay exact. ByteStore in retroinfer.py is the row "8 bits, no residuals".

With signs, a step reads of each retrieved key one bit a channel first. The keys that then weigh
most are read in full, the others count with what their signs say.
"""
import functools
import json
from dataclasses import dataclass, replace

import torch

from app.command import Parser, run_command
from evaluation import fidelity, kept, texts
from model import DEFAULT_NAME, load
from retroinfer import (
    RetroConfig,
    gather_clusters,
    owners,
    take,
    tripartite_attention,
    unpack,
    whole,
)

# Steps between levels, in standard deviations: the least squared error of normal numbers (Max).
STEPS = {1: 1.596, 2: 0.996, 4: 0.335}
SCALE = 16              # bits of a row's scale


@dataclass(frozen=True)
class Kind:
    """A store, and how a step reads it."""
    bits: int = 16              # of a number of a key or value; 16: exact
    is_residual: bool = True    # to centroids and means; else to the centre of the keys, and 0
    full: float = 1.0           # share of the retrieved keys read in full; of the others, the signs

    @property
    def name(self):
        if self.bits == 16:
            return "wave index"
        how = f"{self.bits} bits" + ("" if self.is_residual else ", no residuals")
        return how + (f", signs, {self.full:.0%} of the keys" if self.full < 1 else "")


def kept_as(x, base, bits):
    """Rows x (*, D) as a store keeps them that holds what they differ by from base."""
    return x if bits == 16 else base + rounded(x - base, bits)


def rounded(x, bits):
    """x (*, D) in whole steps, of which the row has one size."""
    if bits == 8:
        numbers, scale = whole(x, 127)
        return numbers * scale.float()[..., None]
    step = STEPS[bits] * x.square().mean(-1, keepdim=True).sqrt()
    half = 2 ** (bits - 1)
    return ((x / step.clamp(min=1e-30)).floor().clamp(-half, half - 1) + 0.5) * step


class Rounded(fidelity.Watched):
    """A wave index whose steps fetch rows of a store of `kind`."""

    def __init__(self, kind, config, capacity, batch):
        super().__init__(config, capacity, batch)
        self.kind = kind

    def watch(self, q, steady, index, stores, budget, method):
        budget = fidelity.fit(budget)

        def fetch(ids, ends):
            N = fidelity.fill(ends, budget)
            k, v, bias = gather_clusters(index, stores, N, ids, ends)
            self.fetched = None, bias[-1, :, 0] == 0
            mine = ids.gather(-1, owners(ends, N).clamp(max=ids.shape[-1] - 1))     # (B, H, N)
            v = kept_as(v, self.base(index, mine, 1), self.kind.bits)
            return self.keys(q, k, bias, self.base(index, mine, 0)), v, bias
        return tripartite_attention(q, steady, index, budget, fetch, method)

    def base(self, index, mine, of_values):
        """What rows differ from, (B, H, N, D): of their clusters `mine` (B, H, N)."""
        centre = 0 if of_values else index.centre
        if not self.kind.is_residual:
            return torch.as_tensor(centre)
        codes = take((index.centroids, index.means)[of_values], mine)
        scale = index.scales[..., of_values].gather(-1, mine)[..., None]
        return torch.cat(unpack(codes), -1) * scale.float() + centre

    def keys(self, q, k, bias, base):
        """Keys (B, H, N, D) in full, or as their signs say."""
        full, n = kept_as(k, base, self.kind.bits), int((bias == 0).sum(-1).max())
        if self.kind.full == 1:
            return full
        coarse = kept_as(k, base, 1)
        weights = (q.float() * q.shape[-1] ** -0.5 @ coarse.mT + bias).softmax(-1)  # (B, H, G, N)
        best = weights.sum(2).topk(round(self.kind.full * n)).indices
        is_full = torch.zeros_like(weights[:, :, 0], dtype=torch.bool).scatter(-1, best, True)
        return torch.where(is_full[..., None], full, coarse)


def row_cost(kind, D, values):
    """Bits that a step reads of a retrieved token, on average, over those of a 16-bit row."""
    if kind.bits == 16:
        return 1 + values
    signs = (D + SCALE) if kind.full < 1 else 0
    return (signs + (kind.full + values) * (kind.bits * D + SCALE)) / (16 * D)


def measure(model, case, config, kind):
    """A row of the table."""
    retrieved = []

    class Counted(Rounded):
        def watch(self, *args):
            o = super().watch(*args)
            retrieved.append(float(self.fetched[1].sum(-1).float().mean()))
            return o

    found = fidelity.against_dense(model, case, functools.partial(Counted, kind, config))
    D, mean = model.config.head_dim, sum(retrieved) / len(retrieved)
    dense = 2 * case.n + case.T
    rows = found["share"] * dense - mean * (1 + config.values - row_cost(kind, D, config.values))
    bits = 16 if kind.bits == 16 else kind.bits + SCALE / D
    return {"method": kind.name, "retrieve": config.retrieve, "values": config.values,
            "kl": sum(found["kl"]) / len(found["kl"]), "read": rows / dense,
            "store": (bits + (1 if kind.full < 1 else 0) / 2) / 16}


def rows(ours):
    """Yield (config, Kind): stores of fewer bits, then budgets that read as much as ours."""
    for bits in (16, 8, 4, 2):
        yield ours, Kind(bits)
    yield ours, Kind(8, is_residual=False)
    yield ours, Kind(2, is_residual=False)
    wide = replace(ours, retrieve=2 * ours.retrieve, min_retrieve=2 * ours.min_retrieve)
    yield wide, Kind(8, is_residual=False)
    yield wide, Kind(8, full=0.5)
    wider = replace(ours, retrieve=4 * ours.retrieve, min_retrieve=4 * ours.min_retrieve,
                    estimate=ours.estimate / 2, values=ours.values / 2)
    yield wider, Kind(8, full=0.2)


def parse_args(argv):
    parser = Parser(prog="python -m evaluation.residuals", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default=DEFAULT_NAME, help="name, directory or .gguf file")
    add("--texts", nargs="+", choices=texts.KINDS, default=["code", "documents"])
    add("--length", type=int, default=4000, help="tokens of a text, its steps among them")
    add("--steps", type=int, default=32, help="tokens fed one by one behind each text")
    add("--json", metavar="FILE", help="append the rows to this file")
    return parser.parse_args(argv)


def evaluate(args):
    model, tokenizer = load(args.model, torch.float32, "cpu")
    fidelity.refuse_windows(model)
    print("| text | retrieve | values | store | KL to dense | read, of dense | store, of 16 bits |")
    print("|---|---|---|---|---|---|---|")
    for kind in args.texts:
        ids = texts.ids(tokenizer, kind, "final", args.length)
        case, = kept.cases(model, tokenizer, ids, [args.length], args.steps, None)
        for config, store in rows(RetroConfig()):
            row = {"text": kind, "tokens": args.length, **measure(model, case, config, store)}
            print("| {text} | {retrieve:.3f} | {values:.2f} | {method} | {kl:.5f} | {read:.2%} | "
                  "{store:.1%} |".format(**row), flush=True)
            if args.json:
                with open(args.json, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


def main(argv=None):
    """The exit status."""
    return run_command("residuals", lambda: evaluate(parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
