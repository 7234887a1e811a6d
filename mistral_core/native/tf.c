/* The kernels of rows.c, and attention, as operations of TensorFlow: C against TensorFlow's C API. */

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

#include "tensorflow/c/kernels.h"

/* what the next header leaves to C++ */
typedef struct TF_DimensionHandle TF_DimensionHandle;
typedef struct TF_OpDefinitionBuilder TF_OpDefinitionBuilder;
typedef struct TF_ShapeHandle TF_ShapeHandle;
typedef struct TF_ShapeInferenceContext TF_ShapeInferenceContext;
#include "tensorflow/c/ops.h"

#include "bound.h"
#include "seeing.h"

static Attend attend;
static AttentionGradients attention_gradients;

void mistral_bind_attention(void *of_attend, void *of_gradients)
{
    attend = (Attend)of_attend;
    attention_gradients = (AttentionGradients)of_gradients;
}

typedef struct {
    int64_t kind, O, I, high, wide, rounded;
    TF_DataType type;
} Numbers;

static void *create(TF_OpKernelConstruction *construction)
{
    TF_Status *status = TF_NewStatus();
    Numbers *numbers = calloc(1, sizeof *numbers);
    int32_t count = 0, total = 0;
    TF_OpKernelConstruction_GetAttrSize(construction, "numbers", &count, &total, status);
    if (TF_GetCode(status) == TF_OK && count != 6) TF_SetStatus(status, TF_INVALID_ARGUMENT, "numbers must be six");
    if (TF_GetCode(status) == TF_OK)
        TF_OpKernelConstruction_GetAttrInt64List(construction, "numbers", &numbers->kind, 6, status);
    if (TF_GetCode(status) == TF_OK) TF_OpKernelConstruction_GetAttrType(construction, "T", &numbers->type, status);
    if (TF_GetCode(status) == TF_OK && (numbers->high < 1 || numbers->wide < 1))
        TF_SetStatus(status, TF_INVALID_ARGUMENT, "a block must have rows and columns");
    if (TF_GetCode(status) != TF_OK) TF_OpKernelConstruction_Failure(construction, status);
    TF_DeleteStatus(status);
    return numbers;
}

static int number_of(TF_DataType type)
{
    return type == TF_FLOAT ? 0 : type == TF_BFLOAT16 ? 1 : type == TF_HALF ? 2 : -1;
}

static void *data_of(TF_Tensor *tensor) { return tensor ? TF_TensorData(tensor) : NULL; }

/* Either operation: with x as the first input, or without. */
static void compute(const Numbers *n, TF_OpKernelContext *context, int with_x)
{
    TF_Status *status = TF_NewStatus();
    TF_Tensor *inputs[4] = {NULL}, *output = NULL, **part = inputs + with_x, *x = inputs[0];
    int count = TF_NumInputs(context);
    for (int i = 0; i < count && i < 4 && TF_GetCode(status) == TF_OK; i++) TF_GetInput(context, i, &inputs[i], status);
    if (TF_GetCode(status) != TF_OK) goto done;
    x = inputs[0];
    int64_t blocks = (n->O + n->high - 1) / n->high * ((n->I + n->wide - 1) / n->wide);
    int64_t bytes = n->kind == 0 || n->kind == 3 ? n->I : (n->I + 1) / 2, rows = 0;
    int rank = with_x ? TF_NumDims(x) : 2;
    int64_t shape[16];
    bool fits = TF_TensorElementCount(part[0]) == n->O * bytes && TF_TensorElementCount(part[1]) == blocks &&
                (count < 3 + with_x || TF_TensorElementCount(part[2]) == blocks) && rank >= 1 && rank <= 16;
    if (fits && with_x) {
        rows = n->I ? TF_TensorElementCount(x) / n->I : 0;
        fits = TF_Dim(x, rank - 1) == n->I;
        for (int i = 0; i < rank; i++) shape[i] = TF_Dim(x, i);
        shape[rank - 1] = n->O;
    } else {
        shape[0] = n->O, shape[1] = n->I;
    }
    if (!fits) {
        TF_SetStatus(status, TF_INVALID_ARGUMENT, "arrays must be those of a packed matrix and x have its columns");
        goto done;
    }
    int64_t elements = with_x ? rows * n->O : n->O * n->I;
    output = TF_AllocateOutput(context, 0, n->type, shape, rank, (size_t)elements * TF_DataTypeSize(n->type), status);
    if (TF_GetCode(status) != TF_OK) goto done;
    int scale_type = number_of(TF_TensorType(part[1])), type = number_of(n->type), code;
    const int8_t *zero = data_of(count == 3 + with_x ? part[2] : NULL);
    if (elements == 0)
        code = 0;
    else if (with_x)
        code = product((int)n->kind, data_of(part[0]), data_of(part[1]), scale_type, zero, n->O, n->I, n->high, n->wide,
                       data_of(x), type, data_of(output), type, rows, (int)n->rounded, 0);
    else
        code = dequantised((int)n->kind, data_of(part[0]), data_of(part[1]), scale_type, zero, n->O, n->I, n->high,
                           n->wide, data_of(output), type, 0);
    if (code) TF_SetStatus(status, TF_INVALID_ARGUMENT, "kind and types must be known, and memory be there");
done:
    if (TF_GetCode(status) != TF_OK) TF_OpKernelContext_Failure(context, status);
    for (int i = 0; i < 4; i++)
        if (inputs[i]) TF_DeleteTensor(inputs[i]);
    if (output) TF_DeleteTensor(output);
    TF_DeleteStatus(status);
}

