// MLA's heads: what lies between its matrix products and attention (on the CPU rope and latent_heads_forward and
// _backward in train_t6.c). Of a query or key head's HSK = HSV + HSR numbers RoPE rotates the last HSR. A key head is
// its own HSV numbers from kv (N, NH, 2 HSV), whose other half is its value head, and the token's kr (HSR), which all
// heads share.
#ifndef LLMC_LATENT_CUH
#define LLMC_LATENT_CUH

#include "heads.cuh"

enum { LATENT_THREADS = 128 };

typedef struct { Heads q; int T, NH, HSK, HSV, HSR; } LatentShape;

LLMC_FN LatentShape latent_shape(const Model *m, int64_t T) {
    LatentShape s = {m->q, (int)T, (int)m->config.n_head, (int)m->HSK, (int)m->HSV, (int)m->HSR};
    return s;
}

// Rotates the last HSR numbers of the heads of q (NH, HSK) in place.
__device__ inline void latent_rotate(floatX *q, const LatentShape &s, const float *table, Direction direction) {
    int half = s.HSR / 2;
    for (int p = threadIdx.x; p < s.NH * half; p += LATENT_THREADS) {
        floatX *x = q + p / half * s.HSK + s.HSV + p % half;
        float x1 = (float)x[0], x2 = (float)x[half];
        heads_rotate_pair(x1, x2, s.q, table, p % half, s.HSR, direction);
        x[0] = (floatX)x1, x[half] = (floatX)x2;
    }
}

// One block per token.
__global__ void __launch_bounds__(LATENT_THREADS)
latent_heads_forward_kernel(floatX *q, floatX *k, floatX *v, const floatX *kv, const floatX *kr, int64_t ldr,
                            const float *table, LatentShape s) {
    constexpr int X = PackedX::size;
    extern __shared__ float4 latent_smem[];
    floatX *rotated = (floatX *)latent_smem;
    int64_t n = blockIdx.x;
    int half = s.HSR / 2;
    table += n % s.T * s.HSR, kr += n * ldr, kv += n * s.NH * 2 * s.HSV;
    k += n * s.NH * s.HSK, v += n * s.NH * s.HSV;
    for (int i = threadIdx.x; i < half; i += LATENT_THREADS) {
        float x1 = (float)kr[i], x2 = (float)kr[half + i];
        heads_rotate_pair(x1, x2, s.q, table, i, s.HSR, ROTATE);
        rotated[i] = (floatX)x1, rotated[half + i] = (floatX)x2;
    }
    latent_rotate(q + n * s.NH * s.HSK, s, table, ROTATE);
    __syncthreads();            // the shared part is rotated
    for (int c = threadIdx.x * X; c < s.NH * s.HSK; c += LATENT_THREADS * X) {
        int i = c / s.HSK, d = c % s.HSK;
        store16(k + c, d < s.HSV ? load16(kv + i * 2 * s.HSV + d) : load16(rotated + d - s.HSV));
    }
    for (int c = threadIdx.x * X; c < s.NH * s.HSV; c += LATENT_THREADS * X)
        store16(v + c, load16(kv + c / s.HSV * 2 * s.HSV + s.HSV + c % s.HSV));
}

// k (N, NH, HSK), v (N, NH, HSV) from kv (N, NH, 2 HSV) and kr (N, HSR), whose rows are ldr apart; rotates q (N, NH,
// HSK) in place. table (T, HSR); HSV and HSR multiples of 8.
inline void latent_heads_forward(floatX *q, floatX *k, floatX *v, const floatX *kv, const floatX *kr, int64_t ldr,
                                 const float *table, const LatentShape &s, int64_t N, cudaStream_t stream) {
    Launch where((unsigned)N, LATENT_THREADS, (size_t)s.HSR * sizeof(floatX), stream);
    launch(latent_heads_forward_kernel, where, q, k, v, kv, kr, ldr, table, s);
}

__global__ void __launch_bounds__(LATENT_THREADS)
latent_heads_backward_kernel(floatX *dkv, floatX *dkr, int64_t ldr, floatX *dq, const floatX *dk, const floatX *dv,
                             const float *table, LatentShape s) {
    constexpr int X = PackedX::size;
    int64_t n = blockIdx.x;
    int half = s.HSR / 2;
    table += n % s.T * s.HSR, dkr += n * ldr, dkv += n * s.NH * 2 * s.HSV;
    dk += n * s.NH * s.HSK, dv += n * s.NH * s.HSV;
    for (int i = threadIdx.x; i < half; i += LATENT_THREADS) {
        float x1 = 0, x2 = 0;
        for (int h = 0; h < s.NH; h++) {
            const floatX *x = dk + h * s.HSK + s.HSV + i;
            x1 += (float)x[0], x2 += (float)x[half];
        }
        heads_rotate_pair(x1, x2, s.q, table, i, s.HSR, ROTATE_BACK);
        dkr[i] = (floatX)x1, dkr[half + i] = (floatX)x2;
    }
    latent_rotate(dq + n * s.NH * s.HSK, s, table, ROTATE_BACK);
    for (int c = threadIdx.x * X; c < s.NH * 2 * s.HSV; c += LATENT_THREADS * X) {
        int i = c / (2 * s.HSV), d = c % (2 * s.HSV);
        store16(dkv + c, d < s.HSV ? load16(dk + i * s.HSK + d) : load16(dv + i * s.HSV + d - s.HSV));
    }
}

// dkv (N, NH, 2 HSV) and dkr (N, HSR) from dk and dv; rotates dq back in place. Shapes as in latent_heads_forward.
inline void latent_heads_backward(floatX *dkv, floatX *dkr, int64_t ldr, floatX *dq, const floatX *dk, const floatX *dv,
                                  const float *table, const LatentShape &s, int64_t N, cudaStream_t stream) {
    launch(latent_heads_backward_kernel, {(unsigned)N, LATENT_THREADS, 0, stream}, dkv, dkr, ldr, dq, dk, dv, table, s);
}

#endif
