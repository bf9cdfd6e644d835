// Shared by all CUDA files: checked calls and launches, 16-byte vectors, reductions over a warp or a block.
// Nothing here keeps state. Every launcher takes a stream and goes through launch().
#ifndef LLMC_CUDA_UTILS_CUH
#define LLMC_CUDA_UTILS_CUH

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "utils.h"

typedef __nv_bfloat16 bf16;

// ---------------------------------------------------------------------------------------------------------------------
// Errors

// On failure ends the program with one line: file, line, statement, and CUDA's error.
LLMC_FN void cuda_check_(cudaError_t error, const char *statement, const char *file, int line) {
    if (error != cudaSuccess)
        die(EXIT_SYSTEM, "%s:%d: %s: %s (%s)", file, line, statement, cudaGetErrorString(error),
            cudaGetErrorName(error));
}
#define CUDA_CHECK(statement) cuda_check_((statement), #statement, __FILE__, __LINE__)

// ---------------------------------------------------------------------------------------------------------------------
// Launches

// In device code: how many threads a multiprocessor holds at once. Only data center GPUs hold 2048: A100, H100, B200,
// B300.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000 || \
                               __CUDA_ARCH__ == 1030)
enum { MULTIPROCESSOR_THREADS = 2048 };
#else
enum { MULTIPROCESSOR_THREADS = 1536 };
#endif

// An attribute of the current GPU.
inline int device_attribute(cudaDeviceAttr attribute) {
    int device, value;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
    return value;
}

// Where and how a kernel runs. file and line are those of the call, for the error message.
struct Launch {
    dim3 grid, block;
    size_t smem_bytes;          // dynamic shared memory
    cudaStream_t stream;
    const char *file;
    int line;
    // For sm_90 and later; before that, `early` has no effect.
    int cluster = 1;            // thread blocks per cluster, along x (ptx.cuh)
    bool early = false;         // may start before the previous kernel has ended; it calls ptx_wait_for_previous()
    Launch(dim3 grid, dim3 block, size_t smem_bytes, cudaStream_t stream, const char *file = __builtin_FILE(),
           int line = __builtin_LINE())
        : grid(grid), block(block), smem_bytes(smem_bytes), stream(stream), file(file), line(line) {}
};

// `where` as CUDA's launch configuration, which points to `attributes`. Shared memory that the GPU does not have is
// refused here: the kernels were laid out for the 163 KB of an A100, an RTX GPU has 99. More than 48 KB or more than
// 8 blocks per cluster must be requested first. Once per kernel would do; repeating it is cheap and needs no state.
inline cudaLaunchConfig_t launch_config(const void *kernel, const Launch &where, cudaLaunchAttribute (&attributes)[2]) {
    auto check = [&](cudaError_t error, const char *what) { cuda_check_(error, what, where.file, where.line); };
    const int available = where.smem_bytes > 48 * 1024 ? device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) : 0;
    if (available && where.smem_bytes > (size_t)available)
        die(EXIT_SYSTEM, "%s:%d: this model needs %zu bytes of shared memory per block and this GPU has %d: use an "
            "A100 or H100, or a model with a smaller --head-dim (64), fewer heads or lower ranks", where.file,
            where.line, where.smem_bytes, available);
    if (available)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)where.smem_bytes),
              "cudaFuncSetAttribute(max dynamic shared memory)");
    const int allowed = 1;
    if (where.cluster > 8)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, allowed),
              "cudaFuncSetAttribute(cluster size)");
    cudaLaunchConfig_t config = {};
    config.gridDim = where.grid, config.blockDim = where.block;
    config.dynamicSmemBytes = where.smem_bytes, config.stream = where.stream;
    config.attrs = attributes;
    if (where.cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs++].val.clusterDim = {(unsigned)where.cluster, 1, 1};
    }
    if (where.early && device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    return config;
}

// launch(kernel<...>, {grid, block, smem_bytes, stream}, arguments...). An empty grid does nothing and is not an error.
// A refused launch ends the program here; a fault inside the kernel shows at the next CUDA_CHECK that synchronizes.
template <class... Params, class... Args>
inline void launch(void (*kernel)(Params...), Launch where, Args... args) {
    if (where.grid.x == 0 || where.grid.y == 0 || where.grid.z == 0) return;
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = launch_config((const void *)kernel, where, attributes);
    cuda_check_(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), "kernel launch", where.file,
                where.line);
}

template <class A, class B>
__host__ __device__ constexpr auto ceil_div(A a, B b) -> decltype(a / b) { return (a + b - 1) / b; }

// ---------------------------------------------------------------------------------------------------------------------
// Vectors of 16 bytes, loaded and stored by one instruction each: x = load16(p); x[i]; store16(p, x). p is 16-byte
// aligned.

template <class T>
struct alignas(16) Packed16 {
    static constexpr int size = 16 / sizeof(T);
    T values[size];
    __host__ __device__ T &operator[](int i) { return values[i]; }
    __host__ __device__ const T &operator[](int i) const { return values[i]; }
};

// Through int4, because the compiler may split the copy of a struct into its elements. It may still split a store16 in
// four where it has hoisted the address out of a loop: check the SASS.
template <class T>
__device__ inline Packed16<T> load16(const T *p) {
    int4 bits = *reinterpret_cast<const int4 *>(p);
    Packed16<T> x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// The same for data that is read once and need not stay in the caches.
template <class T>
__device__ inline Packed16<T> load16_streaming(const T *p) {
    int4 bits = __ldcs(reinterpret_cast<const int4 *>(p));
    Packed16<T> x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

template <class T>
__device__ inline void store16(T *p, Packed16<T> x) {
    int4 bits;
    memcpy(&bits, &x, sizeof bits);
    *reinterpret_cast<int4 *>(p) = bits;
}

template <class T>
__device__ inline void store16_streaming(T *p, Packed16<T> x) {
    int4 bits;
    memcpy(&bits, &x, sizeof bits);
    __stcs(reinterpret_cast<int4 *>(p), bits);
}

// ---------------------------------------------------------------------------------------------------------------------
// Reductions. Every thread gets the result. The order of the additions is fixed: the same inputs give the same bits.

// Over each aligned group of LANES lanes, a power of two.
template <int LANES = 32>
__device__ inline float warp_sum(float x) {
    for (int offset = LANES / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
    return x;
}

template <int LANES = 32>
__device__ inline float warp_max(float x) {
    for (int offset = LANES / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, offset));
    return x;
}

// Over a one-dimensional block of a multiple of 32 threads, all of which must call. shared (32) is scratch in shared
// memory, free again on return.
__device__ inline float block_sum(float x, float *shared) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    x = warp_sum(lane < warps ? shared[lane] : 0.0f);
    __syncthreads();            // all have read shared[]
    return x;
}

// Same contract.
__device__ inline float block_max(float x, float *shared) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_max(x);
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    x = warp_max(lane < warps ? shared[lane] : -INFINITY);
    __syncthreads();
    return x;
}

#endif
