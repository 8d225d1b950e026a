# %% [markdown]
# # Which method, and when?
#
# **Goal.** Put every method of this project, and simple rivals, through one harness. Compare what
# the next token loses with the bytes that a step reads and with the bytes that are kept. Find where
# each method fails, what an index costs, and what a machine makes of the bytes. Then enter a method
# of your own.
#
# **You need.** [03](03_three_zones.ipynb), [08](08_why_vector_indexes_fail.ipynb) and
# [09](09_one_bit.ipynb), or their takeaways.
#
# **Time.** About a minute.
#
# **Paper.** RetroInfer ([2505.02922](https://arxiv.org/abs/2505.02922)), RetrievalAttention
# ([2409.10516](https://arxiv.org/abs/2409.10516)), AnTKV
# ([2506.19505](https://arxiv.org/abs/2506.19505)), Quest
# ([2406.10774](https://arxiv.org/abs/2406.10774)).
#
# **Before and after.** [09](09_one_bit.ipynb) kept one bit a number;
# [11](11_error_bars.ipynb) says how far a step may be off.
#
# **Predict first.** Three methods: read an eighth of all tokens exactly, chosen well; keep all
# tokens in 1 bit; read only the latest eighth. Order them by the loss of the next token.

# %%
import sys; sys.path[:0] = [".."]
import time
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from checks import agree
from figures_10 import draw_harness, plot_failures, plot_map, plot_roofline
from plots import versions

# %%
import antkv
import retrieval_attention as ra
from antkv import AnchorCache, AnchorConfig
from evaluation import fidelity, texts
from evaluation.fidelity import Chosen
from evaluation.retrieval import with_queries
from model import DenseCache, load
from retroinfer import RetroConfig, WaveIndex, cluster_segment, limits_of

torch.set_grad_enabled(False)
model, tokenizer = load(dtype=torch.float32, device="cpu")
H, D, G = model.config.num_key_value_heads, model.config.head_dim, 3
print(versions())

# %%
draw_harness()

# %% [markdown]
# ## One harness
#
# Dense attention reads two texts of 1,200 tokens: a story and Python code. A method gets the same
# keys and values, then the same 12 tokens one by one. Its outputs go on to the next layer. The
# measure is the KL divergence of its next-token distribution from dense attention's, in nats.

# %%
LENGTH, STEPS = 1200, 12
story = Path("../examples/lighthouse.txt").read_text("utf-8")
TEXTS = {"story": story, "code": texts.code("final")}
cases = {}
for name, text in TEXTS.items():
    case = fidelity.read(model, torch.tensor(tokenizer.encode(text)[:LENGTH]), STEPS)
    cases[name] = with_queries(model, case, case.n)             # of all its tokens
dense_rows = 2 * (LENGTH - 1)                   # of a head: keys and values of a step

def energy(q):
    """One query (1, H*G, 1, D) with the sums of squares of all queries q (1, H*G, T, D)."""
    return q.square().sum(2, keepdim=True).sqrt()

def kl_of(make, case):
    """(KL of each step, the layers' caches) of the caches that `make` makes."""
    past = case.past
    if getattr(make, "func", make) not in (AnchorCache, ra.GraphCache):
        past = [(energy(q), k, v) for q, k, v in past]          # no other looks at more
    caches = [fidelity.filled(make, *layer, STEPS) for layer in past]
    return fidelity.forced(model, case, caches)["kl"], caches

# %% [markdown]
# Bytes are counted as if an exact number had 16 bits, and for one head, in rows: a row is a key or
# a value. A step of a graph or of qcIVF reads at most so many; other counts are exact.

# %%
def rows_read(cache):
    """Rows of D 16-bit numbers that a step reads for a kv head."""
    if isinstance(cache, AnchorCache):
        return cache.true_bits() / 16 * dense_rows              # it reads all that it holds
    if isinstance(cache, ra.GraphCache):
        c, live = cache.config, int(cache.n_tokens[0] - cache.n_indexed[0])
        n, C = int(cache.n_indexed[0]), cache.index.lists.shape[2]
        keys = n if c.index == "flat" else C + min(n, G * c.visits * c.listed)
        return 2 * live + keys + G * c.top
    return fidelity.rows_read(cache)

