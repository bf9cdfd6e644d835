// What a T6 is: its configuration, the presets of the paper, the description of q, k and v that makes every attention kind one
// model, and the table of its tensors. Both trainers, the checkpoints, the optimizer and the tests loop over that table.
//
// Shapes: C = n_embd, L = n_layer, NH = n_head, HS = head_dim, V = vocab_size, F = MLP width, P = width of the fused q/k/v
// projection. Xp is X as stored, padded up to a multiple: the padding is zero and training keeps it zero.
#ifndef LLMC_MODEL_H
#define LLMC_MODEL_H

#include <cjson/cJSON.h>
#include <math.h>
#include "rng.h"
#include "shard.h"

// ---------------------------------------------------------------------------------------------------------------------
// Configuration. The fields are the keys of config.json.

typedef enum { ATTN_TPA, ATTN_TPA_KVONLY, ATTN_MHA, ATTN_GQA, ATTN_MQA, NUM_ATTN_KINDS } AttnKind;

LLMC_FN const char *attn_name(AttnKind kind) {
    static const char *const names[NUM_ATTN_KINDS] = {"tpa", "tpa_kvonly", "mha", "gqa", "mqa"};
    return names[kind];
}

typedef struct {
    AttnKind attn;
    int64_t n_layer, n_embd, n_head, head_dim, vocab_size;
    int64_t q_rank, k_rank, v_rank;     // tpa; tpa_kvonly has no q_rank
    int64_t n_kv_head;                  // gqa: number of K/V heads
    int64_t hidden;                     // MLP width F; 0 means floor(8/3 n_embd)
    double rope_base, rms_eps;
} Config;

LLMC_FN int64_t default_hidden(int64_t n_embd) { return (int64_t)floor(8.0 / 3.0 * (double)n_embd); }

// The integers of a Config with their names and accepted ranges: for config.json and for the checks.
typedef struct { const char *name; int64_t *value; int64_t min, max; } ConfigField;
enum { NUM_CONFIG_FIELDS = 10 };
LLMC_FN void config_fields(Config *c, ConfigField out[NUM_CONFIG_FIELDS]) {
    const ConfigField fields[NUM_CONFIG_FIELDS] = {
        {"n_layer", &c->n_layer, 1, 1024}, {"n_embd", &c->n_embd, 1, 65536}, {"n_head", &c->n_head, 1, 1024},
        {"head_dim", &c->head_dim, 2, 1024}, {"vocab_size", &c->vocab_size, 2, 65536}, {"q_rank", &c->q_rank, 1, 256},
        {"k_rank", &c->k_rank, 1, 256}, {"v_rank", &c->v_rank, 1, 256}, {"n_kv_head", &c->n_kv_head, 1, 1024},
        {"hidden", &c->hidden, 1, 1 << 20}};
    memcpy(out, fields, sizeof fields);
}

LLMC_FN int attn_from_name(const char *name, AttnKind *kind, Error *err) {
    for (int i = 0; i < NUM_ATTN_KINDS; i++)
        if (!strcmp(name, attn_name((AttnKind)i))) { *kind = (AttnKind)i; return 0; }
    return fail(err, "attention kind \"%.40s\" is not known here; there are tpa, tpa_kvonly, mha, gqa and mqa", name);
}

// Fills in what 0 leaves open and refuses what cannot be built.
LLMC_FN int config_check(Config *c, Error *err) {
    if (c->hidden == 0) c->hidden = default_hidden(c->n_embd);
    ConfigField fields[NUM_CONFIG_FIELDS];
    config_fields(c, fields);
    for (int i = 0; i < NUM_CONFIG_FIELDS; i++)
        if (*fields[i].value < fields[i].min || *fields[i].value > fields[i].max)
            return fail(err, "%s is %lld; it must be from %lld to %lld", fields[i].name, (long long)*fields[i].value,
                        (long long)fields[i].min, (long long)fields[i].max);
    if (c->head_dim % 2) return fail(err, "head_dim is %lld; it must be even, because RoPE turns pairs", (long long)c->head_dim);
    if (c->attn == ATTN_GQA && c->n_head % c->n_kv_head)
        return fail(err, "n_kv_head %lld does not divide n_head %lld", (long long)c->n_kv_head, (long long)c->n_head);
    if (!(c->rope_base > 1) || !(c->rope_base < 1e12)) return fail(err, "rope_base is %g; it must be between 1 and 1e12", c->rope_base);
    if (!(c->rms_eps >= 0) || !(c->rms_eps < 1)) return fail(err, "rms_eps is %g; it must be at least 0 and below 1", c->rms_eps);
    return 0;
}

