// Ranks: the processes of one run, one per GPU, started by mpirun or srun, and the few collectives they need on host
// memory, over MPI.
//
// A single process makes no MPI call and needs no MPI installed (`make MPI=0`, or a machine without it). A NULL Comm
// counts as a single process too.
//
// Every wait has a deadline (--comm-timeout). A rank that waits longer prints one line that names the collective and
// ends the job, so a dead rank or a lost network never blocks the others for longer than that.
#ifndef LLMC_COMM_H
#define LLMC_COMM_H

#include <sched.h>
#include <signal.h>
#ifdef USE_MPI
#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>
#endif
#include "utils.h"

enum { COMM_START_SECONDS = 120 };      // the deadline until the command line has been read

typedef struct Comm Comm;
typedef struct CommCall CommCall;
struct Comm {
    int rank, world;                    // this process among all
    int local_rank, local_world;        // and among those of its host
    char host[64];
    double timeout_seconds;             // 0: wait forever
    int64_t step;                       // the current training step, for error lines
    double seconds;                     // spent in collectives so far
    void (*run)(Comm *c, const CommCall *call);     // the transport: MPI, or NCCL (llmc/comm.cuh); NULL: none yet
};

LLMC_FN int comm_rank(const Comm *c) { return c ? c->rank : 0; }
LLMC_FN int comm_world(const Comm *c) { return c ? c->world : 1; }

// ---------------------------------------------------------------------------------------------------------------------
// Signals. SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal is gone) and SIGUSR1, which Slurm sends before a time limit,
// ask for a checkpoint and a clean end. The handler only records the signal; the training loop looks at it after each
// step.

LLMC_FN volatile sig_atomic_t *stop_requested_(void) {
    static volatile sig_atomic_t signal_number;
    return &signal_number;
}

// A second Ctrl-C ends the program at once. Two within half a second are one: timeout(1) and some wrappers pass on what
// the terminal has already sent to all.
LLMC_FN void stop_handler_(int number) {
    static double first;        // when the first SIGINT came
    static const char text[] = "t6: stopping after this step; Ctrl-C again ends the run at once\n";
    *stop_requested_() = number;
    if (number != SIGINT) return;
    if (first == 0) {
        int saved_errno = errno;
        ssize_t ignored = write(STDERR_FILENO, text, sizeof text - 1);      // a signal handler may not printf
        (void)ignored;
        errno = saved_errno;
        first = now_seconds();
    } else if (now_seconds() - first > 0.5) {
        signal(SIGINT, SIG_DFL);
        raise(SIGINT);
    }
}

// The number of the last signal received, or 0.
LLMC_FN int stop_requested(void) { return *stop_requested_(); }

// Installs the handler. SIGINT and SIGHUP stay ignored where they are: nohup and a script's background jobs want that.
LLMC_FN void stop_on_signals(void) {
    static const int signals[] = {SIGTERM, SIGUSR1, SIGINT, SIGHUP};
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++) {
        struct sigaction action;
        sigaction(signals[i], NULL, &action);
        if (action.sa_handler == SIG_IGN && (signals[i] == SIGINT || signals[i] == SIGHUP)) continue;
        memset(&action, 0, sizeof action);
        action.sa_handler = stop_handler_;
        action.sa_flags = SA_RESTART;
        sigaction(signals[i], &action, NULL);
    }
}

// Writing to a screen that is gone (train_t6 | head) returns an error instead of ending the program: the log in the
// folder goes on.
LLMC_FN void survive_a_lost_screen(void) { signal(SIGPIPE, SIG_IGN); }

// ---------------------------------------------------------------------------------------------------------------------
// Transports. A transport is one function that carries out any CommCall and returns when it is done.

typedef enum { COMM_SUM, COMM_EXCHANGE, COMM_ALL_GATHER, COMM_GATHER, COMM_BROADCAST } CommOp;
enum { NO_ROOT = 0, NO_GIVERS = 0 };        // for operations that have none
struct CommCall {
    CommOp op;
    const char *what;           // for error lines
    void *recv;
    const void *send;           // NULL: in place
    size_t n;                   // per rank: doubles (SUM), floats (EXCHANGE, ALL_GATHER), bytes (GATHER, BROADCAST)
    int root;                   // GATHER: the rank that receives; BROADCAST: the rank that sends
    int givers;                 // EXCHANGE: ranks below this one send, the others only receive
};

