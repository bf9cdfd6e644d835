// Loss and perplexity of token shards. Each window of `stride` tokens is scored once, after up to context - stride
// tokens of its shard that come before it; stride = context gives the trainer's validation loss. The end of a shard
// that fills no window is not scored, as in training.
#ifndef LLMC_EVAL_PERPLEXITY_H
#define LLMC_EVAL_PERPLEXITY_H

#include "dataloader.h"
#include "eval_requests.h"

enum { WINDOWS_AT_ONCE = 4096 };        // requests that are made before they are scored

typedef struct {
    double loss, bits_per_byte;         // mean over the tokens; NaN: the shards have no manifest that counts bytes
    uint64_t tokens, windows;
} Perplexity;

// The windows that wait to be scored: their tokens, `width` for each, and their requests.
typedef struct {
    int64_t width, n;
    int32_t *ids;
    Request *requests;
} WindowQueue_;

// Scores what waits. Returns the sum of its log-likelihoods.
LLMC_FN double window_queue_score_(WindowQueue_ *q, const Scorer *scorer) {
    double sum = 0;
    if (q->n) score_requests(scorer, q->requests, q->n, NULL, NULL);
    for (int64_t i = 0; i < q->n; i++) sum += q->requests[i].loglikelihood;
    q->n = 0;
    return sum;
}

// Adds a window: `stride` inputs and targets, after the `before` tokens that precede them.
LLMC_FN void window_queue_add_(WindowQueue_ *q, const int32_t *before, int64_t before_n, const int32_t *inputs,
                               const int32_t *targets, int64_t stride) {
    int32_t *ids = q->ids + q->n * q->width;
    memcpy(ids, before, (size_t)before_n * sizeof *ids);
    memcpy(ids + before_n, inputs, (size_t)stride * sizeof *ids);
    ids[before_n + stride] = targets[stride - 1];
    Request *r = &q->requests[q->n];
    memset(r, 0, sizeof *r);
    r->ids = ids, r->n = before_n + stride + 1, r->n_continuation = stride, r->group = q->n++;
}

// data: opened in sequence with windows of `stride` tokens. limit: only the first so many windows; 0: all.
LLMC_FN Perplexity measure_perplexity(const Scorer *scorer, DataLoader *data, int64_t context, int64_t limit,
                                      Progress progress, void *state) {
    Error err;
    Perplexity p = {0, NAN, 0, 0};
    int64_t stride = data->T, most = context - stride, kept = 0;
    uint64_t end = limit > 0 && (uint64_t)limit < data->windows ? (uint64_t)limit : data->windows;
    int64_t room = WINDOWS_AT_ONCE;
    if (end < (uint64_t)room) room = (int64_t)end;
    WindowQueue_ q = {context + 1, 0, (int32_t *)xmalloc((size_t)(room * (context + 1)) * sizeof(int32_t)),
                      (Request *)xmalloc((size_t)room * sizeof(Request))};
    int32_t *before = (int32_t *)xmalloc((size_t)(context + 1) * sizeof *before);
    int32_t *inputs = (int32_t *)xmalloc((size_t)stride * sizeof *inputs);
    int32_t *targets = (int32_t *)xmalloc((size_t)stride * sizeof *targets);
    double sum = 0;
    for (int shard = 0; shard < data->num_shards; shard++) {
        kept = 0;
        for (uint64_t w = 0; w < data->shards[shard].windows && p.windows < end; w++) {
            if (loader_read(data, p.windows, 1, inputs, targets, &err) != 0)
                die(EXIT_INPUT, "--perplexity: %s", err.text);
            window_queue_add_(&q, before, kept, inputs, targets, stride);
            const Request *r = &q.requests[q.n - 1];        // the next window comes after the last inputs of this one
            kept = r->n - 1 < most ? r->n - 1 : most;
            memcpy(before, r->ids + r->n - 1 - kept, (size_t)kept * sizeof *before);
            if (++p.windows == end || q.n == room) {
                sum += window_queue_score_(&q, scorer);
                if (progress) progress((int64_t)p.windows, state);
            }
        }
    }
    free(q.ids), free(q.requests), free(before), free(inputs), free(targets);
    p.tokens = p.windows * (uint64_t)stride;
    p.loss = -sum / (double)p.tokens;
    if (data->bytes_per_token > 0) p.bits_per_byte = p.loss / M_LN2 / data->bytes_per_token;
    return p;
}

#endif
