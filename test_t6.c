// test_t6: proves train_t6.c's model right.
//
//   ./test_t6                         finite differences for every attention kind, then every file in test/golden
//   ./test_t6 --golden FILE...        these golden files (test/golden.h says what they hold)
//
// Every tensor of a golden file must be known here and must have been compared, or the file fails.
//
// This file is compiled twice (Makefile): in fp32, the trainer's own precision, for main and the golden files; and with
// the trainer in double for the finite differences, so that rounding adds little to their own error.
#define T6_MODEL_ONLY
#include "train_t6.c"

#include <glob.h>

#include "llmc/sampler.h"
#include "test/golden.h"

// Returns the mean loss of idx, targets (B, T); t6->grads = its gradients.
static double loss_and_gradients(T6 *t6, const int32_t *idx, const int32_t *targets, int64_t B, int64_t T) {
    t6_zero_gradients(t6);
    t6_forward(t6, idx, B, T);
    double N = (double)(B * T), loss = t6_loss(t6, targets, B * T, 1 / N, LOSS_AND_DLOGITS) / N;
    t6_backward(t6, idx, B, T);
    return loss;
}

// ---------------------------------------------------------------------------------------------------------------------
// Finite differences: the object in double precision
#ifdef DIFFERENCES

// Central differences (loss(w + e) - loss(w - e)) / 2e with e = 1e-4 have a truncation error of e^2 f'''/6, about
// 1e-9 here, and in double a rounding error of about 1e-16 loss / e = 1e-11. Gradients are of the size 1e-3 to 1e-1,
// so they must agree to 1e-5 of a tensor's largest gradient: that leaves three digits to spare, and a wrong factor
// anywhere misses it by far.
enum { ENTRIES = 12 };
static const double EPSILON = 1e-4, TOLERANCE = 1e-5;

