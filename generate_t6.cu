// generate_t6.cu: text from a T6 checkpoint on the GPU, through a cache of factors. The program around it is llmc/generator.h.
//
// The same as generate_t6.c, in the trainer's precision: bf16, with logits in fp32; a build with PRECISION=FP32 is for checking. A prompt
// runs through the trainer's operations, its attention included, and leaves its factors in the cache; from then on each token's attention
// reads the cache (llmc/flashtpa_decode.cuh). It reads from top to bottom:
//   memory | the model: prefill and steps | what the generating program needs
//
// Shapes are train_t6.cu's. A step appends n tokens to each of B sequences, which makes N = B*n rows.
#define T6_NO_MAIN
#include "train_t6.cu"

#include "llmc/flashtpa_decode.cuh"
#include "llmc/generator.h"
#include "llmc/matvec.cuh"
#include "llmc/sampler.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// Memory: planned, printed and checked before any of it is allocated

struct Generator {
    Model model;
    int64_t B, capacity, prefill_rows;
    CacheShape shape;           // of a layer's cache
    floatX *params;             // (num_stored)
    unsigned char *cache;       // (L, B, streams, pages)
    int32_t *lengths;           // (B) tokens of each sequence
    double *frequencies;        // (HS / 2)
    // one row a token, of a step or a prefill
    int32_t *ids;               // (rows)
    floatX *x, *n;              // (rows, C)
    float *rstd;                // (rows)
    floatX *fac, *y, *u, *s;    // (rows, Pp), (rows, Dp), (rows, 2 Fp), (rows, Fp)
    // of prefill
    floatX *q, *k, *v;          // (prefill_rows, heads_stored, HS)
    float *lse, *rope;          // (NH, prefill_rows), (prefill_rows, HS)
    // of steps
    float *scratch;             // decode_scratch_bytes
    // of the last tokens
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

enum { NUM_GENERATOR_BUFFERS = 21 };

// Tokens of a prefill as it is run: few lengths, because each asks for plans of its matrix products. Rows beyond the prompt see it and are
// not seen.
static int64_t prefill_length(int64_t n) {
    int64_t step = 16;
    while (step * 16 < n) step *= 2;
    return round_up(n, step);
}

// The table behind Generator's buffers: where each pointer is and how much it needs. The first is the weights, the second the cache.
static void generator_table(Generator *g, const Model *m, int64_t B, int64_t capacity, int64_t longest_prefill, int fp8, Buffer out[NUM_GENERATOR_BUFFERS]) {
    const Config *c = &m->config;
    size_t T = prefill_length(longest_prefill), steps = B * MAX_STEP_TOKENS, rows = T > steps ? T : steps, X = sizeof(floatX), f = sizeof(float);
    size_t D_kv = (size_t)heads_stored(m->k, (int)c->n_head) * c->head_dim, HS = c->head_dim;
    g->shape = cache_shape(m, fp8 ? 1 : (int)sizeof(floatX)), g->B = B, g->capacity = capacity, g->prefill_rows = T;
    const Buffer table[] = {
        {(void **)&g->params, m->num_stored, X}, {(void **)&g->cache, (size_t)c->n_layer * cache_layer_bytes(g->shape, B, capacity), 1},
        {(void **)&g->lengths, (size_t)B, sizeof(int32_t)}, {(void **)&g->frequencies, HS / 2, sizeof(double)}, {(void **)&g->ids, rows, sizeof(int32_t)},
        {(void **)&g->x, rows * c->n_embd, X}, {(void **)&g->n, rows * c->n_embd, X}, {(void **)&g->rstd, rows, f},
        {(void **)&g->fac, rows * m->Pp, X}, {(void **)&g->y, rows * m->Dp, X}, {(void **)&g->u, rows * 2 * m->Fp, X}, {(void **)&g->s, rows * m->Fp, X},
        {(void **)&g->q, T * m->D, X}, {(void **)&g->k, T * D_kv, X}, {(void **)&g->v, T * D_kv, X}, {(void **)&g->lse, T * c->n_head, f},
        {(void **)&g->rope, T * HS, f}, {(void **)&g->scratch, decode_scratch_bytes(g->shape, m->q, (int)B, MAX_STEP_TOKENS), 1},
        {(void **)&g->last, (size_t)(B * c->n_embd), X}, {(void **)&g->logits, (size_t)(B * m->Vp), f},
        {(void **)&g->uniform, (size_t)B, sizeof(double) + sizeof(int32_t)}};       // and next
    static_assert(sizeof table / sizeof *table == NUM_GENERATOR_BUFFERS, "NUM_GENERATOR_BUFFERS is the length of this table");
    memcpy(out, table, sizeof table);
}

// ---------------------------------------------------------------------------------------------------------------------
// The model

// PREFILL: a whole sequence by the trainer's operations, rows beyond its n tokens being padding. STEP: n tokens more, attention from the cache.
typedef enum { PREFILL, STEP } Pass;

__global__ void lengths_add_kernel(int32_t *lengths, int B, int n) {
    int b = blockIdx.x * blockDim.x + threadIdx.x;
    if (b < B) lengths[b] += n;
}

// A linear layer of a step or a prefill: few rows by a kernel that reads the weights once and does what is around the product too (matvec.cuh),
// more by a matrix product, scratch (N, IC) holding its input.
static void linear(Generator *g, floatX *out, floatX *scratch, const floatX *inp, const floatX *w, int64_t N, int64_t IC, int64_t OC, MatvecInput input,
                   MatmulMode mode) {
    double eps = g->model.config.rms_eps;
    if (N <= MATVEC_MAX_ROWS) return matvec(out, inp, w, N, IC, OC, input, mode, eps, g->stream);
    if (input == MATVEC_NORMED) rmsnorm_forward(scratch, g->rstd, inp, N, IC, eps, g->stream);
    if (input == MATVEC_SWIGLU) swiglu_forward(scratch, inp, N, IC, g->stream);
    linear_forward(&g->matmul, out, input == MATVEC_AS_IS ? inp : scratch, w, N, IC, OC, mode, g->stream);
}

// Appends n tokens to each of the sequences first to first + B - 1, g->ids (B, n) on the GPU: their factors go to the cache, and the logits of
// what follows the last to their rows of g->logits. PREFILL: B = 1, and the sequence is empty.
static void forward(Generator *g, int64_t first, int64_t B, int64_t n, Pass pass) {
    const Model *m = &g->model;
    const Config *c = &m->config;
    cudaStream_t stream = g->stream;
    int64_t T = pass == PREFILL ? prefill_length(n) : n, N = B * T, C = c->n_embd;
    size_t sequence_bytes = cache_layer_bytes(g->shape, 1, g->capacity);
    CacheWrite write = {NULL, g->fac, g->lengths + first, g->frequencies, g->shape, m->q, m->k, m->v, (int)n, (int)m->Pp, cache_pages(g->capacity),
                        pass == STEP};
    DecodeArgs decode = {NULL, g->lengths + first, g->fac, g->y, g->scratch, g->shape, m->q, (int)B, (int)n, (int)c->n_head, (int)m->Pp,
                         cache_pages(g->capacity), 0, 0, 0};
    encoder_forward(g->x, g->ids, g->params + m->wte, N, C, stream);
    for (int64_t l = 0; l < c->n_layer; l++) {
        const floatX *w = g->params + m->layers + (size_t)l * m->layer_stride;
        write.cache = g->cache + (size_t)(l * g->B + first) * sequence_bytes, decode.cache = write.cache;

        linear(g, g->fac, g->n, g->x, w + m->wqkv, N, C, m->Pp, MATVEC_NORMED, OVERWRITE);
        cache_write(write, B, stream);
        if (pass == PREFILL) {
            heads_forward(g->q, g->k, g->v, g->fac, g->rope, heads_shape(m, T), T, stream);
            layer_attention_forward<floatX>(g->y, g->lse, g->q, g->k, g->v, attention_shape(m, 1, T), stream);
        } else flashtpa_decode(decode, stream);
        linear(g, g->x, NULL, g->y, w + m->wo, N, m->Dp, C, MATVEC_AS_IS, ACCUMULATE);
        linear(g, g->u, g->n, g->x, w + m->w12, N, C, 2 * m->Fp, MATVEC_NORMED, OVERWRITE);
        linear(g, g->x, g->s, g->u, w + m->w3, N, m->Fp, C, MATVEC_SWIGLU, ACCUMULATE);
    }
    // of the last tokens only
    size_t row = (size_t)C * sizeof(floatX);
    CUDA_CHECK(cudaMemcpy2DAsync(g->last, row, g->x + (n - 1) * C, (size_t)T * row, row, (size_t)B, cudaMemcpyDeviceToDevice, stream));
    float *logits = g->logits + first * m->Vp;
    if (B <= MATVEC_MAX_ROWS) matvec(logits, g->last, g->params + m->wte, B, C, m->Vp, MATVEC_NORMED, OVERWRITE, c->rms_eps, stream);
    else {
        rmsnorm_forward(g->n, g->rstd, g->last, B, C, c->rms_eps, stream);
        matmul(&g->matmul, logits, g->n, g->params + m->wte, MatmulShape{B, m->Vp, C, AS_IS, TRANSPOSED, CUDA_R_32F, OVERWRITE}, stream);
    }
    launch(lengths_add_kernel, {(unsigned)ceil_div(B, (int64_t)256), 256, 0, stream}, g->lengths + first, (int)B, (int)n);
}

// =====================================================================================================================
// What the generating program (llmc/generator.h) needs

int generator_pad(void) { return PAD; }

// In bf16 a checkpoint's logits differ by 1e-3 to 5e-3 between two ways, each way rounding other numbers; --check allows ten times this.
double generator_tolerance(void) { return sizeof(floatX) == 2 ? 3e-3 : 1e-5; }

void generator_start(GenerateOptions *) {
    TrainOptions unused;
    memset(&unused, 0, sizeof unused);
    trainer_start(&unused);
}

double generator_cache_bytes(const GenerateOptions *o, const Model *m, int64_t tokens) {
    CacheShape s = cache_shape(m, o->cache_kind == CACHE_FP8 ? 1 : (int)sizeof(floatX));
    return (double)m->config.n_layer * (double)s.streams * (double)cache_page_bytes(s) * (double)tokens / PAGE;
}

void generator_plan(const GenerateOptions *o, const Model *m, int64_t B, int64_t capacity) {
    check_model(m);
    if (capacity > INT32_MAX / 2)
        die(EXIT_INPUT, "a sequence of %" PRId64 " tokens is longer than this program can count: lower --max-tokens (-g)", capacity);
    static Generator unused;
    Buffer table[NUM_GENERATOR_BUFFERS];
    generator_table(&unused, m, B, capacity, o->longest_prefill, o->cache_kind == CACHE_FP8, table);
    size_t free_bytes, total_bytes;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    double weights = memory_bytes(table, 0, 0), cache = memory_bytes(table, 1, 1), work = memory_bytes(table, 2, NUM_GENERATOR_BUFFERS - 1);
    double need = weights + cache + work + MATMUL_WORKSPACE_BYTES, have = (double)free_bytes, MiB = 0x1p20, GiB = 0x1p30;
    if (o->stats || o->plan)
        fprintf(stderr, "memory: weights %.1f + cache %.1f + activations %.1f = %.1f MiB of %.0f free on the GPU\n", weights / MiB, cache / MiB,
                (need - weights - cache) / MiB, need / MiB, have / MiB);
    if (need > have)
        die(EXIT_INPUT, "this run needs %.1f GiB of the GPU's memory (cache %.1f) and %.1f are free: lower --max-tokens (-g), give fewer or shorter "
            "prompts%s", need / GiB, cache / GiB, have / GiB, o->cache_kind == CACHE_FP8 ? "" : ", or take --cache fp8");
}

Generator *generator_open(const GenerateOptions *o, const Config *config, int64_t B, int64_t capacity) {
    Generator *g = (Generator *)xcalloc(1, sizeof *g);
    Buffer table[NUM_GENERATOR_BUFFERS];
    model_init(&g->model, config, generator_pad());
    check_model(&g->model);
    CUDA_CHECK(cudaStreamCreate(&g->stream));
    generator_table(g, &g->model, B, capacity, o->longest_prefill, o->cache_kind == CACHE_FP8, table);
    for (int i = 0; i < NUM_GENERATOR_BUFFERS; i++) {
        size_t bytes = table[i].elements * table[i].bytes;
        cudaError_t error = cudaMalloc(table[i].pointer, bytes);
        if (error == cudaErrorMemoryAllocation)
            die(EXIT_SYSTEM, "out of GPU memory: %.2f GiB more are needed and not there; lower --max-tokens (-g), or give fewer or shorter prompts",
                memory_bytes(table, i, NUM_GENERATOR_BUFFERS - 1) / 0x1p30);
        CUDA_CHECK(error);
        CUDA_CHECK(cudaMemsetAsync(*table[i].pointer, i == 1 ? 0xff : 0, bytes, g->stream));    // a cache's free slots hold NaN
    }
    g->next = (int32_t *)(g->uniform + B);
    int64_t rows = g->prefill_rows > B * MAX_STEP_TOKENS ? g->prefill_rows : B * MAX_STEP_TOKENS, HS = config->head_dim;
    CUDA_CHECK(cudaMallocHost((void **)&g->host_ids, (size_t)rows * sizeof(int32_t)));
    CUDA_CHECK(cudaMallocHost((void **)&g->host_uniform, (size_t)B * sizeof(double)));
    g->host_lengths = (int64_t *)xcalloc((size_t)B, sizeof(int64_t));
    double *frequencies = (double *)xmalloc((size_t)HS / 2 * sizeof(double));
    float *rope = (float *)xmalloc((size_t)(g->prefill_rows * HS) * sizeof(float));
    rope_frequencies(frequencies, HS, config->rope_base);
    rope_table(rope, g->prefill_rows, HS, config->rope_base);
    CUDA_CHECK(cudaMemcpyAsync(g->frequencies, frequencies, (size_t)HS / 2 * sizeof(double), cudaMemcpyHostToDevice, g->stream));
    CUDA_CHECK(cudaMemcpyAsync(g->rope, rope, (size_t)(g->prefill_rows * HS) * sizeof(float), cudaMemcpyHostToDevice, g->stream));
    CUDA_CHECK(cudaStreamSynchronize(g->stream));
    free(frequencies), free(rope);
    matmul_init(&g->matmul);
    return g;
}

void generator_close(Generator *g) {
    Buffer table[NUM_GENERATOR_BUFFERS];
    CUDA_CHECK(cudaStreamSynchronize(g->stream));
    generator_table(g, &g->model, g->B, g->capacity, g->prefill_rows, g->shape.number_bytes == 1, table);
    for (int i = 0; i < NUM_GENERATOR_BUFFERS; i++) CUDA_CHECK(cudaFree(*table[i].pointer));
    CUDA_CHECK(cudaFreeHost(g->host_ids));
    CUDA_CHECK(cudaFreeHost(g->host_uniform));
    if (g->graph) CUDA_CHECK(cudaGraphExecDestroy(g->graph));
    matmul_free(&g->matmul);
    CUDA_CHECK(cudaStreamDestroy(g->stream));
    model_free(&g->model);
    free(g->host_lengths), free(g->host_weights), free(g);
}

const Model *generator_model(Generator *g) { return &g->model; }

float *generator_host_weights(Generator *g) {
    if (!g->host_weights) g->host_weights = (float *)xcalloc(g->model.num_stored, sizeof(float));
    return g->host_weights;
}

void generator_take_weights(Generator *g) {
    size_t n = g->model.num_stored;
    floatX *rounded = (floatX *)xmalloc(n * sizeof *rounded);
    for (size_t i = 0; i < n; i++) rounded[i] = (floatX)g->host_weights[i];
    CUDA_CHECK(cudaMemcpy(g->params, rounded, n * sizeof *rounded, cudaMemcpyHostToDevice));
    free(rounded), free(g->host_weights);
    g->host_weights = NULL;
}

void generator_prefill(Generator *g, int64_t b, const int32_t *ids, int64_t n) {
    if (n < 1 || n > g->prefill_rows || n > g->capacity) die(EXIT_SYSTEM, "internal error: a prefill of %" PRId64 " tokens", n);
    CUDA_CHECK(cudaStreamSynchronize(g->stream));       // host_ids may be in use
    memset(g->host_ids, 0, (size_t)prefill_length(n) * sizeof *ids);
    memcpy(g->host_ids, ids, (size_t)n * sizeof *ids);
    CUDA_CHECK(cudaMemcpyAsync(g->ids, g->host_ids, (size_t)prefill_length(n) * sizeof *ids, cudaMemcpyHostToDevice, g->stream));
    CUDA_CHECK(cudaMemsetAsync(g->lengths + b, 0, sizeof(int32_t), g->stream));
    g->matmul.choice = MATMUL_FIRST;                    // these products run once or twice: not worth trying candidates
    forward(g, b, 1, n, PREFILL);
    g->matmul.choice = MATMUL_FASTEST;
    g->host_lengths[b] = n;
}

// The first step of one token is a plain one, in which the matrix products choose their algorithms; from the second on it is one graph.
void generator_step(Generator *g, const int32_t *ids, int64_t n) {
    for (int64_t b = 0; b < g->B; b++)
        if (n < 1 || n > MAX_STEP_TOKENS || g->host_lengths[b] + n > g->capacity)
            die(EXIT_SYSTEM, "internal error: a step of %" PRId64 " tokens after %" PRId64, n, g->host_lengths[b]);
    CUDA_CHECK(cudaStreamSynchronize(g->stream));
    memcpy(g->host_ids, ids, (size_t)(g->B * n) * sizeof *ids);
    CUDA_CHECK(cudaMemcpyAsync(g->ids, g->host_ids, (size_t)(g->B * n) * sizeof *ids, cudaMemcpyHostToDevice, g->stream));
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
    CUDA_CHECK(cudaStreamSynchronize(g->stream));
    for (int64_t b = 0; b < g->B; b++) g->host_uniform[b] = generator_uniform(seed, b, g->host_lengths[b]);
    CUDA_CHECK(cudaMemcpyAsync(g->uniform, g->host_uniform, (size_t)g->B * sizeof(double), cudaMemcpyHostToDevice, g->stream));
    sample_tokens(g->next, g->logits, g->uniform, s, g->B, g->model.config.vocab_size, g->model.Vp, g->stream);
    CUDA_CHECK(cudaMemcpyAsync(next, g->next, (size_t)g->B * sizeof *next, cudaMemcpyDeviceToHost, g->stream));
    CUDA_CHECK(cudaStreamSynchronize(g->stream));
}

void generator_logits(Generator *g, float *logits) {
    size_t V = (size_t)g->model.config.vocab_size * sizeof(float);
    CUDA_CHECK(cudaMemcpy2DAsync(logits, V, g->logits, (size_t)g->model.Vp * sizeof(float), V, (size_t)g->B, cudaMemcpyDeviceToHost, g->stream));
    CUDA_CHECK(cudaStreamSynchronize(g->stream));
}

#ifndef GENERATE_NO_MAIN    // test_t6.cu and dev/cuda/decode_step.cu include this file without it
int main(int argc, char **argv) {
    return generator_main(argc, argv, "generate_t6cu: text from a T6 checkpoint, on the GPU. Without flags: from out, after the prompt on standard input.");
}
#endif
