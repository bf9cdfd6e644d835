// test_units: tests of the headers in llmc/, where a mistake would not show in a loss curve. The list of tests is at
// the end of this file.
#include "llmc/checkpoint.h"
#include "llmc/dataloader.h"
#include "llmc/fp8.h"
#include "llmc/generator.h"
#include "llmc/gpus.h"
#include "llmc/model_table.h"
#include "llmc/host_memory.h"
#include "llmc/options.h"
#include "llmc/python_random.h"
#include "test/testing.h"

typedef struct {
    Score score;
    const char *folder;         // temporary; the tests use different names in it
} Units;

// For steps that a test needs but does not test.
static void must(int rc, const Error *err) {
    if (rc != 0) die(EXIT_SYSTEM, "%s", err->text);
}

// ---------------------------------------------------------------------------------------------------------------------
// rng.h

static void test_permutation(Units *u) {
    int wrong = 0;
    for (uint64_t n = 1; n < 300; n++) {
        unsigned char hits[300] = {0};
        for (uint64_t i = 0; i < n; i++) hits[rng_permute(n * 7, i, n)]++;
        for (uint64_t i = 0; i < n; i++) wrong += hits[i] != 1;
    }
    report(&u->score, wrong == 0, "rng_permute: a permutation for every size from 1 to 299");
    double moved = 0;
    for (uint64_t i = 0; i < 10000; i++) moved += fabs((double)rng_permute(3, i, 10000) - (double)i);
    report(&u->score, fabs(moved / 1e4 - 10000.0 / 3) < 150,
           "rng_permute: elements move by %.0f on average, in a random permutation by 3333", moved / 1e4);
}

// ---------------------------------------------------------------------------------------------------------------------
// dataloader.h

enum { MAX_TOKEN = 50000 };

// Writes n shards NAME_train_*.bin of these sizes, in tokens. Token i of the whole stream is i % MAX_TOKEN. Returns the
// pattern of their paths, which the caller frees.
static char *write_shards(const Units *u, const char *name, const int *tokens, int n) {
    Error err;
    int stream = 0;
    for (int s = 0; s < n; s++) {
        int32_t header[SHARD_HEADER_INTS];
        shard_fill_header(header, (uint64_t)tokens[s]);
        size_t size = sizeof header + 2 * (size_t)tokens[s];
        char *path = xasprintf("%s/%s_train_%06d.bin", u->folder, name, s + 1), *bytes = xmalloc(size);
        memcpy(bytes, header, sizeof header);
        for (int i = 0; i < tokens[s]; i++, stream++) {
            uint16_t token = (uint16_t)(stream % MAX_TOKEN);
            memcpy(bytes + sizeof header + 2 * i, &token, 2);
        }
        must(write_small_file(path, bytes, size, &err), &err);
        free(bytes);
        free(path);
    }
    return xasprintf("%s/%s_train_*.bin", u->folder, name);
}

// Sizes of shards. They hold 124, 2, 0, 1, 416 and 0 windows of 8 tokens, each of which needs a ninth for the last
// target.
static const int uneven[] = {1000, 17, 8, 9, 3333, 1};

// Reads 8 steps of 16 windows with `world` ranks. Returns a sum that tells which windows each step had, whatever their
// order, and adds to *wrong: targets that are not the next inputs, windows seen twice, a wrong number of windows.
static uint64_t read_with_ranks(const char *pattern, LoaderOrder order, int world, int *wrong) {
    enum { T = 8, B = 2, STEP_WINDOWS = 16, MAX_WORLD = 8 };
    DataLoader d[MAX_WORLD];
    int32_t inputs[B * T], targets[B * T];
    unsigned char *seen = xcalloc(MAX_TOKEN, 1);        // by a window's first token
    uint64_t sum = 0;
    Error err;
    for (int r = 0; r < world; r++) must(loader_open(&d[r], pattern, T, order, B, 42, &err), &err);
    if (order == ORDER_SHUFFLED && d[0].windows != 124 + 2 + 0 + 1 + 416) (*wrong)++;
    for (int step = 0; step < 8; step++) {              // --shuffle 0 comes to the end of an epoch in them
        for (int r = 0; r < world; r++)
            for (int micro = r; micro * B < STEP_WINDOWS; micro += world) {
                must(loader_read(&d[r], (uint64_t)(micro * B), B, inputs, targets, &err), &err);
                for (int b = 0; b < B; b++) {
                    sum += mix64((uint64_t)inputs[b * T] + 1) * (uint64_t)(step + 1);
                    if (order == ORDER_SHUFFLED && seen[inputs[b * T]]++) (*wrong)++;
                }
                for (int i = 0; i < B * T - 1; i++)
                    if ((i + 1) % T && inputs[i + 1] != targets[i]) (*wrong)++;
            }
        for (int r = 0; r < world; r++) loader_advance(&d[r], STEP_WINDOWS);
    }
    free(seen);
    for (int r = 0; r < world; r++) loader_close(&d[r]);
    return sum;
}

static void test_loader_ranks(Units *u) {
    char *pattern = write_shards(u, "ranks", uneven, 6);
    for (LoaderOrder order = ORDER_SEQUENTIAL; order <= ORDER_SHUFFLED; order++) {
        const char *name = order == ORDER_SHUFFLED ? "shuffled" : "sequential";
        int wrong = 0, different = 0;
        uint64_t alone = read_with_ranks(pattern, order, 1, &wrong);
        for (int world = 2; world <= 8; world++) different += read_with_ranks(pattern, order, world, &wrong) != alone;
        report(&u->score, wrong == 0, "loader, %s: targets follow inputs, no window twice in an epoch", name);
        report(&u->score, different == 0, "loader, %s: each step reads the same windows with 1 to 8 ranks", name);
    }
    free(pattern);
}

