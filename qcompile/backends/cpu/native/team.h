// The threads of a tape, which wait for each other without OpenMP.
//
// A token is some hundred short parallel parts. As soon as a process has more OpenMP threads than there are cores, for
// which a second thread that computes is enough, libgomp lets its threads sleep after each of them, and waking one takes
// longer than most parts do: a token of 14 ms took 20. So a tape is one parallel region, in which threads spin.
#pragma once

#include <ATen/Parallel.h>
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <functional>
#include <thread>

#include "weight.h"

namespace qcompile {

class Team {
 public:
  // The team that this thread leads, or null.
  static Team*& led() {
    static thread_local Team* team = nullptr;
    return team;
  }

  // body() on this thread, which leads all threads meanwhile. What others parallelize in it has one thread.
  template <class Body>
  static void lead(const Body& body) {
    const int64_t threads = at::get_num_threads();
    if (threads == 1 || at::in_parallel_region()) return body();
    Team team;
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      if (begin > 0) return team.follow(++team.followers_);
      team.members = ceil_div(threads, end);  // OpenMP may give fewer threads, with a longer range for each
      const Leading leading(team);
      body();
    });
  }

  // work(i) for each member i, on its thread
  void each(const std::function<void(int64_t)>& work) {
    work_ = &work;
    unfinished_.store(members - 1, std::memory_order_relaxed);
    parts_.fetch_add(1, std::memory_order_release);
    take(0);
    wait([&] { return unfinished_.load(std::memory_order_acquire) == 0; });
    if (error_) std::rethrow_exception(error_);
  }

  int64_t members = 1;

 private:
  struct Leading {
    Team& team;
    explicit Leading(Team& team) : team(team) { led() = &team; }
    ~Leading() {
      led() = nullptr;
      team.work_ = nullptr;
      team.parts_.fetch_add(1, std::memory_order_release);
    }
  };

  void follow(int64_t member) {
    for (int64_t done = 0;; ++done) {
      wait([&] { return parts_.load(std::memory_order_acquire) > done; });
      if (!work_) return;
      take(member);
      unfinished_.fetch_sub(1, std::memory_order_release);
    }
  }

  void take(int64_t member) {
    try {
      (*work_)(member);
    } catch (...) {
      if (!failed_.test_and_set()) error_ = std::current_exception();
    }
  }

  template <class Condition>
  static void wait(Condition condition) {
    for (int turns = 0; !condition(); ++turns) {
      if (turns >= 4096) std::this_thread::yield();  // somebody else may need the core
      else _mm_pause();
    }
  }

  const std::function<void(int64_t)>* work_ = nullptr;
  std::atomic<int64_t> followers_{0};
  alignas(64) std::atomic<int64_t> parts_{0};  // that began, and one more in the end
  alignas(64) std::atomic<int64_t> unfinished_{0};
  std::atomic_flag failed_ = ATOMIC_FLAG_INIT;
  std::exception_ptr error_;
};

// f(from, to) for ranges of 0 .. count that are not shorter than `grain`, on the threads there are.
template <class Function>
void parallel(int64_t count, int64_t grain, const Function& f) {
  Team* team = Team::led();
  if (!team) return at::parallel_for(0, count, grain, f);
  const int64_t ranges = std::min(team->members, ceil_div(count, grain));
  if (ranges > 1) team->each([&](int64_t i) { if (i < ranges) f(count * i / ranges, count * (i + 1) / ranges); });
  else if (count > 0) f(0, count);
}

}  // namespace qcompile
