// FlashTPA decoding: attention of the newest tokens over the cache of factors (factor_cache.cuh), in one pass that reads each byte
// once for all heads and never rebuilds k or v. With s over RK, u over RV, for a cached token m and a head h (paper, section 4):
//
//     q[h]   = 1/RQ sum_r aQ[r,h] bQ[r]                                  once, at the start
//     L[h,m] = 1/(RK sqrt HS) sum_s aK[m,s,h] <bK[m,s], q[h]>
//     p      = exp(L - running max);   o[h] += sum_u (p[h,m] aV[m,u,h]) bV[m,u];   at the end   o[h] / (RV sum p)
//
// The paper sums <bK, bQ> first and over r last; taking q first costs the same products, needs one step less for each token, and
// makes dense queries (tpa_kvonly) and grouped heads (MHA, GQA, MQA: a = 1, RK = RV = 1) the same kernel.
//
// A warp owns a tile of 16 rows, heads of one query (grouped: pairs of query and head), the 16 rows of mma.sync: so L, p and p aV stay in
// registers, laid out as the next product wants them. Groups of warps share the tokens out by pages. One warp fetches queries and pages
// into shared memory, pages into a ring. Each thread block has one contiguous run of all sequences' pages, equal to a page, whatever the lengths;
// where a sequence has several thread blocks they leave partial sums, wait for each other (the launch is cooperative, so all of them
// run), and each adds up a part of the output, in one order: the same bits every time. A short sequence is a matter of latency: what a
// thread block does once counts as much as what it does for every page.
// Source: ours; the equations are the paper's.
#ifndef LLMC_FLASHTPA_DECODE_CUH
#define LLMC_FLASHTPA_DECODE_CUH

#include "factor_cache.cuh"
#include "ptx.cuh"

enum {
    DECODE_MAX_TILES = 8,       // of 16 rows, in a thread block: 128 heads
    DECODE_MAX_QUERIES = 16
};
// Warps that compute; one more fetches. With it they are a multiple of four: a quarter of a multiprocessor shares its registers evenly.
__host__ __device__ constexpr int decode_max_warps(int HS) { return HS == 64 ? 15 : 11; }

typedef struct {
    const unsigned char *cache; // of one layer (B, streams, pages), the queries' own tokens in it
    const int32_t *lengths;     // (B) tokens before the queries
    const floatX *fac;          // (B n, Pp) the queries' factors, q's vectors rotated
    floatX *out;                // (B n, NH HS)
    float *scratch;             // decode_scratch_bytes; its counters are zero at first, and again after each launch
    CacheShape shape;
    Heads q;
    int B, n, NH, Pp;           // n: queries of a sequence, its last n tokens, each of which sees those up to itself
    int64_t pages;              // of a stream
    int splits;                 // thread blocks a stream, at most; 0: chosen
    int min_pages;              // with splits 0: fewer pages than this are not worth a thread block of their own; 0: chosen
} DecodeArgs;

// ---------------------------------------------------------------------------------------------------------------------
// The plain kernel: any number type, any head size that 32 divides up to 128, any ranks. One block: a head of a query.

enum { DECODE_PLAIN_WARPS = 4 };

// Element d of q (head) of a row of factors, times what makes its product with bK a power of two's exponent.
__device__ inline float decode_query(const DecodeArgs &a, const floatX *row, int head, int d) {
    int HS = a.shape.HS;
    float sum = 0, unit = 1.44269504f / sqrtf((float)HS) / (a.shape.factored ? a.shape.RK : 1);
    if (a.q.kind == HEADS_GROUPED) return unit * (float)row[a.q.b + head * HS + d];
    for (int r = 0; r < a.q.R; r++) sum += (float)row[a.q.a + head * a.q.R + r] * (float)row[a.q.b + r * HS + d];
    return unit * (float)a.q.scale * sum;
}

template <class Number>
__global__ void __launch_bounds__(32 * DECODE_PLAIN_WARPS) decode_plain_kernel(const __grid_constant__ DecodeArgs a) {
    __shared__ float merged[DECODE_PLAIN_WARPS][128 + 2];
    const CacheShape &s = a.shape;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.x, i = blockIdx.y % a.n, b = blockIdx.y / a.n;
    int stream = head / s.heads, HS = s.HS;
    const unsigned char *pages = a.cache + ((int64_t)b * s.streams + stream) * a.pages * cache_page_bytes(s);
    const floatX *row = a.fac + (int64_t)blockIdx.y * a.Pp;
    float q[4] = {}, o[4] = {}, top = -1e30f, sum = 0;      // element lane + 32 j
    for (int j = 0; 32 * j < HS; j++) q[j] = decode_query(a, row, head, 32 * j + lane);
    int64_t tokens = a.lengths[b] + i + 1;
    for (int64_t m = warp; m < tokens; m += DECODE_PLAIN_WARPS) {
        const unsigned char *page = pages + m / PAGE * cache_page_bytes(s);
        int t = (int)(m % PAGE);
        auto weight = [&](CachePart part, int r) {
            return s.factored ? cache_number((const Number *)(page + cache_a(s, part, r, head % s.heads, t))) : 1.0f;
        };
        float logit = 0;
        for (int r = 0; r < s.RK; r++) {
            float dot = 0;
            for (int j = 0; 32 * j < HS; j++) dot += q[j] * cache_number((const Number *)(page + cache_b(s, CACHE_K, r, t, 32 * j + lane)));
            logit += weight(CACHE_K, r) * warp_sum(dot);
        }
        if (sizeof(Number) == 1) logit *= *(const float *)(page + cache_scale(s, CACHE_K, t));
        float new_top = fmaxf(top, logit), shrink = exp2f(top - new_top), p = exp2f(logit - new_top);
        top = new_top, sum = sum * shrink + p;
        if (sizeof(Number) == 1) p *= *(const float *)(page + cache_scale(s, CACHE_V, t));
        for (int j = 0; 32 * j < HS; j++) {
            float v = 0;
            for (int r = 0; r < s.RV; r++)
                v += weight(CACHE_V, r) * cache_number((const Number *)(page + cache_b(s, CACHE_V, r, t, 32 * j + lane)));
            o[j] = o[j] * shrink + p * v;
        }
    }
    for (int j = 0; 32 * j < HS; j++) merged[warp][32 * j + lane] = o[j];
    if (lane == 0) merged[warp][128] = top, merged[warp][129] = sum;
    __syncthreads();
    for (int w = 0; w < DECODE_PLAIN_WARPS; w++) top = fmaxf(top, merged[w][128]);
    for (int d = threadIdx.x; d < HS; d += 32 * DECODE_PLAIN_WARPS) {
        float total = 0, x = 0;
        for (int w = 0; w < DECODE_PLAIN_WARPS; w++) {
            float weight = exp2f(merged[w][128] - top);
            total += weight * merged[w][129], x += weight * merged[w][d];
        }
        a.out[((int64_t)blockIdx.y * a.NH + head) * HS + d] = (floatX)(x / total / (s.factored ? s.RV : 1));
    }
}

