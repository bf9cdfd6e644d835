// generate_t6.cu: text from a T6 checkpoint on the GPU, through a cache of factors. llmc/generator.h is the program
// around it.
//
// The same as generate_t6.c in the trainer's precision: bf16, with logits in fp32 (PRECISION=FP32 is for checking). A
// prompt runs through the trainer's operators, its attention included, and leaves its factors in the cache. From then
// on each token's attention reads the cache (llmc/flashtpa_decode.cuh; llmc/variant_cache.cuh where constants, a shared
// b or third order make it another cache). Reading order:
//     memory | the model: prefill and steps | the generating program
//
// Shapes are train_t6.cu's. A step appends n tokens to each of B sequences, which makes N = B*n rows.
#ifndef T6_NO_MAIN      // test_t6.cu tests both programs, without their mains
#define T6_MODEL_ONLY
#endif
#include "train_t6.cu"

#include "llmc/flashtpa_decode.cuh"
#include "llmc/generator.h"
#include "llmc/latent_decode.cuh"
#include "llmc/matvec.cuh"
#include "llmc/sampler.cuh"
#include "llmc/variant_cache.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// Memory: planned, printed and checked before any of it is allocated

struct Generator {
    Model model;
    int64_t B, capacity, prefill_rows;
    CacheShape shape;           // of a layer's cache of pages
    VariantShape variant;       // of its cache of rows, where the model has that (variant_in_pages)
    floatX *params;             // (num_stored)
    unsigned char *cache;       // (L, B, streams, pages), or (L, B, capacity) rows
    floatX *before;             // (L, B, Pp)       kv_shift: the last projected row of each sequence
    int32_t *lengths;           // (B) tokens of each sequence
    double *frequencies_q, *frequencies_k;      // (HSR / 2) of q and of k
    // one row per token of a step or a prefill
    int32_t *ids;               // (rows)
    floatX *x, *n;              // (rows, C)        residual stream, normed
    float *rstd;                // (rows)
    floatX *proj;               // (rows, Pp)       projected rows
    floatX *y, *u, *s;          // (rows, Dp), (rows, 2 Fp), (rows, Fp)
    // prefill: of the trainer, for prefill_rows. In steps too: factor rows fac (rows, PFp), where they are not the
    // projected ones; mla's latq (rows, q_lora) and q (rows, NH, HSK)
    HeadBuffers heads;
    float *lse;                 // (NH, prefill_rows)
    // steps
    float *scratch;             // decode_scratch_bytes
    floatX *absorbed, *latents; // mla: (B MAX_STEP_TOKENS, NH, kv_lora + rope_dim), (B MAX_STEP_TOKENS, NH, kv_lora)
    // last tokens
    floatX *last;               // (B, C)
    float *logits;              // (B, Vp)
    double *uniform;            // (B)
    int32_t *next;              // (B)

    int64_t *host_lengths;      // (B)
    int32_t *host_ids;          // pinned (rows)
    double *host_uniform;       // pinned (B)
    float *host_weights;
    Matmul matmul;
    cudaStream_t stream;
    cudaGraphExec_t graph;      // a step of one token
    int steps;                  // of one token, so far
};

enum { NUM_GENERATOR_BUFFERS = 33, WEIGHTS_BUFFER = 0, CACHE_BUFFER = 1, BEFORE_BUFFER = 2 };

// Rows of a prefill of n tokens: few different lengths, because each needs plans of its matrix products. The rows
// beyond the prompt are padding; no token attends to them.
static int64_t prefill_length(int64_t n) {
    int64_t step = 16;
    while (step * 16 < n) step *= 2;
    return round_up(n, step);
}

// Bytes of a number in the cache.
static int cache_number_bytes(CacheKind kind) { return kind == CACHE_FP8 ? 1 : (int)sizeof(floatX); }

// Bytes of one sequence's cache in a layer.
static size_t cache_sequence_bytes(const Model *m, CacheKind kind, int64_t tokens) {
    int bytes = cache_number_bytes(kind);
    if (variant_in_pages(m)) return cache_layer_bytes(cache_shape(m, bytes), 1, tokens);
    return (size_t)tokens * variant_row_bytes(variant_shape(m, bytes));
}

