"""What a run of the command line took: facts for machines, and a card for people.

    facts = {"backend": "eager", "dtype": "float32", **measure(session)}
    print(card(facts, model.config.context))
"""
from retroinfer import WaveIndex

MIB = 2**20
PER_SEQUENCE = "clusters", "retrieved_clusters", "estimated_clusters", "anchors", "true_bits"


def measure(session):
    """Numbers by name, and lists with one entry a sequence. The card is made of these."""
    every = [cache.facts() for cache in session.caches]
    rings = [facts for facts in every if "window" in facts]
    layers = [facts for facts in every if "window" not in facts]
    first = layers[0] if layers else {}
    found = {
        "context_tokens": every[0]["tokens"], "read_tokens": session.n_read,
        "generated_tokens": session.n_said, **measure_rings(rings, len(every)),
        "indexed_tokens": first.get("indexed_tokens", [0] * len(session.n_read)),
        **{name: mean_of_layers(layers, name) for name in PER_SEQUENCE if name in first},
        **{name: first[name] for name in ("bits", "store_bits", "top") if name in first},
        "bytes_a_step": sum(facts["bytes_read"] for facts in layers),
        "dense_bytes_a_step": sum(facts["dense_bytes"] for facts in layers),
        "prefill_s": session.prefill_seconds, "decode_tokens_per_s": session.speed(),
        "decode_s": sum(seconds for _, seconds in session.steps),
        "first_step_s": session.steps[0][1] if session.steps else 0.0}
    if "hits" in first:
        found |= measure_offload(session, layers)
    if "bars" in first:
        found["bars"] = measure_bars([facts["bars"] for facts in layers])
    return found


def measure_bars(layers):
    """How far outputs may be from dense attention's, at 95 % or as --delta has it, over their
    length: median and 95th percentile of each layer, and the head with the largest median."""
    width, layer, head = max((width, i, head) for i, bars in enumerate(layers)
                             for head, width in enumerate(bars["heads"]))
    found = {"median": [bars["median"] for bars in layers], "p95": [bars["p95"] for bars in layers],
             "worst": {"layer": layer, "head": head, "median": width},
             "bytes_a_step": sum(bars["bytes"] for bars in layers)}     # beside those of the step
    if "met" in layers[0]:
        found |= {"asked": layers[0]["asked"],
                  "met": sum(bars["met"] for bars in layers) / len(layers)}
    return found


def measure_rings(rings, n_layers):
    """What the layers that see a window are and read; nothing if there are none. The other bytes
    of a step are without theirs."""
    if not rings:
        return {}
    return {"layers": n_layers, "window_layers": len(rings), "window": rings[0]["window"],
            "window_bytes_a_step": sum(facts["bytes_read"] for facts in rings)}


def mean_of_layers(layers, name):
    """The mean over layers of a fact, for each sequence. What is counted is a whole number."""
    columns = zip(*(facts[name] for facts in layers), strict=True)
    return [round(sum(column) / len(layers), 3 if name == "true_bits" else None)
            for column in columns]


def measure_offload(session, layers):
    """Bytes of the store, the block cache and its tables, the share of hits, host bytes a step."""
    parts = [cache.nbytes() for cache in session.caches if isinstance(cache, WaveIndex)]
    names = {"store_bytes": "store", "slots_bytes": "block cache", "table_bytes": "its tables"}
    hits, asked, read = (sum(facts[name] for facts in layers)
                         for name in ("hits", "asked", "host_bytes"))
    found = {name: sum(part[of] for part in parts) for name, of in names.items()}
    return found | {"hit_ratio": hits / max(asked, 1),
                    "host_bytes_a_step": read / max(len(session.steps), 1)}


# ---------------------------------------------------------------- the card

def card(facts, context):
    """The facts of a run in a few lines for a person."""
    lines = [context_line(facts, context)]
    if facts["dense_bytes_a_step"]:                     # some layer sees all tokens
        lines += [*zone_lines(facts), reads_line(facts)]
    if "window" in facts:
        lines.append(window_line(facts))
    if "length" in facts["ends"]:
        lines.insert(0, "answer     cut by the limit: --max-new-tokens or --capacity allows more")
    if "hit_ratio" in facts:
        lines.append(offload_line(facts))
    lines += [f"backend    {facts['backend']}; {facts['dtype']}", speed_line(facts)]
    if "bars" in facts:
        lines += bars_lines(facts["bars"])
    if "kl" in facts:
        lines += dense_lines(facts)
    return "\n".join(lines)


