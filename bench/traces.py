"""Which clusters real steps ask for, and how often each cache policy would have had them.

    python -m bench.traces              # record four texts, replay them: half an hour on two cores
    python -m bench.traces --traces DIR --save FILE.json        # keep traces and numbers, and plots

`make bench-cache` runs it. A generation of the default model is recorded: the clusters that every
step retrieves, by layer and head, best first. The trace is replayed as buffer.py would run it. A
cluster is cut into blocks of 8 tokens. A head has S slots for blocks: S x 8 tokens are the cache
ratio of its store. All blocks of a step are looked up together. Then the missing ones among the
first S blocks of the step are admitted, in order of rank. The first step counts, and has no hits.

LRU and CLOCK are those of buffer.py. FIFO forgets what was admitted first. Belady's policy knows
what will be asked for: it keeps what is needed soonest, and may admit nothing, so no other policy
can hit more. Predicted speeds are those of bench/machine.py.

    T steps   R clusters retrieved   S slots a head   B batch   H kv heads

Does not include: caches shared by heads or layers, look-ahead, several devices.
"""
import functools
import itertools
import json
import sys
from collections import OrderedDict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from app.command import Parser, run_command
from bench.machine import plot_speed, predicted
from bench.timing import figure, new_file, positive, table, where, write_json
from buffer import BLOCK, OFFLOADED
from evaluation import texts
from generate import decode, eager_step, prefill, sampler
from model import DEFAULT_NAME, load
from retroinfer import (
    PLAIN,
    InputError,
    RetroConfig,
    WaveIndex,
    before,
    gather_clusters,
    limits_of,
    round_up,
    tripartite_attention,
)

RATIOS = 0.005, 0.025, 0.05, 0.1, 0.2, 0.4
WORDS = {"paper": "1.8 %, as in the paper", "all": "as configured"}     # how many are retrieved


# ---------------------------------------------------------------- recording

