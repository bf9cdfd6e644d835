// train_t6.c: T6, the transformer of "Tensor Product Attention Is All You Need" (arXiv 2501.06425), trained on the CPU.
//
// This program is the reference: fp32, one plain function per operation, forward beside backward. The GPU trainer is checked
// against it, and it is checked against finite differences and golden vectors (test_t6.c). It reads from top to bottom:
//   matrix product | operations, forward and backward | memory | the model | AdamW | what the training program needs
//
// Shapes, everywhere: B sequences of T tokens, N = B*T. C width, L layers, NH heads of HS numbers, D = NH*HS, F MLP width,
// V vocabulary. P: width of a token's row of factors, which make q, k and v (Heads in llmc/model.h). Dp, Fp, Pp, Vp are these
// as stored, padded with zeros. Gradients of x are called dx. Backward functions add to gradients of weights and of the
// residual stream (+=), and overwrite the others (=).
#include <omp.h>
#include <tgmath.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif
#ifdef USE_OPENBLAS
#include <cblas.h>
#endif

#include "llmc/trainer.h"

#ifndef REAL
#define REAL float      // test_t6.c compiles this file with double too, so that finite differences are sharp
#endif
typedef REAL real;

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
// gcc may then take exponentials by the vector in plain loops, with glibc's libmvec (at most 4 ulp off).
__attribute__((simd("notinbranch"))) float (expf)(float);
__attribute__((simd("notinbranch"))) double (exp)(double);
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Matrix product

typedef enum { AS_IS, TRANSPOSED } Layout;

// c (M, N) = beta * c + alpha * a b on one thread, row-major, beta 0 or 1. ldx: from one stored row of x to the next.
//   a is (M, K), or stored (K, M) when TRANSPOSED;  b is (K, N), or stored (N, K) when TRANSPOSED
void gemm(real *c, int64_t ldc, const real *a, int64_t lda, Layout a_is, const real *b, int64_t ldb, Layout b_is, int64_t M, int64_t N, int64_t K,
          real alpha, real beta) {
#ifdef USE_OPENBLAS
    CBLAS_TRANSPOSE ta = a_is == TRANSPOSED ? CblasTrans : CblasNoTrans, tb = b_is == TRANSPOSED ? CblasTrans : CblasNoTrans;
    _Generic(alpha, float: cblas_sgemm, double: cblas_dgemm)(CblasRowMajor, ta, tb, (int)M, (int)N, (int)K, alpha, (const void *)a, (int)lda,
                                                             (const void *)b, (int)ldb, beta, (void *)c, (int)ldc);
#else
    for (int64_t i = 0; i < M; i++) {
        real *row = c + i * ldc;
        for (int64_t j = 0; beta == 0 && j < N; j++) row[j] = 0;
        if (b_is == TRANSPOSED) {
            for (int64_t j = 0; j < N; j++) {
                real sum = 0;
                #pragma omp simd reduction(+:sum)
                for (int64_t k = 0; k < K; k++) sum += (a_is == TRANSPOSED ? a[k * lda + i] : a[i * lda + k]) * b[j * ldb + k];
                row[j] += alpha * sum;
            }
        } else {
            for (int64_t k = 0; k < K; k++) {
                real scale = alpha * (a_is == TRANSPOSED ? a[k * lda + i] : a[i * lda + k]);
                #pragma omp simd
                for (int64_t j = 0; j < N; j++) row[j] += scale * b[k * ldb + j];
            }
        }
    }
#endif
}

// The same product shared out among all threads in tiles of the output, 256 x 512 where that makes enough of them. Tiles depend on the
// shape alone and every element is one sum in one order, so the bits do not depend on the number of threads.
void matmul(real *c, int64_t ldc, const real *a, int64_t lda, Layout a_is, const real *b, int64_t ldb, Layout b_is, int64_t M, int64_t N, int64_t K,
            real beta) {
    int64_t tile_m = 256, tile_n = 512;
    while (((M - 1) / tile_m + 1) * ((N - 1) / tile_n + 1) < 16 && tile_n > 64) tile_n >= tile_m ? (tile_n /= 2) : (tile_m /= 2);
    #pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t i = 0; i < M; i += tile_m)
        for (int64_t j = 0; j < N; j += tile_n)
            gemm(c + i * ldc + j, ldc, a_is == TRANSPOSED ? a + i : a + i * lda, lda, a_is, b_is == TRANSPOSED ? b + j * ldb : b + j, ldb, b_is,
                 M - i < tile_m ? M - i : tile_m, N - j < tile_n ? N - j : tile_n, K, 1, beta);
}

// A linear layer without bias: out (N, OC) = inp (N, IC) w^T, w being (OC, IC). add = 1: out +=, for the residual stream.
void linear_forward(real *out, const real *inp, const real *w, int64_t N, int64_t IC, int64_t OC, int add) {
    matmul(out, OC, inp, IC, AS_IS, w, IC, TRANSPOSED, N, OC, IC, (real)add);
}

// dinp (N, IC) = dout (N, OC) w;  dw (OC, IC) += dout^T inp
void linear_backward(real *dinp, real *dw, const real *dout, const real *inp, const real *w, int64_t N, int64_t IC, int64_t OC) {
    matmul(dinp, IC, dout, OC, AS_IS, w, IC, AS_IS, N, IC, OC, 0);
    matmul(dw, IC, dout, OC, TRANSPOSED, inp, IC, AS_IS, OC, IC, N, 1);
}