// Odd numbers on purpose: heads, widths and lengths that are no multiple of a vector or tile, more than one block of
// queries and of classifier rows, several groups for gqa, ranks from 1 up. pad 8 also checks that padding has no
// effect.
static const struct { Config config; int64_t B, T; int pad; const char *variant; } shapes[] = {
    //     attn            L  C  NH HS  V   RQ RK RV G  F   rope   eps     B  T   pad
    {SHAPE(ATTN_TPA,        2, 24, 5,  8, 61, 3, 2, 2, 1, 0,  10000, 1e-6),   2, 9,   1, ""},
    {SHAPE(ATTN_TPA,        1, 20, 3,  6, 37, 6, 1, 4, 1, 7,  100,   1e-5),   1, 131, 8, ""},
    {SHAPE(ATTN_TPA,        2, 16, 47, 4, 29, 1, 3, 1, 1, 43, 10000, 1e-6),   3, 5,   8, ""},
    {SHAPE(ATTN_TPA_KVONLY, 2, 24, 5,  8, 61, 1, 2, 3, 1, 0,  10000, 1e-6),   2, 9,   1, ""},
    {SHAPE(ATTN_TPA_KVONLY, 1, 18, 7,  4, 61, 1, 1, 1, 1, 0,  10000, 1e-6),   2, 70,  8, ""},
    {SHAPE(ATTN_MHA,        2, 24, 3,  8, 61, 1, 1, 1, 1, 0,  10000, 1e-6),   2, 9,   1, ""},
    {SHAPE(ATTN_MHA,        1, 10, 5,  2, 61, 1, 1, 1, 1, 0,  10000, 1e-6),   2, 300, 8, ""},
    {SHAPE(ATTN_GQA,        2, 24, 6,  8, 61, 1, 1, 1, 2, 0,  10000, 1e-6),   2, 9,   1, ""},
    {SHAPE(ATTN_GQA,        1, 14, 9,  4, 61, 1, 1, 1, 3, 0,  10000, 1e-6),   1, 66,  8, ""},
    {SHAPE(ATTN_MQA,        2, 24, 5,  8, 61, 1, 1, 1, 1, 0,  10000, 1e-6),   2, 9,   1, ""},
    {SHAPE(ATTN_MQA,        1, 12, 11, 4, 61, 1, 1, 1, 1, 0,  10000, 1e-6),   1, 66,  8, ""},
    {SHAPE(ATTN_MLA,        2, 24, 3,  8, 61, 1, 1, 1, 1, 0,  10000, 1e-6),   2, 9,   1,
     "q_lora=10 kv_lora=6 rope_dim=4"},
    {SHAPE(ATTN_MLA,        1, 14, 5,  6, 61, 1, 1, 1, 1, 0,  100,   1e-5),   1, 66,  8,
     "q_lora=7 kv_lora=9 rope_dim=2"},
    // each variant and switch alone
    {SHAPE(ATTN_TPA,        2, 24, 5,  8, 61, 3, 2, 2, 1, 0,  10000, 1e-6),   2, 9,   1, "a_constant"},
    {SHAPE(ATTN_TPA,        2, 24, 5,  8, 61, 3, 2, 2, 1, 0,  10000, 1e-6),   2, 9,   8, "b_constant"},
    {SHAPE(ATTN_TPA,        2, 24, 5,  8, 61, 3, 2, 2, 1, 0,  10000, 1e-6),   2, 9,   1, "share_kv_b"},
    {SHAPE(ATTN_TPA,        2, 24, 5, 12, 61, 3, 2, 1, 1, 0,  10000, 1e-6),   2, 9,   8, "b_dim=4"},
    {SHAPE(ATTN_TPA,        2, 24, 5,  8, 61, 3, 2, 2, 1, 0,  10000, 1e-6),   2, 9,   1, "head_act=sigmoid"},
    {SHAPE(ATTN_TPA,        2, 24, 5,  8, 61, 3, 2, 2, 1, 0,  10000, 1e-6),   2, 9,   8, "head_act=softmax"},
    {SHAPE(ATTN_TPA,        2, 24, 5,  8, 61, 3, 2, 2, 1, 0,  10000, 1e-6),   2, 9,   1, "out_gate"},
    {SHAPE(ATTN_TPA,        2, 24, 5,  8, 61, 3, 2, 2, 1, 0,  10000, 1e-6),   2, 9,   8, "kv_shift"},
    {SHAPE(ATTN_TPA,        2, 24, 5,  8, 61, 3, 2, 2, 1, 0,  10000, 1e-3),   2, 9,   1, "qk_norm"},
    {SHAPE(ATTN_MHA,        2, 24, 3,  8, 61, 1, 1, 1, 1, 0,  10000, 1e-3),   2, 9,   8, "qk_norm kv_shift out_gate"},
    {SHAPE(ATTN_GQA,        1, 14, 6,  4, 61, 1, 1, 1, 3, 0,  10000, 1e-6),   1, 66,  1, "kv_shift"},
    {SHAPE(ATTN_MQA,        1, 12, 11, 4, 61, 1, 1, 1, 1, 0,  10000, 1e-3),   1, 66,  8, "qk_norm kv_shift"},
    {SHAPE(ATTN_MLA,        2, 24, 3,  8, 61, 1, 1, 1, 1, 0,  10000, 1e-6),   2, 9,   8,
     "q_lora=10 kv_lora=6 rope_dim=4 out_gate"},
    // together
    {SHAPE(ATTN_TPA,        2, 24, 5,  8, 61, 3, 2, 2, 1, 0,  10000, 1e-3),   2, 9,   1,
     "share_kv_b b_dim=4 head_act=softmax out_gate kv_shift qk_norm"},
    {SHAPE(ATTN_TPA,        1, 20, 4,  8, 61, 2, 3, 3, 1, 0,  100,   1e-3),   1, 70,  8,
     "a_constant share_kv_b kv_shift qk_norm out_gate"},
    {SHAPE(ATTN_TPA_KVONLY, 2, 24, 5,  8, 61, 1, 2, 2, 1, 0,  10000, 1e-3),   2, 9,   1,
     "b_constant share_kv_b head_act=sigmoid qk_norm"},
    {SHAPE(ATTN_TPA_KVONLY, 1, 20, 4, 12, 61, 1, 1, 3, 1, 0,  10000, 1e-6),   1, 40,  8, "b_dim=6 kv_shift out_gate"},
};

static double mean_loss(T6 *t6, const int32_t *idx, const int32_t *targets, int64_t B, int64_t T) {
    t6_forward(t6, idx, B, T);
    return t6_loss(t6, targets, B * T, 0, LOSS_ONLY) / (double)(B * T);
}

// The largest disagreement so far, as a share of the tensor's largest gradient.
typedef struct { double error; char where[160]; } Worst;

