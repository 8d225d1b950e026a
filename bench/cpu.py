"""Speed beside what a user would run instead: the same weights and threads, in one run.

    python -m bench.cpu attention       # one layer of Llama-3-8B's shape, 8K to 1M tokens
    python -m bench.cpu model           # whole steps of the default model beside its peers
    python -m bench.cpu prefill         # what building the index costs in time and memory
    python -m bench.cpu reload          # the second question: an index loaded, or its text read again

`make bench` runs all four. Runners take turns, so that a machine whose speed drifts is unfair to
none: a row is the median over repeats, a ratio the median of the repeats' own ratios. --save FILE
writes the numbers as JSON, and those of attention as a plot beside it.
"""
import argparse
import functools
import json
import multiprocessing
import platform
import re
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from app.cli import choose_backend
from app.session import Writer
from app.snapshot import Snapshot, save
from generate import COMPILE, compiled_step, decode, eager_step, prefill, region, sampler
from model import DEFAULT_NAME, DenseCache, default_model, load
from retroinfer import PLAIN, RetroConfig, WaveIndex, keep, mix, scores

REAL = 8192                                 # more tokens than these are keys of these, repeated
H, G, D = 8, 4, 128                         # Llama-3-8B's heads
BEST = "wave index, native"
BOOST = 1.2                                 # of a head of the default model, on average


def take_turns(runners, repeats):
    """{name: seconds of each repeat} of functions; the first call of each compiles."""
    for run in runners.values():
        run()
    seconds = {name: [] for name in runners}
    for _ in range(repeats):
        for name, run in runners.items():
            seconds[name].append(clock(run))
    return seconds


