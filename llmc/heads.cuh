// RoPE and the contraction of factors, one kernel each way. Forward, the q, k and v of a token come from its factor row
// [aQ bQ aK bK aV bV pad] (Heads in model.h); the b_r of q and k are rotated by the token's position:
//
//     head_i = scale sum_r a[i][r] b_r
//
// Backward, with db_r rotated back:
//
//     da[i][r] = scale <dhead_i, b_r>        db_r = scale sum_i a[i][r] dhead_i
//
// Factors are stored unrotated; the rotation happens in shared memory. In bf16 the backward sums run on the tensor
// cores, small as they are: with ordinary instructions the kernel took four times as long as its memory traffic. The
// forward sums gain nothing from tensor cores (dev/LOG.md). Grouped heads (MHA, GQA, MQA) are not
// replicated: q, k or v then has R heads instead of NH.
#ifndef LLMC_HEADS_CUH
#define LLMC_HEADS_CUH

#include "model.h"
#include "modes.h"
#include "precision.cuh"
#include "ptx.cuh"

enum {
    // One warp per token: four warps would each read all the token's vectors from shared memory (0.125 ms, not 0.104).
    HEADS_FORWARD_THREADS = 32,
    HEADS_THREADS = 128             // backward
};

// The kernels here need one head size: HS = HSK = HSV = HSR (heads_supported).
typedef struct { Heads q, k, v; int T, NH, HS, Pp; } HeadsShape;

LLMC_FN bool heads_supported(const Model *m) { return m->HSK == m->HSV && m->HSK == m->HSR; }

LLMC_FN HeadsShape heads_shape(const Model *m, int64_t T) {
    HeadsShape s = {m->q, m->k, m->v, (int)T, (int)m->config.n_head, (int)m->HSK, (int)m->Pp};
    return s;
}

// Number of heads in the stored tensor, as attention reads it.
__host__ __device__ inline int heads_stored(const Heads &h, int NH) { return h.kind == HEADS_FACTORED ? NH : h.R; }

// Fills table (T, HS), on the host: the first half of a row has the cosines, the second the sines.
LLMC_FN void rope_table(float *table, int64_t T, int64_t HS, double base) {
    for (int64_t t = 0; t < T; t++)
        for (int64_t i = 0; i < HS / 2; i++) {
            double angle = (double)t * rope_frequency(i, HS, base);
            table[t * HS + i] = (float)cos(angle), table[t * HS + HS / 2 + i] = (float)sin(angle);
        }
}

// Rotates elements i and i + HS / 2 of a vector: (x1, x2) -> (x1 cos + x2 sin, x2 cos - x1 sin). table (HS) is the row
// of the token's position. Without rope (v) it does nothing.
__device__ inline void heads_rotate_pair(float &x1, float &x2, const Heads &h, const float *table, int i, int HS,
                                         Direction direction) {
    if (h.HSR == 0) return;
    float cosine = table[i], sine = (float)direction * table[HS / 2 + i], x = x1, y = x2;
    x1 = x * cosine + y * sine;
    x2 = y * cosine - x * sine;
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward: parts of the kernel. row (Pp) is the token's factor row in shared memory, in fp32.

// Rotates the vectors b of h in place. table (HS) is the row of the token's position.
__device__ inline void heads_rotate(float *row, const Heads &h, const float *table, int HS) {
    int half = HS / 2;
    for (int p = threadIdx.x; p < h.R * half; p += HEADS_FORWARD_THREADS) {
        float *x1 = row + h.b + p / half * HS + p % half;
        heads_rotate_pair(x1[0], x1[half], h, table, p % half, HS, ROTATE);
    }
}

template <class Values>
__device__ inline void heads_store(floatX *to, const Values &x) {      // rounds and stores 16 bytes
    PackedX packed;
    for (int k = 0; k < PackedX::size; k++) packed[k] = (floatX)x[k];
    store16(to, packed);
}

// out (NH, HS) = scale a (NH, R) b (R, HS). A thread owns 16 bytes of a head and loops over the heads. Its part of the
// RANK vectors b stays in registers; with RANK 0 (any rank) it is read from shared memory.
template <int RANK>
__device__ inline void heads_contract(floatX *out, const float *row, const Heads &h, int NH, int HS) {
    constexpr int X = PackedX::size;
    int R = RANK ? RANK : h.R, threads = HS / X;        // threads per head
    int d = threadIdx.x % threads * X, stride = HEADS_FORWARD_THREADS / threads;
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
        heads_store(out + i * HS + d, sum);
    }
}

