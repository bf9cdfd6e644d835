// The generating program: command line, prompts, the loop that makes text, and its checks of itself. generate_t6.c and generate_t6.cu are
// this program around a model with a cache of their own, which they reach it through by the functions declared below.
#ifndef LLMC_GENERATOR_H
#define LLMC_GENERATOR_H

#include "checkpoint.h"
#include "flags.h"
#include "sampler.h"
#include "tokenizer.h"

typedef enum { CACHE_NATIVE, CACHE_FP8 } CacheKind;     // the backend's own precision; e4m3 with a scale for each token (fp8.h)

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
    int64_t longest_prefill;    // tokens, at most, that generator_prefill is given
} GenerateOptions;

// ---------------------------------------------------------------------------------------------------------------------
// What a generator provides. Arguments are in host memory, free to change when the function returns.

typedef struct Generator Generator;     // a model and its cache of B sequences
enum { MAX_STEP_TOKENS = 16 };          // that generator_step takes of a sequence at once

int generator_pad(void);                                        // what storage is padded to (model_init)
double generator_tolerance(void);                               // ||a - b|| / ||b|| of logits that differ by rounding only
void generator_start(GenerateOptions *o);                       // sets up the machine
// Prints to stderr, where o->stats or o->plan, what memory the run takes, and stops with one line where the machine has less.
void generator_plan(const GenerateOptions *o, const Model *m, int64_t B, int64_t capacity);
// Allocates for B sequences of up to `capacity` tokens. All sequences are empty.
Generator *generator_open(const GenerateOptions *o, const Config *config, int64_t B, int64_t capacity);
void generator_close(Generator *g);
const Model *generator_model(Generator *g);
float *generator_host_weights(Generator *g);                    // (num_stored) host memory for them, laid out by model.tensors
void generator_take_weights(Generator *g);                      // the model takes over what is there
double generator_cache_bytes(const GenerateOptions *o, const Model *m, int64_t tokens);     // of so many tokens, all layers
// Sequence b becomes these n tokens, 1 <= n <= o->longest_prefill; its logits are those of what follows the last.
void generator_prefill(Generator *g, int64_t b, const int32_t *ids, int64_t n);
// Appends n tokens to every sequence, ids (B, n), 1 <= n <= MAX_STEP_TOKENS; logits of what follows the last.
void generator_step(Generator *g, const int32_t *ids, int64_t n);
// next (B): the token that follows each sequence, drawn from its logits with a random number that depends on seed, sequence and length.
void generator_sample(Generator *g, const SamplerOptions *s, uint64_t seed, int32_t *next);
void generator_logits(Generator *g, float *logits);             // (B, V)

// The random number of that draw, in [0, 1): sequence b having `length` tokens.
LLMC_FN double generator_uniform(uint64_t seed, int64_t b, int64_t length) {
    return rng_uniform(rng_stream(seed ^ 0x67656e6572617465, (uint64_t)b), (uint64_t)length);
}

#endif
