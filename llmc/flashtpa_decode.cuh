// FlashTPA decoding: attention of the newest tokens over the factor cache (factor_cache.cuh). One pass reads each
// cached byte once for all heads, and k and v are never rebuilt. For a cached token m and a head h, with s over RK and
// u over RV (paper, section 4):
//
//     q[h]   = 1/RQ sum_r aQ[r,h] bQ[r]                           once, before the first page
//     L[h,m] = 1/(RK sqrt HS) sum_s aK[m,s,h] <bK[m,s], q[h]>
//     p      = exp(L - running max)
//     o[h]  += sum_u (p[h,m] aV[m,u,h]) bV[m,u]                   at the end   o[h] / (RV sum p)
//
// The paper sums <bK, bQ> first and over r last. Making q first costs the same products and saves a step per token. It
// also lets the same kernel serve dense queries (tpa_kvonly) and grouped heads (MHA, GQA, MQA: a = 1, RK = RV = 1).
//
// mla decodes in its absorbed form, which is MQA over the latent: q'[h] = [Wk_h^T q[h] | rotated part of q[h]] is given
// (latent_decode.cuh), a key is [latent | rotated part], a value is the latent. A page holds the latent once, and each
// warp uses it for logits and for values.
//
// Warps. A warp takes a page of 16 tokens (the rows of mma.sync) and a tile of up to 40 columns. A column is a head of
// a query; grouped kinds pack (query, head) pairs. What a warp loads of the page, and for e4m3 converts, serves all
// columns of its tile. Logits and p stay in registers; p is transposed once.
//
// Thread blocks. A group of warps has one warp per tile. The groups of a block take its pages in turn. One more warp,
// the producer, copies queries and pages (into a ring per group) to shared memory and announces the work to the others.
//
// Clusters. Blocks run in clusters: of 8 if there are few sequences, of 16 if these are short. The pages of all
// sequences form one row. Each cluster gets one run of it; the runs are equal to within one page, whatever the lengths
// are. Its blocks divide each sequence's part of the run and merge their sums in each other's shared memory, each
// block a slice of the output. If a sequence spans several clusters, they write their slices to global memory, and the
// last cluster to arrive at a slice merges it, always in the same order: the result is the same bit for bit. No cluster
// waits for another.
//
// Short sequences are bound by latency: what a block does once costs as much as all its pages. With few of them most of
// the GPU would idle, so heads are then divided among clusters too (16 columns each, 8 for grouped kinds).
//
// Letters: b sequence, n queries per sequence, m cached token, r rank, d element of a head; of an mma fragment: row
// g = lane / 4, column pair t = lane % 4, element e. Tiles of an mma product are counted by nt (eight columns),
// mt (sixteen elements of v) and ks (two steps of sixteen elements of q and k).
// Source: ours; the equations are the paper's.
#ifndef LLMC_FLASHTPA_DECODE_CUH
#define LLMC_FLASHTPA_DECODE_CUH

#include "factor_cache.cuh"
#include "ptx.cuh"

enum {
    DECODE_MAX_COLUMNS = 128,   // per thread block
    DECODE_MAX_QUERIES = 16,    // per sequence
    DECODE_MAX_CLUSTER = 16,    // thread blocks
    DECODE_SHORT_PAGES = 512    // a stream with capacity for at most this many pages is short
};

// The kernel may start before the previous kernel in the stream has ended. That one may still be writing the queries
// (fac) and their tokens in the cache; lengths and all earlier tokens in the cache must be final.
typedef struct {
    const unsigned char *cache; // (B, streams, pages) of one layer, with the queries' own tokens in it
    const int32_t *lengths;     // (B) tokens before the queries
    const floatX *fac;          // (B n, Pp) factor rows of the queries, q's vectors rotated; mla: q'
    floatX *out;                // (B n, NH HSV)
    float *scratch;             // decode_scratch_bytes; its counters start at zero; each launch resets them
    CacheShape shape;
    Heads q;
    int B, n, NH, Pp;           // n: queries per sequence, its last n tokens; each query sees the tokens up to itself
    int64_t pages;              // per stream
    int cluster;                // thread blocks per cluster: 1, 2, 4, 8 or 16; 0: automatic
    int splits;                 // most clusters per stream; 0: automatic
    int min_pages;              // with splits 0: fewer pages than this do not get another cluster; 0: automatic
} DecodeArgs;

// ---------------------------------------------------------------------------------------------------------------------
// The plain kernel: any number type, ranks and head size (a multiple of 32 up to 128). One block: one head of one
// query.

enum { DECODE_PLAIN_WARPS = 4, DECODE_PLAIN_MAX_HS = 128 };

// Element d of a query head from its factor row (Pp), pre-scaled so that p = exp2(q.k).
__device__ inline float decode_query(const DecodeArgs &args, const floatX *row, int head, int d) {
    const Heads &q = args.q;
    int HS = args.shape.HSK;
    float sum = 0, unit = 1.44269504f * args.shape.scale / (args.shape.factored ? args.shape.RK : 1);
    if (q.kind == HEADS_GROUPED) return unit * (float)row[q.b + head * HS + d];
    for (int r = 0; r < q.R; r++) sum += (float)row[q.a + head * q.R + r] * (float)row[q.b + r * HS + d];
    return unit * (float)q.scale * sum;
}

template <class Number>
__global__ void __launch_bounds__(32 * DECODE_PLAIN_WARPS)
decode_plain_kernel(const __grid_constant__ DecodeArgs args) {
    enum { TOP = DECODE_PLAIN_MAX_HS, SUM };                // after a warp's output
    __shared__ float merged[DECODE_PLAIN_WARPS][DECODE_PLAIN_MAX_HS + 2];
    const CacheShape &shape = args.shape;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int head = blockIdx.x, i = blockIdx.y % args.n, b = blockIdx.y / args.n;
    int stream = head / shape.heads, HSK = shape.HSK, HSV = shape.HSV;
    const unsigned char *pages = args.cache +
                                 ((int64_t)b * shape.streams + stream) * args.pages * cache_page_bytes(shape);
    const floatX *row = args.fac + (int64_t)blockIdx.y * args.Pp;
    float q[4] = {}, o[4] = {}, top = -1e30f, sum = 0;      // q and o: elements lane + 32 j
    for (int j = 0; 32 * j < HSK; j++) q[j] = decode_query(args, row, head, 32 * j + lane);
    int64_t tokens = args.lengths[b] + i + 1;
    for (int64_t m = warp; m < tokens; m += DECODE_PLAIN_WARPS) {
        const unsigned char *page = pages + m / PAGE * cache_page_bytes(shape);
        int token = (int)(m % PAGE);
        auto weight = [&](CachePart part, int r) {
            if (!shape.factored) return 1.0f;
            return cache_number((const Number *)(page + cache_a(shape, part, r, head % shape.heads, token)));
        };
        auto element = [&](CachePart part, int r, int d) {
            return cache_number((const Number *)(page + cache_b(shape, part, r, token, d)));
        };
        float logit = 0;
        for (int r = 0; r < shape.RK; r++) {
            float dot = 0;
            for (int j = 0; 32 * j < HSK; j++) dot += q[j] * element(CACHE_K, r, 32 * j + lane);
            logit += weight(CACHE_K, r) * warp_sum(dot);
        }
        if (sizeof(Number) == 1) logit *= *(const float *)(page + cache_scale(shape, CACHE_K, token));
        float new_top = fmaxf(top, logit), shrink = exp2f(top - new_top), p = exp2f(logit - new_top);
        top = new_top, sum = sum * shrink + p;
        if (sizeof(Number) == 1) p *= *(const float *)(page + cache_scale(shape, CACHE_V, token));
        for (int j = 0; 32 * j < HSV; j++) {
            float v = 0;
            for (int r = 0; r < shape.RV; r++) v += weight(CACHE_V, r) * element(CACHE_V, r, 32 * j + lane);
            o[j] = o[j] * shrink + p * v;
        }
    }
    for (int j = 0; 32 * j < HSV; j++) merged[warp][32 * j + lane] = o[j];
    if (lane == 0) merged[warp][TOP] = top, merged[warp][SUM] = sum;
    __syncthreads();
    for (int w = 0; w < DECODE_PLAIN_WARPS; w++) top = fmaxf(top, merged[w][TOP]);
    for (int d = threadIdx.x; d < HSV; d += 32 * DECODE_PLAIN_WARPS) {
        float total = 0, x = 0;
        for (int w = 0; w < DECODE_PLAIN_WARPS; w++) {
            float weight = exp2f(merged[w][TOP] - top);
            total += weight * merged[w][SUM], x += weight * merged[w][d];
        }
        floatX *out = args.out + ((int64_t)blockIdx.y * args.NH + head) * HSV;
        out[d] = (floatX)(x / total / (shape.factored ? shape.RV : 1));
    }
}

// Where a warp of a plain kernel leaves its sums of one head: o (HSV), maximum, sum.
__host__ __device__ inline int decode_plain_record(int HSV) { return HSV + 2; }

// A block's output of one head, out (HSV), from its warps' records (DECODE_PLAIN_WARPS, decode_plain_record).
__device__ inline void decode_plain_merge(floatX *out, const float *records, int HSV, float unit) {
    const int record = decode_plain_record(HSV);
    float top = -1e30f;
    for (int w = 0; w < DECODE_PLAIN_WARPS; w++) top = fmaxf(top, records[w * record + HSV]);
    for (int d = threadIdx.x; d < HSV; d += 32 * DECODE_PLAIN_WARPS) {
        float total = 0, x = 0;
        for (int w = 0; w < DECODE_PLAIN_WARPS; w++) {
            float weight = exp2f(records[w * record + HSV] - top);
            total += weight * records[w * record + HSV + 1], x += weight * records[w * record + d];
        }
        out[d] = (floatX)(x / total * unit);
    }
}

// A warp adds a token's value (HSV) with this logit to its record. value(d): element d.
template <class Value>
__device__ inline void decode_plain_add(float *record, int HSV, float logit, Value value) {
    const int lane = threadIdx.x % 32;
    float top = record[HSV], new_top = fmaxf(top, logit), shrink = exp2f(top - new_top), p = exp2f(logit - new_top);
    for (int d = lane; d < HSV; d += 32) record[d] = record[d] * shrink + p * value(d);
    __syncwarp();               // all lanes have read top
    if (lane == 0) record[HSV] = new_top, record[HSV + 1] = record[HSV + 1] * shrink + p;
    __syncwarp();
}

