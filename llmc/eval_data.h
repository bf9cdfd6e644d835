// The rows of a data set, as JSON values, from a file of any form in which evaluation tasks are published:
//     .jsonl      an object per line                      .json   one array of objects
//     .csv        RFC 4180 without a heading: a row becomes an array of its fields
//     .parquet    read by DuckDB's program: an object of its columns
//     .lst        a label per line: a string
#ifndef LLMC_EVAL_DATA_H
#define LLMC_EVAL_DATA_H

#include <inttypes.h>
#include <sys/wait.h>

#include "json.h"

enum { MAX_EVAL_FILE_BYTES = 1 << 30 };

typedef struct {
    char *path;
    cJSON **row;
    int64_t n;
} EvalRows;

LLMC_FN void eval_rows_free(EvalRows *rows) {
    for (int64_t i = 0; i < rows->n; i++) cJSON_Delete(rows->row[i]);
    free(rows->row), free(rows->path);
    memset(rows, 0, sizeof *rows);
}

LLMC_FN void eval_rows_add_(EvalRows *rows, cJSON *row) {
    if ((rows->n & (rows->n - 1)) == 0)         // room for 1, 2, 4, 8 ... rows
        rows->row = (cJSON **)xrealloc(rows->row, (size_t)(rows->n ? 2 * rows->n : 1) * sizeof *rows->row);
    rows->row[rows->n++] = row;
}

// Ends the line that starts at text with a NUL, and sets its length. Returns where the next one starts.
LLMC_FN char *cut_line_(char *text, char *end, size_t *bytes) {
    char *newline = (char *)memchr(text, '\n', (size_t)(end - text)), *line_end = newline ? newline : end;
    *bytes = (size_t)(line_end - text);
    *line_end = 0;
    return newline ? newline + 1 : end;
}

LLMC_FN int eval_read_jsonl_(EvalRows *rows, char *text, char *end, Error *err) {
    while (text < end) {
        size_t bytes;
        char *next = cut_line_(text, end, &bytes), *where = xasprintf("%s: row %" PRId64, rows->path, rows->n + 1);
        cJSON *row = json_parse(text, bytes, where, err);
        free(where);
        if (!row) return -1;
        eval_rows_add_(rows, row);
        text = next;
    }
    return 0;
}

LLMC_FN int eval_read_labels_(EvalRows *rows, char *text, char *end) {
    while (text < end) {
        size_t bytes;
        char *next = cut_line_(text, end, &bytes);
        text[strcspn(text, "\r")] = 0;
        eval_rows_add_(rows, cJSON_CreateString(text));
        text = next;
    }
    return 0;
}

LLMC_FN int eval_read_json_(EvalRows *rows, const char *text, const char *end, Error *err) {
    cJSON *array = json_parse_kind(text, (size_t)(end - text), JSON_ARRAY, rows->path, err), *row;
    if (!array) return -1;
    while ((row = array->child) != NULL) eval_rows_add_(rows, cJSON_DetachItemViaPointer(array, row));
    cJSON_Delete(array);
    return 0;
}

// One field of a CSV row, unquoted in place, from text on. Returns what follows it: a comma, a line end or the end.
LLMC_FN char *csv_field_(char *text, char *end, char **field, size_t *bytes, const char **wrong) {
    char *out = text;
    *field = text;
    if (text < end && *text == '"') {
        for (text++; text < end; text++) {
            if (*text != '"') *out++ = *text;
            else if (text + 1 < end && text[1] == '"') *out++ = *text++;
            else break;
        }
        *bytes = (size_t)(out - *field);
        if (text == end) *wrong = "a quote is not closed";
        else if (++text < end && *text != ',' && *text != '\n' && *text != '\r')
            *wrong = "something follows a closing quote";
        return text;
    }
    while (text < end && *text != ',' && *text != '\n' && !(*text == '\r' && text + 1 < end && text[1] == '\n')) text++;
    *bytes = (size_t)(text - *field);
    return text;
}

