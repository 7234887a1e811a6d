/* Few rows times a matrix of few bits, straight from its codes, or of floats: y[R,O] = x[R,I] w[O,I]^T in float32.

   w[o,i] = (value(code[o,i]) - zero[block]) * scale[block], as in mistral_core/quantization/matrix.py. Plain C11,
   threads of POSIX and nothing else; a processor with AVX-512 runs the intrinsics, any other what its compiler makes of
   the loops.

   Axes: R rows of x, O rows of w, I columns, G blocks across. Functions give 0, or an ERROR_ below. */

#define _GNU_SOURCE
#include <float.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define WIDE 1
#elif defined(__AVX2__) && defined(__F16C__)
#define EIGHT 1
#endif
#if defined(WIDE) || defined(EIGHT)
#include <immintrin.h>
#endif
#include "tiles.h"

enum { INT8, INT4, NF4, FP8, FLOATS }; /* FLOATS: codes are numbers of the type of scales, and there are none */
enum { FLOAT32, BFLOAT16, FLOAT16 };
enum { ERROR_ARGUMENT = 1, ERROR_MEMORY = 2 };

typedef struct {
    int kind, scale_type;
    const uint8_t *codes;
    const void *scale;
    const int8_t *zero;
    int64_t O, I, high, wide; /* high, wide: rows and columns of a block */
    int64_t G, row_bytes;
} Matrix;

static const float NF4_VALUES[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
static const float INT4_VALUES[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

/* ---- numbers ---- */

static inline float of_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static inline float of_bfloat16(uint16_t bits) { return of_bits((uint32_t)bits << 16); }

static inline uint16_t to_bfloat16(float x) /* halves to even; what is no number stays none */
{
    uint32_t bits = bits_of(x);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

static inline float of_float16(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = (half >> 10) & 31, fraction = half & 1023;
    uint32_t normal = ((exponent == 31 ? 255 : exponent + 112) << 23) | (fraction << 13);
    return of_bits(sign | (exponent ? normal : bits_of((float)fraction * 0x1p-24f)));
}

static inline float of_fp8(uint8_t code) /* E4M3: no infinities, one number that is none of either sign */
{
    uint32_t sign = (uint32_t)(code & 0x80) << 24, rest = code & 0x7f;
    uint32_t small = bits_of((float)rest * 0x1p-9f), normal = (rest << 20) + (120u << 23);
    return of_bits(sign | (rest == 0x7f ? 0x7fc00000 : rest < 8 ? small : normal));
}

static void to_float32(const void *from, int type, int64_t count, float *to)
{
    const uint16_t *halves = from;
    if (type == FLOAT32)
        memcpy(to, from, (size_t)count * 4);
    else if (type == BFLOAT16)
        for (int64_t i = 0; i < count; i++) to[i] = of_bfloat16(halves[i]);
    else
        for (int64_t i = 0; i < count; i++) to[i] = of_float16(halves[i]);
}

/* ---- threads: those of one pool help with parts of a job; who comes late finds fewer of them ---- */

enum { MOST_THREADS = 256 };
typedef void (*Part)(const void *job, int64_t part);

static pthread_mutex_t calling = PTHREAD_MUTEX_INITIALIZER, sleeping = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t awaken = PTHREAD_COND_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int helpers; /* threads that have been started */
static struct {
    Part run;
    const void *job;
    int64_t parts;
    int wanted;
} work;
static atomic_llong next_part;
static atomic_int is_open, inside, asleep;
static atomic_uint generation;

static inline void pause_briefly(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

enum { SPIN_NS = 60000 }; /* a thread looks for the next job so long before it sleeps */

static void take_parts(void)
{
    for (;;) {
        int64_t part = atomic_fetch_add(&next_part, 1);
        if (part >= work.parts) return;
        work.run(work.job, part);
    }
}

static void *help(void *argument)
{
    int number = (int)(intptr_t)argument;
    unsigned seen = 0;
    for (;;) {
        int64_t until = now_ns() + SPIN_NS;
        while (atomic_load(&generation) == seen) {
            for (int i = 0; i < 32 && atomic_load_explicit(&generation, memory_order_relaxed) == seen; i++)
                pause_briefly();
            if (now_ns() < until) continue;
            pthread_mutex_lock(&sleeping);
            atomic_fetch_add(&asleep, 1);
            while (atomic_load(&generation) == seen) pthread_cond_wait(&awaken, &sleeping);
            atomic_fetch_sub(&asleep, 1);
            pthread_mutex_unlock(&sleeping);
        }
        seen = atomic_load(&generation);
        atomic_fetch_add(&inside, 1); /* from here the caller waits, if the job is still open */
        if (atomic_load(&is_open) && number < work.wanted) take_parts();
        atomic_fetch_sub(&inside, 1);
    }
    return NULL;
}

static void forget_threads(void) /* a forked process has none */
{
    pthread_mutex_init(&calling, NULL);
    pthread_mutex_init(&sleeping, NULL);
    pthread_cond_init(&awaken, NULL);
    helpers = 0;
    atomic_store(&is_open, 0);
    atomic_store(&inside, 0);
    atomic_store(&asleep, 0);
    atomic_store(&generation, 0);
}

static void prepare_pool(void) { pthread_atfork(NULL, NULL, forget_threads); }

int mistral_threads(void) /* the processors that this process may use */
{
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    long count = sysconf(_SC_NPROCESSORS_ONLN);
    return count < 1 ? 1 : (int)count;
}

/* Threads of another library: it runs a function with an argument on so many, the caller's among them, and waits. */
typedef void (*Parallel)(void (*)(void *), void *, unsigned threads, unsigned flags);
static _Thread_local Parallel lent; /* to the call that this thread is in */
typedef struct {
    Part run;
    const void *job;
    int64_t parts;
    atomic_llong next;
} Lent;

static void take_lent(void *argument)
{
    Lent *work = (Lent *)argument;
    for (;;) {
        int64_t part = atomic_fetch_add(&work->next, 1);
        if (part >= work->parts) return;
        work->run(work->job, part);
    }
}

static void run_parts(Part run, const void *job, int64_t parts, int threads)
{
    if (lent && threads > 1 && parts > 1) {
        Lent work = {run, job, parts, 0};
        lent(take_lent, &work, threads < parts ? (unsigned)threads : (unsigned)parts, 0);
        return;
    }
    static atomic_int processors;
    if (threads <= 0) {
        if (!atomic_load(&processors)) atomic_store(&processors, mistral_threads());
        threads = atomic_load(&processors);
    }
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads > parts) threads = (int)parts;
    pthread_once(&once, prepare_pool);
    if (threads < 2 || pthread_mutex_trylock(&calling)) { /* somebody else has the pool: alone is as fast as waiting */
        for (int64_t part = 0; part < parts; part++) run(job, part);
        return;
    }
    while (helpers < threads - 1) {
        pthread_attr_t attributes;
        pthread_t thread;
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        int failed = pthread_create(&thread, &attributes, help, (void *)(intptr_t)helpers);
        pthread_attr_destroy(&attributes);
        if (failed) break;
        helpers++;
    }
    work.run = run, work.job = job, work.parts = parts, work.wanted = threads - 1;
    atomic_store(&next_part, 0);
    atomic_store(&is_open, 1);
    atomic_fetch_add(&generation, 1);
    if (atomic_load(&asleep)) {
        pthread_mutex_lock(&sleeping);
        pthread_cond_broadcast(&awaken);
        pthread_mutex_unlock(&sleeping);
    }
    take_parts();
    atomic_store(&is_open, 0);
    for (int spins = 0; atomic_load(&inside); spins++) {
        pause_briefly();
        if (spins > 2000) sched_yield();
    }
    pthread_mutex_unlock(&calling);
}

/* Scratch memory of a thread, kept for its next call. */
static _Thread_local struct {
    void *memory;
    size_t size;
} scratch[3];

static void *scratch_of(int which, size_t size)
{
    if (scratch[which].size < size) {
        free(scratch[which].memory);
        size = (size + 4095) / 4096 * 4096;
        scratch[which].memory = aligned_alloc(64, size);
        scratch[which].size = scratch[which].memory ? size : 0;
    }
    return scratch[which].memory;
}

/* ---- scales and values of a row ---- */

static inline int64_t up_to(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

/* Scales [G] of a row and, where there are any, zero points, as float32; 16 zeros more, for what is after the end. */
static void row_scales(const Matrix *m, int64_t o, float *scale, float *zero)
{
    if (m->kind == FLOATS) return;
    int64_t first = o / m->high * m->G;
    to_float32((const char *)m->scale + first * (m->scale_type == FLOAT32 ? 4 : 2), m->scale_type, m->G, scale);
    memset(scale + m->G, 0, 16 * 4);
    if (!zero) return;
    for (int64_t g = 0; g < m->G; g++) zero[g] = m->zero[first + g];
    memset(zero + m->G, 0, 16 * 4);
}

/* Values of n columns from column `first` on, an even one, without scales. */
static void values_of(const Matrix *m, int64_t o, int64_t first, int64_t n, float *restrict to)
{
    const uint8_t *codes = m->codes + o * m->row_bytes;
    if (m->kind == INT8) {
        const int8_t *from = (const int8_t *)codes + first;
        for (int64_t i = 0; i < n; i++) to[i] = from[i];
    } else if (m->kind == FP8) {
        for (int64_t i = 0; i < n; i++) to[i] = of_fp8(codes[first + i]);
    } else if (m->kind == FLOATS) {
        to_float32(codes + first * (m->scale_type == FLOAT32 ? 4 : 2), m->scale_type, n, to);
    } else {
        const uint8_t *from = codes + first / 2;
        if (m->kind == INT4)
            for (int64_t i = 0; i < n / 2; i++) {
                to[2 * i] = (float)((from[i] & 15) - 8);
                to[2 * i + 1] = (float)((from[i] >> 4) - 8);
            }
        else
            for (int64_t i = 0; i < n / 2; i++) {
                to[2 * i] = NF4_VALUES[from[i] & 15];
                to[2 * i + 1] = NF4_VALUES[from[i] >> 4];
            }
        if (n % 2) to[n - 1] = (m->kind == INT4 ? INT4_VALUES : NF4_VALUES)[from[n / 2] & 15];
    }
}

/* ---- vectors: as many numbers as the processor adds at once ---- */

#if defined(WIDE)
enum { LANES = 16, IS_WIDE = 1 };
#elif defined(__AVX__)
enum { LANES = 8, IS_WIDE = 0 };
#else
enum { LANES = 4, IS_WIDE = 0 };
#endif
#if defined(WIDE) || defined(__aarch64__)
#define MANY_REGISTERS 1
enum { MOST_ROWS = 6 }; /* rows of x, at most, whose sums with four of w stay in registers */
#else
enum { MOST_ROWS = 2 };
#endif
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t Bits __attribute__((vector_size(4 * LANES)));
typedef float LooseLanes __attribute__((vector_size(4 * LANES), aligned(1), may_alias)); /* wherever they lie */
typedef int32_t LooseBits __attribute__((vector_size(4 * LANES), aligned(1), may_alias));

static inline Lanes all(float x) { return x - (Lanes){0}; }
static inline Lanes lanes_at(const void *from) { return *(const LooseLanes *)from; }
static inline Bits bits_at(const void *from) { return *(const LooseBits *)from; }
static inline void put_lanes(float *to, Lanes lanes) { *(LooseLanes *)to = lanes; }

static inline float sum_of(Lanes lanes)
{
#ifdef WIDE
    return _mm512_reduce_add_ps((__m512)lanes);
#else
    float sum[LANES];
    memcpy(sum, &lanes, sizeof sum);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) sum[i] += sum[i + half];
    return sum[0];
#endif
}

/* Lane k has table[index[k]], an index below LANES. */
static inline Lanes looked_up(const float *table, Bits index)
{
#if defined(WIDE)
    return (Lanes)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
#elif defined(EIGHT)
    return (Lanes)_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
#else
    Lanes found;
    for (int k = 0; k < LANES; k++) found[k] = table[index[k]];
    return found;
#endif
}

/* ---- codes as numbers ---- */

#ifdef WIDE

static inline __m512i fp8_halves(__m256i codes) /* as float16, 256 times too small; what is no number is lost */
{
    return _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(codes), 7), _mm512_set1_epi16((short)0xbfff));
}

static inline int fp8_has_none(__m256i codes) /* whether a code is no number */
{
    __m256i rest = _mm256_and_si256(codes, _mm256_set1_epi8(0x7f));
    return _mm256_cmpeq_epi8_mask(rest, _mm256_set1_epi8(0x7f)) != 0;
}

#endif

/* Words of eight codes become numbers by `of`, which is made of zero points, those of a lane in that lane. AVX-512 has a
   table of all numbers. Elsewhere a code of int4 lies where it is in a float of 2^23 and is added to that: what is taken
   from the sum leaves the number times `times_of`. */
enum { SPOTS = 4 }; /* where a code is in such a float */

static inline float times_of(int kind, int n) { return kind == INT4 && !IS_WIDE ? (float)(1 << 4 * (n % SPOTS)) : 1; }

static inline __attribute__((always_inline)) void prepare_nibbles(int kind, Lanes zero, Lanes *of)
{
    if (IS_WIDE) of[0] = lanes_at(kind == INT4 ? INT4_VALUES : NF4_VALUES) - zero;
    else if (kind == INT4)
        for (int n = 0; n < SPOTS; n++) of[n] = 0x1p23f + (8 + zero) * times_of(INT4, n);
}

static inline __attribute__((always_inline)) Lanes of_nibble(int kind, Bits words, int n, const Lanes *of)
{
#if defined(WIDE)
    (void)kind;
    __m512i v = (__m512i)words;
    return (Lanes)_mm512_permutexvar_ps(n ? _mm512_srli_epi32(v, 4 * n) : v, (__m512)of[0]);
#else
    if (kind == INT4) {
        Bits code = (n < SPOTS ? words : words >> 16) & (15 << 4 * (n % SPOTS));
        return (Lanes)(code | 0x4b000000) - of[n % SPOTS];
    }
#if defined(EIGHT)
    Lanes low = looked_up(NF4_VALUES, words >> 4 * n), high = looked_up(NF4_VALUES + 8, words >> 4 * n);
    return (Lanes)_mm256_blendv_ps((__m256)low, (__m256)high, (__m256)(words << (28 - 4 * n)));
#else
    Lanes found;
    for (int k = 0; k < LANES; k++) found[k] = NF4_VALUES[(uint32_t)words[k] >> 4 * n & 15];
    return found;
#endif
#endif
}

/* The numbers of codes beside each other. */
static inline __attribute__((always_inline)) Lanes numbers_at(int kind, const uint8_t *codes)
{
#if defined(WIDE)
    if (kind == INT8)
        return (Lanes)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)codes)));
    if (kind == FP8) {
        __m128i v = _mm_loadu_si128((const void *)codes), rest = _mm_and_si128(v, _mm_set1_epi8(0x7f));
        __m512 x = _mm512_cvtph_ps(_mm512_castsi512_si256(fp8_halves(_mm256_castsi128_si256(v))));
        __mmask16 none = _mm_cmpeq_epi8_mask(rest, _mm_set1_epi8(0x7f));
        return (Lanes)_mm512_mask_mov_ps(_mm512_mul_ps(x, _mm512_set1_ps(256)), none, _mm512_set1_ps(NAN));
    }
    /* byte q in 64 bits: its lower half is the even column's, shifted by 28 the upper half is the odd one's */
    __m512i v = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const void *)codes));
    Bits words = (Bits)_mm512_or_si512(v, _mm512_slli_epi64(v, 28));
    Lanes of[SPOTS];
    prepare_nibbles(kind, all(0), of);
    return of_nibble(kind, words, 0, of);
