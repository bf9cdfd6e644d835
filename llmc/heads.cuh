// RoPE and the contraction of factors, one kernel each way: q, k and v of a token from its row of factors (Heads in model.h),
//   head_i = scale sum_r a[i][r] b_r,   b_r rotated by the token's position where it belongs to q or k
// and back: da[i][r] = scale <dhead_i, b_r>;  db_r = scale sum_i a[i][r] dhead_i, rotated back.
// The factors are kept unrotated; the rotation happens in shared memory on the way. Grouped heads (MHA, GQA, MQA) are not copied
// out: q, k or v then has R heads, not NH.
#ifndef LLMC_HEADS_CUH
#define LLMC_HEADS_CUH

#include "model.h"
#include "precision.cuh"

enum { HEADS_THREADS = 128 };   // one block: one token

typedef struct { Heads q, k, v; int T, NH, HS, Pp; } HeadsShape;

LLMC_FN HeadsShape heads_shape(const Model *m, int64_t T) {
    HeadsShape s = {m->q, m->k, m->v, (int)T, (int)m->config.n_head, (int)m->config.head_dim, (int)m->Pp};
    return s;
}

// Heads of the tensor as it is stored: what attention sees.
__host__ __device__ inline int heads_stored(const Heads &h, int NH) { return h.kind == HEADS_FACTORED ? NH : h.R; }

// table (T, HS) on the host: cosines in the first half of a row, sines in the second.
LLMC_FN void rope_table(float *table, int64_t T, int64_t HS, double base) {
    for (int64_t t = 0; t < T; t++)
        for (int64_t i = 0; i < HS / 2; i++) {
            double angle = (double)t * pow(base, -2.0 * (double)i / (double)HS);
            table[t * HS + i] = (float)cos(angle), table[t * HS + HS / 2 + i] = (float)sin(angle);
        }
}

// ---------------------------------------------------------------------------------------------------------------------
// Pieces of both kernels. row, drow (Pp): a token's factors and their gradient, fp32, in shared memory

// Turns the vectors of `h` in place by the angles of `table` (HS), `sign` 1 or -1: pair (x1, x2) -> (x1 c + x2 s, x2 c - x1 s).
__device__ inline void heads_rotate(float *row, const Heads &h, const float *table, int HS, float sign) {
    if (!h.rope) return;
    int half = HS / 2;
    for (int p = threadIdx.x; p < h.R * half; p += HEADS_THREADS) {
        int i = p % half;
        float *x1 = row + h.b + p / half * HS + i, *x2 = x1 + half, x = *x1, y = *x2, c = table[i], s = sign * table[half + i];
        *x1 = x * c + y * s;
        *x2 = y * c - x * s;
    }
}

// A thread owns 16 bytes of a head and walks over the heads; RANK vectors b stay in registers (RANK 0: any rank, from shared memory).
template <int RANK>
__device__ inline void heads_contract(floatX *out, const float *row, const Heads &h, int NH, int HS) {
    constexpr int X = PackedX::size;
    int R = RANK ? RANK : h.R, threads = HS / X, d = threadIdx.x % threads * X, stride = HEADS_THREADS / threads;
    const float *a = row + h.a, *b = row + h.b + d;
    float scale = (float)h.scale, kept[RANK ? RANK : 1][X];
    if (RANK)
        for (int r = 0; r < RANK; r++)
            for (int k = 0; k < X; k++) kept[r][k] = scale * b[r * HS + k];
    for (int i = threadIdx.x / threads; i < NH && (int)threadIdx.x < stride * threads; i += stride) {
        float sum[X] = {};
        for (int r = 0; r < R; r++) {
            float weight = RANK ? a[i * R + r] : scale * a[i * R + r];
            for (int k = 0; k < X; k++) sum[k] += weight * (RANK ? kept[RANK ? r : 0][k] : b[r * HS + k]);
        }
        PackedX packed;
        for (int k = 0; k < X; k++) packed[k] = (floatX)sum[k];
        store16(out + i * HS + d, packed);
    }
}

// out (heads_stored, HS): one token's q, k or v
__device__ inline void heads_of_token(floatX *out, const float *row, const Heads &h, int NH, int HS) {
    constexpr int X = PackedX::size;
    if (h.kind == HEADS_GROUPED) {
        for (int c = threadIdx.x * X; c < h.R * HS; c += HEADS_THREADS * X) {
            PackedX packed;
            for (int k = 0; k < X; k++) packed[k] = (floatX)row[h.b + c + k];
            store16(out + c, packed);
        }
        return;
    }
    switch (h.R) {      // the ranks that models have; the others work too, slower
        case 1: heads_contract<1>(out, row, h, NH, HS); break;
        case 2: heads_contract<2>(out, row, h, NH, HS); break;
        case 4: heads_contract<4>(out, row, h, NH, HS); break;
        case 6: heads_contract<6>(out, row, h, NH, HS); break;
        default: heads_contract<0>(out, row, h, NH, HS);
    }
}

