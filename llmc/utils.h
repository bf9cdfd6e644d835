// Errors, memory and files: the few services that every program of this house shares. Plain C that also compiles as C++.
//
// Two kinds of failure. Readers of files and of user input return -1 and leave one line in an Error, so that a caller
// can add where it was and tests can look at it. main() turns it into that one line on stderr and an exit code:
//   2  bad input: a flag, a file or a shard that cannot be what was meant; nothing was changed
//   1  the machine failed us: out of memory, disk full, a read error
#ifndef LLMC_UTILS_H
#define LLMC_UTILS_H

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define EXIT_SYSTEM 1
#define EXIT_INPUT 2

// A function that a header offers and a program may leave unused.
#define LLMC_FN static inline __attribute__((unused))

typedef struct {
    char text[1024];    // one line, no newline: what was wrong, where, what to do
} Error;

// Writes the line into err and returns -1, so that a reader can say: return fail(err, "...", ...);
LLMC_FN __attribute__((format(printf, 2, 3))) int fail(Error *err, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    return -1;
}

// The name that starts each line of die(): argv[0] without its folder. Set once by main.
LLMC_FN const char **program_name_(void) {
    static const char *name = "t6";
    return &name;
}

LLMC_FN void set_program_name(const char *argv0) {
    const char *slash = strrchr(argv0, '/');
    *program_name_() = slash ? slash + 1 : argv0;
}

