// Global gradient norm and AdamW: checks and times llmc/adamw.cuh.
//
//   make build/adamw
//   build/adamw [MILLIONS of weights]        the defaults: 124
//
// One version, the trainer's. Bytes per weight: the norm reads 4 (the gradient). AdamW reads 16 (gradient, master
// weight, two moments) and writes 12 plus the weight itself.
#include "bench.cuh"
#include "../../llmc/adamw.cuh"

int main(int argc, char **argv) {
    size_t n = (size_t)argument(argc, argv, 1, 124) * 1000000, count = 100000, at = n - count;
    Array<floatX> params(n);
    Array<float> master(n, 1, 1), m(n, 2, 1), v(std::vector<float>(n, 0.25f)), grads(n, 3, 1);
    Array<double> partial(NORM_BLOCKS);
    Array<GradientNorm> norm(1);
    std::vector<float> g = grads.read(0, n), w = master.read(at, count), hm = m.read(at, count);
    double sum = 0;
    #pragma omp parallel for reduction(+:sum)
    for (size_t i = 0; i < n; i++) sum += (double)g[i] * g[i];
    global_norm(norm.p, partial.p, grads.p, n, 1, 0);
    check("global norm", std::vector<float>{(float)norm.read(0, 1)[0].norm}, {sqrt(sum)}, 1e-6);
    time_version("global norm", 4.0 * (double)n, 0, [&] { global_norm(norm.p, partial.p, grads.p, n, 1, 0); });
    AdamWStep step = adamw_step(1e-2, 0.9, 0.95, 1e-8, 0.1, 3);
    adamw_clipped_update(params.p, master.p, m.p, v.p, grads.p, n, step, norm.p, 0);
    std::vector<double> want(count);
    for (size_t i = 0; i < count; i++) {
        double gi = g[at + i] / (sqrt(sum) + 1e-6), mi = 0.9 * hm[i] + 0.1 * gi, vi = 0.95 * 0.25 + 0.05 * gi * gi;
        want[i] = w[i] * (1 - 1e-3) - 1e-2 * (mi / (1 - pow(0.9, 3))) / (sqrt(vi / (1 - pow(0.95, 3))) + 1e-8);
    }
    check("adamw, master weights", master.read(at, count), want, 1e-6);
    check("adamw, weights", params.read(at, count), want, ROUNDED_ONCE);
    time_version("adamw", (28.0 + sizeof(floatX)) * (double)n, 0,
                 [&] { adamw_clipped_update(params.p, master.p, m.p, v.p, grads.p, n, step, norm.p, 0); });
    return 0;
}
