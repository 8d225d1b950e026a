"""The notebooks: pairs agree, every source runs headless, and the exercises' answers are right.

    python -m pytest -m "not notebooks"     # leaves out the minutes that running them takes
"""
import hashlib
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")
Image = pytest.importorskip("PIL.Image")

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
LESSONS = [path for path in SOURCES if path.name[:2] != "00"]   # 00 is a map: nothing is measured


def cells(path):
    """(kind, source) of each cell."""
    return [(c.cell_type, c.source) for c in jupytext.read(path).cells]


def answers(path):
    """The code of the folded answers, in their order."""
    text = "\n".join(source for kind, source in cells(path) if kind == "markdown")
    return re.findall(r"```python\n(.*?)```", text, re.S)


def test_there_are_notebooks():
    assert [p.name[:2] for p in SOURCES] == [f"{n:02}" for n in range(len(SOURCES))] != []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_a_notebook_is_its_source_executed(path):
    notebook = jupytext.read(path.with_suffix(".ipynb"))
    assert [(c.cell_type, c.source) for c in notebook.cells] == cells(path), "run make notebooks"
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert any("image/png" in o.get("data", {}) for c in code for o in c.outputs)
    assert not any(o.output_type == "error" for c in code for o in c.outputs)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_the_outputs_are_those_of_the_code_as_it_is(path):
    """The notebook names what it loaded; none of these files has changed since."""
    made_from = jupytext.read(path.with_suffix(".ipynb")).metadata.get("made_from", {})
    assert {f"notebooks/{path.name}", "notebooks/plots.py"} <= set(made_from), "run make notebooks"
    stale = [name for name, known in made_from.items() if digest(ROOT / name) != known]
    assert not stale, f"{path.stem} ran before {', '.join(stale)} changed: run make notebooks"


def digest(path):
    """As notebooks/execute.py has it; nothing of a file that is gone."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.exists() else ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_code_cells_are_short(path):
    """Plotting code is in figures_NN.py."""
    lengths = [len(source.splitlines()) for kind, source in cells(path) if kind == "code"]
    assert statistics.median(lengths) <= 12 and max(lengths) <= 20, sorted(lengths)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_a_notebook_is_small_and_names_no_path_of_a_machine(path):
    text = path.with_suffix(".ipynb").read_text("utf-8")
    assert len(text) <= 300_000
    text = re.sub(r'"image/png": "[^"]*"', "", text)        # letters of a picture say nothing
    assert not re.search(r"/(tmp|home|root|usr|Users)/", text)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_a_notebook_has_a_header(path):
    """A question; what it needs, its time, the paper; links to its neighbours that exist."""
    header = cells(path)[0][1]
    assert header.startswith("# ") and header.splitlines()[0].endswith("?")
    for part in ("**Goal.**", "**You need.**", "**Time.**", "**Paper.**", "**Before and after.**"):
        assert part in header, part
    linked = set(re.findall(r"\]\((\d\d_\w+\.ipynb)\)", header))
    place = SOURCES.index(path)
    neighbours = SOURCES[max(place - 1, 0):place] + SOURCES[place + 1:place + 2]
    assert linked >= {p.with_suffix(".ipynb").name for p in neighbours}
    assert "print(versions())" in path.read_text("utf-8")


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_a_lesson_has_its_parts(path):
    text = path.read_text("utf-8")
    for part in ("**Predict first.**", "## Takeaway", "## Exercises", "**3.**"):
        assert part in text, part
    assert "assert_close(" in text and text.count("<details>") == 3


def test_the_readme_leads_to_the_map_and_the_map_to_every_notebook():
    first, *others = (path.with_suffix(".ipynb").name for path in SOURCES)
    assert f"](notebooks/{first})" in (ROOT / "README.md").read_text("utf-8")
    map_of_all = SOURCES[0].read_text("utf-8").partition("## Map")[2]
    assert re.findall(r"\]\((\d\d_\w+\.ipynb)\)", map_of_all) == others


@pytest.mark.slow
@pytest.mark.notebooks
@pytest.mark.usefixtures("smollm2")
def test_the_opening_picture_is_drawn_from_real_attention(tmp_path):
    """Anew, and as it lies in the repository: of one size, light, and shown by the README."""
    kept = ROOT / "results/zones.png"
    assert f"]({kept.relative_to(ROOT)})" in (ROOT / "README.md").read_text("utf-8")
    subprocess.run([sys.executable, "notebooks/zones.py", "--out", tmp_path / "zones.png"],
                   cwd=ROOT, env=os.environ | {"MPLBACKEND": "Agg"}, check=True, timeout=600)
    new, old = (Image.open(path) for path in (tmp_path / "zones.png", kept))
    assert new.size == old.size and len(set(old.convert("L").tobytes())) > 10
    assert kept.stat().st_size < 150_000


@pytest.mark.slow
@pytest.mark.notebooks
@pytest.mark.usefixtures("smollm2")
@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_a_notebook_runs_and_its_answers_are_right(path, tmp_path):
    """As a program: check() refuses the stub, the answers run, and check() accepts them."""
    parts = [f"import sys; sys.path[:0] = [{str(FOLDER)!r}]", path.read_text("utf-8")]
    if path in LESSONS:
        name = re.search(r"if check\((\w+)\)", path.read_text("utf-8"))[1]
        parts += [f"assert not check({name})", *answers(path),
                  f"assert check({name}), 'the answer'"]
    program = tmp_path / "program.py"
    program.write_text("\n".join(parts), "utf-8")
    done = subprocess.run([sys.executable, program], cwd=FOLDER, capture_output=True, text=True,
                          env=os.environ | {"MPLBACKEND": "Agg"}, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.rstrip()
