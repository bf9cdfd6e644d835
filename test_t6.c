// test_t6: proves train_t6.c's model right.
//
//   ./test_t6                         finite differences for every attention kind, then every file in test/golden of a kind we build
//   ./test_t6 --golden FILE...        these golden files (written by a float64 implementation in PyTorch)
//
// A golden file (safetensors; its config is JSON in the metadata) holds the weights under their published names, idx and targets
// (B, T), logits (B, T, V), loss, grad.<weight>, adamw.losses (10) and gen.tokens (24), the greedy tokens that follow idx[0].
// Every tensor in it must be known here and must have been compared, or the file fails.
//
// This file is compiled twice (see Makefile): in fp32, the trainer's own precision, for the golden files and this program; and with
// the trainer in double for the finite differences, whose error then is their own and not rounding's.
#define T6_MODEL_ONLY
#include "train_t6.c"

typedef struct { int passed, failed; } Score;

__attribute__((format(printf, 3, 4))) static void report(Score *score, int ok, const char *format, ...) {
    va_list args;
    va_start(args, format);
    printf("%s ", ok ? "ok  " : "FAIL");
    vprintf(format, args);
    putchar('\n');
    va_end(args);
    ok ? score->passed++ : score->failed++;
}

// Mean loss, and its gradients in t->grads.
static double loss_and_gradients(T6 *t, const int32_t *idx, const int32_t *targets, int64_t B, int64_t T) {
    t6_zero_gradients(t);
    t6_forward(t, idx, B, T);
    double loss = t6_loss(t, targets, B * T, 1.0 / (double)(B * T)) / (double)(B * T);
    t6_backward(t, idx, B, T);
    return loss;
}

// ---------------------------------------------------------------------------------------------------------------------
// Finite differences: the object in double precision
#ifdef DIFFERENCES

// Central differences (loss(w + e) - loss(w - e)) / 2e with e = 1e-4 have a truncation error of e^2 f'''/6, about 1e-9 here, and in
// double a rounding error of about 1e-16 loss / e = 1e-11. Gradients are of the size 1e-3 to 1e-1, so agreement to 1e-5 of a
// tensor's largest gradient is asked for: it leaves three digits to spare, and a wrong factor anywhere misses it by far.
enum { ENTRIES = 12 };
static const double EPSILON = 1e-4, TOLERANCE = 1e-5;

// Odd numbers on purpose: heads, widths and lengths that no vector or tile divides, more than one block of queries and of classifier
// rows, two groups for gqa, ranks from 1 on. pad 8 also checks that padding takes no part.
static const struct { Config config; int64_t B, T; int pad; } shapes[] = {
    // attn            L  C  NH HS  V   RQ RK RV G  F   rope   eps       B  T   pad
    {{ATTN_TPA,        2, 24, 5,  8, 61, 3, 2, 2, 1, 0,  10000, 1e-6},   2, 9,   1},
    {{ATTN_TPA,        1, 20, 3,  6, 37, 6, 1, 4, 1, 7,  100,   1e-5},   1, 131, 8},
    {{ATTN_TPA,        2, 16, 47, 4, 29, 1, 3, 1, 1, 43, 10000, 1e-6},   3, 5,   8},
    {{ATTN_TPA_KVONLY, 2, 24, 5,  8, 61, 1, 2, 3, 1, 0,  10000, 1e-6},   2, 9,   1},
    {{ATTN_TPA_KVONLY, 1, 18, 7,  4, 61, 1, 1, 1, 1, 0,  10000, 1e-6},   2, 70,  8},
    {{ATTN_MHA,        2, 24, 3,  8, 61, 1, 1, 1, 1, 0,  10000, 1e-6},   2, 9,   1},
    {{ATTN_MHA,        1, 10, 5,  2, 61, 1, 1, 1, 1, 0,  10000, 1e-6},   2, 300, 8},
    {{ATTN_GQA,        2, 24, 6,  8, 61, 1, 1, 1, 2, 0,  10000, 1e-6},   2, 9,   1},
    {{ATTN_GQA,        1, 14, 9,  4, 61, 1, 1, 1, 3, 0,  10000, 1e-6},   1, 66,  8},
    {{ATTN_MQA,        2, 24, 5,  8, 61, 1, 1, 1, 1, 0,  10000, 1e-6},   2, 9,   1},
    {{ATTN_MQA,        1, 12, 11, 4, 61, 1, 1, 1, 1, 0,  10000, 1e-6},   1, 66,  8},
};

