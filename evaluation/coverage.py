"""How often the error bars of error_bars.py hold on real texts, and how wide they are.

    python -m evaluation.coverage                       # promises kept: results/coverage*
    python -m evaluation.coverage others                # other ways to draw, at the same bytes
    python -m evaluation.coverage bounded               # bytes against the error promised
    python -m evaluation.coverage logits                # do bars predict the KL of the answer?
    python -m evaluation.coverage --model FILE.gguf --length 8000 --texts code --queries 96

Every head of every layer gets dense attention's queries (as in fidelity.probe), and the truth is
dense attention in float64. Each command adds its part to results/coverage.json.

    B batch   H kv heads   G query heads per kv head   D head dim   T steps   n tokens before them
    L layers  m draws      U cells (error_bars.Left)   J tokens that a step left out
"""
import argparse
import functools
import json
import math
import sys
from pathlib import Path

import torch

from bench.timing import write_json
from error_bars import (
    DRAWS,
    Bars,
    BoundedIndex,
    CheckedIndex,
    chances,
    margin,
    mean_values,
    normal,
    normalized,
    relative,
    terms,
    width,
)
from evaluation import kept, texts
from evaluation.fidelity import distances, feed, filled, follow, refuse_windows
from model import DEFAULT_NAME, load
from retroinfer import RetroConfig, log_possible_mass

RESULTS = Path(__file__).parent.parent / "results"
QUERIES = 384                       # of a text: times 30 layers of 9 heads, over 10^5 pairs
PROMISED = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.975, 0.99]


class Kept(CheckedIndex):
    """A checked index that keeps the Bars of its latest step. how: an entry of OTHERS."""

    def __init__(self, *args, how=None, **named):
        super().__init__(*args, **named)
        self.how = how

    def draw(self, q, left, o, m, number=0, is_asked=True):
        if not self.how:
            self.bars = super().draw(q, left, o, m, number, is_asked)
            return self.bars
        self.bars = self.how(self, q, left, o, m)
        return self.bars


def dense(past, step):
    """Dense attention's outputs (H, G, T, D) in float64."""
    k, v = (torch.cat([a, b], 2)[0].double() for a, b in zip(past[1:], step[1:3], strict=True))
    (H, n, D), T = k.shape, step[0].shape[2]
    q = step[0][0].view(H, -1, T, D).double() * D ** -0.5
    later = torch.ones(T, n, dtype=torch.bool).triu(n - T + 1)
    return (q @ k[:, None].mT).masked_fill(later, -math.inf).softmax(-1) @ v[:, None]


def steps(case, make, n_steps=None, every=1):
    """Yield (layer, step, cache, its output, dense attention's), both (1, H, G, D), float64.

    make(capacity, batch, seed=layer) is a cache."""
    for layer in range(0, len(case.past), every):
        past, step = case.past[layer], [x[:, :, :n_steps] for x in case.steps[layer]]
        truth = dense(past, step)
        cache = filled(functools.partial(make, seed=layer), *past, len(step[0][0, 0]))
        for t, o in enumerate(feed(cache, *step[:3])):
            yield layer, t, cache, o.view(1, *truth[:, :, t].shape).double(), truth[None, :, :, t]


def examine(case, make, n_steps=None, every=1):
    """{name: (layers, T, H*G)}: over the length of a step's output, its true error, that of the
    corrected output, and its widths and margins (one for each of PROMISED, in a last dimension)."""
    found = {}
    for layer, _, cache, o, truth in steps(case, make, n_steps, every):
        bars, length = cache.bars, o.norm(dim=-1)
        now = {"error": (o - truth).norm(dim=-1) / length,
               "rest": (o + bars.correction - truth).norm(dim=-1) / length,
               "width": torch.stack([relative(width(bars, normal(p)), o) for p in PROMISED], -1),
               "margin": torch.stack([relative(margin(bars, normal(p)), o) for p in PROMISED], -1)}
        for name, x in now.items():
            found.setdefault(name, {}).setdefault(layer, []).append(x.flatten(0, 2))
    return {name: torch.stack([torch.stack(x) for x in layers.values()])
            for name, layers in found.items()}


