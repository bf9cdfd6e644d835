// Errors, memory, time and files: what every program here shares. Plain C that also compiles as C++.
//
// A function that can fail because of a file or of user input takes an Error *err. It returns 0 on success. On failure
// it returns -1 (or NULL) and leaves one line in err, to which the caller may add context. main() prints that line with
// die(), which exits with
//   2  (EXIT_INPUT)   bad input: a flag or a file that does not make sense; nothing was changed
//   1  (EXIT_SYSTEM)  the machine failed: out of memory, disk full, read error
#ifndef LLMC_UTILS_H
#define LLMC_UTILS_H

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define EXIT_SYSTEM 1
#define EXIT_INPUT 2

#ifndef T6_COMMIT
#define T6_COMMIT "unknown"     // from the Makefile: the commit that the program was built from
#endif

// Marks a function of a header that a program may leave unused. A name that ends in _ is private to its header.
#define LLMC_FN static inline __attribute__((unused))

typedef struct {
    char text[1024];    // one line, no newline: what was wrong, where, what to do
} Error;

// Formats a line into err and returns -1: return fail(err, "%s: cannot open", path);
LLMC_FN __attribute__((format(printf, 2, 3))) int fail(Error *err, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    return -1;
}

LLMC_FN const char **program_name_(void) {
    static const char *name = "t6";
    return &name;
}

// Sets the name that starts each line of die(): argv[0] without its folder. The string must outlive the program.
LLMC_FN void set_program_name(const char *argv0) {
    const char *slash = strrchr(argv0, '/');
    *program_name_() = slash ? slash + 1 : argv0;
}

LLMC_FN const char *program_name(void) { return *program_name_(); }

// Flushes stdout, prints "NAME: line" to stderr and exits with code, EXIT_INPUT or EXIT_SYSTEM. Of several threads, the
// first does so, and the others wait for the end.
LLMC_FN __attribute__((noreturn, format(printf, 2, 3))) void die(int code, const char *format, ...) {
    static int dying;
    va_list args;
    while (__atomic_exchange_n(&dying, 1, __ATOMIC_SEQ_CST)) pause();
    va_start(args, format);
    fflush(stdout);
    fprintf(stderr, "%s: ", program_name());
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(code);
}

// Ends the program if what it printed to stdout did not arrive, on a full disk for example. For a program, or a --help,
// whose result is what it prints.
LLMC_FN void check_stdout(void) {
    if (fflush(stdout) != 0 || ferror(stdout)) die(EXIT_SYSTEM, "standard output: cannot write: %s", strerror(errno));
}

