// Sampling on the GPU: the next token of each row of logits, chosen as in sampler.h, but without sorting.
//
// The last token that top-k or top-p keeps is found by radix select: one byte of its key at a time, from a histogram of
// how many tokens, or how much likelihood, each value of the byte has. Likelihoods are integers, 2^40 for the likeliest
// token, so that sums do not depend on their order.
// Source: ours.
#ifndef LLMC_SAMPLER_CUH
#define LLMC_SAMPLER_CUH

#include "cuda_utils.cuh"
#include "ptx.cuh"
#include "sampler.h"

enum { SAMPLER_THREADS = 1024, SAMPLER_WARPS = SAMPLER_THREADS / 32 };

// Keys are unsigned integers with the order of the floats.
__device__ inline uint32_t sampler_key(float x) {
    uint32_t bits = __float_as_uint(x);
    return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}
__device__ inline float sampler_value(uint32_t key) {
    return __uint_as_float(key & 0x80000000 ? key & 0x7fffffff : ~key);
}

typedef unsigned long long sampler_sum;     // a count of tokens, or a sum of likelihoods

__device__ inline sampler_sum warp_scan(sampler_sum x) {       // sum over this lane and those before it
    for (int i = 1; i < 32; i *= 2) {
        sampler_sum y = __shfl_up_sync(0xffffffff, x, i);
        if ((int)threadIdx.x % 32 >= i) x += y;
    }
    return x;
}

// Shared memory of a block.
struct SamplerShared {
    sampler_sum histogram[256], warps[SAMPLER_WARPS];
    uint32_t key;               // the byte that was found
    sampler_sum above;          // weight of all keys above it
};

// Sum over the block, returned to all threads.
__device__ inline sampler_sum sampler_total(sampler_sum x, SamplerShared *s) {
    x = warp_scan(x);
    __syncthreads();            // warps[] is free
    if (threadIdx.x % 32 == 31) s->warps[threadIdx.x / 32] = x;
    __syncthreads();
    x = s->warps[threadIdx.x % 32];
    return __shfl_sync(0xffffffff, warp_scan(x), 31);
}

// The largest key such that the tokens with this key or a larger one weigh at least `target` in total. *above: the
// weight of the larger ones alone. row (V); tokens below least_key do not count. weight(logit): a token's weight.
template <class Weight>
__device__ inline uint32_t sampler_threshold(const float *row, int V, uint32_t least_key, sampler_sum target,
                                             Weight weight, sampler_sum *above, SamplerShared *s) {
    uint32_t prefix = 0;
    sampler_sum before = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        __syncthreads();        // the histogram is free
        if (threadIdx.x < 256) s->histogram[threadIdx.x] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < V; i += SAMPLER_THREADS) {
            uint32_t key = sampler_key(row[i]);
            if (key >= least_key && (shift == 24 || key >> (shift + 8) == prefix))
                atomicAdd(&s->histogram[key >> shift & 255], weight(row[i]));
        }
        __syncthreads();
        if (threadIdx.x < 32) {     // lane l has the eight byte values from 255 - 8 l down
            sampler_sum mine = 0;
            for (int j = 0; j < 8; j++) mine += s->histogram[255 - 8 * threadIdx.x - j];
            sampler_sum sum = before + warp_scan(mine) - mine;
            for (int j = 0; j < 8; j++) {
                int byte = 255 - 8 * threadIdx.x - j;
                sampler_sum next = sum + s->histogram[byte];
                if (sum < target && next >= target) s->key = byte, s->above = sum;
                sum = next;
            }
        }
        __syncthreads();
        prefix = prefix << 8 | s->key, before = s->above;
    }
    *above = before;
    return prefix;
}

