# %% [markdown]
# # Why is decoding slow, and how little of the cache matters?
#
# **Goal.** Count the bytes that one new token costs, and measure whether reading them or computing
# with them takes the time. Then look at where the attention of a real model goes: how many of the
# tokens that a step reads does it need?
#
# **You need.** PyTorch tensors, and attention as softmax(q·k) times v. A *kv head* has one key and
# one value a token; a group of query heads shares it.
#
# **Time.** A minute to run (once two more, to run the model), half an hour to read.
#
# **Paper.** RetroInfer, [arXiv 2505.02922](https://arxiv.org/abs/2505.02922), sections 1 and 2.
#
# **Before and after.** [00 one step](00_one_step.ipynb) ·
# [02 clusters](02_clusters.ipynb)
#
# **Predict first.** A head gives each token of the text a weight; the weights add up to one. Sort
# them. Of every 1,000 tokens of a text, how many does a typical head need to gather 90 % of its
# attention? Write your number down.

# %%
import sys; sys.path[:0] = [".."]
import time

import torch
import torch.nn.functional as F
import figures_01 as figures
from capture import captured
from checks import agree
from plots import versions

from model import DenseCache

texts = {name: captured(name) for name in ("lighthouse", "expedition")}
text = texts["lighthouse"]
n_layers, H, T, D = text.k.shape
G = text.q.shape[1] // H                # query heads that share a key
print(versions())

# %% [markdown]
# Everything below is real. The default model, SmolLM2-135M, has read two texts: a lighthouse
# keeper's log book and the reports of a desert survey. It was asked for a number that each text
# states once, and has answered. We kept its queries, keys and values.

# %%
print(f"{n_layers} layers, {H} kv heads of {G} query heads, {D} dims")
for name, x in texts.items():
    print(f"{name}: {len(x.pieces):,} tokens. It ends: {''.join(x.pieces[x.n_prompt:])}")
figures.idea()

# %% [markdown]
# ## What a token costs
#
# To make one token, the model reads each of its weights once. It also reads the key and the value
# of every earlier token, in every layer and head. All texts of a batch share the weights. Each text
# has a cache of its own.

# %%
FP32 = 4                                                        # bytes a number
weights = text.n_parameters * FP32
kv_a_token = 2 * n_layers * H * D * FP32                        # a key and a value

def bytes_a_step(T, batch=1):
    """Bytes read for one new token of each of `batch` texts, T tokens long."""
    return weights + batch * T * kv_a_token

print(f"weights  {weights / 1e6:7.1f} MB a step, whatever the batch")
print(f"cache    {kv_a_token / 1e3:7.1f} kB a token: {T * kv_a_token / 1e6:.1f} MB for our text")

# %% [markdown]
# Does the formula count what is there? Fill the library's dense cache and weigh it.

# %%
def filled(n):
    """The dense cache of layer n after the whole text."""
    cache = DenseCache(capacity=T)
    cache.prefill(*text.layer(n))
    return cache

weighed = sum(x.nbytes for x in (filled(0).k, filled(0).v))     # rows for T tokens, rounded up
print(f"one layer: {weighed / 1e6:.2f} MB weighed, {T * kv_a_token / n_layers / 1e6:.2f} counted")
assert 1 <= weighed / (T * kv_a_token / n_layers) < 1.02

# %%
lengths = torch.arange(0, text.config.context + 1, 64)
cross = weights / (8 * kv_a_token)              # with so many tokens, 8 caches weigh as much
figures.bytes_by_length(lengths, {n: bytes_a_step(lengths, n) for n in (1, 8)}, weights, cross)

# %% [markdown]
# ## Arithmetic or memory?
#
# A machine has two speeds: how fast it computes and how fast it reads. Work that does few
# operations for each byte is limited by reading. The *ridge* is the number of operations per byte
# at which reading and computing take equally long. We measure both speeds of this machine.

# %%
def seconds(work, repeats=5):
    """The shortest of some runs: other programs only make a run longer."""
    def once():
        start = time.perf_counter(); work()
        return time.perf_counter() - start
    return min(once() for _ in range(repeats))

large, square = torch.ones(2**26), torch.randn(1024, 1024)      # 256 MiB: more than a CPU's cache

def speeds():
    """Bytes/s of a sum, flop/s of a product of matrices."""
    return (large.nbytes / seconds(large.sum),
            2 * 1024**3 / seconds(lambda: square @ square, repeats=10))

before = speeds()

