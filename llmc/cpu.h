// The CPU as a device: threads, floating-point mode and memory. For train_t6.c and generate_t6.c.
#ifndef LLMC_CPU_H
#define LLMC_CPU_H

#include <inttypes.h>
#include <math.h>
#include <omp.h>
#include <sys/syscall.h>
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

// The cores that a process may use (0: this one), or 0 if the system does not say.
LLMC_FN int cpu_cores_of_(pid_t process) {
    unsigned long mask[128];        // of 8192 cores
    long bytes = syscall(SYS_sched_getaffinity, process, sizeof mask, mask);
    int cores = 0;
    for (long i = 0; i < bytes / (long)sizeof *mask; i++) cores += __builtin_popcountl(mask[i]);
    return cores;
}

// The cores that each of the ranks on this host can have: this machine's, or those that mpirun may use, divided by
// their number.
LLMC_FN int cpu_share_(int ranks) {
    int cores = (int)sysconf(_SC_NPROCESSORS_ONLN);
    int mpirun = getenv("OMPI_COMM_WORLD_SIZE") ? cpu_cores_of_(getppid()) : 0;
    if (mpirun > 0 && mpirun < cores) cores = mpirun;
    return cores > ranks ? cores / ranks : 1;
}

// Call once, before other threads start. threads: 0 for all cores. ranks: processes on this host, which share its
// cores.
LLMC_FN void cpu_start(int64_t threads, int ranks) {
    int share = cpu_share_(ranks);
    cpu_flush_denormals_();
    if (threads > 0) omp_set_num_threads((int)threads);
    else if (ranks > 1 && share < omp_get_max_threads()) omp_set_num_threads(share);
#ifdef USE_OPENBLAS
    openblas_set_num_threads(1);    // matmul divides the work itself
#endif
}

// A line for the log if the threads have fewer cores than they should: mpirun binds ranks to cores unless it is told
// not to. Otherwise "". Arguments as for cpu_start.
LLMC_FN const char *cpu_note(char out[192], int64_t threads, int ranks) {
    int mine = cpu_cores_of_(0), share = cpu_share_(ranks), mpirun = getenv("OMPI_COMM_WORLD_SIZE") != NULL;
    *out = 0;
    if (mpirun && mine < share && (threads == 0 || mine < threads))
        snprintf(out, 192, "note: mpirun has bound this rank to %d of the %d cores it could have; add --bind-to none "
                 "to mpirun\n", mine, share);
    else if (mine > 0 && threads > mine)
        snprintf(out, 192, "note: --threads %" PRId64 " is more than the cores that this process may use: %d\n",
                 threads, mine);
    return out;
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
