// What surrounds mla's attention over the cache (flashtpa_decode.cuh). For a token with projected row
// [lq | l | r] (q_lora, kv_lora, rope_dim) and head h:
//
//     cq = gq lq / rms(lq)      latent = g l / rms(l)      cached: [latent | rope(r)]
//     q'[h] = [Wk_h^T q[h] | rope(rotated part of q[h])]   q = Wqb cq, a matrix product in between
//     y[h] = Wv_h o'[h]                                    o' = attention of q' over the cache
//
// Wk_h and Wv_h (HSV, kv_lora) are the two halves of head h in wkvb.
#ifndef LLMC_LATENT_DECODE_CUH
#define LLMC_LATENT_DECODE_CUH

#include "factor_cache.cuh"

typedef struct {
    unsigned char *cache;               // (B, pages) of one layer
    floatX *latq;                       // (B n, q_lora) cq
    const floatX *proj;                 // (B n, Pp) projected rows
    const floatX *q_gain, *kv_gain;     // (q_lora), (kv_lora)
    const int32_t *lengths;             // (B) tokens already in the cache
    const double *frequencies;          // (rope_dim / 2) of RoPE's pairs, in radians per token
    CacheShape shape;
    int n, Pp, q_lora;                  // n: tokens to write per sequence
    int64_t pages;                      // per sequence
    float eps;
} LatentWrite;

// 1 / rms of row (n), for all threads of a block. shared (32)
__device__ inline float latent_rstd(const floatX *row, int n, float eps, float *shared) {
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += (float)row[i] * (float)row[i];
    return 1 / sqrtf(block_sum(sum, shared) / n + eps);
}

// Stores x(i), i < size, as token t's K or V of a page; e4m3: divided by their scale.
template <class Number, class X>
__device__ inline void latent_store(unsigned char *page, const CacheShape &s, CachePart part, int t, int size,
                                    float *shared, X x) {
    float scale = 1;
    if (sizeof(Number) == 1) {
        float top = 0;
        for (int i = threadIdx.x; i < size; i += blockDim.x) top = fmaxf(top, fabsf(x(i)));
        top = block_max(top, shared);
        if (top > 0) scale = top / E4M3_MAX;
        if (threadIdx.x == 0) *(float *)(page + cache_scale(s, part, t)) = scale;
    }
    for (int i = threadIdx.x; i < size; i += blockDim.x)
        cache_store((Number *)(page + cache_b(s, part, 0, t, i)), x(i) / scale);
}

// One block: one token.
template <class Number>
__global__ void __launch_bounds__(CACHE_THREADS) latent_write_kernel(const __grid_constant__ LatentWrite w) {
    __shared__ float shared[32];
    const CacheShape &s = w.shape;
    const int b = blockIdx.x / w.n, kv = s.HSV, HSR = s.HSK, half = HSR / 2;
    const int64_t position = w.lengths[b] + blockIdx.x % w.n;
    const floatX *row = w.proj + (int64_t)blockIdx.x * w.Pp, *latent = row + w.q_lora, *rotated = latent + kv;
    unsigned char *page = w.cache + ((int64_t)b * w.pages + position / PAGE) * cache_page_bytes(s);
    const int t = (int)(position % PAGE);
    float rstd = latent_rstd(row, w.q_lora, w.eps, shared);
    for (int i = threadIdx.x; i < w.q_lora; i += blockDim.x)
        w.latq[(int64_t)blockIdx.x * w.q_lora + i] = (floatX)((float)row[i] * rstd * (float)w.q_gain[i]);
    rstd = latent_rstd(latent, kv, w.eps, shared);
    latent_store<Number>(page, s, CACHE_V, t, kv, shared,
                         [&](int i) { return (float)latent[i] * rstd * (float)w.kv_gain[i]; });
    latent_store<Number>(page, s, CACHE_K, t, HSR, shared, [&](int i) {
        const float2 turn = rope_turn(position, w.frequencies[i % half]);
        const float x = (float)rotated[i % half], y = (float)rotated[half + i % half];
        return i < half ? x * turn.x + y * turn.y : y * turn.x - x * turn.y;
    });
}

// Writes n tokens of each of B sequences after the lengths[b] tokens that the cache has, and cq of them all.
inline void latent_write(const LatentWrite &w, int64_t B, cudaStream_t stream) {
    Launch where(dim3((unsigned)(B * w.n)), CACHE_THREADS, 0, stream);
    if (w.shape.number_bytes == 1) launch(latent_write_kernel<e4m3>, where, w);
    else launch(latent_write_kernel<floatX>, where, w);
}

// ---------------------------------------------------------------------------------------------------------------------
// Queries and outputs

typedef struct { int NH, HSV, kv, HSR, n; } AbsorbedShape;     // n: tokens per sequence

