# %% [markdown]
# # What makes PyTorch code compile well?
#
# **Goal.** Cause the two things that spoil a compiled decode step: a graph break and a recompile.
# Read what the compiler says about them, mend both, and look at the code that it writes when
# neither happens.
#
# **You need.** PyTorch, and attention as softmax(q·k)·v. A C++ compiler, which Inductor calls.
#
# **Time.** About half a minute to run, most of it for the C++ compiler; half an hour to read.
#
# **Paper.** RetroInfer, [arXiv 2505.02922](https://arxiv.org/abs/2505.02922). The paper writes the
# parts of a decode step as CUDA kernels. Here the step is compiled PyTorch.
#
# **Before and after.** [04](04_the_wave_index.ipynb) built the index;
# [06](06_kernels.ipynb) writes the kernels by hand.
#
# **Predict first.** A cache grows by one token a step, by `torch.cat`. The step is compiled. How
# many times does the compiler run during the first twelve steps, if every shape counts as new? And
# how many times, if the compiler itself chooses what it takes as fixed?

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
# *backend*, which makes code of it. Our backend makes no code. It keeps the graph, so that we can
# count graphs, and runs its operations one by one. (Below, `getattr` is the `.mT` of `k.mT`.)

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
# Suppose that in every head one token has nearly all of the weight. Then the values of these tokens
# alone are a good output. The function below asks with an `if` whether that is so. An `if` needs
# the value of a tensor, and a stand-in has none. So the compiler ends the graph there. Python
# decides, and a new graph begins in the branch that Python took. The compiler calls this reason a
# *generic jump*: the next step of the program depends on a tensor.

# %%
def attend_or_copy(q, k, v):
    weights = (q @ k.mT * D**-0.5).softmax(-1)
    if weights.amax(-1).min() > 0.99:                           # needs the value of a tensor
        return v.gather(2, weights.argmax(-1)[..., None].expand(-1, -1, -1, D))
    return weights @ v

compiled, spy = compile_with(attend_or_copy)
compiled(q_now, k, v)
why = torch._dynamo.explain(attend_or_copy)(q_now, k, v).break_reasons
broken = len(spy.graphs)
print(f"{broken} graphs. The compiler says:", why[0].reason.splitlines()[0])
assert broken > 1

# %% [markdown]
# On a GPU the break costs more than a second graph: Python waits for the value, and meanwhile the
# device gets no work. The remedy is to compute both outputs, and to choose between them with
# `torch.where`. The option `fullgraph=True` makes every break an error. So a break cannot come back
# unnoticed. Below, queries that are 1,000 times as large put all weight of a head on one token.

# %%
def attend_or_copy_mended(q, k, v):
    weights = (q @ k.mT * D**-0.5).softmax(-1)
    best = v.gather(2, weights.argmax(-1)[..., None].expand(-1, -1, -1, D))
    return torch.where(weights.amax(-1).min() > 0.99, best, weights @ v)

compiled, spy = compile_with(attend_or_copy_mended, fullgraph=True)
for factor in (1, 1000):                                        # both branches
    now = q_now * factor
    torch.testing.assert_close(compiled(now, k, v), attend_or_copy(now, k, v))
copies = [bool((q_now * n @ k.mT * D**-0.5).softmax(-1).amax(-1).min() > 0.99) for n in (1, 1000)]
print(f"{len(spy.graphs)} graph for both branches; values are copied: {copies}")
assert len(spy.graphs) == 1 and copies == [False, True]

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
# Without `dynamic=False` the compiler guesses: when a second shape comes, it makes that dimension a
# symbol. That takes two compilations, and the code is then for any length. But a CUDA graph, which
# replays a step without Python, cannot replay code whose shapes change.
#
# The library does something else. A cache has one shape and is allocated once. Slots that hold no
# token yet are masked. The number of tokens is a tensor, so no guard is on its value. This tensor
# needs a dimension. A tensor without dimensions, used as an index, is read as a number: an
# `.item()` that nobody wrote.

# %%
def row(x, n):
    """Row n of x (B, H, T, D)."""
    return x[:, :, n]

