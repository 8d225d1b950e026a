# %% [markdown]
# # What does a hand-written kernel add?
#
# **Goal.** Write attention for one new token as a GPU kernel, three times: a loop over tokens, a
# loop over blocks of tokens, and many such loops side by side. Count the bytes that each of them
# moves. Compare a step in eager PyTorch, the same step compiled, and the kernels of the library.
# Read what their machine code needs of a GPU. No GPU is needed for any of that.
#
# **You need.** PyTorch; [05](05_compile.ipynb) for what a compiler fuses. Triton is explained.
#
# **Time.** About a minute: kernels are interpreted, and machine code is compiled.
#
# **Paper.** RetroInfer, [arXiv 2505.02922](https://arxiv.org/abs/2505.02922), whose published
# kernels are CUDA. Splitting a head's tokens is Flash-Decoding (Dao et al., 2023).
#
# **Before and after.** [05](05_compile.ipynb) compiled the step;
# [07](07_the_wave_buffer.ipynb) moves keys and values to the host.
#
# **Predict first.** A step over the three zones reads centroids, some clusters and a few recent
# tokens. Eager PyTorch runs one operation after the other, and hands tensors from one to the next
# through memory. How many bytes does it move for each byte that a step needs? And how many does the
# compiled step move? Write your two numbers down.
#
# Letters of this notebook: the tokens of a head are cut into S parts. A softmax in progress has the
# largest logit so far, m, and the sum s of exp(logit - m). A tile has BG rows of queries, BN
# tokens.
#
# Kernels are written in Triton: Python that a compiler turns into code for a GPU. Without a GPU
# Triton can *interpret* the same source with NumPy, slowly. The first line below asks for that. The
# line must come before Triton is imported.

# %%
import os; os.environ["TRITON_INTERPRET"] = "1"
import sys; sys.path[:0] = [".."]
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from capture import captured
from checks import agree
from figures_06 import draw_split, plot_ledger, plot_parts, plot_tiles
from ledger import Ledger, fused_bytes
from plots import versions
from torch._subclasses.fake_tensor import FakeTensorMode

# %%
import generate
import kernels
from bench.footprint import counted, elsewhere, needs
from retroinfer import (
    Budget,
    Index,
    RetroConfig,
    attend,
    choose_clusters,
    cluster_segment,
    limits_of,
    rank_clusters,
)

print(versions())
print("triton", triton.__version__)

# %%
text, config = captured(), RetroConfig()
H, T, D = text.k.shape[1:]
G = text.q.shape[1] // H
all_q, k, v = text.layer(9)
q = all_q.view(1, H, G, T, D)[:, :, :, -1].contiguous()                 # (B, H, G, D)
truth = F.scaled_dot_product_attention(q, k, v)                         # (B, H, G, D)
print(f"{T:,} tokens, {H} kv heads of {G} query heads, {D} dims")

# %%
draw_split()

# %% [markdown]
# ## Step 1: one loop
#
# A kernel is one program, started many times: a *grid* of programs that share nothing and may run
# at once. Each asks for its number and finds its own part of the work. Pointers are plain
# addresses; `tl.load` of a row of addresses brings a row of numbers.
#
# Let a program own one query head and walk over the tokens. A softmax needs the largest logit
# before it can begin, so a first version would walk twice. The *online softmax* walks once: it
# keeps the largest logit so far, `m`, and when a larger one comes, what was summed before fades by
# exp(old - new).

