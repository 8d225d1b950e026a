"""An index on disk: a text is read once, and questions about it are asked on other days.

    save("log.safetensors", model, tokenizer, caches, ids, text)    # after a prefill of ids (T,)

    snapshot = Snapshot("log.safetensors", model, tokenizer, config)
    caches = [WaveIndex(config, capacity) for _ in model.layers]        # of any capacity
    snapshot.restore(caches)                                    # now prefill or decode as usual

It is one safetensors file: token_ids (T,), the text in UTF-8, and the tensors of cache.state(0) of
each layer N, named N.centroids, N.sizes and so on. Keys and values are kept head by head, as N.k.0
and N.k.1: a head's rows are one run of memory, so saving takes no second copy of them. Its header
holds the version of this format, a CRC-32 of each tensor, and a fingerprint of all that shaped the
index: model, weights, dtype, RoPE, tokenizer, settings. Only its owner may read the file.

Does not include: batches, compression (the file holds K and V in the dtype of the model, also of a
store of 8 bits, which rounds them once more). The fingerprint reads a sample of each weight matrix:
two models that differ elsewhere have the same fingerprint.
"""
import datetime
import json
import os
import zlib
from dataclasses import asdict
from pathlib import Path

import torch

from app.session import n_same
from model import RingCache
from retroinfer import InputError, WaveIndex

KIND = "retroinfer index"
FORMAT = f"{KIND} 10"
SETTINGS = ("sink", "local", "update", "segment", "cluster", "bits", "iterations", "by_mass",
            "channel_power")                            # those that shape an index
SAMPLE = 4096           # elements of each parameter in the fingerprint, at even distances


def save(path, model, tokenizer, caches, ids, text):
    """Write the index of one sequence of token ids (T,) to a file, whole or not at all. They are
    those of a text, as far as no question changes them.

    The new file replaces an old one only when it is complete. InputError if it cannot be written;
    the old file is then unchanged.
    """
    letters = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    tensors = {"token_ids": ids.cpu(), "text": letters}
    config = next(cache.config for cache in caches if isinstance(cache, WaveIndex))
    for n, cache in enumerate(caches):
        tensors |= {f"{n}.{name}": x for name, x in split_heads(cache.state(0))}
    header = {"format": FORMAT,
              "fingerprint": json.dumps(fingerprint(model, tokenizer, config)),
              "now": tokenizer.now.isoformat() if writes_date(tokenizer) else "",
              "crc32": json.dumps({name: crc32(x) for name, x in tensors.items()})}
    write(path, tensors, header)


def writes_date(tokenizer):
    """Whether prompts depend on the day. Without it, two runs write the same file."""
    return "strftime_now" in (tokenizer.template or "")


def split_heads(state):
    """Names and tensors of a layer's state as the file has them."""
    for name, x in state.items():
        if name in ("k", "v"):
            yield from ((f"{name}.{h}", head.cpu()) for h, head in enumerate(x))
        else:
            yield name, x.contiguous().cpu()


