// Text to tokens and back: GPT-2's byte-pair encoding, exactly, and a byte-level vocabulary (bytes and end-of-text).
//
// For decoding, one of the two inits is enough. For encoding, call tokenizer_prepare() once; then any number of threads
// may encode, each with its own EncodeScratch. Only programs that call tokenizer_prepare() need to link utf8proc.
//
// GPT-2 cuts the text into pieces, from left to right. Each piece is what this pattern matches (its first alternative
// that does):
//     's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
// with \p{L} letters, \p{N} numbers, \s Unicode White_Space. Within a piece it starts from single bytes, and merges the
// adjacent pair of lowest rank, the leftmost of several, until no pair can be merged. A token's id is its rank. A byte
// that is not part of valid UTF-8 counts as a character that is neither letter, number nor space. "<|endoftext|>" in a
// text is ordinary text.
#ifndef LLMC_TOKENIZER_H
#define LLMC_TOKENIZER_H

#include <utf8proc.h>
#ifndef XXH_INLINE_ALL
#define XXH_INLINE_ALL
#endif
#include <xxhash.h>

#include "shard.h"
#include "utils.h"

#define GPT2_FILE_BYTES 835554
#define GPT2_FILE_XXH64 0xEE99BD9E71C2C951ULL
#define NO_TOKEN 0xFFFF                     // no merge; also marks a token that was merged into the one before it
#define PAIR_BITS 17                        // 2^17 slots for 50,000 merges
#define CACHE_BITS 16                       // piece cache: 2^16 pairs of 32 bytes, 4 MB per thread
#define PIECES_AHEAD 32                     // pieces that are looked up in the cache together
#define SHORT_PIECE 64                      // up to this many bytes, scanning for the best pair is faster than a heap

typedef struct {
    uint32_t pair;                          // left << 16 | right; UINT32_MAX is an empty slot
    uint32_t merged;
} MergeSlot;

typedef struct {
    int vocab_size, eot;                    // 50257 and 50256, or 257 and 256
    unsigned char *bytes;                   // the bytes of all tokens, one after the other
    uint32_t *start;                        // (vocab_size + 1): token i is bytes[start[i]] to bytes[start[i + 1]]
    // for encoding, GPT-2 only
    uint16_t byte_token[256];               // the token of a single byte
    MergeSlot *merges;                      // (2^PAIR_BITS) hash table, linear probing
    unsigned char *char_class;              // (0x110000) CharClass of each code point
} Tokenizer;

enum CharClass { CLASS_OTHER, CLASS_LETTER, CLASS_NUMBER, CLASS_SPACE };

// A piece of at most 15 bytes and its tokens, at most 7. key: its bytes, zero-padded; the last byte is its length.
typedef struct {
    uint64_t key[2];
    uint16_t count, tokens[7];
} CachedPiece;

typedef struct {
    CachedPiece (*cache)[2];                // (2^CACHE_BITS) pairs, the newer piece first
    uint32_t *next, *prev;                  // (capacity) a linked list of the tokens of a long piece
    uint64_t *heap;                         // (2 * capacity) merged token << 32 | place: lowest rank, then leftmost
    size_t capacity;
    uint64_t invalid_bytes;                 // how many bytes so far were not part of valid UTF-8
} EncodeScratch;

// ---------------------------------------------------------------------------------------------------------------------
// Encodings. A text is UTF-8, or at least bytes of which most are ASCII.

// The length of a UTF-8 byte order mark at the start of a text, or 0. It says how the text is encoded, and is no part
// of it.
LLMC_FN size_t byte_order_mark(const void *text, size_t bytes) {
    return bytes >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0 ? 3 : 0;
}

// "UTF-16" or "UTF-32" where a text starts like that: with a byte order mark, or with characters of which all bytes but
// one are 0. Else NULL.
LLMC_FN const char *wide_encoding(const void *text, size_t bytes) {
    const unsigned char *s = (const unsigned char *)text;
    if (bytes >= 4 && (memcmp(s, "\xFF\xFE\0", 4) == 0 || memcmp(s, "\0\0\xFE\xFF", 4) == 0)) return "UTF-32";
    if (bytes >= 2 && (memcmp(s, "\xFF\xFE", 2) == 0 || memcmp(s, "\xFE\xFF", 2) == 0)) return "UTF-16";
    if (bytes < 8) return NULL;
    int letters = 0;                        // bit i: byte i is not 0
    for (int i = 0; i < 8; i++) letters |= (s[i] != 0) << i;
    return letters == 0x55 || letters == 0xAA ? "UTF-16" : letters == 0x11 || letters == 0x88 ? "UTF-32" : NULL;
}

