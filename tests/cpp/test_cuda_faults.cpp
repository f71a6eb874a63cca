// Faults planted in the protocol, each seen by a test that passes without it. They are planted in
// the table of driver functions, so the library has no seam for them.
#include <algorithm>
#include <mutex>

#include "stream_model.h"

namespace kt {
namespace {

using Streams = StreamModel::Streams;

// Of the planted functions, which are plain functions as the driver's are.
struct Plant {
  CuStream other = nullptr;      // a stream that nothing orders
  std::vector<CuAddress> slots;  // their words: req at 0, arrived at 64, done at 128
  void* first_memory = nullptr;
  int num_copies = 0;
  std::atomic<uint32_t>* completed = nullptr;  // a growing number of jobs
  uint32_t num_waits = 0;
  CuEvent event = nullptr;
  std::vector<std::function<void()>> held;
};

Plant plant;

const CudaDriver& real() { return double_driver(); }

bool is_word(CuAddress address, CuAddress offset) {
  return std::any_of(plant.slots.begin(), plant.slots.end(),
                     [&](CuAddress slot) { return slot + offset == address; });
}

CudaDriver watched() {
  CudaDriver driver = real();
  driver.mem_host_get_device_pointer = [](CuAddress* address, void* memory, unsigned flags) {
    const CuResult result = real().mem_host_get_device_pointer(address, memory, flags);
    plant.slots.push_back(*address);
    return result;
  };
  return driver;
}

class PlantedFault : public StreamTest {
 protected:
  void SetUp() override {
    StreamTest::SetUp();
    fake_cuda_set_delays(testing::UnitTest::GetInstance()->random_seed(), 300);
    plant = Plant{};
    ASSERT_EQ(real().stream_create(&plant.other, 1), kCuSuccess);
    ASSERT_EQ(real().event_create(&plant.event, kCuEventDisableTiming), kCuSuccess);
  }

  // "right", or what is wrong with passes of a model whose jobs go through this driver. The limit
  // is short where a fault may leave the device waiting.
  std::string outcome(const CudaDriver& driver, SignalWay way, bool graphs,
                      int64_t timeout_ms = 300) {
    std::string text = "right";
    StreamModel& model = this->model({.num_layers = 3, .defers = true});
    model.cpu_delay_us = cpu_delay_us_;
    if (plant.completed != nullptr) model.on_done = [] { plant.completed->fetch_add(1); };
    DeviceSyncOptions options = this->options(way);
    options.driver = &driver;
    options.timeout_ms = timeout_ms;
    try {
      DeviceSync sync(cpu_, 0, options);
      CuGraphExec graph = nullptr;
      if (graphs) {
        graph = capture([&] { model.enqueue(sync, 5, Streams::kOne, streams_); });
      }
      for (int pass = 0; pass < 20 && text == "right"; ++pass) {
        model.pass = pass;
        if (graphs) {
          launch(graph);
        } else {
          model.enqueue(sync, 5, Streams::kOne, streams_);
        }
        if (drain() != kCuSuccess) text = "the context is broken";
        drain_other();
        if (model.output(5) != model.expected(pass, 5)) text = "wrong output";
        sync.check();
      }
    } catch (const Error& error) {
      text = error.what();
    }
    return text;
  }

  int cpu_delay_us_ = 300;  // of each part of a job

