// Attention to the keys and values of a cache, whose heads several query heads may share.
//
// What is loaded of a position serves several queries, of different heads and rows. Nothing is read before the first or
// behind the last position of a chunk that the mask shows them, so that neither the unused end of a static cache nor
// the future costs anything. Where there are few tasks, as for a token, each takes some of the chunks, whose softmaxes
// are joined afterwards: how many is decided by shapes, so that a result does not depend on the number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "chunk.h"
#include "team.h"

namespace qcompile {

constexpr int64_t kTaskQueries = 64;  // of one task
constexpr int64_t kFewQueries = 8;    // for which keys and values are not prepared
constexpr int64_t kWantedTasks = 64;  // which busy most machines, and hold little beside each other

// The queries of a task, and what it makes of them.
class Attending {
 public:
  Attending(const Heads& queries, const Heads& keys, const Heads& values, float scale, int64_t most)
      : width_(keys.width), value_width_(values.width), type_(keys.type), scale_(scale), few_(most <= kFewQueries),
        query_(most * width_), scores_(most * kChunk), made_(most * value_width_),
        turned_(few_ ? 0 : width_ * kChunk), joined_(few_ ? 0 : value_width_ * kChunk) {
#if defined(QCOMPILE_BF16)
    const bool bfloat16 = queries.type == Type::bfloat16 && type_ == Type::bfloat16;
    pairs_ = !few_ && bfloat16 && width_ % (2 * kLanes) == 0;
#endif
  }

  void begin(int64_t count) {
    count_ = count;
    std::fill_n(softmax_, count, Softmax());
    std::fill_n(static_cast<float*>(made_), count * value_width_, 0.f);
  }

  // `width` numbers of `type` become query i
  void set_query(int64_t i, const char* numbers, Type type) {
    if (pairs_) std::memcpy(query_ + i * width_ / 2, numbers, width_ * 2);
    else copy_floats(numbers, type, width_, query_ + i * width_);
  }
  const float* made(int64_t i) const { return made_ + i * value_width_; }
  Softmax& softmax(int64_t i) { return softmax_[i]; }

  // Go on with `positions` of one chunk. mask(i, line): writes what is added to the scores of query i.
  template <class Mask>
  void attend(const Heads& keys, const Heads& values, int64_t positions, const Mask& mask) {
    Range ranges[kTaskQueries], all;
    for (int64_t i = 0; i < count_; ++i) {
      float* line = scores_ + i * kChunk;
      mask(i, line);
      std::fill(line + positions, line + kChunk, kExcluded);
      all.include(ranges[i] = seen(line, positions));
    }
    if (all.empty()) return;
#if defined(QCOMPILE_BF16)
    if (pairs_) return attend_all<Type::bfloat16, Pairs>(keys, values, ranges, all);
#endif
    with_type([&](auto type) {
      constexpr Type kType = type();
      if (!few_) return attend_all<kType, Singles>(keys, values, ranges, all);
      each<4>(ranges, [&](auto queries, int64_t i, const Range& range) {
        attend_directly<kType, queries()>(query_ + i * width_, keys, values, scale_, range, scores_ + i * kChunk,
                                          made_ + i * value_width_, softmax_ + i);
      });
    });
  }

 private:
  template <Type kType, class Words>
  void attend_all(const Heads& keys, const Heads& values, const Range* ranges, const Range& all) {
    turn_keys<kType, Words>(keys, all, turned_);
    join_values<kType, Words>(values, all, joined_);
    each<kMostQueries>(ranges, [&](auto queries, int64_t i, const Range& range) {
      const float* query = query_ + i * width_ / Words::kNumbers;
      attend_prepared<Words, queries()>(query, turned_, joined_, width_, value_width_, scale_, range,
                                        scores_ + i * kChunk, made_ + i * value_width_, softmax_ + i);
    });
  }

  // f(a constant: how many, the first of them, what they see) for all queries, up to kMost at a time
  template <int kMost, class Function>
    requires(kMost == 4 || kMost == 8)
  void each(const Range* ranges, const Function& f) {
    for (int64_t i = 0, some; i < count_; i += some) {
      some = kMost;
      while (some > count_ - i) some /= 2;
      Range range;
      for (int64_t j = i; j < i + some; ++j) range.include(ranges[j]);
      if (range.empty()) continue;
      if (kMost == 8 && some == 8) f(std::integral_constant<int, kMost>(), i, range);
      else if (some == 4) f(std::integral_constant<int, 4>(), i, range);
      else if (some == 2) f(std::integral_constant<int, 2>(), i, range);
      else f(std::integral_constant<int, 1>(), i, range);
    }
  }

  // f of a constant: the type of keys and values
  template <class Function>
  void with_type(const Function& f) const {
    if (type_ == Type::float32) f(std::integral_constant<Type, Type::float32>());
    else if (type_ == Type::float16) f(std::integral_constant<Type, Type::float16>());
    else f(std::integral_constant<Type, Type::bfloat16>());
  }

