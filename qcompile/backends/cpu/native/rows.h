// One panel of a weight times few rows of integer activations, in registers: weights are unpacked where they are used.
#pragma once

#include "activations.h"
#include "jobs.h"

namespace qcompile {

// Sums [row][channel] of an item to the output, the planes of each row added.
inline void finish_rows(const float* sums, const Item& item, int64_t planes, int64_t panel, const Output& out) {
  finish(item.begin / planes, item.rows() / planes, panel, out, [&](int64_t i, int v) {
    const float* from = sums + i * planes * kPanel + v * kLanes;
    Floats sum = load<Floats>(from);
    for (int64_t plane = 1; plane < planes; ++plane) sum += load<Floats>(from + plane * kPanel);
    return sum;
  });
}

// Block by block.
template <class Mode, template <class> class Codes>
void multiply_rows(const Weight& weight, const Activations<Mode>& x, const Item& item, int64_t panel, const Output& out,
                   Scratch& scratch) {
  const int64_t rows = item.rows(), stored = item.expert * weight.panels + panel;
  float* sums = scratch.sums.room(rows * kPanel);
  std::fill_n(sums, rows * kPanel, 0.0f);
  const bool unpacks = Codes<Mode>::kPacked && rows > kDirectRows;
  uint8_t* space = scratch.space.room(unpacks ? x.block / kStep * Unpacked<Mode>::kStepBytes : 0);

  Codes<Mode> codes{weight.codes + stored * (weight.features / kStep) * Codes<Mode>::kStepBytes, {}};
  for (int v = 0; v < kVectors; ++v) codes.zeros[v] = repeated<Mode>(Int32s{} + weight.zero);
  Block<Mode> block;
  for (int64_t index = 0; index < x.blocks(); ++index) {
    block.steps = x.length(index) / kStep;
    block.x = x.row_codes(index, item.begin);
    block.x_scales = x.row_scales(index, item.begin);
    block.x_offsets = x.offsets + item.begin;
    const int64_t first = (stored * weight.groups + index * x.block / weight.group) * kPanel;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int64_t channel = first + v * kLanes;
      block.scales[v] = weight.scales_at(channel);
      if (weight.zeros) codes.zeros[v] = repeated<Mode>(weight.zeros_at(channel));
      if constexpr (!is_wide<Mode>) block.sums[v] = load<Int32s>(weight.sums + channel);
    }
    multiply(codes, block, rows, space, sums);
    codes.codes += block.steps * Codes<Mode>::kStepBytes;
  }
  finish_rows(sums, item, x.planes, panel, out);
}

template <class Mode>
void multiply_rows(const Weight& weight, const Activations<Mode>& x, const Item& item, int64_t panel, const Output& out,
                   Scratch& scratch) {
  if (weight.four_bits) multiply_rows<Mode, Codes4>(weight, x, item, panel, out, scratch);
  else multiply_rows<Mode, Codes8>(weight, x, item, panel, out, scratch);
}

}  // namespace qcompile
