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

// ---------------------------------------------------------------------------------------------------------------------
// The command line

enum { NUM_GENERATE_FLAGS = 32 };

LLMC_FN int generate_flags(GenerateOptions *o, Flag out[NUM_GENERATE_FLAGS]) {
    const double many = 1 << 24;
    const Flag flags[] = {
        FLAGS_SECTION("Model"),
        {'e', "model", FLAG_TEXT, &o->model, "out", 0, 0, "a checkpoint's folder, or a run's, for its last checkpoint", 0},
        {0, "vocab", FLAG_TEXT, &o->vocab, "data/gpt2.tiktoken", 0, 0, "GPT-2's vocabulary, for models of GPT-2 tokens", 0},
        FLAGS_SECTION("Text"),
        {'p', "prompt", FLAG_TEXT, &o->prompt, NULL, 0, 0, "the text to go on from; <|endoftext|> in it is that token", 0},
        {'f', "prompt-file", FLAG_TEXT, &o->prompt_file, NULL, 0, 0, "many prompts, one a line; without either, standard input is one", 0},
        {0, "ids", FLAG_SWITCH, &o->ids, "0", 0, 1, "prompts and output are numbers of tokens instead of text", 0},
        {0, "echo", FLAG_SWITCH, &o->echo, "1", 0, 1, "print the prompt too", 0},
        {0, "num-samples", FLAG_INT, &o->num_samples, "1", 1, 65536, "texts for each prompt", 0},
        {'g', "max-tokens", FLAG_INT, &o->max_tokens, "256", 1, many, "new tokens of each text, at most", 0},
        {0, "context", FLAG_INT, &o->context, "0", 0, many, "tokens that prompt and --max-tokens may have together; 0: any number", 0},
        {0, "stop", FLAG_SWITCH, &o->stop, "1", 0, 1, "1: end-of-text ends a text; 0: go on to --max-tokens", 0},
        FLAGS_SECTION("Sampling"),
        {0, "temperature", FLAG_REAL, &o->sampler.temperature, "0.8", 0, 100, "divides the logits; 0: greedy", 0},
        {0, "top-k", FLAG_INT, &o->sampler.top_k, "0", 0, many, "only the k likeliest tokens; 0: all", 0},
        {0, "top-p", FLAG_REAL, &o->sampler.top_p, "1", 1e-6, 1, "then only the likeliest whose sum reaches p; 1: all", 0},
        {0, "min-p", FLAG_REAL, &o->sampler.min_p, "0", 0, 1, "then none below p times the likeliest; 0: all", 0},
        {0, "seed", FLAG_INT, &o->seed, "1337", 0, 9e15, "of the random numbers", 0},
        FLAGS_SECTION("Cache and machine"),
        {0, "cache", FLAG_TEXT, &o->cache, "native", 0, 0, "native (CPU fp32, GPU bf16), or fp8: e4m3, scaled by the token", 0},
        {0, "no-cache", FLAG_SWITCH, &o->no_cache, "0", 0, 1, "run the whole text again for every token, to compare", 0},
        {0, "threads", FLAG_INT, &o->threads, "0", 0, 4096, "CPU threads; 0: all cores", 0},
        {0, "stats", FLAG_SWITCH, &o->stats, "0", 0, 1, "memory and speed, on standard error", 0},
        {0, "check", FLAG_SWITCH, &o->check, "0", 0, 1, "instead of text: do all ways to the prompt's logits agree?", 0},
        {0, "plan", FLAG_SWITCH, &o->plan, "0", 0, 1, "print memory, and stop", 0},
    };
    return flags_copy(out, NUM_GENERATE_FLAGS, flags, (int)(sizeof flags / sizeof *flags));
}

