// How generate_t6 checks itself: every way to compute the logits of what follows some tokens must give the same logits.
//   generate_t6 --check               for the user's model and prompt
//   generate_t6 --golden FILE...      and greedy tokens, for golden files
#ifndef TEST_CHECK_GENERATOR_H
#define TEST_CHECK_GENERATOR_H

#include <xxhash.h>

#include "llmc/generate_options.h"
#include "test/golden.h"

// Weights come from a checkpoint's folder, or from a golden file.
typedef struct { const char *folder; const SafeTensors *golden; } WeightSource;

// A generator with these weights. A file that cannot be read ends the program.
LLMC_FN Generator *generator_load(const GeneratorModel *ops, const GenerateOptions *o, const Config *c, int64_t B,
                                  int64_t capacity, WeightSource from) {
    Error err;
    int used = 0;
    Generator *g = ops->open(o, c, B, capacity);
    const Model *m = ops->model(g);
    float *weights = ops->host_weights(g);
    if ((from.golden ? checkpoint_read_tensors(from.golden, m, "", weights, &used, &err)
                     : checkpoint_load_weights(from.folder, m, weights, &err)) != 0) die(EXIT_INPUT, "%s", err.text);
    ops->load_weights(g);
    return g;
}

// An fp8 number is off by at most 2^-4 of itself, 2.6% RMS. Logits were off by 0.05% to 5% in the models of the tests,
// and by 7.5% at the worst place of one with sharp attention. A mistake (a scale, a code, a slot) makes about 100%.
#define FP8_TOLERANCE 0.25
// The tolerance of --check is this times that of golden files: rounding errors of logits grow with the sharpness of
// attention, 1e-7 to 5e-6 in trained models in fp32, and golden files have no sharp attention.
#define CHECK_MARGIN 10

typedef struct {
    double prefill, steps, batch, fp8;  // the largest ||a - b|| / ||b|| of each way
    uint64_t hash;                      // of the bits of all logits that were compared
    int passed;
} WayErrors;

// Compares logits (V) with those wanted, and raises *worst to their relative difference if that is larger.
LLMC_FN void compare_logits_(WayErrors *e, double *worst, const float *logits, const float *want, int64_t V) {
    double difference = 0, size = 0;
    for (int64_t i = 0; i < V; i++) difference += pow((double)logits[i] - want[i], 2), size += pow(want[i], 2);
    double error = sqrt(difference / size);
    if (!isnan(*worst) && !(error <= *worst)) *worst = error;     // NaN is worst
    e->hash = XXH64(logits, (size_t)V * sizeof *logits, e->hash);
}

// Computes the logits (V) after ids (n >= 2) by one prefill, by a prefill and steps of every size, in a batch with a
// shorter sequence, and with an fp8 cache, and compares all with those of one prefill. want (V): what these should be,
// or NULL if that is not known. tolerance: of all but fp8.
LLMC_FN WayErrors check_ways(const GeneratorModel *ops, const GenerateOptions *options, const Config *c,
                             WeightSource from, const int32_t *ids, int64_t n, const float *want, double tolerance) {
    GenerateOptions o = *options;
    o.longest_prefill = n;
    WayErrors e = {0, 0, 0, 0, 0, 0};
    int64_t V = c->vocab_size;
    float *reference = (float *)xmalloc((size_t)V * sizeof(float));
    float *logits = (float *)xmalloc(3 * (size_t)V * sizeof(float));
    for (int fp8 = 0; fp8 < 2; fp8++) {
        o.cache_kind = fp8 ? CACHE_FP8 : CACHE_NATIVE;
        Generator *g = generator_load(ops, &o, c, 1, n, from);
        if (!fp8) {
            ops->prefill(g, 0, ids, n);
            ops->logits(g, reference);
            compare_logits_(&e, &e.prefill, reference, want ? want : reference, V);
        }
        for (int64_t size = 1; size <= MAX_STEP_TOKENS && size < n; size++) {
            int64_t at = 1 + (n - 1) % size;
            ops->prefill(g, 0, ids, at);
            for (; at < n; at += size) ops->step(g, ids + at, size);
            ops->logits(g, logits);
            compare_logits_(&e, fp8 ? &e.fp8 : &e.steps, logits, reference, V);
        }
        ops->close(g);
    }
    o.cache_kind = CACHE_NATIVE;
    Generator *g = generator_load(ops, &o, c, 3, n, from);
    int32_t last[3] = {ids[n - 1], ids[0], ids[n - 1]};
    ops->prefill(g, 2, ids, n - 1);
    ops->prefill(g, 1, ids, n / 2);
    ops->prefill(g, 0, ids, n - 1);
    ops->step(g, last, 1);
    ops->logits(g, logits);
    compare_logits_(&e, &e.batch, logits, reference, V);
    compare_logits_(&e, &e.batch, logits + 2 * V, reference, V);
    ops->close(g);
    free(reference), free(logits);
    e.passed = e.prefill <= tolerance && e.steps <= tolerance && e.batch <= tolerance && e.fp8 <= FP8_TOLERANCE;
    return e;
}

