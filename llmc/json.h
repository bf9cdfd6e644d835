// Reads JSON objects from files, strictly: the whole text is one object, and none of its keys is there twice. What
// cJSON alone accepts (a part that was cut off or overwritten by something else, two different values of one key)
// would otherwise go unnoticed.
#ifndef LLMC_JSON_H
#define LLMC_JSON_H

#include <cjson/cJSON.h>
#include <math.h>

#include "utils.h"

LLMC_FN int json_compare_keys_(const void *a, const void *b) {
    return strcmp((*(const cJSON *const *)a)->string, (*(const cJSON *const *)b)->string);
}

// A key that an object, or one within it, has twice; NULL: there is none.
LLMC_FN const char *json_repeated_key_(const cJSON *json) {
    const cJSON *item;
    const char *repeated = NULL;
    size_t n = cJSON_IsObject(json) ? (size_t)cJSON_GetArraySize(json) : 0, i = 0;
    const cJSON **sorted = (const cJSON **)xmalloc(n * sizeof *sorted);
    cJSON_ArrayForEach(item, json) {
        if (n > 0) sorted[i++] = item;
        if (!repeated && item->child) repeated = json_repeated_key_(item);
    }
    qsort(sorted, n, sizeof *sorted, json_compare_keys_);
    for (i = 1; i < n && !repeated; i++)
        if (!strcmp(sorted[i - 1]->string, sorted[i]->string)) repeated = sorted[i]->string;
    free(sorted);
    return repeated;
}

// The object, or with JSON_ARRAY the array, in a text of `bytes` bytes that a NUL follows: cJSON_ParseWithLength would
// need no NUL, but reads beyond the end before cJSON 1.7.18. `where` names the text in errors. Returns NULL with the
// reason in err if the text is anything else. The caller frees the value with cJSON_Delete.
typedef enum { JSON_OBJECT, JSON_ARRAY } JsonKind;
LLMC_FN cJSON *json_parse_kind(const char *text, size_t bytes, JsonKind kind, const char *where, Error *err) {
    const char *end = text, *repeated = NULL, *name = kind == JSON_ARRAY ? "array" : "object";
    size_t length = strlen(text);
    cJSON *json = length == bytes ? cJSON_ParseWithOpts(text, &end, 0) : NULL;
    size_t parsed = (size_t)(end - text), blanks = strspn(end, " \t\r\n");
    if (length != bytes) fail(err, "%s: not JSON: byte %zu is zero; it is damaged", where, length);
    else if (!json) fail(err, "%s: not JSON, from byte %zu on; it is damaged", where, parsed);
    else if (kind == JSON_ARRAY ? !cJSON_IsArray(json) : !cJSON_IsObject(json))
        fail(err, "%s: not a JSON %s; it is damaged", where, name);
    else if (parsed + blanks != bytes)
        fail(err, "%s: something follows its JSON %s, at byte %zu; it is damaged", where, name, parsed + blanks);
    else if ((repeated = json_repeated_key_(json)) != NULL)
        fail(err, "%s: \"%.60s\" is there twice; remove one", where, repeated);
    else return json;
    cJSON_Delete(json);
    return NULL;
}

LLMC_FN cJSON *json_parse(const char *text, size_t bytes, const char *where, Error *err) {
    return json_parse_kind(text, bytes, JSON_OBJECT, where, err);
}

// The object in a file of at most max_bytes.
LLMC_FN cJSON *json_read(const char *path, size_t max_bytes, Error *err) {
    size_t bytes = 0;
    char *text = read_small_file(path, max_bytes, &bytes, err);
    cJSON *json = text ? json_parse(text, bytes, path, err) : NULL;
    free(text);
    return json;
}

// Whether a value (NULL: a missing one) is a whole number from min to max.
LLMC_FN int json_is_integer(const cJSON *item, double min, double max) {
    return cJSON_IsNumber(item) && item->valuedouble >= min && item->valuedouble <= max &&
           item->valuedouble == floor(item->valuedouble);
}

#endif