LLMC_FN int eval_read_csv_(EvalRows *rows, char *text, char *end, Error *err) {
    while (text < end) {
        cJSON *row = cJSON_CreateArray();
        const char *wrong = NULL;
        int more = 1;
        while (more && !wrong) {
            char *field;
            size_t bytes;
            text = csv_field_(text, end, &field, &bytes, &wrong);
            more = text < end && *text == ',';
            if (text < end && *text == '\r') text++;
            if (text < end) text++;
            char *copy = (char *)xmalloc(bytes + 1);
            memcpy(copy, field, bytes);
            copy[bytes] = 0;
            if (strlen(copy) != bytes) wrong = "there is a zero byte";
            cJSON_AddItemToArray(row, cJSON_CreateString(copy));
            free(copy);
        }
        eval_rows_add_(rows, row);
        if (wrong) return fail(err, "%s: row %" PRId64 ": not CSV: %s; it is damaged", rows->path, rows->n, wrong);
    }
    return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Parquet

LLMC_FN int runs_(const char *program) {
    char *command = xasprintf("'%s' -version >/dev/null 2>&1", program);
    int ok = !strchr(program, '\'') && system(command) == 0;
    free(command);
    return ok;
}

// DuckDB's program: $DUCKDB, or where data/fineweb_edu.sh looks for it too. The caller frees the path.
LLMC_FN char *find_duckdb_(Error *err) {
    const char *named = getenv("DUCKDB"), *home = getenv("HOME");
    if (named && *named) {
        // it will run in another folder, so a path must be whole
        if (runs_(named)) return strchr(named, '/') ? realpath(named, NULL) : xasprintf("%s", named);
        fail(err, "DUCKDB=%.200s: this program does not run", named);
        return NULL;
    }
    char *places[] = {xasprintf("duckdb"), xasprintf("%s/.duckdb/cli/latest/duckdb", home ? home : ""),
                      realpath("data/duckdb/duckdb", NULL)}, *found = NULL;
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        if (!found && places[i] && runs_(places[i])) found = places[i];
        else free(places[i]);
    }
    if (!found)
        fail(err, "DuckDB's command-line program, which reads parquet files, is missing; pip has it (duckdb-cli); "
             "install it, or set DUCKDB to its path");
    return found;
}

// Runs DuckDB in a folder that has in.parquet, so that no folder or name is taken for a pattern or for columns. Its
// output goes to rows.jsonl, its errors to the file error. Returns its exit status.
LLMC_FN int run_duckdb_(const char *duckdb, const char *folder) {
    pid_t child = fork();
    if (child < 0) die(EXIT_SYSTEM, "cannot start %s: %s", duckdb, strerror(errno));
    if (child == 0) {
        int null = open("/dev/null", O_RDWR), errors = -1;
        if (chdir(folder) == 0) errors = open("error", O_WRONLY | O_CREAT | O_TRUNC, 0666);
        if (null < 0 || errors < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(errors, 2) < 0) _exit(127);
        execlp(duckdb, "duckdb", "-init", "/dev/null", "-c", "COPY (FROM read_parquet('in.parquet', "
               "binary_as_string = true)) TO 'rows.jsonl' (FORMAT json)", (char *)NULL);
        _exit(127);
    }
    int status = 0;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) continue;
    return status;
}

LLMC_FN int eval_read_parquet_(EvalRows *rows, Error *err) {
    char *duckdb = find_duckdb_(err), *file;
    if (!duckdb) die(EXIT_SYSTEM, "%s: %s", rows->path, err->text);
    file = realpath(rows->path, NULL);
    const char *temporary = getenv("TMPDIR");
    char *folder = xasprintf("%s/eval_t6_XXXXXX", temporary && *temporary ? temporary : "/tmp");
    if (!mkdtemp(folder)) die(EXIT_SYSTEM, "%s: cannot create this folder: %s", folder, strerror(errno));
    char *in = xasprintf("%s/in.parquet", folder), *out = xasprintf("%s/rows.jsonl", folder);
    char *error = xasprintf("%s/error", folder), *text = NULL;
    size_t bytes = 0;
    int rc = 0;
    Error unused;
    if (!file || symlink(file, in) != 0) rc = fail(err, "%s: cannot link to it: %s", rows->path, strerror(errno));
    else if (run_duckdb_(duckdb, folder) != 0) {
        text = read_small_file(error, 1 << 20, NULL, &unused);
        if (text) text[strcspn(text, "\n")] = 0;
        rc = fail(err, "%s: DuckDB: %.600s", rows->path, text && *text ? text : "failed");
    } else {
        text = read_small_file(out, MAX_EVAL_FILE_BYTES, &bytes, err);
        rc = text ? eval_read_jsonl_(rows, text, text + bytes, err) : -1;
    }
    unlink(in), unlink(out), unlink(error), rmdir(folder);
    free(text), free(error), free(out), free(in), free(folder), free(file), free(duckdb);
    return rc;
}

// ---------------------------------------------------------------------------------------------------------------------

// All rows of a file. Errors name the file and the row, counted from 1. No rows at all are an error.
LLMC_FN int eval_rows_read(EvalRows *rows, const char *path, Error *err) {
    memset(rows, 0, sizeof *rows);
    rows->path = xasprintf("%s", path);
    if (ends_with(path, ".parquet")) {
        if (eval_read_parquet_(rows, err) != 0) return -1;
    } else {
        size_t bytes;
        char *file = read_small_file(path, MAX_EVAL_FILE_BYTES, &bytes, err);
        if (!file) return -1;
        char *end = file + bytes, *text = bytes >= 3 && !memcmp(file, "\xEF\xBB\xBF", 3) ? file + 3 : file;
        int rc = ends_with(path, ".json") ? eval_read_json_(rows, text, end, err)
            : ends_with(path, ".csv") ? eval_read_csv_(rows, text, end, err)
            : ends_with(path, ".lst") ? eval_read_labels_(rows, text, end)
            : eval_read_jsonl_(rows, text, end, err);
        free(file);
        if (rc != 0) return -1;
    }
    if (rows->n == 0) return fail(err, "%s: has no rows", path);
    return 0;
}

#endif
