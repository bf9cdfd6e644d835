// A toy corpus of which everything is known: short stories out of a small probabilistic grammar, written as byte-level shards
// (llmc/shard.h), and beside them the exact entropy of their source, the loss that no model can beat for long.
//
//     gcc -O2 -Wall -Wextra -I. data/toy_corpus.c -o data/toy_corpus -lcjson -lm
//
// What comes late in a story follows from what came early: who has which thing, its colour, where it was hidden, what one does
// with such a thing. A model that cannot look back has to guess there; what is left to guess for one that can are the free
// choices of the grammar. All of them are uniform, so a story's probability is 1 / (product of the numbers of alternatives).
//
// The convention for bits per byte: the bits of all tokens over the bytes of the text. An end-of-text token stands before each
// story; it costs bits like any token (that a story ends where it does is one of the source's choices) and is no byte of text.
// So a trainer's mean loss in nats, times tokens / (bytes ln 2), compares directly. A story's last byte is a newline.
#include <ctype.h>
#include <math.h>

#include "llmc/flags.h"
#include "llmc/rng.h"
#include "llmc/shard.h"

#define NAME "toy"
#define DEPTH_LIMIT 64      // of rules within rules: a rule that contains itself ends here
#define MAX_CHOICES 256     // in one story
#define STORY_BYTES 255     // of every story, see below

// ---------------------------------------------------------------------------------------------------------------------
// The grammar. A rule has alternatives, separated by |, all equally likely. In an alternative stand text and
//     <rule>       any alternative of the rule
//     {x:rule-y}   the same, but remembered as x, and not the one that y remembers (-y may be missing, or repeated)
//     {x}          what x remembers, again
//     ~            from here to the end of the story, small and capital letters change places: there are two children, with
//                  name a, thing t, colour c and place p, and A, T, C and P. So either can be the one that the rest is about.
//
// Every story is STORY_BYTES long: the words of a list have one length, and the alternatives of a rule make up for each other. With the
// end-of-text token before it a story takes 256 tokens, so windows of 256 tokens begin where stories begin. Windows that cut stories
// cannot show what their first, headless story rests on, and no model's loss would come near the entropy.
//
// What the exact entropy and the one derivation of each text rest on (--check tries both): rules that are remembered are lists of
// different words without markup; x and X come from the same rule, and each is remembered before it is used; no choice depends
// on what is remembered but for the exceptions -y.

typedef struct { const char *name, *text; } Rule;

static const Rule grammar[] = {
    {"story", "<opening> {a} had a {c:colour} {t:thing}. {a} hid the {c} {t} by the {p:place}. "
        "{A} had a {C:colour-c} {T:thing-t}. {A} hid the {C} {T} by the {P:place-p}. <meanwhile> <asking>\n"},
    {"opening", "On a <fine> day {a:name} met {A:name-a} by the <place>."
        "|Long ago {a:name} met {A:name-a} near a <fine> <place>."},
    {"meanwhile", "They saw <fine> <animals>, <fine> <animals> and <fine> <animals>."
        "|They ate <fine> <sweets>, <fine> <sweets> and <fine> <sweets>."},
    {"asking", "<ask>|~<ask>"},
    {"ask", "Then {a} quickly went to the {p} to get the {c} {t}."
        "|\"Where is my {t}?\" asked {a}. \"By the {p},\" said {A}."},

    {"name", "Ann|Ben|Dan|Eve|Fay|Gus|Ivy|Jim|Kay|Leo|Mia|Ned|Pam|Ron|Una|Vic"},
    {"colour", "blue|gold|grey|lime|navy|pink|rust|teal"},
    {"thing", "bell|boat|book|coin|doll|drum|flag|harp|kite|lamp|mask|pipe|ring|sled|vase|wand"},
    {"place", "barn|cave|dock|farm|gate|hill|fort|lake|mill|port|pond|rock|shed|tree|well|yard"},
    {"animals", "bears|crows|doves|foxes|goats|hares|ducks|larks|moles|swans|sheep|seals|toads|voles|wrens|geese"},
    {"sweets", "beans|cakes|dates|fudge|candy|honey|cream|jelly|kiwis|limes|plums|bread|scone|pears|rolls|tarts"},
    {"fine", "bold|cold|dark|fine|good|huge|wild|kind|lazy|mild|nice|tiny|pale|rare|safe|warm"},
};

