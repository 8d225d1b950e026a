"""bench.py on few tokens: it runs, and times what it says."""
from argparse import Namespace

from bench import cpu as bench


def test_a_prefill_times_its_index():
    dense, wave = (bench.one_prefill(name, 512, "float32") for name in ("dense", "wave index"))
    assert dense["indexing"] == 0
    assert 0 < wave["indexing"] < wave["seconds"]
    assert wave["peak"] >= 2**20                        # bytes


def test_a_reloaded_index_is_timed_beside_the_text(capsys):
    found = bench.reload(Namespace(tokens=[600], dtype="float32", repeats=1))
    read, loaded = (found[name][0] for name in ("text read", "index loaded"))
    assert f"| index loaded | {loaded:.2f} | {read / loaded:.1f} |" in capsys.readouterr().out
    assert found["bytes"] > 2 * 2 * 30 * 3 * 64 * 600           # K and V at least, 16 bits each
