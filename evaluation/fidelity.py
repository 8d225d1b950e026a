"""What a method loses against dense attention: the measures, and simpler methods to compare with.

Dense attention reads a text once (read -> Case). A method is a cache of model.py's seam; it gets
dense attention's keys and values and the same next tokens one by one. There are two measures. In
against_dense (KL, perplexity) the method's outputs go on to the next layer. In probe (output error,
mass read exactly, true top 100 read, a needle's mass) every head gets dense attention's queries.

Each layer takes all T tokens, one decode for each, before the next layer begins. No token sees a
later one, so this equals T steps of the whole model. But it reads the weights only once.

    make = functools.partial(wave, RetroConfig())               # a cache of (capacity, batch)
    kl = against_dense(model, read(model, ids, n_steps=64), make)["kl"]

    B batch   H kv heads   G query heads per kv head   T steps   D head dim   V vocabulary
    n tokens read before the steps

Bytes are those of K, V and index that a step needs: live rows, where bytes_read() counts buffers.
Does not include: batches, a GPU, dtypes in which positions up to the context are not exact.
"""
import functools
import hashlib
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from generate import fill, fit, prefill
from model import DenseCache, RingCache, attend_in_window
from retroinfer import (
    PLAIN,
    Index,
    InputError,
    RetroConfig,
    WaveIndex,
    gather_clusters,
    limits_of,
    rank_clusters,
    scores,
    tripartite_attention,
)

PAGE = 16                   # tokens in one of Quest's pages
WINDOW = 512                # steps whose logits are in memory at once
TOP = 100                   # the best tokens, of which a share is read
# Tokens that dense attention reads at a time. The first chunk is what the first segment knows of.
CHUNK = RetroConfig().sink + RetroConfig().segment


# ---------------------------------------------------------------- methods

class Chosen(DenseCache):
    """A dense cache of which a step reads the tokens that choose(cache, q, logits) marks."""

    def __init__(self, choose, capacity, batch=1):
        super().__init__(capacity, batch)
        self.choose = choose

    def decode(self, q, k, v):
        B, H, _, D = k.shape
        n = int(self.n_tokens[0])
        self.k[:, :, n], self.v[:, :, n] = k[:, :, 0], v[:, :, 0]
        self.n_tokens.add_(1)
        grouped = q.reshape(B, H, -1, D) * D ** -0.5                        # (B, H, G, D)
        logits = grouped @ self.k[:, :, :n + 1].mT                          # (B, H, G, n + 1)
        self.read = self.choose(self, grouped, logits)                      # (B, H, n + 1)
        weights = logits.masked_fill(~self.read[:, :, None], -math.inf).softmax(-1)
        return (weights @ self.v[:, :, :n + 1]).view_as(q)

    forward = decode


def window(cache, q, logits, n, sink=4):
    """Marks the first `sink` tokens and the latest ones, n tokens in all."""
    place, total = torch.arange(logits.shape[-1]), logits.shape[-1]
    return ((place < sink) | (place >= total - n + sink)).expand(*logits.shape[:2], -1)


def oracle(cache, q, logits, n):
    """Marks the n tokens with the most attention mass, summed over the G query heads."""
    best = logits.softmax(-1).sum(2).topk(min(n, logits.shape[-1])).indices
    return torch.zeros(logits.shape[:2] + logits.shape[3:], dtype=torch.bool).scatter_(-1, best, 1)