enum { NUM_RULES = sizeof grammar / sizeof *grammar, MAX_ALTERNATIVES = 16 };

// The grammar cut into alternatives, or a part of it: --check also works on one that is small enough to list all its stories.
typedef struct {
    int n[NUM_RULES];                                   // alternatives of each rule
    const char *text[NUM_RULES][MAX_ALTERNATIVES];      // each ends at | or NUL
    int source[128];                                    // the rule that a letter remembers; -1: none
} Grammar;

typedef enum { MARK_RULE, MARK_DRAW, MARK_RECALL, MARK_SWAP } MarkKind;

typedef struct {
    MarkKind kind;
    int rule;               // MARK_RULE and MARK_DRAW
    int letter;
    char except[8];         // MARK_DRAW: letters
} Mark;

static int find_rule(const char *name, size_t length) {
    for (int i = 0; i < NUM_RULES; i++)
        if (strlen(grammar[i].name) == length && !memcmp(grammar[i].name, name, length)) return i;
    die(EXIT_SYSTEM, "internal error: the grammar has no rule \"%.*s\"", (int)length, name);
}

// Reads the markup at *p and goes behind it. Returns 0 where there is none.
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
    m->kind = c[2] == ':' ? MARK_DRAW : MARK_RECALL;
    if (c[2] != '}') {
        size_t length = strcspn(c += 3, "-}");
        m->rule = find_rule(c, length);
        c += length;
        for (int i = 0; *c == '-' && i < 7; i++, c += 2) m->except[i] = c[1];
    }
    *p = strchr(c, '}') + 1;
    return 1;
}

static void read_grammar(Grammar *g) {
    memset(g, -1, sizeof *g);
    for (int r = 0; r < NUM_RULES; r++) {
        const char *c = grammar[r].text;
        for (g->n[r] = 0; ; c++) {
            if (g->n[r] == MAX_ALTERNATIVES) die(EXIT_SYSTEM, "internal error: rule \"%s\" has too many alternatives", grammar[r].name);
            g->text[r][g->n[r]++] = c;
            if (!(c = strchr(c, '|'))) break;
        }
        for (const char *p = grammar[r].text; *p; ) {
            Mark m;
            if (!read_mark(&p, &m)) p++;
            else if (m.kind == MARK_DRAW) g->source[m.letter] = g->source[m.letter ^ (isalpha(m.letter) ? 32 : 0)] = m.rule;
        }
    }
}

// What a story remembers: the alternative that each letter stands for, the children's roles considered.
typedef struct {
    signed char value[128];
    int swapped;
} Memory;

static signed char *recall(Memory *m, int letter) {
    return &m->value[m->swapped && isalpha(letter) ? letter ^ 32 : letter];
}

// Whether alternative i may be drawn.
static int is_allowed(Memory *memory, const Mark *m, int i) {
    for (const char *x = m->except; *x; x++)
        if (*recall(memory, *x) == i) return 0;
    return 1;
}

// ---------------------------------------------------------------------------------------------------------------------
// Telling a story

// All combinations of choices, one after the other: a number whose digits have bases that are found on the way.
typedef struct { int digit[MAX_CHOICES], base[MAX_CHOICES], used; } Odometer;

typedef struct {
    const Grammar *g;
    uint64_t stream, drawn;     // random choices: number `drawn` of the stream is next
    Odometer *odometer;         // or, where this is not NULL, the choices that it shows
    Memory memory;
    int choices;
    double bits;                // -log2 of the story's probability
    size_t bytes;
    char text[4096];
} Story;