#elif defined(EIGHT)
    if (kind == INT8)
        return (Lanes)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)codes)));
    if (kind == FP8) {
        __m128i v = _mm_loadl_epi64((const void *)codes), rest = _mm_and_si128(v, _mm_set1_epi8(0x7f));
        __m128i half = _mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(v), 7), _mm_set1_epi16((short)0xbfff));
        __m256i none = _mm256_cvtepi8_epi32(_mm_cmpeq_epi8(rest, _mm_set1_epi8(0x7f)));
        __m256 x = _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256));
        return (Lanes)_mm256_or_ps(x, (__m256)none); /* all bits are no number */
    }
    int32_t word;
    memcpy(&word, codes, 4);
    const Bits shifts = {0, 4, 8, 12, 16, 20, 24, 28};
    Lanes of[SPOTS];
    prepare_nibbles(kind, all(0), of);
    return of_nibble(kind, (word - (Bits){0}) >> shifts, 0, of);
#else
    Lanes found;
    for (int k = 0; k < LANES; k++)
        found[k] = kind == INT8   ? (int8_t)codes[k]
                   : kind == FP8  ? of_fp8(codes[k])
                   : kind == INT4 ? INT4_VALUES[codes[k / 2] >> 4 * (k % 2) & 15]
                                  : NF4_VALUES[codes[k / 2] >> 4 * (k % 2) & 15];
    return found;
#endif
}

static inline int64_t bytes_of(int kind, int64_t columns)
{
    return kind == INT8 || kind == FP8 ? columns : (columns + 1) / 2;
}

/* The same of `count` of them, and what a code of 0 is. */
static inline __attribute__((always_inline)) Lanes some_numbers_at(int kind, const uint8_t *codes, int64_t count)
{
    if (count >= LANES) return numbers_at(kind, codes);
    uint8_t some[LANES] = {0};
    memcpy(some, codes, (size_t)bytes_of(kind, count));
    return numbers_at(kind, some);
}

static inline __attribute__((always_inline)) void decode_by(
    const Matrix *m, int kind, int64_t o, int64_t first, int64_t n, const float *scale, const float *zero, float *to)
{
    const uint8_t *codes = m->codes + o * m->row_bytes;
    int64_t i = first, end = first + n, group = m->G == 1 ? 0 : first / m->wide;
    for (; i < end; group++) {
        int64_t stop = m->G == 1 ? end : (group + 1) * m->wide;
        if (stop > end) stop = end;
        Lanes s = all(scale[group]), z = all(zero ? zero[group] : 0);
        for (; i + LANES <= stop; i += LANES, to += LANES)
            put_lanes(to, (numbers_at(kind, codes + bytes_of(kind, i)) - z) * s);
        if (i == stop) continue;
        /* the end of the row, for blocks are of multiples of LANES here */
        Lanes rest = (some_numbers_at(kind, codes + bytes_of(kind, i), stop - i) - z) * s;
        memcpy(to, &rest, (size_t)(stop - i) * 4);
        i = stop;
    }
}

/* n columns of row o from an even column `first` on, a multiple of 16, with the row's scales. */
static void decode(
    const Matrix *m, int64_t o, int64_t first, int64_t n, const float *scale, const float *zero, float *to)
{
    if (m->kind == FLOATS) {
        values_of(m, o, first, n, to);
        return;
    }
    if (m->G == 1 || m->wide % LANES == 0) {
        if (m->kind == INT8) decode_by(m, INT8, o, first, n, scale, zero, to);
        else if (m->kind == INT4) decode_by(m, INT4, o, first, n, scale, zero, to);
        else if (m->kind == NF4) decode_by(m, NF4, o, first, n, scale, zero, to);
        else decode_by(m, FP8, o, first, n, scale, zero, to);
        return;
    }
    values_of(m, o, first, n, to);
    for (int64_t i = first, group = first / m->wide; i < first + n; group++) {
        int64_t stop = (group + 1) * m->wide < first + n ? (group + 1) * m->wide : first + n;
        float s = scale[group], z = zero ? zero[group] : 0;
        for (; i < stop; i++) to[i - first] = (to[i - first] - z) * s;
    }
}

/* ---- the product of several rows: strips of w are decoded once and meet all of x ---- */

enum { STRIP = 512, HIGH = 4 }; /* columns and rows of w at a time */

/* sums[rows][HIGH] += w[HIGH, n] x[rows, n]^T, lane by lane. */
static inline __attribute__((always_inline)) void multiply(
    int rows, const float *w, const float *x, int64_t stride, int64_t n, Lanes *sums)
{
    Lanes sum[MOST_ROWS][HIGH];
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < HIGH; h++) sum[r][h] = sums[r * HIGH + h];
    for (int64_t i = 0; i < n; i += LANES) {
        Lanes each[HIGH];
        for (int h = 0; h < HIGH; h++) each[h] = *(const Lanes *)(w + h * STRIP + i);
        for (int r = 0; r < rows; r++) {
            Lanes of_x = *(const Lanes *)(x + r * stride + i);
            for (int h = 0; h < HIGH; h++) sum[r][h] += each[h] * of_x;
        }
    }
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < HIGH; h++) sums[r * HIGH + h] = sum[r][h];
}

typedef struct {
    const Matrix *m;
    const float *x; /* [R, stride], as the kernel wants it, zeros after I */
    const int8_t *x_codes;
    const float *x_scales;
    const int32_t *x_totals;
    const uint16_t *x_words;
    const char *x_strips; /* x, or its words, as `in_strips` has them; NULL where its rows are few */
    void *y;
    int y_type, digits;
    int64_t R, stride, rows_of_part;
    atomic_int *failed;
} Job;

static void put(const Job *job, int64_t r, int64_t o, float value)
{
    if (job->y_type == FLOAT32) ((float *)job->y)[r * job->m->O + o] = value;
    else ((uint16_t *)job->y)[r * job->m->O + o] = to_bfloat16(value);
}

static float *scratch_for_scales(const Job *job, int high, size_t more, float **zero)
{
    size_t size = (size_t)up_to(job->m->G + 16, 16);
    float *memory = scratch_of(1, 2 * size * 4 * (size_t)high + more);
    if (!memory) {
        atomic_store(job->failed, ERROR_MEMORY);
        return NULL;
    }
    *zero = job->m->zero ? memory + size : NULL;
    return memory;
}

static void several_rows(const void *argument, int64_t part)
{
    const Job *job = argument;
    const Matrix *m = job->m;
    int64_t R = job->R, size = up_to(m->G + 16, 16);
    float *zero, *scale;
    size_t strip = HIGH * STRIP * 4, sums_size = (size_t)R * HIGH * sizeof(Lanes);
    if (!(scale = scratch_for_scales(job, HIGH, strip + sums_size, &zero))) return;
    float *w = scale + 2 * size * HIGH;
    Lanes *sums = (Lanes *)(w + HIGH * STRIP);
    int64_t end = (part + 1) * job->rows_of_part < m->O ? (part + 1) * job->rows_of_part : m->O;
    for (int64_t o = part * job->rows_of_part; o < end; o += HIGH) {
        int high = (int)(end - o < HIGH ? end - o : HIGH);
        for (int h = 0; h < high; h++) row_scales(m, o + h, scale + 2 * size * h, zero ? zero + 2 * size * h : NULL);
        memset(sums, 0, sums_size);
        if (high < HIGH) memset(w, 0, strip);
        for (int64_t first = 0; first < m->I; first += STRIP) {
            int64_t n = m->I - first < STRIP ? m->I - first : STRIP, whole = up_to(n, 16);
            for (int h = 0; h < high; h++) {
                float *row = w + h * STRIP;
                decode(m, o + h, first, n, scale + 2 * size * h, zero ? zero + 2 * size * h : NULL, row);
                for (int64_t i = n; i < whole; i++) row[i] = 0;
            }
            for (int64_t r = 0; r < R;) {
                const float *x = job->x + r * job->stride + first;
                int64_t left = R - r;
#define WITH(rows) \
    if (rows <= MOST_ROWS && (left == rows || (left > rows && rows == MOST_ROWS))) { \
        multiply(rows <= MOST_ROWS ? rows : 1, w, x, job->stride, whole, sums + r * HIGH); \
        r += rows; \
        continue; \
    }
                WITH(6) WITH(5) WITH(4) WITH(3) WITH(2) WITH(1)
#undef WITH
            }
        }
        for (int64_t r = 0; r < R; r++)
            for (int h = 0; h < high; h++) put(job, r, o + h, sum_of(sums[r * HIGH + h]));
    }
}