// The table of Generator's buffers: each pointer with its size. Sets g->shape, variant, B, capacity and prefill_rows.
static void generator_table(Generator *g, const Model *m, int64_t B, int64_t capacity, int64_t longest_prefill,
                            CacheKind kind, Buffer out[NUM_GENERATOR_BUFFERS]) {
    const Config *c = &m->config;
    size_t T = prefill_length(longest_prefill), steps = B * MAX_STEP_TOKENS, rows = T > steps ? T : steps;
    size_t X = sizeof(floatX), f = sizeof(float), d = sizeof(double), C = c->n_embd, L = c->n_layer, NH = c->n_head,
        NKV = heads_stored(m->k, (int)c->n_head), latent = c->attn == ATTN_MLA;
    size_t norms = c->qk_norm ? T : 0, heads = latent ? 0 : T * NKV * m->HSV, scratch = 0;
    HeadBuffers *h = &g->heads;
    g->shape = cache_shape(m, cache_number_bytes(kind)), g->variant = variant_shape(m, cache_number_bytes(kind));
    g->B = B, g->capacity = capacity, g->prefill_rows = T;
    if (variant_in_pages(m)) scratch = decode_scratch_bytes(g->shape, cache_queries(m), (int)B, MAX_STEP_TOKENS);
    const Buffer table[] = {
        {(void **)&g->params, m->num_stored, X},
        {(void **)&g->cache, L * B * cache_sequence_bytes(m, kind, capacity), 1},
        {(void **)&g->before, c->kv_shift ? L * B * m->Pp : 0, X}, {(void **)&g->lengths, (size_t)B, sizeof(int32_t)},
        {(void **)&g->frequencies_q, (size_t)m->q.HSR / 2, d}, {(void **)&g->frequencies_k, (size_t)m->k.HSR / 2, d},
        {(void **)&g->ids, rows, sizeof(int32_t)}, {(void **)&g->x, rows * C, X}, {(void **)&g->n, rows * C, X},
        {(void **)&g->rstd, rows, f}, {(void **)&g->proj, rows * m->Pp, X}, {(void **)&g->y, rows * m->Dp, X},
        {(void **)&g->u, rows * 2 * m->Fp, X}, {(void **)&g->s, rows * m->Fp, X},
        {(void **)&h->fac, variant_has_rows(m) ? rows * m->PFp : 0, X},
        {(void **)&h->q, (latent ? rows : T) * NH * m->HSK, X}, {(void **)&h->k, heads, X}, {(void **)&h->v, heads, X},
        {(void **)&h->kv, latent ? T * 2 * m->D : 0, X}, {(void **)&h->kr, latent ? T * m->HSR : 0, X},
        {(void **)&h->rstdq, latent ? T : norms * heads_stored(m->q, (int)NH), f},
        {(void **)&h->rstdk, latent ? T : norms * NKV, f}, {(void **)&h->latq, latent ? rows * c->q_lora : 0, X},
        {(void **)&h->latkv, latent ? T * c->kv_lora : 0, X},
        {(void **)&h->rope_q, T * m->q.HSR, f}, {(void **)&h->rope_k, T * m->k.HSR, f},
        {(void **)&g->lse, T * NH, f}, {(void **)&g->scratch, scratch, 1},
        {(void **)&g->absorbed, latent ? steps * NH * (c->kv_lora + c->rope_dim) : 0, X},
        {(void **)&g->latents, latent ? steps * NH * c->kv_lora : 0, X},
        {(void **)&g->last, B * C, X}, {(void **)&g->logits, (size_t)(B * m->Vp), f},
        {(void **)&g->uniform, (size_t)B, sizeof(double) + sizeof(int32_t)},        // and next
    };
    static_assert(sizeof table / sizeof *table == NUM_GENERATOR_BUFFERS,
                  "NUM_GENERATOR_BUFFERS is this table's length");
    memcpy(out, table, sizeof table);
}

// ---------------------------------------------------------------------------------------------------------------------
// The model

// PREFILL: a whole sequence by the trainer's operators, padded to prefill_length. STEP: n more tokens, with attention
// from the cache.
typedef enum { PREFILL, STEP } Pass;

