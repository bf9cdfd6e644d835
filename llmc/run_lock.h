// One run per output folder. Rank 0 holds OUT/lock while the run lives: a flock, and one line of text that says who it
// is, with a counter that a thread of its own moves on every LOCK_BEAT_SECONDS:
//   run 5b0c66f1d2a94e37 beat 0000000042 process 1234 on node1 since 2026-01-31 12:00:00 boot 8e3e...
//
// The kernel drops a flock when its process dies, so on one machine (one boot id) the flock decides. Between machines
// it may not: some cluster file systems keep flocks local to each machine, or have none. So a newcomer that finds the
// line of another machine's run watches it for LOCK_STALE_SECONDS. A line that changes is a run that lives; one that
// does not is stale, and is replaced. The clocks of the machines are never compared. A clean end empties the file, but
// does not remove it: a newcomer could then lock a file that has just lost its name.
//
// A run that slept for long may wake up after its lock was replaced. So before it writes into its folder, it checks
// that the file still has its line (run_lock_check).
#ifndef LLMC_RUN_LOCK_H
#define LLMC_RUN_LOCK_H

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/random.h>
#include "utils.h"

enum { LOCK_BEAT_SECONDS = 5, LOCK_STALE_SECONDS = 30 };
enum { LOCK_END_SECONDS = 2 };      // a killed process holds its files until its memory is freed
enum { LOCK_TEXT = 512 };

typedef struct {
    char *path;                     // OUT/lock; NULL: there is no lock (--plan, and before it is taken)
    char id[17];                    // of this run, 16 hexadecimal digits; the same on all ranks
    char owner[256];                // "process PID on HOST since TIME boot ID"
    char previous[160];             // the run before, if it did not end cleanly: "a run on HOST, process PID, since T"
    double beat_seconds;
    int held;                       // on rank 0; what follows is not set on other ranks
    int fd;                         // of the file
    int pipe[2];                    // closing pipe[1] ends the thread
    pthread_t thread;
} RunLock;

// Reads the start of a file, from the file server where it is on one, because it is opened anew. Returns 0, or errno.
LLMC_FN int lock_read_(const char *path, char text[LOCK_TEXT]) {
    memset(text, 0, LOCK_TEXT);
    int fd = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    int e = fd < 0 || pread(fd, text, LOCK_TEXT - 1, 0) < 0 ? errno : 0;
    if (fd >= 0) close(fd);
    return e;
}

// Whether the folder is still this run's; any rank may ask. Another run's line says that it is not, or that there is no
// file. An unreadable file does not: some file servers (SMB) let nobody read a locked one. Returns 0, or -1 with the
// reason in err.
LLMC_FN int run_lock_check(const RunLock *lock, Error *err) {
    char text[LOCK_TEXT], mine[32];
    if (!lock->path) return 0;
    snprintf(mine, sizeof mine, "run %s ", lock->id);
    int e = lock_read_(lock->path, text);
    if (e == 0 ? !strncmp(text, mine, strlen(mine)) : e != ENOENT) return 0;
    return fail(err, "%s no longer names this run: another run has taken the folder, or the file was changed or "
                "removed; nothing more is written there", lock->path);
}

LLMC_FN void lock_empty_(RunLock *lock) {
    int ignored = ftruncate(lock->fd, 0);       // where that fails, the next run watches the line that is left
    (void)ignored;
}

// Writes the line, over another one.
LLMC_FN int lock_write_(RunLock *lock, unsigned beat, Error *err) {
    char text[LOCK_TEXT];
    int n = snprintf(text, sizeof text, "run %s beat %010u %s\n", lock->id, beat, lock->owner);
    lseek(lock->fd, 0, SEEK_SET);
    int rc = write_exactly(lock->fd, text, (size_t)n, lock->path, err);
    if (rc == 0 && (ftruncate(lock->fd, n) != 0 || (fsync(lock->fd) != 0 && errno != EINVAL)))
        rc = fail(err, "%s: cannot write: %s", lock->path, strerror(errno));
    return rc;
}

