// train_t6.c: T6, the transformer of "Tensor Product Attention Is All You Need" (arXiv 2501.06425), trained on the CPU.
//
// Tensor product attention (TPA) makes the queries, keys and values of a token from factors that are linear in the
// token's normed vector n: R head factors a_r (NH) and R token factors b_r (HSK, for v HSV); R is RQ, RK or RV.
//
//     q = 1/RQ sum_r aQ_r (x) rope(bQ_r)      k = 1/RK sum_r aK_r (x) rope(bK_r)      v = 1/RV sum_r aV_r (x) bV_r
//     y = softmax(q k^T / sqrt(HSK), causal) v, head by head
//     x += y Wo^T
// then the MLP (SwiGLU):  x += (silu(n W1^T) * (n W2^T)) W3^T
// and after the last layer, with the embedding as output weights:  logits = n wte^T
//
// All factors of a token are one row of one matrix product, n Wqkv^T:
//
//     |   aQ    |    bQ    |   aK    |    bK    |   aV    |    bV    | pad |
//     | NH x RQ | RQ x HSK | NH x RK | RK x HSK | NH x RV | RV x HSV |     |      P numbers, stored as Pp
//
// Decoding caches only aK bK aV bV. MHA, GQA and MQA are the same model with fixed a (Heads, llmc/model.h). Variants of
// TPA make that row from another one; MLA makes q, k and v in its own way.
//
// This program is the reference: fp32, one plain function per operator, each forward next to its backward. The GPU
// trainer is checked against it; test_t6.c checks it against finite differences and golden vectors. Reading order:
//     matrix product | operators | memory | the model | update | the training program
//
// Shapes:  B sequences of T tokens, N = B*T      C width       L layers          F MLP width        V vocabulary
//          NH heads                              HSK numbers of a query/key head, HSV of a value head, D = NH*HSV
//          RQ, RK, RV ranks of q, k, v           P width of a projected row      Dp, Fp, Pp, Vp: as stored, zero-padded
//                                                PF width of a variant's factor row
// The gradient of x is dx. Backward functions add to the gradients of weights and of the residual stream (+=) and
// overwrite all others (=).
#include <omp.h>

#include "llmc/comm.h"
#include "llmc/cpu.h"
#include "llmc/host_memory.h"
#include "train_t6.h"

// ---------------------------------------------------------------------------------------------------------------------
// Matrix product

// out (M, N) = beta * out + alpha * left right on one thread, row-major, beta 0 or 1. ldo, ldl, ldr: elements from one
// stored row of out, left, right to the next.
//   left is (M, K), or stored (K, M) when TRANSPOSED;  right is (K, N), or stored (N, K) when TRANSPOSED
void gemm(real *out, int64_t ldo, const real *left, int64_t ldl, Layout left_is, const real *right, int64_t ldr,
          Layout right_is, int64_t M, int64_t N, int64_t K, real alpha, real beta) {
#ifdef USE_OPENBLAS
    blas_gemm(out, ldo, left, ldl, left_is, right, ldr, right_is, M, N, K, alpha, beta);
#else
    for (int64_t i = 0; i < M; i++) {
        real *row = out + i * ldo;
        for (int64_t j = 0; beta == 0 && j < N; j++) row[j] = 0;
        if (right_is == TRANSPOSED) {
            for (int64_t j = 0; j < N; j++) {
                real sum = 0;
                #pragma omp simd reduction(+:sum)
                for (int64_t k = 0; k < K; k++)
                    sum += (left_is == TRANSPOSED ? left[k * ldl + i] : left[i * ldl + k]) * right[j * ldr + k];
                row[j] += alpha * sum;
            }
        } else {
            for (int64_t k = 0; k < K; k++) {
                real scale = alpha * (left_is == TRANSPOSED ? left[k * ldl + i] : left[i * ldl + k]);
                #pragma omp simd
                for (int64_t j = 0; j < N; j++) row[j] += scale * right[k * ldr + j];
            }
        }
    }
#endif
}

// The same product on all threads, out = left right or out += left right, in tiles of the output: 256 x 512, halved
// while there are fewer than 16. Tiles depend on the shape alone and each element is one sum in one order, so the bits
// do not depend on the number of threads.
void matmul(real *out, int64_t ldo, const real *left, int64_t ldl, Layout left_is, const real *right, int64_t ldr,
            Layout right_is, int64_t M, int64_t N, int64_t K, OutputMode mode) {
    int64_t tile_m = 256, tile_n = 512;
    while (((M - 1) / tile_m + 1) * ((N - 1) / tile_n + 1) < 16 && tile_n > 64)
        tile_n >= tile_m ? (tile_n /= 2) : (tile_m /= 2);
    #pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t i = 0; i < M; i += tile_m)
        for (int64_t j = 0; j < N; j += tile_n)
            gemm(out + i * ldo + j, ldo, left_is == TRANSPOSED ? left + i : left + i * ldl, ldl, left_is,
                 right_is == TRANSPOSED ? right + j * ldr : right + j, ldr, right_is, M - i < tile_m ? M - i : tile_m,
                 N - j < tile_n ? N - j : tile_n, K, 1, mode == ACCUMULATE);
}

// A linear layer without bias: out (N, OC) = inp (N, IC) w^T, w (OC, IC). ACCUMULATE: out +=, for the residual stream.
void linear_forward(real *out, const real *inp, const real *w, int64_t N, int64_t IC, int64_t OC, OutputMode mode) {
    matmul(out, OC, inp, IC, AS_IS, w, IC, TRANSPOSED, N, OC, IC, mode);
}

// dinp (N, IC) = dout (N, OC) w;  dw (OC, IC) += dout^T inp
void linear_backward(real *dinp, real *dw, const real *dout, const real *inp, const real *w, int64_t N, int64_t IC,
                     int64_t OC) {
    matmul(dinp, IC, dout, OC, AS_IS, w, IC, AS_IS, N, IC, OC, OVERWRITE);
    matmul(dw, IC, dout, OC, TRANSPOSED, inp, IC, AS_IS, OC, IC, N, ACCUMULATE);
}

// ---------------------------------------------------------------------------------------------------------------------
// Embedding: x (N, C) = rows idx (N) of wte (Vp, C)

void encoder_forward(real *x, const int32_t *idx, const real *wte, int64_t N, int64_t C) {
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++) memcpy(x + n * C, wte + idx[n] * C, (size_t)C * sizeof *x);
}

// dwte[idx[n]] += dx[n]. A thread adds up whole columns, so a token that occurs twice is summed in one order.
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

// dx += or = rstd (dout - out mean(dout out)), in terms of the output, so that x need not be kept. dx may be dout.
void rmsnorm_backward(real *dx, const real *dout, const real *out, const real *rstd, int64_t N, int64_t C,
                      OutputMode mode) {
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        double sum = 0;
        #pragma omp simd reduction(+:sum)
        for (int64_t c = 0; c < C; c++) sum += (double)dout[n * C + c] * out[n * C + c];
        real mean = (real)(sum / (double)C);
        for (int64_t c = 0; c < C; c++) {
            real d = rstd[n] * (dout[n * C + c] - out[n * C + c] * mean);
            dx[n * C + c] = mode == ACCUMULATE ? dx[n * C + c] + d : d;
        }
    }
}

// RMSNorm with a gain, for mla's latents: out = x rstd gain. x (N, C) has rows ldx apart, out (N, C), gain (C).
void gain_forward(real *out, real *rstd, const real *x, int64_t ldx, const real *gain, int64_t N, int64_t C,
                  double eps) {
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        const real *row = x + n * ldx;
        double sum = 0;
        for (int64_t c = 0; c < C; c++) sum += (double)row[c] * row[c];
        rstd[n] = (real)(1 / sqrt(sum / (double)C + eps));
        for (int64_t c = 0; c < C; c++) out[n * C + c] = row[c] * rstd[n] * gain[c];
    }
}

// With z = x rstd and dz = dout gain:  dgain += sum_n dout z;  dx = rstd (dz - z mean(dz z)), rows ldx apart.
void gain_backward(real *dx, real *dgain, const real *dout, const real *x, const real *rstd, int64_t ldx,
                   const real *gain, int64_t N, int64_t C) {
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        const real *row = x + n * ldx, *d = dout + n * C;
        double sum = 0;
        for (int64_t c = 0; c < C; c++) sum += (double)d[c] * gain[c] * row[c] * rstd[n];
        real mean = (real)(sum / (double)C);
        for (int64_t c = 0; c < C; c++) dx[n * ldx + c] = rstd[n] * (d[c] * gain[c] - row[c] * rstd[n] * mean);
    }
    #pragma omp parallel for
    for (int64_t c = 0; c < C; c++)
        for (int64_t n = 0; n < N; n++) dgain[c] += dout[n * C + c] * x[n * ldx + c] * rstd[n];
}

