# %% [markdown]
# # How does the index live through a generation?
#
# **Goal.** Follow one index from the prompt through a long generation: what is read exactly, what
# is in clusters, and when tokens move. Then ask all layers which passages of the text they read
# when they write the first digit of the answer.
#
# **You need.** Notebook 03: the three zones of a step.
#
# **Time.** A minute to run, twenty minutes to read.
#
# **Paper.** RetroInfer, [arXiv 2505.02922](https://arxiv.org/abs/2505.02922), section 4.2, index
# construction and update.
#
# **Before and after.** [03 three zones](03_three_zones.ipynb) ·
# [05 compile](05_compile.ipynb)
#
# **Predict first.** The fact that answers the question is one sentence of the log book. A layer has
# three kv heads, and each retrieves about a fifteenth of the text. In how many of the thirty layers
# does some head retrieve some token of that sentence? And of other passages as long as it?

# %%
import sys; sys.path[:0] = [".."]
import torch
import figures_04 as figures
from capture import captured
from checks import agree
from plots import versions

from model import DenseCache
from retroinfer import PLAIN, RetroConfig, WaveIndex, gather_clusters, tripartite_attention

text, config = captured("lighthouse"), RetroConfig()
n_layers, H, T, D = text.k.shape
G = text.q.shape[1] // H
print(versions())
print(f"{text.n_prompt:,} tokens of prompt, {T - text.n_prompt} of answer")

# %% [markdown]
# ## The three calls
#
# `prefill` reads a text, attends to it exactly, and clusters each segment that is full. The first
# `update` clusters the rest of the prompt. Later ones cluster the tokens that wait in the steady
# zone. `update` returns how many steps may follow before the next update. `decode` is a step: it
# takes one token, and attends over three zones.

# %%
figures.idea()

# %% [markdown]
# Here most of the text is the prompt, and the last 960 tokens come one by one, as if they were
# generated.

# %%
start = T - 960

def steps(cache, n, start):
    """Yield the outputs (H*G, D) of layer n for the tokens from start on, one step each."""
    q, k, v = text.layer(n)
    cache.prefill(*(x[:, :, :start] for x in (q, k, v)))
    n_free = 0
    for t in range(start, T):
        n_free = n_free or cache.update()
        yield cache.decode(*(x[:, :, t:t + 1] for x in (q, k, v)))[0, :, 0]
        n_free -= 1

# %% [markdown]
# ## What moves when
#
# The rules, by hand. The first 4 tokens (`sink`) and the latest 32 (`local`) are exact. The tokens
# of a prompt between them are clustered segment by segment. The last segment is shorter. If it has
# fewer than 256 tokens (`update`), all of them wait in the steady zone. Otherwise it is clustered
# too, and only a remainder of fewer than 8 tokens (`cluster`) waits. Generated tokens wait in the
# steady zone until it is full. Then all waiting tokens are clustered together.

# %%
def indexed_by_hand(n_prompt):
    """How many tokens of a prompt are in clusters."""
    between = n_prompt - config.sink - config.local
    last = between % config.segment
    waiting = last % config.cluster if last >= config.update else last
    return between - waiting

def zones_by_hand(n_prompt, n_tokens):
    """(tokens, of them in clusters) after each step."""
    c, indexed = config, indexed_by_hand(n_prompt)
    for tokens in range(n_prompt, n_tokens):
        if tokens - indexed == c.sink + c.local + c.update:             # full: update
            indexed += (tokens - indexed - c.sink - c.local) // c.cluster * c.cluster
        yield tokens + 1, indexed

mine = torch.tensor(list(zones_by_hand(start, T)))

# %%
index, theirs, outputs = WaveIndex(config, capacity=T), [], {8: []}
for o in steps(index, 8, start):
    theirs.append([int(index.n_tokens[0]), int(index.n_indexed[0])])
    outputs[8].append(o)