@dataclass(frozen=True)
class Trace:
    """The clusters that the steps of a generation retrieved. A cluster keeps its number."""
    ids: np.ndarray             # (T, layers, B*H, R) best first
    sizes: np.ndarray           # (T, layers, B*H, R) tokens of each; 0: it was not retrieved
    capacity: int               # tokens that fit the store of a head
    said: np.ndarray            # (T+1, B) the tokens generated
    config: RetroConfig

    def save(self, path):
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        np.savez_compressed(path, **arrays | {"config": json.dumps(asdict(self.config))})

    @classmethod
    def load(cls, path):
        with np.load(path) as file:
            config = RetroConfig(**json.loads(str(file["config"])))
            return cls(file["ids"], file["sizes"], int(file["capacity"]), file["said"], config)

    def best(self, n):
        """The Trace of the n best clusters of each step. The tokens generated stay the same."""
        return replace(self, ids=self.ids[..., :n], sizes=self.sizes[..., :n])

    def slots(self, ratio):
        """S, block slots of a head whose cache is that share of its store."""
        return round(ratio * self.capacity / BLOCK)

    @property
    def n_blocks(self):
        """(T, layers, B*H, R) blocks of the clusters asked for."""
        return -(-self.sizes.astype(int) // BLOCK)

    @functools.cached_property
    def streams(self):
        """{(layer, head): [blocks of each step]}, best first. A block is a number."""
        T, layers, heads, _ = self.ids.shape
        largest = int(self.n_blocks.max(initial=1))
        ids, counts = self.ids.tolist(), self.n_blocks.tolist()

        def blocks(t, layer, head):
            clusters = zip(ids[t][layer][head], counts[t][layer][head], strict=True)
            return [i * largest + j for i, n in clusters for j in range(n)]

        return {(layer, head): [blocks(t, layer, head) for t in range(T)]
                for layer, head in itertools.product(range(layers), range(heads))}


def record(model, prompts, n_steps, pick=None, config=None):
    """The Trace of n_steps eager steps behind prompts (T,), which a wave index has read."""
    asked, config = [], config or RetroConfig(**OFFLOADED)

    def attend(q, steady, index, stores, budget, method):
        def fetch(ids, ends):
            sizes = ends - before(ends)                                     # (B, H, R)
            asked.append((ids.flatten(0, 1), sizes.flatten(0, 1)))
            return gather_clusters(index, stores, budget.N, ids, ends)
        return tripartite_attention(q, steady, index, budget, fetch, method)

    capacity, hot = max(map(len, prompts)) + n_steps, PLAIN._replace(attend=attend)
    caches = [WaveIndex(config, capacity, len(prompts), hot) for _ in model.layers]
    logits = prefill(model, caches, prompts, chunk=2048)
    said = list(decode(model, caches, logits, n_steps + 1, pick or sampler(), eager_step))
    ids, sizes = (torch.stack(x).unflatten(0, (-1, len(caches))).numpy()    # (T, layers, B*H, R)
                  for x in zip(*asked, strict=True))
    return Trace(ids.astype(np.int32), sizes.astype(np.uint16), round_up(capacity),
                 torch.stack(said).numpy(), config)


# ---------------------------------------------------------------- policies

def lru(steps, S):
    """Yield the hits of each step: the block goes first that was not asked for longest."""
    kept = OrderedDict()                    # the next to go is first
    for blocks in steps:
        yield sum(b in kept for b in blocks)
        for b in reversed(blocks):
            kept[b] = None
            kept.move_to_end(b)
        while len(kept) > S:
            kept.popitem(last=False)


def fifo(steps, S):
    """Yield the hits of each step: the block goes first that was admitted first."""
    kept = OrderedDict()
    for blocks in steps:
        yield sum(b in kept for b in blocks)
        for b in [b for b in blocks[:S] if b not in kept]:
            if len(kept) == S:
                kept.popitem(last=False)
            kept[b] = None


def clock(steps, S):
    """Yield the hits of each step: a hand goes round, and takes unmarked blocks.

    A block is marked when it is asked for. The hand takes the mark of a marked block.
    """
    owner, is_marked, place, hand = [None] * S, [False] * S, {}, 0
    for blocks in steps:
        hits = [place[b] for b in blocks if b in place]
        yield len(hits)
        for slot in hits:
            is_marked[slot] = True
        for b in [b for b in blocks[:S] if b not in place]:
            while is_marked[hand]:
                is_marked[hand] = False
                hand = (hand + 1) % S
            place.pop(owner[hand], None)
            owner[hand], is_marked[hand], place[b] = b, True, hand
            hand = (hand + 1) % S


def belady(steps, S):
    """Yield the hits of each step: the blocks stay that are needed soonest.

    Blocks of one step are looked up together, so it does not matter which of them stays.
    """
    next_step, next_uses = {}, []           # the latter: of each step, when its blocks come again
    for t in range(len(steps) - 1, -1, -1):
        next_uses.append({b: next_step.get(b, len(steps)) for b in steps[t]})
        next_step |= dict.fromkeys(steps[t], t)
    kept = {}                               # block: the step that asks for it next
    for blocks in steps:
        yield sum(b in kept for b in blocks)
        kept |= next_uses.pop()
        kept = dict(sorted(kept.items(), key=lambda item: item[1])[:S])


POLICIES = {"LRU": lru, "FIFO": fifo, "CLOCK": clock, "Belady": belady}


def replay(trace, policy, S):
    """Blocks hit, (T, layers, B*H), by a policy with S slots a head."""
    hits = np.zeros(trace.ids.shape[:3], dtype=int)
    for place, steps in trace.streams.items():
        hits[:, *place] = list(policy(steps, S))
    return hits


# ---------------------------------------------------------------- all of it

def recorded(kind, args):
    """The Trace of a text, from its file if there is one."""
    path = Path(args.traces) / f"{kind}.npz" if args.traces else None
    if path and path.exists():
        return Trace.load(path)
    model, tokenizer = load(device="cpu")
    ids = tokenizer.encode(texts.KINDS[kind]("final")[:12 * args.length])
    prompt = torch.tensor(ids[:args.length - args.steps - 1])
    trace = record(model, [prompt], args.steps, sampler(0.7, 0.95))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        trace.save(path)
    return trace


def measured(trace, policies):
    """Hit ratios by policy and cache ratio, those of the first policy at 5 % by layer, and blocks.

    "blocks": asked for by a head in a step, on average.
    """
    asked, found = trace.n_blocks.sum(-1), {"hit": {}}                      # (T, layers, B*H)
    for name in policies:
        hits = {ratio: replay(trace, POLICIES[name], trace.slots(ratio)) for ratio in RATIOS}
        found["hit"][name] = {ratio: round(float(x.sum() / asked.sum()), 4)
                              for ratio, x in hits.items()}
        if "layers" not in found:
            found["layers"] = (hits[0.05].sum((0, 2)) / asked.sum((0, 2))).round(4).tolist()
    return found | {"blocks": round(asked.mean(), 1)}


def cell(trace):
    """The facts of a trace: of the paper's share of the clusters, and of all it retrieved."""
    few = replace(trace.config, min_retrieve=1, retrieve=RetroConfig.paper().retrieve)
    n_retrieve, _ = limits_of(few, torch.tensor(trace.capacity))
    return {"config": asdict(trace.config),
            "paper": measured(trace.best(int(n_retrieve)), POLICIES),
            "all": measured(trace, ["LRU"])}


def averaged(cells):
    """{policy: {ratio: mean over texts}} of what measured() gives for each."""
    return {policy: {ratio: sum(cell["hit"][policy][ratio] for cell in cells) / len(cells)
                     for ratio in RATIOS} for policy in cells[0]["hit"]}


def plot_hits(found, path):
    """Hit ratios by policy against the cache ratio, and of LRU at 5 % by layer."""
    page, (left, right) = figure((10, 4.2), columns=2)
    plot_policies(found, left)
    plot_layers(found, right)
    page.savefig(path, dpi=150)


def plot_policies(found, axes):
    mean, every = (averaged([cell[x] for cell in found.values()]) for x in WORDS)
    lines = mean | {f"LRU, {WORDS['all']}": every["LRU"]}
    for style, (name, hits) in zip(("o-", "s:", "^--", "D-.", "v-"), lines.items(), strict=True):
        axes.plot([100 * r for r in RATIOS], list(hits.values()), style, label=name, ms=4,
                  color="black" if name == "LRU" else "0.5")
    axes.set(xscale="log", ylim=(0, 1.03), xlabel="cache, % of a head's store", ylabel="hit ratio",
             title=f"The best 1.8 % of the clusters: at 5 % LRU hits {mean['LRU'][0.05]:.0%}")
    axes.set_xticks([100 * r for r in RATIOS], [f"{100 * r:g}" for r in RATIOS])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="lower right")


