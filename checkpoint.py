"""Checkpoints: the shape, weights and tokenizer in a model directory or a .gguf file.

    config, tensors, tokenizer = open_checkpoint(path, torch.bfloat16)

config     a dict of model.ModelConfig's fields
tensors    an iterator of (name, tensor): names are Hugging Face's, without the leading "model."
tokenizer  tokenizer.Tokenizer, whatever file it comes from

Whatever is wrong with a file is an InputError of one line. Pickles are refused: opening one runs
its code.

Does not include: weights in whole numbers, images.
"""
import functools
import json
import math
import re
import struct
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from retroinfer import InputError

GEMMA = "gemma3_text"   # Gemma 3 without its eyes; GGUF calls it gemma3
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", GEMMA)
LAYERS = "sliding_attention", "full_attention"
ROPES = ("default", "linear", "dynamic", "llama3", "yarn")
ROPE_NUMBERS = ("rope_theta", "factor", "trained", "low_freq_factor", "high_freq_factor",
                "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")


def open_checkpoint(path, dtype=torch.float32, take_part=None):
    """(config, tensors, tokenizer) of a Hugging Face directory or a GGUF file.

    dtype: that of quantised tensors, once they are expanded. take_part: parallel.take_part, for a
    part of the model.
    """
    if path.suffix in (".bin", ".pt", ".pth"):
        raise InputError(f"{path} is a pickle, which runs code when opened: convert to safetensors")
    if not path.exists():
        raise InputError(f"no model at {path}: give a directory with config.json and "
                         "*.safetensors, or a .gguf file")
    try:
        config, read, tokenizer = (open_gguf(path, dtype) if path.is_file() else
                                   open_directory(path))
        check(config, path)
        check_size(config, tokenizer, path)
        config["eos_ids"] = tokenizer.eos_ids
        config, cut = take_part(config) if take_part else (config, None)
    except (InputError, ImportError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # damaged data break a reader anywhere; Rust's is no Exception
        raise InputError(f"{path} is damaged or foreign: {type(e).__name__}: {one_line(e)}"
                         ) from None
    return config, read(cut), tokenizer


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
    check_number("rms_norm_eps", config["rms_norm_eps"], path)
    for rope in filter(None, (config["rope"], config.get("local_rope"))):
        check_rope(rope, path)
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % groups:
        raise InputError(f"{path}: {heads} heads do not share {groups} key-value heads evenly")
    if config["head_dim"] % 2:
        raise InputError(f"{path}: head_dim is {config['head_dim']}: RoPE needs an even number")
    widest = max(config["vocab_size"], config["intermediate_size"])
    if widest * config["hidden_size"] >= 2**40:
        raise InputError(f"{path}: a matrix of {widest:,} x {config['hidden_size']:,} fits no "
                         "machine")


def check_number(name, x, path):
    if type(x) not in (int, float) or not 0 <= x < math.inf:
        raise InputError(f"{path}: {name} is {x!r}, not a number from 0")


def check_rope(rope, path):
    """InputError for a RoPE that lacks its numbers."""
    for name in ROPE_NUMBERS:
        check_number(name, rope.get(name, 0), path)
    needed = {"default": (), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    for name in needed.get(rope["rope_type"], ("factor",)):
        if not isinstance(rope.get(name), (int, float)):
            raise InputError(f"{path}: RoPE {rope['rope_type']!r} lacks its number {name}")
    if rope["rope_type"] == "yarn" and not rope["rope_theta"] > 1:
        raise InputError(f"{path}: rope_theta is {rope['rope_theta']}: YaRN needs more than 1")


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
    read = functools.partial(read_safetensors, files)
    return config, read, directory_tokenizer(path, config["eos_ids"])


def config_from_json(c):
    kind, heads = c.get("model_type"), c["num_attention_heads"]
    refuse(kind not in ARCHITECTURES, "architecture", kind, ARCHITECTURES)
    refuse("quantization_config" in c, "quantization_config", "of the checkpoint", ["none", "GGUF"])
    check_activation(c, kind)
    rope, local_rope = ropes_from_json(c, kind)
    biased, eos = kind != "mistral" and c.get("attention_bias", False), c.get("eos_token_id")
    head_dim = c.get("head_dim") or {"qwen3": 128, GEMMA: 256}.get(kind)
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    config = {name: c[name] for name in same} | {
        "num_attention_heads": heads, "num_key_value_heads": c.get("num_key_value_heads") or heads,
        "head_dim": head_dim or c["hidden_size"] // heads,
        "rms_norm_eps": c.get("rms_norm_eps", 1e-6), "context": stretched(rope),
        "rope": rope, "local_rope": local_rope,
        "windows": windows_from_json(c, kind, stretched(rope)),
        "tied": c.get("tie_word_embeddings", kind == GEMMA),
        "qk_norm": kind in ("qwen3", GEMMA),
        "qkv_bias": kind == "qwen2" or biased, "o_bias": kind != "qwen2" and biased,
        "mlp_bias": c.get("mlp_bias", False),
        "eos_ids": frozenset([eos] if isinstance(eos, int) else eos or [])}
    return as_gemma(config, c, c.get("query_pre_attn_scalar", 256)) if kind == GEMMA else config


def check_activation(c, kind):
    """InputError if a config names another activation than its family has."""
    name, ours = ("hidden_activation", "gelu_pytorch_tanh") if kind == GEMMA else (
        "hidden_act", "silu")
    refuse(c.get(name, ours) != ours, name, c.get(name), [ours])


def as_gemma(config, given, scalar):
    """A config with what Gemma 3 does besides. InputError for what it has given up.

    scalar: attention scores are divided by its square root.
    """
    for name in ("attn_logit_softcapping", "final_logit_softcapping",
                 "use_bidirectional_attention"):
        refuse(given.get(name), name, given.get(name), ["none"])
    if type(scalar) not in (int, float) or not 0 < scalar < math.inf:
        raise InputError(f"query_pre_attn_scalar is {scalar!r}, not a number above 0")
    context = config["rope"]["context"]             # counts the factor of RoPE already
    return config | {"is_gemma": True, "context": context,
                     "query_scale": (config["head_dim"] / scalar) ** 0.5}


def ropes_from_json(c, kind):
    """The RoPE of a model's layers, and another one of those with a window, or None."""
    given = c.get("rope_parameters") or c.get("rope_scaling") or {}         # new name, old name
    if kind != GEMMA:
        return rope_from_json(c, one_rope(given), c.get("rope_theta", 1e4)), None
    named = given if "full_attention" in given else {"full_attention": given}
    return (rope_from_json(c, named["full_attention"], c.get("rope_theta", 1e6)),
            rope_from_json(c, named.get("sliding_attention", {}),
                           c.get("rope_local_base_freq", 1e4)))


def one_rope(rope):
    """The RoPE of all layers, where a config names it for each type of layer."""
    kinds = [x for x in rope.values() if isinstance(x, dict)]
    refuse(any(x != kinds[0] for x in kinds), "RoPE that differs between the layers", list(rope),
           ["one for all layers"])
    return kinds[0] if kinds else rope


def rope_from_json(c, given, theta):
    """A RoPE by the numbers that a config gives; theta, if none is among them."""
    limit = c["max_position_embeddings"]
    rope = {name: x for name, x in given.items() if x is not None}
    rope["rope_type"] = rope.get("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", theta)
    rope |= {"trained": rope.get("original_max_position_embeddings") or limit, "context": limit}
    partial = rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))
    refuse(rope["rope_type"] not in ROPES, "RoPE", rope["rope_type"], ROPES)
    refuse(partial != 1.0, "partial_rotary_factor", partial, [1.0])
    return rope


