"""One prompt, many methods: what each of them answers, with one reading of the weights a step.

    found = methods(["ours", "graph"])                      # dense attention is always among them
    caches = side_by_side(model, found, capacity)
    prefill(model, caches, [document])
    said = answer(model, tokenizer, found, copy.deepcopy(caches), question, n_answer)

A prompt's attention is exact in each of these methods, so all get the same queries, keys and values
from one reading of it. Then each writes its own answer, greedily. Does not include: AnTKV behind a
prompt of several chunks, because its later chunks read codes.
"""
import functools

import torch

from evaluation import fidelity
from generate import COMPILE, decode, eager_step, hot_functions, prefill, sampler
from model import DenseCache, RingCache
from retrieval_attention import GraphCache, GraphConfig, search
from retroinfer import LayerCache, RetroConfig, WaveIndex

NAMES = "ours", "paper", "graph", "qcivf"


class QuickGraph(GraphCache):
    """A GraphCache whose search is compiled, where the rest of a step is not."""
    search = staticmethod(torch.compile(search, **COMPILE))


def methods(names=NAMES[:2], config=None):
    """{name: function of (capacity, batch) that makes a layer's cache}: dense, then these.

    config: of ours. The wave index has the fast functions of a CPU.
    """
    hot = hot_functions(torch.device("cpu"))
    made = {"ours": functools.partial(WaveIndex, config or RetroConfig(), hot=hot),
            "paper": functools.partial(WaveIndex, RetroConfig.paper(), hot=hot),
            "graph": functools.partial(QuickGraph, GraphConfig()),
            "qcivf": functools.partial(QuickGraph, GraphConfig(index="qcivf"))}
    return {"dense": DenseCache} | {name: made[name] for name in names}


def hear(cache, q, k, v):
    """cache.prefill without its output, which takes most of the time."""
    if isinstance(cache, LayerCache):
        if cache.store is None:
            cache.allocate(k)
        cache.observe(q, int(cache.n_tokens[0]), 0)
    cache.prefill(q if isinstance(cache, RingCache) else None, k, v)


class SideBySide:
    """Several caches of one sequence as one cache of a batch, so that a step reads weights once.

    window: how many of the latest tokens its layer sees; 0: all.
    """

    def __init__(self, caches, window=0):
        self.caches, self.window = caches, window

    @property
    def n_tokens(self):
        return torch.cat([cache.n_tokens for cache in self.caches])

    def prefill(self, q, k, v, row=0):
        """All caches read the tokens of one sequence. The output is that of the first cache."""
        first, *others = self.caches
        for cache in others:
            hear(cache, q, k, v)
        return first.prefill(q, k, v)

    def update(self):
        return min(cache.update() for cache in self.caches)

    def __call__(self, *qkv):
        rows = zip(*(x.split(1) for x in qkv), strict=True)
        return torch.cat([cache.decode(*row) for cache, row in zip(self.caches, rows, strict=True)])


def side_by_side(model, made, capacity):
    """A cache for each layer, in which the methods `made` lie side by side."""
    return [SideBySide([fidelity.made_for(make, layer.window)(capacity) for make in made.values()],
                       layer.window) for layer in model.layers]


def answer(model, tokenizer, made, caches, ids, n_answer):
    """{method: its answer} behind ids (n,), which the caches of side_by_side read first."""
    logits = prefill(model, caches, [ids]).expand(len(made), -1)
    tokens = decode(model, caches, logits, n_answer, sampler(), eager_step)
    answers = {}
    for method, row in zip(made, torch.stack(list(tokens), 1).tolist(), strict=True):
        ends = [i for i, token in enumerate(row) if token in model.config.eos_ids]
        answers[method] = tokenizer.decode(row[:ends[0] + 1] if ends else row)
    return answers