inline void decode_plain(const DecodeArgs &a, cudaStream_t stream) {
    if (a.shape.HS % 32 || a.shape.HS > 128)
        die(EXIT_SYSTEM, "flashtpa_decode: head size %d is not 32, 64, 96 or 128", a.shape.HS);
    Launch where(dim3((unsigned)a.NH, (unsigned)(a.B * a.n)), 32 * DECODE_PLAIN_WARPS, 0, stream);
    if (a.shape.number_bytes == 1) launch(decode_plain_kernel<e4m3>, where, a);
    else launch(decode_plain_kernel<floatX>, where, a);
}

// ---------------------------------------------------------------------------------------------------------------------
// The fast kernel: bf16 and e4m3, heads of 64 and 128

// How the work is cut; the same for all thread blocks.
typedef struct {
    int chunks, tiles, groups;      // chunks (blockIdx.y) of the rows; tiles of 16 rows in a chunk; groups of warps, one for each tile
    int queries, query_bytes;       // of a chunk, at most; what is fetched of each: the factors of q, or the rows of the stream's heads
    int stage_pages, stages;        // of the ring
    int blocks;                     // gridDim.x
    int min_pages;                  // of a thread block, where there are not enough for all
    int counters;                   // at the head of the scratch, two a stream and chunk, for as many chunks as there can be
    int page_bytes, k_b, v_a, v_b, scales;     // of a page: its size, and where its parts begin (aK at 0)
    float q_unit, out_unit;         // what q is multiplied by, so that p = 2^(q k), and the sum of p v
    size_t smem_bytes;
} DecodePlan;

// What a number type needs: products of 16 x 16 by 16 x 8 in which thread t of a quad holds, of the summed index, elements whose
// places in memory follow each other. bf16: places 2t, 2t+1 and 8 + 2t, 8 + 2t + 1, as the instruction counts. e4m3, turned into fp16
// on the way (exactly): places 4t ... 4t+3, because these four are one 32-bit word; the order of a sum is free.
template <class Number> struct DecodeNumber;

template <> struct DecodeNumber<bf16> {
    static __device__ uint32_t pack(float x, float y) { return ptx_pack_bf16(x, y); }
    static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { ptx_mma(c, a, b0, b1); }
    static __device__ uint32_t multiply(uint32_t x, uint32_t y) { return ptx_mul_bf16(x, y); }
    static __device__ int place(int j, int k) { return 8 * j + k; }            // of column k of the j-th eight
    static __device__ int column(int d) { return d; }                          // the other way: 8 j + k of a place
    static __device__ int out_place(int j, int k) { return 8 * j + k; }        // of the output's columns
};
template <> struct DecodeNumber<e4m3> {
    static __device__ uint32_t pack(float x, float y) { return ptx_pack_f16(x, y); }
    static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { ptx_mma_f16(c, a, b0, b1); }
    static __device__ uint32_t multiply(uint32_t x, uint32_t y) { return ptx_mul_f16(x, y); }
    static __device__ int place(int j, int k) { return 16 * (j / 2) + 4 * (k / 2) + 2 * (j % 2) + k % 2; }
    static __device__ int column(int d) { return d / 16 * 16 + d / 2 % 2 * 8 + d / 4 % 4 * 2 + d % 2; }
    static __device__ int out_place(int j, int k) { return 16 * (j / 2) + 2 * k + j % 2; }
};

// Two bf16 or fp16 in a word as floats.
__device__ inline float2 decode_unpack_bf16(uint32_t x) { return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000)); }
__device__ inline float2 decode_unpack_f16(uint32_t x) {
    __half2_raw h = {(unsigned short)x, (unsigned short)(x >> 16)};
    return __half22float2(__half2(h));
}

// What a warp keeps of a tile's 16 rows; a thread's are rows lane / 4 and lane / 4 + 8.
template <int HS>
struct DecodeState {
    uint32_t q[HS / 16][4];
    float top[2], sum[2];       // sum: of the thread's own columns
    float o[HS / 8][4];
};

static constexpr float DECODE_SLACK = 4;    // the running maximum follows only when it is outgrown by 2^this: few pages do

