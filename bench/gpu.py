"""Speed on a GPU: one layer on the kernels beside dense attention, then a whole model.

    python -m bench.gpu                                  # or: make bench-gpu; under ten minutes
    TRITON_INTERPRET=1 python -m bench.gpu --dry-run     # tiny, each timed once; also on a CPU

Writes gpu.json, gpu.md and gpu.png to results/. Needs matplotlib and einops.

One layer, bfloat16: keys form clumps, as real keys do, and WaveIndex clusters them itself. Dense
attention reads the same store. One head is compared with float64. Each runner is captured in a CUDA
graph and replayed with a cold L2 cache: a number is the median.

The whole model has Llama-3-8B's shape and random weights. As many sequences decode together as
leave their dense caches room beside the weights. One kind of cache at a time is there. The wave
index is compared with the faster of two dense caches: model.py's, whose mask lets sequences differ
in length, and one without a mask, for which SDPA has its best kernels. What the index costs is
measured by prefills of four layers, with it and without, by the host's clock.

    B batch   H kv heads   G query heads per kv head   T tokens   D head dim
"""
import functools
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from triton.testing import do_bench

import kernels
import retroinfer
from app import plan
from app.command import Parser, run_command
from bench.timing import clock, figure, keys_and_values, table, write_json
from generate import attend, compiled_step, prefill
from model import DenseCache, Llama, ModelConfig
from retroinfer import PLAIN, Hot, Index, InputError, RetroConfig, WaveIndex, few

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IS_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if IS_GPU else torch.float32     # interpreted, bfloat16 fails
TRITON = Hot(kernels.attend, kernels.nearest, kernels.segment_sum, kernels.tripartite_attention)
COMPILED = {(131072, 1), (131072, 8), (8192, 1)}    # cells where slow compilers are timed too
SPARE = 128     # slots that are free for steps of a whole model: masks like a multiple of 8


def median_ms(run, rep=60):
    """Median milliseconds of a CUDA-graph replay of run() over `rep` ms, each with a cold L2."""
    for _ in range(2):                          # compiles, and allocates what graphs may not
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return do_bench(graph.replay, warmup=10, rep=rep, return_mode="median")


def once_ms(run, rep=None):
    """Milliseconds of one run() by the host's clock."""
    wait = torch.cuda.synchronize if IS_GPU else lambda: None
    wait()
    return 1e3 * clock(lambda: (run(), wait()))


def host_ms(run, repeats=3):
    """Median milliseconds of run() by the host's clock: what it launches is part of it."""
    run()                                       # compiles
    return statistics.median(once_ms(run) for _ in range(repeats))


@dataclass(frozen=True)
class Scope:
    """What is measured, and how."""
    shapes: dict            # {model: (H, G, D)} of a layer
    cells: list             # (tokens, batch) of a layer
    segment: int            # tokens that are clustered together, to time that
    retro: RetroConfig
    config: ModelConfig     # of the whole model
    tokens: int             # in its caches before a step
    prefills: tuple         # tokens
    n_layers: int           # of the model that is prefilled
    step_ms: Callable       # clock of a layer and of a step
    prefill_ms: Callable    # clock of a prefill


FULL = Scope({"Llama-3-8B": (8, 4, 128), "Qwen2.5-7B": (4, 7, 128)},
             list(itertools.product((131072, 8192, 32768, 524288, 1048576), (1, 8, 32))),
             segment=8192, retro=RetroConfig(), config=plan.shape("Llama-3.1-8B"), tokens=122880,
             prefills=(32768, 122880), n_layers=4, step_ms=median_ms, prefill_ms=host_ms)
TINY = Scope(dict.fromkeys(FULL.shapes, (1, 3, 16)), [(100, 1)], segment=32,
             retro=RetroConfig(local=8, update=32, segment=64, min_retrieve=4),
             config=replace(FULL.config, vocab_size=64, hidden_size=48, intermediate_size=64,
                            num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
                            head_dim=16),
             tokens=100, prefills=(60,), n_layers=1, step_ms=once_ms, prefill_ms=once_ms)


class MasklessCache(DenseCache):
    """Full attention to all slots, filled or free: right for sequences that fill their cache."""

    def decode(self, q, k, v):
        batch = torch.arange(len(q), device=q.device)
        self.k[batch, :, self.n_tokens] = k[:, :, 0]
        self.v[batch, :, self.n_tokens] = v[:, :, 0]
        self.n_tokens.add_(1)
        return F.scaled_dot_product_attention(q, self.k, self.v, enable_gqa=True)

    forward = decode


