// RMSNorm: checks and times llmc/rmsnorm.cuh, and two versions of its forward pass that lost.
//
//   make build/rmsnorm
//   build/rmsnorm [N [C]]                    the defaults: 24576 768
//
// Versions, with times at 124M, B 24, on one H200 (dev/LOG.md, 2026-11-23):
//   forward 1    the trainer's: one warp per row, which is read twice, the second time from the cache        24.4 us
//   forward 2    the row stays in registers (C up to 2048): no gain                                          24.3 us
//   forward 3    fused with the residual addition x += y: the matrix product adds y (beta = 1) for less      41.5 us
//   backward 1   the trainer's
#include "bench.cuh"
#include "../../llmc/rmsnorm.cuh"

template <int VECTORS>
__global__ void forward_registers(floatX *out, float *rstd, const floatX *x, int64_t N, int C, float eps) {
    constexpr int X = PackedX::size;
    int64_t n = (int64_t)blockIdx.x * RMSNORM_WARPS + threadIdx.x / 32;
    int first = threadIdx.x % 32 * X;
    if (n >= N) return;
    PackedX p[VECTORS];
    float sum = 0;
    #pragma unroll
    for (int i = 0; i < VECTORS; i++)
        if (first + i * 32 * X < C) {
            p[i] = load16(x + n * C + first + i * 32 * X);
            for (int k = 0; k < X; k++) sum += (float)p[i][k] * (float)p[i][k];
        }
    float r = 1 / sqrtf(warp_sum(sum) / C + eps);
    #pragma unroll
    for (int i = 0; i < VECTORS; i++)
        if (first + i * 32 * X < C) {
            for (int k = 0; k < X; k++) p[i][k] = (floatX)((float)p[i][k] * r);
            store16(out + n * C + first + i * 32 * X, p[i]);
        }
    if (first == 0) rstd[n] = r;
}

__global__ void forward_residual(floatX *out, float *rstd, floatX *x, const floatX *y, int64_t N, int C, float eps) {
    constexpr int X = PackedX::size;
    int64_t n = (int64_t)blockIdx.x * RMSNORM_WARPS + threadIdx.x / 32;
    int first = threadIdx.x % 32 * X;
    if (n >= N) return;
    float sum = 0;
    for (int c = first; c < C; c += 32 * X) {
        PackedX p = load16(x + n * C + c), q = load16(y + n * C + c);
        for (int k = 0; k < X; k++) {
            p[k] = (floatX)((float)p[k] + (float)q[k]);
            sum += (float)p[k] * (float)p[k];
        }
        store16(x + n * C + c, p);
    }
    float r = 1 / sqrtf(warp_sum(sum) / C + eps);
    for (int c = first; c < C; c += 32 * X) {
        PackedX p = load16(x + n * C + c);
        for (int k = 0; k < X; k++) p[k] = (floatX)((float)p[k] * r);
        store16(out + n * C + c, p);
    }
    if (first == 0) rstd[n] = r;
}

int main(int argc, char **argv) {
    int64_t N = argument(argc, argv, 1, 24576), C = argument(argc, argv, 2, 768), rows = std::min<int64_t>(N, 50);
    Array<floatX> x(N * C, 1, 1), y(N * C, 2, 1), out(N * C), sum(N * C), dout(N * C, 3, 1), dx(N * C, 4, 1);
    Array<float> rstd(N);
    std::vector<double> want(rows * C), want_dx(rows * C), want_sum(rows * C);
    std::vector<floatX> hx = x.read((N - rows) * C, rows * C), hy = y.read((N - rows) * C, rows * C),
        hd = dout.read((N - rows) * C, rows * C);
    std::vector<floatX> hdx = dx.read((N - rows) * C, rows * C);
    auto normalise = [&](std::vector<double> &to, const std::vector<double> &from) {
        for (int64_t n = 0; n < rows; n++) {
            double s = 0;
            for (int64_t c = 0; c < C; c++) s += from[n * C + c] * from[n * C + c];
            for (int64_t c = 0; c < C; c++) to[n * C + c] = from[n * C + c] / sqrt(s / C + 1e-6);
        }
    };
    std::vector<double> input(rows * C);
    for (int64_t i = 0; i < rows * C; i++) input[i] = (float)hx[i], want_sum[i] = (float)hx[i] + (float)hy[i];
    normalise(want, input);
    normalise(want_sum, want_sum);
    double pass = (double)(N * C) * sizeof(floatX);

    rmsnorm_forward(out.p, rstd.p, x.p, N, C, 1e-6, 0);
    check("forward 1", out.read((N - rows) * C, rows * C), want, ROUNDED_ONCE);
    time_version("forward 1", 2 * pass, 0, [&] { rmsnorm_forward(out.p, rstd.p, x.p, N, C, 1e-6, 0); });
    if (C <= 2048) {
        auto f = [&] {
            launch(forward_registers<2048 / 32 / PackedX::size>,
                   {(unsigned)ceil_div(N, RMSNORM_WARPS), 32 * RMSNORM_WARPS, 0, 0},
                   out.p, rstd.p, x.p, N, (int)C, 1e-6f);
        };
        CUDA_CHECK(cudaMemset(out.p, 0xff, (size_t)pass));
        f();
        check("forward 2", out.read((N - rows) * C, rows * C), want, ROUNDED_ONCE);
        time_version("forward 2", 2 * pass, 0, f);
    }
    auto residual = [&] {
        launch(forward_residual, {(unsigned)ceil_div(N, RMSNORM_WARPS), 32 * RMSNORM_WARPS, 0, 0},
               out.p, rstd.p, sum.p, y.p, N, (int)C, 1e-6f);
    };
    CUDA_CHECK(cudaMemset(out.p, 0xff, (size_t)pass));
    sum.copy(x);
    residual();
    check("forward 3", out.read((N - rows) * C, rows * C), want_sum, 2 * ROUNDED_ONCE);
    time_version("forward 3", 4 * pass, 0, residual);

    rmsnorm_forward(out.p, rstd.p, x.p, N, C, 1e-6, 0);
    std::vector<floatX> ho = out.read((N - rows) * C, rows * C);
    std::vector<float> hr = rstd.read(N - rows, rows);
    for (int64_t n = 0; n < rows; n++) {
        double mean = 0;
        for (int64_t c = 0; c < C; c++) mean += (double)(float)hd[n * C + c] * (float)ho[n * C + c] / C;
        for (int64_t i = n * C; i < (n + 1) * C; i++)
            want_dx[i] = (float)hdx[i] + hr[n] * ((float)hd[i] - (float)ho[i] * mean);
    }
    rmsnorm_backward(dx.p, dout.p, out.p, rstd.p, N, C, 0);
    check("backward 1", dx.read((N - rows) * C, rows * C), want_dx, ROUNDED_ONCE);
    time_version("backward 1", 4 * pass, 0, [&] { rmsnorm_backward(dx.p, dout.p, out.p, rstd.p, N, C, 0); });
    return 0;
}
