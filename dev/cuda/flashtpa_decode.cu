// FlashTPA decoding: checks and times llmc/flashtpa_decode.cuh over llmc/factor_cache.cuh.
//
//   build/flashtpa_decode                       check: ranks, heads, lengths, ways to cut the work, queries, number types, against CPU loops
//   build/flashtpa_decode quick                 the same, fewer
//   build/flashtpa_decode time                  the table of dev/results/flashtpa.md
//   build/flashtpa_decode VERSION B M NH HS RQ RK RV [cluster [min_pages]]     time one: M tokens cached in each of B sequences
// Versions:
//   0  naive: k and v rebuilt from the cache, then attention over them
//   1  plain: in the space of factors, one block a head, ordinary instructions
//   2  the trainer's: tensor cores, all heads at once, a ring of pages        (bf16 cache)
//   3  the same over an e4m3 cache
//   4  the same over caches of MHA (RK = NH heads), GQA (RK groups) or MQA (RK = 1)
// The read bandwidth that the shares are of is measured at the start. Runs repeat in a graph without a flush between: a cache of less than
// L2's 50 MB comes from there, as in the programs it is compared with.
#include <string>

#include "bench.cuh"
#include "../../llmc/flashtpa_decode.cuh"

typedef std::vector<float> Floats;

// ---------------------------------------------------------------------------------------------------------------------
// A layer: B sequences of their own lengths, n queries each, the last n tokens

struct Layer {
    Config config;
    Model m;
    int B, n;
    std::vector<int32_t> lengths;               // before the queries
    int64_t capacity, rows;                     // tokens; rows of factors of all sequences
    std::vector<int64_t> start;                 // row of each sequence's first token
    Layer(AttnKind attn, int NH, int HS, int RQ, int RK, int RV, std::vector<int32_t> lengths, int n, int64_t room)
        : config{attn, 1, 64, NH, HS, 64, RQ, RK, RV, RK, 0, 10000, 1e-6}, B((int)lengths.size()), n(n), lengths(lengths), rows(0) {
        Error err;
        if (config_check(&config, &err) != 0) die(EXIT_INPUT, "%s", err.text);
        model_init(&m, &config, 8);
        capacity = *std::max_element(lengths.begin(), lengths.end()) + n + room;
        for (int32_t l : lengths) start.push_back(rows), rows += l + n;
    }
    ~Layer() { model_free(&m); }
};

static DecodeArgs decode_args(const Layer &l, int number_bytes) {
    DecodeArgs a = {};
    a.shape = cache_shape(&l.m, number_bytes), a.q = l.m.q, a.B = l.B, a.n = l.n, a.NH = (int)l.config.n_head, a.Pp = (int)l.m.Pp;
    a.pages = cache_pages(l.capacity);
    return a;
}

// Numbers that the cache holds of a token: what an implementation cannot but read.
static double logical_bytes(const CacheShape &s, double tokens) {
    return tokens * s.streams * ((double)(s.RK + s.RV) * (s.factored * s.heads + s.HS) * s.number_bytes + (s.number_bytes == 1 ? 8 : 0));
}

// ---------------------------------------------------------------------------------------------------------------------
// Check

// Element d of head i of q, k or v of a row of factors at a position, in double.
static double head_element(const float *row, const Heads &h, int i, int NH, int HS, int d, const double *frequencies, int64_t position) {
    auto vector = [&](int r) {
        int half = HS / 2, j = d % half;
        double x = row[h.b + r * HS + j], y = row[h.b + r * HS + half + j], c = 1, s = 0;
        if (h.rope) c = cos((double)position * frequencies[j]), s = sin((double)position * frequencies[j]);
        return d < half ? x * c + y * s : y * c - x * s;
    };
    if (h.kind == HEADS_GROUPED) return vector(i / (NH / h.R));
    double sum = 0;
    for (int r = 0; r < h.R; r++) sum += row[h.a + i * h.R + r] * vector(r);
    return h.scale * sum;
}

// How flashtpa_decode is told to cut the work; zeros: it chooses.
struct Cut {
    int cluster, splits, min_pages;
};

