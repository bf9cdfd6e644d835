// Ranks: the processes of one run, one a GPU, started by mpirun or srun, and the few collectives they need, on host memory over MPI.
//
// One process calls nothing of MPI and needs none of it installed (`make MPI=0`, or where there is no MPI). A Comm that is NULL is one
// process too. Every function here is a collective: all ranks call it, in the same order.
//
// Every wait has a deadline (--comm-timeout). A rank that is left alone says in one line which collective it waited in, and ends the
// job: nobody waits for a dead peer, or behind a network that is gone, for longer than that.
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

enum { COMM_START_SECONDS = 120 };      // the deadline until the command line has said another

typedef struct Comm Comm;
typedef struct CommCall CommCall;
struct Comm {
    int rank, world;                    // this process among all
    int local_rank, local_world;        // and among those of its host
    char host[64];
    double timeout_seconds;
    int64_t step;                       // for the error line
    double seconds;                     // spent in collectives so far
    void (*run)(Comm *c, const CommCall *call);     // how it is done: over MPI, or (llmc/comm.cuh) over NCCL; NULL: not yet
};

LLMC_FN int comm_rank(const Comm *c) { return c ? c->rank : 0; }
LLMC_FN int comm_world(const Comm *c) { return c ? c->world : 1; }

// ---------------------------------------------------------------------------------------------------------------------
// SIGTERM and SIGUSR1 (what Slurm sends ahead of a time limit) ask for a checkpoint and a clean end. The handler only takes a note; the
// training loop reads it at the end of each step.

LLMC_FN volatile sig_atomic_t *stop_requested_(void) {
    static volatile sig_atomic_t signal_number;
    return &signal_number;
}
LLMC_FN void stop_handler_(int number) { *stop_requested_() = number; }
LLMC_FN void stop_on_signals(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = stop_handler_;
    action.sa_flags = SA_RESTART;
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGUSR1, &action, NULL);
}

// ---------------------------------------------------------------------------------------------------------------------
// What a transport is asked for: one kind of call, so that another one is one function.

typedef enum { COMM_SUM, COMM_EXCHANGE, COMM_ALL_GATHER, COMM_GATHER, COMM_BROADCAST } CommOp;
struct CommCall {
    CommOp op;
    const char *what;           // for the error line
    void *recv;
    const void *send;           // NULL: in place
    size_t n;                   // doubles (SUM), floats (EXCHANGE, ALL_GATHER), bytes (GATHER, BROADCAST), of each rank
    int root;
    int givers;                 // EXCHANGE: ranks below this one send, the others only receive
};

// A rank that waited in vain ends: another one has died, hangs, or cannot be reached. Not by exit(), which might wait for it too; and
// not at once, since mpirun ends all the others when one has ended: those that wait as long get half a second to say where.
LLMC_FN __attribute__((noreturn)) void comm_give_up(const Comm *c, const char *what, const char *why) {
    fflush(stdout);
    fprintf(stderr, "%s: gave up in \"%s\" of step %lld: %s\n", *program_name_(), what, (long long)c->step, why);
    fflush(stderr);
    usleep(500000);
    _exit(EXIT_SYSTEM);
}

// Called again and again by whoever waits in a collective since `start`: looks at the deadline, and leaves the processor to others.
LLMC_FN void comm_still_waiting(const Comm *c, const char *what, double start, int *turns) {
    double waited = now_seconds() - start;
    if (c->timeout_seconds > 0 && waited > c->timeout_seconds) {
        char why[128];
        snprintf(why, sizeof why, "no answer for %.0f s (--comm-timeout): another rank has died, hangs or cannot be reached", waited);
        comm_give_up(c, what, why);
    }
    // mpirun ends the others by SIGTERM when one rank has died, and a second later by force: time enough to say where this one stood
    if (*turns >= 0 && *stop_requested_() == SIGTERM && waited > 0.3) {
        fprintf(stderr, "%s: told to stop while it waits for another rank in \"%s\" of step %lld\n", *program_name_(), what, (long long)c->step);
        *turns = -1;
    }
    if (*turns >= 0 && ++*turns < 1000) sched_yield();
    else usleep(20);
}

// Libraries that do not return when a rank is missing are called between comm_start_deadline(seconds) and comm_start_deadline(0).
LLMC_FN void comm_start_timeout_(int number) {
    (void)number;
    static const char text[] = "t6: gave up at the start: the ranks do not find each other\n";
    ssize_t ignored = write(STDERR_FILENO, text, sizeof text - 1);
    (void)ignored;
    _exit(EXIT_SYSTEM);
}
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

