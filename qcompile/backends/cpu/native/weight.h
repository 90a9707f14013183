// A prepared weight as the ops receive it.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/CPUAllocator.h>

#include "product.h"

namespace qcompile {

using at::Tensor;
using std::optional;

inline Type type_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBFloat16: return Type::bfloat16;
    case at::kHalf: return Type::float16;
    case at::kFloat: return Type::float32;
    default: TORCH_CHECK(false, "qcompile_cpu computes bfloat16, float16 and float32, not ", dtype);
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory that begins at a cache line. A tensor of it would take longer to make than some of what is done with it.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) { room(size); }

  // Room for `size` elements, whose contents are not kept
  T* room(int64_t size) {
    if (size > size_) memory_ = c10::GetCPUAllocator()->allocate((size_ = size) * sizeof(T));
    return *this;
  }
  operator T*() const { return static_cast<T*>(memory_.get()); }

 private:
  int64_t size_ = 0;
  c10::DataPtr memory_;
};

// The tensors of product.h, one expert after the other; a plain linear has one.
struct Weight {
  const uint8_t* codes;
  const char* scales;
  const int8_t* zeros;   // or null: all are `zero`
  const int32_t* sums;   // or null
  Type scale_type;
  bool four_bits;
  int32_t zero;
  int64_t experts, panels, features, groups, group;

  Weight(const Tensor& codes_, const Tensor& scales_, const optional<Tensor>& zeros_, const optional<Tensor>& sums_,
         int64_t zero, bool stacked)
      : codes(static_cast<const uint8_t*>(codes_.data_ptr())),
        scales(static_cast<const char*>(scales_.data_ptr())),
        zeros(zeros_ ? zeros_->data_ptr<int8_t>() : nullptr),
        sums(sums_ ? sums_->data_ptr<int32_t>() : nullptr),
        scale_type(type_of(scales_.scalar_type())),
        four_bits(codes_.scalar_type() == at::kByte),
        zero(static_cast<int32_t>(four_bits ? zero : zero - 128)) {
    TORCH_CHECK(codes_.dim() == (four_bits ? 4 : 5) + stacked && codes_.size(-2) == kPanel && codes_.is_contiguous(),
                "qcompile_cpu: codes ", codes_.sizes(), " are not as the kernel prepares them");
    experts = stacked ? codes_.size(0) : 1;
    panels = codes_.size(stacked);
    features = codes_.size(stacked + 1) * kStep;
    groups = scales_.size(-2);
    group = features / groups;
    const int64_t values = experts * panels * groups * kPanel;
    TORCH_CHECK(scales_.is_contiguous() && scales_.numel() == values && group * groups == features && group % kStep == 0,
                "qcompile_cpu: scales ", scales_.sizes(), " do not fit codes ", codes_.sizes());
    for (const auto* tensor : {&zeros_, &sums_})
      TORCH_CHECK(!*tensor || ((*tensor)->is_contiguous() && (*tensor)->numel() == values),
                  "qcompile_cpu: zeros or sums do not fit scales ", scales_.sizes());
  }

  // Of kLanes channels from `place` on, counted as scales and zeros are stored; zero points as codes are
  Floats scales_at(int64_t place) const { return load_floats(scales + place * size_of(scale_type), scale_type); }
  Int32s zeros_at(int64_t place) const {
    return zeros ? __builtin_convertvector(load<QuarterWidth>(zeros + place), Int32s) : Int32s{} + zero;
  }
};

}  // namespace qcompile
