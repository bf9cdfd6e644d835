// The training program: command line, data, checkpoints, the training loop and its log. train_t6.c and train_t6.cu
// end with this program around a model of their own, which it calls through a table of functions, TrainerModel.
#ifndef LLMC_TRAINER_H
#define LLMC_TRAINER_H

#include <sys/statvfs.h>

#include "checkpoint.h"
#include "dataloader.h"
#include "eval_options.h"
#include "logger.h"
#include "model_table.h"
#include "modes.h"
#include "options.h"
#include "tokenizer.h"

// A run stops after so many steps in a row were skipped, as spikes or for a gradient that is not finite.
enum { MAX_BAD_STEPS = 10 };

#ifndef T6_CODE
#define T6_CODE "unknown"       // a checksum of the sources, from the Makefile: all ranks must run the same program
#endif

// ---------------------------------------------------------------------------------------------------------------------
// The contract: the functions of a model that the training program calls. inputs, targets (B, T) and ids are in host
// memory, and free to change when the function returns. All ranks make the same calls in the same order, except that
// each computes the `loss` of its own validation batches, and only rank 0 calls `logits`. A function that fails ends
// the program with one line.

typedef struct T6 T6;

typedef struct {
    const char *title;                                  // first line of --help
    int pad;                                            // widths are stored in multiples of it (model_init)
    void (*start)(TrainOptions *o);                     // sets up threads, GPU, NCCL; called once, first
    void (*describe)(char *out, size_t size);           // device, driver and libraries in one line
    // Prints the memory that the run needs, and ends the program with one line where the machine has less.
    void (*plan)(TrainOptions *o, const Model *m, Logger *log);
    T6 *(*open)(const TrainOptions *o);                 // allocates, for batches up to (o->batch_size, o->seq_len)
    void (*close)(T6 *t6);
    const Model *(*model)(const T6 *t6);
    HostWeights (*host_weights)(T6 *t6, HostCopy copy); // host memory of the weights and moments; the model owns it
    void (*load_weights)(T6 *t6, LoadWhat what);        // loads the values in that memory into the model
    // Sum of the losses of all tokens of B sequences.
    double (*loss)(T6 *t6, const int32_t *inputs, const int32_t *targets, int64_t B);
    // Logits of what follows chosen tokens of ids (n): logits (count, V), row i for ids[positions[i]].
    void (*logits)(T6 *t6, float *logits, const int32_t *ids, int64_t n, const int64_t *positions, int64_t count);
    // Scores tokens after ids (B, T), B * T <= o->batch_size * o->seq_len and T <= o->seq_len.
    void (*score)(T6 *t6, const int32_t *ids, int64_t B, int64_t T, ScoredToken *scored, int64_t count);
    // Round k of a step: forward and backward of micro-batch k * world + rank, every loss weighted by dloss. k = 0
    // starts the step's gradients, later rounds add to them. inputs NULL: this rank has no micro-batch in this round.
    void (*micro_step)(T6 *t6, const int32_t *inputs, const int32_t *targets, double dloss, int64_t k);
    // The next update changes nothing where the step's sum of losses or its norm exceeds these.
    void (*set_limits)(T6 *t6, SpikeLimits limits);
    // Sums over the ranks, clips and updates; step = 1, 2, ... A norm that is not finite changes nothing either. *loss:
    // the sum of all losses of the step; *norm: of its gradient, before clipping.
    void (*update)(T6 *t6, const TrainOptions *o, double lr, int64_t step, double *loss, double *norm);
} TrainerModel;

// A run: all state of the training program.
typedef struct {
    const TrainerModel *ops;
    T6 *t6;
    TrainOptions o;
    Comm comm;
    DataLoader train, val;
    Tokenizer tokenizer;            // of samples; vocab_size 0: there is none
    RunLock lock;                   // of the output folder
    Logger log;
    int64_t last_checkpoint;        // its step, found in --out; -1: none
    TrainState now;                 // what a checkpoint saves: step, place in the data, spikes
    int32_t *inputs, *targets;      // (B, T)
    double flop_per_step;           // of all ranks
    double smooth_seconds;          // per step, for the time that is left; 0: no step yet
} Run;

// The figures of one step, for its log line.
typedef struct {
    double loss;                    // mean over the step's tokens
    double norm, lr, seconds;
    double comm_seconds;            // spent in collectives, part of seconds
    int skipped;
} StepResult;

// ---------------------------------------------------------------------------------------------------------------------
// Plan

// The validation shards of the data set that a training shard belongs to: DIR/NAME_val_*.bin, as a glob, for
// DIR/NAME_train_000001.bin. NULL: there are none. The caller frees it.
LLMC_FN char *val_shards_of_(const char *shard) {
    static const char end[] = "_manifest.json";
    char *set = manifest_of_shard(shard), *pattern = NULL;
    if (!set) return NULL;
    size_t n = strlen(set) - strlen(end), m = 0;
    char *escaped = (char *)xmalloc(2 * n + 1);
    for (size_t i = 0; i < n; i++) {
        if (strchr("[]*?\\", set[i])) escaped[m++] = '\\';
        escaped[m++] = set[i];
    }
    escaped[m] = 0;
    glob_t files;
    pattern = xasprintf("%s_val_*.bin", escaped);
    if (glob(pattern, 0, NULL, &files) != 0) free(pattern), pattern = NULL;
    globfree(&files);
    free(escaped), free(set);
    return pattern;
}

