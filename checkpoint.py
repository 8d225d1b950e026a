"""Checkpoints: the shape, weights and tokenizer in a model directory or a .gguf file.

    config, tensors, tokenizer = open_checkpoint(path)

config     a dict of model.ModelConfig's fields
tensors    an iterator of (name, tensor): names are Hugging Face's, without the leading "model."
tokenizer  encode, decode, chat, eos_ids: one face for tokenizers, sentencepiece and GGUF

Whatever is wrong with a file is an InputError of one line. Pickles are refused: opening one runs
its code.

Does not include: slow tokenizers written in Python, tool calls in chat templates, split GGUF files.
"""
import datetime
import json
import math
import re
import struct

import torch

from retroinfer import InputError

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
ROPES = ("default", "linear", "dynamic", "llama3", "yarn")
ROPE_NUMBERS = ("rope_theta", "factor", "trained", "low_freq_factor", "high_freq_factor",
                "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")


def open_checkpoint(path):
    """(config, tensors, tokenizer) of a Hugging Face directory or a GGUF file."""
    if path.suffix in (".bin", ".pt", ".pth"):
        raise InputError(f"{path} is a pickle, which runs code when opened: convert to safetensors")
    if not path.exists():
        raise InputError(f"no model at {path}: give a directory with config.json and "
                         "*.safetensors, or a .gguf file")
    try:
        config, tensors, tokenizer = open_gguf(path) if path.is_file() else open_directory(path)
        check(config, path)
    except (InputError, ImportError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # damaged data break a reader anywhere; Rust's is no Exception
        raise InputError(f"{path} is damaged or foreign: {type(e).__name__}: {one_line(e)}"
                         ) from None
    return config, tensors, tokenizer


def check(config, path):
    """InputError for a shape that no model can have, or a RoPE that lacks its numbers."""
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                 "num_attention_heads", "num_key_value_heads", "head_dim", "context"):
        most = 10_000 if name == "num_hidden_layers" else 2**31
        if type(config[name]) is not int or not 1 <= config[name] < most:
            raise InputError(f"{path}: {name} is {config[name]!r}, not a whole number from 1 to "
                             f"{most:,}")
    if not all(type(i) is int and 0 <= i < 2**31 for i in config["eos_ids"]):
        raise InputError(f"{path}: the end tokens are {set(config['eos_ids'])}, not token ids")
    numbers = {name: x for name, x in config["rope"].items() if name in ROPE_NUMBERS}
    for name, x in {"rms_norm_eps": config["rms_norm_eps"], **numbers}.items():
        if type(x) not in (int, float) or not 0 <= x < math.inf:
            raise InputError(f"{path}: {name} is {x!r}, not a number from 0")
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % groups:
        raise InputError(f"{path}: {heads} heads do not share {groups} key-value heads evenly")
    rope = config["rope"]
    needed = {"default": (), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    for name in needed.get(rope["rope_type"], ("factor",)):
        if not isinstance(rope.get(name), (int, float)):
            raise InputError(f"{path}: RoPE {rope['rope_type']!r} lacks its number {name}")


def refuse(condition, what, given, known):
    if condition:
        known = ", ".join(map(str, known))
        raise InputError(f"{what} {given!r} is not supported (supported: {known})")


def one_line(e):
    return " ".join(str(e).split())


# ---------------------------------------------------------------- a Hugging Face directory

def open_directory(path):
    config = read_json(path / "config.json") | read_json(path / "generation_config.json", {})
    index = read_json(path / "model.safetensors.index.json", {}).get("weight_map", {})
    files = sorted({path / name for name in index.values() or ["model.safetensors"]})
    if not index and not files[0].exists():
        files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = [p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
        raise InputError(f"{path} holds only pickles ({pickles[0]}), which run code when opened: "
                         "convert them to safetensors" if pickles else
                         f"{path} holds no *.safetensors file")
    try:
        config = config_from_json(config)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as e:
        raise InputError(f"{path / 'config.json'} lacks or garbles {one_line(e)}") from None
    return config, read_safetensors(files), directory_tokenizer(path, config["eos_ids"])


def config_from_json(c):
    kind, heads, limit = c.get("model_type"), c["num_attention_heads"], c["max_position_embeddings"]
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}          # new name, old name
    rope = {name: x for name, x in rope.items() if x is not None}
    rope["rope_type"] = rope.get("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", c.get("rope_theta", 10000.0))
    rope |= {"trained": rope.get("original_max_position_embeddings") or limit, "context": limit}
    partial = rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))
    refuse(kind not in ARCHITECTURES, "architecture", kind, ARCHITECTURES)
    refuse(rope["rope_type"] not in ROPES, "RoPE", rope["rope_type"], ROPES)
    refuse(c.get("hidden_act", "silu") != "silu", "hidden_act", c.get("hidden_act"), ["silu"])
    refuse(partial != 1.0, "partial_rotary_factor", partial, [1.0])
    refuse("quantization_config" in c, "quantization_config", "of the checkpoint", ["none", "GGUF"])
    slides = c.get("use_sliding_window", kind == "mistral") and c.get("sliding_window")
    biased, eos = kind != "mistral" and c.get("attention_bias", False), c.get("eos_token_id")
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    return {name: c[name] for name in same} | {
        "num_attention_heads": heads, "num_key_value_heads": c.get("num_key_value_heads") or heads,
        "head_dim": c.get("head_dim") or (128 if kind == "qwen3" else c["hidden_size"] // heads),
        "rms_norm_eps": c.get("rms_norm_eps", 1e-6), "context": min(limit, slides or limit),
        "rope": rope, "tied": c.get("tie_word_embeddings", False), "qk_norm": kind == "qwen3",
        "qkv_bias": kind == "qwen2" or biased, "o_bias": kind != "qwen2" and biased,
        "mlp_bias": c.get("mlp_bias", False),
        "eos_ids": frozenset([eos] if isinstance(eos, int) else eos or [])}


def read_json(path, default=None):
    if default is not None and not path.exists():
        return default
    try:
        data = json.loads(read_text(path))
    except json.JSONDecodeError as e:
        raise InputError(f"{path} is not JSON: {one_line(e)}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} is not a JSON object")
    return {key: value for key, value in data.items() if value is not None}  # null says nothing


def read_text(path):
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path} cannot be read: {one_line(e)}") from None


