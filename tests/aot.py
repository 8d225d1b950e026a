"""Compile what the wrappers of kernels.py launch for real GPUs, on a machine that has none.

    python tests/aot.py 80 90 100           # compute capabilities; a line of JSON a kernel

A wrapper is run with a launch that records kernel and arguments in place of running them: what is
compiled is what a GPU would be given. Triton's own tools then say what the machine code needs.
"""
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parent.parent))
import kernels
import retroinfer

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32",
         torch.int32: "i32", torch.int64: "i64"}
# Between them every tile that tile_sizes and tile_rows give to these head dims.
STEPS = [(torch.bfloat16, 4, 64), (torch.bfloat16, 4, 128), (torch.bfloat16, 20, 96),
         (torch.bfloat16, 3, 256), (torch.float16, 7, 128), (torch.float32, 4, 80),
         (torch.float32, 4, 256)]
INDEXES = [(torch.bfloat16, 128), (torch.float32, 80), (torch.float32, 256)]


def step(dtype, G, D):
    """A decode step of one head behind 131,072 tokens."""
    config = retroinfer.RetroConfig()
    wave = retroinfer.WaveIndex(config, 131072)
    wave.allocate(torch.zeros(1, 1, 1, D, dtype=dtype))
    steady = wave.k_steady, wave.v_steady, torch.zeros(1, 1, 1, wave.k_steady.shape[2])
    budget = retroinfer.Budget(*wave.caps, *config.budget(wave.n_indexed))
    kernels.attend(torch.zeros(1, 1, G, D, dtype=dtype), steady, wave.index, budget,
                   (wave.k_store, wave.v_store))


def index(dtype, D):
    """The clustering of one head's segment."""
    x, ids = torch.zeros(1, 1, 8192, D), torch.zeros(1, 1, 8192, dtype=torch.int64)
    kernels.nearest(x, x[:, :, :512])
    kernels.segment_sum(x.to(dtype), ids, ids[..., :512])


def fetch(dtype, D):
    """The retrieved tokens of one head, from a store of 131,072."""
    rows = torch.zeros(1, 1, 2368, dtype=torch.int64)
    kernels.copy_rows(torch.zeros(1, 1, 2368, D, dtype=dtype),
                      torch.zeros(1, 1, 131136, D, dtype=dtype), rows)


def record(wrapper, *shape):
    """What a wrapper launches on a GPU of 132 multiprocessors: [(kernel, args, constants)]."""
    found = []
    kernels.launch = lambda kernel, grid, *args, **tile: found.append((kernel, args, tile))
    kernels.programs = lambda device: 4 * 132
    wrapper(*shape)
    return found


def source(kernel, args, tile):
    """A kernel's source with its arguments' types, as Triton specialises them, and its options."""
    signature, constants, attrs = {}, {}, {}
    options = {name: tile[name] for name in tile if name.startswith("num_")} | kernels.OPTIONS
    for i, (name, x) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(x, torch.Tensor):
            signature[name] = "*" + TYPES[x.dtype]
        elif x == 1:                                    # Triton makes a constant of it
            signature[name], constants[(i,)] = "constexpr", 1
            continue
        else:
            signature[name] = "i32" if x < 2**31 else "i64"
        if isinstance(x, torch.Tensor) or x % 16 == 0:
            attrs[(i,)] = [["tt.divisibility", 16]]
    for name in kernel.arg_names[len(args):]:
        signature[name] = "constexpr"
        constants[(kernel.arg_names.index(name),)] = tile[name]
    return ASTSource(kernel, signature, constants, attrs), options


def needs(compiled, capability):
    """Registers a thread, bytes a thread spills, bytes of shared memory a block."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], check=True,
                              capture_output=True, text=True).stdout
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"capability": capability, "registers": found["REG"],
            "spilled": found["STACK"] + found["LOCAL"], "shared": compiled.metadata.shared}


def compile_all(capabilities):
    """Every distinct kernel of every shape on every target: a dict each."""
    jobs, builds = {}, [(wrapper, s) for wrapper in (index, fetch) for s in INDEXES]
    for wrapper, (dtype, *shape) in [(step, s) for s in STEPS] + builds:
        for kernel, args, tile in record(wrapper, dtype, *shape):
            code, options = source(kernel, args, tile)
            facts = {"kernel": kernel.__name__, "dtype": TYPES[dtype], "shape": shape, **tile}
            for capability in capabilities:
                jobs.setdefault((code.hash(), str(options), capability), (code, options, facts))

    for (_, _, capability), (code, options, facts) in jobs.items():
        target = GPUTarget("cuda", capability, 32)
        yield facts | needs(triton.compile(code, target=target, options=options), capability)


if __name__ == "__main__":
    for facts in compile_all([int(arg) for arg in sys.argv[1:]]):
        print(json.dumps(facts), flush=True)
