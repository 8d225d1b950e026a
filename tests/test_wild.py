"""Files as other programs write them: what other loaders agree on, or one clear line."""
import json
import re
import shutil

import gguf
import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer

from model import DenseCache, load
from retroinfer import InputError


def loaded(path):
    return load(path, torch.float32, "cpu")


def logits_of(path):
    return run(loaded(path)[0])


def run(model):
    """Logits (1, 40, V) of a model."""
    ids = torch.randint(3, 320, (1, 40), generator=torch.Generator().manual_seed(0))
    attends = [DenseCache(40).prefill for _ in model.layers]
    return model.logits(model(ids, torch.arange(40)[None], attends))


# ---------------------------------------------------------------- weights

def test_an_output_matrix_beside_a_tied_embedding_is_taken_and_said(editable):
    """transformers#42612: a model was trained after its config was written."""
    path = editable("llama", tie_word_embeddings=False)
    untied = logits_of(path)
    tiny.edit(path / "config.json", tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="another one: that one is taken"):
        model, _ = loaded(path)
    assert not model.config.tied
    torch.testing.assert_close(run(model), untied, rtol=0, atol=0)


def test_an_output_matrix_that_is_the_embedding_is_kept_once(editable, recwarn):
    from safetensors.torch import load_file, save_file
    path = editable("llama", tie_word_embeddings=True)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, path / "model.safetensors")
    model, _ = loaded(path)
    assert model.lm_head.weight is model.embed_tokens.weight and model.config.tied
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


@pytest.fixture
def llama():
    return tiny.random_model()


@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.int32, np.int64])
def test_a_gguf_tensor_of_another_type_is_one_line(tmp_path, llama, dtype):
    extra = {"blk.0.attn_q.weight": np.ones((64, 64), dtype)}
    path = tiny.write_gguf(tmp_path / "m.gguf", llama, extra=extra)
    with pytest.raises(InputError, match=r"tensor blk\.0\.attn_q\.weight cannot be") as refusal:
        loaded(path)
    assert "\n" not in str(refusal.value)


def split(path, n):
    """Write a GGUF file as n parts, as llama.cpp's gguf-split does: all metadata in the first."""
    whole, parts = gguf.GGUFReader(path), []
    for i in range(n):
        parts.append(path.with_name(f"m-{i + 1:05}-of-{n:05}.gguf"))
        writer = gguf.GGUFWriter(parts[-1], "llama")
        if not i:
            for name, field in whole.fields.items():
                if not name.startswith(("GGUF.", "general.architecture")):
                    tiny.add_value(writer, name, field.contents())
        for key, value in ("split.count", n), ("split.no", i):
            writer.add_uint16(key, value)
        for tensor in whole.tensors[i::n]:
            writer.add_tensor(tensor.name, tensor.data)
        tiny.write_out(writer)
    return parts


def test_the_parts_of_a_gguf_are_one_model(tmp_path, llama):
    path = tiny.write_gguf(tmp_path / "m.gguf", llama)
    parts = split(path, 3)
    torch.testing.assert_close(logits_of(parts[0]), logits_of(path), rtol=0, atol=0)
    with pytest.raises(InputError, match=r"part of 3 files: give the first one.*-00001-of-00003"):
        loaded(shutil.copy(parts[0], tmp_path / "renamed.gguf"))
    parts[1].unlink()
    with pytest.raises(InputError, match=r"00002-of-00003\.gguf is missing"):
        loaded(parts[0])


def test_a_later_part_of_a_gguf_names_the_first(tmp_path, llama):
    parts = split(tiny.write_gguf(tmp_path / "m.gguf", llama), 3)
    with pytest.raises(InputError, match=r"lacks the key|give the first one"):
        loaded(parts[1])


