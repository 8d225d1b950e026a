"""Two execution buffers: as one, as none; and what could go wrong with a second stream does not."""
import functools
from dataclasses import replace

import pytest
import torch
from steps import LONG, SMALL

import buffer
from buffer import CLOCK, LRU, Execution, Lane, WaveBuffer, host_memory
from generate import compiled_step, eager_step, generate, prefill
from model import load
from retroinfer import PLAIN, RetroConfig, Store, WaveIndex, round_up

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = RetroConfig(**SMALL | {"cluster": 16}, retrieve=.1, estimate=.2)
POISON = 1e30           # weighs nothing behind a bias of -inf, and ruins all that it is taken for


@pytest.fixture
def model(checkpoint):
    return load(checkpoint(**LONG | {"num_hidden_layers": 3}), device="cpu")[0]


class Late:
    """A Lane that begins each admission as late as it may: when something waits for it."""
    stream = True

    def __init__(self):
        self.waiting, self.most, self.last = [], 0, None

    def admits(self, table, k, is_last):
        self.last = table if is_last else self.last

    def run(self, work, table, k):
        self.waiting.append((k, work))
        self.most = max(self.most, len(self.waiting))
        if table is self.last:
            self.wait(k)

    def wait(self, k):
        """Run all up to the last one that reads the buffer of k."""
        n = max((i + 1 for i, (other, _) in enumerate(self.waiting) if other is k), default=0)
        for _ in range(n):
            self.waiting.pop(0)[1]()


class Poisoned(WaveBuffer):
    """Before a fetch its buffer is poisoned, and while it attends the other one, unless that waits
    to be admitted from. Operators stand for what they call: they lose which tensor is which."""
    waits = True

    def attend(self, *args):
        if self.waits:
            self.admission.wait(self.desk.k)
        for x in self.desk[:2]:
            x.fill_(POISON)
        return super().attend(*args)

    def fetch(self, *args):
        found = super().fetch(*args)
        for other in self.execution.desks:
            if other is not self.desk and all(k is not other.k for k, _ in self.admission.waiting):
                other.k.fill_(POISON), other.v.fill_(POISON)
        return found

    def admit_later(self):
        k, v, ids, ends = self.desk
        self.admission.run(lambda: self.admit(ids, ends, k, v), self.cache.table, k)


def say(model, make, config=CONFIG, hot=PLAIN, n=70):
    """(logits of n tokens, hits) behind a ragged batch, over two index updates."""
    prompts = [torch.randint(3, 320, (n,), generator=torch.Generator().manual_seed(n))
               for n in (30, 250)]
    caches, got = [WaveIndex(config, 400, 2, hot, make) for _ in model.layers], []

    def pick(logits):
        got.append(logits.clone())
        return logits.max(-1).indices

    list(generate(model, caches, prompts, n, pick, eager_step))
    counts = [c.store.counts for c in caches if isinstance(c.store, WaveBuffer)]
    return torch.stack(got), sum(counts)


def desks(model, kind, shared, policy, monkeypatch, lane=None):
    """A make_store whose layers take turns with two execution buffers, or have one each."""
    shape = 2, 2, round_up(400), 16
    memory = host_memory(2 * len(model.layers), shape, torch.float32, torch.device("cpu"))
    execution = Execution(len(model.layers)) if shared else None
    if lane:
        monkeypatch.setattr(buffer, "Lane", lambda device, name="copies":
                            lane if name == "admission" else Lane(device, name))
    return functools.partial(kind, memory=memory, cache_ratio=.3, policy=policy,
                             execution=execution)


