// A toy corpus: short stories from a small probabilistic grammar, written as byte-level shards (llmc/shard.h). The
// exact entropy of the source is known and written next to them: the loss that no model can beat in the long run.
//
//     gcc -O2 -Wall -Wextra -I. data/toy_corpus.c -o data/toy_corpus -lcjson -lm
//
// The end of a story follows from its beginning: who has which thing, its colour, where it was hidden. A model that
// cannot look back must guess there; for one that can, only the free choices of the grammar are left to guess. All of
// these are uniform, so the probability of a story is 1 / (product of the numbers of alternatives).
//
// Bits per byte are the bits of all tokens divided by the bytes of text. Each story follows an end-of-text token, which
// costs bits like any token (that a story ends where it does is one of the choices) but is not a byte of text. So the
// mean loss of a trainer in nats, times tokens / (bytes ln 2), compares directly. A story ends with a newline.
#include <ctype.h>
#include <math.h>

#include "llmc/cpu_features.h"
#include "llmc/flags.h"
#include "llmc/formats.h"
#include "llmc/rng.h"
#include "llmc/shard.h"

#define NAME "toy"
#define DEPTH_LIMIT 64      // of rules within rules; a rule that contains itself is an error
#define STORY_BYTES 255     // of every story, see below

// ---------------------------------------------------------------------------------------------------------------------
// The grammar. A rule is a list of equally likely alternatives, separated by |. An alternative is text with markup:
//     <rule>       any alternative of the rule
//     {x:rule}     the same, but it is bound to x
//     {x}          the alternative that is bound to x
//     ~            from here to the end of the story, lower- and upper-case letters swap roles: there are two children,
//                  one with name a, thing t, colour c and place p, one with A, T, C and P; the rest is about either
//
// Every story has STORY_BYTES bytes: the words of a list are equally long, and so are the alternatives of a rule. With
// its end-of-text token a story takes 256 tokens, so windows of 256 tokens start where stories start. A window that cut
// a story would lack the words on which its rest depends, and no model's loss could come near the entropy.
//
// The words of a list differ in their first letters: with that one the choice is made, and the letters after it follow.
// The two children have lists of their own, so a word also tells whose it is. With the same lists for both, a model had
// to find out whose place follows "Ann went to the" from who had hidden what where, and none learned that within
// minutes (dev/LOG.md).
//
// The formula for the entropy is exact, and each text has only one derivation, because (--check tests both): rules that
// are bound to a letter are lists of different words, as long for x as for X; letters are bound before they are used;
// choices are independent. Words are of letters only, no letter follows one, and every story has the same number of
// {x}: --judge relies on this too.

typedef struct { const char *name, *text; } Rule;

static const Rule grammar[] = {
    {"story", "<opening> {a} had a {c:colour} {t:toy}. {a} hid the {c} {t} by the {p:place}. "
        "{A} had a {C:shade} {T:tool}. {A} hid the {C} {T} by the {P:spot}. <meanwhile> <asking>\n"},
    {"opening", "On a <fine> day {a:girl} met {A:boy} by the <place>."
        "|Long ago {a:girl} met {A:boy} near a <fine> <place>."},
    {"meanwhile", "They saw <fine> <animals>, <fine> <animals> and <fine> <animals>."
        "|They ate <fine> <sweets>, <fine> <sweets> and <fine> <sweets>."},
    {"asking", "<ask>|~<ask>"},
    {"ask", "Early in the evening {a} got the {c} {t} by the {p}."
        "|\"Is the {c} {t} by the {p}?\" \"Yes, my {t} is here.\""},

    {"girl", "Amy|Bea|Dot|Eve|Fay|Gia|Ivy|Joy|Kay|Liv|Mia|Nan|Pam|Sue|Una|Zoe"},
    {"boy", "Abe|Ben|Cal|Dan|Eli|Gus|Hal|Ian|Jim|Ken|Leo|Max|Ned|Ron|Tom"},
    {"colour", "blue|gold|jade|lime|navy|pink|rust|teal"},
    {"shade", "cyan|grey|mint|onyx|plum|ruby|sand"},
    {"toy", "bell|coin|drum|flag|gong|harp|kite|lamp|mask|nail|pipe|ring|sled|tray|vase|wand"},
    {"tool", "ball|cart|doll|fork|gown|horn|lute|mitt|oboe|pail|rope|sock|tile|vest|whip"},
    {"place", "barn|cave|dock|farm|gate|hill|kiln|lake|mill|nest|pond|rock|shed|tree|well|yard"},
    {"spot", "bush|crag|dune|fort|glen|hall|isle|lane|moor|nook|park|road|spot|vale|wall"},
    {"animals", "bears|crows|doves|foxes|goats|hares|kites|larks|moles|newts|pumas|rooks|swans|toads|voles|wrens"},
    {"sweets", "apple|beans|cakes|dates|fudge|guava|honey|jelly|kiwis|limes|mints|plums|rolls|scone|tarts|wafer"},
    {"fine", "bold|cold|dark|fine|good|huge|kind|lazy|mild|nice|pale|rare|safe|tiny|vast|wild"},
};

