// The threads of a loop: OpenMP's, which torch shares, where the compiler has OpenMP; else our own, for as long as the loop.
#pragma once

#include <cstdint>

#if defined(_OPENMP)

#include <omp.h>

namespace monosem {

inline int64_t max_threads() { return omp_get_max_threads(); }
inline int64_t thread_number() { return omp_get_thread_num(); }

/// Runs body(i) for i in [0, count), in any order, by at most max_threads(); `body` does not throw.
template <class Body>
void each_index(int64_t count, const Body& body) {
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace monosem

#else

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <system_error>
#include <thread>
#include <vector>

namespace monosem {

/// What OMP_NUM_THREADS says, else one a core.
inline int64_t max_threads() {
  static const int64_t count = [] {
    const char* wanted = std::getenv("OMP_NUM_THREADS");
    const long given = wanted ? std::strtol(wanted, nullptr, 10) : 0;
    return std::max<int64_t>(1, given > 0 ? given : std::thread::hardware_concurrency());
  }();
  return count;
}

inline thread_local int64_t this_thread = 0;
inline int64_t thread_number() { return this_thread; }

template <class Body>
void each_index(int64_t count, const Body& body) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i = next++; i < count; i = next++) body(i);
  };
  std::vector<std::thread> others;
  const int64_t n_threads = std::min(count, max_threads());
  others.reserve(static_cast<size_t>(std::max<int64_t>(n_threads, 1)));
  for (int64_t number = 1; number < n_threads; ++number) try {
      others.emplace_back([&work, number] {
        this_thread = number;
        work();
      });
    } catch (const std::system_error&) {  // no more threads to be had: those that are there do the work
      break;
    }
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace monosem

#endif
