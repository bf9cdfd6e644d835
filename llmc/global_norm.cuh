// The global gradient norm and the factor that clips it, both left on the GPU, so that the update need not wait for the host.
#ifndef LLMC_GLOBAL_NORM_CUH
#define LLMC_GLOBAL_NORM_CUH

#include "cuda_utils.cuh"

enum { NORM_BLOCKS = 512, NORM_THREADS = 512 };     // a fixed grid: the order of the sum does not depend on the GPU

typedef struct {
    double norm;
    float clip_factor;      // NAN: the step is to be skipped
} GradientNorm;

// Sum over a block in double; valid in thread 0. shared: 32 doubles.
__device__ inline double block_sum_double(double x, double *shared) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    double total = 0;
    for (int w = 0; threadIdx.x == 0 && w < (int)blockDim.x / 32; w++) total += shared[w];
    return total;
}

__global__ void global_norm_partial_kernel(double *partial, const float *grads, size_t n) {
    __shared__ double shared[32];
    double sum = 0;
    for (size_t i = ((size_t)blockIdx.x * NORM_THREADS + threadIdx.x) * 4; i < n; i += (size_t)NORM_BLOCKS * NORM_THREADS * 4) {
        Packed16<float> g = load16(grads + i);
        sum += (double)(g[0] * g[0] + g[1] * g[1] + (g[2] * g[2] + g[3] * g[3]));
    }
    sum = block_sum_double(sum, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// As torch.nn.utils.clip_grad_norm_: factor max_norm / (norm + 1e-6) where that is below 1; max_norm 0: never clip.
__global__ void global_norm_final_kernel(GradientNorm *out, const double *partial, double max_norm) {
    __shared__ double shared[32];
    double sum = block_sum_double(partial[threadIdx.x], shared);
    if (threadIdx.x != 0) return;
    double norm = sqrt(sum), factor = max_norm / (norm + 1e-6);
    out->norm = norm;
    out->clip_factor = max_norm > 0 && factor < 1 ? (float)factor : 1.0f;
}

// Marks a step to be skipped: a sum of losses or a norm above its limit (llmc/spikes.h), or not finite.
__global__ void global_norm_judge_kernel(GradientNorm *norm, const double *loss, double max_loss, double max_norm) {
    if (!isfinite(norm->norm) || *loss > max_loss || norm->norm > max_norm) norm->clip_factor = NAN;
}

// out (1), partial (NORM_BLOCKS): on the GPU. grads (n), n a multiple of 4
inline void global_norm(GradientNorm *out, double *partial, const float *grads, size_t n, double max_norm, cudaStream_t stream) {
    launch(global_norm_partial_kernel, {NORM_BLOCKS, NORM_THREADS, 0, stream}, partial, grads, n);
    launch(global_norm_final_kernel, {1, NORM_BLOCKS, 0, stream}, out, partial, max_norm);
}

#endif
