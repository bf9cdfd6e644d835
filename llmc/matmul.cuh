// Matrix products through cuBLASLt. At the first product of a shape, cuBLASLt's candidate algorithms are timed and the
// fastest is kept (MATMUL_FASTEST), or its first heuristic is used (MATMUL_FIRST: for products too rare to time).
//
// The choice never changes a bit of a result, although timings differ from run to run. The reference is the first
// heuristic, which depends only on the shape and the GPU. A faster candidate is used only if it gives the same bits as
// the reference on random numbers: other tile sizes do, because the sum over k runs in the same order; other splits of
// that sum do not. Algorithms that sum by atomic additions are excluded.
#ifndef LLMC_MATMUL_CUH
#define LLMC_MATMUL_CUH

#include <cublasLt.h>

#include "modes.h"
#include "precision.cuh"
#include "rng.h"

typedef enum { MATMUL_FASTEST, MATMUL_FIRST } MatmulChoice;

// d (M, N) = a b (+ d), all row-major. a is (M, K), or stored as (K, M) if TRANSPOSED; b is (K, N), or stored as (N, K)
// if TRANSPOSED.
typedef struct {
    int64_t M, N, K;
    Layout a_is, b_is;
    cudaDataType_t d_type;      // of d; a and b are floatX
    OutputMode mode;
} MatmulShape;

typedef struct {
    MatmulShape shape;
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t a, b, d;
    cublasLtMatmulAlgo_t algorithm;
    float us, first_us;         // time of the algorithm and of the first heuristic; 0: not timed
    int candidates, same_bits;  // heuristics found, and how many give the reference's bits
} MatmulPlan;

enum {
    MAX_MATMUL_PLANS = 256, MAX_MATMUL_CANDIDATES = 24,
    MATMUL_WORKSPACE_BYTES = 64 << 20   // NVIDIA advises 32 MiB for Hopper; split sums of large outputs need more
};

typedef struct {
    cublasLtHandle_t handle;
    void *workspace;
    size_t workspace_bytes;
    MatmulChoice choice;        // for shapes without a plan yet
    MatmulPlan plans[MAX_MATMUL_PLANS];
    int num_plans, oldest;      // when the table is full, a new plan replaces the oldest
} Matmul;

static const cudaDataType_t TYPE_X = sizeof(floatX) == 2 ? CUDA_R_16BF : CUDA_R_32F;     // floatX

LLMC_FN void cublas_check_(cublasStatus_t status, const char *statement, const char *file, int line) {
    if (status != CUBLAS_STATUS_SUCCESS)
        die(EXIT_SYSTEM, "%s:%d: %s: %s", file, line, statement, cublasLtGetStatusString(status));
}
#define CUBLAS_CHECK(statement) cublas_check_((statement), #statement, __FILE__, __LINE__)

inline void matmul_init(Matmul *mm) {
    memset(mm, 0, sizeof *mm);
    mm->workspace_bytes = MATMUL_WORKSPACE_BYTES;
    CUBLAS_CHECK(cublasLtCreate(&mm->handle));
    CUDA_CHECK(cudaMalloc(&mm->workspace, mm->workspace_bytes));
}

inline void matmul_plan_free_(MatmulPlan *p) {
    cublasLtMatrixLayoutDestroy(p->a), cublasLtMatrixLayoutDestroy(p->b), cublasLtMatrixLayoutDestroy(p->d);
    cublasLtMatmulDescDestroy(p->operation);
    memset(p, 0, sizeof *p);
}

inline void matmul_free(Matmul *mm) {
    for (int i = 0; i < mm->num_plans; i++) matmul_plan_free_(&mm->plans[i]);
    cublasLtDestroy(mm->handle);
    cudaFree(mm->workspace);
}

// d (M, N) = a b, plus c (M, N) if the plan's mode is ACCUMULATE. cuBLASLt is column-major and sees a row-major matrix
// as its transpose, so it computes d^T = b^T a^T: its first operand is our b.
inline cublasStatus_t matmul_run_(const Matmul *mm, const MatmulPlan *p, const cublasLtMatmulAlgo_t *algorithm, void *d,
                                  const void *c, const void *a, const void *b, cudaStream_t stream) {
    float alpha = 1, beta = p->shape.mode == ACCUMULATE ? 1.0f : 0.0f;
    return cublasLtMatmul(mm->handle, p->operation, &alpha, b, p->b, a, p->a, &beta, c, p->d, d, p->d, algorithm,
                          mm->workspace, mm->workspace_bytes, stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// Choice of the algorithm

// out (count) = random numbers, uniform in (-1, 1): bf16 if bytes is 2, fp32 if 4.
__global__ void matmul_fill_kernel(char *out, size_t count, int bytes, uint64_t seed) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x) {
        uint64_t z = (i + seed) * 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u, z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        float x = (float)((z >> 40) * 0x1p-23 - 1);
        if (bytes == 2) ((bf16 *)out)[i] = (bf16)x;
        else ((float *)out)[i] = x;
    }
}

