// The generating program: prompts, the loop that generates text, and its output. generate_t6.c and generate_t6.cu end
// with this program around a model with a cache, which it calls through a table of functions (GeneratorModel,
// generate_options.h).
#ifndef LLMC_GENERATOR_H
#define LLMC_GENERATOR_H

#include "checkpoint.h"
#include "formats.h"
#include "generate_options.h"
#include "test/check_generator.h"
#include "tokenizer.h"

// ---------------------------------------------------------------------------------------------------------------------
// Prompts: text or token ids to tokens

typedef struct { int32_t *ids; int64_t n; } Prompt;
typedef struct { Prompt *list; int64_t count; } Prompts;

// The end-of-text token of a vocabulary of V: GPT-2's if V has room for GPT-2's tokens, else that of bytes if it has
// room for those, else -1.
LLMC_FN int end_of_text(int64_t V) {
    return V >= GPT2_VOCAB_SIZE ? GPT2_EOT : V >= BYTES_VOCAB_SIZE ? BYTES_EOT : -1;
}

// Encodes a text, in which <|endoftext|> stands for that token. ids has room for `bytes` tokens. Returns their number.
LLMC_FN int64_t encode_text_(const Tokenizer *t, const char *text, size_t bytes, int32_t *ids) {
    uint16_t *tokens = (uint16_t *)xmalloc(bytes * sizeof *tokens);
    EncodeScratch scratch;
    encode_scratch_init(&scratch);
    int64_t n = (int64_t)tokenizer_encode_special(t, text, bytes, tokens, &scratch);
    for (int64_t i = 0; i < n; i++) ids[i] = tokens[i];
    encode_scratch_free(&scratch);
    free(tokens);
    return n;
}

// The same for decimal token ids separated by white space, each below V. -1: with the reason in err.
LLMC_FN int64_t encode_numbers_(const char *text, size_t bytes, int64_t V, int32_t *ids, Error *err) {
    char *copy = (char *)xmalloc(bytes + 1), *save = NULL;
    int64_t n = 0;
    memcpy(copy, text, bytes);
    copy[bytes] = 0;
    if (strlen(copy) < bytes)
        n = fail(err, "there is a zero byte among the tokens; --ids takes numbers separated by white space");
    for (char *word = strtok_r(copy, " \t\r\n", &save), *end; word && n >= 0; word = strtok_r(NULL, " \t\r\n", &save)) {
        errno = 0;
        long long id = strtoll(word, &end, 10);
        if (*end || errno || id < 0 || id >= V)
            n = fail(err, "\"%.20s\" is not a token; --ids takes numbers from 0 to %" PRId64, word, V - 1);
        else ids[n++] = (int32_t)id;
    }
    free(copy);
    return n;
}

// Encodes a prompt and appends it to p; `what` names it in errors.
LLMC_FN int prompts_add_(Prompts *p, const GenerateOptions *o, const Tokenizer *t, int64_t V, const char *text,
                         size_t bytes, const char *what, Error *err) {
    Error why;
    int32_t *ids = (int32_t *)xmalloc((bytes + 1) * sizeof *ids);
    int64_t n = o->ids ? encode_numbers_(text, bytes, V, ids, &why) : encode_text_(t, text, bytes, ids);
    int rc = 0;
    if (n < 0) rc = fail(err, "%s: %s", what, why.text);
    else if (n == 0)
        rc = fail(err, "%s is empty; to start from nothing, start with end-of-text: --prompt '<|endoftext|>'", what);
    else if (o->context && n + o->max_tokens > o->context)
        rc = fail(err, "%s has %" PRId64 " tokens; with --max-tokens %" PRId64 " that exceeds --context %" PRId64
                  "; lower --max-tokens or raise --context", what, n, o->max_tokens, o->context);
    p->list = (Prompt *)xrealloc(p->list, ((size_t)p->count + 1) * sizeof *p->list);
    p->list[p->count++] = (Prompt){ids, n};
    return rc;
}

