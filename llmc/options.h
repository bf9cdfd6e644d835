// The command line of the trainers: train_t6 and train_t6cu take the same flags with the same meaning.
#ifndef LLMC_OPTIONS_H
#define LLMC_OPTIONS_H

#include "checkpoint.h"
#include "flags.h"
#include "sampler.h"
#include "schedule.h"

typedef struct {
    // data
    const char *train_data, *val_data, *vocab;
    int64_t seq_len, shuffle, seed, reset_data, overfit;
    // model
    const char *model, *attn;
    char *checkpoint;           // the folder of the checkpoint that model names; NULL: model names a preset
    Config config;              // first what the flags set, NOT_GIVEN elsewhere; then the complete model
    int64_t order, a_contextual, b_contextual;      // flags of Config's b_dim, a_constant and b_constant
    const char *head_act;
    // training
    int64_t batch_size, tokens_per_step, max_steps, warmup_steps;
    const char *schedule_kind;
    int64_t decay_steps;
    double lr, min_lr, weight_decay, clip, beta1, beta2, adam_eps, skip_spikes;
    // evaluation and output
    const char *out;
    int64_t resume, save_every, keep, keep_every, val_every, val_tokens, sample_every, sample_tokens;
    SamplerOptions sampler;
    // machine
    int64_t threads, recompute, plan, table;
    double peak_tflops;
    // several ranks
    int64_t zero;
    const char *transport, *comm_file;
    double comm_timeout;
    Comm *comm;                 // NULL: one process
    void *gpu_comm;             // GpuComm of llmc/comm.cuh, for the GPU trainer
    // derived
    Schedule schedule;
    int forward_only;           // 1: the model is only to be evaluated
    int64_t accum;              // micro-batches per step, of all ranks together
} TrainOptions;

enum { NUM_TRAIN_FLAGS = 78, NOT_GIVEN = -1, LEAST_THAT_FITS = -2, MOST_RECOMPUTED = 2 };

// A checkpoint does not say its recipe: what the flags leave open of batch, steps and rates is this preset's.
#define CHECKPOINT_RECIPE "124M"

