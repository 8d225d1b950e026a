"""Tiny random models and tokenizers, as safetensors or GGUF, and what transformers makes of it."""
import copy
import io
import json
from functools import cache
from itertools import accumulate

import gguf
import pytest
import sentencepiece
import torch

transformers = pytest.importorskip("transformers")
transformers.logging.disable_progress_bar()

VOCAB = 320
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "rms_norm_eps": 1e-2,  # so large that a model with another differs
         "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 2}
ARCHITECTURES = {"llama": transformers.LlamaForCausalLM, "mistral": transformers.MistralForCausalLM,
                 "qwen2": transformers.Qwen2ForCausalLM, "qwen3": transformers.Qwen3ForCausalLM}
GEMMA = {"gemma3_text": transformers.Gemma3ForCausalLM}     # two RoPEs, so none of those below

# At theta 1,000 and 16 dims the wavelengths run from 6 to 2,600 tokens, so that every branch of
# llama3 and every part of YaRN's ramp over 64 trained tokens holds some dimension.
ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}
CONTEXTS = {"dynamic": 16, "llama3": 512, "yarn": 256}  # dynamic: outgrown by 24 tokens


def random_model(arch="llama", rope="default", scaling=(), **overrides):
    """A transformers model in which every parameter matters: no norm is 1 and no bias is 0.

    `scaling` overrides single RoPE parameters.
    """
    torch.manual_seed(0)
    rope_parameters = {"rope_type": rope, "rope_theta": 1000.0} | ROPES[rope] | dict(scaling)
    sizes = SIZES | {"rope_parameters": rope_parameters,
                     "max_position_embeddings": CONTEXTS.get(rope, 64)}
    if arch == "mistral":
        sizes |= {"sliding_window": None}
    cls = (ARCHITECTURES | GEMMA)[arch]
    model = cls(cls.config_class(**sizes | overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                around = 0.0 if name.endswith("bias") else 1.0
                parameter.copy_(around + 0.3 * torch.randn_like(parameter))
    return model


def save(path, arch="llama", rope="default", shard="1GB", dtype=torch.float32, **overrides):
    """Write a random model and a byte-level tokenizer into the directory `path`; returns it."""
    model = random_model(arch, rope, **overrides).to(dtype)
    model.save_pretrained(path, max_shard_size=shard)
    bpe().save(str(path / "tokenizer.json"))
    edit(path / "tokenizer_config.json", eos_token=SPECIALS[2], clean_up_tokenization_spaces=False)
    return path


def edit(path, drop=(), **changes):
    """Rewrite a JSON file with some keys changed and some dropped."""
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in (old | changes).items() if k not in drop}))
    return path


# ---------------------------------------------------------------- the oracle

@cache
def oracle(path, dtype=torch.float32):
    cls = transformers.AutoModelForCausalLM
    return cls.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


def spans(sizes):
    """Neighbouring slices of the given sizes, from 0."""
    ends = list(accumulate(sizes))
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


@torch.no_grad()
def expected_logits(model, ids, sizes, positions=None):
    """Logits (B, T, V) of a transformers model fed ids (B, T) in pieces of the given sizes."""
    model, past, out = copy.deepcopy(model), None, []  # dynamic RoPE leaves its state in the model
    for span in spans(sizes):
        given = {} if positions is None else {"position_ids": positions[:, span]}
        given["attention_mask"] = torch.ones(len(ids), span.stop, dtype=torch.int64)
        step = model(ids[:, span], past_key_values=past, use_cache=True, **given)
        past = step.past_key_values
        out.append(step.logits)
    return torch.cat(out, 1)


# ---------------------------------------------------------------- tokenizers

CORPUS = ["the cat sat on the mat and the dog sat on the log",
          "def add(a, b):\n    return a + b  # sum",
          "naïve café, 12,345.67 € and more and more of the same",
          "the theory of the thing that they thought"] * 4
# Merged without regard to any rule that cuts text, these give ids which show the rule in use.
UNCUT = ["1984 1984 31415 31415 31415", "(the cat) (the dog)", "IT'LL they'LL we'LL it'll",
         "the\n\nthe\n\n  5  5  5"] * 8


