"""The command line of retroinfer.py: read prompts, stream the answer, say what it took.

    python retroinfer.py --prompt-file x                                    # or -: standard input
    python retroinfer.py --prompt-file x --prompt-file y                    # a batch
    python retroinfer.py --prompt-file x --chat                             # a line is a turn
    python retroinfer.py --prompt-file x --question "Who?" --save-index x.safetensors
    python retroinfer.py --load-index x.safetensors --question "When?"      # x is not read again
    python retroinfer.py --plan Llama-3.1-8B --memory 24                    # runs nothing

Answers go to standard output, the progress bar and the card to standard error; --json ends
standard output with one line for machines. What a person can get wrong is one line and status 2.
"""
import argparse
import functools
import inspect
import json
import math
import os
import re
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import torch

from app.plan import show
from app.report import card, measure
from app.session import Session, Writer, stream, turns
from app.snapshot import Snapshot, check_place, save
from buffer import RATIO, WHOLE, check_ratio, offload
from evaluation.bounds import CheckedIndex, check_shares
from generate import compiled_step, eager_step, sampler
from model import DEFAULT_NAME, DenseCache, load
from retroinfer import PLAIN, RetroConfig, WaveIndex, hot_functions


def parse_args(argv):
    parser = Parser(description="Answer a prompt, decoding through a wave index.")
    add = parser.add_argument
    add("--prompt-file", action="append", default=[], help="the prompt, UTF-8 text; - reads "
        "standard input; given again, the prompts are answered as a batch")
    add("--question", help="asked behind the prompt or the loaded index")
    add("--chat", action="store_true", help="go on: each line of standard input is a turn")
    add("--save-index", metavar="FILE", help="save the index of the prompt (without the question)")
    add("--load-index", metavar="FILE", help="take the prompt, or its beginning, from this file")
    add("--model", default=DEFAULT_NAME, help="directory, .gguf file, or the name of the default: "
        f"{DEFAULT_NAME}, which make setup installs")
    add("--max-new-tokens", type=int, default=128, help="tokens to generate at most")
    add("--temperature", type=float, default=0.0, help="0 takes the best token every time")
    add("--top-p", type=float, default=1.0, help="sample from the tokens that hold this share")
    add("--seed", type=int, default=0, help="of the sampling")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32 on a CPU, "
        "bfloat16 on a GPU")
    add("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    add("--backend", choices=["triton", "native", "compile", "eager"], help="default: on a GPU "
        "triton, which is compile with the kernels of kernels.py, else native, with native/step.cpp")
    add("--prefill-chunk", type=int, help="read the prompt so many tokens at a time")
    add("--capacity", type=int, help="tokens the caches have room for; default: prompt and answer, "
        "with --chat the model's context")
    add("--offload", action="store_true", help="keep K and V on the host, and on the device what "
        "steps ask for again")
    add("--cache-ratio", type=float, help="with --offload: the share of K and V that the device "
        f"has room for (default {RATIO})")
    add("--store", metavar="FILE", help="with --offload: keep K and V in this new file, for texts "
        "beyond the memory; it is gone in the end")
    add("--raw", action="store_true", help="take the prompt as it is, without chat template")
    add("--beyond-context", action="store_true", help="allow more tokens than the model's context")
    add("--compare", action="store_true", help="run dense attention beside it")
    add("--check", action="store_true", help="say what is certain of the steps: attention mass "
        "whose keys were read, distance from dense attention's output")
    add("--max-err", type=float, metavar="SHARE", help="retrieve more clusters, head by head, "
        "until at most this share of the attention mass may lie in tokens not read; and --check")
    add("--max-retrieve", type=float, default=1.0, metavar="SHARE", help="of the clusters, that "
        "--max-err may retrieve: a step has room for as many (default 1.0)")
    add("--plan", nargs="?", const="", metavar="SHAPE", help="run nothing: print the bytes by part "
        "of --model, or of a shape such as Llama-3.1-8B, for --capacity tokens")
    add("--batch", type=int, default=1, help="sequences, with --plan")
    add("--memory", type=float, help="GiB the device has, with --plan; default: this machine's")
    add("--json", action="store_true", help="end with one line of JSON on standard output")
    add_config(parser, {"bits": "for keys with biases 16"}
               | {name: f"with --offload {value}" for name, value in WHOLE.items()})
    args = parser.parse_args(argv)
    args.check |= args.max_err is not None
    check_flags(args)
    return args


