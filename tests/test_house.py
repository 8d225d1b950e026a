"""What the prose promises: the root's list, import arrows, files that work when copied alone."""
import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = ["antkv", "antkv_kernels", "buffer", "checkpoint", "error_bars", "generate", "kernels",
           "model", "parallel", "retrieval_attention", "retroinfer", "tokenizer"]
FOLDERS = ["adapters", "app", "bench", "evaluation", "native"]
FILES = sorted(p for folder in ("", *FOLDERS) for p in (ROOT / folder).glob("*.py"))
# What a file may import of ours when it is loaded; the library imports more inside functions only.
ARROWS = {"retroinfer": set(), "model": {"retroinfer"}, "checkpoint": {"retroinfer"},
          "tokenizer": {"checkpoint", "retroinfer"},
          "kernels": set(), "antkv_kernels": set(), "generate": {"retroinfer"},
          "buffer": {"retroinfer"},
          "retrieval_attention": {"retroinfer"}, "antkv": {"retroinfer"},
          "error_bars": {"retroinfer"}, "native": {"retroinfer"},
          "parallel": {"retroinfer", "model"}, "adapters": {"app", "generate", "retroinfer"},
          "app": {"app", "retroinfer", "generate", "model", "parallel"}}
FREE = {"evaluation", "bench"}                              # these import what they like


def test_the_root_shows_the_design():
    assert sorted(p.stem for p in ROOT.glob("*.py")) == LIBRARY
    found = {p.parent.name for p in ROOT.glob("*/*.py")}
    assert found == {*FOLDERS, "notebooks", "tests"}


def imports(nodes):
    """The first word of each module that the statements import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def name_of(path):
    """As ARROWS has it: the folder of a file, or the file at the root."""
    return path.stem if path.parent == ROOT else path.parent.name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    tree, ours = ast.parse(path.read_text("utf-8")), {*LIBRARY, *FOLDERS}
    name = name_of(path)
    everywhere = set(imports(ast.walk(tree))) & ours
    if name in FREE:
        return
    assert not everywhere & FREE                            # not even inside functions
    if path.name != "plan.py":                              # a command of its own
        assert set(imports(tree.body)) & ours <= ARROWS[name]
    if name in LIBRARY:
        assert "app" not in everywhere - ({"app"} if name == "retroinfer" else set())
    if name == "retroinfer":
        assert set(imports(tree.body)) <= set(sys.stdlib_module_names) | {"torch"}


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=lambda p: p.name)
def test_no_test_imports_another_test(path):
    found = set(imports(ast.walk(ast.parse(path.read_text("utf-8")))))
    assert not {name for name in found if name.startswith("test_")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_are_short_and_take_few_arguments(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef) and not is_kernel(node):
            names = [a.arg for a in node.args.args if a.arg != "self"]
            assert len(names) <= 8, (node.name, names)
            if node.name not in ("main", "parse_args"):
                assert node.end_lineno - node.lineno < 40, node.name


def is_kernel(function):
    """A kernel takes its tensors one by one, and is one loop."""
    return any(ast.unparse(decorator) == "triton.jit" for decorator in function.decorator_list)


# ---------------------------------------------------------------- retroinfer.py

def test_tripartite_attention_fits_a_whiteboard():
    tree = ast.parse((ROOT / "retroinfer.py").read_text("utf-8"))
    function = next(x for x in tree.body if getattr(x, "name", "") == "tripartite_attention")
    body = function.body[1:]                                # behind the docstring
    assert body[-1].end_lineno - body[0].lineno < 25


def test_retroinfer_needs_nothing_recent_or_private_of_torch():
    """The least version that it names is 2.5: enable_gqa is of that one, and nothing is newer."""
    text = (ROOT / "retroinfer.py").read_text("utf-8")
    assert "torch 2.5 or later" in text
    for newer in ("_dynamo", "_inductor", "torch.compile", "torch.compiler", "nested_compile",
                  "torch._", "custom_op"):
        assert newer not in text, newer


ALONE = """
import sys
class OnlyTorch:
    def find_spec(self, name, path=None, target=None):
        banned = ("model", "checkpoint", "generate", "app", "kernels", "buffer", "native", "triton",
                  "einops", "safetensors", "tokenizers", "gguf")
        if name.split(".")[0] in banned: raise ImportError(name)