// generate_t6 --check: all ways for the user's prompt ids (n). Returns the exit status.
LLMC_FN int check_prompt(const GeneratorModel *ops, const GenerateOptions *o, const Config *c, const char *folder,
                         const int32_t *ids, int64_t n) {
    WeightSource from = {folder, NULL};
    double tolerance = CHECK_MARGIN * ops->tolerance;
    WayErrors e = check_ways(ops, o, c, from, ids, n, NULL, tolerance);
    printf("logits after %" PRId64 " tokens, compared with those of one prefill:\n"
           "  off by %.1e with steps of 1 to %d tokens, by %.1e in a batch (at most %.0e), by %.1e with an fp8 cache "
           "(at most %.2g)\n  hash of all their bits %016" PRIx64 "\n%d passed, %d failed\n", n, e.steps,
           MAX_STEP_TOKENS, e.batch, tolerance, e.fp8, FP8_TOLERANCE, e.hash, e.passed, !e.passed);
    return !e.passed;
}

// Generates greedy tokens after the first T ids, through the cache, and compares them with the next new_tokens ids.
// Returns how many are wrong.
LLMC_FN int64_t check_greedy_(const GeneratorModel *ops, const GenerateOptions *o, Golden *golden, WeightSource from,
                              const int32_t *ids) {
    int64_t T = golden->T, end = T + golden->new_tokens, wrong = 0;
    Generator *g = generator_load(ops, o, &golden->config, 1, end, from);
    SamplerOptions greedy = {.temperature = 0, .top_k = 0, .top_p = 1, .min_p = 0, .known = 0};
    ops->prefill(g, 0, ids, T);
    for (int64_t i = T; i < end; i++) {
        int32_t next;
        ops->sample(g, &greedy, 0, &next);
        if (next != ids[i] && wrong++ == 0)
            printf("     %s: gen.tokens[%" PRId64 "]: %d, should be %d\n", golden->path, i - T, next, ids[i]);
        ops->step(g, &next, 1);
    }
    ops->close(g);
    return wrong;
}

// One golden file: greedy tokens through the cache, and all ways to the logits after idx[0].
LLMC_FN void check_golden_tokens(Score *score, const GeneratorModel *ops, const GenerateOptions *options,
                                 const char *path) {
    Error err;
    Golden golden;
    GenerateOptions o = *options;
    int opened = golden_open(&golden, path, &err);
    if (opened == -2) printf("skip golden %s\n", err.text);
    if (opened == -1) report(score, 0, "golden %s", err.text);
    if (opened != 0) return;
    int64_t B = golden.B, T = golden.T, V = golden.config.vocab_size, wrong = 0;
    int32_t *idx = golden_tokens(&golden, "idx", B * T, &err);
    int32_t *gen = idx ? golden_tokens(&golden, "gen.tokens", golden.new_tokens, &err) : NULL;
    double *logits = gen ? golden_read(&golden, "logits", B * T * V, &err) : NULL;
    if (!logits) report(score, 0, "golden %s", err.text);
    else {
        WeightSource from = {NULL, &golden.file};
        int32_t *ids = (int32_t *)xmalloc((size_t)(T + golden.new_tokens) * sizeof *ids);
        float *want = (float *)xmalloc((size_t)V * sizeof *want);
        memcpy(ids, idx, (size_t)T * sizeof *ids);
        memcpy(ids + T, gen, (size_t)golden.new_tokens * sizeof *ids);
        for (int64_t i = 0; i < V; i++) want[i] = (float)logits[(T - 1) * V + i];
        o.longest_prefill = T;
        wrong = check_greedy_(ops, &o, &golden, from, ids);
        WayErrors e = check_ways(ops, &o, &golden.config, from, ids, T, want, ops->tolerance);
        report(score, wrong == 0 && e.passed, "golden %s: %" PRId64 " tokens, %" PRId64 " wrong; logits off by %.1e "
               "(prefill), %.1e (steps of 1 to %d), %.1e (batch), %.1e (fp8 cache)", path, golden.new_tokens, wrong,
               e.prefill, e.steps, MAX_STEP_TOKENS, e.batch, e.fp8);
        free(ids), free(want);
    }
    free(idx), free(gen), free(logits);
    golden_close(&golden);
}

// generate_t6 --golden FILE...: returns the exit status.
LLMC_FN int check_golden_files(int argc, char **argv, const GeneratorModel *ops) {
    Score score = {0, 0};
    GenerateOptions o;
    memset(&o, 0, sizeof o);
    if (argc == 2) die(EXIT_INPUT, "--golden needs files: %s --golden test/golden/*.safetensors", argv[0]);
    ops->start(&o);
    for (int i = 2; i < argc; i++) check_golden_tokens(&score, ops, &o, argv[i]);
    return finish(&score);
}

#endif