LLMC_FN int train_flags(TrainOptions *o, Flag out[NUM_TRAIN_FLAGS]) {
    Config *c = &o->config;
    const double many = 1e12, never = 0;
    static char model_help[160];
    snprintf(model_help, sizeof model_help, "preset %s, or the folder of a checkpoint or a run, with %s's recipe",
             preset_names(), CHECKPOINT_RECIPE);
    const Flag flags[] = {
        FLAGS_SECTION("Data"),
        {'i', "train-data", FLAG_TEXT, &o->train_data, "data/toy/toy_train_*.bin", 0, 0,
         "training shards: a path or a glob", 0},
        {'j', "val-data", FLAG_TEXT, &o->val_data, NULL, 0, 0,
         "validation shards (NAME_val_*.bin next to --train-data's NAME_train_*.bin; none there: no validation)", 0},
        {'t', "seq-len", FLAG_INT, &o->seq_len, NULL, 1, 1 << 24, "T, tokens of a sequence (preset)", 0},
        {0, "shuffle", FLAG_SWITCH, &o->shuffle, "1", 0, 1,
         "1: seeded order of shards and windows; 0: as stored, llm.c's order", 0},
        {0, "seed", FLAG_INT, &o->seed, "1337", 0, 9e15, "of initial weights, data order and samples", 0},
        {0, "reset-data", FLAG_SWITCH, &o->reset_data, "0", 0, 1,
         "1: resume weights and step, but restart the data", 0},
        {0, "overfit", FLAG_SWITCH, &o->overfit, "0", 0, 1,
         "1: train on the first step's batch again and again, to see that the model can learn it", 0},
        {0, "vocab", FLAG_TEXT, &o->vocab, "data/gpt2.tiktoken", 0, 0,
         "GPT-2's vocabulary, to print samples of GPT-2 tokens", 0},
        FLAGS_SECTION("Model"),
        {'e', "model", FLAG_TEXT, &o->model, "tiny", 0, 0, model_help, 0},
        {0, "attn", FLAG_TEXT, &o->attn, "tpa", 0, 0, attn_names(), 0},
        {0, "n-layer", FLAG_INT, &c->n_layer, NULL, 1, 1024, "L, layers (preset)", 0},
        {0, "n-embd", FLAG_INT, &c->n_embd, NULL, 1, 65536, "C, width (preset)", 0},
        {0, "n-head", FLAG_INT, &c->n_head, NULL, 1, 1024, "NH, query heads (preset)", 0},
        {0, "head-dim", FLAG_INT, &c->head_dim, NULL, 2, 1024, "numbers of a head, even (preset)", 0},
        {0, "q-rank", FLAG_INT, &c->q_rank, NULL, 1, 256, "RQ, rank of factored queries (preset)", 0},
        {0, "k-rank", FLAG_INT, &c->k_rank, NULL, 1, 256, "RK, rank of factored keys (preset)", 0},
        {0, "v-rank", FLAG_INT, &c->v_rank, NULL, 1, 256, "RV, rank of factored values (preset)", 0},
        {0, "n-kv-head", FLAG_INT, &c->n_kv_head, NULL, 1, 1024, "G, key/value heads of gqa (2)", 0},
        {0, "q-lora", FLAG_INT, &c->q_lora, NULL, 1, 65536, "mla: width of the latent of q (preset)", 0},
        {0, "kv-lora", FLAG_INT, &c->kv_lora, NULL, 1, 65536, "mla: width of the latent of k and v (preset)", 0},
        {0, "rope-dim", FLAG_INT, &c->rope_dim, NULL, 2, 1024, "mla: rotated numbers of a head, even (preset)", 0},
        {0, "hidden", FLAG_INT, &c->hidden, NULL, 1, 1 << 20, "F, width of the MLP (floor of 8/3 C)", 0},
        {0, "vocab-size", FLAG_INT, &c->vocab_size, NULL, 2, 65536, "V (that of the data)", 0},
        {0, "rope-base", FLAG_REAL, &c->rope_base, NULL, 1.001, 1e11, "base of RoPE's angles (10000)", 0},
        {0, "rms-eps", FLAG_REAL, &c->rms_eps, NULL, 1e-30, 0.1, "epsilon of RMSNorm (1e-6)", 0},
        FLAGS_SECTION("Variants of tpa and tpa_kvonly, and switches of every kind"),
        {0, "a-contextual", FLAG_SWITCH, &o->a_contextual, NULL, 0, 1,
         "0: the head factors a are learned constants (1)", 0},
        {0, "b-contextual", FLAG_SWITCH, &o->b_contextual, NULL, 0, 1,
         "0: the token factors b are learned constants (1)", 0},
        {0, "share-kv-b", FLAG_SWITCH, &c->share_kv_b, NULL, 0, 1, "1: v has the token factors of k (0)", 0},
        {0, "order", FLAG_INT, &o->order, NULL, 2, 3, "3: token factors are products of b and c (2)", 0},
        {0, "b-dim", FLAG_INT, &c->b_dim, NULL, 2, 1024, "of order 3: numbers of b, even; c has head-dim / b-dim", 0},
        {0, "head-act", FLAG_TEXT, &o->head_act, NULL, 0, 0, "of a: none, sigmoid, or softmax over heads (none)", 0},
        {0, "out-gate", FLAG_SWITCH, &c->out_gate, NULL, 0, 1, "1: attention's output times sigmoid(Wg n) (0)", 0},
        {0, "kv-shift", FLAG_SWITCH, &c->kv_shift, NULL, 0, 1,
         "1: k and v are gated means with the token before; not mla (preset)", 0},
        {0, "qk-norm", FLAG_SWITCH, &c->qk_norm, NULL, 0, 1,
         "1: each head of q and k is divided by its root mean square; not mla (preset)", 0},
        FLAGS_SECTION("Training"),
        {'b', "batch-size", FLAG_INT, &o->batch_size, NULL, 1, 65536, "B, sequences of a micro-batch (preset)", 0},
        {'d', "tokens-per-step", FLAG_INT, &o->tokens_per_step, NULL, 1, 1 << 30,
         "tokens per update, all ranks together; gradients accumulate (preset)", 0},
        {'x', "steps", FLAG_INT, &o->max_steps, NULL, 0, many,
         "updates; 0: write the initial checkpoint and stop (preset)", 0},
        {'l', "lr", FLAG_REAL, &o->lr, NULL, 1e-30, 1e3, "peak learning rate (preset)", 0},
        {0, "min-lr", FLAG_REAL, &o->min_lr, NULL, 0, 1e3, "learning rate at the end (preset)", 0},
        {'u', "warmup", FLAG_INT, &o->warmup_steps, NULL, 0, many, "steps of linear warm-up; 0: none (preset)", 0},
        {0, "schedule", FLAG_TEXT, &o->schedule_kind, "cosine", 0, 0,
         "after the warm-up: cosine, linear, wsd (the peak, then linear in the last --decay-steps) or constant", 0},
        {0, "decay-steps", FLAG_INT, &o->decay_steps, NULL, 1, many, "of --schedule wsd (the last 20% of --steps)", 0},
        {'c', "weight-decay", FLAG_REAL, &o->weight_decay, NULL, 0, 1e3,
         "AdamW's decoupled decay, on every weight; 0: none (preset)", 0},
        {0, "clip", FLAG_REAL, &o->clip, "1.0", 0, 1e9, "largest global gradient norm; 0: never clip", 0},
        {0, "beta1", FLAG_REAL, &o->beta1, "0.9", 0, 0.999999, "AdamW's decay of the first moment", 0},
        {0, "beta2", FLAG_REAL, &o->beta2, NULL, 0, 0.999999, "AdamW's decay of the second moment (preset)", 0},
        {0, "adam-eps", FLAG_REAL, &o->adam_eps, "1e-8", 1e-30, 1, "AdamW's epsilon", 0},
        {0, "skip-spikes", FLAG_REAL, &o->skip_spikes, "0", 0, 1e6,
         "skip updates whose loss or norm is this many standard deviations above the last 64; 0: none", 0},
        FLAGS_SECTION("Evaluation and output (every N steps; 0: never)"),
        {'o', "out", FLAG_TEXT, &o->out, "out", 0, 0, "folder for checkpoints, main.log, metrics.jsonl", 0},
        {'y', "resume", FLAG_SWITCH, &o->resume, "0", 0, 1,
         "resume from the last checkpoint in --out, if there is one", 0},
        {'n', "save-every", FLAG_INT, &o->save_every, "1000", never, many,
         "checkpoint; the last step always gets one unless 0", 0},
        {0, "keep", FLAG_INT, &o->keep, "0", 0, many, "keep only the newest N checkpoints; 0: all", 0},
        {0, "keep-every", FLAG_INT, &o->keep_every, "0", 0, many, "also keep those of every N-th step; 0: none", 0},
        {'v', "val-every", FLAG_INT, &o->val_every, "250", never, many, "validation loss", 0},
        {'m', "val-tokens", FLAG_INT, &o->val_tokens, NULL, 0, many,
         "tokens per validation, in whole sequences; 0: all of the data (20 times the preset's B x T)", 0},
        {'s', "sample-every", FLAG_INT, &o->sample_every, "1000", never, many, "sample text from the model", 0},
        {'g', "sample-tokens", FLAG_INT, &o->sample_tokens, "256", 1, 1 << 24,
         "length of a sample, at most --seq-len", 0},
        {0, "temperature", FLAG_REAL, &o->sampler.temperature, "0.8", 0, 100, "of samples; 0: greedy", 0},
        FLAGS_SECTION("Machine"),
        {0, "threads", FLAG_INT, &o->threads, "0", 0, 4096, "CPU threads; 0: all cores", 0},
        {'r', "recompute", FLAG_INT, &o->recompute, NULL, -1, 2,
         "GPU: recomputed in the backward pass, -1: nothing, 0: q, k, v, 1: also the MLP, 2: also factors (least that "
         "fits)", 0},
        {0, "peak-tflops", FLAG_REAL, &o->peak_tflops, "0", 0, 1e6,
         "peak of one device, for the % column; 0: the GPU's own, if known", 0},
        {'z', "zero", FLAG_INT, &o->zero, "0", 0, 2,
         "ZeRO stage: ranks share 0: only the work, 1: AdamW's state too, 2: gradients too", 0},
        {0, "comm", FLAG_TEXT, &o->transport, "auto", 0, 0,
         "GPUs: nccl, or mpi (through host memory, so ranks may share a GPU); auto: nccl if several", 0},
        {0, "comm-file", FLAG_TEXT, &o->comm_file, NULL, 0, 0,
         "GPUs without MPI: a file that all ranks can see, to find each other", 0},
        {0, "comm-timeout", FLAG_REAL, &o->comm_timeout, "600", 0, 1e6,
         "seconds a rank waits for the others, saving included; 0: forever", 0},
        {0, "plan", FLAG_SWITCH, &o->plan, "0", 0, 1, "print memory and arithmetic, and stop", 0},
        {0, "table", FLAG_SWITCH, &o->table, "0", 0, 1,
         "print parameters and cache of every preset and kind, and stop", 0},
    };
    return flags_copy(out, NUM_TRAIN_FLAGS, flags, (int)(sizeof flags / sizeof *flags));
}