sys.meta_path.insert(0, OnlyTorch())
import torch
sys.path.insert(0, ".")
"""
WHOLE_FILE = ALONE + """
from retroinfer import RetroConfig, WaveIndex
q, k, v = torch.randn(1, 6, 1500, 32), torch.randn(1, 2, 1500, 32), torch.randn(1, 2, 1500, 32)
index = WaveIndex(RetroConfig(retrieve=1.0, values=1.0), capacity=1500)
index.prefill(q[:, :, :1499], k[:, :, :1499], v[:, :, :1499])
index.update()
mine = index.decode(q[:, :, 1499:], k[:, :, 1499:], v[:, :, 1499:])
dense = torch.nn.functional.scaled_dot_product_attention(q[:, :, 1499:], k, v, enable_gqa=True)
torch.testing.assert_close(mine, dense)
assert int(index.n_indexed) == (1499 - 36) // 8 * 8
"""
# Part I alone: everything retrieved is dense attention; and a step of the paper is oracle.py's.
PART_ONE = ALONE + """
from dataclasses import replace
import oracle
from retroinfer import RetroConfig, WaveIndex
assert RetroConfig.paper().method()
g = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(1, heads, 900, 16, generator=g) for heads in (6, 2, 2))
k = k + 3 * k[:, :, torch.arange(900) % 40]
small = replace(RetroConfig.paper(), segment=256, update=256, retrieve=0.1)
for config in (replace(small, retrieve=1.0), small):
    wave = WaveIndex(config, 900)
    o = wave.prefill(q[:, :, :899], k[:, :, :899], v[:, :, :899])
    torch.testing.assert_close(o.double(), oracle.dense(q, k, v)[:, :, :899], rtol=1e-4, atol=1e-4)
    wave.update()
    o = wave.decode(q[:, :, 899:], k[:, :, 899:], v[:, :, 899:])
    if config.retrieve == 1:
        truth = oracle.dense(q[:, :, 899:], k, v)
        torch.testing.assert_close(o.double(), truth, rtol=1e-4, atol=1e-5)
        continue
    n, share = int(wave.n_tokens - wave.n_indexed), wave.budget()
    budget = int(share.retrieve), int(share.ranked - share.retrieve), 1000
    for h in range(2):
        spans = zip(wave.index.offsets[0, h].tolist(), wave.index.sizes[0, h].int().tolist())
        clusters = [(wave.store.k[0, h, i:i + m], wave.store.v[0, h, i:i + m])
                    for i, m in spans if m]
        assert max(len(keys) for keys, _ in clusters) > 16 and share.retrieve >= 5
        mine = oracle.tripartite(q[0, 3 * h:3 * h + 3, -1], (wave.k_steady[0, h, :n],
                                 wave.v_steady[0, h, :n]), clusters, budget)
        torch.testing.assert_close(o[0, 3 * h:3 * h + 3, -1].double(), mine, rtol=1e-5, atol=1e-5)
"""


@pytest.mark.parametrize("program, cut", [(WHOLE_FILE, False), (PART_ONE, True)],
                         ids=["whole", "part one"])
def test_retroinfer_alone_is_right(tmp_path, program, cut):
    """Copied into an empty directory, with torch and nothing else of ours or of others."""
    text = (ROOT / "retroinfer.py").read_text("utf-8")
    if cut:
        text, ruler, _ = text.partition("# " + "=" * 64 + " Part II")
        assert ruler
        (tmp_path / "oracle.py").write_text((ROOT / "tests" / "oracle.py").read_text("utf-8"))
    (tmp_path / "retroinfer.py").write_text(text)
    done = subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- README and docs

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pages_name_only_files_flags_commands_and_targets_that_exist(page):
    text = page.read_text("utf-8")
    for name in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / name).exists(), name
    for name in re.findall(r"`([\w/.-]+\.(?:py|cpp|txt|md|json|png))`", text):
        assert (ROOT / name).exists() or name in ("tokenizer.json", "config.json"), name
    for name in re.findall(r"python -m ([\w.]+)", text):
        assert (ROOT / f"{name.replace('.', '/')}.py").exists(), name
    source = "".join(p.read_text("utf-8") for p in FILES)
    for flag in re.findall(r"(?<![\w-])--([a-z][a-z-]+)", text):
        assert f'"--{flag}"' in source or flag in ("help", "no-deps", "nproc-per-node"), flag
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert f"\n{target}:" in makefile, target


def test_the_readme_has_every_folder_and_every_file_of_the_root():
    text = (ROOT / "README.md").read_text("utf-8")
    for name in [f"{name}.py" for name in LIBRARY] + [f"{name}/" for name in FOLDERS]:
        assert f"`{name}`" in text, name


def test_readme_snippets_run():
    """Every python block of the README runs as it stands, with the default model kept small."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.slow
def test_readme_commands_run(tmp_path):
    """The lines that save an index, ask it many questions, and start two processes."""
    (tmp_path / "notes.txt").write_text("Ada wrote the notes on a Monday in May. " * 9, "utf-8")
    (tmp_path / "lines.txt").write_text("Who wrote?\nWhen?\n", "utf-8")
    runs = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}
    text = (ROOT / "README.md").read_text("utf-8")
    for words in ("--save-index", "--questions", "--nproc-per-node"):
        line, = re.findall(rf"\n    (.*{words} .*)", text)
        first, *rest = shlex.split(line.replace("retroinfer.py", str(ROOT / "retroinfer.py")))
        done = subprocess.run([sys.executable, *runs[first], *rest, "--max-new-tokens", "4"],
                              cwd=tmp_path, env=os.environ | {"PET_STANDALONE": "1"},
                              capture_output=True, text=True, check=False)
        assert done.returncode == 0 and done.stdout, done.stderr
        if words == "--questions":
            assert "== Who wrote?" in done.stdout and "== When?" in done.stdout