# %%
@triton.jit
def one_loop(q, k, v, o, T, G: tl.constexpr, D: tl.constexpr):
    head, d = tl.program_id(0), tl.arange(0, D)
    query = tl.load(q + head * D + d) * D ** -0.5                       # (D,)
    m, s, sums = float("-inf"), 0.0, tl.zeros([D], tl.float32)
    for t in range(T):
        at = (head // G * T + t) * D + d
        x = tl.sum(query * tl.load(k + at), 0)
        top = tl.maximum(m, x)
        fade, p = tl.exp(m - top), tl.exp(x - top)
        m, s, sums = top, s * fade + p, sums * fade + p * tl.load(v + at)
    tl.store(o + head * D + d, sums / s)

# %% [markdown]
# The interpreter takes its time, a token after the other: so only the last 200 tokens. While it
# runs, `counted` adds up the bytes that are loaded and stored.

# %%
few = 200
short = tuple(x[:, :, -few:].contiguous() for x in (k, v))
o = torch.full_like(q, torch.nan)
with counted() as moved:
    one_loop[(H * G,)](q, *short, o, few, G, D)
torch.testing.assert_close(o, F.scaled_dot_product_attention(q, *short))

must = sum(x.nbytes for x in (q, *short, o))                            # everything once
loop_reads = sum(moved["one_loop"]) / must
print(f"right, and {loop_reads:.2f} times the bytes that it must move: every one of the {G} query "
      "heads of a group reads the same keys and values again")
assert G - 0.1 < loop_reads < G

# %% [markdown]
# ## Step 2: a block of tokens at a time
#
# A GPU multiplies small matrices with units of their own, and reads memory best in long runs. So a
# program takes the G queries of a *group* as one tile (BG, D), and BN tokens as another. `tl.dot`
# makes all their logits at once, and each key that was read serves G queries. The sizes of tiles
# are powers of two. The matrix units take 16 rows at a time: Triton 3.9 pads a smaller tile, older
# releases refuse it, so we take 16 rows and mask those that are not a query.
#
# One thing cannot be seen without a GPU: `tl.dot` of two float32 tiles multiplies TF32 numbers
# there, which have 10 bits after the point where float32 has 23. The words
# `input_precision="ieee"` forbid that. The interpreter always multiplies in float32.

# %%
@triton.jit
def absorb(x, v, m, s, sums):
    """Running max m, sum s and weighted values, grown by values v (BN, D), logits x (BG, BN)."""
    top = tl.maximum(m, tl.max(x, 1))
    fade, p = tl.exp(m - top), tl.exp(x - top[:, None])
    return top, s * fade + tl.sum(p, 1), sums * fade[:, None] + tl.dot(
        p.to(v.dtype), v, input_precision="ieee")


# %%
@triton.jit
def walk(q, k, v, head, first, stride, T, G: tl.constexpr, D: tl.constexpr, BG: tl.constexpr,
         BN: tl.constexpr):
    """m, s (BG,) and sums (BG, D) of every stride-th block of a head's tokens, from `first` on."""
    g, d, n = tl.arange(0, BG)[:, None], tl.arange(0, D), tl.arange(0, BN)
    queries = tl.load(q + (head * G + g) * D + d, g < G, 0.0)           # (BG, D)
    m, s = tl.full([BG], float("-inf"), tl.float32), tl.zeros([BG], tl.float32)
    sums = tl.zeros([BG, D], tl.float32)
    for start in range(first * BN, T, stride * BN):
        at = (head * T + start + n[:, None]) * D + d
        is_token = start + n < T
        keys = tl.load(k + at, is_token[:, None], 0.0)                  # (BN, D)
        values = tl.load(v + at, is_token[:, None], 0.0)
        x = tl.dot(queries, tl.trans(keys), input_precision="ieee") * D ** -0.5
        m, s, sums = absorb(tl.where(is_token, x, float("-inf")), values, m, s, sums)
    return m, s, sums

# %%
@triton.jit
def blocks(q, k, v, o, T, G: tl.constexpr, D: tl.constexpr, BG: tl.constexpr, BN: tl.constexpr):
    head, g, d = tl.program_id(0), tl.arange(0, BG)[:, None], tl.arange(0, D)
    _, s, sums = walk(q, k, v, head, 0, 1, T, G, D, BG, BN)
    tl.store(o + (head * G + g) * D + d, sums / s[:, None], g < G)

# %%
o = torch.full_like(q, torch.nan)
with counted() as moved:
    blocks[(H,)](q, k, v, o, T, G, D, BG=16, BN=64)
torch.testing.assert_close(o, truth)
must = sum(x.nbytes for x in (q, k, v, o))
print(f"right, and {sum(moved['blocks']) / must:.2f} times the bytes that it must move")
assert sum(moved["blocks"]) == must

# %% [markdown]
# ## Step 3: split, then combine
#
# Not a byte too many, and yet it would be slow: there are as many programs as there are kv heads in
# the batch, and a large GPU has more than a hundred *multiprocessors* to keep busy. The remedy is
# to cut each head's tokens into S parts. Every part ends with its own `m`, `s` and sums. A second
# kernel joins the parts: each fades by exp(its m - the largest m), as old sums did above when a
# larger logit came.

# %%
@triton.jit
def split(q, k, v, stats, parts, T, G: tl.constexpr, D: tl.constexpr, BG: tl.constexpr,
          BN: tl.constexpr):
    part, head, S = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    g, d = tl.arange(0, BG), tl.arange(0, D)
    m, s, sums = walk(q, k, v, head, part, S, T, G, D, BG, BN)          # every S-th block is ours
    mine = head * S + part
    tl.store(stats + mine * 2 * G + g, m, g < G)
    tl.store(stats + mine * 2 * G + G + g, s, g < G)
    tl.store(parts + (mine * G + g[:, None]) * D + d, sums, g[:, None] < G)

# %%
@triton.jit
def combine(stats, parts, o, S, G: tl.constexpr, D: tl.constexpr, BS: tl.constexpr):
    g, head = tl.program_id(0), tl.program_id(1)
    s, d = tl.arange(0, BS), tl.arange(0, D)
    at = head * S + s
    m = tl.load(stats + at * 2 * G + g, s < S, float("-inf"))           # (BS,)
    scale = tl.exp(m - tl.max(m, 0))
    total = tl.sum(scale * tl.load(stats + at * 2 * G + G + g, s < S, 0.0), 0)
    rows = tl.load(parts + (at[:, None] * G + g) * D + d, s[:, None] < S, 0.0)
    tl.store(o + (head * G + g) * D + d, tl.sum(scale[:, None] * rows, 0) / total)

# %%
def run_split(S, BN=64):
    """Output (B, H, G, D) with each head in S parts, and how many bytes were moved."""
    o, stats, parts = (torch.full((1, H, *n), torch.nan) for n in ((G, D), (S, 2, G), (S, G, D)))
    with counted() as moved:
        split[(S, H)](q, k, v, stats, parts, T, G, D, BG=16, BN=BN)
        combine[(G, H)](stats, parts, o, S, G, D, BS=triton.next_power_of_2(S))
    return o, sum(map(sum, moved.values()))

o, split_bytes = run_split(7)
torch.testing.assert_close(o, truth)
print(f"in 7 parts: right, and {split_bytes / must:.3f} times the bytes that it must move")

# %% [markdown]
# What a part costs is known: it reads the queries, and its statistics and sums are written and read
# again. So the bytes can be counted for a model and a text too large for this machine. We take the
# shape of Llama-3.1-8B, one text of 131,072 tokens, and a GPU of 132 multiprocessors (an H100).

# %%
def split_traffic(S, H, G, D, T, e):
    """Bytes that run_split moves for one text; e bytes an element of q, k, v and o."""
    return H * (2 * T + (S + 1) * G) * D * e + 2 * H * S * G * (D + 2) * 4

assert split_bytes == split_traffic(7, H, G, D, T, q.element_size())

# %% [markdown]
# How busy is the device? We hand out the programs as a scheduler does: the next program goes to the
# multiprocessor that is free first. The time of a program is its number of blocks, counted from the
# loop of `walk`. This is a model, and no measurement: a multiprocessor runs one program at a time,
# and the memory that all of them share is no limit.

# %%
LLAMA, N_PROCESSORS = (8, 4, 128, 131072, 2), 132                       # H, G, D, T, e

def busy(S, H, T, BN=64):
    """Work done, as a share of what all multiprocessors could do until the last one ends."""
    free_at = [0] * N_PROCESSORS
    for part in range(S):
        for _ in range(H):
            next_free = free_at.index(min(free_at))
            free_at[next_free] += len(range(part * BN, T, S * BN))
    return sum(free_at) / (N_PROCESSORS * max(free_at))

S = range(1, 65)
busy_at = [100 * busy(n, LLAMA[0], LLAMA[3]) for n in S]
once = split_traffic(0, *LLAMA)
extra = [100 * (split_traffic(n, *LLAMA) / once - 1) for n in S]

# %%
enough = N_PROCESSORS // LLAMA[0]                   # as many programs as one round holds
plot_parts(S, busy_at, extra, enough)
programs = LLAMA[0] * enough, LLAMA[0] * (enough + 1)
print(f"{enough} parts: {programs[0]} programs at once; {enough + 1}: {programs[1]}, of which "
      f"{programs[1] - N_PROCESSORS} wait, and the device is {busy_at[enough]:.0f} % busy")
assert busy_at[0] < 10 and busy_at[enough - 1] > 90 > 60 > busy_at[enough] and extra[enough - 1] < 1

# %% [markdown]
# ## The ledger of a step
#
# Dense attention gains little by a kernel of our own: PyTorch has such kernels. A step over three
# zones has none. In eager PyTorch its operations hand tensors from one to the next through
# memory: centroids, unpacked from 4 bits a number to 32; logits, masses, an order; and the
# retrieved tokens, which are gathered (read and written) before they are read again.
#
# That is no fair rival for kernels, because nobody runs the step so. A fair one is the compiled
# step of [notebook 05](05_compile.ipynb). Where the library compiles a step for a GPU (`--backend
# compile`), it compiles this same function, `attend`. For a CPU it compiles a twin, which writes
# each product of a matrix and a few queries as a sum, because Inductor fuses through sums. The
# price on a GPU would be its matrix units: they compute matrix products, and code written as sums
# cannot use them. We count both.
#
# So there are three ways to count. For eager PyTorch, a *mode* sees every operation with the
# tensors that it reads and writes (`Ledger`). For a compiled step, Inductor plans which loops it
# fuses, and what each loop reads and writes (`fused_bytes`): a plan for a CPU, not a measurement.
# The plan for a GPU may differ. For Triton, the interpreter counts what kernels load and store. All
# three count every byte, also of a small tensor that would stay in a chip's cache. `ledger.py` has
# the first two.

# %%
def budget_of(n):
    """The Budget of a step after a text of n tokens."""
    retrieve, ranked = limits_of(config, torch.tensor([[n]]))
    R, K = int(retrieve), int(ranked)
    return Budget(retrieve, ranked, config.values, R, K, N=R * config.largest)

n_text = (text.n_prompt - config.sink - config.local) // config.cluster * config.cluster
middle = slice(config.sink, config.sink + n_text)

def step_of(layer, t=-1):
    """The arguments of attend for the query at t, in a layer."""
    all_q, k, v = text.layer(layer)
    q = all_q.view(1, H, G, T, D)[:, :, :, t].contiguous()
    index, *stores = cluster_segment(k[:, :, middle], v[:, :, middle], config)
    rest = [torch.cat([x[:, :, :config.sink], x[:, :, middle.stop:]], 2) for x in (k, v)]
    bias = torch.zeros(1, H, 1, rest[0].shape[2])
    return q, (*rest, bias), index, stores, budget_of(n_text), config.method()

# %%
step = step_of(9)
with Ledger() as eager_ledger:
    eager = attend(*step)
with counted() as moved:
    ours = kernels.attend(*step)
torch.testing.assert_close(ours, eager)

def as_sums(q, steady, index, stores, budget, method):
    """attend with sums in place of products: the library's twin for a CPU."""
    method = method._replace(scores=generate.stream_scores, mix=generate.stream_mix)
    return attend(q, steady, index, stores, budget, method)

torch.testing.assert_close(as_sums(*step), eager)
compiled, summed = (fused_bytes(function, *step) for function in (attend, as_sums))

# %% [markdown]
# The outputs agree. What must be moved at the least?
#
# - The query and the output.
# - Of every cluster, since all are ranked: its centroid in 4 bits a number, and 8 bytes for size,
#   spread and scale.
# - Keys and values of the steady zone.
# - Keys of the retrieved clusters, and the values of a fifth of their tokens: by default the
#   library reads the values of the tokens that weigh most (`values=0.2`), and lets the mean value
#   of a cluster stand for the others.
# - Mean values of the estimated and of the retrieved clusters.

# %%
def retrieved(step):
    """Tokens of the clusters that a head retrieves, on average over heads."""
    q, steady, index, _, budget, method = step
    q = q.float() * q.shape[3]**-0.5
    near, far = q @ steady[0].float().mT, method.centroid_logits(q, index, method)
    order = rank_clusters(q, far, near, index, budget.K, method)
    _, ends, _ = choose_clusters(order, index, budget)
    return float(ends[..., -1].float().mean())

# %%
def least(step, n):
    """Bytes that no kernel can do without, for that step: a head retrieves n tokens."""
    q, steady, index, _, budget, _ = step
    (B, H, G, D), e = q.shape, q.element_size()
    live = index.sizes.numel() if q.is_meta else int((index.sizes > 0).sum())
    rows = 2 * G + 2 * steady[0].shape[2] + n + n * config.values
    vectors, vector = live + B * H * budget.K, index.means[0, 0, 0].nbytes
    return B * H * rows * D * e + vectors * vector + 8 * live

floor = least(step, retrieved(step))
bars = {"eager": eager_ledger.bytes, "compiled": compiled, "as sums": summed,
        "kernels": {name.removesuffix("_kernel"): sum(n) for name, n in moved.items()},
        "the least": {"": floor}}
eager_bytes, compiled_bytes, sum_bytes, our_bytes, _ = (sum(x.values()) for x in bars.values())

# %%
plot_ledger(bars, floor)
handed = sum(stored for _, stored in moved.values()) - ours.nbytes  # by one kernel, for the next
print("kernels, MB:", *(f"{name} {n / 1e6:.2f} " for name, n in bars["kernels"].items()))
print(f"beyond the least {(our_bytes - floor) / 1e6:.2f} MB, of which {2 * handed / 1e6:.2f} MB "
      "are results that one kernel stores and another loads")
assert eager_bytes > compiled_bytes > sum_bytes > 2 * our_bytes and our_bytes < 2 * floor
assert 2 * handed > (our_bytes - floor) / 2

# %% [markdown]
# The names in the first bar are PyTorch's: `sub` and `_to_copy` belong to the centroids, which are
# unpacked; `index_select` gathers the retrieved tokens; `bmm` multiplies.
#
# That was one step of one layer. Three others, of the same text, show whether the ratio depends on
# the layer:

# %%
ratios = []
for layer, t in ((2, -3), (16, -9), (27, -1)):
    other = step_of(layer, t)
    with counted() as moved:
        kernels.attend(*other)
    ratios.append(sum(map(sum, moved.values())) / least(other, retrieved(other)))
print("bytes of the kernels over the least:", *(f"{x:.2f}" for x in ratios))
assert max(ratios) < 2

# %% [markdown]
# And for a longer text? Tensors on the device `meta`, and *fake* tensors for the
# compiler, have shapes and no data. PyTorch runs the step, and the ledgers add up, as if
# they had data. (Nothing is computed, so no clusters are needed.)

# %%
H_l, G_l, D_l, T_l, _ = LLAMA
C, W = config.slots(T_l), config.steady
sizes = budget_of(T_l)[2:]                      # of the values, R, K and N: plain numbers

def fake(*shape, dtype=torch.bfloat16):
    """A tensor (1, H, *shape) of Llama's; without data on meta, or inside a FakeTensorMode."""
    return torch.empty(1, H_l, *shape, dtype=dtype)

def fake_step():
    """Arguments of attend for Llama's shape."""
    vectors = fake(C, D_l // 2, dtype=torch.uint8)
    index = Index(vectors, vectors, fake(C, dtype=torch.float32), fake(C, dtype=torch.int64),
                  fake(C), fake(C, 2), fake(1, D_l, dtype=torch.float32))
    counts = (torch.empty(1, 1, dtype=torch.int64) for _ in range(2))
    budget = Budget(*counts, *sizes)
    steady = fake(W, D_l), fake(W, D_l), fake(1, W, dtype=torch.float32)
    return fake(G_l, D_l), steady, index, (fake(T_l, D_l), fake(T_l, D_l)), budget, config.method()

# %%
with torch.device("meta"):
    large = fake_step()
    with Ledger() as ledger:
        attend(*large)
with FakeTensorMode():
    fused = sum(fused_bytes(attend, *fake_step()).values())
n_large = large[4].R * config.cluster           # tokens of clusters of the mean size
llama = {"eager": sum(ledger.bytes.values()), "compiled": fused, "least": least(large, n_large),
         "dense": split_traffic(enough, *LLAMA)}
print(f"at {T_l:,} tokens, bf16, MB a layer:", {x: round(n / 1e6) for x, n in llama.items()})
assert llama["eager"] > llama["dense"] > llama["compiled"] > 5 * llama["least"]

# %% [markdown]
# So the eager step moves more bytes than dense attention, which the index was to save. The compiled
# step moves fewer than dense attention, and still many times the least. Why does the compiler not
# find the rest? It fuses through a softmax and through a gather (notebook 05). By default it does
# not fuse through matrix products, sorts and top-k. A product needs its two matrices in memory: the
# unpacked centroids, and the gathered keys and values. The third bar of the figure agrees: with
# sums in place of products, the same step moves fewer bytes. A kernel unpacks in registers what it
# has just read, and can use the matrix units too. Most of what the kernels move beyond the least is
# what one of them leaves for the next.
#
# ## Machine code
#
# A multiprocessor has 65,536 registers and, on an H100, 228 KB of *shared memory* into which blocks
# are fetched ahead. A program that takes too much of either runs alone, or not at all; one that
# needs more than 255 registers a thread *spills* them to slow memory. The compiler runs without a
# GPU, so we can ask. Here is our third kernel in fp16 at Llama's shape, with blocks of more and
# more tokens. We compile it anew for each of three GPUs, named by *compute capability*: an H100
# (90), an RTX 4090 (89) and a T4 (75). How much shared memory one program may have is in NVIDIA's
# tables.

# %%
x, f = torch.empty(1, dtype=torch.float16), torch.empty(1, dtype=torch.float32)
tiles = [{"G": G_l, "D": D_l, "BG": 16, "BN": BN, "num_warps": 4, "num_stages": 3}
         for BN in (32, 64, 128, 256)]
LIMITS = {"an H100": (90, 227), "an RTX 4090": (89, 99), "a T4": (75, 64)}      # capability, KB
def compile_for(name):
    return needs(split, (x, x, x, f, f, T_l), tiles, LIMITS[name][0], helpers=[absorb, walk])

with ThreadPoolExecutor() as pool:              # each compiler is a process
    facts = dict(zip(LIMITS, pool.map(compile_for, LIMITS), strict=True))
for name, by_block in facts.items():
    print(f"{name:12}", *(f"{n['BN']} tokens: {n['registers']} registers" + ", spilled" * bool(
        n["spilled"]) for n in by_block), sep="  ")

# %%
fits = plot_tiles(facts, {name: kb for name, (_, kb) in LIMITS.items()})
held = {name: max(n["BN"] for n in facts[name] if n["shared"] <= 1024 * kb)
        for name, (_, kb) in LIMITS.items()}            # by shared memory alone
assert fits["an H100"] > fits["an RTX 4090"] > fits["a T4"]
assert held["a T4"] > fits["a T4"] and held["an H100"] == fits["an H100"]

# %% [markdown]
# On the H100 and on the RTX 4090 shared memory is the limit. On the T4 registers are: its shared
# memory would hold a larger block, but the program spills. The code for the T4 has no instruction
# for matrix units. It multiplies number by number, and that takes the registers.
#
# The library chooses its tiles by shape (`tile_rows`) so that 99 KB hold them, which leaves out a
# T4. A test compiles every kernel for every shape and reads the same numbers. `python -m
# bench.footprint 80 90 100` prints them all. Here is a step of Llama's shape, for an H100. A kernel
# is compiled in several variants, for instance with all values and with a fifth of them. The table
# has the largest need of all variants.

# %%
step_facts = elsewhere(90, "--step", "bf16", G_l, D_l)
print(f"{'':16}{'variants':>9}{'registers':>12}{'shared, KB':>14}{'spilled, B':>12}")
for name in dict.fromkeys(fact["kernel"] for fact in step_facts):
    own = [fact for fact in step_facts if fact["kernel"] == name]
    registers, shared, spilled = (max(fact[what] for fact in own)
                                  for what in ("registers", "shared", "spilled"))
    print(f"{name:16}{len(own):9}{registers:12}{shared / 1024:14.0f}{spilled:12}")
assert all(fact["shared"] <= 99 * 1024 and not fact["spilled"] for fact in step_facts)

# %% [markdown]
# ## Takeaway
#
# - Count bytes before you write a kernel: the count says what the kernel can gain.
# - An online softmax needs one pass. A tile of all query heads of a group reads each key once.
#   Splitting fills the device for few bytes more, if the programs fill whole rounds.
# - The fair baseline is the compiled step. What a kernel gains over it is what the compiler writes
#   around products and top-k: unpacked centroids, and gathered tokens. Part of it can be had
#   without a kernel, by sums in place of products.
# - Registers and shared memory limit how large a block may be, and a compiler tells without a GPU.
#   How fast a kernel is, only a GPU tells: `make bench-gpu`.

# %%
print(f"bytes over the least: one loop {loop_reads:.2f}, blocks 1.00, split "
      f"{split_bytes / must:.2f}; three zones eager {eager_bytes / floor:.1f}, compiled "
      f"{compiled_bytes / floor:.1f}, as sums {sum_bytes / floor:.1f}, by the kernels "
      f"{our_bytes / floor:.2f}")

# %% [markdown]
# ## Exercises
#
# **1.** Write `merge(a, b)`: each is a part's `(m, s, sums)`: its largest logit, the sum of
# exp(logit - m), and the values weighted so, (D,). Return the same three of both parts together.

# %%
def merge(a, b):
    """(m, s, sums) of all that parts a and b hold."""
    ...                                 # your code


# %%
def check(answer):
    """Whether parts merge to the softmax of the whole, in any order, with logits of any size."""
    dice = torch.Generator().manual_seed(0)
    x, values = 200 * torch.randn(30, generator=dice), torch.randn(30, D, generator=dice)

    def part(span):
        m = x[span].max()
        return m, (x[span] - m).exp().sum(), (x[span] - m).exp() @ values[span]

    a, b, c = part(slice(0, 3)), part(slice(3, 20)), part(slice(20, 30))
    m, s, sums = answer(answer(a, b) or a, c) or (None, 1, torch.zeros(D))
    n, u, more = answer(answer(c, b) or c, a) or (None, 1, torch.zeros(D))
    right = x.softmax(0) @ values
    return agree([("largest", m, x.max()), ("output", sums / s, right),
                  ("largest, other order", n, x.max()), ("output, other order", more / u, right)])

print("right" if check(merge) else "not yet")

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def merge(a, b):
#     m = torch.maximum(a[0], b[0])
#     fade_a, fade_b = (a[0] - m).exp(), (b[0] - m).exp()
#     return m, a[1] * fade_a + b[1] * fade_b, a[2] * fade_a + b[2] * fade_b
# ```
# </details>
#
# **2.** Why carry `m` at all? A softmax is the same without it. Make the queries fifty times as
# long and compare `blocks` with the plain quotient of sums.
#
# <details><summary>Answer</summary>
#
# exp() of anything above 88 is infinite in float32, and infinity over infinity is not a number.
#
# ```python
# loud = 50 * q
# blocks[(H,)](loud, k, v, o, T, G, D, BG=16, BN=64)
# torch.testing.assert_close(o, F.scaled_dot_product_attention(loud, k, v), rtol=1e-4, atol=1e-5)
# weights = (loud @ k.mT * D**-0.5).exp()
# plain = weights @ v / weights.sum(-1, keepdim=True)
# print(f"of the plain quotient {plain.isnan().float().mean():.0%} is not a number")
# assert plain.isnan().any()
# ```
# </details>
#
# **3.** How many programs of 4 warps (128 threads) does one multiprocessor of an H100 hold at once,
# by registers (65,536) and by shared memory (228 KB, of which each program takes 1 KB more than it
# asks for)? How much is then on its way from memory at a time?
#
# <details><summary>Answer</summary>
#
# Smaller blocks leave room for more programs, and what is in flight is nearly the same. It has to
# cover the time from asking to getting, near a microsecond: at 3.35 TB/s, an H100's, some 25 KB a
# multiprocessor. All blocks that fit have that.
#
# ```python
# for fact in facts["an H100"]:
#     n = min(65536 // (fact["registers"] * 128), 228 * 1024 // (fact["shared"] + 1024))
#     print(f"{fact['BN']:4} tokens a block: {n:2} programs, {n * fact['shared'] / 1024:.0f} KB")
# print(f"to cover a microsecond: {3.35e12 * 1e-6 / N_PROCESSORS / 1024:.0f} KB")
# ```
# </details>
