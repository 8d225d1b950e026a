"""Many questions about one text: one batch over one saved index.

    caches = [WaveIndex(config, whole_pages(config, capacity)) for _ in model.layers]
    snapshot.restore(caches)
    for cache in caches:
        spread(cache, 16)           # 16 sequences that begin alike: prefill and decode as usual

The sequences share the memory of K, V, centroids and mean values: one copy, which each sequence
maps (copy on write). A page that a sequence changes, because it indexes its own question and
answer, becomes its own. Steady zones and small numbers are each sequence's own from the beginning.
So answers are those of sequences that are asked alone.

Does not include: sharing on a GPU, or where a system has no memfd_create. There each sequence has a
copy. Programs that add up what a process maps, as top does, count the shared memory many times.
"""
import ctypes
import mmap
import os
from pathlib import Path

import torch

from app.command import read_text
from retroinfer import RUN, Index, InputError, round_up

SLOTS = 128         # so many centroids of 4 bits and 64 dims or more fill whole pages
MAP_FIXED = 16      # Linux's number: the mmap module does not have it


def read_questions(path):
    """The lines of a file that are not empty. InputError if it has none or cannot be read."""
    text = read_text(Path(path), "the questions")
    if not (lines := [line.strip() for line in text.split("\n") if line.strip()]):
        raise InputError(f"the file of questions {path} is empty: give one question a line")
    return lines


def whole_pages(config, capacity):
    """The next capacity whose centroids fill whole pages: others cannot be shared."""
    while round_up(config.slots(capacity)) % SLOTS:
        capacity += RUN
    return capacity


def spread(cache, batch):
    """Make of a WaveIndex of one sequence, which has just been read or restored, one of `batch`
    equal sequences."""
    for name, x in vars(cache.store).items():
        if isinstance(x, torch.Tensor):
            setattr(cache.store, name, share(x, batch))
    cache.index = Index(*(share(x, batch) for x in cache.index))
    for name in ("n_tokens", "n_indexed", "n_clusters", "q_energy", "k_steady", "v_steady"):
        setattr(cache, name, repeat(getattr(cache, name), batch))
    cache.limits = [repeat(x, batch) for x in cache.limits]
    cache.is_in_store = cache.is_in_store * batch


def share(x, batch):
    """x (1, ...) as (batch, ...): one copy that every row maps. Rows that are no whole pages are
    copied."""
    n = x.nbytes
    if not x.is_cpu or n % mmap.PAGESIZE or not hasattr(os, "memfd_create"):
        return repeat(x, batch)
    place = mmap.mmap(-1, n * batch, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with open(os.memfd_create("retroinfer"), "wb") as file:
        file.write(x.contiguous().view(-1).view(torch.uint8).numpy())
        file.flush()
        start = ctypes.addressof(ctypes.c_char.from_buffer(place))
        for row in range(batch):
            map_here(start + row * n, n, file.fileno())
    return torch.frombuffer(place, dtype=x.dtype).view(batch, *x.shape[1:])


def repeat(x, batch):
    """Copies (batch, ...) of x (1, ...)."""
    return x.repeat(batch, *[1] * (x.dim() - 1))


def map_here(address, n, file):
    """Map n bytes of a file over memory that is ours. What is written there does not reach it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, numbers = ctypes.c_void_p, [ctypes.c_size_t] * 2 + [ctypes.c_int] * 3
    libc.mmap.argtypes = [*numbers, ctypes.c_long]
    rights, how = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | MAP_FIXED
    if libc.mmap(address, n, rights, how, file, 0) != address:
        raise InputError(f"the questions cannot share one index ({os.strerror(ctypes.get_errno())}"
                         "): ask fewer at a time")
