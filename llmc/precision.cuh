// The type of weights, activations and activation gradients on the GPU: bf16, or fp32 in a build for checking
// (-DPRECISION_FP32). Master weights, weight gradients, optimizer state, sums and losses are fp32 or double in both.
#ifndef LLMC_PRECISION_CUH
#define LLMC_PRECISION_CUH

#include "cuda_utils.cuh"

#ifdef PRECISION_FP32
typedef float floatX;
#define PRECISION_NAME "fp32"
#else
typedef bf16 floatX;
#define PRECISION_NAME "bf16"
#endif

typedef Packed16<floatX> PackedX;

#endif
