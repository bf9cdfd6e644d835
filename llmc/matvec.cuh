// Linear layers for a few rows, as one step of decoding has them: reading the weights is all the work, and what stands around a product is
// done in the same kernel: RMSNorm or SwiGLU of its input, the residual addition to its output. A warp makes one output at a time. Weights
// do not depend on the kernel before, so a block asks for its first ones before it waits for that (Hopper's programmatic launches).
//   out (N, OC) = f(inp) w^T (+ out),   w (OC, IC),   N at most MATVEC_MAX_ROWS
#ifndef LLMC_MATVEC_CUH
#define LLMC_MATVEC_CUH

#include "matmul.cuh"
#include "ptx.cuh"
#include "swiglu.cuh"

typedef enum {
    MATVEC_AS_IS,       // inp (N, IC)
    MATVEC_NORMED,      // rmsnorm(inp), inp (N, IC)
    MATVEC_SWIGLU       // swiglu(inp), inp (N, 2 IC)
} MatvecInput;

enum { MATVEC_WARPS = 8, MATVEC_MAX_ROWS = 4, MATVEC_AHEAD = 4 };   // AHEAD: 16-byte loads that a lane has under way

template <class Out, int ROWS, MatvecInput INPUT>
__global__ void __launch_bounds__(32 * MATVEC_WARPS)
matvec_kernel(Out *out, const floatX *inp, const floatX *w, int N, int IC, int OC, MatmulMode mode, float eps) {
    constexpr int X = PackedX::size, STEP = MATVEC_AHEAD * 32 * X;      // elements that a warp has under way
    extern __shared__ float4 matvec_smem[];
    __shared__ float shared[32];
    floatX *x = (floatX *)matvec_smem;                                  // (ROWS, IC)
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
        PackedX first;              // most rows are one vector a thread: read once
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
    __syncthreads();            // the input is there
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

// IC a multiple of 8. eps: of MATVEC_NORMED
template <class Out>
inline void matvec(Out *out, const floatX *inp, const floatX *w, int64_t N, int64_t IC, int64_t OC, MatvecInput input, MatmulMode mode, double eps,
                   cudaStream_t stream) {
    if (N < 1 || N > MATVEC_MAX_ROWS || IC % PackedX::size)
        die(EXIT_SYSTEM, "matvec: %lld rows of %lld; there can be 1 to %d, of a multiple of %d", (long long)N, (long long)IC, (int)MATVEC_MAX_ROWS,
            (int)PackedX::size);
    auto kernel = [&](auto rows) {
        constexpr int ROWS = decltype(rows)::value;
        return input == MATVEC_NORMED ? matvec_kernel<Out, ROWS, MATVEC_NORMED> : input == MATVEC_SWIGLU ? matvec_kernel<Out, ROWS, MATVEC_SWIGLU>
                                                                                                        : matvec_kernel<Out, ROWS, MATVEC_AS_IS>;
    };
    auto *chosen = N == 1 ? kernel(std::integral_constant<int, 1>()) : N == 2 ? kernel(std::integral_constant<int, 2>())
                                                                            : kernel(std::integral_constant<int, 4>());
    int blocks = (int)ceil_div(OC, (int64_t)MATVEC_WARPS), processors = device_attribute(cudaDevAttrMultiProcessorCount);
    if (blocks > 4 * processors) blocks = 4 * processors;       // of many outputs, each block makes several: the input is made ready once
    Launch where(dim3((unsigned)blocks), 32 * MATVEC_WARPS, (size_t)(N * IC) * sizeof(floatX), stream);
    where.early = true;
    launch(chosen, where, out, inp, w, (int)N, (int)IC, (int)OC, mode, (float)eps);
}

#endif
