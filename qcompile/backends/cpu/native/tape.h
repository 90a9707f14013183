// A run of a compiled graph as a list of what it called, so that it can be repeated without Python.
//
// While a thread records, the ops of this library put what they compute on its tape, and Python adds the kernels that it
// sees being called (replay.py). As in a CUDA graph, every repetition reads and writes the memory of the recorded run.
#pragma once

#include <ATen/ATen.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <array>
#include <functional>
#include <utility>
#include <vector>

#include "team.h"

namespace qcompile {

constexpr size_t kMostWords = 96;  // arguments of a kernel

// Call the function at `address` with kCount pointers or 64-bit integers, which the ABIs of x86-64 and Arm pass alike.
template <size_t... kIndex>
void call_with(int64_t address, const int64_t* words, std::index_sequence<kIndex...>) {
  reinterpret_cast<void (*)(decltype((void)kIndex, int64_t{})...)>(address)(words[kIndex]...);
}

using Caller = void (*)(int64_t, const int64_t*);

template <size_t... kCount>
constexpr std::array<Caller, sizeof...(kCount)> callers(std::index_sequence<kCount...>) {
  return {+[](int64_t address, const int64_t* words) { call_with(address, words, std::make_index_sequence<kCount>{}); }...};
}

class Tape : public torch::CustomClassHolder {
 public:
  static Tape*& recording() {
    static thread_local Tape* current = nullptr;
    return current;
  }

  void begin() {
    TORCH_CHECK(!recording(), "qcompile_cpu: this thread records another tape");
    calls_.clear();
    recording() = this;
  }

  void end() { recording() = nullptr; }

  // Record no more, and forget everything with the memory that it owns.
  void drop() {
    end();
    calls_.clear();
  }

  // call: what to repeat; apart: whether it has threads of its own. A dropped tape takes nothing more.
  void add(std::function<void()> call, bool apart = false) {
    if (recording() == this) calls_.push_back({std::move(call), apart});
  }

  // The function at `address`, called with `words`: pointers and integers.
  void kernel(int64_t address, std::vector<int64_t> words, bool apart) {
    static constexpr auto kCallers = callers(std::make_index_sequence<kMostWords + 1>{});
    TORCH_CHECK(words.size() <= kMostWords, "qcompile_cpu: a kernel with ", words.size(), " arguments");
    const Caller call = kCallers[words.size()];
    add([address, call, words = std::move(words)] { call(address, words.data()); }, apart);
  }

  // out = a @ b, plus a bias that broadcasts.
  void product(const at::Tensor& out, const std::optional<at::Tensor>& bias, const at::Tensor& a, const at::Tensor& b);

  // Everything again, in order, after `inputs` were copied to `slots`, the tensors that the recorded run read instead.
  void run(const std::vector<at::Tensor>& slots, const std::vector<at::Tensor>& inputs) {
    for (size_t i = 0; i < slots.size(); ++i) slots[i].copy_(inputs[i]);
    const auto is_apart = [](const Call& call) { return call.apart; };
    for (auto call = calls_.begin(), end = call; call != calls_.end(); call = end) {
      end = call->apart ? call + 1 : std::find_if(call, calls_.end(), is_apart);
      if (call->apart) call->run();
      else Team::lead([&] { std::for_each(call, end, [](const Call& one) { one.run(); }); });
    }
  }

 private:
  struct Call {
    std::function<void()> run;
    bool apart;
  };
  std::vector<Call> calls_;
};

// The memory of a tensor without a share in it: a tape keeps no cache alive that its owner has dropped.
inline at::Tensor borrowed(const at::Tensor& t) { return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), t.options()); }

inline std::optional<at::Tensor> borrowed(const std::optional<at::Tensor>& t) {
  return t ? std::optional<at::Tensor>(borrowed(*t)) : std::nullopt;
}

inline void Tape::product(const at::Tensor& out, const std::optional<at::Tensor>& bias, const at::Tensor& a,
                          const at::Tensor& b) {
  add([out = borrowed(out), bias = borrowed(bias), a = borrowed(a), b = borrowed(b)]() mutable {
    if (bias) at::addmm_out(out, *bias, a, b);
    else at::mm_out(out, a, b);
  }, true);
}

// compute(tensors...) now, and again whenever the tape that is being recorded is run. `compute` owns its results.
template <class Compute, class... Tensors>
void compute_and_record(Compute compute, const Tensors&... tensors) {
  compute(tensors...);
  if (Tape* tape = Tape::recording())
    tape->add([compute = std::move(compute), ... memory = borrowed(tensors)] { compute(memory...); });
}

}  // namespace qcompile
