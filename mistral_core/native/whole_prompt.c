/* A prompt in one call: many new tokens through all layers of a model, and into its cache, by tiles.

   The formulas are those of mistral_core/reference, the numbers those of its contract: sums in float32, each result
   rounded once to the model's type, which is what arrays hold here. Products are rows.c's, by address, or of another
   library, and so are threads. The weights of attention are rounded before they are divided by their sum.

   Axes: B rows of the batch, T new tokens of each, D hidden size, N query heads, K key/value heads, G = N / K, H head
   dimension, F intermediate size, V vocabulary, L layers, S slots of a ring, J keys that are seen, in their order. */

#include <stdatomic.h>
#include <stdlib.h>

#include "bound.h"
#include "formulas.h"
#include "seeing.h"
#include "step.h"
#include "tiles.h"

#ifdef TILES

enum { BLOCK = 2 * SIDE, KEYS = 256, ROWS = 16 }; /* queries and keys that meet; rows that are one part of a job */
enum { MANY_ROWS = 256 }; /* the fewest for which another library is asked for a product */

/* What one chunk of a prompt is computed in. */
typedef struct {
    const Model *m;
    const Tokens *of;
    const Cache *cache;
    Way way;
    int64_t layer, J; /* J: of the row that sees most, in whole blocks */
    int64_t new;      /* how many columns k and v have of each row */
    char *x, *h, *q, *k, *v, *g, *u;
    char *weight; /* of a norm */
    char *keys, *values; /* [B,K] of J / 16 panels of tiles across H, and of H / 16 across J */
    int64_t *first, *count; /* [B]: the order of the first key that is seen, and how many are */
    const int32_t *document; /* [B,J]: of each key that is seen, where one goes on after another; else NULL */
    int64_t *column; /* [B,new]: where the new token of an order after the past's stands */
    atomic_int *failed;
} Chunk;

static int multiply(const Chunk *c, Parallel by, const Weight *w, const void *x, int64_t R, void *y, int y_type)
{
    if (c->m->gemm && R >= MANY_ROWS && w->kind == FLOATS) {
        const float one = 1, none = 0;
        c->m->gemm("T", "N", &w->O, &R, &w->I, &one, w->codes, &w->I, x, &w->I, &none, y, &w->O);
        return 0;
    }
    return product_by(
        by, w->kind, w->codes, w->scale, w->scale_type, w->zero, w->O, w->I, w->high, w->wide, x, c->m->type, y, y_type,
        R, w->rounded, c->m->threads);
}

static inline int64_t size_of(const Chunk *c) { return bytes_of(c->m->type); }

/* ---- rows: each part is some of them ---- */

typedef void (*OfRow)(const Chunk *c, int64_t r);
typedef struct {
    const Chunk *c;
    OfRow of_row;
    int64_t R;
} Rows;

static void some_rows(const void *argument, int64_t part)
{
    const Rows *job = argument;
    for (int64_t r = part * ROWS; r < (part + 1) * ROWS && r < job->R; r++) job->of_row(job->c, r);
}

static void every_row(const Chunk *c, Parallel by, OfRow of_row)
{
    Rows job = {c, of_row, c->of->B * c->of->T};
    run(by, some_rows, &job, (job.R + ROWS - 1) / ROWS, c->m->threads);
}

static void embed(const Chunk *c, int64_t r)
{
    int64_t of_row = c->m->D * size_of(c);
    memcpy(c->x + r * of_row, (const char *)c->m->embedding.codes + c->of->ids[r] * of_row, (size_t)of_row);
}

/* A function of a row for each type, whose loops then know it. */
#define OF_ROW(name) \
    static void name(const Chunk *c, int64_t r) \
    { \
        if (c->m->type == FLOAT32) name##_as(FLOAT32, c, r); \
        else name##_as(BFLOAT16, c, r); \
    }

static inline __attribute__((always_inline)) void normed_as(int type, const Chunk *c, int64_t r)
{
    int64_t D = c->m->D, at = r * D * size_of(c);
    norm_row(type, type, c->x + at, c->weight, D, c->m->eps, c->h + at);
}
OF_ROW(normed)

/* x += h. */
static inline __attribute__((always_inline)) void added_as(int type, const Chunk *c, int64_t r)
{
    int64_t D = c->m->D;
    char *x = c->x + r * D * size_of(c), *h = c->h + r * D * size_of(c);
    for (int64_t i = 0; i < D; i += LANES)
        given(type, x, i, D, rounded_as(type, taken(type, x, i, D) + taken(type, h, i, D)));
}
OF_ROW(added)

