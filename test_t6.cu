// test_t6cu: proves train_t6.cu right against train_t6.c, which is linked in as a C object with its main switched off.
//
//   ./test_t6cu              every operator, then models of every kind: logits, gradients by name, AdamW steps, bits
//   ./test_t6cu --small      the small sizes only, for compute-sanitizer
//   ./test_t6cu --operators  of these the operators without matrix products, so that only kernels of this project run
//
// Errors are ||a - b|| / ||b|| of a tensor, b from the CPU in fp32 on the same inputs (rounded to bf16 in the bf16
// build). Outputs are filled with NaN before a kernel runs, so that an element left unwritten cannot pass.
#define T6_NO_MAIN
#include "generate_t6.cu"       // includes train_t6.cu

#include <algorithm>
#include <omp.h>
#include <string>
#include <vector>

#include "llmc/real.h"
#include "test/testing.h"

typedef std::vector<float> Floats;

namespace cpu {                 // the reference
#include "train_t6.h"
}

// ---------------------------------------------------------------------------------------------------------------------
// Checks

static const bool IS_BF16 = sizeof(floatX) == 2;
// bf16 keeps 8 bits: rounding to it once moves a tensor by about 2^-9.2 of its norm, and never by more than 2^-8.
static const double ROUNDED_ONCE = IS_BF16 ? 0.0039 : 2e-6;

typedef struct { double error; size_t worst, bad; } Difference;     // bad: elements that are not finite

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
    if (got.size() != want.size()) return report(score, false, "%s: %zu elements, should be %zu", what, got.size(),
                                                 want.size());
    Difference d = difference(got.data(), want.data(), got.size());
    bool ok = d.bad == 0 && d.error <= tolerance;
    if (ok) report(score, true, "%s: error %.1e of %.1e", what, d.error, tolerance);
    else report(score, false, "%s: error %.3e of %.1e, %zu of %zu not finite; worst at %zu: %.9g, should be %.9g", what,
                d.error, tolerance, d.bad, got.size(), d.worst, got.empty() ? 0 : got[d.worst],
                want.empty() ? 0 : want[d.worst]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Arrays

static float rounded(float x) { return (float)(floatX)x; }

static Floats random_floats(Random *random, size_t n, double size = 1) {       // values that floatX holds exactly
    Floats x(n);
    for (float &v : x) v = rounded((float)(size * random_uniform(random)));
    return x;
}

// An array on the GPU. Without values, it holds NaN.
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
    Floats wte = random_floats(random, V * C), dx = random_floats(random, N * C), x(N * C),
        dwte = random_floats(random, V * C);
    std::vector<int32_t> idx(N), groups(encoder_groups_size(N)), counts(V + 1);
    // half of them one token: a long group
    for (auto &i : idx) i = (int32_t)random_below(random, 2) ? (int32_t)random_below(random, V) : 0;
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
    Floats x = random_floats(random, N * C), dout = random_floats(random, N * C), dx = random_floats(random, N * C),
        out(N * C), rstd(N);
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
    cpu::rmsnorm_backward(dx.data(), dout.data(), out.data(), rstd.data(), N, C, ACCUMULATE);
    check(score, (std::string("rmsnorm backward ") + where).c_str(), d_dx.read(), dx, ROUNDED_ONCE);
}

