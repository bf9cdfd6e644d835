// Spikes: steps whose loss or gradient norm is more than Z standard deviations above the mean of the last SPIKE_WINDOW
// accepted steps (--skip-spikes Z). A spike leaves weights and moments unchanged and does not enter the window.
#ifndef LLMC_SPIKES_H
#define LLMC_SPIKES_H

#include <math.h>
#include "utils.h"

enum { SPIKE_WINDOW = 64 };
typedef struct {
    int64_t seen;                                       // accepted steps so far; the i-th is at i % SPIKE_WINDOW
    double loss[SPIKE_WINDOW], norm[SPIKE_WINDOW];
} SpikeWindow;

typedef struct { double loss, norm; } SpikeLimits;      // a step above either is a spike

LLMC_FN double spike_limit_(const double x[SPIKE_WINDOW], double z) {
    double mean = 0, variance = 0;
    for (int i = 0; i < SPIKE_WINDOW; i++) mean += x[i] / SPIKE_WINDOW;
    for (int i = 0; i < SPIKE_WINDOW; i++) variance += (x[i] - mean) * (x[i] - mean) / SPIKE_WINDOW;
    return mean + z * sqrt(variance);
}

// The limits of the next step. Infinite if z is 0 or the window is not yet full: then no step is a spike.
LLMC_FN SpikeLimits spike_limits(const SpikeWindow *w, double z) {
    SpikeLimits limits = {INFINITY, INFINITY};
    if (z == 0 || w->seen < SPIKE_WINDOW) return limits;
    limits.loss = spike_limit_(w->loss, z), limits.norm = spike_limit_(w->norm, z);
    return limits;
}

// Adds an accepted step's mean loss and gradient norm to the window, replacing the oldest.
LLMC_FN void spikes_add(SpikeWindow *w, double loss, double norm) {
    int at = (int)(w->seen++ % SPIKE_WINDOW);
    w->loss[at] = loss, w->norm[at] = norm;
}

#endif
