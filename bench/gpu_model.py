"""A whole model on a GPU: tokens a second on the wave index and on dense caches, and its prefill.

bench_gpu.py runs this and writes what it finds; --dry-run is tiny.

Llama-3-8B's shape with random weights. Every layer holds clumped keys, as real ones are, and as
many sequences decode together as leave their dense cache room beside the weights. One kind of cache
at a time is there, under the same weights; a step is compiled_step, captured in a CUDA graph. The
wave index is judged by the faster of two dense caches: model.py's, whose mask lets sequences differ
in length, and one without a mask, for which SDPA has its best kernels.

What the index costs is told by prefills of four layers, with it and without, by the host's clock,
as far as the GPU's memory allows.
"""
import functools
import gc
import statistics
import time
from dataclasses import replace

import torch
import torch.nn.functional as F

import kernels
from app import plan
from bench.cpu import BOOST
from generate import compiled_step, prefill
from model import DenseCache, Llama
from retroinfer import RetroConfig, WaveIndex

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32 # interpreted, bfloat16 fails
NAME, CONFIG = "Llama-3-8B", plan.shape("Llama-3.1-8B")
TOKENS, SPARE = 122880, 128     # behind a step, and slots free for it: masks like a multiple of 8
PREFILLS = 32768, 122880
TINY = replace(CONFIG, vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
               num_attention_heads=3, num_key_value_heads=1, head_dim=16)


class MasklessCache(DenseCache):
    """Full attention to all slots, live or not: that of sequences which fill their cache."""

    def decode(self, q, k, v):
        batch = torch.arange(len(q), device=q.device)
        self.k[batch, :, self.n_tokens] = k[:, :, 0]
        self.v[batch, :, self.n_tokens] = v[:, :, 0]
        self.n_tokens.add_(1)
        return F.scaled_dot_product_attention(q, self.k, self.v, enable_gqa=True)

    forward = decode


def wave_index(capacity, batch=1):
    return WaveIndex(RetroConfig(), capacity, batch, hot=kernels)


CACHES = {"dense": DenseCache, "dense, no mask": MasklessCache, "wave index": wave_index}


# ---------------------------------------------------------------- what is run

