// generate_t6.c: text from a T6 checkpoint on the CPU, through a cache of factors. llmc/generator.h is the program
// around it.
//
// This is the reference for generating: the GPU program is checked against it. It includes the trainer's model and
// uses its operators. Reading order:
//     the cache | FlashTPA decoding | memory | the model: prefill and steps | the generating program
//
// Shapes are train_t6.c's. A step appends n tokens to each of B sequences, which makes N = B*n rows.
#define T6_MODEL_ONLY
#include "train_t6.c"

#include "llmc/fp8.h"
#include "llmc/generator.h"

// ---------------------------------------------------------------------------------------------------------------------
// The cache: the part of each token's factor row that k and v are made of, in every layer:
//     |   aK    |    bK    |   aV    |    bV    |      W = (RK + RV) (NH + HS) numbers instead of MHA's 2 NH HS
//     | NH x RK | RK x HSK | NH x RV | RV x HSV |      bK is rotated
// Grouped heads have no a, so mha, gqa and mqa cache exactly their k and v.

enum { NUM_PARTS = 4 };     // aK, bK, aV, bV

typedef struct {
    CacheKind kind;
    int64_t L, B, capacity, W;          // capacity: most tokens per sequence
    int64_t part[NUM_PARTS + 1];        // where each part starts in a row, and the end
    float *numbers;                     // CACHE_NATIVE: (L, B, capacity, W)
    uint8_t *codes;                     // CACHE_FP8: (L, B, capacity, W) in e4m3
    float *scales;                      // CACHE_FP8: (L, B, capacity, NUM_PARTS)
    float value[256];                   // of each code, to be multiplied by the scale of its part
} Cache;

// Slots that are not in use hold NaN, so that reading one by mistake shows in the logits.
static void cache_init(Cache *cache, const Model *m, CacheKind kind, int64_t B, int64_t capacity) {
    *cache = (Cache){.kind = kind, .L = m->config.n_layer, .B = B, .capacity = capacity, .W = model_cache_width(m)};
    int64_t start = m->k.a, part[] = {0, m->k.b - start, m->v.a - start, m->v.b - start, cache->W};
    memcpy(cache->part, part, sizeof part);
    size_t tokens = (size_t)(cache->L * B * capacity);
    for (int i = 0; i < 256; i++) cache->value[i] = e4m3_to_float((uint8_t)i);
    if (kind == CACHE_FP8) {
        cache->codes = xmalloc(tokens * (size_t)cache->W);
        memset(cache->codes, 0x7F, tokens * (size_t)cache->W);
        cache->scales = xmalloc(tokens * NUM_PARTS * sizeof *cache->scales);
        for (size_t i = 0; i < tokens * NUM_PARTS; i++) cache->scales[i] = NAN;
    } else {
        cache->numbers = xmalloc(tokens * (size_t)cache->W * sizeof *cache->numbers);
        for (size_t i = 0; i < tokens * (size_t)cache->W; i++) cache->numbers[i] = NAN;
    }
}

static int64_t cache_slot(const Cache *cache, int64_t l, int64_t b, int64_t t) {
    return (l * cache->B + b) * cache->capacity + t;
}

// Stores row (W) as token t of sequence b in layer l.
static void cache_write(Cache *cache, int64_t l, int64_t b, int64_t t, const float *row) {
    int64_t slot = cache_slot(cache, l, b, t);
    if (cache->kind == CACHE_NATIVE) memcpy(cache->numbers + slot * cache->W, row, (size_t)cache->W * sizeof *row);
    else for (int i = 0; i < NUM_PARTS; i++) {
        int64_t start = cache->part[i], n = cache->part[i + 1] - start;
        cache->scales[slot * NUM_PARTS + i] = e4m3_quantize(cache->codes + slot * cache->W + start, row + start, n);
    }
}

