// detect_topology() on recorded trees of machines and containers, and on the machine itself.
#include <gtest/gtest.h>
#include <sched.h>

#include <filesystem>
#include <fstream>
#include <set>
#include <string>

#include "system/topology.h"
#include "topology_values.h"

namespace kt {
namespace {

// A recorded /sys and /proc in a folder of its own.
class Tree {
 public:
  Tree() {
    std::string pattern = (std::filesystem::temp_directory_path() / "kt_topology.XXXXXX").string();
    root_ = mkdtemp(pattern.data());
  }
  ~Tree() { std::filesystem::remove_all(root_); }
  Tree(const Tree&) = delete;
  Tree& operator=(const Tree&) = delete;

  const std::string& root() const { return root_; }

  void write(const std::string& path, const std::string& text) const {
    const std::filesystem::path file = root_ + path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text << "\n";
  }

  void node(int id, const std::string& cpulist, uint64_t memory_kib) const {
    const std::string folder = "/sys/devices/system/node/node" + std::to_string(id);
    write(folder + "/cpulist", cpulist);
    write(folder + "/meminfo", "Node " + std::to_string(id) +
                                   " MemTotal:       " + std::to_string(memory_kib) + " kB\nNode " +
                                   std::to_string(id) + " MemFree:        1 kB");
  }

  void core(const Ints& threads) const {
    std::string list;
    for (const int cpu : threads) list += (list.empty() ? "" : ",") + std::to_string(cpu);
    for (const int cpu : threads) {
      write("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list",
            list);
    }
  }

  void has_memory(const std::string& ids) const {
    write("/sys/devices/system/node/has_memory", ids);
  }

  void meminfo(uint64_t total_kib, uint64_t available_kib) const {
    write("/proc/meminfo", "MemTotal:       " + std::to_string(total_kib) +
                               " kB\nMemFree:        1 kB\nMemAvailable:   " +
                               std::to_string(available_kib) + " kB");
  }

  Topology detect(const Ints& affinity) const { return detect_topology({root_, affinity}); }

