"""Write the notebooks: run every NN_name.py from a fresh kernel and keep it with its outputs.

    python notebooks/execute.py             # or: make notebooks
    python notebooks/execute.py 03 04       # only these

The metadata of a notebook names every file of ours that its run loaded, and what was in it. A test
fails when one of them has changed since: the outputs are then those of other code.
"""
import base64
import hashlib
import io
import json
import os
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WIDGET = "application/vnd.jupyter.widget-view+json"
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
LIMIT = 300                                     # kB a notebook: it lies in the repository
ASK_WHAT_IS_LOADED = """import json, sys
print(json.dumps([f for m in list(sys.modules.values()) if (f := getattr(m, "__file__", None))]))"""


def execute(source):
    """The notebook of a source, run in its folder, alike from run to run but for its outputs."""
    os.environ.pop("MPLBACKEND", None)          # the kernel draws into the notebook
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = {"kernelspec": KERNEL}
    notebook.cells.append(nbformat.v4.new_code_cell(ASK_WHAT_IS_LOADED))
    NotebookClient(notebook, timeout=600, record_timing=False,
                   resources={"metadata": {"path": str(HERE)}}).execute()
    loaded = json.loads(notebook.cells.pop().outputs[0]["text"])
    for n, cell in enumerate(notebook.cells):
        cell.id = f"cell-{n}"
        if cell.cell_type == "code":            # a knob that nobody can turn is left out
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
            for data in (o["data"] for o in cell.outputs if "image/png" in o.get("data", {})):
                data["image/png"] = shrink(data["image/png"])
    notebook.metadata = {"kernelspec": KERNEL, "made_from": made_from([source, *loaded])}
    return notebook


def made_from(files):
    """What is in those of the files that are ours: {path below the root: digest}."""
    paths = {Path(name).resolve() for name in files if Path(name).is_file()}
    names = sorted(p.relative_to(ROOT).as_posix() for p in paths if p.is_relative_to(ROOT))
    return {name: digest(ROOT / name) for name in names if not name.startswith(".")}


def digest(path):
    """The first 12 hexadecimal digits of a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def shrink(picture):
    """A base64 PNG in 256 colours, enough for greys and a blue, and smaller by half."""
    small = io.BytesIO()
    opened = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    opened.quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def main():
    for source in sorted(HERE.glob("[0-9][0-9]_*.py")):
        if sys.argv[1:] and source.name[:2] not in sys.argv[1:]:
            continue
        start, target = time.perf_counter(), source.with_suffix(".ipynb")
        nbformat.write(execute(source), target)
        size = target.stat().st_size / 1e3
        print(f"{target.name:32} {time.perf_counter() - start:5.1f} s {size:5.0f} kB", flush=True)
        if size > LIMIT:
            raise SystemExit(f"{target.name} has {size:.0f} kB: at most {LIMIT} are kept")


if __name__ == "__main__":
    main()
