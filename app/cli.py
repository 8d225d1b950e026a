"""The command line of retroinfer.py: read prompts, stream the answer, say what it took.

    python retroinfer.py --prompt-file x                                    # or -: standard input
    python retroinfer.py --prompt-file x --prompt-file y                    # a batch
    python retroinfer.py --prompt-file x --chat                             # a line is a turn
    python retroinfer.py --prompt-file x --question "Who?" --save-index x.safetensors
    python retroinfer.py --load-index x.safetensors --question "When?"      # x is not read again
    python -m app.plan Llama-3.1-8B --memory 24                             # what would fit

Answers go to standard output. The progress bar and the card go to standard error. --json ends
standard output with one line for machines. What a person can get wrong is one line and status 2.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import torch

from app.report import card, measure
from app.session import Session, Writer, stream, turns
from app.settings import listing, parse_settings
from generate import compiled_step, eager_step, has_compiler, hot_functions, sampler
from model import DEFAULT_NAME, DenseCache, load
from retroinfer import RetroConfig, WaveIndex


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def parse_args(argv):
    parser = Parser(prog="retroinfer.py", usage="%(prog)s --prompt-file FILE [flags]",
                    description="Answer a prompt, decoding through a wave index.")
    add_texts(parser.add_argument_group("texts").add_argument)
    add_model(parser.add_argument_group("model and method").add_argument)
    add_memory(parser.add_argument_group("memory").add_argument)
    add_output(parser.add_argument_group("output").add_argument)
    args = parser.parse_args(argv)
    if "help" in args.set:
        print(listing())
        raise SystemExit(0)
    args.set = parse_settings(args.set)
    check_flags(args)
    return args


def add_texts(add):
    add("--prompt-file", metavar="FILE", action="append", default=[],
        help="UTF-8 text, or - for standard input; again: a batch")
    add("--question", metavar="TEXT", help="asked behind the prompt or the loaded index")
    add("--chat", action="store_true", help="each line of standard input is a turn")
    add("--save-index", metavar="FILE", help="save the index of the prompt")
    add("--load-index", metavar="FILE", help="take the prompt from this file")
    add("--raw", action="store_true", help="use no chat template")


def add_model(add):
    add("--model", default=DEFAULT_NAME, metavar="PATH",
        help="directory or .gguf file (default %(default)s)")
    add("--set", metavar="NAME=VALUE", nargs="+", action="extend", default=[],
        help="numbers of the method; --set help lists them")
    add("--max-new-tokens", metavar="N", type=int, default=128, help="default %(default)s")
    add("--temperature", metavar="X", type=float, default=0.0, help="0: the best token")
    add("--top-p", metavar="X", type=float, default=1.0, help="draw from this share")
    add("--seed", metavar="N", type=int, default=0, help="of the draws")
    add("--dtype", choices=["float32", "bfloat16", "float16"])
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1; default: a GPU if any")
    add("--backend", choices=["triton", "native", "compile", "eager"])


def add_memory(add):
    add("--prefill-chunk", metavar="N", type=int, help="tokens read at a time")
    add("--capacity", metavar="N", type=int, help="tokens that the caches have room for")
    add("--offload", action="store_true", help="keep K and V in host memory")
    add("--cache-ratio", metavar="X", type=float, help="share of them on the device")
    add("--store", metavar="FILE", help="keep K and V in a new file")
    add("--beyond-context", action="store_true", help="allow more tokens than the model")


def add_output(add):
    add("--compare", action="store_true", help="run dense attention beside it")
    add("--json", action="store_true", help="end with one line of JSON")


def check_flags(args):
    """ValueError for what no model is needed to refuse."""
    for name in ("max_new_tokens", "prefill_chunk", "capacity"):
        if (given := getattr(args, name)) is not None and given < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {given}: at least 1 is needed")
    if not (args.prompt_file or args.load_index or args.chat):
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
    for name in ("cache_ratio", "store"):
        if getattr(args, name) is not None and not args.offload:
            raise ValueError(f"--{name.replace('_', '-')} goes with --offload")
    if args.offload:
        check_offload(args)
    if args.save_index:
        from app.snapshot import check_place
        check_place(args.save_index)


def check_offload(args):
    """ValueError if --offload cannot be had, or its share is none."""
    try:
        from buffer import check_ratio
    except ModuleNotFoundError:
        raise ValueError("--offload needs buffer.py, which is not here") from None
    if args.backend == "native":
        raise ValueError("--offload attends through its buffer: leave out --backend native")
    if args.cache_ratio is not None:
        check_ratio(args.cache_ratio)


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


def choose_backend(name, device, is_offloaded=False):
    """(how to run a step, its hot functions, a line that says what was chosen and why)."""
    where = f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    why = "asked for" if name else "the default"
    if device.type == "cpu" and name != "eager" and not has_compiler():
        if name:
            raise ValueError(f"--backend {name} needs a C++ compiler on a CPU: install g++ or set "
                             "CXX, or pass --backend eager")
        name, why = "eager", "there is no C++ compiler"
    if device.type == "cpu" and is_offloaded:
        name = name or "compile"
    try:
        hot = hot_functions(device, name)
    except ValueError as e:
        raise ValueError(f"--{e}") from None
    except ModuleNotFoundError as e:
        if name:
            raise ValueError(f"--backend {name} needs {e.name}, which is not here") from None
        hot, why = hot_functions(device, "compile"), f"{e.name} is not here"
    if name == "eager":
        return eager_step, hot, f"eager on {where}, {why}"
    hows = {"generate": "torch.compile", "native.step": "native/step.cpp and torch.compile",
            "kernels": "Triton and torch.compile"}
    return compiled_step, hot, f"{hows[hot.attend.__module__]} on {where}, {why}"


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
    step, hot, backend = choose_backend(args.backend, device, args.offload)
    model, tokenizer = load(args.model, args.dtype and getattr(torch, args.dtype), device)
    config = settle(args, model.config.qkv_bias)
    snapshot = None
    if args.load_index:
        from app.snapshot import Snapshot
        snapshot = Snapshot(args.load_index, model, tokenizer, config)
    writer = Writer(tokenizer, args.raw, device)
    prompts = write_prompts(args, texts, writer, snapshot, lines)
    longest = max(len(head) + len(tail) for head, tail in prompts)
    capacity, n_tokens = room_for(args, model.config.context, longest)
    make_cache = cache_maker(args, model, config, hot, capacity, len(prompts))
    session = Session(model, make_cache, pick, step, args.prefill_chunk)
    status = read(args, session, prompts, tokenizer, snapshot)
    logits = session.record() if args.compare else None
    said = say(args, session, n_tokens, tokenizer)
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


def say(args, session, n_tokens, tokenizer):
    """Answer and print: one prompt as its tokens come, a batch when all is said."""
    is_batch = len(session.n_read) > 1
    said = session.answer(n_tokens, (lambda _: None) if is_batch else stream(tokenizer))
    if is_batch:
        for path, tokens in zip(args.prompt_file, said, strict=True):
            print(f"== {path}\n{tokenizer.decode(tokens)}")
    print(flush=True)
    return said


def settle(args, has_biases):
    """The RetroConfig asked for.

    Keys that have biases get 16 bits: a channel that is large in every key would take all that 4
    bits can tell apart. Behind --offload fewer clusters are retrieved, with all their values.
    """
    usual = {"bits": 16} if has_biases else {}
    if args.offload:
        from buffer import WHOLE
        usual |= WHOLE
    return RetroConfig(**usual | args.set)


def cache_maker(args, model, config, hot, capacity, batch):
    """A function that makes the cache of a layer."""
    how = {}
    if args.offload:
        from buffer import offload
        ratio = {} if args.cache_ratio is None else {"cache_ratio": args.cache_ratio}
        how["make_store"] = offload(model, capacity, batch, args.store, **ratio)
    return lambda: WaveIndex(config, capacity, batch, hot, **how)


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
            from app.snapshot import save
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