# %%
def rows_kept(cache):
    """Rows that a kv head keeps, on the device or on the host."""
    if isinstance(cache, AnchorCache):
        return cache.true_bits() / 16 * dense_rows
    if isinstance(cache, WaveIndex):
        clusters = float((cache.index.sizes[0] > 0).sum(-1).float().mean())
        return dense_rows + clusters * (2 * cache.config.bits / 16 + 6 / D)
    if isinstance(cache, ra.GraphCache):
        lists = cache.index.lists[0, 0].numel() * 2 / D         # 4 bytes a number
        return dense_rows + cache.index.centroids.shape[2] + lists
    is_window = getattr(cache, "choose", None) in WINDOWS
    return 2 * cache.read.sum(-1).float().mean().item() if is_window else dense_rows

# %% [markdown]
# ## The methods
#
# Rivals first. *Window* reads the first tokens and the latest ones. The *oracle* reads the tokens
# that weigh most; it has to read all keys to know them, so it is a bound, no method. *Quest* keeps
# the least and the largest key of each page, channel by channel, and reads the pages that may weigh
# most; here it also reads the first and the latest tokens. The wave index, qcIVF with a sample, and
# codes of 1 bit are the library's.
#
# This text is short for the wave index. Its floor decides how much it retrieves, `min_retrieve`
# clusters, and not its share. And "paper's" is the published method with smaller segments and
# updates: its share of 1.8 % is one cluster here, and most of what it reads are the latest tokens.
# So this plot says nothing of either at 100,000 tokens.

