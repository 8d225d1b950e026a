"""RetroInfer: the KV cache as a vector store.

Full attention reads every key and value at every decode step. RetroInfer reads a few per cent of
them. It clusters the keys while they arrive (the wave index). A step ranks the clusters by their
centroids, attends exactly to the members of the best clusters, estimates the next clusters from
their centroids, and drops the rest. The first and the latest tokens are always exact. One softmax
spans all of it (tripartite attention):

      sink |    clusters, best first for this query             | local, generated
    ┌──────┬──────────────┬───────────────────────┬─────────────┬──────────────────┐
    │steady│ retrieved: R │ estimated: E          │ dropped     │ steady           │
    │ k, v │ members k, v │ centroid, mean value, │             │ k, v             │
    │      │              │ bias log(size)        │             │                  │
    └──────┴──────────────┴───────────────────────┴─────────────┴──────────────────┘

    B batch           H kv heads               G query heads per kv head
    T tokens          D head dim               L tokens in a segment
    C cluster slots   P most tokens a cluster  W steady-zone slots
    R, E clusters retrieved, estimated         N retrieved tokens, M of them with values

    N also stands for any number of rows; the shapes R+E and N are rounded up to multiples of 64

    python retroinfer.py --prompt-file x        # the command line, in app/

Part I is the paper: Chen et al., RetroInfer, PVLDB 19(5) 2026 (arXiv 2505.02922). Part II is what
this project does better, one named entry each, with the paper's choice in its place in Part I.
RetroConfig.paper() selects no entry of Part II. Copied alone, this file needs torch 2.5 or later.

Part I differs from the published code in six places. K-means seeds are normalised, or most
clusters run empty. Sums run over sorted tokens and not over atomics: two runs build one index.
Clusters above twice the mean size are split and never skipped. Ranking is in fp32. Every k-means
pass and the mean of the keys are a segment's own. A tail shorter than `update` stays exact.
"""
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right

RUN = 64        # shapes are multiples of this: loops over rows of memory have no remainder


@dataclass(frozen=True)
class RetroConfig:
    """The numbers of the method. The comment beside a field is its help text.

    The defaults are ours (docs/defaults.md says why); paper() has the published ones.
    """
    sink: int = 4                   # first tokens, always exact
    local: int = 32                 # latest tokens, always exact
    update: int = 256               # generated tokens that are indexed together
    segment: int = 2048             # tokens that are clustered together
    cluster: int = 8                # mean tokens in a cluster
    iterations: int = 4             # k-means passes over a segment
    retrieve: float = 0.058         # share of the clusters whose members are read
    estimate: float = 0.17          # share of the clusters that are estimated
    min_retrieve: int = 28          # clusters retrieved at least, however short the text
    # Each of these selects an entry of Part II. paper() has the value that selects none.
    channel_power: float = 0.35     # k-means weighs channels by the queries' energy to this power
    outliers: bool = True           # free cluster slots hold the tokens farthest from a centroid
    bits: int = 4                   # of a number in a centroid or mean value: 4 or 16
    by_mass: bool = True            # rank by the mass that a cluster may hold, not by its centroid
    boost: int = 8                  # most times its share, for a head whose clusters tell little
    growth: float = 0.7             # power of the text by which the share grows above 8,192 tokens
    values: float = 0.2             # share of the retrieved tokens whose values are read
    mean_room: bool = True          # read as many tokens as mean clusters have; no: all members

    @classmethod
    def paper(cls):
        """The published method and its settings."""
        return cls(sink=4, local=64, update=1024, segment=8192, cluster=16, iterations=10,
                   retrieve=0.018, estimate=0.232, min_retrieve=1, **PART_II_OFF)

    def __post_init__(self):
        lowest = {"sink": 0, "local": 1, "update": 1, "segment": 1, "cluster": 1,
                  "iterations": 1, "min_retrieve": 1, "boost": 1}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}: at least {low} is needed")
        if self.bits not in (4, 16):
            raise ValueError(f"bits is {self.bits}: give 4 or 16")
        for field in fields(self):
            given = getattr(self, field.name)
            if field.type is float and not 0 <= given <= 1:
                raise ValueError(f"{field.name} is {given}: give a number between 0 and 1")
        for name in ("segment", "update"):
            given = getattr(self, name)
            if given % self.cluster:
                raise ValueError(f"{name} is {given}: give a multiple of cluster, {self.cluster}")

    @property
    def largest(self):
        """P, the most tokens that a cluster may hold."""
        return 2 * self.cluster

    @property
    def steady(self):
        """The most tokens of a sequence that are in no cluster while it generates."""
        return self.sink + self.local + self.update

    def slots(self, tokens):
        """Cluster slots for so many tokens: an eighth more than clusters, for split ones."""
        return tokens // self.cluster + tokens // (8 * self.cluster)

    def method(self):
        """The Method that this config selects. Part I alone can make the paper's."""
        is_paper = all(getattr(self, name) == value for name, value in PART_II_OFF.items())
        return PAPER if is_paper else method_of(self)


# The value of each field that selects no entry of Part II.
PART_II_OFF = {"channel_power": 0.0, "outliers": False, "bits": 16, "by_mass": False, "boost": 1,
            "growth": 1.0, "values": 1.0, "mean_room": False}


# ================================================================ Part I: the paper

class Index(NamedTuple):
    """What is known of C clusters. A cluster's tokens lie together in the store (CSR)."""
    centroids: torch.Tensor     # (B, H, C, D) mean of the member keys; in 4 bits (B, H, C, D/2)
    means: torch.Tensor         # (B, H, C, D) mean of the member values, likewise
    sizes: torch.Tensor         # (B, H, C) members, kept in fp32; 0: a free slot
    offsets: torch.Tensor       # (B, H, C) first row in the store
    spreads: torch.Tensor       # (B, H, C) Part II: variance of the member keys. The paper: 0
    scales: torch.Tensor        # (B, H, C, 2) Part II: of 4-bit centroid and mean. The paper: 1


