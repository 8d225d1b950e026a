"""What a run of the command line took: facts, for machines, and a card of them, for people.

    facts = {"backend": "eager", "dtype": "float32", **measure(session)}
    print(card(facts, model.config.context))
"""
import math

import torch

from evaluation.bounds import CheckedIndex, check_lines, summary


def measure(session):
    """What a run took, as numbers, a list where sequences differ: the card is made of these."""
    wave, n_layers = session.caches[0], len(session.caches)
    _, H, _, D = wave.k_store.shape
    key = H * D * wave.k_store.element_size() * n_layers                        # bytes of one key
    shares = zip(*(cache.budget()[3:5] for cache in session.caches), strict=True)   # (B, H) each
    n_retrieve, n_ranked = (torch.cat(n, -1).double().mean(-1).round().long() for n in shares)
    return {
        "context_tokens": wave.n_tokens.tolist(), "read_tokens": session.n_read,
        "generated_tokens": session.n_said, "indexed_tokens": wave.n_indexed.tolist(),
        "clusters": (wave.index.sizes[:, 0] > 0).sum(-1).tolist(),
        "retrieved_clusters": n_retrieve.tolist(),
        "estimated_clusters": (n_ranked - n_retrieve).tolist(),
        "bits": wave.config.bits,
        "bytes_a_step": sum(cache.bytes_read() for cache in session.caches),
        "dense_bytes_a_step": 2 * key * int(wave.n_tokens.sum()),
        "prefill_s": session.prefill_seconds, "decode_tokens_per_s": session.speed(),
        "first_step_s": session.steps[0][1] if session.steps else 0.0,
        **(measure_offload(session) if wave.buffer else {}),
        **({"check": summary(session.caches)} if isinstance(wave, CheckedIndex) else {})}


def measure_offload(session):
    """What lies where, in bytes, and how much of what steps asked for was on the device."""
    parts = [cache.buffer.nbytes() for cache in session.caches]
    hits, asked, rows = sum(cache.buffer.counts for cache in session.caches).tolist()
    *_, D = session.caches[0].k_store.shape
    nbytes = 2 * rows * D * session.caches[0].k_store.element_size()
    return {f"{name}_bytes": sum(part[name] for part in parts) for name in parts[0]} | {
        "hit_ratio": hits / max(asked, 1), "host_bytes_a_step": nbytes / max(len(session.steps), 1)}


def card(f, context):
    """The facts of a run in a few lines for a person."""
    def each(name):
        return " + ".join(f"{n:,}" for n in f[name])

    lines = [f"context    {each('context_tokens')} tokens, {each('read_tokens')} read and "
             f"{each('generated_tokens')} generated now (the model's limit is {context:,})"]
    names = "context_tokens", "indexed_tokens", "clusters", "retrieved_clusters", \
        "estimated_clusters"
    for tokens, indexed, clusters, retrieved, estimated in zip(*map(f.get, names), strict=True):
        zones = (f"{tokens - indexed:,} tokens exact; of {clusters:,} clusters a head retrieves "
                 f"{retrieved:,}, estimates {estimated:,}")
        if not indexed:
            zones = f"all {tokens:,} tokens exact: the text is too short to index"
        lines.append(f"zones      {zones}")
    share = f["bytes_a_step"] / f["dense_bytes_a_step"]
    lines += [
        f"reads      {f['bytes_a_step'] / 2**20:.1f} MiB of KV a step, dense "
        f"{f['dense_bytes_a_step'] / 2**20:.1f} MiB: {share:.1%}; index in {f['bits']} bits",
        f"backend    {f['backend']}; {f['dtype']}",
        f"speed      prefill {f['prefill_s']:.1f} s, first step {f['first_step_s']:.1f} s, "
        f"then {f['decode_tokens_per_s']:.1f} tokens/s"]
    if "hit_ratio" in f:
        store, slots, table, step = (f[f"{name}_bytes{end}"] / 2**20 for name, end in (
            ("store", ""), ("slots", ""), ("table", ""), ("host", "_a_step")))
        lines.insert(-2, f"offload    {store:.1f} MiB on the host, {slots:.1f} and {table:.1f} on "
                     f"the device; {f['hit_ratio']:.1%} hits, {step:.2f} MiB a step from the host")
    if "check" in f:
        lines += check_lines(f["check"])
    if "kl" in f:
        ratio = f["decode_tokens_per_s"] / (f["dense_decode_tokens_per_s"] or math.inf)
        lines += [
            f"dense      {f['dense_answer']}",
            f"agreement  {f['agreement']:.1%} of the tokens, KL to dense {f['kl']:.4f} nats each",
            f"           dense decodes {f['dense_decode_tokens_per_s']:.1f} tokens/s: "
            f"ours is {ratio:.2f} times as fast"]
    return "\n".join(lines)
