"""Under transformers our attention continues as its own cache does, or says in a line why not.

`make test-adapters` runs this file with older versions of transformers.
"""
import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
from tiny import bpe  # noqa: E402

from adapters.hf import adopt  # noqa: E402
from antkv import AnchorConfig  # noqa: E402
from generate import eager_step, hot_functions, prefill  # noqa: E402
from model import load  # noqa: E402
from retrieval_attention import GraphConfig  # noqa: E402
from retroinfer import InputError, RetroConfig, WaveIndex  # noqa: E402

ROOT = Path(__file__).parent.parent
ALL = RetroConfig(segment=64, update=16, local=8, retrieve=1.0, values=1.0)
SIZES = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "initializer_range": 0.2, "max_position_embeddings": 2048, "bos_token_id": None,
         "eos_token_id": None, "pad_token_id": 0}
EXTRA = {"Mistral": {"sliding_window": None}, "Gemma3": {
    "sliding_window": 32, "query_pre_attn_scalar": 32,      # scaled by another number than the root
    "layer_types": ["sliding_attention", "full_attention"] * 2}}
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")


@functools.cache
def random_model(family):
    torch.manual_seed(0)
    name = "Gemma3Text" if family == "Gemma3" else family
    config = getattr(transformers, f"{name}Config")(**SIZES | EXTRA.get(family, {}))
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def texts(*lengths, seed=0):
    """Ids and mask (B, T) of random texts, padded on the left."""
    dice, T = torch.Generator().manual_seed(seed), max(lengths)
    mask = torch.stack([torch.arange(T) >= T - n for n in lengths]).long()
    return torch.randint(1, 100, (len(lengths), T), generator=dice) * mask, mask


def say(model, cache, ids, mask, n=30, **how):
    return model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=n,
                          **{"do_sample": False} | how)


def two_turns(model, cache, ids, mask, **how):
    """Ids of two texts, two questions and two answers."""
    said = say(model, cache, ids, mask, **how)
    ids = torch.cat([said, texts(*[20] * len(ids), seed=1)[0]], 1)
    return say(model, cache, ids, torch.cat([mask, mask.new_ones(len(ids), 50)], 1), **how)


def dense(model, run, *args, **how):
    """What run() gives with transformers' own attention and cache."""
    model.set_attn_implementation("sdpa")
    return run(model, transformers.DynamicCache(config=model.config), *args, **how)


@pytest.mark.parametrize("lengths", [[300], [150, 300, 90]], ids=["one", "left-padded"])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3"])
def test_all_retrieved_continues_as_dynamic_cache(family, lengths):
    model, given = random_model(family), texts(*lengths)
    want = dense(model, two_turns, *given)
    cache = adopt(model, ALL, 500)
    assert two_turns(model, cache, *given).equal(want)
    ours = [layer.cache for layer in cache.layers if hasattr(layer, "cache")]
    assert len(ours) == (2 if family == "Gemma3" else 4)
    assert all((cache.n_indexed > 0).all() for cache in ours)


@pytest.mark.parametrize("how", [{"prefill_chunk_size": 64}, {"do_sample": True, "top_p": 0.9}],
                         ids=["in chunks", "sampled"])
def test_other_ways_of_generate(how):
    model, given = random_model("Llama"), texts(200, 300)

    def run(model, cache):
        torch.manual_seed(3)
        return say(model, cache, *given, **how)
    want = dense(model, run)
    assert run(model, adopt(model, ALL, 500)).equal(want)


@pytest.mark.parametrize("config, lengths", [
    (ALL, [70, 100]), (AnchorConfig(bits=4, anchors=1.0), [600]),
    (GraphConfig(sink=4, local=8, update=16, index="flat", listed=400, top=400), [100])],
    ids=["wave", "antkv", "graph"])
def test_a_step_is_one_graph(config, lengths):
    """Which transformers compiles; traced here, for Inductor is slow."""
    how = transformers.CompileConfig(backend="eager", mode=None, fullgraph=True, dynamic=None)
    how._compile_all_devices = True
    model, given = random_model("Llama"), texts(*lengths)
    want = dense(model, say, *given, n=20)
    torch._dynamo.reset(), torch._dynamo.utils.counters.clear()
    assert say(model, adopt(model, config, 700), *given, n=20, compile_config=how).equal(want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_streamer_hears_every_token():
    heard, (ids, mask) = [], texts(100)
    model = random_model("Llama")

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def put(self, tokens):
            heard.extend(tokens.flatten().tolist())

        def end(self):
            heard.append("end")
    said = say(model, adopt(model, ALL, 200), ids, mask, streamer=Streamer())
    assert heard == [*said[0].tolist(), "end"]


def test_logits_are_those_of_our_own_model(tmp_path):
    """Where a step reads a part of the text: so the KL to dense attention is the same."""
    config = RetroConfig(segment=64, update=16, local=8, retrieve=0.1, min_retrieve=2)
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **SIZES | {"vocab_size": 320, "eos_token_id": 2})).eval()
    theirs.save_pretrained(tmp_path)
    bpe().save(str(tmp_path / "tokenizer.json"))
    (ours, _), ids = load(tmp_path, torch.float32, "cpu"), texts(290)[0]
    caches = [WaveIndex(config, 300, hot=hot_functions(torch.device("cpu"))) for _ in ours.layers]
    logits, cache = [prefill(ours, caches, [ids[0, :250]])], adopt(theirs, config, 300)
    for token in ids[:, 250:].T:
        for each in caches:
            each.update()
        logits.append(eager_step(ours, caches, token))
    with torch.no_grad():
        found = [theirs(ids[:, :250], past_key_values=cache).logits[:, -1]]
        found += [theirs(token[:, None], past_key_values=cache).logits[:, -1]
                  for token in ids[:, 250:].T]
        whole = dense(theirs, lambda model, _: model(ids).logits[0, 249:])
    torch.testing.assert_close(torch.cat(found), torch.cat(logits), rtol=5e-3, atol=5e-3)
    assert (torch.cat(found) - whole).abs().max() > 0.1         # dense attention says other things


