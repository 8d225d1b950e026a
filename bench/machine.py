"""How fast a step can be: its bytes over a machine's bandwidths, at a hit ratio of the block cache.

    speed = predicted({0.005: 0.2, 0.025: 0.7, 0.05: 0.85, 0.1: 0.92}, RetroConfig())

`python -m bench.traces` calls this with the hit ratios that it measured.

Bytes of device memory and bytes of the bus are moved one after the other, each at its published
peak. That bounds a step from below. The host adds nothing to a step of ours, which never waits for
the host. The published code does wait: one time a layer is added for it (host_seconds). That time
is the only fitted constant. It is fitted to one run, of another batch than the runs that the
prediction is judged by.

Does not include: arithmetic (a step is bound by memory), peaks that are not reached, transfers
hidden behind computation.
"""
from dataclasses import dataclass, replace

import torch

from app import plan
from bench.timing import figure
from buffer import BLOCK
from retroinfer import RetroConfig, limits_of


@dataclass(frozen=True)
class Machine:
    """Peak bytes a second, as NVIDIA publishes them: an upper bound of what a step gets."""
    memory: float               # of device memory
    bus: float                  # from the host's memory, one way
    size: int                   # GiB of device memory


MACHINES = {        # NVIDIA's data sheets; PCIe 4.0 and 5.0 x16 less their 128b/130b encoding
    "A100-PCIe": Machine(1.935e12, 31.5e9, 80),
    "H200": Machine(4.8e12, 63.0e9, 140),
    "RTX 4090": Machine(1.008e12, 31.5e9, 24)}

# Tokens a second of the published code on an A100-PCIe with Llama-3-8B, by (tokens, batch) and
# cache ratio, from an independent run (River861, July 2026). The blocks that a head asks for in a
# step, as a share of the tokens, and the hit ratio at 5 % are from that run's log.
PUBLISHED = {(120_000, 8): {0.005: 88.7, 0.025: 149.1, 0.05: 202.4, 0.1: 209.1},
             (120_000, 1): {0.005: 32.0, 0.05: 34.6, 0.1: 33.3},
             (240_000, 1): {0.005: 23.4, 0.05: 31.4, 0.1: 31.9},
             (480_000, 1): {0.005: 15.0, 0.05: 25.1, 0.1: 25.9}}
PUBLISHED_BLOCKS, PUBLISHED_HIT = 293 / 120_000, 0.9287


@dataclass(frozen=True)
class Work:
    """Bytes of one step of a whole model in 16 bits."""
    layers: int
    device: float               # read and written in device memory, hit or miss
    exact: float                # K and V of the retrieved clusters

    def seconds(self, machine, hit, host=0.0):
        """Time of the step: hits from device memory, misses over the bus, `host` s a layer."""
        moved = (self.device + self.exact * hit) / machine.memory
        return moved + self.exact * (1 - hit) / machine.bus + self.layers * host


def published_work(config, tokens, batch):
    """Work of the published code.

    It reads all centroids. It gathers the estimated centroids and means, then reads them. It copies
    the steady zone and the retrieved clusters to the execution buffer, then reads them there.
    """
    paper, row = RetroConfig.paper(), 2 * config.head_dim
    heads = batch * config.num_key_value_heads * config.num_hidden_layers
    clusters = tokens / paper.cluster
    exact = heads * tokens * PUBLISHED_BLOCKS * BLOCK * 2 * row
    steady = heads * (paper.sink + paper.local) * 2 * row
    estimated = heads * clusters * paper.estimate * 2 * row
    moved = heads * clusters * row + 3 * estimated + 3 * steady + 2 * exact
    return Work(config.num_hidden_layers, plan.weights(config) + moved, exact)


