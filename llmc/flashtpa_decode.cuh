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
// A warp takes a page of 16 tokens, the rows of mma.sync, and a tile of up to 40 columns, heads of one query (grouped: pairs of query and
// head). So what it reads of the page, and in e4m3 converts, serves all these heads; L and p stay in registers, p turned round once. Groups of
// warps, one for each tile, take a thread block's pages in turn. One warp more fetches pages, and all queries but the first, into shared memory,
// each group's pages into a ring of its own, and tells the others what to do.
//
// Thread blocks come in clusters, of 8 where there are few sequences, of 16 where these are short. All sequences' pages stand in one row, and each
// cluster has one run of it, equal to a page, whatever the lengths; its blocks share out each sequence's part of the run, and add up their sums in
// each other's shared memory, every block a slice of the output. A sequence of several clusters: they leave their slices in global memory, and the
// cluster that comes last to a slice adds it up, in one order, so the bits are the same every time. No cluster waits for another.
//
// A short sequence is a matter of latency: what a thread block does once counts as much as what it does for every page. And of few sequences that are
// short most of the GPU would have nothing to do: then heads are shared out among clusters too (16, or 8 columns of a grouped kind, to each).
// Source: ours; the equations are the paper's.
#ifndef LLMC_FLASHTPA_DECODE_CUH
#define LLMC_FLASHTPA_DECODE_CUH

#include "factor_cache.cuh"
#include "ptx.cuh"

enum {
    DECODE_MAX_COLUMNS = 128,   // in a thread block
    DECODE_MAX_QUERIES = 16,
    DECODE_MAX_CLUSTER = 16,
    DECODE_SHORT_PAGES = 512    // a stream that has room for no more is short
};

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
    int eights;                     // of columns in a tile
    int chunks, tiles, groups;      // chunks (blockIdx.y) of the columns; tiles in a chunk; groups of warps, one for each tile
    int queries, query_bytes;       // of a chunk, at most; what is fetched of each: the factors of q, or the rows of the stream's heads
    int depth;                      // pages of a group in shared memory: its ring
    int cluster, cluster_log2, clusters;        // thread blocks in each, and how many
    int min_pages;                  // of a cluster, where there are not enough for all
    int counters;                   // at the head of the scratch
    int page_bytes, k_b, v_a, v_b, scales;     // of a page: its size, and where its parts begin (aK at 0)
    float q_unit, out_unit;         // what q is multiplied by, so that p = 2^(q k), and the sum of p v
    size_t smem_bytes;
} DecodePlan;

// What a number type needs. Along a summed index element order is free, and so is that of a page's tokens, if all agree.
// bf16: of 16 elements 2t, 2t + 1, 8 + 2t and 8 + 2t + 1 are thread t's of a quad, as the instruction counts; likewise tokens.
// e4m3, turned into fp16 on the way (exactly): elements 4t ... 4t + 3, because these four are one 32-bit word; of v's product rows g and g + 8 are
// elements 2g and 2g + 1. Tokens 2g and 2g + 1 come in one word too; one of them is in the first half of the page's rows, 0 2 4 6 9 11 13 15,
// the other in the second, 1 3 5 7 8 10 12 14: eight in different banks (cache_b_chunk).
template <class Number> struct DecodeNumber;

template <> struct DecodeNumber<bf16> {
    static __device__ uint32_t pack(float x, float y) { return ptx_pack_bf16(x, y); }
    static __device__ float2 unpack(uint32_t x) { return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000)); }
    static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { ptx_mma(c, a, b0, b1); }
    static __device__ uint32_t multiply(uint32_t x, uint32_t y) { return ptx_mul_bf16(x, y); }
    static __device__ int column(int d) { return d; }                           // where q has element d
    static __device__ int token(int half, int i) { return 8 * half + i; }       // row i of a half of the page
    static __device__ int element(int tile, int g, int e) { return 16 * tile + g + 8 * e; }    // of v's product
};
template <> struct DecodeNumber<e4m3> {
    static __device__ uint32_t pack(float x, float y) { return ptx_pack_f16(x, y); }
    static __device__ float2 unpack(uint32_t x) {
        __half2_raw h = {(unsigned short)x, (unsigned short)(x >> 16)};
        return __half22float2(__half2(h));
    }
    static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { ptx_mma_f16(c, a, b0, b1); }
    static __device__ uint32_t multiply(uint32_t x, uint32_t y) { return ptx_mul_f16(x, y); }
    static __device__ int column(int d) { return d / 16 * 16 + d / 2 % 2 * 8 + d / 4 % 4 * 2 + d % 2; }
    static __device__ int token(int half, int i) { return 2 * i + (i < 4 ? half : 1 - half); }
    static __device__ int element(int tile, int g, int e) { return 16 * tile + 2 * g + e; }
};

// What a warp keeps of a tile's columns: a thread's are 2t and 2t + 1 of each eight.
template <int HS, int EIGHTS>
struct DecodeState {
    float top[EIGHTS][2], sum[EIGHTS][2];       // sum: of the thread's own tokens
    float o[EIGHTS][HS / 16][4];                // (elements g and g + 8 of 16) x columns
};

// Warps that compute; one more fetches. Few, as each has its columns' q, o and what comes next in registers. ranks: of the kernel, 0: any.
__host__ __device__ constexpr int decode_warps(int HS, int eights, int ranks) { return HS == 64 && eights <= 2 && ranks > 0 ? 9 : 7; }

static constexpr float DECODE_SLACK = 4;    // the running maximum follows only when it is outgrown by 2^this: few pages do
__host__ __device__ constexpr int decode_q_pitch(int HS) { return HS + 8; }    // of a row of q or bQ in shared memory: rows in different banks
__host__ __device__ constexpr bool decode_q_stays(int HS) { return HS == 64; }          // in registers, of which there are enough

// q of two steps of 16 elements, of one eight of columns, as mma wants it; `from`: of the eight's first column.
template <int HS>
__device__ __forceinline__ void decode_load_q(uint32_t (&q)[4], const bf16 *from, int step) {
    const int lane = threadIdx.x % 32;
    ptx_ldmatrix(q, smem_address(from + lane % 8 * decode_q_pitch(HS) + 16 * step + lane / 8 * 8));
}

// Where in a page a lane reads. With HS 64 there are registers to keep that in, though the compiler would make it anew for every page: hence asm.
template <class Number, int HS, int RANKS>
struct DecodeLane {
    typedef DecodeNumber<Number> N;
    static constexpr int VECTOR_BYTES = PAGE * HS * (int)sizeof(Number), LOADS = HS * (int)sizeof(Number) / 32, R = RANKS ? RANKS : 1;
    uint32_t k[LOADS], v[LOADS];        // of the first vectors; the next are VECTOR_BYTES further
    uint32_t k_weights[R], v_weights[R];        // of the tile's first eight heads
    uint32_t scales[2];