def add_config(parser, notes):
    """A flag for every number of RetroConfig, with the notes to some of them."""
    source = inspect.getsource(RetroConfig)
    for field in fields(RetroConfig):
        text = re.search(rf"{field.name}: .*# +(.*)", source)[1]
        kind = ({"action": argparse.BooleanOptionalAction} if field.type is bool
                else {"type": field.type})
        words = [f"{text} (default {field.default})", notes.get(field.name)]
        parser.add_argument(f"--{field.name.replace('_', '-')}", **kind,
                            help="; ".join(filter(None, words)))


def given_config(args):
    """The numbers of RetroConfig that were given, by name."""
    given = {field.name: getattr(args, field.name) for field in fields(RetroConfig)}
    return {name: value for name, value in given.items() if value is not None}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def check_flags(args):
    """ValueError for what no model is needed to refuse."""
    for name in ("max_new_tokens", "prefill_chunk", "capacity", "batch"):
        if (given := getattr(args, name)) is not None and given < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {given}: at least 1 is needed")
    if args.memory is not None and not args.memory > 0:
        raise ValueError(f"--memory is {args.memory}: give GiB above 0")
    if not (args.prompt_file or args.load_index or args.chat or args.plan is not None):
        raise ValueError("nothing to answer: give --prompt-file, --load-index or --chat")
    for name in ("chat", "compare", "save_index", "load_index"):
        if getattr(args, name) and len(args.prompt_file) > 1:
            raise ValueError(f"--{name.replace('_', '-')} takes one --prompt-file, "
                             f"{len(args.prompt_file)} are given")
    if args.prompt_file.count("-") > (0 if args.chat else 1):
        raise ValueError("--prompt-file - reads all of standard input: it goes with one prompt, "
                         "and without --chat")
    if args.compare and args.chat:
        raise ValueError("--compare takes one answer: leave out --chat")
    check_shares(args.max_err, args.max_retrieve)
    if args.check and args.backend not in (None, "compile", "eager"):
        raise ValueError(f"--check and --max-err need --backend compile or eager, not "
                         f"{args.backend}")
    if args.check and args.offload:
        raise ValueError("--check and --max-err need K and V on the device: leave out --offload")
    for name in ("cache_ratio", "store"):
        if getattr(args, name) is not None and not args.offload:
            raise ValueError(f"--{name.replace('_', '-')} goes with --offload")
    if args.offload and args.backend == "native":
        raise ValueError("--offload attends through its buffer: leave out --backend native")
    if args.cache_ratio is not None:
        check_ratio(args.cache_ratio)
    if args.save_index:
        check_place(args.save_index)


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


def choose_backend(name, device, is_plain=False):
    """(how to run a step, its hot functions, a line that says what was chosen and why)."""
    where = f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    if name == "eager":
        return eager_step, PLAIN, f"eager on {where}, asked for"
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        if name:
            raise ValueError(f"--backend {name} needs a C++ compiler on a CPU: install g++ or set "
                             "CXX, or pass --backend eager")
        return eager_step, PLAIN, f"eager on {where}: there is no C++ compiler"
    hot = PLAIN if is_plain else choose_hot(name, device)
    hows = {"retroinfer": "torch.compile", "native.step": "native/step.cpp and torch.compile",
            "kernels": "Triton and torch.compile"}
    return compiled_step, hot, (f"{hows[hot.attend.__module__]} on {where}, "
                                + ("asked for" if name else "the default"))


