// What the test programs share: counting what passed, and random numbers.
#ifndef TEST_TESTING_H
#define TEST_TESTING_H

#include <stdarg.h>

#include "llmc/rng.h"

typedef struct { int passed, failed; } Score;

// Counts one check and prints it as "ok   ..." or "FAIL ...".
__attribute__((format(printf, 3, 4))) LLMC_FN void report(Score *score, int ok, const char *format, ...) {
    va_list args;
    va_start(args, format);
    printf("%s ", ok ? "ok  " : "FAIL");
    vprintf(format, args);
    putchar('\n');
    fflush(stdout);
    va_end(args);
    ok ? score->passed++ : score->failed++;
}

// Prints the line that scripts/test.sh reads, and returns the exit status. A program that checked nothing has failed.
LLMC_FN int finish(const Score *score) {
    printf("%d passed, %d failed\n", score->passed, score->failed);
    return score->failed > 0 || score->passed == 0;
}

// Random numbers that depend on the seed alone: Random r = {rng_stream(seed, 1), 0}.
typedef struct { uint64_t stream, draw; } Random;

LLMC_FN uint64_t random_bits(Random *r) { return rng_at(r->stream, r->draw++); }
LLMC_FN double random_uniform(Random *r) { return 2 * rng_uniform(r->stream, r->draw++) - 1; }     // in [-1, 1)
LLMC_FN int64_t random_below(Random *r, int64_t n) { return (int64_t)(random_bits(r) % (uint64_t)n); }

#endif
