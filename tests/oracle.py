"""Right beyond doubt: attention in float64, with loops and no cleverness."""
import math

import torch


def dense(q, k, v):
    """Attention of q (B, H*G, Tq, D), the last Tq of T tokens, to k and v (B, H, T, D)."""
    (B, Hq, Tq, D), (H, T) = q.shape, k.shape[1:3]
    q, k, v = q.double(), k.double(), v.double()
    o = torch.zeros(B, Hq, Tq, v.shape[-1], dtype=torch.float64)
    for b in range(B):
        for h in range(Hq):
            kv = h // (Hq // H)
            for t in range(Tq):
                n = T - Tq + t + 1                          # tokens this query may see
                weights = (k[b, kv, :n] @ q[b, h, t] / math.sqrt(D)).softmax(-1)
                o[b, h, t] = weights @ v[b, kv, :n]
    return o


def hope(n, variance):
    """Logarithm of what n normal logits of mean 0 may hold: their mean sum as long as values so
    large are among n, else the largest, at sqrt(2 log n) deviations."""
    deviation, limit = math.sqrt(variance), math.sqrt(2 * math.log(n))
    return math.log(n) + variance / 2 if deviation < limit else deviation * limit


def in_bytes(q):
    """q (G, D) in float64, each row as whole numbers from -127 to 127 of its own unit."""
    rows = []
    for row in q.float().tolist():
        unit = max(abs(x) for x in row) / 127 or 1.0
        rows.append([round(x / unit) * unit for x in row])
    return torch.tensor(rows, dtype=torch.float64)


def tripartite(q, steady, clusters, budget, stored=None):
    """Tripartite attention as the paper writes it, but for values: outputs (G, D).

    q (G, D) are the queries of one head; steady is (k, v); clusters is a list of (k, v), a cluster
    each, in any order. Centroids are means of keys, the numerator takes sums of values (eq. 4), and
    clusters are ranked by probability over the centroids, summed over the queries. The n_retrieve
    best are exact, the n_estimate next are estimated. The exact tokens of clusters that weigh most
    over all queries keep their own values: `values` in a thousand, rounded up. Each other one has
    the mean value of its cluster. budget: n_retrieve, n_estimate, values.

    stored: centroids (C, D), means (C, D) and spreads (C,) as an index keeps them, the centre (D,)
    that centroids are kept minus, and q (G, D) as it meets them. A cluster then weighs its size
    times 1 + s/2 centroids, s being |q|^2 times its spread, and is ranked by the share of its hope
    in all, the steady zone's included.
    """
    q, scale = q.double(), 1 / math.sqrt(q.shape[-1])
    n_retrieve, n_estimate, values = budget
    sizes = torch.tensor([float(len(k)) for k, _ in clusters], dtype=torch.float64)
    centroids, means, spreads, centre, asked = stored or (
        torch.stack([k.double().mean(0) for k, _ in clusters]),
        torch.stack([v.double().mean(0) for _, v in clusters]), 0 * sizes, 0 * q[0], q)
    logits = (asked.double() @ centroids.T + (q @ centre.double())[:, None]) * scale     # (G, C)
    share = logits.softmax(-1)
    masses = torch.zeros_like(share)
    for g, query in enumerate(q * scale):
        for i, size in enumerate(sizes):
            masses[g, i] = size * (1 + query @ query * spreads[i] / 2) * math.exp(logits[g, i])
        if stored:
            near = sum(math.exp(query @ key) for key in steady[0].double())
            hopes = torch.tensor([
                math.exp(logits[g, i] + hope(size, query @ query * spreads[i]))
                for i, size in enumerate(sizes)], dtype=torch.float64)
            share[g] = hopes / (near + hopes.sum())
    rank = share.sum(0).argsort(descending=True).tolist()
    exact = [(None, *x) for x in zip(*steady, strict=True)] + [
        (i, *x) for i in rank[:n_retrieve] for x in zip(*clusters[i], strict=True)]
    n_values = math.ceil(values * sum(i is not None for i, *_ in exact) / 1000)
    estimated = rank[n_retrieve:n_retrieve + n_estimate]
    weights = torch.tensor([[math.exp(query @ key.double() * scale) for _, key, _ in exact]
                            for query in q], dtype=torch.float64)               # (G, exact)
    total = weights.sum(1) + masses[:, estimated].sum(1)
    share = (weights / total[:, None]).sum(0).tolist()
    heaviest = sorted((j for j in range(len(exact)) if exact[j][0] is not None),
                      key=lambda j: -share[j])[:n_values]
    o = masses[:, estimated] @ means[estimated]
    for j, (i, _, value) in enumerate(exact):
        is_read = i is None or j in heaviest
        o = o + weights[:, j:j + 1] * (value.double() if is_read else means[i])
    return o / total[:, None]
