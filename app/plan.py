"""How many bytes a run will take on the device and on the host, before any is allocated.

The model, its caches and one layer's work are made on PyTorch's meta device, where tensors have
shapes and no memory: what is counted is what the library itself would allocate.

    python -m app.plan Llama-3.1-8B --capacity 131072 --memory 24

    table = plan(Run(shape("Llama-3.1-8B"), capacity=131072, cache_ratio=0.05, chunk=2048))
    print(table)                            # GiB by part; table.device, table.host in bytes

Activations are the most that is alive at once within a layer, beside what is allocated for good:
in a prefill of `chunk` tokens that fills a segment, whose attention keeps nothing but its output,
and in an eager step (a compiled one takes less) whose heads retrieve the most they may, with the
execution buffer. The peak has the larger of the two.

Does not include: what the driver, its libraries and fragmentation take (leave half a GiB or more),
tokenizers, files read while weights are loaded, and products in a wider dtype on a CPU without
instructions for the model's.
"""
import functools
import math
import os
import sys
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from app.cli import Parser, choose_device, settle
from app.settings import parse_settings
from buffer import RATIO, WaveBuffer, check_ratio
from checkpoint import config_from_json, open_checkpoint
from generate import eager_step
from model import DEFAULT_NAME, Llama, ModelConfig, default_model
from retroinfer import RetroConfig, Store, WaveIndex, cluster_segment, round_up

GIB = 2**30
REMEDIES = {    # what is tried where a run does not fit
    "--prefill-chunk 2048": {"chunk": 2048},
    "--offload": {"cache_ratio": RATIO},
    "--offload --prefill-chunk 2048": {"cache_ratio": RATIO, "chunk": 2048},
    "--offload --store FILE --prefill-chunk 2048": {"cache_ratio": RATIO, "chunk": 2048,
                                                    "in_file": True}}

SHAPES = {      # as published: kind, vocabulary, hidden, MLP, layers, heads, kv heads
    "Llama-3.1-8B": ("llama", 128256, 4096, 14336, 32, 32, 8),
    "Llama-3.1-70B": ("llama", 128256, 8192, 28672, 80, 64, 8),
    "Qwen2.5-7B": ("qwen2", 152064, 3584, 18944, 28, 28, 4),
    "Qwen2.5-72B": ("qwen2", 152064, 8192, 29568, 80, 64, 8)}
KEYS = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads")


def shape(name):
    """ModelConfig of a named shape, the default model, a directory or a .gguf file, or ValueError.

    Of a checkpoint no weight is read.
    """
    if name in SHAPES:
        numbers = dict(zip(KEYS, SHAPES[name], strict=True)) | {"max_position_embeddings": 131072}
        return ModelConfig(**config_from_json(numbers))
    if name != DEFAULT_NAME and not Path(name).exists():
        raise ValueError(f"no shape or model is named {name}: give a path, or one of "
                         f"{', '.join([DEFAULT_NAME, *SHAPES])}")
    return ModelConfig(**open_checkpoint(default_model() if name == DEFAULT_NAME else
                                         Path(name))[0])


@dataclass(frozen=True)
class Run:
    """What is to be run. Bytes depend on nothing else."""
    model: ModelConfig
    capacity: int                       # tokens of a sequence, those generated too
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    chunk: int | None = None            # tokens a prefill reads at a time; None: the whole prompt
    cache_ratio: float | None = None    # of an offloaded store, on the device; None: no offload
    in_file: bool = False               # the offloaded store is in a file
    is_cpu: bool = False                # device and host share one memory
    retro: RetroConfig = field(default_factory=RetroConfig)


@dataclass(frozen=True)
class Plan:
    """Bytes by part. The activations of a prefill and of a step are never there together."""
    run: Run
    device: dict
    host: dict
    prefill: int
    step: int

    @property
    def peak(self):
        """Bytes on the device when most are in use."""
        return sum(self.device.values()) + max(self.prefill, self.step)

    def fits(self, memory, host=math.inf):
        """Whether so many bytes are enough of the device, and of the host."""
        on_host = 0 if self.run.in_file else sum(self.host.values())
        return (self.peak + on_host <= min(memory, host) if self.run.is_cpu
                else self.peak <= memory and on_host <= host and not self.run.in_file)

    def __str__(self):
        rows = [(part, self.device.get(part, 0), self.host.get(part, 0))
                for part in dict.fromkeys([*self.device, *self.host])]
        chunk = min(self.run.chunk or self.run.capacity, self.run.capacity)
        rows += [(f"activations, prefill of {chunk:,}", self.prefill, 0),
                 ("activations, step", self.step, 0),
                 ("peak", self.peak, sum(self.host.values()))]
        lines = [f"{'GiB':<33}{'device':>9}{'host':>9}"]
        lines += [f"{part:<33}" + "".join(f"{n / GIB:>9.3f}" if n else " " * 9 for n in both)
                  for part, *both in rows]
        return "\n".join(lines)


