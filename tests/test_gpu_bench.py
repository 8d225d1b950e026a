"""bench/gpu.py without a GPU: tiny, in Triton's interpreter, every runner once."""
import functools
import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from app.command import run_command
from bench import gpu
from generate import eager_step
from retroinfer import PLAIN, WaveIndex

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_benchmark_runs_dry(tmp_path):
    """Every runner and kernel, the check against float64, the whole model, the files."""
    done = subprocess.run([sys.executable, "-m", "bench.gpu", "--dry-run", "--out", tmp_path],
                          cwd=ROOT, capture_output=True, text=True, check=False,
                          env=os.environ | ({} if gpu.IS_GPU else {"TRITON_INTERPRET": "1"}))
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "gpu.json").read_text())
    assert [cell["model"] for cell in facts["cells"]] == ["Llama-3-8B", "Qwen2.5-7B"]
    for cell in facts["cells"]:
        assert {"kernels", "SDPA, grouped", "SDPA, flash"} <= set(cell["ms"])
        assert set(cell["kernels"]) == {"rank", "choose", "look", "share", "attend",
                                        "combine"}
    decode, (prefill,) = facts["decode"], facts["prefill"]
    assert set(decode["steps"]) == set(gpu.kinds(gpu.TINY))
    assert all(step["tokens_per_s"] > 0 for step in decode["steps"].values())
    for name in ("dense", "dense, no mask"):        # as many as fit, by the bytes allocated
        one = decode["steps"][name]["cache_bytes"] / decode["batch"]
        assert 0 <= 0.9 * decode["free_bytes"] - decode["batch"] * one < one
    assert 0 < decode["speed_up"] < 1 and prefill["index_share"] > 0            # interpreted
    page = (tmp_path / "gpu.md").read_text()
    assert f"{decode['batch']} sequences of 100 tokens" in page and "Qwen2.5-7B" in page
    assert (tmp_path / "gpu.png").exists()


@pytest.mark.slow
def test_each_kind_of_cache_is_gone_before_the_next_comes(monkeypatch):
    """And all of one kind are there at once. Compiled steps must not keep them."""
    alive, seen, kinds = weakref.WeakSet(), [], gpu.kinds(gpu.TINY)

    def counted(make):
        def made(*shape):
            seen.append(len(alive))
            cache = make(*shape)
            alive.add(cache)
            return cache
        return made

    kinds["wave index"] = functools.partial(WaveIndex, gpu.TINY.retro, hot=PLAIN)
    monkeypatch.setattr(gpu, "kinds", lambda scope: {name: counted(x) for name, x in kinds.items()})
    monkeypatch.setattr(gpu, "compiled_step", torch.compile(
        eager_step, backend="eager", fullgraph=True, dynamic=False))
    facts = gpu.decode_facts(gpu.TINY)
    assert seen == [0, 1] * 3 and not alive
    wave, *dense = (facts["steps"][name]["tokens_per_s"] for name in sorted(kinds, reverse=True))
    assert facts["speed_up"] == wave / max(dense)


def test_a_gpu_without_room_for_one_sequence_is_told(monkeypatch):
    monkeypatch.setattr(gpu, "free_memory", lambda: 100_000)        # less than the weights
    assert gpu.decode_facts(gpu.TINY) == {}
    page = gpu.model_page({"decode": {}, "prefill": [], "copy_bytes_per_s": 1e9})
    assert "not one sequence fits" in page[0]


def test_a_cell_that_time_or_memory_does_not_allow_is_named(monkeypatch):
    monkeypatch.setattr(gpu, "index_facts", lambda model, scope: None)
    scope = replace(gpu.TINY, cells=[(2048, 3)])
    facts = gpu.layers_facts(scope, end=0)
    assert facts["cells"] == [] and len(facts["left_out"]) == 2
    assert facts["left_out"][0].startswith("Llama-3-8B, 2,048 tokens, batch 3: it needs")


def test_without_a_gpu_the_benchmark_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "IS_GPU", False)
    monkeypatch.setattr(sys, "argv", ["bench.gpu"])
    assert run_command("bench.gpu", gpu.main) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err == "bench.gpu: a CUDA GPU is needed, and torch finds none\n"
