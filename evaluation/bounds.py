"""What is certain about a step: bounds from statistics of the clusters that it did not read.

A cluster has n tokens with keys k_j and values v_j, which weigh w_j = exp(q·k_j) to a query q,
scaled: its mass is M, the sum of w_j. Known are its stored centroid c and mean value m, and:

    r   radius: the largest |k_j - mean of k|                   e   |mean of k - c|: c is rounded
    t   p / r^2, p at least the keys' variance along any unit vector
    R   the largest |v_j - m|     p'  as p, of values           e'  |mean of v - m|

1. Mass. Let x_j = q·(k_j - mean of k): their mean is 0, |x_j| <= b = |q| r, their mean square is
   at most t b^2. By Jensen's inequality, and by Bennett's lemma, mean exp(x) <= S(b), where
   S(b) = (exp(-tb) + t exp(b)) / (1 + t),

       n exp(q·c - |q| e)  <=  M  <=  n exp(q·c + |q| e) S(b).

   Bennett: the parabola that meets exp at b and touches it at -tb lies above it on x <= b, and of
   mean 0 and mean square t b^2 it averages S(b); S grows with t.

2. Output. Let o be dense attention's output, Z its denominator, a the step's output, E a cluster's
   weight in it, 0 if dropped. Exact tokens weigh the same in both. As a is a mean with its weights,
   the sum of weight (v - a) is 0, which taken from that of dense attention's leaves

       o - a = sum over clusters not read of ((M - E) (m - a) + sum_j w_j (v_j - m)) / Z.

   |sum_j w_j (v_j - m)| <= M R. It is also at most n exp(q·c + |q| e) sqrt((S(2b) - 1) p') + M e':
   the deviations of w from its mean meet those of v (Cauchy-Schwarz), and mean exp(2x) <= S(2b).
   So |o - a| <= the largest of sum g(M) / (Z_read + sum M), each M within its interval and g
   convex: for a given ratio u every M is best at an end of its interval, and u is improved a few
   times (Dinkelbach); what is left of sum (g(M) - u M) - u Z_read, over the least Z, is added.
   In a cluster that is read, tokens whose values are not read have their exact weights, L in all,
   but m for a value. That adds at most L R to |Z (o - a)|: a constant beside the sum of g.

What fp32 loses in q·k (D terms of up to |q| |k| each) is added to both bounds.

The bounds are true, and on real text they are vacuous: docs/bounds.md has the figures.

    python -m evaluation.bounds     # a million of them against float64: results/certificate.json

    B batch   H kv heads   G query heads per kv head   D head dim   C clusters   P tokens in one

Does not include: the buffer of offloaded keys, Triton kernels. The statistics take 32 bytes for
each cluster. To check a step costs more time than the step.
"""
import math
from dataclasses import asdict
from typing import NamedTuple

import torch
import torch.nn.functional as F

from generate import fill, fit
from retroinfer import (
    PLAIN,
    Index,
    RetroConfig,
    WaveIndex,
    before,
    few,
    gather_clusters,
    owners,
    rank_clusters,
    scores,
    take,
    tripartite_attention,
    unpack,
)

CHUNK = 512         # clusters measured at a time
ROUNDING = 2.0 ** -24       # what each of D terms of a product in fp32 may lose, relative
ARITHMETIC = 1e-5           # what exponentials and sums in fp32 may lose, relative
TURNS = 4                   # improvements of the ratio


class Bounds(NamedTuple):
    """Statistics of C clusters, rounded up. The letters are those of the module's docstring."""
    radii: torch.Tensor         # (B, H, C) r
    ratios: torch.Tensor        # (B, H, C) t
    slacks: torch.Tensor        # (B, H, C) e
    value_radii: torch.Tensor   # (B, H, C) R
    value_spreads: torch.Tensor     # (B, H, C) square root of p'
    value_slacks: torch.Tensor  # (B, H, C) e'
    key_norms: torch.Tensor     # (B, H, C) no key and not c is longer
    value_norms: torch.Tensor   # (B, H, C) the longest member value


