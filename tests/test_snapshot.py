"""A saved index: it comes back bit for bit, and any other file is refused in one line."""
import copy
import datetime
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from steps import LONG, SMALL

from app.snapshot import (
    SETTINGS,
    Snapshot,
    check_place,
    crc32,
    fingerprint,
    save,
    split_heads,
)
from generate import decode, eager_step, prefill, sampler
from model import load
from retroinfer import InputError, RetroConfig, WaveIndex

ROOT = Path(__file__).parent.parent
CONFIG = RetroConfig(**SMALL, retrieve=0.2, estimate=0.3)
TEXT = "the cat sat, né"
PER_FUNCTION = [HealthCheck.function_scoped_fixture]


@pytest.fixture(scope="module")
def loaded(checkpoint):
    """(model, tokenizer), tiny."""
    return load(checkpoint(**LONG), device="cpu")


def words(n, seed=0):
    return torch.randint(3, 320, (n,), generator=torch.Generator().manual_seed(seed))


def read(model, ids, capacity, config=CONFIG):
    """Caches after a prefill of ids (T,), and its logits (1, V)."""
    caches = [WaveIndex(config, capacity) for _ in model.layers]
    return caches, prefill(model, caches, [ids])


def go_on(model, caches, question, n):
    """The n greedy tokens after a question (T,)."""
    logits = prefill(model, caches, [question])
    return [t.item() for t in decode(model, caches, logits, n, sampler(), eager_step)]


@pytest.fixture
def saved(loaded, tmp_path):
    """(path, ids) of the saved index of 300 tokens."""
    path, ids = tmp_path / "text.safetensors", words(300)
    save(path, *loaded, read(loaded[0], ids, 300)[0], ids, TEXT)
    return path, ids


# ---------------------------------------------------------------- what comes back

@settings(max_examples=8, deadline=None, suppress_health_check=PER_FUNCTION)
@given(st.data())
def test_a_restored_index_goes_on_as_if_never_saved(loaded, tmp_path, data):
    model, _ = loaded
    n, asked = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 20))
    capacity = n + asked + 20
    config = RetroConfig(**SMALL | {"segment": data.draw(st.sampled_from([32, 64, 512])),
                                    "update": 16},
                         retrieve=data.draw(st.floats(0, 1)), estimate=0.2)
    ids, question = words(n, seed=n), words(asked, seed=asked)
    path = tmp_path / "text.safetensors"
    caches, _ = read(model, ids, data.draw(st.integers(n, capacity)), config)
    save(path, *loaded, caches, ids, TEXT)
    snapshot = Snapshot(path, *loaded, config)
    assert snapshot.ids.equal(ids)
    restored = [WaveIndex(config, capacity) for _ in model.layers]
    snapshot.restore(restored)
    for a, b in zip(caches, restored, strict=True):
        for x, y in zip(a.state(0).values(), b.state(0).values(), strict=True):
            assert x.equal(y)
    unsaved, _ = read(model, ids, capacity, config)
    assert go_on(model, restored, question, 20) == go_on(model, unsaved, question, 20)


def test_an_index_is_saved_after_generated_tokens_too(loaded, tmp_path):
    model, _ = loaded
    caches, logits = read(model, words(100), 400)
    said = [t.item() for t in decode(model, caches, logits, 90, lambda _: torch.tensor([7]),
                                     eager_step)]
    ids = torch.cat([words(100), torch.tensor(said[:-1])])          # the last is in no cache yet
    save(tmp_path / "x", *loaded, caches, ids, TEXT)
    restored = [WaveIndex(CONFIG, 400) for _ in model.layers]
    Snapshot(tmp_path / "x", *loaded, CONFIG).restore(restored)
    assert go_on(model, restored, words(5), 20) == go_on(model, caches, words(5), 20)


def test_what_a_step_reads_may_change_between_save_and_load(loaded, saved):
    other = RetroConfig(**SMALL | {"min_retrieve": 3}, retrieve=0.5, estimate=0.1)
    restored = [WaveIndex(other, 400) for _ in loaded[0].layers]
    Snapshot(saved[0], *loaded, other).restore(restored)
    assert restored[0].n_indexed[0] > 200


