/* What a step and a prompt are told of a model, its cache and the new tokens: the structures of whole_step.py. */

#include <stdint.h>

enum { CODES = 3 };  /* the type of a cache of int8 codes with scales */
enum { FLOATS = 4 }; /* the kind of a weight that is numbers of the model's type */

/* sgemm of BLAS, c = alpha a b + beta c by columns; whole numbers are small and are read as 32 bits or as 64. */
typedef void (*Gemm)(
    const char *turn_a, const char *turn_b, const int64_t *m, const int64_t *n, const int64_t *k, const float *alpha,
    const float *a, const int64_t *lda, const float *b, const int64_t *ldb, const float *beta, float *c,
    const int64_t *ldc);

typedef struct {
    int32_t kind, scale_type, rounded, unused;
    const void *codes, *scale;
    const int8_t *zero;
    int64_t O, I, high, wide;
} Weight;

typedef struct {
    const float *input_norm, *post_norm;
    Weight q, k, v, o, gate, up, down;
    int64_t window; /* below 0: all are seen */
} Layer;

typedef struct {
    int64_t D, N, K, H, F, V, L;
    int32_t type, threads;
    float eps;
    int32_t unused;
    const Layer *layers;
    const float *norm;
    Weight embedding, head;
    Gemm gemm; /* what multiplies many rows of a prompt, of a model in float32; NULL: rows.c */
} Model;

typedef struct {
    int32_t type, unused;
    const int64_t *slots; /* [L] */
    void *const *keys, *const *values;          /* L of [B,R,K,H] */
    float *const *key_scales, *const *value_scales; /* L of [B,R,K], of codes */
} Cache;

typedef struct {
    int64_t B, T;
    const int64_t *ids, *order, *length; /* [B,T], [B,T] with -1 for padding, [B] before the call */
    const float *cos, *sin;              /* [B,T,H/2] */
    const float *query_scale;            /* [B,T], or NULL */
    const int64_t *begin;                /* [B,T]: the order of the first token that one sees at most, or NULL */
    int64_t every;                       /* logits of each token, or of the last column */
} Tokens;

static inline int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
