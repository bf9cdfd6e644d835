// Collectives on GPU memory, on their own stream, so that they overlap with the backward pass. The transport is NCCL,
// or with --comm mpi MPI through pinned host memory: slow, because it waits on the host, but several ranks may share a
// GPU.
//
// A single process has no GpuComm, unless --comm nccl or --comm mpi asks for one, to try the path.
#ifndef LLMC_COMM_CUH
#define LLMC_COMM_CUH

#ifdef USE_NCCL
#include <nccl.h>
#endif
#include "comm.h"
#include "cuda_utils.cuh"
#include "options.h"

typedef enum { TRANSPORT_NCCL, TRANSPORT_HOST, TRANSPORT_SIMULATED } Transport;

// The collectives issued since the last wait: for the message that says where a run is stuck, and for timelines.
enum { MAX_PENDING = 4096 };
typedef struct { const char *what; cudaEvent_t start, end; } PendingCall;

typedef struct {
    Comm *comm;
    Transport transport;
    cudaStream_t stream;
    PendingCall pending[MAX_PENDING];
    int num_pending;
    float *send, *scratch, *sum;    // TRANSPORT_HOST, pinned: (largest), (largest), (largest / world)
    char *staging;                  // TRANSPORT_NCCL, on the GPU: for collectives on host memory; grows as needed
    size_t staging_bytes;
    double simulated_GBps;          // TRANSPORT_SIMULATED: nothing is sent; a kernel waits for as long as it would take
    int simulated_world;
#ifdef USE_NCCL
    ncclComm_t nccl;
#endif
} GpuComm;

// ---------------------------------------------------------------------------------------------------------------------
// NCCL, and stubs for a build without it

#ifdef USE_NCCL
LLMC_FN void nccl_check_(ncclResult_t error, const char *statement, int line) {
    if (error == ncclSuccess) return;
    const char *hint = error == ncclInvalidUsage ? "; if ranks share a GPU, add --comm mpi" : "";
    die(EXIT_SYSTEM, "%s:%d: %s: %s%s", __FILE__, line, statement, ncclGetErrorString(error), hint);
}
#define NCCL_CHECK(statement) nccl_check_((statement), #statement, __LINE__)

LLMC_FN const char *gpu_comm_library(char out[32]) {
    int version = 0;
    NCCL_CHECK(ncclGetVersion(&version));
    snprintf(out, 32, "NCCL %d.%d.%d", version / 10000, version % 10000 / 100, version % 100);
    return out;
}

// Rank 0 makes the id by which ranks find each other and passes it on over MPI or, with --comm-file, through a file.
// Under Slurm the file's name includes the job, so that a file left by an earlier job is not mistaken for this one's.
// Rank 0 removes it once all ranks have met.
LLMC_FN char *nccl_id_path_(const char *file) {
    const char *job = getenv("SLURM_JOB_ID"), *step = getenv("SLURM_STEP_ID"), *again = getenv("SLURM_RESTART_COUNT");
    return job ? xasprintf("%s.%s.%s.%s", file, job, step ? step : "0", again ? again : "0") : xasprintf("%s", file);
}

LLMC_FN void nccl_exchange_id_(Comm *c, const char *file, ncclUniqueId *id) {
    Error err;
    const int root = 0;
    if (c->rank == root) NCCL_CHECK(ncclGetUniqueId(id));
    if (!file) return comm_broadcast(c, id, sizeof *id, root, "NCCL's id");
    char *path = nccl_id_path_(file);
    double start = now_seconds();
    if (c->rank == root) {
        if (access(path, F_OK) == 0)
            die(EXIT_INPUT, "--comm-file: %s already exists, from another run: remove it or name another file", path);
        if (write_small_file(path, id, sizeof *id, &err) != 0) die(EXIT_INPUT, "--comm-file: %s", err.text);
    } else {
        int turns = 0;
        while (access(path, F_OK) != 0) comm_still_waiting(c, "--comm-file", start, &turns);
        size_t bytes;
        char *text = read_small_file(path, sizeof *id, &bytes, &err);
        if (!text || bytes != sizeof *id)
            die(EXIT_INPUT, "--comm-file: %s does not hold this run's NCCL id: remove it and start again", path);
        memcpy(id, text, sizeof *id);
        free(text);
    }
    free(path);
}

// The GpuComm behind Comm's collectives on host memory, when ranks meet without MPI: Comm has no field for it.
LLMC_FN GpuComm **nccl_host_comm_(void) {
    static GpuComm *g;
    return &g;
}

LLMC_FN void gpu_comm_wait(GpuComm *g, cudaStream_t stream);

