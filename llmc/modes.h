// Names for modes that a bare 0 or 1 would hide, the same on the CPU and the GPU.
#ifndef LLMC_MODES_H
#define LLMC_MODES_H

typedef enum { OVERWRITE, ACCUMULATE } OutputMode;          // out = ..., or out += ...
typedef enum { AS_IS, TRANSPOSED } Layout;                  // how an operand is stored
typedef enum { ROTATE = 1, ROTATE_BACK = -1 } Direction;    // RoPE, and its inverse for gradients
typedef enum { LOSS_ONLY, LOSS_AND_DLOGITS } LossMode;      // evaluation, training

// Between a model and its host memory: host_weights returns the memory alone, or filled with the model's values;
// load_weights loads the weights alone, or AdamW's moments too.
typedef enum { ROOM_ONLY, WITH_VALUES } HostCopy;
typedef enum { WEIGHTS_ONLY, WEIGHTS_AND_MOMENTS } LoadWhat;

#endif
