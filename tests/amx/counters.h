// Counts what the interpreter executed, in the whole process.
#pragma once

#include <cstdint>

namespace kt_amx {

enum class Counter {
  kTraps,
  kConfigs,
  kConfigStores,
  kLoads,
  kStreamingLoads,
  kStores,
  kZeros,
  kReleases,
  kTdpbssd,
  kTdpbsud,
  kTdpbusd,
  kTdpbuud,
  kTdpbf16ps,
  kVpdpbusd,
  kVpdpbusds,
  kBytesLoaded,
  kStreamingBytesLoaded,
  kBytesStored,
  kNumCounters,
};

// Threads  any, also inside a signal handler.
void count(Counter counter, uint64_t amount = 1);

}  // namespace kt_amx
