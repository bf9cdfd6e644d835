// The evaluating program: command line, model, tasks or token shards. eval_t6.c and eval_t6.cu end with this program
// around the trainers' models.
#ifndef LLMC_EVAL_PROGRAM_H
#define LLMC_EVAL_PROGRAM_H

#include "eval_perplexity.h"
#include "evaluator.h"
#include "trainer.h"

typedef struct {
    const TrainerModel *ops;
    EvalOptions o;
    Comm comm;
    TrainOptions model;         // what the model is opened with
    char *folder;               // of the checkpoint
    Tokenizer tokenizer;
    Evaluation evaluation;
    Output log, json;           // of rank 0
} EvalRun;

// Finds the checkpoint and reads its configuration.
LLMC_FN int eval_find_model_(EvalRun *run, Error *err) {
    Error why;
    run->folder = checkpoint_folder(run->o.model, &why);
    if (!run->folder) return fail(err, "--model: %s; train a model, or name one with --model (-e)", why.text);
    if (checkpoint_load_config(run->folder, &run->model.config, &why) != 0) return fail(err, "--model: %s", why.text);
    return 0;
}

LLMC_FN int eval_open_outputs_(EvalRun *run, Error *err) {
    if (run->comm.rank > 0) return 0;
    if (output_open(&run->log, "--log", run->o.log, err) != 0) return -1;
    return output_open(&run->json, "--json", run->o.json, err);
}

LLMC_FN int eval_load_tasks_(EvalRun *run, Error *err) {
    EvalOptions *o = &run->o;
    Evaluation *e = &run->evaluation;
    Error why;
    int64_t V = run->model.config.vocab_size;
    e->silent = run->comm.rank > 0;
    if (V < GPT2_VOCAB_SIZE)
        return fail(err, "--model: its vocabulary of %" PRId64 " does not fit: the tasks are scored in GPT-2's %d "
                    "tokens", V, GPT2_VOCAB_SIZE);
    if (tokenizer_init_gpt2(&run->tokenizer, o->vocab, &why) != 0)
        return fail(err, "--vocab: %s; data/gpt2_vocab.sh gets it", why.text);
    tokenizer_prepare(&run->tokenizer);
    if (evaluation_choose(e, o->tasks, o->data, o->shots, err) != 0) return -1;
    if (evaluation_load(e, o->data, o->limit, o->context, &run->tokenizer, &why) != 0)
        return fail(err, "--data: %s", why.text);
    return 0;
}

// The model with the checkpoint's weights.
LLMC_FN T6 *eval_open_model_(EvalRun *run) {
    Error err;
    TrainOptions *o = &run->model;
    Model planned;
    Logger silent;
    memset(&silent, 0, sizeof silent);
    silent.silent = 1;
    o->batch_size = run->o.batch_size, o->seq_len = run->o.context, o->accum = 1;
    o->recompute = MOST_RECOMPUTED;
    model_init(&planned, &o->config, run->ops->pad);
    run->ops->plan(o, &planned, &silent);
    model_free(&planned);
    o->comm = NULL;     // each rank has a whole model
    if (checkpoint_verify_model(run->folder, &err) != 0) die(EXIT_INPUT, "--model: %s", err.text);
    T6 *t6 = run->ops->open(o);
    HostWeights host = run->ops->host_weights(t6, ROOM_ONLY);
    if (checkpoint_load_weights(run->folder, run->ops->model(t6), host.params, &err) != 0)
        die(EXIT_INPUT, "--model: %s", err.text);
    run->ops->load_weights(t6, WEIGHTS_ONLY);
    return t6;
}

// Scores the tasks and prints the table.
LLMC_FN void eval_tasks_(EvalRun *run) {
    const EvalOptions *o = &run->o;
    Evaluation *e = &run->evaluation;
    Error err;
    comm_check(&run->comm, eval_load_tasks_(run, &err), EXIT_INPUT, &err);
    T6 *t6 = eval_open_model_(run);
    Scorer scorer = {t6, run->ops->score, o->batch_size * o->context, o->context, &run->comm};
    evaluation_run(e, &scorer);
    EvalResults results = evaluation_results(e);
    if (run->comm.rank == 0) {
        print_table(&results, o->shots);
        if (o->log) write_log(&run->log, e);
        if (o->json) write_scores(&run->json, &results, o, run->folder);
    }
    results_free(&results);
    run->ops->close(t6);
    evaluation_free(e);
}