// Compares ENTRIES random entries of tensor i with central differences.
static void check_tensor(Worst *worst, T6 *t6, int i, const int32_t *idx, const int32_t *targets, int64_t B, int64_t T,
                         Random *random) {
    const Tensor *w = &t6->model.tensors[i];
    double largest = 0;
    for (int64_t r = 0; r < w->rows; r++)
        for (int64_t c = 0; c < w->cols; c++)
            largest = fmax(largest, fabs((double)t6->grads[w->offset + (size_t)(r * w->ld + c)]));
    for (int e = 0; e < ENTRIES; e++) {
        int64_t r = random_below(random, w->rows), c = random_below(random, w->cols);
        // half of wte's: rows of tokens that occur
        if (i == 0 && e < ENTRIES / 2) r = idx[random_below(random, B * T)];
        size_t at = w->offset + (size_t)(r * w->ld + c);
        real *x = &t6->params[at], saved = *x;
        *x = saved + (real)EPSILON;
        double up = mean_loss(t6, idx, targets, B, T);
        *x = saved - (real)EPSILON;
        double down = mean_loss(t6, idx, targets, B, T);
        *x = saved;
        double numeric = (up - down) / (2 * EPSILON), analytic = t6->grads[at],
            error = fabs(numeric - analytic) / largest;
        if (error <= worst->error || isnan(worst->error)) continue;
        worst->error = error;
        snprintf(worst->where, sizeof worst->where, "%s[%" PRId64 "][%" PRId64 "]: %.9g, by differences %.9g", w->name,
                 r, c, analytic, numeric);
    }
}

static void check_shape(Score *score, int i, uint64_t seed, int verbose) {
    Config config = shapes[i].config;
    int64_t B = shapes[i].B, T = shapes[i].T, N = B * T;
    Error err;
    T6 t6;
    Random random = {rng_stream(seed, (uint64_t)i), 0};
    set_variant(&config, shapes[i].variant);
    if (config_check(&config, &err) != 0) die(EXIT_SYSTEM, "%s", err.text);
    t6_alloc(&t6, &config, B, T, shapes[i].pad, 1, (Slice){0, 1});
    const Model *m = &t6.model;
    int32_t *idx = xmalloc((size_t)N * sizeof *idx), *targets = xmalloc((size_t)N * sizeof *targets);
    for (int64_t n = 0; n < N; n++) {
        idx[n] = (int32_t)random_below(&random, config.vocab_size);
        targets[n] = (int32_t)random_below(&random, config.vocab_size);
    }
    float *weights = xcalloc(m->num_stored, sizeof *weights);
    random_weights(weights, m, random_bits(&random), 0.4);
    for (size_t at = 0; at < m->num_stored; at++) t6.params[at] = weights[at];
    loss_and_gradients(&t6, idx, targets, B, T);

    Worst worst = {0, ""};
    for (int k = 0; k < m->num_tensors; k++) check_tensor(&worst, &t6, k, idx, targets, B, T, &random);
    unsigned char *mask = weight_mask(m);
    size_t padding = 0;
    for (size_t at = 0; at < m->num_stored; at++) padding += !mask[at] && t6.grads[at] != 0;
    int passed = worst.error <= TOLERANCE && padding == 0, say_where = verbose || !passed;
    report(score, passed, "differences %-10s L%d C%d NH%d HS%d T%d pad%d %s: %d weights, worst %.1e%s%s%s",
           attn_name(config.attn), (int)config.n_layer, (int)config.n_embd, (int)config.n_head, (int)config.head_dim,
           (int)T, shapes[i].pad, shapes[i].variant, m->num_tensors, worst.error, say_where ? " at " : "",
           say_where ? worst.where : "", padding ? "; padding has gradients" : "");
    free(mask), free(weights), free(idx), free(targets);
    t6_free(&t6);
}

Score check_gradients_f64(uint64_t seed, int verbose) {
    Score score = {0, 0};
    int n = (int)(sizeof shapes / sizeof *shapes);
    for (int i = 0; i < n; i++) check_shape(&score, i, seed, verbose);
    for (int kind = 0; kind < NUM_ATTN_KINDS; kind++) {
        int cases = 0;
        for (int i = 0; i < n; i++) cases += (int)shapes[i].config.attn == kind;
        report(&score, cases > 0, "differences: %d shapes of %s", cases, attn_name((AttnKind)kind));
    }
    return score;
}

