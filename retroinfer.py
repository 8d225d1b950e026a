"""RetroInfer: the KV cache as a vector store, so that a decode step reads a few per cent of it.

Keys are clustered segment by segment as they arrive (the wave index). A step ranks the clusters by
their centroids, attends exactly to the members of the best, estimates the next ones from their
centroids, and leaves the rest out. The first tokens and the latest are always exact. All of it is
one softmax (tripartite attention):

      sink |      clusters of the text, in the order a query ranks them       | local, generated
    ┌──────┬────────────────┬────────────────────────┬────────────────────────┬──────────────────┐
    │steady│ retrieved: R   │ estimated: E           │ dropped                │ steady           │
    │ k, v │ k, v of members│ centroid, mean value,  │                        │ k, v             │
    │      │                │ bias log(size)         │                        │                  │
    └──────┴────────────────┴────────────────────────┴────────────────────────┴──────────────────┘

    B batch    H kv heads   G query heads per kv head   T tokens   D head dim
    C clusters a head       P tokens in the largest     R, E clusters retrieved, estimated
    W steady-zone slots     L tokens in a segment       N entries attended: W + R*P + E

    python retroinfer.py --prompt-file x

Chen et al., RetroInfer, PVLDB 19(5) 2026 (arXiv 2505.02922): "the paper" below. Copied alone, this
file needs torch only; model.py and checkpoint.py bring the model for the command line.

Where it differs from the published code: k-means seeds are normalised; the last assignment stays
within the segment; sums run over sorted tokens, so that two runs build one index; clusters above
twice the mean size are split, so that none is skipped for want of room; ranking is in fp32, by
estimated share of the attention; centroids and means are kept in 4 bits, queries rank in 8; heads
whose logits vary within clusters retrieve more.
"""
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right

LONG = 8192     # tokens up to which the defaults were chosen
SHARP = 5.0     # variance of a head's logits within clusters from which on it retrieves more


