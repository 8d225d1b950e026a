"""RetroInfer: the KV cache as a vector store.

Full attention reads every key and value at every decode step. RetroInfer
reads a few per cent of them. It clusters the keys while they arrive (the
wave index). A step ranks the clusters by their centroids, attends exactly
to the members of the best clusters, estimates the next clusters from their
centroids, and drops the rest. The first and the latest tokens are always
exact. One softmax spans all of it (tripartite attention):

      sink │     clusters, best first for this query     │ local, generated
    ┌──────┬──────────────┬───────────────────┬──────────┬─────────────────┐
    │steady│ retrieved: R │ estimated: E      │ dropped  │ steady          │
    │ k, v │ members k, v │ centroid, mean    │          │ k, v            │
    │      │              │ value, log(size)  │          │                 │
    └──────┴──────────────┴───────────────────┴──────────┴─────────────────┘

    B batch         H kv heads          G query heads per kv head
    T tokens        D head dim          L tokens in a segment
    C cluster slots of a head           P most tokens in a cluster
    R clusters retrieved at most        K clusters ranked at most: R + E
    W slots of the steady zone          N rows for retrieved tokens

    python retroinfer.py --prompt-file x        # the command line, in app/

Part I is the paper: Chen et al., RetroInfer, PVLDB 19(5) 2026 (arXiv
2505.02922). Part II is what this project does better: named entries, each
with the paper's choice in its place in Part I. RetroConfig.paper() selects
none of them. Copied alone, this file needs torch 2.5 or later and nothing
else. docs/defaults.md says what differs from the published code.
"""
import functools
import math
import signal
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

if __name__ == "__main__":      # Ctrl-C while torch is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right

RUN = 64        # all shapes are multiples: loops have no remainder
MASK = 2**24    # the most entries of a mask of queries and keys
LATE = "more steps were taken than update() had returned: call it sooner"


class InputError(ValueError):
    """What was given cannot be used. The message is one line for a person."""


@dataclass(frozen=True)
class RetroConfig:
    """The numbers of the method. The comment beside a field is its help
    text.

    The defaults are ours (docs/defaults.md says why). paper() has the
    published ones.
    """
    sink: int = 4               # first tokens, always exact
    local: int = 32             # latest tokens, always exact
    update: int = 256           # generated tokens that are indexed together
    segment: int = 2048         # tokens that are clustered together
    cluster: int = 8            # mean tokens in a cluster
    iterations: int = 4         # k-means passes over a segment
    retrieve: float = 0.058     # share of the clusters whose members are read
    estimate: float = 0.17      # share of the clusters that are estimated
    min_retrieve: int = 28      # clusters retrieved at least
    # Each of these selects an entry of Part II. paper() selects none.
    channel_power: float = 0.35     # k-means weighs channels by their queries
    bits: int = 4                   # of a number in a centroid: 4 or 16
    by_mass: bool = True            # rank clusters by what they may hold
    growth: float = 0.7             # clusters retrieved grow by this power
    values: float = 0.2             # share of the retrieved values read
    store_bits: int = 16            # of a number in the store: 8 or 16

    @classmethod
    def paper(cls):
        """The published method and its settings."""
        return cls(sink=4, local=64, update=1024, segment=8192, cluster=16,
                   iterations=10, retrieve=0.018, estimate=0.232,
                   min_retrieve=1, **PART_II_OFF)

    def __post_init__(self):
        lowest = {"sink": 0, "local": 1, "update": 1, "segment": 1,
                  "cluster": 1, "iterations": 1, "min_retrieve": 1}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise InputError(f"{name} is {getattr(self, name)}: at least "
                                 f"{low} is needed")
        for name, low in (("bits", 4), ("store_bits", 8)):
            if getattr(self, name) not in (low, 16):
                raise InputError(f"{name} is {getattr(self, name)}: give {low} "
                                 "or 16")
        for field in fields(self):
            given = getattr(self, field.name)
            if field.type is float and not 0 <= given <= 1:
                raise InputError(f"{field.name} is {given}: give a number "
                                 "between 0 and 1")
        for name in ("segment", "update"):
            given = getattr(self, name)
            if given % self.cluster:
                raise InputError(f"{name} is {given}: give a multiple of "
                                 f"cluster, {self.cluster}")

    @property
    def largest(self):
        """P, the most tokens that a cluster may hold."""
        return 2 * self.cluster

    @property
    def steady(self):
        """The most tokens that are in no cluster while a text grows."""
        return self.sink + self.local + self.update

    def slots(self, tokens):
        """Cluster slots for so many tokens: an eighth more, for split ones."""
        return tokens // self.cluster + tokens // (8 * self.cluster)

    def method(self):
        """The Method that this config selects. Part I alone has PAPER."""
        is_paper = all(getattr(self, name) == value
                       for name, value in PART_II_OFF.items())
        return PAPER if is_paper else method_of(self)


# The value of each field that selects no entry of Part II.
PART_II_OFF = {"channel_power": 0.0, "bits": 16, "by_mass": False,
               "growth": 1.0, "values": 1.0, "store_bits": 16}


# ================================================================ Part I: the paper

class Index(NamedTuple):
    """What is known of the clusters. A cluster's tokens lie together in the
    store (CSR)."""
    centroids: torch.Tensor     # (B, H, C, D) mean of the member keys
    means: torch.Tensor         # (B, H, C, D) mean of the member values
    sizes: torch.Tensor         # (B, H, C) members, in fp32; 0: a free slot
    offsets: torch.Tensor       # (B, H, C) first row in the store
    # Part II alone uses these.
    spreads: torch.Tensor       # (B, H, C) variance of the member keys
    scales: torch.Tensor        # (B, H, C, 2) of a centroid, of a mean value
    centre: torch.Tensor        # (B, H, 1, D) what centroids are kept minus


class Budget(NamedTuple):
    """What a step may read. R, K and N fix shapes: one graph for all steps."""
    retrieve: torch.Tensor      # (B, 1) clusters whose members are read
    ranked: torch.Tensor        # (B, 1) these, and the clusters estimated
    values: float               # share of retrieved tokens with values
    R: int                      # the most that `retrieve` will ever be
    K: int                      # the most that `ranked` will ever be
    N: int                      # rows for the members of R clusters


