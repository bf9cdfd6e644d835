// generate_t6.c: text from a T6 checkpoint on the CPU, through a cache of factors. The program around it is llmc/generator.h.
//
// This program is the reference for generating: the GPU's is checked against it. It includes the trainer and uses its operations. It
// reads from top to bottom:
//   the cache | FlashTPA decoding | memory | the model, prefill and steps | what the generating program needs
//
// Shapes are train_t6.c's: B sequences, C width, L layers, NH heads of HS numbers, D = NH*HS, F MLP width, V vocabulary, P width of a
// token's row of factors; RQ, RK, RV the numbers of vectors that q, k and v are made of (Heads in llmc/model.h). A step appends n tokens
// to each sequence, which makes N = B*n rows.
#define T6_NO_MAIN
#include "train_t6.c"

#include "llmc/fp8.h"
#include "llmc/generator.h"

// ---------------------------------------------------------------------------------------------------------------------
// The cache: of every token and layer the row of factors that k and v are made of, aK (NH, RK), bK (RK, HS), aV (NH, RV), bV (RV, HS), the
// bK rotated: (RK+RV)(NH+HS) numbers instead of MHA's 2 NH HS. Grouped heads have no a, so mha, gqa and mqa cache just their k and v.

enum { NUM_PARTS = 4 };     // aK, bK, aV, bV

typedef struct {
    CacheKind kind;
    int64_t L, B, capacity, W;          // W: numbers of a token and layer
    int64_t part[NUM_PARTS + 1];        // where each part starts in a row; the end
    float *numbers;                     // CACHE_NATIVE: (L, B, capacity, W)
    uint8_t *codes;                     // CACHE_FP8: (L, B, capacity, W) in e4m3
    float *scales;                      // CACHE_FP8: (L, B, capacity, NUM_PARTS), what the codes of a part count
    float value[256];                   // of each code
} Cache;

// Numbers of a token and layer: k and v come last in a row of factors.
static int64_t cache_width(const Model *m) { return m->P - m->k.a; }

// Slots that are not in use hold NaN: whoever reads one finds out.
static void cache_init(Cache *c, const Model *m, CacheKind kind, int64_t B, int64_t capacity) {
    *c = (Cache){.kind = kind, .L = m->config.n_layer, .B = B, .capacity = capacity, .W = cache_width(m)};
    int64_t start = m->k.a, part[] = {0, m->k.b - start, m->v.a - start, m->v.b - start, c->W};
    memcpy(c->part, part, sizeof part);
    size_t tokens = (size_t)(c->L * B * capacity);
    for (int i = 0; i < 256; i++) c->value[i] = e4m3_to_float((uint8_t)i);
    if (kind == CACHE_FP8) {
        c->codes = xmalloc(tokens * (size_t)c->W);
        memset(c->codes, 0x7F, tokens * (size_t)c->W);
        c->scales = xmalloc(tokens * NUM_PARTS * sizeof *c->scales);
        for (size_t i = 0; i < tokens * NUM_PARTS; i++) c->scales[i] = NAN;
    } else {
        c->numbers = xmalloc(tokens * (size_t)c->W * sizeof *c->numbers);
        for (size_t i = 0; i < tokens * (size_t)c->W; i++) c->numbers[i] = NAN;
    }
}

static size_t cache_slot(const Cache *c, int64_t l, int64_t b, int64_t t) { return ((size_t)l * (size_t)c->B + (size_t)b) * (size_t)c->capacity + (size_t)t; }

// Token t of sequence b in layer l becomes row (W).
static void cache_write(Cache *c, int64_t l, int64_t b, int64_t t, const float *row) {
    size_t slot = cache_slot(c, l, b, t);
    if (c->kind == CACHE_NATIVE) memcpy(c->numbers + slot * (size_t)c->W, row, (size_t)c->W * sizeof *row);
    else for (int i = 0; i < NUM_PARTS; i++)
        c->scales[slot * NUM_PARTS + (size_t)i] = e4m3_quantize(c->codes + slot * (size_t)c->W + c->part[i], row + c->part[i], c->part[i + 1] - c->part[i]);
}

// That row; buffer (W) is where it may be put.
static const float *cache_read(const Cache *c, int64_t l, int64_t b, int64_t t, float *buffer) {
    size_t slot = cache_slot(c, l, b, t);
    if (c->kind == CACHE_NATIVE) return c->numbers + slot * (size_t)c->W;
    const uint8_t *codes = c->codes + slot * (size_t)c->W;
    for (int i = 0; i < NUM_PARTS; i++) {
        float scale = c->scales[slot * NUM_PARTS + (size_t)i];
        for (int64_t j = c->part[i]; j < c->part[i + 1]; j++) buffer[j] = scale * c->value[codes[j]];
    }
    return buffer;
}

