/* Attention alone: the structure of attention.py, and what frameworks' libraries are told of it. */

#include <stdint.h>
#include <stdlib.h>

typedef struct {
    int64_t B, T, S, N, K, H, window; /* of keys a query sees; below 0: all */
    int32_t type, threads;
    const void *q, *k, *v;                    /* [B,T,N,H], [B,S,K,H] */
    void *y;                                  /* [B,T,N,H] */
    const int64_t *order, *begin, *key_order; /* [B,T], of `Tokens`, and [B,S]: -1 for none */
} Seeing;

typedef int (*Attend)(const Seeing *, Parallel);

/* Attention with orders of 32 bits, one after another: what `mistral_attend` gives, or -1 where there is no memory. */
static inline int attend_by(Attend attend, Seeing *a, const int32_t *order, const int32_t *key_order)
{
    int64_t queries = a->B * a->T, keys = a->B * a->S, *orders = malloc((size_t)(8 * (queries + keys) + 8));
    if (!orders) return -1;
    for (int64_t i = 0; i < queries; i++) orders[i] = order[i];
    for (int64_t i = 0; i < keys; i++) orders[queries + i] = key_order[i];
    a->order = orders, a->key_order = orders + queries;
    int code = attend(a, NULL);
    free(orders);
    return code;
}

/* What a framework says of a code that is not 0. */
static inline const char *told_of(int code)
{
    return code == 1 ? "attention must have every key that a query sees: one is not there, for the cache was rolled "
                       "back further than it remembers"
                     : "attention must have memory for keys and values in the order of their tokens";
}
