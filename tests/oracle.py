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


def tripartite(q, steady, clusters, n_retrieve, n_estimate, n_tokens, by_mass=False):
    """Tripartite attention as the paper writes it: outputs (G, D), and masses exact and estimated.

    q (G, D) are the queries of one head; steady is (k, v); clusters is a list of (k, v), a cluster
    each, in any order. Centroids are means of keys, the numerator takes sums of values (eq. 4), and
    clusters are ranked by probability over the centroids, summed over the queries. Of the
    n_retrieve best those are exact that fit n_tokens together; the others are estimated.

    by_mass: each cluster weighs its size times 1 + s/2 centroids, s being |q|^2 times the mean
    variance of its keys along the D axes, and is ranked by that mass.
    """
    q, scale = q.double(), 1 / math.sqrt(q.shape[-1])
    centroids = torch.stack([k.double().mean(0) for k, _ in clusters])
    sizes = torch.tensor([float(len(k)) for k, _ in clusters], dtype=torch.float64)
    spreads = torch.stack([k.double().var(0, correction=0).mean() for k, _ in clusters])
    worth = sizes * (1 + (q * scale).square().sum(-1, keepdim=True) * spreads / 2)      # (G, C)
    logits = q @ centroids.T * scale
    rank = (logits + worth.log() if by_mass else logits).softmax(-1).sum(0)
    rank = rank.argsort(descending=True).tolist()
    fit, room = 0, n_tokens
    while fit < min(n_retrieve, len(rank)) and len(clusters[rank[fit]][0]) <= room:
        room, fit = room - len(clusters[rank[fit]][0]), fit + 1
    o, mass = [], []
    for g, query in enumerate(q):
        numerator, denominator, estimated = 0, 0, 0
        exact = [steady] + [clusters[i] for i in rank[:fit]]
        for k, v in exact:
            for key, value in zip(k.double(), v.double(), strict=True):
                weight = math.exp(query @ key * scale)
                numerator, denominator = numerator + weight * value, denominator + weight
        for i in rank[fit:n_retrieve + n_estimate]:
            n = worth[g, i] if by_mass else sizes[i]
            weight = math.exp(query @ centroids[i] * scale) * n
            numerator = numerator + weight * clusters[i][1].double().mean(0)
            estimated += weight
        o.append(numerator / (denominator + estimated))
        mass.append((denominator, estimated))
    return torch.stack(o), mass
