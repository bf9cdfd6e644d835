// Matrix products through cuBLASLt. The first product of a shape times the library's candidates and keeps the fastest (MATMUL_FASTEST), or
// takes the first suggestion (MATMUL_FIRST: for products that run too seldom to be worth it).
//
// The choice never changes a bit of a result, though timings differ from run to run: cuBLASLt's first suggestion, which depends on
// the shape and the GPU alone, is the reference, and a faster candidate is taken only if it gives the same bits as that one on random
// numbers. Tiles of other sizes do (the sum over k runs in the same order); other ways of splitting that sum do not. Sums by
// atomic addition are excluded.
#ifndef LLMC_MATMUL_CUH
#define LLMC_MATMUL_CUH

#include <cublasLt.h>

#include "precision.cuh"
#include "rng.h"

typedef enum { AS_IS, TRANSPOSED } Layout;
typedef enum { OVERWRITE, ACCUMULATE } MatmulMode;
typedef enum { MATMUL_FASTEST, MATMUL_FIRST } MatmulChoice;

// d (M, N) = a b (+ d), all row-major: a is (M, K), or stored (K, M) when TRANSPOSED; b is (K, N), or stored (N, K) when TRANSPOSED.
typedef struct {
    int64_t M, N, K;
    Layout a_is, b_is;
    cudaDataType_t d_type;      // of d; a and b are floatX
    MatmulMode mode;
} MatmulShape;

typedef struct {
    MatmulShape shape;
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t a, b, d;
    cublasLtMatmulAlgo_t algorithm;
    float us, first_us;         // of the algorithm, and of the library's first suggestion; 0: not timed
    int candidates, same_bits;  // suggestions, and those of them with the reference's bits
} MatmulPlan;

enum {
    MAX_MATMUL_PLANS = 256, MAX_MATMUL_CANDIDATES = 24,
    MATMUL_WORKSPACE_BYTES = 64 << 20   // 32 MiB is what NVIDIA advises for Hopper; split sums of large outputs want more
};

typedef struct {
    cublasLtHandle_t handle;
    void *workspace;
    size_t workspace_bytes;
    MatmulChoice choice;        // for shapes that are met from now on
    MatmulPlan plans[MAX_MATMUL_PLANS];
    int num_plans, oldest;      // the table full, new plans take the place of the oldest
} Matmul;

LLMC_FN void cublas_check_(cublasStatus_t status, const char *statement, const char *file, int line) {
    if (status != CUBLAS_STATUS_SUCCESS) die(EXIT_SYSTEM, "%s:%d: %s: %s", file, line, statement, cublasLtGetStatusString(status));
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

// cuBLASLt is column-major, where a row-major matrix is its transpose: d^T = b^T a^T. Its first operand is thus our b.
inline cublasStatus_t matmul_run_(const Matmul *mm, const MatmulPlan *p, const cublasLtMatmulAlgo_t *algorithm, void *d, const void *c,
                                  const void *a, const void *b, cudaStream_t stream) {
    float alpha = 1, beta = p->shape.mode == ACCUMULATE ? 1.0f : 0.0f;
    return cublasLtMatmul(mm->handle, p->operation, &alpha, b, p->b, a, p->a, &beta, c, p->d, d, p->d, algorithm, mm->workspace,
                          mm->workspace_bytes, stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// Choice of the algorithm

__global__ void matmul_fill_kernel(char *out, size_t count, int bytes, uint64_t seed) {     // uniform in (-1, 1)
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x) {
        uint64_t z = (i + seed) * 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u, z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        float x = (float)((z >> 40) * 0x1p-23 - 1);
        if (bytes == 2) ((bf16 *)out)[i] = (bf16)x;
        else ((float *)out)[i] = x;
    }
}

__global__ void matmul_compare_kernel(int *differ, const int *x, const int *y, size_t words) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += (size_t)gridDim.x * blockDim.x)
        if (x[i] != y[i]) *differ = 1;
}

inline int type_bytes(cudaDataType_t type) { return type == CUDA_R_32F ? 4 : 2; }

