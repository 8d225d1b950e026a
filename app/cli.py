"""The command line of retroinfer.py: read prompts, stream the answer, say what it took.

    python retroinfer.py --prompt-file x                            # -: standard input
    python retroinfer.py --prompt-file x --prompt-file y            # a batch
    python retroinfer.py --prompt-file x --chat                     # each line is a question
    python retroinfer.py --prompt-file x --set retrieve=0.04 bits=16
    python retroinfer.py --prompt-file x --question "Who?" --save-index x.safetensors
    python retroinfer.py --load-index x.safetensors --question "When?"      # x is not read again
    python retroinfer.py --load-index x.safetensors --questions lines.txt   # one batch, one index
    torchrun --nproc-per-node 2 retroinfer.py --prompt-file x       # parallel.py says how

Answers go to standard output. The progress bar and the card go to standard error. --json adds one
line for machines at the end of standard output. An error that a person can cause is one line, with
exit status 2. In a chat Ctrl-C ends an answer, and a second one the chat.
"""
import functools
import json
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

import parallel
from app.choose import (
    check_backend,
    check_lengths,
    check_memory,
    choose_capacity,
    choose_device,
    choose_step,
)
from app.command import Parser, read_text, run_command
from app.method import METHODS, classes
from app.relay import Spec
from app.report import card, measure
from app.session import Session, Stream, Writer, turns
from app.settings import MOST, add_set, take_settings
from generate import BACKENDS, CHUNK, sampler
from model import DEFAULT_NAME, DenseCache, RingCache, fast_dtype, make_caches
from retroinfer import InputError, RetroConfig, WaveIndex


def parse_args(argv):
    parser = Parser(prog="retroinfer.py", usage="%(prog)s --prompt-file FILE [flags]",
                    description="Answer a prompt with attention that reads a share of the cache.")
    add_texts(parser.add_argument_group("texts").add_argument)
    add_answer(parser.add_argument_group("answer").add_argument)
    add_model(parser.add_argument_group("model and method").add_argument)
    add_memory(parser.add_argument_group("memory").add_argument)
    args = parser.parse_args(argv)
    take_settings(args, classes(args.method)[0])
    for name in ("save_index", "load_index", "store"):
        setattr(args, name, own_file(getattr(args, name)))
    check_flags(args)
    return args


def own_file(path):
    """The file of this rank: the first of two has log-1of2.safetensors for log.safetensors."""
    if parallel.SIZE == 1 or not path:
        return path
    path = Path(path)
    name = f"{path.stem}-{parallel.RANK + 1}of{parallel.SIZE}{path.suffix}"
    return str(path.with_name(name))


def add_texts(add):
    add("--prompt-file", metavar="FILE", action="append", default=[],
        help="UTF-8 text, - is standard input; repeat for a batch")
    add("--question", metavar="TEXT", help="asked after the prompt or the loaded index")
    add("--chat", action="store_true", help="each line of standard input is a question")
    add("--raw", action="store_true", help="do not use the model's chat template")
    add("--save-index", metavar="FILE", help="write the index of the prompt to FILE")
    add("--load-index", metavar="FILE", help="use this index instead of reading its text")
    add("--questions", metavar="FILE", help="ask each line about the loaded index, as one batch")


def add_answer(add):
    add("--max-new-tokens", metavar="N", type=int, default=128, help="default %(default)s")
    add("--temperature", metavar="X", type=float, default=0.0,
        help="0 takes the likeliest token (default %(default)s)")
    add("--top-p", metavar="X", type=float, default=1.0,
        help="draw from the likeliest tokens of this probability")
    add("--seed", metavar="N", type=int, default=0, help="seed of the random draws")
    add("--check", action="store_true", help="say how far each layer may be from dense attention")
    add("--max-err", metavar="X", type=float,
        help="mend outputs that may be farther off than this share")
    add("--delta", metavar="X", type=float, help="how often --max-err may fail (default 0.05)")
    add("--compare", action="store_true", help="answer with dense attention too")
    add("--json", action="store_true", help="end with one line of JSON")


