// train_t6.cu: T6, the transformer of "Tensor Product Attention Is All You Need" (arXiv 2501.06425), trained on a GPU.
//
// The model of train_t6.c in the same order with the same names. Tensor product attention makes the queries, keys and
// values of a token from R head factors a_r (NH) and R token factors b_r (HSK, for v HSV), all linear in its normed
// vector n; R is RQ, RK or RV:
//
//     q = 1/RQ sum_r aQ_r (x) rope(bQ_r)      k = 1/RK sum_r aK_r (x) rope(bK_r)      v = 1/RV sum_r aV_r (x) bV_r
//     y = softmax(q k^T / sqrt(HSK), causal) v, head by head
//     x += y Wo^T
// then the MLP (SwiGLU):  x += (silu(n W1^T) * (n W2^T)) W3^T
// and after the last layer, with the embedding as output weights:  logits = n wte^T
//
// All factors of a token are one row of one matrix product, n Wqkv^T:
//
//     |   aQ    |    bQ    |   aK    |    bK    |   aV    |    bV    | pad |
//     | NH x RQ | RQ x HSK | NH x RK | RK x HSK | NH x RV | RV x HSV |     |      P numbers, stored as Pp
//
// Variants of TPA make that row from another one (factors.cuh); MLA makes q, k and v in its own way (latent.cuh).
//
// Weights, activations and their gradients are bf16 (floatX of llmc/precision.cuh); master weights, gradients of
// weights and AdamW's moments are fp32. test_t6.cu checks all of it against train_t6.c. Each operator has its own
// header in llmc/. Reading order:
//     memory | several ranks | the model | update | the training program
//
// Shapes:  B sequences of T tokens, N = B*T      C width       L layers          F MLP width        V vocabulary
//          NH heads                              HSK numbers of a query/key head, HSV of a value head, D = NH*HSV
//          RQ, RK, RV ranks of q, k, v           P width of a projected row      Dp, Fp, Pp, Vp: as stored, zero-padded
//                                                PFp width of a variant's factor row, as stored
// The gradient of x is dx. Backward functions add to the gradient of the residual stream (+=). The first micro-batch
// of a step overwrites the gradients of weights, and the others add to them.
#include "llmc/adamw.cuh"
#include "llmc/attention.cuh"
#include "llmc/attention_plain.cuh"
#include "llmc/checkpoint.h"
#include "llmc/comm.cuh"
#include "llmc/elementwise.cuh"
#include "llmc/encoder.cuh"
#include "llmc/factors.cuh"
#include "llmc/fused_classifier.cuh"
#include "llmc/gpu.cuh"
#include "llmc/heads.cuh"
#include "llmc/latent.cuh"
#include "llmc/matmul.cuh"
#include "llmc/rmsnorm.cuh"
#include "llmc/score.cuh"
#include "llmc/spikes.h"
#include "llmc/swiglu.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// Memory: planned, printed and checked against what the GPU has before any of it is allocated.

// P, F and D are stored in multiples of PAD: 16 bytes of bf16, the least that matrix units and our loads need.
static const int PAD = 8;
static const int64_t CLASSIFIER_ROWS = 8192;    // tokens whose logits exist at a time

// What the backward pass recomputes instead of keeping (-r): each level also what those before it do.
typedef enum { RECOMPUTE_NOTHING = -1, RECOMPUTE_HEADS, RECOMPUTE_MLP, RECOMPUTE_FACTORS } Recompute;

// What lies between a layer's projected rows and attention. Empty where a kind has no use for it. In training there
// is one slice per layer, or one in all if recomputed.
typedef struct {
    floatX *fac;                // (N, PFp)             factor rows of variants; become dfac
    floatX *q, *k, *v;          // (N, heads_stored, HSK), (N, heads_stored, HSV) twice, but for mla's k and v:
    floatX *kv, *kr;            // (N, NH, 2 HSV), (N, HSR)     of each head, its own part of k and its v; what all
                                //                      heads of k share. As a gradient, kr is (N, NH, HSR)
    float *rstdq, *rstdk;       // (N, heads_stored)    qk_norm's; mla's latents': (N) twice
    floatX *latq, *latkv;       // (N, q_lora), (N, kv_lora)    mla: normed latents
    float *rope_q, *rope_k;     // (T, HSR) of q and of k: not the same where k is of third order and q is not
} HeadBuffers;

typedef struct {
    // kept from the forward to the backward pass, one slice per layer
    floatX *n1, *n2;            // (L, N, C)            normed inputs of attention and of the MLP
    float *rstd1, *rstd2;       // (L, N)
    floatX *proj;               // (L, N, Pp)           projected rows, not rotated; but for variants' they become
                                //                      dproj. One slice if recomputed
    floatX *y;                  // (L, N, Dp)           with out_gate, gated
    float *lse;                 // (L, B, NH, T)
    floatX *u;                  // (L, N, 2 Fp)         n2 W1^T and n2 W2^T; become du. One slice if recomputed
    HeadBuffers heads;
    // one for all layers
    floatX *x, *nf;             // (N, C)               residual stream, normed input of the classifier
    float *rstdf;               // (N)
    floatX *s;                  // (N, Fp)              also ds
    floatX *logits;             // (CLASSIFIER_ROWS, Vp)
    float *losses;              // (N)
    GpuScore *scores;           // (score_rows_at_once)
    // gradients
    floatX *dx, *dn;            // (N, C)
    floatX *dy;                 // as y
    HeadBuffers dheads;         // one slice, without fac
    floatX *dproj;              // (N, Pp)              of variants
    float *columns;             // (COLUMN_BLOCKS, widest)      partial sums of columns of dfac, dlatq or dlatkv
    float *attention_scratch;   // (attention_backward_scratch_bytes)
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
    float *master;              // (num_stored / moments.world), as adam_m and adam_v
    float *grads;               // (num_stored); with ZeRO stage 2 wte and two layers, which take turns
    float *adam_m, *adam_v;
    float *sums;                // (num_stored / ranks) this rank's slices of all ranks' gradients; ZeRO stages 1 and 2
    float *part;                // (largest bucket / ranks) received slices, to be added to sums; stage 2
    Slice mine, moments;        // this rank's slices of gradients; of master weights and moments, which may be all
    int zero;                   // ZeRO stage; 0 with one process
    int forward_only;           // 1: there are no adam_m and adam_v
    GpuComm *comm;              // NULL: one process
    cudaEvent_t *ready, *done;  // of each bucket: its gradient is computed; the last collective on it has ended
    Activations acts;
    Results *results, *host_results;    // on the GPU; pinned
    double *norm_partial;       // (NORM_BLOCKS)
    Matmul matmul;
    cudaStream_t stream;
    int32_t *staging[2];        // pinned: batches on their way to the GPU
    cudaEvent_t staged[2];      // the GPU has read them
    int next_staging;
    int32_t *counts;            // (V + 1) scratch of encoder_groups
    cudaGraphExec_t graphs[2];  // by OutputMode: of a step's first micro-batch, and of its others
    int runs[2];
    int capturing;              // a graph is being recorded
    int summing, first_sum;     // the backward pass sums gradients over the ranks; for the first time in this step
    int64_t micro_batches;      // per step, of all ranks
    SpikeLimits limits;
    HostWeights host;
};

// Heads of q, k and v as stored: grouped heads are stored once per group.
static AttentionShape attention_shape(const Model *m, int64_t B, int64_t T) {
    int64_t NH = m->config.n_head;
    AttentionShape s = attention_dense_shape(B, T, NH, heads_stored(m->k, (int)NH), m->HSK, m->HSV);
    s.gate_stride = m->Pp;
    if (m->config.attn == ATTN_MLA) s.k_stride = s.v_stride = 2 * m->D, s.kv_head_stride = 2 * m->HSV;
    return s;
}