// Opens the validation data. Without --val-data they are those of the training data's set; where it has none, there is
// no validation.
LLMC_FN int open_val_data(Run *run, Error *err) {
    TrainOptions *o = &run->o;
    DataLoader *train = &run->train, *val = &run->val;
    Error why;
    char *own = o->val_every && !o->val_data ? val_shards_of_(train->shards[0].path) : NULL;
    const char *pattern = o->val_data ? o->val_data : own;
    int rc = 0;
    if (o->val_every && !pattern) {
        if (run->comm.rank == 0)
            fprintf(stderr, "note: no validation: %s has no validation shards next to it, and --val-data names none\n",
                    train->shards[0].path);
        o->val_every = 0;
    }
    if (o->val_every && loader_open(val, pattern, o->seq_len, ORDER_SEQUENTIAL, 1, 0, &why) != 0)
        rc = fail(err, "--val-data: %s%s", why.text, own ? "; --val-every 0 trains without validation" : "");
    if (o->val_every && rc == 0 && strcmp(train->vocab, val->vocab))
        rc = fail(err, "--val-data: its tokens are %s, those of --train-data are %s", val->vocab, train->vocab);
    free(own);
    return rc;
}

// Opens the data, and the tokenizer of samples.
LLMC_FN int open_data(Run *run, Error *err) {
    const TrainOptions *o = &run->o;
    DataLoader *train = &run->train;
    Error why;
    LoaderOrder order = o->shuffle ? ORDER_SHUFFLED : ORDER_SEQUENTIAL;
    if (loader_open(train, o->train_data, o->seq_len, order, (uint64_t)o->batch_size, (uint64_t)o->seed, &why) != 0)
        return fail(err, "--train-data: %s", why.text);
    if (open_val_data(run, err) != 0) return -1;
    if (train->windows < (uint64_t)o->batch_size)
        return fail(err, "--train-data: %" PRIu64 " tokens, fewer than one batch of %" PRId64 " x %" PRId64 "; lower "
                    "--batch-size (-b) or --seq-len (-t), or use more data", train->tokens, o->batch_size, o->seq_len);
    if (!strcmp(train->vocab, "bytes")) tokenizer_init_bytes(&run->tokenizer);
    else if (o->sample_every && run->comm.rank == 0 && tokenizer_init_gpt2(&run->tokenizer, o->vocab, &why) != 0)
        fprintf(stderr, "note: samples will be printed as token ids: %s\n", why.text);
    return 0;
}

// Completes the model's configuration from the data.
LLMC_FN int complete_config(Run *run, Error *err) {
    Config *c = &run->o.config;
    if (c->vocab_size == 0) c->vocab_size = run->train.vocab_size;
    if (config_check(c, err) != 0) return -1;
    if (c->vocab_size < run->train.vocab_size)
        return fail(err, "--vocab-size: the model's %" PRId64 " is below the %d of the data", c->vocab_size,
                    run->train.vocab_size);
    return 0;
}

// Reads which checkpoint is the last in the output folder. Checkpoints of an earlier run there are resumed or refused,
// never overwritten.
LLMC_FN int find_checkpoint_(Run *run, Error *err) {
    const TrainOptions *o = &run->o;
    int n;
    int64_t *steps = checkpoint_steps(o->out, &n), last = n ? steps[n - 1] : -1;
    free(steps);
    run->last_checkpoint = last;
    if (o->resume || o->plan) return 0;
    struct stat metrics;
    char *path = xasprintf("%s/metrics.jsonl", o->out);
    int is_empty = stat(path, &metrics) != 0 || metrics.st_size == 0;
    free(path);
    if (last < 0 && is_empty) return 0;
    if (last < 0)
        return fail(err, "--out: %s holds the log of a run without checkpoints: add --resume (-y) to start it again, "
                    "or name another folder", o->out);
    return fail(err, "--out: %s holds a run's checkpoints, the last of step %" PRId64 ": add --resume (-y) to resume "
                "it, or name another folder", o->out, last);
}

// Opens the output folder on rank 0: takes its lock before it looks at anything in it. Returns 0, or an exit code with
// the reason in err.
LLMC_FN int open_output(Run *run, Error *err) {
    const TrainOptions *o = &run->o;
    Error why;
    if (o->plan) return find_checkpoint_(run, err);
    int code = make_dirs(o->out, &why) != 0 ? disk_exit_code(errno) : 0;
    if (!code) code = run_lock_open(&run->lock, o->out, LOCK_BEAT_SECONDS, LOCK_STALE_SECONDS, &why);
    if (code) {
        fail(err, "--out: %s", why.text);
        return code;
    }
    if (find_checkpoint_(run, err) != 0) {
        run_lock_close(&run->lock);
        return EXIT_INPUT;
    }
    checkpoint_clean(o->out);
    if (logger_open(&run->log, o->out, &why) != 0) {
        code = disk_exit_code(errno);
        fail(err, "--out: %s", why.text);
        return code;
    }
    run->log.lock = &run->lock;
    return 0;
}