class Certificate(NamedTuple):
    """What is certain about a step, and of which clusters it read the keys."""
    low: torch.Tensor           # (B, H, G) at least this share of the attention mass is read
    high: torch.Tensor          # (B, H, G) at most
    error: torch.Tensor         # (B, H, G) |output - dense attention's| at most
    is_read: torch.Tensor       # (B, H, 1, C) clusters


# ---------------------------------------------------------------- statistics of clusters

def measure(index, stores):
    """The Bounds of the clusters of an index, whose members lie in stores k, v (B, H, T, D)."""
    P = max(int(index.sizes.max()), 1)
    place = torch.arange(P, device=index.sizes.device)
    parts = []
    for chunk in (Index(*x) for x in zip(*(x.split(CHUNK, 2) for x in index), strict=True)):
        is_member = (place < chunk.sizes[..., None])[..., None]             # (B, H, c, P, 1)
        rows = (chunk.offsets[..., None] + place) * is_member[..., 0]       # (B, H, c, P)
        k, v = (take(x, rows.flatten(2)).view(*rows.shape, -1).double() * is_member
                for x in stores)
        c, m = map(stored, chunk[:2], chunk.scales.unbind(-1))
        k_radii, k_spreads, slacks = deviations(k, is_member, c.double())
        _, v_spreads, v_slacks = deviations(v, is_member, m.double())
        far = ((v - m[..., None, :].double()) * is_member).norm(dim=-1).amax(-1)
        ratios = torch.where(k_radii > 0, (k_spreads / k_radii).square(), 1).clamp(max=1)
        key_norms, value_norms = (x.norm(dim=-1).amax(-1) for x in (k, v))
        parts.append((k_radii, ratios, slacks, far, v_spreads, v_slacks, key_norms + slacks,
                      value_norms))
    return Bounds(*(round_up(torch.cat(x, 2)) for x in zip(*parts, strict=True)))


def stored(x, scales):
    """Centroids or means (B, H, C, D) of an index in fp32, which holds them without rounding."""
    return (torch.cat(unpack(x), -1) if x.dtype == torch.uint8 else x.float()) * scales[..., None]


def deviations(x, is_member, mean):
    """(radii, spreads, slacks), (B, H, C) each, of members x (B, H, C, P, D) that are 0 elsewhere.

    A radius is the largest distance from the members' own mean. A spread is the root of a bound on
    their variance along any unit vector. A slack is the distance of their mean from the stored one.
    """
    n = is_member.sum(3).clamp(min=1)                                       # (B, H, C, 1)
    own = x.sum(3) / n                                                      # (B, H, C, D)
    x = (x - own[..., None, :]) * is_member
    total = x.square().sum((3, 4))                                          # (B, H, C)
    scale = total.clamp(min=torch.finfo(total.dtype).tiny)[..., None, None]
    gram = x @ x.mT / scale                 # trace 1; its largest eigenvalue is at most the fourth
    power = gram @ gram                     # root of the norm of its fourth power
    top = (power @ power).norm(dim=(-1, -2)).pow(0.25)
    spread = (total / n[..., 0] * top.clamp(max=1)).sqrt()
    return x.norm(dim=-1).amax(-1), spread, (own - mean).norm(dim=-1)


def round_up(x):
    """x >= 0 in fp32, rounded up."""
    return (x * (1 + 2.0 ** -22)).float()


# ---------------------------------------------------------------- what is certain of a step

class Step(NamedTuple):
    """A step's arguments, and what is certain before any member is read."""
    q: torch.Tensor             # (B, H, G, D), scaled
    steady: tuple               # k, v, bias as tripartite_attention takes them
    index: Index
    bounds: Bounds
    x_steady: torch.Tensor      # (B, H, G, W) logits of the steady zone
    exact: torch.Tensor         # (B, H, G, 1) log mass of the steady zone
    low: torch.Tensor           # (B, H, G, C) the least log mass of each cluster
    high: torch.Tensor          # (B, H, G, C) the largest
    rounding: torch.Tensor      # (B, H, G, 1) what fp32 may add to a logit


