// Scores of chosen tokens, for evaluation: the rows that are scored are gathered, so that the classifier runs only for
// them, and from a row's logits come the log-likelihood of its token and whether no other token is likelier.
#ifndef LLMC_SCORE_CUH
#define LLMC_SCORE_CUH

#include "precision.cuh"

enum { SCORE_THREADS = 512 };

// A scored token, on its way to the GPU and back.
typedef struct {
    int32_t row, token;
    float loglikelihood;
    int32_t is_greedy;
} GpuScore;

// One block per score: out[i] = inp[scores[i].row], of C numbers.
__global__ void gather_rows_kernel(floatX *out, const floatX *inp, const GpuScore *scores, int C) {
    const floatX *from = inp + (int64_t)scores[blockIdx.x].row * C;
    for (int c = threadIdx.x; c < C; c += blockDim.x) out[(int64_t)blockIdx.x * C + c] = from[c];
}

// out (count, C), inp (N, C)
inline void gather_rows(floatX *out, const floatX *inp, const GpuScore *scores, int64_t count, int64_t C,
                        cudaStream_t stream) {
    launch(gather_rows_kernel, {(unsigned)count, 128, 0, stream}, out, inp, scores, (int)C);
}

// One block per row of logits. Of equally likely tokens the first is the greedy choice.
__global__ void score_kernel(GpuScore *scores, const float *logits, int V, int Vp) {
    __shared__ float shared[32];
    GpuScore *score = &scores[blockIdx.x];
    const float *row = logits + (int64_t)blockIdx.x * Vp;
    int token = score->token;
    float at_token = row[token], largest = -INFINITY, sum = 0, likelier = 0;
    for (int v = threadIdx.x; v < V; v += blockDim.x) {
        largest = fmaxf(largest, row[v]);
        likelier += row[v] > at_token || (row[v] == at_token && v < token);
    }
    largest = block_max(largest, shared);
    for (int v = threadIdx.x; v < V; v += blockDim.x) sum += expf(row[v] - largest);
    sum = block_sum(sum, shared);
    likelier = block_sum(likelier, shared);
    if (threadIdx.x > 0) return;
    score->loglikelihood = at_token - largest - logf(sum);
    score->is_greedy = likelier == 0;
}

// logits (count, Vp), of which V columns count.
inline void score_rows(GpuScore *scores, const float *logits, int64_t count, int64_t V, int64_t Vp,
                       cudaStream_t stream) {
    launch(score_kernel, {(unsigned)count, SCORE_THREADS, 0, stream}, scores, logits, (int)V, (int)Vp);
}

#endif