// A linear layer of a step or a prefill, and what precedes it (MatvecInput). Few rows: one kernel that reads the
// weights once does it all (matvec.cuh). More rows: a matrix product, whose input goes to scratch (N, IC).
static void linear(Generator *g, floatX *out, floatX *scratch, const floatX *inp, const floatX *w, int64_t N,
                   int64_t IC, int64_t OC, MatvecInput input, OutputMode mode) {
    double eps = g->model.config.rms_eps;
    if (N <= MATVEC_MAX_ROWS) return matvec(out, inp, w, N, IC, OC, input, mode, eps, g->stream);
    if (input == MATVEC_NORMED) rmsnorm_forward(scratch, g->rstd, inp, N, IC, eps, g->stream);
    if (input == MATVEC_SWIGLU) swiglu_forward(scratch, inp, N, IC, g->stream);
    linear_forward(&g->matmul, out, input == MATVEC_AS_IS ? inp : scratch, w, N, IC, OC, mode, g->stream);
}

// The cache of layer l, from sequence `first` on.
static unsigned char *layer_cache(Generator *g, int64_t l, int64_t first) {
    CacheKind kind = g->shape.number_bytes == 1 ? CACHE_FP8 : CACHE_NATIVE;
    return g->cache + (size_t)(l * g->B + first) * cache_sequence_bytes(&g->model, kind, g->capacity);
}

// kv_shift: the last projected rows of layer l, from sequence `first` on.
static floatX *rows_before(Generator *g, int64_t l, int64_t first) {
    return g->before + (l * g->B + first) * (g->model.config.kv_shift ? g->model.Pp : 0);
}

// mla: the latents of projected rows into the cache; in a step also the absorbed queries.
static void latent_decode(Generator *g, int64_t l, int64_t first, int64_t B, int64_t n, Pass pass) {
    const Model *m = &g->model;
    const Config *c = &m->config;
    const floatX *w = g->params + m->layers + (size_t)l * m->layer_stride;
    HeadBuffers *h = &g->heads;
    int64_t N = B * n;
    LatentWrite write = {
        .cache = layer_cache(g, l, first), .latq = h->latq, .proj = g->proj, .q_gain = w + m->q_gain,
        .kv_gain = w + m->kv_gain, .lengths = g->lengths + first, .frequencies = g->frequencies_k, .shape = g->shape,
        .n = (int)n, .Pp = (int)m->Pp, .q_lora = (int)c->q_lora, .pages = cache_pages(g->capacity),
        .eps = (float)c->rms_eps,
    };
    latent_write(write, B, g->stream);
    if (pass == PREFILL) return;
    linear(g, h->q, NULL, h->latq, w + m->wqb, N, c->q_lora, c->n_head * m->HSK, MATVEC_AS_IS, OVERWRITE);
    latent_queries(g->absorbed, h->q, w + m->wkvb, g->lengths + first, g->frequencies_k, absorbed_shape(m, (int)n), N,
                   g->stream);
}

// Factor rows of projected rows, for the kinds that have their own, and where the cache has rows, those.
static void variant_decode_rows(Generator *g, int64_t l, int64_t first, int64_t B, int64_t n, int64_t T) {
    const Model *m = &g->model;
    VariantRows rows = {
        .fac = g->heads.fac, .cache = layer_cache(g, l, first), .proj = g->proj, .before = rows_before(g, l, first),
        .layer = g->params + m->layers + (size_t)l * m->layer_stride, .lengths = g->lengths + first,
        .frequencies_q = g->frequencies_q, .frequencies_k = g->frequencies_k, .shape = g->variant, .n = (int)n,
        .capacity = g->capacity,
    };
    variant_rows(rows, B, g->stream);
    size_t row = (size_t)m->Pp * sizeof(floatX);
    if (m->config.kv_shift)
        CUDA_CHECK(cudaMemcpy2DAsync(rows_before(g, l, first), row, g->proj + (n - 1) * m->Pp, (size_t)T * row, row,
                                     (size_t)B, cudaMemcpyDeviceToDevice, g->stream));
}

