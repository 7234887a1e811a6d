/* The gradients of attention in q, k and v, by tiles, of which nothing of the size of a text's square is kept.

   With s = q k / sqrt(H), p = softmax(s), y = p v and the gradient dy of a loss in y: dv = p^T dy, dp = dy v^T,
   ds = p (dp - dy . y), dq = ds k / sqrt(H) and dk = ds^T q / sqrt(H) (https://arxiv.org/abs/2307.08691, 3.1). Blocks of
   queries meet the keys that one of them sees, with a running softmax, for dq; then blocks of keys meet their queries,
   for dk and dv. Nothing is written by two parts, and each sum has an order: the bits are the same whatever the threads.

   Numbers are those of the contract of mistral_core/reference: sums in float32, results rounded once to the type of the
   arrays, as p and ds are before they are multiplied. Axes as in whole_prompt.c, and R = T G, the queries of a key/value
   head. A query sees the keys of its document whose orders are from its own less a window to its own. */

#include <stdatomic.h>
#include <stdlib.h>

#include "bound.h"
#include "formulas.h"
#include "seeing.h"
#include "step.h"
#include "tiles.h"

#ifdef TILES

enum { BLOCK = 2 * SIDE, MANY = 256 }; /* rows and columns that meet, and the columns whose numbers are held at once */
enum { TOGETHER = 4 }; /* blocks of a part, which meet the same columns while a cache has them */

/* What some queries see, or where some keys are: orders and documents. */
typedef struct {
    int32_t lowest, highest, first, last;
} Span;

typedef struct {
    const Seeing *a;
    const Gradients *g;
    Way way;
    int64_t R, J; /* in whole blocks: queries of each row and key/value head, and keys of each row */
    char *keys_across, *values_across, *keys_down; /* [B,K] of J x H */
    char *queries_across, *queries_down, *slopes_across, *slopes_down; /* [B,K] of R x H; slopes: dy */
    int32_t *from, *to, *own; /* [B,R]: the orders that a query sees, and its document */
    int32_t *order, *document; /* [B,J]: of keys */
    Span *of_queries, *of_keys; /* [B,R / BLOCK] and [B,J / BLOCK] */
    float *most, *share, *mean; /* [B,K,R]: the largest score, 1 / the sum of exponentials, and dy . y */
    atomic_int *failed;
} Work;

/* ---- who sees whom ---- */

static inline void widened(Span *span, int32_t lowest, int32_t highest, int32_t document)
{
    span->lowest = lowest < span->lowest ? lowest : span->lowest;
    span->highest = highest > span->highest ? highest : span->highest;
    span->first = document < span->first ? document : span->first;
    span->last = document > span->last ? document : span->last;
}

static inline int meet(const Span *some, const Span *others)
{
    return some->lowest <= others->highest && others->lowest <= some->highest && some->first <= others->last &&
           others->first <= some->last;
}

static void look(const Work *w, int64_t b)
{
    const Seeing *a = w->a;
    const Span nobody = {INT32_MAX, -1, INT32_MAX, INT32_MIN};
    int64_t G = a->N / a->K;
    for (int64_t i = 0; i < w->R / BLOCK; i++) w->of_queries[b * (w->R / BLOCK) + i] = nobody;
    for (int64_t j = 0; j < w->J / BLOCK; j++) w->of_keys[b * (w->J / BLOCK) + j] = nobody;
    for (int64_t r = 0; r < w->R; r++) {
        int64_t at = b * w->R + r;
        int32_t order = r < a->T * G ? w->g->order[b * a->T + r / G] : -1;
        w->from[at] = INT32_MAX, w->to[at] = -1, w->own[at] = 0;
        if (order < 0) continue;
        w->from[at] = a->window < 0 || order < a->window ? 0 : (int32_t)(order - a->window + 1), w->to[at] = order;
        if (w->g->document) w->own[at] = w->g->document[b * a->S + r / G];
        widened(&w->of_queries[at / BLOCK], w->from[at], w->to[at], w->own[at]);
    }
    for (int64_t j = 0; j < w->J; j++) {
        int64_t at = b * w->J + j;
        w->order[at] = j < a->S ? w->g->key_order[b * a->S + j] : -1;
        w->document[at] = j < a->S && w->g->document ? w->g->document[b * a->S + j] : 0;
        if (w->order[at] >= 0) widened(&w->of_keys[at / BLOCK], w->order[at], w->order[at], w->document[at]);
    }
}

