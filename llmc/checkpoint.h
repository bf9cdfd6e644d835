// Checkpoints: one folder a step, OUT/step_00001000, that is there whole or not at all.
//   model.safetensors                       fp32 weights, published names and shapes, no padding
//   config.json                             the model's configuration
//   optimizer-00000-of-00001.safetensors    AdamW's moments: "m.<weight>" and "v.<weight>"
//   state.json                              step, place in the data, and what that place means
//   CHECKSUMS                               XXH64 of the others, in the form that `xxhsum -c CHECKSUMS` reads
// They are written to OUT/step_00001000.tmp, flushed to disk, and that folder is renamed: a crash at any moment leaves the
// previous checkpoint as it was. Both trainers write and read the same files.
//
// Nothing in them depends on how many ranks there were. Of N ranks each writes its own optimizer file: number r has the tensors of the
// buckets (model.h) r, r + N, ..., each tensor whole. Any number of ranks reads them again, each its own slices. Rank 0 writes
// CHECKSUMS when all the others are done, and renames.
#ifndef LLMC_CHECKPOINT_H
#define LLMC_CHECKPOINT_H

#include <dirent.h>
#include <inttypes.h>
#include "comm.h"
#include "model.h"
#include "safetensors.h"
#include "spikes.h"

// What a run is besides its weights and moments. All random numbers are functions of seed and step (rng.h).
enum { NUM_STATE_FIELDS = 10, NUM_OLD_STATE_FIELDS = 8 };
typedef struct {
    int64_t step;               // updates done
    int64_t epoch, position;    // the loader's place, in windows
    int64_t seed, shuffle, seq_len, shards;     // what gives that place its meaning; shards: loader_fingerprint, top bit cleared
    int64_t bad_steps;          // skipped in a row: steps whose gradient was not finite, or that were spikes
    int64_t skipped;            // in all
    SpikeWindow spikes;
} TrainState;

typedef struct { const char *name; int64_t *value; } StateField;
LLMC_FN void state_fields_(TrainState *s, StateField out[NUM_STATE_FIELDS]) {
    const StateField fields[NUM_STATE_FIELDS] = {
        {"step", &s->step}, {"epoch", &s->epoch}, {"position", &s->position}, {"seed", &s->seed}, {"shuffle", &s->shuffle},
        {"seq_len", &s->seq_len}, {"shards", &s->shards}, {"bad_steps", &s->bad_steps},
        {"skipped", &s->skipped}, {"spikes_seen", &s->spikes.seen}};    // from here on: not in old checkpoints
    memcpy(out, fields, sizeof fields);
}

// state.json; the caller frees it. Integers as text, because 64 bits do not fit JSON's numbers.
LLMC_FN char *state_to_json_(const TrainState *state) {
    TrainState copy = *state;
    StateField fields[NUM_STATE_FIELDS];
    state_fields_(&copy, fields);
    const double *windows[] = {copy.spikes.loss, copy.spikes.norm};
    char *text = NULL;
    size_t size = 0;
    FILE *f = open_memstream(&text, &size);
    if (!f) die(EXIT_SYSTEM, "out of memory: cannot write state.json");
    for (int i = 0; i < NUM_STATE_FIELDS; i++) fprintf(f, "%s\n\t\"%s\": \"%" PRId64 "\"", i ? "," : "{", fields[i].name, *fields[i].value);
    for (int k = 0; k < 2; k++) {
        fprintf(f, ",\n\t\"%s_window\": [", k ? "norm" : "loss");
        for (int i = 0; i < SPIKE_WINDOW; i++) fprintf(f, "%s%.17g", i ? ", " : "", windows[k][i]);
        fprintf(f, "]");
    }
    fprintf(f, "\n}\n");
    if (fclose(f) != 0) die(EXIT_SYSTEM, "out of memory: cannot write state.json");
    return text;
}

