#include "amx/counters.h"

#include <atomic>
#include <cstring>
#include <iterator>

#include "amx/interpreter.h"

namespace kt_amx {
namespace {

constexpr int kNumCounters = static_cast<int>(Counter::kNumCounters);
constexpr const char* kNames[] = {
    "traps",
    "configs",
    "config_stores",
    "loads",
    "streaming_loads",
    "stores",
    "zeros",
    "releases",
    "tdpbssd",
    "tdpbsud",
    "tdpbusd",
    "tdpbuud",
    "tdpbf16ps",
    "vpdpbusd",
    "vpdpbusds",
    "bytes_loaded",
    "streaming_bytes_loaded",
    "bytes_stored",
};
static_assert(std::size(kNames) == kNumCounters);

std::atomic<uint64_t> counters[kNumCounters];

}  // namespace

void count(Counter counter, uint64_t amount) {
  counters[static_cast<int>(counter)].fetch_add(amount, std::memory_order_relaxed);
}

}  // namespace kt_amx

void kt_amx_counters_reset() {
  for (std::atomic<uint64_t>& counter : kt_amx::counters) counter = 0;
}

uint64_t kt_amx_counter(const char* name) {
  for (int i = 0; i < kt_amx::kNumCounters; ++i) {
    if (std::strcmp(kt_amx::kNames[i], name) == 0) return kt_amx::counters[i];
  }
  return UINT64_MAX;
}
