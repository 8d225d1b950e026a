"""AnTKV: anchor tokens exact, all other tokens in a few bits (Li et al., arXiv 2506.19505).

Vector quantisation replaces a group of channels of a key or a value by the nearest of 256
codewords, and stores which one it is: one byte. Some tokens bear that badly, because much
attention falls on them. These anchors stay exact, and so do the first and the latest tokens:

      sink │ tokens past, in order                            │ window, update
    ┌──────┬──────────────────────────────────────────────────┬───────────────┐
    │ k, v │ codes    codes   codes    codes  codes   codes   │ k, v          │
    │      │        ▲ k, v           ▲ k, v   anchors: 1 %    │ scored        │
    └──────┴──────────────────────────────────────────────────┴───────────────┘

    B batch     H kv heads     G query heads per kv head     T tokens     D head dim
    N groups of a head         M codewords of a group        c channels of a group: D = N*c
    A anchors of a head        W slots of the steady zone

    caches = [AnchorCache(AnchorConfig(), 4096, 1, book) for book in load_codebooks(path, ...)]

What is *reported* of the paper: 1 % of the tokens exact by an anchor score, a sliding window whose
tokens are scored when it is full, k-means weighted by the same error propagation factors, decoding
from codes. What is *derived*: the two factors themselves, from the first-order error of attention
(propagation_factors). What is *our choice*: everything else, since no code and no body text were
available: groups (CHANNELS), one byte a code, keys with RoPE and minus their mean, the score that
chooses anchors (anchor_scores), sizes of window and sink.

Does not include: an exact copy of what was quantised. A chunk of a prompt attends exactly to
itself, to the window and to the anchors, and to the codes of the rest. A prompt that is read in
one chunk is attended to exactly.
"""
import functools
import json
import math
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import torch

from retroinfer import InputError, LayerCache, Store, attend_causally, bias_of, round_up, take

M = 256             # codewords of a group: a code is one byte
# Channels that share a code, of keys and of values, by bits a number: the mean of 8/c of both.
CHANNELS = {4: (2, 2), 2: (4, 4), 1: (8, 8), 0.75: (16, 8), 0.375: (16, 32)}
LEAST = 2 * M       # tokens that codebooks are made from at least
KIND = "antkv codebook"
FORMAT = f"{KIND} 2"
GOLDEN = 0.618      # the golden ratio: steps of this share spread any number of points evenly
BLOCK = 256         # queries, or tokens to encode, at a time: this bounds memory


@dataclass(frozen=True)
class AnchorConfig:
    """The numbers of the method. The comment beside a field is its help text."""
    bits: float = 2             # of a number of a token's codes: 4, 2, 1, 0.75 or 0.375
    anchors: float = 0.01       # share of the tokens that stay exact
    sink: int = 4               # first tokens, always exact
    window: int = 64            # latest tokens, always exact
    update: int = 64            # generated tokens that are encoded together

    def __post_init__(self):
        if self.bits not in CHANNELS:
            known = ", ".join(map(str, CHANNELS))
            raise InputError(f"bits is {self.bits}: give one of {known}")
        if not 0 <= self.anchors <= 1:
            raise InputError(f"anchors is {self.anchors}: give a number between 0 and 1")
        for name, low in {"sink": 0, "window": 1, "update": 1}.items():
            if getattr(self, name) < low:
                raise InputError(f"{name} is {getattr(self, name)}: at least {low} is needed")

    @property
    def steady(self):
        """The most tokens that have no code."""
        return self.sink + self.window + self.update

    segment = local = property(lambda self: self.window)        # the seam's names


class Codebook(NamedTuple):
    """Codewords of a layer. A dimension of 1 in place of B: all sequences share them."""
    k: torch.Tensor         # (B, H, N, M, c) of keys minus the centre
    v: torch.Tensor         # (B, H, N, M, c)
    centre: torch.Tensor    # (B, H, 1, D) the mean key


# ---------------------------------------------------------------- which tokens matter

