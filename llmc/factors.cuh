// The factor rows of TPA's variants, from their projected rows, one kernel each way (Heads in model.h; on the CPU
// factors_forward and factors_backward in train_t6.c). For q, k and v, r = 1 ... R:
//
//     a = act(projected a), or a constant
//     b = projected, or a constant;  kv_shift: b_t = s_t b_{t-1} + (1 - s_t) b_t, s = sigmoid(projected s), b_{-1} = 0
//     b = rope(b);  third order: b_r = vec(b_r c_r^T), number j HB + i of which is b_i c_j
//
// heads.cuh contracts these rows as it contracts the projected rows of plain kinds, but does not rotate them again.
//
// A block makes one token's row. It first copies all that it reads of projected rows and of gradients to shared memory:
// its own, with kv_shift also its neighbours'. A thread owns pairs of numbers i, i + HB / 2 that RoPE rotates together.
#ifndef LLMC_FACTORS_CUH
#define LLMC_FACTORS_CUH

#include "modes.h"
#include "precision.cuh"
#include "heads.cuh"
#include "swiglu.cuh"

enum { FACTORS_THREADS = 128, FACTORS_WARPS = FACTORS_THREADS / 32 };

typedef struct {
    Heads q, k, v;
    HeadAct act;
    int shift;              // kv_shift
    int T, NH;
    int Pp, PFp;            // numbers from one projected row to the next, and from one factor row to the next
    int width;              // of a projected row, without the output's gates
} FactorsShape;

LLMC_FN FactorsShape factors_shape(const Model *m, int64_t T) {
    FactorsShape s = {m->q, m->k, m->v, m->config.head_act, (int)m->config.kv_shift, (int)T, (int)m->config.n_head,
                      (int)m->Pp, (int)m->PFp, (int)(m->config.out_gate ? m->gate : m->Pp)};
    return s;
}

// A token: its projected row in shared memory, among its neighbours' (`width` apart), the layer's weights, the row of
// RoPE's table for its position t.
typedef struct { const floatX *row, *layer; const float *table; int t, width; } FactorsToken;

// Copies rows first to last of x, `columns` (a multiple of 8) of each, to rows in shared memory, and commits.
__device__ inline void factors_load_rows(floatX *to, const floatX *x, int64_t pitch, int columns, int first, int last) {
    constexpr int X = PackedX::size;
    for (int row = first; row <= last; row++)
        for (int c = threadIdx.x * X; c < columns; c += FACTORS_THREADS * X)
            ptx_cp_async_16(smem_address(to + row * columns + c), x + row * pitch + c);
    ptx_cp_async_commit();
}

// The kernels' template argument: HB and HC = HS / HB of a Heads, known at compile time or not.
struct FactorsAnySize {
    static __device__ int HB(const Heads &h) { return h.HB; }
    static __device__ int HC(const Heads &h) { return h.HS / h.HB; }
};
template <int HEAD_SIZE>
struct FactorsSize {        // HB = HS
    static __device__ int HB(const Heads &) { return HEAD_SIZE; }
    static __device__ int HC(const Heads &) { return 1; }
};

// Calls f with a kernel for the shape's sizes.
#define FACTORS_DISPATCH(kernel, s, f) \
    (factors_all_have(s, 64) ? f(kernel<FactorsSize<64>>) : f(kernel<FactorsAnySize>))

inline bool factors_all_have(const FactorsShape &s, int HS) {
    for (const Heads *h : {&s.q, &s.k, &s.v})
        if (h->HB != HS || h->HS != HS) return false;
    return true;
}

// Gate s of vector r. Without kv_shift 0.
__device__ inline float factors_shift(const floatX *row, const Heads &h, int r) {
    return h.from_s == NOT_PROJECTED ? 0 : sigmoid((float)row[h.from_s + r]);
}

// Number i of vector b_r as projected, `back` tokens before this one; 0 before the first token.
template <class Size>
__device__ inline float factors_number(const FactorsToken &token, const Heads &h, int r, int i, int back) {
    int at = r * Size::HB(h) + i;
    if (h.from_b == NOT_PROJECTED) return (float)token.layer[h.const_b + at];
    return token.t < back ? 0 : (float)token.row[h.from_b + at - back * token.width];
}

