"""The wave buffer: K and V on the host, and on the device the blocks that steps keep asking for.

A cluster is cut into blocks of 8 tokens. A head has S slots for blocks; a table says which slot
holds a block, and all of it is tensors, so that a step resolves hits and misses without a word to
the host. What a step missed is admitted behind its attention, where older blocks go. On a GPU that
happens beside the next layer, which fetches to the other one of two execution buffers.

        device                                              host
    ┌───────────────────────────────┐                   ┌──────────────────────────────┐
    │ slots  k, v  (B, H, S, 8, D)  │                   │ store  k, v  (B, H, T, D)    │
    │ table  (B, H, C*n)            │ ◄──── admit       │ sink | clusters | latest     │
    └──────────────┬────────────────┘         ▲         └──────────────┬───────────────┘
                   │ hits                     │                        │ misses
                   └───────► execution buffer  k, v  (B, H, N, D) ◄────┘

    B batch    H kv heads   T tokens   D head dim   C clusters a head   S slots a head
    R clusters retrieved    N tokens retrieved      n blocks a cluster  M blocks asked for: R*n

    make_store = buffer.offload(model, capacity)            # one store for the layers of a model
    caches = [WaveIndex(config, capacity, hot=hot, make_store=make_store) for _ in model.layers]

Chen et al. (arXiv 2505.02922), §4.3. As published, a step looks up all it asks for before it admits
anything; here a block is the unit, where they admit a whole cluster, and no CPU thread is asked.

Prefill is exact: for it the past of a sequence comes to the device, one layer's at a time, while
what the layer before changed is on its way back. To account: WaveBuffer.nbytes(). To trace: replace
fetch(index, ids (B, H, R), ends (B, H, R)) of a WaveBuffer; ids are in order of rank, and cluster i
is asked for where ends[..., i] exceeds the end before it.

Does not include: look-ahead (a query guessed from the layer before would find 7 in 10 misses early,
for a second ranking and a third more traffic); files as a GPU's store: it reads pinned memory only.
"""
import functools
import itertools
import math
import mmap
import os
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F

from retroinfer import InputError, Store, before, bias_of, flat_rows, round_up, take, unroll

RATIO = 0.05            # of K and V that the device has room for (§4.3)
BLOCK = 8               # tokens of a block: 2 KB of keys of 128 dims in 16 bits (§4.3)
# Numbers of a RetroConfig that suit a buffer. A block brings all its values, so fewer clusters are
# retrieved.
OFFLOADED = {"retrieve": 0.03, "min_retrieve": 16, "values": 1.0}


# ---------------------------------------------------------------- which block is in which slot

class LRU:
    """The block goes first that was not asked for longest: a mark is when it last was."""

    def __init__(self, B, H, S, device):
        self.mark = torch.arange(-S, 1, device=device).expand(B, H, -1).clone()     # (B, H, S+1)
        self.now = torch.zeros(B, H, 1, dtype=torch.int64, device=device)

    def touch(self, slots, position):
        """Slots (B, H, M) are asked for in a step, the one of the least position most recently."""
        self.now.add_(position.shape[-1])
        self.enter(slots, position)

    def keys(self):
        """(B, H, S), distinct: the slot of the least goes first."""
        return self.mark[..., :-1]

    def enter(self, slots, position):
        """Slots (B, H, M) have new blocks, asked for in this step."""
        self.mark.scatter_(-1, slots, self.now - position)


class CLOCK:
    """A hand goes round: it takes the mark of a marked block, and the slot of one without."""

    def __init__(self, B, H, S, device):
        self.mark = torch.zeros(B, H, S + 1, dtype=torch.int64, device=device)
        self.hand = torch.zeros(B, H, 1, dtype=torch.int64, device=device)

    def touch(self, slots, position):
        self.mark.scatter_(-1, slots, 1)

    def keys(self):
        """How far the hand has to go to take each slot: a round more where it finds a mark."""
        S = self.mark.shape[-1] - 1
        ahead = (torch.arange(S, device=self.mark.device) - self.hand) % max(S, 1)
        return ahead + self.mark[..., :-1] * S

    def enter(self, slots, position):
        """New blocks are marked, but where the hand has come by again since."""
        S, keys = self.mark.shape[-1] - 1, self.keys()
        taken = F.pad(keys, (0, 1), value=-1).gather(-1, slots)             # (B, H, M)
        last = taken.amax(-1, keepdim=True)
        self.mark[..., :-1].mul_(keys % max(S, 1) > last)
        self.mark.scatter_(-1, slots, (taken + S > last).long())
        self.hand.copy_((self.hand + last + 1) % max(S, 1))


