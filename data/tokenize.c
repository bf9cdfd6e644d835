// From text to token shards (llmc/shard.h): JSON Lines or plain text in, shards and their manifest out.
//
//     gcc -O3 -Wall -Wextra -I. data/tokenize.c -o data/tokenize -lzstd -lz -lutf8proc -lcjson -lpthread
//
// One thread reads the input in blocks of about a megabyte, cut where that does not change the tokens. N threads encode
// blocks. The main thread writes them in the order in which they were read, so the output does not depend on N, and
// reading, encoding and writing overlap.
//
// Memory: 2 N + 4 blocks of 3 MB, 4 MB per thread, and 5 MB for the vocabulary and the rest. A JSON Lines document must
// fit in memory as a whole, and so must a stretch of plain text without a place to cut it. Such a giant is processed
// alone. It takes 3 times its size, or up to 27 times if it is one single word, and may have 256 MB, wherever in the
// input it is. Packed input takes more (data/input.h).
//
// Without --val-tokens, how many tokens are for validation depends on how many there are. The first shard is then
// written as if all of it were for validation, and split at the end.
//
// No file gets its final name before all input has been read without an error and all output is on disk: shards are
// written as NAME.bin.tmp, flushed, then renamed together; the manifest is written last.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <sys/file.h>

#include "data/input.h"
#include "data/jsonl.h"
#include "llmc/cpu_features.h"
#include "llmc/flags.h"
#include "llmc/shard.h"
#include "llmc/tokenizer.h"
#include "llmc/utils.h"

#define BLOCK_BYTES ((size_t)1 << 20)
#define BLOCK_TOKENS (BLOCK_BYTES / sizeof(uint16_t))
#define GIANT_BYTES ((size_t)256 << 20)
#define NULL_TEXT NO_TOKEN              // stands for a document with a null text, for --print-ids

typedef enum { MODE_SHARDS, MODE_PRINT_IDS, MODE_DECODE, MODE_VERIFY } Mode;
typedef enum { FORM_JSON_LINES, FORM_TEXT } Form;
typedef enum { JOB_FREE, JOB_READ, JOB_TAKEN, JOB_ENCODED } JobState;

typedef struct {                        // the command line
    const char *vocab, *out, *source;   // source: NULL if not given
    int64_t bytes, threads, shard_size;
    int64_t val_tokens, rows, tokens;   // -1: not given
    int64_t print_ids, decode, verify;
} Options;

// A block on its way from the reader to the writer. Its tokens: end-of-text, the tokens of a document, and so on.
typedef struct {
    JobState state;
    const char *path;
    Form form;
    bool starts_file, ends_input;
    uint64_t input_done;                // bytes of the input files read so far, for the progress bar
    unsigned char *raw;                 // (raw_bytes) of the file, unpacked
    size_t raw_bytes, raw_capacity;
    uint16_t *tokens;                   // (count)
    size_t count, tokens_capacity;
    uint64_t lines, documents, null_texts, invalid_texts, text_bytes;
    uint64_t special_tokens;            // tokens, less end-of-text, if <|endoftext|> in a text were one (--tokens)
    int exit_code;                      // not 0: the block is bad, and err says why
    uint64_t error_line;                // line number within the block; 0 if the error has none
    Error err;
} Job;

typedef struct {
    Options o;
    Mode mode;
    char **inputs;
    int num_inputs;
    Tokenizer tokenizer;

    // the ring of blocks: block number n is jobs[n % num_jobs]
    pthread_mutex_t lock;
    pthread_cond_t changed;
    Job *jobs;
    uint64_t num_jobs, next_encode, next_write;
    pthread_t reading, *encoding;       // (o.threads) encoding

    // the data set
    Manifest manifest;
    char *folder, *name;                // DIR and NAME
    int first_new;                      // the first shard that this run writes; earlier ones stay unchanged
    bool val_by_share;                  // --val-tokens is not given: decided when all tokens are written
    uint64_t position;                  // in the token stream
    int shard_fd;                       // the shard being written, the last of the manifest; -1: none
    int lock_fd;                        // the first shard of this run, locked until the end
    ManifestEntry this_source;
    int source_rc;
    Error source_err;

    uint64_t documents, null_texts, invalid_texts, tokens, text_bytes;  // of this run
    uint64_t special_tokens;
    uint64_t file_lines;                // of the current file, before the current block
    bool file_invalid;                  // the current plain text has been counted in invalid_texts
    double start_time, last_progress;
    uint64_t total_bytes;               // of the input files; 0 if not known
} Program;

// ---------------------------------------------------------------------------------------------------------------------
// The reading thread: from files to blocks

typedef struct {
    unsigned char *data;                // (bytes) what the last cut left over: the start of the next block
    size_t bytes;
} Carry;

// Waits until block number n is free, and clears it except for its memory.
static Job *job_begin(Program *p, uint64_t n, const char *path, Form form) {
    Job *job = &p->jobs[n % p->num_jobs];
    pthread_mutex_lock(&p->lock);
    while (job->state != JOB_FREE) pthread_cond_wait(&p->changed, &p->lock);
    Job clear = {0};
    clear.raw = job->raw, clear.raw_capacity = job->raw_capacity;
    clear.tokens = job->tokens, clear.tokens_capacity = job->tokens_capacity;
    clear.path = path, clear.form = form;
    *job = clear;
    pthread_mutex_unlock(&p->lock);
    return job;
}

// Waits until all blocks before number n are written.
static void wait_alone(Program *p, uint64_t n) {
    pthread_mutex_lock(&p->lock);
    while (p->next_write != n) pthread_cond_wait(&p->changed, &p->lock);
    pthread_mutex_unlock(&p->lock);
}

static void job_finish(Program *p, Job *job, JobState state) {
    pthread_mutex_lock(&p->lock);
    job->state = state;
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->lock);
}

static size_t last_line_end(const unsigned char *text, size_t bytes) {
    const unsigned char *newline = (const unsigned char *)memrchr(text, '\n', bytes);
    return newline ? (size_t)(newline - text) + 1 : 0;
}

