"""The reader's answers beside the expected ones.

    from checks import agree
    agree([("5 tokens", tokens_for(w, 0.5), 2), ("all", tokens_for(w, 1), 10)])
"""
import torch


def agree(cases):
    """Whether yours is the expected in all cases (name, yours, expected); prints each case."""
    rights = [is_same(yours, expected) for _, yours, expected in cases]
    width = max(len(name) for name, _, _ in cases)
    for (name, yours, expected), right in zip(cases, rights, strict=True):
        sign = "=" if right else "≠"
        print(f"{name:{width}}   yours {short(yours):>12} {sign} {short(expected)} expected")
    return all(rights)


def is_same(yours, expected):
    """Equal, to six digits where they are numbers. None is never right."""
    if yours is None:
        return False
    yours, expected = (torch.as_tensor(x).double() for x in (yours, expected))
    return yours.shape == expected.shape and torch.allclose(yours, expected, rtol=1e-5, atol=1e-7)


def short(x):
    """A value in a few characters."""
    if isinstance(x, torch.Tensor):
        x = x.tolist()
    if isinstance(x, list):
        return "[" + ", ".join(map(short, x[:4])) + (", …]" if len(x) > 4 else "]")
    return f"{x:.4g}" if isinstance(x, float) else str(x)
