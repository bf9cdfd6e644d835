// The nine tasks of the paper, as lm-evaluation-harness 0.4.13 builds them: from the rows of their files to documents
// (a text and its choices), and from those to prompts with few-shot examples. Reading order:
//     texts | documents | the table of tasks | loading a task | few-shot examples | prompts
//
// "Blank" is one of Python's white space characters, and a character is a code point.
#ifndef LLMC_EVAL_TASKS_H
#define LLMC_EVAL_TASKS_H

#include <utf8proc.h>

#include "eval_data.h"
#include "python_random.h"

// ---------------------------------------------------------------------------------------------------------------------
// Texts

typedef struct { char *s; size_t bytes, room; } Text;

LLMC_FN void text_add_bytes(Text *t, const char *s, size_t bytes) {
    if (t->bytes + bytes + 1 > t->room) t->s = (char *)xrealloc(t->s, t->room = 2 * (t->bytes + bytes) + 64);
    memcpy(t->s + t->bytes, s, bytes);
    t->s[t->bytes += bytes] = 0;
}
LLMC_FN void text_add(Text *t, const char *s) { text_add_bytes(t, s, strlen(s)); }
LLMC_FN Text text_empty(void) {
    Text t = {NULL, 0, 0};
    text_add(&t, "");
    return t;
}

LLMC_FN int is_blank_(int32_t c) {
    return (c >= 9 && c <= 13) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

// The character at s, in a string of `bytes` bytes, and its length. A byte that is not UTF-8 is a character of its own.
LLMC_FN int32_t character_(const char *s, size_t bytes, size_t *length) {
    utf8proc_int32_t c;
    utf8proc_ssize_t n = utf8proc_iterate((const utf8proc_uint8_t *)s, (utf8proc_ssize_t)bytes, &c);
    *length = n > 0 ? (size_t)n : 1;
    return n > 0 ? c : -1;
}

LLMC_FN int64_t count_characters(const char *s) {
    int64_t n = 0;
    for (size_t length, left = strlen(s); left > 0; s += length, left -= length, n++) character_(s, left, &length);
    return n;
}

// What is left of s without the blanks at its start.
LLMC_FN const char *left_strip(const char *s) {
    for (size_t length; *s && is_blank_(character_(s, strlen(s), &length)); s += length) continue;
    return s;
}

// The length of s without the blanks at its end.
LLMC_FN size_t right_strip(const char *s) {
    size_t end = 0, length;
    for (size_t at = 0, bytes = strlen(s); at < bytes; at += length)
        if (!is_blank_(character_(s + at, bytes - at, &length))) end = at + length;
    return end;
}

LLMC_FN char *strip(const char *s) {
    s = left_strip(s);
    return xasprintf("%.*s", (int)right_strip(s), s);
}

LLMC_FN char *replace_all_(const char *s, const char *what, const char *with) {
    Text t = text_empty();
    for (const char *found; (found = strstr(s, what)) != NULL; s = found + strlen(what)) {
        text_add_bytes(&t, s, (size_t)(found - s));
        text_add(&t, with);
    }
    text_add(&t, s);
    return t.s;
}

// Removes "[...]", from each "[" to the next "]" of the same line.
LLMC_FN char *remove_brackets_(const char *s) {
    Text t = text_empty();
    while (*s) {
        const char *close = *s == '[' ? strpbrk(s, "]\n") : NULL;
        if (close && *close == ']') s = close + 1;
        else text_add_bytes(&t, s++, 1);
    }
    return t.s;
}

// HellaSwag's texts come from WikiHow and ActivityNet, with markup.
LLMC_FN char *tidy_(const char *s) {
    char *stripped = strip(s), *titles = replace_all_(stripped, " [title]", ". "), *plain = remove_brackets_(titles);
    char *single = replace_all_(plain, "  ", " ");
    free(stripped), free(titles), free(plain);
    return single;
}

// Python's capitalize(): the first character in title case, all others in lower case.
LLMC_FN char *capitalize_(const char *s) {
    Text t = text_empty();
    for (size_t length, left = strlen(s), first = 1; left > 0; s += length, left -= length, first = 0) {
        int32_t c = character_(s, left, &length);
        utf8proc_uint8_t out[4];
        if (c < 0) text_add_bytes(&t, s, length);
        else if (first && c == 0xDF) text_add(&t, "Ss");                // sharp s, the common one of those that
        else if (!first && c == 0x130) text_add(&t, "i\xCC\x87");       // become two characters; dotted I
        else text_add_bytes(&t, (char *)out, (size_t)utf8proc_encode_char(
                                first ? utf8proc_totitle(c) : utf8proc_tolower(c), out));
    }
    return t.s;
}

// ---------------------------------------------------------------------------------------------------------------------
// Documents

typedef struct {
    char *text;                 // what stands before a choice; WinoGrande: NULL, the choices themselves are contexts
    char *tail;                 // WinoGrande: what follows each choice; else NULL
    char **choices;
    int num_choices, gold;
    char *identity;             // equal for equal rows; NULL where the task does not compare them
} Document;

LLMC_FN void document_free(Document *d) {
    for (int i = 0; i < d->num_choices; i++) free(d->choices[i]);
    free(d->choices), free(d->text), free(d->tail), free(d->identity);
    memset(d, 0, sizeof *d);
}

LLMC_FN void document_choice_(Document *d, char *choice) {
    d->choices = (char **)xrealloc(d->choices, ((size_t)d->num_choices + 1) * sizeof *d->choices);
    d->choices[d->num_choices++] = choice;
}

// Adds a column to a document's identity, with its length, so that no two rows run together alike.
LLMC_FN void document_identify_(Document *d, const char *column) {
    char *old = d->identity;
    d->identity = xasprintf("%s%zu:%s", old ? old : "", strlen(column), column);
    free(old);
}

// A row's value by its column. An error lists the columns that the row has.
LLMC_FN const cJSON *column_(const cJSON *row, const char *name, Error *err) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(row, name), *other;
    if (item) return item;
    Text t = text_empty();
    cJSON_ArrayForEach(other, row) {
        if (t.bytes) text_add(&t, ", ");
        text_add(&t, other->string ? other->string : "?");
    }
    fail(err, "there is no column %s; it has %.300s", name, t.bytes ? t.s : "none");
    free(t.s);
    return NULL;
}