// The thread. It does not allocate, so that it needs no heap of its own, and receives no signals.
LLMC_FN void *lock_beat_(void *arg) {
    RunLock *lock = (RunLock *)arg;
    struct pollfd end = {lock->pipe[0], POLLIN, 0};
    Error ignored;
    for (unsigned beat = 1; poll(&end, 1, (int)(lock->beat_seconds * 1e3)) == 0; beat++)
        if (run_lock_check(lock, &ignored) == 0) lock_write_(lock, beat, &ignored);
    return NULL;
}

LLMC_FN int lock_start_thread_(RunLock *lock, Error *err) {
    sigset_t all, before;
    sigfillset(&all);
    if (pipe(lock->pipe) != 0) return fail(err, "cannot make a pipe: %s", strerror(errno));
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int e = pthread_create(&lock->thread, NULL, lock_beat_, lock);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (e == 0) return 0;
    close(lock->pipe[0]), close(lock->pipe[1]);
    return fail(err, "cannot start a thread: %s", strerror(e));
}

// ---------------------------------------------------------------------------------------------------------------------
// Taking the lock

LLMC_FN void lock_boot_id_(char out[64]) {
    FILE *f = fopen("/proc/sys/kernel/random/boot_id", "r");
    if (!f || fscanf(f, "%63s", out) != 1) snprintf(out, 64, "unknown");
    if (f) fclose(f);
}

typedef enum { FLOCK_OURS, FLOCK_HELD, FLOCK_UNKNOWN } FlockState_;
LLMC_FN FlockState_ lock_try_(int fd) {
    if (flock(fd, LOCK_EX | LOCK_NB) == 0) return FLOCK_OURS;
    return errno == EWOULDBLOCK || errno == EACCES ? FLOCK_HELD : FLOCK_UNKNOWN;
}

// Who a line names, for messages, and whether that run's machine is this one, since it started last.
typedef struct { char name[160]; int here; } LockOwner_;
LLMC_FN LockOwner_ lock_owner_(const char *text) {
    LockOwner_ owner = {"a run that the file does not name", 0};
    char host[65], since[20] = "", boot[64], this_boot[64];
    long pid;
    if (sscanf(text, "run %*s beat %*s process %ld on %64s since %19c boot %63s", &pid, host, since, boot) != 4)
        return owner;
    snprintf(owner.name, sizeof owner.name, "a run on %s, process %ld, since %s", host, pid, since);
    lock_boot_id_(this_boot);
    owner.here = !strcmp(boot, this_boot) && strcmp(boot, "unknown") != 0;
    return owner;
}

// Waits until the folder is free, or known not to be. Returns 0, or an exit code with the reason in err.
LLMC_FN int lock_wait_(RunLock *lock, const char *folder, double stale_seconds, Error *err) {
    char first[LOCK_TEXT] = "", text[LOCK_TEXT];
    int noted = 0;
    for (double start = now_seconds(); ; usleep(50000)) {
        FlockState_ state = lock_try_(lock->fd);
        lock_read_(lock->path, text);
        LockOwner_ owner = lock_owner_(text);
        double waited = now_seconds() - start;
        if (!*text && state != FLOCK_HELD) return 0;                // no run, or the last one ended cleanly
        snprintf(lock->previous, sizeof lock->previous, "%s", owner.name);
        if (owner.here && state == FLOCK_OURS) return 0;            // its process is dead

        int watch = *text && (!owner.here || state == FLOCK_UNKNOWN);       // the flock does not tell
        if (!*first || !*text) memcpy(first, text, sizeof first);       // empty: a run has just ended or begun
        if (strcmp(first, text) != 0 || (!watch && waited > LOCK_END_SECONDS)) {
            fail(err, "%s is in use by %s; wait for it to end, or name another folder", folder, owner.name);
            return EXIT_INPUT;
        }
        if (watch && waited > stale_seconds && state == FLOCK_HELD) {
            fail(err, "%s is locked for %s, which has shown no sign of life for %.0f s; if that machine is down, try "
                 "again later, when the file server has dropped the lock, or remove %s", folder, owner.name, waited,
                 lock->path);
            return EXIT_SYSTEM;
        }
        if (watch && waited > stale_seconds) return 0;
        if (watch && !noted++)
            fprintf(stderr, "note: %s may be in use by %s; watching for %.0f s whether it still lives\n", folder,
                    owner.name, stale_seconds);
    }
}

