// Checkpoints: one folder per step, OUT/step_00001000, which is there whole or not at all. Both trainers write and
// read the same files.
//   model.safetensors                       fp32 weights, published names and shapes, without padding
//   config.json                             the model's configuration
//   optimizer-00000-of-00001.safetensors    AdamW's moments: "m.<weight>" and "v.<weight>"
//   state.json                              the step and the place in the data, with what defines that place
//   CHECKSUMS                               XXH64 of the other files, as `xxhsum -c CHECKSUMS` reads it
//
// Saving: all files go to OUT/step_00001000.RUN.tmp, each flushed to disk, CHECKSUMS last. Then the folder itself is
// flushed, renamed to OUT/step_00001000, and OUT is flushed. A crash leaves
//   before the rename   a .tmp folder, which nothing reads and the next run in OUT deletes; no other change
//   after the rename    the new checkpoint
// Pruning renames a checkpoint to such a name before it deletes it. A step that is there already is not saved again.
//
// RUN is the id of the run's lock (run_lock.h). When rank 0 dies, others may go on writing for a moment; the next run
// in OUT does not meet them, since only rank 0 renames, and its own folder has a name of its own.
//
// Nothing in a checkpoint depends on the number of ranks. Of N ranks, rank r writes optimizer file r, with the moments
// of buckets (model.h) r, r + N, ..., and each tensor whole. Any number of ranks can read them, each its own slices.
// Rank 0 writes the other files when all ranks are done with theirs.
#ifndef LLMC_CHECKPOINT_H
#define LLMC_CHECKPOINT_H

#include <dirent.h>
#include <inttypes.h>
#include "comm.h"
#include "model.h"
#include "run_lock.h"
#include "safetensors.h"
#include "spikes.h"

// ---------------------------------------------------------------------------------------------------------------------
// What a checkpoint holds

// The state of a run besides its weights and moments. Random numbers need none: they are functions of seed and step
// (rng.h).
enum { NUM_STATE_FIELDS = 11, NUM_OLD_STATE_FIELDS = 8 };
typedef struct {
    int64_t step;               // updates done
    int64_t epoch, position;    // of the data loader; position is a number of windows
    int64_t seed, shuffle, seq_len, shards;     // what defines that position; shards: loader_fingerprint >> 1
    int64_t bad_steps;          // steps skipped in a row: gradients that were not finite, or spikes
    int64_t skipped;            // steps skipped in all
    int64_t batch_size;         // defines the position too if shuffle is 0; 0: not known
    SpikeWindow spikes;
    char *flags;                // those of the run, one line each: "--lr 0.0006\n..."; NULL: not known
} TrainState;

// Weights and moments in host memory, fp32, laid out by model.tensors. The trainer owns them.
typedef struct {
    float *params;              // (num_stored)
    float *adam_m, *adam_v;     // (num_stored / moments.world)
    Slice moments;              // which part of each bucket the moments are
} HostWeights;

enum { MOMENT_M, MOMENT_V, NUM_MOMENTS };
LLMC_FN const char *moment_prefix_(int moment) { return moment == MOMENT_V ? "v." : "m."; }

// This rank's slice of a bucket of a moment.
LLMC_FN float *moment_slice_(const HostWeights *w, int moment, Bucket bucket) {
    return (moment == MOMENT_V ? w->adam_v : w->adam_m) + bucket.offset / (size_t)w->moments.world;
}

// The size of a checkpoint: weights and two moments.
LLMC_FN double checkpoint_bytes(const Model *m) { return 3.0 * 4.0 * (double)m->num_parameters; }

// ---------------------------------------------------------------------------------------------------------------------
// state.json: integers as text, because JSON's numbers are doubles and cannot hold all 64 bits

typedef struct { const char *name; int64_t *value; } StateField_;
LLMC_FN void state_fields_(TrainState *s, StateField_ out[NUM_STATE_FIELDS]) {
    const StateField_ fields[NUM_STATE_FIELDS] = {
        {"step", &s->step}, {"epoch", &s->epoch}, {"position", &s->position}, {"seed", &s->seed},
        {"shuffle", &s->shuffle}, {"seq_len", &s->seq_len}, {"shards", &s->shards}, {"bad_steps", &s->bad_steps},
        // not in old checkpoints:
        {"skipped", &s->skipped}, {"spikes_seen", &s->spikes.seen}, {"batch_size", &s->batch_size}};
    memcpy(out, fields, sizeof fields);
}

