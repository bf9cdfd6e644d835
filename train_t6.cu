// train_t6.cu: T6, the transformer of "Tensor Product Attention Is All You Need" (arXiv 2501.06425), trained on a GPU.
//
// The same model as train_t6.c, operation by operation and name by name, in bf16 (llmc/precision.cuh): the weights the model runs on,
// its activations and their gradients. Master weights, weight gradients and AdamW's moments are fp32. test_t6.cu checks it against
// train_t6.c. It reads from top to bottom:
//   memory | several ranks | the model: forward, loss, backward | update | what the training program needs
// and each operator has its own header in llmc/.
//
// Shapes, everywhere: B sequences of T tokens, N = B*T. C width, L layers, NH heads of HS numbers, D = NH*HS, F MLP width,
// V vocabulary. P: width of a token's row of factors, which make q, k and v (Heads in llmc/model.h). Dp, Fp, Pp, Vp are these
// as stored, padded with zeros. Gradients of x are called dx. Backward functions add to the gradient of the residual stream (+=);
// gradients of weights are overwritten by the first micro-batch of a step, and added to by the others.
#include "llmc/adamw.cuh"
#include "llmc/attention.cuh"
#include "llmc/attention_plain.cuh"
#include "llmc/comm.cuh"
#include "llmc/encoder.cuh"
#include "llmc/fused_classifier.cuh"
#include "llmc/heads.cuh"
#include "llmc/matmul.cuh"
#include "llmc/rmsnorm.cuh"
#include "llmc/swiglu.cuh"
#include "llmc/trainer.h"

// ---------------------------------------------------------------------------------------------------------------------
// Memory: everything is planned, printed and checked against what the GPU has before any of it is allocated.

static const int PAD = 8;                       // of P and F: 16 bytes of bf16, the least that matrix units and our loads ask for
static const int64_t CLASSIFIER_ROWS = 8192;    // tokens whose logits exist at a time

// What the backward pass computes again instead of finding it in memory (-r).
typedef enum { KEEP_ALL, RECOMPUTE_MLP, RECOMPUTE_MLP_AND_FACTORS } Recompute;

typedef struct {
    // kept from the forward to the backward pass, one slice a layer
    floatX *n1, *n2;            // (L, N, C)            normed inputs of attention and of the MLP
    float *rstd1, *rstd2;       // (L, N)
    floatX *fac;                // (L, N, Pp)           factors of q, k, v, not rotated; becomes dfac. One slice if recomputed
    floatX *y;                  // (L, N, Dp)
    float *lse;                 // (L, B, NH, T)
    floatX *u;                  // (L, N, 2 Fp)         becomes du. One slice if recomputed
    // one for all layers
    floatX *x, *nf;             // (N, C)               residual stream, normed input of the classifier
    float *rstdf;               // (N)
    floatX *q, *k, *v;          // (N, NH, HS)          k and v with the heads that are stored; rebuilt in the backward pass
    floatX *s;                  // (N, Fp)              also ds
    floatX *logits;             // (CLASSIFIER_ROWS, Vp)
    float *losses;              // (N)
    float *rope;                // (T, HS)
    // gradients
    floatX *dx, *dn;            // (N, C)
    floatX *dq, *dk, *dv, *dy;  // as q, k, v, y
    float *attention_scratch;
    int32_t *batch;             // inputs (N), targets (N), groups of the inputs (2 N + 2): llmc/encoder.cuh
} Activations;

// Small results that the host reads.
typedef struct {
    GradientNorm norm;
    double loss;                // sum of the losses so far
} Results;

struct T6 {
    Model model;
    int64_t B, T;               // the largest batch there is room for
    Recompute recompute;
    floatX *params;             // (num_stored), laid out by model.tensors
    float *master;              // (num_stored / moments.world), and so adam_m, adam_v
    float *grads;               // (num_stored); with ZeRO stage 2 wte and two layers, which take turns
    float *adam_m, *adam_v;
    float *sums;                // (num_stored / ranks) this rank's slices of all ranks' gradients; ZeRO stages 1 and 2
    float *part;                // (largest bucket / ranks) what is to be added to them; stage 2
    Slice mine, moments;        // this rank's slices of gradients; of master weights and moments, which may be all
    int zero;                   // ZeRO stage; 0 with one process
    GpuComm *comm;              // NULL: one process
    cudaEvent_t *ready, *done;  // of each bucket: its gradient is computed; the last collective on it has ended
    Activations acts;
    Results *results, *host_results;    // on the GPU; pinned
    double *norm_partial;       // (NORM_BLOCKS)
    Matmul matmul;
    cudaStream_t stream;
    int32_t *staging[2];        // pinned: batches on their way
    cudaEvent_t staged[2];      // the GPU has read them
    int next_staging;
    int32_t *counts;            // (V + 1) scratch of encoder_groups
    cudaGraphExec_t graphs[2];  // a step's first micro-batch, and its others
    int runs[2];
    int capturing;              // a graph is being recorded
    int summing, first_sum;     // the backward pass hands its gradients over; ... for the first time in this step
    int64_t micro_batches;      // a step, of all ranks
    SpikeLimits limits;
    HostWeights host;
};

typedef struct { void **pointer; size_t elements, bytes; } Buffer;
enum { NUM_BUFFERS = 35 };

static AttentionShape attention_shape(const Model *m, int64_t B, int64_t T) {
    int NH = (int)m->config.n_head, HS = (int)m->config.head_dim, NKV = heads_stored(m->k, NH);
    return AttentionShape{(int)B, (int)T, NH, NKV, HS, (int64_t)NH * HS, (int64_t)NKV * HS, (int64_t)NKV * HS};
}


