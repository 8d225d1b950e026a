"""RetrievalAttention: an attention-aware graph over the keys of a text.

The first and the latest tokens are exact. Of all others, a step reads the keys on a path through
a graph, and attends to the best 100 it found, for each query head its own. One softmax spans both.

      first │ indexed tokens                                    │ latest, not yet indexed
    ┌───────┬───────────────────────────────────────────────────┬─────────────────────────┐
    │ exact │ entries → neighbours → … → best 100, or a sample  │ exact                   │
    └───────┴───────────────────────────────────────────────────┴─────────────────────────┘

Queries and keys of a head have different distributions. A graph that links a key to the keys near
it leads a query nowhere. So the prompt's own queries build the graph: two keys are linked if one
query wants both (RoarGraph). A step only follows the links.

    caches = [GraphCache(GraphConfig(), capacity) for _ in model.layers]

    B batch         H kv heads          G query heads per kv head   T rows of the store
    Q queries       N indexed keys      D head dim                  M neighbours of a key
    C lists         P keys in a list    K keys retrieved            L keys in the beam

Liu et al., RetrievalAttention (arXiv 2409.10516); Chen et al., RoarGraph (PVLDB 17(11), 2024).
`build` and `search` stand before three indexes. GraphConfig.index chooses one:

    graph   as above: one graph for a kv head, from the queries of its whole group
    qcivf   the latest queries are centroids, and each lists its best keys (CTkvr, arXiv 2512.15550)
    flat    every key, exactly

GraphConfig.lift draws a sample in place of the best keys, with any of the three: a sample speaks
for the keys that it leaves out (SoftmaxLift; Zharkov, Singhal, Padaki and Andoni, 2026).

Where this differs from RoarGraph's published code, and why: docs/retrieval_attention.md. Does not
include: keys in 8 bits, an index for each query head, a store on the host of a GPU.
"""
import math
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F

from retroinfer import InputError, LayerCache, round_up, spherical_kmeans, take

INDEXES = "graph", "qcivf", "flat"
RANKS = 0, 1, 3, 7, 15, 31  # a query's keys of these ranks are linked to all of its keys
NODES = 512                 # keys whose neighbours are pruned together: bounds the memory
PRODUCTS = 2**24            # products of queries and keys that are held at a time
CLUSTERS = 256              # of the keys that no path leads to, at most
DEVIATIONS = 1.96           # standard deviations in an error bar of 95 %


@dataclass(frozen=True)
class GraphConfig:
    """The numbers of the method. The comment beside a field is its help text."""
    index: str = "graph"        # how keys are found: graph, qcivf or flat
    sink: int = 128             # first tokens, always exact
    local: int = 512            # latest tokens, always exact
    update: int = 1024          # tokens behind them, also exact, that are indexed together
    top: int = 100              # keys retrieved for each query head
    lift: bool = False          # retrieve a weighted sample instead of the best keys
    seed: int = 0               # of the sample
    train: int = 1024           # latest tokens whose queries build the index
    wanted: int = 128           # graph: best keys of such a query, which it links
    degree: int = 32            # graph: neighbours of a key at most
    candidates: int = 96        # graph: keys among which those of a key are chosen
    entries: int = 32           # graph: keys where a search begins, which most others lead to
    beam: int = 256             # graph: best keys that a search remembers
    width: int = 16             # graph: keys whose neighbours a hop reads
    hops: int = 8               # graph: hops of a search
    coarse: int = 128           # graph: keys in a list of those that no path leads to
    fallback: int = 1           # graph: such lists that a search reads
    centroids: int = 512        # qcivf: latest queries that have a list
    listed: int = 200           # qcivf: keys in a list
    visits: int = 4             # qcivf: lists that a search reads

    # what LayerCache asks: all that is open is indexed at once
    segment: ClassVar[int] = 2**62
    cluster: ClassVar[int] = 1

    def __post_init__(self):
        if self.index not in INDEXES:
            raise InputError(f"index is {self.index}: give {', '.join(INDEXES)}")
        for field in fields(self):
            low = 0 if field.name in ("sink", "seed", "fallback", "lift") else 1
            given = getattr(self, field.name)
            if field.name != "index" and given < low:
                raise InputError(f"{field.name} is {given}: at least {low} is needed")
        least = max(self.returned, self.width)
        if self.index == "graph" and self.beam < least:
            raise InputError(f"beam is {self.beam}: give at least {least}, for the keys retrieved "
                             "and for the width of a hop")
        most = max(self.visits * self.listed, self.width * self.degree,
                   self.entries + self.fallback * self.coarse)
        if most >= 2**15:       # `seen` counts in 16 bits
            raise InputError(f"a search would read {most:,} keys at a time: at most 32,767 can be")
        if self.index == "qcivf" and self.visits * self.listed < self.returned:
            raise InputError(f"{self.visits} lists of {self.listed} keys hold fewer than the "
                             f"{self.returned} retrieved: raise visits or listed")

    @property
    def steady(self):
        """The most tokens that are not indexed while a text grows."""
        return self.sink + self.local + self.update

    @property
    def returned(self):
        """Keys that a search returns. With lift the last one says what a sampled key weighs."""
        return self.top + self.lift