class BlockCache:
    """Which of n_blocks blocks lie in the S slots of each head.

    A step asks for distinct blocks in order of rank. All are looked up together. Then the blocks
    that were found are touched. A block that was not found is admitted if it is among the S best of
    the step: in order of rank, each into the slot that the policy gives up next. The last entry of
    table and owner stands for no block and no slot: masked writes go there.
    """

    def __init__(self, B, H, n_blocks, S, policy=LRU, device=None):
        kind = {"dtype": torch.int32, "device": device}
        self.n_blocks, self.S, self.policy = n_blocks, S, policy(B, H, S, device)
        self.table = torch.full((B, H, n_blocks + 1), -1, **kind)   # slot of a block, or -1
        self.owner = torch.full((B, H, S + 1), n_blocks, **kind)    # block of a slot, or n_blocks

    def lookup(self, blocks, is_asked):
        """Slots (B, H, M) of blocks (B, H, M), -1 of those not there or not asked for."""
        return self.table.gather(-1, blocks).long().masked_fill(~is_asked, -1)

    def admit(self, blocks, is_asked, slots):
        """Slots (B, H, M) that the blocks get which lookup did not find; S where one gets none."""
        position = is_asked.cumsum(-1) - 1                                  # (B, H, M)
        self.policy.touch(slots.masked_fill(slots < 0, self.S), position)
        is_new = is_asked & (slots < 0) & (position < self.S)
        n = min(blocks.shape[-1], self.S)
        victims = self.policy.keys().topk(n, largest=False, sorted=True).indices
        nth = (is_new.cumsum(-1) - 1).masked_fill(~is_new, n)
        places = F.pad(victims, (0, 1), value=self.S).gather(-1, nth)       # (B, H, M)
        self.policy.enter(places, position)
        blocks = blocks.masked_fill(~is_new, self.n_blocks)
        self.table.scatter_(-1, self.owner.gather(-1, places).long(), -1)
        self.table.scatter_(-1, blocks, places.int())
        self.owner.scatter_(-1, places, blocks.int())
        return places


# ---------------------------------------------------------------- the wave buffer

