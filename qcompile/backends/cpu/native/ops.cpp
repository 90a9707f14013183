// The ops of qcompile's CPU kernels; product.h has the layout of their weights.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <vector>

#include "activations.h"

namespace qcompile {
namespace {

using at::Tensor;
using std::optional;

constexpr int64_t kItemRows = 384;  // most rows that meet one unpacked piece of the weight

Type type_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBFloat16: return Type::bfloat16;
    case at::kHalf: return Type::float16;
    case at::kFloat: return Type::float32;
    default: TORCH_CHECK(false, "qcompile_cpu computes bfloat16, float16 and float32, not ", dtype);
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ------------------------------------------------------------------------------------------------ weights, activations

// The tensors of product.h, one expert after the other; a plain linear has one.
struct Weight {
  const uint8_t* codes;
  const char* scales;
  const int8_t* zeros;   // or null: all are `zero`
  const int32_t* sums;   // or null
  Type scale_type;
  bool four_bits;
  int32_t zero;
  int64_t experts, panels, features, groups, group;

  Weight(const Tensor& codes_, const Tensor& scales_, const optional<Tensor>& zeros_, const optional<Tensor>& sums_,
         int64_t zero, bool stacked)
      : codes(static_cast<const uint8_t*>(codes_.data_ptr())),
        scales(static_cast<const char*>(scales_.data_ptr())),
        zeros(zeros_ ? zeros_->data_ptr<int8_t>() : nullptr),
        sums(sums_ ? sums_->data_ptr<int32_t>() : nullptr),
        scale_type(type_of(scales_.scalar_type())),
        four_bits(codes_.scalar_type() == at::kByte),
        zero(static_cast<int32_t>(four_bits ? zero : zero - 128)) {
    TORCH_CHECK(codes_.dim() == (four_bits ? 4 : 5) + stacked && codes_.size(-2) == kPanel && codes_.is_contiguous(),
                "qcompile_cpu: codes ", codes_.sizes(), " are not as the kernel prepares them");
    experts = stacked ? codes_.size(0) : 1;
    panels = codes_.size(stacked);
    features = codes_.size(stacked + 1) * kStep;
    groups = scales_.size(-2);
    group = features / groups;
    const int64_t values = experts * panels * groups * kPanel;
    TORCH_CHECK(scales_.is_contiguous() && scales_.numel() == values && group * groups == features && group % kStep == 0,
                "qcompile_cpu: scales ", scales_.sizes(), " do not fit codes ", codes_.sizes());
    for (const auto* tensor : {&zeros_, &sums_})
      TORCH_CHECK(!*tensor || ((*tensor)->is_contiguous() && (*tensor)->numel() == values),
                  "qcompile_cpu: zeros or sums do not fit scales ", scales_.sizes());
  }
};

// Integer activations, [block][row][feature], as `Mode` reads them. Each row of the input is `planes` rows here.
template <class Mode>
struct Activations {
  using Code = typename Mode::Code;
  int64_t rows, features, block, planes;
  Tensor memory[3];
  Code* codes;
  float* scales;     // [block][row]
  int32_t* offsets;  // [row]; not for Wide

  Activations(int64_t rows, int64_t features, int64_t block, int64_t planes)
      : rows(rows), features(features), block(std::min(block, features)), planes(planes) {
    memory[0] = at::empty({rows * features * static_cast<int64_t>(sizeof(Code))}, at::kChar);
    memory[1] = at::empty({blocks() * rows}, at::kFloat);
    memory[2] = at::empty({is_wide<Mode> ? 0 : rows}, at::kInt);
    codes = static_cast<Code*>(memory[0].data_ptr());
    scales = memory[1].data_ptr<float>();
    offsets = memory[2].data_ptr<int32_t>();
  }

  int64_t blocks() const { return ceil_div(features, block); }
  int64_t length(int64_t index) const { return std::min(block, features - index * block); }
  Code* row_codes(int64_t index, int64_t row) const { return codes + index * block * rows + row * length(index); }
  float* row_scales(int64_t index, int64_t row) const { return scales + index * rows + row; }
};

// Call f(row, index of a block, its first feature) for all of them, rows in parallel.
template <class Mode, class Function>
void for_each_block(const Activations<Mode>& x, Function f) {
  const int64_t grain = std::max<int64_t>(1, 32768 / x.features);
  at::parallel_for(0, x.rows / x.planes, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t index = 0; index < x.blocks(); ++index) f(row, index, index * x.block);
  });
}

