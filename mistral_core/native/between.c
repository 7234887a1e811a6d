/* What a layer computes between its products, each in one pass over memory: the norm, the rotation, the gate.

   The formulas are those of mistral_core/reference, the numbers those of its contract: computed in float32, each result
   rounded once to the type of the arrays, float32 or bfloat16. Threads are rows.c's, by address.

   Axes: R rows, which are tokens, D numbers of each, N heads of H numbers. */

#include "bound.h"
#include "numbers.h"

enum { NUMBERS_OF_PART = 1 << 14 }; /* about so many are worth the way to a thread */

/* Numbers i to i + LANES of n, zeros after the last. */
static inline __attribute__((always_inline)) Lanes taken(int type, const void *from, int64_t i, int64_t n)
{
    int64_t left = n - i;
    if (left >= LANES && type == FLOAT32) return lanes_at((const float *)from + i);
    if (left >= LANES) return of_bfloat16((const uint16_t *)from + i);
    float some[LANES] = {0};
    if (type == FLOAT32) memcpy(some, (const float *)from + i, (size_t)left * 4);
    else widen((const uint16_t *)from + i, left, some);
    return lanes_at(some);
}

static inline __attribute__((always_inline)) Lanes rounded_as(int type, Lanes x)
{
    return type == FLOAT32 ? x : rounded_lanes(x);
}

/* The same numbers put back, which are of the type. */
static inline __attribute__((always_inline)) void given(int type, void *to, int64_t i, int64_t n, Lanes x)
{
    int64_t left = n - i < LANES ? n - i : LANES;
    Halves halves = __builtin_convertvector((Bits)x >> 16, Halves);
    if (type == FLOAT32 && left == LANES) put_lanes((float *)to + i, x);
    else if (type == FLOAT32) memcpy((float *)to + i, &x, (size_t)left * 4);
    else if (left == LANES) *(Halves *)((uint16_t *)to + i) = halves;
    else memcpy((uint16_t *)to + i, &halves, (size_t)left * 2);
}

static inline const void *at(int type, const void *from, int64_t i)
{
    return (const char *)from + i * (type == FLOAT32 ? 4 : 2);
}

typedef struct {
    int type;
    const void *x, *by; /* what is changed, and by what: weights [D], or the numbers that are gated */
    const float *cos, *sin;
    void *y;
    int64_t rows, size, heads, rows_of_part;
    float eps;
} Job;

/* x / sqrt(mean(x^2) + eps), rounded, then times the weight, rounded. */
static inline __attribute__((always_inline)) void norm_row(int type, const Job *job, int64_t row)
{
    int64_t D = job->size;
    const void *x = at(type, job->x, row * D);
    void *y = (void *)at(type, job->y, row * D);
    Lanes one = {0}, two = {0};
    for (int64_t i = 0; i < D; i += 2 * LANES) {
        Lanes first = taken(type, x, i, D), second = {0};
        if (i + LANES < D) second = taken(type, x, i + LANES, D);
        one += first * first;
        two += second * second;
    }
    float by = 1 / sqrtf(sum_of(one + two) / (float)D + job->eps);
    for (int64_t i = 0; i < D; i += LANES) {
        Lanes h = rounded_as(type, taken(type, x, i, D) * by);
        given(type, y, i, D, rounded_as(type, h * taken(type, job->by, i, D)));
    }
}

/* Pairs (x_i, x_{i+H/2}) of each head turned by the angles of a row. */
static inline __attribute__((always_inline)) void turn_row(int type, const Job *job, int64_t row)
{
    int64_t H = job->size, half = H / 2;
    const float *cos = job->cos + row * half, *sin = job->sin + row * half;
    for (int64_t n = 0; n < job->heads; n++) {
        const void *x = at(type, job->x, (row * job->heads + n) * H), *beyond = at(type, x, half);
        void *y = (void *)at(type, job->y, (row * job->heads + n) * H), *beyond_y = (void *)at(type, y, half);
        for (int64_t i = 0; i < half; i += LANES) {
            Lanes first = taken(type, x, i, half), second = taken(type, beyond, i, half);
            Lanes c = taken(FLOAT32, cos, i, half), s = taken(FLOAT32, sin, i, half);
            given(type, y, i, half, rounded_as(type, first * c - second * s));
            given(type, beyond_y, i, half, rounded_as(type, second * c + first * s));
        }
    }
}

/* silu(x) rounded, times what it gates, rounded. */
static inline __attribute__((always_inline)) void gate_row(int type, const Job *job, int64_t row)
{
    int64_t n = job->size, start = row * n;
    const void *gate = at(type, job->x, start), *up = at(type, job->by, start);
    void *y = (void *)at(type, job->y, start);
    for (int64_t i = 0; i < n; i += LANES) {
        Lanes g = taken(type, gate, i, n), silu = rounded_as(type, g / (1 + exp_lanes(-g)));
        given(type, y, i, n, rounded_as(type, silu * taken(type, up, i, n)));
    }
}

#define PART(name, of_row) \
    static void name(const void *argument, int64_t part) \
    { \
        const Job *job = argument; \
        int64_t row = part * job->rows_of_part, end = row + job->rows_of_part; \
        if (end > job->rows) end = job->rows; \
        if (job->type == FLOAT32) \
            for (; row < end; row++) of_row(FLOAT32, job, row); \
        else \
            for (; row < end; row++) of_row(BFLOAT16, job, row); \
    }
PART(norm_rows, norm_row)
PART(turn_rows, turn_row)
PART(gate_rows, gate_row)
#undef PART

static int computed(Parallel by, void (*part)(const void *, int64_t), Job job, int64_t numbers_of_row, int threads)
{
    if (job.type != FLOAT32 && job.type != BFLOAT16) return ERROR_ARGUMENT;
    if (job.rows < 1 || numbers_of_row < 1) return job.rows < 0 || numbers_of_row < 0 ? ERROR_ARGUMENT : 0;
    job.rows_of_part = (NUMBERS_OF_PART + numbers_of_row - 1) / numbers_of_row;
    run(by, part, &job, (job.rows + job.rows_of_part - 1) / job.rows_of_part, threads);
    return 0;
}

/* Each takes the address of threads or NULL, a type, arrays [R,D], [R,N,H], [R,F] of it, sizes, and how many threads;
   a weight is [D], cos and sin [R,H/2] in float32. y may be x. 0, or ERROR_ARGUMENT. */

int mistral_rms_norm(
    Parallel by, int type, const void *x, const void *weight, void *y, int64_t rows, int64_t D, float eps, int threads)
{
    Job job = {.type = type, .x = x, .by = weight, .y = y, .rows = rows, .size = D, .eps = eps};
    return computed(by, norm_rows, job, D, threads);
}

int mistral_rotate(
    Parallel by, int type, const void *x, const float *cos, const float *sin, void *y, int64_t rows, int64_t heads,
    int64_t H, int threads)
{
    Job job = {.type = type, .x = x, .cos = cos, .sin = sin, .y = y, .rows = rows, .size = H, .heads = heads};
    return H % 2 ? ERROR_ARGUMENT : computed(by, turn_rows, job, heads * H, threads);
}

int mistral_gated(Parallel by, int type, const void *gate, const void *up, void *y, int64_t rows, int64_t F, int threads)
{
    Job job = {.type = type, .x = gate, .by = up, .y = y, .rows = rows, .size = F};
    return computed(by, gate_rows, job, F, threads);
}