graphs = {}
for name, shape in (("no dimension", ()), ("one dimension", (1,))):
    compiled, spy = compile_with(row, fullgraph=True, dynamic=False)
    for n in range(4):
        compiled(k, torch.full(shape, n))
    graphs[name] = len(spy.graphs)
print("graphs for four values of an index:", graphs)
assert graphs == {"no dimension": 4, "one dimension": 1}

# %% [markdown]
# So here is a step of a cache that has room.

# %%
def attend_masked(q, k_all, v_all, k_new, v_new, n_tokens):
    """A step of a cache that has room: write the new token, then attend to the filled slots."""
    slot = torch.arange(k_all.shape[2])
    k_all[:, :, n_tokens], v_all[:, :, n_tokens] = k_new, v_new
    logits = (q @ k_all.mT * D**-0.5).masked_fill(slot > n_tokens, -torch.inf)
    n_tokens.add_(1)                                            # a tensor: no guard on its value
    return logits.softmax(-1) @ v_all

# %% [markdown]
# Would the test notice a step that forgets to write, or to mask? In the test, free slots hold
# random numbers, so both faults should make the output wrong. We try both.

# %%
def with_room(x):
    """x (B, H, T, D) up to START; the slots after it hold random numbers."""
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
def no_write(q, k_all, v_all, k_new, v_new, n_tokens):
    """attend_masked without the write."""
    slot = torch.arange(k_all.shape[2])
    logits = (q @ k_all.mT * D**-0.5).masked_fill(slot > n_tokens, -torch.inf)
    n_tokens.add_(1)
    return logits.softmax(-1) @ v_all

def no_mask(q, k_all, v_all, k_new, v_new, n_tokens):
    """attend_masked without the mask."""
    k_all[:, :, n_tokens], v_all[:, :, n_tokens] = k_new, v_new
    n_tokens.add_(1)
    return attend(q, k_all, v_all)

off_by = {f.__name__: steps_with_room(*compile_with(f))[1] for f in (no_write, no_mask)}
print("largest error: below 0.0001;", *(f"{name} {x:.1f} " for name, x in off_by.items()))
assert min(off_by.values()) > 0.1

# %%
automatic = grow(compile_with(attend))
plot_compilations(static, automatic, masked)
assert automatic[-1] == 2

# %% [markdown]
# ## The library
#
# A step of the wave index does more: it writes a token, ranks clusters, gathers their tokens and
# attends over three zones. Still it is one graph, and the graph stays the same while the index
# grows. The number of ranked clusters is a shape, fixed by the capacity of the cache. Clusters that
# a shorter text does not ask for are masked. Counters are tensors.

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
n_updates = round((int(cache.n_indexed[0]) - (1200 - c.sink - c.local)) / c.update)
print(f"600 steps, {n_updates} updates of the index, {len(spy.graphs)} graph of "
      f"{len(names(spy.graphs[0]))} operations")
assert len(spy.graphs) == 1 and n_updates > 1

# %% [markdown]
# ## What a real backend makes of it
#
# Inductor, the default backend, writes one *kernel* for many operations. On a CPU, a kernel is a
# function in C++, made of loops. If the next operation uses a number at once, the number never goes
# through memory. We ask for the code that Inductor made of our masked softmax, and look at the
# lines that read a logit, compare, and mask. (This is the slow cell: a C++ compiler runs.)

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
body = code[code.index('extern "C"'):].split("''')")[0]
n_loops = len(re.findall(r"for\(int64_t x0=", body))             # x0 counts rows, x1 slots
print(f"{n_ops} operations became {n_kernels} kernel with {n_loops} loops over the rows:\n")
lines = body.splitlines()
until = next(n for n, line in enumerate(lines) if "maximum(tmp_acc0_vec" in line)
for line in (line for line in lines[:until + 1] if re.search("x[01]=|tmp", line)):
    short = re.sub(r"static_cast<int64_t>\(([^()]*)\)", r"\1", line)  # without casts
    print(re.sub("at::vec::|std::", "", short)[8:])                     # and namespaces
assert n_kernels == 1 and n_loops < n_ops / 2 and not re.search(r"extern_kernels\.\w+\(", code)

