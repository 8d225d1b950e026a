"""Triton twins of the hot functions of retroinfer.py: a decode step, and building the index.
And of buffer.copy_rows, which brings tokens from the host.

A step over one layer is six kernels, or four where all values are read: then attend reads keys too.
No token is gathered: the work list that `choose` writes holds row numbers, and `look` and `attend`
read K and V where they lie in the store. Behind a wave buffer the store is its execution buffer.

    rank      q, steady, centroids  -> logs of mass, possible mass (B, H, C, G); stats of each split
    choose    possible mass, stats  -> weights: the shares of each cluster, summed over G
              weights, sizes        -> order (B, H, K), rows (B, H, N) of the retrieved tokens
    look      steady | rows | order -> logits (B, H, W, G) and (B, H, N, G), max and sum of a split
    share     logits, max and sum   -> weights of tokens, and above which of these values are read
    attend    steady | rows | order -> max, sum and weighted values of each split
    combine   of all splits         -> o (B, H, G, D)

    B batch    H kv heads   G query heads per kv head   T tokens   D head dim   W steady-zone slots
    C clusters a head   R, E clusters retrieved, estimated   N retrieved tokens   S splits of a head
    M of them whose values are read   L tokens in a segment   K clusters ranked: R+E
    BG, BD, BN, BC, BL: a tile's size along those, BX and BR: of weights and of R

What a step loads and stores, in bytes, for each of the B*H heads (e bytes an element of K and V;
centroids and means in 4 bits):

    rank      C*(D//2 + 8) + W*(D*e + 4) + 2*S*G*D*e + 4*S*D read, 8*G*(C + S) + 8 written
    choose    4*G*(C + 2*S) + 8*C + 16*R + 16 read, 4*(C + R + E + N) + 16 written
    attend    (W + N)*(2*D*e + 4) + E*(D//2 + 6 + 4*G) + S*(G*D*e + 12) read, 4*S*G*(D + 2) written
    combine   4*S*G*(D + 3) read, G*D*e written

and in place of these, where M < N tokens give values, and cluster means stand for the others:

    choose    4*G*(C + 2*S) + 8*C + 16*R + 16 read, 4*(C + R + E + 2*N) + 16 written
    look      (W + N)*(D*e + 4) + E*(4*G + 4) + S*(G*D*e + 12) read, 4*G*(W + N + 2*S) written
    share     4*G*(N + 2*S) + 4*N + 4 read, 4*N + 12 written
    attend    W*(D*e + 4*G + 4) + N*(4*G + 4) + M*(D*e + 4) + (N - M)*(D//2 + 6)
              + E*(D//2 + 6 + 4*G) + 20*S read, 4*S*G*(D + 2) written

(choose and share read their 8*S*G once for 1,024 rows or fewer; of more than 8,192 weights they
read those behind again for each halving of `thresholds`, about 20 times, from a cache; where
centroids alone rank, as in the paper, rank reads no W). A test finds these in what interpreted
kernels move.

A selection is exact, and the same in every run: of equal weights the first count. torch.topk would
take longer than all kernels: 79 us for 512 of 8,192 numbers in 8 rows, 101 us of 65,536 (measured
in sglang's pull request 33237).

Every grid is fixed by shapes; what a head has of its own (live slots, retrieved tokens, budget)
is read on the device, and a program without work ends. So a step can be captured in a CUDA graph.
Products accumulate in fp32; float32 inputs are multiplied as such, not in TF32.

Registers hold the tiles that tile_sizes and tile_rows choose without spilling (at most 16 bytes a
thread of stack); 99 KB of shared memory hold them too, but float32 queries of more than 8,192
elements a group, as 40 of 256 dims, take 101 KB (107 under Triton 3.6), which an A100 has.

Does not include: the permutation of K and V into cluster order (index_select moves those bytes as
they are), and the column sums of causal attention by which AnTKV finds its anchors. Those belong to
the building of an index, as one kernel more: a program owns a tile of keys and walks over the later
queries, whose max and sum prefill must leave.
"""
import functools
import importlib
from importlib import metadata

import torch


class Missing:
    """Stands for Triton where that is not installed. Then this file can be imported, and no kernel
    runs."""
    JITFunction = object

    def __getattr__(self, name):
        return self

    def __call__(self, *args):
        return self


try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    triton = tl = Missing()


def other_package():
    """The folders, none or one, and the version of the package `kernels` of Hugging Face."""
    try:
        found = metadata.distribution("kernels")
    except metadata.PackageNotFoundError:
        return [], "0"
    return [str(found.locate_file("kernels"))], found.version


# Where our folder comes first on the path, transformers finds this file and not that package. So
# this file can be imported by everyone, and has the package's modules and names as well.
__path__, __version__ = other_package()


def __getattr__(name):
    if not __path__ or name.startswith("__"):
        raise AttributeError(f"kernels.py has no {name}")
    return getattr(importlib.import_module("kernels.__init__"), name)


IS_COMPILED = isinstance(tl.max, triton.JITFunction)    # else Triton's interpreter runs on a CPU
OPTIONS = {"enable_fp_fusion": True}                    # a product and a sum in one instruction


def launch(kernel, grid, *args, **tile):
    """Run a kernel on the device of its first argument; `tile` holds its constants and options."""
    if isinstance(triton, Missing):
        raise ModuleNotFoundError("kernels.py needs Triton", name="triton")
    if IS_COMPILED and not args[0].is_cuda:
        raise ValueError(f"kernels.py runs on a GPU, and the tensors are on {args[0].device}: "
                         "move them, or use the functions of retroinfer.py")
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **tile, **OPTIONS)


def tile_sizes(G, D, element_size):
    """BG and BD, powers of two that tl.dot takes, and as many warps as hold them in registers."""
    BG, BD = (max(triton.next_power_of_2(n), low) for n, low in ((G, 16), (D, 32)))
    is_wide = BD * element_size >= 512 or BG * BD * element_size >= 32768
    return {"G": G, "D": D, "BG": BG, "BD": BD, "num_warps": 8 if is_wide else 4}