// The same for mla, of any size.
template <class Number>
__global__ void __launch_bounds__(32 * DECODE_PLAIN_WARPS)
decode_plain_latent_kernel(const __grid_constant__ DecodeArgs args) {
    extern __shared__ __align__(1024) unsigned char smem[];
    const CacheShape &shape = args.shape;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, HSV = shape.HSV, HSK = HSV + shape.HSK;
    const int head = blockIdx.x, i = blockIdx.y % args.n, b = blockIdx.y / args.n;
    float *q = (float *)smem, *records = q + HSK, *record = records + warp * decode_plain_record(HSV);
    const floatX *from = args.fac + (int64_t)blockIdx.y * args.Pp + args.q.b + head * HSK;
    for (int d = threadIdx.x; d < HSK; d += blockDim.x) q[d] = 1.44269504f * shape.scale * (float)from[d];
    for (int d = lane; d < HSV; d += 32) record[d] = 0;
    if (lane == 0) record[HSV] = -1e30f, record[HSV + 1] = 0;
    __syncthreads();            // q is written
    const int64_t tokens = args.lengths[b] + i + 1;
    for (int64_t m = warp; m < tokens; m += DECODE_PLAIN_WARPS) {
        const unsigned char *page = args.cache + ((int64_t)b * args.pages + m / PAGE) * cache_page_bytes(shape);
        const int token = (int)(m % PAGE);
        auto element = [&](CachePart part, int d) {
            return cache_number((const Number *)(page + cache_b(shape, part, 0, token, d)));
        };
        float latent = 0, rotated = 0, scales[2] = {1, 1};
        for (int d = lane; d < HSV; d += 32) latent += q[d] * element(CACHE_V, d);
        for (int d = lane; d < shape.HSK; d += 32) rotated += q[HSV + d] * element(CACHE_K, d);
        if (sizeof(Number) == 1)
            for (int p = 0; p < 2; p++) scales[p] = *(const float *)(page + cache_scale(shape, (CachePart)p, token));
        const float logit = scales[CACHE_V] * warp_sum(latent) + scales[CACHE_K] * warp_sum(rotated);
        decode_plain_add(record, HSV, logit, [&](int d) { return scales[CACHE_V] * element(CACHE_V, d); });
    }
    __syncthreads();            // the records are written
    const float unit = 1;
    decode_plain_merge(args.out + ((int64_t)blockIdx.y * args.NH + head) * HSV, records, HSV, unit);
}

inline void decode_plain(const DecodeArgs &args, cudaStream_t stream) {
    if (args.shape.latent) {
        const int HSV = args.shape.HSV;
        const size_t numbers = HSV + args.shape.HSK + DECODE_PLAIN_WARPS * decode_plain_record(HSV);
        Launch where(dim3((unsigned)args.NH, (unsigned)(args.B * args.n)), 32 * DECODE_PLAIN_WARPS,
                     numbers * sizeof(float), stream);
        if (args.shape.number_bytes == 1) launch(decode_plain_latent_kernel<e4m3>, where, args);
        else launch(decode_plain_latent_kernel<floatX>, where, args);
        return;
    }
    const int sizes[2] = {args.shape.HSK, args.shape.HSV};
    for (int HS : sizes)
        if (HS % 32 || HS > DECODE_PLAIN_MAX_HS)
            die(EXIT_SYSTEM, "decode_plain: head size %d is not supported; it must be 32, 64, 96 or 128", HS);
    Launch where(dim3((unsigned)args.NH, (unsigned)(args.B * args.n)), 32 * DECODE_PLAIN_WARPS, 0, stream);
    if (args.shape.number_bytes == 1) launch(decode_plain_kernel<e4m3>, where, args);
    else launch(decode_plain_kernel<floatX>, where, args);
}

// ---------------------------------------------------------------------------------------------------------------------
// The fast kernel, bf16 and e4m3, heads of 64 and 128: how a launch divides the work

enum { DECODE_ANY_RANKS = 0 };  // a kernel for ranks that are known only at run time

// The layout of decode_kernel's dynamic shared memory: byte offsets of its regions. decode_smem computes it for the
// plan, and the kernel reads it there. The rings, (depth, groups) pages, are at 0. A place in them belongs to one
// group, which sees every phase of its barriers. width = 8 eights, warps = decode_warps.
typedef struct {
    int merge;          // (groups, decode_group_size) float4: sums of each group
    int block_sums;     // (pairs) float4: {maximum, sum} of the block, for both columns
    int weights;        // (pairs, warps) float2: the scale of each group's sums, for both columns
    int inbox;          // (cluster, own pairs, decode_record_size) float4: records from the cluster's blocks
    int columns;        // (tiles, width) int2: query and head of each column
    int q;              // (tiles, width, decode_q_pitch) bf16, or fp16 if the cache is e4m3: queries, pre-scaled
    int query_rows;     // (queries, query_bytes): queries as fetched
    int bq;             // (queries, 16 ranks, decode_q_pitch) bf16: bQ, if q is factored
    int barriers;       // 64 bits each: full (places), free (places), query_full, query_free, part_full, sums_*
    int first;          // (B + 1) int: pages of one stream before each sequence
    int lengths;        // (B) int: a copy of args.lengths
    int bytes;          // in total
} DecodeSmem;

// How a launch divides the work. The same for all thread blocks.
typedef struct {
    int eights;                 // groups of 8 columns (the N of one mma) per tile
    int chunks, tiles, groups;  // chunks of the columns (blockIdx.y), tiles per chunk, groups of warps per block
    int queries;                // most queries per chunk
    int query_bytes;            // fetched per query: q's factors, or the rows of the stream's heads
    int depth;                  // pages in a group's ring
    int cluster, cluster_log2, clusters;    // blocks per cluster, its log2, number of clusters
    int min_pages;              // per cluster, if there are too few pages for all clusters
    int counters;               // 32-bit counters at the start of the scratch
    int page_bytes, k_b, v_a, v_b, scales;  // page size; offsets in a page of bK, aV, bV and the scales (aK is at 0)
    float q_unit, out_unit;     // q times q_unit makes p = exp2(q.k); out_unit scales the sum of p v
    DecodeSmem smem;
} DecodePlan;

// Compute warps per block; the producer is one more. Few, because each keeps q, o and the next loads of its columns in
// registers, of which a quarter of the warps share a quarter.
__host__ __device__ constexpr int decode_warps(int HS, int eights, int ranks) {
    return HS == 256 ? 11 : HS == 64 && eights <= 2 && ranks != DECODE_ANY_RANKS ? 9 : 7;
}
// Whether the fast kernel has this mla: a latent of HS numbers and a rotated part.
__host__ __device__ constexpr bool decode_has_latent(int HS, int rotated) {
    return (HS == 256 || HS == 512) && rotated == 32;
}
// Elements from one row of q or bQ in shared memory to the next: the padding puts rows in different banks.
__host__ __device__ constexpr int decode_q_pitch(int HS) { return HS + 8; }
// Whether q stays in registers: heads of 128 leave too few. (mla's does, without passing through shared memory.)
__host__ __device__ constexpr bool decode_q_stays(int HS) { return HS == 64; }

// Sums are merged in units of 4 numbers of o. Pair p is columns 2p and 2p + 1 of the chunk. Unit `index` holds, for
// both columns, elements g and g + 8 of sixteen index / 8, with g = index % 8: what one thread has of the pair.
__host__ __device__ inline int decode_pairs(const DecodePlan &plan) { return plan.tiles * plan.eights * 4; }
// A record is what blocks exchange about a pair: its HS / 2 units, then its maxima and sums. Sizes are in float4.
__host__ __device__ constexpr int decode_record_size(int HS) { return HS / 2 + 1; }
// What a group of warps leaves in shared memory: o (tile, eight, HS / 16, 32), then maxima and sums (pair).
__host__ __device__ inline int decode_group_size(const DecodePlan &plan, int HS) {
    return plan.tiles * plan.eights * HS * 2 + decode_pairs(plan);
}
// A slot of global memory: a cluster's records of one stream.
__host__ __device__ inline int decode_slot_size(const DecodePlan &plan, int HS) {
    return decode_pairs(plan) * decode_record_size(HS);
}
// Most pairs that one block of a cluster merges: block `rank` has the pairs p with p % cluster == rank.
__host__ __device__ inline int decode_own_pairs(const DecodePlan &plan) {
    return (decode_pairs(plan) + plan.cluster - 1) >> plan.cluster_log2;
}
// The records that all blocks of a cluster send to one block: (cluster, own pairs).
__host__ __device__ inline int decode_inbox_size(const DecodePlan &plan, int HS) {
    return plan.cluster == 1 ? 0 : plan.cluster * decode_own_pairs(plan) * decode_record_size(HS);
}

enum {
    DECODE_MAX_PLACES = 32,         // pages in all rings of a block: each lane of the producer fills one place
    DECODE_BARRIER_BYTES = 1024     // room for two barriers per place and five more
};
static_assert((2 * DECODE_MAX_PLACES + 5) * sizeof(uint64_t) <= DECODE_BARRIER_BYTES, "the barriers need more room");

// The ranks a kernel is compiled for: 1 or 2 for both k and v, else DECODE_ANY_RANKS.
inline int decode_ranks(const CacheShape &shape) {
    if (!shape.factored) return 1;
    return shape.RK == shape.RV && shape.RK <= 2 ? shape.RK : DECODE_ANY_RANKS;
}

inline DecodeSmem decode_smem(const DecodePlan &plan, const CacheShape &shape, HeadsKind q_kind, int B) {
    const int pairs = decode_pairs(plan), columns = plan.tiles * plan.eights * 8;       // of the chunk
    const int HS = shape.HSV, warps = decode_warps(HS, plan.eights, decode_ranks(shape));
    const int q_row_bytes = shape.latent ? 0 : decode_q_pitch(HS) * 2;
    DecodeSmem at;      // a float4 has 16 bytes, float2 and int2 8, bf16 2, int 4
    at.merge = plan.groups * plan.depth * plan.page_bytes;
    at.block_sums = at.merge + plan.groups * decode_group_size(plan, HS) * 16;
    at.weights = at.block_sums + pairs * 16;
    at.inbox = at.weights + pairs * warps * 8;
    at.columns = at.inbox + decode_inbox_size(plan, HS) * 16;
    at.q = at.columns + columns * 8;
    at.query_rows = at.q + columns * q_row_bytes;
    at.bq = at.query_rows + plan.queries * plan.query_bytes;
    at.barriers = at.bq + (q_kind == HEADS_FACTORED ? plan.queries * 16 * q_row_bytes : 0);
    at.first = at.barriers + DECODE_BARRIER_BYTES;
    at.lengths = at.first + (B + 1) * 4;
    at.bytes = at.lengths + B * 4;
    return at;
}

__global__ void decode_probe_kernel() {}

// How many clusters of this size the GPU runs at once, if a block fills a multiprocessor: not every group of
// multiprocessors divides by the size, and not every GPU has clusters of more than 8. The answer is kept, because the
// query is slow.
inline int decode_clusters(int cluster) {
    static int known[DECODE_MAX_CLUSTER + 1];       // and 1; 0: not known yet
    if (!known[cluster]) {
        int clusters = device_attribute(cudaDevAttrMultiProcessorCount);
        if (cluster > 1) {
            size_t smem_bytes = (size_t)device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
            Launch where(dim3((unsigned)cluster), 256, smem_bytes, 0);
            where.cluster = cluster;
            cudaLaunchAttribute attributes[2] = {};
            cudaLaunchConfig_t config = launch_config((const void *)decode_probe_kernel, where, attributes);
            cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, decode_probe_kernel, &config);
            if (error == cudaErrorInvalidClusterSize) clusters = 0;
            else cuda_check_(error, "cudaOccupancyMaxActiveClusters", __FILE__, __LINE__);
        }
        known[cluster] = clusters + 1;
    }
    return known[cluster] - 1;
}

// Groups and ring depth for the shared memory that a block may have: as many groups as there are warps for, if each
// gets two pages, else as many as fit. groups 0: nothing fits.
inline void decode_plan_rings(DecodePlan *plan, const CacheShape &shape, HeadsKind q_kind, int B) {
    const int warps = decode_warps(shape.HSV, plan->eights, decode_ranks(shape));
    const int static_bytes = 1024;                      // the kernel's static shared memory
    const int available = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - static_bytes;
    for (plan->groups = warps / plan->tiles; plan->groups > 0; plan->groups--) {
        plan->depth = 0;
        const int without_pages = decode_smem(*plan, shape, q_kind, B).bytes;
        plan->depth = (available - without_pages) / (plan->groups * plan->page_bytes);
        if (plan->depth >= 2) break;
    }
    if (plan->groups > 0) plan->depth = min(plan->depth, DECODE_MAX_PLACES / plan->groups);
    plan->smem = decode_smem(*plan, shape, q_kind, B);
}

