// Products of integer activations with one panel of a prepared weight.
//
// A weight W[n, k] = (q[n, k] - z[n, g]) * s[n, g] is stored in panels of 64 output channels; a step is 8 input features.
//   codes, 4 bits  uint8 [panel][step][64][4]     byte t of a channel: code of feature t (low half), of 4 + t (high half)
//   codes, 8 bits  int8  [panel][step][2][64][4]  byte t of half h: code of feature 4 h + t, minus 128
//   scales         float [panel][group][64]
//   zeros          int8  [panel][group][64]       minus 128 for 8 bits; not there where all are the same
//   sums           int32 [panel][group][64]       sum of q - z over the group; only for activations of 8 bits
// The codes of a panel lie one after the other: for a single row of activations, memory is read from begin to end.
#pragma once

#include "simd.h"

namespace qcompile {

constexpr int kPanel = 64;
constexpr int kStep = 8;
constexpr int kVectors = kPanel / kLanes;             // of 32-bit sums, for the channels of a panel
constexpr int kTileRows = kVectors == 4 ? 6 : 3;      // times 4 vectors: as many sums as the registers hold
constexpr int kDirectRows = kVectors == 4 ? 8 : 4;    // up to here, each tile of rows unpacks the weights for itself
constexpr int64_t kPrefetch = 8192;                   // bytes ahead: a quarter more bandwidth on Zen 5

// ----------------------------------------------------------------------------------------- modes: kinds of dot products

// Activations as 16-bit integers. A part of a step is two features: 0 and 2, 1 and 3, 4 and 6, 5 and 7.
struct Wide {
  using Code = int16_t;
  using Weights = Int16s;
  static constexpr int kParts = 4;

  static Int32s dot(Int32s sum, Weights w, const Code* two) {
    return dot_16(sum, w, (Int16s)(Int32s{} + load<int32_t>(two)));
  }
};

// Activations as 8-bit integers. A part of a step is four features in order.
struct Bytes {
  using Code = int8_t;
  using Weights = Int8s;
  static constexpr int kParts = 2;
};

#if defined(QCOMPILE_VNNI)
// The same plus 128
struct Narrow : Bytes {
  using Code = uint8_t;

  static Int32s dot(Int32s sum, Weights w, const Code* four) {
    return dot_8(sum, w, (UInt8s)(Int32s{} + load<int32_t>(four)));
  }
};
#endif

template <class Mode>
constexpr bool is_wide = Mode::kParts == 4;

// ------------------------------------------------------------------------------ weights of a panel, as integers q - z

// Zero points of some channels as a dot product wants them: one for each feature of a lane.
template <class Mode>
inline typename Mode::Weights repeated(Int32s zeros) {
  if constexpr (is_wide<Mode>) return (Int16s)((zeros & 0xffff) | zeros << 16);
  else return (Int8s)((zeros & 0xff) * 0x01010101);
}

template <class Mode>
struct Codes4 {
  static constexpr int kStepBytes = 4 * kPanel;
  static constexpr bool kPacked = true;
  const uint8_t* codes;
  typename Mode::Weights zeros[kVectors];

  typename Mode::Weights part(int64_t step, int i, int vector) const {
    const auto bits = load<UInt16s>(codes + step * kStepBytes + vector * kVectorBytes);
    if constexpr (is_wide<Mode>) {
      const int digit = i >> 1 | (i & 1) << 1;  // the codes of features 0, 4, 1, 5 begin at bits 0, 4, 8, 12
      return (Int16s)(bits >> 4 * digit & 15) - zeros[vector];
    } else {
      return (Int8s)(bits >> 4 * i & 0x0f0f) - zeros[vector];
    }
  }
};

template <class Mode>
struct Codes8 {
  static constexpr int kStepBytes = 8 * kPanel;
  static constexpr bool kPacked = is_wide<Mode>;  // else they are what a dot product reads: q - z where z is 128
  const uint8_t* codes;
  typename Mode::Weights zeros[kVectors];

  typename Mode::Weights part(int64_t step, int i, int vector) const {
    const int half = is_wide<Mode> ? i >> 1 : i;
    const auto bits = load<Int16s>(codes + step * kStepBytes + half * 4 * kPanel + vector * kVectorBytes);
    if constexpr (is_wide<Mode>) return (i & 1 ? bits >> 8 : (Int16s)((UInt16s)bits << 8) >> 8) - zeros[vector];
    else return (Int8s)bits;
  }
};

// What `unpack` wrote: [step][part][vector]
template <class Mode>
struct Unpacked {
  static constexpr int kStepBytes = Mode::kParts * kVectors * kVectorBytes;
  static constexpr bool kPacked = false;
  const uint8_t* codes;

