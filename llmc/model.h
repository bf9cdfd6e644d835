// What a T6 is: its configuration, the table of attention kinds, the presets, the description of q, k and v that
// makes every kind one model, and the table of its tensors. Initial values, checkpoints and tests loop over that
// table; gradients are exchanged and weights updated in buckets of the buffer that it lays out.
//
// Shapes: C = n_embd, L = n_layer, NH = n_head, V = vocab_size, F = MLP width, P = width of a factor row. A query or
// key head has HSK numbers, the last HSR of which RoPE rotates; a value head has HSV. Xp is X as stored, rounded up:
// the padding is zero, and training keeps it zero.
#ifndef LLMC_MODEL_H
#define LLMC_MODEL_H

#include <math.h>
#include <stddef.h>

#include "json.h"
#include "rng.h"
#include "shard.h"

// ---------------------------------------------------------------------------------------------------------------------
// Configuration. The fields are the keys of config.json.

typedef enum { ATTN_TPA, ATTN_TPA_KVONLY, ATTN_MHA, ATTN_GQA, ATTN_MQA, NUM_ATTN_KINDS } AttnKind;

typedef struct {
    AttnKind attn;
    int64_t n_layer, n_embd, n_head, head_dim, vocab_size;
    int64_t q_rank, k_rank, v_rank;     // of factored q, k, v
    int64_t n_kv_head;                  // gqa: number of K/V heads
    int64_t hidden;                     // MLP width F; 0 means floor(8/3 n_embd)
    double rope_base, rms_eps;
} Config;

LLMC_FN int64_t default_hidden(int64_t n_embd) { return (int64_t)floor(8.0 / 3.0 * (double)n_embd); }

