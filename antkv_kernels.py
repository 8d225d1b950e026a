"""Triton twins of antkv.attend, a step's attention from codes, and of antkv.anchor_scores.

    codes     q, codes, codewords, which tokens count -> max, sum and weighted values of each split
    (PyTorch) steady zone, anchors, splits            -> one softmax

    rows      q, k           -> logarithm of each query's sum of exponentials
    columns   q, k, row sums -> attention that each key receives

A program of attend_codes owns a split of the tokens of one head (FlashDecoding). It takes a tile of
tokens, finds the codewords that their bytes stand for, and has the tile's keys and values in
registers: no key is written to memory. Its reads, in bytes, for each of the B*H heads:
T*(N_k + N_v + 1) of codes and marks, S*G*D*4 of queries, and the codewords, 512*D each of keys and
values, which the L1 cache holds. It writes S*G*(D + 2)*4.

The scores take two products q·k of each pair of tokens, as many operations as an attention forward.
Row sums need all columns and column sums need all rows, so one pass cannot make both. The scores
write (G*Tq + T)*4 bytes a key head: no weight leaves the registers.

Does not include: look-up in tables of q by codeword, and propagation_factors. Nothing here has run
on a GPU yet: tests interpret it, and compile it for real targets.
"""
import torch
import triton
import triton.language as tl

BN = 32             # tokens of a tile
SPLITS = 64         # of a head at most


# ---------------------------------------------------------------- a step's attention