// Ten AdamW steps of a golden file's model on its batch: how many losses before a step are not the file's, which was
// computed in double too. In fp32 rounding would show after some steps: a gradient that is almost 0 counts as much as
// any other in AdamW.
int golden_adamw_f64(const char *path, int pad) {
    static const double ADAMW_TOLERANCE = 1e-10;
    AdamW o = {.lr = 1e-3, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1};
    Golden g;
    Error err;
    T6 t6;
    if (golden_open(&g, path, &err) != 0) die(EXIT_INPUT, "%s", err.text);
    int64_t N = g.B * g.T;
    t6_alloc(&t6, &g.config, g.B, g.T, pad, 1, (Slice){0, 1});
    const Model *m = &t6.model;
    float *weights = xcalloc(m->num_stored, sizeof *weights);
    int used = 0, bad = 0;
    int32_t *idx = golden_tokens(&g, "idx", N, &err), *targets = golden_tokens(&g, "targets", N, &err);
    double *want = golden_read(&g, "adamw.losses", g.adamw_steps, &err);
    if (!idx || !targets || !want || checkpoint_read_tensors(&g.file, m, "", weights, &used, &err) != 0)
        die(EXIT_INPUT, "%s", err.text);
    for (size_t at = 0; at < m->num_stored; at++) t6.params[at] = weights[at];
    for (int64_t s = 0; s < g.adamw_steps; s++) {
        double loss = loss_and_gradients(&t6, idx, targets, g.B, g.T);
        double scale = clip_factor(gradient_norm(m, t6.grads, NULL), 1.0);
        adamw_update(t6.params, t6.adam_m, t6.adam_v, t6.grads, m->num_stored, &o, s + 1, scale);
        if (fabs(loss - want[s]) <= ADAMW_TOLERANCE * fabs(want[s])) continue;
        bad++;
        printf("     %s: adamw.losses[%d]: %.12g, should be %.12g\n", path, (int)s, loss, want[s]);
    }
    unsigned char *mask = weight_mask(m);
    for (size_t at = 0; at < m->num_stored; at++)
        if (!mask[at] && (t6.params[at] != 0 || t6.adam_m[at] != 0 || t6.adam_v[at] != 0) && bad++ == 0)
            printf("     %s: padding is not zero after AdamW\n", path);
    free(mask), free(weights), free(idx), free(targets), free(want);
    t6_free(&t6);
    golden_close(&g);
    return bad;
}

// ---------------------------------------------------------------------------------------------------------------------
// Golden files, and the program: the object in fp32
#else

Score check_gradients_f64(uint64_t seed, int verbose);
int golden_adamw_f64(const char *path, int pad);

static const double GOLDEN_TOLERANCE = 1e-5;    // ||a - b|| / ||b|| of a tensor; fp32 against float64 gives about 1e-6

typedef struct {
    Golden file;
    int bad;                    // comparisons that failed
    double worst;               // relative error so far
    char worst_at[256];
} GoldenCheck;

// As golden_read and golden_tokens, but a file without the tensor ends the program.
static double *must_read(GoldenCheck *g, const char *name, int64_t elements) {
    Error err;
    double *values = golden_read(&g->file, name, elements, &err);
    if (!values) die(EXIT_INPUT, "%s", err.text);
    return values;
}
static int32_t *must_read_tokens(GoldenCheck *g, const char *name, int64_t n) {
    Error err;
    int32_t *ids = golden_tokens(&g->file, name, n, &err);
    if (!ids) die(EXIT_INPUT, "%s", err.text);
    return ids;
}

// Compares rows x cols numbers, stored ld apart, with the golden tensor of that name: ||ours - golden|| / ||golden||.
static void golden_compare(GoldenCheck *g, const char *name, const float *ours, int64_t rows, int64_t cols,
                           int64_t ld) {
    double *want = must_read(g, name, rows * cols), difference = 0, size = 0, largest = -1;
    int64_t worst = 0;
    for (int64_t i = 0; i < rows * cols; i++) {
        double d = ours[i / cols * ld + i % cols] - want[i];
        difference += d * d, size += want[i] * want[i];
        if (!(fabs(d) <= largest)) largest = fabs(d), worst = i;
    }
    double error = sqrt(difference) / sqrt(size);
    if (size == 0) error = difference == 0 ? 0 : INFINITY;
    char line[256];
    snprintf(line, sizeof line, "%s: error %.2e, most at [%" PRId64 "][%" PRId64 "]: %.9g, should be %.9g", name, error,
             worst / cols, worst % cols, (double)ours[worst / cols * ld + worst % cols], want[worst]);
    if (!(error <= GOLDEN_TOLERANCE)) {
        g->bad++;
        printf("     %s: %s (at most %.0e)\n", g->file.path, line, GOLDEN_TOLERANCE);
    }
    if (!(error <= g->worst)) g->worst = error, snprintf(g->worst_at, sizeof g->worst_at, "%s", line);
    free(want);
}

