// Evaluation on tasks: loads them, makes their requests, has a model score them (Scorer), and prints the scores.
// Reading order:
//     evaluation | requests | scores | output
#ifndef LLMC_EVALUATOR_H
#define LLMC_EVALUATOR_H

#include "eval_requests.h"
#include "eval_scores.h"
#include "tokenizer.h"

// ---------------------------------------------------------------------------------------------------------------------
// An evaluation: tasks and the requests of all their documents

typedef struct {
    int64_t task, doc;          // of TaskData, of its test documents
    int choice;
    int32_t *ids;               // context and continuation, before truncation
    int64_t n_context, n_continuation, cut;     // cut: tokens lost at the left
} Prompted;

typedef struct {
    TaskData *tasks;
    int64_t num_tasks;
    Prompted *prompts;          // (n) in the order of tasks, documents and choices
    Request *requests;          // (n)
    int64_t n;
    int64_t context;            // L
    int silent;                 // 1: no notes and no progress; ranks other than 0
} Evaluation;

LLMC_FN void evaluation_free(Evaluation *e) {
    for (int64_t i = 0; i < e->n; i++) free(e->prompts[i].ids);
    for (int64_t i = 0; i < e->num_tasks; i++) task_data_free(&e->tasks[i]);
    free(e->prompts), free(e->requests), free(e->tasks);
    memset(e, 0, sizeof *e);
}

LLMC_FN TaskData *evaluation_task_(Evaluation *e, const Task *task, const char *subject, int group, int64_t k) {
    e->tasks = (TaskData *)xrealloc(e->tasks, ((size_t)e->num_tasks + 1) * sizeof *e->tasks);
    TaskData *t = &e->tasks[e->num_tasks++];
    memset(t, 0, sizeof *t);
    t->task = task, t->k = k, t->group = group;
    t->subject = subject ? xasprintf("%s", subject) : NULL;
    t->name = subject ? xasprintf("%s_%s", task->name, subject) : xasprintf("%s", task->name);
    return t;
}

// Adds a task, or the subject of MMLU, or for subject NULL all of MMLU's. wanted: of --tasks, or NULL for all.
// Returns how many were added.
LLMC_FN int evaluation_add_(Evaluation *e, const Task *task, int64_t k, const char *wanted) {
    int added = 0;
    if (task != eval_task(MMLU_TASK)) {
        if (!wanted || !strcmp(wanted, task->name)) evaluation_task_(e, task, NULL, -1, k), added = 1;
        return added;
    }
    for (int g = 0; g < NUM_MMLU_GROUPS; g++) {
        char *words = xasprintf("%s", mmlu_group(g)->subjects), *save = NULL;
        for (char *w = strtok_r(words, " ", &save); w; w = strtok_r(NULL, " ", &save)) {
            int is_wanted = !wanted || !strcmp(wanted, task->name) ||
                            (!strncmp(wanted, "mmlu_", 5) && !strcmp(wanted + 5, w));
            if (is_wanted) evaluation_task_(e, task, w, g, k), added++;
        }
        free(words);
    }
    return added;
}

// Whether any of the tasks that --tasks's word stands for has data.
LLMC_FN int evaluation_has_(const Evaluation *e, int64_t from, const char *folder) {
    for (int64_t i = from; i < e->num_tasks; i++)
        if (task_files(&e->tasks[i], folder, 0)) return 1;
    return 0;
}

// The first of the files that a task could be read from.
LLMC_FN char *evaluation_first_file_(const TaskData *t, const char *folder) {
    return task_path(t, folder, t->task->files[0].test);
}

