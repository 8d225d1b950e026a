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
twice the mean size are split, so that none is skipped for want of room; ranking is in fp32.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right


@dataclass(frozen=True)
class RetroConfig:
    """The paper's settings (§5.1) but for iterations and least. A comment is its flag's help."""
    sink: int = 4                # first tokens, always exact
    local: int = 64              # latest tokens, always exact
    update: int = 1024           # generated tokens kept exact until they are indexed together
    segment: int = 8192          # tokens clustered together
    cluster: int = 16            # mean tokens in a cluster
    iterations: int = 3          # k-means passes over a segment
    retrieve: float = 0.018      # share of the clusters attended exactly
    least: int = 16              # clusters attended exactly however short the text
    estimate: float = 0.232      # share of the clusters estimated by their centroids

    @classmethod
    def paper(cls):
        """The published settings. A share without a floor is too few for a short text."""
        return cls(sink=4, local=64, update=1024, segment=8192, cluster=16, iterations=10,
                   retrieve=0.018, least=1, estimate=0.232)

    def __post_init__(self):
        lowest = {"sink": 0, "local": 1, "update": 1, "segment": 1, "cluster": 1, "iterations": 1,
                  "least": 1}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}: at least {low} is needed")
        for name in ("retrieve", "estimate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a share between 0 and 1")

    @property
    def largest(self):
        """P, the most tokens a cluster may hold."""
        return 2 * self.cluster

    def slots(self, tokens):
        """Cluster slots for a segment: its clusters and an eighth more for those that are split."""
        return tokens * 9 // (8 * self.cluster) + 1


class Index(NamedTuple):
    """What is known of C clusters. A cluster's tokens lie together in the store (CSR)."""
    centroids: torch.Tensor      # (B, H, C, D) mean of the member keys
    means: torch.Tensor          # (B, H, C, D) mean of the member values
    sizes: torch.Tensor          # (B, H, C) members; 0 marks a free slot
    offsets: torch.Tensor        # (B, H, C) first row in the store


# ---------------------------------------------------------------- building the index

def cluster_segment(k, v, config):
    """Cluster L tokens (§4.2): their Index, offsets from 0, and k, v (B, H, L, D) in its order."""
    L, slots = k.shape[2], config.slots(k.shape[2])
    centred = k.float() - k.float().mean(2, keepdim=True)                   # (B, H, L, D)
    ids = spherical_kmeans(centred, math.ceil(L / config.cluster), config.iterations)
    order = ids.argsort(dim=-1, stable=True)                                # (B, H, L)
    pieces = split_large(ids.gather(-1, order), config, slots)              # (B, H, L)
    sizes = count(pieces, slots)                                            # (B, H, slots)
    n = sizes.clamp(min=1)[..., None]
    centroids, means = ((segment_sum(x, order, sizes) / n).to(x.dtype) for x in (k, v))
    index = Index(centroids, means, sizes, sizes.cumsum(-1) - sizes)
    return index, take(k, order), take(v, order)


def spherical_kmeans(x, C, iterations):
    """Cluster ids (B, H, L) of centred keys x (B, H, L, D): nearest by inner product.

    Centroids are unit vectors, seeded at even distances along the text. Unlike the published code
    we normalise the seeds too: raw ones outshine every unit vector and all but collapse pass two.
    """
    L = x.shape[2]
    seeds = (torch.arange(C, device=x.device) * 2 + 1) * L // (2 * C)       # (C,)
    centroids = F.normalize(x[:, :, seeds], dim=-1)                         # (B, H, C, D)
    for _ in range(iterations - 1):
        ids = nearest(x, centroids)                                         # (B, H, L)
        sizes = count(ids, C)                                               # (B, H, C)
        sums = segment_sum(x, ids.argsort(dim=-1, stable=True), sizes)
        centroids = torch.where(sizes[..., None] > 0, F.normalize(sums, dim=-1), centroids)
    return nearest(x, centroids)


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