class WaveBuffer(Store):
    """The Store of one WaveIndex on the host, with its block cache on the device.

    wave, T, like: as retroinfer.Store takes them. memory: yields two tensors of the host, as
    host_memory does. cache_ratio: slots as a share of the store's rows, 0 to 1. The last block of
    a cluster may be partly filled, so a ratio of 1 keeps most of the store and not all of it.
    InputError if there is no such memory.
    """

    def __init__(self, wave, T, like, memory=None, cache_ratio=RATIO, policy=LRU, overlap=False,
                 execution=None):
        check_ratio(cache_ratio)
        B, H, D = len(wave.n_tokens), like.shape[1], like.shape[3]
        (R, _, self.N), C = wave.most, wave.index.sizes.shape[2]
        S = round(cache_ratio * T / BLOCK)
        memory = memory or host_memory(2, (B, H, T, D), like.dtype, like.device)
        stores = list(itertools.islice(memory, 2))
        if len(stores) < 2:
            raise ValueError("other caches hold this memory: call offload() once for each set")
        self.k, self.v = stores
        self.within = torch.arange(0, wave.config.largest, BLOCK, device=like.device)   # (n,)
        self.cache = BlockCache(B, H, C * len(self.within), S, policy, like.device)
        self.slots = [like.new_zeros(B, H, (S + 1) * BLOCK, D) for _ in range(2)]
        execution = execution or Execution(n_layers=1)
        self.execution = execution
        self.desk, is_last = execution.take((B, H, self.N, D), R, like)
        self.admission = Lane(like.device, "admission")
        self.admission.admits(self.cache.table, self.desk.k, is_last)
        self.lane, self.is_near = Lane(like.device), like.device == self.k.device
        self.counts = torch.zeros(3, dtype=torch.int64, device=like.device)
        self.overlap = overlap

    @property
    def writes(self):
        """Whether operators that write to their arguments fetch and admit."""
        return self.overlap or self.admission.stream is not None

    def attend(self, hot, q, steady, index, budget, method):
        """hot.tripartite_attention. The blocks that were not on the device are admitted beside what
        comes next."""
        fetch = functools.partial(self.fetch, index)
        o = hot.tripartite_attention(q, steady, index, budget, fetch, method)
        self.admit_later()
        return o

    def fetch(self, index, ids, ends):
        """retroinfer.gather_clusters: what slots hold from there, the rest from the host. Behind
        the tokens an execution buffer holds what it held before."""
        misses, hits, bias = self.locate(index, ids, ends)
        bring = bring_op if self.writes else bring_plain
        rows = [misses, hits, ids, ends]
        bring(list(self.desk), list(self.tensors()), self.slots, rows, self.overlap)
        return self.desk.k, self.desk.v, bias

    def locate(self, index, ids, ends):
        """Rows (B, H, N) in the store and in the slots, negative where the other has it; bias."""
        blocks, is_asked, block_ends = self.ask(ids, ends)
        slots = self.cache.lookup(blocks, is_asked)                         # (B, H, M)
        first = index.offsets.gather(-1, ids)[..., None] + self.within
        first = first.flatten(2).masked_fill(slots >= 0, -BLOCK)            # its rows are negative
        misses, hits = (unroll(x, block_ends, self.N) for x in (first, slots * BLOCK))
        self.counts.add_(torch.stack([x.sum() for x in (slots >= 0, is_asked, misses >= 0)]))
        return misses, hits, bias_of((misses < 0) & (hits < 0))

    def ask(self, ids, ends):
        """Blocks (B, H, M) of clusters, which of them are asked for, and where they end, packed."""
        return blocks_of(self.within, ids, ends)

    def admit_later(self):
        """admit what the execution buffer holds, beside what the device does next."""
        state = [self.cache.table, self.cache.owner, *vars(self.cache.policy).values(), *self.slots]
        if self.admission.stream:
            admit_op(state, [self.within, *self.desk], type(self.cache.policy).__name__)
        else:
            k, v, ids, ends = self.desk
            self.admission.run(lambda: self.admit(ids, ends, k, v), self.cache.table, k)

    def admit(self, ids, ends, k, v):
        """Copy to slots what fetch brought, packed as k, v (B, H, N, D), and was not there."""
        admit(self.cache, self.slots, self.within, (k, v, ids, ends))

    def view(self, row, first, end):
        """Views k, v (1, H, end - first, D) of rows of a sequence, on the host."""
        self.lane.drain()
        return super().view(row, first, end)

    def bring(self, row, first, known, end):
        """Device copies of rows `first` to `end` of the store, of which those up to `known` are
        filled. If the store is already on the device, the rows themselves."""
        rows = self.view(row, first, end)
        if self.is_near:
            return rows
        device = self.slots[0].device
        return [send(x[:, :, :known - first], x.new_empty(x.shape, device=device)) for x in rows]

    def put(self, row, first, k, v):
        """Send k, v (1, H, n, D) to the store, beside what the device does next."""
        if self.is_near:
            return super().put(row, first, k, v)
        rows = self.view(row, first, first + k.shape[2])
        with self.lane.fork():      # else the copy could begin before the tokens are in order
            for x, copy in zip(rows, (k, v), strict=True):
                send(copy, x)
        self.lane.keep(k, v)        # else their memory could be used before they are copied

    def nbytes(self):
        """Bytes allocated, by part. The store is on the host, the others are on the device."""
        state = self.cache.table, self.cache.owner, *vars(self.cache.policy).values()
        parts = {"block cache": self.slots, "execution buffer": self.desk,
                 "its tables": (*state, self.within, self.counts), "store": self.tensors()}
        return {name: sum(x.nbytes for x in part) for name, part in parts.items()}

    def facts(self):
        """What steps asked for so far: blocks found on the device, blocks asked for, host bytes."""
        hits, asked, rows = self.counts.tolist()
        row = 2 * self.k.shape[3] * self.k.element_size()                   # bytes of K and V
        return {"hits": hits, "asked": asked, "host_bytes": rows * row}