static void added_and_normed(const Chunk *c, int64_t r)
{
    added(c, r);
    normed(c, r);
}

static inline __attribute__((always_inline)) void turned_as(int type, const Chunk *c, int64_t r)
{
    const Model *m = c->m;
    const float *cos = c->of->cos + r * (m->H / 2), *sin = c->of->sin + r * (m->H / 2);
    char *q = c->q + r * m->N * m->H * size_of(c), *k = c->k + r * m->K * m->H * size_of(c);
    turn_row(type, type, q, cos, sin, m->N, m->H, q);
    turn_row(type, type, k, cos, sin, m->K, m->H, k);
    if (!c->of->query_scale) return;
    for (int64_t i = 0, n = m->N * m->H; i < n; i += LANES)
        given(type, q, i, n, rounded_as(type, taken(type, q, i, n) * c->of->query_scale[r]));
}
OF_ROW(turned)

static inline __attribute__((always_inline)) void gated_as(int type, const Chunk *c, int64_t r)
{
    int64_t F = c->m->F, at = r * F * size_of(c);
    gate_row(type, type, c->g + at, c->u + at, F, c->g + at);
}
OF_ROW(gated)

/* ---- keys and values that are seen, past and new, in the order of their tokens, as tiles ---- */

/* The key, or value, of column j of those that row b sees: [H] of a head; NULL after the last. */
static const char *seen(const Chunk *c, const char *new, void *const *past, int64_t b, int64_t head, int64_t j)
{
    const Model *m = c->m;
    int64_t order = c->first[b] + j, length = c->of->length[b], is_new = order >= length;
    if (j >= c->count[b]) return NULL;
    int64_t columns = is_new ? c->new : c->cache->slots[c->layer];
    int64_t column = is_new ? c->column[b * columns + order - length] : order % columns;
    return (is_new ? new : past[c->layer]) + ((b * columns + column) * m->K + head) * m->H * size_of(c);
}

/* A part is 32 columns of a row and a head. */
static void turn_keys(const void *argument, int64_t part)
{
    const Chunk *c = argument;
    int64_t H = c->m->H, size = size_of(c), columns = columns_of(c->way), of_pair = c->J * H * size;
    int64_t blocks = c->J / BLOCK, pair = part / blocks, b = pair / c->m->K, head = pair % c->m->K;
    int64_t first = part % blocks * BLOCK;
    if (first >= up_to(c->count[b], BLOCK)) return;
    const char *key[BLOCK], *value[BLOCK];
    for (int k = 0; k < BLOCK; k++) {
        key[k] = seen(c, c->k, c->cache ? c->cache->keys : NULL, b, head, first + k);
        value[k] = seen(c, c->v, c->cache ? c->cache->values : NULL, b, head, first + k);
    }
    turn_across(c->way, key, H, c->keys + pair * of_pair + first / SIDE * (H / columns) * TILE);
    turn_down(c->way, value, H, c->values + pair * of_pair + first / columns * TILE, c->J / columns * TILE);
}

/* New keys and values into the ring, each in the slot of its order; of one slot's the newest. */
static void remember(const Chunk *c)
{
    const Model *m = c->m;
    int64_t T = c->of->T, S = c->cache->slots[c->layer], size = m->K * m->H * size_of(c);
    for (int64_t r = 0; r < c->of->B * T; r++) {
        int64_t order = c->of->order[r];
        if (order < 0) continue;
        int64_t to = (r / T * S + order % S) * size;
        memcpy((char *)c->cache->keys[c->layer] + to, c->k + r * size, (size_t)size);
        memcpy((char *)c->cache->values[c->layer] + to, c->v + r * size, (size_t)size);
    }
}

/* ---- attention: a part is a block of queries of a row and a key/value head, which meets some keys after others ---- */

typedef struct {
    float most[BLOCK], sum[BLOCK]; /* of each query's scores so far, and of their exponentials */
    int64_t from[BLOCK], to[BLOCK]; /* the columns that it sees */
    int32_t document[BLOCK];
} Seen;