// ---------------------------------------------------------------------------------------------------------------------
// FlashTPA decoding: attention of a token straight from the cached factors, k and v never rebuilt. For every cached token,
// with s over the vectors of k, r over those of q, u over those of v:
//     P[s][r] = <bK[s], bQ[r]>                                                   the same for all heads
//     L[h]    = scale_q scale_k / sqrt(HS) sum_{s,r} aK[h][s] aQ[h][r] P[s][r]
//     p = exp(L[h] - largest so far);   o[h] += p sum_u aV[h][u] bV[u]           in the end y[h] = scale_v o[h] / sum of p
// Grouped heads are the same with one term: head h takes vector h / (NH / R) and counts it once.

enum { SPLITS = 16, MIN_SPLIT = 64 };       // a sequence is shared out in at most SPLITS parts of at least MIN_SPLIT tokens

// The vectors that head h is made of, first to first + count - 1, and their weights; a NULL: 1.
typedef struct { int64_t first, count; const float *a; } Terms;
static inline Terms head_terms(const Heads *heads, const float *row, int64_t h, int64_t NH) {
    if (heads->kind == HEADS_GROUPED) return (Terms){h / (NH / heads->R), 1, NULL};
    return (Terms){0, heads->R, row + heads->a + h * heads->R};
}

// Tokens begin to end - 1 of sequence b, for the query whose factors are fac (Pp). out: o (NH, HS), then the largest L (NH), then the sum of
// p (NH). scratch: P (RK, RQ), L (NH) and a row (W).
static void flashtpa_split(float *out, float *scratch, const float *fac, const Model *m, const Cache *c, int64_t l, int64_t b, int64_t begin, int64_t end) {
    const Heads *q = &m->q, *k = &m->k, *v = &m->v;
    int64_t NH = m->config.n_head, HS = m->config.head_dim, RQ = q->R, RK = k->R;
    float *largest = out + NH * HS, *sum = largest + NH, *P = scratch, *L = P + RK * RQ, *buffer = L + NH;
    float scale = (float)(q->scale * k->scale / sqrt((double)HS));
    int grouped = q->kind == HEADS_GROUPED && k->kind == HEADS_GROUPED;
    for (int64_t i = 0; i < NH * HS; i++) out[i] = 0;
    for (int64_t h = 0; h < NH; h++) largest[h] = -INFINITY, sum[h] = 0;
    for (int64_t t = begin; t < end; t++) {
        const float *row = cache_read(c, l, b, t, buffer) - k->a;       // so that offsets in a row of factors hold
        for (int64_t r = 0; r < RQ; r++)
            for (int64_t s = 0; s < RK; s++) {
                if (grouped && s != r / (RQ / RK)) continue;            // no head asks for it
                const float *bq = fac + q->b + r * HS, *bk = row + k->b + s * HS;
                float dot = 0;
                #pragma omp simd reduction(+:dot)
                for (int64_t j = 0; j < HS; j++) dot += bk[j] * bq[j];
                P[s * RQ + r] = dot;
            }
        for (int64_t h = 0; h < NH; h++) {
            Terms tq = head_terms(q, fac, h, NH), tk = head_terms(k, row, h, NH);
            float total = 0;
            for (int64_t s = 0; s < tk.count; s++) {
                float inner = 0;
                for (int64_t r = 0; r < tq.count; r++) inner += (tq.a ? tq.a[r] : 1) * P[(tk.first + s) * RQ + tq.first + r];
                total += (tk.a ? tk.a[s] : 1) * inner;
            }
            L[h] = scale * total;
        }
        for (int64_t h = 0; h < NH; h++) {
            float *o = out + h * HS;
            if (L[h] > largest[h]) {
                float shrink = exp(largest[h] - L[h]);
                for (int64_t j = 0; j < HS; j++) o[j] *= shrink;
                sum[h] *= shrink, largest[h] = L[h];
            }
            float p = exp(L[h] - largest[h]);
            Terms tv = head_terms(v, row, h, NH);
            for (int64_t u = 0; u < tv.count; u++) {
                const float *bv = row + v->b + (tv.first + u) * HS;
                float weight = p * (tv.a ? tv.a[u] : 1);
                for (int64_t j = 0; j < HS; j++) o[j] += weight * bv[j];
            }
            sum[h] += p;
        }
    }
}

