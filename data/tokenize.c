// From text to token shards: JSON lines or plain text in, llm.c's shards and a manifest out (llmc/shard.h), without Python.
//
//     gcc -O3 -Wall -Wextra -I. data/tokenize.c -o data/tokenize -lzstd -lutf8proc -lcjson -lpthread
//
// One thread reads blocks of about a megabyte, cut where the encoding allows it; N threads encode; the main thread writes
// them in the order they were read. So the output does not depend on N, and reading, encoding and writing overlap.
//
// Memory: 2 N + 4 blocks of 3 MB, 4 MB a thread, and 5 MB for all. A document of JSON lines must be in memory whole, as
// must a run of plain text that has no place to cut it: such a giant travels alone, takes up to 27 times its size if it is
// one single word and 3 times else, and is refused beyond 256 MB.
//
// Nothing has its final name until all of the input was good and is on the disk: shards are written as NAME.bin.tmp,
// flushed, then renamed all together, the manifest last.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <getopt.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <sys/file.h>
#include <zstd.h>

#include "data/jsonl.h"
#include "llmc/shard.h"
#include "llmc/tokenizer.h"
#include "llmc/utils.h"

#define BLOCK_BYTES ((size_t)1 << 20)
#define GIANT_BYTES ((size_t)256 << 20)
#define NULL_TEXT NO_TOKEN              // stands for a document with a null text until it is skipped

typedef enum { MODE_SHARDS, MODE_PRINT_IDS, MODE_DECODE, MODE_VERIFY } Mode;
typedef enum { FORM_JSON_LINES, FORM_TEXT } Form;
typedef enum { JOB_FREE, JOB_READ, JOB_TAKEN, JOB_ENCODED } JobState;

// One block on its way from the reader to the writer. Its tokens: end-of-text, then a document's tokens, and so on.
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
    int exit_code;                      // not 0: the block is bad, err says why
    uint64_t error_line;                // within this block; 0 when the error is not one of a line
    Error err;
} Job;

typedef struct {
    // options
    const char *vocab, *out, *source;
    bool bytes;
    uint64_t threads, shard_size, val_tokens, rows, text_tokens;
    bool has_val_tokens, has_rows, has_text_tokens;
    Mode mode;
    char **inputs;
    int num_inputs;

    Tokenizer tokenizer;

    // the ring of blocks: block number n is jobs[n % num_jobs]
    pthread_mutex_t lock;
    pthread_cond_t changed;
    Job *jobs;
    uint64_t num_jobs, next_encode, next_write;

    // the data set
    Manifest manifest;
    char *folder, *name;                // DIR and NAME
    int first_new;                      // the first shard that this run writes; those before are as they were
    uint64_t position;                  // in the token stream
    int shard_fd;                       // the shard being written, the last in the manifest; -1 when there is none
    int lock_fd;                        // the first shard of this run, locked until the end
    ManifestEntry this_source;
    int source_rc;
    Error source_err;

    uint64_t documents, null_texts, invalid_texts, tokens, text_bytes;  // of this run
    double start_time, last_progress;
    uint64_t total_bytes;               // of the input files; 0 when not known
} Program;

// ---------------------------------------------------------------------------------------------------------------------
// Reading: a file or standard input, zstd unpacked

typedef struct {
    const char *path;
    int fd;
    ZSTD_DStream *zstd;                 // NULL: not packed
    size_t frame_rest;                  // 0 at the end of a zstd frame
    bool output_left;                   // zstd may have more to say about what it has read
    unsigned char *buffer;              // (BLOCK_BYTES) as in the file
    size_t buffered, taken;
    uint64_t bytes_read;
} Input;

static bool ends_with(const char *s, const char *end) {
    size_t n = strlen(s), m = strlen(end);
    return n >= m && strcmp(s + n - m, end) == 0;
}

// One read() of the file as it is.
static ssize_t input_raw(Input *in, unsigned char *out, size_t capacity, Job *job) {
    ssize_t n;
    do n = read(in->fd, out, capacity); while (n < 0 && errno == EINTR);
    if (n < 0) {
        job->exit_code = errno == EISDIR ? EXIT_INPUT : EXIT_SYSTEM;
        return fail(&job->err, "%s: cannot read: %s", in->path, strerror(errno));
    }
    in->bytes_read += (uint64_t)n;
    return n;
}

static void input_close(Input *in) {
    if (in->fd > 0) close(in->fd);
    ZSTD_freeDStream(in->zstd);
    free(in->buffer);
}