def tile_rows(BG, BD, element_size):
    """Rows of a tile of K or V: 16 KB where registers allow, so that 99 KB hold K, V and more."""
    return max(min(16384 // (BD * element_size), 1024 // BG, 128 // element_size), 16)


@functools.cache
def programs(device):
    """Programs that keep a device busy: four to a multiprocessor."""
    is_gpu = device.type == "cuda"
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if is_gpu else 6


def splits(device, heads, n_tiles):
    """Parts to cut a head's tiles into, so that all heads together keep the device busy."""
    return max(min(-(-programs(device) // heads), n_tiles, 128), 1)


# ---------------------------------------------------------------- ranking

@triton.jit
def grow(x, m, s):
    """Running max m and sum s (BG,), grown by logits x (BG, BC)."""
    top = tl.maximum(m, tl.max(x, 1))
    shift = tl.where(top == float("-inf"), 0.0, top)
    return top, s * tl.exp(m - shift) + tl.sum(tl.exp(x - shift[:, None]), 1)


@triton.jit
def in_bytes(x, D: tl.constexpr, fine):
    """retroinfer.in_bytes, in fp16: beside 3 * 2**22 nothing behind the point has room."""
    return ((x.to(tl.float32) * D ** -0.5 * fine[:, None] + 12582912.0) - 12582912.0).to(tl.float16)


@triton.jit
def meet(queries, keys, row, is_live, D: tl.constexpr, BD: tl.constexpr):
    """Logits (BG, BN) of queries (BG, BD) and rows of keys, -inf where none is live."""
    d = tl.arange(0, BD)
    k = tl.load(keys + row[:, None] * D + d, is_live[:, None] & (d < D), 0.0)           # (BN, BD)
    x = tl.dot(queries, tl.trans(k), input_precision="ieee") * D ** -0.5
    return tl.where(is_live, x, float("-inf"))


# Grid (S, B*H). A program owns n_tiles tiles of centroids of one head: it reads them, with size,
# spread and scale, once (of a free slot only the size), and writes the logarithm of each one's
# mass, 4*G bytes, and as many of what is ranked, -inf where a slot is free. BY_MASS: that is what
# the cluster may hold (log_possible_mass), beside every S-th tile of the steady zone; else the
# logit of the centroid. PACKED: two numbers a byte, multiplied as two halves by queries in bytes,
# beside 4*D bytes of the centre.
@triton.jit
def rank_kernel(q, k_steady, bias, centroids, sizes, spreads, scales, centre, masses, ranks, stats,
                counters, H, W, C, n_tiles, bias_b, bias_h, BY_MASS: tl.constexpr,
                PACKED: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BG: tl.constexpr,
                BD: tl.constexpr, BC: tl.constexpr):
    split, head, S = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    tl.store(counters + head * 2, 0, split == 0)
    tl.store(counters + head * 2 + 1, 0, split == 0)
    g, d, h = tl.arange(0, BG), tl.arange(0, BD), tl.arange(0, BD // 2)
    q += (head * G + g[:, None]) * D
    queries = tl.load(q + d, (g[:, None] < G) & (d < D), 0.0)                           # (BG, BD)
    half = tl.sum(queries.to(tl.float32) * queries.to(tl.float32), 1) * (0.5 / D)       # (BG,)
    if PACKED:
        is_half = (g[:, None] < G) & (h < D // 2)
        fine = 127 / tl.maximum(tl.max(tl.abs(queries.to(tl.float32)) * D ** -0.5, 1), 1e-30)
        q_low = in_bytes(tl.load(q + h, is_half, 0.0), D, fine)                         # (BG, BD/2)
        q_high = in_bytes(tl.load(q + D // 2 + h, is_half, 0.0), D, fine)
        middle = tl.load(centre + head * D + d, d < D, 0.0)                             # (BD,)
        shift = tl.sum(queries.to(tl.float32) * middle, 1) * D ** -0.5                  # (BG,)
    m = tl.full([BG], float("-inf"), tl.float32)
    s = tl.zeros([BG], tl.float32)
    for t in range(split * n_tiles, split * n_tiles + n_tiles):
        c = t * BC + tl.arange(0, BC)
        size = tl.load(sizes + head * C + c, c < C, 0.0)                                # (BC,)
        is_live = size > 0
        spread = tl.load(spreads + head * C + c, is_live, 0.0).to(tl.float32)
        scale = tl.load(scales + (head * C + c) * 2, is_live, 1.0).to(tl.float32)
        if PACKED:
            codes = tl.load(centroids + (head * C + c[:, None]) * (D // 2) + h,
                            is_live[:, None] & (h < D // 2), 0)                         # (BC, BD/2)
            low, high = (codes & 15).to(tl.float16) - 8, (codes >> 4).to(tl.float16) - 8
            x = tl.dot(q_high, tl.trans(high), tl.dot(q_low, tl.trans(low))) / fine[:, None]
        else:
            x = meet(queries, centroids, head * C + c, is_live, D, BD)                  # (BG, BC)
        x *= scale
        if PACKED:
            x += shift[:, None]
        x = tl.where(is_live, x, float("-inf"))
        at, is_one = (head * C + c) * G + g[:, None], (c < C) & (g[:, None] < G)
        size = tl.where(is_live, size, 1.0)
        tl.store(masses + at, x + tl.log(size * (1 + half[:, None] * spread)), is_one)
        if BY_MASS:
            deviation = tl.sqrt(2 * half)[:, None] * tl.sqrt(spread)                    # (BG, BC)
            top = tl.minimum(deviation, tl.sqrt(2 * tl.log(size)))
            x += tl.log(size) + top * (deviation - top / 2)
        tl.store(ranks + at, x, is_one)
        m, s = grow(x, m, s)
    if BY_MASS:
        for t in range(split, tl.cdiv(W, BC), S):
            w = t * BC + tl.arange(0, BC)
            b = tl.load(bias + head // H * bias_b + head % H * bias_h + w, w < W, float("-inf"))
            m, s = grow(meet(queries, k_steady, head * W + w, b > float("-inf"), D, BD) + b, m, s)
    stats += (head * S + split) * 2 * G + g
    tl.store(stats, m, g < G)
    tl.store(stats + G, s, g < G)


@triton.jit
def weigh(logits, stats, weights, counter, head, C, n, S, G: tl.constexpr, BG: tl.constexpr,
          BC: tl.constexpr, STEP: tl.constexpr):
    """Write the weights of BC of C rows: shares, summed over G, that exp of the logits of the first
    n have in all of stats. -1, below every share, where a row is free. True in the last program of
    a head: the others' weights are written then."""
    g = tl.arange(0, BG)
    m, total = tl.full([BG], float("-inf"), tl.float32), tl.zeros([BG], tl.float32)
    for start in range(0, S, STEP):
        s = start + tl.arange(0, STEP)[:, None]
        is_pair = (s < S) & (g < G)                                                     # (STEP, BG)
        m_s = tl.load(stats + (head * S + s) * 2 * G + g, is_pair, float("-inf"))
        sum_s = tl.load(stats + (head * S + s) * 2 * G + G + g, is_pair, 0.0)
        top = tl.maximum(m, tl.max(m_s, 0))
        shift = tl.where(top == float("-inf"), 0.0, top)                                # (BG,)
        total = total * tl.exp(m - shift) + tl.sum(sum_s * tl.exp(m_s - shift), 0)
        m = top
    top = tl.where(m == float("-inf"), 0.0, m)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    is_one = (c[:, None] < n) & (g < G)                                                 # (BC, BG)
    x = tl.load(logits + (head * C + c[:, None]) * G + g, is_one, float("-inf"))
    share = tl.sum(tl.exp(x - top) / tl.where(total > 0, total, 1.0), 1)                # (BC,)
    share = tl.where(share >= 0, share, 0.0)                                            # no NaN
    tl.store(weights + head * C + c, tl.where(tl.max(x, 1) > float("-inf"), share, -1.0), c < C)
    tl.debug_barrier()          # all threads have written before the counter says so
    is_last = tl.atomic_add(counter, 1) == tl.num_programs(0) - 1
    tl.store(counter, 0, is_last)
    return is_last


@triton.jit
def bits(weights, i, n):
    """Weights i of n, as whole numbers in the same order. Below 0: free, or none."""
    return tl.load(weights + i, i < n, -1.0).to(tl.int32, bitcast=True)


@triton.jit
def count(x, weights, low_a, low_b, n, BX: tl.constexpr):
    """How many of n weights, of which x are the first, are at least low_a, and low_b."""
    a, b = (x >= low_a).to(tl.int32), (x >= low_b).to(tl.int32)
    for start in range(BX, n, BX):
        more = bits(weights, start + tl.arange(0, BX), n)
        a, b = a + (more >= low_a).to(tl.int32), b + (more >= low_b).to(tl.int32)
    return tl.sum(a, 0), tl.sum(b, 0)


@triton.jit
def narrow(low, high, found, above, middle, n_middle, n):
    """The half of [low, high) that holds the n-th largest weight; how many are at least its low,
    and at least its high."""
    is_up = n_middle >= n
    low, high = tl.where(is_up, middle, low), tl.where(is_up, high, middle)
    return low, high, tl.where(is_up, n_middle, found), tl.where(is_up, above, n_middle)


@triton.jit
def first_equals(weights, low, found, above, n_top, n, BX: tl.constexpr):
    """Where to stop, of n, for n_top weights: those above low, and the first that equal it."""
    end, seen = n, above
    for start in range(0, tl.where(found > n_top, n, 0), BX):       # hardly ever
        i = start + tl.arange(0, BX)
        is_equal = (bits(weights, i, n) == low).to(tl.int32)
        is_last = (is_equal > 0) & (seen + tl.cumsum(is_equal, 0) == n_top)
        end = tl.minimum(end, tl.min(tl.where(is_last, i + 1, n), 0))
        seen += tl.sum(is_equal, 0)
    return end


@triton.jit
def thresholds(weights, n, n_a, n_b, BX: tl.constexpr):
    """low and end for `is_top`, and how many there are, of the n_a and of the n_b largest of n
    weights. Intervals are halved until they hold no more weights than are asked for."""
    x = bits(weights, tl.arange(0, BX), n)
    found_a, found_b = count(x, weights, 0, 0, n, BX)
    low_a, high_a, above_a = found_a * 0, found_a * 0 + 2147483647, found_a * 0
    low_b, high_b, above_b = low_a, high_a, above_a
    while ((found_a > n_a) & (low_a + 1 < high_a)) | ((found_b > n_b) & (low_b + 1 < high_b)):
        a, b = low_a + (high_a - low_a) // 2, low_b + (high_b - low_b) // 2
        more_a, more_b = count(x, weights, a, b, n, BX)
        low_a, high_a, found_a, above_a = narrow(low_a, high_a, found_a, above_a, a, more_a, n_a)
        low_b, high_b, found_b, above_b = narrow(low_b, high_b, found_b, above_b, b, more_b, n_b)
    end_a = first_equals(weights, low_a, found_a, above_a, n_a, n, BX)
    end_b = first_equals(weights, low_b, found_b, above_b, n_b, n, BX)
    return low_a, end_a, tl.minimum(found_a, n_a), low_b, end_b, tl.minimum(found_b, n_b)


@triton.jit
def is_top(x, i, low, end):
    """Which of weights i are among the largest, of equals the first: x are their bits."""
    return (x > low) | ((x == low) & (i < end))


# Grid (C/BC, B*H). A program owns BC clusters: it reads 4*G bytes of ranks each and all S pairs of
# max and sum of the head, and writes 4 bytes each, their weights. The last program of a head picks
# the clusters: it reads the weights, writes 4 bytes of order for each that is ranked, those that
# are retrieved first, then reads 4 of order, 4 of size and 8 of offset of each of these and writes
# 4 bytes a token, its row, with `owners` 4 more, its cluster. In the end it writes how many
# clusters and tokens are retrieved, and how many clusters are ranked.
@triton.jit
def choose_kernel(ranks, stats, sizes, offsets, n_retrieve, n_ranked, weights, counters, order,
                  rows, owners, fits, C, S, R, K, N, heads, G: tl.constexpr, BG: tl.constexpr,
                  BC: tl.constexpr, STEP: tl.constexpr, BX: tl.constexpr, BR: tl.constexpr):
    head = tl.program_id(1).to(tl.int64)
    if weigh(ranks, stats, weights, counters + head * 2, head, C, C, S, G, BG, BC, STEP):
        weights += head * C
        order += head * K
        # The best n_a clusters are retrieved, the best n_b are ranked: these, and the estimated.
        n_a = tl.minimum(tl.load(n_retrieve + head // heads), R).to(tl.int32)
        n_b = tl.minimum(tl.load(n_ranked + head // heads), K).to(tl.int32)
        low_a, end_a, n_read, low_b, end_b, n_means = thresholds(weights, C, n_a,
                                                                 tl.maximum(n_a, n_b), BX)
        # Retrieved clusters come first in order, in the index's order, and then the estimated ones.
        n, at_read, at_mean = n_read, n_read * 0, n_read
        for start in range(0, C, BR):
            c = start + tl.arange(0, BR)
            x = bits(weights, c, C)
            is_read, is_ranked = is_top(x, c, low_a, end_a), is_top(x, c, low_b, end_b)
            is_mean = is_ranked & (is_read == 0)
            at = tl.where(is_read, at_read + tl.cumsum(is_read.to(tl.int32), 0),
                          at_mean + tl.cumsum(is_mean.to(tl.int32), 0)) - 1
            tl.store(order + at, c, is_ranked)
            at_read += tl.sum(is_read.to(tl.int32), 0)
            at_mean += tl.sum(is_mean.to(tl.int32), 0)
        tl.debug_barrier()      # all threads have written before others read order
        # The rows of the retrieved tokens, packed: cluster r has the places before ends[r].
        end = n * 0
        for start in range(0, n, BR):
            r = start + tl.arange(0, BR)
            c = tl.load(order + r, r < n, 0)                                            # (BR,)
            size = tl.load(sizes + head * C + c, r < n, 0.0).to(tl.int32)
            ends = end + tl.cumsum(size, 0)
            is_in = (r < n) & (ends <= N)       # of a sound index all: no row lies outside
            first = tl.load(offsets + head * C + c, is_in, 0).to(tl.int32)
            for i in range(0, tl.max(tl.where(is_in, size, 0), 0)):
                at = head * N + ends - size + i
                tl.store(rows + at, first + i, is_in & (i < size))
                if owners is not None:
                    tl.store(owners + at, c, is_in & (i < size))
            end += tl.sum(size, 0)
        tl.store(fits + head * 3, n)
        tl.store(fits + head * 3 + 1, tl.minimum(end, N))
        tl.store(fits + head * 3 + 2, n_means)


@triton.jit
def few(n, values):
    """retroinfer.few: of n tokens `values` in 1,000 have their values read."""
    return (n * values + 999) // 1000


# Grid (N/BC, B*H). choose_kernel for retrieved tokens, of which it reads the logits and writes the
# weights. The last program of a head writes the threshold of those whose values are read, 8 bytes.
@triton.jit
def share_kernel(x_tokens, stats, fits, weights, counters, cuts, values, N, S, G: tl.constexpr,
                 BG: tl.constexpr, BC: tl.constexpr, STEP: tl.constexpr, BX: tl.constexpr):
    head = tl.program_id(1).to(tl.int64)
    n = tl.load(fits + head * 3 + 1)
    if weigh(x_tokens, stats, weights, counters + head * 2 + 1, head, N, n, S, G, BG, BC, STEP):
        M = few(n, values)
        low, end, _, _, _, _ = thresholds(weights + head * N, n, M, M, BX)
        tl.store(cuts + head * 2, low)
        tl.store(cuts + head * 2 + 1, end)


def select(kernel, n, logits, stats, *args, **tile):
    """Launch a kernel that weighs n rows of each head, and selects from them."""
    B, H, _, G = logits.shape
    BG = triton.next_power_of_2(G)
    BC, BX = min(1024, 16384 // BG), min(triton.next_power_of_2(n), 8192)   # registers hold them
    launch(kernel, (triton.cdiv(n, BC), B * H), logits, stats, *args, G=G, BG=BG, BC=BC, STEP=16,
           BX=BX, num_warps=16, **tile)


# ---------------------------------------------------------------- attention

# Grid (S, B*H). A program owns every S-th tile of the entries of one head, as in attend_kernel: of
# steady slots and retrieved tokens it reads D*e + 4 bytes each and writes 4*G, their logits (-inf
# of a free slot), of estimated clusters it reads 8 + 4*G. In the end it writes max and sum, 8*G.
@triton.jit
def look_kernel(q, k_steady, bias, k_store, rows, fits, order, masses, stats, H, W, T, N, C, K,
                bias_b, bias_h, x_steady, x_tokens, G: tl.constexpr, D: tl.constexpr,
                BG: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    split, head, S = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    g, d, n = tl.arange(0, BG), tl.arange(0, BD), tl.arange(0, BN)
    is_g, is_q = g[:, None] < G, (g[:, None] < G) & (d < D)
    queries = tl.load(q + (head * G + g[:, None]) * D + d, is_q, 0.0)                   # (BG, BD)
    m, s = tl.full([BG], float("-inf"), tl.float32), tl.zeros([BG], tl.float32)
    n_tiles = tl.cdiv(W, BN)
    for t in range(split, n_tiles, S):
        w = t * BN + n
        b = tl.load(bias + head // H * bias_b + head % H * bias_h + w, w < W, float("-inf"))
        x = meet(queries, k_steady, head * W + w, b > float("-inf"), D, BD) + b         # (BG, BN)
        tl.store(x_steady + (head * W + w) * G + g[:, None], x, (w < W) & is_g)
        m, s = grow(x, m, s)
    n_clusters, n_tokens = tl.load(fits + head * 3), tl.load(fits + head * 3 + 1)
    first = (split + S - n_tiles % S) % S           # where the zone before left off
    n_tiles += tl.cdiv(n_tokens, BN)
    for t in range(first, tl.cdiv(n_tokens, BN), S):
        slot = t * BN + n
        is_live = slot < n_tokens
        row = head * T + tl.load(rows + head * N + slot, is_live, 0)
        x = meet(queries, k_store, row, is_live, D, BD)
        tl.store(x_tokens + (head * N + slot) * G + g[:, None], x, is_live & is_g)
        m, s = grow(x, m, s)
    n_estimate = tl.load(fits + head * 3 + 2) - n_clusters
    for t in range((split + S - n_tiles % S) % S, tl.cdiv(n_estimate, BN), S):
        r = t * BN + n
        ids = head * C + tl.load(order + head * K + n_clusters + r, r < n_estimate, 0)
        x = tl.load(masses + ids * G + g[:, None], (r < n_estimate) & is_g, float("-inf"))
        m, s = grow(x, m, s)
    stats += (head * S + split) * 2 * G + g
    tl.store(stats, m, g < G)
    tl.store(stats + G, s, g < G)


@triton.jit
def absorb(x, low, high, scale, m, s, o_low, o_high):
    """Running max m, sum s and halves of weighted values, grown by logits x and values*scale, of
    which low and high (BN, BD/2) are the halves."""
    top = tl.maximum(m, tl.max(x, 1))
    shift = tl.where(top == float("-inf"), 0.0, top)
    p, fade = tl.exp(x - shift[:, None]), tl.exp(m - shift)
    weights = (p * scale).to(low.dtype)
    o_low = tl.dot(weights, low, o_low * fade[:, None], input_precision="ieee")
    o_high = tl.dot(weights, high, o_high * fade[:, None], input_precision="ieee")
    return top, s * fade + tl.sum(p, 1), o_low, o_high


@triton.jit
def load_halves(rows, ids, is_live, h, D: tl.constexpr, PACKED: tl.constexpr):
    """The halves (BN, BD/2) of rows ids; PACKED, of means: a byte holds a number of each."""
    half: tl.constexpr = (D + 1) // 2
    is_low, is_high = is_live[:, None] & (h < half), is_live[:, None] & (half + h < D)
    if PACKED:
        codes = tl.load(rows + ids[:, None] * half + h, is_low, 136)        # 0 in both halves
        low, high = (codes & 15).to(tl.float32) - 8, (codes >> 4).to(tl.float32) - 8
    else:
        low = tl.load(rows + ids[:, None] * D + h, is_low, 0.0)
        high = tl.load(rows + ids[:, None] * D + half + h, is_high, 0.0)
    return low, high


# Grid (S, B*H). A program owns every S-th tile of the live entries of one head, BN entries a tile:
# steady slots, then retrieved tokens by the work list, then the estimated clusters, whose masses
# rank_kernel left. It reads 2*D*e + 4 bytes a token, and of a cluster its mean, 4*G + 6 bytes and
# in the end writes 4*G*(D + 2). Where look_kernel has left logits, it reads these, 4*G bytes, in
# place of keys, and of a token its weight, 4 bytes; then the row and its value if share_kernel
# selected it, else the number of its cluster, 4 bytes, and this cluster's mean and scale.
@triton.jit
def attend_kernel(q, k_steady, bias, k_store, rows, fits, order, masses, stats, H, W, T, N, C, K,
                  bias_b, bias_h, v_steady, v_store, means, scales, parts, owners, x_steady,
                  x_tokens, weights, cuts, PACKED: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
                  BG: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    split, head, S = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    g, d, h, n = tl.arange(0, BG), tl.arange(0, BD), tl.arange(0, BD // 2), tl.arange(0, BN)
    half: tl.constexpr = (D + 1) // 2
    kind = v_store.dtype.element_ty
    is_g = g[:, None] < G
    if cuts is None:
        queries = tl.load(q + (head * G + g[:, None]) * D + d, is_g & (d < D), 0.0)     # (BG, BD)
    else:
        cut, end = tl.load(cuts + head * 2), tl.load(cuts + head * 2 + 1)
    m, s = tl.full([BG], float("-inf"), tl.float32), tl.zeros([BG], tl.float32)
    o_low, o_high = tl.zeros([BG, BD // 2], tl.float32), tl.zeros([BG, BD // 2], tl.float32)
    n_tiles = tl.cdiv(W, BN)
    for t in range(split, n_tiles, S):
        w = t * BN + n
        b = tl.load(bias + head // H * bias_b + head % H * bias_h + w, w < W, float("-inf"))
        row, is_live = head * W + w, b > float("-inf")                                  # (BN,)
        low, high = load_halves(v_steady, row, is_live, h, D, False)
        if cuts is None:
            x = meet(queries, k_steady, row, is_live, D, BD) + b                        # (BG, BN)
        else:
            x = tl.load(x_steady + row * G + g[:, None], (w < W) & is_g, float("-inf"))
        m, s, o_low, o_high = absorb(x, low, high, 1.0, m, s, o_low, o_high)
    n_clusters, n_tokens = tl.load(fits + head * 3), tl.load(fits + head * 3 + 1)
    first = (split + S - n_tiles % S) % S           # where the zone before left off
    n_tiles += tl.cdiv(n_tokens, BN)
    for t in range(first, tl.cdiv(n_tokens, BN), S):
        slot = t * BN + n
        at, is_read = head * N + slot, slot < n_tokens
        if cuts is not None:
            is_read = is_read & is_top(bits(weights + head * N, slot, n_tokens), slot, cut, end)
        row = head * T + tl.load(rows + at, is_read, 0)
        low, high = load_halves(v_store, row, is_read, h, D, False)
        scale = 1.0
        if cuts is None:
            x = meet(queries, k_store, row, is_read, D, BD)
        else:
            is_mean = (slot < n_tokens) & (is_read == 0)
            x = tl.load(x_tokens + at * G + g[:, None], (slot < n_tokens) & is_g, float("-inf"))
            ids = head * C + tl.load(owners + at, is_mean, 0)
            scale = tl.load(scales + ids * 2 + 1, is_mean, 1.0).to(tl.float32)
            low_mean, high_mean = load_halves(means, ids, is_mean, h, D, PACKED)
            low = (low.to(tl.float32) + low_mean).to(kind)          # one of both is 0
            high = (high.to(tl.float32) + high_mean).to(kind)
        m, s, o_low, o_high = absorb(x, low, high, scale, m, s, o_low, o_high)
    n_estimate = tl.load(fits + head * 3 + 2) - n_clusters
    for t in range((split + S - n_tiles % S) % S, tl.cdiv(n_estimate, BN), S):
        is_live = t * BN + n < n_estimate
        ids = head * C + tl.load(order + head * K + n_clusters + t * BN + n, is_live, 0)
        x = tl.load(masses + ids * G + g[:, None], is_live & is_g, float("-inf"))
        scale = tl.load(scales + ids * 2 + 1, is_live, 0.0).to(tl.float32)
        low, high = load_halves(means, ids, is_live, h, D, PACKED)
        m, s, o_low, o_high = absorb(x, low.to(kind), high.to(kind), scale, m, s, o_low, o_high)
    stats += (head * S + split) * 2 * G + g
    tl.store(stats, m, g < G)
    tl.store(stats + G, s, g < G)
    parts += ((head * S + split) * G + g[:, None]) * D + h                              # (BG, BD/2)
    tl.store(parts, o_low, is_g & (h < half))
    tl.store(parts + half, o_high, is_g & (half + h < D))


# Grid (G, B*H). A program owns one output row: it reads S partial rows, 4*(D + 2) bytes each. Where
# every entry is masked 0/0 gives NaN, as a softmax over nothing does.
@triton.jit
def combine_kernel(stats, parts, out, S, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                   BS: tl.constexpr, STEP: tl.constexpr):
    g, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    every, d = tl.arange(0, BS), tl.arange(0, BD)
    m = tl.load(stats + (head * S + every) * 2 * G + g, every < S, float("-inf"))       # (BS,)
    top = tl.max(m, 0)
    total, o = 0.0, tl.zeros([BD], tl.float32)
    for start in range(0, S, STEP):
        s = start + tl.arange(0, STEP)
        pair = stats + (head * S + s) * 2 * G + g
        top_s = tl.load(pair, s < S, float("-inf"))
        scale = tl.where(top_s == float("-inf"), 0.0, tl.exp(top_s - top))              # (STEP,)
        total += tl.sum(scale * tl.load(pair + G, s < S, 0.0), 0)
        part = tl.load(parts + ((head * S + s[:, None]) * G + g) * D + d,
                       (s[:, None] < S) & (d < D), 0.0)                                 # (STEP, BD)
        o += tl.sum(scale[:, None] * part, 0)
    tl.store(out + (head * G + g) * D + d, (o / total).to(out.dtype.element_ty), d < D)


def attend(q, steady, index, stores, budget, method):
    """retroinfer.attend, with clusters read from the stores in place.

    Every tensor is on one GPU, q, k and v are of one dtype: ValueError otherwise. Of equal clusters
    or tokens those of the lower number are best. Runs under torch.compile and in a CUDA graph. Rows
    of a store of bytes are brought first.
    """
    if len(stores) > 2:
        from retroinfer import gather_clusters

        def fetch(ids, ends):
            k, v, bias = gather_clusters(index, stores, budget.N, ids, ends)
            return k.to(q.dtype), v.to(q.dtype), bias
        return tripartite_attention(q, steady, index, budget, fetch, method)
    given = as_lists(q, steady, index, stores, budget, method)
    _, *chosen = choose_op(*given)
    return attend_op(*given[:4], [x.contiguous() for x in stores], chosen)


def tripartite_attention(q, steady, index, budget, fetch, method):
    """retroinfer.tripartite_attention. A token that fetch brings lies in the row of its place."""
    from retroinfer import owners
    given = as_lists(q, steady, index, (), budget, method)
    weights, masses, order, rows, owner, fits = choose_op(*given)
    ids, ends = best_first(order[..., :budget.R], weights, fits, index.sizes)
    stores = fetch(ids, ends)[:2]                                           # (B, H, N, D) each
    rows = torch.arange(budget.N, dtype=rows.dtype, device=q.device).expand_as(rows).contiguous()
    if budget.values < 1:
        owner = ids.gather(-1, owners(ends, budget.N)).int()
    return attend_op(*given[:4], list(stores), [masses, order, rows, owner, fits])


def as_lists(q, steady, index, stores, budget, method):
    """The arguments of choose_op. ValueError if dtypes differ."""
    from retroinfer import rank_by_centroid, rank_by_mass
    kinds = {x.dtype for x in (q, *steady[:2], *index[:2], *stores)} - {torch.uint8}
    if len(kinds) > 1:
        raise ValueError(f"q, k, v and the index are of {sorted(map(str, kinds))}: cast to one")
    assert method.rank in (rank_by_mass, rank_by_centroid), method.rank
    bias = steady[2] if steady[2].stride(3) == 1 else steady[2].contiguous()    # (B, H, 1, W)
    index = index._replace(sizes=index.sizes.float())
    q, k, v, *index = (x.contiguous() for x in (q, *steady[:2], *index))
    numbers = [budget.N, budget.R, budget.K, round(1000 * budget.values)]
    return q, [k, v, bias], index, numbers, list(budget[:2]), method.rank is rank_by_mass


def best_first(order, weights, fits, sizes):
    """The retrieved clusters of `order` (B, H, R) by rank, as fetch takes them: ids and ends."""
    is_free = torch.arange(order.shape[-1], device=order.device) >= fits[..., :1]
    ids = order.long().masked_fill(is_free, 0)                              # (B, H, R)
    weights = weights.gather(-1, ids).masked_fill(is_free, -1)
    ids = ids.gather(-1, weights.argsort(dim=-1, descending=True, stable=True))
    sizes = sizes.gather(-1, ids).masked_fill(is_free, 0)
    return ids, sizes.long().cumsum(-1)


@torch.library.custom_op("retroinfer::choose", mutates_args=())
def choose_op(q: torch.Tensor, steady: list[torch.Tensor], index: list[torch.Tensor],
              numbers: list[int], limits: list[torch.Tensor], by_mass: bool) -> list[torch.Tensor]:
    from retroinfer import Index
    (k_steady, _, bias), index = steady, Index(*index)
    counters = q.new_empty(*q.shape[:2], 2, dtype=torch.int32)
    masses, ranks, stats = rank(q, k_steady, bias, index, counters, by_mass)
    weights, *lists = choose(ranks, stats, index, limits, counters, numbers)
    return [weights, masses, *lists]


@choose_op.register_fake
def _(q, steady, index, numbers, limits, by_mass):
    (B, H, G, _), C, (N, _, K, _) = q.shape, index[2].shape[2], numbers
    weights, masses = (q.new_empty(B, H, *n, dtype=torch.float32) for n in ((C,), (C, G)))
    lists = (q.new_empty(B, H, n, dtype=torch.int32) for n in (K, N, N, 3))
    return [weights, masses, *lists]


@torch.library.custom_op("retroinfer::attend", mutates_args=())
def attend_op(q: torch.Tensor, steady: list[torch.Tensor], index: list[torch.Tensor],
              numbers: list[int], stores: list[torch.Tensor],
              chosen: list[torch.Tensor]) -> torch.Tensor:
    from retroinfer import Index
    (k_steady, v_steady, bias), (k_store, v_store) = steady, stores
    index = Index(*index)
    masses, order, rows, owners, fits = chosen
    (N, _, K, values), (B, H, G, D) = numbers, q.shape
    W, T, C = k_steady.shape[2], k_store.shape[2], index.means.shape[2]
    tile = tile_sizes(G, D, q.element_size())
    tile["BN"] = BN = tile_rows(tile["BG"], tile["BD"], q.element_size())
    S = splits(q.device, B * H, sum(triton.cdiv(n, BN) for n in (W, N, K)))
    stats, parts, o = (q.new_empty(B, H, *shape, dtype=dtype) for *shape, dtype in (
        (S, 2, G, torch.float32), (S, G, D, torch.float32), (G, D, v_steady.dtype)))
    shared = (q, k_steady, bias, k_store, rows, fits, order, masses, stats, H, W, T, N, C, K,
              bias.stride(0), bias.stride(1))
    looked = [owners, *look(shared, values, tile)] if values < 1000 else [None] * 5
    if q.element_size() == 4 and tile["BG"] * tile["BD"] >= 8192:
        tile["num_warps"] = 16                  # float32 products hold more in registers
    launch(attend_kernel, (S, B * H), *shared, v_steady, v_store, index.means, index.scales,
           parts, *looked, PACKED=index.means.dtype == torch.uint8, **tile, num_stages=3)
    launch(combine_kernel, (G, B * H), stats, parts, o, S, G=G, D=D, BD=tile["BD"],
           BS=triton.next_power_of_2(S), STEP=16, num_warps=4)
    return o


def rank(q, k_steady, bias, index, counters, by_mass):
    """Logarithms of masses, and what clusters are ranked by, (B, H, C, G) each; max and sum of the
    latter (B, H, S, 2, G). fp32. The counters (B, H, 2) are set to 0."""
    (B, H, G, D), C, W = q.shape, index.sizes.shape[2], k_steady.shape[2]
    tile = tile_sizes(G, D, q.element_size())
    BC = tile_rows(tile["BG"], tile["BD"], q.element_size())
    n_tiles = triton.cdiv(C, BC)
    n_tiles = triton.cdiv(n_tiles, splits(q.device, B * H, n_tiles))    # of one program
    S = triton.cdiv(C, BC * n_tiles)
    masses, ranks = index.sizes.new_empty(2, B, H, C, G)
    stats = index.sizes.new_empty(B, H, S, 2, G)
    launch(rank_kernel, (S, B * H), q, k_steady, bias, index.centroids, index.sizes, index.spreads,
           index.scales, index.centre, masses, ranks, stats, counters, H, W, C, n_tiles,
           bias.stride(0), bias.stride(1), BY_MASS=by_mass,
           PACKED=index.centroids.dtype == torch.uint8, BC=BC, **tile, num_stages=3)
    return masses, ranks, stats


def choose(ranks, stats, index, limits, counters, numbers):
    """weights (B, H, C), order (B, H, K), rows and owners (B, H, N), fits (B, H, 3).

    weights are the clusters' shares. order has the ranked clusters, and of these the retrieved ones
    first. rows are those of the retrieved tokens, and owners their clusters: without meaning if all
    values are read. fits counts retrieved clusters, retrieved tokens, and ranked clusters.
    """
    (B, H, C, _), (N, R, K, values) = ranks.shape, numbers
    limits = [x.expand(B, -1).contiguous() for x in limits]             # (B, H), or (B, 1)
    weights = index.sizes.new_empty(B, H, C)
    order, rows, owners, fits = (counters.new_empty(B, H, n) for n in (K, N, N, 3))
    select(choose_kernel, C, ranks, stats, index.sizes, index.offsets, *limits, weights, counters,
           order, rows, owners if values < 1000 else None, fits, C, stats.shape[2], R, K, N,
           H // limits[0].shape[1], BR=512)
    return weights, order, rows, owners, fits


def look(shared, values, tile):
    """What attend_kernel takes in place of keys, for what it shares with look_kernel.

    Logits of steady slots (B, H, W, G) and retrieved tokens (B, H, N, G), weights of the latter
    (B, H, N), and the thresholds (B, H, 2) of those whose values are read.
    """
    (B, H, G, _), stats, W, N = shared[0].shape, shared[8], shared[10], shared[12]
    counters = stats.new_zeros(B, H, 2, dtype=torch.int32)
    x_steady, x_tokens, weights, cuts = (
        like.new_empty(B, H, *shape) for like, *shape in (
            (stats, W, G), (stats, N, G), (stats, N), (counters, 2)))
    launch(look_kernel, (stats.shape[2], B * H), *shared, x_steady, x_tokens, **tile, num_stages=3)
    select(share_kernel, N, x_tokens, stats, shared[5], weights, counters, cuts, values, N,
           stats.shape[2])
    return x_steady, x_tokens, weights, cuts


@attend_op.register_fake
def _(q, steady, index, numbers, stores, chosen):
    return q.new_empty(q.shape, dtype=steady[1].dtype)


# ---------------------------------------------------------------- building the index

# Grid (L/BL, B*H). A program owns BL tokens and keeps their best centroid while it passes over all
# C: products stay on the chip. It reads BL*D*e bytes of x for every BC centroids (from cache after
# the first time) and all C*D*e of the centroids, and writes 8 bytes a token.
@triton.jit
def nearest_kernel(x, centroids, ids, L, C, D: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr,
                   BD: tl.constexpr):
    head = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BL + tl.arange(0, BL)
    best = tl.full([BL], float("-inf"), tl.float32)
    which = tl.zeros([BL], tl.int32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        product = tl.zeros([BL, BC], tl.float32)
        for first in range(0, D, BD):
            d = first + tl.arange(0, BD)
            a = tl.load(x + (head * L + t[:, None]) * D + d, (t[:, None] < L) & (d < D), 0.0)
            b = tl.load(centroids + (head * C + c[:, None]) * D + d,
                        (c[:, None] < C) & (d < D), 0.0)
            product = tl.dot(a, tl.trans(b), product, input_precision="tf32x3")
        product = tl.where(c < C, product, float("-inf"))                               # (BL, BC)
        top, at = tl.max(product, return_indices=True, axis=1)
        which = tl.where(top > best, start + at, which)                 # of equals the first
        best = tl.maximum(best, top)
    tl.store(ids + head * L + t, which.to(tl.int64), t < L)


def nearest(x, centroids):
    """Ids (B, H, L) of the centroids (B, H, C, D) that have the largest inner products with x.

    x (B, H, L, D). Three TF32 products a float32 one: near ties may fall otherwise than in PyTorch.
    """
    return nearest_op(x, centroids)


@torch.library.custom_op("retroinfer::nearest", mutates_args=())
def nearest_op(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    (B, H, L, D), C = x.shape, centroids.shape[2]
    ids = torch.empty(B, H, L, dtype=torch.int64, device=x.device)
    launch(nearest_kernel, (triton.cdiv(L, 64), B * H), x.contiguous(), centroids.contiguous(), ids,
           L, C, D=D, BL=64, BC=64, BD=32, num_warps=4, num_stages=3)
    return ids


@nearest_op.register_fake
def _(x, centroids):
    return x.new_empty(x.shape[:3], dtype=torch.int64)


# Grid (C, B*H). A program owns one sum: it reads 8 bytes of order and D*e of x for each member, and
# writes 4*D. Members are added in order, without atomics: two runs give one sum.
@triton.jit
def segment_sum_kernel(x, order, ends, sums, L, C, D: tl.constexpr, BL: tl.constexpr,
                       BD: tl.constexpr):
    c, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BD)
    first = tl.load(ends + head * C + c - 1, c > 0, 0)
    end = tl.load(ends + head * C + c)
    total = tl.zeros([BL, BD], tl.float32)
    for start in range(first, end, BL):
        at = start + tl.arange(0, BL)
        row = tl.load(order + head * L + at, at < end, 0)
        total += tl.load(x + (head * L + row[:, None]) * D + d,
                         (at[:, None] < end) & (d < D), 0.0).to(tl.float32)
    tl.store(sums + (head * C + c) * D + d, tl.sum(total, 0), d < D)


def segment_sum(x, order, sizes):
    """Sums (B, H, C, D), fp32, of x (B, H, L, D), put in order, over runs of sizes (B, H, C)."""
    return segment_sum_op(x, order, sizes)


@torch.library.custom_op("retroinfer::segment_sum", mutates_args=())
def segment_sum_op(x: torch.Tensor, order: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    (B, H, L, D), C = x.shape, sizes.shape[2]
    sums = torch.empty(B, H, C, D, dtype=torch.float32, device=x.device)
    launch(segment_sum_kernel, (C, B * H), x.contiguous(), order.contiguous(),
           sizes.cumsum(-1, dtype=torch.int64), sums, L, C, D=D, BL=16,
           BD=triton.next_power_of_2(D), num_warps=4)
    return sums


@segment_sum_op.register_fake
def _(x, order, sizes):
    return x.new_empty(*sizes.shape, x.shape[3], dtype=torch.float32)


# ---------------------------------------------------------------- fetching

# Grid (N/BN, B*H). A program owns BN places: it reads 8 bytes of row each, and where that is not
# negative D*e of the source, which may be pinned memory of the host, and writes as much.
@triton.jit
def copy_rows_kernel(out, source, rows, N, T, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    head, d = tl.program_id(1).to(tl.int64), tl.arange(0, BD)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.load(rows + head * N + n, n < N, -1)                                       # (BN,)
    is_in = (row[:, None] >= 0) & (d < D)
    x = tl.load(source + (head * T + row[:, None]) * D + d, is_in, 0.0)                 # (BN, BD)
    tl.store(out + (head * N + n[:, None]) * D + d, x, is_in)


def copy_rows(out, source, rows):
    """out (B, H, N, D), but rows (B, H, N) of source (B, H, T, D) where those are not negative.

    out is written in place. source lies on the same GPU or in pinned memory, which the kernel reads
    over the bus. Both contiguous, as all that is allocated at once.
    """
    copy_rows_op(out, source, rows)
    return out


@torch.library.custom_op("retroinfer::copy_rows", mutates_args={"out"})
def copy_rows_op(out: torch.Tensor, source: torch.Tensor, rows: torch.Tensor) -> None:
    (B, H, N, D), T = out.shape, source.shape[2]
    BD = triton.next_power_of_2(D)
    launch(copy_rows_kernel, (triton.cdiv(N, 16), B * H), out, source, rows.contiguous(), N, T, D=D,
           BN=16, BD=BD, num_warps=4)