  void drain_other() {
    while (real().stream_query(plant.other) == kCuNotReady) {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }
};

constexpr int64_t kPatientMs = 60'000;
constexpr SignalWay kBothWays[] = {SignalWay::kDoorbell, SignalWay::kHostFunction};

TEST_F(PlantedFault, WithoutOneEverythingIsRight) {
  const CudaDriver driver = watched();
  for (const SignalWay way : kBothWays) {
    for (const bool graphs : {false, true}) {
      EXPECT_EQ(outcome(driver, way, graphs, kPatientMs), "right");
    }
  }
  fake_cuda_set_shared_channel(1);
  for (const SignalWay way : kBothWays) {
    for (const bool graphs : {false, true}) {
      EXPECT_EQ(outcome(driver, way, graphs, kPatientMs), "right");
    }
  }
}

// The signal is written by a stream that the copies do not precede; it may also get lost.
TEST_F(PlantedFault, AMissingFenceIsSeen) {
  CudaDriver driver = watched();
  driver.stream_write_value32 = [](CuStream stream, CuAddress address, uint32_t value,
                                   unsigned flags) {
    const bool rings = is_word(address, 0);
    return real().stream_write_value32(rings ? plant.other : stream, address, value, flags);
  };
  EXPECT_NE(outcome(driver, SignalWay::kDoorbell, false), "right");
}

// The same with a fence that the stream has and memory does not: the copies are still on their way.
TEST_F(PlantedFault, ACopyBehindItsSignalGivesWrongOutput) {
  fake_cuda_set_store_buffer(1);
  CudaDriver driver = watched();
  driver.memcpy_dtoh_async = [](void* to, CuAddress from, size_t bytes, CuStream stream) {
    plant.held.push_back([=] { real().memcpy_dtoh_async(to, from, bytes, stream); });
    return kCuSuccess;
  };
  driver.stream_write_value32 = [](CuStream stream, CuAddress address, uint32_t value,
                                   unsigned flags) {
    const CuResult result = real().stream_write_value32(stream, address, value, flags);
    for (const auto& copy : plant.held) copy();
    plant.held.clear();
    return result;
  };
  EXPECT_EQ(outcome(driver, SignalWay::kDoorbell, false), "wrong output");
  EXPECT_EQ(outcome(driver, SignalWay::kDoorbell, true), "wrong output");
}

// Neighbouring layers share a slot: the deferred part of one reads what the next has copied.
TEST_F(PlantedFault, AReusedSlotIsSeen) {
  CudaDriver driver = real();
  driver.mem_host_alloc = [](void** memory, size_t bytes, unsigned flags) {
    if (plant.first_memory == nullptr) real().mem_host_alloc(&plant.first_memory, bytes, flags);
    *memory = plant.first_memory;
    return kCuSuccess;
  };
  driver.mem_free_host = [](void*) { return kCuSuccess; };
  // the deferred part comes so late that the next copy is first, also where a sanitizer slows it
  cpu_delay_us_ = 10'000;
  for (const SignalWay way : kBothWays) {
    plant.first_memory = nullptr;
    EXPECT_NE(outcome(driver, way, false), "right");
  }
}

TEST_F(PlantedFault, IdsThatAreNotCopiedGiveWrongOutput) {
  CudaDriver driver = real();
  driver.memcpy_dtoh_async = [](void* to, CuAddress from, size_t bytes, CuStream stream) {
    if (plant.num_copies++ % 3 == 1) return kCuSuccess;
    return real().memcpy_dtoh_async(to, from, bytes, stream);
  };
  for (const SignalWay way : kBothWays) {
    for (const bool graphs : {false, true}) {
      EXPECT_EQ(outcome(driver, way, graphs, kPatientMs), "wrong output");
    }
  }
}

TEST_F(PlantedFault, TheWrongStreamForTheSnapshotGivesWrongOutput) {
  CudaDriver driver = real();
  driver.memcpy_dtoh_async = [](void* to, CuAddress from, size_t bytes, CuStream) {
    return real().memcpy_dtoh_async(to, from, bytes, plant.other);
  };
  for (const SignalWay way : kBothWays) EXPECT_EQ(outcome(driver, way, false), "wrong output");
}

TEST_F(PlantedFault, TheWrongStreamForTheResultGivesWrongOutput) {
  CudaDriver driver = real();
  driver.memcpy_htod_async = [](CuAddress to, const void* from, size_t bytes, CuStream) {
    return real().memcpy_htod_async(to, from, bytes, plant.other);
  };
  for (const SignalWay way : kBothWays) EXPECT_EQ(outcome(driver, way, false), "wrong output");
}

// The device waits for the number of jobs done so far: right in eager passes and in the first
// launch of a graph, through at once in the second.
TEST_F(PlantedFault, ASequenceNumberInAGraphGivesWrongOutput) {
  CudaDriver driver = watched();
  driver.stream_wait_value32 = [](CuStream stream, CuAddress, uint32_t, unsigned) {
    constexpr unsigned kAtLeast = 0;
    return real().stream_wait_value32(stream, reinterpret_cast<CuAddress>(plant.completed),
                                      ++plant.num_waits, kAtLeast);
  };
  void* memory = nullptr;
  ASSERT_EQ(real().mem_host_alloc(&memory, 64, kCuHostPortable | kCuHostDeviceMap), kCuSuccess);
  for (const bool graphs : {false, true}) {
    plant.completed = new (memory) std::atomic<uint32_t>(0);
    plant.num_waits = 0;
    EXPECT_EQ(outcome(driver, SignalWay::kDoorbell, graphs, kPatientMs),
              graphs ? "wrong output" : "right");
  }
}

TEST_F(PlantedFault, DoneThatIsNotResetGivesWrongOutput) {
  CudaDriver driver = watched();
  driver.stream_write_value32 = [](CuStream stream, CuAddress address, uint32_t value,
                                   unsigned flags) {
    if (value == 0 && is_word(address, 128)) return kCuSuccess;
    return real().stream_write_value32(stream, address, value, flags);
  };
  EXPECT_EQ(outcome(driver, SignalWay::kDoorbell, true), "wrong output");
}

// Copies and signal on a stream of their own, enqueued behind the wait: right where streams have
// channels of their own, for ever stuck where they share one.
TEST_F(PlantedFault, AWaitBeforeTheCopyIsStuckOnASharedChannel) {
  CudaDriver driver = watched();
  driver.memcpy_dtoh_async = [](void* to, CuAddress from, size_t bytes, CuStream) {
    plant.held.push_back([=] { real().memcpy_dtoh_async(to, from, bytes, plant.other); });
    return kCuSuccess;
  };
  driver.stream_write_value32 = [](CuStream stream, CuAddress address, uint32_t value,
                                   unsigned flags) {
    if (!is_word(address, 0)) return real().stream_write_value32(stream, address, value, flags);
    real().event_record(plant.event, stream);
    plant.held.push_back([=] { real().stream_write_value32(plant.other, address, value, flags); });
    return kCuSuccess;
  };
  driver.stream_wait_value32 = [](CuStream stream, CuAddress address, uint32_t value,
                                  unsigned flags) {
    const CuResult result = real().stream_wait_value32(stream, address, value, flags);
    real().stream_wait_event(plant.other, plant.event, 0);
    for (const auto& call : plant.held) call();
    plant.held.clear();
    return result;
  };
  const auto run = [&](const CudaDriver& with, int64_t timeout_ms) {
    StreamModel& model = this->model();
    DeviceSyncOptions options = this->options(SignalWay::kDoorbell);
    options.driver = &with;
    options.timeout_ms = timeout_ms;
    return error_text([&] {
      DeviceSync sync(cpu_, 0, options);
      std::vector<float> result(8 * model.sizes().hidden_size);
      model.enqueue_inputs(8, 0, streams_[0]);
      const DeviceTicket ticket = model.submit(sync, 8, 0, streams_[0], streams_[0]);
      sync.sync(ticket, result.data(), streams_[0], streams_[0]);
      drain();
      sync.check();
      KT_CHECK(result == model.expected_share(0, 8, 0), "wrong output");
    });
  };
  EXPECT_EQ(run(driver, kPatientMs), "");
  start_device();
  ASSERT_EQ(real().stream_create(&plant.other, 1), kCuSuccess);
  ASSERT_EQ(real().event_create(&plant.event, kCuEventDisableTiming), kCuSuccess);
  fake_cuda_set_shared_channel(1);
  EXPECT_EQ(run(real(), kPatientMs), "");
  EXPECT_NE(run(driver, 300).find("KT_SYNC_TIMEOUT"), std::string::npos);
}

// The function that queues the job is not called, the one that waits for it is.
TEST_F(PlantedFault, AHostFunctionThatIsNeverCalledIsAnError) {
  CudaDriver driver = real();
  driver.launch_host_func = [](CuStream stream, void (*function)(void*), void* data) {
    if (function == &DeviceJobs::push) return kCuSuccess;
    return real().launch_host_func(stream, function, data);
  };
  for (const bool graphs : {false, true}) {
    const std::string text = outcome(driver, SignalWay::kHostFunction, graphs);
    EXPECT_TRUE(text == "wrong output" || text.find("KT_SYNC_TIMEOUT") != std::string::npos)
        << text;
  }
}

TEST_F(PlantedFault, AnAllocationDuringACaptureBreaksIt) {
  CudaDriver driver = real();
  driver.thread_exchange_stream_capture_mode = [](int*) { return kCuSuccess; };
  for (const SignalWay way : kBothWays) {
    EXPECT_NE(outcome(driver, way, true), "right");
    start_device();
    ASSERT_EQ(real().stream_create(&plant.other, 1), kCuSuccess);
  }
}

}  // namespace
}  // namespace kt