// ---------------------------------------------------------------------------------------------------------------------
// RoPE on the token factors of a factor row, in place. Of the last HSR numbers of each vector, x1 = number i and
// x2 = number i + HSR/2 make a pair. At position t, with the angle t base^(-2i/HSR), it becomes
//     x1 cos + x2 sin,  x2 cos - x1 sin
// For TPA that is R vectors per token instead of NH heads (paper, section 3.2).

// table (T, HSR): row t has the cosines of position t in its first half, the sines in its second.
void rope_table(real *table, int64_t T, int64_t HSR, double base) {
    for (int64_t t = 0; t < T; t++)
        for (int64_t i = 0; i < HSR / 2; i++) {
            double angle = (double)t * rope_frequency(i, HSR, base);
            table[t * HSR + i] = (real)cos(angle), table[t * HSR + HSR / 2 + i] = (real)sin(angle);
        }
}

// b (HS): one vector; row: its position's row of the table.
static void rotate(real *b, const real *row, int64_t HS, int64_t HSR, Direction direction) {
    real *first = b + HS - HSR, *second = first + HSR / 2;
    for (int64_t i = 0; i < HSR / 2; i++) {
        real cos_i = row[i], sin_i = direction == ROTATE ? row[HSR / 2 + i] : -row[HSR / 2 + i];
        real x1 = first[i], x2 = second[i];
        first[i] = x1 * cos_i + x2 * sin_i;
        second[i] = x2 * cos_i - x1 * sin_i;
    }
}