def attention_rows(q, k):
    """Yield scaled queries (H, G, b, D) and their causal attention weights (H, G, b, end), fp32,
    BLOCK queries at a time: no (T, T) matrix is held.

    q (1, H*G, Tq, D) are the last Tq of the T tokens of k (1, H, T, D).
    """
    H, end = k.shape[1], k.shape[2] - q.shape[2]
    q, k = q[0].float() * q.shape[-1] ** -0.5, k[0].float()
    for part in q.unflatten(0, (H, -1)).split(BLOCK, 2):
        start, end = end, end + part.shape[2]
        seen = torch.ones(end - start, end, dtype=torch.bool, device=k.device).tril_(start)
        x = part @ k[:, None, :end].mT                                      # (H, G, b, end)
        yield part, x.masked_fill_(~seen, -math.inf).softmax(-1)


def anchor_scores(q, k, first=0):
    """F^V (H, T - first), fp32: the attention that tokens from `first` on receive, summed over
    queries and the heads of a group. So much does an error of their values cost.

    It is the cheapest of the scores, and on real heads it finds anchors as well as F^K does, if it
    is divided by the number of queries that saw a token (AnchorCache.absorb): *our choice*. A plain
    sum favours early tokens.
    """
    score = k.new_zeros(*k.shape[1:3], dtype=torch.float32)                 # (H, T)
    for _, weights in attention_rows(q, k):
        score[:, :weights.shape[-1]] += weights.sum((1, 2))
    return score[:, first:]


def propagation_factors(q, k, v):
    """F^K and F^V (2, H, T), fp32: what an error of a token's key, or of its value, costs.

    *Derived*: by an error e of key j an output moves by A_j (q·e) (v_j - o), and by one of value j
    by A_j e, to first order. The reported bounds have L1 norms; |v_j - o| is L2 here, because then
    it takes one matrix product. It is exact to about 1e-3 of the length of v.
    """
    score, v = k.new_zeros(2, *k.shape[1:3], dtype=torch.float32), v[:, :, None].float()
    for part, weights in attention_rows(q, k):
        seen = v[0, :, :, :weights.shape[-1]]                               # (H, 1, end, D)
        o = weights @ seen                                                  # (H, G, b, D)
        far = seen.square().sum(-1)[..., None, :] - 2 * o @ seen.mT         # (H, G, b, end)
        far = (far + o.square().sum(-1, keepdim=True)).clamp(min=0).sqrt()
        costs = weights * far * part.norm(dim=-1, keepdim=True), weights
        score[..., :weights.shape[-1]] += torch.stack([x.sum((1, 2)) for x in costs])
    return score


# ---------------------------------------------------------------- codes

def split_channels(x, c):
    """Groups (*, N, T, c) of the channels of x (*, T, D)."""
    return x.unflatten(-1, (-1, c)).transpose(-3, -2)


def encode(x, words):
    """Codes (*, N, T), uint8: of each group of x (*, T, D) the nearest codeword in (*, N, M, c)."""
    half = words.square().sum(-1)[..., None, :] / 2                         # (*, N, 1, M)
    groups = split_channels(x.float(), words.shape[-1])
    return torch.cat([(part @ words.mT - half).argmax(-1).to(torch.uint8)
                      for part in groups.split(BLOCK, -2)], -1)


def decode(codes, words):
    """The codewords (*, T, D) that codes (*, N, T) stand for."""
    *lead, _, c = words.shape                                               # (*, N, M, c)
    group = torch.arange(math.prod(lead), device=codes.device).view(*lead, 1)
    rows = words.reshape(-1, c)[(codes.long() + M * group).flatten()]
    return rows.view(*codes.shape, c).transpose(-3, -2).flatten(-2)


def look_up(q, codes, words):
    """Inner products (B, H, G, T) of q (B, H, G, D) and what codes (B, H, N, T) stand for: each
    codeword meets the query once, and a token adds up N numbers from the tables."""
    groups = split_channels(q, words.shape[-1])                             # (B, H, N, G, c)
    tables, total = groups @ words.mT, 0                                    # (B, H, N, G, M)
    for table, ids in zip(tables.unbind(2), codes.unbind(2), strict=True):
        total = total + table.gather(-1, ids.long()[:, :, None].expand(-1, -1, q.shape[2], -1))
    return total