/* ---- the product from registers: codes become numbers there, which meet some rows of x ---- */

enum { AHEAD = 3072 }; /* bytes: what is read ahead, over the borders of pages */
enum { GROUPS_OF_BLOCKS, GROUPS_IN_A_BLOCK }; /* a scale is of whole blocks of columns, or a block has several */
enum { TOGETHER = 8, IN_CACHE = 6144 };       /* rows of w that meet floats of x while these are in the first cache */
enum { OF_NIBBLES = 8 * LANES, OF_BYTES = 4 * LANES }; /* columns that are met at a time */
/* Rows of x, at most, that meet codes at once, and for which each code becomes a number anew: more take it from a strip. */
#ifdef WIDE
enum { MOST_MET = 8, MOST_BY_CODES = INT32_MAX };
#else
enum { MOST_MET = 4, MOST_BY_CODES = 8 };
#endif

static inline int grouping(const Matrix *m, int64_t columns) /* of blocks of so many; -1: none that is known here */
{
    if (m->G == 1 || m->wide % columns == 0) return GROUPS_OF_BLOCKS;
    return columns % m->wide == 0 && m->wide >= 16 ? GROUPS_IN_A_BLOCK : -1;
}

static inline Bits lane_groups(int64_t wide, int64_t columns_of_lane)
{
    Bits index;
    for (int k = 0; k < LANES; k++) index[k] = (int32_t)(k * columns_of_lane / wide);
    return index;
}

/* Columns of x as 4-bit codes meet them: of OF_NIBBLES, [s][k] is column 8k + s, by what the code comes times. */
static void order_for_nibbles(int kind, float *x, int64_t stride)
{
    for (int64_t b = 0; b < stride; b += OF_NIBBLES) {
        float before[OF_NIBBLES];
        memcpy(before, x + b, sizeof before);
        for (int s = 0; s < 8; s++)
            for (int k = 0; k < LANES; k++) x[b + s * LANES + k] = before[8 * k + s] / times_of(kind, s);
    }
}

typedef struct {
    const uint8_t *codes; /* of the strip's first column, a multiple of 128 */
    int64_t bytes, first, columns;
    const float *x, *scale, *zero;
    int64_t stride;
} Strip;

static inline Lanes met_at(const float *x) { return *(const Lanes *)x; } /* of x, which begins at whole vectors */

static inline __attribute__((always_inline)) void nibbles_by(
    int rows, int grouped, int kind, const Matrix *m, Strip at, Bits index, int64_t ahead, Lanes *totals)
{
    /* whether numbers come without their zero points: one table is of all lanes, and what is looked up in two is whole */
    const int is_left = IS_WIDE ? grouped == GROUPS_IN_A_BLOCK : kind == NF4;
    Lanes of[SPOTS], s = {0}, z = {0}, total[MOST_MET];
    for (int r = 0; r < rows; r++) total[r] = totals[r];
    const int64_t of_block = OF_NIBBLES / m->wide; /* scales */
    int64_t of_group = m->G == 1 ? INT64_MAX : m->wide / OF_NIBBLES, left = of_group;
    if (m->G > 1) {
        at.scale += at.first / m->wide;
        if (at.zero) at.zero += at.first / m->wide;
        if (grouped == GROUPS_OF_BLOCKS) left = of_group - at.first / OF_NIBBLES % of_group;
    }
    prepare_nibbles(kind, z, of);
    for (int64_t b = 0, begins = 1; b < at.bytes; b += 4 * LANES, at.x += OF_NIBBLES) {
        uint8_t rest[4 * LANES];
        const uint8_t *codes = at.codes + b;
        if (__builtin_expect(at.bytes - b < 4 * LANES, 0)) {
            memset(rest, 0, sizeof rest);
            codes = memcpy(rest, codes, (size_t)(at.bytes - b));
        }
        Bits v = bits_at(codes);
        if (4 * LANES == 64 || b % 64 == 0) __builtin_prefetch(at.codes + b + ahead, 0, 3);
        if (grouped == GROUPS_IN_A_BLOCK) {
            s = looked_up(at.scale, index);
            at.scale += of_block;
            if (at.zero) {
                z = looked_up(at.zero, index);
                if (!is_left) prepare_nibbles(kind, z, of);
                at.zero += of_block;
            }
        } else if (begins) {
            s = all(*at.scale++);
            if (at.zero) {
                z = all(*at.zero++);
                if (!is_left) prepare_nibbles(kind, z, of);
            }
            begins = 0;
        }
        Lanes t[MOST_MET], t2 = {0};
        for (int r = 0; r < rows; r++) t[r] = (Lanes){0};
#define STEP(n) { \
            Lanes w = of_nibble(kind, v, n, of); \
            if (is_left && at.zero) w -= z; \
            if (rows == 1 && n % 2) t2 += w * met_at(at.x + LANES * n); \
            else \
                for (int r = 0; r < rows; r++) t[r] += w * met_at(at.x + r * at.stride + LANES * n); \
        }
        STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7)
#undef STEP
        if (rows == 1) t[0] += t2;
        for (int r = 0; r < rows; r++) total[r] += t[r] * s;
        if (grouped == GROUPS_OF_BLOCKS && --left == 0) {
            left = of_group;
            begins = 1;
        }
    }
    for (int r = 0; r < rows; r++) totals[r] = total[r];
}

/* The numbers of OF_BYTES codes; of fp8 256 times too small, and where one is no number `none` is none. */
static inline __attribute__((always_inline)) void four_at(int kind, const uint8_t *codes, Lanes *w, Lanes *none)
{
#if defined(WIDE)
    if (kind == FP8) {
        __m256i a = _mm256_loadu_si256((const void *)codes), b = _mm256_loadu_si256((const void *)(codes + 32));
        __m512i low = fp8_halves(a), high = fp8_halves(b);
        if (__builtin_expect(fp8_has_none(a) | fp8_has_none(b), 0)) *none = all(NAN);
        w[0] = (Lanes)_mm512_cvtph_ps(_mm512_castsi512_si256(low));
        w[1] = (Lanes)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(low, 1));
        w[2] = (Lanes)_mm512_cvtph_ps(_mm512_castsi512_si256(high));
        w[3] = (Lanes)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(high, 1));
        return;
    }
#elif defined(EIGHT)
    if (kind == FP8) {
        __m256i v = _mm256_loadu_si256((const void *)codes), most = _mm256_set1_epi8(0x7f);
        __m256i is_none = _mm256_cmpeq_epi8(_mm256_and_si256(v, most), most);
        if (__builtin_expect(!_mm256_testz_si256(is_none, is_none), 0)) *none = all(NAN);
        for (int k = 0; k < 2; k++) {
            __m256i half = _mm256_cvtepi8_epi16(k ? _mm256_extracti128_si256(v, 1) : _mm256_castsi256_si128(v));
            half = _mm256_and_si256(_mm256_slli_epi16(half, 7), _mm256_set1_epi16((short)0xbfff));
            w[2 * k] = (Lanes)_mm256_cvtph_ps(_mm256_castsi256_si128(half));
            w[2 * k + 1] = (Lanes)_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
        }
        return;
    }
#endif
    (void)none;
    for (int k = 0; k < 4; k++) {
        w[k] = numbers_at(kind, codes + k * LANES);
        if (kind == FP8) w[k] *= 1 / 256.0f;
    }
}

/* Groups of multiples of LANES columns, or one. Those of fp8 are 256 times too small. */
static inline __attribute__((always_inline)) void bytes_by(
    int rows, int grouped, int kind, const Matrix *m, Strip at, int64_t ahead, Lanes *totals, Lanes *none)
{
    const float of_kind = kind == FP8 ? 1 / 256.0f : 1;
    const int sums = rows == 1 ? 4 : rows; /* one row has four, none of which waits for the one before it */
    Lanes total[MOST_MET];
    for (int r = 0; r < sums; r++) total[r] = r < rows ? totals[r] : (Lanes){0};
    int64_t i = 0, group = m->G == 1 ? 0 : at.first / m->wide;
    if (grouped == GROUPS_IN_A_BLOCK && (m->wide == LANES || m->wide == 2 * LANES)) {
        int half = m->wide == 2 * LANES; /* two vectors have one scale, or each its own */
        for (; i + OF_BYTES <= at.columns; i += OF_BYTES, group += 4 >> half) {
            __builtin_prefetch(at.codes + i + ahead, 0, 3);
            for (int k = 0; k < 4; k++) {
                Lanes w = numbers_at(kind, at.codes + i + LANES * k);
                if (at.zero) w -= all(at.zero[group + (k >> half)]);
                if (kind == FP8) w *= of_kind;
                w *= all(at.scale[group + (k >> half)]);
                for (int r = 0; r < rows; r++)
                    total[rows == 1 ? k : r] += w * met_at(at.x + r * at.stride + i + LANES * k);
            }
        }
    }
    for (; i < at.columns; group++) {
        int64_t stop = m->G == 1 ? at.columns : (group + 1) * m->wide - at.first;
        if (stop > at.columns) stop = at.columns;
        Lanes s = all(at.scale[group]), z = all(at.zero ? at.zero[group] * of_kind : 0), t[MOST_MET];
        if (grouped == GROUPS_OF_BLOCKS)
            for (int r = 0; r < sums; r++) t[r] = (Lanes){0};
        while (i < stop) {
            Lanes w[4];
            if (i % 64 == 0) __builtin_prefetch(at.codes + i + ahead, 0, 3);
            if (stop - i >= OF_BYTES && grouped == GROUPS_OF_BLOCKS) {
                four_at(kind, at.codes + i, w, none);
                if (at.zero)
                    for (int k = 0; k < 4; k++) w[k] -= z;
                for (int k = 0; k < 4; k++)
                    for (int r = 0; r < rows; r++)
                        t[rows == 1 ? k : r] += w[k] * met_at(at.x + r * at.stride + i + LANES * k);
                i += OF_BYTES;
                continue;
            }
            int64_t parts = stop - i < LANES ? stop - i : LANES;
            w[0] = some_numbers_at(kind, at.codes + i, parts);
            if (kind == FP8) w[0] *= of_kind;
            if (at.zero) w[0] -= z;
            if (grouped == GROUPS_IN_A_BLOCK) w[0] *= s;
            for (int r = 0; r < rows; r++) { /* x has zeros after its end */
                Lanes *to = grouped == GROUPS_IN_A_BLOCK ? &total[r] : &t[r];
                *to += w[0] * met_at(at.x + r * at.stride + i);
            }
            i += parts;
        }
        if (grouped == GROUPS_OF_BLOCKS) {
            for (int r = 0; r < sums; r++) total[r] += t[r] * s;
        }
    }
    if (rows == 1) totals[0] = (total[0] + total[1]) + (total[2] + total[3]);
    else
        for (int r = 0; r < rows; r++) totals[r] = total[r];
}

/* One function for each kind, grouping and number of rows, for the compiler knows more of it then. */
typedef void (*Kernel)(const Matrix *, const Strip *, Bits, int64_t, Lanes *, Lanes *);
#define NIBBLES(name, kind, rows, grouped) \
    static __attribute__((noinline)) void name##_##rows##grouped( \
        const Matrix *m, const Strip *at, Bits index, int64_t ahead, Lanes *totals, Lanes *none) \
    { \
        (void)none; \
        nibbles_by(rows, grouped, kind, m, *at, index, ahead, totals); \
    }
#define BYTES(name, kind, rows, grouped) \
    static __attribute__((noinline)) void name##_##rows##grouped( \
        const Matrix *m, const Strip *at, Bits index, int64_t ahead, Lanes *totals, Lanes *none) \
    { \
        (void)index; \
        bytes_by(rows, grouped, kind, m, *at, ahead, totals, none); \
    }
