"""What the plan says against what is then allocated, and against published numbers."""
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import cli
from model import DenseCache, load
from plan import GIB, Run, fit, installed, largest_capacity, plan, shape
from retroinfer import RetroConfig, WaveIndex, eager_step, prefill

SMALL = RetroConfig(segment=512, update=64)


def most_alive(work):
    """Bytes beyond those alive before that the allocator had given out at most, during work()."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def alive(modules):
    """Bytes of all parameters and of all tensors that lie in attributes, each storage once."""
    tensors = [p for module in modules for p in module.parameters()]
    for module in modules:
        for x in vars(module).values():
            tensors += [t for t in (x if isinstance(x, tuple) else (x,))
                        if isinstance(t, torch.Tensor)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
                for x in tensors}.values())


def measured(model, run):
    """(bytes allocated for good, most in a prefill's last chunk, most in a step)."""
    caches = [WaveIndex(run.retro, run.capacity, run.batch) for _ in model.layers]
    ids = torch.randint(run.model.vocab_size, (run.capacity - 1,))
    for row in range(run.batch):
        start = len(ids) // run.chunk * run.chunk
        for part in ids[:start].split(run.chunk):
            positions = torch.arange(int(caches[0].n_tokens[row]), len(part))
            positions = positions if len(positions) else None
            del positions
            prefill_row(model, caches, part, row)
    reading = most_alive(lambda: prefill_row(model, caches, ids[start:], run.batch - 1))
    return caches, reading


# ---------------------------------------------------------------- published numbers

@pytest.mark.parametrize(("name", "parameters"), [
    ("Llama-3.1-8B", 8_030_261_248), ("Llama-3.1-70B", 70_553_706_496),
    ("Qwen2.5-7B", 7_615_616_512), ("Qwen2.5-72B", 72_706_203_648)])
def test_a_named_shape_has_as_many_parameters_as_its_model_card_says(name, parameters):
    table = plan(Run(shape(name), capacity=4096, chunk=512))
    assert table.device["weights"] == 2 * parameters
