#include "system/cgroup_limits.h"

#include <algorithm>
#include <sstream>
#include <string_view>

#include "system/proc_files.h"

namespace kt {
namespace {

// A controller's folders, the process's own first, then its parents up to the mount point.
//
// Without a cgroup namespace a container sees the host's path but has its own group mounted at the
// top: the folders of the path do not exist and the walk ends where the limits are.
std::vector<std::string> folders_up(const std::string& mount, std::string path) {
  std::vector<std::string> folders;
  if (path.find("/..") != std::string::npos) path.clear();  // above the namespace: not visible
  while (!path.empty() && path != "/") {
    folders.push_back(mount + path);
    path.resize(std::min(path.rfind('/'), path.size()));
  }
  folders.push_back(mount);
  return folders;
}

std::vector<std::string> split(std::string_view text, char separator) {
  std::vector<std::string> parts;
  size_t begin = 0;
  while (begin <= text.size()) {
    const size_t end = std::min(text.find(separator, begin), text.size());
    parts.emplace_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

// "150000 100000": microseconds of CPU time in a period; 0 for "max".
double quota_of(std::string_view quota, std::string_view period) {
  const std::optional<uint64_t> quota_us = parse_number(quota);
  const std::optional<uint64_t> period_us = parse_number(period);
  if (!quota_us || !period_us || *quota_us == 0 || *period_us == 0) return 0;
  return static_cast<double>(*quota_us) / static_cast<double>(*period_us);
}

class Reader {
 public:
  void read_v2(const std::vector<std::string>& folders) {
    for (const std::string& folder : folders) {
      narrow(limits_.cpus, folder + "/cpuset.cpus.effective");
      narrow(limits_.mems, folder + "/cpuset.mems.effective");
      const std::vector<std::string> words =
          split(read_line(folder + "/cpu.max").value_or("max"), ' ');
      if (words.size() == 2) lower_quota(quota_of(words[0], words[1]));
      lower_memory(folder, "/memory.max", "/memory.current", "");
    }
  }

  // `controllers` are the words of one line of /proc/self/cgroup.
  void read_v1(const std::vector<std::string>& controllers,
               const std::vector<std::string>& folders) {
    const auto has = [&](const char* name) {
      return std::find(controllers.begin(), controllers.end(), name) != controllers.end();
    };
    for (const std::string& folder : folders) {
      if (has("cpuset")) {
        // kernels before 3.17 have no effective_*
        if (!narrow(limits_.cpus, folder + "/cpuset.effective_cpus")) {
          narrow(limits_.cpus, folder + "/cpuset.cpus");
        }
        if (!narrow(limits_.mems, folder + "/cpuset.effective_mems")) {
          narrow(limits_.mems, folder + "/cpuset.mems");
        }
      }
      if (has("cpu")) {
        lower_quota(quota_of(read_line(folder + "/cpu.cfs_quota_us").value_or(""),
                             read_line(folder + "/cpu.cfs_period_us").value_or("")));
      }
      if (has("memory")) {
        lower_memory(folder, "/memory.limit_in_bytes", "/memory.usage_in_bytes", "total_");
      }
    }
  }

  const CgroupLimits& limits() const { return limits_; }

 private:
  // Intersects with the list in a file. Returns false where there is no (non-empty) list.
  static bool narrow(std::optional<std::vector<int>>& ids, const std::string& path) {
    const std::optional<std::vector<int>> list = parse_id_list(read_line(path).value_or(""));
    if (!list || list->empty()) return false;
    if (!ids) {
      ids = list;
    } else {
      std::erase_if(*ids,
                    [&](int id) { return !std::binary_search(list->begin(), list->end(), id); });
    }
    return true;
  }

  void lower_quota(double quota) {
    if (quota > 0 && (limits_.cpu_quota == 0 || quota < limits_.cpu_quota)) {
      limits_.cpu_quota = quota;
    }
  }

  // The usage of a group includes page cache, which the kernel gives up before it kills: reading a
  // checkpoint must not look like a full group.
  void lower_memory(const std::string& folder, const char* limit_name, const char* usage_name,
                    const std::string& stat_prefix) {
    const auto limit = parse_number(read_line(folder + limit_name).value_or(""));
    if (!limit) return;
    limits_.memory_limit_bytes = std::min(*limit, limits_.memory_limit_bytes.value_or(*limit));
    const uint64_t usage = parse_number(read_line(folder + usage_name).value_or("")).value_or(0);
    const std::string stat = folder + "/memory.stat";
    const uint64_t cache = read_keyed_number(stat, stat_prefix + "inactive_file").value_or(0) +
                           read_keyed_number(stat, stat_prefix + "active_file").value_or(0);
    const uint64_t used = usage - std::min(usage, cache);
    const uint64_t left = *limit - std::min(*limit, used);
    limits_.memory_left_bytes = std::min(left, limits_.memory_left_bytes.value_or(left));
  }

  CgroupLimits limits_;
};

}  // namespace

CgroupLimits read_cgroup_limits(const std::string& root) {
  const std::string mounts = root + "/sys/fs/cgroup";
  Reader reader;
  std::istringstream lines(read_file(root + "/proc/self/cgroup").value_or(""));
  for (std::string line; std::getline(lines, line);) {
    // hierarchy:controllers:path, where the path may hold colons
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string names = line.substr(first + 1, second - first - 1);
    const std::string path = line.substr(second + 1);
    if (names.empty()) {
      reader.read_v2(folders_up(mounts, path));
      reader.read_v2(folders_up(mounts + "/unified", path));  // systemd's mixed mode
      continue;
    }
    const std::vector<std::string> controllers = split(names, ',');
    reader.read_v1(controllers, folders_up(mounts + "/" + names, path));
    if (controllers.size() == 1) continue;
    for (const std::string& name : controllers) {
      reader.read_v1({name}, folders_up(mounts + "/" + name, path));
    }
  }
  return reader.limits();
}

}  // namespace kt
