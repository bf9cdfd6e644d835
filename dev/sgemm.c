// The ceiling of train_t6 on this machine: what OpenBLAS reaches on a 2048 x 2048 x 2048 product in fp32 on all cores.
//
//     gcc -O2 dev/sgemm.c -o build/sgemm -lopenblas && build/sgemm
//
// Prints the median of nine runs in TFLOP/s, the unit of train_t6's --peak-tflops.
#include <cblas.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { N = 2048, RUNS = 9 };

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int compare(const void *left, const void *right) {
    double x = *(const double *)left, y = *(const double *)right;
    return (x > y) - (x < y);
}

int main(void) {
    float *a = malloc(sizeof *a * N * N), *b = malloc(sizeof *b * N * N), *c = calloc(N * N, sizeof *c);
    double tflops[RUNS];
    if (!a || !b || !c) return 1;
    for (int i = 0; i < N * N; i++) {
        a[i] = (float)rand() / (float)RAND_MAX - 0.5f;
        b[i] = (float)rand() / (float)RAND_MAX - 0.5f;
    }
    for (int r = -1; r < RUNS; r++) {       // run -1 warms up
        double start = seconds();
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, N, N, N, 1, a, N, b, N, 0, c, N);
        if (r >= 0) tflops[r] = 2.0 * N * N * N / (seconds() - start) / 1e12;
    }
    qsort(tflops, RUNS, sizeof *tflops, compare);
    printf("%.4f\n", tflops[RUNS / 2]);
    free(a), free(b), free(c);
    return 0;
}