def tripartite_attention(q, steady, index, n_retrieve, n_estimate, fetch):
    """Attention of q (B, H, G, D) to the steady zone, R clusters and E centroids: (B, H, G, D).

    steady: k, v (B, H, W, D) and bias (B, H, 1, W), -inf where a slot is free.
    fetch(ids): k, v (B, H, R*P, D) and bias (B, H, 1, R*P) of the clusters ids (B, H, R).
    A centroid with bias log(size) and the mean value weighs as much as its tokens would, were they
    all equal; by Jensen's inequality it never weighs more than they do (§4.2, eq. 2 to 4).
    """
    k_s, v_s, bias_s = steady
    logits = scores(q, index.centroids)                                     # (B, H, G, C)
    order = rank_clusters(logits, index.sizes, n_retrieve + n_estimate)     # (B, H, R+E)
    retrieved, estimated = order.split([n_retrieve, n_estimate], -1)
    k_r, v_r, bias_r = fetch(retrieved)                                     # (B, H, R*P, D)
    exact = scores(q, torch.cat([k_s, k_r], 2)) + torch.cat([bias_s, bias_r], -1)
    log_size = index.sizes.gather(-1, estimated).log()[:, :, None]          # (B, H, 1, E)
    along = estimated[:, :, None].expand(*logits.shape[:3], -1)             # (B, H, G, E)
    weights = torch.cat([exact, logits.gather(-1, along) + log_size], -1).softmax(-1)
    v = torch.cat([v_s, v_r, take(index.means, estimated)], 2)              # (B, H, N, D)
    return weights.to(v.dtype) @ v


def scores(q, k):
    """Scaled inner products (B, H, G, N), fp32, of q (B, H, G, D) and k (B, H, N, D)."""
    return q.float() @ k.float().mT * q.shape[-1] ** -0.5


def rank_clusters(logits, sizes, n):
    """The n best clusters (B, H, n) by probability over the centroids, summed over G (§4.2)."""
    logits = logits.masked_fill(sizes[:, :, None] == 0, torch.finfo(logits.dtype).min)
    return logits.softmax(-1).sum(2).topk(n, sorted=True).indices


def gather_clusters(index, k_store, v_store, P, ids):
    """k, v (B, H, R*P, D) and bias (B, H, 1, R*P) of the members of clusters ids (B, H, R)."""
    sizes, offsets = index.sizes.gather(-1, ids), index.offsets.gather(-1, ids)
    slot = torch.arange(P, device=ids.device)
    member = slot < sizes[..., None]                                        # (B, H, R, P)
    rows = (offsets[..., None] + slot * member).flatten(2)                  # (B, H, R*P)
    bias = torch.zeros_like(rows, dtype=torch.float32).masked_fill(~member.flatten(2), -math.inf)
    return take(k_store, rows), take(v_store, rows), bias[:, :, None]


# ---------------------------------------------------------------- the wave index