/* Which of sixteen columns from j on are in a range. */
static inline __mmask16 in_range(int64_t j, int64_t from, int64_t to)
{
    uint32_t before = from <= j ? 0 : from - j >= LANES ? 0xffff : (1u << (from - j)) - 1;
    uint32_t up = to <= j ? 0 : to - j >= LANES ? 0xffff : (1u << (to - j)) - 1;
    return (__mmask16)(up & ~before);
}

/* Which of sixteen columns from j on are in a range and of a document, where they are told theirs. */
static inline __mmask16 are_seen(const int32_t *document, int32_t own, int64_t j, int64_t from, int64_t to)
{
    __mmask16 range = in_range(j, from, to);
    if (!document) return range;
    return _mm512_mask_cmpeq_epi32_mask(range, _mm512_loadu_si512(document + j), _mm512_set1_epi32(own));
}

/* Scores of a query as weights, rounded, to the most so far; its output so far follows. */
static inline __attribute__((always_inline)) void weigh_as(
    int type, Seen *s, int64_t row, int64_t first, int64_t n, const int32_t *document, float by, const float *score,
    char *weight, float *o, int64_t H)
{
    int32_t own = s->document[row];
    int64_t from = s->from[row] - first, to = s->to[row] - first;
    if (to <= 0 || from >= n) {
        memset(weight, 0, (size_t)(n * bytes_of(type)));
        return;
    }
    const Lanes low = (Lanes){0} - INFINITY;
    Lanes most[2] = {low, low}, sums[2] = {{0}, {0}};
    for (int64_t j = 0; j < n; j += 2 * LANES)
        for (int k = 0; k < 2; k++) {
            const float *x = score + j + k * LANES;
            most[k] = (Lanes)_mm512_mask_max_ps(
                (__m512)most[k], are_seen(document, own, j + k * LANES, from, to), (__m512)most[k],
                _mm512_loadu_ps(x));
        }
    float best = _mm512_reduce_max_ps(_mm512_max_ps((__m512)most[0], (__m512)most[1])) * by;
    best = s->most[row] > best ? s->most[row] : best;
    for (int64_t j = 0; j < n; j += 2 * LANES) {
        Lanes e[2];
        for (int k = 0; k < 2; k++) {
            __m512 less = (__m512)(lanes_at(score + j + k * LANES) * by - best);
            e[k] = (Lanes)_mm512_maskz_mov_ps(
                are_seen(document, own, j + k * LANES, from, to), (__m512)exp_lanes((Lanes)less));
            sums[k] += e[k];
        }
        if (type == BFLOAT16) _mm512_store_si512(weight + j * 2, bfloat16_of_lanes((__m512)e[0], (__m512)e[1]));
        else put_lanes((float *)weight + j, e[0]), put_lanes((float *)weight + j + LANES, e[1]);
    }
    if (best != s->most[row]) {
        Lanes before = low;
        before[0] = s->most[row] - best;
        float less = exp_lanes(before)[0];
        s->sum[row] *= less;
        for (int64_t i = 0; i < H; i += LANES) put_lanes(o + i, lanes_at(o + i) * less);
    }
    s->most[row] = best;
    s->sum[row] += sum_of(sums[0] + sums[1]);
}

static void weigh(
    int type, Seen *s, int64_t row, int64_t first, int64_t n, const int32_t *document, float by, const float *score,
    char *weight, float *o, int64_t H)
{
    if (document) weigh_as(type, s, row, first, n, document, by, score, weight, o, H);
    else if (type == FLOAT32) weigh_as(FLOAT32, s, row, first, n, NULL, by, score, weight, o, H);
    else weigh_as(BFLOAT16, s, row, first, n, NULL, by, score, weight, o, H);
}