def mix_codes(weights, codes, words):
    """Sums (B, H, G, D) by weights (B, H, G, T) of what codes (B, H, N, T) stand for: a codeword
    gathers the weights of its tokens, and counts once."""
    (B, H, G, _), N = weights.shape, codes.shape[2]
    tables = weights.new_zeros(B, H, G, N, M)
    ids = codes.long()[:, :, None].expand(-1, -1, G, -1, -1)
    tables = tables.scatter_add(-1, ids, weights[:, :, :, None].expand_as(ids))
    return (tables.transpose(2, 3) @ words).transpose(2, 3).flatten(-2)


def look_up_tiles(q, codes, words):
    """look_up, by reconstruction of the keys: what a kernel with tl.dot would do."""
    return q @ decode(codes, words).mT


def mix_tiles(weights, codes, words):
    """mix_codes, by reconstruction of the values."""
    return weights @ decode(codes, words)


# ---------------------------------------------------------------- codebooks

def fit_words(x, weights, c, iterations=8, heads=None):
    """Codewords (H, N, M, c), fp16, by k-means over tokens x (H, T, D), weighted (H, T). heads: of
    a part of a layer its first head, and how many heads the layer has.

    *Reported*: the weights are the propagation factors. A codeword becomes the weighted mean of
    its members; members go to the nearest one, unweighted.
    """
    weights = weights.float() + 1e-4 * weights.mean(-1, keepdim=True) + 1e-30
    groups = split_channels(x.float(), c)                                   # (H, N, T, c)
    dice = torch.Generator(x.device).manual_seed(0)
    (H, T), (first, n) = weights.shape, heads or (0, len(weights))
    noise = weights.new_empty(n, T).exponential_(generator=dice)[first:first + H]
    seeds = (weights / noise).topk(M).indices           # (H, M) drawn by weight, none twice
    words = take_groups(groups, seeds)
    w = weights[:, None, :, None]                                           # (H, 1, T, 1)
    rows = torch.cat([groups * w, w.expand(-1, groups.shape[1], -1, -1)], -1)
    for _ in range(iterations):
        ids = encode(x, words).long()[..., None].expand_as(rows)
        sums = rows.new_zeros(*words.shape[:3], c + 1).scatter_add_(2, ids, rows)
        total = sums[..., -1:]
        words = torch.where(total > 0, sums[..., :-1] / total.clamp(min=1e-38), words)
    return words.half()


def take_groups(groups, ids):
    """Tokens ids (H, M) of groups (H, N, T, c): (H, N, M, c)."""
    shape = *groups.shape[:2], ids.shape[1], groups.shape[3]
    return groups.gather(2, ids[:, None, :, None].expand(shape))


def fit_codebook(k, v, score, bits, heads=None):
    """The Codebook of tokens k, v (H, T, D) with F^K and F^V in score (2, H, T).

    InputError if the tokens are too few, or the head cannot be split.
    """
    c_k, c_v = CHANNELS[bits]
    check_length(k.shape[1])
    check_head(k.shape[2], bits)
    centre = k.float().mean(1, keepdim=True)                                # (H, 1, D)
    words = [fit_words(x, weights, c, heads=heads)
             for x, weights, c in zip((k - centre, v), score, (c_k, c_v), strict=True)]
    return Codebook(*(x[None] for x in (*words, centre)))


def check_length(n):
    """InputError if codebooks cannot be made from so many tokens."""
    if n < LEAST:
        raise InputError(f"{max(n, 0):,} tokens are too few to make codebooks from, {LEAST:,} are "
                         "needed behind the first and before the latest, which stay exact: give a "
                         "longer text, read it in larger chunks, or give codebooks that were made "
                         "before")


