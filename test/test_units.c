// test_units: the services that training stands on, each where a mistake would not show in a loss curve.
//
//   build/.../test_units            everything below, in seconds
//   test_units --fuzz SECONDS       damaged safetensors files and shards at random, as long as asked
#include "llmc/checkpoint.h"
#include "llmc/dataloader.h"
#include "llmc/fp8.h"
#include "llmc/generator.h"
#include "llmc/options.h"

static int passed, failed;

__attribute__((format(printf, 2, 3))) static void check(int ok, const char *format, ...) {
    va_list args;
    va_start(args, format);
    printf("%s ", ok ? "ok  " : "FAIL");
    vprintf(format, args);
    putchar('\n');
    va_end(args);
    ok ? passed++ : failed++;
}

static char folder[] = "/tmp/test_units_XXXXXX";

// A data set of shards with these numbers of tokens: token i of the stream is i mod 60000.
static void write_shards(const char *name, const int *tokens, int n) {
    Error err;
    int stream = 0;
    for (int s = 0; s < n; s++) {
        int32_t header[SHARD_HEADER_INTS] = {SHARD_MAGIC, SHARD_VERSION, tokens[s]};
        char *path = xasprintf("%s/%s_train_%06d.bin", folder, name, s + 1), *bytes = xmalloc(sizeof header + 2 * (size_t)tokens[s]);
        memcpy(bytes, header, sizeof header);
        for (int i = 0; i < tokens[s]; i++, stream++) {
            uint16_t token = (uint16_t)(stream % 50000);
            memcpy(bytes + sizeof header + 2 * i, &token, 2);
        }
        if (write_small_file(path, bytes, sizeof header + 2 * (size_t)tokens[s], &err) != 0) die(EXIT_SYSTEM, "%s", err.text);
        free(bytes);
        free(path);
    }
}

static void test_permutation(void) {
    int bad = 0;
    for (uint64_t n = 1; n < 300; n++) {
        unsigned char hit[300] = {0};
        for (uint64_t i = 0; i < n; i++) hit[rng_permute(n * 7, i, n)]++;
        for (uint64_t i = 0; i < n; i++) bad += hit[i] != 1;
    }
    check(bad == 0, "rng_permute: a permutation for every size from 1 to 299");
    double moved = 0;
    for (uint64_t i = 0; i < 10000; i++) moved += fabs((double)rng_permute(3, i, 10000) - (double)i);
    check(fabs(moved / 1e4 - 10000.0 / 3) < 150, "rng_permute: mean distance %.0f, a random permutation's is 3333", moved / 1e4);
}

// One epoch read by `world` ranks: every window once, whatever the world, and the same set of windows in each step.
static void test_loader(LoaderOrder order) {
    enum { T = 8, B = 2 };
    static const int tokens[] = {1000, 17, 8, 9, 3333, 1};      // 8 and 1 tokens hold no window
    write_shards("a", tokens, 6);
    char *pattern = xasprintf("%s/a_train_*.bin", folder);
    Error err;
    uint64_t sums[9] = {0};
    int bad = 0;
    for (int world = 1; world <= 8; world++) {
        DataLoader d[8];
        uint64_t windows = 0;
        for (int r = 0; r < world; r++) {
            if (loader_open(&d[r], pattern, T, order, B, 42, &err) != 0) die(EXIT_SYSTEM, "%s", err.text);
            windows = d[r].windows;
        }
        if (order == ORDER_SHUFFLED && windows != 124 + 2 + 0 + 1 + 416) bad++;
        // 16 windows a step whatever the world: 8 steps, with an epoch's end within them where the epoch is that short
        int32_t inputs[B * T], targets[B * T];
        unsigned char *seen = xcalloc(60000, 1);
        for (int step = 0; step < 8; step++) {
            for (int r = 0; r < world; r++)
                for (int micro = r; micro * B < 16; micro += world) {
                    if (loader_read(&d[r], (uint64_t)(micro * B), B, inputs, targets, &err) != 0) die(EXIT_SYSTEM, "%s", err.text);
                    for (int b = 0; b < B; b++) {
                        sums[world] += mix64((uint64_t)inputs[b * T] + 1) * (uint64_t)(step + 1);
                        if (order == ORDER_SHUFFLED && seen[inputs[b * T]]++) bad++;
                    }
                    for (int i = 0; i < B * T - 1; i++)
                        if ((i + 1) % T && inputs[i + 1] != targets[i]) bad++;
                }
            for (int r = 0; r < world; r++) loader_advance(&d[r], 16);
        }
        free(seen);
        for (int r = 0; r < world; r++) loader_close(&d[r]);
    }
    check(bad == 0, "loader, %s: targets follow inputs, no window twice in an epoch", order ? "shuffled" : "sequential");
    for (int world = 2; world <= 8; world++) bad += sums[world] != sums[1];
    check(bad == 0, "loader, %s: each step reads the same windows with 1 to 8 ranks", order ? "shuffled" : "sequential");
    free(pattern);
}