// One block: one row. next (B), logits (B, V) with rows `stride` apart, u (B) uniform in [0, 1).
__global__ void __launch_bounds__(SAMPLER_THREADS)
sample_kernel(int32_t *next, const float *logits, const double *u, SamplerOptions o, int V, int64_t stride) {
    __shared__ SamplerShared shared;
    __shared__ sampler_sum best;
    const float *row = logits + blockIdx.x * stride;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    // the likeliest token, the lowest id among equals; a row of NaN gives token 0
    sampler_sum mine = 0;
    for (int i = threadIdx.x; i < V; i += SAMPLER_THREADS)
        if (row[i] == row[i]) mine = max(mine, (sampler_sum)sampler_key(row[i]) << 32 | (0xffffffffu - (uint32_t)i));
    if (threadIdx.x == 0) best = 0;
    __syncthreads();
    for (int x = 16; x > 0; x /= 2) mine = max(mine, __shfl_xor_sync(0xffffffff, mine, x));
    if (lane == 0) atomicMax(&best, mine);
    __syncthreads();
    if (o.temperature == 0 || best == 0) {
        if (threadIdx.x == 0) next[blockIdx.x] = best == 0 ? 0 : (int32_t)(0xffffffffu - (uint32_t)best);
        return;
    }
    const float top = sampler_value((uint32_t)(best >> 32)), unit = 1.44269504f / (float)o.temperature;
    auto likelihood = [&](float x) { return (sampler_sum)(ptx_exp2(unit * (x - top)) * 0x1p40f); };

    // which tokens stay: those with larger keys than `key`, and the first `equals` of those with this key
    uint32_t key = 0;
    sampler_sum equals = (sampler_sum)V, above;
    if (o.top_k > 0 && o.top_k < V) {
        auto count_one = [](float) { return (sampler_sum)1; };
        const uint32_t any_key = 0;
        key = sampler_threshold(row, V, any_key, (sampler_sum)o.top_k, count_one, &above, &shared);
        equals = (sampler_sum)o.top_k - above;
    }
    if (o.top_p < 1) {
        sampler_sum sum = 0;
        for (int i = threadIdx.x; i < V; i += SAMPLER_THREADS)
            if (sampler_key(row[i]) > key) sum += likelihood(row[i]);
        sum = sampler_total(sum, &shared) + (key ? equals * likelihood(sampler_value(key)) : 0);
        sampler_sum target = max((sampler_sum)ceil(o.top_p * (double)sum), (sampler_sum)1);
        uint32_t last = sampler_threshold(row, V, key, target, likelihood, &above, &shared);
        sampler_sum each = max(likelihood(sampler_value(last)), (sampler_sum)1);
        sampler_sum wanted = (target - above + each - 1) / each;
        equals = last == key && key ? min(equals, wanted) : wanted;
        key = last;
    }
    const float least = (float)o.min_p * 0x1p40f;

    // Each warp has a run of ids. First count the tokens with this key in each run, then sum likelihoods and draw.
    const int run = (V + SAMPLER_THREADS - 1) / SAMPLER_THREADS * 32, begin = warp * run, end = min(V, begin + run);
    sampler_sum equals_before = 0;
    if (key) {
        sampler_sum count = 0;
        for (int i = begin + lane; i < end; i += 32) count += sampler_key(row[i]) == key;
        count = __shfl_sync(0xffffffff, warp_scan(count), 31);
        __syncthreads();        // warps[] is free
        if (lane == 0) shared.warps[warp] = count;
        __syncthreads();
        for (int w = 0; w < warp; w++) equals_before += shared.warps[w];
        __syncthreads();        // warps[] has been read
    }
    // Calls each(id, its mass, mass of the run up to and with it) over the warp's run, in order. All lanes must call
    // it.
    auto walk = [&](auto each) {
        sampler_sum rank = equals_before, sum = 0;
        for (int i0 = begin; i0 < end; i0 += 32) {
            int i = i0 + lane;
            uint32_t k = i < end ? sampler_key(row[i]) : 0;
            unsigned same = __ballot_sync(0xffffffff, i < end && k == key);
            int same_before = __popc(same & ((1u << lane) - 1));
            bool stays = i < end && row[i] == row[i] && (k > key || (k == key && rank + same_before < equals));
            sampler_sum mass = stays ? likelihood(row[i]) : 0;
            if ((float)mass < least) mass = 0;
            sampler_sum upto = sum + warp_scan(mass);
            each(i, mass, upto);
            rank += __popc(same), sum = __shfl_sync(0xffffffff, upto, 31);
        }
        return sum;
    };
    sampler_sum run_mass = walk([](int, sampler_sum, sampler_sum) {});
    __syncthreads();            // warps[] is free
    if (lane == 0) shared.warps[warp] = run_mass;
    __syncthreads();
    sampler_sum total = 0, before = 0;
    for (int w = 0; w < SAMPLER_WARPS; w++) {
        if (w < warp) before += shared.warps[w];
        total += shared.warps[w];
    }
    const sampler_sum drawn = min((sampler_sum)(u[blockIdx.x] * (double)total), total - 1);
    if (before <= drawn && drawn < before + run_mass)
        walk([&](int i, sampler_sum mass, sampler_sum upto) {
            if (before + upto - mass <= drawn && drawn < before + upto) next[blockIdx.x] = i;
        });
}

// next (B) from logits (B, V), rows `stride` apart, and uniform numbers u (B) in [0, 1), all in GPU memory.
inline void sample_tokens(int32_t *next, const float *logits, const double *u, const SamplerOptions *o,
                          int64_t B, int64_t V, int64_t stride, cudaStream_t stream) {
    if (o->known > 0 && o->known < V) V = o->known;
    launch(sample_kernel, {(unsigned)B, SAMPLER_THREADS, 0, stream}, next, logits, u, *o, (int)V, stride);
}

#endif
