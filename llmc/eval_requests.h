// Requests: how likely is this continuation after that context? What a model needs to score them, and no more forward
// passes than that takes: requests whose inputs start alike share one (the four of an MMLU question differ only in the
// token that is scored), and inputs are sorted by length and packed in batches. Knows neither tasks nor devices.
#ifndef LLMC_EVAL_REQUESTS_H
#define LLMC_EVAL_REQUESTS_H

#include <inttypes.h>

#include "comm.h"
#include "eval_options.h"

typedef struct T6 T6;

// The model that scores batches: ids (B, T) with B * T <= most_tokens and T <= context. The ranks of comm (NULL: one
// process) take turns at batches.
typedef struct {
    T6 *model;
    void (*score)(T6 *model, const int32_t *ids, int64_t B, int64_t T, ScoredToken *scored, int64_t count);
    int64_t most_tokens, context;
    Comm *comm;
} Scorer;

// The last n_continuation of n tokens are to be scored, each after all those before it.
typedef struct {
    const int32_t *ids;
    int64_t n, n_continuation;
    int64_t group;              // requests of one document, which stand together
    // derived
    int64_t input;              // of inputs
    // results
    double loglikelihood;
    int is_greedy;
} Request;

// What the model gets: all tokens of a request but the last.
typedef struct {
    const int32_t *ids;
    int64_t n;
    int64_t first, end;         // the requests of its group
} Input_;

// Called after each batch with the number of requests that are done.
typedef void (*Progress)(int64_t done, void *state);

// The length of a batch whose longest input has n tokens: few different lengths, because on a GPU each needs plans of
// its matrix products.
LLMC_FN int64_t batch_length_(const Scorer *scorer, int64_t n) {
    int64_t step = 16, rounded;
    while (step * 8 < n) step *= 2;
    rounded = (n + step - 1) / step * step;
    return rounded < scorer->context ? rounded : scorer->context;
}

LLMC_FN int input_starts_with_(const Input_ *in, const int32_t *ids, int64_t n) {
    return n <= in->n && !memcmp(in->ids, ids, (size_t)n * sizeof *ids);
}

LLMC_FN int compare_inputs_(const void *a, const void *b) {
    const Input_ *x = *(const Input_ *const *)a, *y = *(const Input_ *const *)b;
    return x->n != y->n ? (x->n < y->n) - (x->n > y->n) : (x > y) - (x < y);
}

// Adds the inputs of requests first to end, a group. The longest come first, so that shorter ones find those they
// begin. Returns the number of inputs.
LLMC_FN int64_t group_inputs_(Request *requests, int64_t first, int64_t end, Input_ *inputs, int64_t count) {
    int64_t before = count;
    for (int64_t i = first; i < end; i++) requests[i].input = -1;
    for (;;) {
        int64_t longest = -1;
        for (int64_t i = first; i < end; i++)
            if (requests[i].input < 0 && (longest < 0 || requests[i].n > requests[longest].n)) longest = i;
        if (longest < 0) return count;
        Request *r = &requests[longest];
        for (int64_t j = before; j < count && r->input < 0; j++)
            if (input_starts_with_(&inputs[j], r->ids, r->n - 1)) r->input = j;
        if (r->input >= 0) continue;
        r->input = count;
        inputs[count++] = (Input_){r->ids, r->n - 1, first, end};
    }
}

// Scores a batch of B inputs of up to T tokens. Returns the number of requests that it finished.
LLMC_FN int64_t score_batch_(const Scorer *scorer, Request *requests, Input_ *const *batch, int64_t B, int64_t T,
                             const Input_ *inputs) {
    int64_t count = 0, done = 0;
    int32_t *ids = (int32_t *)xcalloc((size_t)(B * T), sizeof *ids);    // later tokens do not matter: token 0
    for (int64_t b = 0; b < B; b++) {
        memcpy(ids + b * T, batch[b]->ids, (size_t)batch[b]->n * sizeof *ids);
        for (int64_t i = batch[b]->first; i < batch[b]->end; i++)
            if (&inputs[requests[i].input] == batch[b]) count += requests[i].n_continuation;
    }
    ScoredToken *scored = (ScoredToken *)xcalloc((size_t)count, sizeof *scored), *next = scored;
    for (int64_t b = 0; b < B; b++)
        for (int64_t i = batch[b]->first; i < batch[b]->end; i++) {
            const Request *r = &requests[i];
            if (&inputs[r->input] != batch[b]) continue;
            for (int64_t t = r->n - r->n_continuation; t < r->n; t++, next++)
                next->row = b * T + t - 1, next->token = r->ids[t];
        }
    scorer->score(scorer->model, ids, B, T, scored, count);
    next = scored;
    for (int64_t b = 0; b < B; b++)
        for (int64_t i = batch[b]->first; i < batch[b]->end; i++) {
            Request *r = &requests[i];
            if (&inputs[r->input] != batch[b]) continue;
            r->loglikelihood = 0, r->is_greedy = 1, done++;
            for (int64_t t = 0; t < r->n_continuation; t++, next++)
                r->loglikelihood += next->loglikelihood, r->is_greedy &= next->is_greedy;
        }
    free(ids), free(scored);
    return done;
}

// Gives every rank all results. Those of other ranks' batches are 0 here.
LLMC_FN void share_results_(Comm *comm, Request *requests, int64_t n) {
    if (comm_world(comm) == 1) return;
    double *all = (double *)xmalloc((size_t)(2 * n) * sizeof *all);
    for (int64_t i = 0; i < n; i++) all[2 * i] = requests[i].loglikelihood, all[2 * i + 1] = requests[i].is_greedy;
    comm_sum(comm, all, (size_t)(2 * n), "scores");
    for (int64_t i = 0; i < n; i++) requests[i].loglikelihood = all[2 * i], requests[i].is_greedy = all[2 * i + 1] > 0;
    free(all);
}

// Fills in the results of n requests, whose groups stand together. All ranks call, with the same requests.
LLMC_FN void score_requests(const Scorer *scorer, Request *requests, int64_t n, Progress progress, void *state) {
    Input_ *inputs = (Input_ *)xmalloc((size_t)n * sizeof *inputs), **order = (Input_ **)xmalloc((size_t)n *
                                                                                                  sizeof *order);
    int64_t count = 0, done = 0, batches = 0;
    for (int64_t i = 0; i < n; i++) requests[i].loglikelihood = 0, requests[i].is_greedy = 0;
    for (int64_t first = 0, end; first < n; first = end) {
        for (end = first + 1; end < n && requests[end].group == requests[first].group; end++) continue;
        count = group_inputs_(requests, first, end, inputs, count);
    }
    for (int64_t i = 0; i < count; i++) order[i] = &inputs[i];
    qsort(order, (size_t)count, sizeof *order, compare_inputs_);        // the longest first: memory is tried at once
    for (int64_t i = 0, B; i < count; i += B) {
        int64_t T = batch_length_(scorer, order[i]->n);
        B = scorer->most_tokens / T < count - i ? scorer->most_tokens / T : count - i;
        if (batches++ % comm_world(scorer->comm) != comm_rank(scorer->comm)) continue;
        done += score_batch_(scorer, requests, order + i, B, T, inputs);
        if (progress) progress(done, state);
    }
    share_results_(scorer->comm, requests, n);
    free(inputs), free(order);
}

#endif
