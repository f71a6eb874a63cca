// What a server does for every token takes nothing from the heap, once it was done a few times.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "counted_allocations.h"
#include "runtime/cuda_sync.h"

namespace kt {
namespace {

// Of `body`, called many times: the fewest of some rounds, as what is kept may still become larger
// where the threads meet as they never did before.
template <typename Body>
uint64_t allocations_of(Body&& body) {
  uint64_t fewest = UINT64_MAX;
  for (int round = 0; round < 10 && fewest != 0; ++round) {
    const uint64_t before = num_allocations;
    for (int i = 0; i < 300; ++i) body();
    fewest = std::min<uint64_t>(fewest, num_allocations - before);
  }
  return fewest;
}

TEST(Allocations, OfAStream) {
  CpuStream stream;
  const auto job = [] {};
  EXPECT_EQ(allocations_of([&] { stream.wait(stream.submit(job)); }), 0u);
  EXPECT_EQ(allocations_of([&] { stream.run(job); }), 0u);
  EXPECT_EQ(allocations_of([&] {
              for (int i = 0; i < 40; ++i) stream.submit(job);
              stream.wait(stream.submit(job));
            }),
            0u);
}

// A driver that does everything at once, on the calling thread: the double allocates itself.
CudaDriver instant_driver() {
  CudaDriver driver;
  driver.has_memory_operations = true;
  driver.device_get = [](CuDevice*, int) { return kCuSuccess; };
  driver.device_primary_ctx_retain = [](CuContext*, CuDevice) { return kCuSuccess; };
  driver.device_primary_ctx_release = [](CuDevice) { return kCuSuccess; };
  driver.ctx_push_current = [](CuContext) { return kCuSuccess; };
  driver.ctx_pop_current = [](CuContext*) { return kCuSuccess; };
  driver.thread_exchange_stream_capture_mode = [](int*) { return kCuSuccess; };
  driver.mem_host_alloc = [](void** memory, size_t bytes, unsigned) {
    *memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    return kCuSuccess;
  };
  driver.mem_free_host = [](void* memory) {
    std::free(memory);
    return kCuSuccess;
  };
  driver.mem_host_get_device_pointer = [](CuAddress* address, void* memory, unsigned) {
    *address = reinterpret_cast<CuAddress>(memory);
    return kCuSuccess;
  };
  driver.memcpy_dtoh_async = [](void* to, CuAddress from, size_t bytes, CuStream) {
    std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
    return kCuSuccess;
  };
  driver.memcpy_htod_async = [](CuAddress to, const void* from, size_t bytes, CuStream) {
    std::memcpy(reinterpret_cast<void*>(to), from, bytes);
    return kCuSuccess;
  };
  driver.stream_is_capturing = [](CuStream, int*) { return kCuSuccess; };
  driver.stream_wait_event = [](CuStream, CuEvent, unsigned) { return kCuSuccess; };
  driver.stream_write_value32 = [](CuStream, CuAddress word, uint32_t value, unsigned) {
    reinterpret_cast<std::atomic<uint32_t>*>(word)->store(value);
    return kCuSuccess;
  };
  driver.stream_wait_value32 = [](CuStream, CuAddress word, uint32_t value, unsigned) {
    while (reinterpret_cast<std::atomic<uint32_t>*>(word)->load() != value) {
      std::this_thread::yield();
    }
    return kCuSuccess;
  };
  driver.launch_host_func = [](CuStream, void (*function)(void*), void* data) {
    function(data);
    return kCuSuccess;
  };
  driver.event_create = [](CuEvent*, unsigned) { return kCuSuccess; };
  driver.event_record = [](CuEvent, CuStream) { return kCuSuccess; };
  driver.event_query = [](CuEvent) { return kCuSuccess; };
  driver.event_destroy = [](CuEvent) { return kCuSuccess; };
  return driver;
}

TEST(Allocations, OfAForwardThatADeviceAsksFor) {
  const CudaDriver driver = instant_driver();
  CpuStream stream;
  std::vector<float> values(64, 1.0f);
  std::vector<float> result(64);
  const std::vector<int64_t> ids(2);
  const std::vector<float> weights(2);
  DeviceInput input;
  input.hidden_states = values.data();
  input.dtype = DType::kFloat32;
  input.topk_ids = ids.data();
  input.topk_weights = weights.data();
  input.num_tokens = 1;
  input.top_k = 2;
  input.hidden_size = 64;
  for (const SignalWay way : {SignalWay::kDoorbell, SignalWay::kHostFunction}) {
    DeviceSync sync(stream, 0, {.way = way, .driver = &driver});
    int layer = 0;
    EXPECT_EQ(allocations_of([&] {
                DeviceWork work;
                work.run = [](const HostBuffers& buffers) {
                  static_cast<float*>(buffers.output)[0] = 7;
                };
                work.owner = &sync;
                work.layer_idx = work.chain_position = layer++ % 3;
                result[0] = 0;
                sync.sync(sync.submit(input, std::move(work), nullptr, nullptr), result.data(),
                          nullptr, nullptr);
                ASSERT_EQ(result[0], 7);
              }),
              0u);
    sync.check();
  }
}

}  // namespace
}  // namespace kt
