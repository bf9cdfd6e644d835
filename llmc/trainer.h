// The training program: command line, data, checkpoints, the loop and its log. Both trainers are this program around a model of
// their own, which they reach it through by the functions declared below.
#ifndef LLMC_TRAINER_H
#define LLMC_TRAINER_H

#include <sys/statvfs.h>

#include "checkpoint.h"
#include "dataloader.h"
#include "logger.h"
#include "options.h"
#include "tokenizer.h"

enum { MAX_BAD_STEPS = 10 };    // skipped in a row, before a run stops: gradients that are not finite, or spikes

#ifndef T6_CODE
#define T6_CODE "unknown"       // a checksum of the sources, from the Makefile: ranks must run the same program
#endif

// ---------------------------------------------------------------------------------------------------------------------
// What a trainer provides. inputs, targets (B, T): in host memory, free to change when the function returns.

typedef struct T6 T6;

int trainer_pad(void);                              // what storage is padded to (model_init)
void trainer_start(TrainOptions *o);                // sets up the machine
void trainer_describe(char *out, size_t size);      // the device, driver and libraries in one line
// Prints what memory the run takes, and stops where the machine has less.
void trainer_plan(const TrainOptions *o, const Model *m, Logger *log);
T6 *trainer_open(const TrainOptions *o);            // allocates, for batches up to (o->batch_size, o->seq_len)
void trainer_close(T6 *t);
const Model *trainer_model(T6 *t);
HostWeights trainer_host_weights(T6 *t, int read);  // host memory for them; read: with what the model has now (a collective)
void trainer_take_weights(T6 *t, int moments);      // the model takes over what is there: weights, and moments if there are any
double trainer_loss(T6 *t, const int32_t *inputs, const int32_t *targets, int64_t B);   // sum of the losses of B sequences
// Forward and backward of this rank's micro-batch number k of a step, which is number k * world + rank of all; gradients add up. Each
// loss weighs dloss. inputs NULL: micro-batches did not go round, and this rank has none (a collective all the same).
void trainer_micro_step(T6 *t, const int32_t *inputs, const int32_t *targets, double dloss, int64_t k);
// Steps whose sum of losses or whose norm is above these, or not finite, change nothing. At first: INFINITY.
void trainer_limits(T6 *t, SpikeLimits limits);
// Sums up over the ranks, clips and updates. Gives the sum of the step's losses and the norm of its gradient.
void trainer_update(T6 *t, const TrainOptions *o, double lr, int64_t step, double *loss, double *norm);
void trainer_logits(T6 *t, float *logits, const int32_t *ids, int64_t n);   // logits (V) of what follows n tokens

// ---------------------------------------------------------------------------------------------------------------------
// The program

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

// Says what the run is; how much memory it takes is the trainer's to say.
LLMC_FN void print_plan(const TrainOptions *o, const Model *m, Logger *log) {
    const Config *c = &m->config;
    logger_printf(log, "model: %s %s, %.1fM parameters: L %" PRId64 ", C %" PRId64 ", %" PRId64 " heads of %" PRId64 ", MLP %" PRId64
                  ", vocabulary %" PRId64 "\n", o->model, attn_name(c->attn), (double)m->num_parameters / 1e6, c->n_layer, c->n_embd,
                  c->n_head, c->head_dim, m->F, c->vocab_size);
    if (c->attn == ATTN_TPA || c->attn == ATTN_TPA_KVONLY)
        logger_printf(log, "ranks: q %d, k %d, v %d; a token's cache is %" PRId64 " numbers a layer, MHA's would be %" PRId64 "\n",
                      m->q.kind == HEADS_FACTORED ? m->q.R : 0, m->k.R, m->v.R, (m->k.R + m->v.R) * (c->n_head + c->head_dim), 2 * m->D);
    logger_printf(log, "step: %" PRId64 " x %" PRId64 " x %" PRId64 " = %" PRId64 " tokens (accumulation x batch x sequence), %.3g TFLOP; "
                  "%" PRId64 " steps, %.4g tokens\n", o->accum, o->batch_size, o->seq_len, o->tokens_per_step,
                  model_flop_per_token(m, o->seq_len) * (double)o->tokens_per_step / 1e12,
                  o->max_steps, (double)o->max_steps * (double)o->tokens_per_step);
    if (comm_world(o->comm) > 1)
        logger_printf(log, "ranks: %d, ZeRO stage %" PRId64 ": a step is %.3g micro-batches to each%s\n", o->comm->world, o->zero,
                      (double)o->accum / o->comm->world, o->accum % o->comm->world ? "; they do not go round, and ranks wait for each other" : "");
    trainer_plan(o, m, log);
}