static int input_open(Input *in, const char *path, Job *job) {
    memset(in, 0, sizeof *in);
    bool is_stdin = strcmp(path, "-") == 0;
    in->path = is_stdin ? "standard input" : path;
    in->fd = is_stdin ? 0 : open(path, O_RDONLY);
    if (in->fd < 0) {
        job->exit_code = EXIT_INPUT;
        return fail(&job->err, "%s: cannot open: %s", path, strerror(errno));
    }
    in->buffer = (unsigned char *)xmalloc(BLOCK_BYTES);
    ssize_t n;
    while (in->buffered < 4 && (n = input_raw(in, in->buffer + in->buffered, BLOCK_BYTES - in->buffered, job)) != 0) {
        if (n < 0) return -1;
        in->buffered += (size_t)n;
    }
    bool packed = in->buffered >= 4 && memcmp(in->buffer, "\x28\xB5\x2F\xFD", 4) == 0;
    if (ends_with(path, ".zst") && !packed) {
        job->exit_code = EXIT_INPUT;
        return fail(&job->err, "%s: does not start like zstd data", in->path);
    }
    if (in->buffered >= 4 && memcmp(in->buffer, "PAR1", 4) == 0) {
        job->exit_code = EXIT_INPUT;
        return fail(&job->err, "%s: a parquet file; data/fineweb_edu.sh --parquet reads those", in->path);
    }
    if (packed && (is_stdin || ends_with(path, ".zst"))) {
        in->zstd = ZSTD_createDStream();
        if (!in->zstd) die(EXIT_SYSTEM, "out of memory for zstd");
        in->frame_rest = 1;
    }
    return 0;
}

// Reads up to `capacity` bytes of the unpacked file. Returns how many, 0 at the end, -1 on an error.
static ssize_t input_read(Input *in, unsigned char *out, size_t capacity, Job *job) {
    if (!in->zstd) {
        size_t n = in->buffered - in->taken < capacity ? in->buffered - in->taken : capacity;
        if (n == 0) return input_raw(in, out, capacity, job);
        memcpy(out, in->buffer + in->taken, n);                 // the start, which was looked at
        in->taken += n;
        return (ssize_t)n;
    }
    for (;;) {
        if (in->taken == in->buffered && !in->output_left) {
            ssize_t n = input_raw(in, in->buffer, BLOCK_BYTES, job);
            if (n < 0) return -1;
            if (n == 0 && in->frame_rest == 0) return 0;
            if (n == 0) {
                job->exit_code = EXIT_INPUT;
                return fail(&job->err, "%s: ends within its zstd data; the file was cut", in->path);
            }
            in->taken = 0, in->buffered = (size_t)n;
        }
        ZSTD_inBuffer from = {in->buffer, in->buffered, in->taken};
        ZSTD_outBuffer to = {out, capacity, 0};
        size_t rest = ZSTD_decompressStream(in->zstd, &to, &from);
        if (ZSTD_isError(rest)) {
            job->exit_code = EXIT_INPUT;
            return fail(&job->err, "%s: damaged zstd data (%s) before byte %" PRIu64, in->path, ZSTD_getErrorName(rest), in->bytes_read);
        }
        in->frame_rest = rest;
        in->output_left = rest != 0 && to.pos == to.size;
        in->taken = from.pos;
        if (to.pos > 0) return (ssize_t)to.pos;
    }
}

// Waits until block number n is free, and clears it but for its memory.
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

