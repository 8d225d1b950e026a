// The twin of retroinfer.attend for CPUs: a decode step over one layer, in which every byte is read
// once. native.py compiles it for a pair of types: NUM, of keys and values, and ROW, of centroids
// and means. Four loops, whose turns the threads share, with a barrier behind each:
//
//     rank      q, centroids | steady rows     -> mass of each live cluster | a part of the softmax
//     select    masses                         -> rows and means to read, and weights of the means
//     attend    retrieved rows | means         -> a part: largest logit, sum, weighted values
//     combine   all parts                      -> o (B, H, G, D)
//
//     B batch    H kv heads   G query heads per kv head   T tokens   D head dim   W steady slots
//     C clusters a head   R, K clusters retrieved, ranked at most   N tokens retrieved at most
//
// Tiles depend on shapes alone: the number of threads changes no bit. Sums are in fp32, or exact.
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
constexpr int TILE = 256;       // clusters or tokens in a turn of a loop; a multiple of 2 LANES
constexpr int GROUP = 4;        // query heads that mix serves at a time: their sums fill registers
constexpr int AHEAD = 16;       // rows from the one that is read to the one that is fetched
constexpr float NONE = -INFINITY;

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef int16_t svec __attribute__((vector_size(4 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(2 * LANES)));
typedef uint8_t few __attribute__((vector_size(LANES)));

template <class V> V load(const void* from) { V x; std::memcpy(&x, from, sizeof x); return x; }
template <class V> void store(void* to, V x) { std::memcpy(to, &x, sizeof x); }

// ---------------------------------------------------------------- element types

// widen reads 16 numbers as two vectors, in an order of the type's own: number i of a read at
// element e of a row is of column place(e, i, D). A row has size(D) elements, a read takes STEP.
struct Pair { vec a, b; };

struct float32 {
    static constexpr int STEP = 16;
    float x;
    static int size(int D) { return D; }
    static int place(int e, int i, int) { return e + i; }
};
Pair widen(const float32* x) { return {load<vec>(x), load<vec>(x + LANES)}; }
float32 narrow(float x, float32) { return {x}; }

struct bfloat16 {
    static constexpr int STEP = 16;
    uint16_t bits;
    static int size(int D) { return D; }
    static int place(int e, int i, int) { return e + i % LANES * 2 + i / LANES; }
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
    static constexpr int STEP = 16;
    uint16_t bits;
    static int size(int D) { return D; }
    static int place(int e, int i, int) { return e + i; }
};
Pair widen(const float16* x) {
    return {_mm256_cvtph_ps(load<__m128i>(x)), _mm256_cvtph_ps(load<__m128i>(x + LANES))};
}
float16 narrow(float x, float16) { return {_cvtss_sh(x, 0)}; }
#endif

// Two numbers of 4 bits, each plus 8: column e in the lower half, e + D/2 in the upper.
struct uint8 {
    static constexpr int STEP = 8;
    uint8_t bits;
    static int size(int D) { return D / 2; }
    static int place(int e, int i, int D) { return e + i % LANES + i / LANES * (D / 2); }
};

#ifdef __AVX2__                 // these three GCC 12 does not find by itself
ivec ints(const uint8* x) { return (ivec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((__m128i*)x)); }
svec shorts(const uint8* x) { return (svec)_mm256_cvtepu8_epi16(load<__m128i>(x)); }
ivec product(svec x, svec y) { return (ivec)_mm256_madd_epi16((__m256i)x, (__m256i)y); }
#else
ivec ints(const uint8* x) { return __builtin_convertvector(load<few>(x), ivec); }
svec shorts(const uint8* x) { return __builtin_convertvector(load<bytes>(x), svec); }
ivec product(svec x, svec y) {  // of two neighbours each, added
    ivec a = (ivec)x, b = (ivec)y;
    return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
}
#endif

Pair widen(const uint8* x) {
    ivec both = ints(x);
    return {__builtin_convertvector((both & 15) - 8, vec),
            __builtin_convertvector((both >> 4) - 8, vec)};
}

// How score reads a row, and what it multiplies: floats, or of 4 bits shorts, whose sums are exact.
struct Shorts { svec a, b; };
template <class Num> Pair read(const Num* x) { return widen(x); }
Shorts read(const uint8* x) {
    svec both = shorts(x);
    return {(both & 15) - 8, (both >> 4) - 8};
}
void add(vec& sum, Pair x, Pair y) { sum += x.a * y.a; sum += x.b * y.b; }
void add(ivec& sum, Shorts x, Shorts y) { sum += product(x.a, y.a) + product(x.b, y.b); }

// ---------------------------------------------------------------- loops over rows

constexpr int WIDTH = 16;       // elements that read reads

// Reads that cover n elements, and where each begins; the last one may overlap the one before.
int reads(int n, int step) { return (n + step - 1) / step; }
int start(int i, int n, int step) { return (i + 1) * step <= n ? i * step : n - step; }

// Sums of the lanes of 8 vectors, in their order.
template <class V> inline V sums(V (&x)[8]) {
    auto halve = [&](int n, ivec some, ivec others) {
        for (int i = 0; i < n; i++)
            x[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], some)
                 + __builtin_shuffle(x[2 * i], x[2 * i + 1], others);
    };
    halve(4, ivec{0, 8, 1, 9, 4, 12, 5, 13}, ivec{2, 10, 3, 11, 6, 14, 7, 15});
    halve(2, ivec{0, 1, 8, 9, 4, 5, 12, 13}, ivec{2, 3, 10, 11, 6, 7, 14, 15});
    halve(1, ivec{0, 1, 2, 3, 8, 9, 10, 11}, ivec{4, 5, 6, 7, 12, 13, 14, 15});
    return x[0];
}

