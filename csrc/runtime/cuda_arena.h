// Pinned host memory of jobs: slots, and the arenas that hold them. Knows no order (cuda_sync.h).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/dtype.h"
#include "runtime/cuda_driver.h"

namespace kt {

// What a job reads and writes on the host. Rows beyond the job's num_tokens are not touched.
struct HostBuffers {
  void* hidden_states = nullptr;  // [num_tokens, hidden_size]
  void* topk_ids = nullptr;       // [num_tokens, top_k] int32 or int64
  float* topk_weights = nullptr;  // [num_tokens, top_k]
  void* output = nullptr;         // [num_tokens, hidden_size], dtype of hidden_states
};

// Pinned memory that both sides see.
//
// Requires  construction and destruction with the context current.
class PinnedMemory {
 public:
  // Errors  kt::Error: no memory.
  PinnedMemory(const CudaDriver& driver, size_t bytes);
  ~PinnedMemory();
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;
  std::byte* data() const { return data_; }
  CuAddress device_address() const { return device_address_; }

 private:
  const CudaDriver& driver_;
  std::byte* data_ = nullptr;
  CuAddress device_address_ = 0;
};

struct ArenaShape {
  int hidden_size = 0;
  int top_k = 0;
  DType dtype = DType::kBFloat16;
  bool operator==(const ArenaShape&) const = default;
};

// Words and buffers of one outstanding job: one piece of pinned memory (the map is in cuda_sync.h).
struct Slot {
  Slot(const CudaDriver& cuda, const ArenaShape& shape, int capacity);
  ~Slot();
  Slot(const Slot&) = delete;
  Slot& operator=(const Slot&) = delete;

  const CudaDriver& driver;
  PinnedMemory memory;
  std::atomic<uint32_t>& req;
  std::atomic<uint32_t>& arrived;
  std::atomic<uint32_t>& done;
  CuAddress req_address;
  CuAddress arrived_address;
  CuAddress done_address;
  HostBuffers buffers;

  // Of the enqueuing side, guarded by its mutex:
  bool polled = false;         // the CPU side looks at req
  bool held = false;           // submitted, its sync not enqueued yet
  bool stranded = false;       // a device may still use it for a job that nobody syncs
  bool has_last_use = false;   // last_use was recorded
  CuEvent last_use = nullptr;  // behind the copy of the last eager result
};

// The slots of one (hidden_size, top_k, dtype) on one device.
class Arena {
 public:
  Arena(const CudaDriver& driver, const ArenaShape& shape, int capacity);

  const ArenaShape& shape() const { return shape_; }
  int capacity() const { return capacity_; }
  // Null: not needed so far.
  const std::vector<std::unique_ptr<Slot>>& slots() const { return slots_; }

  // The slot for a job of the layer at `position` in its chain: neighbours get different ones, and
  // so does a layer that follows itself, because the deferred part of a job reads its slot until
  // the next job begins. Held slots are left alone.
  // Errors  kt::Error: no memory.
  Slot* acquire(int position);

  bool has_stranded() const;

  int num_captured = 0;  // jobs of graphs that refer to a slot

 private:
  const CudaDriver& driver_;
  ArenaShape shape_;
  int capacity_;
  std::vector<std::unique_ptr<Slot>> slots_;
  const Slot* last_ = nullptr;
  int last_position_ = -1;
};

}  // namespace kt