class Index(NamedTuple):
    """What is known of the keys. Rows are those of the store; -1 stands for none."""
    neighbours: torch.Tensor    # (B, H, T, M) int32: rows that a key leads to
    entries: torch.Tensor       # (B, H, E) rows where a search begins
    centroids: torch.Tensor     # (B, H, C, D) of lists: a query is compared with them
    lists: torch.Tensor         # (B, H, C, P) int32 rows
    bias: torch.Tensor          # (B, H, T) added to a key's logit; -inf: not indexed


class Found(NamedTuple):
    """Keys that a search found for each query, best first."""
    rows: torch.Tensor          # (B, H, G, K) rows of the store
    scores: torch.Tensor        # (B, H, G, K) logit + bias; -inf: none found
    seen: torch.Tensor          # (B, H, G, T + 1) not -1: the row's key was read


# ---------------------------------------------------------------- building an index

def build(q, k, bias, old, config):
    """The Index of one kv head, without batch and head, rows counted from its first key.

    q (Q, D) are scaled queries of the prompt: the index is made for queries like these. k (N, D)
    are the keys of the head. bias (N,) is added to the logits of the keys. old (N, M) are the
    neighbours so far. A graph keeps them unless it finds better ones.
    """
    if config.index == "graph":
        return build_graph(q, k, bias, old, config)
    centroids = q[q.shape[0]:] if config.index == "flat" else q[-config.centroids:]
    lists = best_keys(centroids, k, bias, config.listed)
    return Index(old, k.new_zeros(0).long(), F.normalize(centroids, dim=-1), lists, bias)


def build_graph(q, k, bias, old, config):
    """build, for a graph. What no path leads to is kept in lists of similar keys."""
    # Distances between keys, in units of logits: then the bias is one more channel.
    scale = q.square().mean().sqrt() if len(q) else 1
    points = torch.cat([k.float() * scale, bias[:, None]], -1)  # (N, D + 1)
    neighbours = project(points, best_keys(q, k, bias, config.wanted), old, config)
    n_in = neighbours[neighbours >= 0].bincount(minlength=len(k))
    entries = n_in.topk(min(config.entries, len(k))).indices
    lost = (~reachable(neighbours, entries)).nonzero()[:, 0]
    centroids, lists = coarse_lists(k, lost, config.coarse)
    return Index(neighbours, entries, centroids, lists, bias)