LLMC_FN int generate_options(GenerateOptions *o, int argc, char **argv, const char *help_head, Error *err) {
    memset(o, 0, sizeof *o);
    Flag flags[NUM_GENERATE_FLAGS];
    int n = generate_flags(o, flags);
    if (flags_parse(argc, argv, help_head, flags, n, err) != 0) return -1;
    if (!strcmp(o->cache, "fp8")) o->cache_kind = CACHE_FP8;
    else if (strcmp(o->cache, "native")) return fail(err, "--cache: \"%.40s\" is not accepted; it takes native or fp8", o->cache);
    if (o->prompt && o->prompt_file) return fail(err, "--prompt and --prompt-file are both given; leave one out");
    return 0;
}

// The folder of the checkpoint that --model means, a fresh string: itself, or its last step_N where it is a run's.
LLMC_FN char *generator_folder_(const char *model, Error *err) {
    struct stat info;
    if (stat(model, &info) != 0 || !S_ISDIR(info.st_mode)) {
        fail(err, "%s is not the folder of a checkpoint or of a run; train one, or say which with --model (-e)", model);
        return NULL;
    }
    int n;
    int64_t *steps = checkpoint_steps(model, &n);
    char *folder = n ? xasprintf("%s/step_%08" PRId64, model, steps[n - 1]) : xasprintf("%s", model);
    free(steps);
    return folder;
}

// ---------------------------------------------------------------------------------------------------------------------
// Prompts: text or numbers to tokens

typedef struct { int32_t *ids; int64_t n; } Prompt;
typedef struct { Prompt *list; int64_t count; } Prompts;

// What the model's tokens are: GPT-2's where its vocabulary has room for them, else bytes where it has room for those.
LLMC_FN int end_of_text(int64_t V) { return V >= GPT2_VOCAB_SIZE ? GPT2_VOCAB_SIZE - 1 : V >= BYTES_VOCAB_SIZE ? BYTES_VOCAB_SIZE - 1 : -1; }

// ids (at least `bytes`) from a text in which <|endoftext|> stands for that token. Returns how many.
LLMC_FN int64_t encode_text_(const Tokenizer *t, const char *text, size_t bytes, int32_t *ids) {
    static const char mark[] = "<|endoftext|>";
    const size_t length = sizeof mark - 1;
    uint16_t *part = (uint16_t *)xmalloc(bytes * sizeof *part);
    EncodeScratch scratch;
    encode_scratch_init(&scratch);
    int64_t n = 0;
    for (const char *at = text, *end = text + bytes; at < end; ) {
        const char *found = at;
        while (found < end && ((size_t)(end - found) < length || memcmp(found, mark, length) != 0)) found++;
        size_t tokens = tokenizer_encode(t, at, (size_t)(found - at), part, &scratch);
        for (size_t i = 0; i < tokens; i++) ids[n++] = part[i];
        if (found < end) ids[n++] = t->eot;
        at = found < end ? found + length : end;
    }
    encode_scratch_free(&scratch);
    free(part);
    return n;
}

// The same from decimal numbers with white space between them. -1: with the reason in err.
LLMC_FN int64_t encode_numbers_(const char *text, size_t bytes, int64_t V, int32_t *ids, Error *err) {
    char *copy = (char *)xmalloc(bytes + 1), *save = NULL;
    int64_t n = 0;
    memcpy(copy, text, bytes);
    copy[bytes] = 0;
    if (strlen(copy) < bytes) n = fail(err, "a zero byte is among the tokens; with --ids they are numbers with white space between them");
    for (char *word = strtok_r(copy, " \t\r\n", &save), *end; word && n >= 0; word = strtok_r(NULL, " \t\r\n", &save)) {
        errno = 0;
        long long id = strtoll(word, &end, 10);
        if (*end || errno || id < 0 || id >= V)
            n = fail(err, "\"%.20s\" is not a token; with --ids they are numbers from 0 to %" PRId64, word, V - 1);
        else ids[n++] = (int32_t)id;
    }
    free(copy);
    return n;
}

