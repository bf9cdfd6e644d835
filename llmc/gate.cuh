// Output gate: z = sigmoid(g) y, number by number, in place. g (N, D) are columns of the projected rows, ldg apart.
#ifndef LLMC_GATE_CUH
#define LLMC_GATE_CUH

#include "swiglu.cuh"

// One thread per 16 bytes of y.
__global__ void gate_forward_kernel(floatX *y, const floatX *g, int64_t ldg, int64_t N, int D) {
    int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * PackedX::size, n = at / D;
    if (n >= N) return;
    PackedX yk = load16(y + at), gk = load16_streaming(g + n * ldg + at % D);
    for (int k = 0; k < PackedX::size; k++) yk[k] = (floatX)((float)yk[k] * sigmoid((float)gk[k]));
    store16(y + at, yk);
}

// y (N, D) becomes z; D a multiple of 8.
inline void gate_forward(floatX *y, const floatX *g, int64_t ldg, int64_t N, int64_t D, cudaStream_t stream) {
    unsigned grid = (unsigned)ceil_div(N * D / PackedX::size, 256);
    launch(gate_forward_kernel, {grid, 256, 0, stream}, y, g, ldg, N, (int)D);
}

// With s = sigmoid(g):  dg = dz z (1 - s);  dy = dz s
__global__ void gate_backward_kernel(floatX *dg, floatX *dz, const floatX *g, int64_t ldg, const floatX *z, int64_t N,
                                     int D) {
    int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * PackedX::size, n = at / D, row = n * ldg + at % D;
    if (n >= N) return;
    PackedX d = load16(dz + at), gate = load16(g + row), zk = load16_streaming(z + at);
    for (int k = 0; k < PackedX::size; k++) {
        float s = sigmoid((float)gate[k]), dk = (float)d[k];
        gate[k] = (floatX)(dk * (float)zk[k] * (1 - s)), d[k] = (floatX)(dk * s);
    }
    store16(dg + row, gate);
    store16(dz + at, d);
}

// dg (N, D), rows ldg apart, may be g; dz (N, D) becomes dy. y is not needed: <dy, y> = <dz, z> is what attention's
// backward pass takes from it.
inline void gate_backward(floatX *dg, floatX *dz, const floatX *g, int64_t ldg, const floatX *z, int64_t N, int64_t D,
                          cudaStream_t stream) {
    unsigned grid = (unsigned)ceil_div(N * D / PackedX::size, 256);
    launch(gate_backward_kernel, {grid, 256, 0, stream}, dg, dz, g, ldg, z, N, (int)D);
}

#endif