  typename Mode::Weights part(int64_t step, int i, int vector) const {
    return load<typename Mode::Weights>(codes + step * kStepBytes + (i * kVectors + vector) * kVectorBytes);
  }
};

template <class Weights>
inline void prefetch(const Weights& weights, int64_t step) {
#pragma GCC unroll 8
  for (int line = 0; line < Weights::kStepBytes; line += 64)
    __builtin_prefetch(weights.codes + step * Weights::kStepBytes + kPrefetch + line);
}

template <class Mode, class Weights>
inline void unpack(const Weights& weights, int64_t steps, uint8_t* to) {
  for (int64_t step = 0; step < steps; ++step) {
    prefetch(weights, step);
#pragma GCC unroll 4
    for (int i = 0; i < Mode::kParts; ++i)
#pragma GCC unroll 8
      for (int vector = 0; vector < kVectors; ++vector, to += kVectorBytes) store(to, weights.part(step, i, vector));
  }
}

// ------------------------------------------------------------------------------------------------ products of a block

// Some consecutive input features of one group, for one panel and some rows.
template <class Mode>
struct Block {
  int64_t steps;
  const typename Mode::Code* x;  // [rows][steps * kStep]
  const float* x_scales;         // [rows]
  const int32_t* x_offsets;      // [rows]: what was added to the codes of x; not for Wide
  Floats scales[kVectors];
  Int32s sums[kVectors];         // of q - z; not for Wide
};

// result[row][channel] += x_scale * scale * sum of x * (q - z), for kRows rows and the channels of kCols vectors
template <class Mode, int kRows, int kCols, class Weights>
inline void multiply_tile(const Weights& weights, const Block<Mode>& block, int64_t row, int first, float* result) {
  constexpr int kChains = kRows * kCols < 8 ? 2 : 1;  // enough sums at a time to hide how long one takes
  const int64_t length = block.steps * kStep;
  const auto* x = block.x + row * length;
  Int32s sums[kRows][kCols][kChains] = {};
  if constexpr (!is_wide<Mode>) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kCols; ++c) sums[r][c][0] = -block.x_offsets[row + r] * block.sums[first + c];
  }
  for (int64_t step = 0; step < block.steps; ++step) {
    if constexpr (Weights::kPacked) prefetch(weights, step);
#pragma GCC unroll 4
    for (int i = 0; i < Mode::kParts; ++i) {
      typename Mode::Weights w[kCols];
#pragma GCC unroll 4
      for (int c = 0; c < kCols; ++c) w[c] = weights.part(step, i, first + c);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < kCols; ++c) {
          Int32s& sum = sums[r][c][i % kChains];
          sum = Mode::dot(sum, w[c], x + r * length + (step * Mode::kParts + i) * (kStep / Mode::kParts));
        }
    }
  }
  float* corner = result + row * kPanel + first * kLanes;
  const float* x_scales = block.x_scales + row;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c) {
      Int32s sum = sums[r][c][0];
      if constexpr (kChains == 2) sum += sums[r][c][1];
      float* to = corner + r * kPanel + c * kLanes;
      store(to, to_floats(sum) * x_scales[r] * block.scales[first + c] + load<Floats>(to));
    }
}

// The same for `rows` rows, at most kMostRows.
template <class Mode, int kMostRows, int kCols, class Weights>
inline void multiply_some(
    const Weights& weights, const Block<Mode>& block, int64_t row, int64_t rows, int first, float* result) {
  if constexpr (kMostRows > 1)
    if (rows < kMostRows) return multiply_some<Mode, kMostRows - 1, kCols>(weights, block, row, rows, first, result);
  multiply_tile<Mode, kMostRows, kCols>(weights, block, row, first, result);
}

// All rows and channels of a block, in tiles of nearly equal numbers of rows.
template <class Mode, int kMostRows, int kCols, class Weights>
inline void multiply_block(const Weights& weights, const Block<Mode>& block, int64_t rows, float* result) {
  const int64_t tiles = (rows + kMostRows - 1) / kMostRows;
  for (int first = 0; first < kVectors; first += kCols)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t begin = rows * tile / tiles, end = rows * (tile + 1) / tiles;
      multiply_some<Mode, kMostRows, kCols>(weights, block, begin, end - begin, first, result);
    }
}

// The same by the way that suits the number of rows. `space` holds the block unpacked where it has to be.
template <class Mode, class Weights>
inline void multiply(const Weights& weights, const Block<Mode>& block, int64_t rows, uint8_t* space, float* result) {
  if constexpr (!Weights::kPacked) {
    multiply_block<Mode, kTileRows, 4>(weights, block, rows, result);
  } else if (rows <= kDirectRows / 2) {
    multiply_block<Mode, kDirectRows / 2, 4>(weights, block, rows, result);
  } else if (rows <= kDirectRows) {
    multiply_block<Mode, kDirectRows, 2>(weights, block, rows, result);
  } else {
    unpack<Mode>(weights, block.steps, space);
    multiply_block<Mode, kTileRows, 4>(Unpacked<Mode>{space}, block, rows, result);
  }
}

}  // namespace qcompile