// Fills block number n up to the last place where the input can be cut; what follows it goes to carry.
// Returns more than 0 when the block is ready, 0 when it is and the file ends with it, -1 on an error.
static ssize_t read_block(Program *p, Input *in, Job *job, uint64_t n, Carry *carry) {
    const size_t most = GIANT_BYTES + 1;                        // a giant and the line end or blank after it
    ssize_t got = 1;
    size_t cut = 0;
    for (size_t target = BLOCK_BYTES + carry->bytes; cut == 0; target *= 2) {
        if (target > most) target = most;
        if (job->raw_bytes == most) {
            job->exit_code = EXIT_INPUT;
            return fail(&job->err,
                        job->form == FORM_JSON_LINES ? "%s: a line of more than %zu MB; split this document"
                                                     : "%s: more than %zu MB without white space; is this text?",
                        in->path, GIANT_BYTES >> 20);
        }
        if (target > 2 * BLOCK_BYTES) wait_alone(p, n);         // a giant
        if (job->raw_capacity < target) job->raw = (unsigned char *)xrealloc(job->raw, job->raw_capacity = target);
        if (carry->bytes) memcpy(job->raw, carry->data, job->raw_bytes = carry->bytes);
        carry->bytes = 0;
        while (job->raw_bytes < target) {
            got = input_read(in, job->raw + job->raw_bytes, target - job->raw_bytes, &job->err);
            if (got < 0) job->exit_code = in->exit_code;
            if (got <= 0) return got;
            job->raw_bytes += (size_t)got;
        }
        cut = job->form == FORM_JSON_LINES ? last_line_end(job->raw, job->raw_bytes)
                                           : tokenizer_cut(&p->tokenizer, job->raw, job->raw_bytes);
    }
    carry->bytes = job->raw_bytes - cut;
    carry->data = (unsigned char *)xrealloc(carry->data, carry->bytes);
    memcpy(carry->data, job->raw + cut, carry->bytes);
    job->raw_bytes = cut;
    return got;
}

// Whether a text starts with { and a quoted name.
static bool starts_like_json(const unsigned char *text, size_t bytes) {
    size_t i = 0;
    if (bytes == 0 || text[i++] != '{') return false;
    while (i < bytes && text[i] == ' ') i++;
    return i < bytes && text[i] == '"';
}

// Reads one file as blocks number *n, *n + 1, ... Returns -1 if a block is bad, which is then the last one.
static int read_file(Program *p, const char *path, uint64_t *n, uint64_t *input_done) {
    Input in = {0};
    Carry carry = {NULL, 0};
    Form form = strcmp(path, "-") == 0 || is_json_name(path) ? FORM_JSON_LINES : FORM_TEXT;
    ssize_t got = 1;
    for (bool is_first = true; got > 0; is_first = false) {
        Job *job = job_begin(p, *n, path, form);
        job->starts_file = is_first;
        if (is_first && input_open(&in, path, &job->err) != 0) got = -1, job->exit_code = in.exit_code;
        else got = read_block(p, &in, job, *n, &carry);
        if (is_first && got >= 0 && form == FORM_TEXT && starts_like_json(job->raw, job->raw_bytes))
            fprintf(stderr, "note: %s: read as plain text, which its name says, but it starts like JSON Lines\n", path);
        job->input_done = *input_done + in.bytes_read;
        job_finish(p, job, JOB_READ);
        (*n)++;
    }
    *input_done += in.bytes_read;
    input_close(&in);
    free(carry.data);
    return (int)got;
}

static void *reader(void *arg) {
    Program *p = (Program *)arg;
    uint64_t n = 0, input_done = 0;
    int rc = 0;
    for (int i = 0; i < p->num_inputs && rc == 0; i++) rc = read_file(p, p->inputs[i], &n, &input_done);
    Job *job = job_begin(p, n, "", FORM_TEXT);
    job->ends_input = true;
    job_finish(p, job, JOB_READ);
    return NULL;
}

// ---------------------------------------------------------------------------------------------------------------------
// The encoding threads: from blocks to tokens

static void encode_document(Program *p, Job *job, const unsigned char *text, size_t bytes, EncodeScratch *s) {
    uint16_t *out = job->tokens + job->count;
    size_t special_tokens = 0;
    bool is_special = p->o.tokens >= 0 && memmem(text, bytes, "<|endoftext|>", 13) != NULL;
    if (is_special) special_tokens = tokenizer_encode_special(&p->tokenizer, text, bytes, out, s);
    size_t tokens = tokenizer_encode(&p->tokenizer, text, bytes, out, s);
    job->special_tokens += is_special ? special_tokens : tokens;
    job->count += tokens, job->text_bytes += bytes;
}

// Stops at the first bad line.
static void encode_lines(Program *p, Job *job, EncodeScratch *s) {
    unsigned char *end = job->raw + job->raw_bytes;
    for (unsigned char *line = job->raw, *line_end; line < end; line = line_end + 1) {
        line_end = (unsigned char *)memchr(line, '\n', (size_t)(end - line));
        if (!line_end) line_end = end;
        job->lines++;
        JsonLine l;
        uint64_t invalid_before = s->invalid_bytes;
        switch (jsonl_parse(&l, line, line_end)) {
        case JSONL_BLANK:
            break;
        case JSONL_ERROR:
            job->exit_code = EXIT_INPUT;
            job->error_line = job->lines;
            fail(&job->err, "byte %td: %s", l.at - line + 1, l.error);
            return;
        case JSONL_NULL:
            job->null_texts++;
            if (p->mode == MODE_PRINT_IDS) job->tokens[job->count++] = NULL_TEXT;
            break;
        case JSONL_TEXT:
            job->documents++;
            job->tokens[job->count++] = (uint16_t)p->tokenizer.eot;
            encode_document(p, job, l.text, l.text_bytes, s);
            job->invalid_texts += l.lone_surrogate || s->invalid_bytes > invalid_before;
            break;
        }
    }
}

static void encode_text(Program *p, Job *job, EncodeScratch *s) {
    uint64_t invalid_before = s->invalid_bytes;
    if (job->starts_file) job->tokens[job->count++] = (uint16_t)p->tokenizer.eot;
    job->documents = job->starts_file;
    encode_document(p, job, job->raw, job->raw_bytes, s);
    job->invalid_texts = s->invalid_bytes > invalid_before;
}

