// The twin of retroinfer.attend for CPUs: a decode step over one layer, in which every byte is read
// once. step.py compiles it for three types, NUM of q, o and steady keys and values, KEPT of keys and
// values in the store, ROW of centroids and means, and for DIMS of a head. Loops over the tiles of a
// head:
//
//     rank      q, centroids                   -> possible mass of each live cluster
//     attend    steady rows                    -> a part: largest logit, sum, weighted values
//     select    possible masses                -> keys and means to read, and logits of the means
//     look      retrieved keys | means         -> weights of retrieved tokens | of means
//     part      all weights                    -> values to read; what is left goes to the means
//     read      values | means                 -> the other parts
//     combine   all parts                      -> o (B, H, G, D)
//
//     B batch    H kv heads   G query heads per kv head   T tokens   D head dim   W steady slots
//     C clusters a head   R, K clusters retrieved, ranked at most   N tokens retrieved at most
//
// Threads take whole heads, so that what one loop leaves for the next is in their own cache. Where
// the last ones would leave some threads idle, all share these by tiles. Tiles depend on shapes
// alone: the number of threads changes no bit. Sums are in fp32, or exact.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>
#if defined __AVX2__ || defined __F16C__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 8;        // numbers in a vector
constexpr int D = DIMS;         // of a head
constexpr int TILE = 256;       // clusters or tokens in a turn of a loop; a multiple of LANES
constexpr int GROUP = 4;        // query heads served at a time: their sums fill the registers
constexpr int BLOCK = 16;       // rows that mix adds up before it goes to other columns
constexpr int AHEAD = 32;       // rows from the one that is read to the one that is fetched
constexpr int STRIDE = 8;       // rows from one that is touched to the next
constexpr int LINE = 64;        // bytes that are fetched at a time
constexpr float NONE = -INFINITY;

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef int16_t svec __attribute__((vector_size(4 * LANES)));
typedef uint16_t usvec __attribute__((vector_size(4 * LANES)));
typedef uint8_t bvec __attribute__((vector_size(4 * LANES)));
typedef float quad __attribute__((vector_size(4 * GROUP)));     // of the queries of a group
typedef uint8_t octets __attribute__((vector_size(LANES)));
typedef int8_t signs __attribute__((vector_size(LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

template <class V> V load(const void* from) { V x; std::memcpy(&x, from, sizeof x); return x; }
template <class V> void store(void* to, V x) { std::memcpy(to, &x, sizeof x); }

// ---------------------------------------------------------------- element types

// widen reads 16 numbers as two vectors, in an order of the type's own: number i of a read at
// element e of a row is of column place(e, i). A row has SIZE elements, a read takes STEP.
struct Pair { vec a, b; };

struct float32 {
    static constexpr int SIZE = D, STEP = 16;
    float x;
    static int place(int e, int i) { return e + i; }
};
Pair widen(const float32* x) { return {load<vec>(x), load<vec>(x + LANES)}; }
float32 narrow(float x, float32) { return {x}; }

struct bfloat16 {
    static constexpr int SIZE = D, STEP = 16;
    uint16_t bits;
    static int place(int e, int i) { return e + i % LANES * 2 + i / LANES; }
};
Pair widen(const bfloat16* x) {                 // even columns, odd columns: halves of 32 bits
    ivec both = load<ivec>(x);
    return {(vec)(both << 16), (vec)(both & ~0xffff)};
}
bfloat16 narrow(float x, bfloat16) {            // to nearest, even
    uint32_t bits = load<uint32_t>(&x);
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

#ifdef __F16C__
struct float16 {
    static constexpr int SIZE = D, STEP = 16;
    uint16_t bits;
    static int place(int e, int i) { return e + i; }
};
Pair widen(const float16* x) {
    return {_mm256_cvtph_ps(load<__m128i>(x)), _mm256_cvtph_ps(load<__m128i>(x + LANES))};
}
float16 narrow(float x, float16) { return {_cvtss_sh(x, 0)}; }
#endif

// Whole numbers, in the order of NUM: they meet the same queries, and add to the same parts.
struct int8 {
    static constexpr int SIZE = D, STEP = 16;
    int8_t bits;
    static int place(int e, int i) { return NUM::place(e, i); }
};

// Two numbers of 4 bits, each plus 8: column e in the lower half, e + D/2 in the upper.
struct uint8 {
    static constexpr int SIZE = D / 2, STEP = 8;
    uint8_t bits;
    static int place(int e, int i) { return e + i % LANES + i / LANES * (D / 2); }
};

#ifdef __AVX2__                 // these five GCC 12 does not find by itself
ivec ints(const uint8* x) { return (ivec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((__m128i*)x)); }
ivec ints(const bfloat16* x) { return (ivec)_mm256_cvtepu16_epi32(load<__m128i>(x)); }
ivec ints(const int8* x) { return (ivec)_mm256_cvtepi8_epi32(_mm_loadl_epi64((__m128i*)x)); }
svec product(bvec x, bvec y) { return (svec)_mm256_maddubs_epi16((__m256i)x, (__m256i)y); }
ivec pairs(svec x) { return (ivec)_mm256_madd_epi16((__m256i)x, (__m256i)(svec{} + 1)); }
#else
ivec ints(const uint8* x) { return __builtin_convertvector(load<octets>(x), ivec); }
ivec ints(const bfloat16* x) { return __builtin_convertvector(load<halves>(x), ivec); }
ivec ints(const int8* x) { return __builtin_convertvector(load<signs>(x), ivec); }
svec product(bvec x, bvec y) {  // of bytes and signed bytes, two neighbours added
    return (svec)((usvec)x & 255) * ((svec)y << 8 >> 8) + (svec)((usvec)x >> 8) * ((svec)y >> 8);
}
ivec pairs(svec x) { return ((ivec)x << 16 >> 16) + ((ivec)x >> 16); }
#endif

Pair widen(const uint8* x) {
    ivec both = ints(x);
    return {__builtin_convertvector((both & 15) - 8, vec),
            __builtin_convertvector((both >> 4) - 8, vec)};
}

Pair widen(const int8* x) {
    ivec a = ints(x), b = ints(x + LANES);
    if (std::is_same_v<NUM, bfloat16>) {        // even columns, odd columns
        ivec both = ints((const bfloat16*)x);
        a = both << 24 >> 24, b = both << 16 >> 24;
    }
    return {__builtin_convertvector(a, vec), __builtin_convertvector(b, vec)};
}

// Queries as score takes them, (groups, reads, GROUP). Those for rows of 4 bits are whole numbers,
// of the columns of lower halves and of upper ones: sums are exact, too large by excess, as each
// number of a row is by 8.
struct Split { bvec low, high; };
template <class Part, class Sum> struct Queries {
    std::vector<Part> x;
    std::vector<Sum> excess;                    // (groups,) of two rows
};

// ---------------------------------------------------------------- loops over rows

constexpr int WIDTH = 16;       // elements of a row that score reads at a time
constexpr int BYTES = 32;       // and of a row of 4 bits

// Reads that cover n elements, and where each begins; the last one may overlap the one before.
constexpr int reads(int n, int step) { return (n + step - 1) / step; }
constexpr int start(int i, int n, int step) { return std::max(std::min(i * step, n - step), 0); }

// Sums of the halves of 4 vectors: of the lower ones, in their order, then of the upper ones.
template <class V> V half_sums(V a, V b, V c, V d) {
    auto add = [](V x, V y) {                   // as floats, which a processor shuffles at once
        return (V)__builtin_shuffle((vec)x, (vec)y, ivec{0, 2, 8, 10, 4, 6, 12, 14})
             + (V)__builtin_shuffle((vec)x, (vec)y, ivec{1, 3, 9, 11, 5, 7, 13, 15});
    };
    return add(add(a, b), add(c, d));
}

// The lower half of x added to its upper one; behind it, that of y.
template <class V> V fold(V x, V y) {
    return (V)__builtin_shuffle((vec)x, (vec)y, ivec{0, 1, 2, 3, 12, 13, 14, 15})
         + (V)__builtin_shuffle((vec)x, (vec)y, ivec{4, 5, 6, 7, 8, 9, 10, 11});
}

// Into the second level of the cache: the first one has room for few lines on their way.
template <class T> void fetch(const T* from, int n) {
    for (int i = 0; i < n; i += LINE / sizeof(T)) __builtin_prefetch(from + i, 0, 2);
}

// A fetch waits until its address is translated; where many follow each other, they wait together.
template <class Row> void touch(const Row* const* rows, int n) {
    for (int i = 0; i < n; i += STRIDE) __builtin_prefetch(rows[i]);
}

// Inner products of GROUP queries with a row, then with another.
template <class Row> vec multiply(const Pair* q, const Row* row, const Row* other) {
    vec sum[2 * GROUP] = {};
    for (int j = 0; j < reads(D, WIDTH); j++, q += GROUP) {
        int e = start(j, D, WIDTH);
        Pair x = widen(row + e), y = widen(other + e);
        #pragma GCC unroll 4
        for (int g = 0; g < GROUP; g++) {
            sum[g] += x.a * q[g].a, sum[GROUP + g] += y.a * q[g].a;
            sum[g] += x.b * q[g].b, sum[GROUP + g] += y.b * q[g].b;
        }
    }
    return half_sums(fold(sum[0], sum[4]), fold(sum[1], sum[5]),
                     fold(sum[2], sum[6]), fold(sum[3], sum[7]));
}

ivec multiply(const Split* q, const uint8* row, const uint8* other) {
    constexpr int COUNT = reads(D / 2, BYTES);
    ivec sum[GROUP] = {};
    for (int j = 0; j < COUNT;) {
        svec some[2 * GROUP] = {};              // two reads are what they have room for
        for (int end = std::min(j + 2, COUNT); j < end; j++, q += GROUP)
            #pragma GCC unroll 2
            for (int r = 0; r < 2; r++) {
                bvec both = {};
                const uint8* from = (r ? other : row) + start(j, D / 2, BYTES);
                std::memcpy(&both, from, std::min(D / 2, BYTES));
                bvec low = both & 15, high = (bvec)((usvec)both >> 4) & 15;
                #pragma GCC unroll 4
                for (int g = 0; g < GROUP; g++)
                    some[r * GROUP + g] += product(low, q[g].low) + product(high, q[g].high);
            }
        #pragma GCC unroll 4
        for (int g = 0; g < GROUP; g++) sum[g] += pairs(fold(some[g], some[GROUP + g]));
    }
    return half_sums(sum[0], sum[1], sum[2], sum[3]);
}

// Inner products x (groups, TILE, GROUP) of q and n rows, whose bytes are read once. Of `known`
// rows from the first on it is known where they are.
template <class Row, class Part, class Sum>
void score(const Queries<Part, Sum>& q, const Row* const* rows, int n, int known, float* x) {
    int count = q.x.size() / q.excess.size();
    for (int i = 0; i < n; i += 2) {
        for (int r : {i + AHEAD, i + AHEAD + 1}) fetch(rows[std::min(r, known - 1)], Row::SIZE);
        for (size_t p = 0; p < q.excess.size(); p++) {
            Sum sum = multiply(&q.x[p * count], rows[i], rows[std::min(i + 1, n - 1)]);
            store(x + (p * TILE + i) * GROUP, __builtin_convertvector(sum - q.excess[p], vec));
        }
    }
}

// Puts in o (groups, reads, GROUP), in the order of widen, the sums of n rows weighted by x
// (groups, TILE, GROUP). Reads each row's bytes once: a few columns of BLOCK rows, while those of
// rows ahead are fetched.
template <class Row>
void mix(const float* x, int groups, const Row* const* rows, int n, Pair* o) {
    constexpr int SIZE = Row::SIZE, COUNT = reads(SIZE, Row::STEP);
    std::fill(o, o + groups * COUNT * GROUP, Pair{});
    for (int i = 0; i < std::min(AHEAD, n); i++) fetch(rows[i], SIZE);
    for (int first = 0; first < n; first += BLOCK)
        for (int p = 0; p < groups; p++)
            for (int j = 0; j < COUNT; j++) {
                int e = start(j, SIZE, Row::STEP), end = std::min(first + BLOCK, n);
                for (int i = first + AHEAD + j; p == 0 && i < std::min(end + AHEAD, n); i += COUNT)
                    fetch(rows[i], SIZE);
                Pair sum[GROUP], *to = &o[(p * COUNT + j) * GROUP];
                #pragma GCC unroll 4
                for (int g = 0; g < GROUP; g++) sum[g] = to[g];
                for (int i = first; i < end; i++) {
                    Pair v = widen(rows[i] + e);
                    #pragma GCC unroll 4
                    for (int g = 0; g < GROUP; g++) {
                        float weight = x[(p * TILE + i) * GROUP + g];
                        sum[g].a += weight * v.a, sum[g].b += weight * v.b;
                    }
                }
                #pragma GCC unroll 4
                for (int g = 0; g < GROUP; g++) to[g] = sum[g];
            }
}

// ---------------------------------------------------------------- softmax

// e^x for x <= 0, to a relative error of 2e-7; 0 below -87. x = n ln 2 + r, and e^r by its series.
vec exponential(vec x) {
    const float MAGIC = 3 << 22;                // added, it rounds to an integer in the low bits
    vec t = x * 1.44269504f + MAGIC, n = t - MAGIC;
    vec r = x - n * 0.693359375f - n * -2.12194440e-4f, y = r * (1.f / 5040) + 1.f / 720;
    y = (((y * r + 1.f / 120) * r + 1.f / 24) * r + 1.f / 6) * r + 1.f / 2;
    y = (y * r + 1) * r + 1;
    return x < -87.f ? vec{} : (vec)((ivec)y + ((ivec)t << 23));
}

// log x for x >= 1, to a relative error of 2e-7; 0 of smaller ones. x = 2^n m, m about 1, and log m
// by its series in (m - 1) / (m + 1).
vec logarithm(vec x) {
    x = x > 1 ? x : vec{} + 1;
    ivec n = ((ivec)x - 0x3f3504f3) >> 23;      // the bits of sqrt(1/2)
    vec m = (vec)((ivec)x - (n << 23)), t = (m - 1) / (m + 1), u = t * t;
    vec y = (((u * (1.f / 9) + 1.f / 7) * u + 1.f / 5) * u + 1.f / 3) * u + 1;
    return __builtin_convertvector(n, vec) * 0.693147181f + 2 * t * y;
}

// Two rows of a group's numbers: the same of a group, or the same in a row.
vec twice(quad x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3, 0, 1, 2, 3); }
vec each(const float* x) { return __builtin_shuffle(load<vec>(x), ivec{0, 0, 0, 0, 1, 1, 1, 1}); }
quad low(vec x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3); }
quad high(vec x) { return __builtin_shufflevector(x, x, 4, 5, 6, 7); }
quad larger(quad x, quad y) { return x > y ? x : y; }

// Puts e^(x - m) in place of logits (n, GROUP), weighed(row, of two); their sums.
template <class Weigh> quad exponentials(float* x, int n, quad m, Weigh weighed) {
    vec sum = {}, shift = twice(m == NONE ? quad{} : m);
    for (int i = 0; i < n; i += 2) {
        vec y = weighed(i, exponential(load<vec>(x + i * GROUP) - shift));
        store(x + i * GROUP, y);
        sum += y;
    }
    return low(sum) + high(sum);
}

vec as_is(int, vec x) { return x; }

// The same with m, the largest of each query, which it puts in m, and the sums in s; puts -inf
// behind an odd row.
template <class Weigh> void soften(float* x, int n, quad& m, quad& s, Weigh weighed) {
    if (n % 2) store(x + n * GROUP, quad{} + NONE);
    vec most = vec{} + NONE;
    for (int i = 0; i < n; i += 2) {
        vec y = load<vec>(x + i * GROUP);
        most = y > most ? y : most;
    }
    m = larger(low(most), high(most)), s = exponentials(x, n, m, weighed);
}

// e^(m - top), where m = -inf stands for nothing.
quad fade(quad m, quad top) {
    return low(exponential(twice(m == NONE ? quad{} + NONE : m - top)));
}

// ---------------------------------------------------------------- the best of many

// A share of attention, as the bits of a float, before its place: of equal ones the first is best.
uint64_t key(uint32_t share, int place) { return uint64_t(share) << 32 | ~uint32_t(place); }
int place(uint64_t key) { return ~uint32_t(key); }

// Counts shares by their first 11 bits.
struct Bins {
    std::vector<int> count = std::vector<int>(2 * 2048);    // two, as neighbours are alike
    uint32_t most = 0;                                      // the largest
    void add(int place, uint32_t share) {
        count[share >> 20 << 1 | place % 2]++;
        most = std::max(most, share);
    }
    int top() const { return most >> 20; }
    int in(int bin) const { return count[2 * bin] + count[2 * bin + 1]; }
};

// Of the first n keys those of a bin.
std::vector<uint64_t> in_bin(int bin, const std::vector<uint64_t>& keys, int n) {
    std::vector<uint64_t> some;
    std::copy_if(keys.begin(), keys.begin() + n, std::back_inserter(some),
                 [&](uint64_t key) { return int(key >> 52) == bin; });
    return some;
}

// The nth best, from 1 on, is the nth of a bin.
struct Nth {
    int bin, n;
    Nth(const Bins& bins, int nth) : bin(bins.top()), n(nth) {
        for (int more; n > (more = bins.in(bin)); bin--) n -= more;
    }
    uint64_t of(const std::vector<uint64_t>& keys, int count) const {
        auto tied = in_bin(bin, keys, count);
        std::nth_element(tied.begin(), tied.begin() + n - 1, tied.end(), std::greater());
        return tied[n - 1];
    }
};

// ---------------------------------------------------------------- a step

typedef NUM Num;
typedef KEPT Kept;
typedef ROW Row;
constexpr bool IS_BYTES = std::is_same_v<Kept, int8>;
constexpr bool IS_PACKED = std::is_same_v<Row, uint8>;

// values: how many of 1,000 retrieved tokens have their values read.
struct Shape { int64_t B, H, G, W, T, C, N, R, K, values, by_mass, bias_b, bias_h, bias_w; };

struct Tensors {
    const Num *q, *k_steady, *v_steady;
    const float* bias;
    const Row *centroids, *means;
    const float* sizes;
    const int64_t* offsets;
    const bfloat16 *spreads, *scales;
    const float* centre;
    const Kept *k_store, *v_store;
    const bfloat16* store_scales;           // of bytes alone: (T, 2) of a row's key, of its value
    const float* store_centre;              // of bytes alone: (D,) to be added to each key
    const int64_t *n_retrieve, *n_ranked;
    Num* o;
};

int tiles(int64_t n) { return (n + TILE - 1) / TILE; }
float wide(bfloat16 x) { uint32_t bits = x.bits << 16; return load<float>(&bits); }

// One head of one sequence, and what the loops hand on. It is kept for the next step: fresh memory
// costs more than what is done in it. Queries go in groups, the last one filled up by zeros.
struct Head {
    Shape n;
    Tensors given;
    int64_t at, b;                          // its number; its sequence
    int Q, S;                               // Q: groups; S: steady tiles, the first parts
    Queries<Pair, vec> q;                   // scaled
    Queries<Split, ivec> q_packed;          // over unit
    std::vector<quad> unit, half, real;     // (Q,) half: |q|^2 / 2; real: 1, of no query 0
    std::vector<quad> shift, store_shift;   // (Q,) logits of the centres
    std::vector<float> logit, possible;     // (tiles, Q, TILE, GROUP) possible: of mass, over e^m
    std::vector<quad> m, s;                 // (tiles, Q); its sums, likewise
    std::vector<float> size, scale;         // (tiles, TILE) of clusters: tokens, scale of the mean
    std::vector<int> live;                  // (tiles,) how many have some
    std::vector<uint32_t> share;            // (tiles, TILE) of attention, as bits + 1; 0 of none
    std::vector<uint64_t> keys;             // the first n_keys: of clusters, share, then place
    uint64_t last, least;                   // of the keys of those retrieved; of those ranked
    int n_keys;
    std::vector<const Num *> k, v;          // steady rows
    std::vector<const Kept *> k_far, v_far; // retrieved keys; of them the values that are read
    std::vector<int> owner;                 // of a retrieved token: its cluster's place in mean
    std::vector<float> weight, heavy, left; // (tiles, Q, TILE, GROUP) of retrieved tokens; of those
                                            // whose values are read, times the values' scale; of
                                            // means, for the other tokens
    std::vector<quad> key_m, key_s, top;    // (tiles, Q) of retrieved tokens; (Q,) the largest m
    std::vector<const Row*> mean;           // means to read
    std::vector<float> bias, guess, worth;  // of steady tokens; (tiles, Q, TILE, GROUP) of means:
    std::vector<float> stretch;             // logits, tokens at them; (tiles, TILE) their scales
    std::vector<quad> part_m, part_s;       // (parts, Q) of tokens, then of means
    std::vector<Pair> part_o;               // (parts, Q, reads, GROUP)

    int few(int64_t count) const { return (count * n.values + 999) / 1000; }
    int of_tokens() const { return tiles(n.W) + tiles(few(n.N)); }
    int parts() const { return of_tokens() + tiles(n.K); }
    Pair* o(int part) {
        int count = std::max(reads(D, WIDTH), reads(Row::SIZE, Row::STEP));
        return part_o.data() + part * Q * count * GROUP;
    }

    void begin(const Shape& shape, const Tensors& tensors, int64_t number) {
        n = shape, given = tensors, at = number, b = at / n.H;
        Q = (n.G + GROUP - 1) / GROUP;
        int C = tiles(n.C), K = tiles(n.K);
        m.resize(C * Q), s.resize(C * Q), live.resize(C);
        logit.resize(C * Q * TILE * GROUP), possible.resize(logit.size());
        size.resize(C * TILE + LANES), scale.resize(C * TILE);
        share.resize(C * TILE), keys.resize(C * TILE);
        part_m.assign(parts() * Q, quad{} + NONE), part_s.assign(parts() * Q, quad{});
        part_o.resize(o(parts()) - o(0)), stretch.resize(K * TILE + LANES);
        guess.resize(K * Q * TILE * GROUP), worth.resize(guess.size());
        left.assign(guess.size(), 0), top.assign(Q, quad{} + NONE);
        weight.resize(tiles(n.N) * Q * TILE * GROUP);
        heavy.resize(tiles(few(n.N)) * Q * TILE * GROUP);
        key_m.assign(tiles(n.N) * Q, quad{} + NONE), key_s.assign(key_m.size(), quad{});
        k.clear(), v.clear(), mean.clear(), bias.clear();
        for (int w = 0; w < n.W; w++) {
            float x = given.bias[b * n.bias_b + at % n.H * n.bias_h + w * n.bias_w];
            if (x == NONE) continue;
            k.push_back(given.k_steady + (at * n.W + w) * D);
            v.push_back(given.v_steady + (at * n.W + w) * D);
            bias.push_back(x);
        }
        S = tiles(k.size());
        prepare();
    }

    // q as score takes it: scaled, in the order of its reads, and 0 where a read repeats a column.
    void prepare() {
        int count = reads(D, WIDTH), packed = reads(D / 2, BYTES);
        q.x.assign(Q * count * GROUP, Pair{}), q.excess.assign(Q, vec{});
        q_packed.x.assign(Q * packed * GROUP, Split{}), q_packed.excess.assign(Q, ivec{});
        unit.assign(Q, quad{} + 1), half.assign(Q, quad{}), real.assign(Q, quad{});
        shift.assign(Q, quad{}), store_shift.assign(Q, quad{});
        std::vector<float> x(D);
        float factor = std::pow(D, -0.5);
        for (int g = 0; g < n.G; g++) {
            int p = g / GROUP, lane = g % GROUP;
            float most = 0;
            for (int j = 0; j < count; j++) {
                int e = start(j, D, WIDTH);
                Pair read = widen(given.q + (at * n.G + g) * D + e);
                for (int i = 0; i < 16; i++) x[Num::place(e, i)] = ((float*)&read)[i];
            }
            for (float& value : x) value *= factor, half[p][lane] += value * value / 2;
            for (int d = 0; d < D; d++) {
                shift[p][lane] += x[d] * given.centre[at * D + d];
                if (IS_BYTES) store_shift[p][lane] += x[d] * given.store_centre[at * D + d];
            }
            for (float value : x) most = std::max(most, std::abs(value));
            float fine = 127 / std::max(most, 1e-30f);                  // as retroinfer.in_bytes
            real[p][lane] = 1;
            if (IS_PACKED) unit[p][lane] = 1 / fine;
            for (int j = 0; j < count; j++)
                for (int i = 0, e = start(j, D, WIDTH); i < 16; i++) {
                    int d = Num::place(e, i);
                    ((float*)&q.x[(p * count + j) * GROUP + lane])[i] = d < j * WIDTH ? 0 : x[d];
                }
            for (int j = 0; j < packed; j++)
                for (int i = 0; i < 2 * BYTES; i++) {
                    int e = start(j, D / 2, BYTES) + i % BYTES;
                    if (e < j * BYTES || e >= D / 2) continue;
                    float value = x[e + i / BYTES * (D / 2)] * fine;
                    int whole = value == value ? std::nearbyint(value) : 0;     // no int is NaN
                    Split& to = q_packed.x[(p * packed + j) * GROUP + lane];
                    (i < BYTES ? to.low : to.high)[i % BYTES] = whole;
                    for (int l : {lane, GROUP + lane}) q_packed.excess[p][l] += 8 * whole;
                }
        }
    }

    // Reads 4 bytes a slot; of a tile with clusters 6 more and the centroid; writes 8*G + 8.
    void rank(int tile) {
        const Row* rows[TILE + AHEAD];
        bfloat16 both[2 * TILE], spreads[TILE];
        int64_t first = at * n.C + tile * TILE;
        float scales[TILE + LANES], deviation[TILE + LANES], most[TILE + LANES];
        float logs[TILE + LANES] = {};
        int count = std::min<int>(TILE, n.C - tile * TILE), some = 0;
        float *sizes = &size[tile * TILE], *of_means = &scale[tile * TILE];
        std::fill(std::copy_n(given.sizes + first, count, sizes), sizes + TILE, 0.f);
        for (int i = 0; i < TILE; i++) some += sizes[i] > 0;
        live[tile] = some;
        if (!some) {
            for (int p = 0; p < Q; p++) m[tile * Q + p] = quad{} + NONE, s[tile * Q + p] = quad{};
            return;
        }
        auto copy = [&](auto* from, auto* to, int numbers) {        // of a cluster
            std::copy_n(from + first * numbers, count * numbers, to);
            fetch(from + (first + TILE) * numbers, TILE * numbers);         // for the next tile
        };
        copy(given.scales, both, 2), copy(given.spreads, spreads, 1);
        fetch(given.sizes + first + TILE, TILE);
        for (int i = 0; i < TILE; i += LANES) { // what is in no cluster may be anything
            vec tokens = load<vec>(sizes + i);
            ivec two = load<ivec>(both + 2 * i), mask = tokens > 0;
            store(scales + i, two << 16 & mask), store(of_means + i, two & ~0xffff);
            store(deviation + i, ints(spreads + i) << 16 & mask);
            if (n.by_mass) store(logs + i, logarithm(tokens));
        }
        for (int i = 0; i < TILE; i++)
            deviation[i] = std::sqrt(deviation[i]), most[i] = std::sqrt(2 * logs[i]);
        for (int i = 0; i < TILE + AHEAD; i++) rows[i] = given.centroids + (first + i) * Row::SIZE;
        float* x = &logit[tile * Q * TILE * GROUP];
        if constexpr (IS_PACKED) score(q_packed, rows, count, TILE + AHEAD, x);
        else score(q, rows, count, TILE + AHEAD, x);
        for (int p = 0; p < Q; p++) {
            float *logits = x + p * TILE * GROUP, *masses = &possible[(tile * Q + p) * TILE * GROUP];
            vec best = vec{} + NONE, units = twice(unit[p]), length = twice(2 * half[p]);
            for (float& value : (float(&)[LANES])length) value = std::sqrt(value);
            for (int i = 0; i < count; i += 2) {
                vec y = load<vec>(logits + i * GROUP) * units * each(scales + i) + twice(shift[p]);
                vec far = length * each(deviation + i), top = each(most + i);
                top = top < far ? top : far;                        // as retroinfer.log_possible_mass
                store(logits + i * GROUP, y);
                y += each(logs + i) + top * (far - top * .5f);
                y = each(sizes + i) > 0 ? y : vec{} + NONE;
                store(masses + i * GROUP, y);
                best = y > best ? y : best;
            }
            m[tile * Q + p] = larger(low(best), high(best));
            s[tile * Q + p] = exponentials(masses, count, m[tile * Q + p], as_is);
        }
    }

    // The share of the attention of each cluster: of what the steady zone shares too, or as in the
    // paper of what clusters have among themselves.
    void weigh() {
        std::vector<quad> sum(Q), over(Q);      // over: 1 / all that share attention, over e^top
        std::vector<quad> top(Q, quad{} + NONE);                // the largest m
        for (int t = 0; t < tiles(n.C); t++)
            for (int p = 0; p < Q; p++) top[p] = larger(top[p], m[t * Q + p]);
        for (int t = 0; t < tiles(n.C); t++)
            for (int p = 0; p < Q; p++) {
                m[t * Q + p] = fade(m[t * Q + p], top[p]);
                sum[p] += s[t * Q + p] * m[t * Q + p];
            }
        for (int p = 0; p < Q; p++) {
            int steady = n.by_mass ? S : 0;
            quad most = top[p], near = {};
            for (int i = 0; i < steady; i++) most = larger(most, part_m[i * Q + p]);
            for (int i = 0; i < steady; i++)
                near += part_s[i * Q + p] * fade(part_m[i * Q + p], most);
            quad far = fade(top[p], most), all = near + sum[p] * far;
            over[p] = all > 0 ? real[p] * far / all : quad{};
        }
        for (int t = 0; t < tiles(n.C); t++) {
            for (int p = 0; p < Q; p++) m[t * Q + p] *= over[p];
            for (int i = t * TILE; i < (t + 1) * TILE; i += LANES) {
                vec sum = live[t] ? shares(possible, m, i) : vec{};
                store(&share[i], load<vec>(&size[i]) > 0 ? (ivec)sum + 1 : ivec{});
            }
        }
    }

    // Of the LANES rows from i on, x (tiles, Q, TILE, GROUP) summed over queries, each times its
    // tile's over (tiles, Q); 0 of what is not a number, as of queries that are none.
    vec shares(const std::vector<float>& x, const std::vector<quad>& over, int i) const {
        vec rows[4] = {};                                           // two each
        for (int p = i / TILE * Q, end = p + Q; p < end; p++) {
            vec scale = twice(over[p]);
            const float* from = &x[(p * TILE + i % TILE) * GROUP];
            for (int r = 0; r < 4; r++) rows[r] += load<vec>(from + r * LANES) * scale;
        }
        vec sum = __builtin_shuffle(half_sums(rows[0], rows[1], rows[2], rows[3]),
                                    ivec{0, 4, 1, 5, 2, 6, 3, 7});
        return sum > 0 ? sum : vec{};
    }

    // The keys, in no order, of the n_ranked best clusters at least. The best n_retrieve have keys
    // from `last` on, the n_ranked best from `least` on.
    void choose(int n_ranked, int n_retrieve) {
        Bins bins;
        for (size_t i = 0; i < share.size(); i++) bins.add(i, share[i]);
        Nth far(bins, n_ranked), near(bins, n_retrieve);
        n_keys = 0;
        for (size_t i = 0; i < share.size(); i++) {
            keys[n_keys] = key(share[i], i);
            n_keys += share[i] >= std::max<uint32_t>(far.bin << 20, 1);
        }
        last = n_retrieve ? near.of(keys, n_keys) : UINT64_MAX;
        least = n_ranked ? far.of(keys, n_keys) : UINT64_MAX;
    }

    // Reads what rank left, and 8 bytes a cluster retrieved; writes 12 a token, 4*G + 8 a mean.
    void select() {
        weigh();
        int clusters = 0;
        for (int x : live) clusters += x;
        int n_ranked = std::min<int64_t>({given.n_ranked[at], n.K, clusters});
        choose(n_ranked, std::min<int64_t>({given.n_retrieve[at], n.R, n_ranked}));
        int64_t to = 0;
        k_far.resize(n.N), owner.resize(n.N);
        const int64_t* offsets = given.offsets + at * n.C;
        for (int r = 0; r < n_keys; r++) {
            uint64_t key = keys[r], next = keys[std::min(r + STRIDE, n_keys - 1)];
            if (next >= last) __builtin_prefetch(offsets + place(next));
            if (key < least) continue;
            int64_t left_over = n.N - to;                   // of a sound index it is enough
            int c = place(key), tokens = key >= last ? std::min<int64_t>(size[c], left_over) : 0;
            int64_t first = tokens ? (at * n.T + offsets[c]) * D : 0;
            for (int i = 0; i < tokens; i++, to++)
                k_far[to] = given.k_store + first + i * D, owner[to] = mean.size();
            if (!tokens || n.values < 1000) estimate(c, tokens);
        }
        k_far.resize(to);
    }

    void estimate(int place, bool is_retrieved) {
        int64_t c = at * n.C + place;
        int t = place / TILE, i = place % TILE, j = mean.size();
        mean.push_back(given.means + c * Row::SIZE), stretch[j] = scale[place];
        for (int p = 0; p < Q; p++) {
            int to = ((j / TILE * Q + p) * TILE + j % TILE) * GROUP;
            quad x = load<quad>(&logit[((t * Q + p) * TILE + i) * GROUP]);
            store(&guess[to], is_retrieved ? quad{} + NONE : x);
            store(&worth[to], size[place] * (1 + half[p] * wide(given.spreads[c])));
        }
    }

    // Reads 2*D*e bytes a token and writes 4*G*(D + 2).
    void attend(int part) {
        int first = part * TILE, count = std::min<int>(TILE, bias.size() - first);
        if (count <= 0) return;
        std::vector<float> x(Q * TILE * GROUP);
        touch(&k[first], count), touch(&v[first], count);
        score(q, &k[first], count, bias.size() - first, x.data());
        for (int p = 0; p < Q; p++) {
            float* logits = &x[p * TILE * GROUP];
            for (int i = 0; i < count; i++)
                store(logits + i * GROUP, load<quad>(logits + i * GROUP) + bias[first + i]);
            soften(logits, count, part_m[part * Q + p], part_s[part * Q + p], as_is);
        }
        mix(x.data(), Q, &v[first], count, o(part));
    }

    int retrieved() const { return k_far.size(); }

    // What one of a key's or a value's whole numbers is worth.
    float scale_of(const Kept* key, bool is_value) const {
        return wide(given.store_scales[(key - given.k_store) / D * 2 + is_value]);
    }

    // Reads D*e bytes a token, and its scale, or 8*G a mean; writes 4*G.
    void look(int tile) {
        if (tile >= tiles(n.N)) return look_at_means(tile - tiles(n.N));
        int first = tile * TILE, count = std::min(TILE, retrieved() - first);
        if (count <= 0) return;
        float* x = &weight[first * Q * GROUP];
        touch(&k_far[first], count);
        score(q, &k_far[first], count, retrieved() - first, x);
        if (IS_BYTES) unpack(x, first, count);
        for (int p = 0, i = tile * Q; p < Q; p++, i++)
            soften(x + p * TILE * GROUP, count, key_m[i], key_s[i], as_is);
    }

    // Logits, from the products of queries with whole numbers.
    void unpack(float* x, int first, int count) {
        float scales[TILE + LANES] = {};
        for (int i = 0; i < count; i++) scales[i] = scale_of(k_far[first + i], false);
        for (int p = 0; p < Q; p++)
            for (int i = 0; i < count; i += 2) {
                float* two = x + (p * TILE + i) * GROUP;
                store(two, load<vec>(two) * each(scales + i) + twice(store_shift[p]));
            }
    }

    void look_at_means(int tile) {
        int first = tile * TILE, part = of_tokens() + tile;
        int count = std::min<int>(TILE, mean.size() - first);
        if (count <= 0) return;
        for (int p = 0, i = part * Q; p < Q; p++, i++) {
            int from = (first * Q + p * TILE) * GROUP;
            soften(&guess[from], count, part_m[i], part_s[i], [&](int row, vec x) {
                return x * load<vec>(&worth[from + row * GROUP]);
            });
        }
    }

    // Of retrieved tokens those whose values are read: the n_values that weigh most, summed over
    // the queries. What the others weigh goes to the means of their clusters.
    void part() {
        int count = retrieved();
        int some = few(count);
        std::vector<quad> total(Q), factor(tiles(n.N) * Q), over(factor.size());
        for (int p = 0; p < Q; p++) {
            for (int i = p; i < (int)part_m.size(); i += Q) top[p] = larger(top[p], part_m[i]);
            for (int i = p; i < (int)key_m.size(); i += Q) top[p] = larger(top[p], key_m[i]);
            for (int i = p; i < (int)part_m.size(); i += Q)
                total[p] += fade(part_m[i], top[p]) * part_s[i];
            for (int i = p; i < (int)key_m.size(); i += Q)
                total[p] += (factor[i] = fade(key_m[i], top[p])) * key_s[i];
            for (int i = p; i < (int)key_m.size(); i += Q) over[i] = factor[i] * real[p] / total[p];
        }
        std::vector<uint64_t> keys(count);
        uint64_t lowest = some ? 0 : UINT64_MAX;
        if (some && some < count) {
            Bins bins;
            vec sums;
            for (int i = 0; i < count; i++) {
                if (i % LANES == 0) sums = shares(weight, over, i);
                uint32_t share = ((ivec)sums)[i % LANES];
                keys[i] = key(share, i), bins.add(i, share);
            }
            lowest = Nth(bins, some).of(keys, count);
        }
        v_far.clear();
        for (int i = 0; i < count; i++) {
            int j = v_far.size(), to = owner[i];
            bool is_read = keys[i] >= lowest;
            if (is_read) v_far.push_back(given.v_store + (k_far[i] - given.k_store));
            float scale = IS_BYTES && is_read ? scale_of(k_far[i], true) : 1;
            for (int p = 0; p < Q; p++) {
                int at = i / TILE * Q + p;
                quad x = load<quad>(&weight[(at * TILE + i % TILE) * GROUP]) * factor[at];
                if (is_read) {
                    int tile = j / TILE * Q + p, part = tiles(n.W) * Q + tile;
                    part_m[part] = top[p], part_s[part] += x;
                    store(&heavy[(tile * TILE + j % TILE) * GROUP], x * scale);
                } else {
                    float* rest = &left[((to / TILE * Q + p) * TILE + to % TILE) * GROUP];
                    store(rest, load<quad>(rest) + x);
                }
            }
        }
    }

    // Reads D*e bytes a token, or a mean and 12*G + 4, and writes 4*G*(D + 2).
    void read(int part) {
        if (part >= of_tokens()) return read_means(part, (part - of_tokens()) * TILE);
        int first = (part - tiles(n.W)) * TILE;
        int count = std::min<int>(TILE, v_far.size() - first);
        if (count <= 0) return;
        touch(&v_far[first], count);
        mix(&heavy[first * Q * GROUP], Q, &v_far[first], count, o(part));
    }

    void read_means(int part, int first) {
        int count = std::min<int>(TILE, mean.size() - first);
        if (count <= 0) return;
        float *x = &guess[first * Q * GROUP], *rest = &left[first * Q * GROUP];
        for (int p = 0; p < Q; p++) {
            quad& most = part_m[part * Q + p], more = {};
            quad less = fade(most, top[p]);
            vec factor = twice(less), sum = {};
            for (int i = p * TILE; i < p * TILE + count; i += 2) {
                vec y = load<vec>(rest + i * GROUP);
                sum += y;
                y += factor * load<vec>(x + i * GROUP);
                store(x + i * GROUP, y * each(&stretch[first + i - p * TILE]));
            }
            more = low(sum) + high(sum);
            part_s[part * Q + p] = part_s[part * Q + p] * less + more, most = top[p];
        }
        touch(&mean[first], count);
        mix(x, Q, &mean[first], count, o(part));
    }

    // Reads 4*G*(D + 2) bytes a part and writes D*e*G.
    void combine() {
        for (int p = 0; p < Q; p++) {
            quad most = quad{} + NONE, total = {};
            for (int i = 0; i < parts(); i++) most = larger(most, part_m[i * Q + p]);
            for (int i = 0; i < parts(); i++)
                total += fade(part_m[i * Q + p], most) * part_s[i * Q + p];
            for (int g = p * GROUP; g < std::min<int>((p + 1) * GROUP, n.G); g++) {
                std::vector<float> exact = add_parts<Num>(0, of_tokens(), g, most);
                std::vector<float> estimated = add_parts<Row>(of_tokens(), parts(), g, most);
                Num* o = given.o + (at * n.G + g) * D;
                for (int d = 0; d < D; d++)
                    o[d] = narrow((exact[d] + estimated[d]) / total[g % GROUP], Num());
            }
        }
    }

    template <class Kind> std::vector<float> add_parts(int first, int end, int g, quad most) {
        int size = Kind::SIZE, count = reads(size, Kind::STEP), p = g / GROUP, lane = g % GROUP;
        std::vector<Pair> sum(count);
        for (int i = first; i < end; i++)
            if (float scale = fade(part_m[i * Q + p], most)[lane]; scale > 0)
                for (int j = 0; j < count; j++) {
                    Pair x = o(i)[(p * count + j) * GROUP + lane];
                    sum[j].a += scale * x.a, sum[j].b += scale * x.b;
                }
        std::vector<float> found(D);
        for (int j = 0; j < count; j++)
            for (int i = 0; i < 16; i++)
                found[Kind::place(start(j, size, Kind::STEP), i)] = ((float*)&sum[j])[i];
        return found;
    }

    void run(const Shape& shape, const Tensors& tensors, int64_t number) {
        begin(shape, tensors, number);
        for (int i = 0; i < tiles(n.W); i++) attend(i);
        for (int i = 0; i < tiles(n.C); i++) rank(i);
        select();
        for (int i = 0; i < tiles(n.N) + tiles(n.K); i++) look(i);
        part();
        for (int i = tiles(n.W); i < parts(); i++) read(i);
        combine();
    }
};

// Heads from `first` on, by all threads of a parallel region.
void together(Head* heads, int count, const Shape& n, const Tensors& given, int first) {
    #pragma omp for
    for (int i = 0; i < count; i++) heads[i].begin(n, given, first + i);
    int C = tiles(n.C), W = tiles(n.W), L = tiles(n.N) + tiles(n.K), parts = heads->parts();
    #pragma omp for schedule(dynamic)
    for (int i = 0; i < count * (C + W); i++)
        if (i % (C + W) < C) heads[i / (C + W)].rank(i % (C + W));
        else heads[i / (C + W)].attend(i % (C + W) - C);
    #pragma omp for schedule(dynamic)
    for (int i = 0; i < count; i++) heads[i].select();
    #pragma omp for schedule(dynamic)
    for (int i = 0; i < count * L; i++) heads[i / L].look(i % L);
    #pragma omp for schedule(dynamic)
    for (int i = 0; i < count; i++) heads[i].part();
    #pragma omp for schedule(dynamic)
    for (int i = 0; i < count * (parts - W); i++)
        heads[i / (parts - W)].read(W + i % (parts - W));
    #pragma omp for schedule(dynamic)
    for (int i = 0; i < count; i++) heads[i].combine();
}

}

extern "C" void attend(const Tensors* given, const Shape* n, int threads) {
    int count = n->B * n->H, whole = count / threads * threads;
    if (5 * (whole + threads - count) <= whole + threads) whole = count;    // few would be idle
    static thread_local std::vector<Head> kept;
    std::vector<Head>& rest = kept;             // the caller's, for all threads
    if ((int)rest.size() < count - whole) rest.resize(count - whole);
    #pragma omp parallel num_threads(threads)
    {
        #pragma omp for schedule(dynamic)
        for (int i = 0; i < whole; i++) {
            static thread_local Head own;       // what it keeps is in this thread's cache
            own.run(*n, *given, i);
        }
        if (whole < count) together(rest.data(), count - whole, *n, *given, whole);
    }
}
