// Attention of one new token to the keys and values of a cache, whose heads several query heads may share.
//
// A position is read once for up to four query heads that share it, and not at all before the first or behind the last
// of a chunk that the mask shows, so that the unused end of a static cache costs nothing. Positions are taken in chunks,
// whose softmaxes are joined afterwards: a result does not depend on the number of threads.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "team.h"
#include "weight.h"

namespace qcompile {

constexpr int64_t kChunk = 256;     // positions that one task attends to
constexpr int64_t kHeadWidth = 16;  // of which the elements of a head are a multiple
constexpr int64_t kAhead = 4096;    // bytes from what is read to what is asked for: a cache is in pages of that size
constexpr float kExcluded = -std::numeric_limits<float>::infinity();

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

// The softmax of one chunk of positions: its largest score, and the sum of exp(score - largest).
struct Softmax {
  float largest, sum;
};

// Add the scores of kHeads queries, float [kHeads, width] each, at positions from .. to to line[head * kChunk +
// position], which holds the mask.
template <Type kType, int kHeads>
void add_scores(const float* query, const Heads& keys, int64_t from, int64_t to, float* line) {
  const int64_t width = keys.width;
  for (int64_t p = from; p < to; ++p) {
    const char* key = keys.element(p, 0);
    for (int64_t line = 0; line < width * size_of(kType); line += 64) __builtin_prefetch(key + kAhead + line);
    Floats sums[kHeads] = {};
    for (int64_t i = 0; i < width; i += kLanes) {
      const Floats part = load_floats(key + i * size_of(kType), kType);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) sums[h] += part * load<Floats>(query + h * width + i);
    }
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) line[h * kChunk + p] += total(sums[h]);
  }
}

// kChunk scores become exp(score - largest), in place.
inline Softmax exponentiate(float* line) {
  Floats most = load<Floats>(line), sum = {};
  for (int64_t p = kLanes; p < kChunk; p += kLanes) {
    const Floats v = load<Floats>(line + p);
    most = v > most ? v : most;
  }
  float largest = kExcluded;
  for (int i = 0; i < kLanes; ++i) largest = std::max(largest, most[i]);
  const float from = largest == kExcluded ? 0.f : largest;
  for (int64_t p = 0; p < kChunk; p += kLanes) {
    const Floats weight = exp_of(load<Floats>(line + p) - from);
    store(line + p, weight);
    sum += weight;
  }
  return {largest, total(sum)};
}

// result[head * width + i] = sum over positions of line[head * kChunk + position] * value, for kWide vectors from i on
template <Type kType, int kHeads, int kWide>
void add_values(const float* line, const Heads& values, int64_t from, int64_t to, int64_t i, float* result) {
  Floats sums[kHeads][kWide] = {};
  for (int64_t p = from; p < to; ++p) {
    const char* value = values.element(p, i);
    for (int64_t line = 0; line < kWide * kLanes * size_of(kType); line += 64) __builtin_prefetch(value + kAhead + line);
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) {
      const Floats part = load_floats(value + v * kLanes * size_of(kType), kType);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) sums[h][v] += part * line[h * kChunk + p];
    }
  }
  for (int h = 0; h < kHeads; ++h)
    for (int v = 0; v < kWide; ++v) store(result + h * values.width + i + v * kLanes, sums[h][v]);
}

// Positions from .. to of one chunk for kHeads queries; line: float [kHeads, kChunk], the mask; result: float [kHeads,
// width], not normalized.
template <Type kType, int kHeads>
void attend_chunk(const float* query, const Heads& keys, const Heads& values, int64_t from, int64_t to, float* line,
                  float* result, Softmax* softmax) {
  add_scores<kType, kHeads>(query, keys, from, to, line);
  for (int h = 0; h < kHeads; ++h) softmax[h] = exponentiate(line + h * kChunk);
  int64_t i = 0;
  for (; i + 4 * kLanes <= values.width; i += 4 * kLanes)
    add_values<kType, kHeads, 4>(line, values, from, to, i, result);
  for (; i < values.width; i += kLanes) add_values<kType, kHeads, 1>(line, values, from, to, i, result);
}

template <Type kType>
auto attend_chunk_of(int64_t heads) {
  return heads == 4 ? attend_chunk<kType, 4> : heads == 2 ? attend_chunk<kType, 2> : attend_chunk<kType, 1>;
}

// The chunks of one query: parts float [chunks, width] and their softmaxes -> `width` elements at `to`.
inline void join(const float* parts, const Softmax* softmax, int64_t chunks, int64_t width, char* to, Type type) {
  float largest = kExcluded, sum = 0;
  for (int64_t c = 0; c < chunks; ++c) largest = std::max(largest, softmax[c].largest);
  std::vector<float> share(chunks);
  for (int64_t c = 0; c < chunks; ++c) {
    share[c] = softmax[c].largest == kExcluded ? 0.f : std::exp(softmax[c].largest - largest);
    sum += share[c] * softmax[c].sum;
  }
  for (int64_t i = 0; i < width; i += kLanes) {
    Floats all = {};
    for (int64_t c = 0; c < chunks; ++c) all += load<Floats>(parts + c * width + i) * (sum == 0 ? 0.f : share[c] / sum);
    store_floats(to + i * size_of(type), type, all);
  }
}

