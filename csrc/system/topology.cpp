#include "system/topology.h"

#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <numeric>
#include <thread>

#include "system/cgroup_limits.h"
#include "system/numa_policy.h"
#include "system/proc_files.h"

namespace kt {
namespace {

constexpr const char* kNodeFolder = "/sys/devices/system/node";

bool contains(const std::vector<int>& sorted, int value) {
  return std::binary_search(sorted.begin(), sorted.end(), value);
}

std::vector<int> intersect(const std::vector<int>& a, const std::vector<int>& b) {
  std::vector<int> both;
  std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(both));
  return both;
}

// The mask is grown until the kernel takes it: machines may have more CPUs than cpu_set_t (1024).
std::vector<int> live_affinity() {
  std::vector<int> cpus;
  for (int max_cpus = CPU_SETSIZE; max_cpus <= 65536; max_cpus *= 2) {
    cpu_set_t* mask = CPU_ALLOC(max_cpus);
    if (mask == nullptr) break;
    const size_t bytes = CPU_ALLOC_SIZE(max_cpus);
    CPU_ZERO_S(bytes, mask);
    const bool done = sched_getaffinity(0, bytes, mask) == 0;
    for (int cpu = 0; done && cpu < max_cpus; ++cpu) {
      if (CPU_ISSET_S(cpu, bytes, mask)) cpus.push_back(cpu);
    }
    CPU_FREE(mask);
    if (done) break;
  }
  if (cpus.empty()) {
    cpus.resize(std::max(1u, std::thread::hardware_concurrency()));
    std::iota(cpus.begin(), cpus.end(), 0);
  }
  return cpus;
}

// The same text for two CPUs exactly if they are hyper-threads of one core.
std::string core_key(const std::string& root, int cpu) {
  const std::string folder =
      root + "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
  for (const char* name : {"thread_siblings_list", "core_cpus_list"}) {
    const std::optional<std::string> list = read_line(folder + name);
    // a list without the CPU itself is a broken table of some hypervisors
    if (list && contains(parse_id_list(*list).value_or(std::vector<int>{}), cpu)) return *list;
  }
  const std::optional<std::string> core = read_line(folder + "core_id");
  const std::optional<std::string> package = read_line(folder + "physical_package_id");
  if (!core || !package) return "cpu" + std::to_string(cpu);
  return "package" + *package + " die" + read_line(folder + "die_id").value_or("0") + " core" +
         *core;
}

// Orders a node's CPUs: the first thread of every core, then the second ones, ...
void order_cpus(const std::string& root, NumaNode& node) {
  std::map<std::string, int> threads_seen;
  std::vector<std::pair<int, int>> keyed;  // rank among the siblings, cpu
  for (const int cpu : node.cpus) keyed.emplace_back(threads_seen[core_key(root, cpu)]++, cpu);
  std::sort(keyed.begin(), keyed.end());
  for (size_t i = 0; i < keyed.size(); ++i) node.cpus[i] = keyed[i].second;
  node.num_cores = static_cast<int>(threads_seen.size());
}

std::vector<int> list_node_ids(const std::string& root) {
  std::vector<int> ids;
  std::error_code error;
  std::filesystem::directory_iterator entries(root + kNodeFolder, error);
  for (; !error && entries != std::filesystem::directory_iterator(); entries.increment(error)) {
    const std::string name = entries->path().filename().string();
    if (name.rfind("node", 0) != 0) continue;
    const std::optional<uint64_t> id = parse_number(std::string_view(name).substr(4));
    if (id && *id < 65536) ids.push_back(static_cast<int>(*id));
  }
  std::sort(ids.begin(), ids.end());
  return ids;
}

// One node with every CPU: for trees that say nothing useful.
void use_one_node(const std::string& root, const std::vector<int>& cpus, Topology& topology) {
  NumaNode node;
  node.cpus = cpus;
  order_cpus(root, node);
  topology.nodes.assign(1, node);
  topology.can_bind = false;
}

void read_nodes(const std::string& root, const std::vector<int>& allowed_cpus,
                const std::optional<std::vector<int>>& allowed_mems, Topology& topology) {
  const std::string folder = root + kNodeFolder;
  const auto with_memory = parse_id_list(read_line(folder + "/has_memory").value_or("?"));
  const std::vector<int> ids = list_node_ids(root);
  std::vector<int> left = allowed_cpus;
  for (const int id : ids) {
    NumaNode node;
    node.id = id;
    const std::string node_folder = folder + "/node" + std::to_string(id);
    const auto listed = parse_id_list(read_line(node_folder + "/cpulist").value_or(""));
    // a CPU counts once: with numa=fake every node lists all CPUs
    if (listed) node.cpus = intersect(left, *listed);
    const auto kibibytes = read_keyed_number(node_folder + "/meminfo", "MemTotal");
    node.memory_bytes = kibibytes.value_or(0) * 1024;
    node.has_memory = kibibytes.value_or(1) > 0 && (!with_memory || contains(*with_memory, id));
    if (allowed_mems && !contains(*allowed_mems, id)) node.has_memory = false;

    const std::string name = "NUMA node " + std::to_string(id);
    if (listed && listed->empty() && node.has_memory) {
      topology.warnings.push_back(name + " has memory but no CPUs: it is not used.");
    }
    if (node.cpus.empty()) continue;
    if (!node.has_memory) {
      topology.warnings.push_back(
          name + " has CPUs but no memory this process may use: its threads read other nodes.");
    }
    std::vector<int> rest;
    std::set_difference(left.begin(), left.end(), node.cpus.begin(), node.cpus.end(),
                        std::back_inserter(rest));
    left = std::move(rest);
    order_cpus(root, node);
    topology.nodes.push_back(std::move(node));
  }
  if (topology.nodes.empty()) {
    topology.warnings.assign(1, "No NUMA node under " + folder +
                                    " has a CPU this process may use: "
                                    "the machine is treated as one node.");
    use_one_node(root, allowed_cpus, topology);
  } else if (!left.empty()) {
    topology.warnings.push_back(std::to_string(left.size()) + " CPUs from CPU " +
                                std::to_string(left.front()) +
                                " on belong to no NUMA node: they are not used.");
  }
}

// The nodes memory may come from: the kernel's own sum of all cpusets, and the groups' files where
// a recorded tree has only those.
std::optional<std::vector<int>> read_allowed_mems(const std::string& root,
                                                  const CgroupLimits& cgroup) {
  constexpr std::string_view kKey = "Mems_allowed_list:";
  const std::string status = read_file(root + "/proc/self/status").value_or("");
  const size_t at = status.find(kKey);
  if (at == std::string::npos) return cgroup.mems;
  const size_t begin = at + kKey.size();
  const auto mems =
      parse_id_list(std::string_view(status).substr(begin, status.find('\n', begin) - begin));
  if (!mems || mems->empty()) return cgroup.mems;
  return cgroup.mems ? intersect(*mems, *cgroup.mems) : *mems;
}

void read_memory(const std::string& root, const CgroupLimits& cgroup, Topology& topology) {
  const std::string meminfo = root + "/proc/meminfo";
  const uint64_t total = read_keyed_number(meminfo, "MemTotal").value_or(0) * 1024;
  const uint64_t available = read_keyed_number(meminfo, "MemAvailable").value_or(0) * 1024;
  const uint64_t limit = cgroup.memory_limit_bytes.value_or(0);
  topology.memory_limit_bytes = total == 0 || (limit != 0 && limit < total) ? limit : total;
  const uint64_t left = cgroup.memory_left_bytes.value_or(available);
  topology.memory_available_bytes = available == 0 ? left : std::min(available, left);
}

// Tries mbind on one page: EPERM is a container's seccomp filter, ENOSYS a kernel without NUMA.
void probe_binding(Topology& topology) {
  const auto node = std::find_if(topology.nodes.begin(), topology.nodes.end(),
                                 [](const NumaNode& candidate) { return candidate.has_memory; });
  if (node == topology.nodes.end()) {
    topology.can_bind = false;
    return;
  }
  const size_t page_bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* page =
      mmap(nullptr, page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) return;
  const int error = prefer_node_for_memory(page, page_bytes, node->id);
  munmap(page, page_bytes);
  if (error == 0) return;
  topology.can_bind = false;
  topology.warnings.push_back(std::string("The kernel refuses to bind memory to a NUMA node (") +
                              std::strerror(error) +
                              "): memory stays where it is touched first; in a container add "
                              "--cap-add SYS_NICE or a seccomp profile that allows mbind.");
}

}  // namespace

