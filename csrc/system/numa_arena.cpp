#include "system/numa_arena.h"

#include <numaif.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <sstream>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/span.h"
#include "system/numa_policy.h"

namespace kt {
namespace {

constexpr size_t kHugeBytes = size_t{2} << 20;

size_t page_size() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

std::string describe(size_t bytes, int node_id) {
  std::ostringstream text;
  text << bytes << " bytes";
  if (node_id >= 0) text << " on NUMA node " << node_id;
  return text.str();
}

// Adds what /proc/self/smaps says of the mappings inside [begin, end). An arena's neighbours are
// inaccessible pages of its own, so that the kernel never merges it with another mapping.
void read_smaps(uintptr_t begin, uintptr_t end, PageReport& report) {
  std::ifstream smaps("/proc/self/smaps");
  bool inside = false;
  for (std::string line; std::getline(smaps, line);) {
    std::istringstream words(line);
    std::string key;
    words >> key;
    if (!key.empty() && key.back() != ':') {
      // "7f12a0000000-7f12a0200000 rw-p ...", ascending: the rest of the file costs a walk over
      // the page tables of everything above
      std::istringstream range(key);
      uintptr_t first = 0;
      range >> std::hex >> first;
      if (first >= end) return;
      inside = first >= begin;
      continue;
    }
    uint64_t kibibytes = 0;
    if (!inside || !(words >> kibibytes)) continue;
    if (key == "Rss:") report.resident_bytes += kibibytes * 1024;
    if (key == "AnonHugePages:" || key == "Private_Hugetlb:" || key == "Shared_Hugetlb:") {
      report.huge_bytes += kibibytes * 1024;
    }
  }
}

// Share of the touched pages that lie on `node_id`, from evenly spaced samples; 1 if the kernel
// does not tell.
double local_share(uint8_t* data, size_t bytes, int node_id) {
  constexpr size_t kMaxSamples = 4096;  // error of a share below 1 % (1 / (2 sqrt 4096))
  const size_t num_pages = bytes / page_size();
  const size_t num_samples = std::min(num_pages, kMaxSamples);
  std::vector<void*> pages(num_samples);
  std::vector<int> nodes(num_samples, -1);
  for (size_t i = 0; i < num_samples; ++i) {
    pages[i] = data + num_pages * i / num_samples * page_size();
  }
  // without target nodes move_pages only reports
  if (move_pages(0, num_samples, pages.data(), nullptr, nodes.data(), 0) != 0) return 1;
  const auto touched = std::count_if(nodes.begin(), nodes.end(), [](int id) { return id >= 0; });
  const auto local = std::count(nodes.begin(), nodes.end(), node_id);
  return touched == 0 ? 1 : static_cast<double>(local) / static_cast<double>(touched);
}

}  // namespace

NumaArena::NumaArena(size_t bytes, int node_id) : size_(bytes), node_id_(node_id) {
  if (bytes == 0) return;
  const size_t page = page_size();
  const size_t align = bytes >= kHugeBytes ? kHugeBytes : page;
  // one inaccessible page stays on each side
  const size_t slack = align + page;
  KT_CHECK(bytes <= SIZE_MAX / 2,
           "Cannot map " << describe(bytes, node_id) << ": no address space is that large.");
  const size_t data_bytes = round_up(static_cast<int64_t>(bytes), static_cast<int64_t>(align));
  mapping_bytes_ = data_bytes + slack;
  void* mapping = mmap(nullptr, mapping_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  KT_CHECK(mapping != MAP_FAILED, "Cannot map "
                                      << describe(bytes, node_id) << ": " << std::strerror(errno)
                                      << "; free memory or load fewer experts on the CPU.");
  mapping_ = static_cast<uint8_t*>(mapping);
  const uintptr_t first = reinterpret_cast<uintptr_t>(mapping_) + page;
  data_ = mapping_ + (round_up(static_cast<int64_t>(first), static_cast<int64_t>(align)) -
                      reinterpret_cast<intptr_t>(mapping_));
  if (mprotect(data_, data_bytes, PROT_READ | PROT_WRITE) != 0) {
    const int error = errno;
    munmap(mapping_, mapping_bytes_);
    KT_CHECK(false, "Cannot reserve " << describe(bytes, node_id) << ": " << std::strerror(error)
                                      << "; free memory or load fewer experts on the CPU.");
  }
  if (align == kHugeBytes && madvise(data_, data_bytes, MADV_HUGEPAGE) != 0) {
    warning_ = "The kernel gives no transparent huge pages (" + std::string(std::strerror(errno)) +
               "): weights on small pages read slower.";
  }
  if (node_id < 0) return;
  const int error = prefer_node_for_memory(data_, data_bytes, node_id);
  bound_ = error == 0;
  if (!bound_) {
    if (!warning_.empty()) warning_ += ' ';
    warning_ += "Cannot bind " + describe(bytes, node_id) + " (" + std::strerror(error) +
                "): the memory stays where it is touched first.";
  }
}

NumaArena::~NumaArena() {
  if (mapping_ != nullptr) munmap(mapping_, mapping_bytes_);
}

NumaArena::NumaArena(NumaArena&& other) noexcept { *this = std::move(other); }

NumaArena& NumaArena::operator=(NumaArena&& other) noexcept {
  // the other one frees what was here
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(mapping_, other.mapping_);
  std::swap(mapping_bytes_, other.mapping_bytes_);
  std::swap(node_id_, other.node_id_);
  std::swap(bound_, other.bound_);
  std::swap(warning_, other.warning_);
  return *this;
}

PageReport NumaArena::report() const {
  PageReport report;
  if (mapping_ == nullptr) return report;
  const size_t page = page_size();
  const size_t align = size_ >= kHugeBytes ? kHugeBytes : page;
  report.bytes = round_up(static_cast<int64_t>(size_), static_cast<int64_t>(align));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data_);
  read_smaps(begin, begin + report.bytes, report);
  report.local_bytes = report.resident_bytes;
  if (node_id_ >= 0) {
    const double share = local_share(data_, report.bytes, node_id_);
    report.local_bytes = static_cast<uint64_t>(share * static_cast<double>(report.resident_bytes));
  }
  return report;
}

}  // namespace kt