// out (heads_stored, HS): one token's q, k or v.
__device__ inline void heads_of_token(floatX *out, const float *row, const Heads &h, int NH, int HS) {
    if (h.kind == HEADS_GROUPED) {      // the vectors are the heads
        constexpr int X = PackedX::size;
        for (int c = threadIdx.x * X; c < h.R * HS; c += HEADS_FORWARD_THREADS * X) heads_store(out + c, row + h.b + c);
        return;
    }
    switch (h.R) {      // the ranks of the presets; others are slower
        case 1: heads_contract<1>(out, row, h, NH, HS); break;
        case 2: heads_contract<2>(out, row, h, NH, HS); break;
        case 4: heads_contract<4>(out, row, h, NH, HS); break;
        case 6: heads_contract<6>(out, row, h, NH, HS); break;
        default: heads_contract<0>(out, row, h, NH, HS);
    }
}

// One block per token. STATIC_HS 0: any head size.
template <int STATIC_HS>
__global__ void __launch_bounds__(HEADS_FORWARD_THREADS)
heads_forward_kernel(floatX *q, floatX *k, floatX *v, const floatX *fac, const float *table, HeadsShape s) {
    extern __shared__ float4 heads_smem[];
    float *row = (float *)heads_smem;
    int64_t n = blockIdx.x;
    int HS = STATIC_HS ? STATIC_HS : s.HS;
    for (int c = threadIdx.x * PackedX::size; c < s.Pp; c += HEADS_FORWARD_THREADS * PackedX::size) {
        PackedX packed = load16(fac + n * s.Pp + c);
        for (int i = 0; i < PackedX::size; i++) row[c + i] = (float)packed[i];
    }
    __syncthreads();            // the factors are in shared memory
    table += n % s.T * HS;
    heads_rotate(row, s.q, table, HS);
    heads_rotate(row, s.k, table, HS);
    heads_rotate(row, s.v, table, HS);
    __syncthreads();            // the vectors are rotated
    heads_of_token(q + n * heads_stored(s.q, s.NH) * HS, row, s.q, s.NH, HS);
    heads_of_token(k + n * heads_stored(s.k, s.NH) * HS, row, s.k, s.NH, HS);
    heads_of_token(v + n * heads_stored(s.v, s.NH) * HS, row, s.v, s.NH, HS);
}