/* Which of sixteen, from the one after another on, a query sees, or see a key. */
static inline __mmask16 sees(int32_t from, int32_t to, int32_t own, const int32_t *order, const int32_t *document)
{
    __m512i orders = _mm512_loadu_si512(order);
    __mmask16 seen = _mm512_cmple_epi32_mask(_mm512_set1_epi32(from), orders);
    seen = _mm512_mask_cmple_epi32_mask(seen, orders, _mm512_set1_epi32(to));
    return _mm512_mask_cmpeq_epi32_mask(seen, _mm512_loadu_si512(document), _mm512_set1_epi32(own));
}

static inline __mmask16 see(
    int32_t order, int32_t document, const int32_t *from, const int32_t *to, const int32_t *own)
{
    __m512i orders = _mm512_set1_epi32(order);
    __mmask16 seen = _mm512_cmple_epi32_mask(_mm512_loadu_si512(from), orders);
    seen = _mm512_mask_cmple_epi32_mask(seen, orders, _mm512_loadu_si512(to));
    return _mm512_mask_cmpeq_epi32_mask(seen, _mm512_loadu_si512(own), _mm512_set1_epi32(document));
}

/* ---- rows as tiles ---- */

static inline int64_t parts_of(int64_t rows) { return (rows + TOGETHER * BLOCK - 1) / (TOGETHER * BLOCK); }

static inline int64_t of_row(const Work *w) { return w->a->H * bytes_of(w->a->type); }

/* Row r of the queries of row b and a key/value head, of q, y, dy or dq; NULL after the last. */
static inline char *query_of(const Work *w, const void *array, int64_t b, int64_t head, int64_t r)
{
    const Seeing *a = w->a;
    int64_t G = a->N / a->K;
    return r < a->T * G ? (char *)array + ((b * a->T + r / G) * a->N + head * G + r % G) * of_row(w) : NULL;
}

/* Row j of the keys, of k, v, dk or dv. */
static inline char *key_of(const Work *w, const void *array, int64_t b, int64_t head, int64_t j)
{
    const Seeing *a = w->a;
    return j < a->S ? (char *)array + ((b * a->S + j) * a->K + head) * of_row(w) : NULL;
}

/* A part is 32 queries, or keys, of a row and a head. */
static void turn(const void *argument, int64_t part)
{
    const Work *w = argument;
    int64_t K = w->a->K, H = w->a->H, columns = columns_of(w->way), blocks = (w->R + w->J) / BLOCK;
    int64_t pair = part / blocks, b = pair / K, head = pair % K, first = part % blocks * BLOCK;
    int is_key = first >= w->R;
    int64_t length = is_key ? w->J : w->R, of_pair = length * of_row(w), panel = length / columns * TILE;
    const char *one[BLOCK], *other[BLOCK];
    first -= is_key ? w->R : 0;
    for (int k = 0; k < BLOCK; k++) {
        one[k] = is_key ? key_of(w, w->a->k, b, head, first + k) : query_of(w, w->a->q, b, head, first + k);
        other[k] = is_key ? key_of(w, w->a->v, b, head, first + k) : query_of(w, w->g->dy, b, head, first + k);
    }
    int64_t across = pair * of_pair + first * of_row(w), down = pair * of_pair + first / columns * TILE;
    turn_across(w->way, one, H, (is_key ? w->keys_across : w->queries_across) + across);
    turn_across(w->way, other, H, (is_key ? w->values_across : w->slopes_across) + across);
    turn_down(w->way, one, H, (is_key ? w->keys_down : w->queries_down) + down, panel);
    if (!is_key) turn_down(w->way, other, H, w->slopes_down + down, panel);
}

