// The generating program's interfaces: its command line, and the functions that it calls of a model with a cache.
#ifndef LLMC_GENERATE_OPTIONS_H
#define LLMC_GENERATE_OPTIONS_H

#include "flags.h"
#include "model.h"
#include "sampler.h"

// CACHE_NATIVE: in the model's own precision. CACHE_FP8: e4m3, with scales for each token (fp8.h).
typedef enum { CACHE_NATIVE, CACHE_FP8 } CacheKind;

typedef struct {
    // model
    const char *model, *vocab;
    // text
    const char *prompt, *prompt_file;
    int64_t ids, echo, num_samples, max_tokens, context, stop;
    // sampling
    SamplerOptions sampler;
    int64_t seed;
    // cache and machine
    const char *cache;
    int64_t no_cache, threads, stats, check, plan;
    // derived
    CacheKind cache_kind;
    int64_t longest_prefill;    // most tokens that prefill is given
} GenerateOptions;

// ---------------------------------------------------------------------------------------------------------------------
// The contract: the functions of a model that the generating program calls. generate_t6.c and generate_t6.cu each fill
// in this table and hand it to generator_main. Arguments are in host memory, and free to change when the function
// returns. A function that fails ends the program with one line.

typedef struct Generator Generator;     // a model and its cache of B sequences
enum { MAX_STEP_TOKENS = 16 };          // most tokens per sequence that step takes at once

typedef struct {
    const char *title;                                  // first line of --help
    int pad;                                            // widths are stored in multiples of it (model_init)
    double tolerance;                                   // ||a - b|| / ||b|| of logits that differ by rounding only
    void (*start)(const GenerateOptions *o);            // sets up threads or GPU; called once, first
    // Prints the memory that the run needs to stderr if o->stats or o->plan, and ends the program with one line where
    // the machine has less.
    void (*plan)(const GenerateOptions *o, const Model *m, int64_t B, int64_t capacity);
    double (*cache_bytes)(const GenerateOptions *o, const Model *m, int64_t tokens);    // in all layers
    // Allocates for B sequences of up to `capacity` tokens, all of them empty, and prefills of up to
    // o->longest_prefill.
    Generator *(*open)(const GenerateOptions *o, const Config *config, int64_t B, int64_t capacity);
    void (*close)(Generator *g);
    const Model *(*model)(const Generator *g);
    float *(*host_weights)(Generator *g);               // (num_stored) host memory, laid out by model.tensors
    void (*load_weights)(Generator *g);                 // loads the values in that memory, which may then be freed
    // Replaces sequence b by these n tokens, 1 <= n <= o->longest_prefill.
    void (*prefill)(Generator *g, int64_t b, const int32_t *ids, int64_t n);
    // Appends n tokens to every sequence: ids (B, n), 1 <= n <= MAX_STEP_TOKENS.
    void (*step)(Generator *g, const int32_t *ids, int64_t n);
    // next (B): a token to follow each sequence, drawn from its logits with the random number generator_uniform.
    void (*sample)(Generator *g, const SamplerOptions *s, uint64_t seed, int32_t *next);
    void (*logits)(Generator *g, float *logits);        // logits (B, V): of what follows each sequence
} GeneratorModel;

// The random number in [0, 1) that draws the next token of sequence b, which has `length` tokens.
LLMC_FN double generator_uniform(uint64_t seed, int64_t b, int64_t length) {
    return rng_uniform(rng_stream(seed ^ 0x67656e6572617465, (uint64_t)b), (uint64_t)length);      // "generate"
}

// ---------------------------------------------------------------------------------------------------------------------
// The command line

enum { NUM_GENERATE_FLAGS = 32 };

