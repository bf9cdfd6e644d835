// Fuzzers of the readers, for clang's libFuzzer under the address and undefined-behaviour sanitizers (make fuzz). A
// reader may accept an input or refuse it with a line; it must not crash, hang, leak, or allocate much more memory than
// the input has bytes. test/test_fuzz.sh runs all of them from the seeds in test/fuzz/corpus.
//
//     READER=config build/fuzz -max_len=4096 NEW_INPUTS test/fuzz/corpus/config
//     READER=config build/fuzz INPUT                      one input again
#include "data/input.h"
#include "data/jsonl.h"
#include "llmc/checkpoint.h"
#include "llmc/dataloader.h"

// What the fuzzer keeps between inputs.
static struct {
    char folder[64];                    // of the files that the readers read, in memory
    void (*read)(const uint8_t *data, size_t bytes);
    Model model;                        // tiny, so that an input of 2 kB can hold its weights
    float *params;
} fuzz;

// A claim of the fuzzer: what an accepted input must fulfil.
#define CLAIM(condition) do { if (!(condition)) { fprintf(stderr, "CLAIM: %s\n", #condition); abort(); } } while (0)

// Writes a file of that name into the folder. The caller frees the path.
static char *file(const char *name, const uint8_t *data, size_t bytes) {
    Error err;
    char *path = xasprintf("%s/%s", fuzz.folder, name);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (fd < 0 || write_exactly(fd, data, bytes, path, &err) != 0) die(EXIT_SYSTEM, "%s: cannot write", path);
    close(fd);
    return path;
}

// ---------------------------------------------------------------------------------------------------------------------
// The readers. Refusals are not looked at: any error is fine.

// A safetensors file: all its tensors, then as the weights and the moments of the model.
static void read_safetensors(const uint8_t *data, size_t bytes) {
    Error err;
    SafeTensors st;
    const Model *m = &fuzz.model;
    char *path = file("model.safetensors", data, bytes);
    int used = 0;
    if (safetensors_open(&st, path, &err) == 0) {
        safetensors_metadata(&st, "config");
        for (int i = 0; i < st.num_tensors; i++) {
            const SafeTensor *t = &st.tensors[i];
            CLAIM(t->offset + t->bytes <= bytes);
            double *values = (double *)xmalloc(t->elements > bytes ? 0 : (size_t)t->elements * sizeof *values);
            if (t->elements <= bytes) safetensors_read(&st, t, 0, t->elements, values, &err);
            free(values);
        }
        checkpoint_read_tensors(&st, m, "m.", fuzz.params, &used, &err);
        safetensors_close(&st);
    }
    if (checkpoint_load_weights(fuzz.folder, m, fuzz.params, &err) == 0) CLAIM(bytes >= m->num_parameters * 2);
    free(path);
}

// Two bytes that say how long the shard is; the shard; a manifest, if anything is left. The highest bit: shuffled.
static void read_shard(const uint8_t *data, size_t bytes) {
    enum { B = 2, T = 8 };
    Error err;
    DataLoader d;
    int32_t inputs[B * T], targets[B * T];
    if (bytes < 2) return;
    size_t head = data[0] | data[1] << 8, shard = head & 0x7FFF;
    LoaderOrder order = head & 0x8000 ? ORDER_SHUFFLED : ORDER_SEQUENTIAL;
    data += 2, bytes -= 2;
    if (shard > bytes) shard = bytes;
    char *path = file("f_train_000001.bin", data, shard);
    char *manifest = file("f_manifest.json", data + shard, bytes - shard);
    if (bytes == shard) unlink(manifest);
    if (loader_open(&d, path, T, order, B, 1, &err) == 0) {
        uint64_t windows = d.windows;
        CLAIM(windows * T < shard / 2 && (d.vocab_size == GPT2_VOCAB_SIZE || d.vocab_size == BYTES_VOCAB_SIZE));
        loader_fingerprint(&d);
        int rc = loader_next(&d, B, inputs, targets, &err);
        if (rc != 0) d.shards[0].has_checksum = 0;          // no input has the right one by chance
        for (uint64_t i = 0; i < windows + 2 && (rc == 0 || i == 0); i++) {
            rc = loader_next(&d, B, inputs, targets, &err);
            for (int k = 0; k < B * T && rc == 0; k++) CLAIM(targets[k] < d.vocab_size);
        }
        loader_close(&d);
    }
    free(path), free(manifest);
}

// A file of JSON Lines, packed or not, as data/tokenize reads it.
static void read_jsonl(const uint8_t *data, size_t bytes) {
    enum { MOST = 1 << 16 };            // unpacked; packed data may hold much more
    Error err;
    Input in;
    JsonLine l;
    char *path = file("text.jsonl", data, bytes);
    unsigned char *text = (unsigned char *)xmalloc(MOST), *end = text;
    ssize_t n = input_open(&in, path, &err) == 0 ? 1 : -1;
    while (n > 0 && end < text + MOST) {
        n = input_read(&in, end, (size_t)(text + MOST - end), &err);
        CLAIM(n <= text + MOST - end);
        if (n > 0) end += n;
    }
    CLAIM(n >= 0 || in.exit_code == EXIT_INPUT || in.exit_code == EXIT_SYSTEM);
    for (unsigned char *line = text, *line_end; line < end; line = line_end + 1) {
        line_end = (unsigned char *)memchr(line, '\n', (size_t)(end - line));
        if (!line_end) line_end = end;
        // a copy of its own, so that the sanitizer sees any access beyond the line
        size_t size = (size_t)(line_end - line);
        unsigned char *copy = (unsigned char *)xmalloc(size);
        memcpy(copy, line, size);
        JsonlResult result = jsonl_parse(&l, copy, copy + size);
        CLAIM(result != JSONL_ERROR || (l.error && l.at >= copy && l.at <= copy + size));
        CLAIM(result != JSONL_TEXT || (l.text > copy && l.text + l.text_bytes < copy + size));
        free(copy);
    }
    input_close(&in);
    free(text), free(path);
}

