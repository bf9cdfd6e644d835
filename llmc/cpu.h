// The CPU as a device: threads, floating-point mode and memory. For train_t6.c and generate_t6.c.
#ifndef LLMC_CPU_H
#define LLMC_CPU_H

#include <math.h>
#include <omp.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif
#ifdef USE_OPENBLAS
#include <cblas.h>
#endif

#include "cpu_features.h"
#include "utils.h"

// Treats numbers below 1e-38 as zero, in this thread and those it starts. Sharp attention makes many of them, and
// arithmetic on them is so slow that a step took twice as long. Training does not need numbers that small.
LLMC_FN void cpu_flush_denormals_(void) {
#ifdef __SSE2__
    _mm_setcsr(_mm_getcsr() | 0x8040);      // flush to zero, denormals are zero
#endif
}

// Call once, before other threads start. threads: 0 for all cores. ranks: processes on this host, which share its
// cores.
LLMC_FN void cpu_start(int64_t threads, int ranks) {
    int share = (int)sysconf(_SC_NPROCESSORS_ONLN) / ranks;
    cpu_flush_denormals_();
    if (threads > 0) omp_set_num_threads((int)threads);
    else if (ranks > 1 && share < omp_get_max_threads()) omp_set_num_threads(share > 0 ? share : 1);
#ifdef USE_OPENBLAS
    openblas_set_num_threads(1);    // matmul divides the work itself
#endif
}

// Bytes that can be allocated without swapping; INFINITY where the system does not say.
LLMC_FN double cpu_available_bytes(void) {
    double kib = 0;
    char line[256];
    FILE *f = fopen("/proc/meminfo", "r");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "MemAvailable: %lf", &kib) == 1) break;
    if (f) fclose(f);
    return kib > 0 ? kib * 1024 : INFINITY;
}

#endif
