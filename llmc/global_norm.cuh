// The global gradient norm and the clipping factor. Both stay on the GPU, so that the update need not wait for the
// host.
#ifndef LLMC_GLOBAL_NORM_CUH
#define LLMC_GLOBAL_NORM_CUH

#include "cuda_utils.cuh"

enum { NORM_BLOCKS = 512, NORM_THREADS = 512 };     // fixed: the order of the sum must not depend on the GPU

typedef struct {
    double norm;
    float clip_factor;      // NAN: skip the step
} GradientNorm;

// Sum over a block, in double; thread 0 gets the result. shared (32) is in shared memory.
__device__ inline double block_sum_double(double x, double *shared) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    double total = 0;
    for (int w = 0; threadIdx.x == 0 && w < (int)blockDim.x / 32; w++) total += shared[w];
    return total;
}

// partial (NORM_BLOCKS): each block's sum of squares of grads (n).
__global__ void global_norm_partial_kernel(double *partial, const float *grads, size_t n) {
    __shared__ double shared[32];
    double sum = 0;
    for (size_t i = ((size_t)blockIdx.x * NORM_THREADS + threadIdx.x) * 4; i < n;
         i += (size_t)NORM_BLOCKS * NORM_THREADS * 4) {
        Packed16<float> g = load16(grads + i);
        sum += (double)(g[0] * g[0] + g[1] * g[1] + (g[2] * g[2] + g[3] * g[3]));
    }
    sum = block_sum_double(sum, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void global_norm_sum_kernel(GradientNorm *out, const double *partial) {
    __shared__ double shared[32];
    double sum = block_sum_double(partial[threadIdx.x], shared);
    if (threadIdx.x == 0) out->norm = sum;
}

// out->norm = the sum of squares of grads, which ranks can then add up. All on the GPU: out (1), partial (NORM_BLOCKS)
// scratch, grads (n), n a multiple of 4.
inline void global_norm_squares(GradientNorm *out, double *partial, const float *grads, size_t n, cudaStream_t stream) {
    launch(global_norm_partial_kernel, {NORM_BLOCKS, NORM_THREADS, 0, stream}, partial, grads, n);
    launch(global_norm_sum_kernel, {1, NORM_BLOCKS, 0, stream}, out, partial);
}

// Clips as torch.nn.utils.clip_grad_norm_: by clip / (norm + 1e-6) where that is below 1. clip 0: no clipping. A step
// is marked as skipped if its norm is not finite, its norm exceeds max_norm, or *loss (if not NULL) exceeds max_loss
// (llmc/spikes.h).
__global__ void global_norm_finish_kernel(GradientNorm *out, double clip, const double *loss, double max_loss,
                                          double max_norm) {
    double norm = sqrt(out->norm), factor = clip / (norm + 1e-6);
    out->norm = norm;
    out->clip_factor = clip > 0 && factor < 1 ? (float)factor : 1.0f;
    if (!isfinite(norm) || norm > max_norm || (loss && *loss > max_loss)) out->clip_factor = NAN;
}

// From out->norm, the sum of squares, to the norm and the clip factor. loss (1) on the GPU, or NULL.
inline void global_norm_finish(GradientNorm *out, double clip, const double *loss, double max_loss, double max_norm,
                               cudaStream_t stream) {
    launch(global_norm_finish_kernel, {1, 1, 0, stream}, out, clip, loss, max_loss, max_norm);
}

// Both, for a single rank, with no limits on loss and norm.
inline void global_norm(GradientNorm *out, double *partial, const float *grads, size_t n, double clip,
                        cudaStream_t stream) {
    global_norm_squares(out, partial, grads, n, stream);
    global_norm_finish(out, clip, NULL, INFINITY, INFINITY, stream);
}

#endif
