# %% [markdown]
# # What does a hand-written kernel add?
#
# **Goal.** Write attention for one new token as a GPU kernel, three times: a loop over tokens, a
# loop over blocks of tokens, and many such loops side by side. Count the bytes each of them moves,
# meet the kernels of the library, and read what their machine code needs of a GPU that nobody here
# has to own.
#
# **Predict first.** A step over the three zones reads centroids, some clusters and a few recent
# tokens. Written in PyTorch, one operation after the other, it also moves what one operation hands
# to the next. How many bytes does it move for each byte that it needs? Write your number down.
#
# Kernels are written in Triton: Python that a compiler turns into code for a GPU. Without a GPU
# Triton can *interpret* the same source with NumPy, slowly and exactly; it has to be told before it
# is imported.

# %%
import os; os.environ["TRITON_INTERPRET"] = "1"
import sys; sys.path[:0] = [".."]

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from capture import captured
from plots import BLUE, DARK, LIGHT, MIDDLE, axes, label
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from bench.footprint import counted, needs
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

text, config = captured(), RetroConfig()
H, T, D = text.k.shape[1:]
G = text.q.shape[1] // H
all_q, k, v = text.layer(9)
q = all_q.view(1, H, G, T, D)[:, :, :, -1].contiguous()                 # (B, H, G, D)
truth = F.scaled_dot_product_attention(q, k, v)                         # (B, H, G, D)
print(f"{T:,} tokens, {H} kv heads of {G} query heads, {D} dims")

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
# makes all their logits at once, and each key that was read serves G queries. Tiles have sizes that
# are powers of two, 16 at least; what hangs over is masked off and not read.

# %%
@triton.jit
def absorb(x, v, m, s, sums):
    """Running max m, sum s and weighted values, grown by values v (BN, D), logits x (BG, BN)."""
    top = tl.maximum(m, tl.max(x, 1))
    fade, p = tl.exp(m - top), tl.exp(x - top[:, None])
    return top, s * fade + tl.sum(p, 1), sums * fade[:, None] + tl.dot(p.to(v.dtype), v)


@triton.jit
def blocks(q, k, v, o, T, G: tl.constexpr, D: tl.constexpr, BG: tl.constexpr, BN: tl.constexpr):
    head = tl.program_id(0)
    g, d, n = tl.arange(0, BG)[:, None], tl.arange(0, D), tl.arange(0, BN)
    queries = tl.load(q + (head * G + g) * D + d, g < G, 0.0)           # (BG, D)
    m, s = tl.full([BG], float("-inf"), tl.float32), tl.zeros([BG], tl.float32)
    sums = tl.zeros([BG, D], tl.float32)
    for start in range(0, T, BN):
        at = (head * T + start + n[:, None]) * D + d
        is_token = start + n < T
        keys = tl.load(k + at, is_token[:, None], 0.0)                  # (BN, D)
        values = tl.load(v + at, is_token[:, None], 0.0)
        x = tl.dot(queries, tl.trans(keys)) * D ** -0.5                 # (BG, BN)
        m, s, sums = absorb(tl.where(is_token, x, float("-inf")), values, m, s, sums)
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
# Not a byte too many, and yet it would be slow: there are as many programs as there are heads in
# the batch, and a GPU has more than a hundred *multiprocessors* to keep busy. The remedy is to cut
# each head's tokens into S parts. Every part ends with its own `m`, `s` and sums, and a second
# kernel joins them in the way a larger logit was met above: all fade to the largest `m`.

# %%
@triton.jit
def split(q, k, v, stats, parts, T, G: tl.constexpr, D: tl.constexpr, BG: tl.constexpr,
          BN: tl.constexpr):
    part, head, S = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    g, d, n = tl.arange(0, BG), tl.arange(0, D), tl.arange(0, BN)
    is_q = g[:, None] < G
    queries = tl.load(q + (head * G + g[:, None]) * D + d, is_q, 0.0)   # (BG, D)
    m, s = tl.full([BG], float("-inf"), tl.float32), tl.zeros([BG], tl.float32)
    sums = tl.zeros([BG, D], tl.float32)
    for start in range(part * BN, T, S * BN):                           # every S-th block is ours
        at = (head * T + start + n[:, None]) * D + d
        is_token = start + n < T
        keys = tl.load(k + at, is_token[:, None], 0.0)                  # (BN, D)
        values = tl.load(v + at, is_token[:, None], 0.0)
        x = tl.dot(queries, tl.trans(keys)) * D ** -0.5                 # (BG, BN)
        m, s, sums = absorb(tl.where(is_token, x, float("-inf")), values, m, s, sums)
    mine = head * S + part
    tl.store(stats + mine * 2 * G + g, m, g < G)
    tl.store(stats + mine * 2 * G + G + g, s, g < G)
    tl.store(parts + (mine * G + g[:, None]) * D + d, sums, is_q)


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
# again. So the count can be done for a model and a text too large for this machine. Let us take
# Llama-3-8B's shape, one text of 131,072 tokens, and a GPU of 132 multiprocessors (an H100).