LLMC_FN const char *string_column_(const cJSON *row, const char *name, Error *err) {
    const cJSON *item = column_(row, name, err);
    if (item && cJSON_IsString(item)) return item->valuestring;
    if (item) fail(err, "its %s is not a text", name);
    return NULL;
}

// A whole number from 0 to max, as a number or in digits; -1 with an error for anything else.
LLMC_FN int label_(const cJSON *item, int max, const char *name, Error *err) {
    int value = -1;
    if (cJSON_IsBool(item)) value = cJSON_IsTrue(item);
    else if (json_is_integer(item, 0, 99)) value = (int)item->valuedouble;
    else if (cJSON_IsString(item) && item->valuestring[0] && strspn(item->valuestring, "0123456789") ==
             strlen(item->valuestring) && strlen(item->valuestring) < 3) value = atoi(item->valuestring);
    if (value >= 0 && value <= max) return value;
    char *text = cJSON_PrintUnformatted(item);
    fail(err, "its %s is %.40s, and not a label from 0 to %d; rows without labels cannot be scored", name,
         text ? text : "?", max);
    free(text);
    return -1;
}
LLMC_FN int label_column_(const cJSON *row, const char *name, int max, Error *err) {
    const cJSON *item = column_(row, name, err);
    return item ? label_(item, max, name, err) : -1;
}

