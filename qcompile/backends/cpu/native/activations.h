// Activations as integers: [block][row][feature of the block], with a scale for each block and row.
#pragma once

#include <algorithm>
#include <limits>

#include "product.h"

namespace qcompile {

constexpr int64_t kFloatBlock = 256;  // most features of a block of float activations: 255 * 32767 * 256 < 2^31

// Numbers a b c d of each four in the order a c b d: what Wide reads
inline void store_wide(int16_t* to, Int32s v) {
  using Fours = VectorOf<uint64_t, kVectorBytes / 2>::type;
  const auto fours = (Fours)__builtin_convertvector(v, VectorOf<int16_t, kVectorBytes / 2>::type);
  store(to, (fours & 0xffff00000000ffff) | (fours >> 16 & 0x00000000ffff0000) | (fours << 16 & 0x0000ffff00000000));
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

// Quantize `count` floats, padded with zeros to `length`, to codes in -32767 ... 32767 with one scale.
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
  float scale = largest / 32767, inverse = 32767 / largest;
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

}  // namespace qcompile