inline void matmul_choose_(const Matmul *mm, MatmulPlan *p, const cublasLtMatmulHeuristicResult_t *found, int num_found,
                           cudaStream_t stream) {
    const MatmulShape *s = &p->shape;
    size_t counts[5] = {(size_t)(s->M * s->K), (size_t)(s->K * s->N), (size_t)(s->M * s->N), (size_t)(s->M * s->N), (size_t)(s->M * s->N)};
    int bytes[5] = {(int)sizeof(floatX), (int)sizeof(floatX), type_bytes(s->d_type), type_bytes(s->d_type), type_bytes(s->d_type)};
    char *buffers[5] = {}, *a, *b, *c, *reference, *d;      // c: what is added to, where the mode says so
    int *differ = NULL, there = 1, host_differ;
    for (int i = 0; i < 5; i++)
        if (i != 2 || s->mode == ACCUMULATE) there = there && cudaMalloc(&buffers[i], counts[i] * bytes[i]) == cudaSuccess;
    there = there && cudaMalloc(&differ, sizeof *differ) == cudaSuccess;
    if (there) {                // no room to try in: the first suggestion it is, with the same bits
        for (int i = 0; i < 5; i++)
            if (buffers[i]) launch(matmul_fill_kernel, {1024, 256, 0, stream}, buffers[i], counts[i], bytes[i], (uint64_t)i << 40);
        a = buffers[0], b = buffers[1], c = buffers[2], reference = buffers[3], d = buffers[4];
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
                   counts[3] * bytes[3] / 4);
            CUDA_CHECK(cudaMemcpyAsync(&host_differ, differ, sizeof *differ, cudaMemcpyDeviceToHost, stream));
            CUDA_CHECK(cudaStreamSynchronize(stream));
            if (host_differ) continue;
            p->same_bits++;
            float best = INFINITY, ms;
            for (int repeat = 0; repeat < 3; repeat++) {
                CUDA_CHECK(cudaEventRecord(start, stream));
                for (int k = 0; k < 2; k++) CUBLAS_CHECK(matmul_run_(mm, p, &found[i].algo, out, c ? c : out, a, b, stream));
                CUDA_CHECK(cudaEventRecord(stop, stream));
                CUDA_CHECK(cudaEventSynchronize(stop));
                CUDA_CHECK(cudaEventElapsedTime(&ms, start, stop));
                best = fminf(best, ms * 500);
            }
            if (i == 0) p->first_us = best;
            if (best < p->us) p->us = best, p->algorithm = found[i].algo;
        }
        CUDA_CHECK(cudaEventDestroy(start));
        CUDA_CHECK(cudaEventDestroy(stop));
    }
    cudaGetLastError();         // an allocation that failed is no error here
    for (int i = 0; i < 5; i++) cudaFree(buffers[i]);
    cudaFree(differ);
}

inline cublasLtMatrixLayout_t matmul_layout_(cudaDataType_t type, int64_t rows, int64_t cols) {     // of a row-major matrix
    cublasLtMatrixLayout_t layout;
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&layout, type, (uint64_t)cols, (uint64_t)rows, cols));
    return layout;
}

