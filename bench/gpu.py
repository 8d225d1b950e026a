"""The kernels on a GPU, beside dense attention and the same step in PyTorch: times and bytes.

    python -m bench.gpu                                  # or: make bench-gpu; under ten minutes
    TRITON_INTERPRET=1 python -m bench.gpu --dry-run     # tiny, each timed once; also on a CPU

First one layer, bfloat16. Keys form clumps, as real keys do, and WaveIndex clusters them itself;
dense attention reads the same store. A head is compared with float64, then each runner is captured
in a CUDA graph and replayed with a cold L2 cache; a number is the median. Cells left out for want
of time or memory are named. Then the whole model (bench_gpu_model.py). Writes gpu.json, gpu.md and
gpu.png to results/. Needs matplotlib and einops.
"""
import argparse
import functools
import itertools
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from triton.testing import do_bench

import kernels
from bench import gpu_model as bench_gpu_model
from bench.gpu_model import DEVICE, DTYPE, clumps, fill, once_ms
from retroinfer import PLAIN, RetroConfig, WaveIndex, attend, cluster_segment, halves, hope

MODELS = {"Llama-3-8B": (8, 4, 128), "Qwen2.5-7B": (4, 7, 128)}         # H, G, D
CELLS = [(tokens, batch) for tokens in (131072, 8192, 32768, 524288, 1048576)
         for batch in (1, 8, 32)]
COMPILED = {(131072, 1), (131072, 8), (8192, 1)}    # where also what takes long to compile is timed