// The two arrays of the spike window (SPIKE_WINDOW), with their names.
typedef struct { const char *name; double *values; } StateWindow_;
enum { NUM_STATE_WINDOWS = 2 };
LLMC_FN void state_windows_(TrainState *s, StateWindow_ out[NUM_STATE_WINDOWS]) {
    const StateWindow_ windows[NUM_STATE_WINDOWS] = {{"loss_window", s->spikes.loss}, {"norm_window", s->spikes.norm}};
    memcpy(out, windows, sizeof windows);
}

// The text of state.json. The caller frees it.
LLMC_FN char *state_to_json_(const TrainState *state) {
    TrainState copy = *state;
    StateField_ fields[NUM_STATE_FIELDS];
    StateWindow_ windows[NUM_STATE_WINDOWS];
    state_fields_(&copy, fields);
    state_windows_(&copy, windows);
    char *text = NULL;
    size_t size = 0;
    FILE *f = open_memstream(&text, &size);
    if (!f) die(EXIT_SYSTEM, "out of memory: cannot write state.json");
    for (int i = 0; i < NUM_STATE_FIELDS; i++)
        fprintf(f, "%s\n\t\"%s\": \"%" PRId64 "\"", i ? "," : "{", fields[i].name, *fields[i].value);
    for (int k = 0; k < NUM_STATE_WINDOWS; k++) {
        fprintf(f, ",\n\t\"%s\": [", windows[k].name);
        for (int i = 0; i < SPIKE_WINDOW; i++) fprintf(f, "%s%.17g", i ? ", " : "", windows[k].values[i]);
        fprintf(f, "]");
    }
    cJSON *flags = cJSON_CreateString(state->flags ? state->flags : "");
    char *quoted = cJSON_PrintUnformatted(flags);
    fprintf(f, ",\n\t\"flags\": %s\n}\n", quoted);
    cJSON_free(quoted), cJSON_Delete(flags);
    if (fclose(f) != 0) die(EXIT_SYSTEM, "out of memory: cannot write state.json");
    return text;
}

// Reads an integer written as text: digits and nothing else. NULL or anything else: returns -1.
LLMC_FN int state_integer_(const cJSON *item, int64_t *value) {
    if (!cJSON_IsString(item) || !*item->valuestring) return -1;
    if (item->valuestring[strspn(item->valuestring, "0123456789")]) return -1;
    errno = 0;
    *value = strtoll(item->valuestring, NULL, 10);
    return errno ? -1 : 0;
}

