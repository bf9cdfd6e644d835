// Matrix products of a layer through cuBLASLt: times llmc/matmul.cuh.
//
//   make build/matmul
//   build/matmul [N [PRESET]]                the defaults: 24576 124M
//
// For each product: cuBLASLt's first heuristic, and the fastest candidate with the same bits, which the trainer uses.
// On one H200 that one is 5 to 12% faster, but no faster for weight gradients. P, the width of the factors, is tried
// with storage padded to 8 (the trainer's), 64 and 128: products 1% faster, but 4% more bytes elsewhere (dev/LOG.md,
// 2026-11-23).
#include "bench.cuh"
#include "../../llmc/matmul.cuh"
#include "../../llmc/model.h"

static void product(Matmul *mm, const char *name, MatmulShape s) {
    const MatmulPlan *p = matmul_plan(mm, s, 0);
    double flop = 2.0 * (double)s.M * (double)s.N * (double)s.K;
    printf("%-16s %6d %6d %6d  first %8.1f us %4.0f TFLOP/s   chosen %8.1f us %4.0f TFLOP/s (%2.0f%% of the ceiling)   "
           "%d of %d have its bits\n", name, (int)s.M, (int)s.N, (int)s.K,
           p->first_us, flop / p->first_us / 1e6,
           p->us, flop / p->us / 1e6, flop / p->us / 1e4 / CEILING_TFLOP_PER_S, p->same_bits, p->candidates);
}

int main(int argc, char **argv) {
    program_start(argv[0]);
    int64_t N = argument(argc, argv, 1, 24576);
    const Preset *p = find_preset(argc > 2 ? argv[2] : "124M");
    if (!p) die(EXIT_INPUT, "usage: matmul [N [PRESET]]");
    Config config = preset_config(p, ATTN_TPA);
    Model m;
    Matmul mm;
    matmul_init(&mm);
    for (int pad : {8, 64, 128}) {
        model_init(&m, &config, pad);
        int64_t C = config.n_embd, widths[] = {m.Pp, 2 * m.Fp};
        printf("pad %d\n", pad);
        for (int64_t width : widths) {
            product(&mm, "forward", {N, width, C, AS_IS, TRANSPOSED, TYPE_X, OVERWRITE});
            product(&mm, "backward input", {N, C, width, AS_IS, AS_IS, TYPE_X, OVERWRITE});
            product(&mm, "backward weight", {width, C, N, TRANSPOSED, AS_IS, CUDA_R_32F, ACCUMULATE});
        }
        model_free(&m);
    }
    matmul_free(&mm);
    return 0;
}