/* ---- products: 32 rows, and columns in whole blocks ---- */

static _Thread_local struct {
    float scores[BLOCK * MANY], slopes[BLOCK * MANY]; /* q k before it is scaled, and dp */
    char weights[BLOCK * MANY * 4], shares[BLOCK * MANY * 4]; /* p or ds, and ds, as numbers of the type */
} met __attribute__((aligned(64)));

/* c[32,n] = a[32,H] b[n,H]^T, where b is turned across, from row j on. */
static void meet_across(const Work *w, const char *a, const char *b, int64_t j, int64_t n, float *c)
{
    int64_t steps = w->a->H / columns_of(w->way);
    for (int64_t k = 0; k < n; k += BLOCK) {
        Block block = {
            .a = a, .stride = of_row(w), .below = rows_of(w->way) * of_row(w), .step = 64,
            .b = b + (j + k) * of_row(w), .panel = steps * TILE, .steps = steps, .c = c + k, .c_stride = MANY * 4,
            .panels = 2};
        multiply_tiles(w->way, &block);
    }
}

/* c[32,H] += a[32,n] b[n,H], where b is turned down, of so many rows, from row j on. */
static void meet_down(const Work *w, const char *a, const char *b, int64_t rows, int64_t j, int64_t n, float *c)
{
    int64_t stride = MANY * bytes_of(w->a->type), columns = columns_of(w->way), panel = rows / columns * TILE;
    for (int64_t i = 0; i < w->a->H; i += BLOCK) {
        Block block = {
            .a = a, .stride = stride, .below = rows_of(w->way) * stride, .step = 64,
            .b = b + i / SIDE * panel + j / columns * TILE, .panel = panel, .steps = n / columns, .c = c + i,
            .c_stride = w->a->H * 4, .panels = 2, .adds = 1};
        multiply_tiles(w->way, &block);
    }
}

static inline void put_two(int type, char *to, int64_t j, const Lanes two[2]) /* 32 numbers from the one at j on */
{
    if (type == BFLOAT16) _mm512_store_si512(to + j * 2, bfloat16_of_lanes((__m512)two[0], (__m512)two[1]));
    else put_lanes((float *)to + j, two[0]), put_lanes((float *)to + j + LANES, two[1]);
}

