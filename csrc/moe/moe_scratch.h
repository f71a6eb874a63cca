// Buffers of a forward, reused by all layers of a pool. Grow only; never touched by two forwards at
// once.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "moe/work_split.h"
#include "system/numa_arena.h"
#include "system/worker_pool.h"

namespace kt {

// A 64-byte aligned block that keeps its capacity. Contents are lost when it grows.
class GrowingBuffer {
 public:
  // At least `bytes` bytes, on `node_id` (-1: anywhere).
  uint8_t* reserve(int64_t bytes, int node_id = -1) {
    if (static_cast<int64_t>(arena_.size()) < bytes) {
      // An eighth more than asked: batches that grow by a row each would map, and fault in,
      // everything anew each time.
      const int64_t grown = round_up(bytes + bytes / 8, kHugePage);
      arena_ = NumaArena();  // free first: two generations never stand side by side
      arena_ = NumaArena(grown, node_id);
    }
    return arena_.data();
  }
  uint64_t bytes() const { return arena_.size(); }

 private:
  static constexpr int64_t kHugePage = int64_t{2} << 20;
  NumaArena arena_;
};

class MoeScratch {
 public:
  GrowingBuffer tokens;         // quantized hidden states of all tokens, scales, group sums
  GrowingBuffer intermediate;   // fp32 rows after SiLU and multiply
  GrowingBuffer rows;           // the same, quantized, with scales and group sums
  GrowingBuffer packed_tokens;  // rows of w13 and of w2 for kernels in tiles
  GrowingBuffer packed_rows;
  std::vector<GrowingBuffer>
      workers;  // by worker: tile, output columns, expanded panel, row buffers
  std::vector<std::unique_ptr<WorkSplit>> w13_splits;  // by node
  std::vector<std::unique_ptr<WorkSplit>> w2_splits;
  std::vector<int64_t> w13_costs;             // by expert of the pass: of one of its panels
  std::vector<IndexRange> whole_experts;      // by worker: see ForwardPass
  std::vector<int64_t> first_tile[2];         // by projection and expert of the pass: see there
  const std::vector<int64_t> w2_costs = {1};  // one item: a panel is of all experts

  void prepare_splits(int nodes) {
    while (static_cast<int>(w13_splits.size()) < nodes) {
      w13_splits.push_back(std::make_unique<WorkSplit>());
      w2_splits.push_back(std::make_unique<WorkSplit>());
    }
  }

  uint64_t bytes() const {
    uint64_t total = tokens.bytes() + intermediate.bytes() + rows.bytes() + packed_tokens.bytes() +
                     packed_rows.bytes();
    for (const GrowingBuffer& worker : workers) total += worker.bytes();
    return total;
  }
};

}  // namespace kt
