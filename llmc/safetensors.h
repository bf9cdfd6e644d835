// Reads and writes safetensors files: https://github.com/huggingface/safetensors#format
//   uint64 n, little-endian
//   n bytes of JSON: {"name": {"dtype", "shape", "data_offsets": [begin, end]}, ..., "__metadata__": {text: text}}
//   data; offsets count from its first byte
// The reader trusts nothing: it checks every size against the file before using it, and the tensors must cover the data
// exactly, without gaps or overlaps.
#ifndef LLMC_SAFETENSORS_H
#define LLMC_SAFETENSORS_H

#ifndef XXH_INLINE_ALL
#define XXH_INLINE_ALL
#endif
#include <xxhash.h>
#include "json.h"
#include "utils.h"

#define SAFETENSORS_MAX_HEADER ((uint64_t)100 << 20)     // bytes; the same limit as in the reference implementation
#define SAFETENSORS_MAX_DIMS 8

typedef enum { DTYPE_F32, DTYPE_F64, DTYPE_BF16, DTYPE_F16, DTYPE_I64, DTYPE_OTHER } Dtype;

LLMC_FN const char *dtype_name(Dtype d) {
    static const char *const names[] = {"F32", "F64", "BF16", "F16", "I64", "another dtype"};
    return names[d];
}

typedef struct {
    const char *name;       // owned by the parsed header
    Dtype dtype;
    int num_dims;
    int64_t shape[SAFETENSORS_MAX_DIMS];
    uint64_t offset;        // of its first byte, from the start of the file
    uint64_t elements, bytes;
} SafeTensor;

typedef struct {
    char *path;
    int fd;
    cJSON *header;
    SafeTensor *tensors;    // (num_tensors) in the order of the header
    int num_tensors;
} SafeTensors;

// ---------------------------------------------------------------------------------------------------------------------
// Reading

// Closes the file and frees everything that st owns, SafeTensor pointers into it included.
LLMC_FN void safetensors_close(SafeTensors *st) {
    if (st->fd >= 0) close(st->fd);
    cJSON_Delete(st->header);
    free(st->tensors);
    free(st->path);
    memset(st, 0, sizeof *st);
    st->fd = -1;
}

