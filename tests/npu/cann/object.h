/* What the arguments of operations are made of here: tensors, scalars, arrays and lists. pretend.py reads the same. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct object {
  int64_t count;          /* of sizes, of numbers or of items */
  int64_t *sizes;         /* of a tensor; the numbers of an array of integers or booleans */
  int64_t *strides;
  int64_t offset;
  int64_t stored_count;   /* of the sizes in memory, which differ under FRACTAL_NZ */
  int64_t *stored;
  int64_t type, format;   /* aclDataType, aclFormat */
  void *data;
  struct object **items;  /* of a list */
  int64_t bits;           /* of a scalar: its first bytes */
} object;

static object *make_object(uint64_t count) {
  object *made = (object *)calloc(1, sizeof *made);
  made->count = (int64_t)count;
  return made;
}

static int64_t *copied(const int64_t *from, uint64_t count) {
  int64_t *result = (int64_t *)calloc(count + 2, sizeof *result);
  if (from && count) memcpy(result, from, count * sizeof *result);
  return result;
}

static int destroy(object *made) {
  if (!made) return 0;
  for (int64_t i = 0; made->items && i < made->count; i++) destroy(made->items[i]);
  free(made->sizes), free(made->strides), free(made->stored), free(made->items), free(made);
  return 0;
}
