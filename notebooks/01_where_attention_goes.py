# %% [markdown]
# # Why is decoding slow, and how little of the cache matters?
#
# **Goal.** Count the bytes that one new token costs, see that waiting for them is most of the
# work, and then look at where the attention of a real model goes: to how many of the tokens whose
# keys and values it has just read?
#
# **Predict first.** A head gives each token of the text a weight; the weights add up to one. Sort
# them. Of every 1,000 tokens of a text, how many does a typical head need to gather 90 % of its
# attention? Write your number down.
#
# Everything below is real: the default model has read a lighthouse keeper's log book, was asked
# for the combination of a strongbox, and has answered. We kept its queries, keys and values.

# %%
import sys; sys.path[:0] = [".."]
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from capture import captured
from plots import BLUE, DARK, LIGHT, MIDDLE, axes, heatmap, label

from model import DenseCache

text = captured()
n_layers, H, T, D = text.k.shape
G = text.q.shape[1] // H                # query heads that share a key
print(f"{T:,} tokens, {n_layers} layers, {H} kv heads of {G} query heads, {D} dims")
print("It ends:", "".join(text.pieces[text.n_prompt:]))

# %% [markdown]
# ## What a token costs
#
# To make one token the model reads each of its weights once, and the key and the value of every
# token before it, in every layer and head. The weights are shared by a batch; each text has a
# cache of its own.

# %%
FP32 = 4                                                        # bytes a number
weights = text.n_parameters * FP32
kv_a_token = 2 * n_layers * H * D * FP32                        # a key and a value

def bytes_a_step(T, batch=1):
    """Bytes read for one new token of each of `batch` texts, T tokens long."""
    return weights + batch * T * kv_a_token

print(f"weights  {weights / 1e6:7.1f} MB a step, whatever the batch")
print(f"cache    {kv_a_token / 1e3:7.1f} kB a token: {T * kv_a_token / 1e6:.1f} MB for our text")

# %%
batch, lengths = 8, torch.arange(0, text.config.context + 1, 64)
cross = weights / (batch * kv_a_token)                          # tokens
ax = axes(f"In a batch of {batch}, past {cross:,.0f} tokens the cache outweighs the model",
          "tokens in each text", "read for one step [GB]")
for n, colour in ((1, MIDDLE), (batch, DARK)):
    ax.plot(lengths, bytes_a_step(lengths, n) / 1e9, color=colour)
    label(ax, lengths[-1], bytes_a_step(lengths[-1], n) / 1e9, f"batch {n}")
ax.axhline(weights / 1e9, color=BLUE, linestyle="--")
label(ax, lengths[-1], weights / 1e9, "weights", dy=-8, color=BLUE)
ax.axvline(cross, color=LIGHT, zorder=0)
ax.set(ylim=0, xlim=(0, text.config.context))
plt.show()
assert bytes_a_step(2 * cross, batch) > 2.9 * weights and cross < text.config.context

# %% [markdown]
# ## Arithmetic or memory?
#
# A machine has two speeds: how fast it computes and how fast it reads. Work that does few
# operations a byte waits for memory; only past the *ridge*, where the two take equally long, does
# arithmetic count. Let us measure both speeds here, and then count the operations a byte.

# %%
def seconds(work, repeats=5):
    """The shortest of some runs: noise only adds."""
    def once():
        start = time.perf_counter(); work()
        return time.perf_counter() - start
    return min(once() for _ in range(repeats))

large, square = torch.ones(2**26), torch.randn(1024, 1024)      # 256 MiB, more than any cache here
bandwidth = large.nbytes / seconds(large.sum)         # bytes/s
compute = 2 * 1024**3 / seconds(lambda: square @ square)        # flop/s
ridge = compute / bandwidth
print(f"{bandwidth / 1e9:.0f} GB/s, {compute / 1e9:.0f} Gflop/s: ridge at {ridge:.0f} flop/byte")

# %% [markdown]
# Attention does 2·D operations for a score and 2·D for its share of the sum, for every pair of
# query and key. In decoding a key is used by the G query heads of its group, and that is all. In
# prefill a key, once read, serves the queries of a whole block of text.

# %%
keys = [text.layer(n)[1:] for n in range(n_layers)]             # (1, H, T, D) twice a layer
last = [text.layer(n)[0][:, :, -1:] for n in range(n_layers)]   # (1, H*G, 1, D)

def decode():
    for q, (k, v) in zip(last, keys, strict=True):
        F.scaled_dot_product_attention(q.view(1, H, G, D), k, v)

q, k, v = text.layer(0)
def prefill():
    F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