// Reads three epochs with one loader; a second one joins in at a place of the second epoch.
static void test_loader_epochs(Units *u) {
    enum { T = 8 };
    char *pattern = write_shards(u, "epochs", uneven, 6);
    Error err;
    DataLoader d, resumed;
    int32_t inputs[T], targets[T], other[T], first = -1, reshuffled = 0, wrong = 0;
    unsigned char *seen = xcalloc(MAX_TOKEN, 1);
    must(loader_open(&d, pattern, T, ORDER_SHUFFLED, 1, 42, &err), &err);
    must(loader_open(&resumed, pattern, T, ORDER_SHUFFLED, 1, 42, &err), &err);
    uint64_t join = d.windows + 5;
    for (uint64_t i = 0; i < 3 * d.windows; i++) {
        if (i == join) resumed.epoch = d.epoch, resumed.position = d.position;
        must(loader_next(&d, 1, inputs, targets, &err), &err);
        seen[inputs[0]]++;
        if (i == 0) first = inputs[0];
        if (i == d.windows) reshuffled = inputs[0] != first;
        if (i >= join) {
            must(loader_next(&resumed, 1, other, targets, &err), &err);
            wrong += memcmp(inputs, other, sizeof inputs) != 0;
        }
    }
    uint64_t thrice = 0;
    for (int i = 0; i < MAX_TOKEN; i++) thrice += seen[i] == 3;
    report(&u->score, thrice == d.windows && d.epoch == 3 && d.position == 0,
           "loader: three epochs read each of %d windows three times", (int)d.windows);
    report(&u->score, reshuffled, "loader: epochs have different orders");
    report(&u->score, wrong == 0, "loader: set to an epoch and position, it reads what the first one reads from there");
    loader_close(&d), loader_close(&resumed);
    free(seen);
    free(pattern);
}

// llm.c's order: micro-batch k reads tokens k*B*T to (k+1)*B*T; a tail that does not fill a micro-batch is left out;
// the next shard follows, and the first one after the last.
static void test_loader_sequential(Units *u) {
    enum { T = 5, B = 3 };
    static const int tokens[] = {47, 16, 31};       // 3, 1 and 2 micro-batches of 15 tokens, plus one for a target
    static const int starts[] = {0, 15, 30, 47, 63, 78, 0};
    char *pattern = write_shards(u, "sequential", tokens, 3);
    Error err;
    DataLoader d;
    int32_t inputs[B * T], targets[B * T];
    int wrong = 0;
    must(loader_open(&d, pattern, T, ORDER_SEQUENTIAL, B, 0, &err), &err);
    for (int k = 0; k < 7; k++) {
        must(loader_next(&d, B, inputs, targets, &err), &err);
        for (int i = 0; i < B * T; i++) wrong += inputs[i] != starts[k] + i || targets[i] != starts[k] + i + 1;
    }
    report(&u->score, wrong == 0, "loader: --shuffle 0 is llm.c's order, shard after shard and again from the first");
    loader_close(&d);
    free(pattern);
}

// ---------------------------------------------------------------------------------------------------------------------
// schedule.h

