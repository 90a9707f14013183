// Attention of a few queries that share their keys and values, to one chunk of positions.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "weight.h"

namespace qcompile {

constexpr int64_t kChunk = 256;     // positions
constexpr int64_t kHeadWidth = 16;  // of which the elements of a head are a multiple
constexpr int64_t kAhead = 4096;    // bytes from what is read to what is asked for: a cache is in pages of that size
constexpr float kExcluded = -std::numeric_limits<float>::infinity();
constexpr int kMostQueries = kVectorBytes == 64 ? 8 : 4;  // that share what is loaded: as many as registers hold

// [batch, heads, positions, width] of a float type, the elements of each position side by side.
struct Heads {
  const char* data;
  Type type;
  int64_t batch, head, position, width;  // strides in bytes, and elements

  explicit Heads(const Tensor& t)
      : data(static_cast<const char*>(t.data_ptr())), type(type_of(t.scalar_type())),
        batch(t.stride(0) * t.element_size()), head(t.stride(1) * t.element_size()),
        position(t.stride(2) * t.element_size()), width(t.size(3)) {}

  Heads at(int64_t b, int64_t h, int64_t p) const {
    Heads rest = *this;
    rest.data += b * batch + h * head + p * position;
    return rest;
  }
  const char* element(int64_t p, int64_t i) const { return data + p * position + i * size_of(type); }
};

// `count` numbers of `type` as floats.
inline void copy_floats(const char* from, Type type, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load_floats(from + i * size_of(type), type));
  if (i == count) return;
  char rest[kVectorBytes] = {};
  std::memcpy(rest, from + i * size_of(type), (count - i) * size_of(type));
  const Floats last = load_floats(rest, type);
  std::memcpy(to + i, &last, (count - i) * sizeof(float));
}

// Positions of a chunk.
struct Range {
  int64_t from = kChunk, to = 0;

  bool empty() const { return from >= to; }
  void include(const Range& other) { from = std::min(from, other.from), to = std::max(to, other.to); }
  int64_t first_vector() const { return from / kLanes * kLanes; }
};

// From the first to the last of `count` positions that a line of kChunk scores does not exclude.
inline Range seen(const float* line, int64_t count) {
  const Floats none = Floats{} + kExcluded;
  const auto nothing = [&](int64_t p) { return std::memcmp(line + p, &none, sizeof none) == 0; };
  Range range{0, count};
  while (range.from + kLanes <= range.to && nothing(range.from)) range.from += kLanes;
  while (range.from < range.to && line[range.from] == kExcluded) ++range.from;
  while (range.to >= range.from + kLanes && nothing(range.to - kLanes)) range.to -= kLanes;
  while (range.from < range.to && line[range.to - 1] == kExcluded) --range.to;
  return range;
}

// The softmax of the positions so far: the largest score, and the sum of exp(score - largest).
struct Softmax {
  float largest = kExcluded, sum = 0;

  // Scores of a line become exp(score - largest), in place; returns what earlier weights are multiplied with.
  float add(float* line, const Range& range) {
    Floats most = Floats{} + kExcluded, added = {};
    for (int64_t p = range.first_vector(); p < range.to; p += kLanes) {
      const Floats v = load<Floats>(line + p);
      most = v > most ? v : most;
    }
    const float before = largest;
    for (int i = 0; i < kLanes; ++i) largest = std::max(largest, most[i]);
    const float from = largest == kExcluded ? 0.f : largest;
    for (int64_t p = range.first_vector(); p < range.to; p += kLanes) {
      const Floats weight = exp_of(load<Floats>(line + p) - from);
      store(line + p, weight);
      added += weight;
    }
    const float factor = before == kExcluded ? 0.f : std::exp(before - largest);
    sum = sum * factor + total(added);
    return factor;
  }
};

// Keys [positions, width] of a range -> float [width, kChunk], zeros beside the range in its first and last vector.
template <Type kType>
void turn_keys(const Heads& keys, const Range& range, float* turned) {
  for (int64_t p = range.first_vector(); p < range.to; p += kLanes)
    for (int64_t i = 0; i < keys.width; i += kLanes) {
      Floats block[kLanes];
      for (int r = 0; r < kLanes; ++r)
        block[r] = p + r >= range.from && p + r < range.to ? load_floats(keys.element(p + r, i), kType) : Floats{};
      transpose(block);
      for (int r = 0; r < kLanes; ++r) store(turned + (i + r) * kChunk + p, block[r]);
    }
}