def add_model(add):
    add("--model", metavar="PATH", default=DEFAULT_NAME,
        help="folder, .gguf or name (default %(default)s)")
    add("--method", metavar="NAME", choices=METHODS, default="wave",
        help="%(choices)s (default %(default)s)")
    add("--codebooks", metavar="FILE", help="of --method antkv; default: from the prompt itself")
    add_set(add)
    add("--dtype", metavar="NAME", choices=["float32", "bfloat16", "float16"],
        help="%(choices)s (default: what the processor multiplies best)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU if any)")
    add("--backend", metavar="NAME", choices=BACKENDS,
        help="%(choices)s (default: the fastest)")


def add_memory(add):
    add("--capacity", metavar="N", type=int, help="most tokens that the caches hold")
    add("--beyond-context", action="store_true", help="allow more than the model's context")
    add("--prefill-chunk", metavar="N", type=int, default=CHUNK,
        help="read the prompt N tokens at a time (default %(default)s)")
    add("--offload", action="store_true",
        help="keep K and V in host memory; the next two go with it")
    add("--cache-ratio", metavar="X", type=float, help="share of K and V cached on the device")
    add("--store", metavar="FILE", help="keep K and V in a new file")


def check_flags(args):
    """InputError for what can be refused before a model is loaded."""
    for name, given in vars(args).items():
        if given == "":
            raise InputError(f"{flag(name)} is empty: give a value, or leave it out")
    check_counts(args, "max_new_tokens", "prefill_chunk", "capacity")
    if not abs(args.seed) < MOST:
        raise InputError(f"--seed is {args.seed}: give a number below {MOST:,}")
    if 0 < args.top_p < 1 and not args.temperature:
        raise InputError("--top-p goes with --temperature")
    n_prompts = len(args.prompt_file)
    if args.questions:
        check_questions(args)
    if not (n_prompts or args.load_index or args.chat):
        raise InputError("nothing to answer: give --prompt-file, --load-index or --chat")
    for name in ("chat", "compare", "save_index", "load_index"):
        if getattr(args, name) and n_prompts > 1:
            raise InputError(f"{flag(name)} takes one --prompt-file, {n_prompts} are given")
    if args.question:                           # an argument may hold bytes that are no letters
        from tokenizer import whole
        args.question = whole(args.question)
    if args.prompt_file.count("-") > (0 if args.chat else 1):
        raise InputError("--prompt-file - reads all of standard input: it goes with one prompt, "
                         "and without --chat")
    if args.compare and args.chat:
        raise InputError("--compare takes one answer: leave out --chat")
    check_method(args)
    check_bars(args)
    for name in ("cache_ratio", "store"):
        if getattr(args, name) is not None and not args.offload:
            raise InputError(f"{flag(name)} goes with --offload")
    if args.offload:
        check_offload(args)
    if args.save_index:
        from app.snapshot import check_place
        check_place(args.save_index)


def check_questions(args):
    """InputError if --questions is without an index, or with what asks or reads otherwise."""
    if not args.load_index:
        raise InputError("--questions asks a saved index: give --load-index, which --save-index "
                         "writes")
    for name in ("prompt_file", "question", "chat", "compare", "save_index", "offload"):
        if getattr(args, name):
            raise InputError(f"--questions takes the loaded index alone: leave out {flag(name)}")
    from app.questions import read_questions
    args.questions = read_questions(args.questions)


def check_method(args):
    """InputError if a flag belongs to another method than the one chosen."""
    for name, method in {"codebooks": "antkv", "offload": "wave", "save_index": "wave",
                         "load_index": "wave", "check": "wave", "max_err": "wave"}.items():
        if getattr(args, name) and args.method != method:
            raise InputError(f"{flag(name)} goes with --method {method}")
    if args.codebooks and parallel.SIZE > 1:
        raise InputError("--codebooks are those of one process: leave them out with torchrun, and "
                         "each rank makes its own from the prompt")


def check_windows(args, config):
    """InputError for a flag of an index, if no layer of the model has one."""
    for name in ("offload", "save_index", "load_index", "check", "max_err"):
        if getattr(args, name) and not config.n_wide:
            raise InputError(f"{flag(name)}: every layer of this model sees the latest "
                             f"{config.windows[0]:,} tokens only, so there is no index")
    if args.questions and config.windows:
        raise InputError("--questions: layers of this model see a window only, and windows cannot "
                         "be shared: ask one question at a time")


