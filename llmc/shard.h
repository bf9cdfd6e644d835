// Token shards and their manifest: what data/tokenize writes and the data loader reads.
//
// A shard (llm.c's format) is 256 little-endian int32 {20240520, 1, number of tokens, 0 ...}, then that many uint16
// tokens. The data set NAME is DIR/NAME_val_000000.bin ..., DIR/NAME_train_000001.bin ..., numbered in the order of the
// token stream, validation first.
//
// DIR/NAME_manifest.json (our own) describes the shards. Without one they are read as GPT-2 tokens and not checksummed.
//   {"format": 1, "vocab": "gpt2" | "bytes", "vocab_size": 50257 | 257, "eot": 50256 | 256, "documents": N,
//    "shards": [{"file": "NAME_val_000000.bin", "tokens": N, "bytes": N, "xxh64": "16 hex digits"}, ...]}
// "tokens" counts every token of the shard, end-of-text included. "bytes" is the size of the text they encode, where
// end-of-text counts 0; it turns a loss into bits per byte. "xxh64" is XXH64 with seed 0 of the whole file, as `xxhsum`
// prints it.
//
// For adding to a data set later, the manifest also has "shard_size" and "val_tokens" as requested or chosen,
// "null_texts" (documents that were skipped), "invalid_utf8_texts" (documents in which some bytes are not UTF-8; they
// are kept), and "sources", the files that were added one by one:
//   [{"file": "000_00000.parquet", "bytes": N, "xxh64": "...", "documents": N, "tokens": N}, ...]
// The manifest is written last, so it never lists a shard that is not on disk. Shards it does not list do not count.
#ifndef LLMC_SHARD_H
#define LLMC_SHARD_H

#include <inttypes.h>
#ifndef XXH_INLINE_ALL
#define XXH_INLINE_ALL
#endif
#include <xxhash.h>

#include "json.h"
#include "utils.h"

#define SHARD_MAGIC 20240520
#define SHARD_VERSION 1
#define SHARD_HEADER_INTS 256
#define SHARD_HEADER_BYTES (SHARD_HEADER_INTS * 4)

#define BYTES_EOT 256           // the byte-level vocabulary: the 256 bytes and end-of-text
#define BYTES_VOCAB_SIZE 257
#define GPT2_EOT 50256
#define GPT2_VOCAB_SIZE 50257

// ---------------------------------------------------------------------------------------------------------------------
// Shard headers

// Fills in the header of a shard of `tokens` tokens, at most INT32_MAX.
LLMC_FN void shard_fill_header(int32_t header[SHARD_HEADER_INTS], uint64_t tokens) {
    memset(header, 0, SHARD_HEADER_BYTES);
    header[0] = SHARD_MAGIC, header[1] = SHARD_VERSION, header[2] = (int32_t)tokens;
}

// Reads the header of the open file and checks it against the file's size, `bytes`.
LLMC_FN int shard_check_header_(int fd, const char *path, long long bytes, uint64_t *tokens, Error *err) {
    int32_t header[SHARD_HEADER_INTS];
    if (bytes < SHARD_HEADER_BYTES)
        return fail(err, "%s: %lld bytes, shorter than a shard's header of %d; make it again with data/tokenize",
                    path, bytes, SHARD_HEADER_BYTES);
    if (pread_exactly(fd, header, sizeof header, 0, path, err) != 0) return -1;
    if (header[0] != SHARD_MAGIC)
        return fail(err, "%s: not a token shard: it begins with %d, a shard with %d; make shards with data/tokenize",
                    path, header[0], SHARD_MAGIC);
    if (header[1] != SHARD_VERSION)
        return fail(err, "%s: shard version %d, but this program reads version %d; make it again with data/tokenize",
                    path, header[1], SHARD_VERSION);
    long long expected = SHARD_HEADER_BYTES + 2 * (long long)header[2];
    if (header[2] < 0 || bytes != expected)
        return fail(err, "%s: its header says %d tokens (%lld bytes), but it has %lld bytes; it was cut or is damaged",
                    path, header[2], expected, bytes);
    *tokens = (uint64_t)header[2];
    return 0;
}

// Opens a shard and checks its header. *tokens is its number of tokens, which start at byte SHARD_HEADER_BYTES.
// Returns a file descriptor for reading, or -1.
LLMC_FN int shard_open(const char *path, uint64_t *tokens, Error *err) {
    uint64_t bytes = 0;
    *tokens = 0;
    int fd = open_regular(path, &bytes, err);
    if (fd < 0) return -1;
    if (shard_check_header_(fd, path, (long long)bytes, tokens, err) == 0) return fd;
    close(fd);
    return -1;
}

