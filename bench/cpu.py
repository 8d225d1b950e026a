"""Speed on a CPU beside what a user would run instead: the same weights, threads, and run.

    python -m bench.cpu attention       # one layer of Llama-3-8B's shape, 8K to 1M tokens
    python -m bench.cpu model           # whole steps of the default model beside its peers
    python -m bench.cpu prefill         # what building the index costs in time and memory
    python -m bench.cpu reload          # a second question: load the index, or read the text again
    python -m bench.cpu questions       # sixteen questions: one by one, or as one batch
    python -m bench.cpu codes           # one layer of 1M tokens in 1 bit (antkv.py): bytes and time

`make bench` runs the first four. --save FILE writes the numbers as JSON, and those of attention as
a plot beside it. bench/timing.py says how times are taken.

    T tokens   H kv heads   G query heads per kv head   D head dim
"""
import functools
import itertools
import math
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from antkv import AnchorCache, AnchorConfig, M
from app.choose import free_memory
from app.command import Parser, run_command
from app.questions import spread, whole_pages
from app.snapshot import Snapshot, save
from bench.timing import (
    clock,
    figure,
    keys_and_values,
    memory_bandwidth,
    new_file,
    positive,
    run_section,
    speed_up,
    table,
    take_turns,
)
from error_bars import CheckedIndex
from generate import (
    CHUNK,
    COMPILE,
    compiled_step,
    decode,
    eager_step,
    hot_functions,
    prefill,
    region,
    sampler,
    stream_mix,
    stream_scores,
)
from model import DEFAULT_NAME, DenseCache, default_model, load
from retroinfer import InputError, RetroConfig, WaveIndex

REAL = 8192                         # tokens that are read; longer caches hold copies of their keys
H, G, D = 8, 4, 128                 # Llama-3-8B's heads
CPU = torch.device("cpu")
STYLES = {"SDPA": "s--", "FlexAttention": "^:", "dense, ours": "D-.", "wave index": "v-.",
          "wave index, native": "o-"}
LIBRARIES = "SDPA", "FlexAttention"
BEST = "wave index, native"
LOOK_UP = "1-bit codes, look-up"


# ---------------------------------------------------------------- one layer

class Layer(NamedTuple):
    """A wave index, and views of all its keys and values (1, H, T, D), in the index's order."""
    cache: WaveIndex
    k: torch.Tensor
    v: torch.Tensor