// A whole epoch covers every window, epochs differ, and a loader set to a place goes on as the one that read up to it.
static void test_loader_epochs(void) {
    char *pattern = xasprintf("%s/a_train_*.bin", folder);
    Error err;
    DataLoader d, e;
    int32_t inputs[8], targets[8], other[8], first = -1, differ = 0, bad = 0;
    unsigned char *seen = xcalloc(60000, 1);
    if (loader_open(&d, pattern, 8, ORDER_SHUFFLED, 1, 42, &err) != 0 || loader_open(&e, pattern, 8, ORDER_SHUFFLED, 1, 42, &err) != 0)
        die(EXIT_SYSTEM, "%s", err.text);
    for (uint64_t i = 0; i < 3 * d.windows; i++) {
        if (i == d.windows + 5) e.epoch = d.epoch, e.position = d.position;
        if (loader_next(&d, 1, inputs, targets, &err) != 0) die(EXIT_SYSTEM, "%s", err.text);
        seen[inputs[0]]++;
        if (i == 0) first = inputs[0];
        if (i == d.windows) differ = inputs[0] != first;
        if (i >= d.windows + 5) {
            if (loader_next(&e, 1, other, targets, &err) != 0) die(EXIT_SYSTEM, "%s", err.text);
            bad += memcmp(inputs, other, sizeof inputs) != 0;
        }
    }
    uint64_t thrice = 0;
    for (int i = 0; i < 60000; i++) thrice += seen[i] == 3;
    check(thrice == d.windows && d.epoch == 3 && d.position == 0, "loader: three epochs read each of %d windows three times", (int)d.windows);
    check(differ, "loader: epochs are shuffled differently");
    check(bad == 0, "loader: set to an epoch and position, it goes on as the one that read up to there");
    loader_close(&d), loader_close(&e);
    free(seen);
    free(pattern);
}

// llm.c's order: micro-batch k reads tokens k*B*T to (k+1)*B*T, the tail that fills no micro-batch is left out, and shards follow
// each other.
static void test_loader_sequential(void) {
    enum { T = 5, B = 3 };
    static const int tokens[] = {47, 16, 31};   // 3, 1 and 2 micro-batches of 15 and one token for the last target
    static const int starts[] = {0, 15, 30, 47, 63, 78, 0};
    write_shards("b", tokens, 3);
    char *pattern = xasprintf("%s/b_train_*.bin", folder);
    Error err;
    DataLoader d;
    int32_t inputs[B * T], targets[B * T];
    int bad = 0;
    if (loader_open(&d, pattern, T, ORDER_SEQUENTIAL, B, 0, &err) != 0) die(EXIT_SYSTEM, "%s", err.text);
    for (int k = 0; k < 7; k++) {
        if (loader_next(&d, B, inputs, targets, &err) != 0) die(EXIT_SYSTEM, "%s", err.text);
        for (int i = 0; i < B * T; i++) bad += inputs[i] != starts[k] + i || targets[i] != starts[k] + i + 1;
    }
    check(bad == 0, "loader: --shuffle 0 is llm.c's order, shard after shard and round again");
    loader_close(&d);
    free(pattern);
}