    __device__ DecodeLane(const CacheShape &shape, const DecodePlan &plan, int head) {
        const int lane = threadIdx.x % 32, bytes = sizeof(Number);
        // A load is four matrices: (half, chunk of 16 bytes) = 00 10 01 11 of k, 00 01 10 11 of v. Further loads are 32 bytes along each, which
        // in permuted chunks is ^ 32 (cache_b_chunk).
        const int k_token = N::token(lane / 8 % 2, lane % 8), v_token = N::token(lane / 16, lane % 8);
        for (int i = 0; i < LOADS; i++) {
            k[i] = plan.k_b + (k_token * HS * bytes + cache_b_chunk(bytes, HS, k_token, lane / 16) * 16 ^ 32 * i);
            v[i] = plan.v_b + (v_token * HS * bytes + cache_b_chunk(bytes, HS, v_token, lane / 8 % 2) * 16 ^ 32 * i);
            if (HS == 64) asm volatile("" : "+r"(k[i]), "+r"(v[i]));
        }
        for (int r = 0; r < R; r++) {
            k_weights[r] = weights(shape, head, r), v_weights[r] = plan.v_a + weights(shape, head, r);
            if (HS == 64) asm volatile("" : "+r"(k_weights[r]), "+r"(v_weights[r]));
        }
        for (int x = 0; x < 2; x++) {
            scales[x] = plan.scales + N::token(x, lane / 4) * 4;
            if (HS == 64 && bytes == 1) asm volatile("" : "+r"(scales[x]));
        }
    }
    // Of rank r's weights, from where they begin. bf16: a load is 16 heads; the next is 512 bytes further, as they have their chunks in the
    // same order (cache_a_chunk). e4m3: 32 heads.
    __device__ static int weights(const CacheShape &shape, int head, int r) {
        const int lane = threadIdx.x % 32, row = r * shape.heads + head + (sizeof(Number) == 1 ? lane : lane / 16 * 8 + lane % 8);
        return row * PAGE * (int)sizeof(Number) + (sizeof(Number) == 1 ? 0 : cache_a_chunk(2, row, lane / 8 % 2) * 16);
    }
};

// A page in shared memory. q_tile: the tile's queries, (columns, pitch); q_kept: the same in registers, where it stays. head: the tile's first.
// masked: a column of query i (columns: the thread's) sees only the first sees + i tokens of the page, of which `live` exist; what lies in the
// others may be NaN, and is zeroed. FACTORED: there are weights; RANKS: of k and v, 0: any.
//
// e4m3: with scales K, V of a token, logits are K s. The weights that its v get, p V, are found as one power of two of K s + log2 V, and
// kept below it by a running maximum of that, so that they fit fp16; p itself, for the sum, is that over V.
template <class Number, int HS, int EIGHTS, bool FACTORED, int RANKS>
__device__ __forceinline__ void decode_page(DecodeState<HS, EIGHTS> &st, const bf16 *q_tile, const uint32_t (&q_kept)[EIGHTS][HS / 32][4],
                                            unsigned char *page_pointer, const DecodeLane<Number, HS, RANKS> &at, const CacheShape &shape,
                                            const DecodePlan &plan, int head, bool masked, const int2 *columns, int sees, int live) {
    typedef DecodeNumber<Number> N;
    typedef DecodeLane<Number, HS, RANKS> Lane;
    constexpr bool FP8 = sizeof(Number) == 1;
    constexpr int VECTOR_BYTES = Lane::VECTOR_BYTES, LOADS = Lane::LOADS;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t page = smem_address(page_pointer);
    const int RK = RANKS ? RANKS : shape.RK, RV = RANKS ? RANKS : shape.RV;
    const int tokens[2] = {N::token(0, g), N::token(1, g)};
    // w[n][half]: k's: of the thread's token of each half, its columns of eight n, in a word; v's: of column g, its tokens of each half.
    // What a load brings beyond the tile's heads is not used.
    auto load_weights = [&](uint32_t (&w)[EIGHTS][2], int r, bool of_k) {
        const uint32_t from = page + (RANKS ? (of_k ? at.k_weights : at.v_weights)[RANKS ? r : 0]
                                            : (of_k ? 0 : plan.v_a) + Lane::weights(shape, head, r));
        if (FP8) {
            const int order = (of_k ? g < 4 : t < 2) ? 0x3120 : 0x2031;     // which half each of the bytes is of
            #pragma unroll
            for (int n = 0; n < EIGHTS; n += 4) {
                uint32_t y[4];
                if (of_k) ptx_ldmatrix_trans(y, from + n * 8 * PAGE);
                else ptx_ldmatrix(y, from + n * 8 * PAGE);
                #pragma unroll
                for (int i = 0; i < 4 && n + i < EIGHTS; i++) ptx_e4m3_to_f16(w[n + i][0], w[n + i][1], __byte_perm(y[i], 0, order));
            }
        } else {
            #pragma unroll
            for (int n = 0; n < EIGHTS; n += 2) {
                uint32_t y[4];
                if (of_k) ptx_ldmatrix_trans(y, from + n * 8 * PAGE * 2);
                else ptx_ldmatrix(y, from + n * 8 * PAGE * 2);
                w[n][0] = y[0], w[n][1] = y[1];
                if (n + 1 < EIGHTS) w[n + 1][0] = y[2], w[n + 1][1] = y[3];
            }
        }
    };

    // s = logits; [n][e] of tokens[e / 2] and column e % 2
    float s[EIGHTS][4] = {};
    #pragma unroll
    for (int r = 0; r < RK; r++) {
        float c[EIGHTS][4] = {};
        uint32_t y[LOADS][4], w[EIGHTS][2];
        #pragma unroll
        for (int k = 0; k < LOADS; k++) ptx_ldmatrix(y[k], page + at.k[k] + r * VECTOR_BYTES);
        if (FACTORED) load_weights(w, r, true);
        #pragma unroll
        for (int k = 0; k < HS / 32; k++) {             // two steps of 16 elements
            uint32_t a[2][4];
            if (FP8) {
                #pragma unroll
                for (int x = 0; x < 4; x++) ptx_e4m3_to_f16(a[x / 2][x % 2], a[x / 2][x % 2 + 2], y[k][x]);
            } else memcpy(a, y[2 * k], sizeof a);
            #pragma unroll
            for (int n = 0; n < EIGHTS; n++) {
                uint32_t q[4];
                if (decode_q_stays(HS)) memcpy(q, q_kept[n][k], sizeof q);
                else decode_load_q<HS>(q, q_tile + 8 * n * decode_q_pitch(HS), 2 * k);
                N::mma(c[n], a[0], q[0], q[1]);
                N::mma(c[n], a[1], q[2], q[3]);
            }
        }
        #pragma unroll
        for (int n = 0; n < EIGHTS; n++)
            #pragma unroll
            for (int e = 0; e < 4; e += 2) {
                const float2 y = FACTORED ? N::unpack(w[n][e / 2]) : make_float2(1, 1);
                s[n][e] = FACTORED ? fmaf(y.x, c[n][e], s[n][e]) : c[n][e];
                s[n][e + 1] = FACTORED ? fmaf(y.y, c[n][e + 1], s[n][e + 1]) : c[n][e + 1];
            }
    }
    float per_v[2];             // e4m3: 1 / V
    if (FP8) {
        #pragma unroll
        for (int x = 0; x < 2; x++) {
            const float *scale = (const float *)(page_pointer + at.scales[x]);
            const float log2_v = __log2f(scale[PAGE]), k = scale[0];
            per_v[x] = ptx_exp2(-log2_v);
            #pragma unroll
            for (int n = 0; n < EIGHTS; n++) s[n][2 * x] = fmaf(s[n][2 * x], k, log2_v), s[n][2 * x + 1] = fmaf(s[n][2 * x + 1], k, log2_v);
        }
    }
    if (masked) {
        #pragma unroll
        for (int n = 0; n < EIGHTS; n++) {
            const int4 queries = *(const int4 *)(columns + 8 * n);          // (query, head) of both columns
            #pragma unroll
            for (int e = 0; e < 4; e++) if (tokens[e / 2] >= sees + max(e % 2 ? queries.z : queries.x, 0)) s[n][e] = -INFINITY;
        }
        if (FP8)
            #pragma unroll
            for (int x = 0; x < 2; x++) if (tokens[x] >= live) per_v[x] = 0;
        if (live < PAGE) {      // zeroes v, which p = 0 would not make 0; so does each warp of the group, before it reads it
            constexpr int ROW = HS * (int)sizeof(Number);
            const int dead = PAGE - live, all = RV * dead;
            #pragma unroll 1
            for (int i = lane; FACTORED && i < shape.heads * all; i += 32)
                *(Number *)(page_pointer + cache_a(shape, CACHE_V, 0, i / dead, live + i % dead)) = Number(0);
            #pragma unroll 1
            for (int i = lane; i < all * (ROW / 16); i += 32)
                *(int4 *)(page_pointer + plan.v_b + (i % all / dead * PAGE + live + i % dead) * ROW + i / all * 16) = make_int4(0, 0, 0, 0);
            ptx_copies_after();
            __syncwarp();
        }
    }

    // the first of v, so that they come while p is made
    uint32_t v_weights[EIGHTS][2], v_first[LOADS][4];
    if (FACTORED) load_weights(v_weights, 0, false);
    #pragma unroll
    for (int d = 0; d < LOADS; d++) ptx_ldmatrix_trans(v_first[d], page + at.v[d]);

    // s = p, and its sum
    bool outgrown = false;
    #pragma unroll
    for (int n = 0; n < EIGHTS; n++)
        #pragma unroll
        for (int e = 0; e < 2; e++) outgrown |= fmaxf(s[n][e], s[n][e + 2]) > st.top[n][e] + DECODE_SLACK;
    if (__any_sync(0xffffffff, outgrown)) {
        #pragma unroll
        for (int n = 0; n < EIGHTS; n++)
            #pragma unroll
            for (int e = 0; e < 2; e++) {
                float top = fmaxf(s[n][e], s[n][e + 2]);
                #pragma unroll
                for (int x = 4; x < 32; x *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, x));
                top = fmaxf(top, st.top[n][e]);
                const float shrink = ptx_exp2(st.top[n][e] - top);
                st.top[n][e] = top, st.sum[n][e] *= shrink;
                #pragma unroll
                for (int m = 0; m < HS / 16; m++) st.o[n][m][e] *= shrink, st.o[n][m][e + 2] *= shrink;
            }
    }
    uint32_t p[EIGHTS][2];      // [half]: of column g, the thread's tokens of the half
    #pragma unroll
    for (int n = 0; n < EIGHTS; n++) {
        #pragma unroll
        for (int e = 0; e < 4; e++) s[n][e] = ptx_exp2(s[n][e] - st.top[n][e % 2]);
        #pragma unroll
        for (int e = 0; e < 2; e++) st.sum[n][e] += FP8 ? fmaf(s[n][e], per_v[0], s[n][e + 2] * per_v[1]) : s[n][e] + s[n][e + 2];
        p[n][0] = ptx_transpose(N::pack(s[n][0], s[n][1])), p[n][1] = ptx_transpose(N::pack(s[n][2], s[n][3]));
    }

    // o += bV (p aV)
    #pragma unroll
    for (int r = 0; r < RV; r++) {
        uint32_t b[EIGHTS][2], v[LOADS][4];
        if (r == 0) memcpy(b, v_weights, sizeof b), memcpy(v, v_first, sizeof v);
        else {
            if (FACTORED) load_weights(b, r, false);
            #pragma unroll
            for (int d = 0; d < LOADS; d++) ptx_ldmatrix_trans(v[d], page + at.v[d] + r * VECTOR_BYTES);
        }
        #pragma unroll
        for (int n = 0; n < EIGHTS; n++)
            #pragma unroll
            for (int x = 0; x < 2; x++) b[n][x] = FACTORED ? N::multiply(b[n][x], p[n][x]) : p[n][x];
        #pragma unroll
        for (int d = 0; d < LOADS; d++) {
            constexpr int TILES = FP8 ? 2 : 1;          // of 16 elements in a load
            uint32_t a[TILES][4];
            if (FP8) {
                #pragma unroll
                for (int x = 0; x < 4; x++) ptx_e4m3_to_f16(a[x % TILES][x / 2 * 2], a[x % TILES][x / 2 * 2 + 1], __byte_perm(v[d][x], 0, 0x3120));
            } else memcpy(a[0], v[d], sizeof v[d]);
            #pragma unroll
            for (int m = 0; m < TILES; m++)
                #pragma unroll
                for (int n = 0; n < EIGHTS; n++) N::mma(st.o[n][TILES * d + m], a[m], b[n][0], b[n][1]);
        }
    }
}

