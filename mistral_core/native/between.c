/* What a layer computes between its products, each in one pass over memory: the norm, the rotation, the gate.

   Computed in float32, each result rounded once to the type of the arrays, float32 or bfloat16. Threads are rows.c's, by
   address.

   Axes: R rows, which are tokens, D numbers of each, N heads of H numbers. */

#include "bound.h"
#include "formulas.h"

enum { NUMBERS_OF_PART = 1 << 14 }; /* about so many are worth the way to a thread */

typedef struct {
    int type;
    const void *x, *by; /* what is changed, and by what: weights [D], or the numbers that are gated */
    const float *cos, *sin;
    void *y;
    int64_t rows, size, heads, rows_of_part;
    float eps;
} Job;

static inline __attribute__((always_inline)) void norm(int type, const Job *job, int64_t row)
{
    int64_t start = row * job->size;
    norm_row(type, type, at(type, job->x, start), job->by, job->size, job->eps, (void *)at(type, job->y, start));
}

static inline __attribute__((always_inline)) void turn(int type, const Job *job, int64_t row)
{
    int64_t start = row * job->heads * job->size, half = job->size / 2;
    const float *cos = job->cos + row * half, *sin = job->sin + row * half;
    turn_row(type, type, at(type, job->x, start), cos, sin, job->heads, job->size, (void *)at(type, job->y, start));
}

static inline __attribute__((always_inline)) void gate(int type, const Job *job, int64_t row)
{
    int64_t start = row * job->size;
    const void *up = at(type, job->by, start);
    gate_row(type, type, at(type, job->x, start), up, job->size, (void *)at(type, job->y, start));
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
PART(norm_rows, norm)
PART(turn_rows, turn)
PART(gate_rows, gate)
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

int mistral_gated(
    Parallel by, int type, const void *gate, const void *up, void *y, int64_t rows, int64_t F, int threads)
{
    Job job = {.type = type, .x = gate, .by = up, .y = y, .rows = rows, .size = F};
    return computed(by, gate_rows, job, F, threads);
}