// Logits, loss and every gradient.
static void check_golden_gradients(GoldenCheck *g, T6 *t6, const int32_t *idx, const int32_t *targets) {
    const Model *m = &t6->model;
    int64_t B = g->file.B, T = g->file.T, N = B * T, V = m->config.vocab_size;
    float *logits = xmalloc((size_t)(N * V) * sizeof *logits), loss = (float)loss_and_gradients(t6, idx, targets, B, T);
    for (int64_t n = 0; n < N; n++) t6_logits(t6, n, logits + n * V);
    golden_compare(g, "logits", logits, N, V, V);
    golden_compare(g, "loss", &loss, 1, 1, 1);
    for (int i = 0; i < m->num_tensors; i++) {
        const Tensor *w = &m->tensors[i];
        char name[80];
        snprintf(name, sizeof name, "grad.%s", w->name);
        golden_compare(g, name, t6->grads + w->offset, w->rows, w->cols, w->ld);
    }
    free(logits);
}

// Greedy tokens after idx[0], each by running the whole sequence again. Returns how many differ from gen.tokens.
static int64_t check_golden_generation(GoldenCheck *g, T6 *t6, const int32_t *idx) {
    int64_t T = g->file.T, end = T + g->file.new_tokens, V = t6->model.config.vocab_size, wrong = 0;
    int32_t *want = must_read_tokens(g, "gen.tokens", g->file.new_tokens);
    int32_t *sequence = xmalloc((size_t)end * sizeof *sequence);
    float *logits = xmalloc((size_t)V * sizeof *logits);
    SamplerOptions greedy = {.temperature = 0, .top_p = 1};
    memcpy(sequence, idx, (size_t)T * sizeof *sequence);
    for (int64_t n = T; n < end; n++) {
        t6_forward(t6, sequence, 1, n);
        t6_logits(t6, n - 1, logits);
        sequence[n] = sample_token(logits, (int)V, &greedy, 0);
        if (sequence[n] != want[n - T] && wrong++ == 0)
            printf("     %s: gen.tokens[%" PRId64 "]: %d, should be %d\n", g->file.path, n - T, sequence[n],
                   want[n - T]);
    }
    free(want), free(sequence), free(logits);
    return wrong;
}

// Twelve steps of AdamW from zero moments, next to the formula in double.
static void check_adamw(Score *score, double beta2) {
    enum { N = 1000, STEPS = 12 };
    static float w[N], adam_m[N], adam_v[N], g[N];
    static double want[N], want_m[N], want_v[N];
    Random r = {rng_stream(9, (uint64_t)(beta2 * 1e6)), 0};
    AdamW o = {.lr = 1e-3, .beta1 = 0.9, .beta2 = beta2, .eps = 1e-8, .weight_decay = 0.1};
    double off = 0, norm = 0;
    memset(adam_m, 0, sizeof adam_m), memset(adam_v, 0, sizeof adam_v);
    memset(want_m, 0, sizeof want_m), memset(want_v, 0, sizeof want_v);
    for (int i = 0; i < N; i++) w[i] = 0, want[i] = 0;
    for (int step = 1; step <= STEPS; step++) {
        for (int i = 0; i < N; i++) {
            g[i] = (float)random_uniform(&r);
            want_m[i] = o.beta1 * want_m[i] + (1 - o.beta1) * g[i];
            want_v[i] = beta2 * want_v[i] + (1 - beta2) * g[i] * g[i];
            double m_hat = want_m[i] / (1 - pow(o.beta1, step)), v_hat = want_v[i] / (1 - pow(beta2, step));
            want[i] = want[i] * (1 - o.lr * o.weight_decay) - o.lr * m_hat / (sqrt(v_hat) + o.eps);
        }
        adamw_update(w, adam_m, adam_v, g, N, &o, step, 1);
    }
    for (int i = 0; i < N; i++) off += (w[i] - want[i]) * (w[i] - want[i]), norm += want[i] * want[i];
    report(score, sqrt(off / norm) < 1e-6, "adamw, beta2 %g: off by %.1e of the weights' norm", beta2,
           sqrt(off / norm));
}

