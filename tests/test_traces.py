"""Policies against oracles of another make, traces against the steps they were taken from."""
import itertools
import random
from dataclasses import fields, replace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import buffer
from app.plan import GIB, Run, plan, shape
from bench import machine
from bench.traces import POLICIES, Trace, belady, clock, fifo, lru, record, replay
from generate import eager_step, generate, sampler
from model import load
from retroinfer import RetroConfig, WaveIndex

BLOCKS = st.lists(st.lists(st.integers(0, 9), unique=True, max_size=6), min_size=1, max_size=12)
SLOTS = st.integers(0, 8)


# ---------------------------------------------------------------- policies

def hits_of_stamps(steps, S):
    """LRU by a date for every block there ever was: those of the S latest dates are there."""
    dates, hits = {}, []
    for t, blocks in enumerate(steps):
        there = sorted(dates, key=dates.get)[-S:] if S else []
        hits.append(len(set(blocks) & set(there)))
        dates |= {b: (t, -rank) for rank, b in enumerate(blocks)}
    return hits


@given(BLOCKS, SLOTS)
def test_lru_keeps_the_blocks_of_the_latest_dates(steps, S):
    assert list(lru(steps, S)) == hits_of_stamps(steps, S)


@given(BLOCKS, SLOTS)
def test_fifo_is_a_queue_of_what_was_admitted(steps, S):
    queue, hits = [], []
    for blocks in steps:
        there = queue[-S:] if S else []
        hits.append(len(set(blocks) & set(there)))
        queue += [b for b in blocks[:S] if b not in there]
    assert list(fifo(steps, S)) == hits


@given(BLOCKS, SLOTS)
def test_clock_is_a_ring_of_marked_slots(steps, S):
    """The ring is turned so that the hand is always at its head."""
    ring, hits = [[None, 0] for _ in range(S)], []
    for blocks in steps:
        there = {slot[0] for slot in ring}
        hits.append(len(there & set(blocks)))
        for slot in ring:
            slot[1] |= slot[0] in blocks
        for b in blocks[:S]:
            if b not in there:
                while ring[0][1]:
                    ring[0][1] = 0
                    ring.append(ring.pop(0))
                ring = [*ring[1:], [b, 1]]
    assert list(clock(steps, S)) == hits


@settings(deadline=None, max_examples=60)
@given(BLOCKS, SLOTS, st.sampled_from(["LRU", "CLOCK"]))
def test_the_block_cache_hits_what_its_policy_hits_here(steps, S, name):
    cache = buffer.BlockCache(1, 1, 10, S, getattr(buffer, name), torch.device("cpu"))
    hits = []
    for blocks in steps:
        asked = torch.arange(6).view(1, 1, 6) < len(blocks)
        ids = torch.tensor(blocks + [0] * (6 - len(blocks))).view(1, 1, 6)
        slots = cache.lookup(ids, asked)
        hits.append(int((slots >= 0).sum()))
        cache.admit(ids, asked, slots)
    assert hits == list(POLICIES[name](steps, S))


def most_hits(steps, S):
    """The best of all ways to keep up to S of what is there and what was just asked for."""
    best = {frozenset(): 0}
    for blocks in steps:
        after = {}
        for kept, before in best.items():
            hits, have = before + len(kept & set(blocks)), kept | set(blocks)
            for keep in map(frozenset, itertools.combinations(have, min(S, len(have)))):
                after[keep] = max(after.get(keep, 0), hits)
        best = after
    return max(best.values())


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), unique=True, max_size=3), min_size=1, max_size=7),
       st.integers(0, 3))
def test_belady_hits_as_often_as_any_choice_could(steps, S):
    assert sum(belady(steps, S)) == most_hits(steps, S)


@given(BLOCKS, SLOTS)
def test_nothing_hits_more_than_belady(steps, S):
    best = sum(belady(steps, S))
    assert all(sum(policy(steps, S)) <= best for policy in POLICIES.values())


@given(BLOCKS)
def test_lru_and_belady_hit_no_less_with_more_slots(steps):
    """Both are stack algorithms: what S slots hold, S + 1 slots hold too (Mattson 1970)."""
    for policy in (lru, belady):
        hits = [sum(policy(steps, S)) for S in range(12)]
        assert hits == sorted(hits)


@pytest.mark.parametrize("policy", POLICIES.values())
def test_no_slot_never_hits_and_a_slot_a_block_misses_only_once(policy):
    dice = random.Random(0)
    steps = [dice.sample(range(40), 12) for _ in range(30)]
    assert sum(policy(steps, 0)) == 0
    assert sum(policy(steps, 40)) == 30 * 12 - len(set().union(*steps))


def test_policies_differ_where_they_should():
    """A block asked for in every step, and three that pass by: FIFO alone lets it go."""
    steps = [["hot", f"cold {i}"] for i in range(6)]
    assert sum(lru(steps, 2)) == sum(belady(steps, 2)) == 5
    assert sum(fifo(steps, 2)) < 5


# ---------------------------------------------------------------- traces

CONFIG = RetroConfig(segment=256, update=64, cluster=16, min_retrieve=5)


