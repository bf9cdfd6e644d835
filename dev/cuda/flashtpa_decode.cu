// FlashTPA decoding: checks and times llmc/flashtpa_decode.cuh over llmc/factor_cache.cuh.
//
//   build/flashtpa_decode             check against CPU loops: ranks, heads, lengths, queries, cuts of the work, e4m3,
//                                     mla, variants
//   build/flashtpa_decode quick       fewer checks
//   build/flashtpa_decode time        the table of dev/results/flashtpa.md
//   build/flashtpa_decode figure      times of each attention kind, NH 32 and HS 64, as tab-separated columns
//   build/flashtpa_decode VERSION B M NH HS RQ RK RV [cluster [min_pages]]     time one, M tokens cached per sequence
//
// Versions:
//   0  naive: rebuild k and v from the cache, then attention over them
//   1  plain: in factor space, one block per head, no tensor cores
//   2  the trainer's: tensor cores, all heads at once, rings of pages      (bf16 cache)
//   3  version 2 over an e4m3 cache
//   4  version 2 over the cache of MHA (RK = NH heads), GQA (RK groups) or MQA (RK = 1)
//   5  version 2 for MLA in its absorbed form: a latent of 4 HS numbers, a rotated part of HS / 2
//   6  version 5 over an e4m3 cache
//
// Shares are of the read bandwidth, measured at the start. Runs repeat in a graph without a flush in between: a cache
// that fits L2 (50 MB) is read from there, as in the programs this is compared with.
#include <string>

#include "bench.cuh"
#include "../../llmc/flashtpa_decode.cuh"
#include "../../llmc/latent_decode.cuh"
#include "../../llmc/variant_cache.cuh"
#include "../../test/testing.h"

typedef std::vector<float> Floats;

enum Version { NAIVE, PLAIN, FAST, FAST_E4M3, FAST_GROUPED, FAST_LATENT, FAST_LATENT_E4M3, NUM_VERSIONS };
enum { E4M3_BYTES = 1, BF16_BYTES = 2 };        // per number of the cache

// ---------------------------------------------------------------------------------------------------------------------
// A layer: B sequences of different lengths, each with n queries, its last n tokens

// For grouped kinds RK is the number of key/value heads, and RQ and RV do not matter.
struct LayerShape { AttnKind attn; int NH, HS, RQ, RK, RV; };

struct Layer {
    Config config;
    Model model;
    int B, n;
    std::vector<int32_t> lengths;               // (B) tokens before the queries
    int64_t capacity, rows;                     // tokens per sequence; factor rows of all sequences
    std::vector<int64_t> start;                 // (B) row of each sequence's first token
    // room: tokens of capacity that stay unused
    Layer(const LayerShape &s, const std::vector<int32_t> &lengths, int n, int64_t room)
        : config(), B((int)lengths.size()), n(n), lengths(lengths), rows(0) {
        config.attn = s.attn, config.n_layer = 1, config.n_embd = 64, config.vocab_size = 64;
        config.n_head = s.NH, config.head_dim = s.HS;
        config.q_rank = s.RQ, config.k_rank = s.RK, config.v_rank = s.RV, config.n_kv_head = s.RK;
        config.q_lora = 8 * s.HS, config.kv_lora = 4 * s.HS, config.rope_dim = s.HS / 2;
        config.rope_base = 10000, config.rms_eps = 1e-6;
        Error err;
        if (config_check(&config, &err) != 0) die(EXIT_INPUT, "%s", err.text);
        model_init(&model, &config, 8);
        capacity = *std::max_element(lengths.begin(), lengths.end()) + n + room;
        for (int32_t length : lengths) start.push_back(rows), rows += length + n;
    }
    ~Layer() { model_free(&model); }
    int NH() const { return (int)config.n_head; }
    int HS() const { return (int)model.HSK; }
    int D() const { return NH() * HS(); }
    int Pp() const { return (int)model.Pp; }
};

static DecodeArgs decode_args(const Layer &l, int number_bytes) {
    DecodeArgs args = {};
    args.shape = cache_shape(&l.model, number_bytes), args.q = cache_queries(&l.model);
    args.B = l.B, args.n = l.n, args.NH = l.NH(), args.Pp = args.shape.latent ? args.q.R * args.q.HS : l.Pp();
    args.pages = cache_pages(l.capacity);
    return args;
}

// Bytes of the numbers that the cache holds for so many tokens: the least that any implementation must read.
static double logical_bytes(const CacheShape &s, double tokens) {
    const int weights = s.factored * s.heads;
    double numbers = (double)s.RK * (weights + s.HSK) + (double)s.RV * (weights + s.HSV);
    return tokens * s.streams * (numbers * s.number_bytes + (s.number_bytes == 1 ? 2 * sizeof(float) : 0));
}

