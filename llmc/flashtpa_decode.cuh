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
// registers, laid out as the next product wants them. Groups of warps share a thread block's pages out. One warp fetches queries and pages
// into shared memory, pages into a ring.
//
// Thread blocks come in clusters, of 16 where there are few sequences. All sequences' pages stand in one row, and each cluster has one run of
// it, equal to a page, whatever the lengths; its blocks share out each sequence's part of the run, and add up their sums in each other's shared
// memory, every block a slice of the output. A sequence of several clusters: they leave their slices in global memory, and the cluster
// that comes last to a slice adds it up, in one order, so the bits are the same every time. A short sequence is a matter of
// latency: what a thread block does once counts as much as what it does for every page.
// Source: ours; the equations are the paper's.
#ifndef LLMC_FLASHTPA_DECODE_CUH
#define LLMC_FLASHTPA_DECODE_CUH

#include "factor_cache.cuh"
#include "ptx.cuh"

enum {
    DECODE_MAX_TILES = 8,       // of 16 rows, in a thread block: 128 heads
    DECODE_MAX_QUERIES = 16,
    DECODE_MAX_CLUSTER = 16
};
// Warps that compute; one more fetches. With it they are a multiple of four: a quarter of a multiprocessor shares its registers evenly.
__host__ __device__ constexpr int decode_max_warps(int HS) { return HS == 64 ? 15 : 11; }

