"""The kernels on a GPU, beside dense attention and the same step in PyTorch: times and bytes.

    python bench_gpu.py                                  # or: make bench-gpu; under ten minutes
    TRITON_INTERPRET=1 python bench_gpu.py --dry-run     # every line of it but the clock, on a CPU

One layer, bfloat16. Keys form clumps, as real keys do, and WaveIndex clusters them itself; dense
attention reads the same store. First a head is compared with float64, then each runner is captured
in a CUDA graph and replayed with a cold L2 cache; a number is the median. Cells that the time or
the memory leaves out are named as such. Writes JSON, markdown and a plot to results/.
"""
import argparse
import functools
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from triton.testing import do_bench

import kernels
from retroinfer import PLAIN, Budget, RetroConfig, WaveIndex, cluster_segment, tripartite_attention

MODELS = {"Llama-3-8B": (8, 4, 128), "Qwen2.5-7B": (4, 7, 128)}         # H, G, D
CELLS = [(tokens, batch) for tokens in (131072, 8192, 32768, 524288, 1048576)
         for batch in (1, 8, 32)]
COMPILED = {(131072, 1), (131072, 8), (8192, 1)}    # where also what takes long to compile is timed


def clumps(B, H, T, D, device):
    """Keys (B, H, T, D) of texts that dwell on a topic for a while and return to it."""
    topics = torch.randn(H, max(T // 256, 4), D, device=device)
    which = torch.randint(topics.shape[1], (B, T // 16 + 1), device=device)
    which = which.repeat_interleave(16, 1)[:, :T]                           # (B, T)
    k = torch.stack([topics[:, ids] for ids in which])                      # (B, H, T, D)
    return (k + 0.7 * torch.randn_like(k)).bfloat16()


class Cell:
    """A layer's cache for one model, context and batch, and one query of each sequence."""

    def __init__(self, model, tokens, batch, device):
        (H, G, D), config = MODELS[model], RetroConfig()
        self.name, self.tokens = {"model": model, "tokens": tokens, "batch": batch}, tokens
        self.wave = wave = WaveIndex(config, tokens, batch, hot=kernels)
        wave.allocate(torch.empty(1, H, 1, D, dtype=torch.bfloat16, device=device))
        for row in range(batch):
            wave.k_store[row, :, :tokens] = clumps(1, H, tokens, D, device)[0]
        wave.v_store.normal_()
        wave.n_tokens.fill_(tokens)
        seen = wave.k_store[:, :, tokens // 3, None]                        # (B, H, 1, D)
        self.q = (seen + torch.randn(batch, H, G, D, device=device)).bfloat16()
        wave.update()
        slot = torch.arange(wave.k_steady.shape[2], device=device)          # (W,)
        is_free = slot >= (wave.n_tokens - wave.n_indexed)[:, None]         # (B, W)
        bias = torch.zeros(is_free.shape, device=device).masked_fill(is_free, -math.inf)
        steady = wave.k_steady, wave.v_steady, bias[:, None, None].expand(-1, H, -1, -1)
        budget = Budget(*wave.caps, *config.budget(wave.n_indexed))
        self.args = self.q, steady, wave.index, budget

    def stores(self):
        """Keys and values of the whole text, in the store's order: to softmax it is all one."""
        return self.wave.k_store[:, :, :self.tokens], self.wave.v_store[:, :, :self.tokens]

    def runners(self):
        """{name: function of nothing}. Grouped: the G queries of a KV head as G tokens."""
        (B, H, G, D), (k, v) = self.q.shape, self.stores()
        flat = self.q.reshape(B, H * G, 1, D)
        stores = self.wave.k_store, self.wave.v_store
        found = {
            "kernels": lambda: kernels.attend(*self.args, stores),
            "SDPA, grouped": lambda: F.scaled_dot_product_attention(self.q, k, v),
            "SDPA, flash": lambda: flash(flat, k, v)}
        if (self.tokens, B) in COMPILED:
            ours, flex = (torch.compile(f, fullgraph=True, dynamic=False)
                          for f in (tripartite_attention, flex_attention))
            found["PyTorch, compiled"] = lambda: ours(*self.args, self.wave.fetch)
            found["FlexAttention"] = lambda: flex(flat, k, v, enable_gqa=True)
        return found

    def check(self):
        """ValueError unless a head's error to float64 is at most twice that of PyTorch, eager."""
        mine = kernels.attend(*self.args, (self.wave.k_store, self.wave.v_store))[-1, -1]
        eager = tripartite_attention(*self.args, self.wave.fetch)[-1, -1]
        truth = self.truth()
        mine, eager = ((x.double() - truth).abs().max().item() for x in (mine, eager))
        if not mine <= 2 * eager + 1e-4:        # near ties of rank may fall otherwise in float64
            raise ValueError(f"{self.name}: the kernels are {mine:.2e} off, PyTorch {eager:.2e}")
        return {"error": mine, "error_pytorch": eager}

    def truth(self):
        """Tripartite attention of the last head in float64: (G, D)."""
        q, (k_s, v_s, bias), index, budget = self.args
        q, bias = q[-1, -1].double() * q.shape[-1] ** -0.5, bias[-1, -1, 0]
        centroids, means, sizes, offsets = (x[-1, -1] for x in index)
        weight = (q @ centroids.double().mT).masked_fill(sizes == 0, -math.inf).softmax(-1).sum(0)
        order = weight.masked_fill(sizes == 0, -1).argsort(descending=True)[:budget.ranked]
        rank, size = torch.arange(len(order), device=q.device), sizes[order].long()
        fits = (rank < budget.n_retrieve[-1]) & (size.cumsum(0) <= budget.tokens)
        rest = order[~fits & (rank < budget.n_ranked[-1]) & (size > 0)]
        spans = zip(offsets[order[fits]].tolist(), size[fits].tolist(), strict=True)
        rows = torch.cat([torch.arange(o, o + n, device=q.device) for o, n in spans])
        k = torch.cat([k_s[-1, -1], self.wave.k_store[-1, -1, rows], centroids[rest]])
        v = torch.cat([v_s[-1, -1], self.wave.v_store[-1, -1, rows], means[rest]])
        bias = torch.cat([bias.double(), torch.zeros_like(rows).double(), sizes[rest].log()])
        return (q @ k.double().mT + bias).softmax(-1) @ v.double()

    def bytes(self):
        """{kernel: bytes it must move}, and what it takes to run each alone."""
        launches, launch = [], kernels.launch

        def note(kernel, grid, *args, **tile):
            launch(kernel, grid, *args, **tile)
            again = functools.partial(launch, kernel, grid, *args, **tile)
            names = dict(zip(kernel.arg_names, args, strict=False))
            launches.append((kernel.__name__.removesuffix("_kernel"), again, names | tile))

        kernels.launch = note
        try:
            self.runners()["kernels"]()
        finally:
            kernels.launch = launch
        return {name: (traffic(self, name, names, launches), again)
                for name, again, names in launches}


def traffic(cell, name, a, launches):
    """Bytes that a kernel must read and write, by what its docstring counts and the cell holds."""
    (B, H, G, D), e, (_, steady, index, budget) = cell.q.shape, cell.q.element_size(), cell.args
    live = int((index.sizes > 0).sum())
    if name == "rank":
        return live * (D * e + 4 * G) + 4 * index.sizes.numel()
    if name == "weigh":
        return live * 4 * G + 8 * index.sizes.numel()
    fits = next(names["fits"] for kind, _, names in launches if kind == "pack")
    clusters, tokens = fits.sum((0, 1)).tolist()
    if name == "pack":
        return 20 * clusters + 4 * tokens
    S = next(names["stats"].shape[2] for kind, _, names in launches if kind == "attend")
    parts = 4 * B * H * S * G * (D + 2)
    if name == "combine":
        return parts + B * H * G * D * e
    n_steady = int((steady[2] > -math.inf).sum())
    n_estimated = int(budget.n_ranked.sum()) * H - clusters
    return (2 * D * e * (n_steady + tokens) + 4 * tokens
            + n_estimated * (D * e + 12 + 4 * G) + parts)


def flash(q, k, v):
    """FlashAttention, as a user of SDPA calls it: every query head a head of its own."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if q.is_cuda else SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def median_ms(run):
    """Median milliseconds of a CUDA-graph replay of run(), the L2 cache cleared before each."""
    run(), run(), torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return do_bench(graph.replay, warmup=10, rep=60, return_mode="median")


def copy_bandwidth(device, clock):
    """Bytes a second, read and written, of a copy of 1 GiB."""
    x = torch.empty(2**20 if device.type == "cpu" else 2**30, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.numel() / clock(lambda: y.copy_(x)) * 1e3


def measure(cell, clock, bandwidth):
    """The facts of a cell: errors, milliseconds of each runner, bytes and share of each kernel."""
    facts = cell.name | cell.check()
    facts["ms"] = {name: clock(run) for name, run in cell.runners().items()}
    facts["kernels"] = {}
    for name, (n_bytes, again) in cell.bytes().items():
        ms = clock(again)
        facts["kernels"][name] = {"ms": ms, "bytes": n_bytes,
                                  "of_bandwidth": n_bytes / (ms * 1e-3) / bandwidth}
    need = sum(facts["kernels"][name]["bytes"] for name in ("rank", "attend"))
    facts["of_bandwidth"] = need / (facts["ms"]["kernels"] * 1e-3) / bandwidth
    return facts


def index_build(model, device, clock):
    """Milliseconds to cluster a segment, all heads, with the kernels and with PyTorch."""
    (H, _, D), config = MODELS[model], RetroConfig()
    k = clumps(1, H, config.segment, D, device)
    return {"model": model, "segment": config.segment,
            "ms": {name: clock(lambda hot=hot: cluster_segment(k, k, config, hot))
                   for name, hot in (("kernels", kernels), ("PyTorch, eager", PLAIN))}}


def markdown(facts):
    """The tables for a person."""
    lines = [facts["where"], "", "| model | tokens | batch | runner | ms | of copy bandwidth |",
             "|---|---|---|---|---|---|"]
    for cell in facts["cells"]:
        head = f"| {cell['model']} | {cell['tokens']:,} | {cell['batch']} |"
        shares = {"kernels": cell["of_bandwidth"]}
        lines += [f"{head} {name} | {ms:.3f} | {f'{shares[name]:.0%}' if name in shares else ''} |"
                  for name, ms in cell["ms"].items()]
        lines += [f"{head} ({name}) | {x['ms']:.3f} | {x['of_bandwidth']:.0%} |"
                  for name, x in cell["kernels"].items()]
    lines += ["", "| model | tokens indexed | hot functions | ms |", "|---|---|---|---|"]
    lines += [f"| {x['model']} | {x['segment']:,} | {name} | {ms:.2f} |"
              for x in facts["index"] for name, ms in x["ms"].items()]
    return "\n".join([*lines, "", *(f"Left out: {x}." for x in facts["left_out"]), ""])


def plot(facts, path):
    """Milliseconds of a step over the context, one line a runner, one panel a model: batch 1."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    _, axes = plt.subplots(1, len(MODELS), figsize=(10, 4), sharey=True)
    for ax, model in zip(axes, MODELS, strict=True):
        cells = sorted((c for c in facts["cells"] if (c["model"], c["batch"]) == (model, 1)),
                       key=lambda c: c["tokens"])
        for name in dict.fromkeys(name for c in cells for name in c["ms"]):
            points = [(c["tokens"], c["ms"][name]) for c in cells if name in c["ms"]]
            ax.loglog(*zip(*points, strict=True), marker="o", label=name)
        ax.set(title=f"{model}, batch 1", xlabel="tokens", ylabel="ms a layer")
    axes[0].legend()
    plt.savefig(path, dpi=110, bbox_inches="tight")


def collect(device, cells, clock, minutes):
    """All facts, as many cells as memory and minutes allow."""
    end, bandwidth = time.monotonic() + 60 * minutes, copy_bandwidth(device, clock)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU, not timed"
    facts = {"where": f"{name}, torch {torch.__version__}, Triton {triton.__version__}, bfloat16, "
                      f"copy {bandwidth / 1e9:.0f} GB/s", "copy_bytes_per_s": bandwidth,
             "index": [index_build(model, device, clock) for model in MODELS],
             "cells": [], "left_out": []}
    for (tokens, batch), model in ((cell, model) for cell in cells for model in MODELS):
        H, _, D = MODELS[model]
        need = 3.5 * batch * tokens * H * D * 2                 # K, V, the index and what builds it
        free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else need
        why = "time" if time.monotonic() > end else "memory" if need > 0.9 * free else None
        if why and device.type == "cuda":
            facts["left_out"].append(f"{model}, {tokens:,} tokens, batch {batch} ({why})")
            continue
        facts["cells"].append(measure(Cell(model, tokens, batch, device), clock, bandwidth))
        print(json.dumps(facts["cells"][-1]), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return facts


def once(run):
    """The clock of a dry run: run() must run."""
    run()
    return 1.0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8, help="begin no cell after so many")
    parser.add_argument("--out", default="results", help="directory for gpu.json, .md and .png")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU, without a clock")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        print("bench_gpu: a CUDA GPU is needed, and torch finds none", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    device = torch.device("cpu" if args.dry_run else "cuda")
    cells, clock = ([(600, 1), (700, 2)], once) if args.dry_run else (CELLS, median_ms)
    facts, out = collect(device, cells, clock, args.minutes), Path(args.out)
    (out / "gpu.json").write_text(json.dumps(facts, indent=1) + "\n")
    (out / "gpu.md").write_text(markdown(facts))
    plot(facts, out / "gpu.png")
    print(markdown(facts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
