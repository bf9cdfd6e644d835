// AdamW (Loshchilov & Hutter 2019, in PyTorch's form) on fp32 master weights. The same pass writes the weights that the
// model uses: 30 bytes of memory traffic per weight in bf16.
//
//     m = beta1 m + (1 - beta1) g       v = beta2 v + (1 - beta2) g^2
//     w = w (1 - lr weight_decay) - lr / (1 - beta1^step) m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
#ifndef LLMC_ADAMW_CUH
#define LLMC_ADAMW_CUH

#include <math.h>

#include "global_norm.cuh"
#include "precision.cuh"

// The constants of a step, computed once on the host in double: in float, 1 - 0.999999 would be off by 1%.
typedef struct {
    float decay, rate, root, eps;       // 1 - lr weight_decay, lr / (1 - beta1^step), sqrt(1 - beta2^step)
    float beta1, beta2, new1, new2;     // beta and 1 - beta of the moments
} AdamWStep;

// step = 1, 2, ...
LLMC_FN AdamWStep adamw_step(double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step) {
    AdamWStep s;
    s.decay = (float)(1 - lr * weight_decay), s.rate = (float)(lr / (1 - pow(beta1, (double)step)));
    s.root = (float)sqrt(1 - pow(beta2, (double)step));
    s.beta1 = (float)beta1, s.beta2 = (float)beta2, s.eps = (float)eps;
    s.new1 = (float)(1 - beta1), s.new2 = (float)(1 - beta2);
    return s;
}

// One thread per 4 weights. If the gradient is not finite, or norm marks the step as skipped, nothing changes.
__global__ void adamw_kernel(floatX *params, float *master, float *adam_m, float *adam_v, const float *grads, size_t n,
                             AdamWStep s, const GradientNorm *norm) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    float scale = norm->clip_factor;
    if (i >= n || !isfinite(norm->norm) || !isfinite(scale)) return;
    Packed16<float> w = load16_streaming(master + i), g = load16_streaming(grads + i);
    Packed16<float> m = load16_streaming(adam_m + i), v = load16_streaming(adam_v + i);
    for (int k = 0; k < 4; k++) {
        float gk = g[k] * scale;
        m[k] = s.beta1 * m[k] + s.new1 * gk;
        v[k] = s.beta2 * v[k] + s.new2 * gk * gk;
        w[k] = w[k] * s.decay - s.rate * m[k] / (sqrtf(v[k]) / s.root + s.eps);
        params[i + k] = (floatX)w[k];
    }
    store16_streaming(master + i, w);
    store16_streaming(adam_m + i, m);
    store16_streaming(adam_v + i, v);
}

// params, master, adam_m, adam_v, grads (n), n a multiple of 4; norm (1) on the GPU. g = norm->clip_factor grads.
inline void adamw_clipped_update(floatX *params, float *master, float *adam_m, float *adam_v, const float *grads,
                                 size_t n, AdamWStep s, const GradientNorm *norm, cudaStream_t stream) {
    unsigned grid = (unsigned)ceil_div(n / 4, (size_t)256);
    launch(adamw_kernel, {grid, 256, 0, stream}, params, master, adam_m, adam_v, grads, n, s, norm);
}

#endif
