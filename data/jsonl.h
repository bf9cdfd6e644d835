// JSON Lines: gets the text out of a line such as {"text": "...", "id": 1}.
//
// A line must be one JSON object with exactly one "text" field at its top level, whose value is a string or null. The
// values of other fields are checked and skipped, up to JSONL_MAX_DEPTH levels deep. Everything must be strict JSON,
// with these exceptions for what real data holds:
//   * A line may start with a UTF-8 byte order mark, as where files were joined.
//   * Other fields may be NaN, Infinity or -Infinity, as Python writes them.
//   * Bytes of a string that are not UTF-8 are kept as they are.
//   * Half a surrogate pair ("\ud800") becomes U+FFFD, and the line is marked (lone_surrogate).
//
// Errors: jsonl_parse stops at the first one and returns JSONL_ERROR, with the place and the reason in the JsonLine.
//
// Memory: nothing is allocated. Escapes are replaced in place, so parsing changes the line, and the text is a part of
// it. A text may contain NUL bytes, from \u0000.
//
// A library such as cJSON would cut texts at U+0000, and would build a tree of values that no one reads.
#ifndef DATA_JSONL_H
#define DATA_JSONL_H

#include <stdbool.h>

#include "llmc/utils.h"

#define JSONL_MAX_DEPTH 100

typedef enum {
    JSONL_ERROR,
    JSONL_BLANK,                        // an empty line, or only white space
    JSONL_NULL,                         // the text is null
    JSONL_TEXT                          // the text is in text and text_bytes
} JsonlResult;

typedef struct {
    unsigned char *at, *end;            // what is not parsed yet; after an error, `at` is where it is
    const char *error;                  // what is wrong there
    unsigned char *text;                // (text_bytes)
    size_t text_bytes;
    bool has_text;                      // the text field has been seen
    bool lone_surrogate;                // the text has half a surrogate pair
} JsonLine;

// ---------------------------------------------------------------------------------------------------------------------
// Parts of a line. These functions move l->at past what they parse, and return 0, or -1 after an error.

LLMC_FN int jsonl_fail_(JsonLine *l, const char *error) {
    l->error = error;
    return -1;
}

LLMC_FN void jsonl_skip_blanks_(JsonLine *l) {
    while (l->at < l->end && (*l->at == ' ' || *l->at == '\t' || *l->at == '\r' || *l->at == '\n')) l->at++;
}

LLMC_FN int jsonl_skip_char_(JsonLine *l, char c, const char *error) {
    jsonl_skip_blanks_(l);
    if (l->at == l->end || *l->at != c) return jsonl_fail_(l, error);
    l->at++;
    return 0;
}

// Parses the four hex digits of \uXXXX. Does not move l->at.
LLMC_FN int jsonl_hex4_(const unsigned char *s, const unsigned char *end, uint32_t *value) {
    *value = 0;
    if (end - s < 4) return -1;
    for (int i = 0; i < 4; i++) {
        unsigned char c = s[i], lower = c | 0x20;
        if (c >= '0' && c <= '9') *value = *value << 4 | (uint32_t)(c - '0');
        else if (lower >= 'a' && lower <= 'f') *value = *value << 4 | (uint32_t)(lower - 'a' + 10);
        else return -1;
    }
    return 0;
}

// Writes code point c as UTF-8. Returns the end of what it wrote.
LLMC_FN unsigned char *jsonl_put_utf8_(unsigned char *out, uint32_t c) {
    if (c < 0x80) {
        *out++ = (unsigned char)c;
    } else if (c < 0x800) {
        *out++ = (unsigned char)(0xC0 | c >> 6);
        *out++ = (unsigned char)(0x80 | (c & 0x3F));
    } else {
        if (c < 0x10000) *out++ = (unsigned char)(0xE0 | c >> 12);
        else *out++ = (unsigned char)(0xF0 | c >> 18), *out++ = (unsigned char)(0x80 | (c >> 12 & 0x3F));
        *out++ = (unsigned char)(0x80 | (c >> 6 & 0x3F));
        *out++ = (unsigned char)(0x80 | (c & 0x3F));
    }
    return out;
}

