"""Speed beside what a user would run instead: the same weights, dtype and threads, in one run.

    python bench.py                      # or: make bench
    python bench.py --tokens 2048 --repeats 5 --dtype bfloat16

Runners take turns, so that a machine whose speed drifts is unfair to none; a row is the median over
repeats, a ratio the median of the repeats' own ratios to transformers. Decoding is greedy. The
first two steps are not counted: they compile.
"""
import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from model import DenseCache, default_model, load
from retroinfer import RetroConfig, WaveIndex, compiled_step, decode, eager_step, prefill, sampler


def sample_ids(tokenizer, n):
    """n token ids (1, n) of the example texts, repeated when they are too short."""
    texts = sorted(Path(__file__).parent.glob("examples/*.txt"))
    ids = [i for text in texts for i in tokenizer.encode(text.read_text("utf-8"))]
    return torch.tensor([(ids * (n // len(ids) + 1))[:n]])


class Ours:
    """This repository with one kind of cache."""

    def __init__(self, model, make_cache, step):
        self.model, self.make_cache, self.step = model, make_cache, step

    def measure(self, ids, n_steps):
        """(seconds of prefill, median seconds of a step)."""
        caches = [self.make_cache(ids.shape[1] + n_steps) for _ in self.model.layers]
        start = time.perf_counter()
        logits = prefill(self.model, caches, ids)
        seconds = time.perf_counter() - start
        tokens = decode(self.model, caches, logits, n_steps, sampler(), self.step)
        return seconds, median_step(lambda: next(tokens), n_steps)


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
    def measure(self, ids, n_steps):
        start = time.perf_counter()
        out = self.model(ids, use_cache=True, logits_to_keep=1)
        seconds = time.perf_counter() - start

        def step():
            nonlocal out
            token = out.logits[:, -1:].argmax(-1)
            out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
        return seconds, median_step(step, n_steps)


def median_step(step, n_steps):
    seconds = []
    for _ in range(n_steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def table(results, repeats):
    """Rows for a person: medians, and ratios to transformers within each repeat."""
    peer = results["transformers"]
    lines = ["| runner | prefill s | decode ms | prefill speed-up | decode speed-up |",
             "|---|---|---|---|---|"]
    for name, runs in results.items():
        pre, step = (statistics.median(x) for x in zip(*runs, strict=True))
        first, second = (statistics.median(peer[r][i] / runs[r][i] for r in range(repeats))
                         for i in (0, 1))
        lines.append(f"| {name} | {pre:.2f} | {step * 1e3:.1f} | {first:.2f} | {second:.2f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096, help="prompt length")
    parser.add_argument("--steps", type=int, default=34, help="tokens to decode")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--save", help="write the numbers to this JSON file")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model, tokenizer = load(dtype=dtype, device="cpu")
    ids = sample_ids(tokenizer, args.tokens)
    runners = {
        "transformers": Transformers(dtype),
        "dense, eager": Ours(model, DenseCache, eager_step),
        "dense, compiled": Ours(model, DenseCache, compiled_step),
        "wave index, compiled": Ours(model, lambda n: WaveIndex(RetroConfig(), n), compiled_step)}
    results = {name: [] for name in runners}
    for _ in range(args.repeats):
        for name, runner in runners.items():
            results[name].append(runner.measure(ids, args.steps))
    where = (f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
             f"torch {torch.__version__}, {args.dtype}, {args.tokens} tokens")
    print(f"{where}\n\n{table(results, args.repeats)}")
    if args.save:
        facts = {"where": where, "seconds": results}
        Path(args.save).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