// ---------------------------------------------------------------------------------------------------------------------
// The manifest

typedef struct {                // a shard or a source
    char *file;                 // name without folder
    uint64_t tokens, bytes;     // bytes: of the text (shard), of the file (source)
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

// The name by which a manifest lists a file: without its folder.
LLMC_FN const char *manifest_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

// DIR/NAME_manifest.json for DIR/NAME_train_000001.bin, whether it exists or not; NULL if the name does not have that
// form. The caller frees it.
LLMC_FN char *manifest_of_shard(const char *shard) {
    size_t n = strlen(shard);
    static const char *const parts[] = {"_train_", "_val_"};
    for (int i = 0; i < 2; i++) {
        size_t tail = strlen(parts[i]) + strlen("000000.bin");
        if (n > tail && !strncmp(shard + n - tail, parts[i], strlen(parts[i])))
            return xasprintf("%.*s_manifest.json", (int)(n - tail), shard);
    }
    return NULL;
}

// Appends an entry to a list. The entry owns `file` from now on.
LLMC_FN ManifestEntry *manifest_add(ManifestEntry **list, int *count, char *file) {
    *list = (ManifestEntry *)xrealloc(*list, ((size_t)*count + 1) * sizeof **list);
    ManifestEntry *e = &(*list)[(*count)++];
    memset(e, 0, sizeof *e);
    e->file = file;
    return e;
}

// The XXH64 and the size of a file.
LLMC_FN int hash_file(const char *path, uint64_t *xxh64, uint64_t *bytes, Error *err) {
    *xxh64 = *bytes = 0;
    int fd = open_regular(path, NULL, err);
    if (fd < 0) return -1;
    size_t capacity = 1 << 20;
    void *buffer = xmalloc(capacity);
    XXH64_state_t *state = XXH64_createState();
    XXH64_reset(state, 0);
    ssize_t n;
    for (; (n = read(fd, buffer, capacity)) > 0; *bytes += (uint64_t)n)
        XXH64_update(state, buffer, (size_t)n);
    if (n < 0) fail(err, "%s: read error at byte %" PRIu64 ": %s", path, *bytes, strerror(errno));
    *xxh64 = XXH64_digest(state);
    XXH64_freeState(state);
    free(buffer);
    close(fd);
    return n < 0 ? -1 : 0;
}

typedef enum { REQUIRED, OPTIONAL } Presence;

// The value of `key`, a whole number below 9e15; 0 if it is missing and OPTIONAL. Sets *wrong to the key if there is
// anything else, and where nothing was wrong before.
LLMC_FN uint64_t manifest_number_(const cJSON *object, const char *key, Presence presence, const char **wrong) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, key);
    if (json_is_integer(item, 0, 9e15 - 1)) return (uint64_t)item->valuedouble;
    if (!*wrong && (item || presence == REQUIRED)) *wrong = key;
    return 0;
}

typedef enum { ENTRY_SHARD, ENTRY_SOURCE } EntryKind;

// Reads the array under `key` into a list. *wrong as above.
LLMC_FN void manifest_entries_(const cJSON *json, const char *key, EntryKind kind, ManifestEntry **list, int *count,
                               const char **wrong) {
    const cJSON *array = cJSON_GetObjectItemCaseSensitive(json, key), *item;
    if (!array && kind == ENTRY_SOURCE) return;
    if (!cJSON_IsArray(array)) {
        *wrong = key;
        return;
    }
    cJSON_ArrayForEach(item, array) {
        const cJSON *file = cJSON_GetObjectItemCaseSensitive(item, "file");
        const cJSON *hash = cJSON_GetObjectItemCaseSensitive(item, "xxh64");
        if (!cJSON_IsString(file) || !*file->valuestring || strchr(file->valuestring, '/')) *wrong = "file";
        else if (!cJSON_IsString(hash) || strlen(hash->valuestring) != 16 ||
                 strspn(hash->valuestring, "0123456789abcdef") != 16) *wrong = "xxh64";
        if (*wrong) return;
        ManifestEntry *e = manifest_add(list, count, xasprintf("%s", file->valuestring));
        e->tokens = manifest_number_(item, "tokens", REQUIRED, wrong);
        e->bytes = manifest_number_(item, "bytes", REQUIRED, wrong);
        if (kind == ENTRY_SOURCE) e->documents = manifest_number_(item, "documents", REQUIRED, wrong);
        e->xxh64 = strtoull(hash->valuestring, NULL, 16);
    }
}

