/* Attention alone: the structures of attention.py, and what frameworks' libraries are told of it. */

#include <stdint.h>
#include <stdlib.h>

typedef struct {
    int64_t B, T, S, N, K, H, window; /* of keys a query sees; below 0: all */
    int32_t type, threads;
    const void *q, *k, *v;                    /* [B,T,N,H], [B,S,K,H] */
    void *y;                                  /* [B,T,N,H] */
    const int64_t *order, *key_order;         /* [B,T] and [B,S]: how many real tokens are before each, -1 for none */
    const int64_t *document;                  /* [B,S]: the document of each token, queries and keys alike, or NULL */
} Seeing;

/* Its gradients in q, k and v: `of` has what it was given, but for orders and documents, and the y that it gave. */
typedef struct {
    Seeing of;
    const void *dy; /* the gradient of a loss in y */
    void *dq, *dk, *dv;
    const int32_t *order, *key_order, *document; /* as those of `of` */
} Gradients;

typedef int (*Attend)(const Seeing *, Parallel);
typedef int (*AttentionGradients)(const Gradients *, Parallel);

/* Attention with orders, and documents or NULL, of 32 bits: what `mistral_attend` gives, or -1 where there is no
   memory. */
static inline int attend_by(
    Attend attend, Seeing *a, const int32_t *order, const int32_t *key_order, const int32_t *document)
{
    int64_t queries = a->B * a->T, keys = a->B * a->S, *wide = malloc((size_t)(8 * (queries + 2 * keys) + 8));
    if (!wide) return -1;
    for (int64_t i = 0; i < queries; i++) wide[i] = order[i];
    for (int64_t i = 0; i < keys; i++) wide[queries + i] = key_order[i];
    for (int64_t i = 0; document && i < keys; i++) wide[queries + keys + i] = document[i];
    a->order = wide, a->key_order = wide + queries, a->document = document ? wide + queries + keys : NULL;
    int code = attend(a, NULL);
    free(wide);
    return code;
}

/* What a framework says of a code that is not 0. */
static inline const char *told_of(int code)
{
    return code == 1 ? "attention must have every key that a query sees: one is not there, for the cache was rolled "
                       "back further than it remembers"
                     : "attention must have memory for keys and values in the order of their tokens";
}