def check_bars(args):
    """InputError for what --check and --max-err cannot do."""
    if args.delta is not None and args.max_err is None:
        raise InputError("--delta goes with --max-err")
    for name, low in {"max_err": 0, "delta": 1e-9}.items():
        if (given := getattr(args, name)) is not None and not low < given < 1:
            raise InputError(f"{flag(name)} is {given}: give a number between {low:g} and 1")
    asked = "--max-err" if args.max_err else args.check and "--check"
    if asked and args.offload:
        raise InputError(f"{asked} draws tokens from the device: leave out --offload")
    if asked and parallel.SIZE > 1:
        raise InputError(f"{asked} sees the heads of one process: leave out torchrun")


def check_counts(args, *names):
    """InputError if a flag that counts something is below 1, or more than a machine can hold."""
    for name in names:
        given = getattr(args, name)
        if given is not None and not 1 <= given < MOST:
            raise InputError(f"{flag(name)} is {given}: at least 1 is needed, and less than "
                             f"{MOST:,}")


def flag(name):
    """How a person writes the flag of this name."""
    return f"--{name.replace('_', '-')}"


def check_offload(args):
    """InputError if buffer.py is not here, or a flag does not go with --offload."""
    try:
        from buffer import check_ratio
    except ModuleNotFoundError:
        raise InputError("--offload needs buffer.py, which is not here") from None
    if args.backend == "native":
        raise InputError("--offload attends through its buffer: leave out --backend native")
    if args.cache_ratio is not None:
        check_ratio(args.cache_ratio)


def read_prompt(path):
    text = read_text(path, "the prompt")
    if not text.strip():
        raise InputError(f"the prompt {path} is empty")
    return text


def loading(tensors, n):
    """The n tensors of a model, with a bar on standard error if they take their time."""
    from tqdm import tqdm
    return tqdm(tensors, desc="load", total=n, unit="tensor", leave=False, delay=1)


# ---------------------------------------------------------------- reading and answering

def answer(args):
    """Read the prompts, answer them, print the card. The exit status."""
    texts = parallel.from_first(lambda: [read_prompt(path) for path in args.prompt_file])
    next_line = functools.partial(parallel.from_first, functools.partial(next, turns(), None))
    lines = iter(next_line, None)
    config = make_config(args)                  # wrong numbers are refused before a model is loaded
    device = choose_device(args.device)
    check_backend(args, device)
    dtype = getattr(torch, args.dtype) if args.dtype else fast_dtype(device)
    model, tokenizer = parallel.load_part(args.model, dtype, device, loading)
    check_lengths(args, texts, tokenizer, model.config.context)
    snapshot = open_index(args, model, tokenizer, config)
    writer = Writer(tokenizer, args.raw, device, model.config.vocab_size)
    asked = what_is_asked(args, texts, snapshot, lines)
    prompts = [writer.prompt(*pair) for pair in asked]
    capacity, n_tokens = choose_capacity(args, model.config.context, max(map(len, prompts)))
    capacity = shareable(args, config, capacity)
    spec = Spec(model.config, model.lm_head.weight.dtype, config, capacity, len(prompts))
    check_memory(args, model, spec, device)
    step, hot, words = choose_step(args, spec, device)
    make = cache_maker(args, model, tokenizer, spec, hot)
    session = Session(model, make, picker(args), step, args.prefill_chunk)
    status = read(args, session, prompts, writer, asked[0], snapshot)
    logits = session.record() if args.compare else None
    said = say(args, session, n_tokens, tokenizer)
    if args.chat:
        said += chat(session, writer, said[0], lines, args.max_new_tokens)
    ends = model.config.eos_ids
    facts = {"answers": [tokenizer.decode(tokens) for tokens in said],
             "ends": ["stop" if tokens[-1] in ends else "length" for tokens in said],
             "backend": words(), "dtype": str(spec.dtype).removeprefix("torch."),
             **measure(session)}
    if args.compare:
        session.pick = picker(args)                         # the same dice again
        facts |= compare(session, prompts[0], said[0], torch.cat(logits), n_tokens, tokenizer)
    facts |= of_all_ranks(facts)
    print(card(facts, model.config.context), file=sys.stderr)
    if args.json:
        print(json.dumps(facts))
    return status


