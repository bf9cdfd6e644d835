// FlashTPA decoding: checks and times llmc/flashtpa_decode.cuh over llmc/factor_cache.cuh.
//
//   build/flashtpa_decode             check against CPU loops: ranks, heads, lengths, queries, cuts of the work, e4m3
//   build/flashtpa_decode quick       fewer checks
//   build/flashtpa_decode time        the table of dev/results/flashtpa.md
//   build/flashtpa_decode VERSION B M NH HS RQ RK RV [cluster [min_pages]]     time one, M tokens cached per sequence
//
// Versions:
//   0  naive: rebuild k and v from the cache, then attention over them
//   1  plain: in factor space, one block per head, no tensor cores
//   2  the trainer's: tensor cores, all heads at once, rings of pages      (bf16 cache)
//   3  version 2 over an e4m3 cache
//   4  version 2 over the cache of MHA (RK = NH heads), GQA (RK groups) or MQA (RK = 1)
//
// Shares are of the read bandwidth, measured at the start. Runs repeat in a graph without a flush in between: a cache
// that fits L2 (50 MB) is read from there, as in the programs this is compared with.
#include <string>

#include "bench.cuh"
#include "../../llmc/flashtpa_decode.cuh"
#include "../../test/testing.h"

typedef std::vector<float> Floats;

enum Version { NAIVE, PLAIN, FAST, FAST_E4M3, FAST_GROUPED, NUM_VERSIONS };
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
    args.shape = cache_shape(&l.model, number_bytes), args.q = l.model.q;
    args.B = l.B, args.n = l.n, args.NH = l.NH(), args.Pp = l.Pp();
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

// Runs one version twice. Adds to *bad what is wrong, and keeps the largest error in *worst.
static void check_version(Version version, const Cut &cut, DecodeArgs args, LayerData *data,
                          const std::vector<double> &want, double *worst, std::string *bad) {
    args.cluster = cut.cluster, args.splits = cut.splits, args.min_pages = cut.min_pages;
    Scratch scratch(args.shape, args.q, args.B, args.n, cut.cluster, cut.splits);
    args.scratch = scratch.p;
    std::vector<floatX> first;
    for (int run = 0; run < 2; run++) {
        CUDA_CHECK(cudaMemset(data->out.p, 0xff, data->out.n * sizeof(floatX)));
        if (version == PLAIN) decode_plain(args, 0);
        else flashtpa_decode(args, 0);
        CUDA_CHECK(cudaDeviceSynchronize());
        std::vector<floatX> got = data->out.read(0, data->out.n);
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
    args.cache = data.cache.p, args.lengths = data.lengths.p, args.fac = data.queries.p, args.out = data.out.p;
    double k_rounding, worst = 0;
    const std::vector<double> want = reference(l, args, data, &k_rounding);
    std::string bad;
    const Cut automatic = {};
    if (versions == FAST_AND_PLAIN) check_version(PLAIN, automatic, args, &data, want, &worst, &bad);
    const bool has_clusters = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
    for (const Cut &cut : cuts)
        if (cut.cluster <= 1 || has_clusters) check_version(FAST, cut, args, &data, want, &worst, &bad);
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

// Times one version with M tokens cached in each of B sequences, and prints a line. read: GB/s.
static void time_one(Version version, int B, int M, LayerShape shape, double read, const Cut &cut = {}) {
    if (version < FAST_GROUPED) shape.attn = ATTN_TPA;
    else shape.attn = shape.RK == shape.NH ? ATTN_MHA : shape.RK == 1 ? ATTN_MQA : ATTN_GQA;
    const int number_bytes = version == FAST_E4M3 ? E4M3_BYTES : BF16_BYTES, one_query = 1, room = 0;
    Layer l(shape, std::vector<int32_t>(B, M - 1), one_query, room);
    DecodeArgs args = decode_args(l, number_bytes);
    const size_t cache_bytes = cache_layer_bytes(args.shape, B, l.capacity);
    Array<unsigned char> cache(cache_bytes);
    launch(fill_kernel, {1024, 256, 0, 0}, cache.p, cache_bytes, number_bytes, (uint64_t)1);
    Array<floatX> fac((size_t)B * l.Pp(), 1, 1), out((size_t)B * l.D());
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
    const double gb_per_s = bytes / us / 1e3;
    printf("version %d B%-3d M%-7d NH%d HS%d R%d,%d,%d: %9.1f us  %8.1f MB  %6.0f GB/s  %3.0f%% of %.0f\n",
           (int)version, B, M, shape.NH, shape.HS, shape.RQ, shape.RK, shape.RV, us, bytes / 1e6, gb_per_s,
           100 * gb_per_s / read, read);
    fflush(stdout);
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
    for (Version version : {NAIVE, PLAIN})
        for (int B : {1, 8}) time_one(version, B, 1 << 16, {ATTN_TPA, 32, HS, 16, 1, 1}, read);
}

#ifndef BENCH_NO_MAIN
int main(int argc, char **argv) {
    program_start(argv[0]);
    const bool quick = argc == 2 && !strcmp(argv[1], "quick"), table = argc == 2 && !strcmp(argv[1], "time");
    if (argc == 1 || quick) {
        Score score = {0, 0};
        check_all(&score, quick);
        return finish(&score);
    }
    int x[10] = {};
    for (int i = 1; i < argc && i <= 10; i++) x[i - 1] = atoi(argv[i]);
    if (!table && (argc < 9 || argc > 11 || x[0] < 0 || x[0] >= NUM_VERSIONS))
        die(EXIT_INPUT, "usage: flashtpa_decode [quick | time | VERSION B M NH HS RQ RK RV [cluster [min_pages]]]; "
                        "VERSION is 0 to %d", (int)NUM_VERSIONS - 1);
    const double read = read_gb_per_s();
    printf("read bandwidth %.0f GB/s\n", read);
    if (table) time_table(read);
    else time_one((Version)x[0], x[1], x[2], {ATTN_TPA, x[3], x[4], x[5], x[6], x[7]}, read, {x[8], 0, x[9]});
    return 0;
}
#endif
