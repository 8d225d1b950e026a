"""Error bars: how far a step's output is from dense attention's, judged from a few drawn tokens.

A step of the wave index estimates or drops most clusters, and replaces most values by the mean
value of a cluster. This file draws tokens that the step left out, reads them, and says how far the
output of each query head is from dense attention's, with a confidence. No bit of the output
changes.

    clusters not read │ retrieved tokens whose values were not read
    ├──┬─────┬─┬──────┼─┬──┬─┬──┤   each as wide as the step's own estimate of its attention mass
     ↑    ↑     ↑    ↑    ↑    ↑    a draw in each of m equal parts: the heavy are drawn often

A drawn token j has the weight w_j = exp(q·k_j); the step counted e_j for it (0 if it was dropped)
with the value m_j, the mean of its cluster. Let a be the step's output, Z its denominator. Then

    o - a = sum_j (w_j (v_j - a) - e_j (m_j - a)) / (Z + sum_j (w_j - e_j)).

Each of the two sums is estimated by a mean over draws, divided by their chances (importance
sampling). Only what the step missed is estimated (control variates). The variance of the quotient
is that of w_j (v_j - o) - e_j (m_j - o), taken at the estimate of o (delta method).

    B batch   H kv heads   G query heads per kv head   D head dim   C clusters   N retrieved tokens
    m draws of a kv head   U = C + N cells

    cache = CheckedIndex(RetroConfig(), capacity)       # a WaveIndex that checks its steps
    cache.decode(q, k, v)
    cache.widths                                        # (B, H, G, last steps)

It runs on PyTorch beside any backend, and repeats the step's ranking there; in a compiled PyTorch
step the compiler merges the two. A step that is wrong in a way that no draw shows is not found:
docs/error_bars.md says how heavy such a token can be. Does not include: a store on the host.
"""
import itertools
import math
from statistics import NormalDist
from typing import NamedTuple

import torch

from retroinfer import (
    InputError,
    WaveIndex,
    along,
    bias_of,
    choose_clusters,
    log_possible_mass,
    owners,
    rank_clusters,
    take,
    unpack,
    unroll,
)

DRAWS = 64              # of a kv head in a step
CONFIDENCE = 0.95
EVENLY = 0.1            # share of the draws that all tokens left have alike: none is invisible
ROUNDING = 1e-5         # what a step in fp32 may lose, of the output's length
STEPS = 1024            # the latest steps whose widths are kept
ROUNDS = 64, 256, 1024  # draws of a kv head that misses its target, round by round


class Left(NamedTuple):
    """What a step left out, as U cells: C clusters, then N retrieved tokens. Masses are logs, in
    units of the step's denominator; -inf: nothing."""
    total: torch.Tensor     # (B, H, G, 1) log of the step's denominator
    exact: torch.Tensor     # (B, H, G) its share that was read exactly
    guess: torch.Tensor     # (B, H, G, U) mass that a cell may hold: rank_by_mass's
    counted: torch.Tensor   # (B, H, G, U) what the step counted for it
    sizes: torch.Tensor     # (B, H, U) tokens
    first: torch.Tensor     # (B, H, U) first row in the store
    owner: torch.Tensor     # (B, H, U) its cluster


class Bars(NamedTuple):
    """What the draws say of a step."""
    correction: torch.Tensor    # (B, H, G, D) estimate of dense attention's output minus the step's
    shift: torch.Tensor         # (B, H, G) its length
    deviation: torch.Tensor     # (B, H, G) its standard error: root of the variances' sum over D


