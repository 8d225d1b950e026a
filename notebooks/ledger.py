"""Bytes that a PyTorch function moves, eager and compiled: notebooks 06 and 10 count with it.

    with Ledger() as ledger:
        f(x)
    ledger.bytes                    # {operation: bytes read and written}
    fused_bytes(f, x)               # {kind of loop or call: bytes} of Inductor's plan for f
"""
import logging
import warnings

import torch
import torch._inductor.config as inductor
from torch.utils._python_dispatch import TorchDispatchMode


class Ledger(TorchDispatchMode):
    """Adds up the bytes that each operation reads and writes; views move nothing."""
    PICKS = "index_select", "gather"                                    # read what they return

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if not op.is_view and op is not torch.ops.aten._unsafe_view.default:
            name, outs = op.overloadpacket.__name__, list(tensors(out))
            reads = outs + list(tensors(args[-1])) if name in self.PICKS else tensors(args)
            total = sum(map(size, [*reads, *outs]))
            self.bytes[name] = self.bytes.get(name, 0) + total
        return out


def tensors(x):
    """The tensors among arguments, lists of them too."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from tensors(y)


def size(x):
    """Bytes of a tensor; an expanded dimension counts once."""
    return x.element_size() * torch.Size(
        n for n, stride in zip(x.shape, x.stride(), strict=True) if stride).numel()


class Planned(Exception):
    """Inductor has fused: no machine code is needed."""


def fused_bytes(function, *args):
    """{kind: bytes} that the loops of Inductor and the library's functions read and write.

    Inductor counts a gather as a read of the whole table. Here it reads as much as it writes.
    """
    found = {}

    def count(nodes):
        for node in nodes:
            kind = "library calls" if "Extern" in type(node).__name__ else "loops"
            found[kind] = found.get(kind, 0) + moved(node)
        raise Planned

    torch._dynamo.reset()
    logging.getLogger("torch._inductor.utils").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"), inductor.patch(
            _post_fusion_custom_pass=count, force_disable_caches=True):
        try:
            torch.compile(function, fullgraph=True, dynamic=False)(*args)
        except Exception:
            if not found:
                raise
    return found


def moved(node):
    """Bytes that a node of Inductor's plan reads and writes."""
    reads, writes = (node.get_read_write_buffers_sizes_impl(include_reads=read,
                                                            include_writes=not read)
                     for read in (True, False))
    deps = node.read_writes.reads
    is_gather = any(getattr(dep, "is_indirect", bool)() for dep in deps)
    return min(reads, 2 * writes) + writes if is_gather else reads + writes