class Caps(NamedTuple):
    """The most that any head may ever read in a step. Caps fix shapes: one graph for all steps."""
    tokens: int                 # N retrieved tokens
    values: int                 # M of them whose values are read
    retrieve: int               # R clusters
    ranked: int                 # R + E clusters


class Limits(NamedTuple):
    """What each head may read in this step, (B, H) each. Places beyond a limit are masked."""
    tokens: torch.Tensor
    values: torch.Tensor
    retrieve: torch.Tensor
    ranked: torch.Tensor


class Budget(NamedTuple):
    """What a step may read."""
    caps: Caps
    limits: Limits


# ---------------------------------------------------------------- what every method's cache needs

class Store:
    """Keys and values of all tokens of a layer, (B, H, T, D) each, on the device.

    buffer.WaveBuffer has the same functions for a store on the host: there bring gives copies, and
    put writes them back.
    """
    attend = None       # what replaces hot.attend where k and v are not plain device tensors

    def __init__(self, cache, T, like):
        B, H = len(cache.n_tokens), like.shape[1]
        self.k = like.new_zeros(B, H, T, like.shape[3])
        self.v = like.new_zeros(B, H, T, like.shape[3])

    def view(self, row, first, end):
        """Views k, v (1, H, end - first, D) of rows of a sequence."""
        return [x[row:row + 1, :, first:end] for x in (self.k, self.v)]

    def bring(self, row, first, known, end):
        """view, on the device. Rows from `known` on hold no tokens yet."""
        return self.view(row, first, end)

    def put(self, row, first, k, v):
        """Keep k, v, which bring gave and the caller has changed. Here they are views."""

    def nbytes(self):
        """Bytes allocated, by part."""
        return {"store": self.k.nbytes + self.v.nbytes}

    def facts(self):
        """What there is to say of a run, by name."""
        return {}


class LayerCache(nn.Module):
    """Keys and values of one layer, for a batch of sequences of unequal length up to `capacity`.

        store     sink | indexed tokens, in the method's order | latest tokens, as they came
        steady    sink | latest tokens, generated tokens | free slots

    A sequence reads or decodes. While it reads, its latest tokens are in the store. A chunk attends
    to all tokens before it, whose order does not matter: their positions are in the keys (RoPE).
    While it decodes, its latest tokens are in the steady zone. update(), between steps, moves them
    there, and indexes open tokens: past the sink, not indexed, older than the local window. Nothing
    reallocates, and no shape changes.

    A method supplies allocate_index(like); absorb(row, k, v), which indexes the oldest open tokens
    k, v (1, H, n, D), may reorder them in place, and counts them in n_indexed; attend(q, steady), a
    step's attention; bytes_read(); and, if it listens to queries, observe(q, start, row).
    """

    def __init__(self, config, capacity, batch=1, make_store=Store):
        super().__init__()
        self.config, self.capacity, self.make_store = config, capacity, make_store
        self.store = None
        self.is_in_store = [True] * batch   # the latest tokens are in the store, not in steady
        self.n_tokens = torch.zeros(batch, dtype=torch.int64)
        self.n_indexed = torch.zeros(batch, dtype=torch.int64)

    def allocate(self, like):
        """All state, for keys `like` (1, H, any, D)."""
        B, H, D = len(self.n_tokens), like.shape[1], like.shape[3]
        W = round_up(self.config.steady)
        self.k_steady, self.v_steady = (like.new_zeros(B, H, W, D) for _ in range(2))
        self.n_tokens = self.n_tokens.to(like.device)
        self.n_indexed = self.n_indexed.to(like.device)
        self.allocate_index(like)
        self.store = self.make_store(self, round_up(self.capacity), like)

    def observe(self, q, start, row=None):
        """Hear queries q (B or 1, H*G, T, D) of tokens from `start` on, before they attend."""

    def append(self, k, v, row=0):
        """Append k, v without attending: all k, v (1, H, n, D) of the sequence, in store order."""
        k_all, v_all = self.write(k, v, row)
        self.settle(row, k_all, v_all, k.shape[2])
        return k_all, v_all

    def write(self, k, v, row):
        """Put tokens k, v (1, H, T, D) behind a sequence: its k, v (1, H, n, D) on the device."""
        if self.store is None:
            self.allocate(k)
        self.move_to_store(row)
        start = int(self.n_tokens[row])
        end = start + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit an index of {self.capacity}")
        k_all, v_all = self.store.bring(row, 0, start, end)                 # (1, H, end, D)
        k_all[:, :, start:] = k
        v_all[:, :, start:] = v
        self.n_tokens[row] = end
        return k_all, v_all

    def prefill(self, q, k, v, row=0):
        """Append T tokens, q (1, H*G, T, D), to a sequence: exact causal attention (1, H*G, T, D).

        ValueError if they do not fit the capacity.
        """
        k_all, v_all = self.write(k, v, row)
        self.observe(q, k_all.shape[2] - k.shape[2], row)
        o = attend_causally(q, k_all, v_all)
        self.settle(row, k_all, v_all, k.shape[2])
        return o

    def settle(self, row, k_all, v_all, T):
        """Index the segments that are full, and write back the rows that changed.

        These are the T new rows, and the rows that absorb may reorder: from the oldest open one on.
        """
        first = min(k_all.shape[2] - T, self.config.sink + int(self.n_indexed[row]))
        self.absorb_open(row, k_all, v_all, self.config.segment)
        self.store.put(row, first, k_all[:, :, first:], v_all[:, :, first:])

    def decode(self, q, k, v):
        """Append one token to each sequence, q (B, H*G, 1, D), and attend: (B, H*G, 1, D).

        ValueError unless update() was called after a prefill.
        """
        if any(self.is_in_store):
            raise ValueError("call update() between prefill and decode: it builds the index")
        B, H, _, D = k.shape
        self.observe(q, self.n_tokens[:, None])
        batch = torch.arange(B, device=k.device)
        slot = torch.arange(self.k_steady.shape[2], device=k.device)
        last = self.n_tokens - self.n_indexed                               # (B,)
        self.k_steady[batch, :, last] = k[:, :, 0]
        self.v_steady[batch, :, last] = v[:, :, 0]
        self.n_tokens.add_(1)
        is_free = slot > last[:, None]                                      # (B, W)
        bias = bias_of(is_free[:, None]).expand(-1, H, -1, -1)              # (B, H, 1, W)
        o = self.attend(q.reshape(B, H, -1, D), (self.k_steady, self.v_steady, bias))
        return o.reshape(q.shape)

    forward = decode                        # calling a cache is a step

    def update(self):
        """Index the tokens that left the local window. Returns how many steps may follow.

        ValueError after more steps than the last call returned.
        """
        for row in range(len(self.is_in_store)):
            n_steady = int(self.n_tokens[row] - self.n_indexed[row])
            if n_steady > self.config.steady and not self.is_in_store[row]:
                raise ValueError("more steps were taken than update() had returned: call it sooner")
            if n_steady == self.config.steady:
                self.move_to_store(row)
            if self.is_in_store[row]:
                self.move_to_steady(row)
        n_steady = int((self.n_tokens - self.n_indexed).max())
        return min(self.config.steady - n_steady, self.capacity - int(self.n_tokens.max()))

    def move_to_store(self, row):
        """Copy a sequence's latest tokens from the steady zone to the end of the store."""
        if not self.is_in_store[row]:
            for steady, store in self.latest(row):
                store.copy_(steady)
            self.is_in_store[row] = True

    def move_to_steady(self, row):
        """Index what is long enough, and copy the tokens that are left to the steady zone."""
        first, n = self.config.sink + int(self.n_indexed[row]), int(self.n_tokens[row])
        k, v = self.store.bring(row, first, n, n)
        self.absorb_open(row, k, v, min(self.config.update, self.config.segment))
        self.store.put(row, first, k, v)
        for steady, store in self.latest(row):
            steady.copy_(store)
        self.is_in_store[row] = False

    def latest(self, row):
        """Places of the tokens that are not indexed: pairs of views of steady zone and store."""
        n, indexed = int(self.n_tokens[row]), int(self.n_indexed[row])
        head = min(n, self.config.sink)
        zones = self.k_steady, self.v_steady
        for steady, store in zip(zones, self.store.view(row, 0, n), strict=True):
            yield steady[row, :, :head], store[0, :, :head]
            yield steady[row, :, head:n - indexed], store[0, :, head + indexed:]

    def absorb_open(self, row, k, v, least):
        """Absorb the open tokens, segment by segment.

        k, v (1, H, n, D) end with the sequence's last token. A part shorter than `least` waits.
        """
        c, end = self.config, k.shape[2] - self.config.local
        n_open = int(self.n_tokens[row] - self.n_indexed[row]) - c.sink - c.local
        for first in range(end - max(n_open, 0), end, c.segment):
            n = min(c.segment, end - first) // c.cluster * c.cluster
            if n >= least:
                self.absorb(row, k[:, :, first:first + n], v[:, :, first:first + n])