# ---------------------------------------------------------------- bytes without memory

class Live(TorchDispatchMode):
    """Counts the bytes of storages made under it: those alive now, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = set(map(id, storages((args, kwargs))))
        for storage in storages(out):
            if id(storage) not in given:
                self.grow(storage.nbytes())
                weakref.finalize(storage, self.grow, -storage.nbytes())
        return out

    def grow(self, n):
        self.now += n
        self.most = max(self.most, self.now)

    def peak(self, work):
        """Bytes that work() has alive at most, beyond those alive when it is called."""
        start = self.most = self.now
        work()
        return self.most - start


def storages(tree):
    return {x.untyped_storage() for x in tree_iter(tree) if isinstance(x, torch.Tensor)}


def nbytes(tree):
    """Bytes of the tensors in nested containers; what is shared counts once."""
    return sum(storage.nbytes() for storage in storages(tree))


def on_meta(config, dtype):
    """The model without memory, and with one layer: all are alike."""
    with torch.device("meta"):
        model = Llama(replace(config, num_hidden_layers=1)).to(dtype).requires_grad_(False)
    model.rope.to("meta")
    if config.tied:
        model.lm_head.weight = model.embed_tokens.weight
    return model


def weights(config, dtype=torch.bfloat16):
    """Bytes of the parameters."""
    model = on_meta(config, dtype)
    layers = (config.num_hidden_layers - 1) * nbytes(list(model.layers.parameters()))
    return layers + nbytes(list(model.parameters()))


def cache_on_meta(run):
    """The cache of one layer, allocated without memory."""
    k = torch.empty(1, run.model.num_key_value_heads, 0, run.model.head_dim, dtype=run.dtype,
                    device="meta")
    shape = run.batch, k.shape[1], round_up(run.capacity), k.shape[3]
    store = Store if run.cache_ratio is None else functools.partial(
        WaveBuffer, memory=(k.new_empty(shape) for _ in range(2)), cache_ratio=run.cache_ratio)
    cache = WaveIndex(run.retro, run.capacity, run.batch, make_store=store)
    cache.allocate(k)
    return cache


def plan(run):
    """The Plan of a Run."""
    model, cache = on_meta(run.model, run.dtype), cache_on_meta(run)
    device = {name: n * run.model.num_hidden_layers for name, n in cache.nbytes().items()}
    host = {} if run.cache_ratio is None else {"store": device.pop("store")}
    return Plan(run, {"weights": weights(run.model, run.dtype)} | device, host,
                prefill_bytes(model, cache, run), step_bytes(model, cache))


def prefill_bytes(model, cache, run):
    """Activations of a prefill's last chunk in one layer, which fills a segment."""
    ids = torch.empty(1, min(run.chunk or run.capacity, run.capacity), dtype=torch.int64,
                      device="meta")
    n = min(run.retro.segment, run.capacity) // run.retro.cluster * run.retro.cluster
    segment = cache.store.k[:1, :, :n]                                      # (1, H, L, D)

    def attend(q, k, v):
        o = torch.empty_like(q)
        if run.is_cpu and q.shape[2] < run.capacity:    # the mask: 8 bytes while it is made, a
            size = 9 + k.element_size()                 # bool, and one as the keys
            mask = ids.new_empty(q.shape[2], run.capacity, size, dtype=torch.uint8)
            del mask
        cluster_segment(segment, segment, run.retro)
        return o

    def work():         # K and V of a layer are brought, while those of the one before go back
        past = [torch.empty_like(x[:1]) for x in 2 * (cache.store.k, cache.store.v)
                if run.cache_ratio is not None and not run.is_cpu]
        model.logits(model(ids, ids, [attend])[:, -1])
        del past

    with Live() as live:
        return live.peak(work)


