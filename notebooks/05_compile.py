# %% [markdown]
# # What makes PyTorch code compile well?
#
# **Goal.** Cause the two things that spoil a compiled decode step, a graph break and a recompile;
# read what the compiler says about them; mend both; and see what it makes of code that has
# neither.
#
# **Predict first.** A cache grows by one token a step, by `torch.cat`. The step is compiled. How
# many times does the compiler run during the first twelve steps, if every shape counts as new?

# %%
import sys; sys.path[:0] = [".."]
import logging
import re

import matplotlib.pyplot as plt
import torch
from capture import captured
from plots import BLUE, DARK, MIDDLE, axes, label
from torch._inductor.utils import run_and_get_code

from retroinfer import RetroConfig, WaveIndex

text = captured()
H, T, D = text.k.shape[1:]
G = text.q.shape[1] // H
q, k, v = text.layer(9)
grouped = q.view(1, H, G, T, D)                                 # (B, H, G, T, D)

# %% [markdown]
# ## What the compiler does
#
# `torch.compile` runs the function once with stand-ins for the tensors, writes down every
# operation as a *graph*, and hands the graph to a *backend* that makes code of it. Let our backend
# make nothing and only count: it returns the graph as it is.

# %%
class Spy:
    """A backend that keeps the graphs it is given, and runs them as they are."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward

def compile_with(function, **options):
    """(compiled function, its Spy), from a clean slate."""
    torch._dynamo.reset()
    spy = Spy()
    return torch.compile(function, backend=spy, **options), spy

# %%
def attend(q, k, v):
    """Attention of q (B, H, G, D) to k and v (B, H, T, D)."""
    weights = (q @ k.mT * D**-0.5).softmax(-1)                  # (B, H, G, T)
    return weights @ v

q_now = grouped[:, :, :, -1]                                    # (B, H, G, D)
compiled, spy = compile_with(attend)
torch.testing.assert_close(compiled(q_now, k, v), attend(q_now, k, v))
print(f"{len(spy.graphs)} graph:")
print(*(node.target if node.op == "call_method" else node.target.__name__
        for node in spy.graphs[0].graph.nodes if node.op.startswith("call")), sep=", ")

# %% [markdown]
# ## A graph break
#
# Let a head that is sure of itself, one token with nearly all the weight, take just that token's
# value. An `if` on a tensor needs its value; the compiler only has a stand-in. So it ends the
# graph there, lets Python decide, and goes on with a new graph for the branch that was taken.

# %%
def attend_or_copy(q, k, v):
    weights = (q @ k.mT * D**-0.5).softmax(-1)
    if weights.max() > 0.99:                                    # a question to the data
        return v.gather(2, weights.argmax(-1)[..., None].expand(-1, -1, -1, D))
    return weights @ v

compiled, spy = compile_with(attend_or_copy)
compiled(q_now, k, v)
why = torch._dynamo.explain(attend_or_copy)(q_now, k, v).break_reasons
broken = len(spy.graphs)
print(f"{broken} graphs. The compiler says:", why[0].reason.splitlines()[0])
assert broken > 1

# %% [markdown]
# On a GPU it is worse than two graphs: Python has to wait for the value, and the device idles. The
# remedy is to ask the data nothing: work out both and choose, tensor by tensor. `fullgraph=True`
# makes a break an error, so that none comes back unnoticed.

# %%
def attend_or_copy_mended(q, k, v):
    weights = (q @ k.mT * D**-0.5).softmax(-1)
    best = v.gather(2, weights.argmax(-1)[..., None].expand(-1, -1, -1, D))
    return torch.where(weights.amax() > 0.99, best, weights @ v)

compiled, spy = compile_with(attend_or_copy_mended, fullgraph=True)
torch.testing.assert_close(compiled(q_now, k, v), attend_or_copy(q_now, k, v))
assert len(spy.graphs) == 1

try:
    compile_with(attend_or_copy, fullgraph=True)[0](q_now, k, v)
except Exception as error:
    print(type(error).__name__, "with fullgraph=True:", str(error).splitlines()[0])

# %% [markdown]
# ## A recompile
#
# With each graph the compiler keeps *guards*: what must be true of the arguments for it to hold.
# A shape is one. When no kept graph fits, it compiles again. The log says which guard failed.

# %%
class Log(logging.Handler):
    """Keeps what the compiler logs about recompiles."""

    def __init__(self):
        super().__init__()
        self.reasons = []

    def emit(self, record):
        self.reasons += re.findall(r"- \d+/\d+: (.*)", record.getMessage())

log = Log()
torch._logging.set_logs(recompiles=True)
recompiles = logging.getLogger("torch._dynamo.guards.__recompiles")
recompiles.handlers, recompiles.propagate = [log], False

# %%
START, STEPS = T - 12, 12

def grow(step):
    """Compilations (STEPS,) so far after each step of a cache that grows by torch.cat."""
    compiled, spy = step
    n, cache = [], (k[:, :, :START], v[:, :, :START])
    for t in range(START, T):
        cache = tuple(torch.cat([x, new[:, :, t:t + 1]], 2) for x, new in
                      zip(cache, (k, v), strict=True))
        compiled(grouped[:, :, :, t], *cache)
        n.append(len(spy.graphs))
    return n

torch._dynamo.config.recompile_limit = 64       # it would give up, and run eagerly, after 8
static = grow(compile_with(attend, dynamic=False))
print(f"{static[-1]} compilations in {STEPS} steps. The log says:", log.reasons[0], sep="\n")
assert static[-1] == STEPS

# %% [markdown]
# Left to itself the compiler guesses: after the second shape it makes that dimension a symbol. That
# is two compilations, but the code is then for any length, and a CUDA graph cannot replay it. The
# other way is the library's: a cache of one shape, allocated once, in which free slots are masked.
# The counter has one element and a dimension, for a tensor without dimensions, used as an index, is
# read as a number: an `.item()` that nobody wrote.

# %%
def attend_masked(q, k_all, v_all, k_new, v_new, n_tokens):
    """One step of a cache that has room: write the new token, attend to what is filled."""
    slot = torch.arange(k_all.shape[2])
    k_all[:, :, n_tokens], v_all[:, :, n_tokens] = k_new, v_new
    logits = (q @ k_all.mT * D**-0.5).masked_fill(slot > n_tokens, -torch.inf)
    n_tokens.add_(1)                                            # a tensor: no guard on its value
    return logits.softmax(-1) @ v_all

compiled, spy = compile_with(attend_masked, fullgraph=True, dynamic=False)
k_all, v_all, n_tokens, masked = k.clone(), v.clone(), torch.tensor([START]), []
for t in range(START, T):
    o = compiled(grouped[:, :, :, t], k_all, v_all, *(x[:, :, t:t + 1] for x in (k, v)), n_tokens)
    torch.testing.assert_close(o, attend(grouped[:, :, :, t], k[:, :, :t + 1], v[:, :, :t + 1]))
    masked.append(len(spy.graphs))
assert masked[-1] == 1

# %%
automatic = grow(compile_with(attend))
ax = axes(f"A growing cache is compiled {static[-1]} times in {STEPS} steps, one with room "
          f"{masked[-1]} time", "step", "compilations so far")
x = range(1, STEPS + 1)
for y, colour, dash, name in ((static, DARK, "-", "cat, each shape anew"),
                              (automatic, MIDDLE, "-", "cat, shape as a symbol"),
                              (masked, BLUE, "--", "one shape, masked")):
    ax.plot(x, y, color=colour, linestyle=dash, drawstyle="steps-mid")
    label(ax, STEPS, y[-1], name)
ax.set(ylim=(0, STEPS + 1), xlim=(1, STEPS), xticks=x)
plt.show()
assert automatic[-1] == 2

# %% [markdown]
# ## The library
#
# A step of the wave index does much more: it writes a token, ranks clusters, gathers their tokens
# and attends over three zones. It is one graph, and stays the same one while the index grows:
# budgets are shapes, what is beyond a sequence's share is masked, and counters are tensors.

# %%
def generate(cache, step, start, stop):
    """Outputs (stop - start, H*G, D) of a cache that reads `start` tokens and then steps."""
    cache.prefill(q[:, :, :start], k[:, :, :start], v[:, :, :start])
    room, outputs = 0, []
    for t in range(start, stop):
        room = (room or cache.update()) - 1
        outputs.append(step(*(x[:, :, t:t + 1] for x in (q, k, v)))[0, :, 0])
    return torch.stack(outputs)

eager = WaveIndex(RetroConfig(), capacity=2048)
theirs = generate(eager, eager.decode, 1200, 1800)
cache = WaveIndex(RetroConfig(), capacity=2048)
step, spy = compile_with(cache.decode, fullgraph=True, dynamic=False)
torch.testing.assert_close(generate(cache, step, 1200, 1800), theirs)
c = cache.config
n_updates = (int(cache.n_indexed[0]) - (1200 - c.sink - c.local)) // c.update + 1
print(f"600 steps, {n_updates} updates of the index, {len(spy.graphs)} graph")
assert len(spy.graphs) == 1 and n_updates > 0

# %% [markdown]
# ## What a real backend makes of it
#
# Inductor, the default, writes one loop for many operations: an intermediate that is used at once
# need not go through memory. Ask it for the code that it made of our masked softmax. (This is the
# slow cell: a C++ compiler runs.)

# %%
def masked_softmax(logits, n_tokens):
    """Weights of logits (B, H, G, T) over the first n_tokens slots."""
    free = torch.arange(logits.shape[-1]) >= n_tokens
    logits = (logits * D**-0.5).masked_fill(free, -torch.inf)
    logits = logits - logits.amax(-1, keepdim=True)
    weights = logits.exp()
    return weights / weights.sum(-1, keepdim=True)

logits, filled = q_now @ k.mT, torch.tensor(T - 100)
torch._dynamo.reset()
fast = torch.compile(masked_softmax, fullgraph=True)
weights, (code,) = run_and_get_code(fast, logits, filled)
torch.testing.assert_close(weights, masked_softmax(logits, filled))

# %%
compiled, spy = compile_with(masked_softmax)
compiled(logits, filled)
n_ops = sum(node.op.startswith("call") for node in spy.graphs[0].graph.nodes)
n_kernels = len(re.findall(r"= async_compile\.cpp", code))
print(f"{n_ops} operations became {n_kernels} kernel:")
body = code[code.index('extern "C"'):].split("''')")[0]
print("\n".join(body.splitlines()[:30]), "\n...")
assert n_kernels < n_ops / 2

# %% [markdown]
# Read it from the outside in: a loop over the rows, within it loops over the slots, on a processor
# that can with several numbers at a time (`at::vec`). The mask is a comparison with the loop's
# counter: no tensor of booleans is ever made. How many tensors are?

# %%
n_tensors = len(re.findall(r"= empty_strided_cpu\(", code))
print(f"{n_tensors} tensors are allocated; one operation at a time makes {n_ops}")
assert n_tensors < n_ops

# %% [markdown]
# ## Takeaway
#
# - Ask the data nothing: `if`, `.item()`, `int()` on a tensor break a graph, and make a GPU wait.
# - Change no shape: allocate once, mask what is free, count in tensors. (Where masks would waste
#   much, a size may be read within the graph: the library does so on a CPU, which need not wait.)
# - `fullgraph=True` and a backend that counts make both of them tests.
# - Then the whole step is one graph, and the compiler can do what it is good at: fuse.

# %%
print(f"graphs: {broken} with an if on the data, {masked[-1]} without; "
      f"compilations in {STEPS} steps: {static[-1]}, {automatic[-1]} and {masked[-1]}")

# %% [markdown]
# ## Exercises
#
# **1.** There is an `.item()` in this function. Write it again, `fixed`, so that it compiles as one
# graph and gives the same.

# %%
def top_share(q, k, n):
    """The attention (B, H, G) that the tokens hold whose weight is at least 1 / n."""
    weights = (q @ k.mT * D**-0.5).softmax(-1)                  # (B, H, G, T)
    limit = 1 / n.item()
    return torch.stack([(w * (w >= limit)).sum(-1) for w in weights.unbind(1)], 1)

def fixed(q, k, n):
    """The same, in one graph for every n."""
    ...                                 # your code


# %%
def check(answer):
    """Whether it is one graph for several n, and agrees with the function above."""
    compiled, spy = compile_with(answer, fullgraph=True)
    for n in map(torch.tensor, (10, 100, 1000)):
        mine = compiled(q_now, k, n)
        if mine is None or not torch.allclose(mine, top_share(q_now, k, n), atol=1e-5):
            return False
    return len(spy.graphs) == 1

print("right" if check(fixed) else "not yet")

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def fixed(q, k, n):
#     weights = (q @ k.mT * D**-0.5).softmax(-1)
#     return (weights * (weights >= 1 / n)).sum(-1)
# ```
# </details>
#
# **2.** What does the compiler do if the length is an `int` argument, not a tensor? Try
# `attend_masked` with `n_tokens` as a number that Python counts up, and `dynamic=False`.
#
# <details><summary>Answer</summary>
#
# A number is part of the code: each has a guard of its own, and each step is compiled.
#
# ```python
# def head_of(x, n):
#     return x[:, :, :1] * n
#
# compiled, spy = compile_with(head_of, dynamic=False)
# for n in range(2, 8):
#     compiled(k, n)
# print(f"{len(spy.graphs)} graphs for 6 numbers")
# assert len(spy.graphs) == 6
# ```
# </details>
#
# **3.** Time `masked_softmax`, eager and compiled. Is it as much faster as the bytes say? Why not?
#
# <details><summary>Answer</summary>
#
# A tensor this small stays in the processor's cache, where passing it on costs little; most of
# what is saved is the start of operations. Try a hundred times the slots.
#
# ```python
# import time
# def milliseconds(function, n=50):
#     start = time.perf_counter()
#     for _ in range(n):
#         function(logits, filled)
#     return (time.perf_counter() - start) / n * 1e3
# fast(logits, filled)
# print(f"eager {milliseconds(masked_softmax):.3f} ms, compiled {milliseconds(fast):.3f} ms")
# ```
# </details>