# %%
def split_traffic(S, H, G, D, T, e):
    """Bytes that run_split moves for one text; e bytes an element of q, k, v and o."""
    return H * (2 * T + (S + 1) * G) * D * e + 2 * H * S * G * (D + 2) * 4

assert split_bytes == split_traffic(7, H, G, D, T, q.element_size())

LLAMA, N_PROCESSORS = (8, 4, 128, 131072, 2), 132                       # H, G, D, T, e
S, once = torch.arange(1, 65), sum((2 * T + 2 * G) * H * D * e for H, G, D, T, e in [LLAMA])
busy = (LLAMA[0] * S / N_PROCESSORS).clamp(max=1) * 100
extra = torch.tensor([split_traffic(n, *LLAMA) / once - 1 for n in S.tolist()]) * 100
enough = int(S[busy == 100][0])
ax = axes(f"{enough} parts a head keep a whole GPU busy, for {extra[enough - 1]:.1f} % more bytes",
          "parts S of each of 8 heads", "[%]")
ax.plot(S, busy, color=DARK)
ax.plot(S, extra, color=BLUE, linestyle="--")
label(ax, 44, 100, "multiprocessors with work", dx=0, dy=-10)
label(ax, 44, extra[43], "bytes more", dx=0, dy=10, color=BLUE)
ax.axvline(enough, color=LIGHT, zorder=0)
ax.set(ylim=(-4, 108), xlim=(1, 64), xticks=[1, enough, 32, 48, 64])
plt.show()
assert busy[0] < 10 and busy[enough - 1] == 100 and extra[enough - 1] < 1

# %% [markdown]
# ## The ledger of a step
#
# Dense attention gains little by a kernel of our own: PyTorch has such kernels. A step over three
# zones has none, and as a row of PyTorch operations it hands tensors from one to the next through
# memory: centroids, unpacked from 4 bits a number to 32; logits, masses, an order; and the
# retrieved tokens, which are gathered, that is read and written, before they are read again. Let us
# count what really happens: a *mode* sees every operation that PyTorch runs, with its tensors.

# %%
class Ledger(TorchDispatchMode):
    """Adds up the bytes that each operation reads and writes; views move nothing."""
    PICKS = "index_select", "gather"                                    # read what they return

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if not op.is_view and op is not torch.ops.aten._unsafe_view.default:
            name, outs = op.overloadpacket.__name__, list(tensors(out))
            reads = outs + list(tensors(args[-1])) if name in self.PICKS else tensors(args)
            total = sum(map(size, [*reads, *outs]))
            self.bytes[name] = self.bytes.get(name, 0) + total
        return out

