// Causal attention, forward and backward, on the tensor cores, without storing a T x T matrix:
//
//     s_ij = q_i k_j / sqrt(HSK)    lse_i = log sum_{j <= i} exp(s_ij)
//     p_ij = exp(s_ij - lse_i)      out_i = sum_{j <= i} p_ij v_j
//
// and backward, given dout, with delta_i = dout_i out_i = sum_j p_ij (dout_i v_j):
//
//     dv_j = sum_i p_ij dout_i                 ds_ij = p_ij (dout_i v_j - delta_i)
//     dq_i = sum_j ds_ij k_j / sqrt(HSK)       dk_j = sum_i ds_ij q_i / sqrt(HSK)
//
// With a gate g, the output is z = sigmoid(g) out, element by element. Given dz, with s = sigmoid(g):
//
//     dout = dz s          dg = dz z (1 - s)          delta_i = dout_i out_i = dz_i z_i
//
// so that out is not needed. dout replaces dz, and dg may replace g.
//
// Shapes: B sequences of T tokens (any T), NH query heads, NKV key/value heads (NKV divides NH; query head i reads
// key/value head i / (NH / NKV)). Heads of q and k have size HSK, those of v and out HSV: 64 and 64, 96 and 64, or 128
// and 128. Where HSK > HSV (mla), the last HSK - HSV numbers of a token's key heads are the same, and are stored once.
// All tensors are bf16 and token-major, (B, T, heads, head size). Softmax, accumulators and lse are fp32.
// There are no atomics: the same inputs give the same bits.
//
// Tokens are cut into blocks of 64. A group of 4 warps (a warpgroup) owns one block of 64 rows, keeps its accumulators
// in registers, and loops over the blocks of the other side, which its thread block streams through a ring in shared
// memory:
//
//     forward   owns queries, loops over keys    s = q k^T;    out += p v  (online softmax)
//     dq        owns queries, loops over keys    s = q k^T;    dp = dout v^T;    dq += ds k;  delta and the gate too
//     dk, dv    owns keys, loops over queries    s^T = k q^T;  dp^T = v dout^T;  dv += p^T dout;  dk += ds^T q
//
// (s is `scores` in the code.) p and ds thus pass from one product to the next in registers. The two backward kernels
// each compute s and dp, 7 products instead of 5. In return no sum crosses thread blocks: no fp32 copy of dq, no
// atomics, no ordering.
//
// Sources: Dao, FlashAttention-2 (arXiv 2307.08691); Shah et al., FlashAttention-3 (arXiv 2407.08608).
//
// The kernels are written over two sets of primitives: wgmma and TMA for sm_90a, mma.sync and cp.async for everything
// else from sm_80. dev/cuda/attention.cu checks and times both; dev/results/attention.md has the numbers.
#ifndef LLMC_ATTENTION_CUH
#define LLMC_ATTENTION_CUH

#include <cuda.h>
#include <math.h>

#include "cuda_utils.cuh"
#include "ptx.cuh"

// Which primitives: the best set for the target, or mma.sync on every target (for the lab in dev/cuda).
enum AttentionBackend { ATTENTION_BEST, ATTENTION_MMA_SYNC };

typedef struct {
    int B, T, NH, NKV;
    int HSK, HSV;                           // sizes of query/key heads and of value heads
    float scale;                            // of the softmax, 1 / sqrt(HSK)
    int64_t q_stride, k_stride, v_stride;   // elements from one token to the next: of q and dq, of k and dk, of v and
                                            // dv; out and dout are dense, NH * HSV
    int64_t kv_head_stride;                 // from one head to the next: of k, dk, v and dv
    int64_t gate_stride;                    // of the gate and its gradient, which are often columns of wider rows
} AttentionShape;

// What attention reads of a layer, or its gradient.
template <class X>
struct AttentionHeads {
    X *q;               // (B, T, NH, HSK)
    X *k, *v;           // (B, T, NKV, HSV), both
    X *shared = NULL;   // (B, T, HSK - HSV) the rest of every key head, or (B, T, NKV, HSK - HSV) its gradients, one
                        // for each head; dense. NULL where HSK = HSV
};

// The shape of dense tensors.
LLMC_FN AttentionShape attention_dense_shape(int64_t B, int64_t T, int64_t NH, int64_t NKV, int64_t HSK, int64_t HSV) {
    AttentionShape s;
    s.B = (int)B, s.T = (int)T, s.NH = (int)NH, s.NKV = (int)NKV;
    s.HSK = (int)HSK, s.HSV = (int)HSV;
    s.scale = (float)(1 / sqrt((double)HSK));
    s.q_stride = NH * HSK, s.k_stride = s.v_stride = NKV * HSV, s.kv_head_stride = HSV, s.gate_stride = NH * HSV;
    return s;
}

// Whether the kernels here are made for these head sizes. Others need attention_plain.cuh.
LLMC_FN bool attention_is_fast(const AttentionShape &s) {
    return s.HSK == 128 ? s.HSV == 128 : (s.HSK == 64 || s.HSK == 96) && s.HSV == 64;
}

// ---------------------------------------------------------------------------------------------------------------------
// Tiles in shared memory. A block, 64 rows of HS elements, is cut into tiles of 64 columns (rows of 128 bytes), or of
// 32 (rows of 64 bytes) if 64 does not divide HS. One tile follows the other. The 16-byte chunks of a row are permuted
// so that reading one chunk column touches all banks: chunk c of row r is at position c ^ (r % 8), or in rows of 64
// bytes c ^ (r / 2 % 4). These are the 128-byte and the 64-byte swizzle of wgmma and TMA.

constexpr int ROWS = 64;                                    // tokens in a block
__host__ __device__ constexpr int block_bytes(int HS) { return ROWS * HS * 2; }
__host__ __device__ constexpr int tile_columns(int HS) { return HS % 64 == 0 ? 64 : 32; }
__host__ __device__ constexpr int tile_bytes(int HS) { return ROWS * tile_columns(HS) * 2; }
constexpr int STATS_BYTES = 2 * ROWS * sizeof(float);       // of 64 queries: lse * log2(e), then delta

// Groups per thread block; they share the ring. For mma.sync also thread blocks per SM; for wgmma that is 1. The
// numbers are as high as the register file allows, and with mma.sync and HSK = 96 the 99 KB of an RTX GPU.
struct AttentionTiling { int mma_sync_groups, mma_sync_blocks_per_sm, wgmma_groups; };
__host__ __device__ constexpr AttentionTiling forward_tiling(int HSK) {
    return HSK == 64 ? AttentionTiling{2, 2, 4} : HSK == 96 ? AttentionTiling{3, 1, 4} : AttentionTiling{3, 1, 3};
}
__host__ __device__ constexpr AttentionTiling dq_tiling(int HSK) {
    return HSK == 64 ? AttentionTiling{2, 2, 3} : HSK == 96 ? AttentionTiling{1, 2, 3} : AttentionTiling{2, 1, 2};
}
__host__ __device__ constexpr AttentionTiling dkdv_tiling(int HSK) {
    return HSK == 64 ? AttentionTiling{3, 1, 3} : HSK == 96 ? AttentionTiling{1, 1, 2} : AttentionTiling{2, 1, 2};
}

// Stages of the ring: one being read, one whose products may still be running, the others being filled.
__host__ __device__ constexpr int mma_sync_stages(int /*HSK*/) { return 3; }
__host__ __device__ constexpr int wgmma_stages(int HSK) { return HSK == 64 ? 8 : HSK == 96 ? 6 : 4; }

// Byte offset of a 16-byte chunk: in a tile, and in a block (chunk < HS / 8).
template <int HS>
__device__ inline uint32_t tile_offset(int row, int chunk) {
    constexpr int CHUNKS = tile_columns(HS) / 8;            // in a row of a tile
    return row * (CHUNKS * 16) + ((chunk ^ (row / (8 / CHUNKS) & (CHUNKS - 1))) << 4);
}
template <int HS>
__device__ inline uint32_t chunk_offset(int row, int chunk) {
    constexpr int CHUNKS = tile_columns(HS) / 8;
    return chunk / CHUNKS * tile_bytes(HS) + tile_offset<HS>(row, chunk % CHUNKS);
}

// A tensor to load blocks from.
struct AttentionInput {
    CUtensorMap map;        // for TMA: boxes of one tile, 64 tokens x 64 or 32 elements of one head
    const bf16 *data;       // (B, T, heads, columns)
    int64_t stride, head_stride;    // elements from one token, and from one head, to the next
    int T;
};

// k in the kernels' arguments: its heads' own columns, and those that all heads share.
struct AttentionKeys { AttentionInput own, shared; };