def check_head(D, bits):
    """InputError if heads of D dims cannot be kept in so many bits."""
    if D % max(CHANNELS[bits]):
        known = ", ".join(str(b) for b, c in CHANNELS.items() if D % max(c) == 0)
        raise InputError(f"heads of {D} dims cannot be kept in {bits} bits: give one of {known}")


def placed(model, pieces):
    """Yield (ids (n,), positions (1, n)) of pieces of text, spread over the model's context.

    Attention depends on distances alone. But keys are coded with RoPE, and turn with their
    position. Codebooks of texts at position 0 would not know the keys of longer texts.
    """
    for i, ids in enumerate(pieces):
        room = max(model.config.context - len(ids), 0)
        start = int(GOLDEN * i % 1 * room)
        yield ids, torch.arange(start, start + len(ids), device=ids.device)[None]


def listen(model, pieces, show=iter):
    """Keys, values (H, T, D) and scores (2, H, T) of each layer, of all pieces of text ids (n,).

    Without the first tokens of each piece: a cache keeps them exact, so they need no codewords, and
    would draw many, because they receive much attention.
    """
    if model.config.windows:
        raise InputError("codebooks are made of models whose layers see all tokens: this one has "
                         "layers that see a window")
    heard, sink = [[] for _ in model.layers], AnchorConfig().sink

    def attend_and_keep(layer, q, k, v):
        layer.append((k[0, :, sink:], v[0, :, sink:], propagation_factors(q, k, v)[..., sink:]))
        return attend_causally(q, k, v)

    for ids, positions in placed(model, show(pieces)):
        attends = [functools.partial(attend_and_keep, layer) for layer in heard]
        model(ids[None], positions, attends)
    return [[torch.cat(x, dim) for x, dim in zip(zip(*layer, strict=True), (1, 1, 2), strict=True)]
            for layer in heard]