def read_safetensors(files):
    from safetensors import SafetensorError, safe_open
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                for name in f.keys():  # noqa: SIM118 (the handle is no dict)
                    yield name.removeprefix("model."), f.get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise InputError(f"{file} is missing, truncated or foreign: {one_line(e)}") from None


# ---------------------------------------------------------------- a GGUF file

GGUF_NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head", "blk": "layers",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj"}


def open_gguf(path):
    import gguf
    try:
        reader = gguf.GGUFReader(path)
    except Exception as e:  # the package lets through whatever numpy raises
        raise InputError(f"{path} is truncated or not GGUF: {one_line(e)}") from None
    tensors = {t.name: t for t in reader.tensors}

    def get(key, *default):
        if key not in reader.fields and not default:
            raise InputError(f"{path} lacks the key {key}")
        return reader.fields[key].contents() if key in reader.fields else default[0]

    config = config_from_gguf(get, tensors)
    if "rope_freqs.weight" in tensors:  # llama3 scaling, already worked out
        config["rope"]["freq_factors"] = torch.tensor(tensors.pop("rope_freqs.weight").data)
    permuted = get("general.architecture") == "llama"
    return config, read_gguf(tensors, permuted, config["head_dim"]), gguf_tokenizer(get, config)


def config_from_gguf(get, tensors):
    kind = get("general.architecture")

    def own(key, *default):
        return get(f"{kind}.{key}", *default)

    refuse(kind not in ARCHITECTURES, "architecture", kind, ARCHITECTURES)
    experts = own("expert_count", 0)
    refuse(experts, "expert_count", experts, [0])
    heads, hidden, limit = map(own, ("attention.head_count", "embedding_length", "context_length"))
    turned = own("rope.dimension_count", 0)
    head_dim = own("attention.key_length", turned or hidden // heads)
    refuse(turned not in (0, head_dim), "rope.dimension_count", turned, [head_dim])
    scaling = own("rope.scaling.type", "none")
    rope = {"rope_type": "default" if scaling == "none" else scaling, "context": limit,
            "rope_theta": own("rope.freq_base", 10000.0), "factor": own("rope.scaling.factor", 1.0),
            "trained": own("rope.scaling.original_context_length", limit)}
    refuse(rope["rope_type"] not in ROPES, "RoPE", rope["rope_type"], ROPES)
    ends = (get(f"tokenizer.ggml.{name}_token_id", None) for name in ("eos", "eot"))
    return {
        "vocab_size": len(get("tokenizer.ggml.tokens")), "hidden_size": hidden,
        "intermediate_size": own("feed_forward_length"), "num_hidden_layers": own("block_count"),
        "num_attention_heads": heads, "num_key_value_heads": own("attention.head_count_kv", heads),
        "head_dim": head_dim, "rms_norm_eps": own("attention.layer_norm_rms_epsilon"),
        "context": limit, "rope": rope,
        "tied": "output.weight" not in tensors, "qkv_bias": "blk.0.attn_q.bias" in tensors,
        "o_bias": "blk.0.attn_output.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "qk_norm": "blk.0.attn_q_norm.weight" in tensors,
        "eos_ids": frozenset(e for e in ends if e is not None)}


def read_gguf(tensors, permuted, head_dim):
    import gguf
    for name, t in tensors.items():
        try:
            tensor = torch.tensor(gguf.dequantize(t.data, t.tensor_type))
            if permuted and (".attn_q." in name or ".attn_k." in name):     # pairs (2i, 2i + 1)
                pairs = tensor.view(-1, head_dim // 2, 2, *tensor.shape[1:])
                tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        except Exception as e:      # the package lets through whatever numpy raises
            raise InputError(f"tensor {name} cannot be read: {one_line(e)}") from None
        yield ".".join(GGUF_NAMES.get(part, part) for part in name.split(".")), tensor


# ---------------------------------------------------------------- tokenizers

class Tokenizer:
    """A tokenizer of the `tokenizers` package, with its chat template and end tokens."""

    def __init__(self, backend, eos_ids, template=None, bos="", eos=""):
        self.backend, self.eos_ids, self.template = backend, eos_ids, template
        self.bos, self.eos = bos, eos

    def encode(self, text):
        """Token ids of text; a special token written out in it is one id, BOS is never doubled."""
        return self.ids(text, not (self.bos and text.startswith(self.bos)))

    def ids(self, text, add_special_tokens):
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def definition(self):
        """Bytes that two tokenizers share only if they cut and write prompts alike."""
        return f"{self.backend_state()}{self.template}{self.bos}".encode()

    def backend_state(self):
        return self.backend.to_str()

    def decode(self, ids):
        """Text of token ids, special tokens left out."""
        return self.backend.decode(list(ids))

    def chat(self, messages):
        """The prompt for [{"role", "content"}, ...]; without a template the last content as it is.

        The template is foreign code: it runs in jinja2's sandbox, its failure is an InputError.
        """
        if not self.template:
            return messages[-1]["content"]
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                            extensions=["jinja2.ext.loopcontrols"])
        env.filters["tojson"] = lambda x, **kw: json.dumps(x, ensure_ascii=False, **kw)
        env.globals["strftime_now"] = datetime.datetime.now().strftime
        env.globals["raise_exception"] = raise_exception
        try:
            return env.from_string(self.template).render(
                messages=messages, add_generation_prompt=True,
                bos_token=self.bos, eos_token=self.eos)
        except Exception as e:  # foreign code may raise anything
            raise InputError(f"the model's chat template failed: {one_line(e)}") from None


def raise_exception(message):
    raise ValueError(message)


class PieceTokenizer(Tokenizer):
    """The same for sentencepiece, which sees no control pieces in a text: we cut them out first."""

    def ids(self, text, add_special_tokens):
        sp = self.backend
        control = {sp.id_to_piece(i): i for i in range(len(sp)) if sp.is_control(i)}
        ids = [control[self.bos]] if add_special_tokens and self.bos else []
        for part in re.split(f"({'|'.join(map(re.escape, control))})", text) if control else [text]:
            ids += [control[part]] if part in control else sp.encode(part)
        return ids

    def backend_state(self):
        return self.backend.serialized_model_proto()


def directory_tokenizer(path, eos_ids):
    settings, jinja = read_json(path / "tokenizer_config.json", {}), path / "chat_template.jinja"
    template = read_text(jinja) if jinja.exists() else settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {t["name"]: t["template"] for t in template}.get("default")
    bos, eos = (t["content"] if isinstance(t, dict) else t or ""
                for t in (settings.get("bos_token"), settings.get("eos_token")))
    try:
        if (path / "tokenizer.json").exists():
            import tokenizers
            backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
            backend.no_truncation(), backend.no_padding()     # a prompt is read whole, and alone
            return Tokenizer(backend, eos_ids, template, bos, eos)
        if (path / "tokenizer.model").exists():
            import sentencepiece
            backend = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
            bos = backend.id_to_piece(backend.bos_id()) \
                if settings.get("add_bos_token", True) else ""
            return PieceTokenizer(backend, eos_ids, template, bos, eos)
    except Exception as e:  # both packages raise bare exceptions
        raise InputError(f"the tokenizer in {path} cannot be read: {one_line(e)}") from None
    raise InputError(f"{path} holds neither tokenizer.json nor tokenizer.model")


# How a text is cut before byte pairs are merged, by the name that GGUF gives the rule: GPT-2's,
# GPT-2's after single digits, or the later rule with one (Qwen) or up to three (Llama 3) digits.
LATER = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CUTS = {"default": None, "gpt-2": None, "smollm": r"\p{N}",
        "llama-bpe": LATER.replace("DIGITS", "{1,3}"),
        "qwen2": LATER.replace("DIGITS", ""), "deepseek-r1-qwen": LATER.replace("DIGITS", "")}


def gguf_tokenizer(get, config):
    tokens, kind = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.model")
    pre = get("tokenizer.ggml.pre", "default")
    refuse(kind not in ("gpt2", "llama"), "GGUF tokenizer", kind, ["gpt2", "llama"])
    refuse(kind == "gpt2" and pre not in CUTS, "GGUF pre-tokenizer", pre, CUTS)
    ends = (get(f"tokenizer.ggml.{name}_token_id", None) for name in ("bos", "eos"))
    bos, eos = ("" if i is None else tokens[i] for i in ends)
    has_bos = get("tokenizer.ggml.add_bos_token", kind == "llama" or pre == "llama-bpe")
    template = get("tokenizer.chat_template", None)
    if kind == "llama":
        backend = pieces_from_gguf(get, tokens)
        return PieceTokenizer(backend, config["eos_ids"], template, bos if has_bos else "", eos)
    return Tokenizer(bpe_from_gguf(get, tokens, pre, bos if has_bos else ""),
                     config["eos_ids"], template, bos, eos)


def bpe_from_gguf(get, tokens, pre, bos):
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend
    merges = [tuple(m.split(" ", 1)) for m in get("tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    cut = [pre_tokenizers.Split(Regex(CUTS[pre]), "isolated")] if CUTS[pre] else []
    is_gpt2 = pre in ("default", "gpt-2", "smollm")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=is_gpt2)])
    backend.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, get("tokenizer.ggml.token_type"), strict=True):
        if kind in (3, 4):  # control, user-defined
            backend.add_tokens([AddedToken(token, special=kind == 3, normalized=False)])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    return backend


def pieces_from_gguf(get, tokens):
    """GGUF holds a sentencepiece model's pieces: write them in that library's protobuf again."""
    import sentencepiece

    def message(number, payload):  # a length-delimited field
        head, size = bytes([number << 3 | 2]), len(payload)
        while size > 127:
            head, size = head + bytes([size & 127 | 128]), size >> 7
        return head + bytes([size]) + payload

    def piece(text, score, kind):  # string 1, float 2, enum 3
        return (message(1, text.encode()) + b"\x15" + struct.pack("<f", score)
                + bytes([3 << 3, kind]))

    scores, kinds = get("tokenizer.ggml.scores"), get("tokenizer.ggml.token_type")
    pieces = b"".join(message(1, piece(*p)) for p in zip(tokens, scores, kinds, strict=True))
    bpe = bytes([3 << 3, 2]) + b"\x98\x02\x01"                                # byte_fallback
    prefix = get("tokenizer.ggml.add_space_prefix", True)
    spaces = bytes([3 << 3, prefix, 4 << 3, 0, 5 << 3, 1])                   # add one, keep, escape
    return sentencepiece.SentencePieceProcessor(
        model_proto=pieces + message(2, bpe) + message(3, spaces))
