// Causal attention, forward and backward, on the tensor cores, without ever holding a T x T matrix:
//
//     out_i = sum_{j <= i} p_ij v_j,   p_ij = exp(q_i k_j / sqrt(HS) - lse_i),   lse_i = log sum_{j <= i} exp(q_i k_j / sqrt(HS))
//
// and, given dout, with delta_i = dout_i out_i = sum_j p_ij (dout_i v_j):
//
//     dv_j = sum_i p_ij dout_i                 ds_ij = p_ij (dout_i v_j - delta_i)
//     dq_i = sum_j ds_ij k_j / sqrt(HS)        dk_j = sum_i ds_ij q_i / sqrt(HS)
//
// B sequences of T tokens (any number), NH query heads, NKV key/value heads (a divisor of NH: query head i reads key/value
// head i / (NH / NKV)), HS = 64 or 128. All bf16, token-major (B, T, heads, HS); softmax, sums and lse in fp32. No atomics:
// the same inputs give the same bits.
//
// Everything is cut in blocks of 64 tokens. A group of 4 warps owns one block of 64 rows, keeps what it sums in registers
// and walks over the other side's blocks, which its thread block holds in a ring in shared memory:
//     forward    owns queries,  walks keys     s = q k^T;  out += p v                            (online softmax)
//     dq         owns queries,  walks keys     s = q k^T;  dp = dout v^T;  dq += ds k            (also finds delta)
//     dk, dv     owns keys,     walks queries  s^T = k q^T; dp^T = v dout^T; dv += p^T dout; dk += ds^T q
// so p and ds pass from one product to the next in registers alone. That the backward computes s and dp twice (7 products in
// place of 5) is the price of having no sums across thread blocks: no fp32 dq, no atomics, no order to keep.
// Sources: Dao, FlashAttention-2 (arXiv 2307.08691); Shah et al., FlashAttention-3 (arXiv 2407.08608).
//
// Two sets of primitives stand under the same kernels: sm_90a code uses wgmma and the copy engine, all other code (from
// sm_80) mma.sync and cp.async. dev/cuda/attention.cu checks and times both; dev/results/attention.md has the numbers.
#ifndef LLMC_ATTENTION_CUH
#define LLMC_ATTENTION_CUH

#include <cuda.h>
#include <math.h>

#include "cuda_utils.cuh"
#include "ptx.cuh"

// Which primitives: the best that the code was compiled for, or mma.sync everywhere (for the lab).
enum AttentionBackend { ATTENTION_BEST, ATTENTION_MMA_SYNC };

typedef struct {
    int B, T, NH, NKV, HS;
    int64_t q_stride, k_stride, v_stride;   // elements from one token to the next, of q and dq, of k and dk, of v and dv;
                                            // out and dout are dense: NH * HS
} AttentionShape;

// ---------------------------------------------------------------------------------------------------------------------
// Tiles in shared memory: 64 rows of 64 elements, 128 bytes each, whose 16-byte chunks are permuted so that reading a column
// of chunks meets all banks: chunk c of row r stands at c ^ (r % 8). This is the 128-byte swizzle of wgmma and the copy
// engine. 64 rows of HS elements are HS / 64 such tiles, one after the other.

constexpr int ROWS = 64;                                    // tokens in a block
constexpr int TILE_BYTES = ROWS * 128;
__host__ __device__ constexpr int block_bytes(int HS) { return HS / 64 * TILE_BYTES; }
constexpr int STATS_BYTES = 2 * ROWS * sizeof(float);       // of 64 queries: lse * log2(e), then delta

// How many groups share a thread block, which holds their rows' walk in common: for mma.sync, with how many such thread blocks
// on a multiprocessor; for wgmma it is one. As many as their registers allow.
struct AttentionTiling { int mma_sync_groups, mma_sync_blocks_per_sm, wgmma_groups; };
__host__ __device__ constexpr AttentionTiling forward_tiling(int HS) {
    return HS == 64 ? AttentionTiling{2, 2, 4} : AttentionTiling{3, 1, 3};
}
__host__ __device__ constexpr AttentionTiling dq_tiling(int HS) {
    return HS == 64 ? AttentionTiling{2, 2, 3} : AttentionTiling{2, 1, 2};
}
__host__ __device__ constexpr AttentionTiling dkdv_tiling(int HS) {
    return HS == 64 ? AttentionTiling{3, 1, 3} : AttentionTiling{2, 1, 2};
}

// Stages of the ring: one being read, one whose products may not be done, and one or more being filled.
__host__ __device__ constexpr int mma_sync_stages(int /*HS*/) { return 3; }
__host__ __device__ constexpr int wgmma_stages(int HS) { return HS == 64 ? 8 : 4; }

