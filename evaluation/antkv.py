"""What a vector-quantised cache loses: KL to dense attention and perplexity, against true bits.

    python -m evaluation.antkv --calibrate books.safetensors --bits 1      # codebooks of a model
    python -m evaluation.antkv --json results/antkv.jsonl                   # the table

Two modes. In "first", a text is read in chunks of as many tokens as the window, and each chunk
reads the tokens before it from codes, as in the perplexity runs of the paper. In "prefill", a
prompt is read exactly in one chunk, and what follows reads it from codes. Both are teacher-forced.
Perplexity is that of the tokens behind the first SKIP, or behind the prompt.

Calibration texts are never evaluation texts: Python's language reference (pydoc_data), modules of
the standard library that texts.py does not use, and random identifiers.

Baselines: 16 bits; keys per channel and values per token in 4 and 2 bits, in groups of 32 numbers
(as in KIVI); keys and values rotated, then 2 bits per token (as in OSCAR); FP8 (e4m3) with a scale
a token; codebooks without weights. Behind a prompt, AnTKV is also measured with codebooks that the
prompt makes for itself. All keep the same sink and window exact, so OSCAR has fewer
exact tokens here than its 64 first and 256 latest. True bits count codes, scales, exact tokens, and
codebooks or rotations of this one text, over all numbers of K and V.
"""
import functools
import importlib
import inspect
import itertools
import json
import math
import random
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

import antkv
from antkv import AnchorCache, AnchorConfig
from app.command import Parser, run_command
from app.snapshot import check_place, origin
from evaluation import texts
from evaluation.answers import hear
from evaluation.fidelity import refuse_windows
from model import DEFAULT_NAME, DenseCache, fast_dtype, load
from retroinfer import InputError, attend_causally

PIECE = 2048        # tokens of a calibration text, as in Coupled Quantization
MODULES = ("statistics", "textwrap", "heapq", "shelve", "inspect", "pathlib", "csv", "difflib")
GROUP = 32          # numbers of a group that share a scale and a zero
CLIP = 0.6          # of the range of 64 to 128 normal numbers: 2 bits of it have the least error
SKIP = 512          # tokens of a text whose perplexity is not counted in mode "first"
OWN = "own codebooks"   # of rows in which a prompt makes its own codebooks
FINE = 32           # tokens that are read together behind a prompt in mode "prefill"


# ---------------------------------------------------------------- calibration

