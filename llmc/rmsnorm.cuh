// RMSNorm without gain: out = x rstd, rstd = 1 / sqrt(mean(x^2) + eps). x, out (N, C), rstd (N).
//
// The residual additions around it cost no pass of their own: forward, x += y w^T is the matrix product's own addition (beta = 1);
// backward, the kernel adds to dx, the gradient of the residual stream, in place. One warp a row; the second look at a row finds
// it in the cache.
#ifndef LLMC_RMSNORM_CUH
#define LLMC_RMSNORM_CUH

#include "precision.cuh"

enum { RMSNORM_WARPS = 8 };     // rows of a block

__global__ void rmsnorm_forward_kernel(floatX *out, float *rstd, const floatX *x, int64_t N, int C, float eps) {
    int64_t n = (int64_t)blockIdx.x * RMSNORM_WARPS + threadIdx.x / 32;
    int first = threadIdx.x % 32 * PackedX::size, stride = 32 * PackedX::size;
    if (n >= N) return;
    x += n * C, out += n * C;
    float sum = 0;
    for (int c = first; c < C; c += stride) {
        PackedX p = load16(x + c);
        for (int k = 0; k < PackedX::size; k++) sum += (float)p[k] * (float)p[k];
    }
    float r = 1 / sqrtf(warp_sum(sum) / C + eps);
    for (int c = first; c < C; c += stride) {
        PackedX p = load16(x + c);
        for (int k = 0; k < PackedX::size; k++) p[k] = (floatX)((float)p[k] * r);
        store16(out + c, p);
    }
    if (first == 0) rstd[n] = r;
}

inline void rmsnorm_forward(floatX *out, float *rstd, const floatX *x, int64_t N, int64_t C, double eps, cudaStream_t stream) {
    launch(rmsnorm_forward_kernel, {(unsigned)ceil_div(N, RMSNORM_WARPS), 32 * RMSNORM_WARPS, 0, stream}, out, rstd, x, N, (int)C,
           (float)eps);
}

__global__ void rmsnorm_backward_kernel(floatX *dx, const floatX *dout, const floatX *out, const float *rstd, int64_t N, int C) {
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

// dx += rstd (dout - out mean(dout out)): written with the output, so that x need not be kept. dx, dout, out (N, C), rstd (N)
inline void rmsnorm_backward(floatX *dx, const floatX *dout, const floatX *out, const float *rstd, int64_t N, int64_t C,
                             cudaStream_t stream) {
    launch(rmsnorm_backward_kernel, {(unsigned)ceil_div(N, RMSNORM_WARPS), 32 * RMSNORM_WARPS, 0, stream}, dx, dout, out, rstd, N, (int)C);
}

#endif
