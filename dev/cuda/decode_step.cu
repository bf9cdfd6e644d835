// A decoding step of a whole model: one more token for each of B sequences with CONTEXT tokens in the cache. Weights
// and cache are random numbers.
//
//   build/decode_step PRESET ATTN B CONTEXT [native | fp8]    times a step. Its limit is the time to read weights and
//                                                             cache once, at the measured read bandwidth.
//   build/decode_step PRESET ATTN fit [native | fp8]          prints what fits in this GPU's memory: the longest
//                                                             context of one sequence, and the most sequences of some
//                                                             contexts. Then times the longest.
#define T6_NO_MAIN
#include "../../generate_t6.cu"
#include "bench.cuh"

enum { SPARE_TOKENS = 512 };            // capacity after the context

// A generator with random weights whose B sequences have `context` random tokens in the cache.
static Generator *open_random(const Config *c, int64_t B, int64_t context, CacheKind cache) {
    GenerateOptions o;
    memset(&o, 0, sizeof o);
    o.cache_kind = cache, o.longest_prefill = 1;
    Generator *g = generator_open(&o, c, B, context + SPARE_TOKENS);
    float *w = generator_host_weights(g);
    #pragma omp parallel for
    for (size_t i = 0; i < g->model.num_stored; i++) w[i] = (float)(0.06 * rng_uniform(1, i) - 0.03);
    generator_load_weights(g);
    const size_t cache_bytes = (size_t)c->n_layer * cache_layer_bytes(g->shape, B, g->capacity);
    const uint64_t seed = 7;
    launch(fill_kernel, {4096, 256, 0, g->stream}, g->cache, cache_bytes, g->shape.number_bytes, seed);
    std::vector<int32_t> lengths(B, (int32_t)context);
    const size_t bytes = (size_t)B * sizeof(int32_t);
    CUDA_CHECK(cudaMemcpyAsync(g->lengths, lengths.data(), bytes, cudaMemcpyHostToDevice, g->stream));
    for (int64_t b = 0; b < B; b++) g->host_lengths[b] = context;
    CUDA_CHECK(cudaStreamSynchronize(g->stream));
    return g;
}

// Median milliseconds of 20 launches of a step's graph.
static double graph_ms(Generator *g) {
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
    CUDA_CHECK(cudaEventDestroy(start));
    CUDA_CHECK(cudaEventDestroy(stop));
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

// Milliseconds per step of 50 whole ones, with sampling and the copies to the host.
static double whole_step_ms(Generator *g, int32_t *next) {
    const int steps = 50, one_token = 1;
    const uint64_t seed = 1;
    SamplerOptions s = {};
    s.temperature = 0.8, s.top_p = 1;
    double begin = now_seconds();
    for (int i = 0; i < steps; i++) {
        generator_sample(g, &s, seed, next);
        generator_step(g, next, one_token);
    }
    CUDA_CHECK(cudaStreamSynchronize(g->stream));
    return (now_seconds() - begin) / steps * 1e3;
}

// Times a step and prints a line. read: GB/s.
static void time_step(const char *what, const Config *c, int64_t B, int64_t context, CacheKind cache, double read) {
    Generator *g = open_random(c, B, context, cache);
    std::vector<int32_t> next(B, 1);
    const int warm_up = 3, one_token = 1;
    for (int i = 0; i < warm_up; i++) generator_step(g, next.data(), one_token);
    const double ms = graph_ms(g), whole_ms = whole_step_ms(g, next.data());
    const double weight_bytes = (double)g->model.num_stored * sizeof(floatX);
    const double token_bytes = (double)cache_page_bytes(g->shape) / PAGE * g->shape.streams * c->n_layer;
    const double cache_bytes = (double)B * (double)context * token_bytes;
    const double limit = (weight_bytes + cache_bytes) / read / 1e6;
    printf("%s B%-3d context %-6d: step %8.3f ms, limit %8.3f (%3.0f%%), %8.0f tokens/s; "
           "with sampling %8.3f ms, %8.0f tokens/s; cache %.2f GB\n", what, (int)B, (int)context, ms, limit,
           100 * limit / ms, B / ms * 1e3, whole_ms, B / whole_ms * 1e3, cache_bytes / 1e9);
    fflush(stdout);
    generator_close(g);
}

// GPU memory for B sequences of `capacity` tokens.
static double need_bytes(const Model *m, int64_t B, int64_t capacity, CacheKind cache) {
    static Generator unused;
    Buffer table[NUM_GENERATOR_BUFFERS];
    const int longest_prefill = 1;
    generator_table(&unused, m, B, capacity, longest_prefill, cache, table);
    const int other_bytes = 64 << 20;       // of CUDA
    return memory_bytes(table, 0, NUM_GENERATOR_BUFFERS - 1) + MATMUL_WORKSPACE_BYTES + other_bytes;
}

// The largest x up to `most` for which fits(x); if it fits at x, it fits at every smaller one.
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
    program_start(argv[0]);
    Error err;
    AttnKind attn = ATTN_TPA;
    const Preset *p = argc > 3 ? find_preset(argv[1]) : NULL;
    bool fit = argc > 3 && !strcmp(argv[3], "fit");
    if (!p || attn_from_name(argv[2], &attn, &err) != 0 || (!fit && argc < 5))
        die(EXIT_INPUT, "usage: decode_step PRESET ATTN (B CONTEXT | fit) [native | fp8]");
    const char *kind = argc > (fit ? 4 : 5) ? argv[fit ? 4 : 5] : "native";
    CacheKind cache = !strcmp(kind, "fp8") ? CACHE_FP8 : CACHE_NATIVE;
    Config c = preset_config(p, attn);
    char what[64];
    snprintf(what, sizeof what, "%s %s %s", p->name, attn_name(attn), kind);
    generator_start(NULL);
    double read = read_gb_per_s();
    if (!fit) {
        time_step(what, &c, atoll(argv[3]), atoll(argv[4]), cache, read);
        return 0;
    }
    Model m;
    model_init(&m, &c, PAD);
    size_t free_bytes, total_bytes;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    auto fits = [&](int64_t B, int64_t context) {
        return need_bytes(&m, B, context + SPARE_TOKENS, cache) <= (double)free_bytes;
    };
    int64_t longest = largest(INT32_MAX / 2, [&](int64_t context) { return fits(1, context); });
    printf("%s, %.1f GiB free: one sequence of %" PRId64 " tokens;", what, (double)free_bytes / 0x1p30, longest);
    for (int64_t context : {1024, 65536}) {
        int64_t most = largest(1 << 20, [&](int64_t B) { return fits(B, context); });
        printf(" %" PRId64 " sequences of %" PRId64 ";", most, context);
    }
    printf("\n");
    time_step(what, &c, 1, longest, cache, read);
    model_free(&m);
    return 0;
}