static void compute_product(void *numbers, TF_OpKernelContext *context) { compute(numbers, context, 1); }
static void compute_dequantised(void *numbers, TF_OpKernelContext *context) { compute(numbers, context, 0); }

/* x's axes but for the last, and as many columns as codes have rows. */
static void shape_of_product(TF_ShapeInferenceContext *context, TF_Status *status)
{
    TF_ShapeHandle *x = TF_NewShapeHandle(), *codes = TF_NewShapeHandle(), *result = TF_NewShapeHandle();
    TF_ShapeInferenceContextGetInput(context, 0, x, status);
    if (TF_GetCode(status) == TF_OK) TF_ShapeInferenceContextGetInput(context, 1, codes, status);
    if (TF_GetCode(status) == TF_OK) {
        if (TF_ShapeInferenceContextRankKnown(context, x) && TF_ShapeInferenceContextRankKnown(context, codes)) {
            TF_ShapeInferenceContextSubshape(context, x, 0, -1, x, status);
            if (TF_GetCode(status) == TF_OK) TF_ShapeInferenceContextSubshape(context, codes, 0, 1, codes, status);
            if (TF_GetCode(status) == TF_OK)
                TF_ShapeInferenceContextConcatenateShapes(context, x, codes, result, status);
            if (TF_GetCode(status) == TF_OK) TF_ShapeInferenceContextSetOutput(context, 0, result, status);
        } else
            TF_ShapeInferenceContextSetUnknownShape(context, status);
    }
    TF_DeleteShapeHandle(x);
    TF_DeleteShapeHandle(codes);
    TF_DeleteShapeHandle(result);
}

static void shape_of_dequantised(TF_ShapeInferenceContext *context, TF_Status *status)
{
    TF_ShapeInferenceContextSetUnknownShape(context, status);
}

static void registered(const char *name, bool with_x)
{
    TF_Status *status = TF_NewStatus();
    TF_OpDefinitionBuilder *operation = TF_NewOpDefinitionBuilder(name);
    if (with_x) TF_OpDefinitionBuilderAddInput(operation, "x: T");
    TF_OpDefinitionBuilderAddInput(operation, "codes: C");
    TF_OpDefinitionBuilderAddInput(operation, "scale: S");
    TF_OpDefinitionBuilderAddInput(operation, "zero: N * int8");
    TF_OpDefinitionBuilderAddOutput(operation, "y: T");
    TF_OpDefinitionBuilderAddAttr(operation, "T: {float, bfloat16}");
    TF_OpDefinitionBuilderAddAttr(operation, "C: {int8, uint8}");
    TF_OpDefinitionBuilderAddAttr(operation, "S: {float, bfloat16, half}");
    TF_OpDefinitionBuilderAddAttr(operation, "N: int >= 0");
    TF_OpDefinitionBuilderAddAttr(operation, "numbers: list(int)");
    TF_OpDefinitionBuilderSetShapeInferenceFunction(operation, with_x ? shape_of_product : shape_of_dequantised);
    TF_RegisterOpDefinition(operation, status);
    void (*computes)(void *, TF_OpKernelContext *) = with_x ? compute_product : compute_dequantised;
    TF_KernelBuilder *kernel = TF_NewKernelBuilder(name, "CPU", create, computes, free);
    if (TF_GetCode(status) == TF_OK) TF_RegisterKernelBuilder(name, kernel, status);
    TF_DeleteStatus(status);
}

