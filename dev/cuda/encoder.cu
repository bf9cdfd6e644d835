// Embedding: checks and times llmc/encoder.cuh, and a version of its backward pass that lost.
//
//   make build/encoder
//   build/encoder [N [C [V]]]                the defaults: 24576 768 50304
//
// Versions, with times at 124M, B 24, on one H200 (dev/LOG.md, 2026-11-23):
//   forward 1    the trainer's
//   backward 1   the trainer's: positions grouped by token on the host, one block per group; deterministic   148 us
//   backward 2   atomic additions; different bits on every run                                               294 us
// Tokens are distributed as in text: token i has a probability proportional to about 1 / (i + 1).
#include "bench.cuh"
#include "../../llmc/encoder.cuh"

__global__ void backward_atomic(float *dwte, const floatX *dx, const int32_t *idx, int64_t N, int C) {
    int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * PackedX::size, n = at / C;
    if (n >= N) return;
    PackedX x = load16(dx + at);
    for (int k = 0; k < PackedX::size; k++) atomicAdd(dwte + (int64_t)idx[n] * C + at % C + k, (float)x[k]);
}

int main(int argc, char **argv) {
    int64_t N = argument(argc, argv, 1, 24576), C = argument(argc, argv, 2, 768), V = argument(argc, argv, 3, 50304);
    Array<floatX> wte(V * C, 1, 1), x(N * C), dx(N * C, 2, 1);
    std::vector<float> zeros(V * C, 0);
    Array<float> dwte(zeros);
    std::vector<int32_t> idx(N), groups(encoder_groups_size(N)), counts(V + 1);
    for (int64_t n = 0; n < N; n++) idx[n] = (int32_t)(pow((double)V, rng_uniform(3, n)) - 1);
    encoder_groups(groups.data(), counts.data(), idx.data(), N, V);
    Array<int32_t> d_idx(idx), d_groups(groups);
    std::vector<floatX> hx = dx.read(0, N * C), hw = wte.read(0, V * C);
    std::vector<double> want(V * C, 0), want_x(N * C);
    for (int64_t n = 0; n < N; n++)
        for (int64_t c = 0; c < C; c++) {
            want[idx[n] * C + c] += (float)hx[n * C + c];
            want_x[n * C + c] = (float)hw[idx[n] * C + c];
        }
    encoder_forward(x.p, d_idx.p, wte.p, N, C, 0);
    check("forward 1", x.read(0, N * C), want_x, 0);
    double pass = (double)(N * C), touched = (double)groups[0] * (double)C;
    time_version("forward 1", 2 * pass * sizeof(floatX), 0, [&] { encoder_forward(x.p, d_idx.p, wte.p, N, C, 0); });
    encoder_backward(dwte.p, dx.p, d_idx.p, d_groups.p, N, C, 0);
    check("backward 1", dwte.read(0, V * C), want, 1e-6);
    time_version("backward 1", pass * sizeof(floatX) + 8 * touched, 0,
                 [&] { encoder_backward(dwte.p, dx.p, d_idx.p, d_groups.p, N, C, 0); });
    auto atomic = [&] {
        launch(backward_atomic, {(unsigned)ceil_div(N * C / PackedX::size, 256), 256, 0, 0},
               dwte.p, dx.p, d_idx.p, N, (int)C);
    };
    dwte.write(zeros);
    atomic();
    check("backward 2", dwte.read(0, V * C), want, 1e-5);
    time_version("backward 2", pass * sizeof(floatX) + 8 * touched, 0, atomic);
    return 0;
}