// The presets: the paper's models and recipe (its Tables 9 and 10), and "tiny", ours, for a laptop and the toy corpus. Heads are
// such that every kind has about the same number of parameters.
typedef struct {
    const char *name;
    int n_layer, n_embd, head_dim;
    int heads[NUM_ATTN_KINDS];      // tpa, tpa_kvonly, mha, gqa (two K/V heads), mqa
    int q_rank, k_rank, v_rank;
    int seq_len, batch_size;
    int tokens_per_step, warmup_steps, max_steps;
    double lr, min_lr;
} Preset;

LLMC_FN const Preset *find_preset(const char *name) {
    static const Preset presets[] = {
        {"tiny",   4,  128, 64, { 4,  3,  2,  2,  3}, 2, 1, 1,  256,  4,   1024,   50,   2800, 3e-3, 3e-4},
        {"124M",  12,  768, 64, {34, 22, 12, 22, 23}, 6, 2, 2, 1024, 24, 491520, 2000, 100000, 6e-4, 3e-5},
        {"353M",  24, 1024, 64, {47, 29, 16, 30, 31}, 6, 2, 2, 1024, 20, 491520, 2000, 100000, 3e-4, 6e-5},
        {"773M",  36, 1280, 64, {61, 37, 20, 38, 39}, 6, 2, 2, 1024, 15, 491520, 2000, 100000, 2e-4, 1e-5},
        {"1.5B",  48, 1600, 64, {78, 47, 25, 48, 49}, 6, 2, 2, 1024,  6, 491520, 2000, 100000, 1e-4, 1e-5},
    };
    for (size_t i = 0; i < sizeof presets / sizeof *presets; i++)
        if (!strcmp(name, presets[i].name)) return &presets[i];
    return NULL;
}

LLMC_FN Config preset_config(const Preset *p, AttnKind attn) {
    Config c = {attn, p->n_layer, p->n_embd, p->heads[attn], p->head_dim, GPT2_VOCAB_SIZE, p->q_rank, p->k_rank, p->v_rank, 2, 0, 10000, 1e-6};
    c.hidden = default_hidden(c.n_embd);
    return c;
}

