// One panel of a weight times many rows: unpacked once, then multiplied by oneDNN's blocked products, which use tiles of
// AMX, or products of bfloat16, where the CPU has them.
#pragma once

#include <limits>

#include "few.h"

namespace qcompile {

// From how many rows of a weight on (not of an item: what a row's way is must not depend on the threads). Measured on a
// Xeon with AMX (2 cores, 2048 x 2048 weights): with w4a16 and w8a16 as fast at 10 rows, 1.4 times at 16, 2.5 times at
// 256; w8a8 from 6, 2.1 times at 256; w4a8 from 11. Only bfloat16 has tiles. On Zen 4, which has products of bfloat16 but
// no AMX: 0.94 times at 64 rows, 1.05 to 1.09 times at 256; integers are never faster.
constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
#if defined(QCOMPILE_AMX)
constexpr int64_t kTiledFloats = 11, kTiledCodes8 = 7, kTiledCodes4 = 12;
#elif defined(QCOMPILE_BF16)
constexpr int64_t kTiledFloats = 96, kTiledCodes8 = kNever, kTiledCodes4 = kNever;
#else
constexpr int64_t kTiledFloats = kNever, kTiledCodes8 = kNever, kTiledCodes4 = kNever;
#endif
constexpr int64_t kSlab = 2048;  // most features that are unpacked together: 256 KB of bfloat16, which a cache holds

// ------------------------------------------------------------------------------------------------- float activations

// Weights (q - z) * s of some steps of one group as bfloat16: [step * 4][64][2], two features of a channel side by side.
//
// A code becomes a float by taking its place in the bits of 16 (codes of 4 bits) or 256 (8 bits), which are `shifts`
// less: shifts = (16 + z) * s.
template <bool kFourBits>
inline void dequantize(const uint8_t* codes, int64_t steps, const Floats* scales, const Floats* shifts, uint8_t* to) {
  constexpr int kUnit = kFourBits ? 19 : 15;  // the bit of such a float that counts 1
  constexpr int kStepBytes = kFourBits ? 4 * kPanel : 8 * kPanel;
  constexpr uint32_t kMask = (kFourBits ? 0xfu : 0xffu) << kUnit;
  constexpr uint32_t kFloat = kFourBits ? 0x41800000 : 0x43800000 ^ 0x80u << kUnit;  // codes of 8 bits lack 128
  for (int64_t step = 0; step < steps; ++step, codes += kStepBytes, to += 4 * kVectors * kVectorBytes) {
    for (int line = 0; line < kStepBytes; line += 64) __builtin_prefetch(codes + kPrefetch + line);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
      for (int pair = 0; pair < 4; ++pair) {
        const int half = pair / 2;
        const auto bits = load<UInt32s>(codes + (kFourBits ? 0 : half * 4 * kPanel) + v * kVectorBytes);
        const auto value = [&](int feature) {
          const int from = 8 * feature + (kFourBits ? 4 * half : 0);
          const UInt32s placed = from < kUnit ? bits << (kUnit - from) : bits >> (from - kUnit);
          return (Floats)((placed & kMask) ^ kFloat) * scales[v] - shifts[v];
        };
        store(to + (pair * kVectors + v) * kVectorBytes, pair_of_bfloat16(value(pair % 2 * 2), value(pair % 2 * 2 + 1)));
      }
    }
  }
}

// Steps `begin` to `end` of a stored panel.
template <bool kFourBits>
inline void dequantize_panel(const Weight& weight, int64_t stored, int64_t begin, int64_t end, uint8_t* to) {
  constexpr int kStepBytes = kFourBits ? 4 * kPanel : 8 * kPanel;
  const int64_t group_steps = weight.group / kStep;
  const uint8_t* codes = weight.codes + stored * (weight.features / kStep) * kStepBytes;
  for (int64_t step = begin, next; step < end; step = next) {
    next = std::min(end, (step / group_steps + 1) * group_steps);
    Floats scales[kVectors], shifts[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const int64_t channel = (stored * weight.groups + step / group_steps) * kPanel + v * kLanes;
      scales[v] = weight.scales_at(channel);
      shifts[v] = (to_floats(weight.zeros_at(channel)) + (kFourBits ? 16.0f : 256.0f + 128.0f)) * scales[v];
    }
    dequantize<kFourBits>(codes + step * kStepBytes, next - step, scales, shifts,
                          to + (step - begin) * kStep * kPanel * sizeof(at::BFloat16));
  }
}