def tensors(x):
    """The tensors among arguments, lists of them too."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from tensors(y)

def size(x):
    """Bytes of a tensor; an expanded dimension counts once."""
    return x.element_size() * torch.Size(
        n for n, stride in zip(x.shape, x.stride(), strict=True) if stride).numel()

# %%
n_text = (text.n_prompt - config.sink - config.local) // config.cluster * config.cluster
middle = slice(config.sink, config.sink + n_text)
index, *stores = cluster_segment(k[:, :, middle], v[:, :, middle], config)
rest = tuple(torch.cat([x[:, :, :config.sink], x[:, :, middle.stop:]], 2) for x in (k, v))
steady = *rest, torch.zeros(1, H, 1, rest[0].shape[2])
def budget_of(n):
    """The Budget of a step behind a text of n tokens."""
    retrieve, ranked = limits_of(config, torch.tensor([[n]]))
    R, K = int(retrieve), int(ranked)
    return Budget(retrieve, ranked, config.values, R, K, N=R * config.largest)

budget, method = budget_of(n_text), config.method()
step = q, steady, index, stores, budget, method

with Ledger() as ledger:
    eager = attend(*step)
with counted() as moved:
    ours = kernels.attend(*step)
torch.testing.assert_close(ours, eager)

# %% [markdown]
# The two agree. What must be moved at the least? The query and the output; of every cluster its
# centroid, in 4 bits a number, with size, spread and scale, 8 bytes, for all are ranked; keys and
# values of the steady zone; the keys of the retrieved clusters, and the values of those tokens of
# theirs that weigh most, a fifth; and mean values, of the estimated clusters and for the other
# tokens of the retrieved ones.

# %%
def retrieved(step):
    """Tokens of the clusters that a head retrieves, on average over heads."""
    q, steady, index, _, budget, method = step
    q = q.float() * q.shape[3]**-0.5
    near, far = q @ steady[0].float().mT, method.centroid_logits(q, index, method)
    order = rank_clusters(q, far, near, index, budget.K, method)
    _, ends, _ = choose_clusters(order, index, budget)
    return float(ends[..., -1].float().mean())

def least(step, n):
    """Bytes that no kernel can do without, for that step: a head retrieves n tokens."""
    q, steady, index, _, budget, _ = step
    (B, H, G, D), e = q.shape, q.element_size()
    live = index.sizes.numel() if index.sizes.is_meta else int((index.sizes > 0).sum())
    rows = 2 * G + 2 * steady[0].shape[2] + n + n * config.values
    vectors, vector = live + B * H * budget.K, index.means[0, 0, 0].nbytes
    return B * H * rows * D * e + vectors * vector + 8 * live

floor = least(step, retrieved(step))
eager_bytes, our_bytes = sum(ledger.bytes.values()), sum(map(sum, moved.values()))
print(f"PyTorch moves {eager_bytes / 1e6:.2f} MB, the kernels {our_bytes / 1e6:.2f} MB; "
      f"{floor / 1e6:.2f} MB must be moved")

# %%
ax = axes(f"PyTorch moves {eager_bytes / floor:.1f} times the bytes a step needs, the kernels "
          f"{our_bytes / floor:.1f} times", "moved in one layer's step [MB]", "",
          size=(7.5, 2.7))
bars = {"PyTorch": ledger.bytes, "kernels": {name.removesuffix("_kernel"): sum(n)
                                             for name, n in moved.items()},
        "the least": {"": floor}}
for y, parts in enumerate(bars.values()):
    left = 0
    for i, (name, n) in enumerate(sorted(parts.items(), key=lambda item: -item[1])):
        ax.barh(y, n / 1e6, 0.6, left / 1e6, color=(MIDDLE, LIGHT)[i % 2], edgecolor="white",
                linewidth=0.5)
        if n > 0.08 * eager_bytes:
            ax.text((left + n / 2) / 1e6, y, name, ha="center", va="center", fontsize=9)
        left += n
ax.set(yticks=range(3), yticklabels=bars, ylim=(2.5, -0.5))
plt.show()
assert eager_bytes > 2 * our_bytes and our_bytes < 1.5 * floor

# %% [markdown]
# And for a text that is worth it? Tensors on the device `meta` have shapes and no data: PyTorch
# runs the step, and the ledger adds up, as if they had. (Nothing is computed: no clusters needed.)

# %%
H_l, G_l, D_l, T_l, _ = LLAMA
C, W = config.slots(T_l), config.steady

def meta(*shape, dtype=torch.bfloat16):
    """A tensor (1, H, *shape) of Llama's that has no data."""
    return torch.empty(1, H_l, *shape, dtype=dtype, device="meta")

def on_meta(budget):
    return budget._replace(retrieve=budget.retrieve.to("meta"), ranked=budget.ranked.to("meta"))