// Float activations x [rows, in]. Blocks are groups, or parts of them that a 32-bit sum can take.
Activations<Wide> quantized(const Tensor& x, const Weight& weight) {
  const Type type = type_of(x.scalar_type());
  int64_t block = weight.group;
  if (block > kFloatBlock) block = block % 128 ? kStep : 128;
  const Activations<Wide> result(
      x.size(0) * (type == Type::float32 ? 2 : 1), weight.features, block, type == Type::float32 ? 2 : 1);
  const int64_t given = x.size(1);
  const auto* from = static_cast<const char*>(x.data_ptr());
  for_each_block(result, [&](int64_t row, int64_t index, int64_t feature) {
    const int64_t length = result.length(index), first = row * result.planes;
    quantize_block(from + (row * given + feature) * size_of(type), type, std::clamp<int64_t>(given - feature, 0, length),
                   length, result.planes, result.row_codes(index, first), result.row_scales(index, first));
  });
  return result;
}

// A value for each row from a tensor [rows] or [1]
template <class T>
T of_row(const Tensor& values, int64_t row) { return values.data_ptr<T>()[values.numel() == 1 ? 0 : row]; }

// Activations x int8 [rows, in] with scales float [rows] or [1] and zero points int32 [rows] or [1]. Blocks are groups.
template <class Mode>
Activations<Mode> placed(const Tensor& x, const Tensor& scales, const optional<Tensor>& zeros, const Weight& weight) {
  const Activations<Mode> result(x.size(0), weight.features, weight.group, 1);
  const int64_t given = x.size(1);
  const auto* from = x.data_ptr<int8_t>();
  for_each_block(result, [&](int64_t row, int64_t index, int64_t feature) {
    const int32_t zero = zeros ? of_row<int32_t>(*zeros, row) : 0;
    const int64_t length = result.length(index), count = std::clamp<int64_t>(given - feature, 0, length);
    place_block(from + row * given + feature, zero, count, length, result.row_codes(index, row));
    *result.row_scales(index, row) = of_row<float>(scales, row);
    if constexpr (!is_wide<Mode>) result.offsets[row] = zero + 128;
  });
  return result;
}

// ------------------------------------------------------------------------------------------------------------ products

// Rows of activations that meet the same expert.
struct Item {
  int64_t expert, begin, end;
};

// ends: where the rows of each expert end, or none for one that has all. Items are small enough to busy all threads
// with the `panels` that each of them meets.
std::vector<Item> items_of(const optional<Tensor>& ends, const Weight& weight, int64_t panels, int64_t rows,
                           int64_t planes) {
  const int64_t wanted = ceil_div(4 * at::get_num_threads(), panels);
  const int64_t most = std::clamp<int64_t>(ceil_div(rows * planes, wanted), 48, kItemRows);
  std::vector<Item> items;
  int64_t begin = 0;
  for (int64_t expert = 0; expert < weight.experts; ++expert) {
    const int64_t end = ends ? ends->data_ptr<int32_t>()[expert] : rows;
    TORCH_CHECK(begin <= end && end <= rows, "qcompile_cpu: ends must rise from 0 to ", rows, " rows, not to ", end);
    const int64_t pieces = ceil_div((end - begin) * planes, most);
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t from = begin + (end - begin) * piece / pieces, to = begin + (end - begin) * (piece + 1) / pieces;
      items.push_back({expert, from * planes, to * planes});
    }
    begin = end;
  }
  TORCH_CHECK(begin == rows, "qcompile_cpu: the last of ends is ", begin, ", but there are ", rows, " rows");
  return items;
}

// Where the products go: [rows, features] of `type`, with a bias float [features] added.
struct Output {
  char* data;
  Type type;
  int64_t features;
  const float* bias;  // or null
};