// fac (B, T, Pp): rotates the vectors of `heads`. ROTATE_BACK is for gradients: a rotation's transpose is its inverse.
void rope(real *fac, const Heads *heads, const real *table, int64_t B, int64_t T, int64_t Pp, Direction direction) {
    int64_t HS = heads->HS, HSR = heads->HSR;
    if (HSR == 0) return;
    #pragma omp parallel for
    for (int64_t n = 0; n < B * T; n++) {
        const real *row = table + n % T * HSR;
        for (int64_t r = 0; r < heads->R; r++) rotate(fac + n * Pp + heads->b + r * HS, row, HS, HSR, direction);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The factor row of a variant, from its projected row (llmc/model.h, Heads). proj (B, T, Pp), fac (B, T, PF), layer:
// the layer's weights. For q, k or v, with the sources of its columns in `heads`:
//     a = act(projected a), or a constant
//     b = projected, or a constant;  kv_shift: b_t = s_t b_{t-1} + (1 - s_t) b_t, s = sigmoid(projected s), b_{-1} = 0
//     b = rope(b);  third order: b_r = vec(b_r c_r^T), number j HB + i of which is b_i c_j

static real sigmoid(real x) { return 1 / (1 + exp(-x)); }

static void head_act_forward(real *a, const real *x, HeadAct act, int64_t NH, int64_t R) {
    for (int64_t i = 0; i < NH * R; i++) a[i] = act == HEAD_ACT_SIGMOID ? sigmoid(x[i]) : x[i];
    for (int64_t r = 0; r < R && act == HEAD_ACT_SOFTMAX; r++) {
        real largest = x[r], sum = 0;
        for (int64_t i = 1; i < NH; i++) largest = x[i * R + r] > largest ? x[i * R + r] : largest;
        for (int64_t i = 0; i < NH; i++) sum += a[i * R + r] = exp(x[i * R + r] - largest);
        for (int64_t i = 0; i < NH; i++) a[i * R + r] /= sum;
    }
}

// dx from da, in terms of the output a.
static void head_act_backward(real *dx, const real *da, const real *a, HeadAct act, int64_t NH, int64_t R) {
    for (int64_t i = 0; i < NH * R; i++) dx[i] = act == HEAD_ACT_SIGMOID ? da[i] * a[i] * (1 - a[i]) : da[i];
    for (int64_t r = 0; r < R && act == HEAD_ACT_SOFTMAX; r++) {
        real sum = 0;
        for (int64_t i = 0; i < NH; i++) sum += da[i * R + r] * a[i * R + r];
        for (int64_t i = 0; i < NH; i++) dx[i * R + r] = a[i * R + r] * (da[i * R + r] - sum);
    }
}

// out (HB) = b_r of the token whose projected row is `row`, shifted and rotated. t: its position.
static void token_factor(real *out, const real *row, const real *layer, const Heads *h, const real *table, int64_t t,
                         int64_t r, int64_t Pp) {
    int64_t HB = h->HB;
    const real *b = h->from_b == NOT_PROJECTED ? layer + h->const_b + r * HB : row + h->from_b + r * HB;
    real s = h->from_s == NOT_PROJECTED ? 0 : sigmoid(row[h->from_s + r]);
    for (int64_t i = 0; i < HB; i++) out[i] = (1 - s) * b[i] + (s != 0 && t > 0 ? s * b[i - Pp] : 0);
    rotate(out, table + t * h->HSR, HB, h->HSR, ROTATE);
}

void factors_forward(real *fac, const real *proj, const real *layer, const Heads *h, HeadAct act, const real *table,
                     int64_t B, int64_t T, int64_t NH, int64_t Pp, int64_t PF) {
    int64_t R = h->R, HB = h->HB;
    #pragma omp parallel for
    for (int64_t n = 0; n < B * T; n++) {
        const real *row = proj + n * Pp;
        real *a = fac + n * PF + h->a, *b = fac + n * PF + h->b;
        if (h->kind == HEADS_FACTORED && h->from_a == NOT_PROJECTED)
            memcpy(a, layer + h->const_a, (size_t)(NH * R) * sizeof *a);
        else if (h->kind == HEADS_FACTORED) head_act_forward(a, row + h->from_a, act, NH, R);
        for (int64_t r = 0; r < R; r++, b += h->HS) {
            token_factor(b, row, layer, h, table, n % T, r, Pp);
            for (int64_t j = h->HS / HB - 1; j >= 0 && h->from_c != NOT_PROJECTED; j--)     // b itself comes last
                for (int64_t i = 0; i < HB; i++) b[j * HB + i] = b[i] * row[h->from_c + r * (h->HS / HB) + j];
        }
    }
}

// dproj += and the gradients of constants, dlayer +=, from dfac, whose columns of b become scratch: first HB of a
// vector's numbers are then the gradient of its shifted b, not rotated.
void factors_backward(real *dproj, real *dlayer, real *dfac, const real *fac, const real *proj, const real *layer,
                      const Heads *h, HeadAct act, const real *table, int64_t B, int64_t T, int64_t NH, int64_t Pp,
                      int64_t PF) {
    int64_t R = h->R, HS = h->HS, HB = h->HB, HC = HS / HB;
    int is_factored = h->kind == HEADS_FACTORED;
    #pragma omp parallel for
    for (int64_t n = 0; n < B * T; n++) {
        real *db = dfac + n * PF + h->b, *drow = dproj + n * Pp, b[HB];
        if (is_factored && h->from_a != NOT_PROJECTED)
            head_act_backward(drow + h->from_a, dfac + n * PF + h->a, fac + n * PF + h->a, act, NH, R);
        for (int64_t r = 0; r < R; r++, db += HS) {
            const real *c = proj + n * Pp + h->from_c + r * HC;
            if (h->from_c != NOT_PROJECTED) {       // dc_j += <db_j, b>;  db = sum_j db_j c_j
                token_factor(b, proj + n * Pp, layer, h, table, n % T, r, Pp);
                for (int64_t j = 0; j < HC; j++)
                    for (int64_t i = 0; i < HB; i++) drow[h->from_c + r * HC + j] += db[j * HB + i] * b[i];
                for (int64_t i = 0; i < HB; i++) {
                    real sum = 0;
                    for (int64_t j = 0; j < HC; j++) sum += db[j * HB + i] * c[j];
                    db[i] = sum;
                }
            }
            rotate(db, table + n % T * h->HSR, HB, h->HSR, ROTATE_BACK);
        }
    }
    #pragma omp parallel for
    for (int64_t n = 0; n < B * T; n++)
        for (int64_t r = 0; r < R && h->from_b != NOT_PROJECTED; r++) {
            const real *db = dfac + n * PF + h->b + r * HS, *row = proj + n * Pp, *b = row + h->from_b + r * HB;
            real *drow = dproj + n * Pp, ds = 0;
            real s = h->from_s == NOT_PROJECTED ? 0 : sigmoid(row[h->from_s + r]);
            int has_next = h->from_s != NOT_PROJECTED && n % T + 1 < T;
            real s_next = has_next ? sigmoid(row[Pp + h->from_s + r]) : 0;
            for (int64_t i = 0; i < HB; i++) {      // b_t is in the shifted b of t and of t + 1
                drow[h->from_b + r * HB + i] += (1 - s) * db[i] + (has_next ? s_next * db[PF + i] : 0);
                ds += db[i] * ((s != 0 && n % T > 0 ? b[i - Pp] : 0) - b[i]);
            }
            if (h->from_s != NOT_PROJECTED) drow[h->from_s + r] += ds * s * (1 - s);
        }
    if (is_factored && h->from_a == NOT_PROJECTED)
        for (int64_t n = 0; n < B * T; n++)
            for (int64_t i = 0; i < NH * R; i++) dlayer[h->const_a + i] += dfac[n * PF + h->a + i];
    if (h->from_b == NOT_PROJECTED)
        for (int64_t n = 0; n < B * T; n++)
            for (int64_t r = 0; r < R; r++)
                for (int64_t i = 0; i < HB; i++) dlayer[h->const_b + r * HB + i] += dfac[n * PF + h->b + r * HS + i];
}

// ---------------------------------------------------------------------------------------------------------------------
// Contraction of factors: out (N, NH, HS), head i of a token = scale * sum_r a[i][r] b_r. fac (N, Pp), rotated.
// Grouped heads (llmc/model.h) have no a: head i is the vector of its group.

void contract_forward(real *out, const real *fac, const Heads *heads, int64_t N, int64_t NH, int64_t Pp) {
    int64_t HS = heads->HS;
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        const real *a = fac + n * Pp + heads->a, *b = fac + n * Pp + heads->b;
        for (int64_t i = 0; i < NH; i++) {
            real *head = out + (n * NH + i) * HS;
            if (heads->kind == HEADS_GROUPED) {
                memcpy(head, b + i / (NH / heads->R) * HS, (size_t)HS * sizeof *head);
                continue;
            }
            memset(head, 0, (size_t)HS * sizeof *head);
            for (int64_t r = 0; r < heads->R; r++) {
                real weight = (real)heads->scale * a[i * heads->R + r];
                for (int64_t j = 0; j < HS; j++) head[j] += weight * b[r * HS + j];
            }
        }
    }
}

// da[i][r] = scale <dout_i, b_r>;  db_r = scale sum_i a[i][r] dout_i. Writes the columns of `heads` in dfac (N, Pp).
void contract_backward(real *dfac, const real *dout, const real *fac, const Heads *heads, int64_t N, int64_t NH,
                       int64_t Pp) {
    int64_t HS = heads->HS;
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        const real *a = fac + n * Pp + heads->a, *b = fac + n * Pp + heads->b;
        real *da = dfac + n * Pp + heads->a, *db = dfac + n * Pp + heads->b, scale = (real)heads->scale;
        memset(db, 0, (size_t)(heads->R * HS) * sizeof *db);
        for (int64_t i = 0; i < NH; i++) {
            const real *dhead = dout + (n * NH + i) * HS;
            for (int64_t r = 0; r < heads->R; r++) {
                if (heads->kind == HEADS_GROUPED && i / (NH / heads->R) != r) continue;
                real weight = heads->kind == HEADS_GROUPED ? 1 : scale * a[i * heads->R + r], sum = 0;
                for (int64_t j = 0; j < HS; j++) {
                    db[r * HS + j] += weight * dhead[j];
                    sum += dhead[j] * b[r * HS + j];
                }
                if (heads->kind == HEADS_FACTORED) da[i * heads->R + r] = scale * sum;
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Output gate: z = sigmoid(g) y. g (N, D) are columns of rows that are ldg apart; y, z (N, Dp)

void gate_forward(real *z, const real *g, int64_t ldg, const real *y, int64_t N, int64_t D, int64_t Dp) {
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++)
        for (int64_t i = 0; i < D; i++) z[n * Dp + i] = sigmoid(g[n * ldg + i]) * y[n * Dp + i];
}

// With s = sigmoid(g):  dg = dz y s (1 - s);  dz becomes dy = dz s in place
void gate_backward(real *dg, real *dz, const real *g, int64_t ldg, const real *y, int64_t N, int64_t D, int64_t Dp) {
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++)
        for (int64_t i = 0; i < D; i++) {
            real s = sigmoid(g[n * ldg + i]), d = dz[n * Dp + i];
            dg[n * ldg + i] = d * y[n * Dp + i] * s * (1 - s);
            dz[n * Dp + i] = d * s;
        }
}

// ---------------------------------------------------------------------------------------------------------------------
// mla's heads: k (N, NH, HSK) and v (N, NH, HSV) from kv (N, NH, 2 HSV), a head's part of k and its v, and from the
// part of k that all heads share, kr (N, HSR), rotated here. HSK = HSV + HSR.

void latent_heads_forward(real *k, real *v, const real *kv, const real *kr, int64_t ldr, const real *table, int64_t B,
                          int64_t T, int64_t NH, int64_t HSV, int64_t HSR) {
    int64_t HSK = HSV + HSR;
    #pragma omp parallel for
    for (int64_t n = 0; n < B * T; n++) {
        real rotated[HSR];
        memcpy(rotated, kr + n * ldr, sizeof rotated);
        rotate(rotated, table + n % T * HSR, HSR, HSR, ROTATE);
        for (int64_t i = n * NH; i < (n + 1) * NH; i++) {
            memcpy(k + i * HSK, kv + i * 2 * HSV, (size_t)HSV * sizeof *k);
            memcpy(k + i * HSK + HSV, rotated, sizeof rotated);
            memcpy(v + i * HSV, kv + i * 2 * HSV + HSV, (size_t)HSV * sizeof *v);
        }
    }
}

void latent_heads_backward(real *dkv, real *dkr, int64_t ldr, const real *dk, const real *dv, const real *table,
                           int64_t B, int64_t T, int64_t NH, int64_t HSV, int64_t HSR) {
    int64_t HSK = HSV + HSR;
    #pragma omp parallel for
    for (int64_t n = 0; n < B * T; n++) {
        real *sum = dkr + n * ldr;
        memset(sum, 0, (size_t)HSR * sizeof *sum);
        for (int64_t i = n * NH; i < (n + 1) * NH; i++) {
            memcpy(dkv + i * 2 * HSV, dk + i * HSK, (size_t)HSV * sizeof *dkv);
            memcpy(dkv + i * 2 * HSV + HSV, dv + i * HSV, (size_t)HSV * sizeof *dkv);
            for (int64_t j = 0; j < HSR; j++) sum[j] += dk[i * HSK + HSV + j];
        }
        rotate(sum, table + n % T * HSR, HSR, HSR, ROTATE_BACK);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Causal attention: y = softmax(scale q k^T) v, head by head. q, k (B, T, NH, HSK), v (B, T, NH, HSV), y (B, T, Dp);
// lse (B, NH, T): the logarithm of each softmax's denominator. It works on blocks of QUERIES queries, so the T x T
// matrix never exists as a whole.

enum { QUERIES = 64 };

// Numbers of scratch for either pass: (threads, 2, QUERIES, T).
int64_t attention_scratch_size(int64_t T) { return omp_get_max_threads() * 2 * QUERIES * T; }

// p (rows, end) = exp(scale q k^T - lse) for `rows` queries from position t0 on; 0 after each query's own position.
// FIND_LSE writes lse (rows), USE_LSE reads it. Rows of q and k are ld apart.
typedef enum { FIND_LSE, USE_LSE } LseMode;
static void attention_probabilities(real *p, real *lse, const real *q, const real *k, int64_t t0, int64_t rows,
                                    int64_t ld, int64_t HSK, double scale, LseMode mode) {
    int64_t end = t0 + rows;
    gemm(p, end, q, ld, AS_IS, k, ld, TRANSPOSED, rows, end, HSK, (real)scale, 0);
    for (int64_t i = 0; i < rows; i++) {
        real *row = p + i * end;
        int64_t visible = t0 + i + 1;
        real shift = lse[i];
        double sum = 0;
        if (mode == FIND_LSE) {
            shift = row[0];
            #pragma omp simd reduction(max:shift)
            for (int64_t j = 1; j < visible; j++) shift = row[j] > shift ? row[j] : shift;
        }
        for (int64_t j = 0; j < visible; j++) row[j] = exp(row[j] - shift);
        for (int64_t j = visible; j < end; j++) row[j] = 0;
        if (mode == FIND_LSE) {
            #pragma omp simd reduction(+:sum)
            for (int64_t j = 0; j < visible; j++) sum += row[j];
            lse[i] = shift + (real)log(sum);
            for (int64_t j = 0; j < visible; j++) row[j] *= (real)(1 / sum);
        }
    }
}

void attention_forward(real *y, real *lse, real *scratch, const real *q, const real *k, const real *v, int64_t B,
                       int64_t T, int64_t NH, int64_t HSK, int64_t HSV, int64_t Dp, double scale) {
    int64_t QK = NH * HSK, D = NH * HSV;    // numbers of a token in q and in k; in v
    #pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < NH; h++) {
            real *p = scratch + omp_get_thread_num() * 2 * QUERIES * T;
            const real *q_head = q + b * T * QK + h * HSK, *k_head = k + b * T * QK + h * HSK;
            const real *v_head = v + b * T * D + h * HSV;
            for (int64_t t = 0; t < T; t += QUERIES) {
                int64_t rows = T - t < QUERIES ? T - t : QUERIES, end = t + rows;
                attention_probabilities(p, lse + (b * NH + h) * T + t, q_head + t * QK, k_head, t, rows, QK, HSK,
                                        scale, FIND_LSE);
                gemm(y + (b * T + t) * Dp + h * HSV, Dp, p, end, AS_IS, v_head, D, AS_IS, rows, HSV, end, 1, 0);
            }
        }
}

// With p rebuilt from lse, and row sums delta = sum_j p dp = <dy, y>:
//   dv = p^T dy;  dp = dy v^T;  ds = scale p (dp - delta);  dq = ds k;  dk = ds^T q
void attention_backward(real *dq, real *dk, real *dv, real *scratch, const real *dy, const real *y, const real *lse,
                        const real *q, const real *k, const real *v, int64_t B, int64_t T, int64_t NH, int64_t HSK,
                        int64_t HSV, int64_t Dp, double scale) {
    int64_t QK = NH * HSK, D = NH * HSV;
    #pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < NH; h++) {
            real *p = scratch + omp_get_thread_num() * 2 * QUERIES * T, *ds = p + QUERIES * T;
            int64_t qk_at = b * T * QK + h * HSK, v_at = b * T * D + h * HSV;   // where the head starts
            for (int64_t t = 0; t < T; t++) {
                memset(dk + qk_at + t * QK, 0, (size_t)HSK * sizeof *dk);
                memset(dv + v_at + t * D, 0, (size_t)HSV * sizeof *dv);
            }
            for (int64_t t = 0; t < T; t += QUERIES) {
                int64_t rows = T - t < QUERIES ? T - t : QUERIES, end = t + rows, y_at = (b * T + t) * Dp + h * HSV;
                const real *dy_t = dy + y_at, *y_t = y + y_at, *q_t = q + qk_at + t * QK;
                attention_probabilities(p, (real *)lse + (b * NH + h) * T + t, q_t, k + qk_at, t, rows, QK, HSK,
                                        scale, USE_LSE);
                gemm(dv + v_at, D, p, end, TRANSPOSED, dy_t, Dp, AS_IS, end, HSV, rows, 1, 1);
                gemm(ds, end, dy_t, Dp, AS_IS, v + v_at, D, TRANSPOSED, rows, end, HSV, 1, 0);
                for (int64_t i = 0; i < rows; i++) {
                    real delta = 0;
                    #pragma omp simd reduction(+:delta)
                    for (int64_t j = 0; j < HSV; j++) delta += dy_t[i * Dp + j] * y_t[i * Dp + j];
                    for (int64_t j = 0; j < end; j++)
                        ds[i * end + j] = p[i * end + j] * (ds[i * end + j] - delta) * (real)scale;
                }
                gemm(dq + qk_at + t * QK, QK, ds, end, AS_IS, k + qk_at, QK, AS_IS, rows, HSK, end, 1, 0);
                gemm(dk + qk_at, QK, ds, end, TRANSPOSED, q_t, QK, AS_IS, end, HSK, rows, 1, 1);
            }
        }
}

// ---------------------------------------------------------------------------------------------------------------------
// SwiGLU: s (N, Fp) = silu(g) * z, where g and z are the halves of a row of u (N, 2 Fp); silu(g) = g / (1 + exp(-g))

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
// Classifier: logits = n wte^T, loss = -log softmax(logits)[target]. It runs on chunks of rows, so the logits of all
// tokens never exist at once. In training, a chunk's dlogits, dn and dwte are computed before the next chunk.

enum { CLASSIFIER_ROWS = 256 };

// Returns the sum of the losses of `rows` tokens, at most CLASSIFIER_ROWS; targets (rows). LOSS_AND_DLOGITS: logits
// (rows, Vp) become dlogits = (softmax - onehot) * dloss in place, the padding from V on exactly 0. LOSS_ONLY: their
// values are lost.
double softmax_cross_entropy(real *logits, const int32_t *targets, int64_t rows, int64_t V, int64_t Vp, double dloss,
                             LossMode mode) {
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
        if (mode == LOSS_ONLY) continue;
        real scale = (real)(dloss / sum);
        for (int64_t i = 0; i < V; i++) row[i] *= scale;
        for (int64_t i = V; i < Vp; i++) row[i] = 0;
        row[targets[n]] -= (real)dloss;
    }
    for (int64_t n = 0; n < rows; n++) total += losses[n];     // in order: the same bits with any number of threads
    return total;
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory: planned, printed and checked against what the machine has before any of it is allocated.

typedef struct {
    // kept from the forward to the backward pass, one slice per layer
    real *n1, *rstd1;       // (L, N, C), (L, N)            normed input of attention
    real *proj;             // (L, N, Pp)                   projected rows; as factor rows: bQ and bK rotated
    real *y, *lse;          // (L, N, Dp), (L, B, NH, T)
    real *n2, *rstd2;       // (L, N, C), (L, N)            normed input of the MLP
    real *u;                // (L, N, 2 Fp)                 its two halves: n2 W1^T and n2 W2^T
    // one for all layers
    real *x, *nf, *rstdf;   // (N, C), (N, C), (N)          residual stream, normed input of the classifier
    real *fac;              // (N, PF)                      factor rows of variants
    real *q, *k, *v;        // (N, NH, HSK) twice, (N, NH, HSV): rebuilt from the factors in the backward pass
    real *rstdq, *rstdk;    // (N, NH) twice                qk_norm's; mla's latents': (N) twice
    real *z;                // (N, Dp)                      gated output of attention
    real *latq, *latkv;     // (N, q_lora), (N, kv_lora)    mla: normed latents
    real *kv;               // (N, NH, 2 HSV)               mla: of each head, its part of k and its v
    real *s;                // (N, Fp)                      output of SwiGLU, recomputed in the backward pass
    real *scratch;          // (attention_scratch_size)
    real *logits;           // (CLASSIFIER_ROWS, Vp)
    real *rope_q, *rope_k;  // (T, HSR) of q and of k: not the same where k is of third order and q is not
    // gradients
    real *dx, *dn;          // (N, C)
    real *dq, *dk, *dv;     // as q, k, v
    real *dproj, *dy;       // (N, Pp), (N, Dp)
    real *dfac;             // as fac
    real *dlatq, *dlatkv, *dkv;
    real *du, *ds;          // (N, 2 Fp), (N, Fp)
} Activations;

typedef struct { real **pointer; int64_t elements; } Buffer;     // one row of a table of memory
enum { NUM_BUFFERS = 39 };

// The table of all pointers in Activations with their sizes, for batches up to B x T.
static void activation_table(Activations *acts, const Model *m, int64_t B, int64_t T, Buffer out[NUM_BUFFERS]) {
    const Config *c = &m->config;
    int64_t L = c->n_layer, N = B * T, C = c->n_embd, NH = c->n_head, QK = NH * m->HSK;
    int64_t D = m->D, Dp = m->Dp, Fp = m->Fp, latent = c->attn == ATTN_MLA, fac = m->is_projected || latent ? 0 : m->PF;
    int64_t rstd = c->qk_norm ? N * NH : latent ? N : 0, q_lora = latent ? c->q_lora : 0;
    int64_t kv_lora = latent ? c->kv_lora : 0, kv = latent ? 2 * D : 0;
    const Buffer table[NUM_BUFFERS] = {
        {&acts->n1, L * N * C}, {&acts->rstd1, L * N}, {&acts->proj, L * N * m->Pp}, {&acts->y, L * N * Dp},
        {&acts->lse, L * N * NH}, {&acts->n2, L * N * C}, {&acts->rstd2, L * N}, {&acts->u, L * N * 2 * Fp},
        {&acts->x, N * C}, {&acts->nf, N * C}, {&acts->rstdf, N},
        {&acts->fac, N * fac}, {&acts->q, N * QK}, {&acts->k, N * QK}, {&acts->v, N * D}, {&acts->rstdq, rstd},
        {&acts->rstdk, rstd}, {&acts->z, c->out_gate ? N * Dp : 0}, {&acts->latq, N * q_lora},
        {&acts->latkv, N * kv_lora}, {&acts->kv, N * kv}, {&acts->s, N * Fp},
        {&acts->scratch, attention_scratch_size(T)}, {&acts->logits, CLASSIFIER_ROWS * m->Vp},
        {&acts->rope_q, T * m->q.HSR}, {&acts->rope_k, T * m->k.HSR},
        {&acts->dx, N * C}, {&acts->dn, N * C}, {&acts->dq, N * QK}, {&acts->dk, N * QK}, {&acts->dv, N * D},
        {&acts->dproj, N * m->Pp}, {&acts->dfac, N * fac}, {&acts->dlatq, N * q_lora}, {&acts->dlatkv, N * kv_lora},
        {&acts->dkv, N * kv}, {&acts->dy, N * Dp}, {&acts->du, N * 2 * Fp}, {&acts->ds, N * Fp},
    };
    memcpy(out, table, sizeof table);
}

struct T6 {
    Model model;
    int64_t B, T;               // the largest batch there is room for
    real *params, *grads;       // (num_stored), laid out by model.tensors
    real *adam_m, *adam_v;      // (num_stored / moments.world)
    Slice moments;              // this rank's slices of them
    Activations acts;
    struct Sums *sums;          // gradients over micro-batches and ranks, see the end of this file
};

// Bytes that t6_alloc takes for activations.
double activation_bytes(const Model *m, int64_t B, int64_t T) {
    Activations unused;
    Buffer table[NUM_BUFFERS];
    double bytes = 0;
    activation_table(&unused, m, B, T, table);
    for (int i = 0; i < NUM_BUFFERS; i++) bytes += (double)table[i].elements * sizeof(real);
    return bytes;
}

// Allocates what the model needs for batches up to B x T. Padding of every buffer starts at zero and stays zero.
// pad, world: as for model_init_shared. moments: this rank's slices of AdamW's state.
void t6_alloc(T6 *t6, const Config *config, int64_t B, int64_t T, int pad, int world, Slice moments) {
    memset(t6, 0, sizeof *t6);
    model_init_shared(&t6->model, config, pad, world);
    t6->B = B, t6->T = T, t6->moments = moments;
    size_t all = t6->model.num_stored, own = all / (size_t)moments.world;
    t6->params = xcalloc(all, sizeof(real)), t6->grads = xcalloc(all, sizeof(real));
    t6->adam_m = xcalloc(own, sizeof(real)), t6->adam_v = xcalloc(own, sizeof(real));
    Buffer table[NUM_BUFFERS];
    activation_table(&t6->acts, &t6->model, B, T, table);
    for (int i = 0; i < NUM_BUFFERS; i++) *table[i].pointer = xcalloc((size_t)table[i].elements, sizeof(real));
    rope_table(t6->acts.rope_q, T, t6->model.q.HSR, config->rope_base);
    rope_table(t6->acts.rope_k, T, t6->model.k.HSR, config->rope_base);
}

void t6_free(T6 *t6) {
    Buffer table[NUM_BUFFERS];
    activation_table(&t6->acts, &t6->model, t6->B, t6->T, table);
    for (int i = 0; i < NUM_BUFFERS; i++) free(*table[i].pointer);
    free(t6->params), free(t6->grads), free(t6->adam_m), free(t6->adam_v);
    model_free(&t6->model);
}

// ---------------------------------------------------------------------------------------------------------------------
// The model. Only qkv_forward and qkv_backward depend on the attention kind, through Heads; mla has its own.

// The factor rows of layer l and the distance of their rows: the projected rows themselves, or a variant's.
static real *factor_rows(const T6 *t6, int64_t l, int64_t N, int64_t *ld) {
    const Model *m = &t6->model;
    *ld = m->is_projected ? m->Pp : m->PF;
    return m->is_projected ? t6->acts.proj + l * N * m->Pp : t6->acts.fac;
}

// mla: q, k, v from the projected row [latent of q | latent of k and v | rotated part of k].
static void latent_forward(T6 *t6, const real *proj, const real *w, int64_t B, int64_t T) {
    const Model *m = &t6->model;
    const Config *c = &m->config;
    Activations *acts = &t6->acts;
    int64_t N = B * T, NH = c->n_head, QK = NH * m->HSK, q = c->q_lora, kv = c->kv_lora, Pp = m->Pp;
    gain_forward(acts->latq, acts->rstdq, proj, Pp, w + m->q_gain, N, q, c->rms_eps);
    gain_forward(acts->latkv, acts->rstdk, proj + q, Pp, w + m->kv_gain, N, kv, c->rms_eps);
    linear_forward(acts->q, acts->latq, w + m->wqb, N, q, QK, OVERWRITE);
    rope(acts->q, &m->q, acts->rope_q, B, T, QK, ROTATE);
    linear_forward(acts->kv, acts->latkv, w + m->wkvb, N, kv, 2 * m->D, OVERWRITE);
    latent_heads_forward(acts->k, acts->v, acts->kv, proj + q + kv, Pp, acts->rope_k, B, T, NH, m->HSV, m->HSR);
}

// acts.dproj from acts.dq, dk, dv; gradients of the layer's weights dw +=.
static void latent_backward(T6 *t6, const real *proj, const real *w, real *dw, int64_t B, int64_t T) {
    const Model *m = &t6->model;
    const Config *c = &m->config;
    Activations *acts = &t6->acts;
    int64_t N = B * T, NH = c->n_head, QK = NH * m->HSK, q = c->q_lora, kv = c->kv_lora, Pp = m->Pp;
    rope(acts->dq, &m->q, acts->rope_q, B, T, QK, ROTATE_BACK);
    latent_heads_backward(acts->dkv, acts->dproj + q + kv, Pp, acts->dk, acts->dv, acts->rope_k, B, T, NH, m->HSV,
                          m->HSR);
    linear_backward(acts->dlatq, dw + m->wqb, acts->dq, acts->latq, w + m->wqb, N, q, QK);
    linear_backward(acts->dlatkv, dw + m->wkvb, acts->dkv, acts->latkv, w + m->wkvb, N, kv, 2 * m->D);
    gain_backward(acts->dproj, dw + m->q_gain, acts->dlatq, proj, acts->rstdq, Pp, w + m->q_gain, N, q);
    gain_backward(acts->dproj + q, dw + m->kv_gain, acts->dlatkv, proj + q, acts->rstdk, Pp, w + m->kv_gain, N, kv);
}

// NEW_ROWS: projected from the layer's normed input. KEPT_ROWS: those that the forward pass kept.
typedef enum { NEW_ROWS, KEPT_ROWS } RowSource;

// acts.q, k (N, NH, HSK) and v (N, NH, HSV) of layer l, by way of its projected rows acts.proj (N, Pp).
static void qkv_forward(T6 *t6, int64_t l, int64_t B, int64_t T, RowSource source) {
    const Model *m = &t6->model;
    const Config *c = &m->config;
    Activations *acts = &t6->acts;
    int64_t N = B * T, C = c->n_embd, NH = c->n_head, Pp = m->Pp, ld;
    const real *w = t6->params + m->layers + (size_t)l * m->layer_stride, *n1 = acts->n1 + l * N * C;
    real *proj = acts->proj + l * N * Pp, *fac = factor_rows(t6, l, N, &ld);
    if (source == NEW_ROWS) linear_forward(proj, n1, w + m->wqkv, N, C, Pp, OVERWRITE);     // n Wqkv^T
    if (c->attn == ATTN_MLA) return latent_forward(t6, proj, w, B, T);
    if (m->is_projected && source == NEW_ROWS) {
        rope(fac, &m->q, acts->rope_q, B, T, ld, ROTATE);               // bQ, bK = rope(bQ), rope(bK)
        rope(fac, &m->k, acts->rope_k, B, T, ld, ROTATE);
    } else if (!m->is_projected) {
        factors_forward(fac, proj, w, &m->q, c->head_act, acts->rope_q, B, T, NH, Pp, ld);
        factors_forward(fac, proj, w, &m->k, c->head_act, acts->rope_k, B, T, NH, Pp, ld);
        factors_forward(fac, proj, w, &m->v, c->head_act, acts->rope_k, B, T, NH, Pp, ld);
    }
    contract_forward(acts->q, fac, &m->q, N, NH, ld);                   // q = 1/RQ sum_r aQ_r (x) bQ_r
    contract_forward(acts->k, fac, &m->k, N, NH, ld);                   // k = 1/RK sum_r aK_r (x) bK_r
    contract_forward(acts->v, fac, &m->v, N, NH, ld);                   // v = 1/RV sum_r aV_r (x) bV_r
    if (c->qk_norm) {                                                   // q, k = q / rms(q), k / rms(k), by heads
        rmsnorm_forward(acts->q, acts->rstdq, acts->q, N * NH, m->HSK, c->rms_eps);
        rmsnorm_forward(acts->k, acts->rstdk, acts->k, N * NH, m->HSK, c->rms_eps);
    }
}

// acts.dn (N, C), the gradient of layer l's normed input, from acts.dq, dk and dv; dWqkv and other weights' +=. The
// columns of out_gate's gates in acts.dproj are there already.
static void qkv_backward(T6 *t6, int64_t l, int64_t B, int64_t T) {
    const Model *m = &t6->model;
    const Config *c = &m->config;
    Activations *acts = &t6->acts;
    int64_t N = B * T, C = c->n_embd, NH = c->n_head, Pp = m->Pp, ld;
    size_t layer = m->layers + (size_t)l * m->layer_stride;
    const real *w = t6->params + layer, *n1 = acts->n1 + l * N * C, *proj = acts->proj + l * N * Pp;
    real *dw = t6->grads + layer, *fac = factor_rows(t6, l, N, &ld), *dfac = m->is_projected ? acts->dproj : acts->dfac;
    if (c->qk_norm) {
        rmsnorm_backward(acts->dq, acts->dq, acts->q, acts->rstdq, N * NH, m->HSK, OVERWRITE);
        rmsnorm_backward(acts->dk, acts->dk, acts->k, acts->rstdk, N * NH, m->HSK, OVERWRITE);
    }
    if (c->attn == ATTN_MLA) latent_backward(t6, proj, w, dw, B, T);
    else {
        contract_backward(dfac, acts->dq, fac, &m->q, N, NH, ld);       // daQ = 1/RQ dq bQ,  dbQ = 1/RQ dq^T aQ
        contract_backward(dfac, acts->dk, fac, &m->k, N, NH, ld);       // and so for k and v
        contract_backward(dfac, acts->dv, fac, &m->v, N, NH, ld);
    }
    if (m->is_projected) {
        rope(dfac, &m->q, acts->rope_q, B, T, ld, ROTATE_BACK);         // gradients of the unrotated bQ and bK
        rope(dfac, &m->k, acts->rope_k, B, T, ld, ROTATE_BACK);
    } else if (c->attn != ATTN_MLA) {
        for (int64_t n = 0; n < N; n++) memset(acts->dproj + n * Pp, 0, (size_t)m->gate * sizeof *acts->dproj);
        factors_backward(acts->dproj, dw, dfac, fac, proj, w, &m->q, c->head_act, acts->rope_q, B, T, NH, Pp, ld);
        factors_backward(acts->dproj, dw, dfac, fac, proj, w, &m->k, c->head_act, acts->rope_k, B, T, NH, Pp, ld);
        factors_backward(acts->dproj, dw, dfac, fac, proj, w, &m->v, c->head_act, acts->rope_k, B, T, NH, Pp, ld);
    }
    linear_backward(acts->dn, dw + m->wqkv, acts->dproj, n1, w + m->wqkv, N, C, Pp);
}

// What goes into layer l's output projection: y (N, Dp), gated with out_gate.
static const real *gated(T6 *t6, int64_t l, int64_t N) {
    const Model *m = &t6->model;
    const real *y = t6->acts.y + l * N * m->Dp;
    if (!m->config.out_gate) return y;
    gate_forward(t6->acts.z, t6->acts.proj + l * N * m->Pp + m->gate, m->Pp, y, N, m->D, m->Dp);
    return t6->acts.z;
}

// idx (B, T) -> acts.nf (N, C), the normed input of the classifier.
void t6_forward(T6 *t6, const int32_t *idx, int64_t B, int64_t T) {
    const Model *m = &t6->model;
    const Config *c = &m->config;
    Activations *acts = &t6->acts;
    int64_t N = B * T, C = c->n_embd, NH = c->n_head, Dp = m->Dp, Fp = m->Fp;
    encoder_forward(acts->x, idx, t6->params + m->wte, N, C);                       // x = wte[idx]
    for (int64_t l = 0; l < c->n_layer; l++) {
        const real *w = t6->params + m->layers + (size_t)l * m->layer_stride;
        real *n1 = acts->n1 + l * N * C, *n2 = acts->n2 + l * N * C;
        real *y = acts->y + l * N * Dp, *lse = acts->lse + l * N * NH, *u = acts->u + l * N * 2 * Fp;

        rmsnorm_forward(n1, acts->rstd1 + l * N, acts->x, N, C, c->rms_eps);        // n = x / rms(x)
        qkv_forward(t6, l, B, T, NEW_ROWS);                                         // q, k, v from n
        attention_forward(y, lse, acts->scratch, acts->q, acts->k, acts->v, B, T,   // y = softmax(scale q k^T) v
                          NH, m->HSK, m->HSV, Dp, m->scale);
        const real *z = gated(t6, l, N);                                            // y, or sigmoid(n Wg^T) * y
        linear_forward(acts->x, z, w + m->wo, N, Dp, C, ACCUMULATE);                // x += y Wo^T

        rmsnorm_forward(n2, acts->rstd2 + l * N, acts->x, N, C, c->rms_eps);        // n = x / rms(x)
        linear_forward(u, n2, w + m->w12, N, C, 2 * Fp, OVERWRITE);                 // u = n W1^T, n W2^T
        swiglu_forward(acts->s, u, N, Fp);                                          // s = silu(n W1^T) * (n W2^T)
        linear_forward(acts->x, acts->s, w + m->w3, N, Fp, C, ACCUMULATE);          // x += s W3^T
    }
    rmsnorm_forward(acts->nf, acts->rstdf, acts->x, N, C, c->rms_eps);
}

// Returns the sum of the losses of the last forward pass; targets (N). LOSS_AND_DLOGITS: also, with every loss weighted
// by dloss, the classifier's gradients: acts.dn (N, C) =, dwte +=.
double t6_loss(T6 *t6, const int32_t *targets, int64_t N, double dloss, LossMode mode) {
    const Model *m = &t6->model;
    Activations *acts = &t6->acts;
    int64_t C = m->config.n_embd, V = m->config.vocab_size;
    const real *wte = t6->params + m->wte;
    double total = 0;
    for (int64_t n = 0; n < N; n += CLASSIFIER_ROWS) {
        int64_t rows = N - n < CLASSIFIER_ROWS ? N - n : CLASSIFIER_ROWS;
        const real *nf = acts->nf + n * C;
        linear_forward(acts->logits, nf, wte, rows, C, m->Vp, OVERWRITE);           // logits = n wte^T
        total += softmax_cross_entropy(acts->logits, targets + n, rows, V, m->Vp, dloss, mode);
        if (mode == LOSS_AND_DLOGITS)
            linear_backward(acts->dn + n * C, t6->grads + m->wte, acts->logits, nf, wte, rows, C, m->Vp);
    }
    return total;
}

// From acts.dn to the gradients of all weights, which are added to t6->grads. idx (B, T) as in the forward pass.
void t6_backward(T6 *t6, const int32_t *idx, int64_t B, int64_t T) {
    const Model *m = &t6->model;
    const Config *c = &m->config;
    Activations *acts = &t6->acts;
    int64_t N = B * T, C = c->n_embd, NH = c->n_head, Dp = m->Dp, Fp = m->Fp;
    memset(acts->dx, 0, (size_t)(N * C) * sizeof *acts->dx);
    rmsnorm_backward(acts->dx, acts->dn, acts->nf, acts->rstdf, N, C, ACCUMULATE);
    for (int64_t l = c->n_layer - 1; l >= 0; l--) {
        size_t at = m->layers + (size_t)l * m->layer_stride;
        const real *w = t6->params + at;
        real *dw = t6->grads + at;
        const real *n1 = acts->n1 + l * N * C, *n2 = acts->n2 + l * N * C;
        const real *y = acts->y + l * N * Dp, *lse = acts->lse + l * N * NH, *u = acts->u + l * N * 2 * Fp;

        swiglu_forward(acts->s, u, N, Fp);                                          // s again, for dW3 += dx^T s
        linear_backward(acts->ds, dw + m->w3, acts->dx, acts->s, w + m->w3, N, Fp, C);          // ds = dx W3
        swiglu_backward(acts->du, acts->ds, u, N, Fp);                              // du = [dg dz]
        linear_backward(acts->dn, dw + m->w12, acts->du, n2, w + m->w12, N, C, 2 * Fp);         // dn = du W12
        rmsnorm_backward(acts->dx, acts->dn, n2, acts->rstd2 + l * N, N, C, ACCUMULATE);    // dx += norm's gradient

        linear_backward(acts->dy, dw + m->wo, acts->dx, gated(t6, l, N), w + m->wo, N, Dp, C);  // dy = dx Wo
        if (c->out_gate)
            gate_backward(acts->dproj + m->gate, acts->dy, acts->proj + l * N * m->Pp + m->gate, m->Pp, y, N, m->D, Dp);
        qkv_forward(t6, l, B, T, KEPT_ROWS);                                        // q, k, v again
        attention_backward(acts->dq, acts->dk, acts->dv, acts->scratch, acts->dy,   // dq, dk, dv
                           y, lse, acts->q, acts->k, acts->v, B, T, NH, m->HSK, m->HSV, Dp, m->scale);
        qkv_backward(t6, l, B, T);                                                  // dn
        rmsnorm_backward(acts->dx, acts->dn, n1, acts->rstd1 + l * N, N, C, ACCUMULATE);    // dx += norm's gradient
    }
    encoder_backward(t6->grads + m->wte, acts->dx, idx, N, C);                      // dwte[idx] += dx
}

// out (V) = the logits of what follows token n, 0 <= n < N, of the last forward pass.
void t6_logits(const T6 *t6, int64_t n, real *out) {
    const Model *m = &t6->model;
    int64_t C = m->config.n_embd, V = m->config.vocab_size;
    matmul(out, V, t6->acts.nf + n * C, C, AS_IS, t6->params + m->wte, C, TRANSPOSED, 1, V, C, OVERWRITE);
}

// ---------------------------------------------------------------------------------------------------------------------
// Update

// Norm of all gradients together. grads (num_stored / world): this rank's slices. All ranks call; comm NULL: one
// process. Squares are summed in units of SLICE_UNIT numbers, and those sums in order: the same bits with any number
// of threads and ranks.
double gradient_norm(const Model *m, const real *grads, Comm *comm) {
    size_t world = (size_t)comm_world(comm), rank = (size_t)comm_rank(comm), units = 0, at = 0;
    for (int k = 0; k < model_buckets(m); k++) units += (model_bucket(m, k).size + SLICE_UNIT - 1) / SLICE_UNIT;
    double *squares = xcalloc(units, sizeof *squares), total = 0;
    for (int k = 0; k < model_buckets(m); k++) {
        Bucket bucket = model_bucket(m, k);
        const real *g = grads + bucket.offset / world;
        size_t n = bucket.size / world, first = at + rank * (n / SLICE_UNIT);
        #pragma omp parallel for
        for (size_t i = 0; i < n; i += SLICE_UNIT)
            for (size_t j = i; j < n && j < i + SLICE_UNIT; j++) squares[first + i / SLICE_UNIT] += (double)g[j] * g[j];
        at += (bucket.size + SLICE_UNIT - 1) / SLICE_UNIT;
    }
    comm_sum(comm, squares, units, "norm of the gradients");
    for (size_t i = 0; i < units; i++) total += squares[i];
    free(squares);
    return sqrt(total);
}

typedef struct { double lr, beta1, beta2, eps, weight_decay; } AdamW;

// Step number `step` = 1, 2, ... of AdamW (Loshchilov & Hutter 2019, as PyTorch computes it) on n weights w with
// gradients grad_scale * dw and moments adam_m and adam_v:
//   m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;  w = w (1 - lr decay) - lr m^ / (sqrt(v^) + eps)
// where m^ = m / (1 - beta1^step) and v^ = v / (1 - beta2^step).
void adamw_update(real *w, real *adam_m, real *adam_v, const real *dw, size_t n, const AdamW *o, int64_t step,
                  double grad_scale) {
    real decay = (real)(1 - o->lr * o->weight_decay), rate = (real)(o->lr / (1 - pow(o->beta1, (double)step)));
    real root = (real)sqrt(1 - pow(o->beta2, (double)step));
    real beta1 = (real)o->beta1, beta2 = (real)o->beta2, eps = (real)o->eps, scale = (real)grad_scale;
    real new1 = (real)(1 - o->beta1), new2 = (real)(1 - o->beta2);      // in real, 1 - 0.999999 would be off by 1%
    #pragma omp parallel for
    for (size_t i = 0; i < n; i++) {
        real g = dw[i] * scale;
        adam_m[i] = beta1 * adam_m[i] + new1 * g;
        adam_v[i] = beta2 * adam_v[i] + new2 * g * g;
        w[i] = w[i] * decay - rate * adam_m[i] / (sqrt(adam_v[i]) / root + eps);
    }
}

// The factor that scales gradients of this norm to at most max_norm, as in torch.nn.utils.clip_grad_norm_. max_norm 0:
// always 1.
double clip_factor(double norm, double max_norm) {
    double factor = max_norm / (norm + 1e-6);
    return max_norm > 0 && factor < 1 ? factor : 1;
}

void t6_zero_gradients(T6 *t6) { memset(t6->grads, 0, t6->model.num_stored * sizeof *t6->grads); }

// =====================================================================================================================
// The training program (llmc/trainer.h) around this model. test_t6.c and generate_t6.c include the model without it.
#ifndef T6_MODEL_ONLY
#include "llmc/trainer.h"

// Gradients of a step. In each round of `world` micro-batches, rank r computes number r. After the round each rank
// receives its slices of all their gradients and adds them to its sums in the order of the micro-batches:
// (g0 + g1) + g2 ... No sum in this program depends on the number of ranks or threads, so no bit of a run does. The
// price is one exchange per round instead of one per step, which is little compared with a round's time on a CPU. (The
// GPU trainer adds up locally first.)
//   ZeRO stage 0: sums are gathered, and every rank updates all weights
//   stages 1, 2:  each rank updates its slices, and weights are gathered. At every stage a rank has the whole gradients
//                 of one micro-batch only, so stage 2 has nothing more to divide.
struct Sums {
    Comm *comm;
    int64_t zero;
    int64_t micro_batches;      // per step
    real *grads;                // (num_stored / world) the sums; T6's own gradients if one rank has one micro-batch
    real *scratch;              // (largest bucket) received slices
    double *losses;             // (micro_batches) sum of each one's losses
    SpikeLimits limits;
};

static int has_own_sums(const TrainOptions *o) { return comm_world(o->comm) > 1 || o->accum > 1; }

void t6_start(TrainOptions *o) {
    if (comm_world(o->comm) > 1 && !o->comm->run)
        die(EXIT_INPUT, "--comm-file is for GPUs; on CPUs start the ranks with mpirun or srun --mpi=pmix");
    cpu_start(o->threads, o->comm ? o->comm->local_world : 1);
}

void t6_describe(char *out, size_t size) {
    char library[64];
    snprintf(out, size, "CPU, %d threads, %s", omp_get_max_threads(), comm_library(library));
}

void t6_plan(TrainOptions *o, const Model *m, Logger *log) {
    double weights = (double)m->num_stored * sizeof(real), acts = activation_bytes(m, o->batch_size, o->seq_len);
    double world = comm_world(o->comm), ranks = o->comm ? o->comm->local_world : 1, GiB = 0x1p30;
    double grads = weights + (has_own_sums(o) ? weights / world : 0);
    if (world > 1) grads += (double)(model_largest_bucket(m) * sizeof(real));
    double moments = 2 * weights / (o->zero ? world : 1);
    if (o->forward_only) grads = moments = 0;       // allocated, but never touched
    double need = (weights + grads + moments + acts) * ranks;
    HostMemory have = host_memory((int)ranks);
    char times[32] = "", note[192];
    if (ranks > 1) snprintf(times, sizeof times, ", times %.0f ranks here", ranks);
    logger_printf(log, "memory: weights %.2f + gradients %.2f + AdamW %.2f + activations %.2f%s = %.2f GiB of %.2f "
                  "available%s\n", weights / GiB, grads / GiB, moments / GiB, acts / GiB, times, need / GiB,
                  have.bytes / GiB, have.limit);
    logger_printf(log, "%s", cpu_note(note, o->threads, (int)ranks));
    if (need > have.bytes)
        die(EXIT_INPUT, "this run needs %.2f GiB of memory and %.2f are available%s: lower --batch-size (-b) or "
            "%s, or use a smaller --model (-e)", need / GiB, have.bytes / GiB, have.limit,
            o->forward_only ? "--context" : "--seq-len (-t)");
}

T6 *t6_open(const TrainOptions *o) {
    T6 *t6 = xmalloc(sizeof *t6);
    int rank = comm_rank(o->comm), world = comm_world(o->comm);
    t6_alloc(t6, &o->config, o->batch_size, o->seq_len, 1, world, o->zero ? (Slice){rank, world} : (Slice){0, 1});
    struct Sums *sums = t6->sums = xcalloc(1, sizeof *sums);
    sums->comm = o->comm, sums->zero = o->zero, sums->micro_batches = o->accum > 0 ? o->accum : 1;
    sums->limits = (SpikeLimits){INFINITY, INFINITY};
    sums->grads = has_own_sums(o) ? xcalloc(t6->model.num_stored / (size_t)world, sizeof(real)) : t6->grads;
    sums->scratch = world > 1 ? xmalloc(model_largest_bucket(&t6->model) * sizeof(real)) : NULL;
    sums->losses = xcalloc((size_t)sums->micro_batches, sizeof *sums->losses);
    return t6;
}

void t6_close(T6 *t6) {
    if (t6->sums->grads != t6->grads) free(t6->sums->grads);
    free(t6->sums->scratch), free(t6->sums->losses), free(t6->sums);
    t6_free(t6);
    free(t6);
}

const Model *t6_model(const T6 *t6) { return &t6->model; }

// The model's own memory is host memory: nothing is copied either way.
HostWeights t6_host_weights(T6 *t6, HostCopy copy) {
    (void)copy;
    return (HostWeights){t6->params, t6->adam_m, t6->adam_v, t6->moments};
}
void t6_load_weights(T6 *t6, LoadWhat what) { (void)t6, (void)what; }

double t6_sequence_loss(T6 *t6, const int32_t *inputs, const int32_t *targets, int64_t B) {
    t6_forward(t6, inputs, B, t6->T);
    return t6_loss(t6, targets, B * t6->T, 0, LOSS_ONLY);
}

void t6_micro_step(T6 *t6, const int32_t *inputs, const int32_t *targets, double dloss, int64_t k) {
    struct Sums *sums = t6->sums;
    const Model *m = &t6->model;
    int world = comm_world(sums->comm);
    int64_t left = sums->micro_batches - k * world;
    int contributors = left < world ? (int)left : world;
    if (k == 0) {
        memset(sums->losses, 0, (size_t)sums->micro_batches * sizeof *sums->losses);
        if (sums->grads != t6->grads) memset(sums->grads, 0, m->num_stored / (size_t)world * sizeof *sums->grads);
    }
    if (inputs) {
        t6_zero_gradients(t6);
        t6_forward(t6, inputs, t6->B, t6->T);
        sums->losses[k * world + comm_rank(sums->comm)] = t6_loss(t6, targets, t6->B * t6->T, dloss, LOSS_AND_DLOGITS);
        t6_backward(t6, inputs, t6->B, t6->T);
    }
    for (int i = 0; sums->grads != t6->grads && i < model_buckets(m); i++) {
        Bucket bucket = model_bucket(m, i);
        size_t part = bucket.size / (size_t)world;
        comm_reduce_scatter(sums->comm, sums->grads + bucket.offset / (size_t)world, t6->grads + bucket.offset,
                            sums->scratch, part, contributors, "gradients");
    }
}

void t6_set_limits(T6 *t6, SpikeLimits limits) { t6->sums->limits = limits; }

void t6_update(T6 *t6, const TrainOptions *o, double lr, int64_t step, double *loss, double *norm) {
    struct Sums *sums = t6->sums;
    const Model *m = &t6->model;
    Slice mine = {comm_rank(sums->comm), comm_world(sums->comm)};
    AdamW options = {.lr = lr, .beta1 = o->beta1, .beta2 = o->beta2, .eps = o->adam_eps,
                     .weight_decay = o->weight_decay};
    comm_sum(sums->comm, sums->losses, (size_t)sums->micro_batches, "losses");
    *loss = 0;
    for (int64_t i = 0; i < sums->micro_batches; i++) *loss += sums->losses[i];
    *norm = gradient_norm(m, sums->grads, sums->comm);
    if (!isfinite(*norm) || *loss > sums->limits.loss || *norm > sums->limits.norm) return;
    for (int k = 0; k < model_buckets(m); k++) {
        Bucket bucket = model_bucket(m, k), slice = model_slice(m, mine, k);
        const real *grads = sums->grads + bucket.offset / (size_t)mine.world;
        size_t part = slice.size, at = bucket.offset / (size_t)t6->moments.world;
        if (mine.world > 1 && sums->zero == 0) {        // gather the sums, and update the whole bucket
            memcpy(t6->grads + slice.offset, grads, part * sizeof *grads);
            comm_all_gather(sums->comm, t6->grads + bucket.offset, part, "sums of gradients");
            grads = t6->grads + bucket.offset, slice = bucket;
        }
        adamw_update(t6->params + slice.offset, t6->adam_m + at, t6->adam_v + at, grads, slice.size, &options, step,
                     clip_factor(*norm, o->clip));
        if (sums->zero) comm_all_gather(sums->comm, t6->params + bucket.offset, part, "weights");
    }
}

// Scores one token by the logits (V) of what follows its row; their values are lost. Of equally likely tokens the first
// is the greedy choice.
static void score_token(ScoredToken *s, real *row, int64_t V) {
    real largest = row[0];
    double sum = 0;
    int ties = 0;
    #pragma omp simd reduction(max:largest)
    for (int64_t i = 1; i < V; i++) largest = row[i] > largest ? row[i] : largest;
    for (int64_t i = 0; i < s->token; i++) ties += row[i] == largest;
    real at_token = row[s->token] - largest;
    for (int64_t i = 0; i < V; i++) row[i] = exp(row[i] - largest);
    #pragma omp simd reduction(+:sum)
    for (int64_t i = 0; i < V; i++) sum += row[i];
    s->loglikelihood = at_token - log(sum);
    s->is_greedy = at_token == 0 && ties == 0;
}

void t6_position_logits(T6 *t6, float *logits, const int32_t *ids, int64_t n, const int64_t *positions,
                        int64_t count) {
    t6_forward(t6, ids, 1, n);
    for (int64_t i = 0; i < count; i++) t6_logits(t6, positions[i], logits + i * t6->model.config.vocab_size);
}

// The classifier runs only for the rows that are scored, which are gathered in acts.dn.
void t6_score(T6 *t6, const int32_t *ids, int64_t B, int64_t T, ScoredToken *scored, int64_t count) {
    const Model *m = &t6->model;
    Activations *acts = &t6->acts;
    int64_t C = m->config.n_embd, V = m->config.vocab_size, most = B * T < CLASSIFIER_ROWS ? B * T : CLASSIFIER_ROWS;
    t6_forward(t6, ids, B, T);
    for (int64_t first = 0; first < count; first += most) {
        int64_t rows = count - first < most ? count - first : most;
        for (int64_t i = 0; i < rows; i++)
            memcpy(acts->dn + i * C, acts->nf + scored[first + i].row * C, (size_t)C * sizeof *acts->dn);
        linear_forward(acts->logits, acts->dn, t6->params + m->wte, rows, C, m->Vp, OVERWRITE);
        #pragma omp parallel for
        for (int64_t i = 0; i < rows; i++) score_token(&scored[first + i], acts->logits + i * m->Vp, V);
    }
}

const float *t6_gradients(const T6 *t6) { return t6->sums->grads; }     // (num_stored / world); for test_t6.cu

const TrainerModel t6_trainer = {
    .title = "train_t6: trains T6, the tensor product attention transformer, on the CPU. Without flags: preset tiny, "
             "toy corpus.",
    .pad = 1, .start = t6_start, .describe = t6_describe, .plan = t6_plan, .open = t6_open, .close = t6_close,
    .model = t6_model, .host_weights = t6_host_weights, .load_weights = t6_load_weights, .loss = t6_sequence_loss,
    .logits = t6_position_logits, .score = t6_score, .micro_step = t6_micro_step, .set_limits = t6_set_limits,
    .update = t6_update,
};

#ifndef T6_NO_MAIN      // test_t6.cu links this file without it, and eval_t6.c includes it
int main(int argc, char **argv) { return trainer_main(argc, argv, &t6_trainer); }
#endif
#endif