# %%
def quest(cache, q, logits, n):
    """Marks Quest's pages, the first 4 and the latest 32 tokens: about n in all."""
    mask = fidelity.quest(cache, q, logits, n=(n - 36) // fidelity.PAGE)
    mask[..., :4], mask[..., -32:] = True, True
    return mask

# %%
q, k, _ = (x[0] for x in cases["code"].past[12])                # (H*G, T, D), (H, T, D)
n_pages = k.shape[1] // fidelity.PAGE
pages = k[0, :n_pages * fidelity.PAGE].unflatten(0, (n_pages, -1))          # (pages, 16, D)
one = q[:G, -1:]                                                # the queries of one kv head
bound = torch.maximum(one * pages.amin(1), one * pages.amax(1)).sum(-1)     # (G, pages)
assert ((pages @ one.mT[:, None]).amax((2, 3)) <= bound + 1e-3).all(), "no product is larger"

best = bound.amax(0).topk(7).indices
mine = torch.zeros(n_pages).index_fill(0, best, 1.0)
cache = DenseCache(k.shape[1])
cache.k = k[None]
theirs = fidelity.quest(cache, q[:, -1].view(1, H, G, D), torch.zeros(1, H, G, k.shape[1]), n=7)
torch.testing.assert_close(mine, theirs[0, 0, :n_pages * fidelity.PAGE:fidelity.PAGE].float())

# %%
c, indexed = RetroConfig(), torch.tensor(LENGTH)
assert limits_of(c, indexed)[0] == c.min_retrieve > 2 * c.retrieve * LENGTH / c.cluster
print(f"the wave index retrieves {c.min_retrieve * c.cluster / LENGTH:.0%} of the tokens")

# %%
FEW = LENGTH // 8
WINDOWS = [partial(fidelity.window, n=FEW), partial(fidelity.window, n=2 * FEW)]
EXACT = {"sink": 4, "local": 32, "update": 256}
METHODS = {
    "dense": DenseCache,
    "window, 1/8": partial(Chosen, WINDOWS[0]),
    "window, 1/4": partial(Chosen, WINDOWS[1]),
    "oracle, 1/8": partial(Chosen, partial(fidelity.oracle, n=FEW)),
    "Quest": partial(Chosen, partial(quest, n=FEW)),
    "wave": partial(fidelity.wave, RetroConfig()),
    "wave, paper's": partial(fidelity.wave, replace(
        RetroConfig.paper(), segment=1024, update=512)),
    "qcIVF, sample": partial(ra.GraphCache, ra.GraphConfig(
        index="qcivf", lift=True, centroids=128, listed=40, top=60, **EXACT)),
    "codes, 1 bit": partial(AnchorCache, AnchorConfig(bits=1, anchors=0.01))}

# %%
kl, facts = {}, {}
for name, make in METHODS.items():
    for kind, case in cases.items():
        steps, caches = kl_of(make, case)
        kl.setdefault(name, {})[kind] = steps
    facts[name] = [sum(map(f, caches)) / len(caches) / dense_rows for f in (rows_read, rows_kept)]

def interval(values, draws=2000):
    """Mean, and the 95 % interval of means of as many values drawn anew: (low, mean, high)."""
    x, dice = torch.tensor(values), torch.Generator().manual_seed(0)
    means = x[torch.randint(len(x), (draws, len(x)), generator=dice)].mean(1)
    return float(means.quantile(0.025)), float(x.mean()), float(means.quantile(0.975))

# %%
found = {name: (*facts[name], *interval(list(chain(*by.values())))) for name, by in kl.items()}
print(f"{'':16}{'read':>7}{'kept':>7}{'KL':>9}   interval           each text")
for name, (read_share, kept, low, mean, high) in found.items():
    each = "  ".join(f"{kind} {sum(x) / len(x):.4f}" for kind, x in kl[name].items())
    print(f"{name:16}{read_share:7.1%}{kept:7.1%}{mean:9.4f}   {low:.4f} to {high:.4f}   {each}")

# %%
plot_map({name: row for name, row in found.items() if name != "dense"},
         "The wave index loses less than windows and codes; these keep less")
loss = {name: row[3] for name, row in found.items()}
assert loss["dense"] < 1e-6                     # the control: the harness itself loses nothing
assert found["wave"][4] < min(found[name][2] for name in ("window, 1/8", "window, 1/4", "Quest",
                                                          "codes, 1 bit", "wave, paper's"))
assert loss["oracle, 1/8"] < loss["window, 1/8"] / 2
assert found["Quest"][0] > found["window, 1/8"][0] and loss["Quest"] > loss["window, 1/8"]

# %% [markdown]
# Three things to read from it.
#
# - Methods that choose (wave, Quest, qcIVF) keep everything. The wave index and Quest read a fifth
#   or less; qcIVF may read as much as the codes. They need memory somewhere, if only on the host.
# - The interval of the wave index, with the default settings, lies below those of both windows.
#   On average, Quest loses more than a window that reads less.
# - Codes keep a third and read a third. Most of that third are codebooks, which do not grow with
#   the text ([09](09_one_bit.ipynb)). At this length the interval of the codes overlaps those of
#   the windows, which keep less. Where intervals overlap, these 24 steps do not tell the order.
#
# The intervals count the 24 steps as independent. Steps of one text are not, so the true intervals
# are wider.
#
# Is that fair to Quest? The published one lets the first two layers read all tokens. Does that
# help?

# %%
def below_dense(case):
    """KL of each step of Quest, if the first two layers are dense."""
    caches = [fidelity.filled(METHODS["Quest"] if n > 1 else DenseCache, energy(q), k, v, STEPS)
              for n, (q, k, v) in enumerate(case.past)]
    return fidelity.forced(model, case, caches)["kl"]

low, mean, high = interval(list(chain(*map(below_dense, cases.values()))))
print(f"Quest above two dense layers: KL {mean:.3f}, {low:.3f} to {high:.3f}")
assert mean > loss["window, 1/8"]

# %% [markdown]
# On these texts, Quest still loses more than the window, on average.
#
# ## Where each fails
#
# Four heads made for trouble, each with a known answer. The measure is the error of the output over
# its length. An output of zeros would have error 1.
#
# - *aggregation*: all tokens weigh about the same; the output is their mean.
# - *copying*: one key of 1,200 holds nearly all the weight, another one at each step.
# - *drift*: copying again, from the second half of 4,400 tokens. In the first half keys and queries
#   are large in the odd channels, in the second half in the even channels. A method reads one half
#   after the other. What it learns from the first half does not fit the second.
# - *short*: 200 tokens, fewer than the wave index waits for before it indexes.

# %%
def head_for(kind, T=1200, n_steps=16):
    """q, k, v (1, 1, T + n_steps, D) of a head made for trouble; (T, n_steps)."""
    T = {"short": 200, "drift": 4400}.get(kind, T)
    dice = torch.Generator().manual_seed(7)
    k, v, q = torch.randn(3, T + n_steps, D, generator=dice)
    q = 0.05 * q if kind == "aggregation" else 0.8 * q
    if kind == "drift":
        for x in (q, k):
            x[:T // 2, ::2] *= 0.1
            x[T // 2:, 1::2] *= 0.1
    if kind in ("copying", "drift"):
        first, size = (T // 2, 5) if kind == "drift" else (100, 2.5)
        q[T:] = size * k[torch.randint(first, T - 300, (n_steps,), generator=dice)]
    return [x[None, None] for x in (q, k, v)], T, n_steps

# %%
def error_on(make, kind):
    """Mean relative error of the steps' outputs."""
    (q, k, v), T, n_steps = head_for(kind)
    cache, away = make(T + n_steps), []
    for part in (slice(0, T // 2), slice(T // 2, T)):
        cache.prefill(*(x[:, :, part] for x in (q, k, v)))
    for t, o in enumerate(fidelity.feed(cache, *(x[:, :, T:] for x in (q, k, v)))):
        past = [x[:, :, :T + t + 1] for x in (k, v)]
        right = F.scaled_dot_product_attention(q[:, :, T + t:T + t + 1], *past)
        away.append(float((o - right).norm() / right.norm()))
    return sum(away) / n_steps

# %%
CASES = "aggregation", "copying", "drift", "short"
skip = "dense", "window, 1/4"
def error_of(name, case):
    """error_on; not a number where the text is too short for codebooks of its own."""
    is_possible = (name, case) != ("codes, 1 bit", "short")
    return error_on(METHODS[name], case) if is_possible else torch.nan

errors = {name: {case: error_of(name, case) for case in CASES}
          for name in METHODS if name not in skip}
plot_failures(errors, "Error of the output, relative: no method is good at everything")
assert errors["window, 1/8"]["copying"] > 0.9 > 0.3 > errors["wave"]["copying"]
assert errors["oracle, 1/8"]["aggregation"] > errors["wave"]["aggregation"]
assert errors["codes, 1 bit"]["aggregation"] == min(by["aggregation"] for by in errors.values())
assert errors["codes, 1 bit"]["drift"] > 1.5 * errors["codes, 1 bit"]["copying"]
assert errors["wave"]["drift"] < 0.1 < 0.3 < errors["codes, 1 bit"]["copying"]
assert errors["wave"]["short"] < 1e-5 < errors["window, 1/8"]["short"]

# %% [markdown]
# Random keys have no clusters, so they are hard for an index.
#
# Aggregation needs all values. The values have nothing in common, so a method that reads few tokens
# is far off, however well they are chosen. Estimates from centroids or from a sample are off, too.
# Codes read all tokens and are nearest.
#
# Copying needs one token exactly. A window that does not hold the token fails. A code blurs the
# token. The lists of qcIVF belong to earlier queries, and none of these looked for the token.
#
# Drift is harder than copying for codes: their codewords come from the first half. The wave index
# weighs channels by the first half, too, but it clusters the keys of the second half anew, and
# finds the token.
#
# The wave index and qcIVF read a short text exactly, because they index late. Codes need some 600
# tokens to make codebooks of their own, so their last cell is empty. With fewer tokens the command
# line asks for codebooks that were made before.
#
# ## What an index costs
#
# Processor time to index 2,048 keys of one head, three times each. Other programs share the
# machine, so the spread is printed and nothing is asserted.

# %%
q, k, v = (x[:, :1, :1024].repeat(1, 1, 2, 1) for x in cases["code"].past[12])
k = k + 0.1 * torch.randn_like(k)
config = ra.GraphConfig()
nothing, links = torch.zeros(k.shape[2]), torch.full((k.shape[2], config.degree), -1).int()
train = q[0, 0, -1024:] * D ** -0.5
JOBS = {
    "clusters (wave)": lambda: cluster_segment(k, v, RetroConfig()),
    "lists of queries (qcIVF)": lambda: ra.build(train, k[0, 0], nothing, links[:, :0], replace(
        config, index="qcivf")),
    "graph": lambda: ra.build(train, k[0, 0], nothing, links, config),
    "codebook and codes, 1 bit": lambda: antkv.fit_words(k[0], torch.ones(1, k.shape[2]), 8)}
for name, job in JOBS.items():
    times = []
    for _ in range(3):
        start = time.process_time()
        job()
        times.append(1e3 * (time.process_time() - start))
    print(f"{name:28}{sorted(times)[1]:8.0f} ms   {min(times):.0f} to {max(times):.0f}")

# %% [markdown]
# ## What a machine makes of the bytes
#
# A step cannot be faster than its bytes over the bandwidth of memory: the line of the *roofline*.
# The bandwidth is the best of many sums of a large tensor, in turns with the steps: other programs
# may run meanwhile. Measured points stand above the line by what a step does besides reading. Each
# is the median of 15 runs, with the least and the most. (A tensor of a few MB may stay in the
# processor's cache. Then it is read faster.)

# %%
def timed(function, n=15):
    """(least, median, most) ms of n runs."""
    times = []
    for _ in range(n):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times), sorted(times)[n // 2], max(times)

big = torch.ones(2**25)                                         # 134 MB: no cache holds it
# %%
points, sums = {"dense attention": [], "wave, eager": []}, []
for T in (2048, 8192, 24576):
    sums.append(timed(big.sum)[0])
    k, v = torch.randn(2, 1, H, T, D)
    q = torch.randn(1, H * G, 1, D)
    run = partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=True)
    points["dense attention"].append((k.nbytes + v.nbytes, *timed(run)))
    cache = WaveIndex(RetroConfig(iterations=1), T + 64)
    cache.prefill(q, k, v)
    cache.update()
    run = partial(cache.decode, q, k[:, :, :1], v[:, :, :1])
    points["wave, eager"].append((cache.bytes_read(), *timed(run)))

# %%
bandwidth = big.nbytes / (min(sums) / 1e3)                      # bytes a second
plot_roofline(points, bandwidth, "An eager step of the wave index is far above the line of memory")
ratio = {name: [row[2] / (1e3 * row[0] / bandwidth) for row in rows]
         for name, rows in points.items()}
print(f"bandwidth {bandwidth / 1e9:.1f} GB/s; times over the line:",
      {name: [round(x, 1) for x in xs] for name, xs in ratio.items()})
assert ratio["wave, eager"][-1] > 2 * ratio["dense attention"][-1]

# %% [markdown]
# Dense attention stands above its line too. Eager operations cost time of their own, so the wave
# step stands much further above. It saves a far smaller share of the time than of the bytes, and
# for the shortest text it takes longer than dense attention. Notebooks [05](05_compile.ipynb) and
# [06](06_kernels.ipynb) bring a step nearer to its line, and `make bench` measures it.
#
# ## Which, when?
#
# Each row follows from a figure of this notebook, for texts of its length, or names where it was
# measured.
#
# | what you have | take | because |
# |---|---|---|
# | a text of some hundred tokens | dense attention | the wave index would read it all anyhow |
# | a longer text, and memory for all of it | the wave index | it lost least, and read a fifth |
# | such memory on the host only | the wave index, `--offload` | notebook 07 predicts: few misses |
# | memory for a third of it | codes or a window: try both | here their intervals overlap |
# | memory for a tenth of a very long text | codes | bits: notebook 09; its loss: not measured |
# | one token must be copied | the wave index | windows and lists of queries fail, codes blur |
# | attention over many unlike values | dense attention | others are off by half or more |
# | a subject that changes | the wave index | codes fail; notebook 08: a graph holds, too |
# | an error bar is needed | `--check` | notebook 11 |
#
# ## Takeaway
#
# - Ask of a method: what does it read, what does it keep, what is lost, and on which texts.
# - Choosing tokens saves reading and no memory. Windows and codes save memory, and lose more than
#   the wave index. (Quest, which also chooses, loses most of all here.)
# - What a step does not read should be estimated ([03](03_three_zones.ipynb)). The wave index reads
#   more tokens than the oracle and estimates others, and it need not look at all keys.
# - No method is good at everything. A made-up head for each failure is cheap: keep some.

# %%
print("KL:", *(f"{name} {loss[name]:.3f}  " for name in ("window, 1/8", "codes, 1 bit", "Quest",
                                                         "wave", "oracle, 1/8")))

# %% [markdown]
# ## Exercises
#
# **1.** The capstone: your own method on the plot. Write `choose(cache, q, logits, n)`. It returns
# a mask (1, H, T) of at most n tokens that a step reads. q (1, H, G, D) is scaled, logits
# (1, H, G, T), the keys are `cache.k[:, :, :T]`. Use `logits` only if you accept that your method
# reads all keys. Beat the window at equal n on the story.

# %%
def choose(cache, q, logits, n):
    """Mask (1, H, T) of at most n tokens."""
    ...                                 # your code


# %%
def check(answer):
    """Whether it reads at most n tokens, and its KL is below that of the window."""
    logits = torch.randn(1, H, G, 900, generator=torch.Generator().manual_seed(1))
    cache = DenseCache(1000)
    cache.k = torch.randn(1, H, 1000, D)
    mask = answer(cache, torch.randn(1, H, G, D), logits, FEW)
    if mask is None:
        return agree([("KL on the story", None, sum(kl["window, 1/8"]["story"]) / STEPS)])
    is_few = bool((mask.sum(-1) <= FEW).all())
    steps, caches = kl_of(partial(Chosen, partial(answer, n=FEW)), cases["story"])
    mine, theirs = sum(steps) / STEPS, sum(kl["window, 1/8"]["story"]) / STEPS
    plot_map({name: row for name, row in found.items() if name != "dense"} | {
        "yours": (rows_read(caches[0]) / dense_rows, 1.0, *interval(steps))}, "And yours")
    print(f"KL on the story: yours {mine:.4f}, window {theirs:.4f}")
    return agree([("reads at most n", is_few, True), ("below the window", mine < theirs, True)])

print("right" if check(choose) else "not yet")

# %% [markdown]
# <details><summary>Answer</summary>
#
# One of many: the mean key of each eight tokens stands for them, and the latest tokens are always
# read.
#
# ```python
# def choose(cache, q, logits, n):
#     T, size, late = logits.shape[-1], 8, 32
#     pages = cache.k[:, :, :T // size * size].unflatten(2, (-1, size)).mean(3)
#     worth = (q @ pages.mT).amax(2)                                # (1, H, pages)
#     best = worth.topk((n - late - 4) // size).indices
#     mask = torch.zeros(1, H, T, dtype=torch.bool)
#     rows = best[..., None] * size + torch.arange(size)
#     mask.scatter_(-1, rows.flatten(2), True)
#     mask[..., :4], mask[..., -late:] = True, True
#     return mask
# ```
# </details>
#
# **2.** Are 24 steps enough to tell the codes from the window of a quarter? Look at the interval of
# the difference.
#
# <details><summary>Answer</summary>
#
# No: the interval of the difference holds 0.
#
# ```python
# names = "codes, 1 bit", "window, 1/4"
# pairs = [torch.tensor(list(chain(*kl[name].values()))) for name in names]
# away = pairs[0] - pairs[1]
# low, mean, high = interval(away.tolist())
# print(f"difference of KL {mean:.4f}, {low:.4f} to {high:.4f}")
# assert low < 0 < high
# ```
# </details>
#
# **3.** What if every number were counted at 32 bits, as it is computed here? Which methods look
# better than they are?
#
# <details><summary>Answer</summary>
#
# Codes and 4-bit centroids stay as they are, and exact numbers count twice. So codes would look
# twice as good, by a choice of unit.
#
# ```python
# bits = AnchorCache(AnchorConfig(bits=1), 700)
# bits.prefill(*(x[:, :, :700] for x in cases["code"].past[3]))
# by_16, by_32 = bits.true_bits() / 16, bits.true_bits(exact=4) / 32
# print(f"share of dense at 16 bits {by_16:.0%}, at 32 bits {by_32:.0%}")
# assert by_32 < by_16
# ```
# </details>
