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

enum { MAX_BAD_STEPS = 10 };    // in a row, before a run whose gradients are not finite stops

// ---------------------------------------------------------------------------------------------------------------------
// What a trainer provides. inputs, targets (B, T): in host memory, free to change when the function returns.

typedef struct T6 T6;
typedef struct { float *params, *adam_m, *adam_v; } HostWeights;    // (num_stored) each, laid out by model.tensors

int trainer_pad(void);                              // what storage is padded to (model_init)
void trainer_start(TrainOptions *o);                // sets up the machine
// Prints what memory the run takes, and stops where the machine has less.
void trainer_plan(const TrainOptions *o, const Model *m, Logger *log);
T6 *trainer_open(const TrainOptions *o);            // allocates, for batches up to (o->batch_size, o->seq_len)
void trainer_close(T6 *t);
const Model *trainer_model(T6 *t);
HostWeights trainer_host_weights(T6 *t, int read);  // host memory for them; read: with what the model has now
void trainer_take_weights(T6 *t, int moments);      // the model takes over what is there: weights, and moments if there are any
double trainer_loss(T6 *t, const int32_t *inputs, const int32_t *targets, int64_t B);   // sum of the losses of B sequences
// Forward and backward of micro-batch k of a step; gradients add up. Each loss weighs dloss.
void trainer_micro_step(T6 *t, const int32_t *inputs, const int32_t *targets, double dloss, int64_t k);
// Clips and updates. Gives the sum of the step's losses and the norm of its gradient; if that is not finite nothing is changed.
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
    trainer_plan(o, m, log);
}

