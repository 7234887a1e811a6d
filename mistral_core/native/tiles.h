/* A processor's tiles (AMX): 16 rows of 64 bytes, and sums in float32 of products of pairs of bfloat16, which are
   exact. It takes numbers below the smallest normal one for 0.

   Of c[16,16] += a[16,32] b[16,32]^T, a is as it lies in memory, and b is paired: [16 pairs of columns][16 rows][2].
   With EMULATED_TILES, which is for tests, a processor that has none computes the same by AVX-512. */

#ifdef __AVX512BW__
#include <immintrin.h>
#include <stdint.h>

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

static inline __m512i bfloat16_of(const float *x) /* 32 numbers, rounded */
{
    __m512i low = halves_rounded(_mm512_loadu_ps(x)), high = halves_rounded(_mm512_loadu_ps(x + 16));
    return _mm512_permutex2var_epi16(low, odd_halves(), high);
}
#endif

#if defined(__AVX512BW__) && defined(__linux__) && \
    (defined(EMULATED_TILES) || (defined(__AMX_TILE__) && defined(__AMX_BF16__)))
#define TILES 1

enum { SIDE = 16, PAIRED = 32, TILE = 1024 }; /* rows of a tile, its columns of bfloat16, its bytes */

typedef struct {
    uint8_t palette, start, unused[14];
    uint16_t bytes_of_row[16];
    uint8_t rows[16];
} Tiling;

#ifdef EMULATED_TILES
#include <string.h>

static _Thread_local float emulated[8][SIDE][SIDE];
static _Thread_local Tiling emulated_tiling;
static int are_there_tiles(void) { return 1; }

static inline void emulated_products(float (*c)[SIDE], const void *a, const void *b)
{
    const uint16_t (*x)[PAIRED] = a, (*y)[SIDE][2] = b; /* [rows][columns], [pairs][rows][2] */
    for (int m = 0; m < SIDE; m++)
        for (int n = 0; n < SIDE; n++)
            for (int k = 0; k < PAIRED; k++) {
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

static int has_tiles;

static void ask_for_tiles(void) /* Linux lends their registers to processes that ask */
{
    enum { REQUEST = 0x1023, TILE_DATA = 18 };
    has_tiles = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

static int are_there_tiles(void)
{
    static pthread_once_t asked = PTHREAD_ONCE_INIT;
    pthread_once(&asked, ask_for_tiles);
    return has_tiles;
}
#endif

/* All eight tiles are whole; what the thread had before is given, for other libraries keep theirs between calls. */
static inline void use_tiles(Tiling *before)
{
    Tiling all = {.palette = 1};
    for (int i = 0; i < 8; i++) all.bytes_of_row[i] = 64, all.rows[i] = SIDE;
    _tile_storeconfig(before);
    _tile_loadconfig(&all);
}

static inline void leave_tiles(const Tiling *before)
{
    if (before->palette) _tile_loadconfig(before);
    else _tile_release();
}

#define IN_ORDER __asm__ volatile("" ::: "memory") /* tiles read and write memory, and the compiler does not know it */

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

/* 32 floats that are bfloat16, as such; what they have more is added to `more`. */
static inline __m512i halves_of(const float *x, __m512i *more)
{
    __m512i low = _mm512_loadu_si512(x), high = _mm512_loadu_si512(x + 16);
    *more = _mm512_or_si512(*more, _mm512_or_si512(low, high));
    return _mm512_permutex2var_epi16(low, odd_halves(), high);
}

/* Rows of memory that are fetched meanwhile, a line of each in every step. */
typedef struct {
    const char *rows;
    int64_t stride, count;
} Ahead;

/* c[32,32] of floats, or [32,16] where there is no second panel, += a[32, 32 * steps] b^T; = where it `adds` to nothing.
   Of a, rows of a tile lie `a_stride` bytes apart, the sixteen rows below `a_below`, and the next tile `a_step`. A panel
   of b is 16 rows of it, paired, a tile after another; the second one begins `panel` bytes later. */
static inline __attribute__((always_inline)) void multiply_tiles(
    int panels, const void *a, int64_t a_stride, int64_t a_below, int64_t a_step, const void *b, int64_t panel,
    int64_t steps, int adds, float *c, int64_t c_stride, Ahead next)
{
    const char *rows = a, *more_rows = rows + a_below, *first = b, *second = first + panel;
    float *below = c + SIDE * c_stride / 4;
    IN_ORDER;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (adds) {
        _tile_loadd(0, c, c_stride);
        _tile_loadd(2, below, c_stride);
        if (panels == 2) _tile_loadd(1, c + SIDE, c_stride);
        if (panels == 2) _tile_loadd(3, below + SIDE, c_stride);
    }
    for (int64_t i = 0; i < steps; i++) {
        for (int64_t k = 0; k < next.count; k++) _mm_prefetch(next.rows + k * next.stride + i * 64, _MM_HINT_T1);
        _tile_loadd(4, rows + i * a_step, a_stride);
        _tile_loadd(6, first + i * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, more_rows + i * a_step, a_stride);
        _tile_dpbf16ps(2, 5, 6);
        if (panels == 1) continue;
        _tile_loadd(7, second + i * TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_stride);
    _tile_stored(2, below, c_stride);
    if (panels == 2) _tile_stored(1, c + SIDE, c_stride);
    if (panels == 2) _tile_stored(3, below + SIDE, c_stride);
    IN_ORDER;
}

#endif
