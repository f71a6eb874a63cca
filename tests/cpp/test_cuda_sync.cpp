// Forwards that a device's stream asks for, on the double: each way to signal, eager and in graphs.
#include <atomic>
#include <thread>

#include "stream_model.h"

namespace kt {
namespace {

using Streams = StreamModel::Streams;
using std::chrono::milliseconds;

INSTANTIATE_TEST_SUITE_P(Ways, CudaSync, each_way(), way_name);

TEST_P(CudaSync, EagerPassesGiveTheSynchronousAnswer) {
  for (const Streams how : {Streams::kOne, Streams::kAlternate, Streams::kApart}) {
    for (const bool defers : {false, true}) {
      StreamModel& model = this->model({.num_layers = 3, .int32_ids = defers, .defers = defers});
      model.cpu_delay_us = 100;
      DeviceSync sync(cpu_, 0, options());
      for (const int tokens : {8, 1, 5}) {
        model.pass = tokens;
        model.enqueue(sync, tokens, how, streams_);
        ASSERT_EQ(drain(), kCuSuccess);
        ASSERT_EQ(model.output(tokens), model.expected(tokens, tokens));
      }
      sync.check();
    }
  }
}

// One arena serves every size: a graph of each, replayed in any order, between eager passes.
TEST_P(CudaSync, GraphsOfSeveralSizesReplayInAnyOrder) {
  for (const Streams how : {Streams::kOne, Streams::kAlternate, Streams::kApart}) {
    StreamModel& model = this->model({.num_layers = 3, .max_tokens = 8, .defers = true});
    DeviceSync sync(cpu_, 0, options());
    model.enqueue(sync, 8, how, streams_);
    ASSERT_EQ(drain(), kCuSuccess);
    const std::vector<int> sizes = {8, 4, 2, 1};
    std::vector<CuGraphExec> graphs;
    for (const int tokens : sizes) {
      graphs.push_back(capture([&] { model.enqueue(sync, tokens, how, streams_); }));
    }
    for (int pass = 1; pass < 20; ++pass) {
      const int which = pass * 5 % 7 % 4;
      model.pass = pass;
      launch(graphs[which]);
      if (pass % 6 == 0) model.enqueue(sync, 3, how, streams_);
      ASSERT_EQ(drain(), kCuSuccess);
      const int tokens = pass % 6 == 0 ? 3 : sizes[which];
      ASSERT_EQ(model.output(tokens), model.expected(pass, tokens)) << "pass " << pass;
    }
    EXPECT_EQ(sync.num_arenas(), 1u);
    sync.check();
  }
}

// The buckets of a captured prefill: each runs twice eagerly before it is captured.
TEST_P(CudaSync, CapturedPrefillIsWarmedUpAndReplayed) {
  StreamModel& model = this->model({.num_layers = 2, .max_tokens = 200});
  DeviceSync sync(cpu_, 0, options());
  std::vector<std::pair<int, CuGraphExec>> graphs;
  for (int tokens = 200; tokens >= 25; tokens /= 2) {
    for (int i = 0; i < 2; ++i) model.enqueue(sync, tokens, Streams::kOne, streams_);
    ASSERT_EQ(drain(), kCuSuccess);
    graphs.emplace_back(tokens,
                        capture([&] { model.enqueue(sync, tokens, Streams::kOne, streams_); }));
  }
  for (int pass = 1; pass < 9; ++pass) {
    const auto& [tokens, graph] = graphs[pass % graphs.size()];
    model.pass = pass;
    launch(graph);
    ASSERT_EQ(drain(), kCuSuccess);
    ASSERT_EQ(model.output(tokens), model.expected(pass, tokens));
  }
  EXPECT_EQ(sync.num_arenas(), 1u);
}

TEST_P(CudaSync, SeveralLaunchesFollowEachOtherWithoutTheHost) {
  StreamModel& model = this->model({.num_layers = 2});
  DeviceSync sync(cpu_, 0, options());
  const CuGraphExec graph = capture([&] { model.enqueue(sync, 4, Streams::kOne, streams_); });
  std::vector<int> passes;
  for (int i = 0; i < 10; ++i) {
    model.kernel(streams_[0], [&model, i] { model.pass = i; });
    launch(graph);
    model.kernel(streams_[0], [&, i] {
      if (model.output(4) == model.expected(i, 4)) passes.push_back(i);
    });
  }
  ASSERT_EQ(drain(), kCuSuccess);
  EXPECT_EQ(passes.size(), 10u);
}

TEST_P(CudaSync, TwoJobsMayBeOutstanding) {
  StreamModel& model = this->model({.num_layers = 2});
  DeviceSync sync(cpu_, 0, options());
  std::vector<int> order;
  model.on_job = [&](int layer) { order.push_back(layer); };
  std::vector<float> results[2] = {std::vector<float>(24), std::vector<float>(24)};
  const auto enqueue = [&] {
    DeviceTicket tickets[2];
    for (const int layer : {0, 1}) {
      model.enqueue_inputs(4, layer, streams_[0]);
      tickets[layer] = model.submit(sync, 4, layer, streams_[0], streams_[0]);
    }
    for (const int layer : {0, 1}) {
      sync.sync(tickets[layer], results[layer].data(), streams_[0], streams_[0]);
    }
  };
  enqueue();
  ASSERT_EQ(drain(), kCuSuccess);
  const CuGraphExec graph = capture(enqueue);
  for (int i = 0; i < 5; ++i) launch(graph);
  ASSERT_EQ(drain(), kCuSuccess);
  EXPECT_EQ(order, (std::vector<int>{0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1}));
  for (const int layer : {0, 1}) EXPECT_EQ(results[layer], model.expected_share(0, 4, layer));
}

TEST_P(CudaSync, GrowthKeepsTheArenaOfAGraph) {
  StreamModel& model = this->model({.max_tokens = 300});
  DeviceSync sync(cpu_, 0, options());
  const CuGraphExec small = capture([&] { model.enqueue(sync, 4, Streams::kOne, streams_); });
  // memory is pinned during a capture, too
  const CuGraphExec large = capture([&] { model.enqueue(sync, 300, Streams::kOne, streams_); });
  EXPECT_EQ(sync.num_arenas(), 2u);
  sync.clear();
  EXPECT_EQ(sync.num_arenas(), 2u) << "graphs refer to both";
  for (int pass = 0; pass < 6; ++pass) {
    const int tokens = pass % 2 == 0 ? 4 : 300;
    model.pass = pass;
    launch(pass % 2 == 0 ? small : large);
    ASSERT_EQ(drain(), kCuSuccess);
    ASSERT_EQ(model.output(tokens), model.expected(pass, tokens));
  }
}

TEST_P(CudaSync, ClearFreesWhatNobodyHolds) {
  StreamModel& model = this->model({.max_tokens = 300});
  const uint64_t before = fake_cuda_host_bytes();
  {
    DeviceSync sync(cpu_, 0, options());
    fake_cuda_pause(streams_[0]);
    for (const int tokens : {4, 300, 5}) model.enqueue(sync, tokens, Streams::kOne, streams_);
    fake_cuda_resume(streams_[0]);
    ASSERT_EQ(drain(), kCuSuccess);
    EXPECT_EQ(sync.num_arenas(), 2u);
    sync.clear();
    EXPECT_EQ(sync.num_arenas(), 0u);
    EXPECT_EQ(fake_cuda_host_bytes(), before);
    model.enqueue(sync, 7, Streams::kOne, streams_);
    ASSERT_EQ(drain(), kCuSuccess);
    EXPECT_EQ(model.output(7), model.expected(0, 7));
  }
  EXPECT_EQ(fake_cuda_host_bytes(), before) << "the destructor frees what drained";
}

TEST_P(CudaSync, GrowthFreesTheArenaThatNobodyHolds) {
  StreamModel& model = this->model({.max_tokens = 1000});
  DeviceSync sync(cpu_, 0, options());
  for (int tokens = 100; tokens <= 1000; tokens += 100) {
    model.enqueue(sync, tokens, Streams::kOne, streams_);
    ASSERT_EQ(drain(), kCuSuccess);
    ASSERT_EQ(model.output(tokens), model.expected(0, tokens));
    EXPECT_EQ(sync.num_arenas(), 1u) << tokens;
  }
}

TEST_P(CudaSync, TheMaskIsReadByEachJob) {
  StreamModel& model = this->model();
  DeviceSync sync(cpu_, 0, options());
  const CuGraphExec graph = capture([&] { model.enqueue(sync, 8, Streams::kOne, streams_); });
  std::vector<std::vector<float>> outputs;
  for (const uint8_t skipped : {0, 1, 0}) {
    model.mask.assign(model.mask.size(), skipped);
    launch(graph);
    ASSERT_EQ(drain(), kCuSuccess);
    outputs.push_back(model.output(8));
    EXPECT_EQ(outputs.back(), model.expected(0, 8));
  }
  EXPECT_NE(outputs[0], outputs[1]);
  EXPECT_EQ(outputs[0], outputs[2]);
}

TEST_P(CudaSync, ARetiredLayerFailsWithoutRunning) {
  StreamModel& model = this->model();
  DeviceSync sync(cpu_, 0, options());
  const CuGraphExec graph = capture([&] { model.enqueue(sync, 2, Streams::kOne, streams_); });
  std::atomic<int> jobs{0};
  model.on_job = [&](int) { ++jobs; };
  sync.retire(&model);
  launch(graph);
  ASSERT_EQ(drain(), kCuSuccess);
  EXPECT_EQ(jobs, 0);
  EXPECT_NE(error_text([&] { sync.check(); }).find("closed"), std::string::npos);
}

TEST_P(CudaSync, ATicketIsSyncedOnce) {
  StreamModel& model = this->model();
  DeviceSync sync(cpu_, 0, options());
  std::vector<float> result(48);
  const DeviceTicket ticket = model.submit(sync, 8, 0, streams_[0], streams_[0]);
  sync.sync(ticket, result.data(), streams_[0], streams_[0]);
  EXPECT_THROW(sync.sync(ticket, result.data(), streams_[0], streams_[0]), Error);
  const DeviceTicket dropped = model.submit(sync, 8, 0, streams_[0], streams_[0]);
  ASSERT_EQ(drain(), kCuSuccess);
  sync.retire(&model);
  EXPECT_THROW(sync.sync(dropped, result.data(), streams_[0], streams_[0]), Error);
}

// What was submitted and never synced must not let a later wait through.
TEST_P(CudaSync, AnAbandonedJobDoesNotAnswerForALaterOne) {
  StreamModel& abandoned = this->model();
  StreamModel& model = this->model();
  model.cpu_delay_us = 500;
  DeviceSync sync(cpu_, 0, options());
  for (int i = 0; i < 20; ++i) {
    abandoned.submit(sync, 8, 0, streams_[0], streams_[0]);
    if (i % 2 == 0) drain();
    sync.retire(&abandoned);
    model.enqueue(sync, 8, Streams::kOne, streams_);
    ASSERT_EQ(drain(), kCuSuccess);
    ASSERT_EQ(model.output(8), model.expected(0, 8));
  }
}

TEST_P(CudaSync, SubmitAndSyncOnBothSidesOfACaptureAreRefused) {
  StreamModel& model = this->model();
  DeviceSync sync(cpu_, 0, options());
  std::vector<float> result(48);
  DeviceTicket ticket;
  capture([&] { ticket = model.submit(sync, 8, 0, streams_[0], streams_[0]); });
  EXPECT_NE(error_text([&] {
              sync.sync(ticket, result.data(), streams_[0], streams_[0]);
            }).find("capture both, or neither"),
            std::string::npos);
  model.enqueue(sync, 8, Streams::kOne, streams_);
  ASSERT_EQ(drain(), kCuSuccess);
  EXPECT_EQ(model.output(8), model.expected(0, 8));
}

TEST_P(CudaSync, ShutdownAnswersWhatIsOutstanding) {
  StreamModel& model = this->model({.num_layers = 3});
  std::atomic<bool> open{false};
  {
    DeviceSync sync(cpu_, 0, options());
    model.enqueue(sync, 8, Streams::kOne, streams_);
    ASSERT_EQ(drain(), kCuSuccess);
    fake_cuda_pause(streams_[0]);
    model.enqueue(sync, 8, Streams::kOne, streams_);
    std::thread opener([&] {
      std::this_thread::sleep_for(milliseconds(30));
      fake_cuda_resume(streams_[0]);
    });
    model.on_job = [&](int) { open = true; };
    opener.detach();
  }
  ASSERT_EQ(drain(), kCuSuccess) << "nothing hangs";
}

TEST_P(CudaSync, AGraphLaunchedAfterShutdownDoesNotHang) {
  StreamModel& model = this->model();
  CuGraphExec graph = nullptr;
  {
    DeviceSync sync(cpu_, 0, options());
    graph = capture([&] { model.enqueue(sync, 8, Streams::kOne, streams_); });
  }
  launch(graph);
  EXPECT_EQ(drain(), kCuSuccess);
}

TEST_P(CudaSync, OverlapIsWhatTheDeviceDoesNotWaitFor) {
  for (const bool hidden : {true, false}) {
    fake_cuda_set_delays(0, 0);
    StreamModel& model = this->model({.num_layers = 1});
    DeviceSync sync(cpu_, 0, options());
    model.cpu_delay_us = 40'000;
    std::vector<float> result(48);
    for (int i = 0; i < 3; ++i) {
      const DeviceTicket ticket = model.submit(sync, 8, 0, streams_[0], streams_[0]);
      if (hidden) {
        model.kernel(streams_[0], [] { std::this_thread::sleep_for(milliseconds(200)); });
      }
      sync.sync(ticket, result.data(), streams_[0], streams_[0]);
    }
    ASSERT_EQ(drain(), kCuSuccess);
    const DeviceTimes& times = sync.times(&model);
    EXPECT_EQ(times.jobs, 3u);
    EXPECT_GE(times.cpu_ns, 3u * 40'000'000u);
    ASSERT_GT(times.measured_ns, 0u);
    const double overlap = static_cast<double>(times.hidden_ns) / times.measured_ns;
    if (hidden) {
      EXPECT_GT(overlap, 0.9);
    } else {
      EXPECT_LT(overlap, 0.8);
    }
  }
}

// In every thread the per-thread default stream has the same handle.
TEST_P(CudaSync, EqualHandlesMayMeanDifferentStreams) {
  const auto per_thread = reinterpret_cast<CuStream>(2);
  const auto drain_own = [&] {
    while (double_driver().stream_query(per_thread) == kCuNotReady) {
      std::this_thread::sleep_for(milliseconds(1));
    }
  };
  StreamModel& model = this->model();
  StreamModel& other_model = this->model();
  std::vector<float> result(48);
  std::vector<float> other_result(48);
  std::atomic<bool> fetched{false};
  DeviceSync sync(cpu_, 0, options());
  model.enqueue_inputs(8, 0, per_thread);
  const DeviceTicket ticket = model.submit(sync, 8, 0, per_thread, per_thread);
  model.kernel(per_thread, [&] {
    while (!fetched) std::this_thread::sleep_for(milliseconds(1));
  });
  sync.sync(ticket, result.data(), per_thread, per_thread);
  std::thread other([&] {
    const CurrentContext context(double_driver(), primary_->get());
    other_model.pass = 1;
    other_model.enqueue_inputs(8, 2, per_thread);
    // the slot whose result is not fetched yet
    const DeviceTicket second = other_model.submit(sync, 8, 2, per_thread, per_thread);
    sync.sync(second, other_result.data(), per_thread, per_thread);
    std::this_thread::sleep_for(milliseconds(100));
    fetched = true;
    drain_own();
  });
  other.join();
  drain_own();
  EXPECT_EQ(result, model.expected_share(0, 8, 0));
  EXPECT_EQ(other_result, other_model.expected_share(1, 8, 2));
  sync.check();
}

// The layers that are measured must not depend on how many there are.
TEST_P(CudaSync, EveryLayerIsMeasured) {
  fake_cuda_set_delays(0, 0);
  std::vector<StreamModel*> owners;
  for (int i = 0; i < 8; ++i) owners.push_back(&this->model({.num_layers = 1}));
  DeviceSync sync(cpu_, 0, options());
  for (int pass = 0; pass < 3; ++pass) {
    for (StreamModel* const owner : owners) {
      owner->cpu_delay_us = 200;
      owner->enqueue(sync, 1, Streams::kOne, streams_);
    }
    ASSERT_EQ(drain(), kCuSuccess);
  }
  for (StreamModel* const owner : owners) EXPECT_GT(sync.times(owner).measured_ns, 0u);
}

// A wake-up that never comes makes a job late: the poller looks after a sleep.
TEST_F(StreamTest, AMissedWakeOnlyCostsTime) {
  fake_cuda_set_delays(0, 0);
  StreamModel& model = this->model();
  CudaDriver deaf = double_driver();
  deaf.launch_host_func = [](CuStream, void (*)(void*), void*) { return kCuSuccess; };
  DeviceSyncOptions options = this->options(SignalWay::kDoorbell);
  options.driver = &deaf;
  options.spin_us = 0;
  DeviceSync sync(cpu_, 0, options);
  for (int pass = 0; pass < 5; ++pass) {
    std::this_thread::sleep_for(milliseconds(20));
    model.pass = pass;
    model.enqueue(sync, 8, Streams::kOne, streams_);
    ASSERT_EQ(drain(), kCuSuccess);
    ASSERT_EQ(model.output(8), model.expected(pass, 8));
  }
}

TEST_F(StreamTest, DriversThatAreNotThereSayWhy) {
  EXPECT_NE(load_cuda_driver("/nowhere/libcuda.so.1").reason.find("/nowhere/libcuda.so.1"),
            std::string::npos);
  EXPECT_NE(load_cuda_driver("libm.so.6").reason.find("cuGetProcAddress"), std::string::npos);
  fake_cuda_set_device_count(0);
  EXPECT_NE(load_cuda_driver(KT_FAKE_CUDA).reason.find("cuInit"), std::string::npos);
  fake_cuda_set_device_count(1);
  EXPECT_EQ(load_cuda_driver(KT_FAKE_CUDA).reason, "");
}

TEST(DeviceSyncOptions, AreReadFromTheEnvironment) {
  setenv("KT_CUDA_SIGNAL_FOUND", "0=hostfunc,11=doorbell,2=doorbell", 1);
  setenv("KT_CUDA_SPIN_MS", "2.5", 1);
  setenv("KT_SYNC_TIMEOUT", "7", 1);
  const DeviceSyncOptions options = DeviceSyncOptions::from_environment(2);
  EXPECT_EQ(options.way, SignalWay::kDoorbell);
  for (const int other : {0, 1, 3}) {
    EXPECT_EQ(DeviceSyncOptions::from_environment(other).way, SignalWay::kHostFunction);
  }
  EXPECT_EQ(options.spin_us, 2500);
  EXPECT_EQ(options.timeout_ms, 7000);
  setenv("KT_CUDA_SIGNAL", "hostfunc", 1);
  EXPECT_EQ(DeviceSyncOptions::from_environment(2).way, SignalWay::kHostFunction);
  setenv("KT_CUDA_SIGNAL", "smoke", 1);
  EXPECT_THROW(DeviceSyncOptions::from_environment(2), Error);
  unsetenv("KT_CUDA_SIGNAL");
  setenv("KT_SYNC_TIMEOUT", "soon", 1);
  EXPECT_THROW(DeviceSyncOptions::from_environment(2), Error);
  for (const char* name : {"KT_CUDA_SIGNAL_FOUND", "KT_CUDA_SPIN_MS", "KT_SYNC_TIMEOUT"}) {
    unsetenv(name);
  }
}

}  // namespace
}  // namespace kt
