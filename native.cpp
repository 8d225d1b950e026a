// The twin of retroinfer.attend for CPUs: a decode step over one layer, in which every byte is read
// once. native.py compiles it. Four loops, whose turns the threads share; a barrier behind each:
//
//     rank      q, centroids     -> mass of each live cluster, its tile's largest logit and sum
//     select    masses           -> rows to read, means to read and the weight of each
//     attend    rows | means     -> largest logit, sum and weighted values of a tile of them
//     combine   of all tiles     -> o (B, H, G, D)
//
//     B batch    H kv heads   G query heads per kv head   T tokens   D head dim   W steady-zone slots
//     C clusters a head   R, K clusters retrieved at most, ranked at most   N exact tokens at most
//
// Tiles depend on shapes alone, so the number of threads changes no bit. Sums are in fp32.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>
#ifdef __F16C__
#include <immintrin.h>
#endif

constexpr int LANES = 8;        // numbers in a vector
constexpr int WIDTH = 16;       // numbers of a row that are read together, as two vectors
constexpr int TILE = 256;       // clusters or tokens in a turn of a loop; a multiple of LANES
constexpr int GROUP = 4;        // query heads in one pass over rows: what 16 registers hold
constexpr int AHEAD = 16;       // rows from the one that is read to the one that is fetched
constexpr float NONE = -INFINITY;

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
struct Pair { vec a, b; };      // WIDTH numbers, in an order that each element type chooses

template <class V> V load(const void* from) { V x; std::memcpy(&x, from, sizeof x); return x; }
template <class V> void store(void* to, V x) { std::memcpy(to, &x, sizeof x); }

// ---------------------------------------------------------------- element types

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

Pair widen(const float* x) { return {load<vec>(x), load<vec>(x + LANES)}; }
void narrow(Pair x, float* to) { store(to, x.a), store(to + LANES, x.b); }

// Even numbers, odd numbers: then each is a half of 32 bits, and one instruction widens eight.
Pair widen(const bfloat16* x) {
    ivec both = load<ivec>(x);
    return {(vec)(both << 16), (vec)(both & ~0xffff)};
}
ivec rounded(vec x) { return (ivec)x + 0x7fff + (((ivec)x >> 16) & 1); }    // to nearest, even
void narrow(Pair x, bfloat16* to) {
    store(to, ((rounded(x.a) >> 16) & 0xffff) | (rounded(x.b) & ~0xffff));
}

#ifdef __F16C__
Pair widen(const float16* x) {
    return {_mm256_cvtph_ps(load<__m128i>(x)), _mm256_cvtph_ps(load<__m128i>(x + LANES))};
}
void narrow(Pair x, float16* to) {
    store(to, _mm256_cvtps_ph(x.a, 0)), store(to + LANES, _mm256_cvtps_ph(x.b, 0));
}
#endif

// ---------------------------------------------------------------- loops over rows

int blocks(int D) { return (D + WIDTH - 1) / WIDTH; }

// Where block b of a row begins. The last overlaps the one before it where D is no multiple of WIDTH.
int column(int b, int D) { return std::min(b * WIDTH, D - WIDTH); }

