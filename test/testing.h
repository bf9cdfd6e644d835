// What the test programs share: counting what passed, random numbers and weights, and the check of padding.
#ifndef TEST_TESTING_H
#define TEST_TESTING_H

#include <stdarg.h>

#include "llmc/model.h"

typedef struct { int passed, failed; } Score;

// Counts one check and prints it as "ok   ..." or "FAIL ...".
__attribute__((format(printf, 3, 4))) LLMC_FN void report(Score *score, int ok, const char *format, ...) {
    va_list args;
    va_start(args, format);
    printf("%s ", ok ? "ok  " : "FAIL");
    vprintf(format, args);
    putchar('\n');
    fflush(stdout);
    va_end(args);
    ok ? score->passed++ : score->failed++;
}

// Prints the line that scripts/test.sh reads, and returns the exit status. A program that checked nothing has failed.
LLMC_FN int finish(const Score *score) {
    printf("%d passed, %d failed\n", score->passed, score->failed);
    return score->failed > 0 || score->passed == 0;
}

// Random numbers that depend on the seed alone: Random r = {rng_stream(seed, 1), 0}.
typedef struct { uint64_t stream, draw; } Random;

LLMC_FN uint64_t random_bits(Random *r) { return rng_at(r->stream, r->draw++); }
LLMC_FN double random_uniform(Random *r) { return 2 * rng_uniform(r->stream, r->draw++) - 1; }     // in [-1, 1)
LLMC_FN int64_t random_below(Random *r, int64_t n) { return (int64_t)(random_bits(r) % (uint64_t)n); }

// A model's Config in one line of a table: letters as in train_t6.c, G key/value heads of gqa.
#define SHAPE(kind, L, C, NH, HS, V, RQ, RK, RV, G, F, base, eps) \
    {.attn = kind, .n_layer = L, .n_embd = C, .n_head = NH, .head_dim = HS, .vocab_size = V, \
     .q_rank = RQ, .k_rank = RK, .v_rank = RV, .n_kv_head = G, .hidden = F, .rope_base = base, .rms_eps = eps}

// Variants and switches of a shape, by their keys: "share_kv_b head_act=sigmoid b_dim=4". What is named without a value
// is on; a_constant and b_constant stand for "a_contextual": false and "b_contextual": false. Unknown words end the
// program.
LLMC_FN void set_variant(Config *c, const char *words) {
    char *copy = xasprintf("%s", words), *save = NULL;
    ConfigField fields[NUM_CONFIG_FIELDS];
    config_fields(c, fields);
    for (char *word = strtok_r(copy, " ", &save); word; word = strtok_r(NULL, " ", &save)) {
        char *value = strchr(word, '=');
        int found = 0;
        Error err;
        if (value) *value++ = 0;
        if (!strcmp(word, "head_act")) found = value && head_act_from_name(value, &c->head_act, &err) == 0;
        else if (!strcmp(word, "a_constant")) found = c->a_constant = 1;
        else if (!strcmp(word, "b_constant")) found = c->b_constant = 1;
        for (int i = 0; i < NUM_CONFIG_FIELDS; i++)
            if (!strcmp(word, fields[i].name)) *fields[i].value = value ? atoll(value) : 1, found = 1;
        if (!found) die(EXIT_SYSTEM, "internal error: \"%s\" is not a variant", word);
    }
    free(copy);
}

// Random weights (num_stored), uniform in +-size; size 0: in the range of each tensor's initial values, or within
// 1 / sqrt(columns) for those that start at zero, because zero weights would hide errors before them. Padding is left
// alone.
LLMC_FN void random_weights(float *params, const Model *m, uint64_t seed, double size) {
    for (int i = 0; i < m->num_tensors; i++) {
        const Tensor *w = &m->tensors[i];
        Random r = {rng_stream(seed, (uint64_t)i), 0};
        double range = size > 0 ? size : w->init > 0 ? w->init : 1 / sqrt((double)w->cols);
        for (int64_t row = 0; row < w->rows; row++)
            for (int64_t col = 0; col < w->cols; col++)
                params[w->offset + (size_t)(row * w->ld + col)] = (float)(range * random_uniform(&r));
    }
}

// One flag per stored number of a parameter buffer: 1 where it is a weight, 0 where it is padding. The caller frees it.
LLMC_FN unsigned char *weight_mask(const Model *m) {
    unsigned char *mask = (unsigned char *)xcalloc(m->num_stored, 1);
    for (int i = 0; i < m->num_tensors; i++) {
        const Tensor *w = &m->tensors[i];
        for (int64_t row = 0; row < w->rows; row++) memset(mask + w->offset + row * w->ld, 1, (size_t)w->cols);
    }
    return mask;
}

// How many padding numbers of a parameter buffer are not exactly zero.
LLMC_FN size_t nonzero_padding(const Model *m, const float *buffer) {
    unsigned char *mask = weight_mask(m);
    size_t n = 0;
    for (size_t i = 0; i < m->num_stored; i++) n += !mask[i] && buffer[i] != 0;
    free(mask);
    return n;
}

#endif
