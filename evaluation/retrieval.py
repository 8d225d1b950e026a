"""How many keys must be read to find the best 100, and what the other keys would have said.

    python -m evaluation.retrieval              # all sections: an hour on one core
    python -m evaluation.retrieval scan --text code --length 7000
    python -m evaluation.retrieval tail --steps 32
    python -m evaluation.retrieval synthetic --keys 8192 32768 131072

    scan        real queries and keys of every layer and kv head: how far queries are from keys, and
                the share of vectors to compare for a recall of 95 % of the best 100, by index
    tail        what attention to the best keys alone loses, and what a sample of the same size does
    synthetic   keys and queries in two cones: time to build a graph, and how its search grows

A vector that is compared is a key, or the centroid of a list. HNSW needs faiss-cpu; without it, its
cells stay empty. Seconds are those of the processor, so other programs disturb them little.

    N keys   Q queries   D head dim   H kv heads   G query heads per kv head   T steps

Does not include: a GPU, RobustVamana, more than one text a run.
"""
import copy
import functools
import importlib.util
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from app.command import Parser, run_command
from bench.timing import positive, table, where, write_json
from evaluation import fidelity, kept, texts
from generate import COMPILE
from model import DEFAULT_NAME, load
from retrieval_attention import (
    INDEXES,
    GraphCache,
    GraphConfig,
    Index,
    best_keys,
    build,
    build_graph,
    coarse_lists,
    project,
    search,
)
from retroinfer import InputError, RetroConfig, WaveIndex, attend_causally, spherical_kmeans

TOP, WANTED = 100, 0.95         # the best keys, and the share of them that must be found
OUT = Path(__file__).parent.parent / "results" / "retrieval.json"
WALKS = [(8, 4, 1), (8, 8, 1), (16, 8, 1), (16, 16, 1), (32, 16, 1), (64, 16, 1),
         (16, 8, 4), (32, 16, 4), (32, 16, 8)]              # width, hops, lists of lost keys
STEPS = [(16, 8, 256), (32, 4, 256), (32, 6, 256), (32, 9, 320), (32, 12, 512),
         (32, 16, 512), (32, 24, 512)]                      # and beam
LISTS = [(c, p, v) for c in (64, 128, 512) for p, v in (
    (200, 1), (200, 2), (200, 4), (400, 4), (400, 8), (800, 8))]                # qcivf
RARE = 12                       # scan: the first head of so many layers has the slow comparisons


# ---------------------------------------------------------------- real queries and keys

def read(args, tokenizer):
    """The text's Case, of which only the first --asked steps are left, with the latest queries:
    those that build an index."""
    fidelity.refuse_windows(args.model)
    ids = texts.ids(tokenizer, args.text, "final", args.length)
    case, = kept.cases(args.model, tokenizer, ids, [len(ids)], args.steps, args.keep)
    T = min(args.asked or args.steps, args.steps)
    steps = [tuple(x[:, :, :T] for x in step) for step in case.steps]
    case = replace(case, ids=ids[:case.n + T + 1], steps=steps, hidden=case.hidden[:T])
    return with_queries(args.model, case, args.train)


def with_queries(model, case, n):
    """The Case with each layer's latest n queries (1, H*G, n, D), in place of their energy."""
    start, past = max(case.n - n, 0), []

    def attend(k, v, q, *_):
        past.append((q, k, v))
        return attend_causally(q, k, v)
    fidelity.follow(model, case.ids[start:case.n], start,
                    [functools.partial(attend, k, v) for _, k, v in case.past])
    return replace(case, past=past)


def mahalanobis(x, k):
    """Mean Mahalanobis distance of vectors x (Q, D) to the distribution of keys k (N, D)."""
    away, spread = (x - k.mean(0)).double(), torch.cov(k.double().T)
    return (away @ torch.linalg.pinv(spread) * away).sum(-1).clamp(min=0).sqrt().mean().item()


# ---------------------------------------------------------------- how much to read

class Head:
    """A kv head: its indexed keys, queries that train an index, and queries to test it with."""

    def __init__(self, k, train, asked):
        self.k, self.train, self.asked = k, train, asked        # (N, D), (Q, D), (Q', D)
        self.truth = (asked @ k.mT).topk(TOP).indices           # (Q', 100)

    def as_control(self, held_out):
        """The same keys, asked for with keys (Q', D) that are not among them."""
        return Head(self.k, self.train, held_out)

    def recall(self, rows, scores):
        """Of what a search found, (Q', K)."""
        hit = torch.zeros(len(rows), len(self.k), dtype=torch.bool)
        hit.scatter_(-1, rows, scores > -math.inf)
        return hit.gather(-1, self.truth).float().mean().item()