// Overrides a config with the flags that were given.
LLMC_FN int config_override_(Config *c, Config *given, const TrainOptions *o, Error *err) {
    ConfigField to[NUM_CONFIG_FIELDS], from[NUM_CONFIG_FIELDS];
    Error why;
    if (given->n_embd != NOT_GIVEN) c->hidden = default_hidden(given->n_embd);
    config_fields(c, to);
    config_fields(given, from);
    for (int i = 0; i < NUM_CONFIG_FIELDS; i++)
        if (*from[i].value != NOT_GIVEN) *to[i].value = *from[i].value;
    if (given->rope_base != 0) c->rope_base = given->rope_base;
    if (given->rms_eps != 0) c->rms_eps = given->rms_eps;
    if (o->a_contextual != NOT_GIVEN) c->a_constant = !o->a_contextual;
    if (o->b_contextual != NOT_GIVEN) c->b_constant = !o->b_contextual;
    if (c->b_constant && given->kv_shift == NOT_GIVEN) c->kv_shift = 0;     // the preset's
    if (o->head_act && head_act_from_name(o->head_act, &c->head_act, &why) != 0)
        return fail(err, "--head-act: %s", why.text);
    if (o->order != 3 && given->b_dim != NOT_GIVEN) return fail(err, "--b-dim belongs to --order 3");
    if (o->order == 3 && c->b_dim == 0) return fail(err, "--order 3 needs --b-dim, the numbers of b");
    if (o->order == 2) c->b_dim = 0;
    return 0;
}

