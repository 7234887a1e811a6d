/* Blocks of 16 rows and 16 words, "tiles": a word is a float32 or a pair of bfloat16, and sums are in float32.

   Of c[16,16] += a[16 rows, 16 words] b[16 rows, 16 words]^T, a is as it lies in memory, and b is turned: its words are
   [16 words][16 rows]. Floats are multiplied by vectors (AVX-512), pairs by a processor's registers for tiles (AMX):
   their products are exact, and numbers below the smallest normal one are taken for 0.

   With EMULATED_TILES, which is for tests, a processor without AMX computes as if it had it. */

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define TILES 1

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum { SIDE = 16, TILE = 1024 }; /* rows of a tile, its bytes */
typedef enum { NO_WAY, BY_VECTORS, BY_AMX } Way; /* to multiply: floats, pairs */

static inline int64_t columns_of(Way way) { return way == BY_VECTORS ? SIDE : 2 * SIDE; } /* of a tile */
static inline int64_t rows_of(Way way) { return way == BY_VECTORS ? SIDE / 2 : SIDE; } /* that lie beside each other */

static inline __m512i halves_rounded(__m512 x) /* the upper halves are bfloat16 */
{
    __m512i bits = _mm512_castps_si512(x), last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
    __mmask16 none = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(rounded, none, bits, _mm512_set1_epi32(0x400000));
}

static inline __m512i odd_halves(void) /* the place of each upper half among two vectors */
{
    static const uint16_t odd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                     33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return _mm512_loadu_si512(odd);
}

static inline __m512i bfloat16_of_lanes(__m512 low, __m512 high) /* 32 numbers, rounded */
{
#ifdef __AVX512BF16__
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
#else
    return _mm512_permutex2var_epi16(halves_rounded(low), odd_halves(), halves_rounded(high));
#endif
}

static inline __m512i bfloat16_of(const float *x) /* 32 numbers, rounded */
{
    return bfloat16_of_lanes(_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16));
}

/* 32 floats that are bfloat16, as such; what they have more is added to `more`. */
static inline __m512i halves_of(const float *x, __m512i *more)
{
    __m512i low = _mm512_loadu_si512(x), high = _mm512_loadu_si512(x + 16);
    *more = _mm512_or_si512(*more, _mm512_or_si512(low, high));
    return _mm512_permutex2var_epi16(low, odd_halves(), high);
}

static inline __m512i words_of(const void *x) /* 16 numbers of bfloat16, as floats */
{
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(x)), 16);
}

