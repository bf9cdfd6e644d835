// What every CUDA file of this house shares: checked calls, checked launches, 16-byte vectors, sums over a warp or a block.
// Nothing here keeps state. Kernels take a stream, and their launchers go through launch().
#ifndef LLMC_CUDA_UTILS_CUH
#define LLMC_CUDA_UTILS_CUH

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "utils.h"

typedef __nv_bfloat16 bf16;

// ---------------------------------------------------------------------------------------------------------------------
// Errors

// Stops with one line: the statement, where it stands, and what CUDA said.
LLMC_FN void cuda_check_(cudaError_t error, const char *statement, const char *file, int line) {
    if (error != cudaSuccess) die(EXIT_SYSTEM, "%s:%d: %s: %s (%s)", file, line, statement, cudaGetErrorString(error), cudaGetErrorName(error));
}
#define CUDA_CHECK(statement) cuda_check_((statement), #statement, __FILE__, __LINE__)

// ---------------------------------------------------------------------------------------------------------------------
// Launches

// A fact about the GPU that this process uses.
inline int device_attribute(cudaDeviceAttr attribute) {
    int device, value;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
    return value;
}

// Where and how a kernel runs. The place of the call is remembered for the error line.
struct Launch {
    dim3 grid, block;
    size_t smem_bytes;          // dynamic shared memory
    cudaStream_t stream;
    const char *file;
    int line;
    // Both are Hopper's; `early` means nothing before it.
    int cluster = 1;            // thread blocks, along x, that run together (ptx.cuh)
    bool early = false;         // it may begin while the kernel before it ends, and calls ptx_wait_for_previous
    Launch(dim3 grid, dim3 block, size_t smem_bytes, cudaStream_t stream, const char *file = __builtin_FILE(), int line = __builtin_LINE())
        : grid(grid), block(block), smem_bytes(smem_bytes), stream(stream), file(file), line(line) {}
};

// The same for CUDA, whose attributes stand in `attributes`. More than 48 KB of shared memory, or 8 blocks a cluster, are asked for here (once
// would do; asking again is cheap and needs no state).
inline cudaLaunchConfig_t launch_config(const void *kernel, const Launch &where, cudaLaunchAttribute (&attributes)[2]) {
    auto check = [&](cudaError_t error, const char *what) { cuda_check_(error, what, where.file, where.line); };
    if (where.smem_bytes > 48 * 1024)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)where.smem_bytes),
              "cudaFuncSetAttribute(max dynamic shared memory)");
    if (where.cluster > 8)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cudaFuncSetAttribute(cluster size)");
    cudaLaunchConfig_t config = {};
    config.gridDim = where.grid, config.blockDim = where.block, config.dynamicSmemBytes = where.smem_bytes, config.stream = where.stream;
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

// launch(kernel<...>, {grid, block, smem_bytes, stream}, arguments...): an empty grid is no work, not an error.
// A refused launch is reported here; a fault inside the kernel surfaces at the next synchronizing CUDA_CHECK.
template <class... Params, class... Args>
inline void launch(void (*kernel)(Params...), Launch where, Args... args) {
    if (where.grid.x == 0 || where.grid.y == 0 || where.grid.z == 0) return;
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = launch_config((const void *)kernel, where, attributes);
    cuda_check_(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), "kernel launch", where.file, where.line);
}

template <class A, class B>
__host__ __device__ constexpr auto ceil_div(A a, B b) -> decltype(a / b) { return (a + b - 1) / b; }

// ---------------------------------------------------------------------------------------------------------------------
// 16 bytes in one register group: the widest load and store there is. x = load16(p); x[i]; store16(p, x).

template <class T>
struct alignas(16) Packed16 {
    static constexpr int size = 16 / sizeof(T);
    T values[size];
    __host__ __device__ T &operator[](int i) { return values[i]; }
    __host__ __device__ const T &operator[](int i) const { return values[i]; }
};

// Through int4, because the compiler may cut the copy of a struct into its elements. It may still cut what store16 writes, in four,
// where it has moved the address out of a loop: look at the SASS.
template <class T>
__device__ inline Packed16<T> load16(const T *p) {
    int4 bits = *reinterpret_cast<const int4 *>(p);
    Packed16<T> x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// The same for data read once: it need not stay in the caches.
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
// Sums. Every lane gets the result; the order of the additions is fixed, so the bits are too.

template <int LANES = 32>       // over each aligned group of LANES lanes (a power of two)
__device__ inline float warp_sum(float x) {
    for (int offset = LANES / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
    return x;
}

template <int LANES = 32>
__device__ inline float warp_max(float x) {
    for (int offset = LANES / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, offset));
    return x;
}

// Over a whole block of one dimension, a multiple of 32 threads, all of which must call. shared: at least 32 floats that no
// one else uses meanwhile; the caller may reuse them at once.
__device__ inline float block_sum(float x, float *shared) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    x = warp_sum(lane < warps ? shared[lane] : 0.0f);
    __syncthreads();            // shared[] has been read by all
    return x;
}

__device__ inline float block_max(float x, float *shared) {     // the same rules
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_max(x);
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    x = warp_max(lane < warps ? shared[lane] : -INFINITY);
    __syncthreads();
    return x;
}

#endif