def attend_causally(q, k, v):
    """Attention of the last Tq tokens' q (1, H*G, Tq, D) to k, v (1, H, T, D), each to its past."""
    if q.shape[2] == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    causal = causal_lower_right(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, causal, enable_gqa=True)


# ---------------------------------------------------------------- the wave index (§4.2)

class WaveIndex(LayerCache):
    """The cache of one layer as a vector store.

    hot: the functions that take the time. PLAIN are this file's own; generate.hot_functions()
    gives the fastest for a device. make_store: buffer.offload(...) keeps the store on the host.
    """

    def __init__(self, config, capacity, batch=1, hot=None, make_store=Store):
        super().__init__(config, capacity, batch, make_store)
        self.hot, self.method = hot or PLAIN, config.method()
        self.n_clusters = torch.zeros(batch, dtype=torch.int64)

    def allocate_index(self, like):
        B, H, D = len(self.n_tokens), like.shape[1], like.shape[3]
        if self.config.bits == 4 and D % 2:
            raise ValueError(f"a head of {D} dims cannot be kept in 4 bits: give bits 16")
        C = round_up(self.config.slots(self.capacity))
        row, _ = self.method.codec.encode(torch.zeros(1, 1, 1, D), like.dtype)

        def zeros(*shape, dtype):       # one storage each: a compiled step may not see aliases
            return like.new_zeros(B, H, *shape, dtype=dtype)

        self.index = Index(*(zeros(C, row.shape[3], dtype=row.dtype) for _ in range(2)),
                           zeros(C, dtype=torch.float32), zeros(C, dtype=torch.int64),
                           zeros(C, dtype=torch.bfloat16), zeros(C, 2, dtype=torch.bfloat16))
        self.q_energy = zeros(D, dtype=torch.float64)
        self.boosts = like.new_ones(B, H, dtype=torch.float32)
        self.n_clusters = self.n_clusters.to(like.device)
        most = limits_of(self.config, torch.tensor(self.capacity), self.config.boost, self.method)
        N = round_up(int(most.tokens))
        self.caps = Caps(N, self.method.n_values(self.config, N),
                         min(int(most.retrieve), C), min(round_up(int(most.ranked)), C))

    def attend(self, q, steady):
        attend = self.store.attend or self.hot.attend
        stores = self.store.k, self.store.v
        return attend(q, steady, self.index, stores, self.budget(), self.method)

    def budget(self):
        """The Budget of a step."""
        each = limits_of(self.config, self.n_indexed[:, None], self.boosts, self.method)
        return Budget(self.caps, each)

    def absorb(self, row, k, v):
        """Cluster the next tokens k, v (1, H, L, D), put them in cluster order in place."""
        start = self.config.sink + int(self.n_indexed[row])
        weights = self.method.channel_weights(self.q_energy[row], self.config)
        part, k_sorted, v_sorted = cluster_segment(k, v, self.config, self.hot, weights)
        k.copy_(k_sorted)
        v.copy_(v_sorted)
        part = part._replace(offsets=part.offsets + start)
        first, n = int(self.n_clusters[row]), part.sizes.shape[2]
        for whole, new in zip(self.index, part, strict=True):
            whole[row, :, first:first + n] = new[0]
        self.n_indexed[row] += k.shape[2]
        self.n_clusters[row] += n

    def observe(self, q, start, row=None):
        """Add up the energy (squares) of the first segment's queries, for channel_weights."""
        heard = self.config.sink + self.config.segment
        q = q[:, :, :heard]
        is_heard = start + torch.arange(q.shape[2], device=q.device) < heard    # (B, T) or (T,)
        squares = q.float().square() * is_heard.view(-1, 1, q.shape[2], 1)
        energy = squares.sum(2, dtype=torch.float64)                        # (B, H*G, D)
        energy = energy.unflatten(1, (self.q_energy.shape[1], -1)).mean(2)  # (B, H, D)
        (self.q_energy if row is None else self.q_energy[row:row + 1]).add_(energy)

    def move_to_steady(self, row):
        super().move_to_steady(row)
        n = self.n_tokens[row].clamp(1, self.config.sink + self.config.segment)
        index = Index(*(x[row] for x in self.index))
        energy = self.q_energy[row] / n
        self.boosts[row] = self.method.head_boosts(energy, index, self.config)

    def state(self, row):
        """All that is known of a sequence, by name: views (H, ...), and counters (2,).

        It moves the latest tokens to the store: call update() before the next decode.
        """
        self.move_to_store(row)
        n, c = int(self.n_tokens[row]), int(self.n_clusters[row])
        k, v = self.store.view(row, 0, n)
        return ({"k": k[0], "v": v[0], "q_energy": self.q_energy[row],
                 "counters": torch.stack([self.n_indexed[row], self.n_clusters[row]])}
                | {name: x[row, :, :c] for name, x in self.index._asdict().items()})

    def restore(self, state, device=None, row=0):
        """Fill a sequence that holds nothing with what state() gave."""
        if self.store is None:
            self.allocate(state["k"][None, :, :0].to(device))
        self.n_tokens[row] = state["k"].shape[1]
        self.n_indexed[row], self.n_clusters[row] = state["counters"].tolist()
        for name, x in self.state(row).items():
            if name != "counters":
                x.copy_(state[name])

    def bytes_read(self):
        """Bytes of K, V and index that one decode step reads at most."""
        index, each = self.index, self.budget().limits
        key, vector = self.store.k[0, 0, 0].nbytes, index.means[0, 0, 0].nbytes
        tokens = 2 * self.k_steady.shape[2] + each.tokens + each.values     # keys, then values
        vectors = index.sizes.shape[2] + each.ranked                        # centroids, then means
        # of each cluster size, spread and scale: 4 + 2 + 2; an offset: 8; the scale of a mean: 2
        numbers = 8 * index.sizes.shape[2] + 8 * each.retrieve + 2 * each.ranked
        heads = index.sizes.shape[:2]
        return int((tokens * key + vectors * vector + numbers).expand(heads).sum())

    def facts(self):
        """What a step may read, as numbers. A list has the mean over heads for each sequence."""
        each, (_, H, _, D) = self.budget().limits, self.store.k.shape
        clusters = (self.index.sizes > 0).sum(-1)                           # (B, H)
        n_clusters, n_retrieve, n_ranked = (x.double().mean(-1) for x in (
            clusters, each.retrieve.minimum(clusters), each.ranked.minimum(clusters)))
        key = H * D * self.store.k.element_size()                           # bytes
        return {"tokens": self.n_tokens.tolist(), "indexed_tokens": self.n_indexed.tolist(),
                "clusters": n_clusters.tolist(),
                "retrieved_clusters": n_retrieve.tolist(),
                "estimated_clusters": (n_ranked - n_retrieve).tolist(),
                "bytes_read": self.bytes_read(), "bits": self.config.bits,
                "dense_bytes": 2 * key * int(self.n_tokens.sum()), **self.store.facts()}

    def nbytes(self):
        """Bytes allocated, by part."""
        return {"index": sum(x.nbytes for x in self.index),
                "steady zone": self.k_steady.nbytes + self.v_steady.nbytes, **self.store.nbytes()}