class Method(NamedTuple):
    """The choices that Part II may replace: PAPER below has the paper's.
    What Part I does not define does nothing there. scores, mix and few are
    replaced by generate.py alone, which writes them for Inductor."""
    channel_weights: Callable   # energy (H, D), config -> (1, H, 1, D) or 1
    spreads: Callable           # k, centroids, order, sizes, energy, hot
    centre: Callable            # a text's first keys -> (1, H, 1, D) or 0
    encode: Callable            # rows, dtype -> rows as kept, scales (1, H, C)
    centroid_logits: Callable   # q, index, method -> (B, H, G, C)
    mix_means: Callable         # weights, index, order, method
    growth: Callable            # config, tokens -> factor on the share
    rank: Callable              # q, logits, x_steady, index -> (B, H, C)
    log_count: Callable         # q, index -> log of a centroid's tokens
    share_values: Callable      # w_r, v_r, w_e, ends, budget, method
    scores: Callable            # q, k -> inner products
    mix: Callable               # weights, v -> weighted sums
    few: Callable               # budget, tokens -> how many have values


class Hot(NamedTuple):
    """The functions that take the time. Faster ones may replace them."""
    attend: Callable
    nearest: Callable
    segment_sum: Callable
    tripartite_attention: Callable      # attend, where a buffer fetches


# ---------------------------------------------------------------- what every method's cache needs

class Store:
    """Keys and values of a layer's tokens, (B, H, T, D) each, on the
    device.

    Others have the same functions: ByteStore keeps 8 bits, buffer.WaveBuffer
    is on the host. There bring returns copies, and put writes them back.
    """

    def __init__(self, cache, T, like):
        shape = len(cache.n_tokens), like.shape[1], T, like.shape[3]
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)

    def attend(self, hot, q, steady, index, budget, method):
        """hot.attend, to the tokens that are kept here."""
        return hot.attend(q, steady, index, self.tensors(), budget, method)

    def tensors(self):
        """What rows_of reads."""
        return self.k, self.v

    def view(self, row, first, end):
        """k, v (1, H, end - first, D) of rows of a sequence, to be read."""
        return [x[row:row + 1, :, first:end] for x in (self.k, self.v)]

    def bring(self, row, first, known, end):
        """view, on the device, to be changed. Rows from `known` on hold no
        tokens yet."""
        return self.view(row, first, end)

    def put(self, row, first, k, v):
        """Keep k, v (1, H, n, D) in the rows from `first` on."""
        kept = self.view(row, first, first + k.shape[2])
        for x, new in zip(kept, (k, v), strict=True):
            if x.data_ptr() != new.data_ptr():      # bring gave other memory
                x.copy_(new)

    def nbytes(self):
        """Bytes allocated, by part."""
        return {"store": self.k.nbytes + self.v.nbytes}

    def facts(self):
        """What there is to say of a run, by name."""
        return {}