// Tells all ranks what rank 0 found in the output folder.
LLMC_FN void share_output_(Run *run) {
    char id[sizeof run->lock.id];
    memcpy(id, run->lock.id, sizeof id);
    comm_broadcast(&run->comm, &run->last_checkpoint, sizeof run->last_checkpoint, 0, "last checkpoint's step");
    comm_broadcast(&run->comm, id, sizeof id, 0, "id of the run");
    if (run->comm.rank > 0 && !run->o.plan) run_lock_follow(&run->lock, run->o.out, id);
}

// Whether the output folder here is the one that rank 0 holds. A file server may show its lock a moment later.
LLMC_FN int check_output_(Run *run, Error *err) {
    const char *out = run->o.out;
    Error why;
    int rc = -1;
    for (int i = 0; i < 30 && rc != 0; i++) {
        if (i > 0) usleep(100000);
        rc = run_lock_check(&run->lock, &why);
    }
    if (rc != 0)
        return fail(err, "--out: %s is not the folder that rank 0 writes to; it must be one folder that all ranks "
                    "share", out);
    if (!run->o.plan && access(out, W_OK) != 0)
        return fail(err, "--out: cannot write to %s here: %s; it must be a folder that all ranks share", out,
                    strerror(errno));
    return 0;
}

// The flags of a run, "--name value" on a line each, but those that only concern a host, and those whose names are in
// skip, a list that ends with NULL. The caller frees the text.
LLMC_FN char *flags_text_(TrainOptions *o, const char *const *skip) {
    static const char *const own[] = {"train-data", "val-data", "vocab", "threads", "peak-tflops", "comm-timeout",
                                      "comm-file", "plan", NULL};
    Flag flags[NUM_TRAIN_FLAGS];
    char *text = NULL;
    size_t size = 0;
    FILE *f = open_memstream(&text, &size);
    if (!f) die(EXIT_SYSTEM, "out of memory for the flags of the run");
    for (int i = 0, n = train_flags(o, flags); i < n; i++) {
        int skipped = flags[i].type == FLAG_SECTION;
        for (int k = 0; !skipped && own[k]; k++) skipped = !strcmp(flags[i].name, own[k]);
        for (int k = 0; !skipped && skip[k]; k++) skipped = !strcmp(flags[i].name, skip[k]);
        if (skipped) continue;
        fprintf(f, "--%s ", flags[i].name);
        if (flags[i].type == FLAG_TEXT) fprintf(f, "%s\n", *(const char **)flags[i].value);
        else if (flags[i].type == FLAG_REAL) fprintf(f, "%.15g\n", *(double *)flags[i].value);
        else fprintf(f, "%" PRId64 "\n", *(int64_t *)flags[i].value);
    }
    if (fclose(f) != 0) die(EXIT_SYSTEM, "out of memory for the flags of the run");
    return text;
}

// What all ranks must have in common, one line each: the program, the data, and every flag except a host's own. The
// caller frees it.
LLMC_FN char *run_description(Run *run) {
    static const char *const none[] = {NULL};
    char *flags = flags_text_(&run->o, none);
    char *text = xasprintf("the program's code " T6_CODE "\ntraining shards %016" PRIx64 "\nvalidation shards %016"
                           PRIx64 "\nattention %s\n%s", loader_fingerprint(&run->train),
                           run->o.val_every ? loader_fingerprint(&run->val) : 0, attn_name(run->o.config.attn), flags);
    free(flags);
    return text;
}

// The flags that a checkpoint records, so that a resumed run can say what has changed. The caller frees the text.
LLMC_FN char *recorded_flags_(TrainOptions *o) {
    static const char *const not_recorded[] = {"out", "resume", NULL};
    return flags_text_(o, not_recorded);
}

// Compares this rank's description of the run with rank 0's. -1: they differ, with the first line that does.
LLMC_FN int compare_runs_(Run *run, Error *err) {
    char *mine = run_description(run), first[1 << 14] = "";
    int rc = 0;
    if (run->comm.rank == 0) snprintf(first, sizeof first, "%s", mine);
    comm_broadcast(&run->comm, first, sizeof first, 0, "description of the run");
    for (char *a = mine, *b = first; rc == 0 && (*a || *b); ) {
        size_t na = strcspn(a, "\n"), nb = strcspn(b, "\n");
        if (na != nb || memcmp(a, b, na) != 0)
            rc = fail(err, "%.*s here, %.*s on rank 0: start all ranks with the same program, data and flags", (int)na,
                      a, (int)nb, b);
        a += na + (a[na] == '\n'), b += nb + (b[nb] == '\n');
    }
    free(mine);
    return rc;
}