// Prints which collective this rank gave up in and why, and ends it with EXIT_SYSTEM. It does not call exit(), which
// might wait for the missing rank too. mpirun ends all ranks as soon as one has ended, so this one first waits half a
// second for the others to print their lines.
LLMC_FN __attribute__((noreturn)) void comm_give_up(const Comm *c, const char *what, const char *why) {
    fflush(stdout);
    fprintf(stderr, "%s: gave up in \"%s\" at step %lld: %s\n", program_name(), what, (long long)c->step, why);
    fflush(stderr);
    usleep(500000);
    _exit(EXIT_SYSTEM);
}

// To be called in a loop while a collective is pending. start: now_seconds() when it began; *turns: 0 at first. Checks
// the deadline and yields the processor.
LLMC_FN void comm_still_waiting(const Comm *c, const char *what, double start, int *turns) {
    double waited = now_seconds() - start;
    if (c->timeout_seconds > 0 && waited > c->timeout_seconds) {
        char why[128];
        snprintf(why, sizeof why, "no answer for %.0f s (--comm-timeout): another rank is dead, stuck or unreachable",
                 waited);
        comm_give_up(c, what, why);
    }
    // When a rank has died, mpirun sends the others SIGTERM and a second later SIGKILL: time to say where this one is
    if (*turns >= 0 && stop_requested() == SIGTERM && waited > 0.3) {
        fprintf(stderr, "%s: told to stop while waiting for another rank in \"%s\" at step %lld\n", program_name(),
                what, (long long)c->step);
        *turns = -1;
    }
    if (*turns >= 0 && ++*turns < 1000) sched_yield();
    else usleep(20);
}

LLMC_FN void comm_start_timeout_(int number) {
    (void)number;
    static const char text[] = "t6: gave up at start-up: the ranks did not find each other\n";
    ssize_t ignored = write(STDERR_FILENO, text, sizeof text - 1);      // a signal handler may not printf
    (void)ignored;
    _exit(EXIT_SYSTEM);
}

// A deadline for library calls that never return when a rank is missing: comm_start_deadline(seconds) before the call,
// comm_start_deadline(0) after it.
LLMC_FN void comm_start_deadline(unsigned seconds) {
    signal(SIGALRM, comm_start_timeout_);
    alarm(seconds);
}

#ifdef USE_MPI
LLMC_FN void comm_mpi_check_(const Comm *c, int rc, const char *what) {
    if (rc == MPI_SUCCESS) return;
    char text[MPI_MAX_ERROR_STRING] = "";
    int length;
    MPI_Error_string(rc, text, &length);
    comm_give_up(c, what, text);
}

// Starts an exchange: block r of `send` goes to rank r, block r of `recv` comes from rank r, and ranks from
// call->givers on send nothing. The caller frees *plan when the request is done.
LLMC_FN int comm_mpi_exchange_(const Comm *c, const CommCall *call, const void *send, int **plan,
                               MPI_Request *request) {
    MPI_Comm all = MPI_COMM_WORLD;
    int n = (int)call->n, world = c->world;
    if ((double)n * world > INT_MAX)
        die(EXIT_SYSTEM, "internal error: %d numbers for each of %d ranks in \"%s\"", n, world, call->what);
    *plan = (int *)xcalloc(3 * (size_t)world, sizeof **plan);
    int *sent = *plan, *received = *plan + world, *start = *plan + 2 * world;     // (world) counts, counts, offsets
    for (int r = 0; r < world; r++) {
        sent[r] = c->rank < call->givers ? n : 0, received[r] = r < call->givers ? n : 0;
        start[r] = r * n;
    }
    return MPI_Ialltoallv(send, sent, start, MPI_FLOAT, call->recv, received, start, MPI_FLOAT, all, request);
}

LLMC_FN void comm_mpi_run_(Comm *c, const CommCall *call) {
    MPI_Comm all = MPI_COMM_WORLD;
    MPI_Request request;
    int n = (int)call->n, rc = 0, turns = 0, done = 0, *plan = NULL;
    const void *send = call->send ? call->send : MPI_IN_PLACE;
    void *recv = call->recv;
    double start = now_seconds();
    if (call->n > INT_MAX) die(EXIT_SYSTEM, "internal error: %zu numbers in one call of \"%s\"", call->n, call->what);
    switch (call->op) {
    case COMM_SUM: rc = MPI_Iallreduce(send, recv, n, MPI_DOUBLE, MPI_SUM, all, &request); break;
    case COMM_EXCHANGE: rc = comm_mpi_exchange_(c, call, send, &plan, &request); break;
    case COMM_ALL_GATHER: rc = MPI_Iallgather(send, n, MPI_FLOAT, recv, n, MPI_FLOAT, all, &request); break;
    case COMM_GATHER: rc = MPI_Igather(call->send, n, MPI_BYTE, recv, n, MPI_BYTE, call->root, all, &request); break;
    case COMM_BROADCAST: rc = MPI_Ibcast(recv, n, MPI_BYTE, call->root, all, &request); break;
    }
    comm_mpi_check_(c, rc, call->what);
    for (;;) {
        comm_mpi_check_(c, MPI_Test(&request, &done, MPI_STATUS_IGNORE), call->what);
        if (done) break;
        comm_still_waiting(c, call->what, start, &turns);
    }
    free(plan);
    c->seconds += now_seconds() - start;
}