enum { NUM_RULES = sizeof grammar / sizeof *grammar, MAX_ALTERNATIVES = 16 };

// The grammar, split into alternatives. --check also makes one with shorter lists, so that it can list all stories.
typedef struct {
    int n[NUM_RULES];                                   // the number of alternatives
    const char *text[NUM_RULES][MAX_ALTERNATIVES];      // each ends at | or NUL
    int source[128];                                    // the rule that a letter is bound to; -1: none
} Grammar;

typedef enum { MARK_RULE, MARK_BIND, MARK_REPEAT, MARK_SWAP } MarkKind;

typedef struct {
    MarkKind kind;
    int rule;               // MARK_RULE and MARK_BIND
    int letter;             // MARK_BIND and MARK_REPEAT
} Mark;

static int find_rule(const char *name, size_t length) {
    for (int i = 0; i < NUM_RULES; i++)
        if (strlen(grammar[i].name) == length && !memcmp(grammar[i].name, name, length)) return i;
    die(EXIT_SYSTEM, "internal error: the grammar has no rule \"%.*s\"", (int)length, name);
}

// Reads the markup at *p and moves *p past it. Returns 0 if there is none.
static int read_mark(const char **p, Mark *m) {
    const char *c = *p;
    memset(m, 0, sizeof *m);
    m->rule = -1;
    if (*c == '~') {
        m->kind = MARK_SWAP;
        *p = c + 1;
        return 1;
    }
    if (*c == '<') {
        size_t length = strcspn(++c, ">");
        m->kind = MARK_RULE;
        m->rule = find_rule(c, length);
        *p = c + length + 1;
        return 1;
    }
    if (*c != '{') return 0;
    m->letter = (unsigned char)c[1] & 127;
    m->kind = c[2] == ':' ? MARK_BIND : MARK_REPEAT;
    if (m->kind == MARK_BIND) m->rule = find_rule(c + 3, strcspn(c + 3, "}"));
    *p = strchr(c, '}') + 1;
    return 1;
}

static int other_case(int letter) {
    return isalpha(letter) ? letter ^ 32 : letter;
}

static void read_grammar(Grammar *g) {
    memset(g, -1, sizeof *g);
    for (int r = 0; r < NUM_RULES; r++) {
        const char *c = grammar[r].text;
        for (g->n[r] = 0; ; c++) {
            if (g->n[r] == MAX_ALTERNATIVES)
                die(EXIT_SYSTEM, "internal error: rule \"%s\" has too many alternatives", grammar[r].name);
            g->text[r][g->n[r]++] = c;
            if (!(c = strchr(c, '|'))) break;
        }
        for (const char *p = grammar[r].text; *p; ) {
            Mark m;
            if (!read_mark(&p, &m)) p++;
            else if (m.kind == MARK_BIND) g->source[m.letter] = m.rule;
        }
    }
}

// A word is where its first letter is, in the grammar or in a story; it ends before the first that is none.
static size_t word_length(const char *word) {
    size_t n = 0;
    while (isalpha((unsigned char)word[n])) n++;
    return n;
}

