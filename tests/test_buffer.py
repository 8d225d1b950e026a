"""The wave buffer: nothing but rounding knows of it, and it holds what a Python cache would."""
import functools
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import LONG, SMALL, fixed, qkv

from buffer import (
    BLOCK,
    CLOCK,
    LRU,
    BlockCache,
    WaveBuffer,
    bring_op,
    host_memory,
    offload,
)
from generate import call, eager_step, generate, step
from model import load
from retroinfer import RetroConfig, Store, WaveIndex, before, gather_clusters

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------- against a cache in Python

class DictLRU(dict):
    """Blocks in order of their last use."""

    def __init__(self, S):
        self.S = S

    def step(self, blocks):
        hits = [b in self for b in blocks]
        for b in reversed(blocks):                      # the best last: most recently used
            self.pop(b, None)
            self[b] = True
        for b in list(self)[:max(len(self) - self.S, 0)]:
            del self[b]
        return hits


class ListCLOCK(list):
    """Blocks in slots; a hand that clears marks until it finds none."""

    def __init__(self, S):
        super().__init__([None] * S)
        self.marks, self.hand = [False] * S, 0

    def step(self, blocks):
        hits = [b in self for b in blocks]
        for b in (b for b, hit in zip(blocks, hits, strict=True) if hit):
            self.marks[self.index(b)] = True
        for b in (b for b, hit in zip(blocks[:len(self)], hits, strict=False) if not hit):
            while self.marks[self.hand]:
                self.marks[self.hand] = False
                self.hand = (self.hand + 1) % len(self)
            self[self.hand], self.marks[self.hand] = b, True
            self.hand = (self.hand + 1) % len(self)
        return hits