// Reads one file as blocks number *n, *n + 1, ... Returns -1 when a block is bad; it is the last one then.
static int read_file(Program *p, const char *path, uint64_t *n, uint64_t *input_done) {
    static const char *json_names[] = {".jsonl", ".jsonl.zst", ".json", ".json.zst", ".ndjson", ".ndjson.zst"};
    Form form = strcmp(path, "-") == 0 ? FORM_JSON_LINES : FORM_TEXT;
    for (size_t i = 0; i < sizeof json_names / sizeof *json_names; i++) if (ends_with(path, json_names[i])) form = FORM_JSON_LINES;
    Input in = {0};
    unsigned char *carry = NULL;                                // (carried) what the last cut left over
    size_t carried = 0;
    ssize_t got = 1;                                            // what the last read returned: 0 at the end, -1 on an error
    for (bool is_first = true; got > 0; is_first = false) {
        Job *job = job_begin(p, *n, path, form);
        job->starts_file = is_first;
        if (is_first && input_open(&in, path, job) != 0) got = -1;
        size_t cut = 0;
        for (size_t target = BLOCK_BYTES + carried; got > 0 && cut == 0; target *= 2) {
            if (target > GIANT_BYTES) {
                job->exit_code = EXIT_INPUT;
                got = fail(&job->err,
                    form == FORM_JSON_LINES ? "%s: a line of more than %zu MB; split this document"
                                            : "%s: no blank in %zu MB of text; is this text?",
                    in.path, job->raw_bytes >> 20);
                break;
            }
            if (target > 2 * BLOCK_BYTES) wait_alone(p, *n);    // a giant
            if (job->raw_capacity < target) job->raw = (unsigned char *)xrealloc(job->raw, job->raw_capacity = target);
            if (carried) memcpy(job->raw, carry, job->raw_bytes = carried);
            carried = 0;
            while (job->raw_bytes < target && (got = input_read(&in, job->raw + job->raw_bytes, target - job->raw_bytes, job)) > 0)
                job->raw_bytes += (size_t)got;
            if (got > 0)
                cut = form == FORM_JSON_LINES ? last_line_end(job->raw, job->raw_bytes)
                                              : tokenizer_cut(&p->tokenizer, job->raw, job->raw_bytes);
        }
        if (got > 0) {
            carried = job->raw_bytes - cut;
            carry = (unsigned char *)xrealloc(carry, carried);
            memcpy(carry, job->raw + cut, carried);
            job->raw_bytes = cut;
        }
        job->input_done = *input_done + in.bytes_read;
        job_finish(p, job, JOB_READ);
        (*n)++;
    }
    *input_done += in.bytes_read;
    input_close(&in);
    free(carry);
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
// Encoding: what each of the N threads does with a block

static void encode_document(Program *p, Job *job, const unsigned char *text, size_t bytes, EncodeScratch *s) {
    job->count += tokenizer_encode(&p->tokenizer, text, bytes, job->tokens + job->count, s);
    job->text_bytes += bytes;
}

static void encode_lines(Program *p, Job *job, EncodeScratch *s) {
    unsigned char *end = job->raw + job->raw_bytes;
    for (unsigned char *line = job->raw, *line_end; line < end; line = line_end + 1) {
        line_end = (unsigned char *)memchr(line, '\n', (size_t)(end - line));
        if (!line_end) line_end = end;
        job->lines++;
        JsonLine l;
        JsonlResult result = jsonl_parse(&l, line, line_end);
        if (result == JSONL_BLANK) continue;
        if (result == JSONL_ERROR) {
            job->exit_code = EXIT_INPUT;
            job->error_line = job->lines;
            fail(&job->err, "byte %td: %s", l.at - line + 1, l.error);
            return;
        }
        if (result == JSONL_NULL) {
            job->null_texts++;
            if (p->mode == MODE_PRINT_IDS) job->tokens[job->count++] = NULL_TEXT;
            continue;
        }
        uint64_t invalid_before = s->invalid_bytes;
        job->documents++;
        job->tokens[job->count++] = (uint16_t)p->tokenizer.eot;
        encode_document(p, job, l.text, l.text_bytes, s);
        job->invalid_texts += l.lone_surrogate || s->invalid_bytes > invalid_before;
    }
}

static void *encoder(void *arg) {
    Program *p = (Program *)arg;
    EncodeScratch scratch;
    encode_scratch_init(&scratch);
    for (;;) {
        pthread_mutex_lock(&p->lock);
        Job *job;
        while ((job = &p->jobs[p->next_encode % p->num_jobs])->state != JOB_READ) pthread_cond_wait(&p->changed, &p->lock);
        bool ends_input = job->ends_input;
        if (!ends_input) p->next_encode++, job->state = JOB_TAKEN;      // the end stays for all to see
        pthread_mutex_unlock(&p->lock);
        if (ends_input) break;
        if (job->exit_code == 0) {
            // A token for each byte and one for each end-of-text; in JSON lines the syntax around a text outweighs the latter.
            if (job->tokens_capacity < job->raw_bytes + 1) {
                free(job->tokens);
                job->tokens_capacity = job->raw_capacity + 1;
                job->tokens = (uint16_t *)xmalloc(job->tokens_capacity * sizeof *job->tokens);
            }
            if (job->form == FORM_JSON_LINES) {
                encode_lines(p, job, &scratch);
            } else {
                uint64_t invalid_before = scratch.invalid_bytes;
                if (job->starts_file) job->tokens[job->count++] = (uint16_t)p->tokenizer.eot;
                job->documents = job->starts_file;
                encode_document(p, job, job->raw, job->raw_bytes, &scratch);
                job->invalid_texts = scratch.invalid_bytes > invalid_before;
            }
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

// Takes this run's work away, for nothing of it is good, and stops.
__attribute__((noreturn)) static void give_up(Program *p, int exit_code, const char *line) {
    for (int i = p->first_new; i < p->manifest.num_shards; i++) {
        char *aside = shard_path(p, i, ".tmp");
        unlink(aside);
        free(aside);
    }
    if (isatty(2) && p->last_progress > p->start_time) fputc('\n', stderr);
    die(exit_code, "%s", line);
}

// The number of tokens that belong in the shard at this place of the token stream.
static uint64_t shard_room(const Program *p, uint64_t position) {
    if (position >= p->val_tokens) return p->shard_size;
    uint64_t val_left = p->val_tokens - position;
    return val_left < p->shard_size ? val_left : p->shard_size;
}

static int shard_create(Program *p, int shard, Error *err) {
    int32_t header[SHARD_HEADER_INTS];
    char *aside = shard_path(p, shard, ".tmp");
    int rc = p->shard_fd = open(aside, O_RDWR | O_CREAT, 0666);
    if (rc >= 0 && p->lock_fd < 0) {
        if (flock(rc, LOCK_EX | LOCK_NB) != 0)
            die(EXIT_INPUT, "%s: another run is writing this data set; wait for it, or take another name", aside);
        p->lock_fd = dup(rc);
    }
    if (rc < 0 || ftruncate(rc, 0) != 0) rc = fail(err, "%s: cannot create: %s", aside, strerror(errno));
    else {
        shard_fill_header(header, 0);
        rc = write_exactly(p->shard_fd, header, sizeof header, aside, err);
    }
    free(aside);
    return rc < 0 ? -1 : 0;
}

// Writes the token count, flushes, and takes the checksum.
static int shard_close(Program *p, Error *err) {
    int shard = p->manifest.num_shards - 1, rc = 0;
    if (p->shard_fd < 0) return 0;
    ManifestEntry *e = &p->manifest.shards[shard];
    int32_t header[SHARD_HEADER_INTS];
    uint64_t file_bytes;
    char *aside = shard_path(p, shard, ".tmp");
    shard_fill_header(header, e->tokens);
    if (lseek(p->shard_fd, 0, SEEK_SET) < 0) rc = fail(err, "%s: cannot seek: %s", aside, strerror(errno));
    if (rc == 0) rc = write_exactly(p->shard_fd, header, sizeof header, aside, err);
    if (rc == 0 && fsync(p->shard_fd) != 0) rc = fail(err, "%s: cannot flush to disk: %s", aside, strerror(errno));
    if (close(p->shard_fd) != 0 && rc == 0) rc = fail(err, "%s: cannot close: %s", aside, strerror(errno));
    p->shard_fd = -1;
    if (rc == 0) rc = hash_file(aside, &e->xxh64, &file_bytes, err);
    if (rc == 0 && file_bytes != SHARD_HEADER_BYTES + 2 * e->tokens)
        rc = fail(err, "%s: %" PRIu64 " bytes arrived of %" PRIu64, aside, file_bytes, SHARD_HEADER_BYTES + 2 * e->tokens);
    free(aside);
    return rc;
}

static uint64_t text_bytes_of(const Tokenizer *t, const uint16_t *tokens, size_t n) {
    uint64_t bytes = 0;
    for (size_t i = 0; i < n; i++) if (tokens[i] != t->eot) bytes += t->start[tokens[i] + 1] - t->start[tokens[i]];
    return bytes;
}

// Appends to the token stream, starting new shards as they fill up. text_bytes: of the tokens' text.
static int write_tokens(Program *p, const uint16_t *tokens, size_t count, uint64_t text_bytes, Error *err) {
    Manifest *m = &p->manifest;
    while (count > 0) {
        uint64_t shard_start = p->position - (p->shard_fd >= 0 ? m->shards[m->num_shards - 1].tokens : 0);
        if (p->shard_fd >= 0 && p->position - shard_start == shard_room(p, shard_start)) {
            if (shard_close(p, err) != 0) return -1;
            shard_start = p->position;
        }
        if (p->shard_fd < 0) {
            manifest_add(&m->shards, &m->num_shards,
                xasprintf("%s_%s_%06d.bin", p->name, p->position < p->val_tokens ? "val" : "train", m->num_shards));
            if (shard_create(p, m->num_shards - 1, err) != 0) return -1;
        }
        ManifestEntry *e = &m->shards[m->num_shards - 1];
        uint64_t room = shard_room(p, shard_start) - e->tokens;
        size_t n = count < room ? count : (size_t)room;
        if (write_exactly(p->shard_fd, tokens, n * sizeof *tokens, e->file, err) != 0) return -1;
        uint64_t n_bytes = n == count ? text_bytes : text_bytes_of(&p->tokenizer, tokens, n);
        e->tokens += n, e->bytes += n_bytes, text_bytes -= n_bytes;
        p->position += n, tokens += n, count -= n;
    }
    return 0;
}

// Opens the last shard of the data set again if it has room: a copy of its tokens, which must be those of the manifest.
// (Its file may hold more than the manifest says, where a run stopped between the two; those come again.)
static int shard_reopen(Program *p, Error *err) {
    Manifest *m = &p->manifest;
    for (int i = 0; i < m->num_shards; i++) p->position += m->shards[i].tokens;
    p->first_new = m->num_shards;
    if (m->num_shards == 0) return 0;
    int shard = m->num_shards - 1;
    ManifestEntry *e = &m->shards[shard];
    if (e->tokens == shard_room(p, p->position - e->tokens)) return 0;

    char *path = shard_path(p, shard, "");
    int fd = open(path, O_RDONLY), rc = fd < 0 ? fail(err, "%s: cannot open: %s", path, strerror(errno)) : 0;
    int32_t header[SHARD_HEADER_INTS];
    void *buffer = xmalloc(BLOCK_BYTES);
    shard_fill_header(header, e->tokens);
    XXH64_state_t *state = XXH64_createState();
    XXH64_reset(state, 0);
    XXH64_update(state, header, sizeof header);
    p->first_new = shard;
    if (rc == 0) rc = shard_create(p, shard, err);
    for (uint64_t done = 0, n; rc == 0 && done < 2 * e->tokens; done += n) {
        n = 2 * e->tokens - done < BLOCK_BYTES ? 2 * e->tokens - done : BLOCK_BYTES;
        rc = pread_exactly(fd, buffer, n, SHARD_HEADER_BYTES + done, path, err);
        if (rc == 0) rc = write_exactly(p->shard_fd, buffer, n, path, err);
        XXH64_update(state, buffer, n);
    }
    if (rc == 0 && XXH64_digest(state) != e->xxh64) rc = fail(err, "%s: not what its manifest says; it was changed or damaged", path);
    XXH64_freeState(state);
    if (fd >= 0) close(fd);
    free(buffer);
    free(path);
    return rc;
}

// All input was good: gives the shards their names, then lists them.
static int commit(Program *p, Error *err) {
    Manifest *m = &p->manifest;
    if (shard_close(p, err) != 0) return -1;
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
    // Shards behind the last would be of an older data set of this name.
    for (int i = m->num_shards, gone = 0; rc == 0 && gone == 0; i++) {
        char *val = xasprintf("%s/%s_val_%06d.bin", p->folder, p->name, i),
             *train = xasprintf("%s/%s_train_%06d.bin", p->folder, p->name, i);
        gone = unlink(val) & unlink(train);
        free(val), free(train);
    }
    return rc;
}

// ---------------------------------------------------------------------------------------------------------------------
// The main thread: takes the blocks in order

static void print_progress(Program *p, uint64_t input_done) {
    double now = now_seconds(), seconds = now - p->start_time;
    if (now - p->last_progress < 0.2) return;
    p->last_progress = now;
    double part = p->has_rows ? (p->rows ? (double)(p->documents + p->null_texts) / (double)p->rows : 1)
                              : p->total_bytes ? (double)input_done / (double)p->total_bytes : 0;
    char bar[21], left[32];
    for (int i = 0; i < 20; i++) bar[i] = part * 20 > i ? '#' : '.';
    bar[20] = 0;
    format_duration(left, part > 0 ? seconds * (1 - part) / part : -1);
    fprintf(stderr, "\r[%s] %5.1f%%  %.1fM tokens  %.1f MB/s  %s left   ", bar, 100 * part, 1e-6 * (double)p->tokens,
        1e-6 * (double)p->text_bytes / seconds, left);
}

// One JSON array a document on standard output. *open: 0 outside an array, 1 in an empty one, 2 behind a number.
static void print_ids(const Program *p, const Job *job, int *open) {
    for (size_t i = 0; i < job->count; i++) {
        unsigned token = job->tokens[i];
        if (token == (unsigned)p->tokenizer.eot || token == NULL_TEXT) {
            if (*open) fputs("]\n", stdout);
            fputs(token == NULL_TEXT ? "null\n" : "[", stdout);
            *open = token != NULL_TEXT;
            continue;
        }
        char digits[8], *c = digits + sizeof digits;
        do *--c = (char)('0' + token % 10); while ((token /= 10) > 0);
        if (*open == 2) *--c = ',';
        *open = 2;
        fwrite(c, 1, (size_t)(digits + sizeof digits - c), stdout);
    }
}

// Reads, encodes and writes everything.
static void tokenize(Program *p) {
    pthread_t reading, *encoding = (pthread_t *)xmalloc(p->threads * sizeof *encoding);
    p->num_jobs = 2 * p->threads + 4;
    p->jobs = (Job *)xcalloc(p->num_jobs, sizeof *p->jobs);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->changed, NULL);
    bool ok = pthread_create(&reading, NULL, reader, p) == 0;
    for (uint64_t i = 0; i < p->threads; i++) ok = ok && pthread_create(&encoding[i], NULL, encoder, p) == 0;
    if (!ok) give_up(p, EXIT_SYSTEM, "cannot start a thread; try fewer --threads");

    Error err;
    char line[sizeof err.text + 512];
    uint64_t lines = 0;                                         // of the file before this block
    bool file_invalid = false, show_progress = isatty(2);
    int open_array = 0;
    for (;;) {
        pthread_mutex_lock(&p->lock);
        Job *job = &p->jobs[p->next_write % p->num_jobs];
        while (job->state != JOB_ENCODED && !(job->state == JOB_READ && job->ends_input)) pthread_cond_wait(&p->changed, &p->lock);
        pthread_mutex_unlock(&p->lock);
        if (job->ends_input) break;
        if (job->starts_file) lines = 0, file_invalid = false;
        if (job->exit_code != 0) {
            const char *name = strcmp(job->path, "-") == 0 ? "standard input" : job->path;
            if (job->error_line == 0) give_up(p, job->exit_code, job->err.text);
            snprintf(
                line, sizeof line, "%s: line %" PRIu64 ", %s; damaged, or not JSON lines", name, lines + job->error_line, job->err.text);
            give_up(p, job->exit_code, line);
        }
        lines += job->lines;
        p->documents += job->documents, p->null_texts += job->null_texts;
        if (job->form == FORM_JSON_LINES) p->invalid_texts += job->invalid_texts;
        else if (job->invalid_texts && !file_invalid) p->invalid_texts++, file_invalid = true;
        p->tokens += job->count, p->text_bytes += job->text_bytes;
        if (p->mode == MODE_PRINT_IDS) print_ids(p, job, &open_array);
        else if (write_tokens(p, job->tokens, job->count, job->text_bytes, &err) != 0) give_up(p, EXIT_SYSTEM, err.text);
        if (show_progress) print_progress(p, job->input_done);

        if (job->raw_capacity > 4 * BLOCK_BYTES) {              // a giant does not stay
            free(job->raw), free(job->tokens);
            job->raw = NULL, job->tokens = NULL, job->raw_capacity = job->tokens_capacity = 0;
        }
        pthread_mutex_lock(&p->lock);
        job->state = JOB_FREE;
        p->next_write++;
        pthread_cond_broadcast(&p->changed);
        pthread_mutex_unlock(&p->lock);
    }
    pthread_join(reading, NULL);
    for (uint64_t i = 0; i < p->threads; i++) pthread_join(encoding[i], NULL);
    for (uint64_t i = 0; i < p->num_jobs; i++) free(p->jobs[i].raw), free(p->jobs[i].tokens);
    free(p->jobs), free(encoding);

    if (show_progress && p->last_progress > p->start_time) fputc('\n', stderr);
    if (p->has_rows && p->documents + p->null_texts != p->rows) {
        snprintf(line, sizeof line, "the input has %" PRIu64 " rows instead of %" PRIu64 " (--rows): what wrote it failed; nothing is kept",
            p->documents + p->null_texts, p->rows);
        give_up(p, EXIT_INPUT, line);
    }
    if (p->has_text_tokens && p->tokens - p->documents != p->text_tokens) {
        snprintf(line, sizeof line,
            "the texts have %" PRIu64 " tokens instead of %" PRIu64 " (--tokens): they were changed or damaged; nothing is kept",
            p->tokens - p->documents, p->text_tokens);
        give_up(p, EXIT_INPUT, line);
    }
    if (open_array) fputs("]\n", stdout);
}

// Checksum and size of the file that --source names, while its text streams in.
static void *hash_source(void *arg) {
    Program *p = (Program *)arg;
    p->source_rc = hash_file(p->source, &p->this_source.xxh64, &p->this_source.bytes, &p->source_err);
    return NULL;
}

// A new data set, or with --source one more file for the one that is there. Returns false when that file is in it already.
static bool open_data_set(Program *p) {
    Error err;
    Manifest *m = &p->manifest;
    char *path = manifest_path(p->folder, p->name);
    struct stat st;
    if (make_dirs(p->folder, &err) != 0) die(EXIT_SYSTEM, "%s", err.text);
    bool exists = stat(path, &st) == 0;
    if (exists && !p->source) die(EXIT_INPUT, "%s: there is a data set of this name; take another name, or remove it first", path);
    if (exists) {
        if (manifest_read(m, path, &err) != 0) die(EXIT_INPUT, "%s", err.text);
        if (m->vocab_size != p->tokenizer.vocab_size || m->shard_size != p->shard_size || m->val_tokens != p->val_tokens) {
            die(EXIT_INPUT, "%s: begun with --shard-size %" PRIu64 " --val-tokens %" PRIu64 "%s; go on with the same, or take another name",
                path, m->shard_size, m->val_tokens, m->eot == BYTES_EOT ? " --bytes" : " and GPT-2's vocabulary");
        }
        for (int i = 0; i < m->num_sources; i++) {
            if (strcmp(m->sources[i].file, p->this_source.file) != 0) continue;
            if (stat(p->source, &st) != 0) die(EXIT_INPUT, "%s: cannot look at it: %s", p->source, strerror(errno));
            if ((uint64_t)st.st_size == m->sources[i].bytes) return free(path), false;
            die(EXIT_INPUT,
                "%s: has %lld bytes, but a file of this name with %" PRIu64 " bytes is in %s already; name it otherwise if it is another",
                p->source, (long long)st.st_size, m->sources[i].bytes, path);
        }
        if (shard_reopen(p, &err) != 0) give_up(p, EXIT_INPUT, err.text);
    }
    m->vocab_size = p->tokenizer.vocab_size, m->eot = p->tokenizer.eot;
    m->shard_size = p->shard_size, m->val_tokens = p->val_tokens;
    free(path);
    return true;
}

static void make_shards(Program *p) {
    Error err;
    pthread_t hashing;
    if (p->source) p->this_source.file = xasprintf("%s", manifest_name(p->source));
    if (!open_data_set(p)) {
        fprintf(stderr, "%s: %s is in the data set already, nothing to do\n", *program_name_(), p->source);
        free(p->this_source.file);
        return;
    }
    if (p->source && pthread_create(&hashing, NULL, hash_source, p) != 0) give_up(p, EXIT_SYSTEM, "cannot start a thread");
    tokenize(p);
    if (p->source) {
        pthread_join(hashing, NULL);
        if (p->source_rc != 0) give_up(p, EXIT_INPUT, p->source_err.text);
        ManifestEntry *e = manifest_add(&p->manifest.sources, &p->manifest.num_sources, p->this_source.file);
        p->this_source.documents = p->documents, p->this_source.tokens = p->tokens;
        *e = p->this_source;
    }
    if (commit(p, &err) != 0) give_up(p, EXIT_SYSTEM, err.text);
    double seconds = now_seconds() - p->start_time;
    fprintf(stderr, "%s: %" PRIu64 " documents, %" PRIu64 " bytes, %" PRIu64 " tokens in %d shards, %.1f s, %.1f MB/s\n", *program_name_(),
        p->documents, p->text_bytes, p->tokens, p->manifest.num_shards, seconds, 1e-6 * (double)p->text_bytes / seconds);
    if (p->null_texts) fprintf(stderr, "%s: skipped %" PRIu64 " rows whose text is null\n", *program_name_(), p->null_texts);
    if (p->invalid_texts)
        fprintf(stderr, "%s: %" PRIu64 " documents with invalid UTF-8, taken bytewise\n", *program_name_(), p->invalid_texts);
}

// ---------------------------------------------------------------------------------------------------------------------
// From shards back

static void decode(const Program *p) {
    uint16_t *tokens = (uint16_t *)xmalloc(BLOCK_BYTES);
    for (int i = 0; i < p->num_inputs; i++) {
        Error err;
        uint64_t count;
        int fd = shard_open(p->inputs[i], &count, &err);
        if (fd < 0) die(EXIT_INPUT, "%s", err.text);
        for (uint64_t at = 0, n; at < count; at += n) {
            n = count - at < BLOCK_BYTES / 2 ? count - at : BLOCK_BYTES / 2;
            if (pread_exactly(fd, tokens, 2 * n, SHARD_HEADER_BYTES + 2 * at, p->inputs[i], &err) != 0) die(EXIT_SYSTEM, "%s", err.text);
            for (uint64_t j = 0; j < n; j++) {
                size_t bytes;
                if (tokens[j] >= p->tokenizer.vocab_size)
                    die(EXIT_INPUT, "%s: token %" PRIu64 " is %d, and the vocabulary has %d%s", p->inputs[i], at + j, tokens[j],
                        p->tokenizer.vocab_size, p->bytes ? " (--bytes)" : "");
                const char *text = tokenizer_decode(&p->tokenizer, tokens[j], &bytes);
                fwrite(text, 1, bytes, stdout);
            }
        }
        close(fd);
    }
    free(tokens);
}

// Checks each shard of one data set against its manifest. Returns how many are bad.
static int verify(const char *input) {
    Error err;
    Manifest m;
    char *path = ends_with(input, "_manifest.json") ? xasprintf("%s", input) : xasprintf("%s_manifest.json", input);
    char *slash = strrchr(path, '/');
    if (manifest_read(&m, path, &err) != 0) die(EXIT_INPUT, "%s", err.text);
    int bad = 0;
    uint64_t starts = 0, tokens = 0, text_bytes = 0;
    uint16_t *block = (uint16_t *)xmalloc(BLOCK_BYTES);
    for (int i = 0; i < m.num_shards; i++) {
        const ManifestEntry *e = &m.shards[i];
        uint64_t count = 0, hash, bytes;
        char *shard = xasprintf("%.*s%s", slash ? (int)(slash - path + 1) : 0, path, e->file);
        int fd = shard_open(shard, &count, &err), rc = fd < 0 ? -1 : 0;
        if (rc == 0 && count != e->tokens) rc = fail(&err, "%s: %" PRIu64 " tokens, the manifest says %" PRIu64, shard, count, e->tokens);
        for (uint64_t at = 0, n; rc == 0 && at < count; at += n) {
            n = count - at < BLOCK_BYTES / 2 ? count - at : BLOCK_BYTES / 2;
            rc = pread_exactly(fd, block, 2 * n, SHARD_HEADER_BYTES + 2 * at, shard, &err);
            for (uint64_t j = 0; rc == 0 && j < n; j++) {
                starts += block[j] == m.eot;
                if (block[j] >= m.vocab_size)
                    rc = fail(&err, "%s: token %" PRIu64 " is %d, outside the vocabulary", shard, at + j, block[j]);
            }
        }
        if (fd >= 0) close(fd);
        if (rc == 0) rc = hash_file(shard, &hash, &bytes, &err);
        if (rc == 0 && hash != e->xxh64)
            rc = fail(&err, "%s: checksum %016" PRIx64 ", the manifest says %016" PRIx64 "; damaged", shard, hash, e->xxh64);
        if (rc == 0) printf("ok  %s  %" PRIu64 " tokens\n", shard, e->tokens);
        else printf("BAD %s\n", err.text), bad++;
        tokens += e->tokens, text_bytes += e->bytes;
        free(shard);
    }
    if (bad == 0 && starts != m.documents)
        printf("BAD %s: %" PRIu64 " documents, the shards have %" PRIu64 "\n", path, m.documents, starts), bad++;
    if (bad == 0)
        printf("ok  %s  %" PRIu64 " documents, %" PRIu64 " tokens, %" PRIu64 " bytes of text\n", path, m.documents, tokens, text_bytes);
    manifest_free(&m);
    free(block);
    free(path);
    return bad;
}

// ---------------------------------------------------------------------------------------------------------------------
// Command line

static const char help[] =
    "usage: tokenize [options] -o DIR/NAME [FILE...]     text to DIR/NAME_val_000000.bin, DIR/NAME_train_000001.bin, ...\n"
    "       tokenize [options] --print-ids [FILE...]     text to one JSON array of token ids a document\n"
    "       tokenize [options] --decode SHARD...         shards back to text, <|endoftext|> before each document\n"
    "       tokenize --verify DIR/NAME...                check shards against their manifest\n"
    "\n"
    "FILE is JSON lines with a \"text\" field where it is named .jsonl, .json or .ndjson, else plain text, the file being one\n"
    "document; .zst is unpacked. No FILE, or -, is JSON lines from standard input.\n"
    "\n"
    "  --vocab FILE       GPT-2's vocabulary (default data/gpt2.tiktoken; data/gpt2_vocab.sh gets it)\n"
    "  --bytes            the byte-level vocabulary instead: 256 bytes and end-of-text\n"
    "  --threads N        encoding threads (default: as many as there are cores)\n"
    "  --shard-size N     tokens a shard (default 100000000)\n"
    "  --val-tokens N     tokens that are validation, from the first on (default: one shard; 0: none)\n"
    "  --rows N           the input must have exactly N documents, those with a null text included\n"
    "  --tokens N         the texts must have exactly N tokens, end-of-text tokens not counted\n"
    "  --source FILE      add to the data set of this name, noting FILE in its manifest; nothing is done if it is there\n"
    "  -o DIR/NAME        where to write\n"
    "  -h, --help\n"
    "\n"
    "Exit code 2: the input or a flag is bad; 1: the machine failed (disk, memory); nothing is written then.\n";

static uint64_t number(const char *flag, const char *s, uint64_t min, uint64_t max) {
    char *end;
    errno = 0;
    uint64_t value = strtoull(s, &end, 10);
    if (*s < '0' || *s > '9' || *end || errno || value < min || value > max) {
        die(EXIT_INPUT, "--%s %s: a whole number from %" PRIu64 " to %" PRIu64 " is wanted", flag, s, min, max);
    }
    return value;
}

static void parse_flags(Program *p, int argc, char **argv) {
    enum { VOCAB = 256, BYTES, THREADS, SHARD_SIZE, VAL_TOKENS, ROWS, TOKENS, SOURCE, PRINT_IDS, DECODE, VERIFY };
    static const struct option flags[]
        = {{"vocab", 1, 0, VOCAB}, {"bytes", 0, 0, BYTES}, {"threads", 1, 0, THREADS}, {"shard-size", 1, 0, SHARD_SIZE},
            {"val-tokens", 1, 0, VAL_TOKENS}, {"rows", 1, 0, ROWS}, {"tokens", 1, 0, TOKENS}, {"source", 1, 0, SOURCE},
            {"print-ids", 0, 0, PRINT_IDS}, {"decode", 0, 0, DECODE}, {"verify", 0, 0, VERIFY}, {"help", 0, 0, 'h'}, {0, 0, 0, 0}};
    static const char *stdin_only[] = {"-"};
    cpu_set_t cores;
    p->vocab = "data/gpt2.tiktoken";
    p->threads = sched_getaffinity(0, sizeof cores, &cores) == 0 ? (uint64_t)CPU_COUNT(&cores) : 1;
    p->shard_size = 100000000;
    p->shard_fd = p->lock_fd = -1;
    for (int c; (c = getopt_long(argc, argv, "o:h", flags, NULL)) != -1;) {
        switch (c) {
        case 'o': p->out = optarg; break;
        case VOCAB: p->vocab = optarg; break;
        case BYTES: p->bytes = true; break;
        case THREADS: p->threads = number("threads", optarg, 1, 1024); break;
        case SHARD_SIZE: p->shard_size = number("shard-size", optarg, 1, INT32_MAX); break;
        case VAL_TOKENS: p->val_tokens = number("val-tokens", optarg, 0, 1000000000000000), p->has_val_tokens = true; break;
        case ROWS: p->rows = number("rows", optarg, 0, 1000000000000000), p->has_rows = true; break;
        case TOKENS: p->text_tokens = number("tokens", optarg, 0, 1000000000000000), p->has_text_tokens = true; break;
        case SOURCE: p->source = optarg; break;
        case PRINT_IDS: p->mode = MODE_PRINT_IDS; break;
        case DECODE: p->mode = MODE_DECODE; break;
        case VERIFY: p->mode = MODE_VERIFY; break;
        case 'h': fputs(help, stdout); exit(0);
        default: exit(EXIT_INPUT);                              // getopt has said why
        }
    }
    if (!p->has_val_tokens) p->val_tokens = p->shard_size;
    p->inputs = argv + optind, p->num_inputs = argc - optind;
    if (p->num_inputs == 0 && p->mode >= MODE_DECODE)
        die(EXIT_INPUT, "no %s given; tokenize --help", p->mode == MODE_DECODE ? "shard" : "data set");
    if (p->num_inputs == 0) p->inputs = (char **)stdin_only, p->num_inputs = 1;
    if (p->mode != MODE_SHARDS) return;
    if (!p->out) die(EXIT_INPUT, "-o DIR/NAME is missing; tokenize --help");
    const char *slash = strrchr(p->out, '/'), *name = slash ? slash + 1 : p->out;
    if (!*name) die(EXIT_INPUT, "-o %s: the name behind the folder is missing", p->out);
    p->folder = xasprintf("%.*s", slash > p->out ? (int)(slash - p->out) : 1, slash ? p->out : ".");
    p->name = xasprintf("%s", name);
}

int main(int argc, char **argv) {
    Program p = {0};
    Error err;
    set_program_name(argv[0]);
    parse_flags(&p, argc, argv);
    p.start_time = p.last_progress = now_seconds();
    int bad = 0;
    if (p.mode == MODE_VERIFY) {
        for (int i = 0; i < p.num_inputs; i++) bad += verify(p.inputs[i]);
    } else {
        int rc = p.bytes ? tokenizer_init_bytes(&p.tokenizer) : tokenizer_init_gpt2(&p.tokenizer, p.vocab, &err);
        if (rc != 0) die(EXIT_INPUT, "%s", err.text);
        if (p.mode != MODE_DECODE) tokenizer_prepare(&p.tokenizer);
        struct stat st;
        for (int i = 0; i < p.num_inputs; i++) {
            if (stat(p.inputs[i], &st) == 0 && S_ISREG(st.st_mode)) p.total_bytes += (uint64_t)st.st_size;
        }
        if (p.mode == MODE_DECODE) decode(&p);
        else if (p.mode == MODE_PRINT_IDS) tokenize(&p);
        else make_shards(&p);
        tokenizer_free(&p.tokenizer);
    }
    if (fflush(stdout) != 0 || ferror(stdout)) die(EXIT_SYSTEM, "standard output: cannot write: %s", strerror(errno));
    manifest_free(&p.manifest);
    free(p.folder), free(p.name);
    return bad ? EXIT_INPUT : 0;
}