def look(q, steady, index, bounds):
    """The Step of q (B, H, G, D), which is not scaled yet."""
    q = q.float() * q.shape[-1] ** -0.5
    length = q.double().norm(dim=-1, keepdim=True)                          # (B, H, G, 1)
    longest = torch.maximum(steady[0].float().norm(dim=-1).amax(-1),
                            bounds.key_norms.amax(-1))                      # (B, H)
    rounding = length * longest[..., None, None] * (q.shape[-1] * ROUNDING) + ARITHMETIC
    center = scores(q, stored(index.centroids, index.scales[..., 0]))       # (B, H, G, C)
    center = (center + index.sizes.log()[:, :, None]).double()
    slack = length * bounds.slacks[:, :, None] + rounding
    spread = log_spread(length * bounds.radii[:, :, None], bounds.ratios[:, :, None])
    x_steady = scores(q, steady[0]) + steady[2]
    exact = x_steady.double().logsumexp(-1, keepdim=True)
    return Step(q, steady, index, bounds, x_steady, exact, center - slack, center + slack + spread,
                rounding)


def log_spread(b, t):
    """Logarithm of the largest mean of exp(x): x <= b, of mean 0 and mean square at most t b^2."""
    return torch.logaddexp(-t * b, t.log() + b) - torch.log1p(t)


def certified_attention(q, step, stores, budget, method):
    """tripartite_attention over clusters in stores k, v (B, H, T, D), and its Certificate."""
    fetched = []

    def fetch(ids, ends):
        k, v, bias = gather_clusters(step.index, stores, fill(ends, budget), ids, ends)
        fetched.extend((ids, ends, k, v, bias))
        return fetched[2:]

    o = tripartite_attention(q, step.steady, step.index, budget, fetch, method)
    ids, ends, k, _, bias = fetched
    x = (scores(step.q, k) + bias).double()                                 # (B, H, G, N)
    exact = torch.logaddexp(step.exact, x.logsumexp(-1, keepdim=True))
    is_read = torch.zeros_like(step.index.sizes, dtype=torch.bool).scatter(
        -1, ids, ends > before(ends))[:, :, None]                           # (B, H, 1, C)
    left = step._replace(exact=exact, low=step.low.masked_fill(is_read, -math.inf),
                         high=step.high.masked_fill(is_read, -math.inf))
    estimated = estimates(step, budget, method).masked_fill(is_read, -math.inf)
    far = step.bounds.value_radii.gather(-1, ids).gather(-1, owners(ends, k.shape[2]))
    lost = lose_values(left, estimated, x, far, few(budget, ends[..., -1:]))
    low, high = (torch.sigmoid(exact + sign * 2 * step.rounding - x.logsumexp(-1, keepdim=True))
                 for sign, x in ((-1, left.high), (1, left.low)))
    return o, Certificate(low[..., 0], high[..., 0], bound_error(left, estimated, lost, o), is_read)


def estimates(step, budget, method):
    """Log mass (B, H, G, C) of each cluster if it is estimated, -inf if it is dropped."""
    logits = method.centroid_logits(step.q, step.index, method)                 # (B, H, G, C)
    order = rank_clusters(step.q, logits, step.x_steady, step.index, budget.K, method)
    place = torch.arange(budget.K, device=order.device)
    is_near = place < budget.ranked[..., None]                       # (B, H, R+E)
    is_ranked = torch.zeros_like(step.index.sizes, dtype=torch.bool).scatter(
        -1, order, is_near.expand_as(order))
    masses = logits + method.log_count(step.q, step.index)
    return masses.double().masked_fill(~is_ranked[:, :, None], -math.inf)