def limits_of(config, tokens, boosts=1, method=None):
    """The Limits of heads, (B, H) or (B, 1), of sequences with so many indexed tokens (B, 1)."""
    slots, clusters = config.slots(tokens), tokens // config.cluster
    method = method or config.method()

    def portion(share, factor=1):       # of the clusters before any is split; 1 means all slots
        if share >= 1:
            return slots * torch.ones_like(tokens)
        return (clusters * share * factor).round().long().minimum(slots)

    factor = method.retrieve_factor(config, tokens, boosts)
    n_retrieve = portion(config.retrieve, factor).clamp(min=config.min_retrieve)
    n_ranked = portion(config.retrieve + config.estimate).maximum(n_retrieve)
    n_tokens = method.room(config, n_retrieve)
    return Limits(n_tokens, method.n_values(config, n_tokens), n_retrieve, n_ranked)


# ---------------------------------------------------------------- tripartite attention (§4.2)

def attend(q, steady, index, stores, budget, method):
    """One step's attention (B, H, G, D) of q (B, H, G, D) to the steady zone and the clusters.

    steady: k, v (B, H, W, D) and bias (B, H, 1, W), -inf where a slot is free. stores: k, v
    (B, H, T, D). This is the reference of generate.attend, kernels.attend and native.step.attend.
    """
    fetch = functools.partial(gather_clusters, index, stores, budget.caps.tokens)
    return tripartite_attention(q, steady, index, budget, fetch, method)