// Parses an escape, from after its backslash.
LLMC_FN int jsonl_parse_escape_(JsonLine *l, unsigned char **out) {
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    uint32_t c, low;
    if (l->at == l->end) return jsonl_fail_(l, "the line ends within a string");
    const char *name = (const char *)memchr(names, *l->at, sizeof names - 1);
    if (name) {
        *(*out)++ = (unsigned char)values[name - names];
        l->at++;
        return 0;
    }
    if (*l->at != 'u' || jsonl_hex4_(l->at + 1, l->end, &c) != 0) return jsonl_fail_(l, "not a JSON escape");
    l->at += 5;
    bool high = c >= 0xD800 && c < 0xDC00, escape_follows = l->end - l->at >= 6 && l->at[0] == '\\' && l->at[1] == 'u';
    if (high && escape_follows && jsonl_hex4_(l->at + 2, l->end, &low) == 0 && low >= 0xDC00 && low < 0xE000) {
        c = 0x10000 + ((c - 0xD800) << 10) + (low - 0xDC00);
        l->at += 6;
    }
    if (c >= 0xD800 && c < 0xE000) c = 0xFFFD, l->lone_surrogate = true;
    *out = jsonl_put_utf8_(*out, c);
    return 0;
}

LLMC_FN int jsonl_parse_string_(JsonLine *l, unsigned char **string, size_t *bytes) {
    if (jsonl_skip_char_(l, '"', "expected a string") != 0) return -1;
    unsigned char *out = *string = l->at;
    for (;;) {
        // Copies eight bytes at a time, up to the first that is a quote, a backslash or below 0x20.
        const uint64_t ones = 0x0101010101010101ULL, high = ones << 7;
        for (uint64_t stop = 0, w; !stop && l->end - l->at >= 8;) {
            memcpy(&w, l->at, 8);
            uint64_t quote = w ^ ones * '"', slash = w ^ ones * '\\';
            stop = (((quote - ones) & ~quote) | ((slash - ones) & ~slash) | ((w - ones * 0x20) & ~w)) & high;
            size_t plain = stop ? (size_t)__builtin_ctzll(stop) / 8 : 8;
            memcpy(out, &w, plain);
            l->at += plain, out += plain;
        }
        if (l->at == l->end) return jsonl_fail_(l, "the line ends within a string");
        unsigned char c = *l->at;
        if (c < 0x20) return jsonl_fail_(l, "a control character within a string");
        l->at++;
        if (c == '"') break;
        if (c != '\\') *out++ = c;
        else if (jsonl_parse_escape_(l, &out) != 0) return -1;
    }
    *bytes = (size_t)(out - *string);
    return 0;
}

LLMC_FN int jsonl_skip_number_(JsonLine *l) {
    unsigned char *c = l->at, *end = l->end, *digits;
    if (c < end && *c == '-') c++;
    for (digits = c; c < end && *c >= '0' && *c <= '9';) c++;
    bool ok = c > digits && (*digits != '0' || c == digits + 1);
    if (c < end && *c == '.') {
        for (digits = ++c; c < end && *c >= '0' && *c <= '9';) c++;
        ok = ok && c > digits;
    }
    if (c < end && (*c == 'e' || *c == 'E')) {
        c++;
        if (c < end && (*c == '+' || *c == '-')) c++;
        for (digits = c; c < end && *c >= '0' && *c <= '9';) c++;
        ok = ok && c > digits;
    }
    if (!ok) return jsonl_fail_(l, "expected a value");
    l->at = c;
    return 0;
}