#define BY(rows, grouped) \
    BYTES(int8, INT8, rows, grouped) \
    NIBBLES(int4, INT4, rows, grouped) \
    NIBBLES(nf4, NF4, rows, grouped) \
    BYTES(fp8, FP8, rows, grouped) \
    static Kernel kernel_##rows##grouped(int kind) \
    { \
        return kind == INT8   ? int8_##rows##grouped \
               : kind == INT4 ? int4_##rows##grouped \
               : kind == NF4  ? nf4_##rows##grouped \
                              : fp8_##rows##grouped; \
    }
#define BOTH(rows) BY(rows, GROUPS_OF_BLOCKS) BY(rows, GROUPS_IN_A_BLOCK)
BOTH(1) BOTH(2) BOTH(3) BOTH(4)
#ifdef WIDE
BOTH(6) BOTH(8)
#endif
#undef BOTH
#undef BY
#undef BYTES
#undef NIBBLES

static Kernel kernel_of(int kind, int rows, int grouped)
{
#define ROWS(n) \
    if (rows == n) return (grouped == GROUPS_OF_BLOCKS ? kernel_##n##GROUPS_OF_BLOCKS : kernel_##n##GROUPS_IN_A_BLOCK)(kind);
    ROWS(1) ROWS(2) ROWS(3) ROWS(4)
#ifdef WIDE
    ROWS(6) ROWS(8)
#endif
#undef ROWS
    return NULL;
}

static void rows_in_registers(const void *argument, int64_t part)
{
    const Job *job = argument;
    const Matrix *m = job->m;
    int64_t size = up_to(m->G + 16, 16);
    float *zero, *scale;
    if (!(scale = scratch_for_scales(job, TOGETHER, 0, &zero))) return;
    int is_bytes = m->kind == INT8 || m->kind == FP8, grouped = grouping(m, is_bytes ? OF_BYTES : OF_NIBBLES);
    if (is_bytes && grouped < 0) grouped = GROUPS_IN_A_BLOCK;
    Bits index = {0};
    if (grouped == GROUPS_IN_A_BLOCK && !is_bytes) index = lane_groups(m->wide, 8);
    int64_t end = (part + 1) * job->rows_of_part < m->O ? (part + 1) * job->rows_of_part : m->O;
    for (int64_t o = part * job->rows_of_part; o < end; o += TOGETHER) {
        int high = (int)(end - o < TOGETHER ? end - o : TOGETHER);
        for (int h = 0; h < high; h++) row_scales(m, o + h, scale + 2 * size * h, zero ? zero + 2 * size * h : NULL);
        for (int64_t r = 0; r < job->R;) {
            int64_t left = job->R - r;
            int rows = (int)(left >= MOST_MET ? MOST_MET : left == 7 ? 4 : left == 5 ? 3 : left);
            int64_t width = IN_CACHE / rows / 128 * 128;
            if (rows == 1 || width > m->I) width = job->stride;
            Kernel kernel = kernel_of(m->kind, rows, grouped);
            Lanes totals[TOGETHER][MOST_MET], none[TOGETHER];
            for (int h = 0; h < high; h++) {
                none[h] = (Lanes){0};
                for (int k = 0; k < rows; k++) totals[h][k] = (Lanes){0};
            }
            int64_t ahead = width < m->I ? TOGETHER * m->row_bytes : AHEAD;
            for (int64_t first = 0; first < m->I; first += width) {
                int64_t columns = m->I - first < width ? m->I - first : width;
                Strip at = {NULL, is_bytes ? columns : (columns + 1) / 2, first, columns,
                            job->x + r * job->stride + first, NULL, NULL, job->stride};
                for (int h = 0; h < high; h++) {
                    at.codes = m->codes + (o + h) * m->row_bytes + (is_bytes ? first : first / 2);
                    at.scale = scale + 2 * size * h;
                    at.zero = zero ? zero + 2 * size * h : NULL;
                    kernel(m, &at, index, ahead, totals[h], &none[h]);
                }
            }
            for (int h = 0; h < high; h++)
                for (int k = 0; k < rows; k++) {
                    float y = sum_of(totals[h][k]);
                    put(job, r + k, o + h, m->kind == FP8 ? y * 256 + none[h][0] : y);
                }
            r += rows;
        }
    }
}

/* ---- rows of w that meet the same numbers of x at once, so that each of these is read once for all of them ----

   Which ones is the processor's choice. Intel's read fastest from several places far from each other, in each of them on
   and on, and fetch ahead themselves; AMD's what lies beside each other, with the next rows fetched ahead by us. Where
   most time goes into sums, the second is as fast on both. */

/* So many rows of w; where they are far and meet one row of x; and where more of x than of w stay in few registers. */
enum { BESIDE = 4, STREAMS = 8, NARROW = 2 };
#ifndef IS_INTEL /* tests say it */
#if defined(__x86_64__) || defined(__i386__)
#define IS_INTEL __builtin_cpu_is("intel")
#else
#define IS_INTEL 0
#endif
#endif

/* Of a part: `beside` rows meet that are `between` apart, then the ones `apart` from these, up to `last`. */
typedef struct {
    int beside;
    int64_t between, apart, last;
} Order;

static Order order_of(int64_t first, int64_t end, int beside, int is_near)
{
    int64_t run = (end - first + beside - 1) / beside;
    return is_near ? (Order){beside, 1, beside, end} : (Order){beside, run, 1, first + run};
}

/* ---- the product with floats ---- */

enum { STRIP_OF_X = 384, UNDER_STRIPS = 32 }; /* more rows of x meet so many rows of w by strips of columns */
/* Where x and w are bfloat16 and the processor adds products of pairs, which are exact, to sums in float32; it takes
   numbers below the smallest normal one for 0. */
enum { PAIRS = FLOAT16 + 1 };
enum { MOST_BESIDE = 6 }; /* rows of x, at most, that meet rows of w; and so many by the registers */
static int most_beside(int type, int beside)
{
    int most = beside == NARROW ? MOST_BESIDE : MOST_ROWS;
    return type == BFLOAT16 && most > 4 ? 4 : most;
}

/* Columns of x as bfloat16 are met: of two vectors, evens and then odds. */
static void order_for_halves(float *x, int64_t stride)
{
    for (int64_t b = 0; b < stride; b += 2 * LANES) {
        float before[2 * LANES];
        memcpy(before, x + b, sizeof before);
        for (int k = 0; k < LANES; k++) x[b + k] = before[2 * k], x[b + LANES + k] = before[2 * k + 1];
    }
}

#ifdef __AVX512BF16__
static void as_halves(const float *x, int64_t n, uint16_t *to) /* of numbers that are bfloat16 */
{
    for (int64_t i = 0; i < n; i++) to[i] = (uint16_t)(bits_of(x[i]) >> 16);
}
#endif

/* totals[rows][beside] += of a vector of columns, or two of bfloat16, of rows of x, and of w at `codes`. */
static inline __attribute__((always_inline)) void floats_at(
    int rows, int beside, int type, const uint8_t *const *codes, const char *x, int64_t x_stride,
    Lanes total[MOST_BESIDE][STREAMS])
{
    Bits both[STREAMS];
    Lanes one[STREAMS], two[STREAMS];
    for (int h = 0; h < beside; h++) {
        if (type == FLOAT32) one[h] = lanes_at(codes[h]);
        else both[h] = bits_at(codes[h]);
        if (type != BFLOAT16) continue;
        one[h] = (Lanes)(both[h] << 16);
        two[h] = (Lanes)(both[h] & (int32_t)0xffff0000);
    }
    for (int k = 0; k < rows; k++) {
#ifdef __AVX512BF16__
        if (type == PAIRS) {
            __m512bh pairs = (__m512bh)_mm512_load_si512(x + k * x_stride * 2);
            for (int h = 0; h < beside; h++)
                total[k][h] = (Lanes)_mm512_dpbf16_ps((__m512)total[k][h], (__m512bh)both[h], pairs);
            continue;
        }
#endif
        const float *at = (const float *)(x + k * x_stride * 4);
        Lanes even = met_at(at), odd = type == FLOAT32 ? even : met_at(at + LANES);
        for (int h = 0; h < beside; h++) {
            total[k][h] += one[h] * even;
            if (type == BFLOAT16) total[k][h] += two[h] * odd;
        }
    }
}

/* totals[rows][beside] += of some columns of rows of x, and of w `between` apart from o on: those past `end` are the last
   again. */
static inline __attribute__((always_inline)) void floats_by(
    int rows, int beside, int type, const Matrix *m, const char *x, int64_t x_stride, int64_t o, int64_t between,
    int64_t end, int64_t first, int64_t columns, int ahead, Lanes *totals)
{
    const int64_t step = type == FLOAT32 ? LANES : 2 * LANES, size = type == FLOAT32 ? 4 : 2, of_x = type == PAIRS ? 2 : 4;
    const uint8_t *codes[STREAMS];
    Lanes total[MOST_BESIDE][STREAMS];
    for (int h = 0; h < beside; h++) {
        int64_t row = o + h * between;
        codes[h] = m->codes + (row < end ? row : end - 1) * m->row_bytes + first * size;
        for (int k = 0; k < rows; k++) total[k][h] = totals[k * beside + h];
    }
    /* the rows after these, in the order of memory where they are read whole */
    const char *next = (const char *)codes[0] + beside * m->row_bytes;
    const int is_whole = columns == m->I;
    const int64_t further = is_whole ? 64 : m->row_bytes, by = is_whole ? beside * size : size;
    int64_t i = 0;
    for (; i + step <= columns; i += step) {
        if (ahead && i * size % 64 == 0)
            for (int h = 0; h < beside; h++) __builtin_prefetch(next + i * by + h * further, 0, 2);
        floats_at(rows, beside, type, codes, x + i * of_x, x_stride, total);
        for (int h = 0; h < beside; h++) codes[h] += step * size;
    }
    if (i < columns) { /* x has zeros after the last column */
        uint8_t rest[STREAMS][4 * LANES] = {{0}};
        for (int h = 0; h < beside; h++) codes[h] = memcpy(rest[h], codes[h], (size_t)((columns - i) * size));
        floats_at(rows, beside, type, codes, x + i * of_x, x_stride, total);
    }
    for (int k = 0; k < rows; k++)
        for (int h = 0; h < beside; h++) totals[k * beside + h] = total[k][h];
}

/* Rows of x beside each other, a strip of columns after another, which stay in the first cache: `to` has as many. */
static void in_strips(const char *x, int64_t R, int64_t stride, int64_t size, char *to)
{
    for (int64_t first = 0; first < stride; first += STRIP_OF_X) {
        int64_t n = stride - first < STRIP_OF_X ? stride - first : STRIP_OF_X;
        for (int64_t r = 0; r < R; r++, to += n * size) memcpy(to, x + (r * stride + first) * size, (size_t)(n * size));
    }
}

static void rows_of_floats(const void *argument, int64_t part)
{
    const Job *job = argument;
    const Matrix *m = job->m;
    int type = job->x_words ? PAIRS : m->scale_type;
    int64_t end = (part + 1) * job->rows_of_part < m->O ? (part + 1) * job->rows_of_part : m->O, R = job->R;
    int is_near = !IS_INTEL || job->x_strips;
    int is_narrow = job->x_strips && R >= (type == FLOAT32 ? 6 : 8) && (int)MOST_ROWS < MOST_BESIDE;
    int beside = R == 1 && !is_near ? STREAMS : is_narrow ? NARROW : BESIDE;
    int most = most_beside(type, beside);
    int64_t width = job->x_strips ? STRIP_OF_X : m->I, most_groups = job->x_strips ? UNDER_STRIPS / beside : 1;
    Order order = order_of(part * job->rows_of_part, end, beside, is_near);
    int64_t of_x = type == PAIRS ? 2 : 4;
    Lanes *totals = scratch_of(1, (size_t)(R * most_groups * order.beside) * sizeof(Lanes));
    if (!totals) {
        atomic_store(job->failed, ERROR_MEMORY);
        return;
    }
    for (int64_t o = part * job->rows_of_part; o < order.last; o += most_groups * order.apart) {
        int64_t groups = (order.last - o + order.apart - 1) / order.apart;
        if (groups > most_groups) groups = most_groups;
        memset(totals, 0, (size_t)(R * groups * order.beside) * sizeof(Lanes));
        for (int64_t first = 0; first < m->I; first += width) {
            int64_t columns = m->I - first < width ? m->I - first : width, stride = job->stride;
            const char *x = type == PAIRS ? (const char *)job->x_words : (const char *)job->x;
            if (job->x_strips) {
                x = job->x_strips + first * R * of_x;
                stride = job->stride - first < width ? job->stride - first : width;
            }
            for (int64_t g = 0; g < groups; g++)
                for (int64_t r = 0, rows; r < R; r += rows) {
                    int64_t left = R - r, row = o + g * order.apart;
                    int ahead = r == 0 && is_near;
                    rows = left >= most ? most : left >= 4 ? 4 : left >= 2 ? 2 : 1;
                    const char *from = x + r * stride * of_x;
                    Lanes *to = totals + (g * R + r) * order.beside;
#define WITH(n, high, of) \
    if (rows == n && order.beside == high && type == of) \
        floats_by(n, high, of, m, from, stride, row, order.between, end, first, columns, ahead, to)
#define EACH(n, of) WITH(n, BESIDE, of)
                    WITH(1, STREAMS, FLOAT32); WITH(1, STREAMS, BFLOAT16);
                    EACH(1, FLOAT32); EACH(2, FLOAT32); EACH(1, BFLOAT16); EACH(2, BFLOAT16);
#ifdef MANY_REGISTERS
                    EACH(4, FLOAT32); EACH(6, FLOAT32); EACH(4, BFLOAT16);
#else
                    WITH(1, NARROW, FLOAT32); WITH(2, NARROW, FLOAT32); WITH(4, NARROW, FLOAT32); WITH(6, NARROW, FLOAT32);
                    WITH(1, NARROW, BFLOAT16); WITH(2, NARROW, BFLOAT16); WITH(4, NARROW, BFLOAT16);
#endif
#ifdef __AVX512BF16__
                    WITH(1, STREAMS, PAIRS); EACH(1, PAIRS); EACH(2, PAIRS); EACH(4, PAIRS); EACH(6, PAIRS);
#endif
#undef EACH
#undef WITH
                }
        }
        for (int64_t g = 0; g < groups; g++)
            for (int64_t h = 0, row; h < order.beside && (row = o + g * order.apart + h * order.between) < end; h++)
                for (int64_t r = 0; r < R; r++)
                    put(job, r, row, sum_of(totals[(g * R + r) * order.beside + h]));
    }
}

/* ---- the product by tiles ---- */

#ifdef TILES

enum { TALL = 2 * SIDE };       /* rows of w that meet as many of x */
enum { HELD = 128, MET = 512 }; /* rows of w that stay in the second cache, and of x that they meet */
enum { STEPS_BY_AMX = 64, STEPS_BY_VECTORS = 16 }; /* tiles of a strip: by vectors two panels of x stay in the first */
enum { FEW_MET = 256 };         /* so many do not pay for moving w into the order of tiles */

typedef struct {
    const Matrix *m;
    const void *x;
    char *tiles; /* of x, a strip after another: [rows / 16, its tiles across] */
    void *y;
    int x_type, y_type;
    Way way;
    int64_t R, rows_of_part, panels, across, width; /* tiles across of all, and of a strip */
    atomic_int *failed, *more;
} Tiled;

/* Where a strip of a panel of x begins, and how many tiles it has. */
static char *strip_of(const Tiled *job, int64_t panel, int64_t first, int64_t *steps)
{
    *steps = job->across - first < job->width ? job->across - first : job->width;
    return job->tiles + (first * job->panels + panel * *steps) * TILE;
}

/* Sixteen rows of x as a panel; `more` is set where a number of a pair is no bfloat16. */
static void turn_rows(const void *argument, int64_t part)
{
    const Tiled *job = argument;
    int64_t I = job->m->I, first = part * SIDE, size = job->x_type == FLOAT32 ? 4 : 2, columns = columns_of(job->way);
    int narrows = size == 4 && job->way != BY_VECTORS, widens = size == 2 && job->way == BY_VECTORS;
    __m512i more = _mm512_setzero_si512(), rows[SIDE];
    for (int64_t i = 0; i < I; i += columns) {
        for (int k = 0; k < SIDE; k++) {
            const char *from = (const char *)job->x + ((first + k) * I + i) * size;
            if (first + k >= job->R) rows[k] = _mm512_setzero_si512();
            else if (narrows) rows[k] = halves_of((const float *)from, &more);
            else if (widens) rows[k] = words_of(from);
            else rows[k] = _mm512_loadu_si512(from);
        }
        transpose(rows);
        int64_t across = i / columns, strip = across / job->width * job->width, steps;
        char *tile = strip_of(job, part, strip, &steps) + (across - strip) * TILE;
        for (int k = 0; k < SIDE; k++) _mm512_store_si512(tile + 64 * k, rows[k]);
    }
    if (_mm512_test_epi32_mask(more, _mm512_set1_epi32(0xffff))) atomic_store(job->more, 1);
}

/* c[32 of w, 32 of x] as rows of y. */
static void put_tiles(const Tiled *job, const float *c, int64_t r, int64_t o)
{
    for (int64_t t = 0; t < TALL * TALL; t += SIDE * SIDE) {
        int64_t of_w = t / SIDE / TALL * SIDE, of_x = t / SIDE % TALL;
        __m512i rows[SIDE];
        for (int k = 0; k < SIDE; k++) rows[k] = _mm512_loadu_si512(c + (of_w + k) * TALL + of_x);
        transpose(rows);
        for (int64_t k = 0; k < SIDE && r + of_x + k < job->R; k++) {
            int64_t at = (r + of_x + k) * job->m->O + o + of_w;
            if (job->y_type == FLOAT32) _mm512_storeu_si512((float *)job->y + at, rows[k]);
            else {
                __m512i rounded = _mm512_srli_epi32(halves_rounded(_mm512_castsi512_ps(rows[k])), 16);
                _mm256_storeu_si256((void *)((uint16_t *)job->y + at), _mm512_cvtepi32_epi16(rounded));
            }
        }
    }
}

/* A block of w as its tiles are read. */
typedef struct {
    const char *rows;
    int64_t stride, below, step; /* bytes: to the next row, to the rows below these, to the next tile */
} Held;

/* The block in the order of tiles: where a line of a row goes. */
static Held ordered(const char *to, Way way, int64_t steps)
{
    int64_t rows = rows_of(way);
    return (Held){to, 64, steps * rows * 64, rows * 64};
}

/* The block as it lies in memory, or moved to `to`, a tile after another. */
static Held held_floats(
    const Matrix *m, Way way, int64_t o, int64_t rows, int64_t first, int64_t steps, int moves, char *to)
{
    const char *from = (const char *)m->codes + o * m->row_bytes + first * 64;
    int64_t of_tile = rows_of(way);
    if (!moves) return (Held){from, m->row_bytes, of_tile * m->row_bytes, 64};
    Held held = ordered(to, way, steps);
    for (int64_t k = 0; k < rows; k++)
        for (int64_t n = 0; n < steps; n++) {
            __m512i line = _mm512_loadu_si512(from + k * m->row_bytes + n * 64);
            _mm512_store_si512(to + k / of_tile * held.below + n * held.step + k % of_tile * 64, line);
        }
    return held;
}

/* The block of a packed matrix, as floats or rounded to bfloat16. */
static Held held_codes(const Job *like, Way way, int64_t o, int64_t rows, int64_t first, int64_t steps, char *to)
{
    const Matrix *m = like->m;
    int64_t columns = columns_of(way), all = steps * columns, of_tile = rows_of(way);
    Held held = ordered(to, way, steps);
    float *zero, *scale;
    if (!(scale = scratch_for_scales(like, 1, STRIP * 4, &zero))) return (Held){0};
    float *w = scale + 2 * up_to(m->G + 16, 16);
    for (int64_t k = 0; k < rows; k++) {
        char *tile = to + k / of_tile * held.below + k % of_tile * 64;
        row_scales(m, o + k, scale, zero);
        for (int64_t i = 0; i < all; i += STRIP) {
            int64_t n = all - i < STRIP ? all - i : STRIP;
            decode(m, o + k, first * columns + i, n, scale, zero, w);
            for (int64_t c = 0; c < n; c += columns, tile += held.step)
                _mm512_store_si512(tile, way == BY_VECTORS ? _mm512_loadu_si512(w + c) : bfloat16_of(w + c));
        }
    }
    return held;
}

static void rows_by_tiles(const void *argument, int64_t part)
{
    const Tiled *job = argument;
    const Matrix *m = job->m;
    int is_floats = m->kind == FLOATS;
    int64_t all = job->across, width = job->width, end = (part + 1) * job->rows_of_part;
    size_t sums = (size_t)MET * HELD * 4;
    char *memory = scratch_of(2, sums + (size_t)(HELD * width) * 64);
    if (!memory) {
        atomic_store(job->failed, ERROR_MEMORY);
        return;
    }
    Job like = {.m = m, .failed = job->failed};
    Tiling before;
    use_tiles(job->way, &before);
    if (end > m->O) end = m->O;
    for (int64_t r = 0; r < job->R; r += MET)
        for (int64_t o = part * job->rows_of_part; o < end; o += HELD) {
            int64_t met = job->R - r < MET ? job->R - r : MET, rows = end - o < HELD ? end - o : HELD;
            int64_t calls = up_to(met, TALL) / TALL * (rows / TALL), call = 0;
            for (int64_t i = 0; i < all; i += width, call = 0) {
                int64_t steps;
                const char *of_x = strip_of(job, r / SIDE, i, &steps);
                int is_last = i + width >= all;
                Held w = is_floats ? held_floats(m, job->way, o, rows, i, steps, met > FEW_MET, memory + sums)
                                   : held_codes(&like, job->way, o, rows, i, steps, memory + sums);
                if (!w.rows) goto done;
                const char *after = (const char *)m->codes + (is_last ? o + rows : o) * m->row_bytes;
                if (!is_last) after += (i + width) * 64;
                for (int64_t x = 0; x < met; x += TALL)
                    for (int64_t k = 0; k < rows; k += TALL, call++) {
                        Block block = {
                            .a = w.rows + k / rows_of(job->way) * w.below, .stride = w.stride, .below = w.below,
                            .step = w.step,
                            .b = of_x + x / SIDE * steps * TILE, .panel = steps * TILE, .steps = steps,
                            .c = (float *)memory + (width == all ? 0 : x * HELD + k * TALL), .c_stride = TALL * 4,
                            .panels = met - x > SIDE ? 2 : 1, .adds = i > 0};
                        if (is_floats && met > TALL) { /* of the block after this one, the part of this call */
                            int64_t begin = call * rows / calls, stop = (call + 1) * rows / calls;
                            block.next = (Ahead){after + begin * m->row_bytes, m->row_bytes, stop - begin};
                        }
                        if (met > FEW_MET) { /* and of the rows of x after these */
                            int64_t lines = TALL * TALL / rows, part = steps * 64;
                            block.soon = (Ahead){block.b + 2 * steps * TILE + k / TALL * lines * part, part, lines};
                        }
                        multiply_tiles(job->way, &block);
                        if (is_last) put_tiles(job, block.c, r + x, o + k);
                    }
            }
        }
done:
    leave_tiles(job->way, &before);
}

/* Rows of x from which on tiles are faster. */
static int64_t least_rows(const Matrix *m, Way way)
{
    return m->kind == FLOATS && way == BY_AMX ? 2 : 17;
}

/* Whether y was computed by tiles: of a matrix of whole ones, and of floats, or of rows that are bfloat16. Few rows meet
   packed codes as they are, above. */
static int is_done_by_tiles(
    const Matrix *m, const void *x, int x_type, void *y, int y_type, int64_t R, int threads, atomic_int *failed)
{
    int type = m->kind == FLOATS ? m->scale_type : x_type;
    Way way = way_of(type == BFLOAT16);
    if (way == NO_WAY || R < least_rows(m, way) || m->I % columns_of(way) || m->O % TALL) return 0;
    int64_t panels = up_to(R, TALL) / SIDE, across = m->I / columns_of(way), width = across;
    if (way == BY_VECTORS && across > STEPS_BY_VECTORS) width = STEPS_BY_VECTORS;
    if (way == BY_AMX && across > STEPS_BY_AMX && R > TALL) width = STEPS_BY_AMX;
    char *tiles = scratch_of(0, (size_t)(panels * across * TILE));
    if (!tiles) return 0;
    int64_t size = up_to(m->O / 32 > TALL ? m->O / 32 : TALL, R > TALL ? HELD : TALL);
    atomic_int more = 0;
    Tiled job = {m, x, tiles, y, x_type, y_type, way, R, size, panels, across, width, failed, &more};
    run_parts(turn_rows, &job, panels, threads);
    if (atomic_load(&more)) return 0;
    run_parts(rows_by_tiles, &job, (m->O + size - 1) / size, threads);
    return 1;
}

#endif

/* ---- activations rounded to int8, in blocks of 128 columns ---- */

enum { ROUNDED = 128 };

/* x becomes codes * scale: scale = max|x| / 127, halves to even; a block that is 0, or nearly, has scale 0. Codes [I]
   stand with zeros up to whole blocks. A block that holds what is no finite number has a scale that is none. */
static void round_row(float *x, int64_t I, int8_t *codes, float *scales)
{
    for (int64_t first = 0; first < I; first += ROUNDED) {
        int64_t n = I - first < ROUNDED ? I - first : ROUNDED;
        float *from = x + first;
        int8_t *to = codes + first;
        uint32_t most = 0;
        for (int64_t i = 0; i < n; i++) {
            uint32_t size = bits_of(from[i]) & 0x7fffffff;
            most = size > most ? size : most;
        }
        float scale = of_bits(most) / 127.0f;
        memset(to, 0, ROUNDED);
        if (most >= 0x7f800000) scale = NAN;
        else if (scale < FLT_MIN) scale = 0;
        else
            for (int64_t i = 0; i < n; i++) to[i] = (int8_t)(int)rintf(from[i] / scale);
        for (int64_t i = 0; i < n; i++) from[i] = (float)to[i] * scale;
        scales[first / ROUNDED] = scale;
    }
}

#if defined(WIDE) && defined(__AVX512VNNI__)
#define VNNI 1

/* ---- the product by sums of bytes: x is some digits of eight bits to one scale in each block of 128 columns ----

   One digit is x rounded to int8. Three or four are x as it is: with max|x| below 2^(e+1), the whole number nearest to
   x * 2^(21-e), of numbers that are all bfloat16, or else x * 2^(29-e), is d0 + 256 d1 + 256^2 d2 (+ 256^3 d3), each d
   from -128 to 127. So a bfloat16 is exact down to 2^-14 of the largest in its block and a float32 down to 2^-6; of
   smaller ones at most 2^-22, or 2^-30, of the largest is lost, as by a sum in float32 that the largest is part of.
   Sums of digits times codes are exact. */

enum { NO_DIGITS, MOST_DIGITS = 4 }; /* none: x is bfloat16 as it is */

/* Digits [blocks, digits, 128] and scales [blocks] of a row; 0 where a number is not finite: it has no digits. */
static int digits_of_row(const float *x, int64_t I, int digits, int8_t *codes, float *scales)
{
    for (int64_t first = 0; first < I; first += ROUNDED, codes += digits * ROUNDED) {
        const __m512i sign = _mm512_set1_epi32(0x7fffffff);
        __m512i most = _mm512_setzero_si512();
        for (int i = 0; i < ROUNDED; i += 16)
            most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_loadu_si512(x + first + i), sign));
        int exponent = (int)(_mm512_reduce_max_epu32(most) >> 23) - 127, bits = digits == 3 ? 21 : 29;
        if (exponent == 128) return 0;
        if (exponent < -90) exponent = -90; /* so that both scales are normal numbers */
        __m512 scale = _mm512_set1_ps(of_bits((uint32_t)(bits - exponent + 127) << 23));
        scales[first / ROUNDED] = of_bits((uint32_t)(exponent - bits + 127) << 23);
        for (int i = 0; i < ROUNDED; i += 16) {
            __m512i left = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + first + i), scale));
            for (int k = 0; k < digits; k++) {
                _mm_storeu_si128((void *)(codes + k * ROUNDED + i), _mm512_cvtepi32_epi8(left));
                __m512i digit = _mm512_srai_epi32(_mm512_slli_epi32(left, 24), 24);
                left = _mm512_srai_epi32(_mm512_sub_epi32(left, digit), 8);
            }
        }
    }
    return 1;
}