// ---------------------------------------------------------------------------------------------------------------------
// Vocabularies

LLMC_FN void tokenizer_free(Tokenizer *t) {
    free(t->bytes), free(t->start), free(t->merges), free(t->char_class);
    memset(t, 0, sizeof *t);
}

// Allocates a vocabulary whose last token is end-of-text. text_bytes: of all other tokens.
LLMC_FN void tokenizer_alloc_(Tokenizer *t, int vocab_size, size_t text_bytes) {
    memset(t, 0, sizeof *t);
    t->vocab_size = vocab_size;
    t->eot = vocab_size - 1;
    t->bytes = (unsigned char *)xmalloc(text_bytes + sizeof "<|endoftext|>");
    t->start = (uint32_t *)xmalloc(((size_t)vocab_size + 1) * sizeof *t->start);
}

LLMC_FN void tokenizer_end_(Tokenizer *t, uint32_t text_bytes) {
    t->start[t->eot] = text_bytes;
    t->start[t->eot + 1] = text_bytes + 13;
    memcpy(t->bytes + text_bytes, "<|endoftext|>", 13);
}

LLMC_FN int tokenizer_init_bytes(Tokenizer *t) {
    tokenizer_alloc_(t, BYTES_VOCAB_SIZE, 256);
    for (int i = 0; i < 256; i++) t->bytes[i] = (unsigned char)i, t->start[i] = (uint32_t)i;
    tokenizer_end_(t, 256);
    return 0;
}

// Reads gpt2.tiktoken. Each line is a token's bytes in base64, a blank, and its id; ids count up from 0. The content is
// checked only by its checksum.
LLMC_FN int tokenizer_init_gpt2(Tokenizer *t, const char *tiktoken_path, Error *err) {
    size_t size;
    char *file = read_small_file(tiktoken_path, 16 << 20, &size, err);
    if (!file) return -1;
    if (size != GPT2_FILE_BYTES || XXH64(file, size, 0) != GPT2_FILE_XXH64) {
        free(file);
        return fail(err, "%s: not GPT-2's vocabulary (%zu bytes; gpt2.tiktoken has %d and a fixed checksum);"
                         " get it with data/gpt2_vocab.sh", tiktoken_path, size, GPT2_FILE_BYTES);
    }
    signed char digit[256];
    memset(digit, -1, sizeof digit);
    const char *alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (int i = 0; i < 64; i++) digit[(unsigned char)alphabet[i]] = (signed char)i;

    tokenizer_alloc_(t, GPT2_VOCAB_SIZE, size);
    const unsigned char *c = (const unsigned char *)file;
    uint32_t end = 0;
    for (int i = 0; i < t->eot; i++) {
        t->start[i] = end;
        uint32_t bits = 0;
        for (int count = 0; *c != ' '; c++) {
            if (digit[*c] < 0) continue;                        // the padding, =
            bits = bits << 6 | (uint32_t)digit[*c];
            count += 6;
            if (count >= 8) count -= 8, t->bytes[end++] = (unsigned char)(bits >> count);
        }
        while (*c++ != '\n') continue;
        if (end - t->start[i] == 1) t->byte_token[t->bytes[end - 1]] = (uint16_t)i;
    }
    tokenizer_end_(t, end);
    free(file);
    return 0;
}

// The bytes of a token, *bytes of them, not NUL-terminated. End-of-text gives "<|endoftext|>"; a token outside the
// vocabulary gives 0 bytes.
LLMC_FN const char *tokenizer_decode(const Tokenizer *t, int token, size_t *bytes) {
    if (token < 0 || token >= t->vocab_size) {
        *bytes = 0;
        return "";
    }
    *bytes = t->start[token + 1] - t->start[token];
    return (const char *)t->bytes + t->start[token];
}

// ---------------------------------------------------------------------------------------------------------------------
// Merging

LLMC_FN MergeSlot *merge_slot_(const Tokenizer *t, uint32_t pair) {
    uint32_t i = (pair * 0x9E3779B1u) >> (32 - PAIR_BITS);
    while (t->merges[i].pair != pair && t->merges[i].pair != UINT32_MAX) i = (i + 1) & ((1u << PAIR_BITS) - 1);
    return &t->merges[i];
}