static double mean_loss(T6 *t, const int32_t *idx, const int32_t *targets, int64_t B, int64_t T) {
    t6_forward(t, idx, B, T);
    return t6_loss(t, targets, B * T, 0) / (double)(B * T);
}

static void check_shape(Score *score, int i, uint64_t seed, int verbose) {
    Config config = shapes[i].config;
    int64_t B = shapes[i].B, T = shapes[i].T, N = B * T;
    Error err;
    T6 t;
    uint64_t stream = rng_stream(seed, (uint64_t)i), draw = 0;
    if (config_check(&config, &err) != 0) die(EXIT_SYSTEM, "%s", err.text);
    t6_alloc(&t, &config, B, T, shapes[i].pad, 1, (Slice){0, 1});
    const Model *m = &t.model;
    int32_t *idx = xmalloc((size_t)N * sizeof *idx), *targets = xmalloc((size_t)N * sizeof *targets);
    for (int64_t n = 0; n < N; n++) {
        idx[n] = (int32_t)(rng_at(stream, draw++) % (uint64_t)config.vocab_size);
        targets[n] = (int32_t)(rng_at(stream, draw++) % (uint64_t)config.vocab_size);
    }
    // every weight random, the zero-initialised ones too: a zero weight would hide what is behind it
    for (int k = 0; k < m->num_tensors; k++) {
        const Tensor *w = &m->tensors[k];
        for (int64_t r = 0; r < w->rows; r++)
            for (int64_t c = 0; c < w->cols; c++) t.params[w->offset + (size_t)(r * w->ld + c)] = (real)(0.8 * rng_uniform(stream, draw++) - 0.4);
    }
    loss_and_gradients(&t, idx, targets, B, T);
    double worst = 0, padding = 0;
    char where[160] = "";
    unsigned char *known = xcalloc(m->num_stored, 1);
    for (int k = 0; k < m->num_tensors; k++) {
        const Tensor *w = &m->tensors[k];
        double largest = 0;
        for (int64_t r = 0; r < w->rows; r++)
            for (int64_t c = 0; c < w->cols; c++) {
                size_t at = w->offset + (size_t)(r * w->ld + c);
                largest = fmax(largest, fabs((double)t.grads[at]));
                known[at] = 1;
            }
        for (int e = 0; e < ENTRIES; e++) {
            int64_t r = (int64_t)(rng_at(stream, draw++) % (uint64_t)w->rows), c = (int64_t)(rng_at(stream, draw++) % (uint64_t)w->cols);
            if (k == 0 && e < ENTRIES / 2) r = idx[rng_at(stream, draw++) % (uint64_t)N];  // half of wte's entries: rows that were embedded
            real *x = &t.params[w->offset + (size_t)(r * w->ld + c)], saved = *x;
            *x = saved + (real)EPSILON;
            double up = mean_loss(&t, idx, targets, B, T);
            *x = saved - (real)EPSILON;
            double down = mean_loss(&t, idx, targets, B, T);
            *x = saved;
            double numeric = (up - down) / (2 * EPSILON), analytic = t.grads[x - t.params], error = fabs(numeric - analytic) / largest;
            if (!(error <= worst)) {
                worst = error;
                snprintf(where, sizeof where, "%s[%" PRId64 "][%" PRId64 "]: %.9g, by differences %.9g", w->name, r, c, analytic, numeric);
            }
        }
    }
    for (size_t at = 0; at < m->num_stored; at++)
        if (!known[at]) padding = fmax(padding, fabs((double)t.grads[at]));
    report(score, worst <= TOLERANCE && padding == 0, "differences %-10s L%d C%d NH%d HS%d T%d pad%d: %d weights, worst %.1e%s%s%s", attn_name(config.attn),
           (int)config.n_layer, (int)config.n_embd, (int)config.n_head, (int)config.head_dim, (int)T, shapes[i].pad, m->num_tensors, worst,
           verbose || worst > TOLERANCE ? " at " : "", verbose || worst > TOLERANCE ? where : "", padding != 0 ? "; padding has gradients" : "");
    free(known), free(idx), free(targets);
    t6_free(&t);
}

