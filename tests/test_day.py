"""The day on a GPU, without one: limits, what a cut leaves, the table, and a dry run."""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("kernels", reason="needs Triton")
from bench import day, gpu
from bench.predict import layer_bytes
from bench.timing import write_json
from retroinfer import InputError, RetroConfig

ROOT = Path(__file__).parent.parent
PREDICTED = json.loads((ROOT / "results" / "predicted.json").read_text())


def test_all_parts_together_take_less_than_eight_minutes():
    assert list(day.SECONDS) == list(day.PARTS) and sum(day.SECONDS.values()) <= 450
    for name, seconds in day.SECONDS.items():           # the docstring gives the same limits
        assert f"    {name:<8} {seconds:>3} s   " in day.__doc__


def test_a_part_that_fails_leaves_what_it_had(tmp_path, monkeypatch):
    def broken(scope):
        yield "cells", 1
        yield "cells", 2
        raise ValueError("no more")
    monkeypatch.setitem(day.PARTS, "layers", broken)
    with pytest.raises(ValueError):
        day.run_part("layers", None, tmp_path)
    assert json.loads((tmp_path / "day-layers.json").read_text()) == {"cells": [1, 2]}


def test_a_part_is_cut_at_its_limit_and_the_day_goes_on(tmp_path, monkeypatch):
    """A new day does not report the numbers of an earlier day."""
    monkeypatch.chdir(ROOT)
    write_json(tmp_path / "day-model.json", {"decode": ["old"]})
    args = argparse.Namespace(out=tmp_path, share=.001, dry_run=True)
    found = day.run_day(["layers", "model"], args)
    assert found == json.loads((tmp_path / "day.json").read_text())
    for part in found["parts"].values():
        assert part["ended"] == "cut at its limit" and part["facts"] == {}
    table = day.page(found, PREDICTED)[-1]
    assert "measured yet" in table and "4.5 x" in table


def test_the_table_sets_what_was_measured_beside_what_was_predicted():
    cell = {"tokens": 131072, "batch": 1, "of_bandwidth": .71,
            "ms": {"SDPA, flash": 3.0, "kernels": 0.5}}
    near, far = ({"tokens": 9, "batch": 1, "store": name, "ms": ms} for name, ms in (
        ("on the device", 2.0), ("overlapped", 2.2)))
    made = {"where": "NVIDIA H100", "parts": {
        "layers": {"facts": {"cells": [cell]}},
        "model": {"facts": {"decode": [{"batch": 3, "speed_up": 4.6}, {}],
                            "prefill": [{"index_share": .03}]}},
        "offload": {"facts": {"layers": [near, far | {"hit_ratio": .9}]}}}}
    rows = {row[0]: row[1:] for row in day.rows_of(made, PREDICTED)}
    layer = rows["a layer's attention, 131,072 tokens x 1, beside FlashAttention"]
    assert layer[2] == "6.0 x, 71% of copy bandwidth" and layer[1].endswith(" x")
    assert rows["a whole step, 122,880 tokens x 3, beside dense"][2] == "4.6 x"
    assert rows["a whole step, 122,880 tokens x 1, beside dense"][2] == day.NOT
    assert rows["the index's share of a prefill"][2] == "3.0%"
    assert any(row[2] == "1.10 x as long, 0.90 hits" for row in rows.values())


def test_a_table_of_no_numbers_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"there are no numbers in .*day\.json: run bench\.day"):
        day.read(tmp_path / "day.json")


def test_the_predicted_file_is_what_the_command_predicts():
    config = gpu.FULL.config
    for cell in PREDICTED["layers"]:
        assert cell["parts"] == layer_bytes(config, cell["tokens"], cell["batch"], RetroConfig())
    assert PREDICTED["launches"]["Triton"]["layer"] < 60


@pytest.mark.slow
def test_every_part_of_the_day_ends_by_its_limit_and_a_table_comes(tmp_path):
    """A whole dry run takes minutes; what a part that is cut has found is kept."""
    done = subprocess.run([sys.executable, "-m", "bench.day", "--dry-run", "--share", "0.15",
                           "--out", tmp_path], cwd=ROOT, capture_output=True, check=False,
                          text=True, env=os.environ | ({} if gpu.IS_GPU else
                                                       {"TRITON_INTERPRET": "1"}))
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "day.json").read_text())["parts"]
    assert list(parts) == list(day.PARTS)
    for part in parts.values():
        assert part["ended"] in ("done", "cut at its limit") and part["seconds"] < part["limit"] + 5
    assert (tmp_path / "day.md").read_text().count("\n|") > 10