// 0 if two configs are the same, or -1 with the first difference in `what`: "n_layer is 12 there and 4 here".
LLMC_FN int config_difference(const Config *there, const Config *here, Error *what) {
    Config a = *there, b = *here;
    ConfigField fa[NUM_CONFIG_FIELDS], fb[NUM_CONFIG_FIELDS];
    if (a.attn != b.attn) return fail(what, "attn is %s there and %s here", attn_name(a.attn), attn_name(b.attn));
    config_fields(&a, fa);
    config_fields(&b, fb);
    for (int i = 0; i < NUM_CONFIG_FIELDS; i++)
        if (*fa[i].value != *fb[i].value)
            return fail(what, "%s is %lld there and %lld here", fa[i].name, (long long)*fa[i].value,
                        (long long)*fb[i].value);
    if (a.head_act != b.head_act)
        return fail(what, "head_act is %s there and %s here", head_act_name(a.head_act), head_act_name(b.head_act));
    if (a.rope_base != b.rope_base) return fail(what, "rope_base is %g there and %g here", a.rope_base, b.rope_base);
    if (a.rms_eps != b.rms_eps) return fail(what, "rms_eps is %g there and %g here", a.rms_eps, b.rms_eps);
    return 0;
}

// Sets o->config to the model that --model, --attn and the size flags describe, o->checkpoint, and *preset to the
// recipe for what the flags leave open.
LLMC_FN int model_options_(TrainOptions *o, AttnKind attn, int attn_given, const Preset **preset, Error *err) {
    Config given = o->config, base, merged;
    const Preset *p = find_preset(o->model);
    Error what;
    if (p) {
        base = preset_config(p, attn);
        base.vocab_size = 0;
    } else if (!(o->checkpoint = checkpoint_folder(o->model, &what))) {
        return fail(err, "--model: %s; a preset is %s", what.text, preset_names());
    } else if (checkpoint_load_config(o->checkpoint, &base, &what) != 0) return fail(err, "--model: %s", what.text);
    merged = base;
    if (attn_given) merged.attn = attn;
    if (config_override_(&merged, &given, o, err) != 0) return -1;
    if (!p && config_difference(&base, &merged, &what) != 0)
        return fail(err, "--model: %s is a different model from the one the flags describe: %s; leave those flags out",
                    o->checkpoint, what.text);
    o->config = merged;
    o->order = merged.b_dim ? 3 : 2, o->a_contextual = !merged.a_constant, o->b_contextual = !merged.b_constant;
    o->head_act = head_act_name(merged.head_act);
    *preset = p ? p : find_preset(CHECKPOINT_RECIPE);
    return 0;
}