LLMC_FN int jsonl_skip_value_(JsonLine *l, int depth) {
    static const char *const words[] = {"true", "false", "null", "NaN", "Infinity", "-Infinity"};
    unsigned char *string;
    size_t bytes;
    jsonl_skip_blanks_(l);
    if (depth > JSONL_MAX_DEPTH) return jsonl_fail_(l, "nested too deep");
    if (l->at == l->end) return jsonl_fail_(l, "the line ends before a value");
    if (*l->at == '"') return jsonl_parse_string_(l, &string, &bytes);
    if (*l->at == '{' || *l->at == '[') {
        bool is_object = *l->at++ == '{';
        char close = is_object ? '}' : ']';
        jsonl_skip_blanks_(l);
        if (l->at < l->end && *l->at == close) return l->at++, 0;
        for (;;) {
            if (is_object && jsonl_parse_string_(l, &string, &bytes) != 0) return -1;
            if (is_object && jsonl_skip_char_(l, ':', "expected a colon") != 0) return -1;
            if (jsonl_skip_value_(l, depth + 1) != 0) return -1;
            jsonl_skip_blanks_(l);
            if (l->at < l->end && *l->at == ',') l->at++;
            else return jsonl_skip_char_(l, close, is_object ? "expected , or }" : "expected , or ]");
        }
    }
    for (int i = 0; i < 6; i++) {
        size_t n = strlen(words[i]);
        if ((size_t)(l->end - l->at) >= n && memcmp(l->at, words[i], n) == 0) return l->at += n, 0;
    }
    return jsonl_skip_number_(l);
}

LLMC_FN int jsonl_parse_text_(JsonLine *l) {
    if (l->has_text) return jsonl_fail_(l, "a second text field");
    l->has_text = true;
    l->lone_surrogate = false;
    if (l->at < l->end && *l->at == '"') return jsonl_parse_string_(l, &l->text, &l->text_bytes);
    if (l->end - l->at < 4 || memcmp(l->at, "null", 4) != 0)
        return jsonl_fail_(l, "the text field is neither a string nor null");
    l->at += 4;
    return 0;
}

// Parses "key": value, from the key on.
LLMC_FN int jsonl_parse_field_(JsonLine *l) {
    unsigned char *key;
    size_t key_bytes;
    if (jsonl_parse_string_(l, &key, &key_bytes) != 0 || jsonl_skip_char_(l, ':', "expected a colon") != 0) return -1;
    jsonl_skip_blanks_(l);
    if (key_bytes == 4 && memcmp(key, "text", 4) == 0) return jsonl_parse_text_(l);
    bool lone_surrogate = l->lone_surrogate;
    int rc = jsonl_skip_value_(l, 0);
    l->lone_surrogate = lone_surrogate;     // only the text's count
    return rc;
}

LLMC_FN int jsonl_parse_object_(JsonLine *l) {
    if (jsonl_skip_char_(l, '{', "expected a JSON object") != 0) return -1;
    jsonl_skip_blanks_(l);
    if (l->at < l->end && *l->at == '}') {
        l->at++;
    } else {
        for (bool more = true; more;) {
            if (jsonl_parse_field_(l) != 0) return -1;
            jsonl_skip_blanks_(l);
            more = l->at < l->end && *l->at == ',';
            if (more) l->at++;
        }
        if (jsonl_skip_char_(l, '}', "expected , or }") != 0) return -1;
    }
    jsonl_skip_blanks_(l);
    if (l->at != l->end) return jsonl_fail_(l, "something follows the JSON object");
    return l->has_text ? 0 : jsonl_fail_(l, "no text field");
}

// ---------------------------------------------------------------------------------------------------------------------

// Parses the line from `line` to `end`, its newline not included. Fills in *l, whatever it held.
LLMC_FN JsonlResult jsonl_parse(JsonLine *l, unsigned char *line, unsigned char *end) {
    memset(l, 0, sizeof *l);
    l->at = line, l->end = end;
    if (end - line >= 3 && memcmp(line, "\xEF\xBB\xBF", 3) == 0) l->at += 3;
    jsonl_skip_blanks_(l);
    if (l->at == end) return JSONL_BLANK;
    if (jsonl_parse_object_(l) != 0) return JSONL_ERROR;
    return l->text ? JSONL_TEXT : JSONL_NULL;
}

#endif