// Sums of the lanes of 8 vectors, in their order.
inline vec sums(vec (&x)[8]) {
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

// Inner products x (G, TILE) of q (G, D) and n rows. Reads D*e bytes a row: four rows at a time, so
// that each number read serves two queries from a register, and 8 sums fill one vector in the end.
template <class Num>
void score(const Pair* q, int G, int D, const Num* const* rows, int n, float* x) {
    for (int i = 0; i < n; i += 4) {
        const Num* row[4];
        for (int r = 0; r < 4; r++) {
            row[r] = rows[std::min(i + r, n - 1)];
            const Num* next = rows[std::min(i + r + AHEAD, n - 1)];
            for (int d = 0; d < D; d += 64 / sizeof(Num)) __builtin_prefetch(next + d);
        }
        for (int g = 0; g < G; g += 2) {
            const Pair *q0 = q + g * blocks(D), *q1 = q0 + blocks(D);
            vec sum[8];
            for (vec& s : sum) s = vec{};
            for (int b = 0; b < blocks(D); b++) {
                Pair one = q0[b], two = q1[b];
                for (int r = 0; r < 4; r++) {
                    Pair k = widen(row[r] + column(b, D));
                    sum[r] += k.a * one.a;
                    sum[r + 4] += k.a * two.a;
                    sum[r] += k.b * one.b;
                    sum[r + 4] += k.b * two.b;
                }
            }
            vec all = sums(sum);
            std::memcpy(x + g * TILE + i, &all, 16);
            std::memcpy(x + (g + 1) * TILE + i, (char*)&all + 16, 16);
        }
    }
}

// Adds to o (G, D) n rows weighted by x (G, TILE). Reads D*e bytes a row: WIDTH columns of 32 rows
// at a time, in which the same columns of the next 32 are fetched.
template <class Num>
void mix(const float* x, int G, int D, const Num* const* rows, int n, Pair* o) {
    for (int start = 0; start < n; start += 32)
        for (int g = 0; g < G; g += GROUP)
            for (int b = 0; b < blocks(D); b++) {
                Pair sum[GROUP];
                for (int j = 0; j < GROUP; j++) sum[j] = o[(g + j) * blocks(D) + b];
                for (int i = start; i < std::min(start + 32, n); i++) {
                    __builtin_prefetch(rows[std::min(i + 32, n - 1)] + b * WIDTH);
                    Pair v = widen(rows[i] + column(b, D));
                    for (int j = 0; j < GROUP; j++) {
                        sum[j].a += x[(g + j) * TILE + i] * v.a;
                        sum[j].b += x[(g + j) * TILE + i] * v.b;
                    }
                }
                for (int j = 0; j < GROUP; j++) o[(g + j) * blocks(D) + b] = sum[j];
            }
}

// ---------------------------------------------------------------- softmax

// e^x for x <= 0, to a relative error of 2e-7; 0 below -87. x = n ln 2 + r, and e^r by its series.
vec exponential(vec x) {
    const float MAGIC = 3 << 22;                    // added, it rounds to an integer in the low bits
    vec t = x * 1.44269504f + MAGIC, n = t - MAGIC;
    vec r = x - n * 0.693359375f - n * -2.12194440e-4f, y = r / 5040 + 1.f / 720;
    y = (((y * r + 1.f / 120) * r + 1.f / 24) * r + 1.f / 6) * r + 1.f / 2;
    y = (y * r + 1) * r + 1;
    return x < -87.f ? vec{} : (vec)((ivec)y + ((ivec)t << 23));
}

// Puts e^(x - m) in place of n logits, 0 behind them up to a full vector; m is the largest.
float exponentials(float* x, int n) {
    for (int i = n; i % LANES; i++) x[i] = NONE;
    vec top = vec{} + NONE;
    for (int i = 0; i < n; i += LANES) {
        vec now = load<vec>(x + i);
        top = now > top ? now : top;
    }
    float m = NONE;
    for (int i = 0; i < LANES; i++) m = std::max(m, top[i]);
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

struct Shape { int64_t B, H, G, D, W, T, C, N, R, K, by_mass, bias_b, bias_h, bias_w; };

template <class Num> struct Tensors {
    const Num *q, *k_steady, *v_steady;
    const float* bias;
    const Num *centroids, *means;
    const float* sizes;
    const int64_t* offsets;
    const float* spreads;
    const Num *k_store, *v_store;
    const int64_t *n_retrieve, *n_ranked;
    Num* o;
};

int tiles(int64_t n) { return (n + TILE - 1) / TILE; }

// One head of one sequence, and what the loops hand on: (tiles, G, TILE), (tiles, G) or, of rows,
// (tiles, G, D) numbers, with empty query heads up to whole groups. It is kept for the next step:
// memory fresh from the system costs more than what is done in it.
template <class Num> struct Head {
    Shape n;
    Tensors<Num> given;
    int64_t at, b, h;                       // its number; its sequence, and head of that
    int G, D;
    std::vector<Pair> q;                    // (G, D), scaled
    std::vector<float> half, top, sum;      // (G,) |q|^2 / 2; of all clusters as m and s of a tile
    std::vector<float> mass, m, s;          // of live clusters, over e^m; largest logit; sum of mass
    std::vector<int> ids, live;             // (tiles, TILE); (tiles,)
    std::vector<uint64_t> keys, best;       // of live clusters: probability, then place
    std::vector<const Num*> k, v, mean;     // rows to read
    std::vector<float> bias, weight;        // of each k; of each mean, over e^top
    std::vector<float> part_m, part_s;
    std::vector<Pair> part_o;

    void begin(const Shape& shape, const Tensors<Num>& tensors, int64_t number) {
        n = shape, given = tensors, at = number, b = at / n.H, h = at % n.H, D = n.D;
        G = (n.G + GROUP - 1) / GROUP * GROUP;
        q.assign(G * blocks(D), Pair{}), half.assign(G, 0), top.assign(G, NONE), sum.assign(G, 0);
        mass.resize(tiles(n.C) * G * TILE), m.resize(tiles(n.C) * G), s.resize(tiles(n.C) * G);
        ids.resize(tiles(n.C) * TILE), live.resize(tiles(n.C)), keys.clear();
        k.clear(), v.clear(), mean.clear(), bias.clear(), weight.assign(tiles(n.K) * G * TILE, 0);
        part_m.resize(parts() * G), part_s.resize(parts() * G), part_o.resize(parts() * G * blocks(D));
        float scale = 1 / std::sqrt((float)D);
        for (int g = 0; g < n.G; g++)
            for (int i = 0; i < blocks(D); i++) {
                Num part[WIDTH];
                std::memcpy(part, given.q + (at * n.G + g) * D + column(i, D), sizeof part);
                std::fill(part, part + i * WIDTH - column(i, D), Num{});    // counted already
                Pair x = widen(part);
                q[g * blocks(D) + i] = x = {x.a * scale, x.b * scale};
                vec squares = x.a * x.a + x.b * x.b;
                half[g] += total((float*)&squares, LANES) / 2;
            }
    }

    int parts() const { return tiles(n.W + n.N) + tiles(n.K); }

    // How many tokens at its centroid cluster c is worth to query g.
    float worth(int g, int64_t c) const {
        return given.sizes[at * n.C + c] * (1 + half[g] * given.spreads[at * n.C + c]);
    }

    // Reads 8 bytes a cluster, and its centroid where one is; writes 4*G + 4 of it.
    void rank(int tile) {
        const Num* rows[TILE];
        int first = tile * TILE, end = std::min<int>(first + TILE, n.C), count = 0, *id = &ids[first];
        for (int c = first; c < end; c++)
            if (given.sizes[at * n.C + c] > 0) {
                rows[count] = given.centroids + (at * n.C + c) * D;
                id[count++] = c;
            }
        live[tile] = count;
        float* x = &mass[first * G];
        score(q.data(), n.G, D, rows, count, x);
        for (int g = 0; g < n.G; g++, x += TILE) {
            m[tile * G + g] = exponentials(x, count);
            if (n.by_mass) for (int i = 0; i < count; i++) x[i] *= worth(g, id[i]);
            s[tile * G + g] = total(x, count);
        }
    }

    // Keys of the live clusters: probability above place, so that of equals the first is the best.
    void weigh() {
        for (int t = 0; t < tiles(n.C); t++)
            for (int g = 0; g < n.G; g++) top[g] = std::max(top[g], m[t * G + g]);
        for (int t = 0; t < tiles(n.C); t++)
            for (int g = 0; g < n.G; g++) {
                m[t * G + g] = fade(m[t * G + g], top[g]);
                sum[g] += s[t * G + g] * m[t * G + g];
            }
        for (int t = 0; t < tiles(n.C); t++) {
            float p[TILE] = {};
            for (int g = 0; g < n.G; g++) {
                float scale = m[t * G + g] / sum[g], *x = &mass[(t * G + g) * TILE];
                for (int i = 0; i < TILE; i++) p[i] += x[i] * scale;
            }
            for (int i = 0; i < live[t]; i++)
                keys.push_back((uint64_t)load<uint32_t>(p + i) << 32 | ~uint32_t(t * TILE + i));
        }
    }

    // The n_ranked largest keys, of which the first n_retrieve are in order.
    void choose(int n_ranked, int n_retrieve) {
        int count[4096] = {}, bin = 4096;       // keys with the same 12 leading bits
        for (uint64_t key : keys) count[key >> 52]++;
        for (int above = 0; above < n_ranked; above += count[bin]) bin--;
        best.clear();
        for (uint64_t key : keys) if ((int)(key >> 52) >= bin) best.push_back(key);
        std::nth_element(best.begin(), best.begin() + n_ranked, best.end(), std::greater());
        best.resize(n_ranked);
        std::nth_element(best.begin(), best.begin() + n_retrieve, best.end(), std::greater());
        std::sort(best.begin(), best.begin() + n_retrieve, std::greater());
    }

    // Reads 4 bytes a steady slot, 12 a retrieved cluster and what rank left, and writes 20 a token,
    // 4*G + 8 an estimated cluster.
    void select() {
        auto add = [&](const Num* keys, const Num* values, int64_t row, float x) {
            k.push_back(keys + row * D), v.push_back(values + row * D), bias.push_back(x);
        };
        for (int w = 0; w < n.W; w++) {
            float x = given.bias[b * n.bias_b + h * n.bias_h + w * n.bias_w];
            if (x > NONE) add(given.k_steady, given.v_steady, at * n.W + w, x);
        }
        weigh();
        int n_ranked = std::min<int64_t>({given.n_ranked[b], n.K, (int64_t)keys.size()});
        int n_retrieve = std::min<int64_t>({given.n_retrieve[b], n.R, n_ranked});
        choose(n_ranked, n_retrieve);
        uint64_t last = UINT64_MAX;             // key of the last cluster whose tokens fit
        int64_t room = n.N;
        for (int r = 0; r < n_retrieve; r++) {
            int64_t c = at * n.C + ids[~uint32_t(best[r])], size = given.sizes[c];
            if ((room -= size) < 0) break;
            for (int i = 0; i < size; i++)
                add(given.k_store, given.v_store, at * n.T + given.offsets[c] + i, 0);
            last = best[r];
        }
        uint64_t least = n_ranked ? *std::min_element(best.begin(), best.end()) : last;
        for (uint64_t key : keys)
            if (least <= key && key < last) estimate(~uint32_t(key));
    }

    void estimate(int place) {
        int t = place / TILE, c = ids[place], j = mean.size();
        mean.push_back(given.means + (at * n.C + c) * D);
        for (int g = 0; g < n.G; g++)
            weight[(j / TILE * G + g) * TILE + j % TILE] = m[t * G + g]
                * mass[(t * G + g) * TILE + place % TILE] * (n.by_mass ? 1 : worth(g, c));
    }

    // Reads 2*D*e bytes a token, or D*e + 4*G a cluster, and writes 4*G*(D + 2).
    void attend(int part) {
        int exact = tiles(k.size()), first = part * TILE, count;
        Pair* o = &part_o[part * G * blocks(D)];
        std::fill(o, o + G * blocks(D), Pair{});
        if (part < exact) {
            count = std::min<int>(TILE, k.size() - first);
            std::vector<float> x(G * TILE);
            score(q.data(), n.G, D, &k[first], count, x.data());
            for (int g = 0; g < n.G; g++) {
                float* logits = &x[g * TILE];
                for (int i = 0; i < count; i++) logits[i] += bias[first + i];
                part_m[part * G + g] = exponentials(logits, count);
                part_s[part * G + g] = total(logits, count);
            }
            mix(x.data(), G, D, &v[first], count, o);
        } else if ((first -= exact * TILE) < (int)mean.size()) {
            count = std::min<int>(TILE, mean.size() - first);
            for (int g = 0; g < n.G; g++) {
                part_m[part * G + g] = top[g];
                part_s[part * G + g] = total(&weight[first * G + g * TILE], count);
            }
            mix(&weight[first * G], G, D, &mean[first], count, o);
        }
    }

    // Reads 4*G*(D + 2) bytes a part and writes D*e*G.
    void combine() {
        int parts = tiles(k.size()) + tiles(mean.size());
        for (int g = 0; g < n.G; g++) {
            float most = NONE, total = 0;
            std::vector<Pair> o(blocks(D));
            for (int p = 0; p < parts; p++) most = std::max(most, part_m[p * G + g]);
            for (int p = 0; p < parts; p++) {
                float scale = fade(part_m[p * G + g], most);
                total += scale * part_s[p * G + g];
                for (int i = 0; i < blocks(D); i++) {
                    o[i].a += scale * part_o[(p * G + g) * blocks(D) + i].a;
                    o[i].b += scale * part_o[(p * G + g) * blocks(D) + i].b;
                }
            }
            for (int i = 0; i < blocks(D); i++)
                narrow({o[i].a / total, o[i].b / total},
                       given.o + (at * n.G + g) * D + column(i, D));
        }
    }
};

#ifdef PROFILE
#include <cstdio>
#include <time.h>
static double cpu_now(){timespec t;clock_gettime(CLOCK_THREAD_CPUTIME_ID,&t);return t.tv_sec+t.tv_nsec*1e-9;}
#define NOW(i) _Pragma("omp single") t[i]=cpu_now();
#define INIT double t[6]; t[0]=cpu_now();
#define SAY t[5]=cpu_now(); fprintf(stderr, "setup %.0f rank %.0f select %.0f attend %.0f combine %.0f\n", (t[1]-t[0])*1e6, (t[2]-t[1])*1e6,(t[3]-t[2])*1e6,(t[4]-t[3])*1e6,(t[5]-t[4])*1e6);
#else
#define NOW(i)
#define INIT
#define SAY
#endif
template <class Num> void step(const Tensors<Num>& given, const Shape& n, int threads) {
    static thread_local std::vector<Head<Num>> kept;
    std::vector<Head<Num>>& heads = kept;       // the caller's, for all threads
    int count = n.B * n.H;
    if ((int)heads.size() < count) heads.resize(count);
    INIT
    #pragma omp parallel num_threads(threads)
    {
        #pragma omp for
        for (int i = 0; i < count; i++) heads[i].begin(n, given, i);
        NOW(1)
        #pragma omp for schedule(dynamic)
        for (int i = 0; i < count * tiles(n.C); i++) heads[i / tiles(n.C)].rank(i % tiles(n.C));
        NOW(2)
        #pragma omp for schedule(dynamic)
        for (int i = 0; i < count; i++) heads[i].select();
        NOW(3)
        int parts = heads[0].parts();
        #pragma omp for schedule(dynamic)
        for (int i = 0; i < count * parts; i++) heads[i / parts].attend(i % parts);
        NOW(4)
        #pragma omp for schedule(dynamic)
        for (int i = 0; i < count; i++) heads[i].combine();
    }
    SAY
}

extern "C" {
void attend_float32(void* const* given, const Shape* n, int threads) {
    step(*(const Tensors<float>*)given, *n, threads);
}
void attend_bfloat16(void* const* given, const Shape* n, int threads) {
    step(*(const Tensors<bfloat16>*)given, *n, threads);
}
#ifdef __F16C__
void attend_float16(void* const* given, const Shape* n, int threads) {
    step(*(const Tensors<float16>*)given, *n, threads);
}
#endif
}