static void *encoder(void *arg) {
    Program *p = (Program *)arg;
    EncodeScratch scratch;
    encode_scratch_init(&scratch);
    for (;;) {
        pthread_mutex_lock(&p->lock);
        Job *job;
        while ((job = &p->jobs[p->next_encode % p->num_jobs])->state != JOB_READ)
            pthread_cond_wait(&p->changed, &p->lock);
        bool ends_input = job->ends_input;
        if (!ends_input) p->next_encode++, job->state = JOB_TAKEN;      // the end stays, so that all threads see it
        pthread_mutex_unlock(&p->lock);
        if (ends_input) break;
        if (job->exit_code == 0) {
            // At most one token per byte, and end-of-text tokens. In JSON Lines the syntax around a text is longer than
            // one token; plain text may need one more.
            if (job->tokens_capacity < job->raw_bytes + 1) {
                free(job->tokens);
                job->tokens_capacity = job->raw_capacity + 1;
                job->tokens = (uint16_t *)xmalloc(job->tokens_capacity * sizeof *job->tokens);
            }
            if (job->form == FORM_JSON_LINES) encode_lines(p, job, &scratch);
            else encode_text(p, job, &scratch);
        }
        job_finish(p, job, JOB_ENCODED);
    }
    encode_scratch_free(&scratch);
    return NULL;
}

// ---------------------------------------------------------------------------------------------------------------------
// Writing shards

static char *shard_path(const Program *p, int shard, const char *end) {
    return xasprintf("%s/%s%s", p->folder, p->manifest.shards[shard].file, end);
}

static char *manifest_path(const char *folder, const char *name) {
    return xasprintf("%s/%s_manifest.json", folder, name);
}

// Removes the shards that this run has written so far, where it fails. For on_exit: any thread may run out of memory.
static void remove_unfinished(int exit_code, void *program) {
    const Program *p = (const Program *)program;
    if (exit_code == 0 || p->lock_fd < 0) return;               // without the lock, they are another run's
    for (int i = p->first_new; i < p->manifest.num_shards; i++) {
        if (!p->manifest.shards[i].file) continue;              // split_validation was moving it
        char *aside = shard_path(p, i, ".tmp");
        unlink(aside);
        free(aside);
    }
}

// Prints the line and exits.
__attribute__((noreturn)) static void give_up(Program *p, int exit_code, const char *line) {
    if (isatty(2) && p->last_progress > p->start_time) fputc('\n', stderr);
    die(exit_code, "%s", line);
}

// The number of tokens of a shard that starts at this position of the token stream.
static uint64_t shard_room(const Manifest *m, uint64_t position) {
    if (position >= m->val_tokens) return m->shard_size;
    uint64_t val_left = m->val_tokens - position;
    return val_left < m->shard_size ? val_left : m->shard_size;
}

// Creates shard number `shard` as NAME.bin.tmp, with a header that shard_close writes again with the token count.
static int shard_create(Program *p, int shard, Error *err) {
    int32_t header[SHARD_HEADER_INTS];
    char *aside = shard_path(p, shard, ".tmp");
    int rc = p->shard_fd = open(aside, O_RDWR | O_CREAT, 0666);
    if (rc >= 0 && p->lock_fd < 0) {
        if (flock(rc, LOCK_EX | LOCK_NB) != 0)
            die(EXIT_INPUT, "%s: another run is writing this data set; wait for it, or use a different name", aside);
        p->lock_fd = dup(rc);
        if (p->lock_fd < 0) unlink(aside), rc = -1;
    }
    if (rc < 0 || ftruncate(rc, 0) != 0) rc = fail(err, "%s: cannot create: %s", aside, strerror(errno));
    else {
        shard_fill_header(header, 0);
        rc = write_exactly(p->shard_fd, header, sizeof header, aside, err);
    }
    free(aside);
    return rc < 0 ? -1 : 0;
}

// Writes the token count of the shard being written, flushes it to disk and computes its checksum.
static int shard_close(Program *p, int shard, Error *err) {
    int rc = 0;
    if (p->shard_fd < 0) return 0;
    ManifestEntry *e = &p->manifest.shards[shard];
    int32_t header[SHARD_HEADER_INTS];
    uint64_t file_bytes, expected = SHARD_HEADER_BYTES + 2 * e->tokens;
    char *aside = shard_path(p, shard, ".tmp");
    shard_fill_header(header, e->tokens);
    if (lseek(p->shard_fd, 0, SEEK_SET) < 0) rc = fail(err, "%s: cannot seek: %s", aside, strerror(errno));
    if (rc == 0) rc = write_exactly(p->shard_fd, header, sizeof header, aside, err);
    if (rc == 0 && fsync(p->shard_fd) != 0) rc = fail(err, "%s: cannot flush to disk: %s", aside, strerror(errno));
    if (close(p->shard_fd) != 0 && rc == 0) rc = fail(err, "%s: cannot close: %s", aside, strerror(errno));
    p->shard_fd = -1;
    if (rc == 0) rc = hash_file(aside, &e->xxh64, &file_bytes, err);
    if (rc == 0 && file_bytes != expected)
        rc = fail(err, "%s: only %" PRIu64 " of %" PRIu64 " bytes reached the disk", aside, file_bytes, expected);
    free(aside);
    return rc;
}

static uint64_t text_bytes_of(const Tokenizer *t, const uint16_t *tokens, size_t n) {
    uint64_t bytes = 0;
    for (size_t i = 0; i < n; i++)
        if (tokens[i] != t->eot) bytes += t->start[tokens[i] + 1] - t->start[tokens[i]];
    return bytes;
}

// Appends to the token stream, starting a new shard whenever one is full. text_bytes: of the text of these tokens.
static int write_tokens(Program *p, const uint16_t *tokens, size_t count, uint64_t text_bytes, Error *err) {
    Manifest *m = &p->manifest;
    while (count > 0) {
        uint64_t shard_start = p->position - (p->shard_fd >= 0 ? m->shards[m->num_shards - 1].tokens : 0);
        if (p->shard_fd >= 0 && p->position - shard_start == shard_room(m, shard_start)) {
            if (shard_close(p, m->num_shards - 1, err) != 0) return -1;
            shard_start = p->position;
        }
        if (p->shard_fd < 0) {
            const char *split = p->position < m->val_tokens ? "val" : "train";
            char *file = xasprintf("%s_%s_%06d.bin", p->name, split, m->num_shards);
            manifest_add(&m->shards, &m->num_shards, file);
            if (shard_create(p, m->num_shards - 1, err) != 0) return -1;
        }
        ManifestEntry *e = &m->shards[m->num_shards - 1];
        uint64_t room = shard_room(m, shard_start) - e->tokens;
        size_t n = count < room ? count : (size_t)room;
        if (write_exactly(p->shard_fd, tokens, n * sizeof *tokens, e->file, err) != 0) return -1;
        uint64_t n_bytes = n == count ? text_bytes : text_bytes_of(&p->tokenizer, tokens, n);
        e->tokens += n, e->bytes += n_bytes, text_bytes -= n_bytes;
        p->position += n, tokens += n, count -= n;
    }
    return 0;
}