static int are_bfloat16(const float *x, int64_t count) /* whether no number needs more, count being a multiple of 16 */
{
    __m512i any = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += 16) any = _mm512_or_si512(any, _mm512_loadu_si512(x + i));
    return _mm512_test_epi32_mask(any, _mm512_set1_epi32(0xffff)) == 0;
}

/* Whether rows of digits are multiplied by all of a block at once: not where a block of bytes has several scales. */
static inline int is_of_halves(int kind, int grouped) { return kind == INT8 && grouped == GROUPS_IN_A_BLOCK; }

/* Digits as the kernel meets them: of 128, for nibbles evens and then odds. The totals [.., lanes] of each digit are
   of the columns that a lane meets, in a block or in half of one, times `factor`. */
static void order_for_lanes(
    int kind, int of_halves, int factor, int digits, int8_t *codes, int64_t stride, int32_t *totals)
{
    const __m512i ones = _mm512_set1_epi8(1), by = _mm512_set1_epi32(factor), none = _mm512_setzero_si512();
    for (int64_t b = 0; b < stride / ROUNDED; b++)
        for (int k = 0; k < digits; k++, codes += ROUNDED) {
            __m512i one = _mm512_loadu_si512(codes), two = _mm512_loadu_si512(codes + 64);
            if (kind == INT4) {
                __m512i odd_one = _mm512_srli_epi16(one, 8), odd_two = _mm512_srli_epi16(two, 8);
                _mm256_storeu_si256((void *)codes, _mm512_cvtepi16_epi8(one));
                _mm256_storeu_si256((void *)(codes + 32), _mm512_cvtepi16_epi8(two));
                _mm256_storeu_si256((void *)(codes + 64), _mm512_cvtepi16_epi8(odd_one));
                _mm256_storeu_si256((void *)(codes + 96), _mm512_cvtepi16_epi8(odd_two));
                one = _mm512_loadu_si512(codes), two = _mm512_loadu_si512(codes + 64);
            }
            __m512i of_one = _mm512_dpbusd_epi32(none, ones, one), of_two = _mm512_dpbusd_epi32(none, ones, two);
            int32_t *to = totals + (of_halves ? 2 * b * digits + k : b * digits + k) * 16;
            if (!of_halves) of_one = _mm512_add_epi32(of_one, of_two);
            _mm512_storeu_si512(to, _mm512_mullo_epi32(of_one, by));
            if (of_halves) _mm512_storeu_si512(to + digits * 16, _mm512_mullo_epi32(of_two, by));
        }
}