 private:
  std::string root_;
};

// Two sockets of four cores with two threads each, numbered as Linux does: 0-3, 4-7, then siblings.
void write_two_sockets(const Tree& tree) {
  tree.node(0, "0-3,8-11", 1000);
  tree.node(1, "4-7,12-15", 2000);
  tree.has_memory("0-1");
  for (int cpu = 0; cpu < 8; ++cpu) tree.core({cpu, cpu + 8});
  tree.meminfo(3000, 2500);
}

TEST(DetectTopology, OneNodeTwoCores) {
  const Tree tree;
  tree.node(0, "0-1", 7170252);
  tree.has_memory("0");
  tree.core({0});
  tree.core({1});
  tree.meminfo(7170252, 6000000);
  const Topology topology = tree.detect({0, 1});
  ASSERT_EQ(topology.nodes.size(), 1u);
  EXPECT_EQ(topology.nodes[0].id, 0);
  EXPECT_EQ(topology.nodes[0].cpus, (Ints{0, 1}));
  EXPECT_EQ(topology.nodes[0].num_cores, 2);
  EXPECT_TRUE(topology.nodes[0].has_memory);
  EXPECT_EQ(topology.nodes[0].memory_bytes, uint64_t{7170252} * 1024);
  EXPECT_EQ(topology.memory_limit_bytes, uint64_t{7170252} * 1024);
  EXPECT_EQ(topology.memory_available_bytes, uint64_t{6000000} * 1024);
  EXPECT_EQ(topology.cpu_quota, 0);
  EXPECT_EQ(topology.num_cores(), 2);
  EXPECT_EQ(all(topology.warnings), "");
}

TEST(DetectTopology, TwoSocketsListCoresBeforeSiblings) {
  const Tree tree;
  write_two_sockets(tree);
  const Topology topology = tree.detect(iota(0, 16));
  ASSERT_EQ(topology.nodes.size(), 2u);
  EXPECT_EQ(topology.nodes[0].cpus, (Ints{0, 1, 2, 3, 8, 9, 10, 11}));
  EXPECT_EQ(topology.nodes[1].cpus, (Ints{4, 5, 6, 7, 12, 13, 14, 15}));
  EXPECT_EQ(topology.nodes[0].num_cores, 4);
  EXPECT_EQ(topology.nodes[1].memory_bytes, 2000u * 1024);
  EXPECT_EQ(topology.num_cores(), 8);
}

TEST(DetectTopology, SiblingsNumberedSideBySide) {
  const Tree tree;
  tree.node(0, "0-7", 1000);
  for (int cpu = 0; cpu < 8; cpu += 2) tree.core({cpu, cpu + 1});
  const Topology topology = tree.detect(iota(0, 8));
  EXPECT_EQ(topology.nodes[0].cpus, (Ints{0, 2, 4, 6, 1, 3, 5, 7}));
  EXPECT_EQ(topology.nodes[0].num_cores, 4);
}

TEST(DetectTopology, CoreIdsWhereThereAreNoSiblingLists) {
  const Tree tree;
  tree.node(0, "0-3", 1000);
  for (int cpu = 0; cpu < 4; ++cpu) {
    const std::string folder = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology";
    tree.write(folder + "/core_id", std::to_string(cpu % 2));
    // the same core ids on both packages are different cores
    tree.write(folder + "/physical_package_id", cpu == 3 ? "1" : "0");
  }
  const Topology topology = tree.detect(iota(0, 4));
  EXPECT_EQ(topology.nodes[0].cpus, (Ints{0, 1, 3, 2}));
  EXPECT_EQ(topology.nodes[0].num_cores, 3);
}

TEST(DetectTopology, SubNumaClusters) {
  const Tree tree;
  for (int id = 0; id < 6; ++id) {
    tree.node(id, std::to_string(2 * id) + "-" + std::to_string(2 * id + 1), 500);
  }
  tree.has_memory("0-5");
  const Topology topology = tree.detect(iota(0, 12));
  ASSERT_EQ(topology.nodes.size(), 6u);
  EXPECT_EQ(topology.nodes[5].cpus, (Ints{10, 11}));
  EXPECT_EQ(topology.num_cores(), 12);
}

TEST(DetectTopology, NodeIdsAboveNineStayInNumericalOrder) {
  const Tree tree;
  for (const int id : {10, 2, 0}) tree.node(id, std::to_string(id), 500);
  const Topology topology = tree.detect({0, 2, 10});
  ASSERT_EQ(topology.nodes.size(), 3u);
  EXPECT_EQ(topology.nodes[1].id, 2);
  EXPECT_EQ(topology.nodes[2].id, 10);
}

TEST(DetectTopology, MemorylessNodeIsKeptUnbound) {
  const Tree tree;
  tree.node(0, "0-1", 0);
  tree.node(1, "2-3", 1000);
  tree.has_memory("1");
  const Topology topology = tree.detect(iota(0, 4));
  ASSERT_EQ(topology.nodes.size(), 2u);
  EXPECT_FALSE(topology.nodes[0].has_memory);
  EXPECT_TRUE(topology.nodes[1].has_memory);
  EXPECT_TRUE(has(all(topology.warnings), "NUMA node 0 has CPUs but no memory"));
  const PoolPlan plan = plan_pool(topology, 0, 0);
  EXPECT_FALSE(plan.nodes[0].bind_memory);
  EXPECT_TRUE(plan.nodes[1].bind_memory);
}

TEST(DetectTopology, CpulessNodeIsDropped) {
  const Tree tree;
  tree.node(0, "0-1", 1000);
  tree.node(1, "", 4000);
  tree.has_memory("0-1");
  const Topology topology = tree.detect({0, 1});
  ASSERT_EQ(topology.nodes.size(), 1u);
  EXPECT_EQ(topology.nodes[0].id, 0);
  EXPECT_TRUE(has(all(topology.warnings), "NUMA node 1 has memory but no CPUs"));
}

TEST(DetectTopology, AffinityCutsNodesAndCpus) {
  const Tree tree;
  write_two_sockets(tree);
  const Topology topology = tree.detect({13, 5, 12, 5});
  ASSERT_EQ(topology.nodes.size(), 1u);
  EXPECT_EQ(topology.nodes[0].id, 1);
  // 5 and 13 share a core; 12 is the only thread of its core that may be used
  EXPECT_EQ(topology.nodes[0].cpus, (Ints{5, 12, 13}));
  EXPECT_EQ(topology.nodes[0].num_cores, 2);
  EXPECT_EQ(all(topology.warnings), "") << "the user's own choice is nothing to warn of";
}

TEST(DetectTopology, CpusetOfVersion2) {
  const Tree tree;
  write_two_sockets(tree);
  tree.write("/proc/self/cgroup", "0::/box");
  tree.write("/sys/fs/cgroup/box/cpuset.cpus.effective", "2-5");
  tree.write("/sys/fs/cgroup/box/cpuset.mems.effective", "1");
  tree.write("/sys/fs/cgroup/cpuset.cpus.effective", "0-15");
  const Topology topology = tree.detect(iota(0, 16));
  ASSERT_EQ(topology.nodes.size(), 2u);
  EXPECT_EQ(topology.nodes[0].cpus, (Ints{2, 3}));
  EXPECT_EQ(topology.nodes[1].cpus, (Ints{4, 5}));
  EXPECT_FALSE(topology.nodes[0].has_memory) << "outside cpuset.mems";
  EXPECT_TRUE(topology.nodes[1].has_memory);
}

TEST(DetectTopology, CpusetOfVersion1AndAllowedMems) {
  const Tree tree;
  write_two_sockets(tree);
  tree.write("/proc/self/cgroup", "5:cpuset:/box\n4:memory:/");
  tree.write("/sys/fs/cgroup/cpuset/box/cpuset.effective_cpus", "0-1,4-5");
  tree.write("/proc/self/status", "Name:\tx\nMems_allowed_list:\t0\nvoluntary_ctxt_switches:\t3");
  const Topology topology = tree.detect(iota(0, 16));
  ASSERT_EQ(topology.nodes.size(), 2u);
  EXPECT_EQ(topology.nodes[0].cpus, (Ints{0, 1}));
  EXPECT_EQ(topology.nodes[1].cpus, (Ints{4, 5}));
  EXPECT_TRUE(topology.nodes[0].has_memory);
  EXPECT_FALSE(topology.nodes[1].has_memory);
}

TEST(DetectTopology, CpusetThatContradictsTheAffinityIsIgnored) {
  const Tree tree;
  write_two_sockets(tree);
  tree.write("/proc/self/cgroup", "0::/");
  tree.write("/sys/fs/cgroup/cpuset.cpus.effective", "7");
  EXPECT_EQ(tree.detect({0, 1}).nodes[0].cpus, (Ints{0, 1}));
}

TEST(DetectTopology, QuotaIsTheSmallestOnTheWayUp) {
  const Tree tree;
  write_two_sockets(tree);
  tree.write("/proc/self/cgroup", "0::/a/b/c");
  tree.write("/sys/fs/cgroup/a/b/c/cpu.max", "max 100000");
  tree.write("/sys/fs/cgroup/a/b/cpu.max", "150000 100000");
  tree.write("/sys/fs/cgroup/a/cpu.max", "400000 100000");
  const Topology topology = tree.detect(iota(0, 16));
  EXPECT_DOUBLE_EQ(topology.cpu_quota, 1.5);
  EXPECT_EQ(topology.num_cores(), 1);
}

TEST(DetectTopology, QuotaBelowOneCoreStillLeavesOne) {
  const Tree tree;
  write_two_sockets(tree);
  tree.write("/proc/self/cgroup", "0::/");
  tree.write("/sys/fs/cgroup/cpu.max", "20000 100000");
  EXPECT_DOUBLE_EQ(tree.detect(iota(0, 16)).cpu_quota, 0.2);
  EXPECT_EQ(tree.detect(iota(0, 16)).num_cores(), 1);
}

TEST(DetectTopology, QuotaOfVersion1) {
  const Tree tree;
  write_two_sockets(tree);
  tree.write("/proc/self/cgroup", "3:cpu,cpuacct:/docker/abc\n2:memory:/docker/abc");
  // no cgroup namespace: the container's group is mounted at the top, the path is the host's
  tree.write("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "300000");
  tree.write("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000");
  EXPECT_DOUBLE_EQ(tree.detect(iota(0, 16)).cpu_quota, 3.0);
  EXPECT_EQ(tree.detect(iota(0, 16)).num_cores(), 3);
  tree.write("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1");
  EXPECT_EQ(tree.detect(iota(0, 16)).cpu_quota, 0);
}

TEST(DetectTopology, MemoryLimitsOfVersion2DoNotCountPageCache) {
  const Tree tree;
  write_two_sockets(tree);
  tree.meminfo(1 << 20, 1 << 20);
  tree.write("/proc/self/cgroup", "0::/a/b");
  tree.write("/sys/fs/cgroup/a/b/memory.max", "max");
  tree.write("/sys/fs/cgroup/a/memory.max", "100000000");
  tree.write("/sys/fs/cgroup/a/memory.current", "90000000");
  tree.write("/sys/fs/cgroup/a/memory.stat",
             "anon 20000000\ninactive_file 60000000\nactive_file 10000000");
  const Topology topology = tree.detect(iota(0, 16));
  EXPECT_EQ(topology.memory_limit_bytes, 100000000u);
  EXPECT_EQ(topology.memory_available_bytes, 80000000u);
}

TEST(DetectTopology, MemoryLimitsOfVersion1) {
  const Tree tree;
  write_two_sockets(tree);
  tree.meminfo(1 << 20, 1 << 19);
  tree.write("/proc/self/cgroup", "4:memory:/box");
  tree.write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712");
  tree.write("/sys/fs/cgroup/memory/memory.usage_in_bytes", "5000");
  EXPECT_EQ(tree.detect(iota(0, 16)).memory_limit_bytes, 1u << 30) << "unlimited: the machine's";
  EXPECT_EQ(tree.detect(iota(0, 16)).memory_available_bytes, 1u << 29);
  tree.write("/sys/fs/cgroup/memory/box/memory.limit_in_bytes", "1000000");
  tree.write("/sys/fs/cgroup/memory/box/memory.usage_in_bytes", "700000");
  tree.write("/sys/fs/cgroup/memory/box/memory.stat",
             "inactive_file 1\ntotal_inactive_file 200000\ntotal_active_file 0");
  EXPECT_EQ(tree.detect(iota(0, 16)).memory_limit_bytes, 1000000u);
  EXPECT_EQ(tree.detect(iota(0, 16)).memory_available_bytes, 500000u);
}

TEST(DetectTopology, NothingAtAllIsOneNode) {
  const Tree tree;
  const Topology topology = tree.detect({3, 1});
  ASSERT_EQ(topology.nodes.size(), 1u);
  EXPECT_EQ(topology.nodes[0].cpus, (Ints{1, 3}));
  EXPECT_EQ(topology.nodes[0].num_cores, 2);
  EXPECT_EQ(topology.memory_limit_bytes, 0u);
  EXPECT_FALSE(topology.can_bind);
  EXPECT_EQ(topology.warnings.size(), 1u) << all(topology.warnings);
  EXPECT_FALSE(plan_pool(topology, 0, 0).nodes[0].bind_memory);
}

TEST(DetectTopology, OddFilesDoNotThrow) {
  const Tree tree;
  tree.node(0, "0-", 1000);
  tree.node(1, "5-2,x", 1000);
  tree.node(2, "0-4000000000", 1000);
  tree.write("/sys/devices/system/node/nodeX/cpulist", "0-3");
  tree.has_memory("?");
  tree.write("/proc/self/cgroup", "garbage\n::\n0:\n0::/../../up\n1:cpu");
  tree.write("/sys/fs/cgroup/cpu.max", "0 0");
  tree.write("/proc/meminfo", "MemTotal: none");
  const Topology topology = tree.detect({0, 1});
  ASSERT_EQ(topology.nodes.size(), 1u);
  EXPECT_EQ(topology.nodes[0].cpus, (Ints{0, 1}));
  EXPECT_EQ(topology.cpu_quota, 0);
}

TEST(DetectTopology, FakeNodesThatShareCpusUseEveryCpuOnce) {
  const Tree tree;
  for (int id = 0; id < 4; ++id) tree.node(id, "0-3", 1000);
  const Topology topology = tree.detect(iota(0, 4));
  ASSERT_EQ(topology.nodes.size(), 1u);
  EXPECT_EQ(topology.num_cores(), 4);
}

TEST(DetectTopology, CpusOutsideAllNodesAreReported) {
  const Tree tree;
  tree.node(0, "0-1", 1000);
  const Topology topology = tree.detect(iota(0, 4));
  EXPECT_EQ(topology.nodes[0].cpus, (Ints{0, 1}));
  EXPECT_TRUE(has(all(topology.warnings), "2 CPUs")) << all(topology.warnings);
}

TEST(DetectTopology, LiveSystemHasTheCpusOfTheAffinityMask) {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  ASSERT_EQ(sched_getaffinity(0, sizeof mask, &mask), 0);
  const Topology topology = detect_topology();
  std::set<int> cpus;
  for (const NumaNode& node : topology.nodes) {
    EXPECT_GE(node.num_cores, 1);
    EXPECT_LE(node.num_cores, static_cast<int>(node.cpus.size()));
    for (const int cpu : node.cpus) {
      EXPECT_TRUE(CPU_ISSET(cpu, &mask)) << cpu;
      EXPECT_TRUE(cpus.insert(cpu).second) << cpu << " is in two nodes";
    }
  }
  EXPECT_EQ(static_cast<int>(cpus.size()), CPU_COUNT(&mask)) << all(topology.warnings);
  EXPECT_GT(topology.memory_limit_bytes, 0u);
  EXPECT_GT(topology.memory_available_bytes, 0u);
  EXPECT_LE(topology.memory_available_bytes, topology.memory_limit_bytes);
}

}  // namespace
}  // namespace kt