def plot_layers(found, axes):
    axes.axhspan(0.79, 0.94, color="0.9", label="average by task in the paper")
    for style, (kind, cell) in zip(("o-", "s:", "^--", "D-."), found.items(), strict=False):
        axes.plot(cell["paper"]["layers"], style, color="0.3", ms=3, lw=0.8, label=kind)
    layers = np.mean([cell["paper"]["layers"] for cell in found.values()], 0)
    axes.set(ylim=(0, 1.03), xlabel="layer", ylabel="hit ratio, LRU at 5 %",
             title=f"Layers hit {layers.min():.0%} to {layers.max():.0%}")
    axes.legend(frameon=False, loc="lower right", ncols=2)


def report(found, speed):
    """The tables of a run."""
    lines = []
    for budget in WORDS:
        rows = [[kind, policy, *(f"{hit:.3f}" for hit in hits.values())]
                for kind, cell in found.items() for policy, hits in cell[budget]["hit"].items()]
        blocks = ", ".join(f"{cell[budget]['blocks']:g}" for cell in found.values())
        lines += [f"clusters retrieved {WORDS[budget]}; blocks a step and head: {blocks}",
                  table(["text", "policy", *(f"{ratio:.1%}" for ratio in RATIOS)], rows)]
    settings, speeds = ("tokens", "batch", "ratio"), ("measured", "predicted", "bytes only")
    rows = [[*(row[key] for key in settings), *(f"{row[key]:.1f}" for key in speeds)]
            for row in speed["published"]]
    ours = [[name, batch, f"{x:.0f}"] for name, row in speed["ours"].items()
            for batch, x in row.items()]
    lines += [f"the published code, tokens/s; fitted: {speed['host_seconds'] * 1e3:.3f} ms a layer",
              table([*settings, *speeds], rows),
              "at the hit ratio of its own log, 120K x 8 and 5 %: "
              f"{speed['at its own hit ratio']:.1f}", "ours at 120K and 5 %, not measured",
              table(["machine", "batch", "tokens/s"], ours)]
    return "\n\n".join(lines)


def parse_args():
    parser = Parser(prog="python -m bench.traces", description=__doc__.splitlines()[0])
    parser.add_argument("--texts", nargs="+", choices=texts.KINDS, default=list(texts.FOUR))
    parser.add_argument("--length", type=positive, default=8192, help="tokens read and generated")
    parser.add_argument("--steps", type=positive, default=255, help="of them generated, less one")
    parser.add_argument("--traces", metavar="DIR", help="where traces are kept")
    parser.add_argument("--save", metavar="FILE", type=new_file, help="write the numbers as JSON")
    args = parser.parse_args()
    if args.length < args.steps + 2:
        raise InputError(f"--length is {args.length}: {args.steps} steps need at least "
                         f"{args.steps + 2}")
    return args


def main():
    args = parse_args()
    place = where(f"{DEFAULT_NAME}, float32, {args.length:,} tokens, {args.steps} steps")
    print(place, flush=True)
    with ProcessPoolExecutor() as pool:         # a text is replayed while the next is recorded
        cells = {kind: pool.submit(cell, recorded(kind, args)) for kind in args.texts}
        found = {kind: future.result() for kind, future in cells.items()}
    hits = averaged([cell["paper"] for cell in found.values()])["LRU"]
    speed = predicted(hits, RetroConfig(**found[args.texts[0]]["config"]))
    print(report(found, speed))
    if args.save:
        write_json(args.save, {"where": place, "command": " ".join(sys.argv), "texts": found,
                               "speed": speed})
        plot_hits(found, args.save.with_suffix(".png"))
        plot_speed(speed, args.save.with_name(f"{args.save.stem}-speed.png"))


if __name__ == "__main__":
    raise SystemExit(run_command("bench.traces", main))
