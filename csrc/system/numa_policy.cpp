#include "system/numa_policy.h"

#include <numaif.h>

#include <array>
#include <cerrno>
#include <climits>

namespace kt {
namespace {

constexpr int kMaxNodes = 1024;  // MAX_NUMNODES of x86-64 kernels
constexpr int kWordBits = sizeof(unsigned long) * CHAR_BIT;
using NodeMask = std::array<unsigned long, kMaxNodes / kWordBits>;

// The kernel reads one bit less than it is told (mm/mempolicy.c, get_nodes).
constexpr unsigned long kMaskBits = kMaxNodes + 1;

NodeMask mask_of(int node_id) {
  NodeMask mask{};
  mask[node_id / kWordBits] = 1ul << (node_id % kWordBits);
  return mask;
}

bool is_node(int node_id) { return node_id >= 0 && node_id < kMaxNodes; }

}  // namespace

int prefer_node_for_memory(void* address, size_t bytes, int node_id) {
  if (!is_node(node_id)) return EINVAL;
  const NodeMask mask = mask_of(node_id);
  return mbind(address, bytes, MPOL_PREFERRED, mask.data(), kMaskBits, 0) == 0 ? 0 : errno;
}

int prefer_node_for_thread(int node_id) {
  if (!is_node(node_id)) return EINVAL;
  const NodeMask mask = mask_of(node_id);
  return set_mempolicy(MPOL_PREFERRED, mask.data(), kMaskBits) == 0 ? 0 : errno;
}

}  // namespace kt