// Adds the prompt; `what` names it in the line that refuses it.
LLMC_FN int prompts_add_(Prompts *p, const GenerateOptions *o, const Tokenizer *t, int64_t V, const char *text, size_t bytes, const char *what,
                         Error *err) {
    Error why;
    int32_t *ids = (int32_t *)xmalloc((bytes + 1) * sizeof *ids);
    int64_t n = o->ids ? encode_numbers_(text, bytes, V, ids, &why) : encode_text_(t, text, bytes, ids);
    int rc = 0;
    if (n < 0) rc = fail(err, "%s: %s", what, why.text);
    else if (n == 0) rc = fail(err, "%s is empty; to begin with nothing, begin with end-of-text: --prompt '<|endoftext|>'", what);
    else if (o->context && n + o->max_tokens > o->context)
        rc = fail(err, "%s has %" PRId64 " tokens; with --max-tokens %" PRId64 " that is more than --context %" PRId64, what, n, o->max_tokens,
                  o->context);
    p->list = (Prompt *)xrealloc(p->list, ((size_t)p->count + 1) * sizeof *p->list);
    p->list[p->count++] = (Prompt){ids, n};
    return rc;
}

// All of standard input as a fresh string.
LLMC_FN char *read_standard_input_(size_t *bytes) {
    size_t room = 1 << 16, n = 0, got;
    char *text = (char *)xmalloc(room);
    if (isatty(0)) fprintf(stderr, "note: the prompt is read from standard input; end it with Ctrl-D\n");
    while ((got = fread(text + n, 1, room - n, stdin)) > 0)
        if ((n += got) == room) text = (char *)xrealloc(text, room *= 2);
    if (ferror(stdin)) die(EXIT_SYSTEM, "standard input: cannot read: %s", strerror(errno));
    *bytes = n;
    return text;
}

LLMC_FN int read_prompts(Prompts *p, const GenerateOptions *o, const Tokenizer *t, int64_t V, Error *err) {
    size_t bytes;
    int rc = 0;
    if (o->prompt) return prompts_add_(p, o, t, V, o->prompt, strlen(o->prompt), "--prompt", err);
    char *text = o->prompt_file ? read_small_file(o->prompt_file, (size_t)1 << 30, &bytes, err) : read_standard_input_(&bytes);
    if (!text) return -1;
    if (!o->prompt_file) {
        if (bytes > 0 && text[bytes - 1] == '\n') bytes--;      // the end of a line that echo puts there
        rc = prompts_add_(p, o, t, V, text, bytes, "the prompt on standard input", err);
    } else if (bytes == 0) rc = fail(err, "--prompt-file: %s is empty", o->prompt_file);
    for (const char *line = text, *end = text + bytes; o->prompt_file && rc == 0 && line < end; ) {
        const char *stop = (const char *)memchr(line, '\n', (size_t)(end - line));
        char *what = xasprintf("--prompt-file: line %" PRId64 " of %.200s", p->count + 1, o->prompt_file);
        if (!stop) stop = end;
        rc = prompts_add_(p, o, t, V, line, (size_t)(stop - line), what, err);
        free(what);
        line = stop + 1;
    }
    free(text);
    return rc;
}

// ---------------------------------------------------------------------------------------------------------------------
// Output. The first text that has not ended streams as it comes; those after it wait for their turn.

typedef struct {
    int32_t *ids;               // prompt and what followed
    int64_t n;
    int ended;
    char *text;                 // what is to be printed of them
    size_t bytes, room, printed;
} Sequence;

LLMC_FN void sequence_add_text_(Sequence *s, const char *text, size_t bytes) {
    if (s->bytes + bytes > s->room) s->text = (char *)xrealloc(s->text, s->room = 2 * (s->bytes + bytes) + 64);
    memcpy(s->text + s->bytes, text, bytes);
    s->bytes += bytes;
}

// Takes up a token; shown: it is part of the output.
LLMC_FN void sequence_add(Sequence *s, int32_t id, int shown, const GenerateOptions *o, const Tokenizer *t) {
    s->ids[s->n++] = id;
    if (!shown) return;
    char number[16];
    size_t bytes;
    const char *text = tokenizer_decode(t, id, &bytes);
    if (o->ids) bytes = (size_t)snprintf(number, sizeof number, "%s%d", s->bytes ? " " : "", id), text = number;
    sequence_add_text_(s, text, bytes);
}

