// The peak speed of NVIDIA GPUs in matrix products, by name: what the "% of peak" column of the log refers to.
#ifndef LLMC_GPUS_H
#define LLMC_GPUS_H

#include <ctype.h>
#include "utils.h"

// Dense bf16 products with fp32 sums, in TFLOP/s, from NVIDIA's data sheets; numbers for 2:4 sparsity are halved. 0: a
// name that must not be taken for its neighbour, and whose peak is not published.
typedef struct { const char *name; double tflops; } GpuPeak;

// The table and its number of rows.
LLMC_FN const GpuPeak *gpu_peaks(size_t *n) {
    static const GpuPeak peaks[] = {
        // Blackwell: data sheets of HGX B200 and B300 (8 GPUs), GB200 NVL72 and GB300 NVL72 (72 GPUs)
        {"B200", 2250}, {"GB200", 2500}, {"B300", 2250}, {"GB300", 2500},
        // Hopper: data sheets of H100, H200, GH200, H800 and H20. Plain names are SXM boards
        {"H100", 989}, {"H100 NVL", 835}, {"H100 PCIe", 756}, {"H200", 989}, {"H200 NVL", 835}, {"GH200", 989},
        {"H800", 989}, {"H800 PCIe", 756}, {"H20", 148},
        // Ada: data sheets of L4, L40 and L40S
        {"L4", 121}, {"L40", 181}, {"L40S", 362},
        // Ampere: data sheets of A100, A800, A40, A30, A10 and A10G. The A10G, made for AWS, has slower tensor cores
        {"A100", 312}, {"A800", 312}, {"A40", 150}, {"A30", 165}, {"A10", 125}, {"A10G", 70},
        // GeForce: appendices of the architecture white papers of GA102, Ada and RTX Blackwell
        {"RTX 3090", 71}, {"RTX 3090 Ti", 80}, {"RTX 4090", 165}, {"RTX 4090 D", 0}, {"RTX 5090", 210},
        {"RTX 5090 D", 0}};
    *n = sizeof peaks / sizeof *peaks;
    return peaks;
}

// Whether `words` occurs in text as whole words: "A100" does in "NVIDIA A100-SXM4-80GB", not in "NVIDIA A100X".
LLMC_FN int has_words_(const char *text, const char *words) {
    size_t n = strlen(words);
    for (const char *at = text; (at = strstr(at, words)) != NULL; at++)
        if ((at == text || !isalnum((unsigned char)at[-1])) && !isalnum((unsigned char)at[n])) return 1;
    return 0;
}

// The peak in a table of n rows. The longest matching name wins, wherever it is in the table. Laptop GPUs and MIG
// slices are not known: their names contain that of a faster GPU.
LLMC_FN double gpu_peak_find(const GpuPeak *peaks, size_t n, const char *name) {
    size_t longest = 0;
    double tflops = 0;
    if (has_words_(name, "Laptop") || has_words_(name, "MIG")) return 0;
    for (size_t i = 0; i < n; i++) {
        size_t length = strlen(peaks[i].name);
        if (length > longest && has_words_(name, peaks[i].name)) longest = length, tflops = peaks[i].tflops;
    }
    return tflops;
}

// The peak of a GPU in TFLOP/s, or 0 if it is not known. name: as the CUDA runtime gives it ("NVIDIA H100 80GB HBM3").
LLMC_FN double gpu_peak_tflops(const char *name) {
    size_t n;
    const GpuPeak *peaks = gpu_peaks(&n);
    return gpu_peak_find(peaks, n, name);
}

#endif