// The query and head of a column of a tile; query -1: none. Factored: a tile is of one query. Grouped: columns are packed.
__device__ inline int2 decode_column(const DecodeArgs &a, int width, int tile, int column) {
    const int heads = a.shape.heads, tiles_per_query = ceil_div(heads, width), flat = tile * width + column;
    int2 x = a.n == 1 ? make_int2(0, flat) : a.shape.factored ? make_int2(tile / tiles_per_query, tile % tiles_per_query * width + column)
                                                              : make_int2(flat / heads, flat % heads);
    return x.x >= a.n || x.y >= heads ? make_int2(-1, 0) : x;
}

// Things shared out among n: the i-th's begin here where each has `each` and the first `more` one more.
__host__ __device__ inline int decode_share(int i, int each, int more) { return i * each + (i < more ? i : more); }

// The runs of pages that clusters have. All streams' pages stand in one row, sequence by sequence.
struct DecodeRuns {
    const int *first;           // (B + 1) pages before each sequence, of one stream
    int B, streams, splits;
    int parts, each, more;      // splits 0: `parts` clusters have pages, the first `more` of them each + 1 pages, the others `each`
    __device__ DecodeRuns(const DecodeArgs &a, const DecodePlan &plan, const int *first)
        : first(first), B(a.B), streams(a.shape.streams), splits(a.splits) {
        const unsigned total = first[B] * streams;
        parts = min(plan.clusters, max((int)(total / (unsigned)plan.min_pages), B * streams));      // no fewer than streams, if there are so many
        each = total / (unsigned)parts, more = total - each * parts;
    }
    __device__ int pages(int b) const { return first[b + 1] - first[b]; }
    __device__ int base(int b, int stream) const { return first[b] * streams + stream * pages(b); }
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
    int groups;                 // that have pages: no more than is needed for as few turns
    int slot;                   // of global memory, where the cluster leaves its sums if it is not alone
    int clusters, first_slot;   // that have pages of the stream; the first's slot, the i-th after it having (first_slot / 2 + i) * 2
    int last;                   // the cluster has no further part
};