// Chooses tasks: those that names lists, each of which must have data, or all. Those without data get a line each.
LLMC_FN int evaluation_choose(Evaluation *e, const char *names, const char *folder, int64_t k, Error *err) {
    char *copy = xasprintf("%s", names ? names : ""), *save = NULL;
    int rc = 0;
    for (char *w = strtok_r(copy, ", ", &save); w && rc == 0; w = strtok_r(NULL, ", ", &save)) {
        int64_t before = e->num_tasks;
        int added = 0;
        for (int i = 0; i < NUM_TASKS; i++) added += evaluation_add_(e, eval_task(i), k, w);
        if (!added) rc = fail(err, "--tasks: \"%.60s\" is no task; --help lists them", w);
        else if (!evaluation_has_(e, before, folder)) {
            char *file = evaluation_first_file_(&e->tasks[before], folder);
            rc = fail(err, "--tasks: there is no data for %s: neither %s nor another of its files; get them with "
                      "data/eval_tasks.sh, or name their folder with --data", w, file);
            free(file);
        }
        for (int64_t i = 0; i < before && rc == 0; i++)
            for (int64_t j = before; j < e->num_tasks; j++)
                if (!strcmp(e->tasks[i].name, e->tasks[j].name))
                    rc = fail(err, "--tasks: %s is there twice", e->tasks[i].name);
    }
    if (names && rc == 0 && e->num_tasks == 0) rc = fail(err, "--tasks: names no task");
    if (!names) for (int i = 0; i < NUM_TASKS; i++) evaluation_add_(e, eval_task(i), k, NULL);
    free(copy);
    if (rc != 0) return -1;
    int64_t kept = 0, mmlu = 0;
    for (int64_t i = 0; i < e->num_tasks; i++) mmlu += e->tasks[i].subject && task_files(&e->tasks[i], folder, 0);
    for (int64_t i = 0; i < e->num_tasks; i++) {
        TaskData *t = &e->tasks[i];
        if (task_files(t, folder, 0)) {
            e->tasks[kept++] = *t;
            continue;
        }
        int is_noted = !t->subject || mmlu || !strcmp(t->subject, "abstract_algebra");  // one line for all of MMLU
        if (is_noted && !e->silent)
            fprintf(stderr, "note: %s: no data in %s\n", t->subject && !mmlu ? "mmlu" : t->name, folder);
        task_data_free(t);
    }
    e->num_tasks = kept;
    return kept ? 0 : fail(err, "--data: %s has no data of any task; get them with data/eval_tasks.sh", folder);
}

// ---------------------------------------------------------------------------------------------------------------------
// Requests

typedef struct { int32_t *ids; int64_t n; } Tokens_;

LLMC_FN Tokens_ encode_(const Tokenizer *tokenizer, EncodeScratch *scratch, const char *text) {
    size_t bytes = strlen(text);
    uint16_t *tokens = (uint16_t *)xmalloc((bytes + 1) * sizeof *tokens);
    int64_t n = (int64_t)tokenizer_encode_special(tokenizer, text, bytes, tokens, scratch);
    Tokens_ out = {(int32_t *)xmalloc((size_t)(n + 1) * sizeof *out.ids), n};
    for (int64_t i = 0; i < n; i++) out.ids[i] = tokens[i];
    free(tokens);
    return out;
}

// Tokens of a context and its continuation, which begins with a blank. Blanks at the context's end count as the
// continuation's. An empty context is end-of-text.
LLMC_FN int prompt_encode_(Prompted *p, const Tokenizer *tokenizer, EncodeScratch *scratch, const char *context,
                           const char *continuation, Error *err) {
    size_t bytes = right_strip(context);
    if (*context && bytes == 0) return fail(err, "its context is only blanks, which leaves nothing to start from");
    char *stripped = xasprintf("%.*s", (int)bytes, context), *all = xasprintf("%s%s", context, continuation);
    Tokens_ before = encode_(tokenizer, scratch, stripped), whole = encode_(tokenizer, scratch, all);
    free(stripped), free(all);
    if (!*context) {
        p->ids = (int32_t *)xmalloc((size_t)(whole.n + 1) * sizeof *p->ids);
        p->ids[0] = tokenizer->eot;
        memcpy(p->ids + 1, whole.ids, (size_t)whole.n * sizeof *p->ids);
        p->n_context = 1, p->n_continuation = whole.n;
        free(whole.ids);
    } else p->ids = whole.ids, p->n_context = before.n, p->n_continuation = whole.n - before.n;
    free(before.ids);
    return p->n_continuation > 0 ? 0 : fail(err, "its continuation has no token of its own");
}

