// Modes that arguments name, the same on the CPU and the GPU.
#ifndef LLMC_MODES_H
#define LLMC_MODES_H

typedef enum { OVERWRITE, ACCUMULATE } OutputMode;          // out = ..., or out += ...
typedef enum { AS_IS, TRANSPOSED } Layout;                  // how a matrix is stored
typedef enum { ROTATE = 1, ROTATE_BACK = -1 } Direction;    // RoPE, and its inverse for gradients
typedef enum { LOSS_ONLY, LOSS_AND_DLOGITS } LossMode;      // evaluation, training

// Between a model and its host memory: host_weights gives room alone, or the model's values; load_weights takes
// weights, or AdamW's moments too.
typedef enum { ROOM_ONLY, WITH_VALUES } HostCopy;
typedef enum { WEIGHTS_ONLY, WEIGHTS_AND_MOMENTS } LoadWhat;

#endif