LLMC_FN void comm_finish_(void) {
    int started = 0;
    MPI_Initialized(&started);
    if (started) MPI_Finalize();
}

// Name and version of the MPI library, up to the first comma ("Open MPI v4.1.4"). Returns out.
LLMC_FN const char *comm_library(char out[64]) {
    char text[MPI_MAX_LIBRARY_VERSION_STRING];
    int length;
    MPI_Get_library_version(text, &length);
    text[strcspn(text, ",\n")] = 0;
    for (char *tab; (tab = strchr(text, '\t')) != NULL; ) *tab = ' ';       // MPICH's
    snprintf(out, 64, "%.63s", text);
    return out;
}

LLMC_FN void comm_start_(Comm *c) {
    MPI_Comm local;
    comm_start_deadline(COMM_START_SECONDS);
    if (MPI_Init(NULL, NULL) != MPI_SUCCESS) die(EXIT_SYSTEM, "MPI_Init failed");
    comm_start_deadline(0);
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    MPI_Comm_rank(MPI_COMM_WORLD, &c->rank);
    MPI_Comm_size(MPI_COMM_WORLD, &c->world);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, c->rank, MPI_INFO_NULL, &local);
    MPI_Comm_rank(local, &c->local_rank);
    MPI_Comm_size(local, &c->local_world);
    MPI_Comm_free(&local);
    c->run = comm_mpi_run_;
}

// What to do where MPI does not bring the processes of a launcher together.
LLMC_FN const char *comm_advice_(void) {
    return "start them with the mpirun of that MPI, or with srun --mpi=pmix if srun --mpi=list shows pmix";
}
#else
LLMC_FN void comm_finish_(void) {}
LLMC_FN const char *comm_library(char out[64]) { snprintf(out, 64, "no MPI"); return out; }
LLMC_FN void comm_start_(Comm *c) { (void)c; }
LLMC_FN const char *comm_advice_(void) { return "install Open MPI (scripts/setup.sh mpi) and build again"; }
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Start and end

// What starts several processes, and the variable that tells each of them their number, n; 1: nothing started several.
typedef enum { BY_OPEN_MPI, BY_MPICH, BY_SRUN, BY_TORCHRUN, LAUNCHERS } Launcher_;
typedef struct { int n; Launcher_ by; const char *name, *variable; } Launch_;

// The whole number in an environment variable; `missing` if it is not set or empty. Ends the program if it is not a
// number, or below least.
LLMC_FN int environment_int_(const char *name, int least, int missing) {
    enum { MOST = 1000000 };
    const char *text = getenv(name);
    char *end;
    if (!text || !*text) return missing;
    long n = strtol(text, &end, 10);
    if (*end || n < least || n > MOST)
        die(EXIT_INPUT, "%s in the environment is \"%.40s\": what starts several ranks puts a number from %d to %d "
            "there; for a single process unset %s", name, text, least, MOST, name);
    return (int)n;
}

LLMC_FN Launch_ comm_launched_(void) {
    static const Launch_ launchers[LAUNCHERS] = {
        {1, BY_OPEN_MPI, "Open MPI's mpirun", "OMPI_COMM_WORLD_SIZE"},
        {1, BY_MPICH, "mpiexec (MPICH, Intel MPI) or srun --mpi=pmi2", "PMI_SIZE"},
        {1, BY_SRUN, "srun", "SLURM_STEP_NUM_TASKS"},
        {1, BY_TORCHRUN, "torchrun", "WORLD_SIZE"}};
    Launch_ launch = launchers[0];
    int mpirun = 0;                                         // 1: an mpirun that started one process
    for (int i = 0; i < LAUNCHERS && launch.n == 1; i++) {
        if (i == BY_SRUN && mpirun) break;                  // srun's number is that of mpirun's daemons
        if (i == BY_TORCHRUN && !getenv("RANK")) break;     // WORLD_SIZE alone may mean anything
        int n = environment_int_(launchers[i].variable, 1, 0);
        if (n > 1) launch = launchers[i], launch.n = n;
        mpirun |= n == 1;
    }
    return launch;
}

