// MLA's heads: what lies between its matrix products and attention (on the CPU rope and latent_heads_forward and
// _backward in train_t6.c). Of a query or key head's HSK = HSV + HSR numbers RoPE rotates the last HSR. A key head's
// first HSV numbers and its value head are in kv (N, NH, 2 HSV); its last HSR are kr (N, HSR), the same for all heads.
// attention.cuh reads both where they are, so only RoPE and the sum of kr's gradients over the heads are left to do.
#ifndef LLMC_LATENT_CUH
#define LLMC_LATENT_CUH

#include "heads.cuh"

enum { LATENT_THREADS = 256, LATENT_PAIRS = 4 };        // pairs of numbers per thread

typedef struct { Heads q; int T, NH, HSK, HSV, HSR; } LatentShape;

LLMC_FN LatentShape latent_shape(const Model *m, int64_t T) {
    LatentShape s = {m->q, (int)T, (int)m->config.n_head, (int)m->HSK, (int)m->HSV, (int)m->HSR};
    return s;
}

struct alignas(LATENT_PAIRS * sizeof(floatX)) LatentNumbers { floatX x[LATENT_PAIRS]; };

// Adjacent numbers, and those HSR / 2 further on that rotate with them.
struct LatentPairs {
    float x1[LATENT_PAIRS], x2[LATENT_PAIRS];

    __device__ void add(const floatX *from, int half) {
        LatentNumbers low = *(const LatentNumbers *)from, high = *(const LatentNumbers *)(from + half);
        for (int k = 0; k < LATENT_PAIRS; k++) x1[k] += (float)low.x[k], x2[k] += (float)high.x[k];
    }
    __device__ void rotate_and_store(floatX *to, const LatentShape &s, const float *table, int i, Direction direction) {
        LatentNumbers low, high;
        for (int k = 0; k < LATENT_PAIRS; k++) {
            heads_rotate_pair(x1[k], x2[k], s.q, table, i + k, s.HSR, direction);
            low.x[k] = (floatX)x1[k], high.x[k] = (floatX)x2[k];
        }
        *(LatentNumbers *)to = low, *(LatentNumbers *)(to + s.HSR / 2) = high;
    }
};

// What a thread rotates: pairs from number i on of a query head of token n, or of kr where head is NH.
struct LatentItem {
    unsigned n;
    int head, i;
    __device__ LatentItem(const LatentShape &s) {
        unsigned per_head = s.HSR / 2 / LATENT_PAIRS, item = blockIdx.x * LATENT_THREADS + threadIdx.x;
        i = item % per_head * LATENT_PAIRS, head = item / per_head % (s.NH + 1), n = item / per_head / (s.NH + 1);
    }
};

inline unsigned latent_blocks(const LatentShape &s, int64_t N) {
    return (unsigned)ceil_div(N * (s.NH + 1) * (s.HSR / 2 / LATENT_PAIRS), (int64_t)LATENT_THREADS);
}

__global__ void __launch_bounds__(LATENT_THREADS)
latent_heads_forward_kernel(floatX *q, floatX *kr, const floatX *projected, int64_t ldr, const float *table,
                            LatentShape s, unsigned N) {
    LatentItem item(s);
    if (item.n >= N) return;
    int64_t n = item.n;
    LatentPairs pairs = {};
    floatX *rotated = item.head < s.NH ? q + (n * s.NH + item.head) * s.HSK + s.HSV + item.i : kr + n * s.HSR + item.i;
    pairs.add(item.head < s.NH ? rotated : projected + n * ldr + item.i, s.HSR / 2);
    pairs.rotate_and_store(rotated, s, table + n % s.T * s.HSR, item.i, ROTATE);
}

// kr (N, HSR) from its projected numbers, whose rows are ldr apart; rotates q (N, NH, HSK) in place. table (T, HSR);
// HSK, HSV, HSR and ldr are multiples of 8.
inline void latent_heads_forward(floatX *q, floatX *kr, const floatX *projected, int64_t ldr, const float *table,
                                 const LatentShape &s, int64_t N, cudaStream_t stream) {
    launch(latent_heads_forward_kernel, {latent_blocks(s, N), LATENT_THREADS, 0, stream}, q, kr, projected, ldr, table,
           s, (unsigned)N);
}

__global__ void __launch_bounds__(LATENT_THREADS)
latent_heads_backward_kernel(floatX *dprojected, int64_t ldr, floatX *dq, const floatX *dkr, const float *table,
                             LatentShape s, unsigned N) {
    LatentItem item(s);
    if (item.n >= N) return;
    int64_t n = item.n;
    LatentPairs pairs = {};
    floatX *to = dprojected + n * ldr + item.i;
    if (item.head < s.NH) to = dq + (n * s.NH + item.head) * s.HSK + s.HSV + item.i, pairs.add(to, s.HSR / 2);
    else
        for (int h = 0; h < s.NH; h++) pairs.add(dkr + (n * s.NH + h) * s.HSR + item.i, s.HSR / 2);
    pairs.rotate_and_store(to, s, table + n % s.T * s.HSR, item.i, ROTATE_BACK);
}

// dprojected (N, HSR), whose rows are ldr apart, from dkr (N, NH, HSR), a gradient for each head; rotates dq (N, NH,
// HSK) back in place.
inline void latent_heads_backward(floatX *dprojected, int64_t ldr, floatX *dq, const floatX *dkr, const float *table,
                                  const LatentShape &s, int64_t N, cudaStream_t stream) {
    launch(latent_heads_backward_kernel, {latent_blocks(s, N), LATENT_THREADS, 0, stream}, dprojected, ldr, dq, dkr,
           table, s, (unsigned)N);
}

#endif