def windows_from_json(c, kind, context):
    """How many of the latest tokens each layer sees; 0: all. Empty if all layers see all.

    A window as long as the context is none. (Gemma's layers with one turn by a RoPE of their own.)
    """
    window = c.get("sliding_window", 0 if kind == "mistral" else 4096)
    slides = c.get("use_sliding_window", kind in ("mistral", GEMMA)) and kind != "llama"
    if not (slides and window) or (kind != GEMMA and window >= context):
        return []
    if type(window) is not int or window < 1:
        raise InputError(f"sliding_window is {window!r}, not a whole number from 1")
    first, every = c.get("max_window_layers", 28), c.get("sliding_window_pattern", 6)
    does_slide = {"mistral": lambda i: True, GEMMA: lambda i: (i + 1) % every}.get(
        kind, lambda i: i >= first)
    layers = range(min(c["num_hidden_layers"], 10_000))                     # check() refuses more
    kinds = c.get("layer_types") if kind != "mistral" else None
    kinds = kinds or [LAYERS[0 if does_slide(i) else 1] for i in layers]
    if unknown := [x for x in kinds if x not in LAYERS]:
        refuse(unknown, "layer type", unknown[0], LAYERS)
    if len(kinds) != len(layers):
        raise InputError(f"layer_types names {len(kinds)} layers of {len(layers)}")
    return [window if x == LAYERS[0] else 0 for x in kinds]


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