// x1, x2: numbers i and i + HB / 2 of vector b_r, shifted and rotated.
template <class Size>
__device__ inline void factors_pair(float &x1, float &x2, const FactorsToken &token, const Heads &h, int r, int i) {
    int HB = Size::HB(h), half = HB / 2;
    x1 = factors_number<Size>(token, h, r, i, 0), x2 = factors_number<Size>(token, h, r, half + i, 0);
    if (h.from_s != NOT_PROJECTED) {
        float s = factors_shift(token.row, h, r);
        x1 = (1 - s) * x1 + s * factors_number<Size>(token, h, r, i, 1);
        x2 = (1 - s) * x2 + s * factors_number<Size>(token, h, r, half + i, 1);
    }
    heads_rotate_pair(x1, x2, h, token.table, i, HB, ROTATE);
}

// Number j of c_r: b_r itself where there is no c.
template <class Size>
__device__ inline float factors_c(const floatX *row, const Heads &h, int r, int j) {
    return h.from_c == NOT_PROJECTED ? 1 : (float)row[h.from_c + r * Size::HC(h) + j];
}

// For the softmax of vector r: e = exp(a - the largest a of the heads), both (NH, R); returns the sum. All lanes call,
// and each reads back what it wrote.
__device__ inline float factors_exponentials(float *e, const floatX *a, int NH, int R, int r) {
    float largest = -INFINITY, sum = 0;
    for (int i = threadIdx.x % 32; i < NH; i += 32) largest = fmaxf(largest, (float)a[i * R + r]);
    largest = warp_max(largest);
    for (int i = threadIdx.x % 32; i < NH; i += 32) {
        float x = __expf((float)a[i * R + r] - largest);
        e[i * R + r] = x, sum += x;
    }
    return warp_sum(sum);
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

// The columns of h in the factor row fac (PFp), in shared memory, as is e (PFp), which softmax needs. first_warp: the
// warp that takes the first softmax.
template <class Size>
__device__ inline void factors_of_token(floatX *fac, float *e, const FactorsToken &token, const Heads &h, HeadAct act,
                                        int NH, int first_warp) {
    int lane = threadIdx.x % 32, warp = (threadIdx.x / 32 + first_warp) % FACTORS_WARPS;
    int R = h.R, HB = Size::HB(h), half = HB / 2, HC = Size::HC(h);
    const floatX *a = h.from_a == NOT_PROJECTED ? token.layer + h.const_a : token.row + h.from_a;
    if (h.kind == HEADS_FACTORED && act == HEAD_ACT_SOFTMAX)
        for (int r = warp; r < R; r += FACTORS_WARPS) {
            float scale = 1 / factors_exponentials(e + h.a, a, NH, R, r);
            for (int i = lane; i < NH; i += 32) fac[h.a + i * R + r] = (floatX)(e[h.a + i * R + r] * scale);
        }
    else if (h.kind == HEADS_FACTORED)
        for (int i = threadIdx.x; i < NH * R; i += FACTORS_THREADS)
            fac[h.a + i] = act == HEAD_ACT_SIGMOID ? (floatX)sigmoid((float)a[i]) : a[i];
    for (int p = threadIdx.x; p < R * half; p += FACTORS_THREADS) {
        int r = p / half, i = p % half;
        float x1, x2;
        factors_pair<Size>(x1, x2, token, h, r, i);
        floatX *b = fac + h.b + r * HC * HB + i;
        for (int j = 0; j < HC; j++) {
            float c = factors_c<Size>(token.row, h, r, j);
            b[j * HB] = (floatX)(x1 * c), b[j * HB + half] = (floatX)(x2 * c);
        }
    }
}

template <class Size>
__global__ void __launch_bounds__(FACTORS_THREADS)
factors_forward_kernel(floatX *fac, const floatX *proj, const floatX *layer, const float *table_q, const float *table_k,
                       FactorsShape s) {
    extern __shared__ float4 factors_smem[];
    float *e = (float *)factors_smem;
    floatX *out = (floatX *)(e + (s.act == HEAD_ACT_SOFTMAX ? s.PFp : 0)), *row = out + s.PFp + (s.shift ? s.width : 0);
    int64_t n = blockIdx.x;
    int t = (int)(n % s.T), used = s.v.b + s.v.R * s.v.HS;
    factors_load_rows(row, proj + n * s.Pp, s.Pp, s.width, s.shift && t > 0 ? -1 : 0, 0);
    for (int c = used + threadIdx.x; c < s.PFp; c += FACTORS_THREADS) out[c] = (floatX)0.0f;        // padding
    FactorsToken token = {row, layer, table_q + t * s.q.HSR, t, s.width};
    ptx_cp_async_wait_all();
    __syncthreads();            // the projected rows are in shared memory
    factors_of_token<Size>(out, e, token, s.q, s.act, s.NH, 0);
    token.table = table_k + t * s.k.HSR;
    factors_of_token<Size>(out, e, token, s.k, s.act, s.NH, 2);
    factors_of_token<Size>(out, e, token, s.v, s.act, s.NH, 0);
    __syncthreads();            // the factor row is complete
    for (int c = threadIdx.x * PackedX::size; c < s.PFp; c += FACTORS_THREADS * PackedX::size)
        store16(fac + n * s.PFp + c, load16(out + c));
}

// fac (N, PFp) from proj (N, Pp); layer: the layer's weights; table_q, table_k (T, HSR of q, of k). N = B*T.
inline void factors_forward(floatX *fac, const floatX *proj, const floatX *layer, const float *table_q,
                            const float *table_k, const FactorsShape &s, int64_t N, cudaStream_t stream) {
    size_t e_bytes = s.act == HEAD_ACT_SOFTMAX ? (size_t)s.PFp * sizeof(float) : 0;
    size_t smem_bytes = e_bytes + (size_t)(s.PFp + (s.shift ? 2 : 1) * s.width) * sizeof(floatX);
    Launch where((unsigned)N, FACTORS_THREADS, smem_bytes, stream);
    auto run = [&](auto kernel) { launch(kernel, where, fac, proj, layer, table_q, table_k, s); };
    FACTORS_DISPATCH(factors_forward_kernel, s, run);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

// d1, d2: the gradients of numbers i and i + HB / 2 of b_r of a token, shifted but not rotated, from its row of dfac.
template <class Size>
__device__ inline void factors_pair_gradient(float &d1, float &d2, const floatX *dfac, const FactorsToken &token,
                                             const Heads &h, int r, int i) {
    int HB = Size::HB(h), half = HB / 2, HC = Size::HC(h);
    const floatX *db = dfac + h.b + r * HC * HB + i;
    d1 = d2 = 0;
    for (int j = 0; j < HC; j++) {
        float c = factors_c<Size>(token.row, h, r, j);
        d1 += c * (float)db[j * HB], d2 += c * (float)db[j * HB + half];
    }
    heads_rotate_pair(d1, d2, h, token.table, i, HB, ROTATE_BACK);
}

// Adds the gradients of h's columns of the projected row to drow (width), in shared memory. dfac: the token's row in
// shared memory, followed by that of the next token, whose row of RoPE's table is table_next. A constant b's gradient,
// rotated back, goes to its columns of dconst, the token's row of dfac in global memory.
template <class Size>
__device__ inline void factors_token_backward(float *drow, floatX *dconst, const floatX *dfac,
                                              const FactorsToken &token, const float *table_next, const Heads &h,
                                              const FactorsShape &s, int first_warp) {
    int lane = threadIdx.x % 32, warp = (threadIdx.x / 32 + first_warp) % FACTORS_WARPS;
    int R = h.R, NH = s.NH, HB = Size::HB(h), half = HB / 2, HC = Size::HC(h), HS = HB * HC;
    bool has_a = h.kind == HEADS_FACTORED && h.from_a != NOT_PROJECTED;
    const floatX *a = token.row + h.from_a, *da = dfac + h.a;
    if (has_a && s.act == HEAD_ACT_SOFTMAX)
        for (int r = warp; r < R; r += FACTORS_WARPS) {
            float scale = 1 / factors_exponentials(drow + h.from_a, a, NH, R, r), sum = 0;
            for (int i = lane; i < NH; i += 32) sum += (float)da[i * R + r] * drow[h.from_a + i * R + r];
            sum = warp_sum(sum) * scale;
            for (int i = lane; i < NH; i += 32) drow[h.from_a + i * R + r] *= scale * ((float)da[i * R + r] - sum);
        }
    else if (has_a)
        for (int i = threadIdx.x; i < NH * R; i += FACTORS_THREADS) {
            float x = s.act == HEAD_ACT_SIGMOID ? sigmoid((float)a[i]) : 0;
            drow[h.from_a + i] += s.act == HEAD_ACT_SIGMOID ? (float)da[i] * x * (1 - x) : (float)da[i];
        }
    for (int p = warp; p < R * HC && h.from_c != NOT_PROJECTED; p += FACTORS_WARPS) {       // dc_j = <db_j, b>
        int r = p / HC, j = p % HC;
        const floatX *db = dfac + h.b + r * HS + j * HB;
        float sum = 0;
        for (int i = lane; i < half; i += 32) {
            float x1, x2;
            factors_pair<Size>(x1, x2, token, h, r, i);
            sum += x1 * (float)db[i] + x2 * (float)db[half + i];
        }
        sum = warp_sum(sum);
        if (lane == 0) drow[h.from_c + p] += sum;
    }
    FactorsToken next = {token.row + token.width, token.layer, table_next, token.t + 1, token.width};
    bool shifted = h.from_s != NOT_PROJECTED, has_next = shifted && token.t + 1 < s.T;
    for (int r = warp; r < R; r += FACTORS_WARPS) {
        float gate = factors_shift(token.row, h, r), gate_next = has_next ? factors_shift(next.row, h, r) : 0, ds = 0;
        for (int i = lane; i < half; i += 32) {
            float d1, d2, e1 = 0, e2 = 0;
            factors_pair_gradient<Size>(d1, d2, dfac, token, h, r, i);
            if (h.from_b == NOT_PROJECTED) {
                floatX *db = dconst + h.b + r * HS + i;
                db[0] = (floatX)d1, db[half] = (floatX)d2;
                continue;
            }
            // b_t is in the shifted b of t and of t + 1
            if (has_next) factors_pair_gradient<Size>(e1, e2, dfac + s.PFp, next, h, r, i);
            float *db = drow + h.from_b + r * HB + i;
            db[0] += (1 - gate) * d1 + gate_next * e1, db[half] += (1 - gate) * d2 + gate_next * e2;
            if (shifted)
                ds += d1 * (factors_number<Size>(token, h, r, i, 1) - factors_number<Size>(token, h, r, i, 0)) +
                      d2 * (factors_number<Size>(token, h, r, half + i, 1) -
                            factors_number<Size>(token, h, r, half + i, 0));
        }
        if (!shifted) continue;
        ds = warp_sum(ds);
        if (lane == 0) drow[h.from_s + r] += ds * gate * (1 - gate);
    }
}

// Shared memory: drow, then dfac's rows, then the projected rows.
template <class Size>
__global__ void __launch_bounds__(FACTORS_THREADS)
factors_backward_kernel(floatX *dproj, floatX *dfac, const floatX *proj, const floatX *layer, const float *table_q,
                        const float *table_k, FactorsShape s) {
    extern __shared__ float4 factors_smem[];
    constexpr int X = PackedX::size;
    float *drow = (float *)factors_smem;
    floatX *gradient = (floatX *)(drow + s.width), *row = gradient + (s.shift ? 2 * s.PFp + s.width : s.PFp);
    int64_t n = blockIdx.x;
    int t = (int)(n % s.T), next = s.shift && t + 1 < s.T;
    dfac += n * s.PFp;
    factors_load_rows(gradient, dfac, s.PFp, s.PFp, 0, next);
    factors_load_rows(row, proj + n * s.Pp, s.Pp, s.width, s.shift && t > 0 ? -1 : 0, next);
    for (int c = threadIdx.x; c < s.width; c += FACTORS_THREADS) drow[c] = 0;
    ptx_cp_async_wait_all();
    __syncthreads();            // all rows are in shared memory
    const float *row_q = table_q + t * s.q.HSR, *row_k = table_k + t * s.k.HSR;
    FactorsToken token = {row, layer, row_q, t, s.width};
    factors_token_backward<Size>(drow, dfac, gradient, token, row_q + s.q.HSR, s.q, s, 0);
    token.table = row_k;
    factors_token_backward<Size>(drow, dfac, gradient, token, row_k + s.k.HSR, s.k, s, 2);
    __syncthreads();            // v may share k's columns
    factors_token_backward<Size>(drow, dfac, gradient, token, row_k + s.k.HSR, s.v, s, 0);
    __syncthreads();            // drow is complete
    for (int c = threadIdx.x * X; c < s.width; c += FACTORS_THREADS * X) heads_store(dproj + n * s.Pp + c, drow + c);
}

// dproj (N, Pp), its columns but for those of the output's gates, from dfac (N, PFp) and the forward pass's inputs.
// Where b is a constant, its gradients replace its columns in dfac; those of a constant a are there already.
inline void factors_backward(floatX *dproj, floatX *dfac, const floatX *proj, const floatX *layer, const float *table_q,
                             const float *table_k, const FactorsShape &s, int64_t N, cudaStream_t stream) {
    size_t smem_bytes = (size_t)s.width * sizeof(float) +
                        (size_t)(s.shift ? 2 * s.PFp + 3 * s.width : s.PFp + s.width) * sizeof(floatX);
    Launch where((unsigned)N, FACTORS_THREADS, smem_bytes, stream);
    auto run = [&](auto kernel) { launch(kernel, where, dproj, dfac, proj, layer, table_q, table_k, s); };
    FACTORS_DISPATCH(factors_backward_kernel, s, run);
}

// ---------------------------------------------------------------------------------------------------------------------
// Gradients of weights that every token uses as they are: constant factors, and the gains of norms (rmsnorm.cuh). They
// are sums over all tokens, taken in an order that depends on N alone: first of every 512th row, then of these sums.

enum { COLUMN_LANES = 8, COLUMN_BLOCKS = 64 };

// Block (x, y): columns from 32 X x on, X at a time for each of 32 threads, and the rows of partial sum y.
__global__ void __launch_bounds__(32 * COLUMN_LANES)
column_sums_kernel(float *partial, const floatX *x, int64_t ldx, const floatX *y, int64_t ldy, const float *scale,
                   int columns, int64_t N) {
    constexpr int X = PackedX::size;
    __shared__ float sums[COLUMN_LANES][32 * X];
    int lane = threadIdx.x / 32, first = (blockIdx.x * 32 + threadIdx.x % 32) * X;
    float sum[X] = {};
    if (first < columns) {
        #pragma unroll 4
        for (int64_t n = blockIdx.y * COLUMN_LANES + lane; n < N; n += COLUMN_BLOCKS * COLUMN_LANES) {
            PackedX a = load16(x + n * ldx + first), b = {};
            if (y) b = load16(y + n * ldy + first);
            for (int k = 0; k < X; k++) sum[k] += (float)a[k] * (y ? scale[n] * (float)b[k] : 1);
        }
    }
    for (int k = 0; k < X; k++) sums[lane][threadIdx.x % 32 * X + k] = sum[k];
    __syncthreads();            // the lanes' sums are there
    for (int c = threadIdx.x; c < 32 * X; c += 32 * COLUMN_LANES) {
        float total = 0;
        for (int i = 0; i < COLUMN_LANES; i++) total += sums[i][c];
        int column = blockIdx.x * 32 * X + c;
        if (column < columns) partial[blockIdx.y * columns + column] = total;
    }
}

// partial (COLUMN_BLOCKS, columns) of sum_n x[n] (y NULL) or of sum_n scale[n] x[n] y[n]; x, y (N, columns) with rows
// ldx and ldy apart, scale (N); columns, ldx and ldy multiples of 8.
inline void column_sums(float *partial, const floatX *x, int64_t ldx, const floatX *y, int64_t ldy, const float *scale,
                        int64_t columns, int64_t N, cudaStream_t stream) {
    dim3 grid((unsigned)ceil_div(columns, (int64_t)(32 * PackedX::size)), COLUMN_BLOCKS);
    launch(column_sums_kernel, {grid, 32 * COLUMN_LANES, 0, stream}, partial, x, ldx, y, ldy, scale, (int)columns, N);
}

__global__ void column_total_kernel(float *out, const float *partial, int columns, int n, OutputMode mode) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float total = 0;
    for (int k = 0; k < COLUMN_BLOCKS; k++) total += partial[k * columns + i];
    out[i] = mode == ACCUMULATE ? out[i] + total : total;
}

// out (n), in fp32, = or += the sums of n adjacent columns, whose partial sums begin at partial, rows `columns` apart.
inline void column_total(float *out, const float *partial, int64_t columns, int64_t n, OutputMode mode,
                         cudaStream_t stream) {
    launch(column_total_kernel, {(unsigned)ceil_div(n, (int64_t)128), 128, 0, stream}, out, partial, (int)columns,
           (int)n, mode);
}

#endif