// Choices with labels, [{"text": T, "label": L}, ...] in releases and {"text": [...], "label": [...]} on the hub; gold
// is the one labelled key.
LLMC_FN int labelled_choices_(Document *d, const cJSON *choices, const char *key, Error *err) {
    const cJSON *texts = cJSON_GetObjectItemCaseSensitive(choices, "text"), *item;
    const cJSON *labels = cJSON_GetObjectItemCaseSensitive(choices, "label");
    int by_columns = cJSON_IsObject(choices), n = cJSON_GetArraySize(by_columns ? texts : choices);
    if (by_columns && cJSON_GetArraySize(labels) != n) return fail(err, "it has %d choices and %d labels", n,
                                                                   cJSON_GetArraySize(labels));
    d->gold = -1;
    for (int i = 0; i < n; i++) {
        item = by_columns ? NULL : cJSON_GetArrayItem(choices, i);
        const cJSON *text = item ? cJSON_GetObjectItemCaseSensitive(item, "text") : cJSON_GetArrayItem(texts, i);
        const cJSON *label = item ? cJSON_GetObjectItemCaseSensitive(item, "label") : cJSON_GetArrayItem(labels, i);
        if (!cJSON_IsString(text) || !cJSON_IsString(label))
            return fail(err, "its choice %d lacks a text or a label", i + 1);
        document_choice_(d, xasprintf("%s", text->valuestring));
        if (d->gold < 0 && !strcmp(label->valuestring, key)) d->gold = i;
    }
    if (n < 1) return fail(err, "it has no choices");
    if (d->gold < 0) return fail(err, "its answerKey \"%.40s\" is none of its labels", key);
    return 0;
}

// ARC and OpenBookQA, in their release (question is an object) or on the hub. stem: the hub's column of the question.
LLMC_FN int read_question_(Document *d, const cJSON *row, const char *stem, const char **question, Error *err) {
    const cJSON *object = cJSON_GetObjectItemCaseSensitive(row, "question"), *from = cJSON_IsObject(object) ? object
        : row;
    *question = string_column_(from, cJSON_IsObject(object) ? "stem" : stem, err);
    const cJSON *choices = *question ? column_(from, "choices", err) : NULL;
    const char *key = choices ? string_column_(row, "answerKey", err) : NULL;
    return key ? labelled_choices_(d, choices, !strcmp(stem, "question") ? key : left_strip(key), err) : -1;
}

LLMC_FN int read_arc_(Document *d, const cJSON *row, int64_t index, const char *subject, Error *err) {
    const char *question;
    (void)index, (void)subject;
    if (read_question_(d, row, "question", &question, err) != 0) return -1;
    d->text = xasprintf("Question: %s\nAnswer:", question);
    return 0;
}

LLMC_FN int read_openbookqa_(Document *d, const cJSON *row, int64_t index, const char *subject, Error *err) {
    const char *question;
    (void)index, (void)subject;
    if (read_question_(d, row, "question_stem", &question, err) != 0) return -1;
    d->text = xasprintf("%s", question);
    return 0;
}

LLMC_FN int read_sciq_(Document *d, const cJSON *row, int64_t index, const char *subject, Error *err) {
    static const char *const columns[] = {"distractor1", "distractor2", "distractor3", "correct_answer"};
    (void)index, (void)subject;
    const char *question = string_column_(row, "question", err);
    const char *support = question ? string_column_(row, "support", err) : NULL;
    if (!support) return -1;
    d->text = xasprintf("%s\nQuestion: %s\nAnswer:", left_strip(support), question);
    for (int i = 0; i < 4; i++) {
        const char *choice = string_column_(row, columns[i], err);
        if (!choice) return -1;
        document_choice_(d, xasprintf("%s", choice));
    }
    d->gold = 3;
    return 0;
}

