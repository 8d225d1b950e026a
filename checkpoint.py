"""Checkpoints: the shape, weights and tokenizer in a model directory or a .gguf file.

    config, tensors, tokenizer = open_checkpoint(path, torch.bfloat16)

config     a dict of model.ModelConfig's fields
tensors    an iterator of (name, tensor): names are Hugging Face's, without the leading "model."
tokenizer  tokenizer.Tokenizer, whatever file it comes from

Whatever is wrong with a file is an InputError of one line. Pickles are refused: opening one runs
its code.

Does not include: weights in whole numbers, RoPE that differs between layers.
"""
import json
import math
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch

from retroinfer import InputError

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
ROPES = ("default", "linear", "dynamic", "llama3", "yarn")
ROPE_NUMBERS = ("rope_theta", "factor", "trained", "low_freq_factor", "high_freq_factor",
                "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")


def open_checkpoint(path, dtype=torch.float32):
    """(config, tensors, tokenizer) of a Hugging Face directory or a GGUF file.

    dtype: that of quantised tensors, once they are expanded.
    """
    if path.suffix in (".bin", ".pt", ".pth"):
        raise InputError(f"{path} is a pickle, which runs code when opened: convert to safetensors")
    if not path.exists():
        raise InputError(f"no model at {path}: give a directory with config.json and "
                         "*.safetensors, or a .gguf file")
    try:
        config, tensors, tokenizer = (open_gguf(path, dtype) if path.is_file() else
                                      open_directory(path))
        check(config, path)
        check_size(config, tokenizer, path)
        config["eos_ids"] = tokenizer.eos_ids
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


def check_size(config, tokenizer, path):
    """InputError if a text may give ids that the model does not embed."""
    if (n := tokenizer.size()) > config["vocab_size"]:
        raise InputError(f"{path}: the tokenizer gives ids up to {n - 1:,}, the model embeds "
                         f"{config['vocab_size']:,} tokens")


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
    from tokenizer import directory_tokenizer
    return config, read_safetensors(files), directory_tokenizer(path, config["eos_ids"])


def config_from_json(c):
    kind, heads, limit = c.get("model_type"), c["num_attention_heads"], c["max_position_embeddings"]
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}          # new name, old name
    rope = one_rope({name: x for name, x in rope.items() if x is not None})
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
        "rms_norm_eps": c.get("rms_norm_eps", 1e-6),
        "context": min(stretched(rope), slides or math.inf),
        "rope": rope, "tied": c.get("tie_word_embeddings", False), "qk_norm": kind == "qwen3",
        "qkv_bias": kind == "qwen2" or biased, "o_bias": kind != "qwen2" and biased,
        "mlp_bias": c.get("mlp_bias", False),
        "eos_ids": frozenset([eos] if isinstance(eos, int) else eos or [])}


def one_rope(rope):
    """The RoPE of all layers, where a config names it for each type of layer."""
    kinds = [x for x in rope.values() if isinstance(x, dict)]
    refuse(any(x != kinds[0] for x in kinds), "RoPE that differs between the layers", list(rope),
           ["one for all layers"])
    return dict(kinds[0]) if kinds else rope


def stretched(rope):
    """The context in tokens: a config of a scaled RoPE may name the trained one. llama3's does
    not."""
    numbers = rope.get("factor"), rope["trained"]
    is_scaled = rope["rope_type"] in ("linear", "dynamic", "yarn")
    if is_scaled and all(isinstance(x, (int, float)) and 1 <= x < 2**31 for x in numbers):
        return max(rope["context"], int(math.prod(numbers)))
    return rope["context"]                              # check() refuses numbers that are none


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
        return path.read_text("utf-8-sig")
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


PART = 2**24        # numbers that are expanded at a time: this bounds the memory
FOLD = 64           # rows that the package takes as one: by itself it expands few at a time


