// Random numbers without state: number i of a stream is a hash of the stream and i. Any of them can be recomputed from
// the seed and its place (tensor and element, epoch and window, step and token), by any thread or rank, before or after
// a resume. The hash is the output function of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
// generators", 2014).
#ifndef LLMC_RNG_H
#define LLMC_RNG_H

#include "utils.h"

// SplitMix64's output function: a bijection of 64-bit integers that spreads every input bit over all output bits.
LLMC_FN uint64_t mix64(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

// The key of stream number `stream` of a seed. Streams nest: a key may be the seed of further streams.
LLMC_FN uint64_t rng_stream(uint64_t seed, uint64_t stream) {
    return mix64(mix64(seed + 0x9e3779b97f4a7c15u) ^ (stream * 0xd1342543de82ef95u));
}

// Number i of a stream: 64 random bits.
LLMC_FN uint64_t rng_at(uint64_t stream, uint64_t i) {
    return mix64(stream + (i + 1) * 0x9e3779b97f4a7c15u);
}

// Number i of a stream, uniform in [0, 1) with 53 random bits.
LLMC_FN double rng_uniform(uint64_t stream, uint64_t i) {
    return (double)(rng_at(stream, i) >> 11) * 0x1p-53;
}

// A pseudorandom permutation of [0, n) without a table: returns where element i goes, i < n. Four rounds of a Feistel
// network over the next power of four, repeated until the result is below n (at most 4 times on average).
LLMC_FN uint64_t rng_permute(uint64_t stream, uint64_t i, uint64_t n) {
    int half = 1;
    while (half < 32 && ((uint64_t)1 << (2 * half)) < n) half++;
    uint64_t mask = ((uint64_t)1 << half) - 1;
    do {
        uint64_t left = i >> half, right = i & mask;
        for (uint64_t round = 0; round < 4; round++) {
            uint64_t next = left ^ (rng_at(stream, right * 4 + round) & mask);
            left = right, right = next;
        }
        i = left << half | right;
    } while (i >= n);
    return i;
}

#endif