// The plan of a shape, made on first use (not while a graph is being captured).
inline const MatmulPlan *matmul_plan(Matmul *mm, const MatmulShape &s, cudaStream_t stream) {
    for (int i = 0; i < mm->num_plans; i++) {
        const MatmulShape &t = mm->plans[i].shape;
        if (t.M == s.M && t.N == s.N && t.K == s.K && t.a_is == s.a_is && t.b_is == s.b_is && t.d_type == s.d_type &&
            t.mode == s.mode)
            return &mm->plans[i];
    }
    MatmulPlan *p;
    if (mm->num_plans < MAX_MATMUL_PLANS) p = &mm->plans[mm->num_plans++];
    else matmul_plan_free_(p = &mm->plans[mm->oldest++ % MAX_MATMUL_PLANS]);
    const cudaDataType_t type = sizeof(floatX) == 2 ? CUDA_R_16BF : CUDA_R_32F;
    cublasOperation_t op_a = s.a_is == TRANSPOSED ? CUBLAS_OP_T : CUBLAS_OP_N, op_b = s.b_is == TRANSPOSED ? CUBLAS_OP_T : CUBLAS_OP_N;
    p->shape = s;
    CUBLAS_CHECK(cublasLtMatmulDescCreate(&p->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(p->operation, CUBLASLT_MATMUL_DESC_TRANSA, &op_b, sizeof op_b));
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(p->operation, CUBLASLT_MATMUL_DESC_TRANSB, &op_a, sizeof op_a));
    p->a = s.a_is == TRANSPOSED ? matmul_layout_(type, s.K, s.M) : matmul_layout_(type, s.M, s.K);
    p->b = s.b_is == TRANSPOSED ? matmul_layout_(type, s.N, s.K) : matmul_layout_(type, s.K, s.N);
    p->d = matmul_layout_(s.d_type, s.M, s.N);

    cublasLtMatmulPreference_t preference;
    // not INPLACE: that is by atomics
    uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE | CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE;
    CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&preference));
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &mm->workspace_bytes,
                                                      sizeof mm->workspace_bytes));
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reductions,
                                                      sizeof reductions));
    cublasLtMatmulHeuristicResult_t found[MAX_MATMUL_CANDIDATES];
    int num_found = 0;
    CUBLAS_CHECK(cublasLtMatmulAlgoGetHeuristic(mm->handle, p->operation, p->b, p->a, p->d, p->d, preference, MAX_MATMUL_CANDIDATES, found,
                                                &num_found));
    CUBLAS_CHECK(cublasLtMatmulPreferenceDestroy(preference));
    if (num_found == 0)
        die(EXIT_SYSTEM, "matmul: cuBLASLt knows no algorithm for M %lld, N %lld, K %lld", (long long)s.M, (long long)s.N, (long long)s.K);
    p->algorithm = found[0].algo;
    p->candidates = num_found;
    if (mm->choice == MATMUL_FASTEST) matmul_choose_(mm, p, found, num_found, stream);
    return p;
}

// ---------------------------------------------------------------------------------------------------------------------
// Products

inline void matmul(Matmul *mm, void *d, const floatX *a, const floatX *b, const MatmulShape &shape, cudaStream_t stream) {
    const MatmulPlan *p = matmul_plan(mm, shape, stream);
    cublasStatus_t status = matmul_run_(mm, p, &p->algorithm, d, d, a, b, stream);
    if (status != CUBLAS_STATUS_SUCCESS)
        die(EXIT_SYSTEM, "cublasLtMatmul, M %lld, N %lld, K %lld: %s", (long long)shape.M, (long long)shape.N, (long long)shape.K,
            cublasLtGetStatusString(status));
}

static const cudaDataType_t TYPE_X = sizeof(floatX) == 2 ? CUDA_R_16BF : CUDA_R_32F;

// A linear layer without bias: out (N, OC) = inp (N, IC) w^T, w being (OC, IC). ACCUMULATE: out +=, for the residual stream.
inline void linear_forward(Matmul *mm, floatX *out, const floatX *inp, const floatX *w, int64_t N, int64_t IC, int64_t OC, MatmulMode mode,
                           cudaStream_t stream) {
    matmul(mm, out, inp, w, MatmulShape{N, OC, IC, AS_IS, TRANSPOSED, TYPE_X, mode}, stream);
}

// dinp (N, IC) = dout (N, OC) w
inline void linear_backward_input(Matmul *mm, floatX *dinp, const floatX *dout, const floatX *w, int64_t N, int64_t IC, int64_t OC,
                                  cudaStream_t stream) {
    matmul(mm, dinp, dout, w, MatmulShape{N, IC, OC, AS_IS, AS_IS, TYPE_X, OVERWRITE}, stream);
}

// dw (OC, IC), fp32, = or += dout^T (N, OC) inp (N, IC)
inline void linear_backward_weight(Matmul *mm, float *dw, const floatX *dout, const floatX *inp, int64_t N, int64_t IC, int64_t OC,
                                   MatmulMode mode, cudaStream_t stream) {
    matmul(mm, dw, dout, inp, MatmulShape{OC, IC, N, TRANSPOSED, AS_IS, CUDA_R_32F, mode}, stream);
}

#endif