// All of standard input, which the caller frees.
LLMC_FN char *read_standard_input_(size_t *bytes) {
    size_t room = 1 << 16, n = 0, got;
    char *text = (char *)xmalloc(room);
    if (isatty(0)) fprintf(stderr, "note: reading the prompt from standard input; end it with Ctrl-D\n");
    while ((got = fread(text + n, 1, room - n, stdin)) > 0)
        if ((n += got) == room) text = (char *)xrealloc(text, room *= 2);
    if (ferror(stdin)) die(EXIT_SYSTEM, "standard input: cannot read: %s", strerror(errno));
    *bytes = n;
    return text;
}

// The length of a text without the line end after it, "\n" or "\r\n".
LLMC_FN size_t without_line_end_(const char *text, size_t bytes) {
    if (bytes == 0 || text[bytes - 1] != '\n') return bytes;
    return bytes - 1 - (bytes > 1 && text[bytes - 2] == '\r');
}

// All prompts that the options name: --prompt, the lines of --prompt-file, or standard input.
LLMC_FN int read_prompts(Prompts *p, const GenerateOptions *o, const Tokenizer *t, int64_t V, Error *err) {
    size_t bytes;
    int rc = 0;
    if (o->prompt) return prompts_add_(p, o, t, V, o->prompt, strlen(o->prompt), "--prompt", err);
    char *text = o->prompt_file ? read_small_file(o->prompt_file, (size_t)1 << 30, &bytes, err)
        : read_standard_input_(&bytes);
    if (!text) return -1;
    const char *line = text + byte_order_mark(text, bytes), *end = text + bytes, *wide = wide_encoding(text, bytes);
    const char *flag = o->prompt_file ? "--prompt-file: " : "", *name = o->prompt_file ? o->prompt_file
        : "standard input";
    const Format *format = format_of_content(text, bytes);
    // A mark in letters, such as PDF's, may be the start of a text. The file then has zero bytes too.
    if (format && (format->packing != PACKED_NOT || memchr(text, 0, bytes)))
        rc = fail(err, "%s%.500s: %s; %s", flag, name, format->what, format->advice);
    else if (wide)
        rc = fail(err, "%s%.500s: text in %s; convert it to UTF-8 first, with iconv -f %s -t UTF-8", flag, name, wide,
                  wide);
    else if (!o->prompt_file)           // without the newline that echo appends
        rc = prompts_add_(p, o, t, V, line, without_line_end_(line, (size_t)(end - line)),
                          "the prompt on standard input", err);
    else if (line == end) rc = fail(err, "--prompt-file: %s is empty", o->prompt_file);
    while (o->prompt_file && rc == 0 && line < end) {
        const char *newline = (const char *)memchr(line, '\n', (size_t)(end - line));
        const char *next = newline ? newline + 1 : end;
        char *what = xasprintf("--prompt-file: line %" PRId64 " of %.200s", p->count + 1, o->prompt_file);
        rc = prompts_add_(p, o, t, V, line, without_line_end_(line, (size_t)(next - line)), what, err);
        free(what);
        line = next;
    }
    free(text);
    return rc;
}

// ---------------------------------------------------------------------------------------------------------------------
// Output. The first text that has not ended streams as it grows; later ones wait for their turn.

typedef struct {
    int32_t *ids;               // prompt and what followed
    int64_t n;
    int ended;
    char *text;                 // what to print of them, in bytes: length, allocated, already printed
    size_t bytes, room, printed;
} Sequence;

LLMC_FN void sequence_add_text_(Sequence *s, const char *text, size_t bytes) {
    if (s->bytes + bytes > s->room) s->text = (char *)xrealloc(s->text, s->room = 2 * (s->bytes + bytes) + 64);
    memcpy(s->text + s->bytes, text, bytes);
    s->bytes += bytes;
}

// Appends a token; HIDDEN: it is not part of the output.
typedef enum { SHOWN, HIDDEN } Visibility;
LLMC_FN void sequence_add(Sequence *s, int32_t id, Visibility v, const GenerateOptions *o, const Tokenizer *t) {
    s->ids[s->n++] = id;
    if (v == HIDDEN) return;
    char number[16];
    size_t bytes;
    const char *text = tokenizer_decode(t, id, &bytes);
    if (o->ids) bytes = (size_t)snprintf(number, sizeof number, "%s%d", s->bytes ? " " : "", id), text = number;
    sequence_add_text_(s, text, bytes);
}

