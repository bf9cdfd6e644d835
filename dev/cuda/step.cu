// Where the time of a training step goes: each operator of train_t6.cu on a real model's buffers, timed alone, next to
// its floor; then the whole micro-step, as single launches and as a graph, and the update.
//
//   make build/step
//   build/step [PRESET [B [T [ATTN [RECOMPUTE [VARIANT [whole]]]]]]]
//   build/step 124M 24 1024 tpa 0 "share_kv_b out_gate" whole
//
// VARIANT: keys of config.json, as test/testing.h's set_variant reads them. whole: only the whole micro-step.
//
// Each line: how often the operator runs in a micro-step, its time, and its floor, the larger of bytes / 4.3 TB/s (each
// input read once, each output written once) and operations / 790 TFLOP/s. These are the copy bandwidth and the bf16
// matrix rate of one H200. One version, the trainer's; results: dev/results/train_gpu.md.
#define T6_NO_MAIN
#include "../../train_t6.cu"
#include "../../test/testing.h"

#include <algorithm>
#include <vector>

static const double BYTES_PER_S = 4.3e12, FLOP_PER_S = 790e12;

template <class F>
static double median_ms(cudaStream_t stream, int repeats, F f) {
    cudaEvent_t start, stop;
    CUDA_CHECK(cudaEventCreate(&start));
    CUDA_CHECK(cudaEventCreate(&stop));
    std::vector<float> times(repeats);
    for (int i = -2; i < repeats; i++) {
        CUDA_CHECK(cudaEventRecord(start, stream));
        f();
        CUDA_CHECK(cudaEventRecord(stop, stream));
        CUDA_CHECK(cudaEventSynchronize(stop));
        float ms;
        CUDA_CHECK(cudaEventElapsedTime(&ms, start, stop));
        if (i >= 0) times[i] = ms;
    }
    CUDA_CHECK(cudaEventDestroy(start));
    CUDA_CHECK(cudaEventDestroy(stop));
    std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
    return times[repeats / 2];
}

typedef struct { double ms, floor_ms; } Total;

template <class F>
static void row(Total *total, const char *name, int64_t count, double bytes, double flop, cudaStream_t stream, F f) {
    const int burst = 3;        // launches between two events, which share the gap before the first
    double ms = median_ms(stream, 7, [&] { for (int i = 0; i < burst; i++) f(); }) / burst;
    double floor_ms = 1e3 * fmax(bytes / BYTES_PER_S, flop / FLOP_PER_S);
    printf("%-28s %4d x %8.3f ms = %7.2f ms   floor %7.2f ms (%3.0f%%)  %7.0f GB/s %6.0f TFLOP/s\n",
           name, (int)count, ms, ms * count, floor_ms * count, 100 * floor_ms / ms, bytes / ms / 1e6, flop / ms / 1e9);
    fflush(stdout);
    total->ms += ms * count, total->floor_ms += floor_ms * count;
}

// Random weights and a few whole micro-steps, so that every buffer holds realistic numbers.
static void fill_model(T6 *t) {
    const Model *m = &t->model;
    int64_t N = t->B * t->T, V = m->config.vocab_size;
    HostWeights host = t6_host_weights(t, ROOM_ONLY);
    #pragma omp parallel for
    for (size_t i = 0; i < m->num_stored; i++) host.params[i] = (float)(0.06 * rng_uniform(1, i) - 0.03);
    t6_load_weights(t, WEIGHTS_ONLY);
    std::vector<int32_t> inputs(N), targets(N);
    for (int64_t i = 0; i < N; i++) {
        inputs[i] = (int32_t)(rng_at(2, i) % (uint64_t)V);
        targets[i] = (int32_t)(rng_at(3, i) % (uint64_t)V);
    }
    for (int k = 0; k < 4; k++)         // 0: overwrites the gradients, 1: accumulates; captures the graph of each
        t6_micro_step(t, inputs.data(), targets.data(), 1.0 / (double)N, k % 2);
    CUDA_CHECK(cudaStreamSynchronize(t->stream));
}