def calibration_pieces(tokenizer, n):
    """n texts of PIECE token ids: of eight, four are prose, three are code, one has identifiers."""
    topics = importlib.import_module("pydoc_data.topics").topics
    prose = tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics)))
    sources = (inspect.getsource(importlib.import_module(name)) for name in MODULES)
    code, dice = tokenizer.encode("\n\n".join(sources)), random.Random(0)
    found = []
    for i in range(n):
        if i % 8 == 7:
            ids = tokenizer.encode("\n".join(identifier(dice) for _ in range(PIECE // 8)))
            start = 0
        else:
            ids = prose if i % 8 < 4 else code
            start = (len(ids) - PIECE) * i // n
        found.append(torch.tensor(ids[start:start + PIECE]))
    return found


def identifier(dice):
    """A line with a random identifier and a random number, as in needle tests."""
    word = dice.randbytes(16).hex()
    return f"{word[:8]}-{word[8:12]}-{word[12:16]}-{word[16:]}: {dice.randrange(10**7)}"


def codebooks(heard, bits, is_weighted=True, most=4096):
    """The Codebook of each layer from what antkv.listen heard, of up to `most` of its tokens."""
    books, dice = [], torch.Generator().manual_seed(0)
    for layer in heard:
        some = torch.randperm(layer[0].shape[1], generator=dice)[:most]
        k, v = (x[:, some] for x in layer[:2])                              # (H, n, D)
        score = layer[2][..., some] if is_weighted else torch.ones(2, k.shape[0], len(some))
        books.append(antkv.fit_codebook(k, v, score, bits))
    return books


def calibrate(args, model, tokenizer):
    """Write codebooks to a file."""
    bits = args.bits[0]
    heard = antkv.listen(model, calibration_pieces(tokenizer, args.pieces), tqdm)
    books = codebooks(heard, bits)
    antkv.save_codebooks(args.calibrate, books, origin(model, tokenizer), bits)
    print(f"{args.calibrate}: codebooks of {len(books)} layers, {bits:g} bits")


# ---------------------------------------------------------------- baselines

class RoundTrip(DenseCache):
    """A dense cache in which tokens past the window become what change(k, v) makes of them, GROUP
    at a time. words: how many numbers calibration made for it."""

    def __init__(self, change, config, capacity, words=0):
        super().__init__(capacity)
        self.change, self.config, self.done, self.words = change, config, config.sink, words

    def prefill(self, q, k, v, row=0):
        o = super().prefill(q, k, v, row)
        n = int(self.n_tokens[0]) - self.config.window - self.done
        end = self.done + max(n, 0) // GROUP * GROUP
        if end > self.done:
            part = slice(self.done, end)
            self.k[:, :, part], self.v[:, :, part] = self.change(self.k[:, :, part],
                                                                 self.v[:, :, part])
            self.done = end
        return o

    def true_bits(self, bits):
        n = int(self.n_tokens[0])
        past = bits + (16 - bits) * (n - self.done + self.config.sink) / n
        return past + 8 * self.bytes_held()["codebooks"] / numbers_of(self)

    def bytes_held(self):
        return {"codebooks": 2 * self.words}


def uniform(x, bits, dim, size=GROUP, clip=1.0):
    """x in whole steps from the least to the largest of `size` numbers along dim. clip: the part of
    that range, in its middle, that the steps cover."""
    groups, most = x.unflatten(dim, (-1, size)), 2**bits - 1
    low, high = groups.amin(dim, keepdim=True), groups.amax(dim, keepdim=True)
    least = low + (1 - clip) / 2 * (high - low)
    step = (clip * (high - low) / most).clamp(min=1e-8)
    levels = ((groups - least) / step).round().clamp(0, most)
    return (levels * step + least).flatten(dim - 1, dim)


def kivi(bits, k, v):
    """Keys per channel, values per token."""
    return uniform(k, bits, -2), uniform(v, bits, -1)


def rotated(bits, clip, rotations, k, v):
    """Keys and values per token, in the bases of rotations (2, H, D, D). A row is one group."""
    return [uniform(x @ r, bits, -1, x.shape[-1], clip) @ r.mT
            for x, r in zip((k, v), rotations, strict=True)]


def fit_rotations(model, pieces, show=iter):
    """Rotations (2, H, D, D) of each layer's keys and values, of all pieces of text ids (n,).

    As OSCAR was published (Zhou et al., arXiv 2605.17757): the eigenbasis of the mean of q·qᵀ for
    keys, and of the outputs' o·oᵀ for values, then a Hadamard rotation. Two parts of OSCAR are left
    out. A permutation of channels among groups changes nothing where a row is one group. Clipping
    thresholds fitted to calibration text are one number here, CLIP.
    """
    sums = [0] * len(model.layers)

    def attend_and_add(layer, q, k, v):
        o = attend_causally(q, k, v)
        rows = torch.cat([q, o]).unflatten(1, (k.shape[1], -1)).flatten(2, 3)   # (2, H, G*n, D)
        sums[layer] = sums[layer] + rows.mT @ rows
        return o

    for ids, positions in antkv.placed(model, show(pieces)):
        attends = [functools.partial(attend_and_add, layer) for layer in range(len(sums))]
        model(ids[None], positions, attends)
    return [torch.linalg.eigh(x).eigenvectors @ hadamard(x.shape[-1]) for x in sums]


def hadamard(n):
    """A rotation (n, n) that spreads each of n channels evenly over all; where n is no power of 2,
    over blocks of channels, the largest power of 2 that divides n."""
    h = torch.ones(1, 1)
    while n % (2 * len(h)) == 0:
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2), h)
    return torch.block_diag(*[h] * (n // len(h)))


def fp8(k, v):
    scales = (x.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 448 for x in (k, v))
    pairs = zip((k, v), scales, strict=True)
    return [(x / scale).to(torch.float8_e4m3fn).float() * scale for x, scale in pairs]


# ---------------------------------------------------------------- measuring

class Told(AnchorCache):
    """An AnchorCache that is told the scores of its first prompt: they depend neither on bits nor
    on the share of anchors, and take most of the time."""
    told = None

    def received(self, q, k, first):
        told, self.told = self.told, None
        return super().received(q, k, first) if told is None else told[:, first:]


def follow(model, ids, attends, start, size):
    """Yield (first place, hidden states (n, hidden)) of ids (T,) from `start` on, `size` at a time.
    """
    for first in range(start, len(ids), size):
        part = ids[first:first + size]
        positions = torch.arange(first, first + len(part))
        yield first, model(part[None], positions[None], attends)[0]


def compare(model, case, attends, first, size):
    """Means, over the tokens from `first` on, of KL to dense and of negative log-likelihood: of
    dense, of what attends. They read `size` tokens at a time."""
    sums, start = torch.zeros(3, dtype=torch.float64), SKIP if first == 0 else first
    for at, hidden in follow(model, case.ids[:-1], attends, first, size):
        if at < start:
            continue
        end = at + len(hidden)
        p, q = (model.logits(x).log_softmax(-1) for x in (case.hidden[at:end], hidden))
        after = case.ids[at + 1:end + 1, None]
        sums += torch.stack([(p.exp() * (p - q)).sum(), -p.gather(-1, after).sum(),
                             -q.gather(-1, after).sum()]).double()
    return (sums / (len(case.ids) - 1 - start)).tolist()


# ---------------------------------------------------------------- the table

def baselines(model, config, capacity, rotations):
    """Yield (name, function that makes the caches, bits of a number past the window)."""
    def caches(changes, words=0):
        return [RoundTrip(change, config, capacity, words) for change in changes]
    D, n = model.config.head_dim, len(model.layers)
    made = {"16 bits": (lambda k, v: (k, v), 16), "FP8": (fp8, 8 + 16 / D),
            **{f"uniform {bits} bits": (functools.partial(kivi, bits), bits + 32 / GROUP)
               for bits in (4, 2)}}
    for name, (change, bits) in made.items():
        yield name, functools.partial(caches, [change] * n), bits
    changes = [functools.partial(rotated, 2, CLIP, x) for x in rotations]
    words = 2 * model.config.num_key_value_heads * D * D
    yield "rotated 2 bits", functools.partial(caches, changes, words), 2 + 32 / D


def vector_quantised(heard, args):
    """The same, with bits of a code: of codebooks without weights, of AnTKV, and of AnTKV with
    codebooks that a prompt makes for itself."""
    def caches(books, config):
        return [Told(config, args.length, 1, book) for book in books]
    for bits, kind in itertools.product(args.bits, ("unweighted", "AnTKV", OWN)):
        books = [None] * len(heard) if kind == OWN else codebooks(heard, bits, kind == "AnTKV")
        for share in args.anchors[:1] if kind == "unweighted" else args.anchors:
            make = functools.partial(caches, books, AnchorConfig(bits, share))
            yield f"{kind} {bits:g} bits, {share:.2%} anchors", make, bits


@dataclass
class Case:
    """A text as dense attention reads it."""
    kind: str
    ids: torch.Tensor       # (T,)
    hidden: torch.Tensor    # (T, hidden)
    layers: list            # each layer's q (1, H*G, T, D), k, v (1, H, T, D)
    scores: list            # each layer's anchor_scores (H, n) of the first n tokens, a prompt


def read(model, tokenizer, kind, length, steps):
    """The Case of a text whose last `steps` tokens are no prompt. InputError if it is too short."""
    ids, layers = texts.ids(tokenizer, kind, "final", length), []

    def keep(*qkv):
        layers.append(qkv)
        return attend_causally(*qkv)
    (_, hidden), = follow(model, ids, [keep] * len(model.layers), 0, length)
    n = length - steps
    scores = [antkv.anchor_scores(q[:, :, :n], k[:, :, :n]) for q, k, _ in layers]
    return Case(kind, ids, hidden, layers, scores)


def fill(caches, case, n):
    """Let each cache read the first n tokens, exactly, without the outputs that are known."""
    for cache, layer, scores in zip(caches, case.layers, case.scores, strict=True):
        cache.told = scores
        hear(cache, *(x[:, :, :n] for x in layer))


def measure(model, mode, case, caches, steps):
    """A row of the table: KL and perplexities of a text."""
    n, size = 0, AnchorConfig().window
    if mode == "prefill":
        n, size = len(case.ids) - steps, FINE
        fill(caches, case, n)
    kl, nll_dense, nll = compare(model, case, [cache.prefill for cache in caches], n, size)
    return {"text": case.kind, "mode": mode, "tokens": len(case.ids), "kl": kl,
            "perplexity": math.exp(nll), "perplexity of dense": math.exp(nll_dense)}


def table(args, model, tokenizer):
    """Print a row for each method, text and mode, and write them to a file."""
    steps = args.steps if "prefill" in args.modes else args.length      # no prompt, no scores
    found = [read(model, tokenizer, kind, args.length, steps) for kind in args.texts]
    pieces = calibration_pieces(tokenizer, args.pieces)
    heard, rotations = antkv.listen(model, pieces, tqdm), fit_rotations(model, pieces, tqdm)
    print("| text | mode | method | true bits | without codebooks | KL | perplexity | of dense |")
    print("|---|---|---|---|---|---|---|---|")
    plain = baselines(model, AnchorConfig(), args.length, rotations)
    for name, make, bits in itertools.chain(plain, vector_quantised(heard, args)):
        for case, mode in itertools.product(found, args.modes):
            if mode == "first" and name.startswith(OWN):    # a first chunk that is too short
                continue
            caches = make()
            row = measure(model, mode, case, caches, args.steps)
            show({"model": str(args.model), "method": name, **row, **bits_of(caches, bits),
                  "pieces": args.pieces}, args.json)


def bits_of(caches, bits):
    """True bits of a method, with its codebooks or rotations and without."""
    whole = sum(cache.true_bits(bits) if isinstance(cache, RoundTrip) else cache.true_bits()
                for cache in caches) / len(caches)
    words = sum(8 * cache.bytes_held()["codebooks"] / numbers_of(cache)
                for cache in caches) / len(caches)
    return {"true bits": whole, "without codebooks": whole - words}


def numbers_of(cache):
    """Numbers of the keys and values that a cache holds."""
    _, H, _, D = (cache.k if isinstance(cache, RoundTrip) else cache.k_steady).shape
    return 2 * H * D * int(cache.n_tokens[0])


def show(row, path):
    """Print a row, and append it to a file of JSON lines."""
    print("| {text} | {mode} | {method} | {true bits:.2f} | {without codebooks:.2f} | {kl:.4f} | "
          "{perplexity:.2f} | {perplexity of dense:.2f} |".format(**row), flush=True)
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "at": time.strftime("%F %R")}) + "\n")


