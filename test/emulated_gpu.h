// An emulated GPU for tests: it runs the kernels of llmc/*.cuh unchanged on one CPU thread, and finds races that a real
// GPU shows once in a thousand launches.
//
// How it works. Every GPU thread (a lane of a warp) is a coroutine with its own stack. A scheduler picks a random warp
// and runs each of its lanes until the lane waits: in a collective (shuffle, ballot, ldmatrix, mma) for the other
// lanes, at a barrier, or at random points. Some warps are slow. Asynchronous copies and messages between blocks
// complete at random times. The order depends on gpu.seed alone, so a failure can be repeated.
//
// It stops with one line that says what and where if
//   - all lanes that are left wait (a hang), or lanes of one warp are in different collectives;
//   - a barrier gets more arrivals or bytes than it expects, or something arrives at a block that has ended;
//   - an address in shared memory is out of range or misaligned, or bytes past the end of shared memory were written.
// Shared memory starts as NaN, and a copy's destination is NaN until the copy completes: reading too early gives NaN.
// Not emulated: memory writes that other threads see late, overlapping kernels, and time.
//
// How tests use it. test_decode.cu includes dev/cuda/flashtpa_decode.cu, whose checks then run on this GPU. The
// Makefile first copies the sources to build/emulated, rewriting their `__shared__` declarations to gpu_shared<...>()
// below.
//     g++ -include test/emulated_gpu.h ...      replaces CUDA's built-ins, its runtime calls and llmc/ptx.cuh
//     -DEMULATED_CC=8                           the code path of sm_80; default 9, sm_90
// Source: ours; instructions follow the PTX manual (llmc/ptx.cuh names the sections).
#ifndef EMULATED_GPU_H
#define EMULATED_GPU_H

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "llmc/rng.h"

#ifndef EMULATED_CC
#define EMULATED_CC 9
#endif
#undef __shared__               // a declaration that was not rewritten does not compile
#undef __launch_bounds__
#undef __grid_constant__
#define __launch_bounds__(...)
#define __grid_constant__
#ifndef __forceinline__
#define __forceinline__ inline
#endif

// ---------------------------------------------------------------------------------------------------------------------
// The machine

// An mbarrier, 8 bytes of shared memory. Its phase completes when no arrivals and no bytes are pending.
struct GpuBarrier { int16_t pending, arrivals; int32_t bytes : 31; uint32_t phase : 1; };

struct GpuLane {
    uint3 thread;
    struct GpuWarp *warp;
    int lane;
    enum { READY, IN_COLLECTIVE, WAITING, ENDED } state;
    char *stack;
    bool begun;
    ucontext_t first;           // where it begins
    jmp_buf at;                 // where it resumes
    const long *generation;     // WAITING: until this differs from `was`,
    long was;
    const GpuBarrier *barrier;  // or, if not NULL, until the phase of this parity is complete
    uint32_t parity;
    const char *what;           // what it waits for, for the message about a hang
    long cluster_was;           // between ptx_cluster_arrive and ptx_cluster_wait
};

struct GpuWarp {
    struct GpuBlock *block;
    GpuLane lanes[32];
    int ended = 0, arrived = 0, collective = 0;
    long generation = 0;        // collectives completed
    long asleep = -1;           // no lane can run while gpu.progress is this
    double speed;               // probability that the warp runs when it is picked
    char in[32][64], out[32][64];
};

// A barrier of threads: named barriers, __syncthreads, and that of a cluster.
struct GpuMeeting { int arrived = 0, expected = 0; long generation = 0; };

struct GpuBlock {
    uint3 number;
    int rank, running;          // warps that have not ended
    struct GpuCluster *cluster;
    unsigned char *shared;      // static shared memory; dynamic shared memory from GPU_STATIC_BYTES on
    size_t bytes;
    std::vector<GpuWarp *> warps;
    GpuMeeting named[16];
};

struct GpuCluster { std::vector<GpuBlock *> blocks; GpuMeeting meeting; int running; };

enum { GPU_STACK_BYTES = 64 << 10, GPU_STATIC_BYTES = 8 << 10, GPU_GUARD_BYTES = 1 << 10 };

