// How much of the gradient sums the backward pass hides, on one GPU. Each collective is simulated by a kernel that
// waits as long as it would take in a ring of WORLD ranks, at 1e9 (no time at all), 400 and 50 GB/s per rank.
//
//   make build/overlap
//   build/overlap [PRESET [B [ZERO [WORLD]]]]      build/overlap 124M 24 2 8
//
// Prints the step's time and, for each collective, its start and end relative to the backward pass. Exposed: from the
// end of the backward pass to the end of the last collective. A step is one micro-batch, the worst case: with more of
// them stages 0 and 1 sum once per step, stage 2 after each. One version; results: dev/results/scaling.md.
#define T6_NO_MAIN
#include "../../train_t6.cu"

#include <vector>

static float ms_between(cudaEvent_t from, cudaEvent_t to) {
    float ms;
    CUDA_CHECK(cudaEventElapsedTime(&ms, from, to));
    return ms;
}

int main(int argc, char **argv) {
    program_start(argv[0]);
    Error err;
    const Preset *p = find_preset(argc > 1 ? argv[1] : "124M");
    if (!p) die(EXIT_INPUT, "usage: overlap [PRESET [B [ZERO [WORLD]]]]");
    TrainOptions o;
    memset(&o, 0, sizeof o);
    o.config = preset_config(p, ATTN_TPA);
    o.batch_size = argc > 2 ? atoll(argv[2]) : p->batch_size, o.seq_len = p->seq_len, o.accum = 1;
    o.zero = argc > 3 ? atoll(argv[3]) : 0;
    o.clip = 1, o.beta1 = 0.9, o.beta2 = 0.95, o.adam_eps = 1e-8, o.weight_decay = 0.1;
    if (config_check(&o.config, &err) != 0) die(EXIT_INPUT, "%s", err.text);
    t6_start(&o);
    Comm alone;
    memset(&alone, 0, sizeof alone);
    alone.world = alone.local_world = 1;
    GpuComm *g = (GpuComm *)xcalloc(1, sizeof *g);
    g->comm = o.comm = &alone, g->transport = TRANSPORT_SIMULATED;
    g->simulated_world = argc > 4 ? atoi(argv[4]) : 8, g->simulated_GBps = 1e9;
    CUDA_CHECK(cudaStreamCreateWithFlags(&g->stream, cudaStreamNonBlocking));
    o.gpu_comm = g;
    T6 *t = t6_open(&o);
    const Model *m = &t->model;
    HostWeights host = t6_host_weights(t, ROOM_ONLY);
    init_weights(host.params, m, 1);
    t6_load_weights(t, WEIGHTS_ONLY);
    int64_t N = o.batch_size * o.seq_len;
    std::vector<int32_t> inputs(N), targets(N);
    for (int64_t i = 0; i < N; i++) {
        inputs[i] = (int32_t)(rng_at(2, i) % (uint64_t)o.config.vocab_size);
        targets[i] = (int32_t)(rng_at(3, i) % (uint64_t)o.config.vocab_size);
    }
    cudaEvent_t begin, end;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    double loss, norm;
    const double speeds[] = {1e9, 400, 50};
    for (int i = 0; i < 3; i++) {
        g->simulated_GBps = speeds[i];
        double start = 0;
        for (int step = 0; step < 13; step++) {
            if (step == 3) start = now_seconds();
            t6_micro_step(t, inputs.data(), targets.data(), 1.0 / (double)N, 0);
            t6_update(t, &o, 1e-5, step + 1, &loss, &norm);
        }
        CUDA_CHECK(cudaDeviceSynchronize());
        double step_ms = (now_seconds() - start) * 1e2;
        CUDA_CHECK(cudaEventRecord(begin, t->stream));
        t6_micro_step(t, inputs.data(), targets.data(), 1.0 / (double)N, 0);
        CUDA_CHECK(cudaEventRecord(end, t->stream));
        CUDA_CHECK(cudaDeviceSynchronize());
        double total = 0, last = 0, compute = ms_between(begin, end);
        int first = g->num_pending - model_buckets(m);      // those before it gather the previous step's weights
        for (int k = first; k < g->num_pending; k++) {
            last = ms_between(begin, g->pending[k].end);
            total += ms_between(g->pending[k].start, g->pending[k].end);
        }
        printf("%s %s, B %d, ZeRO %d, %d ranks at %.0f GB/s: ", p->name, attn_name(o.config.attn), (int)o.batch_size,
               (int)o.zero, g->simulated_world, speeds[i]);
        printf("step %.2f ms; forward and backward %.2f ms, collectives %.2f ms in all, exposed %.2f ms\n", step_ms,
               compute, total, last > compute ? last - compute : 0.0);
        for (int k = first; k < g->num_pending && speeds[i] < 1e9; k++)
            printf("  %-28s bucket %2d: %8.3f to %8.3f ms\n", g->pending[k].what, g->num_pending - 1 - k,
                   ms_between(begin, g->pending[k].start), ms_between(begin, g->pending[k].end));
    }
    t6_close(t);
    return 0;
}