@pytest.mark.parametrize("policy", [LRU, pytest.param(CLOCK, marks=pytest.mark.slow)])
def test_two_buffers_answer_as_one_and_as_none_however_late_an_admission(model, policy,
                                                                         monkeypatch):
    truth, _ = say(model, Store)
    one, hits = say(model, desks(model, WaveBuffer, False, policy, monkeypatch))
    two, hits_two = say(model, desks(model, WaveBuffer, True, policy, monkeypatch))
    lane = Late()
    late, hits_late = say(model, desks(model, Poisoned, True, policy, monkeypatch, lane))
    assert two.equal(one) and late.equal(one) and lane.most == 2 and len(one) == 70
    torch.testing.assert_close(one, truth, rtol=1e-5, atol=1e-5)
    assert hits.equal(hits_two) and hits.equal(hits_late) and hits[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("values, policy", [(1.0, LRU), (.2, CLOCK)])
def test_kernels_answer_from_two_buffers_as_pytorch_does_and_hit_as_often(model, values, policy,
                                                                          monkeypatch):
    """However late an admission. With centroids in 16 bits: of a query in 8 bits another rounding
    makes another query."""
    kernels = pytest.importorskip("kernels")
    if kernels.IS_COMPILED:
        pytest.skip("compiled for the GPU, not interpreted")
    monkeypatch.setenv("TRITON_INTERPRET", "1")     # Triton loads parts of itself when they run
    config, lane = replace(CONFIG, update=8, cluster=8, bits=16, values=values), Late()
    hot = PLAIN._replace(tripartite_attention=kernels.tripartite_attention)
    near, _ = say(model, Store, config, n=20)
    far, hits = say(model, desks(model, WaveBuffer, True, policy, monkeypatch), config, n=20)
    mine, hits_mine = say(model, desks(model, Poisoned, True, policy, monkeypatch, lane), config,
                          hot, 20)
    for truth in (near, far):
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-4)
    assert hits_mine.equal(hits) and hits[0] > 0 and lane.most == 2


def test_a_fetch_that_does_not_wait_ruins_the_slots(model, monkeypatch):
    """A planted fault: the admission of two layers before finds another layer's tokens."""
    monkeypatch.setattr(Poisoned, "waits", False)
    one, _ = say(model, desks(model, WaveBuffer, False, LRU, monkeypatch))
    with monkeypatch.context() as patch:
        lane = Late()
        lane_wait, lane.wait = lane.wait, lambda k: None
        run = lane.run

        def at_the_end(work, table, k):
            run(work, table, k)
            if table is lane.last:
                while lane.waiting:
                    lane_wait(lane.waiting[-1][0])
        lane.run = at_the_end
        late, _ = say(model, desks(model, Poisoned, True, LRU, patch, lane))
    assert not late.equal(one)


def test_the_operator_admits_what_the_buffer_admits():
    g = torch.Generator().manual_seed(0)
    for policy in (LRU, CLOCK):
        caches = [buffer.BlockCache(1, 2, 40, 7, policy) for _ in range(2)]
        slots = [[torch.zeros(1, 2, 64, 8) for _ in "kv"] for _ in caches]
        within = torch.tensor([0, 8])
        for _ in range(6):
            ids = torch.rand(1, 2, 20, generator=g).argsort(-1)[..., :5]
            ends = torch.randint(1, 17, (1, 2, 5), generator=g).cumsum(-1)
            desk = [torch.randn(1, 2, 80, 8, generator=g) for _ in "kv"] + [ids, ends]
            buffer.admit(caches[0], slots[0], within, desk)
            state = [caches[1].table, caches[1].owner, *vars(caches[1].policy).values(), *slots[1]]
            buffer.admit_op(state, [within, *desk], policy.__name__)
            for a, b in zip(slots[0] + [caches[0].table], slots[1] + [caches[1].table],
                            strict=True):
                assert a.equal(b)
        assert caches[0].table.ge(0).any()


@pytest.mark.slow
def test_a_whole_step_compiles_with_operators_that_write(model, monkeypatch):
    """As on a GPU: a fetch and an admission are operators, and a kernel copies rows."""
    kernels = pytest.importorskip("kernels")
    if kernels.IS_COMPILED:
        pytest.skip("compiled for the GPU, not interpreted")
    monkeypatch.setenv("TRITON_INTERPRET", "1")     # Triton loads parts of itself when they run
    monkeypatch.setattr(buffer, "copy_rows", kernels.copy_rows)
    ids, found = torch.arange(300) % 60 + 5, []
    hot = PLAIN._replace(tripartite_attention=kernels.tripartite_attention)
    for step in (compiled_step, eager_step):
        make_store = buffer.offload(model, 400, overlap=True)
        caches = [WaveIndex(CONFIG, 400, hot=hot, make_store=make_store) for _ in model.layers]
        logits = prefill(model, caches, [ids])
        for cache in caches:
            cache.update()
            cache.store.admission = Late()              # its stream asks for the operator
        found.append(torch.stack([step(model, caches, logits.argmax(-1)) for _ in range(3)]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