struct Gpu {
    int multiprocessors = 24;
    int shared_bytes = 227 << 10;               // dynamic shared memory per block, at most
    uint64_t seed = 1, drawn = 0;               // random numbers: stream (rng.h), and how many were drawn
    GpuLane *lane = NULL;                       // the lane that runs
    jmp_buf scheduler;
    std::function<void()> kernel;
    std::vector<std::function<void()>> under_way;   // asynchronous operations that have started and not completed
    long progress = 0;                          // counts barriers, copies and ended lanes; a hang makes none
    std::vector<char *> stacks;                 // free ones
    size_t static_bytes = 0;                    // static shared memory of all kernels: each has its own place
};
static Gpu gpu;
static uint3 threadIdx, blockIdx;               // those of the lane that runs
static dim3 blockDim, gridDim;

static inline uint64_t gpu_random(void) { return rng_at(gpu.seed, gpu.drawn++); }
static inline double gpu_uniform(void) { return rng_uniform(gpu.seed, gpu.drawn++); }

[[noreturn]] static inline void gpu_fault(const char *what) {
    if (!gpu.lane) die(EXIT_SYSTEM, "emulated GPU: %s", what);
    die(EXIT_SYSTEM, "emulated GPU: %s (block %u, %u, thread %u)", what, blockIdx.x, blockIdx.y, threadIdx.x);
}

static inline GpuBlock *gpu_this_block(void) { return gpu.lane->warp->block; }

// Suspends the running lane until the scheduler resumes it.
static __attribute__((noipa)) void gpu_pause(decltype(GpuLane::READY) state) {
    gpu.lane->state = state;
    if (_setjmp(gpu.lane->at) == 0) _longjmp(gpu.scheduler, 1);
}
static inline void gpu_pause_sometimes(void) { if (gpu_random() % 4 == 0) gpu_pause(GpuLane::READY); }
static inline void gpu_wait(const long *generation, long was, const GpuBarrier *barrier, uint32_t parity,
                            const char *what) {
    GpuLane *l = gpu.lane;
    l->generation = generation, l->was = was, l->barrier = barrier, l->parity = parity, l->what = what;
    gpu_pause(GpuLane::WAITING);
}
static inline bool gpu_can_run(const GpuLane *l) {
    if (l->state != GpuLane::WAITING) return l->state == GpuLane::READY;
    return l->barrier ? l->barrier->phase != l->parity : *l->generation != l->was;
}

// One of `threads` threads arrives. Returns what gpu_wait_for needs to wait for the others.
static inline long gpu_arrive(GpuMeeting *meeting, int threads) {
    if (meeting->arrived > 0 && meeting->expected != threads)
        gpu_fault("threads at one barrier disagree about their number");
    const long was = meeting->generation;
    meeting->expected = threads;
    if (++meeting->arrived == threads) meeting->arrived = 0, meeting->generation++, gpu.progress++;
    return was;
}
static inline void gpu_wait_for(GpuMeeting *meeting, long was, const char *what) {
    while (meeting->generation == was) gpu_wait(&meeting->generation, was, NULL, 0, what);
}
static inline void gpu_meet_in_block(int barrier, int threads) {
    GpuMeeting *meeting = &gpu_this_block()->named[barrier];
    gpu_wait_for(meeting, gpu_arrive(meeting, threads), "waits at a barrier of its block");
}

static void gpu_lane_main(void) {
    gpu.kernel();
    gpu.lane->warp->ended++, gpu.progress++;
    gpu_pause(GpuLane::ENDED);
}

static inline void gpu_begin_lane(GpuLane *l) {
    if (gpu.stacks.empty()) {
        void *stack = mmap(NULL, GPU_STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED) gpu_fault("out of memory for thread stacks");
        gpu.stacks.push_back((char *)stack);
    }
    l->stack = gpu.stacks.back(), gpu.stacks.pop_back();
    l->state = GpuLane::READY, l->begun = false;
    getcontext(&l->first);
    l->first.uc_stack.ss_sp = l->stack;
    l->first.uc_stack.ss_size = GPU_STACK_BYTES - l->thread.x % 32 * 256;    // spreads tops over the CPU cache's sets
    l->first.uc_link = NULL;
    makecontext(&l->first, gpu_lane_main, 0);
}

static __attribute__((noipa)) void gpu_run_lane(GpuLane *l) {
    gpu.lane = l, l->state = GpuLane::READY;
    threadIdx = l->thread, blockIdx = l->warp->block->number;
    if (_setjmp(gpu.scheduler) == 0) {
        if (l->begun) _longjmp(l->at, 1);
        l->begun = true;
        setcontext(&l->first);
    }
    gpu.lane = NULL;
}