// Sums [rows][kPanel] of one panel to the output, the planes of each row added.
void finish(const float* sums, const Item& item, int64_t planes, int64_t panel, const Output& out) {
  const int64_t channel = panel * kPanel, channels = std::min<int64_t>(kPanel, out.features - channel);
  const int64_t size = size_of(out.type);
  alignas(64) float bias[kPanel] = {};
  if (out.bias) std::memcpy(bias, out.bias + channel, channels * sizeof(float));
  alignas(64) char line[kPanel * sizeof(float)];
  for (int64_t row = item.begin; row < item.end; row += planes, sums += planes * kPanel) {
    char* to = out.data + (row / planes * out.features + channel) * size;
    char* whole = channels == kPanel ? to : line;
    for (int c = 0; c < kPanel; c += kLanes) {
      Floats sum = load<Floats>(sums + c);
      for (int64_t plane = 1; plane < planes; ++plane) sum += load<Floats>(sums + plane * kPanel + c);
      store_floats(whole + c * size, out.type, sum + load<Floats>(bias + c));
    }
    if (channels < kPanel) std::memcpy(to, line, channels * size);
  }
}

// What a thread needs for a panel: sums of its rows, and room for unpacked weights of a block.
struct Scratch {
  std::vector<float> sums;
  std::vector<uint8_t> space;
};

// One panel of one item, block by block.
template <class Mode, template <class> class Codes>
void multiply_panel(const Weight& weight, const Activations<Mode>& x, const Item& item, int64_t panel, const Output& out,
                    Scratch& scratch) {
  const int64_t rows = item.end - item.begin, stored = item.expert * weight.panels + panel;
  scratch.sums.assign(rows * kPanel, 0.0f);
  if (Codes<Mode>::kPacked && rows > kDirectRows) scratch.space.resize(x.block / kStep * Unpacked<Mode>::kStepBytes);

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
      block.scales[v] = load_floats(weight.scales + channel * size_of(weight.scale_type), weight.scale_type);
      if (weight.zeros)
        codes.zeros[v] = repeated<Mode>(__builtin_convertvector(load<QuarterWidth>(weight.zeros + channel), Int32s));
      if constexpr (!is_wide<Mode>) block.sums[v] = load<Int32s>(weight.sums + channel);
    }
    multiply(codes, block, rows, scratch.space.data(), scratch.sums.data());
    codes.codes += block.steps * Codes<Mode>::kStepBytes;
  }
  finish(scratch.sums.data(), item, x.planes, panel, out);
}

// A weight, what is multiplied with it, and where the products go.
struct Job {
  const Weight& weight;
  std::vector<Item> items;
  Output out;
  int64_t tasks() const { return static_cast<int64_t>(items.size()) * weight.panels; }
};

