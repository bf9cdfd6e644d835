// llmc/tokenizer.h against a second, slow implementation, on random text: the pattern tried alternative by alternative, the
// merges found by looking up the joined bytes. Then: what was encoded decodes, a cut text encodes as the whole, and no text
// is slow.
//
//     test_tokenize test/data/gpt2.tiktoken [documents [seed]]
#include "../llmc/tokenizer.h"

static uint64_t random_state;

static uint32_t random_below(uint32_t n) {      // splitmix64
    uint64_t z = random_state += 0x9E3779B97F4A7C15ULL;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ z >> 27) * 0x94D049BB133111EBULL;
    return (uint32_t)((z ^ z >> 31) >> 32) % n;
}

// ---------------------------------------------------------------------------------------------------------------------
// The slow implementation

typedef struct { size_t at; enum CharClass is; int32_t c; } Char;

// Splits text into characters, an invalid byte being one. Returns how many; chars[count].at is the end.
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
    for (; *word; word++, i++) if (i >= count || chars[i].c != *word) return 0;
    return 1;
}

// The pattern at place i: the place where the match ends.
static size_t slow_piece(const Char *chars, size_t i, size_t count) {
    static const char *contractions[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    for (int k = 0; k < 7; k++) if (starts_with(chars, i, count, contractions[k])) return i + strlen(contractions[k]);
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
    for (size_t e = end; e > i; e--) if (e == count || chars[e].is == CLASS_SPACE) return e;    // \s+(?!\S), backing off
    return end;
}

typedef struct { const Tokenizer *t; uint16_t *sorted; } Lookup;     // (50256) tokens in the order of their bytes

static const Tokenizer *sort_by;

static int compare_bytes(const char *a, size_t an, const char *b, size_t bn) {
    int c = memcmp(a, b, an < bn ? an : bn);
    return c ? c : (an > bn) - (an < bn);
}

static int compare_tokens(const void *a, const void *b) {
    size_t an, bn;
    const char *as = tokenizer_decode(sort_by, *(const uint16_t *)a, &an), *bs = tokenizer_decode(sort_by, *(const uint16_t *)b, &bn);
    return compare_bytes(as, an, bs, bn);
}

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

static size_t random_document(const Tokenizer *t, unsigned char *out, size_t room) {
    static const uint32_t spaces[] = {
        9, 10, 11, 12, 13, ' ', ' ', ' ', 0x1C, 0x85, 0xA0, 0x1680, 0x180E, 0x2003, 0x200B, 0x2028, 0x202F, 0x205F, 0x2060, 0x3000, 0xFEFF};
    static const uint32_t blocks[]
        = {0x20, 0x80, 0x370, 0x400, 0x5D0, 0x600, 0x900, 0xE00, 0x1100, 0x2150, 0x3040, 0x4E00, 0xAC00, 0x10000, 0x1D400, 0x1F300};
    static const char *odd[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'", "''", "'l", "'S", " '", "\r\n", "\n\n", "<|endoftext|>",
        "\xff", "\xc0\x80", "\xed\xa0\x80", "\xe2\x80", "\xf4\x90\x80\x80", "\xe0\x81\x81", "\xf0\x80\x81\x81"};
    size_t n = 0, parts = random_below(40);
    for (size_t i = 0; i < parts; i++) {
        uint32_t kind = random_below(8), repeats = random_below(6) ? 1 : 1 + random_below(90), block = blocks[random_below(16)];
        uint32_t c = kind == 0 ? random_below(0x110000) : kind == 1 ? spaces[random_below(21)] : block;
        for (uint32_t r = 0; r < repeats && n + 160 < room; r++) {
            if (kind <= 1) n += put_char(out + n, c);
            else if (kind == 2) n += put_char(out + n, block + random_below(96));
            else if (kind == 3) out[n++] = (unsigned char)random_below(256);
            else if (kind == 4) out[n++] = (unsigned char)("abcdefghijklmnopqrstuvwxyz0123456789' "[random_below(38)]);
            else if (kind == 5) {
                const char *s = odd[random_below(22)];
                memcpy(out + n, s, strlen(s));
                n += strlen(s);
            } else {
                size_t bytes;
                const char *s = tokenizer_decode(t, (int)random_below((uint32_t)t->eot), &bytes);
                memcpy(out + n, s, bytes);
                n += bytes;
            }
        }
    }
    return n;
}

int main(int argc, char **argv) {
    Error err;
    Tokenizer t, bytes_t;
    EncodeScratch scratch;
    set_program_name(argv[0]);
    if (argc < 2) die(EXIT_INPUT, "usage: test_tokenize gpt2.tiktoken [documents [seed]]");
    if (tokenizer_init_gpt2(&t, argv[1], &err) != 0) die(EXIT_INPUT, "%s", err.text);
    int documents = argc > 2 ? atoi(argv[2]) : 5000;
    random_state = argc > 3 ? strtoull(argv[3], NULL, 10) : 1;
    tokenizer_init_bytes(&bytes_t);
    tokenizer_prepare(&t);
    encode_scratch_init(&scratch);
    Lookup lookup = {&t, (uint16_t *)xmalloc((size_t)t.eot * sizeof(uint16_t))};
    for (int i = 0; i < t.eot; i++) lookup.sorted[i] = (uint16_t)i;
    sort_by = &t;
    qsort(lookup.sorted, (size_t)t.eot, sizeof(uint16_t), compare_tokens);

    enum { ROOM = 8192, REPEATS = 1000000 };
    uint16_t fast[ROOM], slow[ROOM], parts[ROOM];
    char back[ROOM];
    size_t tokens = 0;
    for (int d = 0; d < documents; d++) {
        // A block of exactly the document's size, so that the address sanitizer sees a read past its end.
        unsigned char buffer[ROOM];
        size_t n = random_document(&t, buffer, ROOM);
        unsigned char *text = (unsigned char *)memcpy(xmalloc(n), buffer, n);
        size_t count = tokenizer_encode(&t, text, n, fast, &scratch), slow_count = slow_encode(&lookup, text, n, slow), end = 0;
        if (count != slow_count || memcmp(fast, slow, 2 * count) != 0) die(1, "document %d: the tokens differ from the slow encoder's", d);
        for (size_t i = 0; i < count; i++) {
            size_t m;
            const char *s = tokenizer_decode(&t, fast[i], &m);
            memcpy(back + end, s, m);
            end += m;
        }
        if (end != n || memcmp(back, text, n) != 0) die(1, "document %d: decodes to another text", d);
        size_t cut = tokenizer_cut(&t, text, n), first = tokenizer_encode(&t, text, cut, parts, &scratch);
        first += tokenizer_encode(&t, text + cut, n - cut, parts + first, &scratch);
        if (first != count || memcmp(fast, parts, 2 * count) != 0) die(1, "document %d: cut at byte %zu it has other tokens", d, cut);
        count = tokenizer_encode(&bytes_t, text, n, fast, &scratch);
        for (size_t i = 0; i < n; i++) if (count != n || fast[i] != text[i]) die(1, "document %d: bytes as tokens are not the bytes", d);
        tokens += slow_count;
        free(text);
    }
    printf(
        "%d random documents, %zu tokens: the slow encoder agrees, decoding gives the text back, cuts change nothing\n", documents, tokens);

    // A million of one character; with a clock that is generous to sanitizers and busy machines only where asked.
    static const char *repeated[]
        = {"a", " ", "\n", "!", "1", "'", "\xff", "\xC3\xA9", "\xE5\xAD\x97", "\xF0\x9F\x98\x80", "ab", "\xE3\x80\x80"};
    double limit = getenv("SLOW_MACHINE") ? 20 : 1, worst = 0;
    unsigned char *text = (unsigned char *)xmalloc(4 * REPEATS);
    uint16_t *out = (uint16_t *)xmalloc(4 * REPEATS * sizeof *out);
    for (size_t i = 0; i < sizeof repeated / sizeof *repeated; i++) {
        size_t m = strlen(repeated[i]), n = m * REPEATS, end = 0;
        for (size_t j = 0; j < n; j += m) memcpy(text + j, repeated[i], m);
        double start = now_seconds();
        size_t count = tokenizer_encode(&t, text, n, out, &scratch);
        double seconds = now_seconds() - start;
        if (seconds > worst) worst = seconds;
        for (size_t j = 0; j < count; j++) {
            size_t k;
            const char *s = tokenizer_decode(&t, out[j], &k);
            if (end + k > n || memcmp(s, text + end, k) != 0) die(1, "a million times \"%s\" decodes to another text", repeated[i]);
            end += k;
        }
        if (end != n) die(1, "a million times \"%s\" decodes to another text", repeated[i]);
        if (seconds > limit) die(1, "a million times \"%s\" takes %.2f s", repeated[i], seconds);
    }
    printf("a million of one character: at most %.2f s\n", worst);
    free(text), free(out), free(lookup.sorted);
    encode_scratch_free(&scratch);
    tokenizer_free(&t), tokenizer_free(&bytes_t);
    return 0;
}
