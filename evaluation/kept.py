"""What dense attention makes of a text, kept in a file, so that no later run reads it again.

    python -m evaluation.evaluate --keep ~/reads        # and the same flag of evaluation.ablation

A file holds the cases of one text at all lengths: keys, values, the steps' queries and dense
outputs, and the last hidden states. Its name is a hash of the model, the text, the lengths and the
steps. A file is mapped, not read whole. To clear the directory, delete it.

32,768 tokens of Qwen2.5-1.5B in float32 take 1.9 GB: layers x 2 x kv heads x D x 4 bytes a token.
"""
import contextlib
import hashlib
import json
import os
from pathlib import Path

import torch

from app.snapshot import origin
from evaluation import fidelity
from retroinfer import InputError


def cases(model, tokenizer, ids, lengths, n_steps, directory=None):
    """fidelity.read_at. With a directory, from its file of this text, which is made if missing."""
    if directory is None:
        return fidelity.read_at(model, ids, lengths, n_steps)
    facts = [origin(model, tokenizer), ids.tolist(), sorted(lengths), n_steps]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    path = Path(directory).expanduser() / f"{name}.pt"
    if not path.exists():
        save(path, fidelity.read_at(model, ids, lengths, n_steps))
    fidelity.remembered.cache_clear()
    return [fidelity.Case(*case) for case in torch.load(path, mmap=True, weights_only=True)]


def save(path, found):
    """Write cases to a file that is there whole or not at all. InputError if it cannot be."""
    part = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save([list(vars(case).values()) for case in found], part)
        part.replace(path)
    except (OSError, RuntimeError) as e:        # torch says a full disk by a RuntimeError
        with contextlib.suppress(OSError):
            part.unlink()
        raise InputError(f"{path.parent} cannot keep what dense attention read: {e}") from None