// Google's rows have a title and an answer; SuperGLUE's, in its release and on the hub, have the title in the passage,
// a label and idx, the number of the row.
LLMC_FN int read_boolq_(Document *d, const cJSON *row, int64_t index, const char *subject, Error *err) {
    (void)subject;
    const cJSON *title = cJSON_GetObjectItemCaseSensitive(row, "title");
    const cJSON *idx = cJSON_GetObjectItemCaseSensitive(row, "idx");
    const char *question = string_column_(row, "question", err);
    const char *passage = question ? string_column_(row, "passage", err) : NULL;
    if (!passage) return -1;
    d->gold = label_column_(row, title ? "answer" : "label", 1, err);
    if (d->gold < 0) return -1;
    if (title && !cJSON_IsString(title)) return fail(err, "its title is not a text");
    char *whole = title ? xasprintf("%s -- %s", title->valuestring, passage) : xasprintf("%s", passage);
    char *number = xasprintf("%.0f %d", cJSON_IsNumber(idx) ? idx->valuedouble : (double)index, d->gold);
    d->text = xasprintf("%s\nQuestion: %s?\nAnswer:", whole, question);
    document_choice_(d, xasprintf("no")), document_choice_(d, xasprintf("yes"));
    document_identify_(d, question), document_identify_(d, whole), document_identify_(d, number);
    free(whole), free(number);
    return 0;
}

LLMC_FN int read_piqa_(Document *d, const cJSON *row, int64_t index, const char *subject, Error *err) {
    (void)index, (void)subject;
    const char *goal = string_column_(row, "goal", err), *first = goal ? string_column_(row, "sol1", err) : NULL;
    const char *second = first ? string_column_(row, "sol2", err) : NULL;
    d->gold = second ? label_column_(row, "label", 1, err) : -1;
    if (d->gold < 0) return -1;
    d->text = xasprintf("Question: %s\nAnswer:", goal);
    document_choice_(d, xasprintf("%s", first)), document_choice_(d, xasprintf("%s", second));
    document_identify_(d, goal), document_identify_(d, first), document_identify_(d, second);
    document_identify_(d, d->gold ? "1" : "0");
    return 0;
}

LLMC_FN int read_winogrande_(Document *d, const cJSON *row, int64_t index, const char *subject, Error *err) {
    (void)index, (void)subject;
    const char *sentence = string_column_(row, "sentence", err);
    const char *first = sentence ? string_column_(row, "option1", err) : NULL;
    const char *second = first ? string_column_(row, "option2", err) : NULL;
    const char *answer = second ? string_column_(row, "answer", err) : NULL;
    if (!answer) return -1;
    const char *gap = strchr(sentence, '_');
    if (!gap) return fail(err, "its sentence has no _");
    if (strcmp(answer, "1") && strcmp(answer, "2"))
        return fail(err, "its answer is \"%.40s\" instead of 1 or 2; rows without answers cannot be scored", answer);
    d->gold = answer[0] - '1';
    d->tail = strip(gap + 1);
    document_choice_(d, xasprintf("%.*s%s", (int)(gap - sentence), sentence, first));
    document_choice_(d, xasprintf("%.*s%s", (int)(gap - sentence), sentence, second));
    document_identify_(d, sentence), document_identify_(d, first), document_identify_(d, second);
    document_identify_(d, answer);
    return 0;
}

LLMC_FN int read_hellaswag_(Document *d, const cJSON *row, int64_t index, const char *subject, Error *err) {
    static const char *const compared[] = {"ind", "ctx", "split", "split_type", "source_id"};
    (void)index, (void)subject;
    const char *activity = string_column_(row, "activity_label", err);
    const char *a = activity ? string_column_(row, "ctx_a", err) : NULL, *b = a ? string_column_(row, "ctx_b", err)
        : NULL;
    const cJSON *endings = b ? column_(row, "endings", err) : NULL, *ending;
    if (!endings) return -1;
    if (!cJSON_IsArray(endings) || !endings->child) return fail(err, "its endings are not a list of texts");
    char *upper = capitalize_(b), *text = xasprintf("%s: %s %s", activity, a, upper);
    d->text = tidy_(text);
    free(upper), free(text);
    document_identify_(d, activity), document_identify_(d, a), document_identify_(d, b);
    cJSON_ArrayForEach(ending, endings) {
        if (!cJSON_IsString(ending)) return fail(err, "its endings are not a list of texts");
        document_choice_(d, tidy_(ending->valuestring));
        document_identify_(d, ending->valuestring);
    }
    d->gold = label_column_(row, "label", d->num_choices - 1, err);
    if (d->gold < 0) return -1;
    for (size_t i = 0; i < sizeof compared / sizeof *compared; i++) {
        const cJSON *item = cJSON_GetObjectItemCaseSensitive(row, compared[i]);
        char *value = item ? cJSON_PrintUnformatted(item) : NULL;
        document_identify_(d, value ? value : "");
        free(value);
    }
    char *gold = xasprintf("%d", d->gold);
    document_identify_(d, gold);
    free(gold);
    return 0;
}