// x [rows, features] of bfloat16
inline void multiply_tiled(const Weight& weight, const Tensor& x, const Item& item, int64_t panel, const Output& out,
                           Scratch& scratch) {
  const auto* first = x.data_ptr<at::BFloat16>() + item.begin * x.stride(0);
  const int64_t rows = item.rows(), stored = item.expert * weight.panels + panel, slab = std::min(kSlab, weight.features);
  float* sums = scratch.sums.room(rows * kPanel);
  uint8_t* space = scratch.space.room(slab * kPanel * sizeof(at::BFloat16));
  scratch.tiles = true;
  for (int64_t begin = 0; begin < weight.features; begin += slab) {
    const int64_t end = std::min(begin + slab, weight.features);
    if (weight.four_bits) dequantize_panel<true>(weight, stored, begin / kStep, end / kStep, space);
    else dequantize_panel<false>(weight, stored, begin / kStep, end / kStep, space);
    at::native::cpublas::brgemm(rows, kPanel, end - begin, x.stride(0), kPanel, kPanel, begin > 0, first + begin,
                                reinterpret_cast<at::BFloat16*>(space), sums, true);
  }
  finish(item.begin, rows, panel, out, [&](int64_t i, int v) { return load<Floats>(sums + i * kPanel + v * kLanes); });
}

// ------------------------------------------------------------------------------------------------ integer activations

// Activations int8 [rows, features] with a scale and a zero point for each row.
struct Codes {
  Tensor codes, scales;
  optional<Tensor> zeros;
};

inline void multiply_tiled(const Weight& weight, const Codes& x, const Item& item, int64_t panel, const Output& out,
                           Scratch& scratch) {
  const int64_t rows = item.rows(), stored = item.expert * weight.panels + panel, group = weight.group;
  int32_t* integers = scratch.integers.room(rows * kPanel);
  float* sums = scratch.sums.room(weight.groups > 1 ? rows * kPanel : 0);
  uint8_t* space = scratch.space.room(weight.four_bits ? group * kPanel : 0);
  scratch.tiles = true;
  const auto* rows_of_x = x.codes.data_ptr<int8_t>() + item.begin * x.codes.stride(0);
  const uint8_t* codes = weight.codes + stored * weight.features * kPanel / (weight.four_bits ? 2 : 1);
  for (int64_t index = 0; index < weight.groups; ++index) {
    const int64_t first = (stored * weight.groups + index) * kPanel;
    const auto* factors = codes;
    if (weight.four_bits) {
      Codes4<Bytes> packed{codes, {}};
      for (int v = 0; v < kVectors; ++v) packed.zeros[v] = repeated<Bytes>(weight.zeros_at(first + v * kLanes));
      unpack<Bytes>(packed, group / kStep, space);
      factors = space;
    }
    codes += group * kPanel / (weight.four_bits ? 2 : 1);
    at::native::cpublas::brgemm(rows, kPanel, group, x.codes.stride(0), kPanel, kPanel, false,
                                reinterpret_cast<const signed char*>(rows_of_x + index * group),
                                reinterpret_cast<const signed char*>(factors), integers, true);
    Floats scales[kVectors];
    Int32s totals[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      scales[v] = weight.scales_at(first + v * kLanes);
      totals[v] = load<Int32s>(weight.sums + first + v * kLanes);
    }
    const auto scaled = [&](int64_t i, int v) {
      Int32s sum = load<Int32s>(integers + i * kPanel + v * kLanes);
      if (x.zeros) sum -= of_row<int32_t>(*x.zeros, item.begin + i) * totals[v];
      const Floats value = to_floats(sum) * scales[v];
      return index > 0 ? value + load<Floats>(sums + i * kPanel + v * kLanes) : value;
    };
    if (index + 1 == weight.groups) {
      finish(item.begin, rows, panel, out,
             [&](int64_t i, int v) { return scaled(i, v) * of_row<float>(x.scales, item.begin + i); });
    } else {
      for (int64_t i = 0; i < rows; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) store(sums + i * kPanel + v * kLanes, scaled(i, v));
    }
  }
}

}  // namespace qcompile