// Inner products x (G, TILE) of q (G, reads) and n rows. Reads each row's bytes once: four rows at
// a time, so that what is read serves two queries from a register, and 8 sums fill a vector.
template <class Row, class Part>
void score(const std::vector<Part>& q, int G, int D, const Row* const* rows, int n, float* x) {
    using Sum = std::conditional_t<std::is_same_v<Part, Shorts>, ivec, vec>;
    int size = Row::size(D), count = reads(size, WIDTH);
    for (int i = 0; i < n; i += 4) {
        const Row* row[4];
        for (int r = 0; r < 4; r++) {
            row[r] = rows[std::min(i + r, n - 1)];
            const Row* next = rows[std::min(i + r + AHEAD, n - 1)];
            for (int e = 0; e < size; e += 64 / sizeof(Row)) __builtin_prefetch(next + e);
        }
        for (int g = 0; g < G; g += 2) {
            const Part *q0 = &q[g * count], *q1 = q0 + count;
            Sum sum[8];
            for (Sum& s : sum) s = Sum{};
            for (int j = 0; j < count; j++)
                for (int r = 0, e = start(j, size, WIDTH); r < 4; r++) {
                    Part k = read(row[r] + e);
                    add(sum[r], k, q0[j]), add(sum[r + 4], k, q1[j]);
                }
            vec all = __builtin_convertvector(sums(sum), vec);
            std::memcpy(x + g * TILE + i, &all, 16);
            std::memcpy(x + (g + 1) * TILE + i, (char*)&all + 16, 16);
        }
    }
}