static inline GpuCluster *gpu_begin_cluster(int number, int size, size_t bytes) {
    GpuCluster *cluster = new GpuCluster;
    int along_x = (int)gridDim.x / size, warps = ((int)blockDim.x + 31) / 32;
    cluster->running = size;
    for (int rank = 0; rank < size; rank++) {
        GpuBlock *b = new GpuBlock;
        b->number = {(unsigned)(number % along_x * size + rank), (unsigned)(number / along_x) % gridDim.y,
                     (unsigned)(number / along_x) / gridDim.y};
        b->rank = rank, b->cluster = cluster, b->running = warps, b->bytes = GPU_STATIC_BYTES + bytes;
        size_t all = (b->bytes + GPU_GUARD_BYTES + 1023) / 1024 * 1024;
        b->shared = (unsigned char *)aligned_alloc(1024, all);
        memset(b->shared, 0xff, all);
        for (int w = 0; w < warps; w++) {
            GpuWarp *warp = new GpuWarp;
            warp->block = b;
            warp->speed = gpu_random() % 8 == 0 ? 0.02 : 0.3 + 0.7 * gpu_uniform();      // some are very slow
            for (int i = 0; i < 32; i++) {
                GpuLane *l = &warp->lanes[i];
                l->thread = {(unsigned)(w * 32 + i), 0, 0}, l->warp = warp, l->lane = i;
                gpu_begin_lane(l);
            }
            b->warps.push_back(warp);
        }
        cluster->blocks.push_back(b);
    }
    return cluster;
}

static inline void gpu_end_cluster(GpuCluster *cluster) {
    std::vector<std::function<void()>> rest;
    rest.swap(gpu.under_way);
    for (auto &f : rest) f();           // those of other clusters complete, one to this cluster is a fault
    for (GpuBlock *b : cluster->blocks) {
        for (int i = 0; i < GPU_GUARD_BYTES; i++)
            if (b->shared[b->bytes + i] != 0xff) gpu_fault("bytes past the end of shared memory were written");
        free(b->shared);
        for (GpuWarp *w : b->warps) delete w;
        delete b;
    }
    delete cluster;
}

[[noreturn]] static inline void gpu_hang(const std::vector<GpuWarp *> &running) {
    for (GpuWarp *w : running)
        for (GpuLane &l : w->lanes)
            if (l.state != GpuLane::ENDED) {
                const uint3 block = w->block->number;
                const char *state = l.state == GpuLane::WAITING ? l.what
                                  : l.state == GpuLane::IN_COLLECTIVE ? "waits for its warp's other lanes" : "runs";
                fprintf(stderr, "block %u, %u, thread %u (of %zu warps left): %s\n", block.x, block.y, l.thread.x,
                        running.size(), state);
                break;
            }
    gpu_fault("hang: all threads that are left wait");
}

