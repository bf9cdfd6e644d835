// Token shards and the manifest beside them: what data/tokenize writes and the data loader reads.
//
// A shard (llm.c's format): 256 little-endian int32 {20240520, 1, number of tokens, 0 ...}, then that many uint16
// tokens. A data set NAME is DIR/NAME_val_000000.bin ..., DIR/NAME_train_000001.bin ..., numbered in the order of the
// token stream, validation first.
//
// DIR/NAME_manifest.json says what the shards are (ours; shards without one are read as GPT-2 tokens and not checksummed):
//   {"format": 1, "vocab": "gpt2" | "bytes", "vocab_size": 50257 | 257, "eot": 50256 | 256,
//    "documents": N, "shards": [{"file": "NAME_val_000000.bin", "tokens": N, "bytes": N, "xxh64": "16 hex digits"}, ...]}
// tokens counts what the shard holds, end-of-text tokens included; bytes is the text behind them (end-of-text counts
// zero), from which a loss in bits per byte follows; xxh64 is XXH64 with seed 0 over the whole file, as `xxhsum` prints it.
//
// For adding to a data set later it also has "shard_size" and "val_tokens" as they were asked for, "null_texts" and
// "invalid_utf8_texts" (documents skipped; documents taken bytewise), and "sources", the files added one by one:
//   [{"file": "000_00000.parquet", "bytes": N, "xxh64": "...", "documents": N, "tokens": N}, ...]
// The manifest is written last, so it never lists what is not on the disk. Shards that it does not list do not count.
#ifndef LLMC_SHARD_H
#define LLMC_SHARD_H

#include <cjson/cJSON.h>
#include <inttypes.h>
#ifndef XXH_INLINE_ALL
#define XXH_INLINE_ALL
#endif
#include <xxhash.h>

#include "utils.h"

#define SHARD_MAGIC 20240520
#define SHARD_VERSION 1
#define SHARD_HEADER_INTS 256
#define SHARD_HEADER_BYTES (SHARD_HEADER_INTS * 4)

#define BYTES_EOT 256           // the byte-level vocabulary: 256 bytes and end-of-text
#define BYTES_VOCAB_SIZE 257
#define GPT2_EOT 50256
#define GPT2_VOCAB_SIZE 50257

typedef struct {                // a shard, or a source
    char *file;                 // without folder
    uint64_t tokens, bytes;     // bytes: of the text (a shard), of the file (a source)
    uint64_t documents;         // sources only
    uint64_t xxh64;
} ManifestEntry;

typedef struct {
    int vocab_size, eot;
    uint64_t documents, null_texts, invalid_texts, shard_size, val_tokens;
    int num_shards, num_sources;
    ManifestEntry *shards, *sources;
} Manifest;

LLMC_FN void manifest_free(Manifest *m) {
    for (int i = 0; i < m->num_shards; i++) free(m->shards[i].file);
    for (int i = 0; i < m->num_sources; i++) free(m->sources[i].file);
    free(m->shards), free(m->sources);
    memset(m, 0, sizeof *m);
}

// Adds an entry, which now owns file.
LLMC_FN ManifestEntry *manifest_add(ManifestEntry **list, int *count, char *file) {
    *list = (ManifestEntry *)xrealloc(*list, ((size_t)*count + 1) * sizeof **list);
    ManifestEntry *e = &(*list)[(*count)++];
    memset(e, 0, sizeof *e);
    e->file = file;
    return e;
}

// XXH64 of a whole file, and its size.
LLMC_FN int hash_file(const char *path, uint64_t *xxh64, uint64_t *bytes, Error *err) {
    int fd = open(path, O_RDONLY);
    if (fd < 0) return fail(err, "%s: cannot open: %s", path, strerror(errno));
    size_t capacity = 1 << 20;
    void *buffer = xmalloc(capacity);
    XXH64_state_t *state = XXH64_createState();
    XXH64_reset(state, 0);
    ssize_t n;
    for (*bytes = 0; (n = read(fd, buffer, capacity)) > 0; *bytes += (uint64_t)n) XXH64_update(state, buffer, (size_t)n);
    if (n < 0) fail(err, "%s: read error at byte %" PRIu64 ": %s", path, *bytes, strerror(errno));
    *xxh64 = XXH64_digest(state);
    XXH64_freeState(state);
    free(buffer);
    close(fd);
    return n < 0 ? -1 : 0;
}

// A whole number that is not negative, or -1 through *ok.
LLMC_FN uint64_t manifest_number_(const cJSON *object, const char *key, int *ok) {
    const cJSON *n = cJSON_GetObjectItemCaseSensitive(object, key);
    if (!cJSON_IsNumber(n) || !(n->valuedouble >= 0 && n->valuedouble < 9e15) || n->valuedouble != (double)(uint64_t)n->valuedouble) {
        *ok = 0;
        return 0;
    }
    return (uint64_t)n->valuedouble;
}

