/* The kernels of rows.c as handlers of XLA's foreign functions: C against the header that jaxlib brings. */

#include <stdint.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"
#include "bound.h"
#include "seeing.h"

static Attend attend;

void mistral_bind_attend(void *of_attend) { attend = (Attend)of_attend; }

static XLA_FFI_Error *error(XLA_FFI_CallFrame *frame, const char *message)
{
    XLA_FFI_Error_Create_Args args;
    memset(&args, 0, sizeof args);
    args.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
    args.message = message;
    args.errc = XLA_FFI_Error_Code_INVALID_ARGUMENT;
    return frame->api->XLA_FFI_Error_Create(&args);
}

static int is_question(XLA_FFI_CallFrame *frame) /* XLA asks for the version before it calls */
{
    XLA_FFI_Extension_Base *extension = frame->extension_start;
    if (!extension || extension->type != XLA_FFI_Extension_Metadata) return 0;
    XLA_FFI_Metadata *metadata = ((XLA_FFI_Metadata_Extension *)extension)->metadata;
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    metadata->api_version.minor_version = XLA_FFI_API_MINOR;
    metadata->traits = 0;
#ifdef XLA_FFI_UNKNOWN_TYPE_ID
    metadata->state_type_id.type_id = 0;
#endif
    return 1;
}

static int type_of(const XLA_FFI_Buffer *buffer)
{
    switch (buffer->dtype) {
    case XLA_FFI_DataType_F32: return 0;
    case XLA_FFI_DataType_BF16: return 1;
    case XLA_FFI_DataType_F16: return 2;
    default: return -1;
    }
}

static int64_t size_of(const XLA_FFI_Buffer *buffer)
{
    int64_t size = 1;
    for (int64_t i = 0; i < buffer->rank; i++) size *= buffer->dims[i];
    return size;
}

typedef struct {
    int64_t kind, O, I, high, wide, rounded;
} Numbers;

/* The attribute "numbers", and buffers of codes, scales and zero points from an argument on; whether they fit. */
static int described(XLA_FFI_CallFrame *frame, int64_t first, Numbers *n, XLA_FFI_Buffer *parts[3])
{
    XLA_FFI_Args *args = &frame->args;
    if (frame->attrs.size != 1 || frame->attrs.types[0] != XLA_FFI_AttrType_ARRAY) return 0;
    XLA_FFI_Array *array = frame->attrs.attrs[0];
    if (array->dtype != XLA_FFI_DataType_S64 || array->size != 6) return 0;
    memcpy(n, array->data, sizeof *n);
    if ((args->size != first + 2 && args->size != first + 3) || frame->rets.size != 1) return 0;
    for (int i = 0; i < 3; i++) parts[i] = first + i < args->size ? args->args[first + i] : NULL;
    if (n->high < 1 || n->wide < 1) return 0;
    int64_t blocks = (n->O + n->high - 1) / n->high * ((n->I + n->wide - 1) / n->wide);
    int64_t bytes = n->kind == 0 || n->kind == 3 ? n->I : (n->I + 1) / 2;
    return size_of(parts[0]) == n->O * bytes && size_of(parts[1]) == blocks && type_of(parts[1]) >= 0 &&
           (!parts[2] || size_of(parts[2]) == blocks);
}

XLA_FFI_Error *mistral_xla_product(XLA_FFI_CallFrame *frame)
{
    if (is_question(frame)) return NULL;
    Numbers n;
    XLA_FFI_Buffer *part[3];
    if (!described(frame, 1, &n, part)) return error(frame, "arrays must be those of a packed matrix, got others");
    XLA_FFI_Buffer *x = frame->args.args[0], *y = frame->rets.rets[0];
    int64_t rows = n.I ? size_of(x) / n.I : 0;
    if (size_of(x) != rows * n.I || size_of(y) != rows * n.O) return error(frame, "x must have as many columns as w");
    if (product((int)n.kind, part[0]->data, part[1]->data, type_of(part[1]), part[2] ? part[2]->data : NULL, n.O, n.I,
                n.high, n.wide, x->data, type_of(x), y->data, type_of(y), rows, (int)n.rounded, 0))
        return error(frame, "the product must have a kind and types that are known, and memory");
    return NULL;
}

XLA_FFI_Error *mistral_xla_dequantised(XLA_FFI_CallFrame *frame)
{
    if (is_question(frame)) return NULL;
    Numbers n;
    XLA_FFI_Buffer *part[3];
    /* the first argument is what must be there before, and not read */
    if (!described(frame, 1, &n, part)) return error(frame, "arrays must be those of a packed matrix, got others");
    XLA_FFI_Buffer *to = frame->rets.rets[0];
    if (size_of(to) != n.O * n.I) return error(frame, "the result must be [O, I]");
    if (dequantised((int)n.kind, part[0]->data, part[1]->data, type_of(part[1]), part[2] ? part[2]->data : NULL, n.O,
                    n.I, n.high, n.wide, to->data, type_of(to), 0))
        return error(frame, "the result must be float32 or bfloat16");
    return NULL;
}

/* q, k, v, the orders of queries and keys, and the documents of tokens or none; the window is an attribute. */
XLA_FFI_Error *mistral_xla_attend(XLA_FFI_CallFrame *frame)
{
    if (is_question(frame)) return NULL;
    int64_t count = frame->args.size;
    if (count < 5 || count > 6 || frame->rets.size != 1 || frame->attrs.size != 1 ||
        frame->attrs.types[0] != XLA_FFI_AttrType_ARRAY)
        return error(frame, "attention must have its arrays and numbers, got others");
    XLA_FFI_Array *numbers = frame->attrs.attrs[0];
    XLA_FFI_Buffer **args = (XLA_FFI_Buffer **)frame->args.args, *q = args[0], *k = args[1], *y = frame->rets.rets[0];
    int fits = attend && numbers->dtype == XLA_FFI_DataType_S64 && numbers->size == 1 && q->rank == 4 && k->rank == 4;
    fits = fits && size_of(args[2]) == size_of(k) && size_of(y) == size_of(q) && k->dims[0] == q->dims[0] &&
           k->dims[3] == q->dims[3] && k->dims[2] > 0 && q->dims[2] % k->dims[2] == 0 &&
           (count < 6 || q->dims[1] == k->dims[1]);
    for (int i = 0; i < 3; i++) fits = fits && type_of(args[i]) == type_of(y) && type_of(y) >= 0 && type_of(y) <= 1;
    for (int i = 3; i < count; i++)
        fits = fits && args[i]->dtype == XLA_FFI_DataType_S32 &&
               size_of(args[i]) == q->dims[0] * (i == 3 ? q : k)->dims[1];
    if (!fits) return error(frame, "attention must have arrays that fit each other, got others");
    Seeing a = {
        .B = q->dims[0], .T = q->dims[1], .S = k->dims[1], .N = q->dims[2], .K = k->dims[2], .H = q->dims[3],
        .window = *(const int64_t *)numbers->data, .type = type_of(y), .q = q->data, .k = k->data, .v = args[2]->data,
        .y = y->data};
    int code = attend_by(attend, &a, args[3]->data, args[4]->data, count > 5 ? args[5]->data : NULL);
    return code ? error(frame, told_of(code)) : NULL;
}