LLMC_FN int generate_flags(GenerateOptions *o, Flag out[NUM_GENERATE_FLAGS]) {
    const double many = 1 << 24;
    const Flag flags[] = {
        FLAGS_SECTION("Model"),
        {'e', "model", FLAG_TEXT, &o->model, "out", 0, 0,
         "a checkpoint's folder, or a run's, for its last checkpoint", 0},
        {0, "vocab", FLAG_TEXT, &o->vocab, "data/gpt2.tiktoken", 0, 0,
         "GPT-2's vocabulary, for models of GPT-2 tokens", 0},
        FLAGS_SECTION("Text"),
        {'p', "prompt", FLAG_TEXT, &o->prompt, NULL, 0, 0, "text to continue; <|endoftext|> in it is that token", 0},
        {'f', "prompt-file", FLAG_TEXT, &o->prompt_file, NULL, 0, 0,
         "many prompts, one per line; without -p and -f standard input is the prompt", 0},
        {0, "ids", FLAG_SWITCH, &o->ids, "0", 0, 1, "prompts and output are token ids instead of text", 0},
        {0, "echo", FLAG_SWITCH, &o->echo, "1", 0, 1, "print the prompt too", 0},
        {0, "num-samples", FLAG_INT, &o->num_samples, "1", 1, 65536, "texts per prompt", 0},
        {'g', "max-tokens", FLAG_INT, &o->max_tokens, "256", 1, many, "limit of new tokens per text", 0},
        {0, "context", FLAG_INT, &o->context, "0", 0, many,
         "limit of prompt and --max-tokens together, in tokens; 0: none", 0},
        {0, "stop", FLAG_SWITCH, &o->stop, "1", 0, 1, "1: end-of-text ends a text; 0: continue to --max-tokens", 0},
        FLAGS_SECTION("Sampling"),
        {0, "temperature", FLAG_REAL, &o->sampler.temperature, "0.8", 0, 100, "divides the logits; 0: greedy", 0},
        {0, "top-k", FLAG_INT, &o->sampler.top_k, "0", 0, many, "only the k likeliest tokens; 0: all", 0},
        {0, "top-p", FLAG_REAL, &o->sampler.top_p, "1", 1e-6, 1,
         "then only the likeliest whose probabilities add up to p; 1: all", 0},
        {0, "min-p", FLAG_REAL, &o->sampler.min_p, "0", 0, 1, "then none below p times the likeliest; 0: all", 0},
        {0, "seed", FLAG_INT, &o->seed, "1337", 0, 9e15,
         "of the random numbers, which also depend on a text's number and length", 0},
        FLAGS_SECTION("Cache and machine"),
        {0, "cache", FLAG_TEXT, &o->cache, "native", 0, 0,
         "native (CPU fp32, GPU bf16), or fp8: e4m3 with a scale per token", 0},
        {0, "no-cache", FLAG_SWITCH, &o->no_cache, "0", 0, 1, "run the whole text again for each token, to compare", 0},
        {0, "threads", FLAG_INT, &o->threads, "0", 0, 4096, "CPU threads; 0: all cores", 0},
        {0, "stats", FLAG_SWITCH, &o->stats, "0", 0, 1, "print memory and speed, to standard error", 0},
        {0, "check", FLAG_SWITCH, &o->check, "0", 0, 1,
         "instead of text: check that all ways to compute the prompt's logits agree", 0},
        {0, "plan", FLAG_SWITCH, &o->plan, "0", 0, 1, "print memory, and stop", 0},
    };
    return flags_copy(out, NUM_GENERATE_FLAGS, flags, (int)(sizeof flags / sizeof *flags));
}

// Parses the command line. Errors: one line in err, and -1.
LLMC_FN int generate_options(GenerateOptions *o, int argc, char **argv, const char *help_head, Error *err) {
    memset(o, 0, sizeof *o);
    Flag flags[NUM_GENERATE_FLAGS];
    int n = generate_flags(o, flags);
    if (flags_parse(argc, argv, help_head, flags, n, err) != 0) return -1;
    if (!strcmp(o->cache, "fp8")) o->cache_kind = CACHE_FP8;
    else if (strcmp(o->cache, "native")) return fail(err, "--cache: \"%.40s\" is not accepted; it takes native or fp8",
                                                     o->cache);
    if (o->prompt && o->prompt_file) return fail(err, "--prompt and --prompt-file are both given; leave one out");
    return 0;
}

#endif