// q, k, v (N, heads_stored, HS), fac (N, Pp) unrotated, table (T, HS); N = B*T, HS a multiple of 32.
inline void heads_forward(floatX *q, floatX *k, floatX *v, const floatX *fac, const float *table, const HeadsShape &s,
                          int64_t N, cudaStream_t stream) {
    Launch where((unsigned)N, HEADS_FORWARD_THREADS, (size_t)s.Pp * sizeof(float), stream);
    if (s.HS == 64) launch(heads_forward_kernel<64>, where, q, k, v, fac, table, s);
    else if (s.HS == 128) launch(heads_forward_kernel<128>, where, q, k, v, fac, table, s);
    else launch(heads_forward_kernel<0>, where, q, k, v, fac, table, s);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward: parts of the kernel. row, drow (Pp): a token's factor row and its gradient, in shared memory.

// One of a token's q, k, v in shared memory, with rows `pitch` elements apart.
typedef struct {
    floatX *vectors;        // (R rounded up to 8, HS): b, rotated
    floatX *dheads;         // (NH, HS)
    floatX *zeros;          // (pitch): read in place of the rows past NH
    int NH, HS, pitch;
} HeadsPart;

// Grouped heads are the vectors themselves: dfactors (R, HS), in shared memory, = dheads (R, HS), rotated back.
__device__ inline void heads_grouped_backward(floatX *dfactors, const floatX *dheads, const Heads &h,
                                              const float *table, int HS) {
    constexpr int X = PackedX::size;
    int half = HS / 2;
    for (int p = threadIdx.x * X; p < h.R * half; p += HEADS_THREADS * X) {
        int at = p / half * HS + p % half;
        PackedX low = load16(dheads + at), high = load16(dheads + at + half);
        for (int k = 0; k < X; k++) {
            float x1 = (float)low[k], x2 = (float)high[k];
            heads_rotate_pair(x1, x2, h, table, p % half + k, HS, ROTATE_BACK);
            low[k] = (floatX)x1, high[k] = (floatX)x2;
        }
        store16(dfactors + at, low), store16(dfactors + at + half, high);
    }
}

// Fills part.vectors from the factor row.
__device__ inline void heads_token_vectors(const HeadsPart &part, const floatX *row, const Heads &h,
                                           const float *table) {
    int half = part.HS / 2;
    for (int p = threadIdx.x; p < h.R * half; p += HEADS_THREADS) {
        int r = p / half, i = p % half;
        float x1 = (float)row[h.b + r * part.HS + i], x2 = (float)row[h.b + r * part.HS + half + i];
        heads_rotate_pair(x1, x2, h, table, i, part.HS, ROTATE);
        part.vectors[r * part.pitch + i] = (floatX)x1, part.vectors[r * part.pitch + half + i] = (floatX)x2;
    }
}

// Stores elements i and i + HS / 2 of db_r, rotated back.
__device__ inline void heads_store_pair(floatX *drow, float x1, float x2, const Heads &h, const float *table, int r,
                                        int i, int HS) {
    heads_rotate_pair(x1, x2, h, table, i, HS, ROTATE_BACK);
    drow[h.b + r * HS + i] = (floatX)x1, drow[h.b + r * HS + HS / 2 + i] = (floatX)x2;
}

// da and db of a token, with fp32 arithmetic.
__device__ inline void heads_token_backward(float *drow, const float *row, const HeadsPart &part, const Heads &h,
                                            const float *table, int /*first_tile*/) {
    float scale = (float)h.scale;
    for (int p = threadIdx.x; p < part.NH * h.R; p += HEADS_THREADS) {
        float sum = 0;
        for (int d = 0; d < part.HS; d++)
            sum += (float)part.dheads[p / h.R * part.pitch + d] * (float)part.vectors[p % h.R * part.pitch + d];
        drow[h.a + p] = scale * sum;
    }
    int half = part.HS / 2;
    for (int p = threadIdx.x; p < h.R * half; p += HEADS_THREADS) {
        float sum1 = 0, sum2 = 0;
        for (int i = 0; i < part.NH; i++) {
            float weight = row[h.a + i * h.R + p / half];
            sum1 += weight * (float)part.dheads[i * part.pitch + p % half];
            sum2 += weight * (float)part.dheads[i * part.pitch + p % half + half];
        }
        heads_store_pair((floatX *)drow, scale * sum1, scale * sum2, h, table, p / half, p % half, part.HS);
    }
}

// The same in bf16 on the tensor cores, for 8 vectors per pass: da (NH, 8) = dheads b^T and db^T (HS, 8) = dheads^T a,
// in tiles of 16 rows. A db tile has 16 rows d and the 16 rows d + HS / 2 that rotate with them. The warps take tiles
// in turn; first_tile, the number of tiles before these, says which warp is next.
__device__ inline void heads_token_backward(bf16 *drow, const bf16 *row, const HeadsPart &part, const Heads &h,
                                            const float *table, int first_tile) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = HEADS_THREADS / 32, half = part.HS / 2;
    int quad = lane / 4, pair = lane % 4 * 2;       // this lane's place in mma fragments: row, first column
    int tiles_da = (part.NH + 15) / 16, tiles_db = half / 16;
    float scale = (float)h.scale;
    for (int r0 = 0; r0 < h.R; r0 += 8)
        for (int tile = (warp + warps - first_tile % warps) % warps; tile < tiles_da + tiles_db; tile += warps) {
            float acc[4] = {}, acc2[4] = {};
            uint32_t left[4];
            if (tile < tiles_da) {
                int i = 16 * tile + lane % 16;
                uint32_t from = smem_address((i < part.NH ? part.dheads + i * part.pitch : part.zeros) + lane / 16 * 8);
                const uint32_t *right = (const uint32_t *)(part.vectors + (r0 + quad) * part.pitch + pair);
                #pragma unroll 4
                for (int d = 0; d < part.HS; d += 16) {
                    ptx_ldmatrix(left, from + d * 2);
                    ptx_mma(acc, left, right[d / 2], right[d / 2 + 4]);
                }
                for (int e = 0; e < 4; e++) {
                    int head = 16 * tile + quad + e / 2 * 8, r = r0 + pair + e % 2;
                    if (head < part.NH && r < h.R) drow[h.a + head * h.R + r] = (bf16)(scale * acc[e]);
                }
            } else {
                int d = (tile - tiles_da) * 16, r = r0 + quad;
                #pragma unroll 3
                for (int i0 = 0; i0 < part.NH; i0 += 16) {
                    int i = i0 + lane % 8 + lane / 16 * 8;
                    uint32_t from = smem_address((i < part.NH ? part.dheads + i * part.pitch : part.zeros) + d +
                                                 lane / 8 % 2 * 8);
                    float weights[4];
                    for (int k = 0; k < 4; k++) {
                        int head = i0 + pair + k % 2 + k / 2 * 8;
                        weights[k] = head < part.NH && r < h.R ? (float)row[h.a + head * h.R + r] : 0;
                    }
                    uint32_t right0 = ptx_pack_bf16(weights[0], weights[1]);
                    uint32_t right1 = ptx_pack_bf16(weights[2], weights[3]);
                    ptx_ldmatrix_trans(left, from);
                    ptx_mma(acc, left, right0, right1);
                    ptx_ldmatrix_trans(left, from + half * 2);
                    ptx_mma(acc2, left, right0, right1);
                }
                for (int e = 0; e < 4; e++)
                    if (r0 + pair + e % 2 < h.R)
                        heads_store_pair((floatX *)drow, scale * acc[e], scale * acc2[e], h, table, r0 + pair + e % 2,
                                         d + quad + e / 2 * 8, part.HS);
            }
        }
}

