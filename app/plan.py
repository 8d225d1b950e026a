"""How many bytes a run will take on the device and on the host, before any is allocated.

The model, its caches and the work of one layer run on PyTorch's meta device, where tensors have
shapes and no memory. So the plan counts what the library itself would allocate.

    python -m app.plan Llama-3.1-8B --capacity 131072 --memory 24

    table = plan(Run(shape("Llama-3.1-8B"), capacity=131072, cache_ratio=0.05, chunk=2048))
    print(table)                            # GiB by part; table.device, table.host in bytes

The command line rounds the capacity that it chooses up, by an eighth at most and to 1,024 tokens at
least, so that few graphs must be compiled.

Activations are the bytes that one layer needs at once while it works. In a prefill: for `chunk`
tokens that complete a segment, with an attention that keeps only its output. In a decode step: for
an eager step (a compiled one needs less) in which every head retrieves the most it may, with the
execution buffer. The peak counts the larger of the two.

Does not include: the driver, its libraries and fragmentation (leave half a GiB or more free),
tokenizers, files that are read while weights are loaded, and copies in a wider dtype on a CPU that
cannot multiply in the model's dtype.
"""
import functools
import itertools
import math
import os
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from app.choose import choose_device
from app.cli import check_counts, flag, make_config
from app.command import Parser, run_command
from app.settings import add_set, take_settings
from buffer import RATIO, WaveBuffer, check_ratio, pinned_blocks
from checkpoint import config_from_json, open_checkpoint
from generate import CHUNK, eager_step
from model import DEFAULT_NAME, NAMED, Llama, ModelConfig, fast_dtype, find, make_caches
from retroinfer import (
    MASK,
    InputError,
    RetroConfig,
    WaveIndex,
    cluster_segment,
    round_up,
)

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
    """ModelConfig of a named shape, the default model, a directory or a .gguf file.

    No weight is read. InputError if there is no such name or file.
    """
    if name in SHAPES:
        numbers = dict(zip(KEYS, SHAPES[name], strict=True)) | {"max_position_embeddings": 131072}
        return ModelConfig(**config_from_json(numbers))
    if name not in (DEFAULT_NAME, *NAMED) and not Path(name).exists():
        raise InputError(f"no shape or model is named {name}: give a path, or one of "
                         f"{', '.join([DEFAULT_NAME, *NAMED, *SHAPES])}")
    config, _, _ = open_checkpoint(find(name))
    return ModelConfig(**config)


@dataclass(frozen=True)
class Run:
    """All that the bytes of a run depend on."""
    model: ModelConfig
    capacity: int                       # tokens of a sequence, read and generated
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    chunk: int = CHUNK                  # tokens a prefill reads at a time
    cache_ratio: float | None = None    # of an offloaded store, on the device; None: no offload
    in_file: bool = False               # the offloaded store is in a file
    is_cpu: bool = False                # device and host share one memory
    retro: RetroConfig = field(default_factory=RetroConfig)


@dataclass(frozen=True)
class Plan:
    """Bytes by part. A prefill and a step never need their activations at the same time."""
    run: Run
    device: dict
    host: dict
    prefill: int
    step: int

    @property
    def peak(self):
        """The most bytes that are ever in use on the device."""
        return sum(self.device.values()) + max(self.prefill, self.step)

    def fits(self, memory, host=math.inf):
        """Whether so many bytes of device memory, and of host memory, are enough."""
        on_host = 0 if self.run.in_file else sum(self.host.values())
        if self.run.is_cpu:
            return self.peak + on_host <= min(memory, host)
        return self.peak <= memory and on_host <= host and not self.run.in_file

    def __str__(self):
        rows = [(part, self.device.get(part, 0), self.host.get(part, 0))
                for part in dict.fromkeys([*self.device, *self.host])]
        chunk = min(self.run.chunk, self.run.capacity)
        rows += [(f"activations, prefill of {chunk:,}", self.prefill, 0),
                 ("activations, step", self.step, 0),
                 ("peak", self.peak, sum(self.host.values()))]
        lines = [f"{'GiB':<33}{'device':>9}{'host':>9}"]
        lines += [f"{part:<33}{gib(device):>9}{gib(host):>9}" for part, device, host in rows]
        return "\n".join(lines)


def gib(n):
    """Bytes as a person reads them in the table: nothing for 0."""
    return f"{n / GIB:.3f}" if n else ""


# ---------------------------------------------------------------- bytes without memory