// Reads the object of state.json; path is for the error line. What old files lack is 0 or NULL. The caller frees
// state->flags; on an error there is none.
LLMC_FN int state_from_json_(TrainState *state, const cJSON *json, const char *path, Error *err) {
    StateField_ fields[NUM_STATE_FIELDS];
    StateWindow_ windows[NUM_STATE_WINDOWS];
    memset(state, 0, sizeof *state);
    state_fields_(state, fields);
    state_windows_(state, windows);
    for (int i = 0; i < NUM_STATE_FIELDS; i++) {
        const cJSON *item = cJSON_GetObjectItemCaseSensitive(json, fields[i].name);
        if (!item && i >= NUM_OLD_STATE_FIELDS) continue;
        int64_t most = fields[i].value == &state->shards ? INT64_MAX : (int64_t)9e15;
        if (state_integer_(item, fields[i].value) != 0 || *fields[i].value > most)
            return fail(err, "%s: \"%s\" is missing or not a number in quotes; the file is damaged", path,
                        fields[i].name);
    }
    for (int k = 0; k < NUM_STATE_WINDOWS; k++) {
        const cJSON *list = cJSON_GetObjectItemCaseSensitive(json, windows[k].name), *item;
        if (!list && state->spikes.seen == 0) continue;
        int n = 0, ok = cJSON_IsArray(list) && cJSON_GetArraySize(list) == SPIKE_WINDOW;
        for (item = ok ? list->child : NULL; item; item = item->next) {
            ok &= cJSON_IsNumber(item) && isfinite(item->valuedouble);
            windows[k].values[n++] = item->valuedouble;
        }
        if (!ok)
            return fail(err, "%s: \"%s\" is not an array of %d numbers; the file is damaged", path, windows[k].name,
                        SPIKE_WINDOW);
    }
    const cJSON *flags = cJSON_GetObjectItemCaseSensitive(json, "flags");
    if (flags && !cJSON_IsString(flags)) return fail(err, "%s: \"flags\" is not a string; the file is damaged", path);
    if (flags) state->flags = xasprintf("%s", flags->valuestring);
    return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Files and folders

// The files of a checkpoint, in the order of CHECKSUMS: first those that make a model, then those that training needs
// to resume, which are `parts` optimizer files and, as number FILE_OPTIMIZER + parts, state.json.
enum { FILE_MODEL, FILE_CONFIG, NUM_MODEL_FILES, FILE_OPTIMIZER = NUM_MODEL_FILES, ALL_FILES = 1 << 30 };

// The name of file i. The caller frees it.
LLMC_FN char *checkpoint_file_(int i, int parts) {
    if (i < FILE_OPTIMIZER) return xasprintf("%s", i == FILE_MODEL ? "model.safetensors" : "config.json");
    if (i == FILE_OPTIMIZER + parts) return xasprintf("state.json");
    return xasprintf("optimizer-%05d-of-%05d.safetensors", i - FILE_OPTIMIZER, parts);
}

LLMC_FN char *checkpoint_path_(const char *folder, int i, int parts) {
    char *name = checkpoint_file_(i, parts), *path = xasprintf("%s/%s", folder, name);
    free(name);
    return path;
}

// How many optimizer files a checkpoint has, from their names.
LLMC_FN int checkpoint_parts_(const char *folder) {
    DIR *dir = opendir(folder);
    int n = 1, part, of, end;
    for (struct dirent *e; dir && (e = readdir(dir)); ) {
        end = 0;
        int found = sscanf(e->d_name, "optimizer-%5d-of-%5d.safetensors%n", &part, &of, &end);
        if (found == 2 && end && !e->d_name[end] && of > 0) n = of;
    }
    if (dir) closedir(dir);
    return n;
}

// Removes a folder and the plain files in it. It is not an error if there is none.
LLMC_FN int remove_folder_(const char *path, Error *err) {
    DIR *dir = opendir(path);
    if (!dir) return errno == ENOENT ? 0 : fail(err, "%s: cannot open: %s", path, strerror(errno));
    int rc = 0;
    for (struct dirent *e; rc == 0 && (e = readdir(dir)); ) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
        if (unlinkat(dirfd(dir), e->d_name, 0) != 0)
            rc = fail(err, "%s/%s: cannot remove: %s", path, e->d_name, strerror(errno));
    }
    closedir(dir);
    if (rc == 0 && rmdir(path) != 0) rc = fail(err, "%s: cannot remove: %s", path, strerror(errno));
    return rc;
}

// Where a checkpoint is while it is written or deleted. The caller frees it.
LLMC_FN char *checkpoint_temporary_(const char *folder, const RunLock *lock) {
    return xasprintf("%s.%s.tmp", folder, lock->id);
}

// ---------------------------------------------------------------------------------------------------------------------
// Saving

// Lists the tensors of bucket k in out, with `prefix` before their names. data: the bucket. Returns how many.
LLMC_FN int checkpoint_list_(const Model *m, int k, const char *prefix, const float *data, SafeTensorOut *out) {
    int n = 0;
    for (int i = 0; i < m->num_tensors; i++) {
        const Tensor *t = &m->tensors[i];
        if (tensor_bucket(m, t) != k) continue;
        snprintf(out[n].name, sizeof out[n].name, "%s%s", prefix, t->name);
        out[n].rows = t->rows, out[n].cols = t->cols, out[n].ld = t->ld, out[n].num_dims = t->num_dims;
        out[n].data = data + t->offset - model_bucket(m, k).offset;
        n++;
    }
    return n;
}

