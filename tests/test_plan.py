"""The plan beside what is then allocated, and beside published numbers."""
import re
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from app import plan as command
from app.plan import GIB, REMEDIES, Run, fit, plan, remedies, shape, weights
from buffer import WaveBuffer, offload
from generate import eager_step, prefill
from model import Llama
from retroinfer import RetroConfig, WaveIndex

LLAMA = Run(shape("Llama-3.1-8B"), capacity=131072, chunk=2048)
COUNTERS = {"n_tokens", "n_indexed", "n_clusters", "q_energy", "limits"}   # too few bytes to plan


def most_alive(work):
    """The most bytes that the allocator has given out during work(), by its own log."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def alive(model, caches):
    """Bytes of all parameters, and of all tensors in attributes but counters, each storage once."""
    held, owners = list(model.parameters()), list(caches)
    for store in (cache.store for cache in caches):
        owners.append(store)
        if isinstance(store, WaveBuffer):
            owners += [store.cache, store.cache.policy]
    for owner in owners:
        for x in (x for name, x in vars(owner).items() if name not in COUNTERS):
            held += [t for t in (x if isinstance(x, (tuple, list)) else (x,)) if torch.is_tensor(t)]
    return sum({x.data_ptr(): x.untyped_storage().nbytes() for x in held}.values())


def measured(model, run):
    """Bytes allocated for good, and the most beyond them in a prefill's last chunk, in a step."""
    store = None if run.cache_ratio is None else offload(
        model, run.capacity, run.batch, cache_ratio=run.cache_ratio)
    caches = [WaveIndex(run.retro, run.capacity, run.batch, make_store=store)
              for _ in model.layers]
    ids = torch.arange(run.capacity - 8) % run.model.vocab_size
    prefill(model, caches, [ids[:-run.chunk]] * run.batch, run.chunk)
    reading = most_alive(lambda: prefill(model, caches, [ids[-run.chunk:]] * run.batch))
    for cache in caches:
        cache.update()
    step = most_alive(lambda: eager_step(model, caches, ids[:run.batch]))
    return alive(model, caches), reading, step


@pytest.fixture(scope="module")
def narrow():
    """A model of three layers, random: a head is as wide as in the default model."""
    config = replace(shape("Llama-3.1-8B"), vocab_size=4096, hidden_size=576, head_dim=64,
                     intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
                     num_hidden_layers=3, tied=True)
    model = Llama(config).requires_grad_(False)
    model.lm_head.weight = model.embed_tokens.weight
    return model


# ---------------------------------------------------------------- against what is allocated

@pytest.mark.parametrize(("batch", "chunk", "capacity", "ratio", "bits"), [
    (1, 600, 1800, None, 16), (3, 100, 900, None, 16), (2, 400, 1200, 0.1, 16),
    (1, 400, 1200, 0.0, 16), (1, 600, 1800, None, 8)])
def test_the_peak_is_within_three_percent(narrow, one_thread, batch, chunk, capacity, ratio, bits):
    run = Run(narrow.config, capacity, batch, torch.float32, chunk, ratio, is_cpu=True,
              retro=RetroConfig(segment=512, store_bits=bits))
    table = plan(run)
    held, reading, step = measured(narrow, run)
    host = sum(table.host.values())
    assert sum(table.device.values()) + host == held
    assert table.peak + host == pytest.approx(held + max(reading, step), rel=0.03)
    assert table.prefill == pytest.approx(reading, rel=0.2)
    assert table.step == pytest.approx(step, rel=0.1)


def test_parts_are_those_of_the_cache_that_is_allocated(narrow):
    run = Run(narrow.config, 1000, 2, torch.float32)
    cache = WaveIndex(run.retro, run.capacity, run.batch)
    cache.allocate(torch.empty(1, 3, 0, 64))
    device = plan(run).device
    assert device["store"] == 3 * (cache.store.k.nbytes + cache.store.v.nbytes)
    assert device["steady zone"] == 3 * (cache.k_steady.nbytes + cache.v_steady.nbytes)
    assert device["index"] == 3 * sum(x.nbytes for x in cache.index)


def test_offload_moves_the_store_to_the_host_and_leaves_a_share_of_it():
    there, here = plan(LLAMA), plan(replace(LLAMA, cache_ratio=0.05))
    assert here.host == {"store": there.device["store"]} and "store" not in here.device
    assert here.device["block cache"] == pytest.approx(0.05 * here.host["store"], rel=0.01)
    one_layer = here.host["store"] // 32        # a prefill brings it, and sends back another
    assert here.prefill == there.prefill + 2 * one_layer


def test_a_store_must_fit_the_host_unless_it_is_in_a_file():
    here = plan(replace(LLAMA, cache_ratio=0.05))
    assert here.fits(24 * GIB) and here.fits(24 * GIB, 16 * GIB)
    assert not here.fits(24 * GIB, 15 * GIB) and not here.fits(16 * GIB)
    cpu = plan(replace(LLAMA, cache_ratio=0.05, is_cpu=True))
    assert not cpu.fits(30 * GIB) and cpu.fits(40 * GIB)                # one memory for both
    assert plan(replace(cpu.run, in_file=True)).fits(30 * GIB)


