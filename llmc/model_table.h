// The paper's Table 1 with its figures filled in: what each kind of attention costs in parameters and in the cache, for
// every preset, from the functions that lay out the model. train_t6 --table prints it.
#ifndef LLMC_MODEL_TABLE_H
#define LLMC_MODEL_TABLE_H

#include "model.h"

enum { TABLE_VOCAB = 50304 };       // the paper's

// Numbers of a model, without the gains of mla's norms, which the paper does not count: of the attention of a layer, of
// the whole; gains of a layer; numbers cached per token and layer.
typedef struct { int64_t attention, model, gains, cache; } ModelSize;

LLMC_FN ModelSize model_size(const Config *c) {
    Model m;
    ModelSize size = {0, 0, 0, 0};
    model_init(&m, c, 1);
    for (int i = 0; i < m.num_tensors; i++) {
        const Tensor *t = &m.tensors[i];
        int64_t n = t->rows * t->cols, first_layer = strstr(t->name, ".h.0.attn.") != NULL;
        if (first_layer && t->num_dims == 1) size.gains += n;
        else if (first_layer) size.attention += n;
    }
    size.model = (int64_t)m.num_parameters - c->n_layer * size.gains;
    size.cache = model_cache_width(&m);
    model_free(&m);
    return size;
}

// A row of the table: a kind, or a variant of tpa. Returns its config in a preset.
typedef struct { const char *name; AttnKind kind; int64_t a_constant, b_constant; } TableRow;
enum { NUM_TABLE_ROWS = 8 };
LLMC_FN Config table_config(const Preset *p, int i, const char **name) {
    static const TableRow rows[NUM_TABLE_ROWS] = {
        {"mha", ATTN_MHA, 0, 0}, {"mqa", ATTN_MQA, 0, 0}, {"gqa", ATTN_GQA, 0, 0}, {"mla", ATTN_MLA, 0, 0},
        {"tpa", ATTN_TPA, 0, 0}, {"tpa_kvonly", ATTN_TPA_KVONLY, 0, 0},
        {"tpa, a_contextual false", ATTN_TPA, 1, 0}, {"tpa, b_contextual false", ATTN_TPA, 0, 1}};
    Config c = preset_config(p, rows[i].kind);
    c.a_constant = rows[i].a_constant, c.b_constant = rows[i].b_constant, c.vocab_size = TABLE_VOCAB;
    if (c.b_constant) c.kv_shift = 0;
    *name = rows[i].name;
    return c;
}

// Prints the table in Markdown, to standard output.
LLMC_FN void print_model_table(void) {
    printf("| preset | kind | heads | attention of a layer | gains | model | cached per token and layer | bytes per "
           "token, bf16, all layers | of the preset's mha | of mha with these heads |\n"
           "|---|---|---|---|---|---|---|---|---|---|\n");
    for (int p = 0; p < NUM_PRESETS; p++) {
        const Preset *preset = &preset_table()[p];
        for (int i = 0; i < NUM_TABLE_ROWS; i++) {
            const char *name, *unused;
            Config c = table_config(preset, i, &name), mha = table_config(preset, 0, &unused);
            ModelSize size = model_size(&c);
            int64_t mha_cache = model_size(&mha).cache, equal_heads = 2 * c.n_head * c.head_dim;
            printf("| %s | %s | %" PRId64 " | %.3fM | %" PRId64 " | %.1fM | %" PRId64 " | %" PRId64 " | 1/%.1f | "
                   "1/%.1f |\n", preset->name, name, c.n_head, (double)size.attention / 1e6, size.gains,
                   (double)size.model / 1e6, size.cache, 2 * size.cache * c.n_layer,
                   (double)mha_cache / (double)size.cache, (double)equal_heads / (double)size.cache);
        }
    }
}

#endif
