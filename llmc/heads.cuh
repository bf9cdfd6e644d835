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
//
// With qk_norm the heads of q and k are divided by their root mean squares as they are made, and backward the gradients
// go through the norm before anything else: with q = q^ r, r = 1 / sqrt(mean(q^^2) + eps),
//
//     dq^ = r (dq - q mean(dq q))
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

// The kernels here need one head size: HS = HSK = HSV. mla has latent.cuh.
typedef struct {
    Heads q, k, v;
    int T, NH, HS;
    int width, pitch;       // of a factor row: numbers, padding included; from one row to the next
    int norm;               // qk_norm
    float eps;
} HeadsShape;

// A variant's factor rows (factors.cuh) are rotated already.
LLMC_FN HeadsShape heads_shape(const Model *m, int64_t T) {
    HeadsShape s = {m->q, m->k, m->v, (int)T, (int)m->config.n_head, (int)m->HSK, (int)m->PFp,
                    (int)(m->is_projected ? m->Pp : m->PFp), (int)m->config.qk_norm, (float)m->config.rms_eps};
    if (!m->is_projected) s.q.HSR = s.k.HSR = 0;
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
// Forward: parts of the kernel. row (width) is the token's factor row in shared memory, in fp32.

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

// Sum of x over the adjacent lanes that share a head: `lanes` of them, starting at a multiple of that. All lanes of the
// warp call; lanes left over at its end get nothing of use.
__device__ inline float heads_lane_sum(float x, int lanes) {
    if ((lanes & (lanes - 1)) == 0) {
        for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
        return x;
    }
    float sum = 0;
    for (int i = 0, first = threadIdx.x % 32 / lanes * lanes; i < lanes; i++)
        sum += __shfl_sync(0xffffffff, x, (first + i) % 32);
    return sum;
}

// Divides a head, of which each of `lanes` adjacent lanes has X numbers, by its root mean square; the first of them
// stores the factor in *rstd. All lanes of the warp call, those without a head with active false.
template <int X>
__device__ inline void heads_norm(float (&x)[X], float *rstd, int lanes, float eps, bool active) {
    float sum = 0;
    for (int k = 0; k < X; k++) sum += active ? x[k] * x[k] : 0;
    float r = 1 / sqrtf(heads_lane_sum(sum, lanes) / (lanes * X) + eps);
    for (int k = 0; k < X; k++) x[k] *= r;
    if (active && threadIdx.x % 32 % lanes == 0) *rstd = r;
}

// out (NH, HS) = scale a (NH, R) b (R, HS). A thread owns 16 bytes of a head and loops over the heads. Its part of the
// RANK vectors b stays in registers; with RANK 0 (any rank) it is read from shared memory. NORM: heads are normed, and
// their factors go to rstd (NH).
template <int RANK, bool NORM>
__device__ inline void heads_contract(floatX *out, float *rstd, const float *row, const Heads &h, int NH, int HS,
                                      float eps) {
    constexpr int X = PackedX::size;
    int R = RANK ? RANK : h.R, threads = HS / X;        // threads per head
    int d = threadIdx.x % threads * X, stride = HEADS_FORWARD_THREADS / threads;
    const float *a = row + h.a, *b = row + h.b + d;
    float scale = (float)h.scale, kept[RANK ? RANK : 1][X];
    if (RANK)
        for (int r = 0; r < RANK; r++)
            for (int k = 0; k < X; k++) kept[r][k] = scale * b[r * HS + k];
    int first = threadIdx.x / threads;
    for (int begin = 0; begin < NH; begin += stride) {      // a warp's lanes stay together, for heads_norm
        int i = min(begin + first, NH - 1);
        bool active = first < stride && i == begin + first;
        float sum[X] = {};
        for (int r = 0; r < R; r++) {
            float weight = RANK ? a[i * R + r] : scale * a[i * R + r];
            for (int k = 0; k < X; k++) sum[k] += weight * (RANK ? kept[RANK ? r : 0][k] : b[r * HS + k]);
        }
        if (NORM) heads_norm(sum, rstd + i, threads, eps, active);
        if (active) heads_store(out + i * HS + d, sum);
    }
}

// out (heads_stored, HS): one token's q, k or v. rstd (heads_stored): with NORM.
template <bool NORM>
__device__ inline void heads_of_token(floatX *out, float *rstd, const float *row, const Heads &h, int NH, int HS,
                                      float eps) {
    constexpr int X = PackedX::size;
    int threads = HS / X, stride = HEADS_FORWARD_THREADS / threads, first = threadIdx.x / threads;
    for (int begin = 0; begin < h.R && h.kind == HEADS_GROUPED; begin += stride) {      // the vectors are the heads
        int i = begin + first, at = i * HS + threadIdx.x % threads * X;
        bool active = first < stride && i < h.R;
        float x[X];
        for (int k = 0; k < X; k++) x[k] = active ? row[h.b + at + k] : 0;
        if (NORM) heads_norm(x, rstd + i, threads, eps, active);
        if (active) heads_store(out + at, x);
    }
    if (h.kind == HEADS_GROUPED) return;
    switch (h.R) {      // the ranks of the presets; others are slower
        case 1: heads_contract<1, NORM>(out, rstd, row, h, NH, HS, eps); break;
        case 2: heads_contract<2, NORM>(out, rstd, row, h, NH, HS, eps); break;
        case 4: heads_contract<4, NORM>(out, rstd, row, h, NH, HS, eps); break;
        case 6: heads_contract<6, NORM>(out, rstd, row, h, NH, HS, eps); break;
        default: heads_contract<0, NORM>(out, rstd, row, h, NH, HS, eps);
    }
}

// One block per token. STATIC_HS 0: any head size.
template <int STATIC_HS, bool NORM>
__global__ void __launch_bounds__(HEADS_FORWARD_THREADS)
heads_forward_kernel(floatX *q, floatX *k, floatX *v, float *rstdq, float *rstdk, const floatX *fac, const float *table,
                     HeadsShape s) {
    extern __shared__ float4 heads_smem[];
    float *row = (float *)heads_smem;
    int64_t n = blockIdx.x;
    int HS = STATIC_HS ? STATIC_HS : s.HS;
    for (int c = threadIdx.x * PackedX::size; c < s.width; c += HEADS_FORWARD_THREADS * PackedX::size) {
        PackedX packed = load16(fac + n * s.pitch + c);
        for (int i = 0; i < PackedX::size; i++) row[c + i] = (float)packed[i];
    }
    __syncthreads();            // the factors are in shared memory
    table += n % s.T * HS;
    heads_rotate(row, s.q, table, HS);
    heads_rotate(row, s.k, table, HS);
    heads_rotate(row, s.v, table, HS);
    __syncthreads();            // the vectors are rotated
    int64_t at_q = n * heads_stored(s.q, s.NH), at_k = n * heads_stored(s.k, s.NH), at_v = n * heads_stored(s.v, s.NH);
    heads_of_token<NORM>(q + at_q * HS, rstdq + at_q, row, s.q, s.NH, HS, s.eps);
    heads_of_token<NORM>(k + at_k * HS, rstdk + at_k, row, s.k, s.NH, HS, s.eps);
    heads_of_token<false>(v + at_v * HS, NULL, row, s.v, s.NH, HS, 0);
}

// Calls f with heads_forward_kernel or heads_backward_kernel for the head size and the norm of a shape.
#define HEADS_DISPATCH(kernel, s, f) \
    ((s).norm ? ((s).HS == 64 ? f(kernel<64, true>) : (s).HS == 128 ? f(kernel<128, true>) : f(kernel<0, true>)) \
              : ((s).HS == 64 ? f(kernel<64, false>) : (s).HS == 128 ? f(kernel<128, false>) : f(kernel<0, false>)))

// q, k, v (N, heads_stored, HS), fac (N, pitch), table (T, HS); N = B*T, HS a multiple of 32. With norm also rstdq and
// rstdk (N, heads_stored), for heads_backward. Without rotation (a variant's rows) table is not read.
inline void heads_forward(floatX *q, floatX *k, floatX *v, float *rstdq, float *rstdk, const floatX *fac,
                          const float *table, const HeadsShape &s, int64_t N, cudaStream_t stream) {
    Launch where((unsigned)N, HEADS_FORWARD_THREADS, (size_t)s.width * sizeof(float), stream);
    auto run = [&](auto kernel) { launch(kernel, where, q, k, v, rstdq, rstdk, fac, table, s); };
    HEADS_DISPATCH(heads_forward_kernel, s, run);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward: parts of the kernel. row, drow (width): a token's factor row and its gradient, in shared memory.

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

// Gradients through the norm, in place: dheads (heads, HS) in shared memory, rows `pitch` elements apart; normed
// (heads, HS) and rstd (heads) from the forward pass.
__device__ inline void heads_norm_backward(floatX *dheads, int pitch, const floatX *normed, const float *rstd,
                                           int heads, int HS) {
    constexpr int X = PackedX::size;
    int lanes = HS / X, per_warp = 32 / lanes, lane = threadIdx.x % 32, slot = lane / lanes;
    for (int begin = threadIdx.x / 32 * per_warp; begin < heads; begin += HEADS_THREADS / 32 * per_warp) {
        int i = begin + slot, d = lane % lanes * X;
        bool active = slot < per_warp && i < heads;
        PackedX gradient = {}, head = {};
        if (active) gradient = load16(dheads + i * pitch + d), head = load16(normed + i * HS + d);
        float sum = 0;
        for (int k = 0; k < X; k++) sum += (float)gradient[k] * (float)head[k];
        float mean = heads_lane_sum(sum, lanes) / HS;
        if (!active) continue;
        for (int k = 0; k < X; k++)
            gradient[k] = (floatX)(rstd[i] * ((float)gradient[k] - (float)head[k] * mean));
        store16(dheads + i * pitch + d, gradient);
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
    int elements = 2 * s->width + pitch + heads_token_size(s->q, s->NH, pitch) + heads_token_size(s->k, s->NH, pitch) +
                   heads_token_size(s->v, s->NH, pitch);
    return (size_t)elements * sizeof(floatX);
}

// What the backward pass reads besides the factors: of q, k and v the gradients; with norm, of q and k also the heads
// and their factors from the forward pass.
typedef struct { const floatX *gradient, *normed; const float *rstd; } HeadsGradient;
typedef struct { HeadsGradient of[3]; } HeadsGradients;

// One block per token.
template <int STATIC_HS, bool NORM>
__global__ void __launch_bounds__(HEADS_THREADS)
heads_backward_kernel(floatX *dfac, const floatX *fac, const float *table, HeadsGradients g, HeadsShape s) {
    constexpr int X = PackedX::size;
    extern __shared__ float4 heads_smem[];
    int HS = STATIC_HS ? STATIC_HS : s.HS, pitch = heads_pitch(HS);
    floatX *row = (floatX *)heads_smem, *drow = row + s.width, *zeros = drow + s.width, *next = zeros + pitch;
    int64_t n = blockIdx.x;
    const Heads *heads[3] = {&s.q, &s.k, &s.v};
    HeadsPart parts[3];
    table += n % s.T * HS;
    for (int c = threadIdx.x * X; c < s.width; c += HEADS_THREADS * X)
        ptx_cp_async_16(smem_address(row + c), fac + n * s.pitch + c);
    ptx_cp_async_commit();
    #pragma unroll
    for (int w = 0; w < 3; w++) {
        const Heads &h = *heads[w];
        const floatX *from = g.of[w].gradient + n * heads_stored(h, s.NH) * HS;
        parts[w] = {next, next + (h.R + 7) / 8 * 8 * pitch, zeros, s.NH, HS, pitch};
        next += heads_token_size(h, s.NH, pitch);
        if (h.kind == HEADS_GROUPED && !(NORM && w < 2)) heads_grouped_backward(drow + h.b, from, h, table, HS);
        else if (h.kind == HEADS_GROUPED)       // goes through the norm in drow
            for (int c = threadIdx.x * X; c < h.R * HS; c += HEADS_THREADS * X)
                ptx_cp_async_16(smem_address(drow + h.b + c), from + c);
        else
            for (int c = threadIdx.x * X; c < s.NH * HS; c += HEADS_THREADS * X)
                ptx_cp_async_16(smem_address(parts[w].dheads + c / HS * pitch + c % HS), from + c);
    }
    for (int c = threadIdx.x; c < pitch; c += HEADS_THREADS) zeros[c] = (floatX)0.0f;
    for (int c = s.v.b + s.v.R * HS + threadIdx.x; c < s.width; c += HEADS_THREADS)     // padding
        drow[c] = (floatX)0.0f;
    ptx_cp_async_commit();
    ptx_cp_async_wait<1>();
    __syncthreads();            // the factors are in shared memory
    #pragma unroll
    for (int w = 0; w < 3; w++)
        if (heads[w]->kind == HEADS_FACTORED) heads_token_vectors(parts[w], row, *heads[w], table);
    ptx_cp_async_wait_all();
    __syncthreads();            // the gradients are in shared memory, and the vectors are rotated
    if (NORM) {
        #pragma unroll
        for (int w = 0; w < 2; w++) {
            const Heads &h = *heads[w];
            int64_t stored = heads_stored(h, s.NH), at = n * stored;
            bool grouped = h.kind == HEADS_GROUPED;
            heads_norm_backward(grouped ? drow + h.b : parts[w].dheads, grouped ? HS : pitch, g.of[w].normed + at * HS,
                                g.of[w].rstd + at, (int)stored, HS);
        }
        __syncthreads();        // the gradients are those of the heads before the norm
        #pragma unroll
        for (int w = 0; w < 2; w++)
            if (heads[w]->kind == HEADS_GROUPED)
                heads_grouped_backward(drow + heads[w]->b, drow + heads[w]->b, *heads[w], table, HS);
    }
    #pragma unroll
    for (int w = 0; w < 3; w++)
        if (heads[w]->kind == HEADS_FACTORED)
            heads_token_backward(drow, row, parts[w], *heads[w], table, w * ((s.NH + 15) / 16 + HS / 32));
    __syncthreads();            // drow is complete
    for (int c = threadIdx.x * X; c < s.width; c += HEADS_THREADS * X)
        store16(dfac + n * s.pitch + c, load16(drow + c));
}

// dfac (N, pitch) may be fac itself: a block reads its row before it writes it. Gradients are shaped like q, k, v in
// heads_forward; fac, table and N are the same.
inline void heads_backward(floatX *dfac, const floatX *fac, const float *table, const HeadsGradients &g,
                           const HeadsShape &s, int64_t N, cudaStream_t stream) {
    Launch where((unsigned)N, HEADS_THREADS, heads_backward_smem_bytes(&s), stream);
    auto run = [&](auto kernel) { launch(kernel, where, dfac, fac, table, g, s); };
    HEADS_DISPATCH(heads_backward_kernel, s, run);
}

#endif