// Reads one entry of the header into *t and checks that its shape, type and place in the data agree.
LLMC_FN int safetensors_parse_entry_(const SafeTensors *st, SafeTensor *t, const cJSON *item, uint64_t data_start,
                                     uint64_t data_bytes, Error *err) {
    static const struct { const char *name; int bytes; } dtypes[] = {       // the first ones in the order of Dtype
        {"F32", 4}, {"F64", 8}, {"BF16", 2}, {"F16", 2}, {"I64", 8}, {"I32", 4}, {"I16", 2}, {"I8", 1}, {"U8", 1},
        {"BOOL", 1}, {"U16", 2}, {"U32", 4}, {"U64", 8}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
    const cJSON *dtype = cJSON_GetObjectItemCaseSensitive(item, "dtype"), *dim;
    const cJSON *shape = cJSON_GetObjectItemCaseSensitive(item, "shape");
    const cJSON *offsets = cJSON_GetObjectItemCaseSensitive(item, "data_offsets");
    t->name = item->string;
    if (!cJSON_IsString(dtype) || !cJSON_IsArray(shape) || !cJSON_IsArray(offsets) || cJSON_GetArraySize(offsets) != 2)
        return fail(err, "%s: tensor \"%.60s\" lacks a dtype, shape or data_offsets; the file is damaged", st->path,
                    t->name);

    int width = 0;
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
        if (!strcmp(dtype->valuestring, dtypes[i].name))
            t->dtype = i < DTYPE_OTHER ? (Dtype)i : DTYPE_OTHER, width = dtypes[i].bytes;
    if (!width)
        return fail(err, "%s: tensor \"%.60s\" has the unknown dtype \"%.20s\"", st->path, t->name, dtype->valuestring);

    t->elements = 1;
    cJSON_ArrayForEach(dim, shape) {
        double n = dim->valuedouble;
        if (!json_is_integer(dim, 0, 0x1p40) || t->num_dims == SAFETENSORS_MAX_DIMS || (double)t->elements * n > 0x1p50)
            return fail(err, "%s: tensor \"%.60s\" has an impossible shape; the file is damaged", st->path, t->name);
        t->shape[t->num_dims++] = (int64_t)n;
        t->elements *= (uint64_t)n;
    }
    t->bytes = t->elements * (uint64_t)width;

    const cJSON *first = cJSON_GetArrayItem(offsets, 0), *last = cJSON_GetArrayItem(offsets, 1);
    double begin = first->valuedouble, end = last->valuedouble;
    if (!json_is_integer(first, 0, 0x1p53) || !json_is_integer(last, begin, 0x1p53))
        return fail(err, "%s: tensor \"%.60s\" has impossible data_offsets; the file is damaged", st->path, t->name);
    if (end > (double)data_bytes)
        return fail(err, "%s: tensor \"%.60s\" ends at byte %.0f of the data, but there are only %llu; "
                    "the file was cut short", st->path, t->name, end, (unsigned long long)data_bytes);
    if ((uint64_t)end - (uint64_t)begin != t->bytes)
        return fail(err, "%s: tensor \"%.60s\" has %llu bytes, but its shape needs %llu; the file is damaged", st->path,
                    t->name, (unsigned long long)((uint64_t)end - (uint64_t)begin), (unsigned long long)t->bytes);
    t->offset = data_start + (uint64_t)begin;
    return 0;
}

// Reads the JSON header into st->header. data_start: where the data begin.
LLMC_FN int safetensors_read_header_(SafeTensors *st, uint64_t file_bytes, uint64_t *data_start, Error *err) {
    unsigned char size_bytes[8];
    uint64_t header_bytes = 0;
    if (file_bytes < 8)
        return fail(err, "%s: %llu bytes; too short for a safetensors file", st->path, (unsigned long long)file_bytes);
    if (pread_exactly(st->fd, size_bytes, 8, 0, st->path, err) != 0) return -1;
    for (int i = 7; i >= 0; i--) header_bytes = header_bytes << 8 | size_bytes[i];
    if (header_bytes > SAFETENSORS_MAX_HEADER || header_bytes > file_bytes - 8)
        return fail(err, "%s: its header claims %llu bytes in a file of %llu; not a safetensors file, or one cut short",
                    st->path, (unsigned long long)header_bytes, (unsigned long long)file_bytes);
    char *text = (char *)xmalloc(header_bytes + 1);
    int rc = pread_exactly(st->fd, text, header_bytes, 8, st->path, err);
    if (rc == 0) {
        text[header_bytes] = 0;
        st->header = json_parse(text, header_bytes, st->path, err);
        rc = st->header ? 0 : -1;
    }
    free(text);
    *data_start = 8 + header_bytes;
    return rc;
}

// Orders pointers to tensors by their place in the file, empty ones first.
LLMC_FN int safetensors_compare_(const void *a, const void *b) {
    const SafeTensor *x = *(const SafeTensor *const *)a, *y = *(const SafeTensor *const *)b;
    return x->offset != y->offset ? (x->offset < y->offset ? -1 : 1) : (x->bytes > y->bytes) - (x->bytes < y->bytes);
}

// Fills st->tensors from st->header and checks that they cover the data exactly.
LLMC_FN int safetensors_parse_header_(SafeTensors *st, uint64_t file_bytes, uint64_t data_start, Error *err) {
    size_t n = (size_t)cJSON_GetArraySize(st->header);
    st->tensors = (SafeTensor *)xcalloc(n, sizeof *st->tensors);
    SafeTensor **sorted = (SafeTensor **)xcalloc(n, sizeof *sorted);
    const cJSON *item;
    int rc = 0;
    cJSON_ArrayForEach(item, st->header) {
        if (!strcmp(item->string, "__metadata__")) continue;
        SafeTensor *t = &st->tensors[st->num_tensors];
        rc = safetensors_parse_entry_(st, t, item, data_start, file_bytes - data_start, err);
        if (rc != 0) break;
        sorted[st->num_tensors++] = t;
    }
    if (rc == 0) qsort(sorted, (size_t)st->num_tensors, sizeof *sorted, safetensors_compare_);
    uint64_t at = data_start;
    for (int i = 0; i < st->num_tensors && rc == 0; i++) {
        if (sorted[i]->offset != at)
            rc = fail(err, "%s: tensor \"%.60s\" overlaps another or leaves a gap; the file is damaged", st->path,
                      sorted[i]->name);
        at += sorted[i]->bytes;
    }
    if (rc == 0 && at != file_bytes)
        rc = fail(err, "%s: %llu bytes after the last tensor; the file is damaged", st->path,
                  (unsigned long long)(file_bytes - at));
    free(sorted);
    return rc;
}

// Opens a file and checks its whole header. Returns 0; the caller closes st with safetensors_close. Returns -1 with the
// reason in err and nothing left open if the file cannot be read or is not a sound safetensors file.
LLMC_FN int safetensors_open(SafeTensors *st, const char *path, Error *err) {
    uint64_t file_bytes = 0, data_start = 0;
    memset(st, 0, sizeof *st);
    st->path = xasprintf("%s", path);
    st->fd = open_regular(path, &file_bytes, err);
    int rc = st->fd < 0 ? -1 : 0;
    if (rc == 0) rc = safetensors_read_header_(st, file_bytes, &data_start, err);
    if (rc == 0) rc = safetensors_parse_header_(st, file_bytes, data_start, err);
    if (rc != 0) safetensors_close(st);
    return rc;
}

// The tensor with this name, or NULL. st owns it.
LLMC_FN const SafeTensor *safetensors_find(const SafeTensors *st, const char *name) {
    for (int i = 0; i < st->num_tensors; i++)
        if (!strcmp(st->tensors[i].name, name)) return &st->tensors[i];
    return NULL;
}

// The text under this key of the metadata, or NULL. st owns it.
LLMC_FN const char *safetensors_metadata(const SafeTensors *st, const char *key) {
    const cJSON *metadata = cJSON_GetObjectItemCaseSensitive(st->header, "__metadata__");
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(metadata, key);
    return cJSON_IsString(item) ? item->valuestring : NULL;
}

// The value of one element from its little-endian bytes at p; NaN for DTYPE_OTHER.
LLMC_FN double dtype_decode(Dtype dtype, const void *p) {
    uint16_t half;
    uint32_t bits;
    float f;
    double d;
    int64_t i;
    switch (dtype) {
    case DTYPE_F32: memcpy(&f, p, 4); return f;
    case DTYPE_F64: memcpy(&d, p, 8); return d;
    case DTYPE_I64: memcpy(&i, p, 8); return (double)i;
    case DTYPE_BF16: memcpy(&half, p, 2); bits = (uint32_t)half << 16; memcpy(&f, &bits, 4); return f;
    case DTYPE_F16:
        memcpy(&half, p, 2);
        d = (half & 0x7c00) == 0x7c00 ? ((half & 0x3ff) ? NAN : INFINITY)
          : (half & 0x7c00) ? ldexp((half & 0x3ff) + 0x400, ((half >> 10) & 31) - 25) : ldexp(half & 0x3ff, -24);
        return half & 0x8000 ? -d : d;
    default: return NAN;
    }
}

// Reads elements [first, first + count) of t, in row-major order, into out (count). Returns 0, or -1 with the reason in
// err: a dtype that dtype_decode does not know, or a read error. The caller keeps the range within t->elements.
LLMC_FN int safetensors_read(const SafeTensors *st, const SafeTensor *t, uint64_t first, uint64_t count, double *out,
                             Error *err) {
    if (t->dtype == DTYPE_OTHER)
        return fail(err, "%s: tensor \"%.60s\" is not of a floating-point type", st->path, t->name);
    size_t width = (size_t)(t->bytes / (t->elements ? t->elements : 1));
    unsigned char chunk[8192];
    while (count > 0) {
        uint64_t n = count < sizeof chunk / width ? count : sizeof chunk / width;
        if (pread_exactly(st->fd, chunk, n * width, t->offset + first * width, st->path, err) != 0) return -1;
        for (uint64_t i = 0; i < n; i++) out[i] = dtype_decode(t->dtype, chunk + i * width);
        out += n, first += n, count -= n;
    }
    return 0;
}

// Reads rows [row, row + count) of a matrix with `cols` columns as floats into out, whose rows are ld elements apart.
// Errors as in safetensors_read.
LLMC_FN int safetensors_read_rows(const SafeTensors *st, const SafeTensor *t, int64_t row, int64_t count, int64_t cols,
                                  float *out, int64_t ld, Error *err) {
    double *line = (double *)xmalloc((size_t)cols * sizeof *line);
    int rc = 0;
    for (int64_t r = 0; r < count && rc == 0; r++, out += ld) {
        uint64_t first = (uint64_t)((row + r) * cols);
        if (t->dtype == DTYPE_F32)
            rc = pread_exactly(st->fd, out, (size_t)cols * 4, t->offset + first * 4, st->path, err);
        else {
            rc = safetensors_read(st, t, first, (uint64_t)cols, line, err);
            for (int64_t i = 0; i < cols && rc == 0; i++) out[i] = (float)line[i];
        }
    }
    free(line);
    return rc;
}

// ---------------------------------------------------------------------------------------------------------------------
// Writing: fp32 matrices and vectors, streamed row by row through one buffer.

typedef struct {
    char name[72];
    int64_t rows, cols;     // as written
    int num_dims;           // 2, or 1: a vector (cols), rows 1
    int64_t ld;             // elements from one row of data to the next, cols <= ld
    const float *data;      // (rows, ld), the caller's
} SafeTensorOut;

typedef struct {
    int fd;
    const char *path;
    XXH64_state_t *hash;    // of all bytes written
    unsigned char *buffer;  // (FILE_OUT_BUFFER)
    size_t used;
} FileOut_;

enum { FILE_OUT_BUFFER = 1 << 20 };

LLMC_FN int file_out_flush_(FileOut_ *f, Error *err) {
    XXH64_update(f->hash, f->buffer, f->used);
    int rc = write_exactly(f->fd, f->buffer, f->used, f->path, err);
    f->used = 0;
    return rc;
}

LLMC_FN int file_out_write_(FileOut_ *f, const void *data, size_t bytes, Error *err) {
    const unsigned char *p = (const unsigned char *)data;
    while (bytes > 0) {
        if (f->used == FILE_OUT_BUFFER && file_out_flush_(f, err) != 0) return -1;
        size_t n = bytes < FILE_OUT_BUFFER - f->used ? bytes : FILE_OUT_BUFFER - f->used;
        memcpy(f->buffer + f->used, p, n);
        f->used += n, p += n, bytes -= n;
    }
    return 0;
}

// The JSON header for n tensors, whose data follow each other in this order. The caller frees it.
LLMC_FN char *safetensors_header_(const SafeTensorOut *tensors, int n, const char *path) {
    cJSON *header = cJSON_CreateObject();
    cJSON_AddStringToObject(cJSON_AddObjectToObject(header, "__metadata__"), "format", "pt");
    double at = 0;
    for (int i = 0; i < n; i++) {
        const SafeTensorOut *t = &tensors[i];
        double shape[2] = {(double)t->rows, (double)t->cols}, end = at + 4.0 * shape[0] * shape[1];
        cJSON *item = cJSON_AddObjectToObject(header, t->name);
        cJSON_AddStringToObject(item, "dtype", "F32");
        cJSON_AddItemToObject(item, "shape", cJSON_CreateDoubleArray(shape + 2 - t->num_dims, t->num_dims));
        double offsets[2] = {at, end};
        cJSON_AddItemToObject(item, "data_offsets", cJSON_CreateDoubleArray(offsets, 2));
        at = end;
    }
    char *json = cJSON_PrintUnformatted(header);
    cJSON_Delete(header);
    if (!json) die(EXIT_SYSTEM, "out of memory: cannot write the header of %s", path);
    return json;
}

// Writes n tensors to path, replacing what is there, and flushes the file to disk. *xxh64: the hash of the whole file,
// seed 0. Returns 0, or -1 with the reason in err (disk full, for example) and a part of the file left behind.
LLMC_FN int safetensors_write(const char *path, const SafeTensorOut *tensors, int n, uint64_t *xxh64, Error *err) {
    char *json = safetensors_header_(tensors, n, path);
    FileOut_ f = {open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666), path, XXH64_createState(),
                  (unsigned char *)xmalloc(FILE_OUT_BUFFER), 0};
    int rc = f.fd < 0 ? fail(err, "%s: cannot create: %s", path, strerror(errno)) : 0;
    XXH64_reset(f.hash, 0);
    size_t length = strlen(json), padded = (length + 7) / 8 * 8;    // the data start at a multiple of 8
    unsigned char size_bytes[8];
    for (int i = 0; i < 8; i++) size_bytes[i] = (unsigned char)(padded >> (8 * i));
    if (rc == 0) rc = file_out_write_(&f, size_bytes, 8, err);
    if (rc == 0) rc = file_out_write_(&f, json, length, err);
    if (rc == 0) rc = file_out_write_(&f, "       ", padded - length, err);
    for (int i = 0; i < n && rc == 0; i++)
        for (int64_t r = 0; r < tensors[i].rows && rc == 0; r++)
            rc = file_out_write_(&f, tensors[i].data + r * tensors[i].ld, (size_t)tensors[i].cols * 4, err);
    if (rc == 0) rc = file_out_flush_(&f, err);
    if (rc == 0 && fsync(f.fd) != 0) rc = fail(err, "%s: cannot flush to disk: %s", path, strerror(errno));
    if (f.fd >= 0 && close(f.fd) != 0 && rc == 0) rc = fail(err, "%s: cannot close: %s", path, strerror(errno));
    *xxh64 = XXH64_digest(f.hash);
    XXH64_freeState(f.hash);
    free(f.buffer);
    free(json);
    return rc;
}

#endif
