"""What several test files share: configs, random texts, and decode steps over random clusters with
what PyTorch and float64 loops make of them."""
import itertools
import math
from dataclasses import replace

import oracle
import pytest
import torch

import retroinfer
from antkv import CHANNELS, Codebook, M
from retroinfer import (
    Budget,
    Index,
    RetroConfig,
    WaveIndex,
    before,
    few,
    pack,
    rank_by_mass,
    unpack,
    whole,
)

SMALL = {"sink": 2, "local": 4, "update": 32, "segment": 64, "cluster": 4, "min_retrieve": 1}
WHOLE = SMALL | {"bits": 16}
ALL = {"retrieve": 1.0, "estimate": 0.0, "values": 1.0}
# GraphConfig that finds every key of a short text
EVERYTHING = {"sink": 2, "local": 4, "update": 32, "top": 256, "beam": 256, "degree": 8,
              "entries": 8, "width": 32, "hops": 10, "coarse": 16, "fallback": 16,
              "centroids": 8, "listed": 256, "visits": 2}
BACKENDS = ["eager", "compiled", "native", pytest.param("kernels", marks=pytest.mark.slow)]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LONG = {"max_position_embeddings": 4096}     # of a tiny checkpoint


def qkv(T, B=1, H=2, G=3, D=16, seed=0, spread=1.0):
    """Random tensors whose keys form clumps, as real keys do."""
    g = torch.Generator().manual_seed(seed)
    clumps = 2 * torch.randn(B, H, max(T // 12, 1), D, generator=g)
    which = torch.randint(clumps.shape[2], (B, H, T), generator=g)
    k = clumps.gather(2, which[..., None].expand(-1, -1, -1, D))
    k = k + spread * torch.randn(B, H, T, D, generator=g)
    return torch.randn(B, H * G, T, D, generator=g), k, torch.randn(B, H, T, D, generator=g)


def read(cache, q, k, v):
    """Prefill of a batch of texts of one length."""
    return torch.cat([cache.prefill(q[b:b + 1], k[b:b + 1], v[b:b + 1], b) for b in range(len(q))])


def random_book(bits, H=2, D=16, seed=0):
    """Codewords that nothing was fitted to."""
    g = torch.Generator().manual_seed(seed)
    words = [torch.randn(1, H, D // c, M, c, generator=g).half() for c in CHANNELS[bits]]
    return Codebook(*words, torch.randn(1, H, 1, D, generator=g))


def run(config, q, k, v, n_prompt):
    """A wave index of these tokens, and what `generated` says of it."""
    wave = WaveIndex(config, k.shape[2], batch=len(k))
    return wave, generated(wave, q, k, v, n_prompt)


def generated(cache, q, k, v, n_prompt):
    """Outputs of a prefill of n_prompt tokens and one decode step for each of the others."""
    outputs, room = [read(cache, *(x[:, :, :n_prompt] for x in (q, k, v)))], 0
    for t in range(n_prompt, k.shape[2]):
        room = room or cache.update()
        outputs.append(cache.decode(*(x[:, :, t:t + 1] for x in (q, k, v))))
        room -= 1
    return torch.cat(outputs, 2)


def config_budget(wave, b=0):
    """(clusters retrieved, clusters retrieved or estimated) of a sequence."""
    budget = wave.budget()
    return int(budget.retrieve[b]), int(budget.ranked[b])


def members(wave, b, h):
    """[(keys, values)] of the clusters of one head, as the CSR store says."""
    index = wave.index
    offsets, sizes = index.offsets[b, h].tolist(), index.sizes[b, h].int().tolist()
    spans = [(o, o + n) for o, n in zip(offsets, sizes, strict=True) if n]
    return [(wave.store.k[b, h, i:j], wave.store.v[b, h, i:j]) for i, j in spans]


def fixed(logits, into):
    """A token for each row that does not end its text; the logits are kept in a list."""
    into.append(logits)
    return torch.full((len(logits),), len(into) % 300 + 3)


def assert_as_exact(mine, eager, truth):
    """The error to float64 is at most twice that of PyTorch."""
    mine, eager = (((x.double().cpu() - truth).abs().max().item()) for x in (mine, eager))
    assert mine <= 2 * eager + 1e-6, (mine, eager)


class Case:
    """A step over random clusters that lie anywhere in the store, and its PyTorch and float64.

    shape: B, H, G, D, W, C. caps: R, K, and tokens of the largest cluster. shares (B, 2): clusters
    each sequence retrieves, retrieves or estimates; a head 3 fewer than the one before. lives
    (B, 2): steady slots and clusters it has. Everything else is NaN, or an offset far outside the
    store.
    """

    def __init__(self, shape, caps, shares, lives, dtype=torch.float32, by_mass=True, bits=4,
                 values=1.0, store_bits=16):
        (B, H, G, D, W, C), (R, K, largest) = shape, caps
        g = torch.Generator().manual_seed(0)

        def randn(*size):
            return torch.randn(B, H, *size, D, generator=g).to(dtype)

        sizes = torch.randint(0, largest + 1, (B, H, C), generator=g)
        sizes *= torch.arange(C) < torch.tensor(lives)[:, 1, None, None]
        order = torch.rand(B, H, C, generator=g).argsort(-1)            # how they lie in the store
        ends = sizes.gather(-1, order).cumsum(-1)
        offsets = torch.empty_like(sizes).scatter_(-1, order, before(ends) + 3)
        T = int(sizes.sum(-1).max()) + 7
        fewer = 3 * torch.arange(H)
        n_retrieve, n_ranked = ((n[:, None] - fewer).clamp(min=0) for n in torch.tensor(shares).T)
        self.config = replace(RetroConfig.paper(), bits=bits, by_mass=by_mass)
        self.q = 2 * randn(G)
        self.budget = Budget(n_retrieve, n_ranked, 1.0, R, K, largest * R)
        self.give_values(values)
        is_free = torch.arange(W) >= torch.tensor(lives)[:, :1]                     # (B, W)
        bias = torch.zeros(B, W).masked_fill(is_free, -math.inf)[:, None, None].expand(B, H, 1, W)
        self.steady = randn(W), randn(W), bias
        self.stores = randn(T), randn(T)
        if store_bits == 8:
            (k, a), (v, b) = (whole(x.float(), 127) for x in self.stores)
            self.stores = (k.to(torch.int8), v.to(torch.int8), torch.stack([a, b], -1),
                           2 * torch.randn(B, H, 1, D, generator=g))
        spreads = 2 * by_mass * torch.rand(B, H, C, generator=g).bfloat16()
        (centroids, a), (means, b) = (pack(x.float()) if bits == 4 else (x, torch.ones(B, H, C))
                                      for x in (randn(C), randn(C)))
        centre = torch.randn(B, H, 1, D, generator=g) * (bits == 4)
        self.index = Index(centroids, means, sizes.float(), offsets, spreads,
                           torch.stack([a, b], -1).bfloat16(), centre)
        row = torch.arange(T).expand(B, H, T)
        self.is_free_row = (row < 3) | (row >= 3 + ends[..., -1:])

    def is_tied(self):
        """Whether a number of a query lies in the middle between two bytes, as those of bfloat16
        may: then the last bit of a product decides which of the two it becomes."""
        x = 127 * self.q.double() / self.q.double().abs().amax(-1, keepdim=True)
        return ((x - x.floor() - 0.5).abs() < 2e-6).any()

    def give_values(self, share):
        """Read the values of this share of the retrieved tokens."""
        self.config = replace(self.config, values=share)
        self.method, self.budget = self.config.method(), self.budget._replace(values=share)

    def eager(self):
        """PyTorch's answer."""
        return retroinfer.attend(self.q, self.steady, self.index, self.stores, self.budget,
                                 self.method)

    def twin(self, attend, device="cpu"):
        """The answer of a twin of retroinfer.attend, with all that is free poisoned."""
        def poison(x, is_free):
            worst = math.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
            return x.masked_fill(is_free[..., None], worst)

        k, v, bias = self.steady
        is_free, is_empty = bias[:, :, 0].isinf(), self.index.sizes == 0
        steady = poison(k, is_free), poison(v, is_free), bias
        centroids, means, sizes, offsets, spreads, scales, centre = self.index
        index = Index(poison(centroids, is_empty), poison(means, is_empty), sizes,
                      offsets.masked_fill(is_empty, 2**40),
                      spreads.masked_fill(is_empty, math.nan), poison(scales, is_empty), centre)
        stores = [*(poison(x, self.is_free_row) for x in self.stores[:3]), *self.stores[3:]]
        retrieve, ranked, *numbers = self.budget
        budget = Budget(retrieve.to(device), ranked.to(device), *numbers)
        steady, index, stores = ([x.to(device) for x in xs] for xs in (steady, index, stores))
        o = attend(self.q.to(device), steady, Index(*index), stores, budget, self.method)
        return o.cpu()

    def truth(self):
        """(B, H, G, D) in float64: every head a loop over its clusters in order of rank."""
        o = torch.zeros(self.q.shape, dtype=torch.float64)
        for b in range(self.q.shape[0]):
            for h in range(self.q.shape[1]):
                o[b, h] = self.head(b, h)
        return o

    def vectors(self, i):
        """Centroids (i = 0) or means (i = 1) of the index, (B, H, C, D) in float64."""
        x = self.index[i]
        x = torch.cat(unpack(x), -1) if x.dtype == torch.uint8 else x
        return x.double() * self.index.scales[..., i:i + 1].double()

    def rows(self):
        """Keys and values of the store, (B, H, T, D) in float64."""
        k, v, *rest = (x.double() for x in self.stores)
        if not rest:
            return k, v
        scales, centre = rest
        return k * scales[..., :1] + centre, v * scales[..., 1:]

    def head(self, b, h):
        """(G, D) in float64."""
        q = self.q[b, h].double() * self.q.shape[-1] ** -0.5
        k_s, v_s, bias = (x[b, h].double() for x in self.steady)
        k_all, v_all = (x[b, h] for x in self.rows())
        centroids, means = (self.vectors(i)[b, h] for i in (0, 1))
        sizes, offsets = (x[b, h].long().tolist() for x in self.index[2:4])
        live = [c for c, n in enumerate(sizes) if n]
        asked = q if self.index.centroids.dtype != torch.uint8 else oracle.in_bytes(q)
        centre = self.index.centre[b, h, 0].double()
        centroids = centroids + centre
        shift = (q - asked) @ centre                        # the centre meets queries as they are
        logits = asked @ centroids[live].T + shift[:, None]                         # (G, live)
        half = q.square().sum(-1, keepdim=True) / 2                                 # (G, 1)
        worth = {c: sizes[c] * (1 + half * self.index.spreads[b, h, c].double()) for c in live}
        is_in, share = bias[0] == 0, logits.softmax(-1)
        if self.method.rank is rank_by_mass:  # of all attention
            hopes = [[oracle.hope(sizes[c], 2 * float(x) * float(self.index.spreads[b, h, c]))
                      for c in live] for x in half]
            near = q @ k_s[is_in].T                                                 # (G, steady)
            share = torch.cat([logits + q.new_tensor(hopes), near], -1).softmax(-1)[:, :len(live)]
        rank = [live[i] for i in share.sum(0).argsort(descending=True).tolist()]
        n_retrieve, n_ranked = int(self.budget.retrieve[b, h]), int(self.budget.ranked[b, h])
        n_values = few(self.budget, sum(sizes[c] for c in rank[:n_retrieve]))
        k, v = [k_s[is_in]], [v_s[is_in]]
        bias = [torch.zeros(len(q), int(is_in.sum()), dtype=q.dtype)]               # (G, ...) each
        owner = [[-1] * int(is_in.sum())]           # of each entry: its cluster, if it is retrieved
        for i, c in enumerate(rank[:n_ranked]):
            span = slice(offsets[c], offsets[c] + sizes[c])
            off = (asked - q) @ (centroids[c] - centre)[:, None]        # queries meet it in bytes
            one = centroids[c:c + 1], means[c:c + 1], worth[c].log() + off, [-1]
            for all_, x in zip((k, v, bias, owner), one if i >= n_retrieve else
                               (k_all[span], v_all[span], q.new_zeros(len(q), sizes[c]),
                                [c] * sizes[c]), strict=True):
                all_.append(x)
        weights, v = (q @ torch.cat(k).T + torch.cat(bias, -1)).softmax(-1), torch.cat(v)
        share, owner = weights.sum(0).tolist(), enumerate(itertools.chain(*owner))
        lightest_last = sorted((-share[i], i, c) for i, c in owner if c >= 0)
        for _, i, c in lightest_last[n_values:]:    # these count with their cluster's mean value
            v[i] = means[c]
        return weights @ v


# (B, H, G, D, W, C), (R, K, P), then of each sequence: (retrieved, ranked), (steady, clusters)
CASES = {
    "plain": ((1, 2, 4, 64, 40, 90), (12, 60, 9), [(12, 60)], [(40, 90)]),
    "three queries, 80 dims": ((1, 2, 3, 80, 37, 53), (7, 33, 9), [(7, 33)], [(36, 53)]),
    "one query, 96 dims": ((1, 1, 1, 96, 65, 130), (20, 129, 9), [(20, 129)], [(1, 130)]),
    "twenty queries": ((1, 1, 20, 64, 16, 40), (5, 20, 9), [(5, 20)], [(16, 40)]),
    "256 dims": ((1, 1, 2, 256, 20, 30), (4, 20, 9), [(4, 20)], [(20, 30)]),
    "ragged": ((3, 1, 3, 16, 40, 60), (20, 50, 9), [(3, 9), (20, 50), (1, 1)],
               [(40, 60), (7, 44), (1, 2)]),
    "no index yet": ((2, 1, 2, 16, 33, 20), (4, 16, 9), [(4, 16)] * 2, [(33, 0), (1, 20)]),
    "one token": ((1, 1, 1, 16, 1, 1), (1, 1, 9), [(1, 1)], [(1, 0)]),
    "one cluster": ((1, 1, 3, 16, 5, 1), (1, 1, 9), [(1, 1)], [(0, 1)]),
    "none retrieved": ((1, 2, 2, 32, 8, 70), (8, 70, 9), [(0, 70)], [(8, 70)]),
    "none estimated": ((1, 2, 2, 32, 8, 70), (40, 70, 9), [(40, 40)], [(8, 70)]),
    "many clusters": ((1, 1, 2, 16, 4, 300), (295, 300, 9), [(295, 300)], [(4, 300)]),
    "all retrieved": ((1, 2, 2, 32, 8, 70), (70, 70, 9), [(70, 70)], [(8, 70)]),
}
