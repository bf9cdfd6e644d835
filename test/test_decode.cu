// test_decode: the decoding kernels (llmc/flashtpa_decode.cuh) on an emulated GPU, on random shapes, lengths and ways to cut the work, in random
// schedules, against the sums of dev/cuda/flashtpa_decode.cu.
//
//   test_decode [--cases N] [--seed N]         ends with "N passed, N failed"
#define BENCH_NO_MAIN
#include "dev/cuda/flashtpa_decode.cu"
#include "llmc/flags.h"

static int random_below(int n) { return (int)(gpu_random() % (uint64_t)n); }

int main(int argc, char **argv) {
    set_program_name(argv[0]);
    int64_t cases, seed;
    Flag flags[] = {{0, "cases", FLAG_INT, &cases, "40", 1, 1e6, "random shapes, two seconds each", 0},
                    {0, "seed", FLAG_INT, &seed, "1", 0, 1e9, "of shapes and schedules", 0}};
    Error err;
    if (flags_parse(argc, argv, "test_decode: the decoding kernels on an emulated GPU", flags, 2, &err) != 0) die(EXIT_INPUT, "%s", err.text);
    gpu.seed = rng_stream((uint64_t)seed, 0);
    int64_t failed = 0;
    for (int64_t i = 0; i < cases; i++) {
        static const AttnKind kinds[] = {ATTN_TPA, ATTN_TPA, ATTN_TPA, ATTN_TPA, ATTN_TPA_KVONLY, ATTN_MHA, ATTN_GQA, ATTN_MQA};
        static const int sizes[] = {1, 2, 7, 16, 20, 33, 48, 66};
        const AttnKind kind = kinds[random_below(8)];
        int NH = 1 + random_below(random_below(3) ? 50 : 128), HS = random_below(3) ? 64 : 128, RQ = 1 + random_below(16), RK = 1 + random_below(4);
        int RV = random_below(2) ? RK : 1 + random_below(4), n = random_below(3) ? 1 : 1 + random_below(16), B = 1 + random_below(random_below(2) ? 3 : 12);
        if (kind == ATTN_MHA) NH = RK = 1 + random_below(20), RV = 1;
        if (kind == ATTN_GQA) RK = 1 + random_below(6), NH = RK * (1 + random_below(10)), RV = 1;
        if (kind == ATTN_MQA) RK = RV = 1;
        std::vector<int32_t> lengths;
        for (int b = 0; b < B; b++) lengths.push_back(random_below(4) == 0 ? random_below(3) : random_below(b < 3 && random_below(6) == 0 ? 1000 : 120));
        gpu.multiprocessors = sizes[random_below(8)];
        std::vector<Cut> cuts = {{0, 0, 0}, {0, 0, 1 + random_below(5)}};
        cuts.push_back({1 << random_below(5), random_below(9), 0}), cuts.push_back({1 << random_below(4), 1 + random_below(3), 0});
        for (Cut &cut : cuts) if (cut.cluster > gpu.multiprocessors || EMULATED_CC < 9) cut.cluster = 1;
        Layer l(kind, NH, HS, RQ, RK, RV, lengths, n, random_below(60));
        failed += !check_layer(l, 1 + random_below(2), cuts, (uint64_t)(seed * 1000 + i), NH * l.rows < 3000);
    }
    printf("%" PRId64 " passed, %" PRId64 " failed\n", cases - failed, failed);
    return failed > 0;
}
