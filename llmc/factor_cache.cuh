// The factor cache that decoding reads: the factors of each token's keys and values in each layer, k's vectors rotated.
//
// Factored kinds have one stream of tokens, read by all heads. Per token it has RK + RV vectors b (HS), and for each of
// them a weight a per head. Grouped kinds (MHA, GQA, MQA) have one stream per key/value head, read by the heads of its
// group: per token one vector for k, one for v, and no weights. A stream is a row of pages of 16 tokens. What a tensor
// core multiplies together is contiguous, and a run of pages is one contiguous copy. A page holds, in this order,
//
//     aK (RK, heads, 16)   bK (RK, 16, HSK)   aV (RV, heads, 16)   bV (RV, 16, HSV)   and for fp8 scales (2, 16) fp32
//
// with 16-byte chunks permuted so that ldmatrix reads them from shared memory without bank conflicts (cache_a,
// cache_b).
//
// mla has one stream, read by all heads, with the normed latent in place of bV (HSV = kv_lora) and the rotated part in
// place of bK (HSK = rope_dim). A key is both side by side, [latent | rotated part]; a value is the latent.
//
// Numbers are the program's own (floatX) or e4m3. In e4m3 each of a token's aK, bK, aV and bV is divided by a scale,
// its largest magnitude / 448. Only products of scales are needed, so scales[0] is that of aK times that of bK, and
// scales[1] the same for v. An e4m3 page is a little over half the size of a bf16 page.
#ifndef LLMC_FACTOR_CACHE_CUH
#define LLMC_FACTOR_CACHE_CUH

#include <cuda_fp8.h>

#include "fp8.h"
#include "model.h"
#include "precision.cuh"
#include "ptx.cuh"

enum { PAGE = 16 };             // tokens per page
typedef uint8_t e4m3;           // the code of a number (fp8.h)

typedef struct {
    int streams, heads;         // per sequence; heads that read one stream
    int RK, RV;                 // vectors of k and v per token
    int HSK, HSV;               // sizes of query/key heads and of value heads; mla: of the rotated part, of the latent
    float scale;                // of the softmax
    int factored;               // 1: with weights a; 0: without
    int latent;                 // 1: mla
    int number_bytes;           // 4 or 2: floatX; 1: e4m3
} CacheShape;

LLMC_FN CacheShape cache_shape(const Model *m, int number_bytes) {
    CacheShape s;
    s.factored = m->k.kind == HEADS_FACTORED, s.latent = m->config.attn == ATTN_MLA;
    s.streams = s.factored || s.latent ? 1 : m->k.R, s.heads = (int)m->config.n_head / s.streams;
    s.RK = s.factored ? m->k.R : 1, s.RV = s.factored ? m->v.R : 1;
    s.HSK = (int)m->HSK, s.HSV = (int)m->HSV, s.scale = (float)m->scale, s.number_bytes = number_bytes;
    if (s.latent) s.HSK = (int)m->config.rope_dim, s.HSV = (int)m->config.kv_lora;
    return s;
}

// The queries as decoding reads them: the model's own, or mla's q' (NH, kv_lora + rope_dim), a row of its own.
LLMC_FN Heads cache_queries(const Model *m) {
    Heads q = m->q;
    if (m->config.attn == ATTN_MLA) q.HS = (int)(m->config.kv_lora + m->config.rope_dim), q.a = q.b = 0;
    return q;
}

__host__ __device__ inline size_t cache_page_bytes(const CacheShape &s) {
    const size_t scales = s.number_bytes == 1 ? 2 * PAGE * sizeof(float) : 0;
    const int weights = s.factored * s.heads;
    return (size_t)PAGE * s.number_bytes * (s.RK * (weights + s.HSK) + s.RV * (weights + s.HSV)) + scales;
}

// Pages of a stream with capacity for `tokens` tokens.
__host__ __device__ inline int64_t cache_pages(int64_t tokens) { return (tokens + PAGE - 1) / PAGE; }

// Bytes of one layer's cache, (B, streams, pages), for B sequences of up to `tokens` tokens.
__host__ __device__ inline size_t cache_layer_bytes(const CacheShape &s, int64_t B, int64_t tokens) {
    return (size_t)B * s.streams * cache_pages(tokens) * cache_page_bytes(s);
}

typedef enum { CACHE_K, CACHE_V } CachePart;

// Offset in a page, in bytes, of the weights and of the vectors of K or V.
__host__ __device__ inline int cache_a_start(const CacheShape &s, CachePart part) {
    return part == CACHE_K ? 0 : PAGE * s.number_bytes * s.RK * (s.factored * s.heads + s.HSK);
}
__host__ __device__ inline int cache_b_start(const CacheShape &s, CachePart part) {
    return cache_a_start(s, part) + PAGE * s.number_bytes * (part == CACHE_K ? s.RK : s.RV) * s.factored * s.heads;
}