// Puts this run's line into the file.
LLMC_FN int lock_begin_(RunLock *lock, Error *err) {
    char host[65] = "", boot[64], since[32];
    uint64_t id;
    time_t now = time(NULL);
    struct tm local;
    if (getrandom(&id, sizeof id, 0) != (ssize_t)sizeof id) return fail(err, "no random numbers: %s", strerror(errno));
    gethostname(host, sizeof host - 1);
    lock_boot_id_(boot);
    strftime(since, sizeof since, "%Y-%m-%d %H:%M:%S", localtime_r(&now, &local));
    snprintf(lock->id, sizeof lock->id, "%016llx", (unsigned long long)id);
    snprintf(lock->owner, sizeof lock->owner, "process %ld on %s since %s boot %s", (long)getpid(), host, since, boot);
    int rc = lock_write_(lock, 0, err);
    if (rc != 0) lock_empty_(lock);     // no part of a line
    return rc == 0 ? run_lock_check(lock, err) : rc;
}

// The lock that a program which ends with exit() still holds: an error is an end, too, and frees the folder.
LLMC_FN RunLock **lock_of_exit_(void) {
    static RunLock *lock;
    return &lock;
}

// On rank 0 this frees the folder: no rank may write there any more.
LLMC_FN void run_lock_close(RunLock *lock) {
    Error ignored;
    if (lock->held) {
        if (*lock_of_exit_() == lock) *lock_of_exit_() = NULL;
        close(lock->pipe[1]);
        pthread_join(lock->thread, NULL);
        close(lock->pipe[0]);
        if (run_lock_check(lock, &ignored) == 0) lock_empty_(lock);
        close(lock->fd);
    }
    free(lock->path);
    memset(lock, 0, sizeof *lock);
}

LLMC_FN void lock_close_at_exit_(void) {
    if (*lock_of_exit_()) run_lock_close(*lock_of_exit_());
}

// Takes the lock of an existing folder. Returns 0, or an exit code with the reason in err: EXIT_INPUT if another run
// has the folder. Free with run_lock_close.
LLMC_FN int run_lock_open(RunLock *lock, const char *folder, double beat_seconds, double stale_seconds, Error *err) {
    struct stat st;
    int code = 0;
    memset(lock, 0, sizeof *lock);
    lock->path = xasprintf("%s/lock", folder);
    lock->beat_seconds = beat_seconds;
    lock->fd = open(lock->path, O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0666);
    if (lock->fd < 0) {
        code = disk_exit_code(errno);
        fail(err, "%s: cannot open for writing: %s", lock->path, strerror(errno));
    } else if (fstat(lock->fd, &st) != 0 || !S_ISREG(st.st_mode)) {
        code = EXIT_INPUT;
        fail(err, "%s: not a regular file; remove it, or name another folder", lock->path);
    }
    if (!code) code = lock_wait_(lock, folder, stale_seconds, err);
    if (!code && lock_begin_(lock, err) != 0) code = EXIT_SYSTEM;
    if (!code && lock_start_thread_(lock, err) != 0) code = EXIT_SYSTEM, lock_empty_(lock);
    lock->held = !code;
    if (!code) {
        static int registered;
        if (!registered++) atexit(lock_close_at_exit_);
        *lock_of_exit_() = lock;
        return 0;
    }
    if (lock->fd >= 0) close(lock->fd);
    free(lock->path);
    memset(lock, 0, sizeof *lock);
    return code;
}

// The other ranks know the lock by the id of rank 0's. They can check it.
LLMC_FN void run_lock_follow(RunLock *lock, const char *folder, const char *id) {
    memset(lock, 0, sizeof *lock);
    lock->path = xasprintf("%s/lock", folder);
    snprintf(lock->id, sizeof lock->id, "%s", id);
}

#endif