// Before the first step of several ranks: says who they are, checks that they run the same thing and see one output
// folder, and measures how fast they talk.
LLMC_FN void preflight(Run *run) {
    typedef struct { char host[64], device[192]; } Introduction;
    Comm *comm = &run->comm;
    Error err;
    Introduction me, *all = comm->rank == 0 ? (Introduction *)xcalloc((size_t)comm->world, sizeof *all) : NULL;
    memset(&me, 0, sizeof me);
    memcpy(me.host, comm->host, sizeof me.host);
    run->ops->describe(me.device, sizeof me.device);
    comm_gather(comm, all, &me, sizeof me, 0, "introductions");
    for (int r = 0; comm->rank == 0 && r < comm->world; r++)
        logger_printf(&run->log, "rank %d on %s: %s\n", r, all[r].host, all[r].device);
    free(all);

    comm_check(comm, compare_runs_(run, &err), EXIT_INPUT, &err);
    comm_check(comm, check_output_(run, &err), EXIT_INPUT, &err);

    enum { PROBE = 1 << 17 };
    double *probe = (double *)xcalloc(PROBE, sizeof *probe), seconds = INFINITY;
    for (int i = 0; i < 3; i++) {
        double start = now_seconds();
        comm_sum(comm, probe, PROBE, "first all-reduce");
        seconds = fmin(seconds, now_seconds() - start);
    }
    free(probe);
    logger_printf(&run->log, "all-reduce of 1 MiB of host memory: %.2f ms\n", seconds * 1e3);
}

// Says what the run is: data, model, step, memory, disk. Stops where the machine has too little memory.
LLMC_FN void print_plan(Run *run) {
    TrainOptions *o = &run->o;
    const Config *c = &o->config;
    const DataLoader *train = &run->train;
    Logger *log = &run->log;
    Model m;
    model_init_shared(&m, c, run->ops->pad, run->comm.world);
    double tokens = (double)o->max_steps * (double)o->tokens_per_step;
    logger_printf(log, "data: %d shards, %.4g training tokens (%s), %.4g epochs; order %s\n", train->num_shards,
                  (double)train->tokens, train->vocab, tokens / ((double)train->windows * (double)o->seq_len),
                  o->shuffle ? "shuffled" : "as stored");
    logger_printf(log, "model: %s %s, %.1fM parameters: L %" PRId64 ", C %" PRId64 ", %" PRId64 " heads of %" PRId64
                  ", MLP %" PRId64 ", vocabulary %" PRId64 "\n", o->model, attn_name(c->attn),
                  (double)m.num_parameters / 1e6, c->n_layer, c->n_embd, c->n_head, c->head_dim, m.F, c->vocab_size);
    if (o->checkpoint)
        logger_printf(log, "recipe: preset " CHECKPOINT_RECIPE "'s where no flag says otherwise, as a checkpoint does "
                      "not tell its own\n");
    if (m.k.kind == HEADS_FACTORED)
        logger_printf(log, "factor ranks: q %d, k %d, v %d; the cache takes %" PRId64 " numbers per token and layer, "
                      "MHA's %" PRId64 "\n", m.q.kind == HEADS_FACTORED ? m.q.R : 0, m.k.R, m.v.R,
                      model_cache_width(&m), c->n_head * (m.HSK + m.HSV));
    logger_printf(log, "step: %" PRId64 " x %" PRId64 " x %" PRId64 " = %" PRId64 " tokens (accumulation x batch x "
                  "sequence), %.3g TFLOP; %" PRId64 " steps, %.4g tokens\n", o->accum, o->batch_size, o->seq_len,
                  o->tokens_per_step, run->flop_per_step / 1e12, o->max_steps, tokens);
    if (run->comm.world > 1)
        logger_printf(log, "ranks: %d, ZeRO stage %" PRId64 ": %.3g micro-batches per step and rank%s\n",
                      run->comm.world, o->zero, (double)o->accum / run->comm.world,
                      o->accum % run->comm.world ? "; they do not divide evenly, so some ranks wait" : "");
    run->ops->plan(o, &m, log);
    struct statvfs disk;
    if (!o->plan) {
        double free_bytes = statvfs(o->out, &disk) == 0 ? (double)disk.f_bavail * (double)disk.f_frsize : 0;
        logger_printf(log, "disk: a checkpoint takes %.3g GB; %.4g GB are free in %s\n", checkpoint_bytes(&m) / 1e9,
                      free_bytes / 1e9, o->out);
    }
    model_free(&m);
}

// From the command line to a checked plan. Errors end the program with one line.
LLMC_FN void plan_run(Run *run, int argc, char **argv) {
    Error err;
    TrainOptions *o = &run->o;
    Comm *comm = &run->comm;
    if (flags_asked_for_text(argc, argv)) train_options(o, argc, argv, run->ops->title, &err);  // prints it and exits
    comm_open(comm, argc, argv);
    comm_check(comm, train_options(o, argc, argv, run->ops->title, &err), EXIT_INPUT, &err);
    if (o->table) {
        if (comm->rank == 0) print_model_table();
        comm_close(comm);
        check_stdout();
        exit(0);
    }
    o->comm = comm, comm->timeout_seconds = o->comm_timeout;
    run->ops->start(o);
    run->log.silent = comm->rank != 0;
    comm_check(comm, open_data(run, &err), EXIT_INPUT, &err);
    comm_check(comm, complete_config(run, &err), EXIT_INPUT, &err);
    if (o->comm_timeout > 0) comm->timeout_seconds += LOCK_STALE_SECONDS;       // rank 0 may watch a lock for so long
    int code = comm_failed(comm, comm->rank == 0 ? open_output(run, &err) : 0, &err, "output folder");
    comm_check(comm, code, code, &err);
    share_output_(run);
    stop_on_signals();              // from now on a signal ends the run after its next step
    comm->timeout_seconds = o->comm_timeout;
    logger_printf(&run->log, "%s, commit " T6_COMMIT ", code " T6_CODE "\n", program_name());
    if (run->lock.previous[0])
        logger_printf(&run->log, "%s was in use by %s, which did not end cleanly\n", o->out, run->lock.previous);
    if (comm->world > 1) preflight(run);
    Model m;
    model_init(&m, &o->config, 1);
    run->flop_per_step = model_flop_per_token(&m, o->seq_len) * (double)o->tokens_per_step;
    model_free(&m);
    print_plan(run);
}

