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
// The cache: what k and v of each token are made of, in every layer. For plain TPA that is a part of its factor row:
//     |   aK    |    bK    |   aV    |    bV    |      W = (RK + RV) (NH + HS) numbers instead of MHA's 2 NH HS
//     | NH x RK | RK x HSK | NH x RV | RV x HSV |      bK is rotated
// Grouped heads have no a, so mha, gqa and mqa cache exactly their k and v. Of a variant, the cache has no constants,
// of a shared b one copy, not rotated, and of third order rotated b and c; with qk_norm and constant a also the norms
// of k. cache_expand makes that part of the factor row from it. mla caches the normed latent of k and v and the rotated
// part of k.

// fp8 scales each part of a row (model_cache_parts) apart.
typedef struct {
    CacheKind kind;
    const Model *m;
    int64_t L, B, capacity, W;          // capacity: most tokens per sequence
    int64_t part[NUM_CACHE_PARTS + 1];  // where each part starts in a row, and the end
    int is_factor_row;                  // a row is the part of the factor row itself
    float *numbers;                     // CACHE_NATIVE: (L, B, capacity, W)
    uint8_t *codes;                     // CACHE_FP8: (L, B, capacity, W) in e4m3
    float *scales;                      // CACHE_FP8: (L, B, capacity, NUM_CACHE_PARTS)
    float value[256];                   // of each code, to be multiplied by the scale of its part
} Cache;

