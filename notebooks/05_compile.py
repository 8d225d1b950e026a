# %% [markdown]
# # What makes PyTorch code compile well?
#
# **Goal.** Cause the two things that spoil a compiled decode step: a graph break and a recompile.
# Read what the compiler says about them, mend both, and look at the code that it writes when
# neither happens.
#
# **You need.** PyTorch, and attention as softmax(q·k)·v. A C++ compiler, which Inductor calls.
#
# **Time.** About half a minute; most of it is the C++ compiler.
#
# **Paper.** RetroInfer, [arXiv 2505.02922](https://arxiv.org/abs/2505.02922): a decode step, of
# which the paper writes the parts as CUDA kernels. Here the step is PyTorch, compiled.
#
# **Before and after.** [04](04_the_wave_index.ipynb) built the index;
# [06](06_kernels.ipynb) writes the kernels by hand.
#
# **Predict first.** A cache grows by one token a step, by `torch.cat`. The step is compiled. How
# many times does the compiler run during the first twelve steps, if every shape counts as new?

# %%
import sys; sys.path[:0] = [".."]
import logging
import re

import torch
from capture import captured
from checks import agree
from figures_05 import draw_compiler, plot_compilations, plot_kernels
from plots import versions
from torch._inductor.utils import run_and_get_code

from retroinfer import RetroConfig, WaveIndex

text = captured()
H, T, D = text.k.shape[1:]
G = text.q.shape[1] // H
q, k, v = text.layer(9)
grouped = q.view(1, H, G, T, D)                                 # (B, H, G, T, D)
print(versions())

# %%
draw_compiler()

# %% [markdown]
# ## What the compiler does
#
# `torch.compile` runs the function once with stand-ins for the tensors. A stand-in has a shape and
# no numbers. The compiler writes down every operation as a *graph* and hands the graph to a
# *backend*, which makes code of it. Our backend makes nothing and only counts: it keeps the graph
# and runs its operations one by one.

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

def names(graph):
    """The operations of a graph, in their order."""
    return [node.target if node.op == "call_method" else node.target.__name__
            for node in graph.graph.nodes if node.op.startswith("call")]

# %%
def attend(q, k, v):
    """Attention of q (B, H, G, D) to k and v (B, H, T, D)."""
    weights = (q @ k.mT * D**-0.5).softmax(-1)                  # (B, H, G, T)
    return weights @ v

q_now = grouped[:, :, :, -1]                                    # (B, H, G, D)
compiled, spy = compile_with(attend)
torch.testing.assert_close(compiled(q_now, k, v), attend(q_now, k, v))
print(f"{len(spy.graphs)} graph:", *names(spy.graphs[0]))

# %% [markdown]
# ## A graph break
#
# Suppose a head is sure of one token: the token has nearly all of the weight. Then its value alone
# is a good output. The function below asks with an `if` whether that is so. An `if` needs the value
# of a tensor, and a stand-in has none. So the compiler ends the graph there. Python decides, and a
# new graph begins in the branch that Python took.

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
# On a GPU the break costs more than a second graph: Python waits for the value, and the device has
# nothing to do meanwhile. The remedy is to compute both outputs, and to choose between them with
# `torch.where`. The option `fullgraph=True` makes every break an error. So a break cannot come back
# unnoticed.

# %%
def attend_or_copy_mended(q, k, v):
    weights = (q @ k.mT * D**-0.5).softmax(-1)
    best = v.gather(2, weights.argmax(-1)[..., None].expand(-1, -1, -1, D))
    return torch.where(weights.amax() > 0.99, best, weights @ v)

compiled, spy = compile_with(attend_or_copy_mended, fullgraph=True)
for loud in (1, 1000):                          # long queries are sure of one token: both branches
    now = q_now * loud
    torch.testing.assert_close(compiled(now, k, v), attend_or_copy(now, k, v))
is_sure = [(q_now * n @ k.mT * D**-0.5).softmax(-1).max() > 0.99 for n in (1, 1000)]
print(f"{len(spy.graphs)} graph; a head was sure: {bool(is_sure[0])}, then {bool(is_sure[1])}")
assert len(spy.graphs) == 1 and is_sure[1] and not is_sure[0]

# %%
try:
    compile_with(attend_or_copy, fullgraph=True)[0](q_now, k, v)
    refused = False
except Exception as error:
    refused = True
    print(type(error).__name__, "with fullgraph=True:", str(error).splitlines()[0])
assert refused

# %% [markdown]
# ## A recompile
#
# With each graph the compiler keeps *guards*: facts about the arguments that must hold for the
# graph to be right. A shape is such a fact. When no kept graph has guards that hold, the compiler
# runs again. A log says which guard failed.

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
torch._dynamo.config.recompile_limit = 64       # by default it gives up after 8, and runs eagerly

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

static = grow(compile_with(attend, dynamic=False))
print(f"{static[-1]} compilations in {STEPS} steps. The log says:", log.reasons[0], sep="\n")
assert static[-1] == STEPS