// ---------------------------------------------------------------------------------------------------------------------
// Embedding: x (N, C) = rows idx (N) of wte (Vp, C)

void encoder_forward(real *x, const int32_t *idx, const real *wte, int64_t N, int64_t C) {
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++) memcpy(x + n * C, wte + idx[n] * C, (size_t)C * sizeof *x);
}

// Threads own columns, so that rows that meet (the same token twice) add up in one order.
void encoder_backward(real *dwte, const real *dx, const int32_t *idx, int64_t N, int64_t C) {
    #pragma omp parallel for
    for (int64_t c0 = 0; c0 < C; c0 += 64)
        for (int64_t n = 0; n < N; n++)
            for (int64_t c = c0; c < C && c < c0 + 64; c++) dwte[idx[n] * C + c] += dx[n * C + c];
}

// ---------------------------------------------------------------------------------------------------------------------
// RMSNorm without gain: out = x rstd, rstd = 1 / sqrt(mean(x^2) + eps). x, out (N, C), rstd (N)

void rmsnorm_forward(real *out, real *rstd, const real *x, int64_t N, int64_t C, double eps) {
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        const real *row = x + n * C;
        double sum = 0;
        #pragma omp simd reduction(+:sum)
        for (int64_t c = 0; c < C; c++) sum += (double)row[c] * row[c];
        real r = (real)(1 / sqrt(sum / (double)C + eps));
        for (int64_t c = 0; c < C; c++) out[n * C + c] = row[c] * r;
        rstd[n] = r;
    }
}

