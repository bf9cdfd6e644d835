// Golden files: a small model with what an independent float64 implementation in PyTorch computes from it.
//
// A safetensors file with its config as JSON in the metadata. It holds the weights under their published names, idx
// and targets (B, T), logits (B, T, V), loss, grad.<weight>, adamw.losses (10) and gen.tokens (24), the greedy tokens
// that follow idx[0].
#ifndef TEST_GOLDEN_H
#define TEST_GOLDEN_H

#include "llmc/checkpoint.h"
#include "test/testing.h"

typedef struct {
    const char *path;
    SafeTensors file;
    Config config;
    int64_t B, T, new_tokens, adamw_steps;
    unsigned char *compared;    // one flag per tensor of the file: golden_read has read it
} Golden;

// Opens a golden file. -1: it cannot be read or is not a golden file. -2: its config is of a model that is not
// supported. Either with the reason in err, and nothing left open.
LLMC_FN int golden_open(Golden *g, const char *path, Error *err) {
    memset(g, 0, sizeof *g);
    g->path = path;
    if (safetensors_open(&g->file, path, err) != 0) return -1;
    const char *json = safetensors_metadata(&g->file, "config");
    const SafeTensor *idx = safetensors_find(&g->file, "idx"), *gen = safetensors_find(&g->file, "gen.tokens");
    const SafeTensor *adamw = safetensors_find(&g->file, "adamw.losses"), *logits = safetensors_find(&g->file,
                                                                                                     "logits");
    cJSON *config = json ? json_parse(json, strlen(json), path, err) : NULL;
    int rc = 0, whole = config && idx && gen && adamw && logits;
    if (whole) whole = idx->num_dims == 2 && idx->shape[0] >= 1 && idx->shape[1] >= 2 && gen->elements >= 1;
    if (whole) whole = logits->num_dims == 3 && logits->shape[0] == idx->shape[0] && logits->shape[1] == idx->shape[1];
    if (!whole)
        rc = fail(err, "%s: its config, idx (B, T), logits (B, T, V), gen.tokens or adamw.losses is missing; not a "
                  "golden file", path);
    else if (config_from_json(&g->config, config, path, err) != 0) rc = -2;
    cJSON_Delete(config);
    if (rc != 0) {
        safetensors_close(&g->file);
        return rc;
    }
    g->B = idx->shape[0], g->T = idx->shape[1], g->new_tokens = (int64_t)gen->elements;
    g->adamw_steps = (int64_t)adamw->elements;
    g->compared = (unsigned char *)xcalloc((size_t)g->file.num_tensors, 1);
    return 0;
}

LLMC_FN void golden_close(Golden *g) {
    free(g->compared);
    safetensors_close(&g->file);
}

// The tensor of that name as doubles, which the caller frees. NULL, with the reason in err: it is missing or has a
// different size.
LLMC_FN double *golden_read(Golden *g, const char *name, int64_t elements, Error *err) {
    const SafeTensor *t = safetensors_find(&g->file, name);
    double *out = (double *)xmalloc((size_t)elements * sizeof *out);
    if (!t) fail(err, "%s: has no tensor \"%s\"", g->path, name);
    else if (t->elements != (uint64_t)elements)
        fail(err, "%s: \"%s\" has %" PRIu64 " elements, its config says %" PRId64, g->path, name, t->elements,
             elements);
    else if (safetensors_read(&g->file, t, 0, (uint64_t)elements, out, err) == 0) {
        g->compared[t - g->file.tensors] = 1;
        return out;
    }
    free(out);
    return NULL;
}

// The same for a tensor of n tokens, each of which must be in the vocabulary.
LLMC_FN int32_t *golden_tokens(Golden *g, const char *name, int64_t n, Error *err) {
    double *values = golden_read(g, name, n, err);
    if (!values) return NULL;
    int32_t *ids = (int32_t *)xmalloc((size_t)n * sizeof *ids);
    for (int64_t i = 0; i < n; i++) {
        if (!(values[i] >= 0 && values[i] < (double)g->config.vocab_size)) {
            fail(err, "%s: \"%s\" has the token %g, beyond the vocabulary of %" PRId64, g->path, name, values[i],
                 g->config.vocab_size);
            free(values), free(ids);
            return NULL;
        }
        ids[i] = (int32_t)values[i];
    }
    free(values);
    return ids;
}

#endif
