// PTX instructions that CUDA C++ has no function for, each wrapped once. Shared memory addresses are 32-bit
// (smem_address).
// Manual: https://docs.nvidia.com/cuda/parallel-thread-execution/ ; the comment at each wrapper names its section.
#ifndef LLMC_PTX_CUH
#define LLMC_PTX_CUH

#include <stdint.h>

// 1 in device code for sm_90a, which has wgmma; plain sm_90 has not.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PTX_SM90A 1
#else
#define PTX_SM90A 0
#endif

__device__ inline uint32_t smem_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic

// 2^x, with an error of at most two units in the last place; 2^-inf = 0.  #floating-point-instructions-ex2
__device__ inline float ptx_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two floats rounded to bf16 and packed in one register, `low` in the low half.
// #data-movement-and-conversion-instructions-cvt
__device__ inline uint32_t ptx_pack_bf16(float low, float high) {
    uint32_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

// The same for fp16.
__device__ inline uint32_t ptx_pack_f16(float low, float high) {
    uint32_t y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

// Products of two packed pairs, each rounded once. bf16 as fma(x, y, -0), because sm_80 has no mul.bf16x2.
// #half-precision-floating-point-instructions-mul
__device__ inline uint32_t ptx_mul_bf16(uint32_t x, uint32_t y) {
    uint32_t z;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(z) : "r"(x), "r"(y), "r"(0x80008000));
    return z;
}
__device__ inline uint32_t ptx_mul_f16(uint32_t x, uint32_t y) {
    uint32_t z;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}

// Converts four e4m3 numbers to fp16, exactly: `low` gets the two in the low half of x, `high` the other two.
// #data-movement-and-conversion-instructions-cvt
__device__ inline void ptx_e4m3_to_f16(uint32_t &low, uint32_t &high, uint32_t x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    asm("{\n"
        ".reg .b16 a, b;\n"
        "mov.b32 {a, b}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 %0, a;\n"
        "cvt.rn.f16x2.e4m3x2 %1, b;\n"
        "}" : "=r"(low), "=r"(high) : "r"(x));
#else
    // Shifted to their places in fp16, exponent and mantissa read as 2^-8 times the number; 0x7f is NaN. Each half of
    // pair[] has one number in its high byte.
    uint32_t pair[2] = {__byte_perm(x, 0, 0x1404), __byte_perm(x, 0, 0x3424)}, y[2];
    for (int i = 0; i < 2; i++) {
        y[i] = (pair[i] & 0x80008000) | (pair[i] & 0x7f007f00) >> 1;
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y[i]) : "r"(y[i]), "r"(0x5c005c00));
        if ((pair[i] & 0x7f00) == 0x7f00) y[i] |= 0x7fff;
        if ((pair[i] & 0x7f000000) == 0x7f000000) y[i] |= 0x7fff0000;
    }
    low = y[0], high = y[1];
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// sm_80: asynchronous 16-byte copies and warp matrix products

// Copies 16 bytes from global to shared memory. If not valid, writes 16 zero bytes and does not read the source.
// #data-movement-and-conversion-instructions-cp-async
__device__ inline void ptx_cp_async_16(uint32_t to, const void *from, bool valid = true) {
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(bytes) : "memory");
}

// #data-movement-and-conversion-instructions-cp-async-wait-all
__device__ inline void ptx_cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Brings the cache line with *p into L2.  #data-movement-and-conversion-instructions-prefetch-prefetchu
__device__ inline void ptx_prefetch(const void *p) {
    asm volatile("prefetch.global.L2 [%0];" :: "l"(__cvta_generic_to_global(p)));
}

// Closes a group of copies; waits until at most the latest `pending` groups are unfinished.
// #data-movement-and-conversion-instructions-cp-async-commit-group
__device__ inline void ptx_cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
__device__ inline void ptx_cp_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(pending) : "memory"); }

// Loads four 8x8 matrices of 16-bit elements. Lane l passes the address of row l % 8 of matrix l / 8. In x[i] it
// receives elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix i (of column l / 4 with _trans).
// #warp-level-matrix-load-instruction-ldmatrix
__device__ inline void ptx_ldmatrix(uint32_t (&x)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
}
__device__ inline void ptx_ldmatrix_trans(uint32_t (&x)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
}