// qkv_forward for decoding: the projected rows g->proj of layer l from g->x, and what the cache needs of them; the
// queries in g->proj, g->heads.fac or g->absorbed; in a prefill also g->heads.q, k and v. For sequences first to
// first + B - 1, each with n tokens in T rows.
static void qkv_decode(Generator *g, int64_t l, int64_t first, int64_t B, int64_t n, int64_t T, Pass pass) {
    const Model *m = &g->model;
    const floatX *w = g->params + m->layers + (size_t)l * m->layer_stride;
    bool own_rows = variant_has_rows(m);
    linear(g, g->proj, g->n, g->x, w + m->wqkv, B * T, m->config.n_embd, m->Pp, MATVEC_NORMED, OVERWRITE);
    if (own_rows) variant_decode_rows(g, l, first, B, n, T);
    CacheWrite write = {
        .cache = layer_cache(g, l, first), .fac = own_rows ? g->heads.fac : g->proj, .lengths = g->lengths + first,
        .frequencies = g->frequencies_k, .shape = g->shape, .q = m->q, .k = m->k, .v = m->v, .n = (int)n,
        .Pp = (int)(own_rows ? m->PFp : m->Pp), .pages = cache_pages(g->capacity), .rotate_queries = pass == STEP,
    };
    if (m->config.attn == ATTN_MLA) latent_decode(g, l, first, B, n, pass);
    else if (variant_in_pages(m)) cache_write(write, B, g->stream);
    if (pass == PREFILL) heads_from_rows(&g->heads, m, &g->matmul, g->proj, w, B, T, g->stream);
}

// g->y from the queries and the cache of layer l.
static void attention_decode(Generator *g, int64_t l, int64_t first, int64_t B, int64_t n) {
    const Model *m = &g->model;
    const floatX *w = g->params + m->layers + (size_t)l * m->layer_stride;
    bool own_rows = variant_has_rows(m), latent = m->config.attn == ATTN_MLA;
    DecodeArgs args = {
        .cache = layer_cache(g, l, first), .lengths = g->lengths + first, .fac = own_rows ? g->heads.fac : g->proj,
        .out = g->y, .scratch = g->scratch, .shape = g->shape, .q = cache_queries(m), .B = (int)B, .n = (int)n,
        .NH = (int)m->config.n_head, .Pp = (int)(own_rows ? m->PFp : m->Pp), .pages = cache_pages(g->capacity),
    };
    VariantArgs variant = {
        .cache = args.cache, .lengths = args.lengths, .fac = args.fac, .layer = w, .frequencies = g->frequencies_k,
        .out = g->y, .shape = g->variant, .B = (int)B, .n = (int)n, .capacity = g->capacity,
    };
    if (latent) args.fac = g->absorbed, args.out = g->latents, args.Pp = args.q.R * args.q.HS;
    if (variant_in_pages(m)) flashtpa_decode(args, g->stream);
    else variant_decode(variant, g->stream);
    if (latent) latent_output(g->y, g->latents, w + m->wkvb, absorbed_shape(m, (int)n), B * n, g->stream);
    if (m->config.out_gate) gate_outputs(g->y, gate_columns(m, g->proj), m->Pp, B * n, m->D, g->stream);
}

// g->logits of sequences first to first + B - 1 from row n - 1, the last token, of each sequence's T rows in g->x.
static void last_logits(Generator *g, int64_t first, int64_t B, int64_t n, int64_t T) {
    const Model *m = &g->model;
    const floatX *wte = g->params + m->wte;
    double eps = m->config.rms_eps;
    int64_t C = m->config.n_embd;
    float *logits = g->logits + first * m->Vp;
    size_t row = (size_t)C * sizeof(floatX);
    CUDA_CHECK(cudaMemcpy2DAsync(g->last, row, g->x + (n - 1) * C, (size_t)T * row, row, (size_t)B,
                                 cudaMemcpyDeviceToDevice, g->stream));
    if (B <= MATVEC_MAX_ROWS) return matvec(logits, g->last, wte, B, C, m->Vp, MATVEC_NORMED, OVERWRITE, eps,
                                            g->stream);
    rmsnorm_forward(g->n, g->rstd, g->last, B, C, eps, g->stream);
    matmul(&g->matmul, logits, g->n, wte, MatmulShape{B, m->Vp, C, AS_IS, TRANSPOSED, CUDA_R_32F, OVERWRITE},
           g->stream);
}