// Reads tokens number `at` and following of a shard with `count` tokens into block, at most BLOCK_TOKENS of them.
// Returns how many it read, or -1.
static int64_t read_tokens(int fd, const char *path, uint64_t at, uint64_t count, uint16_t *block, Error *err) {
    uint64_t n = count - at < BLOCK_TOKENS ? count - at : BLOCK_TOKENS;
    int rc = pread_exactly(fd, block, n * sizeof *block, SHARD_HEADER_BYTES + at * sizeof *block, path, err);
    return rc == 0 ? (int64_t)n : -1;
}

// Appends tokens number `at` to `end` - 1 of a shard with `count` tokens to the shard being written, and their bytes to
// the checksum. Counts the bytes of their text in *text_bytes.
static int copy_tokens(Program *p, int fd, const char *path, uint64_t at, uint64_t end, uint64_t *text_bytes,
                       XXH64_state_t *checksum, Error *err) {
    uint16_t *block = (uint16_t *)xmalloc(BLOCK_BYTES);
    int rc = 0;
    while (rc == 0 && at < end) {
        int64_t n = read_tokens(fd, path, at, end, block, err);
        if (n < 0) { rc = -1; break; }
        rc = write_exactly(p->shard_fd, block, (size_t)n * sizeof *block, path, err);
        if (checksum) XXH64_update(checksum, block, (size_t)n * sizeof *block);
        *text_bytes += text_bytes_of(&p->tokenizer, block, (size_t)n);
        at += (uint64_t)n;
    }
    free(block);
    return rc;
}

// If the last shard of the data set is not full, starts a copy of it, to which this run appends. Only the tokens that
// the manifest lists are copied, and they must match its checksum. The file may hold more, where a run was stopped
// between renaming its shards and writing the manifest; the input holds those again.
static int shard_reopen(Program *p, Error *err) {
    Manifest *m = &p->manifest;
    for (int i = 0; i < m->num_shards; i++) p->position += m->shards[i].tokens;
    p->first_new = m->num_shards;
    if (m->num_shards == 0) return 0;
    int shard = m->num_shards - 1;
    ManifestEntry *e = &m->shards[shard];
    if (e->tokens == shard_room(m, p->position - e->tokens)) return 0;

    char *path = shard_path(p, shard, "");
    int fd = open_regular(path, NULL, err), rc = fd < 0 ? -1 : 0;
    int32_t header[SHARD_HEADER_INTS];
    uint64_t text_bytes = 0;
    shard_fill_header(header, e->tokens);
    XXH64_state_t *checksum = XXH64_createState();
    XXH64_reset(checksum, 0);
    XXH64_update(checksum, header, sizeof header);
    p->first_new = shard;
    if (rc == 0) rc = shard_create(p, shard, err);
    if (rc == 0) rc = copy_tokens(p, fd, path, 0, e->tokens, &text_bytes, checksum, err);
    if (rc == 0 && XXH64_digest(checksum) != e->xxh64)
        rc = fail(err, "%s: not what its manifest says; it was changed or damaged", path);
    XXH64_freeState(checksum);
    if (fd >= 0) close(fd);
    free(path);
    return rc;
}

// Renames a shard under its temporary name, from the manifest's name for it.
static int shard_rename(Program *p, int shard, const char *split, int number, Error *err) {
    ManifestEntry *e = &p->manifest.shards[shard];
    char *file = xasprintf("%s_%s_%06d.bin", p->name, split, number), *from = shard_path(p, shard, ".tmp");
    free(e->file);
    e->file = file;
    char *to = shard_path(p, shard, ".tmp");
    int rc = rename(from, to);
    if (rc != 0) fail(err, "%s: cannot rename to %s: %s", from, to, strerror(errno));
    free(from), free(to);
    return rc;
}

// How many tokens are for validation where --val-tokens does not say so: 1% of them, at most a shard. With --source
// more files may follow: a shard, if this one fills four.
static uint64_t default_val_tokens(const Program *p) {
    uint64_t shard_size = p->manifest.shard_size;
    if (p->o.source && p->position / 4 >= shard_size) return shard_size;
    return p->position / 100 < shard_size ? p->position / 100 : shard_size;
}

// Where --val-tokens is not given, the first shard was written as if all of it were for validation, and is closed.
// Makes a shard of training tokens from what is too much. The data set's later shards are already cut where they would
// be without that.
static int split_validation(Program *p, Error *err) {
    Manifest *m = &p->manifest;
    uint64_t val_tokens = m->val_tokens = default_val_tokens(p), count, val_bytes = 0, train_bytes = 0;
    if (m->num_shards == 0 || val_tokens == m->shards[0].tokens) return 0;
    if (val_tokens == 0) return shard_rename(p, 0, "train", 0, err);

    manifest_add(&m->shards, &m->num_shards, NULL);
    for (int i = m->num_shards - 2; i > 0; i--) {
        m->shards[i + 1] = m->shards[i], m->shards[i].file = NULL;
        if (shard_rename(p, i + 1, "train", i + 1, err) != 0) return -1;
    }
    char *path = shard_path(p, 0, ".tmp");
    ManifestEntry *val = &m->shards[0], *train = &m->shards[1];
    int fd = shard_open(path, &count, err), rc = fd < 0 ? -1 : 0;
    train->file = xasprintf("%s_train_%06d.bin", p->name, 1);
    train->tokens = count - val_tokens;
    if (rc == 0) rc = shard_create(p, 1, err);
    if (rc == 0) rc = copy_tokens(p, fd, path, val_tokens, count, &train_bytes, NULL, err);
    if (rc == 0) rc = shard_close(p, 1, err);
    if (fd >= 0) close(fd);
    if (rc == 0 && (p->shard_fd = open(path, O_RDWR)) < 0) rc = fail(err, "%s: cannot open: %s", path, strerror(errno));
    if (rc == 0 && ftruncate(p->shard_fd, (off_t)(SHARD_HEADER_BYTES + 2 * val_tokens)) != 0)
        rc = fail(err, "%s: cannot cut: %s", path, strerror(errno));
    val_bytes = val->bytes - train_bytes;
    val->tokens = val_tokens, val->bytes = val_bytes, train->bytes = train_bytes;
    if (rc == 0) rc = shard_close(p, 0, err);
    free(path);
    return rc;
}