// The row (W) of that token: in the cache itself, or decoded into buffer (W).
static const float *cache_read(const Cache *cache, int64_t l, int64_t b, int64_t t, float *buffer) {
    int64_t slot = cache_slot(cache, l, b, t);
    if (cache->kind == CACHE_NATIVE) return cache->numbers + slot * cache->W;
    const uint8_t *codes = cache->codes + slot * cache->W;
    for (int i = 0; i < NUM_PARTS; i++) {
        float scale = cache->scales[slot * NUM_PARTS + i];
        for (int64_t j = cache->part[i]; j < cache->part[i + 1]; j++) buffer[j] = scale * cache->value[codes[j]];
    }
    return buffer;
}

// ---------------------------------------------------------------------------------------------------------------------
// FlashTPA decoding (paper, Algorithm 2): attention of one token straight from the cached factors; k and v are never
// rebuilt. For every cached token, with rq over the vectors of q, rk over those of k and rv over those of v:
//     dot[rk][rq] = <bK[rk], bQ[rq]>                                                       shared by all heads
//     logit[h]    = scale_q scale_k / sqrt(HSK) sum_{rk,rq} aK[h][rk] aQ[h][rq] dot[rk][rq]
//     p = exp(logit[h] - largest so far);   acc[h] += p sum_rv aV[h][rv] bV[rv]
// and at the end y[h] = scale_v acc[h] / sum p. When `largest` grows, acc and sum are scaled down to match.
// Grouped heads are the same with one term: head h uses vector h / (NH / R) with weight 1.

// a sequence is split into at most SPLITS parts of at least MIN_SPLIT tokens
enum { SPLITS = 16, MIN_SPLIT = 64 };

// The vectors that head h is made of, first to first + count - 1, and their weights a (count). a NULL: all are 1.
typedef struct { int64_t first, count; const float *a; } Terms;
static inline Terms head_terms(const Heads *heads, const float *row, int64_t h, int64_t NH) {
    if (heads->kind == HEADS_GROUPED) return (Terms){h / (NH / heads->R), 1, NULL};
    return (Terms){0, heads->R, row + heads->a + h * heads->R};
}

// Tokens begin to end - 1 of sequence b, for the query with factor row fac (Pp). out: acc (NH, HSV), the largest
// logits (NH), the sums of p (NH). scratch: dot (RK, RQ), logit (NH) and a cache row (W).
static void flashtpa_split(float *out, float *scratch, const float *fac, const Model *m, const Cache *cache, int64_t l,
                           int64_t b, int64_t begin, int64_t end) {
    const Heads *q = &m->q, *k = &m->k, *v = &m->v;
    int64_t NH = m->config.n_head, HSK = m->HSK, HSV = m->HSV, RQ = q->R, RK = k->R;
    float *largest = out + NH * HSV, *sum = largest + NH, *dot = scratch, *logit = dot + RK * RQ, *buffer = logit + NH;
    float scale = (float)(q->scale * k->scale * m->scale);
    int grouped = q->kind == HEADS_GROUPED && k->kind == HEADS_GROUPED;
    for (int64_t i = 0; i < NH * HSV; i++) out[i] = 0;
    for (int64_t h = 0; h < NH; h++) largest[h] = -INFINITY, sum[h] = 0;
    for (int64_t t = begin; t < end; t++) {
        const float *row = cache_read(cache, l, b, t, buffer) - k->a;   // so that columns of the factor row hold
        for (int64_t rq = 0; rq < RQ; rq++)
            for (int64_t rk = 0; rk < RK; rk++) {
                if (grouped && rk != rq / (RQ / RK)) continue;          // no head needs it
                const float *bq = fac + q->b + rq * HSK, *bk = row + k->b + rk * HSK;
                float total = 0;
                #pragma omp simd reduction(+:total)
                for (int64_t j = 0; j < HSK; j++) total += bk[j] * bq[j];
                dot[rk * RQ + rq] = total;
            }
        for (int64_t h = 0; h < NH; h++) {
            Terms tq = head_terms(q, fac, h, NH), tk = head_terms(k, row, h, NH);
            float total = 0;
            for (int64_t rk = 0; rk < tk.count; rk++) {
                float inner = 0;
                for (int64_t rq = 0; rq < tq.count; rq++)
                    inner += (tq.a ? tq.a[rq] : 1) * dot[(tk.first + rk) * RQ + tq.first + rq];
                total += (tk.a ? tk.a[rk] : 1) * inner;
            }
            logit[h] = scale * total;
        }
        for (int64_t h = 0; h < NH; h++) {
            float *acc = out + h * HSV;
            if (logit[h] > largest[h]) {
                float shrink = exp(largest[h] - logit[h]);
                for (int64_t j = 0; j < HSV; j++) acc[j] *= shrink;
                sum[h] *= shrink, largest[h] = logit[h];
            }
            float p = exp(logit[h] - largest[h]);
            Terms tv = head_terms(v, row, h, NH);
            for (int64_t rv = 0; rv < tv.count; rv++) {
                const float *bv = row + v->b + (tv.first + rv) * HSV;
                float weight = p * (tv.a ? tv.a[rv] : 1);
                for (int64_t j = 0; j < HSV; j++) acc[j] += weight * bv[j];
            }
            sum[h] += p;
        }
    }
}