// y (B, n, Dp) for queries with factors fac (B, n, Pp), query i of sequence b seeing its tokens 0 to length[b] + i, itself the last. Where a
// sequence is split depends on its length alone, so y has the same bits with any number of threads, of sequences and of queries.
// partial (B, SPLITS, NH, HS + 2), scratch (threads, scratch_size)
static void flashtpa_decode(float *y, float *partial, float *scratch, int64_t scratch_size, const float *fac, const Model *m, const Cache *c, int64_t l,
                            const int64_t *length, int64_t B, int64_t n) {
    int64_t NH = m->config.n_head, HS = m->config.head_dim, size = NH * (HS + 2);
    for (int64_t i = 0; i < n; i++) {
        #pragma omp parallel for collapse(2) schedule(dynamic)
        for (int64_t b = 0; b < B; b++)
            for (int64_t split = 0; split < SPLITS; split++) {
                int64_t tokens = length[b] + i + 1, part = (tokens - 1) / SPLITS + 1 > MIN_SPLIT ? (tokens - 1) / SPLITS + 1 : MIN_SPLIT;
                int64_t begin = split * part, end = begin + part < tokens ? begin + part : tokens;
                flashtpa_split(partial + (b * SPLITS + split) * size, scratch + omp_get_thread_num() * scratch_size, fac + (b * n + i) * m->Pp, m, c, l, b, begin, end);
            }
        #pragma omp parallel for collapse(2)
        for (int64_t b = 0; b < B; b++)
            for (int64_t h = 0; h < NH; h++) {
                float *out = y + (b * n + i) * m->Dp + h * HS, largest = -INFINITY, sum = 0;
                const float *parts = partial + b * SPLITS * size;
                for (int64_t j = 0; j < HS; j++) out[j] = 0;
                for (int64_t split = 0; split < SPLITS; split++) largest = fmax(largest, parts[split * size + NH * HS + h]);
                for (int64_t split = 0; split < SPLITS; split++) {
                    const float *part = parts + split * size;
                    float weight = exp(part[NH * HS + h] - largest);        // 0 where the split has no tokens
                    for (int64_t j = 0; j < HS; j++) out[j] += weight * part[h * HS + j];
                    sum += weight * part[NH * HS + NH + h];
                }
                for (int64_t j = 0; j < HS; j++) out[j] *= (float)m->v.scale / sum;
            }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory

struct Generator {
    Model model;
    Cache cache;
    int64_t B, rows, prefill_rows;      // rows: a step's or a prefill's, the larger
    int64_t *length;                    // (B) tokens of each sequence
    float *params;                      // (num_stored)
    // one row a token
    float *x, *n, *rstd;                // (rows, C), (rows, C), (rows)
    float *fac, *y, *u, *s;             // (rows, Pp), (rows, Dp), (rows, 2 Fp), (rows, Fp)
    // of prefill
    float *q, *k, *v;                   // (prefill_rows, D)
    float *lse, *attention_scratch;     // (NH, prefill_rows), (threads, 2, QUERIES, prefill_rows)
    // of steps
    float *partial, *decode_scratch;    // (B, SPLITS, NH, HS + 2), (threads, decode_scratch_size)
    int64_t decode_scratch_size;
    // of the last tokens
    float *last, *logits;               // (B, C), (B, V)
    float *rope;                        // (capacity, HS)
};

enum { NUM_GENERATOR_BUFFERS = 18 };

// The table behind Generator's buffers: where each pointer is and how much it needs.
static void generator_table(Generator *g, const Model *m, int64_t B, int64_t capacity, int64_t longest_prefill, Buffer out[NUM_GENERATOR_BUFFERS]) {
    const Config *c = &m->config;
    int64_t T = longest_prefill, rows = T > B * MAX_STEP_TOKENS ? T : B * MAX_STEP_TOKENS, threads = omp_get_max_threads(), NH = c->n_head, HS = c->head_dim;
    g->rows = rows, g->prefill_rows = T, g->decode_scratch_size = m->k.R * m->q.R + NH + cache_width(m);
    const struct { float **pointer; int64_t elements; } table[NUM_GENERATOR_BUFFERS] = {
        {&g->params, (int64_t)m->num_stored}, {&g->x, rows * c->n_embd}, {&g->n, rows * c->n_embd}, {&g->rstd, rows}, {&g->fac, rows * m->Pp},
        {&g->y, rows * m->Dp}, {&g->u, rows * 2 * m->Fp}, {&g->s, rows * m->Fp}, {&g->q, T * m->D}, {&g->k, T * m->D}, {&g->v, T * m->D},
        {&g->lse, NH * T}, {&g->attention_scratch, threads * 2 * QUERIES * T}, {&g->partial, B * SPLITS * NH * (HS + 2)},
        {&g->decode_scratch, threads * g->decode_scratch_size}, {&g->last, B * c->n_embd}, {&g->logits, B * c->vocab_size}, {&g->rope, capacity * HS}};
    for (int i = 0; i < NUM_GENERATOR_BUFFERS; i++) out[i] = (Buffer){(void **)table[i].pointer, (size_t)table[i].elements, sizeof(float)};
}

// ---------------------------------------------------------------------------------------------------------------------
// The model

// out (N, OC) = inp (N, IC) w^T, or += where add: linear_forward for the few rows of a step. Reading the weights is the work then; and unlike
// a library's product, these sums are the same whatever N is: a sequence gets the same text alone and among others.
static void linear_step(float *out, const float *inp, const float *w, int64_t N, int64_t IC, int64_t OC, int add) {
    #pragma omp parallel for
    for (int64_t o = 0; o < OC; o++)
        for (int64_t n = 0; n < N; n++) {
            const float *a = inp + n * IC, *b = w + o * IC;
            float dot = 0;
            #pragma omp simd reduction(+:dot)
            for (int64_t i = 0; i < IC; i++) dot += a[i] * b[i];
            out[n * OC + o] = add ? out[n * OC + o] + dot : dot;
        }
}

// PREFILL: a whole sequence by the trainer's operations. STEP: n tokens more, attention from the cache.
typedef enum { PREFILL, STEP } Pass;

// Appends n tokens to each of the sequences first to first + B - 1, ids (B, n): their factors go to the cache, and the logits of what
// follows the last to their rows of g->logits. PREFILL: B = 1, and the sequence is empty.
static void forward(Generator *g, const int32_t *ids, int64_t first, int64_t B, int64_t n, Pass pass) {
    const Model *m = &g->model;
    const Config *c = &m->config;
    int64_t N = B * n, C = c->n_embd, NH = c->n_head, HS = c->head_dim, Pp = m->Pp, Dp = m->Dp, Fp = m->Fp;
    void (*linear)(float *, const float *, const float *, int64_t, int64_t, int64_t, int) = pass == PREFILL ? linear_forward : linear_step;
    encoder_forward(g->x, ids, g->params + m->wte, N, C);
    for (int64_t l = 0; l < c->n_layer; l++) {
        const float *w = g->params + m->layers + (size_t)l * m->layer_stride;

        rmsnorm_forward(g->n, g->rstd, g->x, N, C, c->rms_eps);
        linear(g->fac, g->n, w + m->wqkv, N, C, Pp, 0);
        for (int64_t b = 0; b < B; b++) {
            float *fac = g->fac + b * n * Pp, *table = g->rope + g->length[first + b] * HS;
            rope(fac, &m->q, table, 1, n, HS, Pp, ROTATE);
            rope(fac, &m->k, table, 1, n, HS, Pp, ROTATE);
            for (int64_t i = 0; i < n; i++) cache_write(&g->cache, l, first + b, g->length[first + b] + i, fac + i * Pp + m->k.a);
        }
        if (pass == PREFILL) {
            heads_forward(g->q, g->fac, &m->q, n, NH, HS, Pp);
            heads_forward(g->k, g->fac, &m->k, n, NH, HS, Pp);
            heads_forward(g->v, g->fac, &m->v, n, NH, HS, Pp);
            attention_forward(g->y, g->lse, g->attention_scratch, g->q, g->k, g->v, 1, n, NH, HS, Dp);
        } else flashtpa_decode(g->y, g->partial, g->decode_scratch, g->decode_scratch_size, g->fac, m, &g->cache, l, g->length, B, n);
        linear(g->x, g->y, w + m->wo, N, Dp, C, 1);

        rmsnorm_forward(g->n, g->rstd, g->x, N, C, c->rms_eps);
        linear(g->u, g->n, w + m->w12, N, C, 2 * Fp, 0);
        swiglu_forward(g->s, g->u, N, Fp);
        linear(g->x, g->s, w + m->w3, N, Fp, C, 1);
    }
    for (int64_t b = 0; b < B; b++) {
        rmsnorm_forward(g->last + b * C, g->rstd, g->x + (b * n + n - 1) * C, 1, C, c->rms_eps);
        g->length[first + b] += n;
    }
    linear_step(g->logits + first * c->vocab_size, g->last, g->params + m->wte, B, C, c->vocab_size, 0);
}

// =====================================================================================================================
// What the generating program (llmc/generator.h) needs

int generator_pad(void) { return trainer_pad(); }
double generator_tolerance(void) { return 1e-5; }       // test_t6.c's for golden files, which are checked in the same fp32

void generator_start(GenerateOptions *o) { trainer_start(&(TrainOptions){.threads = o->threads}); }

double generator_cache_bytes(const GenerateOptions *o, const Model *m, int64_t tokens) {
    double numbers = (double)cache_width(m), bytes = o->cache_kind == CACHE_FP8 ? numbers + NUM_PARTS * sizeof(float) : numbers * sizeof(float);
    return (double)tokens * (double)m->config.n_layer * bytes;
}

void generator_plan(const GenerateOptions *o, const Model *m, int64_t B, int64_t capacity) {
    Generator unused;
    Buffer table[NUM_GENERATOR_BUFFERS];
    generator_table(&unused, m, B, capacity, o->longest_prefill, table);
    double weights = (double)m->num_stored * sizeof(float), cache = (double)B * generator_cache_bytes(o, m, capacity), work = -weights;
    for (int i = 0; i < NUM_GENERATOR_BUFFERS; i++) work += (double)table[i].elements * (double)table[i].bytes;
    double need = weights + cache + work, have = available_memory_bytes(), MiB = 0x1p20, GiB = 0x1p30;
    if (o->stats || o->plan)
        fprintf(stderr, "memory: weights %.1f + cache %.1f + activations %.1f = %.1f MiB of %.0f available\n", weights / MiB, cache / MiB, work / MiB,
                need / MiB, have / MiB);
    if (need > have)
        die(EXIT_INPUT, "this run needs %.1f GiB of memory (cache %.1f) and %.1f are available: lower --max-tokens (-g), or give fewer or shorter prompts",
            need / GiB, cache / GiB, have / GiB);
}

Generator *generator_open(const GenerateOptions *o, const Config *config, int64_t B, int64_t capacity) {
    Generator *g = xcalloc(1, sizeof *g);
    Buffer table[NUM_GENERATOR_BUFFERS];
    model_init(&g->model, config, generator_pad());
    generator_table(g, &g->model, B, capacity, o->longest_prefill, table);
    for (int i = 0; i < NUM_GENERATOR_BUFFERS; i++) *table[i].pointer = xcalloc(table[i].elements, table[i].bytes);
    cache_init(&g->cache, &g->model, o->cache_kind, B, capacity);
    rope_table(g->rope, capacity, config->head_dim, config->rope_base);
    g->length = xcalloc((size_t)B, sizeof *g->length);
    g->B = B;
    return g;
}

void generator_close(Generator *g) {
    Buffer table[NUM_GENERATOR_BUFFERS];
    generator_table(g, &g->model, g->B, g->cache.capacity, g->prefill_rows, table);
    for (int i = 0; i < NUM_GENERATOR_BUFFERS; i++) free(*table[i].pointer);
    free(g->cache.numbers), free(g->cache.codes), free(g->cache.scales), free(g->length);
    model_free(&g->model);
    free(g);
}

const Model *generator_model(Generator *g) { return &g->model; }

// The model's own memory is host memory: there is nothing to copy.
float *generator_host_weights(Generator *g) { return g->params; }
void generator_take_weights(Generator *g) { (void)g; }

void generator_prefill(Generator *g, int64_t b, const int32_t *ids, int64_t n) {
    if (n < 1 || n > g->prefill_rows || n > g->cache.capacity) die(EXIT_SYSTEM, "internal error: a prefill of %" PRId64 " tokens", n);
    g->length[b] = 0;
    forward(g, ids, b, 1, n, PREFILL);
}

void generator_step(Generator *g, const int32_t *ids, int64_t n) {
    for (int64_t b = 0; b < g->B; b++)
        if (n < 1 || n > MAX_STEP_TOKENS || g->length[b] + n > g->cache.capacity)
            die(EXIT_SYSTEM, "internal error: a step of %" PRId64 " tokens after %" PRId64, n, g->length[b]);
    forward(g, ids, 0, g->B, n, STEP);
}

void generator_sample(Generator *g, const SamplerOptions *s, uint64_t seed, int32_t *next) {
    int64_t V = g->model.config.vocab_size;
    #pragma omp parallel for
    for (int64_t b = 0; b < g->B; b++) next[b] = sample_token(g->logits + b * V, (int)V, s, generator_uniform(seed, b, g->length[b]));
}

void generator_logits(Generator *g, float *logits) {
    memcpy(logits, g->logits, (size_t)(g->B * g->model.config.vocab_size) * sizeof *logits);
}

int main(int argc, char **argv) {
    return generator_main(argc, argv, "generate_t6: text from a T6 checkpoint, on the CPU. Without flags: from out, after the prompt on standard input.");
}