// Whether MPI can bring the processes together, as far as the environment tells. Under an srun that has no PMIx for it,
// Open MPI ends the program with a page; others say that there is one process.
LLMC_FN int comm_can_start_(const Launch_ *launch) {
    char library[64];
    int open_mpi = !strncmp(comm_library(library), "Open MPI", 8);
    return launch->by != BY_TORCHRUN && !(launch->by == BY_SRUN && open_mpi && !getenv("PMIX_RANK"));
}

// With --comm-file, ranks are numbered by environment variables alone and meet through that file and NCCL: for systems
// where MPI cannot start, such as Slurm without PMIx. Returns whether that is so. argv is searched here because the
// ranks must know each other before they parse the command line. RANK and WORLD_SIZE win over Slurm's numbers: whoever
// sets them in a Slurm job means them.
LLMC_FN int comm_without_mpi_(Comm *c, int argc, char **argv) {
    int asked = 0;
    for (int i = 1; i < argc; i++) asked |= !strncmp(argv[i], "--comm-f", 8);       // names may be shortened
    static const char *const names[][3] = {
        {"WORLD_SIZE", "RANK", "LOCAL_RANK"}, {"SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"}};
    for (int i = 0; asked && i < 2; i++) {
        int world = environment_int_(names[i][0], 1, 0), rank = environment_int_(names[i][1], 0, -1);
        if (world == 0 || rank < 0) continue;
        int local = environment_int_(names[i][2], 0, environment_int_("SLURM_LOCALID", 0, -1));
        if (local < 0) break;
        if (rank >= world)
            die(EXIT_INPUT, "%s is %d and %s is %d: a rank is at least 0 and below the number of ranks", names[i][1],
                rank, names[i][0], world);
        c->world = world, c->rank = rank, c->local_rank = local, c->local_world = local + 1;
        return 1;
    }
    if (asked)
        die(EXIT_INPUT, "--comm-file: the environment must set WORLD_SIZE, RANK and LOCAL_RANK, or SLURM_NTASKS, "
            "SLURM_PROCID and SLURM_LOCALID");
    return 0;
}

// Fills in *c: one process, or one of several ranks if a launcher or --comm-file says so. Ends the program with one
// line if the ranks cannot be set up, so that no process of several believes that it is alone. Close with comm_close.
LLMC_FN void comm_open(Comm *c, int argc, char **argv) {
    memset(c, 0, sizeof *c);
    c->world = c->local_world = 1, c->timeout_seconds = COMM_START_SECONDS;
    gethostname(c->host, sizeof c->host - 1);
    char library[64];
    Launch_ launch = comm_launched_();
    int meets = comm_without_mpi_(c, argc, argv);
    if (!meets && launch.n > 1 && comm_can_start_(&launch)) comm_start_(c);
    if (launch.n > 1 && c->world == 1)
        die(EXIT_INPUT, "%s started %d processes (%s), but this program, built with %s, sees only this one: %s; on "
            "GPUs --comm-file needs no MPI; for a single process unset %s", launch.name, launch.n, launch.variable,
            comm_library(library), comm_advice_(), launch.variable);
    if (c->world > 1)
        set_program_name(xasprintf("%s (rank %d of %d on %s)", program_name(), c->rank, c->world, c->host));
}

LLMC_FN void comm_close(Comm *c) {
    if (c->world > 1) comm_finish_();
    c->world = 1, c->rank = 0, c->run = NULL;
}

// ---------------------------------------------------------------------------------------------------------------------
// Collectives: all ranks call them, in the same order; one process only copies. `what` names the call in error lines.
// None returns a communication error: that ends the rank.

// x (n) = its sum over all ranks. The order of additions is the library's, so callers that need reproducible sums give
// each element on one rank and zeros on the others.
LLMC_FN void comm_sum(Comm *c, double *x, size_t n, const char *what) {
    CommCall call = {COMM_SUM, what, x, NULL, n, NO_ROOT, NO_GIVERS};
    if (comm_world(c) > 1) c->run(c, &call);
}

// Returns when all ranks have called it.
LLMC_FN void comm_barrier(Comm *c, const char *what) {
    double one = 1;
    comm_sum(c, &one, 1, what);
}

