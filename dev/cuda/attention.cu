// Causal attention: checks and times llmc/attention.cuh.
//
//   make build/attention
//   build/attention                                    check all versions over a sweep of shapes
//   build/attention VERSION B NH T HSK [NKV [gated]]   check one shape (the first and the last head), then time it
//
// Value heads have size 64 with HSK 64 and 96, and 128 with HSK 128.
//
// Versions, with milliseconds forward and backward at 24 34 1024 64 on one H200:
//   1  mma.sync and cp.async: runs on sm_80 and up                                              0.565  1.793
//   2  the best the code was compiled for: wgmma and bulk copies on sm_90a, else the same as 1  0.267  0.745
// dev/results/attention.md has the tables (and a build line with a faster CPU reference), dev/LOG.md what did not help.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "attention.cuh"
#include "../../test/testing.h"

#define CEILING_TFLOPS 790.0        // bf16 matrix product (8192^3, random data), measured on one H200
#define CLOCK_GHZ 1.72              // under this load
#define TOLERANCE 1e-2              // ||ours - reference|| / ||reference||; bf16 rounding of p, ds, results: about 3e-3

typedef std::vector<bf16> Host;
typedef std::vector<float> Floats;

// ---------------------------------------------------------------------------------------------------------------------
// Tensors on both sides. q, k, v are columns of one tensor (B, T, NH HSK + 2 NKV HSV) if `fused`, else one after the
// other; the part of k that all heads share follows, with room for each head's gradient. The gate is the second half of
// rows of 2 NH HSV.

enum Gating { PLAIN, GATED };

struct Problem {
    AttentionShape s;
    Gating gating;
    Host qkv, dout, gate;
    bf16 *d_qkv, *d_dout, *d_out, *d_dqkv, *d_gate;     // on the device; GUARD bytes follow each output
    float *d_lse, *d_scratch;
    size_t out_size, lse_size;                          // elements
    int64_t k_at, v_at, shared_at, gate_at;             // where k, v and k's shared part begin in qkv, and gates in
                                                        // their rows
};
constexpr size_t GUARD = 4096;

template <class T>
T *device_alloc(size_t bytes) {
    void *p;
    CUDA_CHECK(cudaMalloc(&p, bytes + GUARD));
    CUDA_CHECK(cudaMemset(p, 0xff, bytes + GUARD));     // NaN, as bf16 and as float
    return (T *)p;
}

Problem make_problem(int B, int NH, int T, int HSK, int NKV, Gating gating, bool fused, float loudness,
                     unsigned seed) {
    Problem p;
    int64_t N = (int64_t)B * T, HSV = HSK == 96 ? 64 : HSK, q = NH * HSK, k = NKV * HSV, v = NKV * HSV, all = q + k + v;
    p.gating = gating;
    p.s = attention_dense_shape(B, T, NH, NKV, HSK, HSV);
    if (fused) p.s.q_stride = p.s.k_stride = p.s.v_stride = all;
    p.k_at = fused ? q : N * q, p.v_at = fused ? q + k : N * (q + k), p.shared_at = N * all;
    p.s.gate_stride = 2 * NH * HSV, p.gate_at = NH * HSV;
    p.out_size = N * NH * HSV, p.lse_size = N * NH;
    p.qkv.resize(N * (all + NKV * (HSK - HSV))), p.dout.resize(p.out_size);
    p.gate.resize(gating == GATED ? 2 * p.out_size : 0);
    #pragma omp parallel
    {
        #pragma omp for
        for (int64_t chunk = 0; chunk < 64; chunk++) {
            std::mt19937 random(seed * 1000003 + chunk);
            std::normal_distribution<float> normal;
            auto fill = [&](Host &x, float scale) {
                size_t end = x.size() * (chunk + 1) / 64;
                for (size_t i = x.size() * chunk / 64; i < end; i++) x[i] = __float2bfloat16(normal(random) * scale);
            };
            fill(p.qkv, loudness), fill(p.dout, 1), fill(p.gate, 2);
        }
    }
    p.d_qkv = device_alloc<bf16>(p.qkv.size() * 2), p.d_dqkv = device_alloc<bf16>(p.qkv.size() * 2);
    p.d_dout = device_alloc<bf16>(p.out_size * 2), p.d_out = device_alloc<bf16>(p.out_size * 2);
    p.d_gate = device_alloc<bf16>(p.gate.size() * 2);
    p.d_lse = device_alloc<float>(p.lse_size * 4);
    p.d_scratch = device_alloc<float>(attention_backward_scratch_bytes(p.s));
    CUDA_CHECK(cudaMemcpy(p.d_qkv, p.qkv.data(), p.qkv.size() * 2, cudaMemcpyHostToDevice));
    return p;
}