// plain: version 1 too.
static bool check_layer(const Layer &l, int number_bytes, std::vector<Cut> cuts, uint64_t seed, bool plain = true) {
    const int NH = (int)l.config.n_head, HS = (int)l.config.head_dim, Pp = (int)l.m.Pp, D = NH * HS;
    DecodeArgs a = decode_args(l, number_bytes);
    const size_t guard = 4096, layer_bytes = cache_layer_bytes(a.shape, l.B, l.capacity);
    std::vector<double> frequencies(HS / 2);
    rope_frequencies(frequencies.data(), HS, l.config.rope_base);
    Array<floatX> fac(l.rows * Pp, seed, 1), queries((size_t)l.B * l.n * Pp), out((size_t)l.B * l.n * D + guard);
    Array<double> d_frequencies(frequencies);
    Array<unsigned char> cache(layer_bytes + guard);        // 0xff: NaN in fp32, bf16 and e4m3
    std::vector<int32_t> zeros(l.B, 0);
    Array<int32_t> d_zeros(zeros), d_lengths(l.lengths);
    const size_t sequence_bytes = layer_bytes / l.B;
    for (int b = 0; b < l.B; b++) {                         // all but the queries as a prompt, the queries behind it
        CacheWrite w = {cache.p + b * sequence_bytes, fac.p + l.start[b] * Pp, d_zeros.p, d_frequencies.p, a.shape, l.m.q, l.m.k, l.m.v,
                        l.lengths[b], Pp, a.pages, 0};
        if (l.lengths[b] > 0) cache_write(w, 1, 0);
        CUDA_CHECK(cudaMemcpy(queries.p + (size_t)b * l.n * Pp, fac.p + (l.start[b] + l.lengths[b]) * Pp, (size_t)l.n * Pp * sizeof(floatX),
                              cudaMemcpyDeviceToDevice));
    }
    CacheWrite w = {cache.p, queries.p, d_lengths.p, d_frequencies.p, a.shape, l.m.q, l.m.k, l.m.v, l.n, Pp, a.pages, 1};
    cache_write(w, l.B, 0);
    a.cache = cache.p, a.lengths = d_lengths.p, a.fac = queries.p, a.out = out.p;

    // the reference: from the factors where the numbers are kept as they are, from the cache's own where they were rounded to e4m3
    std::vector<floatX> host_fac = fac.read(0, fac.n);
    Floats f(host_fac.size());
    for (size_t i = 0; i < f.size(); i++) f[i] = (float)host_fac[i];
    std::vector<unsigned char> pages = cache.read(0, layer_bytes);
    std::vector<double> want((size_t)l.B * l.n * D);
    double rounding = 0, kept = 0;                          // of k in the e4m3 cache
    for (int b = 0; b < l.B; b++) {
        int64_t tokens = l.lengths[b] + l.n;
        #pragma omp parallel for schedule(dynamic) reduction(+:rounding,kept)
        for (int h = 0; h < NH; h++) {
            Floats k(tokens * HS), v(tokens * HS);
            int stream = h / a.shape.heads;
            for (int64_t m = 0; m < tokens; m++) {
                const float *row = &f[(l.start[b] + m) * Pp];
                const unsigned char *page = &pages[b * sequence_bytes + (stream * a.pages + m / PAGE) * cache_page_bytes(a.shape)];
                int t = (int)(m % PAGE);
                if (number_bytes == 1) {
                    for (int p = 0; p < 2; p++) {
                        CachePart part = (CachePart)p;
                        int R = p == CACHE_K ? a.shape.RK : a.shape.RV;
                        float scale;
                        memcpy(&scale, page + cache_scale(a.shape, part, t), 4);
                        for (int r = 0; r < R; r++) {
                            float weight = scale / (float)(a.shape.factored ? R : 1);
                            if (a.shape.factored) weight *= e4m3_to_float(page[cache_a(a.shape, part, r, h % a.shape.heads, t)]);
                            for (int d = 0; d < HS; d++) (p == CACHE_K ? k : v)[m * HS + d] += weight * e4m3_to_float(page[cache_b(a.shape, part, r, t, d)]);
                        }
                    }
                    if (m % 97 == 0)
                        for (int d = 0; d < HS; d++) {
                            double x = head_element(row, l.m.k, h, NH, HS, d, frequencies.data(), m);
                            rounding += pow(k[m * HS + d] - x, 2), kept += x * x;
                        }
                } else {
                    for (int d = 0; d < HS / 2; d++) {      // head_element for both halves, the angle once
                        double c = cos((double)m * frequencies[d]), s = sin((double)m * frequencies[d]), x[2] = {}, y[2] = {};
                        for (int p = 0; p < 2; p++) {
                            const Heads &heads = p == CACHE_K ? l.m.k : l.m.v;
                            for (int r = 0; r < heads.R; r++) {
                                double weight = heads.kind == HEADS_GROUPED ? (h / (NH / heads.R) == r) : heads.scale * row[heads.a + h * heads.R + r];
                                x[p] += weight * row[heads.b + r * HS + d], y[p] += weight * row[heads.b + r * HS + HS / 2 + d];
                            }
                        }
                        k[m * HS + d] = (float)(x[0] * c + y[0] * s), k[m * HS + HS / 2 + d] = (float)(y[0] * c - x[0] * s);
                        v[m * HS + d] = (float)x[1], v[m * HS + HS / 2 + d] = (float)y[1];
                    }
                }
            }
            for (int i = 0; i < l.n; i++) {
                int64_t sees = l.lengths[b] + i + 1;
                Floats q(HS);
                for (int d = 0; d < HS; d++)
                    q[d] = (float)head_element(&f[(l.start[b] + sees - 1) * Pp], l.m.q, h, NH, HS, d, frequencies.data(), sees - 1);
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
                for (int d = 0; d < HS; d++) want[((size_t)(b * l.n + i)) * D + h * HS + d] = o[d] / sum;
            }
        }
    }

    bool good = true;
    double worst = 0;
    std::string bad;
    std::vector<floatX> before;
    for (int version = plain ? 1 : 2; version <= 2; version++)
        for (Cut cut : version == 1 ? std::vector<Cut>{{0, 0, 0}} : cuts) {
            if (cut.cluster > 1 && device_attribute(cudaDevAttrComputeCapabilityMajor) < 9) continue;
            a.cluster = cut.cluster, a.splits = cut.splits, a.min_pages = cut.min_pages;
            Array<float> scratch(decode_scratch_bytes(a.shape, a.q, l.B, l.n, a.cluster, a.splits) / 4 + 1);
            CUDA_CHECK(cudaMemset(scratch.p, 0, scratch.n * 4));
            a.scratch = scratch.p;
            for (int run = 0; run < 2; run++) {
                CUDA_CHECK(cudaMemset(out.p, 0xff, out.n * sizeof(floatX)));
                if (version == 1) decode_plain(a, 0);
                else flashtpa_decode(a, 0);
                CUDA_CHECK(cudaDeviceSynchronize());
                std::vector<floatX> got = out.read(0, out.n);
                double sum = 0, norm = 0, guarded = 0;
                for (size_t i = 0; i < want.size(); i++) {
                    double e = (double)(float)got[i] - want[i];
                    sum += e * e, norm += want[i] * want[i];
                }
                for (size_t i = want.size(); i < got.size(); i++) guarded += (float)got[i] == (float)got[i];    // all NaN still
                double error = sqrt(sum / norm);
                if (!(error <= worst)) worst = error;
                bool same = run == 0 || !memcmp(before.data(), got.data(), got.size() * sizeof(floatX));
                if (!(error <= 1e-2) || guarded > 0 || !same)
                    good = false, bad += " | version " + std::to_string(version) + " cluster " + std::to_string(cut.cluster) + " splits " +
                                         std::to_string(cut.splits) + " min_pages " + std::to_string(cut.min_pages) + " error " + std::to_string(error) +
                                         (guarded > 0 ? " wrote past the end" : "") + (same ? "" : " second run differs");
                before.swap(got);
            }
        }
    std::vector<unsigned char> after = cache.read(layer_bytes, guard);
    for (unsigned char x : after) if (x != 0xff) { good = false, bad += " | cache written past the end"; break; }
    printf("%s %s%s B%d n%d longest %d NH%d HS%d R%d,%d,%d: worst %.1e%s", good ? "ok  " : "BAD ", attn_name(l.config.attn), number_bytes == 1 ? " e4m3" : "",
           l.B, l.n, (int)*std::max_element(l.lengths.begin(), l.lengths.end()), NH, HS, l.m.q.R, l.m.k.R, l.m.v.R, worst, bad.c_str());
    if (number_bytes == 1) printf(" (k rounded by %.1e)", sqrt(rounding / kept));
    printf("\n");
    fflush(stdout);
    return good;
}