// Slots that are not in use hold NaN, so that reading one by mistake shows in the logits.
static void cache_init(Cache *cache, const Model *m, CacheKind kind, int64_t B, int64_t capacity) {
    *cache = (Cache){.kind = kind, .m = m, .L = m->config.n_layer, .B = B, .capacity = capacity,
                     .W = model_cache_width(m), .is_factor_row = m->is_projected || m->config.attn == ATTN_MLA};
    model_cache_parts(m, cache->part);
    size_t tokens = (size_t)(cache->L * B * capacity);
    for (int i = 0; i < 256; i++) cache->value[i] = e4m3_to_float((uint8_t)i);
    if (kind == CACHE_FP8) {
        cache->codes = xmalloc(tokens * (size_t)cache->W);
        memset(cache->codes, 0x7F, tokens * (size_t)cache->W);
        cache->scales = xmalloc(tokens * NUM_CACHE_PARTS * sizeof *cache->scales);
        for (size_t i = 0; i < tokens * NUM_CACHE_PARTS; i++) cache->scales[i] = NAN;
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
    else for (int i = 0; i < NUM_CACHE_PARTS; i++) {
        int64_t start = cache->part[i], n = cache->part[i + 1] - start;
        uint8_t *codes = cache->codes + slot * cache->W + start;
        cache->scales[slot * NUM_CACHE_PARTS + i] = e4m3_quantize(codes, row + start, n);
    }
}

// The cache row (W) of a variant's token: from its factor row, whose a has the norms (without a, its b), and from its
// projected row, which follows that of the token before where t > 0. table: that position's row of rope_table; norms
// (NH) of k.
static void cache_row(float *row, const Cache *cache, const float *fac, const float *proj, const float *layer,
                      const float *table, int64_t t, const float *norms) {
    const Model *m = cache->m;
    for (int v = 0; v < 2; v++) {
        const Heads *h = v ? &m->v : &m->k, *b_of = m->config.share_kv_b ? &m->v : h;   // shared: not rotated
        const int64_t *part = cache->part + (v ? PART_AV : PART_AK);
        memcpy(row + part[0], fac + h->a, (size_t)(part[1] - part[0]) * sizeof *row);
        if (h->kind == HEADS_GROUPED) memcpy(row + part[1], fac + h->b, (size_t)(h->R * h->HS) * sizeof *row);
        for (int64_t r = 0; r < h->R && part[2] > part[1] && h->kind == HEADS_FACTORED; r++)
            token_factor(row + part[1] + r * h->HB, proj, layer, b_of, table - t * b_of->HSR, t, r, m->Pp);
        memcpy(row + part[2], proj + h->from_c, (size_t)(part[3] - part[2]) * sizeof *row);
    }
    memcpy(row + cache->part[PART_NORMS], norms, (size_t)(cache->W - cache->part[PART_NORMS]) * sizeof *row);
}

// The columns of k and v of the factor row, from k.a on, of a variant's cache row at a position. layer: its weights.
static void cache_expand(float *out, const Cache *cache, const float *row, const float *layer, const float *table) {
    const Model *m = cache->m;
    int64_t NH = m->config.n_head;
    const float *norms = row + cache->part[PART_NORMS];
    for (int v = 0; v < 2; v++) {
        const Heads *h = v ? &m->v : &m->k, *k = &m->k;
        const int64_t *own = cache->part + (v ? PART_AV : PART_AK);
        const int64_t *of_b = m->config.share_kv_b ? cache->part + PART_AK : own;
        float *a = out + h->a - k->a, *b = out + h->b - k->a;
        const float *from_b = h->from_b == NOT_PROJECTED ? layer + h->const_b : row + of_b[1];
        const float *from_a = h->from_a == NOT_PROJECTED ? layer + h->const_a : row + own[0];
        if (h->kind == HEADS_FACTORED) memcpy(a, from_a, (size_t)(NH * h->R) * sizeof *a);
        for (int64_t i = 0; !v && cache->part[NUM_CACHE_PARTS] > cache->part[PART_NORMS] && i < NH * h->R; i++)
            a[i] *= norms[i / h->R];
        for (int64_t r = 0; r < h->R; r++, b += h->HS) {
            memcpy(b, from_b + r * h->HB, (size_t)h->HB * sizeof *b);
            if (m->config.share_kv_b || h->from_b == NOT_PROJECTED) rotate(b, table, h->HB, h->HSR, ROTATE);
            for (int64_t j = h->HS / h->HB - 1; j >= 0 && h->from_c != NOT_PROJECTED; j--)
                for (int64_t i = 0; i < h->HB; i++)
                    b[j * h->HB + i] = b[i] * row[of_b[2] + r * (h->HS / h->HB) + j];
        }
    }
}

// The part of the factor row of that token which has k and v (mla: its cache row): in the cache itself, or in buffer,
// which has room for it and for W numbers after it. layer: the layer's weights, rope: the table of k.
static const float *cache_read(const Cache *cache, int64_t l, int64_t b, int64_t t, const float *layer,
                               const float *rope, float *buffer) {
    int64_t slot = cache_slot(cache, l, b, t), expanded = cache->is_factor_row ? 0 : cache->m->PF - cache->m->k.a;
    const float *row = cache->numbers + slot * cache->W;
    if (cache->kind == CACHE_FP8) {
        const uint8_t *codes = cache->codes + slot * cache->W;
        float *decoded = buffer + expanded;
        for (int i = 0; i < NUM_CACHE_PARTS; i++) {
            float scale = cache->scales[slot * NUM_CACHE_PARTS + i];
            for (int64_t j = cache->part[i]; j < cache->part[i + 1]; j++) decoded[j] = scale * cache->value[codes[j]];
        }
        row = decoded;
    }
    if (cache->is_factor_row) return row;
    cache_expand(buffer, cache, row, layer, rope + t * cache->m->k.HSR);
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

// What decoding sees of a model. mla's heads are absorbed into its latent: q' = [Wk^T q | rotated part of q], k = the
// cache row, v = its latent, and y = Wv y'.
typedef struct {
    Heads q, k, v;          // k.a: the column of the factor row where a cached row starts
    int64_t NH, HSK, HSV;
    int64_t ldq, ldy;       // from one query's factor row, or output, to the next
    double scale;           // of the softmax
} Decoding;

static Decoding decoding_of(const Model *m) {
    Decoding d = {m->q, m->k, m->v, m->config.n_head, m->HSK, m->HSV, m->is_projected ? m->Pp : m->PF, m->Dp, m->scale};
    if (m->config.attn != ATTN_MLA) return d;
    int64_t W = model_cache_width(m);
    Heads vectors = {.kind = HEADS_GROUPED, .R = 1, .HS = (int)W, .scale = 1};
    d.q = d.k = d.v = vectors;
    d.q.R = (int)d.NH, d.v.HS = (int)m->config.kv_lora;
    d.HSK = W, d.HSV = d.v.HS, d.ldq = d.NH * W, d.ldy = d.NH * d.HSV;
    return d;
}

// The vectors that head h is made of, first to first + count - 1, and their weights a (count). a NULL: all are 1.
typedef struct { int64_t first, count; const float *a; } Terms;
static inline Terms head_terms(const Heads *heads, const float *row, int64_t h, int64_t NH) {
    if (heads->kind == HEADS_GROUPED) return (Terms){h / (NH / heads->R), 1, NULL};
    return (Terms){0, heads->R, row + heads->a + h * heads->R};
}

// Tokens begin to end - 1 of sequence b, for the query with factor row fac. out: acc (NH, HSV), the largest logits
// (NH), the sums of p (NH). scratch: dot (RK, RQ), logit (NH) and what cache_read needs. layer: the layer's weights.
static void flashtpa_split(float *out, float *scratch, const float *fac, const Decoding *d, const Cache *cache,
                           const float *layer, const float *rope, int64_t l, int64_t b, int64_t begin, int64_t end) {
    const Heads *q = &d->q, *k = &d->k, *v = &d->v;
    int64_t NH = d->NH, HSK = d->HSK, HSV = d->HSV, RQ = q->R, RK = k->R;
    float *largest = out + NH * HSV, *sum = largest + NH, *dot = scratch, *logit = dot + RK * RQ, *buffer = logit + NH;
    float scale = (float)(q->scale * k->scale * d->scale);
    int grouped = q->kind == HEADS_GROUPED && k->kind == HEADS_GROUPED;
    for (int64_t i = 0; i < NH * HSV; i++) out[i] = 0;
    for (int64_t h = 0; h < NH; h++) largest[h] = -INFINITY, sum[h] = 0;
    for (int64_t t = begin; t < end; t++) {
        const float *row = cache_read(cache, l, b, t, layer, rope, buffer) - k->a;     // columns of the factor row
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

// y (B, n, ldy) of queries with factor rows fac (B, n, ldq). Query i of sequence b sees its tokens 0 to length[b] + i,
// the last of which is its own. Splits depend on a sequence's length alone, so y has the same bits with any number of
// threads, sequences and queries. partial (B, SPLITS, NH, HSV + 2), scratch (threads, scratch_size)
static void flashtpa_decode(float *y, float *partial, float *scratch, int64_t scratch_size, const float *fac,
                            const Decoding *d, const Cache *cache, const float *layer, const float *rope, int64_t l,
                            const int64_t *length, int64_t B, int64_t n) {
    int64_t NH = d->NH, HSV = d->HSV, size = NH * (HSV + 2);
    for (int64_t i = 0; i < n; i++) {
        #pragma omp parallel for collapse(2) schedule(dynamic)
        for (int64_t b = 0; b < B; b++)
            for (int64_t split = 0; split < SPLITS; split++) {
                int64_t tokens = length[b] + i + 1, part = (tokens - 1) / SPLITS + 1;
                if (part < MIN_SPLIT) part = MIN_SPLIT;
                int64_t begin = split * part, end = begin + part < tokens ? begin + part : tokens;
                flashtpa_split(partial + (b * SPLITS + split) * size, scratch + omp_get_thread_num() * scratch_size,
                               fac + (b * n + i) * d->ldq, d, cache, layer, rope, l, b, begin, end);
            }
        #pragma omp parallel for collapse(2)
        for (int64_t b = 0; b < B; b++)
            for (int64_t h = 0; h < NH; h++) {
                float *out = y + (b * n + i) * d->ldy + h * HSV, largest = -INFINITY, sum = 0;
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
                for (int64_t j = 0; j < HSV; j++) out[j] *= (float)d->v.scale / sum;
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
    float *proj, *y, *u, *s;            // (rows, Pp), (rows, Dp), (rows, 2 Fp), (rows, Fp)
    float *fac;                         // (rows, PF)               factor rows of variants
    float *window, *window_fac;         // (rows + 1, Pp), (rows + 1, PF)   kv_shift: a sequence's rows after the last
    float *before;                      // (L, B, Pp)               kv_shift: the last projected row of each sequence
    float *norms, *row;                 // (NH), (W)                of one token
    // mla
    float *latq, *latkv, *kv;           // (rows, q_lora), (rows, kv_lora), (prefill_rows, NH, 2 HSV)
    float *heads;                       // (rows, NH, HSK)          q
    float *absorbed, *y_latent;         // (rows, NH, W), (rows, NH, kv_lora)
    // prefill
    float *q, *k, *v;                   // (prefill_rows, NH, HSK) twice, (prefill_rows, NH, HSV)
    float *lse, *attention_scratch;     // (NH, prefill_rows), (attention_scratch_size)
    // steps
    float *partial, *decode_scratch;    // (B, SPLITS, NH, HSV + 2), (threads, decode_scratch_size)
    int64_t decode_scratch_size;
    // last tokens
    float *last, *logits;               // (B, C), (B, V)
    float *rope_q, *rope_k;             // (capacity, HSR) of q and of k
    Decoding decoding;
};

enum { NUM_GENERATOR_BUFFERS = 31 };

// The table of Generator's buffers: each pointer with its size. Sets g->rows, prefill_rows and decode_scratch_size.
static void generator_table(Generator *g, const Model *m, int64_t B, int64_t capacity, int64_t longest_prefill,
                            Buffer out[NUM_GENERATOR_BUFFERS]) {
    const Config *c = &m->config;
    int64_t T = longest_prefill, steps = B * MAX_STEP_TOKENS, rows = T > steps ? T : steps,
        threads = omp_get_max_threads();
    int64_t C = c->n_embd, NH = c->n_head, QK = NH * m->HSK;
    int64_t latent = c->attn == ATTN_MLA, W = model_cache_width(m), shifted = c->kv_shift ? rows + 1 : 0;
    int64_t fac = m->is_projected || latent ? 0 : m->PF, lr = latent ? rows : 0;
    Decoding d = decoding_of(m);
    g->rows = rows, g->prefill_rows = T, g->decode_scratch_size = d.k.R * d.q.R + NH + W + fac;
    const Buffer table[NUM_GENERATOR_BUFFERS] = {
        {&g->params, (int64_t)m->num_stored}, {&g->x, rows * C}, {&g->n, rows * C}, {&g->rstd, rows},
        {&g->proj, rows * m->Pp}, {&g->fac, rows * fac}, {&g->window, shifted * m->Pp}, {&g->window_fac, shifted * fac},
        {&g->before, c->kv_shift ? c->n_layer * B * m->Pp : 0}, {&g->norms, NH}, {&g->row, W},
        {&g->latq, lr * c->q_lora}, {&g->latkv, lr * c->kv_lora}, {&g->kv, latent ? T * 2 * m->D : 0},
        {&g->heads, lr * QK}, {&g->absorbed, lr * NH * W}, {&g->y_latent, lr * NH * c->kv_lora},
        {&g->y, rows * m->Dp}, {&g->u, rows * 2 * m->Fp}, {&g->s, rows * m->Fp},
        {&g->q, T * QK}, {&g->k, T * QK}, {&g->v, T * m->D}, {&g->lse, NH * T},
        {&g->attention_scratch, attention_scratch_size(T)}, {&g->partial, B * SPLITS * NH * (d.HSV + 2)},
        {&g->decode_scratch, threads * g->decode_scratch_size}, {&g->last, B * C}, {&g->logits, B * c->vocab_size},
        {&g->rope_q, capacity * m->q.HSR}, {&g->rope_k, capacity * m->k.HSR},
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

// qk_norm: a head's norm is a number that its a takes, or without a its vector: head = fac's / rms(head). norms (NH):
// those numbers.
static void fold_norms(float *norms, float *fac, const Heads *h, int64_t NH, double eps) {
    int grouped = h->kind == HEADS_GROUPED;
    for (int64_t i = 0; i < (grouped ? h->R : NH); i++) {
        float *a = fac + h->a + i * h->R, *b = fac + h->b + (grouped ? i * h->HS : 0);
        double sum = 0;
        for (int64_t j = 0; j < h->HS; j++) {
            float number = grouped ? b[j] : 0;
            for (int64_t r = 0; r < h->R && !grouped; r++) number += (float)h->scale * a[r] * b[r * h->HS + j];
            sum += (double)number * number;
        }
        norms[i] = (float)(1 / sqrt(sum / h->HS + eps));
        for (int64_t r = 0; r < h->R && !grouped; r++) a[r] *= norms[i];
        for (int64_t j = 0; j < h->HS && grouped; j++) b[j] *= norms[i];
    }
}

// The same for q and k of a factor row. norms (NH): those of k.
static void fold_qk_norms(float *norms, float *fac, const Model *m) {
    fold_norms(norms, fac, &m->q, m->config.n_head, m->config.rms_eps);
    fold_norms(norms, fac, &m->k, m->config.n_head, m->config.rms_eps);
}

// A variant's factor rows of n tokens of one sequence from position on, fac (n, PF), from proj (n, Pp), and their cache
// rows. before (Pp): kv_shift's last projected row of the sequence, which moves on.
static void variant_rows(Generator *g, float *fac, const float *proj, float *before, int64_t l, int64_t b, int64_t n,
                         int64_t position) {
    const Model *m = &g->model;
    const Config *c = &m->config;
    const float *w = g->params + m->layers + (size_t)l * m->layer_stride;
    int64_t Pp = m->Pp, PF = m->PF, NH = c->n_head, first = c->kv_shift && position > 0;    // rows before the first
    const Heads *of[] = {&m->q, &m->k, &m->v};
    float *out = fac;
    if (c->kv_shift) {
        memcpy(g->window, before, (size_t)Pp * sizeof *before);
        memcpy(g->window + first * Pp, proj, (size_t)(n * Pp) * sizeof *proj);
        memcpy(before, proj + (n - 1) * Pp, (size_t)Pp * sizeof *before);
        proj = g->window, out = g->window_fac;
    }
    for (int i = 0; i < 3; i++) {
        const float *table = (i == 0 ? g->rope_q : g->rope_k) + (position - first) * of[i]->HSR;
        factors_forward(out, proj, w, of[i], c->head_act, table, 1, first + n, NH, Pp, PF);
    }
    if (c->kv_shift) memcpy(fac, out + first * PF, (size_t)(n * PF) * sizeof *fac);
    for (int64_t i = 0; i < n; i++) {
        if (c->qk_norm) fold_qk_norms(g->norms, fac + i * PF, m);
        cache_row(g->row, &g->cache, fac + i * PF, proj + (first + i) * Pp, w,
                  g->rope_k + (position + i) * m->k.HSR, first + i, g->norms);
        cache_write(&g->cache, l, b, position + i, g->row);
    }
}

// mla: q of the tokens, the latents and rotated parts into the cache; in a prefill also k and v; in a step g->absorbed.
static void latent_decode(Generator *g, int64_t l, int64_t first, int64_t B, int64_t n, Pass pass) {
    const Model *m = &g->model;
    const Config *c = &m->config;
    const float *w = g->params + m->layers + (size_t)l * m->layer_stride;
    int64_t N = B * n, NH = c->n_head, HSK = m->HSK, HSV = m->HSV, HSR = m->HSR, QK = NH * HSK, Pp = m->Pp;
    int64_t q = c->q_lora, kv = c->kv_lora, W = kv + HSR;
    gain_forward(g->latq, g->rstd, g->proj, Pp, w + m->q_gain, N, q, c->rms_eps);
    gain_forward(g->latkv, g->rstd, g->proj + q, Pp, w + m->kv_gain, N, kv, c->rms_eps);
    linear(pass, g->heads, g->latq, w + m->wqb, N, q, QK, OVERWRITE);
    for (int64_t b = 0; b < B; b++) {
        int64_t position = g->length[first + b];
        rope(g->heads + b * n * QK, &m->q, g->rope_q + position * HSR, 1, n, QK, ROTATE);
        for (int64_t i = 0; i < n; i++) {
            memcpy(g->row, g->latkv + (b * n + i) * kv, (size_t)kv * sizeof *g->row);
            memcpy(g->row + kv, g->proj + (b * n + i) * Pp + q + kv, (size_t)HSR * sizeof *g->row);
            rotate(g->row + kv, g->rope_k + (position + i) * HSR, HSR, HSR, ROTATE);
            cache_write(&g->cache, l, first + b, position + i, g->row);
        }
    }
    if (pass == PREFILL) {
        memcpy(g->q, g->heads, (size_t)(n * QK) * sizeof *g->q);
        linear_forward(g->kv, g->latkv, w + m->wkvb, n, kv, 2 * m->D, OVERWRITE);
        latent_heads_forward(g->k, g->v, g->kv, g->proj + q + kv, Pp, g->rope_k, 1, n, NH, HSV, HSR);
        return;
    }
    #pragma omp parallel for collapse(2)
    for (int64_t i = 0; i < N; i++)
        for (int64_t h = 0; h < NH; h++) {          // q' = [q Wk | rotated part of q]
            const float *head = g->heads + i * QK + h * HSK, *wk = w + m->wkvb + h * 2 * HSV * kv;
            float *out = g->absorbed + (i * NH + h) * W;
            memset(out, 0, (size_t)kv * sizeof *out);
            for (int64_t j = 0; j < HSV; j++)
                for (int64_t k = 0; k < kv; k++) out[k] += head[j] * wk[j * kv + k];
            memcpy(out + kv, head + HSV, (size_t)HSR * sizeof *out);
        }
}

// y = Wv y', for the N tokens of a step.
static void latent_output(Generator *g, const float *w, int64_t N) {
    const Model *m = &g->model;
    int64_t NH = m->config.n_head, HSV = m->HSV, kv = m->config.kv_lora;
    #pragma omp parallel for collapse(2)
    for (int64_t i = 0; i < N; i++)
        for (int64_t h = 0; h < NH; h++)
            for (int64_t j = 0; j < HSV; j++) {
                const float *wv = w + m->wkvb + ((h * 2 + 1) * HSV + j) * kv, *in = g->y_latent + (i * NH + h) * kv;
                float dot = 0;
                #pragma omp simd reduction(+:dot)
                for (int64_t k = 0; k < kv; k++) dot += wv[k] * in[k];
                g->y[i * m->Dp + h * HSV + j] = dot;
            }
}

// qkv_forward for decoding: the factor rows of layer l from its normed input g->n, and what the cache needs of them;
// in a prefill also g->q, k and v. For sequences first to first + B - 1, n tokens each. Returns the queries' rows.
static const float *qkv_decode(Generator *g, int64_t l, int64_t first, int64_t B, int64_t n, Pass pass) {
    const Model *m = &g->model;
    const Config *c = &m->config;
    int64_t N = B * n, NH = c->n_head, Pp = m->Pp, ld = m->is_projected ? Pp : m->PF;
    const float *w = g->params + m->layers + (size_t)l * m->layer_stride;
    float *fac = m->is_projected ? g->proj : g->fac;
    linear(pass, g->proj, g->n, w + m->wqkv, N, c->n_embd, Pp, OVERWRITE);      // [aQ bQ aK bK aV bV] = n Wqkv^T
    if (c->attn == ATTN_MLA) {
        latent_decode(g, l, first, B, n, pass);
        return g->absorbed;
    }
    for (int64_t b = 0; b < B; b++) {
        int64_t position = g->length[first + b];
        float *rows = fac + b * n * ld, *proj = g->proj + b * n * Pp;
        if (!m->is_projected) {
            variant_rows(g, rows, proj, g->before + (l * g->B + first + b) * (c->kv_shift ? Pp : 0), l, first + b, n,
                         position);
            continue;
        }
        rope(rows, &m->q, g->rope_q + position * m->q.HSR, 1, n, ld, ROTATE);
        rope(rows, &m->k, g->rope_k + position * m->k.HSR, 1, n, ld, ROTATE);
        for (int64_t i = 0; i < n; i++) {
            if (c->qk_norm) fold_qk_norms(g->norms, rows + i * ld, m);
            cache_write(&g->cache, l, first + b, position + i, rows + i * ld + m->k.a);
        }
    }
    if (pass == STEP) return fac;
    contract_forward(g->q, fac, &m->q, n, NH, ld);
    contract_forward(g->k, fac, &m->k, n, NH, ld);
    contract_forward(g->v, fac, &m->v, n, NH, ld);
    return fac;
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
        const float *fac = qkv_decode(g, l, first, B, n, pass);                 // factors, into the cache
        if (pass == PREFILL)                                                    // y = attention(q, k, v)
            attention_forward(g->y, g->lse, g->attention_scratch, g->q, g->k, g->v, 1, n, NH, m->HSK, m->HSV, Dp,
                              m->scale);
        else
            flashtpa_decode(c->attn == ATTN_MLA ? g->y_latent : g->y, g->partial, g->decode_scratch,
                            g->decode_scratch_size, fac, &g->decoding, &g->cache, w, g->rope_k, l, g->length, B, n);
        if (pass == STEP && c->attn == ATTN_MLA) latent_output(g, w, N);        // y = Wv y'
        if (c->out_gate) gate_forward(g->y, g->proj + m->gate, m->Pp, g->y, N, m->D, Dp);   // y *= sigmoid(n Wg^T)
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
    if (o->cache_kind == CACHE_FP8) bytes = numbers + NUM_CACHE_PARTS * sizeof(float);
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
    rope_table(g->rope_q, capacity, g->model.q.HSR, config->rope_base);
    rope_table(g->rope_k, capacity, g->model.k.HSR, config->rope_base);
    g->decoding = decoding_of(&g->model);
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
        .start = generator_start, .plan = generator_plan,
        .cache_bytes = generator_cache_bytes, .open = generator_open, .close = generator_close,
        .model = generator_model, .host_weights = generator_host_weights, .load_weights = generator_load_weights,
        .prefill = generator_prefill, .step = generator_step, .sample = generator_sample, .logits = generator_logits,
    };
    return generator_main(argc, argv, &model);
}