class Desk(NamedTuple):
    """An execution buffer: what a step attends to beside the steady zone."""
    k: torch.Tensor     # (B, H, N, D)
    v: torch.Tensor     # (B, H, N, D)
    ids: torch.Tensor   # (B, H, R) of the clusters that lie there
    ends: torch.Tensor  # (B, H, R) where they end


class Execution:
    """The two execution buffers that the layers of a model take in turn (§4.3): while one layer's
    tokens are admitted from one, the next layer fetches to the other."""

    def __init__(self, n_layers):
        self.n_layers, self.n_taken, self.desks = n_layers, 0, []

    def take(self, shape, R, like):
        """(a Desk for the next layer, whether it is the last layer)."""
        if len(self.desks) < 2:
            self.desks.append(Desk(*(like.new_zeros(shape) for _ in "kv"), *(
                like.new_zeros(*shape[:2], R, dtype=torch.int64) for _ in "ie")))
        self.n_taken += 1
        return self.desks[(self.n_taken - 1) % 2], self.n_taken >= self.n_layers


def check_ratio(cache_ratio):
    """InputError if it is no share."""
    if not 0 <= cache_ratio <= 1:
        raise InputError(f"cache ratio is {cache_ratio}: give a share between 0 and 1")


def send(x, to):
    """to, to whose first rows x (1, H, n, D) begins to be copied: a run of memory a head."""
    for h in range(x.shape[1]):
        to[0, h, :x.shape[2]].copy_(x[0, h], non_blocking=True)
    return to


def blocks_of(within, ids, ends):
    """WaveBuffer.ask, for blocks that begin at `within` (n,) in a cluster."""
    starts, ends = before(ends)[..., None] + within, ends[..., None]                # (B, H, R, n)
    blocks = ids[..., None] * len(within) + within // BLOCK
    block_ends = (starts + BLOCK).minimum(ends)
    return blocks.flatten(2), (starts < ends).flatten(2), block_ends.flatten(2)


def admit(cache, slots, within, desk):
    """Give blocks of a Desk that a BlockCache does not hold a slot, and copy them there."""
    k, v, ids, ends = desk
    blocks, is_asked, block_ends = blocks_of(within, ids, ends)
    places = cache.admit(blocks, is_asked, cache.lookup(blocks, is_asked))
    rows = before(block_ends)[..., None] + torch.arange(BLOCK, device=k.device)     # (B, H, M, 8)
    rows = rows.masked_fill((places == cache.S)[..., None], 0).clamp(max=k.shape[2] - 1)
    to = flat_rows(places, cache.S + 1)
    for slot, x in zip(slots, (k, v), strict=True):
        brought = take(x, rows.flatten(2)).view(len(to), -1)                # (B*H*M, 8*D)
        slot.view(-1, brought.shape[1]).index_copy_(0, to, brought)


@torch.library.custom_op("retroinfer::admit", mutates_args={"state"})
def admit_op(state: list[torch.Tensor], given: list[torch.Tensor], policy: str) -> None:
    """admit on a stream of its own, for a cache of `state`: its tables, its policy's, and slots. To
    the compiler, which knows no second stream, one operation."""
    table, owner, *marks, k, v = state
    cache = BlockCache.__new__(BlockCache)
    cache.table, cache.owner = table, owner
    cache.n_blocks, cache.S = table.shape[-1] - 1, owner.shape[-1] - 1
    kind = {"LRU": LRU, "CLOCK": CLOCK}[policy]
    cache.policy = kind.__new__(kind)
    vars(cache.policy).update(zip({"LRU": ("mark", "now"), "CLOCK": ("mark", "hand")}[policy],
                                  marks, strict=True))
    within, *desk = given
    Lane(table.device, "admission").run(lambda: admit(cache, (k, v), within, desk), table, desk[0])