// config.json of a checkpoint, or the same object inside a golden file. Unknown keys are ignored, but for the switches of the
// paper's variants, which must be at their defaults as long as this program does not build them.
LLMC_FN int config_from_json(Config *c, const char *text, const char *where, Error *err) {
    Error why = {""};
    cJSON *json = cJSON_Parse(text);
    if (!cJSON_IsObject(json)) {
        cJSON_Delete(json);
        return fail(err, "%s: not a JSON object", where);
    }
    Config r = {ATTN_TPA, 12, 768, 34, 64, 50304, 6, 2, 2, 2, 0, 10000, 1e-6};
    ConfigField fields[NUM_CONFIG_FIELDS];
    config_fields(&r, fields);
    int rc = 0;
    for (int i = 0; i < NUM_CONFIG_FIELDS && rc == 0; i++) {
        const cJSON *item = cJSON_GetObjectItemCaseSensitive(json, fields[i].name);
        if (!item || cJSON_IsNull(item)) continue;
        if (!cJSON_IsNumber(item) || item->valuedouble != floor(item->valuedouble) || fabs(item->valuedouble) > 1e9)
            rc = fail(&why, "\"%s\" is not an integer", fields[i].name);
        else *fields[i].value = (int64_t)item->valuedouble;
    }
    const cJSON *attn = cJSON_GetObjectItemCaseSensitive(json, "attn"), *item;
    if (rc == 0 && attn) rc = cJSON_IsString(attn) ? attn_from_name(attn->valuestring, &r.attn, &why) : fail(&why, "\"attn\" is not a text");
    if ((item = cJSON_GetObjectItemCaseSensitive(json, "rope_base")) && cJSON_IsNumber(item)) r.rope_base = item->valuedouble;
    if ((item = cJSON_GetObjectItemCaseSensitive(json, "rms_eps")) && cJSON_IsNumber(item)) r.rms_eps = item->valuedouble;
    const char *const variants[] = {"a_contextual", "b_contextual", "share_kv_b", "order", "head_act"};
    for (int i = 0; i < 5 && rc == 0; i++) {
        item = cJSON_GetObjectItemCaseSensitive(json, variants[i]);
        int is_default = !item || (i < 2 ? cJSON_IsTrue(item) : i == 2 ? cJSON_IsFalse(item) : i == 3 ? item->valuedouble == 2 :
                                   cJSON_IsString(item) && !strcmp(item->valuestring, "none"));
        if (!is_default) rc = fail(&why, "the variant \"%s\" is not built yet", variants[i]);
    }
    cJSON_Delete(json);
    if (rc == 0) rc = config_check(&r, &why);
    if (rc != 0) return fail(err, "%s: %s", where, why.text);
    *c = r;
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
// One idea, many attentions. A token has R vectors b_r of HS numbers, and head i is a weighted sum of them:
//     head_i = scale * sum_r a[i][r] b_r
// TPA computes the weights a from the token too. MHA, GQA and MQA are the same with fixed weights: R = NH, G or 1 vectors, and
// a[i][r] = 1 where head i belongs to group r (paper, section 3.4).

typedef enum {
    HEADS_FACTORED,     // a is a linear function of the token, like b: scale 1/R
    HEADS_GROUPED       // a[i][r] = (i / (NH / R) == r): scale 1
} HeadsKind;

typedef struct {
    HeadsKind kind;
    int R;              // vectors of the token: the rank, or the number of groups
    int rope;           // 1: the vectors are rotated by position (q and k), 0: not (v)
    int a;              // where a (NH, R) stands in a row of the projection's output, head-major; FACTORED only
    int b;              // where b (R, HS) stands, rank-major
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
    int64_t P, Pp;      // width of a row of factors, as computed and as stored
    int64_t F, Fp, Vp;  // MLP width and vocabulary as stored
    int64_t D, Dp;      // NH * HS, as computed and as stored
    // Parameter buffer: wte (Vp, C), then per layer wqkv (Pp, C), wo (C, Dp), w12 (2 Fp, C), w3 (C, Fp)
    size_t wte, layers, layer_stride, wqkv, wo, w12, w3;    // offsets; those of the matrices count from the layer's start
    size_t num_stored;      // elements of the buffer, padding included
    size_t num_parameters;  // without padding
    Tensor *tensors;        // in the order of the buffer
    int num_tensors;
} Model;

// The parameter buffer is handed about in buckets: wte, then the layers. With several ranks a bucket's storage is a multiple of
// world * SLICE_UNIT, so that every rank can have an equal slice of every bucket: its part of gradients, moments and master weights.
// A rank's slices lie one behind the other, that of bucket k at bucket.offset / world.
enum { SLICE_UNIT = 1024 };     // also what the squares of the gradient norm are summed over: see gradient_norm (train_t6.c)
typedef struct { size_t offset, size; } Bucket;
typedef struct { int rank, world; } Slice;      // {0, 1}: the whole

LLMC_FN int model_buckets(const Model *m) { return 1 + (int)m->config.n_layer; }
LLMC_FN Bucket model_bucket(const Model *m, int k) {
    if (k == 0) return (Bucket){m->wte, m->layers};
    return (Bucket){m->layers + (size_t)(k - 1) * m->layer_stride, m->layer_stride};
}
// Numbers in the largest of them: all layers are alike.
LLMC_FN size_t model_largest_bucket(const Model *m) { return m->layers > m->layer_stride ? m->layers : m->layer_stride; }
LLMC_FN int tensor_bucket(const Model *m, const Tensor *t) { return t->offset < m->layers ? 0 : 1 + (int)((t->offset - m->layers) / m->layer_stride); }

// Where a slice of bucket k lies in a whole buffer.
LLMC_FN Bucket model_slice(const Model *m, Slice s, int k) {
    Bucket b = model_bucket(m, k);
    size_t part = b.size / (size_t)s.world;
    return (Bucket){b.offset + (size_t)s.rank * part, part};
}

LLMC_FN int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

LLMC_FN void model_add_tensor_(Model *m, size_t offset, int64_t rows, int64_t cols, int64_t ld, double init, const char *name) {
    Tensor *t = &m->tensors[m->num_tensors++];
    memset(t, 0, sizeof *t);
    snprintf(t->name, sizeof t->name, "%s", name);
    t->rows = rows, t->cols = cols, t->ld = ld, t->offset = offset, t->init = init;
    m->num_parameters += (size_t)(rows * cols);
}

// Adds the weights that make one of q, k, v to the fused projection, `row` being its next free row in the layer.
LLMC_FN int64_t model_add_heads_(Model *m, const Heads *heads, char which, int layer, size_t base, int64_t row) {
    const Config *c = &m->config;
    int64_t C = c->n_embd, NH = c->n_head, HS = c->head_dim, R = heads->R;
    char name[64];
    int tpa = c->attn == ATTN_TPA || c->attn == ATTN_TPA_KVONLY;
    if (heads->kind == HEADS_FACTORED) {
        snprintf(name, sizeof name, "transformer.h.%d.attn.c_qkv.W_A_%c.weight", layer, which);
        model_add_tensor_(m, base + (size_t)(row * C), NH * R, C, C, sqrt(6.0 / (double)((C + NH) * R)), name);
        row += NH * R;
        snprintf(name, sizeof name, "transformer.h.%d.attn.c_qkv.W_B_%c.weight", layer, which);
        model_add_tensor_(m, base + (size_t)(row * C), R * HS, C, C, sqrt(6.0 / (double)((C + R) * HS)), name);
    } else {
        snprintf(name, sizeof name, "transformer.h.%d.attn.%sc_%c.weight", layer, tpa ? "c_qkv." : "", which);
        model_add_tensor_(m, base + (size_t)(row * C), R * HS, C, C, tpa ? sqrt(6.0 / (double)(C + R * HS)) : 1 / sqrt((double)C), name);
    }
    return row + R * HS;
}

LLMC_FN Heads heads_(const Config *c, int factored, int64_t R, int rope, int64_t *column) {
    Heads h = {factored ? HEADS_FACTORED : HEADS_GROUPED, (int)R, rope, (int)*column, 0, factored ? 1.0 / (double)R : 1.0};
    if (factored) *column += c->n_head * R;
    h.b = (int)*column;
    *column += R * c->head_dim;
    return h;
}

// Lays out the model of a checked config. Storage of P, F and NH * HS is padded to multiples of `pad` (what the matrix unit
// wants; 1: nothing), the vocabulary's always to 128. world: ranks that share it out. Free with model_free.
LLMC_FN void model_init_shared(Model *m, const Config *config, int pad, int world) {
    memset(m, 0, sizeof *m);
    const Config *c = &m->config;
    m->config = *config;
    int64_t C = c->n_embd, L = c->n_layer, NH = c->n_head;
    int tpa = c->attn == ATTN_TPA, kv = tpa || c->attn == ATTN_TPA_KVONLY;
    int64_t groups = c->attn == ATTN_MQA ? 1 : c->attn == ATTN_GQA ? c->n_kv_head : NH;
    m->q = heads_(c, tpa, tpa ? c->q_rank : NH, 1, &m->P);
    m->k = heads_(c, kv, kv ? c->k_rank : groups, 1, &m->P);
    m->v = heads_(c, kv, kv ? c->v_rank : groups, 0, &m->P);
    m->Pp = round_up(m->P, pad), m->F = c->hidden, m->Fp = round_up(m->F, pad), m->Vp = round_up(c->vocab_size, 128);
    m->D = NH * c->head_dim, m->Dp = round_up(m->D, pad);

    int64_t unit = world > 1 ? (int64_t)world * SLICE_UNIT : 1;
    m->wte = 0, m->layers = (size_t)round_up(m->Vp * C, unit);
    m->wqkv = 0, m->wo = (size_t)(m->Pp * C), m->w12 = m->wo + (size_t)(C * m->Dp), m->w3 = m->w12 + (size_t)(2 * m->Fp * C);
    m->layer_stride = (size_t)round_up((int64_t)m->w3 + C * m->Fp, unit);
    m->num_stored = m->layers + (size_t)L * m->layer_stride;

    m->tensors = (Tensor *)xcalloc((size_t)(1 + L * 10), sizeof *m->tensors);
    model_add_tensor_(m, m->wte, c->vocab_size, C, C, 1 / sqrt((double)C), "lm_head.weight");
    for (int l = 0; l < (int)L; l++) {
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
}

LLMC_FN void model_init(Model *m, const Config *config, int pad) { model_init_shared(m, config, pad, 1); }

LLMC_FN void model_free(Model *m) {
    free(m->tensors);
    m->tensors = NULL;
}

// Initial value of element (row, col) of tensor i: the same whatever the storage, the program and the number of threads.
LLMC_FN double model_initial_value(const Model *m, uint64_t seed, int i, int64_t row, int64_t col) {
    const Tensor *t = &m->tensors[i];
    return t->init * (2 * rng_uniform(rng_stream(seed, (uint64_t)i), (uint64_t)(row * t->cols + col)) - 1);
}

// Arithmetic of training on one token in sequences of T: 6 per parameter (2 forward, 4 backward) and causal attention, which
// sees T/2 tokens on average: forward 4 NH HS T/2, backward twice that.
LLMC_FN double model_flop_per_token(const Model *m, int64_t T) {
    return 6.0 * (double)m->num_parameters + 6.0 * (double)m->config.n_layer * (double)m->D * (double)T;
}

#endif