// Makes the requests of document `doc` of a task.
LLMC_FN int evaluation_document_(Evaluation *e, int64_t task, int64_t doc, const Tokenizer *tokenizer,
                                 EncodeScratch *scratch, Error *err) {
    const TaskData *t = &e->tasks[task];
    const Document *d = &t->test.list[doc];
    char *before = task_context(t, doc);
    int rc = 0;
    for (int i = 0; i < d->num_choices && rc == 0; i++) {
        if ((e->n & (e->n - 1)) == 0)
            e->prompts = (Prompted *)xrealloc(e->prompts, (size_t)(e->n ? 2 * e->n : 1) * sizeof *e->prompts);
        Prompted *p = &e->prompts[e->n++];
        memset(p, 0, sizeof *p);
        p->task = task, p->doc = doc, p->choice = i;
        char *context = xasprintf("%s%s", before, d->tail ? d->choices[i] : "");
        char *continuation = xasprintf(" %s", d->tail ? d->tail : d->choices[i]);
        Error why;
        rc = prompt_encode_(p, tokenizer, scratch, context, continuation, &why);
        if (rc == 0 && p->n_continuation > e->context)
            rc = fail(&why, "choice %d has %" PRId64 " tokens, more than --context %" PRId64, i + 1, p->n_continuation,
                      e->context);
        if (rc != 0) fail(err, "%s: row %" PRId64 ": %s", t->test.path, doc + 1, why.text);
        int64_t n = p->n_context + p->n_continuation;
        p->cut = n > e->context + 1 ? n - e->context - 1 : 0;
        free(context), free(continuation);
    }
    free(before);
    return rc;
}

// Loads the chosen tasks and makes all requests.
LLMC_FN int evaluation_load(Evaluation *e, const char *folder, int64_t limit, int64_t context,
                            const Tokenizer *tokenizer, Error *err) {
    EncodeScratch scratch;
    encode_scratch_init(&scratch);
    e->context = context;
    int rc = 0;
    for (int64_t i = 0; i < e->num_tasks && rc == 0; i++) {
        TaskData *t = &e->tasks[i];
        rc = task_load(t, folder, task_files(t, folder, t->k), limit, err);
        for (int64_t doc = 0; doc < t->test.n && rc == 0; doc++)
            rc = evaluation_document_(e, i, doc, tokenizer, &scratch, err);
    }
    encode_scratch_free(&scratch);
    if (rc != 0) return -1;
    e->requests = (Request *)xcalloc((size_t)e->n, sizeof *e->requests);
    for (int64_t i = 0, group = 0; i < e->n; i++) {
        const Prompted *p = &e->prompts[i];
        if (p->choice == 0) group++;
        Request *r = &e->requests[i];
        r->ids = p->ids + p->cut, r->n = p->n_context + p->n_continuation - p->cut;
        r->n_continuation = p->n_continuation, r->group = group;
    }
    return 0;
}

// total: of this rank, about. silent: 1: not rank 0.
typedef struct { int64_t total; int silent; double start, last; } ProgressBar;

LLMC_FN void progress_bar(int64_t done, void *state) {
    ProgressBar *bar = (ProgressBar *)state;
    double now = now_seconds(), rate = (double)done / (now - bar->start + 1e-9);
    char left[32];
    if (bar->silent || !isatty(2) || (now - bar->last < 0.2 && done < bar->total)) return;
    bar->last = now;
    fprintf(stderr, "\r%" PRId64 " of %" PRId64 " requests, %.1f requests/s, %s left  %s", done, bar->total, rate,
            format_duration(left, (double)(bar->total - done) / rate), done == bar->total ? "\n" : "");
}

LLMC_FN void evaluation_run(Evaluation *e, const Scorer *scorer) {
    ProgressBar bar = {e->n / comm_world(scorer->comm), e->silent, now_seconds(), 0};
    score_requests(scorer, e->requests, e->n, progress_bar, &bar);
    for (int64_t i = 0; i < e->n; i++)
        if (!isfinite(e->requests[i].loglikelihood))
            die(EXIT_INPUT, "--model: a log-likelihood of %s is not finite; the weights are damaged",
                e->tasks[e->prompts[i].task].name);
}

// ---------------------------------------------------------------------------------------------------------------------
// Scores

// A line of results: a task, all of MMLU, or a group of its subjects.
typedef struct {
    char *name;
    const Task *task;
    int is_column;                      // of the paper's table
    TaskScore score[NUM_METRICS];       // ACC alone where the task has no other
} Result;

typedef struct { Result *list; int64_t n; } EvalResults;