def read_safetensors(files, cut=None):
    """Names and tensors, or of each tensor the rows and columns cut(name): only these are read."""
    from safetensors import SafetensorError, safe_open
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                for name in f.keys():  # noqa: SIM118 (the handle is no dict)
                    ours = name.removeprefix("model.")
                    if cut is None:
                        yield ours, f.get_tensor(name)
                    else:
                        x = f.get_slice(name)
                        yield ours, x[cut(ours)[:len(x.get_shape())]].contiguous()
        except (SafetensorError, OSError) as e:
            raise InputError(f"{file} is missing, truncated or foreign: {one_line(e)}") from None


# ---------------------------------------------------------------- a GGUF file

GGUF_KINDS = ("llama", "qwen2", "qwen3", "gemma3")
GGUF_NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head", "blk": "layers",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj"}
GEMMA_NAMES = GGUF_NAMES | {
    "ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm"}


PART = 2**22        # numbers that are expanded at a time: this bounds the memory
FOLD = 16           # rows that the package takes as one: by itself it expands few at a time


def open_gguf(path, dtype):
    fields, tensors = read_header(path)

    def get(key, *default):
        if key not in fields and not default:
            raise InputError(f"{path} lacks the key {key}")
        return fields[key] if key in fields else default[0]

    for part in other_parts(path, get):
        tensors |= read_header(part)[1]
    config = config_from_gguf(get, tensors)
    if "rope_freqs.weight" in tensors:  # llama3 scaling, already worked out
        config["rope"]["freq_factors"] = tensors.pop("rope_freqs.weight").numbers()
    from tokenizer import gguf_tokenizer
    read = functools.partial(read_gguf, tensors, dtype, get("general.architecture"),
                             config["head_dim"])
    return config, read, gguf_tokenizer(get, config["eos_ids"])


def read_header(path):
    """The fields of a GGUF file by key, and its tensors by name. Their numbers stay on the disk."""
    import gguf  # noqa: F401 (if it is missing, that is no fault of the file)
    import numpy
    try:
        data = numpy.memmap(path, mode="r").view(numpy.ndarray)
        header = Header(data.data)
        if header.take("4sI") not in ((b"GGUF", 2), (b"GGUF", 3)):
            raise ValueError("it does not begin as a GGUF file of version 2 or 3 does")
        n_tensors, n_fields = header.take("QQ")
        fields = dict(header.field() for _ in range(n_fields))
        tensors = [header.tensor() for _ in range(n_tensors)]
        align = fields.get("general.alignment", 32)
        first = -(-header.at // align) * align
        return fields, {t.name: t._replace(data=t.cut(data[first:])) for t in tensors}
    except Exception as e:      # damaged bytes break it anywhere
        raise InputError(f"{path} is missing, truncated or not GGUF: {one_line(e)}") from None


# Kinds of fields, by the number that a file gives them: those of struct, and two of our own.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
           12: "d"}
TEXT, LIST = 8, 9


class Header:
    """Reads the header of a GGUF file, from its first byte on. (The package's own reader makes an
    array of every word of the vocabulary, which takes longer than all else.)"""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, form):
        """The next numbers, of a format of struct."""
        form = struct.Struct(f"<{form}")
        self.at += form.size
        return form.unpack_from(self.data, self.at - form.size)

    def text(self):
        n, = self.take("Q")
        return str(self.take(f"{n}s")[0], "utf-8")

    def texts(self, n):
        """The next n texts: what text() would read, without its detours."""
        take, found = struct.Struct("<Q").unpack_from, []
        for _ in range(n):
            first = self.at + 8
            self.at = first + take(self.data, first - 8)[0]
            found.append(str(self.data[first:self.at], "utf-8"))
        if self.at > len(self.data):
            raise ValueError("a text goes on past its end")
        return found

    def field(self):
        key, (kind,) = self.text(), self.take("I")
        return key, self.value(kind)

    def value(self, kind):
        if kind == TEXT:
            return self.text()
        if kind != LIST:
            return self.take(NUMBERS[kind])[0]
        kind, n = self.take("IQ")
        if kind == TEXT:
            return self.texts(n)
        if kind in NUMBERS:
            return list(self.take(f"{n}{NUMBERS[kind]}"))
        return [self.value(kind) for _ in range(n)]

    def tensor(self):
        name, (n,) = self.text(), self.take("I")
        *shape, kind, offset = self.take(f"{n}QIQ")
        return Packed(name, shape[::-1], kind, offset)