// Reads a manifest. The keys that only adding needs may be missing: 0 then, and no sources.
LLMC_FN int manifest_read(Manifest *m, const char *path, Error *err) {
    const char *wrong = NULL;
    memset(m, 0, sizeof *m);
    cJSON *json = json_read(path, 256 << 20, err);
    if (!json) return -1;
    uint64_t format = manifest_number_(json, "format", REQUIRED, &wrong);
    uint64_t vocab_size = manifest_number_(json, "vocab_size", REQUIRED, &wrong);
    uint64_t eot = manifest_number_(json, "eot", REQUIRED, &wrong);
    const cJSON *vocab = cJSON_GetObjectItemCaseSensitive(json, "vocab");
    const char *name = cJSON_IsString(vocab) ? vocab->valuestring : "";
    int is_bytes = !strcmp(name, "bytes");
    if (!wrong && format != 1) wrong = "format";
    if (!wrong && !is_bytes && strcmp(name, "gpt2") != 0) wrong = "vocab";
    if (!wrong && vocab_size != (is_bytes ? BYTES_VOCAB_SIZE : GPT2_VOCAB_SIZE)) wrong = "vocab_size";
    if (!wrong && eot != (is_bytes ? BYTES_EOT : GPT2_EOT)) wrong = "eot";
    m->vocab_size = (int)vocab_size, m->eot = (int)eot;
    m->documents = manifest_number_(json, "documents", REQUIRED, &wrong);
    m->shard_size = manifest_number_(json, "shard_size", OPTIONAL, &wrong);
    m->val_tokens = manifest_number_(json, "val_tokens", OPTIONAL, &wrong);
    m->null_texts = manifest_number_(json, "null_texts", OPTIONAL, &wrong);
    m->invalid_texts = manifest_number_(json, "invalid_utf8_texts", OPTIONAL, &wrong);
    if (!wrong) manifest_entries_(json, "shards", ENTRY_SHARD, &m->shards, &m->num_shards, &wrong);
    if (!wrong) manifest_entries_(json, "sources", ENTRY_SOURCE, &m->sources, &m->num_sources, &wrong);
    cJSON_Delete(json);
    if (!wrong) return 0;
    manifest_free(m);
    return fail(err, "%s: not a manifest of token shards, or damaged: \"%s\" is missing or wrong (llmc/shard.h)", path,
                wrong);
}

// Prints an entry on a line of its own.
LLMC_FN void manifest_print_entry_(FILE *f, const ManifestEntry *e, EntryKind kind, int is_last) {
    cJSON *name = cJSON_CreateString(e->file);
    char *quoted = cJSON_PrintUnformatted(name);
    fprintf(f, "    {\"file\": %s, ", quoted);
    if (kind == ENTRY_SOURCE) fprintf(f, "\"documents\": %" PRIu64 ", ", e->documents);
    fprintf(f, "\"tokens\": %" PRIu64 ", \"bytes\": %" PRIu64 ", \"xxh64\": \"%016" PRIx64 "\"}%s\n",
            e->tokens, e->bytes, e->xxh64, is_last ? "" : ",");
    cJSON_free(quoted);
    cJSON_Delete(name);
}

LLMC_FN int manifest_write(const Manifest *m, const char *path, Error *err) {
    char *text = NULL;
    size_t size = 0;
    FILE *f = open_memstream(&text, &size);
    if (!f) die(EXIT_SYSTEM, "out of memory for a manifest");
    const char *vocab = m->eot == BYTES_EOT ? "bytes" : "gpt2";
    fprintf(f, "{\n  \"format\": 1,\n  \"vocab\": \"%s\",\n  \"vocab_size\": %d,\n  \"eot\": %d,\n",
            vocab, m->vocab_size, m->eot);
    fprintf(f, "  \"documents\": %" PRIu64 ",\n", m->documents);
    fprintf(f, "  \"null_texts\": %" PRIu64 ",\n", m->null_texts);
    fprintf(f, "  \"invalid_utf8_texts\": %" PRIu64 ",\n", m->invalid_texts);
    fprintf(f, "  \"shard_size\": %" PRIu64 ",\n  \"val_tokens\": %" PRIu64 ",\n  \"shards\": [\n",
            m->shard_size, m->val_tokens);
    for (int i = 0; i < m->num_shards; i++)
        manifest_print_entry_(f, &m->shards[i], ENTRY_SHARD, i == m->num_shards - 1);
    fprintf(f, "  ],\n  \"sources\": [\n");
    for (int i = 0; i < m->num_sources; i++)
        manifest_print_entry_(f, &m->sources[i], ENTRY_SOURCE, i == m->num_sources - 1);
    fprintf(f, "  ]\n}\n");
    if (fclose(f) != 0) die(EXIT_SYSTEM, "out of memory for a manifest");
    int rc = write_small_file(path, text, size, err);
    free(text);
    return rc;
}

#endif