// ---------------------------------------------------------------------------------------------------------------------
// Restore

LLMC_FN void init_weights(float *params, const Model *m, uint64_t seed) {
    for (int i = 0; i < m->num_tensors; i++) {
        const Tensor *w = &m->tensors[i];
#ifdef _OPENMP
        #pragma omp parallel for
#endif
        for (int64_t r = 0; r < w->rows; r++)
            for (int64_t c = 0; c < w->cols; c++)
                params[w->offset + (size_t)(r * w->ld + c)] = (float)model_initial_value(m, seed, i, r, c);
    }
}

// Says which flags differ from those of the checkpoint. Flags that either text lacks (another version's) do not count.
LLMC_FN void log_changed_flags_(Run *run, const TrainState *saved) {
    for (const char *line = saved->flags; line && *line; line += strcspn(line, "\n"), line += *line == '\n') {
        int length = (int)strcspn(line, "\n"), name = (int)strcspn(line, " ");
        char *key = xasprintf("%.*s ", name, line), *now = strstr(run->now.flags, key);
        int now_length = now ? (int)strcspn(now, "\n") : 0, same = now_length == length && !memcmp(now, line, length);
        if (now && name < length && !same)
            logger_printf(&run->log, "changed since step %" PRId64 ": %.*s, now%.*s\n", saved->step, length, line,
                          now_length - name, now + name);
        free(key);
    }
}

// Moves the loader to the checkpoint's place in the data, which must be the same data in the same order. With
// --reset-data it stays at the start, but not once more when the same command is run again.
LLMC_FN int restore_data(Run *run, const TrainState *saved, Error *err) {
    const TrainOptions *o = &run->o;
    DataLoader *train = &run->train;
    int again = saved->flags && strstr(saved->flags, "--reset-data 1\n");     // the run that saved it has reset them
    int64_t batch_then = o->shuffle || !saved->batch_size ? o->batch_size : saved->batch_size;
    const struct { const char *what, *flag; int64_t then, now; } same[] = {
        {"seed", "--seed", saved->seed, run->now.seed}, {"shuffling", "--shuffle", saved->shuffle, run->now.shuffle},
        {"sequence length", "--seq-len", saved->seq_len, run->now.seq_len},
        {"set of training shards", "--train-data", saved->shards, run->now.shards},
        {"batch size, by which --shuffle 0 cuts the shards", "--batch-size", batch_then, o->batch_size}};
    int differs = -1;
    for (int i = 4; i >= 0; i--)
        if (same[i].then != same[i].now) differs = i;
    if (o->reset_data && (!again || differs >= 0)) {
        logger_printf(&run->log, "the data start over (--reset-data)\n");
        return 0;
    }
    if (differs >= 0)
        return fail(err, "%s: the checkpoint has a different %s, so its place in the data means nothing here: use "
                    "the same %s, or add --reset-data 1", o->out, same[differs].what, same[differs].flag);
    if (saved->position >= (int64_t)train->windows)
        return fail(err, "%s: the checkpoint's place in the data is beyond the end of the shards; add --reset-data 1 "
                    "to start them over", o->out);
    if (!o->shuffle && !saved->batch_size)
        logger_printf(&run->log, "note: this old checkpoint does not tell its --batch-size, which must be the same "
                      "with --shuffle 0\n");
    train->epoch = (uint64_t)saved->epoch, train->position = (uint64_t)saved->position;
    return 0;
}

// Checks that a checkpoint of this run is whole and of this model.
LLMC_FN int check_resumed_(const char *folder, const Config *config, Error *err) {
    Config saved;
    Error why;
    if (checkpoint_verify(folder, ALL_FILES, &why) != 0 || checkpoint_load_config(folder, &saved, &why) != 0)
        return fail(err, "--resume: %s", why.text);
    if (config_difference(&saved, config, &why) != 0)
        return fail(err, "--resume: %s is of a different model: %s", folder, why.text);
    return 0;
}

