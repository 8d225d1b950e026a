"""The command line of retroinfer.py: read a prompt, stream the answer, say what it took.

    python retroinfer.py --prompt-file x

The answer goes to standard output, the progress bar and the card to standard error; --json ends
standard output with one line for machines. What a person can get wrong is one line and status 2.
"""
import argparse
import inspect
import json
import math
import os
import re
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch

from model import DEFAULT_NAME, DenseCache, load
from retroinfer import (
    PLAIN,
    RetroConfig,
    WaveIndex,
    compiled_step,
    decode,
    eager_step,
    prefill,
    sampler,
)


def parse_args(argv):
    parser = Parser(description="Answer a prompt, decoding through a wave index.")
    add = parser.add_argument
    add("--prompt-file", required=True, help="the prompt, UTF-8 text; - reads standard input")
    add("--model", default=DEFAULT_NAME, help="directory, .gguf file, or the name of the default: "
        f"{DEFAULT_NAME}, which make setup installs")
    add("--max-new-tokens", type=int, default=128, help="tokens to generate at most")
    add("--temperature", type=float, default=0.0, help="0 takes the best token every time")
    add("--top-p", type=float, default=1.0, help="sample from the tokens that hold this share")
    add("--seed", type=int, default=0, help="of the sampling")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32 on a CPU, "
        "bfloat16 on a GPU")
    add("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    add("--backend", choices=["triton", "compile", "eager"], help="default: triton on a GPU, which "
        "is compile with the kernels of kernels.py, else compile")
    add("--prefill-chunk", type=int, help="read the prompt so many tokens at a time")
    add("--raw", action="store_true", help="take the prompt as it is, without chat template")
    add("--beyond-context", action="store_true", help="allow more tokens than the model's context")
    add("--compare", action="store_true", help="run dense attention beside it")
    add("--json", action="store_true", help="end with one line of JSON on standard output")
    source = inspect.getsource(RetroConfig)
    for field in fields(RetroConfig):
        text = re.search(rf"{field.name}: .*# +(.*)", source)[1]
        add(f"--{field.name}", type=type(field.default), default=field.default,
            help=f"{text} (default {field.default})")
    return parser.parse_args(argv)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def read_prompt(path):
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = raw.decode("utf-8")
    except OSError as e:
        raise ValueError(f"cannot read the prompt {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise ValueError(f"the prompt {path} is not UTF-8 text (byte {e.start})") from None
    if not text.strip():
        raise ValueError(f"the prompt {path} is empty")
    return text


def choose_device(name):
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name} is not to be had: {str(e).splitlines()[0]}") from None


def choose_backend(name, device):
    """(how to run a step, a line that says what was chosen and why)."""
    where = f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    if name == "eager":
        return eager_step, f"eager on {where}, asked for"
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        if name == "compile":
            raise ValueError("torch.compile needs a C++ compiler on a CPU: install g++ or set CXX, "
                             "or pass --backend eager")
        return eager_step, f"eager on {where}: torch.compile finds no C++ compiler"
    how = "torch.compile" if choose_hot(name, device) is PLAIN else "Triton and torch.compile"
    return compiled_step, f"{how} on {where}, " + ("asked for" if name else "the default")


def choose_hot(name, device):
    """The module of the hot functions: on a GPU kernels.py, unless PyTorch alone was asked for."""
    if name == "triton" and device.type == "cpu":
        raise ValueError("--backend triton needs a GPU, and the device is the CPU: leave it out")
    if name in ("compile", "eager") or device.type == "cpu":
        return PLAIN
    import kernels
    return kernels


def limit_tokens(args, context, n_prompt):
    """Tokens to generate: what was asked for, or what the model's context leaves."""
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {args.max_new_tokens}: at least 1 is needed")
    if args.prefill_chunk is not None and args.prefill_chunk < 1:
        raise ValueError(f"--prefill-chunk is {args.prefill_chunk}: at least 1 is needed")
    if args.beyond_context or n_prompt + args.max_new_tokens <= context:
        return args.max_new_tokens
    if n_prompt >= context:
        raise ValueError(f"the prompt has {n_prompt:,} tokens, the model's context is {context:,}: "
                         "shorten it, or pass --beyond-context")
    return context - n_prompt


