// The ops of qcompile's CPU kernels; product.h has the layout of their weights.
#include <ATen/ATen.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <cstdlib>
#include <vector>

#include "attention.h"
#include "inputs.h"
#include "tape.h"

namespace qcompile {
namespace {

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

// make_inputs() of `sizes` times each weight: [..., out] each. Weights must share their groups.
template <class MakeInputs, class... Tensors>
std::vector<Tensor> multiplied(MakeInputs make_inputs, at::IntArrayRef sizes, const std::vector<Weight>& weights,
                               const std::vector<optional<Tensor>>& biases, at::IntArrayRef out_features,
                               at::ScalarType dtype, const optional<Tensor>& ends, const Tensors&... tensors) {
  std::vector<Tensor> results;
  int64_t panels = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Weight& weight = weights[i];
    panels += weight.panels;
    TORCH_CHECK(ceil_div(out_features[i], kPanel) == weight.panels, "qcompile_cpu: ", out_features[i],
                " output features do not fit ", weight.panels, " panels of ", kPanel);
    TORCH_CHECK(sizes.back() <= weight.features, "qcompile_cpu: x ", sizes, " is wider than the weight's ", weight.features);
    TORCH_CHECK(weight.features == weights[0].features && weight.group == weights[0].group,
                "qcompile_cpu: weights of one product must have the same input features and groups");
    TORCH_CHECK(!biases[i] || biases[i]->numel() == out_features[i], "qcompile_cpu: the bias must be [", out_features[i], "]");
    auto shape = sizes.vec();
    shape.back() = out_features[i];
    results.push_back(at::empty(shape, at::TensorOptions(dtype)));
  }
  const int64_t rows = c10::multiply_integers(sizes.slice(0, sizes.size() - 1));
  const auto compute = [=](const optional<Tensor>& ends, const Tensors&... tensors) {
    auto inputs = make_inputs(tensors...);
    std::vector<Tensor> added;
    std::vector<Job> jobs;
    for (size_t i = 0; i < weights.size(); ++i) {
      added.push_back(biases[i] ? biases[i]->to(at::kFloat).contiguous() : Tensor());
      const Output out{static_cast<char*>(results[i].data_ptr()), type_of(dtype), results[i].size(-1),
                       biases[i] ? added[i].template data_ptr<float>() : nullptr};
      jobs.push_back({weights[i], items_of(ends, weights[i], panels, rows, inputs.planes), out});
      inputs.prepare(weights[i], jobs.back().items);
    }
    run(jobs, [&](const Job& job, const Item& item, int64_t panel, Scratch& scratch) {
      inputs.multiply(job, item, panel, scratch);
    });
  };
  compute_and_record(compute, ends, tensors...);
  return results;
}

std::vector<Tensor> float_products(const Tensor& x, const std::vector<Weight>& weights,
                                   const std::vector<optional<Tensor>>& biases, const optional<Tensor>& ends,
                                   at::IntArrayRef out_features, at::ScalarType dtype) {
  const auto make = [](const Tensor& x) { return FloatInputs(x); };
  return multiplied(make, x.sizes(), weights, biases, out_features, dtype, ends, x.is_contiguous() ? matrix(x) : x);
}

std::vector<Tensor> code_products(const Tensor& x, const Tensor& x_scales, const optional<Tensor>& x_zeros,
                                  const std::vector<Weight>& weights, const std::vector<optional<Tensor>>& biases,
                                  const optional<Tensor>& ends, at::IntArrayRef out_features, at::ScalarType dtype) {
  const auto make = [](const Tensor& x, const Tensor& scales, const optional<Tensor>& zeros) {
    return CodeInputs(x, scales, zeros);
  };
  return multiplied(make, x.sizes(), weights, biases, out_features, dtype, ends, x, x_scales, x_zeros);
}

Tensor linear(const Tensor& x, const Tensor& codes, const Tensor& scales, const optional<Tensor>& zeros,
              const optional<Tensor>& bias, const optional<Tensor>& ends, int64_t zero, int64_t out_features,
              at::ScalarType dtype) {
  const Weight weight(codes, scales, zeros, std::nullopt, zero, ends.has_value());
  return float_products(x, {weight}, {bias}, ends, {out_features}, dtype)[0];
}

Tensor scaled_linear(const Tensor& x, const Tensor& x_scales, const optional<Tensor>& x_zeros, const Tensor& codes,
                     const Tensor& scales, const optional<Tensor>& zeros, const Tensor& sums,
                     const optional<Tensor>& bias, const optional<Tensor>& ends, int64_t zero, int64_t out_features,
                     at::ScalarType dtype) {
  const Weight weight(codes, scales, zeros, sums, zero, ends.has_value());
  return code_products(x, x_scales, x_zeros, {weight}, {bias}, ends, {out_features}, dtype)[0];
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
  return float_products(x, several(codes, scales, zeros, {}, zero), vector_of(biases), std::nullopt, out_features, dtype);
}

std::vector<Tensor> scaled_linears(const Tensor& x, const Tensor& x_scales, const optional<Tensor>& x_zeros,
                                   at::TensorList codes, at::TensorList scales, at::TensorList zeros,
                                   at::TensorList sums, const c10::List<optional<Tensor>>& biases, int64_t zero,
                                   at::IntArrayRef out_features, at::ScalarType dtype) {
  return code_products(x, x_scales, x_zeros, several(codes, scales, zeros, sums, zero), vector_of(biases), std::nullopt,
                       out_features, dtype);
}

// In memory [batch, rows, heads, value width], as ATen's attention leaves it, and as models read it.
Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const optional<Tensor>& mask, double scale, bool causal) {
  check_attend(q, k, v);
  const int64_t batch = q.size(0), heads = q.size(1), rows = q.size(2);
  const Tensor result = at::empty({batch, rows, heads, v.size(3)}, q.options()).transpose(1, 2);
  const auto compute = [=](const Tensor& q, const Tensor& k, const Tensor& v, const optional<Tensor>& mask) {
    attend_into(result, q, k, v, mask, scale, causal);
  };
  compute_and_record(compute, q, k, v, mask ? optional<Tensor>(mask->expand({batch, heads, rows, k.size(2)})) : mask);
  return result;
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
  m.class_<qcompile::Tape>("Tape")
      .def(torch::init<>())
      .def("begin", &qcompile::Tape::begin)
      .def("end", &qcompile::Tape::end)
      .def("drop", &qcompile::Tape::drop)
      .def("kernel", &qcompile::Tape::kernel)
      .def("product", &qcompile::Tape::product)
      .def("run", &qcompile::Tape::run);
  m.def("attend(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool causal) -> Tensor");
}

TORCH_LIBRARY_IMPL(qcompile_cpu, CPU, m) {
  m.impl("linear", qcompile::linear);
  m.impl("scaled_linear", qcompile::scaled_linear);
  m.impl("linears", qcompile::linears);
  m.impl("scaled_linears", qcompile::scaled_linears);
  m.impl("attend", qcompile::attend);
}
