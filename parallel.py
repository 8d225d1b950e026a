"""Tensor parallelism: processes, called ranks, share the heads of every layer of one model.

    torchrun --nproc-per-node 2 retroinfer.py --prompt-file x

A rank holds a run of the key heads, their query heads and caches, and a run of the MLP's channels.
Twice a layer the ranks add up (Shoeybi et al., Megatron-LM, arXiv 1909.08053, §3):

    rank 0   q k v of heads 0, 1 ─► attend ─► o ─┐       ┌─► gate, up ─► down ─┐
                                                 ├─ sum ─┤                     ├─ sum ─►
    rank 1   q k v of head 2     ─► attend ─► o ─┘       └─► gate, up ─► down ─┘

All ranks run one program. Rank 0 alone reads, picks tokens and prints. docs/parallel.md says more.
"""
import atexit
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist

from model import Linear, load
from retroinfer import InputError

RANK, LOCAL_RANK = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
SIZE, LOCAL_SIZE = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
LOST = "gloo", "NCCL", "onnection"  # words in the error of a rank whose partner has ended
TALK = []                           # the group in which ranks exchange objects


def run(work):
    """The exit status of work(), on every rank. Only rank 0 prints, and each error is one line."""
    if SIZE == 1:
        return work()
    if torch.cuda.is_available():
        torch.cuda.set_device(LOCAL_RANK % torch.cuda.device_count())
    try:
        store, *_ = next(dist.rendezvous("env://"))
        dist.init_process_group(None, None, timedelta(minutes=10), SIZE, RANK, store)
        atexit.register(end_group)
        TALK.append(dist.new_group(timeout=timedelta(days=30), backend="gloo"))     # a person waits
        out = open(os.devnull, "w") if RANK else None       # noqa: SIM115 (to the end)
        with redirect_stdout(out or sys.stdout), redirect_stderr(out or sys.stderr):
            return work()
    except InputError as e:
        try:
            said = store.add(str(e), 1) > 1
        except dist.DistError:      # rank 0 kept the store, has ended and said why
            said = True
        raise (SystemExit(2) if said else e) from None
    except SystemExit as e:
        if e.code:
            print(f"retroinfer: rank {RANK} ends, for it was told to", file=sys.stderr)
        raise
    except (RuntimeError, ValueError) as e:
        if not any(word in f"{type(e)} {e}" for word in LOST):
            raise
        raise InputError(f"rank {RANK} ends, it lost another: {e}".splitlines()[0]) from None


def end_group():
    """Called at exit, when all is said. Threads of a group that is still there abort a process."""
    TALK.clear()
    dist.destroy_process_group()


def gather(x):
    """What each rank gives, as a list."""
    found = [x] * SIZE
    if SIZE > 1:
        dist.all_gather_object(found, x, TALK[0])
    return found


def from_first(make):
    """What make() returns on rank 0, where alone it is called. Its InputError comes to all."""
    try:
        found = gather(make() if RANK == 0 else None)[0]
    except InputError as e:
        found = gather(e)[0]
    if isinstance(found, InputError):
        raise found
    return found


def pick_together(pick):
    """pick, but rank 0 decides: elsewhere the logits may differ in the last bit."""
    def picked(logits):
        dist.broadcast(tokens := pick(logits), 0)                           # (B,)
        return tokens
    return picked if SIZE > 1 else pick


class PartialLinear(Linear):
    """A product of which a rank has some of the columns. Each rank gets the sum of all."""
    def forward(self, x):
        y = super().forward(x)
        dist.all_reduce(y)
        return y


def load_part(*source):
    """model.load(*source). A rank keeps its part of the weights, and no more."""
    if SIZE == 1:
        return load(*source)
    model, tokenizer = load(*source, take_part=take_part)
    for layer in model.layers:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.__class__ = PartialLinear
            if RANK and module.bias is not None:
                module.bias.zero_()                 # a sum has it once
    return model, tokenizer


def take_part(config):
    """(a rank's fields of a ModelConfig, cut(name): rows and columns that it has of a tensor)."""
    H, D, G = (config[name] for name in ("num_key_value_heads", "head_dim", "num_attention_heads"))
    if SIZE > H:
        raise InputError(f"{SIZE} ranks cannot share {H} key heads: start {H} ranks or fewer")
    G, ranks = G // H, (RANK, RANK + 1)
    first, end = (H * rank // SIZE for rank in ranks)
    mlp = slice(*(config["intermediate_size"] * rank // SIZE for rank in ranks))
    q, kv, whole = slice(first * G * D, end * G * D), slice(first * D, end * D), slice(None)
    rows = {"q_proj": q, "k_proj": kv, "v_proj": kv, "gate_proj": mlp, "up_proj": mlp}
    columns = {"o_proj": q, "down_proj": mlp}
    def cut(name):
        return tuple(runs.get(name.split(".")[-2:][0], whole) for runs in (rows, columns))
    return config | {"num_key_value_heads": end - first, "num_attention_heads": G * (end - first),
                     "intermediate_size": mlp.stop - mlp.start}, cut
