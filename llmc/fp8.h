// 8-bit floating point, e4m3 as NVIDIA, ARM and Intel define it (arXiv 2209.05433): a sign, 4 bits of exponent with
// bias 7, 3 bits of mantissa. The largest number is 448; 0x7F and 0xFF are NaN; there are no infinities. A cache in
// e4m3 has one fp32 scale per group of a token's numbers.
#ifndef LLMC_FP8_H
#define LLMC_FP8_H

#include <math.h>
#include "utils.h"

#define E4M3_MAX 448.0f

// The nearest e4m3 number, ties to even. Beyond 448 it saturates.
LLMC_FN uint8_t e4m3_from_float(float x) {
    if (isnan(x)) return 0x7F;
    uint8_t sign = signbit(x) ? 0x80 : 0;
    x = fabsf(x);
    if (x >= E4M3_MAX) return (uint8_t)(sign | 0x7E);
    if (x < 0x1p-6f) return (uint8_t)(sign | (int)rintf(x * 0x1p9f));       // subnormal: steps of 2^-9, 8 of them 2^-6
    int e;
    float mantissa = frexpf(x, &e);                                         // x = mantissa 2^e, mantissa in [1/2, 1)
    return (uint8_t)(sign | ((e + 6) * 8 + (int)rintf(mantissa * 16) - 8)); // a rounded 16 carries into the exponent
}

LLMC_FN float e4m3_to_float(uint8_t code) {
    int e = code >> 3 & 15, mantissa = code & 7;
    float x = (code & 0x7F) == 0x7F ? NAN
            : e == 0 ? ldexpf((float)mantissa, -9) : ldexpf((float)(8 + mantissa), e - 10);
    return code & 0x80 ? -x : x;
}

// Quantizes x (n) to codes (n) and returns their scale: x[i] is about scale times code i. The scale makes the largest
// magnitude 448; it is 1 if all are zero.
LLMC_FN float e4m3_quantize(uint8_t *codes, const float *x, int64_t n) {
    float largest = 0;
    for (int64_t i = 0; i < n; i++) largest = fmaxf(largest, fabsf(x[i]));
    float scale = largest > 0 ? largest / E4M3_MAX : 1;
    for (int64_t i = 0; i < n; i++) codes[i] = e4m3_from_float(x[i] / scale);
    return scale;
}

#endif