static size_t batch_size(int64_t N) { return (size_t)(2 * N) + encoder_groups_size(N); }

// The table behind T6: where each pointer is and how much it needs.
static int memory_table(T6 *t, const Model *m, int64_t B, int64_t T, Recompute recompute, Buffer out[NUM_BUFFERS]) {
    const Config *c = &m->config;
    Activations *a = &t->acts;
    size_t L = c->n_layer, N = B * T, C = c->n_embd, D = m->D, Dp = m->Dp, Fp = m->Fp, Pp = m->Pp, all = m->num_stored;
    size_t X = sizeof(floatX), f = sizeof(float);
    size_t D_kv = (size_t)heads_stored(m->k, (int)c->n_head) * c->head_dim, rows = N < CLASSIFIER_ROWS ? N : CLASSIFIER_ROWS;
    size_t own = all / t->moments.world, held = t->zero == 2 ? m->layers + 2 * m->layer_stride : all;
    size_t sums = t->zero ? all / t->mine.world : 0, part = t->zero == 2 ? model_largest_bucket(m) / t->mine.world : 0;
    size_t L_u = recompute >= RECOMPUTE_MLP ? 1 : L, L_fac = recompute >= RECOMPUTE_MLP_AND_FACTORS ? 1 : L;
    const Buffer table[] = {
        // the first seven are the weights and what belongs to them
        {(void **)&t->params, all, X}, {(void **)&t->master, own, f}, {(void **)&t->grads, held, f}, {(void **)&t->sums, sums, f},
        {(void **)&t->part, part, f}, {(void **)&t->adam_m, own, f}, {(void **)&t->adam_v, own, f},
        {(void **)&a->n1, L * N * C, X}, {(void **)&a->n2, L * N * C, X}, {(void **)&a->rstd1, L * N, f}, {(void **)&a->rstd2, L * N, f},
        {(void **)&a->fac, L_fac * N * Pp, X}, {(void **)&a->y, L * N * Dp, X}, {(void **)&a->lse, L * N * c->n_head, f},
        {(void **)&a->u, L_u * N * 2 * Fp, X},
        {(void **)&a->x, N * C, X}, {(void **)&a->nf, N * C, X}, {(void **)&a->rstdf, N, f},
        {(void **)&a->q, N * D, X}, {(void **)&a->k, N * D_kv, X}, {(void **)&a->v, N * D_kv, X}, {(void **)&a->s, N * Fp, X},
        {(void **)&a->logits, rows * m->Vp, X}, {(void **)&a->losses, N, f}, {(void **)&a->rope, (size_t)(T * c->head_dim), f},
        {(void **)&a->dx, N * C, X}, {(void **)&a->dn, N * C, X},
        {(void **)&a->dq, N * D, X}, {(void **)&a->dk, N * D_kv, X}, {(void **)&a->dv, N * D_kv, X}, {(void **)&a->dy, N * Dp, X},
        {(void **)&a->attention_scratch, attention_backward_scratch_bytes(attention_shape(m, B, T)), 1},
        {(void **)&a->batch, batch_size(N), sizeof(int32_t)},
        {(void **)&t->results, 1, sizeof(Results)}, {(void **)&t->norm_partial, NORM_BLOCKS, sizeof(double)}};
    static_assert(sizeof table / sizeof *table == NUM_BUFFERS, "NUM_BUFFERS is the length of this table");
    memcpy(out, table, sizeof table);
    return NUM_BUFFERS;
}

// Bytes of buffers first to last of the table, rounded up as cudaMalloc does.
static double memory_bytes(const Buffer *table, int first, int last) {
    double bytes = 0;
    for (int i = first; i <= last; i++) bytes += (double)round_up((int64_t)(table[i].elements * table[i].bytes), 512);
    return bytes;
}

// Who has what. Stages of ZeRO mean nothing where there are no collectives.
static void share_out(T6 *t, const TrainOptions *o) {
    t->mine = {comm_rank(o->comm), comm_world(o->comm)};
    t->zero = o->gpu_comm ? (int)o->zero : 0;
    t->moments = t->zero ? t->mine : Slice{0, 1};
}

// Allocates what the model needs for batches up to o->batch_size x o->seq_len. Padding of every buffer starts at zero and stays so.
void t6_alloc(T6 *t, const TrainOptions *o) {
    const Config *config = &o->config;
    int64_t B = o->batch_size, T = o->seq_len;
    Recompute recompute = (Recompute)o->recompute;
    memset(t, 0, sizeof *t);
    model_init_shared(&t->model, config, PAD, comm_world(o->comm));
    t->B = B, t->T = T, t->recompute = recompute, t->micro_batches = o->accum, t->limits = {INFINITY, INFINITY};
    share_out(t, o);
    t->host.moments = t->moments;
    CUDA_CHECK(cudaStreamCreate(&t->stream));
    Buffer table[NUM_BUFFERS];
    memory_table(t, &t->model, B, T, recompute, table);
    for (int i = 0; i < NUM_BUFFERS; i++) {
        size_t bytes = table[i].elements * table[i].bytes;
        cudaError_t error = cudaMalloc(table[i].pointer, bytes);
        if (error == cudaErrorMemoryAllocation) {
            size_t free_bytes, total_bytes;
            CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
            die(EXIT_SYSTEM, "out of GPU memory: %.2f GiB more are needed and %.2f are free; raise --recompute (-r), or lower "
                "--batch-size (-b) or --seq-len (-t)", memory_bytes(table, i, NUM_BUFFERS - 1) / 0x1p30, (double)free_bytes / 0x1p30);
        }
        CUDA_CHECK(error);
        if (bytes) CUDA_CHECK(cudaMemsetAsync(*table[i].pointer, 0, bytes, t->stream));
    }
    matmul_init(&t->matmul);
    CUDA_CHECK(cudaMallocHost((void **)&t->host_results, sizeof(Results)));
    for (int i = 0; i < 2; i++) {
        CUDA_CHECK(cudaMallocHost((void **)&t->staging[i], batch_size(B * T) * sizeof(int32_t)));
        CUDA_CHECK(cudaEventCreateWithFlags(&t->staged[i], cudaEventDisableTiming));
    }
    t->counts = (int32_t *)xcalloc((size_t)config->vocab_size + 1, sizeof(int32_t));
    float *rope = (float *)xmalloc((size_t)(T * config->head_dim) * sizeof(float));
    rope_table(rope, T, config->head_dim, config->rope_base);
    CUDA_CHECK(cudaMemcpyAsync(t->acts.rope, rope, (size_t)(T * config->head_dim) * sizeof(float), cudaMemcpyHostToDevice, t->stream));
    CUDA_CHECK(cudaStreamSynchronize(t->stream));
    free(rope);
}