// The first call of each program. Opens what is closed of the descriptors 0 to 2: the next file opened would take its
// number, and get the lines meant for the screen. A file that exceeds ulimit -f becomes an error of write.
LLMC_FN void program_start(const char *argv0) {
    set_program_name(argv0);
    for (int fd = 0; fd <= 2; fd++)         // open takes the lowest number that is free
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", fd == 0 ? O_RDONLY : O_WRONLY) != fd)
            die(EXIT_SYSTEM, "/dev/null: cannot open, and descriptor %d is closed: %s", fd, strerror(errno));
    signal(SIGXFSZ, SIG_IGN);
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory. These never return NULL: out of memory is fatal. 0 bytes are allowed. The caller frees the result.

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

// Formats into a new string of the right length.
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

// Seconds since an arbitrary start, monotonic: only differences mean something.
LLMC_FN double now_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Formats a duration as "1h02m", "3m05s" or "42s", or as "?" if it is negative, not finite or above 1e9. Returns out.
LLMC_FN const char *format_duration(char out[32], double seconds) {
    if (!(seconds >= 0) || seconds > 1e9) snprintf(out, 32, "?");
    else if (seconds >= 3600) snprintf(out, 32, "%dh%02dm", (int)(seconds / 3600), (int)(seconds / 60) % 60);
    else if (seconds >= 60) snprintf(out, 32, "%dm%02ds", (int)(seconds / 60), (int)seconds % 60);
    else snprintf(out, 32, "%ds", (int)seconds);
    return out;
}

// ---------------------------------------------------------------------------------------------------------------------
// Files. Positions and sizes are 64-bit. path is used only in error lines where there is also an fd.

// Reads exactly `bytes` bytes at `offset`, leaving the file position alone. End of file before that is an error.
LLMC_FN int pread_exactly(int fd, void *out, size_t bytes, uint64_t offset, const char *path, Error *err) {
    char *p = (char *)out;
    while (bytes > 0) {
        ssize_t n = pread(fd, p, bytes, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        unsigned long long at = offset;
        if (n < 0) return fail(err, "%s: read error at byte %llu: %s", path, at, strerror(errno));
        if (n == 0) return fail(err, "%s: ends at byte %llu, %zu bytes too early; it was cut short", path, at, bytes);
        p += n, offset += (uint64_t)n, bytes -= (size_t)n;
    }
    return 0;
}

// Writes all bytes at the file position. A full disk or an exceeded quota gets a hint in the error line.
LLMC_FN int write_exactly(int fd, const void *data, size_t bytes, const char *path, Error *err) {
    const char *p = (const char *)data;
    while (bytes > 0) {
        ssize_t n = write(fd, p, bytes < ((size_t)1 << 30) ? bytes : (size_t)1 << 30);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) {
            const char *hint = errno == ENOSPC || errno == EDQUOT ? "; free some space and start again" : "";
            return fail(err, "%s: cannot write: %s%s", path, strerror(errno), hint);
        }
        p += n, bytes -= (size_t)n;
    }
    return 0;
}

// Whether s ends with `end`, in any case of letters.
LLMC_FN int ends_with(const char *s, const char *end) {
    size_t n = strlen(s), m = strlen(end);
    return n >= m && strcasecmp(s + n - m, end) == 0;
}

// The exit code where something could not be written, by its errno: a full disk is a failure of the machine, a folder
// that nobody may write to is bad input.
LLMC_FN int disk_exit_code(int error) {
    int of_machine = error == ENOSPC || error == EDQUOT || error == EIO || error == EMFILE || error == ENFILE;
    return of_machine ? EXIT_SYSTEM : EXIT_INPUT;
}

// Creates a folder and its missing parents. It is not an error if the folder exists.
LLMC_FN int make_dirs(const char *path, Error *err) {
    char *p = xasprintf("%s", path);
    for (char *c = p + 1; ; c++) {
        if (*c != '/' && *c != 0) continue;
        char end = *c;
        *c = 0;
        struct stat st;
        if (mkdir(p, 0777) != 0 && (errno != EEXIST || stat(p, &st) != 0 || !S_ISDIR(st.st_mode))) {
            int e = errno == EEXIST ? ENOTDIR : errno;
            int rc = fail(err, "%s: cannot create this folder: %s", p, strerror(e));
            free(p);
            return rc;
        }
        *c = end;
        if (!end) break;
    }
    free(p);
    return 0;
}

// Flushes a file to disk, or a folder's list of names. File systems without fsync are accepted.
LLMC_FN int sync_path(const char *path, Error *err) {
    int fd = open(path, O_RDONLY);
    if (fd < 0) return fail(err, "%s: cannot open: %s", path, strerror(errno));
    int rc = fsync(fd), e = errno;
    close(fd);
    if (rc != 0 && e != EINVAL && e != EROFS) return fail(err, "%s: cannot flush to disk: %s", path, strerror(e));
    return 0;
}

// Opens a regular file for reading. Anything else is refused at once: opening a pipe would wait for its other end.
// The file's size goes to *bytes unless bytes is NULL. Returns a file descriptor, or -1.
LLMC_FN int open_regular(const char *path, uint64_t *bytes, Error *err) {
    struct stat st;
    int fd = open(path, O_RDONLY | O_NONBLOCK);
    if (fd < 0) return fail(err, "%s: cannot open: %s", path, strerror(errno));
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
        close(fd);
        return fail(err, "%s: not a regular file", path);
    }
    if (bytes) *bytes = (uint64_t)st.st_size;
    return fd;
}

// Reads a whole regular file of at most max_bytes. Returns a new string with a NUL after the last byte, which the
// caller frees; NULL with the reason in err on failure. The file's size goes to *bytes unless bytes is NULL.
LLMC_FN char *read_small_file(const char *path, size_t max_bytes, size_t *bytes, Error *err) {
    uint64_t size = 0;
    int fd = open_regular(path, &size, err);
    if (fd < 0) return NULL;
    char *text = NULL;
    int rc = 0;
    if (size > max_bytes)
        rc = fail(err, "%s: has %llu bytes; at most %zu are expected here", path, (unsigned long long)size, max_bytes);
    if (rc == 0) {
        text = (char *)xmalloc((size_t)size + 1);
        rc = pread_exactly(fd, text, (size_t)size, 0, path, err);
    }
    close(fd);
    if (rc != 0) {
        free(text);
        return NULL;
    }
    text[size] = 0;
    if (bytes) *bytes = (size_t)size;
    return text;
}

// Replaces a file atomically: writes PATH.tmp, flushes it to disk and renames it, so that a reader sees the old file or
// the new one, never a part. On failure PATH is as before, PATH.tmp is removed, and errno tells the cause.
LLMC_FN int write_small_file(const char *path, const void *data, size_t bytes, Error *err) {
    char *temporary = xasprintf("%s.tmp", path);
    int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC, 0666), rc = -1;
    if (fd < 0) fail(err, "%s: cannot create: %s", temporary, strerror(errno));
    else {
        rc = write_exactly(fd, data, bytes, temporary, err);
        if (rc == 0 && fsync(fd) != 0) rc = fail(err, "%s: cannot flush to disk: %s", temporary, strerror(errno));
        if (close(fd) != 0 && rc == 0) rc = fail(err, "%s: cannot close: %s", temporary, strerror(errno));
        if (rc == 0 && rename(temporary, path) != 0)
            rc = fail(err, "%s: cannot rename to %s: %s", temporary, path, strerror(errno));
        if (rc != 0) unlink(temporary);
    }
    free(temporary);
    return rc;
}

#endif