def open_gguf(path, dtype):
    reader = gguf_reader(path)

    def get(key, *default):
        if key not in reader.fields and not default:
            raise InputError(f"{path} lacks the key {key}")
        return reader.fields[key].contents() if key in reader.fields else default[0]

    readers = [reader, *map(gguf_reader, other_parts(path, get))]
    tensors = {t.name: t for part in readers for t in part.tensors}
    config = config_from_gguf(get, tensors)
    if "rope_freqs.weight" in tensors:  # llama3 scaling, already worked out
        config["rope"]["freq_factors"] = torch.tensor(tensors.pop("rope_freqs.weight").data)
    paired = config["head_dim"] if get("general.architecture") == "llama" else None
    from tokenizer import gguf_tokenizer
    return config, read_gguf(tensors, dtype, paired), gguf_tokenizer(get, config["eos_ids"])


def gguf_reader(path):
    import gguf
    try:
        return gguf.GGUFReader(path)
    except Exception as e:  # the package lets through whatever numpy raises
        raise InputError(f"{path} is missing, truncated or not GGUF: {one_line(e)}") from None


def other_parts(path, get):
    """The other files of a model that is split over several."""
    n = get("split.count", 1)
    if n == 1:
        return []
    part = re.fullmatch(r"(.*-)00001(-of-\d{5}\.gguf)", path.name)
    if not part:
        raise InputError(f"{path} is a part of {n} files: give the first one, whose name ends in "
                         f"-00001-of-{n:05}.gguf, or merge them")
    return [path.with_name(f"{part[1]}{i:05}{part[2]}") for i in range(2, n + 1)]


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
    factor = own("rope.scaling.factor", own("rope.scale_linear", 1.0))
    scaling = own("rope.scaling.type", "none" if factor == 1 else "linear")
    rope = {"rope_type": "default" if scaling == "none" else scaling, "context": limit,
            "rope_theta": own("rope.freq_base", 10000.0), "factor": factor,
            "trained": own("rope.scaling.original_context_length", limit)}
    refuse(rope["rope_type"] not in ROPES, "RoPE", rope["rope_type"], ROPES)
    ends = (get(f"tokenizer.ggml.{name}_token_id", None) for name in ("eos", "eot"))
    return {
        "vocab_size": len(get("tokenizer.ggml.tokens")), "hidden_size": hidden,
        "intermediate_size": own("feed_forward_length"), "num_hidden_layers": own("block_count"),
        "num_attention_heads": heads, "num_key_value_heads": own("attention.head_count_kv", heads),
        "head_dim": head_dim, "rms_norm_eps": own("attention.layer_norm_rms_epsilon"),
        "context": stretched(rope), "rope": rope,
        "tied": "output.weight" not in tensors, "qkv_bias": "blk.0.attn_q.bias" in tensors,
        "o_bias": "blk.0.attn_output.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "qk_norm": "blk.0.attn_q_norm.weight" in tensors,
        "eos_ids": frozenset(e for e in ends if e is not None)}


def read_gguf(tensors, dtype, paired):
    """Names and tensors, expanded by several threads, a few tensors ahead."""
    pending, n = deque(), torch.get_num_threads()
    with ThreadPoolExecutor(n) as pool:
        for t in tensors.values():
            pending.append(pool.submit(expand, t, dtype, paired))
            if len(pending) > n:
                yield pending.popleft().result()
        for future in pending:
            yield future.result()


def expand(t, dtype, paired):
    """The name of a GGUF tensor, and its numbers. paired: the dims of a head, where queries and
    keys have the two numbers that RoPE turns side by side."""
    import gguf
    try:
        tensor = torch.empty(*reversed(t.shape.tolist()), dtype=dtype)
        n = FOLD * max(PART * len(tensor) // max(tensor.numel(), 1) // FOLD, 1)
        for part, first in zip(tensor.split(n), range(0, len(tensor), n), strict=True):
            data = t.data[first:first + n]
            if data.ndim == 2:
                data = data.reshape(len(data) // math.gcd(len(data), FOLD), -1)
            part.copy_(torch.tensor(gguf.dequantize(data, t.tensor_type)).view_as(part))
        if paired and (".attn_q." in t.name or ".attn_k." in t.name):       # pairs (2i, 2i + 1)
            pairs = tensor.view(-1, paired // 2, 2, *tensor.shape[1:])
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
    except Exception as e:      # the package lets through whatever numpy raises
        raise InputError(f"tensor {t.name} cannot be read: {one_line(e)}") from None
    return ".".join(GGUF_NAMES.get(part, part) for part in t.name.split(".")), tensor