def test_a_longer_prompt_is_read_from_where_the_index_ends(loaded, saved):
    path, ids = saved
    longer = torch.cat([ids, words(30, seed=9)])
    snapshot = Snapshot(path, *loaded, CONFIG)
    assert snapshot.unread(longer).equal(longer[300:]) and not len(snapshot.unread(ids))


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize("change, same", [(0, 0), (17, 17), (299, 299)])
def test_a_changed_prompt_is_refused(loaded, saved, change, same):
    path, ids = saved
    ids[change] += 1
    with pytest.raises(ValueError, match=rf"300 tokens only the first {same} are the same"):
        Snapshot(path, *loaded, CONFIG).unread(torch.cat([ids, ids]))
    with pytest.raises(ValueError, match="only the first"):
        Snapshot(path, *loaded, CONFIG).unread(ids[:200])


@pytest.mark.parametrize("field", SETTINGS)
def test_each_setting_that_builds_an_index_must_be_the_same(loaded, saved, field):
    given = {name: getattr(CONFIG, name) for name in SETTINGS}
    changed = {"bits": 16}.get(field, 2 * given[field] if given[field] is not True else False)
    other = RetroConfig(**given | {field: changed})
    with pytest.raises(ValueError, match=f"--set {field} {given[field]}, here it"):
        Snapshot(saved[0], *loaded, other)


@pytest.mark.parametrize("overrides, words", [
    ({"rope": "linear"}, "RoPE"), ({"intermediate_size": 128}, "intermediate_size 96"),
    ({"max_position_embeddings": 512}, "512")], ids=str)
def test_another_model_is_refused(checkpoint, saved, overrides, words):
    other = load(checkpoint(**LONG | overrides), device="cpu")
    with pytest.raises(ValueError, match=words):
        Snapshot(saved[0], *other, CONFIG)


def test_other_weights_tokenizers_and_dtypes_are_refused(loaded, saved):
    model, tokenizer = copy.deepcopy(loaded)
    model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="weights of CRC-32"):
        Snapshot(saved[0], model, loaded[1], CONFIG)
    tokenizer.template = "{{ messages }}"
    with pytest.raises(ValueError, match="a tokenizer of CRC-32"):
        Snapshot(saved[0], loaded[0], tokenizer, CONFIG)
    with pytest.raises(ValueError, match="dtype float32, here it is bfloat16"):
        Snapshot(saved[0], model.bfloat16(), loaded[1], CONFIG)


