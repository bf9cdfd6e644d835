// The random numbers of Python's module random: Mersenne Twister (MT19937, Matsumoto & Nishimura 1998), seeded as
// random.Random(seed) seeds it, and sample() of Python 3.11 to 3.13. lm-evaluation-harness draws its few-shot examples
// with them, so the same prompts need the same numbers.
#ifndef LLMC_PYTHON_RANDOM_H
#define LLMC_PYTHON_RANDOM_H

#include "utils.h"

enum { MT_WORDS = 624, MT_SHIFT = 397 };

typedef struct {
    uint32_t word[MT_WORDS];
    int used;                   // words of this round that were drawn
} PythonRandom;

// The word that seeding mixes into the next one.
LLMC_FN uint32_t mt_previous_(const PythonRandom *r, int i) { return r->word[i - 1] ^ (r->word[i - 1] >> 30); }

// After the last word of a round of seeding, word 0 becomes that word and the round starts again. Returns the next i.
LLMC_FN int mt_next_(PythonRandom *r, int i) {
    if (++i < MT_WORDS) return i;
    r->word[0] = r->word[MT_WORDS - 1];
    return 1;
}

// random.Random(seed): the reference implementation's init_by_array with the one-word key {seed}.
LLMC_FN void python_random_seed(PythonRandom *r, uint32_t seed) {
    r->word[0] = 19650218;
    for (int i = 1; i < MT_WORDS; i++) r->word[i] = mt_previous_(r, i) * 1812433253u + (uint32_t)i;
    int i = 1;
    for (int k = 0; k < MT_WORDS; k++, i = mt_next_(r, i))
        r->word[i] = (r->word[i] ^ (mt_previous_(r, i) * 1664525u)) + seed;
    for (int k = 0; k < MT_WORDS - 1; k++, i = mt_next_(r, i))
        r->word[i] = (r->word[i] ^ (mt_previous_(r, i) * 1566083941u)) - (uint32_t)i;
    r->word[0] = 0x80000000u;
    r->used = MT_WORDS;
}

// The next 32 random bits.
LLMC_FN uint32_t python_random_bits(PythonRandom *r) {
    if (r->used == MT_WORDS) {
        for (int i = 0; i < MT_WORDS; i++) {
            uint32_t joined = (r->word[i] & 0x80000000u) | (r->word[(i + 1) % MT_WORDS] & 0x7FFFFFFFu);
            r->word[i] = r->word[(i + MT_SHIFT) % MT_WORDS] ^ (joined >> 1) ^ (joined & 1 ? 0x9908B0DFu : 0);
        }
        r->used = 0;
    }
    uint32_t y = r->word[r->used++];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9D2C5680u;
    y ^= (y << 15) & 0xEFC60000u;
    return y ^ (y >> 18);
}

// A number below n, 1 <= n < 2^31: of as many bits as n has, drawn until one is below n.
LLMC_FN int64_t python_random_below(PythonRandom *r, int64_t n) {
    int bits = 64 - __builtin_clzll((unsigned long long)n);
    int64_t drawn;
    do drawn = python_random_bits(r) >> (32 - bits); while (drawn >= n);
    return drawn;
}

// random.sample(range(n), k), 0 <= k <= n < 2^31: out (k), in the order drawn. Python draws from a pool of all n where
// that takes less memory than a set of the k drawn, and the two ways draw different numbers.
LLMC_FN void python_random_sample(PythonRandom *r, int64_t n, int64_t k, int64_t *out) {
    int64_t set_size = 21, power = 1;
    while (power < 3 * k) power *= 4;
    if (k > 5) set_size += power;
    if (n <= set_size) {
        int64_t *pool = (int64_t *)xmalloc((size_t)n * sizeof *pool);
        for (int64_t i = 0; i < n; i++) pool[i] = i;
        for (int64_t i = 0; i < k; i++) {
            int64_t j = python_random_below(r, n - i);
            out[i] = pool[j];
            pool[j] = pool[n - i - 1];
        }
        free(pool);
        return;
    }
    for (int64_t i = 0; i < k; i++) {
        int64_t earlier;
        do {
            out[i] = python_random_below(r, n);
            for (earlier = 0; earlier < i && out[earlier] != out[i]; ) earlier++;
        } while (earlier < i);
    }
}

#endif