// Called when all input was good: gives the shards their final names, then lists them in the manifest.
static int commit(Program *p, Error *err) {
    Manifest *m = &p->manifest;
    if (shard_close(p, m->num_shards - 1, err) != 0 || (p->val_by_share && split_validation(p, err) != 0)) return -1;
    for (int i = p->first_new; i < m->num_shards; i++) {
        char *aside = shard_path(p, i, ".tmp"), *path = shard_path(p, i, "");
        int rc = rename(aside, path);
        if (rc != 0) fail(err, "%s: cannot rename to %s: %s", aside, path, strerror(errno));
        free(aside), free(path);
        if (rc != 0) return -1;
    }
    m->documents += p->documents, m->null_texts += p->null_texts, m->invalid_texts += p->invalid_texts;
    char *path = manifest_path(p->folder, p->name);
    int rc = sync_path(p->folder, err);
    if (rc == 0) rc = manifest_write(m, path, err);
    if (rc == 0) rc = sync_path(p->folder, err);
    free(path);
    // Shards with higher numbers would belong to an older data set of this name.
    for (int i = m->num_shards, gone = 0; rc == 0 && gone == 0; i++) {
        char *val = xasprintf("%s/%s_val_%06d.bin", p->folder, p->name, i);
        char *train = xasprintf("%s/%s_train_%06d.bin", p->folder, p->name, i);
        gone = unlink(val) & unlink(train);
        free(val), free(train);
    }
    return rc;
}

// ---------------------------------------------------------------------------------------------------------------------
// The main thread: takes the encoded blocks in order

static void print_progress(Program *p, uint64_t input_done) {
    double now = now_seconds(), seconds = now - p->start_time, part = 0;
    if (now - p->last_progress < 0.2) return;
    p->last_progress = now;
    if (p->o.rows == 0) part = 1;
    else if (p->o.rows > 0) part = (double)(p->documents + p->null_texts) / (double)p->o.rows;
    else if (p->total_bytes) part = (double)input_done / (double)p->total_bytes;
    char bar[21], left[32];
    for (int i = 0; i < 20; i++) bar[i] = part * 20 > i ? '#' : '.';
    bar[20] = 0;
    format_duration(left, part > 0 ? seconds * (1 - part) / part : -1);
    fprintf(stderr, "\r[%s] %5.1f%%  %.1fM tokens  %.1f MB/s  %s left   ", bar, 100 * part, 1e-6 * (double)p->tokens,
            1e-6 * (double)p->text_bytes / seconds, left);
}

typedef enum { ARRAY_CLOSED, ARRAY_EMPTY, ARRAY_HAS_NUMBERS } ArrayState;

// Prints one JSON array per document. A document may continue in the next block, so *array says how the last one ended.
static void print_ids(const Program *p, const Job *job, ArrayState *array) {
    for (size_t i = 0; i < job->count; i++) {
        unsigned token = job->tokens[i];
        if (token == (unsigned)p->tokenizer.eot || token == NULL_TEXT) {
            if (*array != ARRAY_CLOSED) fputs("]\n", stdout);
            fputs(token == NULL_TEXT ? "null\n" : "[", stdout);
            *array = token == NULL_TEXT ? ARRAY_CLOSED : ARRAY_EMPTY;
            continue;
        }
        char digits[8], *c = digits + sizeof digits;
        do *--c = (char)('0' + token % 10); while ((token /= 10) > 0);
        if (*array == ARRAY_HAS_NUMBERS) *--c = ',';
        *array = ARRAY_HAS_NUMBERS;
        fwrite(c, 1, (size_t)(digits + sizeof digits - c), stdout);
    }
}

static void start_threads(Program *p) {
    p->encoding = (pthread_t *)xmalloc((size_t)p->o.threads * sizeof *p->encoding);
    p->num_jobs = 2 * (uint64_t)p->o.threads + 4;
    p->jobs = (Job *)xcalloc(p->num_jobs, sizeof *p->jobs);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->changed, NULL);
    bool ok = pthread_create(&p->reading, NULL, reader, p) == 0;
    for (int64_t i = 0; i < p->o.threads; i++)
        ok = ok && pthread_create(&p->encoding[i], NULL, encoder, p) == 0;
    if (!ok) give_up(p, EXIT_SYSTEM, "cannot start a thread; try fewer --threads");
}

static void join_threads(Program *p) {
    pthread_join(p->reading, NULL);
    for (int64_t i = 0; i < p->o.threads; i++) pthread_join(p->encoding[i], NULL);
    for (uint64_t i = 0; i < p->num_jobs; i++) free(p->jobs[i].raw), free(p->jobs[i].tokens);
    free(p->jobs), free(p->encoding);
}

// Waits for the next block, which is encoded or ends the input.
static Job *next_block(Program *p) {
    pthread_mutex_lock(&p->lock);
    Job *job = &p->jobs[p->next_write % p->num_jobs];
    while (job->state != JOB_ENCODED && !(job->state == JOB_READ && job->ends_input))
        pthread_cond_wait(&p->changed, &p->lock);
    pthread_mutex_unlock(&p->lock);
    return job;
}

// Gives a block that is written back to the reader.
static void release_block(Program *p, Job *job) {
    if (job->raw_capacity > 4 * BLOCK_BYTES) {                  // do not keep the memory of a giant
        free(job->raw), free(job->tokens);
        job->raw = NULL, job->tokens = NULL, job->raw_capacity = job->tokens_capacity = 0;
    }
    pthread_mutex_lock(&p->lock);
    job->state = JOB_FREE;
    p->next_write++;
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->lock);
}

// Adds a block to the counts of the run. Does not return if the block is bad.
static void count_block(Program *p, const Job *job) {
    if (job->starts_file) p->file_lines = 0, p->file_invalid = false;
    if (job->exit_code != 0 && job->error_line == 0) give_up(p, job->exit_code, job->err.text);
    if (job->exit_code != 0) {
        const char *name = strcmp(job->path, "-") == 0 ? "standard input" : job->path;
        char line[sizeof job->err.text + 512];
        snprintf(line, sizeof line, "%s: line %" PRIu64 ", %s; damaged, or not JSON Lines", name,
                 p->file_lines + job->error_line, job->err.text);
        give_up(p, job->exit_code, line);
    }
    p->file_lines += job->lines;
    p->documents += job->documents, p->null_texts += job->null_texts;
    if (job->form == FORM_JSON_LINES) p->invalid_texts += job->invalid_texts;
    else if (job->invalid_texts && !p->file_invalid) p->invalid_texts++, p->file_invalid = true;
    p->tokens += job->count, p->text_bytes += job->text_bytes;
    p->special_tokens += job->special_tokens;
}