// A row of CSV is a list: question, four choices, the answer's letter. The hub's answer is a number.
LLMC_FN int read_mmlu_(Document *d, const cJSON *row, int64_t index, const char *subject, Error *err) {
    (void)index, (void)subject;
    int is_csv = cJSON_IsArray(row), fields = cJSON_GetArraySize(row);
    if (is_csv && fields != 6) return fail(err, "it has %d fields instead of 6", fields);
    const char *question = is_csv ? row->child->valuestring : string_column_(row, "question", err);
    const cJSON *choices = is_csv ? row : question ? column_(row, "choices", err) : NULL;
    if (!choices) return -1;
    const char *choice[4];
    if (!is_csv && cJSON_GetArraySize(choices) != 4) return fail(err, "its choices are not a list of four texts");
    for (int i = 0; i < 4; i++) {
        const cJSON *item = cJSON_GetArrayItem(choices, i + is_csv);
        if (!cJSON_IsString(item)) return fail(err, "its choices are not a list of four texts");
        choice[i] = item->valuestring;
        document_choice_(d, xasprintf("%c", 'A' + i));
    }
    if (is_csv) {
        const char *letter = cJSON_GetArrayItem(row, 5)->valuestring;
        if (letter[0] < 'A' || letter[0] > 'D' || letter[1])
            return fail(err, "its answer is \"%.40s\" instead of a letter from A to D", letter);
        d->gold = letter[0] - 'A';
    } else d->gold = label_column_(row, "answer", 3, err);
    if (d->gold < 0) return -1;
    char *stripped = strip(question);
    d->text = xasprintf("%s\nA. %s\nB. %s\nC. %s\nD. %s\nAnswer:", stripped, choice[0], choice[1], choice[2],
                        choice[3]);
    free(stripped);
    return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// The table of tasks

// How few-shot rows are chosen: SAMPLE_KEEP draws k of the train file; SAMPLE_OTHERS draws k + 1 and drops those that
// equal the tested row; FIRST_ROWS takes the first k.
typedef enum { SAMPLE_KEEP, SAMPLE_OTHERS, FIRST_ROWS } ShotRule;
typedef enum { METRIC_ACC, METRIC_ACC_NORM } PaperMetric;

// One of the forms in which a task's files are published, in the task's folder; %s is MMLU's subject.
typedef struct { const char *test, *train, *test_labels, *train_labels; } TaskFiles;
enum { MAX_TASK_FORMS = 3 };

typedef struct {
    const char *name, *title;   // title: in the table of scores
    PaperMetric metric;
    ShotRule shots;
    int is_normed;              // it has acc_norm and acc_bytes
    int (*read)(Document *d, const cJSON *row, int64_t index, const char *subject, Error *err);
    TaskFiles files[MAX_TASK_FORMS];    // the first that is there is taken
} Task;

#define RELEASE_FILES(test, train) {test, train, NULL, NULL}
#define HUB_FILES(config, test, train) \
    {"hub/" config "/" test "-00000-of-00001.parquet", "hub/" config "/" train "-00000-of-00001.parquet", NULL, NULL}

enum { NUM_TASKS = 9, MMLU_TASK = 7 };
// Task i, 0 <= i < NUM_TASKS, in the order of the paper's tables.
LLMC_FN const Task *eval_task(int i) {
    static const Task tasks[NUM_TASKS] = {
        {"arc_easy", "ARC-E", METRIC_ACC_NORM, SAMPLE_KEEP, 1, read_arc_,
         {RELEASE_FILES("ARC-Easy/ARC-Easy-Test.jsonl", "ARC-Easy/ARC-Easy-Train.jsonl"),
          HUB_FILES("ARC-Easy", "test", "train")}},
        {"arc_challenge", "ARC-C", METRIC_ACC_NORM, SAMPLE_KEEP, 1, read_arc_,
         {RELEASE_FILES("ARC-Challenge/ARC-Challenge-Test.jsonl", "ARC-Challenge/ARC-Challenge-Train.jsonl"),
          HUB_FILES("ARC-Challenge", "test", "train")}},
        {"boolq", "BoolQ", METRIC_ACC, SAMPLE_OTHERS, 0, read_boolq_,
         {RELEASE_FILES("google/dev.jsonl", "google/train.jsonl"),
          RELEASE_FILES("superglue/val.jsonl", "superglue/train.jsonl"), HUB_FILES("boolq", "validation", "train")}},
        {"hellaswag", "HellaSw.", METRIC_ACC_NORM, SAMPLE_OTHERS, 1, read_hellaswag_,
         {RELEASE_FILES("hellaswag_val.jsonl", "hellaswag_train.jsonl"), HUB_FILES("data", "validation", "train")}},
        {"openbookqa", "OBQA", METRIC_ACC_NORM, SAMPLE_KEEP, 1, read_openbookqa_,
         {RELEASE_FILES("test.jsonl", "train.jsonl"), RELEASE_FILES("Main/test.jsonl", "Main/train.jsonl"),
          HUB_FILES("main", "test", "train")}},
        {"piqa", "PIQA", METRIC_ACC_NORM, SAMPLE_OTHERS, 1, read_piqa_,
         {{"valid.jsonl", "train.jsonl", "valid-labels.lst", "train-labels.lst"},
          {"dev.jsonl", "train.jsonl", "dev-labels.lst", "train-labels.lst"},
          HUB_FILES("data", "validation", "train")}},
        {"winogrande", "WinoG.", METRIC_ACC, SAMPLE_OTHERS, 0, read_winogrande_,
         {RELEASE_FILES("dev.jsonl", "train_xl.jsonl"), HUB_FILES("winogrande_xl", "validation", "train")}},
        {"mmlu", "MMLU", METRIC_ACC, FIRST_ROWS, 0, read_mmlu_,
         {RELEASE_FILES("data/test/%s_test.csv", "data/dev/%s_dev.csv"), HUB_FILES("%s", "test", "dev")}},
        {"sciq", "SciQ", METRIC_ACC_NORM, SAMPLE_KEEP, 1, read_sciq_,
         {RELEASE_FILES("test.json", "train.json"), HUB_FILES("data", "test", "train")}},
    };
    return &tasks[i];
}

enum { NUM_MMLU_GROUPS = 4 };
typedef struct { const char *name, *subjects; } MmluGroup;
LLMC_FN const MmluGroup *mmlu_group(int i) {
    static const MmluGroup groups[NUM_MMLU_GROUPS] = {
        {"stem", "abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science "
         "college_mathematics college_physics computer_security conceptual_physics electrical_engineering "
         "elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science "
         "high_school_mathematics high_school_physics high_school_statistics machine_learning"},
        {"other", "business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing "
         "medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology"},
        {"social_sciences", "econometrics high_school_geography high_school_government_and_politics "
         "high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality "
         "professional_psychology public_relations security_studies sociology us_foreign_policy"},
        {"humanities", "formal_logic high_school_european_history high_school_us_history high_school_world_history "
         "international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory "
         "professional_law world_religions"},
    };
    return &groups[i];
}

// ---------------------------------------------------------------------------------------------------------------------
// Loading a task, or one subject of MMLU

typedef struct { char *path; Document *list; int64_t n; } Documents;

typedef struct {
    const Task *task;
    char *name;                 // arc_easy, mmlu_astronomy
    char *subject;              // of MMLU; else NULL
    int group;                  // mmlu_group(group); else -1
    Documents test, train;
    int64_t k;                  // few-shot examples per document
    int64_t *shots;             // (test.n, k) rows of the train file
} TaskData;

LLMC_FN void documents_free_(Documents *d) {
    for (int64_t i = 0; i < d->n; i++) document_free(&d->list[i]);
    free(d->list), free(d->path);
    memset(d, 0, sizeof *d);
}

LLMC_FN void task_data_free(TaskData *t) {
    documents_free_(&t->test), documents_free_(&t->train);
    free(t->name), free(t->subject), free(t->shots);
    memset(t, 0, sizeof *t);
}

// FOLDER/TASK/file, with MMLU's subject put in.
LLMC_FN char *task_path(const TaskData *t, const char *folder, const char *file) {
    const char *gap = strstr(file, "%s");
    if (!gap) return xasprintf("%s/%s/%s", folder, t->task->name, file);
    return xasprintf("%s/%s/%.*s%s%s", folder, t->task->name, (int)(gap - file), file, t->subject, gap + 2);
}

LLMC_FN int task_has_(const TaskData *t, const char *folder, const char *file) {
    char *path = task_path(t, folder, file);
    int there = access(path, F_OK) == 0;
    free(path);
    return there;
}

// The form of the task's files that is there: the first with all that is needed, else the first with tested rows; NULL
// where there is none.
LLMC_FN const TaskFiles *task_files(const TaskData *t, const char *folder, int64_t k) {
    const TaskFiles *found = NULL;
    for (int i = MAX_TASK_FORMS - 1; i >= 0; i--) {
        const TaskFiles *f = &t->task->files[i];
        if (f->test && task_has_(t, folder, f->test) && (!found || k == 0 || task_has_(t, folder, f->train))) found = f;
    }
    return found;
}

// The first `limit` rows of a file (0: all) as documents. labels: the file of their labels, or NULL.
LLMC_FN int documents_read_(Documents *out, const TaskData *t, const char *folder, const char *file,
                            const char *labels, int64_t limit, Error *err) {
    EvalRows rows, label_rows = {NULL, NULL, 0};
    Error why;
    out->path = task_path(t, folder, file);
    int rc = eval_rows_read(&rows, out->path, err);
    if (rc == 0 && labels) {
        char *path = task_path(t, folder, labels);
        rc = eval_rows_read(&label_rows, path, err);
        free(path);
        if (rc == 0 && label_rows.n != rows.n)
            rc = fail(err, "%s: has %" PRId64 " labels for the %" PRId64 " rows of %s", label_rows.path, label_rows.n,
                      rows.n, out->path);
    }
    int64_t n = limit > 0 && limit < rows.n ? limit : rows.n;
    out->list = (Document *)xcalloc((size_t)n, sizeof *out->list);
    for (int64_t i = 0; i < n && rc == 0; i++) {
        cJSON *row = rows.row[i];
        if (labels) {
            cJSON_DeleteItemFromObjectCaseSensitive(row, "label");
            cJSON_AddItemToObject(row, "label", label_rows.row[i]);
            label_rows.row[i] = NULL;
        }
        out->n = i + 1;
        if (t->task->read(&out->list[i], row, i, t->subject, &why) != 0)
            rc = fail(err, "%s: row %" PRId64 ": %s", out->path, i + 1, why.text);
    }
    eval_rows_free(&rows), eval_rows_free(&label_rows);
    return rc;
}

// ---------------------------------------------------------------------------------------------------------------------
// Few-shot examples. Each run of a task has a generator of its own, and its rows draw in the order of the file.

// Those of n rows of the train file that do not equal d, in order: out (n). rows NULL: the first n. Returns how many
// there are.
LLMC_FN int64_t other_rows_(const Document *d, const Documents *train, const int64_t *rows, int64_t n, int64_t *out) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t row = rows ? rows[i] : i;
        if (strcmp(d->identity, train->list[row].identity)) out[count++] = row;
    }
    return count;
}