static void attend(const void *argument, int64_t part)
{
    const Chunk *c = argument;
    const Model *m = c->m;
    int64_t T = c->of->T, G = m->N / m->K, H = m->H, window = m->layers[c->layer].window;
    int64_t blocks = (T * G + BLOCK - 1) / BLOCK, pair = part / blocks, b = pair / m->K, head = pair % m->K;
    int64_t row = part % blocks * BLOCK, rows = T * G - row < BLOCK ? T * G - row : BLOCK;
    int64_t size = size_of(c), columns = columns_of(c->way), of_row = H * size;
    const char *keys = c->keys + pair * c->J * of_row, *values = c->values + pair * c->J * of_row;
    static _Thread_local struct {
        float scores[BLOCK * KEYS] __attribute__((aligned(64)));
        char weights[BLOCK * KEYS * 4] __attribute__((aligned(64)));
    } at;
    size_t memory = (size_t)(BLOCK * H * (4 + size));
    float *o = aligned_alloc(64, memory);
    if (!o) {
        atomic_store(c->failed, ERROR_MEMORY);
        return;
    }
    char *q = (char *)(o + BLOCK * H);
    Seen s;
    int64_t from = INT64_MAX, to = 0;
    memset(o, 0, memory);
    for (int64_t n = 0; n < BLOCK; n++) {
        int64_t order = n < rows ? c->of->order[b * T + (row + n) / G] : -1;
        int64_t oldest = window < 0 || order < window ? 0 : order - window + 1;
        if (order >= 0 && c->of->begin) {
            int64_t begin = c->of->begin[b * T + (row + n) / G];
            oldest = begin > oldest ? begin : oldest;
        }
        s.most[n] = -INFINITY, s.sum[n] = 0, s.document[n] = 0;
        s.from[n] = oldest - c->first[b], s.to[n] = order < 0 ? 0 : order + 1 - c->first[b];
        if (order < 0) continue;
        if (c->document) s.document[n] = c->document[b * c->J + order - c->first[b]];
        from = s.from[n] < from ? s.from[n] : from, to = s.to[n] > to ? s.to[n] : to;
        const char *query = c->q + ((b * T + (row + n) / G) * m->N + head * G + (row + n) % G) * of_row;
        memcpy(q + n * of_row, query, (size_t)of_row);
    }
    Tiling before;
    use_tiles(c->way, &before);
    for (int64_t j = from / BLOCK * BLOCK; j < to; j += KEYS) {
        int64_t n = up_to(to - j < KEYS ? to - j : KEYS, BLOCK), across = H / columns, down = c->J / columns;
        for (int64_t k = 0; k < n; k += BLOCK) {
            Block block = {
                .a = q, .stride = of_row, .below = rows_of(c->way) * of_row, .step = 64,
                .b = keys + (j + k) / SIDE * across * TILE, .panel = across * TILE, .steps = across,
                .c = at.scores + k, .c_stride = KEYS * 4, .panels = 2};
            multiply_tiles(c->way, &block);
        }
        for (int64_t i = 0; i < BLOCK; i++)
            weigh(m->type, &s, i, j, n, c->document ? c->document + b * c->J + j : NULL, 1 / sqrtf((float)H),
                  at.scores + i * KEYS, at.weights + i * KEYS * size, o + i * H, H);
        for (int64_t i = 0; i < H; i += BLOCK) {
            Block block = {
                .a = at.weights, .stride = KEYS * size, .below = rows_of(c->way) * KEYS * size, .step = 64,
                .b = values + (i / SIDE * down + j / columns) * TILE, .panel = down * TILE, .steps = n / columns,
                .c = o + i, .c_stride = H * 4, .panels = 2, .adds = 1};
            multiply_tiles(c->way, &block);
        }
    }
    leave_tiles(c->way, &before);
    for (int64_t n = 0; n < rows; n++) {
        char *y = c->h + ((b * T + (row + n) / G) * m->N + head * G + (row + n) % G) * of_row;
        for (int64_t i = 0; i < H; i += LANES) {
            Lanes mean = s.sum[n] == 0 ? lanes_at(o + n * H + i) : lanes_at(o + n * H + i) / s.sum[n];
            given(m->type, y, i, H, rounded_as(m->type, mean));
        }
    }
    free(o);
}

/* What queries see, as outputs in h: of every row and key/value head. */
static void every_pair(const Chunk *c, Parallel by)
{
    int64_t pairs = c->of->B * c->m->K, queries = c->of->T * (c->m->N / c->m->K);
    run(by, turn_keys, c, pairs * (c->J / BLOCK), c->m->threads);
    run(by, attend, c, pairs * ((queries + BLOCK - 1) / BLOCK), c->m->threads);
}

/* ---- all layers ---- */

/* Which keys the rows see in a layer. */
static void look(Chunk *c)
{
    int64_t T = c->of->T, window = c->m->layers[c->layer].window, most = 0;
    for (int64_t b = 0; b < c->of->B; b++) {
        int64_t next = c->of->length[b], new = 0;
        for (int64_t t = 0; t < T; t++)
            if (c->of->order[b * T + t] >= 0) c->column[b * T + new++] = t;
        c->first[b] = window < 0 || next < window ? 0 : next - window + 1; /* what the first new token sees */
        c->count[b] = next + new - c->first[b];
        most = c->count[b] > most ? c->count[b] : most;
    }
    c->J = up_to(most, BLOCK);
    c->new = T;
}

