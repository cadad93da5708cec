// Scratch memory that outlives a call: fresh pages cost a fault each, which is a tenth of a step.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace monosem {

class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() { release(); }

  /// Room for `count` of T, 64-byte aligned, contents undefined.
  template <class T>
  T* take(int64_t count) {
    const size_t bytes = static_cast<size_t>(count < 1 ? 1 : count) * sizeof(T);
    if (bytes > bytes_) grow(bytes);
    return static_cast<T*>(data_);
  }

  void fill(int byte) {
    if (data_) std::memset(data_, byte, bytes_);
  }

  void release() {
    std::free(data_);
    data_ = nullptr;
    bytes_ = 0;
  }

 private:
  static constexpr size_t kHugePage = size_t{2} << 20;

  void grow(size_t bytes) {
    release();
    const size_t alignment = bytes >= kHugePage ? kHugePage : 64;
    bytes = (bytes + alignment - 1) / alignment * alignment;
    if (posix_memalign(&data_, alignment, bytes) != 0) {  // aligned_alloc came to macOS with 10.15
      data_ = nullptr;
      throw std::bad_alloc();
    }
    bytes_ = bytes;
#if defined(__linux__)
    if (alignment == kHugePage) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
  }

  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace monosem