/* ---- attention: of q, k, v, the orders of queries and keys, and the documents of tokens or none; its gradients are of
   what it gave and of what comes from above too, after v ---- */

enum { ATTEND = 3, GRADIENTS = 5 }; /* an operation by how many of its inputs are floats */

typedef struct {
    int64_t window;
} Window;

static void *create_window(TF_OpKernelConstruction *construction)
{
    TF_Status *status = TF_NewStatus();
    Window *window = calloc(1, sizeof *window);
    TF_OpKernelConstruction_GetAttrInt64(construction, "window", &window->window, status);
    if (TF_GetCode(status) != TF_OK) TF_OpKernelConstruction_Failure(construction, status);
    TF_DeleteStatus(status);
    return window;
}

/* Whether arrays fit each other, and what C is told of the first ones. */
static int seen(TF_Tensor *const *inputs, int count, int floats, Seeing *a)
{
    TF_Tensor *q = inputs[0], *k = inputs[1], *v = inputs[2], *const *numbers = inputs + floats;
    for (int i = 0; i < floats; i++)
        if (TF_NumDims(inputs[i]) != 4) return 0;
    for (int i = ATTEND; i < floats; i++)
        if (TF_TensorElementCount(inputs[i]) != TF_TensorElementCount(q)) return 0;
    a->B = TF_Dim(q, 0), a->T = TF_Dim(q, 1), a->N = TF_Dim(q, 2), a->H = TF_Dim(q, 3);
    a->S = TF_Dim(k, 1), a->K = TF_Dim(k, 2), a->type = number_of(TF_TensorType(q));
    a->q = data_of(q), a->k = data_of(k), a->v = data_of(v);
    return attend && TF_Dim(k, 0) == a->B && TF_Dim(k, 3) == a->H && a->K > 0 && a->N % a->K == 0 &&
           TF_TensorElementCount(v) == TF_TensorElementCount(k) && TF_TensorElementCount(numbers[0]) == a->B * a->T &&
           TF_TensorElementCount(numbers[1]) == a->B * a->S &&
           (count < floats + 3 || (a->S == a->T && TF_TensorElementCount(numbers[2]) == a->B * a->S));
}

/* An output of the shape and type of an input. */
static TF_Tensor *output_like(TF_OpKernelContext *context, int index, const TF_Tensor *input, TF_Status *status)
{
    int64_t shape[4];
    if (TF_GetCode(status) != TF_OK) return NULL;
    for (int i = 0; i < 4; i++) shape[i] = TF_Dim(input, i);
    TF_DataType type = TF_TensorType(input);
    size_t bytes = (size_t)TF_TensorElementCount(input) * TF_DataTypeSize(type);
    return TF_AllocateOutput(context, index, type, shape, 4, bytes, status);
}