static AttentionHeads<floatX> attention_heads(const HeadBuffers *h, const Model *m) {
    if (m->config.attn == ATTN_MLA) return {h->q, h->kv, h->kv + m->HSV, h->kr};
    return {h->q, h->k, h->v};
}

static size_t batch_size(int64_t N) { return (size_t)(2 * N) + encoder_groups_size(N); }

// Rows of acts.logits for batches of N tokens, and how many tokens are scored at a time: their logits are fp32.
static int64_t logits_rows(int64_t N) { return N > CLASSIFIER_ROWS ? CLASSIFIER_ROWS : N < 2 ? 2 : N; }
static int64_t score_rows_at_once(int64_t N) {
    return logits_rows(N) * (int64_t)sizeof(floatX) / (int64_t)sizeof(float);
}

enum { NUM_BUFFERS = 50, NUM_WEIGHT_BUFFERS = 7 };

// Numbers of one token in a layer's HeadBuffers.
typedef struct { size_t fac, q, k, v, kv, kr, rstdq, rstdk, latq, latkv; } HeadSizes;

static HeadSizes head_sizes(const Model *m) {
    const Config *c = &m->config;
    bool latent = c->attn == ATTN_MLA;
    size_t NH = c->n_head, NKV = heads_stored(m->k, (int)NH);
    HeadSizes s = {};
    if (!latent && !m->is_projected) s.fac = m->PFp;
    s.q = NH * m->HSK;
    if (latent) s.kv = 2 * m->D, s.kr = m->HSR, s.rstdq = s.rstdk = 1, s.latq = c->q_lora, s.latkv = c->kv_lora;
    else s.k = s.v = NKV * m->HSV;
    if (c->qk_norm) s.rstdq = heads_stored(m->q, (int)NH), s.rstdk = NKV;
    return s;
}

// The table of T6's buffers: each pointer with its size. The first NUM_WEIGHT_BUFFERS are weights, gradients and
// AdamW's state.
static void memory_table(T6 *t6, const Model *m, int64_t B, int64_t T, Recompute recompute, Buffer out[NUM_BUFFERS]) {
    const Config *c = &m->config;
    Activations *acts = &t6->acts;
    size_t X = sizeof(floatX), f = sizeof(float), world = t6->mine.world;
    size_t all = m->num_stored, own = all / t6->moments.world;
    size_t held = t6->zero == 2 ? m->layers + 2 * m->layer_stride : all;
    size_t sums = t6->zero ? all / world : 0, part = t6->zero == 2 ? model_largest_bucket(m) / world : 0;
    size_t L = c->n_layer, N = B * T, C = c->n_embd, Dp = m->Dp, Fp = m->Fp, Pp = m->Pp;
    size_t rows = logits_rows(N), moments = t6->forward_only ? 0 : own;
    size_t N_heads = recompute >= RECOMPUTE_HEADS ? N : L * N;
    size_t L_u = recompute >= RECOMPUTE_MLP ? 1 : L, L_proj = recompute >= RECOMPUTE_FACTORS ? 1 : L;
    HeadBuffers *h = &acts->heads, *dh = &acts->dheads;
    HeadSizes each = head_sizes(m);
    size_t dproj = each.fac ? N * Pp : 0;
    size_t widest = each.fac > each.latq ? each.fac : each.latq > each.latkv ? each.latq : each.latkv;
    const Buffer table[] = {
        {(void **)&t6->params, all, X}, {(void **)&t6->master, own, f}, {(void **)&t6->grads, held, f},
        {(void **)&t6->sums, sums, f}, {(void **)&t6->part, part, f}, {(void **)&t6->adam_m, moments, f},
        {(void **)&t6->adam_v, moments, f},

        {(void **)&acts->n1, L * N * C, X}, {(void **)&acts->n2, L * N * C, X}, {(void **)&acts->rstd1, L * N, f},
        {(void **)&acts->rstd2, L * N, f}, {(void **)&acts->proj, L_proj * N * Pp, X},
        {(void **)&acts->y, L * N * Dp, X},
        {(void **)&acts->lse, L * N * c->n_head, f}, {(void **)&acts->u, L_u * N * 2 * Fp, X},

        {(void **)&h->fac, N_heads * each.fac, X}, {(void **)&h->q, N_heads * each.q, X},
        {(void **)&h->k, N_heads * each.k, X}, {(void **)&h->v, N_heads * each.v, X},
        {(void **)&h->kv, N_heads * each.kv, X}, {(void **)&h->kr, N_heads * each.kr, X},
        {(void **)&h->rstdq, N_heads * each.rstdq, f}, {(void **)&h->rstdk, N_heads * each.rstdk, f},
        {(void **)&h->latq, N_heads * each.latq, X}, {(void **)&h->latkv, N_heads * each.latkv, X},
        {(void **)&h->rope_q, (size_t)(T * m->q.HSR), f}, {(void **)&h->rope_k, (size_t)(T * m->k.HSR), f},

        {(void **)&acts->x, N * C, X}, {(void **)&acts->nf, N * C, X}, {(void **)&acts->rstdf, N, f},
        {(void **)&acts->s, N * Fp, X}, {(void **)&acts->logits, rows * m->Vp, X}, {(void **)&acts->losses, N, f},
        {(void **)&acts->scores, (size_t)score_rows_at_once(N), sizeof(GpuScore)},

        {(void **)&acts->dx, N * C, X}, {(void **)&acts->dn, N * C, X}, {(void **)&acts->dy, N * Dp, X},
        {(void **)&dh->q, N * each.q, X}, {(void **)&dh->k, N * each.k, X}, {(void **)&dh->v, N * each.v, X},
        {(void **)&dh->kv, N * each.kv, X}, {(void **)&dh->kr, N * c->n_head * each.kr, X},
        {(void **)&dh->latq, N * each.latq, X}, {(void **)&dh->latkv, N * each.latkv, X},
        {(void **)&acts->dproj, dproj, X}, {(void **)&acts->columns, COLUMN_BLOCKS * widest, f},
        {(void **)&acts->attention_scratch, attention_backward_scratch_bytes(attention_shape(m, B, T)), 1},
        {(void **)&acts->batch, batch_size(N), sizeof(int32_t)},
        {(void **)&t6->results, 1, sizeof(Results)}, {(void **)&t6->norm_partial, NORM_BLOCKS, sizeof(double)},
    };
    static_assert(sizeof table / sizeof *table == NUM_BUFFERS, "NUM_BUFFERS is the length of this table");
    memcpy(out, table, sizeof table);
}

// Which slices this rank has. ZeRO stages mean nothing where there are no collectives.
static void share_out(T6 *t6, const TrainOptions *o) {
    t6->mine = {comm_rank(o->comm), comm_world(o->comm)};
    t6->zero = o->gpu_comm ? (int)o->zero : 0;
    t6->moments = t6->zero ? t6->mine : Slice{0, 1};
    t6->forward_only = o->forward_only;
}

// table (T, HSR) on the GPU: rope_table's.
static void upload_rope_table(float *table, int64_t T, int64_t HSR, double base, cudaStream_t stream) {
    size_t bytes = (size_t)(T * HSR) * sizeof(float);
    float *host = (float *)xmalloc(bytes);
    rope_table(host, T, HSR, base);
    CUDA_CHECK(cudaMemcpyAsync(table, host, bytes, cudaMemcpyHostToDevice, stream));
    CUDA_CHECK(cudaStreamSynchronize(stream));
    free(host);
}

