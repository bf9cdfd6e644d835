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

typedef enum { ATTN_TPA, ATTN_TPA_KVONLY, ATTN_MHA, ATTN_GQA, ATTN_MQA, ATTN_MLA, NUM_ATTN_KINDS } AttnKind;
typedef enum { HEAD_ACT_NONE, HEAD_ACT_SIGMOID, HEAD_ACT_SOFTMAX, NUM_HEAD_ACTS } HeadAct;

typedef struct {
    AttnKind attn;
    int64_t n_layer, n_embd, n_head, head_dim, vocab_size;
    int64_t q_rank, k_rank, v_rank;     // of factored q, k, v
    int64_t n_kv_head;                  // gqa: number of K/V heads
    int64_t q_lora, kv_lora, rope_dim;  // mla: widths of the two latents and of the rotated part of a head
    int64_t hidden;                     // MLP width F; 0 means floor(8/3 n_embd)
    // Variants of factored heads (paper, appendices C and G); 0 is plain TPA
    int64_t a_constant, b_constant;     // head or token factors are learned constants: "a_contextual": false
    int64_t share_kv_b;                 // v has the token factors of k, unrotated
    int64_t b_dim;                      // third order ("order": 3): b_r = vec(b_r (b_dim) c_r^T); 0: second order
    HeadAct head_act;                   // of a: none, sigmoid, softmax over the heads
    // Switches of every kind, but for those that config_check refuses
    int64_t out_gate;                   // y = sigmoid(Wg n) * y before the output projection
    int64_t kv_shift;                   // b of k and v: a gated mean of this token's and the one's before
    int64_t qk_norm;                    // each head of q and k is divided by its root mean square
    double rope_base, rms_eps;
} Config;

LLMC_FN int64_t default_hidden(int64_t n_embd) { return (int64_t)floor(8.0 / 3.0 * (double)n_embd); }

