// SwiGLU: checks and times llmc/swiglu.cuh.
//
//   make build/swiglu
//   build/swiglu [N [F]]                     the defaults: 24576 2048
//
// One version each, the trainer's: forward 1 and backward 1. The backward pass also recomputes s, which then need not
// be kept from the forward pass.
#include "bench.cuh"
#include "../../llmc/swiglu.cuh"

int main(int argc, char **argv) {
    int64_t N = argument(argc, argv, 1, 24576), F = argument(argc, argv, 2, 2048);
    int64_t rows = std::min<int64_t>(N, 50), at = (N - rows) * F;       // the last rows are checked
    Array<floatX> start(2 * N * F, 1, 4), u(2 * N * F), ds_start(N * F, 2, 1), ds(N * F), s(N * F);
    std::vector<floatX> hu = start.read(2 * at, 2 * rows * F), hds = ds_start.read(at, rows * F);
    std::vector<double> want_s(rows * F), want_du(2 * rows * F);
    for (int64_t n = 0; n < rows; n++)
        for (int64_t f = 0; f < F; f++) {
            double g = (float)hu[2 * n * F + f], z = (float)hu[2 * n * F + F + f], d = (float)hds[n * F + f];
            double sigma = 1 / (1 + exp(-g));
            want_s[n * F + f] = g * sigma * z;
            want_du[2 * n * F + f] = d * z * sigma * (1 + g * (1 - sigma));
            want_du[2 * n * F + F + f] = d * g * sigma;
        }
    u.copy(start), ds.copy(ds_start);
    double pass = (double)(N * F) * sizeof(floatX);
    swiglu_forward(s.p, u.p, N, F, 0);
    check("forward 1", s.read(at, rows * F), want_s, ROUNDED_ONCE);
    time_version("forward 1", 3 * pass, 0, [&] { swiglu_forward(s.p, u.p, N, F, 0); });
    swiglu_backward_in_place(u.p, ds.p, N, F, 0);
    check("backward 1, du", u.read(2 * at, 2 * rows * F), want_du, ROUNDED_ONCE);
    check("backward 1, s", ds.read(at, rows * F), want_s, ROUNDED_ONCE);
    time_version("backward 1", 6 * pass, 0, [&] { swiglu_backward_in_place(u.p, ds.p, N, F, 0); });
    return 0;
}
