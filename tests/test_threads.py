"""One thread works where several wait for one another, and only there."""
import ctypes
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from app import threads
from app.threads import Threads

ROOT = Path(__file__).parent.parent


class Machine:
    """A clock and threads whose speed is known: seconds of a piece with all threads, and alone."""

    def __init__(self, together, alone, busy):
        self.together, self.alone, self.busy, self.is_one = together, alone, busy, False
        self.now = self.cpu = 0.0
        self.pieces = []                        # whether one thread worked

    def limit(self, is_one):
        self.is_one = is_one

    def piece(self):
        seconds = self.alone if self.is_one else self.together
        self.now += seconds
        self.cpu += seconds * (1 if self.is_one else 1 if self.busy else 2)
        self.pieces.append(self.is_one)


@pytest.fixture
def simulate(monkeypatch):
    """simulate(n, ...): the Machine after n pieces."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def run(n, *args):
        machine = Machine(*args)
        monkeypatch.setattr(threads.time, "perf_counter", lambda: machine.now)
        monkeypatch.setattr(threads.time, "process_time", lambda: machine.cpu)
        with Threads(torch.float32, machine.limit) as found:
            for _ in range(n):
                machine.piece()
                found.end_piece()
        assert not machine.is_one               # what comes next has all threads
        return machine
    return run


def test_a_quiet_machine_keeps_all_threads(simulate):
    assert not any(simulate(100, 0.05, 0.07, False).pieces)


def test_beside_another_program_one_thread_works(simulate):
    """Where together is a hundredfold slower, trials cost an eighth of the time."""
    machine = simulate(4000, 5.0, 0.05, True)
    assert machine.pieces[:3] == [False, False, True]
    assert 4000 * 0.05 + 3 * 5 < machine.now < 4000 * 0.05 * 9 / 8 + 3 * 5


def test_serial_work_is_not_taken_for_a_busy_machine(simulate):
    """Two threads that use one core, and are faster still, are left alone but for few trials."""
    machine = simulate(1000, 0.05, 0.07, True)
    assert 0 < sum(machine.pieces) < 1000 / 8


def test_a_machine_that_gets_quiet_has_all_threads_again(simulate, monkeypatch):
    machine = simulate(50, 0.5, 0.05, True)
    assert machine.pieces[-1]
    with Threads(torch.float32, machine.limit) as found:
        found.is_one, found.all_took, found.next_trial = True, 0.5, machine.now + 1
        found.set(True)
        machine.busy, machine.together = False, 0.03
        for _ in range(100):
            machine.piece()
            found.end_piece()
    assert not any(machine.pieces[-50:])


def test_the_openmp_of_torch_takes_the_limit():
    limit = threads.openmp_limit(torch.float32)
    if limit is None:
        pytest.skip("torch brings no OpenMP of its own")
    path = next(p for p in sorted((threads.Path(torch.__file__).parent / "lib").glob("lib*omp*")))
    openmp = ctypes.CDLL(str(path))
    before, n = openmp.omp_get_max_active_levels(), torch.get_num_threads()
    x = torch.randn(300, 300)
    limit(True)
    assert openmp.omp_get_max_active_levels() == 0 and torch.get_num_threads() == n
    alone = x @ x
    limit(False)
    assert openmp.omp_get_max_active_levels() == before
    torch.testing.assert_close(x @ x, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [1, 2, 25, 100])
def test_one_thread_does_the_whole_work(dtype, n, two_threads):
    """The products of a model are the same, whatever Threads does."""
    found = Threads(dtype)
    g = torch.Generator().manual_seed(0)
    for n_in, n_out in ((576, 192), (576, 1536), (1536, 576), (1536, 8960)):
        x, w = (torch.randn(m, n_in, generator=g).to(dtype) for m in (n, n_out))
        whole = torch.nn.functional.linear(x, w)
        with found:
            found.set(True)
            # The product may get this memory: a part that no thread writes stays NaN.
            torch.empty(n * n_out, dtype=dtype).fill_(math.nan)
            alone = torch.nn.functional.linear(x, w)
        torch.testing.assert_close(alone, whole)


GRAPH = """
import torch
from generate import COMPILE
@torch.compile(**COMPILE)
def step(n, k):
    last = n.clone()
    n.add_(1)
    return (k.sum(-1) + last).softmax(-1)
n = torch.zeros(1, dtype=torch.int64)
step(n, torch.ones(64, 4096))
print(int(n))
"""


@pytest.mark.slow
def test_a_graph_that_was_cached_for_one_thread_counts_once_with_two(tmp_path):
    """Inductor's cache outlives a program, and the next one may have another number of threads."""
    for n in "12":
        env = os.environ | {"OMP_NUM_THREADS": n, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", GRAPH], cwd=ROOT, env=env, check=True,
                              capture_output=True, text=True)
        assert done.stdout == "1\n"