// Runs a grid to its end. As many clusters are resident as fit, with one block per multiprocessor.
static inline void gpu_run(int cluster, size_t bytes) {
    if ((int)bytes > gpu.shared_bytes || gridDim.x % cluster || blockDim.x % 32)
        gpu_fault("invalid launch: too much shared memory, or the cluster or block size does not divide");
    std::vector<int> order;
    for (int i = 0; i < (int)(gridDim.x / cluster * gridDim.y * gridDim.z); i++) {
        order.push_back(i);
        std::swap(order[i], order[gpu_random() % order.size()]);
    }
    static const double paces[] = {0.02, 0.3, 1, 3};
    const double pace = paces[gpu_random() % 4];        // asynchronous operations that complete per turn
    int resident = 0;
    long progress = -1, idle = 0;
    std::vector<GpuWarp *> running;
    while (!order.empty() || !running.empty()) {
        while (!order.empty() && (resident == 0 || (resident + 1) * cluster <= gpu.multiprocessors)) {
            GpuCluster *c = gpu_begin_cluster(order.back(), cluster, bytes);
            for (GpuBlock *b : c->blocks) running.insert(running.end(), b->warps.begin(), b->warps.end());
            order.pop_back(), resident++;
        }
        const size_t turn = gpu_random() % running.size();
        GpuWarp *w = running[turn];
        if (w->asleep != gpu.progress && gpu_uniform() < w->speed)
            for (int rounds = 1 + gpu_random() % 6, from = gpu_random() % 32, ran = 1; rounds > 0 && ran; rounds--) {
                ran = 0;
                for (int i = 0; i < 32; i++) {
                    GpuLane *l = &w->lanes[(from + i) % 32];
                    if (gpu_can_run(l)) gpu_run_lane(l), ran = 1;
                }
                if (!ran) w->asleep = gpu.progress;
            }
        if (w->ended == 32) {
            for (GpuLane &l : w->lanes) gpu.stacks.push_back(l.stack);
            running[turn] = running.back(), running.pop_back();
            GpuCluster *c = w->block->cluster;
            if (--w->block->running == 0 && --c->running == 0) gpu_end_cluster(c), resident--;
        }
        for (double p = pace; !gpu.under_way.empty() && (p >= 1 || gpu_uniform() < p); p -= 1) {
            std::swap(gpu.under_way[gpu_random() % gpu.under_way.size()], gpu.under_way.back());
            std::function<void()> f = std::move(gpu.under_way.back());
            gpu.under_way.pop_back(), gpu.progress++;
            f();
        }
        if (gpu.progress != progress) progress = gpu.progress, idle = 0;
        else if (gpu.under_way.empty() && ++idle > 2000000 + 20000 * (long)running.size()) gpu_hang(running);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// CUDA C++: collectives, shared memory, built-in functions

// A collective: each lane of a warp brings `in`, and the last to arrive computes all lanes' `out` by f. All must bring
// the same id.
template <class Out, class In, class F>
static inline Out gpu_collective(int id, In in, F f) {
    GpuLane *l = gpu.lane;
    GpuWarp *w = l->warp;
    static_assert(sizeof(In) <= 64 && sizeof(Out) <= 64, "a lane brings and gets at most 64 bytes");
    if (w->arrived > 0 && w->collective != id) gpu_fault("lanes of a warp are in different collectives");
    if (w->ended > 0) gpu_fault("a collective in a warp with lanes that have ended");
    w->collective = id;
    memcpy(w->in[l->lane], &in, sizeof in);
    const long was = w->generation;
    if (++w->arrived < 32) while (w->generation == was) gpu_pause(GpuLane::IN_COLLECTIVE);
    else {
        In all[32];
        Out outs[32];
        for (int i = 0; i < 32; i++) memcpy(&all[i], w->in[i], sizeof in);
        f(all, outs);
        for (int i = 0; i < 32; i++) memcpy(w->out[i], &outs[i], sizeof(Out));
        w->arrived = 0, w->generation++;
        for (GpuLane &other : w->lanes) if (other.state == GpuLane::IN_COLLECTIVE) other.state = GpuLane::READY;
        gpu_pause_sometimes();
    }
    Out out;
    memcpy(&out, w->out[l->lane], sizeof out);
    return out;
}

template <class X> static inline X gpu_shuffle(int id, X x, int from) {
    struct In { X x; int from; };
    return gpu_collective<X>(id, In{x, from}, [](const In *in, X *out) {
        for (int i = 0; i < 32; i++) out[i] = in[in[i].from & 31].x;
    });
}
static inline unsigned gpu_ballot(int id, bool x) {
    return gpu_collective<unsigned>(id, x, [](const bool *in, unsigned *out) {
        unsigned all = 0;
        for (int i = 0; i < 32; i++) all |= (unsigned)in[i] << i;
        for (int i = 0; i < 32; i++) out[i] = all;
    });
}
#define __shfl_sync(mask, x, from) gpu_shuffle(__LINE__, x, from)
#define __shfl_xor_sync(mask, x, y) gpu_shuffle(__LINE__, x, gpu.lane->lane ^ (y))
#define __shfl_up_sync(mask, x, y) gpu_shuffle(__LINE__, x, gpu.lane->lane - (gpu.lane->lane >= (y) ? (y) : 0))
#define __ballot_sync(mask, x) gpu_ballot(__LINE__, x)
#define __any_sync(mask, x) (gpu_ballot(__LINE__, x) != 0)
#define __syncwarp() ((void)gpu_ballot(__LINE__, true))
#define __syncthreads() gpu_meet_in_block(0, (int)blockDim.x)

// The Makefile rewrites `__shared__ T x[n];` to gpu_shared and `extern __shared__ unsigned char smem[];` to
// gpu_dynamic_shared.
template <class T, int NUMBER> static inline T &gpu_shared(void) {
    constexpr size_t bytes = (sizeof(T) + 15) / 16 * 16;
    static const size_t at = (gpu.static_bytes += bytes) - bytes;
    if (at + bytes > GPU_STATIC_BYTES) gpu_fault("too much static shared memory: raise GPU_STATIC_BYTES");
    return *(T *)(gpu_this_block()->shared + at);
}
static inline unsigned char *gpu_dynamic_shared(void) { return gpu_this_block()->shared + GPU_STATIC_BYTES; }

static inline int max(int a, int b) { return a > b ? a : b; }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int __ffs(unsigned x) { return __builtin_ffs((int)x); }
static inline float __fdividef(float x, float y) { return x / y; }
#define __log2f log2f
#define __expf expf
static inline void sincospif(float x, float *s, float *c) { *s = (float)sin(M_PI * x), *c = (float)cos(M_PI * x); }
template <class T> static inline T __ldcg(const T *p) { return *p; }
template <class T> static inline T __ldcs(const T *p) { return *p; }
template <class T> static inline void __stcs(T *p, T x) { *p = x; }
static inline float __uint_as_float(uint32_t x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}
static inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t order) {
    uint64_t both = (uint64_t)y << 32 | x;
    uint32_t z = 0;
    for (int i = 0; i < 4; i++) z |= (uint32_t)(both >> 8 * (order >> 4 * i & 7) & 255) << 8 * i;
    return z;
}

// The CUDA runtime. Global memory is host memory, and a launch runs to its end.
static inline cudaError_t gpu_attribute(int *value, cudaDeviceAttr attribute, int) {
    if (attribute == cudaDevAttrComputeCapabilityMajor) *value = EMULATED_CC;
    else if (attribute == cudaDevAttrMultiProcessorCount) *value = gpu.multiprocessors;
    else if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) *value = gpu.shared_bytes;
    else gpu_fault("this device attribute is not emulated");
    return cudaSuccess;
}
template <class... P, class... A>
static inline cudaError_t gpu_launch(const cudaLaunchConfig_t *config, void (*kernel)(P...), A... args) {
    int cluster = 1;
    for (unsigned i = 0; i < config->numAttrs; i++) {
        const cudaLaunchAttribute &attribute = config->attrs[i];
        if (attribute.id == cudaLaunchAttributeClusterDimension) cluster = (int)attribute.val.clusterDim.x;
    }
    gridDim = config->gridDim, blockDim = config->blockDim;
    gpu.kernel = [=] { kernel(args...); };
    gpu_run(cluster, config->dynamicSmemBytes);
    return cudaSuccess;
}
template <class X> static inline cudaError_t gpu_malloc(X **p, size_t bytes) {
    *p = (X *)aligned_alloc(256, (bytes + 255) / 256 * 256);
    return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
template <class K> static inline cudaError_t gpu_clusters(int *n, K, const cudaLaunchConfig_t *config) {
    *n = gpu.multiprocessors / (int)config->attrs[0].val.clusterDim.x;
    return cudaSuccess;
}
#define cudaGetErrorString(error) "?"
#define cudaGetErrorName(error) "?"
#define cudaGetDevice(p) (*(p) = 0, cudaSuccess)
#define cudaDeviceGetAttribute gpu_attribute
#define cudaFuncSetAttribute(...) cudaSuccess
#define cudaOccupancyMaxActiveClusters gpu_clusters
#define cudaLaunchKernelEx gpu_launch
#define cudaDeviceSynchronize() cudaSuccess
#define cudaMalloc gpu_malloc
#define cudaFree(p) (free(p), cudaSuccess)
#define cudaMemset(p, x, bytes) (memset(p, x, bytes), cudaSuccess)
#define cudaMemcpy(to, from, bytes, kind) (memcpy(to, from, bytes), cudaSuccess)

// ---------------------------------------------------------------------------------------------------------------------
// PTX: the functions of llmc/ptx.cuh, which its include guard leaves out
#define LLMC_PTX_CUH
#define PTX_BULK_COPIES (EMULATED_CC >= 9)
enum { PTX_ARRIVING_LANES = 1 };

// An address in shared memory is an offset, with the rank of a block of the cluster, or GPU_OWN, in the high byte.
enum { GPU_OWN = 0xff };
static inline uint32_t smem_address(const void *p) {
    ptrdiff_t at = (const unsigned char *)p - gpu_this_block()->shared;
    if (at < 0 || at > (ptrdiff_t)gpu_this_block()->bytes) gpu_fault("smem_address of something outside shared memory");
    return (uint32_t)at | (uint32_t)GPU_OWN << 24;
}
static inline unsigned char *gpu_at(GpuBlock *from, uint32_t address, size_t bytes, size_t alignment) {
    uint32_t rank = address >> 24, at = address & 0xffffff;
    GpuBlock *b = rank == GPU_OWN ? from : rank < from->cluster->blocks.size() ? from->cluster->blocks[rank] : NULL;
    if (!b) gpu_fault("an address in a block that is not in the cluster");
    if (b->running == 0) gpu_fault("something arrives at a block that has ended");
    if (at + bytes > b->bytes || at % alignment) gpu_fault("an address in shared memory is out of range or misaligned");
    return b->shared + at;
}
static inline GpuBarrier *gpu_barrier(GpuBlock *from, uint32_t address) {
    return (GpuBarrier *)gpu_at(from, address, sizeof(GpuBarrier), sizeof(GpuBarrier));
}

static inline uint16_t gpu_half(uint32_t x, int high) { return (uint16_t)(x >> 16 * high); }
static inline uint32_t gpu_pack(__nv_bfloat16_raw low, __nv_bfloat16_raw high) {
    return low.x | (uint32_t)high.x << 16;
}
static inline uint32_t gpu_pack(__half_raw low, __half_raw high) { return low.x | (uint32_t)high.x << 16; }
static inline float gpu_from_bf16(uint16_t x) { return __uint_as_float((uint32_t)x << 16); }
static inline float gpu_from_f16(uint16_t x) {
    __half_raw raw;
    raw.x = x;
    return __half2float(__half(raw));
}

static inline float ptx_exp2(float x) { return exp2f(x); }
static inline uint32_t ptx_pack_bf16(float low, float high) {
    return gpu_pack(__nv_bfloat16_raw(__float2bfloat16_rn(low)), __nv_bfloat16_raw(__float2bfloat16_rn(high)));
}
static inline uint32_t ptx_pack_f16(float low, float high) {
    return gpu_pack(__half_raw(__float2half_rn(low)), __half_raw(__float2half_rn(high)));
}
static inline uint32_t ptx_mul_bf16(uint32_t x, uint32_t y) {
    auto product = [=](int high) { return gpu_from_bf16(gpu_half(x, high)) * gpu_from_bf16(gpu_half(y, high)); };
    return ptx_pack_bf16(product(0), product(1));
}
static inline uint32_t ptx_mul_f16(uint32_t x, uint32_t y) {
    auto product = [=](int high) { return gpu_from_f16(gpu_half(x, high)) * gpu_from_f16(gpu_half(y, high)); };
    return ptx_pack_f16(product(0), product(1));
}
static inline void ptx_e4m3_to_f16(uint32_t &low, uint32_t &high, uint32_t x) {
    __half_raw y[4];
    for (int i = 0; i < 4; i++) y[i] = __nv_cvt_fp8_to_halfraw((uint8_t)(x >> 8 * i), __NV_E4M3);
    low = gpu_pack(y[0], y[1]), high = gpu_pack(y[2], y[3]);
}

// Ids of the collectives that are instructions; those of CUDA C++ are the line of the call.
enum { GPU_ID_MMA_F16 = -5, GPU_ID_MMA_BF16, GPU_ID_TRANSPOSE, GPU_ID_LDMATRIX_TRANS, GPU_ID_LDMATRIX };

struct GpuFour { uint32_t x[4]; };
// An 8 x 8 matrix of 16-bit elements in a warp's registers: lane l has elements 2 (l % 4) and the next of row l / 4, or
// of column l / 4 if transposed.
static inline uint32_t gpu_fragment(const uint16_t (&m)[8][8], int l, bool transposed) {
    int i = l / 4, j = l % 4 * 2;
    return transposed ? m[j][i] | (uint32_t)m[j + 1][i] << 16 : m[i][j] | (uint32_t)m[i][j + 1] << 16;
}
static inline void gpu_ldmatrix(int id, uint32_t (&x)[4], uint32_t from) {
    const bool transposed = id == GPU_ID_LDMATRIX_TRANS;
    GpuBlock *b = gpu_this_block();
    GpuFour y = gpu_collective<GpuFour>(id, from, [=](const uint32_t *in, GpuFour *out) {
        for (int k = 0; k < 4; k++) {
            uint16_t m[8][8];
            for (int row = 0; row < 8; row++) memcpy(m[row], gpu_at(b, in[8 * k + row], 16, 16), 16);
            for (int l = 0; l < 32; l++) out[l].x[k] = gpu_fragment(m, l, transposed);
        }
    });
    memcpy(x, y.x, sizeof x);
}
static inline void ptx_ldmatrix(uint32_t (&x)[4], uint32_t from) { gpu_ldmatrix(GPU_ID_LDMATRIX, x, from); }
static inline void ptx_ldmatrix_trans(uint32_t (&x)[4], uint32_t from) { gpu_ldmatrix(GPU_ID_LDMATRIX_TRANS, x, from); }
static inline uint32_t ptx_transpose(uint32_t x) {
    return gpu_collective<uint32_t>(GPU_ID_TRANSPOSE, x, [](const uint32_t *in, uint32_t *out) {
        uint16_t m[8][8];
        for (int l = 0; l < 32; l++)
            for (int high = 0; high < 2; high++) m[l / 4][l % 4 * 2 + high] = gpu_half(in[l], high);
        for (int l = 0; l < 32; l++) out[l] = gpu_fragment(m, l, true);
    });
}
// c (16 x 8) += a (16 x 16) b (16 x 8)
template <class F>
static inline void gpu_mma(int id, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, F number) {
    struct In { float c[4]; uint32_t a[4], b[2]; } in;
    struct Out { float c[4]; };
    memcpy(in.c, c, sizeof c), memcpy(in.a, a, sizeof a), in.b[0] = b0, in.b[1] = b1;
    Out y = gpu_collective<Out>(id, in, [=](const In *all, Out *out) {
        float A[16][16], B[8][16];
        for (int l = 0; l < 32; l++)
            for (int k = 0; k < 4; k++)      // rows l / 4 and 8 more, columns 2 (l % 4) and 8 more; B is b transposed
                for (int high = 0; high < 2; high++) {
                    const int column = l % 4 * 2 + high;
                    A[l / 4 + k % 2 * 8][column + k / 2 * 8] = number(gpu_half(all[l].a[k], high));
                    if (k < 2) B[l / 4][column + k * 8] = number(gpu_half(all[l].b[k], high));
                }
        for (int l = 0; l < 32; l++)
            for (int e = 0; e < 4; e++) {
                float sum = 0;
                for (int k = 0; k < 16; k++) sum += A[l / 4 + e / 2 * 8][k] * B[l % 4 * 2 + e % 2][k];
                out[l].c[e] = all[l].c[e] + sum;
            }
    });
    memcpy(c, y.c, sizeof c);
}
static inline void ptx_mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    gpu_mma(GPU_ID_MMA_BF16, c, a, b0, b1, gpu_from_bf16);
}
static inline void ptx_mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    gpu_mma(GPU_ID_MMA_F16, c, a, b0, b1, gpu_from_f16);
}

