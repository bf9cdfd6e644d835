// eval_t6.cu: the same as eval_t6.c on a GPU, in bf16 with logits in fp32 (PRECISION=FP32 is for checking). The model
// is the trainer's, train_t6.cu.
#define T6_NO_MAIN
#include "train_t6.cu"

#include "llmc/eval_program.h"

int main(int argc, char **argv) {
    return evaluator_main(argc, argv, "eval_t6cu: scores a T6 checkpoint on the paper's tasks, on the GPU. Without "
                          "flags: the model in out, data/eval.", &t6_trainer);
}
