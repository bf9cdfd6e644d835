// toy_corpus --check: is the entropy that data/toy_corpus.c computes that of the stories it tells? That file includes
// this one at its end, because the checks use its grammar and its functions.
//
// There are three ways to the same numbers: a smaller grammar, whose stories can all be listed; a reader that finds
// every derivation of a text from the text alone; and means over random stories.
#ifndef TEST_CHECK_TOY_H
#define TEST_CHECK_TOY_H

#include "test/testing.h"

// ---------------------------------------------------------------------------------------------------------------------
// Listing all stories: the choices of a story are the digits of a number, whose bases are found while it is told.

enum { MAX_CHOICES = 256 };     // in one story

typedef struct {
    Story story;                // first, so that a pointer to it is one to the whole
    int digit[MAX_CHOICES], base[MAX_CHOICES], used;
} ListedStory;

static int pick_digit(Story *s, int n) {
    ListedStory *l = (ListedStory *)s;
    int i = s->choices;
    if (i >= MAX_CHOICES) die(EXIT_SYSTEM, "internal error: a story of more than %d choices", MAX_CHOICES);
    if (i == l->used) l->digit[l->used++] = 0;
    l->base[i] = n;
    return l->digit[i];
}

// Counts up to the choices of the next story. Returns 0 after the last.
static int next_choices(ListedStory *l) {
    l->used = l->story.choices;
    while (l->used > 0 && ++l->digit[l->used - 1] == l->base[l->used - 1]) l->used--;
    return l->used > 0;
}

