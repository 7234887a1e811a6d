/* One step of decoding in one call: few new tokens through all layers to their logits, and into the cache.

   The formulas are those of mistral_core/reference, the numbers those of its contract: sums in float32, each result
   rounded once to the type of the model. Products are rows.c's, by address, and so are threads.

   Axes: B rows of the batch, T new tokens of each, D hidden size, N query heads, K key/value heads, H head dimension,
   F intermediate size, V vocabulary, L layers, R slots of a ring, S the same as keys that are looked at. */

#include <stdlib.h>

#include "bound.h"
#include "formulas.h"
#include "step.h"

/* ---- the pieces ---- */

static int multiply(const Model *m, Parallel by, const Weight *w, const float *x, int64_t R, float *y, int is_head)
{
    int code = product_by(
        by, w->kind, w->codes, w->scale, w->scale_type, w->zero, w->O, w->I, w->high, w->wide, x, FLOAT32, y, FLOAT32, R,
        w->rounded, m->threads);
    if (!is_head) round_to(m->type, y, R * w->O);
    return code;
}

static void embed(const Model *m, const int64_t *ids, int64_t R, float *x_RD)
{
    for (int64_t r = 0; r < R; r++)
        if (m->embedding.scale_type == FLOAT32)
            memcpy(x_RD + r * m->D, (const float *)m->embedding.codes + ids[r] * m->D, (size_t)m->D * 4);
        else
            widen((const uint16_t *)m->embedding.codes + ids[r] * m->D, m->D, x_RD + r * m->D);
}

static void rms_norm(const Model *m, const float *x_RD, const float *weight_D, int64_t R, float *y_RD)
{
    for (int64_t r = 0; r < R; r++) norm_row(FLOAT32, m->type, x_RD + r * m->D, weight_D, m->D, m->eps, y_RD + r * m->D);
}

/* Heads turned by their angles, and then each times its scale, where there are scales. */
static void rotate(const Model *m, const Tokens *of, int64_t heads, const float *scale_R, float *x)
{
    int64_t half = m->H / 2, size = heads * m->H;
    for (int64_t r = 0; r < of->B * of->T; r++, x += size) {
        turn_row(FLOAT32, m->type, x, of->cos + r * half, of->sin + r * half, heads, m->H, x);
        if (!scale_R) continue;
        for (int64_t i = 0; i < size; i++) x[i] *= scale_R[r];
        round_to(m->type, x, size);
    }
}