// The fast kernel's plan for this GPU. groups 0: it does not support the shape.
inline DecodePlan decode_plan(const CacheShape &shape, const Heads &q, int B, int n, int64_t pages,
                              int cluster, int splits, int min_pages) {
    const bool hopper = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
    if (cluster < 0 || cluster > (hopper ? DECODE_MAX_CLUSTER : 1) || (cluster & (cluster - 1)))
        die(EXIT_SYSTEM, "flashtpa_decode: cluster size %d is not supported; this GPU accepts %s, or 0 for automatic",
            cluster, hopper ? "1, 2, 4, 8 or 16" : "1");
    DecodePlan plan = {};
    const int heads = shape.heads, all_streams = B * shape.streams;
    if (sizeof(floatX) != 2 || shape.number_bytes > 2) return plan;
    if (shape.latent ? !decode_has_latent(shape.HSV, shape.HSK)
                     : shape.HSK != shape.HSV || (shape.HSK != 64 && shape.HSK != 128)) return plan;
    if (q.kind == HEADS_FACTORED && (q.R > 16 || !shape.factored)) return plan;

    // columns: the tile width that leaves the fewest empty, of those that decode_launch_ has kernels for
    const int ranks = decode_ranks(shape), few = shape.factored ? 2 : 1;
    const bool may_be_5 = shape.factored && shape.HSK == 64 && ranks != DECODE_ANY_RANKS;
    auto tiles_of = [&](int width) {
        return shape.factored ? n * ceil_div(heads, width) : ceil_div(n * heads, width);
    };
    const bool is_short = hopper && pages <= DECODE_SHORT_PAGES;
    const bool heads_divided = is_short && cluster == 0 && splits == 0 &&       // among clusters
                               all_streams * tiles_of(8 * few) <= decode_clusters(DECODE_MAX_CLUSTER);
    if (heads_divided || shape.latent || (shape.factored ? 1 : n) * heads <= 8 * few) plan.eights = few;
    else plan.eights = may_be_5 && ceil_div(heads, 40) * 5 < ceil_div(heads, 32) * 4 ? 5 : 4;
    const int width = 8 * plan.eights, warps = decode_warps(shape.HSV, plan.eights, ranks);
    plan.chunks = heads_divided ? tiles_of(width) : ceil_div(tiles_of(width), min(DECODE_MAX_COLUMNS / width, warps));
    plan.tiles = ceil_div(tiles_of(width), plan.chunks);

    // clusters: the largest size of which there are enough for all streams; 16, of which few fit on a GPU, only if
    // streams are short. Counters are for the most chunks there can be, so that their number does not depend on n or
    // pages.
    plan.counters = DECODE_MAX_CLUSTER * max(all_streams * DECODE_MAX_QUERIES * ceil_div(heads, 16),
                                             hopper ? decode_clusters(DECODE_MAX_CLUSTER) : 0);
    plan.cluster = cluster > 0 ? cluster : !hopper ? 1 : is_short ? DECODE_MAX_CLUSTER : DECODE_MAX_CLUSTER / 2;
    while (cluster == 0 && plan.cluster > 1 && decode_clusters(plan.cluster) < all_streams * plan.chunks)
        plan.cluster /= 2;
    plan.clusters = splits > 0 ? all_streams * splits : max(decode_clusters(plan.cluster) / plan.chunks, 1);
    while (1 << plan.cluster_log2 < plan.cluster) plan.cluster_log2++;

    // queries: the most that a chunk can touch, wherever it begins
    const int per_query = ceil_div(heads, width);       // tiles
    plan.queries = shape.factored ? (plan.tiles - 1 + per_query - 1) / per_query + 1
                                  : (plan.tiles * width - 1 + heads - 1) / heads + 1;
    if (plan.queries > n) plan.queries = n;
    const int q_numbers = q.kind == HEADS_FACTORED ? q.b + q.R * shape.HSK : heads * shape.HSK;
    plan.query_bytes = shape.latent ? 0 : (int)round_up(q_numbers * 2, 16);

    plan.q_unit = (float)(q.scale * 1.4426950408889634 * shape.scale / (shape.factored ? shape.RK : 1));
    plan.out_unit = 1.0f / (shape.factored ? shape.RV : 1);
    plan.page_bytes = (int)cache_page_bytes(shape);
    plan.k_b = cache_b_start(shape, CACHE_K);
    plan.v_a = cache_a_start(shape, CACHE_V);
    plan.v_b = cache_b_start(shape, CACHE_V);
    plan.scales = cache_scale(shape, CACHE_K, 0);
    decode_plan_rings(&plan, shape, q.kind, B);
    if (plan.groups == 0 && plan.cluster > 1) {         // blocks on their own need no inbox
        const int alone = 1;
        return decode_plan(shape, q, B, n, pages, alone, splits, min_pages);
    }
    plan.min_pages = min_pages > 0 ? min_pages
                   : heads_divided ? DECODE_SHORT_PAGES
                   : plan.cluster > 1 ? 16 * plan.cluster : (plan.groups + 1) / 2;
    return plan;
}

// Scratch of flashtpa_decode for B sequences and up to n queries each; zero it once. It serves one shape, B, cluster
// and splits.
inline size_t decode_scratch_bytes(const CacheShape &shape, const Heads &q, int B, int n,
                                   int cluster = 0, int splits = 0) {
    size_t most = 16;
    for (int queries = 1; queries <= n; queries++)
        for (int pages : {0, DECODE_SHORT_PAGES + 1}) {     // short and long streams
            DecodePlan plan = decode_plan(shape, q, B, queries, pages, cluster, splits, 0);
            size_t slots = (size_t)plan.chunks * plan.clusters * 2;
            size_t bytes = slots * decode_slot_size(plan, shape.HSV) * sizeof(float4) + plan.counters * sizeof(float);
            if (bytes > most) most = bytes;
        }
    return most;
}

// ---------------------------------------------------------------------------------------------------------------------
// One page, one warp

// Fragment layouts per number type. Along a summed index the order of elements is free if both operands agree on it,
// and so is the order of a page's tokens.
// bf16: of 16 elements, thread t of a quad has 2t, 2t + 1, 8 + 2t and 8 + 2t + 1, the instruction's own order. Tokens
// too. e4m3, converted to fp16 (exactly): thread t has elements 4t ... 4t + 3, which share a 32-bit word. In the
// product with v, rows g and g + 8 are elements 2g and 2g + 1. Tokens 2g and 2g + 1 come in one word too. One of them
// is in the first half of the page's rows, 0 2 4 6 9 11 13 15, the other in the second, 1 3 5 7 8 10 12 14: the eight
// rows of a half are in different banks (cache_b_chunk).
template <class Number> struct DecodeNumber;

template <> struct DecodeNumber<bf16> {
    static __device__ uint32_t pack(float low, float high) { return ptx_pack_bf16(low, high); }
    static __device__ float2 unpack(uint32_t pair) {
        return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
    }
    static __device__ void mma(float (&sum)[4], const uint32_t (&rows)[4], uint32_t columns0, uint32_t columns1) {
        ptx_mma(sum, rows, columns0, columns1);
    }
    static __device__ uint32_t multiply(uint32_t x, uint32_t y) { return ptx_mul_bf16(x, y); }
    static __device__ int q_place(int d) { return d; }                          // where q's row has element d
    static __device__ int q_element(int t, int x) { return 8 * x + 2 * t; }     // first of thread t's pair x
    static __device__ int token(int half, int i) { return 8 * half + i; }       // row i of a half of the page
    static __device__ int element(int mt, int g, int e) { return 16 * mt + g + 8 * e; }     // of v: row g + 8 e
};
template <> struct DecodeNumber<e4m3> {
    static __device__ uint32_t pack(float low, float high) { return ptx_pack_f16(low, high); }
    static __device__ float2 unpack(uint32_t pair) {
        __half2_raw h = {(unsigned short)pair, (unsigned short)(pair >> 16)};
        return __half22float2(__half2(h));
    }
    static __device__ void mma(float (&sum)[4], const uint32_t (&rows)[4], uint32_t columns0, uint32_t columns1) {
        ptx_mma_f16(sum, rows, columns0, columns1);
    }
    static __device__ uint32_t multiply(uint32_t x, uint32_t y) { return ptx_mul_f16(x, y); }
    static __device__ int q_place(int d) { return d / 16 * 16 + d / 2 % 2 * 8 + d / 4 % 4 * 2 + d % 2; }
    static __device__ int q_element(int t, int x) { return 4 * t + 2 * x; }
    static __device__ int token(int half, int i) { return 2 * i + (i < 4 ? half : 1 - half); }
    static __device__ int element(int mt, int g, int e) { return 16 * mt + 2 * g + e; }
};

// The online softmax of a tile in a warp's registers. A thread has columns 2t and 2t + 1 of each eight.
template <int HS, int EIGHTS>
struct DecodeState {
    float top[EIGHTS][2];               // running maximum
    float sum[EIGHTS][2];               // of p over this thread's tokens
    float o[EIGHTS][HS / 16][4];        // (elements g and g + 8 of sixteen) x (the two columns)
};

// The running maximum is raised, and o rescaled, only when a logit exceeds it by more than this (in powers of two),
// which happens on few pages.
static constexpr float DECODE_SLACK = 4;

// Two k-steps of q for eight columns, as an mma operand. `rows` (8, decode_q_pitch): the eight's first column.
template <int HS>
__device__ __forceinline__ void decode_load_q(uint32_t (&q)[4], const bf16 *rows, int step) {
    const int lane = threadIdx.x % 32;
    ptx_ldmatrix(q, smem_address(rows + lane % 8 * decode_q_pitch(HS) + 16 * step + lane / 8 * 8));
}

// Where a lane reads in a page: byte offsets. With HS 64 there are registers to keep them, but the compiler would
// compute them again for every page; the empty asm prevents that.
template <class Number, int HS, int RANKS>
struct DecodeLane {
    typedef DecodeNumber<Number> N;
    static constexpr int VECTOR_BYTES = PAGE * HS * (int)sizeof(Number);    // from one rank's vectors to the next
    static constexpr int LOADS = HS * (int)sizeof(Number) / 32;             // ldmatrix per rank, 32 bytes of each token
    static constexpr int R = RANKS != DECODE_ANY_RANKS ? RANKS : 1;
    uint32_t k[LOADS], v[LOADS];            // vectors of rank 0
    uint32_t k_weights[R], v_weights[R];    // of the tile's first eight heads
    uint32_t scales[2];                     // e4m3: of the thread's tokens