// y (B, n, Dp) of queries with factor rows fac (B, n, Pp). Query i of sequence b sees its tokens 0 to length[b] + i,
// the last of which is its own. Splits depend on a sequence's length alone, so y has the same bits with any number of
// threads, sequences and queries. partial (B, SPLITS, NH, HSV + 2), scratch (threads, scratch_size)
static void flashtpa_decode(float *y, float *partial, float *scratch, int64_t scratch_size, const float *fac,
                            const Model *m, const Cache *cache, int64_t l, const int64_t *length, int64_t B,
                            int64_t n) {
    int64_t NH = m->config.n_head, HSV = m->HSV, size = NH * (HSV + 2);
    for (int64_t i = 0; i < n; i++) {
        #pragma omp parallel for collapse(2) schedule(dynamic)
        for (int64_t b = 0; b < B; b++)
            for (int64_t split = 0; split < SPLITS; split++) {
                int64_t tokens = length[b] + i + 1, part = (tokens - 1) / SPLITS + 1;
                if (part < MIN_SPLIT) part = MIN_SPLIT;
                int64_t begin = split * part, end = begin + part < tokens ? begin + part : tokens;
                flashtpa_split(partial + (b * SPLITS + split) * size, scratch + omp_get_thread_num() * scratch_size,
                               fac + (b * n + i) * m->Pp, m, cache, l, b, begin, end);
            }
        #pragma omp parallel for collapse(2)
        for (int64_t b = 0; b < B; b++)
            for (int64_t h = 0; h < NH; h++) {
                float *out = y + (b * n + i) * m->Dp + h * HSV, largest = -INFINITY, sum = 0;
                const float *parts = partial + b * SPLITS * size;
                for (int64_t j = 0; j < HSV; j++) out[j] = 0;
                for (int64_t split = 0; split < SPLITS; split++)
                    largest = fmax(largest, parts[split * size + NH * HSV + h]);
                for (int64_t split = 0; split < SPLITS; split++) {
                    const float *part = parts + split * size;
                    float weight = exp(part[NH * HSV + h] - largest);       // 0 where the split has no tokens
                    for (int64_t j = 0; j < HSV; j++) out[j] += weight * part[h * HSV + j];
                    sum += weight * part[NH * HSV + NH + h];
                }
                for (int64_t j = 0; j < HSV; j++) out[j] *= (float)m->v.scale / sum;
            }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory

struct Generator {
    Model model;
    Cache cache;
    int64_t B, rows, prefill_rows;      // rows: of the largest step or of the longest prefill, whichever is more
    int64_t *length;                    // (B) tokens of each sequence
    float *params;                      // (num_stored)
    // one row per token
    float *x, *n, *rstd;                // (rows, C), (rows, C), (rows)     residual stream, normed
    float *fac, *y, *u, *s;             // (rows, Pp), (rows, Dp), (rows, 2 Fp), (rows, Fp)
    // prefill
    float *q, *k, *v;                   // (prefill_rows, NH, HSK) twice, (prefill_rows, NH, HSV)
    float *lse, *attention_scratch;     // (NH, prefill_rows), (attention_scratch_size)
    // steps
    float *partial, *decode_scratch;    // (B, SPLITS, NH, HSV + 2), (threads, decode_scratch_size)
    int64_t decode_scratch_size;
    // last tokens
    float *last, *logits;               // (B, C), (B, V)
    float *rope;                        // (capacity, HSR)
};

enum { NUM_GENERATOR_BUFFERS = 18 };

// The table of Generator's buffers: each pointer with its size. Sets g->rows, prefill_rows and decode_scratch_size.
static void generator_table(Generator *g, const Model *m, int64_t B, int64_t capacity, int64_t longest_prefill,
                            Buffer out[NUM_GENERATOR_BUFFERS]) {
    const Config *c = &m->config;
    int64_t T = longest_prefill, steps = B * MAX_STEP_TOKENS, rows = T > steps ? T : steps,
        threads = omp_get_max_threads();
    int64_t C = c->n_embd, NH = c->n_head, QK = NH * m->HSK;
    g->rows = rows, g->prefill_rows = T, g->decode_scratch_size = m->k.R * m->q.R + NH + model_cache_width(m);
    const Buffer table[NUM_GENERATOR_BUFFERS] = {
        {&g->params, (int64_t)m->num_stored}, {&g->x, rows * C}, {&g->n, rows * C}, {&g->rstd, rows},
        {&g->fac, rows * m->Pp}, {&g->y, rows * m->Dp}, {&g->u, rows * 2 * m->Fp}, {&g->s, rows * m->Fp},
        {&g->q, T * QK}, {&g->k, T * QK}, {&g->v, T * m->D}, {&g->lse, NH * T},
        {&g->attention_scratch, attention_scratch_size(T)}, {&g->partial, B * SPLITS * NH * (m->HSV + 2)},
        {&g->decode_scratch, threads * g->decode_scratch_size}, {&g->last, B * C}, {&g->logits, B * c->vocab_size},
        {&g->rope, capacity * m->HSR},
    };
    memcpy(out, table, sizeof table);
}

// ---------------------------------------------------------------------------------------------------------------------
// The model

// linear_forward for the few rows of a step, whose time is that of reading the weights. Unlike a library's, its sums do
// not depend on N: a sequence gets the same text alone and among others.
static void linear_step(float *out, const float *inp, const float *w, int64_t N, int64_t IC, int64_t OC,
                        OutputMode mode) {
    #pragma omp parallel for
    for (int64_t oc = 0; oc < OC; oc++)
        for (int64_t n = 0; n < N; n++) {
            const float *x = inp + n * IC, *row = w + oc * IC;
            float dot = 0;
            #pragma omp simd reduction(+:dot)
            for (int64_t ic = 0; ic < IC; ic++) dot += x[ic] * row[ic];
            out[n * OC + oc] = mode == ACCUMULATE ? out[n * OC + oc] + dot : dot;
        }
}

// PREFILL: a whole sequence by the trainer's operators. STEP: n more tokens, with attention from the cache.
typedef enum { PREFILL, STEP } Pass;

static void linear(Pass pass, float *out, const float *inp, const float *w, int64_t N, int64_t IC, int64_t OC,
                   OutputMode mode) {
    (pass == PREFILL ? linear_forward : linear_step)(out, inp, w, N, IC, OC, mode);
}

// qkv_forward for decoding: the factor rows g->fac of layer l from its normed input g->n, and their k and v part into
// the cache; in a prefill also g->q, k and v. For sequences first to first + B - 1, n tokens each.
static void qkv_decode(Generator *g, int64_t l, int64_t first, int64_t B, int64_t n, Pass pass) {
    const Model *m = &g->model;
    int64_t N = B * n, C = m->config.n_embd, NH = m->config.n_head, Pp = m->Pp;
    const float *w = g->params + m->layers + (size_t)l * m->layer_stride;
    linear(pass, g->fac, g->n, w + m->wqkv, N, C, Pp, OVERWRITE);               // [aQ bQ aK bK aV bV] = n Wqkv^T
    for (int64_t b = 0; b < B; b++) {
        int64_t position = g->length[first + b];
        float *fac = g->fac + b * n * Pp, *table = g->rope + position * m->HSR;
        rope(fac, &m->q, table, 1, n, Pp, ROTATE);
        rope(fac, &m->k, table, 1, n, Pp, ROTATE);
        for (int64_t i = 0; i < n; i++) cache_write(&g->cache, l, first + b, position + i, fac + i * Pp + m->k.a);
    }
    if (pass == STEP) return;
    contract_forward(g->q, g->fac, &m->q, n, NH, Pp);
    contract_forward(g->k, g->fac, &m->k, n, NH, Pp);
    contract_forward(g->v, g->fac, &m->v, n, NH, Pp);
}

// Appends n tokens, ids (B, n), to each of the sequences first to first + B - 1: to their cache, and to g->length.
// Their rows of g->logits become the logits of what follows. PREFILL: B = 1, and the sequence is empty.
static void forward(Generator *g, const int32_t *ids, int64_t first, int64_t B, int64_t n, Pass pass) {
    const Model *m = &g->model;
    const Config *c = &m->config;
    int64_t N = B * n, C = c->n_embd, NH = c->n_head, Dp = m->Dp, Fp = m->Fp, V = c->vocab_size;
    const float *wte = g->params + m->wte;
    encoder_forward(g->x, ids, wte, N, C);                                      // x = wte[idx]
    for (int64_t l = 0; l < c->n_layer; l++) {
        const float *w = g->params + m->layers + (size_t)l * m->layer_stride;

        rmsnorm_forward(g->n, g->rstd, g->x, N, C, c->rms_eps);                 // n = x / rms(x)
        qkv_decode(g, l, first, B, n, pass);                                    // factors, into the cache
        if (pass == PREFILL)                                                    // y = attention(q, k, v)
            attention_forward(g->y, g->lse, g->attention_scratch, g->q, g->k, g->v, 1, n, NH, m->HSK, m->HSV, Dp,
                              m->scale);
        else
            flashtpa_decode(g->y, g->partial, g->decode_scratch, g->decode_scratch_size, g->fac, m, &g->cache, l,
                            g->length, B, n);
        linear(pass, g->x, g->y, w + m->wo, N, Dp, C, ACCUMULATE);              // x += y Wo^T

        rmsnorm_forward(g->n, g->rstd, g->x, N, C, c->rms_eps);                 // n = x / rms(x)
        linear(pass, g->u, g->n, w + m->w12, N, C, 2 * Fp, OVERWRITE);          // u = n W1^T, n W2^T
        swiglu_forward(g->s, g->u, N, Fp);                                      // s = silu(n W1^T) * (n W2^T)
        linear(pass, g->x, g->s, w + m->w3, N, Fp, C, ACCUMULATE);              // x += s W3^T
    }
    for (int64_t b = 0; b < B; b++) {
        rmsnorm_forward(g->last + b * C, g->rstd, g->x + (b * n + n - 1) * C, 1, C, c->rms_eps);
        g->length[first + b] += n;
    }
    linear_step(g->logits + first * V, g->last, wte, B, C, V, OVERWRITE);       // logits = n wte^T
}

// =====================================================================================================================
// The generating program (llmc/generator.h) around this model

static void generator_start(const GenerateOptions *o) { cpu_start(o->threads, 1); }

static double generator_cache_bytes(const GenerateOptions *o, const Model *m, int64_t tokens) {
    double numbers = (double)model_cache_width(m), bytes = numbers * sizeof(float);
    if (o->cache_kind == CACHE_FP8) bytes = numbers + NUM_PARTS * sizeof(float);
    return (double)tokens * (double)m->config.n_layer * bytes;
}

static void generator_plan(const GenerateOptions *o, const Model *m, int64_t B, int64_t capacity) {
    Generator unused;
    Buffer table[NUM_GENERATOR_BUFFERS];
    generator_table(&unused, m, B, capacity, o->longest_prefill, table);
    double weights = (double)m->num_stored * sizeof(float), cache = (double)B * generator_cache_bytes(o, m, capacity);
    double activations = -weights, MiB = 0x1p20, GiB = 0x1p30;
    for (int i = 0; i < NUM_GENERATOR_BUFFERS; i++) activations += (double)table[i].elements * sizeof(float);
    double need = weights + cache + activations;
    HostMemory have = host_memory(1);
    if (o->stats || o->plan)
        fprintf(stderr, "memory: weights %.1f + cache %.1f + activations %.1f = %.1f MiB of %.0f available%s\n",
                weights / MiB, cache / MiB, activations / MiB, need / MiB, have.bytes / MiB, have.limit);
    if (need > have.bytes)
        die(EXIT_INPUT, "this run needs %.2f GiB of memory (cache %.2f) and %.2f are available%s: lower --max-tokens "
            "(-g), or use fewer or shorter prompts", need / GiB, cache / GiB, have.bytes / GiB, have.limit);
}

static Generator *generator_open(const GenerateOptions *o, const Config *config, int64_t B, int64_t capacity) {
    Generator *g = xcalloc(1, sizeof *g);
    Buffer table[NUM_GENERATOR_BUFFERS];
    model_init(&g->model, config, 1);
    generator_table(g, &g->model, B, capacity, o->longest_prefill, table);
    for (int i = 0; i < NUM_GENERATOR_BUFFERS; i++) *table[i].pointer = xcalloc((size_t)table[i].elements,
                                                                                sizeof(float));
    cache_init(&g->cache, &g->model, o->cache_kind, B, capacity);
    rope_table(g->rope, capacity, g->model.HSR, config->rope_base);
    g->length = xcalloc((size_t)B, sizeof *g->length);
    g->B = B;
    return g;
}

static void generator_close(Generator *g) {
    Buffer table[NUM_GENERATOR_BUFFERS];
    generator_table(g, &g->model, g->B, g->cache.capacity, g->prefill_rows, table);
    for (int i = 0; i < NUM_GENERATOR_BUFFERS; i++) free(*table[i].pointer);
    free(g->cache.numbers), free(g->cache.codes), free(g->cache.scales), free(g->length);
    model_free(&g->model);
    free(g);
}

static const Model *generator_model(const Generator *g) { return &g->model; }

// The model's own memory is host memory: nothing is copied.
static float *generator_host_weights(Generator *g) { return g->params; }
static void generator_load_weights(Generator *g) { (void)g; }

static void generator_prefill(Generator *g, int64_t b, const int32_t *ids, int64_t n) {
    if (n < 1 || n > g->prefill_rows || n > g->cache.capacity)
        die(EXIT_SYSTEM, "internal error: a prefill of %" PRId64 " tokens", n);
    g->length[b] = 0;
    forward(g, ids, b, 1, n, PREFILL);
}

static void generator_step(Generator *g, const int32_t *ids, int64_t n) {
    for (int64_t b = 0; b < g->B; b++)
        if (n < 1 || n > MAX_STEP_TOKENS || g->length[b] + n > g->cache.capacity)
            die(EXIT_SYSTEM, "internal error: a step of %" PRId64 " tokens after %" PRId64, n, g->length[b]);
    forward(g, ids, 0, g->B, n, STEP);
}

static void generator_sample(Generator *g, const SamplerOptions *s, uint64_t seed, int32_t *next) {
    int64_t V = g->model.config.vocab_size;
    #pragma omp parallel for
    for (int64_t b = 0; b < g->B; b++)
        next[b] = sample_token(g->logits + b * V, (int)V, s, generator_uniform(seed, b, g->length[b]));
}

static void generator_logits(Generator *g, float *logits) {
    memcpy(logits, g->logits, (size_t)(g->B * g->model.config.vocab_size) * sizeof *logits);
}

int main(int argc, char **argv) {
    static const GeneratorModel model = {
        .title = "generate_t6: text from a T6 checkpoint, on the CPU. Without flags it continues standard input, "
                 "by the model in out.",
        .pad = 1,
        .tolerance = 1e-5,      // test_t6.c's for golden files, which are checked in the same fp32
        .start = generator_start, .plan = generator_plan, .cache_bytes = generator_cache_bytes, .open = generator_open,
        .close = generator_close, .model = generator_model, .host_weights = generator_host_weights,
        .load_weights = generator_load_weights, .prefill = generator_prefill, .step = generator_step,
        .sample = generator_sample, .logits = generator_logits,
    };
    return generator_main(argc, argv, &model);
}
