// Where the time of a training step goes: each operator of train_t6.cu on a real model's buffers, timed alone, next to
// its floor; then the whole micro-step, as single launches and as a graph, and the update.
//
//   make build/step
//   build/step [PRESET [B [T [ATTN [RECOMPUTE]]]]]      build/step 124M 24 1024 tpa 0
//
// Each line: how often the operator runs in a micro-step, its time, and its floor, the larger of bytes / 4.3 TB/s (each
// input read once, each output written once) and operations / 790 TFLOP/s. These are the copy bandwidth and the bf16
// matrix rate of one H200. One version, the trainer's; results: dev/results/train_gpu.md.
#define T6_NO_MAIN
#include "../../train_t6.cu"

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

int main(int argc, char **argv) {
    set_program_name(argv[0]);
    Error err;
    AttnKind attn = ATTN_TPA;
    const Preset *p = find_preset(argc > 1 ? argv[1] : "124M");
    if (!p || (argc > 4 && attn_from_name(argv[4], &attn, &err) != 0))
        die(EXIT_INPUT, "usage: step [PRESET [B [T [ATTN [RECOMPUTE]]]]]");
    TrainOptions o;
    memset(&o, 0, sizeof o);
    o.config = preset_config(p, attn);
    o.batch_size = argc > 2 ? atoll(argv[2]) : p->batch_size, o.seq_len = argc > 3 ? atoll(argv[3]) : p->seq_len;
    o.recompute = argc > 5 ? atoll(argv[5]) : 0;
    o.clip = 1, o.beta1 = 0.9, o.beta2 = 0.95, o.adam_eps = 1e-8, o.weight_decay = 0.1;
    if (config_check(&o.config, &err) != 0) die(EXIT_INPUT, "%s", err.text);
    trainer_start(&o);
    T6 *t = trainer_open(&o);
    const Model *m = &t->model;
    Activations *a = &t->acts;
    Matmul *mm = &t->matmul;
    cudaStream_t s = t->stream;
    int64_t B = o.batch_size, T = o.seq_len, N = B * T, L = o.config.n_layer, C = o.config.n_embd;
    int64_t D = m->D, Fp = m->Fp, Pp = m->Pp, Vp = m->Vp, V = o.config.vocab_size;
    double X = sizeof(floatX), kv = (double)heads_stored(m->k, (int)o.config.n_head) * (double)o.config.head_dim;
    double qkv = (double)D + 2 * kv, n = (double)N;

    // random weights and a few whole micro-steps, so that every buffer holds realistic numbers
    HostWeights host = trainer_host_weights(t, 0);
    #pragma omp parallel for
    for (size_t i = 0; i < m->num_stored; i++) host.params[i] = (float)(0.06 * rng_uniform(1, i) - 0.03);
    trainer_take_weights(t, 0);
    std::vector<int32_t> inputs(N), targets(N);
    for (int64_t i = 0; i < N; i++) {
        inputs[i] = (int32_t)(rng_at(2, i) % (uint64_t)V);
        targets[i] = (int32_t)(rng_at(3, i) % (uint64_t)V);
    }
    for (int k = 0; k < 4; k++)         // 0: overwrites the gradients, 1: accumulates; captures the graph of each
        trainer_micro_step(t, inputs.data(), targets.data(), 1.0 / n, k % 2);
    CUDA_CHECK(cudaStreamSynchronize(s));

    size_t free_bytes, total_bytes;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    printf("%s %s, B %d, T %d, recompute %d: %.2f GiB of GPU memory in use\n", p->name, attn_name(attn), (int)B, (int)T,
           (int)o.recompute, (double)(total_bytes - free_bytes) / 0x1p30);
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

    const floatX *w = t->params + m->layers;
    float *dw = t->grads + m->layers;
    AttentionShape shape = attention_shape(m, B, T);
    HeadsShape heads = heads_shape(m, T);
    Total total = {0, 0};
    double pairs = (double)B * (double)o.config.n_head * (double)T * (double)T / 2 * (double)o.config.head_dim;
    row(&total, "encoder_forward", 1, 2 * n * C * X, 0, s,
        [&] { encoder_forward(a->x, a->batch, t->params, N, C, s); });
    row(&total, "rmsnorm_forward", 2 * L + 1, 2 * n * C * X, 0, s,
        [&] { rmsnorm_forward(a->n1, a->rstd1, a->x, N, C, 1e-6, s); });
    row(&total, "matmul wqkv", L, X * (n * (C + Pp) + (double)C * Pp), 2 * n * C * Pp, s,
        [&] { linear_forward(mm, a->fac, a->n1, w + m->wqkv, N, C, Pp, OVERWRITE, s); });
    row(&total, "heads_forward", 2 * L, X * n * (Pp + qkv), 0, s,
        [&] { heads_forward(a->q, a->k, a->v, a->fac, a->rope, heads, N, s); });
    row(&total, "attention_forward", L, X * n * (qkv + D), 4 * pairs, s,
        [&] { layer_attention_forward<floatX>(a->y, a->lse, a->q, a->k, a->v, shape, s); });
    row(&total, "matmul wo +=", L, X * (n * (2 * C + D) + (double)C * D), 2 * n * C * D, s,
        [&] { linear_forward(mm, a->x, a->y, w + m->wo, N, D, C, ACCUMULATE, s); });
    row(&total, "matmul w12", L, X * (n * (C + 2 * Fp) + 2.0 * C * Fp), 4 * n * C * Fp, s,
        [&] { linear_forward(mm, a->u, a->n2, w + m->w12, N, C, 2 * Fp, OVERWRITE, s); });
    row(&total, "swiglu_forward", L, 3 * X * n * Fp, 0, s, [&] { swiglu_forward(a->s, a->u, N, Fp, s); });
    row(&total, "matmul w3 +=", L, X * (n * (2 * C + Fp) + (double)C * Fp), 2 * n * C * Fp, s,
        [&] { linear_forward(mm, a->x, a->s, w + m->w3, N, Fp, C, ACCUMULATE, s); });
    // the classifier, in chunks of rows
    int64_t rows = N < CLASSIFIER_ROWS ? N : CLASSIFIER_ROWS, chunks = ceil_div(N, rows);
    double r = (double)rows;
    row(&total, "matmul logits", chunks, X * (r * (C + Vp) + (double)C * Vp), 2 * r * C * Vp, s,
        [&] { linear_forward(mm, a->logits, a->nf, t->params, rows, C, Vp, OVERWRITE, s); });
    row(&total, "fused_classifier", chunks, 2 * X * r * Vp, 0, s,
        [&] { fused_classifier(a->logits, a->losses, a->batch + N, rows, V, Vp, 1 / n, LOSS_AND_DLOGITS, s); });
    row(&total, "matmul logits dinp", chunks, X * (r * (C + Vp) + (double)C * Vp), 2 * r * C * Vp, s,
        [&] { linear_backward_input(mm, a->dn, a->logits, t->params, rows, C, Vp, s); });
    row(&total, "matmul logits dw +=", chunks, X * r * (C + Vp) + 8.0 * C * Vp, 2 * r * C * Vp, s,
        [&] { linear_backward_weight(mm, t->grads, a->logits, a->nf, rows, C, Vp, ACCUMULATE, s); });
    // backward
    row(&total, "rmsnorm_backward", 2 * L + 1, 4 * X * n * C, 0, s,
        [&] { rmsnorm_backward(a->dx, a->dn, a->n2, a->rstd2, N, C, s); });
    row(&total, "matmul w3 dinp", L, X * (n * (C + Fp) + (double)C * Fp), 2 * n * C * Fp, s,
        [&] { linear_backward_input(mm, a->s, a->dx, w + m->w3, N, Fp, C, s); });
    row(&total, "swiglu_backward", L, 6 * X * n * Fp, 0, s, [&] { swiglu_backward(a->u, a->s, N, Fp, s); });
    row(&total, "matmul w3 dw +=", L, X * n * (C + Fp) + 8.0 * C * Fp, 2 * n * C * Fp, s,
        [&] { linear_backward_weight(mm, dw + m->w3, a->dx, a->s, N, Fp, C, ACCUMULATE, s); });
    row(&total, "matmul w12 dinp", L, X * (n * (C + 2 * Fp) + 2.0 * C * Fp), 4 * n * C * Fp, s,
        [&] { linear_backward_input(mm, a->dn, a->u, w + m->w12, N, C, 2 * Fp, s); });
    row(&total, "matmul w12 dw +=", L, X * n * (C + 2 * Fp) + 16.0 * C * Fp, 4 * n * C * Fp, s,
        [&] { linear_backward_weight(mm, dw + m->w12, a->u, a->n2, N, C, 2 * Fp, ACCUMULATE, s); });
    row(&total, "matmul wo dinp", L, X * (n * (C + D) + (double)C * D), 2 * n * C * D, s,
        [&] { linear_backward_input(mm, a->dy, a->dx, w + m->wo, N, D, C, s); });
    row(&total, "matmul wo dw +=", L, X * n * (C + D) + 8.0 * C * D, 2 * n * C * D, s,
        [&] { linear_backward_weight(mm, dw + m->wo, a->dx, a->y, N, D, C, ACCUMULATE, s); });
    row(&total, "attention_backward", L, X * n * (2 * qkv + 2 * D), 10 * pairs, s, [&] {
        layer_attention_backward<floatX>(a->dq, a->dk, a->dv, a->dy, a->y, a->lse, a->q, a->k, a->v,
                                         a->attention_scratch, shape, s);
    });
    row(&total, "heads_backward", L, X * n * (2 * Pp + qkv), 0, s,
        [&] { heads_backward(a->fac, a->dq, a->dk, a->dv, a->fac, a->rope, heads, N, s); });
    row(&total, "matmul wqkv dinp", L, X * (n * (C + Pp) + (double)C * Pp), 2 * n * C * Pp, s,
        [&] { linear_backward_input(mm, a->dn, a->fac, w + m->wqkv, N, C, Pp, s); });
    row(&total, "matmul wqkv dw +=", L, X * n * (C + Pp) + 8.0 * C * Pp, 2 * n * C * Pp, s,
        [&] { linear_backward_weight(mm, dw + m->wqkv, a->fac, a->n1, N, C, Pp, ACCUMULATE, s); });
    row(&total, "encoder_backward", 1, X * n * C + 8.0 * n * C, 0, s,
        [&] { encoder_backward(t->grads, a->dx, a->batch, a->batch + 2 * N, N, C, s); });
    printf("%-28s %27.2f ms   floor %7.2f ms (%3.0f%%)\n", "sum", total.ms, total.floor_ms,
           100 * total.floor_ms / total.ms);

    double graph = 0, flop = model_flop_per_token(m, T) * n;
    for (int i = 0; i < 3; i++) {       // alternating: clocks fall as the GPU warms up; a long run sees the last pair
        double launches = median_ms(s, 5, [&] { t6_micro_step(t, B, T, 1 / n, ACCUMULATE); });
        graph = median_ms(s, 5, [&] { CUDA_CHECK(cudaGraphLaunch(t->graphs[ACCUMULATE], s)); });
        printf("micro-step: %.2f ms as launches, %.2f ms as a graph: ", launches, graph);
        printf("%.0f tok/s, %.0f TFLOP/s (6 N + causal attention)\n", n / graph * 1e3, flop / graph / 1e9);
    }
    double update = median_ms(s, 5, [&] { t6_update(t, adamw_step(1e-4, 0.9, 0.95, 1e-8, 0.1, 1), 1); });
    printf("update: %.3f ms, %.0f GB/s; with 5 micro-steps per update: %.0f tok/s\n", update,
           (double)m->num_stored * (32 + X) / update / 1e6, 5 * n / (5 * graph + update) * 1e3);
    trainer_close(t);
    return 0;
}
