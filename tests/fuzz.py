"""Damaged files, by the thousand: each is refused in one line, or does no harm.

    export PYTHONPATH=.
    python tests/fuzz.py index --n 2000         # saved indexes, checksums made to fit included
    python tests/fuzz.py gguf --n 2000
    python tests/fuzz.py directory --n 2000     # config.json, tokenizer.json, *.safetensors

A case is a file with one to three changes, drawn from its number. Loading it raises InputError, or
the model takes two steps with it. Anything else, a crash of the process included, is a fault, and
standard error names the case.
"""
import argparse
import copy
import faulthandler
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from steps import LONG, SMALL

from app import snapshot
from app.relay import Spec, best_hot
from generate import decode, eager_step, prefill, sampler
from model import load
from retroinfer import InputError, RetroConfig, WaveIndex

CONFIG = RetroConfig(**SMALL, retrieve=0.2, estimate=0.3)
ODD = [0, -1, 1, 2, 0.5, 3e38, -3e38, float("nan"), float("inf"), 2**31, 2**62, -2**62, 10**9]
WORDS = ["", "x", None, True, [], {}, [1], {"a": 1}, 0, -1, 7, 10**6, 10**9, 2**70, 0.5, "llama",
         "qwen2", float("nan")]


def change_bytes(raw, draw):
    """A file's bytes with a run of them changed, cut or doubled."""
    at = draw.randrange(len(raw)) if draw.random() < 0.3 else draw.randrange(min(len(raw), 4000))
    n = draw.choice([1, 1, 2, 4, 8, 64])
    kind = draw.choice(["bits", "random", "extreme", "cut", "drop", "double"])
    if kind == "cut":
        return raw[:at]
    if kind == "bits":
        return raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1:]
    new = {"random": draw.randbytes(n), "extreme": draw.choice([b"\0", b"\xff"]) * n,
           "drop": b"", "double": 2 * raw[at:at + n]}[kind]
    return raw[:at] + new + raw[at + n:]


def change_tensor(x, draw):
    """A tensor with a number, its shape or its type changed."""
    kind = draw.choice(["number", "number", "number", "all", "shape", "type", "order"])
    if kind == "number" and x.numel():
        x = x.clone()
        odd = torch.tensor(draw.choice(ODD), dtype=torch.float64)
        value = odd.to(x.dtype) if draw.random() < 0.5 else x.flatten()[0] + odd.to(x.dtype)
        x.view(-1)[draw.randrange(x.numel())] = value
    elif kind == "all":
        x = x * draw.choice([0, 2, 10**6]) + draw.choice([0, 1, 10**9])
    elif kind == "shape":
        x = draw.choice([x[:-1] if len(x) else x, x[None], x.flatten(), x.mT if x.dim() > 1 else x,
                         torch.cat([x, x])])
    elif kind == "type":
        x = x.to(draw.choice([torch.float32, torch.int64, torch.bfloat16, torch.uint8]))
    elif x.dim() > 1:
        x = x.flip(-1)
    return x.contiguous()


def change_json(tree, draw):
    """A JSON value with one value somewhere in it replaced, or one key dropped."""
    tree = copy.deepcopy(tree)
    at = tree
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return tree
        key = draw.choice(keys)
        if isinstance(at[key], (dict, list)) and at[key] and draw.random() < 0.8:
            at = at[key]
        elif isinstance(at, dict) and draw.random() < 0.2:
            del at[key]
            return tree
        else:
            at[key] = draw.choice(WORDS)
            return tree