// Loads the checkpoint to resume, with optimizer state and place in the data, or the weights of --model's. Rank 0 reads
// and checks the weights; each rank reads its part of the moments.
LLMC_FN void load_checkpoint(Run *run) {
    const TrainOptions *o = &run->o;
    const Model *m = run->ops->model(run->t6);
    HostWeights host = run->ops->host_weights(run->t6, ROOM_ONLY);
    Comm *comm = &run->comm;
    Error err, why;
    int rc = 0, resumed = run->last_checkpoint >= 0;
    char *folder = resumed ? xasprintf("%s/step_%08" PRId64, o->out, run->last_checkpoint)
        : xasprintf("%s", o->checkpoint);
    if (comm->rank == 0 && resumed) rc = check_resumed_(folder, &o->config, &err);
    if (comm->rank == 0 && !resumed && checkpoint_verify_model(folder, &why) != 0)
        rc = fail(&err, "--model: %s", why.text);
    if (comm->rank == 0 && rc == 0 && checkpoint_load_weights(folder, m, host.params, &why) != 0)
        rc = fail(&err, "%s: %s", resumed ? "--resume" : "--model", why.text);
    comm_check(comm, rc, EXIT_INPUT, &err);
    comm_broadcast(comm, host.params, m->num_stored * sizeof *host.params, 0, "weights of a checkpoint");
    if (resumed) {
        TrainState saved;
        if (checkpoint_load_optimizer(folder, m, &host, &saved, &why) != 0 || restore_data(run, &saved, &why) != 0)
            rc = fail(&err, "--resume: %s", why.text);
        else if (saved.step != run->last_checkpoint)
            rc = fail(&err, "--resume: %s is the checkpoint of step %" PRId64 "; give the folder its name back", folder,
                      saved.step);
        comm_check(comm, rc, EXIT_INPUT, &err);
        run->now.step = saved.step, run->now.bad_steps = saved.bad_steps, run->now.skipped = saved.skipped;
        run->now.spikes = saved.spikes;
        logger_printf(&run->log, "resumed from %s\n", folder);
        log_changed_flags_(run, &saved);
        free(saved.flags);
    } else logger_printf(&run->log, "weights from %s\n", folder);
    free(folder);
    run->ops->load_weights(run->t6, resumed ? WEIGHTS_AND_MOMENTS : WEIGHTS_ONLY);
}

LLMC_FN void first_weights(Run *run) {
    const Model *m = run->ops->model(run->t6);
    init_weights(run->ops->host_weights(run->t6, ROOM_ONLY).params, m, (uint64_t)run->o.seed);
    run->ops->load_weights(run->t6, WEIGHTS_ONLY);
}

// The model with its first weights: fresh ones, those of --model's checkpoint, or those of the run that is resumed.
LLMC_FN void restore_run(Run *run) {
    const TrainOptions *o = &run->o;
    size_t tokens = (size_t)(o->batch_size * o->seq_len);
    run->t6 = run->ops->open(o);
    run->inputs = (int32_t *)xmalloc(tokens * sizeof *run->inputs);
    run->targets = (int32_t *)xmalloc(tokens * sizeof *run->targets);
    run->now.seed = o->seed, run->now.shuffle = o->shuffle, run->now.seq_len = o->seq_len;
    run->now.shards = (int64_t)(loader_fingerprint(&run->train) >> 1);
    run->now.batch_size = o->batch_size, run->now.flags = recorded_flags_(&run->o);
    if (run->last_checkpoint >= 0 || o->checkpoint) load_checkpoint(run);
    else first_weights(run);
    Error err;
    int rc = run->comm.rank == 0 ? logger_open_metrics(&run->log, run->last_checkpoint, &err) : 0;
    comm_check(&run->comm, rc, EXIT_SYSTEM, &err);
}

// ---------------------------------------------------------------------------------------------------------------------
// Step

// One step: all its micro-batches, of which number i goes to rank i % world, and the update.
LLMC_FN StepResult train_step(Run *run) {
    const TrainOptions *o = &run->o;
    Comm *comm = &run->comm;
    TrainState *now = &run->now;
    Error err;
    StepResult r;
    double start = now_seconds(), waited = comm->seconds, tokens = (double)o->tokens_per_step;
    SpikeLimits limits = spike_limits(&now->spikes, o->skip_spikes);
    limits.loss *= tokens;
    run->ops->set_limits(run->t6, limits);
    r.lr = schedule_lr(&o->schedule, (long)now->step);
    comm->step = ++now->step;
    for (int64_t k = 0; k * comm->world < o->accum; k++) {
        int64_t micro = k * comm->world + comm->rank;
        int mine = micro < o->accum;
        uint64_t window = (uint64_t)(micro * o->batch_size);
        if (mine && loader_read(&run->train, window, o->batch_size, run->inputs, run->targets, &err) != 0)
            die(EXIT_INPUT, "--train-data: %s", err.text);
        run->ops->micro_step(run->t6, mine ? run->inputs : NULL, mine ? run->targets : NULL, 1.0 / tokens, k);
    }
    if (!o->overfit) loader_advance(&run->train, (uint64_t)(o->accum * o->batch_size));
    run->ops->update(run->t6, o, r.lr, now->step, &r.loss, &r.norm);

    int is_spike = r.loss > limits.loss || r.norm > limits.norm;
    r.skipped = !isfinite(r.norm) || is_spike;
    r.loss /= tokens;
    if (!r.skipped) now->bad_steps = 0, spikes_add(&now->spikes, r.loss, r.norm);
    else {
        int rc = 0;
        now->skipped++;
        if (++now->bad_steps >= MAX_BAD_STEPS)
            rc = fail(&err, "step %" PRId64 ": %d steps in a row were skipped, the last because %s; lower --lr and "
                      "resume from a checkpoint", now->step, MAX_BAD_STEPS,
                      is_spike ? "of a spike (--skip-spikes)" : "the gradient is not finite");
        comm_check(comm, rc, EXIT_SYSTEM, &err);
    }
    r.seconds = now_seconds() - start, r.comm_seconds = comm->seconds - waited;
    return r;
}