class ByteCounter(TorchDispatchMode):
    """Counts the bytes of the storages that are made in its context and still alive."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = set(map(id, storages((args, kwargs))))
        for storage in storages(out):
            if id(storage) not in given:
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out

    def add(self, n):
        self.now += n
        self.most = max(self.most, self.now)

    def peak(self, work):
        """The most bytes that are alive during work(), without those alive before it."""
        start = self.most = self.now
        work()
        return self.most - start


def storages(tree):
    return {x.untyped_storage() for x in tree_iter(tree) if isinstance(x, torch.Tensor)}


def nbytes(tree):
    """Bytes of the tensors in nested containers. Tensors that share memory count once."""
    return sum(storage.nbytes() for storage in storages(tree))


def on_meta(config, dtype):
    """The model without memory and with one layer only, which sees all tokens: the others have as
    many weights."""
    with torch.device("meta"):
        one = replace(config, num_hidden_layers=1, windows=[])
        model = Llama(one).to(dtype).requires_grad_(False)
    model.rope.to("meta")
    if config.tied:
        model.lm_head.weight = model.embed_tokens.weight
    return model


def weights(config, dtype=torch.bfloat16):
    """Bytes of the parameters."""
    model = on_meta(config, dtype)
    other_layers = (config.num_hidden_layers - 1) * nbytes(list(model.layers.parameters()))
    return other_layers + nbytes(list(model.parameters()))


def keys_on_meta(run, B, T):
    """Keys (B, H, T, D) of a run, without memory."""
    return torch.empty(B, run.model.num_key_value_heads, T, run.model.head_dim, dtype=run.dtype,
                       device="meta")


def cache_on_meta(run):
    """The cache of one layer, allocated without memory."""
    store = None
    if run.cache_ratio is not None:
        memory = (keys_on_meta(run, run.batch, round_up(run.capacity)) for _ in range(2))
        store = functools.partial(WaveBuffer, memory=memory, cache_ratio=run.cache_ratio)
    cache = WaveIndex(run.retro, run.capacity, run.batch, make_store=store)
    cache.allocate(keys_on_meta(run, 1, 0))
    return cache


def ring_bytes(run):
    """Bytes of the caches of all layers that see a window."""
    caches = make_caches(run.model, lambda: None, run.capacity, run.batch)
    rings = [cache for cache in caches if cache]
    for ring in rings:
        ring.allocate(keys_on_meta(run, 1, 0))
    return sum(sum(ring.nbytes().values()) for ring in rings)


def plan(run):
    """The Plan of a Run."""
    model = on_meta(run.model, run.dtype)
    cache = cache_on_meta(run)
    layers = run.model.n_wide
    device = {name: n * (min(layers, 2) if name == "execution buffer" else layers)
              for name, n in cache.nbytes().items()}
    if run.model.windows:
        device["windows"] = ring_bytes(run)
    host = {} if run.cache_ratio is None else {"store": host_bytes(run, device.pop("store"))}
    return Plan(run, {"weights": weights(run.model, run.dtype)} | device, host,
                prefill_bytes(model, run), step_bytes(model, cache))


def host_bytes(run, store):
    """Bytes of the host that an offloaded store takes: for a GPU, of the blocks that hold it."""
    n = 2 * run.model.n_wide
    return store if run.is_cpu or run.in_file else sum(pinned_blocks(n, store // n))


def prefill_bytes(model, run):
    """Activations of a prefill's last chunk in one layer, which completes a segment."""
    chunk = min(run.chunk, run.capacity)
    ids = torch.empty(1, chunk, dtype=torch.int64, device="meta")
    L = min(run.retro.segment, run.capacity) // run.retro.cluster * run.retro.cluster
    segment = keys_on_meta(run, 1, L)
    is_masked = run.is_cpu and chunk < run.capacity     # a GPU's kernel needs no mask in memory

    def attend(q, k, v):
        o = torch.empty_like(q)
        if is_masked:       # a bool, and a number as wide as the keys
            rows = min(chunk, max(MASK // run.capacity, 1))
            mask = ids.new_empty(rows, run.capacity, 1 + k.element_size(), dtype=torch.uint8)
            del mask
        if L:
            cluster_segment(segment, segment, run.retro)
        return o

    def work():
        n_layers = 0        # a prefill holds copies of all K and V of so many layers
        if run.retro.store_bits == 8:
            n_layers = 1    # a store of bytes is widened
        elif run.cache_ratio is not None and not run.is_cpu:
            n_layers = 2    # one layer's are brought, while those of the layer before go back
        past = [keys_on_meta(run, 1, round_up(run.capacity)) for _ in range(2 * n_layers)]
        model.logits(model(ids, ids, [attend])[:, -1])
        del past

    with ByteCounter() as counter:
        return counter.peak(work)


def step_bytes(model, cache):
    """Activations of an eager step in one layer."""
    B = len(cache.n_tokens)
    cache.is_in_store = [False] * B     # update() would read counters, which hold nothing here
    token = torch.empty(B, dtype=torch.int64, device="meta")
    with ByteCounter() as counter:
        return counter.peak(lambda: eager_step(model, [cache], token))


# ---------------------------------------------------------------- what would fit

def fit(run, memory, host=math.inf):
    """The Plan of a Run that fits so many bytes. If it does not, InputError says what would."""
    table = plan(run)
    if table.fits(memory, host):
        return table
    weights = f"nothing here, the weights alone are {table.device['weights'] / GIB:.1f} GiB"
    what_fits = ", or ".join(remedies(run, memory, host)) or weights
    there = f"{memory / GIB:.1f}"
    if host < math.inf:
        there += f" and {host / GIB:.1f}"
    raise InputError(f"{run.capacity:,} tokens x {run.batch} need {table.peak / GIB:.1f} GiB and "
                     f"{sum(table.host.values()) / GIB:.1f} on the host, there are {there}; "
                     f"what fits: {what_fits}")


def remedies(run, memory, host=math.inf):
    """At most three flags with which the run would fit."""
    would_fit = (flags for flags, changes in REMEDIES.items()
                 if plan(replace(run, **changes)).fits(memory, host))
    found = list(itertools.islice(would_fit, 2))
    if n := largest_capacity(run, memory, host):
        found.append(f"--capacity {n}")
    return found


def largest_capacity(run, memory, host=math.inf):
    """The most tokens, in thousands of 1,024, that fit; 0 if none do."""
    low, high = 0, run.capacity // 1024
    while low < high:
        middle = (low + high + 1) // 2
        if plan(replace(run, capacity=1024 * middle)).fits(memory, host):
            low = middle
        else:
            high = middle - 1
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
        help=f"{', '.join([*SHAPES, *NAMED])}, a directory or a .gguf file (default "
             f"{DEFAULT_NAME})")
    add("--capacity", metavar="N", type=int, help="tokens of a sequence; default: the context")
    add("--batch", metavar="N", type=int, default=1, help="number of sequences")
    add("--memory", metavar="GIB", type=float, help="of the device; default: this machine's")
    add("--dtype", metavar="NAME", choices=["float32", "bfloat16", "float16"], help="%(choices)s")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU if any)")
    add("--prefill-chunk", metavar="N", type=int, default=CHUNK,
        help="read the prompt N tokens at a time (default %(default)s)")
    add("--offload", action="store_true", help="keep K and V in host memory")
    add("--cache-ratio", metavar="X", type=float,
        help=f"share of K and V cached on the device (default {RATIO})")
    add("--store", metavar="FILE", help="keep K and V in a file (plan writes none)")
    add_set(add)
    args = parser.parse_args(argv)
    args.method = "wave"                        # the only one that is planned
    take_settings(args, RetroConfig)
    check_counts(args, "prefill_chunk", "capacity", "batch")
    if args.memory is not None and not args.memory > 0:
        raise InputError(f"--memory is {args.memory}: give GiB above 0")
    for name in ("store", "cache_ratio"):
        if getattr(args, name) is not None and not args.offload:
            raise InputError(f"{flag(name)} goes with --offload")
    args.cache_ratio = RATIO if args.cache_ratio is None else args.cache_ratio
    check_ratio(args.cache_ratio)
    return args


def show(args):
    """Print the plan of a run. InputError if it does not fit."""
    device = choose_device(args.device)
    is_here = not (args.shape in SHAPES or args.memory)     # else of another machine, with a GPU
    is_cpu = is_here and device.type == "cpu"
    if args.store and not is_cpu:
        raise InputError("--store is for a CPU, and this plan is for a GPU: leave it out")
    dtype = torch.bfloat16 if not is_here else fast_dtype(device)
    dtype = getattr(torch, args.dtype) if args.dtype else dtype
    config = shape(args.shape)
    run = Run(config, args.capacity or config.context, args.batch, dtype, args.prefill_chunk,
              args.cache_ratio if args.offload else None, bool(args.store), is_cpu,
              make_config(args))
    print(f"{args.shape}, {run.capacity:,} tokens x {run.batch}, "
          f"{str(dtype).removeprefix('torch.')}\n{plan(run)}")
    memory = args.memory * GIB if args.memory else installed(device)
    host = installed(torch.device("cpu")) if is_here else math.inf
    table = fit(run, memory, host)
    print(f"fits: {(memory - table.peak) / GIB:.1f} GiB of {memory / GIB:.1f} left")


def main(argv=None):
    """The exit status."""
    return run_command("plan", lambda: show(parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
