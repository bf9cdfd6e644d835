// Batches from token shards (shard.h). The data are cut into windows of T tokens. Reading a window takes T + 1 tokens,
// because targets are inputs shifted by one; the last target is also the first input of the next window, so no token is
// lost or trained on twice.
//
// Nothing is mapped or cached: a window is one pread into a fixed buffer, so memory stays flat however long the run.
// The order of windows is a function of (seed, epoch, position): shards are permuted, and windows within each shard, so
// that reads stay within one file for a while. A run resumes by setting epoch and position. The order does not depend
// on the number of ranks, which read disjoint windows of it. Without shuffling the order is llm.c's: micro-batch k
// reads tokens k*B*T to (k+1)*B*T of a shard.
#ifndef LLMC_DATALOADER_H
#define LLMC_DATALOADER_H

#include <glob.h>
#include "rng.h"
#include "shard.h"

typedef struct {
    char *path;
    uint64_t tokens;
    uint64_t windows;       // whole windows of T, without those that an epoch of --shuffle 0 skips
    uint64_t xxh64;         // of the file, as in the manifest
    int has_checksum, verified;
} LoaderShard;

typedef enum { ORDER_SEQUENTIAL, ORDER_SHUFFLED } LoaderOrder;

typedef struct {
    // the data
    LoaderShard *shards;
    int num_shards;
    uint64_t tokens, windows;           // per epoch
    char vocab[16];                     // "gpt2" or "bytes"
    int vocab_size, eot;
    double bytes_per_token;             // bytes of text per token, end-of-text counting 0 bytes; 0: no manifest
    // the order
    int64_t T;
    LoaderOrder order;
    uint64_t seed;
    uint64_t epoch, position;           // the next window to read; position < windows
    // the open shard
    int fd, open_shard;
    uint16_t *buffer;                   // (T + 1)
} DataLoader;

LLMC_FN void loader_close(DataLoader *d) {
    for (int i = 0; i < d->num_shards; i++) free(d->shards[i].path);
    free(d->shards);
    free(d->buffer);
    if (d->fd >= 0) close(d->fd);
    memset(d, 0, sizeof *d);
    d->fd = -1;
}

// Finds shard s in the manifest at `path` and takes its checksum. Adds the size of its text to *text_bytes.
LLMC_FN int loader_match_(const DataLoader *d, LoaderShard *s, const Manifest *manifest, const char *path,
                          uint64_t *text_bytes, Error *err) {
    char *own = manifest_of_shard(s->path);
    int same = own && !strcmp(own, path);
    free(own);
    if (!same) return fail(err, "%s and %s belong to different data sets; name only one", d->shards[0].path, s->path);
    const ManifestEntry *entry = NULL;
    for (int i = 0; i < manifest->num_shards; i++)
        if (!strcmp(manifest->shards[i].file, manifest_name(s->path))) entry = &manifest->shards[i];
    if (!entry) return fail(err, "%s: not listed in %s; if it is left over from another run, remove it", s->path, path);
    if (entry->tokens != s->tokens)
        return fail(err, "%s: %llu tokens, but %s says %llu; make it again with data/tokenize", s->path,
                    (unsigned long long)s->tokens, path, (unsigned long long)entry->tokens);
    s->xxh64 = entry->xxh64, s->has_checksum = 1;
    *text_bytes += entry->bytes;
    return 0;
}