class WaveIndex:
    """The cache of one layer: steady zone, index and store, preallocated for `capacity` tokens.

    prefill attends exactly and indexes what it appended; decode is the compiled step and never
    looks at the host; update, between steps, indexes what has left the local window.
    """

    def __init__(self, config, capacity):
        self.config, self.capacity, self.index = config, capacity, None

    def allocate(self, k):
        """All state, for keys like k (B, H, T, D): nothing grows or moves afterwards."""
        (B, H, T, D), c = k.shape, self.config

        def zeros(*shape, **kind):      # one storage each: a compiled region may not see aliases
            return k.new_zeros(B, H, *shape, **kind)

        ends = c.sink + c.local
        settled = T if T - ends >= c.update else ends
        W = ends + min(c.update, self.capacity - settled)
        indexable = max(self.capacity - ends, 1)
        C = c.slots(indexable) + indexable // max(min(c.update, c.segment * 3 // 4), 1)

        def best(share):                # of the clusters before any is split; all means all slots
            return C if share >= 1 else round(math.ceil(indexable / c.cluster) * share)

        self.n_retrieve = min(max(best(c.retrieve), c.least), C)
        self.n_estimate = max(best(c.retrieve + c.estimate) - self.n_retrieve, 0)
        self.k_steady, self.v_steady = zeros(W, D), zeros(W, D)
        self.k_store, self.v_store = zeros(indexable, D), zeros(indexable, D)
        integers = (zeros(C, dtype=torch.int64) for _ in range(2))
        self.index = Index(zeros(C, D), zeros(C, D), *integers)
        self.n_steady = torch.zeros(B, dtype=torch.int64, device=k.device)
        self.n_indexed = self.n_clusters = 0    # on the host: only prefill and update move them

    def prefill(self, q, k, v):
        """Append T tokens, attend exactly and causally to all so far, index. ValueError if full.

        The past is read as it lies: RoPE is in the keys, and a softmax knows no order.
        """
        total = self.n_tokens() + k.shape[2]
        if total > self.capacity:
            raise ValueError(f"{total} tokens do not fit an index of {self.capacity}")
        if self.index is None:
            self.allocate(k)
        n = int(self.n_steady[0])
        steady = self.k_steady[:, :, :n], self.v_steady[:, :, :n]
        store = self.k_store[:, :, :self.n_indexed], self.v_store[:, :, :self.n_indexed]
        tail = [torch.cat(pair, 2) for pair in zip(steady, (k, v), strict=True)]
        every = [torch.cat(pair, 2) for pair in zip(store, tail, strict=True)]
        causal = causal_lower_right(q.shape[2], every[0].shape[2])
        o = F.scaled_dot_product_attention(q, *every, causal, enable_gqa=True)
        self.settle(*tail)
        return o

    def decode(self, q, k, v):
        """Append one token, attend to three zones. No host read, no shape that changes."""
        B, H, _, D = k.shape
        batch = torch.arange(B, device=k.device)
        self.k_steady[batch, :, self.n_steady] = k[:, :, 0]
        self.v_steady[batch, :, self.n_steady] = v[:, :, 0]
        self.n_steady.add_(1)
        free = torch.arange(self.k_steady.shape[2], device=k.device) >= self.n_steady[:, None]
        bias = torch.zeros_like(free, dtype=torch.float32).masked_fill(free, -math.inf)  # (B, W)
        steady = self.k_steady, self.v_steady, bias[:, None, None].expand(-1, H, -1, -1)
        o = tripartite_attention(q.reshape(B, H, -1, D), steady, self.index,
                                 self.n_retrieve, self.n_estimate, self.fetch)
        return o.reshape(q.shape)

    def fetch(self, ids):
        """Keys, values and bias of clusters ids (B, H, R)."""
        return gather_clusters(self.index, self.k_store, self.v_store, self.config.largest, ids)

    def update(self):
        """Index the middle of the steady zone if it is due; how many steps fit until the next."""
        n = int(self.n_steady[0])
        self.settle(self.k_steady[:, :, :n], self.v_steady[:, :, :n])
        return self.k_steady.shape[2] - int(self.n_steady[0])

    def settle(self, k, v):
        """Index the middle of k, v (B, H, T, D), all that is not indexed yet, if it is due."""
        c = self.config
        middle = k.shape[2] - c.sink - c.local
        if middle >= c.update:
            inner = slice(c.sink, c.sink + middle)
            n_segments = max(round(middle / c.segment), 1)
            segments = (x[:, :, inner].tensor_split(n_segments, 2) for x in (k, v))
            for segment in zip(*segments, strict=True):
                self.append(*cluster_segment(*segment, c))
            k, v = (torch.cat([x[:, :, :c.sink], x[:, :, -c.local:]], 2) for x in (k, v))
        n = k.shape[2]
        self.k_steady[:, :, :n], self.v_steady[:, :, :n] = k, v
        self.n_steady.fill_(n)

    def append(self, segment, k, v):
        """Put a clustered segment behind what is indexed."""
        t, c, L, slots = self.n_indexed, self.n_clusters, k.shape[2], segment.sizes.shape[2]
        self.k_store[:, :, t:t + L], self.v_store[:, :, t:t + L] = k, v
        segment = segment._replace(offsets=segment.offsets + t)
        for whole, part in zip(self.index, segment, strict=True):
            whole[:, :, c:c + slots] = part
        self.n_indexed, self.n_clusters = t + L, c + slots

    def n_tokens(self):
        """Tokens held, in the index and in the steady zone."""
        return 0 if self.index is None else self.n_indexed + int(self.n_steady[0])

    def bytes_read(self):
        """Bytes of K, V and index that one decode step reads."""
        B, H, C, D = self.index.centroids.shape
        exact = self.k_steady.shape[2] + self.n_retrieve * self.config.largest
        rows = 2 * exact + C + self.n_estimate
        return B * H * (rows * D * self.k_steady.element_size() + 8 * (C + self.n_retrieve))


