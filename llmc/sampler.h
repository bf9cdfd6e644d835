// The next token from a row of logits.
#ifndef LLMC_SAMPLER_H
#define LLMC_SAMPLER_H

#include <math.h>
#include "utils.h"

typedef struct {
    double temperature;     // 0: greedy
    int64_t top_k;          // keep the k likeliest; 0: all
    double top_p;           // keep the likeliest until their sum reaches p; 1: all
    double min_p;           // drop what is less likely than min_p times the likeliest; 0: none
} SamplerOptions;

typedef struct { float p; int id; } SamplerEntry_;

LLMC_FN int sampler_compare_(const void *a, const void *b) {
    const SamplerEntry_ *x = (const SamplerEntry_ *)a, *y = (const SamplerEntry_ *)b;
    return x->p != y->p ? (x->p < y->p ? 1 : -1) : x->id - y->id;
}

// Draws from logits (V) with the uniform number u in [0, 1). Among equals the lowest id comes first. Filters apply in the
// order temperature, top-k, top-p, min-p, as in Hugging Face's generate.
LLMC_FN int sample_token(const float *logits, int V, const SamplerOptions *o, double u) {
    int best = 0;
    for (int i = 1; i < V; i++)
        if (logits[i] > logits[best]) best = i;
    if (o->temperature == 0) return best;
    SamplerEntry_ *e = (SamplerEntry_ *)xmalloc((size_t)V * sizeof *e);
    for (int i = 0; i < V; i++) e[i].p = expf((logits[i] - logits[best]) / (float)o->temperature), e[i].id = i;
    qsort(e, (size_t)V, sizeof *e, sampler_compare_);
    int n = o->top_k > 0 && o->top_k < V ? (int)o->top_k : V;
    double total = 0, sum = 0;
    for (int i = 0; i < n; i++) total += e[i].p;
    if (o->top_p < 1) {
        int keep = 0;
        while (keep < n && sum < o->top_p * total) sum += e[keep++].p;
        n = keep > 0 ? keep : 1;
    }
    while (n > 1 && e[n - 1].p < o->min_p * e[0].p) n--;
    sum = 0;
    for (int i = 0; i < n; i++) sum += e[i].p;
    u *= sum;
    int i = 0;
    while (i < n - 1 && u >= e[i].p) u -= e[i++].p;
    int id = e[i].id;
    free(e);
    return id;
}

#endif