// config.json, and the model that it describes. What is accepted is written, and read back as the same.
static void read_config(const uint8_t *data, size_t bytes) {
    Error err;
    Config c, again;
    Model m;
    char *path = file("config.json", data, bytes);
    if (checkpoint_load_config(fuzz.folder, &c, &err) == 0) {
        char *text = config_to_json(&c);
        free(file("config.json", (const uint8_t *)text, strlen(text)));
        CLAIM(checkpoint_load_config(fuzz.folder, &again, &err) == 0);
        char *same = config_to_json(&again);
        CLAIM(!strcmp(text, same));
        free(text), free(same);
        if (c.n_layer <= 32) {
            model_init(&m, &c, 8);
            CLAIM(m.num_stored >= m.num_parameters && m.num_parameters > 0);
            model_free(&m);
        }
    }
    free(path);
}

static int same_entries(const ManifestEntry *a, int n, const ManifestEntry *b, int count) {
    int same = n == count;
    for (int i = 0; i < n && same; i++)
        same = !strcmp(a[i].file, b[i].file) && a[i].tokens == b[i].tokens && a[i].bytes == b[i].bytes &&
               a[i].documents == b[i].documents && a[i].xxh64 == b[i].xxh64;
    return same;
}

// A manifest. What is accepted is written, and read back as the same.
static void read_manifest(const uint8_t *data, size_t bytes) {
    Error err;
    Manifest m, again;
    char *path = file("f_manifest.json", data, bytes);
    if (manifest_read(&m, path, &err) == 0) {
        CLAIM(manifest_write(&m, path, &err) == 0 && manifest_read(&again, path, &err) == 0);
        CLAIM(m.eot == again.eot && m.documents == again.documents && m.shard_size == again.shard_size);
        CLAIM(same_entries(m.shards, m.num_shards, again.shards, again.num_shards));
        CLAIM(same_entries(m.sources, m.num_sources, again.sources, again.num_sources));
        manifest_free(&m), manifest_free(&again);
    }
    free(path);
}

// state.json. What is accepted is written, and read back as the same.
static void read_state(const uint8_t *data, size_t bytes) {
    Error err;
    TrainState s, again;
    char *path = file("state.json", data, bytes);
    cJSON *json = json_read(path, 1 << 16, &err);
    if (json && state_from_json_(&s, json, path, &err) == 0) {
        char *text = state_to_json_(&s);
        cJSON *copy = json_parse(text, strlen(text), path, &err);
        CLAIM(copy && state_from_json_(&again, copy, path, &err) == 0);
        char *same = state_to_json_(&again);
        CLAIM(!strcmp(text, same));
        cJSON_Delete(copy);
        free(text), free(same), free(s.flags), free(again.flags);
    }
    cJSON_Delete(json);
    free(path);
}

// ---------------------------------------------------------------------------------------------------------------------

static const struct { const char *name; void (*read)(const uint8_t *data, size_t bytes); } readers[] = {
    {"safetensors", read_safetensors}, {"shard", read_shard}, {"jsonl", read_jsonl}, {"config", read_config},
    {"manifest", read_manifest}, {"state", read_state}};

// zstd's unpacker allocates the window that its data ask for, up to 2 GB. Here it gets at most 64 MB.
const char *__asan_default_options(void);
const char *__asan_default_options(void) {
    return "max_allocation_size_mb=64:allocator_may_return_null=1:quarantine_size_mb=16";
}

static void remove_files(void) {
    Error err;
    remove_folder_(fuzz.folder, &err);
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    const char *name = getenv("READER");
    (void)argc;
    set_program_name((*argv)[0]);
    for (size_t i = 0; i < sizeof readers / sizeof *readers; i++)
        if (name && !strcmp(name, readers[i].name)) fuzz.read = readers[i].read;
    if (!fuzz.read) die(EXIT_INPUT, "set READER to safetensors, shard, jsonl, config, manifest or state");
    snprintf(fuzz.folder, sizeof fuzz.folder, "/dev/shm/t6_fuzz_XXXXXX");
    if (!mkdtemp(fuzz.folder)) die(EXIT_SYSTEM, "%s: cannot create this folder: %s", fuzz.folder, strerror(errno));
    atexit(remove_files);
    Config c = default_config();
    c.n_layer = 1, c.n_embd = 4, c.n_head = 2, c.head_dim = 2, c.vocab_size = 3, c.hidden = 2;
    c.q_rank = c.k_rank = c.v_rank = 1;
    model_init(&fuzz.model, &c, 8);
    fuzz.params = (float *)xcalloc(fuzz.model.num_stored, sizeof *fuzz.params);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
    fuzz.read(data, bytes);
    return 0;
}