# ---------------------------------------------------------------- generation

def call(function, *args):
    return function(*args)


# The one place where decoding is compiled: a layer once for all layers, and the output product.
# The sizes of every intermediate need no checking again in every layer: shapes never change.
compiled_call = torch.compile(call, fullgraph=True, dynamic=False,
                              options={"size_asserts": False, "alignment_asserts": False})


def prefill(model, caches, ids, chunk=None):
    """Logits (B, V) behind the prompt ids (B, T), which is read `chunk` tokens at a time."""
    start = 0
    for part in ids.split(chunk or ids.shape[1], 1):
        positions = torch.arange(start, start + part.shape[1], device=ids.device).expand_as(part)
        hidden = model(part, positions, caches, "prefill")                  # (B, chunk, hidden)
        start += part.shape[1]
    return model.logits(hidden[:, -1])


def decode(model, caches, logits, position, n_tokens, pick, run=compiled_call):
    """Yield up to n_tokens tokens (B,) behind logits (B, V), until the model ends its text.

    pick(logits) chooses a token (B,). Between steps the caches may index what they gathered.
    ValueError when the logits are not numbers.
    """
    ends = torch.tensor(sorted(model.config.eos_ids), device=logits.device)
    positions = torch.full((len(logits), 1), position, device=logits.device)
    room = 0                                      # steps until the caches must be updated
    for n in range(n_tokens):
        if not logits.amax().isfinite():
            raise ValueError(f"the logits of token {n + 1} are not finite: damaged weights, or "
                             "a dtype too narrow for this model")
        token = pick(logits)                                                # (B,)
        yield token
        if torch.isin(token, ends).all() or n + 1 == n_tokens:
            return
        room = room or min(cache.update() for cache in caches)
        if not room:
            raise ValueError(f"the caches are full after {n} tokens: raise their capacity")
        hidden = model(token[:, None], positions, caches, "decode", run)    # (B, 1, hidden)
        logits = run(model.logits, hidden[:, -1])
        positions, room = positions + 1, room - 1


def generate(model, caches, ids, n_tokens, pick=None, run=compiled_call):
    """Yield up to n_tokens tokens (B,) behind the prompt ids (B, T); greedy unless pick is given.

    run=call decodes without compiling.
    """
    logits = prefill(model, caches, ids)
    yield from decode(model, caches, logits, ids.shape[1], n_tokens, pick or sampler(), run)


def sampler(temperature=0.0, top_p=1.0, seed=0):
    """A function from logits (B, V) to tokens (B,): the best, or drawn from the top_p share."""
    if not (temperature >= 0 and 0 < top_p <= 1):
        raise ValueError(f"temperature {temperature} must be 0 or more, top-p {top_p} in (0, 1]")
    if temperature == 0:
        return lambda logits: logits.argmax(-1)
    dice = torch.Generator().manual_seed(seed)

    def draw(logits):
        p, ids = (logits.float().cpu() / temperature).softmax(-1).sort(-1, descending=True)
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)                     # (B, V), best first
        return ids.gather(-1, p.multinomial(1, generator=dice)).squeeze(-1).to(logits.device)
    return draw


if __name__ == "__main__":
    from cli import main
    raise SystemExit(main())