torch.testing.assert_close(mine, torch.tensor(theirs))
tokens, indexed = mine.T
figures.steady_zone(tokens, indexed, config)
_, k, v = text.layer(8)
for n in (100, 2083, 2180, 2340):                       # prompts whose last segment is short
    index = WaveIndex(config, capacity=T)
    index.prefill(None, k[:, :, :n], v[:, :, :n])
    index.update()
    assert int(index.n_indexed[0]) == max(indexed_by_hand(n), 0)

# %% [markdown]
# An update looks at the new tokens only. Old clusters stay as they are. Does the error grow when
# clusters are added in small lots?
#
# ## The error along the way
#
# The error is the distance to the output of dense attention, over the length of this output. The
# control is a *fresh* index. It gets everything up to the last update as one prompt. So both have
# the same tokens in clusters, and the same tokens exact, in each step that follows. Only the
# clusters differ. We measure five layers.

# %%
layers = 2, 8, 14, 20, 26
last_update = int(tokens[indexed.argmax()]) - 1         # tokens at the last update
assert indexed_by_hand(last_update) == indexed[-1], "as many in the clusters of both"

def error(n, outputs):
    """|o - dense| / |dense|, mean of the heads (steps,), in per cent, of the last steps."""
    outputs = torch.stack(outputs)                                      # (steps, H*G, D)
    dense = DenseCache(capacity=T).prefill(*text.layer(n))[0].transpose(0, 1)   # (T, H*G, D)
    dense = dense[-len(outputs):]
    return ((outputs - dense).norm(dim=-1) / dense.norm(dim=-1)).mean(-1) * 100

for n in layers:
    if n not in outputs:
        outputs[n] = list(steps(WaveIndex(config, capacity=T), n, start))
grown = torch.stack([error(n, outputs[n]) for n in layers])             # (layers, steps)
fresh = torch.stack([error(n, list(steps(WaveIndex(config, T), n, last_update))) for n in layers])

# %%
figures.grown_and_fresh(tokens, grown, fresh, tokens[1:][indexed.diff() > 0])
ratio = grown[:, last_update - T:].mean(1) / fresh.mean(1)              # (layers,)
print("grown over fresh, by layer:", ", ".join(f"{x:.2f}" for x in ratio))
assert (ratio < 1.3).all() and 0.85 < ratio.mean() < 1.15

# %% [markdown]
# On this text, after three updates, a grown index errs about as much as a fresh one.
#
# ## Which tokens are retrieved?
#
# An index does not say which tokens it reads. But we may choose the values: let the value of a
# token be its position. `fetch` brings keys and values of the retrieved clusters, so it brings the
# positions of the retrieved tokens. (By default the library then reads the values of only a fifth
# of these tokens, those with the largest weights. We look at all that `fetch` brings.)

# %%
class Watched(WaveIndex):
    """A wave index over positions: it remembers which of them the last step retrieved."""

    def __init__(self, config, capacity):
        hot = PLAIN._replace(attend=self.watch)         # a step calls it to attend
        super().__init__(config, capacity, hot=hot)

    def watch(self, q, steady, index, stores, budget, method):
        def fetch(ids, ends):
            self.fetched = gather_clusters(index, stores, budget.N, ids, ends)
            return self.fetched
        return tripartite_attention(q, steady, index, budget, fetch, method)

    def is_retrieved(self, T):
        """Of positions below T, whether each kv head read it: (H, T)."""
        _, v, bias = self.fetched
        rows = v[0, :, :, 0].long().where(bias[0, :, 0] == 0, T)        # (H, N)
        return torch.zeros(len(rows), T + 1).scatter_(1, rows, 1)[:, :T]

# %%
def asking(text):
    """The token before the first digit of the answer."""
    return next(t for t in range(text.n_prompt, len(text.pieces)) if text.pieces[t + 1].isdigit())

def retrieved_by(n, text=text):
    """What the step before the first digit retrieves in layer n: (H, T)."""
    (q, k, _), t = text.layer(n), asking(text)
    places = torch.arange(k.shape[2]).float().view(1, 1, -1, 1).expand_as(k)
    index = Watched(config, capacity=k.shape[2])
    index.allocate(k)
    index.observe(q[:, :, :t], 0, row=0)                                # for channel weights
    index.prefill(None, k[:, :, :t], places[:, :, :t])                  # their output is not used
    index.update()
    index.decode(*(x[:, :, t:t + 1] for x in (q, k, places)))
    return index.is_retrieved(k.shape[2])