class Session:
    """A prompt being answered, with its clock."""

    def __init__(self, model, ids, chunk, make_cache):
        self.model, self.n_prompt = model, ids.shape[1]
        self.caches = [make_cache() for _ in model.layers]
        start = time.perf_counter()
        with progress(model, -(-ids.shape[1] // (chunk or ids.shape[1]))):
            self.logits = prefill(model, self.caches, ids, chunk)
        self.prefill_seconds = time.perf_counter() - start

    def answer(self, n_tokens, pick, step, show=None):
        """Tokens behind the prompt; self.all_logits (one a token) and self.seconds (one a step)."""
        tokens, self.all_logits, self.seconds = [], [], []

        def remember(logits):
            self.all_logits.append(logits)
            return pick(logits)

        clock = time.perf_counter()
        for token in decode(self.model, self.caches, self.logits, n_tokens, remember, step):
            tokens.append(token.item())
            self.seconds.append(time.perf_counter() - clock)
            if show:
                show(tokens)
            clock = time.perf_counter()
        return tokens

    def speed(self):
        """Tokens a second, without the first two (no step yet, and the one that compiles)."""
        steady = self.seconds[2:]
        return len(steady) / sum(steady) if steady else 0.0


@contextmanager
def progress(model, n_chunks):
    """A bar on standard error that moves with every layer of the prefill."""
    from tqdm import tqdm
    with tqdm(total=len(model.layers) * n_chunks, desc="prefill", unit="layer", leave=False) as bar:
        hooks = [layer.register_forward_hook(lambda *_: bar.update() and None)
                 for layer in model.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def stream(tokenizer):
    """A function that prints what each new token adds, once its characters are whole."""
    shown = ""

    def show(tokens):
        nonlocal shown
        text = tokenizer.decode(tokens)
        if text.startswith(shown) and not text.endswith("\ufffd"):
            print(text[len(shown):], end="", flush=True)
            shown = text
    return show


def compare(args, session, tokens, model, ids, step, capacity):
    """What dense attention says to the same prompt, and how far ours is from it, token by token."""
    dense = Session(model, ids, args.prefill_chunk, lambda: DenseCache(capacity))
    n_tokens = capacity - ids.shape[1]
    said = dense.answer(n_tokens, sampler(args.temperature, args.top_p, args.seed), step)
    speed = dense.speed()
    for cache in dense.caches:
        cache.n_tokens.fill_(ids.shape[1])           # rewind, then read our answer instead
    ours = iter(tokens)
    dense.answer(len(tokens), lambda _: ids.new_tensor([next(ours)]), step)
    p, q = (torch.cat(x.all_logits).double().log_softmax(-1) for x in (dense, session))     # (n, V)
    return {"dense_tokens": said, "dense_decode_tokens_per_s": speed,
            "agreement": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
            "kl": (p.exp() * (p - q)).sum(-1).mean().item()}


def answer(args):
    """Run the command line: stream the answer, then say what it took."""
    text, pick = read_prompt(args.prompt_file), sampler(args.temperature, args.top_p, args.seed)
    config = RetroConfig(**{f.name: getattr(args, f.name) for f in fields(RetroConfig)})
    device = choose_device(args.device)
    step, backend = choose_backend(args.backend, device)
    model, tokenizer = load(args.model, args.dtype and getattr(torch, args.dtype), device)
    prompt = text if args.raw else tokenizer.chat([{"role": "user", "content": text}])
    ids = torch.tensor([tokenizer.encode(prompt)], device=device)           # (1, T)
    n_tokens = limit_tokens(args, model.config.context, ids.shape[1])
    capacity = ids.shape[1] + n_tokens
    hot = choose_hot(args.backend, device)
    session = Session(model, ids, args.prefill_chunk, lambda: WaveIndex(config, capacity, hot=hot))
    tokens = session.answer(n_tokens, pick, step, stream(tokenizer))
    print(flush=True)
    facts = {"answer": tokenizer.decode(tokens), "backend": backend,
             "dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
             **measure(session, tokens)}
    if args.compare:
        facts |= compare(args, session, tokens, model, ids, step, capacity)
        facts["dense_answer"] = tokenizer.decode(facts.pop("dense_tokens"))
    print(card(facts, model.config.context), file=sys.stderr)
    if args.json:
        print(json.dumps(facts))


def measure(session, tokens):
    """What a run took, as numbers: the card and the JSON line are made of these."""
    wave, n_layers = session.caches[0], len(session.caches)
    B, H, _, D = wave.k_store.shape
    row = B * H * D * wave.k_store.element_size() * n_layers                # bytes of one key
    n_retrieve, n_ranked = (int(n[0]) for n in wave.config.budget(wave.n_indexed))
    return {
        "prompt_tokens": session.n_prompt, "generated_tokens": len(tokens),
        "indexed_tokens": int(wave.n_indexed[0]),
        "clusters": int((wave.index.sizes[0, 0] > 0).sum()),
        "retrieved_clusters": n_retrieve, "estimated_clusters": n_ranked - n_retrieve,
        "bytes_a_step": wave.bytes_read() * n_layers,
        "dense_bytes_a_step": 2 * row * (session.n_prompt + len(tokens)),
        "prefill_s": session.prefill_seconds, "decode_tokens_per_s": session.speed(),
        "first_step_s": session.seconds[1] if len(session.seconds) > 1 else 0.0}


def card(f, context):
    """The facts of a run in a few lines for a person."""
    steady = f["prompt_tokens"] + f["generated_tokens"] - f["indexed_tokens"]
    zones = (f"{steady:,} tokens exact; of {f['clusters']:,} clusters {f['retrieved_clusters']:,} "
             f"retrieved, {f['estimated_clusters']:,} estimated")
    if not f["indexed_tokens"]:
        zones = f"all {steady:,} tokens exact: the text is too short to index"
    share = f["bytes_a_step"] / f["dense_bytes_a_step"]
    lines = [
        f"context    {f['prompt_tokens']:,} tokens read, {f['generated_tokens']:,} generated "
        f"(the model's limit is {context:,})",
        f"zones      {zones}",
        f"reads      {f['bytes_a_step'] / 2**20:.1f} MiB of KV a step, dense "
        f"{f['dense_bytes_a_step'] / 2**20:.1f} MiB: {share:.1%}",
        f"backend    {f['backend']}; {f['dtype']}",
        f"speed      prefill {f['prefill_s']:.1f} s, first step {f['first_step_s']:.1f} s, "
        f"then {f['decode_tokens_per_s']:.1f} tokens/s"]
    if "kl" in f:
        ratio = f["decode_tokens_per_s"] / (f["dense_decode_tokens_per_s"] or math.inf)
        lines += [
            f"dense      {f['dense_answer']}",
            f"agreement  {f['agreement']:.1%} of the tokens, KL to dense {f['kl']:.4f} nats each",
            f"           dense decodes {f['dense_decode_tokens_per_s']:.1f} tokens/s: "
            f"ours is {ratio:.2f} times as fast"]
    return "\n".join(lines)


def main(argv=None):
    """Exit status: 0, or 2 behind one line that says what was given and what to do."""
    try:
        answer(parse_args(argv))
    except (ValueError, ImportError) as e:
        print(f"retroinfer: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
