// Spikes: a step whose loss or gradient norm lies more than Z standard deviations above the mean of the last SPIKE_WINDOW steps that
// were taken. Such a step is skipped, weights and moments staying as they were (--skip-spikes Z); it does not enter the window.
#ifndef LLMC_SPIKES_H
#define LLMC_SPIKES_H

#include <math.h>
#include <stdint.h>

enum { SPIKE_WINDOW = 64 };
typedef struct {
    int64_t seen;                                       // steps that entered; step i stands at i % SPIKE_WINDOW
    double loss[SPIKE_WINDOW], norm[SPIKE_WINDOW];
} SpikeWindow;

typedef struct { double loss, norm; } SpikeLimits;      // the largest that are not spikes

static inline double spike_limit_(const double x[SPIKE_WINDOW], double z) {
    double mean = 0, variance = 0;
    for (int i = 0; i < SPIKE_WINDOW; i++) mean += x[i] / SPIKE_WINDOW;
    for (int i = 0; i < SPIKE_WINDOW; i++) variance += (x[i] - mean) * (x[i] - mean) / SPIKE_WINDOW;
    return mean + z * sqrt(variance);
}

// z = 0, or a window that is not full yet: no step is a spike.
static inline SpikeLimits spike_limits(const SpikeWindow *w, double z) {
    SpikeLimits limits = {INFINITY, INFINITY};
    if (z == 0 || w->seen < SPIKE_WINDOW) return limits;
    limits.loss = spike_limit_(w->loss, z), limits.norm = spike_limit_(w->norm, z);
    return limits;
}

static inline void spikes_add(SpikeWindow *w, double loss, double norm) {
    int at = (int)(w->seen++ % SPIKE_WINDOW);
    w->loss[at] = loss, w->norm[at] = norm;
}

#endif
