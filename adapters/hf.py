"""Our attention under a model of Hugging Face's transformers, in its layers of full attention.

    cache = adopt(model, RetroConfig(), capacity=8192)      # or GraphConfig(), or AnchorConfig()
    model.generate(**inputs, past_key_values=cache)         # padded on the left; from 5.24: cache=

Does not include: beams, assisted decoding, latent attention, soft caps, sinks, saved indexes.
"""
import threading

import torch
from transformers import AttentionInterface, masking_utils
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from app.method import METHODS, classes
from generate import hot_functions
from retroinfer import InputError

NAME = "retroinfer"
noted = threading.local()   # layer: the one that update() met last; new: the slice of new tokens


def adopt(model, config, capacity):
    """Switch a loaded model to our attention. An empty cache of `capacity` tokens."""
    peers, theirs = [], model.config.get_text_config(decoder=True)
    kind, = (cache for numbers, cache in map(classes, METHODS) if numbers is type(config))
    model.set_attn_implementation(NAME)
    return Cache(layers=[Layer(peers, theirs, kind, config, capacity) if type(x) is DynamicLayer
                         else x for x in DynamicCache(config=theirs).layers])


class Layer(DynamicLayer):
    """A layer of transformers' cache, with one of ours, of class `kind`. peers: all such layers."""
    is_croppable, is_compileable = False, True

    def __init__(self, peers, theirs, kind, *numbers):
        self.peers, self.theirs, self.kind, self.numbers = peers, theirs, kind, numbers
        peers.append(self)
        self.reset()

    def reset(self):
        self.cache, self.padding, self.has_read, self.full_at = None, 0, False, 0

    def update(self, k, v, *args, **kwargs):
        """Note this layer for attend(), which gets k, v (B, H, T, D) of the new tokens alone."""
        if (given := self.theirs._attn_implementation) != NAME:
            raise InputError(f"attn_implementation is now {given}: this cache needs {NAME}")
        if self.cache is None:
            self.cache = self.kind(*self.numbers, len(k))
            self.cache.hot = hot_functions(k.device)    # a WaveIndex attends by it
        if (batch := len(self.cache.n_tokens)) != len(k):
            raise InputError(f"this cache is of a batch of {batch}, given are {len(k)}: adopt anew")
        noted.layer = self
        return k, v

    def get_seq_length(self, *args):
        return 0 if self.cache is None else self.cache.n_tokens[0] + self.padding

    def get_mask_sizes(self, new):          # tokens: their number, or their positions
        seen, new = self.get_seq_length(), new if isinstance(new, int) else len(new)
        if not torch.compiler.is_compiling():       # what a graph cannot do is done before it
            noted.new = slice(int(seen), int(seen) + new)
            for layer in self.peers:
                layer.make_room(int(seen))
        return seen + new, 0

    def make_room(self, seen):
        """Index what may be, if no step fits. An InputError if then too none does."""
        if self.has_read and seen >= self.full_at:
            self.full_at = seen + self.cache.update()
            if self.full_at == seen:
                raise InputError(f"the cache is full: its capacity is {self.cache.capacity}")

    def refuse(self, *args, **kwargs):
        raise InputError("beams and assisted decoding take tokens back, this cache cannot")
    reorder_cache = crop = batch_repeat_interleave = batch_select_indices = refuse

    def attend(self, q, k, v, mask):
        """The attention (B, H*G, T, D) of new tokens. mask (B, 1, 1, T): which are no padding."""
        if k.shape[2] == 1 and self.has_read and mask is None:
            return self.cache.decode(q, k, v)
        is_token = (torch.ones_like(q[:, 0, :, 0]) if mask is None else mask[:, 0, 0]).bool()
        o, falls = torch.zeros_like(q), (is_token[:, 1:] < is_token[:, :-1]).any(-1)
        for row, some in enumerate(is_token):
            if falls[row] or (self.cache.n_tokens[row] and not some.any()):
                raise InputError(f"sequence {row} is padded on the right: pad on the left")
            if some.any():
                new = (x[row:row + 1, :, some] for x in (q, k, v))
                o[row, :, some] = self.cache.prefill(*new, row=row)[0]
        self.padding += (~is_token[0]).sum()
        self.full_at, self.has_read = 0, bool(self.cache.n_tokens.all())
        return o


def attend(module, q, k, v, mask=None, **facts):
    """The attention (B, T, H*G, D) of the layer that update() noted; of a sliding layer, SDPA's."""
    layer, noted.layer = getattr(noted, "layer", None), None
    if layer is None and facts.get("sliding_window"):
        return AttentionInterface()["sdpa"](module, q, k, v, mask, **facts)
    if layer is None:
        raise InputError("an adopted model needs a cache of adopt(), and layers of full attention")
    is_ours = not facts.get("softcap") and facts.get("s_aux") is None and q.shape[3] == v.shape[3]
    if not is_ours or (mask is not None and mask.shape[1:] != (1, 1, k.shape[2])):
        raise InputError("we have no soft caps, latent attention, sinks, masks of four dimensions")
    q = q * (facts["scaling"] * q.shape[3] ** 0.5)      # our caches divide by the root
    return layer.attend(q, k, v, mask).transpose(1, 2), None


def mask_of(*args, **facts):
    """Which new tokens are no padding (B, 1, 1, T); None if all. With a window, SDPA's mask."""
    if facts.get("local_size") is not None:
        return masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **facts)
    if facts["mask_function"] is not masking_utils.causal_mask_function:
        raise InputError("we have causal attention alone, and this input asks for another")
    if (mask := facts.get("attention_mask")) is not None:
        mask = mask[:, None, None, noted.new].bool()
    return None if mask is None or mask.all() else mask


AttentionInterface.register(NAME, attend)
masking_utils.AttentionMaskInterface.register(NAME, mask_of)
