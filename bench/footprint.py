"""What a Triton kernel costs, found without a GPU: bytes moved, registers, spills, shared memory.

    python -m bench.footprint 80 90 100     # compute capabilities; a line of JSON a kernel

    with counted() as moved:                # interpreted; {kernel: [bytes read, bytes written]}
        kernel[grid](*args, **tile)
    needs(kernel, args, [tile], 90)         # compiled in another process; [{"registers": 66, ...}]

To compile kernels.py, its functions are called with a launch that records kernel and arguments and
runs nothing. So the compiler gets what a GPU would be given. Triton's own tools then read the
registers, spills and shared memory from the machine code.
"""
import contextlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import interpreter

import kernels
from app.command import Parser, run_command
from retroinfer import PLAIN, InputError, RetroConfig, WaveIndex

ROOT = Path(__file__).parent.parent

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32",
         torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}
# Between them every tile that tile_sizes and tile_rows give to these head dims.
STEPS = [(torch.bfloat16, 4, 64), (torch.bfloat16, 4, 128), (torch.bfloat16, 20, 96),
         (torch.bfloat16, 3, 256), (torch.bfloat16, 40, 128), (torch.bfloat16, 71, 64),
         (torch.float16, 7, 128), (torch.float32, 4, 64), (torch.float32, 4, 80),
         (torch.float32, 4, 256), (torch.float32, 40, 128), (torch.float32, 40, 256),
         (torch.bfloat16, 4, 128, 16), (torch.float32, 4, 80, 16)]
INDEXES = [(torch.bfloat16, 128), (torch.float32, 80), (torch.float32, 256)]


# ---------------------------------------------------------------- bytes

@contextlib.contextmanager
def counted():
    """{kernel: [bytes read, bytes written]} of the kernels that Triton interprets meanwhile.

    Masked elements are not counted. Bytes that are read twice count twice: there is no cache.
    """
    moved, running = defaultdict(lambda: [0, 0]), []
    run, builder = interpreter.GridExecutor.__call__, interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store

    def noted(executor, *args, **tile):
        running.append(executor.fn.__name__)
        run(executor, *args, **tile)
        running.pop()

    def note(way, pointers, mask):
        bits = pointers.get_element_ty().primitive_bitwidth
        moved[running[-1]][way] += int(mask.data.sum()) * bits // 8

    def noted_load(pointers, mask, *rest):
        note(0, pointers, mask)
        return load(pointers, mask, *rest)

    def noted_store(pointers, value, mask, *rest):
        note(1, pointers, mask)
        return store(pointers, value, mask, *rest)

    with (mock.patch.object(interpreter.GridExecutor, "__call__", noted),
          mock.patch.object(builder, "create_masked_load", noted_load),
          mock.patch.object(builder, "create_masked_store", noted_store)):
        yield moved


# ---------------------------------------------------------------- machine code

def needs(kernel, args, tiles, capability, helpers=()):
    """Registers a thread, bytes a thread spills, bytes of shared memory a block: a dict a tile.

    kernel, and the helpers that it calls, are @triton.jit functions. Of their file they use no name
    but `triton` and `tl`. args are a launch's tensors and ints; tiles are sets of its constants and
    options. Another process compiles, because in this one Triton may be its interpreter. InputError
    with the last line of the compiler if the kernel does not compile.
    """
    text = "\n".join(["import triton", "import triton.language as tl\n",
                      *(inspect.getsource(x.fn) for x in (*helpers, kernel))])
    job = {"text": text, "kernel": kernel.fn.__name__, "tiles": tiles,
           "args": [TYPES[x.dtype] if isinstance(x, torch.Tensor) else x for x in args]}
    return elsewhere(capability, "--stdin", stdin=json.dumps(job))