    __device__ DecodeLane(const CacheShape &shape, const DecodePlan &plan, int head) {
        const int lane = threadIdx.x % 32, bytes = sizeof(Number);
        // A load is four matrices, (half, 16-byte chunk) = 00 10 01 11 for k and 00 01 10 11 for v. Each further load
        // is 32 bytes along, which in permuted chunks is ^ 32 (cache_b_chunk).
        const int k_token = N::token(lane / 8 % 2, lane % 8), v_token = N::token(lane / 16, lane % 8);
        for (int i = 0; i < LOADS; i++) {
            k[i] = plan.k_b + (k_token * HS * bytes + cache_b_chunk(bytes, HS, k_token, lane / 16) * 16 ^ 32 * i);
            v[i] = plan.v_b + (v_token * HS * bytes + cache_b_chunk(bytes, HS, v_token, lane / 8 % 2) * 16 ^ 32 * i);
            if (HS == 64) asm volatile("" : "+r"(k[i]), "+r"(v[i]));
        }
        for (int r = 0; r < R; r++) {
            k_weights[r] = weights(shape, head, r), v_weights[r] = plan.v_a + weights(shape, head, r);
            if (HS == 64) asm volatile("" : "+r"(k_weights[r]), "+r"(v_weights[r]));
        }
        for (int half = 0; half < 2; half++) {
            scales[half] = plan.scales + N::token(half, lane / 4) * 4;
            if (HS == 64 && bytes == 1) asm volatile("" : "+r"(scales[half]));
        }
    }
    // Offset of rank r's weights from the start of aK or aV. bf16: a load is 16 heads, and the next one is 512 bytes
    // further with the same order of chunks (cache_a_chunk). e4m3: a load is 32 heads.
    __device__ static int weights(const CacheShape &shape, int head, int r) {
        const int lane = threadIdx.x % 32;
        const int row = r * shape.heads + head + (sizeof(Number) == 1 ? lane : lane / 16 * 8 + lane % 8);
        return row * PAGE * (int)sizeof(Number) + (sizeof(Number) == 1 ? 0 : cache_a_chunk(2, row, lane / 8 % 2) * 16);
    }
};

// Masks logits s of a page: see decode_page. Every warp zeroes v where there is no token, because 0 * NaN is NaN.
template <class Number, int HS, int EIGHTS, bool FACTORED>
__device__ __forceinline__ void decode_mask(float (&s)[EIGHTS][4], float (&per_v)[2], unsigned char *page_pointer,
                                            const CacheShape &shape, const DecodePlan &plan, int RV,
                                            const int2 *columns, int sees, int live) {
    typedef DecodeNumber<Number> N;
    constexpr bool FP8 = sizeof(Number) == 1;
    const int lane = threadIdx.x % 32;
    const int tokens[2] = {N::token(0, lane / 4), N::token(1, lane / 4)};
    #pragma unroll
    for (int nt = 0; nt < EIGHTS; nt++) {
        const int4 queries = *(const int4 *)(columns + 8 * nt);         // (query, head) of both columns
        #pragma unroll
        for (int e = 0; e < 4; e++)
            if (tokens[e / 2] >= sees + max(e % 2 ? queries.z : queries.x, 0)) s[nt][e] = -INFINITY;
    }
    if (FP8)
        #pragma unroll
        for (int half = 0; half < 2; half++) if (tokens[half] >= live) per_v[half] = 0;
    if (live < PAGE) {
        constexpr int ROW = HS * (int)sizeof(Number);
        const int dead = PAGE - live, all = RV * dead;
        #pragma unroll 1
        for (int i = lane; FACTORED && i < shape.heads * all; i += 32)
            *(Number *)(page_pointer + cache_a(shape, CACHE_V, 0, i / dead, live + i % dead)) = Number(0);
        #pragma unroll 1
        for (int i = lane; i < all * (ROW / 16); i += 32) {
            const int row = i % all / dead * PAGE + live + i % dead;
            *(int4 *)(page_pointer + plan.v_b + row * ROW + i / all * 16) = make_int4(0, 0, 0, 0);
        }
        ptx_copies_after();
        __syncwarp();
    }
}

// The online softmax's step: from logits s to p, whose sum it adds to state.sum. p[nt][half]: of column g, the thread's
// two tokens of the half. per_v: e4m3 only.
template <class Number, int HS, int EIGHTS>
__device__ __forceinline__ void decode_probabilities(DecodeState<HS, EIGHTS> &state, float (&s)[EIGHTS][4],
                                                     const float (&per_v)[2], uint32_t (&p)[EIGHTS][2]) {
    typedef DecodeNumber<Number> N;
    constexpr bool FP8 = sizeof(Number) == 1;
    bool outgrown = false;
    #pragma unroll
    for (int nt = 0; nt < EIGHTS; nt++)
        #pragma unroll
        for (int e = 0; e < 2; e++) outgrown |= fmaxf(s[nt][e], s[nt][e + 2]) > state.top[nt][e] + DECODE_SLACK;
    if (__any_sync(0xffffffff, outgrown)) {
        #pragma unroll
        for (int nt = 0; nt < EIGHTS; nt++)
            #pragma unroll
            for (int e = 0; e < 2; e++) {
                float top = fmaxf(s[nt][e], s[nt][e + 2]);
                #pragma unroll
                for (int x = 4; x < 32; x *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, x));
                top = fmaxf(top, state.top[nt][e]);
                const float shrink = ptx_exp2(state.top[nt][e] - top);
                state.top[nt][e] = top, state.sum[nt][e] *= shrink;
                #pragma unroll
                for (int mt = 0; mt < HS / 16; mt++) state.o[nt][mt][e] *= shrink, state.o[nt][mt][e + 2] *= shrink;
            }
    }
    #pragma unroll
    for (int nt = 0; nt < EIGHTS; nt++) {
        #pragma unroll
        for (int e = 0; e < 4; e++) s[nt][e] = ptx_exp2(s[nt][e] - state.top[nt][e % 2]);
        #pragma unroll
        for (int e = 0; e < 2; e++)
            state.sum[nt][e] += FP8 ? fmaf(s[nt][e], per_v[0], s[nt][e + 2] * per_v[1]) : s[nt][e] + s[nt][e + 2];
        p[nt][0] = ptx_transpose(N::pack(s[nt][0], s[nt][1])), p[nt][1] = ptx_transpose(N::pack(s[nt][2], s[nt][3]));
    }
}

// One step of online softmax: a tile of columns over one page in shared memory.
//   q_tile (8 EIGHTS, decode_q_pitch)    the tile's queries; q_kept: the same in registers, if decode_q_stays
//   page_pointer                         the page (factor_cache.cuh); `at`: where this lane reads in it
//   head                                 of the tile's first column
//   masked                               columns (8 EIGHTS, from the thread's first): query i sees only the first
//                                        sees + i tokens of the page; only `live` exist, the rest may be NaN
//   KV                                   HEADS_FACTORED: there are weights; RANKS: of k and v, or DECODE_ANY_RANKS
//
// e4m3: with a token's scales K and V, logits are K s. Its values get weights p V, computed as one power of two of
// K s + log2 V; the running maximum is of that too, so that the weights fit fp16. The sum of p divides by V again.
template <class Number, int HS, int EIGHTS, HeadsKind KV, int RANKS>
__device__ __forceinline__ void decode_page(DecodeState<HS, EIGHTS> &state,
                                            const bf16 *q_tile, const uint32_t (&q_kept)[EIGHTS][HS / 32][4],
                                            unsigned char *page_pointer, const DecodeLane<Number, HS, RANKS> &at,
                                            const CacheShape &shape, const DecodePlan &plan, int head,
                                            bool masked, const int2 *columns, int sees, int live) {
    typedef DecodeNumber<Number> N;
    typedef DecodeLane<Number, HS, RANKS> Lane;
    constexpr bool FP8 = sizeof(Number) == 1, FACTORED = KV == HEADS_FACTORED;
    constexpr int VECTOR_BYTES = Lane::VECTOR_BYTES, LOADS = Lane::LOADS;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t page = smem_address(page_pointer);
    const int RK = RANKS != DECODE_ANY_RANKS ? RANKS : shape.RK, RV = RANKS != DECODE_ANY_RANKS ? RANKS : shape.RV;
    const int tokens[2] = {N::token(0, g), N::token(1, g)};
    // weights[nt][half]. K: the thread's token of that half, its two columns, packed. V: column g, the thread's two
    // tokens of that half. A load may reach beyond the tile's heads; what it brings from there is not used.
    auto load_weights = [&](uint32_t (&weights)[EIGHTS][2], int r, CachePart part) {
        const bool of_k = part == CACHE_K;
        const uint32_t from = page + (RANKS != DECODE_ANY_RANKS
                                      ? (of_k ? at.k_weights : at.v_weights)[RANKS != DECODE_ANY_RANKS ? r : 0]
                                      : (of_k ? 0 : plan.v_a) + Lane::weights(shape, head, r));
        if (FP8) {
            const int order = (of_k ? g < 4 : t < 2) ? 0x3120 : 0x2031;     // sorts the bytes by half
            #pragma unroll
            for (int nt = 0; nt < EIGHTS; nt += 4) {
                uint32_t loaded[4];
                if (of_k) ptx_ldmatrix_trans(loaded, from + nt * 8 * PAGE);
                else ptx_ldmatrix(loaded, from + nt * 8 * PAGE);
                #pragma unroll
                for (int i = 0; i < 4 && nt + i < EIGHTS; i++)
                    ptx_e4m3_to_f16(weights[nt + i][0], weights[nt + i][1], __byte_perm(loaded[i], 0, order));
            }
        } else {
            #pragma unroll
            for (int nt = 0; nt < EIGHTS; nt += 2) {
                uint32_t loaded[4];
                if (of_k) ptx_ldmatrix_trans(loaded, from + nt * 8 * PAGE * 2);
                else ptx_ldmatrix(loaded, from + nt * 8 * PAGE * 2);
                weights[nt][0] = loaded[0], weights[nt][1] = loaded[1];
                if (nt + 1 < EIGHTS) weights[nt + 1][0] = loaded[2], weights[nt + 1][1] = loaded[3];
            }
        }
    };

    // s = logits: s[nt][e] is of token tokens[e / 2] and column e % 2
    float s[EIGHTS][4] = {};
    #pragma unroll
    for (int r = 0; r < RK; r++) {
        float dots[EIGHTS][4] = {};                     // <bK, q>
        uint32_t loaded[LOADS][4], weights[EIGHTS][2];
        #pragma unroll
        for (int i = 0; i < LOADS; i++) ptx_ldmatrix(loaded[i], page + at.k[i] + r * VECTOR_BYTES);
        if (FACTORED) load_weights(weights, r, CACHE_K);
        #pragma unroll
        for (int ks = 0; ks < HS / 32; ks++) {          // two steps of 16 elements
            uint32_t k[2][4];
            if (FP8) {
                #pragma unroll
                for (int i = 0; i < 4; i++) ptx_e4m3_to_f16(k[i / 2][i % 2], k[i / 2][i % 2 + 2], loaded[ks][i]);
            } else memcpy(k, loaded[2 * ks], sizeof k);
            #pragma unroll
            for (int nt = 0; nt < EIGHTS; nt++) {
                uint32_t q[4];
                if (decode_q_stays(HS)) memcpy(q, q_kept[nt][ks], sizeof q);
                else decode_load_q<HS>(q, q_tile + 8 * nt * decode_q_pitch(HS), 2 * ks);
                N::mma(dots[nt], k[0], q[0], q[1]);
                N::mma(dots[nt], k[1], q[2], q[3]);
            }
        }
        #pragma unroll
        for (int nt = 0; nt < EIGHTS; nt++)
            #pragma unroll
            for (int e = 0; e < 4; e += 2) {
                const float2 w = FACTORED ? N::unpack(weights[nt][e / 2]) : make_float2(1, 1);
                s[nt][e] = FACTORED ? fmaf(w.x, dots[nt][e], s[nt][e]) : dots[nt][e];
                s[nt][e + 1] = FACTORED ? fmaf(w.y, dots[nt][e + 1], s[nt][e + 1]) : dots[nt][e + 1];
            }
    }
    float per_v[2];             // e4m3: 1 / V of the thread's tokens
    if (FP8) {
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const float *scale = (const float *)(page_pointer + at.scales[half]);
            const float log2_v = __log2f(scale[PAGE]), k = scale[0];
            per_v[half] = ptx_exp2(-log2_v);
            #pragma unroll
            for (int nt = 0; nt < EIGHTS; nt++) {
                s[nt][2 * half] = fmaf(s[nt][2 * half], k, log2_v);
                s[nt][2 * half + 1] = fmaf(s[nt][2 * half + 1], k, log2_v);
            }
        }
    }
    if (masked)
        decode_mask<Number, HS, EIGHTS, FACTORED>(s, per_v, page_pointer, shape, plan, RV, columns, sees, live);

    // load rank 0 of v now, so that it arrives while p is computed
    uint32_t first_weights[EIGHTS][2], first_v[LOADS][4];
    if (FACTORED) load_weights(first_weights, 0, CACHE_V);
    #pragma unroll
    for (int i = 0; i < LOADS; i++) ptx_ldmatrix_trans(first_v[i], page + at.v[i]);

    uint32_t p[EIGHTS][2];      // [nt][half]: column g, the thread's two tokens of the half
    decode_probabilities<Number>(state, s, per_v, p);

    // o += bV (p aV)
    #pragma unroll
    for (int r = 0; r < RV; r++) {
        uint32_t weights[EIGHTS][2], loaded[LOADS][4];
        if (r == 0) memcpy(weights, first_weights, sizeof weights), memcpy(loaded, first_v, sizeof loaded);
        else {
            if (FACTORED) load_weights(weights, r, CACHE_V);
            #pragma unroll
            for (int i = 0; i < LOADS; i++) ptx_ldmatrix_trans(loaded[i], page + at.v[i] + r * VECTOR_BYTES);
        }
        #pragma unroll
        for (int nt = 0; nt < EIGHTS; nt++)
            #pragma unroll
            for (int half = 0; half < 2; half++)
                weights[nt][half] = FACTORED ? N::multiply(weights[nt][half], p[nt][half]) : p[nt][half];
        #pragma unroll
        for (int i = 0; i < LOADS; i++) {
            constexpr int TILES = FP8 ? 2 : 1;          // of 16 elements per load
            uint32_t v[TILES][4];
            if (FP8) {
                #pragma unroll
                for (int x = 0; x < 4; x++) {
                    uint32_t (&tile)[4] = v[x % TILES];
                    ptx_e4m3_to_f16(tile[x / 2 * 2], tile[x / 2 * 2 + 1], __byte_perm(loaded[i][x], 0, 0x3120));
                }
            } else memcpy(v[0], loaded[i], sizeof loaded[i]);
            #pragma unroll
            for (int mt = 0; mt < TILES; mt++)
                #pragma unroll
                for (int nt = 0; nt < EIGHTS; nt++)
                    N::mma(state.o[nt][TILES * i + mt], v[mt], weights[nt][0], weights[nt][1]);
        }
    }
}

