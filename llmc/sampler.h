// The next token from a row of logits.
//
// Tokens are filtered as in Hugging Face's generate: temperature, then top-k, then top-p, then min-p; among equals the
// lower id comes first. One of the remaining tokens is drawn by inverting their cumulative distribution in the order of
// ids, not of likelihood. So nothing needs sorting beyond the last token kept, and a GPU can do the same with a
// threshold and a prefix sum.
#ifndef LLMC_SAMPLER_H
#define LLMC_SAMPLER_H

#include <math.h>
#include "utils.h"

typedef struct {
    double temperature;     // 0: greedy, the likeliest token
    int64_t top_k;          // keep the k likeliest; 0: all
    double top_p;           // keep the likeliest until their sum reaches p; 1: all
    double min_p;           // drop tokens less likely than min_p times the likeliest; 0: none
    int64_t known;          // only ids below this: those beyond pad the model's vocabulary; 0: all
} SamplerOptions;

// Tokens by likelihood, sorted only as far as they are asked for: a heap, whose top moves to the end when it is taken.
typedef struct {
    const float *p;         // (V) likelihoods
    int *ids;               // (V) the heap, then the tokens taken so far, the likeliest last
    int V, taken;
} SamplerRanking_;

// Whether token a ranks before token b.
LLMC_FN int sampler_before_(const float *p, int a, int b) { return p[a] != p[b] ? p[a] > p[b] : a < b; }

// Restores the heap of the first n ids after ids[i] has changed.
LLMC_FN void sampler_sink_(SamplerRanking_ *r, int n, int i) {
    int id = r->ids[i];
    for (int child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && sampler_before_(r->p, r->ids[child + 1], r->ids[child])) child++;
        if (!sampler_before_(r->p, r->ids[child], id)) break;
        r->ids[i] = r->ids[child];
    }
    r->ids[i] = id;
}

// The token of a rank; 0 is the likeliest. Each rank asked for must have been taken already or be the next one.
LLMC_FN int sampler_ranked_(SamplerRanking_ *r, int rank) {
    for (; r->taken <= rank; r->taken++) {
        int end = r->V - 1 - r->taken, top = r->ids[0];
        r->ids[0] = r->ids[end], r->ids[end] = top;
        sampler_sink_(r, end, 0);
    }
    return r->ids[r->V - 1 - rank];
}

// The least likely token that top-k and top-p keep.
LLMC_FN int sampler_last_(const float *p, int V, const SamplerOptions *o) {
    SamplerRanking_ r = {p, (int *)xcalloc((size_t)V, sizeof(int)), V, 0};
    for (int i = 0; i < V; i++) r.ids[i] = i;
    for (int i = V / 2; i-- > 0; ) sampler_sink_(&r, V, i);
    int k = o->top_k > 0 && o->top_k < V ? (int)o->top_k : V, last = sampler_ranked_(&r, 0);
    double total = 0, sum = p[last];
    for (int i = 0; i < k; i++) total += p[k < V ? sampler_ranked_(&r, i) : i];
    for (int i = 1; i < k && (o->top_p >= 1 || sum < o->top_p * total); i++) sum += p[last = sampler_ranked_(&r, i)];
    free(r.ids);
    return last;
}

// Draws a token id from logits (V) with the uniform random number u in [0, 1). The same arguments give the same token.
LLMC_FN int sample_token(const float *logits, int V, const SamplerOptions *o, double u) {
    int best = 0;
    if (o->known > 0 && o->known < V) V = (int)o->known;
    for (int i = 1; i < V; i++)
        if (logits[i] > logits[best]) best = i;
    if (o->temperature == 0) return best;
    float *p = (float *)xmalloc((size_t)V * sizeof *p), temperature = (float)o->temperature;
    for (int i = 0; i < V; i++) p[i] = expf((logits[i] - logits[best]) / temperature);      // the likeliest has 1
    int ranked = (o->top_k > 0 && o->top_k < V) || o->top_p < 1, last = ranked ? sampler_last_(p, V, o) : 0;
    double sum = 0, below = 0;
    for (int i = 0; i < V; i++) {
        if (p[i] < o->min_p || (ranked && sampler_before_(p, last, i))) p[i] = 0;
        sum += p[i];
    }
    int id = best;          // in case rounding leaves u * sum above the last partial sum
    for (int i = 0; i < V; i++) {
        below += p[i];
        if (u * sum < below) { id = i; break; }
    }
    free(p);
    return id;
}

#endif