// Mean loss over the first val_batches micro-batches of the validation data (0: all); each window counts once. Ranks take turns; the
// losses are added in the order of the data, so that the mean does not depend on how many ranks there are.
LLMC_FN double validate(T6 *t, DataLoader *val, int32_t *inputs, int32_t *targets, const TrainOptions *o) {
    Error err;
    double total = 0;
    uint64_t windows = val->windows, wanted = (uint64_t)(o->val_batches * o->batch_size), B = (uint64_t)o->batch_size;
    if (wanted > 0 && wanted < windows) windows = wanted;
    uint64_t batches = (windows + B - 1) / B;
    double *losses = (double *)xcalloc(batches, sizeof *losses);
    val->epoch = val->position = 0;
    for (uint64_t i = (uint64_t)comm_rank(o->comm); i < batches; i += (uint64_t)comm_world(o->comm)) {
        int64_t rows = (int64_t)(windows - i * B < B ? windows - i * B : B);
        if (loader_read(val, i * B, rows, inputs, targets, &err) != 0) die(EXIT_INPUT, "%s", err.text);
        losses[i] = trainer_loss(t, inputs, targets, rows);
    }
    comm_sum(o->comm, losses, batches, "validation losses");
    for (uint64_t i = 0; i < batches; i++) total += losses[i];
    free(losses);
    return total / ((double)windows * (double)o->seq_len);
}

// Prints text that the model makes up from end-of-text on. Every token runs the whole sequence again: this is the plain way.
LLMC_FN void sample(T6 *t, const Tokenizer *tokenizer, int eot, const TrainOptions *o, int64_t step, Logger *log) {
    int V = (int)trainer_model(t)->config.vocab_size;
    int64_t n = o->sample_tokens < o->seq_len ? o->sample_tokens : o->seq_len - 1;
    int32_t *ids = (int32_t *)xmalloc((size_t)(n + 1) * sizeof *ids);
    float *logits = (float *)xmalloc((size_t)V * sizeof *logits);
    uint64_t stream = rng_stream((uint64_t)o->seed ^ 0x73616d706c65, (uint64_t)step);
    ids[0] = eot;
    logger_printf(log, "--- sample\n");
    for (int64_t i = 0; i < n; i++) {
        trainer_logits(t, logits, ids, i + 1);
        ids[i + 1] = sample_token(logits, V, &o->sampler, rng_uniform(stream, (uint64_t)i));
        if (ids[i + 1] == eot) break;
        size_t bytes;
        int known = tokenizer->vocab_size && ids[i + 1] < tokenizer->vocab_size;
        const char *text = known ? tokenizer_decode(tokenizer, ids[i + 1], &bytes) : NULL;
        if (text) logger_printf(log, "%.*s", (int)bytes, text);
        else logger_printf(log, " %d", ids[i + 1]);
    }
    logger_printf(log, "\n---\n");
    free(logits);
    free(ids);
}

// Checks that a resumed run reads on in the same data, or begins them anew when asked to.
LLMC_FN int resume_data(DataLoader *train, const TrainState *state, const TrainState *now, const TrainOptions *o, Error *err) {
    if (o->reset_data) return 0;
    const struct { const char *what, *flag; int64_t then, now; } same[] = {
        {"seed", "--seed", state->seed, now->seed}, {"shuffling", "--shuffle", state->shuffle, now->shuffle},
        {"sequence length", "--seq-len", state->seq_len, now->seq_len},
        {"set of training shards", "--train-data", state->shards, now->shards}};
    for (int i = 0; i < 4; i++)
        if (same[i].then != same[i].now)
            return fail(err, "%s: the checkpoint's %s is another (%s); its place in the data means nothing here: give it back, "
                        "or add --reset-data 1",
                        o->out, same[i].what, same[i].flag);
    if (state->position >= (int64_t)train->windows)
        return fail(err, "%s: the checkpoint's place in the data is beyond the shards' end; add --reset-data 1 to begin them anew", o->out);
    train->epoch = (uint64_t)state->epoch, train->position = (uint64_t)state->position;
    return 0;
}