// Appends n tokens, g->ids (B, n), to each of the sequences first to first + B - 1: to their cache, and to g->lengths.
// Their rows of g->logits become the logits of what follows. PREFILL: B = 1, and the sequence is empty.
static void forward(Generator *g, int64_t first, int64_t B, int64_t n, Pass pass) {
    const Model *m = &g->model;
    const Config *c = &m->config;
    int64_t T = pass == PREFILL ? prefill_length(n) : n, N = B * T, C = c->n_embd, Dp = m->Dp, Fp = m->Fp;
    encoder_forward(g->x, g->ids, g->params + m->wte, N, C, g->stream);                     // x = wte[idx]
    for (int64_t l = 0; l < c->n_layer; l++) {
        const floatX *w = g->params + m->layers + (size_t)l * m->layer_stride;
        qkv_decode(g, l, first, B, n, T, pass);                                             // n, factors, cache
        if (pass == PREFILL)                                                                // y = attention(q, k, v)
            layer_attention_forward(g->y, g->lse, attention_heads(&g->heads, m), gate_columns(m, g->proj),
                                    attention_shape(m, 1, T), g->stream);
        else
            attention_decode(g, l, first, B, n);
        linear(g, g->x, NULL, g->y, w + m->wo, N, Dp, C, MATVEC_AS_IS, ACCUMULATE);         // x += y Wo^T
        linear(g, g->u, g->n, g->x, w + m->w12, N, C, 2 * Fp, MATVEC_NORMED, OVERWRITE);    // u = n W1^T, n W2^T
        linear(g, g->x, g->s, g->u, w + m->w3, N, Fp, C, MATVEC_SWIGLU, ACCUMULATE);        // x += silu(..) * (..) W3^T
    }
    last_logits(g, first, B, n, T);                                                         // logits = n wte^T
    lengths_add(g->lengths + first, (int)n, (size_t)B, g->stream);
}

// =====================================================================================================================
// The generating program (llmc/generator.h) around this model

void generator_start(const GenerateOptions *) { gpu_start(0, (const void *)encoder_forward_kernel); }

double generator_cache_bytes(const GenerateOptions *o, const Model *m, int64_t tokens) {
    double page = (double)cache_sequence_bytes(m, o->cache_kind, PAGE);
    return (double)m->config.n_layer * page * (double)tokens / PAGE;
}

void generator_plan(const GenerateOptions *o, const Model *m, int64_t B, int64_t capacity) {
    check_model(m);
    if (capacity > INT32_MAX / 2)
        die(EXIT_INPUT, "a sequence of %" PRId64 " tokens is longer than this program can count: lower --max-tokens "
            "(-g)", capacity);
    static Generator unused;
    Buffer table[NUM_GENERATOR_BUFFERS];
    generator_table(&unused, m, B, capacity, o->longest_prefill, o->cache_kind, table);
    size_t free_bytes, total_bytes;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    double weights = memory_bytes(table, WEIGHTS_BUFFER, WEIGHTS_BUFFER);
    double cache = memory_bytes(table, CACHE_BUFFER, BEFORE_BUFFER), have = (double)free_bytes, MiB = 0x1p20,
        GiB = 0x1p30;
    double activations = memory_bytes(table, BEFORE_BUFFER + 1, NUM_GENERATOR_BUFFERS - 1) + MATMUL_WORKSPACE_BYTES;
    double need = weights + cache + activations;
    if (o->stats || o->plan)
        fprintf(stderr, "memory: weights %.1f + cache %.1f + activations %.1f = %.1f MiB of %.0f free on the GPU\n",
                weights / MiB, cache / MiB, activations / MiB, need / MiB, have / MiB);
    if (need > have)
        die(EXIT_INPUT, "this run needs %.1f GiB of GPU memory (cache %.1f) and %.1f are free: lower --max-tokens "
            "(-g), use fewer or shorter prompts%s", need / GiB, cache / GiB, have / GiB,
            o->cache_kind == CACHE_FP8 ? "" : ", or use --cache fp8");
}

// Fills RoPE's frequencies (HSR / 2), for decoding, and its table (prefill_rows, HSR), for prefills.
static void generator_angles(Generator *g, double *frequencies, float *rope, int64_t HSR) {
    size_t frequency_bytes = (size_t)HSR / 2 * sizeof(double),
        rope_bytes = (size_t)(g->prefill_rows * HSR) * sizeof(float);
    double *host_frequencies = (double *)xmalloc(frequency_bytes), base = g->model.config.rope_base;
    float *host_rope = (float *)xmalloc(rope_bytes);
    rope_frequencies(host_frequencies, HSR, base);
    rope_table(host_rope, g->prefill_rows, HSR, base);
    CUDA_CHECK(cudaMemcpyAsync(frequencies, host_frequencies, frequency_bytes, cudaMemcpyHostToDevice, g->stream));
    CUDA_CHECK(cudaMemcpyAsync(rope, host_rope, rope_bytes, cudaMemcpyHostToDevice, g->stream));
    CUDA_CHECK(cudaStreamSynchronize(g->stream));
    free(host_frequencies), free(host_rope);
}

