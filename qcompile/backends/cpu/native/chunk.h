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
constexpr int kMostQueries = kVectorBytes == 64 ? 8 : 4;  // of many, that share what is loaded: registers hold so many

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
  void include(const Range& other) {
    if (other.empty()) return;
    from = std::min(from, other.from);
    to = std::max(to, other.to);
  }
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

// What is multiplied where many queries share keys and values, in words of 32 bits: a float, or two of bfloat16.
struct Singles {
  static constexpr int kNumbers = 1;

  // kLanes words of a row of `type`
  static Floats load_words(const char* from, Type type) { return load_floats(from, type); }
  // kLanes numbers of one position, and nothing of the next
  static Floats join(const char* from, const char*, Type type) { return from ? load_floats(from, type) : Floats{}; }
  static Floats add_product(Floats sum, Floats right, float left) { return sum + right * left; }
  static void pack(float*, const Range&) {}
};

#if defined(QCOMPILE_BF16)
struct Pairs {
  static constexpr int kNumbers = 2;

  static Floats load_words(const char* from, Type) { return load<Floats>(from); }
  static Floats join(const char* from, const char* next, Type) {
    const auto low = from ? load<HalfWidth>(from) : HalfWidth{}, high = next ? load<HalfWidth>(next) : HalfWidth{};
    return (Floats)(__builtin_convertvector(low, UInt32s) | __builtin_convertvector(high, UInt32s) << 16);
  }
  static Floats add_product(Floats sum, Floats right, float left) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)right, (__m512bh)_mm512_set1_ps(left));
  }
  // The floats of a range to bfloat16, from the beginning of the line on
  static void pack(float* line, const Range& range) {
    for (int64_t p = range.from / (2 * kLanes) * 2 * kLanes; p < range.to; p += 2 * kLanes) {
      const Floats low = load<Floats>(line + p), high = load<Floats>(line + p + kLanes);
      store(line + p / 2, (Floats)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
    }
  }
};
#endif

// Keys [positions, width] of a range -> words [width / kNumbers, kChunk], zeros beside the range in its first and last
// vector.
template <Type kType, class Words>
void turn_keys(const Heads& keys, const Range& range, float* turned) {
  const int64_t words = keys.width / Words::kNumbers;
  for (int64_t p = range.first_vector(); p < range.to; p += kLanes)
    for (int64_t i = 0; i < words; i += kLanes) {
      Floats block[kLanes];
      for (int r = 0; r < kLanes; ++r) {
        const bool inside = p + r >= range.from && p + r < range.to;
        block[r] = inside ? Words::load_words(keys.element(p + r, i * Words::kNumbers), kType) : Floats{};
      }
      transpose(block);
      for (int r = 0; r < kLanes; ++r) store(turned + (i + r) * kChunk + p, block[r]);
    }
}

// Values [positions, width] of a range -> words [kChunk / kNumbers, width], zeros beside the range in its first and
// last word.
template <Type kType, class Words>
void join_values(const Heads& values, const Range& range, float* joined) {
  const auto place = [&](int64_t p, int64_t i) {
    return p >= range.from && p < range.to ? values.element(p, i) : nullptr;
  };
  for (int64_t word = range.from / Words::kNumbers; word * Words::kNumbers < range.to; ++word)
    for (int64_t i = 0; i < values.width; i += kLanes) {
      const int64_t p = word * Words::kNumbers;
      store(joined + word * values.width + i, Words::join(place(p, i), place(p + 1, i), kType));
    }
}

// A matrix of words.
struct Matrix {
  const float* data;
  int64_t stride;
};

// result[q, i] = result[q, i] * factor[q] + scale * sum over words from .. to of left[q, word] * right[word, i], for
// kQueries rows and kWide vectors
template <class Words, int kQueries, int kWide>
void multiply_words(const Matrix& left, const Matrix& right, int64_t from, int64_t to, const float* factor, float scale,
                    float* result, int64_t stride) {
  Floats sums[kQueries][kWide] = {};
  for (int64_t word = from; word < to; ++word) {
#pragma GCC unroll 2
    for (int v = 0; v < kWide; ++v) {
      const Floats part = load<Floats>(right.data + word * right.stride + v * kLanes);
#pragma GCC unroll 8
      for (int q = 0; q < kQueries; ++q)
        sums[q][v] = Words::add_product(sums[q][v], part, left.data[q * left.stride + word]);
    }
  }
  for (int q = 0; q < kQueries; ++q)
    for (int v = 0; v < kWide; ++v) {
      float* place = result + q * stride + v * kLanes;
      store(place, load<Floats>(place) * factor[q] + sums[q][v] * scale);
    }
}