/* A vector of H numbers as a cache keeps it: int8 codes are nearest, halves to even, of a scale max|x| / 127. */
static void keep(const Model *m, const Cache *cache, const float *x, void *to, int64_t at, float *scales)
{
    if (cache->type == FLOAT32) memcpy((float *)to + at * m->H, x, (size_t)m->H * 4);
    else if (cache->type == BFLOAT16)
        for (int64_t i = 0; i < m->H; i++) {
            float rounded = rounded_number(x[i], BFLOAT16);
            uint32_t bits;
            memcpy(&bits, &rounded, 4);
            ((uint16_t *)to)[at * m->H + i] = (uint16_t)(bits >> 16);
        }
    else {
        float most = 0;
        for (int64_t i = 0; i < m->H; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
        float scale = most / 127;
        scales[at] = scale;
        for (int64_t i = 0; i < m->H; i++) ((int8_t *)to)[at * m->H + i] = (int8_t)rintf(scale == 0 ? 0 : x[i] / scale);
    }
}

/* `count` vectors of a head, from slot s on, as the model's numbers: `to` [count,H]. */
static void restore(
    const Model *m, const Cache *cache, const void *from, const float *scales, int64_t first, int64_t count, float *to)
{
    for (int64_t n = 0, at = first; n < count; n++, at += m->K, to += m->H) {
        if (cache->type == FLOAT32) memcpy(to, (const float *)from + at * m->H, (size_t)m->H * 4);
        else if (cache->type == BFLOAT16) widen((const uint16_t *)from + at * m->H, m->H, to);
        else {
            for (int64_t i = 0; i < m->H; i++) to[i] = (float)((const int8_t *)from)[at * m->H + i] * scales[at];
            round_to(m->type, to, m->H);
        }
    }
}

/* ---- attention: a part is a row of the batch and a key/value head, whose queries read each key once ---- */

typedef struct {
    const Model *m;
    const Tokens *of;
    const Cache *cache;
    int64_t layer;
    const float *q; /* [B,T,N,H] */
    float *o;       /* [B,T,N,H] */
    float *scores;  /* [B,K,T*G,S], and of each part SLOTS * H more */
    int64_t S; /* slots */
} Attention;

enum { SLOTS = 32 }; /* keys or values that are made floats at once: they stay in the first cache */

/* o[H] += weight[count] value[count,H] */
static void add_weighted(const float *weight, const float *value, int64_t count, int64_t H, float *o)
{
    int64_t i = 0;
    for (; i + 4 * LANES <= H; i += 4 * LANES) {
        Lanes sum[4];
        for (int k = 0; k < 4; k++) sum[k] = lanes_at(o + i + k * LANES);
        for (int64_t s = 0; s < count; s++)
            for (int k = 0; k < 4; k++) sum[k] += lanes_at(value + s * H + i + k * LANES) * weight[s];
        for (int k = 0; k < 4; k++) put_lanes(o + i + k * LANES, sum[k]);
    }
    for (; i < H; i++)
        for (int64_t s = 0; s < count; s++) o[i] += weight[s] * value[s * H + i];
}

/* Weights of a query from its scores; of one that sees nothing, which is padding, zeros. */
static void softmax(float *score, int64_t n)
{
    float most = -INFINITY;
    for (int64_t s = 0; s < n; s++) most = score[s] > most || score[s] != score[s] ? score[s] : most;
    if (most == -INFINITY) {
        memset(score, 0, (size_t)n * 4);
        return;
    }
    Lanes sums = {0};
    int64_t s = 0;
    for (; s + LANES <= n; s += LANES) {
        Lanes e = exp_lanes(lanes_at(score + s) - most);
        put_lanes(score + s, e);
        sums += e;
    }
    float sum = sum_of(sums);
    for (; s < n; s++) sum += score[s] = expf(score[s] - most);
    for (s = 0; s < n; s++) score[s] /= sum;
}

/* Whether slots hold tokens alone that are older than any query's window shows: these are not read. The newest token is
   in slot `last`, and of slots up to it slot 0 has the token of order `turns`. */
static int are_hidden(int64_t first, int64_t count, int64_t last, int64_t turns, int64_t S, int64_t oldest)
{
    int64_t end = first + count - 1;
    if (first <= last && end > last) return 0;
    return end + (first <= last ? turns : turns - S) < oldest;
}

static void attend(const void *argument, int64_t part)
{
    const Attention *a = argument;
    const Model *m = a->m;
    const Tokens *of = a->of;
    int64_t T = of->T, G = m->N / m->K, b = part / m->K, head = part % m->K, S = a->S, H = m->H;
    int64_t window = m->layers[a->layer].window, next = of->length[b];
    const int64_t *order = of->order + b * T;
    for (int64_t t = 0; t < T; t++) next += order[t] >= 0;
    float *scores = a->scores + part * (T * G * S + SLOTS * H), *floats = scores + T * G * S, by = 1 / sqrtf((float)H);
    int is_coded = a->cache->type == CODES;
    const void *keys = a->cache->keys[a->layer], *values = a->cache->values[a->layer];
    const float *key_scales = is_coded ? a->cache->key_scales[a->layer] : NULL;
    const float *value_scales = is_coded ? a->cache->value_scales[a->layer] : NULL;
    int64_t used = next < S ? next : S; /* slots that may hold a token */
    int64_t last = (next - 1) % S, turns = next - 1 - last; /* the newest token's slot; the order of slot 0's token */
    int64_t oldest_seen = next;
    for (int64_t t = 0; t < T; t++) {
        int64_t oldest = window < 0 ? 0 : order[t] - window + 1;
        if (order[t] >= 0 && oldest < oldest_seen) oldest_seen = oldest;
    }
    for (int64_t first = 0; first < used; first += SLOTS) {
        int64_t count = used - first < SLOTS ? used - first : SLOTS;
        if (are_hidden(first, count, last, turns, S, oldest_seen)) {
            for (int64_t n = 0; n < T * G; n++)
                for (int64_t s = 0; s < count; s++) scores[n * S + first + s] = -INFINITY;
            continue;
        }
        restore(m, a->cache, keys, key_scales, (b * S + first) * m->K + head, count, floats);
        for (int64_t n = 0; n < T * G; n++) {
            const float *q = a->q + ((b * T + n / G) * m->N + head * G + n % G) * H;
            int64_t newest = order[n / G], oldest = window < 0 ? 0 : newest - window + 1;
            for (int64_t s = 0; s < count; s++) {
                int64_t of_key = first + s + (first + s <= last ? turns : turns - S);
                int seen = of_key <= newest && of_key >= oldest;
                scores[n * S + first + s] = seen ? dot(q, floats + s * H, H) * by : -INFINITY;
            }
        }
    }
    for (int64_t n = 0; n < T * G; n++) {
        softmax(scores + n * S, used);
        memset(a->o + ((b * T + n / G) * m->N + head * G + n % G) * H, 0, (size_t)H * 4);
    }
    for (int64_t first = 0; first < used; first += SLOTS) {
        int64_t count = used - first < SLOTS ? used - first : SLOTS;
        if (are_hidden(first, count, last, turns, S, oldest_seen)) continue;
        restore(m, a->cache, values, value_scales, (b * S + first) * m->K + head, count, floats);
        for (int64_t n = 0; n < T * G; n++)
            add_weighted(scores + n * S + first, floats, count, H,
                         a->o + ((b * T + n / G) * m->N + head * G + n % G) * H);
    }
    for (int64_t t = 0; t < T; t++) round_to(m->type, a->o + ((b * T + t) * m->N + head * G) * H, G * H);
}

static void remember(const Attention *a, const float *k, const float *v)
{
    const Model *m = a->m;
    float *key_scales = a->cache->type == CODES ? a->cache->key_scales[a->layer] : NULL;
    float *value_scales = a->cache->type == CODES ? a->cache->value_scales[a->layer] : NULL;
    for (int64_t r = 0; r < a->of->B * a->of->T; r++) {
        int64_t order = a->of->order[r];
        if (order < 0) continue;
        for (int64_t head = 0; head < m->K; head++) {
            int64_t at = (r / a->of->T * a->S + order % a->S) * m->K + head, from = (r * m->K + head) * m->H;
            keep(m, a->cache, k + from, a->cache->keys[a->layer], at, key_scales);
            keep(m, a->cache, v + from, a->cache->values[a->layer], at, value_scales);
        }
    }
}

typedef struct {
    int type;
    float *gate;
    const float *up;
    int64_t n;
} Gated;

enum { GATED = 4096 };

static void gate_up(const void *argument, int64_t part)
{
    const Gated *a = argument;
    int64_t i = part * GATED, n = a->n - i < GATED ? a->n - i : GATED;
    gate_row(FLOAT32, a->type, a->gate + i, a->up + i, n, a->gate + i);
}

static void add(const Model *m, float *x, const float *h, int64_t n)
{
    for (int64_t i = 0; i < n; i++) x[i] += h[i];
    round_to(m->type, x, n);
}

/* logits [B,T,V], or [B,1,V] of the last column, in float32; new keys and values go into the cache. 0, or an ERROR_. */
int mistral_step(const Model *m, const Cache *cache, const Tokens *of, float *logits, Parallel by)
{
    int64_t R = of->B * of->T, wide = m->N * m->H > m->D ? m->N * m->H : m->D, G = m->N / m->K, most = 0;
    int64_t deep = m->F > m->D ? m->F : m->D;
    for (int64_t r = 0; r < R; r++)
        if (of->ids[r] < 0 || of->ids[r] >= m->V) return ERROR_ARGUMENT;
    for (int64_t l = 0; l < m->L; l++) most = cache->slots[l] > most ? cache->slots[l] : most;
    int64_t of_scores = of->B * m->K * (of->T * G * most + SLOTS * m->H);
    int64_t sizes[8] = {R * m->D, R * wide, R * m->N * m->H, R * m->K * m->H, R * m->K * m->H, R * deep, R * m->F, of_scores};
    float *buffers[8], *memory;
    int64_t total = 0;
    for (int i = 0; i < 8; i++) total += up_to(sizes[i], LANES);
    if (!(memory = aligned_alloc(64, (size_t)total * 4))) return ERROR_MEMORY;
    for (int64_t i = 0, at = 0; i < 8; at += up_to(sizes[i++], LANES)) buffers[i] = memory + at;
    float *x = buffers[0], *h = buffers[1], *q = buffers[2], *k = buffers[3], *v = buffers[4], *g = buffers[5];
    float *u = buffers[6];
    int code = 0;
    embed(m, of->ids, R, x);
    for (int64_t l = 0; l < m->L && !code; l++) {
        const Layer *layer = &m->layers[l];
        Attention a = {m, of, cache, l, q, h, buffers[7], cache->slots[l]};
        rms_norm(m, x, layer->input_norm, R, h);
        code |= multiply(m, by, &layer->q, h, R, q, 0);
        code |= multiply(m, by, &layer->k, h, R, k, 0);
        code |= multiply(m, by, &layer->v, h, R, v, 0);
        rotate(m, of, m->N, of->query_scale, q);
        rotate(m, of, m->K, NULL, k);
        remember(&a, k, v);
        run(by, attend, &a, of->B * m->K, m->threads);
        code |= multiply(m, by, &layer->o, h, R, g, 0);
        add(m, x, g, R * m->D);
        rms_norm(m, x, layer->post_norm, R, h);
        code |= multiply(m, by, &layer->gate, h, R, g, 0);
        code |= multiply(m, by, &layer->up, h, R, u, 0);
        Gated gated = {m->type, g, u, R * m->F};
        run(by, gate_up, &gated, (R * m->F + GATED - 1) / GATED, m->threads);
        code |= multiply(m, by, &layer->down, g, R, h, 0);
        add(m, x, h, R * m->D);
    }
    if (!of->every)
        for (int64_t b = 0; b < of->B; b++) memmove(x + b * m->D, x + ((b + 1) * of->T - 1) * m->D, (size_t)m->D * 4);
    int64_t rows = of->every ? R : of->B;
    rms_norm(m, x, m->norm, rows, h);
    if (!code) code = multiply(m, by, &m->head, h, rows, logits, 1);
    free(memory);
    return code;
}