def look(q, steady, index, stores, budget, method):
    """What a step on q (B, H, G, D), scaled, leaves out. The arguments are those of
    retroinfer.attend."""
    x_s = method.scores(q, steady[0]) + steady[2]                           # (B, H, G, W)
    x_c = method.centroid_logits(q, index, method)                          # (B, H, G, C)
    order = rank_clusters(q, x_c, x_s, index, budget.K, method)             # (B, H, K)
    ids, ends, bias = choose_clusters(order, index, budget)
    rows = unroll(index.offsets.gather(-1, ids), ends, budget.N)            # (B, H, N)
    k = take(stores[0], rows.clamp(min=0))
    x_r = method.scores(q, k) + bias_of(rows < 0)                           # (B, H, G, N)
    mass = x_c + method.log_count(q, index)                                 # (B, H, G, C)
    x_e = along(mass, order) + bias
    exact = torch.cat([x_s, x_r], -1).logsumexp(-1, keepdim=True)
    total = exact.logaddexp(x_e.logsumexp(-1, keepdim=True))                # (B, H, G, 1)
    lost = lost_values((x_r - total).exp(), (x_e - total).exp(), ends, budget, method).log()
    is_read, is_ranked = marks(order, index, budget)                        # (B, H, 1, C)
    is_left = ~is_read & (index.sizes > 0)[:, :, None]
    guess = (x_c + log_possible_mass(q, index) - total).masked_fill(~is_left, -math.inf)
    counted = (mass - total).masked_fill(~(is_left & is_ranked), -math.inf)
    clusters = torch.arange(index.sizes.shape[-1], device=q.device).expand_as(index.sizes)
    owner = ids.gather(-1, owners(ends, budget.N).clamp(min=0))             # (B, H, N)
    return Left(total, (exact - total).exp()[..., 0], torch.cat([guess, lost], -1),
                torch.cat([counted, lost], -1),
                torch.cat([index.sizes, torch.ones_like(rows, dtype=torch.float32)], -1),
                torch.cat([index.offsets, rows.clamp(min=0)], -1), torch.cat([clusters, owner], -1))


def marks(order, index, budget):
    """Which clusters are read, and which are read or estimated: (B, H, 1, C) bool each."""
    place = torch.arange(order.shape[-1], device=order.device)
    free = torch.zeros_like(index.sizes, dtype=torch.bool)
    return [free.scatter(-1, order, (place < n[..., None]).expand_as(order))[:, :, None]
            for n in (budget.retrieve, budget.ranked)]


def lost_values(w_r, w_e, ends, budget, method):
    """The weights w_r (B, H, G, N) of the tokens whose values the step did not read; else 0."""
    place = torch.arange(w_r.shape[-1], device=w_r.device, dtype=torch.float32)
    place = place[:, None].expand(*w_r.shape[:2], -1, 1)                    # for a value: where
    kept, place, _ = method.share_values(w_r, place, w_e, ends, budget, method)
    place = place[..., 0].long()[:, :, None].expand_as(kept)
    return w_r.scatter(-1, place, w_r.gather(-1, place) - kept)


def draw(left, u):
    """(rows of the store, cells, factors), (B, H, m) each, for uniform numbers u (B, H, m).

    The tokens of a cell are drawn alike. A sum over all tokens left is, on average, the sum of
    factor times term over the draws. The factor of a draw that does not count is 0.
    """
    m, share = u.shape[-1], chances(left)                                   # (B, H, U)
    end = share.cumsum(-1)
    at = u.double() * end[..., -1:]
    cell = torch.searchsorted(end, at.contiguous(), right=True).clamp(max=end.shape[-1] - 1)
    chance, end, size, first = (x.gather(-1, cell) for x in (share, end, left.sizes, left.first))
    inside = (at - end + chance) / chance.clamp(min=1e-300) * size
    inside = inside.long().clamp(min=0).minimum(size.long() - 1).clamp(min=0)
    factor = torch.where(chance > 0, size / (m * chance.clamp(min=1e-300)), 0)
    return first + inside, cell, factor


def chances(left):
    """Chances of the cells (B, H, U), float64: their sum is 1, or 0 if nothing is left. A query
    head has a say in the drawing by the root of the mass that it has left."""
    guess = left.guess.double().clamp(min=-1e30)
    mass = guess.logsumexp(-1, keepdim=True)                                # (B, H, G, 1)
    say = ((mass - mass.amax(2, keepdim=True)) / 2).exp()
    is_left = left.guess.amax(2) > -math.inf
    heavy, even = (guess.softmax(-1) * say).sum(2), left.sizes.double()
    heavy, even = (normalized(x * is_left) for x in (heavy, even))
    return (1 - EVENLY) * heavy + EVENLY * even


def normalized(x):
    """x (B, H, U) >= 0 over its sum; 0 where that is 0."""
    return x / x.sum(-1, keepdim=True).clamp(min=1e-300)


def judge(left, drawn, q, index, stores, o):
    """The Bars of a step with output o (B, H, G, D) from the tokens drawn, in float64."""
    delta, each = terms(left, drawn, q, index, stores, o)
    m = each.shape[-2]
    spread = each - each.mean(-2, keepdim=True)
    variance = spread.square().sum((-1, -2)) * (m / max(m - 1, 1))          # (B, H, G)
    return Bars(delta, delta.norm(dim=-1), variance.sqrt())


