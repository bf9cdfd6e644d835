// Numbers of 8 bits, e4m3 as NVIDIA, ARM and Intel define it (arXiv 2209.05433): sign, 4 bits of exponent with bias 7, 3 bits of mantissa;
// no infinities, the largest is 448, 0x7F and 0xFF are not numbers. A cache in e4m3 has one fp32 scale for each group of a token's numbers.
#ifndef LLMC_FP8_H
#define LLMC_FP8_H

#include <math.h>
#include "utils.h"

#define E4M3_MAX 448.0f

// The nearest e4m3 number, ties to the even one; what is beyond 448 becomes 448.
LLMC_FN uint8_t e4m3_from_float(float x) {
    if (isnan(x)) return 0x7F;
    uint8_t sign = signbit(x) ? 0x80 : 0;
    x = fabsf(x);
    if (x >= E4M3_MAX) return (uint8_t)(sign | 0x7E);
    if (x < 0x1p-6f) return (uint8_t)(sign | (int)rintf(x * 0x1p9f));       // subnormal: steps of 2^-9; 8 of them are 2^-6, code 8
    int e;
    float mantissa = frexpf(x, &e);                                         // x = mantissa 2^e, mantissa in [1/2, 1)
    return (uint8_t)(sign | ((e + 6) * 8 + (int)rintf(mantissa * 16) - 8)); // 16 after rounding carries into the exponent
}

LLMC_FN float e4m3_to_float(uint8_t code) {
    int e = code >> 3 & 15, mantissa = code & 7;
    float x = (code & 0x7F) == 0x7F ? NAN : e == 0 ? ldexpf((float)mantissa, -9) : ldexpf((float)(8 + mantissa), e - 10);
    return code & 0x80 ? -x : x;
}

// codes (n) and their scale: x is about scale * code. The scale makes the largest of them 448; it is 1 where all are zero.
LLMC_FN float e4m3_quantize(uint8_t *codes, const float *x, int64_t n) {
    float largest = 0;
    for (int64_t i = 0; i < n; i++) largest = fmaxf(largest, fabsf(x[i]));
    float scale = largest > 0 ? largest / E4M3_MAX : 1;
    for (int64_t i = 0; i < n; i++) codes[i] = e4m3_from_float(x[i] / scale);
    return scale;
}

#endif