# %% [markdown]
# Without `dynamic=False` the compiler guesses: after the second shape it makes that dimension a
# symbol. That takes two compilations, and the code is then for any length. But a CUDA graph, which
# replays a step without Python, cannot replay code whose shapes change.
#
# The library does something else. A cache has one shape and is allocated once. Slots that hold no
# token yet are masked. The number of tokens is a tensor, so no guard is on its value. (The tensor
# has one element *and a dimension*. A tensor without dimensions, used as an index, would be read as
# a number: an `.item()` that nobody wrote.)

# %%
def attend_masked(q, k_all, v_all, k_new, v_new, n_tokens):
    """A step of a cache that has room: write the new token, then attend to the filled slots."""
    slot = torch.arange(k_all.shape[2])
    k_all[:, :, n_tokens], v_all[:, :, n_tokens] = k_new, v_new
    logits = (q @ k_all.mT * D**-0.5).masked_fill(slot > n_tokens, -torch.inf)
    n_tokens.add_(1)                                            # a tensor: no guard on its value
    return logits.softmax(-1) @ v_all

# %% [markdown]
# Is the write needed, and is the mask? The slots that wait for a token hold random numbers here. So
# a step that forgets to write, or forgets to mask, gives a wrong output.

# %%
def with_room(x):
    """x (B, H, T, D) up to START; the slots behind it hold random numbers."""
    return torch.cat([x[:, :, :START], 9 * torch.randn_like(x[:, :, START:])], 2)

def steps_with_room(step, spy):
    """Compilations so far after each step, and how far the outputs are from attend's at most."""
    torch.manual_seed(0)
    k_all, v_all, n_tokens, n, off = with_room(k), with_room(v), torch.tensor([START]), [], 0.0
    for t in range(START, T):
        new = (x[:, :, t:t + 1] for x in (k, v))
        o = step(grouped[:, :, :, t], k_all, v_all, *new, n_tokens)
        right = attend(grouped[:, :, :, t], k[:, :, :t + 1], v[:, :, :t + 1])
        off = max(off, float((o - right).abs().max()))
        n.append(len(spy.graphs))
    return n, off

masked, off = steps_with_room(*compile_with(attend_masked, fullgraph=True, dynamic=False))
assert masked[-1] == 1 and off < 1e-4

# %%
def forgetful(q, k_all, v_all, k_new, v_new, n_tokens):
    """attend_masked without the write: the control."""
    logits = (q @ k_all.mT * D**-0.5).masked_fill(
        torch.arange(k_all.shape[2]) > n_tokens, -torch.inf)
    n_tokens.add_(1)
    return logits.softmax(-1) @ v_all

_, off_without = steps_with_room(*compile_with(forgetful))
print(f"largest error: below 0.0001 with the write, {off_without:.1f} without it")
assert off_without > 0.1

# %%
automatic = grow(compile_with(attend))
plot_compilations(static, automatic, masked)
assert automatic[-1] == 2

# %% [markdown]
# ## The library
#
# A step of the wave index does more: it writes a token, ranks clusters, gathers their tokens and
# attends over three zones. Still it is one graph, and the graph stays the same while the index
# grows. Budgets are shapes. Clusters beyond a sequence's share are masked. Counters are tensors.

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
mine = generate(eager, eager.decode, 1200, 1800)
cache = WaveIndex(RetroConfig(), capacity=2048)
step, spy = compile_with(cache.decode, fullgraph=True, dynamic=False)
theirs = generate(cache, step, 1200, 1800)
torch.testing.assert_close(mine, theirs)

# %%
c = cache.config
n_updates = (int(cache.n_indexed[0]) - (1200 - c.sink - c.local)) // c.update + 1
print(f"600 steps, {n_updates} updates of the index, {len(spy.graphs)} graph of "
      f"{len(names(spy.graphs[0]))} operations")
assert len(spy.graphs) == 1 and n_updates > 1

# %% [markdown]
# ## What a real backend makes of it
#
# Inductor, the default backend, writes one loop for many operations. A number that the next
# operation uses at once then never goes through memory. We ask for the code that Inductor made of
# our masked softmax. (This is the slow cell: a C++ compiler runs.)

# %%
def masked_softmax(logits, n_tokens):
    """Weights of logits (B, H, G, T) over the first n_tokens slots."""
    free = torch.arange(logits.shape[-1]) >= n_tokens
    logits = (logits * D**-0.5).masked_fill(free, -torch.inf)
    logits = logits - logits.amax(-1, keepdim=True)
    weights = logits.exp()
    return weights / weights.sum(-1, keepdim=True)

def code_of(function, *args):
    """(operations of its graph, Inductor's code); the compiled function gives the same numbers."""
    compiled, spy = compile_with(function, fullgraph=True)
    compiled(*args)
    torch._dynamo.reset()
    o, (code,) = run_and_get_code(torch.compile(function, fullgraph=True), *args)
    torch.testing.assert_close(o, function(*args))
    return len(names(spy.graphs[0])), code

# %%
logits, filled = q_now @ k.mT, torch.tensor(T - 100)
n_ops, code = code_of(masked_softmax, logits, filled)
n_kernels = len(re.findall(r"= async_compile\.cpp", code))
print(f"{n_ops} operations became {n_kernels} loop:")
body = code[code.index('extern "C"'):].split("''')")[0]
print("\n".join(body.splitlines()[:24]), "\n...")
assert n_kernels < n_ops / 2