// Elements of shared memory for one of q, k, v: the vectors, padded to a multiple of 8, and dheads.
__host__ __device__ inline int heads_token_size(const Heads &h, int NH, int pitch) {
    return h.kind == HEADS_FACTORED ? ((h.R + 7) / 8 * 8 + NH) * pitch : 0;
}
// 16 bytes of padding, so that adjacent rows start in different banks.
__host__ __device__ inline int heads_pitch(int HS) { return HS + PackedX::size; }

LLMC_FN size_t heads_backward_smem_bytes(const HeadsShape *s) {
    int pitch = heads_pitch(s->HS);
    int elements = 2 * s->Pp + pitch + heads_token_size(s->q, s->NH, pitch) + heads_token_size(s->k, s->NH, pitch) +
                   heads_token_size(s->v, s->NH, pitch);
    return (size_t)elements * sizeof(floatX);
}

// One block per token.
template <int STATIC_HS>
__global__ void __launch_bounds__(HEADS_THREADS)
heads_backward_kernel(floatX *dfac, const floatX *dq, const floatX *dk, const floatX *dv, const floatX *fac,
                      const float *table, HeadsShape s) {
    constexpr int X = PackedX::size;
    extern __shared__ float4 heads_smem[];
    int HS = STATIC_HS ? STATIC_HS : s.HS, pitch = heads_pitch(HS);
    floatX *row = (floatX *)heads_smem, *drow = row + s.Pp, *zeros = drow + s.Pp, *next = zeros + pitch;
    int64_t n = blockIdx.x;
    const Heads *heads[3] = {&s.q, &s.k, &s.v};
    const floatX *dhead[3] = {dq, dk, dv};
    HeadsPart parts[3];
    table += n % s.T * HS;
    for (int c = threadIdx.x * X; c < s.Pp; c += HEADS_THREADS * X)
        ptx_cp_async_16(smem_address(row + c), fac + n * s.Pp + c);
    ptx_cp_async_commit();
    #pragma unroll
    for (int w = 0; w < 3; w++) {
        const Heads &h = *heads[w];
        const floatX *from = dhead[w] + n * heads_stored(h, s.NH) * HS;
        parts[w] = {next, next + (h.R + 7) / 8 * 8 * pitch, zeros, s.NH, HS, pitch};
        next += heads_token_size(h, s.NH, pitch);
        if (h.kind == HEADS_GROUPED) heads_grouped_backward(drow + h.b, from, h, table, HS);
        else
            for (int c = threadIdx.x * X; c < s.NH * HS; c += HEADS_THREADS * X)
                ptx_cp_async_16(smem_address(parts[w].dheads + c / HS * pitch + c % HS), from + c);
    }
    for (int c = threadIdx.x; c < pitch; c += HEADS_THREADS) zeros[c] = (floatX)0.0f;
    for (int c = s.v.b + s.v.R * HS + threadIdx.x; c < s.Pp; c += HEADS_THREADS) drow[c] = (floatX)0.0f;    // padding
    ptx_cp_async_commit();
    ptx_cp_async_wait<1>();
    __syncthreads();            // the factors are in shared memory
    #pragma unroll
    for (int w = 0; w < 3; w++)
        if (heads[w]->kind == HEADS_FACTORED) heads_token_vectors(parts[w], row, *heads[w], table);
    ptx_cp_async_wait_all();
    __syncthreads();            // the gradients are in shared memory, and the vectors are rotated
    #pragma unroll
    for (int w = 0; w < 3; w++)
        if (heads[w]->kind == HEADS_FACTORED)
            heads_token_backward(drow, row, parts[w], *heads[w], table, w * ((s.NH + 15) / 16 + HS / 32));
    __syncthreads();            // drow is complete
    for (int c = threadIdx.x * X; c < s.Pp; c += HEADS_THREADS * X) store16(dfac + n * s.Pp + c, load16(drow + c));
}

// dfac (N, Pp) may be fac itself: a block reads its row before it writes it. dq, dk, dv are shaped like q, k, v in
// heads_forward; fac, table and N are the same.
inline void heads_backward(floatX *dfac, const floatX *dq, const floatX *dk, const floatX *dv, const floatX *fac,
                           const float *table, const HeadsShape &s, int64_t N, cudaStream_t stream) {
    Launch where((unsigned)N, HEADS_THREADS, heads_backward_smem_bytes(&s), stream);
    if (s.HS == 64) launch(heads_backward_kernel<64>, where, dfac, dq, dk, dv, fac, table, s);
    else if (s.HS == 128) launch(heads_backward_kernel<128>, where, dfac, dq, dk, dv, fac, table, s);
    else launch(heads_backward_kernel<0>, where, dfac, dq, dk, dv, fac, table, s);
}

#endif