__device__ inline uint32_t tile_offset(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

__device__ inline uint32_t chunk_offset(int row, int chunk) { return chunk / 8 * TILE_BYTES + tile_offset(row, chunk % 8); }   // in a block

// A tensor to read blocks from.
struct AttentionInput {
    CUtensorMap map;        // for the copy engine: boxes of 64 tokens x 64 elements of one head
    const bf16 *data;       // (B, T, heads, HS)
    int64_t stride;         // elements from one token to the next
    int T;
};

typedef float Product[8][4];    // a thread's part of 64 x 64: [i][0..1] of row lane / 4, [i][2..3] of row lane / 4 + 8, both of
                                // the warp's 16 rows, columns 8 i + 2 (lane % 4) and the next. mma.sync and wgmma agree on it.
typedef uint32_t Factor[4][4];  // the same as bf16, as the left factor of a product: [k] holds columns 16 k ... 16 k + 15

__device__ inline void to_factor(Factor &p, const Product &s) {
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < 4; i++) p[k][i] = ptx_pack_bf16(s[2 * k + i / 2][i % 2 * 2], s[2 * k + i / 2][i % 2 * 2 + 1]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Primitives for sm_80 and later

struct MmaSync {
    static __host__ __device__ constexpr int groups(AttentionTiling t) { return t.mma_sync_groups; }
    static __host__ __device__ constexpr int threads(AttentionTiling t) { return 128 * t.mma_sync_groups; }
    static __host__ __device__ constexpr int blocks_per_sm(AttentionTiling t) { return t.mma_sync_blocks_per_sm; }
    static constexpr bool OUT_IN_SMEM = false;  // dq's own blocks of out: shared memory may be small
    static __device__ constexpr int stages(int HS) { return mma_sync_stages(HS); }

    // 64 tokens from t0 of a head, zeros for those that do not exist. All threads call.
    template <int HS, int THREADS>
    static __device__ void load_block(uint32_t to, const AttentionInput &x, int b, int head, int t0, uint32_t /*barrier*/) {
        for (int i = threadIdx.x; i < ROWS * HS / 8; i += THREADS) {
            int row = i / (HS / 8), chunk = i % (HS / 8);
            bool valid = t0 + row >= 0 && t0 + row < x.T;
            const bf16 *from = x.data + ((int64_t)b * x.T + (valid ? t0 + row : 0)) * x.stride + head * HS + chunk * 8;
            ptx_cp_async_16(to + chunk_offset(row, chunk), from, valid);
        }
    }

    template <int THREADS>
    static __device__ void load_stats(uint32_t to, const float *from, uint32_t /*barrier*/) {
        for (int i = threadIdx.x; i < STATS_BYTES / 16; i += THREADS) ptx_cp_async_16(to + 16 * i, from + 4 * i, true);
    }

    // c = a b^T, for (64, HS) blocks in shared memory.
    template <int HS>
    static __device__ void product_nt(Product &c, uint32_t a, uint32_t b) {
        int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        for (int i = 0; i < 8; i++) for (int e = 0; e < 4; e++) c[i][e] = 0;
        for (int k = 0; k < HS / 16; k++) {
            uint32_t tile = k / 4 * TILE_BYTES, x[4], y[4];
            ptx_ldmatrix(x, a + tile + tile_offset(16 * warp + lane % 16, k % 4 * 2 + lane / 16));
            for (int i = 0; i < 8; i += 2) {
                ptx_ldmatrix(y, b + tile + tile_offset(8 * i + lane / 16 * 8 + lane % 8, k % 4 * 2 + lane / 8 % 2));
                ptx_mma(c[i], x, y[0], y[1]);
                ptx_mma(c[i + 1], x, y[2], y[3]);
            }
        }
    }

    // c (64, HS) += a (64, 64) b (64, HS).
    template <int HS>
    static __device__ void product_nn(Product (&c)[HS / 64], const Factor &a, uint32_t b) {
        int lane = threadIdx.x % 32;
        for (int k = 0; k < 4; k++)
            for (int tile = 0; tile < HS / 64; tile++)
                for (int i = 0; i < 8; i += 2) {
                    uint32_t y[4];
                    ptx_ldmatrix_trans(y, b + tile * TILE_BYTES + tile_offset(16 * k + lane % 16, i + lane / 16));
                    ptx_mma(c[tile][i], a[k], y[0], y[1]);
                    ptx_mma(c[tile][i + 1], a[k], y[2], y[3]);
                }
    }

    static __device__ void commit() {}                              // these products are done when they return
    template <int pending> static __device__ void wait() {}
    static __device__ void settle(Product &) {}

    // What comes into shared memory: for each work its own blocks, then a ring of blocks. load_own(group, barrier) and
    // load(n, stage, barrier) fetch them. All threads call begin() at each work and next() for each of its blocks.
    template <int STAGES, int GROUPS>
    struct Pipe {
        int n, total;
        __device__ Pipe(uint32_t /*barriers*/, int /*group*/) {}
        template <class LoadOwn, class Load>
        __device__ void feed(int /*own_bytes*/, LoadOwn, int /*bytes*/, int /*total*/, Load) {}

        template <class LoadOwn, class Load>
        __device__ void begin(LoadOwn load_own, int blocks, Load load) {
            n = 0, total = blocks;
            __syncthreads();            // the work before is done
            for (int g = 0; g < GROUPS; g++) load_own(g, 0);
            load(0, 0, 0);
        }
        // The stage of the next block, which is there. The blocks before the latest are no longer read.
        template <class Load>
        __device__ int next(Load load) {
            int stage = n++ % STAGES;
            ptx_cp_async_wait_all();
            __syncthreads();
            if (n < total) load(n, n % STAGES, 0);
            return stage;
        }
        __device__ void release(int /*stage*/) {}
        __device__ void release_own() {}
    };

    static __device__ void feeder_registers() {}
    template <int GROUPS> static __device__ void worker_registers() {}
};

// ---------------------------------------------------------------------------------------------------------------------
// Primitives for sm_90a
#if PTX_SM90A

struct Wgmma {
    static __host__ __device__ constexpr int groups(AttentionTiling t) { return t.wgmma_groups; }
    static __host__ __device__ constexpr int threads(AttentionTiling t) { return 128 * t.wgmma_groups + 128; }  // one group only fetches
    static __host__ __device__ constexpr int blocks_per_sm(AttentionTiling) { return 1; }
    static constexpr bool OUT_IN_SMEM = true;
    static __device__ constexpr int stages(int HS) { return wgmma_stages(HS); }

    // One thread calls.
    template <int HS, int THREADS>
    static __device__ void load_block(uint32_t to, const AttentionInput &x, int b, int head, int t0, uint32_t barrier) {
        for (int tile = 0; tile < HS / 64; tile++) ptx_tensor_load(to + tile * TILE_BYTES, &x.map, tile * 64, head, t0, b, barrier);
    }

    template <int THREADS>
    static __device__ void load_stats(uint32_t to, const float *from, uint32_t barrier) { ptx_bulk_load(to, from, STATS_BYTES, barrier); }

    template <int HS>
    static __device__ void product_nt(Product &c, uint32_t a, uint32_t b) {
        uint64_t a_tile = ptx_wgmma_descriptor(a), b_tile = ptx_wgmma_descriptor(b);
        ptx_wgmma_fence();
        for (int k = 0; k < HS / 16; k++) {
            int at = (k / 4 * TILE_BYTES + k % 4 * 32) / 16;
            ptx_wgmma_smem(c, a_tile + at, b_tile + at, k > 0);
        }
    }

    template <int HS>
    static __device__ void product_nn(Product (&c)[HS / 64], const Factor &a, uint32_t b) {
        uint64_t b_tile = ptx_wgmma_descriptor(b);
        ptx_wgmma_fence();
        for (int k = 0; k < 4; k++)
            for (int tile = 0; tile < HS / 64; tile++)
                ptx_wgmma_registers(c[tile], a[k], b_tile + (tile * TILE_BYTES + k * 16 * 128) / 16);
    }

    static __device__ void commit() { ptx_wgmma_commit(); }
    template <int pending> static __device__ void wait() { ptx_wgmma_wait<pending>(); }

    // The compiler must not read c before the wait() above this, nor put off to after the wait() below what makes c.
    static __device__ void settle(Product &c) {
        for (int i = 0; i < 8; i++) for (int e = 0; e < 4; e++) asm volatile("" : "+f"(c[i][e]) :: "memory");
    }

    template <int STAGES, int GROUPS>
    struct Pipe {
        uint32_t barriers;              // full[STAGES], free[STAGES], own_full[GROUPS], own_free[GROUPS]
        int group, stage = -1;          // of this group, or of what is fed
        uint32_t parity = 1, own_parity = 1;
        __device__ uint32_t full(int stage) { return barriers + 8 * stage; }
        __device__ uint32_t free(int stage) { return barriers + 8 * (STAGES + stage); }
        __device__ uint32_t own_full(int group) { return barriers + 8 * (2 * STAGES + group); }
        __device__ uint32_t own_free(int group) { return barriers + 8 * (2 * STAGES + GROUPS + group); }

        __device__ Pipe(uint32_t barriers, int group) : barriers(barriers), group(group) {
            if (threadIdx.x == 0) {
                for (int s = 0; s < STAGES; s++) ptx_barrier_init(full(s), 1), ptx_barrier_init(free(s), 4 * PTX_ARRIVING_LANES * GROUPS);
                for (int g = 0; g < GROUPS; g++) ptx_barrier_init(own_full(g), 1), ptx_barrier_init(own_free(g), 4 * PTX_ARRIVING_LANES);
                ptx_barrier_init_fence();
            }
            __syncthreads();
        }
        __device__ void advance() {
            if (++stage == STAGES) stage = 0;
            if (stage == 0) parity ^= 1;
        }

        // One thread of the extra group calls, for each work. The first waits pass at once: the phase before phase 0 counts as
        // complete. Two blocks go ahead of the own ones, which have to wait for the groups to be done with the work before.
        template <class LoadOwn, class Load>
        __device__ void feed(int own_bytes, LoadOwn load_own, int bytes, int total, Load load) {
            for (int n = 0; n < total; n++) {
                advance();
                ptx_barrier_wait(free(stage), parity ^ 1);
                ptx_barrier_arrive_expect(full(stage), bytes);
                load(n, stage, full(stage));
                if (n == min(1, total - 1)) {
                    for (int g = 0; g < GROUPS; g++) {
                        ptx_barrier_wait(own_free(g), own_parity);
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
        // This group no longer reads the stage; the work's own blocks. A warp says so once all its lanes have read what they read by
        // plain loads: dk/dv's stats, and dout and out for delta. An arrival alone speaks for its own thread only.
        __device__ void release(int stage) { release_(free(stage)); }
        __device__ void release_own() { release_(own_free(group)); }
        __device__ void release_(uint32_t barrier) {
            __syncwarp();
            if (threadIdx.x % 32 < PTX_ARRIVING_LANES) ptx_barrier_arrive(barrier);
        }
    };

    // A multiprocessor has 512 registers for a thread of each group; at first the groups have equal parts, multiples of 8.
    static __device__ void feeder_registers() { ptx_give_registers<24>(); }
    template <int GROUPS> static __device__ void worker_registers() {
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

// Shared memory, as the launcher counts it: each group's own blocks, then the ring's, then the stats, then the barriers.
constexpr size_t attention_smem_bytes(int HS, int groups, int own_blocks, int stages, bool stats) {
    return (size_t)(groups * own_blocks + 2 * stages) * block_bytes(HS) + (stats ? stages * STATS_BYTES : 0) + 2 * (stages + groups) * 8;
}

// ---------------------------------------------------------------------------------------------------------------------
// Helpers of the kernels

constexpr float LOG2_E = 1.44269504f;

// Writes the warp's 16 of 64 rows as bf16. out points to row 0 of the block, `rows` of which exist; scale is for rows lane / 4
// and lane / 4 + 8. The four lanes that share a row swap 4-byte pieces until each has 16 bytes in a row.
template <int HS>
__device__ inline void store_rows(bf16 *out, int64_t stride, int rows, const Product (&x)[HS / 64], float scale0, float scale1) {
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    bool odd = lane & 1, high = lane & 2;
    for (int tile = 0; tile < HS / 64; tile++)
        for (int i = 0; i < 8; i += 4)
            for (int r = 0; r < 2; r++) {
                float scale = r ? scale1 : scale0;
                uint32_t y[4];          // of this lane's columns in chunks i ... i + 3; then of chunk i + lane % 4, all columns
                for (int k = 0; k < 4; k++) y[k] = ptx_pack_bf16(x[tile][i + k][2 * r] * scale, x[tile][i + k][2 * r + 1] * scale);
                for (int k = 0; k < 4; k += 2) {
                    uint32_t other = __shfl_xor_sync(0xffffffff, odd ? y[k] : y[k + 1], 1);
                    if (odd) y[k] = other; else y[k + 1] = other;
                }
                for (int k = 0; k < 2; k++) {
                    uint32_t other = __shfl_xor_sync(0xffffffff, high ? y[k] : y[k + 2], 2);
                    if (high) y[k] = other; else y[k + 2] = other;
                }
                if (row + 8 * r < rows)
                    *(uint4 *)(out + (row + 8 * r) * stride + tile * 64 + (i + lane % 4) * 8) = make_uint4(y[0], y[1], y[2], y[3]);
            }
}

// The compiler then knows that it is one number for the whole warp, as the warpgroup's instructions require.
__device__ inline int group_of_4_warps() { return __shfl_sync(0xffffffff, threadIdx.x / 128, 0); }

// The works of a thread block, one in each round: tile of `tiles` (0 the longest), head of `heads`, sequence b. The tiles of
// one head are done at the same time, so that its keys come from memory once. Every second round runs backwards, and twice the
// grid is a multiple of tiles where it can be: a thread block that had a long work then has a short one.
struct AttentionWork {
    int tile, head, b;
    __device__ bool find(int round, int tiles, int heads, int B) {
        unsigned n = round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
        tile = n % tiles, head = n / tiles % heads, b = n / tiles / heads;
        return b < B;
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Forward

struct AttentionForwardArgs {
    AttentionInput q, k, v;
    bf16 *out;              // (B, T, NH, HS)
    float *lse;             // (B, NH, T)
    int B, T, NH, NKV;
};

template <AttentionBackend backend, int HS>
__global__ void __launch_bounds__(Machine<backend>::threads(forward_tiling(HS)), Machine<backend>::blocks_per_sm(forward_tiling(HS)))
attention_forward_kernel(const __grid_constant__ AttentionForwardArgs a) {
    typedef Machine<backend> M;
    constexpr int GROUPS = M::groups(forward_tiling(HS)), STAGES = M::stages(HS), THREADS = 128 * GROUPS, BLOCK = block_bytes(HS);
    extern __shared__ __align__(1024) unsigned char smem[];
    uint32_t q_smem = smem_address(smem), k_smem = q_smem + GROUPS * BLOCK, v_smem = k_smem + STAGES * BLOCK;

    int group = group_of_4_warps(), lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    int token_blocks = ceil_div(a.T, ROWS), tiles = ceil_div(token_blocks, GROUPS), sharing = a.NH / a.NKV;
    AttentionWork at;
    int first, total, turn;                                 // the first block of queries, which may be before the start; blocks of keys
    auto find_work = [&](int round) {
        if (!at.find(round, tiles, a.NH, a.B)) return false;
        first = token_blocks - (at.tile + 1) * GROUPS, total = first + GROUPS, turn = round % GROUPS;
        return true;
    };
    auto block_of = [&](int g) { return first + (g + turn) % GROUPS; };     // the groups take turns at the longer rows
    auto load_own = [&](int g, uint32_t barrier) {
        M::template load_block<HS, THREADS>(q_smem + g * BLOCK, a.q, at.b, at.head, block_of(g) * ROWS, barrier);
    };
    auto load = [&](int n, int stage, uint32_t barrier) {
        M::template load_block<HS, THREADS>(k_smem + stage * BLOCK, a.k, at.b, at.head / sharing, n * ROWS, barrier);
        M::template load_block<HS, THREADS>(v_smem + stage * BLOCK, a.v, at.b, at.head / sharing, n * ROWS, barrier);
    };
    typename M::template Pipe<STAGES, GROUPS> pipe(v_smem + STAGES * BLOCK, group);
    if (group == GROUPS) {
        M::feeder_registers();
        if (threadIdx.x == THREADS) for (int round = 0; find_work(round); round++) pipe.feed(BLOCK, load_own, 2 * BLOCK, total, load);
        return;
    }
    M::template worker_registers<GROUPS>();

    // Scores times `scale` are in units of log 2, for exp2. top is the row's reference for exponents: its maximum, up to
    // `slack` ago; p = 2^8 at most is harmless, and rows seldom have to be rescaled after their first blocks.
    const float scale = LOG2_E / sqrtf((float)HS), slack = 8.0f / scale;
    const uint32_t q_own = q_smem + group * BLOCK;
    for (int round = 0; find_work(round); round++) {
        int own = block_of(group);                          // this group's block of queries
        int mine = max(own + 1, 1);                         // blocks of keys that it needs (before the start it runs along for one)
        float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, rescale[2];
        Product s, out[HS / 64] = {};
        Factor p;
        for (int t = 0; t < HS / 64; t++) M::settle(out[t]);

        // s becomes p, in fp32. True where what was summed so far, with the former top, has to be rescaled.
        auto softmax = [&](int j) {
            if (j == own)                                   // the diagonal: future keys do not count
                for (int i = 0; i < 8; i++) for (int e = 0; e < 4; e++)
                    if (8 * i + lane % 4 * 2 + e % 2 > row + e / 2 * 8) s[i][e] = -INFINITY;
            float m[4] = {s[0][0], s[0][1], s[0][2], s[0][3]}, highest[2];
            for (int i = 1; i < 8; i++) for (int e = 0; e < 4; e++) m[e] = fmaxf(m[e], s[i][e]);
            for (int r = 0; r < 2; r++) highest[r] = warp_max<4>(fmaxf(m[2 * r], m[2 * r + 1]));
            bool grows = __any_sync(0xffffffff, highest[0] > top[0] + slack || highest[1] > top[1] + slack);
            if (grows)
                for (int r = 0; r < 2; r++) {
                    float higher = fmaxf(top[r], highest[r]);
                    rescale[r] = ptx_exp2((top[r] - higher) * scale);
                    sum[r] *= rescale[r];
                    top[r] = higher;
                }
            float shift[2] = {top[0] * scale, top[1] * scale};
            for (int i = 0; i < 8; i++) for (int e = 0; e < 4; e++) {
                s[i][e] = ptx_exp2(fmaf(s[i][e], scale, -shift[e / 2]));
                sum[e / 2] += s[i][e];
            }
            M::settle(s);
            return grows;
        };

        pipe.begin(load_own, total, load);
        int stage = pipe.next(load);
        M::template product_nt<HS>(s, q_own, k_smem + stage * BLOCK);
        M::commit();
        M::template wait<0>();
        M::settle(s);
        softmax(0);
        to_factor(p, s);
        for (int j = 1; j < mine; j++) {
            int before = stage;
            stage = pipe.next(load);
            M::template product_nt<HS>(s, q_own, k_smem + stage * BLOCK);
            M::commit();
            M::template product_nn<HS>(out, p, v_smem + before * BLOCK);
            M::commit();
            M::template wait<1>();                          // s is there; the product with v runs on
            M::settle(s);
            bool grows = softmax(j);
            if (grows) {
                M::template wait<0>();
                for (int t = 0; t < HS / 64; t++) {
                    M::settle(out[t]);
                    for (int i = 0; i < 8; i++) for (int e = 0; e < 4; e++) out[t][i][e] *= rescale[e / 2];
                }
            }
            M::template wait<0>();                          // after a branch, or ptxas moves this up before the exponentials
            for (int t = 0; t < HS / 64; t++) M::settle(out[t]);
            pipe.release(before);
            to_factor(p, s);
        }
        pipe.release_own();
        M::template product_nn<HS>(out, p, v_smem + stage * BLOCK);
        M::commit();
        M::template wait<0>();
        for (int t = 0; t < HS / 64; t++) M::settle(out[t]);
        pipe.release(stage);
        for (int j = mine; j < total; j++) pipe.release(pipe.next(load));      // blocks that only later groups need
        if (own < 0) continue;

        for (int r = 0; r < 2; r++) {
            sum[r] = warp_sum<4>(sum[r]);
            int t = own * ROWS + row + 8 * r;
            if (lane % 4 == 0 && t < a.T) a.lse[((int64_t)at.b * a.NH + at.head) * a.T + t] = top[r] / sqrtf((float)HS) + logf(sum[r]);
        }
        int64_t stride = (int64_t)a.NH * HS;
        bf16 *out_own = a.out + ((int64_t)at.b * a.T + own * ROWS) * stride + at.head * HS;
        store_rows<HS>(out_own, stride, a.T - own * ROWS, out, 1 / sum[0], 1 / sum[1]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward: dq, and on the way the stats of each query for the kernel after it

struct AttentionDqArgs {
    AttentionInput q, k, v, dout, out;
    const float *lse;       // (B, NH, T)
    float *stats;           // (B, NH, blocks of 64 tokens, 2, 64): lse * log2(e) and delta; +inf and 0 past the end
    bf16 *dq;               // (B, T, NH, HS)
    int64_t dq_stride;
    int B, T, NH, NKV;
};

// delta of the thread's rows: the four lanes that share a row share its chunks. out_chunk(row, chunk) are 8 elements of out.
template <int HS, class Chunk>
__device__ inline void find_delta(float (&delta)[2], const unsigned char *dout_block, Chunk out_chunk) {
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    for (int r = 0; r < 2; r++) {
        float x = 0;
        for (int chunk = lane % 4; chunk < HS / 8; chunk += 4) {
            Packed16<bf16> g = load16((const bf16 *)(dout_block + chunk_offset(row + 8 * r, chunk))), o = out_chunk(row + 8 * r, chunk);
            for (int i = 0; i < 8; i++) x += (float)g[i] * (float)o[i];
        }
        delta[r] = warp_sum<4>(x);
    }
}

template <AttentionBackend backend, int HS>
__global__ void __launch_bounds__(Machine<backend>::threads(dq_tiling(HS)), Machine<backend>::blocks_per_sm(dq_tiling(HS)))
attention_dq_kernel(const __grid_constant__ AttentionDqArgs a) {
    typedef Machine<backend> M;
    constexpr int GROUPS = M::groups(dq_tiling(HS)), STAGES = M::stages(HS), THREADS = 128 * GROUPS, BLOCK = block_bytes(HS);
    extern __shared__ __align__(1024) unsigned char smem[];
    uint32_t q_smem = smem_address(smem), dout_smem = q_smem + GROUPS * BLOCK, out_smem = dout_smem + GROUPS * BLOCK;
    uint32_t k_smem = M::OUT_IN_SMEM ? out_smem + GROUPS * BLOCK : out_smem, v_smem = k_smem + STAGES * BLOCK;

    int group = group_of_4_warps(), lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    int token_blocks = ceil_div(a.T, ROWS), tiles = ceil_div(token_blocks, GROUPS), sharing = a.NH / a.NKV;
    AttentionWork at;
    int first, total, turn;                                 // as in the forward kernel
    auto find_work = [&](int round) {
        if (!at.find(round, tiles, a.NH, a.B)) return false;
        first = token_blocks - (at.tile + 1) * GROUPS, total = first + GROUPS, turn = round % GROUPS;
        return true;
    };
    auto block_of = [&](int g) { return first + (g + turn) % GROUPS; };     // the groups take turns at the longer rows
    auto load_own = [&](int g, uint32_t barrier) {
        M::template load_block<HS, THREADS>(q_smem + g * BLOCK, a.q, at.b, at.head, block_of(g) * ROWS, barrier);
        M::template load_block<HS, THREADS>(dout_smem + g * BLOCK, a.dout, at.b, at.head, block_of(g) * ROWS, barrier);
        if (M::OUT_IN_SMEM)
            M::template load_block<HS, THREADS>(out_smem + g * BLOCK, a.out, at.b, at.head, block_of(g) * ROWS, barrier);
    };
    auto load = [&](int n, int stage, uint32_t barrier) {
        M::template load_block<HS, THREADS>(k_smem + stage * BLOCK, a.k, at.b, at.head / sharing, n * ROWS, barrier);
        M::template load_block<HS, THREADS>(v_smem + stage * BLOCK, a.v, at.b, at.head / sharing, n * ROWS, barrier);
    };
    typename M::template Pipe<STAGES, GROUPS> pipe(v_smem + STAGES * BLOCK, group);
    if (group == GROUPS) {
        M::feeder_registers();
        if (threadIdx.x == THREADS)
            for (int round = 0; find_work(round); round++) pipe.feed((M::OUT_IN_SMEM ? 3 : 2) * BLOCK, load_own, 2 * BLOCK, total, load);
        return;
    }
    M::template worker_registers<GROUPS>();

    const float scale = LOG2_E / sqrtf((float)HS);
    const uint32_t q_own = q_smem + group * BLOCK, dout_own = dout_smem + group * BLOCK;
    for (int round = 0; find_work(round); round++) {
        int own = block_of(group), mine = max(own + 1, 1);
        int64_t head_index = (int64_t)at.b * a.NH + at.head;
        float lse[2] = {INFINITY, INFINITY}, delta[2];      // past the end: p = 0
        for (int r = 0; r < 2; r++) {
            int t = own * ROWS + row + 8 * r;
            if (t >= 0 && t < a.T) lse[r] = a.lse[head_index * a.T + t] * LOG2_E;
        }

        Product s, dp, dq[HS / 64] = {};
        Factor ds;
        for (int t = 0; t < HS / 64; t++) M::settle(dq[t]);
        auto find_p = [&](int j) {                          // s becomes p, in fp32
            M::settle(s);
            for (int i = 0; i < 8; i++) for (int e = 0; e < 4; e++) s[i][e] = ptx_exp2(fmaf(s[i][e], scale, -lse[e / 2]));
            if (j == own)                                   // this branch also keeps ptxas from waiting before the exponentials
                for (int i = 0; i < 8; i++) for (int e = 0; e < 4; e++)
                    if (8 * i + lane % 4 * 2 + e % 2 > row + e / 2 * 8) s[i][e] = 0;
            M::settle(s);
        };
        auto find_ds = [&]() {                              // dp becomes ds, in fp32
            M::settle(dp);
            for (int i = 0; i < 8; i++) for (int e = 0; e < 4; e++) dp[i][e] = s[i][e] * (dp[i][e] - delta[e / 2]);
        };

        pipe.begin(load_own, total, load);
        int stage = pipe.next(load);
        M::template product_nt<HS>(s, q_own, k_smem + stage * BLOCK);
        M::commit();
        M::template product_nt<HS>(dp, dout_own, v_smem + stage * BLOCK);
        M::commit();
        find_delta<HS>(delta, smem + (dout_own - q_smem), [&](int r, int chunk) {
            if (M::OUT_IN_SMEM) return load16((const bf16 *)(smem + (out_smem - q_smem) + group * BLOCK + chunk_offset(r, chunk)));
            int t = own * ROWS + r;
            if (t < 0 || t >= a.T) return Packed16<bf16>{};
            return load16(a.out.data + ((int64_t)at.b * a.T + t) * a.out.stride + at.head * HS + chunk * 8);
        });
        if (own >= 0 && lane % 4 == 0)
            for (int r = 0; r < 2; r++) {
                float *stats = a.stats + (head_index * token_blocks + own) * 2 * ROWS + row + 8 * r;
                stats[0] = lse[r], stats[ROWS] = delta[r];
            }
        M::template wait<1>();
        find_p(0);
        M::template wait<0>();
        find_ds();
        to_factor(ds, dp);
        for (int j = 1; j < mine; j++) {
            int before = stage;
            stage = pipe.next(load);
            M::template product_nt<HS>(s, q_own, k_smem + stage * BLOCK);
            M::commit();
            M::template product_nt<HS>(dp, dout_own, v_smem + stage * BLOCK);
            M::commit();
            M::template product_nn<HS>(dq, ds, k_smem + before * BLOCK);
            M::commit();
            M::template wait<2>();
            find_p(j);
            M::template wait<1>();
            find_ds();
            M::template wait<0>();
            for (int t = 0; t < HS / 64; t++) M::settle(dq[t]);
            pipe.release(before);
            to_factor(ds, dp);
        }
        pipe.release_own();
        M::template product_nn<HS>(dq, ds, k_smem + stage * BLOCK);
        M::commit();
        M::template wait<0>();
        for (int t = 0; t < HS / 64; t++) M::settle(dq[t]);
        pipe.release(stage);
        for (int j = mine; j < total; j++) pipe.release(pipe.next(load));
        if (own < 0) continue;

        const float unit = 1 / sqrtf((float)HS);
        bf16 *dq_own = a.dq + ((int64_t)at.b * a.T + own * ROWS) * a.dq_stride + at.head * HS;
        store_rows<HS>(dq_own, a.dq_stride, a.T - own * ROWS, dq, unit, unit);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward: dk and dv. Keys are the rows here and queries the columns: all products are the transposed ones.

struct AttentionDkdvArgs {
    AttentionInput q, k, v, dout;
    const float *stats;     // (B, NH, blocks of 64 tokens, 2, 64), from the kernel above
    bf16 *dk, *dv;          // (B, T, NKV, HS)
    int64_t dk_stride, dv_stride;
    int B, T, NH, NKV;
};

template <AttentionBackend backend, int HS>
__global__ void __launch_bounds__(Machine<backend>::threads(dkdv_tiling(HS)), Machine<backend>::blocks_per_sm(dkdv_tiling(HS)))
attention_dkdv_kernel(const __grid_constant__ AttentionDkdvArgs a) {
    typedef Machine<backend> M;
    constexpr int GROUPS = M::groups(dkdv_tiling(HS)), STAGES = M::stages(HS), THREADS = 128 * GROUPS, BLOCK = block_bytes(HS);
    extern __shared__ __align__(1024) unsigned char smem[];
    uint32_t k_smem = smem_address(smem), v_smem = k_smem + GROUPS * BLOCK;
    uint32_t q_smem = v_smem + GROUPS * BLOCK, dout_smem = q_smem + STAGES * BLOCK, stats_smem = dout_smem + STAGES * BLOCK;

    int group = group_of_4_warps(), lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    int token_blocks = ceil_div(a.T, ROWS), tiles = ceil_div(token_blocks, GROUPS), sharing = a.NH / a.NKV;
    AttentionWork at;
    int first, per_head, turn;                              // the first block of keys; blocks of queries of each sharing head
    auto find_work = [&](int round) {
        if (!at.find(round, tiles, a.NKV, a.B)) return false;
        first = at.tile * GROUPS, per_head = token_blocks - first, turn = round % GROUPS;
        return true;
    };
    auto block_of = [&](int g) { return first + (g + turn) % GROUPS; };     // the groups take turns at the longer rows
    auto load_own = [&](int g, uint32_t barrier) {
        M::template load_block<HS, THREADS>(k_smem + g * BLOCK, a.k, at.b, at.head, block_of(g) * ROWS, barrier);
        M::template load_block<HS, THREADS>(v_smem + g * BLOCK, a.v, at.b, at.head, block_of(g) * ROWS, barrier);
    };
    auto load = [&](int n, int stage, uint32_t barrier) {   // of each head, the last queries first: later groups end sooner
        int head = at.head * sharing + n / per_head, block = token_blocks - 1 - n % per_head;
        M::template load_block<HS, THREADS>(q_smem + stage * BLOCK, a.q, at.b, head, block * ROWS, barrier);
        M::template load_block<HS, THREADS>(dout_smem + stage * BLOCK, a.dout, at.b, head, block * ROWS, barrier);
        const float *stats = a.stats + (((int64_t)at.b * a.NH + head) * token_blocks + block) * 2 * ROWS;
        M::template load_stats<THREADS>(stats_smem + stage * STATS_BYTES, stats, barrier);
    };
    typename M::template Pipe<STAGES, GROUPS> pipe(stats_smem + STAGES * STATS_BYTES, group);
    if (group == GROUPS) {
        M::feeder_registers();
        if (threadIdx.x == THREADS)
            for (int round = 0; find_work(round); round++)
                pipe.feed(2 * BLOCK, load_own, 2 * BLOCK + STATS_BYTES, sharing * per_head, load);
        return;
    }
    M::template worker_registers<GROUPS>();

    const float scale = LOG2_E / sqrtf((float)HS);
    const uint32_t k_own = k_smem + group * BLOCK, v_own = v_smem + group * BLOCK;
    const float *stats = (const float *)(smem + (stats_smem - k_smem)) + lane % 4 * 2;      // of this thread's first columns
    for (int round = 0; find_work(round); round++) {
        int own = block_of(group);
        int mine = own < token_blocks ? token_blocks - own : 1;     // blocks that this group needs of each head's per_head
        Product s, dp, dk[HS / 64] = {}, dv[HS / 64] = {};
        Factor p, ds;
        for (int t = 0; t < HS / 64; t++) M::settle(dk[t]), M::settle(dv[t]);

        float2 stat[8];                                     // of this thread's columns: lse, then delta; read before waiting
        auto read_stats = [&](const float *from) { for (int i = 0; i < 8; i++) stat[i] = *(const float2 *)(from + 8 * i); };
        auto find_p = [&](int block) {                      // s becomes p, in fp32
            M::settle(s);
            for (int i = 0; i < 8; i++) for (int e = 0; e < 4; e++)
                s[i][e] = ptx_exp2(fmaf(s[i][e], scale, -(e % 2 ? stat[i].y : stat[i].x)));
            if (block == own)                               // this branch also keeps ptxas from waiting before the exponentials
                for (int i = 0; i < 8; i++) for (int e = 0; e < 4; e++)
                    if (8 * i + lane % 4 * 2 + e % 2 < row + e / 2 * 8) s[i][e] = 0;
            M::settle(s);
        };
        auto find_ds = [&](int stage) {                     // from p and dp; then both are ready as factors
            M::template product_nt<HS>(dp, v_own, dout_smem + stage * BLOCK);
            M::commit();
            read_stats(stats + stage * 2 * ROWS + ROWS);
            M::template wait<0>();
            M::settle(dp);
            for (int i = 0; i < 8; i++) for (int e = 0; e < 4; e++)
                dp[i][e] = s[i][e] * (dp[i][e] - (e % 2 ? stat[i].y : stat[i].x));
            to_factor(ds, dp);
            to_factor(p, s);
        };

        pipe.begin(load_own, sharing * per_head, load);
        for (int g = 0; g < sharing; g++) {
            int stage = pipe.next(load);
            M::template product_nt<HS>(s, k_own, q_smem + stage * BLOCK);
            M::commit();
            read_stats(stats + stage * 2 * ROWS);
            M::template wait<0>();
            find_p(token_blocks - 1);
            find_ds(stage);
            for (int n = 1; n < mine; n++) {
                int before = stage;
                stage = pipe.next(load);
                M::template product_nt<HS>(s, k_own, q_smem + stage * BLOCK);
                M::commit();
                M::template product_nn<HS>(dv, p, dout_smem + before * BLOCK);
                M::template product_nn<HS>(dk, ds, q_smem + before * BLOCK);
                M::commit();
                read_stats(stats + stage * 2 * ROWS);
                M::template wait<1>();
                find_p(token_blocks - 1 - n);
                M::template wait<0>();
                for (int t = 0; t < HS / 64; t++) M::settle(dk[t]), M::settle(dv[t]);
                pipe.release(before);
                find_ds(stage);
            }
            if (g == sharing - 1) pipe.release_own();
            M::template product_nn<HS>(dv, p, dout_smem + stage * BLOCK);
            M::template product_nn<HS>(dk, ds, q_smem + stage * BLOCK);
            M::commit();
            M::template wait<0>();
            for (int t = 0; t < HS / 64; t++) M::settle(dk[t]), M::settle(dv[t]);
            pipe.release(stage);
            for (int n = mine; n < per_head; n++) pipe.release(pipe.next(load));       // blocks that only earlier groups need
        }
        if (own >= token_blocks) continue;

        const float unit = 1 / sqrtf((float)HS);
        int64_t token = (int64_t)at.b * a.T + own * ROWS;
        store_rows<HS>(a.dk + token * a.dk_stride + at.head * HS, a.dk_stride, a.T - own * ROWS, dk, unit, unit);
        store_rows<HS>(a.dv + token * a.dv_stride + at.head * HS, a.dv_stride, a.T - own * ROWS, dv, 1, 1);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

// The copy engine's description of x (B, T, heads, HS), in boxes of one tile.
inline CUtensorMap attention_tensor_map_(const bf16 *x, const AttentionShape &s, int heads, int64_t stride) {
    typedef CUresult (*Encode)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *,
                               const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                               CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static const Encode encode = [] {       // through the runtime, so that programs need no link to the driver's library
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
    cuuint64_t sizes[4] = {(cuuint64_t)s.HS, (cuuint64_t)heads, (cuuint64_t)s.T, (cuuint64_t)s.B};
    cuuint64_t strides[3] = {(cuuint64_t)s.HS * 2, (cuuint64_t)stride * 2, (cuuint64_t)s.T * stride * 2};   // bytes, of the last three
    cuuint32_t box[4] = {64, 1, ROWS, 1}, steps[4] = {1, 1, 1, 1};
    CUresult rc = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, (void *)x, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                         CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (rc != CUDA_SUCCESS)
        die(EXIT_SYSTEM, "attention: no tensor map for B=%d T=%d heads=%d HS=%d stride=%lld at %p (CUresult %d)", s.B, s.T, heads, s.HS,
            (long long)stride, (const void *)x, (int)rc);
    return map;
}

inline AttentionInput attention_input_(const bf16 *x, const AttentionShape &s, int heads, int64_t stride, bool hopper) {
    if (stride < (int64_t)heads * s.HS || stride % 8 != 0 || (uintptr_t)x % 16 != 0)
        die(EXIT_SYSTEM, "attention: tokens at %p, %lld elements apart, %d heads of %d: need 16-byte steps and no overlap", (const void *)x,
            (long long)stride, heads, s.HS);
    AttentionInput in = {};
    if (hopper) in.map = attention_tensor_map_(x, s, heads, stride);
    in.data = x, in.stride = stride, in.T = s.T;
    return in;
}

inline void attention_check_shape_(const AttentionShape &s) {
    if (s.B < 1 || s.T < 1 || s.NKV < 1 || s.NH < 1 || s.NH % s.NKV != 0 || (s.HS != 64 && s.HS != 128) ||
        (int64_t)s.B * s.NH * ceil_div(s.T, ROWS) > INT32_MAX)
        die(EXIT_SYSTEM, "attention: B=%d T=%d heads=%d key/value heads=%d head size=%d: need heads a multiple of key/value heads, "
            "head size 64 or 128, and at most 2^31 blocks of %d tokens", s.B, s.T, s.NH, s.NKV, s.HS, ROWS);
}

// How a kernel is to be launched. Whether the code that this device runs is for sm_90a shows in the threads that it takes.
// There the thread blocks stay for many works; elsewhere each does one.
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
    plan.stages = plan.hopper ? wgmma_stages(s.HS) : mma_sync_stages(s.HS);
    plan.threads = 128 * plan.groups + (plan.hopper ? 128 : 0);
    int64_t tiles = ceil_div(ceil_div(s.T, ROWS), plan.groups), works = tiles * heads * s.B;
    plan.grid = (unsigned)works;
    if (plan.hopper) {
        int processors = device_attribute(cudaDevAttrMultiProcessorCount);
        int64_t unit = tiles % 2 ? tiles : tiles / 2;       // so that two rounds are whole heads, see AttentionWork
        if (works > processors) plan.grid = processors > unit ? processors - processors % unit : processors;
    }
    return plan;
}

template <AttentionBackend backend, int HS>
void attention_forward_(bf16 *out, float *lse, const bf16 *q, const bf16 *k, const bf16 *v, const AttentionShape &s, cudaStream_t stream) {
    auto kernel = attention_forward_kernel<backend, HS>;
    AttentionPlan plan = attention_plan_(kernel, forward_tiling(HS), s, s.NH);
    AttentionForwardArgs a = {attention_input_(q, s, s.NH, s.q_stride, plan.hopper), attention_input_(k, s, s.NKV, s.k_stride, plan.hopper),
                              attention_input_(v, s, s.NKV, s.v_stride, plan.hopper), out, lse, s.B, s.T, s.NH, s.NKV};
    launch(kernel, {plan.grid, plan.threads, attention_smem_bytes(HS, plan.groups, 1, plan.stages, false), stream}, a);
}

// out (B, T, NH, HS), lse (B, NH, T) from q (B, T, NH, HS), k and v (B, T, NKV, HS).
template <AttentionBackend backend = ATTENTION_BEST>
void attention_forward(bf16 *out, float *lse, const bf16 *q, const bf16 *k, const bf16 *v, const AttentionShape &s, cudaStream_t stream) {
    attention_check_shape_(s);
    if (s.HS == 64) attention_forward_<backend, 64>(out, lse, q, k, v, s, stream);
    else attention_forward_<backend, 128>(out, lse, q, k, v, s, stream);
}

// What attention_backward needs as scratch: two floats a query.
inline size_t attention_backward_scratch_bytes(const AttentionShape &s) {
    return (size_t)s.B * s.NH * ceil_div(s.T, ROWS) * STATS_BYTES;
}

template <AttentionBackend backend, int HS>
void attention_backward_(bf16 *dq, bf16 *dk, bf16 *dv, const bf16 *dout, const bf16 *out, const float *lse, const bf16 *q, const bf16 *k,
                         const bf16 *v, float *scratch, const AttentionShape &s, cudaStream_t stream) {
    auto dq_kernel = attention_dq_kernel<backend, HS>;
    auto dkdv_kernel = attention_dkdv_kernel<backend, HS>;
    AttentionPlan plan = attention_plan_(dq_kernel, dq_tiling(HS), s, s.NH);
    AttentionInput q_in = attention_input_(q, s, s.NH, s.q_stride, plan.hopper);
    AttentionInput k_in = attention_input_(k, s, s.NKV, s.k_stride, plan.hopper);
    AttentionInput v_in = attention_input_(v, s, s.NKV, s.v_stride, plan.hopper);
    AttentionInput dout_in = attention_input_(dout, s, s.NH, (int64_t)s.NH * HS, plan.hopper);

    AttentionInput out_in = attention_input_(out, s, s.NH, (int64_t)s.NH * HS, plan.hopper);

    AttentionDqArgs a = {q_in, k_in, v_in, dout_in, out_in, lse, scratch, dq, s.q_stride, s.B, s.T, s.NH, s.NKV};
    launch(dq_kernel, {plan.grid, plan.threads, attention_smem_bytes(HS, plan.groups, plan.hopper ? 3 : 2, plan.stages, false), stream}, a);

    plan = attention_plan_(dkdv_kernel, dkdv_tiling(HS), s, s.NKV);
    AttentionDkdvArgs c = {q_in, k_in, v_in, dout_in, scratch, dk, dv, s.k_stride, s.v_stride, s.B, s.T, s.NH, s.NKV};
    launch(dkdv_kernel, {plan.grid, plan.threads, attention_smem_bytes(HS, plan.groups, 2, plan.stages, true), stream}, c);
}

// dq (B, T, NH, HS), dk and dv (B, T, NKV, HS), overwritten, from dout (B, T, NH, HS) and what the forward pass read and made.
// scratch is 16-byte aligned.
template <AttentionBackend backend = ATTENTION_BEST>
void attention_backward(bf16 *dq, bf16 *dk, bf16 *dv, const bf16 *dout, const bf16 *out, const float *lse, const bf16 *q, const bf16 *k,
                        const bf16 *v, float *scratch, const AttentionShape &s, cudaStream_t stream) {
    attention_check_shape_(s);
    if (s.HS == 64) attention_backward_<backend, 64>(dq, dk, dv, dout, out, lse, q, k, v, scratch, s, stream);
    else attention_backward_<backend, 128>(dq, dk, dv, dout, out, lse, q, k, v, scratch, s, stream);
}

#endif