// Writes this rank's optimizer file to path, if rank < parts. A collective: each bucket's slices are gathered on the
// rank that writes it.
LLMC_FN int checkpoint_save_optimizer_(const char *path, int parts, const Model *m, const HostWeights *w,
                                       uint64_t *hash, Comm *comm, Error *err) {
    int buckets = model_buckets(m), rank = comm_rank(comm), n = 0, rc = 0;
    size_t world = (size_t)w->moments.world;
    SafeTensorOut *list = (SafeTensorOut *)xcalloc(NUM_MOMENTS * (size_t)m->num_tensors, sizeof *list);
    float **gathered = (float **)xcalloc(NUM_MOMENTS * (size_t)buckets, sizeof *gathered);
    for (int k = 0; k < buckets; k++)
        for (int moment = 0; moment < NUM_MOMENTS; moment++) {
            int writer = k % parts;
            Bucket b = model_bucket(m, k);
            const float *data = moment_slice_(w, moment, b);
            if (world > 1) {
                float **whole = &gathered[NUM_MOMENTS * k + moment];
                if (writer == rank) *whole = (float *)xmalloc(b.size * sizeof *data);
                comm_gather(comm, *whole, data, b.size / world * sizeof *data, writer, "moments for a checkpoint");
                data = *whole;
            }
            if (writer == rank) n += checkpoint_list_(m, k, moment_prefix_(moment), data, list + n);
        }
    if (rank < parts) rc = safetensors_write(path, list, n, hash, err);
    for (int i = 0; i < NUM_MOMENTS * buckets; i++) free(gathered[i]);
    free(gathered);
    free(list);
    return rc;
}

LLMC_FN int checkpoint_save_model_(const char *path, const Model *m, const float *params, uint64_t *hash, Error *err) {
    SafeTensorOut *list = (SafeTensorOut *)xcalloc((size_t)m->num_tensors, sizeof *list);
    int n = 0;
    for (int k = 0; k < model_buckets(m); k++)
        n += checkpoint_list_(m, k, "", params + model_bucket(m, k).offset, list + n);
    int rc = safetensors_write(path, list, n, hash, err);
    free(list);
    return rc;
}

// Writes a text file, gives its hash, and frees path and text.
LLMC_FN int checkpoint_save_text_(char *path, char *text, uint64_t *hash, Error *err) {
    size_t bytes = strlen(text);
    *hash = XXH64(text, bytes, 0);
    int rc = write_small_file(path, text, bytes, err);
    free(path);
    free(text);
    return rc;
}

// The text of CHECKSUMS for n files. The caller frees it.
LLMC_FN char *checkpoint_sums_(const uint64_t *hash, int n, int parts) {
    char *sums = xasprintf("%s", "");
    for (int i = 0; i < n; i++) {
        char *name = checkpoint_file_(i, parts), *longer = xasprintf("%s%016" PRIx64 "  %s\n", sums, hash[i], name);
        free(name), free(sums);
        sums = longer;
    }
    return sums;
}

// Rank 0's part of a save: all files but the optimizer's, whose hashes are in hash (FILE_OPTIMIZER + parts + 1)
// already.
LLMC_FN int checkpoint_save_rest_(const char *folder, int parts, const Model *m, const float *params,
                                  const TrainState *state, uint64_t *hash, Error *err) {
    int state_file = FILE_OPTIMIZER + parts, files = state_file + 1;
    char *model_path = checkpoint_path_(folder, FILE_MODEL, parts), *path;
    uint64_t unused;
    int rc = checkpoint_save_model_(model_path, m, params, &hash[FILE_MODEL], err);
    free(model_path);
    if (rc == 0) {
        path = checkpoint_path_(folder, FILE_CONFIG, parts);
        rc = checkpoint_save_text_(path, config_to_json(&m->config), &hash[FILE_CONFIG], err);
    }
    if (rc == 0) {
        path = checkpoint_path_(folder, state_file, parts);
        rc = checkpoint_save_text_(path, state_to_json_(state), &hash[state_file], err);
    }
    if (rc == 0) {
        path = xasprintf("%s/CHECKSUMS", folder);
        rc = checkpoint_save_text_(path, checkpoint_sums_(hash, files, parts), &unused, err);
    }
    return rc;
}