// *differ = 1 if any of the 32-bit words of x (words) and y (words) differ.
__global__ void matmul_compare_kernel(int *differ, const int *x, const int *y, size_t words) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += (size_t)gridDim.x * blockDim.x)
        if (x[i] != y[i]) *differ = 1;
}

inline int type_bytes(cudaDataType_t type) { return type == CUDA_R_32F ? 4 : 2; }

// Sets p->algorithm to the fastest of found (num_found) that gives found[0]'s bits, and fills in the plan's times. If
// there is no memory for the trial, found[0] stays.
inline void matmul_choose_(const Matmul *mm, MatmulPlan *p, const cublasLtMatmulHeuristicResult_t *found, int num_found,
                           cudaStream_t stream) {
    const MatmulShape *s = &p->shape;
    size_t a_count = (size_t)(s->M * s->K), b_count = (size_t)(s->K * s->N), d_count = (size_t)(s->M * s->N);
    int x_bytes = (int)sizeof(floatX), d_bytes = type_bytes(s->d_type);
    enum { A, B, C, REFERENCE, D, BUFFERS };        // C: the addend, only for ACCUMULATE
    size_t counts[BUFFERS] = {a_count, b_count, d_count, d_count, d_count};
    int bytes[BUFFERS] = {x_bytes, x_bytes, d_bytes, d_bytes, d_bytes};
    char *buffers[BUFFERS] = {}, *a, *b, *c, *reference, *d;
    int *differ = NULL, allocated = 1, host_differ;
    for (int i = 0; i < BUFFERS; i++)
        if (i != C || s->mode == ACCUMULATE)
            allocated = allocated && cudaMalloc(&buffers[i], counts[i] * bytes[i]) == cudaSuccess;
    allocated = allocated && cudaMalloc(&differ, sizeof *differ) == cudaSuccess;
    if (allocated) {
        for (int i = 0; i < BUFFERS; i++)
            if (buffers[i])
                launch(matmul_fill_kernel, {1024, 256, 0, stream}, buffers[i], counts[i], bytes[i], (uint64_t)i << 40);
        a = buffers[A], b = buffers[B], c = buffers[C], reference = buffers[REFERENCE], d = buffers[D];
        cudaEvent_t start, stop;
        CUDA_CHECK(cudaEventCreate(&start));
        CUDA_CHECK(cudaEventCreate(&stop));
        p->us = INFINITY;
        for (int i = 0; i < num_found; i++) {
            char *out = i == 0 ? reference : d;
            if (matmul_run_(mm, p, &found[i].algo, out, c ? c : out, a, b, stream) != CUBLAS_STATUS_SUCCESS) {
                if (i == 0) break;
                continue;
            }
            CUDA_CHECK(cudaMemsetAsync(differ, 0, sizeof *differ, stream));
            launch(matmul_compare_kernel, {1024, 256, 0, stream}, differ, (const int *)reference, (const int *)out,
                   d_count * d_bytes / 4);
            CUDA_CHECK(cudaMemcpyAsync(&host_differ, differ, sizeof *differ, cudaMemcpyDeviceToHost, stream));
            CUDA_CHECK(cudaStreamSynchronize(stream));
            if (host_differ) continue;
            p->same_bits++;
            float best = INFINITY, ms;
            for (int repeat = 0; repeat < 3; repeat++) {
                CUDA_CHECK(cudaEventRecord(start, stream));
                for (int run = 0; run < 2; run++)
                    CUBLAS_CHECK(matmul_run_(mm, p, &found[i].algo, out, c ? c : out, a, b, stream));
                CUDA_CHECK(cudaEventRecord(stop, stream));
                CUDA_CHECK(cudaEventSynchronize(stop));
                CUDA_CHECK(cudaEventElapsedTime(&ms, start, stop));
                best = fminf(best, ms * 500);       // ms of two runs to us of one
            }
            if (i == 0) p->first_us = best;
            if (best < p->us) p->us = best, p->algorithm = found[i].algo;
        }
        CUDA_CHECK(cudaEventDestroy(start));
        CUDA_CHECK(cudaEventDestroy(stop));
    }
    cudaGetLastError();         // clears the error of a failed allocation
    for (int i = 0; i < BUFFERS; i++) cudaFree(buffers[i]);
    cudaFree(differ);
}

// The layout of a row-major matrix (rows, cols).
inline cublasLtMatrixLayout_t matmul_layout_(cudaDataType_t type, int64_t rows, int64_t cols) {
    cublasLtMatrixLayout_t layout;
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&layout, type, (uint64_t)cols, (uint64_t)rows, cols));
    return layout;
}