@dataclass(frozen=True)
class RetroConfig:
    """Chosen by KL to dense attention at equal bytes (evaluate.py). A comment is a flag's help.

    local: older tokens are worth their bytes only where a query asks for them. segment: as good as
    8,192 for a quarter of the work. cluster, bits: small clusters, which 4 bits make affordable.
    iterations: more gain nothing. least: what 4,096 tokens have; a shorter text asks for as many.
    growth: 3 % of 131,072 tokens are left, with boost and values the paper's bytes. boost: the few
    heads that copy look for single tokens, of which centroids say little. values: once weights are
    known, few are worth their bytes. estimate: more gains less than retrieving more. outliers: a
    needle among words unlike it is invisible in their centroid. query_power: a query must find what
    it asks for in one place, so channels that are loud in queries count more.
    """
    sink: int = 4                # first tokens, always exact
    local: int = 32              # latest tokens, always exact
    update: int = 256            # generated tokens kept exact until they are indexed together
    segment: int = 2048          # tokens clustered together
    cluster: int = 8             # mean tokens in a cluster
    bits: int = 4                # of a number in a centroid or mean: 4, or 16 for the model's own
    iterations: int = 4          # k-means passes over a segment
    retrieve: float = 0.058      # share of the clusters whose keys are read, up to 8,192 tokens
    growth: float = 0.7          # their number grows by this power of the text from there on
    least: int = 28              # of these at least, however short the text
    boost: int = 8               # times that share at most, in heads of which clusters tell little
    values: float = 0.2          # share of their tokens, those that weigh most, that give values
    estimate: float = 0.17       # share of the clusters estimated by their centroids
    by_mass: bool = True         # rank and estimate by size and spread, not by centroid alone
    outliers: bool = True        # free cluster slots hold the tokens farthest from their centroid
    query_power: float = 0.35    # channels are clustered by the queries' mean square to this power

    @classmethod
    def paper(cls):
        """The published settings. A share without a floor is too few for a short text."""
        return cls(sink=4, local=64, update=1024, segment=8192, cluster=16, bits=16,
                   iterations=10, retrieve=0.018, growth=1.0, least=1, estimate=0.232,
                   by_mass=False, outliers=False, boost=1, values=1.0, query_power=0.0)

    def __post_init__(self):
        lowest = {"sink": 0, "local": 1, "update": 1, "segment": 1, "cluster": 1, "iterations": 1,
                  "least": 1, "boost": 1}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}: at least {low} is needed")
        if self.bits not in (4, 16):
            raise ValueError(f"bits is {self.bits}: give 4 or 16")
        for name in ("retrieve", "growth", "estimate", "values", "query_power"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a share between 0 and 1")
        for name in ("segment", "update"):
            if getattr(self, name) % self.cluster:
                raise ValueError(f"{name} is {getattr(self, name)}: give a multiple of cluster, "
                                 f"{self.cluster}")

    @property
    def largest(self):
        """P, the most tokens a cluster may hold."""
        return 2 * self.cluster

    @property
    def steady(self):
        """The most tokens of a sequence that are in no cluster while it generates."""
        return self.sink + self.local + self.update

    @property
    def heard(self):
        """The first tokens whose queries weigh channels: how loud one is hardly depends on text."""
        return self.sink + self.segment

    def slots(self, tokens):
        """Cluster slots for so many tokens: an eighth more than clusters, for those split."""
        return tokens // self.cluster + tokens // (8 * self.cluster)

    def budget(self, tokens, boost=1):
        """Clusters to retrieve, and to retrieve or estimate, of the clusters of so many tokens.

        What growth leaves out of a long text's first share is estimated, and what boost takes is
        not estimated. tokens and boost: tensors that go together, as (B, 1) and (B, H).
        """
        slots = self.slots(tokens)

        def best(share, times=1):       # of the clusters before any is split; all means all slots
            clusters = tokens // self.cluster * times
            return slots if share >= 1 else (clusters * share).round().long().minimum(slots)

        fade = (tokens / LONG).clamp(min=1) ** (self.growth - 1)
        n_retrieve = best(self.retrieve, fade * boost).clamp(min=self.least)
        return n_retrieve, torch.maximum(best(self.retrieve + self.estimate), n_retrieve)

    def room(self, n_retrieve):
        """Tokens to retrieve with so many clusters: the mean size of each, and once the largest."""
        return (n_retrieve * self.cluster).clamp(min=self.largest)


class Index(NamedTuple):
    """What is known of C clusters. A cluster's tokens lie together in the store (CSR)."""
    centroids: torch.Tensor      # (B, H, C, D) mean of the member keys; in 4 bits (B, H, C, D/2)
    means: torch.Tensor          # mean of the member values, likewise
    sizes: torch.Tensor          # (B, H, C) members, fp32 as the logits they bias; 0: a free slot
    offsets: torch.Tensor        # (B, H, C) first row in the store
    spreads: torch.Tensor        # (B, H, C) variance of the member keys, mean over D; the paper: 0
    scales: torch.Tensor         # (B, H, C, 2) of the numbers of centroid and mean; in 16 bits 1


# ---------------------------------------------------------------- building the index

def cluster_segment(k, v, config, hot=None, weights=1):
    """Cluster L tokens, a multiple of the cluster size (§4.2), by channels of such weights.

    Their Index, offsets from 0, and k, v (B, H, L, D) in its order.
    """
    L, slots, hot = k.shape[2], config.slots(k.shape[2]), hot or PLAIN
    centred = k.float() - k.float().mean(2, keepdim=True)                   # (B, H, L, D)
    ids = spherical_kmeans(centred * weights, L // config.cluster, config.iterations, hot)
    order = ids.argsort(dim=-1, stable=True)                                # (B, H, L)
    pieces = split_large(ids.gather(-1, order), config, slots)              # (B, H, L)
    if config.outliers:
        order, pieces = part_outliers(centred, order, pieces, slots, hot)
    sizes = count(pieces, slots)                                            # (B, H, slots)
    n = sizes.clamp(min=1)[..., None]
    squares = k.float().square().mean(-1, keepdim=True) * config.by_mass    # (B, H, L, 1)
    sums = (hot.segment_sum(x, order, sizes) for x in (k, v, squares))
    centroids, means, squares = (x / n for x in sums)                       # (B, H, slots, D)
    spreads = (squares[..., 0] - centroids.square().mean(-1)).clamp(min=0)  # (B, H, slots)
    rows = [pack(x) if config.bits == 4 else (x.to(k.dtype), torch.ones_like(spreads))
            for x in (centroids, means)]
    (centroids, of_key), (means, of_value) = rows
    index = Index(centroids, means, sizes, sizes.cumsum(-1) - sizes, spreads.bfloat16(),
                  torch.stack([of_key, of_value], -1).bfloat16())
    return index, take(k, order), take(v, order)


def weigh_channels(squares, power):
    """Weights (1, H, 1, D) of the channels of keys, by sums of the squares of queries (H, D).

    Alike in the two channels of a RoPE pair, d and d + D/2, between which queries turn with their
    position. Without any queries, 1.
    """
    pairs = squares + squares.roll(squares.shape[-1] // 2, -1)
    mean = pairs.mean(-1, keepdim=True)                                     # (H, 1)
    return torch.where(mean > 0, pairs / mean, 1).pow(power).float()[None, :, None]


def pack(x):
    """x (B, H, C, D) in 4 bits, two numbers a byte (B, H, C, D/2), and a scale a row (B, H, C).

    A byte of column j has number j in its lower half, j + D/2 in its upper, each plus 8.
    """
    scale = (x.abs().amax(-1) / 7).bfloat16()
    numbers = (x / scale.float().clamp(min=1e-30)[..., None]).round().clamp(-7, 7) + 8
    low, high = numbers.to(torch.uint8).chunk(2, -1)
    return low | high << 4, scale


def halves(codes):
    """The numbers, fp32, of rows that pack made: of columns up to D/2, and from D/2 on."""
    return (codes & 15).float() - 8, (codes >> 4).float() - 8


def spherical_kmeans(x, C, iterations, hot=None):
    """Cluster ids (B, H, L) of centred keys x (B, H, L, D): nearest by inner product.

    Centroids are unit vectors, seeded at even distances along the text. Unlike the published code
    we normalise the seeds too: raw ones outshine every unit vector and all but collapse pass two.
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
    """Ids (B, H, L) of the centroids (B, H, C, D) that have the largest inner products with x.

    Head by head: one head's products stay in the cache of a CPU, and fewer are in memory at once.
    """
    heads = zip(x.flatten(0, 1), centroids.flatten(0, 1), strict=True)
    return torch.stack([(a @ b.mT).argmax(-1) for a, b in heads]).view(x.shape[:3])


def split_large(ids, config, slots):
    """Ids (B, H, L), in order, with clusters above P cut into even pieces and numbered anew.

    A head whose clusters need more pieces than there are slots is cut evenly along its order: then
    no piece is above the mean size, and some hold neighbours of two clusters.
    """
    position = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    sizes = count(ids, ids.shape[-1])                                       # (B, H, L)
    size, start = sizes.gather(-1, ids), (sizes.cumsum(-1) - sizes).gather(-1, ids)
    n_pieces = (size + config.largest - 1) // config.largest
    width = (size + n_pieces - 1) // n_pieces
    pieces = ((position - start) % width == 0).cumsum(-1) - 1
    return torch.where(pieces[..., -1:] < slots, pieces, position // config.cluster)


def part_outliers(x, order, ids, slots, hot):
    """order, ids (B, H, L) in order, in which the farthest from their centroids have free slots.

    x: centred keys (B, H, L, D). One to a slot: what is left in a cluster is nearer to its mean.
    """
    sizes = count(ids, slots)                                               # (B, H, slots)
    centroids = hot.segment_sum(x, order, sizes) / sizes.clamp(min=1)[..., None]
    far = (take(x, order) - take(centroids, ids)).square().sum(-1)          # (B, H, L)
    rank, last = far.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1), ids[..., -1:]
    ids = torch.where((rank < slots - 1 - last) & (far > 0), last + 1 + rank, ids)
    again = ids.argsort(dim=-1, stable=True)
    return order.gather(-1, again), ids.gather(-1, again)


def count(ids, C):
    """How often each of C ids occurs (B, H, C)."""
    return torch.zeros(*ids.shape[:2], C, dtype=torch.int64, device=ids.device).scatter_add_(
        -1, ids, torch.ones_like(ids))


def segment_sum(x, order, sizes):
    """Sums (B, H, C, D), fp32, of x (B, H, L, D), put in order, over runs of sizes (B, H, C)."""
    n, D = sizes.flatten(), x.shape[-1]
    bags = F.embedding_bag(flat_rows(order, x.shape[2]), x.reshape(-1, D).float(),
                           n.cumsum(0) - n, mode="sum")             # no atomics: a bag is one loop
    return bags.view(*sizes.shape, D)


def take(x, ids):
    """Rows ids (B, H, N) of x (B, H, T, D): (B, H, N, D)."""
    B, H, T, D = x.shape
    return x.reshape(-1, D).index_select(0, flat_rows(ids, T)).view(B, H, -1, D)


def flat_rows(ids, T):
    """Row numbers (B*H*N,) in a matrix of B*H*T rows, of rows ids (B, H, N) of each head."""
    B, H, _ = ids.shape
    return (ids + torch.arange(B * H, device=ids.device).view(B, H, 1) * T).flatten()


# ---------------------------------------------------------------- tripartite attention

RUN = 64        # rows of v that mix() sums at a time: they stay in a core's first cache


class Budget(NamedTuple):
    """What a step may read of the index: caps, which are shapes, and each head's own share.

    Shares are (B, H); (B, 1) where all heads have the same.
    """
    tokens: int                  # N, exact tokens
    retrieve: int                # R, clusters retrieved
    ranked: int                  # R+E, clusters retrieved or estimated
    n_retrieve: torch.Tensor     # (B, H) at most R
    n_ranked: torch.Tensor       # (B, H) at most R+E
    by_mass: bool = True         # rank clusters by estimated mass; else by centroid
    n_tokens: torch.Tensor | None = None    # (B, H) tokens retrieved, at most N; None: N
    values: float = 1.0          # share of these whose values are read

    @property
    def room(self):
        """Tokens that each head may retrieve (B, H)."""
        N = torch.full_like(self.n_retrieve, self.tokens)
        return N if self.n_tokens is None else self.n_tokens.minimum(N)

    def fitted(self):
        """The same with caps that its widest head fills, in runs of RUN: the host reads them.

        To a compiler they are sizes known at run time: still one graph. A GPU is not waited for.
        """
        if self.n_retrieve.device.type != "cpu":
            return self
        most = self.room.max(), self.n_ranked.max().clamp(max=self.ranked)
        runs = [(n + RUN - 1) // RUN for n in most]
        R = self.n_retrieve.max().clamp(max=self.retrieve)
        with torch._dynamo.patch_dynamo_config(capture_scalar_outputs=True):
            N, E, R = torch.stack([*runs, R]).clamp(min=1).tolist()
        for low, high in (1, N), (1, R), (R, E * RUN):
            torch._check(low <= high)
        ranked = self.ranked if self.ranked % RUN else E * RUN
        return self._replace(tokens=N * RUN, retrieve=R, ranked=ranked, n_tokens=self.room)

    def part(self, tokens):
        """How many of so many retrieved tokens have their values read: int or (B, H)."""
        return -(-tokens * round(1000 * self.values) // 1000)


def tripartite_attention(q, steady, index, budget, fetch):
    """Attention of q (B, H, G, D) to the steady zone, R clusters and E centroids: (B, H, G, D).

    steady: k, v (B, H, W, D) and bias (B, H, 1, W), -inf where a slot is free.
    fetch(ids, ends): k, v (B, H, N, D) and bias (B, H, 1, N) of clusters ids (B, H, R), packed so
    that cluster i ends at ends[..., i]. Those of the R best that do not fit are estimated. Where a
    token's value is not read, its weight goes to the mean of its cluster's.
    """
    q, R = keep(q.float() * q.shape[-1] ** -0.5), budget.retrieve
    k_s, v_s, bias_s = steady
    x_s = scores(q, k_s) + bias_s                                           # (B, H, G, W)
    masses, order = rank_clusters(q, x_s, index, budget.ranked, budget.by_mass)
    rank = torch.arange(budget.ranked, device=q.device)
    near = rank < budget.n_ranked[..., None]                                # (B, H, R+E)
    sizes = index.sizes.gather(-1, order) * near                            # (B, H, R+E)
    ends = (sizes * (rank < budget.n_retrieve[..., None]))[..., :R].long().cumsum(-1)
    fits = ends <= budget.room[..., None]                                   # (B, H, R)
    ends = ends.minimum(ends.masked_fill(~fits, 0).amax(-1, keepdim=True))
    k_r, v_r, bias_r = fetch(order[..., :R], ends)                          # (B, H, N, D)
    is_exact = sizes == F.pad(ends - before(ends), (0, budget.ranked - R))  # (B, H, R+E), or free
    along = order[:, :, None].expand(-1, -1, q.shape[2], -1)                # (B, H, G, R+E)
    parts = (x_s, scores(q, k_r) + bias_r,
             masses.gather(-1, along).masked_fill(is_exact[:, :, None], -math.inf))
    w_s, w_r, w_e = torch.cat(parts, -1).softmax(-1).split([x.shape[-1] for x in parts], -1)
    if budget.values < 1:
        w_r, v_r, rest = part_values(w_r, v_r, ends, budget)
        w_e = w_e + F.pad(rest, (0, budget.ranked - R))
    w_e = w_e * index.scales[..., 1].gather(-1, order)[:, :, None]          # (B, H, G, R+E)
    return (mix(w_s, v_s) + mix(w_r, v_r) + mix(w_e, take(index.means, order))).to(v_s.dtype)


def part_values(w, v, ends, budget):
    """Weights (B, H, G, M) and values (B, H, M, D) of the tokens that weigh most, summed over G, of
    those with w (B, H, G, N), v (B, H, N, D); and what clusters keep of the others (B, H, G, R).

    Weights need keys alone: once they are known, most values are not worth their bytes.
    """
    (N, R), M = (w.shape[-1], ends.shape[-1]), budget.part(w.shape[-1])
    M = M if N % RUN else -(-M // RUN) * RUN                                # in runs, as N is
    best = w.sum(2).topk(M).indices                                         # (B, H, M)
    is_in = torch.arange(M, device=w.device) < budget.part(budget.room)[..., None]      # (B, H, M)
    is_read = torch.zeros(v.shape[:3], dtype=torch.bool, device=w.device).scatter(
        -1, best, is_in.expand_as(best))                                    # (B, H, N)
    rest = torch.zeros_like(w[..., :1]).expand(-1, -1, -1, R).scatter_add(
        -1, owners(ends, N)[:, :, None].expand_as(w), w.masked_fill(is_read[:, :, None], 0))
    along = best[:, :, None].expand(-1, -1, w.shape[2], -1)                 # (B, H, G, M)
    return w.gather(-1, along) * is_in[:, :, None], take(v, best), rest


def scores(q, k):
    """Inner products (B, H, G, N), fp32, of q (B, H, G, D), fp32, and k (B, H, N, D), or packed."""
    if k.dtype == torch.uint8:
        return sum(scores(*pair) for pair in zip(q.chunk(2, -1), halves(k), strict=True))
    if streams(k):
        return torch.stack([(x[:, :, None] * k.float()).sum(-1) for x in q.unbind(2)], 2)
    return q @ k.float().mT


def mix(weights, v):
    """Sums (B, H, G, D), fp32, of v (B, H, N, D), or packed, weighted by weights (B, H, G, N)."""
    if v.dtype == torch.uint8:
        return torch.cat([mix(weights, half) for half in halves(v)], -1)
    if not streams(v):
        return weights @ v.float()
    n = math.gcd(v.shape[2], RUN) if v.shape[2] % RUN else RUN      # symbols have no gcd
    rows = v.unflatten(2, (-1, n)).float()                                  # (B, H, N/n, n, D)
    parts = keep(torch.stack(weights.unbind(2), -1)).unflatten(2, (-1, n)).unbind(-1)
    return torch.stack([(w[..., None] * rows).sum(3) for w in parts], 3).sum(2)


def round_up(n):
    """The next multiple of RUN."""
    return max(-(-n // RUN), 1) * RUN


def streams(x):
    """Whether x is best read as one sum for all G: Inductor's loops beat a CPU's thin products."""
    return x.device.type == "cpu" and torch.compiler.is_compiling()


def keep(x):
    """x, stored: Inductor would work it out again wherever it is read."""
    return x.as_strided(x.shape, x.stride())


def in_bytes(q):
    """Whole numbers up to 127, fp32, for q (B, H, G, D), and what one is worth (B, H, G, 1).

    It adds less than a hundredth to the variance of 4 bits' errors, and sums over packed rows are
    exact in any order.
    """
    fine = 127 / q.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return keep((q * fine).round()), 1 / fine


def rank_clusters(q, x_steady, index, n, by_mass=True):
    """Logarithms of the clusters' masses for q, scaled: (B, H, G, C), and the n best (B, H, n).

    The best have the largest shares of attention, summed over G: of what clusters may hold beside
    the steady zone's logits (B, H, G, W), or as in the paper of their centroids' alone (§4.2).
    """
    x, unit = in_bytes(q) if index.centroids.dtype == torch.uint8 else (q, 1)
    logits = scores(x, index.centroids) * unit * index.scales[..., 0][:, :, None]   # (B, H, G, C)
    masses = logits + weigh_clusters(q, index).log()
    if by_mass:
        hopes = logits + hope(q, index)                                     # (B, H, G, C)
        total = hopes.logsumexp(-1).logaddexp(x_steady.logsumexp(-1))       # (B, H, G)
        shares = (hopes - total[..., None]).exp()
    else:
        is_free = index.sizes[:, :, None] == 0
        shares = logits.masked_fill(is_free, torch.finfo(logits.dtype).min).softmax(-1)
    return masses, shares.sum(2).topk(n, sorted=True).indices               # (B, H, n)


def hope(q, index):
    """What a cluster may hold for q (B, H, G, D), scaled, as a logarithm over its centroid's mass.

    Of n logits, normal with variance s, the sum of e^x is typically n e^(s/2), but no value lies
    above sqrt(2 log n) deviations (Derrida's random energy model). It is what ranks: a needle is
    missed for good, a cluster that is opened in vain costs little. (B, H, G, C), -inf if free.
    """
    sizes, spreads = (x[:, :, None] for x in (index.sizes, index.spreads))  # (B, H, 1, C)
    deviation = (q.square().sum(-1, keepdim=True) * spreads).sqrt()         # (B, H, G, C)
    top = deviation.minimum((2 * sizes.clamp(min=1).log()).sqrt())
    return sizes.log() + top * (deviation - top / 2)


def weigh_clusters(q, index):
    """How many tokens at its centroid a cluster is worth to q (B, H, G, D), scaled: (B, H, G, C).

    Were its tokens all equal, its size; by Jensen's inequality never less (§4.2, eq. 2 to 4). Were
    they normal, with variance s of q·k, size * exp(s/2); of that only 1 + s/2, as real keys have
    thinner tails. That factor is ours: the paper's spreads are 0.
    """
    half = q.square().sum(-1, keepdim=True) / 2                             # (B, H, G, 1)
    return index.sizes[:, :, None] * (1 + half * index.spreads[:, :, None])


def boosts(q_squares, index, most):
    """How many times its share each head retrieves: (B, H), from 1 to most. Ours.

    q_squares: mean squares (B, H, D) of the channels of queries. Within clusters a query's logits
    have the variance s = |q|^2 spread / D. Of e^x, x normal, the variance over the square of the
    mean is e^s - 1: so much does a token's weight differ from what the centroid tells. Where s is
    large the ranking all but draws lots, and what helps is more of them.
    """
    total = (index.spreads * index.sizes).sum(-1)                           # (B, H)
    spread = total / index.sizes.sum(-1).clamp(min=1)
    return (q_squares.mean(-1) * spread - SHARP).exp().clamp(1, most).float()


def before(ends):
    """Where each of consecutive runs (B, H, R) starts, given where it ends."""
    return F.pad(ends[..., :-1], (1, 0))


def gather_clusters(index, stores, ids, ends, N):
    """k, v (B, H, N, D), bias (B, H, 1, N) of clusters ids (B, H, R) that end at ends (B, H, R)."""
    rows = unroll(index.offsets.gather(-1, ids), ends, N)                   # (B, H, N)
    filled = keep(rows.clamp(min=0))
    return *(take(store, filled) for store in stores), bias_of(rows < 0)


def owners(ends, N):
    """Which of R packed runs, that end at ends (B, H, R), each of N places is in: (B, H, N)."""
    return count(before(ends), N + 1)[..., :N].cumsum(-1) - 1


def unroll(first, ends, N):
    """Rows (B, H, N) of runs from rows first (B, H, R), packed to end at ends; -1 where none is."""
    place = torch.arange(N, device=ends.device)
    rows = (first - before(ends)).gather(-1, owners(ends, N)) + place       # (B, H, N)
    return rows.masked_fill(place >= ends[..., -1:], -1)


def bias_of(is_free):
    """Bias (B, H, 1, N) of entries (B, H, N): -inf where one is free."""
    is_free = is_free[:, :, None]
    return torch.zeros_like(is_free, dtype=torch.float32).masked_fill(is_free, -math.inf)


def attend(q, steady, index, budget, stores):
    """tripartite_attention over clusters that lie in stores k, v (B, H, T, D)."""
    budget = budget.fitted()
    fetch = functools.partial(gather_clusters, index, stores, N=budget.tokens)
    return tripartite_attention(q, steady, index, budget, fetch)


class Hot(NamedTuple):
    """The functions that take the time: ours, or their twins."""
    attend: Callable
    nearest: Callable
    segment_sum: Callable


PLAIN = Hot(attend, nearest, segment_sum)


def hot_functions(device):
    """The Triton kernels on a GPU, where kernels.py lies beside this file; else PLAIN."""
    if device.type != "cuda" or not Path(__file__).with_name("kernels.py").exists():
        return PLAIN
    import kernels
    return Hot(kernels.attend, kernels.nearest, kernels.segment_sum)


# ---------------------------------------------------------------- the wave index

class WaveIndex(nn.Module):
    """The cache of one layer for a batch of sequences, each of its own length up to `capacity`.

    The store holds a sequence as a dense cache would, but that its older part, once indexed, lies
    in cluster order. So prefill reads the past where it is, and clusters a segment in place as
    soon as it is full:

        store    sink | clusters: n_indexed tokens | latest tokens, in text order
        steady   sink | latest tokens, generated tokens | free

    A step finds the latest tokens in the steady zone. update, between steps, brings them there
    behind a prefill, and indexes the older of them when the zone is full. Nothing reallocates.
    hot=PLAIN keeps to PyTorch on a GPU too, where the kernels are the default. With offload, which
    buffer.offload makes, the store is on the host.
    """

    def __init__(self, config, capacity, batch=1, hot=None, offload=None):
        super().__init__()
        self.config, self.capacity, self.index, self.hot = config, capacity, None, hot
        self.offload, self.buffer = offload, None
        self.is_reading = [True] * batch        # the latest tokens are in the store
        for name in ("n_tokens", "n_indexed", "n_clusters"):
            setattr(self, name, torch.zeros(batch, dtype=torch.int64))

    def allocate(self, k):
        """All state, for keys like k (1, H, T, D)."""
        B, H, D, c = len(self.n_tokens), k.shape[1], k.shape[3], self.config
        if c.bits == 4 and D % 2:
            raise ValueError(f"a head of {D} dims cannot be kept in 4 bits: give bits 16")
        self.hot = self.hot or hot_functions(k.device)

        def zeros(n, *shape, **kind):   # one storage each: a compiled region may not see aliases
            return k.new_zeros(B, H, n, *shape, **kind)

        T, W, C = (round_up(n) for n in (self.capacity, c.steady, c.slots(self.capacity)))
        R, ranked = c.budget(torch.tensor(self.capacity), c.boost)
        N = round_up(2 * int(c.room(R))) // 2
        self.caps = N, min(int(R), C), min(round_up(int(ranked)), C)
        self.k_steady, self.v_steady = zeros(W, D), zeros(W, D)
        self.q_squares = k.new_zeros(B, H, D, dtype=torch.float64)
        self.boosts = k.new_ones(B, H, dtype=torch.float32)
        row, kind = ((D // 2,), {"dtype": torch.uint8}) if c.bits == 4 else ((D,), {})
        self.index = Index(zeros(C, *row, **kind), zeros(C, *row, **kind),
                           zeros(C, dtype=torch.float32), zeros(C, dtype=torch.int64),
                           zeros(C, dtype=torch.bfloat16), zeros(C, 2, dtype=torch.bfloat16))
        for name in ("n_tokens", "n_indexed", "n_clusters"):
            setattr(self, name, getattr(self, name).to(k.device))
        if self.offload:
            self.buffer = self.offload(self)
            self.hot = self.hot._replace(attend=self.buffer.attend)
        stores = self.buffer.stores if self.buffer else (zeros(T, D), zeros(T, D))
        self.k_store, self.v_store = stores

    def prefill(self, q, k, v, row=0):
        """Append T tokens, q (1, H*G, T, D), to sequence `row`: exactly and causally attended.

        ValueError if they do not fit. Attention to the past does not mind its order: RoPE is in
        the keys.
        """
        if self.index is None:
            self.allocate(k)
        self.reopen(row)
        start = int(self.n_tokens[row])
        end = start + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit an index of {self.capacity}")
        k_all, v_all = self.bring(row, 0, start, end)                       # (1, H, end, D)
        k_all[:, :, start:], v_all[:, :, start:] = k, v
        self.n_tokens[row] = end
        self.q_squares[row] += self.loudness(q[:, :, :max(self.config.heard - start, 0)])[0]
        causal = causal_lower_right(q.shape[2], end)
        o = F.scaled_dot_product_attention(q, k_all, v_all, causal, enable_gqa=True)
        first = min(start, self.config.sink + int(self.n_indexed[row]))
        self.index_open(row, k_all, v_all, self.config.segment)
        self.put(row, first, k_all[:, :, first:], v_all[:, :, first:])
        return o

    def loudness(self, q):
        """Sums of squares (B, H, D) of queries q (B, H*G, T, D), means over G."""
        squares = q.float().square().sum(2, dtype=torch.float64)            # (B, H*G, D)
        return squares.unflatten(1, (self.k_steady.shape[1], -1)).mean(2)

    def rows(self, row, first, end):
        """Views k, v (1, H, end - first, D) of a sequence in the store."""
        if self.buffer:
            self.buffer.settle()
        return [x[row:row + 1, :, first:end] for x in (self.k_store, self.v_store)]

    def bring(self, row, first, n, end):
        """rows, on the device: behind a buffer, copies in which those from n on are yet to come."""
        rows = self.rows(row, first, end)
        return self.buffer.bring(rows, n - first) if self.buffer else rows

    def put(self, row, first, k, v):
        """Store what bring brought, k, v (1, H, n, D), as rows from `first` on."""
        if self.buffer:
            self.buffer.put(self.rows(row, first, first + k.shape[2]), (k, v))

    def decode(self, q, k, v):
        """Append one token to each sequence, q (B, H*G, 1, D), and attend to three zones.

        No state changes its shape, and a GPU is not waited for. ValueError unless update was
        called behind a prefill.
        """
        if any(self.is_reading):
            raise ValueError("call update() between prefill and decode: it builds the index")
        B, H, _, D = k.shape
        self.q_squares.add_(self.loudness(q) * (self.n_tokens < self.config.heard)[:, None, None])
        batch, slot = (torch.arange(n, device=k.device) for n in (B, self.k_steady.shape[2]))
        last = self.n_tokens - self.n_indexed                               # (B,)
        self.k_steady[batch, :, last] = k[:, :, 0]
        self.v_steady[batch, :, last] = v[:, :, 0]
        self.n_tokens.add_(1)
        is_free = slot > last[:, None]                                      # (B, W)
        bias = bias_of(is_free[:, None]).expand(-1, H, -1, -1)              # (B, H, 1, W)
        steady = self.k_steady, self.v_steady, bias
        stores = self.k_store, self.v_store
        return self.hot.attend(q.reshape(B, H, -1, D), steady, self.index, self.budget(),
                               stores).reshape(q.shape)

    forward = decode                            # calling a cache is a step

    def budget(self):
        """The Budget of a step."""
        c = self.config
        n_retrieve, n_ranked = c.budget(self.n_indexed[:, None], self.boosts)   # (B, H) both
        return Budget(*self.caps, n_retrieve, n_ranked, c.by_mass, c.room(n_retrieve), c.values)

    def update(self):
        """Bring each sequence in order for decoding; how many steps fit until the next update."""
        for row, is_reading in enumerate(self.is_reading):
            if not is_reading and self.n_tokens[row] - self.n_indexed[row] == self.config.steady:
                self.reopen(row)
            if self.is_reading[row]:
                self.close(row)
        n_steady = int((self.n_tokens - self.n_indexed).max())
        return min(self.config.steady - n_steady, self.capacity - int(self.n_tokens.max()))

    def reopen(self, row):
        """Move a sequence's latest tokens from the steady zone back behind its clusters."""
        if not self.is_reading[row]:
            for steady, store in self.latest(row):
                store.copy_(steady)
            self.is_reading[row] = True

    def close(self, row):
        """Index what is long enough to be, and move what is left to the steady zone."""
        first, n = self.config.sink + int(self.n_indexed[row]), int(self.n_tokens[row])
        k, v = self.bring(row, first, n, n)
        self.index_open(row, k, v, min(self.config.update, self.config.segment))
        self.put(row, first, k, v)
        for steady, store in self.latest(row):
            steady.copy_(store)
        heard = self.n_tokens[row].clamp(max=self.config.heard)
        index = Index(*(x[row] for x in self.index))
        self.boosts[row] = boosts(self.q_squares[row] / heard, index, self.config.boost)
        self.is_reading[row] = False

    def latest(self, row):
        """Where a sequence's tokens in no cluster lie: pairs of views of steady zone and store."""
        n, indexed = int(self.n_tokens[row]), int(self.n_indexed[row])
        head = min(n, self.config.sink)
        for steady, store in zip((self.k_steady, self.v_steady), self.rows(row, 0, n), strict=True):
            yield steady[row, :, :head], store[0, :, :head]
            yield steady[row, :, head:n - indexed], store[0, :, head + indexed:]

    def live(self, row):
        """Views (H, ...), by name, of all that is known of a sequence."""
        self.reopen(row)
        n, c = int(self.n_tokens[row]), int(self.n_clusters[row])
        k, v = self.rows(row, 0, n)
        return ({"k_store": k[0], "v_store": v[0], "q_squares": self.q_squares[row]}
                | {name: x[row, :, :c] for name, x in self.index._asdict().items()})

    def n_open(self, row):
        """Tokens between what is indexed and the local window."""
        c = self.config
        return int(self.n_tokens[row] - self.n_indexed[row]) - c.sink - c.local

    def index_open(self, row, k, v, least):
        """Index open tokens, segment by segment, if there are `least` in it: in place, in the last
        tokens k, v (1, H, n, D) of a sequence."""
        c, n, end = self.config, max(self.n_open(row), 0), k.shape[2] - self.config.local
        for part in zip(*(x[:, :, end - n:end].split(c.segment, 2) for x in (k, v)), strict=True):
            whole = part[0].shape[2] // c.cluster * c.cluster
            if whole >= least:
                self.append(row, *(x[:, :, :whole] for x in part))

    def append(self, row, k, v):
        """Index the next tokens k, v (1, H, L, D), in place: they change their order."""
        start, c = self.config.sink + int(self.n_indexed[row]), int(self.n_clusters[row])
        weights = weigh_channels(self.q_squares[row], self.config.query_power)
        segment, k_sorted, v_sorted = cluster_segment(k, v, self.config, self.hot, weights)
        k.copy_(k_sorted), v.copy_(v_sorted)
        segment = segment._replace(offsets=segment.offsets + start)
        slots = segment.sizes.shape[2]
        for whole, part in zip(self.index, segment, strict=True):
            whole[row, :, c:c + slots] = part[0]
        self.n_indexed[row] += k.shape[2]
        self.n_clusters[row] += slots

    def bytes_read(self):
        """Bytes of K, V and index that one decode step reads at most."""
        (B, H, C), budget = self.index.sizes.shape, self.budget()
        row, vector = (x[0, 0, 0].nbytes for x in (self.k_store, self.index.means))
        rows = 2 * self.k_steady.shape[2] + budget.room + budget.part(budget.room)
        numbers = 8 * C + 8 * budget.n_retrieve + 2 * budget.n_ranked       # C: size, spread
        return int((rows * row + (C + budget.n_ranked) * vector + numbers).expand(B, H).sum())


if __name__ == "__main__":
    from app.cli import main
    raise SystemExit(main())