// Comm's collectives on host memory over NCCL, for ranks without MPI: to the GPU, through staging, and back.
LLMC_FN void nccl_run_(Comm *c, const CommCall *call) {
    GpuComm *g = *nccl_host_comm_();
    int in_bytes = call->op == COMM_GATHER || call->op == COMM_BROADCAST;       // call->n counts bytes
    size_t width = call->op == COMM_SUM ? sizeof(double) : in_bytes ? 1 : sizeof(float);
    size_t world = c->world, bytes = call->n * width;
    const void *send = call->send;
    if (!send) send = call->op == COMM_ALL_GATHER ? (char *)call->recv + c->rank * bytes : (char *)call->recv;
    if (g->staging_bytes < 2 * world * bytes) {
        if (g->staging) CUDA_CHECK(cudaFree(g->staging));
        g->staging_bytes = 2 * world * bytes;
        CUDA_CHECK(cudaMalloc((void **)&g->staging, g->staging_bytes));
    }
    char *in = g->staging, *out = g->staging + world * bytes;
    int receives = call->op != COMM_GATHER || c->rank == call->root;
    double start = now_seconds();
    CUDA_CHECK(cudaMemcpyAsync(in, send, call->op == COMM_EXCHANGE ? world * bytes : bytes, cudaMemcpyHostToDevice,
                               g->stream));
    if (call->op == COMM_SUM) NCCL_CHECK(ncclAllReduce(in, out, call->n, ncclDouble, ncclSum, g->nccl, g->stream));
    else if (call->op == COMM_BROADCAST)
        NCCL_CHECK(ncclBroadcast(in, out, bytes, ncclChar, call->root, g->nccl, g->stream));
    else if (call->op == COMM_EXCHANGE) {
        NCCL_CHECK(ncclGroupStart());
        for (int r = 0; r < c->world; r++) {
            if (c->rank < call->givers) NCCL_CHECK(ncclSend(in + r * bytes, bytes, ncclChar, r, g->nccl, g->stream));
            if (r < call->givers) NCCL_CHECK(ncclRecv(out + r * bytes, bytes, ncclChar, r, g->nccl, g->stream));
        }
        NCCL_CHECK(ncclGroupEnd());
    } else NCCL_CHECK(ncclAllGather(in, out, bytes, ncclChar, g->nccl, g->stream));
    size_t back = call->op == COMM_SUM || call->op == COMM_BROADCAST ? bytes : world * bytes;
    if (receives) CUDA_CHECK(cudaMemcpyAsync(call->recv, out, back, cudaMemcpyDeviceToHost, g->stream));
    gpu_comm_wait(g, g->stream);
    c->seconds += now_seconds() - start;
}

LLMC_FN void nccl_start_(GpuComm *g, const char *file) {
    ncclUniqueId id;
    Comm *c = g->comm;
    nccl_exchange_id_(c, file, &id);
    comm_start_deadline(COMM_START_SECONDS);
    NCCL_CHECK(ncclCommInitRank(&g->nccl, c->world, id, c->rank));
    comm_start_deadline(0);
    if (!file) return;
    *nccl_host_comm_() = g;
    c->run = nccl_run_;
    comm_barrier(c, "start-up barrier");
    if (c->rank == 0) {
        char *path = nccl_id_path_(file);
        unlink(path);
        free(path);
    }
}

LLMC_FN void nccl_finish_(GpuComm *g) {
    if (*nccl_host_comm_() == g) *nccl_host_comm_() = NULL, g->comm->run = NULL;
    NCCL_CHECK(ncclCommDestroy(g->nccl));
}
LLMC_FN const char *nccl_async_error_(GpuComm *g) {
    ncclResult_t error = ncclSuccess;
    NCCL_CHECK(ncclCommGetAsyncError(g->nccl, &error));
    return error == ncclSuccess ? NULL : ncclGetErrorString(error);
}
LLMC_FN void nccl_all_reduce_(GpuComm *g, float *x, size_t n) {
    NCCL_CHECK(ncclAllReduce(x, x, n, ncclFloat, ncclSum, g->nccl, g->stream));
}
LLMC_FN void nccl_sum_(GpuComm *g, double *x, size_t n) {
    NCCL_CHECK(ncclAllReduce(x, x, n, ncclDouble, ncclSum, g->nccl, g->stream));
}
LLMC_FN void nccl_reduce_scatter_(GpuComm *g, float *recv, const float *send, size_t n) {
    NCCL_CHECK(ncclReduceScatter(send, recv, n, ncclFloat, ncclSum, g->nccl, g->stream));
}
LLMC_FN void nccl_all_gather_(GpuComm *g, char *x, size_t bytes) {
    NCCL_CHECK(ncclAllGather(x + g->comm->rank * bytes, x, bytes, ncclChar, g->nccl, g->stream));
}
#else
LLMC_FN const char *gpu_comm_library(char out[32]) { snprintf(out, 32, "no NCCL"); return out; }
LLMC_FN void nccl_start_(GpuComm *g, const char *file) {
    (void)g, (void)file;
    die(EXIT_INPUT, "this program was built without NCCL: install libnccl-dev and build again, or add --comm mpi");
}
LLMC_FN void nccl_finish_(GpuComm *g) { (void)g; }
LLMC_FN const char *nccl_async_error_(GpuComm *g) { (void)g; return NULL; }
LLMC_FN void nccl_all_reduce_(GpuComm *g, float *x, size_t n) { (void)g, (void)x, (void)n; }
LLMC_FN void nccl_sum_(GpuComm *g, double *x, size_t n) { (void)g, (void)x, (void)n; }
LLMC_FN void nccl_reduce_scatter_(GpuComm *g, float *recv, const float *send, size_t n) {
    (void)g, (void)recv, (void)send, (void)n;
}
LLMC_FN void nccl_all_gather_(GpuComm *g, char *x, size_t bytes) { (void)g, (void)x, (void)bytes; }
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Opening, closing and waiting

