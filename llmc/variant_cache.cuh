// Decoding the variants of factored heads and the switches kv_shift, qk_norm and out_gate (Heads in model.h).
//
// variant_rows makes the factor row of a token from its projected row: a = act(a), b shifted, and with qk_norm the norm
// of each head of q and k folded into its a, or into its vector where heads are grouped. Rotation keeps norms, so they
// are those of the heads before RoPE.
//
// Where that row is [aK bK aV bV] of order 2 (variant_in_pages), it goes into the pages of factor_cache.cuh, and the
// kernels of plain kinds decode it. A constant a or b is not cached though, a shared b is cached once and not rotated,
// and third order is cached as a, rotated b and c. Such a variant has a cache of rows, (B, capacity) of one layer, and
// the kernel here makes k and v of them, one head of one token at a time. A row is
//
//     e4m3 only: a scale (fp32) for each part      then the parts of model_cache_parts, numbers of floatX or e4m3
#ifndef LLMC_VARIANT_CACHE_CUH
#define LLMC_VARIANT_CACHE_CUH

#include "flashtpa_decode.cuh"
#include "swiglu.cuh"

// Whether what is cached of a token is what the pages of plain kinds hold.
LLMC_FN int variant_in_pages(const Model *m) {
    const Config *c = &m->config;
    return !c->a_constant && !c->b_constant && !c->share_kv_b && !c->b_dim;
}

// Whether decoding needs a factor row next to the projected one.
LLMC_FN int variant_has_rows(const Model *m) {
    return m->config.attn != ATTN_MLA && (!m->is_projected || m->config.qk_norm);
}

typedef struct {
    Heads q, k, v;
    HeadAct act;
    int NH, HS, Pp, PFp;        // Pp and PFp: numbers from one projected row, or factor row, to the next
    int qk_norm, share_kv_b, in_pages;
    float eps, scale;           // of the norms; of the softmax
    int number_bytes;           // of the cache
    int part[NUM_CACHE_PARTS + 1];      // where each part starts in a row's numbers, and the end
} VariantShape;

LLMC_FN VariantShape variant_shape(const Model *m, int number_bytes) {
    const Config *c = &m->config;
    VariantShape s;
    int64_t part[NUM_CACHE_PARTS + 1];
    s.q = m->q, s.k = m->k, s.v = m->v, s.act = c->head_act;
    s.NH = (int)c->n_head, s.HS = (int)m->HSK, s.Pp = (int)m->Pp, s.PFp = (int)m->PFp;
    s.qk_norm = (int)c->qk_norm, s.share_kv_b = (int)c->share_kv_b, s.in_pages = variant_in_pages(m);
    s.eps = (float)c->rms_eps, s.scale = (float)m->scale, s.number_bytes = number_bytes;
    model_cache_parts(m, part);
    for (int i = 0; i <= NUM_CACHE_PARTS; i++) s.part[i] = (int)part[i];
    return s;
}