def lose_values(left, estimated, x, far, n_values):
    """Log of the sum of L R (B, H, G, 1), of tokens with logits x (B, H, G, N) and R far (B, H, N).
    The values of n_values (B, H, 1) tokens are read.
    A value is surely read if its token outweighs the first token whose value is not read, by more
    than fp32 may change their weights, here and in the step: four roundings each. The other values
    count as lost."""
    total = left.exact.logaddexp(estimated.logsumexp(-1, keepdim=True))     # (B, H, G, 1)
    weights = F.pad((x - total).exp().sum(2, keepdim=True), (0, 1))         # (B, H, 1, N+1)
    n = n_values[:, :, None]                                                # (B, H, 1, 1)
    first = weights.sort(descending=True).values.gather(-1, n).clamp(min=1e-30)     # fp32: 0
    margin = (8 * left.rounding.amax(2, keepdim=True)).clamp(max=50).exp()  # (B, H, 1, 1)
    is_read = weights[..., :-1] > first * margin
    lost = (x + far.double().log()[:, :, None]).masked_fill(is_read, -math.inf)
    return lost.logsumexp(-1, keepdim=True) + (3 * left.rounding).clamp(max=50)


def bound_error(left, estimated, lost, o):
    """A bound (B, H, G) on |o - dense attention's output|. left: not read; lost: log of L R."""
    peak = torch.maximum(torch.cat([left.high, estimated], -1).amax(-1, keepdim=True), left.exact)
    exact, low, high, guess, lost = ((x - peak).exp() for x in (
        left.exact - left.rounding, left.low, left.high, estimated, lost))
    away = torch.cdist(o.float(), stored(left.index.means, left.index.scales[..., 1]),
                       compute_mode="donot_use_mm_for_euclid_dist").double()    # (B, H, G, C)
    slope, fixed = value_terms(left, peak, high)
    fixed[..., :1] += lost                  # a constant of the sum: it may be added to any cluster
    ends = [(x, (x - guess).abs() * away + slope * x + fixed) for x in (low, high)]
    tiny, ratio = 1e-200, torch.zeros_like(exact)           # of the peak
    for _ in range(TURNS):
        gains = [g - ratio * x for x, g in ends]
        mass, gain = (torch.where(gains[1] > gains[0], *two[::-1])
                      for two in zip(*ends, strict=True))
        ratio = gain.sum(-1, keepdim=True) / (exact + mass.sum(-1, keepdim=True) + tiny)
    rest = torch.maximum(*(g - ratio * x for x, g in ends)).sum(-1, keepdim=True) - ratio * exact
    longest = torch.maximum(left.steady[1].float().norm(dim=-1).amax(-1),
                            left.bounds.value_norms.amax(-1))[..., None, None]
    span = longest + o.double().norm(dim=-1, keepdim=True)  # dense attention is no farther from o
    wrong = torch.expm1((2 * left.rounding).clamp(max=50)) + torch.finfo(o.dtype).eps
    least, guess = exact + low.sum(-1, keepdim=True), guess.sum(-1, keepdim=True)
    bound = ratio + span * wrong + (rest.clamp(min=0) + span * wrong * guess) / least
    return torch.where(least > tiny, bound.minimum(span), span)[..., 0]


def value_terms(left, peak, high):
    """s and f (B, H, G, C) of a bound s M + f on |sum w (v - m)|, the smaller of two at high M."""
    b = left.bounds
    length = left.q.double().norm(dim=-1, keepdim=True)
    once, twice = (log_spread(n * length * b.radii[:, :, None], b.ratios[:, :, None])
                   for n in (1, 2))
    twice = twice.clamp(min=0)
    root = (twice + (-torch.expm1(-twice)).log()) / 2                       # of exp(twice) - 1
    fixed = (left.high - once - peak + root).exp() * b.value_spreads[:, :, None]
    far, near = b.value_radii[:, :, None], b.value_slacks[:, :, None]
    is_fixed = fixed + near * high < far * high
    return torch.where(is_fixed, near, far), torch.where(is_fixed, fixed, 0)


# ---------------------------------------------------------------- a cache that checks its steps