// da of head i by one thread: RANK dot products with dhead (HS), a row of shared memory.
template <int RANK>
__device__ inline void heads_da(float *drow, const float *row, const floatX *dhead, const Heads &h, int i, int HS) {
    constexpr int X = PackedX::size;
    for (int r0 = 0; r0 < h.R; r0 += RANK) {
        const float *b = row + h.b + r0 * HS;
        float sum[RANK] = {};
        for (int d = 0; d < HS; d += X) {
            PackedX g = load16(dhead + d);
            #pragma unroll
            for (int r = 0; r < RANK; r++)
                #pragma unroll
                for (int k = 0; k < X; k++) sum[r] += (float)g[k] * b[r * HS + d + k];
        }
        for (int r = 0; r < RANK; r++) drow[h.a + i * h.R + r0 + r] = (float)h.scale * sum[r];
    }
}

// db at two neighbouring places d of all vectors, RANK at a time, by one thread. dheads (NH, pitch) in shared memory
template <int RANK>
__device__ inline void heads_db(float *drow, const float *row, const floatX *dheads, const Heads &h, int d, int NH, int HS, int pitch) {
    for (int r0 = 0; r0 < h.R; r0 += RANK) {
        const float *a = row + h.a + r0;
        float sum[RANK][2] = {};
        for (int i = 0; i < NH; i++) {
            float g0 = (float)dheads[i * pitch + d], g1 = (float)dheads[i * pitch + d + 1];
            #pragma unroll
            for (int r = 0; r < RANK; r++) sum[r][0] += a[i * h.R + r] * g0, sum[r][1] += a[i * h.R + r] * g1;
        }
        for (int r = 0; r < RANK; r++)
            for (int k = 0; k < 2; k++) drow[h.b + (r0 + r) * HS + d + k] = (float)h.scale * sum[r][k];
    }
}

