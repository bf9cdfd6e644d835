// The bytes of an input file or of standard input, unpacked.
//
// What a file is, its content says. gzip and zstd data are unpacked, with all their members or frames, whatever the
// name. Other formats that hold text in packed or binary form are refused by name, as is text in UTF-16 or UTF-32. So
// is a name such as x.jsonl.gz without packed data: it is damaged. A UTF-8 byte order mark is skipped.
//
// Memory: 1 MB, 40 kB for gzip, and zstd's window: up to 8 MB as zstd usually packs, up to 2 GB with its --long=31. A
// note says so where it is more than 256 MB.
#ifndef DATA_INPUT_H
#define DATA_INPUT_H

#include <stdbool.h>
#include <zlib.h>
#include <zstd.h>
#include <zstd_errors.h>

#include "llmc/formats.h"
#include "llmc/tokenizer.h"
#include "llmc/utils.h"

#define INPUT_BUFFER_BYTES ((size_t)1 << 20)

typedef struct {
    const char *path;                   // as errors name it
    int fd;
    Packing packing;
    z_stream gzip;
    ZSTD_DStream *zstd;
    bool in_frame;                      // within a zstd frame or a gzip member
    bool output_left;                   // the unpacker may have more output for what it has read
    bool noted_memory;
    unsigned char *buffer;              // (INPUT_BUFFER_BYTES) as in the file
    size_t buffered, taken;
    unsigned char head[FORMAT_HEAD_BYTES];      // the first unpacked bytes
    size_t head_bytes, head_taken;
    uint64_t bytes_read;                // of the file
    int exit_code;                      // after an error: EXIT_INPUT or EXIT_SYSTEM
} Input;

// ---------------------------------------------------------------------------------------------------------------------
// Names

// The format that the end of a name stands for. NULL: none of these.
LLMC_FN const Format *format_of_name_(const char *path) {
    int count;
    const Format *list = formats(&count);
    for (const Format *f = list; f < list + count; f++)
        if (ends_with(path, f->suffix) && strcmp(f->suffix, ".bin") != 0) return f;
    return NULL;
}

// Whether the name is that of JSON Lines, packed or not.
LLMC_FN bool is_json_name(const char *path) {
    static const char *const suffixes[] = {".jsonl", ".json", ".ndjson"};
    const Format *f = format_of_name_(path);
    bool is_json = false;
    char *name = xasprintf("%.*s", (int)(strlen(path) - (f ? strlen(f->suffix) : 0)), path);
    for (int i = 0; i < 3; i++) is_json |= ends_with(name, suffixes[i]);
    free(name);
    return is_json;
}

// ---------------------------------------------------------------------------------------------------------------------
// Unpacking. These return how many bytes they wrote to out, 0 at the end, -1 on an error.

__attribute__((format(printf, 4, 5)))
LLMC_FN int input_fail_(Input *in, int exit_code, Error *err, const char *format, ...) {
    char text[sizeof err->text];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    in->exit_code = exit_code;
    return fail(err, "%.500s: %.500s", in->path, text);
}

// The file as it is.
LLMC_FN ssize_t input_raw_(Input *in, unsigned char *out, size_t capacity, Error *err) {
    ssize_t n;
    do n = read(in->fd, out, capacity); while (n < 0 && errno == EINTR);
    if (n < 0)
        return input_fail_(in, errno == EISDIR ? EXIT_INPUT : EXIT_SYSTEM, err, "cannot read: %s", strerror(errno));
    in->bytes_read += (uint64_t)n;
    return n;
}

// Makes sure that the buffer has bytes for the unpacker, where that needs some.
LLMC_FN ssize_t input_refill_(Input *in, const char *what, Error *err) {
    if (in->taken < in->buffered || in->output_left) return 1;
    ssize_t n = input_raw_(in, in->buffer, INPUT_BUFFER_BYTES, err);
    if (n == 0 && in->in_frame)
        return input_fail_(in, EXIT_INPUT, err, "ends within its %s data; the file was cut", what);
    if (n > 0) in->taken = 0, in->buffered = (size_t)n;
    return n;
}