def quantiles(x):
    """Median, 90th and 99th percentile."""
    at = x.new_tensor([0.5, 0.9, 0.99])
    return [float(f"{n:.3g}") for n in x.flatten().sort().values[(at * (x.numel() - 1)).long()]]


def promises(model, case, args):
    return summary(examine(case, functools.partial(Kept, RetroConfig(), draws=args.draws)))


def summary(found):
    """What of examine's findings is reported."""
    holds = found["error"][..., None] <= found["width"]                     # (L, T, H*G, levels)
    heads = holds.double().mean(1).flatten(0, 1)                            # (L*H*G, levels)
    n_worst = max(len(heads) // 100, 1)
    worst = heads.sort(0).values[:n_worst].mean(0)
    mended = (found["rest"][..., None] <= found["margin"]).double().mean((0, 1, 2))
    result = {"pairs": found["error"].numel(), "error": quantiles(found["error"]),
              "corrected error": quantiles(found["rest"]), "levels": {}}
    for i, p in enumerate(PROMISED):
        result["levels"][str(p)] = {
            "reached": float(holds[..., i].double().mean()), "corrected reached": float(mended[i]),
            "worst 1% of heads": float(worst[i]), "width": quantiles(found["width"][..., i]),
            "layers": [round(x, 4) for x in holds[..., i].double().mean((1, 2)).tolist()]}
    return result


# ---------------------------------------------------------------- other ways to draw

def all_tokens(left):
    """(rows, cells) (B, H, J) of all tokens left, and which of them are tokens, for B = 1."""
    sizes = (left.sizes * (left.guess.amax(2) > -math.inf)).long()[0]       # (H, U)
    ends, place = sizes.cumsum(-1), torch.arange(int(sizes.sum(-1).max()))
    cell = torch.searchsorted(ends, place.expand(len(ends), -1).contiguous(), right=True)
    is_token, cell = place < ends[:, -1:], cell.clamp(max=sizes.shape[-1] - 1)
    rows = left.first[0].gather(-1, cell) + place - (ends - sizes).gather(-1, cell)
    return [x[None] for x in (rows * is_token, cell, is_token)]


def tried(weigh, pick, cache, q, left, o, m):
    """The Bars of m tokens that pick(share, m) draws; weigh gives each token its share."""
    rows, cell, is_token = all_tokens(left)
    share = normalized(weigh(cache, q, left, o, rows, cell) * is_token)     # (1, H, J)
    token, factor, kept = pick(share, m)
    drawn = rows.gather(-1, token), cell.gather(-1, token), factor
    delta, each = terms(left, drawn, q, cache.index, cache.store.tensors(), o)
    if kept is None:
        spread = (each - each.mean(-2, keepdim=True)) * (m / (m - 1)) ** 0.5
    else:
        spread = each * kept[:, :, None, :, None]
    return Bars(delta, delta.norm(dim=-1), spread.square().sum((-1, -2)).sqrt())


def ours(cache, q, left, o, rows, cell):
    return (chances(left) / left.sizes.clamp(min=1)).gather(-1, cell)


def by_estimate(cache, q, left, o, rows, cell):
    """By the masses that a step would count, not by those that a cluster may hold."""
    C = cache.index.sizes.shape[-1]
    lower = cache.method.log_count(q, cache.index) - log_possible_mass(q, cache.index)
    guess = torch.cat([left.guess[..., :C] + lower.nan_to_num(), left.guess[..., C:]], -1)
    return ours(cache, q, left._replace(guess=guess), o, rows, cell)


def by_values(cache, q, left, o, rows, cell):
    """By mass times the distance of the cluster's mean value from the output."""
    away = torch.cdist(o.float(), mean_values(cache.index, left.owner))     # (1, H, G, U)
    return ours(cache, q, left._replace(guess=left.guess + away.log()), o, rows, cell)


def alike(cache, q, left, o, rows, cell):
    return torch.ones_like(cell, dtype=torch.float64)


def best_possible(cache, q, left, o, rows, cell):
    """By what each token really adds, which nobody knows: no way to draw does much better."""
    drawn = rows, cell, (rows > 0).double()
    _, each = terms(left, drawn, q, cache.index, cache.store.tensors(), o)
    return normalized(each.norm(dim=-1)).sum(2)


def at(share, u):
    end = share.cumsum(-1)
    token = torch.searchsorted(end, (u * end[..., -1:]).contiguous(), right=True)
    token = token.clamp(max=share.shape[-1] - 1)
    chance = share.gather(-1, token)
    return token, torch.where(chance > 0, 1 / (u.shape[-1] * chance.clamp(min=1e-300)), 0), None


def stratified(share, m):
    u = torch.rand(*share.shape[:2], m, dtype=torch.float64)
    return at(share, (torch.arange(m) + u) / m)


def independent(share, m):
    return at(share, torch.rand(*share.shape[:2], m, dtype=torch.float64))


def systematic(share, m):
    share, order = share.sort(-1, descending=True)
    u = torch.rand(*share.shape[:2], 1, dtype=torch.float64)
    token, *rest = at(share, (torch.arange(m) + u) / m)
    return order.gather(-1, token), *rest


def priority(share, m):
    """The m largest of share / u. Each stands for the (m+1)-th, if it is smaller (Zharkov et al.,
    2026); its variance is that of Duffield, Lund and Thorup (J. ACM 54(6), 2007)."""
    most = share.shape[-1]
    best = (share / (1 - torch.rand(share.shape, dtype=torch.float64))).topk(min(m + 1, most))
    token, tau = best.indices[..., :m], best.values[..., -1:]
    chance = (share.gather(-1, token) / tau.clamp(min=1e-300)).clamp(max=1)
    return (token, torch.where(chance > 0, 1 / chance.clamp(min=1e-300), 0), (1 - chance).sqrt())


OTHERS = {"as shipped": None,
          **{f"{pick.__name__}, our chances": (ours, pick)
             for pick in (stratified, independent, systematic, priority)},
          "stratified, by estimated mass": (by_estimate, stratified),
          "stratified, with value norms": (by_values, stratified),
          "stratified, all tokens alike": (alike, stratified),
          "stratified, best possible chances": (best_possible, stratified)}


def others(model, case, args):
    """Each way to draw at the same bytes, on every third layer."""
    rows = {}
    for name, pair in OTHERS.items():
        torch.manual_seed(0)
        how = pair and functools.partial(tried, *pair)
        make = functools.partial(Kept, RetroConfig(), how=how, draws=args.draws)
        found = summary(examine(case, make, args.queries, 3))
        rows[name] = {"pairs": found["pairs"], **{p: {
            x: found["levels"][p][x] for x in ("reached", "worst 1% of heads", "width")}
            for p in ("0.95", "0.99")}}
        print(name, rows[name]["0.95"], file=sys.stderr)
    return rows


# ---------------------------------------------------------------- acting on it, and the logits

class Counted(BoundedIndex):
    """A bounded index that keeps the widths of its latest step."""

    def keep(self, widths):
        super().keep(widths)
        self.latest = widths


def bounded(model, case, args):
    """What --max-err promises, reaches and reads, on every third layer. delta is 0.05."""
    rows = {}
    for error in (0.02, 0.05, 0.1, 0.2):
        make = functools.partial(Counted, error, 0.05, RetroConfig())
        errors, widths, caches = [], [], {}
        for layer, _, cache, o, truth in steps(case, make, args.queries, 3):
            errors.append(((o - truth).norm(dim=-1) / truth.norm(dim=-1)).flatten())
            widths.append(cache.latest.flatten())
            caches[layer] = cache
        e, w = torch.stack(errors), torch.stack(widths)
        is_met, draws = w <= error, sum(float(x.counts[2]) for x in caches.values())
        n = sum(float(x.counts[0]) for x in caches.values()) / cache.widths.shape[2]
        rows[str(error)] = {
            "pairs": e.numel(), "met": float(is_met.double().mean()),
            "met and true": float((e <= error)[is_met].double().mean()),
            "error": quantiles(e), "draws": draws / n,
            "share of K and V": draws / n / len(case.ids)}
        print(error, rows[str(error)], file=sys.stderr)
    return rows


def logits(model, case, args):
    """How well bars order the steps by their KL to dense attention: rank correlations of the KL
    with the sum over layers of the mean squared error, true to the bars and as the bars have it."""
    T, caches = case.T, []

    def attend(layer, past, q, k, v):
        make = functools.partial(Kept, RetroConfig(), seed=layer)
        caches.append(filled(make, *past, T))
        outputs, squares = [], []
        for o in feed(caches[-1], q, k, v):
            outputs.append(o)
            squares.append(caches[-1].bars.deviation.square().sum((1, 2))
                           / o.double().square().sum((1, 2, 3)))
        found.append(torch.stack(squares)[:, 0])
        return torch.cat(outputs, 2)

    found = []
    attends = [functools.partial(attend, i, past) for i, past in enumerate(case.past)]
    hidden = follow(model, case.ids[case.n:-1], case.n, attends)
    logp = model.logits(hidden).double().log_softmax(-1)
    kl = torch.tensor(distances(model, case.hidden, hidden, case.ids[case.n + 1:])["kl"])
    bars = torch.stack(found, 1).double()                                   # (T, L)
    entropy = -(logp.exp() * logp).sum(-1)
    return {"steps": T, "bars": ranks_agree(bars.sum(1), kl),
            "entropy of the answer": ranks_agree(entropy, kl),
            "entropy times bars": ranks_agree(entropy * bars.sum(1), kl),
            "layers": [round(ranks_agree(x, kl), 3) for x in bars.T]}


def ranks_agree(x, y):
    """Spearman's rank correlation."""
    both = torch.stack([x, y]).double().argsort(-1).argsort(-1).double()
    return float(torch.corrcoef(both)[0, 1])


PARTS = {part.__name__: part for part in (promises, others, bounded, logits)}


def plot(results, path):
    """Promised against reached: all pairs, and the 1 % of heads whose bars hold least often."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.8), sharey=True, layout="constrained")
    for axis, name in zip(axes, ("reached", "worst 1% of heads"), strict=True):
        axis.plot([0.5, 1], [0.5, 1], color="#d0d0d0")
        for (kind, found), style in zip(results.items(), ("-", "--", ":", "-."), strict=False):
            x = [float(p) for p in found["levels"]]
            axis.plot(x, [level[name] for level in found["levels"].values()], style,
                      color="#1a1a1a", label=kind, marker=".")
        axis.set(title={"reached": "all heads"}.get(name, "the worst 1 % of heads"),
                 xlabel="promised")
    axes[0].set_ylabel("bars that hold")
    axes[0].legend(frameon=False)
    figure.suptitle("Error bars are cautious, but for a few heads")
    figure.savefig(path, dpi=90)


def cases(model, tokenizer, args):
    for kind in args.texts:
        ids = tokenizer.encode(texts.KINDS[kind]("final")[:16 * args.length])
        ids = torch.tensor(ids[:args.length + args.queries + 1])
        yield kind, *kept.cases(model, tokenizer, ids, [len(ids)], args.queries, args.keep)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(prog="python -m evaluation.coverage",
                                     description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("part", nargs="?", default="promises", choices=PARTS)
    add("--model", default=DEFAULT_NAME)
    add("--length", type=int, default=4096, help="tokens before the steps")
    add("--texts", nargs="+", default=list(texts.FOUR), choices=texts.KINDS)
    add("--queries", type=int, default=QUERIES, help="steps of each text")
    add("--keep", metavar="DIR", help="keep there what dense attention makes of a text")
    add("--draws", type=int, default=DRAWS, help="of a kv head in a step")
    args = parser.parse_args()
    model, tokenizer = load(args.model, dtype=torch.float32, device="cpu")
    refuse_windows(model)
    shown = Path(args.model).name.removesuffix(".gguf")
    name = f"{args.part}, {shown}, {args.length} tokens, {args.draws} draws"
    path = RESULTS / "coverage.json"
    results = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for kind, case in cases(model, tokenizer, args):
        found = PARTS[args.part](model, case, args)
        results.setdefault(name, {})[kind] = found
        write_json(path, results)
        print(f"{name}, {kind}: {found.get('pairs', '')}", file=sys.stderr)
    if args.part == "promises":
        plot(results[name], RESULTS / f"coverage-{shown}.png")


if __name__ == "__main__":
    main()
