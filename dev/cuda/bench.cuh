// What the microbenchmarks share: arrays of random numbers, a check against sums in double on the CPU, and honest timing: the caches
// are flushed before each run, and the median of the runs is printed with bytes, GB/s, TFLOP/s and the share of what the GPU can do.
#ifndef BENCH_CUH
#define BENCH_CUH

#include <algorithm>
#include <cmath>
#include <vector>

#include "../../llmc/precision.cuh"
#include "../../llmc/rng.h"

// Measured on one H200: a large device-to-device copy, and an 8192^3 bf16 matrix product on random numbers.
static const double CEILING_GB_PER_S = 4300, CEILING_TFLOP_PER_S = 790;

template <class X>
struct Array {
    X *p;
    size_t n;
    explicit Array(size_t n) : n(n) {                                   // poisoned
        CUDA_CHECK(cudaMalloc((void **)&p, n * sizeof(X)));
        CUDA_CHECK(cudaMemset(p, 0xff, n * sizeof(X)));
    }
    Array(size_t n, uint64_t stream, double size) : Array(n) {         // uniform in +-size
        std::vector<X> x(n);
        #pragma omp parallel for
        for (size_t i = 0; i < n; i++) x[i] = (X)(float)(size * (2 * rng_uniform(stream, i) - 1));
        write(x);
    }
    explicit Array(const std::vector<X> &x) : Array(x.size()) { write(x); }
    Array(const Array &) = delete;
    ~Array() { cudaFree(p); }
    void write(const std::vector<X> &x) { CUDA_CHECK(cudaMemcpy(p, x.data(), n * sizeof(X), cudaMemcpyHostToDevice)); }
    void copy(const Array &from) { CUDA_CHECK(cudaMemcpy(p, from.p, n * sizeof(X), cudaMemcpyDeviceToDevice)); }
    std::vector<X> read(size_t first, size_t count) const {
        std::vector<X> x(count);
        CUDA_CHECK(cudaMemcpy(x.data(), p + first, count * sizeof(X), cudaMemcpyDeviceToHost));
        return x;
    }
};

// ||got - want|| / ||want||; a version that is wrong is not timed.
template <class X>
static void check(const char *what, const std::vector<X> &got, const std::vector<double> &want, double tolerance) {
    double sum = 0, norm = 0;
    for (size_t i = 0; i < want.size(); i++) {
        double e = (double)(float)got[i] - want[i];
        sum += e * e, norm += want[i] * want[i];
    }
    double error = sqrt(sum / norm);
    if (!(error <= tolerance)) die(1, "%s: error %.3e, at most %.1e is right", what, error, tolerance);
    printf("%-44s error %.1e\n", what, error);
}

static const double ROUNDED_ONCE = sizeof(floatX) == 2 ? 0.0039 : 2e-6;

template <class F>
static void time_version(const char *name, double bytes, double flop, F f) {
    const size_t flush_bytes = (size_t)256 << 20;
    static char *flush = NULL;
    if (!flush) CUDA_CHECK(cudaMalloc((void **)&flush, flush_bytes));
    cudaEvent_t start, stop;
    CUDA_CHECK(cudaEventCreate(&start));
    CUDA_CHECK(cudaEventCreate(&stop));
    std::vector<float> times;
    for (int i = -2; i < 15; i++) {
        float ms;
        CUDA_CHECK(cudaMemsetAsync(flush, i, flush_bytes, 0));
        CUDA_CHECK(cudaEventRecord(start, 0));
        f();
        CUDA_CHECK(cudaEventRecord(stop, 0));
        CUDA_CHECK(cudaEventSynchronize(stop));
        CUDA_CHECK(cudaEventElapsedTime(&ms, start, stop));
        if (i >= 0) times.push_back(ms);
    }
    CUDA_CHECK(cudaEventDestroy(start));
    CUDA_CHECK(cudaEventDestroy(stop));
    std::sort(times.begin(), times.end());
    double ms = times[times.size() / 2], share = std::max(bytes / ms / 1e6 / CEILING_GB_PER_S, flop / ms / 1e9 / CEILING_TFLOP_PER_S);
    printf("%-44s %8.1f us  %8.1f MB  %6.0f GB/s  %5.0f TFLOP/s  %3.0f%% of the ceiling\n", name, ms * 1e3, bytes / 1e6, bytes / ms / 1e6,
           flop / ms / 1e9, 100 * share);
    fflush(stdout);
}

// Argument i, or what it is when not given.
static inline int64_t argument(int argc, char **argv, int i, int64_t otherwise) { return argc > i ? atoll(argv[i]) : otherwise; }

#endif
