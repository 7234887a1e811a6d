/* What frameworks' libraries are told of rows.c: where its kernels are. */

#include <stdint.h>

typedef int (*Product)(
    int, const void *, const void *, int, const int8_t *, int64_t, int64_t, int64_t, int64_t, const void *, int, void *,
    int, int64_t, int, int);
typedef int (*Dequantised)(
    int, const void *, const void *, int, const int8_t *, int64_t, int64_t, int64_t, int64_t, void *, int, int);

static Product product;
static Dequantised dequantised;

void mistral_bind(void *of_product, void *of_dequantised)
{
    product = (Product)of_product;
    dequantised = (Dequantised)of_dequantised;
}