@pytest.fixture(scope="module")
def recorded(checkpoint):
    """(model, prompts, Trace) of two prompts of unequal length: do not edit."""
    model, _ = load(checkpoint(max_position_embeddings=1024), torch.float32, "cpu")
    model.config = replace(model.config, eos_ids=frozenset())       # so that nothing ends early
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, tiny.VOCAB, (n,), generator=g) for n in (400, 330)]
    return model, prompts, record(model, prompts, 70, config=CONFIG)


def test_recording_changes_no_token(recorded):
    model, prompts, trace = recorded
    caches = [WaveIndex(CONFIG, 470, 2) for _ in model.layers]
    said = torch.stack(list(generate(model, caches, prompts, 71, sampler(), eager_step)))
    assert (said.numpy() == trace.said).all()


def test_a_trace_has_what_each_step_read(recorded):
    model, _, trace = recorded
    assert trace.ids.shape == trace.sizes.shape == (70, len(model.layers), 4, 5)
    assert trace.capacity == 512 and 0 < trace.sizes.max() <= CONFIG.largest
    for layer, head in trace.streams:
        size = {}
        for ids, sizes in zip(trace.ids[:, layer, head], trace.sizes[:, layer, head], strict=True):
            asked = {i: s for i, s in zip(ids.tolist(), sizes.tolist(), strict=True) if s}
            assert len(asked) == (sizes > 0).sum() >= 3             # no cluster twice
            assert all(size.setdefault(i, s) == s for i, s in asked.items())    # nor another one


def test_streams_cut_clusters_into_blocks_of_eight_in_order_of_rank():
    ids, sizes = np.array([[[[7, 2, 5]]]]), np.array([[[[20, 0, 8]]]], dtype=np.uint8)
    trace = Trace(ids, sizes, 64, np.zeros((2, 1)), CONFIG)
    assert trace.streams == {(0, 0): [[21, 22, 23, 15]]}
    assert trace.best(2).streams == {(0, 0): [[21, 22, 23]]}
    assert trace.n_blocks.tolist() == [[[[3, 0, 1]]]] and trace.slots(0.25) == 2


def test_a_trace_survives_its_file(recorded, tmp_path):
    trace = recorded[2]
    trace.save(tmp_path / "trace.npz")
    read = Trace.load(tmp_path / "trace.npz")
    for field in fields(trace):
        assert np.array_equal(getattr(read, field.name), getattr(trace, field.name)), field.name


def test_replay_counts_each_head_alone(recorded):
    trace = recorded[2]
    hits = replay(trace, lru, 9)
    for (layer, head), steps in trace.streams.items():
        assert hits[:, layer, head].tolist() == hits_of_stamps(steps, 9)
    assert (hits <= trace.n_blocks.sum(-1)).all() and hits[0].sum() == 0 < hits.sum()


# ---------------------------------------------------------------- the machine

def test_a_step_moves_the_bytes_the_reference_counts():
    """120K x 8 of the published code: 16 GB of weights, 4 of centroids, 5 of those estimated, 7 of
    those retrieved, all passes counted; by hand."""
    work = machine.published_work(shape("Llama-3.1-8B"), 120_000, 8)
    weights, centroids, estimated, retrieved = 16.06e9, 3.93e9, 5.45e9, 3 * 2.46e9
    steady = 3 * 68 * 2048 * 512
    by_hand = weights + centroids + estimated + retrieved + steady
    assert work.device + work.exact == pytest.approx(by_hand, rel=0.01)


def test_hits_are_faster_than_misses_by_the_ratio_of_the_bandwidths():
    work = machine.Work(1, 0.0, 1e9)
    for m in machine.MACHINES.values():
        assert work.seconds(m, 1.0) == pytest.approx(1e9 / m.memory)
        assert work.seconds(m, 0.0) / work.seconds(m, 1.0) == pytest.approx(m.memory / m.bus)


def test_the_fitted_constant_gives_back_the_run_it_is_fitted_to():
    config = shape("Llama-3.1-8B")
    work, host = machine.published_work(config, 120_000, 1), machine.host_seconds(config)
    a100 = machine.MACHINES["A100-PCIe"]
    assert 1 / work.seconds(a100, machine.PUBLISHED_HIT, host) == pytest.approx(34.6)


def test_a_prediction_falls_with_the_hit_ratio_and_never_above_its_bytes():
    good, bad = (machine.predicted(dict.fromkeys((0.005, 0.025, 0.05, 0.1), hit), CONFIG)
                 for hit in (0.9, 0.5))
    for a, b in zip(good["published"], bad["published"], strict=True):
        assert b["predicted"] < a["predicted"] < a["bytes only"]
    assert good["ours"].keys() == machine.MACHINES.keys()
    for name, row in good["ours"].items():
        assert all(bad["ours"][name][batch] < speed for batch, speed in row.items())


def test_no_batch_is_predicted_that_does_not_fit():
    config, gpu = shape("Llama-3.1-8B"), machine.MACHINES["RTX 4090"]
    n = machine.largest_batch(config, 120_000, gpu, CONFIG)
    need = [plan(Run(config, 120_000, batch, chunk=2048, cache_ratio=0.05, retro=CONFIG)).peak
            for batch in (n, n + 1)]
    assert 0 < n < 8 and need[0] <= 24 * GIB < need[1]