static void take_weight(const Chunk *c, const float *weight)
{
    int64_t D = c->m->D;
    for (int64_t i = 0; i < D; i += LANES) given(c->m->type, c->weight, i, D, taken(FLOAT32, weight, i, D));
}

/* The layer of a chunk. */
static int one_layer(Chunk *c, Parallel by)
{
    const Model *m = c->m;
    const Layer *layer = &m->layers[c->layer];
    int64_t R = c->of->B * c->of->T;
    int code = 0;
    take_weight(c, layer->input_norm);
    every_row(c, by, normed);
    code |= multiply(c, by, &layer->q, c->h, R, c->q, m->type);
    code |= multiply(c, by, &layer->k, c->h, R, c->k, m->type);
    code |= multiply(c, by, &layer->v, c->h, R, c->v, m->type);
    every_row(c, by, turned);
    look(c);
    every_pair(c, by);
    remember(c);
    code |= multiply(c, by, &layer->o, c->h, R, c->q, m->type);
    char *heads = c->h;
    c->h = c->q; /* [R,D], for which there is room */
    take_weight(c, layer->post_norm);
    every_row(c, by, added_and_normed);
    code |= multiply(c, by, &layer->gate, c->h, R, c->g, m->type);
    code |= multiply(c, by, &layer->up, c->h, R, c->u, m->type);
    every_row(c, by, gated);
    code |= multiply(c, by, &layer->down, c->g, R, c->h, m->type);
    every_row(c, by, added);
    c->q = c->h, c->h = heads;
    return code ? code : atomic_load(c->failed);
}

/* ---- the memory of a chunk ---- */

/* One piece of memory, to be freed, for so many parts of some bytes, which begin where vectors do; NULL where there is
   none. */
static char *room(int count, const int64_t *sizes, char **part)
{
    int64_t total = 64, at = 0;
    for (int i = 0; i < count; i++) total += up_to(sizes[i], 64);
    char *memory = aligned_alloc(64, (size_t)total);
    for (int i = 0; memory && i < count; at += up_to(sizes[i++], 64)) part[i] = memory + at;
    return memory;
}

/* Room for the largest of so many chunks, but for x, which is another's where it is given: 0, or an ERROR_. To be freed
   is `memory`. */
static int prepare(
    Chunk *c, const Model *m, const Cache *cache, const Tokens *of, int64_t chunks, int has_x, atomic_int *failed,
    char **memory)
{
    int64_t R = 0, J = 0, B = of->B, deep = m->F > m->D ? m->F : m->D;
    int64_t wide = m->N * m->H > m->D ? m->N * m->H : m->D;
    for (int64_t i = 0; i < chunks; i++) {
        R = B * of[i].T > R ? B * of[i].T : R;
        for (int64_t l = 0; l < m->L; l++)
            for (int64_t b = 0; b < B; b++) {
                int64_t window = m->layers[l].window, past = of[i].length[b];
                if (window >= 0 && past > window) past = window;
                J = past + of[i].T > J ? past + of[i].T : J;
            }
    }
    J = up_to(J, BLOCK);
    int64_t size = bytes_of(m->type), of_keys = size * m->K * m->H;
    int64_t sizes[12] = {
        has_x ? 0 : size * R * m->D, size * R * wide, size * R * wide, R * of_keys, R * of_keys, size * R * deep,
        size * R * m->F, size * m->D, B * J * of_keys, B * J * of_keys, 16 * B, 8 * R};
    char *part[12];
    if (!(*memory = room(12, sizes, part))) return ERROR_MEMORY;
    *c = (Chunk){
        .m = m, .of = of, .cache = cache, .way = way_of(m->type == BFLOAT16), .x = part[0], .h = part[1], .q = part[2],
        .k = part[3], .v = part[4], .g = part[5], .u = part[6], .weight = part[7], .keys = part[8], .values = part[9],
        .first = (int64_t *)part[10], .count = (int64_t *)part[10] + B, .column = (int64_t *)part[11],
        .failed = failed};
    return 0;
}

/* ---- attention alone ---- */

