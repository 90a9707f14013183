// What the threads of a product do: panels of weights times rows of activations, and the way to the output.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "team.h"
#include "weight.h"

namespace qcompile {

// Most rows of an item: their sums fit a cache beside a panel. Items begin at whole blocks of rows, because tiles are
// slow at others: 1024 rows in pieces of 171 take 1.4 to 1.9 times as long as in pieces of 256 (Xeon with AMX, 2 cores).
constexpr int64_t kMostRows = 256, kRowBlock = 32;

// Rows of activations that meet the same expert, some of `all` that meet it; each row of the input is `planes` of them.
struct Item {
  int64_t expert, begin, end, all;
  int64_t rows() const { return end - begin; }
};

// ends: where the rows of each expert end, or none for one that has all. Items are small enough to busy all threads
// with the `panels` that each of them meets. The last one of an expert takes what is less than a block.
inline std::vector<Item> items_of(const optional<Tensor>& ends, const Weight& weight, int64_t panels, int64_t rows,
                                  int64_t planes) {
  const int64_t wanted = ceil_div(4 * at::get_num_threads(), panels);
  const int64_t most = std::min(std::max<int64_t>(ceil_div(rows * planes, wanted), 48), kMostRows);
  std::vector<Item> items;
  int64_t begin = 0;
  for (int64_t expert = 0; expert < weight.experts; ++expert) {
    const int64_t end = ends ? ends->data_ptr<int32_t>()[expert] : rows;
    TORCH_CHECK(begin <= end && end <= rows, "qcompile_cpu: ends must rise from 0 to ", rows, " rows, not to ", end);
    const int64_t pieces = std::max<int64_t>(1, ceil_div((end - begin) * planes, most));
    const int64_t each = ceil_div(ceil_div(end - begin, pieces), kRowBlock) * kRowBlock;
    for (int64_t from = begin, to; from < end; from = to) {
      to = end - from < each + kRowBlock ? end : from + each;
      items.push_back({expert, from * planes, to * planes, (end - begin) * planes});
    }
    begin = end;
  }
  return items;
}

// Where the products go: [rows, features] of `type`, with a bias float [features] added.
struct Output {
  char* data;
  Type type;
  int64_t features;
  const float* bias;  // or null
};

// One panel to the rows of the output from `row` on; value(i, v) is vector v of the i-th of them.
template <class Value>
inline void finish(int64_t row, int64_t rows, int64_t panel, const Output& out, Value value) {
  const int64_t channel = panel * kPanel, channels = std::min<int64_t>(kPanel, out.features - channel);
  const int64_t size = size_of(out.type);
  alignas(64) float bias[kPanel] = {};
  if (out.bias) std::memcpy(bias, out.bias + channel, channels * sizeof(float));
  alignas(64) char line[kPanel * sizeof(float)];
  for (int64_t i = 0; i < rows; ++i) {
    char* to = out.data + ((row + i) * out.features + channel) * size;
    char* whole = channels == kPanel ? to : line;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      store_floats(whole + v * kLanes * size, out.type, value(i, v) + load<Floats>(bias + v * kLanes));
    if (channels < kPanel) std::memcpy(to, line, channels * size);
  }
}

// A weight, what is multiplied with it, and where the products go.
struct Job {
  const Weight& weight;
  std::vector<Item> items;
  Output out;
  int64_t tasks() const { return static_cast<int64_t>(items.size()) * weight.panels; }
};

// What a thread needs for a panel: sums of its rows, and room for unpacked weights.
struct Scratch {
  Buffer<float> sums;
  Buffer<int32_t> integers;
  Buffer<uint8_t> space;
  bool tiles = false;  // whether the thread has taken the tiles of the CPU

  ~Scratch() {
    if (tiles) at::native::cpublas::brgemm_release();
  }
};

// Call multiply(job, item, panel, scratch) for every panel of every item, with a Scratch for each thread. Threads take
// panels that lie together in memory, first half of their share of what is left, in the end one by one. Each output has
// one thread, which sums in a fixed order.
template <class Multiply>
void run(const std::vector<Job>& jobs, Multiply multiply) {
  std::vector<int64_t> ends;  // of the tasks of each job
  for (const Job& job : jobs) ends.push_back(job.tasks() + (ends.empty() ? 0 : ends.back()));
  const int64_t tasks = ends.back(), threads = at::get_num_threads();
  std::atomic<int64_t> next{0};
  parallel(std::min(tasks, threads), 1, [&](int64_t, int64_t) {
    Scratch scratch;
    for (int64_t begin = 0; begin < tasks;) {
      const int64_t share = std::max<int64_t>(1, (tasks - begin) / (2 * threads));
      if (!next.compare_exchange_weak(begin, begin + share)) continue;
      for (int64_t task = begin; task < std::min(begin + share, tasks); ++task) {
        const auto index = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin();
        const Job& job = jobs[index];
        const int64_t own = task - (ends[index] - job.tasks());
        multiply(job, job.items[own / job.weight.panels], own % job.weight.panels, scratch);
      }
      begin = next.load();
    }
  });
}

}  // namespace qcompile