// The score of a task's metric over its documents.
LLMC_FN TaskScore evaluation_score_(const Evaluation *e, int64_t task, int metric) {
    const Documents *test = &e->tasks[task].test;
    int64_t right = 0;
    double *ll = NULL;
    for (int64_t i = 0; i < e->n; i++) {
        const Prompted *p = &e->prompts[i];
        const Document *d = &test->list[p->doc];
        if (p->task != task || p->choice > 0) continue;
        ll = (double *)xrealloc(ll, (size_t)d->num_choices * sizeof *ll);
        for (int c = 0; c < d->num_choices; c++) ll[c] = e->requests[i + c].loglikelihood;
        right += predicted_choice(d, ll, metric) == d->gold;
    }
    free(ll);
    return score_of(test->n, right);
}

LLMC_FN Result *results_add_(EvalResults *r, const Task *task, char *name, int is_column) {
    r->list = (Result *)xrealloc(r->list, ((size_t)r->n + 1) * sizeof *r->list);
    Result *result = &r->list[r->n++];
    memset(result, 0, sizeof *result);
    result->task = task, result->name = name, result->is_column = is_column;
    return result;
}

// MMLU's subjects of a group, or of all: group -1.
LLMC_FN void results_group_(EvalResults *r, const Evaluation *e, const TaskScore *of_task, int group,
                            const char *name) {
    TaskScore *scores = (TaskScore *)xmalloc((size_t)e->num_tasks * sizeof *scores);
    int64_t count = 0;
    for (int64_t i = 0; i < e->num_tasks; i++)
        if (e->tasks[i].subject && (group < 0 || e->tasks[i].group == group)) scores[count++] = of_task[i];
    if (count)
        results_add_(r, eval_task(MMLU_TASK), xasprintf("%s", name), group < 0)->score[ACC] =
            score_of_group(scores, count);
    free(scores);
}

// The scores of all tasks, and of MMLU and its groups before those of its subjects.
LLMC_FN EvalResults evaluation_results(const Evaluation *e) {
    EvalResults r = {NULL, 0};
    TaskScore *acc = (TaskScore *)xmalloc((size_t)e->num_tasks * sizeof *acc);
    int mmlu_done = 0;
    for (int64_t i = 0; i < e->num_tasks; i++) acc[i] = evaluation_score_(e, i, ACC);
    for (int64_t i = 0; i < e->num_tasks; i++) {
        const TaskData *t = &e->tasks[i];
        if (t->subject && !mmlu_done++) {
            results_group_(&r, e, acc, -1, "mmlu");
            for (int g = 0; g < NUM_MMLU_GROUPS; g++) {
                char *name = xasprintf("mmlu_%s", mmlu_group(g)->name);
                results_group_(&r, e, acc, g, name);
                free(name);
            }
        }
        Result *result = results_add_(&r, t->task, xasprintf("%s", t->name), !t->subject);
        result->score[ACC] = acc[i];
        for (int m = ACC_NORM; t->task->is_normed && m < NUM_METRICS; m++)
            result->score[m] = evaluation_score_(e, i, m);
    }
    free(acc);
    return r;
}

LLMC_FN void results_free(EvalResults *r) {
    for (int64_t i = 0; i < r->n; i++) free(r->list[i].name);
    free(r->list);
}

// ---------------------------------------------------------------------------------------------------------------------
// Output

LLMC_FN const TaskScore *paper_score_(const Result *r) {
    return &r->score[r->task->metric == METRIC_ACC_NORM ? ACC_NORM : ACC];
}

// The paper's table: percent, a column per task, and the mean of those that are there.
LLMC_FN void print_table(const EvalResults *r, int64_t shots) {
    double sum = 0;
    int columns = 0;
    printf("%-8s", "");
    for (int64_t i = 0; i < r->n; i++) if (r->list[i].is_column) printf("%10s", r->list[i].task->title);
    printf("%10s\n%" PRId64 "-shot  ", "Avg.", shots);
    for (int64_t i = 0; i < r->n; i++) {
        if (!r->list[i].is_column) continue;
        double percent = 100 * paper_score_(&r->list[i])->mean;
        printf("%10.2f", percent);
        sum += percent, columns++;
    }
    printf("%10.2f\n%-8s", sum / columns, "+-");
    for (int64_t i = 0; i < r->n; i++) {
        double error = 100 * paper_score_(&r->list[i])->standard_error;
        if (!r->list[i].is_column) continue;
        if (isnan(error)) printf("%10s", "N/A");
        else printf("%10.2f", error);
    }
    printf("\n%-8s", "rows");
    for (int64_t i = 0; i < r->n; i++)
        if (r->list[i].is_column) printf("%10" PRId64, paper_score_(&r->list[i])->n);
    printf("\n");
}

