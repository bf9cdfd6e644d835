// The command line. One table describes every flag of a program; the parser, the range checks, --help and the page
// doc/flags.md (--help=markdown) all work from it.
#ifndef LLMC_FLAGS_H
#define LLMC_FLAGS_H

#include <getopt.h>
#include <math.h>
#include "utils.h"

typedef enum {
    FLAG_INT,       // int64_t; "524288"
    FLAG_REAL,      // double; "6e-4"
    FLAG_TEXT,      // const char *
    FLAG_SWITCH,    // int64_t, 0 or 1; the flag alone means 1
    FLAG_SECTION    // a heading of --help
} FlagType;

typedef struct {
    char letter;                // short option; 0: none
    const char *name;           // long option
    FlagType type;
    void *value;                // where the value is stored
    const char *default_text;   // parsed like the user's text; NULL: *value is left alone
    double min, max;            // accepted range, both ends included (numbers only)
    const char *help;           // one line: meaning, unit, what 0 does
    int given;                  // out: 1 if the flag was on the command line
} Flag;
#define FLAGS_SECTION(help) {0, NULL, FLAG_SECTION, NULL, NULL, 0, 0, help, 0}

// Copies a table of n flags to out, which has room for `room`. Returns n.
LLMC_FN int flags_copy(Flag *out, int room, const Flag *table, int n) {
    if (n > room) die(EXIT_SYSTEM, "internal error: a table of %d flags, and room for %d", n, room);
    memcpy(out, table, (size_t)n * sizeof *table);
    return n;
}

// The accepted values in words: "an integer from 1 to 65536".
LLMC_FN void flag_accepts_(const Flag *f, char *out, size_t size) {
    const char *number = f->type == FLAG_INT ? "an integer" : "a number";
    if (f->type == FLAG_TEXT) snprintf(out, size, "a string");
    else if (f->type == FLAG_SWITCH) snprintf(out, size, "0 or 1");
    else snprintf(out, size, "%s from %.10g to %.10g", number, f->min, f->max);
}

// Parses text into *f->value.
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
    // strtod reports underflow as ERANGE too: for a real number the range check decides
    int overflow = errno == ERANGE && f->type != FLAG_REAL;
    if (space || end == text || *end || overflow || !isfinite(number) || number < f->min || number > f->max)
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
        printf("  %-22s %s", name, f->help);
        if (f->default_text) printf(" (%s)", f->default_text);
        putchar('\n');
    }
}

// Prints a program's flags as one section of doc/flags.md: a table under each heading of --help.
LLMC_FN void flags_markdown_(const char *program, const char *head, const Flag *flags, int n) {
    const char *fence = strchr(head, '\n') ? "```\n" : "";
    int length = (int)strlen(head);
    while (length > 0 && head[length - 1] == '\n') length--;
    printf("## %s\n\n%s%.*s\n%s", program, fence, length, head, fence);
    for (int i = 0; i < n; i++) {
        const Flag *f = &flags[i];
        if (f->type == FLAG_SECTION) printf("\n### %s\n", f->help);
        if (f->type == FLAG_SECTION || i == 0) printf("\n| flag | what it does (default) | value |\n|---|---|---|\n");
        if (f->type == FLAG_SECTION) continue;
        char letter[] = {'-', f->letter, ' ', 0}, accepts[128];
        printf("| `%s--%s` | ", f->letter ? letter : "", f->name);
        for (const char *c = f->help; *c; c++) printf(strchr("|<*", *c) ? "\\%c" : "%c", *c);
        if (f->default_text) printf(" (`%s`)", f->default_text);
        flag_accepts_(f, accepts, sizeof accepts);
        printf(" | %s |\n", accepts);
    }
}

enum { FLAG_VERSION_ = 1 << 20 };       // getopt's code for --version; those of the table start at 256

