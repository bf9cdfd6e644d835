// The learning rate: linear warm-up, then a cosine from the peak down to the final value.
#ifndef LLMC_SCHEDULE_H
#define LLMC_SCHEDULE_H

#include <math.h>
#include "utils.h"

typedef struct {
    double lr, min_lr;      // peak and final value
    long warmup_steps;      // 0: none
    long max_steps;         // the cosine ends here
} Schedule;

// The rate of step 0, 1, ...: lr (step + 1) / warmup_steps during warm-up, then the cosine over the remaining steps;
// min_lr from max_steps on.
LLMC_FN double schedule_lr(const Schedule *s, long step) {
    if (step < s->warmup_steps) return s->lr * (double)(step + 1) / (double)s->warmup_steps;
    if (step >= s->max_steps) return s->min_lr;
    double done = (double)(step - s->warmup_steps) / (double)(s->max_steps - s->warmup_steps);
    return s->min_lr + 0.5 * (s->lr - s->min_lr) * (1 + cos(M_PI * done));
}

#endif