def kinds(scope):
    """{name: function of capacity and batch} that makes a cache of each kind."""
    return {"dense": DenseCache, "dense, no mask": MasklessCache,
            "wave index": functools.partial(WaveIndex, scope.retro, hot=TRITON)}


def clumps(H, T, D):
    """Keys (1, H, T, D) of a text that dwells on a topic for a while and returns to it."""
    topics = torch.randn(H, max(T // 256, 4), D, device=DEVICE)
    which = torch.randint(topics.shape[1], (T // 16 + 1,), device=DEVICE)
    k = topics[:, which.repeat_interleave(16)[:T]][None]                    # (1, H, T, D)
    return (k + 0.7 * torch.randn_like(k)).to(DTYPE)


def fill(cache, tokens, H, D):
    """Append so many tokens to each sequence, without a prefill: views of its k, v (1, H, T, D)."""
    held = []
    for row in range(len(cache.n_tokens)):
        k = clumps(H, tokens, D)
        cache.prefill(None, k, torch.randn_like(k), row)
        held.append(keys_and_values(cache, row))
    cache.update()
    return held


def free_memory():
    """Bytes left on the GPU. A CPU stands for a GPU with room for two tiny sequences."""
    return torch.cuda.mem_get_info()[0] if IS_GPU else 300_000


def make_room():
    """Drop what compiled steps hold, and give all that is unused back to the GPU."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


# ---------------------------------------------------------------- one layer

class Cell:
    """A layer's cache for one shape, context and batch, and `args` of a step's attention on it."""

    def __init__(self, scope, model, tokens, batch):
        H, G, D = scope.shapes[model]
        self.name, self.tokens = {"model": model, "tokens": tokens, "batch": batch}, tokens
        wave = kinds(scope)["wave index"](tokens + 1, batch)
        held = fill(wave, tokens, H, D)
        wave.hot = TRITON._replace(attend=self.catch)
        k, v = (torch.cat([x[:, :, tokens // 3, None] for x in every])      # (B, H, 1, D)
                for every in zip(*held, strict=True))
        q = k + torch.randn(batch, H, G, D, device=DEVICE).to(DTYPE)
        wave.decode(q.view(batch, H * G, 1, D), k, v)

    def catch(self, *args):
        """Keep the arguments of a step's attention."""
        self.args = args
        return args[0]

    def runners(self):
        """{name: function}. Grouped: the G queries of a kv head as G tokens."""
        q, flat, k, v = self.dense()
        return {"kernels": lambda: kernels.attend(*self.args),
                "SDPA, grouped": lambda: F.scaled_dot_product_attention(q, k, v),
                "SDPA, flash": lambda: flash(flat, k, v)}

    def compiled_runners(self):
        """{name: function} of those that are compiled first."""
        _, flat, k, v = self.dense()
        ours, flex = (torch.compile(f, fullgraph=True, dynamic=False)
                      for f in (attend, flex_attention))
        return {"PyTorch, compiled": lambda: ours(*self.args),
                "FlexAttention": lambda: flex(flat, k, v, enable_gqa=True)}

    def dense(self):
        """q (B, H, G, D), the same (B, H*G, 1, D), and k, v (B, H, T, D)."""
        q, _, _, stores, _, _ = self.args
        k, v = (x[:, :, :self.tokens] for x in stores)
        return q, q.flatten(1, 2)[:, :, None], k, v

    def check(self):
        """InputError unless a head's error to float64 is at most twice that of eager PyTorch."""
        head = self.last_head()
        truth = attend_exactly(*head)
        mine, eager = ((x.double() - truth).abs().max().item() for x in (
            kernels.attend(*self.args)[-1:, -1:], attend(*head)))
        if not mine <= 2 * eager + 1e-4:        # near ties of rank may fall otherwise in float64
            raise ValueError(f"{self.name}: the kernels are {mine:.2e} off, PyTorch {eager:.2e}")
        return {"error": mine, "error_pytorch": eager}

    def last_head(self):
        """`args` of the last head of the last sequence alone."""
        q, steady, index, stores, budget, method = self.args
        q, *others = (x[-1:, -1:] for x in (q, *steady, *index, *stores))
        budget = budget._replace(retrieve=budget.retrieve[-1:], ranked=budget.ranked[-1:])
        return q, others[:3], Index(*others[3:-2]), others[-2:], budget, method

    def launches(self):
        """{kernel: (function that runs it alone, its last arguments by name)} of a step."""
        found, launch = {}, kernels.launch

        def note(kernel, grid, *args, **tile):
            launch(kernel, grid, *args, **tile)
            run = functools.partial(launch, kernel, grid, *args, **tile)
            name = kernel.__name__.removesuffix("_kernel")
            before = found[name][0] if name in found else lambda: None
            given = dict(zip(kernel.arg_names, args, strict=False))
            found[name] = (lambda: (before(), run())), given

        with mock.patch.object(kernels, "launch", note):
            kernels.attend(*self.args)
        return found

    def traffic(self, launches):
        """{kernel: bytes it must read and write}, by the count in the docstring of kernels.py."""
        q, steady, index, _, budget, _ = self.args
        (B, H, G, D), e, C = q.shape, q.element_size(), index.sizes.numel()
        live, n_steady = int((index.sizes > 0).sum()), int((steady[2] > -math.inf).sum())
        fits = launches["choose"][1]["fits"]
        clusters, tokens, ranked = fits.sum((0, 1)).tolist()    # in all heads together
        given = int(few(budget, fits[..., 1]).sum())            # tokens with values
        guessed = ranked - clusters                             # clusters estimated
        parts = 4 * B * H * G * (D + 2) * launches["attend"][1]["stats"].shape[2]
        return {"rank": live * (D // 2 + 4) + C * (4 + 8 * G) + n_steady * (D * e + 4),
                "choose": C * (4 * G + 12) + 16 * clusters + 4 * ranked + 8 * tokens,
                "look": (n_steady + tokens) * (D * e + 4 + 4 * G) + guessed * (4 * G + 4),
                "share": tokens * (4 * G + 8),
                "attend": n_steady * (D * e + 4 * G + 4) + tokens * (4 * G + 4) + parts
                + given * (D * e + 4) + (tokens - given) * (D // 2 + 6)
                + guessed * (D // 2 + 6 + 4 * G),
                "combine": parts + q.numel() * e}


def flash(q, k, v):
    """FlashAttention as a user of SDPA calls it: each query head is a head of its own."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if IS_GPU else SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def attend_exactly(q, steady, index, stores, budget, method):
    """retroinfer.attend with all products in float64: (1, 1, G, D) of one head."""
    k, v, bias = steady
    method = method._replace(scores=lambda q, k: q.double() @ k.double().mT,
                             mix=lambda weights, v: weights @ v.double())
    return retroinfer.attend(q, (k, v.double(), bias), index, stores, budget, method)


def layer_facts(cell, step_ms, bandwidth):
    """Errors of a Cell, milliseconds of each runner, bytes and share of each kernel."""
    facts = cell.name | cell.check()
    runners = cell.runners()
    if (cell.tokens, cell.name["batch"]) in COMPILED:
        runners |= cell.compiled_runners()
    facts["ms"] = {name: step_ms(run) for name, run in runners.items()}
    launches, facts["kernels"] = cell.launches(), {}
    traffic = cell.traffic(launches)
    for name, (run, _) in launches.items():
        ms = step_ms(run)
        facts["kernels"][name] = {"ms": ms, "bytes": traffic[name],
                                  "of_bandwidth": traffic[name] / ms * 1e3 / bandwidth}
    need = sum(traffic[name] for name in ("rank", "look", "attend"))
    return facts | {"of_bandwidth": need / facts["ms"]["kernels"] * 1e3 / bandwidth}


def index_facts(model, scope):
    """Milliseconds to cluster one segment, all heads, with the kernels and without."""
    H, _, D = scope.shapes[model]
    k, ms = clumps(H, scope.segment, D), {}
    for name, hot in (("kernels", TRITON), ("PyTorch, eager", PLAIN)):
        cluster = functools.partial(retroinfer.cluster_segment, k, k, scope.retro, hot)
        ms[name] = scope.step_ms(cluster)
    return {"model": model, "tokens": scope.segment, "ms": ms}


def copy_bandwidth(scope):
    """Bytes a second that a copy on the device reads and writes."""
    x = torch.empty(2, 2**29 if IS_GPU else 2**20, dtype=torch.uint8, device=DEVICE)
    return x.numel() / scope.step_ms(lambda: x[0].copy_(x[1])) * 1e3


def cell_bytes(scope, model, tokens, batch):
    """Bytes of a Cell: K and V, the index, and what its build takes."""
    H, _, D = scope.shapes[model]
    return 3.5 * batch * tokens * H * D * 2


def layers_facts(scope, end):
    """All facts of layers, for as many cells as memory allows, none begun after `end`."""
    bandwidth = copy_bandwidth(scope)
    name = torch.cuda.get_device_name() if IS_GPU else "a dry run on a CPU"
    facts = {"where": f"{name}, torch {torch.__version__}, Triton {triton.__version__}, copy "
             f"{bandwidth / 1e9:.0f} GB/s", "copy_bytes_per_s": bandwidth, "cells": [],
             "left_out": [], "index": [index_facts(model, scope) for model in scope.shapes]}
    for (tokens, batch), model in itertools.product(scope.cells, scope.shapes):
        need = cell_bytes(scope, model, tokens, batch)
        if time.monotonic() > end or need > 0.9 * free_memory():
            facts["left_out"].append(f"{model}, {tokens:,} tokens, batch {batch}: it needs "
                                     f"{need / 2**30:.0f} GiB, or the time was over")
            continue
        cell = Cell(scope, model, tokens, batch)
        facts["cells"].append(layer_facts(cell, scope.step_ms, bandwidth))
        print(facts["cells"][-1], flush=True)
        del cell                                    # before the next one comes
        torch.cuda.empty_cache()
    return facts


# ---------------------------------------------------------------- a whole model

def random_model(config):
    """A model of random weights that keep its hidden states finite."""
    with torch.device("meta"):
        model = Llama(config)
    kind = {"dtype": DTYPE, "device": DEVICE}
    state = {name: torch.ones(x.shape, **kind) if x.ndim == 1 else
             0.02 * torch.randn(x.shape, **kind) for name, x in model.named_parameters()}
    model.load_state_dict(state, strict=False, assign=True)
    model.rope.to(DEVICE)
    return model.eval().requires_grad_(False)


def largest_batch(config, capacity, free):
    """Sequences whose dense cache fits nine tenths of `free` bytes: a step needs memory too."""
    numbers = config.num_hidden_layers * config.num_key_value_heads * capacity * config.head_dim
    return int(0.9 * free) // (2 * numbers * DTYPE.itemsize)


def step_facts(model, caches, tokens, step_ms):
    """Milliseconds, tokens a second and bytes to read of a step behind so many tokens."""
    batch = len(caches[0].n_tokens)
    for cache in caches:
        fill(cache, tokens, model.config.num_key_value_heads, model.config.head_dim)
    token = torch.zeros(batch, dtype=torch.int64, device=DEVICE)

    def run():
        for cache in caches:
            cache.n_tokens.fill_(tokens)            # every run is the same step
        return compiled_step(model, caches, token)

    if not run().isfinite().all():
        raise InputError(f"the logits behind {tokens} tokens are not finite")
    ms, cached = step_ms(run, 1000), sum(cache.bytes_read() for cache in caches)
    weights = sum(x.nbytes for x in model.parameters()) - model.embed_tokens.weight.nbytes
    return {"ms": ms, "tokens_per_s": batch / ms * 1e3, "cache_bytes": cached,
            "bytes": weights + cached}


def decode_facts(scope, batch=None):
    """A step on each kind of cache, at the largest batch unless it is given, or {} if not one
    sequence fits."""
    config, tokens, found = scope.config, scope.tokens, {}
    capacity = tokens + SPARE
    make_room()
    free = free_memory() - plan.weights(config, DTYPE)
    most = largest_batch(config, capacity, free)
    batch = min(batch or most, most)
    if batch < 1:
        return {}
    model = random_model(config)
    print(f"{tokens:,} tokens: {batch} dense caches fit {free / 2**30:.1f} GiB", flush=True)
    for name, make in kinds(scope).items():
        caches = [make(capacity, batch) for _ in model.layers]
        found[name] = step_facts(model, caches, tokens, scope.step_ms)
        print(name, found[name], flush=True)
        del caches                                  # before the next kind comes
        make_room()
    dense = max(found[name]["tokens_per_s"] for name in ("dense", "dense, no mask"))
    return {"tokens": tokens, "batch": batch, "free_bytes": free, "steps": found,
            "speed_up": found["wave index"]["tokens_per_s"] / dense}


def prefill_facts(scope, config, tokens):
    """Milliseconds of a prefill of one text with and without the index, and the index's share."""
    model, ms = random_model(config), {}
    ids = torch.randint(config.vocab_size, (tokens,), device=DEVICE)

    def run(name):
        caches = [kinds(scope)[name](tokens + SPARE) for _ in model.layers]
        prefill(model, caches, [ids])
        for cache in caches:
            cache.update()

    for name in ("dense", "wave index"):
        ms[name] = scope.prefill_ms(functools.partial(run, name))
        torch.cuda.empty_cache()
    return {"tokens": tokens, "layers": config.num_hidden_layers, "ms": ms,
            "index_share": ms["wave index"] / ms["dense"] - 1}


def model_facts(scope):
    """All facts of the whole model."""
    decode = decode_facts(scope)
    make_room()
    few = replace(scope.config, num_hidden_layers=scope.n_layers)
    fitting = [n for n in scope.prefills if not IS_GPU
               or plan.plan(plan.Run(few, n + SPARE)).fits(0.9 * free_memory())]
    return {"decode": decode,
            "prefill": [prefill_facts(scope, few, n) for n in fitting]}


# ---------------------------------------------------------------- results

def layers_page(facts):
    """The tables of layers, for a person."""
    rows = []
    for cell in facts["cells"]:
        place = cell["model"], f"{cell['tokens']:,}", cell["batch"]
        for name, ms in cell["ms"].items():
            share = f"{cell['of_bandwidth']:.0%}" if name == "kernels" else ""
            rows.append([*place, name, f"{ms:.3f}", share])
        rows += [[*place, f"({name})", f"{x['ms']:.3f}", f"{x['of_bandwidth']:.0%}"]
                 for name, x in cell["kernels"].items()]
    indexed = [[x["model"], f"{x['tokens']:,}", name, f"{ms:.2f}"]
               for x in facts["index"] for name, ms in x["ms"].items()]
    return [facts["where"],
            table(["model", "tokens", "batch", "runner", "ms", "of copy bandwidth"], rows),
            table(["model", "tokens indexed", "hot functions", "ms"], indexed)]


def model_page(facts):
    """The tables of the whole model, for a person."""
    decode, bandwidth = facts["decode"], facts["copy_bytes_per_s"]
    page = ["The whole of Llama-3-8B: not one sequence fits."]
    if decode:
        rows = [[name, f"{x['tokens_per_s']:.1f}", f"{x['ms']:.2f}",
                 f"{x['bytes'] / x['ms'] * 1e3 / bandwidth:.0%}"]
                for name, x in decode["steps"].items()]
        page = [f"The whole of Llama-3-8B, {decode['batch']} sequences of {decode['tokens']:,} "
                "tokens (the most whose dense cache fits): the wave index decodes "
                f"{decode['speed_up']:.2f} times as fast as the faster dense cache.",
                table(["cache", "tokens/s", "ms a step", "of copy bandwidth"], rows)]
    rows = [[f"{x['tokens']:,}", x["layers"], f"{x['ms']['dense']:.0f}",
             f"{x['ms']['wave index']:.0f}", f"{x['index_share']:+.1%}"] for x in facts["prefill"]]
    head = ["tokens prefilled", "layers", "dense ms", "wave index ms", "index"]
    return [*page, table(head, rows)]


def plot(facts, path):
    """Milliseconds of a step against context, a line a runner, a panel a model: batch 1."""
    models = list(dict.fromkeys(cell["model"] for cell in facts["index"]))
    page, every = figure((10, 4), len(models))
    for axes, model in zip(every, models, strict=True):
        cells = [c for c in facts["cells"] if c["batch"] == 1 and c["model"] == model]
        cells.sort(key=lambda cell: cell["tokens"])
        for name in dict.fromkeys(name for cell in cells for name in cell["ms"]):
            points = [(cell["tokens"], cell["ms"][name]) for cell in cells if name in cell["ms"]]
            axes.loglog(*zip(*points, strict=True), marker="o", label=name)
        axes.set(title=f"{model}, batch 1", xlabel="tokens", ylabel="ms a layer")
    every[0].legend()
    page.savefig(path, dpi=110)


def save(facts, folder):
    """Write all facts there are to gpu.json, their page to gpu.md, and print the page."""
    page = layers_page(facts) + (model_page(facts) if "decode" in facts else [])
    page += [f"Left out: {x}." for x in facts["left_out"]]
    write_json(folder / "gpu.json", facts)
    (folder / "gpu.md").write_text("\n\n".join([*page, ""]))
    print(*page, sep="\n\n", flush=True)


def main():
    parser = Parser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5, help="begin no cell after so many")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where files go")
    parser.add_argument("--dry-run", action="store_true", help="tiny, each timed once")
    args = parser.parse_args()
    if not args.dry_run and not IS_GPU:
        raise InputError("a CUDA GPU is needed, and torch finds none")
    if not args.out.is_dir():
        raise InputError(f"there is no folder {args.out}: make it, or give another with --out")
    torch.manual_seed(0)
    scope = TINY if args.dry_run else FULL
    facts = layers_facts(scope, time.monotonic() + 60 * args.minutes)
    plot(facts, args.out / "gpu.png")
    save(facts, args.out)
    save(facts | model_facts(scope), args.out)


if __name__ == "__main__":
    raise SystemExit(run_command("bench.gpu", main))
