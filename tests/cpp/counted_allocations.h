// A heap that counts: replaces operator new and delete of the whole test program, so one source of
// a program includes it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace kt {

inline std::atomic<uint64_t> num_allocations{0};

inline void* counted(size_t bytes) {
  ++num_allocations;
  void* const memory = std::malloc(bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace kt

// not inlined: GCC 12 sees malloc() with delete and new with free()
[[gnu::noinline]] void* operator new(size_t bytes) { return kt::counted(bytes); }
[[gnu::noinline]] void* operator new[](size_t bytes) { return kt::counted(bytes); }
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete[](void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete[](void* memory, size_t) noexcept { std::free(memory); }
