// Threads that share a call, and memory that each of them keeps.

#pragma once

#include "features.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

#if defined(__SANITIZE_THREAD__)
#include <thread>
#include <vector>
#endif

namespace bda_fx {

// body(begin, end) for parts of 0 … tasks, one for each thread.
template <typename Body>
void share(int64_t tasks, const Body& body) {
#if defined(__SANITIZE_THREAD__)
  // The sanitizer does not see how OpenMP, which is not built with it, starts and joins its threads.
  const int64_t part = (tasks + at::get_num_threads() - 1) / at::get_num_threads();
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < tasks; begin += part) {
    threads.emplace_back([&body, begin, end = std::min(begin + part, tasks)] { body(begin, end); });
  }
  for (std::thread& thread : threads) thread.join();
#else
  at::parallel_for(0, tasks, 1, body);
#endif
}

// A buffer that grows to the largest size asked for.
class Scratch {
 public:
  template <typename T>
  T* get(int64_t count) {
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + ALIGN - 1) / ALIGN * ALIGN;
    if (bytes > size_) {
      data_.reset(std::aligned_alloc(ALIGN, bytes));
      TORCH_CHECK(data_ != nullptr, "basis_projection: no memory for ", bytes, " bytes");
      size_ = bytes;
    }
    return static_cast<T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(void* data) const { std::free(data); }
  };
  std::unique_ptr<void, Free> data_;
  int64_t size_ = 0;
};

struct Buffers {
  Scratch rest, basis, sums, panel, row, wide;
};

inline Buffers& buffers() {
  static thread_local Buffers own;
  return own;
}

} // namespace bda_fx