// What all ranks must have in common, one line each: the program, the data, and every flag but those of a host.
LLMC_FN char *run_description(TrainOptions *o, const DataLoader *train, const DataLoader *val) {
    static const char *const own[] = {"train-data", "val-data", "vocab", "threads", "peak-tflops", "comm-timeout", "comm-file", "plan"};
    Flag flags[NUM_TRAIN_FLAGS];
    char *text = NULL;
    size_t size = 0;
    FILE *f = open_memstream(&text, &size);
    if (!f) die(EXIT_SYSTEM, "out of memory for the description of the run");
    fprintf(f, "program's code " T6_CODE "\ntraining shards %016" PRIx64 "\nvalidation shards %016" PRIx64 "\nmodel's attention %s\n",
            loader_fingerprint(train), o->val_every ? loader_fingerprint(val) : 0, attn_name(o->config.attn));
    for (int i = 0, n = train_flags(o, flags); i < n; i++) {
        int skip = flags[i].type == FLAG_SECTION;
        for (size_t k = 0; k < sizeof own / sizeof *own && !skip; k++) skip = !strcmp(flags[i].name, own[k]);
        if (skip) continue;
        fprintf(f, "--%s ", flags[i].name);
        if (flags[i].type == FLAG_TEXT) fprintf(f, "%s\n", *(const char **)flags[i].value);
        else if (flags[i].type == FLAG_REAL) fprintf(f, "%.15g\n", *(double *)flags[i].value);
        else fprintf(f, "%" PRId64 "\n", *(int64_t *)flags[i].value);
    }
    if (fclose(f) != 0) die(EXIT_SYSTEM, "out of memory for the description of the run");
    return text;
}

// Before the first step of several ranks: who they are, that they run the same thing and see one output folder, and how fast they talk.
LLMC_FN void preflight(TrainOptions *o, const DataLoader *train, const DataLoader *val, Logger *log) {
    typedef struct { char host[64], device[192]; } Introduction;
    Comm *c = o->comm;
    Error err;
    Introduction me, *all = c->rank == 0 ? (Introduction *)xcalloc((size_t)c->world, sizeof *all) : NULL;
    memset(&me, 0, sizeof me);
    memcpy(me.host, c->host, sizeof me.host);
    trainer_describe(me.device, sizeof me.device);
    comm_gather(c, all, &me, sizeof me, 0, "introductions");
    for (int r = 0; c->rank == 0 && r < c->world; r++) logger_printf(log, "rank %d on %s: %s\n", r, all[r].host, all[r].device);
    free(all);

    char *mine = run_description(o, train, val), first[1 << 14] = "";
    int rc = 0;
    if (c->rank == 0) snprintf(first, sizeof first, "%s", mine);
    comm_broadcast(c, first, sizeof first, 0, "description of the run");
    for (char *a = mine, *b = first; rc == 0 && (*a || *b); ) {
        size_t na = strcspn(a, "\n"), nb = strcspn(b, "\n");
        if (na != nb || memcmp(a, b, na) != 0) rc = fail(&err, "%.*s here, %.*s on rank 0: all ranks must be started alike", (int)na, a, (int)nb, b);
        a += na + (a[na] == '\n'), b += nb + (b[nb] == '\n');
    }
    free(mine);
    comm_check(c, rc, EXIT_INPUT, &err);
    if (!o->plan && access(o->out, W_OK) != 0)
        rc = fail(&err, "--out: %s cannot be written here: %s; it must be a folder that all ranks share", o->out, strerror(errno));
    comm_check(c, rc, EXIT_INPUT, &err);

    enum { PROBE = 1 << 17 };
    double *probe = (double *)xcalloc(PROBE, sizeof *probe), seconds = INFINITY;
    for (int i = 0; i < 3; i++) {
        double start = now_seconds();
        comm_sum(c, probe, PROBE, "first all-reduce");
        seconds = fmin(seconds, now_seconds() - start);
    }
    free(probe);
    logger_printf(log, "all-reduce of 1 MiB between hosts' memories: %.2f ms\n", seconds * 1e3);
}

