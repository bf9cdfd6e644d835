// What the microbenchmarks share: GPU arrays of random numbers, a check against sums in double on the CPU, and timing.
// time_version flushes the caches before each run and prints the median with bytes, GB/s, TFLOP/s and the share of what
// the GPU can do.
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
    explicit Array(size_t n) : n(n) {                                   // filled with 0xff: NaN
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

// ||got - want|| / ||want|| over the numbers of want; got may be longer.
template <class X>
static double relative_error(const std::vector<X> &got, const std::vector<double> &want) {
    double sum = 0, norm = 0;
    for (size_t i = 0; i < want.size(); i++) {
        double e = (double)(float)got[i] - want[i];
        sum += e * e, norm += want[i] * want[i];
    }
    return sqrt(sum / norm);
}

// Stops the program if the error is too large, so that a wrong version is not timed.
template <class X>
static void check(const char *what, const std::vector<X> &got, const std::vector<double> &want, double tolerance) {
    double error = relative_error(got, want);
    if (!(error <= tolerance)) die(EXIT_SYSTEM, "%s: error %.3e is above the tolerance %.1e", what, error, tolerance);
    printf("%-44s error %.1e\n", what, error);
}

// The tolerance of a result that is rounded to floatX once.
static const double ROUNDED_ONCE = sizeof(floatX) == 2 ? 0.0039 : 2e-6;

// Times f() on the default stream and prints the median of 15 runs, after two to warm up.
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
    const double ms = times[times.size() / 2], gb_per_s = bytes / ms / 1e6, tflop_per_s = flop / ms / 1e9;
    const double share = std::max(gb_per_s / CEILING_GB_PER_S, tflop_per_s / CEILING_TFLOP_PER_S);
    printf("%-44s %8.1f us  %8.1f MB  %6.0f GB/s  %5.0f TFLOP/s  %3.0f%% of the ceiling\n", name, ms * 1e3, bytes / 1e6,
           gb_per_s, tflop_per_s, 100 * share);
    fflush(stdout);
}

// Microseconds per f(stream), from the median of graphs of `burst` calls. No flush in between.
template <class F>
static inline double graph_us(int burst, F f) {
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t start, stop;
    CUDA_CHECK(cudaStreamCreate(&stream));
    CUDA_CHECK(cudaEventCreate(&start));
    CUDA_CHECK(cudaEventCreate(&stop));
    f(stream);
    CUDA_CHECK(cudaStreamSynchronize(stream));
    CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < burst; i++) f(stream);
    CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    CUDA_CHECK(cudaGraphInstantiateWithFlags(&exec, graph, 0));
    std::vector<float> times;
    double spent = 0;
    for (int i = -2; i < 15 && (i < 5 || spent < 300); i++) {
        float ms;
        CUDA_CHECK(cudaEventRecord(start, stream));
        CUDA_CHECK(cudaGraphLaunch(exec, stream));
        CUDA_CHECK(cudaEventRecord(stop, stream));
        CUDA_CHECK(cudaEventSynchronize(stop));
        CUDA_CHECK(cudaEventElapsedTime(&ms, start, stop));
        if (i >= 0) times.push_back(ms), spent += ms;
    }
    CUDA_CHECK(cudaGraphExecDestroy(exec));
    CUDA_CHECK(cudaGraphDestroy(graph));
    CUDA_CHECK(cudaEventDestroy(start));
    CUDA_CHECK(cudaEventDestroy(stop));
    CUDA_CHECK(cudaStreamDestroy(stream));
    std::sort(times.begin(), times.end());
    return times[times.size() / 2] * 1e3 / burst;
}

// XOR of x (n), stored to out (1) only if it is one particular number, so that the reads are not optimized away.
static __global__ void read_kernel(int *out, const int4 *x, size_t n) {
    int sum = 0;
    size_t stride = (size_t)gridDim.x * blockDim.x, i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    #pragma unroll 8
    for (; i < n; i += stride) {
        int4 y = __ldcs(x + i);
        sum ^= y.x ^ y.y ^ y.z ^ y.w;
    }
    if (sum == 0x12345678) *out = sum;
}

// The GPU's read bandwidth: the best of several grids, over 4 GiB.
static inline double read_gb_per_s() {
    size_t bytes = (size_t)4 << 30;
    Array<int> out(1);
    int4 *x;
    CUDA_CHECK(cudaMalloc((void **)&x, bytes));
    CUDA_CHECK(cudaMemset(x, 1, bytes));
    double best = 0;
    const unsigned multiprocessors = 132, one_run = 1;          // of an H100 or H200
    for (unsigned blocks : {4, 8, 16}) {
        double us = graph_us(one_run, [&](cudaStream_t stream) {
            launch(read_kernel, {multiprocessors * blocks, 512, 0, stream}, out.p, x, bytes / sizeof(int4));
        });
        best = fmax(best, (double)bytes / us / 1e3);
    }
    CUDA_CHECK(cudaFree(x));
    return best;
}

// Fills a cache (factor_cache.cuh) with random numbers that are not NaN: for timing, where the factors would not fit.
static __global__ void fill_kernel(unsigned char *cache, size_t bytes, int number_bytes, uint64_t seed) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i * 2 < bytes; i += (size_t)gridDim.x * blockDim.x) {
        uint64_t z = (i + seed) * 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u, z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        if (number_bytes == 2) ((bf16 *)cache)[i] = (bf16)((float)(z >> 40) * 0x1p-23f - 1);
        else cache[2 * i] = (z >> 8) & 0xbf, cache[2 * i + 1] = (z >> 16) & 0xbf;      // up to 1.875; scales: anything
    }
}

// Argument i of the command line, or `otherwise` if it is not given.
static inline int64_t argument(int argc, char **argv, int i, int64_t otherwise) {
    return argc > i ? atoll(argv[i]) : otherwise;
}

#endif
