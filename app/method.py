"""What --method chooses: the numbers of a method, and the cache of a layer.

    wave    retroinfer.py            clusters of keys, read by their centroids
    graph   retrieval_attention.py   a graph over the keys, searched for each query
    antkv   antkv.py                 a few bits a number, anchor tokens exact

    numbers, cache = classes("graph")                   # GraphConfig, GraphCache
    cache = cache(numbers(), capacity, batch)
"""
import importlib

from retroinfer import InputError

METHODS = {"wave": ("retroinfer", "RetroConfig", "WaveIndex"),             # file, numbers, cache
           "graph": ("retrieval_attention", "GraphConfig", "GraphCache"),
           "antkv": ("antkv", "AnchorConfig", "AnchorCache")}


def classes(method):
    """(the dataclass of a method's numbers, the class of its cache). InputError if its file was
    left out."""
    name, *ours = METHODS[method]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name != name:
            raise
        raise InputError(f"--method {method} needs {name}.py, which is not here") from None
    return [getattr(module, one) for one in ours]