LLMC_FN AbsorbedShape absorbed_shape(const Model *m, int n) {
    AbsorbedShape s = {(int)m->config.n_head, (int)m->HSV, (int)m->config.kv_lora, (int)m->HSR, n};
    return s;
}

enum { ABSORBED_THREADS = 128, ABSORBED_ROWS = 8 };                // of a block, which reads its weights once

// out (B n, NH, kv + HSR) = q' of q (B n, NH, HSV + HSR), at positions from lengths[b] on. A block has a head, a
// thread an element of q'.
__global__ void __launch_bounds__(ABSORBED_THREADS)
latent_queries_kernel(floatX *out, const floatX *q, const floatX *wkvb, const int32_t *lengths,
                      const double *frequencies, AbsorbedShape s, int rows) {
    const int head = blockIdx.x, element = blockIdx.y * ABSORBED_THREADS + threadIdx.x, W = s.kv + s.HSR;
    const int first = blockIdx.z * ABSORBED_ROWS, HSK = s.HSV + s.HSR, half = s.HSR / 2;
    if (element >= W) return;
    auto head_of = [&](int row) { return q + ((int64_t)row * s.NH + head) * HSK; };
    float sum[ABSORBED_ROWS] = {};
    if (element < s.kv) {
        const floatX *wk = wkvb + (int64_t)head * 2 * s.HSV * s.kv + element;
        for (int j = 0; j < s.HSV; j++) {
            const float weight = (float)wk[(int64_t)j * s.kv];
            #pragma unroll
            for (int i = 0; i < ABSORBED_ROWS; i++)
                if (first + i < rows) sum[i] += weight * (float)head_of(first + i)[j];
        }
    } else
        for (int i = 0; i < ABSORBED_ROWS && first + i < rows; i++) {
            const int d = element - s.kv, row = first + i;
            const float2 turn = rope_turn(lengths[row / s.n] + row % s.n, frequencies[d % half]);
            const floatX *rotated = head_of(row) + s.HSV;
            const float x = (float)rotated[d % half], y = (float)rotated[half + d % half];
            sum[i] = d < half ? x * turn.x + y * turn.y : y * turn.x - x * turn.y;
        }
    #pragma unroll
    for (int i = 0; i < ABSORBED_ROWS; i++)
        if (first + i < rows) out[((int64_t)(first + i) * s.NH + head) * W + element] = (floatX)sum[i];
}

inline void latent_queries(floatX *out, const floatX *q, const floatX *wkvb, const int32_t *lengths,
                           const double *frequencies, const AbsorbedShape &s, int64_t rows, cudaStream_t stream) {
    const dim3 grid((unsigned)s.NH, (unsigned)ceil_div(s.kv + s.HSR, (int)ABSORBED_THREADS),
                    (unsigned)ceil_div(rows, (int64_t)ABSORBED_ROWS));
    launch(latent_queries_kernel, {grid, ABSORBED_THREADS, 0, stream}, out, q, wkvb, lengths, frequencies, s,
           (int)rows);
}

// y (rows, NH HSV) = Wv o', o' (rows, NH, kv). A warp has an element of a head.
__global__ void __launch_bounds__(ABSORBED_THREADS)
latent_output_kernel(floatX *y, const floatX *o, const floatX *wkvb, AbsorbedShape s, int rows) {
    const int head = blockIdx.x, element = blockIdx.y * (ABSORBED_THREADS / 32) + threadIdx.x / 32;
    const int lane = threadIdx.x % 32, first = blockIdx.z * ABSORBED_ROWS;
    if (element >= s.HSV) return;
    const floatX *wv = wkvb + (((int64_t)head * 2 + 1) * s.HSV + element) * s.kv;
    float sum[ABSORBED_ROWS] = {};
    for (int k = lane; k < s.kv; k += 32) {
        const float weight = (float)wv[k];
        #pragma unroll
        for (int i = 0; i < ABSORBED_ROWS; i++)
            if (first + i < rows) sum[i] += weight * (float)o[((int64_t)(first + i) * s.NH + head) * s.kv + k];
    }
    #pragma unroll
    for (int i = 0; i < ABSORBED_ROWS; i++) {
        sum[i] = warp_sum(sum[i]);
        if (lane == 0 && first + i < rows)
            y[((int64_t)(first + i) * s.NH + head) * s.HSV + element] = (floatX)sum[i];
    }
}

inline void latent_output(floatX *y, const floatX *o, const floatX *wkvb, const AbsorbedShape &s, int64_t rows,
                          cudaStream_t stream) {
    const dim3 grid((unsigned)s.NH, (unsigned)ceil_div(s.HSV, ABSORBED_THREADS / 32),
                    (unsigned)ceil_div(rows, (int64_t)ABSORBED_ROWS));
    launch(latent_output_kernel, {grid, ABSORBED_THREADS, 0, stream}, y, o, wkvb, s, (int)rows);
}

#endif