def attention(args):
    """Time of a step through the attention of a few layers, against context, in bfloat16."""
    bandwidth, found = memory_bandwidth(), {}
    for T in args.tokens or (8192, 32768, 131072, 524288, 1048576):
        n_layers = min(max(2, 524288 // T), 16)     # together too large for the processor's caches
        layers = [clumped_layer(T, seed) for seed in range(n_layers)]
        seconds = take_turns(attention_runners(layers, T), args.repeats)
        found[T] = {"seconds": {name: [s / n_layers for s in x] for name, x in seconds.items()},
                    "bytes": layers[0].cache.bytes_read()}
        print(f"{T:,} tokens are done", flush=True)
        torch._dynamo.reset()                       # else a graph for each context is kept
    print(f"\nmemory bandwidth {bandwidth / 1e9:.1f} GB/s\n\n{attention_table(found, bandwidth)}")
    if args.save:
        plot_attention(found, args.save.with_suffix(".png"))
    return {"bandwidth": bandwidth, "contexts": found}


def clumped_layer(T, seed):
    """The Layer of T clumped tokens."""
    cache = WaveIndex(RetroConfig(), T + RetroConfig().update)
    for k, v in clumped(T, torch.Generator().manual_seed(seed)):
        cache.prefill(None, k, v)
    k, v = keys_and_values(cache)
    cache.update()
    return Layer(cache, k, v)


def clumped(T, g):
    """Yield k, v (1, H, n, D), bfloat16, of T tokens, up to REAL of them at a time. Keys lie in
    clumps along the text, as real keys do."""
    for start in range(0, T, REAL):
        n = min(REAL, T - start)
        clumps = torch.randn(1, H, max(n // 24, 1), D, generator=g)
        which = torch.randint(clumps.shape[2], (n,), generator=g)
        k = clumps[:, :, which] + torch.randn(1, H, n, D, generator=g)
        v = torch.randn(k.shape, generator=g)
        yield k.bfloat16(), v.bfloat16()


def attention_runners(layers, T):
    """{name: function} that attends in every layer. Dense attention has the index's own keys."""
    from torch.nn.attention.flex_attention import flex_attention
    g = torch.Generator().manual_seed(9)
    q, k, v = (torch.randn(1, n, 1, D, generator=g).bfloat16() for n in (H * G, H, H))
    run = region()
    step = torch.compile(lambda: [run(layer.cache, q, k, v) for layer in layers], **COMPILE)
    flex, dense = (torch.compile(f, **COMPILE) for f in (flex_attention, our_dense))

    def whole(attend):
        return lambda: [attend(q.view(1, H, G, D), layer.k, layer.v) for layer in layers]

    def wave(name):
        hot = hot_functions(CPU, name)

        def step_again():
            for layer in layers:
                layer.cache.n_tokens.fill_(T)       # every run is the same step
                layer.cache.hot = hot
            step()
        return step_again

    return {"SDPA": whole(F.scaled_dot_product_attention), "FlexAttention": whole(flex),
            "dense, ours": whole(dense), "wave index": wave("compile"), BEST: wave("native")}


def our_dense(q, k, v):
    """Full attention written as our own compiled steps are: sums over keys as they stream by."""
    return stream_mix(stream_scores(q.float() * D ** -0.5, k).softmax(-1), v).to(v.dtype)


def attention_table(found, bandwidth):
    """Milliseconds of each runner, and what the best of ours gains."""
    rows = []
    for T, one in found.items():
        times = {name: statistics.median(x) for name, x in one["seconds"].items()}
        ours = one["seconds"][BEST]
        library = min(LIBRARIES, key=times.get)
        rows.append([f"{T:,}", *(f"{t * 1e3:.2f}" for t in times.values()),
                     f"{speed_up(ours, one['seconds'][library]):.1f}",
                     f"{speed_up(ours, one['seconds']['dense, ours']):.1f}",
                     f"{one['bytes'] / times[BEST] / bandwidth:.0%}"])
    head = ["tokens", *(f"{name} ms" for name in STYLES), "over the best library",
            "over our dense", "of the bandwidth"]
    return table(head, rows)


def plot_attention(found, path):
    """Milliseconds of each runner against context."""
    page, (axes,) = figure((6.4, 4.2))
    longest = max(found)
    times = found[longest]["seconds"]
    last = {name: statistics.median(times[name]) for name in STYLES}
    for name, style in STYLES.items():
        ms = [statistics.median(one["seconds"][name]) * 1e3 for one in found.values()]
        axes.plot(list(found), ms, style, color="black" if name == BEST else "0.5")
        axes.annotate(name, (longest, ms[-1]), (8, label_offset(name, last)),
                      textcoords="offset points", va="center")
    gain = speed_up(times[BEST], times["SDPA"])
    axes.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="one step of a layer, ms",
             title=f"At {longest // 1024}K tokens a step is {gain:.0f} times as fast as SDPA's",
             xlim=(min(found) / 1.3, longest * 6))
    axes.set_xticks(list(found), [f"{T // 1024}K" for T in found], minor=False)
    axes.minorticks_off()
    page.savefig(path, dpi=150)


def label_offset(name, last):
    """Points by which a line's label moves away from another line that ends close to it."""
    ratios = [last[name] / x for other, x in last.items() if other != name]
    is_just_above = any(1 <= x < 1.5 for x in ratios)
    is_just_below = any(2 / 3 < x < 1 for x in ratios)
    return 6 * (is_just_above - is_just_below)


# ---------------------------------------------------------------- one layer from codes

def codes(args):
    """Bytes of a layer of Llama-3-8B's shape in 1 bit, and a step's time beside dense attention.

    Dense attention has fewer tokens if its keys and values would take over half the free memory.
    """
    T, config = (args.tokens or [2**20])[0], AnchorConfig(bits=1)
    cache = coded_layer(T, config, args.repeats + 1)
    held, allocated = cache.bytes_held(), cache.nbytes()
    allocated["codes"] = allocated.pop("store")
    parts = {name: [planned, held[name], allocated[name]]
             for name, planned in planned_bytes(T, config).items()}
    parts["all"] = [sum(x) for x in zip(*parts.values(), strict=True)]
    rows = [[name, *(f"{n / 2**20:.2f}" for n in x)] for name, x in parts.items()]
    print(f"{T:,} tokens, {cache.true_bits():.3f} bits a number\n\n"
          f"{table(['part', 'planned MiB', 'held MiB', 'allocated MiB'], rows)}\n", flush=True)
    T_dense = min(T, free_memory(CPU) // (2 * 4 * H * D))
    seconds = take_turns(code_runners(cache, T_dense), args.repeats)
    rows = [[name, f"{T if name == LOOK_UP else T_dense:,}", f"{statistics.median(x) * 1e3:.2f}",
             f"{speed_up(x, seconds[LOOK_UP]):.2f}"] for name, x in seconds.items()]
    print(table(["a step", "tokens", "ms", "times as fast as from codes"], rows))
    return {"tokens": T, "tokens of dense": T_dense, "bytes": parts, "seconds": seconds}


def planned_bytes(T, config):
    """{part: bytes} of a layer of T tokens, in 16 bits where it is exact: as docs/antkv.md has it.

    An exact token takes 4 bytes more: an anchor for its place, another for its score.
    """
    exact, n = H * (4 * D + 4), T - config.sink - config.window
    return {"codes": H * n * 2 * D * config.bits // 8, "codebooks": H * D * (2 * M * 2 + 4),
            "anchors": math.ceil(config.anchors * n) * exact,
            "steady zone": (config.sink + config.window) * exact}


def coded_layer(T, config, steps):
    """An AnchorCache of T clumped tokens with room for some steps. The first REAL tokens make the
    codebooks, and no more are in 16 bits at a time. A token's score is the length of its key."""
    cache = AnchorCache(config, T + steps)
    for new in clumped(T, torch.Generator().manual_seed(0)):
        if cache.store is None:
            cache.allocate(new[0])
        n = int(cache.n_tokens - cache.n_indexed)           # sink and window
        cache.n_tokens += new[0].shape[2]
        k, v = (torch.cat([old[:, :, :n], x], 2)
                for old, x in zip((cache.k_steady, cache.v_steady), new, strict=True))
        cache.settle(0, k, v, k[0].float().norm(dim=-1))
    return cache


def code_runners(cache, T):
    """{name: function} that makes a real step of the cache, or attends to T tokens densely."""
    g = torch.Generator().manual_seed(9)
    q, *new = (torch.randn(1, n, 1, D, generator=g).bfloat16() for n in (H * G, H, H))
    k, v = (torch.empty(1, H, T, D, dtype=torch.bfloat16).normal_(generator=g) for _ in "kv")
    step, dense = (torch.compile(f, **COMPILE) for f in (cache.decode, our_dense))
    grouped = q.view(1, H, G, D)

    def decode_one():
        cache.update()
        step(q, *new)

    return {LOOK_UP: decode_one, "dense, ours": lambda: dense(grouped, k, v),
            "dense, SDPA": lambda: F.scaled_dot_product_attention(grouped, k, v)}


# ---------------------------------------------------------------- a whole model

def sample_ids(tokenizer, n):
    """n token ids (n,) of the example texts, repeated when they are too short."""
    texts = sorted(Path(__file__).parent.parent.glob("examples/*.txt"))
    ids = [i for text in texts for i in tokenizer.encode(text.read_text("utf-8"))]
    return torch.tensor((ids * (n // len(ids) + 1))[:n])


class Ours:
    """This repository with one kind of cache. Called as the peers below are."""

    def __init__(self, model, make_cache, step=compiled_step):
        self.model, self.make_cache, self.step = model, make_cache, step

    def __call__(self, ids, n_steps):
        """(seconds of the prefill, [seconds of each step]). The first two steps are left out.

        Only REAL tokens are read. The keys of all others are copies of theirs.
        """
        caches = [self.make_cache(len(ids) + n_steps) for _ in self.model.layers]
        start = time.perf_counter()
        logits = prefill(self.model, caches, [ids[:REAL]])
        seconds = time.perf_counter() - start
        for cache in caches:
            repeat_keys(cache, len(ids))
        tokens = decode(self.model, caches, logits, n_steps, sampler(), self.step)
        return seconds, [clock(lambda: next(tokens)) for _ in range(n_steps)][2:]


def repeat_keys(cache, T):
    """Fill a cache to T tokens with copies of those it holds: for speed, not for sense."""
    known = int(cache.n_tokens[0])
    k, v = keys_and_values(cache)
    for start in range(known, T, known):
        n = min(known, T - start)
        cache.prefill(None, k[:, :, :n], v[:, :, :n])


class Transformers:
    """Hugging Face transformers on the same GGUF file, with its dynamic cache and SDPA."""

    def __init__(self, dtype):
        from transformers import AutoModelForCausalLM, logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        path = default_model()
        self.model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype).eval()

    @torch.no_grad()
    def __call__(self, ids, n_steps):
        start = time.perf_counter()
        out = self.model(ids[None], use_cache=True, logits_to_keep=1)
        seconds = time.perf_counter() - start

        def step():
            nonlocal out
            token = out.logits[:, -1:].argmax(-1)
            out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
        return seconds, [clock(step) for _ in range(n_steps)][2:]


class Adopted(Transformers):
    """Transformers' generate() with our attention in it (adapters/hf.py): eager, or compiled."""

    def __init__(self, dtype, is_compiled):
        super().__init__(dtype)
        from transformers import CompileConfig
        self.how = CompileConfig(mode=None)
        self.how._compile_all_devices = is_compiled

    def __call__(self, ids, n_steps):
        from adapters.hf import adopt
        cache, self.ticks = adopt(self.model, RetroConfig(), len(ids) + n_steps + 1), []
        self.model.generate(ids[None], past_key_values=cache, compile_config=self.how,
                            max_new_tokens=n_steps + 1, min_new_tokens=n_steps + 1,
                            do_sample=False, streamer=self)
        seconds = [after - before for before, after in itertools.pairwise(self.ticks)]
        return seconds[0], seconds[3:]

    def put(self, tokens):
        """The streamer of generate(): it hears the prompt, and then each token."""
        self.ticks.append(time.perf_counter())

    def end(self):
        """Of the streamer."""


class LlamaCpp:
    """llama.cpp on the same GGUF file, with its weights in 4 bits and flash attention on."""

    def __init__(self, n_ctx):
        from llama_cpp import Llama
        self.model = Llama(str(default_model()), n_ctx=n_ctx, flash_attn=True, verbose=False,
                           n_threads=torch.get_num_threads(),
                           n_threads_batch=torch.get_num_threads())

    def __call__(self, ids, n_steps):
        self.model.reset()
        seconds = clock(lambda: self.model.eval(ids.tolist()))

        def step():
            self.model.eval([self.model.sample(temp=0.0)])
        return seconds, [clock(step) for _ in range(n_steps)][2:]


def model(args):
    """Prefill and decode of the default model; beside its peers up to REAL tokens."""
    if args.steps < 3:
        raise InputError(f"--steps is {args.steps}: at least 3 are needed, two are not timed")
    dtype, found = getattr(torch, args.dtype), {}
    ours, tokenizer = load(dtype=dtype, device=CPU)
    print(f"the wave index attends by {hot_functions(CPU).attend.__module__}")
    for T in args.tokens or (4096, REAL - args.steps, 32768, 131072):
        runners = model_runners(ours, dtype, T, args.steps)
        ids, found[T] = sample_ids(tokenizer, T), {name: [] for name in runners}
        for _ in range(args.repeats):
            for name, runner in runners.items():
                found[T][name].append(runner(ids, args.steps))
        print(model_table(T, found[T]), flush=True)
        torch._dynamo.reset()
    return found


def model_runners(ours, dtype, T, n_steps):
    """{name: runner} of T tokens. Peers, which must read every token, up to REAL tokens only."""
    wave, checked = (functools.partial(kind, RetroConfig(), hot=hot_functions(CPU))
                     for kind in (WaveIndex, CheckedIndex))
    runners = {"dense, compiled": Ours(ours, DenseCache), "wave index": Ours(ours, wave)}
    if T > REAL:
        return runners
    return {"transformers": Transformers(dtype), "transformers, adopted": Adopted(dtype, False),
            "transformers, adopted, compiled": Adopted(dtype, True), **llama_cpp(T + n_steps),
            "dense, eager": Ours(ours, DenseCache, eager_step),
            "wave index, checked": Ours(ours, checked), **runners}


def llama_cpp(n_ctx):
    """{"llama.cpp": its runner} if its package is installed, which takes minutes to build."""
    try:
        return {"llama.cpp, Q4_1": LlamaCpp(n_ctx)}
    except ImportError as e:
        print(f"llama.cpp is left out: {e} (pip install llama-cpp-python)")
        return {}


def model_table(T, results):
    """Medians, and how many times as fast as each runner the wave index is, repeat by repeat."""
    prefills = {name: [run[0] for run in runs] for name, runs in results.items()}
    steps = {name: [statistics.median(run[1]) for run in runs] for name, runs in results.items()}
    ours, rows = "wave index", []
    for name in results:
        seconds, gain = "", ""
        if T <= REAL:
            seconds = f"{statistics.median(prefills[name]):.2f}"
            gain = f"{speed_up(prefills[ours], prefills[name]):.2f}"
        rows.append([name, seconds, f"{statistics.median(steps[name]) * 1e3:.1f}", gain,
                     f"{speed_up(steps[ours], steps[name]):.2f}"])
    copies = "" if T <= REAL else f" (keys of {REAL:,}, repeated: for speed only)"
    head = ["runner", "prefill s", "decode ms", "wave prefills x", "wave decodes x"]
    return f"\n{T:,} tokens{copies}\n\n{table(head, rows)}"


# ---------------------------------------------------------------- building, saving, loading

def prefill_cost(args):
    """Seconds, share spent on the index, and peak memory of a prefill, each in its own process."""
    found, T = {}, (args.tokens or [REAL])[0]
    for name in ("dense", "wave index"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[name] = pool.apply(one_prefill, (name, T, args.dtype))
    head = ["cache", "prefill s", "of it the index", "peak memory GiB", "over dense"]
    rows = [[name, f"{one['seconds']:.1f}", f"{one['indexing'] / one['seconds']:.1%}",
             f"{one['peak'] / 2**30:.2f}", f"{one['peak'] / found['dense']['peak']:.2f}"]
            for name, one in found.items()]
    print(f"{T:,} tokens, 2,048 at a time\n\n{table(head, rows)}")
    return {"tokens": T, **found}


def one_prefill(name, T, dtype):
    """Seconds of a prefill, seconds in it that the index took, and this process's peak bytes."""
    net, tokenizer = load(dtype=getattr(torch, dtype), device=CPU)
    kind = {"dense": DenseCache, "wave index": functools.partial(WaveIndex, RetroConfig())}[name]
    caches, indexing = [kind(T) for _ in net.layers], []
    for cache in caches if name != "dense" else []:
        absorb = cache.absorb           # clusters a segment: all that an index adds to a prefill
        cache.absorb = lambda *args, run=absorb: indexing.append(clock(lambda: run(*args)))
    ids = sample_ids(tokenizer, T)
    seconds = clock(lambda: read(net, caches, ids, 2048))
    return {"seconds": seconds, "indexing": sum(indexing),
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def read(net, caches, ids, chunk=CHUNK):
    """Logits behind ids (T,); the caches are ready to decode."""
    logits = prefill(net, caches, [ids], chunk)
    for cache in caches:
        cache.update()
    return logits


def reload(args):
    """Seconds to the first token of an answer: by reading the text, and by loading its index."""
    net, tokenizer = load(dtype=getattr(torch, args.dtype), device=CPU)
    config, T = RetroConfig(), (args.tokens or [7000])[0]
    ids = sample_ids(tokenizer, T)
    question = torch.tensor(tokenizer.continued("\n\nWho wrote this, and when?"))

    def caches():
        return [WaveIndex(config, T + 100) for _ in net.layers]

    def read_text():
        prefill(net, caches(), [torch.cat([ids, question])]).argmax(-1)

    def load_index():
        fresh = caches()
        Snapshot(path, net, tokenizer, config).restore(fresh)
        prefill(net, fresh, [question]).argmax(-1)

    with tempfile.TemporaryDirectory() as folder:
        path, filled = Path(folder) / "text.safetensors", caches()
        prefill(net, filled, [ids])
        writing = clock(lambda: save(path, net, tokenizer, filled, ids, "-"))
        seconds = take_turns({"text read": read_text, "index loaded": load_index}, args.repeats)
        size = path.stat().st_size
    rows = [[name, f"{statistics.median(x):.2f}", f"{speed_up(x, seconds['text read']):.1f}"]
            for name, x in seconds.items()]
    print(f"{T:,} tokens, a file of {size / 2**20:.0f} MiB written in {writing:.2f} s\n\n"
          f"{table(['first token after', 'seconds', 'times as fast'], rows)}")
    return {"tokens": T, "bytes": size, "save": writing, **seconds}


def questions(args):
    """Seconds of sixteen questions about one saved text: one by one, and as one batch over one
    index. Steps are eager: the answers are short."""
    net, tokenizer = load(dtype=getattr(torch, args.dtype), device=CPU)
    config, T, n = RetroConfig(), (args.tokens or [7000])[0], 16
    ids, hot = sample_ids(tokenizer, T), hot_functions(CPU)
    asked = [torch.tensor(tokenizer.continued(f"\n\nWho wrote page {i}, and when?"))
             for i in range(n)]

    def ask(some):
        caches = [WaveIndex(config, whole_pages(config, T + 200), hot=hot) for _ in net.layers]
        Snapshot(path, net, tokenizer, config).restore(caches)
        for cache in caches:
            spread(cache, len(some))
        start = time.perf_counter()
        logits = prefill(net, caches, some)
        deque(decode(net, caches, logits, args.steps, sampler(), eager_step), maxlen=0)
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder:
        path, filled = Path(folder) / "text.safetensors", [WaveIndex(config, T) for _ in net.layers]
        prefill(net, filled, [ids])
        save(path, net, tokenizer, filled, ids, "-")
        asking = {"one by one": [], "one batch": []}
        seconds = take_turns({
            "one by one": lambda: asking["one by one"].append(sum(ask([q]) for q in asked)),
            "one batch": lambda: asking["one batch"].append(ask(asked))}, args.repeats)
    asking = {name: x[1:] for name, x in asking.items()}            # the first was a warm-up
    rows = [[name, f"{statistics.median(x):.1f}", f"{speed_up(x, seconds['one by one']):.1f}",
             f"{statistics.median(asking[name]):.1f}",
             f"{speed_up(asking[name], asking['one by one']):.1f}"] for name, x in seconds.items()]
    print(f"{n} questions about {T:,} tokens, {args.steps} tokens of answer each\n\n" + table(
        ["asked", "seconds", "times as fast", "without loading", "times as fast"], rows))
    return {"tokens": T, "seconds": seconds, "asking": asking}


SECTIONS = {"attention": attention, "model": model, "prefill": prefill_cost, "reload": reload,
            "questions": questions, "codes": codes}


def main():
    parser = Parser(prog="python -m bench.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--tokens", type=positive, nargs="+", help="context lengths")
    parser.add_argument("--steps", type=positive, default=34, help="tokens to decode (model)")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--save", metavar="FILE", type=new_file, help="write the numbers as JSON")
    args = parser.parse_args()
    is_layer = args.section in ("attention", "codes")
    what = "a layer in bfloat16" if is_layer else f"{DEFAULT_NAME}, {args.dtype}"
    run_section(args, SECTIONS, what)


if __name__ == "__main__":
    raise SystemExit(run_command("bench.cpu", main))