// Where 16-byte chunk c of a row of weights (16 tokens) is stored in the row; row = r heads + head. In bf16 a row is
// two chunks and 8 rows are 256 bytes. Swapping the two in every other four rows puts the chunks of any 8 rows in
// different banks.
__host__ __device__ inline int cache_a_chunk(int number_bytes, int row, int c) {
    return number_bytes == 2 ? c ^ (row >> 2 & 1) : c;
}

// The same for a vector of token `t` of the page. bf16: 8 consecutive tokens are loaded together. e4m3: tokens 0 2 4 6
// 9 11 13 15 are, and then the others (flashtpa_decode.cuh says why). Those whose vectors start in the same bank get
// different permutations. Vectors of other than 2, 4, 8 ... chunks are stored in order.
__host__ __device__ inline int cache_b_chunk(int number_bytes, int HS, int t, int c) {
    const int chunks = HS * number_bytes / 16;          // of a vector
    if (number_bytes == 4 || HS * number_bytes % 16 || chunks < 2 || (chunks & (chunks - 1))) return c;
    const int together = number_bytes == 1 ? 2 : 1, per_bank = chunks < 8 ? 8 / chunks : 1;
    return c ^ (t / (per_bank > together ? per_bank : together) & ((chunks < 8 ? chunks : 8) - 1));
}

// Offset in a page, in bytes, of weight r of a head for token t, of element d of vector r of token t, and of token t's
// scale.
__host__ __device__ inline int cache_a(const CacheShape &s, CachePart part, int r, int head, int t) {
    int row = r * s.heads + head, byte = t * s.number_bytes;
    int chunk = cache_a_chunk(s.number_bytes, row, byte / 16);
    return cache_a_start(s, part) + row * PAGE * s.number_bytes + chunk * 16 + byte % 16;
}
__host__ __device__ inline int cache_b(const CacheShape &s, CachePart part, int r, int t, int d) {
    int byte = d * s.number_bytes, row = r * PAGE + t, HS = part == CACHE_K ? s.HSK : s.HSV;
    int chunk = cache_b_chunk(s.number_bytes, HS, t, byte / 16);
    return cache_b_start(s, part) + row * HS * s.number_bytes + chunk * 16 + byte % 16;
}
__host__ __device__ inline int cache_scale(const CacheShape &s, CachePart part, int t) {
    return (int)cache_page_bytes(s) - 2 * PAGE * (int)sizeof(float) + (part * PAGE + t) * (int)sizeof(float);
}

// ---------------------------------------------------------------------------------------------------------------------
// Numbers

__device__ inline float cache_number(const float *p) { return *p; }
__device__ inline float cache_number(const bf16 *p) { return (float)*p; }
__device__ inline float cache_number(const e4m3 *p) {
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(*p, __NV_E4M3)));
}
__device__ inline void cache_store(float *p, float x) { *p = x; }
__device__ inline void cache_store(bf16 *p, float x) { *p = (bf16)x; }
__device__ inline void cache_store(e4m3 *p, float x) { *p = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }

// ---------------------------------------------------------------------------------------------------------------------
// Writing

// Cosine and sine of RoPE's angle, in double: at position 10^6 a float's angle would be off by 0.06.
__device__ inline float2 rope_turn(int64_t position, double frequency) {
    double turns = (double)position * frequency * 0.15915494309189535;
    float2 turn;
    sincospif(2 * (float)(turns - rint(turns)), &turn.y, &turn.x);
    return turn;
}

typedef struct {
    unsigned char *cache;       // (B, streams, pages) of one layer
    floatX *fac;                // (B n, Pp) factor rows, not rotated
    const int32_t *lengths;     // (B) tokens already in the cache
    const double *frequencies;  // (HSR / 2) of RoPE's pairs, in radians per token
    CacheShape shape;
    Heads q, k, v;
    int n, Pp;                  // tokens to write per sequence; numbers per row of fac
    int64_t pages;              // per stream
    int rotate_queries;         // 1: q's vectors in fac are rotated too, in place, as decoding needs them
} CacheWrite;

enum { CACHE_THREADS = 128, CACHE_MAX_HS = 128 };