def clock(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def speed_up(ours, theirs):
    """How many times as fast we are: the median over repeats that were run side by side."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# ---------------------------------------------------------------- one layer

def attention(args):
    """Step time of a layer's attention, one of a model's, against context, in bf16."""
    bandwidth, found = memory_bandwidth(), {}
    for T in args.tokens or (8192, 32768, 131072, 524288, 1048576):
        layers = [clumped_index(T, seed) for seed in range(min(max(2, 524288 // T), 16))]
        seconds = take_turns(attention_runners(layers, T), args.repeats)
        found[T] = {"seconds": {name: [s / len(layers) for s in x] for name, x in seconds.items()},
                    "bytes": layers[0].bytes_read()}
        print(f"{T:,} tokens are done", flush=True)
        torch._dynamo.reset()                       # or one process would keep a graph a context
    rows = []
    for T, one in found.items():
        times = {name: statistics.median(x) for name, x in one["seconds"].items()}
        ours = one["seconds"][BEST]
        library = min(("SDPA", "FlexAttention"), key=times.get)
        rows.append([f"{T:,}", *(f"{t * 1e3:.2f}" for t in times.values()),
                     f"{speed_up(ours, one['seconds'][library]):.1f}",
                     f"{speed_up(ours, one['seconds']['dense, ours']):.1f}",
                     f"{one['bytes'] / times[BEST] / bandwidth:.0%}"])
    head = ["tokens", *(f"{name} ms" for name in times), "over the best library",
            "over our dense", "of the bandwidth"]
    print(f"\nmemory bandwidth {bandwidth / 1e9:.1f} GB/s\n\n{table(head, rows)}")
    if args.save:
        plot_attention(found, Path(args.save).with_suffix(".png"))
    return {"bandwidth": bandwidth, "contexts": found}


def memory_bandwidth():
    """Bytes a second of one compiled sum over 1 GiB, read in four streams."""
    x = torch.ones(4, 2**26)
    total = torch.compile(lambda x: (x[0] + x[1] + x[2] + x[3]).sum())
    return x.nbytes / min(take_turns({"sum": lambda: total(x)}, 7)["sum"])


def clumped_index(T, seed):
    """A WaveIndex of T tokens whose keys lie in clumps along the text, as real keys do."""
    g = torch.Generator().manual_seed(seed)
    wave = WaveIndex(RetroConfig(), T + RetroConfig().update)
    wave.allocate(torch.empty(1, H, 0, D, dtype=torch.bfloat16))
    for part in torch.arange(T).split(REAL):
        clumps = torch.randn(1, H, len(part) // 24, D, generator=g)
        which = torch.randint(clumps.shape[2], (len(part),), generator=g)
        noise = torch.randn(1, H, len(part), D, generator=g)
        wave.k_store[:, :, part] = (clumps[:, :, which] + noise).bfloat16()
        wave.v_store[:, :, part] = torch.randn(noise.shape, generator=g).bfloat16()
    wave.n_tokens.fill_(T)
    wave.update()
    wave.boosts.fill_(BOOST)
    return wave


def attention_runners(layers, T):
    """{name: function} that attends in every layer; dense ones to the keys as clustered."""
    from torch.nn.attention.flex_attention import flex_attention
    g = torch.Generator().manual_seed(9)
    q, k, v = (torch.randn(1, n, 1, D, generator=g).bfloat16() for n in (H * G, H, H))
    native, run = choose_backend("native", q.device)[1], region()
    step = torch.compile(lambda: [run(cache, q, k, v) for cache in layers], **COMPILE)
    flex, dense = (torch.compile(f, **COMPILE) for f in (flex_attention, our_dense))

    def whole(attend):
        return lambda: [attend(q.view(1, H, G, D), cache.k_store[:, :, :T],
                               cache.v_store[:, :, :T]) for cache in layers]

    def wave(hot):
        for cache in layers:
            cache.n_tokens.fill_(T)
            cache.hot = hot
        step()

    return {"SDPA": whole(F.scaled_dot_product_attention), "FlexAttention": whole(flex),
            "dense, ours": whole(dense), "wave index": lambda: wave(PLAIN),
            BEST: lambda: wave(native)}


def our_dense(q, k, v):
    """Full attention written as our own steps are: sums over keys as they stream by."""
    return mix(scores(keep(q.float() * D ** -0.5), k).softmax(-1), v).to(v.dtype)


def plot_attention(found, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    styles = {"SDPA": "s--", "FlexAttention": "^:", "dense, ours": "D-.", "wave index": "v-.",
              BEST: "o-"}
    last = {name: statistics.median(found[max(found)]["seconds"][name]) for name in styles}
    for name, style in styles.items():
        ms = [statistics.median(one["seconds"][name]) * 1e3 for one in found.values()]
        axes.plot(list(found), ms, style, color="black" if name == BEST else "0.5")
        ratios = [last[name] / x for other, x in last.items() if other != name]
        up = 6 * (any(1 <= x < 1.5 for x in ratios) - any(2 / 3 < x < 1 for x in ratios))
        axes.annotate(name, (max(found), ms[-1]), (8, up), textcoords="offset points", va="center")
    times = found[max(found)]["seconds"]
    axes.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="one step of a layer, ms",
             title=f"At {max(found) // 1024}K tokens a step is "
                   f"{speed_up(times[BEST], times['SDPA']):.0f} times as fast as SDPA's",
             xlim=(min(found) / 1.3, max(found) * 6))
    axes.set_xticks(list(found), [f"{T // 1024}K" for T in found], minor=False)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------- a whole model

def sample_ids(tokenizer, n):
    """n token ids (n,) of the example texts, repeated when they are too short."""
    texts = sorted(Path(__file__).parent.parent.glob("examples/*.txt"))
    ids = [i for text in texts for i in tokenizer.encode(text.read_text("utf-8"))]
    return torch.tensor((ids * (n // len(ids) + 1))[:n])


class Ours:
    """This repository with one kind of cache: Ours(...)(ids, n_steps) as its peers below."""

    def __init__(self, model, make_cache, step=compiled_step):
        self.model, self.make_cache, self.step = model, make_cache, step

    def __call__(self, ids, n_steps):
        """(seconds of the prefill, [seconds of each step]); keys behind REAL tokens are copies."""
        caches = [self.make_cache(len(ids) + n_steps) for _ in self.model.layers]
        start = time.perf_counter()
        logits = prefill(self.model, caches, [ids[:REAL]])
        seconds = time.perf_counter() - start
        for cache in caches:
            repeat_keys(cache, len(ids))
        tokens = decode(self.model, caches, logits, n_steps, sampler(), self.step)
        return seconds, [clock(lambda: next(tokens)) for _ in range(n_steps)][2:]


def repeat_keys(cache, T):
    """Fill a cache to T tokens with copies of what it holds: for speed, not for sense."""
    known = int(cache.n_tokens[0])
    stores = (cache.k_store, cache.v_store) if isinstance(cache, WaveIndex) else (cache.k, cache.v)
    for start in range(known, T, known):
        for x in stores:
            x[:, :, start:min(start + known, T)] = x[:, :, :min(known, T - start)]
    cache.n_tokens.fill_(T)


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


class LlamaCpp:
    """llama.cpp on the same GGUF file, its weights in 4 bits as they are, flash attention on."""

    def __init__(self, n_ctx):
        from llama_cpp import Llama
        self.model = Llama(str(default_model()), n_ctx=n_ctx, flash_attn=True, verbose=False,
                           n_threads=torch.get_num_threads(),
                           n_threads_batch=torch.get_num_threads())

    def __call__(self, ids, n_steps):
        self.model.reset()
        seconds = clock(lambda: self.model.eval(ids.tolist()))
        step = lambda: self.model.eval([self.model.sample(temp=0.0)])  # noqa: E731
        return seconds, [clock(step) for _ in range(n_steps)][2:]


def model(args):
    """Prefill and decode of the default model, beside its peers as far as it was trained."""
    dtype, found = getattr(torch, args.dtype), {}
    ours, tokenizer = load(dtype=dtype, device="cpu")
    _, hot, backend = choose_backend(None, ours.lm_head.weight.device)
    print(f"wave index: {backend}")
    for T in args.tokens or (4096, REAL - args.steps, 32768, 131072):
        runners = {"dense, compiled": Ours(ours, DenseCache),
                   "wave index": Ours(ours, functools.partial(WaveIndex, RetroConfig(), hot=hot))}
        if T <= REAL:
            runners = {"transformers": Transformers(dtype), **llama_cpp(T + args.steps),
                       "dense, eager": Ours(ours, DenseCache, eager_step), **runners}
        ids, found[T] = sample_ids(tokenizer, T), {name: [] for name in runners}
        for _ in range(args.repeats):
            for name, run in runners.items():
                found[T][name].append(run(ids, args.steps))
        print(model_table(T, found[T]), flush=True)
        torch._dynamo.reset()
    return found


def llama_cpp(n_ctx):
    """{"llama.cpp": its runner} where its package is installed: it takes minutes to build."""
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
        pre = [f"{statistics.median(prefills[name]):.2f}",
               f"{speed_up(prefills[ours], prefills[name]):.2f}"] if T <= REAL else ["", ""]
        rows.append([name, pre[0], f"{statistics.median(steps[name]) * 1e3:.1f}", pre[1],
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
    net, tokenizer = load(dtype=getattr(torch, dtype), device="cpu")
    kind = {"dense": DenseCache, "wave index": functools.partial(WaveIndex, RetroConfig())}[name]
    caches, indexing = [kind(T) for _ in net.layers], []
    for cache in caches if name != "dense" else []:
        build = cache.append            # what runs when a segment is full, and behind the last one
        cache.append = lambda *args, build=build: indexing.append(clock(lambda: build(*args)))
    ids = sample_ids(tokenizer, T)
    seconds = clock(lambda: [prefill(net, caches, [ids], 2048),
                             *(cache.update() for cache in caches)])
    return {"seconds": seconds, "indexing": sum(indexing),
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def reload(args):
    """Seconds to the first token of an answer: by reading the text, and by loading its index."""
    net, tokenizer = load(dtype=getattr(torch, args.dtype), device="cpu")
    config, writer, T = RetroConfig(), Writer(tokenizer, True, "cpu"), (args.tokens or [7000])[0]
    ids = sample_ids(tokenizer, T)
    _, question = writer.prompt("", "Who wrote this, and when was it written?")

    def read():
        nonlocal caches
        caches = [WaveIndex(config, T + 100) for _ in net.layers]
        prefill(net, caches, [torch.cat([ids, question])]).argmax(-1)

    with tempfile.TemporaryDirectory() as folder:
        path, caches = Path(folder) / "text.safetensors", [WaveIndex(config, T) for _ in net.layers]
        prefill(net, caches, [ids])
        writing = clock(lambda: save(path, net, tokenizer, caches, ids))

        def load_index():
            fresh = [WaveIndex(config, T + 100) for _ in net.layers]
            Snapshot(path, net, tokenizer, config).restore(fresh)
            prefill(net, fresh, [question]).argmax(-1)

        seconds = take_turns({"text read": read, "index loaded": load_index}, args.repeats)
        size = path.stat().st_size
    rows = [[name, f"{statistics.median(x):.2f}", f"{speed_up(x, seconds['text read']):.1f}"]
            for name, x in seconds.items()]
    print(f"{T:,} tokens, a file of {size / 2**20:.0f} MiB written in {writing:.2f} s\n\n"
          f"{table(['first token after', 'seconds', 'times as fast'], rows)}")
    return {"tokens": T, "bytes": size, "save": writing, **seconds}


def cpu_name():
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{found[1]} ({torch.backends.cpu.get_cpu_capability()})" if found else \
        platform.processor() or platform.machine()


SECTIONS = {"attention": attention, "model": model, "prefill": prefill_cost, "reload": reload}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--tokens", type=int, nargs="+", help="context lengths")
    parser.add_argument("--steps", type=int, default=34, help="tokens to decode (model)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--save", metavar="FILE", help="write the numbers to this JSON file")
    args = parser.parse_args()
    what = "a layer in bfloat16" if args.section == "attention" else f"{DEFAULT_NAME}, {args.dtype}"
    where = (f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}: {what}")
    print(where, flush=True)
    found = SECTIONS[args.section](args)
    if args.save:
        Path(args.save).write_text(json.dumps({"where": where, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