static bool check_all(bool quick) {
    bool good = true;
    uint64_t seed = 1;
    const std::vector<Cut> all = {{1, 1, 0}, {1, 2, 0}, {2, 1, 0}, {1, 4, 0}, {4, 1, 0}, {1, 8, 0}, {2, 4, 0}, {8, 1, 0}, {16, 2, 0},
                                  {0, 0, 1}, {0, 0, 0}};
    auto run = [&](AttnKind attn, int NH, int HS, int RQ, int RK, int RV, std::vector<int32_t> totals, int n, int bytes) {
        std::vector<int32_t> lengths;
        for (int32_t x : totals) lengths.push_back(x > n ? x - n : 0);
        Layer l(attn, NH, HS, RQ, RK, RV, lengths, n, 40);
        good &= check_layer(l, bytes, all, seed++);
    };
    const std::vector<int32_t> lengths = {1, 2, 127, 128, 129, 4097};
    for (int NH : {1, 5, 32, 34, 47, 61, 78, 128})
        for (int RK = 1; RK <= 4; RK++)
            for (int RV = 1; RV <= 4; RV++) {
                if (quick && (RK + RV + NH) % 7) continue;
                run(ATTN_TPA, NH, 64, 1 + (RK * 5 + RV * 3 + NH) % 16, RK, RV, lengths, 1, 2);
                if (quick || (RK + RV) % 3 == 0) run(ATTN_TPA, NH, 128, 6, RK, RV, {129, 1, 500}, 1, 2);
                if (quick || (RK + RV) % 2 == 0) run(ATTN_TPA, NH, RK % 2 ? 64 : 128, 16, RK, RV, {1, 300, 17}, 1, 1);
            }
    for (int n : {2, 3, 5, 8, 16})
        for (int bytes = 1; bytes <= 2; bytes++) {
            run(ATTN_TPA, 34, 64, 6, 2, 2, {16, 17, 40, 300}, n, bytes);
            run(ATTN_TPA, 5, 128, 3, 1, 2, {33, 20}, n, bytes);
            run(ATTN_TPA, 78, 64, 6, 2, 2, {16, 1000}, n, bytes);
            run(ATTN_MHA, 12, 64, 1, 12, 1, {16, 17, 300}, n, bytes);
            run(ATTN_MQA, 23, 64, 1, 1, 1, {20, 70}, n, bytes);
        }
    for (int bytes = 1; bytes <= 2; bytes++) {
        run(ATTN_TPA_KVONLY, 22, 64, 1, 2, 2, lengths, 1, bytes);
        run(ATTN_MHA, 34, 64, 1, 34, 1, {1, 100, 2000}, 1, bytes);
        run(ATTN_GQA, 32, 64, 1, 4, 1, lengths, 1, bytes);
        run(ATTN_GQA, 6, 128, 1, 3, 1, lengths, 1, bytes);
        run(ATTN_MQA, 128, 64, 1, 1, 1, lengths, 1, bytes);
        std::vector<int32_t> many;                  // a full batch, ragged
        for (int b = 0; b < 256; b++) many.push_back(1 + (b * 37) % 90);
        run(ATTN_TPA, 34, 64, 6, 2, 2, many, 1, bytes);
    }
    return good;
}