LLMC_FN ssize_t input_gzip_(Input *in, unsigned char *out, size_t capacity, Error *err) {
    z_stream *z = &in->gzip;
    if (capacity > INPUT_BUFFER_BYTES) capacity = INPUT_BUFFER_BYTES;
    for (;;) {
        ssize_t n = input_refill_(in, "gzip", err);
        if (n <= 0) return n;
        if (!in->in_frame && in->buffer[in->taken] == 0) {      // padding, as on tapes
            in->taken++;
            continue;
        }
        uint64_t at = in->bytes_read - (in->buffered - in->taken);
        if (!in->in_frame && in->buffer[in->taken] != 0x1F)
            return input_fail_(in, EXIT_INPUT, err, "something else follows its gzip data, at byte %" PRIu64, at);
        if (!in->in_frame && inflateReset(z) != Z_OK) return input_fail_(in, EXIT_SYSTEM, err, "zlib fails");
        in->in_frame = true;
        z->next_in = in->buffer + in->taken, z->avail_in = (uInt)(in->buffered - in->taken);
        z->next_out = out, z->avail_out = (uInt)capacity;
        int rc = inflate(z, Z_NO_FLUSH);
        in->taken = in->buffered - z->avail_in;
        if (rc == Z_MEM_ERROR) return input_fail_(in, EXIT_SYSTEM, err, "out of memory for zlib");
        if (rc != Z_OK && rc != Z_STREAM_END && rc != Z_BUF_ERROR)      // the last: it needs more input
            return input_fail_(in, EXIT_INPUT, err, "damaged gzip data (%s) before byte %" PRIu64,
                               z->msg ? z->msg : "of unknown kind", in->bytes_read);
        if (rc == Z_STREAM_END) in->in_frame = false;
        in->output_left = in->in_frame && z->avail_out == 0;
        if (z->avail_out < capacity) return (ssize_t)(capacity - z->avail_out);
    }
}

LLMC_FN int zstd_fail_(Input *in, size_t error, Error *err) {
    const char *name = ZSTD_getErrorName(error);
    switch (ZSTD_getErrorCode(error)) {
    case ZSTD_error_memory_allocation:
        return input_fail_(in, EXIT_SYSTEM, err, "out of memory: zstd --long takes up to 2 GB to unpack;"
                                                 " pack it again without --long");
    case ZSTD_error_frameParameter_windowTooLarge:
        return input_fail_(in, EXIT_INPUT, err, "its zstd window is too large to unpack here;"
                                                " pack it again without --long");
    case ZSTD_error_dictionary_wrong:
        return input_fail_(in, EXIT_INPUT, err, "packed with a zstd dictionary; unpack it first with unzstd -D");
    default:
        return input_fail_(in, EXIT_INPUT, err, "damaged zstd data (%s) before byte %" PRIu64, name, in->bytes_read);
    }
}

LLMC_FN ssize_t input_zstd_(Input *in, unsigned char *out, size_t capacity, Error *err) {
    for (;;) {
        ssize_t n = input_refill_(in, "zstd", err);
        if (n <= 0) return n;
        ZSTD_inBuffer from = {in->buffer, in->buffered, in->taken};
        ZSTD_outBuffer to = {out, capacity, 0};
        size_t rest = ZSTD_decompressStream(in->zstd, &to, &from);
        if (ZSTD_isError(rest)) return zstd_fail_(in, rest, err);
        in->in_frame = rest != 0;
        in->output_left = rest != 0 && to.pos == to.size;
        in->taken = from.pos;
        size_t memory = ZSTD_sizeof_DStream(in->zstd);
        if (memory >> 28 && !in->noted_memory) {
            fprintf(stderr, "note: %s: packed with zstd --long, unpacking it takes %zu MB\n", in->path, memory >> 20);
            in->noted_memory = true;
        }
        if (to.pos > 0) return (ssize_t)to.pos;
    }
}

LLMC_FN ssize_t input_unpacked_(Input *in, unsigned char *out, size_t capacity, Error *err) {
    if (in->packing == PACKED_GZIP) return input_gzip_(in, out, capacity, err);
    if (in->packing == PACKED_ZSTD) return input_zstd_(in, out, capacity, err);
    size_t n = in->buffered - in->taken < capacity ? in->buffered - in->taken : capacity;
    if (n == 0) return input_raw_(in, out, capacity, err);
    memcpy(out, in->buffer + in->taken, n);                     // what input_open read to find the format
    in->taken += n;
    return (ssize_t)n;
}

// ---------------------------------------------------------------------------------------------------------------------

