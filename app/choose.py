"""What a run is made of: the device, what takes a step, and how much the caches hold.

    device = choose_device(args.device)
    capacity, n_tokens = choose_capacity(args, model.config.context, n_prompt)
    step, hot, words = choose_step(args, spec, device)

args are those of app/cli.py. What cannot be is an InputError, before the prompt is read.
"""
import math
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from app.relay import TITLES, Relay, best_hot
from generate import CapturedStep, compiled_step, eager_step, hot_functions, try_compiler
from model import SLOW_DTYPES
from parallel import LOCAL_SIZE, SIZE
from retroinfer import PLAIN, InputError

CPU = torch.device("cpu")


def choose_device(name):
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("meta"):
        raise InputError(f"--device {name} computes nothing: leave it out")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device {name} is not available: {str(e).splitlines()[0]}") from None


def check_backend(args, device):
    """InputError if the backend that a person asked for cannot run here at all."""
    try:
        hot_functions(device, args.backend)
    except ModuleNotFoundError as e:
        if args.backend:
            raise InputError(f"--backend {args.backend} needs {e.name}, which is not here"
                             ) from None


def choose_step(args, spec, device):
    """(the function that takes a step, its hot functions, a function that says in words what took
    the steps).

    InputError if the backend that a person asked for does not compile here.
    """
    if args.method != "wave":
        return choose_plain(args, device)
    if args.backend == "eager":
        words = f"eager on {place(device)}, asked for"
        return eager_step, hot_functions(device, "eager"), lambda: words
    if device.type == "cpu":
        return choose_on_cpu(args, spec)
    name, reason = args.backend, "asked for" if args.backend else "the default"
    try:
        hot = hot_functions(device, name)
    except ModuleNotFoundError as e:
        hot, reason = hot_functions(device, "compile"), f"{e.name} is not here"
    words = f"{TITLES[hot.attend.__module__]} and torch.compile on {device}, {reason}"
    if device.type != "cuda":
        return compiled_step, hot, lambda: words
    step = CapturedStep()
    return step, hot, lambda: f"{words}; {step.words()}"


def choose_plain(args, device):
    """choose_step for a method without hot functions: a step is eager or compiled as it is."""
    name = args.backend or ("eager" if device.type == "cpu" else "compile")
    if name not in ("eager", "compile"):
        raise InputError(f"--backend {name} goes with --method wave: give eager or compile")
    if name == "compile":
        try_compiler()
    words = f"{name} on {place(device)}, {'asked for' if args.backend else 'the default'}"
    return eager_step if name == "eager" else compiled_step, None, lambda: words


def choose_on_cpu(args, spec):
    """choose_step on a CPU. An answer waits for the compiler in three cases only: a person asked
    for it, the speed is measured (--compare), or eager steps are very slow here. On several ranks
    an answer stays eager otherwise, and so does one whose steps are checked: a child of the relay
    has no ranks to compile for, and does not know such steps."""
    if not (args.backend or args.compare or args.offload or spec.dtype in SLOW_DTYPES):
        may_compile = SIZE == 1 and not (args.check or args.max_err)
        relay = Relay(spec, args.max_new_tokens if may_compile else 0, args.chat and may_compile)
        return relay, PLAIN, relay.words
    hot, problem = best_hot(spec)
    if args.backend == "native" and problem:
        raise InputError(f"--backend native does not run here: {problem}")
    if args.backend == "compile" or args.offload:       # step.cpp reads no execution buffer
        hot = hot_functions(CPU, "compile")
    try:
        try_compiler()
    except InputError as e:
        if args.backend:
            raise
        words = f"eager on {place(CPU)}, {e}"
        return eager_step, hot_functions(CPU, "eager"), lambda: words
    reason = "asked for" if args.backend else problem or "the default"
    words = f"{TITLES[hot.attend.__module__]} and torch.compile on {place(CPU)}, {reason}"
    return compiled_step, hot, lambda: words


def place(device):
    """A device, and with how many threads it works."""
    return f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)


def choose_capacity(args, context, n_prompt):
    """(capacity of the caches, tokens to generate) after the longest prompt."""
    limit = math.inf if args.beyond_context else context
    if n_prompt >= limit:
        raise too_long(n_prompt, context)
    wanted = n_prompt + args.max_new_tokens
    wanted = min(round_capacity(max(wanted, context) if args.chat else wanted), limit)
    capacity = args.capacity or wanted
    if not n_prompt < capacity <= limit:
        raise InputError(f"--capacity is {capacity:,}: the prompt has {n_prompt:,} tokens, the "
                         f"model's context is {context:,} (--beyond-context allows more)")
    return capacity, min(args.max_new_tokens, capacity - n_prompt)


def round_capacity(n):
    """Capacities have few sizes: each size is a graph to compile."""
    step = max(1024, 2 ** (n.bit_length() - 1) // 8)
    return -(-n // step) * step


def too_long(n_prompt, context):
    return InputError(f"the prompt has {n_prompt:,} tokens, the model's context is {context:,}: "
                      "shorten it, or pass --beyond-context")


def check_lengths(args, texts, tokenizer, context):
    """InputError for a text whose beginning alone is longer than the model's context. The rest of
    the text is then never cut into tokens."""
    for text in texts:
        n = 16 * context
        while n < len(text) and not args.beyond_context:
            if (found := len(tokenizer.encode(text[:n]))) > context:
                raise too_long(found, context)
            n *= 4


def check_memory(args, model, spec, device):
    """InputError if the caches do not fit the free memory; the plan says what would fit."""
    if args.questions and device.type == "cpu":
        spec = replace(spec, batch=1)           # one K and V serve all questions
    c, vector = spec.model, spec.model.num_key_value_heads * spec.model.head_dim
    windows = [c.window(i) or spec.capacity for i in range(c.num_hidden_layers)]
    tokens = sum(min(window, spec.capacity) for window in windows) * spec.batch
    bits = spec.config.bits if args.method == "antkv" else 8 * spec.dtype.itemsize
    need = 2 * bits * tokens * vector / 8
    free = free_memory(device)
    if need < 0.8 * free or args.store:
        return
    if args.method != "wave" or not find_spec("app.plan"):      # a plan is of the wave index
        raise InputError(f"K and V of {spec.capacity:,} tokens take {need / 2**30:.1f} GiB, "
                         f"{free / 2**30:.1f} are free: lower --capacity")
    from app.plan import Run, fit
    free += sum(x.nbytes for x in model.parameters())           # which a plan counts
    ratio = None
    if args.offload:
        from buffer import RATIO
        ratio = RATIO if args.cache_ratio is None else args.cache_ratio
    is_cpu = device.type == "cpu"
    fit(Run(c, spec.capacity, spec.batch, spec.dtype, args.prefill_chunk, ratio, False, is_cpu,
            spec.config), free, free if is_cpu else free_memory(CPU))


def free_memory(device):
    """Bytes that a program may still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
        return 1024 * free // LOCAL_SIZE        # the ranks of a machine share it
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