static inline void ptx_named_barrier(int barrier, int threads) { gpu_meet_in_block(barrier, threads); }
static inline unsigned ptx_count(unsigned *p) {
    gpu.progress++;
    return (*p)++;
}

// Counts arrivals and bytes that reach a barrier.
static inline void gpu_barrier_step(GpuBarrier *barrier, int arrivals, int bytes) {
    if (arrivals > barrier->pending || bytes > barrier->bytes)
        gpu_fault("a barrier gets more arrivals or bytes than it expects");
    barrier->pending -= arrivals, barrier->bytes = barrier->bytes - bytes, gpu.progress++;
    if (barrier->pending == 0 && barrier->bytes == 0) barrier->pending = barrier->arrivals, barrier->phase ^= 1;
}
static inline void ptx_barrier_init(uint32_t barrier, int arrivals) {
    GpuBarrier *bar = gpu_barrier(gpu_this_block(), barrier);
    bar->pending = bar->arrivals = (int16_t)arrivals, bar->bytes = 0, bar->phase = 0;
}
static inline void ptx_barrier_init_fence() {}
static inline void ptx_barrier_arrive(uint32_t barrier) {
    gpu_barrier_step(gpu_barrier(gpu_this_block(), barrier), 1, 0);
    gpu_pause_sometimes();
}
static inline void ptx_barrier_arrive_expect(uint32_t barrier, int bytes) {
    if (!PTX_BULK_COPIES) return;
    GpuBarrier *bar = gpu_barrier(gpu_this_block(), barrier);
    bar->bytes = bar->bytes + bytes;
    gpu_barrier_step(bar, 1, 0);
    gpu_pause_sometimes();
}
static inline bool ptx_barrier_done(uint32_t barrier, uint32_t parity) {
    return gpu_barrier(gpu_this_block(), barrier)->phase != parity;
}
static inline void ptx_barrier_wait(uint32_t barrier, uint32_t parity) {
    GpuBarrier *bar = gpu_barrier(gpu_this_block(), barrier);
    while (bar->phase == parity) gpu_wait(NULL, 0, bar, parity, "waits at an mbarrier");
}