vectors = meta(C, D_l // 2, dtype=torch.uint8)
index_l = Index(vectors, vectors, meta(C, dtype=torch.float32), meta(C, dtype=torch.int64),
                meta(C), meta(C, 2), meta(1, D_l, dtype=torch.float32))
large = (meta(G_l, D_l), (meta(W, D_l), meta(W, D_l), meta(1, W, dtype=torch.float32)), index_l,
         (meta(T_l, D_l), meta(T_l, D_l)), on_meta(budget_of(T_l)), method)
n_large = large[4].R * config.cluster           # tokens of clusters of the mean size
with Ledger() as ledger:
    attend(*large)
large_bytes, dense_bytes = sum(ledger.bytes.values()), split_traffic(enough, *LLAMA)
print(f"at {T_l:,} tokens, bf16: PyTorch {large_bytes / 1e6:.0f} MB a layer, the least "
      f"{least(large, n_large) / 1e6:.1f} MB, dense attention {dense_bytes / 1e6:.0f} MB")
assert large_bytes > dense_bytes > 10 * least(large, n_large)

# %% [markdown]
# So the plain step moves more than dense attention, whose bytes the index was to save: the method
# needs its operations fused. A kernel unpacks and converts what it has just read, in registers.
# (`torch.compile` fuses much of this too, as [notebook 05](05_compile.ipynb) shows, but not
# through a gather or a softmax.) What the kernels move beyond the least is mostly the masses of the
# clusters, which one kernel leaves for the next.
#
# ## Machine code
#
# A multiprocessor has 65,536 registers and, on an H100, 228 KB of *shared memory* into which blocks
# are fetched ahead. A program that takes too much of either runs alone, or not at all; one that
# needs more than 255 registers a thread *spills* them to slow memory. The compiler runs without a
# GPU, so we can ask. Here is our third kernel for an H100 (compute capability 9.0), in fp16 at
# Llama's shape, with blocks of more and more tokens.

# %%
x, f = meta(G_l, D_l, dtype=torch.float16), meta(1, dtype=torch.float32)
tiles = [{"G": G_l, "D": D_l, "BG": 16, "BN": BN, "num_warps": 4, "num_stages": 3}
         for BN in (16, 32, 64, 128, 256, 512)]
facts = needs(split, (x, x, x, f, f, T_l), tiles, 90, helpers=[absorb])
for fact in facts:
    print(f"{fact['BN']:4} tokens: {fact['registers']} registers, {fact['spilled']} bytes spilled, "
          f"{fact['shared'] / 1024:.0f} KB of shared memory")

# %%
LIMITS = {"a block of an H100": 227, "a block of an RTX 4090": 99}      # KB, vendor's tables
BN, shared = [fact["BN"] for fact in facts], [fact["shared"] / 1024 for fact in facts]
fits = {name: max(n for n, kb in zip(BN, shared, strict=True) if kb <= limit)
        for name, limit in LIMITS.items()}
widest = max(fact["BN"] for fact in facts if not fact["spilled"])
largest = list(fits.values())
ax = axes(f"Blocks of {largest[1]} tokens fit everywhere, of {largest[0]} an H100; larger than "
          f"{widest} they spill", "tokens in a block", "shared memory of a program [KB]")
ax.loglog(BN, shared, "o-", color=DARK, base=2)
for fact, kb in zip(facts, shared, strict=True):
    ax.annotate(f"{fact['registers']} registers" + f",\n{fact['spilled']} B spilled" *
                bool(fact["spilled"]), (fact["BN"], kb), (7, -4), textcoords="offset points",
                fontsize=9, va="top", bbox={"fc": "white", "ec": "none", "pad": 1})
for name, limit in LIMITS.items():
    ax.axhline(limit, color=BLUE, linestyle="--", linewidth=1)
    label(ax, BN[0], limit, f"limit of {name}", dx=0, dy=7, color=BLUE)
ax.set(xlim=(13, 1024), ylim=(10, 800), xticks=BN, xticklabels=BN, yticks=(16, 64, 256),
       yticklabels=(16, 64, 256))
plt.show()
assert largest[1] < largest[0] < BN[-1] and widest < BN[-1]

# %% [markdown]
# The library chooses its tiles by shape (`tile_rows`) so that 99 KB hold them, and a test compiles
# every kernel for every shape and reads the same numbers.
# `python -m bench.footprint 80 90 100` prints them all; here a step of Llama's shape, for an A100,
# an H100 and a B200.

# %%
from bench.footprint import elsewhere

step_facts = elsewhere(80, 90, 100, "--step", "bf16", G_l, D_l)
names = list(dict.fromkeys(fact["kernel"] for fact in step_facts))
print(f"{'':16}{'registers':^18}{'shared memory, KB':^18}{'spilled':^14}")
for name in names:
    own = [fact for fact in step_facts if fact["kernel"] == name]
    print(f"{name:16}" + "".join(f"{fact['registers']:6}" for fact in own)
          + "".join(f"{fact['shared'] / 1024:6.1f}" for fact in own)
          + "".join(f"{fact['spilled']:4}" for fact in own))
assert all(fact["shared"] <= 99 * 1024 for fact in step_facts)
assert not any(fact["spilled"] for fact in step_facts)

# %% [markdown]
# ## Takeaway
#
# - A step waits for memory, so count bytes first: that tells what a kernel can gain, before it is
#   written.
# - An online softmax needs one pass; packing the query heads of a group reads each key once;
#   splitting fills the device for a few bytes more.
# - What PyTorch gains by a kernel of ours is what it would write between its operations: centroids
#   unpacked and tokens gathered, above all.
# - Registers and shared memory decide how large a block may be, and a compiler tells without a GPU.
#   How fast it is, it does not tell: that takes a GPU, and `make bench-gpu`.

# %%
print(f"bytes moved over bytes needed: one loop {loop_reads:.2f}, blocks 1.00, split "
      f"{split_bytes / must:.2f}; three zones in PyTorch {eager_bytes / floor:.2f}, by the kernels "
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
    if answer(a, b) is None:
        return False
    for one, two, three in ((a, b, c), (c, b, a), (b, a, c)):
        m, s, sums = answer(answer(one, two), three)
        if not torch.allclose(sums / s, x.softmax(0) @ values, atol=1e-5) or m != x.max():
            return False
    return True

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
# multiprocessor. All but the largest blocks have that.
#
# ```python
# for fact in facts:
#     n = min(65536 // (fact["registers"] * 128), 228 * 1024 // (fact["shared"] + 1024))
#     print(f"{fact['BN']:4} tokens a block: {n:2} programs, {n * fact['shared'] / 1024:.0f} KB")
# print(f"to cover a microsecond: {3.35e12 * 1e-6 / N_PROCESSORS / 1024:.0f} KB")
# ```
# </details>