static void test_schedule(void) {
    Schedule s = {1.0, 0.1, 10, 110};
    check(fabs(schedule_lr(&s, 0) - 0.1) < 1e-12 && fabs(schedule_lr(&s, 9) - 1) < 1e-12 && fabs(schedule_lr(&s, 10) - 1) < 1e-12 &&
          fabs(schedule_lr(&s, 60) - 0.55) < 1e-12 && schedule_lr(&s, 110) == 0.1 && schedule_lr(&s, 9999) == 0.1,
          "schedule: warm-up, peak, half-way, end and beyond");
    Schedule none = {1.0, 0.1, 0, 1};
    check(schedule_lr(&none, 0) == 1, "schedule: no warm-up, one step");
}

static float *sampler_p_;      // of the comparison: qsort passes no context
static int compare_likelihood(const void *a, const void *b) {
    int x = *(const int *)a, y = *(const int *)b;
    return sampler_p_[x] != sampler_p_[y] ? (sampler_p_[x] < sampler_p_[y] ? 1 : -1) : x - y;
}

// The draw against its definition: everything sorted, the kept set cut off, and the cumulative distribution in the order of ids. A number
// just within either end of a kept token's step must give that token. Few levels of likelihood make many ties.
static void test_sampler_steps(int V, int levels) {
    float *logits = xmalloc((size_t)V * sizeof *logits), *p = sampler_p_ = xmalloc((size_t)V * sizeof *p);
    int *order = xmalloc((size_t)V * sizeof *order), wrong = 0, draws = 0;
    char *kept = xmalloc((size_t)V);
    for (int trial = 0; trial < 60; trial++) {
        uint64_t stream = rng_stream(5, (uint64_t)(trial + 1000 * V + levels));
        SamplerOptions o = {0.3 + trial % 5, trial % 3 ? 0 : 1 + (int64_t)(rng_at(stream, 0) % (uint64_t)(V + 5)),
                            trial % 2 ? 1 : 0.01 + 0.98 * rng_uniform(stream, 1), trial % 4 ? 0 : rng_uniform(stream, 2)};
        for (int i = 0; i < V; i++) logits[i] = (float)floor(rng_uniform(stream, (uint64_t)(3 + i)) * (levels + 1)) * (8.0f / (float)levels);
        float largest = 0;
        for (int i = 0; i < V; i++) largest = fmaxf(largest, logits[i]);
        for (int i = 0; i < V; i++) p[i] = expf((logits[i] - largest) / (float)o.temperature), order[i] = i, kept[i] = 0;
        qsort(order, (size_t)V, sizeof *order, compare_likelihood);
        int n = o.top_k && o.top_k < V ? (int)o.top_k : V;
        double total = 0, sum = 0, below = 0;
        for (int i = 0; i < n; i++) total += p[order[i]];
        for (int i = 0; i < n && (i == 0 || o.top_p == 1 || sum < o.top_p * total); i++) sum += p[order[i]], kept[order[i]] = p[order[i]] >= o.min_p;
        sum = 0;
        for (int i = 0; i < V; i++) sum += kept[i] ? p[i] : 0;
        for (int i = 0; i < V; i++) {
            if (!kept[i]) continue;
            int tested = p[i] > 1e-7 && (V < 100 || rng_at(stream, (uint64_t)(V + 3 + i)) % 100 == 0);      // no step too small for a double
            wrong += tested && sample_token(logits, V, &o, (below + 1e-6 * p[i]) / sum) != i;
            below += p[i];
            wrong += tested && sample_token(logits, V, &o, (below - 1e-6 * p[i]) / sum) != i;
            draws += 2 * tested;
        }
    }
    check(wrong == 0 && draws > 1000, "sampler: %d ends of steps of the distribution in order of ids, V %d, %d likelihoods: %d wrong", draws, V, levels + 1, wrong);
    free(logits), free(p), free(order), free(kept);
}