// Mean loss over the first val_batches micro-batches of the validation data (0: all); each window counts once.
LLMC_FN double validate(T6 *t, DataLoader *val, int32_t *inputs, int32_t *targets, const TrainOptions *o) {
    Error err;
    double total = 0;
    uint64_t windows = val->windows, wanted = (uint64_t)(o->val_batches * o->batch_size);
    if (wanted > 0 && wanted < windows) windows = wanted;
    val->epoch = val->position = 0;
    for (uint64_t done = 0; done < windows; ) {
        int64_t B = windows - done < (uint64_t)o->batch_size ? (int64_t)(windows - done) : o->batch_size;
        if (loader_next(val, B, inputs, targets, &err) != 0) die(EXIT_INPUT, "%s", err.text);
        total += trainer_loss(t, inputs, targets, B);
        done += (uint64_t)B;
    }
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

LLMC_FN int trainer_main(int argc, char **argv, const char *title) {
    Error err;
    TrainOptions o;
    set_program_name(argv[0]);
    if (train_options(&o, argc, argv, title, checkpoint_load_config, &err) != 0) die(EXIT_INPUT, "%s", err.text);
    trainer_start(&o);

    // Data
    DataLoader train, val;
    LoaderOrder order = o.shuffle ? ORDER_SHUFFLED : ORDER_SEQUENTIAL;
    if (loader_open(&train, o.train_data, o.seq_len, order, (uint64_t)o.batch_size, (uint64_t)o.seed, 0, 1, &err) != 0)
        die(EXIT_INPUT, "--train-data: %s", err.text);
    if (o.val_every && loader_open(&val, o.val_data, o.seq_len, ORDER_SEQUENTIAL, 1, 0, 0, 1, &err) != 0)
        die(EXIT_INPUT, "--val-data: %s", err.text);
    if (o.val_every && strcmp(train.vocab, val.vocab))
        die(EXIT_INPUT, "--val-data: its tokens are %s, those of --train-data %s", val.vocab, train.vocab);
    if (train.windows < (uint64_t)o.batch_size)
        die(EXIT_INPUT, "--train-data: %llu tokens, fewer than one batch of %lld x %lld; lower --batch-size (-b) or --seq-len (-t), "
            "or bring more data",
            (unsigned long long)train.tokens, (long long)o.batch_size, (long long)o.seq_len);
    Tokenizer tokenizer;
    memset(&tokenizer, 0, sizeof tokenizer);
    if (!strcmp(train.vocab, "bytes")) tokenizer_init_bytes(&tokenizer);
    else if (o.sample_every && tokenizer_init_gpt2(&tokenizer, o.vocab, &err) != 0)
        fprintf(stderr, "note: samples will be printed as token ids: %s\n", err.text);

    // Model
    if (o.config.vocab_size == 0) o.config.vocab_size = train.vocab_size;
    if (config_check(&o.config, &err) != 0) die(EXIT_INPUT, "%s", err.text);
    if (o.config.vocab_size < train.vocab_size)
        die(EXIT_INPUT, "--vocab-size: the model's %" PRId64 " is below the %d of the data", o.config.vocab_size, train.vocab_size);

    // Output: an earlier run's checkpoints are gone on from, or refused, never overwritten
    int num_steps;
    int64_t *steps = checkpoint_steps(o.out, &num_steps), last = num_steps ? steps[num_steps - 1] : -1;
    free(steps);
    if (last >= 0 && !o.resume && !o.plan)
        die(EXIT_INPUT, "--out: %s holds a run's checkpoints, the last of step %" PRId64 ": add --resume (-y) to go on, or name "
            "another folder", o.out, last);
    Logger log;
    memset(&log, 0, sizeof log);
    if (!o.plan && (make_dirs(o.out, &err) != 0 || logger_open(&log, o.out, last, &err) != 0)) die(EXIT_INPUT, "--out: %s", err.text);
    Model planned;
    model_init(&planned, &o.config, trainer_pad());
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
        return 0;
    }

    T6 *t = trainer_open(&o);
    const Model *model = trainer_model(t);
    TrainState now = {0, 0, 0, o.seed, o.shuffle, o.seq_len, (int64_t)(loader_fingerprint(&train) >> 1), 0}, state = now;
    HostWeights host = trainer_host_weights(t, 0);
    if (last >= 0) {
        char *folder = xasprintf("%s/step_%08" PRId64, o.out, last);
        Config saved;
        Error what;
        if (checkpoint_verify(folder, NUM_CHECKPOINT_FILES, &err) != 0 || checkpoint_load_config(folder, &saved, &err) != 0)
            die(EXIT_INPUT, "--resume: %s", err.text);
        if (config_difference(&saved, &o.config, &what) != 0) die(EXIT_INPUT, "--resume: %s is of another model: %s", folder, what.text);
        if (checkpoint_load_weights(folder, model, host.params, &err) != 0 ||
            checkpoint_load_optimizer(folder, model, host.adam_m, host.adam_v, &state, &err) != 0 ||
            resume_data(&train, &state, &now, &o, &err) != 0)
            die(EXIT_INPUT, "--resume: %s", err.text);
        now.bad_steps = state.bad_steps;
        logger_printf(&log, "resumed from %s\n", folder);
        free(folder);
    } else if (find_preset(o.model)) init_weights(host.params, model, (uint64_t)o.seed);
    else if (checkpoint_load_weights(o.model, model, host.params, &err) != 0) die(EXIT_INPUT, "--model: %s", err.text);
    trainer_take_weights(t, last >= 0);
    int32_t *inputs = (int32_t *)xmalloc((size_t)(o.batch_size * o.seq_len) * sizeof *inputs);
    int32_t *targets = (int32_t *)xmalloc((size_t)(o.batch_size * o.seq_len) * sizeof *targets);

    // Training: save first, then evaluate, then sample, so that nothing that fails later costs weights
    double flop = model_flop_per_token(model, o.seq_len) * (double)o.tokens_per_step, smooth_seconds = 0;
    for (int64_t step = state.step; ; ) {
        int is_last = step >= o.max_steps, is_start = step == state.step;
        if (!is_start || o.max_steps == 0) {
            TrainState s = now;
            s.step = step, s.epoch = (int64_t)train.epoch, s.position = (int64_t)train.position;
            if (o.save_every && (is_last || step % o.save_every == 0)) {
                host = trainer_host_weights(t, 1);
                if (checkpoint_save(o.out, model, host.params, host.adam_m, host.adam_v, &s, &err) != 0 ||
                    checkpoint_prune(o.out, o.keep, o.keep_every, &err) != 0)
                    die(EXIT_SYSTEM, "checkpoint of step %" PRId64 ": %s", step, err.text);
            }
            if (o.val_every && (is_last || step % o.val_every == 0)) {
                double loss = validate(t, &val, inputs, targets, &o);
                double bits = val.bytes_per_token > 0 ? loss / M_LN2 / val.bytes_per_token : NAN;
                logger_printf(&log, "val %" PRId64 "/%" PRId64 " | loss %.4f", step, o.max_steps, loss);
                if (val.bytes_per_token > 0) logger_printf(&log, " | %.4f bits/byte", bits);
                logger_printf(&log, "\n");
                logger_metrics(&log, "step", (double)step, "val_loss", loss, "val_bits_per_byte", bits, NULL);
            }
            if (o.sample_every && (is_last || step % o.sample_every == 0)) sample(t, &tokenizer, train.eot, &o, step, &log);
        }
        if (is_last) break;

        double start = now_seconds(), loss, norm, lr = schedule_lr(&o.schedule, (long)step);
        for (int64_t k = 0; k < o.accum; k++) {
            if (loader_next(&train, o.batch_size, inputs, targets, &err) != 0) die(EXIT_INPUT, "--train-data: %s", err.text);
            trainer_micro_step(t, inputs, targets, 1.0 / (double)o.tokens_per_step, k);
        }
        step++;
        trainer_update(t, &o, lr, step, &loss, &norm);
        loss /= (double)o.tokens_per_step;
        if (isfinite(norm)) now.bad_steps = 0;
        else if (++now.bad_steps == MAX_BAD_STEPS)
            die(EXIT_SYSTEM, "step %" PRId64 ": the gradient has not been finite for %d steps; lower --lr, and go on from a checkpoint",
                step, MAX_BAD_STEPS);

        double seconds = now_seconds() - start;
        smooth_seconds = smooth_seconds == 0 ? seconds : 0.9 * smooth_seconds + 0.1 * seconds;
        char percent[32] = "", left[32];
        if (o.peak_tflops > 0) snprintf(percent, sizeof percent, " | %.1f%% of peak", flop / seconds / 1e10 / o.peak_tflops);
        logger_printf(&log, "step %" PRId64 "/%" PRId64 " | loss %.4f | norm %.3f%s | lr %.2e | %.0f ms | %.0f tok/s%s | %s left\n", step,
                      o.max_steps, loss, norm,
                      isfinite(norm) ? "" : " SKIPPED", lr, seconds * 1e3, (double)o.tokens_per_step / seconds, percent,
                      format_duration(left, smooth_seconds * (double)(o.max_steps - step)));
        logger_metrics(&log, "step", (double)step, "loss", loss, "norm", norm, "lr", lr, "ms", seconds * 1e3, "tokens_per_second",
                       (double)o.tokens_per_step / seconds, "gflops", flop / seconds / 1e9, NULL);
    }

    loader_close(&train);
    if (o.val_every) loader_close(&val);
    tokenizer_free(&tokenizer);
    trainer_close(t);
    free(inputs), free(targets);
    logger_close(&log);
    return 0;
}

#endif