// Finds out how the file is packed, if it is, from its start in the buffer.
LLMC_FN int input_find_format_(Input *in, const char *path, Error *err) {
    const Format *f = format_of_content(in->buffer, in->buffered), *named = format_of_name_(path);
    if (!f && named)
        return input_fail_(in, EXIT_INPUT, err, "does not start like %s; it is damaged, or has the wrong name",
                           named->what);
    if (!f) return 0;
    if (f->packing == PACKED_NOT) return input_fail_(in, EXIT_INPUT, err, "%s; %s", f->what, f->advice);
    bool ok = true;
    if (f->packing == PACKED_GZIP) ok = inflateInit2(&in->gzip, 15 + 16) == Z_OK;   // any window, gzip's header
    if (f->packing == PACKED_ZSTD) {
        in->zstd = ZSTD_createDStream();
        ok = in->zstd && !ZSTD_isError(ZSTD_DCtx_setParameter(in->zstd, ZSTD_d_windowLogMax,
                                                              ZSTD_dParam_getBounds(ZSTD_d_windowLogMax).upperBound));
    }
    if (!ok) return input_fail_(in, EXIT_SYSTEM, err, "out of memory for unpacking");
    in->packing = f->packing, in->in_frame = true;
    return 0;
}

// Checks the start of the unpacked file, and skips a byte order mark.
LLMC_FN int input_check_head_(Input *in, Error *err) {
    const Format *f = in->packing == PACKED_NOT ? NULL : format_of_content(in->head, in->head_bytes);
    const char *packed = in->packing == PACKED_GZIP ? "gzip" : "zstd", *wide = wide_encoding(in->head, in->head_bytes);
    if (f && f->packing != PACKED_NOT)
        return input_fail_(in, EXIT_INPUT, err, "packed twice, %s in %s data; unpack it once", f->what, packed);
    if (f) return input_fail_(in, EXIT_INPUT, err, "%s in %s data; %s", f->what, packed, f->advice);
    if (wide)
        return input_fail_(in, EXIT_INPUT, err, "text in %s; convert it to UTF-8 first, with iconv -f %s -t UTF-8",
                           wide, wide);
    in->head_taken = byte_order_mark(in->head, in->head_bytes);
    return 0;
}

// Opens a file, or standard input for "-". After an error too, input_close is needed.
LLMC_FN int input_open(Input *in, const char *path, Error *err) {
    memset(in, 0, sizeof *in);
    bool is_stdin = strcmp(path, "-") == 0;
    in->path = is_stdin ? "standard input" : path;
    in->fd = is_stdin ? 0 : open(path, O_RDONLY);
    if (in->fd < 0) return input_fail_(in, EXIT_INPUT, err, "cannot open: %s", strerror(errno));
    in->buffer = (unsigned char *)xmalloc(INPUT_BUFFER_BYTES);
    for (ssize_t n = 1; n > 0 && in->buffered < FORMAT_HEAD_BYTES; in->buffered += (size_t)n)
        if ((n = input_raw_(in, in->buffer + in->buffered, INPUT_BUFFER_BYTES - in->buffered, err)) < 0) return -1;
    if (input_find_format_(in, path, err) != 0) return -1;
    for (ssize_t n = 1; n > 0 && in->head_bytes < FORMAT_HEAD_BYTES; in->head_bytes += (size_t)n)
        if ((n = input_unpacked_(in, in->head + in->head_bytes, FORMAT_HEAD_BYTES - in->head_bytes, err)) < 0)
            return -1;
    return input_check_head_(in, err);
}

// Reads up to `capacity` bytes of the unpacked file. Returns how many, 0 at the end, -1 on an error.
LLMC_FN ssize_t input_read(Input *in, unsigned char *out, size_t capacity, Error *err) {
    size_t n = in->head_bytes - in->head_taken;
    if (n == 0) return input_unpacked_(in, out, capacity, err);
    if (n > capacity) n = capacity;
    memcpy(out, in->head + in->head_taken, n);
    in->head_taken += n;
    return (ssize_t)n;
}

LLMC_FN void input_close(Input *in) {
    if (in->fd > 0) close(in->fd);
    if (in->packing == PACKED_GZIP) inflateEnd(&in->gzip);
    ZSTD_freeDStream(in->zstd);
    free(in->buffer);
}

#endif