  int64_t width_, value_width_, count_ = 0;
  Type type_;
  float scale_;
  bool few_, pairs_ = false;
  Buffer<float> query_, scores_, made_, turned_, joined_;
  Softmax softmax_[kTaskQueries];
};

// The parts of one query: float [parts, width] that each made, and their softmaxes, whose sums become the share of each
// -> `width` elements at `to`.
inline void join(const float* made, Softmax* softmax, int64_t parts, int64_t width, char* to, Type type) {
  float largest = kExcluded, sum = 0;
  for (int64_t c = 0; c < parts; ++c) largest = std::max(largest, softmax[c].largest);
  for (int64_t c = 0; c < parts; ++c) {
    const float factor = softmax[c].largest == kExcluded ? 0.f : std::exp(softmax[c].largest - largest);
    sum += factor * softmax[c].sum;
    softmax[c].sum = factor;
  }
  for (int64_t c = 0; c < parts; ++c) softmax[c].sum = sum == 0 ? 0.f : softmax[c].sum / sum;
  for (int64_t i = 0; i < width; i += kLanes) {
    Floats all = {};
    for (int64_t c = 0; c < parts; ++c) all += load<Floats>(made + c * width + i) * softmax[c].sum;
    store_floats(to + i * size_of(type), type, all);
  }
}

// What `attend_into` takes, or an error.
inline void check_attend(const Tensor& q, const Tensor& k, const Tensor& v) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "qcompile_cpu: q, k and v must have four dimensions");
  const int64_t batch = q.size(0), heads = q.size(1), shared = k.size(1), positions = k.size(2), width = v.size(3);
  TORCH_CHECK(k.size(0) == batch && v.size(0) == batch && v.size(1) == shared && v.size(2) == positions &&
                  k.size(3) == q.size(3) && shared > 0 && heads % shared == 0,
              "qcompile_cpu: q ", q.sizes(), ", k ", k.sizes(), " and v ", v.sizes(), " do not fit");
  TORCH_CHECK(k.scalar_type() == v.scalar_type(), "qcompile_cpu: k and v must have one dtype");
  TORCH_CHECK(q.size(3) % kHeadWidth == 0 && width % kHeadWidth == 0, "qcompile_cpu: heads must be multiples of ",
              kHeadWidth, " wide, not ", q.size(3), " and ", width);
}

// q [batch, heads, rows, width], k [batch, shared, positions, width], v [batch, shared, positions, value width], mask
// [batch, heads, rows, positions], which is added to the scaled scores; causal: row i sees the positions up to i ->
// result [batch, heads, rows, value width]. A query that may see no position gets zeros.
inline void attend_into(const Tensor& result, const Tensor& q, const Tensor& k, const Tensor& v,
                        const optional<Tensor>& mask, double scale, bool causal) {
  const int64_t batch = q.size(0), heads = q.size(1), rows = q.size(2), shared = k.size(1), positions = k.size(2);
  const auto side_by_side = [](const Tensor& t) { return t.stride(3) == 1 ? t : t.contiguous(); };
  const Tensor k_rows = side_by_side(k), v_rows = side_by_side(v), q_rows = side_by_side(q);
  const Tensor mask_rows = mask ? side_by_side(*mask) : Tensor();
  const Heads queries(q_rows), keys(k_rows), values(v_rows), results(result);
  const auto added = mask ? optional<Heads>(mask_rows) : std::nullopt;
  const int64_t group = heads / shared, all = group * rows, width = values.width;  // query i: row i / group
  const int64_t chunks = std::max<int64_t>(1, ceil_div(positions, kChunk)), blocks = ceil_div(all, kTaskQueries);
  const int64_t wanted = ceil_div(kWantedTasks, std::max<int64_t>(1, batch * shared * blocks));
  const int64_t each = ceil_div(chunks, wanted), parts = ceil_div(chunks, each);  // chunks of a task, and tasks of a block
  const Buffer<float> made(parts == 1 ? 0 : batch * shared * all * parts * width);
  std::vector<Softmax> softmax(parts == 1 ? 0 : batch * shared * all * parts);
  const auto finish = [&](int64_t b, int64_t h, int64_t i, const float* made, Softmax* softmax) {
    const char* to = results.at(b, h * group + i % group, i / group).data;
    join(made, softmax, parts, width, const_cast<char*>(to), results.type);
  };
  parallel(batch * shared * blocks * parts, 1, [&](int64_t from, int64_t to) {
    Attending attending(queries, keys, values, static_cast<float>(scale), std::min(all, kTaskQueries));
    for (int64_t task = from; task < to; ++task) {
      const int64_t part = task % parts, block = task / parts % blocks, h = task / parts / blocks % shared;
      const int64_t b = task / parts / blocks / shared, first = block * kTaskQueries;
      const int64_t count = std::min(kTaskQueries, all - first);
      attending.begin(count);
      for (int64_t i = 0; i < count; ++i) {
        const Heads query = queries.at(b, h * group + (first + i) % group, (first + i) / group);
        attending.set_query(i, query.data, query.type);
      }
      for (int64_t chunk = part * each; chunk < std::min((part + 1) * each, chunks); ++chunk) {
        const int64_t begin = chunk * kChunk, there = std::min(kChunk, positions - begin);
        attending.attend(keys.at(b, h, begin), values.at(b, h, begin), there, [&](int64_t i, float* line) {
          const int64_t row = (first + i) / group, head = h * group + (first + i) % group;
          const int64_t shown = causal ? std::clamp<int64_t>(row + 1 - begin, 0, there) : there;
          if (mask) copy_floats(added->at(b, head, row).element(0, begin), added->type, shown, line);
          else std::fill_n(line, shown, 0.f);
          std::fill(line + shown, line + there, kExcluded);
        });
      }
      for (int64_t i = 0; i < count; ++i) {
        if (parts == 1) {
          finish(b, h, first + i, attending.made(i), &attending.softmax(i));
        } else {
          const int64_t place = ((b * shared + h) * all + first + i) * parts + part;
          std::copy_n(attending.made(i), width, made + place * width);
          softmax[place] = attending.softmax(i);
        }
      }
    }
  });
  if (parts == 1) return;
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / (parts * width));
  parallel(batch * shared * all, grain, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i)
      finish(i / all / shared, i / all % shared, i % all, made + i * parts * width, &softmax[i * parts]);
  });
}

}  // namespace qcompile