// A page in shared memory; head: the tile's first. masked: rows see only the first sees0, sees1 tokens of the page, of which `live` exist;
// what lies in the others may be NaN. FACTORED: there are weights; RANKS: of k and v, 0: any. Loads stand before the products that want
// them, as far as registers allow: there are few warps to fill a wait.
//
// e4m3: with scales K, V of a token, logits are K s. The weights that its v get, p V, are found as one power of two of K s + log2 V, and
// kept below it by a running maximum of that, so that they fit fp16; p itself, for the sum, is that over V.
template <class Number, int HS, bool FACTORED, int RANKS>
__device__ __forceinline__ void decode_page(DecodeState<HS> &st, const unsigned char *page_pointer, const CacheShape &shape, const DecodePlan &plan, int head,
                                            bool masked, int sees0, int sees1, int live) {
    typedef DecodeNumber<Number> N;
    constexpr bool FP8 = sizeof(Number) == 1;
    constexpr int VECTOR_BYTES = PAGE * HS * (int)sizeof(Number), LOADS = HS * (int)sizeof(Number) / 32, AHEAD = LOADS < 4 ? LOADS : 4;
    const int lane = threadIdx.x % 32, t = lane % 4;
    const uint32_t page = smem_address(page_pointer);
    const int RK = RANKS ? RANKS : shape.RK, RV = RANKS ? RANKS : shape.RV;
    // the token of column 2t + e of the j-th eight
    auto token_of = [&](int j, int e) { return FP8 ? 4 * t + 2 * j + e : 8 * j + 2 * t + e; };
    // Where in a vector's 16 tokens this lane's row of the first load is; further loads are 32 bytes x k along, which in permuted
    // chunks is ^ 32 k (cache_b_chunk).
    const int e4m3_token = 4 * (lane % 8 / 2) + 2 * (lane / 8 % 2) + lane % 2;
    const int k_token = FP8 ? e4m3_token : lane / 16 * 8 + lane % 8, v_token = FP8 ? e4m3_token : lane % 16;
    const int k_at = k_token * HS * (int)sizeof(Number) + cache_b_chunk(sizeof(Number), HS, k_token, FP8 ? lane / 16 : lane / 8 % 2) * 16;
    const int v_at = v_token * HS * (int)sizeof(Number) + cache_b_chunk(sizeof(Number), HS, v_token, lane / 16) * 16;
    // x[2 j + i]: of row lane / 4 + 8 i, the weights of the j-th eight's columns 2t and 2t + 1, in a word
    auto load_weights = [&](uint32_t (&x)[4], uint32_t from, int r) {
        int row = r * shape.heads + head + lane % 16;
        if (FP8) {
            uint32_t y[4];
            ptx_ldmatrix_x2(y, from + row * PAGE);
            ptx_e4m3_to_f16(x[0], x[2], y[0]), ptx_e4m3_to_f16(x[1], x[3], y[1]);
        } else ptx_ldmatrix(x, from + row * PAGE * 2 + cache_a_chunk(2, row, lane / 16) * 16);
    };

    // s = logits; [j][e] of rows lane / 4 (e 0, 1) and lane / 4 + 8 (e 2, 3)
    float s[2][4] = {};
    #pragma unroll
    for (int r = 0; r < RK; r++) {
        float c[2][4] = {};
        uint32_t weights[4];
        const uint32_t vector = page + plan.k_b + r * VECTOR_BYTES;
        #pragma unroll
        for (int k0 = 0; k0 < LOADS; k0 += AHEAD) {
            uint32_t y[AHEAD][4];
            #pragma unroll
            for (int k = 0; k < AHEAD; k++) ptx_ldmatrix(y[k], vector + (k_at ^ 32 * (k0 + k)));
            if (FACTORED && k0 == 0) load_weights(weights, page, r);
            #pragma unroll
            for (int k = 0; k < AHEAD; k++) {
                if (FP8) {
                    #pragma unroll
                    for (int x = 0; x < 4; x++) {
                        uint32_t b0, b1;
                        ptx_e4m3_to_f16(b0, b1, y[k][x]);
                        N::mma(c[x % 2], st.q[2 * (k0 + k) + x / 2], b0, b1);
                    }
                } else N::mma(c[0], st.q[k0 + k], y[k][0], y[k][1]), N::mma(c[1], st.q[k0 + k], y[k][2], y[k][3]);
            }
        }
        #pragma unroll
        for (int j = 0; j < 2; j++)
            #pragma unroll
            for (int e = 0; e < 4; e += 2) {
                float2 w = {};
                if (FACTORED) w = FP8 ? decode_unpack_f16(weights[2 * j + e / 2]) : decode_unpack_bf16(weights[2 * j + e / 2]);
                s[j][e] = FACTORED ? fmaf(w.x, c[j][e], s[j][e]) : c[j][e];
                s[j][e + 1] = FACTORED ? fmaf(w.y, c[j][e + 1], s[j][e + 1]) : c[j][e + 1];
            }
    }
    float per_v[4];             // e4m3: 1 / V of tokens 4t ... 4t + 3
    if (FP8) {
        float k[4], v[4];
        *(float4 *)k = *(const float4 *)(page_pointer + plan.scales + 16 * t), *(float4 *)v = *(const float4 *)(page_pointer + plan.scales + 4 * PAGE + 16 * t);
        #pragma unroll
        for (int x = 0; x < 4; x++) {
            float log2_v = __log2f(v[x]);
            per_v[x] = ptx_exp2(-log2_v);
            #pragma unroll
            for (int e = x % 2; e < 4; e += 2) s[x / 2][e] = fmaf(s[x / 2][e], k[x], log2_v);
        }
    }
    uint32_t keep[2] = {0xffffffff, 0xffffffff};            // of a word of the j-th eight's columns: tokens that exist
    if (masked) {
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            #pragma unroll
            for (int e = 0; e < 4; e++) if (token_of(j, e % 2) >= (e < 2 ? sees0 : sees1)) s[j][e] = -INFINITY;
            keep[j] = (token_of(j, 0) < live ? 0xffff : 0) | (token_of(j, 1) < live ? 0xffff0000 : 0);
            if (FP8)
                #pragma unroll
                for (int e = 0; e < 2; e++) if (token_of(j, e) >= live) per_v[2 * j + e] = 0;
        }
    }

    // s = p, and its sum
    float top0 = fmaxf(fmaxf(s[0][0], s[0][1]), fmaxf(s[1][0], s[1][1])), top1 = fmaxf(fmaxf(s[0][2], s[0][3]), fmaxf(s[1][2], s[1][3]));
    if (__any_sync(0xffffffff, top0 > st.top[0] + DECODE_SLACK || top1 > st.top[1] + DECODE_SLACK)) {
        #pragma unroll
        for (int x = 1; x < 4; x *= 2)
            top0 = fmaxf(top0, __shfl_xor_sync(0xffffffff, top0, x)), top1 = fmaxf(top1, __shfl_xor_sync(0xffffffff, top1, x));
        top0 = fmaxf(top0, st.top[0]), top1 = fmaxf(top1, st.top[1]);
        float shrink0 = ptx_exp2(st.top[0] - top0), shrink1 = ptx_exp2(st.top[1] - top1);
        st.top[0] = top0, st.top[1] = top1, st.sum[0] *= shrink0, st.sum[1] *= shrink1;
        #pragma unroll
        for (int d = 0; d < HS / 8; d++) st.o[d][0] *= shrink0, st.o[d][1] *= shrink0, st.o[d][2] *= shrink1, st.o[d][3] *= shrink1;
    }
    uint32_t p[4];              // as words like the weights
    #pragma unroll
    for (int j = 0; j < 2; j++)
        #pragma unroll
        for (int e = 0; e < 4; e++) s[j][e] = ptx_exp2(s[j][e] - st.top[e / 2]);
    #pragma unroll
    for (int e = 0; e < 4; e += 2) {
        if (FP8) {
            #pragma unroll
            for (int x = 0; x < 4; x++) st.sum[e / 2] = fmaf(s[x / 2][e + x % 2], per_v[x], st.sum[e / 2]);
        } else st.sum[e / 2] += (s[0][e] + s[0][e + 1]) + (s[1][e] + s[1][e + 1]);
        p[e / 2] = N::pack(s[0][e], s[0][e + 1]), p[2 + e / 2] = N::pack(s[1][e], s[1][e + 1]);
    }

    // o += (p aV) bV
    #pragma unroll
    for (int r = 0; r < RV; r++) {
        const uint32_t vector = page + plan.v_b + r * VECTOR_BYTES;
        uint32_t a[4];
        if (FACTORED) load_weights(a, page + plan.v_a, r);
        #pragma unroll
        for (int d0 = 0; d0 < LOADS; d0 += AHEAD) {
            uint32_t y[AHEAD][4];
            #pragma unroll
            for (int d = 0; d < AHEAD; d++) ptx_ldmatrix_trans(y[d], vector + (v_at ^ 32 * (d0 + d)));
            if (d0 == 0) {
                #pragma unroll
                for (int x = 0; x < 4; x++) {
                    if (FACTORED && masked) a[x] &= keep[x / 2];
                    a[x] = FACTORED ? N::multiply(a[x], p[x]) : p[x];
                }
            }
            if (FP8) {
                #pragma unroll
                for (int d = 0; d < AHEAD; d++)
                    #pragma unroll
                    for (int x = 0; x < 4; x += 2) {    // even columns of both words in the low half, odd ones in the high half
                        uint32_t y0 = __byte_perm(y[d][x], 0, 0x3120), y1 = __byte_perm(y[d][x + 1], 0, 0x3120), even0, even1, odd0, odd1;
                        if (masked) y0 &= __byte_perm(keep[0], 0, 0x2020), y1 &= __byte_perm(keep[1], 0, 0x2020);
                        ptx_e4m3_to_f16(even0, odd0, y0), ptx_e4m3_to_f16(even1, odd1, y1);
                        N::mma(st.o[4 * (d0 + d) + x], a, even0, even1), N::mma(st.o[4 * (d0 + d) + x + 1], a, odd0, odd1);
                    }
            } else {
                if (masked) {
                    #pragma unroll
                    for (int d = 0; d < AHEAD; d++) y[d][0] &= keep[0], y[d][1] &= keep[1], y[d][2] &= keep[0], y[d][3] &= keep[1];
                }
                #pragma unroll
                for (int d = 0; d < AHEAD; d++) N::mma(st.o[2 * (d0 + d)], a, y[d][0], y[d][1]), N::mma(st.o[2 * (d0 + d) + 1], a, y[d][2], y[d][3]);
            }
        }
    }
}

