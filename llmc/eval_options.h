// The evaluating program's interfaces: its command line, and the tokens that a model is asked to score.
#ifndef LLMC_EVAL_OPTIONS_H
#define LLMC_EVAL_OPTIONS_H

#include "flags.h"

// A token that should follow row `row` of a batch (B, T), row = b*T + t. The model fills in the rest.
typedef struct {
    int64_t row;
    int32_t token;
    int32_t is_greedy;          // out: whether no other token is likelier
    double loglikelihood;       // out: log softmax(logits of that row)[token], over the model's vocab_size outputs
} ScoredToken;

typedef struct {
    // model
    const char *model, *vocab;
    // tasks
    const char *tasks, *data;
    int64_t shots, context, limit;
    // perplexity
    const char *perplexity;
    int64_t stride;
    // output and machine
    const char *log, *json;
    int64_t batch_size, threads;
} EvalOptions;

enum { NUM_EVAL_FLAGS = 20 };

LLMC_FN int eval_flags(EvalOptions *o, Flag out[NUM_EVAL_FLAGS]) {
    const Flag flags[] = {
        FLAGS_SECTION("Model"),
        {'e', "model", FLAG_TEXT, &o->model, "out", 0, 0,
         "a checkpoint's folder, or a run's, for its last checkpoint", 0},
        {0, "vocab", FLAG_TEXT, &o->vocab, "data/gpt2.tiktoken", 0, 0, "GPT-2's vocabulary", 0},
        FLAGS_SECTION("Tasks"),
        {0, "tasks", FLAG_TEXT, &o->tasks, NULL, 0, 0,
         "of arc_easy,arc_challenge,boolq,hellaswag,openbookqa,piqa,winogrande,mmlu,sciq,mmlu_SUBJECT (all there)", 0},
        {0, "data", FLAG_TEXT, &o->data, "data/eval", 0, 0, "the folder of the tasks' files", 0},
        {0, "shots", FLAG_INT, &o->shots, "0", 0, 1000, "few-shot examples before each question", 0},
        {0, "context", FLAG_INT, &o->context, "1024", 1, 1 << 20,
         "L, the longest input in tokens; longer ones lose their start", 0},
        {0, "limit", FLAG_INT, &o->limit, "0", 0, 1e9,
         "only the first rows of each task, or windows of --perplexity; 0: all", 0},
        FLAGS_SECTION("Perplexity"),
        {0, "perplexity", FLAG_TEXT, &o->perplexity, NULL, 0, 0,
         "instead of tasks: loss, perplexity and bits per byte of these shards, a path or a glob", 0},
        {0, "stride", FLAG_INT, &o->stride, "0", 0, 1 << 20,
         "tokens that a window scores, after --context minus as many tokens before them; 0: --context", 0},
        FLAGS_SECTION("Output and machine"),
        {0, "log", FLAG_TEXT, &o->log, NULL, 0, 0, "write each request with its tokens and score to this file", 0},
        {0, "json", FLAG_TEXT, &o->json, NULL, 0, 0, "write the scores to this file", 0},
        {'b', "batch-size", FLAG_INT, &o->batch_size, "8", 1, 65536,
         "B: a batch has up to B times --context tokens", 0},
        {0, "threads", FLAG_INT, &o->threads, "0", 0, 4096, "CPU threads; 0: all cores", 0},
    };
    return flags_copy(out, NUM_EVAL_FLAGS, flags, (int)(sizeof flags / sizeof *flags));
}

// Parses the command line. Errors: one line in err, and -1.
LLMC_FN int eval_options(EvalOptions *o, int argc, char **argv, const char *help_head, Error *err) {
    memset(o, 0, sizeof *o);
    Flag flags[NUM_EVAL_FLAGS];
    int n = eval_flags(o, flags);
    if (flags_parse(argc, argv, help_head, flags, n, err) != 0) return -1;
    if (o->perplexity && (o->tasks || o->log))
        return fail(err, "--perplexity and --%s are both given; leave one out", o->tasks ? "tasks" : "log");
    if (o->stride && !o->perplexity) return fail(err, "--stride belongs to --perplexity; leave it out");
    if (o->stride > o->context)
        return fail(err, "--stride %lld is more than --context %lld; lower it", (long long)o->stride,
                    (long long)o->context);
    if (o->stride == 0) o->stride = o->context;
    return 0;
}

#endif
