// eval_t6.c: the paper's nine tasks on a T6 checkpoint, on the CPU, with the scores of lm-evaluation-harness.
// llmc/eval_program.h is the program; the model is the trainer's.
#define T6_NO_MAIN
#include "train_t6.c"

#include "llmc/eval_program.h"

int main(int argc, char **argv) {
    return evaluator_main(argc, argv, "eval_t6: scores a T6 checkpoint on the paper's tasks, on the CPU. Without "
                          "flags: the model in out, data/eval.", &t6_trainer);
}