// How many bytes at the end of a text are the start of a UTF-8 character whose rest is still to come.
LLMC_FN size_t utf8_begun(const char *text, size_t bytes) {
    for (size_t k = 1; k <= 3 && k <= bytes; k++) {
        unsigned char c = (unsigned char)text[bytes - k];
        if ((c & 0xC0) == 0x80) continue;       // inside a character
        return k < (c >= 0xF5 ? 1u : c >= 0xF0 ? 4u : c >= 0xE0 ? 3u : c >= 0xC2 ? 2u : 1u) ? k : 0;
    }
    return 0;
}

// Prints what is new of text *turn, and moves *turn past texts that have ended (B: all have). Several texts get
// headings.
LLMC_FN void print_sequences(Sequence *s, int64_t B, int64_t *turn, const GenerateOptions *o) {
    for (; *turn < B; (*turn)++) {
        Sequence *now = &s[*turn];
        size_t whole = now->bytes - (now->ended ? 0 : utf8_begun(now->text, now->bytes));
        if (now->printed == 0 && B > 1 && (whole > 0 || now->ended)) {
            printf("--- ");
            const char *end = o->num_samples > 1 ? ", " : "\n";
            if (B > o->num_samples) printf("prompt %" PRId64 "%s", *turn / o->num_samples + 1, end);
            if (o->num_samples > 1) printf("text %" PRId64 "\n", *turn % o->num_samples + 1);
        }
        if (whole > now->printed) fwrite(now->text + now->printed, 1, whole - now->printed, stdout);
        now->printed = whole;
        if (!now->ended) break;
        putchar('\n');
    }
    check_stdout();
}

// ---------------------------------------------------------------------------------------------------------------------
// Generating

// A run of the program: its input, checked.
typedef struct {
    const GeneratorModel *ops;
    GenerateOptions o;
    Config config;
    char *folder;               // of the checkpoint
    Tokenizer tokenizer;
    Prompts prompts;
    int64_t B;                  // texts: prompts x num_samples
    int64_t capacity;           // most tokens of a text: of the longest prompt and --max-tokens
} Generation;

// Prints the model, and its cache compared with that of MHA with the same heads.
LLMC_FN void print_generation(const Generation *run, const Model *m) {
    const GenerateOptions *o = &run->o;
    const Config *c = &m->config;
    Config mha_config = *c;
    mha_config.attn = ATTN_MHA, mha_config.a_constant = mha_config.b_constant = 0;
    mha_config.share_kv_b = mha_config.b_dim = 0, mha_config.head_act = HEAD_ACT_NONE;
    Model mha;
    model_init(&mha, &mha_config, run->ops->pad);
    double bytes = run->ops->cache_bytes(o, m, 1), mha_bytes = run->ops->cache_bytes(o, &mha, 1);
    model_free(&mha);
    fprintf(stderr, "model: %s, %s, %.1fM parameters: L %" PRId64 ", C %" PRId64 ", %" PRId64 " heads of %" PRId64
            ", vocabulary %" PRId64 "\n", run->folder, attn_name(c->attn), (double)m->num_parameters / 1e6, c->n_layer,
            c->n_embd, c->n_head, c->head_dim, c->vocab_size);
    double MiB = bytes * (double)run->B * (double)run->capacity / 0x1p20;
    fprintf(stderr, "cache: %s, %.0f bytes per token, %.1f MiB for %" PRId64 " x %" PRId64 " tokens; MHA with the same "
            "heads: %.0f bytes per token, %.1f times as much\n", o->cache, bytes, MiB, run->B, run->capacity, mha_bytes,
            mha_bytes / bytes);
}