static int choose(Story *s, int n) {
    int i = s->choices++;
    if (n < 1) die(EXIT_SYSTEM, "internal error: a list has fewer words than its exceptions");
    s->bits += log2(n);
    if (!s->odometer) return (int)((rng_at(s->stream, s->drawn++) >> 32) * (uint64_t)n >> 32);     // even to within n / 2^32
    if (i >= MAX_CHOICES) die(EXIT_SYSTEM, "internal error: a story of more than %d choices", MAX_CHOICES);
    if (i == s->odometer->used) s->odometer->digit[s->odometer->used++] = 0;
    s->odometer->base[i] = n;
    return s->odometer->digit[i];
}

static void tell(Story *s, const char *p) {
    while (*p && *p != '|') {
        Mark m;
        if (!read_mark(&p, &m)) {
            if (s->bytes == sizeof s->text) die(EXIT_SYSTEM, "internal error: a story of more than %zu bytes", sizeof s->text);
            s->text[s->bytes++] = *p++;
        } else if (m.kind == MARK_SWAP) {
            s->memory.swapped ^= 1;
        } else if (m.kind == MARK_RULE) {
            tell(s, s->g->text[m.rule][choose(s, s->g->n[m.rule])]);
        } else if (m.kind == MARK_DRAW) {
            int n = s->g->n[m.rule], i = 0;
            int place = choose(s, n - (int)strlen(m.except));
            for (; !is_allowed(&s->memory, &m, i) || place-- > 0; i++) continue;
            *recall(&s->memory, m.letter) = (signed char)i;
            tell(s, s->g->text[m.rule][i]);
        } else {
            int rule = s->g->source[m.letter];
            if (*recall(&s->memory, m.letter) < 0) die(EXIT_SYSTEM, "internal error: {%c} is recalled before it is drawn", m.letter);
            tell(s, s->g->text[rule][*recall(&s->memory, m.letter)]);
        }
    }
}

static void tell_story(Story *s) {
    memset(s->memory.value, -1, sizeof s->memory.value);
    s->memory.swapped = s->choices = 0;
    s->bytes = 0;
    s->bits = 0;
    tell(s, s->g->text[0][choose(s, s->g->n[0])]);
}

// ---------------------------------------------------------------------------------------------------------------------
// The exact entropy: means of sums are sums of means. Every choice is uniform and none depends on what is remembered, so each
// remembered list is, taken alone, uniform wherever it is recalled (drawing without those already taken keeps that).

typedef struct { double bits, bytes; } Means;

static Means rule_means(const Grammar *g, int rule, int depth);

static Means alternative_means(const Grammar *g, const char *p, int depth) {
    Means sum = {0, 0};
    while (*p && *p != '|') {
        Mark m;
        if (!read_mark(&p, &m)) {
            sum.bytes += 1, p++;
        } else if (m.kind != MARK_SWAP) {
            int rule = m.kind == MARK_RECALL ? g->source[m.letter] : m.rule;
            if (rule < 0) die(EXIT_SYSTEM, "internal error: {%c} is never drawn", m.letter);
            Means part = rule_means(g, rule, depth + 1);
            sum.bytes += part.bytes;
            if (m.kind == MARK_RULE) sum.bits += part.bits;
            if (m.kind == MARK_DRAW) sum.bits += log2(g->n[rule] - (double)strlen(m.except));
        }
    }
    return sum;
}

static Means rule_means(const Grammar *g, int rule, int depth) {
    if (depth > DEPTH_LIMIT) die(EXIT_SYSTEM, "internal error: rule \"%s\" contains itself", grammar[rule].name);
    Means mean = {log2(g->n[rule]), 0};
    for (int i = 0; i < g->n[rule]; i++) {
        Means part = alternative_means(g, g->text[rule][i], depth);
        mean.bits += part.bits / g->n[rule];
        mean.bytes += part.bytes / g->n[rule];
    }
    return mean;
}

// ---------------------------------------------------------------------------------------------------------------------
// Reading a story: all derivations of a text, by trying every alternative. This knows nothing of how the text was made.