// One line on stderr, then exit(code), code being EXIT_INPUT or EXIT_SYSTEM.
LLMC_FN __attribute__((noreturn, format(printf, 2, 3))) void die(int code, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fflush(stdout);
    fprintf(stderr, "%s: ", *program_name_());
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(code);
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory. These do not return NULL: a program that cannot have its memory stops with one line.

LLMC_FN void *xmalloc(size_t bytes) {
    void *p = malloc(bytes ? bytes : 1);
    if (!p) die(EXIT_SYSTEM, "out of memory: cannot allocate %zu bytes", bytes);
    return p;
}

LLMC_FN void *xcalloc(size_t count, size_t bytes) {
    void *p = calloc(count ? count : 1, bytes ? bytes : 1);
    if (!p) die(EXIT_SYSTEM, "out of memory: cannot allocate %zu x %zu bytes", count, bytes);
    return p;
}

LLMC_FN void *xrealloc(void *old, size_t bytes) {
    void *p = realloc(old, bytes ? bytes : 1);
    if (!p) die(EXIT_SYSTEM, "out of memory: cannot allocate %zu bytes", bytes);
    return p;
}

// A fresh string made by printf's rules. The caller frees it.
LLMC_FN __attribute__((format(printf, 1, 2))) char *xasprintf(const char *format, ...) {
    va_list args;
    va_start(args, format);
    int n = vsnprintf(NULL, 0, format, args);
    va_end(args);
    char *s = (char *)xmalloc((size_t)n + 1);
    va_start(args, format);
    vsnprintf(s, (size_t)n + 1, format, args);
    va_end(args);
    return s;
}

// ---------------------------------------------------------------------------------------------------------------------
// Time

LLMC_FN double now_seconds(void) {      // monotonic, for differences only
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Writes "1h02m" / "3m05s" / "42s" for a number of seconds; "?" when it is not known (negative or not finite).
LLMC_FN const char *format_duration(char out[32], double seconds) {
    if (!(seconds >= 0) || seconds > 1e9) snprintf(out, 32, "?");
    else if (seconds >= 3600) snprintf(out, 32, "%dh%02dm", (int)(seconds / 3600), (int)(seconds / 60) % 60);
    else if (seconds >= 60) snprintf(out, 32, "%dm%02ds", (int)(seconds / 60), (int)seconds % 60);
    else snprintf(out, 32, "%ds", (int)seconds);
    return out;
}

// ---------------------------------------------------------------------------------------------------------------------
// Files. Positions and sizes are 64-bit; a short read is an error; a write that does not reach the disk is an error.

// Reads exactly `bytes` bytes at `offset` of fd. path is for the error line only.
LLMC_FN int pread_exactly(int fd, void *out, size_t bytes, uint64_t offset, const char *path, Error *err) {
    char *p = (char *)out;
    while (bytes > 0) {
        ssize_t n = pread(fd, p, bytes, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return fail(err, "%s: read error at byte %llu: %s", path, (unsigned long long)offset, strerror(errno));
        if (n == 0) return fail(err, "%s: ends at byte %llu, %zu bytes short; the file was cut", path, (unsigned long long)offset, bytes);
        p += n, offset += (uint64_t)n, bytes -= (size_t)n;
    }
    return 0;
}

// Writes all of it at the file's position.
LLMC_FN int write_exactly(int fd, const void *data, size_t bytes, const char *path, Error *err) {
    const char *p = (const char *)data;
    while (bytes > 0) {
        ssize_t n = write(fd, p, bytes < ((size_t)1 << 30) ? bytes : (size_t)1 << 30);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return fail(err, "%s: cannot write: %s%s", path, strerror(errno), errno == ENOSPC || errno == EDQUOT ? "; free some space and start again" : "");
        p += n, bytes -= (size_t)n;
    }
    return 0;
}

// Makes the folder and its missing parents. An existing folder is fine.
LLMC_FN int make_dirs(const char *path, Error *err) {
    char *p = xasprintf("%s", path);
    for (char *c = p + 1; ; c++) {
        if (*c != '/' && *c != 0) continue;
        char end = *c;
        *c = 0;
        struct stat st;
        if (mkdir(p, 0777) != 0 && (errno != EEXIST || stat(p, &st) != 0 || !S_ISDIR(st.st_mode))) {
            int e = errno == EEXIST ? ENOTDIR : errno;
            int rc = fail(err, "%s: cannot make this folder: %s", p, strerror(e));
            free(p);
            return rc;
        }
        *c = end;
        if (!end) break;
    }
    free(p);
    return 0;
}

// Flushes a file, or a folder's list of names, to the disk.
LLMC_FN int sync_path(const char *path, Error *err) {
    int fd = open(path, O_RDONLY);
    if (fd < 0) return fail(err, "%s: cannot open: %s", path, strerror(errno));
    int rc = fsync(fd), e = errno;
    close(fd);
    if (rc != 0 && e != EINVAL && e != EROFS) return fail(err, "%s: cannot flush to disk: %s", path, strerror(e));
    return 0;
}

// The whole of a small file as a fresh string, NUL at its end (size in *bytes where asked for). At most max_bytes.
LLMC_FN char *read_small_file(const char *path, size_t max_bytes, size_t *bytes, Error *err) {
    int fd = open(path, O_RDONLY);
    struct stat st;
    if (fd < 0) { fail(err, "%s: cannot open: %s", path, strerror(errno)); return NULL; }
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) { fail(err, "%s: not a regular file", path); close(fd); return NULL; }
    if ((uint64_t)st.st_size > max_bytes) { fail(err, "%s: %lld bytes, more than the %zu expected here", path, (long long)st.st_size, max_bytes); close(fd); return NULL; }
    char *s = (char *)xmalloc((size_t)st.st_size + 1);
    if (pread_exactly(fd, s, (size_t)st.st_size, 0, path, err) != 0) { free(s); close(fd); return NULL; }
    close(fd);
    s[st.st_size] = 0;
    if (bytes) *bytes = (size_t)st.st_size;
    return s;
}

// Writes a small file aside as PATH.tmp, flushes it, renames it: a reader sees the old file or the new one, never a part.
LLMC_FN int write_small_file(const char *path, const void *data, size_t bytes, Error *err) {
    char *aside = xasprintf("%s.tmp", path);
    int fd = open(aside, O_WRONLY | O_CREAT | O_TRUNC, 0666), rc = -1;
    if (fd < 0) fail(err, "%s: cannot create: %s", aside, strerror(errno));
    else {
        rc = write_exactly(fd, data, bytes, aside, err);
        if (rc == 0 && fsync(fd) != 0) rc = fail(err, "%s: cannot flush to disk: %s", aside, strerror(errno));
        if (close(fd) != 0 && rc == 0) rc = fail(err, "%s: cannot close: %s", aside, strerror(errno));
        if (rc == 0 && rename(aside, path) != 0) rc = fail(err, "%s: cannot rename to %s: %s", aside, path, strerror(errno));
        if (rc != 0) unlink(aside);
    }
    free(aside);
    return rc;
}

#endif