// The token that left and right merge to, or NO_TOKEN. Lower tokens are merged first.
LLMC_FN uint32_t merged_(const Tokenizer *t, uint32_t left, uint32_t right) {
    return merge_slot_(t, left << 16 | right)->merged;          // NO_TOKEN in an empty slot
}

// Merges n <= 128 tokens in place and returns how many are left. Quadratic, but the fastest for short pieces.
LLMC_FN size_t merge_short_(const Tokenizer *t, uint16_t *tokens, size_t n) {
    uint16_t best[128];                                         // what tokens i and i + 1 merge to
    for (size_t i = 0; i + 1 < n; i++) best[i] = (uint16_t)merged_(t, tokens[i], tokens[i + 1]);
    while (n > 1) {
        size_t at = 0;
        for (size_t i = 1; i + 1 < n; i++)
            if (best[i] < best[at]) at = i;
        if (best[at] == NO_TOKEN) break;
        tokens[at] = best[at];
        n--;
        for (size_t i = at + 1; i < n; i++) tokens[i] = tokens[i + 1];
        for (size_t i = at + 1; i + 1 < n; i++) best[i] = best[i + 1];
        if (at > 0) best[at - 1] = (uint16_t)merged_(t, tokens[at - 1], tokens[at]);
        if (at + 1 < n) best[at] = (uint16_t)merged_(t, tokens[at], tokens[at + 1]);
    }
    return n;
}

LLMC_FN size_t heap_push_(uint64_t *heap, size_t size, uint64_t entry) {
    size_t i = size;
    for (; i > 0 && heap[(i - 1) / 2] > entry; i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = entry;
    return size + 1;
}

LLMC_FN size_t heap_pop_(uint64_t *heap, size_t size, uint64_t *entry) {
    *entry = heap[0];
    uint64_t last = heap[--size];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < size; i = child) {
        if (child + 1 < size && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= last) break;
        heap[i] = heap[child];
    }
    heap[i] = last;
    return size;
}

// The same for pieces of any length, in n log n. Takes 24 bytes of scratch per token; places are 32-bit.
LLMC_FN size_t merge_long_(const Tokenizer *t, uint16_t *tokens, size_t n, EncodeScratch *s) {
    if (n > s->capacity) {
        free(s->next), free(s->prev), free(s->heap);
        s->capacity = n;
        s->next = (uint32_t *)xmalloc(n * sizeof *s->next);
        s->prev = (uint32_t *)xmalloc(n * sizeof *s->prev);
        s->heap = (uint64_t *)xmalloc(2 * n * sizeof *s->heap);
    }
    // A pair is pushed when it forms, and stays in the heap when it is gone: a popped entry counts only if its place
    // still merges to the same token. There are n - 1 entries at first, and a merge pops one and pushes at most two, so
    // there are never more than 2 n.
    size_t size = 0;
    for (size_t i = 0; i < n; i++) {
        s->prev[i] = (uint32_t)i - 1, s->next[i] = (uint32_t)i + 1;
        uint64_t m = i + 1 < n ? merged_(t, tokens[i], tokens[i + 1]) : NO_TOKEN;
        if (m != NO_TOKEN) size = heap_push_(s->heap, size, m << 32 | i);
    }
    while (size > 0) {
        uint64_t entry;
        size = heap_pop_(s->heap, size, &entry);
        uint32_t token = (uint32_t)(entry >> 32), left = (uint32_t)entry, right = s->next[left];
        if (tokens[left] == NO_TOKEN || right == n || merged_(t, tokens[left], tokens[right]) != token) continue;
        tokens[left] = (uint16_t)token;
        tokens[right] = NO_TOKEN;
        uint32_t after = s->next[left] = s->next[right];
        if (after < n) {
            s->prev[after] = left;
            uint64_t m = merged_(t, token, tokens[after]);
            if (m != NO_TOKEN) size = heap_push_(s->heap, size, m << 32 | left);
        }
        if (left > 0) {
            uint64_t m = merged_(t, tokens[s->prev[left]], token);
            if (m != NO_TOKEN) size = heap_push_(s->heap, size, m << 32 | s->prev[left]);
        }
    }
    size_t count = 0;
    for (size_t i = 0; i < n; i++)
        if (tokens[i] != NO_TOKEN) tokens[count++] = tokens[i];
    if (s->capacity > 1 << 20) {                                // do not keep the memory of a rare giant
        free(s->next), free(s->prev), free(s->heap);
        s->next = s->prev = NULL, s->heap = NULL, s->capacity = 0;
    }
    return count;
}

