// What goes wrong in forwards that a device's stream asks for: an error, and never a wait without
// end.
#include <atomic>
#include <functional>
#include <initializer_list>
#include <thread>

#include "child_process.h"
#include "stream_model.h"

namespace kt {
namespace {

using Streams = StreamModel::Streams;
using std::chrono::milliseconds;

class CudaErrors : public CudaSync {};

INSTANTIATE_TEST_SUITE_P(Ways, CudaErrors, each_way(), way_name);

// Of jobs that are never synced every one holds a slot. Where no more can be looked at, each
// further submit is refused; none may go through with a slot that the CPU never looks at.
TEST_P(CudaErrors, TooManyOutstandingJobsAreRefusedAgainAndAgain) {
  fake_cuda_set_delays(0, 0);
  StreamModel& model = this->model();
  DeviceSync sync(cpu_, 0, options());
  std::vector<DeviceTicket> tickets;
  for (int i = 0; i < 256; ++i) {
    tickets.push_back(model.submit(sync, 1, 0, streams_[0], streams_[0]));
  }
  for (int i = 0; i < 3; ++i) {
    EXPECT_NE(error_text([&] {
                model.submit(sync, 1, 0, streams_[0], streams_[0]);
              }).find("more than 256"),
              std::string::npos);
  }
  for (const DeviceTicket& ticket : tickets) sync.abandon(ticket);
  ASSERT_EQ(drain(), kCuSuccess);
  cpu_.wait(cpu_.submit([] {}));
  model.enqueue(sync, 8, Streams::kOne, streams_);
  ASSERT_EQ(drain(), kCuSuccess);
  EXPECT_EQ(model.output(8), model.expected(0, 8)) << "slots of abandoned jobs are free again";
}

TEST_P(CudaErrors, AFailingJobInAReplayIsAnErrorAndNoHang) {
  StreamModel& model = this->model({.num_layers = 3});
  DeviceSync sync(cpu_, 0, options());
  const CuGraphExec graph = capture([&] { model.enqueue(sync, 2, Streams::kOne, streams_); });
  model.fail_layer = 1;
  launch(graph);
  ASSERT_EQ(drain(), kCuSuccess);
  const std::string error = error_text([&] { sync.check(); });
  EXPECT_NE(error.find("layer 1"), std::string::npos) << error;
  EXPECT_NE(error.find("expert 3 is not loaded"), std::string::npos) << error;
  sync.check();  // raised once
  model.fail_layer = 0;
  launch(graph);
  ASSERT_EQ(drain(), kCuSuccess);
  EXPECT_NE(error_text([&] { model.submit(sync, 2, 0, streams_[0], streams_[0]); }), "");
  model.fail_layer = -1;
  launch(graph);
  ASSERT_EQ(drain(), kCuSuccess);
  sync.check();
  EXPECT_EQ(model.output(2), model.expected(0, 2));
}

TEST_P(CudaErrors, AStuckWaitIsLetGoByTheMonitor) {
  StreamModel& model = this->model();
  DeviceSyncOptions options = this->options();
  options.timeout_ms = 400;
  DeviceSync sync(cpu_, 0, options);
  const CuGraphExec graph = capture([&] { model.enqueue(sync, 2, Streams::kOne, streams_); });
  launch(graph);
  ASSERT_EQ(drain(), kCuSuccess);
  sync.check();
  std::atomic<bool> open{false};
  model.on_job = [&](int) {
    while (!open) std::this_thread::sleep_for(milliseconds(1));
  };
  launch(graph);
  ASSERT_EQ(drain(), kCuSuccess) << "let go although the job still runs";
  const std::string error = error_text([&] { sync.check(); });
  EXPECT_NE(error.find("KT_SYNC_TIMEOUT"), std::string::npos) << error;
  EXPECT_NE(error.find("layer 0"), std::string::npos) << error;
  EXPECT_EQ(error_text([&] { sync.check(); }), error) << "poisoned for good";
  // the device has gone on: what this job reads may change under it
  open = true;
  cpu_.wait(cpu_.submit([] {}));
  launch(graph);
  ASSERT_EQ(drain(), kCuSuccess) << "a poisoned table answers";
}

// Once poisoned, no wait behind the stuck one takes a time limit of its own.
TEST_P(CudaErrors, WaitsBehindAStuckOneAreLetGoAtOnce) {
  StreamModel& model = this->model({.num_layers = 8});
  DeviceSyncOptions options = this->options();
  options.timeout_ms = 400;
  DeviceSync sync(cpu_, 0, options);
  const CuGraphExec graph = capture([&] { model.enqueue(sync, 2, Streams::kOne, streams_); });
  std::atomic<bool> open{false};
  model.on_job = [&](int) {
    while (!open) std::this_thread::sleep_for(milliseconds(1));
  };
  const auto start = std::chrono::steady_clock::now();
  launch(graph);
  ASSERT_EQ(drain(), kCuSuccess);
  EXPECT_LT(std::chrono::steady_clock::now() - start, milliseconds(4 * 400));
  EXPECT_NE(error_text([&] { sync.check(); }).find("layer 0"), std::string::npos);
  open = true;
  cpu_.wait(cpu_.submit([] {}));
}

// The first job is watched for the arrival of its wait, which never comes; the one behind it waits.
TEST_P(CudaErrors, AStuckWaitIsLetGoWhileAnArrivalIsLookedFor) {
  StreamModel& model = this->model();
  DeviceSyncOptions options = this->options();
  options.timeout_ms = 400;
  fake_cuda_set_deadlock_timeout(5'000);
  DeviceSync sync(cpu_, 0, options);
  std::atomic<bool> open{false};
  model.on_job = [&](int) {
    while (!open) std::this_thread::sleep_for(milliseconds(1));
  };
  std::vector<float> result(48);
  model.submit(sync, 8, 0, streams_[0], streams_[0]);
  const DeviceTicket second = model.submit(sync, 8, 1, streams_[0], streams_[0]);
  sync.sync(second, result.data(), streams_[0], streams_[0]);
  EXPECT_EQ(drain(), kCuSuccess) << fake_cuda_text();
  EXPECT_NE(error_text([&] { sync.check(); }).find("KT_SYNC_TIMEOUT"), std::string::npos);
  open = true;
  cpu_.wait(cpu_.submit([] {}));
}

// A layer that is closed while its job cannot end any more: 10 s of patience are for other cases.
TEST_P(CudaErrors, RetiringALayerEndsWhenTheTableIsPoisoned) {
  StreamModel& model = this->model();
  Slot slot(double_driver(), {6, 2, DType::kFloat32}, 8);
  DeviceJobs jobs(cpu_, GetParam(), 0);
  DeviceWork work;
  work.owner = &model;
  jobs.set_synced(jobs.add(slot, work, false));
  const auto start = std::chrono::steady_clock::now();
  std::thread other([&] {
    std::this_thread::sleep_for(milliseconds(300));
    jobs.fail("broken.", true);
  });
  jobs.retire(&model);
  other.join();
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(8));
}

TEST_P(CudaErrors, ALongPauseBetweenLaunchesIsNoStuckWait) {
  StreamModel& model = this->model({.num_layers = 1});
  DeviceSyncOptions options = this->options();
  options.timeout_ms = 400;
  DeviceSync sync(cpu_, 0, options);
  model.cpu_delay_us = 40'000;
  const CuGraphExec graph = capture([&] { model.enqueue(sync, 2, Streams::kOne, streams_); });
  // the device waits nearly all the time, each time for the same job
  for (int i = 0; i < 15; ++i) launch(graph);
  ASSERT_EQ(drain(), kCuSuccess);
  sync.check();
}

TEST_P(CudaErrors, AnErrorOfTheDriverIsASentenceAndTheNextPassIsRight) {
  StreamModel& model = this->model();
  DeviceSync sync(cpu_, 0, options());
  for (const char* function : {"cuMemHostAlloc", "cuMemcpyDtoHAsync_v2", "cuLaunchHostFunc"}) {
    fake_cuda_fail_call(function, 1, 2);
    const std::string error =
        error_text([&] { model.submit(sync, 8, 0, streams_[0], streams_[0]); });
    EXPECT_NE(error.find("CUDA_ERROR_OUT_OF_MEMORY"), std::string::npos) << function << error;
    model.enqueue(sync, 8, Streams::kOne, streams_);
    ASSERT_EQ(drain(), kCuSuccess);
    ASSERT_EQ(model.output(8), model.expected(0, 8)) << function;
  }
}

// A copy of a submit that failed is still to come: nobody else gets its slot, and nothing frees it.
TEST_P(CudaErrors, ASlotThatACopyMayStillWriteIsNobodys) {
  fake_cuda_set_delays(0, 0);
  StreamModel& model = this->model();
  std::vector<float> result(48);
  uint64_t one_slot = 0;
  {
    DeviceSync sync(cpu_, 0, options());
    const uint64_t before = fake_cuda_host_bytes();
    fake_cuda_pause(streams_[0]);
    fake_cuda_fail_call("cuMemcpyDtoHAsync_v2", 2, 2);
    EXPECT_NE(error_text([&] { model.submit(sync, 8, 0, streams_[0], streams_[0]); }), "");
    one_slot = fake_cuda_host_bytes() - before;
    ASSERT_GT(one_slot, 0u);
    sync.clear();
    EXPECT_EQ(fake_cuda_host_bytes(), before + one_slot);
    DeviceTicket tickets[2];
    for (const int layer : {1, 0}) {
      tickets[layer] = model.submit(sync, 8, layer, streams_[1], streams_[1]);
    }
    for (const int layer : {1, 0}) {
      sync.sync(tickets[layer], result.data(), streams_[1], streams_[1]);
    }
    EXPECT_EQ(fake_cuda_host_bytes(), before + 3 * one_slot);
    ASSERT_EQ(drain(1), kCuSuccess);
  }
  EXPECT_GE(fake_cuda_host_bytes(), one_slot);
  fake_cuda_resume(streams_[0]);
  ASSERT_EQ(drain(), kCuSuccess);
}

// The graph keeps a copy, and with doorbells the call that wakes the CPU stream.
TEST_P(CudaErrors, AGraphOfAFailedSubmitMayBeLaunchedAfterTheEnd) {
  StreamModel& model = this->model();
  CuGraphExec graph = nullptr;
  uint64_t pinned = 0;
  {
    DeviceSync sync(cpu_, 0, options());
    graph = capture([&] {
      fake_cuda_fail_call("cuMemcpyDtoHAsync_v2", 2, 2);
      EXPECT_NE(error_text([&] { model.submit(sync, 8, 0, streams_[0], streams_[0]); }), "");
    });
    pinned = fake_cuda_host_bytes();
    sync.clear();
  }
  EXPECT_EQ(fake_cuda_host_bytes(), pinned);
  launch(graph);
  EXPECT_EQ(drain(), kCuSuccess);
}

// The wait is in the stream, the copy behind it is refused: the device must not wait for ever.
TEST_P(CudaErrors, AnErrorBehindTheWaitLeavesNoWait) {
  StreamModel& model = this->model();
  std::vector<float> result(48);
  DeviceSync sync(cpu_, 0, options());
  const auto start = std::chrono::steady_clock::now();
  for (int pass = 1; pass < 4; ++pass) {
    const DeviceTicket ticket = model.submit(sync, 8, 0, streams_[0], streams_[0]);
    fake_cuda_fail_call("cuMemcpyHtoDAsync_v2", 1, 2);
    EXPECT_NE(error_text([&] {
                sync.sync(ticket, result.data(), streams_[0], streams_[0]);
              }).find("CUDA_ERROR_OUT_OF_MEMORY"),
              std::string::npos);
    ASSERT_EQ(drain(), kCuSuccess);
    model.pass = pass;
    model.enqueue(sync, 8, Streams::kOne, streams_);
    ASSERT_EQ(drain(), kCuSuccess);
    ASSERT_EQ(model.output(8), model.expected(pass, 8));
  }
  sync.check();
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));
}

