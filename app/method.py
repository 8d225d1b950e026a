"""What --method chooses: the numbers of a method, and the cache of a layer.

    wave    retroinfer.py            clusters of keys, read by their centroids
    graph   retrieval_attention.py   a graph over the keys, searched for each query
    antkv   antkv.py                 a few bits a number, anchor tokens exact

    kind = config_class("graph")                        # GraphConfig
    cache = make_cache("graph", kind(), capacity, batch)
"""
import importlib

from retroinfer import InputError

FILES = {"wave": "retroinfer", "graph": "retrieval_attention", "antkv": "antkv"}
CONFIGS = {"wave": "RetroConfig", "graph": "GraphConfig", "antkv": "AnchorConfig"}
CACHES = {"wave": "WaveIndex", "graph": "GraphCache", "antkv": "AnchorCache"}


def part_of(method, names):
    """A class of a method. InputError if its file was left out."""
    try:
        return getattr(importlib.import_module(FILES[method]), names[method])
    except ModuleNotFoundError as e:
        if e.name != FILES[method]:
            raise
        raise InputError(f"--method {method} needs {FILES[method]}.py, which is not here") from None


def config_class(method):
    """The frozen dataclass of a method's numbers."""
    return part_of(method, CONFIGS)


def make_cache(method, config, capacity, batch=1, *more):
    """The cache of one layer."""
    return part_of(method, CACHES)(config, capacity, batch, *more)
