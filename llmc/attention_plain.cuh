// Causal attention in fp32 arithmetic, simple and slow: for the fp32 build, and for head sizes that attention.cuh does
// not support. Formulas and layouts are those of attention.cuh, with any head sizes up to 128. One warp per row, that
// is, per head of a token.
//
// Shapes: q and dq are dense, and so are y and dy (B, T, NH, HSV), lse (B, NH, T); k, v and their gradients, gate and
// dgate (B, T, NH, HSV) have strides. y is attention's output. gate and dgate are NULL for none. With a gate, y is the
// gated output z, and dy is at first dz.
#ifndef LLMC_ATTENTION_PLAIN_CUH
#define LLMC_ATTENTION_PLAIN_CUH

#include "attention.cuh"
#include "precision.cuh"

enum { PLAIN_WARPS = 4, PLAIN_ELEMENTS = 4 };   // rows per block; elements of a row per lane, at most

// A lane's part of a row (HS): elements lane, lane + 32, ...
struct PlainRow {
    float x[PLAIN_ELEMENTS];
    __device__ PlainRow() { for (int i = 0; i < PLAIN_ELEMENTS; i++) x[i] = 0; }
    __device__ PlainRow(const floatX *row, int HS) : PlainRow(row, HS, row, HS) {}
    __device__ PlainRow(const floatX *row, int HS, const floatX *rest, int all) {   // elements HS ... all - 1 from rest
        for (int i = 0, d = threadIdx.x % 32; i < PLAIN_ELEMENTS; i++, d += 32)
            x[i] = d < HS ? (float)row[d] : d < all ? (float)rest[d - HS] : 0;
    }
    __device__ float dot(const PlainRow &other) const {
        float sum = 0;
        for (int i = 0; i < PLAIN_ELEMENTS; i++) sum += x[i] * other.x[i];
        return warp_sum(sum);
    }
    __device__ void add(float weight, const PlainRow &other) {
        for (int i = 0; i < PLAIN_ELEMENTS; i++) x[i] += weight * other.x[i];
    }
    __device__ void scale_by_sigmoid(const PlainRow &gate) {
        for (int i = 0; i < PLAIN_ELEMENTS; i++) x[i] *= fast_sigmoid(gate.x[i]);
    }
    __device__ void store(floatX *row, int HS, float scale) const { store(row, HS, row, HS, scale); }
    __device__ void store(floatX *row, int HS, floatX *rest, int all, float scale) const {
        for (int i = 0, d = threadIdx.x % 32; i < PLAIN_ELEMENTS; i++, d += 32)
            if (d < HS) row[d] = (floatX)(scale * x[i]);
            else if (d < all) rest[d - HS] = (floatX)(scale * x[i]);
    }
};

// This warp's row: sequence b, position t, head h of `heads`. False past the last row.
__device__ inline bool plain_row(int &b, int &t, int &h, int B, int T, int heads) {
    int64_t i = (int64_t)blockIdx.x * PLAIN_WARPS + threadIdx.x / 32;
    h = i % heads, t = i / heads % T, b = (int)(i / heads / T);
    return b < B;
}

// Where the row of token b T + t, head h begins in the gate and its gradient.
__device__ inline int64_t plain_gate_row(const AttentionShape &s, int b, int t, int h) {
    return ((int64_t)b * s.T + t) * s.gate_stride + h * s.HSV;
}

// Key and value head h of token n = b T + t.
__device__ inline PlainRow plain_key(const AttentionHeads<floatX> &heads, const AttentionShape &s, int64_t n, int h) {
    return PlainRow(heads.k + n * s.k_stride + h * s.kv_head_stride, s.HSV, heads.shared + n * (s.HSK - s.HSV), s.HSK);
}
__device__ inline PlainRow plain_value(const AttentionHeads<floatX> &heads, const AttentionShape &s, int64_t n, int h) {
    return PlainRow(heads.v + n * s.v_stride + h * s.kv_head_stride, s.HSV);
}

__global__ void attention_plain_forward_kernel(floatX *y, float *lse, AttentionHeads<floatX> heads, const floatX *gate,
                                               AttentionShape s) {
    int b, t, h;
    if (!plain_row(b, t, h, s.B, s.T, s.NH)) return;
    int64_t row = ((int64_t)b * s.T + t) * s.NH + h, first = (int64_t)b * s.T;     // row of q and y; first token
    int kv = h / (s.NH / s.NKV);
    PlainRow query(heads.q + row * s.HSK, s.HSK), out;
    float largest = -INFINITY, sum = 0;
    for (int j = 0; j <= t; j++) {
        float score = s.scale * query.dot(plain_key(heads, s, first + j, kv)), top = fmaxf(largest, score);
        float shrink = expf(largest - top), p = expf(score - top);
        for (int i = 0; i < PLAIN_ELEMENTS; i++) out.x[i] *= shrink;
        out.add(p, plain_value(heads, s, first + j, kv));
        sum = sum * shrink + p;
        largest = top;
    }
    if (gate) out.scale_by_sigmoid(PlainRow(gate + plain_gate_row(s, b, t, h), s.HSV));
    out.store(y + row * s.HSV, s.HSV, 1 / sum);
    if (threadIdx.x % 32 == 0) lse[((int64_t)b * s.NH + h) * s.T + t] = largest + logf(sum);
}

