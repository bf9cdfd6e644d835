// llmc/tokenizer.h against a second, slow implementation, on random text: it tries the pattern's alternatives one by
// one, and finds merges by looking up the joined bytes. Also: decoding restores the text, a text that is cut encodes to
// the same tokens, and no text is slow.
//
//     test_tokenize test/data/gpt2.tiktoken [documents [seed]]
#define _GNU_SOURCE         // qsort_r
#include "llmc/tokenizer.h"
#include "test/testing.h"

// ---------------------------------------------------------------------------------------------------------------------
// The slow implementation

typedef struct { size_t at; enum CharClass is; int32_t c; } Char;

// Splits text into characters; an invalid byte is one. Returns how many there are. chars[count].at is the end.
static size_t split_chars(const unsigned char *text, size_t bytes, Char *chars) {
    size_t count = 0;
    for (size_t at = 0; at < bytes;) {
        int32_t c;
        utf8proc_ssize_t n = utf8proc_iterate(text + at, (utf8proc_ssize_t)(bytes - at), &c);
        chars[count].at = at;
        chars[count].c = n > 0 ? c : -1;
        chars[count++].is = n > 0 ? char_class_(c) : CLASS_OTHER;
        at += n > 0 ? (size_t)n : 1;
    }
    chars[count].at = bytes;
    chars[count].is = CLASS_OTHER;
    return count;
}

static int starts_with(const Char *chars, size_t i, size_t count, const char *word) {
    for (; *word; word++, i++)
        if (i >= count || chars[i].c != *word) return 0;
    return 1;
}