// The scratch of a launch, zeroed.
struct Scratch : Array<float> {
    Scratch(const CacheShape &shape, const Heads &q, int B, int n, int cluster, int splits)
        : Array<float>(decode_scratch_bytes(shape, q, B, n, cluster, splits) / sizeof(float) + 1) {
        CUDA_CHECK(cudaMemset(p, 0, this->n * sizeof(float)));
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// The reference

// A layer's data on the GPU, and what the reference reads, on the CPU.
struct LayerData {
    enum { GUARD = 4096 };                      // numbers after out and cache that must stay NaN
    Array<floatX> fac;                          // (rows, Pp) all tokens
    Array<floatX> queries;                      // (B n, Pp) the queries' rows, q rotated by cache_write
    Array<floatX> out;                          // (B n, NH HS)
    Array<int32_t> lengths, zeros;              // (B)
    std::vector<double> host_frequencies;       // (HS / 2)
    Array<double> frequencies;
    size_t cache_bytes;
    Array<unsigned char> cache;                 // (B, streams, pages), at first 0xff: NaN in fp32, bf16 and e4m3
    Floats host_fac;                            // (rows, Pp)
    std::vector<unsigned char> pages;           // the cache, once written

    static std::vector<double> rope(const Model &m) {
        std::vector<double> x(m.HSR / 2);
        rope_frequencies(x.data(), m.HSR, m.config.rope_base);
        return x;
    }
    LayerData(const Layer &l, const CacheShape &shape, uint64_t seed)
        : fac(l.rows * l.Pp(), seed, 1), queries((size_t)l.B * l.n * l.Pp()), out((size_t)l.B * l.n * l.D() + GUARD),
          lengths(l.lengths), zeros(std::vector<int32_t>(l.B, 0)),
          host_frequencies(rope(l.model)), frequencies(host_frequencies),
          cache_bytes(cache_layer_bytes(shape, l.B, l.capacity)), cache(cache_bytes + GUARD), host_fac(fac.n) {
        std::vector<floatX> numbers = fac.read(0, fac.n);
        for (size_t i = 0; i < fac.n; i++) host_fac[i] = (float)numbers[i];
    }
    const float *row(const Layer &l, int b, int64_t m) const { return &host_fac[(l.start[b] + m) * l.Pp()]; }
};

// Fills the cache: all tokens but the queries as prompts, then the queries after them.
static void fill_cache(const Layer &l, const DecodeArgs &args, LayerData *data) {
    const size_t sequence_bytes = data->cache_bytes / l.B;
    CacheWrite w = {};
    w.frequencies = data->frequencies.p, w.shape = args.shape, w.Pp = l.Pp(), w.pages = args.pages;
    w.q = l.model.q, w.k = l.model.k, w.v = l.model.v;
    for (int b = 0; b < l.B; b++) {
        w.cache = data->cache.p + b * sequence_bytes, w.fac = data->fac.p + l.start[b] * l.Pp();
        w.lengths = data->zeros.p, w.n = l.lengths[b];
        if (l.lengths[b] > 0) cache_write(w, 1, 0);
        CUDA_CHECK(cudaMemcpy(data->queries.p + (size_t)b * l.n * l.Pp(),
                              data->fac.p + (l.start[b] + l.lengths[b]) * l.Pp(),
                              (size_t)l.n * l.Pp() * sizeof(floatX), cudaMemcpyDeviceToDevice));
    }
    w.cache = data->cache.p, w.fac = data->queries.p, w.lengths = data->lengths.p, w.n = l.n, w.rotate_queries = 1;
    cache_write(w, l.B, 0);
    data->pages = data->cache.read(0, data->cache_bytes);
}

// Element d of a head of q, k or v in double, from a factor row (Pp) of the token at this position.
static double head_element(const Layer &l, const float *row, const Heads &h, int head, int d, const double *frequencies,
                           int64_t position) {
    auto vector = [&](int r) {
        int half = l.HS() / 2, i = d % half;
        double x = row[h.b + r * l.HS() + i], y = row[h.b + r * l.HS() + half + i], c = 1, s = 0;
        if (h.HSR) c = cos((double)position * frequencies[i]), s = sin((double)position * frequencies[i]);
        return d < half ? x * c + y * s : y * c - x * s;
    };
    if (h.kind == HEADS_GROUPED) return vector(head / (l.NH() / h.R));
    double sum = 0;
    for (int r = 0; r < h.R; r++) sum += row[h.a + head * h.R + r] * vector(r);
    return h.scale * sum;
}

// k (HS) and v (HS) of a head for token m, from its factor row: head_element for both halves, each angle computed once.
static void kv_from_factors(const Layer &l, const LayerData &data, const float *row, int head, int64_t m,
                            float *k, float *v) {
    const int NH = l.NH(), HS = l.HS(), half = HS / 2;
    for (int d = 0; d < half; d++) {
        double angle = (double)m * data.host_frequencies[d], c = cos(angle), s = sin(angle), x[2] = {}, y[2] = {};
        for (int p = 0; p < 2; p++) {
            const Heads &h = p == CACHE_K ? l.model.k : l.model.v;
            for (int r = 0; r < h.R; r++) {
                double weight = h.kind == HEADS_GROUPED ? (head / (NH / h.R) == r)
                                                        : h.scale * row[h.a + head * h.R + r];
                x[p] += weight * row[h.b + r * HS + d], y[p] += weight * row[h.b + r * HS + half + d];
            }
        }
        k[d] = (float)(x[CACHE_K] * c + y[CACHE_K] * s), k[half + d] = (float)(y[CACHE_K] * c - x[CACHE_K] * s);
        v[d] = (float)x[CACHE_V], v[half + d] = (float)y[CACHE_V];
    }
}

// The same from a page of an e4m3 cache, whose numbers are rounded; t: the token in the page. k and v are zero at
// first.
static void kv_from_page(const CacheShape &shape, const unsigned char *page, int head, int t, float *k, float *v) {
    for (CachePart part : {CACHE_K, CACHE_V}) {
        int R = part == CACHE_K ? shape.RK : shape.RV, HS = part == CACHE_K ? shape.HSK : shape.HSV;
        float scale, *to = part == CACHE_K ? k : v;
        memcpy(&scale, page + cache_scale(shape, part, t), sizeof scale);
        for (int r = 0; r < R; r++) {
            float weight = scale / (float)(shape.factored ? R : 1);
            if (shape.factored) weight *= e4m3_to_float(page[cache_a(shape, part, r, head % shape.heads, t)]);
            for (int d = 0; d < HS; d++) to[d] += weight * e4m3_to_float(page[cache_b(shape, part, r, t, d)]);
        }
    }
}

// Attention of q (HS) over k and v (sees, HS); out (HS).
static void attend(double *out, const Floats &q, const Floats &k, const Floats &v, int64_t sees, int HS) {
    std::vector<double> s(sees), o(HS, 0);
    double top = -INFINITY, sum = 0;
    for (int64_t m = 0; m < sees; m++) {
        float dot = 0;
        for (int d = 0; d < HS; d++) dot += q[d] * k[m * HS + d];
        s[m] = dot / sqrt((double)HS), top = fmax(top, s[m]);
    }
    for (int64_t m = 0; m < sees; m++) {
        double p = exp(s[m] - top);
        sum += p;
        for (int d = 0; d < HS; d++) o[d] += p * v[m * HS + d];
    }
    for (int d = 0; d < HS; d++) out[d] = o[d] / sum;
}

// What decoding should give, (B n, NH HS). k and v come from the factors if the cache keeps numbers as they are, from
// the cache itself if it rounds them to e4m3. *k_rounding: the relative error of k in an e4m3 cache.
static std::vector<double> reference(const Layer &l, const DecodeArgs &args, const LayerData &data,
                                     double *k_rounding) {
    const CacheShape &shape = args.shape;
    const int HS = l.HS(), D = l.D();
    const double *frequencies = data.host_frequencies.data();
    std::vector<double> want((size_t)l.B * l.n * D);
    double error = 0, norm = 0;
    for (int b = 0; b < l.B; b++) {
        const int64_t tokens = l.lengths[b] + l.n;
        #pragma omp parallel for schedule(dynamic) reduction(+:error,norm)
        for (int h = 0; h < l.NH(); h++) {
            Floats k(tokens * HS), v(tokens * HS), q(HS);
            const int64_t first_page = ((int64_t)b * shape.streams + h / shape.heads) * args.pages;
            for (int64_t m = 0; m < tokens; m++) {
                const float *row = data.row(l, b, m);
                const unsigned char *page = &data.pages[(first_page + m / PAGE) * cache_page_bytes(shape)];
                if (shape.number_bytes != E4M3_BYTES) kv_from_factors(l, data, row, h, m, &k[m * HS], &v[m * HS]);
                else kv_from_page(shape, page, h, (int)(m % PAGE), &k[m * HS], &v[m * HS]);
                for (int d = 0; shape.number_bytes == E4M3_BYTES && m % 97 == 0 && d < HS; d++) {     // a sample
                    double x = head_element(l, row, l.model.k, h, d, frequencies, m);
                    error += pow(k[m * HS + d] - x, 2), norm += x * x;
                }
            }
            for (int i = 0; i < l.n; i++) {
                const int64_t sees = l.lengths[b] + i + 1;
                for (int d = 0; d < HS; d++)
                    q[d] = (float)head_element(l, data.row(l, b, sees - 1), l.model.q, h, d, frequencies, sees - 1);
                attend(&want[((size_t)b * l.n + i) * D + h * HS], q, k, v, sees, HS);
            }
        }
    }
    *k_rounding = sqrt(error / norm);
    return want;
}

// ---------------------------------------------------------------------------------------------------------------------
// Check

// How flashtpa_decode is told to cut the work; 0: automatic.
struct Cut { int cluster, splits, min_pages; };

enum CheckedVersions { FAST_ONLY, FAST_AND_PLAIN };

// Runs one version twice, to out. Adds to *bad what is wrong, and keeps the largest error in *worst.
static void check_version(Version version, const Cut &cut, DecodeArgs args, Array<floatX> *out,
                          const std::vector<double> &want, double *worst, std::string *bad) {
    args.out = out->p;
    args.cluster = cut.cluster, args.splits = cut.splits, args.min_pages = cut.min_pages;
    Scratch scratch(args.shape, args.q, args.B, args.n, cut.cluster, cut.splits);
    args.scratch = scratch.p;
    std::vector<floatX> first;
    for (int run = 0; run < 2; run++) {
        CUDA_CHECK(cudaMemset(out->p, 0xff, out->n * sizeof(floatX)));
        if (version == PLAIN) decode_plain(args, 0);
        else flashtpa_decode(args, 0);
        CUDA_CHECK(cudaDeviceSynchronize());
        std::vector<floatX> got = out->read(0, out->n);
        const double error = relative_error(got, want);
        int64_t written = 0;                    // numbers of the guard that are not NaN any more
        for (size_t i = want.size(); i < got.size(); i++) written += (float)got[i] == (float)got[i];
        if (!(error <= *worst)) *worst = error;
        const bool same = run == 0 || !memcmp(first.data(), got.data(), got.size() * sizeof(floatX));
        if (!(error <= 1e-2) || written > 0 || !same) {
            char text[200];
            snprintf(text, sizeof text, " | version %d, cluster %d, splits %d, min_pages %d: error %.1e%s%s",
                     (int)version, cut.cluster, cut.splits, cut.min_pages, error,
                     written > 0 ? ", wrote past the end" : "", same ? "" : ", second run differs");
            *bad += text;
        }
        if (run == 0) first.swap(got);
    }
}

// Checks version 2 with all cuts, and version 1, on random factors. One check of the score.
static void check_layer(Score *score, const Layer &l, int number_bytes, const std::vector<Cut> &cuts, uint64_t seed,
                        CheckedVersions versions) {
    DecodeArgs args = decode_args(l, number_bytes);
    LayerData data(l, args.shape, seed);
    fill_cache(l, args, &data);
    args.cache = data.cache.p, args.lengths = data.lengths.p, args.fac = data.queries.p;
    double k_rounding, worst = 0;
    const std::vector<double> want = reference(l, args, data, &k_rounding);
    std::string bad;
    const Cut automatic = {};
    if (versions == FAST_AND_PLAIN) check_version(PLAIN, automatic, args, &data.out, want, &worst, &bad);
    const bool has_clusters = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
    for (const Cut &cut : cuts)
        if (cut.cluster <= 1 || has_clusters) check_version(FAST, cut, args, &data.out, want, &worst, &bad);
    int64_t written = 0;
    for (unsigned char x : data.cache.read(data.cache_bytes, LayerData::GUARD)) written += x != 0xff;
    if (written > 0) bad += " | wrote past the end of the cache";
    const int longest = *std::max_element(l.lengths.begin(), l.lengths.end());
    char rounded[40] = "";
    if (number_bytes == E4M3_BYTES) snprintf(rounded, sizeof rounded, " (k rounded by %.1e)", k_rounding);
    report(score, bad.empty(), "%s%s B%d n%d longest %d NH%d HS%d R%d,%d,%d: worst %.1e%s%s", attn_name(l.config.attn),
           number_bytes == E4M3_BYTES ? " e4m3" : "", l.B, l.n, longest, l.NH(), l.HS(), l.model.q.R, l.model.k.R,
           l.model.v.R, worst, rounded, bad.c_str());
}

// ---------------------------------------------------------------------------------------------------------------------
// Check of mla: what is cached, the absorbed queries, attention over the cache, and the outputs, each against sums in
// double of what the step before it left

struct LatentLayer {
    Config config;
    Model model;
    LatentLayer(int NH, int HSV, int q_lora, int kv_lora, int rope_dim) : config(default_config()) {
        config.attn = ATTN_MLA, config.n_layer = 1, config.n_embd = 64, config.vocab_size = 64;
        config.n_head = NH, config.head_dim = HSV;
        config.q_lora = q_lora, config.kv_lora = kv_lora, config.rope_dim = rope_dim;
        Error err;
        if (config_check(&config, &err) != 0) die(EXIT_INPUT, "%s", err.text);
        model_init(&model, &config, 8);
    }
    ~LatentLayer() { model_free(&model); }
};

static Floats floats(const Array<floatX> &x) {
    std::vector<floatX> numbers = x.read(0, x.n);
    return Floats(numbers.begin(), numbers.end());
}

// Element d of [latent | rotated part] of a token, from its page.
static double latent_from_page(const CacheShape &s, const unsigned char *page, int t, int d) {
    const CachePart part = d < s.HSV ? CACHE_V : CACHE_K;
    const unsigned char *p = page + cache_b(s, part, 0, t, part == CACHE_V ? d : d - s.HSV);
    if (s.number_bytes != E4M3_BYTES) return (double)(float)*(const floatX *)p;
    return (double)*(const float *)(page + cache_scale(s, part, t)) * e4m3_to_float(*p);
}

// The same in double, from its projected row.
static std::vector<double> latent_from_row(const LatentLayer &l, const float *row, const Floats &gain,
                                           int64_t position) {
    const int kv = (int)l.config.kv_lora, HSR = (int)l.config.rope_dim, half = HSR / 2;
    std::vector<double> x(kv + HSR);
    const float *latent = row + l.config.q_lora, *rotated = latent + kv;
    double sum = 0;
    for (int i = 0; i < kv; i++) sum += (double)latent[i] * latent[i];
    for (int i = 0; i < kv; i++) x[i] = latent[i] / sqrt(sum / kv + l.config.rms_eps) * gain[i];
    for (int i = 0; i < half; i++) {
        double angle = (double)position * rope_frequency(i, HSR, l.config.rope_base), c = cos(angle), s = sin(angle);
        x[kv + i] = rotated[i] * c + rotated[half + i] * s, x[kv + half + i] = rotated[half + i] * c - rotated[i] * s;
    }
    return x;
}

static void check_latent(Score *score, const LatentLayer &l, const std::vector<int32_t> &lengths, int n, int room,
                         int number_bytes, const std::vector<Cut> &cuts, uint64_t seed, CheckedVersions versions) {
    const Model &m = l.model;
    const AbsorbedShape heads = absorbed_shape(&m, n);
    const int B = (int)lengths.size(), NH = heads.NH, HSV = heads.HSV, kv = heads.kv, HSR = heads.HSR, W = kv + HSR;
    const int Pp = (int)m.Pp, HSK = HSV + HSR, queries = B * n, q_lora = (int)l.config.q_lora;
    const int64_t capacity = *std::max_element(lengths.begin(), lengths.end()) + n + room;
    const CacheShape shape = cache_shape(&m, number_bytes);
    std::vector<double> host_frequencies(HSR / 2);
    rope_frequencies(host_frequencies.data(), HSR, l.config.rope_base);
    const size_t sequence_bytes = cache_layer_bytes(shape, 1, capacity), cache_bytes = B * sequence_bytes;
    Array<unsigned char> cache(cache_bytes + LayerData::GUARD);
    Array<floatX> q_gain(q_lora, seed + 1, 2), kv_gain(kv, seed + 2, 2), latq(capacity * q_lora);
    Array<floatX> q((size_t)queries * NH * HSK, seed + 3, 1), wkvb((size_t)NH * 2 * HSV * kv, seed + 4, 2 / sqrt(kv));
    Array<floatX> absorbed((size_t)queries * NH * W), out((size_t)queries * NH * kv + LayerData::GUARD);
    Array<floatX> y((size_t)queries * NH * HSV);
    Array<int32_t> lengths_gpu(lengths), zeros(std::vector<int32_t>(B, 0));
    Array<double> frequencies(host_frequencies);
    LatentWrite w = {};
    w.q_gain = q_gain.p, w.kv_gain = kv_gain.p, w.latq = latq.p, w.frequencies = frequencies.p, w.shape = shape;
    w.Pp = Pp, w.q_lora = q_lora, w.pages = cache_pages(capacity), w.eps = (float)l.config.rms_eps;
    std::string bad;
    double worst[3] = {};       // of the cache and cq, the queries, and the outputs
    auto expect = [&](int which, const char *what, double error, double tolerance) {
        worst[which] = fmax(worst[which], error);
        if (!(error <= tolerance)) bad += std::string(" | ") + what;
    };
    const double rounded = number_bytes == E4M3_BYTES ? 0.05 : ROUNDED_ONCE;
    std::vector<std::vector<double>> rows;      // of each sequence (tokens, W), as cached
    for (int b = 0; b < B; b++) {
        const int64_t tokens = lengths[b] + n;
        Array<floatX> proj(tokens * Pp, seed + 10 + b, 1);
        w.cache = cache.p + b * sequence_bytes, w.proj = proj.p, w.n = lengths[b], w.lengths = zeros.p;
        if (lengths[b] > 0) latent_write(w, 1, 0);
        w.n = n, w.proj = proj.p + (int64_t)lengths[b] * Pp, w.lengths = lengths_gpu.p + b;
        latent_write(w, 1, 0);
        const Floats host = floats(proj), gain = floats(kv_gain), gain_q = floats(q_gain), cq = floats(latq);
        std::vector<unsigned char> pages = cache.read(b * sequence_bytes, sequence_bytes);
        std::vector<double> cached(tokens * W);
        double error = 0, norm = 0, sum = 0;
        for (int64_t t = 0; t < tokens; t++) {
            std::vector<double> x = latent_from_row(l, &host[t * Pp], gain, t);
            const unsigned char *page = &pages[t / PAGE * cache_page_bytes(shape)];
            for (int d = 0; d < W; d++) {
                double y = cached[t * W + d] = latent_from_page(shape, page, (int)(t % PAGE), d);
                error += (x[d] - y) * (x[d] - y), norm += x[d] * x[d];
            }
        }
        expect(0, "cache", sqrt(error / norm), rounded);
        const float *row = &host[(tokens - 1) * Pp];
        error = norm = 0;
        for (int i = 0; i < q_lora; i++) sum += (double)row[i] * row[i];
        for (int i = 0; i < q_lora; i++) {
            double x = row[i] / sqrt(sum / q_lora + l.config.rms_eps) * gain_q[i];
            error += pow(x - cq[(n - 1) * q_lora + i], 2), norm += x * x;
        }
        expect(0, "cq", sqrt(error / norm), ROUNDED_ONCE);
        rows.push_back(cached);
    }

    latent_queries(absorbed.p, q.p, wkvb.p, lengths_gpu.p, frequencies.p, heads, queries, 0);
    const Floats host_q = floats(q), host_w = floats(wkvb), host_absorbed = floats(absorbed);
    std::vector<double> want_q(absorbed.n), want(out.n - LayerData::GUARD);
    #pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < queries; i++)
        for (int h = 0; h < NH; h++) {
            const float *x = &host_q[((size_t)i * NH + h) * HSK], *wk = &host_w[(size_t)h * 2 * HSV * kv];
            double *to = &want_q[((size_t)i * NH + h) * W];
            for (int j = 0; j < HSV; j++) for (int k = 0; k < kv; k++) to[k] += (double)x[j] * wk[j * kv + k];
            for (int k = 0; k < HSR / 2; k++) {
                double angle = (lengths[i / n] + i % n) * host_frequencies[k], c = cos(angle), s = sin(angle);
                double first = x[HSV + k], second = x[HSV + HSR / 2 + k];
                to[kv + k] = first * c + second * s, to[kv + HSR / 2 + k] = second * c - first * s;
            }
            const std::vector<double> &cached = rows[i / n];
            const int64_t sees = lengths[i / n] + i % n + 1;
            std::vector<double> p(sees);
            double top = -INFINITY, total = 0, *o = &want[((size_t)i * NH + h) * kv];
            for (int64_t t = 0; t < sees; t++) {
                for (int d = 0; d < W; d++) p[t] += host_absorbed[((size_t)i * NH + h) * W + d] * cached[t * W + d];
                top = fmax(top, p[t] *= m.scale);
            }
            for (int64_t t = 0; t < sees; t++) total += p[t] = exp(p[t] - top);
            for (int64_t t = 0; t < sees; t++) for (int d = 0; d < kv; d++) o[d] += p[t] / total * cached[t * W + d];
        }
    expect(1, "queries", relative_error(host_absorbed, want_q), ROUNDED_ONCE);

    DecodeArgs args = {};
    args.cache = cache.p, args.lengths = lengths_gpu.p, args.fac = absorbed.p, args.shape = shape;
    args.q = cache_queries(&m), args.B = B, args.n = n, args.NH = NH, args.Pp = NH * W, args.pages = w.pages;
    double worst_attention = 0;
    const Cut automatic = {};
    if (versions == FAST_AND_PLAIN) check_version(PLAIN, automatic, args, &out, want, &worst_attention, &bad);
    const bool has_clusters = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
    for (const Cut &cut : cuts)
        if (cut.cluster <= 1 || has_clusters) check_version(FAST, cut, args, &out, want, &worst_attention, &bad);

    latent_output(y.p, out.p, wkvb.p, heads, queries, 0);
    const Floats o = floats(out);
    std::vector<double> want_y(y.n);
    for (int i = 0; i < queries; i++)
        for (int h = 0; h < NH; h++)
            for (int j = 0; j < HSV; j++)
                for (int k = 0; k < kv; k++)
                    want_y[((size_t)i * NH + h) * HSV + j] += (double)o[((size_t)i * NH + h) * kv + k] *
                                                              host_w[(((size_t)h * 2 + 1) * HSV + j) * kv + k];
    expect(2, "outputs", relative_error(floats(y), want_y), ROUNDED_ONCE);
    int64_t written = 0;
    for (unsigned char x : cache.read(cache_bytes, LayerData::GUARD)) written += x != 0xff;
    if (written > 0) bad += " | wrote past the end of the cache";
    report(score, bad.empty(), "mla%s B%d n%d longest %d NH%d HSV%d latents %d, %d + %d: worst %.1e (cache %.1e, "
           "queries %.1e, outputs %.1e)%s", number_bytes == E4M3_BYTES ? " e4m3" : "", B, n,
           *std::max_element(lengths.begin(), lengths.end()), NH, HSV, q_lora, kv, HSR, worst_attention, worst[0],
           worst[1], worst[2], bad.c_str());
}

// ---------------------------------------------------------------------------------------------------------------------
// Check of variants and switches: from projected rows to the output of attention, by way of their cache

struct VariantLayer {
    Config config;
    Model model;
    VariantLayer(const LayerShape &s, const char *words) : config(default_config()) {
        config.attn = s.attn, config.n_layer = 1, config.n_embd = 64, config.vocab_size = 64;
        config.n_head = s.NH, config.head_dim = s.HS;
        config.q_rank = s.RQ, config.k_rank = s.RK, config.v_rank = s.RV, config.n_kv_head = s.RK;
        set_variant(&config, words);
        Error err;
        if (config_check(&config, &err) != 0) die(EXIT_INPUT, "%s", err.text);
        model_init(&model, &config, 8);
    }
    ~VariantLayer() { model_free(&model); }
};

// A head of q, k or v in double, from the projected row of the token at this position, and the one before (or NULL).
static std::vector<double> variant_head(const VariantLayer &l, const Heads &h, int head, const float *row,
                                        const float *before, const Floats &layer, int64_t position) {
    const Config &c = l.config;
    const int NH = (int)c.n_head, HS = h.HS, HB = h.HB, group = h.kind == HEADS_GROUPED ? head / (NH / h.R) : -1;
    std::vector<double> out(HS, 0);
    for (int r = 0; r < h.R; r++) {
        if (group >= 0 && r != group) continue;
        double a = 1, sum = 0;
        auto projected_a = [&](int i) {
            return (double)(h.from_a == NOT_PROJECTED ? layer[h.const_a + i * h.R + r] : row[h.from_a + i * h.R + r]);
        };
        if (h.kind == HEADS_FACTORED) a = projected_a(head);
        if (h.kind == HEADS_FACTORED && c.head_act == HEAD_ACT_SIGMOID) a = 1 / (1 + exp(-a));
        if (h.kind == HEADS_FACTORED && c.head_act == HEAD_ACT_SOFTMAX) {
            for (int i = 0; i < NH; i++) sum += exp(projected_a(i));
            a = exp(a) / sum;
        }
        std::vector<double> b(HB), turned(HB);
        for (int i = 0; i < HB; i++) {
            b[i] = h.from_b == NOT_PROJECTED ? layer[h.const_b + r * HB + i] : row[h.from_b + r * HB + i];
            if (h.from_s == NOT_PROJECTED) continue;
            const double gate = 1 / (1 + exp(-(double)row[h.from_s + r]));
            b[i] = (1 - gate) * b[i] + (before ? gate * before[h.from_b + r * HB + i] : 0);
        }
        turned = b;
        for (int i = 0; i < HB / 2 && h.HSR; i++) {
            double angle = (double)position * rope_frequency(i, HB, c.rope_base), x = b[i], y = b[HB / 2 + i];
            turned[i] = x * cos(angle) + y * sin(angle), turned[HB / 2 + i] = y * cos(angle) - x * sin(angle);
        }
        for (int d = 0; d < HS; d++) {
            const double factor = h.from_c == NOT_PROJECTED ? 1 : row[h.from_c + r * (HS / HB) + d / HB];
            out[d] += h.scale * a * turned[d % HB] * factor;
        }
    }
    double square = 0;
    for (double x : out) square += x * x;
    for (double &x : out) if (c.qk_norm && &h != &l.model.v) x /= sqrt(square / HS + c.rms_eps);
    return out;
}

// A layer of the model with the keys that `words` names (set_variant).
static void check_variant(Score *score, const LayerShape &s, const char *words, const std::vector<int32_t> &lengths,
                          int n, int number_bytes, uint64_t seed) {
    const VariantLayer l(s, words);
    const Model &m = l.model;
    const int B = (int)lengths.size(), NH = s.NH, HS = s.HS, D = NH * HS, room = 20;
    const int64_t Pp = m.Pp, capacity = *std::max_element(lengths.begin(), lengths.end()) + n + room;
    const VariantShape shape = variant_shape(&m, number_bytes);
    const CacheShape pages = cache_shape(&m, number_bytes);
    const size_t sequence_bytes = shape.in_pages ? cache_layer_bytes(pages, 1, capacity)
                                                 : capacity * variant_row_bytes(shape);
    std::vector<double> host_frequencies[2];
    for (int i = 0; i < 2; i++) {
        const int HSR = i == 0 ? m.q.HSR : m.k.HSR;
        host_frequencies[i].resize(HSR / 2);
        rope_frequencies(host_frequencies[i].data(), HSR, l.config.rope_base);
    }
    Array<double> frequencies_q(host_frequencies[0]), frequencies_k(host_frequencies[1]);
    Array<unsigned char> cache(B * sequence_bytes + LayerData::GUARD);
    Array<floatX> layer(m.layer_stride, seed, 1), before(B * Pp), fac(std::max<int64_t>(capacity, B * n) * shape.PFp);
    Array<floatX> queries((int64_t)B * n * Pp), out((size_t)B * n * D + LayerData::GUARD);
    Array<int32_t> lengths_gpu(lengths), zeros(std::vector<int32_t>(B, 0));
    VariantRows w = {};
    w.fac = fac.p, w.layer = layer.p, w.frequencies_q = frequencies_q.p, w.frequencies_k = frequencies_k.p;
    w.shape = shape, w.capacity = capacity;
    CacheWrite write = {};
    write.fac = fac.p, write.frequencies = frequencies_k.p, write.shape = pages, write.q = m.q, write.k = m.k;
    write.v = m.v, write.Pp = shape.PFp, write.pages = cache_pages(capacity);
    auto append = [&](unsigned char *to, const floatX *proj, const int32_t *at, int tokens, int sequences) {
        w.cache = write.cache = to, w.proj = proj, w.lengths = write.lengths = at, w.n = write.n = tokens;
        variant_rows(w, sequences, 0);
        if (shape.in_pages) cache_write(write, sequences, 0);
    };
    std::vector<Floats> rows;
    for (int b = 0; b < B; b++) {
        Array<floatX> proj((lengths[b] + n) * Pp, seed + 1 + b, 1.5);
        if (lengths[b] > 0) append(cache.p + b * sequence_bytes, proj.p, zeros.p, lengths[b], 1);
        if (lengths[b] > 0)
            CUDA_CHECK(cudaMemcpy(before.p + b * Pp, proj.p + (lengths[b] - 1) * Pp, Pp * sizeof(floatX),
                                  cudaMemcpyDeviceToDevice));
        CUDA_CHECK(cudaMemcpy(queries.p + (int64_t)b * n * Pp, proj.p + lengths[b] * Pp, n * Pp * sizeof(floatX),
                              cudaMemcpyDeviceToDevice));
        rows.push_back(floats(proj));
    }
    w.before = before.p, write.rotate_queries = 1;
    append(cache.p, queries.p, lengths_gpu.p, n, B);

    const Floats weights = floats(layer);
    std::vector<double> want((size_t)B * n * D);
    for (int b = 0; b < B; b++) {
        #pragma omp parallel for schedule(dynamic)
        for (int h = 0; h < NH; h++) {
            const int tokens = lengths[b] + n;
            Floats k, v;
            auto head = [&](const Heads &part, int t) {
                const float *row = &rows[b][t * Pp];
                std::vector<double> x = variant_head(l, part, h, row, t > 0 ? row - Pp : NULL, weights, t);
                return Floats(x.begin(), x.end());
            };
            for (int t = 0; t < tokens; t++) {
                const Floats x = head(m.k, t), y = head(m.v, t);
                k.insert(k.end(), x.begin(), x.end()), v.insert(v.end(), y.begin(), y.end());
            }
            for (int i = 0; i < n; i++)
                attend(&want[((size_t)b * n + i) * D + h * HS], head(m.q, lengths[b] + i), k, v, lengths[b] + i + 1,
                       HS);
        }
    }
    std::vector<floatX> first;
    double error = 0;
    bool same = true;
    int64_t written = 0;
    for (int run = 0; run < 2; run++) {
        CUDA_CHECK(cudaMemset(out.p, 0xff, out.n * sizeof(floatX)));
        if (shape.in_pages) {
            DecodeArgs args = {};
            args.cache = cache.p, args.lengths = lengths_gpu.p, args.fac = fac.p, args.out = out.p, args.shape = pages;
            args.q = m.q, args.B = B, args.n = n, args.NH = NH, args.Pp = shape.PFp, args.pages = write.pages;
            Scratch scratch(pages, m.q, B, n, 0, 0);
            args.scratch = scratch.p;
            flashtpa_decode(args, 0);
            CUDA_CHECK(cudaDeviceSynchronize());
        } else {
            VariantArgs args = {};
            args.cache = cache.p, args.lengths = lengths_gpu.p, args.fac = fac.p, args.layer = layer.p;
            args.frequencies = frequencies_k.p, args.out = out.p, args.shape = shape, args.B = B, args.n = n;
            args.capacity = capacity;
            variant_decode(args, 0);
            CUDA_CHECK(cudaDeviceSynchronize());
        }
        std::vector<floatX> got = out.read(0, out.n);
        error = fmax(error, relative_error(got, want));
        for (size_t i = want.size(); i < got.size(); i++) written += (float)got[i] == (float)got[i];
        if (run > 0) same = !memcmp(first.data(), got.data(), got.size() * sizeof(floatX));
        first.swap(got);
    }
    for (unsigned char x : cache.read(B * sequence_bytes, LayerData::GUARD)) written += x != 0xff;
    // e4m3: a number is off by 2.6% on average, a product of three by less than 8%
    const double tolerance = number_bytes == E4M3_BYTES ? 0.08 : 1.2e-2;
    report(score, error <= tolerance && same && written == 0, "%s %s%s B%d n%d NH%d HS%d R%d,%d,%d: error %.1e%s%s",
           attn_name(s.attn), words, number_bytes == E4M3_BYTES ? " e4m3" : "", B, n, NH, HS, m.q.R, m.k.R, m.v.R,
           error, same ? "" : ", second run differs", written ? ", wrote past the end" : "");
}

// Variants and switches, and combinations of them.
static const struct { AttnKind attn; const char *words; } checked_variants[] = {
    {ATTN_TPA, "head_act=sigmoid"}, {ATTN_TPA, "head_act=softmax"}, {ATTN_TPA, "kv_shift"}, {ATTN_TPA, "qk_norm"},
    {ATTN_TPA, "a_constant"}, {ATTN_TPA, "b_constant"}, {ATTN_TPA, "share_kv_b"}, {ATTN_TPA, "b_dim=16"},
    {ATTN_TPA_KVONLY, "a_constant qk_norm"}, {ATTN_TPA_KVONLY, "b_dim=8 kv_shift"},
    {ATTN_TPA, "share_kv_b head_act=sigmoid kv_shift qk_norm"}, {ATTN_TPA, "b_dim=32 qk_norm kv_shift share_kv_b"},
    {ATTN_TPA, "b_constant qk_norm head_act=softmax"}, {ATTN_TPA, "a_constant share_kv_b kv_shift qk_norm"},
    {ATTN_MHA, "kv_shift qk_norm"}, {ATTN_GQA, "qk_norm"}, {ATTN_MQA, "kv_shift"}};
enum { CHECKED_VARIANTS = sizeof checked_variants / sizeof *checked_variants };

static void check_all(Score *score, bool quick) {
    uint64_t seed = 1;
    const std::vector<Cut> cuts = {{1, 1, 0}, {1, 2, 0}, {2, 1, 0}, {1, 4, 0}, {4, 1, 0}, {1, 8, 0}, {2, 4, 0},
                                   {8, 1, 0}, {16, 2, 0}, {0, 0, 1}, {0, 0, 0}};
    const int one_query = 1, room = 40;
    auto run = [&](const LayerShape &shape, const std::vector<int32_t> &totals, int n, int number_bytes) {
        std::vector<int32_t> lengths;
        for (int32_t total : totals) lengths.push_back(total > n ? total - n : 0);
        Layer l(shape, lengths, n, room);
        check_layer(score, l, number_bytes, cuts, seed++, FAST_AND_PLAIN);
    };
    const std::vector<int32_t> totals = {1, 2, 127, 128, 129, 4097};
    for (int NH : {1, 5, 32, 34, 47, 61, 78, 128})
        for (int RK = 1; RK <= 4; RK++)
            for (int RV = 1; RV <= 4; RV++) {
                if (quick && (RK + RV + NH) % 7) continue;
                run({ATTN_TPA, NH, 64, 1 + (RK * 5 + RV * 3 + NH) % 16, RK, RV}, totals, one_query, BF16_BYTES);
                if (quick || (RK + RV) % 3 == 0)
                    run({ATTN_TPA, NH, 128, 6, RK, RV}, {129, 1, 500}, one_query, BF16_BYTES);
                if (quick || (RK + RV) % 2 == 0)
                    run({ATTN_TPA, NH, RK % 2 ? 64 : 128, 16, RK, RV}, {1, 300, 17}, one_query, E4M3_BYTES);
            }
    for (int n : {2, 3, 5, 8, 16})
        for (int bytes : {E4M3_BYTES, BF16_BYTES}) {
            run({ATTN_TPA, 34, 64, 6, 2, 2}, {16, 17, 40, 300}, n, bytes);
            run({ATTN_TPA, 5, 128, 3, 1, 2}, {33, 20}, n, bytes);
            run({ATTN_TPA, 78, 64, 6, 2, 2}, {16, 1000}, n, bytes);
            run({ATTN_MHA, 12, 64, 1, 12, 1}, {16, 17, 300}, n, bytes);
            run({ATTN_MQA, 23, 64, 1, 1, 1}, {20, 70}, n, bytes);
        }
    std::vector<int32_t> ragged;                    // a full batch
    for (int b = 0; b < 256; b++) ragged.push_back(1 + (b * 37) % 90);
    for (int bytes : {E4M3_BYTES, BF16_BYTES}) {
        run({ATTN_TPA_KVONLY, 22, 64, 1, 2, 2}, totals, one_query, bytes);
        run({ATTN_MHA, 34, 64, 1, 34, 1}, {1, 100, 2000}, one_query, bytes);
        run({ATTN_GQA, 32, 64, 1, 4, 1}, totals, one_query, bytes);
        run({ATTN_GQA, 6, 128, 1, 3, 1}, totals, one_query, bytes);
        run({ATTN_MQA, 128, 64, 1, 1, 1}, totals, one_query, bytes);
        run({ATTN_TPA, 34, 64, 6, 2, 2}, ragged, one_query, bytes);
    }
    for (const auto &x : checked_variants)
        for (int bytes : {E4M3_BYTES, BF16_BYTES}) {
            const bool dense = x.attn > ATTN_TPA_KVONLY;
            LayerShape shape = {x.attn, 6, 64, 6, 2, 2};
            if (dense) shape.RK = shape.RV = x.attn == ATTN_MHA ? 6 : x.attn == ATTN_GQA ? 2 : 1;
            for (int n : {1, 5}) check_variant(score, shape, x.words, {0, 1, 300, 40}, n, bytes, seed += 10);
        }
    const struct { int NH, HSV, kv, rotated; } latents[] = {{32, 16, 256, 32}, {12, 16, 256, 32}, {23, 8, 512, 32},
                                                            {49, 8, 512, 32}, {3, 24, 32, 16}, {5, 8, 72, 8}};
    for (const auto &x : latents)
        for (int n : {1, 3, 16})
            for (int bytes : {E4M3_BYTES, BF16_BYTES}) {
                if (quick && (x.NH + n + bytes) % 2) continue;
                LatentLayer l(x.NH, x.HSV, 48, x.kv, x.rotated);
                check_latent(score, l, {0, 1, 15, 16, 300, quick ? 40 : 2000}, n, room, bytes, cuts, seed++,
                             FAST_AND_PLAIN);
            }
}

// ---------------------------------------------------------------------------------------------------------------------
// Time

// Version 0's first step: k and v of all heads, from pages of a TPA cache to pages of an MHA cache. One block: one page
// of one head. dense (B, NH, pages) in shape `to`.
__global__ void rebuild_kernel(unsigned char *dense, CacheShape to, const DecodeArgs args) {
    const CacheShape &shape = args.shape;
    int64_t page = blockIdx.x;
    int head = blockIdx.y, b = blockIdx.z, HS = shape.HSK;
    if (page * PAGE >= args.lengths[b] + args.n) return;
    const unsigned char *from = args.cache + ((int64_t)b * args.pages + page) * cache_page_bytes(shape);
    unsigned char *out = dense + (((int64_t)b * args.NH + head) * args.pages + page) * cache_page_bytes(to);
    for (int i = threadIdx.x; i < PAGE * HS; i += blockDim.x) {
        int t = i / HS, d = i % HS;
        for (int p = 0; p < 2; p++) {
            CachePart part = (CachePart)p;
            int R = part == CACHE_K ? shape.RK : shape.RV;
            float sum = 0;
            for (int r = 0; r < R; r++) {
                const bf16 *weight = (const bf16 *)(from + cache_a(shape, part, r, head, t));
                const bf16 *x = (const bf16 *)(from + cache_b(shape, part, r, t, d));
                sum += (float)*weight * (float)*x;
            }
            *(bf16 *)(out + cache_b(to, part, 0, t, d)) = (bf16)(sum / (float)R);
        }
    }
}

// Microseconds of version 0. args: of the TPA layer; the queries are any numbers, because only time counts here.
static double time_naive(const Layer &l, const DecodeArgs &args, int burst) {
    CacheShape to = {};
    to.streams = l.NH(), to.heads = 1, to.RK = 1, to.RV = 1, to.HSK = to.HSV = l.HS();
    to.scale = args.shape.scale, to.number_bytes = BF16_BYTES;
    Heads dense_q = {};
    dense_q.kind = HEADS_GROUPED, dense_q.R = l.NH(), dense_q.HS = dense_q.HSR = l.HS(), dense_q.scale = 1;
    Array<unsigned char> dense(cache_layer_bytes(to, l.B, l.capacity));
    Scratch scratch(to, dense_q, l.B, l.n, args.cluster, args.splits);
    DecodeArgs dense_args = args;
    dense_args.shape = to, dense_args.q = dense_q, dense_args.cache = dense.p, dense_args.scratch = scratch.p;
    const dim3 grid((unsigned)args.pages, (unsigned)l.NH(), (unsigned)l.B);
    return graph_us(burst, [&](cudaStream_t stream) {
        launch(rebuild_kernel, {grid, 128, 0, stream}, dense.p, to, args);
        flashtpa_decode(dense_args, stream);
    });
}

typedef struct { double us, bytes; } Time;

// Times one version with M tokens cached in each of B sequences.
static Time time_layer(Version version, int B, int M, LayerShape shape, const Cut &cut = {}) {
    if (version < FAST_GROUPED) shape.attn = ATTN_TPA;
    else if (version > FAST_GROUPED) shape.attn = ATTN_MLA;
    else shape.attn = shape.RK == shape.NH ? ATTN_MHA : shape.RK == 1 ? ATTN_MQA : ATTN_GQA;
    const bool e4m3 = version == FAST_E4M3 || version == FAST_LATENT_E4M3;
    const int number_bytes = e4m3 ? E4M3_BYTES : BF16_BYTES, one_query = 1, room = 0;
    Layer l(shape, std::vector<int32_t>(B, M - 1), one_query, room);
    DecodeArgs args = decode_args(l, number_bytes);
    const size_t cache_bytes = cache_layer_bytes(args.shape, B, l.capacity);
    Array<unsigned char> cache(cache_bytes);
    launch(fill_kernel, {1024, 256, 0, 0}, cache.p, cache_bytes, number_bytes, (uint64_t)1);
    Array<floatX> fac((size_t)B * args.Pp, 1, 1);
    Array<floatX> out((size_t)B * l.NH() * (args.shape.latent ? args.shape.HSV : l.HS()));
    Array<int32_t> lengths(l.lengths);
    Scratch scratch(args.shape, args.q, B, one_query, cut.cluster, cut.splits);
    args.cache = cache.p, args.lengths = lengths.p, args.fac = fac.p, args.out = out.p, args.scratch = scratch.p;
    args.cluster = cut.cluster, args.splits = cut.splits, args.min_pages = cut.min_pages;
    const double bytes = logical_bytes(args.shape, (double)B * M);
    const int burst = bytes < 1e8 ? 20 : bytes < 1e9 ? 5 : 1;
    double us;
    if (version == NAIVE) us = time_naive(l, args, burst);
    else if (version == PLAIN) us = graph_us(burst, [&](cudaStream_t stream) { decode_plain(args, stream); });
    else us = graph_us(burst, [&](cudaStream_t stream) { flashtpa_decode(args, stream); });
    return {us, bytes};
}

// The same, printed as a line. read: GB/s.
static void time_one(Version version, int B, int M, const LayerShape &shape, double read, const Cut &cut = {}) {
    const Time time = time_layer(version, B, M, shape, cut);
    const double us = time.us, bytes = time.bytes, gb_per_s = bytes / us / 1e3;
    printf("version %d B%-3d M%-7d NH%d HS%d R%d,%d,%d: %9.1f us  %8.1f MB  %6.0f GB/s  %3.0f%% of %.0f\n",
           (int)version, B, M, shape.NH, shape.HS, shape.RQ, shape.RK, shape.RV, us, bytes / 1e6, gb_per_s,
           100 * gb_per_s / read, read);
    fflush(stdout);
}

// Times the kernel of the variants that have a cache of rows, and prints a line.
static void time_variant(const char *words, int B, int M, double read) {
    const VariantLayer l({ATTN_TPA, 32, 64, 6, 2, 2}, words);
    VariantArgs args = {};
    args.shape = variant_shape(&l.model, BF16_BYTES), args.B = B, args.n = 1, args.capacity = M;
    const size_t bytes = variant_row_bytes(args.shape) * B * M;
    std::vector<double> host_frequencies(args.shape.k.HSR / 2);
    rope_frequencies(host_frequencies.data(), args.shape.k.HSR, l.config.rope_base);
    Array<unsigned char> cache(bytes);
    Array<floatX> fac((size_t)B * args.shape.PFp, 1, 1), layer(l.model.layer_stride, 2, 1), out((size_t)B * 32 * 64);
    Array<int32_t> lengths(std::vector<int32_t>(B, M - 1));
    Array<double> frequencies(host_frequencies);
    launch(fill_kernel, {1024, 256, 0, 0}, cache.p, bytes, (int)BF16_BYTES, (uint64_t)1);
    args.cache = cache.p, args.lengths = lengths.p, args.fac = fac.p, args.layer = layer.p, args.out = out.p;
    args.frequencies = frequencies.p;
    const int one_run = 1;
    const double us = graph_us(one_run, [&](cudaStream_t stream) { variant_decode(args, stream); });
    printf("%-12s B%-3d M%-7d NH32 HS64 R6,2,2: %9.1f us  %8.1f MB  %3.0f%% of %.0f\n", words, B, M, us,
           (double)bytes / 1e6, 100 * (double)bytes / us / 1e3 / read, read);
}

static void time_table(double read) {
    const int HS = 64, first_bit = 12, last_bit = 19;           // 4096 to 524288 tokens
    for (int NH : {32, 34})
        for (int R = 1; R <= 2; R++)
            for (Version version : {FAST, FAST_E4M3})
                for (int B : {1, 8, 16})
                    for (int bit = first_bit; bit <= last_bit; bit++)
                        time_one(version, B, 1 << bit, {ATTN_TPA, NH, HS, R == 1 ? 16 : 6, R, R}, read);
    for (int groups : {32, 4, 1})
        for (int B : {1, 8, 16})
            for (int bit = first_bit; bit <= last_bit; bit++)
                if ((double)B * groups * (1 << bit) * 256 < 4e10)
                    time_one(FAST_GROUPED, B, 1 << bit, {ATTN_GQA, 32, HS, 1, groups, groups}, read);
    for (Version version : {FAST_LATENT, FAST_LATENT_E4M3})
        for (int B : {1, 8, 16})
            for (int bit = first_bit; bit <= last_bit; bit++)
                time_one(version, B, 1 << bit, {ATTN_MLA, 32, HS, 1, 1, 1}, read);
    for (const char *words : {"a_constant", "b_constant", "share_kv_b", "b_dim=16"})
        for (int B : {1, 8}) time_variant(words, B, 1 << 14, read);
    for (Version version : {NAIVE, PLAIN})
        for (int B : {1, 8}) time_one(version, B, 1 << 16, {ATTN_TPA, 32, HS, 16, 1, 1}, read);
}

// The data of the paper's Figure 5: a line per kind, batch and length, with tabs between the columns.
static void time_figure(double read) {
    static const struct { const char *name; Version version; LayerShape shape; } kinds[] = {
        {"TPA 16,1,1", FAST, {ATTN_TPA, 32, 64, 16, 1, 1}}, {"TPA 6,2,2", FAST, {ATTN_TPA, 32, 64, 6, 2, 2}},
        {"MHA", FAST_GROUPED, {ATTN_MHA, 32, 64, 1, 32, 32}}, {"MQA", FAST_GROUPED, {ATTN_MQA, 32, 64, 1, 1, 1}},
        {"GQA-4", FAST_GROUPED, {ATTN_GQA, 32, 64, 1, 4, 4}}, {"MLA", FAST_LATENT, {ATTN_MLA, 32, 64, 1, 1, 1}}};
    const int first_bit = 12, last_bit = 19;
    const double most_bytes = 4e10;
    printf("kind\tB\ttokens\tus\tcache bytes\tGB/s\tshare of %.0f GB/s\n", read);
    for (const auto &kind : kinds)
        for (int B : {1, 8, 16})
            for (int bit = first_bit; bit <= last_bit; bit++) {
                const bool dense = kind.version == FAST_GROUPED;
                if (dense && (double)B * kind.shape.RK * (1 << bit) * 256 >= most_bytes) continue;
                const Time time = time_layer(kind.version, B, 1 << bit, kind.shape);
                const double gb_per_s = time.bytes / time.us / 1e3;
                printf("%s\t%d\t%d\t%.2f\t%.0f\t%.0f\t%.3f\n", kind.name, B, 1 << bit, time.us, time.bytes,
                       gb_per_s, gb_per_s / read);
                fflush(stdout);
            }
}

#ifndef BENCH_NO_MAIN
int main(int argc, char **argv) {
    program_start(argv[0]);
    const bool quick = argc == 2 && !strcmp(argv[1], "quick");
    const bool table = argc == 2 && !strcmp(argv[1], "time"), figure = argc == 2 && !strcmp(argv[1], "figure");
    if (argc == 1 || quick) {
        Score score = {0, 0};
        check_all(&score, quick);
        return finish(&score);
    }
    int x[10] = {};
    for (int i = 1; i < argc && i <= 10; i++) x[i - 1] = atoi(argv[i]);
    if (!table && !figure && (argc < 9 || argc > 11 || x[0] < 0 || x[0] >= NUM_VERSIONS))
        die(EXIT_INPUT, "usage: flashtpa_decode [quick | time | figure | "
                        "VERSION B M NH HS RQ RK RV [cluster [min_pages]]]; VERSION is 0 to %d", (int)NUM_VERSIONS - 1);
    const double read = read_gb_per_s();
    if (figure) return time_figure(read), 0;
    printf("read bandwidth %.0f GB/s\n", read);
    if (table) time_table(read);
    else time_one((Version)x[0], x[1], x[2], {ATTN_TPA, x[3], x[4], x[5], x[6], x[7]}, read, {x[8], 0, x[9]});
    return 0;
}
#endif
