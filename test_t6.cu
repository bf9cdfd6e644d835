// test_t6cu: proves train_t6.cu right against train_t6.c, which is linked in as a C object with its main switched off.
//
//   ./test_t6cu              every operator, then whole models of every kind: logits, gradients by name, AdamW steps, bits
//   ./test_t6cu --small      the small sizes only, for compute-sanitizer
//   ./test_t6cu --operators  of these the operators without the matrix products, so that no kernel runs that is not ours
//
// Errors are ||a - b|| / ||b|| of a tensor, b from the CPU in fp32 on the same inputs (rounded to bf16 in the bf16 build). Outputs are
// poisoned with NaN before a kernel runs, so that an element left unwritten cannot pass.
#define GENERATE_NO_MAIN
#include "generate_t6.cu"       // and so train_t6.cu

#include <algorithm>
#include <omp.h>
#include <string>
#include <vector>

typedef std::vector<float> Floats;

// The reference: functions of train_t6.c, which say what they do there.
namespace cpu {
struct T6;
extern "C" {
void matmul(float *c, int64_t ldc, const float *a, int64_t lda, unsigned a_is, const float *b, int64_t ldb, unsigned b_is, int64_t M,
            int64_t N, int64_t K, float beta);
void encoder_forward(float *x, const int32_t *idx, const float *wte, int64_t N, int64_t C);
void encoder_backward(float *dwte, const float *dx, const int32_t *idx, int64_t N, int64_t C);
void rmsnorm_forward(float *out, float *rstd, const float *x, int64_t N, int64_t C, double eps);
void rmsnorm_backward(float *dx, const float *dout, const float *out, const float *rstd, int64_t N, int64_t C);
void rope(float *fac, const Heads *heads, const float *table, int64_t B, int64_t T, int64_t HS, int64_t Pp, unsigned direction);
void heads_forward(float *out, const float *fac, const Heads *heads, int64_t N, int64_t NH, int64_t HS, int64_t Pp);
void heads_backward(float *dfac, const float *dout, const float *fac, const Heads *heads, int64_t N, int64_t NH, int64_t HS, int64_t Pp);
void attention_forward(float *y, float *lse, float *scratch, const float *q, const float *k, const float *v, int64_t B, int64_t T,
                       int64_t NH, int64_t HS, int64_t Dp);
void attention_backward(float *dq, float *dk, float *dv, float *scratch, const float *dy, const float *y, const float *lse, const float *q,
                        const float *k, const float *v, int64_t B, int64_t T, int64_t NH, int64_t HS, int64_t Dp);
void swiglu_forward(float *s, const float *u, int64_t N, int64_t Fp);
void swiglu_backward(float *du, const float *ds, const float *u, int64_t N, int64_t Fp);
double softmax_cross_entropy(float *logits, const int32_t *targets, int64_t rows, int64_t V, int64_t Vp, double dloss);
void t6_forward(T6 *t, const int32_t *idx, int64_t B, int64_t T);
void t6_logits(const T6 *t, int64_t n, float *out);
void trainer_start(TrainOptions *o);
T6 *trainer_open(const TrainOptions *o);
void trainer_close(T6 *t);
const Model *trainer_model(T6 *t);
HostWeights trainer_host_weights(T6 *t, int read);
const float *trainer_gradients(T6 *t);
void trainer_micro_step(T6 *t, const int32_t *inputs, const int32_t *targets, double dloss, int64_t k);
void trainer_update(T6 *t, const TrainOptions *o, double lr, int64_t step, double *loss, double *norm);
}
}

// ---------------------------------------------------------------------------------------------------------------------
// Checks

static const bool IS_BF16 = sizeof(floatX) == 2;
// bf16 keeps 8 bits: rounding to it once moves a tensor by about 2^-9.2 of its norm, and never by more than 2^-8.
static const double ROUNDED_ONCE = IS_BF16 ? 0.0039 : 2e-6;

typedef struct { int passed, failed; } Score;

__attribute__((format(printf, 3, 4))) static void report(Score *score, bool ok, const char *format, ...) {
    va_list args;
    va_start(args, format);
    printf("%s ", ok ? "ok  " : "FAIL");
    vprintf(format, args);
    putchar('\n');
    fflush(stdout);
    va_end(args);
    ok ? score->passed++ : score->failed++;
}

typedef struct { double error; size_t worst, bad; } Difference;    // bad: elements that are not finite

static Difference difference(const float *got, const float *want, size_t n) {
    Difference d = {0, 0, 0};
    double sum = 0, norm = 0, largest = -1;
    for (size_t i = 0; i < n; i++) {
        double e = (double)got[i] - want[i];
        if (!std::isfinite(got[i])) d.bad++;
        sum += e * e, norm += (double)want[i] * want[i];
        if (!(fabs(e) <= largest)) largest = fabs(e), d.worst = i;
    }
    d.error = norm > 0 ? sqrt(sum / norm) : sqrt(sum);
    return d;
}