// As CUDA has it for streams that block the default stream. torch makes others.
TEST_P(CudaErrors, TheDefaultStreamBesideACaptureIsRefusedWithAWayOut) {
  StreamModel& model = this->model();
  DeviceSync sync(cpu_, 0, options());
  ASSERT_EQ(double_driver().stream_create(&streams_[0], 0), kCuSuccess);
  const CuGraphExec graph = capture([&] {
    model.enqueue(sync, 8, Streams::kOne, streams_);
    const std::string error = error_text([&] { model.submit(sync, 8, 0, nullptr, nullptr); });
    EXPECT_NE(error.find("CUDA_ERROR_STREAM_CAPTURE_IMPLICIT"), std::string::npos) << error;
    EXPECT_NE(error.find("torch.cuda.Stream()"), std::string::npos) << error;
  });
  launch(graph);
  ASSERT_EQ(drain(), kCuSuccess);
  EXPECT_EQ(model.output(8), model.expected(0, 8)) << "the capture is whole";
  model.enqueue_inputs(8, 0, nullptr);
  std::vector<float> result(48);
  sync.sync(model.submit(sync, 8, 0, nullptr, nullptr), result.data(), nullptr, nullptr);
  while (double_driver().stream_query(nullptr) == kCuNotReady) std::this_thread::yield();
  EXPECT_EQ(result, model.expected_share(0, 8, 0));
}