/* 16 vectors of 16 numbers as their columns. */
static inline __attribute__((always_inline)) void transpose(__m512i r[SIDE])
{
    __m512i t[SIDE];
    for (int i = 0; i < SIDE; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < SIDE; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

static inline __m512i line_of(const char *row, int64_t at)
{
    return row ? _mm512_loadu_si512(row + at) : _mm512_setzero_si512();
}

static inline __m512i half_line_of(const char *row, int64_t at)
{
    return _mm512_cvtepu16_epi32(row ? _mm256_loadu_si256((const void *)(row + at)) : _mm256_setzero_si256());
}

/* 32 rows of H numbers as tiles across H, [2][H / columns]: turned, so that products are sums over H. A row that is NULL
   is zeros. */
static inline void turn_across(Way way, const char *const row[2 * SIDE], int64_t H, char *to)
{
    int64_t columns = columns_of(way), size = 64 / columns;
    for (int j = 0; j < 2 * SIDE; j += SIDE)
        for (int64_t i = 0; i < H; i += columns, to += TILE) {
            __m512i lines[SIDE];
            for (int k = 0; k < SIDE; k++) lines[k] = line_of(row[j + k], i * size);
            transpose(lines);
            for (int k = 0; k < SIDE; k++) _mm512_store_si512(to + k * 64, lines[k]);
        }
}

/* The same as tiles down the rows, each `panel` bytes after the one of the sixteen columns before, so that products are
   sums over rows: a word is of one row, or of two. */
static inline void turn_down(Way way, const char *const row[2 * SIDE], int64_t H, char *to, int64_t panel)
{
    int64_t together = columns_of(way) / SIDE;
    for (int64_t i = 0; i < H; i += SIDE, to += panel)
        for (int64_t j = 0; j < 2 * SIDE; j += together) {
            __m512i words = together == 1 ? line_of(row[j], i * 4) : half_line_of(row[j], i * 2);
            if (together == 2) words = _mm512_or_si512(words, _mm512_slli_epi32(half_line_of(row[j + 1], i * 2), 16));
            _mm512_store_si512(to + j / together * 64, words);
        }
}

/* ---- AMX ---- */

#if defined(__linux__) && (defined(EMULATED_TILES) || (defined(__AMX_TILE__) && defined(__AMX_BF16__)))
#define AMX 1

typedef struct {
    uint8_t palette, start, unused[14];
    uint16_t bytes_of_row[16];
    uint8_t rows[16];
} Tiling;

#ifdef EMULATED_TILES

static _Thread_local float emulated[8][SIDE][SIDE];
static _Thread_local Tiling emulated_tiling;
static int has_amx(void) { return 1; }

static inline void emulated_products(float (*c)[SIDE], const void *a, const void *b)
{
    const uint16_t (*x)[2 * SIDE] = a, (*y)[SIDE][2] = b; /* [rows][columns], [pairs][rows][2] */
    for (int m = 0; m < SIDE; m++)
        for (int n = 0; n < SIDE; n++)
            for (int k = 0; k < 2 * SIDE; k++) {
                uint32_t of_x = (uint32_t)x[m][k] << 16, of_y = (uint32_t)y[k / 2][n][k % 2] << 16;
                float one, other;
                memcpy(&one, &of_x, 4);
                memcpy(&other, &of_y, 4);
                c[m][n] += one * other;
            }
}

#define EACH_ROW(to, from) \
    for (int64_t row_ = 0; row_ < SIDE; row_++) memcpy(to, from, 64)
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadd(t, from, by) EACH_ROW(emulated[t][row_], (const char *)(from) + row_ * (by))
#define _tile_stored(t, to, by) EACH_ROW((char *)(to) + row_ * (by), emulated[t][row_])
#define _tile_zero(t) memset(emulated[t], 0, TILE)
#define _tile_dpbf16ps(c, a, b) emulated_products(emulated[c], emulated[a], emulated[b])
#define _tile_storeconfig(to) (*(to) = emulated_tiling)
#define _tile_loadconfig(from) (emulated_tiling = *(from))
#define _tile_release() (emulated_tiling.palette = 0)

#else
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

static int is_lent;

static void ask_for_tiles(void) /* Linux lends their registers to processes that ask */
{
    enum { REQUEST = 0x1023, TILE_DATA = 18 };
    is_lent = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

static int has_amx(void)
{
    static pthread_once_t asked = PTHREAD_ONCE_INIT;
    pthread_once(&asked, ask_for_tiles);
    return is_lent;
}
#endif

#define IN_ORDER __asm__ volatile("" ::: "memory") /* tiles read and write memory, and the compiler does not know it */
#else

typedef struct {
    int unused;
} Tiling;

static int has_amx(void) { return 0; }
#endif

/* How numbers of a type are multiplied here; NO_WAY: not at all. */
static Way way_of(int is_bfloat16)
{
    return !is_bfloat16 ? BY_VECTORS : has_amx() ? BY_AMX : NO_WAY;
}

/* All eight tiles of AMX are whole; what the thread had before is given: other libraries keep theirs between calls. */
static inline void use_tiles(Way way, Tiling *before)
{
#ifdef AMX
    if (way != BY_AMX) return;
    Tiling all = {.palette = 1};
    for (int i = 0; i < 8; i++) all.bytes_of_row[i] = 64, all.rows[i] = SIDE;
    _tile_storeconfig(before);
    _tile_loadconfig(&all);
#else
    (void)way, (void)before;
#endif
}

static inline void leave_tiles(Way way, const Tiling *before)
{
#ifdef AMX
    if (way != BY_AMX) return;
    if (before->palette) _tile_loadconfig(before);
    else _tile_release();
#else
    (void)way, (void)before;
#endif
}

/* ---- the product of 32 rows with 32, or with 16 ---- */

/* Rows of memory that are fetched meanwhile, a line of each in every step. */
typedef struct {
    const char *rows;
    int64_t stride, count;
} Ahead;

/* c[32,32] of floats, or [32,16] where there is no second panel, += a[32 rows, steps tiles] b^T; = where it `adds` to
   nothing. Of a, rows lie `stride` bytes apart, the `rows_of` rows below these `below`, and the next tile `step`. A
   panel of b is 16 rows of it, turned, a tile after another; the second one begins `panel` bytes later. */
typedef struct {
    const char *a;
    int64_t stride, below, step;
    const char *b;
    int64_t panel, steps;
    float *c;
    int64_t c_stride;
    int panels, adds;
    Ahead next, soon;
} Block;

static inline __attribute__((always_inline)) void fetch(const Ahead *of, int64_t step, int part, int parts)
{
    for (int64_t k = part * of->count / parts; k < (part + 1) * of->count / parts; k++)
        _mm_prefetch(of->rows + k * of->stride + step * 64, _MM_HINT_T1);
}

/* Eight rows at a time meet the panels: as many sums as hide how long one takes, and each word of b is loaded once for
   all of the rows, each of a once for both panels. */
static inline __attribute__((always_inline)) void by_vectors(int panels, const Block *o)
{
    enum { ROWS_AT_A_TIME = SIDE / 2, TIMES = 4 };
    const char *a = o->a;
    float *c = o->c;
    for (int n = 0; n < TIMES; n++, a += o->below, c += ROWS_AT_A_TIME * o->c_stride / 4) {
        __m512 sum[ROWS_AT_A_TIME][2];
        for (int r = 0; r < ROWS_AT_A_TIME; r++)
            for (int p = 0; p < panels; p++) sum[r][p] = _mm512_setzero_ps();
        for (int64_t i = 0; i < o->steps; i++) {
            const char *words = a + i * o->step, *turned = o->b + i * TILE;
            fetch(&o->next, i, n, TIMES);
            fetch(&o->soon, i, n, TIMES);
#pragma GCC unroll 16
            for (int w = 0; w < 64; w += 4) {
                __m512 of_b[2];
                for (int p = 0; p < panels; p++) of_b[p] = _mm512_load_ps(turned + p * o->panel + w * SIDE);
                for (int r = 0; r < ROWS_AT_A_TIME; r++) {
                    float word;
                    memcpy(&word, words + r * o->stride + w, 4);
                    __m512 of_a = _mm512_set1_ps(word);
                    for (int p = 0; p < panels; p++) sum[r][p] = _mm512_fmadd_ps(of_a, of_b[p], sum[r][p]);
                }
            }
        }
        for (int r = 0; r < ROWS_AT_A_TIME; r++)
            for (int p = 0; p < panels; p++) {
                float *to = c + r * o->c_stride / 4 + p * SIDE;
                _mm512_storeu_ps(to, o->adds ? _mm512_add_ps(sum[r][p], _mm512_loadu_ps(to)) : sum[r][p]);
            }
    }
}

#ifdef AMX
static inline __attribute__((always_inline)) void by_amx(int panels, const Block *o)
{
    const char *below = o->a + o->below, *second = o->b + o->panel;
    float *c = o->c, *c_below = c + SIDE * o->c_stride / 4;
    IN_ORDER;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (o->adds) {
        _tile_loadd(0, c, o->c_stride);
        _tile_loadd(2, c_below, o->c_stride);
        if (panels == 2) _tile_loadd(1, c + SIDE, o->c_stride);
        if (panels == 2) _tile_loadd(3, c_below + SIDE, o->c_stride);
    }
    for (int64_t i = 0; i < o->steps; i++) {
        fetch(&o->next, i, 0, 1);
        fetch(&o->soon, i, 0, 1);
        _tile_loadd(4, o->a + i * o->step, o->stride);
        _tile_loadd(6, o->b + i * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, below + i * o->step, o->stride);
        _tile_dpbf16ps(2, 5, 6);
        if (panels == 1) continue;
        _tile_loadd(7, second + i * TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, o->c_stride);
    _tile_stored(2, c_below, o->c_stride);
    if (panels == 2) _tile_stored(1, c + SIDE, o->c_stride);
    if (panels == 2) _tile_stored(3, c_below + SIDE, o->c_stride);
    IN_ORDER;
}
#endif

static __attribute__((noinline)) void multiply_tiles(Way way, const Block *o)
{
    if (way == BY_VECTORS && o->panels == 1) by_vectors(1, o);
    if (way == BY_VECTORS && o->panels == 2) by_vectors(2, o);
#ifdef AMX
    if (way == BY_AMX && o->panels == 1) by_amx(1, o);
    if (way == BY_AMX && o->panels == 2) by_amx(2, o);
#endif
}

#endif