def best_keys(q, k, bias, n):
    """Rows (Q, n) of the keys k (N, D) with the largest logits, best first, for q (Q, D)."""
    n, found = min(n, len(k)), [q.new_zeros(0, min(n, len(k))).long()]
    for part in q.float().split(max(PRODUCTS // len(k), 1)):
        found.append((part @ k.float().mT + bias).topk(n).indices)
    return torch.cat(found)


def project(points, wanted, old, config):
    """Neighbours (N, M) of points (N, D), from the lists that queries want (Q, n) and from old.

    Queries are dropped: a key of a query leads straight to the query's other keys.
    """
    pivots = wanted[:, [r for r in RANKS if r < wanted.shape[1]]]               # (Q, ranks)
    shape = *pivots.shape, wanted.shape[1]
    sources = pivots[:, :, None].expand(shape).flatten()
    targets = wanted[:, None].expand(shape).flatten()
    table = old.clone()
    for _ in "forth", "back":
        nodes, chosen = candidates_of(sources, targets, table, config.candidates)
        table[nodes] = prune(points, nodes, chosen, config.degree)
        targets = nodes.repeat_interleave(table.shape[1])
        sources = table[nodes].flatten().long()
        targets, sources = targets[sources >= 0], sources[sources >= 0]
    return table


def candidates_of(sources, targets, table, n):
    """Nodes (X,) that are sources, and the targets (X, n) of each: most frequent first, -1 behind.

    What table (N, M) has for these nodes counts as one more time.
    """
    N, nodes = len(table), sources.unique()
    known = table[nodes].long()                                 # (X, M)
    sources = torch.cat([sources, nodes.repeat_interleave(known.shape[1])])
    targets = torch.cat([targets, known.flatten()])
    is_edge = (targets >= 0) & (targets != sources)
    edges, counts = (sources * N + targets)[is_edge].unique(return_counts=True)
    edges = edges[counts.argsort(descending=True, stable=True)]
    edges = edges[(edges // N).argsort(stable=True)]
    owners, sizes = (edges // N).unique_consecutive(return_counts=True)
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    place = torch.arange(len(edges), device=edges.device) - starts
    node = torch.arange(len(owners), device=edges.device).repeat_interleave(sizes)
    chosen = edges.new_full((len(owners), n), -1)
    chosen[node[place < n], place[place < n]] = (edges % N)[place < n]
    return owners, chosen


def prune(points, nodes, chosen, degree):
    """Of the candidates `chosen` (X, n) the neighbours (X, M) of nodes (X,), nearest first.

    A candidate is occluded if a nearer one that was taken is nearer to it than the node is. So
    neighbours lie in different directions. Free places are filled with the nearest occluded ones.
    """
    parts = [prune_part(points, *part, degree) for part in zip(
        nodes.split(NODES), chosen.split(NODES), strict=True)]
    return torch.cat(parts) if parts else chosen[:, :degree].int()


def prune_part(points, nodes, chosen, degree):
    """prune, for few nodes."""
    away = (points[chosen] - points[nodes][:, None]).square().sum(-1)           # (X, n)
    away, order = away.masked_fill(chosen < 0, math.inf).sort(dim=-1, stable=True)
    chosen = chosen.gather(-1, order)
    x = points[chosen]                                                          # (X, n, D)
    squares = x.square().sum(-1)
    between = squares[:, :, None] + squares[:, None] - 2 * x @ x.mT             # (X, n, n)
    is_taken = torch.zeros_like(chosen, dtype=torch.bool)
    for i in range(chosen.shape[1]):
        is_occluded = (is_taken & (between[:, i] < away[:, i, None])).any(-1)
        is_taken[:, i] = ~is_occluded & (chosen[:, i] >= 0)
    best = (~is_taken).int().argsort(dim=-1, stable=True)[:, :degree]           # taken first
    found = chosen.gather(-1, best).int()
    return F.pad(found, (0, degree - found.shape[1]), value=-1)


def reachable(neighbours, entries):
    """Which of N keys (N,) a path of neighbours (N, M) leads to, from the entries (E,)."""
    N = len(neighbours)
    is_reached = torch.zeros(N + 1, dtype=torch.bool, device=entries.device)    # the last: no key
    front = entries
    while len(front):
        is_reached[front] = True
        ahead = neighbours[front].long().unique()
        ahead = ahead[ahead >= 0]
        front = ahead[~is_reached[ahead]]
    return is_reached[:N]


def coarse_lists(k, rows, P):
    """Lists (C, P) of some rows (X,) of k (N, D), similar keys together, and their mean keys.

    Lists are cut from the keys in order of cluster: their number may grow with the text, but that
    of the clusters must not, or the time would grow with its square.
    """
    C, x = -(-len(rows) // P), k[rows].float()
    if C > 1:
        ids = spherical_kmeans((x - x.mean(0))[None, None], min(C, CLUSTERS), 4)
        order = ids[0, 0].argsort(stable=True)
        rows, x = rows[order], x[order]
    n_free = C * P - len(rows)
    lists = F.pad(rows, (0, n_free), value=-1).view(C, P)
    sums = F.pad(x, (0, 0, 0, n_free)).view(C, P, k.shape[1]).sum(1)
    return sums / (lists >= 0).sum(-1, keepdim=True), lists


# ---------------------------------------------------------------- searching it

def search(q, k, index, config):
    """The best keys k (B, H, T, D) that an index finds for queries q (B, H, G, D), scaled: Found.

    Its shapes and its number of operations do not depend on how many keys are indexed.
    """
    B, H, G, _ = q.shape
    seen = torch.full((B * H * G * (k.shape[2] + 1),), -1, dtype=torch.int16, device=q.device)
    if config.index == "flat":
        scores = q @ k.float().mT + index.bias[:, :, None]      # (B, H, G, T)
        best = scores.topk(min(config.returned, k.shape[2]))
        return Found(best.indices, best.values, seen.fill_(0).view(B, H, G, -1))
    n_lists = config.visits if config.index == "qcivf" else config.fallback
    rows = listed(q, index, n_lists)                            # (B, H, G, lists*P)
    if config.index == "graph":
        entries = index.entries[:, :, None].expand(-1, -1, G, -1)
        rows = torch.cat([entries, rows], -1)
    rows, scores = read_keys(q, k, index.bias, rows, seen)
    if config.index == "graph":
        rows, scores = walk(q, k, index, Found(rows, scores, seen), config)
    best = scores.topk(min(config.returned, scores.shape[-1]))
    return Found(rows.gather(-1, best.indices), best.values, seen.view(B, H, G, -1))


def listed(q, index, n):
    """Rows (B, H, G, n*P) in the n lists whose centroids have the largest products with q."""
    (B, H, G, _), (C, P) = q.shape, index.lists.shape[2:]
    scores = q @ index.centroids.mT                             # (B, H, G, C)
    scores = scores.masked_fill(index.lists[:, :, None, :, 0] < 0, -math.inf)
    ids = scores.topk(min(n, C)).indices
    return take(index.lists, ids.flatten(2)).view(B, H, G, ids.shape[-1] * P).long()


def read_keys(q, k, bias, rows, seen):
    """Rows (B, H, G, n) and their scores, -inf of one that is none or was read before.

    A row that occurs twice counts once. seen, flat, is brought up to date: without it, the bytes
    that a search reads would be those of its hops, and not of the keys.
    """
    (B, H, G, n), T = rows.shape, k.shape[2]
    first = torch.arange(0, seen.numel(), T + 1, device=q.device).view(B, H, G, 1)
    spot = first + torch.where(rows < 0, T, rows)               # (B, H, G, n), in seen
    place = torch.arange(n, dtype=torch.int16, device=q.device).expand_as(rows)
    is_new = (seen[spot] < 0) & (rows >= 0)
    seen[spot] = place          # where scatter_ stands here, Inductor copies all of seen first
    is_new = is_new & (seen[spot] == place)
    rows = stored(rows.masked_fill(~is_new, 0))                 # old ones read the same key
    keys = take(k, rows.flatten(2)).view(B, H, G, n, -1)
    scores = (keys.float() * q[..., None, :]).sum(-1)           # (B, H, G, n)
    scores = scores + bias.gather(-1, rows.flatten(2)).view_as(rows)
    return rows, scores.masked_fill(~is_new, -math.inf)


def stored(x):
    """x, but forces Inductor to store it: otherwise it is computed anew for every dim of a key."""
    return x.as_strided(x.shape, x.stride())


def walk(q, k, index, found, config):
    """Rows and scores (B, H, G, L) of the best keys after some hops from those in `found`.

    A hop takes the best keys whose neighbours were not read yet, and reads these.
    """
    (rows, scores, seen), (B, H, G, _) = found, q.shape
    if scores.shape[-1] < config.beam:
        rows, scores = (F.pad(x, (0, config.beam - x.shape[-1]), value=fill)
                        for x, fill in ((rows, 0), (scores, -math.inf)))
    is_open = torch.ones_like(rows, dtype=torch.bool)
    for _ in range(config.hops):
        near = scores.masked_fill(~is_open, -math.inf).topk(config.width)
        is_open = is_open.scatter(-1, near.indices, False)
        ahead = take(index.neighbours, rows.gather(-1, near.indices).flatten(2))
        ahead = ahead.view(B, H, G, -1).long()                  # (B, H, G, width*M)
        ahead = ahead.masked_fill(near.values.isinf().repeat_interleave(
            index.neighbours.shape[-1], -1), -1)
        more = read_keys(q, k, index.bias, ahead, seen)
        rows, scores = (torch.cat(x, -1) for x in zip((rows, scores), more, strict=True))
        is_open = F.pad(is_open, (0, ahead.shape[-1]), value=True)
        scores, best = scores.topk(config.beam, sorted=False)
        rows, is_open = rows.gather(-1, best), is_open.gather(-1, best)
    return rows, scores


# ---------------------------------------------------------------- attention

def weigh(found, bias, config):
    """Logits and logs of weights (B, H, G, K) of the keys found.

    Without lift they are equal. With it, the keys with the K largest priorities w / u were found, u
    uniform in (0, 1], and w = exp(logit). The next priority is tau. A key that weighs less than
    tau was found with probability w / tau, so it counts as tau: sums are right on average.
    """
    B, H, G, n = found.rows.shape
    bias = bias.gather(-1, found.rows.flatten(2)).view(B, H, G, n)
    logits = (found.scores - bias).masked_fill(found.scores == -math.inf, -math.inf)
    if not config.lift:
        return logits, logits
    K = config.top
    tau = found.scores[..., K:] if n > K else torch.full_like(logits[..., :1], -math.inf)
    heavier = logits.maximum(tau).masked_fill(logits == -math.inf, -math.inf)
    return logits[..., :K], heavier[..., :K]


def attend(q, steady, weights, v):
    """One softmax over steady (k, v (B, H, W, D), bias (B, H, 1, W)) and retrieved tokens.

    weights (B, H, G, K): logs, of v (B, H, G, K, D). Returns the output (B, H, G, D) and the share
    of each retrieved token (B, H, G, K).
    """
    k_s, v_s, bias = steady
    x_s = q @ k_s.float().mT + bias                             # (B, H, G, W)
    shares = torch.cat([x_s, weights], -1).softmax(-1)
    p_s, p_r = shares.split([x_s.shape[-1], weights.shape[-1]], -1)
    return p_s @ v_s.float() + (p_r[..., None, :] @ v.float())[..., 0, :], p_r


def attend_merged(q, steady, weights, v):
    """attend as the paper has it (eq. 3 to 5): two attentions, merged by their log-sum-exp."""
    k_s, v_s, bias = steady
    x_s = q @ k_s.float().mT + bias
    o_s = x_s.softmax(-1) @ v_s.float()
    o_r = (weights.softmax(-1)[..., None, :] @ v.float())[..., 0, :].nan_to_num()   # none: 0
    mass = torch.stack([x_s.logsumexp(-1), weights.logsumexp(-1)], -1)
    share_s, share_r = mass.softmax(-1).split(1, -1)                            # (B, H, G, 1)
    return share_s * o_s + share_r * o_r, weights.softmax(-1).nan_to_num() * share_r


def error_bar(o, logits, weights, shares, v):
    """How far o (B, H, G, D) may be from dense attention's output: (B, H, G), at 95 %.

    The estimates of single keys are not correlated. One that weighs tau for w has the variance
    tau (tau - w), which Duffield, Lund and Thorup (J. ACM 54(6), 2007) estimate without a bias.
    """
    variance = shares.square() * (1 - (logits - weights).exp())                 # (B, H, G, K)
    variance = variance.masked_fill(weights == -math.inf, 0)
    away = (v.float() - o[..., None, :]).square().sum(-1)
    return DEVIATIONS * (variance * away).sum(-1).sqrt()


# ---------------------------------------------------------------- the cache

class GraphCache(LayerCache):
    """The cache of one layer: its indexed keys are found by an index that its queries built.

    A text shorter than sink, local and update together has nothing indexed, and its attention is
    dense. `error` (B, H, G), with lift: the error bars of the latest step.
    """
    heads = None        # of a part of a layer: its first head, and how many the layer has
    search = staticmethod(search)       # a compiled twin may stand here

    def allocate_index(self, like):
        c, (_, H, _, D), T = self.config, like.shape, round_up(self.capacity)
        C, P = {"graph": (-(-T // c.coarse), c.coarse), "qcivf": (c.centroids, c.listed),
                "flat": (0, c.listed)}[c.index]
        M, E = (c.degree, c.entries) if c.index == "graph" else (0, 0)

        def full(value, *shape, dtype=torch.float32):
            return like.new_full((len(self.n_tokens), H, *shape), value, dtype=dtype)

        self.index = Index(full(-1, T, M, dtype=torch.int32), full(-1, E, dtype=torch.int64),
                           full(0, C, D), full(-1, C, P, dtype=torch.int32),
                           full(-math.inf, T))
        dice = torch.Generator().manual_seed(c.seed)
        first, n = self.heads or (0, H)
        u = 1 - torch.rand(T, n, generator=dice).T      # in (0, 1]; the same in any batch, any T
        u = u[first:first + H]
        self.lift = (-u.log() * c.lift).to(like.device)         # (H, T)
        self.queries = None

    def observe(self, q, start, row=None):
        """Keep the latest queries, (B, train, H, G, D): that of a token in slot token % train."""
        H = self.index.bias.shape[1]
        q = q.unflatten(1, (H, -1)).permute(0, 3, 1, 2, 4)      # (B, T, H, G, D)
        if self.queries is None:
            B, kept = len(self.n_tokens), min(self.config.train, self.capacity)
            self.queries = q.new_zeros(B, kept, *q.shape[2:])
            self.error = q.new_zeros(B, *q.shape[2:4], dtype=torch.float32)
        kept, T = self.queries.shape[1], q.shape[1]
        n = min(T, kept)
        slots = (start + torch.arange(T - n, T, device=q.device)) % kept
        rows = torch.arange(len(self.n_tokens), device=q.device)[:, None] if row is None else row
        self.queries[rows, slots] = q[:, T - n:] if row is None else q[0, T - n:]

    def heard(self, row):
        """Scaled queries (H, Q, D) of the tokens behind the indexed ones, oldest first."""
        H, D = self.store.k.shape[1], self.store.k.shape[3]
        if self.queries is None:
            return self.store.k.new_zeros(H, 0, D)
        kept, n = self.queries.shape[1], int(self.n_tokens[row])
        last = torch.arange(n - min(kept, n - int(self.n_indexed[row])), n)
        q = self.queries[row, last % kept].transpose(0, 1)      # (H, T, G, D)
        q = q[:, q[0].flatten(1).any(-1)]                       # of others nothing was heard
        return q.flatten(1, 2).float() * D ** -0.5

    def absorb(self, row, k, v):
        """Index the next tokens k, v (1, H, n, D). They stay where they are."""
        if not k.isfinite().all():
            raise InputError("the keys hold NaN or infinity: damaged weights, or a dtype too "
                             "narrow for this model")
        first, q = self.config.sink, self.heard(row)
        self.n_indexed[row] += k.shape[2]
        span = slice(first, first + int(self.n_indexed[row]))
        keys, _ = self.store.view(row, span.start, span.stop)
        for h in range(k.shape[1]):
            old = moved(self.index.neighbours[row, h, span], -first)
            part = build(q[h], keys[0, h], self.lift[h, span], old, self.config)
            part = part._replace(neighbours=moved(part.neighbours, first),
                                 entries=moved(part.entries, first), lists=moved(part.lists, first))
            self.write(row, h, span, part)

    def write(self, row, h, span, part):
        """Replace what is known of a head. span: the rows of its keys."""
        index = self.index
        index.neighbours[row, h, span] = part.neighbours
        index.bias[row, h, span] = part.bias
        index.entries[row, h] = -1
        index.entries[row, h, :len(part.entries)] = part.entries
        index.lists[row, h] = -1
        index.lists[row, h, :len(part.lists), :part.lists.shape[1]] = part.lists.int()
        index.centroids[row, h, :len(part.centroids)] = part.centroids

    def attend(self, q, steady):
        D = q.shape[3]
        q = q.float() * D ** -0.5
        found = self.search(q, self.store.k, self.index, self.config)
        logits, weights = weigh(found, self.index.bias, self.config)
        rows = found.rows[..., :weights.shape[-1]]
        v = take(self.store.v, rows.flatten(2)).view(*rows.shape, D)            # (B, H, G, K, D)
        o, shares = attend(q, steady, weights, v)
        if self.config.lift:
            self.error.copy_(error_bar(o, logits, weights, shares, v))
        return o.to(v.dtype)

    def bytes_read(self):
        """Bytes of K, V and index that one decode step reads at most."""
        c, (B, H, T, D) = self.config, self.store.k.shape
        key, (C, P) = self.store.k[0, 0, 0].nbytes, self.index.lists.shape[2:]
        G = 1 if self.queries is None else self.queries.shape[3]
        n_lists = min(C, c.visits if c.index == "qcivf" else c.fallback)
        hops = c.hops * c.width if c.index == "graph" else 0
        keys = G * (self.index.entries.shape[2] + n_lists * P + hops * c.degree)
        keys = T if c.index == "flat" else min(keys, G * T)
        steady = 2 * self.k_steady.shape[2]
        numbers = 4 * (C * D + G * (n_lists * P + hops * c.degree))
        return B * H * ((steady + keys + G * c.top) * key + numbers)

    def facts(self):
        """What there is to say of a run, by name. is_dense: nothing is indexed, all is exact."""
        token = 2 * self.store.k[0, :, 0].nbytes
        return {"tokens": self.n_tokens.tolist(), "indexed_tokens": self.n_indexed.tolist(),
                "is_dense": not self.n_indexed.any().item(), "top": self.config.top,
                "bytes_read": self.bytes_read(),
                "dense_bytes": token * int(self.n_tokens.sum()), **self.store.facts()}

    def nbytes(self):
        """Bytes allocated, by part."""
        return {"index": sum(x.nbytes for x in self.index),
                "queries": 0 if self.queries is None else self.queries.nbytes,
                "steady zone": self.k_steady.nbytes + self.v_steady.nbytes,
                **self.store.nbytes()}


def moved(rows, by):
    """Rows moved by so many; -1 still stands for none."""
    return torch.where(rows < 0, rows, rows + by)