// kQueries of many queries attend to a range of positions. query: words [kQueries, width / kNumbers]; turned, joined:
// what turn_keys and join_values make; scores: float [kQueries, kChunk], the mask; made: float [kQueries, width of
// values], not normalized.
template <class Words, int kQueries>
void attend_prepared(const float* query, const float* turned, const float* joined, int64_t width, int64_t value_width,
                     float scale, const Range& range, float* scores, float* made, Softmax* softmax) {
  constexpr int kNumbers = Words::kNumbers;
  const int64_t words = width / kNumbers, end = ceil_div(range.to, kNumbers);
  float factor[kQueries];
  std::fill_n(factor, kQueries, 1.f);
  for (int64_t p = range.first_vector(); p < range.to;) {
    const bool wide = p + kLanes < range.to;
    const auto run = wide ? multiply_words<Words, kQueries, 2> : multiply_words<Words, kQueries, 1>;
    run({query, words}, {turned + p, kChunk}, 0, words, factor, scale, scores + p, kChunk);
    p += wide ? 2 * kLanes : kLanes;
  }
  for (int q = 0; q < kQueries; ++q) {
    factor[q] = softmax[q].add(scores + q * kChunk, range);
    Words::pack(scores + q * kChunk, range);
  }
  for (int64_t i = 0; i < value_width;) {
    const bool wide = i + 2 * kLanes <= value_width;
    const auto run = wide ? multiply_words<Words, kQueries, 2> : multiply_words<Words, kQueries, 1>;
    run({scores, kChunk}, {joined + i, value_width}, range.from / kNumbers, end, factor, 1.f, made + i, value_width);
    i += wide ? 2 * kLanes : kLanes;
  }
}

// Add the scores of kQueries queries, float [kQueries, width], to scores, float [kQueries, kChunk].
template <Type kType, int kQueries>
void add_scores(const float* query, const Heads& keys, float scale, const Range& range, float* scores) {
  const int64_t width = keys.width;
  for (int64_t p = range.from; p < range.to; ++p) {
    const char* key = keys.element(p, 0);
    for (int64_t line = 0; line < width * size_of(kType); line += 64) __builtin_prefetch(key + kAhead + line);
    Floats sums[kQueries] = {};
    for (int64_t i = 0; i < width; i += kLanes) {
      const Floats part = load_floats(key + i * size_of(kType), kType);
#pragma GCC unroll 4
      for (int q = 0; q < kQueries; ++q) sums[q] += part * load<Floats>(query + q * width + i);
    }
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) scores[q * kChunk + p] += total(sums[q]) * scale;
  }
}

// made[query, i] = made[query, i] * factor[query] + sum over positions of scores[query, position] * value, for kWide
// vectors from i on
template <Type kType, int kQueries, int kWide>
void add_values(const float* scores, const float* factor, const Heads& values, const Range& range, int64_t i,
                float* made) {
  Floats sums[kQueries][kWide];
  for (int q = 0; q < kQueries; ++q)
    for (int v = 0; v < kWide; ++v) sums[q][v] = load<Floats>(made + q * values.width + i + v * kLanes) * factor[q];
  for (int64_t p = range.from; p < range.to; ++p) {
    const char* value = values.element(p, i);
    for (int64_t line = 0; line < kWide * kLanes * size_of(kType); line += 64)
      __builtin_prefetch(value + kAhead + line);
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) {
      const Floats part = load_floats(value + v * kLanes * size_of(kType), kType);
#pragma GCC unroll 4
      for (int q = 0; q < kQueries; ++q) sums[q][v] += part * scores[q * kChunk + p];
    }
  }
  for (int q = 0; q < kQueries; ++q)
    for (int v = 0; v < kWide; ++v) store(made + q * values.width + i + v * kLanes, sums[q][v]);
}

// The same of so few queries that preparing keys and values does not pay; query: float [kQueries, width].
template <Type kType, int kQueries>
void attend_directly(const float* query, const Heads& keys, const Heads& values, float scale, const Range& range,
                     float* scores, float* made, Softmax* softmax) {
  add_scores<kType, kQueries>(query, keys, scale, range, scores);
  float factor[kQueries];
  for (int q = 0; q < kQueries; ++q) factor[q] = softmax[q].add(scores + q * kChunk, range);
  constexpr int kWide = kVectorBytes == 64 ? 4 : 2;  // with four queries, as many sums as registers hold
  int64_t i = 0;
  for (; i + kWide * kLanes <= values.width; i += kWide * kLanes)
    add_values<kType, kQueries, kWide>(scores, factor, values, range, i, made);
  for (; i < values.width; i += kLanes) add_values<kType, kQueries, 1>(scores, factor, values, range, i, made);
}

}  // namespace qcompile
