// The two memory-policy system calls of the library. No libnuma calls that print or abort.
#pragma once

#include <cstddef>

namespace kt {

// Prefers one node for pages of [address, address + bytes) that are not yet touched; a full node
// spills to others. `address` is page aligned. Returns 0 or the errno (EPERM: seccomp; ENOSYS: a
// kernel without NUMA; EINVAL: a node without memory or outside cpuset.mems).
int prefer_node_for_memory(void* address, size_t bytes, int node_id);

// The same for everything the calling thread touches first from now on.
int prefer_node_for_thread(int node_id);

}  // namespace kt
