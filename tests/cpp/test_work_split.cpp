#include <gtest/gtest.h>

#include <random>

#include "moe/work_split.h"

namespace kt {
namespace {

// How often each unit is handed out when the workers take their static parts and then the tail.
std::vector<int> times_owned(WorkSplit& split, int workers) {
  std::vector<int> owned(split.num_units(), 0);
  for (int worker = 0; worker < workers; ++worker) {
    const IndexRange range = split.static_units(worker);
    for (int64_t unit = range.begin; unit < range.end; ++unit) ++owned[unit];
  }
  for (int64_t unit = split.next_tail_unit(); unit >= 0; unit = split.next_tail_unit())
    ++owned[unit];
  return owned;
}

TEST(WorkSplit, EveryUnitOnce) {
  std::mt19937 random(3);
  WorkSplit split;
  for (int round = 0; round < 500; ++round) {
    const int workers = 1 + static_cast<int>(random() % 9);
    const int64_t panels = random() % 13;
    std::vector<int64_t> costs(random() % 20);
    for (auto& cost : costs) cost = 1 + static_cast<int64_t>(random() % 300);
    split.reset(costs, panels, workers);
    ASSERT_EQ(split.num_units(), static_cast<int64_t>(costs.size()) * panels);
    for (const int times : times_owned(split, workers)) ASSERT_EQ(times, 1);
    EXPECT_EQ(split.next_tail_unit(), -1);
  }
}

TEST(WorkSplit, StaticPartsAreNearlyEqualInCost) {
  WorkSplit split;
  split.reset({100, 4, 4, 50, 4, 4}, 24, 3);
  for (int worker = 0; worker < 3; ++worker) {
    int64_t cost = 0;
    const IndexRange range = split.static_units(worker);
    for (int64_t unit = range.begin; unit < range.end; ++unit) {
      cost += std::vector<int64_t>{100, 4, 4, 50, 4, 4}[split.item(unit)];
    }
    // total 3984, seven eighths of it static: 1162 a worker, and a boundary moves by at most one
    // panel of 100
    EXPECT_NEAR(static_cast<double>(cost), 1162, 100) << worker;
  }
}

TEST(WorkSplit, OneWorkerHasNoTail) {
  WorkSplit split;
  split.reset({5, 5}, 3, 1);
  EXPECT_EQ(split.static_units(0).begin, 0);
  EXPECT_EQ(split.static_units(0).end, 6);
  EXPECT_EQ(split.next_tail_unit(), -1);
}

}  // namespace
}  // namespace kt
