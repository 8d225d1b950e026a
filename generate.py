"""Generation: read prompts, take decode steps, choose tokens. The one place that compiles.

    hot = hot_functions(device)                                 # the fastest there are
    caches = [WaveIndex(RetroConfig(), 4096, hot=hot) for _ in model.layers]
    for tokens in generate(model, caches, [ids], 100):          # (B,), greedy
        ...

A step is one graph, token in and logits out, in which layers share one compiled body. Any cache of
model.py's seam will do. At the end of this file stands the twin of retroinfer.attend that
Inductor compiles well on a CPU.

    B batch   H kv heads   G query heads per kv head   T tokens   D head dim   N rows
"""
import functools
import math
import os
import re
import shutil
import time

import torch

import retroinfer
from retroinfer import PLAIN, RUN, Hot, InputError, bias_of, rows_of, unroll

BACKENDS = "triton", "native", "compile", "eager"       # of the hot functions


def step(model, caches, tokens, run):
    """Logits (B, V) behind tokens (B,), which are appended to the caches."""
    positions = caches[0].n_tokens[:, None].clone()                         # (B, 1)
    hidden = model(tokens[:, None], positions, caches, run)
    return model.logits(hidden[:, -1])


def call(function, *args):
    return function(*args)


def region():
    """call, as a part of a graph that is compiled once however often it is called.

    Such a part may hold no operator that writes to its arguments. Layers whose store has one are
    compiled apart.
    """
    mark = torch.compiler.nested_compile_region
    try:
        # Layers are alike but for their windows: trace one of each kind.
        shared = mark(call, reuse_hash_fn=lambda layer, *args: getattr(layer, "window", 0))
    except TypeError:                                       # torch before 2.13 traces each of them
        shared = mark(call)

    def run(layer, *args):
        store = getattr(args[-1], "store", None)            # of the layer's cache
        return (call if getattr(store, "writes", False) else shared)(layer, *args)
    return run


# Shapes never change, so the sizes of intermediates are not checked again in every layer. A graph
# asks for the number of threads when it runs: app/threads.py may lower it. Code that was made for
# one thread is wrong with more of them, so the number is named: Inductor's cache keeps them apart.
N_THREADS = torch.get_num_threads()
COMPILE = {"fullgraph": True, "dynamic": False, "options": {
    "size_asserts": False, "alignment_asserts": False, "assert_indirect_indexing": False,
    "cpp.threads": N_THREADS, "cpp.dynamic_threads": N_THREADS > 1,
    "cpp.enable_floating_point_contract_flag": "fast"}}

# The one place where decoding is compiled: a step is one graph, in which all layers share one body.
compiled_step = torch.compile(functools.partial(step, run=region()), **COMPILE)
# Caches of another capacity are another graph: torch would give up at the ninth.
torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
eager_step = functools.partial(step, run=call)


class CapturedStep:
    """compiled_step on a GPU as one CUDA graph: the first step runs as it is and compiles, the
    second one is captured, and from then on the host starts one graph a step.

    All state lies at fixed addresses, and cache.update() between steps changes it in place, so a
    graph stays right while its sequences grow. Other caches are captured anew. step, capture:
    what is captured and by what, for tests without a GPU.
    """

    def __init__(self, step=compiled_step, capture=None):
        self.step, self.capture = step, capture or capture_graph
        self.held, self.replay = [], None       # what the graph works on must not be freed
        self.n_steps = self.n_replayed = 0

    def __call__(self, model, caches, tokens):
        self.n_steps += 1
        now = [model, *caches]
        if list(map(id, now)) != list(map(id, self.held)):
            self.held, self.replay = now, None
            return self.step(model, caches, tokens)
        if self.replay is None:
            self.tokens = tokens.clone()
            self.replay, self.logits = self.capture(lambda: self.step(model, caches, self.tokens))
        self.tokens.copy_(tokens)
        self.replay()
        self.n_replayed += 1
        return self.logits.clone()              # the next replay writes there

    def words(self):
        return f"{self.n_replayed} of {self.n_steps} steps were replays of one CUDA graph"