// The data and the tokenizer of samples.
LLMC_FN int open_data(const TrainOptions *o, DataLoader *train, DataLoader *val, Tokenizer *tokenizer, Error *err) {
    Error why;
    memset(tokenizer, 0, sizeof *tokenizer);
    memset(val, 0, sizeof *val);
    LoaderOrder order = o->shuffle ? ORDER_SHUFFLED : ORDER_SEQUENTIAL;
    if (loader_open(train, o->train_data, o->seq_len, order, (uint64_t)o->batch_size, (uint64_t)o->seed, &why) != 0)
        return fail(err, "--train-data: %s", why.text);
    if (o->val_every && loader_open(val, o->val_data, o->seq_len, ORDER_SEQUENTIAL, 1, 0, &why) != 0) return fail(err, "--val-data: %s", why.text);
    if (o->val_every && strcmp(train->vocab, val->vocab))
        return fail(err, "--val-data: its tokens are %s, those of --train-data %s", val->vocab, train->vocab);
    if (train->windows < (uint64_t)o->batch_size)
        return fail(err, "--train-data: %llu tokens, fewer than one batch of %lld x %lld; lower --batch-size (-b) or "
                    "--seq-len (-t), or bring more data",
                    (unsigned long long)train->tokens, (long long)o->batch_size, (long long)o->seq_len);
    if (!strcmp(train->vocab, "bytes")) tokenizer_init_bytes(tokenizer);
    else if (o->sample_every && comm_rank(o->comm) == 0 && tokenizer_init_gpt2(tokenizer, o->vocab, &why) != 0)
        fprintf(stderr, "note: samples will be printed as token ids: %s\n", why.text);
    return 0;
}

// Completes the model's configuration from the data.
LLMC_FN int complete_config(TrainOptions *o, const DataLoader *train, Error *err) {
    if (o->config.vocab_size == 0) o->config.vocab_size = train->vocab_size;
    if (config_check(&o->config, err) != 0) return -1;
    if (o->config.vocab_size < train->vocab_size)
        return fail(err, "--vocab-size: the model's %" PRId64 " is below the %d of the data", o->config.vocab_size, train->vocab_size);
    return 0;
}

// The output folder: an earlier run's checkpoints are gone on from, or refused, never overwritten. last: the newest one's step, or -1.
LLMC_FN int open_output(const TrainOptions *o, int64_t *last, Logger *log, Error *err) {
    Error why;
    int n;
    int64_t *steps = checkpoint_steps(o->out, &n);
    *last = n ? steps[n - 1] : -1;
    free(steps);
    if (*last >= 0 && !o->resume && !o->plan)
        return fail(err, "--out: %s holds a run's checkpoints, the last of step %" PRId64 ": add --resume (-y) to go on, or name "
                    "another folder", o->out, *last);
    if (!o->plan && (make_dirs(o->out, &why) != 0 || logger_open(log, o->out, *last, &why) != 0)) return fail(err, "--out: %s", why.text);
    return 0;
}

// Initial weights, or those of a checkpoint. Rank 0 reads weights and judges; each rank reads its part of the moments.
LLMC_FN void load_weights(T6 *t, TrainOptions *o, int64_t last, DataLoader *train, TrainState *now, Logger *log) {
    const Model *m = trainer_model(t);
    HostWeights host = trainer_host_weights(t, 0);
    Comm *comm = o->comm;
    Error err, why;
    int rc = 0, first = comm_rank(comm) == 0;
    if (last < 0 && find_preset(o->model)) init_weights(host.params, m, (uint64_t)o->seed);
    else {
        char *folder = last < 0 ? xasprintf("%s", o->model) : xasprintf("%s/step_%08" PRId64, o->out, last);
        Config saved;
        if (first && last >= 0) {
            if (checkpoint_verify(folder, ALL_FILES, &why) != 0 || checkpoint_load_config(folder, &saved, &why) != 0)
                rc = fail(&err, "--resume: %s", why.text);
            else if (config_difference(&saved, &o->config, &why) != 0) rc = fail(&err, "--resume: %s is of another model: %s", folder, why.text);
        }
        if (first && rc == 0 && checkpoint_load_weights(folder, m, host.params, &why) != 0)
            rc = fail(&err, "%s: %s", last < 0 ? "--model" : "--resume", why.text);
        comm_check(comm, rc, EXIT_INPUT, &err);
        comm_broadcast(comm, host.params, m->num_stored * sizeof *host.params, 0, "weights of a checkpoint");
        if (last >= 0) {
            TrainState state;
            if (checkpoint_load_optimizer(folder, m, &host, &state, &why) != 0 || resume_data(train, &state, now, o, &why) != 0)
                rc = fail(&err, "--resume: %s", why.text);
            comm_check(comm, rc, EXIT_INPUT, &err);
            now->step = state.step, now->bad_steps = state.bad_steps, now->skipped = state.skipped, now->spikes = state.spikes;
            logger_printf(log, "resumed from %s\n", folder);
        }
        free(folder);
    }
    trainer_take_weights(t, last >= 0);
}