// Where a lane reads in a page of mla: byte offsets of its first loads, k and v in the latent, `rotated` in the rotated
// part. Pages and their parts begin at multiples of 128 bytes, and the permutation of chunks (cache_b_chunk) stays
// within 128 bytes.
template <class Number, int HS, int ROTATED>
struct DecodeLatentLane {
    typedef DecodeNumber<Number> N;
    uint32_t k, v, rotated, scales[2];

    __device__ DecodeLatentLane(const CacheShape &, const DecodePlan &plan, int) {
        const int lane = threadIdx.x % 32, bytes = sizeof(Number);
        const int k_token = N::token(lane / 8 % 2, lane % 8), v_token = N::token(lane / 16, lane % 8);
        auto offset = [](int size, int token, int chunk) {
            return (uint32_t)(token * size * bytes + cache_b_chunk(bytes, size, token, chunk) * 16);
        };
        k = plan.v_b + offset(HS, k_token, lane / 16), v = plan.v_b + offset(HS, v_token, lane / 8 % 2);
        rotated = plan.k_b + offset(ROTATED, k_token, lane / 16);
        asm volatile("" : "+r"(k), "+r"(v), "+r"(rotated));     // as in DecodeLane
        for (int half = 0; half < 2; half++) scales[half] = plan.scales + N::token(half, lane / 4) * 4;
    }
    // The address of load i, each 32 bytes of a token, from the first one's.
    static __device__ uint32_t load(uint32_t first, int i) { return (first ^ i % 4 * 32) + i / 4 * 128; }
};

template <class Number, int HS, int RANKS, int ROTATED>
struct DecodeLanes { typedef DecodeLatentLane<Number, HS, ROTATED> Lane; };
template <class Number, int HS, int RANKS>
struct DecodeLanes<Number, HS, RANKS, 0> { typedef DecodeLane<Number, HS, RANKS> Lane; };