// The query and head of a row of a tile; query -1: none. Factored: a tile is of one query. Grouped: rows are packed.
struct DecodeRow {
    int query, head;            // head: of its stream
    __device__ DecodeRow(const DecodeArgs &a, int tile, int row) {
        int heads = a.shape.heads, tiles_per_query = ceil_div(heads, 16), flat = tile * 16 + row;
        if (a.n == 1) query = 0, head = flat;
        else if (a.shape.factored) query = tile / tiles_per_query, head = tile % tiles_per_query * 16 + row;
        else query = flat / heads, head = flat % heads;
        if (query >= a.n || head >= heads) query = -1, head = 0;
    }
};

// The runs of pages that thread blocks have. All streams' pages stand in one row, sequence by sequence.
struct DecodeRuns {
    const int *first;           // (B + 1) pages before each sequence, of one stream
    int B, streams, splits;
    int parts, each, more;      // splits 0: `parts` blocks have pages, the first `more` of them each + 1 pages, the others `each`
    __device__ DecodeRuns(const DecodeArgs &a, const DecodePlan &plan, const int *first) : first(first), B(a.B), streams(a.shape.streams), splits(a.splits) {
        unsigned total = first[B] * streams;
        parts = max(min(plan.blocks, (int)(total / (unsigned)plan.min_pages)), 1);
        each = total / (unsigned)parts, more = total - each * parts;
    }
    __device__ int pages(int b) const { return first[b + 1] - first[b]; }
    __device__ int base(int b, int stream) const { return first[b] * streams + stream * pages(b); }
    __device__ static int begin_of(int i, int each, int more) { return i * each + min(i, more); }
    __device__ static int owner_of(unsigned page, unsigned each, unsigned more) {
        unsigned large = more * (each + 1);
        return page < large ? page / (each + 1) : more + (page - large) / each;
    }
    // The run of thread block i: pages begin ... end - 1. Empty: it has nothing to do.
    __device__ void run(int i, int *begin, int *end) const {
        *begin = *end = 0;
        if (splits == 0) {
            if (i < parts) *begin = begin_of(i, each, more), *end = begin_of(i + 1, each, more);
        } else if (i < B * streams * splits) {
            int s = i / splits, part = i % splits, b = s / streams, all = pages(b), n = min(splits, all), from = base(b, s % streams);
            if (part < n) *begin = from + begin_of(part, all / n, all % n), *end = from + begin_of(part + 1, all / n, all % n);
        }
    }
    // The thread block that has a page of that stream.
    __device__ int owner(int b, int stream, int page) const {
        if (splits == 0) return owner_of(page, each, more);
        int all = pages(b), n = min(splits, all);
        return (b * streams + stream) * splits + owner_of(page - base(b, stream), all / n, all % n);
    }
};

// A part of a thread block's run that is of one stream: pages begin ... end - 1 of those base ... base + all - 1.
struct DecodeSegment {
    int b, stream, base, all, end;
    __device__ DecodeSegment(const DecodeRuns &runs, int page, int run_end) {
        int low = 0;
        for (int high = runs.B - 1; low < high; ) {     // the last sequence that begins at or before the page
            int middle = (low + high + 1) / 2;
            if (runs.first[middle] * runs.streams <= page) low = middle;
            else high = middle - 1;
        }
        b = low, all = runs.pages(b);
        stream = runs.streams == 1 ? 0 : (unsigned)(page - runs.base(b, 0)) / (unsigned)all;
        base = runs.base(b, stream), end = min(run_end, base + all);
    }
};

