/* The formulas of a layer between its products, once for all that is computed in C: those of mistral_core/reference.

   Numbers are `stored` as one type and each result is rounded to another, `rounded`, which are the same but where floats
   hold what a bfloat16 model computes. y may be x. */

#include "numbers.h"

/* x[D] / sqrt(mean(x^2) + eps), rounded, then times the weight[D], rounded. */
static inline __attribute__((always_inline)) void norm_row(
    int stored, int rounded, const void *x, const void *weight, int64_t D, float eps, void *y)
{
    Lanes one = {0}, two = {0};
    for (int64_t i = 0; i < D; i += 2 * LANES) {
        Lanes first = taken(stored, x, i, D), second = {0};
        if (i + LANES < D) second = taken(stored, x, i + LANES, D);
        one += first * first;
        two += second * second;
    }
    float by = 1 / sqrtf(sum_of(one + two) / (float)D + eps);
    for (int64_t i = 0; i < D; i += LANES) {
        Lanes h = rounded_as(rounded, taken(stored, x, i, D) * by);
        given(stored, y, i, D, rounded_as(rounded, h * taken(stored, weight, i, D)));
    }
}

/* Pairs (x_i, x_{i+H/2}) of each head [N,H] turned by the angles of a row, cos and sin [H/2]. */
static inline __attribute__((always_inline)) void turn_row(
    int stored, int rounded, const void *x, const float *cos, const float *sin, int64_t N, int64_t H, void *y)
{
    int64_t half = H / 2;
    for (int64_t n = 0; n < 2 * N; n += 2) {
        const void *x_first = at(stored, x, n * half), *x_second = at(stored, x, (n + 1) * half);
        void *y_first = (void *)at(stored, y, n * half), *y_second = (void *)at(stored, y, (n + 1) * half);
        for (int64_t i = 0; i < half; i += LANES) {
            Lanes first = taken(stored, x_first, i, half), second = taken(stored, x_second, i, half);
            Lanes c = taken(FLOAT32, cos, i, half), s = taken(FLOAT32, sin, i, half);
            given(stored, y_first, i, half, rounded_as(rounded, first * c - second * s));
            given(stored, y_second, i, half, rounded_as(rounded, second * c + first * s));
        }
    }
}

/* silu(gate) rounded, times up, rounded: n numbers of each. */
static inline __attribute__((always_inline)) void gate_row(
    int stored, int rounded, const void *gate, const void *up, int64_t n, void *y)
{
    for (int64_t i = 0; i < n; i += LANES) {
        Lanes g = taken(stored, gate, i, n), silu = rounded_as(rounded, g / (1 + exp_lanes(-g)));
        given(stored, y, i, n, rounded_as(rounded, silu * taken(stored, up, i, n)));
    }
}