def save_codebooks(path, books, fingerprint, bits):
    """Write the Codebook of each layer. fingerprint: a dict of what tells the model from others.
    InputError if the file cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    tensors = {f"{n}.{name}": x.contiguous().cpu()
               for n, book in enumerate(books) for name, x in book._asdict().items()}
    header = {"format": FORMAT, "bits": json.dumps(bits), "fingerprint": json.dumps(fingerprint),
              "crc32": sums(tensors)}
    try:
        save_file(tensors, path, header)
    except (OSError, SafetensorError) as e:
        raise InputError(f"cannot write the codebooks {path}: {e}") from None


def load_codebooks(path, fingerprint, bits, device=None):
    """The Codebook of each layer. InputError if the file has none of this model and these bits."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, "pt", device=str(device or "cpu")) as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise InputError(f"{path} holds no codebooks of this program: make them anew")
            check_origin(path, header, {**fingerprint, "bits": bits})
            found = {name: file.get_tensor(name) for name in file.keys()}       # noqa: SIM118
    except OSError as e:
        raise InputError(f"cannot read the codebooks {path}: {e.strerror or e}") from None
    except SafetensorError as e:
        raise InputError(f"the codebooks {path} are damaged: {e}") from None
    if sums(found) != header.get("crc32"):
        raise InputError(f"the codebooks {path} are damaged: they are not what was written")
    return [Codebook(*(found[f"{n}.{name}"] for name in Codebook._fields))
            for n in range(len(found) // len(Codebook._fields))]


def sums(tensors):
    """A CRC-32 of each tensor, as a file's header has them."""
    return json.dumps({name: zlib.crc32(x.cpu().view(-1).view(torch.uint8).numpy())
                       for name, x in sorted(tensors.items())})


def check_origin(path, header, ours):
    """InputError if a file's header says something else than `ours`. It names the first thing that
    differs."""
    try:
        theirs = json.loads(header["fingerprint"]) | {"bits": json.loads(header["bits"])}
    except (KeyError, TypeError, ValueError):
        raise InputError(f"the codebooks {path} are damaged: their header cannot be read") from None
    for name, mine in json.loads(json.dumps(ours)).items():
        if theirs.get(name) != mine:
            raise InputError(f"the codebooks {path} were made with {name} {theirs.get(name)}, here "
                             f"it is {mine}: make them anew")


# ---------------------------------------------------------------- a step's attention

class Past(NamedTuple):
    """The tokens of a layer that have codes, in their order, and the anchors among them."""
    k: torch.Tensor         # (B, H, N, T) uint8
    v: torch.Tensor         # (B, H, N, T) uint8
    k_anchor: torch.Tensor  # (B, H, A, D)
    v_anchor: torch.Tensor  # (B, H, A, D)
    anchors: torch.Tensor   # (B, H, A) int32 which tokens they are; T - 1: a free slot
    n: torch.Tensor         # (B,) tokens that have codes; always below T


def attend(q, steady, past, book, look_up=look_up, mix=mix_codes):
    """Attention (B, H, G, D), fp32, of q (B, H, G, D), scaled and fp32, to the steady zone, the
    anchors and the codes in one softmax; and its weights (B, H, G, W) in the steady zone.

    steady: k, v (B, H, W, D) and bias (B, H, 1, W), -inf where a slot is free. The code of an
    anchor has no weight: its token counts once.
    """
    k_s, v_s, bias_s = steady
    words_k, words_v = book.k.float(), book.v.float()
    T, ids = past.k.shape[-1], past.anchors.long()
    has_code = torch.arange(T, device=q.device) < past.n[:, None, None]     # (B, 1, T)
    x_s = q @ k_s.float().mT + bias_s                                       # (B, H, G, W)
    x_a = q @ past.k_anchor.float().mT + bias_of(ids == T - 1)              # (B, H, G, A)
    x_c = look_up(q, past.k, words_k)                                       # (B, H, G, T)
    x_c = x_c + (q * book.centre).sum(-1, keepdim=True) + bias_of(~has_code)
    x_c = x_c.scatter(-1, ids[:, :, None].expand_as(x_a), -math.inf)
    parts = x_s, x_a, x_c
    weights = torch.cat(parts, -1).softmax(-1)
    w_s, w_a, w_c = weights.split([x.shape[-1] for x in parts], -1)
    o = w_s @ v_s.float() + w_a @ past.v_anchor.float() + mix(w_c, past.v, words_v)
    return o, w_s


def twin(function, device):
    """attend or anchor_scores as it suits a device: on a GPU, the Triton twin."""
    if device.type != "cuda":
        return function
    import antkv_kernels
    return getattr(antkv_kernels, function.__name__)


# ---------------------------------------------------------------- the cache

class Codes(Store):
    """Codes (B, H, N, T) of a layer's tokens past the sink, in their order. What is brought is
    decoded."""

    def __init__(self, cache, T, like):
        self.cache, (B, H) = cache, (len(cache.n_tokens), like.shape[1])
        self.k, self.v = (torch.zeros(B, H, like.shape[3] // c, T, dtype=torch.uint8,
                                      device=like.device) for c in CHANNELS[cache.config.bits])

    def bring(self, row, first, known, end):
        """k, v (1, H, end - first, D) as a prefill sees them: sink | codes, anchors | window."""
        cache = self.cache
        n, sink = int(cache.n_indexed[row]), min(known, cache.config.sink)
        steady = cache.k_steady, cache.v_steady
        for x, past in zip(steady, cache.recall(row, n), strict=True):
            live = x[row:row + 1, :, :known - n]                            # (1, H, any, D)
            free = x.new_zeros(1, x.shape[1], end - known, x.shape[3])
            yield torch.cat([live[:, :, :sink], past, live[:, :, sink:], free], 2)[:, :, first:]

    def put(self, row, first, k, v):
        """Nothing: absorb() writes the codes."""


class AnchorCache(LayerCache):
    """The cache of one layer, from codes. `book`: its Codebook. Without one, each sequence makes
    its own from its first chunk, which then needs LEAST tokens."""
    heads = None        # of a part of a layer: its first head, and how many the layer has

    def __init__(self, config, capacity, batch=1, book=None):
        super().__init__(config, capacity, batch, Codes)
        self.given, self.heard = book, None
        self.n_anchors = torch.zeros(batch, dtype=torch.int64)

    def allocate_index(self, like):
        c, (H, _, D), B = self.config, like.shape[1:], len(self.n_tokens)
        check_head(D, c.bits)
        T, A = round_up(self.capacity), round_up(math.ceil(c.anchors * self.capacity))
        device = like.device
        self.n_anchors = self.n_anchors.to(device)
        self.k_anchor, self.v_anchor = (like.new_zeros(B, H, A, D) for _ in "kv")
        self.anchors = torch.full((B, H, A), T - 1, dtype=torch.int32, device=device)
        self.score = torch.zeros(self.k_steady.shape[:3], device=device)        # (B, H, W)
        empty = [torch.zeros(B, H, D // n, M, n, dtype=torch.half, device=device)
                 for n in CHANNELS[c.bits]]
        own = Codebook(*empty, torch.zeros(B, H, 1, D, device=device))
        self.book = self.given or own

    def past(self):
        return Past(self.store.k, self.store.v, self.k_anchor, self.v_anchor, self.anchors,
                    self.n_indexed)

    def attend(self, q, steady):
        scaled = q.float() * q.shape[-1] ** -0.5
        o, weights = twin(attend, q.device)(scaled, steady, self.past(), self.book)
        self.score.add_(weights.sum(2))
        return o.to(q.dtype)

    def observe(self, q, start, row=None):
        if row is not None:             # of a prefill: absorb_open asks for them
            self.heard = q

    def absorb_open(self, row, k, v, least):
        """Behind a prefill, k, v (1, H, T, D) of all tokens: score what has no code, and encode
        all but the window."""
        sink, first = self.config.sink, self.config.sink + int(self.n_indexed[row])
        q, self.heard = self.heard, None
        if self.given is None and first == sink:
            check_length(k.shape[2] - sink - self.config.window)
        k_open, v_open = (torch.cat([x[:, :, :sink], x[:, :, first:]], 2) for x in (k, v))
        score = k.new_zeros(k_open.shape[1:3], dtype=torch.float32)         # (H, open)
        known = min(score.shape[1], self.score.shape[2])
        score[:, :known] += self.score[row, :, :known]
        if q is not None and k.shape[2] > first:
            score[:, sink:] += self.received(q, k, first)
        self.settle(row, k_open, v_open, score)

    def received(self, q, k, first):
        """anchor_scores (H, T - first), by the twin that suits the device."""
        return twin(anchor_scores, q.device)(q, k, first)

    def move_to_store(self, row):
        self.is_in_store[row] = True

    def move_to_steady(self, row):
        n = int(self.n_tokens[row] - self.n_indexed[row])
        if n == self.config.steady:
            k, v, score = (x[row:row + 1, :, :n].clone() for x in (
                self.k_steady, self.v_steady, self.score))
            self.settle(row, k, v, score[0])
        self.is_in_store[row] = False

    def settle(self, row, k, v, score):
        """Encode the oldest of k, v (1, H, n, D), sink and tokens without code; the sink and the
        window stay. score (H, n)."""
        sink, end = self.config.sink, max(k.shape[2] - self.config.window, self.config.sink)
        if end > sink:
            self.absorb(row, k[:, :, sink:end], v[:, :, sink:end], score[:, sink:end])
        self.score[row] = 0
        for steady, x in ((self.k_steady, k[0]), (self.v_steady, v[0]), (self.score, score)):
            left = torch.cat([x[:, :sink], x[:, end:]], 1)
            steady[row, :, :left.shape[1]] = left

    def absorb(self, row, k, v, score):
        """Encode tokens k, v (1, H, n, D), and keep the anchors among them. score (H, n)."""
        first, n = int(self.n_indexed[row]), k.shape[2]
        if self.given is None and not first:
            scores = torch.stack([score, score])
            book = fit_codebook(k[0], v[0], scores, self.config.bits, self.heads)
            for mine, x in zip(self.book, book, strict=True):
                mine[row] = x[0]
        words_k, words_v, centre = self.book_of(row)
        self.store.k[row, ..., first:first + n] = encode(k - centre, words_k)[0]
        self.store.v[row, ..., first:first + n] = encode(v, words_v)[0]
        place = self.config.sink + first + torch.arange(n, device=k.device)
        self.keep_anchors(row, k, v, score / (self.n_tokens[row] - place))
        self.n_indexed[row] += n

    def keep_anchors(self, row, k, v, score):
        """Keep tokens of the highest score (H, n) exact, until the share of anchors is reached."""
        first, have = int(self.n_indexed[row]), int(self.n_anchors[row])
        m = math.ceil(self.config.anchors * (first + k.shape[2])) - have
        best = score.topk(m).indices[None]                                  # (1, H, m)
        self.k_anchor[row, :, have:have + m] = take(k, best)[0]
        self.v_anchor[row, :, have:have + m] = take(v, best)[0]
        self.anchors[row, :, have:have + m] = best[0] + first
        self.n_anchors[row] += m

    def book_of(self, row):
        """The Codebook (1, ...) of a sequence, in fp32."""
        one = row if self.book.k.shape[0] > 1 else 0
        return Codebook(*(x[one:one + 1].float() for x in self.book))

    def recall(self, row, n):
        """k, v (1, H, n, D) of the n tokens that have codes; anchors are exact."""
        words_k, words_v, centre = self.book_of(row)
        k = decode(self.store.k[row:row + 1, ..., :n], words_k) + centre
        v = decode(self.store.v[row:row + 1, ..., :n], words_v)
        m = int(self.n_anchors[row])
        ids = self.anchors[row:row + 1, :, :m].long()[..., None].expand(-1, -1, -1, k.shape[3])
        for x, exact in ((k, self.k_anchor), (v, self.v_anchor)):
            yield x.to(exact.dtype).scatter(2, ids, exact[row:row + 1, :, :m])

    def bytes_held(self, row=0, exact=None):
        """Bytes of a sequence's tokens by part. exact: bytes of a number that is exact; otherwise
        those of the keys given."""
        _, H, _, D = self.k_steady.shape
        exact = exact or self.k_steady.element_size()
        n, m = int(self.n_indexed[row]), int(self.n_anchors[row])
        open_tokens = int(self.n_tokens[row]) - n
        books = sum(x[:1].nbytes for x in self.book)
        return {"codes": H * n * (self.store.k.shape[2] + self.store.v.shape[2]),
                "anchors": H * m * (2 * D * exact + 4),                 # and which token it is
                "steady zone": H * open_tokens * (2 * D * exact + 4),   # and its score
                "codebooks": books}

    def true_bits(self, row=0, exact=2):
        """Bits of all that is held, over the numbers of all keys and values of a sequence."""
        _, H, _, D = self.k_steady.shape
        numbers = 2 * H * D * int(self.n_tokens[row])
        return 8 * sum(self.bytes_held(row, exact).values()) / numbers

    def bytes_read(self):
        """Bytes that a step reads, free rows included."""
        parts = self.k_steady, self.v_steady, self.score, *self.past(), *self.book
        return sum(x.nbytes for x in parts)

    def nbytes(self):
        """Bytes allocated, by part."""
        parts = {"steady zone": (self.k_steady, self.v_steady, self.score), "codebooks": self.book,
                 "anchors": (self.k_anchor, self.v_anchor, self.anchors)}
        return {name: sum(x.nbytes for x in xs) for name, xs in parts.items()} | self.store.nbytes()

    def facts(self):
        """What the cache holds, as numbers. A list has one for each sequence."""
        rows = range(len(self.n_tokens))
        exact = self.k_steady.element_size()
        token = 2 * self.k_steady.shape[1] * self.k_steady.shape[3] * exact
        return {"tokens": self.n_tokens.tolist(), "indexed_tokens": self.n_indexed.tolist(),
                "anchors": self.n_anchors.tolist(), "bits": self.config.bits,
                "true_bits": [self.true_bits(row, exact) for row in rows],
                "bytes_read": self.bytes_read(), "dense_bytes": token * int(self.n_tokens.sum())}