// Does this run need a GpuComm? o->comm is NULL in tests with one process.
LLMC_FN int gpu_comm_wanted(const TrainOptions *o) {
    if (o->forward_only) return 0;
    return comm_world(o->comm) > 1 || (o->transport && strcmp(o->transport, "auto") != 0);
}

LLMC_FN GpuComm *gpu_comm_open(const TrainOptions *o) {
    GpuComm *g = (GpuComm *)xcalloc(1, sizeof *g);
    g->comm = o->comm;
    g->transport = !strcmp(o->transport, "mpi") ? TRANSPORT_HOST : TRANSPORT_NCCL;
    CUDA_CHECK(cudaStreamCreateWithFlags(&g->stream, cudaStreamNonBlocking));
    if (g->transport == TRANSPORT_NCCL) nccl_start_(g, o->comm_file);
    return g;
}

// Allocates buffers for collectives of up to `largest` floats.
LLMC_FN void gpu_comm_reserve(GpuComm *g, size_t largest) {
    if (g->transport != TRANSPORT_HOST) return;
    CUDA_CHECK(cudaMallocHost((void **)&g->send, largest * sizeof(float)));
    CUDA_CHECK(cudaMallocHost((void **)&g->scratch, largest * sizeof(float)));
    CUDA_CHECK(cudaMallocHost((void **)&g->sum, largest / comm_world(g->comm) * sizeof(float)));
}

LLMC_FN void gpu_comm_close(GpuComm *g) {
    CUDA_CHECK(cudaStreamSynchronize(g->stream));
    if (g->transport == TRANSPORT_NCCL) nccl_finish_(g);
    float *pinned[] = {g->send, g->scratch, g->sum};
    for (int i = 0; i < 3; i++)
        if (pinned[i]) CUDA_CHECK(cudaFreeHost(pinned[i]));
    for (int i = 0; i < MAX_PENDING && g->pending[i].start; i++) {
        CUDA_CHECK(cudaEventDestroy(g->pending[i].start));
        CUDA_CHECK(cudaEventDestroy(g->pending[i].end));
    }
    if (g->staging) CUDA_CHECK(cudaFree(g->staging));
    CUDA_CHECK(cudaStreamDestroy(g->stream));
    free(g);
}

// Waits for a stream, with --comm-timeout as the deadline. Afterwards nothing is pending.
LLMC_FN void gpu_comm_wait(GpuComm *g, cudaStream_t stream) {
    double start = now_seconds();
    int turns = 0;
    cudaError_t error;
    while ((error = cudaStreamQuery(stream)) == cudaErrorNotReady) {
        const char *what = "compute", *broken = g->transport == TRANSPORT_NCCL ? nccl_async_error_(g) : NULL;
        for (int i = g->num_pending - 1; i >= 0; i--)       // ends at the first call that is not done
            if (cudaEventQuery(g->pending[i].end) == cudaErrorNotReady) what = g->pending[i].what;
        if (broken) comm_give_up(g->comm, what, broken);
        comm_still_waiting(g->comm, what, start, &turns);
    }
    CUDA_CHECK(error);
    g->num_pending = 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Collectives. They run on g->stream, in the order of the calls. Tensors are on the GPU.

// Waits ns nanoseconds.
__global__ void wait_kernel(long long ns) {
    long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    while (now - start < ns);
}

// Records the start of a collective; the caller records p->end.
LLMC_FN PendingCall *gpu_comm_begin_(GpuComm *g, const char *what, double bytes_on_the_wire) {
    PendingCall *p = &g->pending[g->num_pending < MAX_PENDING ? g->num_pending++ : MAX_PENDING - 1];
    if (!p->start) {
        CUDA_CHECK(cudaEventCreate(&p->start));
        CUDA_CHECK(cudaEventCreate(&p->end));
    }
    p->what = what;
    CUDA_CHECK(cudaEventRecord(p->start, g->stream));
    if (g->transport == TRANSPORT_SIMULATED) {
        double share = (double)(g->simulated_world - 1) / g->simulated_world;
        launch(wait_kernel, {1, 1, 0, g->stream}, (long long)(share * bytes_on_the_wire / g->simulated_GBps));
    }
    return p;
}

// Copies to the host, or back.
LLMC_FN void gpu_comm_copy_(GpuComm *g, void *to, const void *from, size_t bytes) {
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, g->stream));
}