// The plan for a shape, made on first use. That must not happen while a graph is being captured.
inline const MatmulPlan *matmul_plan(Matmul *mm, const MatmulShape &s, cudaStream_t stream) {
    for (int i = 0; i < mm->num_plans; i++) {
        const MatmulShape &known = mm->plans[i].shape;
        if (known.M == s.M && known.N == s.N && known.K == s.K && known.a_is == s.a_is && known.b_is == s.b_is &&
            known.d_type == s.d_type && known.mode == s.mode)
            return &mm->plans[i];
    }
    MatmulPlan *p;
    if (mm->num_plans < MAX_MATMUL_PLANS) p = &mm->plans[mm->num_plans++];
    else matmul_plan_free_(p = &mm->plans[mm->oldest++ % MAX_MATMUL_PLANS]);
    cublasOperation_t op_a = s.a_is == TRANSPOSED ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasOperation_t op_b = s.b_is == TRANSPOSED ? CUBLAS_OP_T : CUBLAS_OP_N;
    p->shape = s;
    CUBLAS_CHECK(cublasLtMatmulDescCreate(&p->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(p->operation, CUBLASLT_MATMUL_DESC_TRANSA, &op_b, sizeof op_b));
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(p->operation, CUBLASLT_MATMUL_DESC_TRANSB, &op_a, sizeof op_a));
    p->a = s.a_is == TRANSPOSED ? matmul_layout_(TYPE_X, s.K, s.M) : matmul_layout_(TYPE_X, s.M, s.K);
    p->b = s.b_is == TRANSPOSED ? matmul_layout_(TYPE_X, s.N, s.K) : matmul_layout_(TYPE_X, s.K, s.N);
    p->d = matmul_layout_(s.d_type, s.M, s.N);

    cublasLtMatmulPreference_t preference;
    // Not INPLACE, which uses atomics.
    uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE | CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE;
    CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&preference));
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                      &mm->workspace_bytes, sizeof mm->workspace_bytes));
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                                      &reductions, sizeof reductions));
    cublasLtMatmulHeuristicResult_t found[MAX_MATMUL_CANDIDATES];
    int num_found = 0;
    CUBLAS_CHECK(cublasLtMatmulAlgoGetHeuristic(mm->handle, p->operation, p->b, p->a, p->d, p->d, preference,
                                                MAX_MATMUL_CANDIDATES, found, &num_found));
    CUBLAS_CHECK(cublasLtMatmulPreferenceDestroy(preference));
    if (num_found == 0)
        die(EXIT_SYSTEM, "matmul: cuBLASLt has no algorithm for M=%lld N=%lld K=%lld", (long long)s.M, (long long)s.N,
            (long long)s.K);
    p->algorithm = found[0].algo;
    p->candidates = num_found;
    if (mm->choice == MATMUL_FASTEST) matmul_choose_(mm, p, found, num_found, stream);
    return p;
}

// ---------------------------------------------------------------------------------------------------------------------
// Products

// d (M, N) = a b (+ d): see MatmulShape.
inline void matmul(Matmul *mm, void *d, const floatX *a, const floatX *b, const MatmulShape &shape,
                   cudaStream_t stream) {
    const MatmulPlan *p = matmul_plan(mm, shape, stream);
    cublasStatus_t status = matmul_run_(mm, p, &p->algorithm, d, d, a, b, stream);
    if (status != CUBLAS_STATUS_SUCCESS)
        die(EXIT_SYSTEM, "matmul: cublasLtMatmul failed for M=%lld N=%lld K=%lld: %s", (long long)shape.M,
            (long long)shape.N, (long long)shape.K, cublasLtGetStatusString(status));
}

// A linear layer without bias: out (N, OC) = inp (N, IC) w^T, w (OC, IC). With ACCUMULATE out +=, for the residual
// stream.
inline void linear_forward(Matmul *mm, floatX *out, const floatX *inp, const floatX *w, int64_t N, int64_t IC,
                           int64_t OC, OutputMode mode, cudaStream_t stream) {
    matmul(mm, out, inp, w, MatmulShape{N, OC, IC, AS_IS, TRANSPOSED, TYPE_X, mode}, stream);
}

// dinp (N, IC) = dout (N, OC) w, w (OC, IC).
inline void linear_backward_input(Matmul *mm, floatX *dinp, const floatX *dout, const floatX *w, int64_t N, int64_t IC,
                                  int64_t OC, cudaStream_t stream) {
    matmul(mm, dinp, dout, w, MatmulShape{N, IC, OC, AS_IS, AS_IS, TYPE_X, OVERWRITE}, stream);
}

// dw (OC, IC), in fp32, = or += dout^T inp, dout (N, OC), inp (N, IC).
inline void linear_backward_weight(Matmul *mm, float *dw, const floatX *dout, const floatX *inp, int64_t N, int64_t IC,
                                   int64_t OC, OutputMode mode, cudaStream_t stream) {
    matmul(mm, dw, dout, inp, MatmulShape{OC, IC, N, TRANSPOSED, AS_IS, CUDA_R_32F, mode}, stream);
}

#endif