class CheckedIndex(WaveIndex):
    """A wave index that keeps the latest step: arguments, output and Certificate."""

    def __init__(self, config, capacity, batch=1):
        super().__init__(config, capacity, batch, PLAIN._replace(attend=self.certify))
        self.measured = None

    def allocate_index(self, like):
        super().allocate_index(like)
        self.bounds = Bounds(*(torch.zeros_like(self.index.sizes) for _ in Bounds._fields))

    def update(self):
        room = super().update()
        if self.n_clusters.tolist() != self.measured:       # no cluster ever changes: some are new
            self.measured = self.n_clusters.tolist()
            stores = self.store.k, self.store.v
            for old, new in zip(self.bounds, measure(self.index, stores), strict=True):
                old.copy_(new)
        return room

    def certify(self, q, steady, index, stores, budget, method):
        """tripartite_attention, certified. Each of the B*H heads becomes a sequence of its own."""
        B, H, G, D = q.shape
        q, k, v, bias, *stores = (x.flatten(0, 1)[:, None] for x in (q, *steady, *stores))
        index, bounds = (type(x)(*(y.flatten(0, 1)[:, None] for y in x))
                         for x in (index, self.bounds))
        step = look(q, (k, v, bias), index, bounds)
        each = {name: getattr(budget, name).expand(B, H).reshape(-1, 1)
                for name in ("retrieve", "ranked")}
        budget = fit(budget._replace(**each))
        o, certificate = certified_attention(q, step, stores, budget, method)
        self.kept = step, o, certificate
        return o.view(B, H, G, D)


# ---------------------------------------------------------------- a million pairs of head and query

def copy_row(many, one):
    """Fill each sequence of `many` with the text of `one`: a step then takes many queries."""
    many.allocate(one.store.k)
    for row in range(len(many.is_in_store)):
        many.restore(one.state(0), row=row)
    many.update()


def truth(cache, q):
    """In float64: log masses (B, H, G, C) of the clusters, which all sequences share, and of the
    steady zone (B, H, G, 1), and dense attention's output (B, H, G, D) to q (B, H*G, 1, D)."""
    start, n, live = cache.config.sink, int(cache.n_indexed[0]), cache.n_tokens - cache.n_indexed
    k, v = (x[0, :, start:start + n].double() for x in (cache.store.k, cache.store.v))
    k_s, v_s = (x[:, :, :live[0]].double() for x in (cache.k_steady, cache.v_steady))
    (B, H, C), D = cache.index.sizes.shape, q.shape[-1]
    q = q.view(B, H, -1, D).double() * D ** -0.5
    x = torch.cat([shared(q, k.mT), q @ k_s.mT], -1)                        # (B, H, G, n + live)
    peak = x.amax(-1, keepdim=True)
    w, s = (x - peak).exp().split([n, x.shape[-1] - n], -1)
    which = torch.stack([torch.repeat_interleave(torch.arange(C), sizes.long())
                         for sizes in cache.index.sizes[0]])                # (H, n)
    masses = w.new_zeros(*w.shape[:3], C).scatter_add_(-1, which[:, None].expand_as(w), w)
    steady = s.sum(-1, keepdim=True)
    o = (shared(w, v) + s @ v_s) / (w.sum(-1, keepdim=True) + steady)
    return masses.log() + peak, steady.log() + peak, o


def shared(x, y):
    """Products (B, H, G, M) of x (B, H, G, N) and y (H, N, M), which are the same for all B."""
    B, H, G, _ = x.shape
    return (x.transpose(0, 1).flatten(1, 2) @ y).view(H, B, G, -1).transpose(0, 1)