class Cell:
    """A layer's cache for one model, context and batch, and a step on it.

    `args` are those of kernels.attend, caught where WaveIndex calls it.
    """

    def __init__(self, model, tokens, batch):
        H, G, D = MODELS[model]
        self.name, self.tokens = {"model": model, "tokens": tokens, "batch": batch}, tokens
        self.wave = wave = WaveIndex(RetroConfig(), tokens + 1, batch, hot=kernels)
        fill(wave, H, G, D, tokens)
        k, v = (x[:, :, tokens // 3, None].clone() for x in (wave.k_store, wave.v_store))
        q = k + torch.randn(batch, H, G, D, device=DEVICE).to(DTYPE)        # (B, H, G, D)
        wave.hot = SimpleNamespace(attend=lambda *args: setattr(self, "args", args) or args[0])
        wave.decode(q.view(batch, H * G, 1, D), k, v)

    def runners(self):
        """{name: function of nothing}. Grouped: the G queries of a KV head as G tokens."""
        q, k, v = self.args[0], *(x[:, :, :self.tokens] for x in self.args[4])
        flat = q.flatten(1, 2)[:, :, None]                                  # (B, H*G, 1, D)
        found = {"kernels": lambda: kernels.attend(*self.args),
                 "SDPA, grouped": lambda: F.scaled_dot_product_attention(q, k, v),
                 "SDPA, flash": lambda: flash(flat, k, v)}
        if (self.tokens, len(q)) in COMPILED:
            ours, flex = (torch.compile(f, fullgraph=True, dynamic=False)
                          for f in (attend, flex_attention))
            found["PyTorch, compiled"] = lambda: ours(*self.args)
            found["FlexAttention"] = lambda: flex(flat, k, v, enable_gqa=True)
        return found

    def check(self):
        """ValueError unless a head's error to float64 is at most twice that of PyTorch, eager."""
        mine = kernels.attend(*self.args)[-1, -1]
        eager, truth = attend(*self.args)[-1, -1], self.truth()
        mine, eager = ((x.double() - truth).abs().max().item() for x in (mine, eager))
        if not mine <= 2 * eager + 1e-4:        # near ties of rank may fall otherwise in float64
            raise ValueError(f"{self.name}: the kernels are {mine:.2e} off, PyTorch {eager:.2e}")
        return {"error": mine, "error_pytorch": eager}

    def truth(self):
        """Tripartite attention of the last head in float64: (G, D)."""
        q, budget = self.args[0][-1, -1].double() * self.args[0].shape[-1] ** -0.5, self.args[3]
        (k_s, v_s, bias), (*vectors, sizes, offsets, spreads, scales), (k_all, v_all) = (
            [x[-1, -1] for x in self.args[i]] for i in (1, 2, 4))
        centroids, means = (torch.cat(halves(x), -1).double() * scales[:, i, None]
                            for i, x in enumerate(vectors))
        near = q @ k_s.double().mT + bias                                           # (G, W)
        fine = 127 / q.abs().amax(-1, keepdim=True)                                 # (G, 1)
        logits = (q * fine).round() / fine @ centroids.mT                           # (G, C)
        half = q.square().sum(-1, keepdim=True) / 2                                 # (G, 1)
        mass = logits + (sizes * (1 + half * spreads)).log()
        one = SimpleNamespace(sizes=sizes[None, None], spreads=spreads[None, None])
        share = torch.cat([logits + hope(q[None, None], one)[0, 0], near], -1).softmax(-1)
        order = share.sum(0)[:len(sizes)].argsort(descending=True)[:budget.ranked]
        rank, size = torch.arange(len(order), device=q.device), sizes[order].long()
        fits = (rank < budget.n_retrieve[-1, -1]) & (size.cumsum(0) <= budget.n_tokens[-1, -1])
        rest = order[~fits & (rank < budget.n_ranked[-1, -1]) & (size > 0)]
        spans = zip(offsets[order[fits]].tolist(), size[fits].tolist(), strict=True)
        rows = torch.cat([torch.arange(o, o + n, device=q.device) for o, n in spans])
        x = torch.cat([near, q @ k_all[rows].double().mT, mass[:, rest]], -1).softmax(-1)
        v, weights = means[order[fits]].repeat_interleave(size[fits], 0), x[:, len(k_s):].sum(0)
        best = weights[:len(rows)].argsort(descending=True)[:budget.part(budget.room)[-1, -1]]
        v[best] = v_all[rows[best]].double()
        return x @ torch.cat([v_s.double(), v, means[rest]])

    def launches(self):
        """{kernel: (function that runs it alone, its last arguments by name)} of a step."""
        found, launch = {}, kernels.launch

        def note(kernel, grid, *args, **tile):
            launch(kernel, grid, *args, **tile)
            name = kernel.__name__.removesuffix("_kernel")
            run, before = functools.partial(launch, kernel, grid, *args, **tile), found.get(name)
            found[name] = ((lambda: (before[0](), run())) if before else run,
                           dict(zip(kernel.arg_names, args, strict=False)))

        with mock.patch.object(kernels, "launch", note):
            kernels.attend(*self.args)
        return found

    def traffic(self, launches):
        """{kernel: bytes it must read and write}, by the count in its docstring."""
        q, steady, index, budget, _ = self.args
        (B, H, G, D), e, C = q.shape, q.element_size(), index.sizes.numel()
        live, n_steady = int((index.sizes > 0).sum()), int((steady[2] > -math.inf).sum())
        fits, N = launches["pack"][1]["fits"], B * H * budget.tokens
        clusters, tokens = fits.sum((0, 1)).tolist()
        given = int(fits[..., 1].minimum(budget.part(budget.room)).sum())
        parts = 4 * B * H * G * (D + 2) * launches["attend"][1]["stats"].shape[2]
        guessed = int(budget.n_ranked.expand(B, H).sum()) - clusters
        return {"rank": live * (D // 2 + 4) + C * (4 + 8 * G) + n_steady * (D * e + 4),
                "weigh": C * (4 * G + 4) + 4 * (tokens * G + N), "pack": 24 * clusters + 4 * tokens,
                "look": (n_steady + tokens) * (D * e + 4) + 4 * G * (n_steady + tokens)
                + guessed * (4 * G + 8), "mark": 12 * given, "combine": parts + q.numel() * e,
                "attend": n_steady * (D * e + 4 * G + 4) + given * (D * e + 12) + parts
                + tokens * (4 * G + 4) + clusters * (D // 2 + 22) + guessed * (D // 2 + 14 + 4 * G)}


def flash(q, k, v):
    """FlashAttention, as a user of SDPA calls it: every query head a head of its own."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if q.is_cuda else SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def median_ms(run, rep=60):
    """Median milliseconds of a CUDA-graph replay of run() over `rep` ms, each with a cold L2."""
    run(), run(), torch.cuda.synchronize()      # compiles, and allocates what graphs may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return do_bench(graph.replay, warmup=10, rep=rep, return_mode="median")


def measure(cell, clock, bandwidth):
    """The facts of a cell: errors, milliseconds of each runner, bytes and share of each kernel."""
    facts = cell.name | cell.check()
    facts["ms"] = {name: clock(run) for name, run in cell.runners().items()}
    launches, facts["kernels"] = cell.launches(), {}
    traffic = cell.traffic(launches)
    for name, (run, _) in launches.items():
        facts["kernels"][name] = {"ms": (ms := clock(run)), "bytes": traffic[name],
                                  "of_bandwidth": traffic[name] / ms * 1e3 / bandwidth}
    need = traffic["rank"] + traffic["look"] + traffic["attend"]
    return facts | {"of_bandwidth": need / facts["ms"]["kernels"] * 1e3 / bandwidth}


def index_build(model, L, clock):
    """Milliseconds to cluster a segment of L tokens, all heads, with the kernels and without."""
    k = clumps(1, MODELS[model][0], L, MODELS[model][2])
    return {"model": model, "tokens": L, "ms": {
        name: clock(functools.partial(cluster_segment, k, k, RetroConfig(), hot))
        for name, hot in (("kernels", kernels), ("PyTorch, eager", PLAIN))}}


def markdown(facts):
    """The tables for a person."""
    lines = [facts["where"], "", "| model | tokens | batch | runner | ms | of copy bandwidth |",
             "|---|---|---|---|---|---|"]
    for cell in facts["cells"]:
        rows = [(name, ms, "") for name, ms in cell["ms"].items()]
        rows[0] = *rows[0][:2], f"{cell['of_bandwidth']:.0%}"           # that of the kernels
        rows += [(f"({k})", x["ms"], f"{x['of_bandwidth']:.0%}")
                 for k, x in cell["kernels"].items()]
        lines += [f"| {cell['model']} | {cell['tokens']:,} | {cell['batch']} | {name} | {ms:.3f} "
                  f"| {share} |" for name, ms, share in rows]
    lines += ["", "| model | tokens indexed | hot functions | ms |", "|---|---|---|---|"]
    lines += [f"| {x['model']} | {x['tokens']:,} | {name} | {ms:.2f} |"
              for x in facts["index"] for name, ms in x["ms"].items()]
    if "decode" in facts:
        lines += ["", *bench_gpu_model.markdown(facts, facts["copy_bytes_per_s"])]
    return "\n".join([*lines, "", *(f"Left out: {x}." for x in facts["left_out"]), ""])


def plot(facts, path):
    """Milliseconds of a step over the context, one line a runner, one panel a model: batch 1."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    _, axes = plt.subplots(1, len(MODELS), figsize=(10, 4), sharey=True)
    for ax, model in zip(axes, MODELS, strict=True):
        points = sorted((name, c["tokens"], ms) for c in facts["cells"] if c["batch"] == 1
                        and c["model"] == model for name, ms in c["ms"].items())
        for name, group in itertools.groupby(points, lambda point: point[0]):
            ax.loglog(*list(zip(*group, strict=True))[1:], marker="o", label=name)
        ax.set(title=f"{model}, batch 1", xlabel="tokens", ylabel="ms a layer")
    axes[0].legend()
    plt.savefig(path, dpi=110, bbox_inches="tight")


def collect(cells, L, clock, end):
    """All facts, as many cells as memory allows, none begun after `end`."""
    x = torch.empty(2, 2**29 if DEVICE.type == "cuda" else 2**20, dtype=torch.uint8, device=DEVICE)
    bandwidth = x.numel() / clock(lambda: x[0].copy_(x[1])) * 1e3           # read and written
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "a dry run on a CPU"
    facts = {"where": f"{name}, torch {torch.__version__}, Triton {triton.__version__}, copy "
             f"{bandwidth / 1e9:.0f} GB/s", "copy_bytes_per_s": bandwidth, "cells": [],
             "index": [index_build(model, L, clock) for model in MODELS], "left_out": []}
    for (tokens, batch), (model, (H, _, D)) in itertools.product(cells, MODELS.items()):
        need = 3.5 * batch * tokens * H * D * 2     # K and V, the index, and what its build takes
        free = torch.cuda.mem_get_info()[0] if DEVICE.type == "cuda" else math.inf
        if time.monotonic() > end or need > 0.9 * free:
            facts["left_out"].append(f"{model}, {tokens:,} tokens, batch {batch}: it needs "
                                     f"{need / 2**30:.0f} GiB, or the time was over")
            continue
        facts["cells"].append(measure(Cell(model, tokens, batch), clock, bandwidth))
        print(json.dumps(facts["cells"][-1]), flush=True)
        torch.cuda.empty_cache()
    return facts


def save(facts, folder):
    """Write gpu.json and gpu.md, and print the latter."""
    (folder / "gpu.json").write_text(json.dumps(facts, indent=1) + "\n")
    (folder / "gpu.md").write_text(markdown(facts))
    print(markdown(facts), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5, help="begin no cell after so many")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where files go")
    parser.add_argument("--dry-run", action="store_true", help="tiny, each timed once")
    args = parser.parse_args()
    if not args.dry_run and DEVICE.type == "cpu":
        print("bench_gpu: a CUDA GPU is needed, and torch finds none", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    plan = CELLS, 8192, median_ms
    if args.dry_run:
        plan = [(410, 1)], 64, once_ms
        MODELS.update(dict.fromkeys(MODELS, (1, 3, 16)))
    facts = collect(*plan, time.monotonic() + 60 * args.minutes)
    plot(facts, args.out / "gpu.png")
    save(facts, args.out)
    save(facts | bench_gpu_model.measure(args.dry_run, plan[-1]), args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