def test_a_graph_that_retrieves_all_continues_as_dynamic_cache():
    config = GraphConfig(sink=4, local=8, update=16, index="flat", listed=400, top=400)
    model, given = random_model("Llama"), texts(200)
    want = dense(model, two_turns, *given)
    assert two_turns(model, adopt(model, config, 400), *given).equal(want)


def test_anchors_that_are_all_tokens_continue_as_dynamic_cache():
    model, given = random_model("Llama"), texts(600)
    want = dense(model, say, *given)
    cache = adopt(model, AnchorConfig(bits=4, anchors=1.0), 700)
    assert say(model, cache, *given).equal(want)
    assert cache.layers[0].cache.n_indexed > 0


def test_a_cache_that_was_reset_begins_anew():
    model, given = random_model("Llama"), texts(100)
    cache = adopt(model, ALL, 200)
    first = say(model, cache, *given)
    cache.reset()
    assert say(model, cache, *given).equal(first)


# ---------------------------------------------------------------- what cannot be

def refused(words, model, cache, *given, **how):
    with pytest.raises(ValueError, match=words) as caught:
        say(model, cache, *given, **how)
    assert "\n" not in str(caught.value)


def test_what_is_refused():
    model = random_model("Llama")
    ids, mask = texts(100, 60)
    refused("padded on the right", model, adopt(model, ALL, 200), ids, mask.flip(1))
    refused("do not fit a cache of 90", model, adopt(model, ALL, 90), ids, mask)
    refused("the cache is full: its capacity is 110", model, adopt(model, ALL, 110), ids, mask)
    refused("beams", model, adopt(model, ALL, 200), ids, mask, num_beams=2)
    (helper := random_model("Qwen2")).set_attn_implementation("sdpa")
    refused("(?i)assisted", model, adopt(model, ALL, 200), ids[:1], mask[:1],
            assistant_model=helper)
    cache = adopt(model, ALL, 200)
    say(model, cache, ids, mask, n=1)
    with pytest.raises(InputError, match="of a batch of 2, given are 1"):
        model(ids[:1, :5], past_key_values=cache)
    with pytest.raises(InputError, match="four dimensions"):
        model(ids, attention_mask=torch.zeros(2, 1, 100, 100),
              past_key_values=adopt(model, ALL, 200))


def test_a_model_without_its_cache_and_a_cache_without_its_model():
    model, given = random_model("Llama"), texts(50)
    cache = adopt(model, ALL, 200)
    refused("a cache of adopt", model, transformers.DynamicCache(config=model.config), *given)
    model.set_attn_implementation("sdpa")
    refused("attn_implementation is now sdpa", model, cache, *given)


def test_soft_caps_and_latent_attention_are_refused():
    caps = transformers.Gemma2Config(**SIZES, attn_logit_softcapping=50.0)
    latent = transformers.DeepseekV3Config(
        **{**SIZES, "head_dim": 8, "num_key_value_heads": 4}, q_lora_rank=None, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=4)
    for config in (caps, latent):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        refused("soft ?cap", model, adopt(model, ALL, 200), *texts(50))


# ---------------------------------------------------------------- a package of kernels.py's name

FAKE = """
from .layer import Mode
def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    return (lambda *_: lambda x: x) if name.startswith("use_kernel") else Mode()
"""
LAYER = """
class Mode:
    def __getattr__(self, name): return self
    def __call__(self, *_, **__): return self
    def __or__(self, other): return self
Mode.INFERENCE = Mode.TRAINING = Mode.TORCH_COMPILE = Mode()
"""
PROGRAM = """
import sys
sys.path.insert(0, {root!r})
if not {triton}: sys.modules["triton"] = None       # as if it were not installed
import torch
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=32,
                                     num_hidden_layers=1, num_attention_heads=2, eos_token_id=None))
ids = torch.ones(1, 4, dtype=torch.int64)
assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 7)
import kernels
from generate import hot_functions
assert kernels.__file__ == {root!r} + "/kernels.py" and kernels.attend
if {package}:
    import kernels.layer
    from kernels import get_kernel
    assert kernels.layer.__file__.startswith({folder!r}) and kernels.Mode is kernels.layer.Mode
else:
    assert not hasattr(kernels, "get_kernel")
try:
    hot_functions(torch.device("cuda"), "triton")
except ModuleNotFoundError as e:
    assert e.name == "triton" and not {triton}
else:
    assert {triton}
"""


@pytest.mark.parametrize("package, triton", [
    (False, False), (True, True), pytest.param(True, False, marks=pytest.mark.slow),
    pytest.param(False, True, marks=pytest.mark.slow)])
def test_transformers_runs_from_our_root(tmp_path, package, triton):
    if triton:
        pytest.importorskip("triton")
    if package:
        facts = tmp_path / "kernels-0.18.2.dist-info"
        facts.mkdir(), (tmp_path / "kernels").mkdir()
        (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
        (tmp_path / "kernels" / "__init__.py").write_text(FAKE)
        (tmp_path / "kernels" / "layer.py").write_text(LAYER)
    program = PROGRAM.format(root=str(ROOT), folder=str(tmp_path), package=package, triton=triton)
    program = f"import sys; sys.path.append({str(tmp_path)!r})\n" + program
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