// Gives a complete folder its final name, which must be free.
LLMC_FN int checkpoint_publish_(const char *out, const RunLock *lock, const char *temporary, const char *folder,
                                Error *err) {
    int rc = sync_path(temporary, err);
    if (rc == 0) rc = run_lock_check(lock, err);
    if (rc == 0 && rename(temporary, folder) != 0)
        rc = fail(err, "%s: cannot rename to %s: %s", temporary, folder, strerror(errno));
    return rc == 0 ? sync_path(out, err) : rc;
}

// Saves the checkpoint OUT/step_%08d of state->step; lock is that of OUT. A collective; w->params counts on rank 0
// only. Returns the same on all ranks: 0, or -1 with the reason in err (disk full, for example); then the .tmp folder
// is removed and earlier checkpoints are as before.
LLMC_FN int checkpoint_save(const char *out, const RunLock *lock, const Model *m, const HostWeights *w,
                            const TrainState *state, Comm *comm, Error *err) {
    char *folder = xasprintf("%s/step_%08" PRId64, out, state->step), *temporary = checkpoint_temporary_(folder, lock);
    int rank = comm_rank(comm), world = comm_world(comm), buckets = model_buckets(m);
    int parts = world < buckets ? world : buckets, part = rank < parts ? rank : 0;
    char *optimizer_path = checkpoint_path_(temporary, FILE_OPTIMIZER + part, parts);
    uint64_t mine = 0, *hash = (uint64_t *)xcalloc((size_t)(FILE_OPTIMIZER + 1 + world), sizeof *hash);

    int rc = rank == 0 ? run_lock_check(lock, err) : 0;
    if (rc == 0 && rank == 0) rc = make_dirs(temporary, err);
    rc = comm_failed(comm, rc, err, "checkpoint's folder");
    if (rc == 0) {
        rc = checkpoint_save_optimizer_(optimizer_path, parts, m, w, &mine, comm, err);
        rc = comm_failed(comm, rc, err, "checkpoint's moments");
    }
    comm_gather(comm, hash + FILE_OPTIMIZER, &mine, sizeof mine, 0, "checksums");
    if (rc == 0 && rank == 0) rc = checkpoint_save_rest_(temporary, parts, m, w->params, state, hash, err);
    if (rc == 0 && rank == 0) rc = checkpoint_publish_(out, lock, temporary, folder, err);
    rc = comm_failed(comm, rc, err, "checkpoint");
    Error ignored;
    if (rc != 0 && rank == 0) remove_folder_(temporary, &ignored);

    free(hash), free(optimizer_path), free(temporary), free(folder);
    return rc;
}

// ---------------------------------------------------------------------------------------------------------------------
// Finding and removing

// The steps of the complete checkpoints in OUT, ascending, and their number in *n. Returns NULL if there are none or
// OUT does not exist. The caller frees the result.
LLMC_FN int64_t *checkpoint_steps(const char *out, int *n) {
    int64_t *steps = NULL;
    DIR *dir = opendir(out);
    *n = 0;
    for (struct dirent *e; dir && (e = readdir(dir)); ) {
        long long step;
        char name[32];
        struct stat info;
        if (sscanf(e->d_name, "step_%18lld", &step) != 1 || step < 0) continue;
        snprintf(name, sizeof name, "step_%08lld", step);
        if (strcmp(name, e->d_name) != 0) continue;
        if (fstatat(dirfd(dir), name, &info, 0) != 0 || !S_ISDIR(info.st_mode)) continue;
        steps = (int64_t *)xrealloc(steps, ((size_t)*n + 1) * sizeof *steps);
        int at = (*n)++;
        for (; at > 0 && steps[at - 1] > step; at--) steps[at] = steps[at - 1];
        steps[at] = step;
    }
    if (dir) closedir(dir);
    return steps;
}