// A file for results. It is opened before anything is computed, so that a path that cannot be written costs no
// evaluation, and keeps what it has until output_begin. A device or a pipe is written as it is.
typedef struct { const char *flag, *path; FILE *file; } Output;     // path NULL: none is wanted

LLMC_FN int output_open(Output *out, const char *flag, const char *path, Error *err) {
    *out = (Output){flag, path, path ? fopen(path, "a") : NULL};
    return !path || out->file ? 0 : fail(err, "%s: %s: cannot create: %s", flag, path, strerror(errno));
}

LLMC_FN FILE *output_begin(const Output *out) {
    if (ftruncate(fileno(out->file), 0) != 0) errno = 0;        // not a regular file
    return out->file;
}

LLMC_FN void output_close(Output *out) {
    int failed = ferror(out->file), closed = fclose(out->file);
    if (failed || closed != 0)
        die(disk_exit_code(errno), "%s: %s: cannot write: %s", out->flag, out->path, strerror(errno));
}

// Writes json, which is freed.
LLMC_FN void write_json(Output *out, cJSON *json) {
    char *text = cJSON_Print(json);
    cJSON_Delete(json);
    fprintf(output_begin(out), "%s\n", text);
    free(text);
    output_close(out);
}

LLMC_FN void add_score_(cJSON *to, const TaskScore *s, const char *metric) {
    char *error = xasprintf("%s_stderr", metric);
    cJSON_AddNumberToObject(to, metric, s->mean);
    if (isnan(s->standard_error)) cJSON_AddStringToObject(to, error, "N/A");
    else cJSON_AddNumberToObject(to, error, s->standard_error);
    free(error);
}

LLMC_FN void write_scores(Output *out, const EvalResults *r, const EvalOptions *o, const char *model) {
    cJSON *json = cJSON_CreateObject();
    cJSON_AddStringToObject(json, "model", model);
    cJSON_AddNumberToObject(json, "num_fewshot", (double)o->shots);
    cJSON_AddNumberToObject(json, "context", (double)o->context);
    cJSON *scores = cJSON_AddObjectToObject(json, "scores");
    for (int64_t i = 0; i < r->n; i++) {
        const Result *result = &r->list[i];
        cJSON *one = cJSON_AddObjectToObject(scores, result->name);
        cJSON_AddNumberToObject(one, "n", (double)result->score[ACC].n);
        for (int m = 0; m < NUM_METRICS; m++)
            if (result->score[m].n) add_score_(one, &result->score[m], metric_name(m));
    }
    write_json(out, json);
}

LLMC_FN void print_ids_(FILE *f, const char *name, const int32_t *ids, int64_t n) {
    fprintf(f, ", \"%s\": [", name);
    for (int64_t i = 0; i < n; i++) fprintf(f, "%s%d", i ? "," : "", ids[i]);
    fputc(']', f);
}

// One JSON object per request. context_used: how many of the context's tokens were left after truncation.
LLMC_FN void write_log(Output *out, const Evaluation *e) {
    FILE *f = output_begin(out);
    for (int64_t i = 0; i < e->n; i++) {
        const Prompted *p = &e->prompts[i];
        const TaskData *t = &e->tasks[p->task];
        const Request *r = &e->requests[i];
        fprintf(f, "{\"task\": \"%s\", \"doc_id\": %" PRId64 ", \"choice\": %d, \"gold\": %d, \"fewshot\": [", t->name,
                p->doc, p->choice, t->test.list[p->doc].gold);
        for (int64_t j = 0; j < t->k; j++) fprintf(f, "%s%" PRId64, j ? "," : "", t->shots[p->doc * t->k + j]);
        fputc(']', f);
        print_ids_(f, "context_tokens", p->ids, p->n_context);
        print_ids_(f, "continuation_tokens", p->ids + p->n_context, p->n_continuation);
        fprintf(f, ", \"context_used\": %" PRId64 ", \"loglikelihood\": %.17g, \"is_greedy\": %s}\n",
                r->n - r->n_continuation, r->loglikelihood, r->is_greedy ? "true" : "false");
    }
    output_close(out);
}

#endif