// The k rows that row d gets, SAMPLE_OTHERS. others (train->n) is scratch.
LLMC_FN int draw_others_(PythonRandom *r, const Document *d, const Documents *train, int64_t k, int64_t *shots,
                         int64_t *others, Error *err) {
    int64_t *drawn = (int64_t *)xmalloc((size_t)(k + 1) * sizeof *drawn);
    python_random_sample(r, train->n, k + 1, drawn);
    int64_t left = other_rows_(d, train, drawn, k + 1, others);
    if (left < k) {
        left = other_rows_(d, train, NULL, train->n, others);
        if (left >= k) {
            python_random_sample(r, left, k, drawn);
            for (int64_t i = 0; i < k; i++) drawn[i] = others[drawn[i]];
            memcpy(others, drawn, (size_t)k * sizeof *others);
        }
    }
    if (left >= k) memcpy(shots, others, (size_t)k * sizeof *shots);
    free(drawn);
    return left >= k ? 0 : fail(err, "%s: only %" PRId64 " rows differ from a tested one; --shots %" PRId64
                                " needs more", train->path, left, k);
}

LLMC_FN int draw_shots_(TaskData *t, Error *err) {
    int64_t k = t->k, P = t->train.n, need = k + (t->task->shots == SAMPLE_OTHERS);
    if (P < need)
        return fail(err, "%s: has %" PRId64 " rows, and --shots %" PRId64 " needs %" PRId64, t->train.path, P, k, need);
    PythonRandom r;
    python_random_seed(&r, 1234);
    int64_t *others = (int64_t *)xmalloc((size_t)P * sizeof *others);
    t->shots = (int64_t *)xmalloc((size_t)(t->test.n * k) * sizeof *t->shots);
    int rc = 0;
    for (int64_t i = 0; i < t->test.n && rc == 0; i++) {
        int64_t *shots = t->shots + i * k;
        if (t->task->shots == SAMPLE_KEEP) python_random_sample(&r, P, k, shots);
        else if (t->task->shots == SAMPLE_OTHERS)
            rc = draw_others_(&r, &t->test.list[i], &t->train, k, shots, others, err);
        else for (int64_t j = 0; j < k; j++) shots[j] = j;
    }
    free(others);
    return rc;
}