class Packed(NamedTuple):
    """A tensor of a GGUF file."""
    name: str
    shape: list             # the rows come first, as in torch
    kind: int               # of its numbers: gguf.GGMLQuantizationType
    offset: int             # behind the header
    data: object = None     # (rows, bytes), mapped from the file

    def cut(self, data):
        """Its bytes, a line for each row, of all that is behind the header."""
        from gguf.constants import GGML_QUANT_SIZES
        block, size = GGML_QUANT_SIZES[self.kind]
        rows, width = math.prod(self.shape[:-1]), self.shape[-1]
        n = rows * (width // block) * size
        if width % block or self.offset + n > len(data):
            raise ValueError(f"tensor {self.name} goes on past its end")
        return data[self.offset:self.offset + n].reshape(rows, -1)

    def numbers(self, rows=slice(None)):
        """Some rows as float32 numbers, one behind another, by the package's own arithmetic."""
        import gguf
        data = self.data[rows]
        data = data.reshape(len(data) // math.gcd(len(data), FOLD), -1)
        numbers = gguf.dequantize(data, gguf.GGMLQuantizationType(self.kind))
        return torch.from_numpy(numbers if numbers.flags.writeable else numbers.copy()).view(-1)


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

    refuse(kind not in GGUF_KINDS, "architecture", kind, GGUF_KINDS)
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
    config = {
        "vocab_size": len(get("tokenizer.ggml.tokens")), "hidden_size": hidden,
        "intermediate_size": own("feed_forward_length"), "num_hidden_layers": own("block_count"),
        "num_attention_heads": heads, "num_key_value_heads": own("attention.head_count_kv", heads),
        "head_dim": head_dim, "rms_norm_eps": own("attention.layer_norm_rms_epsilon"),
        "context": stretched(rope), "rope": rope,
        "tied": "output.weight" not in tensors, "qkv_bias": "blk.0.attn_q.bias" in tensors,
        "o_bias": "blk.0.attn_output.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "qk_norm": "blk.0.attn_q_norm.weight" in tensors,
        "eos_ids": frozenset(e for e in ends if e is not None)}
    return gemma_from_gguf(config, own) if kind == "gemma3" else config


def gemma_from_gguf(config, own):
    """A config with what GGUF files say of a Gemma, and what they leave to the reader."""
    n, window = config["num_hidden_layers"], own("attention.sliding_window")
    caps = {"attn_logit_softcapping": own("attn_logit_softcapping", 0),
            "final_logit_softcapping": own("final_logit_softcapping", 0)}
    local = {"rope_type": "default", "rope_theta": own("rope.freq_base_swa", 10000.0),
             "context": config["context"], "trained": config["context"]}
    # The largest Gemma 3 is the only one whose heads are narrower than its scale says.
    is_largest = n == 62
    scalar = config["hidden_size"] / config["num_attention_heads"] if is_largest else (
        config["head_dim"])
    windows = [window if (i + 1) % 6 else 0 for i in range(min(n, 10_000))]
    return as_gemma(config | {"windows": windows, "local_rope": local}, caps, scalar)


def read_gguf(tensors, dtype, kind, head_dim, cut=None):
    """Names and tensors, expanded by several threads, a few tensors ahead. Of each tensor the rows
    and columns cut(name), if cut is given."""
    pending, n = deque(), torch.get_num_threads()
    with ThreadPoolExecutor(n) as pool:
        for t in tensors.values():
            pending.append(pool.submit(expand, t, dtype, kind, head_dim, cut))
            if len(pending) > n:
                yield pending.popleft().result()
        for future in pending:
            yield future.result()


def expand(t, dtype, kind, head_dim, cut=None):
    """The name of a GGUF tensor, and its numbers, as Hugging Face's checkpoints have them. Of them
    the rows and columns cut(name), if cut is given."""
    names = GEMMA_NAMES if kind == "gemma3" else GGUF_NAMES
    name = ".".join(names.get(part, part) for part in t.name.split("."))
    rows, columns = cut(name) if cut else (slice(None), slice(None))
    if len(t.shape) == 1:                               # one line in the file
        rows, columns = slice(None), rows
    try:
        width = t.shape[-1]
        first, end, _ = rows.indices(len(t.data))
        tensor = torch.empty(end - first, len(range(width)[columns]), dtype=dtype)
        n = FOLD * max(PART // max(width, 1) // FOLD, 1)
        for at in range(first, end, n):
            numbers = t.numbers(slice(at, min(at + n, end))).view(-1, width)[:, columns]
            if kind == "gemma3" and t.name.endswith("norm.weight"):
                numbers -= 1                            # Gemma keeps norms minus one
            tensor[at - first:at - first + len(numbers)] = numbers
        tensor = tensor.view(-1, *t.shape[1:-1], *tensor.shape[1:] if len(t.shape) > 1 else ())
        if kind == "llama" and (".attn_q." in t.name or ".attn_k." in t.name):
            pairs = tensor.view(-1, head_dim // 2, 2, *tensor.shape[1:])    # (2i, 2i + 1)
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
    except Exception as e:      # the package lets through whatever numpy raises
        raise InputError(f"tensor {t.name} cannot be read: {one_line(e)}") from None
    return name, tensor