static int same_word(const char *a, const char *b) {
    size_t n = word_length(a);
    return word_length(b) == n && !memcmp(a, b, n);
}

typedef struct {
    const char *word[128];  // that each letter is bound to; NULL: none
    int swapped;            // ~ has swapped the roles of lower and upper case
} Bindings;

// The letter whose binding {letter} stands for here.
static int letter_here(const Bindings *b, int letter) {
    return b->swapped ? other_case(letter) : letter;
}

// ---------------------------------------------------------------------------------------------------------------------
// Telling a story

typedef struct Story Story;
struct Story {
    const Grammar *g;
    int (*pick)(Story *s, int n);       // chooses one of n alternatives
    uint64_t stream, drawn;             // pick_random: number `drawn` of the stream is next
    Bindings bindings;
    int choices;                        // made so far
    double bits;                        // -log2 of the story's probability
    size_t bytes;
    char text[4096];
};

static int pick_random(Story *s, int n) {
    return (int)((rng_at(s->stream, s->drawn++) >> 32) * (uint64_t)n >> 32);        // uniform to within n / 2^32
}

static int choose(Story *s, int n) {
    int i = s->pick(s, n);
    s->choices++;
    s->bits += log2(n);
    return i;
}

static void tell(Story *s, const char *p) {
    while (*p && *p != '|') {
        Mark m;
        if (!read_mark(&p, &m)) {
            if (s->bytes == sizeof s->text)
                die(EXIT_SYSTEM, "internal error: a story of more than %zu bytes", sizeof s->text);
            s->text[s->bytes++] = *p++;
        } else if (m.kind == MARK_SWAP) {
            s->bindings.swapped ^= 1;
        } else if (m.kind == MARK_RULE) {
            tell(s, s->g->text[m.rule][choose(s, s->g->n[m.rule])]);
        } else if (m.kind == MARK_BIND) {
            const char *word = s->g->text[m.rule][choose(s, s->g->n[m.rule])];
            s->bindings.word[letter_here(&s->bindings, m.letter)] = word;
            tell(s, word);
        } else {
            const char *word = s->bindings.word[letter_here(&s->bindings, m.letter)];
            if (!word) die(EXIT_SYSTEM, "internal error: {%c} is used before it is bound", m.letter);
            tell(s, word);
        }
    }
}

