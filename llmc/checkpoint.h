// Checkpoints: one folder a step, OUT/step_00001000, that is there whole or not at all.
//   model.safetensors                       fp32 weights, published names and shapes, no padding
//   config.json                             the model's configuration
//   optimizer-00000-of-00001.safetensors    AdamW's moments: "m.<weight>" and "v.<weight>"
//   state.json                              step, place in the data, and what that place means
//   CHECKSUMS                               XXH64 of the four, in the form that `xxhsum -c CHECKSUMS` reads
// They are written to OUT/step_00001000.tmp, flushed to disk, and that folder is renamed: a crash at any moment leaves the
// previous checkpoint as it was. Both trainers write and read the same files.
#ifndef LLMC_CHECKPOINT_H
#define LLMC_CHECKPOINT_H

#include <dirent.h>
#include <inttypes.h>
#include "model.h"
#include "safetensors.h"

// What a run is besides its weights and moments. All random numbers are functions of seed and step (rng.h).
enum { NUM_STATE_FIELDS = 8 };
typedef struct {
    int64_t step;               // updates done
    int64_t epoch, position;    // the loader's place, in windows
    int64_t seed, shuffle, seq_len, shards;     // what gives that place its meaning; shards: loader_fingerprint, top bit cleared
    int64_t bad_steps;          // steps in a row whose gradient was not finite
} TrainState;

typedef struct { const char *name; int64_t *value; } StateField;
LLMC_FN void state_fields_(TrainState *s, StateField out[NUM_STATE_FIELDS]) {
    const StateField fields[NUM_STATE_FIELDS] = {
        {"step", &s->step}, {"epoch", &s->epoch}, {"position", &s->position}, {"seed", &s->seed}, {"shuffle", &s->shuffle},
        {"seq_len", &s->seq_len}, {"shards", &s->shards}, {"bad_steps", &s->bad_steps}};
    memcpy(out, fields, sizeof fields);
}