// Transposes an 8x8 matrix in a warp's registers, in ldmatrix's layout.  #warp-level-matrix-instructions-movmatrix
__device__ inline uint32_t ptx_transpose(uint32_t x) {
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// c (16 x 8, fp32) += a (16 x 16, bf16) b (16 x 8, bf16).  #warp-level-matrix-fragment-mma-16816-float
__device__ inline void ptx_mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same for fp16 a and b.
__device__ inline void ptx_mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// __syncthreads() for `threads` threads (a multiple of 32) of the block. Barrier 0 is the one __syncthreads() uses.
// #parallel-synchronization-and-communication-instructions-bar
__device__ inline void ptx_named_barrier(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" :: "r"(barrier), "r"(threads) : "memory");
}

// Adds 1 to *p and returns the old value. Acquire and release: a thread block that sees another's increment also sees
// what that block wrote before it (with a block barrier between the writes and the increment).
// #parallel-synchronization-and-communication-instructions-atom
__device__ inline unsigned ptx_count(unsigned *p) {
    unsigned x;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
                 : "=r"(x) : "l"(__cvta_generic_to_global(p)) : "memory");
    return x;
}

// ---------------------------------------------------------------------------------------------------------------------
// Barriers in shared memory (mbarrier). They count arrivals of threads and, from sm_90, bytes of bulk copies.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define PTX_BULK_COPIES 1
#else
#define PTX_BULK_COPIES 0
#endif

// #parallel-synchronization-and-communication-instructions-mbarrier-init
__device__ inline void ptx_barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialized barriers visible to bulk copies. A __syncthreads() must follow for the other threads.
// #parallel-synchronization-and-communication-instructions-membar-fence
__device__ inline void ptx_barrier_init_fence() {
#if PTX_BULK_COPIES
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// How many lanes of a warp arrive when the warp is done with something: one, after a __syncwarp(). compute-sanitizer's
// racecheck does not understand that, so all lanes arrive in a build for it (-DRACECHECK).
#ifdef RACECHECK
enum { PTX_ARRIVING_LANES = 32 };
#else
enum { PTX_ARRIVING_LANES = 1 };
#endif

// #parallel-synchronization-and-communication-instructions-mbarrier-arrive
__device__ inline void ptx_barrier_arrive(uint32_t barrier) {
    asm volatile("{ .reg .b64 phase; mbarrier.arrive.shared.b64 phase, [%0]; }" :: "r"(barrier) : "memory");
}

// Arrives, and makes the phase wait for `bytes` bytes of bulk copies as well.
__device__ inline void ptx_barrier_arrive_expect(uint32_t barrier, int bytes) {
#if PTX_BULK_COPIES
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
#endif
}

// Is the phase with this parity complete? Phases count 0, 1, 2, ...; a new barrier is in phase 0.
// #parallel-synchronization-and-communication-instructions-mbarrier-test-wait-try-wait
__device__ inline bool ptx_barrier_done(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "mbarrier.test_wait.parity.shared.b64 done, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, done;\n"
                 "}" : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    return done;
}

// Waits until it is. The loop is in PTX: with a C++ loop around ptx_barrier_done the compiler arranges the waiting
// kernels differently.
__device__ inline void ptx_barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
#if PTX_BULK_COPIES
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
#else
                 "mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
#endif
                 "@!done bra again;\n"
                 "}" :: "r"(barrier), "r"(parity) : "memory");
}

// Loads one box of a 4-dimensional tensor into shared memory by TMA, with zeros outside the tensor. (c0, c1, c2, c3) is
// its first element, c0 the contiguous coordinate.
// #data-movement-and-conversion-instructions-cp-async-bulk-tensor
__device__ inline void ptx_tensor_load(uint32_t to, const void *tensor_map, int c0, int c1, int c2, int c3,
                                       uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4, %5}], [%6];"
                 :: "r"(to), "l"(tensor_map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(barrier) : "memory");
}

