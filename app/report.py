"""What a run of the command line took: facts, for machines, and a card of them, for people.

    facts = {"backend": "eager", "dtype": "float32", **measure(session)}
    print(card(facts, model.config.context))
"""
import math


def measure(session):
    """What a run took, as numbers, and lists where sequences differ. The card is made of these."""
    layers = [cache.facts() for cache in session.caches]
    first = layers[0]
    found = {
        "context_tokens": first["tokens"], "read_tokens": session.n_read,
        "generated_tokens": session.n_said, "indexed_tokens": first["indexed_tokens"],
        "clusters": first["clusters"],
        "retrieved_clusters": mean_of_layers(layers, "retrieved_clusters"),
        "estimated_clusters": mean_of_layers(layers, "estimated_clusters"),
        "bits": first["bits"],
        "bytes_a_step": sum(facts["bytes_read"] for facts in layers),
        "dense_bytes_a_step": sum(facts["dense_bytes"] for facts in layers),
        "prefill_s": session.prefill_seconds, "decode_tokens_per_s": session.speed(),
        "first_step_s": session.steps[0][1] if session.steps else 0.0}
    return found | (measure_offload(session, layers) if "hits" in first else {})


def mean_of_layers(layers, name):
    """Of each sequence a whole number: the mean over layers."""
    columns = zip(*(facts[name] for facts in layers), strict=True)
    return [round(sum(column) / len(layers)) for column in columns]


def measure_offload(session, layers):
    """What lies where, in bytes, and how much of what steps asked for was on the device."""
    parts = [cache.nbytes() for cache in session.caches]
    hits, asked, read = (sum(facts[name] for facts in layers)
                         for name in ("hits", "asked", "host_bytes"))
    held = {"store_bytes": "store", "slots_bytes": "block cache", "table_bytes": "its tables"}
    return {name: sum(part[of] for part in parts) for name, of in held.items()} | {
        "hit_ratio": hits / max(asked, 1), "host_bytes_a_step": read / max(len(session.steps), 1)}


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
    if "kl" in f:
        ratio = f["decode_tokens_per_s"] / (f["dense_decode_tokens_per_s"] or math.inf)
        lines += [
            f"dense      {f['dense_answer']}",
            f"agreement  {f['agreement']:.1%} of the tokens, KL to dense {f['kl']:.4f} nats each",
            f"           dense decodes {f['dense_decode_tokens_per_s']:.1f} tokens/s: "
            f"ours is {ratio:.2f} times as fast"]
    return "\n".join(lines)