// The checkpoint that a folder means: that folder, or a run's last step_N in it. The caller frees the path. NULL: with
// the reason in err.
LLMC_FN char *checkpoint_folder(const char *path, Error *err) {
    struct stat info;
    if (stat(path, &info) != 0 || !S_ISDIR(info.st_mode)) {
        fail(err, "%s is not the folder of a checkpoint or a run", path);
        return NULL;
    }
    int n;
    int64_t *steps = checkpoint_steps(path, &n);
    char *folder = n ? xasprintf("%s/step_%08" PRId64, path, steps[n - 1]) : xasprintf("%s", path);
    char *config = checkpoint_path_(folder, FILE_CONFIG, 0);
    free(steps);
    if (access(config, F_OK) != 0) {
        fail(err, "%s holds no checkpoint: there is neither %s nor a folder step_N", path, config);
        free(folder), folder = NULL;
    }
    free(config);
    return folder;
}

// Keeps the newest `keep` checkpoints and those whose step is a multiple of keep_every (0: none), and removes the
// others. keep 0: keeps all. Returns 0, or -1 with the reason in err if one cannot be removed.
LLMC_FN int checkpoint_prune(const char *out, const RunLock *lock, int64_t keep, int64_t keep_every, Error *err) {
    int n, rc = run_lock_check(lock, err);
    int64_t *steps = checkpoint_steps(out, &n);
    for (int i = 0; keep > 0 && i < n - keep && rc == 0; i++) {
        if (keep_every > 0 && steps[i] % keep_every == 0) continue;
        char *folder = xasprintf("%s/step_%08" PRId64, out, steps[i]);
        char *temporary = checkpoint_temporary_(folder, lock);
        if (rename(folder, temporary) != 0) rc = fail(err, "%s: cannot rename: %s", folder, strerror(errno));
        if (rc == 0) rc = remove_folder_(temporary, err);
        free(temporary);
        free(folder);
    }
    free(steps);
    return rc;
}

// Removes the step_*.tmp folders that dead runs left in OUT, where that is possible: an orphan may still write to one.
LLMC_FN void checkpoint_clean(const char *out) {
    DIR *dir = opendir(out);
    Error ignored;
    for (struct dirent *e; dir && (e = readdir(dir)); ) {
        size_t n = strlen(e->d_name);
        if (strncmp(e->d_name, "step_", 5) != 0 || n < 9 || strcmp(e->d_name + n - 4, ".tmp") != 0) continue;
        char *folder = xasprintf("%s/%s", out, e->d_name);
        remove_folder_(folder, &ignored);
        free(folder);
    }
    if (dir) closedir(dir);
}

// ---------------------------------------------------------------------------------------------------------------------
// Loading

// Compares the first num_files files (NUM_MODEL_FILES, or ALL_FILES) of a folder with its CHECKSUMS. Returns 0 if they
// match, -1 with the reason in err if one is damaged, missing or cannot be read.
LLMC_FN int checkpoint_verify(const char *folder, int num_files, Error *err) {
    char *sums_path = xasprintf("%s/CHECKSUMS", folder);
    char *sums = read_small_file(sums_path, 1 << 20, NULL, err), *at = sums;
    int rc = sums ? 0 : -1, parts = checkpoint_parts_(folder), files = FILE_OPTIMIZER + parts + 1;
    for (int i = 0; i < files && i < num_files && rc == 0; i++) {
        char *name = checkpoint_file_(i, parts), *path = checkpoint_path_(folder, i, parts), wanted[80];
        uint64_t hash = 0, bytes;
        rc = hash_file(path, &hash, &bytes, err);
        snprintf(wanted, sizeof wanted, "%016" PRIx64 "  %s\n", hash, name);
        if (rc == 0 && strncmp(at, wanted, strlen(wanted)) != 0)
            rc = fail(err, "%s: its checksum is not the one in CHECKSUMS, so it is damaged; use another copy, or an "
                      "earlier checkpoint (to resume from that, delete %s)", path, folder);
        at += rc == 0 ? strlen(wanted) : 0;
        free(path);
        free(name);
    }
    if (rc == 0 && num_files == ALL_FILES && *at)
        rc = fail(err, "%s: lists more files than there are; it is damaged", sums_path);
    free(sums);
    free(sums_path);
    return rc;
}