// Copies contiguous bytes into shared memory. Addresses and size are multiples of 16.
// #data-movement-and-conversion-instructions-cp-async-bulk
__device__ inline void ptx_bulk_load(uint32_t to, const void *from, int bytes, uint32_t barrier) {
#if PTX_BULK_COPIES
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
#endif
}

// Orders this thread's earlier accesses to shared memory before later bulk copies into it, and before later warpgroup
// products that read it. If other threads issue these, a barrier must come between.
// #parallel-synchronization-and-communication-instructions-membar-fence
__device__ inline void ptx_copies_after() {
#if PTX_BULK_COPIES
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// A warp copies `rows` rows of `bytes` bytes, `pitch` bytes apart, into shared memory, where they are dense. The
// barrier's phase completes when they have arrived. The barrier counts one arrival with bulk copies, 32 without.
// Addresses and sizes are multiples of 16.
// #data-movement-and-conversion-instructions-cp-async-mbarrier-arrive
__device__ inline void ptx_fetch_rows(uint32_t to, const unsigned char *from, int bytes, int rows, int pitch,
                                      uint32_t barrier) {
#if PTX_BULK_COPIES
    if (threadIdx.x % 32 == 0) {
        ptx_barrier_arrive_expect(barrier, rows * bytes);
        #pragma unroll 1
        for (int i = 0; i < rows; i++) ptx_bulk_load(to + i * bytes, from + (int64_t)i * pitch, bytes, barrier);
    }
#else
    for (int i = 0; i < rows; i++)
        for (int k = threadIdx.x % 32 * 16; k < bytes; k += 32 * 16)
            ptx_cp_async_16(to + i * bytes + k, from + (int64_t)i * pitch + k);
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" :: "r"(barrier) : "memory");
#endif
}

// Programmatic dependent launch (Launch::early in cuda_utils.cuh). The next kernel may begin once every block of this
// one has called ptx_let_next_begin() or ended. The previous kernel's writes are visible after ptx_wait_for_previous().
// #parallel-synchronization-and-communication-instructions-griddepcontrol
__device__ inline void ptx_let_next_begin() {
#if PTX_BULK_COPIES
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void ptx_wait_for_previous() {
#if PTX_BULK_COPIES
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// sm_90: clusters, thread blocks that run together and can access each other's shared memory. Before sm_90 a cluster is
// one block.

// The rank of this block in its cluster.  #special-registers-cluster-ctarank
__device__ inline int ptx_cluster_rank() {
    int rank = 0;
#if PTX_BULK_COPIES
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}

// A barrier of all threads of the cluster, in two steps. Barriers initialized before the first (ptx_barrier_init_fence)
// are visible to all threads after the second; other writes need not be. Compilers implement the second with a
// __syncthreads(), so no warp may have skipped an earlier __syncthreads().
// #parallel-synchronization-and-communication-instructions-barrier-cluster
__device__ inline void ptx_cluster_arrive() {
#if PTX_BULK_COPIES
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ inline void ptx_cluster_wait() {
#if PTX_BULK_COPIES
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The address, in block `rank` of the cluster, that corresponds to `address` in this block's shared memory.
// #data-movement-and-conversion-instructions-mapa
__device__ inline uint32_t ptx_cluster_address(uint32_t address, int rank) {
#if PTX_BULK_COPIES
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
#endif
    return address;
}

// Writes 16 bytes to another block's shared memory, asynchronously. That block's barrier counts them as copied bytes.
// #data-movement-and-conversion-instructions-st-async
__device__ inline void ptx_cluster_send(uint32_t to, float4 x, uint32_t barrier) {
#if PTX_BULK_COPIES
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
                 :: "r"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier) : "memory");
#endif
}

// ptx_barrier_arrive at another block's barrier, and the wait for such arrivals. What a thread did before it arrived is
// visible to the threads that waited.
__device__ inline void ptx_cluster_barrier_arrive(uint32_t barrier) {
#if PTX_BULK_COPIES
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" :: "r"(barrier) : "memory");
#endif
}
__device__ inline void ptx_cluster_barrier_wait(uint32_t barrier, uint32_t parity) {
#if PTX_BULK_COPIES
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}" :: "r"(barrier), "r"(parity) : "memory");
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// sm_90a: matrix products by a warpgroup (4 warps), asynchronous
#if PTX_SM90A

// Orders earlier accesses to registers before the products that follow.
// #asynchronous-warpgroup-level-matrix-instructions-wgmma-fence
__device__ inline void ptx_wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a group of products.  #asynchronous-warpgroup-level-matrix-instructions-wgmma-commit-group
__device__ inline void ptx_wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the latest `pending` groups are unfinished.
// #asynchronous-warpgroup-level-matrix-instructions-wgmma-wait-group
template <int pending>
__device__ inline void ptx_wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(pending) : "memory");
}

// The threads of a warpgroup shrink to `registers` registers each, or wait for free ones and grow to that number.
// #miscellaneous-instructions-setmaxnreg
template <int registers>
__device__ inline void ptx_give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(registers)); }
template <int registers>
__device__ inline void ptx_take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(registers)); }