// Checks --rows and --tokens. Other programs count <|endoftext|> in a text as one token, as FineWeb does, or as the
// ordinary text that it is here. Either count will do.
static void check_totals(Program *p) {
    uint64_t rows = p->documents + p->null_texts, text_tokens = p->tokens - p->documents;
    char special[80] = "";
    Error err;
    if (p->o.rows >= 0 && rows != (uint64_t)p->o.rows) {
        fail(&err, "the input has %" PRIu64 " rows instead of %" PRId64 " (--rows); the program that wrote it failed;"
                   " nothing is kept", rows, p->o.rows);
        give_up(p, EXIT_INPUT, err.text);
    }
    if (p->o.tokens >= 0 && text_tokens != (uint64_t)p->o.tokens &&
        (p->o.bytes || p->special_tokens != (uint64_t)p->o.tokens)) {
        if (p->special_tokens != text_tokens)
            snprintf(special, sizeof special, ", or %" PRIu64 " if <|endoftext|> counts 1,", p->special_tokens);
        fail(&err, "the texts have %" PRIu64 " tokens%s instead of %" PRId64 " (--tokens); they were changed or"
                   " damaged; nothing is kept", text_tokens, special, p->o.tokens);
        give_up(p, EXIT_INPUT, err.text);
    }
}

// Reads, encodes and writes the whole input.
static void tokenize(Program *p) {
    Error err;
    bool show_progress = isatty(2);
    ArrayState array = ARRAY_CLOSED;
    start_threads(p);
    for (Job *job; !(job = next_block(p))->ends_input; release_block(p, job)) {
        count_block(p, job);
        if (p->mode == MODE_PRINT_IDS) print_ids(p, job, &array);
        else if (write_tokens(p, job->tokens, job->count, job->text_bytes, &err) != 0)
            give_up(p, EXIT_SYSTEM, err.text);
        if (show_progress) print_progress(p, job->input_done);
    }
    join_threads(p);
    if (show_progress && p->last_progress > p->start_time) fputc('\n', stderr);
    check_totals(p);
    if (array != ARRAY_CLOSED) fputs("]\n", stdout);
}

// Hashes the file of --source while its text streams in.
static void *hash_source(void *arg) {
    Program *p = (Program *)arg;
    p->source_rc = hash_file(p->o.source, &p->this_source.xxh64, &p->this_source.bytes, &p->source_err);
    return NULL;
}

// Whether the manifest at `path` lists the file of --source already.
static bool has_source(const Program *p, const char *path) {
    const Manifest *m = &p->manifest;
    struct stat st;
    for (int i = 0; i < m->num_sources; i++) {
        if (strcmp(m->sources[i].file, p->this_source.file) != 0) continue;
        if (stat(p->o.source, &st) != 0) die(EXIT_INPUT, "%s: cannot read its size: %s", p->o.source, strerror(errno));
        if ((uint64_t)st.st_size == m->sources[i].bytes) return true;
        die(EXIT_INPUT, "%s: has %lld bytes, but %s already lists a file of this name with %" PRIu64 " bytes; rename it"
                        " if it is a different file", p->o.source, (long long)st.st_size, path, m->sources[i].bytes);
    }
    return false;
}

// Starts a new data set, or with --source prepares the existing one for one more file. Returns false if that file is in
// the data set already.
static bool open_data_set(Program *p) {
    Error err;
    Manifest *m = &p->manifest;
    char *path = manifest_path(p->folder, p->name);
    uint64_t shard_size = (uint64_t)p->o.shard_size;
    uint64_t val_tokens = p->o.val_tokens < 0 ? shard_size : (uint64_t)p->o.val_tokens;
    bool val_given = p->o.val_tokens >= 0;
    if (make_dirs(p->folder, &err) != 0) die(EXIT_SYSTEM, "%s", err.text);
    bool exists = access(path, F_OK) == 0, is_new = true;
    if (exists && !p->o.source)
        die(EXIT_INPUT, "%s: there is a data set of this name; use a different name, or remove it first", path);
    if (exists) {
        if (manifest_read(m, path, &err) != 0) die(EXIT_INPUT, "%s", err.text);
        if (m->num_shards > 0 && !val_given) val_tokens = m->val_tokens;
        if (m->num_shards == 0) m->val_tokens = val_tokens;     // so far the data set is empty
        if (m->vocab_size != p->tokenizer.vocab_size || m->shard_size != shard_size || m->val_tokens != val_tokens)
            die(EXIT_INPUT, "%s: begun with --shard-size %" PRIu64 " --val-tokens %" PRIu64 "%s; use the same, or a"
                            " different name", path, m->shard_size, m->val_tokens,
                            m->eot == BYTES_EOT ? " --bytes" : " and GPT-2's vocabulary");
        is_new = !has_source(p, path);
        if (is_new && shard_reopen(p, &err) != 0) give_up(p, EXIT_INPUT, err.text);
    }
    m->vocab_size = p->tokenizer.vocab_size, m->eot = p->tokenizer.eot;
    m->shard_size = shard_size, m->val_tokens = val_tokens;
    p->val_by_share = !val_given && m->num_shards == 0;
    free(path);
    return is_new;
}

