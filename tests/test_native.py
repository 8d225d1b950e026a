"""The twin for CPUs is as exact as PyTorch, and compiles where and how it is told to."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from steps import CASES, SMALL, Case, assert_as_exact, qkv, run

import retroinfer
from generate import COMPILE, has_compiler
from native import step as native
from retroinfer import PLAIN, RetroConfig, WaveIndex

KINDS = [(torch.float32, 4), (torch.bfloat16, 4), (torch.float16, 4), (torch.float32, 16)]
QUICK = [KINDS[1], *(pytest.param(*kind, marks=pytest.mark.slow) for kind in KINDS if kind[0]
                     is not torch.bfloat16)]    # each kind and head size is compiled for itself
pytestmark = pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def poison():
    """What torch.empty hands out is NaN in every test of this file."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------- a decode step

def make(name, *args, **more):
    """A case of steps.py, with heads that this twin takes."""
    (*sizes, D, W, C), *rest = CASES[name]
    return Case((*sizes, max(D, 32), W, C), *rest, *args, **more)


@pytest.mark.parametrize("dtype, bits", QUICK, ids=str)
@pytest.mark.parametrize("values", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_as_exact_as_pytorch(name, values, dtype, bits):
    case = make(name, dtype, bits=bits, values=values)
    assert_as_exact(case.twin(native.attend), case.eager(), case.truth())


@pytest.mark.parametrize("dtype, bits", QUICK, ids=str)
@pytest.mark.parametrize("values", [1.0, 0.3])
@pytest.mark.parametrize("name", CASES)
def test_a_step_over_a_store_of_bytes_is_as_exact_as_pytorch(name, values, dtype, bits):
    case = make(name, dtype, bits=bits, values=values, store_bits=8)
    assert_as_exact(case.twin(native.attend), case.eager(), case.truth())


@pytest.mark.parametrize("name", ["plain", "ragged", "no index yet", "none estimated"])
def test_a_step_ranked_as_in_the_paper_is_as_exact_as_pytorch(name):
    case = make(name, by_mass=False, bits=16)
    assert_as_exact(case.twin(native.attend), case.eager(), case.truth())


@pytest.mark.parametrize("largest", [300, 1])
def test_clusters_of_any_size_are_read(largest):
    """Giants, and single tokens."""
    case = Case((1, 2, 2, 32, 4, 12), (9, 11, largest), [(9, 11)], [(4, 12)])
    assert_as_exact(case.twin(native.attend), case.eager(), case.truth())


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_step_of_any_shape_is_as_exact_as_pytorch(data):
    """Several tiles or a part of one, ragged budgets, heads of any number and size."""
    def some(low, high):
        return data.draw(st.integers(low, high))

    B, W, C, R = some(1, 3), some(1, 300), some(1, 700), some(1, 20)
    D = data.draw(st.sampled_from([16, 34, 80, 140]))           # each compiled once
    shape = B, some(1, 3), some(1, 9), D, W, C
    K = min(R + some(0, 400), C)
    ranked = [some(0, K) for _ in range(B)]
    shares = [(some(0, min(R, n)), n) for n in ranked]
    lives = [(some(1, W), some(0, C)) for _ in range(B)]
    dtype, bits = data.draw(st.sampled_from(KINDS))
    case = Case(shape, (min(R, C), K, some(1, 9)), shares, lives, dtype,
                by_mass=data.draw(st.booleans()), bits=bits,
                values=data.draw(st.sampled_from([1.0, 0.5, 0.2, 0.01])))
    assume(not case.is_tied())
    assert_as_exact(case.twin(native.attend), case.eager(), case.truth())


def test_a_sequence_with_nothing_to_attend_harms_no_other():
    """NaN for it, as a softmax over nothing has it, and for it alone."""
    case = Case((2, 1, 2, 32, 8, 20), (4, 12, 9), [(4, 12)] * 2, [(0, 0), (8, 20)])
    mine = case.twin(native.attend)
    assert mine[0].isnan().all() and case.eager()[0].isnan().all()
    assert_as_exact(mine[1], case.eager()[1], case.truth()[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_query_that_is_no_number_harms_no_other_head(bad):
    """As damaged weights give it: NaN comes out, and nothing is read or written out of bounds."""
    case = make("plain")
    expected = case.twin(native.attend)
    case.q = case.q.clone()
    case.q[0, 0, 0, 3] = bad
    mine = case.twin(native.attend)
    assert mine[0, 0, 0].isnan().all()
    assert torch.equal(mine[0, 1:], expected[0, 1:]) and torch.equal(mine[1:], expected[1:])


def test_the_number_of_threads_changes_no_bit():
    """Heads in parts and in turns: fewer than threads, and no multiple of them."""
    for shape in ((1, 1, 4, 64, 300, 900), (1, 3, 2, 34, 40, 600)):
        case, found = Case(shape, (60, 300, 9), [(60, 290)], [(shape[4], 900)],
                           values=0.2), []
        n = torch.get_num_threads()
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(case.twin(native.attend))
        finally:
            torch.set_num_threads(n)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_of_equally_good_clusters_the_first_count():
    """All alike but for their values: those in front are read, and what is behind is left out."""
    case = Case((1, 1, 2, 32, 1, 600), (4, 300, 1), [(4, 300)], [(1, 600)], bits=16)
    sizes = torch.ones(1, 1, 600)
    case.index = case.index._replace(
        centroids=torch.zeros(1, 1, 600, 32), sizes=sizes, offsets=sizes.long().cumsum(-1) - 1,
        means=torch.arange(600.).expand(1, 1, 32, 600).mT, spreads=0 * case.index.spreads)
    case.steady = [torch.zeros(1, 1, 1, 32)] * 2 + [torch.zeros(1, 1, 1, 1)]
    case.stores = [torch.zeros(1, 1, 600, 32), torch.full((1, 1, 600, 32), 7.0)]
    case.is_free_row = torch.zeros(1, 1, 600, dtype=torch.bool)
    expected = (4 * 7 + sum(range(4, 300))) / 301
    torch.testing.assert_close(case.twin(native.attend), torch.full((1, 1, 2, 32), expected))


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_the_longest_rows_do_not_overflow(sign):
    """Every number of a packed row as large as can be, and of the queries, 256 of them."""
    case = make("256 dims")
    case.q = torch.full_like(case.q, sign * 0.1)
    codes = torch.tensor([255, 17]).repeat(15).to(torch.uint8)[:, None]     # all 7, or all -7
    case.index = case.index._replace(centroids=codes.expand(1, 1, 30, 128).contiguous())
    assert_as_exact(case.twin(native.attend), case.eager(), case.truth())


def test_tensors_may_lie_as_they_like():
    case = Case((2, 2, 3, 48, 37, 53), (7, 33, 9), [(7, 33)] * 2, [(36, 53), (9, 20)])
    expected = case.twin(native.attend)
    spread = [[x.mT.contiguous().mT if x.ndim == 4 else x for x in xs]
              for xs in (case.steady, case.index, case.stores)]
    case.steady, case.index, case.stores = spread[0], retroinfer.Index(*spread[1]), spread[2]
    case.q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert not case.stores[0].is_contiguous() and not case.q.is_contiguous()
    assert torch.equal(case.twin(native.attend), expected)


@pytest.mark.parametrize("D, dtype, words", [
    (32, torch.float16, "float16.*float32.*cast to one"),
    *[(D, torch.float32, f"16 to 256 head dims, these are {D}") for D in (8, 272)]])
def test_what_it_does_not_know_is_refused(D, dtype, words):
    case = Case((1, 1, 1, D, 1, 1), (1, 1, 9), [(1, 1)], [(1, 0)])
    case.q = case.q.to(dtype)
    with pytest.raises(ValueError, match=words):
        case.twin(native.attend)


def test_the_operator_passes_opcheck():
    case = make("one token")
    args = (case.q, list(case.steady), list(case.index), case.stores, list(case.budget[:2]),
            [case.budget.N, case.budget.R, case.budget.K, 200, 1])
    torch.library.opcheck(native.attend_op, args)


def test_a_wave_index_steps_on_it_whether_compiled_or_not():
    """The same outputs as PyTorch's, over tokens and updates, and one graph for all."""
    torch._dynamo.reset()
    q, k, v = qkv(200, D=32)
    config = RetroConfig(**SMALL, retrieve=0.1, estimate=0.3)
    decode, outputs = WaveIndex.decode, []
    try:
        for hot, compiled in ((PLAIN, False), (NATIVE, False), (NATIVE, True)):
            if compiled:
                WaveIndex.decode = torch.compile(decode, **COMPILE)
            with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(
                    error_on_recompile=True):
                patch.setattr(retroinfer, "PLAIN", hot)
                outputs.append(run(config, q, k, v, 110)[1])
    finally:
        WaveIndex.decode = decode
    for mine in outputs[1:]:
        torch.testing.assert_close(mine, outputs[0], rtol=1e-5, atol=1e-5)


NATIVE = PLAIN._replace(attend=native.attend)


# ---------------------------------------------------------------- the compiler

@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "retroinfer"))
    native.library.cache_clear()
    yield tmp_path / "retroinfer"
    native.library.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "three queries, 80 dims", "256 dims"])