LLMC_FN void comm_mpi_run_(Comm *c, const CommCall *call) {
    MPI_Comm all = MPI_COMM_WORLD;
    MPI_Request request;
    int n = (int)call->n, rc = 0, turns = 0, done = 0, *plan = NULL;
    const void *send = call->send ? call->send : MPI_IN_PLACE;
    double start = now_seconds();
    if (call->n > INT_MAX) die(EXIT_SYSTEM, "internal error: %zu numbers in one call of \"%s\"", call->n, call->what);
    if (call->op == COMM_SUM) rc = MPI_Iallreduce(send, call->recv, n, MPI_DOUBLE, MPI_SUM, all, &request);
    else if (call->op == COMM_ALL_GATHER) rc = MPI_Iallgather(send, n, MPI_FLOAT, call->recv, n, MPI_FLOAT, all, &request);
    else if (call->op == COMM_GATHER) rc = MPI_Igather(call->send, n, MPI_BYTE, call->recv, n, MPI_BYTE, call->root, all, &request);
    else if (call->op == COMM_BROADCAST) rc = MPI_Ibcast(call->recv, n, MPI_BYTE, call->root, all, &request);
    else {
        plan = (int *)xcalloc(4 * (size_t)c->world, sizeof *plan);      // counts and places of what is sent and received
        int *sent = plan, *from = plan + c->world, *received = plan + 2 * c->world, *to = plan + 3 * c->world;
        if ((double)n * c->world > INT_MAX) die(EXIT_SYSTEM, "internal error: %d numbers for each rank in \"%s\"", n, call->what);
        for (int r = 0; r < c->world; r++) {
            sent[r] = c->rank < call->givers ? n : 0, received[r] = r < call->givers ? n : 0;
            from[r] = to[r] = r * n;
        }
        rc = MPI_Ialltoallv(send, sent, from, MPI_FLOAT, call->recv, received, to, MPI_FLOAT, all, &request);
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

LLMC_FN void comm_finish_(void) {
    int started = 0;
    MPI_Initialized(&started);
    if (started) MPI_Finalize();
}

LLMC_FN const char *comm_library(char out[64]) {        // "Open MPI v4.1.4, ..." without what follows the comma
    char text[MPI_MAX_LIBRARY_VERSION_STRING];
    int length;
    MPI_Get_library_version(text, &length);
    text[strcspn(text, ",\n")] = 0;
    snprintf(out, 64, "%.63s", text);
    return out;
}
#else
LLMC_FN void comm_start_(Comm *c) {
    (void)c;
    die(EXIT_INPUT, "started as one of several ranks, but built without MPI: install Open MPI (scripts/setup.sh mpi) and build again");
}
LLMC_FN void comm_finish_(void) {}
LLMC_FN const char *comm_library(char out[64]) { snprintf(out, 64, "no MPI"); return out; }
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Beginning and end

// How many processes the launcher says it started; 1 where there is none.
LLMC_FN int comm_launched_(const char **slurm_alone) {
    static const char *const names[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"};
    int n = 1;
    *slurm_alone = NULL;
    for (int i = 0; i < 3; i++) {
        const char *text = getenv(names[i]);
        if (text && atoi(text) > n) n = atoi(text), *slurm_alone = i == 2 ? text : NULL;
    }
    return n;
}

// --comm-file: ranks that MPI cannot start, under a Slurm without PMIx say, are numbered by the environment alone, and meet through that
// file and NCCL. That is looked for before the command line is read, because the command line is already read by all ranks together.
LLMC_FN int comm_without_mpi_(Comm *c, int argc, char **argv) {
    int asked = 0;
    for (int i = 1; i < argc; i++) asked |= !strncmp(argv[i], "--comm-file", 11);
    const char *names[][3] = {{"SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"}, {"WORLD_SIZE", "RANK", "LOCAL_RANK"}};
    for (int i = 0; asked && i < 2; i++) {
        const char *world = getenv(names[i][0]), *rank = getenv(names[i][1]), *local = getenv(names[i][2]);
        if (!world || !rank || !local) continue;
        c->world = atoi(world), c->rank = atoi(rank), c->local_rank = atoi(local), c->local_world = c->local_rank + 1;
        if (c->world < 1 || c->rank < 0 || c->rank >= c->world) die(EXIT_INPUT, "%s=%s and %s=%s: not a rank", names[i][0], world, names[i][1], rank);
        return 1;
    }
    if (asked)
        die(EXIT_INPUT, "--comm-file: the environment has neither SLURM_NTASKS, SLURM_PROCID and SLURM_LOCALID nor WORLD_SIZE, RANK and "
            "LOCAL_RANK");
    return 0;
}

LLMC_FN void comm_open(Comm *c, int argc, char **argv) {
    const char *slurm;
    memset(c, 0, sizeof *c);
    c->world = c->local_world = 1, c->timeout_seconds = COMM_START_SECONDS;
    gethostname(c->host, sizeof c->host - 1);
    if (!comm_without_mpi_(c, argc, argv)) {
        if (comm_launched_(&slurm) == 1) return;
        comm_start_(c);
    } else slurm = NULL;
    if (c->world == 1 && slurm)
        die(EXIT_INPUT, "srun started %s tasks, but MPI sees each of them alone: use srun --mpi=pmix (srun --mpi=list says what there is), "
            "or mpirun", slurm);
    if (c->world > 1) set_program_name(xasprintf("%s (rank %d of %d on %s)", *program_name_(), c->rank, c->world, c->host));
}

LLMC_FN void comm_close(Comm *c) {
    if (c->world > 1) comm_finish_();
    c->world = 1, c->rank = 0, c->run = NULL;
}

// ---------------------------------------------------------------------------------------------------------------------
// Collectives

// x (n) becomes the sum over ranks. Where all but one have zeros the sum is exact, and so is not the order's business.
LLMC_FN void comm_sum(Comm *c, double *x, size_t n, const char *what) {
    CommCall call = {COMM_SUM, what, x, NULL, n, 0, 0};
    if (comm_world(c) > 1) c->run(c, &call);
}

LLMC_FN void comm_barrier(Comm *c, const char *what) {
    double one = 1;
    comm_sum(c, &one, 1, what);
}

// Is it so on any rank?
LLMC_FN int comm_any(Comm *c, int yes, const char *what) {
    double count = yes != 0;
    comm_sum(c, &count, 1, what);
    return count > 0;
}

// sum (n) += what the ranks 0 to givers - 1 hold for this one in their parts (world, n), one rank after the other: the order of these
// additions is part of what a run is. scratch (world, n) is not needed by a single process.
LLMC_FN void comm_reduce_scatter(Comm *c, float *sum, const float *parts, float *scratch, size_t n, int givers, const char *what) {
    CommCall call = {COMM_EXCHANGE, what, scratch, parts, n, 0, givers};
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

// x (world, n): every rank brings its row.
LLMC_FN void comm_all_gather(Comm *c, float *x, size_t n, const char *what) {
    CommCall call = {COMM_ALL_GATHER, what, x, NULL, n, 0, 0};
    if (comm_world(c) > 1) c->run(c, &call);
}

// out (world, bytes) of rank root: mine (bytes) of every rank.
LLMC_FN void comm_gather(Comm *c, void *out, const void *mine, size_t bytes, int root, const char *what) {
    CommCall call = {COMM_GATHER, what, out, mine, bytes, root, 0};
    if (comm_world(c) > 1) c->run(c, &call);
    else if (out != mine) memcpy(out, mine, bytes);
}

LLMC_FN void comm_broadcast(Comm *c, void *x, size_t bytes, int root, const char *what) {
    for (size_t at = 0; comm_world(c) > 1 && at < bytes; at += 1 << 30) {
        CommCall call = {COMM_BROADCAST, what, (char *)x + at, NULL, bytes - at < 1 << 30 ? bytes - at : 1 << 30, root, 0};
        c->run(c, &call);
    }
}

typedef struct { int rc; Error err; } CommVerdict;

// Gives every rank the verdict of all: 0, or -1 with the line of the lowest rank that failed.
LLMC_FN int comm_failed(Comm *c, int rc, Error *err, const char *what) {
    if (comm_world(c) == 1 || !c->run) return rc;
    CommVerdict mine, *all = NULL;
    memset(&mine, 0, sizeof mine);
    mine.rc = rc;
    if (rc != 0 && c->rank == 0) mine.err = *err;
    else if (rc != 0) fail(&mine.err, "rank %d on %s: %.900s", c->rank, c->host, err->text);
    if (c->rank == 0) all = (CommVerdict *)xcalloc((size_t)c->world, sizeof *all);
    comm_gather(c, all, &mine, sizeof mine, 0, what);
    for (int r = c->world - 1; c->rank == 0 && r >= 0; r--)
        if (all[r].rc != 0) mine = all[r];
    free(all);
    comm_broadcast(c, &mine, sizeof mine, 0, what);
    if (mine.rc != 0) *err = mine.err;
    return mine.rc;
}

// Ends the program on every rank if any of them failed, with one line in all.
LLMC_FN void comm_check(Comm *c, int rc, int code, Error *err) {
    if (comm_failed(c, rc, err, "agreement that all is well") == 0) return;
    if (comm_world(c) == 1 || !c->run) die(code, "%s", err->text);
    if (c->rank == 0) fprintf(stderr, "%s: %s\n", *program_name_(), err->text);
    fflush(stdout);
    comm_finish_();
    exit(code);
}

#endif