// ---------------------------------------------------------------------------------------------------------------------
// Evaluate

// Mean loss over the first val_tokens tokens of the validation data (0: all), in whole windows; each counts once.
// Micro-batch i is rank i % world's; losses are added in the order of the data, so the mean does not depend on the
// number of ranks, nor on the batch size, but for rounding.
LLMC_FN double validate(Run *run) {
    const TrainOptions *o = &run->o;
    DataLoader *val = &run->val;
    Error err;
    double total = 0;
    uint64_t B = (uint64_t)o->batch_size, windows = val->windows, T = (uint64_t)o->seq_len;
    uint64_t wanted = ((uint64_t)o->val_tokens + T - 1) / T;
    if (wanted > 0 && wanted < windows) windows = wanted;
    uint64_t batches = (windows + B - 1) / B, first = (uint64_t)run->comm.rank, world = (uint64_t)run->comm.world;
    double *losses = (double *)xcalloc(batches, sizeof *losses);
    val->epoch = val->position = 0;
    for (uint64_t i = first; i < batches; i += world) {
        int64_t rows = (int64_t)(windows - i * B < B ? windows - i * B : B);
        if (loader_read(val, i * B, rows, run->inputs, run->targets, &err) != 0) die(EXIT_INPUT, "--val-data: %s",
                                                                                     err.text);
        losses[i] = run->ops->loss(run->t6, run->inputs, run->targets, rows);
    }
    comm_sum(&run->comm, losses, batches, "validation losses");
    for (uint64_t i = 0; i < batches; i++) total += losses[i];
    free(losses);
    return total / ((double)windows * (double)o->seq_len);
}

LLMC_FN void log_validation(Run *run, double loss) {
    int64_t step = run->now.step;
    double bytes = run->val.bytes_per_token, bits = bytes > 0 ? loss / M_LN2 / bytes : NAN;
    logger_printf(&run->log, "val %" PRId64 "/%" PRId64 " | loss %.4f", step, run->o.max_steps, loss);
    if (bytes > 0) logger_printf(&run->log, " | %.4f bits/byte", bits);
    logger_printf(&run->log, "\n");
    logger_metrics(&run->log, "step", (double)step, VAL_METRIC, loss, "val_bits_per_byte", bits, NULL);
}

// Prints text that the model continues from end-of-text, of tokens that the data have. Each token runs the whole
// sequence again; generate_t6 is the fast way. Rank 0 works; the others wait, token by token.
LLMC_FN void sample(Run *run) {
    const TrainOptions *o = &run->o;
    const Tokenizer *tokenizer = &run->tokenizer;
    Logger *log = &run->log;
    Comm *comm = &run->comm;
    int V = (int)run->o.config.vocab_size, eot = run->train.eot;
    SamplerOptions sampler = o->sampler;
    sampler.known = run->train.vocab_size;
    int64_t n = o->sample_tokens < o->seq_len ? o->sample_tokens : o->seq_len, done = 0;
    if (comm->rank > 0) {
        while (comm_rank_0_works(comm, 0, "sample of rank 0")) {}
        return;
    }
    int32_t *ids = (int32_t *)xmalloc((size_t)(n + 1) * sizeof *ids);
    float *logits = (float *)xmalloc((size_t)V * sizeof *logits);
    uint64_t stream = rng_stream((uint64_t)o->seed ^ 0x73616d706c65, (uint64_t)run->now.step);     // "sample"
    ids[0] = eot;
    logger_printf(log, "--- sample\n");
    for (; done < n; done++) {
        comm_rank_0_works(comm, 1, "sample of rank 0");
        run->ops->logits(run->t6, logits, ids, done + 1, &done, 1);
        int32_t id = ids[done + 1] = sample_token(logits, V, &sampler, rng_uniform(stream, (uint64_t)done));
        if (id == eot) break;
        size_t bytes;
        const char *text = tokenizer->vocab_size ? tokenizer_decode(tokenizer, id, &bytes) : NULL;
        if (text) logger_printf(log, "%.*s", (int)bytes, text);
        else logger_printf(log, " %d", id);
    }
    comm_rank_0_works(comm, 0, "sample of rank 0");
    if (done == 0) logger_printf(log, "(end of text)");
    logger_printf(log, "\n---\n");
    logger_metrics(log, "step", (double)run->now.step, SAMPLE_METRIC, (double)done, NULL);
    free(logits);
    free(ids);
}

// ---------------------------------------------------------------------------------------------------------------------
// Log and save