int Topology::num_cores() const {
  int cores = 0;
  for (const NumaNode& node : nodes) cores += node.num_cores;
  // half a core of quota cannot feed a thread that spins at a barrier: round down
  if (cpu_quota > 0) cores = static_cast<int>(std::min<double>(cores, std::floor(cpu_quota)));
  return std::max(cores, 1);
}

Topology detect_topology(const TopologySource& source) {
  Topology topology;
  std::vector<int> affinity = source.affinity.empty() ? live_affinity() : source.affinity;
  std::sort(affinity.begin(), affinity.end());
  affinity.erase(std::unique(affinity.begin(), affinity.end()), affinity.end());

  const CgroupLimits cgroup = read_cgroup_limits(source.root);
  topology.cpu_quota = cgroup.cpu_quota;
  std::vector<int> cpus = cgroup.cpus ? intersect(affinity, *cgroup.cpus) : affinity;
  // the mask is what the kernel enforces; a cpuset that contradicts it was read from a wrong place
  if (cpus.empty()) cpus = affinity;
  read_nodes(source.root, cpus, read_allowed_mems(source.root, cgroup), topology);
  read_memory(source.root, cgroup, topology);
  if (source.root.empty() && topology.can_bind) probe_binding(topology);
  return topology;
}

}  // namespace kt