void t6_free(T6 *t) {
    Buffer table[NUM_BUFFERS];
    memory_table(t, &t->model, t->B, t->T, t->recompute, table);
    CUDA_CHECK(cudaStreamSynchronize(t->stream));
    for (int i = 0; i < NUM_BUFFERS; i++) CUDA_CHECK(cudaFree(*table[i].pointer));
    for (int i = 0; i < 2; i++) {
        if (t->graphs[i]) CUDA_CHECK(cudaGraphExecDestroy(t->graphs[i]));
        CUDA_CHECK(cudaEventDestroy(t->staged[i]));
        CUDA_CHECK(cudaFreeHost(t->staging[i]));
    }
    CUDA_CHECK(cudaFreeHost(t->host_results));
    matmul_free(&t->matmul);
    CUDA_CHECK(cudaStreamDestroy(t->stream));
    free(t->host.params), free(t->host.adam_m), free(t->host.adam_v), free(t->counts);
    model_free(&t->model);
}

// ---------------------------------------------------------------------------------------------------------------------
// Several ranks. Gradients are summed bucket by bucket (model.h) as the backward pass is done with them, on the stream of the collectives,
// beside what the backward pass goes on with. Where a sum goes depends on the ZeRO stage:
//   0: to all ranks, in grads            1: its slices to sums, after the last micro-batch            2: the same after each micro-batch
// The update works on slices (all, at stage 0); then weights are gathered bucket by bucket, and the forward pass waits for each.

// Where the gradient of bucket k is computed.
static float *bucket_gradient(T6 *t, int k) {
    const Model *m = &t->model;
    return t->grads + (t->zero < 2 || k == 0 ? model_bucket(m, k).offset : m->layers + (size_t)((k - 1) % 2) * m->layer_stride);
}

static void ranks_open(T6 *t, GpuComm *comm) {
    int n = model_buckets(&t->model);
    t->comm = comm;
    gpu_comm_reserve(comm, model_largest_bucket(&t->model));
    t->ready = (cudaEvent_t *)xcalloc(n, sizeof *t->ready), t->done = (cudaEvent_t *)xcalloc(n, sizeof *t->done);
    for (int k = 0; k < n; k++) {
        CUDA_CHECK(cudaEventCreateWithFlags(&t->ready[k], cudaEventDisableTiming));
        CUDA_CHECK(cudaEventCreateWithFlags(&t->done[k], cudaEventDisableTiming));
    }
    Bucket b = model_bucket(&t->model, 0);
    double seconds = 0;
    for (int i = 0; i < 2; i++) {       // the first sets up the connections
        double start = now_seconds();
        gpu_all_reduce(comm, bucket_gradient(t, 0), b.size / t->mine.world, "first all-reduce of GPU memory");
        gpu_comm_wait(comm, comm->stream);
        seconds = now_seconds() - start;
    }
    if (t->mine.rank == 0)
        printf("all-reduce of %.0f MiB of GPU memory: %.2f ms\n", (double)(b.size * sizeof(float)) / 0x1p20, seconds * 1e3);
}

static void ranks_close(T6 *t) {
    for (int k = 0; k < model_buckets(&t->model); k++) {
        CUDA_CHECK(cudaEventDestroy(t->ready[k]));
        CUDA_CHECK(cudaEventDestroy(t->done[k]));
    }
    free(t->ready), free(t->done);
    gpu_comm_close(t->comm);
}

// What the model's stream does next waits for the last collective on bucket k.
static void wait_for_bucket(T6 *t, int k) {
    if (t->comm && !t->capturing) CUDA_CHECK(cudaStreamWaitEvent(t->stream, t->done[k], 0));
}

// sums (n) += part (n)
__global__ void add_kernel(float *sums, const float *part, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) sums[i] += part[i];
}

// The gradient of bucket k is computed: its sum over the ranks begins.
static void sum_bucket(T6 *t, int k) {
    GpuComm *g = t->comm;
    Bucket b = model_bucket(&t->model, k);
    size_t n = b.size / t->mine.world;
    float *sums = t->sums + b.offset / t->mine.world;
    CUDA_CHECK(cudaEventRecord(t->ready[k], t->stream));
    CUDA_CHECK(cudaStreamWaitEvent(g->stream, t->ready[k], 0));
    if (t->zero == 0) gpu_all_reduce(g, bucket_gradient(t, k), n, "gradients (all-reduce)");
    else if (t->zero == 1 || t->first_sum) gpu_reduce_scatter(g, sums, bucket_gradient(t, k), n, "gradients (reduce-scatter)");
    else {
        gpu_reduce_scatter(g, t->part, bucket_gradient(t, k), n, "gradients (reduce-scatter)");
        launch(add_kernel, {(unsigned)ceil_div(n, (size_t)256), 256, 0, g->stream}, sums, (const float *)t->part, n);
    }
    CUDA_CHECK(cudaEventRecord(t->done[k], g->stream));
}