def choose_hot(name, device):
    """The hot functions where a compiler is: Triton's, step.cpp's, or PyTorch's if asked for."""
    if (name, device.type == "cpu") in (("triton", True), ("native", False)):
        raise ValueError(f"--backend {name} needs a {'GPU' if name == 'triton' else 'CPU'}, the "
                         f"device is {device}: leave it out")
    if name == "compile":
        return PLAIN
    if device.type != "cpu":
        return hot_functions(device)
    from native import step as native
    return PLAIN._replace(attend=native.attend)


def room_for(args, context, n_prompt):
    """(capacity, tokens to generate) behind the longest prompt."""
    limit = math.inf if args.beyond_context else context
    if n_prompt >= limit:
        raise ValueError(f"the prompt has {n_prompt:,} tokens, the model's context is {context:,}: "
                         "shorten it, or pass --beyond-context")
    wanted = n_prompt + args.max_new_tokens
    capacity = args.capacity or min(max(wanted, context) if args.chat else wanted, limit)
    if not n_prompt < capacity <= limit:
        raise ValueError(f"--capacity is {capacity:,}: the prompt has {n_prompt:,} tokens, the "
                         f"model's context is {context:,} (--beyond-context allows more)")
    return capacity, min(args.max_new_tokens, capacity - n_prompt)


# ---------------------------------------------------------------- reading and answering

def answer(args):
    """Run the command line: read, answer, say what it took. The exit status."""
    texts, lines = [read_prompt(path) for path in args.prompt_file], turns()
    pick = sampler(args.temperature, args.top_p, args.seed)
    settle(args, False)                                     # refused before a model is loaded
    device = choose_device(args.device)
    if args.plan is not None:
        return show(args, functools.partial(settle, args), device)
    is_plain = args.check or (args.offload and device.type == "cpu")    # then those attend
    step, hot, backend = choose_backend(args.backend, device, is_plain)
    model, tokenizer = load(args.model, args.dtype and getattr(torch, args.dtype), device)
    config = settle(args, model.config.qkv_bias)
    snapshot = Snapshot(args.load_index, model, tokenizer, config) if args.load_index else None
    writer = Writer(tokenizer, args.raw, device)
    prompts = write_prompts(args, texts, writer, snapshot, lines)
    longest = max(len(head) + len(tail) for head, tail in prompts)
    capacity, n_tokens = room_for(args, model.config.context, longest)
    make_cache = cache_maker(args, model, config, hot, capacity, len(prompts))
    session = Session(model, make_cache, pick, step, args.prefill_chunk)
    status = read(args, session, prompts, tokenizer, snapshot)
    logits = session.record() if args.compare else None
    said = session.answer(n_tokens, stream(tokenizer) if len(prompts) == 1 else lambda _: None)
    if len(prompts) > 1:
        for path, tokens in zip(args.prompt_file, said, strict=True):
            print(f"== {path}\n{tokenizer.decode(tokens)}")
    print(flush=True)
    if args.chat:
        said += chat(session, writer, said[0], lines, args.max_new_tokens)
    facts = {"answers": [tokenizer.decode(tokens) for tokens in said], "backend": backend,
             "dtype": str(model.lm_head.weight.dtype).removeprefix("torch."), **measure(session)}
    if args.compare:
        facts |= compare(session, torch.cat(prompts[0]), said[0], torch.cat(logits), tokenizer)
    print(card(facts, model.config.context), file=sys.stderr)
    if args.json:
        print(json.dumps(facts))
    return status


def settle(args, has_biases):
    """The RetroConfig asked for; else 16 bits for keys that have biases, and fewer clusters and all
    their values where blocks come from the host.

    A channel that is large in every key would take all that 4 bits can tell apart.
    """
    usual = ({"bits": 16} if has_biases else {}) | (WHOLE if args.offload else {})
    return RetroConfig(**usual | given_config(args))