// dx += rstd (dout - out mean(dout out)): written with the output, so that x need not be kept.
void rmsnorm_backward(real *dx, const real *dout, const real *out, const real *rstd, int64_t N, int64_t C) {
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        double sum = 0;
        #pragma omp simd reduction(+:sum)
        for (int64_t c = 0; c < C; c++) sum += (double)dout[n * C + c] * out[n * C + c];
        real mean = (real)(sum / (double)C);
        for (int64_t c = 0; c < C; c++) dx[n * C + c] += rstd[n] * (dout[n * C + c] - out[n * C + c] * mean);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// RoPE on the vectors of a row of factors, in place: pair (i, i + HS/2) at position t turns by t base^(-2i/HS). For TPA this
// is R vectors a token instead of NH heads (paper, section 3.2).

typedef enum { ROTATE, ROTATE_BACK } Direction;

// table (T, HS): cosines in the first half of a row, sines in the second.
void rope_table(real *table, int64_t T, int64_t HS, double base) {
    for (int64_t t = 0; t < T; t++)
        for (int64_t i = 0; i < HS / 2; i++) {
            double angle = (double)t * pow(base, -2.0 * (double)i / (double)HS);
            table[t * HS + i] = (real)cos(angle), table[t * HS + HS / 2 + i] = (real)sin(angle);
        }
}

// fac (B, T, Pp): turns the vectors of `heads`. The gradient turns back, a rotation's inverse being its transpose.
void rope(real *fac, const Heads *heads, const real *table, int64_t B, int64_t T, int64_t HS, int64_t Pp, Direction direction) {
    if (!heads->rope) return;
    #pragma omp parallel for
    for (int64_t n = 0; n < B * T; n++) {
        const real *cosine = table + n % T * HS, *sine = cosine + HS / 2;
        for (int64_t r = 0; r < heads->R; r++) {
            real *x1 = fac + n * Pp + heads->b + r * HS, *x2 = x1 + HS / 2;
            for (int64_t i = 0; i < HS / 2; i++) {
                real c = cosine[i], s = direction == ROTATE ? sine[i] : -sine[i], x = x1[i], y = x2[i];
                x1[i] = x * c + y * s;
                x2[i] = y * c - x * s;
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Heads from factors: out (N, NH, HS), head i of a token = scale * sum_r a[i][r] b_r (Heads in llmc/model.h). fac (N, Pp)

void heads_forward(real *out, const real *fac, const Heads *heads, int64_t N, int64_t NH, int64_t HS, int64_t Pp) {
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        const real *a = fac + n * Pp + heads->a, *b = fac + n * Pp + heads->b;
        for (int64_t i = 0; i < NH; i++) {
            real *o = out + (n * NH + i) * HS;
            if (heads->kind == HEADS_GROUPED) {
                memcpy(o, b + i / (NH / heads->R) * HS, (size_t)HS * sizeof *o);
                continue;
            }
            memset(o, 0, (size_t)HS * sizeof *o);
            for (int64_t r = 0; r < heads->R; r++) {
                real weight = (real)heads->scale * a[i * heads->R + r];
                for (int64_t j = 0; j < HS; j++) o[j] += weight * b[r * HS + j];
            }
        }
    }
}

// da[i][r] = scale <dout_i, b_r>;  db_r = scale sum_i a[i][r] dout_i
void heads_backward(real *dfac, const real *dout, const real *fac, const Heads *heads, int64_t N, int64_t NH, int64_t HS, int64_t Pp) {
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        const real *a = fac + n * Pp + heads->a, *b = fac + n * Pp + heads->b;
        real *da = dfac + n * Pp + heads->a, *db = dfac + n * Pp + heads->b, scale = (real)heads->scale;
        memset(db, 0, (size_t)(heads->R * HS) * sizeof *db);
        for (int64_t i = 0; i < NH; i++) {
            const real *d = dout + (n * NH + i) * HS;
            for (int64_t r = 0; r < heads->R; r++) {
                if (heads->kind == HEADS_GROUPED && i / (NH / heads->R) != r) continue;
                real weight = heads->kind == HEADS_GROUPED ? 1 : scale * a[i * heads->R + r], sum = 0;
                for (int64_t j = 0; j < HS; j++) {
                    db[r * HS + j] += weight * d[j];
                    sum += d[j] * b[r * HS + j];
                }
                if (heads->kind == HEADS_FACTORED) da[i * heads->R + r] = scale * sum;
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Causal attention: y = softmax(q k^T / sqrt(HS)) v. q, k, v (B, T, NH, HS), y (B, T, Dp), lse (B, NH, T) the logarithm of
// each softmax's denominator. Blocks of QUERIES rows: the T x T matrix is never whole.

enum { QUERIES = 64 };

// p (rows, end) = exp(s - lse) for `rows` queries from t0, s = q k^T / sqrt(HS), masked to 0 beyond each query's own position.
// FIND_LSE writes the lse, USE_LSE reads it.
typedef enum { FIND_LSE, USE_LSE } LseMode;
static void attention_probabilities(real *p, real *lse, const real *q, const real *k, int64_t t0, int64_t rows, int64_t D, int64_t HS, LseMode mode) {
    int64_t end = t0 + rows;
    gemm(p, end, q, D, AS_IS, k, D, TRANSPOSED, rows, end, HS, (real)(1 / sqrt((double)HS)), 0);
    for (int64_t i = 0; i < rows; i++) {
        real *row = p + i * end;
        int64_t n = t0 + i + 1;
        real shift = lse[i];
        double sum = 0;
        if (mode == FIND_LSE) {
            shift = row[0];
            #pragma omp simd reduction(max:shift)
            for (int64_t j = 1; j < n; j++) shift = row[j] > shift ? row[j] : shift;
        }
        for (int64_t j = 0; j < n; j++) row[j] = exp(row[j] - shift);
        for (int64_t j = n; j < end; j++) row[j] = 0;
        if (mode == FIND_LSE) {
            #pragma omp simd reduction(+:sum)
            for (int64_t j = 0; j < n; j++) sum += row[j];
            lse[i] = shift + (real)log(sum);
            for (int64_t j = 0; j < n; j++) row[j] *= (real)(1 / sum);
        }
    }
}

// scratch (threads, 2, QUERIES, T), here and in the backward pass
void attention_forward(real *y, real *lse, real *scratch, const real *q, const real *k, const real *v, int64_t B, int64_t T, int64_t NH, int64_t HS,
                       int64_t Dp) {
    int64_t D = NH * HS;
    #pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < NH; h++) {
            real *p = scratch + omp_get_thread_num() * 2 * QUERIES * T;
            int64_t at = b * T * D + h * HS;
            for (int64_t t = 0; t < T; t += QUERIES) {
                int64_t rows = T - t < QUERIES ? T - t : QUERIES, end = t + rows;
                attention_probabilities(p, lse + (b * NH + h) * T + t, q + at + t * D, k + at, t, rows, D, HS, FIND_LSE);
                gemm(y + (b * T + t) * Dp + h * HS, Dp, p, end, AS_IS, v + at, D, AS_IS, rows, HS, end, 1, 0);
            }
        }
}

// With p rebuilt from lse and row sums delta = sum_j p dp = <dy, y>:
//   dv = p^T dy;  dp = dy v^T;  ds = p (dp - delta) / sqrt(HS);  dq = ds k;  dk = ds^T q
void attention_backward(real *dq, real *dk, real *dv, real *scratch, const real *dy, const real *y, const real *lse, const real *q, const real *k,
                        const real *v, int64_t B, int64_t T, int64_t NH, int64_t HS, int64_t Dp) {
    int64_t D = NH * HS;
    real scale = (real)(1 / sqrt((double)HS));
    #pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < NH; h++) {
            real *p = scratch + omp_get_thread_num() * 2 * QUERIES * T, *ds = p + QUERIES * T;
            int64_t at = b * T * D + h * HS;
            for (int64_t t = 0; t < T; t++) {
                memset(dk + at + t * D, 0, (size_t)HS * sizeof *dk);
                memset(dv + at + t * D, 0, (size_t)HS * sizeof *dv);
            }
            for (int64_t t = 0; t < T; t += QUERIES) {
                int64_t rows = T - t < QUERIES ? T - t : QUERIES, end = t + rows;
                const real *dy_t = dy + (b * T + t) * Dp + h * HS, *y_t = y + (b * T + t) * Dp + h * HS, *q_t = q + at + t * D;
                attention_probabilities(p, (real *)lse + (b * NH + h) * T + t, q_t, k + at, t, rows, D, HS, USE_LSE);
                gemm(dv + at, D, p, end, TRANSPOSED, dy_t, Dp, AS_IS, end, HS, rows, 1, 1);
                gemm(ds, end, dy_t, Dp, AS_IS, v + at, D, TRANSPOSED, rows, end, HS, 1, 0);
                for (int64_t i = 0; i < rows; i++) {
                    real delta = 0;
                    #pragma omp simd reduction(+:delta)
                    for (int64_t j = 0; j < HS; j++) delta += dy_t[i * Dp + j] * y_t[i * Dp + j];
                    for (int64_t j = 0; j < end; j++) ds[i * end + j] = p[i * end + j] * (ds[i * end + j] - delta) * scale;
                }
                gemm(dq + at + t * D, D, ds, end, AS_IS, k + at, D, AS_IS, rows, HS, end, 1, 0);
                gemm(dk + at, D, ds, end, TRANSPOSED, q_t, D, AS_IS, end, HS, rows, 1, 1);
            }
        }
}

// ---------------------------------------------------------------------------------------------------------------------
// SwiGLU: s (N, Fp) = silu(g) * z, the two halves of a row of u (N, 2 Fp); silu(g) = g / (1 + exp(-g))

void swiglu_forward(real *s, const real *u, int64_t N, int64_t Fp) {
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        const real *g = u + n * 2 * Fp, *z = g + Fp;
        for (int64_t f = 0; f < Fp; f++) s[n * Fp + f] = g[f] / (1 + exp(-g[f])) * z[f];
    }
}

// With sigma = 1 / (1 + exp(-g)):  dz = ds g sigma;  dg = ds z sigma (1 + g (1 - sigma))
void swiglu_backward(real *du, const real *ds, const real *u, int64_t N, int64_t Fp) {
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        const real *g = u + n * 2 * Fp, *z = g + Fp;
        real *dg = du + n * 2 * Fp, *dz = dg + Fp;
        for (int64_t f = 0; f < Fp; f++) {
            real sigma = 1 / (1 + exp(-g[f])), d = ds[n * Fp + f];
            dz[f] = d * g[f] * sigma;
            dg[f] = d * z[f] * sigma * (1 + g[f] * (1 - sigma));
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Classifier: logits = x wte^T, loss = -log softmax(logits)[target]. In chunks of rows, so that the logits are never whole;
// when training, a chunk's dlogits, dx and dwte follow at once.

enum { CLASSIFIER_ROWS = 256 };

// logits (rows, Vp) become dlogits = (softmax - onehot) * dloss in place, the padding beyond V exactly 0. Returns the sum of losses.
double softmax_cross_entropy(real *logits, const int32_t *targets, int64_t rows, int64_t V, int64_t Vp, double dloss) {
    double losses[CLASSIFIER_ROWS], total = 0;
    #pragma omp parallel for
    for (int64_t n = 0; n < rows; n++) {
        real *row = logits + n * Vp, largest = row[0];
        double sum = 0;
        #pragma omp simd reduction(max:largest)
        for (int64_t i = 1; i < V; i++) largest = row[i] > largest ? row[i] : largest;
        real at_target = row[targets[n]] - largest;
        for (int64_t i = 0; i < V; i++) row[i] = exp(row[i] - largest);
        #pragma omp simd reduction(+:sum)
        for (int64_t i = 0; i < V; i++) sum += row[i];
        losses[n] = log(sum) - at_target;
        real scale = (real)(dloss / sum);
        for (int64_t i = 0; i < V; i++) row[i] *= scale;
        for (int64_t i = V; i < Vp; i++) row[i] = 0;
        row[targets[n]] -= (real)dloss;
    }
    for (int64_t n = 0; n < rows; n++) total += losses[n];     // in order: the same bits with any number of threads
    return total;
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory: everything is planned, printed and checked against what the machine has before any of it is allocated.

typedef struct {
    // kept from the forward to the backward pass, one slice a layer
    real *n1, *rstd1;       // (L, N, C), (L, N)    normed input of attention
    real *fac;              // (L, N, Pp)           factors of q, k, v; the rotated ones rotated
    real *y, *lse;          // (L, N, Dp), (L, B, NH, T)
    real *n2, *rstd2;       // (L, N, C), (L, N)    normed input of the MLP
    real *u;                // (L, N, 2 Fp)
    // one for all layers
    real *x, *nf, *rstdf;   // (N, C), (N, C), (N)  residual stream, normed input of the classifier
    real *q, *k, *v;        // (N, D)               rebuilt from the factors in the backward pass
    real *s;                // (N, Fp)
    real *scratch;          // (threads, 2, QUERIES, T)  of attention
    real *logits;           // (CLASSIFIER_ROWS, Vp)
    real *rope;             // (T, HS)
    // gradients
    real *dx, *dn;          // (N, C)
    real *dq, *dk, *dv;     // (N, D)
    real *dfac, *dy;        // (N, Pp), (N, Dp)
    real *du, *ds;          // (N, 2 Fp), (N, Fp)
} Activations;

typedef struct { void **pointer; size_t elements, bytes; } Buffer;
enum { NUM_BUFFERS = 27 };

// The table behind Activations: where each pointer is and how much it needs.
static void activation_table(Activations *a, const Model *m, int64_t B, int64_t T, Buffer out[NUM_BUFFERS]) {
    const Config *c = &m->config;
    size_t L = (size_t)c->n_layer, N = (size_t)(B * T), C = (size_t)c->n_embd, D = (size_t)m->D, Dp = (size_t)m->Dp, Fp = (size_t)m->Fp, Pp = (size_t)m->Pp;
    size_t lse = (size_t)(B * c->n_head * T), logits = (size_t)(CLASSIFIER_ROWS * m->Vp), R = sizeof(real);
    size_t scratch = (size_t)(omp_get_max_threads() * 2 * QUERIES * T);
    const Buffer table[NUM_BUFFERS] = {
        {(void **)&a->n1, L * N * C, R}, {(void **)&a->rstd1, L * N, R}, {(void **)&a->fac, L * N * Pp, R}, {(void **)&a->y, L * N * Dp, R},
        {(void **)&a->lse, L * lse, R}, {(void **)&a->n2, L * N * C, R}, {(void **)&a->rstd2, L * N, R}, {(void **)&a->u, L * N * 2 * Fp, R},
        {(void **)&a->x, N * C, R}, {(void **)&a->nf, N * C, R}, {(void **)&a->rstdf, N, R},
        {(void **)&a->q, N * D, R}, {(void **)&a->k, N * D, R}, {(void **)&a->v, N * D, R}, {(void **)&a->s, N * Fp, R},
        {(void **)&a->scratch, scratch, R}, {(void **)&a->logits, logits, R}, {(void **)&a->rope, (size_t)(T * c->head_dim), R},
        {(void **)&a->dx, N * C, R}, {(void **)&a->dn, N * C, R}, {(void **)&a->dq, N * D, R}, {(void **)&a->dk, N * D, R}, {(void **)&a->dv, N * D, R},
        {(void **)&a->dfac, N * Pp, R}, {(void **)&a->dy, N * Dp, R}, {(void **)&a->du, N * 2 * Fp, R}, {(void **)&a->ds, N * Fp, R}};
    memcpy(out, table, sizeof table);
}

struct T6 {
    Model model;
    int64_t B, T;               // the largest batch there is room for
    real *params, *grads;       // (num_stored), laid out by model.tensors
    real *adam_m, *adam_v;      // (num_stored / moments.world)
    Slice moments;              // which slices those are
    Activations acts;
    struct Sums *sums;          // of several micro-batches and ranks; for the training program, below
};

// Bytes that t6_alloc will take for activations.
double activation_bytes(const Model *m, int64_t B, int64_t T) {
    Activations unused;
    Buffer table[NUM_BUFFERS];
    double bytes = 0;
    activation_table(&unused, m, B, T, table);
    for (int i = 0; i < NUM_BUFFERS; i++) bytes += (double)table[i].elements * (double)table[i].bytes;
    return bytes;
}

// Allocates what the model needs for batches up to B x T. Padding of every buffer starts at zero and stays so. world: ranks that share
// it out; moments: this rank's slices of them.
void t6_alloc(T6 *t, const Config *config, int64_t B, int64_t T, int pad, int world, Slice moments) {
    memset(t, 0, sizeof *t);
    model_init_shared(&t->model, config, pad, world);
    t->B = B, t->T = T, t->moments = moments;
    real **four[] = {&t->params, &t->grads, &t->adam_m, &t->adam_v};
    for (int i = 0; i < 4; i++) *four[i] = xcalloc(t->model.num_stored / (size_t)(i < 2 ? 1 : moments.world), sizeof(real));
    Buffer table[NUM_BUFFERS];
    activation_table(&t->acts, &t->model, B, T, table);
    for (int i = 0; i < NUM_BUFFERS; i++) *table[i].pointer = xcalloc(table[i].elements, table[i].bytes);
    rope_table(t->acts.rope, T, config->head_dim, config->rope_base);
}

void t6_free(T6 *t) {
    Buffer table[NUM_BUFFERS];
    activation_table(&t->acts, &t->model, t->B, t->T, table);
    for (int i = 0; i < NUM_BUFFERS; i++) free(*table[i].pointer);
    free(t->params), free(t->grads), free(t->adam_m), free(t->adam_v);
    model_free(&t->model);
}

// ---------------------------------------------------------------------------------------------------------------------
// The model

// q, k and v of layer l from its factors.
static void layer_qkv(T6 *t, int64_t l, int64_t N) {
    Activations *a = &t->acts;
    const Model *m = &t->model;
    const real *fac = a->fac + l * N * m->Pp;
    const Heads *heads[] = {&m->q, &m->k, &m->v};
    real *out[] = {a->q, a->k, a->v};
    for (int i = 0; i < 3; i++) heads_forward(out[i], fac, heads[i], N, m->config.n_head, m->config.head_dim, m->Pp);
}

// idx (B, T) -> acts.nf (N, C), the normed input of the classifier.
void t6_forward(T6 *t, const int32_t *idx, int64_t B, int64_t T) {
    const Model *m = &t->model;
    const Config *c = &m->config;
    Activations *a = &t->acts;
    int64_t N = B * T, C = c->n_embd, NH = c->n_head, HS = c->head_dim;
    encoder_forward(a->x, idx, t->params + m->wte, N, C);
    for (int64_t l = 0; l < c->n_layer; l++) {
        const real *w = t->params + m->layers + (size_t)l * m->layer_stride;
        real *n1 = a->n1 + l * N * C, *fac = a->fac + l * N * m->Pp, *y = a->y + l * N * m->Dp, *n2 = a->n2 + l * N * C, *u = a->u + l * N * 2 * m->Fp;

        rmsnorm_forward(n1, a->rstd1 + l * N, a->x, N, C, c->rms_eps);
        linear_forward(fac, n1, w + m->wqkv, N, C, m->Pp, 0);
        rope(fac, &m->q, a->rope, B, T, HS, m->Pp, ROTATE);
        rope(fac, &m->k, a->rope, B, T, HS, m->Pp, ROTATE);
        layer_qkv(t, l, N);
        attention_forward(y, a->lse + l * B * NH * T, a->scratch, a->q, a->k, a->v, B, T, NH, HS, m->Dp);
        linear_forward(a->x, y, w + m->wo, N, m->Dp, C, 1);

        rmsnorm_forward(n2, a->rstd2 + l * N, a->x, N, C, c->rms_eps);
        linear_forward(u, n2, w + m->w12, N, C, 2 * m->Fp, 0);
        swiglu_forward(a->s, u, N, m->Fp);
        linear_forward(a->x, a->s, w + m->w3, N, m->Fp, C, 1);
    }
    rmsnorm_forward(a->nf, a->rstdf, a->x, N, C, c->rms_eps);
}

// Sum of the N losses of the last forward pass. dloss != 0: also the gradients behind the classifier, each loss weighing dloss:
// acts.dn (N, C) and the head's share of dwte.
double t6_loss(T6 *t, const int32_t *targets, int64_t N, double dloss) {
    const Model *m = &t->model;
    Activations *a = &t->acts;
    int64_t C = m->config.n_embd;
    double total = 0;
    for (int64_t n = 0; n < N; n += CLASSIFIER_ROWS) {
        int64_t rows = N - n < CLASSIFIER_ROWS ? N - n : CLASSIFIER_ROWS;
        linear_forward(a->logits, a->nf + n * C, t->params + m->wte, rows, C, m->Vp, 0);
        total += softmax_cross_entropy(a->logits, targets + n, rows, m->config.vocab_size, m->Vp, dloss);
        if (dloss != 0) linear_backward(a->dn + n * C, t->grads + m->wte, a->logits, a->nf + n * C, t->params + m->wte, rows, C, m->Vp);
    }
    return total;
}

// From acts.dn to the gradients of all weights, which are added to what is there.
void t6_backward(T6 *t, const int32_t *idx, int64_t B, int64_t T) {
    const Model *m = &t->model;
    const Config *c = &m->config;
    Activations *a = &t->acts;
    int64_t N = B * T, C = c->n_embd, NH = c->n_head, HS = c->head_dim;
    memset(a->dx, 0, (size_t)(N * C) * sizeof *a->dx);
    rmsnorm_backward(a->dx, a->dn, a->nf, a->rstdf, N, C);
    for (int64_t l = c->n_layer - 1; l >= 0; l--) {
        size_t at = m->layers + (size_t)l * m->layer_stride;
        const real *w = t->params + at;
        real *dw = t->grads + at;
        const real *n1 = a->n1 + l * N * C, *fac = a->fac + l * N * m->Pp, *y = a->y + l * N * m->Dp, *n2 = a->n2 + l * N * C, *u = a->u + l * N * 2 * m->Fp;

        swiglu_forward(a->s, u, N, m->Fp);
        linear_backward(a->ds, dw + m->w3, a->dx, a->s, w + m->w3, N, m->Fp, C);
        swiglu_backward(a->du, a->ds, u, N, m->Fp);
        linear_backward(a->dn, dw + m->w12, a->du, n2, w + m->w12, N, C, 2 * m->Fp);
        rmsnorm_backward(a->dx, a->dn, n2, a->rstd2 + l * N, N, C);

        linear_backward(a->dy, dw + m->wo, a->dx, y, w + m->wo, N, m->Dp, C);
        layer_qkv(t, l, N);
        attention_backward(a->dq, a->dk, a->dv, a->scratch, a->dy, y, a->lse + l * B * NH * T, a->q, a->k, a->v, B, T, NH, HS, m->Dp);
        heads_backward(a->dfac, a->dq, fac, &m->q, N, NH, HS, m->Pp);
        heads_backward(a->dfac, a->dk, fac, &m->k, N, NH, HS, m->Pp);
        heads_backward(a->dfac, a->dv, fac, &m->v, N, NH, HS, m->Pp);
        rope(a->dfac, &m->q, a->rope, B, T, HS, m->Pp, ROTATE_BACK);
        rope(a->dfac, &m->k, a->rope, B, T, HS, m->Pp, ROTATE_BACK);
        linear_backward(a->dn, dw + m->wqkv, a->dfac, n1, w + m->wqkv, N, C, m->Pp);
        rmsnorm_backward(a->dx, a->dn, n1, a->rstd1 + l * N, N, C);
    }
    encoder_backward(t->grads + m->wte, a->dx, idx, N, C);
}

// Logits of token n of the last forward pass, into out (V).
void t6_logits(const T6 *t, int64_t n, real *out) {
    const Model *m = &t->model;
    matmul(out, m->config.vocab_size, t->acts.nf + n * m->config.n_embd, m->config.n_embd, AS_IS, t->params + m->wte, m->config.n_embd, TRANSPOSED,
           1, m->config.vocab_size, m->config.n_embd, 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Update

// Norm of all gradients together. sum: the slices that this rank has of them. Squares are summed over SLICE_UNIT numbers at a time, and
// those sums added up in order: the same bits with any number of threads and ranks.
double gradient_norm(const Model *m, const real *sum, Comm *comm) {
    size_t world = (size_t)comm_world(comm), rank = (size_t)comm_rank(comm), units = 0, at = 0;
    for (int k = 0; k < model_buckets(m); k++) units += (model_bucket(m, k).size + SLICE_UNIT - 1) / SLICE_UNIT;
    double *squares = xcalloc(units, sizeof *squares), total = 0;
    for (int k = 0; k < model_buckets(m); k++) {
        Bucket b = model_bucket(m, k);
        const real *g = sum + b.offset / world;
        size_t n = b.size / world, first = at + rank * (n / SLICE_UNIT);
        #pragma omp parallel for
        for (size_t i = 0; i < n; i += SLICE_UNIT)
            for (size_t j = i; j < n && j < i + SLICE_UNIT; j++) squares[first + i / SLICE_UNIT] += (double)g[j] * g[j];
        at += (b.size + SLICE_UNIT - 1) / SLICE_UNIT;
    }
    comm_sum(comm, squares, units, "norm of the gradients");
    for (size_t i = 0; i < units; i++) total += squares[i];
    free(squares);
    return sqrt(total);
}

typedef struct { double lr, beta1, beta2, eps, weight_decay; } AdamW;

// One step of AdamW (Loshchilov & Hutter 2019, as PyTorch computes it), number `step` = 1, 2, ..., on n weights; gradients count
// grad_scale times.
void adamw_update(real *w, real *m, real *v, const real *dw, size_t n, const AdamW *o, int64_t step, double grad_scale) {
    real decay = (real)(1 - o->lr * o->weight_decay), rate = (real)(o->lr / (1 - pow(o->beta1, (double)step)));
    real root = (real)sqrt(1 - pow(o->beta2, (double)step)), beta1 = (real)o->beta1, beta2 = (real)o->beta2, eps = (real)o->eps, scale = (real)grad_scale;
    #pragma omp parallel for
    for (size_t i = 0; i < n; i++) {
        real g = dw[i] * scale;
        m[i] = beta1 * m[i] + (1 - beta1) * g;
        v[i] = beta2 * v[i] + (1 - beta2) * g * g;
        w[i] = w[i] * decay - rate * m[i] / (sqrt(v[i]) / root + eps);
    }
}

// What to multiply gradients of this norm by so that it is at most max_norm (as torch.nn.utils.clip_grad_norm_). 0: never clip.
double clip_factor(double norm, double max_norm) {
    double factor = max_norm / (norm + 1e-6);
    return max_norm > 0 && factor < 1 ? factor : 1;
}

void t6_zero_gradients(T6 *t) { memset(t->grads, 0, t->model.num_stored * sizeof *t->grads); }

// =====================================================================================================================
// What the training program (llmc/trainer.h) needs. test_t6.c includes the model above without it.
#ifndef T6_MODEL_ONLY

int trainer_pad(void) { return 1; }

// Gradients of a step. Micro-batch g of the step belongs to rank g % world, and after each round of micro-batches every rank gets its
// slices of all their gradients and adds them to its sum, in the order of the micro-batches: (g0 + g1) + g2 ... Every sum in this
// program is taken in an order that the number of ranks and threads has no part in, and so is every bit of a run. That costs an exchange
// for each micro-batch instead of one a step, little beside the time a CPU takes for it. (The GPU trainer adds up first.)
//   stage 0: the sums are gathered, and every rank updates all weights;  1 and 2: every rank updates its slices, and weights are gathered
// A gradient is whole for one micro-batch only, at every stage; stage 2 has nothing left to share out here.
struct Sums {
    Comm *comm;
    int64_t zero;
    int64_t micro_batches;      // a step
    real *grads;                // (num_stored / world) the sums; of one micro-batch by one rank, T6's own gradients
    real *scratch;              // (largest bucket) what the other ranks send
    double *losses;             // (micro_batches) each one's sum
    SpikeLimits limits;
};

static int sums_apart(const TrainOptions *o) { return comm_world(o->comm) > 1 || o->accum > 1; }

// Numbers below 1e-38 count as zero, in this thread and those it starts: sharp attention makes many, and arithmetic with them is so
// slow that a step took twice its time. No gradient is near them.
static void flush_denormals(void) {
#ifdef __SSE2__
    _mm_setcsr(_mm_getcsr() | 0x8040);      // flush to zero, denormals are zero
#endif
}

void trainer_start(TrainOptions *o) {
    int ranks = o->comm ? o->comm->local_world : 1, share = (int)sysconf(_SC_NPROCESSORS_ONLN) / ranks;
    if (comm_world(o->comm) > 1 && !o->comm->run) die(EXIT_INPUT, "--comm-file is for GPUs: ranks on CPUs meet over MPI, started by mpirun or srun --mpi=pmix");
    flush_denormals();
    if (o->threads > 0) omp_set_num_threads((int)o->threads);
    else if (ranks > 1 && share < omp_get_max_threads()) omp_set_num_threads(share > 0 ? share : 1);
#ifdef USE_OPENBLAS
    openblas_set_num_threads(1);    // matmul shares the work out itself
#endif
}

void trainer_describe(char *out, size_t size) {
    char library[64];
    snprintf(out, size, "CPU, %d threads, %s", omp_get_max_threads(), comm_library(library));
}

static double available_memory_bytes(void) {
    double kib = 0;
    char line[256];
    FILE *f = fopen("/proc/meminfo", "r");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "MemAvailable: %lf", &kib) == 1) break;
    if (f) fclose(f);
    return kib > 0 ? kib * 1024 : INFINITY;
}

void trainer_plan(const TrainOptions *o, const Model *m, Logger *log) {
    double weights = (double)m->num_stored * sizeof(real), acts = activation_bytes(m, o->batch_size, o->seq_len), world = comm_world(o->comm);
    double grads = weights + (sums_apart(o) ? weights / world : 0) + (world > 1 ? (double)(model_largest_bucket(m) * sizeof(real)) : 0);
    double moments = 2 * weights / (o->zero ? world : 1), ranks = o->comm ? o->comm->local_world : 1;
    double need = (weights + grads + moments + acts) * ranks, have = available_memory_bytes(), GiB = 0x1p30;
    char times[32] = "";
    if (ranks > 1) snprintf(times, sizeof times, ", %.0f ranks here:", ranks);
    logger_printf(log, "memory: weights %.2f + gradients %.2f + AdamW %.2f + activations %.2f%s = %.2f GiB of %.2f available\n",
                  weights / GiB, grads / GiB, moments / GiB, acts / GiB, times, need / GiB, have / GiB);
    if (need > have)
        die(EXIT_INPUT, "this run needs %.1f GiB of memory and %.1f are available: lower --batch-size (-b) or --seq-len (-t), or take a smaller --model (-e)",
            need / GiB, have / GiB);
}

T6 *trainer_open(const TrainOptions *o) {
    T6 *t = xmalloc(sizeof *t);
    struct Sums *s = t->sums = xcalloc(1, sizeof *s);
    int rank = comm_rank(o->comm), world = comm_world(o->comm);
    t6_alloc(t, &o->config, o->batch_size, o->seq_len, trainer_pad(), world, o->zero ? (Slice){rank, world} : (Slice){0, 1});
    t->sums = s;
    s->comm = o->comm, s->zero = o->zero, s->micro_batches = o->accum > 0 ? o->accum : 1, s->limits = (SpikeLimits){INFINITY, INFINITY};
    s->grads = sums_apart(o) ? xcalloc(t->model.num_stored / (size_t)world, sizeof(real)) : t->grads;
    s->scratch = world > 1 ? xmalloc(model_largest_bucket(&t->model) * sizeof(real)) : NULL;
    s->losses = xcalloc((size_t)s->micro_batches, sizeof *s->losses);
    return t;
}

void trainer_close(T6 *t) {
    if (t->sums->grads != t->grads) free(t->sums->grads);
    free(t->sums->scratch), free(t->sums->losses), free(t->sums);
    t6_free(t);
    free(t);
}

const Model *trainer_model(T6 *t) { return &t->model; }

// The model's own memory is host memory: there is nothing to copy either way.
HostWeights trainer_host_weights(T6 *t, int read) { (void)read; return (HostWeights){t->params, t->adam_m, t->adam_v, t->moments}; }
void trainer_take_weights(T6 *t, int moments) { (void)t, (void)moments; }

double trainer_loss(T6 *t, const int32_t *inputs, const int32_t *targets, int64_t B) {
    t6_forward(t, inputs, B, t->T);
    return t6_loss(t, targets, B * t->T, 0);
}

void trainer_micro_step(T6 *t, const int32_t *inputs, const int32_t *targets, double dloss, int64_t k) {
    struct Sums *s = t->sums;
    const Model *m = &t->model;
    int world = comm_world(s->comm), givers = s->micro_batches - k * world < world ? (int)(s->micro_batches - k * world) : world;
    if (k == 0) {
        memset(s->losses, 0, (size_t)s->micro_batches * sizeof *s->losses);
        if (s->grads != t->grads) memset(s->grads, 0, m->num_stored / (size_t)world * sizeof *s->grads);
    }
    if (inputs) {
        t6_zero_gradients(t);
        t6_forward(t, inputs, t->B, t->T);
        s->losses[k * world + comm_rank(s->comm)] = t6_loss(t, targets, t->B * t->T, dloss);
        t6_backward(t, inputs, t->B, t->T);
    }
    for (int i = 0; s->grads != t->grads && i < model_buckets(m); i++) {
        Bucket b = model_bucket(m, i);
        comm_reduce_scatter(s->comm, s->grads + b.offset / (size_t)world, t->grads + b.offset, s->scratch, b.size / (size_t)world, givers, "gradients");
    }
}

void trainer_limits(T6 *t, SpikeLimits limits) { t->sums->limits = limits; }

void trainer_update(T6 *t, const TrainOptions *o, double lr, int64_t step, double *loss, double *norm) {
    struct Sums *s = t->sums;
    const Model *m = &t->model;
    Slice mine = {comm_rank(s->comm), comm_world(s->comm)};
    AdamW options = {lr, o->beta1, o->beta2, o->adam_eps, o->weight_decay};
    comm_sum(s->comm, s->losses, (size_t)s->micro_batches, "losses");
    *loss = 0;
    for (int64_t i = 0; i < s->micro_batches; i++) *loss += s->losses[i];
    *norm = gradient_norm(m, s->grads, s->comm);
    if (!isfinite(*norm) || *loss > s->limits.loss || *norm > s->limits.norm) return;
    for (int k = 0; k < model_buckets(m); k++) {
        Bucket b = model_bucket(m, k), slice = model_slice(m, mine, k);
        const real *grads = s->grads + b.offset / (size_t)mine.world;
        size_t part = slice.size;
        if (mine.world > 1 && s->zero == 0) {
            memcpy(t->grads + slice.offset, grads, part * sizeof *grads);
            comm_all_gather(s->comm, t->grads + b.offset, part, "sums of gradients");
            grads = t->grads + b.offset, slice = b;
        }
        size_t at = b.offset / (size_t)t->moments.world;
        adamw_update(t->params + slice.offset, t->adam_m + at, t->adam_v + at, grads, slice.size, &options, step, clip_factor(*norm, o->clip));
        if (s->zero) comm_all_gather(s->comm, t->params + b.offset, part, "weights");
    }
}

void trainer_logits(T6 *t, float *logits, const int32_t *ids, int64_t n) {
    t6_forward(t, ids, 1, n);
    t6_logits(t, n - 1, logits);
}

const float *trainer_gradients(T6 *t) { return t->sums->grads; }      // for test_t6.cu, which links this without main

#ifndef T6_NO_MAIN
int main(int argc, char **argv) {
    return trainer_main(argc, argv, "train_t6: trains T6, the tensor product attention transformer, on the CPU. Without flags: tiny, on the toy corpus.");
}
#endif
#endif
