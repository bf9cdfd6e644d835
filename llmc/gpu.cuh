// The GPU as a device: choosing one, saying what it is, its memory. For train_t6.cu and generate_t6.cu.
#ifndef LLMC_GPU_CUH
#define LLMC_GPU_CUH

#include "cuda_utils.cuh"
#include "gpus.h"
#include "model.h"

inline int current_device(void) {
    int device = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    return device;
}

// Call once, before any other CUDA call: selects GPU number `rank`, modulo how many there are, and returns its
// properties. kernel: any one of the program's, to find out whether it was built for this GPU. Without a driver, a GPU
// or code for it the program ends with one line.
inline cudaDeviceProp gpu_start(int rank, const void *kernel) {
    int count = 0, driver = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    cudaDriverGetVersion(&driver);      // 0: there is no driver
    if (error == cudaErrorInsufficientDriver && driver > 0)
        die(EXIT_SYSTEM, "the NVIDIA driver is for CUDA %d.%d and this program was built with CUDA %d.%d: install a "
            "newer driver, or build with an older toolkit", driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000,
            CUDART_VERSION % 1000 / 10);
    if (error != cudaSuccess || count == 0)
        die(EXIT_SYSTEM, "no NVIDIA GPU found (%s); ./train_t6 and ./generate_t6 need none",
            driver == 0 ? "no driver" : error != cudaSuccess ? cudaGetErrorString(error) : "the driver shows none");
    cudaDeviceProp gpu;
    cudaFuncAttributes attributes;
    CUDA_CHECK(cudaSetDevice(rank % count));
    CUDA_CHECK(cudaGetDeviceProperties(&gpu, current_device()));
    if (gpu.major < 8)
        die(EXIT_SYSTEM, "the %s is too old (sm_%d%d; at least sm_80 is needed); ./train_t6 and ./generate_t6 need no "
            "GPU", gpu.name, gpu.major, gpu.minor);
    if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess)
        die(EXIT_SYSTEM, "this program has no code for the %s: build it again, with make ARCH=%d%d%s", gpu.name,
            gpu.major, gpu.minor, gpu.major == 9 ? "a" : "");
    return gpu;
}

// The GPU, driver and toolkit in one line.
inline void gpu_describe(char *out, size_t size) {
    int driver = 0;
    cudaDeviceProp gpu;
    cudaDriverGetVersion(&driver);
    CUDA_CHECK(cudaGetDeviceProperties(&gpu, current_device()));
    snprintf(out, size, "GPU %d, %s, driver for CUDA %d.%d, CUDA %d.%d", current_device(), gpu.name, driver / 1000,
             driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
}

// One row of a table of GPU memory: a pointer, how many elements it points to, and the bytes of one.
typedef struct { void **pointer; size_t elements, bytes; } Buffer;

// Bytes of buffers first to last of a table, last included, each rounded up as cudaMalloc does.
inline double memory_bytes(const Buffer *table, int first, int last) {
    double bytes = 0;
    for (int i = first; i <= last; i++) bytes += (double)round_up((int64_t)(table[i].elements * table[i].bytes), 512);
    return bytes;
}

// Allocates n buffers, filled with zero bytes. Where memory is short, ends the program with one line; `lower` is its
// advice.
inline void memory_alloc(const Buffer *table, int n, const char *lower, cudaStream_t stream) {
    for (int i = 0; i < n; i++) {
        size_t bytes = table[i].elements * table[i].bytes, free_bytes, total_bytes;
        cudaError_t error = cudaMalloc(table[i].pointer, bytes);
        if (error == cudaErrorMemoryAllocation) {
            CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
            die(EXIT_SYSTEM, "out of GPU memory: %.2f GiB more are needed and %.2f are free; %s",
                memory_bytes(table, i, n - 1) / 0x1p30, (double)free_bytes / 0x1p30, lower);
        }
        CUDA_CHECK(error);
        if (bytes) CUDA_CHECK(cudaMemsetAsync(*table[i].pointer, 0, bytes, stream));
    }
}

inline void memory_free(const Buffer *table, int n) {
    for (int i = 0; i < n; i++) CUDA_CHECK(cudaFree(*table[i].pointer));
}

#endif