LLMC_FN int state_from_json_(TrainState *state, const char *text, const char *path, Error *err) {
    cJSON *json = cJSON_Parse(text);
    int rc = 0;
    StateField fields[NUM_STATE_FIELDS];
    memset(state, 0, sizeof *state);
    state_fields_(state, fields);
    double *windows[] = {state->spikes.loss, state->spikes.norm};
    for (int i = 0; i < NUM_STATE_FIELDS && rc == 0; i++) {
        const cJSON *item = cJSON_GetObjectItemCaseSensitive(json, fields[i].name);
        char *end = NULL;
        if (!item && i >= NUM_OLD_STATE_FIELDS) continue;
        if (cJSON_IsString(item)) *fields[i].value = strtoll(item->valuestring, &end, 10);
        if (!end || *end || *fields[i].value < 0) rc = fail(err, "%s: \"%s\" is missing or not a number; the file is damaged", path, fields[i].name);
    }
    for (int k = 0; k < 2; k++) {
        const cJSON *list = cJSON_GetObjectItemCaseSensitive(json, k ? "norm_window" : "loss_window"), *item;
        int i = 0;
        cJSON_ArrayForEach(item, list) if (i < SPIKE_WINDOW && cJSON_IsNumber(item)) windows[k][i++] = item->valuedouble;
        if (state->spikes.seen > 0 && i < SPIKE_WINDOW) state->spikes.seen = 0;
    }
    cJSON_Delete(json);
    return rc;
}

// Weights and moments in host memory, fp32, laid out by model.tensors: params (num_stored); of the moments this rank's slices, or all.
typedef struct {
    float *params;
    float *adam_m, *adam_v;     // (num_stored / moments.world)
    Slice moments;
} HostWeights;

// The files of a checkpoint with n optimizer files, in the order of CHECKSUMS: first those that make a model, then what training needs to
// go on, state.json behind the last optimizer file. The caller frees the name.
enum { FILE_MODEL, FILE_CONFIG, NUM_MODEL_FILES, FILE_OPTIMIZER = NUM_MODEL_FILES, ALL_FILES = 1 << 30 };
LLMC_FN char *checkpoint_file_(int i, int n) {
    if (i < FILE_OPTIMIZER) return xasprintf("%s", i == FILE_MODEL ? "model.safetensors" : "config.json");
    if (i == FILE_OPTIMIZER + n) return xasprintf("state.json");
    return xasprintf("optimizer-%05d-of-%05d.safetensors", i - FILE_OPTIMIZER, n);
}

LLMC_FN char *checkpoint_path_(const char *folder, int i, int n) {
    char *name = checkpoint_file_(i, n), *path = xasprintf("%s/%s", folder, name);
    free(name);
    return path;
}

// How many optimizer files a checkpoint has.
LLMC_FN int checkpoint_parts_(const char *folder) {
    DIR *dir = opendir(folder);
    int n = 1, part, of, end;
    for (struct dirent *e; dir && (e = readdir(dir)); ) {
        end = 0;
        if (sscanf(e->d_name, "optimizer-%5d-of-%5d.safetensors%n", &part, &of, &end) == 2 && end && !e->d_name[end] && of > 0) n = of;
    }
    if (dir) closedir(dir);
    return n;
}

LLMC_FN double checkpoint_bytes(const Model *m) { return 3.0 * 4.0 * (double)m->num_parameters; }

LLMC_FN uint64_t hash_of_(const char *text) { return XXH64(text, strlen(text), 0); }

// Removes a folder of plain files; what is not there is fine.
LLMC_FN int remove_folder_(const char *path, Error *err) {
    DIR *dir = opendir(path);
    if (!dir) return errno == ENOENT ? 0 : fail(err, "%s: cannot open: %s", path, strerror(errno));
    int rc = 0;
    for (struct dirent *e; rc == 0 && (e = readdir(dir)); ) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
        if (unlinkat(dirfd(dir), e->d_name, 0) != 0) rc = fail(err, "%s/%s: cannot remove: %s", path, e->d_name, strerror(errno));
    }
    closedir(dir);
    if (rc == 0 && rmdir(path) != 0) rc = fail(err, "%s: cannot remove: %s", path, strerror(errno));
    return rc;
}