// Threads take some panels after others, which lie together in memory. Each output has one thread, which sums in a
// fixed order.
template <class Mode>
void multiply_all(const Activations<Mode>& x, const std::vector<Job>& jobs) {
  std::vector<int64_t> ends;  // of the tasks of each job
  for (const Job& job : jobs) ends.push_back(job.tasks() + (ends.empty() ? 0 : ends.back()));
  const int64_t tasks = ends.back(), threads = at::get_num_threads();
  const int64_t share = std::max<int64_t>(1, tasks / (16 * threads));
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(tasks, threads), 1, [&](int64_t, int64_t) {
    Scratch scratch;
    for (int64_t begin; (begin = next.fetch_add(share)) < tasks;) {
      for (int64_t task = begin; task < std::min(begin + share, tasks); ++task) {
        const auto index = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin();
        const Job& job = jobs[index];
        const int64_t own = task - (ends[index] - job.tasks());
        const Item& item = job.items[own / job.weight.panels];
        const int64_t panel = own % job.weight.panels;
        if (job.weight.four_bits) multiply_panel<Mode, Codes4>(job.weight, x, item, panel, job.out, scratch);
        else multiply_panel<Mode, Codes8>(job.weight, x, item, panel, job.out, scratch);
      }
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------- ops

// Memory for a weight that is read from begin to end at each call: in huge pages, if the system has them.
Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  constexpr size_t kHugePage = 2 << 20;
  const size_t bytes = c10::multiply_integers(sizes) * c10::elementSize(dtype);
  void* memory = nullptr;
  if (bytes < kHugePage || posix_memalign(&memory, kHugePage, bytes) != 0) return at::empty(sizes, at::TensorOptions(dtype));
#if defined(MADV_HUGEPAGE)
  madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  return at::from_blob(memory, sizes, [](void* p) { std::free(p); }, at::TensorOptions(dtype));
}

Tensor matrix(const Tensor& x) { return x.reshape({-1, x.size(-1)}).contiguous(); }

// Each weight times the same rows: [..., out] each. Weights must share their groups.
template <class Mode>
std::vector<Tensor> multiplied(const Activations<Mode>& x, const std::vector<Weight>& weights,
                               const std::vector<optional<Tensor>>& biases, const optional<Tensor>& ends,
                               at::IntArrayRef sizes, at::IntArrayRef out_features, at::ScalarType dtype) {
  std::vector<Tensor> results, added;
  std::vector<Job> jobs;
  int64_t panels = 0;
  for (const Weight& weight : weights) panels += weight.panels;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Weight& weight = weights[i];
    const optional<Tensor>& bias = biases[i];
    TORCH_CHECK(ceil_div(out_features[i], kPanel) == weight.panels, "qcompile_cpu: ", out_features[i],
                " output features do not fit ", weight.panels, " panels of ", kPanel);
    TORCH_CHECK(weight.features == x.features && weight.group == weights[0].group,
                "qcompile_cpu: weights of one product must have the same input features and groups");
    TORCH_CHECK(!bias || bias->numel() == out_features[i], "qcompile_cpu: the bias must be [", out_features[i], "]");
    added.push_back(bias ? bias->to(at::kFloat).contiguous() : Tensor());
    auto shape = sizes.vec();
    shape.back() = out_features[i];
    results.push_back(at::empty(shape, at::TensorOptions(dtype)));
    const Output out{static_cast<char*>(results[i].data_ptr()), type_of(dtype), out_features[i],
                     bias ? added[i].data_ptr<float>() : nullptr};
    jobs.push_back({weight, items_of(ends, weight, panels, x.rows / x.planes, x.planes), out});
  }
  multiply_all(x, jobs);
  return results;
}

std::vector<Tensor> times_floats(const Tensor& x, const std::vector<Weight>& weights,
                                 const std::vector<optional<Tensor>>& biases, const optional<Tensor>& ends,
                                 at::IntArrayRef out_features, at::ScalarType dtype) {
  TORCH_CHECK(x.size(-1) <= weights[0].features, "qcompile_cpu: x ", x.sizes(), " is wider than the weight's ",
              weights[0].features);
  return multiplied(quantized(matrix(x), weights[0]), weights, biases, ends, x.sizes(), out_features, dtype);
}

std::vector<Tensor> times_codes(const Tensor& x, const Tensor& x_scales, const optional<Tensor>& x_zeros,
                                const std::vector<Weight>& weights, const std::vector<optional<Tensor>>& biases,
                                const optional<Tensor>& ends, at::IntArrayRef out_features, at::ScalarType dtype) {
#if defined(QCOMPILE_VNNI)
  using Mode = Narrow;
#else
  using Mode = Wide;
#endif
  const Tensor rows = matrix(x), row_scales = x_scales.contiguous();
  const optional<Tensor> row_zeros = x_zeros ? optional<Tensor>(x_zeros->contiguous()) : std::nullopt;
  TORCH_CHECK(x.size(-1) <= weights[0].features, "qcompile_cpu: x ", x.sizes(), " is wider than the weight's ",
              weights[0].features);
  TORCH_CHECK((row_scales.numel() == 1 || row_scales.numel() == rows.size(0)) &&
                  (!row_zeros || row_zeros->numel() == 1 || row_zeros->numel() == rows.size(0)),
              "qcompile_cpu: scales and zero points of x must be [rows] or [1], not ", x_scales.sizes());
  return multiplied(placed<Mode>(rows, row_scales, row_zeros, weights[0]), weights, biases, ends, x.sizes(),
                    out_features, dtype);
}

Tensor linear(const Tensor& x, const Tensor& codes, const Tensor& scales, const optional<Tensor>& zeros,
              const optional<Tensor>& bias, const optional<Tensor>& ends, int64_t zero, int64_t out_features,
              at::ScalarType dtype) {
  const Weight weight(codes, scales, zeros, std::nullopt, zero, ends.has_value());
  return times_floats(x, {weight}, {bias}, ends, {out_features}, dtype)[0];
}

Tensor scaled_linear(const Tensor& x, const Tensor& x_scales, const optional<Tensor>& x_zeros, const Tensor& codes,
                     const Tensor& scales, const optional<Tensor>& zeros, const Tensor& sums,
                     const optional<Tensor>& bias, const optional<Tensor>& ends, int64_t zero, int64_t out_features,
                     at::ScalarType dtype) {
  const Weight weight(codes, scales, zeros, sums, zero, ends.has_value());
  return times_codes(x, x_scales, x_zeros, {weight}, {bias}, ends, {out_features}, dtype)[0];
}

// The weights of several linears: all have zeros and sums, or none has.
std::vector<Weight> several(at::TensorList codes, at::TensorList scales, at::TensorList zeros, at::TensorList sums,
                            int64_t zero) {
  std::vector<Weight> weights;
  for (size_t i = 0; i < codes.size(); ++i) {
    const auto of = [i](at::TensorList list) { return list.empty() ? std::nullopt : optional<Tensor>(list[i]); };
    weights.emplace_back(codes[i], scales[i], of(zeros), of(sums), zero, false);
  }
  return weights;
}

std::vector<optional<Tensor>> vector_of(const c10::List<optional<Tensor>>& tensors) {
  return std::vector<optional<Tensor>>(tensors.begin(), tensors.end());
}

std::vector<Tensor> linears(const Tensor& x, at::TensorList codes, at::TensorList scales, at::TensorList zeros,
                            const c10::List<optional<Tensor>>& biases, int64_t zero, at::IntArrayRef out_features,
                            at::ScalarType dtype) {
  return times_floats(x, several(codes, scales, zeros, {}, zero), vector_of(biases), std::nullopt, out_features, dtype);
}

std::vector<Tensor> scaled_linears(const Tensor& x, const Tensor& x_scales, const optional<Tensor>& x_zeros,
                                   at::TensorList codes, at::TensorList scales, at::TensorList zeros,
                                   at::TensorList sums, const c10::List<optional<Tensor>>& biases, int64_t zero,
                                   at::IntArrayRef out_features, at::ScalarType dtype) {
  return times_codes(x, x_scales, x_zeros, several(codes, scales, zeros, sums, zero), vector_of(biases), std::nullopt,
                     out_features, dtype);
}

}  // namespace
}  // namespace qcompile