typedef struct Rest { const char *p; const struct Rest *next; } Rest;     // what must still follow behind an alternative

typedef struct {
    const Grammar *g;
    const char *end;
    int derivations;
    double probability;     // sum over the derivations
} Reading;

static void read_story(Reading *r, const char *p, const Rest *rest, const char *text, Memory memory, double probability) {
    while (*p && *p != '|') {
        Mark m;
        if (!read_mark(&p, &m)) {
            if (text == r->end || *text++ != *p++) return;
            continue;
        }
        if (m.kind == MARK_SWAP) {
            memory.swapped ^= 1;
            continue;
        }
        Rest next = {p, rest};
        int rule = m.kind == MARK_RECALL ? r->g->source[m.letter] : m.rule, n = r->g->n[rule];
        if (m.kind == MARK_RECALL) {
            read_story(r, r->g->text[rule][*recall(&memory, m.letter)], &next, text, memory, probability);
            return;
        }
        int allowed = 0;
        for (int i = 0; i < n; i++) allowed += is_allowed(&memory, &m, i);
        for (int i = 0; i < n; i++) {
            if (!is_allowed(&memory, &m, i)) continue;
            Memory with = memory;
            if (m.kind == MARK_DRAW) *recall(&with, m.letter) = (signed char)i;
            read_story(r, r->g->text[rule][i], &next, text, with, probability / allowed);
        }
        return;
    }
    if (rest) {
        read_story(r, rest->p, rest->next, text, memory, probability);
    } else if (text == r->end) {
        r->derivations++;
        r->probability += probability;
    }
}

static Reading read_text(const Grammar *g, const char *text, size_t bytes) {
    Reading r = {g, text + bytes, 0, 0};
    Memory nothing = {{0}, 0};
    memset(nothing.value, -1, sizeof nothing.value);
    for (int i = 0; i < g->n[0]; i++) read_story(&r, g->text[0][i], NULL, text, nothing, 1.0 / g->n[0]);
    return r;
}

// ---------------------------------------------------------------------------------------------------------------------
// The corpus

typedef struct {
    uint16_t *shard;                // (SHARD_HEADER_BYTES / 2 + tokens) a shard as it stands in its file
    char *text;                     // (bytes) the same without end-of-text tokens
    uint64_t tokens, bytes, stories;
    double bits;                    // -log2 of its probability
} Corpus;

enum { STREAM_VAL, STREAM_TRAIN, STREAM_CHECK };