static void test_fp8(void) {
    // All numbers there are, from the definition: (-1)^s 2^(e-7) (1 + m/8), for e = 0 2^-6 m/8
    int wrong = 0, ties = 0;
    for (int code = 0; code < 256; code++) {
        int e = code >> 3 & 15, m = code & 7;
        double x = (code & 0x80 ? -1 : 1) * (e ? pow(2, e - 7) * (1 + m / 8.0) : pow(2, -6) * m / 8.0);
        if ((code & 0x7F) == 0x7F) wrong += !isnan(e4m3_to_float((uint8_t)code));
        else wrong += e4m3_to_float((uint8_t)code) != x || e4m3_from_float((float)x) != code;
    }
    check(wrong == 0, "fp8: 256 codes are the numbers of their definition, and come back");
    // Half-way between neighbours: to the even code; a hair to either side: to the nearer
    for (int code = 0; code < 0x7E; code++)
        for (int sign = 0; sign < 256; sign += 128) {
            float a = e4m3_to_float((uint8_t)(code | sign)), b = e4m3_to_float((uint8_t)((code + 1) | sign)), middle = (a + b) / 2;
            ties += e4m3_from_float(middle) != ((code & 1 ? code + 1 : code) | sign);
            ties += e4m3_from_float(nextafterf(middle, a)) != (code | sign) || e4m3_from_float(nextafterf(middle, b)) != ((code + 1) | sign);
        }
    check(ties == 0, "fp8: ties go to the even code, everything else to the nearer");
    check(e4m3_from_float(449) == 0x7E && e4m3_from_float(1e30f) == 0x7E && e4m3_from_float(-INFINITY) == 0xFE && e4m3_from_float(NAN) == 0x7F &&
          e4m3_from_float(-0.0f) == 0x80 && e4m3_from_float(1e-30f) == 0, "fp8: saturates at 448, keeps NaN and the sign of zero");
    float x[64], zero[4] = {0};
    uint8_t codes[64];
    double worst = 0;
    for (int i = 0; i < 64; i++) x[i] = (float)((rng_uniform(9, (uint64_t)i) - 0.5) * 0.003);
    float scale = e4m3_quantize(codes, x, 64);
    for (int i = 0; i < 64; i++)    // half a step: 2^-4 of a number, or 2^-10 of the scale among the subnormals
        worst = fmax(worst, fabs(scale * e4m3_to_float(codes[i]) - x[i]) / fmax(0x1p-4 * fabs(x[i]), 0x1p-10 * scale));
    check(worst <= 1.0001 && e4m3_quantize(codes, zero, 4) == 1 && codes[0] == 0, "fp8: quantised within half a step (%.3f of it)", worst);
}

static void test_sampler(void) {
    float logits[6] = {1, 3, 2, 3, -1, 0};
    SamplerOptions greedy = {0, 0, 1, 0}, all = {1, 0, 1, 0}, top2 = {1, 2, 1, 0}, nucleus = {1, 0, 0.5, 0}, floor_ = {1, 0, 1, 0.5};
    int counts[6] = {0}, top2_bad = 0, nucleus_bad = 0, floor_bad = 0, n = 100000;
    double sum = 0, worst = 0;
    for (int i = 0; i < 6; i++) sum += exp(logits[i]);
    for (int i = 0; i < n; i++) {
        double u = (i + 0.5) / n;
        counts[sample_token(logits, 6, &all, u)]++;
        int id = sample_token(logits, 6, &top2, u);
        top2_bad += id != 1 && id != 3;
        id = sample_token(logits, 6, &nucleus, u);      // 3 and 3 have 0.37 each: two of them reach one half
        nucleus_bad += id != 1 && id != 3;
        id = sample_token(logits, 6, &floor_, u);       // 2 is e^-1 = 0.37 of the likeliest
        floor_bad += id != 1 && id != 3;
    }
    for (int i = 0; i < 6; i++) worst = fmax(worst, fabs((double)counts[i] / n - exp(logits[i]) / sum));
    check(worst < 1e-4, "sampler: frequencies are the softmax");
    check(sample_token(logits, 6, &greedy, 0.9) == 1, "sampler: greedy takes the first of the likeliest");
    check(!top2_bad && !nucleus_bad && !floor_bad, "sampler: top-k, top-p and min-p keep what they should");
    for (int i = 0; i < 4; i++) test_sampler_steps(i % 2 ? 4096 : 50, 1 + 100 * (i / 2));
}