def picker(args):
    """What picks each token, with dice that begin anew."""
    return parallel.pick_together(sampler(args.temperature, args.top_p, args.seed))


def shareable(args, config, capacity):
    """The capacity, or a little more, so that --questions can share an index of it."""
    if not args.questions:
        return capacity
    from app.questions import whole_pages
    return whole_pages(config, capacity)


def open_index(args, model, tokenizer, config):
    """The Snapshot that --load-index names, if any. InputError if it is of another text than that
    of another rank."""
    if not args.load_index:
        return None
    from app.snapshot import Snapshot
    snapshot = Snapshot(args.load_index, model, tokenizer, config)
    if len(set(parallel.gather(snapshot.text))) > 1:
        raise InputError("the ranks have indexes of different texts: make them anew with "
                         "--save-index")
    return snapshot


def of_all_ranks(facts):
    """The facts that are bytes, added up over the ranks, each of which has some of the heads."""
    parts = parallel.gather(facts)
    return {name: sum(part[name] for part in parts) for name in facts if "bytes" in name}


def say(args, session, n_tokens, tokenizer):
    """The tokens of each answer. One answer is printed as it is generated, a batch at its end."""
    if len(session.n_read) == 1:
        return [say_one(session, n_tokens, tokenizer, args.chat)]
    said = session.answer(n_tokens)
    for name, tokens in zip(args.questions or args.prompt_file, said, strict=True):
        print(f"== {name}\n{tokenizer.decode(tokens)}")
    print(flush=True)
    return said


def say_one(session, n_tokens, tokenizer, is_chat):
    """The tokens of an answer, printed as it is generated. In a chat Ctrl-C ends it, but torchrun
    ends all ranks by it."""
    stream, interrupt = Stream(tokenizer), Interrupt()
    with interrupt if is_chat and parallel.SIZE == 1 else nullcontext():
        said, = session.answer(n_tokens, lambda tokens: stream(tokens) or interrupt.came)
    stream.end(said)
    return said


class Interrupt:
    """While it is entered, a first Ctrl-C is noted, and a second one ends the program."""

    def __init__(self):
        self.came = False

    def __enter__(self):
        self.before = signal.signal(signal.SIGINT, self.hear)

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)

    def hear(self, *_):
        if self.came:
            raise KeyboardInterrupt
        self.came = True


def make_config(args):
    """The numbers of a run's method. --offload has its own: see buffer.OFFLOADED."""
    if not args.offload:
        return classes(args.method)[0](**args.set)
    from buffer import OFFLOADED
    return RetroConfig(**OFFLOADED | args.set)


def read_codebooks(args, model, tokenizer, config):
    """For each layer the arguments that --codebooks adds to its cache. Without it, none."""
    if not args.codebooks:
        return [()] * len(model.layers)
    from antkv import load_codebooks
    from app.snapshot import origin
    weight = model.lm_head.weight
    books = load_codebooks(args.codebooks, origin(model, tokenizer), config.bits, weight.device)
    return [(book,) for book in books]


def cache_maker(args, model, tokenizer, spec, hot):
    """A function that makes the cache of the next layer."""
    check_windows(args, spec.model)
    if args.questions:
        spec = replace(spec, batch=1)                       # read() makes the others of it
    make = method_maker(args, model, tokenizer, spec, hot)
    return iter(make_caches(spec.model, make, spec.capacity, spec.batch)).__next__


def method_maker(args, model, tokenizer, spec, hot):
    """A function that makes the cache of the next layer that sees all tokens."""
    config, capacity, batch = spec.config, spec.capacity, spec.batch
    if args.method != "wave":
        cache = classes(args.method)[1]
        books = iter(read_codebooks(args, model, tokenizer, config))
        counts = parallel.gather(model.config.num_key_value_heads)

        def make():
            made = cache(config, capacity, batch, *next(books))
            made.heads = sum(counts[:parallel.RANK]), sum(counts)
            return made
        return make
    if args.check or args.max_err:
        from error_bars import maker
        return maker(args.max_err, args.delta, args.seed, (config, capacity, batch, hot))
    if not args.offload:
        return lambda: WaveIndex(config, capacity, batch, hot)
    from buffer import offload
    ratio = {} if args.cache_ratio is None else {"cache_ratio": args.cache_ratio}
    make_store = offload(model, capacity, batch, args.store, **ratio)
    return lambda: WaveIndex(config, capacity, batch, hot, make_store)