Generator *generator_open(const GenerateOptions *o, const Config *config, int64_t B, int64_t capacity) {
    Generator *g = (Generator *)xcalloc(1, sizeof *g);
    Buffer table[NUM_GENERATOR_BUFFERS];
    model_init(&g->model, config, PAD);
    check_model(&g->model);
    CUDA_CHECK(cudaStreamCreate(&g->stream));
    generator_table(g, &g->model, B, capacity, o->longest_prefill, o->cache_kind, table);
    memory_alloc(table, NUM_GENERATOR_BUFFERS, "lower --max-tokens (-g), or use fewer or shorter prompts", g->stream);
    CUDA_CHECK(cudaMemsetAsync(g->cache, 0xff, table[CACHE_BUFFER].elements, g->stream));       // free slots hold NaN
    g->next = (int32_t *)(g->uniform + B);
    int64_t steps = B * MAX_STEP_TOKENS, rows = g->prefill_rows > steps ? g->prefill_rows : steps;
    CUDA_CHECK(cudaMallocHost((void **)&g->host_ids, (size_t)rows * sizeof(int32_t)));
    CUDA_CHECK(cudaMallocHost((void **)&g->host_uniform, (size_t)B * sizeof(double)));
    g->host_lengths = (int64_t *)xcalloc((size_t)B, sizeof(int64_t));
    generator_angles(g, g->frequencies_q, g->heads.rope_q, g->model.q.HSR);
    generator_angles(g, g->frequencies_k, g->heads.rope_k, g->model.k.HSR);
    matmul_init(&g->matmul);
    return g;
}

void generator_close(Generator *g) {
    Buffer table[NUM_GENERATOR_BUFFERS];
    CacheKind kind = g->shape.number_bytes == 1 ? CACHE_FP8 : CACHE_NATIVE;
    CUDA_CHECK(cudaStreamSynchronize(g->stream));
    generator_table(g, &g->model, g->B, g->capacity, g->prefill_rows, kind, table);
    memory_free(table, NUM_GENERATOR_BUFFERS);
    CUDA_CHECK(cudaFreeHost(g->host_ids));
    CUDA_CHECK(cudaFreeHost(g->host_uniform));
    if (g->graph) CUDA_CHECK(cudaGraphExecDestroy(g->graph));
    matmul_free(&g->matmul);
    CUDA_CHECK(cudaStreamDestroy(g->stream));
    model_free(&g->model);
    free(g->host_lengths), free(g->host_weights), free(g);
}

const Model *generator_model(const Generator *g) { return &g->model; }

float *generator_host_weights(Generator *g) {
    if (!g->host_weights) g->host_weights = (float *)xcalloc(g->model.num_stored, sizeof(float));
    return g->host_weights;
}

void generator_load_weights(Generator *g) {
    size_t n = g->model.num_stored;
    floatX *rounded = (floatX *)xmalloc(n * sizeof *rounded);
    for (size_t i = 0; i < n; i++) rounded[i] = (floatX)g->host_weights[i];
    CUDA_CHECK(cudaMemcpy(g->params, rounded, n * sizeof *rounded, cudaMemcpyHostToDevice));
    free(rounded), free(g->host_weights);
    g->host_weights = NULL;
}

void generator_prefill(Generator *g, int64_t b, const int32_t *ids, int64_t n) {
    if (n < 1 || n > g->prefill_rows || n > g->capacity)
        die(EXIT_SYSTEM, "internal error: a prefill of %" PRId64 " tokens", n);
    size_t bytes = (size_t)prefill_length(n) * sizeof *ids;
    CUDA_CHECK(cudaStreamSynchronize(g->stream));       // host_ids may be in use
    memset(g->host_ids, 0, bytes);
    memcpy(g->host_ids, ids, (size_t)n * sizeof *ids);
    CUDA_CHECK(cudaMemcpyAsync(g->ids, g->host_ids, bytes, cudaMemcpyHostToDevice, g->stream));
    CUDA_CHECK(cudaMemsetAsync(g->lengths + b, 0, sizeof(int32_t), g->stream));
    g->matmul.choice = MATMUL_FIRST;                    // these products run once or twice: not worth timing candidates
    forward(g, b, 1, n, PREFILL);
    g->matmul.choice = MATMUL_FASTEST;
    g->host_lengths[b] = n;
}