LLMC_FN int manifest_entries_(const cJSON *array, int is_source, ManifestEntry **list, int *count) {
    const cJSON *item;
    if (!cJSON_IsArray(array)) return -1;
    cJSON_ArrayForEach(item, array) {
        const cJSON *file = cJSON_GetObjectItemCaseSensitive(item, "file"), *hash = cJSON_GetObjectItemCaseSensitive(item, "xxh64");
        if (!cJSON_IsString(file) || !*file->valuestring || strchr(file->valuestring, '/')) return -1;
        if (!cJSON_IsString(hash) || strlen(hash->valuestring) != 16 || strspn(hash->valuestring, "0123456789abcdef") != 16) return -1;
        int ok = 1;
        ManifestEntry *e = manifest_add(list, count, xasprintf("%s", file->valuestring));
        e->tokens = manifest_number_(item, "tokens", &ok);
        e->bytes = manifest_number_(item, "bytes", &ok);
        if (is_source) e->documents = manifest_number_(item, "documents", &ok);
        e->xxh64 = strtoull(hash->valuestring, NULL, 16);
        if (!ok) return -1;
    }
    return 0;
}

// Reads a manifest. The keys for adding may be missing (0, none).
LLMC_FN int manifest_read(Manifest *m, const char *path, Error *err) {
    memset(m, 0, sizeof *m);
    char *text = read_small_file(path, 256 << 20, NULL, err);
    if (!text) return -1;
    cJSON *json = cJSON_Parse(text);
    free(text);
    int ok = cJSON_IsObject(json);
    const cJSON *vocab = cJSON_GetObjectItemCaseSensitive(json, "vocab"), *sources = cJSON_GetObjectItemCaseSensitive(json, "sources");
    if (ok && manifest_number_(json, "format", &ok) != 1) ok = 0;
    if (ok) {
        m->vocab_size = (int)manifest_number_(json, "vocab_size", &ok);
        m->eot = (int)manifest_number_(json, "eot", &ok);
        m->documents = manifest_number_(json, "documents", &ok);
        int is_bytes = m->vocab_size == BYTES_VOCAB_SIZE && m->eot == BYTES_EOT;
        if (!is_bytes && (m->vocab_size != GPT2_VOCAB_SIZE || m->eot != GPT2_EOT)) ok = 0;
        if (!cJSON_IsString(vocab) || strcmp(vocab->valuestring, is_bytes ? "bytes" : "gpt2") != 0) ok = 0;
        int may_miss = 1;
        m->shard_size = manifest_number_(json, "shard_size", &may_miss);
        m->val_tokens = manifest_number_(json, "val_tokens", &may_miss);
        m->null_texts = manifest_number_(json, "null_texts", &may_miss);
        m->invalid_texts = manifest_number_(json, "invalid_utf8_texts", &may_miss);
        if (manifest_entries_(cJSON_GetObjectItemCaseSensitive(json, "shards"), 0, &m->shards, &m->num_shards) != 0) ok = 0;
        if (sources && manifest_entries_(sources, 1, &m->sources, &m->num_sources) != 0) ok = 0;
    }
    cJSON_Delete(json);
    if (ok) return 0;
    manifest_free(m);
    return fail(err, "%s: not a manifest of token shards (llmc/shard.h says what one is), or a damaged one", path);
}

// One entry on one line.
LLMC_FN void manifest_print_entry_(FILE *f, const ManifestEntry *e, int is_source, int is_last) {
    cJSON *name = cJSON_CreateString(e->file);
    char *quoted = cJSON_PrintUnformatted(name);
    fprintf(f, "    {\"file\": %s, ", quoted);
    if (is_source) fprintf(f, "\"documents\": %" PRIu64 ", ", e->documents);
    fprintf(f, "\"tokens\": %" PRIu64 ", \"bytes\": %" PRIu64 ", \"xxh64\": \"%016" PRIx64 "\"}%s\n", e->tokens, e->bytes, e->xxh64,
        is_last ? "" : ",");
    cJSON_free(quoted);
    cJSON_Delete(name);
}

LLMC_FN int manifest_write(const Manifest *m, const char *path, Error *err) {
    char *text = NULL;
    size_t size = 0;
    FILE *f = open_memstream(&text, &size);
    if (!f) die(EXIT_SYSTEM, "out of memory for a manifest");
    fprintf(f, "{\n  \"format\": 1,\n  \"vocab\": \"%s\",\n  \"vocab_size\": %d,\n  \"eot\": %d,\n", m->eot == BYTES_EOT ? "bytes" : "gpt2",
        m->vocab_size, m->eot);
    fprintf(f, "  \"documents\": %" PRIu64 ",\n  \"null_texts\": %" PRIu64 ",\n  \"invalid_utf8_texts\": %" PRIu64 ",\n", m->documents,
        m->null_texts, m->invalid_texts);
    fprintf(f, "  \"shard_size\": %" PRIu64 ",\n  \"val_tokens\": %" PRIu64 ",\n  \"shards\": [\n", m->shard_size, m->val_tokens);
    for (int i = 0; i < m->num_shards; i++) manifest_print_entry_(f, &m->shards[i], 0, i == m->num_shards - 1);
    fprintf(f, "  ],\n  \"sources\": [\n");
    for (int i = 0; i < m->num_sources; i++) manifest_print_entry_(f, &m->sources[i], 1, i == m->num_sources - 1);
    fprintf(f, "  ]\n}\n");
    if (fclose(f) != 0) die(EXIT_SYSTEM, "out of memory for a manifest");
    int rc = write_small_file(path, text, size, err);
    free(text);
    return rc;
}

#endif
