/* What frameworks' libraries are told of rows.c: where its kernels are. */

#include <stdint.h>

typedef int (*Product)(
    int, const void *, const void *, int, const int8_t *, int64_t, int64_t, int64_t, int64_t, const void *, int, void *,
    int, int64_t, int, int);
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);
typedef int (*ProductBy)(
    Parallel, int, const void *, const void *, int, const int8_t *, int64_t, int64_t, int64_t, int64_t, const void *,
    int, void *, int, int64_t, int, int);
typedef void (*Run)(Parallel, void (*)(const void *, int64_t), const void *, int64_t, int);
typedef int (*Dequantised)(
    int, const void *, const void *, int, const int8_t *, int64_t, int64_t, int64_t, int64_t, void *, int, int);

static Product product;
static Dequantised dequantised;
static ProductBy product_by;
static Run run;

void mistral_bind(void *of_product, void *of_dequantised, void *of_product_by, void *of_run)
{
    product = (Product)of_product;
    dequantised = (Dequantised)of_dequantised;
    product_by = (ProductBy)of_product_by;
    run = (Run)of_run;
}
