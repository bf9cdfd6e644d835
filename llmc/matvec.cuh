// Linear layers for the few rows of a decoding step, N <= MATVEC_MAX_ROWS:
//     out (N, OC) = f(inp) w^T (+ out),   w (OC, IC)
//
// Reading the weights is all the work, so the same kernel also does what surrounds the product: RMSNorm or SwiGLU of
// the input (f) and the residual addition. A warp computes one output feature of all rows at a time. Weights do not
// depend on the previous kernel, so a block loads its first ones before it waits for that kernel (programmatic launch,
// sm_90).
// Source: ours.
#ifndef LLMC_MATVEC_CUH
#define LLMC_MATVEC_CUH

#include "matmul.cuh"
#include "ptx.cuh"
#include "swiglu.cuh"

typedef enum {
    MATVEC_AS_IS,       // f(inp) = inp (N, IC)
    MATVEC_NORMED,      // f = rmsnorm, inp (N, IC)
    MATVEC_SWIGLU       // f = swiglu, inp (N, 2 IC)
} MatvecInput;

enum { MATVEC_WARPS = 8, MATVEC_MAX_ROWS = 4, MATVEC_AHEAD = 4 };   // AHEAD: 16-byte loads that a lane has in flight

// Blocks of MATVEC_WARPS warps; warp i of the grid computes outputs i, i + warps of the grid, ... ROWS: N rounded up.
// MATVEC_NORMED uses eps.

template <class Out, int ROWS, MatvecInput INPUT>
__global__ void __launch_bounds__(32 * MATVEC_WARPS)
matvec_kernel(Out *out, const floatX *inp, const floatX *w, int N, int IC, int OC, OutputMode mode, float eps) {
    constexpr int X = PackedX::size, STEP = MATVEC_AHEAD * 32 * X;      // weights a warp has in flight
    extern __shared__ float4 matvec_smem[];
    __shared__ float shared[32];
    floatX *x = (floatX *)matvec_smem;                                  // f(inp) (N, IC)
    const int lane = threadIdx.x % 32, stride = gridDim.x * MATVEC_WARPS;
    int o = blockIdx.x * MATVEC_WARPS + threadIdx.x / 32;
    PackedX ahead[MATVEC_AHEAD];
    auto fetch = [&](int o, int from) {
        #pragma unroll
        for (int i = 0; i < MATVEC_AHEAD; i++) {
            int c = from + (i * 32 + lane) * X;
            if (o < OC && c < IC) ahead[i] = load16_streaming(w + (int64_t)o * IC + c);
        }
    };
    fetch(o, 0);
    ptx_let_next_begin();
    ptx_wait_for_previous();
    #pragma unroll
    for (int n = 0; n < ROWS; n++) {
        if (n >= N) break;
        const floatX *row = inp + (int64_t)n * IC * (INPUT == MATVEC_SWIGLU ? 2 : 1);
        float r = 1;
        PackedX first;              // most rows are at most one vector per thread, which is then read once
        if (threadIdx.x * X < IC) first = load16(row + threadIdx.x * X);
        if (INPUT == MATVEC_NORMED) {
            float sum = 0;
            for (int c = threadIdx.x * X; c < IC; c += blockDim.x * X) {
                PackedX y = c < (int)blockDim.x * X ? first : load16(row + c);
                for (int k = 0; k < X; k++) sum += (float)y[k] * (float)y[k];
            }
            r = 1 / sqrtf(block_sum(sum, shared) / IC + eps);
        }
        for (int c = threadIdx.x * X; c < IC; c += blockDim.x * X) {
            PackedX y = c < (int)blockDim.x * X ? first : load16(row + c);
            if (INPUT == MATVEC_NORMED) for (int k = 0; k < X; k++) y[k] = (floatX)((float)y[k] * r);
            if (INPUT == MATVEC_SWIGLU) {
                PackedX z = load16(row + IC + c);
                for (int k = 0; k < X; k++) y[k] = (floatX)((float)y[k] * sigmoid((float)y[k]) * (float)z[k]);
            }
            store16(x + n * IC + c, y);
        }
    }
    __syncthreads();            // x is written
    for (; o < OC; o += stride) {
        float sum[ROWS] = {};
        for (int from = 0; from < IC; from += STEP) {
            PackedX y[MATVEC_AHEAD];
            #pragma unroll
            for (int i = 0; i < MATVEC_AHEAD; i++) y[i] = ahead[i];
            if (from + STEP < IC) fetch(o, from + STEP);
            else fetch(o + stride, 0);
            #pragma unroll
            for (int i = 0; i < MATVEC_AHEAD; i++) {
                int c = from + (i * 32 + lane) * X;
                if (c >= IC) continue;
                #pragma unroll
                for (int n = 0; n < ROWS; n++) {
                    PackedX v = load16(x + min(n, N - 1) * IC + c);
                    #pragma unroll
                    for (int k = 0; k < X; k++) sum[n] += (float)y[i][k] * (float)v[k];
                }
            }
        }
        #pragma unroll
        for (int n = 0; n < ROWS; n++) {
            sum[n] = warp_sum(sum[n]);
            if (lane == n && n < N) {
                Out *to = out + (int64_t)n * OC + o;
                *to = (Out)(mode == ACCUMULATE ? (float)*to + sum[n] : sum[n]);
            }
        }
    }
}

template <class Out>
inline void matvec(Out *out, const floatX *inp, const floatX *w, int64_t N, int64_t IC, int64_t OC,
                   MatvecInput input, OutputMode mode, double eps, cudaStream_t stream) {
    if (N < 1 || N > MATVEC_MAX_ROWS || IC % PackedX::size)
        die(EXIT_SYSTEM, "matvec: N %lld, IC %lld: N must be from 1 to %d and IC a multiple of %d", (long long)N,
            (long long)IC, (int)MATVEC_MAX_ROWS, (int)PackedX::size);
    auto kernel = [&](auto rows) {
        constexpr int ROWS = decltype(rows)::value;
        return input == MATVEC_NORMED ? matvec_kernel<Out, ROWS, MATVEC_NORMED>
             : input == MATVEC_SWIGLU ? matvec_kernel<Out, ROWS, MATVEC_SWIGLU>
                                      : matvec_kernel<Out, ROWS, MATVEC_AS_IS>;
    };
    auto *chosen = N == 1 ? kernel(std::integral_constant<int, 1>())
                 : N == 2 ? kernel(std::integral_constant<int, 2>())
                          : kernel(std::integral_constant<int, MATVEC_MAX_ROWS>());
    const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
    int blocks = (int)ceil_div(OC, (int64_t)MATVEC_WARPS);
    if (blocks > 4 * processors) blocks = 4 * processors;       // each warp computes several outputs from one f(inp)
    Launch where(dim3((unsigned)blocks), 32 * MATVEC_WARPS, (size_t)(N * IC) * sizeof(floatX), stream);
    where.early = true;
    launch(chosen, where, out, inp, w, (int)N, (int)IC, (int)OC, mode, (float)eps);
}

#endif