// A block of keys, HSK columns, of which the first HSV are the head's own.
template <class M, int HSK, int HSV, int THREADS>
__device__ inline void load_keys(uint32_t to, const AttentionKeys &keys, int b, int head, int t0, uint32_t barrier) {
    M::template load_block<HSK, THREADS, HSV>(to, keys.own, b, head, t0, barrier);
    if constexpr (HSK > HSV)
        M::template load_block<HSK, THREADS, HSK - HSV>(to + HSV / tile_columns(HSK) * tile_bytes(HSK), keys.shared, b,
                                                        0, t0, barrier);
}

// One thread's part of an fp32 matrix (64, columns), of which a warp has 16 rows. [i][0..1] are in row lane / 4 of
// these, [i][2..3] in row lane / 4 + 8, in columns 8 i + 2 (lane % 4) and the next. mma.sync and wgmma share this
// layout.
template <int columns> using Accumulator = float[columns / 8][4];

// A (64, 64) matrix rounded to bf16, as the left operand of a product: [step] holds columns 16 step ... 16 step + 15.
typedef uint32_t OperandTile[4][4];

__device__ inline void to_operand(OperandTile &left, const Accumulator<64> &acc) {
    for (int step = 0; step < 4; step++)
        for (int i = 0; i < 4; i++)
            left[step][i] = ptx_pack_bf16(acc[2 * step + i / 2][i % 2 * 2], acc[2 * step + i / 2][i % 2 * 2 + 1]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Primitives for sm_80 and later

struct MmaSync {
    static __host__ __device__ constexpr int groups(AttentionTiling tiling) { return tiling.mma_sync_groups; }
    static __host__ __device__ constexpr int threads(AttentionTiling tiling) { return 128 * tiling.mma_sync_groups; }
    static __host__ __device__ constexpr int blocks_per_sm(AttentionTiling tiling) {
        return tiling.mma_sync_blocks_per_sm;
    }
    static constexpr bool OUT_IN_SMEM = false;      // dq reads out from global memory: shared memory may be small
    static constexpr uint32_t NO_BARRIER = 0;       // cp.async is awaited by the thread that issued it
    static __device__ constexpr int stages(int HSK) { return mma_sync_stages(HSK); }

    // Loads tokens t0 ... t0 + 63 of one head, to columns 0 ... COLUMNS - 1 of a block that has HS; tokens outside the
    // sequence read as zeros. All threads call.
    template <int HS, int THREADS, int COLUMNS = HS>
    static __device__ void load_block(uint32_t to, const AttentionInput &input, int b, int head, int t0,
                                      uint32_t /*barrier*/) {
        for (int i = threadIdx.x; i < ROWS * COLUMNS / 8; i += THREADS) {
            int row = i / (COLUMNS / 8), chunk = i % (COLUMNS / 8);
            bool valid = t0 + row >= 0 && t0 + row < input.T;
            const bf16 *from = input.data + ((int64_t)b * input.T + (valid ? t0 + row : 0)) * input.stride +
                               head * input.head_stride + chunk * 8;
            ptx_cp_async_16(to + chunk_offset<HS>(row, chunk), from, valid);
        }
    }

    template <int THREADS>
    static __device__ void load_stats(uint32_t to, const float *from, uint32_t /*barrier*/) {
        for (int i = threadIdx.x; i < STATS_BYTES / 16; i += THREADS) ptx_cp_async_16(to + 16 * i, from + 4 * i);
    }

    // acc (64, 64) = left (64, HS) right^T (64, HS), both blocks in shared memory.
    template <int HS>
    static __device__ void product_nt(Accumulator<64> &acc, uint32_t left, uint32_t right) {
        constexpr int STEPS = tile_columns(HS) / 16;            // per tile
        int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        for (int i = 0; i < 8; i++) for (int e = 0; e < 4; e++) acc[i][e] = 0;
        for (int step = 0; step < HS / 16; step++) {
            uint32_t tile = step / STEPS * tile_bytes(HS), left4[4], right4[4];
            ptx_ldmatrix(left4, left + tile + tile_offset<HS>(16 * warp + lane % 16, step % STEPS * 2 + lane / 16));
            for (int i = 0; i < 8; i += 2) {
                ptx_ldmatrix(right4, right + tile + tile_offset<HS>(8 * i + lane / 16 * 8 + lane % 8,
                                                                    step % STEPS * 2 + lane / 8 % 2));
                ptx_mma(acc[i], left4, right4[0], right4[1]);
                ptx_mma(acc[i + 1], left4, right4[2], right4[3]);
            }
        }
    }

    // acc (64, HS) += left (64, 64) right (64, HS), left in registers, right a block in shared memory.
    template <int HS>
    static __device__ void product_nn(Accumulator<HS> &acc, const OperandTile &left, uint32_t right) {
        constexpr int CHUNKS = tile_columns(HS) / 8;            // per tile
        int lane = threadIdx.x % 32;
        for (int step = 0; step < 4; step++)
            for (int tile = 0; tile < HS / tile_columns(HS); tile++)
                for (int i = 0; i < CHUNKS; i += 2) {
                    uint32_t right4[4];
                    ptx_ldmatrix_trans(right4, right + tile * tile_bytes(HS) +
                                               tile_offset<HS>(16 * step + lane % 16, i + lane / 16));
                    ptx_mma(acc[tile * CHUNKS + i], left[step], right4[0], right4[1]);
                    ptx_mma(acc[tile * CHUNKS + i + 1], left[step], right4[2], right4[3]);
                }
    }

    // mma.sync is synchronous: the products are done when they return.
    static __device__ void commit() {}
    template <int pending> static __device__ void wait() {}
    template <int n> static __device__ void pin(float (&)[n][4]) {}

    // The loads into shared memory. For each work item: the groups' own blocks, by load_own(group, barrier), and the
    // ring's blocks, by load(n, stage, barrier). All threads call begin() for a work item and next() for each block.
    template <int STAGES, int GROUPS>
    struct Pipe {
        int n, total;
        __device__ Pipe(uint32_t /*barriers*/, int /*group*/) {}
        template <class LoadOwn, class Load>
        __device__ void produce(int /*own_bytes*/, LoadOwn, int /*bytes*/, int /*total*/, Load) {}

        template <class LoadOwn, class Load>
        __device__ void begin(LoadOwn load_own, int blocks, Load load) {
            n = 0, total = blocks;
            __syncthreads();            // all groups are done with the previous work item
            for (int g = 0; g < GROUPS; g++) load_own(g, NO_BARRIER);
            load(0, 0, NO_BARRIER);
        }
        // Waits for the next block and returns its stage. Blocks before the latest one are no longer read.
        template <class Load>
        __device__ int next(Load load) {
            int stage = n++ % STAGES;
            ptx_cp_async_wait_all();
            __syncthreads();
            if (n < total) load(n, n % STAGES, NO_BARRIER);
            return stage;
        }
        __device__ void release(int /*stage*/) {}
        __device__ void release_own() {}
    };

    static __device__ void producer_registers() {}
    template <int GROUPS> static __device__ void consumer_registers() {}
};

// ---------------------------------------------------------------------------------------------------------------------
// Primitives for sm_90a
#if PTX_SM90A

struct Wgmma {
    static __host__ __device__ constexpr int groups(AttentionTiling tiling) { return tiling.wgmma_groups; }
    static __host__ __device__ constexpr int threads(AttentionTiling tiling) {
        return 128 * tiling.wgmma_groups + 128;     // one extra warpgroup, the producer, only loads
    }
    static __host__ __device__ constexpr int blocks_per_sm(AttentionTiling) { return 1; }
    static constexpr bool OUT_IN_SMEM = true;
    static __device__ constexpr int stages(int HSK) { return wgmma_stages(HSK); }

    // One thread calls.
    template <int HS, int THREADS, int COLUMNS = HS>
    static __device__ void load_block(uint32_t to, const AttentionInput &input, int b, int head, int t0,
                                      uint32_t barrier) {
        for (int tile = 0; tile < COLUMNS / tile_columns(HS); tile++)
            ptx_tensor_load(to + tile * tile_bytes(HS), &input.map, tile * tile_columns(HS), head, t0, b, barrier);
    }

    template <int THREADS>
    static __device__ void load_stats(uint32_t to, const float *from, uint32_t barrier) {
        ptx_bulk_load(to, from, STATS_BYTES, barrier);
    }

    // The products run asynchronously, until wait(). Shapes as in MmaSync.
    template <int HS>
    static __device__ void product_nt(Accumulator<64> &acc, uint32_t left, uint32_t right) {
        constexpr int ROW_BYTES = tile_columns(HS) * 2, STEPS = ROW_BYTES / 32;     // per tile
        uint64_t left_tile = ptx_wgmma_descriptor(left, ROW_BYTES), right_tile = ptx_wgmma_descriptor(right, ROW_BYTES);
        ptx_wgmma_fence();
        for (int step = 0; step < HS / 16; step++) {
            int offset = (step / STEPS * tile_bytes(HS) + step % STEPS * 32) / 16;  // descriptors count in 16 bytes
            ptx_wgmma_smem(acc, left_tile + offset, right_tile + offset, step > 0);
        }
    }

    // A product of 96 columns spans three tiles; those of 64 take one tile each.
    template <int HS>
    static __device__ void product_nn(Accumulator<HS> &acc, const OperandTile &left, uint32_t right) {
        constexpr int ROW_BYTES = tile_columns(HS) * 2, COLUMNS = HS % 64 == 0 ? 64 : HS;
        uint64_t right_tile = ptx_wgmma_descriptor(right, ROW_BYTES, tile_bytes(HS));
        ptx_wgmma_fence();
        for (int step = 0; step < 4; step++)
            for (int i = 0; i < HS; i += COLUMNS)
                ptx_wgmma_registers<COLUMNS>(acc + i / 8, left[step],
                                             right_tile + (i * ROWS * 2 + step * 16 * ROW_BYTES) / 16);
    }

    static __device__ void commit() { ptx_wgmma_commit(); }
    template <int pending> static __device__ void wait() { ptx_wgmma_wait<pending>(); }

    // A compiler barrier on acc: reads of acc stay below the wait() before it, and writes to acc stay above the wait()
    // after it.
    template <int n> static __device__ void pin(float (&acc)[n][4]) {
        for (int i = 0; i < n; i++) for (int e = 0; e < 4; e++) asm volatile("" : "+f"(acc[i][e]) :: "memory");
    }

    template <int STAGES, int GROUPS>
    struct Pipe {
        uint32_t barriers;              // full[STAGES], empty[STAGES], own_full[GROUPS], own_empty[GROUPS]
        int group, stage = -1;          // stage: the one this group reads, or the producer fills
        uint32_t parity = 1, own_parity = 1;
        __device__ uint32_t full(int stage) { return barriers + 8 * stage; }
        __device__ uint32_t empty(int stage) { return barriers + 8 * (STAGES + stage); }
        __device__ uint32_t own_full(int group) { return barriers + 8 * (2 * STAGES + group); }
        __device__ uint32_t own_empty(int group) { return barriers + 8 * (2 * STAGES + GROUPS + group); }

        __device__ Pipe(uint32_t barriers, int group) : barriers(barriers), group(group) {
            if (threadIdx.x == 0) {
                for (int stage = 0; stage < STAGES; stage++) {
                    ptx_barrier_init(full(stage), 1);
                    ptx_barrier_init(empty(stage), 4 * PTX_ARRIVING_LANES * GROUPS);
                }
                for (int g = 0; g < GROUPS; g++) {
                    ptx_barrier_init(own_full(g), 1);
                    ptx_barrier_init(own_empty(g), 4 * PTX_ARRIVING_LANES);
                }
                ptx_barrier_init_fence();
            }
            __syncthreads();
        }
        __device__ void advance() {
            if (++stage == STAGES) stage = 0;
            if (stage == 0) parity ^= 1;
        }

        // The producer thread calls this for each work item. The first waits pass at once: the phase before phase 0
        // counts as complete. Two ring blocks are issued before the own blocks, which must wait until the groups are
        // done with the previous work item.
        template <class LoadOwn, class Load>
        __device__ void produce(int own_bytes, LoadOwn load_own, int bytes, int total, Load load) {
            for (int n = 0; n < total; n++) {
                advance();
                ptx_barrier_wait(empty(stage), parity ^ 1);
                ptx_barrier_arrive_expect(full(stage), bytes);
                load(n, stage, full(stage));
                if (n == min(1, total - 1)) {
                    for (int g = 0; g < GROUPS; g++) {
                        ptx_barrier_wait(own_empty(g), own_parity);
                        ptx_barrier_arrive_expect(own_full(g), own_bytes);
                        load_own(g, own_full(g));
                    }
                    own_parity ^= 1;
                }
            }
        }

        template <class LoadOwn, class Load>
        __device__ void begin(LoadOwn, int /*total*/, Load) {
            own_parity ^= 1;
            ptx_barrier_wait(own_full(group), own_parity);
        }
        template <class Load>
        __device__ int next(Load) {
            advance();
            ptx_barrier_wait(full(stage), parity);
            return stage;
        }
        // This group no longer reads the stage, or its own blocks. The __syncwarp() is for what lanes read by plain
        // loads (stats in dk/dv; dout and out for delta): an arrival orders only the reads of the thread that makes it.
        __device__ void release(int stage) { release_(empty(stage)); }
        __device__ void release_own() { release_(own_empty(group)); }
        __device__ void release_(uint32_t barrier) {
            __syncwarp();
            if (threadIdx.x % 32 < PTX_ARRIVING_LANES) ptx_barrier_arrive(barrier);
        }
    };

    // The SM has 64 K registers: 512 per thread of one warpgroup, to be divided by GROUPS + 1 warpgroups. They start
    // with equal shares, in multiples of 8. The producer keeps 24 and the consumers divide the rest.
    static __device__ void producer_registers() { ptx_give_registers<24>(); }
    template <int GROUPS> static __device__ void consumer_registers() {
        constexpr int START = 512 / (GROUPS + 1) / 8 * 8;
        ptx_take_registers<((GROUPS + 1) * START - 24) / GROUPS / 8 * 8>();
    }
};

template <AttentionBackend backend> struct Machine_ { typedef Wgmma type; };
#else
template <AttentionBackend backend> struct Machine_ { typedef MmaSync type; };
#endif
template <> struct Machine_<ATTENTION_MMA_SYNC> { typedef MmaSync type; };
template <AttentionBackend backend> using Machine = typename Machine_<backend>::type;

// Bytes of shared memory, in the kernels' order: each group's own blocks (one of HSK columns, own_v_blocks of HSV), the
// ring (a block of each size per stage), the stats, the barriers.
constexpr bool WITHOUT_STATS = false, WITH_STATS = true;
constexpr bool WITHOUT_GATE = false, WITH_GATE = true;      // of the kernels
constexpr size_t attention_smem_bytes(int HSK, int HSV, int groups, int own_v_blocks, int stages, bool stats) {
    return (size_t)groups * (block_bytes(HSK) + own_v_blocks * block_bytes(HSV)) +
           (size_t)stages * (block_bytes(HSK) + block_bytes(HSV) + (stats ? STATS_BYTES : 0)) +
           2 * (stages + groups) * 8;
}
constexpr size_t mma_sync_dkdv_bytes(int HSK, int HSV) {
    return attention_smem_bytes(HSK, HSV, dkdv_tiling(HSK).mma_sync_groups, 1, mma_sync_stages(HSK), WITH_STATS);
}
static_assert(mma_sync_dkdv_bytes(64, 64) <= 99 << 10 && mma_sync_dkdv_bytes(96, 64) <= 99 << 10,
              "heads of 64 and 96 must fit in the shared memory of an RTX GPU");

// ---------------------------------------------------------------------------------------------------------------------
// Helpers of the kernels

constexpr float LOG2_E = 1.44269504f;

// Between the four lanes that share a row, each with four pieces of 4 bytes: lane l has its piece of chunks 0 ... 3
// before and all of chunk l after, or the other way round.
__device__ inline void exchange_pieces(uint32_t (&pieces)[4]) {
    bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
    for (int c = 0; c < 4; c += 2) {
        uint32_t other = __shfl_xor_sync(0xffffffff, odd ? pieces[c] : pieces[c + 1], 1);
        if (odd) pieces[c] = other; else pieces[c + 1] = other;
    }
    for (int c = 0; c < 2; c++) {
        uint32_t other = __shfl_xor_sync(0xffffffff, high ? pieces[c] : pieces[c + 2], 2);
        if (high) pieces[c] = other; else pieces[c + 2] = other;
    }
}

// Writes the warp's 16 of 64 rows to out (64, HS), as bf16, 16 bytes per lane and store. out points to row 0 of the
// block, of which `rows` exist; scale0 is for row lane / 4, scale1 for row lane / 4 + 8. acc: an Accumulator, or a part
// of one from some column on.
template <int HS>
__device__ inline void store_rows(bf16 *out, int64_t stride, int rows, const float (*acc)[4], float scale0,
                                  float scale1) {
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    for (int i = 0; i < HS / 8; i += 4)
        for (int r = 0; r < 2; r++) {
            float scale = r ? scale1 : scale0;
            uint32_t packed[4];     // first its columns of chunks i ... i + 3, then all of chunk i + lane % 4
            for (int c = 0; c < 4; c++)
                packed[c] = ptx_pack_bf16(acc[i + c][2 * r] * scale, acc[i + c][2 * r + 1] * scale);
            exchange_pieces(packed);
            if (row + 8 * r < rows)
                *(uint4 *)(out + (row + 8 * r) * stride + (i + lane % 4) * 8) =
                    make_uint4(packed[0], packed[1], packed[2], packed[3]);
        }
}

// 1 / (1 + exp(-x)), to about 1e-6.
__device__ inline float fast_sigmoid(float x) { return __fdividef(1, 1 + ptx_exp2(-LOG2_E * x)); }

// Brings this group's 64 rows of the gate (64, HS) into L2. gate points to row 0, of which `rows` exist.
template <int HS>
__device__ inline void prefetch_gate(const bf16 *gate, int64_t stride, int rows) {
    constexpr int LINES = HS / 64;          // of 128 bytes per row
    int line = threadIdx.x % 128, row = line / LINES;
    if (row < min(rows, ROWS)) ptx_prefetch(gate + row * stride + line % LINES * 64);
}

// acc *= sigmoid(gate) in the warp's 16 of 64 rows.
template <int HS>
__device__ inline void gate_forward_rows(Accumulator<HS> &acc, const bf16 *gate, int64_t stride, int rows) {
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    for (int i = 0; i < HS / 8; i += 4)
        for (int r = 0; r < 2; r++) {
            uint4 chunk = make_uint4(0, 0, 0, 0);
            if (row + 8 * r < rows) chunk = *(const uint4 *)(gate + (row + 8 * r) * stride + (i + lane % 4) * 8);
            uint32_t packed[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
            exchange_pieces(packed);
            for (int c = 0; c < 4; c++) {
                acc[i + c][2 * r] *= fast_sigmoid(__uint_as_float(packed[c] << 16));
                acc[i + c][2 * r + 1] *= fast_sigmoid(__uint_as_float(packed[c] & 0xffff0000));
            }
        }
}

// threadIdx.x / 128, in a form that the compiler treats as uniform across the warp, as warpgroup instructions require.
__device__ inline int group_of_4_warps() { return __shfl_sync(0xffffffff, threadIdx.x / 128, 0); }

// The work items of a thread block, one per round: a strip (as many adjacent blocks of 64 rows as the thread block has
// groups; strip 0 is the longest), a head, a sequence b. All strips of a head run at the same time, so that its keys
// are read from memory once. Odd rounds run in reverse order, and twice the grid is a multiple of `strips` where
// possible: a thread block that had a long item then gets a short one.
struct AttentionWorkItem {
    int strip, head, b;
    __device__ bool find(int round, int strips, int heads, int B) {
        unsigned n = round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
        strip = n % strips, head = n / strips % heads, b = n / strips / heads;
        return b < B;
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Forward

struct AttentionForwardArgs {
    AttentionInput q, v;
    AttentionKeys k;
    bf16 *out;              // (B, T, NH, HSV)
    float *lse;             // (B, NH, T)
    const bf16 *gate;       // (B, T, NH, HSV), if GATED
    int64_t gate_stride;
    int B, T, NH, NKV;
};

template <AttentionBackend backend, int HSK, int HSV, bool GATED>
__global__ void __launch_bounds__(Machine<backend>::threads(forward_tiling(HSK)),
                                  Machine<backend>::blocks_per_sm(forward_tiling(HSK)))
attention_forward_kernel(const __grid_constant__ AttentionForwardArgs args) {
    typedef Machine<backend> M;
    constexpr int GROUPS = M::groups(forward_tiling(HSK)), STAGES = M::stages(HSK), THREADS = 128 * GROUPS;
    constexpr int K_BLOCK = block_bytes(HSK), V_BLOCK = block_bytes(HSV);
    extern __shared__ __align__(1024) unsigned char smem[];
    uint32_t q_smem = smem_address(smem), k_smem = q_smem + GROUPS * K_BLOCK, v_smem = k_smem + STAGES * K_BLOCK;

    int group = group_of_4_warps(), lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    int token_blocks = ceil_div(args.T, ROWS), strips = ceil_div(token_blocks, GROUPS), sharing = args.NH / args.NKV;
    AttentionWorkItem item;
    int first, total, turn;         // the strip's first block of queries (negative: before the start); blocks of keys
    auto find_item = [&](int round) {
        if (!item.find(round, strips, args.NH, args.B)) return false;
        first = token_blocks - (item.strip + 1) * GROUPS, total = first + GROUPS, turn = round % GROUPS;
        return true;
    };
    auto block_of = [&](int g) { return first + (g + turn) % GROUPS; };     // rotates which group gets the longest rows
    auto load_own = [&](int g, uint32_t barrier) {
        M::template load_block<HSK, THREADS>(q_smem + g * K_BLOCK, args.q, item.b, item.head, block_of(g) * ROWS,
                                             barrier);
    };
    auto load = [&](int n, int stage, uint32_t barrier) {
        load_keys<M, HSK, HSV, THREADS>(k_smem + stage * K_BLOCK, args.k, item.b, item.head / sharing, n * ROWS,
                                        barrier);
        M::template load_block<HSV, THREADS>(v_smem + stage * V_BLOCK, args.v, item.b, item.head / sharing, n * ROWS,
                                             barrier);
    };
    typename M::template Pipe<STAGES, GROUPS> pipe(v_smem + STAGES * V_BLOCK, group);
    if (group == GROUPS) {
        M::producer_registers();
        if (threadIdx.x == THREADS)
            for (int round = 0; find_item(round); round++)
                pipe.produce(K_BLOCK, load_own, K_BLOCK + V_BLOCK, total, load);
        return;
    }
    M::template consumer_registers<GROUPS>();

    // p = exp2(scale (q.k - top)). top is a row's reference for exponents. It follows the row's maximum only when that
    // exceeds it by more than `slack`: p up to 2^8 is harmless, and rows are seldom rescaled after their first blocks.
    const float scale = LOG2_E / sqrtf((float)HSK), slack = 8.0f / scale;
    const uint32_t q_own = q_smem + group * K_BLOCK;
    for (int round = 0; find_item(round); round++) {
        int own = block_of(group);          // this group's block of queries
        int needed = max(own + 1, 1);       // blocks of keys that it needs; a group before the start computes one
        auto gate_block = [&]() {
            return args.gate + ((int64_t)item.b * args.T + own * ROWS) * args.gate_stride + item.head * HSV;
        };
        if (GATED && own >= 0) prefetch_gate<HSV>(gate_block(), args.gate_stride, args.T - own * ROWS);
        float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, rescale[2];
        Accumulator<64> scores;
        Accumulator<HSV> out = {};
        OperandTile p;
        M::pin(out);

        // Turns scores into p, in fp32. True if top has moved: the caller must then multiply out by rescale.
        auto softmax = [&](int j) {
            if (j == own)                                   // the diagonal block: mask future keys
                for (int i = 0; i < 8; i++) for (int e = 0; e < 4; e++)
                    if (8 * i + lane % 4 * 2 + e % 2 > row + e / 2 * 8) scores[i][e] = -INFINITY;
            float max4[4] = {scores[0][0], scores[0][1], scores[0][2], scores[0][3]}, highest[2];
            for (int i = 1; i < 8; i++) for (int e = 0; e < 4; e++) max4[e] = fmaxf(max4[e], scores[i][e]);
            for (int r = 0; r < 2; r++) highest[r] = warp_max<4>(fmaxf(max4[2 * r], max4[2 * r + 1]));
            bool moves = __any_sync(0xffffffff, highest[0] > top[0] + slack || highest[1] > top[1] + slack);
            if (moves)
                for (int r = 0; r < 2; r++) {
                    float higher = fmaxf(top[r], highest[r]);
                    rescale[r] = ptx_exp2((top[r] - higher) * scale);
                    sum[r] *= rescale[r];
                    top[r] = higher;
                }
            float shift[2] = {top[0] * scale, top[1] * scale};
            for (int i = 0; i < 8; i++) for (int e = 0; e < 4; e++) {
                scores[i][e] = ptx_exp2(fmaf(scores[i][e], scale, -shift[e / 2]));
                sum[e / 2] += scores[i][e];
            }
            M::pin(scores);
            return moves;
        };

        pipe.begin(load_own, total, load);
        int stage = pipe.next(load);
        M::template product_nt<HSK>(scores, q_own, k_smem + stage * K_BLOCK);
        M::commit();
        M::template wait<0>();
        M::pin(scores);
        softmax(0);
        to_operand(p, scores);
        for (int j = 1; j < needed; j++) {
            int before = stage;
            stage = pipe.next(load);
            M::template product_nt<HSK>(scores, q_own, k_smem + stage * K_BLOCK);
            M::commit();
            M::template product_nn<HSV>(out, p, v_smem + before * V_BLOCK);
            M::commit();
            M::template wait<1>();                          // scores are complete; the product with v still runs
            M::pin(scores);
            bool moved = softmax(j);
            if (moved) {
                M::template wait<0>();
                M::pin(out);
                for (int i = 0; i < HSV / 8; i++) for (int e = 0; e < 4; e++) out[i][e] *= rescale[e / 2];
            }
            M::template wait<0>();              // after a branch: otherwise ptxas hoists it above the exponentials
            M::pin(out);
            pipe.release(before);
            to_operand(p, scores);
        }
        pipe.release_own();
        M::template product_nn<HSV>(out, p, v_smem + stage * V_BLOCK);
        M::commit();
        M::template wait<0>();
        M::pin(out);
        pipe.release(stage);
        for (int j = needed; j < total; j++) pipe.release(pipe.next(load));     // blocks only later groups need
        if (own < 0) continue;

        for (int r = 0; r < 2; r++) {
            sum[r] = warp_sum<4>(sum[r]);
            int t = own * ROWS + row + 8 * r;
            if (lane % 4 == 0 && t < args.T)
                args.lse[((int64_t)item.b * args.NH + item.head) * args.T + t] =
                    top[r] / sqrtf((float)HSK) + logf(sum[r]);
        }
        if (GATED) gate_forward_rows<HSV>(out, gate_block(), args.gate_stride, args.T - own * ROWS);
        int64_t stride = (int64_t)args.NH * HSV;
        bf16 *out_own = args.out + ((int64_t)item.b * args.T + own * ROWS) * stride + item.head * HSV;
        store_rows<HSV>(out_own, stride, args.T - own * ROWS, out, 1 / sum[0], 1 / sum[1]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward: dq, and the stats of each query (lse and delta) for the dk/dv kernel

struct AttentionDqArgs {
    AttentionInput q, v, dout, out;
    AttentionKeys k;
    const float *lse;       // (B, NH, T)
    float *stats;           // (B, NH, ceil(T / 64), 2, 64): lse * log2(e), then delta; +inf and 0 past the end
    bf16 *dq;               // (B, T, NH, HSK)
    int64_t dq_stride;
    bf16 *gated_dout;       // if GATED: dout's memory, and
    const bf16 *gate;       // (B, T, NH, HSV)
    bf16 *dgate;
    int64_t gate_stride;
    int B, T, NH, NKV;
};

// delta of the thread's two rows. The four lanes that share a row divide its chunks among them. dout_block (64, HS) is
// in shared memory; out_chunk(row, chunk) returns 8 elements of out.
template <int HS, class Chunk>
__device__ inline void find_delta(float (&delta)[2], const unsigned char *dout_block, Chunk out_chunk) {
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    for (int r = 0; r < 2; r++) {
        float sum = 0;
        for (int chunk = lane % 4; chunk < HS / 8; chunk += 4) {
            Packed16<bf16> dout8 = load16((const bf16 *)(dout_block + chunk_offset<HS>(row + 8 * r, chunk)));
            Packed16<bf16> out8 = out_chunk(row + 8 * r, chunk);
            for (int i = 0; i < 8; i++) sum += (float)dout8[i] * (float)out8[i];
        }
        delta[r] = warp_sum<4>(sum);
    }
}

// A lane's part of a gate's block (64, HS): the chunks that it has in find_delta. The pointers are to row 0 in global
// memory, of which `rows` exist. dgate may be gate.
template <int HS>
struct GateBlock {
    const bf16 *gate;
    bf16 *dgate, *dout;
    int64_t gate_stride, dout_stride;
    int rows;
    Packed16<bf16> chunks[2][HS / 32];

    __device__ void load() {
        int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
        for (int r = 0; r < 2; r++)
            for (int i = 0; i < HS / 32; i++)
                chunks[r][i] = row + 8 * r < rows ? load16(gate + (row + 8 * r) * gate_stride + (lane % 4 + 4 * i) * 8)
                                                  : Packed16<bf16>{};
    }

    // find_delta, and the way back through the gate: dgate, and dz becomes dout, in shared memory (dout_block) and in
    // global memory.
    template <class Chunk>
    __device__ void find_delta(float (&delta)[2], unsigned char *dout_block, Chunk z_chunk) {
        int lane = threadIdx.x % 32;
        #pragma unroll
        for (int r = 0; r < 2; r++) {
            float sum = 0;
            #pragma unroll
            for (int i = 0; i < HS / 32; i++) {
                int row = threadIdx.x / 32 % 4 * 16 + lane / 4 + 8 * r, chunk = lane % 4 + 4 * i;
                bf16 *dout_smem = (bf16 *)(dout_block + chunk_offset<HS>(row, chunk));
                Packed16<bf16> d8 = load16(dout_smem), z8 = z_chunk(row, chunk), g8 = chunks[r][i];
                for (int k = 0; k < 8; k++) {
                    float dz = d8[k], dz_z = dz * (float)z8[k], s = fast_sigmoid(g8[k]);
                    sum += dz_z;
                    d8[k] = (bf16)(dz * s);
                    g8[k] = (bf16)(dz_z * (1 - s));
                }
                store16(dout_smem, d8);
                if (row >= rows) continue;
                store16(dout + row * dout_stride + chunk * 8, d8);
                store16(dgate + row * gate_stride + chunk * 8, g8);
            }
            delta[r] = warp_sum<4>(sum);
        }
    }
};

template <AttentionBackend backend, int HSK, int HSV, bool GATED>
__global__ void __launch_bounds__(Machine<backend>::threads(dq_tiling(HSK)),
                                  Machine<backend>::blocks_per_sm(dq_tiling(HSK)))
attention_dq_kernel(const __grid_constant__ AttentionDqArgs args) {
    typedef Machine<backend> M;
    constexpr int GROUPS = M::groups(dq_tiling(HSK)), STAGES = M::stages(HSK), THREADS = 128 * GROUPS;
    constexpr int K_BLOCK = block_bytes(HSK), V_BLOCK = block_bytes(HSV);
    extern __shared__ __align__(1024) unsigned char smem[];
    uint32_t q_smem = smem_address(smem), dout_smem = q_smem + GROUPS * K_BLOCK;
    uint32_t out_smem = dout_smem + GROUPS * V_BLOCK, k_smem = M::OUT_IN_SMEM ? out_smem + GROUPS * V_BLOCK : out_smem;
    uint32_t v_smem = k_smem + STAGES * K_BLOCK;

    int group = group_of_4_warps(), lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    int token_blocks = ceil_div(args.T, ROWS), strips = ceil_div(token_blocks, GROUPS), sharing = args.NH / args.NKV;
    AttentionWorkItem item;
    int first, total, turn;         // as in the forward kernel
    auto find_item = [&](int round) {
        if (!item.find(round, strips, args.NH, args.B)) return false;
        first = token_blocks - (item.strip + 1) * GROUPS, total = first + GROUPS, turn = round % GROUPS;
        return true;
    };
    auto block_of = [&](int g) { return first + (g + turn) % GROUPS; };     // rotates which group gets the longest rows
    auto load_own = [&](int g, uint32_t barrier) {
        M::template load_block<HSK, THREADS>(q_smem + g * K_BLOCK, args.q, item.b, item.head, block_of(g) * ROWS,
                                             barrier);
        M::template load_block<HSV, THREADS>(dout_smem + g * V_BLOCK, args.dout, item.b, item.head, block_of(g) * ROWS,
                                             barrier);
        if (M::OUT_IN_SMEM)
            M::template load_block<HSV, THREADS>(out_smem + g * V_BLOCK, args.out, item.b, item.head,
                                                 block_of(g) * ROWS, barrier);
    };
    auto load = [&](int n, int stage, uint32_t barrier) {
        load_keys<M, HSK, HSV, THREADS>(k_smem + stage * K_BLOCK, args.k, item.b, item.head / sharing, n * ROWS,
                                        barrier);
        M::template load_block<HSV, THREADS>(v_smem + stage * V_BLOCK, args.v, item.b, item.head / sharing, n * ROWS,
                                             barrier);
    };
    typename M::template Pipe<STAGES, GROUPS> pipe(v_smem + STAGES * V_BLOCK, group);
    if (group == GROUPS) {
        M::producer_registers();
        if (threadIdx.x == THREADS)
            for (int round = 0; find_item(round); round++)
                pipe.produce(K_BLOCK + (M::OUT_IN_SMEM ? 2 : 1) * V_BLOCK, load_own, K_BLOCK + V_BLOCK, total, load);
        return;
    }
    M::template consumer_registers<GROUPS>();

    const float scale = LOG2_E / sqrtf((float)HSK);
    const uint32_t q_own = q_smem + group * K_BLOCK, dout_own = dout_smem + group * V_BLOCK;
    for (int round = 0; find_item(round); round++) {
        int own = block_of(group), needed = max(own + 1, 1);
        int64_t head_index = (int64_t)item.b * args.NH + item.head;
        float lse[2] = {INFINITY, INFINITY}, delta[2];      // past the end: p = 0
        for (int r = 0; r < 2; r++) {
            int t = own * ROWS + row + 8 * r;
            if (t >= 0 && t < args.T) lse[r] = args.lse[head_index * args.T + t] * LOG2_E;
        }

        Accumulator<64> scores, dp;
        Accumulator<HSK> dq = {};
        OperandTile ds;
        M::pin(dq);
        auto find_p = [&](int j) {                          // turns scores into p, in fp32
            M::pin(scores);
            for (int i = 0; i < 8; i++) for (int e = 0; e < 4; e++)
                scores[i][e] = ptx_exp2(fmaf(scores[i][e], scale, -lse[e / 2]));
            if (j == own)                       // this branch also keeps the next wait below the exponentials
                for (int i = 0; i < 8; i++) for (int e = 0; e < 4; e++)
                    if (8 * i + lane % 4 * 2 + e % 2 > row + e / 2 * 8) scores[i][e] = 0;
            M::pin(scores);
        };
        auto find_ds = [&]() {                              // turns dp into ds, in fp32
            M::pin(dp);
            for (int i = 0; i < 8; i++) for (int e = 0; e < 4; e++)
                dp[i][e] = scores[i][e] * (dp[i][e] - delta[e / 2]);
        };

        GateBlock<HSV> gate;
        if (GATED) {                                        // loaded while the own blocks are on their way
            int64_t token = (int64_t)item.b * args.T + own * ROWS;
            gate.gate = args.gate + token * args.gate_stride + item.head * HSV;
            gate.dgate = args.dgate + (gate.gate - args.gate), gate.gate_stride = args.gate_stride;
            gate.dout = args.gated_dout + token * args.dout.stride + item.head * HSV;
            gate.dout_stride = args.dout.stride, gate.rows = own < 0 ? 0 : args.T - own * ROWS;
            gate.load();
        }
        pipe.begin(load_own, total, load);
        int stage = pipe.next(load);
        M::template product_nt<HSK>(scores, q_own, k_smem + stage * K_BLOCK);
        M::commit();
        unsigned char *dout_block = smem + (dout_own - q_smem);
        auto out_chunk = [&](int r, int chunk) {
            if (M::OUT_IN_SMEM)
                return load16((const bf16 *)(smem + (out_smem - q_smem) + group * V_BLOCK +
                                             chunk_offset<HSV>(r, chunk)));
            int t = own * ROWS + r;
            if (t < 0 || t >= args.T) return Packed16<bf16>{};
            return load16(args.out.data + ((int64_t)item.b * args.T + t) * args.out.stride + item.head * HSV +
                          chunk * 8);
        };
        if (GATED) {
            gate.find_delta(delta, dout_block, out_chunk);
            ptx_copies_after();
            ptx_named_barrier(1 + group, 128);              // the group's product reads all rows
        }
        M::template product_nt<HSV>(dp, dout_own, v_smem + stage * V_BLOCK);
        M::commit();
        if (!GATED) find_delta<HSV>(delta, dout_block, out_chunk);
        if (own >= 0 && lane % 4 == 0)
            for (int r = 0; r < 2; r++) {
                float *stats = args.stats + (head_index * token_blocks + own) * 2 * ROWS + row + 8 * r;
                stats[0] = lse[r], stats[ROWS] = delta[r];
            }
        M::template wait<1>();
        find_p(0);
        M::template wait<0>();
        find_ds();
        to_operand(ds, dp);
        for (int j = 1; j < needed; j++) {
            int before = stage;
            stage = pipe.next(load);
            M::template product_nt<HSK>(scores, q_own, k_smem + stage * K_BLOCK);
            M::commit();
            M::template product_nt<HSV>(dp, dout_own, v_smem + stage * V_BLOCK);
            M::commit();
            M::template product_nn<HSK>(dq, ds, k_smem + before * K_BLOCK);
            M::commit();
            M::template wait<2>();
            find_p(j);
            M::template wait<1>();
            find_ds();
            M::template wait<0>();
            M::pin(dq);
            pipe.release(before);
            to_operand(ds, dp);
        }
        pipe.release_own();
        M::template product_nn<HSK>(dq, ds, k_smem + stage * K_BLOCK);
        M::commit();
        M::template wait<0>();
        M::pin(dq);
        pipe.release(stage);
        for (int j = needed; j < total; j++) pipe.release(pipe.next(load));
        if (own < 0) continue;

        const float softmax_scale = 1 / sqrtf((float)HSK);
        bf16 *dq_own = args.dq + ((int64_t)item.b * args.T + own * ROWS) * args.dq_stride + item.head * HSK;
        store_rows<HSK>(dq_own, args.dq_stride, args.T - own * ROWS, dq, softmax_scale, softmax_scale);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward: dk and dv. Rows are keys, columns are queries: scores, p, dp and ds are the transposes of those above.

struct AttentionDkdvArgs {
    AttentionInput q, v, dout;
    AttentionKeys k;
    const float *stats;     // (B, NH, ceil(T / 64), 2, 64), from the dq kernel
    AttentionHeads<bf16> gradient;
    int64_t dk_stride, dv_stride, head_stride;
    int B, T, NH, NKV;
};

template <AttentionBackend backend, int HSK, int HSV>
__global__ void __launch_bounds__(Machine<backend>::threads(dkdv_tiling(HSK)),
                                  Machine<backend>::blocks_per_sm(dkdv_tiling(HSK)))
attention_dkdv_kernel(const __grid_constant__ AttentionDkdvArgs args) {
    typedef Machine<backend> M;
    constexpr int GROUPS = M::groups(dkdv_tiling(HSK)), STAGES = M::stages(HSK), THREADS = 128 * GROUPS;
    constexpr int K_BLOCK = block_bytes(HSK), V_BLOCK = block_bytes(HSV);
    extern __shared__ __align__(1024) unsigned char smem[];
    uint32_t k_smem = smem_address(smem), v_smem = k_smem + GROUPS * K_BLOCK;
    uint32_t q_smem = v_smem + GROUPS * V_BLOCK, dout_smem = q_smem + STAGES * K_BLOCK;
    uint32_t stats_smem = dout_smem + STAGES * V_BLOCK;

    int group = group_of_4_warps(), lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    int token_blocks = ceil_div(args.T, ROWS), strips = ceil_div(token_blocks, GROUPS), sharing = args.NH / args.NKV;
    AttentionWorkItem item;
    int first, per_head, turn;      // the strip's first block of keys; blocks of queries for each head that shares them
    auto find_item = [&](int round) {
        if (!item.find(round, strips, args.NKV, args.B)) return false;
        first = item.strip * GROUPS, per_head = token_blocks - first, turn = round % GROUPS;
        return true;
    };
    auto block_of = [&](int g) { return first + (g + turn) % GROUPS; };     // rotates which group gets the longest rows
    auto load_own = [&](int g, uint32_t barrier) {
        load_keys<M, HSK, HSV, THREADS>(k_smem + g * K_BLOCK, args.k, item.b, item.head, block_of(g) * ROWS, barrier);
        M::template load_block<HSV, THREADS>(v_smem + g * V_BLOCK, args.v, item.b, item.head, block_of(g) * ROWS,
                                             barrier);
    };
    // Head by head, the last queries first: later groups finish sooner.
    auto load = [&](int n, int stage, uint32_t barrier) {
        int head = item.head * sharing + n / per_head, block = token_blocks - 1 - n % per_head;
        M::template load_block<HSK, THREADS>(q_smem + stage * K_BLOCK, args.q, item.b, head, block * ROWS, barrier);
        M::template load_block<HSV, THREADS>(dout_smem + stage * V_BLOCK, args.dout, item.b, head, block * ROWS,
                                             barrier);
        const float *stats = args.stats + (((int64_t)item.b * args.NH + head) * token_blocks + block) * 2 * ROWS;
        M::template load_stats<THREADS>(stats_smem + stage * STATS_BYTES, stats, barrier);
    };
    typename M::template Pipe<STAGES, GROUPS> pipe(stats_smem + STAGES * STATS_BYTES, group);
    if (group == GROUPS) {
        M::producer_registers();
        if (threadIdx.x == THREADS)
            for (int round = 0; find_item(round); round++)
                pipe.produce(K_BLOCK + V_BLOCK, load_own, K_BLOCK + V_BLOCK + STATS_BYTES, sharing * per_head, load);
        return;
    }
    M::template consumer_registers<GROUPS>();

    const float scale = LOG2_E / sqrtf((float)HSK);
    const uint32_t k_own = k_smem + group * K_BLOCK, v_own = v_smem + group * V_BLOCK;
    const float *stats = (const float *)(smem + (stats_smem - k_smem)) + lane % 4 * 2;  // at this thread's first column
    for (int round = 0; find_item(round); round++) {
        int own = block_of(group);
        int needed = own < token_blocks ? token_blocks - own : 1;   // of per_head; a group past the end computes one
        Accumulator<64> scores, dp;
        Accumulator<HSK> dk = {};
        Accumulator<HSV> dv = {};
        OperandTile p, ds;
        M::pin(dk), M::pin(dv);

        float2 stat[8];         // of this thread's columns: lse, then delta; read while the products run
        auto read_stats = [&](const float *from) {
            for (int i = 0; i < 8; i++) stat[i] = *(const float2 *)(from + 8 * i);
        };
        auto find_p = [&](int block) {                      // turns scores into p, in fp32
            M::pin(scores);
            for (int i = 0; i < 8; i++) for (int e = 0; e < 4; e++)
                scores[i][e] = ptx_exp2(fmaf(scores[i][e], scale, -(e % 2 ? stat[i].y : stat[i].x)));
            if (block == own)                   // this branch also keeps the next wait below the exponentials
                for (int i = 0; i < 8; i++) for (int e = 0; e < 4; e++)
                    if (8 * i + lane % 4 * 2 + e % 2 < row + e / 2 * 8) scores[i][e] = 0;
            M::pin(scores);
        };
        auto find_ds = [&](int stage) {                     // ds from p and dp; leaves both p and ds as operands
            M::template product_nt<HSV>(dp, v_own, dout_smem + stage * V_BLOCK);
            M::commit();
            read_stats(stats + stage * 2 * ROWS + ROWS);
            M::template wait<0>();
            M::pin(dp);
            for (int i = 0; i < 8; i++) for (int e = 0; e < 4; e++)
                dp[i][e] = scores[i][e] * (dp[i][e] - (e % 2 ? stat[i].y : stat[i].x));
            to_operand(ds, dp);
            to_operand(p, scores);
        };

        pipe.begin(load_own, sharing * per_head, load);
        for (int h = 0; h < sharing; h++) {
            int stage = pipe.next(load);
            M::template product_nt<HSK>(scores, k_own, q_smem + stage * K_BLOCK);
            M::commit();
            read_stats(stats + stage * 2 * ROWS);
            M::template wait<0>();
            find_p(token_blocks - 1);
            find_ds(stage);
            for (int n = 1; n < needed; n++) {
                int before = stage;
                stage = pipe.next(load);
                M::template product_nt<HSK>(scores, k_own, q_smem + stage * K_BLOCK);
                M::commit();
                M::template product_nn<HSV>(dv, p, dout_smem + before * V_BLOCK);
                M::template product_nn<HSK>(dk, ds, q_smem + before * K_BLOCK);
                M::commit();
                read_stats(stats + stage * 2 * ROWS);
                M::template wait<1>();
                find_p(token_blocks - 1 - n);
                M::template wait<0>();
                M::pin(dk), M::pin(dv);
                pipe.release(before);
                find_ds(stage);
            }
            if (h == sharing - 1) pipe.release_own();
            M::template product_nn<HSV>(dv, p, dout_smem + stage * V_BLOCK);
            M::template product_nn<HSK>(dk, ds, q_smem + stage * K_BLOCK);
            M::commit();
            M::template wait<0>();
            M::pin(dk), M::pin(dv);
            pipe.release(stage);
            for (int n = needed; n < per_head; n++) pipe.release(pipe.next(load));  // blocks only earlier groups need
        }
        if (own >= token_blocks) continue;

        const float softmax_scale = 1 / sqrtf((float)HSK);
        const AttentionHeads<bf16> &to = args.gradient;
        int64_t token = (int64_t)item.b * args.T + own * ROWS, head = item.head * args.head_stride;
        int rows = args.T - own * ROWS;
        store_rows<HSV>(to.k + token * args.dk_stride + head, args.dk_stride, rows, dk, softmax_scale, softmax_scale);
        if constexpr (HSK > HSV)
            store_rows<HSK - HSV>(to.shared + (token * args.NKV + item.head) * (HSK - HSV), args.NKV * (HSK - HSV),
                                  rows, dk + HSV / 8, softmax_scale, softmax_scale);
        store_rows<HSV>(to.v + token * args.dv_stride + head, args.dv_stride, rows, dv, 1, 1);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

// TMA's description of an input with `heads` heads of `columns` columns, in boxes of one tile of a block of HS columns.
inline CUtensorMap attention_tensor_map_(const AttentionInput &x, int B, int heads, int columns, int HS) {
    typedef CUresult (*Encode)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                               const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                               CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static const Encode encode = [] {       // looked up at run time, so that programs need not link libcuda
        void *f = NULL;
        cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
        CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found));
#else
        CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &f, cudaEnableDefault, &found));
#endif
        if (!f || found != cudaDriverEntryPointSuccess)
            die(EXIT_SYSTEM, "the CUDA driver has no cuTensorMapEncodeTiled; install a driver for CUDA 12 or later");
        return (Encode)f;
    }();
    CUtensorMap map;
    cuuint64_t sizes[4] = {(cuuint64_t)columns, (cuuint64_t)heads, (cuuint64_t)x.T, (cuuint64_t)B};
    cuuint64_t strides[3] = {(cuuint64_t)x.head_stride * 2, (cuuint64_t)x.stride * 2,       // bytes
                             (cuuint64_t)x.T * (cuuint64_t)x.stride * 2};
    cuuint32_t box[4] = {(cuuint32_t)tile_columns(HS), 1, ROWS, 1}, steps[4] = {1, 1, 1, 1};
    CUtensorMapSwizzle swizzle = tile_columns(HS) == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
    CUresult rc = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, (void *)x.data, sizes, strides, box, steps,
                         CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                         CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (rc != CUDA_SUCCESS)
        die(EXIT_SYSTEM, "attention: cuTensorMapEncodeTiled refused B=%d T=%d heads=%d columns=%d strides %lld and "
            "%lld at %p (CUresult %d)", B, x.T, heads, columns, (long long)x.stride, (long long)x.head_stride,
            (const void *)x.data, (int)rc);
    return map;
}

// A tensor with rows of `columns` elements is read and written 16 bytes at a time.
inline void attention_check_tensor_(const bf16 *x, int heads, int columns, int64_t stride, int64_t head_stride) {
    if (head_stride < columns || stride < (heads - 1) * head_stride + columns || stride % 8 != 0 ||
        head_stride % 8 != 0 || (uintptr_t)x % 16 != 0)
        die(EXIT_SYSTEM, "attention: tensor at %p, %lld elements per token, %d heads of size %d, %lld elements apart: "
            "the address must be a multiple of 16 bytes, the elements per token and per head multiples of 8 and enough "
            "for what they hold", (const void *)x, (long long)stride, heads, columns, (long long)head_stride);
}

// An input for blocks of HS columns, or for the first or last `columns` of them. hopper: with a tensor map for TMA.
inline AttentionInput attention_input_(const bf16 *x, const AttentionShape &s, int heads, int columns, int HS,
                                       int64_t stride, int64_t head_stride, bool hopper) {
    attention_check_tensor_(x, heads, columns, stride, head_stride);
    AttentionInput in = {};
    in.data = x, in.stride = stride, in.head_stride = head_stride, in.T = s.T;
    if (hopper) in.map = attention_tensor_map_(in, s.B, heads, columns, HS);
    return in;
}

// q, k and v.
inline AttentionInput attention_queries_(const bf16 *q, const AttentionShape &s, bool hopper) {
    return attention_input_(q, s, s.NH, s.HSK, s.HSK, s.q_stride, s.HSK, hopper);
}
inline AttentionKeys attention_keys_(const AttentionHeads<bf16> &heads, const AttentionShape &s, bool hopper) {
    AttentionKeys keys = {};
    int shared = s.HSK - s.HSV;
    keys.own = attention_input_(heads.k, s, s.NKV, s.HSV, s.HSK, s.k_stride, s.kv_head_stride, hopper);
    if (shared) keys.shared = attention_input_(heads.shared, s, 1, shared, s.HSK, shared, shared, hopper);
    return keys;
}
inline AttentionInput attention_values_(const bf16 *v, const AttentionShape &s, bool hopper) {
    return attention_input_(v, s, s.NKV, s.HSV, s.HSV, s.v_stride, s.kv_head_stride, hopper);
}

inline void attention_check_shape_(const AttentionShape &s) {
    if (s.B < 1 || s.T < 1 || s.NKV < 1 || s.NH < 1 || s.NH % s.NKV != 0 || !attention_is_fast(s) ||
        (int64_t)s.B * s.NH * ceil_div(s.T, ROWS) > INT32_MAX)
        die(EXIT_SYSTEM, "attention: B=%d T=%d heads=%d key/value heads=%d head sizes %d and %d: heads must be a "
            "multiple of key/value heads, head sizes 64 and 64, 96 and 64, or 128 and 128, and B * heads * "
            "ceil(T / %d) less than 2^31", s.B, s.T, s.NH, s.NKV, s.HSK, s.HSV, ROWS);
}

// How to launch a kernel. hopper: this device runs the sm_90a code, recognized by its larger launch bound. That code is
// persistent: a thread block takes several work items. Elsewhere each thread block takes one.
struct AttentionPlan {
    bool hopper;
    int groups, stages;
    unsigned grid, threads;
};

template <class... Params>
AttentionPlan attention_plan_(void (*kernel)(Params...), AttentionTiling tiling, const AttentionShape &s, int heads) {
    cudaFuncAttributes attributes;
    CUDA_CHECK(cudaFuncGetAttributes(&attributes, (const void *)kernel));
    AttentionPlan plan;
    plan.hopper = attributes.maxThreadsPerBlock > 128 * tiling.mma_sync_groups;
    plan.groups = plan.hopper ? tiling.wgmma_groups : tiling.mma_sync_groups;
    plan.stages = plan.hopper ? wgmma_stages(s.HSK) : mma_sync_stages(s.HSK);
    plan.threads = 128 * plan.groups + (plan.hopper ? 128 : 0);
    int64_t strips = ceil_div(ceil_div(s.T, ROWS), plan.groups), items = strips * heads * s.B;
    plan.grid = (unsigned)items;
    if (plan.hopper) {
        int sms = device_attribute(cudaDevAttrMultiProcessorCount);
        int64_t unit = strips % 2 ? strips : strips / 2;    // two rounds are then whole heads: see AttentionWorkItem
        if (items > sms) plan.grid = sms > unit ? sms - sms % unit : sms;
    }
    return plan;
}

template <AttentionBackend backend, int HSK, int HSV>
void attention_forward_(bf16 *out, float *lse, const AttentionHeads<bf16> &heads, const bf16 *gate,
                        const AttentionShape &s, cudaStream_t stream) {
    auto kernel = gate ? attention_forward_kernel<backend, HSK, HSV, WITH_GATE>
                       : attention_forward_kernel<backend, HSK, HSV, WITHOUT_GATE>;
    AttentionPlan plan = attention_plan_(kernel, forward_tiling(HSK), s, s.NH);
    if (gate) attention_check_tensor_(gate, s.NH, HSV, s.gate_stride, HSV);
    int own_v_blocks = 0;       // only q
    size_t smem_bytes = attention_smem_bytes(HSK, HSV, plan.groups, own_v_blocks, plan.stages, WITHOUT_STATS);
    AttentionInput q = attention_queries_(heads.q, s, plan.hopper), v = attention_values_(heads.v, s, plan.hopper);
    AttentionKeys k = attention_keys_(heads, s, plan.hopper);
    AttentionForwardArgs args = {q, v, k, out, lse, gate, s.gate_stride, s.B, s.T, s.NH, s.NKV};
    launch(kernel, {plan.grid, plan.threads, smem_bytes, stream}, args);
}

// out (B, T, NH, HSV), lse (B, NH, T) from heads, and gate (B, T, NH, HSV), or NULL for none.
template <AttentionBackend backend = ATTENTION_BEST>
void attention_forward(bf16 *out, float *lse, const AttentionHeads<bf16> &heads, const bf16 *gate,
                       const AttentionShape &s, cudaStream_t stream) {
    attention_check_shape_(s);
    auto f = s.HSK == 64 ? attention_forward_<backend, 64, 64>
           : s.HSK == 96 ? attention_forward_<backend, 96, 64> : attention_forward_<backend, 128, 128>;
    f(out, lse, heads, gate, s, stream);
}

// Size of attention_backward's scratch, the stats: two floats per query.
inline size_t attention_backward_scratch_bytes(const AttentionShape &s) {
    return (size_t)s.B * s.NH * ceil_div(s.T, ROWS) * STATS_BYTES;
}

template <AttentionBackend backend, int HSK, int HSV>
void attention_backward_(const AttentionHeads<bf16> &gradient, bf16 *dgate, bf16 *dout, const bf16 *out,
                         const float *lse, const AttentionHeads<bf16> &heads, const bf16 *gate, float *scratch,
                         const AttentionShape &s, cudaStream_t stream) {
    auto dq_kernel = gate ? attention_dq_kernel<backend, HSK, HSV, WITH_GATE>
                          : attention_dq_kernel<backend, HSK, HSV, WITHOUT_GATE>;
    auto dkdv_kernel = attention_dkdv_kernel<backend, HSK, HSV>;
    AttentionPlan plan = attention_plan_(dq_kernel, dq_tiling(HSK), s, s.NH);
    int64_t D = (int64_t)s.NH * HSV;
    AttentionInput q = attention_queries_(heads.q, s, plan.hopper), v = attention_values_(heads.v, s, plan.hopper);
    AttentionKeys k = attention_keys_(heads, s, plan.hopper);
    AttentionInput dout_in = attention_input_(dout, s, s.NH, HSV, HSV, D, HSV, plan.hopper);
    AttentionInput out_in = attention_input_(out, s, s.NH, HSV, HSV, D, HSV, plan.hopper);
    if (gate) {
        attention_check_tensor_(gate, s.NH, HSV, s.gate_stride, HSV);
        attention_check_tensor_(dgate, s.NH, HSV, s.gate_stride, HSV);
    }

    int own_v_blocks = plan.hopper ? 2 : 1;     // dout, and out where OUT_IN_SMEM
    size_t smem_bytes = attention_smem_bytes(HSK, HSV, plan.groups, own_v_blocks, plan.stages, WITHOUT_STATS);
    AttentionDqArgs dq_args = {q, v, dout_in, out_in, k, lse, scratch, gradient.q, s.q_stride, dout, gate, dgate,
                               s.gate_stride, s.B, s.T, s.NH, s.NKV};
    launch(dq_kernel, {plan.grid, plan.threads, smem_bytes, stream}, dq_args);

    plan = attention_plan_(dkdv_kernel, dkdv_tiling(HSK), s, s.NKV);
    own_v_blocks = 1;                           // v
    smem_bytes = attention_smem_bytes(HSK, HSV, plan.groups, own_v_blocks, plan.stages, WITH_STATS);
    AttentionDkdvArgs dkdv_args = {q, v, dout_in, k, scratch, gradient, s.k_stride, s.v_stride, s.kv_head_stride,
                                   s.B, s.T, s.NH, s.NKV};
    launch(dkdv_kernel, {plan.grid, plan.threads, smem_bytes, stream}, dkdv_args);
}

// Overwrites gradient, from dout (B, T, NH, HSV) and the forward pass's inputs and outputs. With a gate, dgate too,
// which may be gate; out is then z, and dout is dz at first and dout at the end. gate and dgate are NULL for none.
// scratch (attention_backward_scratch_bytes) is 16-byte aligned.
template <AttentionBackend backend = ATTENTION_BEST>
void attention_backward(const AttentionHeads<bf16> &gradient, bf16 *dgate, bf16 *dout, const bf16 *out,
                        const float *lse, const AttentionHeads<bf16> &heads, const bf16 *gate, float *scratch,
                        const AttentionShape &s, cudaStream_t stream) {
    attention_check_shape_(s);
    auto f = s.HSK == 64 ? attention_backward_<backend, 64, 64>
           : s.HSK == 96 ? attention_backward_<backend, 96, 64> : attention_backward_<backend, 128, 128>;
    f(gradient, dgate, dout, out, lse, heads, gate, scratch, s, stream);
}

#endif