TEST_P(CudaErrors, AnInheritedOneSaysSoAndIsLeftAlone) {
  StreamModel& model = this->model();
  auto sync = std::make_unique<DeviceSync>(cpu_, 0, options());
  std::vector<float> result(48);
  const DeviceTicket ticket = model.submit(*sync, 8, 0, streams_[0], streams_[0]);
  EXPECT_EQ(in_child([&]() -> std::string {
              for (const auto& use : std::initializer_list<std::function<void()>>{
                       [&] { model.submit(*sync, 8, 0, streams_[0], streams_[0]); },
                       [&] { sync->sync(ticket, result.data(), streams_[0], streams_[0]); },
                       [&] { sync->abandon(ticket); }, [&] { sync->check(); },
                       [&] { sync->retire(&model); }, [&] { sync->clear(); }}) {
                const std::string error = error_text(use);
                if (error.find("fork()") == std::string::npos) return "error '" + error + "'";
              }
              sync.reset();
              return "ended";
            }),
            "ended");
  sync->sync(ticket, result.data(), streams_[0], streams_[0]);
  EXPECT_EQ(drain(), kCuSuccess);
}

TEST_P(CudaErrors, ABrokenContextEndsInErrorsNotInWaits) {
  StreamModel& model = this->model();
  const auto start = std::chrono::steady_clock::now();
  {
    DeviceSync sync(cpu_, 0, options());
    model.enqueue(sync, 8, Streams::kOne, streams_);
    ASSERT_EQ(fake_cuda_launch_fault(streams_[0], 700), 0);
    model.kernel(streams_[0], [] {});
    EXPECT_EQ(drain(), 700);
    const std::string error =
        error_text([&] { model.submit(sync, 8, 0, streams_[0], streams_[0]); });
    EXPECT_NE(error.find("CUDA_ERROR_ILLEGAL_ADDRESS"), std::string::npos) << error;
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));
}

}  // namespace
}  // namespace kt
