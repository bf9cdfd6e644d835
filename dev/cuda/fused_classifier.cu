// Softmax, loss and dlogits: checks and times llmc/fused_classifier.cuh, and a version that lost.
//
//   make build/fused_classifier
//   build/fused_classifier [ROWS [V]]        the defaults: 8192 50257
//
// Versions, with times at 124M, B 24, on one H200 (dev/LOG.md, 2026-11-23):
//   0            the memory traffic alone: the logits negated in place
//   128 .. 512   the trainer's kernel with this many threads per row; it uses CLASSIFIER_THREADS (512: 0.542 ms)
//   smem         the row is read once and kept in shared memory (512 threads); slower: 0.617 ms, when reading it twice
//                took 0.592
#include "bench.cuh"
#include "../../llmc/fused_classifier.cuh"
#include "../../llmc/ptx.cuh"

__global__ void copy_kernel(floatX *x, size_t vectors) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < vectors) {
        PackedX p = load16(x + i * PackedX::size);
        for (int k = 0; k < PackedX::size; k++) p[k] = (floatX)((float)p[k] * -1);
        store16(x + i * PackedX::size, p);
    }
}

__global__ void __launch_bounds__(512, 2) smem_kernel(floatX *logits, float *losses, const int32_t *targets,
                                                      int V, int Vp, float dloss) {
    constexpr int X = PackedX::size;
    extern __shared__ float4 row_smem[];
    __shared__ float shared[32];
    floatX *kept = (floatX *)row_smem, *row = logits + (int64_t)blockIdx.x * Vp;
    int target = targets[blockIdx.x], stride = blockDim.x * X;
    for (int c = threadIdx.x * X; c < Vp; c += stride) ptx_cp_async_16(smem_address(kept + c), row + c, true);
    ptx_cp_async_wait_all();        // no barrier: each thread reads only what it fetched
    float largest = -INFINITY, sum = 0;
    for (int c = threadIdx.x * X; c < V; c += stride) {
        PackedX x = load16(kept + c);
        for (int k = 0; k < X; k++) largest = fmaxf(largest, c + k < V ? (float)x[k] : -INFINITY);
    }
    largest = block_max(largest, shared);
    float at_target = (float)kept[target];      // after the barrier in block_max
    for (int c = threadIdx.x * X; c < V; c += stride) {
        PackedX x = load16(kept + c);
        for (int k = 0; k < X; k++) sum += c + k < V ? __expf((float)x[k] - largest) : 0;
    }
    float lse = logf(block_sum(sum, shared)) + largest;
    if (threadIdx.x == 0) losses[blockIdx.x] = lse - at_target;
    for (int c = threadIdx.x * X; c < Vp; c += stride) {
        PackedX x = load16(kept + c), out;
        for (int k = 0; k < X; k++) {
            float p = c + k < V ? __expf((float)x[k] - lse) : 0;
            out[k] = (floatX)((c + k == target ? p - 1 : p) * dloss);
        }
        store16_streaming(row + c, out);
    }
}

int main(int argc, char **argv) {
    int64_t N = argument(argc, argv, 1, 8192), V = argument(argc, argv, 2, 50257), Vp = (V + 127) / 128 * 128,
        rows = std::min<int64_t>(N, 20);
    Array<floatX> logits(N * Vp), start(N * Vp, 1, 8);
    Array<float> losses(N);
    std::vector<int32_t> host_targets(N);
    for (int64_t n = 0; n < N; n++) host_targets[n] = (int32_t)(rng_at(2, n) % (uint64_t)V);
    Array<int32_t> targets(host_targets);
    std::vector<floatX> x = start.read((N - rows) * Vp, rows * Vp);
    std::vector<double> want(rows * Vp, 0), want_loss(rows);
    for (int64_t n = 0; n < rows; n++) {
        double sum = 0;
        for (int64_t v = 0; v < V; v++) sum += exp((double)(float)x[n * Vp + v]);
        int t = host_targets[N - rows + n];
        for (int64_t v = 0; v < V; v++) want[n * Vp + v] = exp((double)(float)x[n * Vp + v]) / sum - (v == t);
        want_loss[n] = log(sum) - (float)x[n * Vp + t];
    }
    double bytes = 2.0 * (double)(N * Vp) * sizeof(floatX);
    time_version("0", bytes, 0,
                 [&] { launch(copy_kernel, {(unsigned)ceil_div(N * Vp / PackedX::size, 256), 256, 0, 0}, start.p,
                              (size_t)(N * Vp / PackedX::size)); });
    time_version("0", bytes, 0,
                 [&] { launch(copy_kernel, {(unsigned)ceil_div(N * Vp / PackedX::size, 256), 256, 0, 0}, start.p,
                              (size_t)(N * Vp / PackedX::size)); });
    for (int threads = 128; threads <= 2 * CLASSIFIER_THREADS; threads *= 2) {
        bool smem = threads > CLASSIFIER_THREADS;
        auto f = [&] {
            if (smem)
                launch(smem_kernel, {(unsigned)N, 512, (size_t)Vp * sizeof(floatX), 0},
                       logits.p, losses.p, targets.p, (int)V, (int)Vp, 1.0f);
            else
                launch(fused_classifier_kernel, {(unsigned)N, (unsigned)threads, 0, 0},
                       logits.p, losses.p, targets.p, (int)V, (int)Vp, 1.0f, LOSS_AND_DLOGITS);
        };
        char name[32];
        snprintf(name, sizeof name, smem ? "smem" : "%d", threads);
        logits.copy(start);
        f();
        check(name, logits.read((N - rows) * Vp, rows * Vp), want, ROUNDED_ONCE);
        check(name, losses.read(N - rows, rows), want_loss, 1e-5);
        logits.copy(start);
        time_version(name, bytes, 0, f);
    }
    return 0;
}