// Allocates what the model needs for batches up to o->batch_size x o->seq_len. Padding of every buffer starts at zero
// and stays zero.
void t6_alloc(T6 *t6, const TrainOptions *o) {
    const Config *config = &o->config;
    int64_t B = o->batch_size, T = o->seq_len;
    memset(t6, 0, sizeof *t6);
    model_init_shared(&t6->model, config, PAD, comm_world(o->comm));
    t6->B = B, t6->T = T, t6->recompute = (Recompute)o->recompute;
    t6->micro_batches = o->accum, t6->limits = {INFINITY, INFINITY};
    share_out(t6, o);
    t6->host.moments = t6->moments;
    CUDA_CHECK(cudaStreamCreate(&t6->stream));
    Buffer table[NUM_BUFFERS];
    memory_table(t6, &t6->model, B, T, t6->recompute, table);
    memory_alloc(table, NUM_BUFFERS, "raise --recompute (-r), or lower --batch-size (-b) or --seq-len (-t)",
                 t6->stream);
    matmul_init(&t6->matmul);
    CUDA_CHECK(cudaMallocHost((void **)&t6->host_results, sizeof(Results)));
    for (int i = 0; i < 2; i++) {
        CUDA_CHECK(cudaMallocHost((void **)&t6->staging[i], batch_size(B * T) * sizeof(int32_t)));
        CUDA_CHECK(cudaEventCreateWithFlags(&t6->staged[i], cudaEventDisableTiming));
    }
    t6->counts = (int32_t *)xcalloc((size_t)config->vocab_size + 1, sizeof(int32_t));
    upload_rope_table(t6->acts.heads.rope_q, T, t6->model.q.HSR, config->rope_base, t6->stream);
    upload_rope_table(t6->acts.heads.rope_k, T, t6->model.k.HSR, config->rope_base, t6->stream);
}

void t6_free(T6 *t6) {
    Buffer table[NUM_BUFFERS];
    memory_table(t6, &t6->model, t6->B, t6->T, t6->recompute, table);
    CUDA_CHECK(cudaStreamSynchronize(t6->stream));
    memory_free(table, NUM_BUFFERS);
    for (int i = 0; i < 2; i++) {
        if (t6->graphs[i]) CUDA_CHECK(cudaGraphExecDestroy(t6->graphs[i]));
        CUDA_CHECK(cudaEventDestroy(t6->staged[i]));
        CUDA_CHECK(cudaFreeHost(t6->staging[i]));
    }
    CUDA_CHECK(cudaFreeHost(t6->host_results));
    matmul_free(&t6->matmul);
    CUDA_CHECK(cudaStreamDestroy(t6->stream));
    free(t6->host.params), free(t6->host.adam_m), free(t6->host.adam_v), free(t6->counts);
    model_free(&t6->model);
}

// ---------------------------------------------------------------------------------------------------------------------
// Several ranks. Each bucket's gradient (model.h) is summed over the ranks once the backward pass has computed it, on
// the stream of the collectives, while the backward pass continues. Where the sum goes depends on the ZeRO stage:
//   0: to all ranks, in grads
//   1: the rank's slices to sums, after the last micro-batch
//   2: the same, after each micro-batch
// The update works on slices (at stage 0 on everything). Then weights are gathered bucket by bucket, and the forward
// pass waits for each bucket as it needs it.

// Where the gradient of bucket k is computed.
static float *bucket_gradient(T6 *t6, int k) {
    const Model *m = &t6->model;
    if (t6->zero < 2 || k == 0) return t6->grads + model_bucket(m, k).offset;
    return t6->grads + m->layers + (size_t)((k - 1) % 2) * m->layer_stride;
}

static void ranks_open(T6 *t6, GpuComm *comm) {
    int n = model_buckets(&t6->model);
    t6->comm = comm;
    gpu_comm_reserve(comm, model_largest_bucket(&t6->model));
    t6->ready = (cudaEvent_t *)xcalloc(n, sizeof *t6->ready), t6->done = (cudaEvent_t *)xcalloc(n, sizeof *t6->done);
    for (int k = 0; k < n; k++) {
        CUDA_CHECK(cudaEventCreateWithFlags(&t6->ready[k], cudaEventDisableTiming));
        CUDA_CHECK(cudaEventCreateWithFlags(&t6->done[k], cudaEventDisableTiming));
    }
    Bucket b = model_bucket(&t6->model, 0);
    double seconds = 0;
    for (int i = 0; i < 2; i++) {       // the first sets up the connections
        double start = now_seconds();
        gpu_all_reduce(comm, bucket_gradient(t6, 0), b.size / t6->mine.world, "first all-reduce of GPU memory");
        gpu_comm_wait(comm, comm->stream);
        seconds = now_seconds() - start;
    }
    if (t6->mine.rank == 0)
        printf("all-reduce of %.0f MiB of GPU memory: %.2f ms\n", (double)(b.size * sizeof(float)) / 0x1p20,
               seconds * 1e3);
}

static void ranks_close(T6 *t6) {
    for (int k = 0; k < model_buckets(&t6->model); k++) {
        CUDA_CHECK(cudaEventDestroy(t6->ready[k]));
        CUDA_CHECK(cudaEventDestroy(t6->done[k]));
    }
    free(t6->ready), free(t6->done);
    gpu_comm_close(t6->comm);
}

// Makes the model's stream wait for the last collective on bucket k.
static void wait_for_bucket(T6 *t6, int k) {
    if (t6->comm && !t6->capturing) CUDA_CHECK(cudaStreamWaitEvent(t6->stream, t6->done[k], 0));
}

// Makes the stream of the collectives wait for what the model's stream has done so far, for bucket k.
static void hand_over_bucket(T6 *t6, int k) {
    CUDA_CHECK(cudaEventRecord(t6->ready[k], t6->stream));
    CUDA_CHECK(cudaStreamWaitEvent(t6->comm->stream, t6->ready[k], 0));
}

// Starts the sum of bucket k's gradient over the ranks.
static void sum_bucket(T6 *t6, int k) {
    GpuComm *comm = t6->comm;
    Bucket b = model_bucket(&t6->model, k);
    size_t n = b.size / t6->mine.world;
    float *sums = t6->sums + b.offset / t6->mine.world, *gradient = bucket_gradient(t6, k);
    hand_over_bucket(t6, k);
    if (t6->zero == 0) gpu_all_reduce(comm, gradient, n, "gradients (all-reduce)");
    else if (t6->zero == 1 || t6->first_sum) gpu_reduce_scatter(comm, sums, gradient, n, "gradients (reduce-scatter)");
    else {
        gpu_reduce_scatter(comm, t6->part, gradient, n, "gradients (reduce-scatter)");
        add(sums, t6->part, n, comm->stream);
    }
    CUDA_CHECK(cudaEventRecord(t6->done[k], comm->stream));
}

