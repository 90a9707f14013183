// Activations of a product, in the forms that its items need: few rows go through rows.h, many through tiled.h.
#pragma once

#include "tiled.h"

namespace qcompile {

constexpr int64_t kAlias = 4096;  // bytes from one address to the next that the same places of a first-level cache hold

inline Tensor matrix(const Tensor& x) {
  return x.dim() == 2 && x.is_contiguous() ? x : x.reshape({-1, x.size(-1)}).contiguous();
}

// x [rows, in] with zeros, or with the zero point of each row, up to `features` columns: without any, x itself.
//
// Rows that begin a multiple of 4 KB apart share the few places of a cache that their address allows, so that a tile of
// 16 rows evicts itself: those are copied with a gap (at 4096 features of bfloat16 a tenth faster).
inline Tensor widened(const Tensor& x, int64_t features, const optional<Tensor>& zeros = std::nullopt) {
  const int64_t missing = features - x.size(1), bytes = features * x.element_size();
  const int64_t gap = bytes % kAlias == 0 ? 64 / x.element_size() : 0;
  if (missing == 0 && gap == 0) return x;
  Tensor wide = at::empty({x.size(0), features + gap}, x.options()).narrow(1, 0, features);
  wide.narrow(1, 0, x.size(1)).copy_(x);
  if (missing > 0) {
    Tensor rest = wide.narrow(1, x.size(1), missing);
    if (zeros) rest.copy_(zeros->reshape({-1, 1}));
    else rest.zero_();
  }
  return wide;
}

template <class Function>
bool any(const std::vector<Item>& items, Function f) { return std::any_of(items.begin(), items.end(), f); }

// Floats [rows, in]
struct FloatInputs {
  Tensor x, wide_x;
  int64_t planes;
  optional<Activations<Wide>> integers;
#if defined(QCOMPILE_VNNI)
  optional<SplitActivations> bytes;
#endif

  explicit FloatInputs(const Tensor& x) : x(matrix(x)), planes(type_of(x.scalar_type()) == Type::float32 ? 2 : 1) {}

  bool tiled(const Item& item) const { return item.all >= kTiledFloats && x.scalar_type() == at::kBFloat16; }

#if defined(QCOMPILE_VNNI)
  bool few(const Item& item) const { return item.rows() <= kFewRows && x.size(0) * planes <= kFewInAll; }
#endif

  void prepare(const Weight& weight, const std::vector<Item>& items) {
    if (!integers && any(items, [&](const Item& item) { return !tiled(item); })) integers = quantized(x, weight);
#if defined(QCOMPILE_VNNI)
    if (!bytes && any(items, [&](const Item& item) { return few(item); })) bytes.emplace(*integers);
#endif
    if (!wide_x.defined() && any(items, [&](const Item& item) { return tiled(item); }))
      wide_x = widened(x, weight.features);
  }

  void multiply(const Job& job, const Item& item, int64_t panel, Scratch& scratch) const {
    if (tiled(item)) return multiply_tiled(job.weight, wide_x, item, panel, job.out, scratch);
#if defined(QCOMPILE_VNNI)
    if (few(item)) {
      if (job.weight.four_bits) return multiply_few<true>(job.weight, *bytes, item, panel, job.out, scratch);
      return multiply_few<false>(job.weight, *bytes, item, panel, job.out, scratch);
    }
#endif
    multiply_rows(job.weight, *integers, item, panel, job.out, scratch);
  }
};

// Integers int8 [rows, in] with scales float [rows] or [1] and zero points int32 [rows] or [1]
struct CodeInputs {
#if defined(QCOMPILE_VNNI)
  using Mode = Narrow;
#else
  using Mode = Wide;
#endif
  static constexpr int64_t planes = 1;
  Codes x;
  optional<Activations<Mode>> integers;
  Tensor wide_x;

  CodeInputs(const Tensor& codes, const Tensor& scales, const optional<Tensor>& zeros)
      : x{matrix(codes), scales.contiguous(), zeros ? optional<Tensor>(zeros->contiguous()) : std::nullopt} {
    const int64_t rows = x.codes.size(0);
    TORCH_CHECK((x.scales.numel() == 1 || x.scales.numel() == rows) &&
                    (!zeros || zeros->numel() == 1 || zeros->numel() == rows),
                "qcompile_cpu: scales and zero points of x must be [rows] or [1], not ", scales.sizes());
  }

  static bool tiled(const Weight& weight, const Item& item) {
    return item.all >= (weight.four_bits ? kTiledCodes4 : kTiledCodes8);
  }

  void prepare(const Weight& weight, const std::vector<Item>& items) {
    if (!integers && any(items, [&](const Item& item) { return !tiled(weight, item); }))
      integers = placed<Mode>(x.codes, x.scales, x.zeros, weight);
    if (!wide_x.defined() && any(items, [&](const Item& item) { return tiled(weight, item); }))
      wide_x = widened(x.codes, weight.features, x.zeros);
  }

  void multiply(const Job& job, const Item& item, int64_t panel, Scratch& scratch) const {
    if (tiled(job.weight, item)) multiply_tiled(job.weight, {wide_x, x.scales, x.zeros}, item, panel, job.out, scratch);
    else multiply_rows(job.weight, *integers, item, panel, job.out, scratch);
  }
};

}  // namespace qcompile