static void print_matmuls(const Matmul *mm) {
    printf("matrix products, as chosen (us; cuBLASLt's first heuristic; candidates with the same bits):\n");
    for (int i = 0; i < mm->num_plans; i++) {
        const MatmulPlan *plan = &mm->plans[i];
        MatmulShape product = plan->shape;
        double flop = 2.0 * (double)product.M * (double)product.N * (double)product.K;
        printf("  %6d %6d %6d %s%s %s %s: %8.1f us %4.0f TFLOP/s, first %8.1f, %d of %d\n",
               (int)product.M, (int)product.N, (int)product.K,
               product.a_is == TRANSPOSED ? "T" : "N", product.b_is == TRANSPOSED ? "T" : "N",
               product.d_type == CUDA_R_32F ? "f32" : "b16", product.mode == ACCUMULATE ? "+=" : "= ",
               plan->us, flop / plan->us / 1e6, plan->first_us, plan->same_bits, plan->candidates);
    }
}

// Numbers of q, k and v of a token, as stored.
static double qkv_numbers(const Model *m) {
    double NKV = heads_stored(m->k, (int)m->config.n_head);
    return (double)m->config.n_head * (double)m->HSK + NKV * (double)(m->HSK + m->HSV);
}

// Causal pairs of query and key times the size of a head: a product of attention is 2 flop for each.
static double attention_pairs(const T6 *t) {
    const Model *m = &t->model;
    return (double)t->B * (double)m->config.n_head * (double)t->T * (double)t->T / 2 * (double)m->HSK;
}

static void time_forward(Total *total, T6 *t) {
    const Model *m = &t->model;
    Activations *acts = &t->acts;
    Matmul *mm = &t->matmul;
    cudaStream_t s = t->stream;
    int64_t B = t->B, T = t->T, N = B * T, L = m->config.n_layer, C = m->config.n_embd;
    int64_t D = m->D, Fp = m->Fp, Pp = m->Pp, Vp = m->Vp, V = m->config.vocab_size;
    double X = sizeof(floatX), n = (double)N, qkv = qkv_numbers(m), pairs = attention_pairs(t);
    const floatX *w = t->params + m->layers;
    AttentionShape shape = attention_shape(m, B, T);
    row(total, "encoder_forward", 1, 2 * n * C * X, 0, s,
        [&] { encoder_forward(acts->x, acts->batch, t->params, N, C, s); });
    row(total, "rmsnorm_forward", 2 * L + 1, 2 * n * C * X, 0, s,
        [&] { rmsnorm_forward(acts->n1, acts->rstd1, acts->x, N, C, 1e-6, s); });
    row(total, "matmul wqkv", L, X * (n * (C + Pp) + (double)C * Pp), 2 * n * C * Pp, s,
        [&] { linear_forward(mm, acts->proj, acts->n1, w + m->wqkv, N, C, Pp, OVERWRITE, s); });
    const HeadBuffers *h = &acts->heads;
    row(total, "q, k, v from rows", 2 * L, X * n * (Pp + qkv), 0, s,
        [&] { heads_from_rows(h, m, mm, acts->proj, w, B, T, s); });
    if (acts->dproj)
        row(total, "  of it factors_forward", 0, X * n * (Pp + m->PFp), 0, s, [&] {
            factors_forward(h->fac, acts->proj, w, h->rope_q, h->rope_k, factors_shape(m, T), N, s);
        });
    row(total, "attention_forward", L, X * n * (qkv + D), 4 * pairs, s,
        [&] { layer_attention_forward(acts->y, acts->lse, attention_heads(h, m), gate_columns(m, acts->proj), shape,
                                      s); });
    row(total, "matmul wo +=", L, X * (n * (2 * C + D) + (double)C * D), 2 * n * C * D, s,
        [&] { linear_forward(mm, acts->x, acts->y, w + m->wo, N, D, C, ACCUMULATE, s); });
    row(total, "matmul w12", L, X * (n * (C + 2 * Fp) + 2.0 * C * Fp), 4 * n * C * Fp, s,
        [&] { linear_forward(mm, acts->u, acts->n2, w + m->w12, N, C, 2 * Fp, OVERWRITE, s); });
    row(total, "swiglu_forward", L, 3 * X * n * Fp, 0, s, [&] { swiglu_forward(acts->s, acts->u, N, Fp, s); });
    row(total, "matmul w3 +=", L, X * (n * (2 * C + Fp) + (double)C * Fp), 2 * n * C * Fp, s,
        [&] { linear_forward(mm, acts->x, acts->s, w + m->w3, N, Fp, C, ACCUMULATE, s); });
    // the classifier, in chunks of rows
    int64_t rows = N < CLASSIFIER_ROWS ? N : CLASSIFIER_ROWS, chunks = ceil_div(N, rows);
    double r = (double)rows;
    row(total, "matmul logits", chunks, X * (r * (C + Vp) + (double)C * Vp), 2 * r * C * Vp, s,
        [&] { linear_forward(mm, acts->logits, acts->nf, t->params, rows, C, Vp, OVERWRITE, s); });
    row(total, "fused_classifier", chunks, 2 * X * r * Vp, 0, s,
        [&] { fused_classifier(acts->logits, acts->losses, acts->batch + N, rows, V, Vp, 1 / n, LOSS_AND_DLOGITS,
                               s); });
    row(total, "matmul logits dinp", chunks, X * (r * (C + Vp) + (double)C * Vp), 2 * r * C * Vp, s,
        [&] { linear_backward_input(mm, acts->dn, acts->logits, t->params, rows, C, Vp, s); });
    row(total, "matmul logits dw +=", chunks, X * r * (C + Vp) + 8.0 * C * Vp, 2 * r * C * Vp, s,
        [&] { linear_backward_weight(mm, t->grads, acts->logits, acts->nf, rows, C, Vp, ACCUMULATE, s); });
}