static int compare_u64(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static int is_bound(int rule) {
    char *bind = xasprintf(":%s", grammar[rule].name);
    int found = 0;
    for (int r = 0; r < NUM_RULES; r++) found |= strstr(grammar[r].text, bind) != NULL;
    free(bind);
    return found;
}

// The grammar with bound lists cut to two words, and other lists of words to one.
static Grammar small_grammar(const Grammar *g) {
    Grammar small = *g;
    for (int r = 0; r < NUM_RULES; r++)
        if (is_list_of_words(r)) small.n[r] = is_bound(r) ? 2 : 1;
    return small;
}

static void check_enumeration(const Grammar *g, Score *score) {
    static Grammar small;
    static ListedStory listed;
    Story *s = &listed.story;
    small = small_grammar(g);
    *s = (Story){.g = &small, .pick = pick_digit};
    size_t count = 0, capacity = 1 << 16;
    uint64_t *hash = (uint64_t *)xmalloc(capacity * sizeof *hash);
    double probability = 0, bits = 0, bytes = 0;
    Means mean = rule_means(&small, 0, 0);
    size_t read = 0;
    do {
        tell_story(s);
        Reading r = read_text(&small, s->text, s->bytes);
        read += r.best.whole && faults(&r.best) == 0 && total(r.best.right) == mean.references;
        if (count == capacity) hash = (uint64_t *)xrealloc(hash, (capacity *= 2) * sizeof *hash);
        hash[count++] = XXH64(s->text, s->bytes, 0);
        double p = exp2(-s->bits);
        probability += p;
        bits += p * s->bits;
        bytes += p * (double)s->bytes;
    } while (next_choices(&listed));
    qsort(hash, count, sizeof *hash, compare_u64);
    size_t twice = 0;
    for (size_t i = 1; i < count; i++) twice += hash[i] == hash[i - 1];
    free(hash);
    report(score, twice == 0, "the %zu stories of a smaller grammar differ, so each has one derivation", count);
    report(score, fabs(probability - 1) < 1e-9, "their probabilities sum to 1 %+.1e", probability - 1);
    report(score, fabs(bits - mean.bits) < 1e-7 && fabs(bytes - mean.bytes) < 1e-6,
           "their entropy is %.9f bits (formula %.9f), their mean length %.9f bytes (%.9f)", bits, mean.bits, bytes,
           mean.bytes);
    report(score, read == count, "%zu of them are read with all their %g references right", read, mean.references);
}

// ---------------------------------------------------------------------------------------------------------------------
// Reading stories

// Replaces the last mention of a child by a name that does not fit the rest, reads the text, and restores it. Returns
// whether that name is its only fault.
static int reads_wrong_name(const Grammar *g, Story *s, int letter) {
    const char *name = s->bindings.word[letter];
    size_t length = word_length(name), at = s->bytes - length;
    while (at > 0 && memcmp(s->text + at, name, length) != 0) at--;
    char saved = s->text[at];
    s->text[at] = saved == 'A' ? 'B' : 'A';
    Reading r = read_text(g, s->text, s->bytes);
    s->text[at] = saved;
    return r.derivations == 0 && r.best.whole && total(r.best.wrong) == 1 && faults(&r.best) == 1;
}

static void check_readings(const Grammar *g, Score *score) {
    enum { STORIES = 3000 };
    static Story s;
    s = (Story){.g = g, .pick = pick_random, .stream = rng_stream(1, STREAM_CHECK)};
    int one = 0, same = 0, whole = 0, wrong = 0;
    for (int i = 0; i < STORIES; i++) {
        tell_story(&s);
        Reading r = read_text(g, s.text, s.bytes);
        one += r.derivations == 1;
        whole += s.bytes == STORY_BYTES;
        same += fabs(-log2(r.probability) - s.bits) < 1e-9;
        wrong += reads_wrong_name(g, &s, 'A') + reads_wrong_name(g, &s, 'a');
    }
    report(score, one == STORIES, "%d of %d stories have one derivation", one, STORIES);
    report(score, whole == STORIES, "%d have %d bytes", whole, STORY_BYTES);
    report(score, same == STORIES, "%d have the probability, from the text alone, that they were told with", same);
    report(score, wrong == 2 * STORIES, "%d of %d stories with a wrong name have no other fault", wrong, 2 * STORIES);
}

// ---------------------------------------------------------------------------------------------------------------------
// The grammar's lists, means over many stories, and whole corpora

static void check_lists(const Grammar *g, Score *score) {
    int distinct = 1, plain = 1;
    for (int r = 0; r < NUM_RULES; r++) {
        int words = is_list_of_words(r);
        plain &= words || !is_bound(r);
        for (int i = 0; words && i < g->n[r]; i++) {
            const char *word = g->text[r][i];
            plain &= word_length(word) == strcspn(word, "|");
            for (int j = 0; j < i; j++) distinct &= *g->text[r][j] != *word;
        }
    }
    report(score, distinct, "no list has two words with the same first letter");
    report(score, plain, "bound rules are lists of words, and words are of letters only");
}

static void check_means(const Grammar *g, Score *score) {
    enum { STORIES = 200000 };
    static Story s;
    s = (Story){.g = g, .pick = pick_random, .stream = rng_stream(2, STREAM_CHECK)};
    double bits = 0, bits2 = 0, bytes = 0, bytes2 = 0;
    for (int i = 0; i < STORIES; i++) {
        tell_story(&s);
        bits += s.bits / STORIES, bits2 += s.bits * s.bits / STORIES;
        bytes += (double)s.bytes / STORIES, bytes2 += (double)s.bytes * (double)s.bytes / STORIES;
    }
    Means mean = rule_means(g, 0, 0);
    double bits_error = sqrt((bits2 - bits * bits) / STORIES), bytes_error = sqrt((bytes2 - bytes * bytes) / STORIES);
    report(score, fabs(bits - mean.bits) < 4 * bits_error,
           "mean of %d stories: %.3f bits (formula %.3f), within 4 standard errors of %.1e", STORIES, bits, mean.bits,
           bits_error);
    report(score, fabs(bytes - mean.bytes) < 4 * bytes_error,
           "their mean length: %.3f bytes (formula %.3f), within 4 standard errors of %.1e", bytes, mean.bytes,
           bytes_error);
}

static int same_shard(const Corpus *a, const Corpus *b) {
    return a->tokens == b->tokens && memcmp(a->shard, b->shard, SHARD_HEADER_BYTES + 2 * a->tokens) == 0;
}

static void check_corpora(const Grammar *g, Score *score) {
    Corpus seed_7 = make_corpus(g, 7, STREAM_TRAIN, 20000), again = make_corpus(g, 7, STREAM_TRAIN, 20000);
    Corpus seed_8 = make_corpus(g, 8, STREAM_TRAIN, 20000);
    report(score, same_shard(&seed_7, &again), "the same seed gives the same bytes");
    report(score, !same_shard(&seed_7, &seed_8), "a different seed gives different bytes");
    double bits = 0;
    for (uint64_t at = 0, end; at < seed_7.bytes; at = end) {
        for (end = at; seed_7.text[end++] != '\n'; ) continue;
        bits -= log2(read_text(g, seed_7.text + at, end - at).probability);
    }
    report(score, fabs(bits - seed_7.bits) < 1e-6 * bits, "a corpus has the probability of its stories");
    free_corpus(&seed_7);
    free_corpus(&again);
    free_corpus(&seed_8);
}

// Returns the program's exit code.
static int check_toy(const Grammar *g) {
    Score score = {0, 0};
    check_lists(g, &score);
    check_enumeration(g, &score);
    check_readings(g, &score);
    check_means(g, &score);
    check_corpora(g, &score);
    return finish(&score);
}

#endif