# ---------------------------------------------------------------- against public numbers

@pytest.mark.parametrize(("name", "parameters"), [
    ("Llama-3.1-8B", 8_030_261_248), ("Llama-3.1-70B", 70_553_706_496),
    ("Qwen2.5-7B", 7_615_616_512), ("Qwen2.5-72B", 72_706_203_648)])
def test_a_named_shape_has_the_parameters_of_its_model_card(name, parameters):
    assert weights(shape(name)) == 2 * parameters


def test_llama_at_128k_is_the_arithmetic_of_the_papers():
    """128 KiB of K and V a token; an index of a sixteenth, and an eighth more."""
    device = plan(replace(LLAMA, retro=RetroConfig.paper())).device
    assert device["store"] == 16 * GIB
    assert device["index"] == pytest.approx(16 * GIB / 16 * 9 / 8, rel=0.04)


# ---------------------------------------------------------------- what fits

def test_what_fits_is_given_back_and_what_does_not_is_refused_with_what_would():
    """Every remedy that is named fits, no other does, nor does a thousand tokens more."""
    peak = plan(LLAMA).peak
    assert fit(LLAMA, peak).peak == peak
    whole, memory = replace(LLAMA, capacity=8192, chunk=8192), 16 * GIB
    with pytest.raises(ValueError, match=r"8,192 tokens x 1 need .* what fits: ") as refusal:
        fit(whole, memory)
    assert "\n" not in str(refusal.value)
    *named, capacity = str(refusal.value).split("what fits: ")[1].split(", or ")
    would = [how for how, changes in REMEDIES.items() if "--store" not in how
             and plan(replace(whole, **changes)).peak <= memory]
    assert named == would[:2] and len(would) < len(REMEDIES) - 1
    n = int(capacity.removeprefix("--capacity "))
    assert plan(replace(whole, capacity=n)).peak <= memory
    assert plan(replace(whole, capacity=n + 1024)).peak > memory


@pytest.mark.parametrize(("memory", "flags"), [
    (26, ["--offload --prefill-chunk 2048"]), (40, ["--prefill-chunk 2048", "--offload"])])
def test_a_larger_device_is_offered_the_simpler_flags(monkeypatch, memory, flags):
    monkeypatch.setattr("app.plan.largest_capacity", lambda *_: 0)
    assert remedies(replace(LLAMA, chunk=131072), memory * GIB) == flags


# ---------------------------------------------------------------- the command line

def test_plan_prints_the_parts_and_runs_nothing(capsys, monkeypatch):
    monkeypatch.setattr("model.load", None)
    status = command.main(["Llama-3.1-8B", "--capacity", "131072", "--memory", "40",
                           "--prefill-chunk", "2048"])
    out, err = capsys.readouterr()
    assert status == 0 and not err
    for part in ("weights", "index", "steady zone", "store", "activations, step", "peak"):
        assert f"\n{part}" in out
    left = float(re.search(r"fits: ([\d.]+) GiB of 40\.0 left", out)[1])
    assert left == pytest.approx(40 - plan(LLAMA).peak / GIB, abs=0.06)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plan_without_a_shape_is_that_of_the_model(capsys, checkpoint, monkeypatch, dtype):
    monkeypatch.setattr(command, "fast_dtype", lambda device: getattr(torch, dtype))
    path = checkpoint()
    assert command.main([str(path), "--device", "cpu"]) == 0
    assert f"{path}, 64 tokens x 1, {dtype}" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "message"), [
    (["Lama"], "no shape or model is named Lama: give a path, or one of SmolLM2"),
    (["Llama-3.1-8B", "--capacity", "2048", "--memory", "14"],
     "what fits: nothing here, the weights alone are 15.0 GiB"),
    (["Llama-3.1-8B", "--set", "retrieve=2"], "retrieve is 2.0: give a number between 0 and 1"),
    (["--set", "spread=1"], "--set does not know 'spread'"),
    (["--store", "x"], "--store goes with --offload"),
    (["--cache-ratio", "0.5"], "--cache-ratio goes with --offload"),
    (["--capacity", "99999999999"], "less than 2,147,483,648"),
    (["Llama-3.1-8B", "--offload", "--store", "x"], "--store is for a CPU"),
    (["--batch", "0"], "--batch is 0: at least 1 is needed"),
    (["--memory", "0"], "--memory is 0.0: give GiB above 0")])
def test_what_cannot_be_planned_is_one_line_and_status_two(capsys, flags, message):
    assert command.main(["--device", "cpu", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_text_shorter_than_a_cluster_is_planned(capsys):
    assert command.main(["Llama-3.1-8B", "--capacity", "4", "--memory", "24"]) == 0
    assert "4 tokens x 1" in capsys.readouterr().out
