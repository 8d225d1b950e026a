"""Every kernel compiles for real GPUs within their limits: machine code, made without a GPU.

Compilers run in processes of their own. tests/test_kernels.py counts bytes.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
import triton

import kernels
from app.command import run_command
from bench import footprint

ROOT = Path(__file__).parent.parent
CAPABILITIES = (80, 90, 100)
HELPERS = {"absorb", "bits", "count", "few", "first_equals", "grow", "in_bytes", "is_top",
           "load_halves", "meet", "narrow", "thresholds", "weigh"}
STEP = {f"{name}_kernel" for name in ("rank", "choose", "look", "share", "attend", "combine")}


def check(facts):
    """Shared memory, registers and spills of one kernel are within a GPU's limits."""
    is_huge = facts.get("BG", 0) * facts.get("BD", 0) * (facts["dtype"] == "fp32") > 8192
    assert facts["shared"] <= (107 if is_huge else 99) * 1024, facts        # sm_86 has the latter
    assert facts["registers"] <= 255, facts
    is_hot = facts["kernel"] == "attend_kernel" and facts["dtype"] != "fp32" and facts["D"] == 128
    few = 8 * (facts["capability"] == 100 or triton.__version__.startswith("3.6."))
    assert facts["spilled"] <= (few if is_hot else 16), facts


@pytest.mark.slow
def test_a_step_compiles_for_an_h100():
    found = footprint.elsewhere(90, "--step", "bf16", 4, 64)
    assert {facts["kernel"] for facts in found} == STEP
    for facts in found:
        check(facts)


@pytest.fixture(scope="module")
def compilers():
    """Processes that compile every kernel for a target each, side by side."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    running = {n: subprocess.Popen([sys.executable, "-m", "bench.footprint", str(n)], env=env,
                                   cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE) for n in CAPABILITIES}
    yield running
    for process in running.values():
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles_within_a_gpus_limits(compilers, capability):
    out, err = compilers[capability].communicate()
    assert not compilers[capability].returncode, err
    found = [json.loads(line) for line in out.splitlines()]
    names = {f.__name__ for f in vars(kernels).values() if hasattr(f, "arg_names")}
    assert {facts["kernel"] for facts in found} == names - HELPERS
    for facts in found:
        check(facts)


@pytest.mark.parametrize("given", [["bf17", "4", "64"], ["bf16", "four", "64"]])
def test_a_shape_that_is_none_is_refused_in_one_line(given, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.footprint", "90", "--step", *given])
    assert run_command("bench.footprint", footprint.main) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bench.footprint: --step is {' '.join(given)}: give one of bf16, ")
    assert error.count("\n") == 1