def tripartite_attention(q, steady, index, budget, fetch, method):
    """attend, with fetch(ids, ends) for the members k, v and bias of clusters ids (B, H, R).

    A centroid with bias log(size) weighs as much as its tokens would if their keys were equal
    (eq. 2); by Jensen's inequality never more than they do (eq. 3).
    The output is one weighted mean: of values, and of clusters' mean values (eq. 4).
    """
    q = q.float() * q.shape[-1] ** -0.5                                     # (B, H, G, D)
    k_s, v_s, bias_s = steady
    x_s = method.scores(q, k_s) + bias_s                                    # (B, H, G, W)
    x_c = method.codec.score(q, index, method)                              # (B, H, G, C)
    order = rank_clusters(q, x_c, x_s, index, budget.caps.ranked, method)   # (B, H, R+E)
    chosen = choose_clusters(order, index, budget)
    k_r, v_r, bias_r = fetch(chosen.ids, chosen.ends)                       # (B, H, N, D)
    x_r = method.scores(q, k_r) + bias_r                                    # (B, H, G, N)
    x_e = along(x_c + method.log_count(q, index), order) + chosen.bias      # (B, H, G, R+E)
    widths = [x.shape[-1] for x in (x_s, x_r, x_e)]
    weights = torch.cat([x_s, x_r, x_e], -1).softmax(-1)
    w_s, w_r, w_e = weights.split(widths, -1)
    w_r, v_r, w_e = method.share_values(w_r, v_r, w_e, chosen, budget)
    o = method.mix(w_s, v_s) + method.mix(w_r, v_r)
    o = o + method.codec.mix(w_e, index, order, method)
    return o.to(v_s.dtype)                                                  # (B, H, G, D)


def scores(q, k):
    """Inner products (B, H, G, N), fp32, of q (B, H, G, D), fp32, and k (B, H, N, D)."""
    return q @ k.float().mT


def mix(weights, v):
    """Sums (B, H, G, D), fp32, of values v (B, H, N, D), weighted by weights (B, H, G, N)."""
    return weights @ v.float()


def rank_clusters(q, logits, x_steady, index, n, method):
    """The n best clusters (B, H, n), best first, for all query heads of a group together."""
    return method.rank(q, logits, x_steady, index).topk(n, sorted=True).indices


def rank_by_centroid(q, logits, x_steady, index):
    """Each cluster's share of a softmax over the centroids' logits, summed over G: (B, H, C)."""
    is_free = index.sizes[:, :, None] == 0
    return logits.masked_fill(is_free, torch.finfo(logits.dtype).min).softmax(-1).sum(2)


class Chosen(NamedTuple):
    """What a step does with the ranked clusters."""
    ids: torch.Tensor       # (B, H, R) the clusters that may be read, best first
    ends: torch.Tensor      # (B, H, R) where each ends among the tokens read
    bias: torch.Tensor      # (B, H, 1, R+E) 0 of a cluster that is estimated, else -inf


def choose_clusters(order, index, budget):
    """Which of the ranked clusters `order` (B, H, R+E) are read, and which are estimated.

        order    c0    c1   c2     c3   c4   │ c5   c6   c7    │ c8 ...
                 └──── limits.retrieve ──────┘                 │
                 └──── limits.ranked ──────────────────────────┘
        read     │c0   │c1  │c2    │ limits.tokens: c3 does not fit
        ends           3    5      9
        bias     -inf  -inf -inf   0    0      0    0    0      -inf

    Reading stops at the first cluster that does not fit: c3 and c4 get no rows. A ranked cluster
    that has tokens and no rows is estimated.
    """
    caps, limits = budget
    place = torch.arange(order.shape[-1], device=order.device)
    sizes = index.sizes.gather(-1, order) * (place < limits.ranked[..., None])   # (B, H, R+E)
    asked = sizes * (place < limits.retrieve[..., None])
    ends = asked[..., :caps.retrieve].long().cumsum(-1)                         # (B, H, R)
    fits = ends <= limits.tokens[..., None]
    ends = ends.minimum(ends.masked_fill(~fits, 0).amax(-1, keepdim=True))
    n_read = F.pad(ends - before(ends), (0, order.shape[-1] - caps.retrieve))
    is_estimated = sizes != n_read                                              # all rows or none
    return Chosen(order[..., :caps.retrieve], ends, bias_of(~is_estimated))


def log_size(q, index):
    """Logarithm of the tokens that a centroid stands for: (B, H, 1, C), -inf of a free slot."""
    return index.sizes.log()[:, :, None]


def keep_rows(x, dtype):
    """Rows x (1, H, C, D) as they are kept, and the scale of each (1, H, C)."""
    return x.to(dtype), x.new_ones(x.shape[:3])


def score_centroids(q, index, method):
    """Logits (B, H, G, C) of the centroids for q (B, H, G, D), scaled."""
    return method.scores(q, index.centroids)


def mix_means(weights, index, order, method):
    """Sums (B, H, G, D) of the mean values of clusters `order` by weights (B, H, G, R+E)."""
    return method.mix(weights, take(index.means, order))


# ---------------------------------------------------------------- clustering a segment (§4.2)

