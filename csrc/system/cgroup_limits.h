// What the control groups of this process allow: version 1, version 2 and mixed trees.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace kt {

// The smallest limits on the way from the process's group to the root of the tree it can see.
struct CgroupLimits {
  std::optional<std::vector<int>> cpus;  // cpuset; nothing: not limited
  std::optional<std::vector<int>> mems;  // nodes memory may come from; nothing: not limited
  double cpu_quota = 0;                  // in cores, 0: none
  std::optional<uint64_t> memory_limit_bytes;
  std::optional<uint64_t> memory_left_bytes;  // limit less what is in use and not page cache
};

// Reads `root`/proc/self/cgroup and the trees under `root`/sys/fs/cgroup. Never throws for missing
// or odd files: what cannot be read does not limit.
CgroupLimits read_cgroup_limits(const std::string& root);

}  // namespace kt