// ---------------------------------------------------------------------------------------------------------------------
// Time

// A page's k and v of all heads, into pages of an MHA cache: what version 0 does first.
__global__ void rebuild_kernel(unsigned char *dense, CacheShape to, const DecodeArgs a) {
    int64_t page = blockIdx.x;
    int head = blockIdx.y, b = blockIdx.z, HS = a.shape.HS;
    if (page * PAGE >= a.lengths[b] + a.n) return;
    const unsigned char *from = a.cache + ((int64_t)b * a.pages + page) * cache_page_bytes(a.shape);
    unsigned char *at = dense + (((int64_t)b * a.NH + head) * a.pages + page) * cache_page_bytes(to);
    for (int i = threadIdx.x; i < PAGE * HS; i += blockDim.x) {
        int t = i / HS, d = i % HS;
        for (int p = 0; p < 2; p++) {
            CachePart part = (CachePart)p;
            int R = p == CACHE_K ? a.shape.RK : a.shape.RV;
            float sum = 0;
            for (int r = 0; r < R; r++)
                sum += (float)*(const bf16 *)(from + cache_a(a.shape, part, r, head, t)) * (float)*(const bf16 *)(from + cache_b(a.shape, part, r, t, d));
            *(bf16 *)(at + cache_b(to, part, 0, t, d)) = (bf16)(sum / (float)R);
        }
    }
}