static inline __mmask64 of_bytes(int64_t count) /* the first so many, of 64 */
{
    return count >= 64 ? ~(__mmask64)0 : count <= 0 ? 0 : ((__mmask64)1 << count) - 1;
}

/* y[rows][BESIDE] of some rows of x from r on, and of w `between` apart from o on: those past `end` are the last again.
   `scale` and `zero` are of the first of them, the next ones' `scales` numbers further. */
static inline __attribute__((always_inline)) void dots_by(
    const Job *job, int kind, int digits, int rows, int grouped, int64_t r, int64_t o, int64_t between, int64_t end,
    const float *scale, const float *zero, int64_t scales, __m512i index, float *y)
{
    const Matrix *m = job->m;
    const int halves = is_of_halves(kind, grouped), bias = kind == INT4 ? 8 : 128;
    const int in_one = digits == 3 && kind == INT4 && !zero; /* whether all digits' sums fit into one number */
    const int64_t columns = halves ? 64 : ROUNDED, bytes = kind == INT8 && !halves ? 128 : 64;
    int64_t chunks = up_to(m->I, columns) / columns, blocks = job->stride / ROUNDED, of_row = job->stride * digits;
    int64_t totals_of_row = of_row / (columns / 16);
    const int64_t of_block = columns / m->wide;
    int64_t of_group = m->G == 1 ? INT64_MAX : m->wide / columns, left = of_group;
    const __m512i nibble = _mm512_set1_epi8(15), sign = _mm512_set1_epi8((char)0x80);
    const uint8_t *codes[BESIDE];
    __m512 total[4][BESIDE];
    for (int h = 0; h < BESIDE; h++) {
        int64_t row = o + h * between;
        codes[h] = m->codes + (row < end ? row : end - 1) * m->row_bytes;
        for (int k = 0; k < rows; k++) total[k][h] = _mm512_setzero_ps();
    }
    for (int64_t c = 0; c < chunks; c++) {
        __m512i one[BESIDE], two[BESIDE], z[BESIDE];
        __m512 s[BESIDE];
        int64_t at = c * bytes;
        __mmask64 here = of_bytes(m->row_bytes - at), after = of_bytes(m->row_bytes - at - 64);
        /* the rows after the next, in the order of memory and into the second cache: the first has no room for them */
        const char *next = (const char *)codes[0] + 2 * BESIDE * m->row_bytes + at * BESIDE;
        for (int h = 0; h < BESIDE; h++) {
            if (between == 1) {
                _mm_prefetch(next + h * bytes, _MM_HINT_T1);
                if (bytes == 128) _mm_prefetch(next + h * bytes + 64, _MM_HINT_T1);
            }
            one[h] = _mm512_maskz_loadu_epi8(here, codes[h] + at);
            if (kind == INT4) {
                two[h] = _mm512_and_si512(_mm512_srli_epi16(one[h], 4), nibble);
                one[h] = _mm512_and_si512(one[h], nibble);
            } else { /* where x ends its digits are 0 */
                one[h] = _mm512_xor_si512(one[h], sign);
                if (!halves) two[h] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(after, codes[h] + at + 64), sign);
            }
            if (grouped == GROUPS_IN_A_BLOCK)
                s[h] = _mm512_permutexvar_ps(index, _mm512_loadu_ps(scale + h * scales));
            if (zero) {
                __m512 of_lane = grouped == GROUPS_IN_A_BLOCK
                                     ? _mm512_permutexvar_ps(index, _mm512_loadu_ps(zero + h * scales))
                                     : _mm512_set1_ps(zero[h * scales]);
                z[h] = _mm512_add_epi32(_mm512_cvtps_epi32(of_lane), _mm512_set1_epi32(bias));
            }
        }
        int64_t block = c * columns / ROUNDED, first = block * digits * ROUNDED + c * columns % ROUNDED;
        for (int k = 0; k < rows; k++) {
            const int8_t *x = job->x_codes + (r + k) * of_row + first;
            const int32_t *totals = job->x_totals + (r + k) * totals_of_row + c * digits * 16;
            float x_scale = job->x_scales[(r + k) * blocks + block];
            __m512i sum[MOST_DIGITS][BESIDE]; /* whole numbers, exact */
            for (int d = 0; d < digits; d++) {
                __m512i of_x = _mm512_load_si512(totals + d * 16), low = _mm512_load_si512(x + d * ROUNDED), high = low;
                if (!halves) high = _mm512_load_si512(x + d * ROUNDED + 64);
                for (int h = 0; h < BESIDE; h++) {
                    sum[d][h] = zero ? _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_mullo_epi32(z[h], of_x)) : of_x;
                    sum[d][h] = _mm512_dpbusd_epi32(sum[d][h], one[h], low);
                    if (!halves) sum[d][h] = _mm512_dpbusd_epi32(sum[d][h], two[h], high);
                }
            }
            for (int h = 0; h < BESIDE; h++) {
                __m512i low = sum[0][h];
                if (digits > 1) low = _mm512_add_epi32(low, _mm512_slli_epi32(sum[1][h], 8));
                if (in_one) low = _mm512_add_epi32(low, _mm512_slli_epi32(sum[2][h], 16));
                __m512 dot = _mm512_cvtepi32_ps(low);
                if (digits > 2 && !in_one) {
                    __m512i high = sum[2][h];
                    if (digits == 4) high = _mm512_add_epi32(high, _mm512_slli_epi32(sum[3][h], 8));
                    dot = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(65536), dot);
                }
                __m512 both = grouped == GROUPS_IN_A_BLOCK ? _mm512_mul_ps(s[h], _mm512_set1_ps(x_scale))
                                                           : _mm512_set1_ps(scale[h * scales] * x_scale);
                total[k][h] = _mm512_fmadd_ps(dot, both, total[k][h]);
            }
        }
        int64_t done = grouped == GROUPS_IN_A_BLOCK ? of_block : --left == 0; /* scales */
        if (grouped == GROUPS_OF_BLOCKS && done) left = of_group;
        scale += done;
        if (zero) zero += done;
    }
    for (int k = 0; k < rows; k++)
        for (int h = 0; h < BESIDE; h++) y[k * BESIDE + h] = _mm512_reduce_add_ps(total[k][h]);
}