# %% [markdown]
# Read it from the outside in. There is a loop over the rows (`x0`). In it is a loop over the slots
# (`x1`), several numbers at a time (`Vectorized`). The mask is a comparison of the loop's counter
# with `in_ptr0`, the number of tokens. So no tensor of booleans is ever made. The kernel needs one
# loop to find the largest logit, one to add up the exponentials, and one to divide. How many
# tensors are made at all?

# %%
made = re.findall(r"= empty_strided_cpu\(.*", code)
print(f"{len(made)} tensors are allocated; one operation at a time makes {n_ops}")
assert len(made) < n_ops and "bool" not in "".join(made)

# %% [markdown]
# ## What does it not fuse?
#
# One example shows little. Here are five functions. Each does elementwise work before and after one
# operation: a softmax, a gather, a matrix product, a sort or a top-k. On a CPU, Inductor calls a
# function of a library for the last three. A kernel must end before such a call, because the call
# needs all of its input in memory. (For a GPU, Inductor may write some of the three itself.)

# %%
rows, counts = torch.arange(0, T, 7), {}
OPERATIONS = {"softmax": lambda x: masked_softmax(x, filled),
              "gather": lambda x: x[..., rows],
              "product": lambda x: x @ v,
              "sort": lambda x: x.sort(-1).values,
              "top-k": lambda x: x.topk(100).values}

def between(operation):
    """The function that does elementwise work, the operation, and elementwise work."""
    return lambda x: operation(x.sigmoid() + 1).exp() - 1

for name, operation in OPERATIONS.items():
    n, code = code_of(between(operation), logits / 100)
    calls = re.findall(r"extern_kernels\.\w+\(|= torch\.ops\.aten\.\w+\.\w+\(", code)
    counts[name] = n, len(re.findall(r"= async_compile\.cpp", code)), len(calls)

# %%
plot_kernels(counts)
for name, (n, n_kernels, n_calls) in counts.items():
    print(f"{name:8} {n:2} operations: kernels {n_kernels}, calls of a library {n_calls}")
assert all(counts[name][1:] == (1, 0) for name in ("softmax", "gather"))
assert all(n_kernels > 1 and n_calls for name in ("product", "sort", "top-k")
           for _, n_kernels, n_calls in [counts[name]])

# %% [markdown]
# A step of the wave index has products, and a top-k between the ranking and the gather. There its
# one graph becomes several kernels. [Notebook 06](06_kernels.ipynb) counts what that costs.
#
# ## Takeaway
#
# - Do not ask for the value of a tensor: `if`, `.item()` and `int()` break a graph, and on a GPU
#   Python waits for the device.
# - Do not change a shape: allocate once, mask free slots, count in tensors.
# - `fullgraph=True` and a backend that counts graphs turn both rules into tests.
# - One kernel can hold a softmax or a gather, with the work before and after it. It ends at matrix
#   products, sorts and top-k. (This is Inductor on a CPU, in the release printed at the top.)
#
# There is an exception to the first rule. On a CPU no device has to be waited for, and masks can
# waste much work. So on a CPU the library reads some sizes from tensors inside the graph (`numbers`
# in [generate.py](../generate.py)). To the compiler such a size is a symbol, without a guard on its
# value. So there is still one graph.

# %%
print(f"graphs: {broken} with an if on the data, 1 without; "
      f"compilations in {STEPS} steps: {static[-1]}, {automatic[-1]} and {masked[-1]}")

# %% [markdown]
# ## Exercises
#
# **1.** The function `top_share` has an `.item()`. Write `fixed`, which returns the same, but
# compiles as one graph for every n.

# %%
def top_share(q, k, n):
    """The sum (B, H, G) of all weights that are at least 1 / n."""
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
# that attends to the first n slots, `k_all[:, :, :n]`. Compile it with `dynamic=False`, call it
# with six numbers n, and count the graphs.
#
# <details><summary>Answer</summary>
#
# With `dynamic=False`, a number is part of the code and has a guard. So each step is compiled.
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
# **3.** Time `masked_softmax`, eager and compiled, a few times each. One kernel takes the place of
# nine operations. Is it nine times as fast? Why not?
#
# <details><summary>Answer</summary>
#
# A tensor this small stays in the processor's cache, so writing and reading it costs little. Most
# of what is saved is the time to start an operation. Try a hundred times as many slots.
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