static void time_backward(Total *total, T6 *t) {
    const Model *m = &t->model;
    Activations *acts = &t->acts;
    Matmul *mm = &t->matmul;
    cudaStream_t s = t->stream;
    int64_t B = t->B, T = t->T, N = B * T, L = m->config.n_layer, C = m->config.n_embd;
    int64_t D = m->D, Fp = m->Fp, Pp = m->Pp;
    double X = sizeof(floatX), n = (double)N, qkv = qkv_numbers(m), pairs = attention_pairs(t);
    const floatX *w = t->params + m->layers;
    float *dw = t->grads + m->layers;
    const HeadBuffers *h = &acts->heads;
    AttentionShape shape = attention_shape(m, B, T);
    row(total, "rmsnorm_backward", 2 * L + 1, 4 * X * n * C, 0, s,
        [&] { rmsnorm_backward(acts->dx, acts->dn, acts->n2, acts->rstd2, N, C, s); });
    row(total, "matmul w3 dinp", L, X * (n * (C + Fp) + (double)C * Fp), 2 * n * C * Fp, s,
        [&] { linear_backward_input(mm, acts->s, acts->dx, w + m->w3, N, Fp, C, s); });
    row(total, "swiglu_backward", L, 6 * X * n * Fp, 0, s,
        [&] { swiglu_backward_in_place(acts->u, acts->s, N, Fp, s); });
    row(total, "matmul w3 dw +=", L, X * n * (C + Fp) + 8.0 * C * Fp, 2 * n * C * Fp, s,
        [&] { linear_backward_weight(mm, dw + m->w3, acts->dx, acts->s, N, Fp, C, ACCUMULATE, s); });
    row(total, "matmul w12 dinp", L, X * (n * (C + 2 * Fp) + 2.0 * C * Fp), 4 * n * C * Fp, s,
        [&] { linear_backward_input(mm, acts->dn, acts->u, w + m->w12, N, C, 2 * Fp, s); });
    row(total, "matmul w12 dw +=", L, X * n * (C + 2 * Fp) + 16.0 * C * Fp, 4 * n * C * Fp, s,
        [&] { linear_backward_weight(mm, dw + m->w12, acts->u, acts->n2, N, C, 2 * Fp, ACCUMULATE, s); });
    row(total, "matmul wo dinp", L, X * (n * (C + D) + (double)C * D), 2 * n * C * D, s,
        [&] { linear_backward_input(mm, acts->dy, acts->dx, w + m->wo, N, D, C, s); });
    row(total, "matmul wo dw +=", L, X * n * (C + D) + 8.0 * C * D, 2 * n * C * D, s,
        [&] { linear_backward_weight(mm, dw + m->wo, acts->dx, acts->y, N, D, C, ACCUMULATE, s); });
    row(total, "attention_backward", L, X * n * (2 * qkv + 2 * D), 10 * pairs, s, [&] {
        layer_attention_backward(attention_heads(&acts->dheads, m), gate_columns(m, layer_dproj(t, 0, N)), acts->dy,
                                 acts->y, acts->lse, attention_heads(h, m), gate_columns(m, acts->proj),
                                 acts->attention_scratch, shape, s);
    });
    if (acts->dproj)
        row(total, "  of qkv_backward: factors", 0, X * n * 2 * (Pp + m->PFp), 0, s, [&] {
            factors_backward(acts->dproj, h->fac, acts->proj, w, h->rope_q, h->rope_k, factors_shape(m, T), N, s);
        });
    if (acts->dproj)
        row(total, "  of qkv_backward: constants", 0, X * n * m->PFp, 0, s,
            [&] { constants_backward(dw, acts->columns, h->fac, m, N, ACCUMULATE, s); });
    row(total, "qkv_backward", L, X * n * (2 * Pp + qkv + 2 * (C + Pp)) + 10.0 * C * Pp, 4 * n * C * Pp, s,
        [&] { qkv_backward(t, 0, B, T, ACCUMULATE); });
    row(total, "encoder_backward", 1, X * n * C + 8.0 * n * C, 0, s,
        [&] { encoder_backward(t->grads, acts->dx, acts->batch, acts->batch + 2 * N, N, C, s); });
}