// Reads the vocabulary and the checksums from the manifest next to the first shard, if there is one.
LLMC_FN int loader_read_manifest_(DataLoader *d, Error *err) {
    snprintf(d->vocab, sizeof d->vocab, "gpt2");
    d->vocab_size = GPT2_VOCAB_SIZE, d->eot = GPT2_EOT;
    char *path = manifest_of_shard(d->shards[0].path);
    if (!path || access(path, F_OK) != 0) { free(path); return 0; }
    Manifest manifest;
    uint64_t text_bytes = 0;
    int rc = manifest_read(&manifest, path, err);
    d->vocab_size = manifest.vocab_size, d->eot = manifest.eot;
    if (d->eot == BYTES_EOT) snprintf(d->vocab, sizeof d->vocab, "bytes");
    for (int i = 0; i < d->num_shards && rc == 0; i++)
        rc = loader_match_(d, &d->shards[i], &manifest, path, &text_bytes, err);
    if (d->tokens > 0) d->bytes_per_token = (double)text_bytes / (double)d->tokens;
    manifest_free(&manifest);
    free(path);
    return rc;
}

// Finds the files that `pattern` names, a path or a glob, in the order of their names. Folders and files that exist are
// taken as they are, with [ ] * ? in their names: only what follows the longest part that exists is a glob.
LLMC_FN int loader_find_(const char *pattern, glob_t *files) {
    size_t n = strlen(pattern), m = 0;
    char *escaped = (char *)xmalloc(2 * n + 1), *part = xasprintf("%s", pattern);
    while (n > 0 && access(part, F_OK) != 0) {
        do n--; while (n > 0 && part[n] != '/');
        part[n] = 0;
    }
    for (size_t i = 0; pattern[i]; i++) {
        if (i < n && strchr("[]*?\\", pattern[i])) escaped[m++] = '\\';
        escaped[m++] = pattern[i];
    }
    escaped[m] = 0;
    int rc = glob(escaped, 0, NULL, files);
    free(escaped), free(part);
    return rc == 0 ? 0 : -1;
}

// Opens the shards that `pattern` names (a path or a glob), in the order of their names. ORDER_SEQUENTIAL skips the end
// of a shard where it does not fill a micro-batch of unit = B windows, as llm.c does; unit = 1 skips nothing.
LLMC_FN int loader_open(DataLoader *d, const char *pattern, int64_t T, LoaderOrder order, uint64_t unit, uint64_t seed,
                        Error *err) {
    memset(d, 0, sizeof *d);
    d->fd = -1, d->open_shard = -1;
    d->T = T, d->order = order, d->seed = seed;
    if (order == ORDER_SHUFFLED) unit = 1;
    glob_t files;
    if (loader_find_(pattern, &files) != 0) {
        globfree(&files);
        return fail(err, "%s: no such file; make shards with data/tokenize or data/toy_corpus, or name others",
                    pattern);
    }
    d->shards = (LoaderShard *)xcalloc(files.gl_pathc, sizeof *d->shards);
    int rc = 0;
    for (size_t i = 0; i < files.gl_pathc && rc == 0; i++) {
        LoaderShard *s = &d->shards[d->num_shards++];
        s->path = xasprintf("%s", files.gl_pathv[i]);
        int fd = shard_open(s->path, &s->tokens, err);
        if (fd >= 0) close(fd);
        else rc = -1;
        s->windows = s->tokens ? (s->tokens - 1) / ((uint64_t)T * unit) * unit : 0;
        d->tokens += s->tokens, d->windows += s->windows;
    }
    globfree(&files);
    if (rc == 0) rc = loader_read_manifest_(d, err);
    if (rc == 0 && d->windows == 0)
        rc = fail(err, "%s: %llu tokens, fewer than one batch: %llu sequences of %lld tokens and one more need %llu",
                  pattern, (unsigned long long)d->tokens, (unsigned long long)unit, (long long)T,
                  (unsigned long long)((uint64_t)T * unit + 1));
    if (rc != 0) { loader_close(d); return -1; }
    d->buffer = (uint16_t *)xmalloc(((size_t)T + 1) * sizeof *d->buffer);
    return 0;
}

// A hash of the shards' names, sizes and checksums. A run stores it, so that resuming on different data is noticed.
LLMC_FN uint64_t loader_fingerprint(const DataLoader *d) {
    uint64_t h = 0;
    for (int i = 0; i < d->num_shards; i++) {
        const LoaderShard *s = &d->shards[i];
        const char *name = manifest_name(s->path);
        h = XXH64(name, strlen(name), h ^ s->tokens ^ s->xxh64);
    }
    return h;
}