def terms(left, drawn, q, index, stores, o):
    """The correction (B, H, G, D) that the tokens drawn suggest, and what each of them adds to its
    deviation from the truth (B, H, G, m, D)."""
    rows, cell, factor = drawn
    k, v = (take(store, rows).double() for store in stores)                 # (B, H, m, D)
    mean = mean_values(index, left.owner.gather(-1, cell)).double()
    size, factor = left.sizes.gather(-1, cell)[:, :, None], factor[:, :, None]      # (B, H, 1, m)
    x = q.double() @ k.mT - left.total                                      # (B, H, G, m)
    e = (along(left.counted, cell) - size.log()).double()
    x, e = (y.masked_fill(factor == 0, -math.inf) for y in (x, e))
    top = x.amax(-1, keepdim=True).clamp(min=0)             # a weight may be larger than all seen
    w, e, one = (x - top).exp(), (e - top).exp(), (-top).exp()
    total = one + (factor * (w - e)).sum(-1, keepdim=True)                  # (B, H, G, 1)
    total = total.maximum(one * left.exact[..., None])      # the tokens read are there for certain
    factor, o = factor / total.clamp(min=1e-300), o.double()[..., None, :]
    far, near = v[:, :, None] - o, mean[:, :, None] - o                     # (B, H, G, m, D)
    each = factor[..., None] * (w[..., None] * far - e[..., None] * near)
    delta = each.sum(-2)                                                    # (B, H, G, D)
    return delta, each - (factor * (w - e))[..., None] * delta[..., None, :]


def normal(confidence):
    """How many standard errors a normal number stays within, above alone and on both sides."""
    z = NormalDist().inv_cdf
    return z(confidence), z((1 + confidence) / 2)


def width(bars, z):
    """The step's output is at most so far from dense attention's, z being normal(confidence):
    (B, H, G).

    What was estimated, and what the estimate may lack, are added as if at right angles: in D
    dimensions a random vector has little along any other.
    """
    return (bars.shift.square() + (z[0] * bars.deviation).square()).sqrt()


def margin(bars, z):
    """The output plus bars.correction is at most so far from dense attention's: (B, H, G)."""
    return z[1] * bars.deviation


def relative(width, o):
    """A width (B, H, G) over the length of an output o (B, H, G, D), with what rounding may add."""
    length = o.double().norm(dim=-1).clamp(min=1e-20)
    return width / length + ROUNDING + torch.finfo(o.dtype).eps


def mean_values(index, ids):
    """Mean values (B, H, m, D), fp32, of clusters ids (B, H, m)."""
    rows = take(index.means, ids)
    if rows.dtype == torch.uint8:
        rows = torch.cat(unpack(rows), -1)
    return rows.float() * index.scales[..., 1].gather(-1, ids)[..., None]


def uniform(shape, seed, tokens):
    """Numbers (B, H, m) in (0, 1), one in each of m equal parts, that seed (1,) and tokens (B,)
    determine: a compiled step, a batch and a GPU draw alike."""
    _, H, m = shape
    place = torch.arange(H * m, device=tokens.device).view(1, H, m)
    x = scramble(place + scramble(tokens + scramble(seed))[:, None, None])
    part = torch.arange(m, device=tokens.device)
    return (part + (x.double() + 0.5) / 2**32) / m                          # (B, H, m)


def scramble(x):
    """Whole numbers below 2^32 from others, without a pattern that can be seen in them."""
    x = x & 0xffffffff
    for shift, factor in ((16, 0x21f0aaad), (15, 0x735a2d97)):      # products stay below 2^63
        x = (x ^ x >> shift) * factor & 0xffffffff
    return x ^ x >> 15


# ---------------------------------------------------------------- caches that check their steps

