"""Layers that see a window: Gemma 3, and what Mistral and Qwen2 state, equal to transformers."""
import functools
import json
import re

import gguf
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import LONG, SMALL

import checkpoint
import generate
from app import cli
from app.plan import Run, plan
from checkpoint import Packed, expand, read_header
from model import DenseCache, RingCache, load, make_caches
from retroinfer import InputError, RetroConfig, WaveIndex

CLOSE = {"atol": 5e-4, "rtol": 0}       # of logits up to 15
T, WINDOW = 40, 8
IDS = torch.randint(0, tiny.VOCAB, (2, T), generator=torch.Generator().manual_seed(1))
STEP = ("decode", 1)
FEEDS = {"at once": [("prefill", T)],
         "in chunks": [("prefill", n) for n in (5, 1, 3, 20, 11)],
         "token by token": [("prefill", 5), *[STEP] * 35],
         "in turns": [("prefill", 6), *[STEP] * 12, ("prefill", 9), *[STEP] * 13]}
ROPES = {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
         "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}
KINDS = ["sliding_attention", "sliding_attention", "full_attention"]
GEMMA = {"rope_parameters": ROPES, "num_hidden_layers": 5, "layer_types": [*KINDS, *KINDS[:2]],
         "sliding_window": WINDOW, "head_dim": 32, "num_key_value_heads": 1,
         "query_pre_attn_scalar": 20, "tie_word_embeddings": True}
SLIDES = {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1}
MODELS = {
    "gemma3": ("gemma3_text", GEMMA),
    "two key heads": ("gemma3_text", GEMMA | {"num_key_value_heads": 2}),
    "biases, a head of its own": ("gemma3_text", GEMMA | {"attention_bias": True,
                                                          "tie_word_embeddings": False}),
    "a window longer than the text": ("gemma3_text", GEMMA | {"sliding_window": 99}),
    "a window of two": ("gemma3_text", GEMMA | {"sliding_window": 2}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", SLIDES), "qwen3": ("qwen3", SLIDES),
    "long gemma3": ("gemma3_text", GEMMA | LONG), "long mistral": ("mistral", LONG | {
        "sliding_window": 32})}
CASES = [name for name in MODELS if not name.startswith("long")]


@pytest.fixture(autouse=True)
def alone(one_thread):
    """Tiny products gain nothing from threads."""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """path(name): the directory of one of MODELS, made once."""
    @functools.cache
    def get(name):
        arch, change = MODELS[name]
        return tiny.save(tmp_path_factory.mktemp("model"), arch, **change)
    return get


@functools.cache
def ours(path):
    return load(path, dtype=torch.float32, device="cpu")[0]


@torch.no_grad()
def logits(model, feed):
    """Logits (B, T, V) of IDS, fed to the model as `feed` says."""
    caches = make_caches(model.config, lambda: DenseCache(T + 3, 2), T + 3, 2)
    hidden = []
    for (phase, _), span in zip(feed, tiny.spans([n for _, n in feed]), strict=True):
        positions = torch.arange(T)[None, span].expand(2, -1)
        if phase == "decode":
            hidden.append(model(IDS[:, span], positions, caches))
            continue
        rows = [model(IDS[row:row + 1, span], positions[:1],
                      [functools.partial(cache.prefill, row=row) for cache in caches])
                for row in range(2)]
        hidden.append(torch.cat(rows))
    return model.logits(torch.cat(hidden, 1))


def expected(model, feed=FEEDS["at once"]):
    return tiny.expected_logits(model, IDS, [n for _, n in feed])


# ---------------------------------------------------------------- equal to transformers

@pytest.mark.parametrize("feed", FEEDS.values(), ids=FEEDS)
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers_within_and_beyond_the_window(path, name, feed):
    theirs = expected(tiny.oracle(path(name)), feed)
    torch.testing.assert_close(logits(ours(path(name)), feed), theirs, **CLOSE)


def test_old_config_keys_of_gemma_mean_the_same(path, tmp_path):
    """Published files have a pattern and flat RoPE keys, where new ones name each layer's."""
    model = tiny.random_model("gemma3_text", **GEMMA | {"layer_types": None, "num_hidden_layers": 7,
                                                        "sliding_window_pattern": 3})
    model.save_pretrained(tmp_path)
    tiny.bpe().save(str(tmp_path / "tokenizer.json"))
    tiny.edit(tmp_path / "config.json", drop=["rope_parameters", "layer_types"],
              sliding_window_pattern=3, rope_theta=1000.0, rope_local_base_freq=50.0,
              rope_scaling={"rope_type": "linear", "factor": 4.0})
    assert ours(tmp_path).config.windows == [8, 8, 0, 8, 8, 0, 8]
    assert ours(tmp_path).config.context == 64              # the factor is counted already
    torch.testing.assert_close(logits(ours(tmp_path), FEEDS["in turns"]), expected(model), **CLOSE)


def test_bfloat16_errs_at_most_twice_as_much_as_transformers(path):
    truth = expected(tiny.oracle(path("gemma3")))
    theirs = expected(tiny.oracle(path("gemma3"), torch.bfloat16)).float() - truth
    mine = logits(load(path("gemma3"), torch.bfloat16, "cpu")[0], FEEDS["in turns"])
    assert (mine.float() - truth).norm() <= 2 * theirs.norm()


def test_gguf_gives_the_logits_of_the_same_weights(tmp_path):
    """GGUF leaves out which layers have windows, and has 1 added to the weights of norms."""
    ropes = {"full_attention": ROPES["full_attention"],
             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    model = tiny.random_model("gemma3_text", **GEMMA | {
        "rope_parameters": ropes, "layer_types": None, "num_hidden_layers": 7,
        "query_pre_attn_scalar": 32})
    file = tiny.write_gguf(tmp_path / "m.gguf", model, meta={
        "gemma3.attention.sliding_window": WINDOW, "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 4.0})
    assert ours(file).config.windows == [8, 8, 8, 8, 8, 0, 8]
    torch.testing.assert_close(logits(ours(file), FEEDS["in turns"]), expected(model), **CLOSE)


def local_rope(**change):
    """A config in which this is other of the RoPE of layers with windows."""
    local = ROPES["sliding_attention"] | change
    return {"rope_parameters": ROPES | {"sliding_attention": local}}


REFUSED = {
    "attention cap": ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping 50"),
    "logit cap": ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping 30"),
    "both directions": ({"use_bidirectional_attention": True}, r"use_bidirectional_attention"),
    "activation": ({"hidden_activation": "silu"}, r"hidden_activation 'silu'"),
    "scale": ({"query_pre_attn_scalar": 0}, r"query_pre_attn_scalar is 0"),
    "kind of layer": ({"layer_types": ["chunked_attention"] * 5}, r"'chunked_attention'"),
    "number of layers": ({"layer_types": ["full_attention"]}, r"names 1 layers of 5"),
    "window": ({"sliding_window": "8"}, r"sliding_window is '8'"),
    "RoPE of windows, no factor": (local_rope(rope_type="linear"), r"'linear' lacks its number"),
    "RoPE of windows, base": (local_rope(rope_theta=-1.0), r"rope_theta is -1"),
    "RoPE of windows, no number": (local_rope(rope_theta="x"), r"rope_theta is 'x'")}


@pytest.mark.parametrize("change, said", REFUSED.values(), ids=REFUSED)
def test_what_gemma_does_not_do_is_named(path, tmp_path, change, said):
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(path("gemma3") / name)
    (tmp_path / "config.json").write_bytes((path("gemma3") / "config.json").read_bytes())
    tiny.edit(tmp_path / "config.json", **change)
    with pytest.raises(InputError, match=said) as refusal:
        load(tmp_path, torch.float32, "cpu")
    assert "\n" not in str(refusal.value)


# ---------------------------------------------------------------- the ring

def banded(q, k, v, window):
    """Attention of each token to its `window` latest tokens, itself among them, in float64."""
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    age = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    scores = q.double() @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill((age < 0) | (age >= window), -torch.inf).softmax(-1) @ v


@settings(deadline=None, max_examples=60)
@given(window=st.integers(1, 12), seed=st.integers(0, 99), spare=st.integers(0, 5),
       feed=st.lists(st.one_of(st.just(STEP), st.tuples(st.just("prefill"), st.integers(1, 20))),
                     min_size=1, max_size=9).map(lambda feed: [("prefill", 2), *feed]))
def test_a_ring_attends_to_its_window_however_it_is_fed(window, seed, spare, feed):
    B, H, D, n = 2, 2, 8, sum(n for _, n in feed)
    torch.manual_seed(seed)
    q, k, v = torch.randn(B, 3 * H, n, D), torch.randn(B, H, n, D), torch.randn(B, H, n, D)
    ring, out = RingCache(window, n + spare, B), []
    for (phase, _), span in zip(feed, tiny.spans([n for _, n in feed]), strict=True):
        now = [x[:, :, span] for x in (q, k, v)]
        out.append(ring.decode(*now) if phase == "decode" else
                   torch.cat([ring.prefill(*(x[b:b + 1] for x in now), b) for b in range(B)]))
    truth = banded(q, k, v, window).float()
    torch.testing.assert_close(torch.cat(out, 2), truth, atol=1e-5, rtol=0)
    assert ring.update() == spare and ring.k.shape[2] == min(window, n + spare)


def test_a_ring_goes_on_from_its_state():
    x = torch.randn(1, 1, 30, 8)
    for n in (3, 8, 21):
        ring, other = RingCache(8, 40), RingCache(8, 33)
        ring.prefill(*[x[:, :, :n]] * 3)
        other.restore(ring.state(0), n)
        for cache in (ring, other):
            cache.prefill(*[x[:, :, n:n + 2]] * 3)
        a, b = (cache.decode(*[x[:, :, n + 2:n + 3]] * 3) for cache in (ring, other))
        assert a.equal(b) and other.n_tokens.tolist() == [n + 3]


def test_more_tokens_than_the_capacity_are_refused():
    with pytest.raises(ValueError, match="9 tokens do not fit a cache of 8"):
        RingCache(4, 8).prefill(*[torch.randn(1, 1, 9, 8)] * 3)


# ---------------------------------------------------------------- a whole model

CONFIG = RetroConfig(**SMALL | {"update": 32}, retrieve=1.0, values=1.0)


def wave(model, capacity, batch=1, config=CONFIG):
    return make_caches(model.config, lambda: WaveIndex(config, capacity, batch), capacity, batch)


def words(n):
    return torch.randint(3, 320, (n,), generator=torch.Generator().manual_seed(n))


def say(model, caches, prompts, n, step=generate.eager_step):
    """Logits (n, B, V) of n tokens that do not depend on them."""
    got, tokens = [], iter(range(3, 300))

    def pick(x):
        got.append(x)
        return torch.full((len(x),), next(tokens))
    list(generate.generate(model, caches, prompts, n, pick, step))
    return torch.stack(got)


def test_a_batch_of_unequal_texts_gives_what_dense_gives_alone(path):
    model, prompts = ours(path("long gemma3")), [words(30), words(250), words(5)]
    mine = say(model, wave(model, 350, 3), prompts, 80)
    for row, ids in enumerate(prompts):
        dense = make_caches(model.config, lambda: DenseCache(350), 350)
        torch.testing.assert_close(mine[:, row:row + 1], say(model, dense, [ids], 80), **CLOSE)


def test_a_compiled_step_has_one_region_for_each_kind_of_layer(path):
    model, graphs = ours(path("long gemma3")), []
    torch._dynamo.reset()

    def backend(graph, _):
        graphs.append(sum(isinstance(m, torch.fx.GraphModule) for m in graph.modules()) - 1)
        return graph

    step = torch.compile(functools.partial(generate.step, run=generate.region()), backend=backend,
                         fullgraph=True, dynamic=False)
    config = RetroConfig(**SMALL | {"update": 32}, retrieve=0.1, estimate=0.2)
    fast, slow = (say(model, wave(model, 400, config=config), [words(250)], 50, one)
                  for one in (step, generate.eager_step))
    torch.testing.assert_close(fast, slow, **CLOSE)
    assert graphs == [2]


def test_a_layer_with_a_window_takes_no_other_cache(path):
    model = ours(path("gemma3"))
    with pytest.raises(ValueError, match="latest 8 tokens"):
        generate.prefill(model, [DenseCache(50) for _ in model.layers], [words(9)])


def test_a_plan_has_the_bytes_that_are_allocated(path):
    model = ours(path("long gemma3"))
    caches = wave(model, 600, 2, RetroConfig())
    generate.prefill(model, caches, [words(500)] * 2)
    parts = [cache.nbytes() for cache in caches]
    device = plan(Run(model.config, 600, 2, torch.float32)).device
    assert device.pop("weights") == sum(x.nbytes for x in model.parameters())
    assert device == {name: sum(part.get(name, 0) for part in parts) for name in device}
    assert device["windows"] == 4 * 2 * 2 * WINDOW * 32 * 4         # layers, K and V, batch


# ---------------------------------------------------------------- the command line

@pytest.fixture
def run(capsys, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("the cat sat on the mat and the dog sat on the log. " * 40, "utf-8")

    def run(model, *flags, file=prompt):
        status = cli.main([*(["--prompt-file", str(file)] if file else []), "--backend", "eager",
                           "--device", "cpu", "--dtype", "float32", "--max-new-tokens", "12",
                           "--json", "--model", str(model), *map(str, flags)])
        out, err = capsys.readouterr()
        return status, json.loads(out.splitlines()[-1]) if status == 0 else None, err
    return run


def test_the_card_counts_windows_apart(run, path):
    status, facts, err = run(path("long gemma3"), "--compare", "--set", "retrieve=1", "values=1",
                             "update=64")
    assert status == 0 and facts["agreement"] == 1 and facts["kl"] < 1e-6
    assert facts["dense_answer"] == facts["answers"][0]
    tokens = facts["context_tokens"][0]
    assert facts["dense_bytes_a_step"] == 2 * 32 * 4 * tokens               # of the one wide layer
    assert facts["window_bytes_a_step"] == 4 * 2 * 32 * 4 * WINDOW
    assert re.search(r"windows +4 of 5 layers see the latest 8 tokens only", err)


@pytest.mark.parametrize("flags", [
    ["--method", "graph", "--set", "sink=4", "local=32", "update=64"],
    ["--method", "antkv", "--set", "bits=4"], ["--offload"]], ids=str)
def test_other_methods_have_the_wide_layers(run, path, flags):
    status, facts, _ = run(path("long gemma3"), *flags)
    assert status == 0 and facts["window_layers"] == 4 and facts["indexed_tokens"][0] > 0


def test_a_saved_index_has_the_windows(run, path, tmp_path):
    ask, file = ("--question", "the dog sat on the log, and then"), tmp_path / "x.safetensors"
    _, first, _ = run(path("long gemma3"), *ask, "--save-index", file)
    status, again, _ = run(path("long gemma3"), *ask, "--load-index", file, file=None)
    assert status == 0 and again["answers"] == first["answers"]
    assert again["read_tokens"][0] < 30 < first["read_tokens"][0]


def test_where_all_layers_have_windows_there_is_no_index(run, path, tmp_path):
    status, facts, err = run(path("long mistral"), "--compare")
    assert status == 0 and facts["agreement"] == 1 and facts["bytes_a_step"] == 0
    assert "no index: all 2 layers see the latest 32 tokens" in err and "retrieves" not in err
    status, _, err = run(path("long mistral"), "--save-index", tmp_path / "x")
    assert status == 2 and err.startswith("retroinfer: --save-index: every layer")


# ---------------------------------------------------------------- the header of a GGUF file

def test_a_header_is_what_the_gguf_package_reads(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, add in (("u8", writer.add_uint8), ("i8", writer.add_int8), ("u64", writer.add_uint64),
                      ("i64", writer.add_int64), ("u16", writer.add_uint16)):
        add(name, 7)
    writer.add_float64("f64", 0.1), writer.add_bool("yes", True), writer.add_string("é", "ß€")
    writer.add_array("texts", ["", "a", "日本"]), writer.add_array("floats", [0.5, -1.0])
    writer.add_array("numbers", [1, -2, 3])
    kinds = {"x": np.float32, "y": np.float16}
    for name, dtype in kinds.items():
        writer.add_tensor(name, np.arange(12, dtype=dtype).reshape(3, 4))
    tiny.write_out(writer)
    fields, tensors = read_header(tmp_path / "m.gguf")
    theirs = gguf.GGUFReader(tmp_path / "m.gguf")
    assert fields == {name: x.contents() for name, x in theirs.fields.items()
                      if not name.startswith("GGUF.")}
    for t in theirs.tensors:
        assert tensors[t.name].shape == list(t.data.shape)
        assert (tensors[t.name].numbers().numpy() == t.data.ravel()).all()


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q5_0", "IQ4_XS"])
def test_numbers_are_bit_for_bit_those_of_the_gguf_package(monkeypatch, kind):
    monkeypatch.setattr(checkpoint, "PART", 512 * 70)
    kind = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (150, 512 // block * size), dtype=np.uint8)
    name, mine = expand(Packed("blk.0.ffn_up.weight", [150, 512], kind, 0, raw), torch.float32,
                        "qwen2", 64)
    with np.errstate(all="ignore"):
        theirs = gguf.dequantize(raw, kind)
    assert name == "layers.0.mlp.up_proj.weight" and mine.shape == (150, 512)
    assert (mine.numpy().view(np.int32) == theirs.view(np.int32)).all()