// Matches the pattern at character i. Returns the end of the match.
static size_t slow_piece(const Char *chars, size_t i, size_t count) {
    static const char *contractions[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    for (int k = 0; k < 7; k++)
        if (starts_with(chars, i, count, contractions[k])) return i + strlen(contractions[k]);
    static const enum CharClass runs[] = {CLASS_LETTER, CLASS_NUMBER, CLASS_OTHER};
    for (int k = 0; k < 3; k++) {
        for (int blank = chars[i].c == ' '; blank >= 0; blank--) {
            size_t end = i + (size_t)blank;
            while (end < count && chars[end].is == runs[k]) end++;
            if (end > i + (size_t)blank) return end;
        }
    }
    size_t end = i;
    while (end < count && chars[end].is == CLASS_SPACE) end++;
    for (size_t e = end; e > i; e--)        // \s+(?!\S), backtracking
        if (e == count || chars[e].is == CLASS_SPACE) return e;
    return end;
}

typedef struct {
    const Tokenizer *t;
    uint16_t *sorted;       // (50256) tokens in the order of their bytes
} Lookup;

static int compare_bytes(const char *a, size_t a_bytes, const char *b, size_t b_bytes) {
    int c = memcmp(a, b, a_bytes < b_bytes ? a_bytes : b_bytes);
    return c ? c : (a_bytes > b_bytes) - (a_bytes < b_bytes);
}

static int compare_tokens(const void *a, const void *b, void *tokenizer) {
    const Tokenizer *t = (const Tokenizer *)tokenizer;
    size_t a_bytes, b_bytes;
    const char *a_text = tokenizer_decode(t, *(const uint16_t *)a, &a_bytes);
    const char *b_text = tokenizer_decode(t, *(const uint16_t *)b, &b_bytes);
    return compare_bytes(a_text, a_bytes, b_text, b_bytes);
}

static Lookup sort_tokens(Tokenizer *t) {
    Lookup l = {t, (uint16_t *)xmalloc((size_t)t->eot * sizeof(uint16_t))};
    for (int i = 0; i < t->eot; i++) l.sorted[i] = (uint16_t)i;
    qsort_r(l.sorted, (size_t)t->eot, sizeof *l.sorted, compare_tokens, t);
    return l;
}

// The token with these bytes; INT_MAX if there is none.
static int find_token(const Lookup *l, const unsigned char *bytes, size_t n) {
    int low = 0, high = l->t->eot - 1;
    while (low <= high) {
        int mid = (low + high) / 2;
        size_t m;
        const char *s = tokenizer_decode(l->t, l->sorted[mid], &m);
        int c = compare_bytes((const char *)bytes, n, s, m);
        if (c == 0) return l->sorted[mid];
        if (c < 0) high = mid - 1;
        else low = mid + 1;
    }
    return INT_MAX;
}

static size_t slow_merge(const Lookup *l, const unsigned char *piece, size_t n, uint16_t *out) {
    size_t *start = (size_t *)xmalloc((n + 1) * sizeof *start), parts = n;
    int *joined = (int *)xmalloc((n + 1) * sizeof *joined);
    for (size_t i = 0; i <= n; i++) start[i] = i;
    for (;;) {
        size_t best = 0;
        for (size_t i = 0; i + 1 < parts; i++) {
            joined[i] = find_token(l, piece + start[i], start[i + 2] - start[i]);
            if (joined[i] < joined[best]) best = i;
        }
        if (parts < 2 || joined[best] == INT_MAX) break;
        memmove(start + best + 1, start + best + 2, (parts - best - 1) * sizeof *start);
        parts--;
    }
    for (size_t i = 0; i < parts; i++) out[i] = (uint16_t)find_token(l, piece + start[i], start[i + 1] - start[i]);
    free(start), free(joined);
    return parts;
}

static size_t slow_encode(const Lookup *l, const unsigned char *text, size_t bytes, uint16_t *out) {
    Char *chars = (Char *)xmalloc((bytes + 1) * sizeof *chars);
    size_t count = split_chars(text, bytes, chars), n = 0;
    for (size_t i = 0, end; i < count; i = end) {
        end = slow_piece(chars, i, count);
        n += slow_merge(l, text + chars[i].at, chars[end].at - chars[i].at, out + n);
    }
    free(chars);
    return n;
}

// ---------------------------------------------------------------------------------------------------------------------
// Random documents: characters of all scripts, white space, contractions, words of the vocabulary, runs, broken UTF-8

static size_t put_char(unsigned char *out, uint32_t c) {
    return (size_t)utf8proc_encode_char((utf8proc_int32_t)(c >= 0xD800 && c < 0xE000 ? 0xFFFD : c), out);
}

static size_t put_bytes(unsigned char *out, const char *bytes, size_t n) {
    memcpy(out, bytes, n);
    return n;
}

static size_t random_document(const Tokenizer *t, Random *r, unsigned char *out, size_t room) {
    static const uint32_t spaces[] = {9, 10, 11, 12, 13, ' ', ' ', ' ', 0x1C, 0x85, 0xA0, 0x1680, 0x180E, 0x2003,
                                      0x200B, 0x2028, 0x202F, 0x205F, 0x2060, 0x3000, 0xFEFF};
    static const uint32_t blocks[] = {0x20, 0x80, 0x370, 0x400, 0x5D0, 0x600, 0x900, 0xE00, 0x1100, 0x2150, 0x3040,
                                      0x4E00, 0xAC00, 0x10000, 0x1D400, 0x1F300};
    static const char *const odd[] = {
        "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'", "''", "'l", "'S", " '", "\r\n", "\n\n", "<|endoftext|>",
        "\xff", "\xc0\x80", "\xed\xa0\x80", "\xe2\x80", "\xf4\x90\x80\x80", "\xe0\x81\x81", "\xf0\x80\x81\x81"};
    static const char ascii[] = "abcdefghijklmnopqrstuvwxyz0123456789' ";
    size_t n = 0, parts = (size_t)random_below(r, 40);
    for (size_t i = 0; i < parts; i++) {
        int64_t kind = random_below(r, 8), repeats = random_below(r, 6) ? 1 : 1 + random_below(r, 90);
        uint32_t block = blocks[random_below(r, 16)];
        uint32_t repeated = kind == 0 ? (uint32_t)random_below(r, 0x110000) : spaces[random_below(r, 21)];
        for (int64_t k = 0; k < repeats && n + 160 < room; k++) {
            if (kind <= 1) n += put_char(out + n, repeated);
            else if (kind == 2) n += put_char(out + n, block + (uint32_t)random_below(r, 96));
            else if (kind == 3) out[n++] = (unsigned char)random_below(r, 256);
            else if (kind == 4) out[n++] = (unsigned char)ascii[random_below(r, 38)];
            else if (kind == 5) {
                const char *text = odd[random_below(r, 22)];
                n += put_bytes(out + n, text, strlen(text));
            } else {
                size_t bytes;
                const char *text = tokenizer_decode(t, (int)random_below(r, t->eot), &bytes);
                n += put_bytes(out + n, text, bytes);
            }
        }
    }
    return n;
}

// ---------------------------------------------------------------------------------------------------------------------
// The checks

// Whether the tokens decode to the text.
static int decodes_to(const Tokenizer *t, const uint16_t *tokens, size_t count, const unsigned char *text,
                      size_t bytes) {
    size_t end = 0;
    for (size_t i = 0; i < count; i++) {
        size_t n;
        const char *s = tokenizer_decode(t, tokens[i], &n);
        if (end + n > bytes || memcmp(s, text + end, n) != 0) return 0;
        end += n;
    }
    return end == bytes;
}

static int same_tokens(const uint16_t *a, size_t a_count, const uint16_t *b, size_t b_count) {
    return a_count == b_count && memcmp(a, b, a_count * sizeof *a) == 0;
}

static void check_documents(Score *score, Tokenizer *t, EncodeScratch *scratch, int documents, uint64_t seed) {
    enum { ROOM = 8192, CHECKS = 4 };
    static const char *const names[CHECKS] = {"the slow encoder agrees", "decoding restores the text",
                                              "cutting the text changes no token", "byte-level tokens are the bytes"};
    uint16_t fast[ROOM], slow[ROOM], parts[ROOM];
    int first_bad[CHECKS] = {-1, -1, -1, -1};
    size_t tokens = 0;
    Random r = {rng_stream(seed, 1), 0};
    Lookup lookup = sort_tokens(t);
    Tokenizer bytes_tokenizer;
    tokenizer_init_bytes(&bytes_tokenizer);
    for (int d = 0; d < documents; d++) {
        // A block of exactly the document's size, so that the address sanitizer sees a read past its end.
        unsigned char buffer[ROOM];
        size_t n = random_document(t, &r, buffer, ROOM);
        unsigned char *text = (unsigned char *)memcpy(xmalloc(n), buffer, n);
        int good[CHECKS];
        size_t count = tokenizer_encode(t, text, n, fast, scratch), slow_count = slow_encode(&lookup, text, n, slow);
        good[0] = same_tokens(fast, count, slow, slow_count);
        good[1] = decodes_to(t, fast, count, text, n);

        size_t cut = tokenizer_cut(t, text, n), parts_count = tokenizer_encode(t, text, cut, parts, scratch);
        parts_count += tokenizer_encode(t, text + cut, n - cut, parts + parts_count, scratch);
        good[2] = same_tokens(fast, count, parts, parts_count);

        good[3] = tokenizer_encode(&bytes_tokenizer, text, n, fast, scratch) == n;
        for (size_t i = 0; i < n; i++) good[3] &= fast[i] == text[i];
        for (int c = 0; c < CHECKS; c++)
            if (!good[c] && first_bad[c] < 0) first_bad[c] = d;
        tokens += slow_count;
        free(text);
    }
    for (int c = 0; c < CHECKS; c++) {
        if (first_bad[c] < 0) report(score, 1, "%d random documents, %zu tokens: %s", documents, tokens, names[c]);
        else report(score, 0, "not true of document %d: %s", first_bad[c], names[c]);
    }
    free(lookup.sorted);
    tokenizer_free(&bytes_tokenizer);
}

// A million repetitions of one character. SLOW_MACHINE allows for sanitizers and busy machines.
static void check_repetitions(Score *score, const Tokenizer *t, EncodeScratch *scratch) {
    static const struct { const char *name, *text; } repeated[] = {
        {"a", "a"}, {"blank", " "}, {"newline", "\n"}, {"!", "!"}, {"1", "1"}, {"'", "'"}, {"byte 0xff", "\xff"},
        {"e acute", "\xC3\xA9"}, {"a CJK character", "\xE5\xAD\x97"}, {"an emoji", "\xF0\x9F\x98\x80"}, {"ab", "ab"},
        {"a CJK blank", "\xE3\x80\x80"}};
    enum { REPEATS = 1000000 };
    double limit = getenv("SLOW_MACHINE") ? 20 : 1;
    unsigned char *text = (unsigned char *)xmalloc(4 * REPEATS);
    uint16_t *tokens = (uint16_t *)xmalloc(4 * REPEATS * sizeof *tokens);
    for (size_t i = 0; i < sizeof repeated / sizeof *repeated; i++) {
        size_t m = strlen(repeated[i].text), n = m * REPEATS;
        for (size_t at = 0; at < n; at += m) memcpy(text + at, repeated[i].text, m);
        double start = now_seconds();
        size_t count = tokenizer_encode(t, text, n, tokens, scratch);
        double seconds = now_seconds() - start;
        const char *name = repeated[i].name;
        report(score, decodes_to(t, tokens, count, text, n), "a million times %s decodes to itself", name);
        report(score, seconds <= limit, "a million times %s takes %.2f s, at most %g", name, seconds, limit);
    }
    free(text), free(tokens);
}

int main(int argc, char **argv) {
    Error err;
    Tokenizer t;
    EncodeScratch scratch;
    Score score = {0, 0};
    program_start(argv[0]);
    if (argc < 2) die(EXIT_INPUT, "usage: test_tokenize gpt2.tiktoken [documents [seed]]");
    if (tokenizer_init_gpt2(&t, argv[1], &err) != 0) die(EXIT_INPUT, "%s", err.text);
    tokenizer_prepare(&t);
    encode_scratch_init(&scratch);
    int documents = argc > 2 ? atoi(argv[2]) : 5000;
    uint64_t seed = argc > 3 ? strtoull(argv[3], NULL, 10) : 1;
    check_documents(&score, &t, &scratch, documents, seed);
    check_repetitions(&score, &t, &scratch);
    encode_scratch_free(&scratch);
    tokenizer_free(&t);
    return finish(&score);
}
