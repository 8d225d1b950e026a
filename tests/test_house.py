"""What the prose promises: line budgets, import arrows, a file that works when copied alone."""
import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUDGETS = {"retroinfer.py": 850, "model.py": 400, "checkpoint.py": 380, "cli.py": 370,
           "session.py": 200, "snapshot.py": 180, "bench.py": 410, "kernels.py": 640,
           "bench_gpu.py": 260, "bench_gpu_model.py": 220, "evaluate.py": 305, "tables.py": 200,
           "fidelity.py": 390, "ruler.py": 470, "texts.py": 150, "buffer.py": 355,
           "plan.py": 280, "replay.py": 305, "machine.py": 150, "footprint.py": 235,
           "report.py": 90, "native.py": 140, "certificate.py": 510}
OURS = {Path(name).stem for name in BUDGETS}
# at top level; the others import ours inside functions only
MAY_IMPORT = {"buffer", "certificate", "cli", "session", "bench", "bench_gpu", "bench_gpu_model",
              "evaluate", "tables", "fidelity", "ruler", "plan", "replay", "machine", "footprint",
              "report"}


@pytest.mark.parametrize("name", BUDGETS)
def test_lines_stay_within_the_budget(name):
    assert len((ROOT / name).read_text().splitlines()) <= BUDGETS[name]


def test_every_library_file_has_a_budget():
    assert {p.name for p in ROOT.glob("*.py")} == set(BUDGETS)


def imports(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", BUDGETS)
def test_top_level_imports_follow_the_arrows(name):
    found = set(imports(ast.parse((ROOT / name).read_text()).body))
    if Path(name).stem not in MAY_IMPORT:
        assert not found & OURS
    if name == "retroinfer.py":
        assert found <= set(sys.stdlib_module_names) | {"torch"}


@pytest.mark.parametrize("name", BUDGETS)
def test_functions_are_short_and_take_few_arguments(name):
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.FunctionDef) and not is_kernel(node):
            names = [a.arg for a in node.args.args if a.arg != "self"]
            assert len(names) <= 7, (node.name, names)
            if node.name not in ("main", "parse_args"):
                assert node.end_lineno - node.lineno < 40, node.name


def is_kernel(function):
    """A kernel takes its tensors one by one, and is one loop."""
    return any(ast.unparse(decorator) == "triton.jit" for decorator in function.decorator_list)


def test_retroinfer_alone_reproduces_dense_attention(tmp_path):
    """Copied into an empty directory, with torch and nothing else of ours or of others."""
    shutil.copy(ROOT / "retroinfer.py", tmp_path)
    program = """
import sys
class OnlyTorch:
    def find_spec(self, name, path=None, target=None):
        banned = ("model", "checkpoint", "cli", "kernels", "buffer", "triton", "einops",
                  "safetensors", "tokenizers", "gguf")
        if name.split(".")[0] in banned: raise ImportError(name)
sys.meta_path.insert(0, OnlyTorch())
import torch
from retroinfer import RetroConfig, WaveIndex
q, k, v = torch.randn(1, 6, 1500, 32), torch.randn(1, 2, 1500, 32), torch.randn(1, 2, 1500, 32)
index = WaveIndex(RetroConfig(retrieve=1.0, values=1.0), capacity=1500)
index.prefill(q[:, :, :1499], k[:, :, :1499], v[:, :, :1499])
index.update()
mine = index.decode(q[:, :, 1499:], k[:, :, 1499:], v[:, :, 1499:])
dense = torch.nn.functional.scaled_dot_product_attention(q[:, :, 1499:], k, v, enable_gqa=True)
torch.testing.assert_close(mine, dense)
print(int(index.n_indexed))
"""
    program = f"import sys; sys.path.insert(0, '.')\n{program}"
    done = subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == (1499 - 36) // 8 * 8


def test_readme_names_only_files_flags_and_targets_that_exist():
    text = (ROOT / "README.md").read_text("utf-8")
    for name in re.findall(r"`([\w/.-]+\.(?:py|txt|md|json))`", text):
        assert (ROOT / name).exists() or name in ("tokenizer.json", "config.json"), name
    source = (ROOT / "cli.py").read_text() + (ROOT / "bench.py").read_text()
    config = (ROOT / "retroinfer.py").read_text()
    for flag in re.findall(r"`--([a-z-]+)", text):
        field = flag.replace("-", "_")
        assert f'"--{flag}"' in source or f"    {field}: " in config or flag == "help", flag
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert f"\n{target}:" in makefile, target


def test_readme_states_the_lines_of_each_file():
    text = (ROOT / "README.md").read_text("utf-8")
    for name, lines in re.findall(r"\| `(\w+\.py)` \| (\d+) \|", text):
        assert abs(int(lines) - len((ROOT / name).read_text().splitlines())) <= 20, name
    assert len(re.findall(r"\| `(\w+\.py)` \| (\d+) \|", text)) == len(BUDGETS)


def test_readme_snippets_run(tmp_path):
    """Every python block of the README runs as it stands, with the default model kept small."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