Score check_gradients_f64(uint64_t seed, int verbose) {
    Score score = {0, 0};
    for (int i = 0; i < (int)(sizeof shapes / sizeof *shapes); i++) check_shape(&score, i, seed, verbose);
    return score;
}

// ---------------------------------------------------------------------------------------------------------------------
// Golden files, and the program: the object in fp32
#else

Score check_gradients_f64(uint64_t seed, int verbose);

static const double GOLDEN_TOLERANCE = 1e-5;    // ||a - b|| / ||b|| of a tensor; fp32 against float64 gives about 1e-6

typedef struct {
    SafeTensors file;
    unsigned char *compared;    // one flag a tensor of the file
    const char *path;
    int bad;                    // comparisons that failed
    double worst;               // relative error so far
    char worst_at[256];
} Golden;

// The tensor of that name as doubles, marked as compared. Stops the file's test with a line when it is missing or has another size.
static double *golden_read(Golden *g, const char *name, uint64_t elements) {
    const SafeTensor *t = safetensors_find(&g->file, name);
    Error err;
    double *out = xmalloc((size_t)elements * sizeof *out);
    if (!t) fail(&err, "%s: has no tensor \"%s\"", g->path, name);
    else if (t->elements != elements)
        fail(&err, "%s: \"%s\" has %llu elements, its config says %llu", g->path, name, (unsigned long long)t->elements, (unsigned long long)elements);
    else if (safetensors_read(&g->file, t, 0, elements, out, &err) == 0) {
        g->compared[t - g->file.tensors] = 1;
        return out;
    }
    die(EXIT_INPUT, "%s", err.text);
}

// Compares rows x cols numbers, stored ld apart, with the golden tensor of that name: ||ours - golden|| / ||golden||.
static void golden_compare(Golden *g, const char *name, const float *ours, int64_t rows, int64_t cols, int64_t ld, double tolerance) {
    double *want = golden_read(g, name, (uint64_t)(rows * cols)), difference = 0, size = 0, largest = -1;
    int64_t worst = 0;
    for (int64_t i = 0; i < rows * cols; i++) {
        double d = ours[i / cols * ld + i % cols] - want[i];
        difference += d * d, size += want[i] * want[i];
        if (!(fabs(d) <= largest)) largest = fabs(d), worst = i;
    }
    double error = sqrt(difference) / sqrt(size);
    if (size == 0) error = difference == 0 ? 0 : INFINITY;
    char line[256];
    snprintf(line, sizeof line, "%s: error %.2e, most at [%" PRId64 "][%" PRId64 "]: %.9g, should be %.9g", name, error, worst / cols, worst % cols,
             (double)ours[worst / cols * ld + worst % cols], want[worst]);
    if (!(error <= tolerance)) {
        g->bad++;
        printf("     %s: %s (at most %.0e)\n", g->path, line, tolerance);
    }
    if (!(error <= g->worst)) g->worst = error, snprintf(g->worst_at, sizeof g->worst_at, "%s", line);
    free(want);
}

static int32_t *golden_tokens(Golden *g, const char *name, uint64_t n, int64_t V) {
    double *values = golden_read(g, name, n);
    int32_t *ids = xmalloc((size_t)n * sizeof *ids);
    for (uint64_t i = 0; i < n; i++) {
        if (!(values[i] >= 0 && values[i] < (double)V)) die(EXIT_INPUT, "%s: \"%s\" has the token %g, beyond the vocabulary of %" PRId64, g->path, name, values[i], V);
        ids[i] = (int32_t)values[i];
    }
    free(values);
    return ids;
}