// Puts in o (G, reads), in the order of widen, the sums of n rows weighted by x (G, TILE). Reads
// each row's bytes once: a few columns of 32 rows, while those of the next 32 are fetched.
template <class Row>
void mix(const float* x, int G, int D, const Row* const* rows, int n, Pair* o) {
    int size = Row::size(D), count = reads(size, Row::STEP);
    std::fill(o, o + G * count, Pair{});
    for (int first = 0; first < n; first += 32)
        for (int g = 0; g < G; g += GROUP)
            for (int j = 0; j < count; j++) {
                int e = start(j, size, Row::STEP);
                Pair sum[GROUP];
                for (int h = 0; h < GROUP; h++) sum[h] = o[(g + h) * count + j];
                for (int i = first; i < std::min(first + 32, n); i++) {
                    __builtin_prefetch(rows[std::min(i + 32, n - 1)] + e);
                    Pair v = widen(rows[i] + e);
                    for (int h = 0; h < GROUP; h++) {
                        sum[h].a += x[(g + h) * TILE + i] * v.a;
                        sum[h].b += x[(g + h) * TILE + i] * v.b;
                    }
                }
                for (int h = 0; h < GROUP; h++) o[(g + h) * count + j] = sum[h];
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

// Puts e^(x - m) in place of n logits, 0 behind them up to a full vector; m is the largest.
float exponentials(float* x, int n) {
    for (int i = n; i % (2 * LANES); i++) x[i] = NONE;
    vec even = vec{} + NONE, odd = even;
    for (int i = 0; i < n; i += 2 * LANES) {
        vec a = load<vec>(x + i), b = load<vec>(x + i + LANES);
        even = a > even ? a : even, odd = b > odd ? b : odd;
    }
    float m = NONE;
    for (int i = 0; i < LANES; i++) m = std::max({m, even[i], odd[i]});
    float shift = m == NONE ? 0 : m;
    for (int i = 0; i < n; i += LANES) store(x + i, exponential(load<vec>(x + i) - shift));
    return m;
}

float total(const float* x, int n) {
    vec sum = {};
    for (int i = 0; i < n; i += LANES) sum += load<vec>(x + i);
    float s = 0;
    for (int i = 0; i < LANES; i++) s += sum[i];
    return s;
}

// e^(m - top), where m = -inf stands for nothing.
float fade(float m, float top) { return m == NONE ? 0 : std::exp(m - top); }

// ---------------------------------------------------------------- a step

typedef NUM Num;
typedef ROW Row;
constexpr bool IS_PACKED = std::is_same_v<Row, uint8>;
constexpr int LIMBS = IS_PACKED && sizeof(Num) == 4 ? 2 : 1;    // shorts that hold a number of q

struct Shape { int64_t B, H, G, D, W, T, C, N, R, K, by_mass, bias_b, bias_h, bias_w; };

struct Tensors {
    const Num *q, *k_steady, *v_steady;
    const float* bias;
    const Row *centroids, *means;
    const float* sizes;
    const int64_t* offsets;
    const bfloat16 *spreads, *scales;
    const Num *k_store, *v_store;
    const int64_t *n_retrieve, *n_ranked, *n_tokens;
    Num* o;
};

int tiles(int64_t n) { return (n + TILE - 1) / TILE; }
float wide(bfloat16 x) { uint32_t bits = x.bits << 16; return load<float>(&bits); }

// One head of one sequence, and what the loops hand on. It is kept for the next step: fresh memory
// costs more than what is done in it. G counts empty query heads too, up to whole groups.
struct Head {
    Shape n;
    Tensors given;
    int64_t at, b, h;                       // its number; its sequence, and head of that
    int G, D, S;                            // S: steady tiles, the first parts
    std::vector<Pair> q;                    // (G, reads) scaled
    std::vector<Shorts> q_shorts;           // (LIMBS, G, reads) over unit
    std::vector<float> unit, half;          // (G,) half: |q|^2 / 2
    std::vector<float> mass, m, s;          // (tiles, G, TILE) over e^m; (tiles, G); sums, likewise
    std::vector<float> top;                 // (G,) the largest m
    std::vector<int> ids, live;             // (tiles, TILE); (tiles,)
    std::vector<uint64_t> keys, best;       // of live clusters: share of attention, then place
    std::vector<const Num *> k, v;          // tokens to read: steady, up to a whole tile, retrieved
    std::vector<const Row*> mean;           // means to read
    std::vector<float> bias, weight;        // of each steady token; (tiles, G, TILE) of each mean
    std::vector<float> part_m, part_s;      // (parts, G) of tokens, then of means
    std::vector<Pair> part_o;               // (parts, G, reads)

    int of_tokens() const { return tiles(n.W) + tiles(n.N); }
    int parts() const { return of_tokens() + tiles(n.K); }
    Pair* o(int part) {
        int count = std::max(reads(D, WIDTH), reads(Row::size(D), Row::STEP));
        return part_o.data() + part * G * count;
    }

    void begin(const Shape& shape, const Tensors& tensors, int64_t number) {
        n = shape, given = tensors, at = number, b = at / n.H, h = at % n.H, D = n.D;
        G = (n.G + GROUP - 1) / GROUP * GROUP;
        m.resize(tiles(n.C) * G), s.resize(m.size()), mass.resize(m.size() * TILE);
        ids.resize(tiles(n.C) * TILE), live.resize(tiles(n.C)), keys.clear(), top.assign(G, NONE);
        part_m.assign(parts() * G, NONE), part_s.assign(parts() * G, 0);
        part_o.resize(o(parts()) - o(0)), weight.assign(tiles(n.K) * G * TILE, 0);
        k.clear(), v.clear(), mean.clear(), bias.clear();
        for (int w = 0; w < n.W; w++) {
            float x = given.bias[b * n.bias_b + h * n.bias_h + w * n.bias_w];
            if (x == NONE) continue;
            add_token(given.k_steady, given.v_steady, at * n.W + w);
            bias.push_back(x);
        }
        S = tiles(k.size());
        prepare();
    }

    void add_token(const Num* keys, const Num* values, int64_t row) {
        k.push_back(keys + row * D), v.push_back(values + row * D);
    }

    // q as score takes it: scaled, in the order of its reads, and 0 where a read repeats a column.
    void prepare() {
        int count = reads(D, WIDTH), packed = reads(D / 2, WIDTH);
        q.assign(G * count, Pair{}), q_shorts.assign(LIMBS * G * packed, Shorts{});
        unit.assign(G, 0), half.assign(G, 0);
        std::vector<float> x(D);
        for (int g = 0; g < n.G; g++) {
            float most = 0;
            for (int j = 0; j < count; j++) {
                int e = start(j, D, WIDTH);
                Pair read = widen(given.q + (at * n.G + g) * D + e);
                for (int i = 0; i < 16; i++) x[Num::place(e, i, D)] = ((float*)&read)[i];
            }
            for (float& value : x) value /= std::sqrt((float)D), half[g] += value * value / 2;
            for (float value : x) most = std::max(most, std::abs(value));
            unit[g] = most > 0 ? most / 32767 : 1;
            for (int j = 0; j < count; j++)
                for (int i = 0, e = start(j, D, WIDTH); i < 16; i++) {
                    int d = Num::place(e, i, D);
                    ((float*)&q[g * count + j])[i] = d < j * WIDTH ? 0 : x[d];
                }
            for (int j = 0; j < packed; j++)
                for (int i = 0; i < 32; i++) {
                    int e = start(j, D / 2, WIDTH) + i % 16, d = e + i / 16 * (D / 2);
                    float rest = e < j * WIDTH ? 0 : x[d] / unit[g];
                    for (int limb = 0; limb < LIMBS; limb++) {
                        float whole = std::nearbyint(rest);
                        ((int16_t*)&q_shorts[(limb * G + g) * packed + j])[i] = whole;
                        rest = (rest - whole) * 32768;
                    }
                }
        }
    }

    // How many tokens at its centroid cluster c is worth to query g.
    float worth(int g, int64_t c) const {
        return given.sizes[at * n.C + c] * (1 + half[g] * wide(given.spreads[at * n.C + c]));
    }

    // Reads 4 bytes a slot; 4 more and the centroid where a cluster is; writes 4*G + 4 of it.
    void rank(int tile) {
        const Row* rows[TILE];
        float worth[TILE] = {}, scale[TILE] = {}, spread[TILE] = {};
        int first = tile * TILE, end = std::min<int>(first + TILE, n.C), count = 0;
        for (int64_t c = at * n.C + first; c < at * n.C + end; c++)
            if (given.sizes[c] > 0) {
                rows[count] = given.centroids + c * Row::size(D);
                scale[count] = wide(given.scales[2 * c]), spread[count] = wide(given.spreads[c]);
                worth[count] = given.sizes[c];
                ids[first + count++] = c - at * n.C;
            }
        live[tile] = count;
        std::vector<float> x(LIMBS * G * TILE);
        if constexpr (IS_PACKED) score(q_shorts, LIMBS * G, D, rows, count, x.data());
        else score(q, n.G, D, rows, count, x.data());
        for (int g = 0; g < n.G; g++) {
            float *logits = &mass[first * G + g * TILE], *from = &x[g * TILE];
            for (int i = 0; i < count; i++) {
                float sum = from[i];
                if (LIMBS == 2) sum += from[G * TILE + i] / 32768;
                logits[i] = sum * scale[i] * (IS_PACKED ? unit[g] : 1);
            }
            m[tile * G + g] = exponentials(logits, count);
            if (n.by_mass)
                for (int i = 0; i < count; i++) logits[i] *= worth[i] * (1 + half[g] * spread[i]);
            s[tile * G + g] = total(logits, count);
        }
    }

    // Keys of the live clusters: share of attention above place, so that of equals the first wins.
    void weigh() {
        std::vector<float> sum(G), over(G);     // over: 1 / all that share attention, over e^top
        for (int t = 0; t < tiles(n.C); t++)
            for (int g = 0; g < n.G; g++) top[g] = std::max(top[g], m[t * G + g]);
        for (int t = 0; t < tiles(n.C); t++)
            for (int g = 0; g < n.G; g++) {
                m[t * G + g] = fade(m[t * G + g], top[g]);
                sum[g] += s[t * G + g] * m[t * G + g];
            }
        for (int g = 0; g < n.G; g++) {         // the paper ranks clusters among themselves
            int steady = n.by_mass ? S : 0;
            float most = top[g], near = 0;
            for (int p = 0; p < steady; p++) most = std::max(most, part_m[p * G + g]);
            for (int p = 0; p < steady; p++)
                near += part_s[p * G + g] * fade(part_m[p * G + g], most);
            float far = fade(top[g], most);
            over[g] = far / (near + sum[g] * far);
        }
        for (int t = 0; t < tiles(n.C); t++) {
            float p[TILE] = {};
            for (int g = 0; g < n.G; g++) {
                float scale = m[t * G + g] * over[g], *x = &mass[(t * G + g) * TILE];
                for (int i = 0; i < TILE; i++) p[i] += x[i] * scale;
            }
            for (int i = 0; i < live[t]; i++)
                keys.push_back((uint64_t)load<uint32_t>(p + i) << 32 | ~uint32_t(t * TILE + i));
        }
    }

    // The n_ranked largest keys, of which the first n_retrieve are in order. Leaves in keys those
    // that share 12 bits with one of them, or are larger.
    void choose(int n_ranked, int n_retrieve) {
        int count[4096] = {}, bin = 4096;       // keys with the same 12 leading bits
        for (uint64_t key : keys) count[key >> 52]++;
        for (int above = 0; above < n_ranked; above += count[bin]) bin--;
        size_t found = 0;
        for (uint64_t key : keys) keys[found] = key, found += key >> 52 >= (uint64_t)bin;
        keys.resize(found), best = keys;
        auto from = best.begin();
        std::nth_element(from, from + n_ranked, best.end(), std::greater());
        best.resize(n_ranked);
        std::nth_element(from, from + n_retrieve, best.end(), std::greater());
        std::sort(from, from + n_retrieve, std::greater());
    }

    // Reads 12 bytes a retrieved cluster and what rank left; writes 16 a token, 4*G + 8 a mean.
    void select() {
        weigh();
        int n_ranked = std::min<int64_t>({given.n_ranked[b], n.K, (int64_t)keys.size()});
        int n_retrieve = std::min<int64_t>({given.n_retrieve[b], n.R, n_ranked});
        choose(n_ranked, n_retrieve);
        k.resize(S * TILE), v.resize(S * TILE);
        uint64_t last = UINT64_MAX;             // key of the last cluster whose tokens fit
        int64_t room = std::min(n.N, given.n_tokens[b]);
        for (int r = 0; r < n_retrieve; r++) {
            int64_t c = at * n.C + ids[~uint32_t(best[r])], size = given.sizes[c];
            if ((room -= size) < 0) break;
            for (int i = 0; i < size; i++)
                add_token(given.k_store, given.v_store, at * n.T + given.offsets[c] + i);
            last = best[r];
        }
        uint64_t least = n_ranked ? *std::min_element(best.begin(), best.end()) : last;
        for (uint64_t key : keys)
            if (least <= key && key < last) estimate(~uint32_t(key));
    }

    void estimate(int place) {
        int t = place / TILE, c = ids[place], j = mean.size();
        int part = of_tokens() + j / TILE;
        float scale = wide(given.scales[2 * (at * n.C + c) + 1]);
        mean.push_back(given.means + (at * n.C + c) * Row::size(D));
        for (int g = 0; g < n.G; g++) {
            float w = mass[(t * G + g) * TILE + place % TILE] * m[t * G + g]
                    * (n.by_mass ? 1 : worth(g, c));
            part_m[part * G + g] = top[g], part_s[part * G + g] += w;
            weight[(j / TILE * G + g) * TILE + j % TILE] = w * scale;
        }
    }

    // Reads 2*D*e bytes a token, or a mean and 4*G, and writes 4*G*(D + 2).
    void attend(int part) {
        int first = part * TILE;
        if (part >= of_tokens()) {
            first -= of_tokens() * TILE;
            if (int count = std::min<int>(TILE, mean.size() - first); count > 0)
                mix(&weight[first * G], G, D, &mean[first], count, o(part));
            return;
        }
        bool is_steady = part < tiles(n.W);
        if (!is_steady) first += (S - tiles(n.W)) * TILE;
        int end = is_steady ? bias.size() : k.size(), count = std::min(TILE, end - first);
        if (count <= 0) return;
        std::vector<float> x(G * TILE);
        score(q, n.G, D, &k[first], count, x.data());
        for (int g = 0; g < n.G; g++) {
            float* logits = &x[g * TILE];
            for (int i = 0; is_steady && i < count; i++) logits[i] += bias[first + i];
            part_m[part * G + g] = exponentials(logits, count);
            part_s[part * G + g] = total(logits, count);
        }
        mix(x.data(), G, D, &v[first], count, o(part));
    }

    // Reads 4*G*(D + 2) bytes a part and writes D*e*G.
    void combine() {
        for (int g = 0; g < n.G; g++) {
            float most = NONE, total = 0;
            for (int p = 0; p < parts(); p++) most = std::max(most, part_m[p * G + g]);
            for (int p = 0; p < parts(); p++)
                total += fade(part_m[p * G + g], most) * part_s[p * G + g];
            std::vector<float> exact = add_parts<Num>(0, of_tokens(), g, most);
            std::vector<float> estimated = add_parts<Row>(of_tokens(), parts(), g, most);
            for (int d = 0; d < D; d++)
                given.o[(at * n.G + g) * D + d] = narrow((exact[d] + estimated[d]) / total, Num());
        }
    }

    template <class Kind> std::vector<float> add_parts(int first, int end, int g, float most) {
        int size = Kind::size(D), count = reads(size, Kind::STEP);
        std::vector<Pair> sum(count);
        for (int p = first; p < end; p++)
            if (float scale = fade(part_m[p * G + g], most); scale > 0)
                for (int j = 0; j < count; j++) {
                    sum[j].a += scale * o(p)[g * count + j].a;
                    sum[j].b += scale * o(p)[g * count + j].b;
                }
        std::vector<float> found(D);
        for (int j = 0; j < count; j++)
            for (int i = 0; i < 16; i++)
                found[Kind::place(start(j, size, Kind::STEP), i, D)] = ((float*)&sum[j])[i];
        return found;
    }
};

}

extern "C" void attend(const Tensors* given, const Shape* n, int threads) {
    static thread_local std::vector<Head> kept;
    std::vector<Head>& heads = kept;            // the caller's, for all threads
    int count = n->B * n->H;
    if ((int)heads.size() < count) heads.resize(count);
    #pragma omp parallel num_threads(threads)
    {
        #pragma omp for
        for (int i = 0; i < count; i++) heads[i].begin(*n, *given, i);
        int C = tiles(n->C), W = tiles(n->W), parts = heads[0].parts();
        #pragma omp for schedule(dynamic)
        for (int i = 0; i < count * (C + W); i++)
            if (i % (C + W) < C) heads[i / (C + W)].rank(i % (C + W));
            else heads[i / (C + W)].attend(i % (C + W) - C);
        #pragma omp for schedule(dynamic)
        for (int i = 0; i < count; i++) heads[i].select();
        #pragma omp for schedule(dynamic)
        for (int i = 0; i < count * (parts - W); i++)
            heads[i / (parts - W)].attend(W + i % (parts - W));
        #pragma omp for schedule(dynamic)
        for (int i = 0; i < count; i++) heads[i].combine();
    }
}