def test_a_tokenizer_of_more_tokens_than_the_model_embeds_is_refused(editable):
    path = editable()
    made = Tokenizer.from_str(tiny.bpe().to_str())
    made.add_tokens(["of text"])
    made.save(str(path / "tokenizer.json"))
    with pytest.raises(InputError, match="gives ids up to 320, the model embeds 320 tokens"):
        loaded(path)


def test_an_id_of_no_token_is_not_shown(checkpoint):
    """An embedding that is padded may yield one."""
    _, tokenizer = loaded(checkpoint(vocab_size=384))
    ids = tokenizer.encode("the cat")
    assert tokenizer.decode([*ids, 350, 383]) == "the cat"


# ---------------------------------------------------------------- RoPE and the context

def test_a_gguf_factor_without_a_type_is_linear(tmp_path):
    model = tiny.random_model("qwen2", "linear")
    named, bare, old = (tiny.write_gguf(tmp_path / f"{n}.gguf", model, meta=meta) for n, meta in
                        enumerate([{"qwen2.rope.scaling.type": "linear",
                                    "qwen2.rope.scaling.factor": 4.0},
                                   {"qwen2.rope.scaling.factor": 4.0},
                                   {"qwen2.rope.scale_linear": 4.0}]))
    for path in bare, old:
        torch.testing.assert_close(logits_of(path), logits_of(named), rtol=0, atol=0)
        assert loaded(path)[0].config.context == 256


LAYERS = {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}}
CONTEXTS = {
    "Qwen2.5's YaRN": ({"rope_scaling": {"type": "yarn", "factor": 4.0,
                                         "original_max_position_embeddings": 64}}, 64, 256),
    "YaRN of a config that has the whole": ({"rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}, 256, 256),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 64, 128),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 64, 128),
    "llama3": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                 "high_freq_factor": 4.0,
                                 "original_max_position_embeddings": 64}}, 512, 512),
    "by layer": ({"rope_parameters": LAYERS}, 64, 256)}


@pytest.mark.parametrize("change, limit, context", CONTEXTS.values(), ids=CONTEXTS)
def test_the_context_is_what_the_scaling_makes_of_it(editable, change, limit, context):
    path = editable()
    tiny.edit(path / "config.json", drop=("rope_parameters", "rope_scaling"))
    tiny.edit(path / "config.json", **change, max_position_embeddings=limit, rope_theta=1000.0)
    config = loaded(path)[0].config
    assert config.context == context and config.rope["context"] == limit


