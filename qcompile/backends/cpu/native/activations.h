// Activations as integers: [block][row][feature of the block], with a scale for each block and row.
#pragma once

#include <algorithm>
#include <limits>

#include "team.h"
#include "weight.h"

namespace qcompile {

constexpr int64_t kFloatBlock = 256;  // most features of a block of float activations: 255 * 32512 * 256 < 2^31
constexpr float kLargestCode = 127 * 256;

// 16-bit numbers a b c d, four in each of `fours`, in the order a c b d, which Wide reads; and back
template <class Fours>
inline Fours swapped(Fours fours) {
  return (fours & 0xffff00000000ffff) | (fours >> 16 & 0x00000000ffff0000) | (fours << 16 & 0x0000ffff00000000);
}

inline void store_wide(int16_t* to, Int32s v) {
  using Fours = VectorOf<uint64_t, kVectorBytes / 2>::type;
  store(to, swapped((Fours)__builtin_convertvector(v, VectorOf<int16_t, kVectorBytes / 2>::type)));
}

// `length` numbers from `count` ones and zeros; both buffers have room for whole vectors
inline void load_padded(const char* from, Type type, int64_t count, int64_t length, float* to) {
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) store(to + k, load_floats(from + k * size_of(type), type));
  if (whole == length) return;
  alignas(64) char tail[kVectorBytes] = {};
  std::memcpy(tail, from + whole * size_of(type), (count - whole) * size_of(type));
  store(to + whole, load_floats(tail, type));
  for (int64_t k = whole + kLanes; k < length; k += kLanes) store(to + k, Floats{});
}

// The largest magnitude, or NaN when there is one. (Bits of magnitudes compare like the numbers, and NaN is on top.)
inline float largest_magnitude(const float* values, int64_t length) {
  Int32s most = {};
  for (int64_t k = 0; k < length; k += kLanes) {
    const Int32s bits = load<Int32s>(values + k) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  int32_t largest = 0;
  for (int lane = 0; lane < kLanes; ++lane) largest = std::max<int32_t>(largest, most[lane]);
  return load<float>(&largest);
}

// Quantize `count` floats, padded with zeros to `length`, to codes in -32512 ... 32512 with one scale: 256 * 127, so that
// both of their bytes are signed ones (few.h).
//
// Each further plane holds what the planes before it rounded away, 2^15 times finer: codes of plane i go to
// codes[i * length], its scale to scales[i]. A number that is not finite makes the scales NaN, and so the whole row.
inline void quantize_block(
    const char* x, Type type, int64_t count, int64_t length, int planes, int16_t* codes, float* scales) {
  alignas(64) float values[kFloatBlock];
  load_padded(x, type, count, length, values);
  float largest = largest_magnitude(values, length);
  const bool finite = largest <= std::numeric_limits<float>::max();
  largest = finite ? std::max(largest, 1e-29f) : 1.0f;  // no reciprocal overflows
  float scale = largest / kLargestCode, inverse = kLargestCode / largest;
  for (int plane = 0; plane < planes; ++plane, codes += length) {
    scales[plane] = finite ? scale : std::numeric_limits<float>::quiet_NaN();
    for (int64_t k = 0; k < length; k += kLanes) {
      const auto value = load<Floats>(values + k);
      const Int32s code = round_to_ints(value * inverse);
      if (plane + 1 < planes) store(values + k, value - to_floats(code) * scale);
      alignas(64) int16_t last[kLanes];
      const bool fits = k + kLanes <= length;
      store_wide(fits ? codes + k : last, code);
      if (!fits) std::memcpy(codes + k, last, (length - k) * sizeof(int16_t));
    }
    scale /= 32768;
    inverse *= 32768;
  }
}

// Codes of `count` activations that are 8-bit integers with a zero point, padded to `length`.
inline void place_block(const int8_t* x, int32_t zero, int64_t count, int64_t length, int16_t* codes) {
  static constexpr int kOrder[4] = {0, 2, 1, 3};
  for (int64_t k = 0; k < length; ++k) {
    const int64_t from = (k & ~3) + kOrder[k & 3];
    codes[k] = from < count ? static_cast<int16_t>(x[from] - zero) : 0;
  }
}

inline void place_block(const int8_t* x, int32_t zero, int64_t count, int64_t length, uint8_t* codes) {
  for (int64_t k = 0; k < count; ++k) codes[k] = static_cast<uint8_t>(x[k] + 128);
  std::fill(codes + count, codes + length, static_cast<uint8_t>(zero + 128));
}

// Integer activations, [block][row][feature], as `Mode` reads them. Each row of the input is `planes` rows here.
template <class Mode>
struct Activations {
  using Code = typename Mode::Code;
  int64_t rows, features, block, planes;
  Buffer<Code> codes;
  Buffer<float> scales;     // [block][row]
  Buffer<int32_t> offsets;  // [row]; not for Wide

  Activations(int64_t rows, int64_t features, int64_t block, int64_t planes)
      : rows(rows), features(features), block(std::min(block, features)), planes(planes), codes(rows * features),
        scales(blocks() * rows), offsets(is_wide<Mode> ? 0 : rows) {}

  int64_t blocks() const { return ceil_div(features, block); }
  int64_t length(int64_t index) const { return std::min(block, features - index * block); }
  Code* row_codes(int64_t index, int64_t row) const { return codes + index * block * rows + row * length(index); }
  float* row_scales(int64_t index, int64_t row) const { return scales + index * rows + row; }
};

// Call f(row, index of a block, its first feature) for all of them, rows in parallel.
template <class Mode, class Function>
void for_each_block(const Activations<Mode>& x, Function f) {
  const int64_t grain = std::max<int64_t>(1, 32768 / x.features);
  parallel(x.rows / x.planes, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t index = 0; index < x.blocks(); ++index) f(row, index, index * x.block);
  });
}