// The descriptor of a tile of 128-byte rows in the 128-byte swizzle, or of 64-byte rows in the 64-byte swizzle. Groups
// of 8 rows are contiguous and aligned to their size. Bits 0-13 address / 16; 16-29 offset from one tile to the next /
// 16, where an operand spans several along its rows (ptx_wgmma_registers); 32-45 offset from one group of 8 rows to the
// next / 16; 62-63 the swizzle, 1 = 128 bytes, 2 = 64.
// #asynchronous-warpgroup-level-matrix-shared-memory-layout-matrix-descriptor
__device__ inline uint64_t ptx_wgmma_descriptor(uint32_t address, int row_bytes, int next_tile = 16) {
    return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)(next_tile >> 4) << 16 |
           (uint64_t)(8 * row_bytes >> 4) << 32 | (uint64_t)(row_bytes == 128 ? 1 : 2) << 62;
}

#define PTX_ACC_4(c, i) "+f"((c)[i][0]), "+f"((c)[i][1]), "+f"((c)[i][2]), "+f"((c)[i][3])
#define PTX_ACC_16(c, i) PTX_ACC_4(c, i), PTX_ACC_4(c, i + 1), PTX_ACC_4(c, i + 2), PTX_ACC_4(c, i + 3)
#define PTX_32_REGISTERS \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PTX_48_REGISTERS PTX_32_REGISTERS \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"

// c (64 x 64) = a (64 x 16) b^T (64 x 16) + (add ? c : 0); rows of a and b run along the summation index.
// a and b are descriptors. After `add`: signs 1 of a and b, neither transposed.
// #asynchronous-warpgroup-level-matrix-instructions-wgmma-mma
__device__ inline void ptx_wgmma_smem(float (&c)[8][4], uint64_t a, uint64_t b, int add) {
    asm volatile("{\n"
                 ".reg .pred add;\n"
                 "setp.ne.b32 add, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" PTX_32_REGISTERS "}, %32, %33, add, 1, 1, 0, "
                 "0;\n"
                 "}" : PTX_ACC_16(c, 0), PTX_ACC_16(c, 4) : "l"(a), "l"(b), "r"(add));
}

// c (64 x columns) += a (64 x 16, in registers) b (16 x columns); rows of b run along the columns of c.
// After b: add, signs 1 of a and b, b transposed.
template <int columns>
__device__ inline void ptx_wgmma_registers(float (*c)[4], const uint32_t (&a)[4], uint64_t b) {
    static_assert(columns == 64 || columns == 96, "the widths that the kernels use");
    if constexpr (columns == 64)
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" PTX_32_REGISTERS "}, "
                     "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                     : PTX_ACC_16(c, 0), PTX_ACC_16(c, 4) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    else
        asm volatile("wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {" PTX_48_REGISTERS "}, "
                     "{%48, %49, %50, %51}, %52, 1, 1, 1, 1;"
                     : PTX_ACC_16(c, 0), PTX_ACC_16(c, 4), PTX_ACC_16(c, 8)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#endif
#endif