typedef void (*Dots)(
    const Job *, int64_t r, int64_t o, int64_t between, int64_t end, const float *scale, const float *zero,
    int64_t scales, __m512i index, float *y);

/* One function for each kind, number of digits and rows, and grouping, for the compiler knows more of it then. */
#define DOTS(kind, digits, rows, grouped) \
    static __attribute__((noinline)) void dots_##kind##digits##rows##grouped( \
        const Job *job, int64_t r, int64_t o, int64_t between, int64_t end, const float *scale, const float *zero, \
        int64_t scales, __m512i index, float *y) \
    { \
        if (zero) dots_by(job, kind, digits, rows, grouped, r, o, between, end, scale, zero, scales, index, y); \
        else dots_by(job, kind, digits, rows, grouped, r, o, between, end, scale, NULL, scales, index, y); \
    }
#define GROUPINGS(kind, digits, rows) \
    DOTS(kind, digits, rows, GROUPS_OF_BLOCKS) DOTS(kind, digits, rows, GROUPS_IN_A_BLOCK)
#define ROWS(kind, digits) GROUPINGS(kind, digits, 1) GROUPINGS(kind, digits, 2) GROUPINGS(kind, digits, 4)
#define KINDS(digits) ROWS(INT8, digits) ROWS(INT4, digits)
KINDS(1) KINDS(3) KINDS(4)
#undef KINDS
#undef ROWS
#undef GROUPINGS
#undef DOTS

#ifdef __AVX512BF16__
#define HALVES 1

/* ---- the product of codes of four bits with numbers that are all bfloat16 ----

   The processor adds products of pairs of bfloat16, which are exact, to sums in float32; it takes numbers below the
   smallest normal one for 0. The codes' values are bfloat16 too, so w is met as it is, before its scale. */

enum { NEAR_BYTES = 20480 }; /* of x and of rows of w, these and the next: so many stay in the first cache */

/* Columns of x as words of codes meet them: of 128, [s][k] is column 4k + s, as bfloat16. */
static void order_for_words(const float *x, int64_t stride, uint16_t *to)
{
    for (int64_t b = 0; b < stride; b += 128)
        for (int s = 0; s < 4; s++)
            for (int k = 0; k < 32; k++) to[b + s * 32 + k] = (uint16_t)(bits_of(x[b + 4 * k + s]) >> 16);
}

/* The values of a code as bfloat16: twice, as the fifth bit of an index is another code's. */
static const uint16_t INT4_WORDS[32] = {
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
    0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
    0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};

/* y[rows][BESIDE] as of `dots_by`, of codes without zero points. */
static inline __attribute__((always_inline)) void words_by(
    const Job *job, int rows, int grouped, int64_t r, int64_t o, int64_t end, const float *scale, int64_t scales,
    __m512i index, float *y)
{
    const Matrix *m = job->m;
    const __m512i table = _mm512_loadu_si512(INT4_WORDS);
    const int near = 2 * rows * job->stride + 2 * BESIDE * m->row_bytes <= NEAR_BYTES;
    const int64_t of_block = ROUNDED / m->wide;
    int64_t chunks = job->stride / ROUNDED, of_group = m->G == 1 ? INT64_MAX : m->wide / ROUNDED, left = of_group;
    const uint8_t *codes[BESIDE];
    __m512 total[4][BESIDE];
    for (int h = 0; h < BESIDE; h++) {
        codes[h] = m->codes + (o + h < end ? o + h : end - 1) * m->row_bytes;
        for (int k = 0; k < rows; k++) total[k][h] = _mm512_setzero_ps();
    }
    for (int64_t c = 0; c < chunks; c++) {
        int64_t at = c * 64;
        __mmask64 here = of_bytes(m->row_bytes - at);
        const char *next = (const char *)codes[0] + BESIDE * m->row_bytes + at * BESIDE;
        const uint16_t *x = job->x_words + r * job->stride + c * ROUNDED;
        for (int h = 0; h < BESIDE; h++) {
            if (near) _mm_prefetch(next + h * 64, _MM_HINT_T0);
            else _mm_prefetch(next + h * 64, _MM_HINT_T1);
            __m512i all = _mm512_maskz_loadu_epi8(here, codes[h] + at);
            __m512bh w[4];
            for (int s = 0; s < 4; s++)
                w[s] = (__m512bh)_mm512_permutexvar_epi16(s ? _mm512_srli_epi16(all, 4 * s) : all, table);
            __m512 by = grouped == GROUPS_IN_A_BLOCK ? _mm512_permutexvar_ps(index, _mm512_loadu_ps(scale + h * scales))
                                                     : _mm512_set1_ps(scale[h * scales]);
            for (int k = 0; k < rows; k++) {
                __m512 dot = _mm512_setzero_ps();
                for (int s = 0; s < 4; s++)
                    dot = _mm512_dpbf16_ps(dot, w[s], (__m512bh)_mm512_load_si512(x + k * job->stride + 32 * s));
                total[k][h] = _mm512_fmadd_ps(dot, by, total[k][h]);
            }
        }
        int64_t done = grouped == GROUPS_IN_A_BLOCK ? of_block : --left == 0; /* scales */
        if (grouped == GROUPS_OF_BLOCKS && done) left = of_group;
        scale += done;
    }
    for (int k = 0; k < rows; k++)
        for (int h = 0; h < BESIDE; h++) y[k * BESIDE + h] = _mm512_reduce_add_ps(total[k][h]);
}

#define WORDS(rows, grouped) \
    static __attribute__((noinline)) void words_##rows##grouped( \
        const Job *job, int64_t r, int64_t o, int64_t between, int64_t end, const float *scale, const float *zero, \
        int64_t scales, __m512i index, float *y) \
    { \
        (void)zero, (void)between; /* which is 1 */ \
        words_by(job, rows, grouped, r, o, end, scale, scales, index, y); \
    }
#define BOTH(rows) WORDS(rows, GROUPS_OF_BLOCKS) WORDS(rows, GROUPS_IN_A_BLOCK)
BOTH(1) BOTH(2) BOTH(4)
#undef BOTH
#undef WORDS
#endif

static Dots dots_of(int kind, int digits, int rows, int grouped)
{
#ifdef HALVES
#define FOUND(n) \
    if (digits == NO_DIGITS && rows == n) \
        return grouped == GROUPS_OF_BLOCKS ? words_##n##GROUPS_OF_BLOCKS : words_##n##GROUPS_IN_A_BLOCK;
    FOUND(1) FOUND(2) FOUND(4)
#undef FOUND
#endif
#define FOUND(k, d, n) \
    if (kind == k && digits == d && rows == n) \
        return grouped == GROUPS_OF_BLOCKS ? dots_##k##d##n##GROUPS_OF_BLOCKS : dots_##k##d##n##GROUPS_IN_A_BLOCK;
#define ROWS(k, d) FOUND(k, d, 1) FOUND(k, d, 2) FOUND(k, d, 4)
#define KINDS(d) ROWS(INT8, d) ROWS(INT4, d)
    KINDS(1) KINDS(3) KINDS(4)
#undef KINDS
#undef ROWS
#undef FOUND
    return NULL;
}

static void rows_by_digits(const void *argument, int64_t part)
{
    const Job *job = argument;
    const Matrix *m = job->m;
    int64_t size = up_to(m->G + 16, 16);
    float *zero, *scale, y[4 * BESIDE];
    if (!(scale = scratch_for_scales(job, BESIDE, 0, &zero))) return;
    int grouped = grouping(m, ROUNDED);
    __m512i index = _mm512_setzero_si512();
    if (grouped == GROUPS_IN_A_BLOCK) index = (__m512i)lane_groups(m->wide, m->kind == INT4 ? 8 : 4);
    int64_t end = (part + 1) * job->rows_of_part < m->O ? (part + 1) * job->rows_of_part : m->O;
    int is_near = !IS_INTEL || job->digits == NO_DIGITS || job->R * job->digits > MOST_DIGITS;
    Order order = order_of(part * job->rows_of_part, end, BESIDE, is_near);
    for (int64_t o = part * job->rows_of_part; o < order.last; o += order.apart) {
        int high = (int)((end - o + order.between - 1) / order.between);
        if (high > BESIDE) high = BESIDE;
        for (int h = 0; h < high; h++)
            row_scales(m, o + h * order.between, scale + 2 * size * h, zero ? zero + 2 * size * h : NULL);
        for (int64_t r = 0; r < job->R;) {
            int64_t left = job->R - r;
            int rows = left >= 4 ? 4 : left >= 2 ? 2 : 1;
            Dots dots = dots_of(m->kind, job->digits, rows, grouped);
            dots(job, r, o, order.between, end, scale, zero, 2 * size, index, y);
            for (int k = 0; k < rows; k++)
                for (int h = 0; h < high; h++) put(job, r + k, o + h * order.between, y[k * BESIDE + h]);
            r += rows;
        }
    }
}

/* Digits of all rows where there is a kernel for them; 0 where the floats are to be taken. */
static int prepare_digits(Job *job, int rounded, int8_t *codes, int32_t *totals, float *scales)
{
    const Matrix *m = job->m;
    if ((m->kind != INT8 && m->kind != INT4) || grouping(m, ROUNDED) < 0) return 0;
    job->digits = rounded ? 1 : are_bfloat16(job->x, job->R * job->stride) ? 3 : 4;
    int64_t blocks = job->stride / ROUNDED, digits = job->digits, of_row = job->stride * digits;
    int grouped = grouping(m, ROUNDED), halves = is_of_halves(m->kind, grouped);
    int64_t totals_of_row = of_row / (halves ? 4 : 8);
    int factor = m->zero ? 1 : m->kind == INT4 ? -8 : -128;
    for (int64_t r = 0; r < job->R; r++) {
        int8_t *of_r = codes + r * of_row;
        if (!rounded && !digits_of_row(job->x + r * job->stride, m->I, (int)digits, of_r, scales + r * blocks)) return 0;
        order_for_lanes(m->kind, halves, factor, (int)digits, of_r, job->stride, totals + r * totals_of_row);
    }
    return 1;
}

#endif

/* ---- what is called ---- */