def cache_maker(args, model, config, hot, capacity, batch):
    """A function that makes the cache of a layer."""
    if args.check:
        return lambda: CheckedIndex(config, capacity, batch, args.max_err, args.max_retrieve)
    ratio = {} if args.cache_ratio is None else {"cache_ratio": args.cache_ratio}
    buffer = offload(model, capacity, batch, args.store, **ratio) if args.offload else None
    return lambda: WaveIndex(config, capacity, batch, hot, buffer)


def write_prompts(args, texts, writer, snapshot, lines):
    """Token ids (head, tail) of each prompt; an index is saved and loaded between the two."""
    if texts:
        return [writer.prompt(text, args.question) for text in texts]
    asked = args.question or (next(lines, None) if args.chat else None)
    if snapshot:
        return [(snapshot.ids.to(writer.device), writer.prompt("", asked)[1])]
    if not asked:
        raise ValueError("there is nothing to answer on standard input")
    return [writer.prompt(asked, None)]


def read(args, session, prompts, tokenizer, snapshot):
    """Prefill what no snapshot knows, and save the index where the heads end. The exit status.

    What cannot be saved does not cost the answer: it is said, and the status is 2 in the end.
    """
    heads, tails = zip(*prompts, strict=True)
    status, parts = 0, [torch.cat(p) for p in prompts]
    if snapshot:
        parts = [torch.cat([snapshot.unread(heads[0]), tails[0]])]
        snapshot.restore(session.caches)
    if not all(map(len, parts)):
        raise ValueError(f"{args.load_index} holds all of the prompt: add a --question")
    if args.save_index:
        new = parts[0][:len(parts[0]) - len(tails[0])]
        if len(new):
            session.read([new])
        try:
            save(args.save_index, session.model, tokenizer, session.caches, heads[0])
        except ValueError as e:
            print(f"retroinfer: {e}", file=sys.stderr)
            status = 2
        parts = [tails[0]] if len(tails[0]) else []
    if parts:
        session.read(parts)
    return status


def chat(session, writer, said, lines, n_tokens):
    """Answer the turns that follow an answer of tokens `said`: a list of tokens of each."""
    answers = []
    for line in lines:
        turn = writer.turn(line, said)
        room = session.room() - len(turn)
        if room < 1:
            print(f"retroinfer: this turn has {len(turn):,} tokens, {session.room():,} fit: make "
                  "it shorter, or begin anew with a larger --capacity", file=sys.stderr)
            continue
        session.read([turn])
        said, = session.answer(min(n_tokens, room), stream(writer.tokenizer))
        print(flush=True)
        answers.append(said)
    return answers


def compare(session, ids, said, logits, tokenizer):
    """What dense attention says behind ids (T,), and how far our logits (n, V) are from its.

    The distance is that of two models that read the same words: ours.
    """
    capacity = session.caches[0].capacity
    dense = Session(session.model, lambda: DenseCache(capacity), session.pick, session.step,
                    session.chunk)
    dense.read([ids])
    answer, = dense.answer(capacity - len(ids))
    speed = dense.speed()
    for cache in dense.caches:
        cache.n_tokens.fill_(len(ids))
    ours = iter(said)
    dense.pick = lambda _: ids.new_tensor([next(ours)])
    theirs = dense.record()
    dense.answer(len(said))
    p, q = (x.double().log_softmax(-1) for x in (torch.cat(theirs), logits))    # (n, V)
    return {"dense_answer": tokenizer.decode(answer), "dense_decode_tokens_per_s": speed,
            "agreement": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
            "kl": (p.exp() * (p - q)).sum(-1).mean().item()}


def main(argv=None):
    """Exit status: 0, or 2 behind one line that says what was given and what to do."""
    try:
        return answer(parse_args(argv))
    except (ValueError, ImportError) as e:
        print(f"retroinfer: {e}", file=sys.stderr)
        return 2
    except (torch.AcceleratorError, torch.OutOfMemoryError) as e:
        print(f"retroinfer: the device gave up: {str(e).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