flops = {"decode": 4 * D * H * G * T * n_layers, "prefill": 4 * D * H * G * T * T / 2}
reads = {"decode": T * kv_a_token, "prefill": FP32 * (2 * q.numel() + k.numel() + v.numel())}
intensity = {name: flops[name] / reads[name] for name in flops}
speed = {"decode": flops["decode"] / seconds(decode),
         "prefill": flops["prefill"] / seconds(prefill, 2)}
for name in flops:
    print(f"{name:8} {intensity[name]:6.1f} flop/byte, {speed[name] / 1e9:5.1f} Gflop/s")

# %%
ax = axes(f"Decoding waits for memory: {intensity['decode']:.1f} operations a byte, "
          f"the ridge is at {ridge:.0f}", "operations a byte read [flop/byte]", "speed [Gflop/s]")
x = torch.logspace(-0.5, 4, 200)
ax.loglog(x, (x * bandwidth).clamp(max=compute) / 1e9, color=MIDDLE)
label(ax, 1, bandwidth / 1e9, "limit: reading", dx=-8, dy=6, ha="right")
label(ax, 2 * ridge, compute / 1e9, "limit: computing", dx=0, dy=9)
for name in flops:
    ax.plot(intensity[name], speed[name] / 1e9, "o", color=DARK, markersize=7)
    label(ax, intensity[name], speed[name] / 1e9, f"attention in {name}", dx=9, dy=-4)
ax.axvline(ridge, color=LIGHT, zorder=0)
ax.set_ylim(bandwidth / 1e9 / 10, compute / 1e9 * 3)
plt.show()
assert intensity["decode"] < ridge < intensity["prefill"]

# %% [markdown]
# So a step takes as long as its bytes take, and computing less does not help: we have to *read*
# less. Which keys could we leave unread?
#
# ## One query, by hand
#
# Attention is a softmax over inner products, and a sum of values with those weights. The query is
# the one that has to say the first digit of the answer; the keys are all there are.

# %%
answer = text.find("strongbox is 94826.")       # where the text says it, first of all in the log
ask = text.n_prompt + 8                         # the token before the first digit of our answer
assert text.pieces[ask + 1] == text.pieces[answer[4]] == "9"

def attention_weights(n, t=ask):
    """Weights (H*G, t+1) that token t gives itself and all before it, in layer n."""
    q, k, _ = text.layer(n)
    q = q[0, :, t].view(H, G, D)                                # (H, G, D)
    scores = q @ k[0, :, :t + 1].mT / D**0.5                    # (H, G, t+1)
    return scores.softmax(-1).flatten(0, 1)