LLMC_FN int trainer_main(int argc, char **argv, const char *title) {
    Error err, why;
    TrainOptions o;
    Comm comm;
    DataLoader train, val;
    Tokenizer tokenizer;
    Logger log;
    Model planned;
    int64_t last;
    set_program_name(argv[0]);
    comm_open(&comm, argc, argv);
    comm_check(&comm, train_options(&o, argc, argv, title, checkpoint_load_config, &err), EXIT_INPUT, &err);
    o.comm = &comm, comm.timeout_seconds = o.comm_timeout;
    trainer_start(&o);
    memset(&log, 0, sizeof log);
    log.silent = comm.rank != 0;
    comm_check(&comm, open_data(&o, &train, &val, &tokenizer, &err), EXIT_INPUT, &err);
    comm_check(&comm, complete_config(&o, &train, &err), EXIT_INPUT, &err);
    comm_check(&comm, comm.rank == 0 ? open_output(&o, &last, &log, &err) : 0, EXIT_INPUT, &err);
    comm_broadcast(&comm, &last, sizeof last, 0, "last checkpoint's step");
    if (comm.world > 1) preflight(&o, &train, &val, &log);
    model_init_shared(&planned, &o.config, trainer_pad(), comm.world);
    logger_printf(&log, "data: %d shards, %.4g training tokens (%s), %.4g epochs; order %s\n", train.num_shards, (double)train.tokens,
                  train.vocab, (double)o.max_steps * (double)o.tokens_per_step / ((double)train.windows * (double)o.seq_len),
                  o.shuffle ? "shuffled" : "as the shards stand");
    print_plan(&o, &planned, &log);
    struct statvfs disk;
    double free_bytes = !o.plan && statvfs(o.out, &disk) == 0 ? (double)disk.f_bavail * (double)disk.f_frsize : 0;
    if (!o.plan)
        logger_printf(&log, "disk: a checkpoint is %.3g GB, %.4g GB are free in %s\n", checkpoint_bytes(&planned) / 1e9, free_bytes / 1e9,
                      o.out);
    model_free(&planned);
    if (o.plan) {
        loader_close(&train);
        if (o.val_every) loader_close(&val);
        tokenizer_free(&tokenizer);
        comm_close(&comm);
        return 0;
    }

    T6 *t = trainer_open(&o);
    const Model *model = trainer_model(t);
    TrainState now;
    memset(&now, 0, sizeof now);
    now.seed = o.seed, now.shuffle = o.shuffle, now.seq_len = o.seq_len, now.shards = (int64_t)(loader_fingerprint(&train) >> 1);
    load_weights(t, &o, last, &train, &now, &log);
    int32_t *inputs = (int32_t *)xmalloc((size_t)(o.batch_size * o.seq_len) * sizeof *inputs);
    int32_t *targets = (int32_t *)xmalloc((size_t)(o.batch_size * o.seq_len) * sizeof *targets);

    // Training: save first, then evaluate, then sample, so that nothing that fails later costs weights
    double flop = model_flop_per_token(model, o.seq_len) * (double)o.tokens_per_step, smooth_seconds = 0;
    stop_on_signals();
    for (int64_t first_step = now.step; ; ) {
        int64_t step = now.step;
        int is_last = step >= o.max_steps, is_start = step == first_step, stop = !is_start && comm_any(&comm, *stop_requested_(), "asked to stop?");
        if (!is_start || o.max_steps == 0) {
            now.epoch = (int64_t)train.epoch, now.position = (int64_t)train.position;
            if (o.save_every && (is_last || stop || step % o.save_every == 0)) {
                HostWeights host = trainer_host_weights(t, 1);
                int rc = checkpoint_save(o.out, model, &host, &now, &comm, &why);
                if (rc == 0 && comm.rank == 0) rc = checkpoint_prune(o.out, o.keep, o.keep_every, &why);
                if (rc != 0) fail(&err, "checkpoint of step %" PRId64 ": %.900s", step, why.text);
                comm_check(&comm, rc, EXIT_SYSTEM, &err);
            }
            if (stop && !is_last) {
                logger_printf(&log, "stopped by a signal at step %" PRId64 "%s\n", step,
                              o.save_every ? "; the same command with --resume goes on" : ", without a checkpoint (--save-every 0)");
                break;
            }
            if (o.val_every && (is_last || step % o.val_every == 0)) {
                double loss = validate(t, &val, inputs, targets, &o);
                double bits = val.bytes_per_token > 0 ? loss / M_LN2 / val.bytes_per_token : NAN;
                logger_printf(&log, "val %" PRId64 "/%" PRId64 " | loss %.4f", step, o.max_steps, loss);
                if (val.bytes_per_token > 0) logger_printf(&log, " | %.4f bits/byte", bits);
                logger_printf(&log, "\n");
                logger_metrics(&log, "step", (double)step, "val_loss", loss, "val_bits_per_byte", bits, NULL);
            }
            if (o.sample_every && comm.rank == 0 && (is_last || step % o.sample_every == 0)) sample(t, &tokenizer, train.eot, &o, step, &log);
        }
        if (is_last) break;

        // One step: its micro-batches go round the ranks
        double start = now_seconds(), waited = comm.seconds, loss, norm, lr = schedule_lr(&o.schedule, (long)step);
        SpikeLimits limits = spike_limits(&now.spikes, o.skip_spikes);
        limits.loss *= (double)o.tokens_per_step;
        trainer_limits(t, limits);
        step = ++now.step, comm.step = step;
        for (int64_t k = 0; k * comm.world < o.accum; k++) {
            int64_t micro = k * comm.world + comm.rank;
            int mine = micro < o.accum;
            if (mine && loader_read(&train, (uint64_t)(micro * o.batch_size), o.batch_size, inputs, targets, &err) != 0)
                die(EXIT_INPUT, "--train-data: %s", err.text);
            trainer_micro_step(t, mine ? inputs : NULL, mine ? targets : NULL, 1.0 / (double)o.tokens_per_step, k);
        }
        loader_advance(&train, (uint64_t)(o.accum * o.batch_size));
        trainer_update(t, &o, lr, step, &loss, &norm);
        int is_spike = loss > limits.loss || norm > limits.norm, skipped = !isfinite(norm) || is_spike;
        loss /= (double)o.tokens_per_step;
        if (!skipped) now.bad_steps = 0, spikes_add(&now.spikes, loss, norm);
        else {
            now.skipped++;
            int rc = ++now.bad_steps < MAX_BAD_STEPS ? 0 : fail(&err, "step %" PRId64 ": %d steps in a row were skipped, the last because %s; lower --lr, "
                "and go on from a checkpoint", step, MAX_BAD_STEPS, is_spike ? "of a spike (--skip-spikes)" : "the gradient is not finite");
            comm_check(&comm, rc, EXIT_SYSTEM, &err);
        }

        double seconds = now_seconds() - start;
        smooth_seconds = smooth_seconds == 0 ? seconds : 0.9 * smooth_seconds + 0.1 * seconds;
        char percent[32] = "", left[32];
        if (o.peak_tflops > 0) snprintf(percent, sizeof percent, " | %.1f%% of peak", flop / seconds / 1e10 / o.peak_tflops / comm.world);
        logger_printf(&log, "step %" PRId64 "/%" PRId64 " | loss %.4f | norm %.3f%s | lr %.2e | %.0f ms | %.0f tok/s%s | %s left\n", step,
                      o.max_steps, loss, norm,
                      skipped ? " SKIPPED" : "", lr, seconds * 1e3, (double)o.tokens_per_step / seconds, percent,
                      format_duration(left, smooth_seconds * (double)(o.max_steps - step)));
        logger_metrics(&log, "step", (double)step, "loss", loss, "norm", norm, "lr", lr, "ms", seconds * 1e3, "comm_ms", (comm.seconds - waited) * 1e3,
                       "tokens_per_second", (double)o.tokens_per_step / seconds, "gflops", flop / seconds / 1e9, "skipped", (double)now.skipped, NULL);
    }

    loader_close(&train);
    if (o.val_every) loader_close(&val);
    tokenizer_free(&tokenizer);
    trainer_close(t);
    free(inputs), free(targets);
    logger_close(&log);
    comm_close(&comm);
    return 0;
}

#endif