// The same for a model to start from, which may come from elsewhere: without CHECKSUMS it is taken as it is.
LLMC_FN int checkpoint_verify_model(const char *folder, Error *err) {
    char *sums = xasprintf("%s/CHECKSUMS", folder);
    int rc = access(sums, F_OK) == 0 ? checkpoint_verify(folder, NUM_MODEL_FILES, err) : 0;
    free(sums);
    return rc;
}

// Reads config.json of a checkpoint folder, ours or from elsewhere. Errors as in config_from_json.
LLMC_FN int checkpoint_load_config(const char *folder, Config *config, Error *err) {
    char *path = checkpoint_path_(folder, FILE_CONFIG, 0);
    cJSON *json = json_read(path, 1 << 20, err);
    int rc = json ? config_from_json(config, json, path, err) : -1;
    cJSON_Delete(json);
    free(path);
    return rc;
}

// Finds tensor t of the model in a file, under its name with `prefix` before it. Returns NULL with the reason in err
// if it is missing, has another shape than the model's, or is not floating-point.
LLMC_FN const SafeTensor *checkpoint_find_(const SafeTensors *st, const Model *m, const char *prefix, const Tensor *t,
                                           Error *err) {
    char name[80];
    snprintf(name, sizeof name, "%s%s", prefix, t->name);
    const SafeTensor *s = safetensors_find(st, name);
    if (!s && t == m->tensors) s = safetensors_find(st, "transformer.wte.weight");   // tied: either name will do
    if (!s)
        fail(err, "%s: has no tensor \"%s\"; is it a %s model with %" PRId64 " layers?", st->path, name,
             attn_name(m->config.attn), m->config.n_layer);
    else if (s->num_dims != t->num_dims || s->shape[s->num_dims - 1] != t->cols ||
             (t->num_dims == 2 && s->shape[0] != t->rows))
        fail(err, "%s: tensor \"%s\" has %d dimensions, %lld x %lld; the model needs %d, %lld x %lld", st->path, name,
             s->num_dims, s->num_dims > 0 ? (long long)s->shape[0] : 0, s->num_dims > 1 ? (long long)s->shape[1] : 0,
             t->num_dims, (long long)t->rows, (long long)t->cols);
    else if (s->dtype == DTYPE_I64 || s->dtype == DTYPE_OTHER)
        fail(err, "%s: tensor \"%s\" is stored as %s; weights must be F32, F64, BF16 or F16", st->path, name,
             dtype_name(s->dtype));
    else return s;
    return NULL;
}

// Reads every tensor of the model into out (num_stored), fp32, and zeroes the padding. Tensors are found under their
// names with `prefix` before them. Adds the number of tensors read to *used. Returns 0, or -1 with the reason in err.
LLMC_FN int checkpoint_read_tensors(const SafeTensors *st, const Model *m, const char *prefix, float *out, int *used,
                                    Error *err) {
    memset(out, 0, m->num_stored * sizeof *out);
    for (int i = 0; i < m->num_tensors; i++) {
        const Tensor *t = &m->tensors[i];
        const SafeTensor *s = checkpoint_find_(st, m, prefix, t, err);
        if (!s || safetensors_read_rows(st, s, 0, t->rows, t->cols, out + t->offset, t->ld, err) != 0) return -1;
        (*used)++;
    }
    return 0;
}

// A file with more tensors than the model is an error.
LLMC_FN int checkpoint_all_used_(const SafeTensors *st, int used, Error *err) {
    if (used == st->num_tensors) return 0;
    return fail(err, "%s: has %d tensors, but the model has %d; config.json describes another model", st->path,
                st->num_tensors, used);
}

// Published files have the tied embedding under both of its names. Returns how many tensors that adds to the model's,
// 1 or 0; or -1 with the reason in err if the two are not the same.
LLMC_FN int checkpoint_check_tied_(const SafeTensors *st, Error *err) {
    const SafeTensor *in = safetensors_find(st, "transformer.wte.weight");
    const SafeTensor *out = safetensors_find(st, "lm_head.weight");
    if (!in || !out) return 0;
    int same = in->dtype == out->dtype && in->num_dims == out->num_dims && in->bytes == out->bytes &&
               !memcmp(in->shape, out->shape, sizeof in->shape);
    char a[8192], b[8192];
    for (uint64_t at = 0, n; at < in->bytes && same; at += n) {
        n = in->bytes - at < sizeof a ? in->bytes - at : sizeof a;
        if (pread_exactly(st->fd, a, n, in->offset + at, st->path, err) != 0) return -1;
        if (pread_exactly(st->fd, b, n, out->offset + at, st->path, err) != 0) return -1;
        same = !memcmp(a, b, n);
    }
    if (same) return 1;
    return fail(err, "%s: \"%s\" and \"%s\" differ; a model whose embedding and output are not tied is not supported",
                st->path, in->name, out->name);
}

