#include "moe/work_split.h"

#include <algorithm>

namespace kt {

void WorkSplit::reset(const std::vector<int64_t>& costs, int64_t panels, int workers) {
  panels_ = std::max<int64_t>(panels, 1);
  workers_ = workers;
  cost_before_.resize(costs.size() + 1);
  cost_before_[0] = 0;
  for (size_t i = 0; i < costs.size(); ++i)
    cost_before_[i + 1] = cost_before_[i] + costs[i] * panels;
  num_units_ = static_cast<int64_t>(costs.size()) * panels;
  const int64_t total = cost_before_.back();
  static_cost_ = workers == 1 ? total : total - total / kTailDivisor;
  tail_.store(unit_at_cost(static_cost_), std::memory_order_relaxed);
}

// First unit that starts at or after `cost`.
int64_t WorkSplit::unit_at_cost(int64_t cost) const {
  if (cost >= cost_before_.back()) return num_units_;
  const auto next = std::upper_bound(cost_before_.begin(), cost_before_.end(), cost);
  const int64_t item = next - cost_before_.begin() - 1;
  const int64_t panel_cost = (cost_before_[item + 1] - cost_before_[item]) / panels_;
  return item * panels_ + ceil_div(cost - cost_before_[item], panel_cost);
}

IndexRange WorkSplit::static_units(int worker) const {
  return {unit_at_cost(static_cost_ * worker / workers_),
          unit_at_cost(static_cost_ * (worker + 1) / workers_)};
}

int64_t WorkSplit::next_tail_unit() {
  if (tail_.load(std::memory_order_relaxed) >= num_units_) return -1;
  const int64_t unit = tail_.fetch_add(1, std::memory_order_relaxed);
  return unit < num_units_ ? unit : -1;
}

}  // namespace kt