@triton.jit
def attend_codes(q, k, v, words_k, words_v, counts, out, stats, T, tiles, book_heads,
                 D: tl.constexpr, G: tl.constexpr, CK: tl.constexpr, CV: tl.constexpr,
                 BG: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    # grid (B*H, S). Loads 1 byte a group and token; the words of a tile come from L1.
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    S = tl.num_programs(1)
    book = head % book_heads
    g, d, t = tl.arange(0, BG), tl.arange(0, BD), tl.arange(0, BN)
    is_g, is_d = (g < G)[:, None], (d < D)[None]
    query = tl.load(q + (head * G + g[:, None]) * D + d[None], is_g & is_d, 0.0)
    best = tl.full((BG,), -1e30, tl.float32)
    total = tl.zeros((BG,), tl.float32)
    mixed = tl.zeros((BG, BD), tl.float32)
    for i in range(tiles):
        rows = ((split * tiles + i) * BN + t).to(tl.int64)
        is_row = (rows < T)[:, None] & is_d
        code = tl.load(k + (head * (D // CK) + d[None] // CK) * T + rows[:, None], is_row, 0)
        place = ((book * (D // CK) + d[None] // CK) * 256 + code.to(tl.int32)) * CK + d[None] % CK
        key = tl.load(words_k + place, is_row, 0.0).to(tl.float32)
        x = tl.dot(query, tl.trans(key), input_precision="ieee")            # (BG, BN)
        has = tl.load(counts + head * T + rows, rows < T, 0) != 0
        x = tl.where(has[None], x, float("-inf"))
        higher = tl.maximum(best, tl.max(x, 1))
        weights, shrink = tl.exp(x - higher[:, None]), tl.exp(best - higher)
        code = tl.load(v + (head * (D // CV) + d[None] // CV) * T + rows[:, None], is_row, 0)
        place = ((book * (D // CV) + d[None] // CV) * 256 + code.to(tl.int32)) * CV + d[None] % CV
        value = tl.load(words_v + place, is_row, 0.0).to(tl.float32)
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None] + tl.dot(weights, value, input_precision="ieee")
        best = higher
    row = (head * S + split) * G + g
    tl.store(out + row[:, None] * D + d[None], mixed, is_g & is_d)
    tl.store(stats + 2 * row, best, g < G)
    tl.store(stats + 2 * row + 1, total, g < G)


def tile_sizes(G, D):
    """BG, BD of a tile."""
    return max(triton.next_power_of_2(G), 16), max(triton.next_power_of_2(D), 16)


@torch.library.custom_op("antkv::splits", mutates_args=())
def splits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, words_k: torch.Tensor,
           words_v: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted values (B, H, S, G, D), not normalised, and max and sum (B, H, S, G, 2), fp32, of
    each split of codes k, v (B, H, N, T). q (B, H, G, D), scaled and fp32; counts (B, H, T) uint8:
    1 where a token counts."""
    (B, H, G, D), T = q.shape, k.shape[3]
    S = number_of_splits(T)
    tiles = triton.cdiv(triton.cdiv(T, BN), S)
    out, stats = q.new_empty(B, H, S, G, D), q.new_empty(B, H, S, G, 2)
    BG, BD = tile_sizes(G, D)
    attend_codes[B * H, S](
        q.contiguous(), k, v, words_k.contiguous(), words_v.contiguous(), counts, out, stats, T,
        tiles, words_k.shape[0] * H, D, G, words_k.shape[-1], words_v.shape[-1], BG, BD, BN)
    return out, stats


@splits.register_fake
def _(q, k, v, words_k, words_v, counts):
    (B, H, G, D), S = q.shape, number_of_splits(k.shape[3])
    return q.new_empty(B, H, S, G, D), q.new_empty(B, H, S, G, 2)


def number_of_splits(T):
    return min(triton.cdiv(T, BN), SPLITS)


def attend(q, steady, past, book):
    """antkv.attend, with the codes read by a kernel."""
    k_s, v_s, bias_s = steady
    T, ids = past.k.shape[-1], past.anchors.long()
    x_s = q @ k_s.float().mT + bias_s                                       # (B, H, G, W)
    x_a = (q @ past.k_anchor.float().mT).masked_fill((ids == T - 1)[:, :, None], -torch.inf)
    has_code = torch.arange(T, device=q.device) < past.n[:, None, None]     # (B, 1, T)
    counts = has_code.to(torch.uint8).expand(*ids.shape[:2], T).scatter(
        -1, ids, torch.zeros_like(ids, dtype=torch.uint8))                  # an anchor counts once
    mixed, stats = splits(q, past.k, past.v, book.k, book.v, counts)
    best, total = stats.unbind(-1)                                          # (B, H, S, G)
    x_c = (best + total.log()).mT + (q * book.centre).sum(-1, keepdim=True)     # (B, H, G, S)
    parts = x_s, x_a, x_c
    weights = torch.cat(parts, -1).softmax(-1)
    w_s, w_a, w_c = weights.split([x.shape[-1] for x in parts], -1)
    mean = mixed / total.clamp(min=1e-30)[..., None]                        # (B, H, S, G, D)
    o = w_s @ v_s.float() + w_a @ past.v_anchor.float()
    return o + (w_c.mT[..., None] * mean).sum(2), w_s


# ---------------------------------------------------------------- the attention a token receives

@triton.jit
def load_tile(x, head, n, rows, D: tl.constexpr, BD: tl.constexpr):
    """Rows (BT, BD) of a head of x (heads, n, D); zeros where there is none."""
    d = tl.arange(0, BD)[None]
    return tl.load(x + (head * n + rows[:, None]) * D + d, (rows < n)[:, None] & (d < D), 0.0)


@triton.jit
def causal_logits(query, key, rows, cols, D: tl.constexpr):
    """Logits (BT, BT), fp32, of queries at places `rows` and keys at places `cols`."""
    x = tl.dot(query, tl.trans(key), input_precision="ieee") * D ** -0.5
    return tl.where(cols[None] <= rows[:, None], x, float("-inf"))


@triton.jit
def sum_rows(q, k, out, Tq, T, G, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr):
    # grid (H*G, tiles of queries), the longest rows first. Loads the keys that its queries see.
    head, past = tl.program_id(0).to(tl.int64), T - Tq
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    rows = tile * BT + tl.arange(0, BT)
    query = load_tile(q, head, Tq, rows, D, BD)
    best = tl.full((BT,), float("-inf"), tl.float32)
    total = tl.zeros((BT,), tl.float32)
    for start in range(0, tl.minimum(past + (tile + 1) * BT, T), BT):
        cols = start + tl.arange(0, BT)
        key = load_tile(k, head // G, T, cols, D, BD)
        x = causal_logits(query, key, past + rows, cols, D)
        higher = tl.maximum(best, tl.max(x, 1))
        total = total * tl.exp(best - higher) + tl.sum(tl.exp(x - higher[:, None]), 1)
        best = higher
    tl.store(out + head * Tq + rows, best + tl.log(total), rows < Tq)


@triton.jit
def sum_columns(q, k, row_sums, out, Tq, T, G, first, D: tl.constexpr, BD: tl.constexpr,
                BT: tl.constexpr):
    # grid (H, tiles of keys from `first` on). Loads the G heads' queries that see its keys.
    head, past = tl.program_id(0).to(tl.int64), T - Tq
    start = first + tl.program_id(1) * BT
    cols = start + tl.arange(0, BT)
    key = load_tile(k, head, T, cols, D, BD)
    total = tl.zeros((BT,), tl.float32)
    for one in range(head * G, head * G + G):
        for tile in range(tl.maximum(start - past, 0) // BT, tl.cdiv(Tq, BT)):
            rows = tile * BT + tl.arange(0, BT)
            query = load_tile(q, one, Tq, rows, D, BD)
            x = causal_logits(query, key, past + rows, cols, D)
            norm = tl.load(row_sums + one * Tq + rows, rows < Tq, float("inf"))
            total += tl.sum(tl.exp(x - norm[:, None]), 0)
    tl.store(out + head * (T - first) + cols - first, total, cols < T)


def score_tile(dtype, D):
    """BD, and BT: as many queries, and keys, as a program of 4 warps holds without spilling."""
    BD = tile_sizes(1, D)[1]
    return BD, 16 if dtype == torch.float32 else min(64, 8192 // BD)


def anchor_scores(q, k, first=0):
    """antkv.anchor_scores, without the weights in memory."""
    (_, H, T, D), (heads, Tq) = k.shape, q.shape[1:3]
    q, k, (BD, BT) = q.contiguous(), k.contiguous(), score_tile(q.dtype, D)
    row_sums = torch.empty(heads, Tq, device=q.device)
    out = torch.empty(H, T - first, device=q.device)
    sum_rows[heads, triton.cdiv(Tq, BT)](q, k, row_sums, Tq, T, heads // H, D, BD, BT)
    sum_columns[H, triton.cdiv(T - first, BT)](
        q, k, row_sums, out, Tq, T, heads // H, first, D, BD, BT)
    return out