LLMC_FN int compare_doubles_(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Prints the speed of prefill and decoding. latency (steps): seconds of each step; it comes back sorted. A text's first
// token is drawn from the logits of its prefill, so decoding made new_tokens - B.
LLMC_FN void print_speed_(const Generation *run, int64_t prompt_tokens, double prefill_seconds, int64_t new_tokens,
                          double *latency, int64_t steps) {
    double decode_seconds = 0;
    for (int64_t i = 0; i < steps; i++) decode_seconds += latency[i];
    qsort(latency, (size_t)steps, sizeof *latency, compare_doubles_);
    fprintf(stderr, "prefill: %" PRId64 " tokens in %.3f s, %.1f tokens/s\n", prompt_tokens, prefill_seconds,
            (double)prompt_tokens / prefill_seconds);
    if (steps)
        fprintf(stderr, "decode%s: %" PRId64 " tokens in %.3f s, %.1f tokens/s; a step of one token per text: median "
                "%.3f ms, p99 %.3f ms\n", run->o.no_cache ? " without cache" : "", new_tokens - run->B, decode_seconds,
                (double)(new_tokens - run->B) / decode_seconds, latency[steps / 2] * 1e3,
                latency[(steps * 99 + 99) / 100 - 1] * 1e3);
}

// Ends the program if logits are not finite after the prompts: weights from elsewhere may come without checksums.
LLMC_FN void check_finite_(const Generation *run, Generator *g) {
    int64_t n = run->B * run->config.vocab_size, bad = 0;
    float *logits = (float *)xmalloc((size_t)n * sizeof *logits);
    run->ops->logits(g, logits);
    for (int64_t i = 0; i < n; i++) bad += !isfinite(logits[i]);
    free(logits);
    if (bad)
        die(EXIT_INPUT, "--model: %" PRId64 " of %" PRId64 " logits after the prompts are not finite; the weights "
            "are damaged", bad, n);
}

// Appends next[b] to each text b that has not ended. Returns how many tokens that were. step: 0 for the first.
LLMC_FN int64_t add_tokens_(const Generation *run, Sequence *s, const int32_t *next, int64_t step) {
    int eot = end_of_text(run->config.vocab_size);
    int64_t added = 0;
    for (int64_t b = 0; b < run->B; b++) {
        if (s[b].ended) continue;
        int stops = run->o.stop && next[b] == eot;
        sequence_add(&s[b], next[b], stops ? HIDDEN : SHOWN, &run->o, &run->tokenizer);
        s[b].ended = stops || step + 1 == run->o.max_tokens;
        added++;
    }
    return added;
}

// Generates and prints the texts. Those that have ended take part in steps until all have, but grow no more.
LLMC_FN void generate(const Generation *run, Generator *g) {
    const GeneratorModel *ops = run->ops;
    const GenerateOptions *o = &run->o;
    int64_t B = run->B, turn = 0, steps = 0, prompt_tokens = 0, new_tokens = 0;
    Sequence *s = (Sequence *)xcalloc((size_t)B, sizeof *s);
    int32_t *next = (int32_t *)xmalloc((size_t)B * sizeof *next);
    double *latency = (double *)xmalloc((size_t)o->max_tokens * sizeof *latency), start = now_seconds();
    for (int64_t b = 0; b < B; b++) {
        const Prompt *prompt = &run->prompts.list[b / o->num_samples];
        s[b].ids = (int32_t *)xmalloc((size_t)run->capacity * sizeof(int32_t));
        for (int64_t i = 0; i < prompt->n; i++)
            sequence_add(&s[b], prompt->ids[i], o->echo ? SHOWN : HIDDEN, o, &run->tokenizer);
        ops->prefill(g, b, prompt->ids, prompt->n);
        prompt_tokens += prompt->n;
    }
    double prefill_seconds = now_seconds() - start;
    check_finite_(run, g);
    print_sequences(s, B, &turn, o);
    for (;;) {
        start = now_seconds();
        ops->sample(g, &o->sampler, (uint64_t)o->seed, next);
        double sample_seconds = now_seconds() - start;
        new_tokens += add_tokens_(run, s, next, steps);
        print_sequences(s, B, &turn, o);
        if (turn == B) break;       // all have ended
        start = now_seconds();
        if (!o->no_cache) ops->step(g, next, 1);
        else for (int64_t b = 0; b < B; b++)
            if (!s[b].ended) ops->prefill(g, b, s[b].ids, s[b].n);
        latency[steps++] = sample_seconds + now_seconds() - start;
    }
    if (o->stats) print_speed_(run, prompt_tokens, prefill_seconds, new_tokens, latency, steps);
    for (int64_t b = 0; b < B; b++) free(s[b].ids), free(s[b].text);
    free(s), free(next), free(latency);
}

// ---------------------------------------------------------------------------------------------------------------------
// The program

// Checks all input, what is quick to check first, and completes run and its options. Errors end the program with one
// line.
LLMC_FN void plan_generation(Generation *run) {
    GenerateOptions *o = &run->o;
    Error err;
    run->folder = checkpoint_folder(o->model, &err);
    if (!run->folder) die(EXIT_INPUT, "--model: %s; train a model, or name one with --model (-e)", err.text);
    if (checkpoint_load_config(run->folder, &run->config, &err) != 0) die(EXIT_INPUT, "--model: %s", err.text);
    int64_t V = run->config.vocab_size, longest = 0;
    if (!o->ids && end_of_text(V) < 0)
        die(EXIT_INPUT, "--model: its vocabulary of %" PRId64 " is neither bytes (257) nor GPT-2's (50257): use --ids, "
            "for token ids instead of text", V);
    if (!o->ids && V < GPT2_VOCAB_SIZE) tokenizer_init_bytes(&run->tokenizer);
    else if (!o->ids && tokenizer_init_gpt2(&run->tokenizer, o->vocab, &err) != 0)
        die(EXIT_INPUT, "--vocab: %s; data/gpt2_vocab.sh gets it, and --ids needs none", err.text);
    tokenizer_prepare(&run->tokenizer);
    if (!o->ids) o->sampler.known = run->tokenizer.vocab_size;
    if (read_prompts(&run->prompts, o, &run->tokenizer, V, &err) != 0) die(EXIT_INPUT, "%s", err.text);
    const Prompt *list = run->prompts.list;
    for (int64_t i = 0; i < run->prompts.count; i++) longest = list[i].n > longest ? list[i].n : longest;
    run->B = run->prompts.count * o->num_samples, run->capacity = longest + o->max_tokens;
    if (o->check && list[0].n < 2) die(EXIT_INPUT, "--check needs a prompt of at least 2 tokens");
    o->longest_prefill = o->no_cache ? run->capacity : longest;

    Model planned;
    model_init(&planned, &run->config, run->ops->pad);
    if (o->stats || o->plan) print_generation(run, &planned);
    run->ops->plan(o, &planned, run->B, run->capacity);
    model_free(&planned);
    if (!o->plan && checkpoint_verify_model(run->folder, &err) != 0) die(EXIT_INPUT, "--model: %s", err.text);
}

LLMC_FN int generator_main(int argc, char **argv, const GeneratorModel *ops) {
    program_start(argv[0]);
    if (argc > 1 && !strcmp(argv[1], "--golden")) return check_golden_files(argc, argv, ops);
    Error err;
    Generation *run = (Generation *)xcalloc(1, sizeof *run);
    int rc = 0;
    if (generate_options(&run->o, argc, argv, ops->title, &err) != 0) die(EXIT_INPUT, "%s", err.text);
    run->ops = ops;
    ops->start(&run->o);
    plan_generation(run);
    const Prompt *first = run->prompts.list;
    if (run->o.check && !run->o.plan)
        rc = check_prompt(ops, &run->o, &run->config, run->folder, first->ids, first->n);
    else if (!run->o.plan) {
        WeightSource from = {run->folder, NULL};
        Generator *g = generator_load(ops, &run->o, &run->config, run->B, run->capacity, from);
        generate(run, g);
        ops->close(g);
    }
    check_stdout();
    for (int64_t i = 0; i < run->prompts.count; i++) free(run->prompts.list[i].ids);
    tokenizer_free(&run->tokenizer);
    free(run->prompts.list), free(run->folder), free(run);
    return rc;
}

#endif