static int described(
    Matrix *m, int kind, const void *codes, const void *scale, int scale_type, const int8_t *zero, int64_t O, int64_t I,
    int64_t high, int64_t wide)
{
    if (kind < INT8 || kind > FLOATS || scale_type < FLOAT32 || scale_type > FLOAT16) return ERROR_ARGUMENT;
    if (O < 0 || I < 0 || high < 1 || wide < 1) return ERROR_ARGUMENT;
    if (kind == FLOATS && scale_type == FLOAT16) return ERROR_ARGUMENT; /* no model here keeps these */
    *m = (Matrix){kind, scale_type, codes, scale, zero, O, I, high, wide, (I + wide - 1) / wide, 0};
    m->row_bytes = kind == INT8 || kind == FP8 ? I : (I + 1) / 2;
    if (kind == FLOATS) m->row_bytes = I * (scale_type == FLOAT32 ? 4 : 2);
    return 0;
}

/* Rows of w in a part: some parts for each thread, none smaller than is worth the way to it. */
static int64_t part_size(const Matrix *m, int64_t R, int64_t *parts)
{
    int64_t least = 65536 / ((m->I ? m->I : 1) * R) + 1, size = m->O / 32 > least ? m->O / 32 : least;
    size = up_to(size, 16);
    *parts = (m->O + size - 1) / size;
    return size;
}

/* y[R,O] = x[R,I] w^T. `rounded` is 0, or 1 where x is rounded to int8 in blocks of 128 columns (int8 and int4 only).
   Types of x and y: float32 or bfloat16; of scales also float16. `threads` below 1: as many as there are processors. */
int mistral_product(
    int kind, const void *codes, const void *scale, int scale_type, const int8_t *zero, int64_t O, int64_t I,
    int64_t high, int64_t wide, const void *x, int x_type, void *y, int y_type, int64_t R, int rounded, int threads)
{
    Matrix m;
    if (described(&m, kind, codes, scale, scale_type, zero, O, I, high, wide)) return ERROR_ARGUMENT;
    if (R < 0 || x_type < FLOAT32 || x_type > BFLOAT16 || y_type < FLOAT32 || y_type > BFLOAT16) return ERROR_ARGUMENT;
    if (rounded && kind != INT8 && kind != INT4) return ERROR_ARGUMENT;
    if (R == 0 || O == 0) return 0;
    if (I == 0) {
        memset(y, 0, (size_t)(R * O) * (y_type == FLOAT32 ? 4 : 2));
        return 0;
    }
    atomic_int failed = 0;
#ifdef TILES
    if (!rounded && is_done_by_tiles(&m, x, x_type, y, y_type, R, threads, &failed)) return atomic_load(&failed);
#endif
    int64_t stride = up_to(I, ROUNDED), blocks = stride / ROUNDED, parts, size = part_size(&m, R, &parts);
    Job job = {.m = &m, .y = y, .y_type = y_type, .R = R, .stride = stride, .rows_of_part = size, .failed = &failed};
    Part run = several_rows;
    /* floats of x; digits, scales and totals of these */
    size_t floats = (size_t)(R * stride) * 4, codes_size = 0, scales_size = (size_t)up_to(R * blocks, 16) * 4;
#ifdef VNNI
    codes_size = (size_t)(R * stride) * MOST_DIGITS;
#else
    codes_size = rounded ? (size_t)(R * stride) : 0;
#endif
    size_t strips_size = kind == FLOATS ? floats : 0;
    char *memory = scratch_of(0, floats + 2 * codes_size + up_to((int64_t)scales_size, 64) + strips_size + 256);
    if (!memory) return ERROR_MEMORY;
    float *as_floats = (float *)memory;
    int8_t *x_codes = (int8_t *)(memory + floats);
    int32_t *totals = (int32_t *)(x_codes + codes_size);
    float *scales = (float *)((char *)totals + codes_size);
    for (int64_t r = 0; r < R; r++) {
        to_float32((const char *)x + r * I * (x_type == FLOAT32 ? 4 : 2), x_type, I, as_floats + r * stride);
        memset(as_floats + r * stride + I, 0, (size_t)(stride - I) * 4);
        if (rounded) round_row(as_floats + r * stride, I, x_codes + r * stride, scales + r * blocks);
    }
    job.x = as_floats, job.x_codes = x_codes, job.x_scales = scales, job.x_totals = totals;
#ifdef HALVES
    int by_words = kind == INT4 && !zero && !rounded && !IS_INTEL; /* whose sums of bytes are faster */
    if (by_words && grouping(&m, ROUNDED) >= 0 && are_bfloat16(as_floats, R * stride)) {
        order_for_words(as_floats, stride * R, (uint16_t *)x_codes);
        job.x_words = (uint16_t *)x_codes;
        job.digits = NO_DIGITS;
        run = rows_by_digits;
    } else
#endif
#ifdef VNNI
    if (prepare_digits(&job, rounded, x_codes, totals, scales)) run = rows_by_digits;
#endif
    int is_plain = run == several_rows;
    if (is_plain && kind == FLOATS) {
        run = rows_of_floats;
#ifdef HALVES
        if (scale_type == BFLOAT16 && are_bfloat16(as_floats, R * stride)) {
            as_halves(as_floats, R * stride, (uint16_t *)x_codes);
            job.x_words = (uint16_t *)x_codes;
        }
#endif
        if (scale_type == BFLOAT16 && !job.x_words)
            for (int64_t r = 0; r < R; r++) order_for_halves(as_floats + r * stride, stride);
        if (R > most_beside(job.x_words ? PAIRS : scale_type, BESIDE) && stride > STRIP_OF_X) {
            char *strips = (char *)scales + up_to((int64_t)scales_size, 64);
            if (job.x_words) in_strips((const char *)job.x_words, R, stride, 2, strips);
            else in_strips((const char *)as_floats, R, stride, 4, strips);
            job.x_strips = strips;
        }
    } else if (is_plain && R <= MOST_BY_CODES && (kind == INT8 || kind == FP8)) {
        if (m.G == 1 || wide % LANES == 0) run = rows_in_registers;
    } else if (is_plain && R <= MOST_BY_CODES && grouping(&m, OF_NIBBLES) >= 0) {
        for (int64_t r = 0; r < R; r++) order_for_nibbles(kind, as_floats + r * stride, stride);
        run = rows_in_registers;
    }
    run_parts(run, &job, parts, threads);
    return atomic_load(&failed);
}

/* A job of so many parts by the threads of this library, or of another that are lent. */
void mistral_run(Parallel by, Part part, const void *job, int64_t parts, int threads)
{
    lent = by;
    run_parts(part, job, parts, threads);
    lent = NULL;
}

/* The same by the threads of another library: those wait for work at a processor that the pool's would want. */
int mistral_product_by(
    Parallel by, int kind, const void *codes, const void *scale, int scale_type, const int8_t *zero, int64_t O,
    int64_t I, int64_t high, int64_t wide, const void *x, int x_type, void *y, int y_type, int64_t R, int rounded,
    int threads)
{
    lent = by;
    int code = mistral_product(
        kind, codes, scale, scale_type, zero, O, I, high, wide, x, x_type, y, y_type, R, rounded, threads);
    lent = NULL;
    return code;
}

typedef struct {
    const Matrix *m;
    void *to;
    int type;
    int64_t rows_of_part;
    atomic_int *failed;
} Expansion;

/* n floats of a strip into their place, past the caches where there is a way: they are read when all are there. */
static void put_floats(float *to, const float *from, int64_t n)
{
    int64_t i = 0;
#ifdef WIDE
    for (; i < n && (uintptr_t)(to + i) % 64; i++) to[i] = from[i];
    for (; i + 16 <= n; i += 16) _mm512_stream_ps(to + i, _mm512_loadu_ps(from + i));
#endif
    memcpy(to + i, from + i, (size_t)(n - i) * 4);
}

static void put_bfloat16(uint16_t *to, const float *from, int64_t n)
{
    int64_t i = 0;
#ifdef WIDE
    int is_aligned = (uintptr_t)to % 64 == 0;
    for (; i + 32 <= n; i += 32) {
        __m512i both = bfloat16_of(from + i);
        if (is_aligned) _mm512_stream_si512((void *)(to + i), both);
        else _mm512_storeu_si512(to + i, both);
    }
#endif
    for (; i < n; i++) to[i] = to_bfloat16(from[i]);
}

static void expand(const void *argument, int64_t part)
{
    const Expansion *job = argument;
    const Matrix *m = job->m;
    Job like = {.m = m, .failed = job->failed};
    float *zero, *scale;
    if (!(scale = scratch_for_scales(&like, 1, STRIP * 4, &zero))) return;
    float *w = scale + 2 * up_to(m->G + 16, 16);
    int64_t end = (part + 1) * job->rows_of_part < m->O ? (part + 1) * job->rows_of_part : m->O;
    for (int64_t o = part * job->rows_of_part; o < end; o++) {
        row_scales(m, o, scale, zero);
        for (int64_t first = 0; first < m->I; first += STRIP) {
            int64_t n = m->I - first < STRIP ? m->I - first : STRIP, at = o * m->I + first;
            decode(m, o, first, n, scale, zero, w);
            if (job->type == FLOAT32) put_floats((float *)job->to + at, w, n);
            else put_bfloat16((uint16_t *)job->to + at, w, n);
        }
    }
#ifdef WIDE
    _mm_sfence();
#endif
}

/* w [O,I] as float32 or bfloat16, each number rounded once, or twice where it is a bfloat16. */
int mistral_dequantised(
    int kind, const void *codes, const void *scale, int scale_type, const int8_t *zero, int64_t O, int64_t I,
    int64_t high, int64_t wide, void *to, int type, int threads)
{
    Matrix m;
    if (described(&m, kind, codes, scale, scale_type, zero, O, I, high, wide)) return ERROR_ARGUMENT;
    if (type != FLOAT32 && type != BFLOAT16) return ERROR_ARGUMENT;
    if (O == 0 || I == 0) return 0;
    atomic_int failed = 0;
    int64_t parts, size = part_size(&m, 1, &parts);
    Expansion job = {&m, to, type, size, &failed};
    run_parts(expand, &job, parts, threads);
    return atomic_load(&failed);
}

int mistral_dequantised_by(
    Parallel by, int kind, const void *codes, const void *scale, int scale_type, const int8_t *zero, int64_t O,
    int64_t I, int64_t high, int64_t wide, void *to, int type, int threads)
{
    lent = by;
    int code = mistral_dequantised(kind, codes, scale, scale_type, zero, O, I, high, wide, to, type, threads);
    lent = NULL;
    return code;
}

/* The sum of 64-bit words of memory, by all threads, each in several places: how fast it can be read, for comparison. */
enum { PLACES = 8, WORDS_OF_PART = 65536 };
typedef uint64_t Words __attribute__((vector_size(64)));
typedef struct {
    const uint64_t *words;
    int64_t count;
    atomic_ullong total;
} Reading;

static void read_part(const void *argument, int64_t part)
{
    Reading *job = (Reading *)argument;
    const uint64_t *words = job->words + part * WORDS_OF_PART;
    int64_t left = job->count - part * WORDS_OF_PART, count = left < WORDS_OF_PART ? left : WORDS_OF_PART;
    int64_t run = count / PLACES / 8 * 8;
    Words sums[PLACES] = {0};
    uint64_t sum = 0;
    for (int64_t i = 0; i < run; i += 8)
        for (int k = 0; k < PLACES; k++) {
            Words here;
            memcpy(&here, words + k * run + i, sizeof here);
            sums[k] += here;
        }
    for (int64_t i = PLACES * run; i < count; i++) sum += words[i];
    for (int k = 0; k < PLACES; k++)
        for (int i = 0; i < 8; i++) sum += sums[k][i];
    atomic_fetch_add(&job->total, sum);
}

uint64_t mistral_read(const void *words, int64_t count, int threads)
{
    Reading job = {words, count, 0};
    run_parts(read_part, &job, (count + WORDS_OF_PART - 1) / WORDS_OF_PART, threads);
    return atomic_load(&job.total);
}