// The tensors of bucket k for safetensors_write, each name behind `prefix`; data: the bucket. Returns how many.
LLMC_FN int checkpoint_list_(const Model *m, int k, const char *prefix, const float *data, SafeTensorOut *out) {
    int n = 0;
    for (int i = 0; i < m->num_tensors; i++) {
        const Tensor *t = &m->tensors[i];
        if (tensor_bucket(m, t) != k) continue;
        snprintf(out[n].name, sizeof out[n].name, "%s%s", prefix, t->name);
        out[n].rows = t->rows, out[n].cols = t->cols, out[n].ld = t->ld, out[n].data = data + t->offset - model_bucket(m, k).offset;
        n++;
    }
    return n;
}

// Writes this rank's optimizer file, number `rank` of `parts`; all ranks together bring each bucket's slices to the rank that writes it.
LLMC_FN int checkpoint_save_optimizer_(const char *path, int parts, const Model *m, const HostWeights *w, uint64_t *hash, Comm *comm, Error *err) {
    SafeTensorOut *list = (SafeTensorOut *)xcalloc(2 * (size_t)m->num_tensors, sizeof *list);
    float **gathered = (float **)xcalloc(2 * (size_t)model_buckets(m), sizeof *gathered);
    int n = 0, rc = 0;
    for (int i = 0; i < 2 * model_buckets(m); i++) {
        int k = i / 2, writer = k % parts, mine = writer == comm_rank(comm);
        const char *prefix = i % 2 ? "v." : "m.";
        Bucket b = model_bucket(m, k);
        const float *data = (i % 2 ? w->adam_v : w->adam_m) + b.offset / (size_t)w->moments.world;
        if (w->moments.world > 1) {
            size_t bytes = b.size / (size_t)w->moments.world * sizeof *data;
            if (mine) gathered[i] = (float *)xmalloc(b.size * sizeof *data);
            comm_gather(comm, gathered[i], data, bytes, writer, "moments for a checkpoint");
            data = gathered[i];
        }
        if (mine) n += checkpoint_list_(m, k, prefix, data, list + n);
    }
    if (comm_rank(comm) < parts) rc = safetensors_write(path, list, n, hash, err);
    for (int i = 0; i < 2 * model_buckets(m); i++) free(gathered[i]);
    free(gathered);
    free(list);
    return rc;
}