@admit_op.register_fake
def _(state, given, policy):
    return None


def copy_rows(out, source, rows):
    """out (B, H, N, D), but rows (B, H, N) of source (B, H, T, D) where those are not negative."""
    if out.is_cuda:             # its source may be the host's memory, which only a kernel reads
        import kernels
        return kernels.copy_rows(out, source, rows)
    return torch.where(rows[..., None] < 0, out, take(source, rows.clamp(min=0)))


def fill(out, store, misses, slots, hits):
    """Write rows `misses` of a store and rows `hits` of slots to out (B, H, N, D), in place."""
    found = copy_rows(copy_rows(out, store, misses), slots, hits)
    if found is not out:
        out.copy_(found)


def bring_plain(desk, stores, slots, rows, overlap=False):
    """Fill a Desk: rows (B, H, N) `misses` of two stores, `hits` of two slots; its ids and ends."""
    misses, hits, ids, ends = rows
    for out, store, slot in zip(desk[:2], stores, slots, strict=True):
        fill(out, store, misses, slot, hits)
    for kept, x in zip(desk[2:], (ids, ends), strict=True):
        kept[..., :x.shape[-1]].copy_(x)    # else their memory could be used before they are read


def bring_overlapped(desk, stores, slots, rows):
    """bring_plain, with the misses on the copy stream and the hits on this one."""
    misses, hits = rows[:2]
    none, lane = torch.full_like(hits, -1), Lane(hits.device)
    with lane.fork():           # else the rows could still be read as what they were before
        for out, store in zip(desk[:2], stores, strict=True):
            fill(out, store, misses, store, none)
    bring_plain(desk, slots, slots, [none, *rows[1:]])
    lane.join()                 # else attention could read rows that are yet to come


@torch.library.custom_op("retroinfer::bring", mutates_args={"desk"})
def bring_op(desk: list[torch.Tensor], stores: list[torch.Tensor], slots: list[torch.Tensor],
             rows: list[torch.Tensor], overlap: bool) -> None:
    """bring_plain, to the compiler one operation: it knows no second stream."""
    # else it could overwrite tokens that the layer before the last is still admitting
    Lane(desk[0].device, "admission").wait(desk[0])
    (bring_overlapped if overlap else bring_plain)(desk, stores, slots, rows)


@bring_op.register_fake
def _(desk, stores, slots, rows, overlap):
    return None


@functools.cache                                        # one a device and name
class Lane:
    """A stream beside the one of the computation; without a GPU, no stream and nothing to wait.

    Layers share one compiled body. So what differs from layer to layer, which execution buffer is
    read and whether the step ends, is looked up by address while the device is given its work.
    """

    def __init__(self, device, name="copies"):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ends, self.events = {}, {}         # whether a step ends with a table; by buffer

    def admits(self, table, k, is_last):
        """A table whose admissions, from the execution buffer of k, may end later; with the last of
        them a step ends. Of other tensors, copies that a compiler made, none may."""
        if self.stream:
            self.ends[table.data_ptr()] = is_last
            self.events.setdefault(k.data_ptr(), None)

    def run(self, work, table, k):
        """Run an admission to a table, from the execution buffer of k, beside what comes next."""
        if not self.stream:
            return work()
        with self.fork():       # else it could read tokens, or fill slots, of an unfinished fetch
            work()
        is_known = k.data_ptr() in self.events and table.data_ptr() in self.ends
        if is_known and not self.ends[table.data_ptr()]:
            self.events[k.data_ptr()] = self.stream.record_event()
        else:
            self.join()         # else the next step could look up a table that is being written,
            self.events = dict.fromkeys(self.events)    # and a graph could end without this stream

    def wait(self, k):
        """What comes next starts behind the admission from the execution buffer of k."""
        if self.stream and k.data_ptr() not in self.events:
            self.join()
        elif self.stream and (event := self.events[k.data_ptr()]):
            torch.cuda.current_stream(self.stream.device).wait_event(event)

    @contextmanager
    def fork(self):
        """What is called inside starts behind what came before, beside what comes next."""
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):            # of None: nothing
            yield

    def join(self):
        """What comes next starts behind what the lane was given."""
        if self.stream:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def keep(self, *tensors):
        """Free the memory of tensors not before the lane has done what it was given."""
        for x in tensors if self.stream else ():
            if x.is_cuda:
                x.record_stream(self.stream)

    def drain(self):
        """Wait for what the lane was given: else rows could be read before they arrive."""
        if self.stream:
            self.stream.synchronize()