def quest(cache, q, logits, n):
    """Marks the n pages with the largest bound on q·k, and the tokens that are in no page yet."""
    if not hasattr(cache, "bounds"):
        pages = cache.k[:, :, :logits.shape[-1] // PAGE * PAGE].unflatten(2, (-1, PAGE))
        cache.bounds = pages.amin(3), pages.amax(3)                         # (B, H, pages, D)
    low, high = cache.bounds
    bound = q.clamp(max=0) @ low.mT + q.clamp(min=0) @ high.mT              # (B, H, G, pages)
    best = bound.amax(2).topk(min(n, low.shape[2])).indices
    paged = torch.zeros(*q.shape[:2], low.shape[2], dtype=torch.bool).scatter_(-1, best, True)
    rest = torch.ones(*q.shape[:2], logits.shape[-1] - PAGE * low.shape[2], dtype=torch.bool)
    return torch.cat([paged.repeat_interleave(PAGE, -1), rest], -1)


@functools.cache
def remembered():
    """PLAIN's nearest, which remembers its answers: each budget clusters the same keys again.

    read() forgets them: it clears the cache of this function.
    """
    seen = {}

    def nearest(x, centroids):
        bits = (t.contiguous().view(torch.uint8).numpy() for t in (x, centroids))
        key = b"".join(hashlib.blake2b(b).digest() for b in bits)
        if key not in seen:
            seen[key] = PLAIN.nearest(x, centroids)
        return seen[key]
    return nearest


class Watched(WaveIndex):
    """A wave index that says how many tokens it reads exactly. With two rows it says which.

    In the second row the value of a token is its position. So the values that a step fetches say
    which tokens it has read.
    """

    def __init__(self, config, capacity, batch):
        if config.store_bits != 16 and batch > 1:
            raise InputError(f"store_bits is {config.store_bits}: values that say which tokens are "
                             "read need 16 bits")
        hot = PLAIN._replace(attend=self.watch, nearest=remembered())
        super().__init__(config, capacity, batch, hot)

    def watch(self, q, steady, index, stores, budget, method):
        budget = fit(budget)

        def fetch(ids, ends):
            k, v, bias = gather_clusters(index, stores, fill(ends, budget), ids, ends)
            self.fetched = v[-1, :, :, 0].long(), bias[-1, :, 0] == 0       # (H, N) both
            return k, v, bias
        return tripartite_attention(q, steady, index, budget, fetch, method)

    @property
    def read(self):
        """(1, H, n) bool: tokens the latest step read exactly."""
        n, live = int(self.n_tokens[1]), int(self.n_tokens[1] - self.n_indexed[1])
        place, is_token = self.fetched
        mask = torch.zeros(place.shape[0], n + 1, dtype=torch.bool)         # one for free slots
        mask.scatter_(-1, place.masked_fill(~is_token, n), True)
        mask.scatter_(-1, self.v_steady[1, :, :live, 0].long(), True)
        return mask[None, :, :n]

    def ranks(self, q, where):
        """(H,) rank of the best cluster with one of the tokens `where`. 0: the first, or none."""
        index = Index(*(x[1:] for x in self.index))
        hit = torch.isin(self.store.v[1:, :, :, 0].long(), where).cumsum(-1)
        hit = F.pad(hit, (1, 0))                                            # (1, H, capacity + 1)
        ends = index.offsets + index.sizes.long()
        holds = hit.gather(-1, ends) > hit.gather(-1, index.offsets)
        q, live = q * q.shape[-1] ** -0.5, int(self.n_tokens[1] - self.n_indexed[1])
        near = scores(q, self.k_steady[1:, :, :live])
        far = self.method.centroid_logits(q, index, self.method)
        order = rank_clusters(q, far, near, index, index.sizes.shape[-1], self.method)
        return holds.gather(-1, order)[0].long().argmax(-1)


def wave(config, capacity, batch=1):
    return Watched(config, capacity, batch)


def wave_rows(c, steady, retrieved, clusters, n_ranked, D=64):
    """How many rows of D 16-bit numbers a step reads for one head: of keys, values and the index.

    A cluster has a size of two such numbers. If it is ranked by mass, a spread and a scale too.
    """
    vector, token = c.bits / 16, token_rows(c, D)
    index = clusters * (vector + (2 + 2 * c.by_mass) / D) + n_ranked * vector
    return 2 * steady + token * retrieved + index


def token_rows(c, D):
    """How many such rows a retrieved token takes: of its value, a share. A row of 8-bit numbers has
    a scale of 16 bits."""
    return (1 + c.values) * (1 if c.store_bits == 16 else 0.5 + 1 / D)


def rows_read(cache):
    """How many rows of D numbers the latest step read for one head, on average over heads."""
    if isinstance(cache, WaveIndex):
        clusters = (cache.index.sizes[0] > 0).sum(-1).float()               # (H,)
        n_ranked = float(cache.budget().ranked[0].minimum(clusters).mean())
        steady = int(cache.n_tokens[0] - cache.n_indexed[0])
        retrieved = float(cache.fetched[1].sum(-1).float().mean())
        return wave_rows(cache.config, steady, retrieved, float(clusters.mean()), n_ranked,
                         cache.index.means.shape[-1] * (2 if cache.config.bits == 4 else 1))
    pages = 2 * cache.bounds[0].shape[2] if hasattr(cache, "bounds") else 0
    if isinstance(cache, Chosen):
        return pages + 2 * cache.read[0].sum(-1).float().mean().item()
    return 2 * int(cache.n_tokens[0])


def wave_at(config, rows, n, steps, case=None):
    """The config that reads so many rows behind n tokens; None if the index alone is more.

    With a case, a retrieved cluster has as many tokens as on this text, else the mean size.
    """
    found = wave_if(config, rows, n, steps, 1.0)
    if not (found and case):
        return found
    return wave_if(config, rows, n, steps, fullness(case, found))


def wave_if(config, rows, n, steps, full):
    """wave_at, if a retrieved cluster has `full` times as many tokens as one of the mean size."""
    rest = n - config.sink - config.local
    indexed = rest // config.segment * config.segment
    tail = (rest - indexed) // config.cluster * config.cluster
    indexed += tail if tail >= config.update else 0
    clusters = indexed // config.cluster
    slots = 1.05 * clusters                                                 # some are split
    steady = n - indexed + steps / 2
    spent = wave_rows(config, steady, 0, slots, config.estimate * clusters)
    cluster = token_rows(config, 64) * config.cluster * full + config.bits / 16
    retrieve = round((rows - spent) / cluster)
    if not 1 <= retrieve <= clusters:
        return None
    return replace(config, min_retrieve=1, growth=1.0, retrieve=retrieve / clusters,
                   estimate=min(config.estimate, 1 - retrieve / clusters))


def methods_at(rows, n, steps, case=None):
    """{name: function that makes its cache} of the methods that can read so few rows in a step.

    case: the text, once it is read. Without it the bytes are only about right.
    """
    pages = n // PAGE
    made = {name: config and functools.partial(wave, config) for name, config in (
        ("ours", wave_at(RetroConfig(), rows, n, steps, case)),
        ("paper", wave_at(RetroConfig.paper(), rows, n, steps, case)))}
    for choose, count in ((window, rows / 2), (oracle, rows / 2), (
            quest, (rows - 2 * pages - steps) / (2 * PAGE))):
        enough = count >= 1 and functools.partial(choose, n=int(count))
        made[choose.__name__] = enough and functools.partial(Chosen, enough)
    return {name: make for name, make in made.items() if make}


def ours_rows(n, steps, full=1.0):
    """How many rows ours reads behind n tokens by default: the budget of the other methods."""
    c = RetroConfig()
    indexed = n - c.sink - c.local
    n_retrieve, n_ranked = map(int, limits_of(c, torch.tensor(indexed)))
    steady = n - indexed + indexed % c.cluster + steps / 2
    retrieved = full * n_retrieve * c.cluster
    return wave_rows(c, steady, retrieved, 1.05 * indexed // c.cluster, n_ranked)


def named_methods(n, steps, case=None):
    """{name: function that makes its cache}. Methods that have a budget get the bytes of ours."""
    full = fullness(case, RetroConfig()) if case else 1.0
    same = methods_at(ours_rows(n, steps, full), n, steps, case)
    same["paper, bytes of ours"] = same.pop("paper", None)
    made = {"dense": DenseCache, "paper": functools.partial(wave, RetroConfig.paper())}
    made |= same | {"ours": functools.partial(wave, RetroConfig())}
    return {name: make for name, make in made.items() if make}


# ---------------------------------------------------------------- one text, dense and otherwise

class DenseWithQueries(DenseCache):
    """A dense cache that keeps the root of the summed squares of its first CHUNK queries.

    window: how many of the latest tokens its layer sees; 0: all.
    """

    def __init__(self, capacity, batch=1, window=0):
        super().__init__(capacity, batch)
        self.window = window

    def prefill(self, q, k, v, row=0):
        start = int(self.n_tokens[row])
        o = super().prefill(None if self.window else q, k, v, row)
        if self.window:
            end = start + k.shape[2]
            seen = slice(max(start - self.window + 1, 0), end)
            o = attend_in_window(q, self.k[row:row + 1, :, seen], self.v[row:row + 1, :, seen],
                                 self.window)
        if start < CHUNK:
            energy = q[:, :, :CHUNK - start].square().sum(2, keepdim=True)  # (1, H*G, 1, D)
            self.q = energy.sqrt() if start == 0 else (self.q.square() + energy).sqrt()
        return o

    def past(self, n):
        """q, k, v of the first n tokens, the arguments of `filled`."""
        return self.q, self.k[:, :, :n], self.v[:, :, :n]


def refuse_windows(model):
    """InputError for a model with layers that see a window only."""
    if model.config.windows:
        raise InputError("layers of this model see a window only, which is not measured here: give "
                         "a model whose layers see all tokens")


def dense_caches(model, capacity):
    return [DenseWithQueries(capacity, window=layer.window) for layer in model.layers]


@dataclass
class Case:
    """A text as dense attention reads it."""
    ids: torch.Tensor       # (n + T + 1,)
    past: list              # each layer's q (1, H*G, 1, D), k, v (1, H, n, D): arguments of filled
    steps: list             # each layer's q (1, H*G, T, D), k, v (1, H, T, D) and dense output
    hidden: torch.Tensor    # (T, hidden) of the model's last layer: logits follow
    windows: list           # how many of the latest tokens each layer sees; 0: all

    @property
    def n(self):
        return self.past[0][1].shape[2]

    @property
    def T(self):
        return len(self.hidden)


def read(model, ids, n_steps):
    """The Case of ids (N,). The last token is only predicted, and n_steps before it are steps."""
    return read_at(model, ids, [len(ids)], n_steps)[0]


def read_at(model, ids, lengths, n_steps):
    """A Case for each of `lengths`, of the text's first tokens ids (N,), which are read once.

    The cases share their keys and values. InputError if two lengths are closer than the steps.
    """
    remembered.cache_clear()
    caches, cases, done = dense_caches(model, max(lengths)), [], 0
    windows = [cache.window for cache in caches]
    for length in sorted(lengths):
        n, steps = length - n_steps - 1, []
        if n <= done:
            raise InputError(f"the last {n_steps} of {length:,} tokens begin within a text of "
                             f"{done + 1:,}: give lengths that are further apart")
        prefill(model, caches, [ids[done:n]], CHUNK)
        past = [cache.past(n) for cache in caches]
        attends = [functools.partial(keep_step, cache, steps) for cache in caches]
        hidden = follow(model, ids[n:length - 1], n, attends)
        cases.append(Case(ids[:length], past, steps, hidden, windows))
        done = length - 1
    return cases


def keep_step(cache, steps, q, k, v):
    """Dense attention of some steps, whose q, k, v and outputs are added to the list `steps`."""
    steps.append((q, k, v, cache.prefill(q, k, v)))
    return steps[-1][-1]


def follow(model, ids, start, attends):
    """The model's hidden states (T, hidden) at ids (T,), which stand at `start`."""
    positions = torch.arange(start, start + len(ids))[None]
    return model(ids[None], positions, attends)[0]


def filled(make, q, k, v, n_steps, probe=None):
    """A cache that has read k, v (1, H, n, D). With `probe`, a second row has `probe` for values.

    One query q (1, H*G, 1, D) stands for all, because only the cache's state is wanted: it has
    the energy of the first queries (DenseWithQueries).
    """
    cache = make(k.shape[2] + n_steps, 1 if probe is None else 2)
    for row, values in enumerate([v] if probe is None else [v, probe]):
        cache.prefill(q, k, values, row=row)
    return cache


def made_for(make, window):
    """make, or what makes the cache of a layer that sees a window only."""
    return functools.partial(RingCache, window) if window else make


def caches_of(case, make, n_steps):
    """A cache for each layer that has read the case."""
    return [filled(made_for(make, window), *past, n_steps)
            for past, window in zip(case.past, case.windows, strict=True)]


def wide(case):
    """(layer, past, step) of each layer that sees all tokens."""
    layers = zip(case.past, case.steps, case.windows, strict=True)
    return [(i, past, step) for i, (past, step, window) in enumerate(layers) if not window]


def fullness(case, config):
    """Tokens of a retrieved cluster over the mean size, on average over layers and heads."""
    tokens = clusters = 0.0
    for _, past, (q, k, v, _) in wide(case):
        cache = filled(functools.partial(wave, config), *past, 1)
        next(feed(cache, q, k, v))
        tokens += float(cache.fetched[1].sum(-1).float().mean())
        clusters += float(cache.budget().retrieve)
    return tokens / (clusters * config.cluster)


def feed(cache, q, k, v):
    """Yield the output (B, H*G, 1, D) of decode for each of T tokens (B, *, T, D)."""
    room = 0
    for t in range(q.shape[2]):
        room = room or cache.update()
        yield cache.decode(*(x[:, :, t:t + 1] for x in (q, k, v)))
        room -= 1


def against_dense(model, case, make):
    """nll, KL to dense and agreement of each step, and the bytes that it reads.

    The outputs of the method go on to the next layer. Bytes are those of layers that see all
    tokens: the others read the same with any method.
    """
    T, rows, caps = case.T, [], []

    def attend(past, window, q, k, v):
        cache, outputs = filled(made_for(make, window), *past, T), []
        for o in feed(cache, q, k, v):
            outputs.append(o)
            if not window:
                rows.append(rows_read(cache))
        if not window:
            caps.append(cache.bytes_read())
        return torch.cat(outputs, 2)

    layers = zip(case.past, case.windows, strict=True)
    attends = [functools.partial(attend, *layer) for layer in layers]
    hidden, k = follow(model, case.ids[case.n:-1], case.n, attends), case.past[0][1]
    n_rows = sum(rows) / len(rows)          # a step and head
    n_bytes = k.shape[1] * k.shape[3] * k.element_size() * len(caps) * n_rows
    return {"bytes": n_bytes, "cap": sum(caps), "share": n_rows / (2 * case.n + T),
            **distances(model, case.hidden, hidden, case.ids[case.n + 1:])}


def forced(model, case, caches):
    """The distances to dense of caches that have read the case. Outputs go on to the next layer."""
    def attend(cache, q, k, v):
        return torch.cat(list(feed(cache, q, k, v)), 2)
    attends = [functools.partial(attend, cache) for cache in caches]
    hidden = follow(model, case.ids[case.n:-1], case.n, attends)
    return distances(model, case.hidden, hidden, case.ids[case.n + 1:])


def distances(model, dense, hidden, ids):
    """Measures of hidden states (T, hidden), with the true next tokens ids (T,)."""
    found = {"nll_dense": [], "nll": [], "kl": [], "same": []}
    for states in zip(*(x.split(WINDOW) for x in (dense, hidden, ids)), strict=True):
        p, q = (model.logits(x).double().log_softmax(-1) for x in states[:2])   # (WINDOW, V)
        truth = states[2][:, None]
        found["nll_dense"] += (-p.gather(-1, truth)[:, 0]).tolist()
        found["nll"] += (-q.gather(-1, truth)[:, 0]).tolist()
        found["kl"] += (p.exp() * (p - q)).sum(-1).tolist()
        found["same"] += (p.argmax(-1) == q.argmax(-1)).tolist()
    return found


def probe(case, make):
    """Yield what a method does with dense attention's queries, for each step of each layer.

    (layer, t, q (H, G, D), weights (H, G, n) of dense attention, read (H, n) bool, the relative
    error of each head's output (H*G,), cache)
    """
    T = case.T
    for layer, (q0, k, v), (q, k1, v1, dense) in wide(case):
        _, H, n, D = k.shape
        place = torch.arange(n + T, dtype=v.dtype)[:, None].expand(1, H, n + T, D)
        cache, keys = filled(make, q0, k, v, T, place[:, :, :n]), torch.cat([k, k1], 2)[0]
        both = (q.expand(2, -1, -1, -1), k1.expand(2, -1, -1, -1), torch.cat([v1, place[:, :, n:]]))
        for t, o in enumerate(feed(cache, *both)):
            now = q[0, :, t].view(H, -1, D)
            weights = (now @ keys[:, :n + t + 1].mT * D ** -0.5).softmax(-1)
            everything = torch.ones(1, H, n + t + 1, dtype=torch.bool)
            error = (o[0, :, 0] - dense[0, :, t]).norm(dim=-1) / dense[0, :, t].norm(dim=-1)
            yield layer, t, now, weights, getattr(cache, "read", everything)[0], error, cache


def by_head(case, make):
    """Means over steps, (layers, H*G) each: output error, mass read exactly, top 100 read."""
    found = {name: [[] for _ in case.past] for name in ("error", "mass", "recall")}
    for layer, _, _, weights, is_read, error, _ in probe(case, make):
        best = weights.topk(min(TOP, weights.shape[-1])).indices            # (H, G, 100)
        hit = is_read[:, None].expand_as(weights).gather(-1, best)
        found["error"][layer].append(error)
        found["mass"][layer].append((weights * is_read[:, None]).sum(-1).flatten())
        found["recall"][layer].append(hit.float().mean(-1).flatten())
    return {name: [[round(x, 4) for x in torch.stack(layer).mean(0).tolist()]
                   for layer in layers if layer]
            for name, layers in found.items()}


def needle_mass(case, make, where):
    """Dense mass on the tokens `where`, the share of it that is read exactly, and the rank of their
    best cluster in each head that puts a tenth of its mass there."""
    total, kept, ranks = 0.0, 0.0, []
    for _, _, q, weights, is_read, _, cache in probe(case, make):
        mass = weights[..., where]                                          # (H, G, tokens)
        total, kept = total + mass.sum(), kept + (mass * is_read[:, None, where]).sum()
        looks = mass.sum(-1).amax(-1) > 0.1
        if isinstance(cache, Watched) and looks.any():
            ranks += cache.ranks(q[None], where)[looks].tolist()
    return {"mass": float(total), "kept": float(kept / total), "ranks": ranks}