// Returns 1 on every rank if `yes` is not 0 on any.
LLMC_FN int comm_any(Comm *c, int yes, const char *what) {
    double count = yes != 0;
    comm_sum(c, &count, 1, what);
    return count > 0;
}

// sum (n) += row `rank` of parts (world, n) of the ranks 0 to givers - 1, added in the order of ranks: this order is
// part of a run's definition, so it must not depend on the library. scratch (world, n): not used by a single process.
LLMC_FN void comm_reduce_scatter(Comm *c, float *sum, const float *parts, float *scratch, size_t n, int givers,
                                 const char *what) {
    CommCall call = {COMM_EXCHANGE, what, scratch, parts, n, NO_ROOT, givers};
    const float *from = comm_world(c) > 1 ? scratch : parts;
    if (comm_world(c) > 1) c->run(c, &call);
    for (int r = 0; r < givers; r++) {
        const float *part = from + (size_t)r * n;
#ifdef _OPENMP
        #pragma omp parallel for simd
#endif
        for (size_t i = 0; i < n; i++) sum[i] += part[i];
    }
}

// x (world, n): each rank provides its own row and gets all of them.
LLMC_FN void comm_all_gather(Comm *c, float *x, size_t n, const char *what) {
    CommCall call = {COMM_ALL_GATHER, what, x, NULL, n, NO_ROOT, NO_GIVERS};
    if (comm_world(c) > 1) c->run(c, &call);
}

// On rank root, out (world, bytes) = mine (bytes) of every rank. Other ranks may pass NULL for out.
LLMC_FN void comm_gather(Comm *c, void *out, const void *mine, size_t bytes, int root, const char *what) {
    CommCall call = {COMM_GATHER, what, out, mine, bytes, root, NO_GIVERS};
    if (comm_world(c) > 1) c->run(c, &call);
    else if (out != mine) memcpy(out, mine, bytes);
}

// x (bytes) = what rank root has there. Sent in pieces of 1 GiB, because MPI counts in int.
LLMC_FN void comm_broadcast(Comm *c, void *x, size_t bytes, int root, const char *what) {
    const size_t piece = (size_t)1 << 30;
    for (size_t at = 0; comm_world(c) > 1 && at < bytes; at += piece) {
        size_t n = bytes - at < piece ? bytes - at : piece;
        CommCall call = {COMM_BROADCAST, what, (char *)x + at, NULL, n, root, NO_GIVERS};
        c->run(c, &call);
    }
}

// While rank 0 works alone, it says so from time to time (more = 1) and at the end (more = 0); the others call this
// until it returns 0. So the deadline counts for each piece of rank 0's work, not for the whole.
LLMC_FN int comm_rank_0_works(Comm *c, int more, const char *what) {
    comm_broadcast(c, &more, sizeof more, 0, what);
    return more;
}

typedef struct { int rc; Error err; } CommVerdict_;

// Makes all ranks agree on an outcome. Returns 0 if rc is 0 on every rank; otherwise -1 on every rank, with the line
// of the lowest rank that failed in *err, prefixed by its number and host if that is not rank 0.
LLMC_FN int comm_failed(Comm *c, int rc, Error *err, const char *what) {
    if (comm_world(c) == 1 || !c->run) return rc;
    CommVerdict_ mine, *all = NULL;
    memset(&mine, 0, sizeof mine);
    mine.rc = rc;
    if (rc != 0 && c->rank == 0) mine.err = *err;
    else if (rc != 0) fail(&mine.err, "rank %d on %s: %.900s", c->rank, c->host, err->text);
    if (c->rank == 0) all = (CommVerdict_ *)xcalloc((size_t)c->world, sizeof *all);
    comm_gather(c, all, &mine, sizeof mine, 0, what);
    for (int r = c->world - 1; c->rank == 0 && r >= 0; r--)
        if (all[r].rc != 0) mine = all[r];
    free(all);
    comm_broadcast(c, &mine, sizeof mine, 0, what);
    if (mine.rc != 0) *err = mine.err;
    return mine.rc;
}

// If rc is not 0 on any rank, rank 0 prints one line, that of the lowest such rank, and all ranks exit with `code`.
LLMC_FN void comm_check(Comm *c, int rc, int code, Error *err) {
    if (comm_failed(c, rc, err, "error check") == 0) return;
    if (comm_world(c) == 1 || !c->run) die(code, "%s", err->text);
    if (c->rank == 0) fprintf(stderr, "%s: %s\n", program_name(), err->text);
    fflush(stdout);
    comm_finish_();
    exit(code);
}

#endif