// Completes the schedule, whose flags are read.
LLMC_FN int schedule_options_(TrainOptions *o, const Preset *p, Error *err) {
    int kind = 0;
    while (kind < NUM_SCHEDULES && strcmp(o->schedule_kind, schedule_name((ScheduleKind)kind))) kind++;
    if (kind == NUM_SCHEDULES)
        return fail(err, "--schedule: \"%s\" is not accepted; it takes cosine, linear, wsd or constant",
                    o->schedule_kind);
    int64_t tenth = o->max_steps / 10;
    if (o->warmup_steps < 0) o->warmup_steps = p->warmup_steps < tenth ? p->warmup_steps : tenth;
    if (o->lr < 0) o->lr = p->lr;
    if (o->min_lr < 0) o->min_lr = p->min_lr < o->lr ? p->min_lr : o->lr / 10;
    if (o->min_lr > o->lr) return fail(err, "--min-lr %g is above --lr %g", o->min_lr, o->lr);
    if (kind != SCHEDULE_WSD && o->decay_steps >= 0)
        return fail(err, "--decay-steps belongs to --schedule wsd; --schedule %s has none", o->schedule_kind);
    if (kind != SCHEDULE_WSD) o->decay_steps = 0;
    int64_t after_warmup = o->max_steps > o->warmup_steps ? o->max_steps - o->warmup_steps : 0;
    if (o->decay_steps > after_warmup)
        return fail(err, "--decay-steps %" PRId64 ": only %" PRId64 " of --steps %" PRId64 " are left after --warmup %"
                    PRId64, o->decay_steps, after_warmup, o->max_steps, o->warmup_steps);
    if (o->decay_steps < 0) o->decay_steps = o->max_steps / 5 < after_warmup ? o->max_steps / 5 : after_warmup;
    o->schedule = (Schedule){(ScheduleKind)kind, o->lr, o->min_lr, (long)o->warmup_steps, (long)o->max_steps,
                             (long)o->decay_steps};
    return 0;
}

// Parses the command line and completes it from the preset. config.vocab_size stays 0 where neither the flags nor a
// checkpoint set it. Errors: one line in err, and -1. Free with train_options_free.
LLMC_FN int train_options(TrainOptions *o, int argc, char **argv, const char *help_head, Error *err) {
    memset(o, 0, sizeof *o);
    o->seq_len = o->batch_size = o->tokens_per_step = o->max_steps = o->warmup_steps = -1;
    ConfigField fields[NUM_CONFIG_FIELDS];
    config_fields(&o->config, fields);
    for (int i = 0; i < NUM_CONFIG_FIELDS; i++) *fields[i].value = NOT_GIVEN;
    o->order = o->a_contextual = o->b_contextual = NOT_GIVEN, o->recompute = LEAST_THAT_FITS;
    o->lr = o->min_lr = o->weight_decay = o->beta2 = -1, o->decay_steps = o->val_tokens = -1;
    o->sampler.top_p = 1;
    Flag flags[NUM_TRAIN_FLAGS];
    int n = train_flags(o, flags);
    if (flags_parse(argc, argv, help_head, flags, n, err) != 0) return -1;

    AttnKind attn = ATTN_TPA;
    Error why;
    if (attn_from_name(o->attn, &attn, &why) != 0) return fail(err, "--attn: %s", why.text);
    int attn_given = 0;
    for (int i = 0; i < n; i++) attn_given |= flags[i].name && !strcmp(flags[i].name, "attn") && flags[i].given;
    const Preset *p = NULL;
    if (model_options_(o, attn, attn_given, &p, err) != 0) return -1;

    if (o->seq_len < 0) o->seq_len = p->seq_len;
    if (o->batch_size < 0) o->batch_size = p->batch_size;
    int64_t micro = o->batch_size * o->seq_len;
    if (o->tokens_per_step < 0) o->tokens_per_step = round_up(p->tokens_per_step, micro);
    if (o->max_steps < 0) o->max_steps = p->max_steps;
    if (o->weight_decay < 0) o->weight_decay = p->weight_decay;
    if (o->beta2 < 0) o->beta2 = p->beta2;
    if (o->val_tokens < 0) o->val_tokens = 20 * p->batch_size * p->seq_len;
    if (schedule_options_(o, p, err) != 0) return -1;
    if (strcmp(o->transport, "auto") && strcmp(o->transport, "nccl") && strcmp(o->transport, "mpi"))
        return fail(err, "--comm: \"%s\" is not accepted; it takes auto, nccl or mpi", o->transport);
    if (o->tokens_per_step % micro != 0)
        return fail(err, "--tokens-per-step %" PRId64 " is not a multiple of the micro-batch, %" PRId64 " x %" PRId64
                    " = %" PRId64 " tokens; use %" PRId64, o->tokens_per_step, o->batch_size, o->seq_len, micro,
                    round_up(o->tokens_per_step, micro));
    o->accum = o->tokens_per_step / micro;
    return 0;
}

LLMC_FN void train_options_free(TrainOptions *o) { free(o->checkpoint), o->checkpoint = NULL; }

#endif