/* Which keys the rows see, as if all were new: 0, or ERROR_ARGUMENT where one of them is missing. */
static int look_at(Chunk *c, const Seeing *a, int64_t *first, int64_t *count)
{
    int64_t most = 0;
    for (int64_t b = 0; b < a->B; b++) {
        int64_t lowest = INT64_MAX, highest = -1, missing;
        for (int64_t t = 0; t < a->T; t++) {
            int64_t order = a->order[b * a->T + t];
            if (order < 0) continue;
            lowest = order < lowest ? order : lowest, highest = order > highest ? order : highest;
        }
        first[b] = highest < 0 || a->window < 0 || lowest < a->window ? 0 : lowest - a->window + 1;
        count[b] = missing = highest < 0 ? 0 : highest + 1 - first[b];
        if (count[b] > a->S) return ERROR_ARGUMENT;
        int64_t *column = c->column + b * a->S;
        for (int64_t j = 0; j < count[b]; j++) column[j] = -1;
        for (int64_t s = 0; s < a->S; s++) {
            int64_t j = a->key_order[b * a->S + s] - first[b];
            if (j < 0 || j >= count[b]) continue;
            missing -= column[j] < 0;
            column[j] = s;
        }
        if (missing) return ERROR_ARGUMENT;
        most = count[b] > most ? count[b] : most;
    }
    c->first = first, c->count = count, c->J = up_to(most, BLOCK);
    return 0;
}

/* Columns one after another of one document. */
typedef struct {
    int64_t id, first, number;
} Piece;

static int by_document(const void *one, const void *other)
{
    const Piece *a = one, *b = other;
    if (a->id != b->id) return a->id < b->id ? -1 : 1;
    return a->first < b->first ? -1 : 1;
}

/* Documents of row b by small numbers, [J] for the columns that are seen, and the order of the first token of each
   query's, [T]; whether one goes on after another. `piece` and `found` have room for as many as columns. */
static int look_for_documents(
    const Chunk *c, const Seeing *a, int64_t b, Piece *piece, int64_t *found, int32_t *document, int64_t *begin)
{
    int64_t pieces = 0, number = -1, first = 0;
    int again = 0;
    for (int64_t j = 0; j < c->count[b]; j++) {
        int64_t id = a->document[b * a->S + c->column[b * a->S + j]];
        if (!pieces || id != piece[pieces - 1].id) piece[pieces] = (Piece){id, j, pieces}, pieces++;
        document[j] = (int32_t)(pieces - 1);
    }
    qsort(piece, (size_t)pieces, sizeof *piece, by_document);
    for (int64_t i = 0; i < pieces; i++) {
        int is_same = i && piece[i].id == piece[i - 1].id;
        if (!is_same) number++, first = piece[i].first;
        again |= is_same;
        found[2 * piece[i].number] = number, found[2 * piece[i].number + 1] = first;
    }
    for (int64_t t = 0; t < a->T; t++) {
        int64_t order = a->order[b * a->T + t];
        begin[t] = order < 0 ? 0 : c->first[b] + found[2 * document[order - c->first[b]] + 1];
    }
    for (int64_t j = 0; j < c->count[b]; j++) document[j] = (int32_t)found[2 * document[j]];
    return again;
}

#endif

/* Whether prompts of models of a type are computed here. */
int mistral_takes_prompts(int type)
{
#ifdef TILES
    return way_of(type == BFLOAT16) != NO_WAY;
#else
    (void)type;
    return 0;
#endif
}

/* logits [B,1,V] of the last column in float32, of so many chunks of new tokens after each other; new keys and values
   go into the cache. 0, or an ERROR_. */
int mistral_prompt(const Model *m, const Cache *cache, const Tokens *of, int64_t chunks, float *logits, Parallel by)
{
#ifdef TILES
    for (int64_t i = 0; i < chunks; i++)
        for (int64_t r = 0; r < of->B * of[i].T; r++)
            if (of[i].ids[r] < 0 || of[i].ids[r] >= m->V) return ERROR_ARGUMENT;
    Chunk c;
    char *memory;
    atomic_int failed = 0;
    int code = prepare(&c, m, cache, of, chunks, 0, &failed, &memory);
    if (code) return code;
    for (int64_t i = 0; i < chunks && !code; i++) {
        c.of = of + i;
        every_row(&c, by, embed);
        for (c.layer = 0; c.layer < m->L && !code; c.layer++) code = one_layer(&c, by);
    }
    if (!code) {
        int64_t of_row = m->D * bytes_of(m->type);
        for (int64_t b = 0; b < of->B; b++)
            memmove(c.x + b * of_row, c.x + ((b + 1) * c.of->T - 1) * of_row, (size_t)of_row);
        take_weight(&c, m->norm);
        for (int64_t b = 0; b < of->B; b++) normed(&c, b);
        code = multiply(&c, by, &m->head, c.h, of->B, logits, FLOAT32);
    }
    free(memory);
    return code;
#else
    (void)m, (void)cache, (void)of, (void)chunks, (void)logits, (void)by;
    return ERROR_ARGUMENT;
#endif
}