// recv (n) = the sum over ranks of this rank's row of their send (world, n).
LLMC_FN void gpu_reduce_scatter(GpuComm *g, float *recv, const float *send, size_t n, const char *what) {
    int world = comm_world(g->comm);
    PendingCall *p = gpu_comm_begin_(g, what, (double)(n * world * sizeof(float)));
    if (g->transport == TRANSPORT_NCCL) nccl_reduce_scatter_(g, recv, send, n);
    else if (g->transport == TRANSPORT_HOST) {
        gpu_comm_copy_(g, g->send, send, n * world * sizeof(float));
        CUDA_CHECK(cudaStreamSynchronize(g->stream));
        memset(g->sum, 0, n * sizeof(float));
        comm_reduce_scatter(g->comm, g->sum, g->send, g->scratch, n, world, what);
        gpu_comm_copy_(g, recv, g->sum, n * sizeof(float));
    } else if (recv != send) gpu_comm_copy_(g, recv, send, n * sizeof(float));
    CUDA_CHECK(cudaEventRecord(p->end, g->stream));
}

// x (world * n) becomes the sum over ranks.
LLMC_FN void gpu_all_reduce(GpuComm *g, float *x, size_t n, const char *what) {
    int world = comm_world(g->comm);
    PendingCall *p = gpu_comm_begin_(g, what, 2.0 * (double)(n * world * sizeof(float)));
    if (g->transport == TRANSPORT_NCCL) nccl_all_reduce_(g, x, n * world);
    else if (g->transport == TRANSPORT_HOST) {
        gpu_comm_copy_(g, g->send, x, n * world * sizeof(float));
        CUDA_CHECK(cudaStreamSynchronize(g->stream));
        memset(g->sum, 0, n * sizeof(float));
        comm_reduce_scatter(g->comm, g->sum, g->send, g->scratch, n, world, what);
        memcpy(g->send + comm_rank(g->comm) * n, g->sum, n * sizeof(float));
        comm_all_gather(g->comm, g->send, n, what);
        gpu_comm_copy_(g, x, g->send, n * world * sizeof(float));
    }
    CUDA_CHECK(cudaEventRecord(p->end, g->stream));
}

// x (n) becomes the sum over ranks; n is at most 64.
LLMC_FN void gpu_sum(GpuComm *g, double *x, size_t n, const char *what) {
    PendingCall *p = gpu_comm_begin_(g, what, 0);
    if (g->transport == TRANSPORT_NCCL) nccl_sum_(g, x, n);
    else if (g->transport == TRANSPORT_HOST) {
        double host[64];
        gpu_comm_copy_(g, host, x, n * sizeof *x);
        CUDA_CHECK(cudaStreamSynchronize(g->stream));
        comm_sum(g->comm, host, n, what);
        gpu_comm_copy_(g, x, host, n * sizeof *x);
        CUDA_CHECK(cudaStreamSynchronize(g->stream));
    }
    CUDA_CHECK(cudaEventRecord(p->end, g->stream));
}

// x (world, bytes): each rank passes its own row and gets all rows; bytes is a multiple of 4.
LLMC_FN void gpu_all_gather(GpuComm *g, void *x, size_t bytes, const char *what) {
    int world = comm_world(g->comm);
    char *mine = (char *)x + comm_rank(g->comm) * bytes;
    PendingCall *p = gpu_comm_begin_(g, what, (double)(bytes * world));
    if (g->transport == TRANSPORT_NCCL) nccl_all_gather_(g, (char *)x, bytes);
    else if (g->transport == TRANSPORT_HOST) {
        gpu_comm_copy_(g, (char *)g->send + comm_rank(g->comm) * bytes, mine, bytes);
        CUDA_CHECK(cudaStreamSynchronize(g->stream));
        comm_all_gather(g->comm, g->send, bytes / sizeof(float), what);
        gpu_comm_copy_(g, x, g->send, bytes * world);
    }
    CUDA_CHECK(cudaEventRecord(p->end, g->stream));
}

#endif