// What `attend_into` takes, or an error.
inline void check_attend(const Tensor& q, const Tensor& k, const Tensor& v) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && q.size(2) == 1, "qcompile_cpu: attend is for one query row");
  const int64_t batch = q.size(0), heads = q.size(1), shared = k.size(1), positions = k.size(2), width = v.size(3);
  TORCH_CHECK(k.size(0) == batch && v.size(0) == batch && v.size(1) == shared && v.size(2) == positions &&
                  k.size(3) == q.size(3) && shared > 0 && heads % shared == 0,
              "qcompile_cpu: q ", q.sizes(), ", k ", k.sizes(), " and v ", v.sizes(), " do not fit");
  TORCH_CHECK(k.scalar_type() == v.scalar_type(), "qcompile_cpu: k and v must have one dtype");
  TORCH_CHECK(q.size(3) % kHeadWidth == 0 && width % kHeadWidth == 0, "qcompile_cpu: heads must be multiples of ",
              kHeadWidth, " wide, not ", q.size(3), " and ", width);
}

// q [batch, heads, 1, width], k [batch, shared, positions, width], v [batch, shared, positions, value width], mask [batch,
// heads, 1, positions], which is added to the scaled scores -> [batch, heads, 1, value width]. A query that may see no
// position gets zeros.
inline void attend_into(const Tensor& result, const Tensor& q, const Tensor& k, const Tensor& v,
                        const optional<Tensor>& mask, double scale) {
  const int64_t batch = q.size(0), heads = q.size(1), shared = k.size(1), positions = k.size(2), width = v.size(3);
  const auto side_by_side = [](const Tensor& t) { return t.stride(3) == 1 ? t : t.contiguous(); };
  const Tensor k_rows = side_by_side(k), v_rows = side_by_side(v);
  const Tensor q_rows = side_by_side(q);
  const Tensor mask_rows = mask ? side_by_side(*mask) : Tensor();
  const Heads queries(q_rows), keys(k_rows), values(v_rows);
  const auto added = mask ? optional<Heads>(mask_rows) : std::nullopt;
  const int64_t group = heads / shared, chunks = std::max<int64_t>(1, ceil_div(positions, kChunk));
  const Buffer<float> parts(batch * heads * chunks * width);
  std::vector<Softmax> softmax(batch * heads * chunks);
  parallel(batch * shared * chunks, 1, [&](int64_t from, int64_t to) {
    alignas(64) float line[4 * kChunk];
    Softmax found[4];
    std::vector<float> query(4 * keys.width), made(4 * width);
    for (int64_t task = from; task < to; ++task) {
      const int64_t chunk = task % chunks, b = task / chunks / shared, h = task / chunks % shared;
      const int64_t begin = chunk * kChunk, count = std::min(kChunk, positions - begin);
      for (int64_t first = h * group, some; first < (h + 1) * group; first += some) {
        const int64_t left = (h + 1) * group - first;
        some = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        std::fill_n(line, some * kChunk, kExcluded);
        int64_t seen_from = count, seen_to = 0;
        for (int64_t i = 0; i < some; ++i) {
          float *own = line + i * kChunk, *row = query.data() + i * keys.width;
          copy_floats(queries.at(b, first + i, 0).data, queries.type, keys.width, row);
          for (int64_t j = 0; j < keys.width; ++j) row[j] *= static_cast<float>(scale);
          if (mask) copy_floats(added->at(b, first + i, 0).element(0, begin), added->type, count, own);
          else std::fill_n(own, count, 0.f);
          int64_t p = 0, end = count;
          while (p < end && own[p] == kExcluded) ++p;
          while (p < end && own[end - 1] == kExcluded) --end;
          seen_from = std::min(seen_from, p);
          seen_to = std::max(seen_to, end);
        }
        const auto run = keys.type == Type::float32   ? attend_chunk_of<Type::float32>(some)
                         : keys.type == Type::float16 ? attend_chunk_of<Type::float16>(some)
                                                 : attend_chunk_of<Type::bfloat16>(some);
        run(query.data(), keys.at(b, h, begin), values.at(b, h, begin), seen_from, seen_to, line, made.data(), found);
        for (int64_t i = 0; i < some; ++i) {
          const int64_t place = (b * heads + first + i) * chunks + chunk;
          std::copy_n(made.data() + i * width, width, parts + place * width);
          softmax[place] = found[i];
        }
      }
    }
  });
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / (chunks * width));
  parallel(batch * heads, grain, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i)
      join(parts + i * chunks * width, &softmax[i * chunks], chunks, width,
           static_cast<char*>(result.data_ptr()) + i * width * result.element_size(), type_of(q.scalar_type()));
  });
}

}  // namespace qcompile