// dhead (heads_stored, HS) of a token: grouped heads are their own gradient; others are staged in shared memory, rows `pitch` apart.
__device__ inline void heads_load_gradient(float *drow, floatX *dheads, const floatX *dhead, const Heads &h, int NH, int HS, int pitch) {
    constexpr int X = PackedX::size;
    #pragma unroll 4
    for (int c = threadIdx.x * X; c < heads_stored(h, NH) * HS; c += HEADS_THREADS * X) {
        PackedX g = load16_streaming(dhead + c);
        if (h.kind == HEADS_FACTORED) store16(dheads + c / HS * pitch + c % HS, g);
        else for (int k = 0; k < X; k++) drow[h.b + c + k] = (float)g[k];
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// CUDA kernels and their launchers

template <int STATIC_HS>        // 0: any
__global__ void __launch_bounds__(HEADS_THREADS) heads_forward_kernel(floatX *q, floatX *k, floatX *v, const floatX *fac, const float *table, HeadsShape s) {
    extern __shared__ float4 heads_smem[];
    float *row = (float *)heads_smem;
    int64_t n = blockIdx.x;
    int HS = STATIC_HS ? STATIC_HS : s.HS;
    for (int c = threadIdx.x * PackedX::size; c < s.Pp; c += HEADS_THREADS * PackedX::size) {
        PackedX p = load16(fac + n * s.Pp + c);
        for (int i = 0; i < PackedX::size; i++) row[c + i] = (float)p[i];
    }
    __syncthreads();            // the row is there
    table += n % s.T * HS;
    heads_rotate(row, s.q, table, HS, 1);
    heads_rotate(row, s.k, table, HS, 1);
    __syncthreads();            // and rotated
    heads_of_token(q + n * heads_stored(s.q, s.NH) * HS, row, s.q, s.NH, HS);
    heads_of_token(k + n * heads_stored(s.k, s.NH) * HS, row, s.k, s.NH, HS);
    heads_of_token(v + n * heads_stored(s.v, s.NH) * HS, row, s.v, s.NH, HS);
}

template <int STATIC_HS>
__global__ void __launch_bounds__(HEADS_THREADS)
heads_backward_kernel(floatX *dfac, const floatX *dq, const floatX *dk, const floatX *dv, const floatX *fac, const float *table, HeadsShape s) {
    constexpr int X = PackedX::size;
    extern __shared__ float4 heads_smem[];
    int HS = STATIC_HS ? STATIC_HS : s.HS, pitch = HS + X;      // one vector more a row: neighbouring rows start in other banks
    float *row = (float *)heads_smem, *drow = row + s.Pp;
    int64_t n = blockIdx.x;
    const Heads *heads[3] = {&s.q, &s.k, &s.v};
    const floatX *dhead[3] = {dq, dk, dv};
    floatX *dheads[3], *free_smem = (floatX *)(drow + s.Pp);
    #pragma unroll
    for (int w = 0; w < 3; w++) {
        const Heads &h = *heads[w];
        dheads[w] = free_smem;
        if (h.kind == HEADS_FACTORED) free_smem += s.NH * pitch;
        heads_load_gradient(drow, dheads[w], dhead[w] + n * heads_stored(h, s.NH) * HS, h, s.NH, HS, pitch);
    }
    int used = s.v.b + s.v.R * HS;      // P: what is beyond is padding
    for (int c = threadIdx.x * X; c < s.Pp; c += HEADS_THREADS * X) {
        PackedX p = load16(fac + n * s.Pp + c);
        for (int i = 0; i < X; i++) {
            row[c + i] = (float)p[i];
            if (c + i >= used) drow[c + i] = 0;
        }
    }
    __syncthreads();            // factors and gradients are there
    table += n % s.T * HS;
    heads_rotate(row, s.q, table, HS, 1);
    heads_rotate(row, s.k, table, HS, 1);
    __syncthreads();            // the factors are rotated
    #pragma unroll
    for (int w = 0; w < 3; w++) {
        const Heads &h = *heads[w];
        if (h.kind == HEADS_GROUPED) continue;
        // the threads of q, k and v follow each other, so that all are at work
        for (int i = (threadIdx.x + HEADS_THREADS - w * s.NH % HEADS_THREADS) % HEADS_THREADS; i < s.NH; i += HEADS_THREADS) {
            if (h.R % 6 == 0) heads_da<6>(drow, row, dheads[w] + i * pitch, h, i, HS);
            else if (h.R % 2 == 0) heads_da<2>(drow, row, dheads[w] + i * pitch, h, i, HS);
            else heads_da<1>(drow, row, dheads[w] + i * pitch, h, i, HS);
        }
    }
    #pragma unroll
    for (int w = 0; w < 3; w++) {
        const Heads &h = *heads[w];
        if (h.kind == HEADS_GROUPED) continue;
        for (int i = (threadIdx.x + HEADS_THREADS - w * (HS / 2) % HEADS_THREADS) % HEADS_THREADS; i < HS / 2; i += HEADS_THREADS) {
            if (h.R % 6 == 0) heads_db<6>(drow, row, dheads[w], h, 2 * i, s.NH, HS, pitch);
            else if (h.R % 2 == 0) heads_db<2>(drow, row, dheads[w], h, 2 * i, s.NH, HS, pitch);
            else heads_db<1>(drow, row, dheads[w], h, 2 * i, s.NH, HS, pitch);
        }
    }
    __syncthreads();            // drow is whole
    heads_rotate(drow, s.q, table, HS, -1);
    heads_rotate(drow, s.k, table, HS, -1);
    __syncthreads();            // and turned back
    for (int c = threadIdx.x * X; c < s.Pp; c += HEADS_THREADS * X) {
        PackedX p;
        for (int i = 0; i < X; i++) p[i] = (floatX)drow[c + i];
        store16(dfac + n * s.Pp + c, p);
    }
}

LLMC_FN size_t heads_backward_smem_bytes(const HeadsShape *s) {
    int staged = (s->q.kind == HEADS_FACTORED) + (s->k.kind == HEADS_FACTORED) + (s->v.kind == HEADS_FACTORED);
    return 2 * (size_t)s->Pp * sizeof(float) + (size_t)(staged * s->NH * (s->HS + PackedX::size)) * sizeof(floatX);
}

// q (N, heads_stored(q), HS), k and v alike; fac (N, Pp), unrotated; table (T, HS); N = B*T. HS a multiple of 16 up to 512
inline void heads_forward(floatX *q, floatX *k, floatX *v, const floatX *fac, const float *table, const HeadsShape &s, int64_t N, cudaStream_t stream) {
    Launch where((unsigned)N, HEADS_THREADS, (size_t)s.Pp * sizeof(float), stream);
    if (s.HS == 64) launch(heads_forward_kernel<64>, where, q, k, v, fac, table, s);
    else if (s.HS == 128) launch(heads_forward_kernel<128>, where, q, k, v, fac, table, s);
    else launch(heads_forward_kernel<0>, where, q, k, v, fac, table, s);
}

// dfac (N, Pp) may be fac itself: a block reads its row before it writes it.
inline void heads_backward(floatX *dfac, const floatX *dq, const floatX *dk, const floatX *dv, const floatX *fac, const float *table, const HeadsShape &s,
                           int64_t N, cudaStream_t stream) {
    Launch where((unsigned)N, HEADS_THREADS, heads_backward_smem_bytes(&s), stream);
    if (s.HS == 64) launch(heads_backward_kernel<64>, where, dfac, dq, dk, dv, fac, table, s);
    else if (s.HS == 128) launch(heads_backward_kernel<128>, where, dfac, dq, dk, dv, fac, table, s);
    else launch(heads_backward_kernel<0>, where, dfac, dq, dk, dv, fac, table, s);
}

#endif