def test_rope_by_layer_type_is_read_where_all_are_alike(editable):
    path = editable("llama", "linear")
    before = logits_of(path)
    tiny.edit(path / "config.json", rope_parameters=LAYERS)
    torch.testing.assert_close(logits_of(path), before, rtol=0, atol=0)
    other = LAYERS | {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    tiny.edit(path / "config.json", rope_parameters=other)
    with pytest.raises(InputError, match=r"differs between the layers.*sliding_attention"):
        loaded(path)


# ---------------------------------------------------------------- tokenizers

@pytest.mark.parametrize("name, same", [("llama3", "llama-bpe"), ("llama-v3", "llama-bpe"),
                                        ("smaug-bpe", "llama-bpe")])
def test_rules_of_several_names_are_one_rule(tmp_path, llama, name, same):
    def ids(pre):
        meta = tiny.gguf_tokenizer(cut=False) | {"tokenizer.ggml.pre": pre}
        _, tokenizer = loaded(tiny.write_gguf(tmp_path / "m.gguf", llama, meta=meta))
        return [tokenizer.encode(text) for text in tiny.UNCUT]
    assert ids(name) == ids(same)


def test_tekken_cuts_where_a_capital_follows(tmp_path, llama):
    """Mistral's rule, in words: letters end before a capital; each digit is a word."""
    meta = tiny.gguf_tokenizer() | {"tokenizer.ggml.pre": "tekken"}
    _, tokenizer = loaded(tiny.write_gguf(tmp_path / "m.gguf", llama, meta=meta))
    cut = tokenizer.backend.pre_tokenizer.pre_tokenize_str
    for text in ("camelCase", "HTTPServer", "the cat 12", "x//\n y"):
        words = [re.sub("\u0120", " ", word) for word, _ in cut(text)]
        assert words == {"camelCase": ["camel", "Case"], "HTTPServer": ["HTTPServer"],
                         "the cat 12": ["the", " cat", " ", "1", "2"],
                         "x//\n y": ["x", "//\u010a", " y"]}[text], words


def test_a_rule_that_is_guessed_is_said(tmp_path, llama):
    path = tiny.write_gguf(tmp_path / "m.gguf", llama, drop=("tokenizer.ggml.pre",))
    with pytest.warns(UserWarning, match="does not say how its tokenizer cuts text"):
        loaded(path)


@pytest.mark.parametrize("key, name", [("eos", "<|endoftext|>"), ("eot", "<|im_start|>")])
def test_a_gguf_ends_at_its_own_token_and_at_known_names(tmp_path, llama, key, name):
    meta = {f"tokenizer.ggml.{key}_token_id": tiny.SPECIALS.index(name)}
    model, tokenizer = loaded(tiny.write_gguf(tmp_path / "m.gguf", llama, meta=meta))
    assert tokenizer.eos_ids == {0, 2, tiny.SPECIALS.index(name)} == model.config.eos_ids


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_byte_order_mark_is_no_part_of_json(editable, file):
    path = editable()
    before = logits_of(path)
    (path / file).write_text("\ufeff" + (path / file).read_text("utf-8"), "utf-8")
    torch.testing.assert_close(logits_of(path), before, rtol=0, atol=0)


SETTINGS = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"},
            "pad_token": "<|im_start|>"}


def test_names_of_special_tokens_may_be_in_a_file_of_their_own(editable):
    path = editable()
    tiny.edit(path / "special_tokens_map.json", **SETTINGS)
    tiny.edit(path / "tokenizer_config.json", drop=("eos_token",),
              chat_template="{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ cls_token }}")
    tokenizer = loaded(path)[1]
    assert tokenizer.render([{"content": ""}]) == "<|endoftext|><|im_end|><|im_start|>"
    assert tokenizer.chat([{"content": ""}]) == [0, 2, 1]


def test_a_token_that_only_the_settings_call_special_is_a_control_token(editable):
    path = editable()
    state = json.loads(tiny.bpe().to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["id"] != 1]
    (path / "tokenizer.json").write_text(json.dumps(state))
    assert 1 not in loaded(path)[1].encode("a<|im_start|>")
    tiny.edit(path / "tokenizer_config.json", additional_special_tokens=["<|im_start|>"],
              chat_template="{{ messages[0].content }}<|im_start|>")
    tokenizer = loaded(path)[1]
    assert tokenizer.encode("a<|im_start|>")[-1] == 1
    assert tokenizer.chat([{"content": "<|im_start|>"}]).count(1) == 1


NAMES = {"tools": "{{ tools is not none }}{{ documents is none }}{{ messages[0].content }}",
         "json": "{{ messages | tojson(indent=2, separators=(',', ':'), sort_keys=True) }}",
         "letters": "{{ messages | tojson(ensure_ascii=True) }}",
         "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
                       "{% endfor %}",
         "names": "{{ pad_token }}{{ bos_token is defined }}{{ cls_token is defined }}"}


@pytest.mark.parametrize("template", NAMES.values(), ids=NAMES)
def test_templates_have_the_names_of_transformers(editable, template):
    path = editable()
    named = {"bos_token": "<|endoftext|>", "pad_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    tiny.edit(path / "tokenizer_config.json", chat_template=template, **named)
    theirs = tiny.transformers.PreTrainedTokenizerFast(tokenizer_object=tiny.bpe(),
                                                       chat_template=template, **named)
    messages = [{"role": "user", "content": "Größe\n\"5\""}]
    assert loaded(path)[1].render(messages) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True)