// Writes OUT/step_%08d. All ranks call it and get the same answer: 0, or -1 with the reason (a full disk, say); then nothing but the
// folder that was aside is lost. params count on rank 0 only.
LLMC_FN int checkpoint_save(const char *out, const Model *m, const HostWeights *w, const TrainState *state, Comm *comm, Error *err) {
    char *folder = xasprintf("%s/step_%08" PRId64, out, state->step), *aside = xasprintf("%s.tmp", folder);
    int rank = comm_rank(comm), parts = comm_world(comm) < model_buckets(m) ? comm_world(comm) : model_buckets(m), files = FILE_OPTIMIZER + parts + 1;
    uint64_t mine = 0, *hash = (uint64_t *)xcalloc((size_t)files + (size_t)comm_world(comm), sizeof *hash);
    char **path = (char **)xcalloc((size_t)files, sizeof *path), *sums = NULL, *sums_path = xasprintf("%s/CHECKSUMS", aside);
    Error ignored;
    for (int i = 0; i < files; i++) path[i] = checkpoint_path_(aside, i, parts);

    int rc = rank == 0 ? remove_folder_(aside, err) : 0;
    if (rc == 0 && rank == 0) rc = make_dirs(aside, err);
    rc = comm_failed(comm, rc, err, "checkpoint's folder");
    if (rc == 0) {
        rc = checkpoint_save_optimizer_(path[FILE_OPTIMIZER + (rank < parts ? rank : 0)], parts, m, w, &mine, comm, err);
        rc = comm_failed(comm, rc, err, "checkpoint's moments");
    }
    comm_gather(comm, hash + FILE_OPTIMIZER, &mine, sizeof mine, 0, "checksums");
    if (rc == 0 && rank == 0) {
        SafeTensorOut *list = (SafeTensorOut *)xcalloc((size_t)m->num_tensors, sizeof *list);
        for (int k = 0, n = 0; k < model_buckets(m); k++) n += checkpoint_list_(m, k, "", w->params + model_bucket(m, k).offset, list + n);
        rc = safetensors_write(path[FILE_MODEL], list, m->num_tensors, &hash[FILE_MODEL], err);
        free(list);
        char *text[] = {config_to_json(&m->config), state_to_json_(state)};
        const int at[] = {FILE_CONFIG, FILE_OPTIMIZER + parts};
        for (int i = 0; i < 2; i++) {
            hash[at[i]] = hash_of_(text[i]);
            if (rc == 0) rc = write_small_file(path[at[i]], text[i], strlen(text[i]), err);
            free(text[i]);
        }
        for (int i = 0; i < files; i++) {
            char *name = checkpoint_file_(i, parts), *longer = xasprintf("%s%016" PRIx64 "  %s\n", sums ? sums : "", hash[i], name);
            free(name), free(sums);
            sums = longer;
        }
        if (rc == 0) rc = write_small_file(sums_path, sums, strlen(sums), err);
        if (rc == 0) rc = sync_path(aside, err);
        if (rc == 0) rc = remove_folder_(folder, err);      // a run that was rewound writes a step again
        if (rc == 0 && rename(aside, folder) != 0) rc = fail(err, "%s: cannot rename to %s: %s", aside, folder, strerror(errno));
        if (rc == 0) rc = sync_path(out, err);
    }
    rc = comm_failed(comm, rc, err, "checkpoint");
    if (rc != 0 && rank == 0) remove_folder_(aside, &ignored);

    for (int i = 0; i < files; i++) free(path[i]);
    free(path), free(hash), free(sums), free(sums_path), free(aside), free(folder);
    return rc;
}

// Steps of the whole checkpoints in OUT, ascending; count in *n. NULL where there are none. The caller frees it.
LLMC_FN int64_t *checkpoint_steps(const char *out, int *n) {
    int64_t *steps = NULL;
    DIR *dir = opendir(out);
    *n = 0;
    for (struct dirent *e; dir && (e = readdir(dir)); ) {
        long long step;
        int end = 0;
        if (sscanf(e->d_name, "step_%lld%n", &step, &end) != 1 || e->d_name[end] || step < 0) continue;
        steps = (int64_t *)xrealloc(steps, ((size_t)*n + 1) * sizeof *steps);
        int at = (*n)++;
        for (; at > 0 && steps[at - 1] > step; at--) steps[at] = steps[at - 1];
        steps[at] = step;
    }
    if (dir) closedir(dir);
    return steps;
}

// Keeps the newest `keep` checkpoints and those whose step is a multiple of keep_every; removes the others. keep 0: all stay.
LLMC_FN int checkpoint_prune(const char *out, int64_t keep, int64_t keep_every, Error *err) {
    int n, rc = 0;
    int64_t *steps = checkpoint_steps(out, &n);
    for (int i = 0; keep > 0 && i < n - keep && rc == 0; i++) {
        if (keep_every > 0 && steps[i] % keep_every == 0) continue;
        char *folder = xasprintf("%s/step_%08" PRId64, out, steps[i]), *aside = xasprintf("%s.tmp", folder);
        // renamed first, so that a crash half-way does not leave half a checkpoint under a final name
        rc = remove_folder_(aside, err);
        if (rc == 0 && rename(folder, aside) != 0) rc = fail(err, "%s: cannot rename: %s", folder, strerror(errno));
        if (rc == 0) rc = remove_folder_(aside, err);
        free(aside);
        free(folder);
    }
    free(steps);
    return rc;
}