// Floats of what a group of warps, or a thread block, leaves of one stream: o of its tiles as threads hold it, (tile, HS / 8, 32 lanes, 4),
// then top and sum (tile, 16, 2). A unit is 4 numbers of o: unit (tile, j, lane) has columns j of rows lane / 4 and lane / 4 + 8.
__host__ __device__ inline int decode_slot_floats(int tiles, int HS) { return tiles * (16 * HS + 32); }

template <int HS>
struct DecodeUnit {
    float o[4], top[2], sum[2];

    // The sum of unit u over slots `part`, part + lanes ... below n, and over the `lanes` neighbouring lanes that have the other parts. Slot i
    // is at from + i * stride; slot 0 is `late` floats further on. K slots at a time, so that their loads are under way together.
    template <int K, class Load4, class Load2>
    __device__ __forceinline__ void add_up(const float *from, int stride, int late, int part, int lanes, int n, int tiles, int u, Load4 load4, Load2 load2) {
        const int row = u / (HS / 8 * 32) * 16 + u % 32 / 4;
        for (int e = 0; e < 4; e++) o[e] = 0;
        for (int e = 0; e < 2; e++) top[e] = -1e30f, sum[e] = 0;
        #pragma unroll 1
        for (int i0 = 0; i0 < n; i0 += K * lanes) {
            float4 x[K];
            float2 s[K][2];
            float old[2] = {top[0], top[1]};
            #pragma unroll
            for (int k = 0; k < K; k++) {
                int slot = min(i0 + part + k * lanes, n - 1);       // one too many is loaded again and counts nothing
                const float *at = from + (int64_t)slot * stride + (slot == 0 ? late : 0);
                x[k] = load4((const float4 *)at + u);
                s[k][0] = load2((const float2 *)(at + tiles * 16 * HS) + row), s[k][1] = load2((const float2 *)(at + tiles * 16 * HS) + row + 8);
            }
            #pragma unroll
            for (int k = 0; k < K; k++)
                for (int e = 0; e < 2; e++) {
                    if (i0 + part + k * lanes >= n) s[k][e].x = -1e30f, s[k][e].y = 0;
                    top[e] = fmaxf(top[e], s[k][e].x);
                }
            #pragma unroll 1
            for (int l = 1; l < lanes; l *= 2)
                for (int e = 0; e < 2; e++) top[e] = fmaxf(top[e], __shfl_xor_sync(0xffffffff, top[e], l));
            for (int e = 0; e < 2; e++) {
                float keep = ptx_exp2(old[e] - top[e]);
                sum[e] *= keep, o[2 * e] *= keep, o[2 * e + 1] *= keep;
            }
            #pragma unroll
            for (int k = 0; k < K; k++) {
                float take0 = ptx_exp2(s[k][0].x - top[0]), take1 = ptx_exp2(s[k][1].x - top[1]);
                if (i0 + part + k * lanes >= n) take0 = take1 = 0;
                sum[0] += take0 * s[k][0].y, o[0] += take0 * x[k].x, o[1] += take0 * x[k].y;
                sum[1] += take1 * s[k][1].y, o[2] += take1 * x[k].z, o[3] += take1 * x[k].w;
            }
        }
        #pragma unroll 1
        for (int l = 1; l < lanes; l *= 2) {
            for (int e = 0; e < 4; e++) o[e] += __shfl_xor_sync(0xffffffff, o[e], l);
            for (int e = 0; e < 2; e++) sum[e] += __shfl_xor_sync(0xffffffff, sum[e], l);
        }
    }
};

