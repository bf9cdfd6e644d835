// SwiGLU: s (N, Fp) = silu(g) z, where g and z are the two halves of a row of u (N, 2 Fp);
// silu(g) = g sigma, sigma = 1 / (1 + exp(-g)).
#ifndef LLMC_SWIGLU_CUH
#define LLMC_SWIGLU_CUH

#include "precision.cuh"

__device__ inline float sigmoid(float x) { return 1 / (1 + __expf(-x)); }

// One thread per 16 bytes of s.
__global__ void swiglu_forward_kernel(floatX *s, const floatX *u, int64_t N, int Fp) {
    int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * PackedX::size, n = at / Fp;
    if (n >= N) return;
    const floatX *row = u + n * 2 * Fp + at % Fp;
    PackedX g = load16_streaming(row), z = load16_streaming(row + Fp), out;
    for (int k = 0; k < PackedX::size; k++) out[k] = (floatX)((float)g[k] * sigmoid((float)g[k]) * (float)z[k]);
    store16(s + at, out);
}

// s (N, Fp), u (N, 2 Fp); Fp a multiple of 8.
inline void swiglu_forward(floatX *s, const floatX *u, int64_t N, int64_t Fp, cudaStream_t stream) {
    unsigned grid = (unsigned)ceil_div(N * Fp / PackedX::size, 256);
    launch(swiglu_forward_kernel, {grid, 256, 0, stream}, s, u, N, (int)Fp);
}

// dz = ds g sigma;  dg = ds z sigma (1 + g (1 - sigma)). s is recomputed.
__global__ void swiglu_backward_in_place_kernel(floatX *u, floatX *ds, int64_t N, int Fp) {
    int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * PackedX::size, n = at / Fp;
    if (n >= N) return;
    floatX *row = u + n * 2 * Fp + at % Fp;
    PackedX g = load16(row), z = load16(row + Fp), d = load16(ds + at), dg, dz, s;
    for (int k = 0; k < PackedX::size; k++) {
        float gk = (float)g[k], zk = (float)z[k], dk = (float)d[k], sigma = sigmoid(gk);
        s[k] = (floatX)(gk * sigma * zk);
        dz[k] = (floatX)(dk * gk * sigma);
        dg[k] = (floatX)(dk * zk * sigma * (1 + gk * (1 - sigma)));
    }
    store16(row, dg);
    store16(row + Fp, dz);
    store16(ds + at, s);
}

// In place: u (N, 2 Fp) becomes du, because u is not needed again. ds (N, Fp) becomes s, which the gradient of the next
// weight needs; the forward pass need not keep it.
inline void swiglu_backward_in_place(floatX *u, floatX *ds, int64_t N, int64_t Fp, cudaStream_t stream) {
    unsigned grid = (unsigned)ceil_div(N * Fp / PackedX::size, 256);
    launch(swiglu_backward_in_place_kernel, {grid, 256, 0, stream}, u, ds, N, (int)Fp);
}

#endif