// All checks of one golden file, with the model padded to multiples of `pad`. Counts the model's kind in kinds[].
static void check_golden(Score *score, const char *path, int pad, int kinds[NUM_ATTN_KINDS]) {
    Error err;
    GoldenCheck g = {.bad = 0};
    T6 t6;
    if (golden_open(&g.file, path, &err) != 0) {
        report(score, 0, "golden %s", err.text);
        return;
    }
    int64_t N = g.file.B * g.file.T;
    t6_alloc(&t6, &g.file.config, g.file.B, g.file.T + g.file.new_tokens, pad, 1, (Slice){0, 1});
    const Model *m = &t6.model;
    int used = 0, unknown = 0, num_tensors = g.file.file.num_tensors;
    if (checkpoint_read_tensors(&g.file.file, m, "", t6.params, &used, &err) != 0) die(EXIT_INPUT, "%s", err.text);
    for (int i = 0; i < m->num_tensors; i++)
        g.file.compared[safetensors_find(&g.file.file, m->tensors[i].name) - g.file.file.tensors] = 1;
    int32_t *idx = must_read_tokens(&g, "idx", N), *targets = must_read_tokens(&g, "targets", N);

    check_golden_gradients(&g, &t6, idx, targets);
    size_t padding = nonzero_padding(m, t6.grads);
    int64_t wrong = check_golden_generation(&g, &t6, idx);
    g.bad += golden_adamw_f64(path, pad);
    g.file.compared[safetensors_find(&g.file.file, "adamw.losses") - g.file.file.tensors] = 1;
    for (int i = 0; i < num_tensors; i++)
        if (!g.file.compared[i] && unknown++ == 0)
            printf("     %s: tensor \"%s\" is not known here\n", path, g.file.file.tensors[i].name);
    int passed = g.bad == 0 && wrong == 0 && padding == 0 && unknown == 0;
    report(score, passed, "golden %s (pad %d): %d tensors, %d bad, %d unknown, %" PRId64 " tokens wrong, %zu of "
           "padding not zero; worst %s", path, pad, num_tensors, g.bad, unknown, wrong, padding, g.worst_at);
    kinds[m->config.attn]++;
    free(idx), free(targets);
    t6_free(&t6);
    golden_close(&g.file);
}

// Every file of test/golden, without and with padding; there must be one of each kind.
static void check_golden_folder(Score *score) {
    glob_t files;
    int kinds[NUM_ATTN_KINDS] = {0};
    if (glob("test/golden/*.safetensors", 0, NULL, &files) != 0) {
        report(score, 0, "test/golden: no golden files; run test_t6 in the project's folder");
        return;
    }
    for (size_t i = 0; i < files.gl_pathc; i++)
        for (int pad = 1; pad <= 8; pad += 7) check_golden(score, files.gl_pathv[i], pad, kinds);
    globfree(&files);
    for (int kind = 0; kind < NUM_ATTN_KINDS; kind++)
        report(score, kinds[kind] > 0, "golden: %d checks of %s", kinds[kind], attn_name((AttnKind)kind));
}

int main(int argc, char **argv) {
    int64_t seed = 1, verbose = 0;
    Flag flags[] = {
        {0, "seed", FLAG_INT, &seed, "1", 0, 9e15, "of the finite differences: weights, tokens, choice of entries", 0},
        {0, "verbose", FLAG_SWITCH, &verbose, "0", 0, 1, "name the worst entry of every test", 0}};
    const char *title = "test_t6: gradient checks of train_t6.c. Also: test_t6 --golden FILE...";
    Score score = {0, 0};
    Error err;
    program_start(argv[0]);
#ifdef USE_OPENBLAS
    openblas_set_num_threads(1);
#endif
    if (argc > 1 && !strcmp(argv[1], "--golden")) {
        int kinds[NUM_ATTN_KINDS] = {0};
        if (argc == 2) die(EXIT_INPUT, "--golden needs files: %s --golden test/golden/*.safetensors", argv[0]);
        for (int i = 2; i < argc; i++) check_golden(&score, argv[i], 8, kinds);
        return finish(&score);
    }
    if (flags_parse(argc, argv, title, flags, 2, &err) != 0) die(EXIT_INPUT, "%s", err.text);
    score = check_gradients_f64((uint64_t)seed, (int)verbose);
    check_adamw(&score, 0.95), check_adamw(&score, 0.999), check_adamw(&score, 0.999999);
    check_golden_folder(&score);
    return finish(&score);
}
#endif