// Text that streams is never cut within a character: of every beginning of it, what is held back is the begun character, no more.
static void test_streaming(void) {
    static const char text[] = "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80z";     // 1, 2, 3, 4 and 1 bytes
    static const size_t held[] = {0, 0, 1, 0, 1, 2, 0, 1, 2, 3, 0, 0};
    int wrong = 0;
    for (size_t n = 0; n < sizeof text; n++) wrong += utf8_begun_(text, n) != held[n];
    wrong += utf8_begun_("\x80\x80\x80\x80", 4) != 0 || utf8_begun_("a\xFF", 2) != 0 || utf8_begun_("\xC0", 1) != 0 || utf8_begun_("\xC3z", 2) != 0;
    check(wrong == 0, "streaming: only a character that has begun is held back");
}

static void test_model(void) {
    // parameters of the paper's models, in millions (DESIGN: 124.3, 354.0 and 1555.8 with the vocabulary stored as 50304)
    static const struct { const char *preset; AttnKind attn; double millions; } expected[] = {
        {"124M", ATTN_TPA, 124.3}, {"353M", ATTN_TPA, 354.0}, {"1.5B", ATTN_TPA, 1555.8}};
    for (int i = 0; i < 3; i++) {
        Model m;
        Config c = preset_config(find_preset(expected[i].preset), expected[i].attn);
        c.vocab_size = 50304;
        model_init(&m, &c, 8);
        check(fabs((double)m.num_parameters / 1e6 - expected[i].millions) < 0.05, "model: %s has %.1fM parameters", expected[i].preset, (double)m.num_parameters / 1e6);
        model_free(&m);
    }
    // the paper's point of comparison: all kinds of a size have about the same number of parameters
    const char *const presets[] = {"tiny", "124M", "353M", "773M", "1.5B"};
    for (int p = 0; p < 5; p++) {
        double least = INFINITY, most = 0;
        for (int a = 0; a < NUM_ATTN_KINDS; a++) {
            Model m;
            Config c = preset_config(find_preset(presets[p]), (AttnKind)a);
            if (p == 0) c.vocab_size = BYTES_VOCAB_SIZE;
            model_init(&m, &c, 1);
            least = fmin(least, (double)m.num_parameters), most = fmax(most, (double)m.num_parameters);
            model_free(&m);
        }
        check(most / least < 1.05, "model: kinds of %s differ by %.1f%% in parameters", presets[p], 100 * (most / least - 1));
    }
}

