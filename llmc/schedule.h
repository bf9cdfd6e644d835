// The learning rate: linear warm-up, then a cosine from the peak down to the end value.
#ifndef LLMC_SCHEDULE_H
#define LLMC_SCHEDULE_H

#include <math.h>

typedef struct {
    double lr, min_lr;      // peak and end
    long warmup_steps;      // 0: none
    long max_steps;         // where the cosine ends
} Schedule;

// The rate of step s = 0, 1, ...: lr (s + 1) / warmup while s < warmup, then the cosine over the steps that are left.
static inline double schedule_lr(const Schedule *s, long step) {
    if (step < s->warmup_steps) return s->lr * (double)(step + 1) / (double)s->warmup_steps;
    if (step >= s->max_steps) return s->min_lr;
    double done = (double)(step - s->warmup_steps) / (double)(s->max_steps - s->warmup_steps);
    return s->min_lr + 0.5 * (s->lr - s->min_lr) * (1 + cos(M_PI * done));
}

#endif
