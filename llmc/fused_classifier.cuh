// Softmax, loss and dlogits in one kernel. A block reads a row for its maximum and sum together, and again, from the SM's own
// cache, to write dlogits over it: of device memory that is one read and one write.
//   loss = -log softmax(logits)[target];  dlogits = (softmax(logits) - onehot(target)) dloss, in place of the logits
// Columns from V on are padding: they get no probability, and dlogits exactly 0.
#ifndef LLMC_FUSED_CLASSIFIER_CUH
#define LLMC_FUSED_CLASSIFIER_CUH

#include "precision.cuh"

typedef enum { LOSS_ONLY, LOSS_AND_DLOGITS } ClassifierMode;

enum { CLASSIFIER_THREADS = 1024 };

// One block: one row. A row of NaN or infinity gives NaN, as it should.
__global__ void __launch_bounds__(CLASSIFIER_THREADS, 2)
fused_classifier_kernel(floatX *logits, float *losses, const int32_t *targets, int V, int Vp, float dloss, ClassifierMode mode) {
    constexpr int X = PackedX::size;
    __shared__ float shared[32];
    int target = targets[blockIdx.x], stride = blockDim.x * X;
    floatX *row = logits + (int64_t)blockIdx.x * Vp;
    float at_target = threadIdx.x == 0 ? (float)row[target] : 0;    // read before any thread writes: the sums below are barriers
    float largest = -INFINITY, sum = 0;                             // of this thread, sum relative to largest
    #pragma unroll 2
    for (int c = threadIdx.x * X; c < V; c += stride) {             // V <= Vp, a multiple of 128: the whole vector is there
        PackedX x = load16(row + c);
        float top = largest;
        #pragma unroll
        for (int k = 0; k < X; k++) {
            if (c + k >= V) x[k] = (floatX)-INFINITY;
            top = fmaxf(top, (float)x[k]);
        }
        sum *= __expf(largest - top);
        #pragma unroll
        for (int k = 0; k < X; k++) sum += __expf((float)x[k] - top);
        largest = top;
    }
    float top = block_max(largest, shared);
    float lse = logf(block_sum(sum * __expf(largest - top), shared)) + top;
    if (threadIdx.x == 0) losses[blockIdx.x] = lse - at_target;
    if (mode == LOSS_ONLY) return;
    #pragma unroll 2
    for (int c = threadIdx.x * X; c < Vp; c += stride) {
        PackedX x = load16(row + c), out;
        #pragma unroll
        for (int k = 0; k < X; k++) {
            float p = c + k < V ? __expf((float)x[k] - lse) : 0;
            out[k] = (floatX)((c + k == target ? p - 1 : p) * dloss);
        }
        store16_streaming(row + c, out);
    }
}

// logits (rows, Vp), losses (rows), targets (rows); Vp a multiple of 128
inline void fused_classifier(floatX *logits, float *losses, const int32_t *targets, int64_t rows, int64_t V, int64_t Vp, double dloss, ClassifierMode mode,
                             cudaStream_t stream) {
    int64_t threads = 32 * ceil_div(Vp, (int64_t)32 * PackedX::size);
    if (threads > CLASSIFIER_THREADS) threads = CLASSIFIER_THREADS;
    launch(fused_classifier_kernel, {(unsigned)rows, (unsigned)threads, 0, stream}, logits, losses, targets, (int)V, (int)Vp, (float)dloss, mode);
}

// total += sum of losses, in one order.
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

// total (1) on the GPU, losses (N)
inline void loss_sum(double *total, const float *losses, int64_t N, cudaStream_t stream) {
    launch(loss_sum_kernel, {1, 1024, 0, stream}, total, losses, N);
}

#endif