def clumps(B, H, T, D):
    """Keys (B, H, T, D) of texts that dwell on a topic for a while and return to it."""
    topics = torch.randn(H, max(T // 256, 4), D, device=DEVICE)
    which = torch.randint(topics.shape[1], (B, T // 16 + 1), device=DEVICE)
    which = which.repeat_interleave(16, 1)[:, :T]                           # (B, T)
    k = torch.stack([topics[:, ids] for ids in which])                      # (B, H, T, D)
    return (k + 0.7 * torch.randn_like(k)).to(DTYPE)


def fill(cache, H, G, D, tokens):
    """Give each sequence of a cache so many tokens, without a prefill of them."""
    one = torch.zeros(1, H, 1, D, dtype=DTYPE, device=DEVICE)
    cache.prefill(one.repeat(1, G, 1, 1), one, one)                         # allocates
    k, v = ((cache.k, cache.v) if isinstance(cache, DenseCache) else
            (cache.k_store, cache.v_store))                                 # (B, H, T, D)
    for row in k:
        row[:, :tokens] = clumps(1, H, tokens, D)[0]
    v.normal_()
    cache.n_tokens.fill_(tokens)
    cache.update()
    if not isinstance(cache, DenseCache):
        cache.boosts.fill_(BOOST)


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


# ---------------------------------------------------------------- decoding

def free_memory():
    """Bytes left on the GPU; a CPU stands for one with room for few tiny sequences."""
    return torch.cuda.mem_get_info()[0] if DEVICE.type == "cuda" else 400_000


def make_room():
    """Drop what compiled steps hold, and give all that is unused back to the GPU."""
    torch.compiler.reset(), gc.collect(), torch.cuda.empty_cache()


def largest_batch(config, capacity, free):
    """Sequences whose dense cache fits nine tenths of `free` bytes: a step needs memory too."""
    numbers = config.num_hidden_layers * config.num_key_value_heads * capacity * config.head_dim
    return int(0.9 * free) // (2 * numbers * DTYPE.itemsize)


def step_facts(model, caches, tokens, clock):
    """Milliseconds, tokens a second and bytes to read of a step behind so many tokens."""
    c, batch = model.config, len(caches[0].n_tokens)
    for cache in caches:
        fill(cache, c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads,
             c.head_dim, tokens)
    token = torch.zeros(batch, dtype=torch.int64, device=DEVICE)

    def run():
        for cache in caches:
            cache.n_tokens.fill_(tokens)            # every run is the same step
        return compiled_step(model, caches, token)

    if not run().isfinite().all():
        raise ValueError(f"the logits behind {tokens} tokens are not finite")
    ms, cached = clock(run, 1000), sum(cache.bytes_read() for cache in caches)
    weights = sum(x.nbytes for x in model.parameters()) - model.embed_tokens.weight.nbytes
    return {"ms": ms, "tokens_per_s": batch / ms * 1e3, "cache_bytes": cached,
            "bytes": weights + cached}


def decode_facts(config, tokens, clock):
    """A step on each kind of cache, at the largest batch, or {} where not one sequence fits."""
    capacity, found = tokens + SPARE, {}
    make_room()
    if largest_batch(config, capacity, free_memory() - plan.weights(config, DTYPE)) < 1:
        return {}
    model = random_model(config)
    free = free_memory()
    batch = largest_batch(config, capacity, free)
    print(f"{NAME}, {tokens:,} tokens: {batch} dense caches fit {free / 2**30:.1f} GiB", flush=True)
    for name, make in CACHES.items():
        caches = [make(capacity, batch) for _ in model.layers]
        found[name] = step_facts(model, caches, tokens, clock)
        print(name, found[name], flush=True)
        del caches
        make_room()
    dense = max(found[name]["tokens_per_s"] for name in ("dense", "dense, no mask"))
    return {"tokens": tokens, "batch": batch, "free_bytes": free, "steps": found,
            "speed_up": found["wave index"]["tokens_per_s"] / dense}


# ---------------------------------------------------------------- prefill

def host_ms(run, repeats=3):
    """Median milliseconds of run() by the host's clock: what it launches is part of it."""
    run()                                       # compiles
    return statistics.median(once_ms(run) for _ in range(repeats))


def once_ms(run, rep=None):
    """Milliseconds of one run() by the host's clock."""
    wait = torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run(), wait()
    return (time.perf_counter() - start) * 1e3


def prefill_facts(config, tokens, clock):
    """Milliseconds of a prefill of one text with and without the index, and the index's share."""
    model = random_model(config)
    ids, ms = torch.randint(config.vocab_size, (tokens,), device=DEVICE), {}

    def run(make):
        caches = [make(tokens + SPARE) for _ in model.layers]
        prefill(model, caches, [ids])
        for cache in caches:
            cache.update()

    for name in ("dense", "wave index"):
        ms[name] = clock(functools.partial(run, CACHES[name]))
        torch.cuda.empty_cache()
    return {"tokens": tokens, "layers": config.num_hidden_layers, "ms": ms,
            "index_share": ms["wave index"] / ms["dense"] - 1}


# ---------------------------------------------------------------- both

def measure(is_tiny, clock):
    """All facts of the whole model: {"decode": ..., "prefill": [...]}; steps by that clock."""
    if is_tiny:
        return {"decode": decode_facts(TINY, 410, clock),
                "prefill": [prefill_facts(TINY, 300, once_ms)]}
    few, decode = replace(CONFIG, num_hidden_layers=4), decode_facts(CONFIG, TOKENS, clock)
    make_room()
    fitting = [tokens for tokens in PREFILLS
               if plan.plan(plan.Run(few, tokens + SPARE)).fits(0.9 * free_memory())]
    return {"decode": decode, "prefill": [prefill_facts(few, n, host_ms) for n in fitting]}


def markdown(facts, bandwidth):
    """The tables for a person."""
    decode, lines = facts["decode"], [f"The whole of {NAME}: not one sequence fits."]
    if decode:
        lines = [f"The whole of {NAME}, {decode['batch']} sequences of {decode['tokens']:,} tokens "
                 f"(the most whose dense cache fits): the wave index decodes "
                 f"{decode['speed_up']:.2f} times as fast as the faster dense cache.", "",
                 "| cache | tokens/s | ms a step | of copy bandwidth |", "|---|---|---|---|"]
        lines += [f"| {name} | {x['tokens_per_s']:.1f} | {x['ms']:.2f} "
                  f"| {x['bytes'] / x['ms'] * 1e3 / bandwidth:.0%} |"
                  for name, x in decode["steps"].items()]
    lines += ["", "| tokens prefilled | layers | dense ms | wave index ms | index |",
              "|---|---|---|---|---|"]
    return [*lines, *(f"| {x['tokens']:,} | {x['layers']} | {x['ms']['dense']:.0f} "
                      f"| {x['ms']['wave index']:.0f} | {x['index_share']:+.1%} |"
                      for x in facts["prefill"])]