// What is written is read back, equal to the last bit, and pruning keeps what it should.
static void test_checkpoint(void) {
    Error err;
    Model m;
    Config c = preset_config(find_preset("tiny"), ATTN_TPA);
    c.vocab_size = 100;
    model_init(&m, &c, 8);
    float *x[6];
    for (int i = 0; i < 6; i++) x[i] = xcalloc(m.num_stored, sizeof(float));
    for (int i = 0; i < 3; i++)
        for (int k = 0; k < m.num_tensors; k++)
            for (int64_t r = 0; r < m.tensors[k].rows; r++)
                for (int64_t j = 0; j < m.tensors[k].cols; j++) {
                    size_t at = m.tensors[k].offset + (size_t)(r * m.tensors[k].ld + j);
                    x[i][at] = (float)(rng_uniform((uint64_t)i, at) - 0.5);
                }
    char *out = xasprintf("%s/run", folder);
    TrainState s = {7, 1, 2, 3, 1, 256, INT64_C(0x7123456789abcdef), 0, 3, {100, {0}, {0}}}, back;
    for (int i = 0; i < SPIKE_WINDOW; i++) s.spikes.loss[i] = 1.0 / (i + 3), s.spikes.norm[i] = 1e-3 / (i + 7);
    int ok = 1, n;
    HostWeights written = {x[0], x[1], x[2], {0, 1}}, there = {x[3], x[4], x[5], {0, 1}};
    for (s.step = 1; s.step <= 9; s.step++) ok &= checkpoint_save(out, &m, &written, &s, NULL, &err) == 0;
    s.step = 9;
    char *step9 = xasprintf("%s/step_00000009", out);
    Config read;
    Error what;
    ok &= checkpoint_verify(step9, ALL_FILES, &err) == 0 && checkpoint_load_config(step9, &read, &err) == 0 && config_difference(&read, &c, &what) == 0;
    ok &= checkpoint_load_weights(step9, &m, x[3], &err) == 0 && checkpoint_load_optimizer(step9, &m, &there, &back, &err) == 0;
    for (int i = 0; i < 3; i++) ok &= memcmp(x[i], x[3 + i], m.num_stored * sizeof(float)) == 0;
    ok &= memcmp(&s, &back, sizeof s) == 0;
    check(ok, "checkpoint: weights, moments, config and state come back bit for bit");

    // the same moments as slices of 1 to 8 ranks, each rank reading its own, in a layout that is padded for them
    ok = 1;
    for (int world = 1; world <= 8; world++) {
        Model shared;
        model_init_shared(&shared, &c, 8, world);
        size_t part = shared.num_stored / (size_t)world, seen = 0;
        float *whole = xcalloc(shared.num_stored, sizeof *whole), *mv[2] = {xcalloc(part, sizeof **mv), xcalloc(part, sizeof **mv)};
        for (int r = 0; r < world; r++) {
            HostWeights slices = {NULL, mv[0], mv[1], {r, world}};
            ok &= checkpoint_load_optimizer(step9, &shared, &slices, &back, &err) == 0;
            for (int k = 0; k < model_buckets(&shared); k++) {
                Bucket slice = model_slice(&shared, slices.moments, k);
                memcpy(whole + slice.offset, mv[1] + model_bucket(&shared, k).offset / (size_t)world, slice.size * sizeof *whole);
                seen += slice.size;
            }
        }
        for (int k = 0; k < m.num_tensors; k++) {
            const Tensor *t = &m.tensors[k], *u = &shared.tensors[k];
            for (int64_t r = 0; r < t->rows; r++)
                ok &= memcmp(x[2] + t->offset + r * t->ld, whole + u->offset + r * u->ld, (size_t)t->cols * sizeof(float)) == 0;
        }
        ok &= seen == shared.num_stored;
        free(whole), free(mv[0]), free(mv[1]);
        model_free(&shared);
    }
    check(ok, "checkpoint: read as slices by 1 to 8 ranks, the moments are the same");
    const char *old = "{\"step\": \"7\", \"epoch\": \"1\", \"position\": \"2\", \"seed\": \"3\", \"shuffle\": \"1\", \"seq_len\": \"8\", \"shards\": \"9\", \"bad_steps\": \"0\"}";
    ok = state_from_json_(&back, old, "old", &err) == 0 && back.step == 7 && back.shards == 9 && back.skipped == 0 && back.spikes.seen == 0;
    check(ok, "checkpoint: the state of before there was a window of spikes");
    ok = checkpoint_prune(out, 2, 3, &err) == 0;
    int64_t *steps = checkpoint_steps(out, &n), wanted[] = {3, 6, 8, 9};
    check(ok && n == 4 && !memcmp(steps, wanted, sizeof wanted), "checkpoint: --keep 2 --keep-every 3 leaves 3, 6, 8 and 9");
    free(steps);
    for (int i = 0; i < 6; i++) free(x[i]);
    free(out), free(step9);
    model_free(&m);
}