def capture_graph(run):
    """(function that replays run() as a CUDA graph, what run() returned). It is not run yet."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph.replay, out


CHUNK = 8192        # tokens that a prefill reads at a time: this bounds its memory


def prefill(model, caches, prompts, chunk=CHUNK):
    """Logits (B, V) behind each of B prompts (T,), which are read `chunk` tokens at a time.

    A prompt is read alone, to its own length; it goes on where its sequence in the caches stands.
    InputError if a layer that sees a window does not have a RingCache.
    """
    for layer, cache in zip(model.layers, caches, strict=True):
        if layer.window and not hasattr(cache, "window"):
            raise InputError(f"a layer sees the latest {layer.window} tokens, and its cache shows "
                             "all: model.make_caches() makes the right ones")
    logits = []
    for row, ids in enumerate(prompts):
        for part in ids.split(chunk):
            start = int(caches[0].n_tokens[row])
            positions = torch.arange(start, start + len(part), device=ids.device)
            attend = [functools.partial(cache.prefill, row=row) for cache in caches]
            hidden = model(part[None], positions[None], attend)             # (1, chunk, hidden)
        logits.append(model.logits(hidden[:, -1]))
    return torch.cat(logits)


def decode(model, caches, logits, n_tokens, pick, step=compiled_step):
    """Yield up to n_tokens tokens (B,) behind logits (B, V), until all texts have ended.

    pick(logits) chooses a token (B,). Behind its end token a sequence yields that token again.
    Between steps the caches may index what they gathered. InputError when the logits are not
    numbers, ValueError when the caches are full.
    """
    ends = torch.tensor(sorted(model.config.eos_ids), device=logits.device)
    token, has_ended = None, torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    room = 0                                      # steps until the caches must be updated
    for n in range(n_tokens):
        if not logits.amax().isfinite():
            raise InputError(f"the logits of token {n + 1} are not finite: damaged weights, or "
                             "a dtype too narrow for this model")
        picked = pick(logits)                                               # (B,)
        token = picked if token is None else torch.where(has_ended, token, picked)
        yield token
        has_ended |= torch.isin(token, ends)
        if has_ended.all() or n + 1 == n_tokens:
            return
        room = room or min(cache.update() for cache in caches)
        if not room:
            raise ValueError(f"the caches are full after {n} tokens: raise their capacity")
        logits, room = step(model, caches, token), room - 1


def generate(model, caches, prompts, n_tokens, pick=None, step=compiled_step):
    """Yield up to n_tokens tokens (B,) behind B prompts (T,); greedy unless pick is given.

    step=eager_step decodes without compiling.
    """
    logits = prefill(model, caches, prompts)
    yield from decode(model, caches, logits, n_tokens, pick or sampler(), step)


def sampler(temperature=0.0, top_p=1.0, seed=0):
    """A function from logits (B, V) to tokens (B,): the best, or drawn from the top_p share."""
    if not (temperature >= 0 and 0 < top_p <= 1):
        raise InputError(f"temperature {temperature} must be 0 or more, top-p {top_p} in (0, 1]")
    if temperature == 0:
        return lambda logits: logits.max(-1).indices  # a CPU's argmax of bfloat16 is slow
    dice = []           # one for each sequence: it gets what it would get alone

    def draw(logits):
        x = logits.cpu().double()
        x = (x - x.amax(-1, keepdim=True)) / temperature        # at most 0: nothing overflows
        p, ids = x.softmax(-1).sort(-1, descending=True)
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)                     # (B, V), best first
        while len(dice) < len(p):
            dice.append(torch.Generator().manual_seed(seed))
        picked = [row.multinomial(1, generator=d) for row, d in zip(p, dice, strict=True)]
        return ids.gather(-1, torch.stack(picked)).squeeze(-1).to(logits.device)
    return draw


# ---------------------------------------------------------------- the hot functions

def hot_functions(device, name=None):
    """The Hot of a backend, one of BACKENDS; the fastest one if name is None.

    InputError, or ImportError, if the device or this installation does not have it.
    """
    is_cpu = device.type == "cpu"
    name = name or (("native" if has_compiler() else "eager") if is_cpu else "triton")
    if name not in BACKENDS:
        raise InputError(f"backend {name} is not one of {', '.join(BACKENDS)}")
    if (name, is_cpu) in (("triton", True), ("native", False)):
        wanted = "GPU" if name == "triton" else "CPU"
        raise InputError(f"backend {name} needs a {wanted}, the device is {device}: "
                         "leave it out")
    if name == "triton":
        import triton  # noqa: F401 without it kernels.py can be imported, and nothing runs

        import kernels
        return Hot(kernels.attend, kernels.nearest, kernels.segment_sum,
                   kernels.tripartite_attention)
    hot = PLAIN._replace(attend=attend, tripartite_attention=tripartite_attention)
    if name == "native":
        from native.step import attend as native_attend
        return hot._replace(attend=native_attend)
    return hot


def has_compiler():
    """Whether the C++ compiler is there that torch.compile needs on a CPU."""
    words = os.environ.get("CXX", "").split() or ["g++"]
    return shutil.which(words[0]) is not None


def try_compiler():
    """Compile a line with torch.compile. InputError with the compiler's own reason if it fails."""
    if not has_compiler():
        raise InputError("there is no C++ compiler: install g++ or set CXX, or pass --backend "
                         "eager")
    new = time.time()               # no cache holds this line
    try:
        torch.compile(lambda x: x + new, dynamic=False)(torch.ones(RUN))
    except Exception as e:          # torch, its compiler and its cache fail in many ways
        raise InputError(f"torch.compile fails here ({reason(str(e))}): mend it, or pass --backend "
                         "eager") from None