class LayerCache(nn.Module):
    """Keys and values of one layer, for a batch of sequences of unequal
    length, each up to `capacity` tokens.

        store     sink | indexed tokens, in the method's order | latest tokens
        steady    sink | latest tokens, generated tokens | free slots

    A sequence reads or decodes. While it reads, its latest tokens are in
    the store, and a chunk attends to all tokens before it: their order does
    not matter, because their positions are in the keys (RoPE). While it
    decodes, its latest tokens are in the steady zone. update(), between
    steps, moves them there, and indexes open tokens: past the sink, not
    indexed, older than the local window. Nothing reallocates, and no shape
    changes.

    A method supplies allocate_index(like); absorb(row, k, v), which indexes
    the oldest open tokens k, v (1, H, n, D), may reorder them in place, and
    counts them in n_indexed; attend(q, steady), a step's attention; and
    bytes_read(). observe(q, start, row) hears queries before they attend.
    """

    def __init__(self, config, capacity, batch=1, make_store=Store):
        super().__init__()
        self.config, self.capacity = config, capacity
        self.make_store, self.store = make_store, None
        self.is_in_store = [True] * batch       # where the latest tokens are
        self.n_tokens = torch.zeros(batch, dtype=torch.int64)
        self.n_indexed = torch.zeros(batch, dtype=torch.int64)

    def allocate(self, like):
        """All state, for keys `like` (1, H, any, D)."""
        B, H, D = len(self.n_tokens), like.shape[1], like.shape[3]
        shape = B, H, round_up(min(self.config.steady, self.capacity)), D
        self.k_steady, self.v_steady = (like.new_zeros(shape) for _ in "kv")
        self.n_tokens = self.n_tokens.to(like.device)
        self.n_indexed = self.n_indexed.to(like.device)
        self.allocate_index(like)
        self.store = self.make_store(self, round_up(self.capacity), like)

    def observe(self, q, start, row=None):
        """Hear queries q (B or 1, H*G, T, D) of the tokens from `start` on."""

    @torch.no_grad()
    def prefill(self, q, k, v, row=0):
        """Append T tokens to a sequence, k, v (1, H, T, D): their exact
        causal attention (1, H*G, T, D). If q is None, they do not attend.

        ValueError if they do not fit the capacity.
        """
        if self.store is None:
            self.allocate(k)
        self.move_to_store(row)
        start = int(self.n_tokens[row])
        end = start + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit a cache of {self.capacity}")
        k_all, v_all = self.store.bring(row, 0, start, end)     # (1, H, end, D)
        k_all[:, :, start:] = k
        v_all[:, :, start:] = v
        self.n_tokens[row] = end
        o = None
        if q is not None:
            self.observe(q, start, row)
            o = attend_causally(q, k_all, v_all)
        first = min(start, self.config.sink + int(self.n_indexed[row]))
        self.absorb_open(row, k_all, v_all, self.config.segment)
        self.store.put(row, first, k_all[:, :, first:], v_all[:, :, first:])
        return o

    @torch.no_grad()
    def decode(self, q, k, v):
        """Append one token to each sequence, q (B, H*G, 1, D), and attend:
        (B, H*G, 1, D).

        ValueError unless update() was called after a prefill.
        """
        if any(self.is_in_store):
            raise ValueError("call update() between prefill and decode: "
                             "it builds the index")
        B, H, _, D = k.shape
        self.observe(q, self.n_tokens[:, None])
        batch = torch.arange(B, device=k.device)
        slot = torch.arange(self.k_steady.shape[2], device=k.device)
        last = self.n_tokens - self.n_indexed                   # (B,)
        last = last.clamp(max=slot.shape[0] - 1)    # update() finds a step too many
        self.k_steady[batch, :, last] = k[:, :, 0]
        self.v_steady[batch, :, last] = v[:, :, 0]
        self.n_tokens.add_(1)
        is_free = slot > last[:, None]                          # (B, W)
        bias = bias_of(is_free[:, None]).expand(-1, H, -1, -1)  # (B, H, 1, W)
        steady = self.k_steady, self.v_steady, bias
        return self.attend(q.reshape(B, H, -1, D), steady).reshape(q.shape)

    forward = decode            # calling a cache is a step

    def update(self):
        """Index the tokens that left the local window. Returns how many
        steps may follow. ValueError after more steps than it returned
        before."""
        most = self.config.steady
        n_free = self.capacity - int(self.n_tokens.max())
        if n_free < 0:
            raise ValueError(LATE)
        for row, is_in_store in enumerate(self.is_in_store):
            n = int(self.n_tokens[row] - self.n_indexed[row])
            if n > most and not is_in_store:
                raise ValueError(LATE)
            if n == most or is_in_store:
                self.move_to_store(row)
                self.move_to_steady(row)
        n_steady = int((self.n_tokens - self.n_indexed).max())
        return min(most - n_steady, n_free)

    def move_to_store(self, row):
        """Copy a sequence's latest tokens to the end of the store."""
        if not self.is_in_store[row]:
            for first, steady in self.latest(row):
                self.store.put(row, first, *steady)
            self.is_in_store[row] = True

    def move_to_steady(self, row):
        """Index what is long enough. Copy the rest to the steady zone."""
        first = self.config.sink + int(self.n_indexed[row])
        n = int(self.n_tokens[row])
        k, v = self.store.bring(row, first, n, n)
        least = min(self.config.update, self.config.segment)
        self.absorb_open(row, k, v, least)
        self.store.put(row, first, k, v)
        for first, steady in self.latest(row):
            kept = self.store.view(row, first, first + steady[0].shape[2])
            for x, store in zip(steady, kept, strict=True):
                x.copy_(store)
        self.is_in_store[row] = False

    def latest(self, row):
        """Where the tokens are that are not indexed, the sink and the rest:
        a row of the store, and views k, v (1, H, n, D) of the steady zone."""
        n, indexed = int(self.n_tokens[row]), int(self.n_indexed[row])
        head = min(n, self.config.sink)
        zones = self.k_steady, self.v_steady
        zones = [x[row:row + 1, :, :n - indexed] for x in zones]
        yield 0, [x[:, :, :head] for x in zones]
        yield head + indexed, [x[:, :, head:] for x in zones]

    def absorb_open(self, row, k, v, least):
        """Absorb the open tokens, segment by segment. k, v (1, H, n, D) end
        with the last token. A part shorter than `least` waits."""
        c, end = self.config, k.shape[2] - self.config.local
        n_open = int(self.n_tokens[row] - self.n_indexed[row]) - c.sink - c.local
        for first in range(end - max(n_open, 0), end, c.segment):
            n = min(c.segment, end - first) // c.cluster * c.cluster
            if n >= least:
                part = slice(first, first + n)
                self.absorb(row, k[:, :, part], v[:, :, part])


