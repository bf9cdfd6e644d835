// Operators with one thread per element: sums of gradients, rounding of weights, lengths of sequences.
#ifndef LLMC_ELEMENTWISE_CUH
#define LLMC_ELEMENTWISE_CUH

#include "precision.cuh"

// Launches kernel(args..., n) with n threads.
template <class... Params, class... Args>
inline void launch_elementwise_(void (*kernel)(Params...), size_t n, cudaStream_t stream, Args... args) {
    launch(kernel, {(unsigned)ceil_div(n, (size_t)256), 256, 0, stream}, args..., n);
}
__device__ inline size_t element_() { return (size_t)blockIdx.x * blockDim.x + threadIdx.x; }

__global__ void add_kernel(float *sums, const float *part, size_t n) {
    size_t i = element_();
    if (i < n) sums[i] += part[i];
}

// sums (n) += part (n)
inline void add(float *sums, const float *part, size_t n, cudaStream_t stream) {
    launch_elementwise_(add_kernel, n, stream, sums, part);
}

__global__ void round_weights_kernel(floatX *params, const float *master, size_t n) {
    size_t i = element_();
    if (i < n) params[i] = (floatX)master[i];
}

// params (n) = master (n), rounded to floatX
inline void round_weights(floatX *params, const float *master, size_t n, cudaStream_t stream) {
    launch_elementwise_(round_weights_kernel, n, stream, params, master);
}

__global__ void lengths_add_kernel(int32_t *lengths, int tokens, size_t n) {
    size_t i = element_();
    if (i < n) lengths[i] += tokens;
}

// lengths (n) += tokens
inline void lengths_add(int32_t *lengths, int tokens, size_t n, cudaStream_t stream) {
    launch_elementwise_(lengths_add_kernel, n, stream, lengths, tokens);
}

#endif