@cache
def bpe(cut=True):
    """A byte-level BPE tokenizer of VOCAB tokens, the three special ones first.

    Its merges stay inside GPT-2's words; if not `cut`, they cross wherever UNCUT led them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=SPECIALS,
                                  initial_alphabet=alphabet, show_progress=False)
    if cut:
        tokenizer.train_from_iterator(CORPUS, trainer)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.train_from_iterator(UNCUT + CORPUS, trainer)
    assert tokenizer.get_vocab_size() == VOCAB
    return tokenizer


@cache
def sentencepiece_model():
    """Bytes of a sentencepiece model of VOCAB pieces like Llama's: byte fallback, spaces kept."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=out, vocab_size=VOCAB, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, minloglevel=2)
    return out.getvalue()


# ---------------------------------------------------------------- GGUF

def permuted(weight, heads):
    """Rows of q or k in llama.cpp's order: pairs (2i, 2i+1) where Hugging Face has (i, i + D/2)."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, kind=gguf.GGMLQuantizationType.F32, meta=None, extra=None, drop=()):
    """Write a transformers model as llama.cpp's converter would: matrices as `kind`, the rest fp32.

    `meta` sets metadata, `extra` adds tensors by their GGUF names, `drop` leaves out either.
    """
    arch = {"mistral": "llama", "gemma3_text": "gemma3"}.get(model.config.model_type,
                                                             model.config.model_type)
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (gguf_metadata(model, arch) | gguf_tokenizer() | (meta or {})).items():
        if key not in drop:
            add_value(writer, key, value)
    for name, data in (gguf_tensors(model, arch) | (extra or {})).items():
        if name not in drop:
            plain = data.ndim == 1 or kind == gguf.GGMLQuantizationType.F32
            raw = {} if plain else {"raw_dtype": kind}
            writer.add_tensor(name, data if plain else gguf.quantize(data, kind), **raw)
    write_out(writer)
    return path


def write_out(writer):
    """Write what a GGUFWriter was given."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_metadata(model, arch):
    c = model.config
    return {f"{arch}.{key}": value for key, value in {
        "context_length": c.max_position_embeddings, "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size, "block_count": c.num_hidden_layers,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": model.model.layers[0].self_attn.head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.freq_base": c.rope_parameters.get("full_attention", c.rope_parameters)["rope_theta"],
    }.items()}


def gguf_tensors(model, arch):
    """Every weight of the model under its GGUF name, as numpy."""
    c, tensors = model.config, {}
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), c.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        data = tensor.numpy()
        if arch == "llama" and ".q_proj." in name:
            data = permuted(data, c.num_attention_heads)
        if arch == "llama" and ".k_proj." in name:
            data = permuted(data, c.num_key_value_heads)
        if arch == "gemma3" and name.endswith("norm.weight"):
            data = data + 1
        stem, suffix = name.rsplit(".", 1)
        if name != "lm_head.weight" or not c.tie_word_embeddings:
            tensors[f"{names.get_name(stem)}.{suffix}"] = data
    return tensors


def add_value(writer, key, value):
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
           str: writer.add_string, list: writer.add_array}
    add[type(value)](key, value)


def gguf_tokenizer(cut=True):
    """Metadata of bpe(cut) as llama.cpp's converter writes it."""
    state = json.loads(bpe(cut).to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["merges"]]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.token_type": [3 if token in SPECIALS else 1 for token in tokens],
            "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.add_bos_token": False}


def gguf_pieces():
    """Metadata of sentencepiece_model() as llama.cpp's converter writes it."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    ids = range(len(sp))
    kinds = [2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1
             for i in ids]
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in ids],
            "tokenizer.ggml.scores": [sp.get_score(i) for i in ids],
            "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}


def dequantized(model, kind):
    """The same model with every matrix rounded to what the GGUF type `kind` holds."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                rounded = gguf.dequantize(gguf.quantize(parameter.numpy(), kind), kind)
                parameter.copy_(torch.from_numpy(rounded))
    return model