// The first step of one token launches kernel by kernel, and the matrix products choose their algorithms. From the
// second on it is one graph.
void generator_step(Generator *g, const int32_t *ids, int64_t n) {
    for (int64_t b = 0; b < g->B; b++)
        if (n < 1 || n > MAX_STEP_TOKENS || g->host_lengths[b] + n > g->capacity)
            die(EXIT_SYSTEM, "internal error: a step of %" PRId64 " tokens after %" PRId64, n, g->host_lengths[b]);
    size_t bytes = (size_t)(g->B * n) * sizeof *ids;
    CUDA_CHECK(cudaStreamSynchronize(g->stream));
    memcpy(g->host_ids, ids, bytes);
    CUDA_CHECK(cudaMemcpyAsync(g->ids, g->host_ids, bytes, cudaMemcpyHostToDevice, g->stream));
    if (n > 1 || g->steps++ == 0) {
        g->matmul.choice = n > 1 ? MATMUL_FIRST : MATMUL_FASTEST;
        forward(g, 0, g->B, n, STEP);
    } else {
        if (!g->graph) {
            cudaGraph_t captured;
            CUDA_CHECK(cudaStreamBeginCapture(g->stream, cudaStreamCaptureModeThreadLocal));
            forward(g, 0, g->B, n, STEP);
            CUDA_CHECK(cudaStreamEndCapture(g->stream, &captured));
            CUDA_CHECK(cudaGraphInstantiateWithFlags(&g->graph, captured, 0));
            CUDA_CHECK(cudaGraphDestroy(captured));
        }
        CUDA_CHECK(cudaGraphLaunch(g->graph, g->stream));
    }
    for (int64_t b = 0; b < g->B; b++) g->host_lengths[b] += n;
}

void generator_sample(Generator *g, const SamplerOptions *s, uint64_t seed, int32_t *next) {
    size_t uniform_bytes = (size_t)g->B * sizeof(double), next_bytes = (size_t)g->B * sizeof *next;
    CUDA_CHECK(cudaStreamSynchronize(g->stream));
    for (int64_t b = 0; b < g->B; b++) g->host_uniform[b] = generator_uniform(seed, b, g->host_lengths[b]);
    CUDA_CHECK(cudaMemcpyAsync(g->uniform, g->host_uniform, uniform_bytes, cudaMemcpyHostToDevice, g->stream));
    sample_tokens(g->next, g->logits, g->uniform, s, g->B, g->model.config.vocab_size, g->model.Vp, g->stream);
    CUDA_CHECK(cudaMemcpyAsync(next, g->next, next_bytes, cudaMemcpyDeviceToHost, g->stream));
    CUDA_CHECK(cudaStreamSynchronize(g->stream));
}

void generator_logits(Generator *g, float *logits) {
    size_t row = (size_t)g->model.config.vocab_size * sizeof(float), stored = (size_t)g->model.Vp * sizeof(float);
    CUDA_CHECK(cudaMemcpy2DAsync(logits, row, g->logits, stored, row, (size_t)g->B, cudaMemcpyDeviceToHost, g->stream));
    CUDA_CHECK(cudaStreamSynchronize(g->stream));
}

// In bf16 a checkpoint's logits differ by 1e-3 to 5e-3 between two ways, as each way rounds different numbers;
// --check allows ten times this.
static const double GENERATOR_TOLERANCE = sizeof(floatX) == 2 ? 3e-3 : 1e-5;

#ifndef T6_NO_MAIN      // test_t6.cu and dev/cuda/decode_step.cu include this file without it
int main(int argc, char **argv) {
    static const GeneratorModel model = {
        .title = "generate_t6cu: text from a T6 checkpoint, on the GPU. Without flags it continues standard input, "
                 "by the model in out.",
        .pad = PAD, .tolerance = GENERATOR_TOLERANCE, .start = generator_start, .plan = generator_plan,
        .cache_bytes = generator_cache_bytes, .open = generator_open, .close = generator_close,
        .model = generator_model, .host_weights = generator_host_weights, .load_weights = generator_load_weights,
        .prefill = generator_prefill, .step = generator_step, .sample = generator_sample, .logits = generator_logits,
    };
    return generator_main(argc, argv, &model);
}
#endif