// Reads a task whose task, name, subject and k are set, in the form that task_files gives. limit: only the first so
// many rows; 0: all.
LLMC_FN int task_load(TaskData *t, const char *folder, const TaskFiles *files, int64_t limit, Error *err) {
    if (documents_read_(&t->test, t, folder, files->test, files->test_labels, limit, err) != 0) return -1;
    if (t->k == 0) return 0;
    int64_t needed = t->task->shots == FIRST_ROWS ? t->k : 0;
    if (documents_read_(&t->train, t, folder, files->train, files->train_labels, needed, err) != 0) return -1;
    return draw_shots_(t, err);
}

// ---------------------------------------------------------------------------------------------------------------------
// Prompts

// An example with its answer. WinoGrande's has nothing after it where its tail is empty.
LLMC_FN void add_shot_(Text *t, const Document *d) {
    if (d->text) {
        text_add(t, d->text), text_add(t, " "), text_add(t, d->choices[d->gold]), text_add(t, "\n\n");
        return;
    }
    text_add(t, d->choices[d->gold]);
    if (*d->tail) text_add(t, " "), text_add(t, d->tail), text_add(t, "\n\n");
}

// What stands before each choice of test document i, and before the tail of WinoGrande's: description, examples, text.
LLMC_FN char *task_context(const TaskData *t, int64_t i) {
    Text out = text_empty();
    if (t->subject) {
        char *words = replace_all_(t->subject, "_", " ");
        text_add(&out, "The following are multiple choice questions (with answers) about ");
        text_add(&out, words), text_add(&out, ".\n\n");
        free(words);
    }
    for (int64_t j = 0; j < t->k; j++) add_shot_(&out, &t->train.list[t->shots[i * t->k + j]]);
    if (t->test.list[i].text) text_add(&out, t->test.list[i].text);
    return out.s;
}

#endif