// This rank has no micro-batch in a round where sums are taken: it brings zeros, or what it has from earlier rounds.
static void sum_without_backward(T6 *t) {
    int n = model_buckets(&t->model);
    for (int k = 0; k < n; k++) wait_for_bucket(t, k);
    for (int k = n - 1; k >= 0; k--) {
        if (t->zero == 2) {
            if (k > 0 && k + 2 < n) wait_for_bucket(t, k + 2);      // whose place it takes
            CUDA_CHECK(cudaMemsetAsync(bucket_gradient(t, k), 0, model_bucket(&t->model, k).size * sizeof *t->grads, t->stream));
        }
        sum_bucket(t, k);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The model

// Sends a batch to acts.batch: inputs, targets (or NULL) of B x T, and what the embedding's backward pass wants to know of them.
void t6_batch(T6 *t, const int32_t *inputs, const int32_t *targets, int64_t B, int64_t T) {
    int64_t N = B * T;
    int slot = t->next_staging;
    t->next_staging = 1 - slot;
    CUDA_CHECK(cudaEventSynchronize(t->staged[slot]));
    int32_t *batch = t->staging[slot];
    memcpy(batch, inputs, (size_t)N * sizeof *batch);
    if (targets) memcpy(batch + N, targets, (size_t)N * sizeof *batch);
    encoder_groups(batch + 2 * N, t->counts, inputs, N, t->model.config.vocab_size);
    CUDA_CHECK(cudaMemcpyAsync(t->acts.batch, batch, batch_size(N) * sizeof *batch, cudaMemcpyHostToDevice, t->stream));
    CUDA_CHECK(cudaEventRecord(t->staged[slot], t->stream));
}

// Attention by the fast kernels where they apply, bf16 and heads of 64 or 128, and by the plain ones elsewhere. A template so that the
// fp32 build need not have the fast ones.
template <class X>
static void layer_attention_forward(X *y, float *lse, const X *q, const X *k, const X *v, const AttentionShape &s, cudaStream_t stream) {
    if constexpr (sizeof(X) == 2)
        if (s.HS == 64 || s.HS == 128) return attention_forward(y, lse, q, k, v, s, stream);
    attention_plain_forward(y, lse, q, k, v, PlainShape{s.B, s.T, s.NH, s.NKV, s.HS}, stream);
}

template <class X>
static void layer_attention_backward(X *dq, X *dk, X *dv, const X *dy, const X *y, const float *lse, const X *q, const X *k, const X *v,
                                     float *scratch, const AttentionShape &s, cudaStream_t stream) {
    if constexpr (sizeof(X) == 2)
        if (s.HS == 64 || s.HS == 128) return attention_backward(dq, dk, dv, dy, y, lse, q, k, v, scratch, s, stream);
    attention_plain_backward(dq, dk, dv, dy, y, lse, q, k, v, PlainShape{s.B, s.T, s.NH, s.NKV, s.HS}, stream);
}

// q, k and v of layer l from its factors.
static void layer_qkv(T6 *t, int64_t l, int64_t B, int64_t T) {
    Activations *a = &t->acts;
    const Model *m = &t->model;
    const floatX *fac = a->fac + (t->recompute >= RECOMPUTE_MLP_AND_FACTORS ? 0 : l) * B * T * m->Pp;
    heads_forward(a->q, a->k, a->v, fac, a->rope, heads_shape(m, T), B * T, t->stream);
}

// acts.batch (B, T) -> acts.nf (N, C), the normed input of the classifier.
void t6_forward(T6 *t, int64_t B, int64_t T) {
    const Model *m = &t->model;
    const Config *c = &m->config;
    Activations *a = &t->acts;
    Matmul *mm = &t->matmul;
    cudaStream_t stream = t->stream;
    int64_t N = B * T, C = c->n_embd, NH = c->n_head;
    AttentionShape shape = attention_shape(m, B, T);
    wait_for_bucket(t, 0);
    encoder_forward(a->x, a->batch, t->params + m->wte, N, C, stream);
    for (int64_t l = 0; l < c->n_layer; l++) {
        wait_for_bucket(t, 1 + (int)l);
        const floatX *w = t->params + m->layers + (size_t)l * m->layer_stride;
        floatX *n1 = a->n1 + l * N * C, *n2 = a->n2 + l * N * C, *y = a->y + l * N * m->Dp;
        floatX *fac = a->fac + (t->recompute >= RECOMPUTE_MLP_AND_FACTORS ? 0 : l) * N * m->Pp;
        floatX *u = a->u + (t->recompute >= RECOMPUTE_MLP ? 0 : l) * N * 2 * m->Fp;
        float *lse = a->lse + l * B * NH * T;

        rmsnorm_forward(n1, a->rstd1 + l * N, a->x, N, C, c->rms_eps, stream);
        linear_forward(mm, fac, n1, w + m->wqkv, N, C, m->Pp, OVERWRITE, stream);
        layer_qkv(t, l, B, T);
        layer_attention_forward<floatX>(y, lse, a->q, a->k, a->v, shape, stream);
        linear_forward(mm, a->x, y, w + m->wo, N, m->Dp, C, ACCUMULATE, stream);

        rmsnorm_forward(n2, a->rstd2 + l * N, a->x, N, C, c->rms_eps, stream);
        linear_forward(mm, u, n2, w + m->w12, N, C, 2 * m->Fp, OVERWRITE, stream);
        swiglu_forward(a->s, u, N, m->Fp, stream);
        linear_forward(mm, a->x, a->s, w + m->w3, N, m->Fp, C, ACCUMULATE, stream);
    }
    rmsnorm_forward(a->nf, a->rstdf, a->x, N, C, c->rms_eps, stream);
}

// Adds the N losses of the last forward pass to results->loss. dloss != 0: also the gradients behind the classifier, each loss
// weighing dloss: acts.dn (N, C) and the head's share of dwte.
void t6_loss(T6 *t, int64_t N, double dloss, MatmulMode mode) {
    const Model *m = &t->model;
    Activations *a = &t->acts;
    Matmul *mm = &t->matmul;
    int64_t C = m->config.n_embd;
    const floatX *wte = t->params + m->wte;
    for (int64_t n = 0; n < N; n += CLASSIFIER_ROWS) {
        int64_t rows = N - n < CLASSIFIER_ROWS ? N - n : CLASSIFIER_ROWS;
        linear_forward(mm, a->logits, a->nf + n * C, wte, rows, C, m->Vp, OVERWRITE, t->stream);
        fused_classifier(a->logits, a->losses + n, a->batch + N + n, rows, m->config.vocab_size, m->Vp, dloss,
                         dloss != 0 ? LOSS_AND_DLOGITS : LOSS_ONLY, t->stream);
        if (dloss == 0) continue;
        linear_backward_input(mm, a->dn + n * C, a->logits, wte, rows, C, m->Vp, t->stream);
        linear_backward_weight(mm, t->grads + m->wte, a->logits, a->nf + n * C, rows, C, m->Vp, n == 0 ? mode : ACCUMULATE, t->stream);
    }
    loss_sum(&t->results->loss, a->losses, N, t->stream);
}

// From acts.dn to the gradients of all weights, which are summed over the ranks on their way if t->summing.
void t6_backward(T6 *t, int64_t B, int64_t T, MatmulMode mode) {
    const Model *m = &t->model;
    const Config *c = &m->config;
    Activations *a = &t->acts;
    Matmul *mm = &t->matmul;
    cudaStream_t stream = t->stream;
    int64_t N = B * T, C = c->n_embd, NH = c->n_head;
    AttentionShape shape = attention_shape(m, B, T);
    CUDA_CHECK(cudaMemsetAsync(a->dx, 0, (size_t)(N * C) * sizeof *a->dx, stream));
    rmsnorm_backward(a->dx, a->dn, a->nf, a->rstdf, N, C, stream);
    for (int64_t l = c->n_layer - 1; l >= 0; l--) {
        size_t at = m->layers + (size_t)l * m->layer_stride;
        const floatX *w = t->params + at;
        float *dw = bucket_gradient(t, 1 + (int)l);
        const floatX *n1 = a->n1 + l * N * C, *n2 = a->n2 + l * N * C, *y = a->y + l * N * m->Dp;
        const float *lse = a->lse + l * B * NH * T;
        floatX *fac = a->fac + (t->recompute >= RECOMPUTE_MLP_AND_FACTORS ? 0 : l) * N * m->Pp;
        floatX *u = a->u + (t->recompute >= RECOMPUTE_MLP ? 0 : l) * N * 2 * m->Fp;
        if (t->zero == 2 && l + 2 < c->n_layer) wait_for_bucket(t, 1 + (int)l + 2);     // whose place dw takes

        if (t->recompute >= RECOMPUTE_MLP) linear_forward(mm, u, n2, w + m->w12, N, C, 2 * m->Fp, OVERWRITE, stream);
        linear_backward_input(mm, a->s, a->dx, w + m->w3, N, m->Fp, C, stream);
        swiglu_backward(u, a->s, N, m->Fp, stream);     // u is now du, and ds is s again
        linear_backward_weight(mm, dw + m->w3, a->dx, a->s, N, m->Fp, C, mode, stream);
        linear_backward_input(mm, a->dn, u, w + m->w12, N, C, 2 * m->Fp, stream);
        linear_backward_weight(mm, dw + m->w12, u, n2, N, C, 2 * m->Fp, mode, stream);
        rmsnorm_backward(a->dx, a->dn, n2, a->rstd2 + l * N, N, C, stream);

        if (t->recompute >= RECOMPUTE_MLP_AND_FACTORS) linear_forward(mm, fac, n1, w + m->wqkv, N, C, m->Pp, OVERWRITE, stream);
        linear_backward_input(mm, a->dy, a->dx, w + m->wo, N, m->Dp, C, stream);
        linear_backward_weight(mm, dw + m->wo, a->dx, y, N, m->Dp, C, mode, stream);
        layer_qkv(t, l, B, T);
        layer_attention_backward<floatX>(a->dq, a->dk, a->dv, a->dy, y, lse, a->q, a->k, a->v, a->attention_scratch, shape, stream);
        heads_backward(fac, a->dq, a->dk, a->dv, fac, a->rope, heads_shape(m, T), N, stream);   // fac is now dfac
        linear_backward_input(mm, a->dn, fac, w + m->wqkv, N, C, m->Pp, stream);
        linear_backward_weight(mm, dw + m->wqkv, fac, n1, N, C, m->Pp, mode, stream);
        if (t->summing) sum_bucket(t, 1 + (int)l);
        rmsnorm_backward(a->dx, a->dn, n1, a->rstd1 + l * N, N, C, stream);
    }
    encoder_backward(t->grads + m->wte, a->dx, a->batch, a->batch + 2 * N, N, C, stream);
    if (t->summing) sum_bucket(t, 0);
}

// Forward and backward of acts.batch. OVERWRITE begins a step: gradients and the sum of losses start anew.
void t6_micro_step(T6 *t, int64_t B, int64_t T, double dloss, MatmulMode mode) {
    if (mode == OVERWRITE) CUDA_CHECK(cudaMemsetAsync(&t->results->loss, 0, sizeof(double), t->stream));
    if (t->zero == 2) mode = OVERWRITE;     // what was there has gone to its sum
    t6_forward(t, B, T);
    t6_loss(t, B * T, dloss, mode);
    t6_backward(t, B, T, mode);
}

// ---------------------------------------------------------------------------------------------------------------------
// Update

void t6_update(T6 *t, AdamWStep step, double clip) {
    const Model *m = &t->model;
    Results *r = t->results;
    const float *grads = t->zero ? t->sums : t->grads;
    for (int k = 0; k < model_buckets(m); k++) wait_for_bucket(t, k);
    global_norm_squares(&r->norm, t->norm_partial, grads, m->num_stored / t->moments.world, t->stream);
    if (t->comm) {
        CUDA_CHECK(cudaEventRecord(t->ready[0], t->stream));
        CUDA_CHECK(cudaStreamWaitEvent(t->comm->stream, t->ready[0], 0));
        gpu_sum(t->comm, &r->loss, 1, "losses");
        if (t->zero) gpu_sum(t->comm, &r->norm.norm, 1, "norm of the gradients");
        CUDA_CHECK(cudaEventRecord(t->done[0], t->comm->stream));
        wait_for_bucket(t, 0);
    }
    global_norm_finish(&r->norm, clip, &r->loss, t->limits.loss, t->limits.norm, t->stream);
    if (!t->zero) return adamw_update(t->params, t->master, t->adam_m, t->adam_v, t->grads, m->num_stored, step, &r->norm, t->stream);
    for (int k = 0; k < model_buckets(m); k++) {
        Bucket b = model_bucket(m, k), slice = model_slice(m, t->mine, k);
        size_t at = b.offset / t->mine.world;
        adamw_update(t->params + slice.offset, t->master + at, t->adam_m + at, t->adam_v + at, t->sums + at, slice.size, step, &r->norm, t->stream);
        CUDA_CHECK(cudaEventRecord(t->ready[k], t->stream));
        CUDA_CHECK(cudaStreamWaitEvent(t->comm->stream, t->ready[k], 0));
        gpu_all_gather(t->comm, t->params + b.offset, slice.size * sizeof *t->params, "weights (all-gather)");
        CUDA_CHECK(cudaEventRecord(t->done[k], t->comm->stream));
    }
}

// Waits for all that was asked of the GPU.
Results t6_results(T6 *t) {
    CUDA_CHECK(cudaMemcpyAsync(t->host_results, t->results, sizeof(Results), cudaMemcpyDeviceToHost, t->stream));
    if (t->comm) gpu_comm_wait(t->comm, t->stream);
    CUDA_CHECK(cudaStreamSynchronize(t->stream));
    return *t->host_results;
}

// =====================================================================================================================
// What the training program (llmc/trainer.h) needs

int trainer_pad(void) { return PAD; }

// Dense bf16 peaks in TFLOP/s, from NVIDIA's datasheets; the first name that is part of the GPU's counts.
static double gpu_peak_tflops(const char *gpu) {
    static const struct { const char *name; double tflops; } table[] = {
        {"B200", 2250}, {"GB200", 2500}, {"H200", 989}, {"H100 PCIe", 756}, {"H100 NVL", 835}, {"H100", 989}, {"GH200", 989}, {"H800", 989},
        {"L40S", 362}, {"L40", 181}, {"L4", 121}, {"A100", 312}, {"A800", 312}, {"A40", 150}, {"A30", 165}, {"A10", 125},
        {"RTX 5090", 210}, {"RTX 4090", 165}, {"RTX 3090", 71}};
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (strstr(gpu, table[i].name)) return table[i].tflops;
    return 0;
}

static int current_device(void) {
    int device = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    return device;
}

void trainer_start(TrainOptions *o) {
    int count = 0, driver = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    cudaDriverGetVersion(&driver);      // 0: there is no driver
    if (error == cudaErrorInsufficientDriver && driver > 0)
        die(EXIT_SYSTEM, "the NVIDIA driver is for CUDA %d.%d and this program was built with CUDA %d.%d: install a newer driver, "
            "or build with an older toolkit",
            driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    if (error != cudaSuccess || count == 0)
        die(EXIT_SYSTEM, "no NVIDIA GPU to be used here (%s); ./train_t6 and ./generate_t6 need none",
            driver == 0 ? "no driver" : error != cudaSuccess ? cudaGetErrorString(error) : "the driver shows none");
    cudaDeviceProp gpu;
    cudaFuncAttributes kernel;
    CUDA_CHECK(cudaSetDevice(o->comm ? o->comm->local_rank % count : 0));
    CUDA_CHECK(cudaGetDeviceProperties(&gpu, current_device()));
    if (cudaFuncGetAttributes(&kernel, encoder_forward_kernel) != cudaSuccess)
        die(EXIT_SYSTEM, "this program holds no code for the %s (sm_%d%d; at least sm_80 is needed): build it on this "
            "machine, make train_t6cu", gpu.name, gpu.major, gpu.minor);
    if (o->peak_tflops == 0) o->peak_tflops = gpu_peak_tflops(gpu.name);
    if (gpu_comm_wanted(o)) o->gpu_comm = gpu_comm_open(o);
}

void trainer_describe(char *out, size_t size) {
    int driver = 0;
    cudaDeviceProp gpu;
    char library[64], nccl[32];
    cudaDriverGetVersion(&driver);
    CUDA_CHECK(cudaGetDeviceProperties(&gpu, current_device()));
    snprintf(out, size, "GPU %d, %s, driver for CUDA %d.%d, CUDA %d.%d, %s, %s", current_device(), gpu.name, driver / 1000, driver % 1000 / 10,
             CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10, comm_library(library), gpu_comm_library(nccl));
}

// What this program's kernels ask of a model, beyond what config_check knows.
static void check_model(const Model *m) {
    const Config *c = &m->config;
    if (c->n_embd % 8) die(EXIT_INPUT, "--n-embd is %" PRId64 "; on the GPU it must be a multiple of 8", c->n_embd);
    if (c->head_dim % 32 || c->head_dim > 128)
        die(EXIT_INPUT, "--head-dim is %" PRId64 "; on the GPU it must be a multiple of 32 up to 128 (64 and 128 are fast)", c->head_dim);
    HeadsShape shape = heads_shape(m, 1);
    int have = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    size_t need = heads_backward_smem_bytes(&shape);
    if (need > (size_t)have)
        die(EXIT_INPUT, "a token's factors and heads take %zu bytes and a multiprocessor of this GPU has %d: lower --n-head or the ranks",
            need, have);
}

void trainer_plan(const TrainOptions *o, const Model *m, Logger *log) {
    check_model(m);
    static T6 unused;
    Buffer table[NUM_BUFFERS];
    share_out(&unused, o);
    memory_table(&unused, m, o->batch_size, o->seq_len, (Recompute)o->recompute, table);
    size_t free_bytes, total_bytes;
    cudaDeviceProp gpu;
    CUDA_CHECK(cudaGetDeviceProperties(&gpu, current_device()));
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    double GiB = 0x1p30, weights = memory_bytes(table, 0, 1), grads = memory_bytes(table, 2, 4), moments = memory_bytes(table, 5, 6);
    double acts = memory_bytes(table, 7, NUM_BUFFERS - 1), workspace = (double)MATMUL_WORKSPACE_BYTES;
    double need = weights + grads + moments + acts + workspace;
    logger_printf(log, "GPU: %s, %d multiprocessors, %.1f GiB, bf16 peak %.0f TFLOP/s; numbers are " PRECISION_NAME "\n", gpu.name,
                  gpu.multiProcessorCount, (double)total_bytes / GiB, o->peak_tflops);
    logger_printf(log, "memory: weights %.2f + gradients %.2f + AdamW %.2f + activations %.2f + workspace %.2f = %.2f GiB of %.2f free\n",
                  weights / GiB, grads / GiB, moments / GiB, acts / GiB, workspace / GiB, need / GiB, (double)free_bytes / GiB);
    if (need > (double)free_bytes)
        die(EXIT_INPUT, "this run needs %.1f GiB of the GPU's memory and %.1f are free: raise --recompute (-r, now %d of 2), "
            "lower --batch-size (-b, now %" PRId64 ") or --seq-len (-t), or take a smaller --model (-e)", need / GiB,
            (double)free_bytes / GiB, (int)o->recompute, o->batch_size);
}

T6 *trainer_open(const TrainOptions *o) {
    T6 *t = (T6 *)xmalloc(sizeof *t);
    t6_alloc(t, o);
    if (o->gpu_comm) ranks_open(t, (GpuComm *)o->gpu_comm);
    return t;
}

void trainer_close(T6 *t) {
    if (t->comm) ranks_close(t);
    t6_free(t);
    free(t);
}

const Model *trainer_model(T6 *t) { return &t->model; }

// Weights are whole on every rank's host; of master weights a rank has its slices, and brings them.
HostWeights trainer_host_weights(T6 *t, int read) {
    const Model *m = &t->model;
    size_t own = m->num_stored / t->moments.world;
    float **host[3] = {&t->host.params, &t->host.adam_m, &t->host.adam_v}, *gpu[3] = {t->master, t->adam_m, t->adam_v};
    for (int i = 0; i < 3; i++) {
        if (!*host[i]) *host[i] = (float *)xcalloc(i == 0 ? m->num_stored : own, sizeof(float));
        if (i > 0 && read) CUDA_CHECK(cudaMemcpyAsync(*host[i], gpu[i], own * sizeof(float), cudaMemcpyDeviceToHost, t->stream));
    }
    for (int k = 0; read && k < model_buckets(m); k++) {
        Bucket b = model_bucket(m, k), slice = model_slice(m, t->moments, k);
        CUDA_CHECK(cudaMemcpyAsync(t->host.params + slice.offset, t->master + b.offset / t->moments.world, slice.size * sizeof(float),
                                   cudaMemcpyDeviceToHost, t->stream));
        CUDA_CHECK(cudaStreamSynchronize(t->stream));
        if (t->zero) comm_all_gather(t->comm->comm, t->host.params + b.offset, slice.size, "master weights");
    }
    CUDA_CHECK(cudaStreamSynchronize(t->stream));
    return t->host;
}

__global__ void round_weights_kernel(floatX *params, const float *master, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) params[i] = (floatX)master[i];
}

// Bucket by bucket, through the bucket's gradient, which nobody needs now.
void trainer_take_weights(T6 *t, int moments) {
    const Model *m = &t->model;
    size_t own = m->num_stored / t->moments.world * sizeof(float);
    for (int k = 0; k < model_buckets(m); k++) {
        Bucket b = model_bucket(m, k), slice = model_slice(m, t->moments, k);
        float *whole = bucket_gradient(t, k);
        CUDA_CHECK(cudaMemcpyAsync(whole, t->host.params + b.offset, b.size * sizeof(float), cudaMemcpyHostToDevice, t->stream));
        launch(round_weights_kernel, {(unsigned)ceil_div(b.size, (size_t)256), 256, 0, t->stream}, t->params + b.offset, whole, b.size);
        CUDA_CHECK(cudaMemcpyAsync(t->master + b.offset / t->moments.world, whole + (slice.offset - b.offset), slice.size * sizeof(float),
                                   cudaMemcpyDeviceToDevice, t->stream));
    }
    if (moments) {
        CUDA_CHECK(cudaMemcpyAsync(t->adam_m, t->host.adam_m, own, cudaMemcpyHostToDevice, t->stream));
        CUDA_CHECK(cudaMemcpyAsync(t->adam_v, t->host.adam_v, own, cudaMemcpyHostToDevice, t->stream));
    }
    CUDA_CHECK(cudaStreamSynchronize(t->stream));
}

double trainer_loss(T6 *t, const int32_t *inputs, const int32_t *targets, int64_t B) {
    t6_batch(t, inputs, targets, B, t->T);
    CUDA_CHECK(cudaMemsetAsync(&t->results->loss, 0, sizeof(double), t->stream));
    t6_forward(t, B, t->T);
    t6_loss(t, B * t->T, 0, OVERWRITE);
    return t6_results(t).loss;
}

// The first run of each mode is a plain one, in which the matrix products choose their algorithms; from the second on it is one graph. So
// are all runs that sum over ranks: collectives may wait on the host.
void trainer_micro_step(T6 *t, const int32_t *inputs, const int32_t *targets, double dloss, int64_t k) {
    MatmulMode mode = k == 0 ? OVERWRITE : ACCUMULATE;
    cudaGraphExec_t *graph = &t->graphs[mode];
    t->summing = t->comm && (t->zero == 2 || (k + 1) * t->mine.world >= t->micro_batches), t->first_sum = k == 0;
    if (!inputs) {      // others have one, and this rank's share of the sums is due
        if (k == 0) CUDA_CHECK(cudaMemsetAsync(&t->results->loss, 0, sizeof(double), t->stream));
        if (k == 0 && t->zero < 2) CUDA_CHECK(cudaMemsetAsync(t->grads, 0, t->model.num_stored * sizeof *t->grads, t->stream));
        return sum_without_backward(t);
    }
    t6_batch(t, inputs, targets, t->B, t->T);
    if (t->runs[mode]++ == 0 || t->summing) {
        t6_micro_step(t, t->B, t->T, dloss, mode);
        return;
    }
    if (!*graph) {
        cudaGraph_t captured;
        t->capturing = 1;
        CUDA_CHECK(cudaStreamBeginCapture(t->stream, cudaStreamCaptureModeThreadLocal));
        t6_micro_step(t, t->B, t->T, dloss, mode);
        CUDA_CHECK(cudaStreamEndCapture(t->stream, &captured));
        CUDA_CHECK(cudaGraphInstantiateWithFlags(graph, captured, 0));
        CUDA_CHECK(cudaGraphDestroy(captured));
        t->capturing = 0;
    }
    for (int i = 0; i < model_buckets(&t->model); i++) wait_for_bucket(t, i);
    CUDA_CHECK(cudaGraphLaunch(*graph, t->stream));
}

void trainer_limits(T6 *t, SpikeLimits limits) { t->limits = limits; }

void trainer_update(T6 *t, const TrainOptions *o, double lr, int64_t step, double *loss, double *norm) {
    t6_update(t, adamw_step(lr, o->beta1, o->beta2, o->adam_eps, o->weight_decay, step), o->clip);
    Results r = t6_results(t);
    *loss = r.loss, *norm = r.norm.norm;
}

// Causal attention sees no token after the n-th: the rest of the sequence may be anything, and every call has the same shapes.
void trainer_logits(T6 *t, float *logits, const int32_t *ids, int64_t n) {
    const Model *m = &t->model;
    int64_t C = m->config.n_embd;
    int32_t *sequence = (int32_t *)xcalloc((size_t)t->T, sizeof *sequence);
    floatX *row = (floatX *)xmalloc((size_t)m->Vp * sizeof *row);
    memcpy(sequence, ids, (size_t)n * sizeof *ids);
    t6_batch(t, sequence, NULL, 1, t->T);
    t6_forward(t, 1, t->T);
    linear_forward(&t->matmul, t->acts.logits, t->acts.nf + (n - 1) * C, t->params + m->wte, 1, C, m->Vp, OVERWRITE, t->stream);
    CUDA_CHECK(cudaMemcpyAsync(row, t->acts.logits, (size_t)m->Vp * sizeof *row, cudaMemcpyDeviceToHost, t->stream));
    CUDA_CHECK(cudaStreamSynchronize(t->stream));
    for (int64_t i = 0; i < m->config.vocab_size; i++) logits[i] = (float)row[i];
    free(row), free(sequence);
}

#ifndef T6_NO_MAIN      // test_t6.cu includes this file without it
int main(int argc, char **argv) {
    return trainer_main(argc, argv, "train_t6cu: trains T6, the tensor product attention transformer, on a GPU. Without flags: "
                                    "tiny, on the toy corpus.");
}
#endif