// Whole stories, of at least so many bytes in all.
static Corpus make_corpus(const Grammar *g, uint64_t seed, uint64_t stream, uint64_t bytes) {
    Corpus c = {NULL, NULL, 0, 0, 0, 0};
    static Story s;
    s = (Story){.g = g, .stream = rng_stream(seed, stream)};
    size_t most = bytes + sizeof s.text;                                            // a story has fewer tokens than twice its bytes
    c.shard = (uint16_t *)xcalloc(SHARD_HEADER_BYTES + 2 * sizeof *c.shard * most, 1);
    c.text = (char *)xmalloc(most);
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

// A folder that cannot be written is the user's to change; a disk that is full or fails is the machine's.
static void write_or_die(const char *folder, const char *name, const void *data, size_t bytes) {
    Error err;
    char *path = xasprintf("%s/%s", folder, name);
    errno = 0;
    if (write_small_file(path, data, bytes, &err) != 0)
        die(errno == ENOSPC || errno == EDQUOT || errno == EIO || errno == EFBIG ? EXIT_SYSTEM : EXIT_INPUT, "%s", err.text);
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

static void write_corpus(const Grammar *g, const char *folder, uint64_t seed, uint64_t train_bytes, uint64_t val_bytes) {
    Error err;
    if (make_dirs(folder, &err) != 0) die(errno == ENOSPC || errno == EDQUOT ? EXIT_SYSTEM : EXIT_INPUT, "%s", err.text);
    Corpus val = make_corpus(g, seed, STREAM_VAL, val_bytes), train = make_corpus(g, seed, STREAM_TRAIN, train_bytes);
    Means story = rule_means(g, 0, 0);
    Manifest m;
    memset(&m, 0, sizeof m);
    m.vocab_size = BYTES_VOCAB_SIZE;
    m.eot = BYTES_EOT;
    m.val_tokens = val.tokens;
    m.shard_size = val.tokens > train.tokens ? val.tokens : train.tokens;

    // The manifest goes first and comes last: shards of another run never stand under its checksums.
    char *manifest = xasprintf("%s/" NAME "_manifest.json", folder);
    unlink(manifest);
    write_shard(folder, NAME "_val_000000.bin", &val, &m);
    write_shard(folder, NAME "_train_000001.bin", &train, &m);
    write_or_die(folder, NAME "_val.txt", val.text, val.bytes);
    char *json = xasprintf("{\n  \"bits_per_byte\": %.12f,\n  \"bits_per_story\": %.12f,\n  \"bytes_per_story\": %.12f,\n"
                           "  \"val_bits_per_byte\": %.12f,\n  \"val_bytes\": %" PRIu64 ",\n  \"val_stories\": %" PRIu64 ",\n"
                           "  \"seed\": %" PRIu64 ",\n"
                           "  \"convention\": \"bits of all tokens, end-of-text included, over bytes of text\"\n}\n",
                           story.bits / story.bytes, story.bits, story.bytes, val.bits / (double)val.bytes, val.bytes, val.stories, seed);
    write_or_die(folder, NAME "_entropy.json", json, strlen(json));
    errno = 0;
    if (manifest_write(&m, manifest, &err) != 0) die(errno == ENOSPC || errno == EDQUOT ? EXIT_SYSTEM : EXIT_INPUT, "%s", err.text);

    printf("%s: %" PRIu64 " stories to train on (%" PRIu64 " bytes), %" PRIu64 " to validate (%" PRIu64 " bytes)\n",
           folder, train.stories, train.bytes, val.stories, val.bytes);
    printf("entropy of the source %.4f bits/byte (%.1f bits, %.1f bytes a story); of the validation text %.4f bits/byte\n",
           story.bits / story.bytes, story.bits, story.bytes, val.bits / (double)val.bytes);
    free(json);
    free(manifest);
    manifest_free(&m);
    free_corpus(&val);
    free_corpus(&train);
}

// ---------------------------------------------------------------------------------------------------------------------
// --check

typedef struct { int passed, failed; } Tally;

static void check(Tally *t, int ok, const char *what) {
    printf("%s  %s\n", ok ? "ok    " : "FAILED", what);
    ok ? t->passed++ : t->failed++;
}

static int compare_u64(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

// Whether some markup draws from the rule into a letter, or asks for the alternative that belongs to a letter's.
static int is_remembered(int rule) {
    char *draw = xasprintf(":%s", grammar[rule].name);
    int found = 0;
    for (int r = 0; r < NUM_RULES; r++) found |= strstr(grammar[r].text, draw) != NULL;
    free(draw);
    return found;
}

// Lists hold different words; those that are remembered hold no markup.
static void check_lists(const Grammar *g, Tally *t) {
    int distinct = 1, plain = 1;
    for (int r = 0; r < NUM_RULES; r++) {
        for (int i = 0; i < g->n[r]; i++) {
            size_t length = strcspn(g->text[r][i], "|");
            plain &= !is_remembered(r) || strcspn(g->text[r][i], "<{~|") == length;
            for (int j = 0; j < i; j++)
                distinct &= strcspn(g->text[r][j], "|") != length || memcmp(g->text[r][i], g->text[r][j], length) != 0;
        }
    }
    check(t, distinct, "no list holds a word twice");
    check(t, plain, "remembered lists hold plain words");
}

// Two words of a remembered list, or as many as leave one to draw from where the most are excepted.
static int smallest_list(const Grammar *g, int rule) {
    int n = 2;
    for (int r = 0; r < NUM_RULES; r++)
        for (const char *p = grammar[r].text; *p; ) {
            Mark m;
            if (!read_mark(&p, &m)) p++;
            else if (m.kind == MARK_DRAW && m.rule == rule && (int)strlen(m.except) + 1 > n) n = (int)strlen(m.except) + 1;
        }
    return n < g->n[rule] ? n : g->n[rule];
}

// Lists every story of a smaller grammar: remembered lists cut to two or three words, other lists of words to one, all else whole.
static void check_enumeration(const Grammar *g, Tally *t) {
    static Grammar small;
    static Odometer odometer;
    static Story s;
    small = *g;
    for (int r = 0; r < NUM_RULES; r++)
        if (!strpbrk(grammar[r].text, "<{~")) small.n[r] = is_remembered(r) ? smallest_list(g, r) : 1;
    s = (Story){.g = &small, .odometer = &odometer};
    size_t count = 0, capacity = 1 << 16;
    uint64_t *hash = (uint64_t *)xmalloc(capacity * sizeof *hash);
    double probability = 0, bits = 0, bytes = 0;
    do {
        tell_story(&s);
        if (count == capacity) hash = (uint64_t *)xrealloc(hash, (capacity *= 2) * sizeof *hash);
        hash[count++] = XXH64(s.text, s.bytes, 0);
        double p = exp2(-s.bits);
        probability += p;
        bits += p * s.bits;
        bytes += p * (double)s.bytes;
        odometer.used = s.choices;
        while (odometer.used > 0 && ++odometer.digit[odometer.used - 1] == odometer.base[odometer.used - 1]) odometer.used--;
    } while (odometer.used > 0);
    qsort(hash, count, sizeof *hash, compare_u64);
    size_t twice = 0;
    for (size_t i = 1; i < count; i++) twice += hash[i] == hash[i - 1];
    free(hash);
    Means mean = rule_means(&small, 0, 0);
    printf("a smaller grammar has %zu stories: probabilities sum to 1 %+.1e, entropy %.9f (formula %.9f) bits, %.9f (%.9f) bytes\n",
           count, probability - 1, bits, mean.bits, bytes, mean.bytes);
    check(t, twice == 0, "all its stories differ, so each has one derivation");
    check(t, fabs(probability - 1) < 1e-9, "their probabilities sum to 1");
    check(t, fabs(bits - mean.bits) < 1e-7 && fabs(bytes - mean.bytes) < 1e-6, "the entropy and length by formula are those of the list");
}

// Random stories of the whole grammar, read back from their text; and the same with one word that does not follow from the rest.
static void check_readings(const Grammar *g, Tally *t) {
    enum { READ = 3000 };
    static Story s;
    s = (Story){.g = g, .stream = rng_stream(1, STREAM_CHECK)};
    int one = 0, same = 0, strangers = 0, refused = 0, whole = 0;
    for (int i = 0; i < READ; i++) {
        tell_story(&s);
        Reading r = read_text(g, s.text, s.bytes);
        one += r.derivations == 1;
        whole += s.bytes == STORY_BYTES;
        same += fabs(-log2(r.probability) - s.bits) < 1e-9;
        for (int k = 0; k < 2; k++) {       // the last words that name one child or the other: as if it were the other, or one more
            const char *name = g->text[find_rule("name", 4)][s.memory.value[k ? 'a' : 'A']];
            size_t length = strcspn(name, "|"), at = s.bytes - length;
            while (at > 0 && memcmp(s.text + at, name, length) != 0) at--;
            char saved = s.text[at];
            s.text[at] = saved == 'A' ? 'B' : 'A';
            strangers++;
            refused += read_text(g, s.text, s.bytes).derivations == 0;
            s.text[at] = saved;
        }
    }
    printf("%d stories read: %d have one derivation, %d the probability they were told with; %d of %d with a wrong name refused\n",
           READ, one, same, refused, strangers);
    check(t, one == READ, "a story has one derivation");
    check(t, whole == READ, "every story has the same length");
    check(t, same == READ, "its probability, from its text alone, is the one it was told with");
    check(t, refused == strangers, "a story with a wrong name has none");
}

static void check_means(const Grammar *g, Tally *t) {
    enum { TOLD = 200000 };
    static Story s;
    s = (Story){.g = g, .stream = rng_stream(2, STREAM_CHECK)};
    double bits = 0, bits2 = 0, bytes = 0, bytes2 = 0;
    for (int i = 0; i < TOLD; i++) {
        tell_story(&s);
        bits += s.bits / TOLD, bits2 += s.bits * s.bits / TOLD;
        bytes += (double)s.bytes / TOLD, bytes2 += (double)s.bytes * (double)s.bytes / TOLD;
    }
    Means mean = rule_means(g, 0, 0);
    double bits_error = sqrt((bits2 - bits * bits) / TOLD), bytes_error = sqrt((bytes2 - bytes * bytes) / TOLD);
    printf("mean of %d stories: %.3f +- %.3f bits (formula %.3f), %.3f +- %.3f bytes (%.3f)\n",
           TOLD, bits, bits_error, mean.bits, bytes, bytes_error, mean.bytes);
    check(t, fabs(bits - mean.bits) < 4 * bits_error, "the mean of -log2 p is the entropy, within 4 standard errors");
    check(t, fabs(bytes - mean.bytes) < 4 * bytes_error, "the mean length is the expected one, within 4 standard errors");
}

static void check_seeds(const Grammar *g, Tally *t) {
    Corpus a = make_corpus(g, 7, STREAM_TRAIN, 20000), b = make_corpus(g, 7, STREAM_TRAIN, 20000);
    Corpus c = make_corpus(g, 8, STREAM_TRAIN, 20000);
    check(t, a.tokens == b.tokens && !memcmp(a.shard, b.shard, SHARD_HEADER_BYTES + 2 * a.tokens), "the same seed gives the same bytes");
    check(t, a.tokens != c.tokens || memcmp(a.shard, c.shard, SHARD_HEADER_BYTES + 2 * a.tokens) != 0, "another seed gives others");
    double bits = 0;
    for (uint64_t at = 0, end; at < a.bytes; at = end) {
        for (end = at; a.text[end++] != '\n'; ) continue;
        bits -= log2(read_text(g, a.text + at, end - at).probability);
    }
    check(t, fabs(bits - a.bits) < 1e-6 * bits, "a corpus has the probability of its stories");
    free_corpus(&a);
    free_corpus(&b);
    free_corpus(&c);
}

int main(int argc, char **argv) {
    set_program_name(argv[0]);
    int64_t seed, bytes, val_bytes, checking;
    const char *folder;
    Flag flags[] = {
        {'o', "out", FLAG_TEXT, &folder, "data/toy", 0, 0, "folder for shards, manifest, validation text and entropy", 0},
        {0, "seed", FLAG_INT, &seed, "1337", 0, 9e15, "of all choices", 0},
        {0, "bytes", FLAG_INT, &bytes, "4000000", 1, 1e8, "training text, bytes; the last story is made whole", 0},
        {0, "val-bytes", FLAG_INT, &val_bytes, "100000", 1, 1e8, "validation text, bytes", 0},
        {0, "check", FLAG_SWITCH, &checking, "0", 0, 1, "1: check the generator and its entropy, write nothing", 0},
    };
    Error err;
    static Grammar g;
    read_grammar(&g);
    if (flags_parse(argc, argv, "toy_corpus: makes a toy corpus of known entropy", flags, sizeof flags / sizeof *flags, &err) != 0)
        die(EXIT_INPUT, "%s", err.text);
    if (!checking) {
        write_corpus(&g, folder, (uint64_t)seed, (uint64_t)bytes, (uint64_t)val_bytes);
        return 0;
    }
    Tally t = {0, 0};
    check_lists(&g, &t);
    check_enumeration(&g, &t);
    check_readings(&g, &t);
    check_means(&g, &t);
    check_seeds(&g, &t);
    printf("%d passed, %d failed\n", t.passed, t.failed);
    return t.failed != 0;
}
