"""The twin of retroinfer.attend for CPUs: step.cpp, compiled by the machine's own C++ compiler.

    hot = PLAIN._replace(attend=native.step.attend)     # or generate.hot_functions(device)

On a CPU, Inductor sums across vector lanes for every score, copies retrieved rows before it reads
them, and sorts more than the best clusters. step.cpp reads each byte once. It is compiled on first
use, for this processor and for the model's types and head dims. The result is kept in Inductor's
cache directory if one is set, else in the user's.

Does not include: building the index, which is matrix products and sums that PyTorch does well.
"""
import ctypes
import functools
import hashlib
import os
import shlex
import struct
import subprocess
import tempfile
from pathlib import Path

import torch

from retroinfer import InputError, rank_by_centroid, rank_by_mass

SOURCE = Path(__file__).with_name("step.cpp")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
         "-fopenmp", "-shared", "-fPIC", "-x", "c++")
REMEDY = "install g++ or set CXX, or pass --backend compile"


def attend(q, steady, index, stores, budget, method):
    """retroinfer.attend, with clusters read from the stores in place.

    InputError unless every tensor is on the CPU, D is 16 to 256, and something compiles step.cpp.
    ValueError unless q, k and v are of one dtype. The number of threads changes no bit. Runs under
    torch.compile.
    """
    kinds = {name(x) for x in (q, *steady[:2], *index[:2], *stores[:2])} - {"uint8", "int8"}
    if len(kinds) > 1:
        raise ValueError(f"q, k, v and the index are of {sorted(kinds)}: cast to one")
    if q.device.type != "cpu":
        raise InputError(f"native/step.py runs on a CPU, and q is on {q.device}")
    check_dims(q.shape[3])
    assert [name(x) for x in index[2:]] == ["float32", "int64", "bfloat16", "bfloat16", "float32"]
    assert [name(x) for x in stores[2:]] in ([], ["bfloat16", "float32"])   # of a ByteStore
    assert method.rank in (rank_by_mass, rank_by_centroid), method.rank
    limits = [x.expand(q.shape[:2]) for x in (budget.retrieve, budget.ranked)]
    numbers = [budget.N, budget.R, budget.K, round(1000 * budget.values),
               int(method.rank is rank_by_mass)]
    return attend_op(q, list(steady), list(index), list(stores), limits, numbers)


def prepare(dtype, config, D):
    """Compile step.cpp for q of a dtype, what a RetroConfig keeps, and D head dims, unless it was
    before. InputError if that fails."""
    check_dims(D)
    kind = str(dtype).removeprefix("torch.")
    library(kind, "int8" if config.store_bits == 8 else kind, "uint8" if config.bits == 4 else kind,
            D)


def check_dims(D):
    """InputError for head dims that step.cpp has no loops for."""
    if not 16 <= D <= 256:
        raise InputError(f"native/step.py takes 16 to 256 head dims, these are {D}: give --backend "
                         "compile")


def name(x):
    """The dtype of a tensor as step.cpp calls it."""
    return str(x.dtype).removeprefix("torch.")


# torch.library.custom_op would wrap six more calls of Python around every step.
torch.library.define("retroinfer::attend_native",
                     "(Tensor q, Tensor[] steady, Tensor[] index, Tensor[] stores, "
                     "Tensor[] limits, int[] numbers) -> Tensor")
attend_op = torch.ops.retroinfer.attend_native.default


@torch.library.impl("retroinfer::attend_native", "CPU")
def _(q, steady, index, stores, limits, numbers):
    (k, v, bias), (B, H, G, D) = steady, q.shape
    none = [q.new_empty(0)] * (4 - len(stores))
    given = [x.contiguous() for x in (q, k, v, *index, *stores, *none, *limits)]
    given.insert(3, bias)
    o = torch.empty_like(given[0])                                          # (B, H, G, D)
    sizes = (B, H, G, k.shape[2], stores[0].shape[2], index[0].shape[2], *numbers,
             bias.stride(0), bias.stride(1), bias.stride(3))
    places = [x.data_ptr() for x in (*given, o)]
    library(name(q), name(stores[0]), name(index[0]), D).attend(
        struct.pack(f"{len(places)}N", *places), struct.pack(f"{len(sizes)}q", *sizes),
        torch.get_num_threads())
    return o


@torch.library.register_fake("retroinfer::attend_native")
def _(q, steady, index, stores, limits, numbers):
    return q.new_empty(q.shape)


# ---------------------------------------------------------------- the compiler

@functools.cache
def library(kind, kept, row, D):
    """step.cpp for dtypes of q, of the store and of centroids, and D head dims; compiled unless the
    cache has it."""
    path = cache() / f"native-{kind}-{kept}-{row}-{D}-{key()}.so"
    try:
        return ctypes.CDLL(str(path))
    except OSError:                             # not there, or damaged
        build(path, f"-DNUM={kind}", f"-DKEPT={kept}", f"-DROW={row}", f"-DDIMS={D}")
        return ctypes.CDLL(str(path))


def cache():
    """The directory of what is compiled: Inductor's where one is set, else the user's."""
    if given := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return Path(given)
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(user) / "retroinfer"


def command():
    """The compiler with its flags, and what is linked: torch's own OpenMP where it has one, for
    another would be another pool of threads."""
    openmp = sorted(map(str, Path(torch.__file__).parent.glob("lib/libgomp*")))[:1]
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    except ValueError as e:
        raise InputError(f"CXX is {os.environ['CXX']}, which no shell can read: {e}") from None
    return [*compiler, *FLAGS], ["-x", "none", "-Wl,--as-needed", *openmp]


def key():
    """Names source, flags, compiler and processor: the macros a compiler defines tell the last."""
    compiler, link = command()
    macros = run_compiler([*compiler, "-dM", "-E", os.devnull])
    words = " ".join([*compiler, *link]).encode()
    return hashlib.sha256(SOURCE.read_bytes() + words + macros).hexdigest()[:16]


def build(path, *types):
    """Compile step.cpp to path, which appears whole or not at all."""
    compiler, link = command()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / "native.so"
            run_compiler([*compiler, *types, str(SOURCE), *link, "-o", str(made)])
            made.replace(path)
    except OSError as e:
        raise InputError(f"cannot keep what step.cpp compiles to in {path.parent}: {e.strerror}; "
                         "set TORCHINDUCTOR_CACHE_DIR") from None


def run_compiler(args):
    """What it writes to standard output; InputError where there is none or it fails."""
    try:
        done = subprocess.run(args, capture_output=True, check=False)
    except OSError as e:
        raise InputError(f"no C++ compiler for step.cpp, {args[0]}: {e.strerror}: "
                         f"{REMEDY}") from None
    if done.returncode:
        words = done.stderr.decode(errors="replace").splitlines() or ["no message"]
        said = next((line for line in words if "error" in line), words[0])
        raise InputError(f"{args[0]} does not compile step.cpp ({said.strip()}): {REMEDY}")
    return done.stdout