// Number of elements that are padding and not exactly zero.
static size_t nonzero_padding(const Model *m, const float *buffer) {
    unsigned char *known = xcalloc(m->num_stored, 1);
    for (int i = 0; i < m->num_tensors; i++)
        for (int64_t r = 0; r < m->tensors[i].rows; r++) memset(known + m->tensors[i].offset + r * m->tensors[i].ld, 1, (size_t)m->tensors[i].cols);
    size_t n = 0;
    for (size_t i = 0; i < m->num_stored; i++) n += !known[i] && buffer[i] != 0;
    free(known);
    return n;
}

// Opens the file and reads its config. Returns -1 with the reason, and nothing open, where it is no golden file of a kind we build.
static int golden_open(Golden *g, Config *config, Error *err) {
    if (safetensors_open(&g->file, g->path, err) != 0) return -1;
    const char *json = safetensors_metadata(&g->file, "config");
    const SafeTensor *idx = safetensors_find(&g->file, "idx");
    int rc;
    if (!json || !idx || idx->num_dims != 2 || idx->elements == 0 || !safetensors_find(&g->file, "gen.tokens") ||
        !safetensors_find(&g->file, "adamw.losses"))
        rc = fail(err, "%s: its config, idx (B, T), gen.tokens or adamw.losses is missing; not a golden file", g->path);
    else rc = config_from_json(config, json, g->path, err);
    if (rc != 0) safetensors_close(&g->file);
    return rc;
}

static void check_golden(Score *score, const char *path, int pad) {
    Error err;
    Golden g = {.path = path};
    Config config;
    T6 t;
    if (golden_open(&g, &config, &err) != 0) {
        report(score, 0, "golden %s", err.text);
        return;
    }
    const SafeTensor *shape = safetensors_find(&g.file, "idx"), *gen = safetensors_find(&g.file, "gen.tokens");
    const SafeTensor *adamw = safetensors_find(&g.file, "adamw.losses");
    int64_t B = shape->shape[0], T = shape->shape[1], N = B * T, V = config.vocab_size, longest = T + (int64_t)gen->elements;
    g.compared = xcalloc((size_t)g.file.num_tensors, 1);
    t6_alloc(&t, &config, B, longest, pad, 1, (Slice){0, 1});
    const Model *m = &t.model;

    int used = 0;
    if (checkpoint_read_tensors(&g.file, m, "", t.params, &used, &err) != 0) die(EXIT_INPUT, "%s", err.text);
    for (int i = 0; i < m->num_tensors; i++) g.compared[safetensors_find(&g.file, m->tensors[i].name) - g.file.tensors] = 1;
    int32_t *idx = golden_tokens(&g, "idx", (uint64_t)N, V), *targets = golden_tokens(&g, "targets", (uint64_t)N, V);
    int32_t *want_tokens = golden_tokens(&g, "gen.tokens", gen->elements, V);

    // logits, loss, gradients
    float *logits = xmalloc((size_t)(N * V) * sizeof *logits), loss = (float)loss_and_gradients(&t, idx, targets, B, T);
    for (int64_t n = 0; n < N; n++) t6_logits(&t, n, logits + n * V);
    golden_compare(&g, "logits", logits, N, V, V, GOLDEN_TOLERANCE);
    golden_compare(&g, "loss", &loss, 1, 1, 1, GOLDEN_TOLERANCE);
    for (int i = 0; i < m->num_tensors; i++) {
        const Tensor *w = &m->tensors[i];
        char name[80];
        snprintf(name, sizeof name, "grad.%s", w->name);
        golden_compare(&g, name, t.grads + w->offset, w->rows, w->cols, w->ld, GOLDEN_TOLERANCE);
    }
    size_t padding = nonzero_padding(m, t.grads);

    // greedy tokens: each one by running the whole sequence again
    int64_t wrong = 0;
    int32_t *sequence = xmalloc((size_t)longest * sizeof *sequence);
    memcpy(sequence, idx, (size_t)T * sizeof *sequence);
    for (int64_t n = T; n < longest; n++) {
        t6_forward(&t, sequence, 1, n);
        t6_logits(&t, n - 1, logits);
        sequence[n] = sample_token(logits, (int)V, &(SamplerOptions){.temperature = 0}, 0);
        if (sequence[n] != want_tokens[n - T] && wrong++ == 0)
            printf("     %s: gen.tokens[%" PRId64 "]: %d, should be %d\n", path, n - T, sequence[n], want_tokens[n - T]);
    }

    // AdamW: the loss before each step
    uint64_t steps = adamw->elements;
    float *losses = xmalloc((size_t)steps * sizeof *losses);
    AdamW o = {1e-3, 0.9, 0.95, 1e-8, 0.1};
    for (uint64_t s = 0; s < steps; s++) {
        losses[s] = (float)loss_and_gradients(&t, idx, targets, B, T);
        adamw_update(t.params, t.adam_m, t.adam_v, t.grads, m->num_stored, &o, (int64_t)s + 1, clip_factor(gradient_norm(m, t.grads, NULL), 1.0));
    }
    double *want_losses = golden_read(&g, "adamw.losses", steps);
    for (uint64_t s = 0; s < steps; s++)
        if (!(fabs(losses[s] - want_losses[s]) <= GOLDEN_TOLERANCE * fabs(want_losses[s]))) {
            g.bad++;
            printf("     %s: adamw.losses[%d]: %.9g, should be %.9g\n", path, (int)s, losses[s], want_losses[s]);
        }
    padding += nonzero_padding(m, t.params) + nonzero_padding(m, t.adam_m) + nonzero_padding(m, t.adam_v);

    int unknown = 0;
    for (int i = 0; i < g.file.num_tensors; i++)
        if (!g.compared[i] && unknown++ == 0) printf("     %s: tensor \"%s\" is not known here\n", path, g.file.tensors[i].name);
    report(score, g.bad == 0 && wrong == 0 && padding == 0 && unknown == 0, "golden %s (pad %d): %d tensors, %d bad, %d unknown, %" PRId64
           " tokens wrong, %zu of padding not zero; worst %s", path, pad, g.file.num_tensors, g.bad, unknown, wrong, padding, g.worst_at);
    free(idx), free(targets), free(want_tokens), free(want_losses), free(losses), free(sequence), free(logits), free(g.compared);
    t6_free(&t);
    safetensors_close(&g.file);
}