def cluster_segment(k, v, config, hot=None, weights=1):
    """Cluster L tokens k, v (1, H, L, D), L a multiple of the cluster size.

    weights (1, H, 1, D) or 1: of the channels of k. Returns their Index, offsets from 0, and k, v
    in its order.
    """
    L, method, hot = k.shape[2], config.method(), hot or PLAIN
    slots = config.slots(L)
    centred = k.float() - k.float().mean(2, keepdim=True)                   # (1, H, L, D)
    ids = spherical_kmeans(centred * weights, L // config.cluster, config.iterations, hot)
    order = ids.argsort(dim=-1, stable=True)                                # (1, H, L)
    ids = split_large(ids.gather(-1, order), config, slots)                 # (1, H, L)
    order, ids = method.fill_slots(centred, order, ids, slots, hot)
    sizes = count(ids, slots)                                               # (1, H, slots)
    n = sizes.clamp(min=1)[..., None]
    centroids, means = (hot.segment_sum(x, order, sizes) / n for x in (k, v))
    spreads = method.spreads(k, centroids, order, sizes, hot)               # (1, H, slots)
    centroids, scale_k = method.codec.encode(centroids, k.dtype)
    means, scale_v = method.codec.encode(means, v.dtype)
    index = Index(centroids, means, sizes, sizes.cumsum(-1) - sizes, spreads.bfloat16(),
                  torch.stack([scale_k, scale_v], -1).bfloat16())
    return index, take(k, order), take(v, order)


def spherical_kmeans(x, C, iterations, hot=None):
    """Cluster ids (B, H, L) of centred keys x (B, H, L, D): nearest by inner product.

    Centroids are unit vectors, seeded at even distances along the text. The published code does
    not normalise the seeds: they then outshine every unit vector, and most clusters run empty in
    the second pass.
    """
    L, hot = x.shape[2], hot or PLAIN
    seeds = (torch.arange(C, device=x.device) * 2 + 1) * L // (2 * C)       # (C,)
    centroids = F.normalize(x[:, :, seeds], dim=-1)                         # (B, H, C, D)
    for _ in range(iterations - 1):
        ids = hot.nearest(x, centroids)                                     # (B, H, L)
        sizes = count(ids, C)                                               # (B, H, C)
        sums = hot.segment_sum(x, ids.argsort(dim=-1, stable=True), sizes)
        centroids = torch.where(sizes[..., None] > 0, F.normalize(sums, dim=-1), centroids)
    return hot.nearest(x, centroids)


def nearest(x, centroids):
    """Ids (B, H, L) of the centroids (B, H, C, D) with the largest inner products with x.

    Head by head: the products of one head stay in the cache of a CPU.
    """
    heads = zip(x.flatten(0, 1), centroids.flatten(0, 1), strict=True)
    return torch.stack([(a @ b.mT).argmax(-1) for a, b in heads]).view(x.shape[:3])


def segment_sum(x, order, sizes):
    """Sums (B, H, C, D), fp32, of x (B, H, L, D), put in order, over runs of sizes (B, H, C).

    embedding_bag sums each run in its order, without atomics: two runs build one index.
    """
    n, D = sizes.flatten(), x.shape[-1]
    rows = flat_rows(order, x.shape[2])
    bags = F.embedding_bag(rows, x.reshape(-1, D).float(), n.cumsum(0) - n, mode="sum")
    return bags.view(*sizes.shape, D)


def split_large(ids, config, slots):
    """Sorted ids (B, H, L), with clusters above P tokens cut into even pieces, numbered anew.

    A head whose clusters need more pieces than there are slots is cut evenly along its order: then
    no piece is above the mean size, and some pieces hold neighbours of two clusters.
    """
    position = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    sizes = count(ids, ids.shape[-1])                                       # (B, H, L)
    size = sizes.gather(-1, ids)
    start = (sizes.cumsum(-1) - sizes).gather(-1, ids)
    n_pieces = (size + config.largest - 1) // config.largest
    width = (size + n_pieces - 1) // n_pieces
    pieces = ((position - start) % width == 0).cumsum(-1) - 1
    return torch.where(pieces[..., -1:] < slots, pieces, position // config.cluster)


# ---------------------------------------------------------------- rows of clusters in a store

def gather_clusters(index, stores, N, ids, ends):
    """k, v (B, H, N, D), bias (B, H, 1, N) of clusters ids (B, H, R) that end at ends (B, H, R)."""
    rows = unroll(index.offsets.gather(-1, ids), ends, N)                   # (B, H, N)
    return *(take(store, rows.clamp(min=0)) for store in stores), bias_of(rows < 0)


def unroll(first, ends, N):
    """Rows (B, H, N) of runs from rows `first` (B, H, R), packed to end at `ends`; else -1."""
    place = torch.arange(N, device=ends.device)
    rows = (first - before(ends)).gather(-1, owners(ends, N)) + place       # (B, H, N)
    return rows.masked_fill(place >= ends[..., -1:], -1)


def owners(ends, N):
    """The run, of R packed runs that end at `ends` (B, H, R), that holds each place: (B, H, N)."""
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
    return x.reshape(-1, D).index_select(0, flat_rows(ids, T)).view(B, H, -1, D)


def along(x, order):
    """Columns order (B, H, N) of x (B, H, G, C): (B, H, G, N)."""
    return x.gather(-1, order[:, :, None].expand(-1, -1, x.shape[2], -1))


def flat_rows(ids, T):
    """Rows ids (B, H, N) of each head as rows (B*H*N,) of one matrix of B*H*T rows."""
    B, H, _ = ids.shape
    return (ids + torch.arange(B * H, device=ids.device).view(B, H, 1) * T).flatten()


def bias_of(is_free):
    """Bias (B, H, 1, N) of entries (B, H, N): -inf where one is free, else 0."""
    is_free = is_free[:, :, None]
    return torch.zeros_like(is_free, dtype=torch.float32).masked_fill(is_free, -math.inf)


def round_up(n):
    """The next multiple of RUN."""
    return max(-(-n // RUN), 1) * RUN


# ---------------------------------------------------------------- the parts that may be replaced

class Hot(NamedTuple):
    """The functions that take the time. Faster ones elsewhere have the same arguments and results.
    """
    attend: Callable
    nearest: Callable
    segment_sum: Callable


PLAIN = Hot(attend, nearest, segment_sum)


class Codec(NamedTuple):
    """How centroids and mean values are kept, scored and summed."""
    encode: Callable            # rows (1, H, C, D), dtype -> rows as stored, scales (1, H, C)
    score: Callable             # q, index, method -> logits (B, H, G, C)
    mix: Callable               # weights (B, H, G, R+E), index, order, method -> (B, H, G, D)


class Method(NamedTuple):
    """The choices that Part II may replace. Each one that Part I does not define does nothing in
    PAPER. The two products at the end are what generate.py writes otherwise for Inductor."""
    channel_weights: Callable   # energy of queries (H, D), config -> weights (1, H, 1, D) or 1
    fill_slots: Callable        # centred keys, order, ids, slots, hot -> order, ids (1, H, L)
    spreads: Callable           # k, centroids, order, sizes, hot -> (1, H, C)
    codec: Codec
    head_boosts: Callable       # mean energy of queries (H, D), index, config -> (H,)
    retrieve_factor: Callable   # config, tokens (B, 1), boosts (B, H) -> on the retrieved share
    room: Callable              # config, n_retrieve -> tokens that they may have together
    n_values: Callable          # config, n_tokens -> values read of so many tokens
    rank: Callable              # q, logits, x_steady, index -> (B, H, C), the best are largest
    log_count: Callable         # q, index -> log of the tokens that a centroid stands for
    share_values: Callable      # w_r, v_r, w_e, chosen, budget -> the same three
    scores: Callable = scores   # q, k -> inner products
    mix: Callable = mix         # weights, v -> weighted sums


PAPER = Method(
    channel_weights=lambda energy, config: 1,
    fill_slots=lambda x, order, ids, slots, hot: (order, ids),
    spreads=lambda k, centroids, order, sizes, hot: torch.zeros_like(sizes, dtype=torch.float32),
    codec=Codec(keep_rows, score_centroids, mix_means),
    head_boosts=lambda energy, index, config: 1.0,
    retrieve_factor=lambda config, tokens, boosts: 1,
    room=lambda config, n_retrieve: n_retrieve * config.largest,
    n_values=lambda config, n_tokens: n_tokens,
    rank=rank_by_centroid,
    log_count=log_size,
    share_values=lambda w_r, v_r, w_e, chosen, budget: (w_r, v_r, w_e))


# ================================================================ Part II: what is better

LONG = 8192         # tokens up to which the defaults were chosen
SCATTERED = 5.0     # variance of a head's logits within clusters above which it retrieves more


def method_of(config):
    """The Method that a config selects, entry by entry; PAPER where a field selects none."""
    c, chosen = config, {}
    if c.channel_power:
        chosen["channel_weights"] = weigh_channels
    if c.outliers:
        chosen["fill_slots"] = part_outliers
    if c.bits == 4:
        chosen["codec"] = Codec(pack, score_packed, mix_packed)
    if c.by_mass:
        chosen |= {"spreads": measure_spreads, "rank": rank_by_mass, "log_count": log_mass}
    if c.boost > 1:
        chosen["head_boosts"] = head_boosts
    if c.boost > 1 or c.growth < 1:
        chosen["retrieve_factor"] = grow_and_boost
    if c.mean_room:
        chosen["room"] = mean_room
    if c.values < 1:
        chosen |= {"n_values": few_values, "share_values": share_values}
    return PAPER._replace(**chosen)


def weigh_channels(energy, config):
    """**Channel weights** (channel_power). The paper: 1.

    A query must find what it looks for in one cluster, so channels that are loud in queries count
    more when keys are clustered: weights (1, H, 1, D) are the energy of the queries (H, D) over its
    mean, to a power. RoPE turns queries between channels d and d + D/2: both weigh the same.
    """
    pairs = energy + energy.roll(energy.shape[-1] // 2, -1)
    mean = pairs.mean(-1, keepdim=True)                                     # (H, 1)
    weights = torch.where(mean > 0, pairs / mean, 1).pow(config.channel_power)
    return weights.float()[None, :, None]


def part_outliers(x, order, ids, slots, hot):
    """**Outliers** (outliers). The paper: slots that no cluster needs stay free.

    A token unlike the others of its cluster is invisible in their centroid. Free slots take the
    tokens farthest from their centroid, one each. x: centred keys (1, H, L, D) in text order; order
    and ids (1, H, L) are sorted by id, before and after.
    """
    sizes = count(ids, slots)                                               # (1, H, slots)
    centroids = hot.segment_sum(x, order, sizes) / sizes.clamp(min=1)[..., None]
    far = (take(x, order) - take(centroids, ids)).square().sum(-1)          # (1, H, L)
    rank = far.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    last = ids[..., -1:]
    is_out = (rank < slots - 1 - last) & (far > 0)
    ids = torch.where(is_out, last + 1 + rank, ids)
    again = ids.argsort(dim=-1, stable=True)
    return order.gather(-1, again), ids.gather(-1, again)


def pack(x, dtype=None):
    """**4 bits** (bits). The paper: 16.

    Ranking reads every centroid, the largest read of a step. In 4 bits clusters of 8 tokens are as
    cheap to rank as clusters of 32 in 16 bits. x (1, H, C, D) becomes bytes (1, H, C, D/2) and a
    scale a row (1, H, C). Byte j has number j in its lower half and number j + D/2 in its upper
    half, each plus 8.
    """
    scale = (x.abs().amax(-1) / 7).bfloat16()
    numbers = x / scale.float().clamp(min=1e-30)[..., None]
    numbers = numbers.round().clamp(-7, 7) + 8
    low, high = numbers.to(torch.uint8).chunk(2, -1)
    return low | high << 4, scale


def unpack(codes):
    """The numbers, fp32, that pack stored: of columns below D/2, and from D/2 on."""
    return (codes & 15).float() - 8, (codes >> 4).float() - 8


def score_packed(q, index, method):
    """score_centroids on 4 bits. Queries are rounded to bytes: sums are exact in any order."""
    numbers, unit = in_bytes(q)
    halves = zip(numbers.chunk(2, -1), unpack(index.centroids), strict=True)
    logits = sum(method.scores(*half) for half in halves)                   # (B, H, G, C)
    return logits * unit * index.scales[..., 0][:, :, None]


def in_bytes(q):
    """Whole numbers up to 127, fp32, for q (B, H, G, D), and what one is worth (B, H, G, 1).

    The rounding adds less than a hundredth to the variance of the 4 bits' errors.
    """
    fine = 127 / q.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return (q * fine).round(), 1 / fine


def mix_packed(weights, index, order, method):
    """mix_means on 4 bits."""
    scale = index.scales[..., 1].gather(-1, order)[:, :, None]              # (B, H, 1, R+E)
    halves = unpack(take(index.means, order))
    return torch.cat([method.mix(weights * scale, half) for half in halves], -1)


def measure_spreads(k, centroids, order, sizes, hot):
    """The variance of the member keys, mean over D: (1, H, C). log_mass and rank_by_mass use it."""
    squares = hot.segment_sum(k.float().square().mean(-1, keepdim=True), order, sizes)
    squares = squares[..., 0] / sizes.clamp(min=1)
    return (squares - centroids.square().mean(-1)).clamp(min=0)


def log_mass(q, index):
    """**Spread factor** (by_mass). The paper: log(size), a lower bound by Jensen's inequality.

    If the logits of n tokens are normal with variance s, the sum of their exponentials is
    n exp(s/2) times that of the centroid's. Real keys have thinner tails: n (1 + s/2) is closer.
    """
    half = q.square().sum(-1, keepdim=True) / 2                             # (B, H, G, 1)
    return (index.sizes[:, :, None] * (1 + half * index.spreads[:, :, None])).log()


def rank_by_mass(q, logits, x_steady, index):
    """**Ranking by mass** (by_mass). The paper: rank_by_centroid.

    A cluster that is not read is lost for good, and one that is read in vain costs little: so
    clusters are ranked by the largest mass that they may hold. It counts as a share of all
    attention, the steady zone's included: a query head that looks at the sink has no vote.
    """
    possible = logits + log_possible_mass(q, index)                             # (B, H, G, C)
    total = possible.logsumexp(-1).logaddexp(x_steady.logsumexp(-1))        # (B, H, G)
    return (possible - total[..., None]).exp().sum(2)                       # (B, H, C)


def log_possible_mass(q, index):
    """Log of what a cluster may hold, over exp of its centroid's logit: (B, H, G, C).

    The members' logits vary with deviation |q| sqrt(spread). Of n normal logits the sum of
    exponentials is typically n exp(deviation^2 / 2), as long as the deviation is below
    t = sqrt(2 log n): none of the n lies above t deviations. Beyond that, the largest logit counts
    (the random energy model of Derrida).
    """
    sizes, spreads = index.sizes[:, :, None], index.spreads[:, :, None]     # (B, H, 1, C)
    deviation = (q.square().sum(-1, keepdim=True) * spreads).sqrt()         # (B, H, G, C)
    top = deviation.minimum((2 * sizes.clamp(min=1).log()).sqrt())
    return sizes.log() + top * (deviation - top / 2)


def head_boosts(energy, index, config):
    """**Budgets by head** (boost). The paper: all heads retrieve the same share.

    Within clusters, a head's logits have the variance s = |q|^2 spread / D. If s is large, a
    centroid says little of its members, and the ranking is close to random. Such heads retrieve
    exp(s - SCATTERED) times their share, from 1 to `boost` times. energy: mean squares (H, D).
    """
    total = (index.spreads * index.sizes).sum(-1)                           # (H,)
    spread = total / index.sizes.sum(-1).clamp(min=1)
    return (energy.mean(-1) * spread - SCATTERED).exp().clamp(1, config.boost).float()


def grow_and_boost(config, tokens, boosts):
    """**Growth** (growth). The paper: the same share of any text.

    A longer text has more tokens, and hardly more that matter: above LONG tokens the retrieved
    clusters grow by a power of the text. Clusters that growth removes are estimated instead.
    Returns the factor on the retrieved share, the heads' boosts in it.
    """
    return (tokens / LONG).clamp(min=1) ** (config.growth - 1) * boosts


def mean_room(config, n_retrieve):
    """**Room for the mean** (mean_room). The paper: all members of the clusters retrieved.

    The best clusters are larger than the mean. Retrieved tokens are limited to the clusters' mean
    size, so that the bytes of a step are known; what does not fit is estimated. A single cluster
    of the largest size always fits.
    """
    return (n_retrieve * config.cluster).clamp(min=config.largest)


def few_values(config, n_tokens):
    """How many of so many retrieved tokens have their values read: the share, rounded up. In whole
    numbers, so that all twins agree."""
    return -(-n_tokens * round(1000 * config.values) // 1000)


def share_values(w_r, v_r, w_e, chosen, budget):
    """**Values of a fifth** (values). The paper: all values of retrieved tokens.

    Weights need keys alone. Once they are known, most are next to nothing: values are read of the
    tokens that weigh most, summed over G. The others leave their weight to their cluster's mean
    value. w_r (B, H, G, N), v_r (B, H, N, D), w_e (B, H, G, R+E); N becomes M.
    """
    N, M, R = w_r.shape[-1], budget.caps.values, chosen.ends.shape[-1]
    best = w_r.sum(2).topk(M).indices                                       # (B, H, M)
    place = torch.arange(M, device=best.device)
    is_asked = place < budget.limits.values[..., None]                      # (B, H, M)
    is_read = torch.zeros(v_r.shape[:3], dtype=torch.bool, device=best.device)
    is_read = is_read.scatter(-1, best, is_asked.expand_as(best))           # (B, H, N)
    owner = owners(chosen.ends, N)[:, :, None].expand_as(w_r)
    left = torch.zeros_like(w_r[..., :1]).expand(-1, -1, -1, R)
    left = left.scatter_add(-1, owner, w_r.masked_fill(is_read[:, :, None], 0))
    w_e = w_e + F.pad(left, (0, w_e.shape[-1] - R))
    return along(w_r, best) * is_asked[:, :, None], take(v_r, best), w_e


if __name__ == "__main__":
    from app.cli import main
    raise SystemExit(main())