def step_bytes(model, cache):
    """Activations of an eager step in one layer."""
    cache.is_in_store = [False] * len(cache.is_in_store)
    token = torch.empty(len(cache.is_in_store), dtype=torch.int64, device="meta")
    with Live() as live:
        return live.peak(lambda: eager_step(model, [cache], token))


# ---------------------------------------------------------------- what would fit

def fit(run, memory, host=math.inf):
    """The Plan of a Run if it fits so many bytes; else ValueError says what would fit."""
    table = plan(run)
    if table.fits(memory, host):
        return table
    what_fits = [how for how, changes in REMEDIES.items()
                 if plan(replace(run, **changes)).fits(memory, host)][:2]
    if n := largest_capacity(run, memory, host):
        what_fits.append(f"--capacity {n}")
    on_host, there = sum(table.host.values()) / GIB, f"{memory / GIB:.1f}"
    there += f" and {host / GIB:.1f}" if host < math.inf else ""
    what_fits = ", or ".join(what_fits) or ("nothing here, the weights alone are "
                                            f"{table.device['weights'] / GIB:.1f} GiB")
    raise ValueError(f"{run.capacity:,} tokens x {run.batch} need {table.peak / GIB:.1f} GiB and "
                     f"{on_host:.1f} on the host, there are {there}; what fits: {what_fits}")


def largest_capacity(run, memory, host=math.inf):
    """The most tokens, in thousands of 1,024, that fit; 0 if none do."""
    low, high = 0, run.capacity // 1024
    while low < high:
        middle = (low + high + 1) // 2
        fits = plan(replace(run, capacity=1024 * middle)).fits(memory, host)
        low, high = (middle, high) if fits else (low, middle - 1)
    return 1024 * low


def installed(device):
    """Bytes of memory of this machine's device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------- command line

def parse_args(argv):
    parser = Parser(prog="python -m app.plan", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("shape", nargs="?", default=DEFAULT_NAME, metavar="SHAPE",
        help=f"{', '.join(SHAPES)}, a directory or a .gguf file (default {DEFAULT_NAME})")
    add("--capacity", metavar="N", type=int, help="tokens of a sequence; default: the context")
    add("--batch", metavar="N", type=int, default=1, help="sequences")
    add("--memory", metavar="GIB", type=float, help="of the device; default: this machine's")
    add("--dtype", choices=["float32", "bfloat16", "float16"])
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1; default: a GPU if any")
    add("--prefill-chunk", metavar="N", type=int, help="tokens read at a time")
    add("--offload", action="store_true", help="keep K and V in host memory")
    add("--cache-ratio", metavar="X", type=float, default=RATIO,
        help="share of them on the device (default %(default)s)")
    add("--store", action="store_true", help="keep K and V in a file")
    add("--set", metavar="NAME=VALUE", nargs="+", action="extend", default=[],
        help="numbers of the method, as in retroinfer.py")
    args = parser.parse_args(argv)
    for name in ("prefill_chunk", "capacity", "batch"):
        if (given := getattr(args, name)) is not None and given < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {given}: at least 1 is needed")
    if args.memory is not None and not args.memory > 0:
        raise ValueError(f"--memory is {args.memory}: give GiB above 0")
    if args.store and not args.offload:
        raise ValueError("--store goes with --offload")
    check_ratio(args.cache_ratio)
    args.set = parse_settings(args.set)
    return args


def show(args):
    """Print the plan of a run; ValueError if it cannot fit."""
    device, is_here = choose_device(args.device), not (args.shape in SHAPES or args.memory)
    is_cpu = is_here and device.type == "cpu"
    dtype = getattr(torch, args.dtype or ("float32" if is_cpu else "bfloat16"))
    config = shape(args.shape)
    run = Run(config, args.capacity or config.context, args.batch, dtype, args.prefill_chunk,
              args.cache_ratio if args.offload else None, args.store, is_cpu,
              settle(args, config.qkv_bias))
    print(f"{args.shape}, {run.capacity:,} tokens x {run.batch}, "
          f"{str(dtype).removeprefix('torch.')}\n{plan(run)}")
    memory = args.memory * GIB if args.memory else installed(device)
    table = fit(run, memory, installed(torch.device("cpu")) if is_here else math.inf)
    print(f"fits: {(memory - table.peak) / GIB:.1f} GiB of {memory / GIB:.1f} left")


def main(argv=None):
    """Exit status: 0, or 2 behind one line that says what was given and what to do."""
    try:
        show(parse_args(argv))
    except (ValueError, ImportError) as e:
        print(f"plan: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