// Whether the command line has --help or --version, which must work before anything is set up.
LLMC_FN int flags_asked_for_text(int argc, char **argv) {
    for (int i = 1; i < argc; i++)
        if (!strncmp(argv[i], "--help", 6) || !strcmp(argv[i], "-h") || !strcmp(argv[i], "--version")) return 1;
    return 0;
}

// Reads argv into the values of a table of n flags. --help prints the table under help_head, --version the commit that
// the program was built from; both exit 0. Returns -1 with an error that says which flag is wrong and what it accepts.
//
// first_argument is for programs that also take arguments, such as file names. Arguments and flags may be mixed; the
// arguments are then argv[*first_argument] to argv[argc - 1]. The value of a switch must be attached (--bytes=1),
// because the next word may be an argument. NULL: an argument is an error.
LLMC_FN int flags_parse_arguments(int argc, char **argv, const char *help_head, Flag *flags, int n, int *first_argument,
                                  Error *err) {
    struct option *options = (struct option *)xcalloc((size_t)n + 3, sizeof *options);
    char *letters = (char *)xcalloc(2 * (size_t)n + 4, 1), *l = letters;
    int count = 0, rc = 0, c, which = 0;
    if (!first_argument) *l++ = '+';        // stop at the first argument
    *l++ = ':', *l++ = 'h';
    options[count++] = (struct option){"help", optional_argument, NULL, 'h'};
    options[count++] = (struct option){"version", no_argument, NULL, FLAG_VERSION_};
    for (int i = 0; i < n && rc == 0; i++) {
        Flag *f = &flags[i];
        if (f->type == FLAG_SECTION) continue;
        f->given = 0;
        if (f->type == FLAG_SWITCH) f->min = 0, f->max = 1;
        if (f->default_text && flag_set(f, f->default_text, err) != 0) rc = -1;
        int argument = f->type == FLAG_SWITCH ? optional_argument : required_argument;
        options[count++] = (struct option){f->name, argument, NULL, 256 + i};
        if (f->letter) {
            *l++ = f->letter;
            if (f->type != FLAG_SWITCH) *l++ = ':';
        }
    }
    optind = 0, opterr = 0;     // optind 0 resets getopt: tests parse many command lines
    while (rc == 0 && (c = getopt_long(argc, argv, letters, options, &which)) != -1) {
        if (c == 'h') {
            int markdown = optarg && !strcmp(optarg, "markdown");
            if (optarg && !markdown) {
                rc = fail(err, "--help: \"%s\" is not accepted; it takes no value", optarg);
                break;
            }
            const char *slash = strrchr(argv[0], '/');
            if (markdown) flags_markdown_(slash ? slash + 1 : argv[0], help_head, flags, n);
            else flags_help(help_head, flags, n);
            free(options), free(letters);
            check_stdout();
            exit(0);
        }
        if (c == FLAG_VERSION_) {
            printf("%s, commit %s\n", program_name(), T6_COMMIT);
            free(options), free(letters);
            check_stdout();
            exit(0);
        }
        Flag *f = NULL;
        int code = c == ':' ? optopt : c;
        for (int i = 0; i < n; i++) {
            int same = code == 256 + i || (flags[i].letter && code == flags[i].letter);
            if (flags[i].type != FLAG_SECTION && same) f = &flags[i];
        }
        if (c == '?' || !f) {
            if (optopt && optopt < 256) rc = fail(err, "-%c: no such flag; --help lists the flags", optopt);
            else rc = fail(err, "%s: no such flag, or an ambiguous one; --help lists the flags", argv[optind - 1]);
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
    else if (rc == 0 && optind < argc)
        rc = fail(err, "\"%s\": not a flag (flags start with - or --; see --help)", argv[optind]);
    free(options);
    free(letters);
    return rc;
}

// The same for a program that takes only flags.
LLMC_FN int flags_parse(int argc, char **argv, const char *help_head, Flag *flags, int n, Error *err) {
    return flags_parse_arguments(argc, argv, help_head, flags, n, NULL, err);
}

#endif