// Sums are added up by units of 4 numbers of o. Pair p is columns 2p and 2p + 1 of the chunk; its unit k, of both columns elements g and g + 8 of
// sixteen k / 8, is what thread g = k % 8 of those that have these columns has. Between blocks a pair is a record: its HS / 2 units, and then its
// tops and sums, 16 bytes each.
struct DecodeUnit {
    float o[4], top[2], sum[2];

    __device__ float4 numbers() const { return make_float4(o[0], o[1], o[2], o[3]); }
    __device__ float4 sums() const { return make_float4(top[0], sum[0], top[1], sum[1]); }

    // A warp's sums of n records, a unit a lane: numbers(slot) is the lane's unit, sums(slot, e) top and sum of the pair's column e.
    template <class Numbers, class Sums>
    __device__ __forceinline__ void add_up(int n, Numbers numbers, Sums sums) {
        constexpr int K = 8;                                // loads of numbers are under way together
        const int lane = threadIdx.x % 32;
        float4 x[K];
        auto load = [&](int from) {
            #pragma unroll
            for (int k = 0; k < K; k++) x[k] = numbers(min(from + k, n - 1));       // one too many has no weight
        };
        float all_top = -1e30f, all_sum = 0;                // of column lane / 16; lane % 16 looks after one slot
        for (int e = 0; e < 4; e++) o[e] = 0;
        #pragma unroll 1
        for (int i = 0; i < n; i += 16) {
            load(i);
            const float2 s = i + lane % 16 < n ? sums(i + lane % 16, lane / 16) : make_float2(-INFINITY, 0);
            const float new_top = fmaxf(all_top, warp_max<16>(s.x)), keep = ptx_exp2(all_top - new_top), weight = ptx_exp2(s.x - new_top);
            all_sum = all_sum * keep + warp_sum<16>(weight * s.y), all_top = new_top;
            if (i > 0) for (int e = 0; e < 4; e++) o[e] *= __shfl_sync(0xffffffff, keep, e / 2 * 16);
            #pragma unroll 1
            for (int k0 = 0; k0 < min(16, n - i); k0 += K) {
                if (k0 > 0) load(i + k0);
                #pragma unroll
                for (int k = 0; k < K; k++) {
                    const float weight0 = __shfl_sync(0xffffffff, weight, k0 + k), weight1 = __shfl_sync(0xffffffff, weight, 16 + k0 + k);
                    o[0] += weight0 * x[k].x, o[1] += weight0 * x[k].y, o[2] += weight1 * x[k].z, o[3] += weight1 * x[k].w;
                }
            }
        }
        for (int e = 0; e < 2; e++) top[e] = __shfl_sync(0xffffffff, all_top, e * 16), sum[e] = __shfl_sync(0xffffffff, all_sum, e * 16);
    }
};

__host__ __device__ inline int decode_pairs(const DecodePlan &plan) { return plan.tiles * plan.eights * 4; }
// 16-byte places of what a group of warps leaves in shared memory: o (tile, eight, HS / 16, 32), then tops and sums (pair).
__host__ __device__ inline int decode_group_places(const DecodePlan &plan, int HS) { return plan.tiles * plan.eights * HS * 2 + decode_pairs(plan); }
// Of a record, and of a slot of global memory, a cluster's records of a stream.
__host__ __device__ constexpr int decode_record_places(int HS) { return HS / 2 + 1; }
__host__ __device__ inline int decode_slot_places(const DecodePlan &plan, int HS) { return decode_pairs(plan) * decode_record_places(HS); }
// Pairs, at most, that a block of the cluster adds up: those whose number is its rank, modulo the cluster's size.
__host__ __device__ inline int decode_own_pairs(const DecodePlan &plan) { return (decode_pairs(plan) + plan.cluster - 1) >> plan.cluster_log2; }
// Of the inbox, records that the cluster's blocks send a block: (cluster, own pairs).
__host__ __device__ inline int decode_inbox_places(const DecodePlan &plan, int HS) {
    return plan.cluster == 1 ? 0 : plan.cluster * decode_own_pairs(plan) * decode_record_places(HS);
}