def what_is_asked(args, texts, snapshot, lines):
    """(a text, a question about it or None) for each prompt. A saved index has its text."""
    if texts:
        return [(text, args.question) for text in texts]
    if args.questions:
        return [(snapshot.text, question) for question in args.questions]
    question = args.question or (next(lines, None) if args.chat else None)
    if snapshot:
        return [(snapshot.text, question)]
    if not question:
        raise InputError("there is nothing to answer on standard input")
    return [(question, None)]


def read(args, session, prompts, writer, asked, snapshot):
    """Prefill the prompts, without what the snapshot holds, and save the index of the one text that
    is asked about. The exit status."""
    status = n_read = 0
    if snapshot:
        n_read = min(len(ids) - len(snapshot.unread(ids)) for ids in prompts)
        snapshot.restore(session.caches)
        session.spread(len(prompts))
    if n_read == len(prompts[0]):
        raise InputError(f"{args.load_index} holds all of the prompt: add a --question")
    if args.save_index:
        n_head = len(writer.head(*asked))
        if n_read < n_head:
            session.read([prompts[0][n_read:n_head]])
        n_read = max(n_read, n_head)
        status = save_index(args, session, writer.tokenizer, prompts[0][:n_read], asked[0])
    if n_read < len(prompts[0]):
        session.read([ids[n_read:] for ids in prompts])
    return status


def save_index(args, session, tokenizer, ids, text):
    """Save the index of a text's token ids (T,). If it cannot be saved, say so: the answer still
    comes."""
    from app.snapshot import save
    problem = None
    try:
        save(args.save_index, session.model, tokenizer, session.caches, ids, text)
    except InputError as e:
        problem = e
    problems = list(filter(None, parallel.gather(problem)))
    for one in problems[:1]:
        print(f"retroinfer: {one}", file=sys.stderr)
    return 2 if problems else 0


def chat(session, writer, said, lines, n_tokens):
    """Answer each line after the first answer `said`. A list of the answers' tokens."""
    answers = []
    for line in lines:
        turn = writer.turn(line, said)
        room = session.room() - len(turn)
        if not len(turn):
            print("retroinfer: the tokenizer knows no letter of this turn", file=sys.stderr)
            continue
        if room < 1:
            print(f"retroinfer: this turn has {len(turn):,} tokens, {session.room():,} fit: make "
                  "it shorter, or start again with a larger --capacity", file=sys.stderr)
            continue
        session.read([turn])
        said = say_one(session, min(n_tokens, room), writer.tokenizer, True)
        answers.append(said)
    return answers


def compare(session, ids, said, logits, n_tokens, tokenizer):
    """What dense attention answers to ids (T,), and how far our logits (n, V) are from its logits.

    For the distance dense attention reads our answer, so that both models saw the same words.
    """
    capacity = len(ids) + n_tokens
    caches = make_caches(session.model.config, lambda: DenseCache(capacity), capacity)
    dense = Session(session.model, iter(caches).__next__, session.pick, session.step,
                    session.chunk)
    dense.read([ids])
    rings = [(cache, cache.state(0)) for cache in caches if isinstance(cache, RingCache)]
    answer, = dense.answer(n_tokens)
    speed = dense.speed()
    for cache in dense.caches:
        cache.n_tokens.fill_(len(ids))          # forget its own answer
    for cache, state in rings:
        cache.restore(state, len(ids))
    ours = iter(said)
    dense.pick = lambda _: ids.new_tensor([next(ours)])
    theirs = dense.record()
    dense.answer(len(said))
    p, q = (x.cpu().double().log_softmax(-1) for x in (torch.cat(theirs), logits))  # (n, V)
    return {"dense_answer": tokenizer.decode(answer), "dense_decode_tokens_per_s": speed,
            "agreement": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
            "kl": (p.exp() * (p - q)).sum(-1).mean().item()}


def main(argv=None):
    """The exit status."""
    return run_command("retroinfer", lambda: parallel.run(lambda: answer(parse_args(argv))))
