// NUMA nodes, cores and limits of this process: a pure function of a sysfs root and of the
// process's limits.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace kt {

// One NUMA node that has at least one CPU this process may use.
struct NumaNode {
  int id = 0;             // the kernel's number
  std::vector<int> cpus;  // usable: one hyper-thread of each physical core first, then the siblings
  int num_cores = 0;      // physical cores among cpus: cpus[0 .. num_cores) are on distinct cores
  bool has_memory = true;     // memory can be bound to it
  uint64_t memory_bytes = 0;  // its size, 0 if unknown
};

// Where detection reads. The defaults are the running system; tests give recorded trees.
struct TopologySource {
  std::string root;           // prefix of /sys and /proc, "" for the live system
  std::vector<int> affinity;  // CPUs the process may run on; empty: sched_getaffinity
};

struct Topology {
  std::vector<NumaNode> nodes;          // ascending id; never empty
  double cpu_quota = 0;                 // cgroup CPU limit in cores, 0: none
  uint64_t memory_limit_bytes = 0;      // smaller of physical memory and the cgroup limits
  uint64_t memory_available_bytes = 0;  // MemAvailable, cut to what the cgroup has left
  bool can_bind = true;                 // libnuma works and the kernel allows mbind
  std::vector<std::string> warnings;    // one sentence each
  int num_cores() const;                // usable physical cores, cut to the quota (at least 1)
};

// Never throws for odd machines: a missing or strange tree becomes one node with the affinity's
// CPUs.
Topology detect_topology(const TopologySource& source = {});

// The workers of a pool: for every used node, the CPU each thread is pinned to.
struct PoolPlan {
  struct Node {
    int id = 0;                // NUMA node
    bool bind_memory = false;  // allocate with mbind
    std::vector<int> cpus;     // one per thread; -1: not pinned
  };
  std::vector<Node> nodes;
  std::vector<std::string> warnings;
  int num_threads() const;
};

// Cuts `num_threads` workers out of a topology. Threads are spread over nodes in proportion to
// their cores, physical cores before hyper-threads; a node never gets zero threads (fewer threads
// than nodes: fewer nodes, with a warning).
//
// num_threads  0: usable physical cores. More than usable CPUs: clamped to them, with a warning.
// num_nodes    0: all. More than there are: clamped, with a warning.
// node_ids     explicit nodes in this order; empty: the first num_nodes.
// Errors       kt::Error for negative numbers, unknown or repeated node ids.
PoolPlan plan_pool(const Topology& topology, int num_threads, int num_nodes,
                   const std::vector<int>& node_ids = {});

}  // namespace kt
