// The operators and the model of train_t6.c, for test_t6.cu. Each is explained where train_t6.c defines it. test_t6.cu
// includes the four headers first and then this file inside a namespace, because train_t6.cu has the same names.
#ifndef TRAIN_T6_H
#define TRAIN_T6_H

#include "llmc/checkpoint.h"
#include "llmc/modes.h"
#include "llmc/options.h"
#include "llmc/real.h"

#ifdef __cplusplus
extern "C" {
#endif

void matmul(real *out, int64_t ldo, const real *left, int64_t ldl, Layout left_is, const real *right, int64_t ldr,
            Layout right_is, int64_t M, int64_t N, int64_t K, OutputMode mode);
void encoder_forward(real *x, const int32_t *idx, const real *wte, int64_t N, int64_t C);
void encoder_backward(real *dwte, const real *dx, const int32_t *idx, int64_t N, int64_t C);
void rmsnorm_forward(real *out, real *rstd, const real *x, int64_t N, int64_t C, double eps);
void rmsnorm_backward(real *dx, const real *dout, const real *out, const real *rstd, int64_t N, int64_t C,
                      OutputMode mode);
void rope(real *fac, const Heads *heads, const real *table, int64_t B, int64_t T, int64_t Pp, Direction direction);
void contract_forward(real *out, const real *fac, const Heads *heads, int64_t N, int64_t NH, int64_t Pp);
void contract_backward(real *dfac, const real *dout, const real *fac, const Heads *heads, int64_t N, int64_t NH,
                       int64_t Pp);
void gain_forward(real *out, real *rstd, const real *x, int64_t ldx, const real *gain, int64_t N, int64_t C,
                  double eps);
void gain_backward(real *dx, real *dgain, const real *dout, const real *x, const real *rstd, int64_t ldx,
                   const real *gain, int64_t N, int64_t C);
void factors_forward(real *fac, const real *proj, const real *layer, const Heads *h, HeadAct act, const real *table,
                     int64_t B, int64_t T, int64_t NH, int64_t Pp, int64_t PF);
void factors_backward(real *dproj, real *dlayer, real *dfac, const real *fac, const real *proj, const real *layer,
                      const Heads *h, HeadAct act, const real *table, int64_t B, int64_t T, int64_t NH, int64_t Pp,
                      int64_t PF);
void gate_forward(real *z, const real *g, int64_t ldg, const real *y, int64_t N, int64_t D, int64_t Dp);
void gate_backward(real *dg, real *dz, const real *g, int64_t ldg, const real *y, int64_t N, int64_t D, int64_t Dp);
void latent_heads_forward(real *k, real *v, const real *kv, const real *kr, int64_t ldr, const real *table, int64_t B,
                          int64_t T, int64_t NH, int64_t HSV, int64_t HSR);
void latent_heads_backward(real *dkv, real *dkr, int64_t ldr, const real *dk, const real *dv, const real *table,
                           int64_t B, int64_t T, int64_t NH, int64_t HSV, int64_t HSR);
int64_t attention_scratch_size(int64_t T);
void attention_forward(real *y, real *lse, real *scratch, const real *q, const real *k, const real *v, int64_t B,
                       int64_t T, int64_t NH, int64_t HSK, int64_t HSV, int64_t Dp, double scale);
void attention_backward(real *dq, real *dk, real *dv, real *scratch, const real *dy, const real *y, const real *lse,
                        const real *q, const real *k, const real *v, int64_t B, int64_t T, int64_t NH, int64_t HSK,
                        int64_t HSV, int64_t Dp, double scale);
void swiglu_forward(real *s, const real *u, int64_t N, int64_t Fp);
void swiglu_backward(real *du, const real *ds, const real *u, int64_t N, int64_t Fp);
double softmax_cross_entropy(real *logits, const int32_t *targets, int64_t rows, int64_t V, int64_t Vp, double dloss,
                             LossMode mode);

typedef struct T6 T6;
void t6_forward(T6 *t6, const int32_t *idx, int64_t B, int64_t T);
void t6_logits(const T6 *t6, int64_t n, real *out);
void t6_start(TrainOptions *o);
T6 *t6_open(const TrainOptions *o);
void t6_close(T6 *t6);
const Model *t6_model(const T6 *t6);
HostWeights t6_host_weights(T6 *t6, HostCopy copy);
void t6_micro_step(T6 *t6, const int32_t *inputs, const int32_t *targets, double dloss, int64_t k);
void t6_update(T6 *t6, const TrainOptions *o, double lr, int64_t step, double *loss, double *norm);
const float *t6_gradients(const T6 *t6);

#ifdef __cplusplus
}
#endif
#endif