static void time_step(T6 *t) {
    const Model *m = &t->model;
    cudaStream_t s = t->stream;
    int64_t B = t->B, T = t->T;
    double n = (double)(B * T), X = sizeof(floatX);
    double graph = 0, flop = model_flop_per_token(m, T) * n;
    for (int i = 0; i < 3; i++) {       // alternating: clocks fall as the GPU warms up; a long run sees the last pair
        double launches = median_ms(s, 5, [&] { t6_forward_backward(t, B, T, 1 / n, ACCUMULATE); });
        graph = median_ms(s, 5, [&] { CUDA_CHECK(cudaGraphLaunch(t->graphs[ACCUMULATE], s)); });
        printf("micro-step: %.2f ms as launches, %.2f ms as a graph: ", launches, graph);
        printf("%.0f tok/s, %.0f TFLOP/s (6 N + causal attention)\n", n / graph * 1e3, flop / graph / 1e9);
    }
    double update = median_ms(s, 5, [&] { clip_and_update(t, adamw_step(1e-4, 0.9, 0.95, 1e-8, 0.1, 1), 1); });
    printf("update: %.3f ms, %.0f GB/s; with 5 micro-steps per update: %.0f tok/s\n", update,
           (double)m->num_stored * (32 + X) / update / 1e6, 5 * n / (5 * graph + update) * 1e3);
}

int main(int argc, char **argv) {
    program_start(argv[0]);
    Error err;
    AttnKind attn = ATTN_TPA;
    const Preset *p = find_preset(argc > 1 ? argv[1] : "124M");
    if (!p || (argc > 4 && attn_from_name(argv[4], &attn, &err) != 0))
        die(EXIT_INPUT, "usage: step [PRESET [B [T [ATTN [RECOMPUTE [VARIANT [whole]]]]]]]");
    TrainOptions o;
    memset(&o, 0, sizeof o);
    o.config = preset_config(p, attn);
    o.batch_size = argc > 2 ? atoll(argv[2]) : p->batch_size, o.seq_len = argc > 3 ? atoll(argv[3]) : p->seq_len;
    o.recompute = argc > 5 ? atoll(argv[5]) : (int64_t)RECOMPUTE_NOTHING;
    if (argc > 6) set_variant(&o.config, argv[6]);
    o.clip = 1, o.beta1 = 0.9, o.beta2 = 0.95, o.adam_eps = 1e-8, o.weight_decay = 0.1;
    if (config_check(&o.config, &err) != 0) die(EXIT_INPUT, "%s", err.text);
    t6_start(&o);
    T6 *t = t6_open(&o);
    fill_model(t);

    size_t free_bytes, total_bytes;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    printf("%s %s %s, B %d, T %d, recompute %d: %.2f GiB of GPU memory in use\n", p->name, attn_name(attn),
           argc > 6 ? argv[6] : "", (int)o.batch_size, (int)o.seq_len, (int)o.recompute,
           (double)(total_bytes - free_bytes) / 0x1p30);
    print_matmuls(&t->matmul);
    if (argc < 8) {
        Total total = {0, 0};
        time_forward(&total, t);
        time_backward(&total, t);
        printf("%-28s %27.2f ms   floor %7.2f ms (%3.0f%%)\n", "sum", total.ms, total.floor_ms,
               100 * total.floor_ms / total.ms);
    }
    time_step(t);
    t6_close(t);
    return 0;
}