// The files of a checkpoint, in the order of CHECKSUMS: first those that make a model, then what training needs to go on.
enum { FILE_MODEL, FILE_CONFIG, NUM_MODEL_FILES, FILE_OPTIMIZER = NUM_MODEL_FILES, FILE_STATE, NUM_CHECKPOINT_FILES };
LLMC_FN const char *checkpoint_file_(int i) {
    static const char *const names[NUM_CHECKPOINT_FILES] = {"model.safetensors", "config.json", "optimizer-00000-of-00001.safetensors", "state.json"};
    return names[i];
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

// The tensors of a parameter-shaped buffer for safetensors_write, each name behind `prefix`.
LLMC_FN void checkpoint_list_(const Model *m, const char *prefix, const float *data, SafeTensorOut *out) {
    for (int i = 0; i < m->num_tensors; i++) {
        const Tensor *t = &m->tensors[i];
        snprintf(out[i].name, sizeof out[i].name, "%s%s", prefix, t->name);
        out[i].rows = t->rows, out[i].cols = t->cols, out[i].ld = t->ld, out[i].data = data + t->offset;
    }
}

// Writes OUT/step_%08d from parameter-shaped fp32 buffers on the host. Returns 0, or -1 with the reason (a full disk, say);
// then nothing but the folder that was aside is lost.
LLMC_FN int checkpoint_save(const char *out, const Model *m, const float *params, const float *adam_m, const float *adam_v, const TrainState *state, Error *err) {
    char *folder = xasprintf("%s/step_%08" PRId64, out, state->step), *aside = xasprintf("%s.tmp", folder), *path[NUM_CHECKPOINT_FILES];
    SafeTensorOut *list = (SafeTensorOut *)xcalloc(2 * (size_t)m->num_tensors, sizeof *list);
    for (int i = 0; i < NUM_CHECKPOINT_FILES; i++) path[i] = xasprintf("%s/%s", aside, checkpoint_file_(i));
    uint64_t hash[NUM_CHECKPOINT_FILES];
    Error ignored;

    int rc = remove_folder_(aside, err);
    if (rc == 0) rc = make_dirs(aside, err);
    checkpoint_list_(m, "", params, list);
    if (rc == 0) rc = safetensors_write(path[FILE_MODEL], list, m->num_tensors, &hash[FILE_MODEL], err);
    checkpoint_list_(m, "m.", adam_m, list);
    checkpoint_list_(m, "v.", adam_v, list + m->num_tensors);
    if (rc == 0) rc = safetensors_write(path[FILE_OPTIMIZER], list, 2 * m->num_tensors, &hash[FILE_OPTIMIZER], err);

    char *text = config_to_json(&m->config);
    hash[FILE_CONFIG] = hash_of_(text);
    if (rc == 0) rc = write_small_file(path[FILE_CONFIG], text, strlen(text), err);
    cJSON_free(text);

    TrainState copy = *state;
    StateField fields[NUM_STATE_FIELDS];
    state_fields_(&copy, fields);
    text = xasprintf("{");
    for (int i = 0; i < NUM_STATE_FIELDS; i++) {    // as text: 64-bit integers do not fit JSON's numbers
        char *longer = xasprintf("%s%s\n\t\"%s\": \"%" PRId64 "\"", text, i ? "," : "", fields[i].name, *fields[i].value);
        free(text);
        text = longer;
    }
    char *state_text = xasprintf("%s\n}\n", text);
    hash[FILE_STATE] = hash_of_(state_text);
    if (rc == 0) rc = write_small_file(path[FILE_STATE], state_text, strlen(state_text), err);
    free(state_text);
    free(text);

    char sums[NUM_CHECKPOINT_FILES * 80], *sums_path = xasprintf("%s/CHECKSUMS", aside);
    size_t used = 0;
    for (int i = 0; i < NUM_CHECKPOINT_FILES; i++)
        used += (size_t)snprintf(sums + used, sizeof sums - used, "%016" PRIx64 "  %s\n", hash[i], checkpoint_file_(i));
    if (rc == 0) rc = write_small_file(sums_path, sums, used, err);
    if (rc == 0) rc = sync_path(aside, err);
    if (rc == 0) rc = remove_folder_(folder, err);      // a run that was rewound writes a step again
    if (rc == 0 && rename(aside, folder) != 0) rc = fail(err, "%s: cannot rename to %s: %s", aside, folder, strerror(errno));
    if (rc == 0) rc = sync_path(out, err);
    if (rc != 0) remove_folder_(aside, &ignored);

    for (int i = 0; i < NUM_CHECKPOINT_FILES; i++) free(path[i]);
    free(sums_path);
    free(list);
    free(aside);
    free(folder);
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

// Compares the first num_files files, NUM_MODEL_FILES or all, with CHECKSUMS. Returns 0 when they are whole, -1 with the reason when not.
LLMC_FN int checkpoint_verify(const char *folder, int num_files, Error *err) {
    char *sums_path = xasprintf("%s/CHECKSUMS", folder);
    char *sums = read_small_file(sums_path, 4096, NULL, err), *at = sums;
    int rc = sums ? 0 : -1;
    for (int i = 0; i < num_files && rc == 0; i++) {
        char *path = xasprintf("%s/%s", folder, checkpoint_file_(i)), wanted[80];
        uint64_t hash = 0, bytes;
        rc = hash_file(path, &hash, &bytes, err);
        snprintf(wanted, sizeof wanted, "%016" PRIx64 "  %s\n", hash, checkpoint_file_(i));
        if (rc == 0 && strncmp(at, wanted, strlen(wanted)) != 0)
            rc = fail(err, "%s: its checksum is not the one in CHECKSUMS; it is damaged: remove %s to go on from the checkpoint before it", path, folder);
        at += rc == 0 ? strlen(wanted) : 0;
        free(path);
    }
    if (rc == 0 && num_files == NUM_CHECKPOINT_FILES && *at) rc = fail(err, "%s: has more lines than there are files; it is damaged", sums_path);
    free(sums);
    free(sums_path);
    return rc;
}

// config.json of a checkpoint folder, ours or another's.
LLMC_FN int checkpoint_load_config(const char *folder, Config *config, Error *err) {
    char *path = xasprintf("%s/%s", folder, checkpoint_file_(FILE_CONFIG));
    char *text = read_small_file(path, 1 << 20, NULL, err);
    int rc = text ? config_from_json(config, text, path, err) : -1;
    free(text);
    free(path);
    return rc;
}

// Reads every tensor of the model, `prefix` before its name, into a parameter-shaped fp32 buffer, padding zeroed. Each tensor must be
// there, floating-point, of the model's shape. Adds the number of tensors it used to *used.
LLMC_FN int checkpoint_read_tensors(const SafeTensors *st, const Model *m, const char *prefix, float *out, int *used, Error *err) {
    memset(out, 0, m->num_stored * sizeof *out);
    for (int i = 0; i < m->num_tensors; i++) {
        const Tensor *t = &m->tensors[i];
        char name[80];
        snprintf(name, sizeof name, "%s%s", prefix, t->name);
        const SafeTensor *s = safetensors_find(st, name);
        if (!s && i == 0) s = safetensors_find(st, "transformer.wte.weight");   // tied: either name will do
        if (!s) return fail(err, "%s: has no tensor \"%s\"; is it a %s model of %" PRId64 " layers?", st->path, name, attn_name(m->config.attn), m->config.n_layer);
        if (s->num_dims != 2 || s->shape[0] != t->rows || s->shape[1] != t->cols)
            return fail(err, "%s: tensor \"%s\" is %d-dimensional, %lld x %lld; the model wants %lld x %lld", st->path, name, s->num_dims,
                        (long long)(s->num_dims > 0 ? s->shape[0] : 0), (long long)(s->num_dims > 1 ? s->shape[1] : 0), (long long)t->rows, (long long)t->cols);
        if (s->dtype == DTYPE_I64 || s->dtype == DTYPE_OTHER)
            return fail(err, "%s: tensor \"%s\" is of %s; weights are F32, F64, BF16 or F16", st->path, name, dtype_name(s->dtype));
        if (safetensors_read_rows(st, s, 0, t->rows, t->cols, out + t->offset, t->ld, err) != 0) return -1;
        (*used)++;
    }
    return 0;
}

// Reads a whole file of such tensors: prefixes[k] into out[k]. A tensor that belongs to nothing is an error, but for the tied
// embedding's second name, as published checkpoints have it.
LLMC_FN int checkpoint_read_file_(const char *folder, int file, const Model *m, const char *const *prefixes, float *const *out, int n, Error *err) {
    char *path = xasprintf("%s/%s", folder, checkpoint_file_(file));
    SafeTensors st;
    int used = 0, rc = safetensors_open(&st, path, err);
    if (rc == 0) {
        for (int k = 0; k < n && rc == 0; k++) rc = checkpoint_read_tensors(&st, m, prefixes[k], out[k], &used, err);
        if (safetensors_find(&st, "transformer.wte.weight") && safetensors_find(&st, "lm_head.weight")) used++;
        if (rc == 0 && used != st.num_tensors)
            rc = fail(err, "%s: has %d tensors, the model %d; config.json is of another model", path, st.num_tensors, used);
        safetensors_close(&st);
    }
    free(path);
    return rc;
}

LLMC_FN int checkpoint_load_weights(const char *folder, const Model *m, float *params, Error *err) {
    static const char *const prefixes[] = {""};
    return checkpoint_read_file_(folder, FILE_MODEL, m, prefixes, &params, 1, err);
}

// Moments and state of a checkpoint that checkpoint_verify has found whole.
LLMC_FN int checkpoint_load_optimizer(const char *folder, const Model *m, float *adam_m, float *adam_v, TrainState *state, Error *err) {
    static const char *const prefixes[] = {"m.", "v."};
    float *const out[] = {adam_m, adam_v};
    if (checkpoint_read_file_(folder, FILE_OPTIMIZER, m, prefixes, out, 2, err) != 0) return -1;
    char *path = xasprintf("%s/%s", folder, checkpoint_file_(FILE_STATE));
    char *text = read_small_file(path, 1 << 16, NULL, err);
    cJSON *json = text ? cJSON_Parse(text) : NULL;
    int rc = text ? 0 : -1;
    StateField fields[NUM_STATE_FIELDS];
    state_fields_(state, fields);
    for (int i = 0; i < NUM_STATE_FIELDS && rc == 0; i++) {
        const cJSON *item = cJSON_GetObjectItemCaseSensitive(json, fields[i].name);
        char *end = NULL;
        if (cJSON_IsString(item)) *fields[i].value = strtoll(item->valuestring, &end, 10);
        if (!end || *end || *fields[i].value < 0) rc = fail(err, "%s: \"%s\" is missing or not a number; the file is damaged", path, fields[i].name);
    }
    cJSON_Delete(json);
    free(text);
    free(path);
    return rc;
}

#endif