def examine(cache, q, o):
    """{name: (B*H*G,)}: what is true and certain of each head and query of the latest step."""
    step, _, found = cache.kept
    masses, steady, dense = truth(cache, q)
    low, high, is_read = (x.view(*cache.index.sizes.shape[:2], -1, masses.shape[-1])
                          for x in (step.low, step.high, found.is_read))
    exact = torch.cat([masses.masked_fill(~is_read, -math.inf), steady], -1).logsumexp(-1)
    unread = torch.sigmoid(masses.masked_fill(is_read, -math.inf).logsumexp(-1) - exact)
    o = o.view_as(dense).double()
    length, error = o.norm(dim=-1), (o - dense).norm(dim=-1)
    least, most, bound = (x.view_as(error) for x in (1 - found.high, 1 - found.low, found.error))
    violated = ((low > masses).any(-1) | (high < masses).any(-1) | (least > unread + 1e-12)
                | (most < unread - 1e-12) | (bound < error))
    return {name: x.flatten() for name, x in {
        "unread": unread, "unread_least": least, "unread_most": most, "error": error / length,
        "error_bound": bound / length, "times": bound / error, "violated": violated}.items()}


def examine_layers(config, case, n_steps, batch=32):
    """{name: (pairs,)}: what examine finds for n_steps queries of every layer behind one text."""
    parts = []
    for past, (q, k1, v1, _) in zip(case.past, case.steps, strict=True):
        one, many = (CheckedIndex(config, past[1].shape[2] + 1, n) for n in (1, batch))
        one.prefill(*past)
        copy_row(many, one)
        for t in range(0, n_steps // batch * batch, batch):
            now = [x[0, :, t:t + batch].transpose(0, 1)[:, :, None].contiguous()
                   for x in (q, k1, v1)]
            parts.append(examine(many, now[0], many.decode(*now)))
            many.n_tokens.sub_(1)
    return {name: torch.cat([x[name] for x in parts]) for name in parts[0]}


def tightness(found):
    """How many pairs, how many violated, what share is vacuous, and quantiles of the numbers."""
    at = [0.01, 0.1, 0.5, 0.9, 0.99]
    numbers = {name: dict(zip(map(str, at), x.quantile(x.new_tensor(at)).tolist(), strict=True))
               for name, x in found.items() if name != "violated"}
    return {"pairs": len(found["violated"]), "violated": int(found["violated"].sum()),
            "vacuous": float((found["error_bound"] >= 1).double().mean()), "quantiles": numbers}


QUERIES = 928               # a text: times 30 layers of 9 heads and four texts, over a million
RUNS = {                    # config, texts of texts.py, tokens of each that are read, queries
    "default": (RetroConfig(), ("documents", "code", "table", "prose"), 1024, QUERIES),
    "4,096 tokens": (RetroConfig(), ("prose",), 4096, 32),
    "bits 16": (RetroConfig(bits=16), ("prose",), 1024, 32),
    **{f"cluster {n}": (RetroConfig(bits=16, cluster=n, min_retrieve=256 // n), ("prose",),
                        1024, 32)
       for n in (4, 2, 1)}}


@torch.no_grad()
def main():
    """Examine every layer and head of the default model in each of RUNS. Saves after each text."""
    import sys
    from pathlib import Path

    from bench.timing import write_json
    from evaluation import texts
    from evaluation.fidelity import read
    from model import DEFAULT_NAME, load
    model, tokenizer = load(dtype=torch.float32, device="cpu")
    out = Path(__file__).parent.parent / "results" / "certificate.json"
    results = {"command": "python -m evaluation.bounds", "versions": {
        "python": sys.version.split()[0], "torch": torch.__version__},
        "model": DEFAULT_NAME, "seed": "none: nothing is drawn", "runs": []}
    for kind, n_tokens in {(kind, n): 0 for _, kinds, n, _ in RUNS.values() for kind in kinds}:
        ids = tokenizer.encode(texts.KINDS[kind]("final")[:60000])[:n_tokens + QUERIES + 1]
        case = read(model, torch.tensor(ids), QUERIES)
        for name, (config, kinds, n, n_queries) in RUNS.items():
            if kind not in kinds or n != n_tokens:
                continue
            found = tightness(examine_layers(config, case, n_queries))
            results["runs"].append({"run": name, "text": kind, "tokens": n_tokens,
                                    "config": asdict(config), **found})
            write_json(out, results)
            print(f"{name}, {kind}: {found['pairs']:,} pairs, {found['violated']} violated",
                  file=sys.stderr)


if __name__ == "__main__":
    main()
