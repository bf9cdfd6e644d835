// From log-likelihoods to scores, as lm-evaluation-harness defines them. Choice i of a row has log-likelihood ll[i]:
//     acc         the row counts if the argmax of ll[i] is the right choice
//     acc_norm    the same for ll[i] / characters of choice i
//     acc_bytes   the same for ll[i] / bytes of choice i
#ifndef LLMC_EVAL_SCORES_H
#define LLMC_EVAL_SCORES_H

#include <math.h>

#include "eval_tasks.h"

enum { ACC, ACC_NORM, ACC_BYTES, NUM_METRICS };
LLMC_FN const char *metric_name(int metric) {
    static const char *const names[NUM_METRICS] = {"acc", "acc_norm", "acc_bytes"};
    return names[metric];
}

typedef struct {
    int64_t n;
    double mean, standard_error;        // NaN: not known, for n = 1
} TaskScore;

// The first of the largest of ll[i] / length[i]. A choice of length 0 is never the largest, unless all are.
LLMC_FN int best_choice_(const double *ll, const int64_t *length, int n) {
    int best = 0;
    double largest = -INFINITY;
    for (int i = 0; i < n; i++) {
        double value = length[i] > 0 ? ll[i] / (double)length[i] : -INFINITY;
        if (value > largest) best = i, largest = value;
    }
    return best;
}

// The choice that a metric takes.
LLMC_FN int predicted_choice(const Document *d, const double *ll, int metric) {
    int64_t *length = (int64_t *)xmalloc((size_t)d->num_choices * sizeof *length);
    for (int i = 0; i < d->num_choices; i++)
        length[i] = metric == ACC ? 1 : metric == ACC_NORM ? count_characters(d->choices[i])
            : (int64_t)strlen(d->choices[i]);
    int best = best_choice_(ll, length, d->num_choices);
    free(length);
    return best;
}

// Of n rows, of which `right` count.
LLMC_FN TaskScore score_of(int64_t n, int64_t right) {
    double mean = (double)right / (double)n;
    double squares = (double)right * (1 - mean) * (1 - mean) + (double)(n - right) * mean * mean;
    return (TaskScore){n, mean, n > 1 ? sqrt(squares / (double)(n - 1)) / sqrt((double)n) : NAN};
}

// Of a group of tasks: the mean over all rows, and the pooled standard error.
LLMC_FN TaskScore score_of_group(const TaskScore *scores, int64_t count) {
    int64_t n = 0;
    double sum = 0, pooled = 0;
    for (int64_t i = 0; i < count; i++) {
        double ni = (double)scores[i].n, error = scores[i].standard_error;
        n += scores[i].n, sum += ni * scores[i].mean;
        pooled += (ni - 1) * ni * error * error;
    }
    double N = (double)n;
    return (TaskScore){n, sum / N, sqrt(pooled / (N - (double)count) / N)};
}

#endif