def write(path, tensors, header):
    """Write a safetensors file under another name, and rename it when it is safe on the disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    path = Path(os.path.realpath(path))             # a link stays a link
    part = path.with_name(f".retroinfer-{os.getpid()}.part")
    try:
        save_file(tensors, part, header)
        with open(part, "rb") as f:
            os.fsync(f.fileno())
        part.replace(path)
    except (OSError, SafetensorError) as e:
        raise InputError(f"cannot write {path}: {e}") from None
    finally:
        part.unlink(missing_ok=True)                # also when a person stops the program


def check_place(path, kind=KIND):
    """InputError if no file can be written at path, or a file of another kind is there."""
    place = Path(os.path.realpath(path))
    try:
        is_taken, size = place.exists(), place.stat().st_size if place.is_file() else 0
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror}") from None
    if not place.parent.is_dir() or place.is_dir() or not os.access(place.parent, os.W_OK):
        raise InputError(f"cannot write {path}: its folder must exist and be writable")
    if is_taken and not place.is_file():
        raise InputError(f"cannot write {path}: it is no regular file")
    if size and not str(metadata(place).get("format")).startswith(kind):
        raise InputError(f"{path} exists and is no {kind.split()[-1]}: delete it first, or give "
                         "another name")


def metadata(path):
    """The words in the header of a safetensors file. Empty if the file is no such file."""
    from safetensors import SafetensorError, safe_open
    try:
        return safe_open(path, "pt").metadata() or {}
    except (OSError, SafetensorError):
        return {}


class Snapshot:
    """A saved index. Opening it checks its header; restore reads its tensors. The tokenizer gets
    the date of the index, if its chat template writes one into the prompt."""

    def __init__(self, path, model, tokenizer, config):
        """InputError if the file is no index, has an older format, or is of another model."""
        from safetensors import SafetensorError, safe_open
        self.path, self.model = path, model
        try:
            self.file = safe_open(path, "pt")
        except OSError as e:
            raise InputError(f"cannot read the index {path}: {e.strerror or e}") from None
        except SafetensorError as e:
            raise InputError(f"the index {path} is truncated or damaged: {e}") from None
        header = self.file.metadata() or {}
        if (found := header.get("format")) != FORMAT:
            raise InputError(f"{path} is {f'of format {found!r}' if found else 'no index'}; this "
                             f"program reads {FORMAT!r}: make it anew with --save-index")
        try:
            theirs, self.crc32 = (dict(json.loads(header[name]))
                                  for name in ("fingerprint", "crc32"))
            if header["now"]:
                tokenizer.now = datetime.datetime.fromisoformat(header["now"])
        except (KeyError, TypeError, ValueError):
            raise self.damaged("its header cannot be read") from None
        if self.crc32.keys() != set(self.file.keys()):
            raise self.damaged("the names of its tensors have changed")
        self.check(theirs, fingerprint(model, tokenizer, config))
        self.ids = self.tensor("token_ids")
        if self.ids.dtype != torch.int64 or self.ids.dim() != 1:
            raise self.damaged("token_ids is no list of whole numbers")
        letters = self.tensor("text")
        try:
            if letters.dtype != torch.uint8:
                raise ValueError
            self.text = letters.numpy().tobytes().decode()
        except ValueError:                              # not UTF-8, too
            raise self.damaged("its text is not UTF-8") from None

    def damaged(self, why):
        return InputError(f"the index {self.path} is damaged: {why}")

    def check(self, theirs, ours):
        """InputError that names the first difference between two fingerprints."""
        for name, mine in ours.items():
            if (other := theirs.get(name)) != mine:
                raise InputError(f"{self.path} was made with {name} {other}, here it is {mine}: "
                                 "make it anew with --save-index")

    def tensor(self, name):
        """A tensor of the file. InputError if it is damaged."""
        if name not in self.crc32:
            raise self.damaged(f"{name} is missing")
        x = self.file.get_tensor(name)
        if crc32(x) != self.crc32[name]:
            raise self.damaged(f"{name} is not what was written")
        return x

    def unread(self, ids):
        """What follows the index's tokens in ids (T,). InputError if ids do not begin with them."""
        same = n_same(ids.tolist(), self.ids.tolist())
        if same < len(self.ids):
            raise InputError(f"the prompt is not the text of {self.path}: of its "
                             f"{len(self.ids):,} tokens only the first {same:,} are the same")
        return ids[same:]

    def restore(self, caches):
        """Fill one empty cache for each layer. InputError if the text does not fit."""
        if len(self.ids) > caches[0].capacity:
            raise InputError(f"the {len(self.ids):,} tokens of {self.path} do not fit caches of "
                             f"{caches[0].capacity:,}")
        weight, c = self.model.lm_head.weight, self.model.config
        like = torch.empty(1, c.num_key_value_heads, 0, c.head_dim, dtype=weight.dtype)
        for n, cache in enumerate(caches):
            if isinstance(cache, RingCache):
                cache.restore(self.ring(n, cache.window, like[0]), len(self.ids), weight.device)
                continue
            empty = WaveIndex(cache.config, 1)
            empty.allocate(like)
            state = self.state(n, empty.state(0))
            if fault := find_fault(state, len(self.ids), cache.config):
                raise self.damaged(f"layer {n}: {fault}")
            cache.restore(state, weight.device)

    def ring(self, layer, window, like):
        """The state of a layer that sees a window, for keys `like` (H, 0, D)."""
        rows = min(window, len(self.ids))
        state = {name: self.heads(f"{layer}.{name}", like, rows) for name in ("k", "v")}
        if not all(x.isfinite().all() for x in state.values()):
            raise self.damaged(f"layer {layer}: it holds NaN or infinity")
        return state

    def state(self, layer, empty):
        """The state of a layer. InputError if it does not have the form of `empty`, a state that
        holds no token."""
        _, c = self.checked(f"{layer}.counters", empty["counters"], 0).tolist()
        rows = dict.fromkeys(empty, c) | {"centre": min(c, 1)}
        state = {name: self.checked(f"{layer}.{name}", like, rows[name])
                 for name, like in empty.items() if name not in ("k", "v")}
        return state | {name: self.heads(f"{layer}.{name}", empty[name], len(self.ids))
                        for name in ("k", "v")}

    def heads(self, name, like, rows):
        """Keys or values (H, rows, D), which the file has head by head."""
        return torch.stack([self.checked(f"{name}.{h}", x, rows) for h, x in enumerate(like)])

    def checked(self, name, like, rows):
        """A tensor of the file, of the type and shape of `like`, which has no rows where this one
        has so many. InputError if it is another."""
        x, wanted = self.tensor(name), [n or rows for n in like.shape]
        if x.dtype != like.dtype or list(x.shape) != wanted:
            raise self.damaged(f"{name} is {x.dtype} {list(x.shape)}, not {like.dtype} {wanted}")
        return x