inline void attention_plain_forward(floatX *y, float *lse, const AttentionHeads<floatX> &heads, const floatX *gate,
                                    const AttentionShape &s, cudaStream_t stream) {
    unsigned grid = (unsigned)ceil_div((int64_t)s.B * s.T * s.NH, PLAIN_WARPS);
    launch(attention_plain_forward_kernel, {grid, 32 * PLAIN_WARPS, 0, stream}, y, lse, heads, gate, s);
}

// dq_i = scale sum_j ds_ij k_j,  ds_ij = p_ij (<dy_i, v_j> - delta_i),  delta_i = <dy_i, y_i>, or <dz_i, z_i>
__global__ void attention_plain_dq_kernel(floatX *dq, floatX *dgate, float *delta, floatX *dy, const floatX *y,
                                          const float *lse, AttentionHeads<floatX> heads, const floatX *gate,
                                          AttentionShape s) {
    int b, t, h;
    if (!plain_row(b, t, h, s.B, s.T, s.NH)) return;
    int64_t row = ((int64_t)b * s.T + t) * s.NH + h, first = (int64_t)b * s.T;     // row of q and y; first token
    int64_t query_index = ((int64_t)b * s.NH + h) * s.T + t;
    int kv = h / (s.NH / s.NKV);
    PlainRow query(heads.q + row * s.HSK, s.HSK), dout(dy + row * s.HSV, s.HSV), out(y + row * s.HSV, s.HSV), sum;
    float own_delta = dout.dot(out), shift = lse[query_index];
    if (threadIdx.x % 32 == 0) delta[query_index] = own_delta;
    if (gate) {
        PlainRow g(gate + plain_gate_row(s, b, t, h), s.HSV), dg;
        for (int i = 0; i < PLAIN_ELEMENTS; i++) dg.x[i] = dout.x[i] * out.x[i] * (1 - fast_sigmoid(g.x[i]));
        dout.scale_by_sigmoid(g);
        dout.store(dy + row * s.HSV, s.HSV, 1);
        dg.store(dgate + plain_gate_row(s, b, t, h), s.HSV, 1);
    }
    for (int j = 0; j <= t; j++) {
        PlainRow key = plain_key(heads, s, first + j, kv);
        float p = expf(s.scale * query.dot(key) - shift);
        sum.add(p * (dout.dot(plain_value(heads, s, first + j, kv)) - own_delta), key);
    }
    sum.store(dq + row * s.HSK, s.HSK, s.scale);
}

// dv_j = sum_i p_ij dy_i,  dk_j = scale sum_i ds_ij q_i, over the queries i >= j of all heads that share a key/value
// head
__global__ void attention_plain_dkdv_kernel(AttentionHeads<floatX> gradient, const float *delta, const floatX *dy,
                                            const float *lse, AttentionHeads<floatX> heads, AttentionShape s) {
    int b, t, h, group = s.NH / s.NKV;
    if (!plain_row(b, t, h, s.B, s.T, s.NKV)) return;
    int64_t n = (int64_t)b * s.T + t, head = h * s.kv_head_stride;
    PlainRow key = plain_key(heads, s, n, h), value = plain_value(heads, s, n, h), dkey, dvalue;
    for (int i = t; i < s.T; i++)
        for (int g = h * group; g < (h + 1) * group; g++) {
            int64_t row = ((int64_t)b * s.T + i) * s.NH + g, query_index = ((int64_t)b * s.NH + g) * s.T + i;
            PlainRow query(heads.q + row * s.HSK, s.HSK), dout(dy + row * s.HSV, s.HSV);
            float p = expf(s.scale * query.dot(key) - lse[query_index]);
            dvalue.add(p, dout);
            dkey.add(p * (dout.dot(value) - delta[query_index]), query);
        }
    dkey.store(gradient.k + n * s.k_stride + head, s.HSV, gradient.shared + (n * s.NKV + h) * (s.HSK - s.HSV), s.HSK,
               s.scale);
    dvalue.store(gradient.v + n * s.v_stride + head, s.HSV, 1);
}

// scratch as for attention_backward; it holds delta (B, NH, T).
inline void attention_plain_backward(const AttentionHeads<floatX> &gradient, floatX *dgate, floatX *dy, const floatX *y,
                                     const float *lse, const AttentionHeads<floatX> &heads, const floatX *gate,
                                     float *scratch, const AttentionShape &s, cudaStream_t stream) {
    unsigned rows = (unsigned)ceil_div((int64_t)s.B * s.T * s.NH, PLAIN_WARPS);
    unsigned kv_rows = (unsigned)ceil_div((int64_t)s.B * s.T * s.NKV, PLAIN_WARPS);
    launch(attention_plain_dq_kernel, {rows, 32 * PLAIN_WARPS, 0, stream}, gradient.q, dgate, scratch, dy, y, lse,
           heads, gate, s);
    launch(attention_plain_dkdv_kernel, {kv_rows, 32 * PLAIN_WARPS, 0, stream}, gradient, scratch, dy, lse, heads, s);
}

#endif