// Reads model.safetensors of a folder into params (num_stored). Returns 0, or -1 with the reason in err.
LLMC_FN int checkpoint_load_weights(const char *folder, const Model *m, float *params, Error *err) {
    char *path = checkpoint_path_(folder, FILE_MODEL, 0);
    SafeTensors st;
    int rc = safetensors_open(&st, path, err);
    if (rc == 0) {
        int used = checkpoint_check_tied_(&st, err);
        rc = used < 0 ? -1 : checkpoint_read_tensors(&st, m, "", params, &used, err);
        if (rc == 0) rc = checkpoint_all_used_(&st, used, err);
        safetensors_close(&st);
    }
    free(path);
    return rc;
}

// Reads the rows of tensor t that lie in a slice, where they belong in `whole`, a buffer for the bucket that starts at
// offset bucket_offset. The tensor's name has `prefix` before it.
LLMC_FN int checkpoint_read_slice_(const SafeTensors *st, const Model *m, const char *prefix, const Tensor *t,
                                   size_t bucket_offset, Bucket slice, float *whole, Error *err) {
    const SafeTensor *s = checkpoint_find_(st, m, prefix, t, err);
    if (!s) return -1;
    int64_t from = (int64_t)slice.offset - (int64_t)t->offset;      // of the slice in the tensor, in elements
    int64_t first = from / t->ld, last = (from + (int64_t)slice.size) / t->ld + 1;
    if (first < 0) first = 0;
    if (last > t->rows) last = t->rows;
    if (first >= last) return 0;
    float *row = whole + t->offset - bucket_offset + (size_t)(first * t->ld);
    return safetensors_read_rows(st, s, first, last - first, t->cols, row, t->ld, err);
}

// Reads this rank's slices of the moments in optimizer file number `part` of `parts`.
LLMC_FN int checkpoint_read_moments_(const SafeTensors *st, int part, int parts, const Model *m, HostWeights *w,
                                     Error *err) {
    int used = 0, rc = 0;
    for (int k = part; k < model_buckets(m) && rc == 0; k += parts) {
        Bucket b = model_bucket(m, k), slice = model_slice(m, w->moments, k);
        float *whole = (float *)xmalloc(b.size * sizeof *whole);
        for (int moment = 0; moment < NUM_MOMENTS && rc == 0; moment++) {
            memset(whole, 0, b.size * sizeof *whole);
            for (int i = 0; i < m->num_tensors && rc == 0; i++) {
                const Tensor *t = &m->tensors[i];
                if (tensor_bucket(m, t) != k) continue;
                rc = checkpoint_read_slice_(st, m, moment_prefix_(moment), t, b.offset, slice, whole, err);
                used++;
            }
            memcpy(moment_slice_(w, moment, b), whole + slice.offset - b.offset, slice.size * sizeof *whole);
        }
        free(whole);
    }
    return rc == 0 ? checkpoint_all_used_(st, used, err) : rc;
}

// Reads the moments and the state of a checkpoint that checkpoint_verify has accepted, by whatever number of ranks it
// was written: the slices w->moments into w->adam_m and w->adam_v. Not a collective. Returns 0, or -1 with the reason
// in err.
LLMC_FN int checkpoint_load_optimizer(const char *folder, const Model *m, HostWeights *w, TrainState *state,
                                      Error *err) {
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
    char *path = checkpoint_path_(folder, FILE_OPTIMIZER + parts, parts);
    cJSON *json = json_read(path, 1 << 16, err);
    rc = json ? state_from_json_(state, json, path, err) : -1;
    cJSON_Delete(json);
    free(path);
    return rc;
}

#endif
