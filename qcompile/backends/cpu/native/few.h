// One panel of a weight times few rows of float activations: what decodes a token, and has to keep up with the memory.
//
// Activations are integers of 15 bits and a sign, as in rows.h, split into two bytes: x = 256 h + l. The codes q of the
// weight are multiplied as they are stored, without their zero points: sum of (q - z) x = 256 sum of q h + sum of q l -
// z sum of x. These are the same integers as in rows.h, and so the same results.
#pragma once

#include "rows.h"

namespace qcompile {

#if defined(QCOMPILE_VNNI)

constexpr int64_t kFewRows = 2;  // measured: 1.1 to 1.6 times as fast as rows.h here, slower from 4 rows on
constexpr int64_t kFewInAll = 256;  // rows of all items; splitting more costs what it saves

// Bytes of activations: [block][row][l, h][feature of the block], with a scale and a sum for each block and row.
struct SplitActivations {
  int64_t rows, features, block, planes;
  Buffer<int8_t> bytes;
  const float* scales;   // [block][row], of the activations that are split
  Buffer<int32_t> sums;  // [block][row]

  explicit SplitActivations(const Activations<Wide>& x)
      : rows(x.rows), features(x.features), block(x.block), planes(x.planes), bytes(2 * rows * features),
        scales(x.scales), sums(x.blocks() * rows) {
    for_each_block(x, [&](int64_t row, int64_t index, int64_t) {
      for (int64_t plane = row * planes; plane < (row + 1) * planes; ++plane)
        split(x.row_codes(index, plane), x.length(index), index, plane);
    });
  }

  int64_t length(int64_t index) const { return std::min(block, features - index * block); }
  int8_t* row_bytes(int64_t index, int64_t row) const {
    return bytes + 2 * (index * block * rows + row * length(index));
  }

 private:
  void split(const int16_t* codes, int64_t length, int64_t index, int64_t row) {
    constexpr int64_t kCodes = kVectorBytes / sizeof(int16_t);
    using Part = VectorOf<int8_t, kCodes>::type;
    int8_t* to = row_bytes(index, row);
    Int32s some = {};
    int64_t k = 0;
    for (; k + kCodes <= length; k += kCodes) {
      const auto code = (Int16s)swapped(load<UInt64s>(codes + k));
      const Int16s high = (code + 128) >> 8;
      store(to + k, __builtin_convertvector(code - 256 * high, Part));
      store(to + length + k, __builtin_convertvector(high, Part));
      some += ((Int32s)code << 16 >> 16) + ((Int32s)code >> 16);
    }
    int32_t sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += some[lane];
    for (; k < length; ++k) {
      const int16_t code = codes[(k & ~3) | (k & 1) << 1 | (k & 2) >> 1];
      const int high = (code + 128) >> 8;
      to[k] = static_cast<int8_t>(code - 256 * high);
      to[length + k] = static_cast<int8_t>(high);
      sum += code;
    }
    sums[index * rows + row] = sum;
  }
};

// Unsigned codes of four features of a vector of channels, for both halves of a step
template <bool kFourBits>
inline void codes_of_step(const uint8_t* codes, int vector, UInt8s (&halves)[2]) {
  if constexpr (kFourBits) {
    const auto bits = load<UInt16s>(codes + vector * kVectorBytes);
    halves[0] = (UInt8s)(bits & 0x0f0f);
    halves[1] = (UInt8s)(bits >> 4 & 0x0f0f);
  } else {
    for (int half = 0; half < 2; ++half)
      halves[half] = load<UInt8s>(codes + (half * kVectors + vector) * kVectorBytes) ^ 0x80;
  }
}

// result[row][channel] += x_scale * scale * sum of x (q - z) over a block, for kRows rows
template <int kRows, bool kFourBits>
inline void multiply_few(const uint8_t* codes, int64_t steps, const int8_t* x, const float* x_scales,
                         const int32_t* x_sums, const Floats* scales, const Int32s* zeros, float* result) {
  constexpr int kStepBytes = (kFourBits ? 4 : 8) * kPanel;
  constexpr int kChains = kRows == 1 ? 2 : 1;  // enough sums at a time to hide how long one takes
  const int64_t length = steps * kStep;
  Int32s low[kRows][kVectors][kChains] = {}, high[kRows][kVectors][kChains] = {};
  for (int64_t step = 0; step < steps; ++step, codes += kStepBytes) {
#pragma GCC unroll 8
    for (int line = 0; line < kStepBytes; line += 64) __builtin_prefetch(codes + kPrefetch + line);
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) {
      UInt8s halves[2];
      codes_of_step<kFourBits>(codes, c, halves);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const int8_t* four = x + 2 * r * length + step * kStep;
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          Int32s& l = low[r][c][half % kChains];
          Int32s& h = high[r][c][half % kChains];
          l = dot_8(l, (Int8s)(Int32s{} + load<int32_t>(four + 4 * half)), halves[half]);
          h = dot_8(h, (Int8s)(Int32s{} + load<int32_t>(four + length + 4 * half)), halves[half]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) {
      UInt32s sum = (UInt32s)low[r][c][0] + ((UInt32s)high[r][c][0] << 8);
      if constexpr (kChains == 2) sum += (UInt32s)low[r][c][1] + ((UInt32s)high[r][c][1] << 8);
      sum -= (UInt32s)zeros[c] * (uint32_t)x_sums[r];
      float* to = result + r * kPanel + c * kLanes;
      store(to, to_floats((Int32s)sum) * x_scales[r] * scales[c] + load<Floats>(to));
    }
}

template <bool kFourBits>
void multiply_few(const Weight& weight, const SplitActivations& x, const Item& item, int64_t panel, const Output& out,
                  Scratch& scratch) {
  constexpr int kStepBytes = (kFourBits ? 4 : 8) * kPanel;
  const int64_t rows = item.rows(), stored = item.expert * weight.panels + panel;
  float* sums = scratch.sums.room(rows * kPanel);
  std::fill_n(sums, rows * kPanel, 0.0f);
  const uint8_t* codes = weight.codes + stored * (weight.features / kStep) * kStepBytes;
  for (int64_t index = 0; index * x.block < x.features; ++index) {
    const int64_t first = (stored * weight.groups + index * x.block / weight.group) * kPanel;
    const int64_t steps = x.length(index) / kStep, place = index * x.rows + item.begin;
    Floats scales[kVectors];
    Int32s zeros[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      scales[v] = weight.scales_at(first + v * kLanes);
      zeros[v] = weight.zeros_at(first + v * kLanes) + (kFourBits ? 0 : 128);
    }
    const auto multiply = rows == 1 ? multiply_few<1, kFourBits> : multiply_few<2, kFourBits>;
    multiply(codes, steps, x.row_bytes(index, item.begin), x.scales + place, x.sums + place, scales, zeros, sums);
    codes += steps * kStepBytes;
  }
  finish_rows(sums, item, x.planes, panel, out);
}

#endif

}  // namespace qcompile