__host__ __device__ inline size_t variant_row_bytes(const VariantShape &s) {
    const size_t scales = s.number_bytes == 1 ? NUM_CACHE_PARTS * sizeof(float) : 0;
    return (scales + (size_t)s.part[NUM_CACHE_PARTS] * s.number_bytes + 15) / 16 * 16;
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows

typedef struct {
    floatX *fac;                // (B n, PFp) factor rows; not rotated in_pages, else only q's part, rotated
    unsigned char *cache;       // (B, capacity) rows of one layer; not used in_pages
    const floatX *proj;         // (B n, Pp)
    const floatX *before;       // (B, Pp) the projected row before the first; kv_shift only
    const floatX *layer;        // the layer's weights
    const int32_t *lengths;     // (B) tokens already in the cache
    const double *frequencies_q, *frequencies_k;        // (HSR / 2) of q and of k
    VariantShape shape;
    int n;                      // tokens per sequence
    int64_t capacity;           // rows per sequence
} VariantRows;

enum { VARIANT_THREADS = 128 };

// a and b of h into a factor row in shared memory, b as projected and shifted: (R, HB) at the start of its vectors.
__device__ inline void variant_factors(float *row, const Heads &h, const VariantRows &w, const floatX *proj,
                                       const floatX *before) {
    const VariantShape &s = w.shape;
    const int lane = threadIdx.x % 32, warps = VARIANT_THREADS / 32;
    for (int i = threadIdx.x; h.kind == HEADS_FACTORED && i < s.NH * h.R; i += VARIANT_THREADS) {
        float x = (float)(h.from_a == NOT_PROJECTED ? w.layer[h.const_a + i] : proj[h.from_a + i]);
        row[h.a + i] = s.act == HEAD_ACT_SIGMOID ? sigmoid(x) : x;
    }
    for (int i = threadIdx.x; i < h.R * h.HB; i += VARIANT_THREADS) {
        const int r = i / h.HB;
        float x = (float)(h.from_b == NOT_PROJECTED ? w.layer[h.const_b + i] : proj[h.from_b + i]);
        if (h.from_s != NOT_PROJECTED) {
            const float gate = sigmoid((float)proj[h.from_s + r]);
            x = (1 - gate) * x + (before ? gate * (float)before[h.from_b + i] : 0);
        }
        row[h.b + r * h.HS + i % h.HB] = x;
    }
    __syncthreads();            // a and b are written
    if (h.kind == HEADS_FACTORED && s.act == HEAD_ACT_SOFTMAX)
        for (int r = threadIdx.x / 32; r < h.R; r += warps) {
            float top = -INFINITY, sum = 0;
            for (int i = lane; i < s.NH; i += 32) top = fmaxf(top, row[h.a + i * h.R + r]);
            top = warp_max(top);
            for (int i = lane; i < s.NH; i += 32) sum += expf(row[h.a + i * h.R + r] - top);
            sum = warp_sum(sum);
            for (int i = lane; i < s.NH; i += 32) row[h.a + i * h.R + r] = expf(row[h.a + i * h.R + r] - top) / sum;
        }
    __syncthreads();
}

// Third order: (R, HB) at the start of h's vectors become all of them, b_r c_r^T.
__device__ inline void variant_multiply_out(float *row, const Heads &h, const floatX *proj) {
    if (h.from_c == NOT_PROJECTED) return;
    const int HC = h.HS / h.HB;
    for (int pass = 0; pass < 2; pass++) {      // b itself comes last
        for (int i = threadIdx.x; i < h.R * h.HS; i += VARIANT_THREADS) {
            const int r = i / h.HS, d = i % h.HS;
            if ((d < h.HB) == (pass == 1))
                row[h.b + i] = row[h.b + r * h.HS + d % h.HB] * (float)proj[h.from_c + r * HC + d / h.HB];
        }
        __syncthreads();
    }
}

// qk_norm: 1 / rms of each head of h, into its a or its vector; KEPT_APART: into norms (NH).
typedef enum { FOLDED, KEPT_APART } NormPlace;
__device__ inline void variant_norms(float *row, float *norms, const Heads &h, const VariantShape &s, NormPlace place) {
    const int lane = threadIdx.x % 32, grouped = h.kind == HEADS_GROUPED;
    for (int i = threadIdx.x / 32; i < (grouped ? h.R : s.NH); i += VARIANT_THREADS / 32) {
        float sum = 0;
        for (int d = lane; d < h.HS; d += 32) {
            float x = 0;
            if (grouped) x = row[h.b + i * h.HS + d];
            else for (int r = 0; r < h.R; r++) x += (float)h.scale * row[h.a + i * h.R + r] * row[h.b + r * h.HS + d];
            sum += x * x;
        }
        const float norm = 1 / sqrtf(warp_sum(sum) / h.HS + s.eps);
        if (lane == 0) norms[i] = norm;
    }
    __syncthreads();            // norms are written; nobody reads a or b any more
    if (place == KEPT_APART) return;
    const int numbers = grouped ? h.R * h.HS : s.NH * h.R, per_head = grouped ? h.HS : h.R;
    for (int i = threadIdx.x; i < numbers; i += VARIANT_THREADS) row[(grouped ? h.b : h.a) + i] *= norms[i / per_head];
    __syncthreads();
}

// Element i of a vector of a block of HB, of which x(i) is the element before rotation.
template <class X>
__device__ inline float variant_rotated(const X &x, int i, int HB, float2 turn) {
    const int half = HB / 2, d = i % HB, other = d < half ? i + half : i - half;
    return d < half ? x(i) * turn.x + x(other) * turn.y : x(i) * turn.x - x(other) * turn.y;
}

// One block: one token.
template <class Number>
__global__ void __launch_bounds__(VARIANT_THREADS) variant_rows_kernel(const __grid_constant__ VariantRows w) {
    extern __shared__ __align__(1024) unsigned char smem[];
    __shared__ float shared[32];
    const VariantShape &s = w.shape;
    float *row = (float *)smem, *norms_q = row + s.PFp, *norms = norms_q + s.NH;
    const int b = blockIdx.x / w.n, i = blockIdx.x % w.n;
    const int64_t position = w.lengths[b] + i;
    const floatX *proj = w.proj + (int64_t)blockIdx.x * s.Pp;
    const floatX *before = i > 0 ? proj - s.Pp : position > 0 ? w.before + (int64_t)b * s.Pp : NULL;
    floatX *fac = w.fac + (int64_t)blockIdx.x * s.PFp;
    unsigned char *cached = w.cache + ((int64_t)b * w.capacity + position) * variant_row_bytes(s);
    // Stores a part of the cached row; x(i): its numbers.
    auto store = [&](int part, auto x) {
        const int size = s.part[part + 1] - s.part[part];
        Number *to = (Number *)(cached + (s.number_bytes == 1 ? NUM_CACHE_PARTS * sizeof(float) : 0)) + s.part[part];
        float scale = 1;
        if (size == 0) return;
        if (sizeof(Number) == 1) {
            float top = 0;
            for (int k = threadIdx.x; k < size; k += VARIANT_THREADS) top = fmaxf(top, fabsf(x(k)));
            top = block_max(top, shared);
            if (top > 0) scale = top / E4M3_MAX;
            if (threadIdx.x == 0) ((float *)cached)[part] = scale;
        }
        for (int k = threadIdx.x; k < size; k += VARIANT_THREADS) cache_store(to + k, x(k) / scale);
    };
    auto rotated = [&](const Heads &h, const double *frequencies, int at) {     // number `at` of h's vectors
        auto x = [&](int k) { return row[h.b + k]; };
        if (h.HSR == 0) return x(at);
        return variant_rotated(x, at, h.HB, rope_turn(position, frequencies[at % h.HB % (h.HB / 2)]));
    };
    for (int k = threadIdx.x; k < s.PFp; k += VARIANT_THREADS) row[k] = 0;      // padding
    __syncthreads();
    variant_factors(row, s.q, w, proj, before);
    variant_factors(row, s.k, w, proj, before);
    variant_factors(row, s.v, w, proj, before);
    for (int p = 0; p < 2 && !s.in_pages; p++) {        // token factors, before they are multiplied out
        const Heads &h = p == CACHE_K ? s.k : s.v;
        auto at = [&](int k) { return k / h.HB * h.HS + k % h.HB; };
        store(p == CACHE_K ? PART_BK : PART_BV, [&](int k) {
            return s.share_kv_b ? row[h.b + at(k)] : rotated(h, w.frequencies_k, at(k));
        });
        store(p == CACHE_K ? PART_CK : PART_CV, [&](int k) { return (float)proj[h.from_c + k]; });
    }
    __syncthreads();            // b is in the cache
    variant_multiply_out(row, s.q, proj);
    if (s.qk_norm) {
        variant_multiply_out(row, s.k, proj);
        variant_norms(row, norms_q, s.q, s, FOLDED);
        variant_norms(row, norms, s.k, s, s.k.kind == HEADS_FACTORED && s.k.from_a == NOT_PROJECTED ? KEPT_APART
                                                                                                   : FOLDED);
    }
    if (s.in_pages) {
        for (int k = threadIdx.x; k < s.PFp; k += VARIANT_THREADS) fac[k] = (floatX)row[k];
        return;
    }
    store(PART_AK, [&](int k) { return row[s.k.a + k]; });
    store(PART_AV, [&](int k) { return row[s.v.a + k]; });
    store(PART_NORMS, [&](int k) { return norms[k]; });
    for (int k = threadIdx.x; s.q.kind == HEADS_FACTORED && k < s.NH * s.q.R; k += VARIANT_THREADS)
        fac[s.q.a + k] = (floatX)row[s.q.a + k];
    for (int k = threadIdx.x; k < s.q.R * s.q.HS; k += VARIANT_THREADS)
        fac[s.q.b + k] = (floatX)rotated(s.q, w.frequencies_q, k);
}

inline void variant_rows(const VariantRows &w, int64_t B, cudaStream_t stream) {
    const size_t smem_bytes = (size_t)(w.shape.PFp + 2 * w.shape.NH) * sizeof(float);
    Launch where(dim3((unsigned)(B * w.n)), VARIANT_THREADS, smem_bytes, stream);
    if (w.shape.number_bytes == 1) launch(variant_rows_kernel<e4m3>, where, w);
    else launch(variant_rows_kernel<floatX>, where, w);
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention over cached rows

typedef struct {
    const unsigned char *cache; // (B, capacity) rows of one layer, with the queries' own tokens in it
    const int32_t *lengths;     // (B) tokens before the queries
    const floatX *fac;          // (B n, PFp) q's part of the queries' factor rows, rotated
    const floatX *layer;        // the layer's weights
    const double *frequencies;  // (HSR / 2) of k
    floatX *out;                // (B n, NH HS)
    VariantShape shape;
    int B, n;                   // n: queries per sequence, its last n tokens
    int64_t capacity;
} VariantArgs;

// What a cached row has of k or v, of one head.
template <class Number>
struct VariantToken {
    const unsigned char *row;
    const VariantArgs &args;
    int head;
    int64_t position;

    __device__ float number(int part, int i) const {
        const Number *numbers = (const Number *)(row + (sizeof(Number) == 1 ? NUM_CACHE_PARTS * sizeof(float) : 0));
        const float scale = sizeof(Number) == 1 ? ((const float *)row)[part] : 1;
        return scale * cache_number(numbers + args.shape.part[part] + i);
    }
    __device__ float weight(const Heads &h, CachePart p, int r) const {
        const int i = head * h.R + r;
        const bool constant = h.from_a == NOT_PROJECTED;
        float a = constant ? (float)args.layer[h.const_a + i] : number(p == CACHE_K ? PART_AK : PART_AV, i);
        return p == CACHE_K && args.shape.qk_norm && constant ? a * number(PART_NORMS, head) : a;
    }
    // Element d of the head.
    __device__ float element(CachePart p, int d) const {
        const VariantShape &s = args.shape;
        const Heads &h = p == CACHE_K ? s.k : s.v;
        const bool constant = h.from_b == NOT_PROJECTED, own = p == CACHE_V && !s.share_kv_b;
        const bool turns = h.HSR > 0 && (constant || s.share_kv_b);
        const float2 turn = turns ? rope_turn(position, args.frequencies[d % h.HB % (h.HB / 2)]) : make_float2(1, 0);
        float sum = 0;
        for (int r = 0; r < h.R; r++) {
            auto b = [&](int i) {
                return constant ? (float)args.layer[h.const_b + r * h.HB + i]
                                : number(own ? PART_BV : PART_BK, r * h.HB + i);
            };
            float x = turns ? variant_rotated(b, d % h.HB, h.HB, turn) : b(d % h.HB);
            if (h.from_c != NOT_PROJECTED) x *= number(own ? PART_CV : PART_CK, r * (h.HS / h.HB) + d / h.HB);
            sum += weight(h, p, r) * x;
        }
        return sum;
    }
};

// One block: one head of one query; its warps take tokens in turn.
template <class Number>
__global__ void __launch_bounds__(32 * DECODE_PLAIN_WARPS)
variant_decode_kernel(const __grid_constant__ VariantArgs args) {
    extern __shared__ __align__(1024) unsigned char smem[];
    const VariantShape &s = args.shape;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.x, HS = s.HS;
    const int i = blockIdx.y % args.n, b = blockIdx.y / args.n;
    float *q = (float *)smem, *records = q + HS, *record = records + warp * decode_plain_record(HS);
    const floatX *fac = args.fac + (int64_t)blockIdx.y * s.PFp;
    const float unit = 1.44269504f * s.scale * (float)s.q.scale * (float)s.k.scale;
    for (int d = threadIdx.x; d < HS; d += blockDim.x) {
        float sum = 0;
        if (s.q.kind == HEADS_GROUPED) sum = (float)fac[s.q.b + head * HS + d];
        else for (int r = 0; r < s.q.R; r++)
            sum += (float)fac[s.q.a + head * s.q.R + r] * (float)fac[s.q.b + r * HS + d];
        q[d] = unit * sum;
    }
    for (int d = lane; d < HS; d += 32) record[d] = 0;
    if (lane == 0) record[HS] = -1e30f, record[HS + 1] = 0;
    __syncthreads();            // q is written
    const int64_t tokens = args.lengths[b] + i + 1;
    for (int64_t m = warp; m < tokens; m += DECODE_PLAIN_WARPS) {
        const unsigned char *row = args.cache + ((int64_t)b * args.capacity + m) * variant_row_bytes(s);
        const VariantToken<Number> token = {row, args, head, m};
        float dot = 0;
        for (int d = lane; d < HS; d += 32) dot += q[d] * token.element(CACHE_K, d);
        decode_plain_add(record, HS, warp_sum(dot), [&](int d) { return token.element(CACHE_V, d); });
    }
    __syncthreads();            // the records are written
    decode_plain_merge(args.out + ((int64_t)blockIdx.y * s.NH + head) * HS, records, HS, (float)s.v.scale);
}

inline void variant_decode(const VariantArgs &args, cudaStream_t stream) {
    const size_t numbers = args.shape.HS + DECODE_PLAIN_WARPS * decode_plain_record(args.shape.HS);
    Launch where(dim3((unsigned)args.shape.NH, (unsigned)(args.B * args.n)), 32 * DECODE_PLAIN_WARPS,
                 numbers * sizeof(float), stream);
    if (args.shape.number_bytes == 1) launch(variant_decode_kernel<e4m3>, where, args);
    else launch(variant_decode_kernel<floatX>, where, args);
}

// ---------------------------------------------------------------------------------------------------------------------
// Output gate, of steps; prefills have attention's own

// One thread per number.
__global__ void gate_outputs_kernel(floatX *y, const floatX *gate, int64_t gate_stride, int64_t N, int D) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, n = i / D;
    if (n < N) y[i] = (floatX)((float)y[i] * sigmoid((float)gate[n * gate_stride + i % D]));
}

// y (N, D) *= sigmoid(gate), gate (N, D) with rows gate_stride apart.
inline void gate_outputs(floatX *y, const floatX *gate, int64_t gate_stride, int64_t N, int64_t D,
                         cudaStream_t stream) {
    const unsigned grid = (unsigned)ceil_div(N * D, (int64_t)256);
    launch(gate_outputs_kernel, {grid, 256, 0, stream}, y, gate, gate_stride, N, (int)D);
}

#endif