// Compares the first num_files files, NUM_MODEL_FILES or ALL_FILES, with CHECKSUMS. Returns 0 when they are whole, -1 with the reason when not.
LLMC_FN int checkpoint_verify(const char *folder, int num_files, Error *err) {
    char *sums_path = xasprintf("%s/CHECKSUMS", folder);
    char *sums = read_small_file(sums_path, 1 << 20, NULL, err), *at = sums;
    int rc = sums ? 0 : -1, parts = checkpoint_parts_(folder);
    for (int i = 0; i < FILE_OPTIMIZER + parts + 1 && i < num_files && rc == 0; i++) {
        char *name = checkpoint_file_(i, parts), *path = checkpoint_path_(folder, i, parts), wanted[80];
        uint64_t hash = 0, bytes;
        rc = hash_file(path, &hash, &bytes, err);
        snprintf(wanted, sizeof wanted, "%016" PRIx64 "  %s\n", hash, name);
        if (rc == 0 && strncmp(at, wanted, strlen(wanted)) != 0)
            rc = fail(err, "%s: its checksum is not the one in CHECKSUMS; it is damaged: remove %s to go on from the checkpoint before it", path, folder);
        at += rc == 0 ? strlen(wanted) : 0;
        free(path);
        free(name);
    }
    if (rc == 0 && num_files == ALL_FILES && *at) rc = fail(err, "%s: has more lines than there are files; it is damaged", sums_path);
    free(sums);
    free(sums_path);
    return rc;
}

// config.json of a checkpoint folder, ours or another's.
LLMC_FN int checkpoint_load_config(const char *folder, Config *config, Error *err) {
    char *path = checkpoint_path_(folder, FILE_CONFIG, 0);
    char *text = read_small_file(path, 1 << 20, NULL, err);
    int rc = text ? config_from_json(config, text, path, err) : -1;
    free(text);
    free(path);
    return rc;
}

// The tensor t of the model, `prefix` before its name: it must be there, floating-point and of the model's shape. NULL with the reason.
LLMC_FN const SafeTensor *checkpoint_find_(const SafeTensors *st, const Model *m, const char *prefix, const Tensor *t, Error *err) {
    char name[80];
    snprintf(name, sizeof name, "%s%s", prefix, t->name);
    const SafeTensor *s = safetensors_find(st, name);
    if (!s && t == m->tensors) s = safetensors_find(st, "transformer.wte.weight");   // tied: either name will do
    if (!s) fail(err, "%s: has no tensor \"%s\"; is it a %s model of %" PRId64 " layers?", st->path, name, attn_name(m->config.attn), m->config.n_layer);
    else if (s->num_dims != 2 || s->shape[0] != t->rows || s->shape[1] != t->cols)
        fail(err, "%s: tensor \"%s\" is %d-dimensional, %lld x %lld; the model wants %lld x %lld", st->path, name, s->num_dims,
             (long long)(s->num_dims > 0 ? s->shape[0] : 0), (long long)(s->num_dims > 1 ? s->shape[1] : 0), (long long)t->rows, (long long)t->cols);
    else if (s->dtype == DTYPE_I64 || s->dtype == DTYPE_OTHER)
        fail(err, "%s: tensor \"%s\" is of %s; weights are F32, F64, BF16 or F16", st->path, name, dtype_name(s->dtype));
    else return s;
    return NULL;
}

// Reads every tensor of the model into a parameter-shaped fp32 buffer, padding zeroed. Adds the number of tensors it used to *used.
LLMC_FN int checkpoint_read_tensors(const SafeTensors *st, const Model *m, const char *prefix, float *out, int *used, Error *err) {
    memset(out, 0, m->num_stored * sizeof *out);
    for (int i = 0; i < m->num_tensors; i++) {
        const Tensor *t = &m->tensors[i];
        const SafeTensor *s = checkpoint_find_(st, m, prefix, t, err);
        if (!s || safetensors_read_rows(st, s, 0, t->rows, t->cols, out + t->offset, t->ld, err) != 0) return -1;
        (*used)++;
    }
    return 0;
}

