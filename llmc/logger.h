// The log of a run: main.log for people, the same lines as on the screen, and metrics.jsonl for machines, one JSON
// object per line.
#ifndef LLMC_LOGGER_H
#define LLMC_LOGGER_H

#include <cjson/cJSON.h>
#include "run_lock.h"
#include "utils.h"

// Metrics that say that a step was evaluated: its validation loss, and how many tokens its sample has.
#define VAL_METRIC "val_loss"
#define SAMPLE_METRIC "sample_tokens"
typedef struct { int validated, sampled; } Evaluated;

typedef struct {
    FILE *log, *metrics;    // NULL: only the screen (before logger_open, and on ranks other than 0)
    const RunLock *lock;    // of the folder, or NULL. The program ends where it is lost, before it writes
    char *folder;
    int silent;             // 1: prints nothing; set on all ranks but 0
    Evaluated evaluated;    // of the step after which a run resumes, from its metrics
} Logger;

LLMC_FN void logger_check_(const Logger *g, int failed) {
    if (failed) die(EXIT_SYSTEM, "%s: cannot write the log: %s", g->folder, strerror(errno));
}

LLMC_FN void logger_check_lock_(const Logger *g) {
    Error err;
    if (g->lock && run_lock_check(g->lock, &err) != 0) die(EXIT_SYSTEM, "--out: %s", err.text);
}

// Drops the metrics of steps after `step`, which a resumed run will write again, and a last line that was cut short.
// *evaluated: what has been evaluated after `step`.
LLMC_FN int logger_rewind_(const char *path, int64_t step, Evaluated *evaluated, Error *err) {
    size_t bytes, kept = 0;
    char *text = read_small_file(path, (size_t)1 << 31, &bytes, err);
    if (!text) return -1;
    for (char *line = text, *end; (end = strchr(line, '\n')) != NULL; line = end + 1) {
        *end = 0;
        cJSON *json = cJSON_Parse(line);
        const cJSON *item = cJSON_GetObjectItemCaseSensitive(json, "step");
        int keep = cJSON_IsNumber(item) && item->valuedouble <= (double)step;
        int resumed = keep && item->valuedouble == (double)step;
        evaluated->validated |= resumed && cJSON_GetObjectItemCaseSensitive(json, VAL_METRIC) != NULL;
        evaluated->sampled |= resumed && cJSON_GetObjectItemCaseSensitive(json, SAMPLE_METRIC) != NULL;
        cJSON_Delete(json);
        *end = '\n';
        if (!keep) continue;
        memmove(text + kept, line, (size_t)(end + 1 - line));
        kept += (size_t)(end + 1 - line);
    }
    int rc = write_small_file(path, text, kept, err);
    free(text);
    return rc;
}

// Opens main.log in an existing folder, to append. Returns 0, or -1 with the reason in err and errno. Free with
// logger_close in either case.
LLMC_FN int logger_open(Logger *g, const char *folder, Error *err) {
    char *log = xasprintf("%s/main.log", folder);
    g->folder = xasprintf("%s", folder);
    g->log = fopen(log, "a");
    free(log);
    return g->log ? 0 : fail(err, "%s/main.log: cannot open for writing: %s", folder, strerror(errno));
}

// Opens metrics.jsonl, when nothing can be refused any more: what is there of steps after `step` is dropped (-1: all).
LLMC_FN int logger_open_metrics(Logger *g, int64_t step, Error *err) {
    char *metrics = xasprintf("%s/metrics.jsonl", g->folder);
    int rc = access(metrics, F_OK) == 0 ? logger_rewind_(metrics, step, &g->evaluated, err) : 0;
    if (rc == 0 && !(g->metrics = fopen(metrics, "a")))
        rc = fail(err, "%s: cannot open for writing: %s", metrics, strerror(errno));
    free(metrics);
    return rc;
}

// Closes both files. Ends the program if what was buffered cannot be written.
LLMC_FN void logger_close(Logger *g) {
    if (g->log) logger_check_(g, fclose(g->log) != 0);
    if (g->metrics) logger_check_(g, fclose(g->metrics) != 0);
    free(g->folder);
    memset(g, 0, sizeof *g);
}

// Prints to the screen and to main.log, flushed. The text brings its own newlines. Ends the program if it cannot write.
LLMC_FN __attribute__((format(printf, 2, 3))) void logger_printf(Logger *g, const char *format, ...) {
    va_list args, copy;
    if (g->silent) return;
    logger_check_lock_(g);
    va_start(args, format);
    va_copy(copy, args);
    vprintf(format, args);
    fflush(stdout);
    if (g->log) logger_check_(g, vfprintf(g->log, format, copy) < 0 || fflush(g->log) != 0);
    va_end(copy);
    va_end(args);
}

// Appends one object to metrics.jsonl: pairs of a name and a double, then NULL. NaN and infinity become null.
//   logger_metrics(g, "step", 3.0, "loss", 2.5, NULL)
LLMC_FN void logger_metrics(Logger *g, const char *name, ...) {
    va_list args;
    va_start(args, name);
    cJSON *json = cJSON_CreateObject();
    for (; name; name = va_arg(args, const char *)) cJSON_AddNumberToObject(json, name, va_arg(args, double));
    va_end(args);
    char *line = cJSON_PrintUnformatted(json);
    cJSON_Delete(json);
    logger_check_lock_(g);
    if (g->metrics && line) logger_check_(g, fprintf(g->metrics, "%s\n", line) < 0 || fflush(g->metrics) != 0);
    cJSON_free(line);
}

#endif
