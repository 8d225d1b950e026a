"""An index on disk: a text is read once, and questions about it are asked on other days.

    save("log.safetensors", model, tokenizer, caches, ids)      # after a prefill of ids (T,)

    snapshot = Snapshot("log.safetensors", model, tokenizer, config)
    caches = [WaveIndex(config, capacity) for _ in model.layers]        # of any capacity
    snapshot.restore(caches)                                    # now prefill or decode as usual

It is one safetensors file: token_ids (T,), and the tensors of cache.state(0) of each layer N, named
N.k, N.v, N.centroids and so on. Its header holds the version of this format, a CRC-32 of each
tensor, and a fingerprint of all that shaped the index: model, weights, dtype, RoPE, tokenizer,
settings.

Does not include: batches, compression (the file is as large as the cache). The fingerprint reads a
sample of each weight matrix: two models that differ elsewhere have the same fingerprint.
"""
import json
import os
import zlib
from dataclasses import asdict
from pathlib import Path

import torch

FORMAT = "retroinfer index 6"
SETTINGS = ("sink", "local", "update", "segment", "cluster", "bits", "iterations", "by_mass",
            "channel_power")                            # those that shape an index
SAMPLE = 4096           # elements of each parameter in the fingerprint, at even distances


def save(path, model, tokenizer, caches, ids):
    """Write the index of one sequence of token ids (T,) to a file, whole or not at all.

    The new file replaces an old one only when it is complete. ValueError if it cannot be written;
    the old file is then unchanged.
    """
    tensors = {"token_ids": ids.cpu()}
    for n, cache in enumerate(caches):
        tensors |= {f"{n}.{name}": x.contiguous().cpu() for name, x in cache.state(0).items()}
    header = {"format": FORMAT,
              "fingerprint": json.dumps(fingerprint(model, tokenizer, caches[0].config)),
              "crc32": json.dumps({name: crc32(x) for name, x in tensors.items()})}
    write(Path(path), tensors, header)


def write(path, tensors, header):
    """Write a safetensors file under another name, and rename it when it is safe on the disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, part, header)
        with open(part, "rb") as f:
            os.fsync(f.fileno())
        part.replace(path)
    except (OSError, SafetensorError) as e:
        part.unlink(missing_ok=True)
        raise ValueError(f"cannot write {path}: {e}") from None


def check_place(path):
    """ValueError if no file can be written at path."""
    folder = Path(path).parent
    if not folder.is_dir() or Path(path).is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write {path}: its folder must exist and be writable")


class Snapshot:
    """A saved index. Opening it checks its header; restore reads its tensors."""

    def __init__(self, path, model, tokenizer, config):
        """ValueError if the file is no index, has an older format, or is of another model."""
        from safetensors import SafetensorError, safe_open
        self.path, self.model = path, model
        try:
            self.file = safe_open(path, "pt")
        except OSError as e:
            raise ValueError(f"cannot read the index {path}: {e.strerror or e}") from None
        except SafetensorError as e:
            raise ValueError(f"the index {path} is truncated or damaged: {e}") from None
        header = self.file.metadata() or {}
        if (found := header.get("format")) != FORMAT:
            raise ValueError(f"{path} is {f'of format {found!r}' if found else 'no index'}; this "
                             f"program reads {FORMAT!r}: make it anew with --save-index")
        try:
            theirs, self.crc32 = (json.loads(header[name]) for name in ("fingerprint", "crc32"))
        except (KeyError, json.JSONDecodeError):
            raise ValueError(f"the index {path} is damaged: its header cannot be read") from None
        if self.crc32.keys() != set(self.file.keys()):
            raise ValueError(f"the index {path} is damaged: the names of its tensors have changed")
        self.check(theirs, fingerprint(model, tokenizer, config))
        self.ids = self.tensor("token_ids")

    def check(self, theirs, ours):
        """ValueError that names the first difference between two fingerprints."""
        for name, mine in ours.items():
            if (other := theirs.get(name)) != mine:
                raise ValueError(f"{self.path} was made with {name} {other}, here it is {mine}: "
                                 "make it anew with --save-index")

    def tensor(self, name):
        """A tensor of the file. ValueError if it is damaged."""
        x = self.file.get_tensor(name)
        if crc32(x) != self.crc32[name]:
            raise ValueError(f"the index {self.path} is damaged: {name} is not what was written")
        return x

    def unread(self, ids):
        """What follows the index's tokens in ids (T,). ValueError if ids do not begin with them."""
        n = min(len(ids), len(self.ids))
        same = int((ids[:n].cpu() == self.ids[:n]).long().cumprod(0).sum())
        if same < len(self.ids):
            raise ValueError(f"the prompt is not the text of {self.path}: of its "
                             f"{len(self.ids):,} tokens only the first {same:,} are the same")
        return ids[n:]

    def restore(self, caches):
        """Fill one empty cache for each layer. ValueError if the text does not fit."""
        if len(self.ids) > caches[0].capacity:
            raise ValueError(f"the {len(self.ids):,} tokens of {self.path} do not fit caches of "
                             f"{caches[0].capacity:,}")
        device = self.model.lm_head.weight.device
        for n, cache in enumerate(caches):
            prefix = f"{n}."
            parts = [name for name in self.crc32 if name.startswith(prefix)]
            cache.restore({name.removeprefix(prefix): self.tensor(name) for name in parts}, device)


def fingerprint(model, tokenizer, config):
    """All that shapes an index, by name, with a CRC-32 in place of what is too long."""
    weights = 0
    for name, x in sorted(model.named_parameters()):
        some = x.flatten()[::max(1, x.numel() // SAMPLE)]
        weights = zlib.crc32(name.encode(), crc32(some, weights))
    sizes = asdict(model.config) | {"eos_ids": sorted(model.config.eos_ids)}
    facts = {"dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
             **{f"RoPE {name}": x for name, x in sizes.pop("rope").items()}, **sizes,
             "weights of CRC-32": weights,
             "a tokenizer of CRC-32": zlib.crc32(tokenizer.definition()),
             **{f"--set {name}": getattr(config, name) for name in SETTINGS}}
    return json.loads(json.dumps(facts))                                    # as a file holds it


def crc32(x, start=0):
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(x.cpu().contiguous().view(-1).view(torch.uint8).numpy(), start)
