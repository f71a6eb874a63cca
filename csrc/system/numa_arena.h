// Anonymous memory bound to one NUMA node, on huge pages where possible.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace kt {

// What /proc and move_pages say of an arena's pages.
struct PageReport {
  uint64_t bytes = 0;  // mapped
  uint64_t resident_bytes = 0;
  uint64_t huge_bytes = 0;   // on transparent or hugetlb pages
  uint64_t local_bytes = 0;  // on the asked node (equal to resident_bytes where it cannot be told)
};

// Owns one mapping; frees it all at once. Movable, not copyable. Thread-safe after construction.
//
// Pages are zero until written. The binding is a preference: a node that is full spills instead of
// failing.
//
// Errors  kt::Error if the mapping itself is refused (names bytes and node). A refused mbind or
//         madvise is not an error: bound() and warning() tell.
class NumaArena {
 public:
  NumaArena() = default;
  // node_id < 0: no binding.
  NumaArena(size_t bytes, int node_id);
  ~NumaArena();
  NumaArena(NumaArena&& other) noexcept;
  NumaArena& operator=(NumaArena&& other) noexcept;
  NumaArena(const NumaArena&) = delete;
  NumaArena& operator=(const NumaArena&) = delete;

  uint8_t* data() const { return data_; }  // aligned to 2 MiB when bytes >= 2 MiB, else to a page
  size_t size() const { return size_; }
  int node_id() const { return node_id_; }
  bool bound() const { return bound_; }
  const std::string& warning() const { return warning_; }
  PageReport report() const;

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
  uint8_t* mapping_ = nullptr;
  size_t mapping_bytes_ = 0;
  int node_id_ = -1;
  bool bound_ = false;
  std::string warning_;
};

}  // namespace kt
