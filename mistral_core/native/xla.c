/* The kernels of rows.c as handlers of XLA's foreign functions: C against the header that jaxlib brings. */

#include <stdint.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"
#include "bound.h"
#include "seeing.h"

static Attend attend;
static AttentionGradients attention_gradients;

void mistral_bind_attention(void *of_attend, void *of_gradients)
{
    attend = (Attend)of_attend;
    attention_gradients = (AttentionGradients)of_gradients;
}

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

/* Of floats, q, k, v and perhaps more like q; of numbers, the orders of queries and keys, and the documents of tokens or
   none; the window is an attribute, and results are like the first floats. Whether they fit each other. */
static int seen(XLA_FFI_CallFrame *frame, int64_t floats, int64_t results, Seeing *a, XLA_FFI_Buffer *number[3])
{
    int64_t count = frame->args.size;
    XLA_FFI_Buffer **args = (XLA_FFI_Buffer **)frame->args.args, *q = args[0], *k = args[1];
    if (!attend || count < floats + 2 || count > floats + 3 || frame->rets.size != results) return 0;
    if (frame->attrs.size != 1 || frame->attrs.types[0] != XLA_FFI_AttrType_ARRAY) return 0;
    XLA_FFI_Array *numbers = frame->attrs.attrs[0];
    if (numbers->dtype != XLA_FFI_DataType_S64 || numbers->size != 1 || q->rank != 4 || k->rank != 4) return 0;
    *a = (Seeing){
        .B = q->dims[0], .T = q->dims[1], .S = k->dims[1], .N = q->dims[2], .K = k->dims[2], .H = q->dims[3],
        .window = *(const int64_t *)numbers->data, .type = type_of(q), .q = q->data, .k = k->data, .v = args[2]->data};
    int fits = a->type >= 0 && a->type <= 1 && k->dims[0] == a->B && k->dims[3] == a->H && a->K > 0 && a->N % a->K == 0;
    for (int64_t i = 0; i < floats + results; i++) {
        XLA_FFI_Buffer *each = i < floats ? args[i] : frame->rets.rets[i - floats];
        int64_t like = i < floats ? i : i - floats;
        fits = fits && type_of(each) == a->type && size_of(each) == size_of(like == 1 || like == 2 ? k : q);
    }
    for (int64_t i = 0; i < 3; i++) {
        number[i] = floats + i < count ? args[floats + i] : NULL;
        int64_t length = i == 0 ? a->T : a->S;
        fits = fits && (!number[i] || (number[i]->dtype == XLA_FFI_DataType_S32 && size_of(number[i]) == a->B * length));
    }
    return fits && (!number[2] || a->S == a->T);
}

static const void *data_of(const XLA_FFI_Buffer *buffer) { return buffer ? buffer->data : NULL; }

XLA_FFI_Error *mistral_xla_attend(XLA_FFI_CallFrame *frame)
{
    if (is_question(frame)) return NULL;
    Seeing a;
    XLA_FFI_Buffer *number[3];
    if (!seen(frame, 3, 1, &a, number)) return error(frame, "attention must have arrays that fit each other, got others");
    a.y = ((XLA_FFI_Buffer *)frame->rets.rets[0])->data;
    int code = attend_by(attend, &a, number[0]->data, number[1]->data, data_of(number[2]));
    return code ? error(frame, told_of(code)) : NULL;
}

XLA_FFI_Error *mistral_xla_attention_gradients(XLA_FFI_CallFrame *frame)
{
    if (is_question(frame)) return NULL;
    Seeing a;
    XLA_FFI_Buffer *number[3], **args = (XLA_FFI_Buffer **)frame->args.args, **rets = (XLA_FFI_Buffer **)frame->rets.rets;
    if (!seen(frame, 5, 3, &a, number)) return error(frame, "attention must have arrays that fit each other, got others");
    a.y = args[3]->data;
    Gradients of = {
        .of = a, .dy = args[4]->data, .dq = rets[0]->data, .dk = rets[1]->data, .dv = rets[2]->data,
        .order = number[0]->data, .key_order = number[1]->data, .document = data_of(number[2])};
    int code = attention_gradients(&of, NULL);
    return code ? error(frame, told_of(code)) : NULL;
}