static void test_schedule(Units *u) {
    // warm-up to step 10, the end at step 110; wsd decays from step 90 on
    static const struct { long step; double cosine, linear, wsd, constant; } expected[] = {
        {0, 0.1, 0.1, 0.1, 0.1}, {9, 1, 1, 1, 1}, {10, 1, 1, 1, 1}, {35, 0.1 + 0.45 * (1 + M_SQRT1_2), 0.775, 1, 1},
        {60, 0.55, 0.55, 1, 1}, {90, 0.1 + 0.45 * (1 + -0.80901699437494745), 0.28, 1, 1},
        {100, 0.1 + 0.45 * (1 + -0.95105651629515353), 0.19, 0.55, 1}, {110, 0.1, 0.1, 0.1, 1},
        {9999, 0.1, 0.1, 0.1, 1}};
    for (int kind = 0; kind < NUM_SCHEDULES; kind++) {
        const char *name = schedule_name((ScheduleKind)kind);
        Schedule s = {(ScheduleKind)kind, .lr = 1.0, .min_lr = 0.1, .warmup_steps = 10, .max_steps = 110,
                      .decay_steps = 20};
        int wrong = 0;
        for (int i = 0; i < 9; i++) {
            const double want[] = {expected[i].cosine, expected[i].linear, expected[i].wsd, expected[i].constant};
            wrong += fabs(schedule_lr(&s, expected[i].step) - want[kind]) >= 1e-12;
        }
        report(&u->score, wrong == 0, "schedule %s: warm-up, peak, on the way, end and beyond: %d wrong", name, wrong);
        s.warmup_steps = 0, s.max_steps = 1, s.decay_steps = 0;
        report(&u->score, schedule_lr(&s, 0) == 1, "schedule %s: no warm-up, one step", name);
        s.decay_steps = 1;
        report(&u->score, schedule_lr(&s, 0) == 1, "schedule %s: one step of decay", name);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// sampler.h

// 100,000 draws with u spread evenly over [0, 1), for each of the options.
static void test_sampler(Units *u) {
    enum { V = 6, DRAWS = 100000 };
    static const float logits[V] = {1, 3, 2, 3, -1, 0};
    const SamplerOptions greedy = {.temperature = 0, .top_p = 1}, all = {.temperature = 1, .top_p = 1};
    const SamplerOptions keep_1_and_3[] = {
        {.temperature = 1, .top_p = 1, .top_k = 2},
        {.temperature = 1, .top_p = 0.5},               // tokens 1 and 3 have 0.37 each: together they reach one half
        {.temperature = 1, .top_p = 1, .min_p = 0.5}};  // token 2 has e^-1 = 0.37 of the likeliest
    int counts[V] = {0}, others = 0;
    double sum = 0, worst = 0;
    for (int i = 0; i < V; i++) sum += exp(logits[i]);
    for (int i = 0; i < DRAWS; i++) {
        double uniform = (i + 0.5) / DRAWS;
        counts[sample_token(logits, V, &all, uniform)]++;
        for (int k = 0; k < 3; k++) {
            int id = sample_token(logits, V, &keep_1_and_3[k], uniform);
            others += id != 1 && id != 3;
        }
    }
    for (int i = 0; i < V; i++) worst = fmax(worst, fabs((double)counts[i] / DRAWS - exp(logits[i]) / sum));
    report(&u->score, worst < 1e-4, "sampler: frequencies are the softmax");
    report(&u->score, sample_token(logits, V, &greedy, 0.9) == 1, "sampler: greedy takes the first of the likeliest");
    report(&u->score, others == 0, "sampler: top-k, top-p and min-p keep what they should");
    const SamplerOptions padded = {.temperature = 100, .top_p = 1, .known = 3};
    int beyond = 0;
    for (int i = 0; i < DRAWS; i++) beyond += sample_token(logits, V, &padded, (i + 0.5) / DRAWS) >= 3;
    report(&u->score, beyond == 0, "sampler: ids that pad the vocabulary are never drawn");
}

typedef struct { float p; int id; } Likelihood;

static int compare_likelihoods(const void *a, const void *b) {      // the likeliest first, then the lower id
    const Likelihood *x = a, *y = b;
    return x->p != y->p ? (x->p < y->p ? 1 : -1) : x->id - y->id;
}

// Which tokens the options keep, by the definition: sort all, then cut off. p (V): likelihoods, the largest 1.
static void mark_kept(char *kept, const float *p, int V, const SamplerOptions *o) {
    Likelihood *sorted = xmalloc((size_t)V * sizeof *sorted);
    int n = o->top_k && o->top_k < V ? (int)o->top_k : V;
    double total = 0, sum = 0;
    for (int i = 0; i < V; i++) sorted[i] = (Likelihood){p[i], i}, kept[i] = 0;
    qsort(sorted, (size_t)V, sizeof *sorted, compare_likelihoods);
    for (int i = 0; i < n; i++) total += sorted[i].p;
    for (int i = 0; i < n && (i == 0 || o->top_p == 1 || sum < o->top_p * total); i++) {
        sum += sorted[i].p;
        kept[sorted[i].id] = sorted[i].p >= o->min_p;
    }
    free(sorted);
}

// Each kept token owns an interval of u, in the order of ids: a u just inside either end must give that token. Few
// levels of likelihood make many ties.
static void test_sampler_intervals(Units *u, int V, int levels) {
    float *logits = xmalloc((size_t)V * sizeof *logits), *p = xmalloc((size_t)V * sizeof *p);
    char *kept = xmalloc((size_t)V);
    int wrong = 0, draws = 0;
    for (int trial = 0; trial < 60; trial++) {
        Random r = {rng_stream(5, (uint64_t)(trial + 1000 * V + levels)), 0};
        SamplerOptions o = {.temperature = 0.3 + trial % 5, .top_p = 1};
        if (trial % 3 == 0) o.top_k = 1 + random_below(&r, V + 5);
        if (trial % 2 == 0) o.top_p = 0.5 + 0.49 * random_uniform(&r);
        if (trial % 4 == 0) o.min_p = 0.5 + 0.5 * random_uniform(&r);
        float largest = 0;
        for (int i = 0; i < V; i++) {
            logits[i] = (float)random_below(&r, levels + 1) * (8.0f / (float)levels);
            largest = fmaxf(largest, logits[i]);
        }
        for (int i = 0; i < V; i++) p[i] = expf((logits[i] - largest) / (float)o.temperature);
        mark_kept(kept, p, V, &o);

        double sum = 0, below = 0;
        for (int i = 0; i < V; i++) sum += kept[i] ? p[i] : 0;
        for (int i = 0; i < V; i++) {
            if (!kept[i]) continue;
            // intervals below 1e-7 get lost in the rounding of u; of a large vocabulary one token in a hundred will do
            int tested = p[i] > 1e-7 && (V < 100 || random_below(&r, 100) == 0);
            wrong += tested && sample_token(logits, V, &o, (below + 1e-6 * p[i]) / sum) != i;
            below += p[i];
            wrong += tested && sample_token(logits, V, &o, (below - 1e-6 * p[i]) / sum) != i;
            draws += 2 * tested;
        }
    }
    report(&u->score, wrong == 0 && draws > 1000,
           "sampler: %d ends of the intervals of tokens, V %d, %d likelihoods: %d wrong", draws, V, levels + 1, wrong);
    free(logits), free(p), free(kept);
}

static void test_sampler_definition(Units *u) {
    static const int vocabularies[] = {50, 4096}, levels[] = {1, 101};
    for (int l = 0; l < 2; l++)
        for (int v = 0; v < 2; v++) test_sampler_intervals(u, vocabularies[v], levels[l]);
}

// ---------------------------------------------------------------------------------------------------------------------
// fp8.h

static void test_fp8(Units *u) {
    // every code by its definition: (-1)^s 2^(e-7) (1 + m/8), and (-1)^s 2^-6 m/8 for e = 0
    int wrong = 0, ties = 0;
    for (int code = 0; code < 256; code++) {
        int e = code >> 3 & 15, m = code & 7;
        double x = (code & 0x80 ? -1 : 1) * (e ? pow(2, e - 7) * (1 + m / 8.0) : pow(2, -6) * m / 8.0);
        if ((code & 0x7F) == 0x7F) wrong += !isnan(e4m3_to_float((uint8_t)code));
        else wrong += e4m3_to_float((uint8_t)code) != x || e4m3_from_float((float)x) != code;
    }
    report(&u->score, wrong == 0, "fp8: all 256 codes decode to their definition, and encode back");

    // half-way between two neighbours: the even code; the next float to either side: the nearer one
    for (int code = 0; code < 0x7E; code++)
        for (int sign = 0; sign < 256; sign += 128) {
            int low = code | sign, high = (code + 1) | sign;
            float x = e4m3_to_float((uint8_t)low), y = e4m3_to_float((uint8_t)high), middle = (x + y) / 2;
            ties += e4m3_from_float(middle) != (code & 1 ? high : low);
            ties += e4m3_from_float(nextafterf(middle, x)) != low || e4m3_from_float(nextafterf(middle, y)) != high;
        }
    report(&u->score, ties == 0, "fp8: ties round to the even code, everything else to the nearest");

    static const struct { float x; int code; } edges[] = {
        {449, 0x7E}, {1e30f, 0x7E}, {-INFINITY, 0xFE}, {NAN, 0x7F}, {-0.0f, 0x80}, {1e-30f, 0}};
    wrong = 0;
    for (int i = 0; i < 6; i++) wrong += e4m3_from_float(edges[i].x) != edges[i].code;
    report(&u->score, wrong == 0, "fp8: saturates at 448, keeps NaN and the sign of zero");

    enum { N = 64 };
    float x[N], zeros[4] = {0};
    uint8_t codes[N];
    double worst = 0;
    Random r = {rng_stream(9, 1), 0};
    for (int i = 0; i < N; i++) x[i] = (float)(0.0015 * random_uniform(&r));
    float scale = e4m3_quantize(codes, x, N);
    for (int i = 0; i < N; i++)     // half a step: 2^-4 of a number, or 2^-10 of the scale among the subnormals
        worst = fmax(worst, fabs(scale * e4m3_to_float(codes[i]) - x[i]) / fmax(0x1p-4 * fabs(x[i]), 0x1p-10 * scale));
    int zeros_ok = e4m3_quantize(codes, zeros, 4) == 1 && codes[0] == 0;
    report(&u->score, worst <= 1.0001 && zeros_ok, "fp8: quantized within half a step (%.3f of it)", worst);
}

// ---------------------------------------------------------------------------------------------------------------------
// generator.h

// Text that is printed as it comes must not be cut within a character: of every prefix, only a begun character is held
// back.
static void test_streaming(Units *u) {
    static const char text[] = "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80z";     // characters of 1, 2, 3, 4 and 1 bytes
    static const size_t held[] = {0, 0, 1, 0, 1, 2, 0, 1, 2, 3, 0, 0};
    static const struct { const char *text; size_t bytes; } not_utf8[] = {
        {"\x80\x80\x80\x80", 4}, {"a\xFF", 2}, {"\xC0", 1}, {"\xC3z", 2}};
    int wrong = 0;
    for (size_t n = 0; n < sizeof text; n++) wrong += utf8_begun(text, n) != held[n];
    for (int i = 0; i < 4; i++) wrong += utf8_begun(not_utf8[i].text, not_utf8[i].bytes) != 0;
    report(&u->score, wrong == 0, "streaming: only a character that has begun is held back");
}

// ---------------------------------------------------------------------------------------------------------------------
// gpus.h

static void test_gpus(Units *u) {
    size_t n;
    const GpuPeak *peaks = gpu_peaks(&n);
    GpuPeak *reversed = xmalloc(n * sizeof *reversed);
    int wrong = 0;
    for (size_t i = 0; i < n; i++) reversed[i] = peaks[n - 1 - i];
    for (size_t i = 0; i < n; i++) {
        char *plain = xasprintf("NVIDIA %s", peaks[i].name), *longer = xasprintf("NVIDIA %s 80GB HBM3", peaks[i].name);
        wrong += gpu_peak_tflops(plain) != peaks[i].tflops || gpu_peak_tflops(longer) != peaks[i].tflops;
        wrong += gpu_peak_find(reversed, n, plain) != peaks[i].tflops;
        free(plain), free(longer);
    }
    free(reversed);
    report(&u->score, wrong == 0, "gpus: each of %d names is found as itself, in any order of the table", (int)n);

    static const GpuPeak known[] = {        // as the CUDA runtime names them
        {"NVIDIA B200", 2250}, {"NVIDIA GB200", 2500}, {"NVIDIA H100 80GB HBM3", 989}, {"NVIDIA H100 PCIe", 756},
        {"NVIDIA H100 NVL", 835}, {"NVIDIA H200", 989}, {"NVIDIA H20", 148}, {"NVIDIA GH200 480GB", 989},
        {"NVIDIA L4", 121}, {"NVIDIA L40", 181}, {"NVIDIA L40S", 362}, {"NVIDIA A100-SXM4-80GB", 312},
        {"NVIDIA A100 80GB PCIe", 312}, {"NVIDIA A10", 125}, {"NVIDIA A10G", 70}, {"NVIDIA A40", 150},
        {"NVIDIA GeForce RTX 3090 Ti", 80}, {"NVIDIA GeForce RTX 4090", 165}, {"NVIDIA GeForce RTX 5090", 210}};
    static const char *const unknown[] = {  // most contain the name of another GPU
        "", "Tesla T4", "NVIDIA GeForce GTX 1080", "NVIDIA XB200", "NVIDIA RTX A1000", "NVIDIA RTX A4000",
        "NVIDIA A100X", "NVIDIA A10M", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA RTX A3000 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        double tflops = gpu_peak_tflops(known[i].name);
        report(&u->score, tflops == known[i].tflops, "gpus: %s has %.0f TFLOP/s", known[i].name, tflops);
    }
    wrong = 0;
    for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++) wrong += gpu_peak_tflops(unknown[i]) != 0;
    report(&u->score, wrong == 0, "gpus: a GPU that is not in the table is not taken for another");
}

// ---------------------------------------------------------------------------------------------------------------------
// host_memory.h

// What is left of 1e12 bytes in a tree of cgroups with these files, for a process with this /proc/self/cgroup. files
// has lines "PATH NUMBER", where PATH may end in memory.stat:NAME.
static double left_in_cgroups(const Units *u, const char *membership, const char *files) {
    static int trees;
    Error err;
    char path[256], *root = xasprintf("%s/cgroups_%d", u->folder, trees++), number[64];
    char *member = xasprintf("%s/member", root);
    must(make_dirs(root, &err), &err);
    must(write_small_file(member, membership, strlen(membership), &err), &err);
    for (int n; sscanf(files, "%255s %63[^\n]\n%n", path, number, &n) == 2; files += n) {
        char *name = strchr(path, ':'), *text;
        if (name) *name++ = 0;
        text = xasprintf("%s%s%s\n", name ? "anon 77\n" : "", name ? name : "", number);
        char *file = xasprintf("%s%s", root, path), *folder = xasprintf("%s", file);
        *strrchr(folder, '/') = 0;
        must(make_dirs(folder, &err), &err);
        must(write_small_file(file, text, strlen(text), &err), &err);
        free(text), free(file), free(folder);
    }
    HostMemory m = {1e12, ""};
    host_cgroups_(&m, root, member);
    free(root), free(member);
    return m.bytes;
}

static void test_host_memory(Units *u) {
    static const struct { const char *what; double left; const char *membership, *files; } cases[] = {
        {"version 2, a limit further up", 700, "0::/job/step\n",
         "/job/step/memory.max max\n/job/memory.max 1000\n/job/memory.current 300\n"},
        {"version 2, the lowest of two", 50, "0::/job/step\n",
         "/job/step/memory.max 100\n/job/step/memory.current 50\n/job/memory.max 1000\n/job/memory.current 100\n"},
        {"version 2, less the file cache", 800, "0::/job\n",
         "/job/memory.max 1000\n/job/memory.current 300\n/job/memory.stat:inactive_file  100\n"},
        {"version 2, a container that sees itself as the root", 900, "0::/\n",
         "/memory.max 1000\n/memory.current 100\n"},
        {"version 2, a container that sees its name on the host", 900, "0::/docker/0123\n",
         "/memory.max 1000\n/memory.current 100\n"},
        {"version 2, next to version 1", 900, "5:cpu,cpuacct:/\n4:memory:/\n0::/job\n",
         "/unified/job/memory.max 1000\n/unified/job/memory.current 100\n"},
        {"version 1", 750, "5:cpu,cpuacct:/a\n4:memory:/job/step\n1:name=systemd:/b\n",
         "/memory/job/step/memory.limit_in_bytes 1000\n/memory/job/step/memory.usage_in_bytes 300\n"
         "/memory/job/step/memory.stat:total_inactive_file  50\n/memory/memory.limit_in_bytes 9223372036854771712\n"},
        {"version 1, a container that sees its name on the host", 700, "4:memory:/docker/0123\n",
         "/memory/memory.limit_in_bytes 1000\n/memory/memory.usage_in_bytes 300\n"},
        {"version 1, used beyond the limit", 0, "4:memory:/\n",
         "/memory/memory.limit_in_bytes 1000\n/memory/memory.usage_in_bytes 3000\n"},
        {"no limit", 1e12, "4:memory:/\n0::/job\n", "/job/memory.max max\n/job/memory.current 300\n"},
        {"no cgroups", 1e12, "", ""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        double left = left_in_cgroups(u, cases[i].membership, cases[i].files);
        report(&u->score, left == cases[i].left, "host_memory: cgroups, %s: %g bytes are left", cases[i].what, left);
    }
    HostMemory m = host_memory(1);
    struct rlimit was, low;
    getrlimit(RLIMIT_AS, &was);
    low = was;
    low.rlim_cur = (rlim_t)(host_number_("/proc/self/status", "VmSize:") * 1024 + 0x1p26);
    setrlimit(RLIMIT_AS, &low);
    HostMemory little = host_memory(1);
    setrlimit(RLIMIT_AS, &was);
    report(&u->score, m.bytes > 0x1p20, "host_memory: %.0f MiB are left on this machine%s", m.bytes / 0x1p20, m.limit);
    report(&u->score, little.bytes > 0 && little.bytes <= 0x1p26 && !strcmp(little.limit, " (ulimit -v)"),
           "host_memory: 64 MiB of address space are left: %.0f MiB%s", little.bytes / 0x1p20, little.limit);
}

// ---------------------------------------------------------------------------------------------------------------------
// model.h

static void test_model(Units *u) {
    // the paper's models in millions of parameters, with the vocabulary stored as 50304
    static const struct { const char *preset; double millions; } paper[] = {
        {"124M", 124.3}, {"353M", 354.0}, {"1.5B", 1555.8}};
    for (int i = 0; i < 3; i++) {
        Model m;
        Config c = preset_config(find_preset(paper[i].preset), ATTN_TPA);
        c.vocab_size = 50304;
        model_init(&m, &c, 8);
        double millions = (double)m.num_parameters / 1e6;
        report(&u->score, fabs(millions - paper[i].millions) < 0.05, "model: %s has %.1fM parameters", paper[i].preset,
               millions);
        model_free(&m);
    }
    // the paper compares kinds of attention at about the same number of parameters
    // (but mla is larger from 353M on, by the paper's own formula)
    static const char *const presets[] = {"tiny", "124M", "353M", "773M", "1.5B"};
    for (int p = 0; p < 5; p++) {
        double least = INFINITY, most = 0;
        for (int kind = 0; kind < NUM_ATTN_KINDS; kind++) {
            Model m;
            Config c = preset_config(find_preset(presets[p]), (AttnKind)kind);
            if (kind == ATTN_MLA && p > 1) continue;
            if (!strcmp(presets[p], "tiny")) c.vocab_size = BYTES_VOCAB_SIZE;
            model_init(&m, &c, 1);
            least = fmin(least, (double)m.num_parameters), most = fmax(most, (double)m.num_parameters);
            model_free(&m);
        }
        report(&u->score, most / least < 1.05, "model: kinds of %s differ by %.1f%% in parameters", presets[p],
               100 * (most / least - 1));
    }
}

// The paper's Table 1 with the figures of its Tables 9 and 10: attention of a layer and whole model in millions, cache.
static void test_model_table(Units *u) {
    typedef struct { double attention; int cache; double model; } Figures;
    static const struct { const char *preset; Figures kind[6]; } paper[] = {
        {"124M", {{2.359, 1536, 123.6}, {2.359, 128, 123.6}, {2.359, 256, 123.6}, {2.187, 288, 121.5},
                  {2.424, 392, 124.3}, {2.427, 344, 124.4}}},
        {"353M", {{4.194, 2048, 353.5}, {4.194, 128, 353.5}, {4.194, 256, 353.5}, {6.881, 544, 417.9},
                  {4.217, 444, 354.0}, {4.182, 372, 353.2}}},
        {"773M", {{6.554, 2560, 772.1}, {6.554, 128, 772.1}, {6.554, 256, 772.1}, {10.363, 544, 909.3},
                  {6.597, 500, 773.7}, {6.579, 404, 773.1}}},
        {"1.5B", {{10.240, 3200, 1554.9}, {10.240, 128, 1554.9}, {10.240, 256, 1554.9}, {15.555, 544, 1810.0},
                  {10.259, 568, 1555.8}, {10.336, 444, 1559.5}}}};
    for (int p = 0; p < 4; p++) {
        int wrong = 0;
        for (int i = 0; i < 6; i++) {
            const char *name;
            Config c = table_config(find_preset(paper[p].preset), i, &name);
            ModelSize size = model_size(&c);
            wrong += fabs((double)size.attention / 1e6 - paper[p].kind[i].attention) > 0.0005001;
            wrong += fabs((double)size.model / 1e6 - paper[p].kind[i].model) > 0.05001;
            wrong += size.cache != paper[p].kind[i].cache;
        }
        // non-contextual factors: (RQ + RK + RV)(C HS + NH) or (C NH + HS), and the output projection; Table 1
        for (int i = 6; i < NUM_TABLE_ROWS; i++) {
            const char *name;
            Config c = table_config(find_preset(paper[p].preset), i, &name);
            int64_t C = c.n_embd, NH = c.n_head, HS = c.head_dim, R = c.q_rank + c.k_rank + c.v_rank;
            int64_t factors = R * (i == 6 ? C * HS + NH : C * NH + HS);
            wrong += model_size(&c).attention != factors + C * NH * HS;
            wrong += model_size(&c).cache != (c.k_rank + c.v_rank) * (i == 6 ? HS : NH);
        }
        report(&u->score, wrong == 0, "table: %s has the paper's figures: %d wrong", paper[p].preset, wrong);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// checkpoint.h

static Config small_config(void) {
    Config c = preset_config(find_preset("tiny"), ATTN_TPA);
    c.vocab_size = 100;
    return c;
}

static HostWeights alloc_weights(const Model *m, Slice moments) {
    size_t part = m->num_stored / (size_t)moments.world;
    return (HostWeights){.params = xcalloc(m->num_stored, sizeof(float)), .adam_m = xcalloc(part, sizeof(float)),
                         .adam_v = xcalloc(part, sizeof(float)), .moments = moments};
}

static void free_weights(HostWeights *w) { free(w->params), free(w->adam_m), free(w->adam_v); }

// Random numbers in every element of the model's tensors; the padding stays zero.
static void fill_weights(HostWeights *w, const Model *m) {
    float *buffers[] = {w->params, w->adam_m, w->adam_v};
    for (int i = 0; i < 3; i++) {
        Random r = {rng_stream(11, (uint64_t)i), 0};
        for (int k = 0; k < m->num_tensors; k++) {
            const Tensor *t = &m->tensors[k];
            for (int64_t row = 0; row < t->rows; row++)
                for (int64_t col = 0; col < t->cols; col++)
                    buffers[i][t->offset + (size_t)(row * t->ld + col)] = (float)random_uniform(&r);
        }
    }
}

static void check_round_trip(Units *u, const char *folder, const Model *m, const HostWeights *saved,
                             const TrainState *state) {
    HostWeights read = alloc_weights(m, saved->moments);
    TrainState state_read;
    Config config;
    Error err, difference;
    size_t bytes = m->num_stored * sizeof(float);
    int ok = checkpoint_verify(folder, ALL_FILES, &err) == 0 && checkpoint_load_config(folder, &config, &err) == 0 &&
             config_difference(&config, &m->config, &difference) == 0;
    ok = ok && checkpoint_load_weights(folder, m, read.params, &err) == 0 &&
         checkpoint_load_optimizer(folder, m, &read, &state_read, &err) == 0;
    ok = ok && !memcmp(read.params, saved->params, bytes) && !memcmp(read.adam_m, saved->adam_m, bytes) &&
         !memcmp(read.adam_v, saved->adam_v, bytes) && !strcmp(state_read.flags, state->flags);
    free(state_read.flags);
    state_read.flags = state->flags;
    ok = ok && !memcmp(&state_read, state, sizeof *state);
    report(&u->score, ok, "checkpoint: weights, moments, config and state are read back bit for bit");
    free_weights(&read);
}

// Each of `world` ranks reads its slices of the moments, in a layout padded for them. Returns whether all slices
// together are what was saved by one process.
static int slices_match(const char *folder, const Model *m, const HostWeights *saved, int world) {
    Model shared;
    model_init_shared(&shared, &m->config, 8, world);
    HostWeights whole = alloc_weights(&shared, (Slice){.rank = 0, .world = 1});
    size_t covered = 0;
    int ok = 1;
    for (int r = 0; r < world; r++) {
        HostWeights read = alloc_weights(&shared, (Slice){.rank = r, .world = world});
        TrainState state;
        Error err;
        ok &= checkpoint_load_optimizer(folder, &shared, &read, &state, &err) == 0;
        free(state.flags);
        for (int k = 0; k < model_buckets(&shared); k++) {
            Bucket slice = model_slice(&shared, read.moments, k);
            size_t at = model_bucket(&shared, k).offset / (size_t)world;
            memcpy(whole.adam_m + slice.offset, read.adam_m + at, slice.size * sizeof(float));
            memcpy(whole.adam_v + slice.offset, read.adam_v + at, slice.size * sizeof(float));
            covered += slice.size;
        }
        free_weights(&read);
    }
    for (int k = 0; k < m->num_tensors; k++) {
        const Tensor *t = &m->tensors[k], *s = &shared.tensors[k];
        for (int64_t row = 0; row < t->rows; row++) {
            size_t from = t->offset + (size_t)(row * t->ld), to = s->offset + (size_t)(row * s->ld);
            size_t bytes = (size_t)t->cols * sizeof(float);
            ok &= !memcmp(saved->adam_m + from, whole.adam_m + to, bytes);
            ok &= !memcmp(saved->adam_v + from, whole.adam_v + to, bytes);
        }
    }
    ok &= covered == shared.num_stored;
    free_weights(&whole);
    model_free(&shared);
    return ok;
}

// Replaces state.json of a checkpoint by one from before there was a window of spikes.
static void check_old_state(Units *u, const char *folder, const Model *m, Slice moments) {
    static const char old[] = "{\"step\": \"7\", \"epoch\": \"1\", \"position\": \"2\", \"seed\": \"3\", "
                              "\"shuffle\": \"1\", \"seq_len\": \"8\", \"shards\": \"9\", \"bad_steps\": \"0\"}";
    HostWeights read = alloc_weights(m, moments);
    TrainState s;
    Error err;
    char *path = xasprintf("%s/state.json", folder);
    must(write_small_file(path, old, strlen(old), &err), &err);
    int ok = checkpoint_load_optimizer(folder, m, &read, &s, &err) == 0;
    ok = ok && s.step == 7 && s.shards == 9 && s.skipped == 0 && s.spikes.seen == 0 && s.batch_size == 0 && !s.flags;
    report(&u->score, ok, "checkpoint: a state of an old version, without spikes and flags, is read");
    free(path);
    free_weights(&read);
}

// Values of state.json that are missing or of the wrong type are refused, by the name of their key.
static void check_bad_state(Units *u, const char *folder, const Model *m, Slice moments) {
    static const struct { const char *position, *more, *wrong; } cases[] = {
        {"7", "", "position"}, {"null", "", "position"}, {"[\"7\"]", "", "position"}, {"\"\"", "", "position"},
        {"\" 7\"", "", "position"}, {"\"+7\"", "", "position"}, {"\"-1\"", "", "position"},
        {"\"7x\"", "", "position"}, {"\"1.5\"", "", "position"}, {"\"9223372036854775808\"", "", "position"},
        {"\"7\"", ", \"spikes_seen\": 70", "spikes_seen"}, {"\"7\"", ", \"spikes_seen\": \"70\"", "loss_window"},
        {"\"7\"", ", \"loss_window\": \"1\"", "loss_window"}, {"\"7\"", ", \"loss_window\": [1]", "loss_window"},
        {"\"7\"", ", \"batch_size\": 4", "batch_size"}, {"\"7\"", ", \"flags\": [\"--lr 1\"]", "flags"}};
    HostWeights read = alloc_weights(m, moments);
    TrainState s;
    Error err;
    char *path = xasprintf("%s/state.json", folder);
    int accepted = 0, unnamed = 0;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *text = xasprintf("{\"step\": \"7\", \"epoch\": \"1\", \"position\": %s, \"seed\": \"3\", "
                               "\"shuffle\": \"1\", \"seq_len\": \"8\", \"shards\": \"9\", \"bad_steps\": \"0\"%s}",
                               cases[i].position, cases[i].more);
        must(write_small_file(path, text, strlen(text), &err), &err);
        if (checkpoint_load_optimizer(folder, m, &read, &s, &err) == 0) accepted++;
        else unnamed += strstr(err.text, cases[i].wrong) == NULL;
        free(text);
    }
    report(&u->score, accepted == 0 && unnamed == 0, "checkpoint: a state with values of the wrong type is refused");
    free(path);
    free_weights(&read);
}

static const RunLock no_lock = {.id = "units"};

// Saves steps 1 to 9 and reads the last one in several ways.
static void test_checkpoint(Units *u) {
    Error err;
    Model m;
    Config config = small_config();
    model_init(&m, &config, 8);
    HostWeights saved = alloc_weights(&m, (Slice){.rank = 0, .world = 1});
    fill_weights(&saved, &m);
    TrainState state = {.epoch = 1, .position = 2, .seed = 3, .shuffle = 1, .seq_len = 256,
                        .shards = INT64_C(0x7123456789abcdef), .bad_steps = 0, .skipped = 3, .spikes = {.seen = 100},
                        .flags = "--lr 0.1\n--model \"x\"\n"};
    for (int i = 0; i < SPIKE_WINDOW; i++)
        state.spikes.loss[i] = 1.0 / (i + 3), state.spikes.norm[i] = 1e-3 / (i + 7);
    char *out = xasprintf("%s/run", u->folder), *last = xasprintf("%s/step_00000009", out);
    for (int64_t step = 1; step <= 9; step++) {
        state.step = step;
        must(checkpoint_save(out, &no_lock, &m, &saved, &state, NULL, &err), &err);
    }

    check_round_trip(u, last, &m, &saved, &state);
    int ok = 1;
    for (int world = 1; world <= 8; world++) ok &= slices_match(last, &m, &saved, world);
    report(&u->score, ok, "checkpoint: read in slices by 1 to 8 ranks, the moments are the same");
    check_old_state(u, last, &m, saved.moments);
    check_bad_state(u, last, &m, saved.moments);

    ok = checkpoint_prune(out, &no_lock, 2, 3, &err) == 0;
    int n;
    int64_t *steps = checkpoint_steps(out, &n);
    static const int64_t left[] = {3, 6, 8, 9};
    report(&u->score, ok && n == 4 && !memcmp(steps, left, sizeof left),
           "checkpoint: --keep 2 --keep-every 3 leaves 3, 6, 8 and 9");
    free(steps), free(last), free(out);
    free_weights(&saved);
    model_free(&m);
}

// ---------------------------------------------------------------------------------------------------------------------
// run_lock.h. A line with another boot id stands for a run on another machine.

enum { BEAT_NEVER = 1000 };

// Puts text into u->folder/lock and takes the lock, watching for half a second. Returns what run_lock_open does.
static int lock_over(Units *u, const char *text, RunLock *lock, Error *err) {
    char *path = xasprintf("%s/lock", u->folder);
    must(write_small_file(path, text, strlen(text), err), err);
    free(path);
    return run_lock_open(lock, u->folder, BEAT_NEVER, 0.5, err);
}

// Takes the lock of u->folder while `holder`, turned into a run of another machine, has it. Where the flock does not
// reach that machine, the newcomer gets it.
static void check_foreign_holder(Units *u, double beat_seconds, int flock_reaches, int expected, const char *what) {
    RunLock holder, lock;
    Error err;
    char *boot, other[] = "another-boot";
    must(run_lock_open(&holder, u->folder, beat_seconds, 0.5, &err), &err);
    boot = strstr(holder.owner, "boot ") + 5;
    memcpy(boot, other, sizeof other);
    must(lock_write_(&holder, 0, &err), &err);
    if (!flock_reaches) flock(holder.fd, LOCK_UN);
    int code = run_lock_open(&lock, u->folder, BEAT_NEVER, 0.5, &err);
    int told = code == 0 || strstr(err.text, "process ");
    report(&u->score, code == expected && told && (run_lock_check(&holder, &err) == 0) == (code != 0),
           "lock: %s: code %d", what, code);
    run_lock_close(&holder);
    run_lock_close(&lock);
}

static void test_run_lock(Units *u) {
    RunLock lock, second;
    Error err;
    char *path = xasprintf("%s/lock", u->folder);
    struct stat st;
    must(run_lock_open(&lock, u->folder, BEAT_NEVER, 0.5, &err), &err);
    int code = run_lock_open(&second, u->folder, BEAT_NEVER, 0.5, &err);
    report(&u->score, code == EXIT_INPUT && strstr(err.text, "in use by a run on "), "lock: a second run is refused");
    report(&u->score, run_lock_check(&lock, &err) == 0, "lock: the first one keeps it");
    run_lock_follow(&second, u->folder, lock.id);
    report(&u->score, run_lock_check(&second, &err) == 0, "lock: another rank knows it by its id");
    run_lock_close(&second);
    report(&u->score, run_lock_check(&lock, &err) == 0, "lock: it is not freed by another rank");
    run_lock_close(&lock);
    report(&u->score, stat(path, &st) == 0 && st.st_size == 0, "lock: a clean end leaves an empty file");

    check_foreign_holder(u, 0.1, 0, EXIT_INPUT, "another machine's run that beats has the folder");
    check_foreign_holder(u, 0.1, 1, EXIT_INPUT, "the same with a flock that reaches it");
    check_foreign_holder(u, BEAT_NEVER, 0, 0, "a stale line is replaced");
    check_foreign_holder(u, BEAT_NEVER, 1, EXIT_SYSTEM, "a flock whose run is silent is not broken");
    char text[LOCK_TEXT];
    memset(text, 'x', sizeof text - 1), text[sizeof text - 1] = 0;
    report(&u->score, lock_over(u, text, &lock, &err) == 0 && run_lock_check(&lock, &err) == 0 && lock.previous[0],
           "lock: a damaged file is replaced, too");
    report(&u->score, stat(path, &st) == 0 && st.st_size < 200, "lock: nothing of it is left");
    must(unlink(path), &err);
    report(&u->score, run_lock_check(&lock, &err) != 0, "lock: a removed file is noticed");
    report(&u->score, lock_over(u, "", &second, &err) == 0 && run_lock_check(&lock, &err) != 0,
           "lock: another run's is noticed");
    run_lock_close(&lock);
    report(&u->score, run_lock_check(&second, &err) == 0, "lock: an end leaves another run's alone");
    run_lock_close(&second);
    free(path);
}

// ---------------------------------------------------------------------------------------------------------------------
// python_random.h. The expected numbers are those of Python 3.11.

static void test_python_random(Units *u) {
    static const uint32_t bits[4] = {4150886329u, 3342196574u, 1892932127u, 501869158u};
    // random.Random(1234), and four times sample(range(n), k)
    static const struct { int64_t n, k, drawn[12]; } samples[] = {
        {2251, 2, {1805, 478, 30, 371, 143, 343, 403, 1452}},
        {1119, 2, {902, 239, 15, 185, 71, 171, 201, 726}},
        {4957, 2, {3610, 957, 61, 742, 4769, 286, 687, 806}},
        {11679, 2, {7220, 1914, 122, 1485, 9539, 572, 11002, 11355}},
        {9427, 3, {7220, 1914, 122, 1485, 572, 1375, 1612, 5810, 3879, 285, 504, 259}},
        {16113, 3, {15834, 12749, 7220, 1914, 122, 1485, 14925, 15442, 15388, 13221, 9539, 572}},
        {39905, 3, {28883, 7657, 490, 5940, 38156, 2288, 5500, 6450, 23241, 15519, 1142, 2019}},
        {40398, 3, {28883, 7657, 490, 5940, 38156, 2288, 5500, 6450, 23241, 15519, 1142, 2019}},
        {21, 2, {14, 3, 0, 2, 18, 1, 2, 3}},
        {22, 2, {14, 3, 0, 2, 18, 1, 21, 2}},
        {16, 3, {14, 1, 0, 2, 14, 12, 1, 10, 11, 2, 1, 12}},
        {3, 3, {1, 0, 2, 0, 2, 1, 0, 1, 2, 0, 2, 1}},
        {85, 6, {56, 14, 0, 11, 74, 4, 10, 12, 45, 30, 2, 3}},
        {86, 6, {56, 14, 0, 11, 74, 4, 85, 10, 12, 45, 30, 2}},
        {64, 12, {56, 7, 0, 5, 58, 51, 37, 2, 42, 44, 60, 6}},
        {1000, 12, {989, 796, 451, 119, 7, 92, 932, 965, 961, 826, 596, 35}},
    };
    PythonRandom r;
    int wrong = 0;
    python_random_seed(&r, 1234);
    for (int i = 0; i < 4; i++) wrong += python_random_bits(&r) != bits[i];
    report(&u->score, wrong == 0, "python_random: the first numbers of random.Random(1234)");
    for (size_t i = 0; i < sizeof samples / sizeof *samples; i++) {
        int64_t n = samples[i].n, k = samples[i].k, drawn[12];
        python_random_seed(&r, 1234);
        for (int row = 0; row < 4 && row * k < 12; row++) python_random_sample(&r, n, k, drawn + row * k);
        int64_t total = 4 * k < 12 ? 4 * k : 12;
        report(&u->score, !memcmp(drawn, samples[i].drawn, (size_t)total * sizeof *drawn),
               "python_random: sample(%" PRId64 ", %" PRId64 ")", n, k);
    }
}

// ---------------------------------------------------------------------------------------------------------------------

static const struct { const char *name; void (*run)(Units *u); } tests[] = {
    {"permutation", test_permutation},                  // rng.h
    {"loader, ranks", test_loader_ranks},               // dataloader.h
    {"loader, epochs", test_loader_epochs},
    {"loader, sequential", test_loader_sequential},
    {"schedule", test_schedule},                        // schedule.h
    {"sampler", test_sampler},                          // sampler.h
    {"sampler, definition", test_sampler_definition},
    {"fp8", test_fp8},                                  // fp8.h
    {"streaming", test_streaming},                      // generator.h
    {"gpus", test_gpus},                                // gpus.h
    {"host memory", test_host_memory},                  // host_memory.h
    {"model", test_model},                              // model.h
    {"model table", test_model_table},                  // model_table.h
    {"python random", test_python_random},              // python_random.h
    {"run lock", test_run_lock},                        // run_lock.h
    {"checkpoint", test_checkpoint},                    // checkpoint.h, safetensors.h
};

int main(void) {
    char folder[] = "/tmp/test_units_XXXXXX";
    Units u = {.folder = folder};
    program_start("test_units");
    if (!mkdtemp(folder)) die(EXIT_SYSTEM, "%s: cannot create this folder: %s", folder, strerror(errno));
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        int before = u.score.passed + u.score.failed;
        tests[i].run(&u);
        if (u.score.passed + u.score.failed == before) report(&u.score, 0, "%s: checked nothing", tests[i].name);
    }
    char *remove = xasprintf("rm -rf %s", folder);
    if (system(remove) != 0) fprintf(stderr, "note: could not remove %s\n", folder);
    free(remove);
    return finish(&u.score);
}