static void tell_story(Story *s) {
    s->bindings = (Bindings){0};
    s->choices = 0;
    s->bytes = 0;
    s->bits = 0;
    tell(s, s->g->text[0][choose(s, s->g->n[0])]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Reading a story: every alternative is tried, but where the grammar has a word of a list or of a binding, the reader
// takes any word and goes on. A word of a list is invented if the list does not have it. A reference is a place where
// the grammar has {x}; it is right if it repeats the word that this story has for x, even an invented one.

typedef struct Rest { const char *p; const struct Rest *next; } Rest;     // what must follow after an alternative

// A derivation, up to some place in the text.
typedef struct {
    const char *text;                           // that place
    int whole;                                  // the derivation is complete, and so is the text
    Bindings bindings;
    double probability;                         // of the choices that the grammar has
    int right[NUM_RULES], wrong[NUM_RULES];     // references, by the rule that their letter is bound to
    int invented;                               // words
} Path;

typedef struct {
    const Grammar *g;
    const char *end;        // of the text; no letter follows it
    int derivations;        // of the whole text, without faults
    double probability;     // sum over them
    Path best;              // goes furthest into the text; of several, a whole one, then one with fewer faults
} Reading;

static int total(const int count[NUM_RULES]) {
    int sum = 0;
    for (int i = 0; i < NUM_RULES; i++) sum += count[i];
    return sum;
}

static int faults(const Path *path) {
    return total(path->wrong) + path->invented;
}

static void end_path(Reading *r, const Path *path) {
    const Path *best = &r->best;
    if (path->whole && faults(path) == 0) {
        r->derivations++;
        r->probability += path->probability;
    }
    if (path->text != best->text ? path->text > best->text
        : path->whole != best->whole ? path->whole : faults(path) < faults(best)) r->best = *path;
}

static int is_list_of_words(int rule) {
    return !strpbrk(grammar[rule].text, "<{~ ");
}

// Reads any word in the place of this mark. Returns 0 if there is none.
static int read_word(const Grammar *g, Path *path, const Mark *m) {
    const char *word = path->text;
    path->text += word_length(word);
    if (path->text == word) return 0;
    int letter = letter_here(&path->bindings, m->letter);
    if (m->kind == MARK_REPEAT) {
        int *count = same_word(word, path->bindings.word[letter]) ? path->right : path->wrong;
        count[g->source[letter]]++;
        return 1;
    }
    int listed = 0;
    for (int i = 0; i < g->n[m->rule]; i++) listed |= same_word(word, g->text[m->rule][i]);
    path->invented += !listed;
    path->probability /= g->n[m->rule];
    if (m->kind == MARK_BIND) path->bindings.word[letter] = word;
    return 1;
}

// Follows the alternative p, and then the rest, from path on.
static void read_story(Reading *r, const char *p, const Rest *rest, Path path) {
    for (Mark m; *p && *p != '|'; ) {
        int goes_on = 1;
        if (!read_mark(&p, &m)) {
            goes_on = path.text < r->end && *path.text == *p++;
            path.text += goes_on;
        } else if (m.kind == MARK_SWAP) {
            path.bindings.swapped ^= 1;
        } else if (m.kind == MARK_REPEAT || is_list_of_words(m.rule)) {
            goes_on = read_word(r->g, &path, &m);
        } else {
            Rest next = {p, rest};
            path.probability /= r->g->n[m.rule];
            for (int i = 0; i < r->g->n[m.rule]; i++) read_story(r, r->g->text[m.rule][i], &next, path);
            return;
        }
        if (!goes_on) {
            end_path(r, &path);
            return;
        }
    }
    if (rest) {
        read_story(r, rest->p, rest->next, path);
    } else {
        path.whole = path.text == r->end;
        end_path(r, &path);
    }
}

static Reading read_text(const Grammar *g, const char *text, size_t bytes) {
    Path start = {.text = text, .probability = 1.0 / g->n[0]};
    Reading r = {.g = g, .end = text + bytes, .best = start};
    for (int i = 0; i < g->n[0]; i++) read_story(&r, g->text[0][i], NULL, start);
    return r;
}

// ---------------------------------------------------------------------------------------------------------------------
// The exact entropy: the mean of a sum is the sum of the means. Every choice is uniform and none depends on another, so
// a bound word by itself is uniform wherever it is repeated.

typedef struct { double bits, bytes, references; } Means;

static Means rule_means(const Grammar *g, int rule, int depth);

static Means alternative_means(const Grammar *g, const char *p, int depth) {
    Means sum = {0, 0, 0};
    while (*p && *p != '|') {
        Mark m;
        if (!read_mark(&p, &m)) {
            sum.bytes += 1, p++;
        } else if (m.kind != MARK_SWAP) {
            int rule = m.kind == MARK_REPEAT ? g->source[m.letter] : m.rule;
            if (rule < 0) die(EXIT_SYSTEM, "internal error: {%c} is never bound", m.letter);
            Means part = rule_means(g, rule, depth + 1);
            sum.bytes += part.bytes;
            sum.references += part.references + (m.kind == MARK_REPEAT);
            if (m.kind == MARK_RULE) sum.bits += part.bits;
            if (m.kind == MARK_BIND) sum.bits += log2(g->n[rule]);
        }
    }
    return sum;
}

static Means rule_means(const Grammar *g, int rule, int depth) {
    if (depth > DEPTH_LIMIT) die(EXIT_SYSTEM, "internal error: rule \"%s\" contains itself", grammar[rule].name);
    Means mean = {log2(g->n[rule]), 0, 0};
    for (int i = 0; i < g->n[rule]; i++) {
        Means part = alternative_means(g, g->text[rule][i], depth);
        mean.bits += part.bits / g->n[rule];
        mean.bytes += part.bytes / g->n[rule];
        mean.references += part.references / g->n[rule];
    }
    return mean;
}

// ---------------------------------------------------------------------------------------------------------------------
// Judging stories that a model wrote

#define JUDGE_HELP "count the references that are right in the stories of this file, one per line or as generate_t6 " \
    "prints many; write nothing. A reference is a place where the grammar repeats a word: a name, a colour, ... It " \
    "is right if the word is the one that this story has, even one that no list has: those are counted as invented. " \
    "Where the sentences leave the grammar, all references from there on are wrong"

typedef struct {
    uint64_t stories, right;                    // right: without any fault
    uint64_t wrong, invented;                   // whole, with wrong references; whole, with no fault but invented words
    uint64_t invented_words;                    // in all stories
    uint64_t right_references[NUM_RULES], references[NUM_RULES];    // found, by the rule that their letter is bound to
} Verdict;

static void judge_story(Verdict *v, const Grammar *g, const char *text, size_t bytes) {
    Reading r = read_text(g, text, bytes);
    v->stories++;
    v->right += r.derivations > 0;
    v->wrong += r.best.whole && total(r.best.wrong) > 0;
    v->invented += r.best.whole && total(r.best.wrong) == 0 && r.best.invented > 0;
    v->invented_words += (uint64_t)r.best.invented;
    for (int i = 0; i < NUM_RULES; i++) {
        v->right_references[i] += (uint64_t)r.best.right[i];
        v->references[i] += (uint64_t)(r.best.right[i] + r.best.wrong[i]);
    }
}

// The stories of a text are its lines; empty ones are none.
static void judge_lines(Verdict *v, const Grammar *g, const char *text) {
    for (size_t bytes; *text; text += bytes) {
        bytes = strcspn(text, "\n");
        bytes += text[bytes] == '\n';
        if (*text != '\n') judge_story(v, g, text, bytes);
    }
}

// generate_t6 prints a heading above each of several texts, "--- text 1", and a newline after it. A story is all that
// the model wrote between them, even if that is nothing or several lines.
#define HEADING "--- "
static void judge_texts(Verdict *v, const Grammar *g, const char *text) {
    while (*text) {
        text += strcspn(text, "\n");
        text += *text == '\n';
        const char *next = strstr(text, "\n" HEADING);
        size_t bytes = next ? (size_t)(next - text) : strlen(text);
        if (!next && bytes > 0 && text[bytes - 1] == '\n') bytes--;
        judge_story(v, g, text, bytes);
        text += bytes + (text[bytes] == '\n');
    }
}

static void print_share(const char *name, uint64_t right, uint64_t of) {
    if (of) printf("  %-10s %8" PRIu64 " %8" PRIu64 " %7.2f%%\n", name, right, of, 100 * (double)right / (double)of);
}

static int judge_file(const Grammar *g, const char *path) {
    Error err;
    size_t bytes;
    char *text = read_small_file(path, (size_t)1 << 30, &bytes, &err);
    if (!text) die(EXIT_INPUT, "--judge: %s", err.text);
    const Format *format = format_of_content(text, bytes);
    const char *zero = (const char *)memchr(text, 0, bytes);
    if (format && (format->packing != PACKED_NOT || zero))
        die(EXIT_INPUT, "--judge: %s: %s; it takes a text file of stories", path, format->what);
    if (zero) die(EXIT_INPUT, "--judge: %s: not a text: byte %zu is zero", path, (size_t)(zero - text));
    Verdict v = {0};
    if (!strncmp(text, HEADING, strlen(HEADING))) judge_texts(&v, g, text);
    else judge_lines(&v, g, text);
    free(text);
    if (v.stories == 0) die(EXIT_INPUT, "--judge: %s: there is no story in it", path);

    uint64_t right = 0, found = 0, all = v.stories * (uint64_t)llround(rule_means(g, 0, 0).references);
    printf("%" PRIu64 " stories: %" PRIu64 " right, %" PRIu64 " with a wrong reference, %" PRIu64
           " with invented words only, %" PRIu64 " that leave the grammar\n"
           "invented words: %" PRIu64 "\n  reference     right       of\n", v.stories, v.right, v.wrong, v.invented,
           v.stories - v.right - v.wrong - v.invented, v.invented_words);
    for (int i = 0; i < NUM_RULES; i++) {
        print_share(grammar[i].name, v.right_references[i], v.references[i]);
        right += v.right_references[i];
        found += v.references[i];
    }
    print_share("not found", 0, all - found);
    print_share("all", right, all);
    return EXIT_SUCCESS;
}

// ---------------------------------------------------------------------------------------------------------------------
// The corpus

typedef struct {
    uint16_t *shard;                // (SHARD_HEADER_BYTES / 2 + tokens) a whole shard, as in its file
    char *text;                     // (bytes) the same without end-of-text tokens
    uint64_t tokens, bytes, stories;
    double bits;                    // -log2 of its probability
} Corpus;

enum { STREAM_VAL, STREAM_TRAIN, STREAM_CHECK };

// Whole stories, with at least this many bytes in all.
static Corpus make_corpus(const Grammar *g, uint64_t seed, uint64_t stream, uint64_t bytes) {
    Corpus c = {NULL, NULL, 0, 0, 0, 0};
    static Story s;
    s = (Story){.g = g, .pick = pick_random, .stream = rng_stream(seed, stream)};
    size_t max_bytes = bytes + sizeof s.text, max_tokens = 2 * max_bytes;       // a story has at least one byte
    c.shard = (uint16_t *)xcalloc(SHARD_HEADER_BYTES + sizeof *c.shard * max_tokens, 1);
    c.text = (char *)xmalloc(max_bytes);
    uint16_t *token = c.shard + SHARD_HEADER_BYTES / 2;
    while (c.bytes < bytes) {
        tell_story(&s);
        *token++ = BYTES_EOT;
        for (size_t i = 0; i < s.bytes; i++) *token++ = (unsigned char)s.text[i];
        memcpy(c.text + c.bytes, s.text, s.bytes);
        c.bytes += s.bytes;
        c.bits += s.bits;
        c.stories++;
    }
    c.tokens = c.bytes + c.stories;
    int32_t header[SHARD_HEADER_INTS];
    shard_fill_header(header, c.tokens);
    memcpy(c.shard, header, sizeof header);
    return c;
}

static void free_corpus(Corpus *c) {
    free(c->shard);
    free(c->text);
}

// The exit code for the failed write that set errno: a full or failing disk is the machine's fault (1), a folder that
// cannot be written is the user's (2).
static int write_exit_code(void) {
    return errno == ENOSPC || errno == EDQUOT || errno == EIO || errno == EFBIG ? EXIT_SYSTEM : EXIT_INPUT;
}

static void write_or_die(const char *folder, const char *name, const void *data, size_t bytes) {
    Error err;
    char *path = xasprintf("%s/%s", folder, name);
    errno = 0;
    if (write_small_file(path, data, bytes, &err) != 0) die(write_exit_code(), "%s", err.text);
    free(path);
}

static void write_shard(const char *folder, const char *name, const Corpus *c, Manifest *m) {
    size_t file_bytes = SHARD_HEADER_BYTES + sizeof *c->shard * c->tokens;
    write_or_die(folder, name, c->shard, file_bytes);
    ManifestEntry *e = manifest_add(&m->shards, &m->num_shards, xasprintf("%s", name));
    e->tokens = c->tokens;
    e->bytes = c->bytes;
    e->xxh64 = XXH64(c->shard, file_bytes, 0);
    m->documents += c->stories;
}

static void write_entropy(const char *folder, const Corpus *val, Means story, uint64_t seed) {
    char *json = xasprintf("{\n  \"bits_per_byte\": %.12f,\n  \"bits_per_story\": %.12f,\n"
                           "  \"bytes_per_story\": %.12f,\n  \"val_bits_per_byte\": %.12f,\n"
                           "  \"val_bytes\": %" PRIu64 ",\n  \"val_stories\": %" PRIu64 ",\n  \"seed\": %" PRIu64 ",\n"
                           "  \"convention\": \"bits of all tokens, end-of-text included, over bytes of text\"\n}\n",
                           story.bits / story.bytes, story.bits, story.bytes, val->bits / (double)val->bytes,
                           val->bytes, val->stories, seed);
    write_or_die(folder, NAME "_entropy.json", json, strlen(json));
    free(json);
}

static void write_corpus(const Grammar *g, const char *folder, uint64_t seed, uint64_t train_bytes,
                         uint64_t val_bytes) {
    Error err;
    errno = 0;
    if (make_dirs(folder, &err) != 0) die(write_exit_code(), "%s", err.text);
    Corpus val = make_corpus(g, seed, STREAM_VAL, val_bytes), train = make_corpus(g, seed, STREAM_TRAIN, train_bytes);
    Means story = rule_means(g, 0, 0);
    Manifest m;
    memset(&m, 0, sizeof m);
    m.vocab_size = BYTES_VOCAB_SIZE;
    m.eot = BYTES_EOT;
    m.val_tokens = val.tokens;
    m.shard_size = val.tokens > train.tokens ? val.tokens : train.tokens;

    // The old manifest is removed first and the new one written last, so that no manifest lists shards of another run.
    char *manifest = xasprintf("%s/" NAME "_manifest.json", folder);
    unlink(manifest);
    write_shard(folder, NAME "_val_000000.bin", &val, &m);
    write_shard(folder, NAME "_train_000001.bin", &train, &m);
    write_or_die(folder, NAME "_val.txt", val.text, val.bytes);
    write_entropy(folder, &val, story, seed);
    errno = 0;
    if (manifest_write(&m, manifest, &err) != 0) die(write_exit_code(), "%s", err.text);

    printf("%s: %" PRIu64 " training stories (%" PRIu64 " bytes), %" PRIu64 " validation stories (%" PRIu64 " bytes)\n",
           folder, train.stories, train.bytes, val.stories, val.bytes);
    printf("entropy: %.4f bits/byte (a story: %.1f bits, %.1f bytes); validation text: %.4f bits/byte\n",
           story.bits / story.bytes, story.bits, story.bytes, val.bits / (double)val.bytes);
    free(manifest);
    manifest_free(&m);
    free_corpus(&val);
    free_corpus(&train);
}

// ---------------------------------------------------------------------------------------------------------------------
// The program

#include "test/check_toy.h"     // --check; uses all of the above

int main(int argc, char **argv) {
    program_start(argv[0]);
    int64_t seed, bytes, val_bytes, check;
    const char *folder, *judged = NULL;
    Flag flags[] = {
        {'o', "out", FLAG_TEXT, &folder, "data/toy", 0, 0, "folder for shards, manifest, validation text, entropy", 0},
        {0, "seed", FLAG_INT, &seed, "1337", 0, 9e15, "seed of all choices", 0},
        {0, "bytes", FLAG_INT, &bytes, "4000000", 1, 1e8, "bytes of training text, rounded up to whole stories", 0},
        {0, "val-bytes", FLAG_INT, &val_bytes, "100000", 1, 1e8, "bytes of validation text, likewise", 0},
        {0, "check", FLAG_SWITCH, &check, "0", 0, 1, "1: check the generator and its entropy, write nothing", 0},
        {0, "judge", FLAG_TEXT, &judged, NULL, 0, 0, JUDGE_HELP, 0},
    };
    const int n = (int)(sizeof flags / sizeof *flags);
    Error err;
    static Grammar g;
    read_grammar(&g);
    if (flags_parse(argc, argv, "toy_corpus: makes a toy corpus of known entropy", flags, n, &err) != 0)
        die(EXIT_INPUT, "%s", err.text);
    if (check) return check_toy(&g);
    if (judged) return judge_file(&g, judged);
    write_corpus(&g, folder, (uint64_t)seed, (uint64_t)bytes, (uint64_t)val_bytes);
    return 0;
}