# %% [markdown]
# Read it from the outside in: a loop over the rows, and in it loops over the slots, several numbers
# at a time (`at::vec`). The mask is a comparison with the loop's counter, so no tensor of booleans
# is ever made. How many tensors are made at all?

# %%
n_tensors = len(re.findall(r"= empty_strided_cpu\(", code))
print(f"{n_tensors} tensors are allocated; one operation at a time makes {n_ops}")
assert n_tensors < n_ops

# %% [markdown]
# ## What does it not fuse?
#
# One example shows little. Here are five functions: the softmax, a gather with work on both sides,
# and, as control, three that hold an operation for which Inductor calls a library: a matrix
# product, a sort and a top-k. A loop cannot go on through such a call, because the call needs all
# of its input, in memory.

# %%
rows = torch.arange(0, T, 7)
FUNCTIONS = {
    "softmax": (lambda x: masked_softmax(x, filled), logits),
    "gather": (lambda x: (2 * x.exp())[..., rows].sigmoid() + 1, logits / 100),
    "product": (lambda x: ((x.sigmoid() + 1) @ v).exp().clamp(max=1), logits),
    "sort": (lambda x: (x.sigmoid() + 1).sort(-1).values.exp() - 1, logits),
    "top-k": (lambda x: (x.sigmoid() + 1).topk(100).values.exp() - 1, logits)}
counts = {}
for name, (function, x) in FUNCTIONS.items():
    n, code = code_of(function, x)
    calls = re.findall(r"extern_kernels\.\w+\(|= torch\.ops\.aten\.\w+\.\w+\(", code)
    counts[name] = n, len(re.findall(r"= async_compile\.cpp", code)), len(calls)

# %%
plot_kernels(counts)
for name, (n, n_loops, n_calls) in counts.items():
    print(f"{name:8} {n:2} operations: {n_loops} loops, {n_calls} calls of a library")
assert all(counts[name][1:] == (1, 0) for name in ("softmax", "gather"))
assert all(n_loops > 1 and n_calls for name in ("product", "sort", "top-k")
           for _, n_loops, n_calls in [counts[name]])

# %% [markdown]
# A step of the wave index has products, and a top-k between the ranking and the gather. There its
# one graph falls into several loops. [Notebook 06](06_kernels.ipynb) counts what that costs.
#
# ## Takeaway
#
# - Ask the data nothing: `if`, `.item()` and `int()` on a tensor break a graph, and a GPU waits.
# - Change no shape: allocate once, mask free slots, count in tensors. (On a CPU, which need not
#   wait, the library reads some sizes within the graph where masks would waste much.)
# - `fullgraph=True` and a backend that counts make tests of both rules.
# - Loops fuse through a softmax and through a gather. They end at products, sorts and top-k.

# %%
print(f"graphs: {broken} with an if on the data, 1 without; "
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
    """Whether it agrees with the function above for several n, and is one graph for all of them."""
    compiled, spy = compile_with(answer)
    cases = []
    for n in map(torch.tensor, (10, 100, 1000)):
        mine = compiled(q_now, k, n)
        mean = None if mine is None else mine.mean()
        cases.append((f"mean share, n = {n}", mean, top_share(q_now, k, n).mean()))
    return agree([*cases, ("graphs", len(spy.graphs), 1)])

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
# **2.** What does the compiler do if a length is an `int` argument, not a tensor? Write a function
# that attends to the first n slots, `k_all[:, :, :n]`. Compile it with `dynamic=False`, and count
# its graphs while Python counts n up.
#
# <details><summary>Answer</summary>
#
# A number is part of the code. Each number has a guard of its own, so each step is compiled.
#
# ```python
# def attend_first(q, k_all, v_all, n):
#     return attend(q, k_all[:, :, :n], v_all[:, :, :n])
#
# compiled, spy = compile_with(attend_first, dynamic=False)
# for n in range(T - 6, T):
#     compiled(q_now, k, v, n)
# print(f"{len(spy.graphs)} graphs for 6 numbers")
# assert len(spy.graphs) == 6
# ```
# </details>
#
# **3.** Time `masked_softmax`, eager and compiled, a few times each. Is it as much faster as the
# number of operations says? Why not?
#
# <details><summary>Answer</summary>
#
# A tensor this small stays in the processor's cache, where passing it on costs little. Most of the
# time that is saved is that of starting operations. Try a hundred times the slots.
#
# ```python
# import time
# def milliseconds(function, n=50):
#     start = time.perf_counter()
#     for _ in range(n):
#         function(logits, filled)
#     return (time.perf_counter() - start) / n * 1e3
# fast = torch.compile(masked_softmax, fullgraph=True)
# fast(logits, filled)
# for name, function in (("eager", masked_softmax), ("compiled", fast)):
#     times = sorted(milliseconds(function) for _ in range(7))
#     print(f"{name}: {times[3]:.3f} ms, {times[0]:.3f} to {times[-1]:.3f}")
# ```
# </details>
