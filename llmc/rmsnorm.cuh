// RMSNorm: out = x rstd, rstd = 1 / sqrt(mean(x^2) + eps). x, out (N, C), rstd (N). MLA's latents have a gain (C) too:
// out = x rstd gain.
//
// The residual additions around it need no pass of their own. Forward, x += y w^T is done by the matrix product
// (ACCUMULATE). Backward, the kernel adds to dx, the gradient of the residual stream, in place. One warp per row; the
// second read of a row hits the cache.
#ifndef LLMC_RMSNORM_CUH
#define LLMC_RMSNORM_CUH

#include "precision.cuh"

enum { RMSNORM_WARPS = 8 };     // rows per block

__global__ void rmsnorm_forward_kernel(floatX *out, float *rstd, const floatX *x, int64_t ldx, const floatX *gain,
                                       int64_t N, int C, float eps) {
    int64_t n = (int64_t)blockIdx.x * RMSNORM_WARPS + threadIdx.x / 32;
    int first = threadIdx.x % 32 * PackedX::size, stride = 32 * PackedX::size;
    if (n >= N) return;
    x += n * ldx, out += n * C;
    float sum = 0;
    for (int c = first; c < C; c += stride) {
        PackedX v = load16(x + c);
        for (int k = 0; k < PackedX::size; k++) sum += (float)v[k] * (float)v[k];
    }
    float r = 1 / sqrtf(warp_sum(sum) / C + eps);
    for (int c = first; c < C; c += stride) {
        PackedX v = load16(x + c), g = {};
        if (gain) g = load16(gain + c);
        for (int k = 0; k < PackedX::size; k++) v[k] = (floatX)((float)v[k] * r * (gain ? (float)g[k] : 1));
        store16(out + c, v);
    }
    if (first == 0) rstd[n] = r;
}

// out (N, C), rstd (N), x (N, C) with rows ldx apart; gain (C), or NULL: none.
inline void gain_forward(floatX *out, float *rstd, const floatX *x, int64_t ldx, const floatX *gain, int64_t N,
                         int64_t C, double eps, cudaStream_t stream) {
    unsigned grid = (unsigned)ceil_div(N, RMSNORM_WARPS);
    launch(rmsnorm_forward_kernel, {grid, 32 * RMSNORM_WARPS, 0, stream}, out, rstd, x, ldx, gain, N, (int)C,
           (float)eps);
}

// out (N, C), rstd (N), x (N, C).
inline void rmsnorm_forward(floatX *out, float *rstd, const floatX *x, int64_t N, int64_t C, double eps,
                            cudaStream_t stream) {
    gain_forward(out, rstd, x, C, NULL, N, C, eps, stream);
}

// dx += rstd (dout - out mean(dout out)). In terms of out, so that x need not be kept.
__global__ void rmsnorm_backward_kernel(floatX *dx, const floatX *dout, const floatX *out, const float *rstd, int64_t N,
                                        int C) {
    int64_t n = (int64_t)blockIdx.x * RMSNORM_WARPS + threadIdx.x / 32;
    int first = threadIdx.x % 32 * PackedX::size, stride = 32 * PackedX::size;
    if (n >= N) return;
    dx += n * C, dout += n * C, out += n * C;
    float sum = 0;
    for (int c = first; c < C; c += stride) {
        PackedX d = load16(dout + c), o = load16(out + c);
        for (int k = 0; k < PackedX::size; k++) sum += (float)d[k] * (float)o[k];
    }
    float mean = warp_sum(sum) / C, r = rstd[n];
    for (int c = first; c < C; c += stride) {
        PackedX d = load16(dout + c), o = load16(out + c), g = load16(dx + c);
        for (int k = 0; k < PackedX::size; k++) g[k] = (floatX)((float)g[k] + r * ((float)d[k] - (float)o[k] * mean));
        store16(dx + c, g);
    }
}

// dx, dout, out (N, C), rstd (N).
inline void rmsnorm_backward(floatX *dx, const floatX *dout, const floatX *out, const float *rstd, int64_t N, int64_t C,
                             cudaStream_t stream) {
    unsigned grid = (unsigned)ceil_div(N, RMSNORM_WARPS);
    launch(rmsnorm_backward_kernel, {grid, 32 * RMSNORM_WARPS, 0, stream}, dx, dout, out, rstd, N, (int)C);
}

// With z = x rstd and dz = dout gain:  dx = rstd (dz - z mean(dz z)). dx may be x.
__global__ void gain_backward_kernel(floatX *dx, const floatX *dout, const floatX *x, int64_t ldx, const float *rstd,
                                     const floatX *gain, int64_t N, int C) {
    int64_t n = (int64_t)blockIdx.x * RMSNORM_WARPS + threadIdx.x / 32;
    int first = threadIdx.x % 32 * PackedX::size, stride = 32 * PackedX::size;
    if (n >= N) return;
    dx += n * ldx, dout += n * C, x += n * ldx;
    float sum = 0, r = rstd[n];
    for (int c = first; c < C; c += stride) {
        PackedX d = load16(dout + c), g = load16(gain + c), v = load16(x + c);
        for (int k = 0; k < PackedX::size; k++) sum += (float)d[k] * (float)g[k] * (float)v[k] * r;
    }
    float mean = warp_sum(sum) / C;
    for (int c = first; c < C; c += stride) {
        PackedX d = load16(dout + c), g = load16(gain + c), v = load16(x + c);
        for (int k = 0; k < PackedX::size; k++)
            v[k] = (floatX)(r * ((float)d[k] * (float)g[k] - (float)v[k] * r * mean));
        store16(dx + c, v);
    }
}

// dx, x (N, C) with rows ldx apart, dout (N, C), rstd (N), gain (C). The gain's own gradient is column_sums(dout, x,
// rstd) (factors.cuh), before dx replaces x.
inline void gain_backward(floatX *dx, const floatX *dout, const floatX *x, int64_t ldx, const float *rstd,
                          const floatX *gain, int64_t N, int64_t C, cudaStream_t stream) {
    unsigned grid = (unsigned)ceil_div(N, RMSNORM_WARPS);
    launch(gain_backward_kernel, {grid, 32 * RMSNORM_WARPS, 0, stream}, dx, dout, x, ldx, rstd, gain, N, (int)C);
}

#endif