LLMC_FN void log_step(Run *run, const StepResult *r) {
    const TrainOptions *o = &run->o;
    int64_t step = run->now.step;
    double speed = (double)o->tokens_per_step / r->seconds, flops = run->flop_per_step / r->seconds;
    run->smooth_seconds = run->smooth_seconds == 0 ? r->seconds : 0.9 * run->smooth_seconds + 0.1 * r->seconds;
    double bits = run->train.bytes_per_token > 0 ? r->loss / M_LN2 / run->train.bytes_per_token : NAN;
    char percent[32] = "", left[32], bits_per_byte[48] = "";
    if (isfinite(bits)) snprintf(bits_per_byte, sizeof bits_per_byte, " | %.4f bits/byte", bits);
    if (o->peak_tflops > 0)
        snprintf(percent, sizeof percent, " | %.1f%% of peak", flops / 1e10 / o->peak_tflops / run->comm.world);
    format_duration(left, run->smooth_seconds * (double)(o->max_steps - step));
    logger_printf(&run->log, "step %" PRId64 "/%" PRId64 " | loss %.4f%s | norm %.3f%s | lr %.2e | %.0f ms | %.0f "
                  "tok/s%s | %s left\n", step, o->max_steps, r->loss, bits_per_byte, r->norm,
                  r->skipped ? " SKIPPED" : "", r->lr, r->seconds * 1e3, speed, percent, left);
    logger_metrics(&run->log, "step", (double)step, "loss", r->loss, "norm", r->norm, "lr", r->lr, "ms",
                   r->seconds * 1e3, "comm_ms", r->comm_seconds * 1e3, "tokens_per_second", speed, "gflops",
                       flops / 1e9, "skipped", (double)run->now.skipped, NULL);
}

LLMC_FN void save_checkpoint(Run *run) {
    const TrainOptions *o = &run->o;
    Error err, why;
    HostWeights host = run->ops->host_weights(run->t6, WITH_VALUES);
    run->now.epoch = (int64_t)run->train.epoch, run->now.position = (int64_t)run->train.position;
    int rc = checkpoint_save(o->out, &run->lock, run->ops->model(run->t6), &host, &run->now, &run->comm, &why);
    if (rc == 0 && run->comm.rank == 0) rc = checkpoint_prune(o->out, &run->lock, o->keep, o->keep_every, &why);
    if (rc != 0) fail(&err, "checkpoint of step %" PRId64 ": %.900s", run->now.step, why.text);
    comm_check(&run->comm, rc, EXIT_SYSTEM, &err);
}

// ---------------------------------------------------------------------------------------------------------------------
// The program

// Validates and samples where that is due after run->now.step and not `done` yet.
LLMC_FN void evaluate(Run *run, Evaluated done) {
    const TrainOptions *o = &run->o;
    int64_t step = run->now.step, last = step >= o->max_steps;
    if (!done.validated && o->val_every && (last || step % o->val_every == 0)) log_validation(run, validate(run));
    if (!done.sampled && o->sample_every && (last || step % o->sample_every == 0)) sample(run);
}

// Saves, validates and samples where that is due after a step. It saves first, so that no later failure costs weights.
// Returns 1 where the run ends here: after the last step, or after a signal.
LLMC_FN int after_step(Run *run, int stop) {
    const TrainOptions *o = &run->o;
    int64_t step = run->now.step;
    int last = step >= o->max_steps;
    if (o->save_every && (last || stop || step % o->save_every == 0)) save_checkpoint(run);
    if (stop && !last) {
        logger_printf(&run->log, "stopped by a signal at step %" PRId64 "%s\n", step, o->save_every
                      ? "; run the same command with --resume to continue" : ", without a checkpoint (--save-every 0)");
        return 1;
    }
    evaluate(run, (Evaluated){0, 0});
    return last;
}

LLMC_FN void train_steps(Run *run) {
    int done = run->now.step >= run->o.max_steps;
    if (run->last_checkpoint >= 0) {        // the run may have been killed between saving this step and evaluating it
        Evaluated before = run->log.evaluated;
        comm_broadcast(&run->comm, &before, sizeof before, 0, "what was evaluated");
        evaluate(run, before);
        if (done) logger_printf(&run->log, "nothing to do: the run has done %" PRId64 " of --steps %" PRId64 "\n",
                                run->now.step, run->o.max_steps);
    } else if (done) after_step(run, 0);    // no step at all: saves and evaluates the initial weights
    while (!done) {
        StepResult r = train_step(run);
        log_step(run, &r);
        done = after_step(run, comm_any(&run->comm, stop_requested(), "asked to stop?"));
    }
}

LLMC_FN void close_run(Run *run) {
    loader_close(&run->train);
    if (run->o.val_every) loader_close(&run->val);
    tokenizer_free(&run->tokenizer);
    if (run->t6) run->ops->close(run->t6);
    free(run->inputs), free(run->targets), free(run->now.flags);
    train_options_free(&run->o);
    logger_close(&run->log);
    run_lock_close(&run->lock);
    comm_close(&run->comm);
}

LLMC_FN int trainer_main(int argc, char **argv, const TrainerModel *ops) {
    program_start(argv[0]);
    Run *run = (Run *)xcalloc(1, sizeof *run);
    run->ops = ops;
    survive_a_lost_screen();
    plan_run(run, argc, argv);          // flags, data, output folder, memory
    if (run->o.plan) check_stdout();
    else {
        restore_run(run);               // weights, fresh or from a checkpoint
        train_steps(run);               // step, log, save, evaluate
    }
    close_run(run);
    free(run);
    return 0;
}

#endif