static void make_shards(Program *p) {
    Error err;
    pthread_t hashing;
    const char *program = *program_name_(), *source = p->o.source;
    on_exit(remove_unfinished, p);
    if (source) p->this_source.file = xasprintf("%s", manifest_name(source));
    if (!open_data_set(p)) {
        fprintf(stderr, "%s: %s is in the data set already, nothing to do\n", program, source);
        free(p->this_source.file);
        return;
    }
    if (source && pthread_create(&hashing, NULL, hash_source, p) != 0)
        give_up(p, EXIT_SYSTEM, "cannot start a thread");
    tokenize(p);
    if (!source && p->text_bytes == 0) {                        // a source may be empty: others follow
        fail(&err, "the input has no text: %" PRIu64 " empty documents, %" PRIu64 " null texts;"
                   " nothing is written", p->documents, p->null_texts);
        give_up(p, EXIT_INPUT, err.text);
    }
    if (source) {
        pthread_join(hashing, NULL);
        if (p->source_rc != 0) give_up(p, EXIT_INPUT, p->source_err.text);
        ManifestEntry *e = manifest_add(&p->manifest.sources, &p->manifest.num_sources, p->this_source.file);
        p->this_source.documents = p->documents, p->this_source.tokens = p->tokens;
        *e = p->this_source;
    }
    if (commit(p, &err) != 0) give_up(p, EXIT_SYSTEM, err.text);
    double seconds = now_seconds() - p->start_time;
    double mb_per_second = 1e-6 * (double)p->text_bytes / seconds;
    uint64_t val_tokens = p->manifest.val_tokens < p->position ? p->manifest.val_tokens : p->position;
    fprintf(stderr, "%s: %" PRIu64 " documents, %" PRIu64 " bytes, %" PRIu64 " tokens in %d shards (%" PRIu64 " for"
            " validation), %.1f s, %.1f MB/s\n", program, p->documents, p->text_bytes, p->tokens,
            p->manifest.num_shards, val_tokens, seconds, mb_per_second);
    if (val_tokens == p->position && !source)
        fprintf(stderr, "note: all tokens are for validation, none for training (--val-tokens %" PRIu64 ")\n",
                p->manifest.val_tokens);
    if (p->null_texts) fprintf(stderr, "%s: skipped %" PRIu64 " rows whose text is null\n", program, p->null_texts);
    if (p->invalid_texts)
        fprintf(stderr, "%s: %" PRIu64 " documents have invalid UTF-8; its bytes are kept as is\n", program,
                p->invalid_texts);
}

// ---------------------------------------------------------------------------------------------------------------------
// From shards back to text

// Finds out whether the shards are of bytes, which their manifests say, where there are any, and must not contradict.
static void decode_vocabulary(Program *p) {
    const char *known = p->o.bytes ? "--bytes" : NULL;          // what says so
    for (int i = 0; i < p->num_inputs; i++) {
        Error err;
        Manifest m;
        char *path = manifest_of_shard(p->inputs[i]);
        if (path && access(path, F_OK) == 0) {
            if (manifest_read(&m, path, &err) != 0) die(EXIT_INPUT, "%s", err.text);
            int bytes = m.eot == BYTES_EOT;
            if (known && bytes != p->o.bytes)
                die(EXIT_INPUT, "%s: its tokens are %s, by its manifest, but %s says %s", p->inputs[i],
                    bytes ? "bytes" : "GPT-2's", known, p->o.bytes ? "bytes" : "GPT-2's");
            p->o.bytes = bytes, known = p->inputs[i];
            manifest_free(&m);
        }
        free(path);
    }
}

static void decode(const Program *p) {
    uint16_t *block = (uint16_t *)xmalloc(BLOCK_BYTES);
    for (int i = 0; i < p->num_inputs; i++) {
        Error err;
        const char *path = p->inputs[i];
        uint64_t count;
        int fd = shard_open(path, &count, &err);
        if (fd < 0) die(EXIT_INPUT, "%s", err.text);
        for (uint64_t at = 0; at < count;) {
            int64_t n = read_tokens(fd, path, at, count, block, &err);
            if (n < 0) die(EXIT_SYSTEM, "%s", err.text);
            for (int64_t j = 0; j < n; j++, at++) {
                size_t bytes;
                if (block[j] >= p->tokenizer.vocab_size)
                    die(EXIT_INPUT, "%s: token %" PRIu64 " is %d, but the vocabulary has %d tokens%s", path, at,
                        block[j], p->tokenizer.vocab_size, p->o.bytes ? " (--bytes)" : "");
                const char *text = tokenizer_decode(&p->tokenizer, block[j], &bytes);
                fwrite(text, 1, bytes, stdout);
            }
        }
        close(fd);
    }
    free(block);
}

// Checks a shard against its entry in the manifest, and adds its end-of-text tokens to *documents. block has room for
// BLOCK_TOKENS.
static int verify_shard(const char *path, const Manifest *m, const ManifestEntry *e, uint16_t *block,
                        uint64_t *documents, Error *err) {
    uint64_t count, hash = 0, bytes;
    int fd = shard_open(path, &count, err), rc = fd < 0 ? -1 : 0;
    if (rc == 0 && count != e->tokens)
        rc = fail(err, "%s: %" PRIu64 " tokens, but the manifest says %" PRIu64, path, count, e->tokens);
    for (uint64_t at = 0; rc == 0 && at < count;) {
        int64_t n = read_tokens(fd, path, at, count, block, err);
        if (n < 0) rc = -1;
        for (int64_t j = 0; rc == 0 && j < n; j++, at++) {
            *documents += block[j] == m->eot;
            if (block[j] >= m->vocab_size)
                rc = fail(err, "%s: token %" PRIu64 " is %d, outside the vocabulary", path, at, block[j]);
        }
    }
    if (fd >= 0) close(fd);
    if (rc == 0) rc = hash_file(path, &hash, &bytes, err);
    if (rc == 0 && hash != e->xxh64)
        rc = fail(err, "%s: checksum %016" PRIx64 ", but the manifest says %016" PRIx64 "; it is damaged", path, hash,
                  e->xxh64);
    return rc;
}

// Checks the shards of a data set, DIR/NAME or DIR/NAME_manifest.json, against its manifest. Returns how many are bad.
static int verify(const char *input) {
    Error err;
    Manifest m;
    char *path = xasprintf(ends_with(input, "_manifest.json") ? "%s" : "%s_manifest.json", input);
    if (manifest_read(&m, path, &err) != 0) die(EXIT_INPUT, "%s", err.text);
    int bad = 0;
    uint64_t documents = 0, tokens = 0, text_bytes = 0;
    uint16_t *block = (uint16_t *)xmalloc(BLOCK_BYTES);
    for (int i = 0; i < m.num_shards; i++) {
        const ManifestEntry *e = &m.shards[i];
        char *shard = xasprintf("%.*s%s", (int)(manifest_name(path) - path), path, e->file);
        if (verify_shard(shard, &m, e, block, &documents, &err) == 0)
            printf("ok  %s  %" PRIu64 " tokens\n", shard, e->tokens);
        else printf("BAD %s\n", err.text), bad++;
        tokens += e->tokens, text_bytes += e->bytes;
        free(shard);
    }
    if (bad == 0 && documents != m.documents) {
        printf("BAD %s: %" PRIu64 " documents, but the shards have %" PRIu64 "\n", path, m.documents, documents);
        bad++;
    }
    if (bad == 0)
        printf("ok  %s  %" PRIu64 " documents, %" PRIu64 " tokens, %" PRIu64 " bytes of text\n", path, m.documents,
               tokens, text_bytes);
    manifest_free(&m);
    free(block);
    free(path);
    return bad;
}