# ---------------------------------------------------------------- host memory

def host_memory(n, shape, dtype, device, path=None):
    """An iterator over n tensors of the host: plain, pinned for a GPU, or mapped from a file.

    The file must be new. It gets all its space at once, so that no later write can fail. It loses
    its name at once, so that its space is free when the process ends. InputError if there is no
    such memory.
    """
    nbytes, is_pinned = math.prod(shape) * dtype.itemsize, device.type == "cuda"
    if path and is_pinned:
        raise InputError(f"a store in a file, {path}, is for a CPU: a GPU reads pinned memory only")
    pieces = mapped(path, n, nbytes) if path else plain(n, nbytes, is_pinned)
    return iter([x.view(dtype).view(shape) for x in pieces])


def pinned_blocks(n, nbytes):
    """Bytes of the blocks that hold n tensors of nbytes each: powers of two, the largest first.

    torch rounds pinned memory up to a power of two. Rounded one by one, tensors of 272 MiB would
    take 512 MiB each.
    """
    while n:
        size = 1 << (n * nbytes).bit_length() - 1
        if size < nbytes:                               # one is left
            size = 1 << (nbytes - 1).bit_length()
        yield size
        n -= min(size // nbytes, n)


def plain(n, nbytes, is_pinned):
    """n tensors of bytes."""
    sizes = pinned_blocks(n, nbytes) if is_pinned else n * [nbytes]
    try:
        blocks = [torch.empty(size, dtype=torch.uint8, pin_memory=is_pinned) for size in sizes]
        return [x for block in blocks for x in block.split(nbytes) if len(x) == nbytes][:n]
    except RuntimeError as e:
        raise InputError(f"the store needs {n * nbytes / 2**30:.1f} GiB of host memory, which is "
                         f"not to be had ({str(e).splitlines()[0]}): lower --capacity, or keep it "
                         "in a file with --store") from None


def mapped(path, n, nbytes):
    """n tensors of bytes in a file without a name."""
    pitch = -(-nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
    try:
        with open(path, "x+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, n * pitch)
                maps = [mmap.mmap(file.fileno(), nbytes, offset=i * pitch) for i in range(n)]
            finally:
                os.unlink(path)
    except OSError as e:
        raise InputError(f"cannot keep a store of {n * pitch / 2**30:.1f} GiB in {path}: "
                         f"{e.strerror}") from None
    return [torch.frombuffer(x, dtype=torch.uint8) for x in maps]


def offload(model, capacity, batch=1, path=None, **how):
    """A make_store for the WaveIndex of each layer that has one. All host memory is allocated now.

    path: that of a new file to keep it in. how: cache_ratio, policy, overlap. OFFLOADED has the
    numbers that suit it; with others every value of a block is copied too, read or not.
    """
    c, weight = model.config, model.lm_head.weight
    shape = batch, c.num_key_value_heads, round_up(capacity), c.head_dim
    memory = host_memory(2 * c.n_wide, shape, weight.dtype, weight.device, path)
    return functools.partial(WaveBuffer, memory=memory, execution=Execution(c.n_wide), **how)
