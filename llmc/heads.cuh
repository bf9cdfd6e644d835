// RoPE and the contraction of factors, one kernel each way: q, k and v of a token from its row of factors (Heads in model.h),
//   head_i = scale sum_r a[i][r] b_r,   b_r rotated by the token's position where it belongs to q or k
// and back: da[i][r] = scale <dhead_i, b_r>;  db_r = scale sum_i a[i][r] dhead_i, rotated back.
// The factors are kept unrotated; the rotation happens in shared memory on the way. In bf16 the sums of the backward pass run on the
// tensor cores, for few numbers though they are: by ordinary instructions they took four times as long as their bytes do, while the
// forward ones gain nothing there (dev/results/train_gpu.md). Grouped heads (MHA, GQA, MQA) are not copied out: q, k or v then has R
// heads, not NH.
#ifndef LLMC_HEADS_CUH
#define LLMC_HEADS_CUH

#include "model.h"
#include "precision.cuh"
#include "ptx.cuh"

enum {
    HEADS_FORWARD_THREADS = 32,     // a warp a token: four warps would each read all its vectors from shared memory (0.125 ms, not 0.104)
    HEADS_THREADS = 128             // backward
};

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

typedef enum { ROTATE = 1, ROTATE_BACK = -1 } Direction;

// (x1, x2) -> (x1 c + x2 s, x2 c - x1 s), the pair i of a vector that is turned by the angles of `table` (HS); without rope as it is.
__device__ inline void heads_rotate_pair(float &x1, float &x2, const Heads &h, const float *table, int i, int HS, Direction direction) {
    if (!h.rope) return;
    float c = table[i], s = (float)direction * table[HS / 2 + i], x = x1, y = x2;
    x1 = x * c + y * s;
    x2 = y * c - x * s;
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward: pieces of the kernel. row (Pp): a token's factors, fp32, in shared memory

// Turns the vectors of `h` in place by the angles of `table` (HS).
__device__ inline void heads_rotate(float *row, const Heads &h, const float *table, int HS) {
    int half = HS / 2;
    for (int p = threadIdx.x; p < h.R * half; p += HEADS_FORWARD_THREADS) {
        float *x1 = row + h.b + p / half * HS + p % half;
        heads_rotate_pair(x1[0], x1[half], h, table, p % half, HS, ROTATE);
    }
}

template <class Values>
__device__ inline void heads_store(floatX *to, const Values &x) {      // 16 bytes of heads
    PackedX packed;
    for (int k = 0; k < PackedX::size; k++) packed[k] = (floatX)x[k];
    store16(to, packed);
}

// out (NH, HS). A thread owns 16 bytes of a head and walks over the heads; RANK vectors b stay in registers (RANK 0: any rank, from
// shared memory).
template <int RANK>
__device__ inline void heads_contract(floatX *out, const float *row, const Heads &h, int NH, int HS) {
    constexpr int X = PackedX::size;
    int R = RANK ? RANK : h.R, threads = HS / X, d = threadIdx.x % threads * X, stride = HEADS_FORWARD_THREADS / threads;
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

// out (heads_stored, HS): one token's q, k or v
__device__ inline void heads_of_token(floatX *out, const float *row, const Heads &h, int NH, int HS) {
    if (h.kind == HEADS_GROUPED) {      // the vectors are the heads
        constexpr int X = PackedX::size;
        for (int c = threadIdx.x * X; c < h.R * HS; c += HEADS_FORWARD_THREADS * X) heads_store(out + c, row + h.b + c);
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

template <int STATIC_HS>        // 0: any. One block: one token
__global__ void __launch_bounds__(HEADS_FORWARD_THREADS)
heads_forward_kernel(floatX *q, floatX *k, floatX *v, const floatX *fac, const float *table, HeadsShape s) {
    extern __shared__ float4 heads_smem[];
    float *row = (float *)heads_smem;
    int64_t n = blockIdx.x;
    int HS = STATIC_HS ? STATIC_HS : s.HS;
    for (int c = threadIdx.x * PackedX::size; c < s.Pp; c += HEADS_FORWARD_THREADS * PackedX::size) {
        PackedX p = load16(fac + n * s.Pp + c);
        for (int i = 0; i < PackedX::size; i++) row[c + i] = (float)p[i];
    }
    __syncthreads();            // the factors are there
    table += n % s.T * HS;
    heads_rotate(row, s.q, table, HS);
    heads_rotate(row, s.k, table, HS);
    heads_rotate(row, s.v, table, HS);
    __syncthreads();            // and their vectors rotated
    heads_of_token(q + n * heads_stored(s.q, s.NH) * HS, row, s.q, s.NH, HS);
    heads_of_token(k + n * heads_stored(s.k, s.NH) * HS, row, s.k, s.NH, HS);
    heads_of_token(v + n * heads_stored(s.v, s.NH) * HS, row, s.v, s.NH, HS);
}

// q (N, heads_stored(q), HS), k and v alike; fac (N, Pp), unrotated; table (T, HS); N = B*T. HS a multiple of 32
inline void heads_forward(floatX *q, floatX *k, floatX *v, const floatX *fac, const float *table, const HeadsShape &s, int64_t N,
                          cudaStream_t stream) {
    Launch where((unsigned)N, HEADS_FORWARD_THREADS, (size_t)s.Pp * sizeof(float), stream);
    if (s.HS == 64) launch(heads_forward_kernel<64>, where, q, k, v, fac, table, s);
    else if (s.HS == 128) launch(heads_forward_kernel<128>, where, q, k, v, fac, table, s);
    else launch(heads_forward_kernel<0>, where, q, k, v, fac, table, s);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward: pieces of the kernel. row, drow (Pp): a token's factors and their gradient, in shared memory

// One of q, k, v of a token: its vectors b, rotated, and its gradient (NH, HS), in shared memory with rows `pitch` apart. The row of
// zeros stands for all rows beyond NH.
typedef struct { floatX *vectors, *dheads, *zeros; int NH, HS, pitch; } HeadsToken;

// dfactors (R, HS) = dheads, turned back: grouped heads are the vectors themselves. To shared memory.
__device__ inline void heads_grouped_backward(floatX *dfactors, const floatX *dheads, const Heads &h, const float *table, int HS) {
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

// Fills in vectors, from the row of factors.
__device__ inline void heads_token_vectors(const HeadsToken &t, const floatX *row, const Heads &h, const float *table) {
    int half = t.HS / 2;
    for (int p = threadIdx.x; p < h.R * half; p += HEADS_THREADS) {
        int r = p / half, i = p % half;
        float x1 = (float)row[h.b + r * t.HS + i], x2 = (float)row[h.b + r * t.HS + half + i];
        heads_rotate_pair(x1, x2, h, table, i, t.HS, ROTATE);
        t.vectors[r * t.pitch + i] = (floatX)x1, t.vectors[r * t.pitch + half + i] = (floatX)x2;
    }
}

// db of a token, by pairs that turn back together.
__device__ inline void heads_store_pair(floatX *drow, float x1, float x2, const Heads &h, const float *table, int r, int i, int HS) {
    heads_rotate_pair(x1, x2, h, table, i, HS, ROTATE_BACK);
    drow[h.b + r * HS + i] = (floatX)x1, drow[h.b + r * HS + HS / 2 + i] = (floatX)x2;
}

// da and db of a token, in fp32.
__device__ inline void heads_token_backward(float *drow, const float *row, const HeadsToken &t, const Heads &h, const float *table,
                                            int /*first_tile*/) {
    float scale = (float)h.scale;
    for (int p = threadIdx.x; p < t.NH * h.R; p += HEADS_THREADS) {
        float sum = 0;
        for (int d = 0; d < t.HS; d++) sum += (float)t.dheads[p / h.R * t.pitch + d] * (float)t.vectors[p % h.R * t.pitch + d];
        drow[h.a + p] = scale * sum;
    }
    int half = t.HS / 2;
    for (int p = threadIdx.x; p < h.R * half; p += HEADS_THREADS) {
        float sum1 = 0, sum2 = 0;
        for (int i = 0; i < t.NH; i++) {
            float a = row[h.a + i * h.R + p / half];
            sum1 += a * (float)t.dheads[i * t.pitch + p % half], sum2 += a * (float)t.dheads[i * t.pitch + p % half + half];
        }
        heads_store_pair((floatX *)drow, scale * sum1, scale * sum2, h, table, p / half, p % half, t.HS);
    }
}

// The same in bf16 on the tensor cores, 8 vectors at a time: da (NH, 8) = dheads b^T and db^T (HS, 8) = dheads^T a, in tiles of 16
// rows, those of db in pairs (d, d + HS / 2). The warps take tiles in turn, beginning where the tiles before (first_tile) ended.
__device__ inline void heads_token_backward(bf16 *drow, const bf16 *row, const HeadsToken &t, const Heads &h, const float *table,
                                            int first_tile) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = HEADS_THREADS / 32, m = lane / 4, n = lane % 4 * 2, half = t.HS / 2;
    int tiles_da = (t.NH + 15) / 16, tiles_db = half / 16;
    float scale = (float)h.scale;
    for (int r0 = 0; r0 < h.R; r0 += 8)
        for (int tile = (warp + warps - first_tile % warps) % warps; tile < tiles_da + tiles_db; tile += warps) {
            float c[4] = {}, c2[4] = {};
            uint32_t x[4];
            if (tile < tiles_da) {
                int i = 16 * tile + lane % 16;
                uint32_t from = smem_address((i < t.NH ? t.dheads + i * t.pitch : t.zeros) + lane / 16 * 8);
                const uint32_t *b = (const uint32_t *)(t.vectors + (r0 + m) * t.pitch + n);
                #pragma unroll 4
                for (int d = 0; d < t.HS; d += 16) {
                    ptx_ldmatrix(x, from + d * 2);
                    ptx_mma(c, x, b[d / 2], b[d / 2 + 4]);
                }
                for (int e = 0; e < 4; e++) {
                    int head = 16 * tile + m + e / 2 * 8, r = r0 + n + e % 2;
                    if (head < t.NH && r < h.R) drow[h.a + head * h.R + r] = (bf16)(scale * c[e]);
                }
            } else {
                int d = (tile - tiles_da) * 16, r = r0 + m;
                #pragma unroll 3
                for (int i0 = 0; i0 < t.NH; i0 += 16) {
                    int i = i0 + lane % 8 + lane / 16 * 8;
                    uint32_t from = smem_address((i < t.NH ? t.dheads + i * t.pitch : t.zeros) + d + lane / 8 % 2 * 8);
                    float a[4];
                    for (int k = 0; k < 4; k++) {
                        int head = i0 + n + k % 2 + k / 2 * 8;
                        a[k] = head < t.NH && r < h.R ? (float)row[h.a + head * h.R + r] : 0;
                    }
                    uint32_t a0 = ptx_pack_bf16(a[0], a[1]), a1 = ptx_pack_bf16(a[2], a[3]);
                    ptx_ldmatrix_trans(x, from);
                    ptx_mma(c, x, a0, a1);
                    ptx_ldmatrix_trans(x, from + half * 2);
                    ptx_mma(c2, x, a0, a1);
                }
                for (int e = 0; e < 4; e++)
                    if (r0 + n + e % 2 < h.R)
                        heads_store_pair((floatX *)drow, scale * c[e], scale * c2[e], h, table, r0 + n + e % 2, d + m + e / 2 * 8, t.HS);
            }
        }
}

// Elements of shared memory for one of q, k, v: vectors in eights, and the gradient.
__host__ __device__ inline int heads_token_size(const Heads &h, int NH, int pitch) {
    return h.kind == HEADS_FACTORED ? ((h.R + 7) / 8 * 8 + NH) * pitch : 0;
}
// one vector more: neighbouring rows start in other banks
__host__ __device__ inline int heads_pitch(int HS) { return HS + PackedX::size; }

template <int STATIC_HS>        // One block: one token
__global__ void __launch_bounds__(HEADS_THREADS)
heads_backward_kernel(floatX *dfac, const floatX *dq, const floatX *dk, const floatX *dv, const floatX *fac, const float *table,
                      HeadsShape s) {
    constexpr int X = PackedX::size;
    extern __shared__ float4 heads_smem[];
    int HS = STATIC_HS ? STATIC_HS : s.HS, pitch = heads_pitch(HS);
    floatX *row = (floatX *)heads_smem, *drow = row + s.Pp, *zeros = drow + s.Pp, *next = zeros + pitch;
    int64_t n = blockIdx.x;
    const Heads *heads[3] = {&s.q, &s.k, &s.v};
    const floatX *dhead[3] = {dq, dk, dv};
    HeadsToken token[3];
    table += n % s.T * HS;
    for (int c = threadIdx.x * X; c < s.Pp; c += HEADS_THREADS * X) ptx_cp_async_16(smem_address(row + c), fac + n * s.Pp + c, true);
    ptx_cp_async_commit();
    #pragma unroll
    for (int w = 0; w < 3; w++) {
        const Heads &h = *heads[w];
        const floatX *from = dhead[w] + n * heads_stored(h, s.NH) * HS;
        token[w] = {next, next + (h.R + 7) / 8 * 8 * pitch, zeros, s.NH, HS, pitch};
        next += heads_token_size(h, s.NH, pitch);
        if (h.kind == HEADS_GROUPED) heads_grouped_backward(drow + h.b, from, h, table, HS);
        else
            for (int c = threadIdx.x * X; c < s.NH * HS; c += HEADS_THREADS * X)
                ptx_cp_async_16(smem_address(token[w].dheads + c / HS * pitch + c % HS), from + c, true);
    }
    for (int c = threadIdx.x; c < pitch; c += HEADS_THREADS) zeros[c] = (floatX)0.0f;
    for (int c = s.v.b + s.v.R * HS + threadIdx.x; c < s.Pp; c += HEADS_THREADS) drow[c] = (floatX)0.0f;    // from P on: padding
    ptx_cp_async_commit();
    ptx_cp_async_wait<1>();
    __syncthreads();            // the factors are there
    #pragma unroll
    for (int w = 0; w < 3; w++)
        if (heads[w]->kind == HEADS_FACTORED) heads_token_vectors(token[w], row, *heads[w], table);
    ptx_cp_async_wait_all();
    __syncthreads();            // and their vectors rotated, and the gradients
    #pragma unroll
    for (int w = 0; w < 3; w++)
        if (heads[w]->kind == HEADS_FACTORED) heads_token_backward(drow, row, token[w], *heads[w], table, w * ((s.NH + 15) / 16 + HS / 32));
    __syncthreads();            // drow is whole
    for (int c = threadIdx.x * X; c < s.Pp; c += HEADS_THREADS * X) store16(dfac + n * s.Pp + c, load16(drow + c));
}

LLMC_FN size_t heads_backward_smem_bytes(const HeadsShape *s) {
    int pitch = heads_pitch(s->HS);
    int elements = 2 * s->Pp + pitch + heads_token_size(s->q, s->NH, pitch) + heads_token_size(s->k, s->NH, pitch) +
                   heads_token_size(s->v, s->NH, pitch);
    return (size_t)elements * sizeof(floatX);
}

// dfac (N, Pp) may be fac itself: a block reads its row before it writes it. The rest as in heads_forward.
inline void heads_backward(floatX *dfac, const floatX *dq, const floatX *dk, const floatX *dv, const floatX *fac, const float *table,
                           const HeadsShape &s, int64_t N, cudaStream_t stream) {
    Launch where((unsigned)N, HEADS_THREADS, heads_backward_smem_bytes(&s), stream);
    if (s.HS == 64) launch(heads_backward_kernel<64>, where, dfac, dq, dk, dv, fac, table, s);
    else if (s.HS == 128) launch(heads_backward_kernel<128>, where, dfac, dq, dk, dv, fac, table, s);
    else launch(heads_backward_kernel<0>, where, dfac, dq, dk, dv, fac, table, s);
}

#endif