// decode_page for mla and eight columns. q: [Wk^T q | rotated part of q]. e4m3: scale K is that of the rotated part, V
// that of the latent.
template <class Number, int HS, int ROTATED>
__device__ __forceinline__ void decode_latent_page(DecodeState<HS, 1> &state,
                                                   const uint32_t (&q)[(HS + ROTATED) / 32][4],
                                                   unsigned char *page_pointer,
                                                   const DecodeLatentLane<Number, HS, ROTATED> &at,
                                                   const CacheShape &shape, const DecodePlan &plan,
                                                   bool masked, const int2 *columns, int sees, int live) {
    typedef DecodeNumber<Number> N;
    constexpr bool FP8 = sizeof(Number) == 1, FACTORED = false;
    constexpr int LOADS = HS * (int)sizeof(Number) / 32, STEPS = HS / 32, PER_STEP = FP8 ? 1 : 2;
    typedef DecodeLatentLane<Number, HS, ROTATED> Lane;
    const uint32_t page = smem_address(page_pointer);
    // sums += 32 elements of k, step i from address `first` on, times q: two sums, so that two products are under way
    auto multiply = [&](float (&sums)[2][4], uint32_t first, int i, const uint32_t (&q)[4]) {
        uint32_t k[2][4], loaded[4];
        ptx_ldmatrix(loaded, Lane::load(first, PER_STEP * i));
        if (FP8) {
            #pragma unroll
            for (int i = 0; i < 4; i++) ptx_e4m3_to_f16(k[i / 2][i % 2], k[i / 2][i % 2 + 2], loaded[i]);
        } else {
            memcpy(k[0], loaded, sizeof loaded);
            ptx_ldmatrix(k[1], Lane::load(first, PER_STEP * i + 1));
        }
        N::mma(sums[0], k[0], q[0], q[1]);
        N::mma(sums[1], k[1], q[2], q[3]);
    };
    float latent[2][4] = {}, rotated[2][4] = {}, s[1][4];       // s[0][e] is of token e / 2 and column e % 2
    #pragma unroll
    for (int i = 0; i < STEPS; i++) multiply(latent, page + at.k, i, q[i]);
    #pragma unroll
    for (int i = 0; i < ROTATED / 32; i++) multiply(rotated, page + at.rotated, i, q[STEPS + i]);
    float per_v[2];             // e4m3: 1 / V of the thread's tokens
    #pragma unroll
    for (int e = 0; e < 4; e++) {
        const float *scale = (const float *)(page_pointer + at.scales[e / 2]);
        const float k = FP8 ? scale[0] : 1, v = FP8 ? scale[PAGE] : 1, log2_v = FP8 ? __log2f(v) : 0;
        per_v[e / 2] = ptx_exp2(-log2_v);
        s[0][e] = v * (latent[0][e] + latent[1][e]) + k * (rotated[0][e] + rotated[1][e]) + log2_v;
    }
    if (masked) decode_mask<Number, HS, 1, FACTORED>(s, per_v, page_pointer, shape, plan, 1, columns, sees, live);
    uint32_t p[1][2];
    decode_probabilities<Number>(state, s, per_v, p);
    #pragma unroll
    for (int i = 0; i < LOADS; i++) {
        uint32_t loaded[4], v[2][4];
        ptx_ldmatrix_trans(loaded, Lane::load(page + at.v, i));
        if (FP8) {
            #pragma unroll
            for (int x = 0; x < 4; x++) {
                uint32_t (&tile)[4] = v[x % 2];
                ptx_e4m3_to_f16(tile[x / 2 * 2], tile[x / 2 * 2 + 1], __byte_perm(loaded[x], 0, 0x3120));
            }
            N::mma(state.o[0][2 * i % (HS / 16)], v[0], p[0][0], p[0][1]);
            N::mma(state.o[0][(2 * i + 1) % (HS / 16)], v[1], p[0][0], p[0][1]);
        } else N::mma(state.o[0][i % (HS / 16)], loaded, p[0][0], p[0][1]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Who does what

// The query (x) and head (y) of a column of a tile, of `width` columns; query -1: the column is empty. Factored: a tile
// has heads of one query. Grouped: columns are packed.
__device__ inline int2 decode_column(const DecodeArgs &args, int width, int tile, int column) {
    const int heads = args.shape.heads, tiles_per_query = ceil_div(heads, width), flat = tile * width + column;
    int2 x = args.n == 1 ? make_int2(0, flat)
           : args.shape.factored ? make_int2(tile / tiles_per_query, tile % tiles_per_query * width + column)
                                 : make_int2(flat / heads, flat % heads);
    return x.x >= args.n || x.y >= heads ? make_int2(-1, 0) : x;
}

// Where share i begins if every share is `each` things and the first `more` shares are one larger.
__host__ __device__ inline int decode_share(int i, int each, int more) { return i * each + (i < more ? i : more); }

// The runs of pages that clusters process. The pages of all streams form one row, sequence by sequence.
struct DecodeRuns {
    const int *first;           // (B + 1) pages of one stream before each sequence
    int B, streams, splits;
    int parts, each, more;      // splits 0: `parts` clusters have a run, of `each` pages, and the first `more` one more
    __device__ DecodeRuns(const DecodeArgs &args, const DecodePlan &plan, const int *first)
        : first(first), B(args.B), streams(args.shape.streams), splits(args.splits) {
        const unsigned total = first[B] * streams;
        // at least one run per stream, as far as there are clusters
        parts = min(plan.clusters, max((int)(total / (unsigned)plan.min_pages), B * streams));
        each = total / (unsigned)parts, more = total - each * parts;
    }
    __device__ int pages(int b) const { return first[b + 1] - first[b]; }
    __device__ int base(int b, int stream) const { return first[b] * streams + stream * pages(b); }
    __device__ static int owner_of(unsigned page, unsigned each, unsigned more) {
        unsigned large = more * (each + 1);
        return page < large ? page / (each + 1) : more + (page - large) / each;
    }
    // The run of cluster i: pages begin ... end - 1. It may be empty.
    __device__ void run(int i, int *begin, int *end) const {
        *begin = *end = 0;
        if (splits == 0) {
            if (i < parts) *begin = decode_share(i, each, more), *end = decode_share(i + 1, each, more);
        } else if (i < B * streams * splits) {
            int flat_stream = i / splits, share = i % splits, b = flat_stream / streams;
            int all = pages(b), shares = min(splits, all), from = base(b, flat_stream % streams);
            if (share < shares) {
                *begin = from + decode_share(share, all / shares, all % shares);
                *end = from + decode_share(share + 1, all / shares, all % shares);
            }
        }
    }
    // The cluster whose run has this page, which is of this stream.
    __device__ int owner(int b, int stream, int page) const {
        if (splits == 0) return owner_of(page, each, more);
        int all = pages(b), shares = min(splits, all);
        return (b * streams + stream) * splits + owner_of(page - base(b, stream), all / shares, all % shares);
    }
};

// The part of a run, from `page` up to `end`, that is in one stream. The stream's pages are base ... base + all - 1.
struct DecodeSegment {
    int b, stream, base, all, end;
    __device__ DecodeSegment(const DecodeRuns &runs, int page, int run_end) {
        int low = 0;
        for (int high = runs.B - 1; low < high; ) {     // the last sequence that begins at or before the page
            int middle = (low + high + 1) / 2;
            if (runs.first[middle] * runs.streams <= page) low = middle;
            else high = middle - 1;
        }
        b = low, all = runs.pages(b);
        stream = runs.streams == 1 ? 0 : (unsigned)(page - runs.base(b, 0)) / (unsigned)all;
        base = runs.base(b, stream), end = min(run_end, base + all);
    }
};

// What the producer announces: this block's work on one segment of its cluster's run.
enum { DECODE_NO_PART = -1 };
struct DecodePart {
    int b, stream;              // b DECODE_NO_PART: the run is empty
    int before;                 // tokens of the sequence before the queries
    int page, pages;            // of the stream: this block's first page, and how many
    int groups;                 // groups that get pages: the fewest that need no more turns
    int slot;                   // in global memory, for the cluster's sums if other clusters have pages of the stream
    int clusters;               // that have pages of the stream
    int first_slot;             // slot of the first of them; slot i > 0 is (first_slot / 2 + i) * 2
    int last;                   // the cluster has no further segment
};

// ---------------------------------------------------------------------------------------------------------------------
// Merging sums

// A unit of a pair (decode_pairs) with the maxima and sums of its two columns.
struct DecodeUnit {
    float o[4], top[2], sum[2];

    __device__ float4 numbers() const { return make_float4(o[0], o[1], o[2], o[3]); }
    __device__ float4 sums() const { return make_float4(top[0], sum[0], top[1], sum[1]); }

    // Merges `count` records, a unit per lane. numbers(slot): the lane's unit of a record; sums(slot, column): maximum
    // and sum of column 0 or 1 of the pair.
    template <class Numbers, class Sums>
    __device__ __forceinline__ void merge(int count, Numbers numbers, Sums sums) {
        constexpr int AHEAD = 8;                            // loads of numbers in flight
        const int lane = threadIdx.x % 32;
        float4 units[AHEAD];
        auto load = [&](int from) {
            #pragma unroll
            for (int j = 0; j < AHEAD; j++) units[j] = numbers(min(from + j, count - 1));   // too many: weight 0
        };
        float all_top = -1e30f, all_sum = 0;                // of column lane / 16; lane % 16 handles one slot
        for (int e = 0; e < 4; e++) o[e] = 0;
        #pragma unroll 1
        for (int i = 0; i < count; i += 16) {
            load(i);
            const float2 s = i + lane % 16 < count ? sums(i + lane % 16, lane / 16) : make_float2(-INFINITY, 0);
            const float new_top = fmaxf(all_top, warp_max<16>(s.x));
            const float keep = ptx_exp2(all_top - new_top), weight = ptx_exp2(s.x - new_top);
            all_sum = all_sum * keep + warp_sum<16>(weight * s.y), all_top = new_top;
            if (i > 0) for (int e = 0; e < 4; e++) o[e] *= __shfl_sync(0xffffffff, keep, e / 2 * 16);
            #pragma unroll 1
            for (int j0 = 0; j0 < min(16, count - i); j0 += AHEAD) {
                if (j0 > 0) load(i + j0);
                #pragma unroll
                for (int j = 0; j < AHEAD; j++) {
                    const float weight0 = __shfl_sync(0xffffffff, weight, j0 + j);
                    const float weight1 = __shfl_sync(0xffffffff, weight, 16 + j0 + j);
                    o[0] += weight0 * units[j].x, o[1] += weight0 * units[j].y;
                    o[2] += weight1 * units[j].z, o[3] += weight1 * units[j].w;
                }
            }
        }
        for (int e = 0; e < 2; e++) {
            top[e] = __shfl_sync(0xffffffff, all_top, e * 16);
            sum[e] = __shfl_sync(0xffffffff, all_sum, e * 16);
        }
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// The fast kernel

// Grid: (clusters * cluster, chunks) blocks of a producer warp and plan.tiles * plan.groups compute warps. KV:
// HEADS_FACTORED or HEADS_GROUPED keys and values. RANKS: of both k and v, or DECODE_ANY_RANKS. ROTATED: mla's rotated
// part, with a latent of HS numbers; 0: other kinds.
template <class Number, int HS, int EIGHTS, HeadsKind KV, int RANKS, int ROTATED = 0>
__global__ void __launch_bounds__(32 * (decode_warps(HS, EIGHTS, RANKS) + 1), 1)
decode_kernel(const __grid_constant__ DecodeArgs args, const __grid_constant__ DecodePlan plan) {
    typedef DecodeNumber<Number> N;
    constexpr int WARPS = decode_warps(HS, EIGHTS, RANKS), WIDTH = 8 * EIGHTS, UNITS = HS / 2;
    constexpr int RECORD = decode_record_size(HS), PITCH = decode_q_pitch(HS);
    constexpr bool LATENT = ROTATED > 0;
    enum { COMPUTE_BARRIER = 1 };                               // named barrier of the compute warps
    __shared__ DecodePart parts[2];
    __shared__ int is_last;
    extern __shared__ __align__(1024) unsigned char smem[];     // declared as in attention.cuh
    const CacheShape &shape = args.shape;
    const bool factored_q = KV == HEADS_FACTORED && args.q.kind == HEADS_FACTORED;
    const int group_size = decode_group_size(plan, HS), pairs = decode_pairs(plan);
    const int warps = plan.tiles * plan.groups, threads = 32 * warps;       // that compute
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int places = plan.groups * plan.depth;

    // shared memory: DecodeSmem has the shapes
    float4 *merge = (float4 *)(smem + plan.smem.merge), *block_sums = (float4 *)(smem + plan.smem.block_sums);
    float2 *weights = (float2 *)(smem + plan.smem.weights);
    float4 *inbox = (float4 *)(smem + plan.smem.inbox);
    int2 *columns = (int2 *)(smem + plan.smem.columns);
    bf16 *q = (bf16 *)(smem + plan.smem.q), *bq = (bf16 *)(smem + plan.smem.bq);
    const bf16 *query_rows = (const bf16 *)(smem + plan.smem.query_rows);
    int *first = (int *)(smem + plan.smem.first), *lengths = (int *)(smem + plan.smem.lengths);
    const uint64_t *barriers = (const uint64_t *)(smem + plan.smem.barriers);
    auto full = [&](int place) { return smem_address(barriers + place); };
    auto free = [&](int place) { return smem_address(barriers + places + place); };
    const uint32_t query_full = smem_address(barriers + 2 * places), query_free = query_full + 8;
    const uint32_t part_full = query_full + 16;
    const uint32_t sums_full = query_full + 24;                 // the inbox is full
    const uint32_t sums_free = query_full + 32;                 // all blocks of the cluster have read their inbox

    const int rank = ptx_cluster_rank(), cluster = blockIdx.x >> plan.cluster_log2;
    const int own_pairs = rank < pairs ? ((pairs - 1 - rank) >> plan.cluster_log2) + 1 : 0;
    const int inbox_bytes = plan.cluster * own_pairs * RECORD * 16;
    const int query0 = max(decode_column(args, WIDTH, blockIdx.y * plan.tiles, 0).x, 0);    // first query of the chunk
    const int queries = min(plan.queries, args.n - query0);

    auto fetch_queries = [&](int b, int stream) {               // by one warp
        const floatX *row = args.fac + ((int64_t)b * args.n + query0) * args.Pp +
                            (args.q.kind == HEADS_FACTORED ? 0 : args.q.b + stream * shape.heads * HS);
        ptx_fetch_rows(smem_address(query_rows), (const unsigned char *)row, plan.query_bytes, queries,
                       args.Pp * (int)sizeof(floatX), query_full);
    };

    ptx_let_next_begin();
    int length = 0;             // producer: lane i has the length of sequence i
    if (warp == warps) {
        if (lane < args.B) length = args.lengths[lane];
        if (lane == 0) {
            ptx_barrier_init(query_full, PTX_BULK_COPIES ? 1 : 32);
            ptx_barrier_init(query_free, warps * PTX_ARRIVING_LANES);
            ptx_barrier_init(part_full, PTX_ARRIVING_LANES);
            if (plan.cluster > 1) {
                ptx_barrier_init(sums_full, 1), ptx_barrier_init(sums_free, plan.cluster);
                ptx_barrier_arrive_expect(sums_full, inbox_bytes);      // before any record can arrive
            }
        }
    } else {
        const int place = lane * warps + warp;          // spread over the warps, because an init takes 50 clocks
        if (place < places) {
            ptx_barrier_init(full(place), PTX_BULK_COPIES ? 1 : 32);
            ptx_barrier_init(free(place), plan.tiles * PTX_ARRIVING_LANES);
        }
        if (factored_q)                     // rows of bQ beyond the rank are zero
            for (int i = threadIdx.x; i < queries * (16 - args.q.R) * PITCH; i += threads) {
                const int query = i / ((16 - args.q.R) * PITCH);
                bq[(query + 1) * args.q.R * PITCH + i] = 0.0f;
            }
        for (int i = threadIdx.x; i < plan.tiles * WIDTH; i += threads)
            columns[i] = decode_column(args, WIDTH, blockIdx.y * plan.tiles + i / WIDTH, i % WIDTH);
    }
    ptx_barrier_init_fence();
    ptx_cluster_arrive();       // ptx_cluster_wait: the other blocks' barriers are initialized
    __syncthreads();            // this block's barriers, zeros and columns are written

    // The producer
    if (warp == warps) {
        int total = 0;
        #pragma unroll 1
        for (int b0 = 0; b0 < args.B; b0 += 32) {       // prefix sums of the sequences' pages
            if (b0 > 0) length = b0 + lane < args.B ? args.lengths[b0 + lane] : 0;
            int mine = b0 + lane < args.B ? (length + args.n + PAGE - 1) / PAGE : 0, sum = mine;
            #pragma unroll
            for (int x = 1; x < 32; x *= 2) {
                int y = __shfl_up_sync(0xffffffff, sum, x);
                if (lane >= x) sum += y;
            }
            if (b0 + lane < args.B) first[b0 + lane] = total + sum - mine, lengths[b0 + lane] = length;
            total += __shfl_sync(0xffffffff, sum, 31);
        }
        if (lane == 0) first[args.B] = total;
        __syncwarp();
        const DecodeRuns runs(args, plan, first);
        int run_begin, run_end;
        runs.run(cluster, &run_begin, &run_end);
        auto announce = [&](int i, const DecodePart &part) {
            if (lane == 0) parts[i % 2] = part;
            __syncwarp();
            if (lane < PTX_ARRIVING_LANES) ptx_barrier_arrive(part_full);
        };
        if (run_begin == run_end) announce(0, {DECODE_NO_PART});
        const int turn = lane / plan.groups, group = lane - turn * plan.groups;     // this lane's place, of a ring
        int parity = 0;                     // of that place's phase
        #pragma unroll 1
        for (int page = run_begin, i = 0; page < run_end; i++) {
            const DecodeSegment segment(runs, page, run_end);
            const unsigned char *row = args.cache +         // where page 0 of the row would be
                (((int64_t)segment.b * shape.streams + segment.stream) * args.pages - segment.base) * plan.page_bytes;
            const int all = segment.end - page, each = all >> plan.cluster_log2, more = all & (plan.cluster - 1);
            const int begin = page + decode_share(rank, each, more), end = page + decode_share(rank + 1, each, more);
            const int pages = end - begin, turns = ceil_div(pages, plan.groups);
            DecodePart part;
            part.b = segment.b, part.stream = segment.stream, part.before = lengths[segment.b];
            part.page = begin - segment.base, part.pages = pages;
            part.groups = turns <= 1 ? pages : ceil_div(pages, turns);
            part.slot = 2 * cluster + (run_begin < segment.base);   // the second slot, if its run has a stream before
            part.clusters = 1, part.first_slot = 0, part.last = segment.end == run_end;
            if (run_begin > segment.base || segment.base + segment.all > run_end) {
                const int first_cluster = runs.owner(segment.b, segment.stream, segment.base);
                const int last_cluster = runs.owner(segment.b, segment.stream, segment.base + segment.all - 1);
                int first_begin, unused;
                runs.run(first_cluster, &first_begin, &unused);
                part.clusters = last_cluster - first_cluster + 1;
                part.first_slot = 2 * first_cluster + (first_begin < segment.base);     // as part.slot
            }
            if (i > 0) {
                ptx_barrier_wait(query_free, i % 2 ^ 1);
                __syncwarp();       // a lane still waiting when the others complete the next phase would wait forever
                if (!LATENT) fetch_queries(segment.b, segment.stream);
            }
            announce(i, part);
            // this lane's next page
            int next = turn < plan.depth && group < part.groups ? turn * part.groups + group : pages;
            // Fetches what there is room for of the first `limit` pages, a page per lane. The phase before a fresh
            // barrier's first counts as complete.
            auto fetch = [&](int limit) {
                const bool mine = next < limit && ptx_barrier_done(free(lane), parity ^ 1);
                auto place_address = [&](int place) { return smem_address(smem + place * plan.page_bytes); };
                auto source = [&](int j) { return row + (int64_t)(begin + j) * plan.page_bytes; };
                if (!PTX_BULK_COPIES)
                    for (unsigned ready = __ballot_sync(0xffffffff, mine); ready; ready &= ready - 1) {
                        const int place = __ffs(ready) - 1, rows = 1, pitch = 0;
                        const unsigned char *from = source(__shfl_sync(0xffffffff, next, place));
                        ptx_fetch_rows(place_address(place), from, plan.page_bytes, rows, pitch, full(place));
                    }
                else if (mine) {
                    ptx_barrier_arrive_expect(full(lane), plan.page_bytes);
                    ptx_bulk_load(place_address(lane), source(next), plan.page_bytes, full(lane));
                }
                if (mine) next += part.groups * plan.depth, parity ^= 1;
            };
            if (i == 0) {           // complete pages may be read before the previous kernel has ended
                fetch(min(end, segment.base + part.before / PAGE) - begin);
                ptx_cluster_wait();
                ptx_wait_for_previous();
            }
            #pragma unroll 1
            while (__any_sync(0xffffffff, next < pages)) fetch(pages);
            page = segment.end;
        }
        return;
    }

    // The compute warps
    const int tile = warp % plan.tiles, group = warp / plan.tiles;
    const int inbox_pairs = decode_own_pairs(plan);
    const int2 head0 = columns[tile * WIDTH];
    const int slot_size = decode_slot_size(plan, HS);
    // (clusters, 2, slot_size): two slots per cluster, for the first and the last stream of its run
    float4 *slots = (float4 *)(args.scratch + plan.counters) + (int64_t)blockIdx.y * plan.clusters * 2 * slot_size;
    auto store = [&](const DecodePart &part, int pair, int index, const DecodeUnit &unit) {     // to the output
        #pragma unroll
        for (int e = 0; e < 2; e++) {
            const int2 column = columns[2 * pair + e];
            if (column.x < 0) continue;
            const int64_t row = (int64_t)part.b * args.n + column.x;
            floatX *out = args.out + (row * args.NH + part.stream * shape.heads + column.y) * HS;
            const float scale = __fdividef(plan.out_unit, unit.sum[e]);
            out[N::element(index / 8, index % 8, 0)] = (floatX)(unit.o[2 * e] * scale);
            out[N::element(index / 8, index % 8, 1)] = (floatX)(unit.o[2 * e + 1] * scale);
        }
    };

    unsigned phases = 0;        // of the places of the group's ring, a bit each
    #pragma unroll 1
    for (int i = 0; ; i++) {
        DecodeState<HS, EIGHTS> state;
        #pragma unroll
        for (int nt = 0; nt < EIGHTS; nt++) {
            state.top[nt][0] = state.top[nt][1] = -1e30f, state.sum[nt][0] = state.sum[nt][1] = 0;
            #pragma unroll
            for (int mt = 0; mt < HS / 16; mt++)
                state.o[nt][mt][0] = state.o[nt][mt][1] = state.o[nt][mt][2] = state.o[nt][mt][3] = 0;
        }

        ptx_barrier_wait(part_full, i % 2);
        const DecodePart &part = parts[i % 2];
        if (part.b == DECODE_NO_PART) break;

        // The queries, times q_unit, elements in the order of N::q_place
        if (i == 0) {
            if (warp == 0 || LATENT) {      // the producer fetches all further ones ahead
                ptx_wait_for_previous();
                if (!LATENT) fetch_queries(part.b, part.stream);
                __syncwarp();
            }
            ptx_cluster_wait();
        }
        uint32_t q_latent[(HS + ROTATED) / 32][4];
        if constexpr (LATENT) {
            // A thread's part of q, straight to registers. Empty columns have some query's.
            const int2 column = columns[tile * WIDTH + g];
            const int64_t row = (int64_t)part.b * args.n + max(column.x, 0);
            const floatX *from = args.fac + row * args.Pp + args.q.b + column.y * (HS + ROTATED);
            #pragma unroll
            for (int i = 0; i < (HS + ROTATED) / 32; i++)
                #pragma unroll
                for (int x = 0; x < 4; x++) {
                    uint32_t pair;
                    memcpy(&pair, from + 32 * i + x / 2 * 16 + N::q_element(t, x % 2), 4);
                    const float2 y = DecodeNumber<bf16>::unpack(pair);
                    q_latent[i][x] = N::pack(plan.q_unit * y.x, plan.q_unit * y.y);
                }
        } else ptx_barrier_wait(query_full, i % 2);
        if (factored_q) {
            // q = aQ (16 heads, 16 ranks) bQ; a tile has one query. First bQ moves to where ldmatrix reads it.
            constexpr int LANES = HS / 8;   // per row, 8 elements each
            #pragma unroll 1
            for (int r = threadIdx.x / LANES; r < queries * args.q.R; r += threads / LANES) {
                const int query = args.n == 1 ? 0 : r / args.q.R, row = r - query * args.q.R;
                const int d = threadIdx.x % LANES * 8;
                const bf16 *from = query_rows + query * (plan.query_bytes / 2) + args.q.b + row * HS + d;
                __nv_bfloat162 y[4], *to = (__nv_bfloat162 *)(bq + (query * 16 + row) * PITCH);
                #pragma unroll
                for (int x = 0; x < 4; x++) y[x] = __nv_bfloat162(from[2 * x], from[2 * x + 1]);
                #pragma unroll
                for (int x = 0; x < 4; x++) to[N::q_place(d + 2 * x) / 2] = y[x];
            }
            // Work item w: half of the elements (w % 2) of sixteen heads (w / 2 % SIXTEENS) of a tile (w / 2 /
            // SIXTEENS).
            constexpr int SIXTEENS = (WIDTH + 15) / 16;
            uint32_t aq[4];
            auto load_aq = [&](int w) {     // returns the query
                const int2 head = columns[w / 2 / SIXTEENS * WIDTH];
                const int query = max(head.x, query0) - query0;
                const bf16 *row = query_rows + query * (plan.query_bytes / 2) + args.q.a;
                #pragma unroll
                for (int x = 0; x < 4; x++) {
                    const int r = x / 2 * 8 + 2 * t, h = head.y + w / 2 % SIXTEENS * 16 + x % 2 * 8 + g;
                    const bf16 *from = row + min(h, shape.heads - 1) * args.q.R + r;
                    __nv_bfloat162 y(r < args.q.R ? from[0] : (bf16)0.0f, r + 1 < args.q.R ? from[1] : (bf16)0.0f);
                    memcpy(&aq[x], &y, 4);
                }
                return query;
            };
            int query = warp < plan.tiles * SIXTEENS * 2 ? load_aq(warp) : 0;
            ptx_named_barrier(COMPUTE_BARRIER, threads);        // bQ is written
            #pragma unroll 1
            for (int w = warp; w < plan.tiles * SIXTEENS * 2; w += warps) {
                if (w != warp) query = load_aq(w);
                const int first_column = w / 2 % SIXTEENS * 16, first_element = w % 2 * (HS / 2);
                const int row = w / 2 / SIXTEENS * WIDTH + first_column + g;
                const bf16 *bq_row = bq + (query * 16 + lane % 16) * PITCH;
                const uint32_t from = smem_address(bq_row + first_element + lane / 16 * 8);
                uint32_t *to = (uint32_t *)(q + row * PITCH + first_element + 2 * t);
                const bool second = first_column + 8 < WIDTH;
                #pragma unroll
                for (int j = 0; j < HS / 16; j += 2) {
                    uint32_t b_tiles[4];
                    ptx_ldmatrix_trans(b_tiles, from + 16 * j);
                    #pragma unroll
                    for (int x = 0; x < 2; x++) {
                        float sum[4] = {};
                        ptx_mma(sum, aq, b_tiles[2 * x], b_tiles[2 * x + 1]);
                        to[(j + x) * 4] = N::pack(plan.q_unit * sum[0], plan.q_unit * sum[1]);
                        if (!second) continue;
                        to[8 * PITCH / 2 + (j + x) * 4] = N::pack(plan.q_unit * sum[2], plan.q_unit * sum[3]);
                    }
                }
            }
        } else if (!LATENT)
            for (int j = threadIdx.x; j < plan.tiles * WIDTH * UNITS; j += threads) {       // two elements each
                const int2 column = columns[j / UNITS];
                const int query = max(column.x, query0) - query0, d = j % UNITS * 2;
                const bf16 *from = query_rows + query * (plan.query_bytes / 2) + column.y * HS + d;
                uint32_t *to = (uint32_t *)(q + j / UNITS * PITCH + N::q_place(d));
                *to = N::pack(plan.q_unit * (float)from[0], plan.q_unit * (float)from[1]);
            }
        ptx_named_barrier(COMPUTE_BARRIER, threads);            // q is written
        const bf16 *q_tile = q + tile * WIDTH * PITCH;
        uint32_t q_kept[EIGHTS][HS / 32][4];
        if (decode_q_stays(HS) && !LATENT)
            #pragma unroll
            for (int nt = 0; nt < EIGHTS; nt++)
                #pragma unroll
                for (int ks = 0; ks < HS / 32; ks++) decode_load_q<HS>(q_kept[nt][ks], q_tile + 8 * nt * PITCH, 2 * ks);

        // The pages. No lane waits for the queries or this part any more, so the next ones may be fetched.
        if (lane < PTX_ARRIVING_LANES) ptx_barrier_arrive(query_free);
        const int before = part.before, pages = part.pages, groups = part.groups;
        const int all_see = before + max(head0.x, 0) + 1;       // tokens that every column sees
        const typename DecodeLanes<Number, HS, RANKS, ROTATED>::Lane at(shape, plan, head0.y);
        #pragma unroll 1
        for (int page = group, turn = 0; page < (group < groups ? pages : 0); page += groups) {
            const int token = (part.page + page) * PAGE, place = turn * plan.groups + group;
            ptx_barrier_wait(full(place), phases >> turn & 1);
            const bool masked = token + PAGE > all_see;
            const int2 *masks = columns + tile * WIDTH + 2 * t;
            const int sees = before + 1 - token, live = before + args.n - token;
            unsigned char *in_ring = smem + place * plan.page_bytes;
            if constexpr (LATENT)
                decode_latent_page<Number, HS, ROTATED>(state, q_latent, in_ring, at, shape, plan, masked, masks, sees,
                                                        live);
            else
                decode_page<Number, HS, EIGHTS, KV, RANKS>(state, q_tile, q_kept, in_ring, at, shape, plan, head0.y,
                                                           masked, masks, sees, live);
            __syncwarp();
            if (lane < PTX_ARRIVING_LANES) ptx_barrier_arrive(free(place));
            phases ^= 1u << turn;
            if (++turn == plan.depth) turn = 0;
        }

        // Merge the sums: of the block's groups, then of the cluster's blocks, each block its own pairs, then of all
        // clusters with pages of the stream. `finish` ends the second step.
        auto finish = [&](int pair, int index, const DecodeUnit &unit) {
            if (part.clusters == 1) return store(part, pair, index, unit);
            float4 *record = slots + (int64_t)part.slot * slot_size + pair * RECORD;
            record[index] = unit.numbers();
            if (index == 0) record[UNITS] = unit.sums();
        };
        if (group < groups) {
            float4 *to = merge + group * group_size;
            #pragma unroll
            for (int nt = 0; nt < EIGHTS; nt++) {
                #pragma unroll
                for (int mt = 0; mt < HS / 16; mt++)    // permuted: no bank conflicts here and in the reads below
                    to[((tile * EIGHTS + nt) * (HS / 16) + mt) * 32 + t * 8 + (g ^ 2 * t)] =
                        make_float4(state.o[nt][mt][0], state.o[nt][mt][2], state.o[nt][mt][1], state.o[nt][mt][3]);
                #pragma unroll
                for (int e = 0; e < 2; e++)
                    #pragma unroll
                    for (int x = 4; x < 32; x *= 2)
                        state.sum[nt][e] += __shfl_xor_sync(0xffffffff, state.sum[nt][e], x);
                if (g == 0)
                    to[pairs * UNITS + (tile * EIGHTS + nt) * 4 + t] =
                        make_float4(state.top[nt][0], state.sum[nt][0], state.top[nt][1], state.sum[nt][1]);
            }
        }
        if (plan.cluster > 1 && i > 0) ptx_cluster_barrier_wait(sums_free, i % 2 ^ 1);  // every inbox has been read
        ptx_named_barrier(COMPUTE_BARRIER, threads);            // the groups' sums are written
        for (int j = threadIdx.x; j < 2 * pairs; j += threads) {        // one column: the weight of each group
            float2 sums[WARPS];
            float top = -1e30f, sum = 0;
            #pragma unroll
            for (int other = 0; other < WARPS; other++) {
                const float2 *group_sums = (const float2 *)(merge + other * group_size + pairs * UNITS);
                sums[other] = other < groups ? group_sums[j] : make_float2(-INFINITY, 0);
                top = fmaxf(top, sums[other].x);
            }
            #pragma unroll
            for (int other = 0; other < WARPS; other++) {
                const float weight = ptx_exp2(sums[other].x - top);
                sum += weight * sums[other].y;
                ((float *)weights)[(j / 2 * WARPS + other) * 2 + j % 2] = weight;
            }
            ((float2 *)block_sums)[j] = make_float2(top, sum);
        }
        ptx_named_barrier(COMPUTE_BARRIER, threads);            // the weights are written
        #pragma unroll 1
        for (int w = warp; w < pairs * (UNITS / 32); w += warps) {      // a unit per lane
            const int pair = w / (UNITS / 32), index = w % (UNITS / 32) * 32 + lane;
            const float4 *from = merge + (pair / 4 * (HS / 16) + index / 8) * 32 +
                                 pair % 4 * 8 + (index % 8 ^ pair % 4 * 2);
            const float4 sums = block_sums[pair];
            DecodeUnit unit = {{0, 0, 0, 0}, {sums.x, sums.z}, {sums.y, sums.w}};
            if (groups > 0) {
                float4 o[WARPS];
                #pragma unroll
                for (int j = 0; j < WARPS; j++) o[j] = from[min(j, groups - 1) * group_size];   // too many: weight 0
                #pragma unroll
                for (int j = 0; j < WARPS; j++) {
                    const float2 weight = weights[pair * WARPS + j];
                    unit.o[0] += weight.x * o[j].x, unit.o[1] += weight.x * o[j].y;
                    unit.o[2] += weight.y * o[j].z, unit.o[3] += weight.y * o[j].w;
                }
            }
            if (plan.cluster == 1) finish(pair, index, unit);
            else {
                const int owner = pair & (plan.cluster - 1), record = rank * inbox_pairs + (pair >> plan.cluster_log2);
                const uint32_t to = ptx_cluster_address(smem_address(inbox + record * RECORD), owner);
                const uint32_t barrier = ptx_cluster_address(sums_full, owner);
                ptx_cluster_send(to + index * 16, unit.numbers(), barrier);
                if (index == 0) ptx_cluster_send(to + UNITS * 16, unit.sums(), barrier);
            }
        }
        if (plan.cluster > 1) {
            ptx_cluster_barrier_wait(sums_full, i % 2);
            #pragma unroll 1
            for (int w = warp; w < own_pairs * (UNITS / 32); w += warps) {
                const int own = w / (UNITS / 32), index = w % (UNITS / 32) * 32 + lane, stride = inbox_pairs * RECORD;
                const float4 *from = inbox + own * RECORD;
                DecodeUnit unit;
                unit.merge(plan.cluster, [&](int slot) { return from[slot * stride + index]; },
                           [&](int slot, int e) { return ((const float2 *)(from + slot * stride + UNITS))[e]; });
                finish((own << plan.cluster_log2) + rank, index, unit);
            }
        }
        if (part.last && part.clusters == 1) break;
        ptx_named_barrier(COMPUTE_BARRIER, threads);            // merge and inbox have been read, the slot is written
        if (plan.cluster > 1 && !part.last) {                   // ready for the next part's records
            if (threadIdx.x == 0) ptx_barrier_arrive_expect(sums_full, inbox_bytes);
            __syncwarp();
            if (threadIdx.x < plan.cluster) ptx_cluster_barrier_arrive(ptx_cluster_address(sums_free, threadIdx.x));
        }
        if (part.clusters > 1) {
            if (threadIdx.x == 0) {
                const int64_t stream = ((int64_t)blockIdx.y * args.B + part.b) * shape.streams + part.stream;
                unsigned *arrived = (unsigned *)args.scratch + stream * plan.cluster + rank;
                is_last = ptx_count(arrived) == (unsigned)part.clusters - 1;
                if (is_last) *arrived = 0;                      // for the next launch
            }
            ptx_named_barrier(COMPUTE_BARRIER, threads);        // is_last is written
            #pragma unroll 1
            for (int w = is_last ? warp : own_pairs * (UNITS / 32); w < own_pairs * (UNITS / 32); w += warps) {
                const int pair = (w / (UNITS / 32) << plan.cluster_log2) + rank, index = w % (UNITS / 32) * 32 + lane;
                const float4 *from = slots + pair * RECORD;
                auto offset = [&](int j) {                      // of the j-th cluster's slot
                    return (int64_t)(j == 0 ? part.first_slot : (part.first_slot / 2 + j) * 2) * slot_size;
                };
                DecodeUnit unit;
                unit.merge(part.clusters, [&](int j) { return __ldcg(from + offset(j) + index); },
                           [&](int j, int e) { return __ldcg((const float2 *)(from + offset(j) + UNITS) + e); });
                store(part, pair, index, unit);
            }
            if (part.last) break;
        }
    }
}

template <class... Params>
inline void decode_start_(void (*kernel)(Params...), const DecodeArgs &args, const DecodePlan &plan,
                          cudaStream_t stream) {
    const dim3 grid((unsigned)(plan.clusters * plan.cluster), (unsigned)plan.chunks);
    const int warps = plan.tiles * plan.groups + 1;
    Launch where(grid, 32 * warps, (size_t)plan.smem.bytes, stream);
    where.cluster = plan.cluster, where.early = true;
    launch(kernel, where, args, plan);
}

template <class Number, int HS>
inline void decode_launch_(const DecodeArgs &args, const DecodePlan &plan, cudaStream_t stream) {
    constexpr int MORE = HS == 64 ? 5 : 4;      // 40 columns: heads of 64 only
    constexpr HeadsKind GROUPED = HEADS_GROUPED, FACTORED = HEADS_FACTORED;
    const int ranks = decode_ranks(args.shape), eights = plan.eights;
    auto *kernel = decode_kernel<Number, HS, 4, FACTORED, DECODE_ANY_RANKS>;
    if (!args.shape.factored) {
        if (eights == 1) kernel = decode_kernel<Number, HS, 1, GROUPED, 1>;
        else kernel = decode_kernel<Number, HS, 4, GROUPED, 1>;
    } else if (ranks == 1) {
        if (eights == 2) kernel = decode_kernel<Number, HS, 2, FACTORED, 1>;
        else if (eights == 5) kernel = decode_kernel<Number, HS, MORE, FACTORED, 1>;
        else kernel = decode_kernel<Number, HS, 4, FACTORED, 1>;
    } else if (ranks == 2) {
        if (eights == 2) kernel = decode_kernel<Number, HS, 2, FACTORED, 2>;
        else if (eights == 5) kernel = decode_kernel<Number, HS, MORE, FACTORED, 2>;
        else kernel = decode_kernel<Number, HS, 4, FACTORED, 2>;
    } else if (eights == 2) kernel = decode_kernel<Number, HS, 2, FACTORED, DECODE_ANY_RANKS>;
    decode_start_(kernel, args, plan, stream);
}

template <class Number>
inline void decode_launch_latent_(const DecodeArgs &args, const DecodePlan &plan, cudaStream_t stream) {
    if (args.shape.HSV == 256) decode_start_(decode_kernel<Number, 256, 1, HEADS_GROUPED, 1, 32>, args, plan, stream);
    else decode_start_(decode_kernel<Number, 512, 1, HEADS_GROUPED, 1, 32>, args, plan, stream);
}

// args.out (B n, NH HS): attention of the last n tokens of B sequences, 1 <= n <= 16. Their k and v are in the cache,
// and their factor rows, q rotated, in args.fac.
inline void flashtpa_decode(const DecodeArgs &args, cudaStream_t stream) {
    if (args.B < 1 || args.n < 1 || args.n > DECODE_MAX_QUERIES || args.q.R < 1)
        die(EXIT_SYSTEM, "flashtpa_decode: B %d, %d queries, q rank %d: each must be at least 1, queries at most %d",
            args.B, args.n, args.q.R, (int)DECODE_MAX_QUERIES);
    DecodePlan plan = decode_plan(args.shape, args.q, args.B, args.n, args.pages,
                                  args.cluster, args.splits, args.min_pages);
    if (plan.groups == 0) return decode_plain(args, stream);
    if constexpr (sizeof(floatX) == 2) {
        if (args.shape.latent && args.shape.number_bytes == 1) decode_launch_latent_<e4m3>(args, plan, stream);
        else if (args.shape.latent) decode_launch_latent_<bf16>(args, plan, stream);
        else if (args.shape.number_bytes == 1 && args.shape.HSK == 64) decode_launch_<e4m3, 64>(args, plan, stream);
        else if (args.shape.number_bytes == 1) decode_launch_<e4m3, 128>(args, plan, stream);
        else if (args.shape.HSK == 64) decode_launch_<bf16, 64>(args, plan, stream);
        else decode_launch_<bf16, 128>(args, plan, stream);
    }
}

#endif