// The kernel begins while the one launched before it ends: that one may write the queries and their tokens' factors, but neither lengths nor
// what the cache holds of the tokens before.
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
    int cluster;                // thread blocks in a cluster: 1, 2, 4, 8 or 16; 0: chosen
    int splits;                 // clusters a stream, at most; 0: chosen
    int min_pages;              // with splits 0: fewer pages than this are not worth a cluster of their own; 0: chosen
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
    int cluster, cluster_log2, clusters;        // thread blocks in each, and how many
    int min_pages;                  // of a cluster, where there are not enough for all
    int counters;                   // at the head of the scratch, one a slice of a stream and chunk, for as many chunks as there can be
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

    // the first of v, so that they come while p is made
    constexpr int V_AHEAD = RANKS == 1 ? AHEAD : 0;
    uint32_t v_weights[4], v_first[AHEAD][4];
    if (V_AHEAD) {
        if (FACTORED) load_weights(v_weights, page + plan.v_a, 0);
        #pragma unroll
        for (int d = 0; d < AHEAD; d++) ptx_ldmatrix_trans(v_first[d], page + plan.v_b + (v_at ^ 32 * d));
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
        if (FACTORED && V_AHEAD && r == 0) memcpy(a, v_weights, sizeof a);
        else if (FACTORED) load_weights(a, page + plan.v_a, r);
        #pragma unroll
        for (int d0 = 0; d0 < LOADS; d0 += AHEAD) {
            uint32_t y[AHEAD][4];
            #pragma unroll
            for (int d = 0; d < AHEAD; d++) {
                if (V_AHEAD && r == 0 && d0 == 0) memcpy(y[d], v_first[d], sizeof y[d]);
                else ptx_ldmatrix_trans(y[d], vector + (v_at ^ 32 * (d0 + d)));
            }
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

// Things shared out among n: the i-th's begin here where each has `each` and the first `more` one more.
__host__ __device__ inline int decode_share(int i, int each, int more) { return i * each + (i < more ? i : more); }

// The runs of pages that clusters have. All streams' pages stand in one row, sequence by sequence.
struct DecodeRuns {
    const int *first;           // (B + 1) pages before each sequence, of one stream
    int B, streams, splits, stream_total;
    int parts, each, more;      // splits 0: `parts` clusters have pages, the first `more` of them each + 1 pages, the others `each`
    __device__ DecodeRuns(const DecodeArgs &a, const DecodePlan &plan, const int *first, int stream_total)
        : first(first), B(a.B), streams(a.shape.streams), splits(a.splits), stream_total(stream_total) {
        const unsigned total = stream_total * streams;
        parts = total >= 2u * (unsigned)plan.min_pages ? min(plan.clusters, (int)(total / (unsigned)plan.min_pages)) : 1;
        each = parts == 1 ? total : total / (unsigned)parts, more = total - each * parts;
    }
    __device__ int pages(int b) const { return B == 1 ? stream_total : first[b + 1] - first[b]; }
    __device__ int base(int b, int stream) const { return (B == 1 ? 0 : first[b] * streams) + stream * pages(b); }
    __device__ static int owner_of(unsigned page, unsigned each, unsigned more) {
        unsigned large = more * (each + 1);
        return page < large ? page / (each + 1) : more + (page - large) / each;
    }
    // The run of cluster i: pages begin ... end - 1. Empty: it has nothing to do.
    __device__ void run(int i, int *begin, int *end) const {
        *begin = *end = 0;
        if (splits == 0) {
            if (i < parts) *begin = decode_share(i, each, more), *end = decode_share(i + 1, each, more);
        } else if (i < B * streams * splits) {
            int s = i / splits, part = i % splits, b = s / streams, all = pages(b), n = min(splits, all), from = base(b, s % streams);
            if (part < n) *begin = from + decode_share(part, all / n, all % n), *end = from + decode_share(part + 1, all / n, all % n);
        }
    }
    // The cluster that has a page of that stream.
    __device__ int owner(int b, int stream, int page) const {
        if (splits == 0) return owner_of(page, each, more);
        int all = pages(b), n = min(splits, all);
        return (b * streams + stream) * splits + owner_of(page - base(b, stream), all / n, all % n);
    }
};

// The part of a cluster's run, from `page` on, that is of one stream: it ends before `end`. The stream's pages are base ... base + all - 1.
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

// What the fetching warp tells the others of a stream's part that their cluster has.
struct DecodePart {
    int b, stream;              // b -1: there is none
    int before;                 // the sequence's tokens before the queries
    int page, pages;            // of the stream: the first that this block has, and how many
    int sharers;                // blocks of the cluster that have pages
    int slot;                   // of global memory, where the cluster leaves its sums if it is not alone
    int clusters, first_slot;   // that have pages of the stream; where the first of them leaves its sums, the i-th following at (first_slot / 2 + i) * 2
    int last;                   // the cluster has no further part
};

// Sums are added up by units of 4 numbers of o: unit k of row pair p (rows p % 8 and p % 8 + 8 of tile p / 8) is what a thread has of o[k / 4], the
// thread k % 4 of those that have these rows. Between blocks a row pair is a record, its HS / 2 units and then its tops and sums, 16 bytes each.
struct DecodeUnit {
    float o[4], top[2], sum[2];

    __device__ float4 numbers() const { return make_float4(o[0], o[1], o[2], o[3]); }
    __device__ float4 sums() const { return make_float4(top[0], sum[0], top[1], sum[1]); }

    // A warp's sums of n records, a unit a lane: numbers(slot) is the lane's unit, sums(slot, e) top and sum of the pair's row e. K at a time, so that
    // their loads are under way together.
    template <int K, class Numbers, class Sums>
    __device__ __forceinline__ void add_up(int n, Numbers numbers, Sums sums) {
        const int lane = threadIdx.x % 32;
        float all_top = -1e30f, all_sum = 0;                // of row lane / 16; lane % 16 looks after one slot
        for (int e = 0; e < 4; e++) o[e] = 0;
        #pragma unroll 1
        for (int i = 0; i < n; i += K) {
            const float2 s = lane % 16 < min(K, n - i) ? sums(i + lane % 16, lane / 16) : make_float2(-1e30f, 0);
            float4 x[K];
            #pragma unroll
            for (int k = 0; k < K; k++) x[k] = numbers(min(i + k, n - 1));      // one too many has no weight
            const float new_top = fmaxf(all_top, warp_max<16>(s.x)), keep = ptx_exp2(all_top - new_top), weight = ptx_exp2(s.x - new_top);
            all_sum = all_sum * keep + warp_sum<16>(weight * s.y), all_top = new_top;
            for (int e = 0; e < 4; e++) o[e] *= __shfl_sync(0xffffffff, keep, e / 2 * 16);
            #pragma unroll
            for (int k = 0; k < K; k++) {
                const float weight0 = __shfl_sync(0xffffffff, weight, k), weight1 = __shfl_sync(0xffffffff, weight, 16 + k);
                o[0] += weight0 * x[k].x, o[1] += weight0 * x[k].y, o[2] += weight1 * x[k].z, o[3] += weight1 * x[k].w;
            }
        }
        for (int e = 0; e < 2; e++) top[e] = __shfl_sync(0xffffffff, all_top, e * 16), sum[e] = __shfl_sync(0xffffffff, all_sum, e * 16);
    }
};

// 16-byte places of what a group of warps leaves in shared memory: o (tile, HS / 8, 32 lanes and 4 unused, so that reading a row pair meets
// different banks).
__host__ __device__ inline int decode_group_places(int tiles, int HS) { return tiles * (HS / 8) * 36; }
// Of the tops and sums of all groups, (pair, 8 groups) pairs of floats each, and the block's tops.
__host__ __device__ inline int decode_sums_places(int tiles) { return tiles * 8 * (4 + 4) + tiles * 4; }
// Of a record, and of a slot of global memory, a cluster's records of a stream.
__host__ __device__ constexpr int decode_record_places(int HS) { return HS / 2 + 1; }
__host__ __device__ inline int decode_slot_places(int tiles, int HS) { return tiles * 8 * decode_record_places(HS); }
// Pairs, at most, that a block of the cluster adds up: those whose number is its rank, modulo the cluster's size.
__host__ __device__ inline int decode_own_pairs(const DecodePlan &plan) { return (plan.tiles * 8 + plan.cluster - 1) >> plan.cluster_log2; }
// Of the inbox, records that the cluster's blocks send a block: (cluster, own pairs).
__host__ __device__ inline int decode_inbox_places(const DecodePlan &plan, int HS) {
    return plan.cluster == 1 ? 0 : plan.cluster * decode_own_pairs(plan) * decode_record_places(HS);
}

template <class Number, int HS, bool FACTORED, int RANKS>
__global__ void __launch_bounds__(32 * (decode_max_warps(HS) + 1), 1)
decode_kernel(const __grid_constant__ DecodeArgs a, const __grid_constant__ DecodePlan plan) {
    typedef DecodeNumber<Number> N;
    constexpr int EIGHTS = HS / 8, UNITS = HS / 2, RECORD = decode_record_places(HS), Q_PITCH = HS + 8;     // of a row of bQ: rows in different banks
    __shared__ DecodePart parts[2];
    __shared__ int is_last;
    extern __shared__ __align__(1024) unsigned char smem[];     // as attention.cuh declares it too
    const CacheShape &shape = a.shape;
    const bool factored_q = FACTORED && a.q.kind == HEADS_FACTORED;
    const int stage_bytes = plan.stage_pages * plan.page_bytes, group_places = decode_group_places(plan.tiles, HS), pairs = plan.tiles * 8;
    const int warps = plan.tiles * plan.groups, warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
    float4 *merge = (float4 *)(smem + plan.stages * stage_bytes);               // (groups, group_places)
    float2 *tops = (float2 *)(merge + plan.groups * group_places), *sums = tops + pairs * 8, *block_tops = sums + pairs * 8;
    float4 *inbox = (float4 *)(block_tops + pairs);
    const bf16 *query_rows = (const bf16 *)(inbox + decode_inbox_places(plan, HS));     // (queries, query_bytes)
    bf16 *bq = (bf16 *)query_rows + plan.queries * plan.query_bytes / 2;        // factored_q: (queries, 16, Q_PITCH)
    uint64_t *barriers = (uint64_t *)(bq + (factored_q ? plan.queries * 16 * Q_PITCH : 0));     // full, free (stages), and five more
    int *first = (int *)(barriers + 2 * plan.stages + 5), *lengths = first + a.B + 1;      // (B + 1), (B)
    auto full = [&](int stage) { return smem_address(barriers + stage); };
    auto free = [&](int stage) { return smem_address(barriers + plan.stages + stage); };
    const uint32_t query_full = smem_address(barriers + 2 * plan.stages), query_free = query_full + 8, part_full = query_full + 16;
    const uint32_t sums_full = query_full + 24, sums_free = query_full + 32;    // the inbox is full; all blocks of the cluster have read theirs
    const int rank = ptx_cluster_rank(), cluster = blockIdx.x >> plan.cluster_log2;
    const int query0 = max(DecodeRow(a, blockIdx.y * plan.tiles, 0).query, 0), queries = min(plan.queries, a.n - query0);      // of this chunk
    int stage = 0;
    uint32_t parity = 0;
    auto advance = [&] { if (++stage == plan.stages) stage = 0, parity ^= 1; };

    ptx_let_next_begin();
    if (warp == warps) {
        if (lane == 0) {
            const int fetchers = PTX_BULK_COPIES ? 1 : 32;
            #pragma unroll 1
            for (int i = 0; i < plan.stages; i++) ptx_barrier_init(full(i), fetchers), ptx_barrier_init(free(i), warps);
            ptx_barrier_init(query_full, fetchers), ptx_barrier_init(query_free, warps), ptx_barrier_init(part_full, 1);
            ptx_barrier_init(sums_full, 1), ptx_barrier_init(sums_free, plan.cluster);
            ptx_barrier_init_fence();
        }
        __syncwarp();
    } else {
        if (factored_q)                     // bQ's rows beyond the ranks stay zero
            for (int i = threadIdx.x; i < queries * 16 * Q_PITCH; i += 32 * warps) bq[i] = 0.0f;
        for (int i = threadIdx.x; i < pairs * 8; i += 32 * warps) tops[i] = make_float2(-1e30f, -1e30f), sums[i] = make_float2(0, 0);  // as groups that are not
    }
    ptx_cluster_arrive();
    __syncthreads();            // barriers and zeros are there
    ptx_cluster_wait();         // and the barriers of the cluster's other blocks

    // The warp that fetches
    if (warp == warps) {
        auto fetch_queries = [&](int b, int stream) {
            const floatX *row = a.fac + ((int64_t)b * a.n + query0) * a.Pp + (a.q.kind == HEADS_FACTORED ? 0 : a.q.b + stream * shape.heads * HS);
            ptx_fetch_rows(smem_address(query_rows), (const unsigned char *)row, plan.query_bytes, queries, a.Pp * (int)sizeof(floatX), query_full);
        };
        int total = 0;
        #pragma unroll 1
        for (int b0 = 0; b0 < a.B; b0 += 32) {
            int length = b0 + lane < a.B ? a.lengths[b0 + lane] : 0, mine = b0 + lane < a.B ? (length + a.n + PAGE - 1) / PAGE : 0, sum = mine;
            #pragma unroll
            for (int x = 1; x < 32; x *= 2) {
                int y = __shfl_up_sync(0xffffffff, sum, x);
                if (lane >= x) sum += y;
            }
            if (b0 + lane < a.B) first[b0 + lane] = total + sum - mine, lengths[b0 + lane] = length;
            total += __shfl_sync(0xffffffff, sum, 31);
        }
        if (lane == 0) first[a.B] = total;
        __syncwarp();
        const DecodeRuns runs(a, plan, first, total);
        int run_begin, run_end;
        runs.run(cluster, &run_begin, &run_end);
        if (run_begin == run_end) {                         // nothing to do
            ptx_wait_for_previous();
            fetch_queries(0, 0);
            if (lane == 0) parts[0].b = -1, ptx_barrier_arrive(part_full);
            return;
        }
        #pragma unroll 1
        for (int page = run_begin, i = 0; page < run_end; i++) {
            const DecodeSegment g(runs, page, run_end);
            const unsigned char *from = a.cache + (((int64_t)g.b * shape.streams + g.stream) * a.pages - g.base) * plan.page_bytes;
            const int all = g.end - page, each = all >> plan.cluster_log2, more = all & (plan.cluster - 1);
            int mine = page + decode_share(rank, each, more);
            const int begin = mine, end = page + decode_share(rank + 1, each, more);
            auto fetch = [&] {
                ptx_barrier_wait(free(stage), parity ^ 1);
                ptx_fetch_rows(smem_address(smem + stage * stage_bytes), from + (int64_t)mine * plan.page_bytes,
                               min(plan.stage_pages, end - mine) * plan.page_bytes, 1, 0, full(stage));
                mine += plan.stage_pages;
                advance();
            };
            if (i == 0) {       // as much as there is room for, of pages that are complete, while the kernel before ends
                const int complete = min(end, g.base + lengths[g.b] / PAGE);
                for (int k = 0; k < plan.stages && mine + plan.stage_pages <= complete; k++) fetch();
                ptx_wait_for_previous();
            }
            ptx_barrier_wait(query_free, i % 2 ^ 1);        // the first round passes: the phase before phase 0 counts as complete
            fetch_queries(g.b, g.stream);
            DecodePart part = {g.b, g.stream, lengths[g.b], begin - g.base, end - begin, min(all, plan.cluster), 2 * cluster + (run_begin < g.base), 1, 0, g.end == run_end};
            if (run_begin > g.base || g.base + g.all > run_end) {
                const int first_cluster = runs.owner(g.b, g.stream, g.base);
                int first_begin, unused;
                runs.run(first_cluster, &first_begin, &unused);
                part.clusters = runs.owner(g.b, g.stream, g.base + g.all - 1) - first_cluster + 1;
                part.first_slot = 2 * first_cluster + (first_begin < g.base);   // the second of a cluster that has a stream before
            }
            if (lane == 0) parts[i % 2] = part, ptx_barrier_arrive(part_full);
            #pragma unroll 1
            while (mine < end) fetch();
            page = g.end;
        }
        return;
    }

    // The warps that compute
    const int threads = 32 * warps, tile = warp % plan.tiles, group = warp / plan.tiles, row_tile = blockIdx.y * plan.tiles + tile;
    const int pair = tile * 8 + lane / 4, own_pairs = rank < pairs ? ((pairs - 1 - rank) >> plan.cluster_log2) + 1 : 0, inbox_pairs = decode_own_pairs(plan);
    const DecodeRow rows[2] = {DecodeRow(a, row_tile, lane / 4), DecodeRow(a, row_tile, lane / 4 + 8)}, top_row(a, row_tile, 0);
    const int slot_places = decode_slot_places(plan.tiles, HS);
    float4 *slots = (float4 *)(a.scratch + plan.counters) + (int64_t)blockIdx.y * plan.clusters * 2 * slot_places;     // two of each cluster
    auto store = [&](const DecodePart &part, int pair, int k, const DecodeUnit &x) {     // to the output
        #pragma unroll
        for (int e = 0; e < 2; e++) {
            const DecodeRow row(a, blockIdx.y * plan.tiles + pair / 8, pair % 8 + 8 * e);
            if (row.query < 0) continue;
            floatX *out = a.out + (((int64_t)part.b * a.n + row.query) * a.NH + part.stream * shape.heads + row.head) * HS;
            float unit = __fdividef(plan.out_unit, x.sum[e]);
            out[N::out_place(k / 4, k % 4 * 2)] = (floatX)(x.o[2 * e] * unit), out[N::out_place(k / 4, k % 4 * 2 + 1)] = (floatX)(x.o[2 * e + 1] * unit);
        }
    };

    #pragma unroll 1
    for (int i = 0; ; i++) {
        // The queries
        DecodeState<HS> st;
        float c[EIGHTS][4] = {};
        ptx_barrier_wait(query_full, i % 2);
        if (factored_q) {                   // aQ (16 heads, 16 ranks) times bQ: a tile is of one query. bQ goes where ldmatrix wants it.
            constexpr int LANES = HS / 4;       // of a row, 4 elements each
            #pragma unroll 1
            for (int r = threadIdx.x / LANES; r < queries * a.q.R; r += threads / LANES) {
                const int query = a.n == 1 ? 0 : r / a.q.R, row = r - query * a.q.R, d = threadIdx.x % LANES * 4;
                const bf16 *from = query_rows + query * (plan.query_bytes / 2) + a.q.b + row * HS + d;
                __nv_bfloat162 y[2] = {{from[0], from[1]}, {from[2], from[3]}}, *to = (__nv_bfloat162 *)(bq + (query * 16 + row) * Q_PITCH);
                to[N::column(d) / 2] = y[0], to[N::column(d + 2) / 2] = y[1];
            }
            uint32_t x[4];
            #pragma unroll
            for (int e = 0; e < 2; e++) {
                const bf16 *from = query_rows + (max(rows[e].query, query0) - query0) * (plan.query_bytes / 2) + a.q.a + rows[e].head * a.q.R;
                #pragma unroll
                for (int k = 0; k < 2; k++) {
                    const int r = 8 * k + 2 * t;
                    __nv_bfloat162 y(r < a.q.R ? from[r] : (bf16)0.0f, r + 1 < a.q.R ? from[r + 1] : (bf16)0.0f);
                    memcpy(&x[2 * k + e], &y, 4);
                }
            }
            ptx_named_barrier(1, threads);  // bQ is there
            const uint32_t from = smem_address(bq + ((max(top_row.query, query0) - query0) * 16 + lane % 16) * Q_PITCH + lane / 16 * 8);
            #pragma unroll
            for (int j = 0; j < EIGHTS; j += 2) {
                uint32_t y[4];
                ptx_ldmatrix_trans(y, from + 16 * j);
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

        // The pages
        ptx_barrier_wait(part_full, i % 2);
        const DecodePart &part = parts[i % 2];
        if (part.b < 0) break;
        const int before = part.before, length = before + a.n, pages = part.pages;
        #pragma unroll
        for (int e = 0; e < 2; e++) st.top[e] = -1e30f, st.sum[e] = 0;
        #pragma unroll
        for (int j = 0; j < EIGHTS; j++) st.o[j][0] = st.o[j][1] = st.o[j][2] = st.o[j][3] = 0;
        // tokens that a row sees; whole pages below the first row's are seen by all rows
        const int sees0 = rows[0].query < 0 ? length : before + rows[0].query + 1, sees1 = rows[1].query < 0 ? length : before + rows[1].query + 1;
        const int all_see = top_row.query < 0 ? 0 : before + top_row.query + 1;
        #pragma unroll 1
        for (int page = 0; page < pages; page += plan.stage_pages) {
            const int pages_here = min(plan.stage_pages, pages - page);
            ptx_barrier_wait(full(stage), parity);
            #pragma unroll 1
            for (int k = group; k < pages_here; k += plan.groups) {
                const int token = (part.page + page + k) * PAGE;
                decode_page<Number, HS, FACTORED, RANKS>(st, smem + stage * stage_bytes + k * plan.page_bytes, shape, plan, top_row.head,
                                                         token + PAGE > all_see, sees0 - token, sees1 - token, length - token);
            }
            __syncwarp();
            if (lane == 0) ptx_barrier_arrive(free(stage));
            advance();
        }

        // The sums of the block's groups of warps meet, brought to one top; then those of the cluster's blocks, each of which adds up its own pairs;
        // then those of all clusters that have pages of the stream. `finish` is for the last of these steps.
        auto finish = [&](int pair, int k, const DecodeUnit &x) {
            if (part.clusters == 1) return store(part, pair, k, x);
            float4 *record = slots + (int64_t)part.slot * slot_places + pair * RECORD;
            record[k] = x.numbers();
            if (k == 0) record[UNITS] = x.sums();
        };
        if (t == 0) tops[pair * 8 + group] = make_float2(st.top[0], st.top[1]);
        if (plan.cluster > 1) {
            if (threadIdx.x == 0) ptx_barrier_arrive_expect(sums_full, part.sharers * own_pairs * RECORD * 16);
            if (i > 0) ptx_cluster_barrier_wait(sums_free, i % 2 ^ 1);      // what was sent for the stream before has been read
        }
        ptx_named_barrier(1, threads);      // all groups' tops are there
        float2 top = make_float2(-1e30f, -1e30f);
        #pragma unroll
        for (int k = 0; k < 4; k++) {
            float4 x = ((const float4 *)(tops + pair * 8))[k];
            top.x = fmaxf(top.x, fmaxf(x.x, x.z)), top.y = fmaxf(top.y, fmaxf(x.y, x.w));
        }
        const float shrink0 = ptx_exp2(st.top[0] - top.x), shrink1 = ptx_exp2(st.top[1] - top.y);
        #pragma unroll
        for (int j = 0; j < EIGHTS; j++)
            merge[group * group_places + (tile * EIGHTS + j) * 36 + lane] =
                make_float4(st.o[j][0] * shrink0, st.o[j][1] * shrink0, st.o[j][2] * shrink1, st.o[j][3] * shrink1);
        #pragma unroll
        for (int e = 0; e < 2; e++)
            #pragma unroll
            for (int x = 1; x < 4; x *= 2) st.sum[e] += __shfl_xor_sync(0xffffffff, st.sum[e], x);
        if (t == 0) sums[pair * 8 + group] = make_float2(st.sum[0] * shrink0, st.sum[1] * shrink1);
        if (t == 0 && group == 0) block_tops[pair] = top;
        ptx_named_barrier(1, threads);      // all groups' sums are there
        #pragma unroll 1
        for (int w = pages > 0 ? warp : pairs * (UNITS / 32); w < pairs * (UNITS / 32); w += warps) {      // a unit a lane
            const int pair = w / (UNITS / 32), k = w % (UNITS / 32) * 32 + lane;
            const float4 *from = merge + (pair / 8 * EIGHTS + k / 4) * 36 + pair % 8 * 4 + k % 4;
            DecodeUnit x = {{0, 0, 0, 0}, {block_tops[pair].x, block_tops[pair].y}, {0, 0}};
            #pragma unroll
            for (int g = 0; g < 4; g++) {
                const float4 y = ((const float4 *)(sums + pair * 8))[g];
                x.sum[0] += y.x + y.z, x.sum[1] += y.y + y.w;
            }
            float4 y[8];
            #pragma unroll
            for (int g = 0; g < 8; g++) y[g] = from[min(g, plan.groups - 1) * group_places];
            #pragma unroll
            for (int g = 0; g < 8; g++) {
                const float there = g < plan.groups ? 1 : 0;
                x.o[0] += there * y[g].x, x.o[1] += there * y[g].y, x.o[2] += there * y[g].z, x.o[3] += there * y[g].w;
            }
            if (plan.cluster == 1) finish(pair, k, x);
            else {
                const int owner = pair & (plan.cluster - 1);
                const uint32_t to = ptx_cluster_address(smem_address(inbox + (rank * inbox_pairs + (pair >> plan.cluster_log2)) * RECORD), owner);
                const uint32_t barrier = ptx_cluster_address(sums_full, owner);
                ptx_cluster_send(to + k * 16, x.numbers(), barrier);
                if (k == 0) ptx_cluster_send(to + UNITS * 16, x.sums(), barrier);
            }
        }
        if (plan.cluster > 1) {
            ptx_cluster_barrier_wait(sums_full, i % 2);
            #pragma unroll 1
            for (int w = warp; w < own_pairs * (UNITS / 32); w += warps) {
                const int own = w / (UNITS / 32), k = w % (UNITS / 32) * 32 + lane, stride = inbox_pairs * RECORD;
                const float4 *from = inbox + own * RECORD;
                DecodeUnit x;
                x.add_up<16>(part.sharers, [&](int slot) { return from[slot * stride + k]; },
                         [&](int slot, int e) { return ((const float2 *)(from + slot * stride + UNITS))[e]; });
                finish((own << plan.cluster_log2) + rank, k, x);
            }
        }
        if (part.last && part.clusters == 1) break;
        ptx_named_barrier(1, threads);      // tops, sums, merge and the inbox have been read, the slot is written
        if (plan.cluster > 1 && !part.last && threadIdx.x < plan.cluster) ptx_cluster_barrier_arrive(ptx_cluster_address(sums_free, threadIdx.x));
        if (part.clusters > 1) {
            if (threadIdx.x == 0) {
                unsigned *arrived = (unsigned *)a.scratch + (((int64_t)blockIdx.y * a.B + part.b) * shape.streams + part.stream) * plan.cluster + rank;
                __threadfence();
                is_last = atomicAdd(arrived, 1u) == (unsigned)part.clusters - 1;
                if (is_last) *arrived = 0;  // for the next launch
                __threadfence();
            }
            ptx_named_barrier(1, threads);  // is_last is there
            #pragma unroll 1
            for (int w = is_last ? warp : own_pairs * (UNITS / 32); w < own_pairs * (UNITS / 32); w += warps) {
                const int pair = (w / (UNITS / 32) << plan.cluster_log2) + rank, k = w % (UNITS / 32) * 32 + lane;
                const float4 *from = slots + pair * RECORD;
                auto place = [&](int slot) { return (int64_t)(slot == 0 ? part.first_slot : (part.first_slot / 2 + slot) * 2) * slot_places; };
                DecodeUnit x;
                x.add_up<8>(part.clusters, [&](int slot) { return __ldcg(from + place(slot) + k); },
                         [&](int slot, int e) { return __ldcg((const float2 *)(from + place(slot) + UNITS) + e); });
                store(part, pair, k, x);
            }
            if (part.last) break;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

__global__ void decode_probe_kernel() {}

// Clusters of so many thread blocks that this GPU runs at once, where a block fills a multiprocessor: not all groups of multiprocessors
// divide by that. Asked once, as it takes long.
inline int decode_clusters(int cluster) {
    static int known[17];
    if (!known[cluster]) {
        known[cluster] = device_attribute(cudaDevAttrMultiProcessorCount);
        if (cluster > 1) {
            const int smem = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
            CUDA_CHECK(cudaFuncSetAttribute((const void *)decode_probe_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
            CUDA_CHECK(cudaFuncSetAttribute((const void *)decode_probe_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
            cudaLaunchAttribute attribute = {};
            attribute.id = cudaLaunchAttributeClusterDimension, attribute.val.clusterDim = {(unsigned)cluster, 1, 1};
            cudaLaunchConfig_t config = {};
            config.gridDim = dim3((unsigned)cluster), config.blockDim = dim3(512), config.dynamicSmemBytes = smem, config.attrs = &attribute, config.numAttrs = 1;
            CUDA_CHECK(cudaOccupancyMaxActiveClusters(&known[cluster], decode_probe_kernel, &config));
        }
    }
    return known[cluster];
}

// How the fast kernel would do it, for what this GPU has. stages 0: it cannot.
inline DecodePlan decode_plan(const CacheShape &s, const Heads &q, int B, int n, int cluster, int splits, int min_pages) {
    DecodePlan p = {};
    int smem = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    if (sizeof(floatX) != 2 || (s.HS != 64 && s.HS != 128) || s.number_bytes > 2) return p;
    if (q.kind == HEADS_FACTORED && (q.R > 16 || !s.factored)) return p;
    auto tiles_of = [&](int n) { return s.factored ? n * ceil_div(s.heads, 16) : ceil_div(n * s.heads, 16); };
    int tiles = tiles_of(n), per_query = ceil_div(s.heads, 16);
    p.chunks = ceil_div(tiles, (int)DECODE_MAX_TILES), p.tiles = ceil_div(tiles, p.chunks);
    // the largest clusters of which there are enough for all streams
    p.cluster = cluster > 0 ? cluster : device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? 16 : 1;
    while (cluster == 0 && p.cluster > 1 && decode_clusters(p.cluster) < B * s.streams * p.chunks) p.cluster /= 2;
    p.clusters = splits > 0 ? B * s.streams * splits : decode_clusters(p.cluster) / p.chunks > 0 ? decode_clusters(p.cluster) / p.chunks : 1;
    while (1 << p.cluster_log2 < p.cluster) p.cluster_log2++;
    p.counters = (int)round_up(ceil_div(tiles_of(DECODE_MAX_QUERIES), (int)DECODE_MAX_TILES) * B * s.streams * DECODE_MAX_CLUSTER, 4);   // 16 bytes
    p.groups = decode_max_warps(s.HS) / p.tiles < 8 ? decode_max_warps(s.HS) / p.tiles : 8;
    p.queries = s.factored ? (p.tiles - 1 + per_query - 1) / per_query + 1 : (p.tiles * 16 - 1 + s.heads - 1) / s.heads + 1;    // wherever it begins
    if (p.queries > n) p.queries = n;
    p.query_bytes = (int)round_up(q.kind == HEADS_FACTORED ? (q.b + q.R * s.HS) * 2 : s.heads * s.HS * 2, 16);
    p.q_unit = (float)(q.scale * 1.4426950408889634 / sqrt((double)s.HS) / (s.factored ? s.RK : 1));
    p.out_unit = 1.0f / (s.factored ? s.RV : 1);
    p.page_bytes = (int)cache_page_bytes(s);
    p.k_b = cache_b_start(s, CACHE_K), p.v_a = cache_a_start(s, CACHE_V), p.v_b = cache_b_start(s, CACHE_V), p.scales = cache_scale(s, CACHE_K, 0);
    smem -= 1024;               // the kernel's static memory
    int rest = smem - (p.groups * decode_group_places(p.tiles, s.HS) + decode_sums_places(p.tiles) + decode_inbox_places(p, s.HS)) * 16 - p.queries * p.query_bytes -
               (q.kind == HEADS_FACTORED ? p.queries * 16 * (s.HS + 8) * 2 : 0) - (2 * B + 1) * 4 - 256;      // barriers
    // a page for each group in a stage, twice that where pages are small; as many stages as there is room for
    p.stage_pages = p.groups;
    while (p.stage_pages * p.page_bytes < 16 << 10) p.stage_pages += p.groups;
    while (p.stage_pages > 1 && p.stage_pages * p.page_bytes * 3 > rest) p.stage_pages--;
    p.stages = rest / (p.stage_pages * p.page_bytes) < 8 ? rest / (p.stage_pages * p.page_bytes) : 8;
    if (p.stages < 2 && p.cluster > 1) return decode_plan(s, q, B, n, 1, splits, min_pages);      // no room for the inbox
    if (p.stages < 2) p.stages = 0;
    p.min_pages = min_pages > 0 ? min_pages : p.cluster > 1 ? 16 * p.cluster : (p.groups + 1) / 2;
    p.smem_bytes = (size_t)(smem - rest) + (size_t)p.stages * p.stage_pages * p.page_bytes;
    return p;
}

// Scratch of flashtpa_decode for B sequences and up to n queries, to be zeroed once. It serves one shape, B, cluster and splits.
inline size_t decode_scratch_bytes(const CacheShape &s, const Heads &q, int B, int n, int cluster = 0, int splits = 0) {
    size_t most = 16;
    for (int k = 1; k <= n; k++) {
        DecodePlan p = decode_plan(s, q, B, k, cluster, splits, 0);
        size_t bytes = (size_t)p.chunks * p.clusters * 2 * decode_slot_places(p.tiles, s.HS) * 16 + p.counters * sizeof(float);
        if (bytes > most) most = bytes;
    }
    return most;
}

template <class Number, int HS>
inline void decode_launch_(const DecodeArgs &a, const DecodePlan &plan, cudaStream_t stream) {
    auto kernel = !a.shape.factored ? decode_kernel<Number, HS, false, 1>
                : a.shape.RK == 1 && a.shape.RV == 1 ? decode_kernel<Number, HS, true, 1>
                : a.shape.RK == 2 && a.shape.RV == 2 ? decode_kernel<Number, HS, true, 2> : decode_kernel<Number, HS, true, 0>;
    Launch where(dim3((unsigned)(plan.clusters * plan.cluster), (unsigned)plan.chunks), 32 * (plan.tiles * plan.groups + 1), plan.smem_bytes, stream);
    where.cluster = plan.cluster, where.early = true;
    launch(kernel, where, a, plan);
}

// out of B sequences' last n tokens, 1 <= n <= 16, whose factors stand in the cache and, those of q rotated, in fac.
inline void flashtpa_decode(const DecodeArgs &a, cudaStream_t stream) {
    if (a.B < 1 || a.n < 1 || a.n > DECODE_MAX_QUERIES || a.q.R < 1)
        die(EXIT_SYSTEM, "flashtpa_decode: B=%d queries=%d rank %d: need at least 1 of each, and at most %d queries", a.B, a.n, a.q.R,
            (int)DECODE_MAX_QUERIES);
    DecodePlan plan = decode_plan(a.shape, a.q, a.B, a.n, a.cluster, a.splits, a.min_pages);
    if (plan.stages == 0) return decode_plain(a, stream);
    if constexpr (sizeof(floatX) == 2) {
        if (a.shape.number_bytes == 1 && a.shape.HS == 64) decode_launch_<e4m3, 64>(a, plan, stream);
        else if (a.shape.number_bytes == 1) decode_launch_<e4m3, 128>(a, plan, stream);
        else if (a.shape.HS == 64) decode_launch_<bf16, 64>(a, plan, stream);
        else decode_launch_<bf16, 128>(a, plan, stream);
    }
}

#endif
