// A model of how training scales to many GPUs: compute times measured on one H200 (dev/results/train_gpu.md), link speeds as published,
// and what train_t6.cu does with them. Prints the tables of dev/results/scaling.md.
//
//   gcc -O2 -I. dev/scaling.c -o build/scaling -lcjson -lm && build/scaling
//
// Every assumption is a constant here, and is spelled out in scaling.md.
#include "llmc/model.h"

// Measured: one micro-step (forward and backward of B x 1024 tokens).
typedef struct { const char *preset; int B; double micro_ms; } Measured;
static const Measured measured[] = {{"124M", 24, 51.6}, {"353M", 20, 119.0}, {"773M", 15, 189.7}, {"1.5B", 6, 155.2}};

static const double UPDATE_BYTES = 30, UPDATE_GBps = 3670;      // of AdamW and the norm, a weight
static const double FORWARD_SHARE = 1.0 / 3;                    // of a micro-step
static const double NVLINK_GBps = 450, NETWORK_GBps = 50;       // a GPU and direction: NVLink 4; one 400 Gb/s adapter a GPU
static const double LINK_USE = 0.8;                             // share of a link's speed that a collective reaches
static const double HOP_ms = 0.01;                              // start of a collective, times log2 of the ranks
static const int NODE = 8;                                      // GPUs of a machine

// Seconds of summing or gathering one bucket of `bytes`: in the machine over NVLink, then each GPU its eighth over its own adapter.
static double half_collective_ms(double bytes, int world) {
    int in = world < NODE ? world : NODE, nodes = world / in;
    double ms = HOP_ms * log2(world) + bytes * (in - 1) / in / (NVLINK_GBps * LINK_USE) / 1e6;
    return nodes > 1 ? ms + bytes / in * (nodes - 1) / nodes / (NETWORK_GBps * LINK_USE) / 1e6 : ms;
}

typedef struct { double ms, efficiency; } Step;

// One step of `micro` micro-batches a rank, each taking `share` of the measured one.
static Step step_ms(const Model *m, double micro_ms, int zero, int world, double micro) {
    double wte = (double)m->layers, layer = (double)m->layer_stride, L = (double)m->config.n_layer, n = (double)m->num_stored;
    double forward = micro_ms * FORWARD_SHARE, backward = micro_ms - forward, update = n * UPDATE_BYTES / UPDATE_GBps / 1e6, exposed = 0;
    double sum_layers = L * half_collective_ms(4 * layer, world), sum_wte = half_collective_ms(4 * wte, world);     // fp32 gradients
    if (zero == 0) sum_layers *= 2, sum_wte *= 2;       // all-reduce: summed and gathered
    double hidden = sum_layers < backward ? sum_layers : backward;
    exposed = sum_layers - hidden + sum_wte;            // wte's gradient is there only when the backward pass ends
    // stage 2 sums after each micro-batch, but behind the next one's forward pass too
    if (zero == 2) exposed += (micro - 1) * fmax(0, sum_layers + sum_wte - micro_ms);
    if (zero > 0) {
        double gather_layers = L * half_collective_ms(2 * layer, world), gather_wte = half_collective_ms(2 * wte, world);   // bf16 weights
        exposed += gather_wte + fmax(0, gather_layers - forward);       // the next forward pass begins with wte
    }
    double ideal = micro * micro_ms + update, ms = micro * micro_ms + (zero ? update / world : update) + exposed;
    return (Step){ms, ideal / ms};
}

int main(void) {
    const int worlds[] = {8, 64, 512, 4096};
    for (int weak = 1; weak >= 0; weak--) {
        printf(weak ? "\nOne micro-batch a GPU and step: ms a step, and the efficiency beside one GPU\n\n"
                    : "\nThe paper's 480 sequences a step (512 on 64 and 512 GPUs), shared out: ms a step, and the efficiency beside one GPU\n\n");
        printf("| model, B | ZeRO | memory for weights on 8, 64 GPUs |");
        for (int w = 0; w < 4; w++) if (weak || worlds[w] <= 512) printf(" %d GPUs |", worlds[w]);
        printf("\n|---|---|---|---|---|---|%s\n", weak ? "---|" : "");
        for (size_t i = 0; i < sizeof measured / sizeof *measured; i++) {
            const Measured *x = &measured[i];
            Config c = preset_config(find_preset(x->preset), ATTN_TPA);
            Model m;
            model_init(&m, &c, 8);
            double n = (double)m.num_stored, two = (double)(m.layers + 2 * m.layer_stride);
            for (int zero = 0; zero <= 2; zero++) {
                double GiB[2];
                for (int k = 0; k < 2; k++) {
                    double W = worlds[k];
                    GiB[k] = (2 * n + (zero ? 12 * n / W : 12 * n) + (zero == 2 ? 4 * two + 4 * n / W : zero ? 4 * n + 4 * n / W : 4 * n)) / 0x1p30;
                }
                printf("| %s, %d | %d | %.1f, %.1f GiB |", x->preset, x->B, zero, GiB[0], GiB[1]);
                for (int w = 0; w < 4; w++) {
                    if (!weak && worlds[w] > 512) continue;
                    double sequences = fmax(480, worlds[w] > 8 ? 512 : 480) / worlds[w], micro = weak ? 1 : ceil(sequences / x->B), B = weak ? x->B : sequences / micro;
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