class Index:
    """A saved index of 300 tokens."""

    def __init__(self, folder):
        self.path, self.loaded = folder / "x", load(tiny.save(folder / "m", **LONG), device="cpu")
        model, tokenizer = self.loaded
        self.ids = torch.randint(3, 320, (300,), generator=torch.Generator().manual_seed(0))
        caches = [WaveIndex(CONFIG, 300) for _ in model.layers]
        prefill(model, caches, [self.ids])
        snapshot.save(self.path, model, tokenizer, caches, self.ids, "a text, né")
        self.raw, self.tensors = self.path.read_bytes(), load_file(self.path)
        with safe_open(self.path, "pt") as f:
            self.header = f.metadata()
        self.hot, _ = best_hot(Spec(model.config, torch.float32, CONFIG, 400, 1))

    def write(self, draw):
        if draw.random() < 0.3:
            self.path.write_bytes(change_bytes(self.raw, draw))
            return
        tensors = dict(self.tensors)
        for _ in range(draw.choice([1, 1, 2, 3])):
            name = draw.choice(list(tensors))
            if draw.random() < 0.05:
                del tensors[name]
            else:
                tensors[name] = change_tensor(tensors[name], draw)
        header = dict(self.header)
        header["crc32"] = json.dumps({name: snapshot.crc32(x) for name, x in tensors.items()})
        if draw.random() < 0.1:
            name = draw.choice(list(header))
            header[name] = draw.choice([*map(json.dumps, WORDS), "{", header[name][:-3]])
        save_file(tensors, self.path, header)

    def use(self):
        model, tokenizer = self.loaded
        found = snapshot.Snapshot(self.path, model, tokenizer, CONFIG)
        caches = [WaveIndex(CONFIG, 400, hot=self.hot) for _ in model.layers]
        found.restore(caches)
        step(model, caches, torch.tensor([5, 6, 7]))


class Checkpoint:
    """A model's file or folder."""

    def use(self):
        model, tokenizer = load(self.path, device="cpu")
        tokenizer.chat([{"role": "user", "content": "the cat"}])
        tokenizer.decode(tokenizer.encode("the cat sat"))
        hot, _ = best_hot(Spec(model.config, torch.float32, CONFIG, 64, 1))
        step(model, [WaveIndex(CONFIG, 64, hot=hot) for _ in model.layers], torch.tensor([1, 2, 3]))


class Gguf(Checkpoint):
    def __init__(self, folder):
        self.path = folder / "x.gguf"
        self.raw = tiny.write_gguf(folder / "whole.gguf", tiny.random_model()).read_bytes()

    def write(self, draw):
        raw = self.raw
        for _ in range(draw.choice([1, 1, 2, 3])):
            raw = change_bytes(raw, draw)
        self.path.write_bytes(raw)


class Directory(Checkpoint):
    def __init__(self, folder):
        self.path, self.whole = folder / "x", tiny.save(folder / "whole")

    def write(self, draw):
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.whole, self.path)
        for _ in range(draw.choice([1, 1, 2, 3])):
            file = draw.choice(sorted(self.path.iterdir()))
            raw = file.read_bytes()
            if file.suffix == ".json" and raw == (self.whole / file.name).read_bytes():
                file.write_text(json.dumps(change_json(json.loads(raw), draw)))
            elif raw:
                file.write_bytes(change_bytes(raw, draw))


def step(model, caches, ids):
    """Read ids, and take two steps. What they say does not matter."""
    logits = prefill(model, caches, [ids])
    list(decode(model, caches, logits, 3, sampler(), eager_step))


TARGETS = {"index": Index, "gguf": Gguf, "directory": Directory}


def fuzz(target, n, seed):
    """(cases that were refused, cases that were taken); raises what neither is."""
    refused = 0
    for i in range(seed, seed + n):
        target.write(random.Random(i))
        try:
            target.use()
        except InputError as e:
            assert str(e) and "\n" not in str(e), str(e)
            refused += 1
        except BaseException:
            print(f"case {i}", file=sys.stderr)
            raise
        if i % 100 == 99:
            print(f"{i + 1} cases", file=sys.stderr)
    return refused, n - refused


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", choices=TARGETS, nargs="+")
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    faulthandler.enable()
    for name in args.targets:
        with tempfile.TemporaryDirectory() as folder:
            refused, taken = fuzz(TARGETS[name](Path(folder)), args.n, args.seed)
        print(f"{name}: {refused} refused, {taken} taken, no fault", flush=True)


if __name__ == "__main__":
    main()