static inline void ptx_bulk_load(uint32_t to, const void *from, int bytes, uint32_t barrier) {
    GpuBlock *b = gpu_this_block();
    if ((uintptr_t)from % 16 || bytes % 16) gpu_fault("source and size of a copy must be multiples of 16 bytes");
    memset(gpu_at(b, to, bytes, 16), 0xff, bytes);
    gpu.under_way.push_back([=] {
        memcpy(gpu_at(b, to, bytes, 16), from, bytes);
        gpu_barrier_step(gpu_barrier(b, barrier), 0, bytes);
    });
}
static inline void ptx_fetch_rows(uint32_t to, const unsigned char *from, int bytes, int rows, int pitch,
                                  uint32_t barrier) {
    GpuBlock *b = gpu_this_block();
    const int lane = gpu.lane->lane;
    if (PTX_BULK_COPIES) {
        if (lane > 0) return;
        ptx_barrier_arrive_expect(barrier, rows * bytes);
        for (int i = 0; i < rows; i++) ptx_bulk_load(to + i * bytes, from + (int64_t)i * pitch, bytes, barrier);
        return;
    }
    auto each = [=](auto f) {       // of this lane's 16-byte pieces
        for (int i = 0; i < rows; i++)
            for (int k = lane * 16; k < bytes; k += 32 * 16)
                f(gpu_at(b, to + i * bytes + k, 16, 16), from + (int64_t)i * pitch + k);
    };
    each([](unsigned char *to, const unsigned char *) { memset(to, 0xff, 16); });
    gpu.under_way.push_back([=] {
        each([](unsigned char *to, const unsigned char *from) { memcpy(to, from, 16); });
        gpu_barrier_step(gpu_barrier(b, barrier), 1, 0);
    });
}
static inline void ptx_copies_after() {}
static inline void ptx_let_next_begin() {}
static inline void ptx_wait_for_previous() {}

