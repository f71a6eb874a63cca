// plan_pool(): how many workers of which nodes, on which CPUs.
#include <gtest/gtest.h>

#include <string>

#include "base/check.h"
#include "system/topology.h"
#include "topology_values.h"

namespace kt {
namespace {

// Nodes with `cores[i]` cores of `smt` threads each.
Topology machine(const Ints& cores, int smt = 1) {
  Topology topology;
  int cpu = 0;
  for (size_t i = 0; i < cores.size(); ++i) {
    NumaNode node;
    node.id = static_cast<int>(i);
    node.num_cores = cores[i];
    node.cpus = iota(cpu, cpu + cores[i] * smt);
    cpu += cores[i] * smt;
    topology.nodes.push_back(node);
  }
  return topology;
}

Ints threads_of(const PoolPlan& plan) {
  Ints threads;
  for (const PoolPlan::Node& node : plan.nodes) {
    threads.push_back(static_cast<int>(node.cpus.size()));
  }
  return threads;
}

TEST(PlanPool, DefaultIsEveryPhysicalCore) {
  const PoolPlan plan = plan_pool(machine({4, 4}, 2), 0, 0);
  EXPECT_EQ(threads_of(plan), (Ints{4, 4}));
  EXPECT_EQ(plan.num_threads(), 8);
  EXPECT_EQ(plan.nodes[0].cpus, (Ints{0, 1, 2, 3}));
  EXPECT_EQ(plan.nodes[1].cpus, (Ints{8, 9, 10, 11}));
  EXPECT_TRUE(plan.nodes[1].bind_memory);
  EXPECT_EQ(all(plan.warnings), "");
}

TEST(PlanPool, UnevenSplitsFollowTheCores) {
  EXPECT_EQ(threads_of(plan_pool(machine({4, 4}), 5, 0)), (Ints{3, 2}));
  EXPECT_EQ(threads_of(plan_pool(machine({2, 6}), 4, 0)), (Ints{1, 3}));
  EXPECT_EQ(threads_of(plan_pool(machine({1, 16}), 4, 0)), (Ints{1, 3}));
  EXPECT_EQ(threads_of(plan_pool(machine({1, 1, 30}), 4, 0)), (Ints{1, 1, 2}));
  EXPECT_EQ(threads_of(plan_pool(machine({3, 5, 7}), 15, 0)), (Ints{3, 5, 7}));
}

TEST(PlanPool, HyperThreadsComeAfterAllCores) {
  const PoolPlan plan = plan_pool(machine({2, 4}, 2), 8, 0);
  // all 6 cores, then 2 siblings by the room there is: 2 and 4
  EXPECT_EQ(threads_of(plan), (Ints{3, 5}));
  EXPECT_EQ(plan.nodes[0].cpus, (Ints{0, 1, 2}));
  EXPECT_EQ(threads_of(plan_pool(machine({2, 4}, 2), 12, 0)), (Ints{4, 8}));
}

TEST(PlanPool, EveryCountIsExactAndProportional) {
  const Topology topology = machine({5, 3, 8}, 2);
  for (int threads = 3; threads <= 32; ++threads) {
    const PoolPlan plan = plan_pool(topology, threads, 0);
    EXPECT_EQ(plan.num_threads(), threads);
    const Ints parts = threads_of(plan);
    for (size_t i = 0; i < parts.size(); ++i) {
      EXPECT_GE(parts[i], 1);
      const double cores = topology.nodes[i].num_cores;
      // 16 cores and 16 siblings, both in the same proportion
      const double fair = threads * cores / 16;
      // the rounding of Sainte-Lague, and the thread that no node goes without
      EXPECT_NEAR(parts[i], fair, 1.0) << threads << " threads, node " << i;
    }
  }
}

TEST(PlanPool, MoreThreadsThanCpusAreClamped) {
  const PoolPlan plan = plan_pool(machine({1, 1}, 2), 100, 0);
  EXPECT_EQ(threads_of(plan), (Ints{2, 2}));
  ASSERT_EQ(plan.warnings.size(), 1u);
  EXPECT_TRUE(has(plan.warnings[0], "100") && has(plan.warnings[0], "4")) << plan.warnings[0];
}

TEST(PlanPool, FewerThreadsThanNodesUseFewerNodes) {
  const PoolPlan plan = plan_pool(machine({4, 4, 4}), 2, 0);
  EXPECT_EQ(threads_of(plan), (Ints{1, 1}));
  ASSERT_EQ(plan.warnings.size(), 1u);
  EXPECT_TRUE(has(plan.warnings[0], "3 NUMA nodes")) << plan.warnings[0];
}

TEST(PlanPool, NumberOfNodesIsClamped) {
  const PoolPlan plan = plan_pool(machine({2}), 0, 2);
  EXPECT_EQ(threads_of(plan), (Ints{2}));
  EXPECT_EQ(plan.warnings.size(), 1u);
  EXPECT_EQ(threads_of(plan_pool(machine({2, 3, 4}), 0, 2)), (Ints{2, 3}));
}

TEST(PlanPool, NamedNodesKeepTheirOrder) {
  const PoolPlan plan = plan_pool(machine({2, 3, 4}), 0, 0, {2, 1});
  ASSERT_EQ(plan.nodes.size(), 2u);
  EXPECT_EQ(plan.nodes[0].id, 2);
  EXPECT_EQ(plan.nodes[1].id, 1);
  EXPECT_EQ(threads_of(plan), (Ints{4, 3}));
  EXPECT_EQ(plan_pool(machine({2, 3}), 0, 1, {1}).nodes[0].id, 1);
  EXPECT_EQ(plan_pool(machine({2, 3}), 0, 2, {1}).warnings.size(), 1u);
}

TEST(PlanPool, RefusesBadNumbers) {
  const Topology topology = machine({2, 2});
  EXPECT_THROW(plan_pool(topology, -1, 0), Error);
  EXPECT_THROW(plan_pool(topology, 0, -1), Error);
  EXPECT_THROW(plan_pool(topology, 0, 0, {0, 0}), Error);
  EXPECT_THROW(plan_pool(Topology{}, 0, 0), Error);
  for (const int id : {2, -1, 1 << 20}) {
    try {
      plan_pool(topology, 0, 0, {id});
      ADD_FAILURE() << id;
    } catch (const Error& error) {
      EXPECT_TRUE(has(error.what(), std::to_string(id)) && has(error.what(), "0, 1"))
          << error.what();
    }
  }
}

TEST(PlanPool, QuotaCutsThreadsAndPinning) {
  Topology topology = machine({8});
  topology.cpu_quota = 2.5;
  PoolPlan plan = plan_pool(topology, 0, 0);
  EXPECT_EQ(plan.nodes[0].cpus, (Ints{-1, -1})) << "the container shares all eight cores";
  EXPECT_EQ(all(plan.warnings), "");
  plan = plan_pool(topology, 6, 0);
  EXPECT_EQ(plan.num_threads(), 6);
  EXPECT_TRUE(has(all(plan.warnings), "2.5")) << all(plan.warnings);
  topology.cpu_quota = 8;
  EXPECT_EQ(plan_pool(topology, 0, 0).nodes[0].cpus, iota(0, 8));
}

TEST(PlanPool, DoesNotBindWhereTheKernelRefuses) {
  Topology topology = machine({2, 2});
  topology.can_bind = false;
  for (const PoolPlan::Node& node : plan_pool(topology, 0, 0).nodes) EXPECT_FALSE(node.bind_memory);
}

}  // namespace
}  // namespace kt
