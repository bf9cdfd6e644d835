// test_decode: the decoding kernels (llmc/flashtpa_decode.cuh) on an emulated GPU, with random shapes, lengths and cuts
// of the work in random schedules, checked against the CPU loops of dev/cuda/flashtpa_decode.cu.
//
//   test_decode [--cases N] [--seed N]         ends with "N passed, N failed"
#define BENCH_NO_MAIN
#include "dev/cuda/flashtpa_decode.cu"
#include "llmc/flags.h"

static int below(Random *random, int n) { return (int)random_below(random, n); }
static int one_to(Random *random, int n) { return 1 + below(random, n); }
static bool one_in(Random *random, int n) { return below(random, n) == 0; }

static LayerShape random_shape(Random *random) {
    static const AttnKind kinds[] = {ATTN_TPA, ATTN_TPA, ATTN_TPA, ATTN_TPA,
                                     ATTN_TPA_KVONLY, ATTN_MHA, ATTN_GQA, ATTN_MQA};
    LayerShape s;
    s.attn = kinds[below(random, 8)];
    s.NH = one_in(random, 3) ? one_to(random, 128) : one_to(random, 50);
    s.HS = one_in(random, 3) ? 128 : 64;
    s.RQ = one_to(random, 16), s.RK = one_to(random, 4);
    s.RV = one_in(random, 2) ? one_to(random, 4) : s.RK;
    if (s.attn == ATTN_MHA) s.NH = s.RK = one_to(random, 20), s.RV = 1;
    if (s.attn == ATTN_GQA) s.RK = one_to(random, 6), s.NH = s.RK * one_to(random, 10), s.RV = 1;
    if (s.attn == ATTN_MQA) s.RK = s.RV = 1;
    return s;
}

// Tokens before the queries: often none or few; at most three sequences are long, so that a case takes seconds.
static std::vector<int32_t> random_lengths(Random *random) {
    const int B = one_to(random, one_in(random, 2) ? 12 : 3);
    std::vector<int32_t> lengths;
    for (int b = 0; b < B; b++) {
        if (one_in(random, 4)) lengths.push_back(below(random, 3));
        else lengths.push_back(below(random, b < 3 && one_in(random, 6) ? 1000 : 120));
    }
    return lengths;
}

// Automatic, automatic with a random min_pages, and two random ones.
static std::vector<Cut> random_cuts(Random *random) {
    std::vector<Cut> cuts = {{0, 0, 0}, {0, 0, one_to(random, 5)}};
    cuts.push_back({1 << below(random, 5), below(random, 9), 0});
    cuts.push_back({1 << below(random, 4), one_to(random, 3), 0});
    for (Cut &cut : cuts) if (cut.cluster > gpu.multiprocessors || EMULATED_CC < 9) cut.cluster = 1;
    return cuts;
}

// mla: the sizes of the fast kernel, and odd ones, which the plain kernel has.
static void check_random_latent(Score *score, Random *random, int n, const std::vector<int32_t> &lengths,
                                int number_bytes, const std::vector<Cut> &cuts, uint64_t seed) {
    const bool odd = one_in(random, 3);
    const int kv = odd ? 8 * one_to(random, 8) : one_in(random, 3) ? 512 : 256, HSV = 8 * one_to(random, 2);
    const int rotated = odd ? 8 * one_to(random, 5) : 32, NH = one_to(random, odd ? 5 : 34);
    LatentLayer l(NH, HSV, 8 * one_to(random, 20), kv, rotated);
    check_latent(score, l, lengths, n, below(random, 60), number_bytes, odd ? std::vector<Cut>() : cuts, seed,
                 odd ? FAST_AND_PLAIN : FAST_ONLY);
}

static void check_random_variant(Score *score, Random *random, int n, const std::vector<int32_t> &all_lengths,
                                 int number_bytes, uint64_t seed) {
    const auto &x = checked_variants[below(random, CHECKED_VARIANTS)];
    std::vector<int32_t> lengths(all_lengths.begin(), all_lengths.begin() + std::min<size_t>(all_lengths.size(), 3));
    LayerShape s = {x.attn, one_to(random, 6), one_in(random, 2) ? 64 : 32, one_to(random, 8), one_to(random, 4), 0};
    s.RV = strstr(x.words, "share_kv_b") ? s.RK : one_to(random, 4);
    if (s.attn == ATTN_GQA) s.NH *= s.RK;
    for (int32_t &length : lengths) length = std::min(length, 60);
    check_variant(score, s, x.words, lengths, n, number_bytes, seed);
}

int main(int argc, char **argv) {
    program_start(argv[0]);
    int64_t cases, seed;
    Flag flags[] = {{0, "cases", FLAG_INT, &cases, "40", 1, 1e6, "random shapes, two seconds each", 0},
                    {0, "seed", FLAG_INT, &seed, "1", 0, 1e9, "of shapes and schedules", 0}};
    Error err;
    if (flags_parse(argc, argv, "test_decode: the decoding kernels on an emulated GPU", flags, 2, &err) != 0)
        die(EXIT_INPUT, "%s", err.text);
    gpu.seed = rng_stream((uint64_t)seed, 0);
    Random random = {rng_stream((uint64_t)seed, 1), 0};
    Score score = {0, 0};
    for (int64_t i = 0; i < cases; i++) {
        static const int multiprocessors[] = {1, 2, 7, 16, 20, 33, 48, 66};
        const LayerShape shape = random_shape(&random);
        const std::vector<int32_t> lengths = random_lengths(&random);
        const int n = one_in(&random, 3) ? one_to(&random, DECODE_MAX_QUERIES) : 1;
        gpu.multiprocessors = multiprocessors[below(&random, 8)];
        const std::vector<Cut> cuts = random_cuts(&random);
        if (one_in(&random, 3)) {
            const int number_bytes = one_in(&random, 2) ? E4M3_BYTES : BF16_BYTES;
            check_random_variant(&score, &random, n, lengths, number_bytes, (uint64_t)(seed * 1000 + i));
            continue;
        }
        if (one_in(&random, 4)) {
            const int number_bytes = one_in(&random, 2) ? E4M3_BYTES : BF16_BYTES;
            check_random_latent(&score, &random, n, lengths, number_bytes, cuts, (uint64_t)(seed * 1000 + i));
            continue;
        }
        Layer l(shape, lengths, n, below(&random, 60));
        const int number_bytes = one_in(&random, 2) ? E4M3_BYTES : BF16_BYTES;
        check_layer(&score, l, number_bytes, cuts, (uint64_t)(seed * 1000 + i),
                    l.NH() * l.rows < 3000 ? FAST_AND_PLAIN : FAST_ONLY);       // the plain kernel is slow here
    }
    return finish(&score);
}
