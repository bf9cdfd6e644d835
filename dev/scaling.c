// A model of how training scales to many GPUs: compute times measured on one H200 (dev/results/train_gpu.md), link
// speeds as published, and what train_t6.cu does with them. Prints the tables of dev/results/scaling.md.
//
//   gcc -O2 -I. dev/scaling.c -o build/scaling -lcjson -lm && build/scaling
//
// Every assumption is a constant below, and scaling.md explains it.
#include "llmc/model.h"

// Measured: one micro-step (forward and backward of B x 1024 tokens).
typedef struct { const char *preset; int B; double micro_ms; } Measured;
static const Measured measured[] = {{"124M", 24, 51.6}, {"353M", 20, 119.0}, {"773M", 15, 189.7}, {"1.5B", 6, 155.2}};

static const double UPDATE_BYTES = 30, UPDATE_GBps = 3670;      // per weight, of AdamW and the norm
static const double FORWARD_SHARE = 1.0 / 3;                    // of a micro-step
static const double NVLINK_GBps = 450, NETWORK_GBps = 50;       // per GPU and direction: NVLink 4; a 400 Gb/s adapter
static const double LINK_USE = 0.8;                             // share of a link's speed that a collective reaches
static const double HOP_ms = 0.01;                              // start of a collective, times log2 of the ranks
static const int NODE = 8;                                      // GPUs per machine

// Milliseconds to sum or gather one bucket: inside the machine over NVLink, then each GPU its eighth over its adapter.
static double half_collective_ms(double bytes, int world) {
    int in = world < NODE ? world : NODE, nodes = world / in;
    double ms = HOP_ms * log2(world) + bytes * (in - 1) / in / (NVLINK_GBps * LINK_USE) / 1e6;
    return nodes > 1 ? ms + bytes / in * (nodes - 1) / nodes / (NETWORK_GBps * LINK_USE) / 1e6 : ms;
}

typedef struct { double ms, efficiency; } Step;

// One step of `micro` micro-batches per rank, each taking micro_ms.
static Step step_ms(const Model *m, double micro_ms, int zero, int world, double micro) {
    // weights: wte lies before the layers
    double wte = (double)m->layers, layer = (double)m->layer_stride, L = (double)m->config.n_layer;
    double update = (double)m->num_stored * UPDATE_BYTES / UPDATE_GBps / 1e6;
    double forward = micro_ms * FORWARD_SHARE, backward = micro_ms - forward;
    // fp32 gradients; stage 0 gathers the sums too (all-reduce)
    double sum_layers = L * half_collective_ms(4 * layer, world), sum_wte = half_collective_ms(4 * wte, world);
    if (zero == 0) sum_layers *= 2, sum_wte *= 2;
    double hidden = sum_layers < backward ? sum_layers : backward;
    double exposed = sum_layers - hidden + sum_wte;     // wte's gradient is complete only when the backward pass ends
    // stage 2 sums after each micro-batch, which the next one's forward pass hides too
    if (zero == 2) exposed += (micro - 1) * fmax(0, sum_layers + sum_wte - micro_ms);
    if (zero > 0) {                                     // bf16 weights; the next forward pass begins with wte
        double gather_layers = L * half_collective_ms(2 * layer, world);
        exposed += half_collective_ms(2 * wte, world) + fmax(0, gather_layers - forward);
    }
    double ideal = micro * micro_ms + update, ms = micro * micro_ms + (zero ? update / world : update) + exposed;
    return (Step){ms, ideal / ms};
}

// GiB per rank, in bytes per weight: bf16 weights 2, fp32 master weights and moments 12, fp32 gradients 4. Stage 1 adds
// the share of the summed gradients; stage 2 keeps that share and two buckets.
static double weights_GiB(const Model *m, int zero, double world) {
    double n = (double)m->num_stored, two_buckets = (double)(m->layers + 2 * m->layer_stride);
    double optimizer = zero ? 12 * n / world : 12 * n;
    double gradients = zero == 2 ? 4 * two_buckets + 4 * n / world : zero ? 4 * n + 4 * n / world : 4 * n;
    return (2 * n + optimizer + gradients) / 0x1p30;
}

enum { STRONG, WEAK, NUM_SCALINGS };        // the paper's batch shared out; one micro-batch per GPU, however many

int main(void) {
    const int worlds[] = {8, 64, 512, 4096};
    const int num_worlds[NUM_SCALINGS] = {3, 4};
    const char *const captions[NUM_SCALINGS] = {
        "The paper's 480 sequences per step (512 on 64 and 512 GPUs), shared out",
        "One micro-batch per GPU and step",
    };
    for (int scaling = WEAK; scaling >= STRONG; scaling--) {
        printf("\n%s: ms per step, and the efficiency relative to one GPU\n\n", captions[scaling]);
        printf("| model, B | ZeRO | memory for weights on 8, 64 GPUs |");
        for (int w = 0; w < num_worlds[scaling]; w++) printf(" %d GPUs |", worlds[w]);
        printf("\n|---|---|---|");
        for (int w = 0; w < num_worlds[scaling]; w++) printf("---|");
        printf("\n");
        for (size_t i = 0; i < sizeof measured / sizeof *measured; i++) {
            const Measured *x = &measured[i];
            Config c = preset_config(find_preset(x->preset), ATTN_TPA);
            Model m;
            model_init(&m, &c, 8);
            for (int zero = 0; zero <= 2; zero++) {
                printf("| %s, %d | %d | %.1f, %.1f GiB |", x->preset, x->B, zero,
                       weights_GiB(&m, zero, worlds[0]), weights_GiB(&m, zero, worlds[1]));
                for (int w = 0; w < num_worlds[scaling]; w++) {
                    double micro = 1, B = x->B;
                    if (scaling == STRONG) {
                        double sequences = fmax(480, worlds[w] > 8 ? 512 : 480) / worlds[w];
                        micro = ceil(sequences / x->B), B = sequences / micro;
                    }
                    Step s = step_ms(&m, x->micro_ms * B / x->B, zero, worlds[w], micro);
                    printf(" %.1f (%.0f%%) |", s.ms, 100 * s.efficiency);
                }
                printf("\n");
            }
            model_free(&m);
        }
    }
    return 0;
}