// ---------------------------------------------------------------------------------------------------------------------
// Command line

static const char help_head[] =
    "usage: tokenize [flags] -o DIR/NAME [FILE...]   text to DIR/NAME_val_000000.bin, DIR/NAME_train_000001.bin, ...\n"
    "       tokenize [flags] --print-ids [FILE...]   text to token ids, one JSON array per document\n"
    "       tokenize [flags] --decode SHARD...       shards to text, with <|endoftext|> before each document\n"
    "       tokenize --verify DIR/NAME...            check shards against their manifest\n"
    "\n"
    "A FILE named .jsonl, .json or .ndjson is JSON Lines with a \"text\" field; any other file is plain text and one\n"
    "document. gzip and zstd are unpacked. Without FILE, or where it is -, JSON Lines are read from standard input.\n"
    "Exit code 2: bad input or a bad flag; 1: the machine failed (disk, memory). Neither leaves shards behind.\n";

static int tokenize_flags(Options *o, Flag out[], int room) {
    const double many = 1e15;
    const Flag flags[] = {
        {'o', "out", FLAG_TEXT, &o->out, NULL, 0, 0, "DIR/NAME of the shards to write", 0},
        {0, "vocab", FLAG_TEXT, &o->vocab, "data/gpt2.tiktoken", 0, 0,
            "GPT-2's vocabulary; data/gpt2_vocab.sh downloads it", 0},
        {0, "bytes", FLAG_SWITCH, &o->bytes, "0", 0, 1,
            "use the byte-level vocabulary instead: the 256 bytes and end-of-text", 0},
        {0, "threads", FLAG_INT, &o->threads, NULL, 1, 1024, "encoding threads (one per core)", 0},
        {0, "shard-size", FLAG_INT, &o->shard_size, "100000000", 1, INT32_MAX, "tokens per shard", 0},
        {0, "val-tokens", FLAG_INT, &o->val_tokens, NULL, 0, many,
            "the first N tokens are for validation; 0: none (1% of them, at most a shard)", 0},
        {0, "rows", FLAG_INT, &o->rows, NULL, 0, many,
            "fail unless the input has exactly N documents, null texts included", 0},
        {0, "tokens", FLAG_INT, &o->tokens, NULL, 0, many,
            "fail unless the texts have N tokens; <|endoftext|> in a text may count 1", 0},
        {0, "source", FLAG_TEXT, &o->source, NULL, 0, 0,
            "add to the data set and list this file as a source; skip if it is listed", 0},
        {0, "print-ids", FLAG_SWITCH, &o->print_ids, "0", 0, 1, "print token ids, write no shards", 0},
        {0, "decode", FLAG_SWITCH, &o->decode, "0", 0, 1, "print the text of shards", 0},
        {0, "verify", FLAG_SWITCH, &o->verify, "0", 0, 1, "check data sets", 0},
    };
    return flags_copy(out, room, flags, (int)(sizeof flags / sizeof *flags));
}

static void parse_command_line(Program *p, int argc, char **argv) {
    static const char *stdin_only[] = {"-"};
    Options *o = &p->o;
    Flag flags[16];
    Error err;
    cpu_set_t cores;
    int n = tokenize_flags(o, flags, 16);
    o->threads = sched_getaffinity(0, sizeof cores, &cores) == 0 ? CPU_COUNT(&cores) : 1;
    o->val_tokens = o->rows = o->tokens = -1;
    p->shard_fd = p->lock_fd = -1;
    int first;
    if (flags_parse_arguments(argc, argv, help_head, flags, n, &first, &err) != 0) die(EXIT_INPUT, "%s", err.text);
    p->inputs = argv + first, p->num_inputs = argc - first;
    if (o->print_ids + o->decode + o->verify > 1)
        die(EXIT_INPUT, "--print-ids, --decode and --verify exclude each other; give one of them");
    p->mode = o->print_ids ? MODE_PRINT_IDS : o->decode ? MODE_DECODE : o->verify ? MODE_VERIFY : MODE_SHARDS;
    if (p->num_inputs == 0 && p->mode == MODE_DECODE) die(EXIT_INPUT, "no shard given; see tokenize --help");
    if (p->num_inputs == 0 && p->mode == MODE_VERIFY) die(EXIT_INPUT, "no data set given; see tokenize --help");
    if (p->num_inputs == 0) p->inputs = (char **)stdin_only, p->num_inputs = 1;
    if (p->mode != MODE_SHARDS) return;
    if (!o->out) die(EXIT_INPUT, "-o DIR/NAME is missing; see tokenize --help");
    const char *name = manifest_name(o->out), *slash = name > o->out ? name - 1 : NULL;
    if (!*name) die(EXIT_INPUT, "-o %s: a name is missing after the folder", o->out);
    p->folder = xasprintf("%.*s", slash > o->out ? (int)(slash - o->out) : 1, slash ? o->out : ".");
    p->name = xasprintf("%s", name);
}

int main(int argc, char **argv) {
    Program p = {0};
    Error err;
    program_start(argv[0]);
    parse_command_line(&p, argc, argv);
    p.start_time = p.last_progress = now_seconds();
    int bad = 0;
    if (p.mode == MODE_VERIFY) {
        for (int i = 0; i < p.num_inputs; i++) bad += verify(p.inputs[i]);
    } else {
        if (p.mode == MODE_DECODE) decode_vocabulary(&p);
        int rc = p.o.bytes ? tokenizer_init_bytes(&p.tokenizer) : tokenizer_init_gpt2(&p.tokenizer, p.o.vocab, &err);
        if (rc != 0) die(EXIT_INPUT, "%s", err.text);
        if (p.mode != MODE_DECODE) tokenizer_prepare(&p.tokenizer);
        struct stat st;
        for (int i = 0; i < p.num_inputs; i++)
            if (stat(p.inputs[i], &st) == 0 && S_ISREG(st.st_mode)) p.total_bytes += (uint64_t)st.st_size;
        if (p.mode == MODE_DECODE) decode(&p);
        else if (p.mode == MODE_PRINT_IDS) tokenize(&p);
        else make_shards(&p);
        tokenizer_free(&p.tokenizer);
    }
    check_stdout();
    manifest_free(&p.manifest);
    free(p.folder), free(p.name);
    return bad ? EXIT_INPUT : 0;
}