static double time_one(int version, int B, int M, int NH, int HS, int RQ, int RK, int RV, double read, int cluster = 0, int min_pages = 0) {
    AttnKind kind = version < 4 ? ATTN_TPA : RK == NH ? ATTN_MHA : RK == 1 ? ATTN_MQA : ATTN_GQA;
    int bytes = version == 3 ? 1 : 2;
    Layer l(kind, NH, HS, RQ, RK, RV, std::vector<int32_t>(B, M - 1), 1, 0);
    DecodeArgs a = decode_args(l, bytes);
    size_t layer = cache_layer_bytes(a.shape, B, l.capacity);
    Array<unsigned char> cache(layer);
    launch(fill_kernel, {1024, 256, 0, 0}, cache.p, layer, bytes, (uint64_t)1);
    Array<floatX> fac((size_t)B * l.m.Pp, 1, 1), out((size_t)B * NH * HS);
    Array<int32_t> lengths(l.lengths);
    Array<float> scratch(decode_scratch_bytes(a.shape, a.q, B, 1, cluster) / 4 + 1);
    CUDA_CHECK(cudaMemset(scratch.p, 0, scratch.n * 4));
    a.cache = cache.p, a.lengths = lengths.p, a.fac = fac.p, a.out = out.p, a.scratch = scratch.p, a.cluster = cluster, a.min_pages = min_pages;
    double us, logical = logical_bytes(a.shape, (double)B * M);
    int burst = logical < 1e8 ? 20 : logical < 1e9 ? 5 : 1;
    if (version == 0) {
        CacheShape to = {NH, 1, 1, 1, HS, 0, 2};
        Heads dense_q = {HEADS_GROUPED, NH, 1, 0, 0, 1};
        Array<unsigned char> dense(cache_layer_bytes(to, B, l.capacity));
        Array<float> scratch2(decode_scratch_bytes(to, dense_q, B, 1, cluster) / 4 + 1);
        CUDA_CHECK(cudaMemset(scratch2.p, 0, scratch2.n * 4));
        DecodeArgs d = a;
        d.shape = to, d.q = dense_q, d.cache = dense.p, d.scratch = scratch2.p;     // some q: only the time counts here
        us = graph_us(burst, [&](cudaStream_t s) {
            launch(rebuild_kernel, {dim3((unsigned)a.pages, (unsigned)NH, (unsigned)B), 128, 0, s}, dense.p, to, a);
            flashtpa_decode(d, s);
        });
    } else if (version == 1) us = graph_us(burst, [&](cudaStream_t s) { decode_plain(a, s); });
    else us = graph_us(burst, [&](cudaStream_t s) { flashtpa_decode(a, s); });
    double gb = logical / us / 1e3;
    printf("version %d B%-3d M%-7d NH%d HS%d R%d,%d,%d: %9.1f us  %8.1f MB  %6.0f GB/s  %3.0f%% of %.0f\n", version, B, M, NH, HS, RQ, RK, RV, us, logical / 1e6, gb,
           100 * gb / read, read);
    fflush(stdout);
    return us;
}

#ifndef BENCH_NO_MAIN
int main(int argc, char **argv) {
    set_program_name(argv[0]);
    bool quick = argc == 2 && !strcmp(argv[1], "quick"), table = argc == 2 && !strcmp(argv[1], "time");
    if (argc == 1 || quick) {
        bool good = check_all(quick);
        puts(good ? "all right" : "NOT RIGHT");
        return !good;
    }
    double read = read_gb_per_s();
    printf("read bandwidth %.0f GB/s\n", read);
    if (table) {
        for (int NH : {32, 34})
            for (int ranks = 1; ranks <= 2; ranks++)
                for (int version = 2; version <= 3; version++)
                    for (int B : {1, 8, 16})
                        for (int bits = 12; bits <= 19; bits++) time_one(version, B, 1 << bits, NH, 64, ranks == 1 ? 16 : 6, ranks, ranks, read);
        for (int groups : {32, 4, 1})
            for (int B : {1, 8, 16})
                for (int bits = 12; bits <= 19; bits++)
                    if ((double)B * groups * (1 << bits) * 256 < 4e10) time_one(4, B, 1 << bits, 32, 64, 1, groups, groups, read);
        for (int version = 0; version < 2; version++)
            for (int B : {1, 8}) time_one(version, B, 1 << 16, 32, 64, 16, 1, 1, read);
    } else {
        if (argc < 9) die(EXIT_INPUT, "usage: flashtpa_decode [quick | time | VERSION B M NH HS RQ RK RV [cluster [min_pages]]]");
        time_one(atoi(argv[1]), atoi(argv[2]), atoi(argv[3]), atoi(argv[4]), atoi(argv[5]), atoi(argv[6]), atoi(argv[7]), atoi(argv[8]), read,
                 argc > 9 ? atoi(argv[9]) : 0, argc > 10 ? atoi(argv[10]) : 0);
    }
    return 0;
}
#endif
