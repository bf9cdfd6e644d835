// Embedding: x (N, C) = the rows idx (N) of wte (Vp, C).
//
// The backward pass adds rows of dx to rows of dwte. With atomic additions, the rows of a frequent token would be added
// in an order, and so with bits, that change from run to run. Instead the host groups the positions by token
// (encoder_groups), and one block sums each group in the order of the positions.
#ifndef LLMC_ENCODER_CUH
#define LLMC_ENCODER_CUH

#include "precision.cuh"

// A batch's positions grouped by token, in one array of 2 N + 2 integers so that one copy brings it to the GPU:
//   [0]              number of groups
//   [1 + g]          where group g begins in `order`; one more entry for the end of the last group
//   [N + 2 + i]      order: the positions, sorted by token
LLMC_FN size_t encoder_groups_size(int64_t N) { return (size_t)(2 * N + 2); }

// Fills groups (2 N + 2) by a stable counting sort of idx (N). counts (V + 1) is scratch.
LLMC_FN void encoder_groups(int32_t *groups, int32_t *counts, const int32_t *idx, int64_t N, int64_t V) {
    int32_t *begin = groups + 1, *order = groups + N + 2, num = 0, place = 0;
    memset(counts, 0, (size_t)(V + 1) * sizeof *counts);
    for (int64_t n = 0; n < N; n++) counts[idx[n]]++;
    for (int64_t v = 0; v < V; v++) {
        int32_t count = counts[v];
        if (count) begin[num++] = place;
        counts[v] = place;
        place += count;
    }
    begin[num] = place;
    groups[0] = num;
    for (int64_t n = 0; n < N; n++) order[counts[idx[n]]++] = (int32_t)n;
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernels and their launchers

// One thread per 16 bytes of x.
__global__ void encoder_forward_kernel(floatX *x, const int32_t *idx, const floatX *wte, int64_t N, int C) {
    int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * PackedX::size, n = at / C;
    if (n < N) store16(x + at, load16(wte + (int64_t)idx[n] * C + at % C));
}

// x (N, C), idx (N), wte (Vp, C).
inline void encoder_forward(floatX *x, const int32_t *idx, const floatX *wte, int64_t N, int64_t C,
                            cudaStream_t stream) {
    unsigned grid = (unsigned)ceil_div(N * C / PackedX::size, 256);
    launch(encoder_forward_kernel, {grid, 256, 0, stream}, x, idx, wte, N, (int)C);
}

// One block per group and per 32 x 16 bytes of columns. Its warps take the group's positions in turn and add up their
// sums in shared memory.
enum { ENCODER_WARPS = 8 };
__global__ void encoder_backward_kernel(float *dwte, const floatX *dx, const int32_t *idx, const int32_t *groups,
                                        int64_t N, int C) {
    constexpr int X = PackedX::size;
    __shared__ float sums[ENCODER_WARPS][32 * X];
    if ((int)blockIdx.x >= groups[0]) return;
    const int32_t *order = groups + N + 2;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = (blockIdx.y * 32 + lane) * X;
    int begin = groups[1 + blockIdx.x], end = groups[2 + blockIdx.x];
    float sum[X] = {};
    if (c < C) {
        #pragma unroll 4
        for (int i = begin + warp; i < end; i += ENCODER_WARPS) {
            PackedX row = load16(dx + (int64_t)order[i] * C + c);
            for (int k = 0; k < X; k++) sum[k] += (float)row[k];
        }
    }
    for (int k = 0; k < X; k++) sums[warp][k * 32 + lane] = sum[k];
    __syncthreads();
    float *out = dwte + (int64_t)idx[order[begin]] * C;
    for (int i = threadIdx.x; i < 32 * X; i += blockDim.x) {
        int column = (blockIdx.y * 32 + i % 32) * X + i / 32;
        float total = 0;
        for (int w = 0; w < ENCODER_WARPS; w++) total += sums[w][i];
        if (column < C) out[column] += total;
    }
}

// dwte (Vp, C) += rows of dx (N, C), idx (N), groups (2 N + 2) from encoder_groups, all on the GPU.
inline void encoder_backward(float *dwte, const floatX *dx, const int32_t *idx, const int32_t *groups, int64_t N,
                             int64_t C, cudaStream_t stream) {
    dim3 grid((unsigned)N, (unsigned)ceil_div(C, (int64_t)(32 * PackedX::size)));
    launch(encoder_backward_kernel, {grid, 32 * ENCODER_WARPS, 0, stream}, dwte, dx, idx, groups, N, (int)C);
}

#endif