def heads_of(case, config, every=1):
    """Yield (layer, head, Head, held-out keys (Q', D), query heads G) of every so many layers."""
    for layer in range(0, len(case.past), every):
        (q, k, _), (asked, *_), D = case.past[layer], case.steps[layer], case.past[0][1].shape[3]
        for h in range(k.shape[1]):
            mine, now = (x[0].unflatten(0, (k.shape[1], -1))[h] * D ** -0.5 for x in (q, asked))
            train = mine[:, -config.train:].transpose(0, 1)     # (T, G, D)
            keys = k[0, h, config.sink:case.n - config.local]
            held_out = k[0, h, case.n - config.local:][:now.shape[1] * now.shape[0]]
            yield layer, h, Head(keys, train.flatten(0, 1), now.flatten(0, 1)), held_out, len(mine)


def needed(curve):
    """The share at which a curve of (share, recall) reaches the recall wanted; None if never."""
    before = (0.0, 0.0)
    for share, recall in sorted(curve):
        if recall >= WANTED:
            part = (WANTED - before[1]) / max(recall - before[1], 1e-9)
            return before[0] + part * (share - before[0])
        before = (share, recall) if recall > before[1] else before
    return None


def plain_index(part):
    """An Index of one head as a batch of one."""
    return Index(*(x[None, None] for x in part))


def empty_links(head, config):
    M = config.degree if config.index == "graph" else 0
    return torch.full((len(head.k), M), -1, dtype=torch.int32)


def built(head, config):
    """The Index of a Head."""
    nothing = torch.zeros(len(head.k))
    return plain_index(build(head.train, head.k, nothing, empty_links(head, config), config))


def point(head, index, config):
    """(share of vectors compared, recall) of a search."""
    found = search(head.asked[None, None], head.k[None, None], index, config)
    n = (found.seen[..., :-1] >= 0).sum(-1).float().mean() + (index.lists[..., 0] >= 0).sum()
    return n.item() / len(head.k), head.recall(found.rows[0, 0], found.scores[0, 0])


def graph_curve(head, config, index=None):
    index = index or built(head, config)
    return [point(head, index, replace(config, width=w, hops=h, fallback=f)) for w, h, f in WALKS]


def qcivf_curve(head, config):
    return [point(head, built(head, c), c) for c in (
        replace(config, index="qcivf", centroids=n, listed=listed, visits=v)
        for n, listed, v in LISTS)]


def ivf_curve(head, config):
    """Lists of k-means, best first, for every number of lists visited."""
    C = max(int(len(head.k) ** 0.5), 1)
    centred = head.k - head.k.mean(0)
    ids = spherical_kmeans(centred[None, None], C, 10)[0, 0]
    sizes = ids.bincount(minlength=C)
    sums = torch.zeros(C, head.k.shape[1]).index_add_(0, ids, head.k)
    scores = (head.asked @ (sums / sizes.clamp(min=1)[:, None]).mT)
    order = scores.masked_fill(sizes == 0, -math.inf).argsort(-1, descending=True)
    rank = order.argsort(-1)                                    # (Q', C)
    visit = rank.gather(-1, ids[head.truth])                    # (Q', 100)
    shares = (sizes[order].cumsum(-1).float().mean(0) + C) / len(head.k)
    return [(shares[p].item(), (visit <= p).float().mean().item()) for p in range(C)]