LLMC_FN int loader_open_shard_(DataLoader *d, int i, Error *err) {
    LoaderShard *s = &d->shards[i];
    if (d->open_shard == i) return 0;
    if (d->fd >= 0) close(d->fd);
    d->open_shard = -1;
    d->fd = open_regular(s->path, NULL, err);
    if (d->fd < 0) return -1;
    if (s->has_checksum && !s->verified) {      // once per shard, at its first read; this also fills the page cache
        uint64_t hash = 0, bytes;
        if (hash_file(s->path, &hash, &bytes, err) != 0) return -1;
        if (hash != s->xxh64)
            return fail(err, "%s: damaged: its checksum differs from the manifest's; make it again with data/tokenize",
                        s->path);
        s->verified = 1;
    }
    d->open_shard = i;
    return 0;
}

// Window number `position` of an epoch: returns its number within its shard, and the shard in *shard.
LLMC_FN uint64_t loader_locate_(const DataLoader *d, uint64_t epoch, uint64_t position, int *shard) {
    uint64_t n = (uint64_t)d->num_shards, stream = rng_stream(d->seed, epoch);
    for (uint64_t i = 0; i < n; i++) {
        uint64_t s = d->order == ORDER_SHUFFLED ? rng_permute(stream, i, n) : i;
        uint64_t windows = d->shards[s].windows;
        if (position < windows) {
            *shard = (int)s;
            return d->order == ORDER_SHUFFLED ? rng_permute(rng_stream(stream, s), position, windows) : position;
        }
        position -= windows;
    }
    die(EXIT_SYSTEM, "internal error: window %llu is beyond the epoch", (unsigned long long)position);
}

// Reads B windows, the first of them `ahead` windows after the loader's position, which does not change.
// inputs and targets are (B, T). Rank r of `world` reads micro-batches r, r + world, ... of a step, with ahead = k * B
// for micro-batch k; then all ranks advance by the whole step.
LLMC_FN int loader_read(DataLoader *d, uint64_t ahead, int64_t B, int32_t *inputs, int32_t *targets, Error *err) {
    int64_t T = d->T;
    for (int64_t b = 0; b < B; b++) {
        uint64_t place = d->position + ahead + (uint64_t)b;
        int shard;
        uint64_t window = loader_locate_(d, d->epoch + place / d->windows, place % d->windows, &shard);
        uint64_t first = window * (uint64_t)T, offset = SHARD_HEADER_BYTES + 2 * first;
        if (loader_open_shard_(d, shard, err) != 0) return -1;
        const char *path = d->shards[shard].path;
        if (pread_exactly(d->fd, d->buffer, ((size_t)T + 1) * 2, offset, path, err) != 0) return -1;
        for (int64_t t = 0; t <= T; t++)
            if (d->buffer[t] >= d->vocab_size)
                return fail(err, "%s: token %llu is %d, beyond the vocabulary \"%s\" of %d; was it made for another?",
                            path, (unsigned long long)(first + (uint64_t)t), d->buffer[t], d->vocab, d->vocab_size);
        for (int64_t t = 0; t < T; t++) inputs[b * T + t] = d->buffer[t], targets[b * T + t] = d->buffer[t + 1];
    }
    return 0;
}

LLMC_FN void loader_advance(DataLoader *d, uint64_t windows) {
    d->position += windows;
    d->epoch += d->position / d->windows;
    d->position %= d->windows;
}

// Reads the next B windows and advances past them.
LLMC_FN int loader_next(DataLoader *d, int64_t B, int32_t *inputs, int32_t *targets, Error *err) {
    if (loader_read(d, 0, B, inputs, targets, err) != 0) return -1;
    loader_advance(d, (uint64_t)B);
    return 0;
}

#endif
