// The command line: one table describes every flag, and drives the parser, the checks, --help and the start-up banner.
#ifndef LLMC_FLAGS_H
#define LLMC_FLAGS_H

#include <getopt.h>
#include <math.h>
#include "utils.h"

typedef enum {
    FLAG_INT,       // int64_t; "524288"
    FLAG_REAL,      // double; "6e-4"
    FLAG_TEXT,      // const char *
    FLAG_SWITCH,    // int64_t 0 or 1; given alone it means 1, and a 0 or 1 may follow
    FLAG_SECTION    // a heading of --help
} FlagType;

typedef struct {
    char letter;                // short option, 0: none
    const char *name;           // long option
    FlagType type;
    void *value;                // where it goes
    const char *default_text;   // parsed like the user's text; NULL: *value stays as it is
    double min, max;            // accepted range, both included (numbers only)
    const char *help;           // one line: meaning, unit, what 0 does
    int given;                  // out: the user gave it
} Flag;
#define FLAGS_SECTION(help) {0, NULL, FLAG_SECTION, NULL, NULL, 0, 0, help, 0}

// Copies a program's table of n flags to out, which has room for `room`. Returns n.
LLMC_FN int flags_copy(Flag *out, int room, const Flag *table, int n) {
    if (n > room) die(EXIT_SYSTEM, "internal error: a table of %d flags, and room for %d", n, room);
    memcpy(out, table, (size_t)n * sizeof *table);
    return n;
}

// What a value must be, as words: "an integer from 1 to 65536".
LLMC_FN void flag_accepts_(const Flag *f, char *out, size_t size) {
    if (f->type == FLAG_TEXT) snprintf(out, size, "a text");
    else if (f->type == FLAG_SWITCH) snprintf(out, size, "0 or 1");
    else snprintf(out, size, "%s from %.10g to %.10g", f->type == FLAG_INT ? "an integer" : "a number", f->min, f->max);
}

LLMC_FN int flag_set(Flag *f, const char *text, Error *err) {
    char accepts[128], *end = NULL;
    flag_accepts_(f, accepts, sizeof accepts);
    if (!text || !*text) return fail(err, "--%s needs a value: %s", f->name, accepts);
    if (f->type == FLAG_TEXT) { *(const char **)f->value = text; return 0; }
    errno = 0;
    double number;
    int64_t integer = 0;
    if (f->type == FLAG_REAL) number = strtod(text, &end);
    else number = (double)(integer = strtoll(text, &end, 10));
    int space = text[0] == ' ' || text[0] == '\t' || text[0] == '\n';
    // ERANGE from strtod is also underflow, which the range check judges well enough
    if (space || end == text || *end || (errno == ERANGE && f->type != FLAG_REAL) || !isfinite(number) || number < f->min || number > f->max)
        return fail(err, "--%s: \"%s\" is not accepted; it takes %s", f->name, text, accepts);
    if (f->type == FLAG_REAL) *(double *)f->value = number;
    else *(int64_t *)f->value = integer;
    return 0;
}

LLMC_FN void flags_help(const char *head, const Flag *flags, int n) {
    puts(head);
    for (int i = 0; i < n; i++) {
        const Flag *f = &flags[i];
        if (f->type == FLAG_SECTION) { printf("%s\n", f->help); continue; }
        char name[64];
        if (f->letter) snprintf(name, sizeof name, "-%c --%s", f->letter, f->name);
        else snprintf(name, sizeof name, "   --%s", f->name);
        printf("  %-22s %s%s%s%s\n", name, f->help, f->default_text ? " (" : "", f->default_text ? f->default_text : "", f->default_text ? ")" : "");
    }
}

// Reads argv into the values of a table of n flags. --help prints the table under help_head and exits 0. Returns -1
// with an error that says which flag is wrong and what it accepts.
//
// first_argument is for programs that also take arguments, such as file names. Arguments and flags may be mixed; the
// arguments are then argv[*first_argument] to argv[argc - 1]. The value of a switch must be attached (--bytes=1), because
// the next word may be an argument. NULL: an argument is an error.
LLMC_FN int flags_parse_arguments(int argc, char **argv, const char *help_head, Flag *flags, int n, int *first_argument,
                                  Error *err) {
    struct option *options = (struct option *)xcalloc((size_t)n + 2, sizeof *options);
    char *letters = (char *)xcalloc(2 * (size_t)n + 4, 1), *l = letters;
    int count = 0, rc = 0, c, which = 0;
    if (!first_argument) *l++ = '+';        // stop at the first argument
    *l++ = ':', *l++ = 'h';
    options[count++] = (struct option){"help", no_argument, NULL, 'h'};
    for (int i = 0; i < n && rc == 0; i++) {
        Flag *f = &flags[i];
        if (f->type == FLAG_SECTION) continue;
        f->given = 0;
        if (f->type == FLAG_SWITCH) f->min = 0, f->max = 1;
        if (f->default_text && flag_set(f, f->default_text, err) != 0) rc = -1;
        options[count++] = (struct option){f->name, f->type == FLAG_SWITCH ? optional_argument : required_argument, NULL, 256 + i};
        if (f->letter) {
            *l++ = f->letter;
            if (f->type != FLAG_SWITCH) *l++ = ':';
        }
    }
    optind = 0, opterr = 0;     // 0: start afresh, so that tests can parse many lines
    while (rc == 0 && (c = getopt_long(argc, argv, letters, options, &which)) != -1) {
        if (c == 'h') {
            flags_help(help_head, flags, n);
            free(options), free(letters);
            exit(0);
        }
        Flag *f = NULL;
        int code = c == ':' ? optopt : c;
        for (int i = 0; i < n; i++)
            if (flags[i].type != FLAG_SECTION && (code == 256 + i || (flags[i].letter && code == flags[i].letter))) f = &flags[i];
        if (c == '?' || !f) {
            if (optopt && optopt < 256) rc = fail(err, "-%c: no such flag; --help lists them", optopt);
            else rc = fail(err, "%s: no such flag, or one letter too few; --help lists them", argv[optind - 1]);
            break;
        }
        const char *text = c == ':' ? NULL : optarg;
        if (f->type == FLAG_SWITCH && !text) {
            const char *next = !first_argument && optind < argc ? argv[optind] : NULL;
            text = next && (!strcmp(next, "0") || !strcmp(next, "1")) ? argv[optind++] : "1";
        }
        rc = flag_set(f, text, err);
        f->given = 1;
    }
    if (first_argument) *first_argument = optind;
    else if (rc == 0 && optind < argc) rc = fail(err, "%s: not a flag; every argument starts with - or --, see --help", argv[optind]);
    free(options);
    free(letters);
    return rc;
}

// The same for a program that takes only flags.
LLMC_FN int flags_parse(int argc, char **argv, const char *help_head, Flag *flags, int n, Error *err) {
    return flags_parse_arguments(argc, argv, help_head, flags, n, NULL, err);
}

#endif
