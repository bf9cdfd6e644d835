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
#include <strings.h>
#include <zlib.h>
#include <zstd.h>
#include <zstd_errors.h>

#include "llmc/tokenizer.h"
#include "llmc/utils.h"

#define INPUT_BUFFER_BYTES ((size_t)1 << 20)
#define INPUT_HEAD_BYTES 512            // as far as any format's mark is from the start

typedef enum { PACKED_NOT, PACKED_GZIP, PACKED_ZSTD } Packing;

typedef struct {
    const char *suffix;                 // how the names of such files end
    size_t at, bytes;                   // where the mark is, and its length; 0: there is none
    const char *mark;                   // (bytes)
    const char *what, *advice;          // for errors
    Packing packing;                    // PACKED_NOT: the format is refused
} Format;

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
    unsigned char head[INPUT_HEAD_BYTES];       // the first unpacked bytes
    size_t head_bytes, head_taken;
    uint64_t bytes_read;                // of the file
    int exit_code;                      // after an error: EXIT_INPUT or EXIT_SYSTEM
} Input;

// ---------------------------------------------------------------------------------------------------------------------
// Formats

LLMC_FN const Format *formats_(int *count) {
    static const char convert[] = "convert it to JSON Lines or plain text first";
    static const Format list[] = {
        {".gz", 0, 2, "\x1F\x8B", "gzip data", "unpack it first with gunzip", PACKED_GZIP},
        {".zst", 0, 4, "\x28\xB5\x2F\xFD", "zstd data", "unpack it first with unzstd", PACKED_ZSTD},
        {".zstd", 0, 0, "", "zstd data", "unpack it first with unzstd", PACKED_ZSTD},
        {".bz2", 0, 10, "BZh\0\x31\x41\x59\x26\x53\x59", "bzip2 data", "unpack it first with bunzip2", PACKED_NOT},
        {".xz", 0, 6, "\xFD" "7zXZ\0", "xz data", "unpack it first with unxz", PACKED_NOT},
        {".lzma", 0, 3, "\x5D\0\0", "lzma data", "unpack it first with unlzma", PACKED_NOT},
        {".lz4", 0, 4, "\x04\x22\x4D\x18", "lz4 data", "unpack it first with unlz4", PACKED_NOT},
        {".lz", 0, 4, "LZIP", "lzip data", "unpack it first with lzip -d", PACKED_NOT},
        {".Z", 0, 2, "\x1F\x9D", "compress data", "unpack it first with uncompress", PACKED_NOT},
        {".sz", 0, 10, "\xFF\x06\0\0sNaPpY", "snappy data", "unpack it first", PACKED_NOT},
        {".zip", 0, 4, "PK\x03\x04", "a zip archive", "unpack it first with unzip", PACKED_NOT},
        {".zip", 0, 4, "PK\x05\x06", "an empty zip archive", "unpack it first with unzip", PACKED_NOT},
        {".7z", 0, 6, "7z\xBC\xAF\x27\x1C", "a 7z archive", "unpack it first with 7z x", PACKED_NOT},
        {".rar", 0, 6, "Rar!\x1A\x07", "a rar archive", "unpack it first with unrar", PACKED_NOT},
        {".tar", 257, 5, "ustar", "a tar archive", "unpack it first with tar -x", PACKED_NOT},
        {".parquet", 0, 4, "PAR1", "a parquet file", "read it with data/fineweb_edu.sh --parquet", PACKED_NOT},
        {".arrow", 0, 8, "ARROW1\0\0", "an Arrow file", convert, PACKED_NOT},
        {".avro", 0, 4, "Obj\x01", "an Avro file", convert, PACKED_NOT},
        {".npy", 0, 6, "\x93NUMPY", "a NumPy file", convert, PACKED_NOT},
        {".sqlite", 0, 16, "SQLite format 3", "an SQLite database", convert, PACKED_NOT},
        {".pdf", 0, 5, "%PDF-", "a PDF file", "convert it to text first with pdftotext", PACKED_NOT},
        {".bin", 0, 8, "\x88\xD8\x34\x01\x01\0\0\0", "a token shard", "--decode prints its text", PACKED_NOT},
    };
    *count = (int)(sizeof list / sizeof *list);
    return list;
}

// Whether the text starts with a frame of zstd: of its first versions too, or one to be skipped, which pzstd writes.
LLMC_FN bool is_zstd_(const unsigned char *s, size_t n) {
    if (n < 4) return false;
    bool skipped = (s[0] & 0xF0) == 0x50 && s[1] == 0x2A && s[2] == 0x4D && s[3] == 0x18;
    bool frame = (s[0] == 0x1E || (s[0] >= 0x22 && s[0] <= 0x28)) && s[1] == 0xB5 && s[2] == 0x2F && s[3] == 0xFD;
    return skipped || frame;
}

// The format of a file that starts with these n bytes. NULL: text, as far as one can see.
LLMC_FN const Format *format_of_content_(const unsigned char *s, size_t n) {
    int count;
    const Format *list = formats_(&count);
    for (const Format *f = list; f < list + count; f++) {
        bool same = f->bytes > 0 && f->at + f->bytes <= n;
        for (size_t i = 0; i < f->bytes && same; i++) {
            bool digit = f->mark[0] == 'B' && i == 3;           // bzip2's block size
            same = digit ? s[i] >= '1' && s[i] <= '9' : s[f->at + i] == (unsigned char)f->mark[i];
        }
        if (same || (f->packing == PACKED_ZSTD && is_zstd_(s, n))) return f;
    }
    return NULL;
}

LLMC_FN bool ends_with(const char *s, const char *end) {
    size_t n = strlen(s), m = strlen(end);
    return n >= m && strcasecmp(s + n - m, end) == 0;
}

// The format that the end of a name stands for. NULL: none of these.
LLMC_FN const Format *format_of_name_(const char *path) {
    int count;
    const Format *list = formats_(&count);
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
    const Format *f = format_of_content_(in->buffer, in->buffered), *named = format_of_name_(path);
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
    const Format *f = in->packing == PACKED_NOT ? NULL : format_of_content_(in->head, in->head_bytes);
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
    for (ssize_t n = 1; n > 0 && in->buffered < INPUT_HEAD_BYTES; in->buffered += (size_t)n)
        if ((n = input_raw_(in, in->buffer + in->buffered, INPUT_BUFFER_BYTES - in->buffered, err)) < 0) return -1;
    if (input_find_format_(in, path, err) != 0) return -1;
    for (ssize_t n = 1; n > 0 && in->head_bytes < INPUT_HEAD_BYTES; in->head_bytes += (size_t)n)
        if ((n = input_unpacked_(in, in->head + in->head_bytes, INPUT_HEAD_BYTES - in->head_bytes, err)) < 0) return -1;
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