def our_work(config, tokens, batch, retro, blocks=1.0):
    """Work of a step of ours: what is retrieved is written and read once more.

    blocks: of a retrieved cluster, on average. A block that is partly filled is moved whole.
    """
    heads, layers = (batch, config.num_key_value_heads), config.num_hidden_layers
    cache = plan.cache_on_meta(plan.Run(config, tokens, batch, retro=retro))
    cache.n_indexed = torch.full((batch,), tokens)          # the rest stays without memory
    cache.limits = limits_of(retro, cache.n_indexed[:, None])
    slots = *heads, cache.index.sizes.shape[2]
    cache.index = cache.index._replace(sizes=torch.full(slots, float(retro.cluster)))
    n_tokens = int(cache.budget().retrieve.expand(heads).sum()) * blocks * BLOCK
    exact = layers * n_tokens * 4 * config.head_dim
    return Work(layers, plan.weights(config) + layers * cache.bytes_read() + exact, exact)


def largest_batch(config, tokens, machine, retro):
    """Sequences, at most 8, that fit the machine with 5 % of their K and V on it."""
    run = plan.Run(config, tokens, chunk=2048, cache_ratio=0.05, retro=retro)
    for batch in range(8, 0, -1):
        if plan.plan(replace(run, batch=batch)).fits(machine.size * plan.GIB):
            return batch
    return 0


def host_seconds(config):
    """Seconds that the published code spends a layer beyond its bytes: the fitted constant.

    Fitted to 120K x 1 at 5 %. Reads by the host, launches and look-up on CPU threads are in it.
    """
    work = published_work(config, 120_000, 1)
    measured = 1 / PUBLISHED[120_000, 1][0.05]
    return (measured - work.seconds(MACHINES["A100-PCIe"], PUBLISHED_HIT)) / work.layers


def predicted(hit, retro):
    """Predicted tokens a second of Llama-3-8B in 16 bits, at hit ratios {cache ratio: hit ratio}.

    Of the published code, beside what was measured of it, and of ours at 5 % on three machines. The
    hit ratios belong to the paper's share of clusters. At this length `retro` retrieves that share.
    """
    config, a100 = plan.shape("Llama-3.1-8B"), MACHINES["A100-PCIe"]
    host, theirs, ours = host_seconds(config), [], {}
    for (tokens, batch), speeds in PUBLISHED.items():
        work = published_work(config, tokens, batch)
        for ratio, speed in speeds.items():
            theirs.append({"tokens": tokens, "batch": batch, "ratio": ratio, "measured": speed,
                           "predicted": batch / work.seconds(a100, hit[ratio], host),
                           "bytes only": batch / work.seconds(a100, hit[ratio])})
    for name, machine in MACHINES.items():
        batches = 1, largest_batch(config, 120_000, machine, retro)
        ours[name] = {batch: batch / our_work(config, 120_000, batch, retro).seconds(
            machine, hit[0.05]) for batch in batches}
    own = 8 / published_work(config, 120_000, 8).seconds(a100, PUBLISHED_HIT, host)
    return {"host_seconds": host, "published": theirs, "at its own hit ratio": own, "ours": ours}


def plot_speed(speed, path):
    """Tokens a second of the published code against the cache ratio, measured and predicted."""
    page, (axes,) = figure((6.4, 4.2))
    rows = [row for row in speed["published"] if (row["tokens"], row["batch"]) == (120_000, 8)]
    ratios = [100 * row["ratio"] for row in rows]
    for name, style, color in (("measured", "o-", "black"), ("predicted", "s--", "0.4"),
                               ("bytes only", "^:", "0.6")):
        axes.plot(ratios, [row[name] for row in rows], style, color=color,
                  label={"predicted": "bytes, a fitted time on the host"}.get(name, name))
    axes.plot([5], [speed["at its own hit ratio"]], "x", color="black", ms=9, mew=2,
              label="bytes, that time, the hit ratio of its own log")
    worst = max(abs(row["predicted"] / row["measured"] - 1) for row in rows)
    axes.set(xscale="log", ylim=(0, None), xlabel="cache, % of a head's store",
             ylabel="tokens/s, Llama-3-8B, 120K x 8",
             title=f"The published code on an A100-PCIe, predicted within {worst:.0%}")
    axes.set_xticks(ratios, [f"{r:g}" for r in ratios])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="upper left")
    page.savefig(path, dpi=150)