/* The next blocks that some meet, of columns from *j on and before the last: how many columns, 0 at the end. */
static int64_t next_blocks(const Span *some, const Span *blocks, int64_t last, int64_t *j)
{
    int64_t n = 0;
    while (*j < last && !meet(some, blocks + *j / BLOCK)) *j += BLOCK;
    while (*j + n < last && meet(some, blocks + (*j + n) / BLOCK)) n += BLOCK;
    return n;
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* A row to `to`, or zeros where there is none. */
static void gather(const Work *w, const char *row, char *to)
{
    if (row) memcpy(to, row, (size_t)of_row(w));
    else memset(to, 0, (size_t)of_row(w));
}

/* Sums times a number as a row of an array. */
static void put_row(const Work *w, const float *sums, float by, char *row)
{
    int type = w->a->type;
    for (int64_t i = 0; row && i < w->a->H; i += LANES)
        given(type, row, i, w->a->H, rounded_as(type, lanes_at(sums + i) * by));
}

/* Some blocks of queries, or of keys, of a row and a key/value head. */
typedef struct {
    int64_t pair, b, head, first, rows;
    char *one, *other; /* [rows,H]: q and dy, or k and v */
    float *sums, *more; /* [rows,H]: dq, or dk and dv */
    float sum[TOGETHER * BLOCK]; /* of each query's exponentials so far */
} Part;

/* A part of so many rows, with memory to be freed at `sums`; whether there is some. */
static int begin(const Work *w, int64_t part, int64_t length, Part *p)
{
    int64_t parts = parts_of(length), pair = part / parts, first = part % parts * TOGETHER * BLOCK;
    size_t sums = (size_t)(TOGETHER * BLOCK * w->a->H) * 4, numbers = (size_t)(TOGETHER * BLOCK * of_row(w));
    *p = (Part){
        .pair = pair, .b = pair / w->a->K, .head = pair % w->a->K, .first = first,
        .rows = least(TOGETHER * BLOCK, length - first), .sums = aligned_alloc(64, 2 * (sums + numbers))};
    if (!p->sums) {
        atomic_store(w->failed, ERROR_MEMORY);
        return 0;
    }
    memset(p->sums, 0, 2 * sums);
    p->more = p->sums + sums / 4, p->one = (char *)(p->more + sums / 4), p->other = p->one + numbers;
    return 1;
}

/* The blocks of a part from row i on meet n columns from j on: those of `all` that one of `own` meets. */
static void meet_all(
    const Work *w, Part *p, const Span *own, const Span *all, int64_t length,
    void (*met)(const Work *, Part *, int64_t i, int64_t j, int64_t n))
{
    Tiling before;
    use_tiles(w->way, &before);
    for (int64_t from = 0; from < length; from += MANY)
        for (int64_t i = 0; i < p->rows; i += BLOCK)
            for (int64_t j = from, n; (n = next_blocks(own + i / BLOCK, all, least(from + MANY, length), &j)); j += n)
                met(w, p, i, j, n);
    leave_tiles(w->way, &before);
}

/* ---- dq: a part is some blocks of queries of a row and a key/value head ---- */

/* ds of query n, times the sum of its exponentials, rounded, from scores and dp, to the most so far; its dq so far
   follows. */
static inline __attribute__((always_inline)) void learn_as(
    int type, const Work *w, int64_t n, int64_t of_query, int64_t query, int64_t keys, int64_t count, float by,
    float *sum, float *dq)
{
    const float *score = met.scores + n * MANY, *slope = met.slopes + n * MANY;
    const int32_t *order = w->order + keys, *document = w->document + keys;
    int32_t from = w->from[query], to = w->to[query], own = w->own[query];
    const Lanes low = (Lanes){0} - INFINITY;
    Lanes most = low, sums = {0};
    for (int64_t j = 0; j < count; j += LANES)
        most = (Lanes)_mm512_mask_max_ps(
            (__m512)most, sees(from, to, own, order + j, document + j), (__m512)most, _mm512_loadu_ps(score + j));
    float best = _mm512_reduce_max_ps((__m512)most) * by, mean = w->mean[of_query];
    best = w->most[of_query] > best ? w->most[of_query] : best;
    for (int64_t j = 0; j < count; j += 2 * LANES) {
        Lanes ds[2];
        for (int k = 0; k < 2; k++) {
            int64_t i = j + k * LANES;
            __mmask16 seen = sees(from, to, own, order + i, document + i);
            Lanes e = exp_lanes(lanes_at(score + i) * by - best);
            sums += (Lanes)_mm512_maskz_mov_ps(seen, (__m512)e);
            ds[k] = (Lanes)_mm512_maskz_mov_ps(seen, (__m512)(e * (lanes_at(slope + i) - mean)));
        }
        put_two(type, met.weights + n * MANY * bytes_of(type), j, ds);
    }
    if (best != w->most[of_query]) {
        Lanes before = low;
        before[0] = w->most[of_query] - best;
        float less = exp_lanes(before)[0];
        *sum *= less;
        for (int64_t i = 0; i < w->a->H; i += LANES) put_lanes(dq + i, lanes_at(dq + i) * less);
    }
    w->most[of_query] = best;
    *sum += sum_of(sums);
}

static void learn(const Work *w, Part *p, int64_t i, int64_t j, int64_t n)
{
    int64_t H = w->a->H, of_keys = p->pair * w->J * of_row(w), keys = p->b * w->J + j;
    int64_t of_query = p->pair * w->R + p->first + i, query = p->b * w->R + p->first + i;
    float by = 1 / sqrtf((float)H), *sum = p->sum + i, *dq = p->sums + i * H;
    meet_across(w, p->one + i * of_row(w), w->keys_across + of_keys, j, n, met.scores);
    meet_across(w, p->other + i * of_row(w), w->values_across + of_keys, j, n, met.slopes);
    for (int r = 0; r < BLOCK; r++) {
        if (w->a->type == FLOAT32) learn_as(FLOAT32, w, r, of_query + r, query + r, keys, n, by, sum + r, dq + r * H);
        else learn_as(BFLOAT16, w, r, of_query + r, query + r, keys, n, by, sum + r, dq + r * H);
    }
    meet_down(w, met.weights, w->keys_down + of_keys, w->J, j, n, dq);
}

static void of_queries(const void *argument, int64_t part)
{
    const Work *w = argument;
    const Seeing *a = w->a;
    Part p;
    if (!begin(w, part, w->R, &p)) return;
    int64_t H = a->H, of_query = p.pair * w->R + p.first;
    for (int64_t n = 0; n < p.rows; n++) {
        const char *y = query_of(w, a->y, p.b, p.head, p.first + n);
        const char *slope = query_of(w, w->g->dy, p.b, p.head, p.first + n);
        Lanes mean = {0};
        for (int64_t i = 0; y && i < H; i += LANES) mean += taken(a->type, y, i, H) * taken(a->type, slope, i, H);
        w->mean[of_query + n] = sum_of(mean), w->most[of_query + n] = -INFINITY;
        gather(w, query_of(w, a->q, p.b, p.head, p.first + n), p.one + n * of_row(w));
        gather(w, slope, p.other + n * of_row(w));
    }
    const Span *own = w->of_queries + (p.b * w->R + p.first) / BLOCK;
    meet_all(w, &p, own, w->of_keys + p.b * (w->J / BLOCK), w->J, learn);
    for (int64_t n = 0; n < p.rows; n++) {
        float share = p.sum[n] == 0 ? 0 : 1 / p.sum[n];
        put_row(w, p.sums + n * H, share / sqrtf((float)H), query_of(w, w->g->dq, p.b, p.head, p.first + n));
        w->share[of_query + n] = share;
        if (p.sum[n] == 0) w->most[of_query + n] = 0;
    }
    free(p.sums);
}

/* ---- dk and dv: a part is some blocks of keys of a row and a key/value head ---- */

/* p and ds of key n with some queries, rounded. */
static inline __attribute__((always_inline)) void teach_as(
    int type, const Work *w, int64_t n, int64_t key, int64_t of_queries, int64_t queries, int64_t count, float by)
{
    const float *score = met.scores + n * MANY, *slope = met.slopes + n * MANY;
    int32_t order = w->order[key], document = w->document[key];
    for (int64_t j = 0; j < count; j += 2 * LANES) {
        Lanes p[2], ds[2];
        for (int k = 0; k < 2; k++) {
            int64_t i = j + k * LANES, r = of_queries + i, of = queries + i;
            __mmask16 seen = see(order, document, w->from + of, w->to + of, w->own + of);
            Lanes e = exp_lanes(lanes_at(score + i) * by - lanes_at(w->most + r)) * lanes_at(w->share + r);
            p[k] = (Lanes)_mm512_maskz_mov_ps(seen, (__m512)e);
            ds[k] = (Lanes)_mm512_maskz_mov_ps(seen, (__m512)(e * (lanes_at(slope + i) - lanes_at(w->mean + r))));
        }
        put_two(type, met.weights + n * MANY * bytes_of(type), j, p);
        put_two(type, met.shares + n * MANY * bytes_of(type), j, ds);
    }
}

static void teach(const Work *w, Part *p, int64_t i, int64_t r, int64_t n)
{
    int64_t H = w->a->H, pair = p->pair, of_queries = pair * w->R * of_row(w), key = p->b * w->J + p->first + i;
    float by = 1 / sqrtf((float)H);
    meet_across(w, p->one + i * of_row(w), w->queries_across + of_queries, r, n, met.scores);
    meet_across(w, p->other + i * of_row(w), w->slopes_across + of_queries, r, n, met.slopes);
    for (int k = 0; k < BLOCK; k++) {
        if (w->a->type == FLOAT32) teach_as(FLOAT32, w, k, key + k, pair * w->R + r, p->b * w->R + r, n, by);
        else teach_as(BFLOAT16, w, k, key + k, pair * w->R + r, p->b * w->R + r, n, by);
    }
    meet_down(w, met.shares, w->queries_down + of_queries, w->R, r, n, p->sums + i * H);
    meet_down(w, met.weights, w->slopes_down + of_queries, w->R, r, n, p->more + i * H);
}

static void of_keys(const void *argument, int64_t part)
{
    const Work *w = argument;
    const Seeing *a = w->a;
    Part p;
    if (!begin(w, part, w->J, &p)) return;
    for (int64_t n = 0; n < p.rows; n++) {
        gather(w, key_of(w, a->k, p.b, p.head, p.first + n), p.one + n * of_row(w));
        gather(w, key_of(w, a->v, p.b, p.head, p.first + n), p.other + n * of_row(w));
    }
    const Span *own = w->of_keys + (p.b * w->J + p.first) / BLOCK;
    meet_all(w, &p, own, w->of_queries + p.b * (w->R / BLOCK), w->R, teach);
    for (int64_t n = 0; n < p.rows; n++) {
        float by = 1 / sqrtf((float)a->H);
        put_row(w, p.sums + n * a->H, by, key_of(w, w->g->dk, p.b, p.head, p.first + n));
        put_row(w, p.more + n * a->H, 1, key_of(w, w->g->dv, p.b, p.head, p.first + n));
    }
    free(p.sums);
}

/* The memory of all parts in one piece, to be freed; NULL where there is none. */
static char *prepare(Work *w)
{
    const Seeing *a = w->a;
    int64_t of_keys = a->B * a->K * w->J * of_row(w), of_queries = a->B * a->K * w->R * of_row(w);
    int64_t each = a->B * w->R * 4, key = a->B * w->J * 4, share = a->K * each;
    int64_t span = a->B * (int64_t)sizeof(Span);
    struct {
        void *to;
        int64_t bytes;
    } parts[] = {
        {&w->keys_across, of_keys}, {&w->values_across, of_keys}, {&w->keys_down, of_keys},
        {&w->queries_across, of_queries}, {&w->queries_down, of_queries}, {&w->slopes_across, of_queries},
        {&w->slopes_down, of_queries}, {&w->from, each}, {&w->to, each}, {&w->own, each}, {&w->order, key},
        {&w->document, key}, {&w->of_queries, span * w->R / BLOCK}, {&w->of_keys, span * w->J / BLOCK}, {&w->most, share},
        {&w->share, share}, {&w->mean, share}};
    enum { PARTS = sizeof parts / sizeof *parts };
    int64_t total = 64;
    for (int i = 0; i < PARTS; i++) total += up_to(parts[i].bytes, 64);
    char *memory = aligned_alloc(64, (size_t)total), *next = memory;
    for (int i = 0; memory && i < PARTS; next += up_to(parts[i++].bytes, 64)) memcpy(parts[i].to, &next, sizeof next);
    return memory;
}

#endif

/* dq, dk and dv of y = softmax(q k / sqrt(H)) v over the keys that a query sees. 0, or an ERROR_. */
int mistral_attention_gradients(const Gradients *g, Parallel by)
{
#ifdef TILES
    const Seeing *a = &g->of;
    atomic_int failed = 0;
    Work w = {
        .a = a, .g = g, .way = way_of(a->type == BFLOAT16), .R = up_to(a->T * (a->N / a->K), BLOCK),
        .J = up_to(a->S, BLOCK), .failed = &failed};
    char *memory = prepare(&w);
    if (!memory) return ERROR_MEMORY;
    int64_t pairs = a->B * a->K;
    for (int64_t b = 0; b < a->B; b++) look(&w, b);
    run(by, turn, &w, pairs * ((w.R + w.J) / BLOCK), a->threads);
    run(by, of_queries, &w, pairs * parts_of(w.R), a->threads);
    run(by, of_keys, &w, pairs * parts_of(w.J), a->threads);
    free(memory);
    return atomic_load(&failed);
#else
    (void)g, (void)by;
    return ERROR_ARGUMENT;
#endif
}