def test_another_format_and_foreign_files_are_refused(loaded, saved, tmp_path):
    path, _ = saved
    with safe_open(path, "pt") as f:
        header = f.metadata()
    save_file(load_file(path), path, header | {"format": "retroinfer index 0"})
    with pytest.raises(ValueError, match=r"of format 'retroinfer index 0'.*make it anew"):
        Snapshot(path, *loaded, CONFIG)
    save_file({"x": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="is no index"):
        Snapshot(path, *loaded, CONFIG)
    with pytest.raises(ValueError, match=r"cannot read the index .*nowhere"):
        Snapshot(tmp_path / "nowhere", *loaded, CONFIG)


def restored_state(path, loaded):
    snapshot = Snapshot(path, *loaded, CONFIG)
    caches = [WaveIndex(CONFIG, 400) for _ in loaded[0].layers]
    snapshot.restore(caches)
    return [snapshot.ids, *(x for cache in caches for x in cache.state(0).values())]


@settings(max_examples=60, deadline=None, suppress_health_check=PER_FUNCTION)
@given(st.data())
def test_a_damaged_file_is_refused_or_means_the_same(loaded, saved, tmp_path, data):
    """One bit changed anywhere, header included, or the end cut off. Reading writes nothing."""
    path, damaged = saved[0], tmp_path / "damaged"
    whole = path.read_bytes()
    size = data.draw(st.sampled_from([len(whole), 12_000]))                 # most often the header
    at, bit = data.draw(st.integers(1, size - 1)), data.draw(st.integers(0, 7))
    raw = whole[:at]
    if not data.draw(st.booleans()):
        raw += bytes([whole[at] ^ 1 << bit]) + whole[at + 1:]
    damaged.write_bytes(raw)
    try:
        found = restored_state(damaged, loaded)
    except ValueError as e:
        assert str(e).count("\n") == 0
    else:
        assert len(raw) == len(whole)
        assert all(map(torch.equal, found, restored_state(path, loaded)))
    assert damaged.read_bytes() == raw


def forge(path, change):
    """Rewrite an index with tensors that `change` edits, and checksums that fit them."""
    with safe_open(path, "pt") as f:
        header = f.metadata()
    tensors = load_file(path)
    change(tensors)
    header["crc32"] = json.dumps({name: crc32(x) for name, x in tensors.items()})
    save_file(tensors, path, header)


@pytest.mark.parametrize("name, change, words", [
    ("1.offsets", lambda x: x.add_(10**9), "clusters do not follow one another"),
    ("0.offsets", lambda x: x[0, :2].copy_(x[0, :2].flip(0)), "do not follow one another"),
    ("0.sizes", lambda x: x.mul_(1e6), "does not have 0 to 8 members"),
    ("0.sizes", lambda x: x[1, 0].add_(0.5), "does not have 0 to 8 members"),
    ("1.sizes", lambda x: x[0, 0].zero_(), "do not hold the 256 indexed tokens"),
    ("0.counters", lambda x: x[0].add_(4), "do not hold the 260 indexed tokens"),
    ("0.counters", lambda x: x[0].add_(400), "656 indexed tokens in .* of 300 tokens"),
    ("0.counters", lambda x: x[1].neg_(), "0.centroids is torch.uint8"),
    ("1.spreads", lambda x: x[0, 0].fill_(math.nan), "spreads holds NaN"),
    ("0.k.1", lambda x: x[0, 0].fill_(math.inf), "k holds NaN or infinity")])
def test_an_index_that_contradicts_itself_is_refused_whatever_its_checksums(
        loaded, saved, name, change, words):
    forge(saved[0], lambda tensors: change(tensors[name]))
    with pytest.raises(InputError, match=words):
        restored_state(saved[0], loaded)


@pytest.mark.parametrize("letters", [torch.tensor([200], dtype=torch.uint8), torch.ones(3),
                                     torch.ones(3, dtype=torch.bfloat16)], ids=str)
def test_a_text_that_is_none_is_refused(loaded, saved, letters):
    assert Snapshot(saved[0], *loaded, CONFIG).text == TEXT
    forge(saved[0], lambda tensors: tensors.update(text=letters))
    with pytest.raises(InputError, match="its text is not UTF-8"):
        Snapshot(saved[0], *loaded, CONFIG)


def test_a_rope_with_factors_is_part_of_the_fingerprint(loaded):
    """GGUF files of Llama 3 have them: a tensor, which JSON does not hold."""
    model, tokenizer = loaded

    def with_factors(x):
        other = copy.copy(model)
        other.config = replace(model.config, rope=model.config.rope | {"freq_factors": x})
        return fingerprint(other, tokenizer, CONFIG)
    one, same, another = (with_factors(torch.full((8,), x)) for x in (1.0, 1.0, 2.0))
    assert one == same != another and json.dumps(one)


def test_a_template_that_writes_the_date_gets_that_of_the_index(loaded, tmp_path):
    model, tokenizer = loaded
    tokenizer, path = copy.copy(tokenizer), tmp_path / "x"
    tokenizer.template = "{{ strftime_now('%d') }} {{ messages[0].content }}"
    first = tokenizer.now = datetime.datetime(2026, 1, 7)
    said = tokenizer.render([{"role": "user", "content": "a"}])
    save(path, model, tokenizer, read(model, words(50), 90)[0], words(50), TEXT)
    tokenizer.now = datetime.datetime(2026, 1, 8)
    assert tokenizer.render([{"role": "user", "content": "a"}]) != said
    Snapshot(path, model, tokenizer, CONFIG)
    assert tokenizer.now == first
    assert tokenizer.render([{"role": "user", "content": "a"}]) == said == "07 a"


def test_two_days_write_the_same_file_if_no_prompt_has_a_date(loaded, tmp_path):
    model, tokenizer = loaded[0], copy.copy(loaded[1])
    ids, files = words(50), [tmp_path / "x", tmp_path / "y"]
    caches, headers = read(model, ids, 90)[0], []
    for path in files:
        save(path, model, tokenizer, caches, ids, TEXT)
        tokenizer.now += datetime.timedelta(1)
        headers.append(safe_open(path, "pt").metadata())        # it has a checksum of each tensor
    assert headers[0] == headers[1]


def test_a_text_that_does_not_fit_is_refused(loaded, saved):
    with pytest.raises(ValueError, match=r"300 tokens .* do not fit caches of 299"):
        Snapshot(saved[0], *loaded, CONFIG).restore([WaveIndex(CONFIG, 299)])


# ---------------------------------------------------------------- writing is atomic

PROGRAM = """
import os, random, resource, signal, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads(1)
from test_snapshot import CONFIG, TEXT, Snapshot, load, read, restored_state, save, words
path, loaded = {path!r}, load({model!r}, device="cpu")
texts = [words(300, seed) for seed in (1, 2)]
states = [read(loaded[0], ids, 300)[0] for ids in texts]
save(path, *loaded, states[0], texts[0], TEXT)
random.seed(0)
for n in range(12):
    child = os.fork()
    if not child:
        while True:
            for caches, ids in zip(states, texts):
                save(path, *loaded, caches, ids, TEXT)
    time.sleep(random.uniform(0.0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    ids, *state = restored_state(path, loaded)
    which = [i for i in (0, 1) if ids.equal(texts[i])][0]
    assert all(a.equal(b) for a, b in zip(
        state, (x for cache in states[which] for x in cache.state(0).values())))
before, names = open(path, "rb").read(), os.listdir(os.path.dirname(path))
resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, -1))            # a disk that is full
try:
    save(path, *loaded, states[0], texts[0], TEXT)
except ValueError as e:
    assert "cannot write" in str(e) and "\\n" not in str(e), e
else:
    raise AssertionError("saved beyond the limit")
assert open(path, "rb").read() == before
assert os.listdir(os.path.dirname(path)) == names       # no more litter than the killed ones left
"""


@pytest.mark.slow
def test_a_killed_save_and_a_full_disk_leave_a_whole_file(checkpoint, tmp_path):
    model = checkpoint(**LONG)
    program = PROGRAM.format(root=str(ROOT), tests=str(ROOT / "tests"), model=str(model),
                             path=str(tmp_path / "text.safetensors"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr


def test_a_place_that_cannot_be_written_is_refused_at_the_door(tmp_path):
    for path in (tmp_path / "nowhere" / "x", tmp_path):
        with pytest.raises(ValueError, match="its folder must exist"):
            check_place(path)
    check_place(tmp_path / "x")


def test_only_the_owner_reads_the_file_and_keys_are_not_copied(loaded, saved):
    assert saved[0].stat().st_mode & 0o777 == 0o600
    cache = read(loaded[0], saved[1], 300)[0][0]
    kept = dict(split_heads(cache.state(0)))
    assert kept["k.1"].data_ptr() == cache.store.k[0, 1].data_ptr()
    assert kept["v.0"].data_ptr() == cache.store.v[0, 0].data_ptr()


def test_no_other_file_is_replaced(loaded, saved, tmp_path):
    """An index and an empty file may be. A link stays, and its target is written."""
    for name, raw in ("text", b"my only copy"), ("weights", saved[0].read_bytes()[:-9]):
        (tmp_path / name).write_bytes(raw)
    save_file({"x": torch.ones(3)}, tmp_path / "tensors")
    os.mkfifo(tmp_path / "fifo")
    for name, words in (("text", "is no index"), ("weights", "is no index"),
                        ("tensors", "is no index"), ("fifo", "no regular file"),
                        ("x" * 300, "File name too long")):
        with pytest.raises(InputError, match=words):
            check_place(tmp_path / name)
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to("target")
    for name in ("empty", "link", saved[0].name):
        check_place(tmp_path / name)
    save(tmp_path / "link", *loaded, read(loaded[0], saved[1], 300)[0], saved[1], TEXT)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").stat().st_size > 1000
