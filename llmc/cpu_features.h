// Refuses a processor that the program was not compiled for: make's -march=native uses what this machine's processor
// has, and the program would end with an illegal instruction on one that has less. Runs before main.
#ifndef LLMC_CPU_FEATURES_H
#define LLMC_CPU_FEATURES_H

#ifdef __aarch64__
#include <sys/auxv.h>
#endif
#include "utils.h"

// The compiler must not use in this function what it asks for.
#if defined(__x86_64__) && defined(__clang__)
#define LLMC_BASELINE __attribute__((target("no-avx,no-bmi,no-bmi2,no-lzcnt,no-sse4.1")))
#elif defined(__x86_64__)
#define LLMC_BASELINE __attribute__((target("no-avx,no-bmi,no-bmi2,no-lzcnt,no-sse4.1,no-movbe")))
#else
#define LLMC_BASELINE
#endif

// What the program was compiled to use and the processor lacks, or NULL. Of the extensions that came with one processor
// generation, one or two stand for all.
LLMC_BASELINE LLMC_FN const char *cpu_lacks_(void) {
#ifdef __x86_64__
    __builtin_cpu_init();
#ifdef __SSE4_2__
    if (!__builtin_cpu_supports("sse4.2")) return "SSE4.2";
#endif
#ifdef __AVX__
    if (!__builtin_cpu_supports("avx")) return "AVX";
#endif
#ifdef __AVX2__
    if (!__builtin_cpu_supports("avx2")) return "AVX2";
#endif
#ifdef __FMA__
    if (!__builtin_cpu_supports("fma")) return "FMA";
#endif
#ifdef __BMI2__
    if (!__builtin_cpu_supports("bmi2")) return "BMI2";
#endif
#ifdef __FMA4__
    if (!__builtin_cpu_supports("fma4")) return "FMA4";
#endif
#ifdef __XOP__
    if (!__builtin_cpu_supports("xop")) return "XOP";
#endif
#ifdef __AVX512F__
    if (!__builtin_cpu_supports("avx512f")) return "AVX-512";
#endif
#ifdef __AVX512BW__
    if (!__builtin_cpu_supports("avx512bw")) return "AVX-512 BW";
#endif
#ifdef __AVX512VNNI__
    if (!__builtin_cpu_supports("avx512vnni")) return "AVX-512 VNNI";
#endif
#ifdef __AVX512VBMI2__
    if (!__builtin_cpu_supports("avx512vbmi2")) return "AVX-512 VBMI2";
#endif
#ifdef __AVX512VPOPCNTDQ__
    if (!__builtin_cpu_supports("avx512vpopcntdq")) return "AVX-512 VPOPCNTDQ";
#endif
#endif
#ifdef __aarch64__      // bits of the Linux interface: arch/arm64/include/uapi/asm/hwcap.h
#ifdef __ARM_FEATURE_ATOMICS
    if (!(getauxval(AT_HWCAP) >> 8 & 1)) return "LSE";
#endif
#ifdef __ARM_FEATURE_FP16_VECTOR_ARITHMETIC
    if (!(getauxval(AT_HWCAP) >> 10 & 1)) return "FP16";
#endif
#ifdef __ARM_FEATURE_DOTPROD
    if (!(getauxval(AT_HWCAP) >> 20 & 1)) return "dot products";
#endif
#ifdef __ARM_FEATURE_SVE
    if (!(getauxval(AT_HWCAP) >> 22 & 1)) return "SVE";
#endif
#ifdef __ARM_FEATURE_SVE2
    if (!(getauxval(AT_HWCAP2) >> 1 & 1)) return "SVE2";
#endif
#endif
    return NULL;
}

__attribute__((constructor)) LLMC_BASELINE static void cpu_check_(void) {
    const char *lacks = cpu_lacks_();
    if (!lacks) return;
    fputs("t6: this program was compiled for a processor with ", stderr);
    fputs(lacks, stderr);
    fputs(", which this one lacks: build it on this machine, or for any with make CFLAGS=-O3\n", stderr);
    _exit(EXIT_SYSTEM);
}

#endif