def hnsw_curve(head, config):
    if importlib.util.find_spec("faiss") is None:
        return []
    import faiss
    faiss.omp_set_num_threads(1)
    index = faiss.IndexHNSWFlat(head.k.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 100
    index.add(head.k.contiguous().numpy())
    curve = []
    for ef in (100, 200, 400, 800, 1600):
        index.hnsw.efSearch = ef
        faiss.cvar.hnsw_stats.reset()
        _, rows = index.search(head.asked.contiguous().numpy(), TOP)
        share = faiss.cvar.hnsw_stats.ndis / len(rows) / len(head.k)
        rows = torch.from_numpy(rows)
        curve.append((share, head.recall(rows.clamp(min=0), (1.0 + rows).log())))     # -1: none
    return curve


CURVES = {"ivf": ivf_curve, "hnsw": hnsw_curve, "qcivf": qcivf_curve, "graph": graph_curve}
METHODS = [*INDEXES, "wave", "ivf", "hnsw"]


def graph_of_each_query_head(head, config, G):
    """graph_curve with an index for each query head, as published: the mean over the heads."""
    curves = [graph_curve(Head(head.k, head.train[g::G], head.asked.unflatten(0, (G, -1))[g]),
                          config) for g in range(G)]
    return [tuple(sum(x) / G for x in zip(*points, strict=True))
            for points in zip(*curves, strict=True)]


def causal_graph(head, config, G):
    """graph_curve where a training query wants only keys that are older than it."""
    n, last = len(head.train) // G, len(head.k) + config.local
    age = torch.arange(last - n, last).repeat_interleave(G)[:, None]
    logits = head.train @ head.k.mT
    logits = logits.masked_fill(torch.arange(len(head.k)) >= age, -math.inf)
    wanted, points = logits.topk(config.wanted).indices, F.pad(head.k, (0, 1))
    links = project(points, wanted, empty_links(head, config), config)
    part = build_graph(head.train[:0], head.k, torch.zeros(len(head.k)), links, config)
    return graph_curve(head, config, plain_index(part))


def scan(case, args):
    """Of every head: distances, and the share of vectors to compare by index and by queries."""
    config, rows = GraphConfig(top=TOP, train=args.train), []
    curves = {name: curve for name, curve in CURVES.items() if name in args.methods}
    for layer, h, head, held_out, G in heads_of(case, config, args.every):
        row = {"layer": layer, "head": h, "keys_away": mahalanobis(held_out, head.k),
               "queries_away": mahalanobis(head.asked * head.k.shape[1] ** 0.5, head.k)}
        row |= {name: needed(curve(head, config)) for name, curve in curves.items()}
        row["points"] = {name: [point(head, built(head, c), c)] for name, c in (
            ("graph", config), ("qcivf", replace(config, index="qcivf")))}
        if layer % RARE == 0 and h == 0:
            row |= {f"{name}, keys ask": needed(curve(head.as_control(held_out), config))
                    for name, curve in curves.items()}
            row["graph, causal"] = needed(causal_graph(head, config, G))
            row["graph a query head"] = needed(graph_of_each_query_head(head, config, G))
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    print(scan_table(rows))
    return {"heads": rows}


def scan_table(rows):
    lines, names = [], [x for x in rows[0] if x not in (
        "layer", "head", "points", "queries_away", "keys_away")]
    for name in names:
        found = [row[name] for row in rows if name in row]
        shares = sorted(1.0 if x is None else x for x in found)
        at = [shares[int(p * (len(shares) - 1))] for p in (0.1, 0.5, 0.9)]
        lines.append([name, len(shares), f"{sum(shares) / len(shares):.1%}",
                      *(f"{x:.1%}" for x in at), sum(x is None for x in found)])
    away = [sum(row[x] for row in rows) / len(rows) for x in ("queries_away", "keys_away")]
    return table(["index", "heads", "mean", "p10", "median", "p90", "never"], lines) + (
        f"\n\nMahalanobis distance to the keys: queries {away[0]:.1f}, held-out keys {away[1]:.1f}")


# ---------------------------------------------------------------- what the tail loses

class Filled(GraphCache):
    """A GraphCache whose prefill hears queries and does not attend. It counts what a step reads."""

    def prefill(self, q, k, v, row=0):
        if self.store is None:
            self.allocate(k)
        self.observe(q, k.shape[2] - q.shape[2], row)
        super().prefill(None, k, v, row)


def methods(n, top, train):
    """{name: function that makes its cache}, with about as many keys attended to as `top`."""
    config = GraphConfig(top=top, train=train, beam=max(256, 2 * top))
    wave = replace(RetroConfig(), sink=config.sink, local=config.local, values=1.0, growth=1.0,
                   min_retrieve=1, retrieve=top / (n - config.sink - config.local))
    made = {f"{index}{', sample' * lift}": functools.partial(
        Filled, replace(config, index=index, lift=lift))
        for index in ("flat", "qcivf", "graph") for lift in (False, True)}
    return made | {"wave": functools.partial(WaveIndex, wave)}


def errors(case, caches):
    """Of every layer, step and query head: the output's relative error, and the error bar's size
    (0: there is none), with dense attention's queries. (layers, T, H*G) each."""
    found = []
    for cache, (q, k, v, dense) in zip(caches, case.steps, strict=True):
        mine = copy.deepcopy(cache)
        for t, o in enumerate(fidelity.feed(mine, q, k, v)):
            length = dense[0, :, t].norm(dim=-1)
            bar = getattr(mine, "error", torch.zeros(1, len(length))).flatten()
            found.append(torch.stack([(o[0, :, 0] - dense[0, :, t]).norm(dim=-1), bar]) / length)
    shape = len(case.past), case.T
    return torch.stack(found, 1).unflatten(1, shape)


def tail(case, args):
    """KL to dense and output errors by method and keys retrieved, and what error bars hold."""
    rows = []
    for top in args.tops:
        for name, make in methods(case.n, top, args.train).items():
            if name.split(",")[0] not in args.methods or ("graph" in name and top != TOP):
                continue                                # a graph takes minutes to build
            row = {"top": top, "method": name}
            caches = [fidelity.filled(make, *past, case.T) for past in case.past]
            error, bar = errors(case, caches)
            row |= {"error": error.mean().item(), "p95": error.quantile(0.95).item()}
            if bar.any():
                row |= {"covered": (error <= bar).float().mean().item(),
                        "bar": bar.median().item()}
            if top == TOP:
                row["kl"] = sum(fidelity.forced(args.model, case, caches)["kl"]) / case.T
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    head = ["keys retrieved", "index", "output error", "p95", "KL", "bar holds", "median bar"]
    print(table(head, [[row["top"], row["method"], f"{row['error']:.3f}", f"{row['p95']:.3f}",
                        *(f"{row[x]:{form}}" if x in row else "" for x, form in (
                            ("kl", ".4f"), ("covered", ".1%"), ("bar", ".3f")))] for row in rows]))
    return {"methods": rows}


# ---------------------------------------------------------------- synthetic keys

def cones(N, Q, D=128, rank=24, seed=0):
    """Queries (Q, D), scaled, and keys (N, D) of uneven length, in two cones that share few
    directions."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.arange(1, rank + 1).float() ** -0.5
    basis = torch.linalg.qr(torch.randn(D, rank, generator=g))[0].T             # (rank, D)
    turned = F.normalize(basis + 0.25 * torch.randn(rank, D, generator=g), dim=-1)
    cone_k, cone_q = F.normalize(torch.randn(2, D, generator=g), dim=-1)

    def around(n, basis, cone):
        inner = 4 * (torch.randn(n, rank, generator=g) * spread) @ basis
        return inner + 0.35 * torch.randn(n, D, generator=g) + cone

    k = around(N, basis, 4 * cone_k) * (0.3 * torch.randn(N, 1, generator=g)).exp()
    return around(Q, turned, 8 * cone_q) * D ** -0.5, k


def seconds(function, *args):
    """What it returns, and the processor's seconds that it took."""
    start = time.process_time()
    result = function(*args)
    return result, time.process_time() - start


def synthetic(case, args):
    """Build by stage, and search, over keys in two cones."""
    rows, config = [], GraphConfig(top=TOP, fallback=0)
    for n in args.keys:
        q, k = cones(n, args.queries + 64)
        head = Head(k, q[:-64], q[-64:])
        row = {"keys": n, "queries_away": mahalanobis(head.asked * 128 ** 0.5, k),
               "keys_away": mahalanobis(k[:500], k[500:])} | build_stages(head, config)
        index = row.pop("index")
        row |= {f"width {w}, {h} hops": searched(head, index, replace(
            config, width=w, hops=h, beam=beam)) for w, h, beam in STEPS}
        walks = [x for x in row.values() if isinstance(x, dict)]
        row["graph"] = needed([(x["share"], x["recall"]) for x in walks])
        row["compiled_ms"] = min((x["compiled_ms"] for x in walks if x["recall"] >= WANTED),
                                 default=None)
        c = replace(config, index="qcivf", centroids=512, listed=800, visits=8)
        index, row["qcivf_s"] = seconds(built, head, c)
        row["qcivf, 8 lists"] = searched(head, index, c)
        if n <= args.all_up_to:
            row |= {name: needed(CURVES[name](head, config)) for name in ("ivf", "hnsw", "qcivf")}
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    print(json.dumps(rows, indent=1))
    return {"sizes": rows}


def build_stages(head, config):
    """Seconds of each stage of build_graph, of which `build` is the whole, and its index."""
    nothing, links = torch.zeros(len(head.k)), empty_links(head, config)
    wanted, exact = seconds(best_keys, head.train, head.k, nothing, config.wanted)
    points = F.pad(head.k, (0, 1))
    links, projected = seconds(project, points, wanted, links, config)
    index, whole = seconds(built, head, config)
    lost = index.lists[index.lists >= 0]
    _, coarse = seconds(coarse_lists, head.k, lost.sort().values, config.coarse)
    return {"best_keys_s": exact, "project_s": projected, "coarse_s": coarse, "build_s": whole,
            "degree": (links >= 0).sum(-1).float().mean().item(), "index": index,
            "not_linked": len(lost) / len(head.k)}


def searched(head, index, config):
    """Share of vectors compared, recall, and milliseconds for a query, eager and compiled."""
    share, recall = point(head, index, config)
    eager = functools.partial(search, config=config)
    return {"share": share, "recall": recall, "ms": search_ms(eager, head, index),
            "compiled_ms": search_ms(torch.compile(eager, **COMPILE), head, index)}


def search_ms(search, head, index):
    """The processor's milliseconds of a search for one query: four at a time, the median."""
    times, k = [], head.k[None, None]
    for part in [head.asked[:4], *head.asked.split(4)]:         # the first one compiles
        _, spent = seconds(search, part[None, None], k, index)
        times.append(spent / len(part) * 1e3)
    return sorted(times[1:])[len(times) // 2]


# ---------------------------------------------------------------- the command line

SECTIONS = {"scan": scan, "tail": tail, "synthetic": synthetic}

def parse_args(argv):
    parser = Parser(prog="python -m evaluation.retrieval", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("sections", nargs="*", help="scan, tail, synthetic; all if none is named")
    add("--model", dest="name", default=DEFAULT_NAME, help="name, directory or .gguf file")
    add("--text", choices=texts.KINDS, default="code")
    add("--length", type=positive, default=7000, help="tokens of the text, its steps among them")
    add("--steps", type=positive, default=32, help="tokens fed one by one behind the text")
    add("--asked", type=positive, help="only the first so many of these steps ask")
    add("--keep", metavar="DIR", help="keep there what dense attention makes of the text")
    add("--train", type=positive, default=GraphConfig().train,
        help="latest tokens whose queries build an index")
    add("--every", type=positive, default=1, help="scan: only every so many layers")
    add("--tops", type=positive, nargs="+", default=[50, TOP, 200], help="tail: keys retrieved")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="only these")
    add("--keys", type=positive, nargs="+", default=[8192, 32768, 131072, 524288],
        help="synthetic: keys of a head")
    add("--queries", type=positive, default=8192, help="synthetic: queries that build an index")
    add("--all-up-to", type=positive, default=32768,
        help="synthetic: IVF, HNSW and qcivf's best numbers up to so many")
    add("--save", type=Path, default=OUT, help="file of the results")
    args = parser.parse_args(argv)
    for section in args.sections:
        if section not in SECTIONS:
            raise InputError(f"section {section}: give scan, tail or synthetic")
    if args.length < 2048:
        raise InputError(f"--length is {args.length}: give 2,048 or more, or little is indexed")
    return args


@torch.no_grad()
def run(args):
    sections = args.sections or SECTIONS
    results = json.loads(args.save.read_text("utf-8")) if args.save.exists() else {}
    if importlib.util.find_spec("faiss") is None:
        print("faiss is not installed, so there are no figures of HNSW: "
              "pip install --no-deps faiss-cpu", file=sys.stderr)
    case, shown = None, Path(args.name).name.removesuffix(".gguf")
    if set(sections) & {"scan", "tail"}:
        args.model, tokenizer = load(args.name, dtype=torch.float32, device="cpu")
        case = read(args, tokenizer)
        if "tail" not in sections:
            args.model = None                   # gigabytes that nothing asks any more
        text = f"{shown}, float32, {args.text}, {case.n:,} tokens, {case.T} steps"
    for section in sections:
        is_made_up = section == "synthetic"
        what = where("two cones, 128 dims" if is_made_up else text)
        key = section if is_made_up or shown == DEFAULT_NAME else f"{section}, {shown}"
        if not is_made_up and args.train != GraphConfig().train:
            key += f", queries of {args.train:,} tokens"
        command = " ".join(["python -m evaluation.retrieval", *sys.argv[1:]])
        results[key] = {"command": command, "where": what, **SECTIONS[section](case, args)}
        write_json(args.save, results)


def main(argv=None):
    """The exit status."""
    return run_command("retrieval", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
