/* Ascend's library of operations (aclnn), as far as its callers can see it.

   A call of an operation is two: NAMEGetWorkspaceSize takes every argument, checks them and plans; NAME then runs. Here
   the first one hands its arguments to Python (pretend.py), which checks and computes, and the second one does nothing.
   The arguments are objects that are made by the functions below. What an operation's arguments are is not known here:
   Python gets the words and the real numbers of the call and reads from them what the operation is declared to take.
   stubs.py appends one OPERATION(name) for each operation that torch_npu knows. */

#include "object.h"

int pretend_run(const char *name, const int64_t *words, const double *reals);  /* of runtime.cpp */

object *aclCreateTensor(const int64_t *sizes, uint64_t count, int type, const int64_t *strides, int64_t offset, int format,
                        const int64_t *stored, uint64_t stored_count, void *data) {
  object *made = make_object(count);
  made->sizes = copied(sizes, count);
  made->strides = copied(strides, count);
  made->offset = offset;
  made->stored = copied(stored, stored_count);
  made->stored_count = (int64_t)stored_count;
  made->type = type;
  made->format = format;
  made->data = data;
  return made;
}

object *aclCreateScalar(const void *value, int type) {
  static const int BYTES[] = {4, 2, 1, 4, 1, -1, 2, 2, 4, 8, 8, 8, 1};  /* by type; bfloat16 is 27 */
  object *made = make_object(0);
  made->type = type;
  memcpy(&made->bits, value, type < 13 ? BYTES[type] : 2);
  return made;
}

object *aclCreateIntArray(const int64_t *values, uint64_t count) {
  object *made = make_object(count);
  made->sizes = copied(values, count);
  return made;
}

object *aclCreateBoolArray(const char *values, uint64_t count) {
  object *made = make_object(count);
  made->sizes = copied(0, count);
  for (uint64_t i = 0; i < count; i++) made->sizes[i] = values[i];
  return made;
}

object *aclCreateFloatArray(const float *values, uint64_t count) { return make_object(count); }

static object *make_list(object *const *items, uint64_t count) {
  object *made = make_object(count);
  made->items = calloc(count + 1, sizeof *made->items);
  if (count) memcpy(made->items, items, count * sizeof *made->items);
  return made;
}
object *aclCreateTensorList(object *const *items, uint64_t count) { return make_list(items, count); }
object *aclCreateScalarList(object *const *items, uint64_t count) { return make_list(items, count); }

int aclDestroyTensor(object *made) { return destroy(made); }
int aclDestroyScalar(object *made) { return destroy(made); }
int aclDestroyIntArray(object *made) { return destroy(made); }
int aclDestroyBoolArray(object *made) { return destroy(made); }
int aclDestroyFloatArray(object *made) { return destroy(made); }
int aclDestroyTensorList(object *made) { return destroy(made); }
int aclDestroyScalarList(object *made) { return destroy(made); }
int aclDestroyAclOpExecutor(void *executor) { return 0; }

int aclGetViewShape(const object *tensor, int64_t **sizes, uint64_t *count) {
  *sizes = copied(tensor->sizes, (uint64_t)tensor->count);
  *count = (uint64_t)tensor->count;
  return 0;
}

int InitHugeMemThreadLocal(void *a, int b) { return 0; }
void UnInitHugeMemThreadLocal(void *a, int b) {}
void ReleaseHugeMem(void *a, int b) {}

/* The sizes in memory of a tensor in another format. FRACTAL_NZ has [n / c, k / 16, 16, c] for [k, n], where c numbers
   are 32 bytes. */
int aclnnNpuFormatCastCalculateSizeAndFormat(const object *source, int format, int extra, int64_t **sizes,
                                             uint64_t *count, int *actual) {
  uint64_t rank = (uint64_t)source->count;
  *actual = format;
  *sizes = copied(source->sizes, rank);
  *count = rank;
  if (format != 29 || rank < 2) return 0;
  int64_t columns = source->type == 0 || source->type == 3 ? 8 : source->type == 2 || source->type == 4 ? 32 : 16;
  int64_t k = source->sizes[rank - 2], n = source->sizes[rank - 1];
  int64_t *last = *sizes + rank - 2;
  last[0] = (n + columns - 1) / columns;
  last[1] = (k + 15) / 16;
  last[2] = 16;
  last[3] = columns;
  *count = rank + 2;
  return 0;
}

/* Every argument that is a pointer or an integer is a word, in registers first and then on the stack, and every real
   number is in a register of its own kind. So any call can be read without knowing what its arguments are. */
#if defined(__x86_64__)
#define WORDS_IN_REGISTERS int64_t r0, int64_t r1, int64_t r2, int64_t r3, int64_t r4, int64_t r5
#define THE_WORDS r0, r1, r2, r3, r4, r5
#elif defined(__aarch64__)
#define WORDS_IN_REGISTERS \
  int64_t r0, int64_t r1, int64_t r2, int64_t r3, int64_t r4, int64_t r5, int64_t r6, int64_t r7
#define THE_WORDS r0, r1, r2, r3, r4, r5, r6, r7
#else
#error "how arguments are passed is known for x86-64 and aarch64"
#endif
#define EIGHT(type, n) type n##0, type n##1, type n##2, type n##3, type n##4, type n##5, type n##6, type n##7
#define THE_EIGHT(n) n##0, n##1, n##2, n##3, n##4, n##5, n##6, n##7

#define OPERATION(name)                                                                                      \
  int name##GetWorkspaceSize(WORDS_IN_REGISTERS, EIGHT(double, d), EIGHT(int64_t, s), EIGHT(int64_t, t),     \
                             EIGHT(int64_t, u), EIGHT(int64_t, v), EIGHT(int64_t, w)) {                      \
    int64_t words[] = {THE_WORDS, THE_EIGHT(s), THE_EIGHT(t), THE_EIGHT(u), THE_EIGHT(v), THE_EIGHT(w)};     \
    double reals[] = {THE_EIGHT(d)};                                                                         \
    return pretend_run(#name, words, reals);                                                                 \
  }                                                                                                          \
  int name(void *workspace, uint64_t bytes, void *executor, void *stream) { return 0; }
