// The number type of the CPU programs, and what makes plain loops over it fast.
//
// `real` is float. test_t6.c compiles the trainer with double too, so that its finite differences are sharp; exp,
// sqrt and the like then take the type of their argument (tgmath.h).
#ifndef LLMC_REAL_H
#define LLMC_REAL_H

#ifndef REAL
#define REAL float
#endif
typedef REAL real;

#ifndef __cplusplus
#include <stdint.h>
#include <tgmath.h>
#ifdef USE_OPENBLAS
#include <cblas.h>
#endif

#include "modes.h"

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
// Lets gcc vectorise exponentials in plain loops with glibc's libmvec, which is off by at most 4 ulp.
__attribute__((simd("notinbranch"))) float (expf)(float);
__attribute__((simd("notinbranch"))) double (exp)(double);
#endif

#ifdef USE_OPENBLAS
// out (M, N) = beta * out + alpha * left right, row-major: gemm of train_t6.c by OpenBLAS.
static inline void blas_gemm(real *out, int64_t ldo, const real *left, int64_t ldl, Layout left_is, const real *right,
                             int64_t ldr, Layout right_is, int64_t M, int64_t N, int64_t K, real alpha, real beta) {
    CBLAS_TRANSPOSE tl = left_is == TRANSPOSED ? CblasTrans : CblasNoTrans;
    CBLAS_TRANSPOSE tr = right_is == TRANSPOSED ? CblasTrans : CblasNoTrans;
    _Generic(alpha, float: cblas_sgemm, double: cblas_dgemm)(
        CblasRowMajor, tl, tr, (int)M, (int)N, (int)K, alpha, (const void *)left, (int)ldl, (const void *)right,
        (int)ldr, beta, (void *)out, (int)ldo);
}
#endif
#endif

#endif
