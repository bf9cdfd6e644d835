// The CPU as a device: threads, floating-point mode, OpenBLAS. For train_t6.c and generate_t6.c.
#ifndef LLMC_CPU_H
#define LLMC_CPU_H

#include <inttypes.h>
#include <omp.h>
#include <pthread.h>
#include <sys/mman.h>
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

LLMC_FN void *cpu_wait_(void *gate) {
    pthread_mutex_lock((pthread_mutex_t *)gate);
    pthread_mutex_unlock((pthread_mutex_t *)gate);
    return NULL;
}

// Ends the program with one line if it cannot have n threads. OpenMP's library would end it in its own words.
LLMC_FN void cpu_check_threads_(int n) {
    pthread_t *threads = (pthread_t *)xmalloc((size_t)n * sizeof *threads);
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    int started = 1, rc = 0;                // this one
    pthread_mutex_lock(&gate);
    while (started < n && (rc = pthread_create(&threads[started], NULL, cpu_wait_, &gate)) == 0) started++;
    pthread_mutex_unlock(&gate);
    for (int i = 1; i < started; i++) pthread_join(threads[i], NULL);
    free(threads);
    if (rc != 0)
        die(EXIT_SYSTEM, "cannot run on %d threads: %s; use fewer --threads, or change the limit (ulimit -u, -v, -s, "
            "or the container's)", n, strerror(rc));
}

#if defined(USE_OPENBLAS) && !defined(__cplusplus)
// OpenBLAS knows processors by model number. One that is newer than itself it takes for one of 2004, without AVX, and
// products take three times as long. NULL: it shall choose.
static inline char *blas_core_(void) {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return (char *)"SkylakeX";
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return (char *)"Haswell";
#endif
    return NULL;
}

// OpenBLAS starts a thread per core when it is loaded, before main. Each takes a buffer of 128 MiB, and one that gets
// none tries for ever. This program has its own threads, so OpenBLAS shall have none: it calls this getenv, not libc's.
extern char **environ;
__attribute__((weak)) char *getenv(const char *name) {
    size_t n = strlen(name);
    if (!strcmp(name, "OPENBLAS_NUM_THREADS")) return (char *)"1";
    for (char **e = environ; e && *e; e++)
        if (!strncmp(*e, name, n) && (*e)[n] == '=') return *e + n + 1;
    return strcmp(name, "OPENBLAS_CORETYPE") ? NULL : blas_core_();
}

// Of OpenBLAS, whose headers do not have them. NULL in a build that hides them.
__attribute__((weak)) void *blas_memory_alloc(int unused);
__attribute__((weak)) void blas_memory_free(void *buffer);

// Makes OpenBLAS take the buffers that n threads will use, which it keeps, while they can be had. More than 128 at once
// make some builds of it print warnings.
static inline void blas_take_buffers_(int n) {
#ifdef __powerpc__
    const size_t bytes = (size_t)256 << 20;
#else
    const size_t bytes = (size_t)128 << 20;
#endif
    void *buffers[128], *all = mmap(NULL, (size_t)n * bytes, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED)
        die(EXIT_SYSTEM, "OpenBLAS needs %zu MiB of address space for each of %d threads, and there is less: raise the "
            "limit (ulimit -v), use fewer --threads, or build with make BLAS=0", bytes >> 20, n);
    munmap(all, (size_t)n * bytes);
    if (!blas_memory_alloc) return;
    for (int i = 0; i < n && i < 128; i++) buffers[i] = blas_memory_alloc(0);
    for (int i = 0; i < n && i < 128; i++) blas_memory_free(buffers[i]);
}
#endif

// Call once, before other threads start. threads: 0 for all cores. ranks: processes on this host, which share its
// cores.
LLMC_FN void cpu_start(int64_t threads, int ranks) {
    int share = cpu_share_(ranks);
    cpu_flush_denormals_();
    if (threads > 0) omp_set_num_threads((int)threads);
    else if (ranks > 1 && share < omp_get_max_threads()) omp_set_num_threads(share);
    cpu_check_threads_(omp_get_max_threads());
#ifdef _OPENMP
    #pragma omp parallel
#endif
    cpu_flush_denormals_();         // starts the threads, so that their memory is taken when the rest is planned
#if defined(USE_OPENBLAS) && !defined(__cplusplus)
    openblas_set_num_threads(1);    // matmul divides the work itself
    blas_take_buffers_(omp_get_max_threads());
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

#endif
