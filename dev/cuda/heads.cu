// Heads from factors, with RoPE: checks and times llmc/heads.cuh on a preset's tpa model.
//
//   make build/heads
//   build/heads [B [T [PRESET]]]             the defaults: 24 1024 124M
//
// Versions, with times at 124M, B 24, on one H200 (dev/LOG.md, 2026-11-24, has those that lost):
//   forward 1    the trainer's: one warp per token, plain instructions               0.104 ms
//   backward 1   the trainer's: the sums on the tensor cores (in bf16)               0.180 ms
#include "bench.cuh"
#include "../../llmc/heads.cuh"

int main(int argc, char **argv) {
    program_start(argv[0]);
    int64_t B = argument(argc, argv, 1, 24), T = argument(argc, argv, 2, 1024), N = B * T;
    const Preset *p = find_preset(argc > 3 ? argv[3] : "124M");
    if (!p) die(EXIT_INPUT, "usage: heads [B [T [PRESET]]]");
    Config config = preset_config(p, ATTN_TPA);
    Model m;
    model_init(&m, &config, 8);
    int64_t NH = config.n_head, HS = m.HSK, D = m.D, rows = std::min<int64_t>(N, 20);
    HeadsShape shape = heads_shape(&m, T);
    std::vector<float> host_table(T * HS);
    rope_table(host_table.data(), T, HS, config.rope_base);
    Array<float> table(host_table);
    Array<floatX> fac(N * m.Pp, 1, 1), dfac(N * m.Pp), q(N * D), k(N * D), v(N * D);
    Array<floatX> dq(N * D, 2, 1), dk(N * D, 3, 1), dv(N * D, 4, 1);

    // reference: the last tokens on the CPU, in double
    std::vector<floatX> f = fac.read((N - rows) * m.Pp, rows * m.Pp);
    const Heads *heads[3] = {&m.q, &m.k, &m.v};
    Array<floatX> *out[3] = {&q, &k, &v}, *gradient[3] = {&dq, &dk, &dv};
    std::vector<double> want[3], want_dfac(rows * m.Pp, 0);
    for (int w = 0; w < 3; w++) {
        const Heads &h = *heads[w];
        std::vector<floatX> g = gradient[w]->read((N - rows) * D, rows * D);
        want[w].assign(rows * D, 0);
        for (int64_t n = 0; n < rows; n++)
            for (int r = 0; r < h.R; r++) {
                std::vector<double> b(HS), db(HS, 0);
                const float *angles = &host_table[(N - rows + n) % T * HS];
                for (int64_t i = 0; i < HS / 2; i++) {
                    double x = (float)f[n * m.Pp + h.b + r * HS + i];
                    double y = (float)f[n * m.Pp + h.b + r * HS + HS / 2 + i];
                    double c = h.HSR ? angles[i] : 1, s = h.HSR ? angles[HS / 2 + i] : 0;
                    b[i] = x * c + y * s, b[HS / 2 + i] = y * c - x * s;
                }
                for (int64_t i = 0; i < NH; i++) {
                    double a = (float)f[n * m.Pp + h.a + i * h.R + r], da = 0;
                    for (int64_t d = 0; d < HS; d++) {
                        double e = (float)g[n * D + i * HS + d];
                        want[w][n * D + i * HS + d] += h.scale * a * b[d];
                        da += h.scale * e * b[d], db[d] += h.scale * e * a;
                    }
                    want_dfac[n * m.Pp + h.a + i * h.R + r] = da;
                }
                for (int64_t i = 0; i < HS / 2; i++) {
                    double c = h.HSR ? angles[i] : 1, s = h.HSR ? angles[HS / 2 + i] : 0;
                    want_dfac[n * m.Pp + h.b + r * HS + i] = db[i] * c - db[HS / 2 + i] * s;
                    want_dfac[n * m.Pp + h.b + r * HS + HS / 2 + i] = db[HS / 2 + i] * c + db[i] * s;
                }
            }
    }
    auto forward = [&] { heads_forward(q.p, k.p, v.p, NULL, NULL, fac.p, table.p, shape, N, 0); };
    HeadsGradients gradients = {{{dq.p}, {dk.p}, {dv.p}}};
    auto backward = [&] { heads_backward(dfac.p, fac.p, table.p, gradients, shape, N, 0); };
    forward();
    for (int w = 0; w < 3; w++) check("forward 1", out[w]->read((N - rows) * D, rows * D), want[w], ROUNDED_ONCE);
    time_version("forward 1", (double)N * (double)(m.Pp + 3 * D) * sizeof(floatX),
                 2.0 * (double)N * (double)D * (m.q.R + m.k.R + m.v.R), forward);
    backward();
    check("backward 1", dfac.read((N - rows) * m.Pp, rows * m.Pp), want_dfac, ROUNDED_ONCE);
    time_version("backward 1", (double)N * (double)(2 * m.Pp + 3 * D) * sizeof(floatX),
                 4.0 * (double)N * (double)D * (m.q.R + m.k.R + m.v.R), backward);
    model_free(&m);
    return 0;
}