def accesses(n_steps, shape, M, n_blocks, S):
    """Blocks (B, H, M) of each step, distinct, and which of them are asked for: every head has a
    manner of its own, each made to hurt a cache in another way."""
    heads, g = math.prod(shape), torch.Generator().manual_seed(S)
    manner = torch.arange(heads) % 6
    weight = 1 / (torch.arange(n_blocks) + 1.0)
    for t in range(n_steps):
        p = torch.ones(heads, n_blocks)                             # 0: any block, alike
        p[manner == 1] = weight                                     # a few again and again
        p[manner == 2] = weight.roll(t // 20 * 7)                   # ... that change now and then
        p[manner == 3] = 1e-9 + (torch.arange(n_blocks) < S + 2).float()    # just too many
        blocks = p.multinomial(M, generator=g)
        ring = torch.arange(M) + t * M                              # 4: round a ring that is one
        blocks[manner == 4] = ring % max(S + 1, M)                  # block longer than the cache
        blocks[manner == 5] = torch.arange(M).roll(t % M)           # the same ones in turn
        n = torch.randint(0, M + 1, (heads, 1), generator=g)
        n[(manner >= 3) & (manner < 5)] = M
        yield blocks.view(*shape, M), (torch.arange(M) < n).view(*shape, M)


@pytest.mark.parametrize("policy, oracle", [(LRU, DictLRU), (CLOCK, ListCLOCK)])
@pytest.mark.parametrize("S", [0, 7, *(pytest.param(S, marks=pytest.mark.slow)
                                       for S in (1, 24, 60))])
def test_a_million_accesses_hit_and_leave_what_a_python_cache_does(policy, oracle, S):
    """Five sizes, from none to more than a step asks for, each with more than 200,000 accesses."""
    B, H, M, n_blocks = 4, 24, 24, 90
    cache, n_asked = BlockCache(B, H, n_blocks, S, policy), 0
    truth, seen = [oracle(S) for _ in range(B * H)], torch.zeros(B, H, n_blocks, dtype=torch.bool)
    for blocks, is_asked in accesses(140, (B, H), M, n_blocks, S):
        hits = [o.step(b[a].tolist()) for o, b, a in zip(
            truth, blocks.flatten(0, 1), is_asked.flatten(0, 1), strict=True)]
        slots = cache.lookup(blocks, is_asked)
        assert (slots >= 0)[is_asked].tolist() == [x for hit in hits for x in hit]
        assert seen.gather(-1, blocks)[slots >= 0].all()            # a hit only after admission
        seen.scatter_(-1, blocks, seen.gather(-1, blocks) | is_asked)
        places = cache.admit(blocks, is_asked, slots)
        assert ((places == S) | ((slots < 0) & is_asked)).all()
        resident = torch.zeros(B * H, n_blocks, dtype=torch.bool)
        for row, o in zip(resident, truth, strict=True):
            row[[b for b in o if b is not None]] = True
        check_agreement(cache, resident.view(B, H, n_blocks))
        n_asked += int(is_asked.sum())
    assert n_asked > 200_000


def check_agreement(cache, resident):
    """The table names exactly the resident blocks, each in a slot that names it in turn."""
    table, owner = cache.table[..., :-1], cache.owner[..., :-1]
    assert torch.equal(table >= 0, resident)
    named = cache.owner.gather(-1, table.masked_fill(table < 0, cache.S).long())
    assert torch.equal(named[resident], resident.nonzero()[:, 2].int())
    assert ((owner < cache.n_blocks).sum(-1) == resident.sum(-1)).all()     # and none besides


# ---------------------------------------------------------------- nothing but rounding

def run(config, q, k, v, lengths, make=Store):
    """(caches, outputs) of a prefill of lengths[b] tokens of each row, and steps to the end."""
    B, longest = len(k), max(lengths)
    wave, room, outputs = WaveIndex(config, k.shape[2], batch=B, make_store=make), 0, []
    for b, n in enumerate(lengths):
        for part in zip(*(x[b:b + 1, :, :n].split(97, 2) for x in (q, k, v)), strict=True):
            outputs.append(wave.prefill(*part, b).flatten())
    for t in range(k.shape[2] - longest):
        room = room or wave.update()
        rows = [[x[b, :, n + t:n + t + 1] for b, n in enumerate(lengths)] for x in (q, k, v)]
        outputs.append(wave.decode(*map(torch.stack, rows)).flatten())
        room -= 1
    return wave, torch.cat(outputs)


def far(make):
    """As where the store is on another device than the cache: what is read of it is a copy, in
    which nothing else is to be relied on."""
    def build(*args):
        made = make(*args)
        made.is_near, bring = False, made.bring

        def poisoned(row, first, known, end):
            copies = bring(row, first, known, end)
            for x in copies:
                x[:, :, known - first:] = math.nan
            return copies
        made.bring = poisoned
        return made
    return build


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_offload_changes_nothing_but_rounding(data):
    """Any share of slots, both policies, both fetches, ragged batches, over index updates. What is
    kept is the same, bit for bit; a library's kernel may round by where its rows lie."""
    def some(low, high):
        return data.draw(st.integers(low, high))

    cluster = some(1, 20)
    config = RetroConfig(sink=some(0, 5), local=some(1, 9), update=cluster * some(1, 4),
                         min_retrieve=1, segment=cluster * some(1, 12), cluster=cluster,
                         iterations=some(1, 3),
                         retrieve=data.draw(st.sampled_from([0, .05, .3, 1])), estimate=.2)
    lengths = [some(1, 200) for _ in range(some(1, 3))]
    q, k, v = qkv(max(lengths) + some(1, 30), B=len(lengths), G=some(1, 3), D=8 * some(1, 3),
                  seed=some(0, 9))
    make = functools.partial(
        WaveBuffer, cache_ratio=data.draw(st.sampled_from([0, .02, .1, .5, 1]) | st.floats(0, 1)),
        policy=data.draw(st.sampled_from([LRU, CLOCK])), overlap=data.draw(st.booleans()))
    wave, o = run(config, q, k, v, lengths)
    for how in (make, far(make)):
        wave_off, o_off = run(config, q, k, v, lengths, how)
        torch.testing.assert_close(o_off, o, rtol=1e-5, atol=1e-5)
        assert all(a.equal(b) for row in range(len(lengths)) for a, b in zip(
            wave_off.state(row).values(), wave.state(row).values(), strict=True))
    assert wave_off.n_clusters.equal(wave.n_clusters)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("policy", [LRU, CLOCK])
def test_a_fetch_brings_the_bytes_of_the_store_whatever_is_in_the_slots(policy, overlap):
    q, k, v = qkv(900, B=2)
    config = RetroConfig(**SMALL | {"cluster": 16, "segment": 256}, retrieve=.2)
    make = functools.partial(WaveBuffer, cache_ratio=.3, policy=policy, overlap=overlap)
    wave, _ = run(config, q, k, v, [800, 890], make)
    stored, hits = (wave.store.k, wave.store.v), []
    for seed in range(8):
        g = torch.Generator().manual_seed(seed // 2)                # every selection comes twice
        ids = torch.rand(2, 2, int(wave.n_clusters.min()), generator=g).argsort(-1)[..., :9]
        ends = wave.index.sizes.gather(-1, ids).long().cumsum(-1)
        ends = ends.clamp(max=wave.store.N)
        want = gather_clusters(wave.index, stored, wave.store.N, ids, ends)
        n, got = wave.store.counts.clone(), wave.store.fetch(wave.index, ids, ends)
        is_free = want[2][:, :, 0].isinf()
        assert want[2].equal(got[2]) and not is_free.all()
        for x, y in zip(want[:2], got[:2], strict=True):
            assert x[~is_free].equal(y[~is_free]) and y[is_free].isfinite().all()
        wave.store.admit(ids, ends, *got[:2])
        hits.append((wave.store.counts - n)[0] / (wave.store.counts - n)[1])
    assert min(hits[1::2]) > .8 > max(hits[2::2])


def test_what_is_counted_is_what_was_asked_for():
    """hits, blocks asked for and tokens read from the host add up, block by block."""
    q, k, v = qkv(600)
    config = RetroConfig(**SMALL | {"cluster": 16, "segment": 256}, retrieve=.2)
    wave, _ = run(config, q, k, v, [500], functools.partial(WaveBuffer, cache_ratio=0.2))
    fetch, want = wave.store.fetch, torch.zeros(3, dtype=torch.int64)

    def counted(index, ids, ends):
        for h in range(2):
            for c, n in zip(ids[0, h].tolist(), (ends - before(ends))[0, h].tolist(), strict=True):
                for j in range(-(-n // BLOCK)):
                    hit = wave.store.cache.table[0, h, c * len(wave.store.within) + j] >= 0
                    want.add_(torch.tensor([hit, 1, 0 if hit else min(n - j * BLOCK, BLOCK)]))
        return fetch(index, ids, ends)

    wave.store.fetch = counted                     # as one does who records a trace
    start = wave.store.counts.clone()
    wave.n_tokens.sub_(40)                          # there is room for these again
    for t in range(560, 600):
        wave.decode(*(x[:, :, t:t + 1] for x in (q, k, v)))
    assert want[1] > want[0] > 0 and torch.equal(wave.store.counts - start, want)


def test_the_slots_are_the_share_of_the_store_that_was_asked_for():
    q, k, v = qkv(5000)
    for ratio in (0, .05, .5, 1):
        make = functools.partial(WaveBuffer, cache_ratio=ratio)
        wave = WaveIndex(RetroConfig(), 5000, make_store=make)
        wave.prefill(q[:, :, :9], k[:, :, :9], v[:, :, :9])
        found = wave.store.nbytes()
        held = {id(x): x.nbytes for x in tensors(wave.store)}
        assert sum(found.values()) == sum(held.values())
        assert found["store"] == 2 * wave.store.k.nbytes
        assert abs(found["block cache"] / found["store"] - ratio) < 2 * BLOCK / 5000


def tensors(x):
    """All that hang on an object, however deep."""
    for y in vars(x).values():
        for z in y if isinstance(y, tuple | list) else [y]:
            if isinstance(z, torch.Tensor):
                yield z
            elif isinstance(z, BlockCache | LRU | CLOCK):
                yield from tensors(z)


@pytest.mark.parametrize("ratio", [-.1, 1.1, math.nan])
def test_no_share_of_slots_is_refused(ratio):
    with pytest.raises(ValueError, match="give a share between 0 and 1"):
        WaveIndex(RetroConfig(), 100, make_store=functools.partial(WaveBuffer, cache_ratio=ratio)
                  ).allocate(torch.zeros(1, 1, 1, 8))


# ---------------------------------------------------------------- the compiled step

@pytest.fixture
def model(checkpoint):
    return load(checkpoint(**LONG), device="cpu")[0]


def say(model, one_step, n, **how):
    """(caches, logits (n, B, V)) of n tokens behind a ragged batch.

    With centroids in 16 bits: what a compiler rounds otherwise may make a query in 8 bits another.
    """
    prompts = [torch.randint(3, 320, (n,), generator=torch.Generator().manual_seed(n))
               for n in (30, 250)]
    config = RetroConfig(**SMALL | {"cluster": 16, "bits": 16}, retrieve=.1, estimate=.2)
    make = offload(model, 400, 2, cache_ratio=.3, **how)
    held, got = [WaveIndex(config, 400, 2, make_store=make) for _ in model.layers], []
    list(generate(model, held, prompts, n, lambda x: fixed(x, got), one_step))
    return held, torch.stack(got)


def compiled(graphs):
    """A step whose graphs, with those inside them, go to a list."""
    torch._dynamo.reset()

    def backend(graph, _):
        graphs.append([m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)])
        return graph

    region = functools.partial(step, run=torch.compiler.nested_compile_region(call))
    return torch.compile(region, backend=backend, fullgraph=True, dynamic=False)


def asks(graphs):
    """What in these graphs waits for the host."""
    return [n.target for parts in graphs for m in parts for n in m.graph.nodes
            if n.target in ("item", "tolist", "nonzero", "cpu", "numpy")]


@pytest.mark.parametrize("policy, overlap", [
    (LRU, False), pytest.param(CLOCK, True, marks=pytest.mark.slow)])
def test_a_step_with_the_buffer_in_it_is_one_graph_that_never_asks_the_host(model, policy, overlap):
    """Through index updates, for a ragged batch; and it hits what the eager step hits."""
    graphs = []
    (fast, logits), (slow, truth) = (say(model, one_step, 130, policy=policy, overlap=overlap)
                                     for one_step in (compiled(graphs), eager_step))
    assert len(graphs) == 1 and asks(graphs) == []
    assert (fast[0].n_indexed >= 3 * 32).all()              # three updates of each sequence
    torch.testing.assert_close(logits, truth, rtol=1e-4, atol=1e-4)
    for a, b in zip(fast, slow, strict=True):
        assert a.store.counts[0] > .2 * a.store.counts[1]
        torch.testing.assert_close(a.store.counts, b.store.counts, rtol=.02, atol=0)


class Asking(LRU):
    """A planted fault."""

    def keys(self):
        return super().keys() * min(self.now.max().item(), 1)


def test_a_step_that_asks_the_host_is_found_out(model):
    graphs = []
    say(model, compiled(graphs), 3, policy=Asking)
    assert asks(graphs) == ["item"]


# ---------------------------------------------------------------- host memory, and its faults

def long_text(make):
    """The last outputs of 1,500 tokens of 64 heads: 96 MiB of K and V, which are never all there
    at once but in the store."""
    config, outputs = RetroConfig(segment=64, update=64, min_retrieve=3), []
    wave, g = WaveIndex(config, 1500, make_store=make), torch.Generator().manual_seed(0)
    for n in [62] * 24 + [1] * 8:
        q, k, v = (torch.randn(1, 64, n, 128, generator=g) for _ in range(3))
        if n == 1:
            wave.update()
        outputs.append((wave.decode if n == 1 else wave.prefill)(q, k, v)[:, :, -1:].clone())
    return torch.cat(outputs, 2)


def long_text_within(path, spare, *store):
    """Run by a process of its own, which may use no more than `spare` MiB from here on."""
    torch.set_num_threads(1)
    warm = torch.randn(1, 1, 64, 8)
    torch.nn.functional.scaled_dot_product_attention(warm, warm, warm, is_causal=True)
    now, = (int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (now * 1024 + (int(spare) << 20),) * 2)
    try:
        shape = 1, 64, 1536, 128
        memory = host_memory(2, shape, torch.float32, torch.device("cpu"), *store)
        torch.save(long_text(functools.partial(WaveBuffer, memory=memory)), path)
    except ValueError as e:
        sys.exit(str(e))


def in_a_process(*args):
    """It maps each large block for itself: in a heap, holes would count as the process's own."""
    program = "import sys, test_buffer; test_buffer.long_text_within(*sys.argv[1:])"
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "MALLOC_MMAP_THRESHOLD_": "131072"}
    return subprocess.run([sys.executable, "-c", program, *map(str, args)], text=True, check=False,
                          cwd=ROOT, env=os.environ | env, capture_output=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limit on private memory")
def test_a_store_larger_than_the_memory_decodes_from_a_file(tmp_path):
    """RLIMIT_DATA counts what is a process's own, and not a shared map of a file."""
    path, store = tmp_path / "o.pt", tmp_path / "store"
    done = in_a_process(path, 72, store)
    assert done.returncode == 0, done.stderr
    assert torch.load(path).equal(long_text(Store)) and not store.exists()
    path.unlink()
    done = in_a_process(path, 72)
    assert done.returncode == 1 and not path.exists()
    assert done.stderr.startswith("the store needs 0.1 GiB of host memory, which is not to be had")
    assert done.stderr.count("\n") == 1


def gibibyte(path):
    return host_memory(4, (1 << 28,), torch.uint8, torch.device("cpu"), path)


def test_a_full_disk_is_found_at_once_and_leaves_no_file(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(ValueError, match=r"cannot keep a store of 1.0 GiB in .*: File too lar"):
            gibibyte(tmp_path / "store")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_left_as_it_was(tmp_path):
    path = tmp_path / "store"
    path.write_text("dear to someone")
    with pytest.raises(ValueError, match="File exists"):
        gibibyte(path)
    assert path.read_text() == "dear to someone"
    with pytest.raises(ValueError, match="No such file or directory"):
        gibibyte(tmp_path / "nowhere" / "store")


def test_the_overlapped_copy_passes_opcheck():
    x, rows = torch.randn(1, 1, 3, 8), torch.tensor([[[0, -1, 2]]])
    for overlap in (False, True):
        desk = [torch.zeros_like(x), torch.zeros_like(x), rows.clone(), rows.clone()]
        torch.library.opcheck(bring_op, (desk, [x] * 2, [x + 1] * 2,
                                         [rows, -1 - rows, rows, rows], overlap))


def test_memory_is_given_once(model):
    make = offload(model, 100)
    held = [WaveIndex(RetroConfig(), 100, make_store=make) for _ in range(len(model.layers) + 1)]
    k = torch.zeros(1, 2, 1, 16)
    for cache in held[:-1]:
        cache.allocate(k)
    with pytest.raises(ValueError, match="once for each set"):
        held[-1].allocate(k)


def test_memory_that_is_not_to_be_had_is_one_line():
    with pytest.raises(ValueError, match=r"^the store needs 1048576.0 GiB .*--store$"):
        host_memory(1, (1 << 50,), torch.uint8, torch.device("cpu"))
    with pytest.raises(ValueError, match="is for a CPU"):
        host_memory(1, (1,), torch.uint8, torch.device("cuda"), "file")
