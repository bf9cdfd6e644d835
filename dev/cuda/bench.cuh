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

// Median microseconds of one of `burst` runs in a graph.
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

static inline double read_gb_per_s() {
    size_t bytes = (size_t)4 << 30;
    Array<int> out(1);
    int4 *x;
    CUDA_CHECK(cudaMalloc((void **)&x, bytes));
    CUDA_CHECK(cudaMemset(x, 1, bytes));
    double best = 0;
    for (int blocks : {4, 8, 16})
        best = fmax(best, (double)bytes / graph_us(1, [&](cudaStream_t s) { launch(read_kernel, {(unsigned)(132 * blocks), 512, 0, s}, out.p, x, bytes / 16); }) / 1e3);
    CUDA_CHECK(cudaFree(x));
    return best;
}

// Random numbers in every place of a cache (factor_cache.cuh), none of them NaN: for timing only, where the factors themselves would not fit.
static __global__ void fill_kernel(unsigned char *cache, size_t bytes, int number_bytes, uint64_t seed) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i * 2 < bytes; i += (size_t)gridDim.x * blockDim.x) {
        uint64_t z = (i + seed) * 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u, z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        if (number_bytes == 2) ((bf16 *)cache)[i] = (bf16)((float)(z >> 40) * 0x1p-23f - 1);
        else cache[2 * i] = (z >> 8) & 0xbf, cache[2 * i + 1] = (z >> 16) & 0xbf;      // up to 1.875 in size; as a scale, of some size
    }
}

// Argument i, or what it is when not given.
static inline int64_t argument(int argc, char **argv, int i, int64_t otherwise) { return argc > i ? atoll(argv[i]) : otherwise; }

#endif