static inline int ptx_cluster_rank() { return gpu_this_block()->rank; }
static inline void ptx_cluster_arrive() {
    GpuCluster *cluster = gpu_this_block()->cluster;
    gpu.lane->cluster_was = gpu_arrive(&cluster->meeting, (int)(cluster->blocks.size() * blockDim.x));
}
static inline void ptx_cluster_wait() {
    gpu_wait_for(&gpu_this_block()->cluster->meeting, gpu.lane->cluster_was, "waits for its cluster");
    __syncthreads();
}
static inline uint32_t ptx_cluster_address(uint32_t address, int rank) {
    return (address & 0xffffff) | (uint32_t)rank << 24;
}
static inline void ptx_cluster_send(uint32_t to, float4 x, uint32_t barrier) {
    GpuBlock *b = gpu_this_block();
    gpu.under_way.push_back([=] {
        memcpy(gpu_at(b, to, 16, 16), &x, 16);
        gpu_barrier_step(gpu_barrier(b, barrier), 0, 16);
    });
}
static inline void ptx_cluster_barrier_arrive(uint32_t barrier) {
    GpuBlock *b = gpu_this_block();
    gpu.under_way.push_back([=] { gpu_barrier_step(gpu_barrier(b, barrier), 1, 0); });
}
static inline void ptx_cluster_barrier_wait(uint32_t barrier, uint32_t parity) { ptx_barrier_wait(barrier, parity); }

#endif