// One block: one token of one stream. Numbers are read from fac, rotated, scaled if e4m3, and stored in the token's
// page.
template <class Number>
__global__ void __launch_bounds__(CACHE_THREADS) cache_write_kernel(const __grid_constant__ CacheWrite w) {
    __shared__ float cosine[CACHE_MAX_HS / 2];
    __shared__ float sine[CACHE_MAX_HS / 2];
    __shared__ float shared[32];
    const CacheShape &s = w.shape;
    ptx_let_next_begin();
    int b = blockIdx.x / w.n, stream = blockIdx.y, HS = s.HSK, half = HS / 2;
    int64_t position = w.lengths[b] + blockIdx.x % w.n;
    floatX *row = w.fac + (int64_t)blockIdx.x * w.Pp;
    int64_t first_page = ((int64_t)b * s.streams + stream) * w.pages;
    unsigned char *page = w.cache + (first_page + position / PAGE) * cache_page_bytes(s);
    int t = (int)(position % PAGE);
    for (int i = threadIdx.x; i < half; i += CACHE_THREADS) {
        const float2 turn = rope_turn(position, w.frequencies[i]);
        cosine[i] = turn.x, sine[i] = turn.y;
    }
    __syncthreads();
    // Elements i and i + HS/2 of vector r of q, k or v, rotated if it has RoPE.
    auto pair = [&](const Heads &h, int r, int i) {
        float x1 = (float)row[h.b + r * HS + i], x2 = (float)row[h.b + r * HS + half + i];
        return h.HSR ? make_float2(x1 * cosine[i] + x2 * sine[i], x2 * cosine[i] - x1 * sine[i]) : make_float2(x1, x2);
    };
    for (int p = 0; p < 2; p++) {
        CachePart part = (CachePart)p;
        const Heads &h = part == CACHE_K ? w.k : w.v;
        int R = part == CACHE_K ? s.RK : s.RV;
        float weight_scale = 1, vector_scale = 1;
        if (s.number_bytes == 1) {
            float weight_top = 0, vector_top = 0;
            for (int i = threadIdx.x; s.factored && i < R * s.heads; i += CACHE_THREADS)
                weight_top = fmaxf(weight_top, fabsf((float)row[h.a + i]));
            for (int i = threadIdx.x; i < R * half; i += CACHE_THREADS) {
                float2 x = pair(h, s.factored ? i / half : stream, i % half);
                vector_top = fmaxf(vector_top, fmaxf(fabsf(x.x), fabsf(x.y)));
            }
            weight_top = block_max(weight_top, shared), vector_top = block_max(vector_top, shared);
            weight_scale = weight_top > 0 ? weight_top / E4M3_MAX : 1;
            vector_scale = vector_top > 0 ? vector_top / E4M3_MAX : 1;
            if (threadIdx.x == 0) *(float *)(page + cache_scale(s, part, t)) = weight_scale * vector_scale;
        }
        for (int i = threadIdx.x; s.factored && i < R * s.heads; i += CACHE_THREADS)
            cache_store((Number *)(page + cache_a(s, part, i % R, i / R, t)), (float)row[h.a + i] / weight_scale);
        for (int i = threadIdx.x; i < R * half; i += CACHE_THREADS) {
            int r = s.factored ? i / half : 0, d = i % half;
            float2 x = pair(h, s.factored ? r : stream, d);
            cache_store((Number *)(page + cache_b(s, part, r, t, d)), x.x / vector_scale);
            cache_store((Number *)(page + cache_b(s, part, r, t, half + d)), x.y / vector_scale);
        }
    }
    if (!w.rotate_queries) return;
    for (int i = threadIdx.x; i < w.q.R * half; i += CACHE_THREADS) {
        int r = i / half, d = i % half;
        if (r % s.streams != stream) continue;      // another stream's block rotates it
        float2 x = pair(w.q, r, d);
        row[w.q.b + r * HS + d] = (floatX)x.x, row[w.q.b + r * HS + half + d] = (floatX)x.y;
    }
}

// Writes n tokens of each of B sequences after the lengths[b] tokens that the cache has. Does not change lengths.
inline void cache_write(const CacheWrite &w, int64_t B, cudaStream_t stream) {
    if (w.shape.HSK != w.shape.HSV || w.shape.HSK != w.k.HSR || w.shape.HSK > CACHE_MAX_HS)
        die(EXIT_SYSTEM, "cache_write: head sizes %d and %d, %d of them rotated, are not supported; all must be equal "
            "and at most %d", w.shape.HSK, w.shape.HSV, w.k.HSR, (int)CACHE_MAX_HS);
    Launch where(dim3((unsigned)(B * w.n), (unsigned)w.shape.streams), CACHE_THREADS, 0, stream);
    if (w.shape.number_bytes == 1) launch(cache_write_kernel<e4m3>, where, w);
    else launch(cache_write_kernel<floatX>, where, w);
}

// RoPE's frequencies (HSR / 2) on the host, in radians per token.
LLMC_FN void rope_frequencies(double *out, int64_t HSR, double base) {
    for (int64_t i = 0; i < HSR / 2; i++) out[i] = rope_frequency(i, HSR, base);
}

#endif