LLMC_FN size_t merge_piece_(const Tokenizer *t, const unsigned char *piece, size_t n, uint16_t *out, EncodeScratch *s) {
    for (size_t i = 0; i < n; i++) out[i] = t->byte_token[piece[i]];
    return n <= SHORT_PIECE ? merge_short_(t, out, n) : merge_long_(t, out, n, s);
}

// ---------------------------------------------------------------------------------------------------------------------
// Encoding

LLMC_FN enum CharClass char_class_(int32_t c) {
    switch (utf8proc_category(c)) {
    case UTF8PROC_CATEGORY_LU: case UTF8PROC_CATEGORY_LL: case UTF8PROC_CATEGORY_LT: case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO: return CLASS_LETTER;
    case UTF8PROC_CATEGORY_ND: case UTF8PROC_CATEGORY_NL: case UTF8PROC_CATEGORY_NO: return CLASS_NUMBER;
    default: break;
    }
    // White_Space in Unicode's PropList.txt, a property that utf8proc lacks
    if ((c >= 9 && c <= 13) || c == ' ' || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
        c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000) return CLASS_SPACE;
    return CLASS_OTHER;
}

// Prepares for encoding: finds the merges and the class of every character. Takes about 20 ms.
LLMC_FN void tokenizer_prepare(Tokenizer *t) {
    if (t->vocab_size != GPT2_VOCAB_SIZE || t->merges) return;
    t->char_class = (unsigned char *)xmalloc(0x110000);
    for (int32_t c = 0; c < 0x110000; c++) t->char_class[c] = (unsigned char)char_class_(c);

    // The file does not say which pair makes a token. But the merges of lower rank reduce the token's bytes to exactly
    // that pair. So the merges are found in the order of their rank, each with the help of those before it.
    t->merges = (MergeSlot *)xmalloc(sizeof *t->merges << PAIR_BITS);
    for (size_t i = 0; i < (size_t)1 << PAIR_BITS; i++) t->merges[i].pair = UINT32_MAX, t->merges[i].merged = NO_TOKEN;
    for (int token = 256; token < t->eot; token++) {
        uint16_t parts[128];
        size_t n;
        const unsigned char *bytes = (const unsigned char *)tokenizer_decode(t, token, &n);
        for (size_t i = 0; i < n; i++) parts[i] = t->byte_token[bytes[i]];
        if (merge_short_(t, parts, n) != 2)
            die(EXIT_SYSTEM, "internal error: token %d is not the merge of two tokens", token);
        MergeSlot *slot = merge_slot_(t, (uint32_t)parts[0] << 16 | parts[1]);
        slot->pair = (uint32_t)parts[0] << 16 | parts[1];
        slot->merged = (uint32_t)token;
    }
}

LLMC_FN void encode_scratch_init(EncodeScratch *s) {
    memset(s, 0, sizeof *s);
    s->cache = (CachedPiece (*)[2])xcalloc((size_t)1 << CACHE_BITS, sizeof *s->cache);
}

LLMC_FN void encode_scratch_free(EncodeScratch *s) {
    free(s->cache), free(s->next), free(s->prev), free(s->heap);
    memset(s, 0, sizeof *s);
}