// Damages a good file at random (bits flipped, cut, header length changed, bytes inserted) and reads it: a reader may accept or refuse,
// but not crash, hang or read outside (run this under the sanitizers).
static void fuzz(double seconds) {
    Error err;
    int tokens[] = {3000};
    write_shards("fuzz", tokens, 1);
    char *good_st = xasprintf("%s/run/step_00000009/model.safetensors", folder), *good_shard = xasprintf("%s/fuzz_train_000001.bin", folder);
    char *bad = xasprintf("%s/bad_train_000001.bin", folder);
    Model m;
    Config c = preset_config(find_preset("tiny"), ATTN_TPA);
    c.vocab_size = 100;
    model_init(&m, &c, 8);
    float *weights = xcalloc(m.num_stored, sizeof *weights);
    double until = now_seconds() + seconds;
    uint64_t draw = 0, stream = (uint64_t)time(NULL), rounds = 0, refused = 0;
    size_t st_bytes, shard_bytes;
    char *st = read_small_file(good_st, 1 << 28, &st_bytes, &err), *shard = read_small_file(good_shard, 1 << 28, &shard_bytes, &err);
    if (!st || !shard) die(EXIT_SYSTEM, "%s", err.text);
    size_t header_bytes = 8 + (size_t)(unsigned char)st[0] + ((size_t)(unsigned char)st[1] << 8);
    for (; now_seconds() < until; rounds++) {
        int is_shard = rounds % 2;
        size_t bytes = is_shard ? shard_bytes : st_bytes, head = is_shard ? 16 : header_bytes;
        char *copy = xmalloc(bytes + 64);
        memcpy(copy, is_shard ? shard : st, bytes);
        for (uint64_t k = rng_at(stream, draw++) % 4; k < 4; k++) {
            uint64_t r = rng_at(stream, draw++), at = rng_at(stream, draw++) % (r % 8 ? head : bytes);
            if (r % 5 == 0) bytes = at;                                                         // cut
            else if (r % 5 == 1) copy[at % 12] = (char)(r >> 8);                                // sizes
            else if (r % 5 == 2 && bytes > 0) copy[at] = "0123456789[]{}\",:-e"[(r >> 8) % 19];  // JSON that means something else
            else copy[at] = (char)(copy[at] ^ (1 << (r >> 8) % 8));
            if (bytes == 0) break;
        }
        int fd = open(bad, O_WRONLY | O_CREAT | O_TRUNC, 0666), used = 0;
        if (fd < 0 || write_exactly(fd, copy, bytes, bad, &err) != 0) die(EXIT_SYSTEM, "%s: cannot write it", bad);
        close(fd);
        free(copy);
        if (is_shard) {
            DataLoader d;
            int32_t inputs[64], targets[64];
            int rc = loader_open(&d, bad, 64, ORDER_SHUFFLED, 1, 1, &err);
            for (int i = 0; rc == 0 && i < 50; i++) rc = loader_next(&d, 1, inputs, targets, &err);
            refused += rc != 0;
            if (d.T) loader_close(&d);
        } else {
            SafeTensors file;
            int rc = safetensors_open(&file, bad, &err);
            if (rc == 0) {
                rc = checkpoint_read_tensors(&file, &m, "", weights, &used, &err);
                safetensors_close(&file);
            }
            refused += rc != 0;
        }
    }
    check(rounds > 0 && refused > rounds / 4, "fuzz: %d damaged files in %.0f s, %d refused, none crashed the readers", (int)rounds, seconds, (int)refused);
    free(weights), free(st), free(shard), free(good_st), free(good_shard), free(bad);
    model_free(&m);
}

int main(int argc, char **argv) {
    double fuzz_seconds = 1;
    Flag flags[] = {{0, "fuzz", FLAG_REAL, &fuzz_seconds, "1", 0, 1e5, "seconds of reading files damaged at random", 0}};
    Error err;
    set_program_name(argv[0]);
    if (flags_parse(argc, argv, "test_units: tests of the headers in llmc/", flags, 1, &err) != 0) die(EXIT_INPUT, "%s", err.text);
    if (!mkdtemp(folder)) die(EXIT_SYSTEM, "%s: cannot make it: %s", folder, strerror(errno));
    test_permutation();
    test_loader(ORDER_SHUFFLED);
    test_loader(ORDER_SEQUENTIAL);
    test_loader_epochs();
    test_loader_sequential();
    test_schedule();
    test_sampler();
    test_fp8();
    test_streaming();
    test_model();
    test_checkpoint();
    fuzz(fuzz_seconds);
    char *remove = xasprintf("rm -rf %s", folder);
    if (system(remove) != 0) fprintf(stderr, "note: could not remove %s\n", folder);
    free(remove);
    printf("%d passed, %d failed\n", passed, failed);
    return failed ? 1 : 0;
}