v = text.layer(12)[2][0, :, :ask + 1]                           # (H, ask+1, D)
mine = torch.stack([w @ v[head // G] for head, w in enumerate(attention_weights(12))])

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
# Sort the weights of every head, add them up from the largest, and see how far the sum has come
# after n tokens.

# %%
all_weights = torch.stack([attention_weights(n) for n in range(n_layers)])  # (layers, H*G, ask+1)
mass = all_weights.sort(-1, descending=True).values.cumsum(-1)
needed = (mass < 0.9).sum(-1) + 1                                           # (layers, H*G)
typical = int(needed.median())

ax = axes(f"A typical head gathers 90 % of its attention from {typical} of {ask + 1:,} tokens",
          "tokens kept, the best first", "share of the attention [%]")
n = torch.arange(1, ask + 2)
low, middle, high = (mass.flatten(0, 1).quantile(p, 0) * 100 for p in (0.1, 0.5, 0.9))
ax.fill_between(n, low, high, color=LIGHT, linewidth=0)
ax.semilogx(n, middle, color=DARK)
label(ax, 3, middle[2], "the median head", dx=10, dy=-8)
label(ax, 300, low[299], "8 of 10 heads lie in the band", dx=-4, dy=-14)
ax.axhline(90, color=BLUE, linestyle="--", linewidth=1)
ax.set(ylim=(0, 102), xlim=(1, ask + 1))
plt.show()
assert typical < 0.05 * (ask + 1)
print(f"that is {1000 * typical / (ask + 1):.0f} of every 1,000 tokens. What was your number?")

# %%
ax = axes("The first layer looks everywhere, the later ones at little",
          "layer", "query head", size=(7.5, 3))
share = 100 * needed / (ask + 1)
heatmap(ax, share.T.clamp(max=50), "tokens for 90 %, to 50 and above [%]", vmin=0, vmax=50)
ax.set_yticks(range(0, H * G, 2))
plt.show()
first, later = share[0].median(), share[1:].median()
assert first > 10 * later
print(f"median head: {first:.0f} % of the tokens in layer 0, {later:.1f} % in the others")

# %% [markdown]
# ## Where the few are
#
# Two kinds of tokens are always among them, and need no search. The latest ones, for language is
# local; and the very first, which says nothing but takes the attention that a head has no better
# use for: the *sink*.

# %%
zones = torch.stack([all_weights[..., :4].sum(-1), all_weights[..., 4:-64].sum(-1),
                     all_weights[..., -64:].sum(-1)], -1).mean(1) * 100     # (layers, 3)
deep = zones[n_layers // 2:].mean(0)
ax = axes(f"In the upper half the first 4 tokens take {deep[0]:.0f} %, the latest 64 take "
          f"{deep[2]:.0f} %", "layer", "attention, mean of the heads [%]")
bottom = torch.zeros(n_layers)
for zone, colour, name in zip((0, 2, 1), (DARK, MIDDLE, LIGHT),
                              ("first 4", "latest 64", "all between"), strict=True):
    ax.bar(range(n_layers), zones[:, zone], bottom=bottom, color=colour, width=0.85)
    label(ax, n_layers - 0.4, float(bottom[-1] + zones[-1, zone] / 2), name)
    bottom += zones[:, zone]
ax.set(ylim=(0, 100), xlim=(-0.6, n_layers - 0.4))
plt.show()
assert zones[:8, 0].max() < 5 and deep[0] > 20, "only the upper layers have a sink"

# %% [markdown]
# What is left lies between them, somewhere in the text, and it is what answers the question. Here
# is where the head that attends most to the number itself looks:

# %%
to_digits = all_weights[..., answer[4]]                          # (layers, H*G)
n, head = divmod(int(to_digits.argmax()), H * G)
w = all_weights[n, head]
ax = axes(f"Layer {n}, head {head} finds the number in the middle of the text",
          "position in the text [tokens]", "weight [%]", size=(7.5, 2.8))
ax.vlines(range(ask + 1), 0, w * 100, color=DARK, linewidth=1.2)
words = "".join(text.pieces[i] for i in answer).strip()
label(ax, answer[4], w[answer[4]] * 100, f"“{words}”")
ax.set(xlim=(-40, ask + 60), ylim=0)
plt.show()
between = w.clone(); between[:4] = 0; between[-64:] = 0
assert int(between.argmax()) == answer[4]

# %% [markdown]
# ## Takeaway
#
# - A decode step is as slow as its bytes: it does too few operations with each to wait for
#   anything else.
# - The cache is read whole, and nearly all of that is in vain: a few tokens hold nearly all of the
#   attention, in nearly every head.
# - Some of them are known beforehand, the first and the latest. The others depend on the query:
#   they must be *found*, without reading every key. That is a search problem, and the next
#   notebook makes an index for it.

# %%
in_vain = 1 - needed.float().mean() / (ask + 1)
assert in_vain > 0.9 and (share < 20).float().mean() > 0.9
print(f"read but not needed for 90 % of the attention: {in_vain:.0%} of the cache")

# %% [markdown]
# ## Exercises
#
# **1.** Write `tokens_for(weights, share)`: the fewest tokens of one head's weights (T,) that hold
# at least that share of its attention. The cell below it says whether it is right.

# %%
def tokens_for(weights, share):
    """The fewest tokens whose weights add up to at least share."""
    ...                                 # your code


# %%
def check(answer):
    """Whether it finds what the plots above were made of, and gets the ends right."""
    even = torch.full((10,), 0.1, dtype=torch.float64)
    return (all(answer(all_weights[n, 0], 0.9) == int(needed[n, 0]) for n in range(n_layers))
            and answer(even, 0.45) == 5 and answer(torch.tensor([0.1, 0.9]), 0.5) == 1)

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
# **2.** Llama-3-8B has 32 layers and 8 kv heads of 128 dims. How many bytes of cache does a step
# read behind 131,072 tokens in bfloat16? How long does a GPU that reads 2 TB/s take for it?
#
# <details><summary>Answer</summary>
#
# ```python
# read = 2 * 32 * 8 * 128 * 2 * 131_072
# print(f"{read / 2**30:.0f} GiB, {read / 2e12 * 1e3:.1f} ms, for every token and every text")
# ```
# </details>
#
# **3.** The sink says nothing. May it be left out? Take the first four tokens away from the query
# above, in a layer of the upper half, and compare the outputs.
#
# <details><summary>Answer</summary>
#
# No. The weights of the others grow until they add up to one again, and a head that wanted to say
# little now says a lot.
#
# ```python
# q, k, v = text.layer(25)
# whole, without = (F.scaled_dot_product_attention(
#     q[:, :, ask:ask + 1], k[:, :, n:ask + 1], v[:, :, n:ask + 1], enable_gqa=True)
#     for n in (0, 4))
# print((without.norm(dim=-1) / whole.norm(dim=-1)).flatten())
# assert (without.norm(dim=-1) > 1.5 * whole.norm(dim=-1)).float().mean() > 0.5
# ```
# </details>