// The class of the character at text[0]; *length is its number of bytes, 0 for a byte that is not part of valid UTF-8.
LLMC_FN enum CharClass char_at_(const Tokenizer *t, const unsigned char *text, const unsigned char *end,
                                size_t *length) {
    uint32_t lead = text[0];
    size_t left = (size_t)(end - text);
    *length = 1;
    if (lead < 0x80) return (enum CharClass)t->char_class[lead];
    if (lead >= 0xC2 && lead < 0xE0) {
        if (left > 1 && (text[1] & 0xC0) == 0x80) {
            *length = 2;
            return (enum CharClass)t->char_class[(lead & 0x1F) << 6 | (text[1] & 0x3F)];
        }
    } else if (lead >= 0xE0 && lead < 0xF0) {
        if (left > 2 && (text[1] & 0xC0) == 0x80 && (text[2] & 0xC0) == 0x80) {
            uint32_t c = (lead & 0x0F) << 12 | (uint32_t)(text[1] & 0x3F) << 6 | (text[2] & 0x3F);
            if (c >= 0x800 && (c < 0xD800 || c > 0xDFFF)) {
                *length = 3;
                return (enum CharClass)t->char_class[c];
            }
        }
    } else if (lead >= 0xF0 && lead < 0xF5) {
        if (left > 3 && (text[1] & 0xC0) == 0x80 && (text[2] & 0xC0) == 0x80 && (text[3] & 0xC0) == 0x80) {
            uint32_t c = (lead & 0x07) << 18 | (uint32_t)(text[1] & 0x3F) << 12 | (uint32_t)(text[2] & 0x3F) << 6 |
                         (text[3] & 0x3F);
            if (c >= 0x10000 && c < 0x110000) {
                *length = 4;
                return (enum CharClass)t->char_class[c];
            }
        }
    }
    *length = 0;
    return CLASS_OTHER;
}

// The end of the run of characters of one class that starts at text.
LLMC_FN const unsigned char *run_end_(const Tokenizer *t, const unsigned char *text, const unsigned char *end,
                                      enum CharClass run, EncodeScratch *s) {
    while (text < end) {
        if (*text < 0x80) {
            if (t->char_class[*text] != run) break;
            text++;
            continue;
        }
        size_t length;
        if (char_at_(t, text, end, &length) != run) break;
        if (length == 0) length = 1, s->invalid_bytes++;
        text += length;
    }
    return text;
}

// How many of the eight bytes are ASCII letters before the first that is not.
LLMC_FN size_t leading_letters_(const unsigned char text[8]) {
    const uint64_t ones = 0x0101010101010101ULL, high = ones << 7;
    uint64_t w;
    memcpy(&w, text, 8);
    uint64_t lower = w | ones * 0x20;                           // a carry out of a byte >= 0x80 affects only later ones
    uint64_t stop = ((lower + ones * (0x7F - 'z')) | ~(lower + ones * (0x80 - 'a')) | w) & high;
    return stop ? (size_t)__builtin_ctzll(stop) / 8 : 8;
}

// The end of the piece that starts at text < end, by the pattern at the head of this file.
LLMC_FN const unsigned char *piece_end_(const Tokenizer *t, const unsigned char *text, const unsigned char *end,
                                        EncodeScratch *s) {
    size_t length;
    if (*text == '\'' && end - text > 1) {
        unsigned char c1 = text[1], c2 = end - text > 2 ? text[2] : 0;
        if (c1 == 's' || c1 == 't' || c1 == 'm' || c1 == 'd') return text + 2;
        if ((c1 == 'r' && c2 == 'e') || (c1 == 'v' && c2 == 'e') || (c1 == 'l' && c2 == 'l')) return text + 3;
    }
    const unsigned char *first = text + (*text == ' ' && end - text > 1);
    if (end - first > 16) {                                     // most pieces are words of at most 15 ASCII letters
        size_t n = leading_letters_(first);
        if (n == 8) n += leading_letters_(first + 8);
        if (n > 0 && n < 16 && first[n] < 0x80) return first + n;
    }
    enum CharClass run = char_at_(t, first, end, &length);
    if (run != CLASS_SPACE) return run_end_(t, first, end, run, s);

    // White space: all of it at the end of the text, else all but the last character, but at least one character.
    const unsigned char *last = text;
    for (const unsigned char *c = text; c < end && char_at_(t, c, end, &length) == CLASS_SPACE; c += length) last = c;
    char_at_(t, last, end, &length);
    return last + length == end || last == text ? last + length : last;
}

// The cache key of a piece of n <= 15 bytes: its bytes, zero-padded, and its length in the last byte. readable: the
// number of bytes that can be read from `piece` on.
LLMC_FN void piece_key_(const unsigned char *piece, size_t n, size_t readable, uint64_t key[2]) {
    key[0] = key[1] = 0;
    if (readable >= 16) {
        memcpy(key, piece, 16);
        key[0] &= UINT64_MAX >> (n < 8 ? 64 - 8 * n : 0);      // no branches, because lengths are unpredictable
        key[1] &= n > 8 ? UINT64_MAX >> (128 - 8 * n) : 0;
    } else {
        memcpy(key, piece, n);
    }
    key[1] |= (uint64_t)n << 56;
}