def elsewhere(*arguments, stdin=""):
    """The dicts that this file prints when it runs as a program of its own: there Triton compiles.
    """
    env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "bench.footprint", *map(str, arguments)], env=env,
                          cwd=ROOT, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"it does not compile: {done.stderr.splitlines()[-1]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def compile_text(text, kernel, args, tiles, capability):
    """Yield the facts that needs() returns, of the kernel of that name in a program's text."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "text.py")                  # Triton reads a function in its file
        file.write_text(text, "utf-8")
        spec = importlib.util.spec_from_file_location("text", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for tile in tiles:
            yield tile | compile_one(*source(getattr(module, kernel), args, tile), capability)


def source(kernel, args, tile):
    """A kernel's source with its arguments' types, as Triton specialises them, and its options.

    args: ints, None, tensors, or the names in TYPES that stand for tensors.
    """
    signature, constants, attrs = {}, {}, {}
    options = {name: tile[name] for name in tile if name.startswith("num_")} | kernels.OPTIONS
    args = [TYPES[x.dtype] if isinstance(x, torch.Tensor) else x for x in args]
    for i, (name, x) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if x is None or x == 1:                         # Triton makes a constant of it
            signature[name], constants[(i,)] = "constexpr", x
            continue
        if isinstance(x, str):
            signature[name] = "*" + x
        else:
            signature[name] = "i32" if x < 2**31 else "i64"
        if isinstance(x, str) or x % 16 == 0:
            attrs[(i,)] = [["tt.divisibility", 16]]
    for name in kernel.arg_names[len(args):]:
        signature[name] = "constexpr"
        constants[(kernel.arg_names.index(name),)] = tile[name]
    return ASTSource(kernel, signature, constants, attrs), options


def compile_one(code, options, capability):
    """The facts that needs() returns, of a source."""
    compiled = triton.compile(code, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], check=True,
                              capture_output=True, text=True).stdout
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"capability": capability, "registers": found["REG"],
            "spilled": found["STACK"] + found["LOCAL"], "shared": compiled.metadata.shared}


# ---------------------------------------------------------------- our kernels

def step(dtype, G, D, bits=4):
    """A decode step of one head with room for 131,072 tokens; 16 bits are ranked as in the paper.

    Once a fifth of the values is read, and once all are.
    """
    config = RetroConfig(bits=bits, by_mass=bits == 4)
    k = torch.zeros(1, 1, 1, D, dtype=dtype)
    for values in (config.values, 1.0):
        cache = WaveIndex(replace(config, values=values), 131072,
                          hot=PLAIN._replace(attend=kernels.attend))
        cache.prefill(None, k, k)
        cache.update()
        cache.decode(k.expand(1, G, 1, D), k, k)


def index(dtype, D):
    """The clustering of one head's segment."""
    x, ids = torch.zeros(1, 1, 8192, D), torch.zeros(1, 1, 8192, dtype=torch.int64)
    kernels.nearest(x, x[:, :, :512])
    for rows in (x.to(dtype), x[..., :1]):
        kernels.segment_sum(rows, ids, ids[..., :512])


def fetch(dtype, D):
    """The retrieved tokens of one head, from a store of 131,072."""
    rows = torch.zeros(1, 1, 2368, dtype=torch.int64)
    kernels.copy_rows(torch.zeros(1, 1, 2368, D, dtype=dtype),
                      torch.zeros(1, 1, 131136, D, dtype=dtype), rows)


def record(wrapper, *shape):
    """The launches of a wrapper on a GPU of 132 multiprocessors: [(kernel, args, constants)]."""
    found = []

    def note(kernel, grid, *args, **tile):
        found.append((kernel, args, tile))

    with (mock.patch.object(kernels, "launch", note),
          mock.patch.object(kernels, "programs", lambda device: 4 * 132)):
        wrapper(*shape)
    return found


def compile_ours(capabilities, steps=STEPS, indexes=INDEXES):
    """Yield the facts of every distinct kernel, of every shape, on every target."""
    jobs, builds = {}, [(wrapper, shape) for wrapper in (index, fetch) for shape in indexes]
    for wrapper, (dtype, *shape) in [(step, shape) for shape in steps] + builds:
        for kernel, args, tile in record(wrapper, dtype, *shape):
            code, options = source(kernel, args, tile)
            facts = {"kernel": kernel.__name__, "dtype": TYPES[dtype], "shape": shape, **tile}
            for capability in capabilities:
                jobs.setdefault((code.hash(), str(options), capability), (code, options, facts))
    for (_, _, capability), (code, options, facts) in jobs.items():
        yield facts | compile_one(code, options, capability)


def main():
    parser = Parser(prog="python -m bench.footprint", description=__doc__.splitlines()[0])
    parser.add_argument("capabilities", type=int, nargs="+", metavar="90")
    parser.add_argument("--step", nargs=3, metavar=("bf16", "G", "D"), help="of one shape only")
    parser.add_argument("--stdin", action="store_true", help="a job of needs(), not our kernels")
    args = parser.parse_args()
    if args.stdin:
        found = compile_text(**json.load(sys.stdin), capability=args.capabilities[0])
    elif args.step:
        found = compile_ours(args.capabilities, [one_shape(*args.step)], [])
    else:
        found = compile_ours(args.capabilities)
    for facts in found:
        print(json.dumps(facts), flush=True)


def one_shape(name, G, D):
    """A row of STEPS, or InputError."""
    dtypes = {TYPES[x]: x for x in TYPES if x.is_floating_point}
    if name not in dtypes or not G.isdigit() or not D.isdigit():
        raise InputError(f"--step is {name} {G} {D}: give one of {', '.join(dtypes)}, then the "
                         "query heads of a kv head, then the head's dims")
    return dtypes[name], int(G), int(D)


if __name__ == "__main__":
    raise SystemExit(run_command("bench.footprint", main))