def find_fault(state, n_tokens, config):
    """What contradicts itself in a layer's state of n_tokens, in words; None if nothing does."""
    n_indexed, n_clusters = state["counters"].tolist()
    sizes, offsets = state["sizes"], state["offsets"]
    most = max(n_tokens - config.sink - config.local, 0)
    if not 0 <= n_indexed <= most or not 0 <= n_clusters <= config.slots(n_indexed):
        return f"{n_indexed} indexed tokens in {n_clusters} clusters, of {n_tokens} tokens"
    if not ((sizes >= 0) & (sizes <= config.largest) & (sizes == sizes.round())).all():
        return f"a cluster does not have 0 to {config.largest} members"
    if (sizes.sum(-1) != n_indexed).any():
        return f"its clusters do not hold the {n_indexed} indexed tokens"
    if not offsets.equal((config.sink + sizes.cumsum(-1) - sizes).long()):
        return "its clusters do not follow one another"
    numbers = [name for name, x in state.items() if not x.isfinite().all()]
    return f"{numbers[0]} holds NaN or infinity" if numbers else None


def fingerprint(model, tokenizer, config):
    """All that shapes an index, by name, with a CRC-32 in place of what is too long."""
    settings = {f"--set {name}": getattr(config, name) for name in SETTINGS}
    return json.loads(json.dumps(origin(model, tokenizer) | settings))      # as a file holds it


def origin(model, tokenizer):
    """What tells a model from all others, by name."""
    weights = 0
    for name, x in sorted(model.named_parameters()):
        some = x.flatten()[::max(1, x.numel() // SAMPLE)]
        weights = zlib.crc32(name.encode(), crc32(some, weights))
    sizes = asdict(model.config) | {"eos_ids": sorted(model.config.eos_ids)}
    rope = {f"RoPE {name}": x if not isinstance(x, torch.Tensor) else f"of CRC-32 {crc32(x)}"
            for name, x in sizes.pop("rope").items()}
    return {"dtype": str(model.lm_head.weight.dtype).removeprefix("torch."), **rope, **sizes,
            "weights of CRC-32": weights,
            "a tokenizer of CRC-32": zlib.crc32(tokenizer.definition())}


def crc32(x, start=0):
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(x.cpu().contiguous().view(-1).view(torch.uint8).numpy(), start)