// Encodes a document, without end-of-text tokens. out must have room for `bytes` tokens. Returns the number of tokens.
LLMC_FN size_t tokenizer_encode(const Tokenizer *t, const void *text, size_t bytes, uint16_t *out, EncodeScratch *s) {
    const unsigned char *p = (const unsigned char *)text, *end = p + bytes;
    uint16_t *o = out;
    if (t->vocab_size == BYTES_VOCAB_SIZE) {
        for (size_t i = 0; i < bytes; i++) out[i] = p[i];
        return bytes;
    }
    while (p < end) {
        // Several pieces at once, so that the cache's memory is prefetched well before it is needed.
        struct { const unsigned char *text; size_t n; uint64_t key[2]; CachedPiece *cached; } pieces[PIECES_AHEAD], *q;
        int count = 0;
        for (q = pieces; count < PIECES_AHEAD && p < end; count++, q++) {
            const unsigned char *next = piece_end_(t, p, end, s);
            q->text = p, q->n = (size_t)(next - p);
            if (q->n <= 15) {
                piece_key_(p, q->n, (size_t)(end - p), q->key);
                uint64_t hash = (q->key[0] ^ q->key[1] * 0x9E3779B97F4A7C15ULL) * 0xD6E8FEB86659FD93ULL;
                q->cached = s->cache[hash >> (64 - CACHE_BITS)];
                __builtin_prefetch(q->cached);
            }
            p = next;
        }
        for (q = pieces; q < pieces + count; q++) {
            CachedPiece *c = q->cached;
            if (q->n > 15) {
                o += merge_piece_(t, q->text, q->n, o, s);
                continue;
            }
            c += ((c->key[0] ^ q->key[0]) | (c->key[1] ^ q->key[1])) != 0;
            if (((c->key[0] ^ q->key[0]) | (c->key[1] ^ q->key[1])) == 0) {
                *o++ = c->tokens[0];
                for (int i = 1; i < c->count; i++) *o++ = c->tokens[i];
                continue;
            }
            size_t n = merge_piece_(t, q->text, q->n, o, s);
            if (n <= 7) {
                *c = q->cached[0];                              // replaces the older of the two
                c = q->cached;
                c->key[0] = q->key[0], c->key[1] = q->key[1];
                c->count = (uint16_t)n;
                memcpy(c->tokens, o, n * sizeof *o);
            }
            o += n;
        }
    }
    return (size_t)(o - out);
}

// The same where <|endoftext|> in a text is that token, as in prompts and in other programs' counts of tokens.
LLMC_FN size_t tokenizer_encode_special(const Tokenizer *t, const void *text, size_t bytes, uint16_t *out,
                                        EncodeScratch *s) {
    static const char mark[] = "<|endoftext|>";
    const size_t length = sizeof mark - 1;
    const char *at = (const char *)text, *end = at + bytes;
    size_t n = 0;
    for (const char *c = at; (c = (const char *)memchr(c, '<', (size_t)(end - c))) != NULL; ) {
        if ((size_t)(end - c) < length || memcmp(c, mark, length) != 0) { c++; continue; }
        n += tokenizer_encode(t, at, (size_t)(c - at), out + n, s);
        out[n++] = (uint16_t)t->eot;
        at = c += length;
    }
    return n + tokenizer_encode(t, at, (size_t)(end - at), out + n, s);
}

// The last place where a text can be cut so that its parts encode to the tokens of the whole: before a blank, tab or
// line end that follows a character that is not white space. 0 if there is none. Byte-level text can be cut anywhere.
LLMC_FN size_t tokenizer_cut(const Tokenizer *t, const void *text, size_t bytes) {
    const unsigned char *c = (const unsigned char *)text;
    if (t->vocab_size == BYTES_VOCAB_SIZE) return bytes;
    for (size_t i = bytes; i-- > 1;) {
        if (c[i] != ' ' && c[i] != '\n' && c[i] != '\t' && c[i] != '\r') continue;
        size_t first = i - 1, length;                           // the first byte of the character before
        while (first > 0 && i - first < 4 && (c[first] & 0xC0) == 0x80) first--;
        if (char_at_(t, c + first, c + i, &length) != CLASS_SPACE) return i;
    }
    return 0;
}

#endif
