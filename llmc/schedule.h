// The learning rate: linear warm-up to the peak, then by --schedule
//   cosine    half a cosine down to the end rate at the last step
//   linear    a straight line down to it
//   wsd       warm-up, stable, decay: the peak, and a straight line down to the end rate in the last decay_steps
//   constant  the peak
#ifndef LLMC_SCHEDULE_H
#define LLMC_SCHEDULE_H

#include <math.h>
#include "utils.h"

typedef enum { SCHEDULE_COSINE, SCHEDULE_LINEAR, SCHEDULE_WSD, SCHEDULE_CONSTANT, NUM_SCHEDULES } ScheduleKind;

LLMC_FN const char *schedule_name(ScheduleKind kind) {
    static const char *const names[NUM_SCHEDULES] = {"cosine", "linear", "wsd", "constant"};
    return names[kind];
}

typedef struct {
    ScheduleKind kind;
    double lr, min_lr;      // peak and end rate
    long warmup_steps;      // 0: none
    long max_steps;         // the end rate is reached here
    long decay_steps;       // of wsd
} Schedule;

// The rate of step 0, 1, ...: lr (step + 1) / warmup_steps during warm-up, then by the kind; from max_steps on the end
// rate, but for constant.
LLMC_FN double schedule_lr(const Schedule *s, long step) {
    if (step < s->warmup_steps) return s->lr * (double)(step + 1) / (double)s->warmup_steps;
    if (s->kind == SCHEDULE_CONSTANT) return s->lr;
    if (step >= s->max_steps) return s->min_lr;
    long start = s->kind == SCHEDULE_WSD ? s->max_steps - s->decay_steps : s->warmup_steps;
    if (step < start) return s->lr;
    double done = (double)(step - start) / (double)(s->max_steps - start);
    double left = s->kind == SCHEDULE_COSINE ? 0.5 * (1 + cos(M_PI * done)) : 1 - done;
    return s->min_lr + (s->lr - s->min_lr) * left;
}

#endif