def attend_causally(q, k, v):
    """Attention of the last Tq tokens' q (1, H*G, Tq, D) to k, v (1, H, T,
    D), each to its past."""
    attend, (Tq, T) = F.scaled_dot_product_attention, (q.shape[2], k.shape[2])
    if Tq == T:
        return attend(q, k, v, is_causal=True, enable_gqa=True)
    if q.device.type != "cpu":          # these kernels keep no mask
        mask = causal_lower_right(1, 1)     # made as large as it stands for, it
        mask.seq_len_q, mask.seq_len_kv = Tq, T     # would hold 8*Tq*T bytes
        return attend(q, k, v, mask, enable_gqa=True)
    G, parts, end = q.shape[1] // k.shape[1], [], T - Tq
    k, v = (x[0, :, None].expand(-1, G, -1, -1) for x in (k, v))    # no copies
    for part in q[0].unflatten(0, (-1, G)).split(max(MASK // T, 1), 2):
        end += part.shape[2]
        mask = torch.ones(part.shape[2], end, dtype=torch.bool)
        mask = mask.tril_(end - part.shape[2])
        parts.append(attend(part, k[:, :, :end], v[:, :, :end], mask))
    return torch.cat(parts, 2).flatten(0, 1)[None]              # (1, H*G, Tq, D)


# ---------------------------------------------------------------- the wave index (§4.2)

class WaveIndex(LayerCache):
    """The cache of one layer as a vector store.

    hot: the functions that take the time. PLAIN are this file's own, and
    generate.hot_functions() gives the fastest for a device. make_store:
    buffer.offload(...) keeps the store on the host, in 16 bits.
    """

    def __init__(self, config, capacity, batch=1, hot=None, make_store=None):
        kind = Store if config.store_bits == 16 else ByteStore
        if make_store and kind is ByteStore:
            raise InputError("store_bits 8 is a store on the device: leave it "
                             "out where the store is offloaded")
        super().__init__(config, capacity, batch, make_store or kind)
        self.hot, self.method = hot or PLAIN, config.method()
        self.n_clusters = torch.zeros(batch, dtype=torch.int64)

    def allocate_index(self, like):
        B, H, D = len(self.n_tokens), like.shape[1], like.shape[3]
        C = round_up(self.config.slots(self.capacity))
        row, _ = self.method.encode(torch.zeros(1, 1, 1, D), like.dtype)
        numbers, small = torch.float32, torch.bfloat16

        def zeros(*shape, dtype):       # one storage each: no aliases
            return like.new_zeros(B, H, *shape, dtype=dtype)

        rows = [zeros(C, row.shape[3], dtype=row.dtype) for _ in "kv"]
        self.index = Index(*rows, zeros(C, dtype=numbers),
                           zeros(C, dtype=torch.int64), zeros(C, dtype=small),
                           zeros(C, 2, dtype=small), zeros(1, D, dtype=numbers))
        self.q_energy = zeros(D, dtype=widest(like.device))
        self.n_clusters = self.n_clusters.to(like.device)
        R, K = limits_of(self.config, torch.tensor(self.capacity), self.method)
        R, K = min(int(R), C), min(round_up(int(K)), C)
        self.most = R, K, round_up(min(R * self.config.largest, self.capacity))
        self.limits = [like.new_zeros(B, 1, dtype=torch.int64) for _ in "RK"]

    def attend(self, q, steady):
        return self.store.attend(self.hot, q, steady, self.index,
                                 self.budget(), self.method)

    def update(self):
        """LayerCache.update. What a step may read changes here alone."""
        room = super().update()
        now = limits_of(self.config, self.n_indexed[:, None], self.method)
        for kept, limit in zip(self.limits, now, strict=True):
            kept.copy_(limit)
        return room

    def budget(self):
        """The Budget of a step, as update() left it."""
        return Budget(*self.limits, self.config.values, *self.most)

    def absorb(self, row, k, v):
        """Cluster the next tokens k, v (1, H, L, D), and put them in
        cluster order in place."""
        first = int(self.n_clusters[row])
        start = self.config.sink + int(self.n_indexed[row])
        centre = self.index.centre[row:row + 1] if first else None
        part, k_sorted, v_sorted = cluster_segment(
            k, v, self.config, self.hot, self.q_energy[row], centre)
        k.copy_(k_sorted)
        v.copy_(v_sorted)
        *clusters, centre = part._replace(offsets=part.offsets + start)
        n = part.sizes.shape[2]
        for whole, new in zip(self.index, clusters, strict=False):
            whole[row, :, first:first + n] = new[0]
        self.index.centre[row] = centre[0]
        self.n_indexed[row] += k.shape[2]
        self.n_clusters[row] += n

    def observe(self, q, start, row=None):
        """Add up the squares of the first segment's queries, by channel."""
        heard = self.config.sink + self.config.segment
        q = q[:, :, :heard].float()
        place = start + torch.arange(q.shape[2], device=q.device)
        is_heard = (place < heard).view(-1, 1, q.shape[2], 1)
        energy = (q.square() * is_heard).sum(2, dtype=self.q_energy.dtype)
        H = self.q_energy.shape[1]
        energy = energy.unflatten(1, (H, -1)).mean(2)           # (B, H, D)
        rows = slice(None) if row is None else slice(row, row + 1)
        self.q_energy[rows].add_(energy)

    def state(self, row):
        """All that is known of a sequence, by name: views (H, ...), and
        counters (2,). It moves the latest tokens to the store: call
        update() before the next decode."""
        self.move_to_store(row)
        c = int(self.n_clusters[row])
        k, v = self.store.view(row, 0, int(self.n_tokens[row]))
        counters = torch.stack([self.n_indexed[row], self.n_clusters[row]])
        index = {name: x[row, :, :c] for name, x in self.index._asdict().items()}
        return {"k": k[0], "v": v[0], "q_energy": self.q_energy[row],
                "counters": counters, **index}

    def restore(self, state, device=None, row=0):
        """Fill a sequence that holds nothing with what state() gave."""
        if self.store is None:
            self.allocate(state["k"][None, :, :0].to(device))
        self.n_tokens[row] = state["k"].shape[1]
        self.n_indexed[row], self.n_clusters[row] = state["counters"].tolist()
        self.store.put(row, 0, state["k"][None], state["v"][None])
        for name, x in self.state(row).items():
            if name not in ("k", "v", "counters"):
                x.copy_(state[name])

    def bytes_read(self):
        """Bytes of K, V and index that one decode step reads at most: as if
        it retrieved the largest clusters."""
        index, budget, c = self.index, self.budget(), self.config
        key = self.store.nbytes()["store"] // (2 * self.store.k[..., 0].numel())
        steady = 2 * self.k_steady[0, 0].nbytes
        vector = index.means[0, 0, 0].nbytes
        sizes = index.sizes.sort(-1, descending=True).values
        place = torch.arange(sizes.shape[2], device=sizes.device)
        is_read = place < budget.retrieve[..., None]            # (B, 1, C)
        tokens = (sizes * is_read).sum(-1)                      # (B, H)
        rows = tokens + (tokens * c.values).ceil()
        vectors = sizes.shape[2] + budget.ranked
        # of each cluster size, spread and scale: 4 + 2 + 2; an offset: 8; the
        # scale of a mean: 2
        numbers = 8 * sizes.shape[2] + 8 * budget.retrieve + 2 * budget.ranked
        return int((steady + rows * key + vectors * vector + numbers).sum())

    def facts(self):
        """What a step may read, as numbers. A list has one for each
        sequence, the mean over its heads."""
        budget, (_, H, _, D) = self.budget(), self.store.k.shape
        clusters = (self.index.sizes > 0).sum(-1)               # (B, H)
        retrieved = budget.retrieve.minimum(clusters)
        estimated = budget.ranked.minimum(clusters) - retrieved
        means = {"clusters": clusters, "retrieved_clusters": retrieved,
                 "estimated_clusters": estimated}
        token = 2 * H * D * self.k_steady.element_size()        # bytes
        return {"tokens": self.n_tokens.tolist(),
                "indexed_tokens": self.n_indexed.tolist(),
                **{name: x.float().mean(-1).tolist() for name, x in means.items()},
                "bytes_read": self.bytes_read(), "bits": self.config.bits,
                "store_bits": self.config.store_bits,
                "dense_bytes": token * int(self.n_tokens.sum()),
                **self.store.facts()}

    def nbytes(self):
        """Bytes allocated, by part."""
        return {"index": sum(x.nbytes for x in self.index),
                "steady zone": self.k_steady.nbytes + self.v_steady.nbytes,
                **self.store.nbytes()}


def limits_of(config, tokens, method=None):
    """How many clusters are retrieved, and how many are ranked, with so
    many indexed tokens (B, 1)."""
    slots, clusters = config.slots(tokens), tokens // config.cluster

    def portion(share, factor=1):       # 1 means all, split clusters included
        if share >= 1:
            return slots
        return (clusters * share * factor).round().long().minimum(slots)

    growth = (method or config.method()).growth(config, tokens)
    retrieve = portion(config.retrieve, growth).clamp(min=config.min_retrieve)
    retrieve = retrieve.minimum(slots.clamp(min=1))     # no shape is empty
    ranked = portion(min(config.retrieve + config.estimate, 1))
    return retrieve, ranked.maximum(retrieve)


# ---------------------------------------------------------------- tripartite attention (§4.2)

def attend(q, steady, index, stores, budget, method):
    """One step's attention (B, H, G, D) of q (B, H, G, D) to the steady
    zone and the clusters.

    steady: k, v (B, H, W, D) and bias (B, H, 1, W), -inf where a slot is
    free. stores: k, v (B, H, T, D), or what ByteStore keeps. This is the
    reference of generate.attend, kernels.attend and native.step.attend.
    """
    fetch = functools.partial(gather_clusters, index, stores, budget.N)
    return tripartite_attention(q, steady, index, budget, fetch, method)


def tripartite_attention(q, steady, index, budget, fetch, method):
    """attend, with fetch(ids, ends) for the members k, v and bias of
    clusters.

    A centroid with bias log(size) weighs as much as its tokens would if
    their keys were equal (eq. 2); by Jensen's inequality never more (eq.
    3). The output is one weighted mean of values and of mean values (eq.
    4).
    """
    q = q.float() * q.shape[-1] ** -0.5                         # (B, H, G, D)
    k_s, v_s, bias_s = steady
    x_s = method.scores(q, k_s) + bias_s                        # (B, H, G, W)
    x_c = method.centroid_logits(q, index, method)              # (B, H, G, C)
    order = rank_clusters(q, x_c, x_s, index, budget.K, method)     # (B, H, K)
    ids, ends, bias_e = choose_clusters(order, index, budget)
    k_r, v_r, bias_r = fetch(ids, ends)                         # (B, H, N, D)
    x_r = method.scores(q, k_r) + bias_r                        # (B, H, G, N)
    x_e = along(x_c + method.log_count(q, index), order) + bias_e
    widths = [x.shape[-1] for x in (x_s, x_r, x_e)]
    weights = torch.cat([x_s, x_r, x_e], -1).softmax(-1)
    w_s, w_r, w_e = weights.split(widths, -1)
    w_r, v_r, w_e = method.share_values(w_r, v_r, w_e, ends, budget, method)
    o = method.mix(w_s, v_s) + method.mix(w_r, v_r)
    o = o + method.mix_means(w_e, index, order, method)
    return o.to(v_s.dtype)                                      # (B, H, G, D)


def scores(q, k):
    """Inner products (B, H, G, N), fp32, of q (B, H, G, D) and k (B, H, N, D)."""
    return q @ k.float().mT


def mix(weights, v):
    """Sums (B, H, G, D), fp32, of values v (B, H, N, D) by weights (B, H, G, N)."""
    return weights @ v.float()


def rank_clusters(q, logits, x_steady, index, n, method):
    """The n best clusters (B, H, n), best first, for a group's query heads
    together."""
    worth = method.rank(q, logits, x_steady, index)             # (B, H, C)
    return worth.topk(n, sorted=True).indices


def rank_by_centroid(q, logits, x_steady, index):
    """Each cluster's share of a softmax over centroids, summed over G."""
    lowest = torch.finfo(logits.dtype).min
    is_free = index.sizes[:, :, None] == 0
    return logits.masked_fill(is_free, lowest).softmax(-1).sum(2)


def choose_clusters(order, index, budget):
    """Which of the ranked clusters `order` (B, H, K) are read, and which
    are estimated: ids (B, H, R), ends (B, H, R), bias (B, H, 1, K).

        order    c0    c1   c2   c3   │ c4   c5   c6    │ c7 ...
                 └─ budget.retrieve ──┘                 │
                 └─ budget.ranked ──────────────────────┘
        tokens   │c0   │c1  │c2  │c3  │ those that are read, packed
        ends           3    5    9    16
        bias     -inf  -inf -inf -inf   0    0    0       -inf
    """
    place = torch.arange(order.shape[-1], device=order.device)
    is_read = place < budget.retrieve[..., None]                # (B, 1, K)
    is_ranked = place < budget.ranked[..., None]
    sizes = index.sizes.gather(-1, order)                       # (B, H, K)
    ends = (sizes * is_read)[..., :budget.R].long().cumsum(-1)  # (B, H, R)
    is_estimated = is_ranked & ~is_read & (sizes > 0)
    return order[..., :budget.R], ends, bias_of(~is_estimated)


def log_size(q, index):
    """Log of the tokens that a centroid stands for: (B, H, 1, C)."""
    return index.sizes.log()[:, :, None]


def keep_rows(x, dtype):
    """Rows x (1, H, C, D) as they are kept, and the scale of each (1, H, C)."""
    return x.to(dtype), x.new_ones(x.shape[:3])


def score_centroids(q, index, method):
    """Logits (B, H, G, C) of the centroids for q (B, H, G, D), scaled."""
    return method.scores(q, index.centroids)


def mix_means(weights, index, order, method):
    """Sums (B, H, G, D) of the mean values of clusters `order` (B, H, K)."""
    return method.mix(weights, take(index.means, order))


# ---------------------------------------------------------------- clustering a segment (§4.2)

def cluster_segment(k, v, config, hot=None, energy=None, centre=None):
    """Cluster L tokens k, v (1, H, L, D), L a multiple of the cluster size.

    energy (H, D): sums of the squares of queries, by channel; alike unless
    given. centre (1, H, 1, D): that of the text's first segment, unless
    this is the first. Returns the Index, offsets from 0, and k, v in its
    order.
    """
    L, method, hot = k.shape[2], config.method(), hot or PLAIN
    energy = k.new_ones(k.shape[1::2]) if energy is None else energy
    slots, weights = config.slots(L), method.channel_weights(energy, config)
    centred = k.float() - k.float().mean(2, keepdim=True)       # (1, H, L, D)
    ids = spherical_kmeans(centred * weights, L // config.cluster,
                           config.iterations, hot)              # (1, H, L)
    order = ids.argsort(dim=-1, stable=True)
    sizes = count(split_large(ids.gather(-1, order), config, slots), slots)
    n = sizes.clamp(min=1)[..., None]                           # (1, H, C, 1)
    centroids, means = (hot.segment_sum(x, order, sizes) / n for x in (k, v))
    spreads = method.spreads(k, centroids, order, sizes, energy, hot)   # (1, H, C)
    centre = method.centre(k) if centre is None else centre
    centroids, scale_k = method.encode(centroids - centre, k.dtype)
    means, scale_v = method.encode(means, v.dtype)
    index = Index(centroids, means, sizes, sizes.cumsum(-1) - sizes,
                  spreads.bfloat16(), torch.stack([scale_k, scale_v], -1).bfloat16(),
                  centre)
    return index, take(k, order), take(v, order)


def spherical_kmeans(x, C, iterations, hot=None):
    """Cluster ids (B, H, L) of centred keys x (B, H, L, D): nearest by
    inner product.

    Centroids are unit vectors, seeded at even distances along the text. The
    published code does not normalise the seeds: they then outshine every
    unit vector, and most clusters run empty in the second pass.
    """
    L, hot = x.shape[2], hot or PLAIN
    seeds = (torch.arange(C, device=x.device) * 2 + 1) * L // (2 * C)
    centroids = F.normalize(x[:, :, seeds], dim=-1)             # (B, H, C, D)
    for _ in range(iterations - 1):
        ids = hot.nearest(x, centroids)                         # (B, H, L)
        sizes = count(ids, C)                                   # (B, H, C)
        order = ids.argsort(dim=-1, stable=True)
        moved = F.normalize(hot.segment_sum(x, order, sizes), dim=-1)
        centroids = torch.where(sizes[..., None] > 0, moved, centroids)
    return hot.nearest(x, centroids)


def nearest(x, centroids):
    """Ids (B, H, L) of the centroids (B, H, C, D) with the largest inner
    products with x. Head by head: one head's products stay in a CPU's
    cache."""
    heads = zip(x.flatten(0, 1), centroids.flatten(0, 1), strict=True)
    ids = torch.stack([(a @ b.mT).argmax(-1) for a, b in heads])
    return ids.view(x.shape[:3])


def segment_sum(x, order, sizes):
    """Sums (B, H, C, D), fp32, of x (B, H, L, D), put in order, over runs
    of sizes (B, H, C).

    embedding_bag sums each run in its order, without atomics: two runs of
    the program build one index.
    """
    n, D = sizes.flatten(), x.shape[-1]
    rows = flat_rows(order, x.shape[2])
    table = x.reshape(-1, D).float()
    bags = F.embedding_bag(rows, table, n.cumsum(0) - n, mode="sum")
    return bags.view(*sizes.shape, D)


def split_large(ids, config, slots):
    """Sorted ids (B, H, L), with clusters above P tokens cut into even
    pieces, numbered anew.

    A head whose clusters need more pieces than there are slots is cut
    evenly along its order. Then no piece is above the mean size, and some
    pieces hold neighbours of two clusters.
    """
    place = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    sizes = count(ids, ids.shape[-1])                           # (B, H, L)
    size = sizes.gather(-1, ids)
    start = (sizes.cumsum(-1) - sizes).gather(-1, ids)
    n_pieces = (size + config.largest - 1) // config.largest
    width = (size + n_pieces - 1) // n_pieces
    pieces = ((place - start) % width == 0).cumsum(-1) - 1
    return torch.where(pieces[..., -1:] < slots, pieces, place // config.cluster)


# ---------------------------------------------------------------- rows of clusters in a store

def gather_clusters(index, stores, N, ids, ends):
    """k, v (B, H, N, D) and bias (B, H, 1, N) of clusters ids (B, H, R)
    that end at ends (B, H, R)."""
    rows = unroll(index.offsets.gather(-1, ids), ends, N)       # (B, H, N)
    return *rows_of(stores, rows.clamp(min=0)), bias_of(rows < 0)


def rows_of(stores, ids):
    """k, v (B, H, N, D) of rows ids (B, H, N) of a store's tensors."""
    kept = [take(x, ids) for x in stores[:3]]
    return kept if len(stores) == 2 else unpack_bytes(*kept, stores[3])


def unroll(first, ends, N):
    """Rows (B, H, N) of runs that begin at rows `first` (B, H, R), packed
    to end at `ends`; -1 behind them."""
    place = torch.arange(N, device=ends.device)
    rows = (first - before(ends)).gather(-1, owners(ends, N)) + place
    return rows.masked_fill(place >= ends[..., -1:], -1)


def owners(ends, N):
    """Which of R packed runs, ending at `ends`, holds each place: (B, H, N)."""
    return count(before(ends), N + 1)[..., :N].cumsum(-1) - 1


def before(ends):
    """Where consecutive runs start that end at `ends` (B, H, R)."""
    return F.pad(ends[..., :-1], (1, 0))


def count(ids, C):
    """How often each of C ids occurs (B, H, C) in ids (B, H, L)."""
    zeros = torch.zeros(*ids.shape[:2], C, dtype=torch.int64, device=ids.device)
    return zeros.scatter_add_(-1, ids, torch.ones_like(ids))


def take(x, ids):
    """Rows ids (B, H, N) of x (B, H, T, D): (B, H, N, D)."""
    B, H, T, D = x.shape
    rows = x.reshape(-1, D).index_select(0, flat_rows(ids, T))
    return rows.view(B, H, -1, D)


def along(x, order):
    """Columns order (B, H, N) of x (B, H, G, C): (B, H, G, N)."""
    return x.gather(-1, order[:, :, None].expand(-1, -1, x.shape[2], -1))


def flat_rows(ids, T):
    """Rows ids (B, H, N) of each head, as rows of one matrix of B*H*T rows."""
    B, H, _ = ids.shape
    heads = torch.arange(B * H, device=ids.device).view(B, H, 1)
    return (ids + heads * T).flatten()


def bias_of(is_free):
    """Bias (B, H, 1, N) of entries (B, H, N): -inf where one is free, else 0."""
    is_free = is_free[:, :, None]
    zeros = torch.zeros_like(is_free, dtype=torch.float32)
    return zeros.masked_fill(is_free, -math.inf)


def widest(device):
    """The widest dtype of floats that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def round_up(n):
    """The next multiple of RUN."""
    return max(-(-n // RUN), 1) * RUN


PLAIN = Hot(attend, nearest, segment_sum, tripartite_attention)

PAPER = Method(
    channel_weights=lambda energy, config: 1,
    spreads=lambda k, centroids, order, sizes, *_: torch.zeros_like(sizes),
    centre=lambda k: k.new_zeros(1, k.shape[1], 1, k.shape[3]).float(),
    encode=keep_rows,
    centroid_logits=score_centroids,
    mix_means=mix_means,
    growth=lambda config, tokens: 1,
    rank=rank_by_centroid,
    log_count=log_size,
    share_values=lambda w_r, v_r, w_e, *_: (w_r, v_r, w_e),
    scores=scores,
    mix=mix,
    few=lambda budget, n: n)


# ================================================================ Part II: what is better

LONG = 8192         # tokens up to which the share of a text does not shrink
WHOLE = 2**40       # what a weight of 1 is in whole numbers


@functools.cache
def method_of(config):
    """The Method that a config selects; PAPER's entry where it selects none."""
    c, chosen = config, {}
    if c.channel_power:
        chosen["channel_weights"] = weigh_channels
    if c.bits == 4:
        chosen |= {"centre": mean_key, "encode": pack,
                   "centroid_logits": score_packed,
                   "mix_means": mix_packed}
    if c.by_mass:
        chosen |= {"spreads": measure_spreads, "rank": rank_by_mass,
                   "log_count": log_mass}
    if c.growth < 1:
        chosen["growth"] = grow
    if c.values < 1:
        chosen |= {"share_values": share_values, "few": few}
    return PAPER._replace(**chosen)


def weigh_channels(energy, config):
    """**Channel weights** (channel_power). The paper: 1.

    A query must find what it looks for in few clusters. So channels that
    are loud in queries count more when keys are clustered: weights (1, H,
    1, D) are the loudness of the channels, to a power.
    """
    return loudness(energy).pow(config.channel_power)


def loudness(energy):
    """The energy of the queries (H, D), over its mean: (1, H, 1, D), fp32.

    RoPE turns queries between channels d and d + D/2: both are as loud.
    """
    pairs = energy + energy.roll(energy.shape[-1] // 2, -1)
    mean = pairs.mean(-1, keepdim=True)                         # (H, 1)
    return torch.where(mean > 0, pairs / mean, 1).float()[None, :, None]


def pack(x, dtype=None):
    """**4 bits** (bits). The paper: 16.

    Ranking reads every centroid, the largest read of a step. In 4 bits,
    clusters of 8 tokens are as cheap to rank as clusters of 32 in 16 bits.
    x (1, H, C, D) becomes bytes (1, H, C, D/2) and a scale a row (1, H, C).
    Byte j has number j in its lower half and number j + D/2 in its upper
    half, each plus 8.
    """
    if x.shape[-1] % 2:
        raise InputError(f"a head of {x.shape[-1]} dims cannot be kept in 4 "
                         "bits: give bits 16")
    numbers, scale = whole(x, 7)
    low, high = (numbers + 8).to(torch.uint8).chunk(2, -1)
    return low | high << 4, scale


def whole(x, most):
    """x (..., D) as whole numbers up to `most`, and what one of them is
    worth (...)."""
    scale = (x.abs().amax(-1) / most).bfloat16()
    numbers = x / scale.float().clamp(min=1e-30)[..., None]
    return numbers.round().clamp(-most, most), scale


def unpack(codes):
    """The numbers that pack stored: of columns below D/2, and from D/2 on."""
    return (codes & 15).float() - 8, (codes >> 4).float() - 8


def mean_key(k):
    """**Keys minus their mean** (bits). The paper: 0.

    4 bits hold little of a channel that is large in every key. A softmax
    does not see one vector subtracted from all keys, so centroids are kept
    minus the mean (1, H, 1, D), fp32, of a text's first keys k (1, H, L,
    D).
    """
    return k.float().mean(2, keepdim=True)


def score_packed(q, index, method):
    """score_centroids on 4 bits. Queries are rounded to bytes: their sums
    with 4 bits are exact in any order."""
    numbers, unit = in_bytes(q)
    halves = zip(numbers.chunk(2, -1), unpack(index.centroids), strict=True)
    logits = sum(method.scores(*half) for half in halves)       # (B, H, G, C)
    logits = logits * unit * index.scales[..., 0][:, :, None]
    return logits + (q * index.centre).sum(-1, keepdim=True)


def in_bytes(q):
    """Whole numbers up to 127, fp32, for q (B, H, G, D), and what one is
    worth (B, H, G, 1)."""
    fine = 127 / q.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return (q * fine).round(), 1 / fine


def mix_packed(weights, index, order, method):
    """mix_means on 4 bits."""
    scale = index.scales[..., 1].gather(-1, order)[:, :, None]  # (B, H, 1, K)
    halves = unpack(take(index.means, order))
    return torch.cat([method.mix(weights * scale, x) for x in halves], -1)


def measure_spreads(k, centroids, order, sizes, energy, hot):
    """The variance of the member keys as queries see it: (1, H, C).

    A loud channel moves the logits most. So the variance is the mean over
    the channels by their loudness: times |q|^2, that of the logits.
    """
    loud = loudness(energy)                                     # (1, H, 1, D)
    squares = (k.float().square() * loud).mean(-1, keepdim=True)    # (1, H, L, 1)
    squares = hot.segment_sum(squares, order, sizes)[..., 0]
    squares = squares / sizes.clamp(min=1)
    return (squares - (centroids.square() * loud).mean(-1)).clamp(min=0)


def log_mass(q, index):
    """**Spread factor** (by_mass). The paper: log(size), a lower bound.

    If the logits of n tokens are normal with variance s, the sum of their
    exponentials is n exp(s/2) times that of the centroid's. Real keys have
    thinner tails: n (1 + s/2) is closer.
    """
    half = q.square().sum(-1, keepdim=True) / 2                 # (B, H, G, 1)
    factor = 1 + half * index.spreads[:, :, None]
    return (index.sizes[:, :, None] * factor).log()


def rank_by_mass(q, logits, x_steady, index):
    """**Ranking by mass** (by_mass). The paper: rank_by_centroid.

    A cluster that is not read is lost for good, and one that is read in
    vain costs little. So clusters are ranked by the largest mass that they
    may hold. It counts as a share of all attention, the steady zone's
    included: a query head that looks at the sink has no vote.
    """
    possible = logits + log_possible_mass(q, index)             # (B, H, G, C)
    near = x_steady.logsumexp(-1)                               # (B, H, G)
    total = possible.logsumexp(-1).logaddexp(near)
    return (possible - total[..., None]).exp().sum(2)           # (B, H, C)


def log_possible_mass(q, index):
    """Log of what a cluster may hold, over exp of its centroid's logit: (B,
    H, G, C).

    The members' logits vary with deviation |q| sqrt(spread). Of n normal
    logits the sum of exponentials is typically n exp(deviation^2 / 2), as
    long as the deviation is below t = sqrt(2 log n): none of the n lies
    above t deviations. Beyond that, the largest logit counts (the random
    energy model of Derrida).
    """
    sizes, spreads = index.sizes[:, :, None], index.spreads[:, :, None]
    deviation = (q.square().sum(-1, keepdim=True) * spreads).sqrt()
    top = deviation.minimum((2 * sizes.clamp(min=1).log()).sqrt())
    return sizes.log() + top * (deviation - top / 2)


def grow(config, tokens):
    """**Growth** (growth). The paper: the same share of any text.

    A longer text has more tokens, and hardly more that matter. Above LONG
    tokens the retrieved clusters grow by a power of the text. Clusters that
    growth removes are estimated instead.
    """
    return (tokens / LONG).clamp(min=1) ** (config.growth - 1)


def few(budget, n):
    """How many of n retrieved tokens have their values read: the share,
    rounded up. In whole numbers, so that all twins agree."""
    return -(-n * round(1000 * budget.values) // 1000)


def share_values(w_r, v_r, w_e, ends, budget, method):
    """**Values of a fifth** (values). The paper: all values.

    Weights need keys alone. Once they are known, most are next to nothing.
    Values are read of the tokens that weigh most, summed over G. The others
    leave their weight to their cluster's mean value. w_r (B, H, G, N), v_r
    (B, H, N, D), w_e (B, H, G, K); N becomes M.
    """
    N, R = w_r.shape[-1], ends.shape[-1]
    M = method.few(budget, N)
    best = w_r.sum(2).topk(M).indices                           # (B, H, M)
    place = torch.arange(M, device=best.device)
    is_asked = place < few(budget, ends[..., -1:])              # (B, H, M)
    is_read = torch.zeros(v_r.shape[:3], dtype=torch.bool, device=best.device)
    is_read = is_read.scatter(-1, best, is_asked)[:, :, None]   # (B, H, 1, N)
    owner = owners(ends, N)[:, :, None].expand_as(w_r)
    shares = (w_r.masked_fill(is_read, 0) * WHOLE).long()   # add up alike in any order
    left = shares.new_zeros(1).expand(*w_r.shape[:3], R).scatter_add(-1, owner, shares)
    w_e = w_e + F.pad(left / WHOLE, (0, w_e.shape[-1] - R))
    return along(w_r, best) * is_asked[:, :, None], take(v_r, best), w_e


def unpack_bytes(k, v, scales, centre):
    """Rows k, v (B, H, N, D), fp32, of what a ByteStore keeps."""
    of_k, of_v = scales.float().split(1, -1)                    # (B, H, N, 1)
    return torch.addcmul(centre, k.float(), of_k), v.float() * of_v


class ByteStore(Store):
    """**Bytes** (store_bits). The paper: 16 bits.

    Most of what a step reads are keys and values of retrieved tokens. With
    one scale a row, 8 bits a number are enough for them. Keys are kept
    minus the mean of a sequence's first ones (mean_key). What a later chunk
    of a prompt reads of an earlier one is rounded. So are the tokens that a
    prompt leaves in the steady zone: they come out of the store. What state()
    gives is rounded once more where it is restored.
    """

    def __init__(self, cache, T, like):
        super().__init__(cache, T, like.to(torch.int8))
        self.scales = self.k.new_zeros(*self.k.shape[:3], 2, dtype=torch.bfloat16)
        self.centre = self.k[:, :, :1].float()                  # (B, H, 1, D)
        self.dtype = like.dtype

    def tensors(self):
        return self.k, self.v, self.scales, self.centre

    def view(self, row, first, end):
        *rows, centre = (x[row:row + 1] for x in self.tensors())
        k, v = unpack_bytes(*(x[:, :, first:end] for x in rows), centre)
        return k.to(self.dtype), v.to(self.dtype)

    def put(self, row, first, k, v):
        k, v = (x[0].to(self.k.device, torch.float32) for x in (k, v))
        if not k.shape[1]:
            return
        if not self.scales[row, 0, 0, 0]:       # nothing is kept yet
            self.centre[row] = k.mean(1, keepdim=True)
        rows = row, slice(None), slice(first, first + k.shape[1])
        for i, x in enumerate((k - self.centre[row], v)):
            numbers, scale = whole(x, 127)
            (self.k, self.v)[i][rows] = numbers.to(torch.int8)
            self.scales[..., i][rows] = scale.clamp(min=1e-30)

    def nbytes(self):
        return {"store": self.k.nbytes + self.v.nbytes + self.scales.nbytes,
                "mean key": self.centre.nbytes}


if __name__ == "__main__":
    from app.cli import main
    raise SystemExit(main())