// The integers of a Config with their names and accepted ranges, for config.json and the checks.
typedef struct { const char *name; int64_t *value; int64_t min, max; } ConfigField;
enum { NUM_CONFIG_FIELDS = 10 };
LLMC_FN void config_fields(Config *c, ConfigField out[NUM_CONFIG_FIELDS]) {
    const ConfigField fields[NUM_CONFIG_FIELDS] = {
        {"n_layer", &c->n_layer, 1, 1024},
        {"n_embd", &c->n_embd, 1, 65536},
        {"n_head", &c->n_head, 1, 1024},
        {"head_dim", &c->head_dim, 2, 1024},
        {"vocab_size", &c->vocab_size, 2, 65536},
        {"q_rank", &c->q_rank, 1, 256},
        {"k_rank", &c->k_rank, 1, 256},
        {"v_rank", &c->v_rank, 1, 256},
        {"n_kv_head", &c->n_kv_head, 1, 1024},
        {"hidden", &c->hidden, 1, 1 << 20},
    };
    memcpy(out, fields, sizeof fields);
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention kinds: one row each. The row feeds --attn's help and errors, config.json, the presets, the layout of the
// tensors and the tests.

// What the NH heads of q, k or v are made of, for each token.
typedef enum {
    FACTORS,        // R head factors a_r and R token factors b_r, both linear in the token; R is the config's rank
    HEADS,          // NH vectors, one per head
    GROUPS,         // n_kv_head vectors, each shared by NH / n_kv_head heads
    SINGLE          // one vector, shared by all heads
} HeadSource;

typedef struct {
    AttnKind kind;
    const char *name;               // of --attn and config.json
    HeadSource q, k, v;
    const char *scope;              // published names of the projections: transformer.h.N.attn.<scope>c_q.weight
    int heads[5];                   // NH of each preset, in the order of preset_table
} AttnInfo;

// NH is the paper's (Table 10), chosen to give every kind about the same number of parameters; that of "tiny" is ours.
LLMC_FN const AttnInfo *attn_info(AttnKind kind) {
    static const AttnInfo table[NUM_ATTN_KINDS] = {
        //                 name          q        k        v        scope     tiny 124M 353M 773M 1.5B
        {ATTN_TPA,        "tpa",         FACTORS, FACTORS, FACTORS, "c_qkv.", { 4,  34,  47,  61,  78}},
        {ATTN_TPA_KVONLY, "tpa_kvonly",  HEADS,   FACTORS, FACTORS, "c_qkv.", { 3,  22,  29,  37,  47}},
        {ATTN_MHA,        "mha",         HEADS,   HEADS,   HEADS,   "",       { 2,  12,  16,  20,  25}},
        {ATTN_GQA,        "gqa",         HEADS,   GROUPS,  GROUPS,  "",       { 2,  22,  30,  38,  48}},
        {ATTN_MQA,        "mqa",         HEADS,   SINGLE,  SINGLE,  "",       { 3,  23,  31,  39,  49}},
    };
    return &table[kind];
}

LLMC_FN const char *attn_name(AttnKind kind) { return attn_info(kind)->name; }

// Appends name i of n to a list in words, such as "tpa, mha or mqa". size: room in list.
LLMC_FN void append_name_(char *list, size_t size, const char *name, int i, int n) {
    size_t at = strlen(list);
    snprintf(list + at, size - at, "%s%s", i == 0 ? "" : i + 1 < n ? ", " : " or ", name);
}

// All kinds in words, for help and messages: "tpa, tpa_kvonly, mha, gqa or mqa". Static storage.
LLMC_FN const char *attn_names(void) {
    static char list[256];
    list[0] = 0;
    for (int i = 0; i < NUM_ATTN_KINDS; i++) append_name_(list, sizeof list, attn_name((AttnKind)i), i, NUM_ATTN_KINDS);
    return list;
}

// 0, or -1 with the accepted names in err.
LLMC_FN int attn_from_name(const char *name, AttnKind *kind, Error *err) {
    for (int i = 0; i < NUM_ATTN_KINDS; i++)
        if (!strcmp(name, attn_name((AttnKind)i))) { *kind = (AttnKind)i; return 0; }
    return fail(err, "attention kind \"%.40s\" is not known; use %s", name, attn_names());
}

// Sets `hidden` to its default where it is 0. -1, with the reason in err: such a model cannot be built.
LLMC_FN int config_check(Config *c, Error *err) {
    if (c->hidden == 0) c->hidden = default_hidden(c->n_embd);
    ConfigField fields[NUM_CONFIG_FIELDS];
    config_fields(c, fields);
    for (int i = 0; i < NUM_CONFIG_FIELDS; i++)
        if (*fields[i].value < fields[i].min || *fields[i].value > fields[i].max)
            return fail(err, "%s is %lld; it must be from %lld to %lld", fields[i].name, (long long)*fields[i].value,
                        (long long)fields[i].min, (long long)fields[i].max);
    if (c->head_dim % 2)
        return fail(err, "head_dim is %lld; it must be even, because RoPE rotates pairs", (long long)c->head_dim);
    const AttnInfo *kind = attn_info(c->attn);
    if ((kind->k == GROUPS || kind->v == GROUPS) && c->n_head % c->n_kv_head)
        return fail(err, "n_kv_head %lld does not divide n_head %lld", (long long)c->n_kv_head, (long long)c->n_head);
    if (!(c->rope_base > 1) || !(c->rope_base < 1e12))
        return fail(err, "rope_base is %g; it must be between 1 and 1e12", c->rope_base);
    if (!(c->rms_eps >= 0) || !(c->rms_eps < 1))
        return fail(err, "rms_eps is %g; it must be at least 0 and below 1", c->rms_eps);
    return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Presets: the paper's models and recipe (Tables 9 and 10), and "tiny", ours, for a laptop and the toy corpus.

typedef struct {
    const char *name;
    int n_layer, n_embd, head_dim;
    int q_rank, k_rank, v_rank;
    int seq_len, batch_size;
    int tokens_per_step, warmup_steps, max_steps;
    double lr, min_lr;
} Preset;

enum { NUM_PRESETS = 5 };
LLMC_FN const Preset *preset_table(void) {
    static const Preset table[NUM_PRESETS] = {
        //name    L     C  HS RQ RK RV     T   B  tokens/step warm-up steps   lr    min lr
        {"tiny",   4,  128, 64, 2, 1, 1,  256,  4,   1024,   50,   2800, 3e-3, 3e-4},
        {"124M",  12,  768, 64, 6, 2, 2, 1024, 24, 491520, 2000, 100000, 6e-4, 3e-5},
        {"353M",  24, 1024, 64, 6, 2, 2, 1024, 20, 491520, 2000, 100000, 3e-4, 6e-5},
        {"773M",  36, 1280, 64, 6, 2, 2, 1024, 15, 491520, 2000, 100000, 2e-4, 1e-5},
        {"1.5B",  48, 1600, 64, 6, 2, 2, 1024,  6, 491520, 2000, 100000, 1e-4, 1e-5},
    };
    return table;
}

LLMC_FN const Preset *find_preset(const char *name) {       // NULL: there is none of that name
    for (int i = 0; i < NUM_PRESETS; i++)
        if (!strcmp(name, preset_table()[i].name)) return &preset_table()[i];
    return NULL;
}

// All presets in words, for help and messages: "tiny, 124M, ... or 1.5B". Static storage.
LLMC_FN const char *preset_names(void) {
    static char list[128];
    list[0] = 0;
    for (int i = 0; i < NUM_PRESETS; i++) append_name_(list, sizeof list, preset_table()[i].name, i, NUM_PRESETS);
    return list;
}

// A config with all defaults that do not come from a preset; the other sizes are 0, to be filled in.
LLMC_FN Config default_config(void) {
    Config c;
    memset(&c, 0, sizeof c);
    c.attn = ATTN_TPA;
    c.vocab_size = GPT2_VOCAB_SIZE;
    c.q_rank = 6, c.k_rank = 2, c.v_rank = 2;
    c.n_kv_head = 2;
    c.rope_base = 10000, c.rms_eps = 1e-6;
    return c;
}

LLMC_FN Config preset_config(const Preset *p, AttnKind attn) {
    Config c = default_config();
    c.attn = attn;
    c.n_layer = p->n_layer, c.n_embd = p->n_embd, c.head_dim = p->head_dim;
    c.n_head = attn_info(attn)->heads[p - preset_table()];
    c.q_rank = p->q_rank, c.k_rank = p->k_rank, c.v_rank = p->v_rank;
    c.hidden = default_hidden(c.n_embd);
    return c;
}

// ---------------------------------------------------------------------------------------------------------------------
// config.json

// Refuses what would make a model other than those supported here: the paper's variants, and settings of the published
// code.
LLMC_FN int config_check_variants_(const cJSON *json, Error *err) {
    static const struct { const char *key, *value; } only[] = {
        {"a_contextual", "true"}, {"b_contextual", "true"}, {"share_kv_b", "false"}, {"order", "2"},
        {"head_act", "\"none\""}, {"out_gate", "false"}, {"qk_norm", "false"}, {"kv_shift", "false"},
        {"using_groupnorm", "false"}, {"scale_attn_by_inverse_layer_idx", "false"}, {"bias", "false"},
        {"tie_word_embeddings", "true"}};
    for (size_t i = 0; i < sizeof only / sizeof *only; i++) {
        const cJSON *item = cJSON_GetObjectItemCaseSensitive(json, only[i].key);
        cJSON *value = cJSON_Parse(only[i].value);
        int same = !item || cJSON_Compare(item, value, 1);
        cJSON_Delete(value);
        if (!same) return fail(err, "\"%s\" is not %s: this is not supported", only[i].key, only[i].value);
    }
    return 0;
}

// Overwrites the fields of c that json has.
LLMC_FN int config_read_fields_(Config *c, const cJSON *json, Error *err) {
    ConfigField fields[NUM_CONFIG_FIELDS];
    config_fields(c, fields);
    for (int i = 0; i < NUM_CONFIG_FIELDS; i++) {
        const cJSON *item = cJSON_GetObjectItemCaseSensitive(json, fields[i].name);
        if (!item) continue;
        if (!json_is_integer(item, -1e9, 1e9))
            return fail(err, "\"%s\" is not an integer from %lld to %lld", fields[i].name, (long long)fields[i].min,
                        (long long)fields[i].max);
        *fields[i].value = (int64_t)item->valuedouble;
    }
    struct { const char *name; double *value; } reals[] = {{"rope_base", &c->rope_base}, {"rms_eps", &c->rms_eps}};
    for (int i = 0; i < 2; i++) {
        const cJSON *item = cJSON_GetObjectItemCaseSensitive(json, reals[i].name);
        if (!item) continue;
        if (!cJSON_IsNumber(item)) return fail(err, "\"%s\" is not a number", reals[i].name);
        *reals[i].value = item->valuedouble;
    }
    const cJSON *attn = cJSON_GetObjectItemCaseSensitive(json, "attn");
    if (attn) {
        if (!cJSON_IsString(attn)) return fail(err, "\"attn\" is not a string");
        if (attn_from_name(attn->valuestring, &c->attn, err) != 0) return -1;
    }
    return config_check_variants_(json, err);
}

// Reads the object of a checkpoint's config.json, or the same object inside a golden file. `where` names it in the
// error. Missing keys have the defaults of the published code (the paper's 124M); unknown keys are ignored. On -1 *c is
// unchanged.
LLMC_FN int config_from_json(Config *c, const cJSON *json, const char *where, Error *err) {
    Error why;
    Config read = preset_config(find_preset("124M"), ATTN_TPA);
    read.vocab_size = 50304, read.hidden = 0;
    int rc = config_read_fields_(&read, json, &why);
    if (rc == 0) rc = config_check(&read, &why);
    if (rc != 0) return fail(err, "%s: %s", where, why.text);
    *c = read;
    return 0;
}

// The JSON text of a config; the caller frees it.
LLMC_FN char *config_to_json(const Config *config) {
    Config c = *config;
    ConfigField fields[NUM_CONFIG_FIELDS];
    config_fields(&c, fields);
    cJSON *json = cJSON_CreateObject();
    cJSON_AddStringToObject(json, "attn", attn_name(c.attn));
    for (int i = 0; i < NUM_CONFIG_FIELDS; i++) cJSON_AddNumberToObject(json, fields[i].name, (double)*fields[i].value);
    cJSON_AddNumberToObject(json, "rope_base", c.rope_base);
    cJSON_AddNumberToObject(json, "rms_eps", c.rms_eps);
    char *text = cJSON_Print(json);
    cJSON_Delete(json);
    if (!text) die(EXIT_SYSTEM, "out of memory: cannot write config.json");
    return text;
}

// ---------------------------------------------------------------------------------------------------------------------
// One idea, many attentions. Each of q, k and v has R vectors b_r per token, and head i is a weighted sum of them:
//     head_i = scale * sum_r a[i][r] b_r
// TPA computes the weights a from the token too. MHA, GQA and MQA have fixed weights: R = NH, n_kv_head or 1 vectors,
// and a[i][r] = 1 where head i belongs to group r, else 0 (paper, section 3.4).
//
// All a and b of a token are one factor row (P), the output of one projection:
//     [aQ (NH, RQ) | bQ (RQ, HSK) | aK (NH, RK) | bK (RK, HSK) | aV (NH, RV) | bV (RV, HSV) | padding to Pp]
// A grouped part has no a.

typedef enum {
    HEADS_FACTORED,     // a is a linear function of the token, like b: scale 1/R
    HEADS_GROUPED       // a[i][r] = (i / (NH / R) == r): scale 1
} HeadsKind;

typedef struct {
    HeadsKind kind;
    int R;              // vectors per token: the rank, or the number of groups
    int HS;             // numbers per vector: HSK of q and k, HSV of v
    int HSR;            // RoPE rotates the last HSR of them; 0 for v
    int a;              // first column of a (NH, R) in the factor row; HEADS_FACTORED only
    int b;              // first column of b (R, HS) in the factor row
    double scale;
} Heads;

// ---------------------------------------------------------------------------------------------------------------------
// The tensor table

typedef struct {
    char name[64];      // published name
    int64_t rows, cols; // as published: (out features, in features)
    int64_t ld;         // elements from one stored row to the next, cols <= ld
    size_t offset;      // of element (0, 0) in the parameter buffer
    double init;        // initial values are uniform in +-init; 0: zeros
} Tensor;

typedef struct {
    Config config;
    Heads q, k, v;
    int64_t HSK, HSV;   // sizes of a query/key head and of a value head
    int64_t HSR;        // RoPE rotates the last HSR numbers of a query/key head
    double scale;       // of the softmax: 1 / sqrt(HSK)
    int64_t P, Pp;      // width of a factor row, as computed and as stored
    int64_t F, Fp, Vp;  // MLP width, as computed and as stored; vocabulary, as stored
    int64_t D, Dp;      // NH * HSV, the width of all heads' outputs side by side, as computed and as stored
    // Parameter buffer: wte (Vp, C), then per layer wqkv (Pp, C), wo (C, Dp), w12 (2 Fp, C), w3 (C, Fp)
    size_t wte, layers, layer_stride;   // offsets in the buffer
    size_t wqkv, wo, w12, w3;           // offsets in a layer
    size_t num_stored;      // elements of the buffer, padding included
    size_t num_parameters;  // without padding
    Tensor *tensors;        // in the order of the buffer
    int num_tensors;
} Model;

// Ranks exchange the parameter buffer in buckets: wte, then each layer. With several ranks a bucket's storage is a
// multiple of world * SLICE_UNIT, so that every rank has an equal slice of every bucket: its part of gradients,
// moments and master weights. A rank stores its slices contiguously, that of bucket k at bucket.offset / world.
enum { SLICE_UNIT = 1024 };     // also the unit in which gradient_norm (train_t6.c) sums squares
typedef struct { size_t offset, size; } Bucket;
typedef struct { int rank, world; } Slice;      // {0, 1}: the whole

// Bucket 0 is wte, bucket 1 + l is layer l.
LLMC_FN int model_buckets(const Model *m) { return 1 + (int)m->config.n_layer; }
LLMC_FN Bucket model_bucket(const Model *m, int k) {
    if (k == 0) return (Bucket){m->wte, m->layers};
    return (Bucket){m->layers + (size_t)(k - 1) * m->layer_stride, m->layer_stride};
}
// Numbers in the largest bucket; all layers are alike.
LLMC_FN size_t model_largest_bucket(const Model *m) {
    return m->layers > m->layer_stride ? m->layers : m->layer_stride;
}
LLMC_FN int tensor_bucket(const Model *m, const Tensor *t) {
    return t->offset < m->layers ? 0 : 1 + (int)((t->offset - m->layers) / m->layer_stride);
}

// Where a slice of bucket k lies in a whole buffer.
LLMC_FN Bucket model_slice(const Model *m, Slice s, int k) {
    Bucket b = model_bucket(m, k);
    size_t part = b.size / (size_t)s.world;
    return (Bucket){b.offset + (size_t)s.rank * part, part};
}

LLMC_FN int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

LLMC_FN void model_add_tensor_(Model *m, size_t offset, int64_t rows, int64_t cols, int64_t ld, double init,
                               const char *name) {
    Tensor *t = &m->tensors[m->num_tensors++];
    memset(t, 0, sizeof *t);
    snprintf(t->name, sizeof t->name, "%s", name);
    t->rows = rows, t->cols = cols, t->ld = ld, t->offset = offset, t->init = init;
    m->num_parameters += (size_t)(rows * cols);
}

// Adds the weights that make q, k or v (`which`) to a layer's fused projection, from its row `row` on. base: offset of
// the projection in the parameter buffer. Returns the next free row.
LLMC_FN int64_t model_add_heads_(Model *m, const Heads *heads, char which, int layer, size_t base, int64_t row) {
    const Config *c = &m->config;
    const AttnInfo *kind = attn_info(c->attn);
    int64_t C = c->n_embd, NH = c->n_head, HS = heads->HS, R = heads->R;
    char name[64];
    if (heads->kind == HEADS_FACTORED) {
        snprintf(name, sizeof name, "transformer.h.%d.attn.%sW_A_%c.weight", layer, kind->scope, which);
        model_add_tensor_(m, base + (size_t)(row * C), NH * R, C, C, sqrt(6.0 / (double)((C + NH) * R)), name);
        row += NH * R;
        snprintf(name, sizeof name, "transformer.h.%d.attn.%sW_B_%c.weight", layer, kind->scope, which);
        model_add_tensor_(m, base + (size_t)(row * C), R * HS, C, C, sqrt(6.0 / (double)((C + R) * HS)), name);
    } else {
        int with_factors = kind->k == FACTORS;      // tpa_kvonly: its dense q has Xavier values like the factors
        double init = with_factors ? sqrt(6.0 / (double)(C + R * HS)) : 1 / sqrt((double)C);
        snprintf(name, sizeof name, "transformer.h.%d.attn.%sc_%c.weight", layer, kind->scope, which);
        model_add_tensor_(m, base + (size_t)(row * C), R * HS, C, C, init, name);
    }
    return row + R * HS;
}

// Describes q, k or v, and gives it columns of the factor row from *column on, which moves past them.
LLMC_FN Heads heads_(const Config *c, HeadSource source, int64_t rank, int64_t HS, int64_t HSR, int64_t *column) {
    Heads h;
    int factored = source == FACTORS;
    h.kind = factored ? HEADS_FACTORED : HEADS_GROUPED;
    h.R = (int)(factored ? rank : source == HEADS ? c->n_head : source == GROUPS ? c->n_kv_head : 1);
    h.HS = (int)HS, h.HSR = (int)HSR;
    h.scale = factored ? 1.0 / (double)h.R : 1.0;
    h.a = (int)*column;
    if (factored) *column += c->n_head * h.R;
    h.b = (int)*column;
    *column += h.R * HS;
    return h;
}

LLMC_FN void model_add_layer_(Model *m, int l) {
    const Config *c = &m->config;
    int64_t C = c->n_embd;
    size_t base = m->layers + (size_t)l * m->layer_stride;
    char name[64];
    int64_t row = model_add_heads_(m, &m->q, 'q', l, base, 0);
    row = model_add_heads_(m, &m->k, 'k', l, base, row);
    model_add_heads_(m, &m->v, 'v', l, base, row);
    snprintf(name, sizeof name, "transformer.h.%d.attn.c_proj.weight", l);
    model_add_tensor_(m, base + m->wo, C, m->D, m->Dp, 0, name);
    for (int i = 0; i < 2; i++) {
        snprintf(name, sizeof name, "transformer.h.%d.mlp.c_fc%d.weight", l, i + 1);
        model_add_tensor_(m, base + m->w12 + (size_t)(i * m->Fp * C), m->F, C, C, 1 / sqrt((double)C), name);
    }
    snprintf(name, sizeof name, "transformer.h.%d.mlp.c_proj.weight", l);
    model_add_tensor_(m, base + m->w3, C, m->F, m->Fp, 0, name);
}

// Lays out the model of a checked config. P, F and D are padded to multiples of `pad` (what the GPU's matrix units
// need; 1: no padding), the vocabulary always to a multiple of 128. world: number of ranks, for the size of buckets.
// Free with model_free.
LLMC_FN void model_init_shared(Model *m, const Config *config, int pad, int world) {
    memset(m, 0, sizeof *m);
    const Config *c = &m->config;
    m->config = *config;
    int64_t C = c->n_embd, L = c->n_layer;
    const AttnInfo *kind = attn_info(c->attn);
    m->HSK = m->HSV = m->HSR = c->head_dim;
    m->scale = 1 / sqrt((double)m->HSK);
    m->q = heads_(c, kind->q, c->q_rank, m->HSK, m->HSR, &m->P);
    m->k = heads_(c, kind->k, c->k_rank, m->HSK, m->HSR, &m->P);
    m->v = heads_(c, kind->v, c->v_rank, m->HSV, 0, &m->P);
    m->Pp = round_up(m->P, pad), m->F = c->hidden, m->Fp = round_up(m->F, pad), m->Vp = round_up(c->vocab_size, 128);
    m->D = c->n_head * m->HSV, m->Dp = round_up(m->D, pad);

    int64_t unit = world > 1 ? (int64_t)world * SLICE_UNIT : 1;
    m->wte = 0, m->layers = (size_t)round_up(m->Vp * C, unit);
    m->wqkv = 0;
    m->wo = (size_t)(m->Pp * C);
    m->w12 = m->wo + (size_t)(C * m->Dp);
    m->w3 = m->w12 + (size_t)(2 * m->Fp * C);
    m->layer_stride = (size_t)round_up((int64_t)m->w3 + C * m->Fp, unit);
    m->num_stored = m->layers + (size_t)L * m->layer_stride;

    m->tensors = (Tensor *)xcalloc((size_t)(1 + L * 10), sizeof *m->tensors);
    model_add_tensor_(m, m->wte, c->vocab_size, C, C, 1 / sqrt((double)C), "lm_head.weight");
    for (int l = 0; l < (int)L; l++) model_add_layer_(m, l);
}

LLMC_FN void model_init(Model *m, const Config *config, int pad) { model_init_shared(m, config, pad, 1); }

LLMC_FN void model_free(Model *m) {
    free(m->tensors);
    m->tensors = NULL;
}

// Numbers that decoding caches for each token and layer: the factors of k and v, which are last in the factor row.
LLMC_FN int64_t model_cache_width(const Model *m) { return m->P - m->k.a; }

// RoPE's frequency of pair i of HSR / 2, in radians per token.
LLMC_FN double rope_frequency(int64_t i, int64_t HSR, double base) {
    return pow(base, -2.0 * (double)i / (double)HSR);
}

// Initial value of element (row, col) of tensor i. It does not depend on storage, program or number of threads.
LLMC_FN double model_initial_value(const Model *m, uint64_t seed, int i, int64_t row, int64_t col) {
    const Tensor *t = &m->tensors[i];
    return t->init * (2 * rng_uniform(rng_stream(seed, (uint64_t)i), (uint64_t)(row * t->cols + col)) - 1);
}

// Arithmetic of training on one token in sequences of T: 6 per parameter (2 forward, 4 backward) and causal
// attention, which sees T/2 tokens on average: 2 NH (HSK + HSV) T/2 forward and twice that backward.
LLMC_FN double model_flop_per_token(const Model *m, int64_t T) {
    double heads = (double)m->config.n_head * (double)(m->HSK + m->HSV);
    return 6.0 * (double)m->num_parameters + 3.0 * (double)m->config.n_layer * heads * (double)T;
}

#endif
