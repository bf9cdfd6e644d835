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

__global__ void global_norm_sum_kernel(GradientNorm *out, const double *partial) {
    __shared__ double shared[32];
    double sum = block_sum_double(partial[threadIdx.x], shared);
    if (threadIdx.x == 0) out->norm = sum;
}

// As torch.nn.utils.clip_grad_norm_: factor clip / (norm + 1e-6) where that is below 1; clip 0: never. A step whose norm or sum of losses
// (or NULL) is above its limit, or whose norm is not finite, is marked to be skipped (llmc/spikes.h).
__global__ void global_norm_finish_kernel(GradientNorm *out, double clip, const double *loss, double max_loss, double max_norm) {
    double norm = sqrt(out->norm), factor = clip / (norm + 1e-6);
    out->norm = norm;
    out->clip_factor = clip > 0 && factor < 1 ? (float)factor : 1.0f;
    if (!isfinite(norm) || norm > max_norm || (loss && *loss > max_loss)) out->clip_factor = NAN;
}

// out (1), partial (NORM_BLOCKS): on the GPU. grads (n), n a multiple of 4. First out->norm is the sum of squares, which several ranks
// add up; then comes the root of it.
inline void global_norm_squares(GradientNorm *out, double *partial, const float *grads, size_t n, cudaStream_t stream) {
    launch(global_norm_partial_kernel, {NORM_BLOCKS, NORM_THREADS, 0, stream}, partial, grads, n);
    launch(global_norm_sum_kernel, {1, NORM_BLOCKS, 0, stream}, out, partial);
}

inline void global_norm_finish(GradientNorm *out, double clip, const double *loss, double max_loss, double max_norm, cudaStream_t stream) {
    launch(global_norm_finish_kernel, {1, 1, 0, stream}, out, clip, loss, max_loss, max_norm);
}

inline void global_norm(GradientNorm *out, double *partial, const float *grads, size_t n, double clip, cudaStream_t stream) {
    global_norm_squares(out, partial, grads, n, stream);
    global_norm_finish(out, clip, NULL, INFINITY, INFINITY, stream);
}

#endif
