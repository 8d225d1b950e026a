"""An index on disk: what every layer knows of a text, so that it is asked again without reading it.

    save("log.safetensors", model, tokenizer, caches, ids)      # behind a prefill of ids (T,)

    snapshot = Snapshot("log.safetensors", model, tokenizer, config)
    caches = [WaveIndex(config, capacity) for _ in model.layers]        # of any capacity
    snapshot.restore(caches)                                    # as they were: prefill or decode on

One safetensors file. Its header holds a version, a fingerprint of all that shaped the index (model,
weights, dtype, RoPE, tokenizer, settings), and a CRC-32 of each tensor:

    token_ids (T,)   N.counters (2,): indexed tokens, clusters   N.q_energy (H, D)
    N.k, N.v (H, T, D)   N.centroids, N.means (H, C, D)
    N.sizes, N.offsets, N.spreads (H, C)   N.scales (H, C, 2)

Does not include: batches, compression (the file is as large as the cache). Of each weight matrix
the fingerprint reads a sample: models that differ only between the samples are not told apart.
"""
import json
import os
import zlib
from dataclasses import asdict
from pathlib import Path

import torch

FORMAT = "retroinfer index 5"
SHAPES = ("sink", "local", "update", "segment", "cluster", "bits", "iterations", "by_mass",
          "outliers", "channel_power")
SAMPLE = 4096           # elements of each parameter in the fingerprint, at even distances


def save(path, model, tokenizer, caches, ids):
    """Write the index of one sequence of token ids (T,) to a file, whole or not at all.

    A file of this name is replaced in the last moment. ValueError, with the old file as it was, if
    it cannot be written.
    """
    tensors = {"token_ids": ids.cpu()}
    for n, cache in enumerate(caches):
        tensors |= {f"{n}.{name}": x.contiguous().cpu() for name, x in cache.state(0).items()}
    header = {"format": FORMAT,
              "fingerprint": json.dumps(fingerprint(model, tokenizer, caches[0].config)),
              "crc32": json.dumps({name: crc32(x) for name, x in tensors.items()})}
    write(Path(path), tensors, header)


def write(path, tensors, header):
    """One safetensors file: under another name until it is safe on the disk."""
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
    """A saved index, opened by memory map and checked; its tensors are read by restore."""

    def __init__(self, path, model, tokenizer, config):
        """ValueError, of one line, if it is no index, of an older format, or of another model."""
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
        self.names = set(self.file.keys())
        self.check(theirs, fingerprint(model, tokenizer, config))
        self.ids = self.tensor("token_ids")

    def check(self, theirs, ours):
        """ValueError that names the first thing that is not as it was when the file was made."""
        for name, mine in ours.items():
            if (other := theirs.get(name)) != mine:
                raise ValueError(f"{self.path} was made with {name} {other}, here it is {mine}: "
                                 "make it anew with --save-index")

    def tensor(self, name):
        """A tensor of the file; ValueError if it is not there or not as it was written."""
        if name not in self.names or crc32(x := self.file.get_tensor(name)) != self.crc32.get(name):
            raise ValueError(f"the index {self.path} is damaged: {name} is not what was written")
        return x

    def unread(self, ids):
        """The part of ids (T,) behind the index's own; ValueError if they begin otherwise."""
        n = min(len(ids), len(self.ids))
        same = int((ids[:n].cpu() == self.ids[:n]).long().cumprod(0).sum())
        if same < len(self.ids):
            raise ValueError(f"the prompt is not the text of {self.path}: of its "
                             f"{len(self.ids):,} tokens only the first {same:,} are the same")
        return ids[n:]

    def restore(self, caches):
        """Fill one fresh cache of one sequence a layer; ValueError if the text does not fit."""
        if len(self.ids) > caches[0].capacity:
            raise ValueError(f"the {len(self.ids):,} tokens of {self.path} do not fit caches of "
                             f"{caches[0].capacity:,}")
        device = self.model.lm_head.weight.device
        for n, cache in enumerate(caches):
            parts = [name for name in self.names if name.startswith(f"{n}.")]
            cache.restore({name.partition(".")[2]: self.tensor(name) for name in parts}, device)


def fingerprint(model, tokenizer, config):
    """All that shapes an index, by name; a CRC-32 stands for what is too long."""
    weights, sizes = 0, asdict(model.config) | {"eos_ids": sorted(model.config.eos_ids)}
    for name, x in sorted(model.named_parameters()):
        some = x.flatten()[::max(1, x.numel() // SAMPLE)]
        weights = zlib.crc32(name.encode(), crc32(some, weights))
    facts = {"dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
             **{f"RoPE {name}": x for name, x in sizes.pop("rope").items()}, **sizes,
             "weights of CRC-32": weights,
             "a tokenizer of CRC-32": zlib.crc32(tokenizer.definition()),
             **{f"--set {name}": getattr(config, name) for name in SHAPES}}
    return json.loads(json.dumps(facts))                                    # as a file holds it


def crc32(x, start=0):
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(x.cpu().contiguous().view(-1).view(torch.uint8).numpy(), start)