// The integers of a Config with their keys in config.json and accepted ranges. min 0 and max 1: a switch, which JSON
// writes as false or true; FLIPPED: as true or false.
enum { FLIPPED = 1 };
typedef struct { const char *name; int64_t *value; int64_t min, max; int flipped; } ConfigField;
enum { NUM_CONFIG_FIELDS = 20 };
LLMC_FN void config_fields(Config *c, ConfigField out[NUM_CONFIG_FIELDS]) {
    const ConfigField fields[NUM_CONFIG_FIELDS] = {
        {"n_layer", &c->n_layer, 1, 1024, 0},
        {"n_embd", &c->n_embd, 1, 65536, 0},
        {"n_head", &c->n_head, 1, 1024, 0},
        {"head_dim", &c->head_dim, 2, 1024, 0},
        {"vocab_size", &c->vocab_size, 2, 65536, 0},
        {"q_rank", &c->q_rank, 1, 256, 0},
        {"k_rank", &c->k_rank, 1, 256, 0},
        {"v_rank", &c->v_rank, 1, 256, 0},
        {"n_kv_head", &c->n_kv_head, 1, 1024, 0},
        {"q_lora", &c->q_lora, 0, 65536, 0},
        {"kv_lora", &c->kv_lora, 0, 65536, 0},
        {"rope_dim", &c->rope_dim, 0, 1024, 0},
        {"hidden", &c->hidden, 1, 1 << 20, 0},
        {"a_contextual", &c->a_constant, 0, 1, FLIPPED},
        {"b_contextual", &c->b_constant, 0, 1, FLIPPED},
        {"share_kv_b", &c->share_kv_b, 0, 1, 0},
        {"b_dim", &c->b_dim, 0, 1024, 0},
        {"out_gate", &c->out_gate, 0, 1, 0},
        {"kv_shift", &c->kv_shift, 0, 1, 0},
        {"qk_norm", &c->qk_norm, 0, 1, 0},
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
    SINGLE,         // one vector, shared by all heads
    LATENT          // NH vectors that are linear in a normed latent vector, which is linear in the token
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
        {ATTN_TPA,        "tpa",         FACTORS, FACTORS, FACTORS, "c_qkv.", { 8,  34,  47,  61,  78}},
        {ATTN_TPA_KVONLY, "tpa_kvonly",  HEADS,   FACTORS, FACTORS, "c_qkv.", { 6,  22,  29,  37,  47}},
        {ATTN_MHA,        "mha",         HEADS,   HEADS,   HEADS,   "",       { 4,  12,  16,  20,  25}},
        {ATTN_GQA,        "gqa",         HEADS,   GROUPS,  GROUPS,  "",       { 6,  22,  30,  38,  48}},
        {ATTN_MQA,        "mqa",         HEADS,   SINGLE,  SINGLE,  "",       { 8,  23,  31,  39,  49}},
        {ATTN_MLA,        "mla",         LATENT,  LATENT,  LATENT,  "",       { 6,  12,  23,  34,  49}},
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

LLMC_FN const char *head_act_name(HeadAct act) {
    static const char *const names[NUM_HEAD_ACTS] = {"none", "sigmoid", "softmax"};
    return names[act];
}

LLMC_FN int head_act_from_name(const char *name, HeadAct *act, Error *err) {
    for (int i = 0; i < NUM_HEAD_ACTS; i++)
        if (!strcmp(name, head_act_name((HeadAct)i))) { *act = (HeadAct)i; return 0; }
    return fail(err, "head_act \"%.40s\" is not known; use none, sigmoid or softmax", name);
}

// Refuses combinations of variants and switches that mean nothing.
LLMC_FN int config_check_variants_(const Config *c, Error *err) {
    const AttnInfo *kind = attn_info(c->attn);
    int factored = kind->k == FACTORS, latent = kind->k == LATENT;
    const struct { int on; const char *key; } of_factors[] = {
        {c->a_constant != 0, "a_contextual false"}, {c->b_constant != 0, "b_contextual false"},
        {c->share_kv_b != 0, "share_kv_b"}, {c->b_dim != 0, "order 3"},
        {c->head_act != HEAD_ACT_NONE, "head_act"}};
    for (int i = 0; i < 5 && !factored; i++)
        if (of_factors[i].on)
            return fail(err, "%s needs head and token factors, and %s has none", of_factors[i].key, kind->name);
    if (c->a_constant && c->b_constant)
        return fail(err, "a_contextual and b_contextual are both false: k and v would not depend on the token");
    if (c->a_constant && c->head_act != HEAD_ACT_NONE)
        return fail(err, "head_act %s needs head factors that depend on the token; a_contextual is false",
                    head_act_name(c->head_act));
    if (c->share_kv_b && c->k_rank != c->v_rank)
        return fail(err, "share_kv_b: k and v share their token factors, so k_rank %lld and v_rank %lld must be equal",
                    (long long)c->k_rank, (long long)c->v_rank);
    if (c->b_dim && c->b_constant)
        return fail(err, "order 3 needs token factors that depend on the token; b_contextual is false");
    if (c->b_dim && (c->b_dim % 2 || c->head_dim % c->b_dim))
        return fail(err, "b_dim is %lld; it must be even, because RoPE rotates pairs, and divide head_dim %lld",
                    (long long)c->b_dim, (long long)c->head_dim);
    if (c->kv_shift && c->b_constant)
        return fail(err, "kv_shift needs token factors that depend on the token; b_contextual is false");
    if (latent && (c->kv_shift || c->qk_norm))
        return fail(err, "%s does not go with mla", c->kv_shift ? "kv_shift" : "qk_norm");
    if (latent && (c->q_lora == 0 || c->kv_lora == 0)) return fail(err, "mla needs q_lora and kv_lora of at least 1");
    if (latent && (c->rope_dim == 0 || c->rope_dim % 2))
        return fail(err, "rope_dim is %lld; it must be even, because RoPE rotates pairs, and at least 2",
                    (long long)c->rope_dim);
    return 0;
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
    return config_check_variants_(c, err);
}

// ---------------------------------------------------------------------------------------------------------------------
// Presets: the paper's models and recipe (Tables 9 and 10), and "tiny", ours, for a laptop and the toy corpus.

typedef struct {
    const char *name;
    int n_layer, n_embd, head_dim;
    int q_rank, k_rank, v_rank;
    int q_lora, kv_lora, rope_dim;
    int kv_shift, qk_norm;      // of kinds that can have them
    int seq_len, batch_size;
    int tokens_per_step, warmup_steps, max_steps;
    double lr, min_lr, weight_decay, beta2;
} Preset;

enum { NUM_PRESETS = 5 };
LLMC_FN const Preset *preset_table(void) {
    static const Preset table[NUM_PRESETS] = {
        // ranks q k v, then mla's latents and rotated part, then the switches
        //name    L     C  HS  ranks   q lora kv rope s  n   T   B  tokens/step warm-up steps  lr    min lr decay beta2
        {"tiny",   4,  128, 32, 4, 2, 2,   64,  32, 16, 1, 1,  256,  1,    256,  300,   9500, 3e-3, 1e-5, 0.01, 0.99},
        {"124M",  12,  768, 64, 6, 2, 2,  512, 256, 32, 0, 0, 1024, 24, 491520, 2000, 100000, 6e-4, 3e-5, 0.1, 0.95},
        // rates of the published configs and of Table 14's caption; section H.1's 3e-4 and 6e-5 are its ablation
        {"353M",  24, 1024, 64, 6, 2, 2, 1024, 512, 32, 0, 0, 1024, 20, 491520, 2000, 100000, 6e-4, 3e-5, 0.1, 0.95},
        {"773M",  36, 1280, 64, 6, 2, 2, 1024, 512, 32, 0, 0, 1024, 15, 491520, 2000, 100000, 2e-4, 1e-5, 0.1, 0.95},
        {"1.5B",  48, 1600, 64, 6, 2, 2, 1024, 512, 32, 0, 0, 1024,  6, 491520, 2000, 100000, 1e-4, 1e-5, 0.1, 0.95},
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
    c.q_lora = 512, c.kv_lora = 256, c.rope_dim = 32;
    c.rope_base = 10000, c.rms_eps = 1e-6;
    return c;
}

LLMC_FN Config preset_config(const Preset *p, AttnKind attn) {
    Config c = default_config();
    c.attn = attn;
    c.n_layer = p->n_layer, c.n_embd = p->n_embd, c.head_dim = p->head_dim;
    c.n_head = attn_info(attn)->heads[p - preset_table()];
    c.q_rank = p->q_rank, c.k_rank = p->k_rank, c.v_rank = p->v_rank;
    c.q_lora = p->q_lora, c.kv_lora = p->kv_lora, c.rope_dim = p->rope_dim;
    if (attn_info(attn)->k != LATENT) c.kv_shift = p->kv_shift, c.qk_norm = p->qk_norm;
    c.hidden = default_hidden(c.n_embd);
    return c;
}

// ---------------------------------------------------------------------------------------------------------------------
// config.json

// Refuses settings of the published code that would make a model other than those supported here.
LLMC_FN int config_check_published_(const cJSON *json, Error *err) {
    static const struct { const char *key, *value; } only[] = {
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
        if (fields[i].min == 0 && fields[i].max == 1) {
            if (!cJSON_IsBool(item)) return fail(err, "\"%s\" is not true or false", fields[i].name);
            *fields[i].value = cJSON_IsTrue(item) != fields[i].flipped;
            continue;
        }
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
    const cJSON *act = cJSON_GetObjectItemCaseSensitive(json, "head_act");
    if (act) {
        if (!cJSON_IsString(act)) return fail(err, "\"head_act\" is not a string");
        if (head_act_from_name(act->valuestring, &c->head_act, err) != 0) return -1;
    }
    const cJSON *order = cJSON_GetObjectItemCaseSensitive(json, "order");
    if (order && (!cJSON_IsNumber(order) || (order->valuedouble != 2 && order->valuedouble != 3)))
        return fail(err, "\"order\" is neither 2 nor 3");
    if (!order || order->valuedouble == 2) c->b_dim = 0;
    else if (c->b_dim == 0) return fail(err, "\"order\" is 3 and \"b_dim\" is missing or 0");
    return config_check_published_(json, err);
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
    for (int i = 0; i < NUM_CONFIG_FIELDS; i++)
        if (fields[i].min == 0 && fields[i].max == 1)
            cJSON_AddBoolToObject(json, fields[i].name, *fields[i].value != fields[i].flipped);
        else cJSON_AddNumberToObject(json, fields[i].name, (double)*fields[i].value);
    cJSON_AddNumberToObject(json, "order", c.b_dim ? 3 : 2);
    cJSON_AddStringToObject(json, "head_act", head_act_name(c.head_act));
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
// All a and b of a token are one factor row:
//     [aQ (NH, RQ) | bQ (RQ, HSK) | aK (NH, RK) | bK (RK, HSK) | aV (NH, RV) | bV (RV, HSV)]
// A grouped part has no a. For plain kinds that row is the projected row (P), the output of one projection of the
// token. The variants project something else and make the factor row (PF) from it:
//     a constant a or b is not projected, but a weight;  head_act: a = act(a);  share_kv_b: v takes b (and c, s) of k
//     third order: b (R, b_dim) and c (R, HS / b_dim) are projected, and b_r = vec(rope(b_r) c_r^T)
//     kv_shift: gates s (R) are projected too, and b_r = sigmoid(s_r) b_r of the token before + (1 - sigmoid(s_r)) b_r
// out_gate projects its D gates in the same row, after all of that.

typedef enum {
    HEADS_FACTORED,     // a is a linear function of the token, like b: scale 1/R
    HEADS_GROUPED       // a[i][r] = (i / (NH / R) == r): scale 1
} HeadsKind;

enum { NOT_PROJECTED = -1 };
typedef struct {
    HeadsKind kind;
    int R;              // vectors per token: the rank, or the number of groups
    int HS;             // numbers per vector: HSK of q and k, HSV of v
    int HSR;            // RoPE rotates the last HSR of them, of third order all b_dim; 0 for v
    int a;              // first column of a (NH, R) in the factor row; HEADS_FACTORED only
    int b;              // first column of b (R, HS) in the factor row
    double scale;
    // columns of the projected row, or NOT_PROJECTED
    int from_a, from_b;         // b: (R, HB)
    int from_c, from_s;         // (R, HS / HB), (R)
    int HB;                     // HS, or b_dim
    size_t const_a, const_b;    // where a or b is a constant: its offset in a layer's weights
} Heads;

// ---------------------------------------------------------------------------------------------------------------------
// The tensor table

typedef struct {
    char name[64];      // published name
    int64_t rows, cols; // as published: (out features, in features)
    int64_t ld;         // elements from one stored row to the next, cols <= ld
    size_t offset;      // of element (0, 0) in the parameter buffer
    double init;        // initial values are uniform in +-init; 0: zeros; INIT_NORMAL: N(0, 1); INIT_ONES: 1
    int num_dims;       // as published: 2, or 1 for (cols), rows 1
} Tensor;
enum { INIT_NORMAL = -1, INIT_ONES = -2 };

typedef struct {
    Config config;
    Heads q, k, v;
    int64_t HSK, HSV;   // sizes of a query/key head and of a value head
    int64_t HSR;        // RoPE rotates the last HSR numbers of a query/key head
    double scale;       // of the softmax: 1 / sqrt(HSK)
    int64_t P, Pp;      // width of a projected row, as computed and as stored
    int64_t PF, PFp;    // width of a factor row, as computed and as stored; where is_projected, rows are Pp apart
    int is_projected;   // the factor row is the (beginning of the) projected row
    int64_t gate;       // first column of out_gate's D gates in the projected row
    int64_t F, Fp, Vp;  // MLP width, as computed and as stored; vocabulary, as stored
    int64_t D, Dp;      // NH * HSV, the width of all heads' outputs side by side, as computed and as stored
    // Parameter buffer: wte (Vp, C), then per layer wqkv (Pp, C), wo (C, Dp), w12 (2 Fp, C), w3 (C, Fp); constant
    // factors (Heads); mla: gains (q_lora), (kv_lora), wqb (NH HSK, q_lora), wkvb (NH 2 HSV, kv_lora)
    size_t wte, layers, layer_stride;   // offsets in the buffer
    size_t wqkv, wo, w12, w3;           // offsets in a layer
    size_t q_gain, kv_gain, wqb, wkvb;
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

LLMC_FN Tensor *model_add_tensor_(Model *m, size_t offset, int64_t rows, int64_t cols, int64_t ld, double init,
                                  const char *name) {
    Tensor *t = &m->tensors[m->num_tensors++];
    memset(t, 0, sizeof *t);
    snprintf(t->name, sizeof t->name, "%s", name);
    t->rows = rows, t->cols = cols, t->ld = ld, t->offset = offset, t->init = init, t->num_dims = 2;
    m->num_parameters += (size_t)(rows * cols);
    return t;
}

// Adds a weight of layer l: transformer.h.<l>.attn.<scope><name>, for which format and which give the name.
LLMC_FN Tensor *model_add_attn_(Model *m, int l, size_t offset, int64_t rows, int64_t cols, double init,
                                const char *format, char which) {
    char end[32], name[64];
    snprintf(end, sizeof end, format, which);
    snprintf(name, sizeof name, "transformer.h.%d.attn.%s%s", l, attn_info(m->config.attn)->scope, end);
    return model_add_tensor_(m, m->layers + (size_t)l * m->layer_stride + offset, rows, cols, cols, init, name);
}

// Adds the weights that make q, k or v (`which`) of layer l. Those that v shares with k are there already.
LLMC_FN void model_add_heads_(Model *m, const Heads *h, char which, int l) {
    const Config *c = &m->config;
    const AttnInfo *kind = attn_info(c->attn);
    int64_t C = c->n_embd, NH = c->n_head, R = h->R, HB = h->HB;
    double xavier = sqrt(6.0 / (double)((C + R) * HB)), plain = 1 / sqrt((double)C);
    int own_b = !(c->share_kv_b && which == 'v');
    size_t row = m->wqkv;       // of column 0
    if (h->kind == HEADS_FACTORED && h->from_a != NOT_PROJECTED)
        model_add_attn_(m, l, row + (size_t)(h->from_a * C), NH * R, C, sqrt(6.0 / (double)((C + NH) * R)),
                        "W_A_%c.weight", which);
    else if (h->kind == HEADS_FACTORED) model_add_attn_(m, l, h->const_a, NH, R, INIT_NORMAL, "A_%c", which);
    if (!own_b) return;
    if (h->kind == HEADS_FACTORED && h->from_b != NOT_PROJECTED)
        model_add_attn_(m, l, row + (size_t)(h->from_b * C), R * HB, C, xavier, "W_B_%c.weight", which);
    else if (h->kind == HEADS_FACTORED) model_add_attn_(m, l, h->const_b, R, HB, INIT_NORMAL, "B_%c", which);
    else        // tpa_kvonly: its dense q has Xavier values like the factors
        model_add_attn_(m, l, row + (size_t)(h->from_b * C), R * HB, C,
                        kind->k == FACTORS ? sqrt(6.0 / (double)(C + R * HB)) : plain, "c_%c.weight", which);
    if (h->from_c != NOT_PROJECTED)
        model_add_attn_(m, l, row + (size_t)(h->from_c * C), R * (h->HS / HB), C, plain, "W_C_%c.weight", which);
    if (h->from_s != NOT_PROJECTED)
        model_add_attn_(m, l, row + (size_t)(h->from_s * C), R, C, plain, "W_S_%c.weight", which);
}

// Adds mla's weights of layer l. The projected row is [latent of q | latent of k and v | rotated part of k].
LLMC_FN void model_add_latents_(Model *m, int l) {
    const Config *c = &m->config;
    int64_t C = c->n_embd, NH = c->n_head, q = c->q_lora, kv = c->kv_lora;
    double plain = 1 / sqrt((double)C);
    model_add_attn_(m, l, m->wqkv, q, C, plain, "q_a_proj.weight", 0);
    model_add_attn_(m, l, m->wqkv + (size_t)(q * C), kv + c->rope_dim, C, plain, "kv_a_proj_with_mqa.weight", 0);
    model_add_attn_(m, l, m->q_gain, 1, q, INIT_ONES, "q_a_layernorm.weight", 0)->num_dims = 1;
    model_add_attn_(m, l, m->kv_gain, 1, kv, INIT_ONES, "kv_a_layernorm.weight", 0)->num_dims = 1;
    model_add_attn_(m, l, m->wqb, NH * m->HSK, q, 1 / sqrt((double)q), "q_b_proj.weight", 0);
    model_add_attn_(m, l, m->wkvb, NH * 2 * m->HSV, kv, 1 / sqrt((double)kv), "kv_b_proj.weight", 0);
}

// Where the next part of a layer goes: columns of the factor row and of the projected row, and an offset in the layer's
// weights.
typedef struct { int64_t factor, projected; size_t weight; } NextPart_;

LLMC_FN int take_columns_(int64_t *next, int64_t n) { return (int)((*next += n) - n); }

// Describes q, k or v (`which`) and moves *next past it. k: the description of k, for v, which may share its b.
LLMC_FN Heads heads_(const Config *c, char which, HeadSource source, int64_t rank, int64_t HS, int64_t HSR,
                     const Heads *k, NextPart_ *next) {
    Heads h;
    memset(&h, 0, sizeof h);
    int factored = source == FACTORS, third = factored && c->b_dim > 0;
    int64_t NH = c->n_head, R = factored ? rank : source == GROUPS ? c->n_kv_head : source == SINGLE ? 1 : NH;
    h.kind = factored ? HEADS_FACTORED : HEADS_GROUPED;
    h.R = (int)R, h.HS = (int)HS, h.HB = (int)(third ? c->b_dim : HS), h.HSR = third && HSR > 0 ? h.HB : (int)HSR;
    h.scale = factored ? 1.0 / (double)R : 1.0;
    h.a = take_columns_(&next->factor, factored ? NH * R : 0);
    h.b = take_columns_(&next->factor, R * HS);
    h.from_a = h.from_b = h.from_c = h.from_s = NOT_PROJECTED;
    if (factored && !c->a_constant) h.from_a = take_columns_(&next->projected, NH * R);
    else if (factored) h.const_a = next->weight, next->weight += (size_t)(NH * R);
    if (which == 'v' && c->share_kv_b) {
        h.from_b = k->from_b, h.from_c = k->from_c, h.from_s = k->from_s, h.const_b = k->const_b;
        return h;
    }
    if (factored && c->b_constant) h.const_b = next->weight, next->weight += (size_t)(R * h.HB);
    else h.from_b = take_columns_(&next->projected, R * h.HB);
    if (third) h.from_c = take_columns_(&next->projected, R * (HS / h.HB));
    if (c->kv_shift && which != 'q') h.from_s = take_columns_(&next->projected, R);
    return h;
}

// Whether the part's factors are what was projected, in the same columns.
LLMC_FN int heads_projected_(const Heads *h) {
    return (h->kind == HEADS_GROUPED || h->from_a == h->a) && h->from_b == h->b && h->from_c == NOT_PROJECTED &&
           h->from_s == NOT_PROJECTED;
}

LLMC_FN void model_add_layer_(Model *m, int l) {
    const Config *c = &m->config;
    int64_t C = c->n_embd;
    size_t base = m->layers + (size_t)l * m->layer_stride;
    char name[64];
    if (c->attn == ATTN_MLA) model_add_latents_(m, l);
    else model_add_heads_(m, &m->q, 'q', l), model_add_heads_(m, &m->k, 'k', l), model_add_heads_(m, &m->v, 'v', l);
    if (c->out_gate) {
        snprintf(name, sizeof name, "transformer.h.%d.attn.c_gate.weight", l);
        model_add_tensor_(m, base + m->wqkv + (size_t)(m->gate * C), m->D, C, C, 1 / sqrt((double)C), name);
    }
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
    int64_t C = c->n_embd, L = c->n_layer, latent = c->attn == ATTN_MLA;
    const AttnInfo *kind = attn_info(c->attn);
    NextPart_ next = {0, 0, 0};         // weights: from the end of w3 on, added below
    m->HSV = c->head_dim, m->HSR = latent ? c->rope_dim : c->head_dim, m->HSK = c->head_dim + (latent ? m->HSR : 0);
    m->scale = 1 / sqrt((double)m->HSK);
    m->q = heads_(c, 'q', kind->q, c->q_rank, m->HSK, m->HSR, NULL, &next);
    m->k = heads_(c, 'k', kind->k, c->k_rank, m->HSK, m->HSR, NULL, &next);
    m->v = heads_(c, 'v', kind->v, c->v_rank, m->HSV, 0, &m->k, &next);
    m->D = c->n_head * m->HSV, m->Dp = round_up(m->D, pad);
    m->PF = next.factor, m->PFp = round_up(m->PF, pad);
    m->P = latent ? c->q_lora + c->kv_lora + c->rope_dim : next.projected;
    m->is_projected = !latent && c->head_act == HEAD_ACT_NONE && heads_projected_(&m->q) && heads_projected_(&m->k) &&
                      heads_projected_(&m->v);
    // gates of a head are whole lines of 128 bytes on the GPU: one thread block reads and writes them
    int64_t line = c->out_gate ? 8 * pad : pad;
    m->gate = round_up(m->P, line);
    if (c->out_gate) m->P = m->gate + m->D;
    m->Pp = round_up(m->P, line), m->F = c->hidden, m->Fp = round_up(m->F, pad), m->Vp = round_up(c->vocab_size, 128);

    int64_t unit = world > 1 ? (int64_t)world * SLICE_UNIT : pad;
    m->wte = 0, m->layers = (size_t)round_up(m->Vp * C, unit);
    m->wqkv = 0;
    m->wo = (size_t)(m->Pp * C);
    m->w12 = m->wo + (size_t)(C * m->Dp);
    m->w3 = m->w12 + (size_t)(2 * m->Fp * C);
    size_t end = m->w3 + (size_t)(C * m->Fp);
    m->q.const_a += end, m->k.const_a += end, m->v.const_a += end;
    m->q.const_b += end, m->k.const_b += end, m->v.const_b += end;
    end += next.weight;
    if (latent) {
        m->q_gain = end, m->kv_gain = m->q_gain + (size_t)c->q_lora, m->wqb = m->kv_gain + (size_t)c->kv_lora;
        m->wkvb = m->wqb + (size_t)(c->n_head * m->HSK * c->q_lora);
        end = m->wkvb + (size_t)(2 * m->D * c->kv_lora);
    }
    m->layer_stride = (size_t)round_up((int64_t)end, unit);
    m->num_stored = m->layers + (size_t)L * m->layer_stride;

    enum { MOST_TENSORS = 17 };     // of a layer: a, b, c of q, k, v, two gates s, the output's gate and four more
    m->tensors = (Tensor *)xcalloc((size_t)(1 + L * MOST_TENSORS), sizeof *m->tensors);
    model_add_tensor_(m, m->wte, c->vocab_size, C, C, 1 / sqrt((double)C), "lm_head.weight");
    for (int l = 0; l < (int)L; l++) model_add_layer_(m, l);
}

LLMC_FN void model_init(Model *m, const Config *config, int pad) { model_init_shared(m, config, pad, 1); }

LLMC_FN void model_free(Model *m) {
    free(m->tensors);
    m->tensors = NULL;
}

// What decoding caches of a token in each layer: the factors of k and v that depend on the token, what they share once;
// of third order b and c. With qk_norm and constant a, the norms of k too, as they have no factor to go into.
enum { PART_AK, PART_BK, PART_CK, PART_AV, PART_BV, PART_CV, PART_NORMS, NUM_CACHE_PARTS };
enum { PART_LATENT = PART_AK, PART_ROTATED = PART_BK };         // of mla

// Where each part starts in a row of the cache, and the end. Returns how many of them hold numbers.
LLMC_FN int model_cache_parts(const Model *m, int64_t part[NUM_CACHE_PARTS + 1]) {
    const Config *c = &m->config;
    int64_t size[NUM_CACHE_PARTS] = {0};
    int used = 0;
    if (c->attn == ATTN_MLA) size[PART_LATENT] = c->kv_lora, size[PART_ROTATED] = c->rope_dim;
    else for (int v = 0; v < 2; v++) {
        const Heads *h = v ? &m->v : &m->k;
        int64_t *a_b_c = size + (v ? PART_AV : PART_AK);
        if (h->from_a != NOT_PROJECTED) a_b_c[0] = c->n_head * h->R;
        if (h->from_b == NOT_PROJECTED || (v && c->share_kv_b)) continue;
        a_b_c[1] = h->R * h->HB;
        if (h->from_c != NOT_PROJECTED) a_b_c[2] = h->R * (h->HS / h->HB);
    }
    if (c->qk_norm && c->a_constant) size[PART_NORMS] = c->n_head;
    part[0] = 0;
    for (int i = 0; i < NUM_CACHE_PARTS; i++) part[i + 1] = part[i] + size[i], used += size[i] > 0;
    return used;
}

// Numbers that decoding must cache for each token and layer (the paper's Table 1).
LLMC_FN int64_t model_cache_width(const Model *m) {
    int64_t part[NUM_CACHE_PARTS + 1];
    model_cache_parts(m, part);
    return part[NUM_CACHE_PARTS];
}

// Whether the model has none of the variants and switches, and is not mla.
LLMC_FN int model_is_plain(const Model *m) {
    return m->is_projected && !m->config.out_gate && !m->config.qk_norm;
}

// RoPE's frequency of pair i of HSR / 2, in radians per token.
LLMC_FN double rope_frequency(int64_t i, int64_t HSR, double base) {
    return pow(base, -2.0 * (double)i / (double)HSR);
}

// Initial value of element (row, col) of tensor i. It does not depend on storage, program or number of threads.
LLMC_FN double model_initial_value(const Model *m, uint64_t seed, int i, int64_t row, int64_t col) {
    const Tensor *t = &m->tensors[i];
    uint64_t stream = rng_stream(seed, (uint64_t)i), element = (uint64_t)(row * t->cols + col);
    if (t->init == INIT_ONES) return 1;
    if (t->init != INIT_NORMAL) return t->init * (2 * rng_uniform(stream, element) - 1);
    double radius = sqrt(-2 * log(1 - rng_uniform(stream, 2 * element)));       // Box and Muller 1958
    return radius * cos(2 * M_PI * rng_uniform(stream, 2 * element + 1));
}

// Arithmetic of training on one token in sequences of T: 6 per parameter (2 forward, 4 backward) and causal
// attention, which sees T/2 tokens on average: 2 NH (HSK + HSV) T/2 forward and twice that backward.
LLMC_FN double model_flop_per_token(const Model *m, int64_t T) {
    double heads = (double)m->config.n_head * (double)(m->HSK + m->HSV);
    return 6.0 * (double)m->num_parameters + 3.0 * (double)m->config.n_layer * heads * (double)T;
}

#endif
