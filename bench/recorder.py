"""What a decode step asks of a device, recorded without one: its launches, and a replay of them.

    with Recorder() as seen:
        logits = eager_step(model, caches, tokens)
    len(seen.launches())                # operators that start a kernel
    seen.replay()                       # the same operators on the same tensors, and no Python

A CUDA graph repeats the kernels of a step on the addresses that they had. replay() does the same on
a CPU: whatever the step took from the host, a number or a shape, stays as it was. So a step whose
replays answer as eager steps do can be captured. On the meta device a step that asks for a number
of a tensor fails at once.

Does not include: kernels within one operator (torch.topk and sort start several), what Inductor
fuses into one kernel.
"""
import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import buffer
import kernels

EMPTY = ("empty", "empty_like", "new_empty", "empty_strided", "_unsafe_view", "lift_fresh")


class Recorder(TorchDispatchMode):
    """The operators called in its context: (name, function, arguments, results)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append((function.__name__.split(".")[0], function, (args, kwargs or {}), out))
        return out

    def note(self, kernel, grid, *args, **tile):
        """kernels.launch, of which nothing is run."""
        self.calls.append((kernel.__name__, None, args, None))

    def launches(self):
        """Names of the operators that start a kernel: neither a view nor memory alone."""
        return [name for name, function, given, out in self.calls
                if name not in EMPTY and not is_view(function, given, out)]

    def replay(self):
        """Call all operators again. Their results go to where the first ones are."""
        for _, function, (args, kwargs), out in self.calls:
            if not is_view(function, args, out):
                again = function(*args, **kwargs)
                for x, new in zip(tensors(out), tensors(again), strict=True):
                    if x is not new:
                        x.copy_(new)


def tensors(tree):
    return [x for x in tree_iter(tree) if isinstance(x, torch.Tensor)]


def is_view(function, given, out):
    """Whether an operator only looks at memory in another way."""
    if function is None or function._schema.is_mutable:
        return False
    storages = {x.untyped_storage()._cdata for x in tensors(given)}
    return any(x.untyped_storage()._cdata in storages for x in tensors(out))


@contextlib.contextmanager
def recorded():
    """A Recorder that sees the operators within those of kernels.py too, of which no kernel runs:
    what tensors hold afterwards means nothing. A buffer copies rows as on a GPU."""
    with contextlib.ExitStack() as stack:
        for name in ("choose_op", "attend_op", "copy_rows_op"):
            inside = getattr(kernels, name)._init_fn
            stack.enter_context(mock.patch.object(kernels, name, inside))
        stack.enter_context(mock.patch.object(buffer, "copy_rows", kernels.copy_rows))
        seen = Recorder()
        stack.enter_context(mock.patch.object(kernels, "launch", seen.note))
        yield stack.enter_context(seen)