LLMC_FN void write_perplexity_(Output *out, const Perplexity *p, const EvalOptions *o, const char *model) {
    cJSON *json = cJSON_CreateObject();
    cJSON_AddStringToObject(json, "model", model);
    cJSON_AddNumberToObject(json, "context", (double)o->context);
    cJSON_AddNumberToObject(json, "stride", (double)o->stride);
    cJSON_AddNumberToObject(json, "tokens", (double)p->tokens);
    cJSON_AddNumberToObject(json, "loss", p->loss);
    cJSON_AddNumberToObject(json, "perplexity", exp(p->loss));
    if (!isnan(p->bits_per_byte)) cJSON_AddNumberToObject(json, "bits_per_byte", p->bits_per_byte);
    write_json(out, json);
}

LLMC_FN void print_perplexity_(const Perplexity *p, const EvalOptions *o) {
    printf("loss %.4f | perplexity %.2f", p->loss, exp(p->loss));
    if (!isnan(p->bits_per_byte)) printf(" | %.4f bits/byte", p->bits_per_byte);
    printf(" | %" PRIu64 " tokens, context %" PRId64 ", stride %" PRId64 "\n", p->tokens, o->context, o->stride);
}

LLMC_FN int eval_open_shards_(const EvalRun *run, DataLoader *data, Error *err) {
    const EvalOptions *o = &run->o;
    Error why;
    if (loader_open(data, o->perplexity, o->stride, ORDER_SEQUENTIAL, 1, 0, &why) != 0)
        return fail(err, "--perplexity: %s", why.text);
    int64_t V = run->model.config.vocab_size;
    if (data->vocab_size <= V) return 0;
    return fail(err, "--perplexity: the vocabulary of its tokens, %s of %d, does not fit the model's of %" PRId64,
                data->vocab, data->vocab_size, V);
}

// Prints the perplexity of the shards.
LLMC_FN void eval_perplexity_(EvalRun *run) {
    const EvalOptions *o = &run->o;
    Error err;
    DataLoader data;
    comm_check(&run->comm, eval_open_shards_(run, &data, &err), EXIT_INPUT, &err);
    T6 *t6 = eval_open_model_(run);
    Scorer scorer = {t6, run->ops->score, o->batch_size * o->context, o->context, &run->comm};
    int64_t windows = o->limit && (uint64_t)o->limit < data.windows ? o->limit : (int64_t)data.windows;
    ProgressBar bar = {windows, run->comm.rank > 0, now_seconds(), 0};
    Perplexity p = measure_perplexity(&scorer, &data, o->context, o->limit, progress_bar, &bar);
    if (!isfinite(p.loss)) die(EXIT_INPUT, "--model: the loss is not finite; the weights are damaged");
    if (run->comm.rank == 0) {
        print_perplexity_(&p, o);
        if (o->json) write_perplexity_(&run->json, &p, o, run->folder);
    }
    run->ops->close(t6);
    loader_close(&data);
}

LLMC_FN int evaluator_main(int argc, char **argv, const char *title, const TrainerModel *ops) {
    program_start(argv[0]);
    Error err;
    EvalRun *run = (EvalRun *)xcalloc(1, sizeof *run);
    EvalOptions *o = &run->o;
    Comm *comm = &run->comm;
    if (flags_asked_for_text(argc, argv)) eval_options(o, argc, argv, title, &err);     // prints it and exits
    comm_open(comm, argc, argv);
    comm_check(comm, eval_options(o, argc, argv, title, &err), EXIT_INPUT, &err);
    comm->timeout_seconds = 0;      // ranks wait for the slowest
    run->ops = ops;
    run->model.threads = o->threads, run->model.comm = comm, run->model.forward_only = 1;
    ops->start(&run->model);
    comm_check(comm, eval_find_model_(run, &err), EXIT_INPUT, &err);
    int opened = eval_open_outputs_(run, &err);
    comm_check(comm, opened, opened ? disk_exit_code(errno) : EXIT_INPUT, &err);
    if (o->perplexity) eval_perplexity_(run);
    else eval_tasks_(run);
    check_stdout();
    comm_close(comm);
    tokenizer_free(&run->tokenizer);
    free(run->folder), free(run);
    return 0;
}

#endif
