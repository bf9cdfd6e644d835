// Causal attention in fp32 arithmetic, simple and slow: for the fp32 build, and for head sizes that attention.cuh does
// not support. Formulas and layouts are those of attention.cuh, with any head sizes up to 128. One warp per row, that
// is, per head of a token.
//
// Shapes, all dense: q, dq (B, T, NH, HSK); k, dk (B, T, NKV, HSK); v, dv (B, T, NKV, HSV); y, dy (B, T, NH, HSV);
// lse (B, NH, T). y is attention's output. gate and dgate (B, T, NH, HSV) have a stride, or are NULL for none. With a
// gate, y is the gated output z, and dy is at first dz.
#ifndef LLMC_ATTENTION_PLAIN_CUH
#define LLMC_ATTENTION_PLAIN_CUH

#include "attention.cuh"
#include "precision.cuh"

enum { PLAIN_WARPS = 4, PLAIN_ELEMENTS = 4 };   // rows per block; elements of a row per lane, at most

// A lane's part of a row (HS): elements lane, lane + 32, ...
struct PlainRow {
    float x[PLAIN_ELEMENTS];
    __device__ PlainRow() { for (int i = 0; i < PLAIN_ELEMENTS; i++) x[i] = 0; }
    __device__ PlainRow(const floatX *row, int HS) {
        for (int i = 0, d = threadIdx.x % 32; i < PLAIN_ELEMENTS; i++, d += 32) x[i] = d < HS ? (float)row[d] : 0;
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
    __device__ void store(floatX *row, int HS, float scale) const {
        for (int i = 0, d = threadIdx.x % 32; i < PLAIN_ELEMENTS; i++, d += 32)
            if (d < HS) row[d] = (floatX)(scale * x[i]);
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

__global__ void attention_plain_forward_kernel(floatX *y, float *lse, const floatX *q, const floatX *k, const floatX *v,
                                               const floatX *gate, AttentionShape s) {
    int b, t, h;
    if (!plain_row(b, t, h, s.B, s.T, s.NH)) return;
    int64_t row = ((int64_t)b * s.T + t) * s.NH + h;                            // of q and y
    int64_t kv = (int64_t)b * s.T * s.NKV + h / (s.NH / s.NKV);                 // row of k and v, at position j
    PlainRow query(q + row * s.HSK, s.HSK), out;
    float largest = -INFINITY, sum = 0;
    for (int j = 0; j <= t; j++, kv += s.NKV) {
        float score = s.scale * query.dot(PlainRow(k + kv * s.HSK, s.HSK)), top = fmaxf(largest, score);
        float shrink = expf(largest - top), p = expf(score - top);
        for (int i = 0; i < PLAIN_ELEMENTS; i++) out.x[i] *= shrink;
        out.add(p, PlainRow(v + kv * s.HSV, s.HSV));
        sum = sum * shrink + p;
        largest = top;
    }
    if (gate) out.scale_by_sigmoid(PlainRow(gate + plain_gate_row(s, b, t, h), s.HSV));
    out.store(y + row * s.HSV, s.HSV, 1 / sum);
    if (threadIdx.x % 32 == 0) lse[((int64_t)b * s.NH + h) * s.T + t] = largest + logf(sum);
}

inline void attention_plain_forward(floatX *y, float *lse, const floatX *q, const floatX *k, const floatX *v,
                                    const floatX *gate, const AttentionShape &s, cudaStream_t stream) {
    unsigned grid = (unsigned)ceil_div((int64_t)s.B * s.T * s.NH, PLAIN_WARPS);
    launch(attention_plain_forward_kernel, {grid, 32 * PLAIN_WARPS, 0, stream}, y, lse, q, k, v, gate, s);
}

// dq_i = scale sum_j ds_ij k_j,  ds_ij = p_ij (<dy_i, v_j> - delta_i),  delta_i = <dy_i, y_i>, or <dz_i, z_i>
__global__ void attention_plain_dq_kernel(floatX *dq, floatX *dgate, float *delta, floatX *dy, const floatX *y,
                                          const float *lse, const floatX *q, const floatX *k, const floatX *v,
                                          const floatX *gate, AttentionShape s) {
    int b, t, h;
    if (!plain_row(b, t, h, s.B, s.T, s.NH)) return;
    int64_t row = ((int64_t)b * s.T + t) * s.NH + h;                            // of q and y
    int64_t kv = (int64_t)b * s.T * s.NKV + h / (s.NH / s.NKV);                 // row of k and v, at position j
    int64_t query_index = ((int64_t)b * s.NH + h) * s.T + t;
    PlainRow query(q + row * s.HSK, s.HSK), dout(dy + row * s.HSV, s.HSV), out(y + row * s.HSV, s.HSV), sum;
    float own_delta = dout.dot(out), shift = lse[query_index];
    if (threadIdx.x % 32 == 0) delta[query_index] = own_delta;
    if (gate) {
        PlainRow g(gate + plain_gate_row(s, b, t, h), s.HSV), dg;
        for (int i = 0; i < PLAIN_ELEMENTS; i++) dg.x[i] = dout.x[i] * out.x[i] * (1 - fast_sigmoid(g.x[i]));
        dout.scale_by_sigmoid(g);
        dout.store(dy + row * s.HSV, s.HSV, 1);
        dg.store(dgate + plain_gate_row(s, b, t, h), s.HSV, 1);
    }
    for (int j = 0; j <= t; j++, kv += s.NKV) {
        PlainRow key(k + kv * s.HSK, s.HSK);
        float p = expf(s.scale * query.dot(key) - shift);
        sum.add(p * (dout.dot(PlainRow(v + kv * s.HSV, s.HSV)) - own_delta), key);
    }
    sum.store(dq + row * s.HSK, s.HSK, s.scale);
}

// dv_j = sum_i p_ij dy_i,  dk_j = scale sum_i ds_ij q_i, over the queries i >= j of all heads that share a key/value
// head
__global__ void attention_plain_dkdv_kernel(floatX *dk, floatX *dv, const float *delta, const floatX *dy,
                                            const float *lse, const floatX *q, const floatX *k, const floatX *v,
                                            AttentionShape s) {
    int b, t, h, group = s.NH / s.NKV;
    if (!plain_row(b, t, h, s.B, s.T, s.NKV)) return;
    int64_t kv = ((int64_t)b * s.T + t) * s.NKV + h;                            // row of k and v
    PlainRow key(k + kv * s.HSK, s.HSK), value(v + kv * s.HSV, s.HSV), dkey, dvalue;
    for (int i = t; i < s.T; i++)
        for (int g = h * group; g < (h + 1) * group; g++) {
            int64_t row = ((int64_t)b * s.T + i) * s.NH + g, query_index = ((int64_t)b * s.NH + g) * s.T + i;
            PlainRow query(q + row * s.HSK, s.HSK), dout(dy + row * s.HSV, s.HSV);
            float p = expf(s.scale * query.dot(key) - lse[query_index]);
            dvalue.add(p, dout);
            dkey.add(p * (dout.dot(value) - delta[query_index]), query);
        }
    dkey.store(dk + kv * s.HSK, s.HSK, s.scale);
    dvalue.store(dv + kv * s.HSV, s.HSV, 1);
}

// scratch as for attention_backward; it holds delta (B, NH, T).
inline void attention_plain_backward(floatX *dq, floatX *dk, floatX *dv, floatX *dgate, floatX *dy, const floatX *y,
                                     const float *lse, const floatX *q, const floatX *k, const floatX *v,
                                     const floatX *gate, float *scratch, const AttentionShape &s, cudaStream_t stream) {
    unsigned rows = (unsigned)ceil_div((int64_t)s.B * s.T * s.NH, PLAIN_WARPS);
    unsigned kv_rows = (unsigned)ceil_div((int64_t)s.B * s.T * s.NKV, PLAIN_WARPS);
    launch(attention_plain_dq_kernel, {rows, 32 * PLAIN_WARPS, 0, stream}, dq, dgate, scratch, dy, y, lse, q, k, v,
           gate, s);
    launch(attention_plain_dkdv_kernel, {kv_rows, 32 * PLAIN_WARPS, 0, stream}, dk, dv, scratch, dy, lse, q, k, v, s);
}

#endif