template <class Number, int HS, bool FACTORED, int RANKS>
__global__ void __launch_bounds__(32 * (decode_max_warps(HS) + 1), 1)
decode_kernel(const __grid_constant__ DecodeArgs a, const __grid_constant__ DecodePlan plan) {
    typedef DecodeNumber<Number> N;
    constexpr int EIGHTS = HS / 8, Q_PITCH = HS + 8;                            // of a row of bQ: rows in different banks
    __shared__ struct { int page, first, n, late; } shared[2];      // streams that other blocks share: at most the first and the last
    extern __shared__ __align__(1024) unsigned char smem[];     // as attention.cuh declares it too
    const CacheShape &shape = a.shape;
    const int stage_bytes = plan.stage_pages * plan.page_bytes, slot_floats = decode_slot_floats(plan.tiles, HS);
    const int warps = plan.tiles * plan.groups, warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
    float *merge = (float *)(smem + plan.stages * stage_bytes);                 // (groups) slots
    const bf16 *query_rows = (const bf16 *)(merge + plan.groups * slot_floats); // (queries, query_bytes)
    bf16 *bq = (bf16 *)query_rows + plan.queries * plan.query_bytes / 2;        // FACTORED: (queries, 16, Q_PITCH)
    uint64_t *barriers = (uint64_t *)(bq + (a.q.kind == HEADS_FACTORED ? plan.queries * 16 * Q_PITCH : 0));    // full, free (stages); queries'
    int *first = (int *)(barriers + 2 * plan.stages + 2), *lengths = first + a.B + 1;      // (B + 1), (B)
    auto full = [&](int stage) { return smem_address(barriers + stage); };
    auto free = [&](int stage) { return smem_address(barriers + plan.stages + stage); };
    const uint32_t query_full = smem_address(barriers + 2 * plan.stages), query_free = query_full + 8;

    // Who does what
    if (threadIdx.x == 0) {
        const int fetchers = PTX_BULK_COPIES ? 1 : 32;
        #pragma unroll 1
        for (int i = 0; i < plan.stages; i++) ptx_barrier_init(full(i), fetchers), ptx_barrier_init(free(i), warps);
        ptx_barrier_init(query_full, fetchers), ptx_barrier_init(query_free, warps);
        ptx_barrier_init_fence();
    }
    if (warp == warps) {
        int before = 0;
        #pragma unroll 1
        for (int b0 = 0; b0 < a.B; b0 += 32) {
            int length = b0 + lane < a.B ? a.lengths[b0 + lane] : 0, mine = b0 + lane < a.B ? (length + a.n + PAGE - 1) / PAGE : 0, sum = mine;
            #pragma unroll
            for (int x = 1; x < 32; x *= 2) {
                int y = __shfl_up_sync(0xffffffff, sum, x);
                if (lane >= x) sum += y;
            }
            if (b0 + lane < a.B) first[b0 + lane] = before + sum - mine, lengths[b0 + lane] = length;
            before += __shfl_sync(0xffffffff, sum, 31);
        }
        if (lane == 0) first[a.B] = before;
    }
    __syncthreads();            // barriers, first[] and lengths[] are there
    const DecodeRuns runs(a, plan, first);
    int run_begin, run_end;
    runs.run(blockIdx.x, &run_begin, &run_end);
    int stage = 0;
    uint32_t parity = 0;
    auto advance = [&] { if (++stage == plan.stages) stage = 0, parity ^= 1; };

    const DecodeRow block_row(a, blockIdx.y * plan.tiles, 0);
    const int query0 = max(block_row.query, 0), queries = min(plan.queries, a.n - query0);      // of this chunk
    uint32_t query_parity = 0;
    if (warp == warps) {        // the warp that fetches
        for (int page = run_begin; page < run_end; query_parity ^= 1) {
            const DecodeSegment g(runs, page, run_end);
            const floatX *row = a.fac + ((int64_t)g.b * a.n + query0) * a.Pp + (a.q.kind == HEADS_FACTORED ? 0 : a.q.b + g.stream * shape.heads * HS);
            ptx_barrier_wait(query_free, query_parity ^ 1);     // the first round passes: the phase before phase 0 counts as complete
            ptx_fetch_rows(smem_address(query_rows), (const unsigned char *)row, plan.query_bytes, queries, a.Pp * (int)sizeof(floatX), query_full);
            const unsigned char *from = a.cache + (((int64_t)g.b * shape.streams + g.stream) * a.pages - g.base) * plan.page_bytes;
            #pragma unroll 1
            for (; page < g.end; page += plan.stage_pages) {
                ptx_barrier_wait(free(stage), parity ^ 1);
                ptx_fetch_rows(smem_address(smem + stage * stage_bytes), from + (int64_t)page * plan.page_bytes,
                               min(plan.stage_pages, g.end - page) * plan.page_bytes, 1, 0, full(stage));
                advance();
            }
            page = g.end;
        }
        return;
    }

    // the warps that compute
    const int threads = 32 * warps, tile = warp % plan.tiles, group = warp / plan.tiles, row_tile = blockIdx.y * plan.tiles + tile;
    const int units = plan.tiles * EIGHTS * 32;
    const DecodeRow rows[2] = {DecodeRow(a, row_tile, lane / 4), DecodeRow(a, row_tile, lane / 4 + 8)}, top_row(a, row_tile, 0);
    unsigned *counters = (unsigned *)a.scratch + (int64_t)blockIdx.y * 2 * a.B * shape.streams;
    float *slots = a.scratch + plan.counters + (int64_t)blockIdx.y * plan.blocks * 2 * slot_floats;     // two of each block
    auto store = [&](const DecodeSegment &g, int u, const DecodeUnit<HS> &x) {      // to the output
        const int tile = blockIdx.y * plan.tiles + u / (EIGHTS * 32), j = u / 32 % EIGHTS, holder = u % 32;
        #pragma unroll
        for (int e = 0; e < 2; e++) {
            const DecodeRow row(a, tile, holder / 4 + 8 * e);
            if (row.query < 0) continue;
            floatX *out = a.out + (((int64_t)g.b * a.n + row.query) * a.NH + g.stream * shape.heads + row.head) * HS;
            float unit = __fdividef(plan.out_unit, x.sum[e]);
            out[N::out_place(j, holder % 4 * 2)] = (floatX)(x.o[2 * e] * unit), out[N::out_place(j, holder % 4 * 2 + 1)] = (floatX)(x.o[2 * e + 1] * unit);
        }
    };

    int num_shared = 0;
    #pragma unroll 1
    for (int page = run_begin; page < run_end; ) {
        const DecodeSegment g(runs, page, run_end);
        const int before = lengths[g.b], length = before + a.n, pages = g.end - page;
        DecodeState<HS> st;
        ptx_barrier_wait(query_full, query_parity);
        query_parity ^= 1;
        if (FACTORED && a.q.kind == HEADS_FACTORED) {   // bQ (16, HS) of each query, zeros beyond its ranks, in the places where ldmatrix wants it
            #pragma unroll 4
            for (int i = threadIdx.x; i < queries * 16 * HS; i += threads) {
                int r = i / HS % 16;
                bq[i / HS * Q_PITCH + N::column(i % HS)] = r < a.q.R ? query_rows[i / (16 * HS) * (plan.query_bytes / 2) + a.q.b + r * HS + i % HS] : (bf16)0.0f;
            }
            ptx_named_barrier(1, threads);              // bQ is there
        }
        float c[EIGHTS][4] = {};
        if (group >= pages) {                           // nothing to do for this group
        } else if (FACTORED && a.q.kind == HEADS_FACTORED) {   // aQ (16 heads, 16 ranks) times bQ: a tile is of one query
            uint32_t x[4];
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                const DecodeRow &row = rows[k % 2];
                int r = k / 2 * 8 + 2 * t;
                const bf16 *at = query_rows + (row.query - query0) * (plan.query_bytes / 2) + a.q.a + row.head * a.q.R + r;
                x[k] = ptx_pack_bf16(row.query >= 0 && r < a.q.R ? (float)at[0] : 0, row.query >= 0 && r + 1 < a.q.R ? (float)at[1] : 0);
            }
            const bf16 *mine = bq + (max(top_row.query, query0) - query0) * 16 * Q_PITCH;
            #pragma unroll
            for (int j = 0; j < EIGHTS; j += 2) {
                uint32_t y[4];
                ptx_ldmatrix_trans(y, smem_address(mine + lane % 16 * Q_PITCH + 8 * j + lane / 16 * 8));
                ptx_mma(c[j], x, y[0], y[1]);
                ptx_mma(c[j + 1], x, y[2], y[3]);
            }
        } else {
            #pragma unroll
            for (int j = 0; j < EIGHTS; j++)
                #pragma unroll
                for (int e = 0; e < 2; e++)
                    if (rows[e].query >= 0) {
                        float2 y = decode_unpack_bf16(*(const uint32_t *)(query_rows + (rows[e].query - query0) * (plan.query_bytes / 2) + rows[e].head * HS +
                                                                          N::place(j, 2 * t)));
                        c[j][2 * e] = y.x, c[j][2 * e + 1] = y.y;
                    }
        }
        #pragma unroll
        for (int k = 0; k < HS / 16; k++)
            #pragma unroll
            for (int x = 0; x < 4; x++)
                st.q[k][x] = N::pack(plan.q_unit * c[2 * k + x / 2][x % 2 * 2], plan.q_unit * c[2 * k + x / 2][x % 2 * 2 + 1]);
        __syncwarp();
        if (lane == 0) ptx_barrier_arrive(query_free);
        #pragma unroll
        for (int e = 0; e < 2; e++) st.top[e] = -1e30f, st.sum[e] = 0;
        #pragma unroll
        for (int j = 0; j < EIGHTS; j++) st.o[j][0] = st.o[j][1] = st.o[j][2] = st.o[j][3] = 0;
        // tokens that a row sees; whole pages below the first row's are seen by all rows
        const int sees0 = rows[0].query < 0 ? length : before + rows[0].query + 1, sees1 = rows[1].query < 0 ? length : before + rows[1].query + 1;
        const int all_see = top_row.query < 0 ? 0 : before + top_row.query + 1;
        #pragma unroll 1
        for (; page < g.end; page += plan.stage_pages) {
            const int pages_here = min(plan.stage_pages, g.end - page);
            ptx_barrier_wait(full(stage), parity);
            #pragma unroll 1
            for (int k = group; k < pages_here; k += plan.groups) {
                const int token = (page - g.base + k) * PAGE;
                decode_page<Number, HS, FACTORED, RANKS>(st, smem + stage * stage_bytes + k * plan.page_bytes, shape, plan, top_row.head,
                                                         token + PAGE > all_see, sees0 - token, sees1 - token, length - token);
            }
            __syncwarp();
            if (lane == 0) ptx_barrier_arrive(free(stage));
            advance();
        }
        page = g.end;

        // The groups' sums meet: those of the whole stream are the output, those of a part of it go to a slot of this block.
        float *slot = merge + group * slot_floats;
        if (group < pages) {
            #pragma unroll
            for (int e = 0; e < 2; e++)
                #pragma unroll
                for (int x = 1; x < 4; x *= 2) st.sum[e] += __shfl_xor_sync(0xffffffff, st.sum[e], x);
            #pragma unroll
            for (int j = 0; j < EIGHTS; j++) ((float4 *)slot)[(tile * EIGHTS + j) * 32 + lane] = make_float4(st.o[j][0], st.o[j][1], st.o[j][2], st.o[j][3]);
            float2 *sums = (float2 *)(slot + plan.tiles * 16 * HS) + tile * 16 + lane / 4;
            if (t == 0) sums[0] = make_float2(st.top[0], st.sum[0]), sums[8] = make_float2(st.top[1], st.sum[1]);
        }
        const bool alone = run_begin <= g.base && g.base + g.all <= run_end;
        const int first_block = run_begin <= g.base ? (int)blockIdx.x : runs.owner(g.b, g.stream, g.base);
        int first_begin = run_begin, unused;
        if (first_block != (int)blockIdx.x) runs.run(first_block, &first_begin, &unused);
        const int late = first_begin < g.base;                  // the first block's slot of it is its second
        slot = slots + (int64_t)(2 * blockIdx.x + (run_begin < g.base)) * slot_floats;
        ptx_named_barrier(1, threads);          // all groups' sums are there
        #pragma unroll 1
        for (int u = threadIdx.x; u < units; u += threads) {
            DecodeUnit<HS> x;
            x.template add_up<4>(merge, slot_floats, 0, 0, 1, min(plan.groups, pages), plan.tiles, u, [](const float4 *p) { return *p; },
                                 [](const float2 *p) { return *p; });
            if (alone) store(g, u, x);
            else {
                ((float4 *)slot)[u] = make_float4(x.o[0], x.o[1], x.o[2], x.o[3]);
                float2 *sums = (float2 *)(slot + plan.tiles * 16 * HS) + u / (EIGHTS * 32) * 16 + u % 32 / 4;
                if (u / 32 % EIGHTS == 0 && u % 4 == 0) sums[0] = make_float2(x.top[0], x.sum[0]), sums[8] = make_float2(x.top[1], x.sum[1]);
            }
        }
        if (!alone && threadIdx.x == 0) {
            const int last_block = g.base + g.all <= run_end ? (int)blockIdx.x : runs.owner(g.b, g.stream, g.base + g.all - 1);
            shared[num_shared].page = g.base, shared[num_shared].first = first_block, shared[num_shared].n = last_block - first_block + 1;
            shared[num_shared].late = late;
        }
        ptx_named_barrier(1, threads);          // merge[] and bq[] have been read, the slot and shared[] are written
        if (!alone) {
            if (threadIdx.x == 0) {
                __threadfence();
                atomicAdd(&counters[2 * (g.b * shape.streams + g.stream)], 1u);
            }
            num_shared++;
        }
    }

    // Streams of several blocks: when all have left their sums, each adds up its part of the output.
    #pragma unroll 1
    for (int i = 0; i < num_shared; i++) {
        const DecodeSegment g(runs, shared[i].page, INT32_MAX);
        const int n = shared[i].n, mine = blockIdx.x - shared[i].first, begin = units * mine / n, end = units * (mine + 1) / n;
        unsigned *arrived = &counters[2 * (g.b * shape.streams + g.stream)];
        int lanes = 1;                          // of a unit: each adds up 5 slots, if there are not too many
        while (5 * lanes < n && lanes < 32) lanes *= 2;
        if (threadIdx.x == 0) while (ptx_load_acquire(arrived) < (unsigned)n);
        ptx_named_barrier(1, threads);          // all blocks' sums are there
        #pragma unroll 1
        for (int u0 = begin + warp * (32 / lanes); u0 < end; u0 += warps * (32 / lanes)) {
            const int u = u0 + lane / lanes;
            DecodeUnit<HS> x;
            x.template add_up<5>(slots + (int64_t)2 * shared[i].first * slot_floats, 2 * slot_floats, shared[i].late * slot_floats, lane % lanes, lanes, n,
                                 plan.tiles, min(u, end - 1), [](const float4 *p) { return __ldcg(p); }, [](const float2 *p) { return __ldcg(p); });
            if (u < end && lane % lanes == 0) store(g, u, x);
        }
        if (threadIdx.x == 0 && atomicAdd(arrived + 1, 1u) == (unsigned)n - 1) arrived[0] = arrived[1] = 0;      // for the next launch
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

// How the fast kernel would do it, for what this GPU has. stages 0: it cannot.
inline DecodePlan decode_plan(const CacheShape &s, const Heads &q, int B, int n, int splits, int min_pages) {
    DecodePlan p = {};
    int device, processors, smem;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    CUDA_CHECK(cudaDeviceGetAttribute(&smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    if (sizeof(floatX) != 2 || (s.HS != 64 && s.HS != 128) || s.number_bytes > 2) return p;
    if (q.kind == HEADS_FACTORED && (q.R > 16 || !s.factored)) return p;
    auto tiles_of = [&](int n) { return s.factored ? n * ceil_div(s.heads, 16) : ceil_div(n * s.heads, 16); };
    int tiles = tiles_of(n), per_query = ceil_div(s.heads, 16);
    p.chunks = ceil_div(tiles, (int)DECODE_MAX_TILES), p.tiles = ceil_div(tiles, p.chunks);
    p.counters = 2 * round_up(ceil_div(tiles_of(DECODE_MAX_QUERIES), (int)DECODE_MAX_TILES) * B * s.streams, 2);   // 16 bytes
    p.groups = decode_max_warps(s.HS) / p.tiles < 8 ? decode_max_warps(s.HS) / p.tiles : 8;
    p.queries = s.factored ? (p.tiles - 1 + per_query - 1) / per_query + 1 : (p.tiles * 16 - 1 + s.heads - 1) / s.heads + 1;    // wherever it begins
    if (p.queries > n) p.queries = n;
    p.query_bytes = (int)round_up(q.kind == HEADS_FACTORED ? (q.b + q.R * s.HS) * 2 : s.heads * s.HS * 2, 16);
    p.q_unit = (float)(q.scale * 1.4426950408889634 / sqrt((double)s.HS) / (s.factored ? s.RK : 1));
    p.out_unit = 1.0f / (s.factored ? s.RV : 1);
    p.page_bytes = (int)cache_page_bytes(s);
    p.k_b = cache_b_start(s, CACHE_K), p.v_a = cache_a_start(s, CACHE_V), p.v_b = cache_b_start(s, CACHE_V), p.scales = cache_scale(s, CACHE_K, 0);
    smem -= 1024;               // the kernel's static memory
    int rest = smem - p.groups * decode_slot_floats(p.tiles, s.HS) * 4 - p.queries * p.query_bytes -
               (q.kind == HEADS_FACTORED ? p.queries * 16 * (s.HS + 8) * 2 : 0) - (2 * B + 1) * 4 - 256;      // barriers
    // a page for each group in a stage, twice that where pages are small; as many stages as there is room for
    p.stage_pages = p.groups;
    while (p.stage_pages * p.page_bytes < 16 << 10) p.stage_pages += p.groups;
    while (p.stage_pages > 1 && p.stage_pages * p.page_bytes * 3 > rest) p.stage_pages--;
    p.stages = rest / (p.stage_pages * p.page_bytes) < 8 ? rest / (p.stage_pages * p.page_bytes) : 8;
    if (p.stages < 2) p.stages = 0;
    p.blocks = processors / p.chunks > 0 ? processors / p.chunks : 1;
    if (splits > 0 && (int64_t)B * s.streams * splits < p.blocks) p.blocks = B * s.streams * splits;
    p.min_pages = min_pages > 0 ? min_pages : (p.groups + 1) / 2;
    p.smem_bytes = (size_t)(smem - rest) + (size_t)p.stages * p.stage_pages * p.page_bytes;
    return p;
}

// Scratch of flashtpa_decode for B sequences and up to n queries, to be zeroed once. It serves one shape and B.
inline size_t decode_scratch_bytes(const CacheShape &s, const Heads &q, int B, int n) {
    size_t most = 16;
    for (int k = 1; k <= n; k++) {
        DecodePlan p = decode_plan(s, q, B, k, 0, 0);
        size_t bytes = ((size_t)p.chunks * p.blocks * 2 * decode_slot_floats(p.tiles, s.HS) + p.counters) * sizeof(float);
        if (bytes > most) most = bytes;
    }
    return most;
}

template <class Number, int HS>
inline void decode_launch_(const DecodeArgs &a, const DecodePlan &plan, cudaStream_t stream) {
    auto kernel = !a.shape.factored ? decode_kernel<Number, HS, false, 1>
                : a.shape.RK == 1 && a.shape.RV == 1 ? decode_kernel<Number, HS, true, 1>
                : a.shape.RK == 2 && a.shape.RV == 2 ? decode_kernel<Number, HS, true, 2> : decode_kernel<Number, HS, true, 0>;
    CUDA_CHECK(cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)plan.smem_bytes));
    cudaLaunchAttribute cooperative = {};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)plan.blocks, (unsigned)plan.chunks), config.blockDim = dim3(32 * (plan.tiles * plan.groups + 1));
    config.dynamicSmemBytes = plan.smem_bytes, config.stream = stream, config.attrs = &cooperative, config.numAttrs = 1;
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, a, plan));
}

