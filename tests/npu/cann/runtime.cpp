// The part of Ascend's runtime (CANN) that torch_npu needs in order to run on a machine that has none.
//
// Device memory is memory of this process, streams and events are empty, and copies happen at once. stubs.py adds every
// other symbol that torch_npu wants, as a function that returns 0.

#include <cstddef>
#include <memory>

#include "object.h"

namespace {

const char *setting(const char *name, const char *otherwise) {
  const char *value = getenv(name);
  return value != nullptr && *value != 0 ? value : otherwise;
}

char message[4096] = "";       // what went wrong last: torch_npu appends it to its own error
int (*handler)(const char *, const int64_t *, const double *);
thread_local int32_t device;   // the one that is set
bool capturing = false;
char graph[64];                // stands for every captured graph

constexpr size_t MEMORY = size_t{64} << 30;

int allocate(void **pointer, size_t bytes) { return posix_memalign(pointer, 512, bytes != 0 ? bytes : 1) != 0; }

int make_handle(void **handle) {
  *handle = malloc(64);
  return 0;
}

}  // namespace

extern "C" {

void pretend_set_message(const char *text) {
  strncpy(message, text, sizeof message - 1);
}
const char *aclGetRecentErrMsg() { return message; }

void pretend_set_handler(int (*function)(const char *, const int64_t *, const double *)) { handler = function; }
int pretend_run(const char *name, const int64_t *words, const double *reals) {
  return handler != nullptr ? handler(name, words, reals) : 561000;
}

const char *aclrtGetSocName() { return setting("PRETEND_SOC", "Ascend910B1"); }
int aclrtGetDeviceCount(uint32_t *count) { *count = 1; return 0; }
int aclrtGetDevice(int32_t *id) { *id = device; return 0; }
int aclrtSetDevice(int32_t id) { device = id; return 0; }
int aclrtGetCurrentContext(void **context) { static int only; *context = &only; return 0; }
int aclrtDeviceGetBareTgid(int32_t *id) { *id = 1; return 0; }
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t, int32_t) { *can = 0; return 0; }
int aclGetDeviceCapability(uint32_t, int, int64_t *value) { *value = 24; return 0; }
size_t aclGetCompileoptSize(int) { return 16; }
int aclGetCompileopt(int, char *value, size_t bytes) { if (bytes != 0) *value = 0; return 0; }

int aclrtGetMemInfo(int, size_t *free, size_t *total) { *free = *total = MEMORY; return 0; }
int aclrtMalloc(void **pointer, size_t bytes, int) { return allocate(pointer, bytes); }
int aclrtMallocAlign32(void **pointer, size_t bytes, int) { return allocate(pointer, bytes); }
int aclrtMallocHost(void **pointer, size_t bytes) { return allocate(pointer, bytes); }
int aclrtFree(void *pointer) { free(pointer); return 0; }
int aclrtFreeHost(void *pointer) { free(pointer); return 0; }
int aclrtMemcpy(void *to, size_t, const void *from, size_t bytes, int) { memmove(to, from, bytes); return 0; }
int aclrtMemcpyAsync(void *to, size_t, const void *from, size_t bytes, int, void *) {
  memmove(to, from, bytes);
  return 0;
}
int aclrtMemset(void *to, size_t, int value, size_t bytes) { memset(to, value, bytes); return 0; }

// Operations of the older interface, of which TransData is left: it changes the format of a tensor.
object *aclCreateTensorDesc(int type, int count, const int64_t *sizes, int format) {
  object *made = make_object(count);
  made->type = type;
  made->format = format;
  made->sizes = copied(sizes, count);
  made->strides = copied(nullptr, count);
  int64_t step = 1;
  for (int i = count; i-- > 0; step *= sizes[i]) made->strides[i] = step;
  made->stored = copied(sizes, count);
  made->stored_count = count;
  return made;
}
int aclSetTensorFormat(object *tensor, int format) { tensor->format = format; return 0; }
int aclSetTensorShape(object *tensor, int count, const int64_t *sizes) {
  free(tensor->stored);
  tensor->stored = copied(sizes, count);
  tensor->stored_count = count;
  return 0;
}
void aclDestroyTensorDesc(object *tensor) { destroy(tensor); }
object *aclCreateDataBuffer(void *data, size_t) {
  object *made = make_object(0);
  made->data = data;
  return made;
}
int aclDestroyDataBuffer(object *buffer) { return destroy(buffer); }
int aclopCompileAndExecute(const char *name, int inputs, object *const *given, object *const *given_data, int outputs,
                           object *const *made, object *const *made_data, const void *, int, int, const char *, void *) {
  if (inputs != 1 || outputs != 1) return pretend_run(name, nullptr, nullptr);
  given[0]->data = given_data[0]->data;
  made[0]->data = made_data[0]->data;
  const int64_t words[] = {reinterpret_cast<int64_t>(given[0]), reinterpret_cast<int64_t>(made[0])};
  return pretend_run(name, words, nullptr);
}

int aclrtCreateStream(void **stream) { return make_handle(stream); }
int aclrtCreateStreamWithConfig(void **stream, uint32_t, uint32_t) { return make_handle(stream); }
int aclrtCreateEventExWithFlag(void **event, uint32_t) { return make_handle(event); }

int aclmdlRICaptureBegin(void *, int) { capturing = true; return 0; }
int aclmdlRICaptureEnd(void *, void **made) { capturing = false; *made = graph; return 0; }
int aclmdlRICaptureGetInfo(void *, int *status, void **made) { *status = capturing; *made = graph; return 0; }

}  // extern "C"

// Of the graph engine: its strings, and functions that return classes, here empty ones of the same size.
namespace ge {

struct AscendString {
  std::shared_ptr<char> text;
  AscendString(const char *from);
  const char *GetString() const;
  bool operator<(const AscendString &other) const;
  bool operator==(const AscendString &other) const;
};
AscendString::AscendString(const char *from) : text(from != nullptr ? strdup(from) : nullptr, free) {}
const char *AscendString::GetString() const { return text ? text.get() : ""; }
bool AscendString::operator<(const AscendString &other) const { return strcmp(GetString(), other.GetString()) < 0; }
bool AscendString::operator==(const AscendString &o) const { return strcmp(GetString(), o.GetString()) == 0; }

struct Two { void *a = nullptr, *b = nullptr; ~Two() {} };                    // an empty string, shared_ptr or class
struct Three { void *a = nullptr, *b = nullptr, *c = nullptr; ~Three() {} };  // an empty vector

Two GEGetErrorMsg() { return {}; }
Two GEGetErrorMsgV2() { return {}; }
Two GEGetWarningMsgV2() { return {}; }
struct TensorDesc { Two GetShape() const; };
struct Tensor { Two GetTensorDesc() const; };
struct Shape { Three GetDims() const; };
struct Graph { Three GetAllNodes() const; };
struct Session { Two GetCompiledGraphSummary(unsigned); };
struct OperatorFactory {
  static Three CreateOperator(const char *, const char *);
  static bool IsExistOp(const char *);
};
Two TensorDesc::GetShape() const { return {}; }
Two Tensor::GetTensorDesc() const { return {}; }
Three Shape::GetDims() const { return {}; }
Three Graph::GetAllNodes() const { return {}; }
Two Session::GetCompiledGraphSummary(unsigned) { return {}; }
Three OperatorFactory::CreateOperator(const char *, const char *) { return {}; }
bool OperatorFactory::IsExistOp(const char *) { return true; }

}  // namespace ge