# %% [markdown]
# For each pair of a query and a key, attention does 2·D operations for the score, and 2·D to add
# the value. In decoding, only the G query heads of a group use a key. In prefill a whole block of
# queries uses a key that was read once. So we time one function on the same keys: with one query
# per key, with three (decoding: G = 3), with 16 and with 1,024. Other programs may run meanwhile.
# So the kinds take turns, and the shortest run of each kind counts. For the same reason we measure
# the speeds of the machine before and after, and the larger ones count.

# %%
keys = [text.layer(n)[1:] for n in range(n_layers)]             # k and v (1, H, T, D) of a layer

def attention(n_queries, n_tokens):
    """Seconds for n_queries per kv head over the first n_tokens, in all layers."""
    q = torch.randn(1, H, n_queries, D)
    pairs = [(k[:, :, :n_tokens], v[:, :, :n_tokens]) for k, v in keys]
    return seconds(lambda: [F.scaled_dot_product_attention(q, k, v) for k, v in pairs], repeats=1)

def shortest(kinds, rounds):
    """Seconds of the shortest run of each kind (queries per kv head, tokens)."""
    runs = [[attention(*kind) for kind in kinds] for _ in range(rounds)]
    return torch.tensor(runs).amin(0).tolist()

one, group, sixteen, quarter = shortest([(1, T), (G, T), (16, T), (1, T // 4)], 15)
block, = shortest([(1024, T)], 2)
took = {1: one, G: group, 16: sixteen, 1024: block}
bandwidth, compute = map(max, before, speeds())

# %%
print(f"the machine: {bandwidth / 1e9:.0f} GB/s, {compute / 1e9:.0f} Gflop/s, so the ridge is at "
      f"{compute / bandwidth:.0f} flop/byte")
for n, s in took.items():
    print(f"{n:5} queries per key: {s * 1e3:7.1f} ms, {s / one:6.1f} times one query's")
print(f"    1 query, a quarter of the tokens: {quarter / one:.2f} times")
points = {f"{n} per key": (n * D * 4 / (2 * D * FP32), n_layers * 4 * D * H * n * T / s)
          for n, s in took.items()}                             # operations per byte, per second
figures.roofline(bandwidth, compute, points)
assert group < 2.5 * one and sixteen < 8 * one, "much more arithmetic, little more time"
assert quarter < 0.5 * one, "a quarter of the bytes takes less than half the time"
assert points["1024 per key"][1] > 2 * points["3 per key"][1], "the machine can compute faster"

# %% [markdown]
# Sixteen queries need sixteen times the arithmetic of one query on the same bytes. They take less
# than eight times as long. But a quarter of the bytes takes less than half of the time. So a decode
# step gets faster if it *reads* less. (The points of few queries lie below the limit, because this
# function does not read as fast as a plain sum does.) Which keys could we leave unread?
#
# ## One query, by hand
#
# Attention is a softmax over inner products, and a sum of values with those weights. The query is
# the one that has to say the first digit of the answer. The keys are all keys before it.

# %%
def weights_of(text, n, t, shift=0):
    """Weights (H*G, t+1) that token t gives itself and all earlier tokens, in layer n.

    With a shift, each kv head gets the queries of another one, made as long as its own.
    """
    q, k, _ = text.layer(n)
    q = q[0, :, t].view(H, G, D)                                # (H, G, D)
    q = F.normalize(q.roll(shift, 0), dim=-1) * q.norm(dim=-1, keepdim=True)
    scores = q @ k[0, :, :t + 1].mT / D**0.5                    # (H, G, t+1)
    return scores.softmax(-1).flatten(0, 1)

def asking(text):
    """The token before the first digit of the answer."""
    return next(t for t in range(text.n_prompt, len(text.pieces)) if text.pieces[t + 1].isdigit())

ask = asking(text)
v = text.layer(12)[2][0, :, :ask + 1]                           # (H, ask+1, D)
mine = torch.stack([w @ v[head // G] for head, w in enumerate(weights_of(text, 12, ask))])

# %% [markdown]
# The library's dense cache does the same for a whole model. Both must agree.

# %%
q, k, v = text.layer(12)
cache = DenseCache(capacity=T)
cache.prefill(q[:, :, :ask], k[:, :, :ask], v[:, :, :ask])
theirs = cache.decode(*(x[:, :, ask:ask + 1] for x in (q, k, v)))   # (1, H*G, 1, D)
torch.testing.assert_close(mine, theirs[0, :, 0])

# %% [markdown]
# ## How many tokens matter
#
# Sort the weights of a head, and add them up from the largest until 90 % is reached. We do it for
# all 270 query heads and for six tokens of each text. As a control, each kv head gets the queries
# of *another* kv head of its layer. These queries were not made for these keys. They are scaled to
# the length of the head's own queries, because longer queries have sharper weights.

# %%
def needed(w, share=0.9):
    """How many of the largest weights w (..., T) add up to `share`."""
    return (w.sort(-1, descending=True).values.cumsum(-1) < share).sum(-1) + 1

def shares_needed(text, shift=0):
    """Tokens needed over all tokens (6, layers, H*G), for six tokens of the text."""
    places = [*range(1000, text.n_prompt, (text.n_prompt - 1000) // 5 + 1), asking(text)]
    return torch.stack([torch.stack([needed(weights_of(text, n, t, shift)) / (t + 1)
                                     for n in range(n_layers)]) for t in places])

shares = {name: shares_needed(x) for name, x in texts.items()}
control = {name: shares_needed(x, shift=1) for name, x in texts.items()}

# %%
figures.tokens_needed(shares, control)
for name in texts:
    by_token, other = shares[name].flatten(1).median(1).values, control[name].median()
    print(f"{name}: of 1,000 tokens a typical head needs {1000 * by_token.min():.0f} to "
          f"{1000 * by_token.max():.0f}, depending on the token; control {1000 * other:.0f}")
    assert by_token.max() < 0.1 and shares[name].median() < other / 3

# %% [markdown]
# What was your number? Heads differ. The next plot shows each head of each layer, for one token.
# Most heads of the first layer need many tokens. In other layers, too, some heads need many.

# %%
share = 100 * shares["lighthouse"][-1]                          # (layers, H*G)
figures.needed_by_layer(share)
for x in shares.values():                                       # (6, layers, H*G), every token
    assert (x[:, 0].median(-1).values > 5 * x[:, 1:].flatten(1).median(1).values).all()
print(f"median head: {share[0].median():.0f} % in layer 0, {share[1:].median():.1f} % in others")
n_wide = int((share[1:] > 20).sum())
print(f"more than 20 %: {n_wide} of {share[1:].numel()} heads of the other layers")
assert n_wide > 0

# %% [markdown]
# ## Does the output need the other tokens?
#
# A small weight may belong to a large value. So we compute the output of every head from the 5 % of
# the tokens that weigh most, and compare it with the output from all tokens. Three controls read as
# many tokens: the latest ones; the first four and the latest ones; and tokens drawn at random.

# %%
def output_error(n, t, pick):
    """|o - dense| / |dense| (H*G,) of layer n if only pick(w) of the tokens are read."""
    w, v = weights_of(text, n, t).view(H, G, -1), text.layer(n)[2][0, :, :t + 1]
    kept = torch.zeros_like(w).scatter_(-1, pick(w), 1) * w
    o, dense = kept / kept.sum(-1, keepdim=True) @ v, w @ v
    return ((o - dense).norm(dim=-1) / dense.norm(dim=-1)).flatten()

# %%
torch.manual_seed(0)
kept, latest = (ask + 1) // 20, torch.arange(ask + 1).flip(0)
first_and_latest = torch.cat([torch.arange(4), latest])
picks = {"best": lambda w: w.topk(kept).indices,
         "latest": lambda w: latest[:kept].expand(H, G, -1),
         "first 4\nand latest": lambda w: first_and_latest[:kept].expand(H, G, -1),
         "random": lambda w: torch.rand(w.shape).topk(kept).indices}
errors = {name: torch.stack([output_error(n, ask, pick) for n in range(n_layers)])
          for name, pick in picks.items()}
figures.errors_of_choice(errors, kept)
best, *others = (float(e.median()) for e in errors.values())
assert best < 0.15 and min(others) > 2 * best

# %% [markdown]
# ## Where the few are
#
# Some of the few need no search. In most layers the latest tokens weigh much. In the upper half of
# the layers the very first tokens weigh much, too, in both texts. The first tokens are called the
# *sink*. A head is thought to attend to them when it finds nothing else (Xiao et al., 2023).

# %%
def zones(text, t):
    """Attention (3, layers), in %, to the first 4 tokens, the latest 64, and all between."""
    w = torch.stack([weights_of(text, n, t).mean(0) for n in range(n_layers)]) * 100
    return torch.stack([w[:, :4].sum(1), w[:, -64:].sum(1), w[:, 4:-64].sum(1)])

seen = torch.stack([zones(x, t) for x in texts.values()
                    for t in range(1000, len(x.pieces), 500)], 1)        # (3, tokens, layers)
figures.zones_by_layer(dict(zip(("first 4", "latest 64", "others"), seen, strict=True)))

# %%
sink = seen[0].mean(0)                                              # (layers,)
print(f"the first 4 tokens: {sink[:8].max():.1f} % at most in layers 0 to 7, "
      f"{sink[15:].mean():.0f} % in the upper half; an even share is {400 / ask:.2f} %")
n_local = int((seen[1].mean(0) > 20).sum())
print(f"the latest 64 take more than a fifth in {n_local} of {n_layers} layers")
assert sink[:8].max() < 5 and sink[15:].mean() > 20 and n_local > n_layers / 2
assert (seen[0][:, 15:].mean(1) > 10).all(), "at every token that we looked at"

# %% [markdown]
# The rest of the attention goes to tokens between them. The answer to the question is one of these.
# We look for the head that attends most to the number. It is the best of 270 heads, so chance helps
# to find one. The control is the other text: does *the same* head find the number there?

# %%
numbers = {"lighthouse": "94826", "expedition": "97146"}
places = {name: texts[name].find(number)[0] for name, number in numbers.items()}
to_digit = torch.stack([weights_of(text, n, ask)[:, places["lighthouse"]] for n in range(n_layers)])
head = divmod(int(to_digit.argmax()), H * G)
rows = {name: (weights_of(x, head[0], asking(x))[head[1]], places[name], numbers[name])
        for name, x in texts.items()}
figures.one_head(rows, head)
for w, place, _ in rows.values():
    middle = w[4:-64]
    assert int(middle.argmax()) + 4 == place and w[place] > 0.3

# %% [markdown]
# ## Takeaway
#
# - A decode step does few operations with each byte of the cache. To make it faster, read less.
# - In most heads a few per cent of the tokens have nine tenths of the attention. The output from
#   these tokens is close to that from all. In the first layer most heads need many tokens; in
#   other layers some do.
# - In most layers the latest tokens are among the few. In the upper half the first tokens are, too.
#   The others depend on the query: a step must *find* them without reading every key. That is a
#   search problem. The next notebook builds an index for it.
#
# ## Exercises
#
# **1.** Write `tokens_for(weights, share)`: the fewest tokens of one head's weights (T,) that hold
# at least that share of its attention. The cell below it shows yours beside the expected.

# %%
def tokens_for(weights, share):
    """The fewest tokens whose weights add up to at least share."""
    ...                                 # your code


# %%
def check(answer):
    """Whether it finds what the plots above were made of, and gets the ends right."""
    w, even = weights_of(text, 20, ask), torch.full((10,), 0.1, dtype=torch.float64)
    return agree([
        ("ten equal weights, 45 %", answer(even, 0.45), 5),
        ("0.1 and 0.9, half", answer(torch.tensor([0.1, 0.9]), 0.5), 1),
        *((f"layer 20, head {h}, 90 %", answer(w[h], 0.9), int(needed(w[h]))) for h in range(4))])

print("right" if check(tokens_for) else "not yet")

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def tokens_for(weights, share):
#     return int((weights.sort(descending=True).values.cumsum(0) < share).sum()) + 1
# ```
# </details>
#
# **2.** Llama-3.1-8B has 32 layers and 8 kv heads of 128 dims. How many bytes of cache does a step
# read after 131,072 tokens in bfloat16? How long does a GPU that reads 2 TB/s take for it?
#
# <details><summary>Answer</summary>
#
# ```python
# read = 2 * 32 * 8 * 128 * 2 * 131_072
# print(f"{read / 2**30:.0f} GiB, {read / 2e12 * 1e3:.1f} ms, for every token and every text")
# ```
# </details>
#
# **3.** The sink says nothing about the text. May a step leave it out? Take the first four tokens
# away from the query above, in a layer of the upper half, and compare the lengths of the outputs.
# As a control, take four tokens from the middle away.
#
# <details><summary>Answer</summary>
#
# No. The weights of the other tokens grow until they add up to one again. A head that added little
# then adds much. Four tokens from the middle change nearly nothing.
#
# ```python
# def length_without(first):
#     q, k, v = (x[:, :, :ask + 1] for x in text.layer(25))
#     keep = torch.cat([torch.arange(first), torch.arange(first + 4, ask + 1)])
#     attend = F.scaled_dot_product_attention
#     less = attend(q[:, :, -1:], k[:, :, keep], v[:, :, keep], enable_gqa=True)
#     return (less.norm(dim=-1) / attend(q[:, :, -1:], k, v, enable_gqa=True).norm(dim=-1)).median()
#
# print(f"without the sink {length_without(0):.2f} times as long, "
#       f"without four others {length_without(2000):.2f} times")
# assert length_without(0) > 1.3 and abs(length_without(2000) - 1) < 0.05
# ```
# </details>