# %% [markdown]
# We ask all layers of two texts, when the model writes the first digit of its answer.

# %%
sentences = {"lighthouse": "combination of the brass strongbox is 94826.",
             "expedition": "serial number of the silver chronometer is 97146."}
texts = {name: captured(name) for name in sentences}
needles = {name: texts[name].find(words) for name, words in sentences.items()}
retrieved = {name: torch.stack([retrieved_by(n, x) for n in range(n_layers)])
             for name, x in texts.items()}                              # (layers, H, T)
for name, x in retrieved.items():
    print(f"{name}: a head retrieves {x.sum(-1).mean() / texts[name].n_prompt:.1%} of the text")

# %% [markdown]
# ## A number that says nothing
#
# In how many layers does some head retrieve some token of the sentence? The controls are passages
# of as many tokens that begin at most 1,000 tokens away. Passages near the end would be no fair
# controls: steps read more of them, whatever they say (the map below shows it).

# %%
NEAR = 1000                                             # tokens; the sentence is passage NEAR
def passages(name):
    """Tokens read (layers, H, passages) of the sentence and of passages as long, near it."""
    every = retrieved[name].unfold(2, len(needles[name]), 1).sum(-1)
    return every[:, :, needles[name][0] - NEAR:][:, :, :2 * NEAR + 1]

counts = {name: passages(name) for name in texts}
n_any = (counts["lighthouse"].amax(1) > 0).sum(0)                       # (passages,)
figures.any_token(n_any, int(n_any[NEAR]))
for name, x in counts.items():
    n_any = (x.amax(1) > 0).sum(0).float()                              # (passages,)
    more = (n_any > n_any[NEAR]).float().mean()
    print(f"{name}: {more:.0%} of the passages have a token read in more layers")
    assert more > 0.15, "so this number shows nothing"

# %% [markdown]
# The sentence with the answer is no exception: a fifth of the passages have a token read in
# more layers. We need a number that is rarely large by chance.
#
# ## A number that says something
#
# For each layer, count the tokens of the sentence that its heads read. Count the same for the
# other passages. What share of the passages has a smaller count than the sentence? If the sentence
# were a passage like all others, this share would be above 95 % in one layer of twenty on average,
# or in fewer.

# %%
above, found = {}, {}
for name, x in counts.items():
    per_layer = x.sum(1)                                                # (layers, passages)
    ours = per_layer[:, NEAR]
    above[name] = (per_layer < ours[:, None]).float().mean(1) * 100
    found[name] = (above[name] > 95).nonzero().flatten().tolist()
chance = n_layers / 20
figures.ranks(above, [len(x) for x in found.values()], chance)
for name, x in found.items():
    print(f"{name}: layers {x}")
    assert len(x) > 2 * chance
assert len({*found["lighthouse"]} & {*found["expedition"]}) >= 2, "the same layers in both texts"

# %% [markdown]
# In a few layers the sentence is read more than 95 % of the passages near it. Nearly all of these
# layers are in the upper half, and some are the same in both texts. Now take all reads of the
# sentence. Which share of them comes from the upper half of the layers? Is this share larger than
# for the other passages?

