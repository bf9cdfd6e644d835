// Softmax, loss and dlogits in one kernel:
//
//     loss = -log softmax(logits)[target]
//     dlogits = (softmax(logits) - onehot(target)) dloss, in place of the logits
//
// A block reads a row once for its maximum and its sum, and again, from the L1 cache, to overwrite it with dlogits: one
// read and one write of device memory. Columns from V on are padding: they get no probability, and dlogits exactly 0.
#ifndef LLMC_FUSED_CLASSIFIER_CUH
#define LLMC_FUSED_CLASSIFIER_CUH

#include "modes.h"
#include "precision.cuh"
#include "ptx.cuh"

enum { CLASSIFIER_THREADS = 512 };      // the fastest of 256 to 1024, by 3% or more (dev/cuda/fused_classifier.cu)

// One block per row. exp(x) is computed as 2^(x log2(e)): one multiply-add and one special function unit instruction.
// That unit is the next bottleneck after memory. A row with NaN or infinity gives NaN.
__global__ void __launch_bounds__(CLASSIFIER_THREADS, MULTIPROCESSOR_THREADS / (int)CLASSIFIER_THREADS)
fused_classifier_kernel(floatX *logits, float *losses, const int32_t *targets, int V, int Vp, float dloss,
                        LossMode mode) {
    constexpr int X = PackedX::size;
    constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;
    __shared__ float shared[32];
    int target = targets[blockIdx.x], stride = blockDim.x * X;
    floatX *row = logits + (int64_t)blockIdx.x * Vp;
    float at_target = threadIdx.x == 0 ? (float)row[target] : 0;    // before any write: block_max has barriers
    float largest = -INFINITY, sum = 0;     // of this thread; sum of 2^(LOG2_E (logit - largest))
    for (int c = threadIdx.x * X; c < V; c += stride) {             // c + X <= Vp, which is a multiple of 128
        PackedX x = load16(row + c);
        if (c + X > V)
            for (int k = 0; k < X; k++) if (c + k >= V) x[k] = (floatX)-INFINITY;
        float top = largest;
        #pragma unroll
        for (int k = 0; k < X; k++) top = fmaxf(top, (float)x[k]);
        if (top > largest) sum *= ptx_exp2(LOG2_E * (largest - top)), largest = top;
        #pragma unroll
        for (int k = 0; k < X; k++) sum += ptx_exp2(fmaf((float)x[k], LOG2_E, -LOG2_E * largest));
    }
    float top = block_max(largest, shared);
    float log2_sum = log2f(block_sum(sum * ptx_exp2(LOG2_E * (largest - top)), shared)) + LOG2_E * top;
    if (threadIdx.x == 0) losses[blockIdx.x] = LN_2 * log2_sum - at_target;
    if (mode == LOSS_ONLY) return;
    float shift = log2f(dloss) - log2_sum;                          // p dloss = 2^(LOG2_E logit + shift)
    for (int c = threadIdx.x * X; c < Vp; c += stride) {
        PackedX x = load16(row + c), out;
        #pragma unroll
        for (int k = 0; k < X; k++) out[k] = (floatX)ptx_exp2(fmaf((float)x[k], LOG2_E, shift));
        if (c + X > V)
            for (int k = 0; k < X; k++) if (c + k >= V) out[k] = (floatX)0.0f;
        if (c <= target && target < c + X)
            for (int k = 0; k < X; k++)
                if (c + k == target) out[k] = (floatX)(ptx_exp2(fmaf((float)x[k], LOG2_E, shift)) - dloss);
        store16_streaming(row + c, out);
    }
}

// logits (rows, Vp), losses (rows), targets (rows); Vp a multiple of 128, dloss > 0 for LOSS_AND_DLOGITS.
inline void fused_classifier(floatX *logits, float *losses, const int32_t *targets, int64_t rows, int64_t V, int64_t Vp,
                             double dloss, LossMode mode, cudaStream_t stream) {
    int64_t threads = 32 * ceil_div(Vp, (int64_t)32 * PackedX::size);
    if (threads > CLASSIFIER_THREADS) threads = CLASSIFIER_THREADS;
    launch(fused_classifier_kernel, {(unsigned)rows, (unsigned)threads, 0, stream}, logits, losses, targets, (int)V,
           (int)Vp, (float)dloss, mode);
}

// *total += the sum of losses, always in the same order.
__global__ void loss_sum_kernel(double *total, const float *losses, int64_t N) {
    __shared__ double sums[1024];
    double sum = 0;
    for (int64_t n = threadIdx.x; n < N; n += 1024) sum += losses[n];
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int half = 512; half > 0; half /= 2) {
        if ((int)threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) *total += sums[0];
}

// total (1), losses (N).
inline void loss_sum(double *total, const float *losses, int64_t N, cudaStream_t stream) {
    launch(loss_sum_kernel, {1, 1024, 0, stream}, total, losses, N);
}

#endif