// Add the scores of kQueries queries, float [kQueries, width], at the kWide vectors from position p on.
template <int kQueries, int kWide>
void add_turned_scores(const float* query, const float* turned, int64_t width, int64_t p, float* scores) {
  Floats sums[kQueries][kWide] = {};
  for (int64_t i = 0; i < width; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kWide; ++v) {
      const Floats keys = load<Floats>(turned + i * kChunk + p + v * kLanes);
#pragma GCC unroll 8
      for (int q = 0; q < kQueries; ++q) sums[q][v] += keys * query[q * width + i];
    }
  }
  for (int q = 0; q < kQueries; ++q)
    for (int v = 0; v < kWide; ++v) {
      float* to = scores + q * kChunk + p + v * kLanes;
      store(to, load<Floats>(to) + sums[q][v]);
    }
}

// The same of keys as they are, for so few queries that turning them does not pay.
template <Type kType, int kQueries>
void add_scores(const float* query, const Heads& keys, const Range& range, float* scores) {
  const int64_t width = keys.width;
  for (int64_t p = range.from; p < range.to; ++p) {
    const char* key = keys.element(p, 0);
    for (int64_t line = 0; line < width * size_of(kType); line += 64) __builtin_prefetch(key + kAhead + line);
    Floats sums[kQueries] = {};
    for (int64_t i = 0; i < width; i += kLanes) {
      const Floats part = load_floats(key + i * size_of(kType), kType);
#pragma GCC unroll 8
      for (int q = 0; q < kQueries; ++q) sums[q] += part * load<Floats>(query + q * width + i);
    }
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q) scores[q * kChunk + p] += total(sums[q]);
  }
}

// made[query, i] = made[query, i] * factor[query] + sum over positions of scores[query, position] * value, for kWide
// vectors from i on
template <Type kType, int kQueries, int kWide>
void add_values(const float* scores, const float* factor, const Heads& values, const Range& range, int64_t i, float* made) {
  Floats sums[kQueries][kWide];
  for (int q = 0; q < kQueries; ++q)
    for (int v = 0; v < kWide; ++v) sums[q][v] = load<Floats>(made + q * values.width + i + v * kLanes) * factor[q];
  for (int64_t p = range.from; p < range.to; ++p) {
    const char* value = values.element(p, i);
    for (int64_t line = 0; line < kWide * kLanes * size_of(kType); line += 64) __builtin_prefetch(value + kAhead + line);
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) {
      const Floats part = load_floats(value + v * kLanes * size_of(kType), kType);
#pragma GCC unroll 8
      for (int q = 0; q < kQueries; ++q) sums[q][v] += part * scores[q * kChunk + p];
    }
  }
  for (int q = 0; q < kQueries; ++q)
    for (int v = 0; v < kWide; ++v) store(made + q * values.width + i + v * kLanes, sums[q][v]);
}

// kQueries queries attend to a range of positions. query: float [kQueries, width]; turned: the keys as turn_keys makes
// them, or null; scores: float [kQueries, kChunk], the mask; made: float [kQueries, value width], not normalized.
template <Type kType, int kQueries>
void attend_chunk(const float* query, const Heads& keys, const float* turned, const Heads& values, const Range& range,
                  float* scores, float* made, Softmax* softmax) {
  if (turned) {
    int64_t p = range.first_vector();
    for (; p + kLanes < range.to; p += 2 * kLanes) add_turned_scores<kQueries, 2>(query, turned, keys.width, p, scores);
    if (p < range.to) add_turned_scores<kQueries, 1>(query, turned, keys.width, p, scores);
  } else {
    add_scores<kType, kQueries>(query, keys, range, scores);
  }
  float factor[kQueries];
  for (int q = 0; q < kQueries; ++q) factor[q] = softmax[q].add(scores + q * kChunk, range);
  constexpr int kWide = 2 * kMostQueries / std::max(kQueries, kMostQueries / 2);
  int64_t i = 0;
  for (; i + kWide * kLanes <= values.width; i += kWide * kLanes)
    add_values<kType, kQueries, kWide>(scores, factor, values, range, i, made);
  for (; i < values.width; i += kLanes) add_values<kType, kQueries, 1>(scores, factor, values, range, i, made);
}

}  // namespace qcompile