class CheckedIndex(WaveIndex):
    """A wave index that says of each step how far its outputs may be from dense attention's.

    seed: of the draws; give each layer its own. draws: of a kv head in a step. `widths` (B, H, G,
    STEPS) are those of the latest steps, over the length of the output, with CONFIDENCE; -1: none.
    """
    z = normal(CONFIDENCE)

    def __init__(self, config, capacity, batch=1, hot=None, seed=0, draws=DRAWS):
        if config.store_bits != 16:
            raise InputError(f"store_bits is {config.store_bits}: error bars need 16")
        super().__init__(config, capacity, batch, hot)
        self.seed, self.draws, self.widths = torch.tensor([seed]), draws, None

    def allocate_index(self, like):
        super().allocate_index(like)
        self.seed = self.seed.to(like.device)
        self.counts = like.new_zeros(3, dtype=torch.float64)    # outputs, good outputs, draws

    def observe(self, q, start, row=None):
        super().observe(q, start, row)
        if self.widths is None:                                 # the first prefill, never a step
            B, H = self.q_energy.shape[:2]
            self.widths = self.q_energy.new_full((B, H, q.shape[1] // H, STEPS), -1)

    def attend(self, q, steady):
        o = super().attend(q, steady)
        q = q.float() * q.shape[-1] ** -0.5
        left = look(q, steady, self.index, self.store.tensors(), self.budget(), self.method)
        return self.check(q, left, o)

    def check(self, q, left, o):
        """What the step returns, once its output o (B, H, G, D) is checked: o."""
        bars = self.draw(q, left, o, self.draws)
        self.keep(relative(width(bars, self.z), o))
        return o

    def draw(self, q, left, o, m, number=0, is_asked=True):
        """The Bars of m draws, the number-th ones of a step. A kv head that is not asked (B, H, 1)
        reads one row again and again, and all of its Bars are 0."""
        self.counts[2] += m * torch.ones_like(left.exact[..., :1]).mul(is_asked).sum()
        u = uniform((*q.shape[:2], m), self.seed + number * 2**20, self.n_tokens)
        drawn = [x * is_asked for x in draw(left, u)]
        return judge(left, drawn, q, self.index, self.store.tensors(), o)

    def keep(self, widths):
        """Remember widths (B, H, G) of a step."""
        self.counts[0] += widths.numel()
        batch = torch.arange(len(widths), device=widths.device)
        self.widths[batch, :, :, self.n_tokens % STEPS] = widths

    def facts(self):
        """WaveIndex.facts, and `bars`, once a step was taken: the median width of each query head
        (H*G), median and 95th percentile of all, and bytes read for them in a step."""
        w = self.widths.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)        # (H*G, B*STEPS)
        w, found = w[:, w[0] >= 0], super().facts()
        if not w.numel():
            return found
        outputs, _, draws = self.counts.tolist()
        row = 2 * self.store.k[0, 0, 0].nbytes + self.index.means[0, 0, 0].nbytes
        n_steps = outputs / self.widths[..., 0].numel()
        return found | {"bars": {
            "median": w.median().item(), "p95": w.flatten().quantile(0.95).item(),
            "heads": w.median(-1).values.tolist(), "bytes": row * draws / n_steps}}


class BoundedIndex(CheckedIndex):
    """A wave index that corrects its outputs until they are good enough, or ROUNDS are over.

    A query head is good enough if its output is within `error` of its length, with probability
    1 - delta. Kv heads with one that is not draw more, in ROUNDS of fixed shapes: one graph. An
    output that is not good enough is replaced by the corrected one, if that one's bar is shorter.
    """

    def __init__(self, error, delta, *args, **named):
        super().__init__(*args, **named)
        self.error, self.z = error, normal(1 - delta / len(ROUNDS))     # each of them may be wrong

    def check(self, q, left, o):
        best, widths = o, torch.full_like(left.exact, math.inf).double()
        is_asked = torch.ones_like(widths[..., :1], dtype=torch.bool)       # (B, H, 1)
        for number, m in enumerate(ROUNDS):
            bars = self.draw(q, left, o, m, number, is_asked)
            mended = (o + bars.correction).to(o.dtype)
            far = relative(width(bars, self.z), o)
            rest = relative(margin(bars, self.z), mended)
            rest = rest.masked_fill(far <= self.error, math.inf)    # well: it is not touched
            is_better = is_asked & (far.minimum(rest) < widths)             # (B, H, G)
            found = torch.where((rest < far)[..., None], mended, o)
            best = torch.where(is_better[..., None], found, best)
            widths = torch.where(is_better, far.minimum(rest), widths)
            is_asked = is_asked & (widths > self.error).any(-1, keepdim=True)
        self.counts[1] += (widths <= self.error).sum()
        self.keep(widths)
        return best

    def facts(self):
        """CheckedIndex.facts, with the share of the outputs that met what was asked."""
        found = super().facts()
        if "bars" in found:
            outputs, met, _ = self.counts.tolist()
            found["bars"] |= {"asked": self.error, "met": met / outputs}
        return found


def maker(error, delta, seed, args):
    """A function that makes the index of the next layer: one that checks, or, with an error, one
    that mends. args: of WaveIndex. delta: 0.05 if None."""
    seeds = itertools.count(seed * 2**10)
    if error is None:
        return lambda: CheckedIndex(*args, seed=next(seeds))
    return lambda: BoundedIndex(error, delta or 0.05, *args, seed=next(seeds))