// How many bytes at the end of a text begin a UTF-8 character that is not whole yet.
LLMC_FN size_t utf8_begun_(const char *text, size_t bytes) {
    for (size_t k = 1; k <= 3 && k <= bytes; k++) {
        unsigned char c = (unsigned char)text[bytes - k];
        if ((c & 0xC0) == 0x80) continue;       // inside a character
        return k < (c >= 0xF5 ? 1u : c >= 0xF0 ? 4u : c >= 0xE0 ? 3u : c >= 0xC2 ? 2u : 1u) ? k : 0;
    }
    return 0;
}

// Prints what can be printed; *turn is the text whose turn it is. Each of several stands under a line of its own.
LLMC_FN void print_sequences(Sequence *s, int64_t B, int64_t *turn, const GenerateOptions *o) {
    for (; *turn < B; (*turn)++) {
        Sequence *now = &s[*turn];
        size_t whole = now->bytes - (now->ended ? 0 : utf8_begun_(now->text, now->bytes));
        if (now->printed == 0 && B > 1 && (whole > 0 || now->ended)) {
            printf("--- ");
            if (B > o->num_samples) printf("prompt %" PRId64 "%s", *turn / o->num_samples + 1, o->num_samples > 1 ? ", " : "\n");
            if (o->num_samples > 1) printf("text %" PRId64 "\n", *turn % o->num_samples + 1);
        }
        if (whole > now->printed) fwrite(now->text + now->printed, 1, whole - now->printed, stdout);
        now->printed = whole;
        if (!now->ended) break;
        putchar('\n');
    }
    if (fflush(stdout) != 0 || ferror(stdout)) die(EXIT_SYSTEM, "standard output: cannot write: %s", strerror(errno));
}

// ---------------------------------------------------------------------------------------------------------------------
// Making text