def parse_args(argv):
    parser = Parser(prog="python -m evaluation.antkv", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default=DEFAULT_NAME, help="name, directory or .gguf file")
    add("--calibrate", metavar="FILE", help="write codebooks of the first of --bits, and stop")
    add("--bits", type=float, nargs="+", choices=antkv.CHANNELS, default=list(antkv.CHANNELS))
    add("--anchors", type=float, nargs="+", default=[0, 0.0025, 0.01, 0.02], help="shares")
    add("--pieces", type=int, default=16, help=f"calibration texts, of {PIECE:,} tokens each")
    add("--texts", nargs="+", choices=texts.KINDS, default=["prose", "code"])
    add("--modes", nargs="+", choices=["first", "prefill"], default=["first", "prefill"])
    add("--length", type=int, default=2048, help="tokens of a text")
    add("--steps", type=int, default=512, help="of them behind the prompt, in mode prefill")
    add("--json", metavar="FILE", help="append the rows to this file")
    add("--dtype", choices=["float32", "bfloat16", "float16"],
        help="of the model that --calibrate reads (default: that of the command line)")
    args = parser.parse_args(argv)
    if args.calibrate:
        check_place(args.calibrate, antkv.KIND)
    elif args.dtype:
        raise InputError("--dtype goes with --calibrate: quality is measured in float32")
    return args


def evaluate(args):
    dtype = torch.float32
    if args.calibrate:
        dtype = getattr(torch, args.dtype) if args.dtype else fast_dtype(torch.device("cpu"))
    model, tokenizer = load(args.model, dtype, "cpu")
    refuse_windows(model)
    (calibrate if args.calibrate else table)(args, model, tokenizer)


def main(argv=None):
    """The exit status."""
    return run_command("antkv", lambda: evaluate(parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
