// Decoding with a whole model: one token more for each of B sequences that have CONTEXT tokens in the cache.
//
//   build/decode_step PRESET ATTN B CONTEXT [native | fp8]    time a step; limit: the bytes of weights and cache over the read bandwidth
//   build/decode_step PRESET ATTN fit [native | fp8]          the longest context of one sequence, and the most sequences of some contexts,
//                                                             that this GPU has memory for; the longest is then run
// Weights and cache are random numbers.
#define GENERATE_NO_MAIN
#include "../../generate_t6.cu"
#include "bench.cuh"

static Generator *open_random(const Config *c, int64_t B, int64_t context, int fp8) {
    GenerateOptions o;
    memset(&o, 0, sizeof o);
    o.cache_kind = fp8 ? CACHE_FP8 : CACHE_NATIVE, o.longest_prefill = 1;
    Generator *g = generator_open(&o, c, B, context + 512);
    float *w = generator_host_weights(g);
    #pragma omp parallel for
    for (size_t i = 0; i < g->model.num_stored; i++) w[i] = (float)(0.06 * rng_uniform(1, i) - 0.03);
    generator_take_weights(g);
    size_t cache = (size_t)c->n_layer * cache_layer_bytes(g->shape, B, g->capacity);
    launch(fill_kernel, {4096, 256, 0, g->stream}, g->cache, cache, g->shape.number_bytes, (uint64_t)7);
    std::vector<int32_t> lengths(B, (int32_t)context);
    CUDA_CHECK(cudaMemcpyAsync(g->lengths, lengths.data(), (size_t)B * 4, cudaMemcpyHostToDevice, g->stream));
    for (int64_t b = 0; b < B; b++) g->host_lengths[b] = context;
    CUDA_CHECK(cudaStreamSynchronize(g->stream));
    return g;
}

// Milliseconds of a step's graph, and tokens/s of whole steps, sampling and the way to the host included.
static void time_step(const char *what, const Config *c, int64_t B, int64_t context, int fp8, double read) {
    Generator *g = open_random(c, B, context, fp8);
    std::vector<int32_t> next(B, 1);
    SamplerOptions s = {0.8, 0, 1, 0};
    for (int i = 0; i < 3; i++) generator_step(g, next.data(), 1);
    std::vector<float> times;
    cudaEvent_t start, stop;
    CUDA_CHECK(cudaEventCreate(&start));
    CUDA_CHECK(cudaEventCreate(&stop));
    for (int i = 0; i < 20; i++) {
        float ms;
        CUDA_CHECK(cudaEventRecord(start, g->stream));
        CUDA_CHECK(cudaGraphLaunch(g->graph, g->stream));
        CUDA_CHECK(cudaEventRecord(stop, g->stream));
        CUDA_CHECK(cudaEventSynchronize(stop));
        CUDA_CHECK(cudaEventElapsedTime(&ms, start, stop));
        times.push_back(ms);
    }
    std::sort(times.begin(), times.end());
    double ms = times[times.size() / 2], begin = now_seconds();
    const int steps = 50;
    for (int i = 0; i < steps; i++) {
        generator_sample(g, &s, 1, next.data());
        generator_step(g, next.data(), 1);
    }
    CUDA_CHECK(cudaStreamSynchronize(g->stream));
    double whole = (now_seconds() - begin) / steps * 1e3;
    double weights = (double)g->model.num_stored * sizeof(floatX), cache = (double)B * (double)context * c->n_layer *
        g->shape.streams * (double)cache_page_bytes(g->shape) / PAGE, limit = (weights + cache) / read / 1e6;
    printf("%s B%-3d context %-6d: step %8.3f ms, limit %8.3f (%3.0f%%), %8.0f tokens/s; with sampling %8.3f ms, %8.0f tokens/s; cache %.2f GB\n", what, (int)B,
           (int)context, ms, limit, 100 * limit / ms, B / ms * 1e3, whole, B / whole * 1e3, cache / 1e9);
    fflush(stdout);
    CUDA_CHECK(cudaEventDestroy(start));
    CUDA_CHECK(cudaEventDestroy(stop));
    generator_close(g);
}

static double need_bytes(const Model *m, int64_t B, int64_t capacity, int fp8) {
    static Generator unused;
    Buffer table[NUM_GENERATOR_BUFFERS];
    generator_table(&unused, m, B, capacity, 1, fp8, table);
    return memory_bytes(table, 0, NUM_GENERATOR_BUFFERS - 1) + MATMUL_WORKSPACE_BYTES + (64 << 20);
}

// The largest x for which fits(x), fits being true up to some point.
template <class F>
static int64_t largest(int64_t most, F fits) {
    int64_t low = 0;
    for (int64_t high = most; low < high; ) {
        int64_t middle = (low + high + 1) / 2;
        if (fits(middle)) low = middle;
        else high = middle - 1;
    }
    return low;
}

int main(int argc, char **argv) {
    set_program_name(argv[0]);
    Error err;
    AttnKind attn = ATTN_TPA;
    const Preset *p = argc > 3 ? find_preset(argv[1]) : NULL;
    bool fit = argc > 3 && !strcmp(argv[3], "fit");
    if (!p || attn_from_name(argv[2], &attn, &err) != 0 || (!fit && argc < 5))
        die(EXIT_INPUT, "usage: decode_step PRESET ATTN (B CONTEXT | fit) [native | fp8]");
    const char *kind = argc > (fit ? 4 : 5) ? argv[fit ? 4 : 5] : "native";
    int fp8 = !strcmp(kind, "fp8");
    Config c = preset_config(p, attn);
    char what[64];
    snprintf(what, sizeof what, "%s %s %s", p->name, attn_name(attn), kind);
    generator_start(NULL);
    double read = read_gb_per_s();
    if (!fit) {
        time_step(what, &c, atoll(argv[3]), atoll(argv[4]), fp8, read);
        return 0;
    }
    Model m;
    model_init(&m, &c, generator_pad());
    size_t free_bytes, total_bytes;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    int64_t longest = largest(INT32_MAX / 2, [&](int64_t n) { return need_bytes(&m, 1, n + 512, fp8) <= (double)free_bytes; });
    printf("%s, %.1f GiB free: one sequence of %" PRId64 " tokens;", what, (double)free_bytes / 0x1p30, longest);
    for (int64_t context : {1024, 65536})
        printf(" %" PRId64 " sequences of %" PRId64 ";", largest(1 << 20, [&](int64_t B) { return need_bytes(&m, B, context + 512, fp8) <= (double)free_bytes; }), context);
    printf("\n");
    time_step(what, &c, 1, longest, fp8, read);
    model_free(&m);
    return 0;
}