LLMC_FN int compare_doubles_(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// What the run is, and its cache beside that of MHA with the same heads.
LLMC_FN void print_generation(const GenerateOptions *o, const char *folder, const Model *m, int64_t B, int64_t capacity) {
    const Config *c = &m->config;
    Config mha_config = *c;
    mha_config.attn = ATTN_MHA;
    Model mha;
    model_init(&mha, &mha_config, generator_pad());
    double bytes = generator_cache_bytes(o, m, 1), mha_bytes = generator_cache_bytes(o, &mha, 1);
    model_free(&mha);
    fprintf(stderr, "model: %s, %s, %.1fM parameters: L %" PRId64 ", C %" PRId64 ", %" PRId64 " heads of %" PRId64 ", vocabulary %" PRId64 "\n", folder,
            attn_name(c->attn), (double)m->num_parameters / 1e6, c->n_layer, c->n_embd, c->n_head, c->head_dim, c->vocab_size);
    fprintf(stderr, "cache: %s, %.0f bytes a token, %.1f MiB for %" PRId64 " x %" PRId64 " tokens; MHA of the same heads: %.0f bytes a token, "
            "%.1f times that\n", o->cache, bytes, bytes * (double)B * (double)capacity / 0x1p20, B, capacity, mha_bytes, mha_bytes / bytes);
}

// Stops where weights, from elsewhere and without checksums, are no numbers.
LLMC_FN void check_finite_(Generator *g, int64_t B) {
    int64_t n = B * generator_model(g)->config.vocab_size, bad = 0;
    float *logits = (float *)xmalloc((size_t)n * sizeof *logits);
    generator_logits(g, logits);
    for (int64_t i = 0; i < n; i++) bad += !isfinite(logits[i]);
    free(logits);
    if (bad) die(EXIT_INPUT, "--model: %" PRId64 " of %" PRId64 " logits after the prompts are no numbers; the weights are damaged", bad, n);
}

// Makes B = prompts x num_samples texts and prints them.
LLMC_FN void generate(Generator *g, const GenerateOptions *o, const Prompts *p, const Tokenizer *t, int64_t B, int64_t capacity) {
    int eot = end_of_text(generator_model(g)->config.vocab_size);
    Sequence *s = (Sequence *)xcalloc((size_t)B, sizeof *s);
    int32_t *next = (int32_t *)xmalloc((size_t)B * sizeof *next);
    double *latency = (double *)xmalloc((size_t)o->max_tokens * sizeof *latency), decode_seconds = 0, start = now_seconds();
    int64_t turn = 0, steps = 0, live = B, prompt_tokens = 0, new_tokens = 0;
    for (int64_t b = 0; b < B; b++) {
        const Prompt *prompt = &p->list[b / o->num_samples];
        s[b].ids = (int32_t *)xmalloc((size_t)capacity * sizeof(int32_t));
        for (int64_t i = 0; i < prompt->n; i++) sequence_add(&s[b], prompt->ids[i], (int)o->echo, o, t);
        generator_prefill(g, b, prompt->ids, prompt->n);
        prompt_tokens += prompt->n;
    }
    double prefill_seconds = now_seconds() - start;
    check_finite_(g, B);
    print_sequences(s, B, &turn, o);
    for (int64_t i = 0; ; i++) {
        start = now_seconds();
        generator_sample(g, &o->sampler, (uint64_t)o->seed, next);
        double sample_seconds = now_seconds() - start;
        for (int64_t b = 0; b < B; b++) {
            if (s[b].ended) continue;
            int stops = o->stop && next[b] == eot;
            sequence_add(&s[b], next[b], !stops, o, t);
            new_tokens++;
            s[b].ended = stops || i + 1 == o->max_tokens;
            live -= s[b].ended;
        }
        print_sequences(s, B, &turn, o);
        if (live == 0) break;
        start = now_seconds();
        if (!o->no_cache) generator_step(g, next, 1);
        else for (int64_t b = 0; b < B; b++)
            if (!s[b].ended) generator_prefill(g, b, s[b].ids, s[b].n);
        latency[steps] = sample_seconds + now_seconds() - start;
        decode_seconds += latency[steps++];
    }
    if (o->stats) {
        qsort(latency, (size_t)steps, sizeof *latency, compare_doubles_);
        fprintf(stderr, "prefill: %" PRId64 " tokens in %.3f s, %.1f tokens/s\n", prompt_tokens, prefill_seconds,
                (double)prompt_tokens / prefill_seconds);
        if (steps)
            fprintf(stderr, "decode%s: %" PRId64 " tokens in %.3f s, %.1f tokens/s; a step, one token of each text: median %.3f ms, p99 %.3f ms\n",
                    o->no_cache ? " without cache" : "", new_tokens - B, decode_seconds, (double)(new_tokens - B) / decode_seconds,
                    latency[steps / 2] * 1e3, latency[(steps * 99 + 99) / 100 - 1] * 1e3);
    }
    for (int64_t b = 0; b < B; b++) free(s[b].ids), free(s[b].text);
    free(s), free(next), free(latency);
}

// ---------------------------------------------------------------------------------------------------------------------
// Checks: every way to the logits of what follows some tokens must lead to the same

// Weights are in a checkpoint's folder, or in a golden file.
typedef struct { const char *folder; const SafeTensors *golden; } WeightSource;

LLMC_FN Generator *generator_load(const GenerateOptions *o, const Config *c, int64_t B, int64_t capacity, WeightSource from) {
    Error err;
    int used = 0;
    Generator *g = generator_open(o, c, B, capacity);
    float *weights = generator_host_weights(g);
    if ((from.golden ? checkpoint_read_tensors(from.golden, generator_model(g), "", weights, &used, &err)
                     : checkpoint_load_weights(from.folder, generator_model(g), weights, &err)) != 0) die(EXIT_INPUT, "%s", err.text);
    generator_take_weights(g);
    return g;
}

// An fp8 number is off by at most 2^-4 of itself, 2.6% in the root mean square. Of logits that made 0.05% to 5% in the models of the tests and
// 7.5% at the worst place of one with sharp attention. What is wrong (a scale, a code, a slot) makes about 100%.
#define FP8_TOLERANCE 0.25
// Rounding's error in logits grows with the sharpness of attention: from 1e-7 to 5e-6 in trained models in fp32. Golden files have none.
#define CHECK_MARGIN 10

typedef struct {
    double prefill, steps, batch, fp8;  // the largest ||a - b|| / ||b|| of each way
    uint64_t hash;                      // of the bits of all logits that were looked at
    int passed;
} WayErrors;

// Compares logits (V) with those that are wanted; the larger of their difference and *worst becomes *worst.
LLMC_FN void compare_logits_(WayErrors *e, double *worst, const float *logits, const float *want, int64_t V) {
    double difference = 0, size = 0;
    for (int64_t i = 0; i < V; i++) difference += pow((double)logits[i] - want[i], 2), size += pow(want[i], 2);
    double error = sqrt(difference / size);
    if (!isnan(*worst) && !(error <= *worst)) *worst = error;     // NaN is worst
    e->hash = XXH64(logits, (size_t)V * sizeof *logits, e->hash);
}

// The logits (V) after ids (n >= 2), by one prefill, by a prefill and steps of every size, among shorter sequences, and with an fp8 cache.
// want (V): what those of one prefill should be, where that is known, else NULL. tolerance: of all but fp8.
LLMC_FN WayErrors check_ways(const GenerateOptions *options, const Config *c, WeightSource from, const int32_t *ids, int64_t n, const float *want,
                             double tolerance) {
    GenerateOptions o = *options;
    o.longest_prefill = n;
    WayErrors e = {0, 0, 0, 0, 0, 0};
    int64_t V = c->vocab_size;
    float *reference = (float *)xmalloc((size_t)V * sizeof(float)), *logits = (float *)xmalloc(3 * (size_t)V * sizeof(float));
    for (int fp8 = 0; fp8 < 2; fp8++) {
        o.cache_kind = fp8 ? CACHE_FP8 : CACHE_NATIVE;
        Generator *g = generator_load(&o, c, 1, n, from);
        if (!fp8) {
            generator_prefill(g, 0, ids, n);
            generator_logits(g, reference);
            compare_logits_(&e, &e.prefill, reference, want ? want : reference, V);
        }
        for (int64_t size = 1; size <= MAX_STEP_TOKENS && size < n; size++) {
            int64_t at = 1 + (n - 1) % size;
            generator_prefill(g, 0, ids, at);
            for (; at < n; at += size) generator_step(g, ids + at, size);
            generator_logits(g, logits);
            compare_logits_(&e, fp8 ? &e.fp8 : &e.steps, logits, reference, V);
        }
        generator_close(g);
    }
    o.cache_kind = CACHE_NATIVE;
    Generator *g = generator_load(&o, c, 3, n, from);
    int32_t last[3] = {ids[n - 1], ids[0], ids[n - 1]};
    generator_prefill(g, 2, ids, n - 1);
    generator_prefill(g, 1, ids, n / 2);
    generator_prefill(g, 0, ids, n - 1);
    generator_step(g, last, 1);
    generator_logits(g, logits);
    compare_logits_(&e, &e.batch, logits, reference, V);
    compare_logits_(&e, &e.batch, logits + 2 * V, reference, V);
    generator_close(g);
    free(reference), free(logits);
    e.passed = e.prefill <= tolerance && e.steps <= tolerance && e.batch <= tolerance && e.fp8 <= FP8_TOLERANCE;
    return e;
}

// A golden file (test_t6.c says what it holds): greedy tokens through the cache, and all ways to the logits. Returns 1: passed, 0: failed,
// -1: it is of a kind that is not built.
LLMC_FN int check_golden_tokens(const GenerateOptions *options, const char *path) {
    Error err;
    SafeTensors file;
    Config config;
    if (safetensors_open(&file, path, &err) != 0) { printf("FAIL golden %s\n", err.text); return 0; }
    const char *json = safetensors_metadata(&file, "config");
    const SafeTensor *idx = safetensors_find(&file, "idx"), *gen = safetensors_find(&file, "gen.tokens"), *logits = safetensors_find(&file, "logits");
    cJSON *parsed = json ? cJSON_Parse(json) : NULL;
    int is_config = cJSON_IsObject(parsed), result = 0;
    cJSON_Delete(parsed);
    if (!is_config || !idx || idx->num_dims != 2 || idx->shape[0] < 1 || idx->shape[1] < 2 || !gen || gen->elements < 1 || !logits ||
        logits->num_dims != 3 || logits->shape[0] != idx->shape[0] || logits->shape[1] != idx->shape[1]) {
        printf("FAIL golden %s: its config, idx (B, T), logits (B, T, V) or gen.tokens is missing; not a golden file\n", path);
    } else if (config_from_json(&config, json, path, &err) != 0) {
        printf("skip golden %s\n", err.text);
        result = -1;
    } else {
        int64_t T = idx->shape[1], new_tokens = (int64_t)gen->elements, V = config.vocab_size, wrong = 0, capacity = T + new_tokens;
        double *numbers = (double *)xmalloc((size_t)(capacity + V) * sizeof *numbers);      // idx[0], gen.tokens, logits[0][T - 1]
        int32_t *ids = (int32_t *)xmalloc((size_t)capacity * sizeof *ids), next;
        float *want = (float *)xmalloc((size_t)V * sizeof *want);
        int rc = logits->shape[2] == V ? 0 : fail(&err, "%s: logits are of %" PRId64 " tokens, its config says %" PRId64, path, logits->shape[2], V);
        if (rc == 0) rc = safetensors_read(&file, idx, 0, (uint64_t)T, numbers, &err);
        if (rc == 0) rc = safetensors_read(&file, gen, 0, (uint64_t)new_tokens, numbers + T, &err);
        if (rc == 0) rc = safetensors_read(&file, logits, (uint64_t)((T - 1) * V), (uint64_t)V, numbers + capacity, &err);
        for (int64_t i = 0; i < capacity && rc == 0; i++) {
            if (!(numbers[i] >= 0 && numbers[i] < (double)V))
                rc = fail(&err, "%s: it has the token %g, beyond the vocabulary of %" PRId64, path, numbers[i], V);
            else ids[i] = (int32_t)numbers[i];
        }
        if (rc != 0) printf("FAIL golden %s\n", err.text);
        else {
            GenerateOptions o = *options;
            WeightSource from = {NULL, &file};
            o.longest_prefill = T;
            for (int64_t i = 0; i < V; i++) want[i] = (float)numbers[capacity + i];
            Generator *g = generator_load(&o, &config, 1, capacity, from);
            generator_prefill(g, 0, ids, T);
            for (int64_t i = T; i < capacity; i++) {
                SamplerOptions greedy = {0, 0, 1, 0};
                generator_sample(g, &greedy, 0, &next);
                if (next != ids[i] && wrong++ == 0) printf("     %s: gen.tokens[%" PRId64 "]: %d, should be %d\n", path, i - T, next, ids[i]);
                generator_step(g, &next, 1);
            }
            generator_close(g);
            WayErrors e = check_ways(&o, &config, from, ids, T, want, generator_tolerance());
            result = wrong == 0 && e.passed;
            printf("%s golden %s: %" PRId64 " tokens, %" PRId64 " wrong; logits off by %.1e (prefill), %.1e (steps of 1 to %d), %.1e (batch), "
                   "%.1e (fp8 cache)\n", result ? "ok  " : "FAIL", path, new_tokens, wrong, e.prefill, e.steps, MAX_STEP_TOKENS, e.batch, e.fp8);
        }
        free(numbers), free(ids), free(want);
    }
    safetensors_close(&file);
    return result;
}

// generate_t6 --golden FILE...
LLMC_FN int check_golden_files(int argc, char **argv) {
    int passed = 0, failed = 0;
    GenerateOptions o;
    memset(&o, 0, sizeof o);
    if (argc == 2) die(EXIT_INPUT, "--golden needs files: %s --golden test/golden/*.safetensors", argv[0]);
    generator_start(&o);
    for (int i = 2; i < argc; i++) {
        int result = check_golden_tokens(&o, argv[i]);
        passed += result == 1, failed += result == 0;
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed ? 1 : 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// The program

LLMC_FN int generator_main(int argc, char **argv, const char *title) {
    Error err;
    GenerateOptions o;
    set_program_name(argv[0]);
    if (argc > 1 && !strcmp(argv[1], "--golden")) return check_golden_files(argc, argv);
    if (generate_options(&o, argc, argv, title, &err) != 0) die(EXIT_INPUT, "%s", err.text);
    generator_start(&o);

    // Everything that can be wrong is looked at first, what is quick to look at before what takes time
    Config config;
    Tokenizer tokenizer;
    Prompts prompts = {NULL, 0};
    memset(&tokenizer, 0, sizeof tokenizer);
    char *folder = generator_folder_(o.model, &err);
    if (!folder || checkpoint_load_config(folder, &config, &err) != 0) die(EXIT_INPUT, "--model: %s", err.text);
    int64_t V = config.vocab_size;
    if (!o.ids && end_of_text(V) < 0)
        die(EXIT_INPUT, "--model: its vocabulary of %" PRId64 " is neither bytes (257) nor GPT-2's (50257): give and get numbers of tokens, with "
            "--ids", V);
    if (!o.ids && V < GPT2_VOCAB_SIZE) tokenizer_init_bytes(&tokenizer);
    else if (!o.ids && tokenizer_init_gpt2(&tokenizer, o.vocab, &err) != 0)
        die(EXIT_INPUT, "--vocab: %s; data/gpt2_vocab.sh gets it, and --ids needs none", err.text);
    tokenizer_prepare(&tokenizer);
    if (read_prompts(&prompts, &o, &tokenizer, V, &err) != 0) die(EXIT_INPUT, "%s", err.text);
    int64_t B = prompts.count * o.num_samples, longest = 0;
    for (int64_t i = 0; i < prompts.count; i++) longest = prompts.list[i].n > longest ? prompts.list[i].n : longest;
    int64_t capacity = longest + o.max_tokens;
    if (o.check && prompts.list[0].n < 2) die(EXIT_INPUT, "--check needs a prompt of at least 2 tokens");
    o.longest_prefill = o.no_cache ? capacity : longest;

    Model planned;
    model_init(&planned, &config, generator_pad());
    if (o.stats || o.plan) print_generation(&o, folder, &planned, B, capacity);
    generator_plan(&o, &planned, B, capacity);
    model_free(&planned);
    char *sums = xasprintf("%s/CHECKSUMS", folder);
    int rc = 0;
    if (!o.plan) {
        WeightSource from = {folder, NULL};
        if (access(sums, F_OK) == 0 && checkpoint_verify(folder, NUM_MODEL_FILES, &err) != 0) die(EXIT_INPUT, "--model: %s", err.text);
        if (o.check) {
            double tolerance = CHECK_MARGIN * generator_tolerance();
            WayErrors e = check_ways(&o, &config, from, prompts.list[0].ids, prompts.list[0].n, NULL, tolerance);
            printf("logits after %" PRId64 " tokens, beside those of one prefill:\n"
                   "  off by %.1e with steps of 1 to %d tokens, by %.1e in a batch (at most %.0e wanted), by %.1e with an fp8 cache (at most %.2g)\n"
                   "  hash of all their bits %016" PRIx64 "\n%d passed, %d failed\n", prompts.list[0].n, e.steps, MAX_STEP_TOKENS, e.batch,
                   tolerance, e.fp8, FP8_TOLERANCE, e.hash, e.passed, !e.passed);
            rc = !e.passed;
        } else {
            Generator *g = generator_load(&o, &config, B, capacity, from);
            generate(g, &o, &prompts, &tokenizer, B, capacity);
            generator_close(g);
        }
    }
    for (int64_t i = 0; i < prompts.count; i++) free(prompts.list[i].ids);
    free(prompts.list), free(sums), free(folder);
    tokenizer_free(&tokenizer);
    return rc;
}

#endif
