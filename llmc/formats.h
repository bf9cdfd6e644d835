// The formats of files that hold text in packed or binary form, by how they start.
#ifndef LLMC_FORMATS_H
#define LLMC_FORMATS_H

#include <stdbool.h>
#include "utils.h"

#define FORMAT_HEAD_BYTES 512           // as far as any format's mark is from the start

typedef enum { PACKED_NOT, PACKED_GZIP, PACKED_ZSTD } Packing;

typedef struct {
    const char *suffix;                 // how the names of such files end
    size_t at, bytes;                   // where the mark is, and its length; 0: there is none
    const char *mark;                   // (bytes)
    const char *what, *advice;          // for errors
    Packing packing;                    // PACKED_NOT: the format is refused
} Format;

LLMC_FN const Format *formats(int *count) {
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
        {".bin", 0, 8, "\x88\xD8\x34\x01\x01\0\0\0", "a token shard", "see data/tokenize --decode", PACKED_NOT},
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
LLMC_FN const Format *format_of_content(const void *start, size_t n) {
    const unsigned char *s = (const unsigned char *)start;
    int count;
    const Format *list = formats(&count);
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

#endif
