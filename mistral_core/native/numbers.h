/* Sixteen numbers at once, in float32, and what a model's type makes of them: what the formulas in C are written in. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

enum { FLOAT32, BFLOAT16 };
enum { ERROR_ARGUMENT = 1, ERROR_MEMORY = 2 };
enum { LANES = 16 };
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Bits __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2)));

static inline Lanes lanes_at(const float *from) { return *(const Lanes *)from; }
static inline void put_lanes(float *to, Lanes lanes) { *(Lanes *)to = lanes; }

static inline Lanes chosen(Bits where, Lanes a, Lanes b)
{
    return (Lanes)(((Bits)a & where) | ((Bits)b & ~where));
}

static inline Lanes rounded_lanes(Lanes x) /* to bfloat16, halves to even; what is no number stays none */
{
    Bits bits = (Bits)x, up = bits + 0x7fff + ((bits >> 16) & 1);
#ifdef __AVX512F__
    __mmask16 none = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
    up = (Bits)_mm512_mask_mov_epi32((__m512i)up, none, (__m512i)(bits | 0x400000));
#else
    up = ((x == x) & up) | ((x != x) & (bits | 0x400000));
#endif
    return (Lanes)(up & (int32_t)0xffff0000);
}

static inline float rounded_number(float x, int type)
{
    if (type == FLOAT32) return x;
    Lanes lanes = {x};
    return rounded_lanes(lanes)[0];
}

static inline void round_to(int type, float *x, int64_t n)
{
    if (type == FLOAT32) return;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) put_lanes(x + i, rounded_lanes(lanes_at(x + i)));
    for (; i < n; i++) x[i] = rounded_number(x[i], type);
}

static inline Lanes of_bfloat16(const uint16_t *from)
{
    return (Lanes)(__builtin_convertvector(*(const Halves *)from, Bits) << 16);
}

static inline float sum_of(Lanes lanes)
{
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)lanes);
#endif
    float sum[LANES];
    memcpy(sum, &lanes, sizeof sum);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) sum[i] += sum[i + half];
    return sum[0];
}

static inline void widen(const uint16_t *from, int64_t n, float *to) /* bfloat16 */
{
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) put_lanes(to + i, of_bfloat16(from + i));
    for (; i < n; i++) {
        uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(to + i, &bits, 4);
    }
}

static inline float dot(const float *a, const float *b, int64_t n)
{
    Lanes one = {0}, two = {0};
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        one += lanes_at(a + i) * lanes_at(b + i);
        two += lanes_at(a + i + LANES) * lanes_at(b + i + LANES);
    }
    for (; i + LANES <= n; i += LANES) one += lanes_at(a + i) * lanes_at(b + i);
    float sum = sum_of(one + two);
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* e^x within 2 units of the last place: 2^k e^r with |r| <= log(2)/2, e^r by its series; 0 below -87. */
static inline Lanes exp_lanes(Lanes x)
{
    const Lanes nothing = {0};
#ifdef __AVX512F__
    /* what is no number is the second operand, and stays */
    x = (Lanes)_mm512_min_ps((__m512)(nothing + 88.0f), _mm512_max_ps((__m512)(nothing - 104.0f), (__m512)x));
    __mmask16 small = _mm512_cmp_ps_mask((__m512)x, (__m512)(nothing - 87.0f), _CMP_LT_OQ);
    Lanes whole = (Lanes)_mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT);
#else
    Bits small = x < -87.0f, large = x > 88.0f;
    x = chosen(small, nothing - 87.0f, chosen(large, nothing + 88.0f, x));
    Bits k = __builtin_convertvector(x * 1.44269504f + chosen(x < 0, nothing - 0.5f, nothing + 0.5f), Bits);
    Lanes whole = __builtin_convertvector(k, Lanes);
#endif
    Lanes r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Lanes y = r * (1.0f / 5040) + 1.0f / 720;
    y = y * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
#ifdef __AVX512F__
    return (Lanes)_mm512_maskz_scalef_ps((__mmask16)~small, (__m512)y, (__m512)whole);
#else
    return chosen(small, nothing, y * (Lanes)((k + 127) << 23));
#endif
}

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

static inline int64_t bytes_of(int type) { return type == FLOAT32 ? 4 : 2; } /* of a number */

static inline const void *at(int type, const void *from, int64_t i)
{
    return (const char *)from + i * bytes_of(type);
}