// out of B sequences' last n tokens, 1 <= n <= 16, whose factors stand in the cache and, those of q rotated, in fac.
// splits: 0, or as many thread blocks a stream at most, where that many run at once.
inline void flashtpa_decode(DecodeArgs a, cudaStream_t stream) {
    if (a.B < 1 || a.n < 1 || a.n > DECODE_MAX_QUERIES || a.q.R < 1)
        die(EXIT_SYSTEM, "flashtpa_decode: B=%d queries=%d rank %d: need at least 1 of each, and at most %d queries", a.B, a.n, a.q.R,
            (int)DECODE_MAX_QUERIES);
    DecodePlan plan = decode_plan(a.shape, a.q, a.B, a.n, a.splits, a.min_pages);
    if (plan.stages == 0) return decode_plain(a, stream);
    if ((int64_t)a.B * a.shape.streams * a.splits > plan.blocks) a.splits = 0, plan = decode_plan(a.shape, a.q, a.B, a.n, 0, a.min_pages);
    if constexpr (sizeof(floatX) == 2) {
        if (a.shape.number_bytes == 1 && a.shape.HS == 64) decode_launch_<e4m3, 64>(a, plan, stream);
        else if (a.shape.number_bytes == 1) decode_launch_<e4m3, 128>(a, plan, stream);
        else if (a.shape.HS == 64) decode_launch_<bf16, 64>(a, plan, stream);
        else decode_launch_<bf16, 128>(a, plan, stream);
    }
}

#endif