# %%
for name, x in counts.items():
    by_layer = x.sum(1)                                                 # (layers, passages)
    upper = by_layer[n_layers // 2:].sum(0) / by_layer.sum(0)           # (passages,)
    typical = upper.nanmedian()
    print(f"{name}: {upper[NEAR]:.0%} of the sentence's reads come from the upper half; of the "
          f"median passage near it, {typical:.0%}")
    assert typical > 0.5, "so this number shows little"
    assert sum(n >= n_layers // 2 for n in found[name]) >= len(found[name]) - 1
rows, needle = retrieved["lighthouse"].mean(1), needles["lighthouse"]   # (layers, T)
figures.map_of_reads(rows, needle)

# %% [markdown]
# The share is high, but mostly because of the place. So far from the end, most reads of any passage
# come from the upper half. The map shows why: lower layers read mostly the latest tokens.
#
# Here is the passage itself, as two layers read it.

# %%
scope = slice(needle[0] - 90, needle[-1] + 60)
best = [n for n in found["lighthouse"] if n in found["expedition"]][:2]
figures.passages(text.pieces[scope], {n: rows[n, scope] for n in best})

# %% [markdown]
# ## Takeaway
#
# - An index has three calls: `prefill`, `update` and `decode`. Generated tokens are exact until
#   enough of them have left the local window. Then they are clustered together. Old clusters stay
#   as they are.
# - On this text, an index that grew by small lots errs about as much as a fresh one.
# - A step retrieves a few per cent of the text. In a few layers, nearly all of them in the upper
#   half, the sentence that answers the question is read more than 95 % of the passages near it.
# - A count needs a control: "some layer reads a token of it" is true of nearly every passage.
#
# ## Exercises
#
# **1.** A prompt of `n_prompt` tokens is indexed. Then `n_steps` steps follow. How often do waiting
# tokens move into clusters during these steps? Write `n_updates(n_prompt, n_steps)`. Use `config`;
# no loop is needed.

# %%
def n_updates(n_prompt, n_steps):
    """How often the steady zone is full when a step wants to add a token."""
    ...                                 # your code


# %%
def check(answer):
    """Whether it counts what the rules by hand do, for prompts of all kinds."""
    def count(n_prompt, n_steps):
        indexed = [i for _, i in zones_by_hand(n_prompt, n_prompt + n_steps)]
        return len(set(indexed)) - 1
    cases = [(start, T - start), (2000, 100), (2000, 256), (2004, 257), (2180, 200), (3000, 5000)]
    return agree([(f"prompt {n}, {m} steps", answer(n, m), count(n, m)) for n, m in cases])

print("right" if check(n_updates) else "not yet")

# %% [markdown]
# <details><summary>Answer</summary>
#
# After the prompt there is room for `update` tokens, less those of the prompt that wait. The step
# that finds no room makes the first update. It leaves fewer than `cluster` tokens waiting, and here
# none. So every later update comes `update` steps after the one before.
#
# ```python
# def n_updates(n_prompt, n_steps):
#     waiting = n_prompt - config.sink - config.local - indexed_by_hand(n_prompt)
#     beyond = n_steps - 1 - (config.update - waiting)    # steps after the first update
#     return 0 if beyond < 0 else 1 + beyond // config.update
# ```
# </details>
#
# **2.** Take the layers of the log book in which the sentence is read more than 95 % of the
# passages near it. Let a head retrieve an eighth as many clusters. In which of the layers is the
# sentence still read more than 95 % of the passages near it?
#
# <details><summary>Answer</summary>
#
# ```python
# config = RetroConfig(retrieve=config.retrieve / 8, min_retrieve=1)
# still = []
# for n in found["lighthouse"]:
#     read = retrieved_by(n).unfold(1, len(needle), 1).sum((0, -1))
#     read = read[needle[0] - NEAR:][:2 * NEAR + 1]
#     still += [n] if (read < read[NEAR]).float().mean() > 0.95 else []
# print(f"{still} of {found['lighthouse']}")
# config = RetroConfig()
# assert still, "at least one layer finds it among so few"
# ```
# </details>
#
# **3.** Tokens that were generated are clustered 256 at a time here, 1,024 in the paper. What
# changes in the first plot, and what more does a step read?
#
# <details><summary>Answer</summary>
#
# The teeth of the curve grow four times as high and as wide. On average, half of `update` tokens
# wait in the steady zone. A step reads a key and a value for each of them.
#
# ```python
# extra = (RetroConfig.paper().update - config.update) / 2
# print(f"{extra:.0f} tokens, {2 * extra * H * D * 4 * n_layers / 1e6:.1f} MB a step in fp32")
# ```
# </details>