// For a rank without a micro-batch in a round that is summed: it contributes zeros, or what it has from earlier rounds.
static void sum_without_backward(T6 *t6) {
    int n = model_buckets(&t6->model);
    for (int k = 0; k < n; k++) wait_for_bucket(t6, k);
    for (int k = n - 1; k >= 0; k--) {
        if (t6->zero == 2) {
            if (k > 0 && k + 2 < n) wait_for_bucket(t6, k + 2);     // which shares its memory
            size_t bytes = model_bucket(&t6->model, k).size * sizeof *t6->grads;
            CUDA_CHECK(cudaMemsetAsync(bucket_gradient(t6, k), 0, bytes, t6->stream));
        }
        sum_bucket(t6, k);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The model. Only qkv_forward, qkv_backward and attention_shape depend on the attention kind, through Heads.

// Sends a batch to acts.batch: inputs and targets (B, T), targets may be NULL, and the groups that encoder_backward
// needs.
void t6_batch(T6 *t6, const int32_t *inputs, const int32_t *targets, int64_t B, int64_t T) {
    int64_t N = B * T;
    int slot = t6->next_staging;
    t6->next_staging = 1 - slot;
    CUDA_CHECK(cudaEventSynchronize(t6->staged[slot]));
    int32_t *batch = t6->staging[slot];
    memcpy(batch, inputs, (size_t)N * sizeof *batch);
    if (targets) memcpy(batch + N, targets, (size_t)N * sizeof *batch);
    encoder_groups(batch + 2 * N, t6->counts, inputs, N, t6->model.config.vocab_size);
    size_t bytes = batch_size(N) * sizeof *batch;
    CUDA_CHECK(cudaMemcpyAsync(t6->acts.batch, batch, bytes, cudaMemcpyHostToDevice, t6->stream));
    CUDA_CHECK(cudaEventRecord(t6->staged[slot], t6->stream));
}

static floatX *const NO_GATE = NULL;

// Attention by the fast kernels where they apply, bf16 and the head sizes of attention_is_fast, and by the plain ones
// elsewhere. gate may be NO_GATE. A template so that the fp32 build does not need the fast ones.
template <class X>
static void layer_attention_forward(X *y, float *lse, const AttentionHeads<X> &heads, const X *gate,
                                    const AttentionShape &s, cudaStream_t stream) {
    if constexpr (sizeof(X) == 2)
        if (attention_is_fast(s)) return attention_forward(y, lse, heads, gate, s, stream);
    attention_plain_forward(y, lse, heads, gate, s, stream);
}

// With a gate, y is gated and dy is its gradient, which this overwrites. dgate may be gate, or NO_GATE as well.
template <class X>
static void layer_attention_backward(const AttentionHeads<X> &gradient, X *dgate, X *dy, const X *y, const float *lse,
                                     const AttentionHeads<X> &heads, const X *gate, float *scratch,
                                     const AttentionShape &s, cudaStream_t stream) {
    if constexpr (sizeof(X) == 2)
        if (attention_is_fast(s))
            return attention_backward(gradient, dgate, dy, y, lse, heads, gate, scratch, s, stream);
    attention_plain_backward(gradient, dgate, dy, y, lse, heads, gate, scratch, s, stream);
}

// NEW_ROWS: projected from the layer's normed input. KEPT_ROWS: those that the forward pass kept.
typedef enum { NEW_ROWS, KEPT_ROWS } RowSource;

// The projected rows of layer l (N, Pp), and the input of its SwiGLU (N, 2 Fp): one slice for all layers if recomputed.
static floatX *layer_rows(T6 *t6, int64_t l, int64_t N) {
    return t6->acts.proj + (t6->recompute >= RECOMPUTE_FACTORS ? 0 : l) * N * t6->model.Pp;
}
static floatX *layer_u(T6 *t6, int64_t l, int64_t N) {
    return t6->acts.u + (t6->recompute >= RECOMPUTE_MLP ? 0 : l) * N * 2 * t6->model.Fp;
}

static HeadBuffers layer_heads(const T6 *t6, int64_t l, int64_t N) {
    HeadBuffers h = t6->acts.heads;
    HeadSizes each = head_sizes(&t6->model);
    size_t at = t6->recompute >= RECOMPUTE_HEADS ? 0 : (size_t)(l * N);
    h.fac += at * each.fac, h.q += at * each.q, h.k += at * each.k, h.v += at * each.v;
    h.kv += at * each.kv, h.kr += at * each.kr;
    h.rstdq += at * each.rstdq, h.rstdk += at * each.rstdk, h.latq += at * each.latq, h.latkv += at * each.latkv;
    return h;
}

// mla: q, k, v from projected rows [latent of q | latent of k and v | rotated part of k].
static void latent_forward(const HeadBuffers *to, const Model *m, Matmul *mm, const floatX *proj, const floatX *w,
                           int64_t B, int64_t T, cudaStream_t stream) {
    const Config *c = &m->config;
    int64_t N = B * T, QK = c->n_head * m->HSK, q = c->q_lora, kv = c->kv_lora, Pp = m->Pp;
    gain_forward(to->latq, to->rstdq, proj, Pp, w + m->q_gain, N, q, c->rms_eps, stream);
    gain_forward(to->latkv, to->rstdk, proj + q, Pp, w + m->kv_gain, N, kv, c->rms_eps, stream);
    linear_forward(mm, to->q, to->latq, w + m->wqb, N, q, QK, OVERWRITE, stream);
    linear_forward(mm, to->kv, to->latkv, w + m->wkvb, N, kv, 2 * m->D, OVERWRITE, stream);
    latent_heads_forward(to->q, to->kr, proj + q + kv, Pp, to->rope_k, latent_shape(m, T), N, stream);
}

// proj becomes dproj, from acts.dheads and the layer's h; gradients of the layer's weights dw by `mode`.
static void latent_backward(T6 *t6, floatX *proj, const HeadBuffers *h, const floatX *w, float *dw, int64_t B,
                            int64_t T, OutputMode mode) {
    const Model *m = &t6->model;
    const Config *c = &m->config;
    float *columns = t6->acts.columns;
    HeadBuffers d = t6->acts.dheads;
    Matmul *mm = &t6->matmul;
    cudaStream_t stream = t6->stream;
    int64_t N = B * T, QK = c->n_head * m->HSK, q = c->q_lora, kv = c->kv_lora, Pp = m->Pp;
    latent_heads_backward(proj + q + kv, Pp, d.q, d.kr, h->rope_k, latent_shape(m, T), N, stream);
    linear_backward_input(mm, d.latq, d.q, w + m->wqb, N, q, QK, stream);
    linear_backward_weight(mm, dw + m->wqb, d.q, h->latq, N, q, QK, mode, stream);
    linear_backward_input(mm, d.latkv, d.kv, w + m->wkvb, N, kv, 2 * m->D, stream);
    linear_backward_weight(mm, dw + m->wkvb, d.kv, h->latkv, N, kv, 2 * m->D, mode, stream);
    column_sums(columns, d.latq, q, proj, Pp, h->rstdq, q, N, stream);
    column_total(dw + m->q_gain, columns, q, q, mode, stream);
    column_sums(columns, d.latkv, kv, proj + q, Pp, h->rstdk, kv, N, stream);
    column_total(dw + m->kv_gain, columns, kv, kv, mode, stream);
    gain_backward(proj, d.latq, proj, Pp, h->rstdq, w + m->q_gain, N, q, stream);
    gain_backward(proj + q, d.latkv, proj + q, Pp, h->rstdk, w + m->kv_gain, N, kv, stream);
}

// q, k, v of N = B*T tokens from their projected rows proj (N, Pp). w: the layer's weights.
static void heads_from_rows(const HeadBuffers *to, const Model *m, Matmul *mm, const floatX *proj, const floatX *w,
                            int64_t B, int64_t T, cudaStream_t stream) {
    int64_t N = B * T;
    if (m->config.attn == ATTN_MLA) return latent_forward(to, m, mm, proj, w, B, T, stream);
    if (!m->is_projected)
        factors_forward(to->fac, proj, w, to->rope_q, to->rope_k, factors_shape(m, T), N, stream);
    // bQ, bK = rope(bQ), rope(bK);  q = 1/RQ sum_r aQ_r (x) bQ_r, and so for k and v
    heads_forward(to->q, to->k, to->v, to->rstdq, to->rstdk, m->is_projected ? proj : to->fac, to->rope_q,
                  heads_shape(m, T), N, stream);
}

// q, k, v of layer l in its HeadBuffers, by way of its projected rows.
static void qkv_forward(T6 *t6, int64_t l, int64_t B, int64_t T, RowSource source) {
    const Model *m = &t6->model;
    int64_t N = B * T, C = m->config.n_embd;
    const floatX *w = t6->params + m->layers + (size_t)l * m->layer_stride, *n1 = t6->acts.n1 + l * N * C;
    floatX *proj = layer_rows(t6, l, N);
    if (source == NEW_ROWS)                                                         // [aQ bQ aK bK aV bV] = n Wqkv^T
        linear_forward(&t6->matmul, proj, n1, w + m->wqkv, N, C, m->Pp, OVERWRITE, t6->stream);
    HeadBuffers h = layer_heads(t6, l, N);
    heads_from_rows(&h, m, &t6->matmul, proj, w, B, T, t6->stream);
}

// Gradients of a variant's constants, from the columns of dfac (N, PFp) that factors_backward leaves. dw: the layer's
// gradients; columns (COLUMN_BLOCKS, PFp) is scratch.
static void constants_backward(float *dw, float *columns, const floatX *dfac, const Model *m, int64_t N,
                               OutputMode mode, cudaStream_t stream) {
    const Config *c = &m->config;
    int64_t NH = c->n_head, PFp = m->PFp;
    if (!c->a_constant && !c->b_constant) return;
    column_sums(columns, dfac, PFp, NULL, 0, NULL, PFp, N, stream);
    for (const Heads *h : {&m->q, &m->k, &m->v}) {
        if (h->kind == HEADS_GROUPED) continue;
        OutputMode mode_b = h == &m->v && c->share_kv_b ? ACCUMULATE : mode;
        if (c->a_constant) column_total(dw + h->const_a, columns + h->a, PFp, NH * h->R, mode, stream);
        if (c->b_constant) column_total(dw + h->const_b, columns + h->b, PFp, h->R * h->HB, mode_b, stream);
    }
}

// The gradient of layer l's projected rows: a variant's rows must stay for its neighbours.
static floatX *layer_dproj(T6 *t6, int64_t l, int64_t N) {
    return t6->acts.dproj ? t6->acts.dproj : layer_rows(t6, l, N);
}

// The columns of out_gate's gates in projected rows or in their gradient.
static floatX *gate_columns(const Model *m, floatX *rows) { return m->config.out_gate ? rows + m->gate : NO_GATE; }

// acts.dn (N, C), the gradient of layer l's normed input, from acts.dheads; dWqkv and other weights'. The columns of
// out_gate's gates in layer_dproj are there already.
static void qkv_backward(T6 *t6, int64_t l, int64_t B, int64_t T, OutputMode mode) {
    const Model *m = &t6->model;
    Activations *acts = &t6->acts;
    int64_t N = B * T, C = m->config.n_embd;
    HeadBuffers h = layer_heads(t6, l, N), d = acts->dheads;
    const floatX *w = t6->params + m->layers + (size_t)l * m->layer_stride, *n1 = acts->n1 + l * N * C;
    float *dw = bucket_gradient(t6, 1 + (int)l);
    floatX *proj = layer_rows(t6, l, N), *fac = m->is_projected ? proj : h.fac, *dproj = layer_dproj(t6, l, N);
    if (m->config.attn == ATTN_MLA) latent_backward(t6, proj, &h, w, dw, B, T, mode);
    else
        heads_backward(fac, fac, h.rope_q, {{{d.q, h.q, h.rstdq}, {d.k, h.k, h.rstdk}, {d.v}}}, heads_shape(m, T), N,
                       t6->stream);
    if (m->config.attn != ATTN_MLA && !m->is_projected) {
        factors_backward(dproj, fac, proj, w, h.rope_q, h.rope_k, factors_shape(m, T), N, t6->stream);
        constants_backward(dw, acts->columns, fac, m, N, mode, t6->stream);
    }
    linear_backward_input(&t6->matmul, acts->dn, dproj, w + m->wqkv, N, C, m->Pp, t6->stream);      // dn = dproj Wqkv
    linear_backward_weight(&t6->matmul, dw + m->wqkv, dproj, n1, N, C, m->Pp, mode, t6->stream);    // dWqkv = dproj^T n
}

// acts.batch (B, T) -> acts.nf (N, C), the normed input of the classifier.
void t6_forward(T6 *t6, int64_t B, int64_t T) {
    const Model *m = &t6->model;
    const Config *c = &m->config;
    Activations *acts = &t6->acts;
    Matmul *mm = &t6->matmul;
    cudaStream_t stream = t6->stream;
    int64_t N = B * T, C = c->n_embd, NH = c->n_head, Dp = m->Dp, Fp = m->Fp;
    AttentionShape shape = attention_shape(m, B, T);
    wait_for_bucket(t6, 0);
    encoder_forward(acts->x, acts->batch, t6->params + m->wte, N, C, stream);               // x = wte[idx]
    for (int64_t l = 0; l < c->n_layer; l++) {
        wait_for_bucket(t6, 1 + (int)l);
        const floatX *w = t6->params + m->layers + (size_t)l * m->layer_stride;
        floatX *n1 = acts->n1 + l * N * C, *n2 = acts->n2 + l * N * C, *y = acts->y + l * N * Dp,
            *u = layer_u(t6, l, N);
        float *lse = acts->lse + l * N * NH;

        rmsnorm_forward(n1, acts->rstd1 + l * N, acts->x, N, C, c->rms_eps, stream);        // n = x / rms(x)
        qkv_forward(t6, l, B, T, NEW_ROWS);                                                 // q, k, v from n
        // y = softmax(scale q k^T) v, times sigmoid(n Wg^T) with out_gate
        HeadBuffers h = layer_heads(t6, l, N);
        layer_attention_forward(y, lse, attention_heads(&h, m), gate_columns(m, layer_rows(t6, l, N)), shape, stream);
        linear_forward(mm, acts->x, y, w + m->wo, N, Dp, C, ACCUMULATE, stream);            // x += y Wo^T

        rmsnorm_forward(n2, acts->rstd2 + l * N, acts->x, N, C, c->rms_eps, stream);        // n = x / rms(x)
        linear_forward(mm, u, n2, w + m->w12, N, C, 2 * Fp, OVERWRITE, stream);             // u = n W1^T, n W2^T
        // s = silu(n W1^T) * (n W2^T)
        swiglu_forward(acts->s, u, N, Fp, stream);
        linear_forward(mm, acts->x, acts->s, w + m->w3, N, Fp, C, ACCUMULATE, stream);      // x += s W3^T
    }
    rmsnorm_forward(acts->nf, acts->rstdf, acts->x, N, C, c->rms_eps, stream);
}

// Adds the N losses of the last forward pass to results->loss. LOSS_AND_DLOGITS: also, with every loss weighted by
// dloss, the classifier's gradients: acts.dn (N, C) =, and dwte by `mode`.
void t6_loss(T6 *t6, int64_t N, double dloss, LossMode what, OutputMode mode) {
    const Model *m = &t6->model;
    Activations *acts = &t6->acts;
    Matmul *mm = &t6->matmul;
    cudaStream_t stream = t6->stream;
    int64_t C = m->config.n_embd, V = m->config.vocab_size, Vp = m->Vp;
    const floatX *wte = t6->params + m->wte;
    for (int64_t n = 0; n < N; n += CLASSIFIER_ROWS) {
        int64_t rows = N - n < CLASSIFIER_ROWS ? N - n : CLASSIFIER_ROWS;
        const floatX *nf = acts->nf + n * C;
        linear_forward(mm, acts->logits, nf, wte, rows, C, Vp, OVERWRITE, stream);          // logits = n wte^T
        fused_classifier(acts->logits, acts->losses + n, acts->batch + N + n, rows, V, Vp, dloss, what, stream);
        if (what == LOSS_ONLY) continue;
        OutputMode chunk_mode = n == 0 ? mode : ACCUMULATE;
        linear_backward_input(mm, acts->dn + n * C, acts->logits, wte, rows, C, Vp, stream);
        linear_backward_weight(mm, t6->grads + m->wte, acts->logits, nf, rows, C, Vp, chunk_mode, stream);
    }
    loss_sum(&t6->results->loss, acts->losses, N, stream);
}

// From acts.dn to the gradients of all weights, by `mode`; that of wte adds to the classifier's. If t6->summing, each
// bucket's sum over the ranks starts as soon as its gradient is there.
void t6_backward(T6 *t6, int64_t B, int64_t T, OutputMode mode) {
    const Model *m = &t6->model;
    const Config *c = &m->config;
    Activations *acts = &t6->acts;
    Matmul *mm = &t6->matmul;
    cudaStream_t stream = t6->stream;
    int64_t N = B * T, C = c->n_embd, NH = c->n_head, Dp = m->Dp, Fp = m->Fp;
    AttentionShape shape = attention_shape(m, B, T);
    RowSource rows = t6->recompute >= RECOMPUTE_FACTORS ? NEW_ROWS : KEPT_ROWS;
    CUDA_CHECK(cudaMemsetAsync(acts->dx, 0, (size_t)(N * C) * sizeof *acts->dx, stream));
    rmsnorm_backward(acts->dx, acts->dn, acts->nf, acts->rstdf, N, C, stream);
    for (int64_t l = c->n_layer - 1; l >= 0; l--) {
        const floatX *w = t6->params + m->layers + (size_t)l * m->layer_stride;
        float *dw = bucket_gradient(t6, 1 + (int)l);
        const floatX *n1 = acts->n1 + l * N * C, *n2 = acts->n2 + l * N * C, *y = acts->y + l * N * Dp;
        const float *lse = acts->lse + l * N * NH;
        floatX *u = layer_u(t6, l, N);
        if (t6->zero == 2 && l + 2 < c->n_layer) wait_for_bucket(t6, 1 + (int)l + 2);       // dw has its memory

        if (t6->recompute >= RECOMPUTE_MLP) linear_forward(mm, u, n2, w + m->w12, N, C, 2 * Fp, OVERWRITE, stream);
        linear_backward_input(mm, acts->s, acts->dx, w + m->w3, N, Fp, C, stream);          // ds = dx W3, in s
        // u is now du, and ds is s again
        swiglu_backward_in_place(u, acts->s, N, Fp, stream);
        linear_backward_weight(mm, dw + m->w3, acts->dx, acts->s, N, Fp, C, mode, stream);  // dW3 = dx^T s
        linear_backward_input(mm, acts->dn, u, w + m->w12, N, C, 2 * Fp, stream);           // dn = du W12
        linear_backward_weight(mm, dw + m->w12, u, n2, N, C, 2 * Fp, mode, stream);         // dW12 = du^T n
        // dx += gradient through the norm
        rmsnorm_backward(acts->dx, acts->dn, n2, acts->rstd2 + l * N, N, C, stream);

        linear_backward_input(mm, acts->dy, acts->dx, w + m->wo, N, Dp, C, stream);         // dy = dx Wo
        linear_backward_weight(mm, dw + m->wo, acts->dx, y, N, Dp, C, mode, stream);        // dWo = dx^T y
        if (t6->recompute >= RECOMPUTE_HEADS) qkv_forward(t6, l, B, T, rows);               // q, k, v again
        HeadBuffers h = layer_heads(t6, l, N);
        layer_attention_backward(attention_heads(&acts->dheads, m),                         // dq, dk, dv, dg
                                 gate_columns(m, layer_dproj(t6, l, N)), acts->dy, y, lse, attention_heads(&h, m),
                                 gate_columns(m, layer_rows(t6, l, N)), acts->attention_scratch, shape, stream);
        qkv_backward(t6, l, B, T, mode);                                                    // dn, dWqkv
        if (t6->summing) sum_bucket(t6, 1 + (int)l);
        // dx += gradient through the norm
        rmsnorm_backward(acts->dx, acts->dn, n1, acts->rstd1 + l * N, N, C, stream);
    }
    // dwte[idx] += dx
    encoder_backward(t6->grads + m->wte, acts->dx, acts->batch, acts->batch + 2 * N, N, C, stream);
    if (t6->summing) sum_bucket(t6, 0);
}

// Forward and backward of acts.batch. OVERWRITE begins a step: gradients and the sum of losses start anew.
void t6_forward_backward(T6 *t6, int64_t B, int64_t T, double dloss, OutputMode mode) {
    if (mode == OVERWRITE) CUDA_CHECK(cudaMemsetAsync(&t6->results->loss, 0, sizeof(double), t6->stream));
    if (t6->zero == 2) mode = OVERWRITE;    // the gradients of earlier micro-batches are in sums
    t6_forward(t6, B, T);
    t6_loss(t6, B * T, dloss, LOSS_AND_DLOGITS, mode);
    t6_backward(t6, B, T, mode);
}

// ---------------------------------------------------------------------------------------------------------------------
// Update

// Norm, clipping and AdamW; with ZeRO also the gathering of the weights. Results are in t6->results.
static void clip_and_update(T6 *t6, AdamWStep step, double clip) {
    const Model *m = &t6->model;
    Results *r = t6->results;
    const float *grads = t6->zero ? t6->sums : t6->grads;
    for (int k = 0; k < model_buckets(m); k++) wait_for_bucket(t6, k);
    global_norm_squares(&r->norm, t6->norm_partial, grads, m->num_stored / t6->moments.world, t6->stream);
    if (t6->comm) {
        hand_over_bucket(t6, 0);
        gpu_sum(t6->comm, &r->loss, 1, "losses");
        if (t6->zero) gpu_sum(t6->comm, &r->norm.norm, 1, "norm of the gradients");
        CUDA_CHECK(cudaEventRecord(t6->done[0], t6->comm->stream));
        wait_for_bucket(t6, 0);
    }
    global_norm_finish(&r->norm, clip, &r->loss, t6->limits.loss, t6->limits.norm, t6->stream);
    if (!t6->zero)
        return adamw_clipped_update(t6->params, t6->master, t6->adam_m, t6->adam_v, t6->grads, m->num_stored, step,
                                    &r->norm, t6->stream);
    for (int k = 0; k < model_buckets(m); k++) {
        Bucket b = model_bucket(m, k), slice = model_slice(m, t6->mine, k);
        size_t at = b.offset / t6->mine.world;
        adamw_clipped_update(t6->params + slice.offset, t6->master + at, t6->adam_m + at, t6->adam_v + at,
                             t6->sums + at, slice.size, step, &r->norm, t6->stream);
        hand_over_bucket(t6, k);
        gpu_all_gather(t6->comm, t6->params + b.offset, slice.size * sizeof *t6->params, "weights (all-gather)");
        CUDA_CHECK(cudaEventRecord(t6->done[k], t6->comm->stream));
    }
}

// The results, after everything that the GPU was asked to do.
Results t6_results(T6 *t6) {
    CUDA_CHECK(cudaMemcpyAsync(t6->host_results, t6->results, sizeof(Results), cudaMemcpyDeviceToHost, t6->stream));
    if (t6->comm) gpu_comm_wait(t6->comm, t6->stream);
    CUDA_CHECK(cudaStreamSynchronize(t6->stream));
    return *t6->host_results;
}

// Ends the program with one line if its kernels cannot run a model that config_check has accepted.
static void check_model(const Model *m) {
    const Config *c = &m->config;
    bool latent = c->attn == ATTN_MLA;
    if (c->n_embd % 8) die(EXIT_INPUT, "--n-embd is %" PRId64 "; on the GPU it must be a multiple of 8", c->n_embd);
    if (m->HSV % 32 || m->HSV > 128)
        die(EXIT_INPUT, "--head-dim is %" PRId64 "; on the GPU it must be a multiple of 32 up to 128 (64 and 128 are "
            "fast)", c->head_dim);
    const struct { int64_t value; const char *flag; } widths[] = {
        {c->q_lora, "--q-lora"}, {c->kv_lora, "--kv-lora"}, {c->rope_dim, "--rope-dim"}};
    for (int i = 0; i < 3 && latent; i++)
        if (widths[i].value % 8)
            die(EXIT_INPUT, "%s is %" PRId64 "; on the GPU it must be a multiple of 8", widths[i].flag,
                widths[i].value);
    if (m->HSK > 128)
        die(EXIT_INPUT, "--head-dim and --rope-dim are %" PRId64 " and %" PRId64 ", together %" PRId64 "; on the GPU "
            "that is at most 128", c->head_dim, c->rope_dim, m->HSK);
    HeadsShape shape = heads_shape(m, 1);
    int have = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    size_t need = latent ? 0 : heads_backward_smem_bytes(&shape);
    if (need > (size_t)have)
        die(EXIT_INPUT, "a token's factors and heads take %zu bytes and a multiprocessor of this GPU has %d: lower "
            "--n-head or the ranks", need, have);
}

// =====================================================================================================================
// The training program (llmc/trainer.h) around this model. generate_t6.cu includes the model without it.
#ifndef T6_MODEL_ONLY
#include "llmc/trainer.h"

void t6_start(TrainOptions *o) {
    cudaDeviceProp gpu = gpu_start(o->comm ? o->comm->local_rank : 0, (const void *)encoder_forward_kernel);
    if (o->peak_tflops == 0) o->peak_tflops = gpu_peak_tflops(gpu.name);
    if (gpu_comm_wanted(o)) o->gpu_comm = gpu_comm_open(o);
}

void t6_describe(char *out, size_t size) {
    char gpu[384], library[64], nccl[32];
    gpu_describe(gpu, sizeof gpu);
    snprintf(out, size, "%s, %s, %s", gpu, comm_library(library), gpu_comm_library(nccl));
}

// Where no flag says what to recompute, chooses the least that fits.
void t6_plan(TrainOptions *o, const Model *m, Logger *log) {
    static const char *const recomputed[] = {"nothing", "q, k and v", "q, k, v and the MLP's hidden layer",
                                             "q, k, v, their factors and the MLP's hidden layer"};
    check_model(m);
    static T6 unused;
    Buffer table[NUM_BUFFERS];
    share_out(&unused, o);
    size_t free_bytes, total_bytes;
    cudaDeviceProp gpu;
    CUDA_CHECK(cudaGetDeviceProperties(&gpu, current_device()));
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    bool choose = o->recompute == LEAST_THAT_FITS;
    Recompute level = choose ? RECOMPUTE_NOTHING : (Recompute)o->recompute;
    for (;; level = (Recompute)(level + 1)) {
        memory_table(&unused, m, o->batch_size, o->seq_len, level, table);
        if (!choose || level == RECOMPUTE_FACTORS ||
            memory_bytes(table, 0, NUM_BUFFERS - 1) + MATMUL_WORKSPACE_BYTES <= (double)free_bytes) break;
    }
    o->recompute = level;
    double weights = memory_bytes(table, 0, 1), grads = memory_bytes(table, 2, 4), moments = memory_bytes(table, 5, 6);
    double acts = memory_bytes(table, NUM_WEIGHT_BUFFERS, NUM_BUFFERS - 1), workspace = (double)MATMUL_WORKSPACE_BYTES;
    double need = weights + grads + moments + acts + workspace, have = (double)free_bytes, GiB = 0x1p30;
    logger_printf(log, "GPU: %s, %d multiprocessors, %.1f GiB, bf16 peak %.0f TFLOP/s; numbers are " PRECISION_NAME
                  "\n", gpu.name, gpu.multiProcessorCount, (double)total_bytes / GiB, o->peak_tflops);
    logger_printf(log, "memory: weights %.2f + gradients %.2f + AdamW %.2f + activations %.2f + workspace %.2f = %.2f "
                  "GiB of %.2f free; the backward pass recomputes %s\n", weights / GiB, grads / GiB, moments / GiB,
                  acts / GiB, workspace / GiB, need / GiB, have / GiB, recomputed[level - RECOMPUTE_NOTHING]);
    if (need > have && o->forward_only)
        die(EXIT_INPUT, "this run needs %.1f GiB of GPU memory and %.1f are free: lower --batch-size (-b, now %" PRId64
            ") or --context, or use a smaller --model (-e)", need / GiB, have / GiB, o->batch_size);
    if (need > have)
        die(EXIT_INPUT, "this run needs %.1f GiB of GPU memory and %.1f are free: raise --recompute (-r, now %d of 2), "
            "lower --batch-size (-b, now %" PRId64 ") or --seq-len (-t), or use a smaller --model (-e)", need / GiB,
            have / GiB, (int)o->recompute, o->batch_size);
}

T6 *t6_open(const TrainOptions *o) {
    T6 *t6 = (T6 *)xmalloc(sizeof *t6);
    t6_alloc(t6, o);
    if (o->gpu_comm) ranks_open(t6, (GpuComm *)o->gpu_comm);
    return t6;
}

void t6_close(T6 *t6) {
    if (t6->comm) ranks_close(t6);
    t6_free(t6);
    free(t6);
}

const Model *t6_model(const T6 *t6) { return &t6->model; }

// Every rank's host memory has room for whole weights. With ZeRO a GPU has slices of them, which WITH_VALUES gathers.
HostWeights t6_host_weights(T6 *t6, HostCopy copy) {
    const Model *m = &t6->model;
    size_t own = m->num_stored / t6->moments.world, bytes = own * sizeof(float);
    HostWeights *host = &t6->host;
    if (!host->params) {
        host->params = (float *)xcalloc(m->num_stored, sizeof(float));
        host->adam_m = (float *)xcalloc(own, sizeof(float)), host->adam_v = (float *)xcalloc(own, sizeof(float));
    }
    if (copy == ROOM_ONLY) return *host;
    CUDA_CHECK(cudaMemcpyAsync(host->adam_m, t6->adam_m, bytes, cudaMemcpyDeviceToHost, t6->stream));
    CUDA_CHECK(cudaMemcpyAsync(host->adam_v, t6->adam_v, bytes, cudaMemcpyDeviceToHost, t6->stream));
    for (int k = 0; k < model_buckets(m); k++) {
        Bucket b = model_bucket(m, k), slice = model_slice(m, t6->moments, k);
        const float *master = t6->master + b.offset / t6->moments.world;
        CUDA_CHECK(cudaMemcpyAsync(host->params + slice.offset, master, slice.size * sizeof(float),
                                   cudaMemcpyDeviceToHost, t6->stream));
        CUDA_CHECK(cudaStreamSynchronize(t6->stream));
        if (t6->zero) comm_all_gather(t6->comm->comm, host->params + b.offset, slice.size, "master weights");
    }
    CUDA_CHECK(cudaStreamSynchronize(t6->stream));
    return *host;
}

// Bucket by bucket, through the memory of the bucket's gradient, which is free here.
void t6_load_weights(T6 *t6, LoadWhat what) {
    const Model *m = &t6->model;
    size_t own = m->num_stored / t6->moments.world * sizeof(float);
    for (int k = 0; k < model_buckets(m); k++) {
        Bucket b = model_bucket(m, k), slice = model_slice(m, t6->moments, k);
        float *whole = bucket_gradient(t6, k), *master = t6->master + b.offset / t6->moments.world;
        CUDA_CHECK(cudaMemcpyAsync(whole, t6->host.params + b.offset, b.size * sizeof(float), cudaMemcpyHostToDevice,
                                   t6->stream));
        round_weights(t6->params + b.offset, whole, b.size, t6->stream);
        CUDA_CHECK(cudaMemcpyAsync(master, whole + (slice.offset - b.offset), slice.size * sizeof(float),
                                   cudaMemcpyDeviceToDevice, t6->stream));
    }
    if (what == WEIGHTS_AND_MOMENTS) {
        CUDA_CHECK(cudaMemcpyAsync(t6->adam_m, t6->host.adam_m, own, cudaMemcpyHostToDevice, t6->stream));
        CUDA_CHECK(cudaMemcpyAsync(t6->adam_v, t6->host.adam_v, own, cudaMemcpyHostToDevice, t6->stream));
    }
    CUDA_CHECK(cudaStreamSynchronize(t6->stream));
}

double t6_sequence_loss(T6 *t6, const int32_t *inputs, const int32_t *targets, int64_t B) {
    t6_batch(t6, inputs, targets, B, t6->T);
    CUDA_CHECK(cudaMemsetAsync(&t6->results->loss, 0, sizeof(double), t6->stream));
    t6_forward(t6, B, t6->T);
    t6_loss(t6, B * t6->T, 0, LOSS_ONLY, OVERWRITE);
    return t6_results(t6).loss;
}

// The first run of each mode launches kernel by kernel, and the matrix products choose their algorithms. From the
// second run on it is one graph. Runs that sum over ranks are never graphs: collectives may wait for the host.
void t6_micro_step(T6 *t6, const int32_t *inputs, const int32_t *targets, double dloss, int64_t k) {
    OutputMode mode = k == 0 ? OVERWRITE : ACCUMULATE;
    cudaGraphExec_t *graph = &t6->graphs[mode];
    int last_round = (k + 1) * t6->mine.world >= t6->micro_batches;
    t6->summing = t6->comm && (t6->zero == 2 || last_round), t6->first_sum = k == 0;
    if (!inputs) {      // this rank has no micro-batch, but takes part in the sums
        size_t bytes = t6->model.num_stored * sizeof *t6->grads;
        if (k == 0) CUDA_CHECK(cudaMemsetAsync(&t6->results->loss, 0, sizeof(double), t6->stream));
        if (k == 0 && t6->zero < 2) CUDA_CHECK(cudaMemsetAsync(t6->grads, 0, bytes, t6->stream));
        return sum_without_backward(t6);
    }
    t6_batch(t6, inputs, targets, t6->B, t6->T);
    if (t6->runs[mode]++ == 0 || t6->summing) {
        t6_forward_backward(t6, t6->B, t6->T, dloss, mode);
        return;
    }
    if (!*graph) {
        cudaGraph_t captured;
        t6->capturing = 1;
        CUDA_CHECK(cudaStreamBeginCapture(t6->stream, cudaStreamCaptureModeThreadLocal));
        t6_forward_backward(t6, t6->B, t6->T, dloss, mode);
        CUDA_CHECK(cudaStreamEndCapture(t6->stream, &captured));
        CUDA_CHECK(cudaGraphInstantiateWithFlags(graph, captured, 0));
        CUDA_CHECK(cudaGraphDestroy(captured));
        t6->capturing = 0;
    }
    for (int i = 0; i < model_buckets(&t6->model); i++) wait_for_bucket(t6, i);
    CUDA_CHECK(cudaGraphLaunch(*graph, t6->stream));
}

void t6_set_limits(T6 *t6, SpikeLimits limits) { t6->limits = limits; }

void t6_update(T6 *t6, const TrainOptions *o, double lr, int64_t step, double *loss, double *norm) {
    clip_and_update(t6, adamw_step(lr, o->beta1, o->beta2, o->adam_eps, o->weight_decay, step), o->clip);
    Results r = t6_results(t6);
    *loss = r.loss, *norm = r.norm.norm;
}

// Causal attention sees no later token, so the rest of the sequence may be anything, and every call has the same
// shapes.
void t6_position_logits(T6 *t6, float *logits, const int32_t *ids, int64_t n, const int64_t *positions, int64_t count) {
    const Model *m = &t6->model;
    Activations *acts = &t6->acts;
    int64_t C = m->config.n_embd, V = m->config.vocab_size;
    int32_t *sequence = (int32_t *)xcalloc((size_t)t6->T, sizeof *sequence);
    floatX *row = (floatX *)xmalloc((size_t)m->Vp * sizeof *row);
    memcpy(sequence, ids, (size_t)n * sizeof *ids);
    t6_batch(t6, sequence, NULL, 1, t6->T);
    t6_forward(t6, 1, t6->T);
    for (int64_t i = 0; i < count; i++) {
        const floatX *nf = acts->nf + positions[i] * C;
        linear_forward(&t6->matmul, acts->logits, nf, t6->params + m->wte, 1, C, m->Vp, OVERWRITE, t6->stream);
        CUDA_CHECK(cudaMemcpyAsync(row, acts->logits, (size_t)m->Vp * sizeof *row, cudaMemcpyDeviceToHost, t6->stream));
        CUDA_CHECK(cudaStreamSynchronize(t6->stream));
        for (int64_t v = 0; v < V; v++) logits[i * V + v] = (float)row[v];
    }
    free(row), free(sequence);
}

// The classifier runs only for the rows that are scored, which are gathered in acts.dn, and its logits are fp32.
void t6_score(T6 *t6, const int32_t *ids, int64_t B, int64_t T, ScoredToken *scored, int64_t count) {
    const Model *m = &t6->model;
    Activations *acts = &t6->acts;
    int64_t C = m->config.n_embd, V = m->config.vocab_size, Vp = m->Vp, most = score_rows_at_once(t6->B * t6->T);
    float *logits = (float *)acts->logits;
    MatmulChoice choice = t6->matmul.choice;
    t6->matmul.choice = MATMUL_FIRST;       // batches have many shapes: not worth timing candidates
    t6_batch(t6, ids, NULL, B, T);
    t6_forward(t6, B, T);
    GpuScore *host = (GpuScore *)xmalloc((size_t)most * sizeof *host);
    for (int64_t first = 0; first < count; first += most) {
        int64_t n = count - first < most ? count - first : most, padded = round_up(n, 256);
        int64_t rows = padded < most ? padded : most;
        for (int64_t i = 0; i < n; i++) host[i] = {(int32_t)scored[first + i].row, scored[first + i].token, 0, 0};
        CUDA_CHECK(cudaMemcpyAsync(acts->scores, host, n * sizeof *host, cudaMemcpyHostToDevice, t6->stream));
        gather_rows(acts->dn, acts->nf, acts->scores, n, C, t6->stream);
        // the rows from n on are whatever acts.dn had: few shapes need few plans
        matmul(&t6->matmul, logits, acts->dn, t6->params + m->wte,
               MatmulShape{rows, Vp, C, AS_IS, TRANSPOSED, CUDA_R_32F, OVERWRITE}, t6->stream);
        score_rows(acts->scores, logits, n, V, Vp, t6->stream);
        CUDA_CHECK(cudaMemcpyAsync(host, acts->scores, n * sizeof *host, cudaMemcpyDeviceToHost, t6->stream));
        CUDA_CHECK(cudaStreamSynchronize(t6->stream));
        for (int64_t i = 0; i < n; i++)
            scored[first + i].loglikelihood = host[i].loglikelihood, scored[first + i].is_greedy = host[i].is_greedy;
    }
    free(host);
    t6->matmul.choice = choice;
}

const TrainerModel t6_trainer = {
    .title = "train_t6cu: trains T6, the tensor product attention transformer, on a GPU. Without flags: preset tiny, "
             "toy corpus.",
    .pad = PAD, .start = t6_start, .describe = t6_describe, .plan = t6_plan, .open = t6_open, .close = t6_close,
    .model = t6_model, .host_weights = t6_host_weights, .load_weights = t6_load_weights, .loss = t6_sequence_loss,
    .logits = t6_position_logits, .score = t6_score, .micro_step = t6_micro_step, .set_limits = t6_set_limits,
    .update = t6_update,
};

#ifndef T6_NO_MAIN      // test_t6.cu and eval_t6.cu include this file without it
int main(int argc, char **argv) { return trainer_main(argc, argv, &t6_trainer); }
#endif
#endif