TORCH_LIBRARY(qcompile_cpu, m) {
  m.def("empty(int[] sizes, ScalarType dtype) -> Tensor", qcompile::empty);
  m.def("linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, Tensor? ends, int zero, "
        "int out_features, ScalarType dtype) -> Tensor");
  m.def("scaled_linear(Tensor x, Tensor x_scales, Tensor? x_zeros, Tensor codes, Tensor scales, Tensor? zeros, "
        "Tensor sums, Tensor? bias, Tensor? ends, int zero, int out_features, ScalarType dtype) -> Tensor");
  m.def("linears(Tensor x, Tensor[] codes, Tensor[] scales, Tensor[] zeros, Tensor?[] biases, int zero, "
        "int[] out_features, ScalarType dtype) -> Tensor[]");
  m.def("scaled_linears(Tensor x, Tensor x_scales, Tensor? x_zeros, Tensor[] codes, Tensor[] scales, Tensor[] zeros, "
        "Tensor[] sums, Tensor?[] biases, int zero, int[] out_features, ScalarType dtype) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(qcompile_cpu, CPU, m) {
  m.impl("linear", qcompile::linear);
  m.impl("scaled_linear", qcompile::scaled_linear);
  m.impl("linears", qcompile::linears);
  m.impl("scaled_linears", qcompile::scaled_linears);
}