int main(int argc, char **argv) {
    int64_t seed = 1, verbose = 0, golden_only = argc > 1 && !strcmp(argv[1], "--golden");
    Flag flags[] = {
        {0, "seed", FLAG_INT, &seed, "1", 0, 9e15, "of the finite differences' weights, tokens and choice of entries", 0},
        {0, "verbose", FLAG_SWITCH, &verbose, "0", 0, 1, "name the worst entry of every test", 0}};
    Score score = {0, 0};
    Error err;
    set_program_name(argv[0]);
#ifdef USE_OPENBLAS
    openblas_set_num_threads(1);
#endif
    if (golden_only) {
        if (argc == 2) die(EXIT_INPUT, "--golden needs files: %s --golden test/golden/*.safetensors", argv[0]);
        for (int i = 2; i < argc; i++) check_golden(&score, argv[i], 8);
    } else {
        if (flags_parse(argc, argv, "test_t6: gradient checks of train_t6.c. Also: test_t6 --golden FILE...", flags, 2, &err) != 0) die(EXIT_INPUT, "%s", err.text);
        score = check_gradients_f64((uint64_t)seed, (int)verbose);
        glob_t files;
        if (glob("test/golden/*.safetensors", 0, NULL, &files) != 0) report(&score, 0, "test/golden: no golden files; run test_t6 in the project's folder");
        else for (size_t i = 0; i < files.gl_pathc; i++)
            for (int pad = 1; pad <= 8; pad += 7) check_golden(&score, files.gl_pathv[i], pad);
        globfree(&files);
    }
    printf("%d passed, %d failed\n", score.passed, score.failed);
    return score.failed ? 1 : 0;
}
#endif