// A tensor that belongs to nothing is an error.
LLMC_FN int checkpoint_all_used_(const SafeTensors *st, int used, Error *err) {
    if (used == st->num_tensors) return 0;
    return fail(err, "%s: has %d tensors, the model %d; config.json is of another model", st->path, st->num_tensors, used);
}

LLMC_FN int checkpoint_load_weights(const char *folder, const Model *m, float *params, Error *err) {
    char *path = checkpoint_path_(folder, FILE_MODEL, 0);
    SafeTensors st;
    int used = 0, rc = safetensors_open(&st, path, err);
    if (rc == 0) {
        rc = checkpoint_read_tensors(&st, m, "", params, &used, err);
        if (safetensors_find(&st, "transformer.wte.weight") && safetensors_find(&st, "lm_head.weight")) used++;     // as published
        if (rc == 0) rc = checkpoint_all_used_(&st, used, err);
        safetensors_close(&st);
    }
    free(path);
    return rc;
}

// The moments of one optimizer file, number `part`: of each tensor only the rows that this rank's slices touch.
LLMC_FN int checkpoint_read_moments_(const SafeTensors *st, int part, int parts, const Model *m, HostWeights *w, Error *err) {
    int used = 0, rc = 0;
    for (int k = part; k < model_buckets(m) && rc == 0; k += parts) {
        Bucket b = model_bucket(m, k), slice = model_slice(m, w->moments, k);
        float *whole = (float *)xmalloc(b.size * sizeof *whole);
        for (int i = 0; i < 2 && rc == 0; i++) {
            memset(whole, 0, b.size * sizeof *whole);
            for (int j = 0; j < m->num_tensors && rc == 0; j++) {
                const Tensor *t = &m->tensors[j];
                if (tensor_bucket(m, t) != k) continue;
                const SafeTensor *s = checkpoint_find_(st, m, i ? "v." : "m.", t, err);
                int64_t from = (int64_t)slice.offset - (int64_t)t->offset, first = from / t->ld, last = (from + (int64_t)slice.size) / t->ld + 1;
                if (first < 0) first = 0;
                if (last > t->rows) last = t->rows;
                rc = s ? 0 : -1;
                if (rc == 0 && first < last)
                    rc = safetensors_read_rows(st, s, first, last - first, t->cols, whole + t->offset - b.offset + (size_t)(first * t->ld), t->ld, err);
                used++;
            }
            memcpy((i ? w->adam_v : w->adam_m) + b.offset / (size_t)w->moments.world, whole + slice.offset - b.offset, slice.size * sizeof *whole);
        }
        free(whole);
    }
    return rc == 0 ? checkpoint_all_used_(st, used, err) : rc;
}

// Moments and state of a checkpoint that checkpoint_verify has found whole, whatever number of ranks wrote it.
LLMC_FN int checkpoint_load_optimizer(const char *folder, const Model *m, HostWeights *w, TrainState *state, Error *err) {
    int parts = checkpoint_parts_(folder), rc = 0;
    for (int i = 0; i < parts && rc == 0; i++) {
        char *path = checkpoint_path_(folder, FILE_OPTIMIZER + i, parts);
        SafeTensors st;
        rc = safetensors_open(&st, path, err);
        if (rc == 0) {
            rc = checkpoint_read_moments_(&st, i, parts, m, w, err);
            safetensors_close(&st);
        }
        free(path);
    }
    if (rc != 0) return -1;
    char *path = checkpoint_path_(folder, FILE_OPTIMIZER + parts, parts), *text = read_small_file(path, 1 << 16, NULL, err);
    rc = text ? state_from_json_(state, text, path, err) : -1;
    free(text);
    free(path);
    return rc;
}

#endif
