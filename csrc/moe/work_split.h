// Who computes which panel: contiguous static ranges by cost, then a shared tail.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "base/span.h"

namespace kt {

// Units are (item, panel) pairs in item-major order; all panels of an item cost the same.
//
// All but 1 / kTailDivisor of the cost is cut into contiguous ranges, one a worker, so that each
// worker's weights are one ascending stream; the rest is taken unit by unit from a counter, which
// absorbs noise and unequal cores.
class WorkSplit {
 public:
  // costs[i] > 0: cost of one panel of item i.
  void reset(const std::vector<int64_t>& costs, int64_t panels, int workers);

  // Static units of a worker.
  IndexRange static_units(int worker) const;
  // Next unit of the tail, or -1. Thread-safe.
  int64_t next_tail_unit();

  int64_t item(int64_t unit) const { return unit / panels_; }
  int64_t panel(int64_t unit) const { return unit % panels_; }
  int64_t num_units() const { return num_units_; }

 private:
  int64_t unit_at_cost(int64_t cost) const;

  // 1/8 left to the tail, enough for the noise of a shared host. One unit is then the largest
  // imbalance.
  static constexpr int64_t kTailDivisor = 8;

  std::vector<int64_t>
      cost_before_;  // by item: cost of all panels of earlier items; one more entry: the total
  int64_t panels_ = 1;
  int64_t num_units_ = 0;
  int64_t static_cost_ = 0;
  int workers_ = 1;
  std::atomic<int64_t> tail_{0};
};

}  // namespace kt