def reason(said):
    """The line that says most of what a compiler or torch said: its first error, else the last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["no message"]
    errors = [line for line in lines if re.search(r"(?<![a-z])error: ", line, re.IGNORECASE)]
    return (errors or lines[-1:])[0]


def attend(q, steady, index, stores, budget, method):
    """The twin of retroinfer.attend for Inductor on a CPU. Elsewhere it is the reference.

    It reads no more than its widest head retrieves, and sums over rows as they stream by: Inductor
    makes one loop of such a sum, where a matrix product of few rows is slow.
    """
    is_cpu = q.device.type == "cpu"
    if is_cpu:
        budget = fit(budget)

    def fetch(ids, ends):
        N = fill(ends, budget) if is_cpu else budget.N
        rows = unroll(index.offsets.gather(-1, ids), ends, N)               # (B, H, N)
        filled = keep(rows.clamp(min=0))
        return *rows_of(stores, filled), bias_of(rows < 0)
    return tripartite_attention(q, steady, index, budget, fetch, method)


def tripartite_attention(q, steady, index, budget, fetch, method):
    """retroinfer.tripartite_attention. A compiled step on a CPU streams its sums."""
    if q.device.type == "cpu" and torch.compiler.is_compiling():
        method = method._replace(scores=stream_scores, mix=stream_mix, few=few_runs)
    return retroinfer.tripartite_attention(q, steady, index, budget, fetch, method)


def fit(budget):
    """The Budget with R and K, in runs of RUN, that its sequences fill. The host reads them.

    To the compiler they are sizes that are known at run time: still one graph.
    """
    runs = (budget.ranked.max() + RUN - 1) // RUN
    R, runs = numbers(budget.retrieve.max().clamp(max=budget.R), runs)
    K = runs * RUN
    if budget.K % RUN:                  # then the clusters are fewer than one run
        return budget._replace(R=R)
    torch._check(R <= K)
    return budget._replace(R=R, K=K)


def fill(ends, budget):
    """N, in runs of RUN, for the retrieved tokens that end at `ends` (B, H, R)."""
    runs, = numbers((ends.max() + RUN - 1) // RUN)      # the last end of a head is its largest
    N = runs * RUN
    torch._check(few_runs(budget, N) <= N)
    return N


def numbers(*scalars):
    """Tensors of one number each as numbers, 1 or more."""
    with torch._dynamo.patch_dynamo_config(capture_scalar_outputs=True):
        found = torch.stack(scalars).clamp(min=1).tolist()
    for n in found:
        torch._check(n >= 1)
    return found


def few_runs(budget, n):
    """retroinfer.few in whole runs of rows, for stream_mix."""
    return (retroinfer.few(budget, n) + RUN - 1) // RUN * RUN


def stream_scores(q, k):
    """retroinfer.scores as a sum for each query over rows as they stream by."""
    rows = keep(q.contiguous()).unbind(2)                                   # (B, H, D) each
    return torch.stack([(x[:, :, None] * k.float()).sum(-1) for x in rows], 2)


def stream_mix(weights, v):
    """retroinfer.mix as a sum for each query over RUN rows at a time: a core's first cache."""
    n = math.gcd(v.shape[2], RUN) if v.shape[2] % RUN else RUN      # symbols have no gcd
    rows = v.unflatten(2, (-1, n)).float()                                  # (B, H, N/n, n, D)
    parts = keep(torch.stack(weights.unbind(2), -1)).unflatten(2, (-1, n)).unbind(-1)
    return torch.stack([(w[..., None] * rows).sum(3) for w in parts], 3).sum(2)


def keep(x):
    """x, but forces Inductor to store it: otherwise it computes x anew at every use."""
    return x.as_strided(x.shape, x.stride())
