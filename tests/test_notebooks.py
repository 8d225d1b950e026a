"""The notebooks: pairs agree, every source runs headless, and the exercises' answers are right.

    python -m pytest -m "not notebooks"     # leaves out the minutes that running them takes
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")
Image = pytest.importorskip("PIL.Image")

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def cells(path):
    """(kind, source) of each cell."""
    return [(c.cell_type, c.source) for c in jupytext.read(path).cells]


def answers(path):
    """The code of the folded answers, in their order."""
    text = "\n".join(source for kind, source in cells(path) if kind == "markdown")
    return re.findall(r"```python\n(.*?)```", text, re.S)


def test_there_are_notebooks():
    assert [p.name[:2] for p in SOURCES] == [f"{n + 1:02}" for n in range(len(SOURCES))] != []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_a_notebook_is_its_source_executed(path):
    notebook = jupytext.read(path.with_suffix(".ipynb"))
    assert [(c.cell_type, c.source) for c in notebook.cells] == cells(path), "run make notebooks"
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert any("image/png" in o.get("data", {}) for c in code for o in c.outputs)
    assert not any(o.output_type == "error" for c in code for o in c.outputs)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_a_notebook_is_small_and_names_no_path_of_a_machine(path):
    text = path.with_suffix(".ipynb").read_text("utf-8")
    assert len(text) <= 300_000
    assert not re.search(r"/(tmp|home|root|usr|Users)/", text)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_a_notebook_has_its_parts(path):
    text = path.read_text("utf-8")
    assert text.startswith("# %% [markdown]\n# # ") and text.splitlines()[1].endswith("?")
    for part in ("**Goal.**", "**Predict first.**", "## Takeaway", "## Exercises", "**3.**"):
        assert part in text, part
    assert "assert_close(" in text and text.count("<details>") == 3
    assert path.name.replace(".py", ".ipynb") in (ROOT / "README.md").read_text("utf-8")


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
    name = re.search(r"if check\((\w+)\)", path.read_text("utf-8"))[1]
    parts = [f"import sys; sys.path[:0] = [{str(FOLDER)!r}]", path.read_text("utf-8"),
             f"assert not check({name})", *answers(path), f"assert check({name}), 'the answer'"]
    program = tmp_path / "program.py"
    program.write_text("\n".join(parts), "utf-8")
    done = subprocess.run([sys.executable, program], cwd=FOLDER, capture_output=True, text=True,
                          env=os.environ | {"MPLBACKEND": "Agg"}, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.rstrip()