static void check(Score *score, const char *what, const Floats &got, const Floats &want, double tolerance) {
    if (got.size() != want.size()) return report(score, false, "%s: %zu elements, should be %zu", what, got.size(), want.size());
    Difference d = difference(got.data(), want.data(), got.size());
    bool ok = d.bad == 0 && d.error <= tolerance;
    if (ok) report(score, true, "%s: error %.1e of %.1e", what, d.error, tolerance);
    else report(score, false, "%s: error %.3e of %.1e, %zu of %zu not finite; worst at %zu: %.9g, should be %.9g", what, d.error, tolerance,
                d.bad, got.size(), d.worst, got.empty() ? 0 : got[d.worst], want.empty() ? 0 : want[d.worst]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Arrays

struct Random {
    uint64_t stream, draw;
    double uniform() { return 2 * rng_uniform(stream, draw++) - 1; }
    int32_t below(int64_t n) { return (int32_t)(rng_at(stream, draw++) % (uint64_t)n); }
};

static float rounded(float x) { return (float)(floatX)x; }

static Floats random_floats(Random *random, size_t n, double size = 1) {       // values that floatX holds exactly
    Floats x(n);
    for (float &v : x) v = rounded((float)(size * random->uniform()));
    return x;
}

// An array on the GPU. Without values: poisoned.
template <class X>
struct Gpu {
    X *p = NULL;
    size_t n;
    Gpu(size_t n) : n(n) {
        CUDA_CHECK(cudaMalloc((void **)&p, n * sizeof(X) + 16));
        CUDA_CHECK(cudaMemset(p, 0xff, n * sizeof(X)));     // NaN in fp32, bf16 and double
    }
    template <class Y>
    Gpu(const std::vector<Y> &from) : Gpu(from.size()) {
        std::vector<X> x(n);
        for (size_t i = 0; i < n; i++) x[i] = (X)from[i];
        CUDA_CHECK(cudaMemcpy(p, x.data(), n * sizeof(X), cudaMemcpyHostToDevice));
    }
    Gpu(const Gpu &) = delete;
    ~Gpu() { cudaFree(p); }
    Floats read() const {
        std::vector<X> x(n);
        CUDA_CHECK(cudaDeviceSynchronize());
        CUDA_CHECK(cudaMemcpy(x.data(), p, n * sizeof(X), cudaMemcpyDeviceToHost));
        Floats y(n);
        for (size_t i = 0; i < n; i++) y[i] = (float)x[i];
        return y;
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Operators

static void test_encoder(Score *score, Random *random, int64_t N, int64_t C, int64_t V) {
    Floats wte = random_floats(random, V * C), dx = random_floats(random, N * C), x(N * C), dwte = random_floats(random, V * C);
    std::vector<int32_t> idx(N), groups(encoder_groups_size(N)), counts(V + 1);
    for (auto &i : idx) i = random->below(2) ? random->below(V) : 0;     // half of them one token: a long group
    encoder_groups(groups.data(), counts.data(), idx.data(), N, V);
    Gpu<floatX> d_wte(wte), d_dx(dx), d_x(x.size());
    Gpu<float> d_dwte(dwte);
    Gpu<int32_t> d_idx(idx), d_groups(groups);
    encoder_forward(d_x.p, d_idx.p, d_wte.p, N, C, 0);
    encoder_backward(d_dwte.p, d_dx.p, d_idx.p, d_groups.p, N, C, 0);
    cpu::encoder_forward(x.data(), idx.data(), wte.data(), N, C);
    cpu::encoder_backward(dwte.data(), dx.data(), idx.data(), N, C);
    char where[64];
    snprintf(where, sizeof where, "N%d C%d V%d", (int)N, (int)C, (int)V);
    check(score, (std::string("encoder forward ") + where).c_str(), d_x.read(), x, 0);
    check(score, (std::string("encoder backward ") + where).c_str(), d_dwte.read(), dwte, 2e-6);
}

static void test_rmsnorm(Score *score, Random *random, int64_t N, int64_t C) {
    Floats x = random_floats(random, N * C), dout = random_floats(random, N * C), dx = random_floats(random, N * C), out(N * C), rstd(N);
    Gpu<floatX> d_x(x), d_dout(dout), d_dx(dx), d_out(out.size());
    Gpu<float> d_rstd(rstd.size());
    rmsnorm_forward(d_out.p, d_rstd.p, d_x.p, N, C, 1e-6, 0);
    cpu::rmsnorm_forward(out.data(), rstd.data(), x.data(), N, C, 1e-6);
    char where[64];
    snprintf(where, sizeof where, "N%d C%d", (int)N, (int)C);
    check(score, (std::string("rmsnorm forward ") + where).c_str(), d_out.read(), out, ROUNDED_ONCE);
    check(score, (std::string("rmsnorm rstd ") + where).c_str(), d_rstd.read(), rstd, 2e-6);
    for (float &o : out) o = rounded(o);
    Gpu<floatX> d_given(out);
    Gpu<float> d_given_rstd(rstd);
    rmsnorm_backward(d_dx.p, d_dout.p, d_given.p, d_given_rstd.p, N, C, 0);
    cpu::rmsnorm_backward(dx.data(), dout.data(), out.data(), rstd.data(), N, C);
    check(score, (std::string("rmsnorm backward ") + where).c_str(), d_dx.read(), dx, ROUNDED_ONCE);
}

static void test_swiglu(Score *score, Random *random, int64_t N, int64_t Fp) {
    Floats u = random_floats(random, N * 2 * Fp, 8), ds = random_floats(random, N * Fp), s(N * Fp), du(N * 2 * Fp);
    Gpu<floatX> d_u(u), d_ds(ds), d_s(s.size());
    swiglu_forward(d_s.p, d_u.p, N, Fp, 0);
    swiglu_backward(d_u.p, d_ds.p, N, Fp, 0);
    cpu::swiglu_forward(s.data(), u.data(), N, Fp);
    cpu::swiglu_backward(du.data(), ds.data(), u.data(), N, Fp);
    char where[64];
    snprintf(where, sizeof where, "N%d F%d", (int)N, (int)Fp);
    check(score, (std::string("swiglu forward ") + where).c_str(), d_s.read(), s, ROUNDED_ONCE);
    check(score, (std::string("swiglu backward ") + where).c_str(), d_u.read(), du, ROUNDED_ONCE);
    check(score, (std::string("swiglu again ") + where).c_str(), d_ds.read(), s, ROUNDED_ONCE);
}

static void test_classifier(Score *score, Random *random, int64_t N, int64_t V) {
    int64_t Vp = round_up(V, 128);
    Floats logits = random_floats(random, N * Vp, 12), losses(N), want;
    std::vector<int32_t> targets(N);
    for (auto &t : targets) t = random->below(4) ? random->below(V) : (int32_t)V - 1;
    for (int64_t n = 0; n < N; n++) logits[n * Vp + targets[n]] = rounded(10);   // targets that have some probability
    Gpu<floatX> d_logits(logits), d_read_only(logits);
    Gpu<float> d_losses(N), d_losses_only(N);
    Gpu<int32_t> d_targets(targets);
    fused_classifier(d_logits.p, d_losses.p, d_targets.p, N, V, Vp, 1.0 / 64, LOSS_AND_DLOGITS, 0);
    fused_classifier(d_read_only.p, d_losses_only.p, d_targets.p, N, V, Vp, 0, LOSS_ONLY, 0);
    want = logits;
    for (int64_t n = 0; n < N; n++) losses[n] = (float)cpu::softmax_cross_entropy(want.data() + n * Vp, &targets[n], 1, V, Vp, 1.0 / 64);
    char where[64];
    snprintf(where, sizeof where, "N%d V%d", (int)N, (int)V);
    Floats got = d_logits.read();
    size_t padding = 0;
    for (int64_t n = 0; n < N; n++)
        for (int64_t v = V; v < Vp; v++) padding += got[n * Vp + v] != 0;
    check(score, (std::string("classifier dlogits ") + where).c_str(), got, want, ROUNDED_ONCE);
    check(score, (std::string("classifier losses ") + where).c_str(), d_losses.read(), losses, 2e-6);
    check(score, (std::string("classifier losses alone ") + where).c_str(), d_losses_only.read(), losses, 2e-6);
    check(score, (std::string("classifier leaves logits alone ") + where).c_str(), d_read_only.read(), logits, 0);
    report(score, padding == 0, "classifier padding %s: %zu elements not zero", where, padding);
    double total = 0;
    for (float l : losses) total += l;
    Gpu<double> d_total(std::vector<double>{1.0});
    loss_sum(d_total.p, d_losses.p, N, 0);
    check(score, (std::string("loss sum ") + where).c_str(), d_total.read(), Floats{(float)(1 + total)}, 2e-6);
}

static void test_heads(Score *score, Random *random, const Config *config, int64_t B, int64_t T) {
    Model m;
    model_init(&m, config, PAD);
    int64_t N = B * T, NH = config->n_head, HS = config->head_dim;
    HeadsShape shape = heads_shape(&m, T);
    Floats fac = random_floats(random, N * m.Pp), table(T * HS), dfac(N * m.Pp), rotated;
    rope_table(table.data(), T, HS, config->rope_base);
    rotated = fac;
    cpu::rope(rotated.data(), &m.q, table.data(), B, T, HS, m.Pp, 0);
    cpu::rope(rotated.data(), &m.k, table.data(), B, T, HS, m.Pp, 0);
    const Heads *heads[3] = {&m.q, &m.k, &m.v};
    Floats out[3], want[3], dout[3];
    Gpu<floatX> d_fac(fac), d_dfac(dfac.size()), d_table(1);
    Gpu<float> d_rope(table);
    int stored[3];
    for (int w = 0; w < 3; w++) {
        stored[w] = heads_stored(*heads[w], (int)NH);
        int group = (int)NH / stored[w];
        out[w].resize(N * NH * HS), want[w].resize(N * stored[w] * HS);
        dout[w] = random_floats(random, N * stored[w] * HS);
        cpu::heads_forward(out[w].data(), rotated.data(), heads[w], N, NH, HS, m.Pp);
        Floats expanded(N * NH * HS);       // grouped heads: all of the gradient in the first head of a group
        for (int64_t n = 0; n < N; n++)
            for (int h = 0; h < stored[w]; h++)
                for (int64_t d = 0; d < HS; d++) {
                    want[w][(n * stored[w] + h) * HS + d] = out[w][(n * NH + h * group) * HS + d];
                    expanded[(n * NH + h * group) * HS + d] = dout[w][(n * stored[w] + h) * HS + d];
                }
        cpu::heads_backward(dfac.data(), expanded.data(), rotated.data(), heads[w], N, NH, HS, m.Pp);
    }
    cpu::rope(dfac.data(), &m.q, table.data(), B, T, HS, m.Pp, 1);
    cpu::rope(dfac.data(), &m.k, table.data(), B, T, HS, m.Pp, 1);
    Gpu<floatX> q(want[0].size()), k(want[1].size()), v(want[2].size()), dq(dout[0]), dk(dout[1]), dv(dout[2]);
    heads_forward(q.p, k.p, v.p, d_fac.p, d_rope.p, shape, N, 0);
    heads_backward(d_dfac.p, dq.p, dk.p, dv.p, d_fac.p, d_rope.p, shape, N, 0);
    char where[96];
    snprintf(where, sizeof where, "%s B%d T%d NH%d HS%d R%d,%d,%d", attn_name(config->attn), (int)B, (int)T, (int)NH, (int)HS, m.q.R, m.k.R,
             m.v.R);
    check(score, (std::string("heads q ") + where).c_str(), q.read(), want[0], ROUNDED_ONCE);
    check(score, (std::string("heads k ") + where).c_str(), k.read(), want[1], ROUNDED_ONCE);
    check(score, (std::string("heads v ") + where).c_str(), v.read(), want[2], ROUNDED_ONCE);
    check(score, (std::string("heads backward ") + where).c_str(), d_dfac.read(), dfac, ROUNDED_ONCE);
    heads_backward(d_fac.p, dq.p, dk.p, dv.p, d_fac.p, d_rope.p, shape, N, 0);
    check(score, (std::string("heads backward in place ") + where).c_str(), d_fac.read(), dfac, ROUNDED_ONCE);
    model_free(&m);
}

static void test_attention(Score *score, Random *random, int B, int T, int NH, int NKV, int HS) {
    AttentionShape shape = {B, T, NH, NKV, HS, (int64_t)NH * HS, (int64_t)NKV * HS, (int64_t)NKV * HS};
    int64_t N = (int64_t)B * T, D = NH * HS, group = NH / NKV;
    Floats q = random_floats(random, N * D, 2), k = random_floats(random, N * NKV * HS, 2), v = random_floats(random, N * NKV * HS);
    Floats dy = random_floats(random, N * D);
    Floats k_all(N * D), v_all(N * D), y(N * D), lse(N * NH), dq(N * D), dk_all(N * D), dv_all(N * D), dk(k.size()), dv(v.size());
    for (int64_t n = 0; n < N; n++)
        for (int64_t i = 0; i < D; i++) {
            size_t from = (n * NKV + i / HS / group) * HS + i % HS;
            k_all[n * D + i] = k[from], v_all[n * D + i] = v[from];
        }
    Floats scratch((size_t)omp_get_max_threads() * 2 * 64 * T);
    cpu::attention_forward(y.data(), lse.data(), scratch.data(), q.data(), k_all.data(), v_all.data(), B, T, NH, HS, D);
    Gpu<floatX> d_q(q), d_k(k), d_v(v), d_y(y.size()), d_dy(dy), d_dq(q.size()), d_dk(k.size()), d_dv(v.size());
    Gpu<float> d_lse(lse.size()), d_scratch(attention_backward_scratch_bytes(shape) / sizeof(float));
    layer_attention_forward<floatX>(d_y.p, d_lse.p, d_q.p, d_k.p, d_v.p, shape, 0);
    char where[64];
    snprintf(where, sizeof where, "B%d T%d NH%d NKV%d HS%d", B, T, NH, NKV, HS);
    double tolerance = IS_BF16 ? 6e-3 : 1e-5;       // bf16: probabilities are rounded before they weigh v, and dlogits before they weigh k
    check(score, (std::string("attention forward ") + where).c_str(), d_y.read(), y, tolerance);
    check(score, (std::string("attention lse ") + where).c_str(), d_lse.read(), lse, 1e-5);
    layer_attention_backward<floatX>(d_dq.p, d_dk.p, d_dv.p, d_dy.p, d_y.p, d_lse.p, d_q.p, d_k.p, d_v.p, d_scratch.p, shape, 0);
    cpu::attention_backward(dq.data(), dk_all.data(), dv_all.data(), scratch.data(), dy.data(), y.data(), lse.data(), q.data(),
                            k_all.data(), v_all.data(), B, T, NH, HS, D);
    for (int64_t n = 0; n < N; n++)
        for (int64_t i = 0; i < D; i++) {
            size_t to = (n * NKV + i / HS / group) * HS + i % HS;
            dk[to] += dk_all[n * D + i], dv[to] += dv_all[n * D + i];
        }
    // as they are; the reference has rounding noise
    if (T == 1) std::fill(dq.begin(), dq.end(), 0.0f), std::fill(dk.begin(), dk.end(), 0.0f);
    check(score, (std::string("attention dq ") + where).c_str(), d_dq.read(), dq, tolerance);
    check(score, (std::string("attention dk ") + where).c_str(), d_dk.read(), dk, tolerance);
    check(score, (std::string("attention dv ") + where).c_str(), d_dv.read(), dv, tolerance);
}

static void test_matmul(Score *score, Random *random, Matmul *mm, int64_t N, int64_t IC, int64_t OC) {
    Floats inp = random_floats(random, N * IC), w = random_floats(random, OC * IC), dout = random_floats(random, N * OC);
    Floats out = random_floats(random, N * OC), dinp(N * IC), dw = random_floats(random, OC * IC);
    Gpu<floatX> d_inp(inp), d_w(w), d_dout(dout), d_out(out), d_overwritten(out.size()), d_dinp(dinp.size());
    Gpu<float> d_dw(dw), d_dw_overwritten(dw.size());
    linear_forward(mm, d_out.p, d_inp.p, d_w.p, N, IC, OC, ACCUMULATE, 0);
    linear_forward(mm, d_overwritten.p, d_inp.p, d_w.p, N, IC, OC, OVERWRITE, 0);
    linear_backward_input(mm, d_dinp.p, d_dout.p, d_w.p, N, IC, OC, 0);
    linear_backward_weight(mm, d_dw.p, d_dout.p, d_inp.p, N, IC, OC, ACCUMULATE, 0);
    linear_backward_weight(mm, d_dw_overwritten.p, d_dout.p, d_inp.p, N, IC, OC, OVERWRITE, 0);
    char where[64];
    snprintf(where, sizeof where, "N%d IC%d OC%d", (int)N, (int)IC, (int)OC);
    cpu::matmul(out.data(), OC, inp.data(), IC, 0, w.data(), IC, 1, N, OC, IC, 1);
    check(score, (std::string("linear forward, added ") + where).c_str(), d_out.read(), out, ROUNDED_ONCE);
    cpu::matmul(out.data(), OC, inp.data(), IC, 0, w.data(), IC, 1, N, OC, IC, 0);
    check(score, (std::string("linear forward ") + where).c_str(), d_overwritten.read(), out, ROUNDED_ONCE);
    cpu::matmul(dinp.data(), IC, dout.data(), OC, 0, w.data(), IC, 0, N, IC, OC, 0);
    check(score, (std::string("linear backward input ") + where).c_str(), d_dinp.read(), dinp, ROUNDED_ONCE);
    cpu::matmul(dw.data(), IC, dout.data(), OC, 1, inp.data(), IC, 0, OC, IC, N, 1);
    check(score, (std::string("linear backward weight, added ") + where).c_str(), d_dw.read(), dw, 1e-5);
    cpu::matmul(dw.data(), IC, dout.data(), OC, 1, inp.data(), IC, 0, OC, IC, N, 0);
    check(score, (std::string("linear backward weight ") + where).c_str(), d_dw_overwritten.read(), dw, 1e-5);
}

static void test_update(Score *score, Random *random, size_t n) {
    Floats w(n), m(n), v(n), g(n), want_w, want_m, want_v;
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        w[i] = (float)random->uniform(), m[i] = (float)random->uniform(), v[i] = (float)fabs(random->uniform());
        g[i] = (float)random->uniform();
        sum += (double)g[i] * g[i];
    }
    Gpu<floatX> d_params(n);
    Gpu<float> d_w(w), d_m(m), d_v(v), d_g(g);
    Gpu<double> d_partial(NORM_BLOCKS), d_norm(sizeof(GradientNorm) / sizeof(double));
    GradientNorm *norm = (GradientNorm *)d_norm.p;
    global_norm(norm, d_partial.p, d_g.p, n, 0.5, 0);
    check(score, "global norm", Floats{d_norm.read()[0]}, Floats{(float)sqrt(sum)}, 1e-6);
    double lr = 0.01, scale = fmin(1, 0.5 / (sqrt(sum) + 1e-6));
    want_w = w, want_m = m, want_v = v;
    for (int step = 1; step <= 2; step++) {     // in double, as the formula stands
        double bias_m = 1 - pow(0.9, step), bias_v = 1 - pow(0.95, step);
        adamw_update(d_params.p, d_w.p, d_m.p, d_v.p, d_g.p, n, adamw_step(lr, 0.9, 0.95, 1e-8, 0.1, step), norm, 0);
        for (size_t i = 0; i < n; i++) {
            double gi = g[i] * scale, mi = 0.9 * want_m[i] + 0.1 * gi, vi = 0.95 * want_v[i] + 0.05 * gi * gi;
            double m_hat = mi / bias_m, v_hat = vi / bias_v;
            want_w[i] = (float)(want_w[i] * (1 - lr * 0.1) - lr * m_hat / (sqrt(v_hat) + 1e-8));
            want_m[i] = (float)mi, want_v[i] = (float)vi;
        }
    }
    char where[32];
    snprintf(where, sizeof where, " n%zu", n);
    check(score, (std::string("adamw master weights") + where).c_str(), d_w.read(), want_w, 1e-6);
    check(score, (std::string("adamw m") + where).c_str(), d_m.read(), want_m, 1e-6);
    check(score, (std::string("adamw v") + where).c_str(), d_v.read(), want_v, 1e-6);
    check(score, (std::string("adamw weights") + where).c_str(), d_params.read(), want_w, ROUNDED_ONCE);
    GradientNorm broken = {NAN, 1};
    CUDA_CHECK(cudaMemcpy(norm, &broken, sizeof broken, cudaMemcpyHostToDevice));
    Floats before = d_w.read();
    adamw_update(d_params.p, d_w.p, d_m.p, d_v.p, d_g.p, n, adamw_step(lr, 0.9, 0.95, 1e-8, 0.1, 3), norm, 0);
    check(score, "adamw skips a gradient that is not finite", d_w.read(), before, 0);
}

typedef enum { TEST_ALL, TEST_SMALL, TEST_OPERATORS } Extent;

static void test_matvec(Score *score, Random *random, int64_t N, int64_t IC, int64_t OC) {
    Floats inp = random_floats(random, N * 2 * IC, 4), w = random_floats(random, OC * IC), out = random_floats(random, N * OC), x(N * IC), rstd(N);
    Gpu<floatX> d_inp(inp), d_w(w), d_out(out), d_normed(out.size());
    Gpu<float> d_swiglu(out.size());
    matvec(d_out.p, d_inp.p, d_w.p, N, IC, OC, MATVEC_AS_IS, ACCUMULATE, 0, 0);
    matvec(d_normed.p, d_inp.p, d_w.p, N, IC, OC, MATVEC_NORMED, OVERWRITE, 1e-6, 0);
    matvec(d_swiglu.p, d_inp.p, d_w.p, N, IC, OC, MATVEC_SWIGLU, OVERWRITE, 0, 0);
    char where[64];
    snprintf(where, sizeof where, "N%d IC%d OC%d", (int)N, (int)IC, (int)OC);
    cpu::matmul(out.data(), OC, inp.data(), IC, 0, w.data(), IC, 1, N, OC, IC, 1);
    check(score, (std::string("matvec, added ") + where).c_str(), d_out.read(), out, ROUNDED_ONCE);
    cpu::rmsnorm_forward(x.data(), rstd.data(), inp.data(), N, IC, 1e-6);
    for (float &v : x) v = rounded(v);
    cpu::matmul(out.data(), OC, x.data(), IC, 0, w.data(), IC, 1, N, OC, IC, 0);
    check(score, (std::string("matvec of rmsnorm ") + where).c_str(), d_normed.read(), out, ROUNDED_ONCE);
    cpu::swiglu_forward(x.data(), inp.data(), N, IC);
    for (float &v : x) v = rounded(v);
    cpu::matmul(out.data(), OC, x.data(), IC, 0, w.data(), IC, 1, N, OC, IC, 0);
    check(score, (std::string("matvec of swiglu ") + where).c_str(), d_swiglu.read(), out, IS_BF16 ? 1e-3 : 2e-6);     // s rounds the other way at times
}

// Decoding against attention over the whole sequence: the last n rows of that. All of a sequence but these is written as a prompt.
static void test_decode(Score *score, Random *random, const Config *config, std::vector<int> totals, int n) {
    Model m;
    model_init(&m, config, PAD);
    const int64_t NH = config->n_head, HS = config->head_dim, D = m.D, Pp = m.Pp, B = (int64_t)totals.size();
    int longest = *std::max_element(totals.begin(), totals.end());
    std::vector<double> frequencies(HS / 2);
    Floats table((size_t)longest * HS), want((size_t)B * n * D);
    rope_frequencies(frequencies.data(), HS, config->rope_base);
    rope_table(table.data(), longest, HS, config->rope_base);
    std::vector<int32_t> before, zeros(B, 0);
    std::vector<Floats> fac;
    for (int64_t b = 0; b < B; b++) {
        int T = totals[b];
        before.push_back(T - n);
        fac.push_back(random_floats(random, (size_t)T * Pp));
        Floats rotated = fac[b], q((size_t)T * D), k(q.size()), v(q.size()), y(q.size()), lse((size_t)NH * T), scratch((size_t)omp_get_max_threads() * 2 * 64 * T);
        cpu::rope(rotated.data(), &m.q, table.data(), 1, T, HS, Pp, 0);
        cpu::rope(rotated.data(), &m.k, table.data(), 1, T, HS, Pp, 0);
        cpu::heads_forward(q.data(), rotated.data(), &m.q, T, NH, HS, Pp);
        cpu::heads_forward(k.data(), rotated.data(), &m.k, T, NH, HS, Pp);
        cpu::heads_forward(v.data(), rotated.data(), &m.v, T, NH, HS, Pp);
        cpu::attention_forward(y.data(), lse.data(), scratch.data(), q.data(), k.data(), v.data(), 1, T, NH, HS, D);
        std::copy(y.end() - n * D, y.end(), want.begin() + b * n * D);
    }
    for (int fp8 = 0; fp8 < 2; fp8++) {
        CacheShape shape = cache_shape(&m, fp8 ? 1 : (int)sizeof(floatX));
        int64_t capacity = longest + 20;
        Gpu<char> cache(cache_layer_bytes(shape, B, capacity));         // poisoned: NaN
        Gpu<int32_t> d_before(before), d_zeros(zeros);
        Gpu<double> d_frequencies(frequencies);
        Floats queries;
        for (int64_t b = 0; b < B; b++) {
            Gpu<floatX> d_fac(fac[b]);
            CacheWrite w = {(unsigned char *)cache.p + b * cache_layer_bytes(shape, 1, capacity), d_fac.p, d_zeros.p, d_frequencies.p, shape, m.q, m.k, m.v,
                            before[b], (int)Pp, cache_pages(capacity), 0};
            if (before[b] > 0) cache_write(w, 1, 0);
            CUDA_CHECK(cudaDeviceSynchronize());
            queries.insert(queries.end(), fac[b].end() - n * Pp, fac[b].end());
        }
        Gpu<floatX> d_queries(queries), fast(want.size()), plain(want.size()), again(want.size());
        Gpu<float> scratch(decode_scratch_bytes(shape, m.q, (int)B, n) / sizeof(float) + 1);
        CUDA_CHECK(cudaMemset(scratch.p, 0, scratch.n * sizeof(float)));
        CacheWrite w = {(unsigned char *)cache.p, d_queries.p, d_before.p, d_frequencies.p, shape, m.q, m.k, m.v, n, (int)Pp, cache_pages(capacity), 1};
        cache_write(w, B, 0);
        DecodeArgs a = {(unsigned char *)cache.p, d_before.p, d_queries.p, fast.p, scratch.p, shape, m.q, (int)B, n, (int)NH, (int)Pp, cache_pages(capacity), 0, 0, 0};
        flashtpa_decode(a, 0);
        a.out = again.p;
        flashtpa_decode(a, 0);
        a.out = plain.p;
        decode_plain(a, 0);
        char where[128];
        snprintf(where, sizeof where, "%s%s B%d longest %d n%d NH%d HS%d R%d,%d,%d", attn_name(config->attn), fp8 ? " fp8" : "", (int)B, longest, n, (int)NH,
                 (int)HS, m.q.R, m.k.R, m.v.R);
        // fp8: a number is off by 2.6% in the mean, a product of two, summed over 16 tokens and more, by less than the sum of both
        double tolerance = fp8 ? 0.08 : IS_BF16 ? 1e-2 : 1e-5;
        check(score, (std::string("decode, plain ") + where).c_str(), plain.read(), want, tolerance);
        check(score, (std::string("decode ") + where).c_str(), fast.read(), want, tolerance);
        check(score, (std::string("decode beside plain ") + where).c_str(), fast.read(), plain.read(), IS_BF16 ? 1e-2 : 0);
        check(score, (std::string("decode again ") + where).c_str(), again.read(), fast.read(), 0);
    }
    model_free(&m);
}

// The same draws as on the CPU. Likelihoods are rounded otherwise there: one of some thousand may fall on the other side of a border.
static void test_sampler(Score *score, Random *random, int64_t V) {
    const SamplerOptions options[] = {{0, 0, 1, 0}, {1, 0, 1, 0}, {0.7, 5, 1, 0}, {1.3, 0, 0.8, 0}, {1, 0, 1, 0.05}, {2, 40, 0.9, 0.01}, {1, 1, 1, 0}, {1, 0, 1e-6, 0}};
    const int64_t B = 40;
    for (const SamplerOptions &o : options) {
        int different = 0;
        for (int round = 0; round < 5; round++) {
            Floats logits = random_floats(random, B * V, 6);        // bf16 numbers: many equals
            std::vector<double> u(B);
            for (double &x : u) x = rng_uniform(random->stream, random->draw++);
            std::vector<int32_t> poison(B, -1);
            Gpu<float> d_logits(logits);
            Gpu<double> d_u(u);
            Gpu<int32_t> next(poison);
            sample_tokens(next.p, d_logits.p, d_u.p, &o, B, V, V, 0);
            std::vector<int32_t> got(B);
            CUDA_CHECK(cudaDeviceSynchronize());
            CUDA_CHECK(cudaMemcpy(got.data(), next.p, B * 4, cudaMemcpyDeviceToHost));
            for (int64_t b = 0; b < B; b++) different += got[b] != sample_token(&logits[b * V], (int)V, &o, u[b]);
        }
        report(score, different <= (o.temperature == 0 || o.top_k == 1 ? 0 : 1), "sampler V%d, temperature %g, top-k %d, top-p %g, min-p %g: %d of 200 draws differ from the CPU's",
               (int)V, o.temperature, (int)o.top_k, o.top_p, o.min_p, different);
    }
}

static void test_operators(Score *score, uint64_t seed, Extent extent) {
    Random random = {rng_stream(seed, 1), 0};
    test_encoder(score, &random, 7, 24, 13);
    test_rmsnorm(score, &random, 3, 8);
    test_rmsnorm(score, &random, 130, 776);
    test_swiglu(score, &random, 5, 344);
    test_classifier(score, &random, 3, 50);
    test_classifier(score, &random, 5, 50257);
    test_update(score, &random, 4);
    test_update(score, &random, 10004);
    //                    attn            L  C  NH  HS   V   RQ RK RV G  F  rope   eps
    const Config shapes[] = {
        {ATTN_TPA,        1, 64, 34, 64,  61, 6, 2, 2, 1, 0, 10000, 1e-6},
        {ATTN_TPA,        1, 64, 5,  128, 61, 1, 3, 4, 1, 0, 10000, 1e-6},
        {ATTN_TPA,        1, 64, 3,  32,  61, 16, 2, 5, 1, 0, 100, 1e-6},
        {ATTN_TPA_KVONLY, 1, 64, 7,  64,  61, 1, 1, 2, 1, 0, 10000, 1e-6},
        {ATTN_MHA,        1, 64, 3,  64,  61, 1, 1, 1, 1, 0, 10000, 1e-6},
        {ATTN_GQA,        1, 64, 6,  128, 61, 1, 1, 1, 2, 0, 10000, 1e-6},
        {ATTN_MQA,        1, 64, 5,  96,  61, 1, 1, 1, 1, 0, 10000, 1e-6}};
    for (const Config &c : shapes) test_heads(score, &random, &c, 2, 37);
    test_attention(score, &random, 2, 1, 1, 1, 64);
    test_attention(score, &random, 2, 77, 3, 3, 64);
    test_attention(score, &random, 1, 130, 6, 2, 128);
    test_attention(score, &random, 1, 700, 4, 2, 64);
    test_attention(score, &random, 1, 67, 4, 1, 96);
    test_matvec(score, &random, 1, 64, 7);
    test_matvec(score, &random, 3, 2176, 770);
    const Config decoded[] = {
        {ATTN_TPA,        1, 64, 34, 64,  61, 6,  2, 2, 1, 0, 10000, 1e-6},
        {ATTN_TPA,        1, 64, 5,  128, 61, 16, 1, 4, 1, 0, 10000, 1e-6},
        {ATTN_TPA,        1, 64, 3,  32,  61, 20, 5, 1, 1, 0, 100, 1e-6},
        {ATTN_TPA_KVONLY, 1, 64, 7,  64,  61, 1,  1, 1, 1, 0, 10000, 1e-6},
        {ATTN_MHA,        1, 64, 3,  64,  61, 1,  1, 1, 1, 0, 10000, 1e-6},
        {ATTN_GQA,        1, 64, 6,  128, 61, 1,  1, 1, 2, 0, 10000, 1e-6},
        {ATTN_MQA,        1, 64, 5,  96,  61, 1,  1, 1, 1, 0, 10000, 1e-6}};
    for (const Config &c : decoded) {
        test_decode(score, &random, &c, {1, 2, 17, 129, 300}, 1);
        test_decode(score, &random, &c, {5, 40, 200}, 5);
    }
    test_sampler(score, &random, 300);
    if (extent == TEST_OPERATORS) return;
    Matmul mm;
    matmul_init(&mm);
    test_matmul(score, &random, &mm, 77, 24, 40);
    test_matmul(score, &random, &mm, 300, 984, 768);
    if (extent == TEST_ALL) {
        test_encoder(score, &random, 6000, 768, 5000);
        test_encoder(score, &random, 1000, 8200, 3);
        test_rmsnorm(score, &random, 5000, 1600);
        test_swiglu(score, &random, 3000, 4272);
        test_classifier(score, &random, 300, 50257);
        test_classifier(score, &random, 2, 65536);
        test_update(score, &random, 3000004);
        Config c = {ATTN_TPA, 1, 64, 78, 64, 61, 6, 2, 2, 1, 0, 10000, 1e-6};
        test_heads(score, &random, &c, 3, 700);
        test_attention(score, &random, 2, 1000, 5, 5, 64);
        test_attention(score, &random, 1, 513, 8, 2, 128);
        test_matmul(score, &random, &mm, 4096, 768, 2176);
        test_matmul(score, &random, &mm, 1001, 1600, 1584);
        test_matvec(score, &random, 1, 768, 50304);
        test_matvec(score, &random, 2, 4272, 1600);
        test_decode(score, &random, &decoded[0], {4097, 1000, 127, 128}, 1);
        test_sampler(score, &random, 50257);
    }
    matmul_free(&mm);
}

// ---------------------------------------------------------------------------------------------------------------------
// Whole models

static TrainOptions options_of(const Config *config, int64_t B, int64_t T) {
    TrainOptions o;
    memset(&o, 0, sizeof o);
    o.config = *config, o.batch_size = B, o.seq_len = T, o.accum = 2;
    o.weight_decay = 0.1, o.clip = 1, o.beta1 = 0.9, o.beta2 = 0.95, o.adam_eps = 1e-8;
    return o;
}

// Moves tensor i from one layout of the model to another.
static void copy_tensor(const Model *to_model, float *to, const Model *from_model, const float *from, int i) {
    const Tensor *a = &to_model->tensors[i], *b = &from_model->tensors[i];
    for (int64_t r = 0; r < a->rows; r++) memcpy(to + a->offset + r * a->ld, from + b->offset + r * b->ld, (size_t)a->cols * sizeof *to);
}

static size_t padding_not_zero(const Model *m, const Floats &x) {
    std::vector<char> known(x.size(), 0);
    size_t bad = 0;
    for (int i = 0; i < m->num_tensors; i++)
        for (int64_t r = 0; r < m->tensors[i].rows; r++)
            memset(&known[m->tensors[i].offset + r * m->tensors[i].ld], 1, (size_t)m->tensors[i].cols);
    for (size_t i = 0; i < x.size(); i++) bad += !known[i] && x[i] != 0;
    return bad;
}

static Floats read_gpu(const float *p, size_t n) {
    Floats x(n);
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(x.data(), p, n * sizeof(float), cudaMemcpyDeviceToHost));
    return x;
}

// Weights that both hold exactly, none of them zero: a zero weight would hide what is behind it.
static void set_weights(T6 *t, uint64_t seed) {
    const Model *m = &t->model;
    HostWeights host = trainer_host_weights(t, 0);
    for (int i = 0; i < m->num_tensors; i++) {
        const Tensor *w = &m->tensors[i];
        double size = w->init > 0 ? w->init : 1 / sqrt((double)w->cols);
        #pragma omp parallel for
        for (int64_t r = 0; r < w->rows; r++)
            for (int64_t c = 0; c < w->cols; c++)
                host.params[w->offset + r * w->ld + c] =
                    rounded((float)(size * (2 * rng_uniform(rng_stream(seed, i), r * w->cols + c) - 1)));
    }
    trainer_take_weights(t, 0);
}

typedef struct { std::vector<int32_t> inputs, targets; } Batch;
static Batch random_batch(uint64_t seed, uint64_t i, int64_t N, int64_t V) {
    Random random = {rng_stream(seed, 1000 + i), 0};
    Batch b;
    for (int64_t n = 0; n < N; n++) b.inputs.push_back(random.below(V)), b.targets.push_back(random.below(V));
    return b;
}

// What the errors of a bf16 model are made of: a tensor that is rounded once is off by 2^-9.2 = 0.17% of its norm; independent roundings
// add as squares. On the way to the logits there are 14 a layer: x twice, n1, fac, the rotated b twice, q, k, p, v, y, n2, u, s, and a
// few at the ends; on the way to a gradient as many again. That is 1.0% for the gradients of one layer, 1.4% for two, 1.7% for three, and
// seen are 0.75%, 1.2% and 1.55% at most. So 1% holds for one layer, and for two where the way is short (lm_head; v of dense kinds,
// which no factor rounds); elsewhere the count does. Gradients of q and k get twice the count (seen: 0.9%, 2.1% and 2.5%): they come
// through ds = p (dp - delta), a difference of numbers that are nearly equal when attention is nearly uniform, as with random weights,
// and the roundings count against the difference.
static double logits_tolerance(int64_t L) { return IS_BF16 ? 0.0017 * sqrt(5.0 + 14.0 * (double)L) : 1e-4; }
static double gradient_tolerance(const char *name, int64_t L) {
    if (!IS_BF16) return 1e-4;
    double counted = 0.0017 * sqrt(10.0 + 28.0 * (double)L);
    if (strstr(name, "_q.weight") || strstr(name, "_k.weight")) return 2 * counted;
    bool short_way = strstr(name, "lm_head.") || strstr(name, ".c_v.");
    return L == 1 || (L == 2 && short_way) ? 1e-2 : counted;
}
// AdamW's first steps are of one size, lr, whatever the gradient's: a gradient below its own rounding error steps the wrong way.
static const double STEPS_TOLERANCE = IS_BF16 ? 5e-2 : 1e-4;

static void test_against_cpu(Score *score, const Config *config, int64_t B, int64_t T, uint64_t seed, const char *name) {
    TrainOptions o = options_of(config, B, T);
    T6 *t = trainer_open(&o);
    cpu::T6 *reference = cpu::trainer_open(&o);
    const Model *m = trainer_model(t), *rm = cpu::trainer_model(reference);
    int64_t N = B * T, V = config->vocab_size, C = config->n_embd;
    set_weights(t, seed);
    for (int i = 0; i < m->num_tensors; i++) copy_tensor(rm, cpu::trainer_host_weights(reference, 1).params, m, t->host.params, i);

    // Logits
    Batch batch = random_batch(seed, 0, N, V);
    t6_batch(t, batch.inputs.data(), batch.targets.data(), B, T);
    t6_forward(t, B, T);
    linear_forward(&t->matmul, t->acts.logits, t->acts.nf, t->params + m->wte, N, C, m->Vp, OVERWRITE, t->stream);
    std::vector<floatX> raw(N * m->Vp);
    CUDA_CHECK(cudaStreamSynchronize(t->stream));
    CUDA_CHECK(cudaMemcpy(raw.data(), t->acts.logits, raw.size() * sizeof(floatX), cudaMemcpyDeviceToHost));
    Floats logits(N * V), want(N * V);
    cpu::t6_forward(reference, batch.inputs.data(), B, T);
    for (int64_t n = 0; n < N; n++) {
        for (int64_t v = 0; v < V; v++) logits[n * V + v] = (float)raw[n * m->Vp + v];
        cpu::t6_logits(reference, n, &want[n * V]);
    }
    check(score, (std::string("logits ") + name).c_str(), logits, want, logits_tolerance(config->n_layer));

    // Gradients, by name
    trainer_micro_step(t, batch.inputs.data(), batch.targets.data(), 1.0 / (double)N, 0);
    cpu::trainer_micro_step(reference, batch.inputs.data(), batch.targets.data(), 1.0 / (double)N, 0);
    Floats grads = read_gpu(t->grads, m->num_stored), aligned(m->num_stored);
    double worst = 0, worst_other = 0;       // of q and k in bf16, and of the others
    int bad = 0;
    for (int i = 0; i < m->num_tensors; i++) {
        const Tensor *w = &m->tensors[i];
        copy_tensor(m, aligned.data(), rm, cpu::trainer_gradients(reference), i);
        Floats got, expected;
        for (int64_t r = 0; r < w->rows; r++) {
            got.insert(got.end(), &grads[w->offset + r * w->ld], &grads[w->offset + r * w->ld] + w->cols);
            expected.insert(expected.end(), &aligned[w->offset + r * w->ld], &aligned[w->offset + r * w->ld] + w->cols);
        }
        Difference d = difference(got.data(), expected.data(), got.size());
        double tolerance = gradient_tolerance(w->name, config->n_layer);
        double *largest = tolerance > gradient_tolerance("", config->n_layer) ? &worst : &worst_other;
        *largest = fmax(*largest, d.error);
        if (d.bad || !(d.error <= tolerance)) {
            bad++;
            printf("     gradient %s %s: error %.3e, %zu not finite; worst at [%lld][%lld]: %.9g, should be %.9g\n", name, w->name, d.error,
                   d.bad, (long long)(d.worst / w->cols), (long long)(d.worst % w->cols), got[d.worst], expected[d.worst]);
        }
    }
    report(score, bad == 0, "gradients %s: %d tensors, %d bad; worst %.1e, of q and k in bf16 %.1e", name, m->num_tensors, bad, worst_other,
           worst);

    // Ten AdamW steps of two micro-batches
    double worst_loss = 0, worst_norm = 0;
    for (int step = 1; step <= 10; step++) {
        double loss, norm, want_loss, want_norm;
        for (int k = 0; k < 2; k++) {
            Batch b = random_batch(seed, (uint64_t)(k + 1), N, V);
            trainer_micro_step(t, b.inputs.data(), b.targets.data(), 0.5 / (double)N, k);
            cpu::trainer_micro_step(reference, b.inputs.data(), b.targets.data(), 0.5 / (double)N, k);
        }
        trainer_update(t, &o, 1e-4, step, &loss, &norm);
        cpu::trainer_update(reference, &o, 1e-4, step, &want_loss, &want_norm);
        worst_loss = fmax(worst_loss, fabs(loss / want_loss - 1)), worst_norm = fmax(worst_norm, fabs(norm / want_norm - 1));
        if (!std::isfinite(loss) || !std::isfinite(norm)) worst_loss = INFINITY;
    }
    report(score, worst_loss <= STEPS_TOLERANCE, "ten steps %s: worst loss off by %.1e of %.0e, worst norm by %.1e", name, worst_loss,
           STEPS_TOLERANCE, worst_norm);
    Floats weights = read_gpu(t->master, m->num_stored);
    report(score, padding_not_zero(m, weights) == 0 && padding_not_zero(m, grads) == 0, "padding %s stays zero", name);
    trainer_close(t);
    cpu::trainer_close(reference);
}

// Steps first .. last - 1 of a run, two micro-batches each; their losses go to `losses`.
static void train_steps(T6 *t, const TrainOptions *o, uint64_t seed, int first, int last, std::vector<double> *losses) {
    int64_t N = o->batch_size * o->seq_len;
    for (int step = first; step < last; step++) {
        double loss, norm;
        for (int k = 0; k < 2; k++) {
            Batch b = random_batch(seed, (uint64_t)(2 * step + k), N, o->config.vocab_size);
            trainer_micro_step(t, b.inputs.data(), b.targets.data(), 0.5 / (double)N, k);
        }
        trainer_update(t, o, 1e-3, step + 1, &loss, &norm);
        losses->push_back(loss);
        losses->push_back(norm);
    }
}

static bool same_bits(T6 *a, T6 *b) {
    HostWeights x = trainer_host_weights(a, 1), y = trainer_host_weights(b, 1);
    size_t bytes = a->model.num_stored * sizeof(float);
    return !memcmp(x.params, y.params, bytes) && !memcmp(x.adam_m, y.adam_m, bytes) && !memcmp(x.adam_v, y.adam_v, bytes);
}

static void test_bits(Score *score, const Config *config, int64_t B, int64_t T, uint64_t seed, const char *name) {
    TrainOptions o = options_of(config, B, T);
    std::vector<double> losses, again, resumed, less[2];
    T6 *t = trainer_open(&o), *other = trainer_open(&o);
    set_weights(t, seed), set_weights(other, seed);
    train_steps(t, &o, seed, 0, 3, &losses);
    T6 *late = trainer_open(&o);                // goes on from t's state of now
    HostWeights from = trainer_host_weights(t, 1), to = trainer_host_weights(late, 0);
    size_t bytes = t->model.num_stored * sizeof(float);
    memcpy(to.params, from.params, bytes), memcpy(to.adam_m, from.adam_m, bytes), memcpy(to.adam_v, from.adam_v, bytes);
    trainer_take_weights(late, 1);
    resumed = losses;
    train_steps(t, &o, seed, 3, 6, &losses);
    train_steps(other, &o, seed, 0, 6, &again);
    train_steps(late, &o, seed, 3, 6, &resumed);
    report(score, losses == again && same_bits(t, other), "two runs of %s: the same bits", name);
    report(score, losses == resumed && same_bits(t, late), "resumed run of %s: the same bits", name);
    for (int r = 0; r < 2; r++) {
        o.recompute = r + 1;
        T6 *small = trainer_open(&o);
        set_weights(small, seed);
        train_steps(small, &o, seed, 0, 6, &less[r]);
        report(score, losses == less[r] && same_bits(t, small), "--recompute %d of %s: the same bits", r + 1, name);
        trainer_close(small);
    }
    trainer_close(t), trainer_close(other), trainer_close(late);
}

// Generating beside train_t6.c: logits after every way to them, and as many greedy tokens by the cache as by running all again.
static void test_generate(Score *score, const Config *config, uint64_t seed, const char *name) {
    const int64_t B = 2, T = 40, more = 60, V = config->vocab_size;
    TrainOptions to = options_of(config, 1, T);
    cpu::T6 *reference = cpu::trainer_open(&to);
    const Model *rm = cpu::trainer_model(reference);
    GenerateOptions o;
    memset(&o, 0, sizeof o);
    o.longest_prefill = T + more;
    Batch batch = random_batch(seed, 5, B * T, V);
    Floats want(B * V), got(B * V);
    for (int fp8 = 0; fp8 < 2; fp8++) {
        o.cache_kind = fp8 ? CACHE_FP8 : CACHE_NATIVE;
        Generator *g = generator_open(&o, config, B, T + more), *again = generator_open(&o, config, 1, T + more);
        const Model *m = generator_model(g);
        for (Generator *x : {g, again}) {
            float *weights = generator_host_weights(x);
            for (int i = 0; i < m->num_tensors; i++) {
                const Tensor *w = &m->tensors[i];
                double size = w->init > 0 ? w->init : 1 / sqrt((double)w->cols);
                for (int64_t r = 0; r < w->rows; r++)
                    for (int64_t c = 0; c < w->cols; c++)
                        weights[w->offset + r * w->ld + c] = rounded((float)(size * (2 * rng_uniform(rng_stream(seed, i), r * w->cols + c) - 1)));
                copy_tensor(rm, cpu::trainer_host_weights(reference, 1).params, m, weights, i);
            }
            generator_take_weights(x);
        }
        Floats all, right;      // logits of both sequences after each way: the tolerance is counted for the norm of many rows
        for (int64_t n : {1, 2, 7, 16}) {       // a prompt, then steps of n tokens; the sequences shifted against each other
            std::vector<int32_t> step(B * n);
            for (int64_t b = 0; b < B; b++) generator_prefill(g, b, &batch.inputs[b * T], T - 16 - b);
            int64_t done = T - 16 - 1;          // of the second sequence
            for (; done + n < T; done += n) {
                for (int64_t b = 0; b < B; b++)
                    for (int64_t i = 0; i < n; i++) step[b * n + i] = batch.inputs[b * T + done + 1 - b + i];
                generator_step(g, step.data(), n);
            }
            generator_logits(g, got.data());
            for (int64_t b = 0; b < B; b++) {
                int64_t length = done + 1 - b;
                std::vector<int32_t> sequence(&batch.inputs[b * T], &batch.inputs[b * T] + length);
                cpu::t6_forward(reference, sequence.data(), 1, length);
                cpu::t6_logits(reference, length - 1, &want[b * V]);
            }
            all.insert(all.end(), got.begin(), got.end()), right.insert(right.end(), want.begin(), want.end());
        }
        double tolerance = fp8 ? 0.1 : logits_tolerance(config->n_layer);
        std::string what = std::string("generate ") + name + (fp8 ? ", fp8 cache" : "") + ": logits after steps of 1 to 16";
        check(score, what.c_str(), all, right, tolerance);
        if (!fp8) {
            int equal = 0, wrong = 0;
            double worst_gap = 0;
            std::vector<int32_t> ids(&batch.inputs[0], &batch.inputs[0] + T);
            Floats full(V);
            for (int64_t b = 0; b < B; b++) generator_prefill(g, b, ids.data(), T);
            for (int64_t i = 0; i < more; i++) {
                SamplerOptions greedy = {0, 0, 1, 0};
                int32_t next[B], best;
                generator_sample(g, &greedy, 0, next);
                generator_prefill(again, 0, ids.data(), (int64_t)ids.size());
                generator_sample(again, &greedy, 0, &best);
                generator_logits(again, full.data());
                // where rounding differs, two tokens that are as good as equal may change places
                double size = 0, gap = full[best] - full[next[0]];
                for (float x : full) size += (double)x * x;
                gap /= sqrt(size / (double)V);
                equal += next[0] == best, wrong += next[0] != best && gap > 3 * logits_tolerance(config->n_layer), worst_gap = fmax(worst_gap, gap);
                ids.push_back(best);
                next[0] = next[1] = best;
                if (i + 1 < more) generator_step(g, next, 1);
            }
            report(score, wrong == 0 && (IS_BF16 || equal == more), "generate %s: %d of %d greedy tokens are those of full recomputation, the others within %.1e of them",
                   name, equal, (int)more, worst_gap);
        }
        generator_close(g), generator_close(again);
    }
    cpu::trainer_close(reference);
}

int main(int argc, char **argv) {
    set_program_name(argv[0]);
    Extent extent = TEST_ALL;
    if (argc == 2 && !strcmp(argv[1], "--small")) extent = TEST_SMALL;
    else if (argc == 2 && !strcmp(argv[1], "--operators")) extent = TEST_OPERATORS;
    else if (argc > 1) die(EXIT_INPUT, "%s: not known; usage: test_t6cu [--small | --operators]", argv[1]);
    TrainOptions o;
    memset(&o, 0, sizeof o);
    trainer_start(&o);
    cpu::trainer_start(&o);
    uint64_t seed = (uint64_t)time(NULL);
    printf("test_t6cu, " PRECISION_NAME ", seed %llu\n", (unsigned long long)seed);
    Score score = {0, 0};
    test_operators(&score, seed, extent);
    // odd heads, widths and lengths that no tile divides; head sizes with and without fast attention
    static const struct { const char *name; Config config; int64_t B, T; bool small; } models[] = {
        //                                  L  C    NH  HS   V      RQ RK RV G  F  rope   eps
        {"tpa 1 layer", {ATTN_TPA,          1, 72,  5,  64,  517,   6, 2, 2, 1, 0, 10000, 1e-6}, 2, 67,  true},
        {"mha 1 layer", {ATTN_MHA,          1, 72,  3,  64,  517,   1, 1, 1, 1, 0, 10000, 1e-6}, 2, 67,  true},
        {"tpa",         {ATTN_TPA,          2, 72,  5,  64,  517,   6, 2, 2, 1, 0, 10000, 1e-6}, 2, 67,  true},
        {"tpa HS128",   {ATTN_TPA,          2, 64,  3,  128, 131,   3, 1, 2, 1, 0, 10000, 1e-6}, 3, 33,  true},
        {"tpa HS32",    {ATTN_TPA,          2, 64,  4,  32,  257,   4, 2, 2, 1, 0, 10000, 1e-6}, 2, 40,  true},
        {"tpa_kvonly",  {ATTN_TPA_KVONLY,   2, 72,  5,  64,  517,   1, 2, 3, 1, 0, 10000, 1e-6}, 2, 67,  true},
        {"mha",         {ATTN_MHA,          2, 72,  3,  64,  517,   1, 1, 1, 1, 0, 10000, 1e-6}, 2, 67,  true},
        {"gqa",         {ATTN_GQA,          2, 72,  6,  64,  517,   1, 1, 1, 2, 0, 10000, 1e-6}, 2, 67,  true},
        {"mqa",         {ATTN_MQA,          2, 72,  5,  64,  517,   1, 1, 1, 1, 0, 10000, 1e-6}, 2, 67,  true},
        {"tpa 124M/4",  {ATTN_TPA,          3, 768, 34, 64,  50257, 6, 2, 2, 1, 0, 10000, 1e-6}, 2, 300, false},
        {"tpa 353M/12", {ATTN_TPA,          2, 1024, 47, 64, 50257, 6, 2, 2, 1, 0, 10000, 1e-6}, 1, 300, false}};
    for (const auto &model : models) {
        Config config = model.config;
        Error err;
        if (extent == TEST_OPERATORS || (extent == TEST_SMALL && !model.small)) continue;
        if (config_check(&config, &err) != 0) die(EXIT_SYSTEM, "%s", err.text);
        test_against_cpu(&score, &config, model.B, model.T, seed, model.name);
        test_bits(&score, &config, model.B, model.T, seed, model.name);
        test_generate(&score, &config, seed, model.name);
    }
    printf("%d passed, %d failed\n", score.passed, score.failed);
    return score.failed != 0;
}
