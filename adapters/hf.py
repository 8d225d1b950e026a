"""Our attention under a model of Hugging Face's transformers, in its layers of full attention.

    cache = adopt(model, RetroConfig(), capacity=8192)      # or GraphConfig(), or AnchorConfig()
    model.generate(**inputs, past_key_values=cache)         # padded on the left

Does not include: beams, assisted decoding, latent attention, soft caps, learned sinks, masks of
four dimensions, saved indexes, a step as one graph.
"""
import threading

import torch
from transformers import AttentionInterface, masking_utils
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from app.method import METHODS, classes
from generate import hot_functions
from retroinfer import InputError

NAME = "retroinfer"
noted = threading.local()       # .layer: the one that update() has just met, for attend


def adopt(model, config, capacity):
    """Switch a loaded model to our attention. An empty cache, of sequences of up to `capacity`
    tokens, for its generate(). Attention that we do not have is an InputError when it runs."""
    theirs = model.config.get_text_config(decoder=True)
    kind, = (cache for numbers, cache in map(classes, METHODS) if numbers is type(config))
    cache = Cache(config=theirs)
    for n, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[n] = Layer(theirs, kind, config, capacity)
    model.set_attn_implementation(NAME)
    return cache


class Cache(DynamicCache):
    """transformers' cache. Its generate() can compile a step if all of its layers are ours."""

    def get_mask_sizes(self, *args, **kwargs):
        if not torch.compiler.is_compiling():       # what a graph cannot do is done before it
            for layer in self.layers:
                if isinstance(layer, Layer):
                    layer.make_room()
        return super().get_mask_sizes(*args, **kwargs)


class Layer(DynamicLayer):
    """A layer of transformers' cache, with one of ours in it, of a class `kind`."""
    is_croppable, is_compileable = False, True

    def __init__(self, theirs, kind, config, capacity):
        self.theirs, self.made_of = theirs, (kind, config, capacity)
        self.reset()

    def reset(self):
        self.cache, self.padding, self.has_read, self.full_at = None, 0, False, 0

    def update(self, k, v, *args, **kwargs):
        """Note this layer for attend(), which gets k, v (B, H, T, D) of the new tokens alone."""
        if (given := self.theirs._attn_implementation) != NAME:
            raise InputError(f"attn_implementation is now {given}: this cache needs {NAME}")
        if self.cache is None:
            kind, config, capacity = self.made_of
            self.cache = kind(config, capacity, len(k))
            self.cache.hot = hot_functions(k.device)    # a WaveIndex attends by it
        if (batch := len(self.cache.n_tokens)) != len(k):
            raise InputError(f"this cache is of a batch of {batch}, given are {len(k)}: adopt anew")
        noted.layer = self
        return k, v

    def get_seq_length(self, *args):
        return 0 if self.cache is None else self.cache.n_tokens[0] + self.padding

    def get_mask_sizes(self, new):          # tokens: their number, or their positions
        seen, new = self.get_seq_length(), new if isinstance(new, int) else len(new)
        if not torch.compiler.is_compiling():
            noted.new = slice(int(seen), int(seen) + new)
        return seen + new, 0

    def refuse(self, *args, **kwargs):
        raise InputError("beams and assisted decoding take tokens back, this cache cannot")
    reorder_cache = crop = batch_repeat_interleave = batch_select_indices = refuse

    def read(self, q, k, v, is_token):
        """Exact causal attention (B, H*G, T, D) of new tokens. is_token (B, T): not padding."""
        is_token = torch.ones_like(q[:, 0, :, 0]) if is_token is None else is_token[:, 0, 0]
        is_token = is_token.bool()
        o, falls = torch.zeros_like(q), (is_token[:, 1:] < is_token[:, :-1]).any(-1)
        for row, some in enumerate(is_token):
            if falls[row] or (self.cache.n_tokens[row] and not some.any()):
                raise InputError(f"sequence {row} is padded on the right: pad on the left")
            if some.any():
                new = (x[row:row + 1, :, some] for x in (q, k, v))
                o[row, :, some] = self.cache.prefill(*new, row=row)[0]
        self.padding, self.full_at = self.padding + (~is_token[0]).sum(), 0
        self.has_read = bool(self.cache.n_tokens.all())
        return o

    def make_room(self):
        """Prepare the next step. An InputError if the cache is full."""
        if not self.has_read or (seen := int(self.get_seq_length())) < self.full_at:
            return
        self.full_at = seen + self.cache.update()
        if self.full_at == seen:
            raise InputError(f"the cache is full: its capacity is {self.cache.capacity}")


def attend(module, q, k, v, mask=None, **facts):
    """The attention (B, T, H*G, D) of the layer that update() noted; of a sliding layer, SDPA's."""
    layer, noted.layer = getattr(noted, "layer", None), None
    if layer is None and facts.get("sliding_window"):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, **facts)
    if layer is None:
        raise InputError("an adopted model needs a cache of adopt(), and layers of full attention")
    is_ours = mask is None or (mask.shape[1:] == (1, 1, k.shape[2]) and mask.dtype == torch.bool)
    if facts.get("softcap") or facts.get("s_aux") is not None or not is_ours or (
            q.shape[3] != v.shape[3]):
        raise InputError("we have no soft caps, latent attention, sinks, masks of four dimensions")
    q = q * (facts["scaling"] * q.shape[3] ** 0.5)      # our caches divide by the root
    is_step = k.shape[2] == 1 and layer.has_read and mask is None
    o = layer.cache.decode(q, k, v) if is_step else layer.read(q, k, v, mask)
    return o.transpose(1, 2), None


def mask_of(*args, **facts):
    """Which tokens are no padding (B, T), or None. For a layer with a window, SDPA's mask."""
    if facts.get("local_size") is not None:
        return masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **facts)
    if facts["mask_function"] is not masking_utils.causal_mask_function:
        raise InputError("we have causal attention alone, and this input asks for another")
    if (mask := facts.get("attention_mask")) is None:
        return None
    is_token = mask[:, None, None, noted.new].bool()
    return None if is_token.all() else is_token


AttentionInterface.register(NAME, attend)
masking_utils.AttentionMaskInterface.register(NAME, mask_of)
