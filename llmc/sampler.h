// The next token from a row of logits.
//
// What may come is chosen as in Hugging Face's generate: temperature, then top-k, then top-p, then min-p, the lowest id first among
// equals. Of that set one is drawn by inverting its cumulative distribution in the order of ids, not of likelihood: so nothing needs to
// be sorted beyond the set's last member, and a GPU can do the same by a threshold and a prefix sum.
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

// The tokens by likelihood, sorted as far as they are asked for: a heap, whose top goes to the end when it is taken.
typedef struct {
    const float *p;         // (V) likelihoods
    int *ids;               // (V) the heap, then what was taken, the likeliest last
    int V, taken;
} SamplerRanking_;

// Whether token a stands before b.
LLMC_FN int sampler_before_(const float *p, int a, int b) { return p[a] != p[b] ? p[a] > p[b] : a < b; }

// Lets ids[i] sink to its place among the first n.
LLMC_FN void sampler_sink_(SamplerRanking_ *r, int n, int i) {
    int id = r->ids[i];
    for (int child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && sampler_before_(r->p, r->ids[child + 1], r->ids[child])) child++;
        if (!sampler_before_(r->p, r->ids[child], id)) break;
        r->ids[i] = r->ids[child];
    }
    r->ids[i] = id;
}

// The token of that rank, from 0; ranks are asked for in order.
LLMC_FN int sampler_ranked_(SamplerRanking_ *r, int rank) {
    for (; r->taken <= rank; r->taken++) {
        int end = r->V - 1 - r->taken, top = r->ids[0];
        r->ids[0] = r->ids[end], r->ids[end] = top;
        sampler_sink_(r, end, 0);
    }
    return r->ids[r->V - 1 - rank];
}

// The last token, in the order of likelihood, that top-k and top-p keep.
LLMC_FN int sampler_last_(const float *p, int V, const SamplerOptions *o) {
    SamplerRanking_ r = {p, (int *)xmalloc((size_t)V * sizeof(int)), V, 0};
    for (int i = 0; i < V; i++) r.ids[i] = i;
    for (int i = V / 2; i-- > 0; ) sampler_sink_(&r, V, i);
    int k = o->top_k > 0 && o->top_k < V ? (int)o->top_k : V, last = sampler_ranked_(&r, 0);
    double total = 0, sum = p[last];
    for (int i = 0; i < k; i++) total += p[k < V ? sampler_ranked_(&r, i) : i];
    for (int i = 1; i < k && (o->top_p >= 1 || sum < o->top_p * total); i++) sum += p[last = sampler_ranked_(&r, i)];
    free(r.ids);
    return last;
}

// Draws from logits (V) with the uniform number u in [0, 1).
LLMC_FN int sample_token(const float *logits, int V, const SamplerOptions *o, double u) {
    int best = 0;
    for (int i = 1; i < V; i++)
        if (logits[i] > logits[best]) best = i;
    if (o->temperature == 0) return best;
    float *p = (float *)xmalloc((size_t)V * sizeof *p);
    for (int i = 0; i < V; i++) p[i] = expf((logits[i] - logits[best]) / (float)o->temperature);    // the likeliest has 1
    int ranked = (o->top_k > 0 && o->top_k < V) || o->top_p < 1, last = ranked ? sampler_last_(p, V, o) : 0;
    double sum = 0, below = 0;
    for (int i = 0; i < V; i++) {
        if (p[i] < o->min_p || (ranked && sampler_before_(p, last, i))) p[i] = 0;
        sum += p[i];
    }
    int id = best;          // for the last of rounding, should it leave u sum beyond all
    for (int i = 0; i < V; i++) {
        below += p[i];
        if (u * sum < below) { id = i; break; }
    }
    free(p);
    return id;
}

#endif