def context_line(facts, context):
    held, read, said = (" + ".join(f"{n:,}" for n in facts[f"{name}_tokens"])
                        for name in ("context", "read", "generated"))
    return (f"context    {held} tokens, {read} read and {said} generated now "
            f"(the model's limit is {context:,})")


def zone_lines(facts):
    """A line for each sequence."""
    for row, tokens in enumerate(facts["context_tokens"]):
        indexed = facts["indexed_tokens"][row]
        if not indexed:
            yield f"zones      all {tokens:,} tokens exact: the text is too short to index"
        else:
            yield f"zones      {tokens - indexed:,} tokens exact; {rest(facts, row, indexed)}"


def rest(facts, row, indexed):
    """What becomes of the tokens that are not exact, by method."""
    if "anchors" in facts:
        return (f"{indexed:,} in codes, of which a head keeps {facts['anchors'][row]:,} anchors "
                f"exact: {facts['true_bits'][row]:.2f} bits a number in all")
    if "top" in facts:
        return f"of {indexed:,} indexed a query head retrieves {min(facts['top'], indexed):,}"
    clusters, retrieved, estimated = (facts[name][row] for name in (
        "clusters", "retrieved_clusters", "estimated_clusters"))
    return f"of {clusters:,} clusters a head retrieves {retrieved:,}, estimates {estimated:,}"


def reads_line(facts):
    ours, dense = facts["bytes_a_step"], facts["dense_bytes_a_step"]
    index = f"; index in {facts['bits']} bits" if "clusters" in facts else ""
    index += ", K and V in 8" if facts.get("store_bits") == 8 else ""
    return (f"reads      at most {ours / MIB:.1f} MiB of KV a step, dense {dense / MIB:.1f} MiB: "
            f"{ours / dense:.1%}{index}")


def window_line(facts):
    """What the layers with a window read, with an index and without one."""
    n, of, step = facts["window_layers"], facts["layers"], facts["window_bytes_a_step"] / MIB
    if n == of:
        return (f"windows    no index: all {of} layers see the latest {facts['window']:,} tokens "
                f"only, {step:.1f} MiB a step")
    return (f"windows    {n} of {of} layers see the latest {facts['window']:,} tokens only: "
            f"{step:.1f} MiB a step beside the reads, dense too")


def offload_line(facts):
    store, slots, tables, step = (facts[name] / MIB for name in (
        "store_bytes", "slots_bytes", "table_bytes", "host_bytes_a_step"))
    return (f"offload    {store:.1f} MiB on the host, {slots:.1f} and {tables:.1f} on the device; "
            f"{facts['hit_ratio']:.1%} hits, {step:.2f} MiB a step from the host")


def speed_line(facts):
    """Without a rate, where an answer has one token or two: the first step is no rate."""
    rate = facts["decode_tokens_per_s"]
    return (f"speed      prefill {facts['prefill_s']:.1f} s, first step "
            f"{facts['first_step_s']:.1f} s" + (f", then {rate:.1f} tokens/s" if rate else ""))


def bars_lines(bars):
    """What --check or --max-err found."""
    worst, layers = bars["worst"], " ".join(f"{100 * x:.2g}" for x in bars["median"])
    found = [f"bars       to dense, in % of an output's length, median of each layer: {layers}",
             f"           worst head: layer {worst['layer']}, head {worst['head']}, "
             f"{worst['median']:.1%}; {bars['bytes_a_step'] / MIB:.1f} MiB a step to find out"]
    if "met" in bars:
        found.append(f"           {bars['met']:.1%} of the outputs met --max-err {bars['asked']}")
    return found


def dense_lines(facts):
    """What --compare found."""
    ours, dense = facts["decode_tokens_per_s"], facts["dense_decode_tokens_per_s"]
    yield f"dense      {facts['dense_answer']}"
    yield (f"agreement  {facts['agreement']:.1%} of the tokens, KL to dense {facts['kl']:.4f} nats "
           "each")
    if ours and dense:
        yield (f"           dense decodes {dense:.1f} tokens/s: "
               f"ours is {ours / dense:.2f} times as fast")