/* x [B,T,D] of each chunk, one after another, through all layers, in place, and what each but the last one gives into
   `states`, where these are wanted; new keys and values go into the cache. A layer takes all chunks before the next one
   does, so that layers which keep nothing may share one ring. 0, or an ERROR_. */
int mistral_layers(
    const Model *m, const Cache *cache, const Tokens *of, int64_t chunks, char *x, char *const *states, Parallel by)
{
#ifdef TILES
    Chunk c;
    char *memory;
    atomic_int failed = 0;
    int code = prepare(&c, m, cache, of, chunks, 1, &failed, &memory);
    if (code) return code;
    for (c.layer = 0; c.layer < m->L; c.layer++) {
        c.x = x;
        for (int64_t i = 0; i < chunks && !code; i++) {
            c.of = of + i;
            code = one_layer(&c, by);
            c.x += of->B * of[i].T * m->D * bytes_of(m->type);
        }
        if (states && c.layer < m->L - 1) memcpy(states[c.layer], x, (size_t)(c.x - x));
    }
    free(memory);
    return code;
#else
    (void)m, (void)cache, (void)of, (void)chunks, (void)x, (void)states, (void)by;
    return ERROR_ARGUMENT;
#endif
}

/* y [B,T,N,H] = softmax(q k / sqrt(H)) v over the keys that a query sees, 0 where it sees none. 0, or an ERROR_:
   ERROR_ARGUMENT where a key that is seen is not there. */
int mistral_attend(const Seeing *a, Parallel by)
{
#ifdef TILES
    int64_t of_tiles = bytes_of(a->type) * a->K * a->H, documents = a->document != NULL;
    atomic_int failed = 0;
    char *part[4], *keyed[5];
    int64_t sizes[4] = {8 * a->B, 8 * a->B, 8 * a->B * a->S, documents * 8 * a->B * a->T};
    char *memory = room(4, sizes, part);
    if (!memory) return ERROR_MEMORY;
    int64_t *first = (int64_t *)part[0], *count = (int64_t *)part[1];
    Layer layer = {.window = a->window};
    Model m = {.N = a->N, .K = a->K, .H = a->H, .L = 1, .type = a->type, .threads = a->threads, .layers = &layer};
    int64_t *begin = documents ? (int64_t *)part[3] : NULL;
    Tokens of = {.B = a->B, .T = a->T, .order = a->order, .length = first, .begin = begin};
    Chunk c = {
        .m = &m, .of = &of, .way = way_of(a->type == BFLOAT16), .new = a->S, .h = a->y, .q = (char *)a->q,
        .k = (char *)a->k, .v = (char *)a->v, .column = (int64_t *)part[2], .failed = &failed};
    int code = look_at(&c, a, first, count);
    if (!code) {
        int64_t of_keys = a->B * c.J * of_tiles, columns = documents * c.J;
        int64_t each[5] = {of_keys, of_keys, 4 * a->B * columns, (int64_t)sizeof(Piece) * columns, 16 * columns};
        char *more = room(5, each, keyed);
        if (!more) {
            free(memory);
            return ERROR_MEMORY;
        }
        int32_t *document = (int32_t *)keyed[2];
        c.keys = keyed[0], c.values = keyed[1];
        for (int64_t b = 0; documents && b < a->B; b++) {
            Piece *piece = (Piece *)keyed[3];
            int64_t *found = (int64_t *)keyed[4];
            if (look_for_documents(&c, a, b, piece, found, document + b * c.J, begin + b * a->T)) c.document = document;
        }
        every_pair(&c, by);
        code = atomic_load(&failed);
        free(more);
    }
    free(memory);
    return code;
#else
    (void)a, (void)by;
    return ERROR_ARGUMENT;
#endif
}