template <class Number, int HS, int EIGHTS, bool FACTORED, int RANKS>
__global__ void __launch_bounds__(32 * (decode_warps(HS, EIGHTS, RANKS) + 1), 1)
decode_kernel(const __grid_constant__ DecodeArgs a, const __grid_constant__ DecodePlan plan) {
    typedef DecodeNumber<Number> N;
    constexpr int WARPS = decode_warps(HS, EIGHTS, RANKS), WIDTH = 8 * EIGHTS, UNITS = HS / 2;
    constexpr int RECORD = decode_record_places(HS), PITCH = decode_q_pitch(HS);
    __shared__ DecodePart parts[2];
    __shared__ int is_last;
    extern __shared__ __align__(1024) unsigned char smem[];     // as attention.cuh declares it too
    const CacheShape &shape = a.shape;
    const bool factored_q = FACTORED && a.q.kind == HEADS_FACTORED;
    const int group_places = decode_group_places(plan, HS), pairs = decode_pairs(plan);
    const int warps = plan.tiles * plan.groups, threads = 32 * warps, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int places = plan.groups * plan.depth;                                // of pages; a group's are its own, so that it sees all their phases
    float4 *merge = (float4 *)(smem + places * plan.page_bytes);                // (groups, group_places)
    float4 *block_sums = merge + plan.groups * group_places;                    // (pairs) tops and sums of the block
    float2 *weights = (float2 *)(block_sums + pairs);                           // (pairs, WARPS)
    float4 *inbox = (float4 *)(weights + pairs * WARPS);                        // (cluster, own pairs, record)
    int2 *columns = (int2 *)(inbox + decode_inbox_places(plan, HS));            // (tiles, WIDTH): query and head
    bf16 *q = (bf16 *)(columns + plan.tiles * WIDTH);                           // (tiles, WIDTH, PITCH)
    const bf16 *query_rows = q + plan.tiles * WIDTH * PITCH;                    // (queries, query_bytes)
    bf16 *bq = (bf16 *)query_rows + plan.queries * plan.query_bytes / 2;        // factored_q: (queries, 16, PITCH)
    uint64_t *barriers = (uint64_t *)(bq + (factored_q ? plan.queries * 16 * PITCH : 0));   // full, free (places), and five more
    int *first = (int *)(barriers + 2 * places + 5), *lengths = first + a.B + 1;        // (B + 1), (B)
    auto full = [&](int place) { return smem_address(barriers + place); };
    auto free = [&](int place) { return smem_address(barriers + places + place); };
    const uint32_t query_full = smem_address(barriers + 2 * places), query_free = query_full + 8, part_full = query_full + 16;
    const uint32_t sums_full = query_full + 24, sums_free = query_full + 32;    // the inbox is full; all blocks of the cluster have read theirs
    const int rank = ptx_cluster_rank(), cluster = blockIdx.x >> plan.cluster_log2;
    const int own_pairs = rank < pairs ? ((pairs - 1 - rank) >> plan.cluster_log2) + 1 : 0, inbox_bytes = plan.cluster * own_pairs * RECORD * 16;
    const int query0 = max(decode_column(a, WIDTH, blockIdx.y * plan.tiles, 0).x, 0), queries = min(plan.queries, a.n - query0);      // of this chunk

    auto fetch_queries = [&](int b, int stream) {      // by a warp
        const floatX *row = a.fac + ((int64_t)b * a.n + query0) * a.Pp + (a.q.kind == HEADS_FACTORED ? 0 : a.q.b + stream * shape.heads * HS);
        ptx_fetch_rows(smem_address(query_rows), (const unsigned char *)row, plan.query_bytes, queries, a.Pp * (int)sizeof(floatX), query_full);
    };

    ptx_let_next_begin();
    int length = 0;             // of the fetching warp's lane: of the sequence of that number
    if (warp == warps) {
        if (lane < a.B) length = a.lengths[lane];
        if (lane == 0) {
            ptx_barrier_init(query_full, PTX_BULK_COPIES ? 1 : 32), ptx_barrier_init(query_free, warps * PTX_ARRIVING_LANES);
            ptx_barrier_init(part_full, PTX_ARRIVING_LANES);
            if (plan.cluster > 1) {
                ptx_barrier_init(sums_full, 1), ptx_barrier_init(sums_free, plan.cluster);
                ptx_barrier_arrive_expect(sums_full, inbox_bytes);      // before any of them can come
            }
        }
    } else {
        const int place = lane * warps + warp;          // shared out, as a barrier takes 50 clocks
        if (place < places) ptx_barrier_init(full(place), PTX_BULK_COPIES ? 1 : 32), ptx_barrier_init(free(place), plan.tiles * PTX_ARRIVING_LANES);
        if (factored_q)                     // bQ's rows beyond the ranks are zero
            for (int i = threadIdx.x; i < queries * (16 - a.q.R) * PITCH; i += threads) {
                const int query = i / ((16 - a.q.R) * PITCH);
                bq[(query + 1) * a.q.R * PITCH + i] = 0.0f;
            }
        for (int i = threadIdx.x; i < plan.tiles * WIDTH; i += threads)
            columns[i] = decode_column(a, WIDTH, blockIdx.y * plan.tiles + i / WIDTH, i % WIDTH);
    }
    ptx_barrier_init_fence();
    ptx_cluster_arrive();       // ptx_cluster_wait: the other blocks' barriers are there
    __syncthreads();            // barriers, zeros and columns are there

    // The warp that fetches
    if (warp == warps) {
        int total = 0;
        #pragma unroll 1
        for (int b0 = 0; b0 < a.B; b0 += 32) {
            if (b0 > 0) length = b0 + lane < a.B ? a.lengths[b0 + lane] : 0;
            int mine = b0 + lane < a.B ? (length + a.n + PAGE - 1) / PAGE : 0, sum = mine;
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
        const DecodeRuns runs(a, plan, first);
        int run_begin, run_end;
        runs.run(cluster, &run_begin, &run_end);
        auto announce = [&](int i, const DecodePart &part) {
            if (lane == 0) parts[i % 2] = part;
            __syncwarp();
            if (lane < PTX_ARRIVING_LANES) ptx_barrier_arrive(part_full);
        };
        if (run_begin == run_end) announce(0, {-1});        // nothing to do
        const int turn = lane / plan.groups, group = lane - turn * plan.groups;        // the place that this lane fills, of a group's ring
        int parity = 0;                     // and its phase
        #pragma unroll 1
        for (int page = run_begin, i = 0; page < run_end; i++) {
            const DecodeSegment g(runs, page, run_end);
            const unsigned char *from = a.cache + (((int64_t)g.b * shape.streams + g.stream) * a.pages - g.base) * plan.page_bytes;
            const int all = g.end - page, each = all >> plan.cluster_log2, more = all & (plan.cluster - 1);
            const int begin = page + decode_share(rank, each, more), end = page + decode_share(rank + 1, each, more), pages = end - begin;
            const int turns = ceil_div(pages, plan.groups);
            DecodePart part = {g.b, g.stream, lengths[g.b], begin - g.base, pages, turns <= 1 ? pages : ceil_div(pages, turns),
                               2 * cluster + (run_begin < g.base), 1, 0, g.end == run_end};
            if (run_begin > g.base || g.base + g.all > run_end) {
                const int first_cluster = runs.owner(g.b, g.stream, g.base);
                int first_begin, unused;
                runs.run(first_cluster, &first_begin, &unused);
                part.clusters = runs.owner(g.b, g.stream, g.base + g.all - 1) - first_cluster + 1;
                part.first_slot = 2 * first_cluster + (first_begin < g.base);   // the second of a cluster that has a stream before
            }
            if (i > 0) {
                ptx_barrier_wait(query_free, i % 2 ^ 1);
                __syncwarp();       // a lane that still waited when the others bring the next phase about would wait for ever
                fetch_queries(g.b, g.stream);
            }
            announce(i, part);
            int next = turn < plan.depth && group < part.groups ? turn * part.groups + group : pages;       // this lane's next page
            auto fetch = [&](int pages) {       // what there is room for, of the first so many pages; a page a lane
                const bool mine = next < pages && ptx_barrier_done(free(lane), parity ^ 1);     // at first it passes: phases before 0 are complete
                auto place = [&](int at) { return smem_address(smem + at * plan.page_bytes); };
                auto source = [&](int page) { return from + (int64_t)(begin + page) * plan.page_bytes; };
                if (!PTX_BULK_COPIES)
                    for (unsigned ready = __ballot_sync(0xffffffff, mine); ready; ready &= ready - 1) {
                        const int at = __ffs(ready) - 1;
                        ptx_fetch_rows(place(at), source(__shfl_sync(0xffffffff, next, at)), plan.page_bytes, 1, 0, full(at));
                    }
                else if (mine) {
                    ptx_barrier_arrive_expect(full(lane), plan.page_bytes);
                    ptx_bulk_load(place(lane), source(next), plan.page_bytes, full(lane));
                }
                if (mine) next += part.groups * plan.depth, parity ^= 1;
            };
            if (i == 0) {           // pages that are complete, while the kernel before ends
                fetch(min(end, g.base + part.before / PAGE) - begin);
                ptx_cluster_wait();
                ptx_wait_for_previous();
            }
            #pragma unroll 1
            while (__any_sync(0xffffffff, next < pages)) fetch(pages);
            page = g.end;
        }
        return;
    }

    // The warps that compute
    const int tile = warp % plan.tiles, group = warp / plan.tiles;
    const int inbox_pairs = decode_own_pairs(plan);
    const int2 head0 = columns[tile * WIDTH];
    const int slot_places = decode_slot_places(plan, HS);
    float4 *slots = (float4 *)(a.scratch + plan.counters) + (int64_t)blockIdx.y * plan.clusters * 2 * slot_places;     // two of each cluster
    auto store = [&](const DecodePart &part, int pair, int k, const DecodeUnit &x) {     // to the output
        #pragma unroll
        for (int e = 0; e < 2; e++) {
            const int2 column = columns[2 * pair + e];
            if (column.x < 0) continue;
            floatX *out = a.out + (((int64_t)part.b * a.n + column.x) * a.NH + part.stream * shape.heads + column.y) * HS;
            const float unit = __fdividef(plan.out_unit, x.sum[e]);
            out[N::element(k / 8, k % 8, 0)] = (floatX)(x.o[2 * e] * unit), out[N::element(k / 8, k % 8, 1)] = (floatX)(x.o[2 * e + 1] * unit);
        }
    };

    unsigned phases = 0;        // of the places of the group's ring, a bit each
    #pragma unroll 1
    for (int i = 0; ; i++) {
        DecodeState<HS, EIGHTS> st;
        #pragma unroll
        for (int n = 0; n < EIGHTS; n++) {
            st.top[n][0] = st.top[n][1] = -1e30f, st.sum[n][0] = st.sum[n][1] = 0;
            #pragma unroll
            for (int m = 0; m < HS / 16; m++) st.o[n][m][0] = st.o[n][m][1] = st.o[n][m][2] = st.o[n][m][3] = 0;
        }

        ptx_barrier_wait(part_full, i % 2);
        const DecodePart &part = parts[i % 2];
        if (part.b < 0) break;

        // The queries, times q_unit, elements in the order of N::column
        if (i == 0) {
            if (warp == 0) {    // the first, as soon as the kernel before has written them; the others are fetched while pages are read
                ptx_wait_for_previous();
                fetch_queries(part.b, part.stream);
                __syncwarp();
            }
            ptx_cluster_wait();
        }
        ptx_barrier_wait(query_full, i % 2);
        if (factored_q) {                   // aQ (16 heads, 16 ranks) times bQ: a tile is of one query. First bQ goes where ldmatrix wants it.
            constexpr int LANES = HS / 8;   // of a row, 8 elements each
            #pragma unroll 1
            for (int r = threadIdx.x / LANES; r < queries * a.q.R; r += threads / LANES) {
                const int query = a.n == 1 ? 0 : r / a.q.R, row = r - query * a.q.R, d = threadIdx.x % LANES * 8;
                const bf16 *from = query_rows + query * (plan.query_bytes / 2) + a.q.b + row * HS + d;
                __nv_bfloat162 y[4], *to = (__nv_bfloat162 *)(bq + (query * 16 + row) * PITCH);
                #pragma unroll
                for (int k = 0; k < 4; k++) y[k] = __nv_bfloat162(from[2 * k], from[2 * k + 1]);
                #pragma unroll
                for (int k = 0; k < 4; k++) to[N::column(d + 2 * k) / 2] = y[k];
            }
            constexpr int SIXTEENS = (WIDTH + 15) / 16;
            uint32_t x[4];
            auto take = [&](int w) {        // a warp makes a half of the elements of sixteen w / 2 % SIXTEENS of tile w / 2 / SIXTEENS: its aQ
                const int2 head = columns[w / 2 / SIXTEENS * WIDTH];
                const bf16 *row = query_rows + (max(head.x, query0) - query0) * (plan.query_bytes / 2) + a.q.a;
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    const int r = k / 2 * 8 + 2 * t;
                    const bf16 *from = row + min(head.y + w / 2 % SIXTEENS * 16 + k % 2 * 8 + g, shape.heads - 1) * a.q.R + r;
                    __nv_bfloat162 y(r < a.q.R ? from[0] : (bf16)0.0f, r + 1 < a.q.R ? from[1] : (bf16)0.0f);
                    memcpy(&x[k], &y, 4);
                }
                return max(head.x, query0) - query0;
            };
            int query = warp < plan.tiles * SIXTEENS * 2 ? take(warp) : 0;
            ptx_named_barrier(1, threads);  // bQ is there
            #pragma unroll 1
            for (int w = warp; w < plan.tiles * SIXTEENS * 2; w += warps) {
                if (w != warp) query = take(w);
                const int first_column = w / 2 % SIXTEENS * 16, first_element = w % 2 * (HS / 2);
                const uint32_t from = smem_address(bq + (query * 16 + lane % 16) * PITCH + first_element + lane / 16 * 8);
                uint32_t *to = (uint32_t *)(q + (w / 2 / SIXTEENS * WIDTH + first_column + g) * PITCH + first_element + 2 * t);
                const bool second = first_column + 8 < WIDTH;
                #pragma unroll
                for (int j = 0; j < HS / 16; j += 2) {
                    uint32_t y[4];
                    ptx_ldmatrix_trans(y, from + 16 * j);
                    #pragma unroll
                    for (int k = 0; k < 2; k++) {
                        float c[4] = {};
                        ptx_mma(c, x, y[2 * k], y[2 * k + 1]);
                        to[(j + k) * 4] = N::pack(plan.q_unit * c[0], plan.q_unit * c[1]);
                        if (second) to[8 * PITCH / 2 + (j + k) * 4] = N::pack(plan.q_unit * c[2], plan.q_unit * c[3]);
                    }
                }
            }
        } else
            for (int k = threadIdx.x; k < plan.tiles * WIDTH * UNITS; k += threads) {      // two elements
                const int2 column = columns[k / UNITS];
                const int d = k % UNITS * 2;
                const bf16 *from = query_rows + (max(column.x, query0) - query0) * (plan.query_bytes / 2) + column.y * HS + d;
                *(uint32_t *)(q + k / UNITS * PITCH + N::column(d)) = N::pack(plan.q_unit * (float)from[0], plan.q_unit * (float)from[1]);
            }
        ptx_named_barrier(1, threads);      // q is there
        const bf16 *q_tile = q + tile * WIDTH * PITCH;
        uint32_t q_kept[EIGHTS][HS / 32][4];
        if (decode_q_stays(HS))
            #pragma unroll
            for (int n = 0; n < EIGHTS; n++)
                #pragma unroll
                for (int k = 0; k < HS / 32; k++) decode_load_q<HS>(q_kept[n][k], q_tile + 8 * n * PITCH, 2 * k);

        // The pages. No lane still waits for the queries or this part: the next may come.
        if (lane < PTX_ARRIVING_LANES) ptx_barrier_arrive(query_free);
        const int before = part.before, pages = part.pages, groups = part.groups;
        const int all_see = before + max(head0.x, 0) + 1;      // tokens that all columns see
        const DecodeLane<Number, HS, RANKS> at(shape, plan, head0.y);
        #pragma unroll 1
        for (int page = group, turn = 0; page < (group < groups ? pages : 0); page += groups) {
            const int token = (part.page + page) * PAGE, place = turn * plan.groups + group;
            ptx_barrier_wait(full(place), phases >> turn & 1);
            decode_page<Number, HS, EIGHTS, FACTORED, RANKS>(st, q_tile, q_kept, smem + place * plan.page_bytes, at, shape, plan, head0.y,
                                                             token + PAGE > all_see, columns + tile * WIDTH + 2 * t, before + 1 - token,
                                                             before + a.n - token);
            __syncwarp();
            if (lane < PTX_ARRIVING_LANES) ptx_barrier_arrive(free(place));
            phases ^= 1u << turn;
            if (++turn == plan.depth) turn = 0;
        }

        // The sums of the block's groups of warps meet; then those of the cluster's blocks, each of which adds up its own pairs; then those of all
        // clusters that have pages of the stream. `finish` is for the last of these steps.
        auto finish = [&](int pair, int k, const DecodeUnit &x) {
            if (part.clusters == 1) return store(part, pair, k, x);
            float4 *record = slots + (int64_t)part.slot * slot_places + pair * RECORD;
            record[k] = x.numbers();
            if (k == 0) record[UNITS] = x.sums();
        };
        if (group < groups) {
            float4 *to = merge + group * group_places;
            #pragma unroll
            for (int n = 0; n < EIGHTS; n++) {
                #pragma unroll
                for (int m = 0; m < HS / 16; m++)       // so permuted that neither writing nor reading (below) meets the same banks
                    to[((tile * EIGHTS + n) * (HS / 16) + m) * 32 + t * 8 + (g ^ 2 * t)] =
                        make_float4(st.o[n][m][0], st.o[n][m][2], st.o[n][m][1], st.o[n][m][3]);
                #pragma unroll
                for (int e = 0; e < 2; e++)
                    #pragma unroll
                    for (int x = 4; x < 32; x *= 2) st.sum[n][e] += __shfl_xor_sync(0xffffffff, st.sum[n][e], x);
                if (g == 0) to[pairs * UNITS + (tile * EIGHTS + n) * 4 + t] = make_float4(st.top[n][0], st.sum[n][0], st.top[n][1], st.sum[n][1]);
            }
        }
        if (plan.cluster > 1 && i > 0) ptx_cluster_barrier_wait(sums_free, i % 2 ^ 1);      // what was sent for the stream before has been read
        ptx_named_barrier(1, threads);      // the groups' sums are there
        for (int j = threadIdx.x; j < 2 * pairs; j += threads) {       // a column each: what the groups weigh in it
            float2 x[WARPS];
            float top = -1e30f, sum = 0;
            #pragma unroll
            for (int k = 0; k < WARPS; k++) {
                x[k] = k < groups ? ((const float2 *)(merge + k * group_places + pairs * UNITS))[j] : make_float2(-INFINITY, 0);
                top = fmaxf(top, x[k].x);
            }
            #pragma unroll
            for (int k = 0; k < WARPS; k++) {
                const float weight = ptx_exp2(x[k].x - top);
                sum += weight * x[k].y;
                ((float *)weights)[(j / 2 * WARPS + k) * 2 + j % 2] = weight;
            }
            ((float2 *)block_sums)[j] = make_float2(top, sum);
        }
        ptx_named_barrier(1, threads);      // the weights are there
        #pragma unroll 1
        for (int w = warp; w < pairs * (UNITS / 32); w += warps) {      // a unit a lane
            const int pair = w / (UNITS / 32), k = w % (UNITS / 32) * 32 + lane;
            const float4 *from = merge + (pair / 4 * (HS / 16) + k / 8) * 32 + pair % 4 * 8 + (k % 8 ^ pair % 4 * 2);
            const float4 all = block_sums[pair];
            DecodeUnit x = {{0, 0, 0, 0}, {all.x, all.z}, {all.y, all.w}};
            if (groups > 0) {
                float4 y[WARPS];
                #pragma unroll
                for (int j = 0; j < WARPS; j++) y[j] = from[min(j, groups - 1) * group_places];      // one too many has no weight
                #pragma unroll
                for (int j = 0; j < WARPS; j++) {
                    const float2 weight = weights[pair * WARPS + j];
                    x.o[0] += weight.x * y[j].x, x.o[1] += weight.x * y[j].y, x.o[2] += weight.y * y[j].z, x.o[3] += weight.y * y[j].w;
                }
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
                x.add_up(plan.cluster, [&](int slot) { return from[slot * stride + k]; },
                         [&](int slot, int e) { return ((const float2 *)(from + slot * stride + UNITS))[e]; });
                finish((own << plan.cluster_log2) + rank, k, x);
            }
        }
        if (part.last && part.clusters == 1) break;
        ptx_named_barrier(1, threads);      // merge and the inbox have been read, the slot is written
        if (plan.cluster > 1 && !part.last) {       // ready for the next part's
            if (threadIdx.x == 0) ptx_barrier_arrive_expect(sums_full, inbox_bytes);
            __syncwarp();
            if (threadIdx.x < plan.cluster) ptx_cluster_barrier_arrive(ptx_cluster_address(sums_free, threadIdx.x));
        }
        if (part.clusters > 1) {
            if (threadIdx.x == 0) {
                const int64_t stream = ((int64_t)blockIdx.y * a.B + part.b) * shape.streams + part.stream;
                unsigned *arrived = (unsigned *)a.scratch + stream * plan.cluster + rank;
                is_last = ptx_count(arrived) == (unsigned)part.clusters - 1;
                if (is_last) *arrived = 0;  // for the next launch
            }
            ptx_named_barrier(1, threads);  // is_last is there
            #pragma unroll 1
            for (int w = is_last ? warp : own_pairs * (UNITS / 32); w < own_pairs * (UNITS / 32); w += warps) {
                const int pair = (w / (UNITS / 32) << plan.cluster_log2) + rank, k = w % (UNITS / 32) * 32 + lane;
                const float4 *from = slots + pair * RECORD;
                auto place = [&](int slot) { return (int64_t)(slot == 0 ? part.first_slot : (part.first_slot / 2 + slot) * 2) * slot_places; };
                DecodeUnit x;
                x.add_up(part.clusters, [&](int slot) { return __ldcg(from + place(slot) + k); },
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
    static int known[DECODE_MAX_CLUSTER + 1];
    if (!known[cluster]) {
        known[cluster] = device_attribute(cudaDevAttrMultiProcessorCount);
        if (cluster > 1) {
            Launch where(dim3((unsigned)cluster), 256, (size_t)device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), 0);
            where.cluster = cluster;
            cudaLaunchAttribute attributes[2] = {};
            cudaLaunchConfig_t config = launch_config((const void *)decode_probe_kernel, where, attributes);
            CUDA_CHECK(cudaOccupancyMaxActiveClusters(&known[cluster], decode_probe_kernel, &config));
        }
    }
    return known[cluster];
}

// The ranks of k and v that the kernel is made for: 1 or 2 of both, 0: any.
inline int decode_ranks(const CacheShape &s) { return !s.factored ? 1 : s.RK == s.RV && s.RK <= 2 ? s.RK : 0; }

// How the fast kernel would do it, for what this GPU has. groups 0: it cannot.
inline DecodePlan decode_plan(const CacheShape &s, const Heads &q, int B, int n, int64_t pages, int cluster, int splits, int min_pages) {
    const bool hopper = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
    if (cluster < 0 || cluster > (hopper ? DECODE_MAX_CLUSTER : 1) || (cluster & (cluster - 1)))
        die(EXIT_SYSTEM, "flashtpa_decode: clusters of %d thread blocks; on this GPU there can be %s, or 0: chosen", cluster,
            hopper ? "1, 2, 4, 8 or 16" : "1");
    DecodePlan p = {};
    int smem = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    if (sizeof(floatX) != 2 || (s.HS != 64 && s.HS != 128) || s.number_bytes > 2) return p;
    if (q.kind == HEADS_FACTORED && (q.R > 16 || !s.factored)) return p;
    // columns of a tile, so that the fewest are empty; decode_launch_ has kernels for these
    const int ranks = decode_ranks(s), few = s.factored ? 2 : 1;
    const bool may_be_5 = s.factored && s.HS == 64 && ranks > 0;
    auto tiles_of = [&](int width) { return s.factored ? n * ceil_div(s.heads, width) : ceil_div(n * s.heads, width); };
    const bool is_short = hopper && pages <= DECODE_SHORT_PAGES;
    const bool shared_out = is_short && cluster == 0 && splits == 0 && B * s.streams * tiles_of(8 * few) <= decode_clusters(DECODE_MAX_CLUSTER);
    p.eights = shared_out || (s.factored ? 1 : n) * s.heads <= 8 * few ? few
             : may_be_5 && ceil_div(s.heads, 40) * 5 < ceil_div(s.heads, 32) * 4 ? 5 : 4;
    const int width = 8 * p.eights, warps = decode_warps(s.HS, p.eights, ranks), per_query = ceil_div(s.heads, width);
    p.chunks = shared_out ? tiles_of(width) : ceil_div(tiles_of(width), min(DECODE_MAX_COLUMNS / width, warps));
    p.tiles = ceil_div(tiles_of(width), p.chunks);
    // for as many chunks as there can be, the same whatever n and pages are
    p.counters = DECODE_MAX_CLUSTER * max(B * s.streams * DECODE_MAX_QUERIES * ceil_div(s.heads, 16), hopper ? decode_clusters(DECODE_MAX_CLUSTER) : 0);
    // the largest clusters of which there are enough for all streams; of 16, of which few fit a GPU, only where streams are short
    p.cluster = cluster > 0 ? cluster : !hopper ? 1 : is_short ? DECODE_MAX_CLUSTER : DECODE_MAX_CLUSTER / 2;
    while (cluster == 0 && p.cluster > 1 && decode_clusters(p.cluster) < B * s.streams * p.chunks) p.cluster /= 2;
    p.clusters = splits > 0 ? B * s.streams * splits : decode_clusters(p.cluster) / p.chunks > 0 ? decode_clusters(p.cluster) / p.chunks : 1;
    while (1 << p.cluster_log2 < p.cluster) p.cluster_log2++;
    // of a chunk, wherever it begins
    p.queries = s.factored ? (p.tiles - 1 + per_query - 1) / per_query + 1 : (p.tiles * width - 1 + s.heads - 1) / s.heads + 1;
    if (p.queries > n) p.queries = n;
    p.query_bytes = (int)round_up(q.kind == HEADS_FACTORED ? (q.b + q.R * s.HS) * 2 : s.heads * s.HS * 2, 16);
    p.q_unit = (float)(q.scale * 1.4426950408889634 / sqrt((double)s.HS) / (s.factored ? s.RK : 1));
    p.out_unit = 1.0f / (s.factored ? s.RV : 1);
    p.page_bytes = (int)cache_page_bytes(s);
    p.k_b = cache_b_start(s, CACHE_K), p.v_a = cache_a_start(s, CACHE_V), p.v_b = cache_b_start(s, CACHE_V), p.scales = cache_scale(s, CACHE_K, 0);
    smem -= 1024;               // the kernel's static memory
    const int pitch_bytes = decode_q_pitch(s.HS) * 2;
    int rest = smem - decode_inbox_places(p, s.HS) * 16 - decode_pairs(p) * (16 + 8 * warps) - p.tiles * width * (8 + pitch_bytes) -
               p.queries * p.query_bytes - (q.kind == HEADS_FACTORED ? p.queries * 16 * pitch_bytes : 0) - (2 * B + 1) * 4 - 1024;     // barriers
    // as many groups as there are warps for, and room for two pages of each, or as many as there is room for
    for (p.groups = warps / p.tiles; p.groups > 0; p.groups--) {
        p.depth = (rest - p.groups * decode_group_places(p, s.HS) * 16) / (p.groups * p.page_bytes);
        if (p.depth >= 2) break;
    }
    if (p.groups > 0 && p.depth > 32 / p.groups) p.depth = 32 / p.groups;     // a lane of the fetching warp looks after each place
    if (p.groups == 0 && p.cluster > 1) return decode_plan(s, q, B, n, pages, 1, splits, min_pages);     // no room for the inbox
    p.min_pages = min_pages > 0 ? min_pages : shared_out ? DECODE_SHORT_PAGES : p.cluster > 1 ? 16 * p.cluster : (p.groups + 1) / 2;
    p.smem_bytes = (size_t)(smem - rest) + (size_t)p.groups * decode_group_places(p, s.HS) * 16 + (size_t)p.groups * p.depth * p.page_bytes;
    return p;
}

// Scratch of flashtpa_decode for B sequences and up to n queries, to be zeroed once. It serves one shape, B, cluster and splits.
inline size_t decode_scratch_bytes(const CacheShape &s, const Heads &q, int B, int n, int cluster = 0, int splits = 0) {
    size_t most = 16;
    for (int k = 1; k <= n; k++)
        for (int pages : {0, DECODE_SHORT_PAGES + 1}) {         // room for few, and for many
            DecodePlan p = decode_plan(s, q, B, k, pages, cluster, splits, 0);
            size_t bytes = (size_t)p.chunks * p.clusters * 2 * decode_slot_places(p, s.HS) * 16 + p.counters * sizeof(float);
            if (bytes > most) most = bytes;
        }
    return most;
}

template <class Number, int HS>
inline void decode_launch_(const DecodeArgs &a, const DecodePlan &plan, cudaStream_t stream) {
    constexpr int MORE = HS == 64 ? 5 : 4;
    const int ranks = decode_ranks(a.shape), eights = plan.eights;
    auto kernel = !a.shape.factored ? eights == 1 ? decode_kernel<Number, HS, 1, false, 1> : decode_kernel<Number, HS, 4, false, 1>
                : ranks == 1 ? eights == 2 ? decode_kernel<Number, HS, 2, true, 1>
                             : eights == 5 ? decode_kernel<Number, HS, MORE, true, 1> : decode_kernel<Number, HS, 4, true, 1>
                : ranks == 2 ? eights == 2 ? decode_kernel<Number, HS, 2, true, 2>
                             : eights == 5 ? decode_kernel<Number, HS, MORE, true, 2> : decode_kernel<Number, HS, 4, true, 2>
                : eights == 2 ? decode_kernel<Number, HS, 2, true, 0> : decode_kernel<Number, HS, 4, true, 0>;
    Launch where(dim3((unsigned)(plan.clusters * plan.cluster), (unsigned)plan.chunks), 32 * (plan.tiles * plan.groups + 1), plan.smem_bytes, stream);
    where.cluster = plan.cluster, where.early = true;
    launch(kernel, where, a, plan);
}

// out of B sequences' last n tokens, 1 <= n <= 16, whose factors stand in the cache and, those of q rotated, in fac.
inline void flashtpa_decode(const DecodeArgs &a, cudaStream_t stream) {
    if (a.B < 1 || a.n < 1 || a.n > DECODE_MAX_QUERIES || a.q.R < 1)
        die(EXIT_SYSTEM, "flashtpa_decode: B=%d queries=%d rank %d: need at least 1 of each, and at most %d queries", a.B, a.n, a.q.R,
            (int)DECODE_MAX_QUERIES);
    DecodePlan plan = decode_plan(a.shape, a.q, a.B, a.n, a.pages, a.cluster, a.splits, a.min_pages);
    if (plan.groups == 0) return decode_plain(a, stream);
    if constexpr (sizeof(floatX) == 2) {
        if (a.shape.number_bytes == 1 && a.shape.HS == 64) decode_launch_<e4m3, 64>(a, plan, stream);
        else if (a.shape.number_bytes == 1) decode_launch_<e4m3, 128>(a, plan, stream);
        else if (a.shape.HS == 64) decode_launch_<bf16, 64>(a, plan, stream);
        else decode_launch_<bf16, 128>(a, plan, stream);
    }
}

#endif