static void test_swiglu(Score *score, Random *random, int64_t N, int64_t Fp) {
    Floats u = random_floats(random, N * 2 * Fp, 8), ds = random_floats(random, N * Fp), s(N * Fp), du(N * 2 * Fp);
    Gpu<floatX> d_u(u), d_ds(ds), d_s(s.size());
    swiglu_forward(d_s.p, d_u.p, N, Fp, 0);
    swiglu_backward_in_place(d_u.p, d_ds.p, N, Fp, 0);
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
    for (auto &t : targets) t = (int32_t)random_below(random, 4) ? (int32_t)random_below(random, V) : (int32_t)V - 1;
    for (int64_t n = 0; n < N; n++) logits[n * Vp + targets[n]] = rounded(10);   // targets that have some probability
    Gpu<floatX> d_logits(logits), d_read_only(logits);
    Gpu<float> d_losses(N), d_losses_only(N);
    Gpu<int32_t> d_targets(targets);
    fused_classifier(d_logits.p, d_losses.p, d_targets.p, N, V, Vp, 1.0 / 64, LOSS_AND_DLOGITS, 0);
    fused_classifier(d_read_only.p, d_losses_only.p, d_targets.p, N, V, Vp, 0, LOSS_ONLY, 0);
    want = logits;
    for (int64_t n = 0; n < N; n++) losses[n] = (float)cpu::softmax_cross_entropy(want.data() + n * Vp, &targets[n], 1,
                                                                                  V, Vp, 1.0 / 64, LOSS_AND_DLOGITS);
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

// What a test says about its model.
static std::string model_words(const Config *c, const Model &m, int64_t B, int64_t T, const char *variant) {
    char where[160];
    snprintf(where, sizeof where, "%s B%d T%d NH%d HS%d R%d,%d,%d %s", attn_name(c->attn), (int)B, (int)T,
             (int)c->n_head, (int)c->head_dim, m.q.R, m.k.R, m.v.R, variant);
    return where;
}

static void test_heads(Score *score, Random *random, const Config *config, int64_t B, int64_t T) {
    Model m;
    model_init(&m, config, PAD);
    int64_t N = B * T, NH = config->n_head, HS = config->head_dim;
    HeadsShape shape = heads_shape(&m, T);
    Floats fac = random_floats(random, N * m.Pp), table(T * HS), dfac(N * m.Pp), rotated;
    rope_table(table.data(), T, HS, config->rope_base);
    rotated = fac;
    cpu::rope(rotated.data(), &m.q, table.data(), B, T, m.Pp, ROTATE);
    cpu::rope(rotated.data(), &m.k, table.data(), B, T, m.Pp, ROTATE);
    const Heads *heads[3] = {&m.q, &m.k, &m.v};
    Floats out[3], want[3], dout[3], rstd[3];
    Gpu<floatX> d_fac(fac), d_dfac(dfac.size()), d_table(1);
    Gpu<float> d_rope(table);
    for (int w = 0; w < 3; w++) {
        int stored = heads_stored(*heads[w], (int)NH), group = (int)NH / stored;
        out[w].resize(N * NH * HS), want[w].resize(N * stored * HS), rstd[w].resize(N * stored);
        dout[w] = random_floats(random, N * stored * HS);
        cpu::contract_forward(out[w].data(), rotated.data(), heads[w], N, NH, m.Pp);
        for (int64_t n = 0; n < N; n++)
            for (int64_t i = 0; i < stored * HS; i++)
                want[w][n * stored * HS + i] = out[w][n * NH * HS + i / HS * group * HS + i % HS];
        Floats before = dout[w], normed;        // the gradient of the heads before the norm
        if (config->qk_norm && w < 2) {
            cpu::rmsnorm_forward(want[w].data(), rstd[w].data(), want[w].data(), N * stored, HS, config->rms_eps);
            normed = want[w];
            for (float &x : normed) x = rounded(x);
            cpu::rmsnorm_backward(before.data(), dout[w].data(), normed.data(), rstd[w].data(), N * stored, HS,
                                  OVERWRITE);
        }
        Floats expanded(N * NH * HS);       // grouped heads: all of the gradient in the first head of a group
        for (int64_t n = 0; n < N; n++)
            for (int64_t i = 0; i < stored * HS; i++)
                expanded[n * NH * HS + i / HS * group * HS + i % HS] = before[n * stored * HS + i];
        cpu::contract_backward(dfac.data(), expanded.data(), rotated.data(), heads[w], N, NH, m.Pp);
    }
    cpu::rope(dfac.data(), &m.q, table.data(), B, T, m.Pp, ROTATE_BACK);
    cpu::rope(dfac.data(), &m.k, table.data(), B, T, m.Pp, ROTATE_BACK);
    Gpu<floatX> q(want[0].size()), k(want[1].size()), v(want[2].size()), dq(dout[0]), dk(dout[1]), dv(dout[2]);
    Gpu<float> rstdq(rstd[0].size()), rstdk(rstd[1].size());
    HeadsGradients gradients = {{{dq.p, q.p, rstdq.p}, {dk.p, k.p, rstdk.p}, {dv.p}}};
    heads_forward(q.p, k.p, v.p, rstdq.p, rstdk.p, d_fac.p, d_rope.p, shape, N, 0);
    heads_backward(d_dfac.p, d_fac.p, d_rope.p, gradients, shape, N, 0);
    std::string where = model_words(config, m, B, T, config->qk_norm ? "qk_norm" : "");
    check(score, ("heads q " + where).c_str(), q.read(), want[0], ROUNDED_ONCE);
    check(score, ("heads k " + where).c_str(), k.read(), want[1], ROUNDED_ONCE);
    check(score, ("heads v " + where).c_str(), v.read(), want[2], ROUNDED_ONCE);
    // with qk_norm the gradients are rounded after the norm, and after the contraction
    double tolerance = ROUNDED_ONCE * (config->qk_norm ? 1.5 : 1);
    check(score, ("heads backward " + where).c_str(), d_dfac.read(), dfac, tolerance);
    heads_backward(d_fac.p, d_fac.p, d_rope.p, gradients, shape, N, 0);
    check(score, ("heads backward in place " + where).c_str(), d_fac.read(), dfac, tolerance);
    model_free(&m);
}

// A variant's factor rows and back.
static void test_factors(Score *score, Random *random, const Config *shape, const char *variant, int64_t B, int64_t T) {
    Config config = *shape;
    Model m;
    set_variant(&config, variant);
    model_init(&m, &config, PAD);
    int64_t N = B * T, NH = config.n_head, Pp = m.Pp, PFp = m.PFp;
    Floats proj = random_floats(random, N * Pp, 2), layer = random_floats(random, m.layer_stride), fac(N * PFp);
    Floats dfac = random_floats(random, N * PFp), dproj = random_floats(random, N * Pp), dlayer(layer.size());
    Floats table_q((size_t)T * m.q.HSR), table_k((size_t)T * m.k.HSR);
    rope_table(table_q.data(), T, m.q.HSR, config.rope_base);
    rope_table(table_k.data(), T, m.k.HSR, config.rope_base);
    Gpu<floatX> d_proj(proj), d_layer(layer), d_fac(fac.size()), d_dfac(dfac), d_dproj(dproj);
    Gpu<float> d_table_q(table_q), d_table_k(table_k);
    FactorsShape s = factors_shape(&m, T);
    factors_forward(d_fac.p, d_proj.p, d_layer.p, d_table_q.p, d_table_k.p, s, N, 0);
    factors_backward(d_dproj.p, d_dfac.p, d_proj.p, d_layer.p, d_table_q.p, d_table_k.p, s, N, 0);
    for (int64_t n = 0; n < N; n++) std::fill_n(dproj.begin() + n * Pp, s.width, 0.0f);
    const Heads *heads[3] = {&m.q, &m.k, &m.v};
    for (int w = 0; w < 3; w++)
        cpu::factors_forward(fac.data(), proj.data(), layer.data(), heads[w], config.head_act,
                             w ? table_k.data() : table_q.data(), B, T, NH, Pp, PFp);
    for (int w = 0; w < 3; w++)
        cpu::factors_backward(dproj.data(), dlayer.data(), dfac.data(), fac.data(), proj.data(), layer.data(), heads[w],
                              config.head_act, w ? table_k.data() : table_q.data(), B, T, NH, Pp, PFp);
    std::string where = model_words(&config, m, B, T, variant);
    check(score, ("factors forward " + where).c_str(), d_fac.read(), fac, ROUNDED_ONCE);
    check(score, ("factors backward " + where).c_str(), d_dproj.read(), dproj, ROUNDED_ONCE);
    size_t first = m.w3 + (size_t)(config.n_embd * m.Fp);
    Gpu<float> d_dlayer(dlayer.size()), d_columns(COLUMN_BLOCKS * PFp);
    Floats constants(dlayer.begin() + (long)first, dlayer.end());
    for (OutputMode mode : {OVERWRITE, ACCUMULATE}) {
        constants_backward(d_dlayer.p, d_columns.p, d_dfac.p, &m, N, mode, 0);
        Floats got = d_dlayer.read(), some(got.begin() + (long)first, got.end());
        for (size_t i = 0; i < some.size(); i++)        // padding was not written
            if (constants[i] == 0) some[i] = 0;
        for (float &x : constants) x *= mode == ACCUMULATE ? 2 : 1;
        if (!some.empty()) check(score, ("factors, constants " + where).c_str(), some, constants, ROUNDED_ONCE);
    }
    model_free(&m);
}

static void test_gain(Score *score, Random *random, int64_t N, int64_t C, int64_t ldx) {
    Floats x = random_floats(random, N * ldx), gain = random_floats(random, C, 2), dout = random_floats(random, N * C);
    Floats out(N * C), rstd(N), dx = x, dgain(C);
    Gpu<floatX> d_x(x), d_gain(gain), d_dout(dout), d_out(out.size());
    Gpu<float> d_rstd(rstd.size()), d_dgain(dgain.size());
    gain_forward(d_out.p, d_rstd.p, d_x.p, ldx, d_gain.p, N, C, 1e-6, 0);
    Gpu<float> d_columns(COLUMN_BLOCKS * C);
    column_sums(d_columns.p, d_dout.p, C, d_x.p, ldx, d_rstd.p, C, N, 0);
    column_total(d_dgain.p, d_columns.p, C, C, OVERWRITE, 0);
    gain_backward(d_x.p, d_dout.p, d_x.p, ldx, d_rstd.p, d_gain.p, N, C, 0);
    cpu::gain_forward(out.data(), rstd.data(), x.data(), ldx, gain.data(), N, C, 1e-6);
    cpu::gain_backward(dx.data(), dgain.data(), dout.data(), x.data(), rstd.data(), ldx, gain.data(), N, C);
    std::string where = "N" + std::to_string(N) + " C" + std::to_string(C);
    check(score, ("gain forward " + where).c_str(), d_out.read(), out, ROUNDED_ONCE);
    check(score, ("gain rstd " + where).c_str(), d_rstd.read(), rstd, 2e-6);
    check(score, ("gain backward " + where).c_str(), d_x.read(), dx, ROUNDED_ONCE);
    check(score, ("gain's gradient " + where).c_str(), d_dgain.read(), dgain, 1e-5);
}

static void test_latent_heads(Score *score, Random *random, const Config *shape, const char *variant, int64_t B,
                              int64_t T) {
    Config config = *shape;
    Model m;
    set_variant(&config, variant);
    model_init(&m, &config, PAD);
    int64_t N = B * T, NH = config.n_head, HSK = m.HSK, HSV = m.HSV, HSR = m.HSR, ldr = m.Pp;
    Floats q = random_floats(random, N * NH * HSK), dq = random_floats(random, q.size()), kv(N * NH * 2 * HSV);
    Floats projected = random_floats(random, N * ldr), dprojected = projected, dk = random_floats(random, q.size());
    Floats k(q.size()), v(N * NH * HSV), table((size_t)(T * HSR)), kr, dkr;
    rope_table(table.data(), T, HSR, config.rope_base);
    for (int64_t i = 0; i < N * NH; i++)            // the heads' gradients of what they share
        dkr.insert(dkr.end(), dk.begin() + i * HSK + HSV, dk.begin() + (i + 1) * HSK);
    Gpu<floatX> d_q(q), d_kr(N * HSR), d_projected(projected), d_dq(dq), d_dkr(dkr);
    Gpu<float> d_table(table);
    LatentShape s = latent_shape(&m, T);
    latent_heads_forward(d_q.p, d_kr.p, d_projected.p, ldr, d_table.p, s, N, 0);
    latent_heads_backward(d_projected.p, ldr, d_dq.p, d_dkr.p, d_table.p, s, N, 0);
    Heads rows = m.q;       // a row of q is its heads
    rows.b = 0;
    cpu::rope(q.data(), &rows, table.data(), B, T, NH * HSK, ROTATE);
    cpu::rope(dq.data(), &rows, table.data(), B, T, NH * HSK, ROTATE_BACK);
    cpu::latent_heads_forward(k.data(), v.data(), kv.data(), projected.data(), ldr, table.data(), B, T, NH, HSV, HSR);
    cpu::latent_heads_backward(kv.data(), dprojected.data(), ldr, dk.data(), v.data(), table.data(), B, T, NH, HSV,
                               HSR);
    for (int64_t n = 0; n < N; n++)
        kr.insert(kr.end(), k.begin() + n * NH * HSK + HSV, k.begin() + n * NH * HSK + HSK);
    std::string where = model_words(&config, m, B, T, variant);
    check(score, ("latent heads q " + where).c_str(), d_q.read(), q, ROUNDED_ONCE);
    check(score, ("latent heads kr " + where).c_str(), d_kr.read(), kr, ROUNDED_ONCE);
    check(score, ("latent heads dq " + where).c_str(), d_dq.read(), dq, ROUNDED_ONCE);
    check(score, ("latent heads dkr " + where).c_str(), d_projected.read(), dprojected, ROUNDED_ONCE);
    model_free(&m);
}

// x (N, NKV, HS) with each head copied to all heads of its group: (N, NH, HS).
static Floats expand_groups(const Floats &x, int64_t N, int NH, int NKV, int HS) {
    Floats out((size_t)N * NH * HS);
    for (int64_t n = 0; n < N; n++)
        for (int h = 0; h < NH; h++)
            for (int d = 0; d < HS; d++) out[(n * NH + h) * HS + d] = x[(n * NKV + h / (NH / NKV)) * HS + d];
    return out;
}

// The gradient of expand_groups: the sums of x (N, NH, HS) over each group, (N, NKV, HS).
static Floats sum_groups(const Floats &x, int64_t N, int NH, int NKV, int HS) {
    Floats out((size_t)N * NKV * HS, 0.0f);
    for (int64_t n = 0; n < N; n++)
        for (int h = 0; h < NH; h++)
            for (int d = 0; d < HS; d++) out[(n * NKV + h / (NH / NKV)) * HS + d] += x[(n * NH + h) * HS + d];
    return out;
}

// Is the output multiplied by the sigmoid of a gate?
enum Gating { PLAIN, GATED };

static void test_attention(Score *score, Random *random, int B, int T, int NH, int NKV, int HSK, int HSV,
                           Gating gating) {
    AttentionShape shape = attention_dense_shape(B, T, NH, NKV, HSK, HSV);
    int64_t N = (int64_t)B * T, D = NH * HSV;
    double scale = 1 / sqrt((double)HSK);
    int64_t rest = HSK - HSV;       // numbers of a key head that all heads share
    Floats q = random_floats(random, N * NH * HSK, 2), kr = random_floats(random, N * rest, 2), k;
    Floats own = random_floats(random, N * NKV * HSV, 2), v = random_floats(random, own.size());
    Floats dy = random_floats(random, N * D);
    // the gate is columns 8 ... D + 7 of rows of D + 24
    shape.gate_stride = D + 24;
    Floats g = random_floats(random, N * shape.gate_stride, 6), dg = g, z(N * D);
    for (int64_t i = 0; i < N * NKV; i++) {
        k.insert(k.end(), own.begin() + i * HSV, own.begin() + (i + 1) * HSV);
        k.insert(k.end(), kr.begin() + i / NKV * rest, kr.begin() + (i / NKV + 1) * rest);
    }
    Floats k_all = expand_groups(k, N, NH, NKV, HSK), v_all = expand_groups(v, N, NH, NKV, HSV);
    Floats y(N * D), lse(N * NH), dq(q.size()), dk_all(q.size()), dv_all(N * D),
        scratch(cpu::attention_scratch_size(T));
    cpu::attention_forward(y.data(), lse.data(), scratch.data(), q.data(), k_all.data(), v_all.data(), B, T, NH, HSK,
                           HSV, D, scale);
    if (gating == GATED) cpu::gate_forward(z.data(), g.data() + 8, shape.gate_stride, y.data(), N, D, D);
    Gpu<floatX> d_q(q), d_k(own), d_v(v), d_kr(kr), d_y(y.size()), d_dy(dy), d_g(g);
    Gpu<floatX> d_dq(q.size()), d_dk(own.size()), d_dv(v.size()), d_dkr(N * NKV * rest);
    AttentionHeads<floatX> heads = {d_q.p, d_k.p, d_v.p, d_kr.p}, gradient = {d_dq.p, d_dk.p, d_dv.p, d_dkr.p};
    floatX *gate = gating == GATED ? d_g.p + 8 : NO_GATE;
    Gpu<float> d_lse(lse.size()), d_scratch(attention_backward_scratch_bytes(shape) / sizeof(float));
    layer_attention_forward(d_y.p, d_lse.p, heads, gate, shape, 0);
    char where[80];
    snprintf(where, sizeof where, "B%d T%d NH%d NKV%d HSK%d HSV%d%s", B, T, NH, NKV, HSK, HSV,
             gating == GATED ? " gated" : "");
    // bf16: probabilities are rounded before they weigh v, and dlogits before they weigh k
    double tolerance = IS_BF16 ? 6e-3 : 1e-5;
    // dy is rounded too, and delta comes from the rounded output: dlogits, differences, feel it
    double dlogits_tolerance = IS_BF16 && gating == GATED ? 1e-2 : tolerance;
    check(score, (std::string("attention forward ") + where).c_str(), d_y.read(), gating == GATED ? z : y, tolerance);
    check(score, (std::string("attention lse ") + where).c_str(), d_lse.read(), lse, 1e-5);
    layer_attention_backward(gradient, gate, d_dy.p, d_y.p, d_lse.p, heads, gate, d_scratch.p, shape, 0);
    if (gating == GATED)
        cpu::gate_backward(dg.data() + 8, dy.data(), g.data() + 8, shape.gate_stride, y.data(), N, D, D);
    cpu::attention_backward(dq.data(), dk_all.data(), dv_all.data(), scratch.data(), dy.data(), y.data(), lse.data(),
                            q.data(), k_all.data(), v_all.data(), B, T, NH, HSK, HSV, D, scale);
    Floats dk = sum_groups(dk_all, N, NH, NKV, HSK), dv = sum_groups(dv_all, N, NH, NKV, HSV);
    // with one token these are 0; the reference has only rounding noise there
    if (T == 1) std::fill(dq.begin(), dq.end(), 0.0f), std::fill(dk.begin(), dk.end(), 0.0f);
    if (gating == GATED) {
        check(score, (std::string("attention dy ") + where).c_str(), d_dy.read(), dy, ROUNDED_ONCE);
        check(score, (std::string("attention dgate ") + where).c_str(), d_g.read(), dg, tolerance);
    }
    check(score, (std::string("attention dq ") + where).c_str(), d_dq.read(), dq, dlogits_tolerance);
    Floats got_own = d_dk.read(), got_rest = d_dkr.read(), got;
    for (int64_t i = 0; i < N * NKV; i++) {
        got.insert(got.end(), got_own.begin() + i * HSV, got_own.begin() + (i + 1) * HSV);
        got.insert(got.end(), got_rest.begin() + i * rest, got_rest.begin() + (i + 1) * rest);
    }
    check(score, (std::string("attention dk ") + where).c_str(), got, dk, dlogits_tolerance);
    check(score, (std::string("attention dv ") + where).c_str(), d_dv.read(), dv, tolerance);
}

static void test_matmul(Score *score, Random *random, Matmul *mm, int64_t N, int64_t IC, int64_t OC) {
    Floats inp = random_floats(random, N * IC), w = random_floats(random, OC * IC),
        dout = random_floats(random, N * OC);
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
    cpu::matmul(out.data(), OC, inp.data(), IC, AS_IS, w.data(), IC, TRANSPOSED, N, OC, IC, ACCUMULATE);
    check(score, (std::string("linear forward, added ") + where).c_str(), d_out.read(), out, ROUNDED_ONCE);
    cpu::matmul(out.data(), OC, inp.data(), IC, AS_IS, w.data(), IC, TRANSPOSED, N, OC, IC, OVERWRITE);
    check(score, (std::string("linear forward ") + where).c_str(), d_overwritten.read(), out, ROUNDED_ONCE);
    cpu::matmul(dinp.data(), IC, dout.data(), OC, AS_IS, w.data(), IC, AS_IS, N, IC, OC, OVERWRITE);
    check(score, (std::string("linear backward input ") + where).c_str(), d_dinp.read(), dinp, ROUNDED_ONCE);
    cpu::matmul(dw.data(), IC, dout.data(), OC, TRANSPOSED, inp.data(), IC, AS_IS, OC, IC, N, ACCUMULATE);
    check(score, (std::string("linear backward weight, added ") + where).c_str(), d_dw.read(), dw, 1e-5);
    cpu::matmul(dw.data(), IC, dout.data(), OC, TRANSPOSED, inp.data(), IC, AS_IS, OC, IC, N, OVERWRITE);
    check(score, (std::string("linear backward weight ") + where).c_str(), d_dw_overwritten.read(), dw, 1e-5);
}

// Two steps; first_steps: moments start at 0, as in training, so that all of them comes from 1 - beta.
static void test_update(Score *score, Random *random, size_t n, double beta2, int first_steps) {
    Floats w(n), m(n), v(n), g(n), want_w, want_m, want_v;
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        w[i] = (float)random_uniform(random), g[i] = (float)random_uniform(random);
        m[i] = first_steps ? 0 : (float)random_uniform(random);
        v[i] = first_steps ? 0 : (float)fabs(random_uniform(random));
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
    for (int step = 1; step <= 2; step++) {     // the formula as is, in double
        double bias_m = 1 - pow(0.9, step), bias_v = 1 - pow(beta2, step);
        adamw_clipped_update(d_params.p, d_w.p, d_m.p, d_v.p, d_g.p, n, adamw_step(lr, 0.9, beta2, 1e-8, 0.1, step),
                             norm, 0);
        for (size_t i = 0; i < n; i++) {
            double gi = g[i] * scale, mi = 0.9 * want_m[i] + 0.1 * gi, vi = beta2 * want_v[i] + (1 - beta2) * gi * gi;
            double m_hat = mi / bias_m, v_hat = vi / bias_v;
            want_w[i] = (float)(want_w[i] * (1 - lr * 0.1) - lr * m_hat / (sqrt(v_hat) + 1e-8));
            want_m[i] = (float)mi, want_v[i] = (float)vi;
        }
    }
    char where[48];
    snprintf(where, sizeof where, " n%zu beta2 %g", n, beta2);
    check(score, (std::string("adamw master weights") + where).c_str(), d_w.read(), want_w, 1e-6);
    check(score, (std::string("adamw m") + where).c_str(), d_m.read(), want_m, 1e-6);
    check(score, (std::string("adamw v") + where).c_str(), d_v.read(), want_v, 1e-6);
    check(score, (std::string("adamw weights") + where).c_str(), d_params.read(), want_w, ROUNDED_ONCE);
    GradientNorm broken = {NAN, 1};
    CUDA_CHECK(cudaMemcpy(norm, &broken, sizeof broken, cudaMemcpyHostToDevice));
    Floats before = d_w.read();
    adamw_clipped_update(d_params.p, d_w.p, d_m.p, d_v.p, d_g.p, n, adamw_step(lr, 0.9, 0.95, 1e-8, 0.1, 3), norm, 0);
    check(score, "adamw skips a gradient that is not finite", d_w.read(), before, 0);
}

typedef enum { TEST_ALL, TEST_SMALL, TEST_OPERATORS } Extent;

static void test_matvec(Score *score, Random *random, int64_t N, int64_t IC, int64_t OC) {
    Floats inp = random_floats(random, N * 2 * IC, 4), w = random_floats(random, OC * IC),
        out = random_floats(random, N * OC), x(N * IC), rstd(N);
    Gpu<floatX> d_inp(inp), d_w(w), d_out(out), d_normed(out.size());
    Gpu<float> d_swiglu(out.size());
    matvec(d_out.p, d_inp.p, d_w.p, N, IC, OC, MATVEC_AS_IS, ACCUMULATE, 0, 0);
    matvec(d_normed.p, d_inp.p, d_w.p, N, IC, OC, MATVEC_NORMED, OVERWRITE, 1e-6, 0);
    matvec(d_swiglu.p, d_inp.p, d_w.p, N, IC, OC, MATVEC_SWIGLU, OVERWRITE, 0, 0);
    char where[64];
    snprintf(where, sizeof where, "N%d IC%d OC%d", (int)N, (int)IC, (int)OC);
    cpu::matmul(out.data(), OC, inp.data(), IC, AS_IS, w.data(), IC, TRANSPOSED, N, OC, IC, ACCUMULATE);
    check(score, (std::string("matvec, added ") + where).c_str(), d_out.read(), out, ROUNDED_ONCE);
    cpu::rmsnorm_forward(x.data(), rstd.data(), inp.data(), N, IC, 1e-6);
    for (float &v : x) v = rounded(v);
    cpu::matmul(out.data(), OC, x.data(), IC, AS_IS, w.data(), IC, TRANSPOSED, N, OC, IC, OVERWRITE);
    check(score, (std::string("matvec of rmsnorm ") + where).c_str(), d_normed.read(), out, ROUNDED_ONCE);
    cpu::swiglu_forward(x.data(), inp.data(), N, IC);
    for (float &v : x) v = rounded(v);
    cpu::matmul(out.data(), OC, x.data(), IC, AS_IS, w.data(), IC, TRANSPOSED, N, OC, IC, OVERWRITE);
    // s is rounded after slightly different arithmetic, so now and then to the other neighbour
    check(score, (std::string("matvec of swiglu ") + where).c_str(), d_swiglu.read(), out, IS_BF16 ? 1e-3 : 2e-6);
}

// A layer's factor rows of B sequences, random, and what attention gives for the last n tokens of each.
struct DecodeCase {
    Model m;
    int64_t B, longest;
    int n;
    std::vector<int32_t> before;    // (B) tokens before the last n
    std::vector<Floats> fac;        // of each sequence (T, Pp), not rotated
    Floats want;                    // (B, n, D)
    std::vector<double> frequencies;
    DecodeCase(const Config *config, const std::vector<int> &totals, int n, Random *random);
    ~DecodeCase() { model_free(&m); }
};

DecodeCase::DecodeCase(const Config *config, const std::vector<int> &totals, int n, Random *random) : n(n) {
    model_init(&m, config, PAD);
    int64_t NH = config->n_head, Pp = m.Pp, D = m.D;
    B = (int64_t)totals.size(), longest = *std::max_element(totals.begin(), totals.end());
    frequencies.resize(m.HSR / 2);
    rope_frequencies(frequencies.data(), m.HSR, config->rope_base);
    Floats table((size_t)longest * m.HSR);
    rope_table(table.data(), longest, m.HSR, config->rope_base);
    for (int64_t b = 0; b < B; b++) {
        int T = totals[b];
        before.push_back(T - n);
        fac.push_back(random_floats(random, (size_t)T * Pp));
        Floats rotated = fac[b], q((size_t)T * NH * m.HSK), k(q.size()), v((size_t)T * D), y(v.size()),
            lse((size_t)NH * T);
        Floats scratch(cpu::attention_scratch_size(T));
        cpu::rope(rotated.data(), &m.q, table.data(), 1, T, Pp, ROTATE);
        cpu::rope(rotated.data(), &m.k, table.data(), 1, T, Pp, ROTATE);
        cpu::contract_forward(q.data(), rotated.data(), &m.q, T, NH, Pp);
        cpu::contract_forward(k.data(), rotated.data(), &m.k, T, NH, Pp);
        cpu::contract_forward(v.data(), rotated.data(), &m.v, T, NH, Pp);
        cpu::attention_forward(y.data(), lse.data(), scratch.data(), q.data(), k.data(), v.data(), 1, T, NH, m.HSK,
                               m.HSV, D, m.scale);
        want.insert(want.end(), y.end() - n * D, y.end());
    }
}

// Decoding against attention over the whole sequence. All of a sequence but its last n tokens is written as a prompt.
static void test_decode(Score *score, Random *random, const Config *config, std::vector<int> totals, int n) {
    DecodeCase c(config, totals, n, random);
    const Model &m = c.m;
    const int64_t Pp = m.Pp, B = c.B, capacity = c.longest + 20, pages = cache_pages(capacity);
    std::vector<int32_t> zeros(B, 0);
    for (CacheKind kind : {CACHE_NATIVE, CACHE_FP8}) {
        CacheShape shape = cache_shape(&m, cache_number_bytes(kind));
        Gpu<unsigned char> cache(cache_layer_bytes(shape, B, capacity));        // poisoned: NaN
        Gpu<int32_t> d_before(c.before), d_zeros(zeros);
        Gpu<double> d_frequencies(c.frequencies);
        CacheWrite write = {.cache = cache.p, .fac = NULL, .lengths = d_zeros.p, .frequencies = d_frequencies.p,
                            .shape = shape, .q = m.q, .k = m.k, .v = m.v, .n = 0, .Pp = (int)Pp, .pages = pages,
                            .rotate_queries = 0};
        Floats queries;
        for (int64_t b = 0; b < B; b++) {
            Gpu<floatX> d_fac(c.fac[b]);
            write.cache = cache.p + b * cache_layer_bytes(shape, 1, capacity), write.fac = d_fac.p,
                write.n = c.before[b];
            if (write.n > 0) cache_write(write, 1, 0);
            CUDA_CHECK(cudaDeviceSynchronize());
            queries.insert(queries.end(), c.fac[b].end() - n * Pp, c.fac[b].end());
        }
        Gpu<floatX> d_queries(queries), fast(c.want.size()), plain(c.want.size()), again(c.want.size());
        Gpu<float> scratch(decode_scratch_bytes(shape, m.q, (int)B, n) / sizeof(float) + 1);
        CUDA_CHECK(cudaMemset(scratch.p, 0, scratch.n * sizeof(float)));
        write.cache = cache.p, write.fac = d_queries.p, write.lengths = d_before.p, write.n = n,
            write.rotate_queries = 1;
        cache_write(write, B, 0);
        DecodeArgs args = {.cache = cache.p, .lengths = d_before.p, .fac = d_queries.p, .out = fast.p,
                           .scratch = scratch.p, .shape = shape, .q = m.q, .B = (int)B, .n = n,
                           .NH = (int)config->n_head, .Pp = (int)Pp, .pages = pages};
        flashtpa_decode(args, 0);
        args.out = again.p;
        flashtpa_decode(args, 0);
        args.out = plain.p;
        decode_plain(args, 0);
        char where[128];
        snprintf(where, sizeof where, "%s%s B%d longest %d n%d NH%d HS%d R%d,%d,%d", attn_name(config->attn),
                 kind == CACHE_FP8 ? " fp8" : "", (int)B, (int)c.longest, n, (int)config->n_head, (int)m.HSV, m.q.R,
                 m.k.R, m.v.R);
        // fp8: a number is off by 2.6% on average, a product of two, summed over 16 tokens and more, by less than
        // both together
        double tolerance = kind == CACHE_FP8 ? 0.08 : IS_BF16 ? 1e-2 : 1e-5;
        check(score, (std::string("decode, plain ") + where).c_str(), plain.read(), c.want, tolerance);
        check(score, (std::string("decode ") + where).c_str(), fast.read(), c.want, tolerance);
        double same = IS_BF16 ? 1e-2 : 0;
        check(score, (std::string("decode next to plain ") + where).c_str(), fast.read(), plain.read(), same);
        check(score, (std::string("decode again ") + where).c_str(), again.read(), fast.read(), 0);
    }
}

// The same draws as on the CPU, where probabilities are rounded differently: one draw in thousands may fall on the
// other side of a boundary.
static void test_sampler(Score *score, Random *random, int64_t V) {
    const SamplerOptions options[] = {{0, 0, 1, 0}, {1, 0, 1, 0}, {0.7, 5, 1, 0}, {1.3, 0, 0.8, 0}, {1, 0, 1, 0.05},
                                      {2, 40, 0.9, 0.01}, {1, 1, 1, 0}, {1, 0, 1e-6, 0}};
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
        int allowed = o.temperature == 0 || o.top_k == 1 ? 0 : 1;
        report(score, different <= allowed, "sampler V%d, temperature %g, top-k %d, top-p %g, min-p %g: %d of 200 "
               "draws differ from the CPU's", (int)V, o.temperature, (int)o.top_k, o.top_p, o.min_p, different);
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
    for (size_t n = 4; n <= 10004; n += 10000)
        test_update(score, &random, n, 0.95, 0), test_update(score, &random, n, 0.999999, 1);
    //                    attn            L  C  NH  HS   V   RQ RK RV G  F  rope   eps
    const Config shapes[] = {
        SHAPE(ATTN_TPA,        1, 64, 34, 64,  61, 6, 2, 2, 1, 0, 10000, 1e-6),
        SHAPE(ATTN_TPA,        1, 64, 5,  128, 61, 1, 3, 4, 1, 0, 10000, 1e-6),
        SHAPE(ATTN_TPA,        1, 64, 3,  32,  61, 16, 2, 5, 1, 0, 100, 1e-6),
        SHAPE(ATTN_TPA_KVONLY, 1, 64, 7,  64,  61, 1, 1, 2, 1, 0, 10000, 1e-6),
        SHAPE(ATTN_MHA,        1, 64, 3,  64,  61, 1, 1, 1, 1, 0, 10000, 1e-6),
        SHAPE(ATTN_GQA,        1, 64, 6,  128, 61, 1, 1, 1, 2, 0, 10000, 1e-6),
        SHAPE(ATTN_MQA,        1, 64, 5,  96,  61, 1, 1, 1, 1, 0, 10000, 1e-6)};
    for (Config c : shapes) {
        test_heads(score, &random, &c, 2, 37);
        c.qk_norm = 1, c.rms_eps = 0.01;    // so that no small head has a large gradient and a large rounding error
        test_heads(score, &random, &c, 2, 37);
    }
    const Config tpa = SHAPE(ATTN_TPA, 1, 64, 34, 64, 61, 6, 2, 2, 1, 0, 10000, 1e-6);
    const Config kvonly = SHAPE(ATTN_TPA_KVONLY, 1, 64, 7, 64, 61, 1, 3, 2, 1, 0, 10000, 1e-6);
    const Config gqa = SHAPE(ATTN_GQA, 1, 64, 6, 32, 61, 1, 1, 1, 2, 0, 10000, 1e-6);
    const Config mla = SHAPE(ATTN_MLA, 1, 64, 5, 64, 61, 1, 1, 1, 1, 0, 10000, 1e-6);
    for (const char *variant : {"a_constant", "b_constant", "share_kv_b", "b_dim=16", "b_dim=4", "head_act=sigmoid",
                                "head_act=softmax", "kv_shift", "kv_shift out_gate", "b_constant share_kv_b",
                                "share_kv_b b_dim=8 head_act=softmax kv_shift out_gate", "a_constant kv_shift"})
        test_factors(score, &random, &tpa, variant, 2, 37);
    for (const char *variant : {"a_constant b_dim=16 kv_shift", "b_constant head_act=sigmoid", "kv_shift"})
        test_factors(score, &random, &kvonly, variant, 3, 21);
    test_factors(score, &random, &gqa, "kv_shift out_gate", 2, 37);
    test_gain(score, &random, 3, 8, 24);
    test_gain(score, &random, 130, 776, 1000);
    test_latent_heads(score, &random, &mla, "q_lora=40 kv_lora=24 rope_dim=32", 2, 37);
    test_latent_heads(score, &random, &mla, "q_lora=8 kv_lora=8 rope_dim=8 out_gate", 2, 37);
    test_attention(score, &random, 2, 1, 1, 1, 64, 64, PLAIN);
    test_attention(score, &random, 2, 1, 3, 3, 96, 64, PLAIN);
    for (Gating gating : {PLAIN, GATED}) {
        test_attention(score, &random, 2, 77, 3, 3, 64, 64, gating);
        test_attention(score, &random, 1, 700, 4, 2, 64, 64, gating);
        test_attention(score, &random, 2, 70, 4, 2, 96, 64, gating);
        test_attention(score, &random, 1, 513, 3, 3, 96, 64, gating);
        test_attention(score, &random, 1, 130, 6, 2, 128, 128, gating);
        test_attention(score, &random, 1, 67, 4, 1, 96, 96, gating);
        test_attention(score, &random, 1, 45, 4, 4, 48, 32, gating);
    }
    test_matvec(score, &random, 1, 64, 7);
    test_matvec(score, &random, 3, 2176, 770);
    const Config decoded[] = {
        SHAPE(ATTN_TPA,        1, 64, 34, 64,  61, 6,  2, 2, 1, 0, 10000, 1e-6),
        SHAPE(ATTN_TPA,        1, 64, 5,  128, 61, 16, 1, 4, 1, 0, 10000, 1e-6),
        SHAPE(ATTN_TPA,        1, 64, 3,  32,  61, 20, 5, 1, 1, 0, 100, 1e-6),
        SHAPE(ATTN_TPA_KVONLY, 1, 64, 7,  64,  61, 1,  1, 1, 1, 0, 10000, 1e-6),
        SHAPE(ATTN_MHA,        1, 64, 3,  64,  61, 1,  1, 1, 1, 0, 10000, 1e-6),
        SHAPE(ATTN_GQA,        1, 64, 6,  128, 61, 1,  1, 1, 2, 0, 10000, 1e-6),
        SHAPE(ATTN_MQA,        1, 64, 5,  96,  61, 1,  1, 1, 1, 0, 10000, 1e-6)};
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
        test_update(score, &random, 3000004, 0.95, 0);
        Config c = SHAPE(ATTN_TPA, 1, 64, 78, 64, 61, 6, 2, 2, 1, 0, 10000, 1e-6);
        test_heads(score, &random, &c, 3, 700);
        test_factors(score, &random, &c, "kv_shift", 3, 700);
        test_factors(score, &random, &c, "a_constant", 3, 700);
        test_gain(score, &random, 5000, 1024, 1568);
        for (Gating gating : {PLAIN, GATED}) {
            test_attention(score, &random, 2, 1000, 5, 5, 64, 64, gating);
            test_attention(score, &random, 3, 1000, 12, 12, 96, 64, gating);
            test_attention(score, &random, 1, 513, 8, 2, 128, 128, gating);
        }
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

// Copies tensor i from one layout of the model to another.
static void copy_tensor(const Model *to_model, float *to, const Model *from_model, const float *from, int i) {
    const Tensor *a = &to_model->tensors[i], *b = &from_model->tensors[i];
    for (int64_t r = 0; r < a->rows; r++) memcpy(to + a->offset + r * a->ld, from + b->offset + r * b->ld,
                                                 (size_t)a->cols * sizeof *to);
}

static Floats read_gpu(const float *p, size_t n) {
    Floats x(n);
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(x.data(), p, n * sizeof(float), cudaMemcpyDeviceToHost));
    return x;
}

// Random weights that fp32 and floatX both hold exactly.
static void rounded_weights(float *params, const Model *m, uint64_t seed) {
    random_weights(params, m, seed, 0);
    for (size_t i = 0; i < m->num_stored; i++) params[i] = rounded(params[i]);
}

static void set_weights(T6 *t, uint64_t seed) {
    rounded_weights(t6_host_weights(t, ROOM_ONLY).params, &t->model, seed);
    t6_load_weights(t, WEIGHTS_ONLY);
}

typedef struct { std::vector<int32_t> inputs, targets; } Batch;
static Batch random_batch(uint64_t seed, uint64_t i, int64_t N, int64_t V) {
    Random random = {rng_stream(seed, 1000 + i), 0};
    Batch b;
    for (int64_t n = 0; n < N; n++) b.inputs.push_back((int32_t)random_below(&random, V)),
        b.targets.push_back((int32_t)random_below(&random, V));
    return b;
}

// The errors of a bf16 model. Rounding a tensor once puts it off by 2^-9.2 = 0.17% of its norm, and independent
// roundings add as squares. On the way to the logits there are 14 roundings per layer: x twice, n1, fac, the rotated
// b twice, q, k, p, v, y, n2, u, s; and a few at the ends. On the way to a gradient there are as many again. That
// makes 1.0% for the gradients of one layer, 1.4% for two and 1.7% for three; measured are 0.75%, 1.2% and 1.55% at
// most. So 1% is allowed for one layer, and for two where the way is short (lm_head; v of dense kinds, which no
// factor rounds), and elsewhere the count. Gradients of q and k get twice the count (measured: 0.9%, 2.1% and 2.5%):
// they come through ds = p (dp - delta), a difference of numbers that are nearly equal when attention is nearly
// uniform, as with random weights, and the roundings count relative to the difference. With head_act or constants
// attention is more uniform still: three times the count (measured: 3.5%), and as much for kv_shift's gates, whose
// gradients come through a difference too, b of a token minus b of the one before. Variants round their rows twice, so
// no way is short: one more rounding on v's way, and with third order one of c on the ways of q, k and v (1.5%
// measured for two layers).
static double logits_tolerance(int64_t L) { return IS_BF16 ? 0.0017 * sqrt(5.0 + 14.0 * (double)L) : 1e-4; }
static double gradient_tolerance(const char *name, const Model *m) {
    if (!IS_BF16) return 1e-4;
    int64_t L = m->config.n_layer, per_layer = 14 + !model_is_plain(m) + 3 * (m->config.b_dim > 0);
    double counted = 0.0017 * sqrt(10.0 + 2.0 * (double)(per_layer * L));
    // weights, constants and latents of q and k; kv_shift's gates
    for (const char *part : {"_q.weight", "_k.weight", ".A_q", ".A_k", ".B_q", ".B_k", ".q_a_", ".q_b_", ".W_S_"})
        if (strstr(name, part)) return (model_is_plain(m) ? 2 : 3) * counted;
    bool short_way = model_is_plain(m) && (strstr(name, "lm_head.") || strstr(name, ".c_v."));
    return L == 1 || (L == 2 && short_way) ? 1e-2 : counted;
}
// AdamW's first steps have the size lr whatever the gradient, so a gradient below its own rounding error steps the
// wrong way.
static const double STEPS_TOLERANCE = IS_BF16 ? 5e-2 : 1e-4;

static void test_against_cpu(Score *score, const Config *config, int64_t B, int64_t T, uint64_t seed,
                             const char *name) {
    TrainOptions o = options_of(config, B, T);
    T6 *t = t6_open(&o);
    cpu::T6 *reference = cpu::t6_open(&o);
    const Model *m = t6_model(t), *rm = cpu::t6_model(reference);
    int64_t N = B * T, V = config->vocab_size, C = config->n_embd;
    set_weights(t, seed);
    for (int i = 0; i < m->num_tensors; i++) copy_tensor(rm, cpu::t6_host_weights(reference, WITH_VALUES).params, m,
                                                         t->host.params, i);

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
    t6_micro_step(t, batch.inputs.data(), batch.targets.data(), 1.0 / (double)N, 0);
    cpu::t6_micro_step(reference, batch.inputs.data(), batch.targets.data(), 1.0 / (double)N, 0);
    Floats grads = read_gpu(t->grads, m->num_stored), aligned(m->num_stored);
    double worst = 0, worst_other = 0;       // of tensors with the larger tolerance (q and k in bf16), of the others
    int bad = 0;
    for (int i = 0; i < m->num_tensors; i++) {
        const Tensor *w = &m->tensors[i];
        copy_tensor(m, aligned.data(), rm, cpu::t6_gradients(reference), i);
        Floats got, expected;
        for (int64_t r = 0; r < w->rows; r++) {
            got.insert(got.end(), &grads[w->offset + r * w->ld], &grads[w->offset + r * w->ld] + w->cols);
            expected.insert(expected.end(), &aligned[w->offset + r * w->ld], &aligned[w->offset + r * w->ld] + w->cols);
        }
        Difference d = difference(got.data(), expected.data(), got.size());
        double tolerance = gradient_tolerance(w->name, m);
        double *largest = tolerance > gradient_tolerance("", m) ? &worst : &worst_other;
        *largest = fmax(*largest, d.error);
        if (d.bad || !(d.error <= tolerance)) {
            bad++;
            printf("     gradient %s %s: error %.3e, %zu not finite; worst at [%lld][%lld]: %.9g, should be %.9g\n",
                   name, w->name, d.error, d.bad, (long long)(d.worst / w->cols), (long long)(d.worst % w->cols),
                   got[d.worst], expected[d.worst]);
        }
    }
    report(score, bad == 0, "gradients %s: %d tensors, %d bad; worst %.1e, of q and k in bf16 %.1e", name,
           m->num_tensors, bad, worst_other, worst);

    // Ten AdamW steps of two micro-batches
    double worst_loss = 0, worst_norm = 0;
    for (int step = 1; step <= 10; step++) {
        double loss, norm, want_loss, want_norm;
        for (int k = 0; k < 2; k++) {
            Batch b = random_batch(seed, (uint64_t)(k + 1), N, V);
            t6_micro_step(t, b.inputs.data(), b.targets.data(), 0.5 / (double)N, k);
            cpu::t6_micro_step(reference, b.inputs.data(), b.targets.data(), 0.5 / (double)N, k);
        }
        t6_update(t, &o, 1e-4, step, &loss, &norm);
        cpu::t6_update(reference, &o, 1e-4, step, &want_loss, &want_norm);
        worst_loss = fmax(worst_loss, fabs(loss / want_loss - 1)), worst_norm = fmax(worst_norm,
                                                                                     fabs(norm / want_norm - 1));
        if (!std::isfinite(loss) || !std::isfinite(norm)) worst_loss = INFINITY;
    }
    report(score, worst_loss <= STEPS_TOLERANCE, "ten steps %s: worst loss off by %.1e of %.0e, worst norm by %.1e",
           name, worst_loss, STEPS_TOLERANCE, worst_norm);
    Floats weights = read_gpu(t->master, m->num_stored);
    report(score, nonzero_padding(m, weights.data()) + nonzero_padding(m, grads.data()) == 0, "padding %s stays zero",
           name);
    t6_close(t);
    cpu::t6_close(reference);
}

// Steps first .. last - 1 of a run, two micro-batches each. Appends the loss and the norm of each to `losses`.
static void train_steps(T6 *t, const TrainOptions *o, uint64_t seed, int first, int last, std::vector<double> *losses) {
    int64_t N = o->batch_size * o->seq_len;
    for (int step = first; step < last; step++) {
        double loss, norm;
        for (int k = 0; k < 2; k++) {
            Batch b = random_batch(seed, (uint64_t)(2 * step + k), N, o->config.vocab_size);
            t6_micro_step(t, b.inputs.data(), b.targets.data(), 0.5 / (double)N, k);
        }
        t6_update(t, o, 1e-3, step + 1, &loss, &norm);
        losses->push_back(loss);
        losses->push_back(norm);
    }
}

static bool same_bits(T6 *a, T6 *b) {
    HostWeights x = t6_host_weights(a, WITH_VALUES), y = t6_host_weights(b, WITH_VALUES);
    size_t bytes = a->model.num_stored * sizeof(float);
    return !memcmp(x.params, y.params, bytes) && !memcmp(x.adam_m, y.adam_m, bytes) && !memcmp(x.adam_v, y.adam_v,
                                                                                               bytes);
}

static void test_bits(Score *score, const Config *config, int64_t B, int64_t T, uint64_t seed, const char *name) {
    TrainOptions o = options_of(config, B, T);
    std::vector<double> losses, again, resumed;
    T6 *t = t6_open(&o), *other = t6_open(&o);
    set_weights(t, seed), set_weights(other, seed);
    train_steps(t, &o, seed, 0, 3, &losses);
    T6 *late = t6_open(&o);                // resumes from the state that t has now
    HostWeights from = t6_host_weights(t, WITH_VALUES), to = t6_host_weights(late, ROOM_ONLY);
    size_t bytes = t->model.num_stored * sizeof(float);
    memcpy(to.params, from.params, bytes), memcpy(to.adam_m, from.adam_m, bytes), memcpy(to.adam_v, from.adam_v, bytes);
    t6_load_weights(late, WEIGHTS_AND_MOMENTS);
    resumed = losses;
    train_steps(t, &o, seed, 3, 6, &losses);
    train_steps(other, &o, seed, 0, 6, &again);
    train_steps(late, &o, seed, 3, 6, &resumed);
    report(score, losses == again && same_bits(t, other), "two runs of %s: the same bits", name);
    report(score, losses == resumed && same_bits(t, late), "resumed run of %s: the same bits", name);
    for (int level : {RECOMPUTE_NOTHING, RECOMPUTE_MLP, RECOMPUTE_FACTORS}) {       // t and the others: RECOMPUTE_HEADS
        o.recompute = level;
        T6 *small = t6_open(&o);
        std::vector<double> less;
        set_weights(small, seed);
        train_steps(small, &o, seed, 0, 6, &less);
        report(score, losses == less && same_bits(t, small), "--recompute %d of %s: the same bits", level, name);
        t6_close(small);
    }
    t6_close(t), t6_close(other), t6_close(late);
}

// Logits after a prompt and steps of n tokens, the two sequences shifted by one token against each other, appended to
// `got`; those of the reference to `want`.
static void logits_after_steps(Floats *got, Floats *want, Generator *g, cpu::T6 *reference, const Batch &batch,
                               int64_t T, int64_t n, int64_t V) {
    const int64_t B = 2;
    std::vector<int32_t> step(B * n);
    for (int64_t b = 0; b < B; b++) generator_prefill(g, b, &batch.inputs[b * T], T - 16 - b);
    int64_t done = T - 16 - 1;          // of the second sequence
    for (; done + n < T; done += n) {
        for (int64_t b = 0; b < B; b++)
            for (int64_t i = 0; i < n; i++) step[b * n + i] = batch.inputs[b * T + done + 1 - b + i];
        generator_step(g, step.data(), n);
    }
    Floats logits(B * V), expected(V);
    generator_logits(g, logits.data());
    got->insert(got->end(), logits.begin(), logits.end());
    for (int64_t b = 0; b < B; b++) {
        int64_t length = done + 1 - b;
        cpu::t6_forward(reference, &batch.inputs[b * T], 1, length);
        cpu::t6_logits(reference, length - 1, expected.data());
        want->insert(want->end(), expected.begin(), expected.end());
    }
}

// Greedy tokens by the cache (g, two equal sequences) and by running the whole text again (again). Where rounding
// differs, two tokens that are nearly equally likely may change places.
static void test_greedy(Score *score, Generator *g, Generator *again, const int32_t *prompt, int64_t T, int more,
                        double gap_allowed, const char *name) {
    const int64_t V = generator_model(g)->config.vocab_size;
    int equal = 0, wrong = 0;
    double worst_gap = 0;
    std::vector<int32_t> ids(prompt, prompt + T);
    Floats full(V);
    SamplerOptions greedy = {0, 0, 1, 0};
    for (int64_t b = 0; b < 2; b++) generator_prefill(g, b, ids.data(), T);
    for (int i = 0; i < more; i++) {
        int32_t next[2], best;
        generator_sample(g, &greedy, 0, next);
        generator_prefill(again, 0, ids.data(), (int64_t)ids.size());
        generator_sample(again, &greedy, 0, &best);
        generator_logits(again, full.data());
        double size = 0, gap = full[best] - full[next[0]];
        for (float x : full) size += (double)x * x;
        gap /= sqrt(size / (double)V);
        equal += next[0] == best, wrong += next[0] != best && gap > gap_allowed, worst_gap = fmax(worst_gap, gap);
        ids.push_back(best);
        next[0] = next[1] = best;
        if (i + 1 < more) generator_step(g, next, 1);
    }
    report(score, wrong == 0 && (IS_BF16 || equal == more), "generate %s: %d of %d greedy tokens are those of full "
           "recomputation, the others within %.1e of them", name, equal, more, worst_gap);
}

// Generating against train_t6.c: logits after every way to them, and greedy tokens.
static void test_generate(Score *score, const Config *config, uint64_t seed, const char *name) {
    const int64_t B = 2, T = 40, V = config->vocab_size;
    const int more = 60;
    TrainOptions to = options_of(config, 1, T);
    cpu::T6 *reference = cpu::t6_open(&to);
    const Model *rm = cpu::t6_model(reference);
    GenerateOptions o;
    memset(&o, 0, sizeof o);
    o.longest_prefill = T + more;
    Batch batch = random_batch(seed, 5, B * T, V);
    for (CacheKind kind : {CACHE_NATIVE, CACHE_FP8}) {
        o.cache_kind = kind;
        Generator *g = generator_open(&o, config, B, T + more), *again = generator_open(&o, config, 1, T + more);
        const Model *m = generator_model(g);
        for (Generator *x : {g, again}) {
            float *weights = generator_host_weights(x);
            rounded_weights(weights, m, seed);
            for (int i = 0; i < m->num_tensors; i++)
                copy_tensor(rm, cpu::t6_host_weights(reference, WITH_VALUES).params, m, weights, i);
            generator_load_weights(x);
        }
        Floats got, want;       // of both sequences and all ways: the tolerance is for the norm of many rows
        for (int64_t n : {1, 2, 7, 16}) logits_after_steps(&got, &want, g, reference, batch, T, n, V);
        double rounding = logits_tolerance(config->n_layer), tolerance = kind == CACHE_FP8 ? 0.1 : rounding;
        std::string what = std::string("generate ") + name + (kind == CACHE_FP8 ? ", fp8 cache" : "") +
                           ": logits after steps of 1 to 16";
        check(score, what.c_str(), got, want, tolerance);
        if (kind == CACHE_NATIVE) test_greedy(score, g, again, batch.inputs.data(), T, more, 3 * rounding, name);
        generator_close(g), generator_close(again);
    }
    cpu::t6_close(reference);
}

int main(int argc, char **argv) {
    program_start(argv[0]);
    Extent extent = TEST_ALL;
    if (argc == 2 && !strcmp(argv[1], "--small")) extent = TEST_SMALL;
    else if (argc == 2 && !strcmp(argv[1], "--operators")) extent = TEST_OPERATORS;
    else if (argc > 1) die(EXIT_INPUT, "%s: not known; usage: test_t6cu [--small | --operators]", argv[1]);
    TrainOptions o;
    memset(&o, 0, sizeof o);
    t6_start(&o);
    cpu::t6_start(&o);
    uint64_t seed = (uint64_t)time(NULL);
    printf("test_t6cu, " PRECISION_NAME ", seed %llu\n", (unsigned long long)seed);
    Score score = {0, 0};
    test_operators(&score, seed, extent);
    // odd heads, widths and lengths that no tile divides; head sizes with and without fast attention
    static const struct { const char *name; Config config; int64_t B, T; bool small; const char *variant; } models[] = {
        //                                            L  C     NH  HS   V      RQ RK RV G  F  rope   eps    B  T
        {"tpa 1 layer", SHAPE(ATTN_TPA,        1, 72,   5,  64,  517,   6, 2, 2, 1, 0, 10000, 1e-6), 2, 67,  true,  ""},
        {"mha 1 layer", SHAPE(ATTN_MHA,        1, 72,   3,  64,  517,   1, 1, 1, 1, 0, 10000, 1e-6), 2, 67,  true,  ""},
        {"tpa",         SHAPE(ATTN_TPA,        2, 72,   5,  64,  517,   6, 2, 2, 1, 0, 10000, 1e-6), 2, 67,  true,  ""},
        {"tpa HS128",   SHAPE(ATTN_TPA,        2, 64,   3,  128, 131,   3, 1, 2, 1, 0, 10000, 1e-6), 3, 33,  true,  ""},
        {"tpa HS32",    SHAPE(ATTN_TPA,        2, 64,   4,  32,  257,   4, 2, 2, 1, 0, 10000, 1e-6), 2, 40,  true,  ""},
        {"tpa_kvonly",  SHAPE(ATTN_TPA_KVONLY, 2, 72,   5,  64,  517,   1, 2, 3, 1, 0, 10000, 1e-6), 2, 67,  true,  ""},
        {"mha",         SHAPE(ATTN_MHA,        2, 72,   3,  64,  517,   1, 1, 1, 1, 0, 10000, 1e-6), 2, 67,  true,  ""},
        {"gqa",         SHAPE(ATTN_GQA,        2, 72,   6,  64,  517,   1, 1, 1, 2, 0, 10000, 1e-6), 2, 67,  true,  ""},
        {"mqa",         SHAPE(ATTN_MQA,        2, 72,   5,  64,  517,   1, 1, 1, 1, 0, 10000, 1e-6), 2, 67,  true,  ""},
        {"mla",         SHAPE(ATTN_MLA,        2, 72,   3,  64,  517,   1, 1, 1, 1, 0, 10000, 1e-6), 2, 67,  true,
         "q_lora=40 kv_lora=24 rope_dim=32"},
        {"mla NH12",    SHAPE(ATTN_MLA,        2, 72,   12, 64,  517,   1, 1, 1, 1, 0, 10000, 1e-6), 2, 67,  true,
         "q_lora=64 kv_lora=256 rope_dim=32"},          // the latents of the fast decoding kernel
        {"mla HS32",    SHAPE(ATTN_MLA,        2, 72,   3,  32,  517,   1, 1, 1, 1, 0, 10000, 1e-6), 2, 67,  true,
         "q_lora=64 kv_lora=32 rope_dim=16 out_gate"},
        // each variant and switch alone
        {"tpa",         SHAPE(ATTN_TPA,        2, 72,   5,  64,  517,   6, 2, 2, 1, 0, 10000, 1e-6), 2, 67,  true,
         "a_constant"},
        {"tpa",         SHAPE(ATTN_TPA,        2, 72,   5,  64,  517,   6, 2, 2, 1, 0, 10000, 1e-6), 2, 67,  true,
         "b_constant"},
        {"tpa",         SHAPE(ATTN_TPA,        2, 72,   5,  64,  517,   6, 2, 2, 1, 0, 10000, 1e-6), 2, 67,  true,
         "share_kv_b"},
        {"tpa",         SHAPE(ATTN_TPA,        2, 72,   5,  64,  517,   6, 2, 2, 1, 0, 10000, 1e-6), 2, 67,  true,
         "b_dim=16"},
        {"tpa",         SHAPE(ATTN_TPA,        2, 72,   5,  64,  517,   6, 2, 2, 1, 0, 10000, 1e-6), 2, 67,  true,
         "head_act=sigmoid"},
        {"tpa",         SHAPE(ATTN_TPA,        2, 72,   5,  64,  517,   6, 2, 2, 1, 0, 10000, 1e-6), 2, 67,  true,
         "head_act=softmax"},
        {"tpa",         SHAPE(ATTN_TPA,        2, 72,   5,  64,  517,   6, 2, 2, 1, 0, 10000, 1e-6), 2, 67,  true,
         "out_gate"},
        {"tpa",         SHAPE(ATTN_TPA,        2, 72,   5,  64,  517,   6, 2, 2, 1, 0, 10000, 1e-6), 2, 67,  true,
         "kv_shift"},
        {"tpa",         SHAPE(ATTN_TPA,        2, 72,   5,  64,  517,   6, 2, 2, 1, 0, 10000, 1e-3), 2, 67,  true,
         "qk_norm"},
        {"mha",         SHAPE(ATTN_MHA,        2, 72,   3,  64,  517,   1, 1, 1, 1, 0, 10000, 1e-3), 2, 67,  true,
         "qk_norm kv_shift out_gate"},
        {"gqa",         SHAPE(ATTN_GQA,        2, 72,   6,  64,  517,   1, 1, 1, 2, 0, 10000, 1e-6), 2, 67,  true,
         "qk_norm kv_shift"},
        {"mqa HS96",    SHAPE(ATTN_MQA,        2, 72,   3,  96,  517,   1, 1, 1, 1, 0, 10000, 1e-3), 2, 67,  true,
         "qk_norm out_gate"},
        // together
        {"tpa",         SHAPE(ATTN_TPA,        2, 72,   5,  64,  517,   3, 2, 2, 1, 0, 10000, 1e-3), 2, 67,  true,
         "share_kv_b b_dim=8 head_act=softmax out_gate kv_shift qk_norm"},
        {"tpa HS32",    SHAPE(ATTN_TPA,        2, 64,   4,  32,  257,   4, 3, 3, 1, 0, 10000, 1e-3), 2, 40,  true,
         "a_constant share_kv_b kv_shift qk_norm out_gate"},
        {"tpa_kvonly",  SHAPE(ATTN_TPA_KVONLY, 2, 72,   5,  64,  517,   1, 2, 2, 1, 0, 10000, 1e-3), 2, 67,  true,
         "b_constant share_kv_b head_act=sigmoid qk_norm"},
        {"tpa_kvonly",  SHAPE(ATTN_TPA_KVONLY, 2, 72,   5,  64,  517,   1, 1, 3, 1, 0, 10000, 1e-6), 2, 67,  true,
         "b_dim=16 kv_shift out_gate"},
        {"tpa 124M/4",  SHAPE(ATTN_TPA,        3, 768,  34, 64,  50257, 6, 2, 2, 1, 0, 10000, 1e-6), 2, 300, false, ""},
        {"mla 124M/4",  SHAPE(ATTN_MLA,        3, 768,  12, 64,  50257, 1, 1, 1, 1, 0, 10000, 1e-6), 2, 300, false,
         "q_lora=512 kv_lora=256 rope_dim=32"},
        {"tpa 353M/12", SHAPE(ATTN_TPA,        2, 1024, 47, 64, 50257, 6, 2, 2, 1, 0, 10000, 1e-6), 1, 300, false, ""}};
    for (int kind = 0; kind < NUM_ATTN_KINDS; kind++) {
        int cases = 0;
        for (const auto &model : models) cases += (int)model.config.attn == kind;
        report(&score, cases > 0, "whole models: %d of %s", cases, attn_name((AttnKind)kind));
    }
    for (const auto &model : models) {
        Config config = model.config;
        Error err;
        if (extent == TEST_OPERATORS || (extent == TEST_SMALL && !model.small)) continue;
        set_variant(&config, model.variant);
        if (config_check(&config, &err) != 0) die(EXIT_SYSTEM, "%s", err.text);
        std::string name = std::string(model.name) + (*model.variant ? " " : "") + model.variant;
        test_against_cpu(&score, &config, model.B, model.T, seed, name.c_str());
        test_bits(&score, &config, model.B, model.T, seed, name.c_str());
        test_generate(&score, &config, seed, name.c_str());
    }
    return finish(&score);
}