static void compute_attention(const Window *window, TF_OpKernelContext *context, int floats)
{
    TF_Status *status = TF_NewStatus();
    TF_Tensor *inputs[GRADIENTS + 3] = {NULL}, *outputs[3] = {NULL}, **numbers = inputs + floats;
    int count = TF_NumInputs(context) < floats + 3 ? TF_NumInputs(context) : floats + 3;
    int results = floats == ATTEND ? 1 : 3;
    for (int i = 0; i < count && TF_GetCode(status) == TF_OK; i++) TF_GetInput(context, i, &inputs[i], status);
    Seeing a = {.window = window->window};
    if (TF_GetCode(status) == TF_OK && !seen(inputs, count, floats, &a))
        TF_SetStatus(status, TF_INVALID_ARGUMENT, "attention must have arrays that fit each other");
    for (int i = 0; i < results; i++) outputs[i] = output_like(context, i, inputs[i], status);
    if (TF_GetCode(status) == TF_OK) {
        const int32_t *order = data_of(numbers[0]), *key_order = data_of(numbers[1]), *document = data_of(numbers[2]);
        int code;
        if (floats == ATTEND) {
            a.y = data_of(outputs[0]);
            code = attend_by(attend, &a, order, key_order, document);
        } else {
            a.y = data_of(inputs[3]);
            Gradients of = {
                .of = a, .dy = data_of(inputs[4]), .dq = data_of(outputs[0]), .dk = data_of(outputs[1]),
                .dv = data_of(outputs[2]), .order = order, .key_order = key_order, .document = document};
            code = attention_gradients(&of, NULL);
        }
        if (code) TF_SetStatus(status, TF_INVALID_ARGUMENT, told_of(code));
    }
    if (TF_GetCode(status) != TF_OK) TF_OpKernelContext_Failure(context, status);
    for (int i = 0; i < count; i++)
        if (inputs[i]) TF_DeleteTensor(inputs[i]);
    for (int i = 0; i < results; i++)
        if (outputs[i]) TF_DeleteTensor(outputs[i]);
    TF_DeleteStatus(status);
}

static void compute_attend(void *window, TF_OpKernelContext *context) { compute_attention(window, context, ATTEND); }
static void compute_gradients(void *window, TF_OpKernelContext *context)
{
    compute_attention(window, context, GRADIENTS);
}

/* Results are like the first inputs. */
static void shape_like(TF_ShapeInferenceContext *context, TF_Status *status, int results)
{
    TF_ShapeHandle *shape = TF_NewShapeHandle();
    for (int i = 0; i < results && TF_GetCode(status) == TF_OK; i++) {
        TF_ShapeInferenceContextGetInput(context, i, shape, status);
        if (TF_GetCode(status) == TF_OK) TF_ShapeInferenceContextSetOutput(context, i, shape, status);
    }
    TF_DeleteShapeHandle(shape);
}

static void shape_of_attend(TF_ShapeInferenceContext *context, TF_Status *status) { shape_like(context, status, 1); }
static void shape_of_gradients(TF_ShapeInferenceContext *context, TF_Status *status) { shape_like(context, status, 3); }

static void register_attention(const char *name, int floats)
{
    TF_Status *status = TF_NewStatus();
    TF_OpDefinitionBuilder *operation = TF_NewOpDefinitionBuilder(name);
    const char *inputs[] = {"q: T", "k: T", "v: T", "y: T", "dy: T"}, *gradients[] = {"dq: T", "dk: T", "dv: T"};
    for (int i = 0; i < floats; i++) TF_OpDefinitionBuilderAddInput(operation, inputs[i]);
    TF_OpDefinitionBuilderAddInput(operation, "order: int32");
    TF_OpDefinitionBuilderAddInput(operation, "key_order: int32");
    TF_OpDefinitionBuilderAddInput(operation, "documents: M * int32");
    if (floats == ATTEND) TF_OpDefinitionBuilderAddOutput(operation, "y: T");
    for (int i = 0; floats == GRADIENTS && i < 3; i++) TF_OpDefinitionBuilderAddOutput(operation, gradients[i]);
    TF_OpDefinitionBuilderAddAttr(operation, "T: {float, bfloat16}");
    TF_OpDefinitionBuilderAddAttr(operation, "M: int >= 0");
    TF_OpDefinitionBuilderAddAttr(operation, "window: int");
    TF_OpDefinitionBuilderSetShapeInferenceFunction(operation, floats == ATTEND ? shape_of_attend : shape_of_gradients);
    TF_RegisterOpDefinition(operation, status);
    void (*computes)(void *, TF_OpKernelContext *) = floats == ATTEND ? compute_attend : compute_gradients;
    TF_KernelBuilder *kernel = TF_NewKernelBuilder(name, "CPU", create_window, computes, free);
    if (TF_GetCode(status) == TF_OK) TF_RegisterKernelBuilder(name, kernel, status);
    TF_DeleteStatus(status);
}

__attribute__((constructor)) static void register_all(void)
{
    registered("MistralPackedProduct", true);
    registered("MistralDequantised", false);
    register_attention("MistralAttend", ATTEND);
    register_attention("MistralAttentionGradients", GRADIENTS);
}
