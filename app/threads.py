"""Threads that give way to other programs.

The threads of a parallel loop wait for one another. Where another program takes one of their cores,
the others wait for the thread that has none, in every loop: two threads are then many times slower
than one. So the pieces of a long work are watched, and as long as one thread is faster, one works.

    threads = Threads(torch.float32)
    with threads:
        for step in steps:
            step()
            threads.end_piece()     # pieces are alike: a decode step, a layer of a prefill

The number that torch knows stays: another number would be another graph to compile. Work in 16 bits
does not give way: see openmp_limit.
"""
import ctypes
import math
import time
from pathlib import Path

import torch

BUSY = 0.75         # threads that are not disturbed keep their cores for more than this share
AGAIN = 8           # all threads are tried again after so many times what the last trial took
FIRST = 2           # seconds after which they are tried again in work of another kind


class Threads:
    """Lets one thread work where all of them together are slower."""

    def __init__(self, dtype, limit=None):
        """dtype: of the products. limit(is_one): replaces what limits torch's OpenMP, for tests."""
        self.limit, self.n = limit or openmp_limit(dtype), torch.get_num_threads()
        self.is_one = self.is_disturbed = False
        self.next_trial, self.clocks = 0.0, None

    def __enter__(self):
        self.begin()
        self.set(self.is_one)
        self.all_took = math.inf            # of pieces of this kind nothing is known yet
        self.next_trial = self.clocks[0] + (FIRST if self.is_one else 0)
        return self

    def __exit__(self, *_):
        if self.limit:
            self.limit(False)

    def begin(self):
        """The next piece begins now. Returns what the last one took: seconds, and seconds of the
        cores."""
        before, self.clocks = self.clocks, (time.perf_counter(), time.process_time())
        return [now - then for now, then in zip(self.clocks, before or self.clocks, strict=True)]

    def end_piece(self):
        """A piece has ended, and the next one begins."""
        took = self.begin()
        if self.limit and self.n > 1:
            self.choose(*took, self.clocks[0])

    def choose(self, seconds, cpu, now):
        """All threads or one, after a piece that took so many seconds, and so many of the cores."""
        is_time = now >= self.next_trial
        was_disturbed, self.is_disturbed = self.is_disturbed, cpu < BUSY * self.n * seconds
        if not self.is_one and is_time and was_disturbed and self.is_disturbed:
            self.all_took, self.next_trial = seconds, now + AGAIN * seconds
            self.set(True)
        elif self.is_one and seconds > self.all_took:       # not the threads: the work is serial
            self.next_trial = now + AGAIN * seconds
            self.set(False)
        elif self.is_one and is_time:
            self.set(False)

    def set(self, is_one):
        self.is_one = is_one
        if self.limit:
            self.limit(is_one)


def openmp_limit(dtype):
    """A function that lets one thread of torch's OpenMP work, or all. None if there is none, or if
    products of this dtype are oneDNN's: it deals a product out to all threads that torch knows, and
    the share of a thread that does not work is left undone. MKL asks how many work."""
    if dtype != torch.float32 or not torch.backends.mkl.is_available():
        return None
    folder = Path(torch.__file__).parent / "lib"
    for pattern in ("libgomp*", "libomp*", "libiomp*"):
        for path in sorted(folder.glob(pattern)):
            library = ctypes.CDLL(str(path))        # torch has loaded it: the same one
            most = library.omp_get_max_active_levels()
            return lambda is_one: library.omp_set_max_active_levels(0 if is_one else most)
    return None