def test_a_processor_without_vectors_of_eight_is_told_the_same(cache, monkeypatch, name):
    """What GCC makes of the plain C++ that stands beside AVX2."""
    flags = [flag for flag in native.FLAGS if flag != "-march=native"]
    monkeypatch.setattr(native, "FLAGS", flags)
    case = make(name)
    assert_as_exact(case.twin(native.attend), case.eager(), case.truth())


def test_a_missing_compiler_is_one_line_with_its_remedy(cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"no-such-compiler: No such.*install g\+\+ or set CXX"):
        native.library("float32", "float32", "uint8", 64)


def test_what_does_not_compile_is_one_line_with_the_compilers_word(cache, monkeypatch, tmp_path):
    source = tmp_path / "step.cpp"
    source.write_text("int attend( { return 0; }\n")
    monkeypatch.setattr(native, "SOURCE", source)
    with pytest.raises(ValueError, match=r"not compile step.cpp \(.*error.*--backend"):
        native.library("float32", "float32", "uint8", 64)
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot keep .* set TORCHINDUCTOR_CACHE_DIR"):
        native.build(tmp_path / "file" / "native.so", "-DNUM=float32", "-DKEPT=float32",
                     "-DROW=uint8", "-DDIMS=64")


@pytest.mark.slow
def test_two_processes_share_a_cache_and_mend_it(cache, monkeypatch):
    """Both begin at a damaged file, and end with a whole one, which a third only loads."""
    cache.mkdir()
    path = cache / f"native-float32-float32-uint8-64-{native.key()}.so"
    path.write_bytes(b"no library")
    both = [start() for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert list(cache.iterdir()) == [path] and path.stat().st_size > 10000
    written = path.stat().st_mtime_ns
    assert start().wait() == 0 and path.stat().st_mtime_ns == written


def start():
    program = "from native import step; step.library('float32', 'float32', 'uint8', 64).attend"
    root = Path(native.__file__).parent.parent
    return subprocess.Popen([sys.executable, "-c", program], cwd=root)


def test_the_cache_tells_sources_compilers_and_flags_apart(monkeypatch, tmp_path):
    keys = {native.key()}
    with monkeypatch.context() as patch:
        patch.setattr(native, "FLAGS", (*native.FLAGS, "-DMORE"))
        keys.add(native.key())
    source = tmp_path / "step.cpp"
    source.write_text(native.SOURCE.read_text() + "\n")
    monkeypatch.setattr(native, "SOURCE", source)
    assert len(keys | {native.key()}) == 3