// Float activations x [rows, in]. Blocks are groups, or parts of them that a 32-bit sum can take.
inline Activations<Wide> quantized(const Tensor& x, const Weight& weight) {
  const Type type = type_of(x.scalar_type());
  int64_t block = weight.group;
  if (block > kFloatBlock) block = block % 128 ? kStep : 128;
  Activations<Wide> result(
      x.size(0) * (type == Type::float32 ? 2 : 1), weight.features, block, type == Type::float32 ? 2 : 1);
  const int64_t given = x.size(1);
  const auto* from = static_cast<const char*>(x.data_ptr());
  for_each_block(result, [&](int64_t row, int64_t index, int64_t feature) {
    const int64_t length = result.length(index), first = row * result.planes;
    quantize_block(from + (row * given + feature) * size_of(type), type, std::clamp<int64_t>(given - feature, 0, length),
                   length, result.planes, result.row_codes(index, first), result.row_scales(index, first));
  });
  return result;
}

// A value for each row from a tensor [rows] or [1]
template <class T>
T of_row(const Tensor& values, int64_t row) { return values.data_ptr<T>()[values.numel() == 1 ? 0 : row]; }

// Activations x int8 [rows, in] with scales float [rows] or [1] and zero points int32 [rows] or [1]. Blocks are groups.
template <class Mode>
Activations<Mode> placed(const Tensor& x, const Tensor& scales, const optional<Tensor>& zeros, const Weight& weight) {
  Activations<Mode> result(x.size(0), weight.features, weight.group, 1);
  const int64_t given = x.size(1);
  const auto* from = x.data_ptr<int8_t>();
  for_each_block(result, [&](int64_t row, int64_t index, int64_t feature) {
    const int32_t zero = zeros ? of_row<int32_t>(*zeros, row) : 0;
    const int64_t length = result.length(index), count = std::clamp<int64_t>(given - feature, 0, length);
    place_block(from + row * given + feature, zero, count, length, result.row_codes(index, row));
    *result.row_scales(index, row) = of_row<float>(scales, row);
    if constexpr (!is_wide<Mode>) result.offsets[row] = zero + 128;
  });
  return result;
}

}  // namespace qcompile