// What the backward pass overwrites with a gate.
void upload_gradient(Problem &p) {
    CUDA_CHECK(cudaMemcpy(p.d_dout, p.dout.data(), p.dout.size() * 2, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(p.d_gate, p.gate.data(), p.gate.size() * 2, cudaMemcpyHostToDevice));
}

void free_problem(Problem &p) {
    void *all[] = {p.d_qkv, p.d_dout, p.d_out, p.d_dqkv, p.d_gate, p.d_lse, p.d_scratch};
    for (void *x : all) CUDA_CHECK(cudaFree(x));
}

bf16 *gate_of(const Problem &p) { return p.gating == GATED ? p.d_gate + p.gate_at : NULL; }

AttentionHeads<bf16> heads_in(const Problem &p, bf16 *qkv) {
    return {qkv, qkv + p.k_at, qkv + p.v_at, p.s.HSK > p.s.HSV ? qkv + p.shared_at : NULL};
}

void run_forward(int version, Problem &p) {
    auto f = version == 1 ? attention_forward<ATTENTION_MMA_SYNC> : attention_forward<ATTENTION_BEST>;
    f(p.d_out, p.d_lse, heads_in(p, p.d_qkv), gate_of(p), p.s, 0);
}

void run_backward(int version, Problem &p) {
    auto f = version == 1 ? attention_backward<ATTENTION_MMA_SYNC> : attention_backward<ATTENTION_BEST>;
    f(heads_in(p, p.d_dqkv), gate_of(p), p.d_dout, p.d_out, p.d_lse, heads_in(p, p.d_qkv), gate_of(p), p.d_scratch, p.s,
      0);
}

// ---------------------------------------------------------------------------------------------------------------------
// CPU reference for one key/value head and the query heads that share it. The backward pass takes the GPU's out and,
// after the gate, its dout.

struct HeadReference {
    Floats out, lse, dq;    // (sharing, T, HSV), (sharing, T), (sharing, T, HSK)
    Floats dk, dv;          // (T, HSK), (T, HSV)
    Floats dout, dgate;     // (sharing, T, HSV); dout after the gate
};

float dot(const float *a, const float *b, int n) {
    float x = 0;
    for (int i = 0; i < n; i++) x += a[i] * b[i];
    return x;
}

void add_scaled(float *to, float a, const float *x, int n) { for (int i = 0; i < n; i++) to[i] += a * x[i]; }

// One head of sequence b as floats, (T, HS).
Floats head_of(const bf16 *x, int T, int HS, int64_t stride, int b, int head) {
    Floats y((size_t)T * HS);
    for (int t = 0; t < T; t++)
        for (int i = 0; i < HS; i++)
            y[(size_t)t * HS + i] = __bfloat162float(x[((int64_t)b * T + t) * stride + head * HS + i]);
    return y;
}

// A key head: its own numbers, and those that all heads share, in rows of `heads` times as many.
Floats key_of(const Problem &p, const bf16 *qkv, int b, int head, int heads, int shared_head) {
    const AttentionShape &s = p.s;
    int rest = s.HSK - s.HSV;
    Floats own = head_of(qkv + p.k_at, s.T, s.HSV, s.k_stride, b, head), key;
    Floats shared = head_of(qkv + p.shared_at, s.T, rest, heads * rest, b, shared_head);
    for (int t = 0; t < s.T; t++) {
        key.insert(key.end(), own.begin() + t * s.HSV, own.begin() + (t + 1) * s.HSV);
        key.insert(key.end(), shared.begin() + t * rest, shared.begin() + (t + 1) * rest);
    }
    return key;
}

HeadReference reference(const Problem &p, const Host &given_out, const Host &given_dout, int b, int kv_head) {
    const AttentionShape &s = p.s;
    int T = s.T, HSK = s.HSK, HSV = s.HSV, sharing = s.NH / s.NKV;
    size_t k_size = (size_t)T * HSK, v_size = (size_t)T * HSV;
    HeadReference r = {Floats(sharing * v_size), Floats((size_t)sharing * T), Floats(sharing * k_size),
                       Floats(k_size), Floats(v_size), Floats(sharing * v_size), Floats(sharing * v_size)};
    Floats k = key_of(p, p.qkv.data(), b, kv_head, 1, 0);
    Floats v = head_of(p.qkv.data() + p.v_at, T, HSV, s.v_stride, b, kv_head);
    float unit = 1 / sqrtf((float)HSK);
    for (int g = 0; g < sharing; g++) {
        int head = kv_head * sharing + g;
        Floats q = head_of(p.qkv.data(), T, HSK, s.q_stride, b, head);
        Floats dout = head_of(p.dout.data(), T, HSV, (int64_t)s.NH * HSV, b, head);
        Floats given = head_of(given_out.data(), T, HSV, (int64_t)s.NH * HSV, b, head), delta(T);
        Floats sigmoid(v_size, 1), after = head_of(given_dout.data(), T, HSV, (int64_t)s.NH * HSV, b, head);
        if (p.gating == GATED) {
            sigmoid = head_of(p.gate.data() + p.gate_at, T, HSV, s.gate_stride, b, head);
            for (float &x : sigmoid) x = 1 / (1 + expf(-x));
        }
        float *out = &r.out[g * v_size], *lse = &r.lse[(size_t)g * T], *dq = &r.dq[g * k_size];
        #pragma omp parallel for schedule(dynamic, 8)
        for (int i = 0; i < T; i++) {
            Floats score(i + 1);
            float top = -INFINITY;
            for (int j = 0; j <= i; j++) {
                score[j] = dot(&q[(size_t)i * HSK], &k[(size_t)j * HSK], HSK) * unit;
                top = fmaxf(top, score[j]);
            }
            double sum = 0;
            for (int j = 0; j <= i; j++) sum += expf(score[j] - top);
            lse[i] = top + (float)log(sum);
            delta[i] = dot(&dout[(size_t)i * HSV], &given[(size_t)i * HSV], HSV);
            for (size_t n = (size_t)i * HSV; n < (size_t)(i + 1) * HSV; n++) {
                r.dgate[g * v_size + n] = dout[n] * given[n] * (1 - sigmoid[n]);
                r.dout[g * v_size + n] = dout[n] * sigmoid[n];
                dout[n] = after[n];
            }
            for (int j = 0; j <= i; j++) {
                float prob = expf(score[j] - lse[i]);
                add_scaled(out + (size_t)i * HSV, prob, &v[(size_t)j * HSV], HSV);
                float ds = prob * (dot(&dout[(size_t)i * HSV], &v[(size_t)j * HSV], HSV) - delta[i]);
                add_scaled(dq + (size_t)i * HSK, ds * unit, &k[(size_t)j * HSK], HSK);
            }
            for (int n = 0; n < HSV; n++) out[(size_t)i * HSV + n] *= sigmoid[(size_t)i * HSV + n];
        }
        #pragma omp parallel for schedule(dynamic, 8)
        for (int j = 0; j < T; j++)
            for (int i = j; i < T; i++) {
                float prob = expf(dot(&q[(size_t)i * HSK], &k[(size_t)j * HSK], HSK) * unit - lse[i]);
                float ds = prob * (dot(&dout[(size_t)i * HSV], &v[(size_t)j * HSV], HSV) - delta[i]);
                add_scaled(&r.dv[(size_t)j * HSV], prob, &dout[(size_t)i * HSV], HSV);
                add_scaled(&r.dk[(size_t)j * HSK], ds * unit, &q[(size_t)i * HSK], HSK);
            }
    }
    return r;
}

// ---------------------------------------------------------------------------------------------------------------------
// Check

struct Difference {     // of one tensor, over all compared elements
    const char *name;
    double error = 0, norm = 0, worst = 0;
    long nans = 0, count = 0;
    void add(double ours, double wanted) {
        if (!std::isfinite(ours)) nans++;
        else error += (ours - wanted) * (ours - wanted), worst = std::max(worst, fabs(ours - wanted));
        norm += wanted * wanted, count++;
    }
    // Where the result is zero but for rounding (dq and dk at T = 1), it is measured against 1e-3 per element.
    double relative() const { return sqrt(error / std::max(norm, 1e-6 * count)); }
    bool good() const { return nans == 0 && relative() < TOLERANCE; }
};

// Downloads n elements and checks that the guard after them is untouched.
template <class T>
std::vector<T> download(const T *d, size_t n, bool &guarded) {
    std::vector<T> x(n + GUARD / sizeof(T));
    CUDA_CHECK(cudaMemcpy(x.data(), d, x.size() * sizeof(T), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < GUARD; i++) guarded &= ((const unsigned char *)(x.data() + n))[i] == 0xff;
    x.resize(n);
    return x;
}

void check(Score *score, int version, Problem &p, bool all_heads) {
    const AttentionShape &s = p.s;
    bool guarded = true, same = true;
    Host out, dqkv, dout, dgate;
    Floats lse;
    for (int run = 0; run < 2; run++) {         // twice, each into poisoned outputs
        CUDA_CHECK(cudaMemset(p.d_out, 0xff, p.out_size * 2));
        CUDA_CHECK(cudaMemset(p.d_lse, 0xff, p.lse_size * 4));
        CUDA_CHECK(cudaMemset(p.d_dqkv, 0xff, p.qkv.size() * 2));
        CUDA_CHECK(cudaMemset(p.d_scratch, 0xff, attention_backward_scratch_bytes(s)));
        upload_gradient(p);
        run_forward(version, p);
        run_backward(version, p);
        CUDA_CHECK(cudaDeviceSynchronize());
        auto keep = [&](auto &x, const auto &now) {
            if (run == 1) same &= !memcmp(x.data(), now.data(), x.size() * sizeof x[0]);
            x = now;
        };
        keep(out, download(p.d_out, p.out_size, guarded)), keep(dqkv, download(p.d_dqkv, p.qkv.size(), guarded));
        keep(dout, download(p.d_dout, p.out_size, guarded)), keep(dgate, download(p.d_gate, p.gate.size(), guarded));
        keep(lse, download(p.d_lse, p.lse_size, guarded));
    }
    download(p.d_scratch, attention_backward_scratch_bytes(s) / 4, guarded);
    // the other columns of the gate's rows
    for (size_t i = 0; i < dgate.size(); i++)
        if ((int64_t)i % s.gate_stride < p.gate_at) guarded &= !memcmp(&dgate[i], &p.gate[i], sizeof(bf16));

    Difference d[7] = {{"out"}, {"lse"}, {"dq"}, {"dk"}, {"dv"}, {"dout"}, {"dgate"}};
    int tensors = p.gating == GATED ? 7 : 5;
    long unwritten = 0;
    for (bf16 x : out) unwritten += std::isnan(__bfloat162float(x));
    for (bf16 x : dqkv) unwritten += std::isnan(__bfloat162float(x));
    for (float x : lse) unwritten += std::isnan(x);
    int sharing = s.NH / s.NKV;
    size_t k_size = (size_t)s.T * s.HSK, v_size = (size_t)s.T * s.HSV;
    int64_t out_stride = (int64_t)s.NH * s.HSV;
    for (int b = 0; b < s.B; b++)
        for (int kv = 0; kv < s.NKV; kv++) {
            if (!all_heads && !(b == 0 && kv == 0) && !(b == s.B - 1 && kv == s.NKV - 1)) continue;
            HeadReference r = reference(p, out, dout, b, kv);
            auto compare = [&](Difference &diff, const Floats &ours, const float *wanted) {
                for (size_t i = 0; i < ours.size(); i++) diff.add(ours[i], wanted[i]);
            };
            for (int g = 0; g < sharing; g++) {
                int head = kv * sharing + g;
                compare(d[0], head_of(out.data(), s.T, s.HSV, out_stride, b, head), &r.out[g * v_size]);
                for (int t = 0; t < s.T; t++)
                    d[1].add(lse[((size_t)b * s.NH + head) * s.T + t], r.lse[(size_t)g * s.T + t]);
                compare(d[2], head_of(dqkv.data(), s.T, s.HSK, s.q_stride, b, head), &r.dq[g * k_size]);
                if (p.gating == PLAIN) continue;
                compare(d[5], head_of(dout.data(), s.T, s.HSV, out_stride, b, head), &r.dout[g * v_size]);
                compare(d[6], head_of(dgate.data() + p.gate_at, s.T, s.HSV, s.gate_stride, b, head),
                        &r.dgate[g * v_size]);
            }
            compare(d[3], key_of(p, dqkv.data(), b, kv, s.NKV, kv), r.dk.data());
            compare(d[4], head_of(dqkv.data() + p.v_at, s.T, s.HSV, s.v_stride, b, kv), r.dv.data());
        }
    bool good = guarded && same && unwritten == 0;
    for (int i = 0; i < tensors; i++) good &= d[i].good();
    std::string errors;
    char text[96];
    for (int i = 0; i < tensors; i++) {
        const Difference &x = d[i];
        snprintf(text, sizeof text, " %s %.1e", x.name, x.relative());
        errors += text;
        if (good) continue;
        snprintf(text, sizeof text, " (worst %.2e, %ld NaN)", x.worst, x.nans);
        errors += text;
    }
    report(score, good, "version %d B=%d NH=%d NKV=%d T=%d HSK=%d HSV=%d%s:%s, %ld unwritten%s%s", version, s.B, s.NH,
           s.NKV, s.T, s.HSK, s.HSV, p.gating == GATED ? " gated" : "", errors.c_str(), unwritten,
           guarded ? "" : ", wrote where it should not", same ? "" : ", second run differs");
}

// ---------------------------------------------------------------------------------------------------------------------
// Time

template <class F>
double median_ms(int sets, F run) {
    cudaEvent_t start, end;
    CUDA_CHECK(cudaEventCreate(&start));
    CUDA_CHECK(cudaEventCreate(&end));
    std::vector<float> ms;
    for (int i = 0; i < 33; i++) {
        CUDA_CHECK(cudaEventRecord(start));
        run(i % sets);
        CUDA_CHECK(cudaEventRecord(end));
        CUDA_CHECK(cudaEventSynchronize(end));
        float t;
        CUDA_CHECK(cudaEventElapsedTime(&t, start, end));
        if (i >= 3) ms.push_back(t);
    }
    std::sort(ms.begin(), ms.end());
    CUDA_CHECK(cudaEventDestroy(start));
    CUDA_CHECK(cudaEventDestroy(end));
    return ms[ms.size() / 2];
}

// The least time of a kernel with so many products per 64 x 64 tile of p, of size HSK and of size HSV. A product takes
// the tensor cores 2 cycles per column of the head, the tile's exponentials take 256 cycles.
double floor_ms(const AttentionShape &s, int k_products, int v_products) {
    double blocks = ceil_div(s.T, ROWS), tiles = s.B * s.NH * blocks * (blocks + 1) / 2;
    double cycles = std::max(2 * (k_products * s.HSK + v_products * s.HSV), 256);
    return tiles * cycles / device_attribute(cudaDevAttrMultiProcessorCount) / (CLOCK_GHZ * 1e6);
}

void time_shape(int version, Problem &first) {
    const AttentionShape &s = first.s;
    int l2_bytes = device_attribute(cudaDevAttrL2CacheSize);
    double bytes = first.qkv.size() * 2.0 + first.out_size * 2.0;
    int sets = std::max(1, (int)ceil(3.0 * l2_bytes / bytes));      // in turn: a run must not find its inputs in L2
    std::vector<Problem> p(1, first);
    for (int i = 1; i < sets; i++) {
        p.push_back(make_problem(s.B, s.NH, s.T, s.HSK, s.NKV, first.gating, false, 1, i));
        upload_gradient(p[i]);
    }
    double forward = median_ms(sets, [&](int i) { run_forward(version, p[i]); });
    double backward = median_ms(sets, [&](int i) { run_backward(version, p[i]); });
    double flops = 1.0 * s.B * s.NH * s.T * s.T * (s.HSK + s.HSV);  // two products over half of T x T
    double fw = flops / forward / 1e9, bw = 2.5 * flops / backward / 1e9;
    printf("version %d B%d NH%d NKV%d T%d HSK%d HSV%d%s: ", version, s.B, s.NH, s.NKV, s.T, s.HSK, s.HSV,
           first.gating == GATED ? " gated" : "");
    printf("forward %.3f ms %.0f TFLOP/s (%.0f%%), ", forward, fw, 100 * fw / CEILING_TFLOPS);
    printf("backward %.3f ms %.0f TFLOP/s (%.0f%% of %.0f); ", backward, bw, 100 * bw / CEILING_TFLOPS, CEILING_TFLOPS);
    double forward_floor = floor_ms(s, 1, 1), backward_floor = floor_ms(s, 2, 1) + floor_ms(s, 2, 2);   // dq, dk/dv
    printf("floors %.3f (%.0f%%) and %.3f ms (%.0f%%)\n", forward_floor, 100 * forward_floor / forward, backward_floor,
           100 * backward_floor / backward);
    fflush(stdout);
    for (int i = 1; i < sets; i++) free_problem(p[i]);
}

// ---------------------------------------------------------------------------------------------------------------------

int main(int argc, char **argv) {
    program_start(argv[0]);
    Score score = {0, 0};

    if (argc == 1) {
        const int lengths[] = {1, 2, 63, 64, 65, 127, 128, 129, 200, 1000, 1024};
        int n = 0;
        const int heads[][2] = {{1, 1}, {5, 5}, {4, 2}, {6, 1}, {47, 47}};      // NH, NKV
        for (int version = 1; version <= 2; version++)
            for (int HSK : {64, 96, 128})
                for (int T : lengths)
                    for (auto &h : heads)
                        for (Gating gating : {PLAIN, GATED}) {
                            if (h[0] == 47 && T > 129) continue;                // too slow on the CPU
                            Problem p = make_problem(2, h[0], T, HSK, h[1], gating, n % 2, n % 3 == 2 ? 2 : 1, n);
                            n++;
                            check(&score, version, p, true);
                            free_problem(p);
                        }
        return finish(&score);
    }

    int x[6] = {0, 0, 0, 0, 0, 0};
    const char *usage = "usage: attention [VERSION B NH T HSK [NKV [gated]]]";
    if (argc < 6 || argc > 8 || (argc == 8 && strcmp(argv[7], "gated") != 0)) die(EXIT_INPUT, "%s", usage);
    for (int i = 1; i < argc && i <= 6; i++) {
        char *end;
        long value = strtol(argv[i], &end, 10);
        if (*end || value < 1 || value > INT32_MAX)
            die(EXIT_INPUT, "%s: not a positive integer; %s", argv[i], usage);
        x[i - 1] = (int)value;
    }
    if (x[0] > 2) die(EXIT_INPUT, "version %d does not exist: take 1 or 2", x[0]);
    Problem p = make_problem(x[1], x[2], x[3], x[4], argc > 6 ? x[5] : x[2], argc > 7 ? GATED : PLAIN, false, 1, 1);
    check(&score, x[0], p, false);
    if (score.failed == 0) time_shape(x[0], p);
    free_problem(p);
    return score.failed > 0;
}
