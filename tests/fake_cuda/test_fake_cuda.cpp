// The double is what it says: streams, events, capture and replay, words, host functions, failures.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "fake_cuda/driver_abi.h"
#include "fake_cuda/fake_cuda.h"

namespace {

using std::chrono::milliseconds;

#define EXPECT_CUDA(call) EXPECT_EQ(call, CUDA_SUCCESS)

std::string report() {
  std::string text(fake_cuda_report(nullptr, 0), ' ');
  fake_cuda_report(text.data(), text.size() + 1);
  return text;
}

void run_closure(void* argument) { (*static_cast<std::function<void()>*>(argument))(); }

class FakeCuda : public testing::Test {
 protected:
  void SetUp() override {
    fake_cuda_reset();
    ASSERT_EQ(cuInit(0), CUDA_SUCCESS);
    CUcontext context;
    ASSERT_EQ(cuDevicePrimaryCtxRetain(&context, 0), CUDA_SUCCESS);
    ASSERT_EQ(cuCtxSetCurrent(context), CUDA_SUCCESS);
    fake_cuda_set_delays(testing::UnitTest::GetInstance()->random_seed(), 200);
    for (CUstream& stream : streams_) ASSERT_EQ(cuStreamCreate(&stream, 0), CUDA_SUCCESS);
    void* memory;
    ASSERT_EQ(cuMemHostAlloc(&memory, 4096, CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP),
              CUDA_SUCCESS);
    words_ = static_cast<uint32_t*>(memory);
    std::fill_n(words_, 1024, 0);
  }

  void TearDown() override {
    fake_cuda_set_delays(0, 0);
    fake_cuda_reset();
  }

  CUdeviceptr address(int word) {
    CUdeviceptr found = 0;
    EXPECT_CUDA(cuMemHostGetDevicePointer_v2(&found, &words_[word], 0));
    return found;
  }

  // A kernel that runs the closure, which lives as long as the test.
  void kernel(CUstream stream, std::function<void()> closure) {
    closures_.push_back(std::make_unique<std::function<void()>>(std::move(closure)));
    EXPECT_CUDA(fake_cuda_launch(stream, run_closure, closures_.back().get()));
  }

  CUresult host_function(CUstream stream, std::function<void()> closure) {
    closures_.push_back(std::make_unique<std::function<void()>>(std::move(closure)));
    return cuLaunchHostFunc(stream, run_closure, closures_.back().get());
  }

  CUevent event() {
    CUevent made = nullptr;
    EXPECT_CUDA(cuEventCreate(&made, CU_EVENT_DISABLE_TIMING));
    return made;
  }

  CUgraphExec end_capture(CUstream stream) {
    CUgraph graph = nullptr;
    CUgraphExec executable = nullptr;
    EXPECT_CUDA(cuStreamEndCapture(stream, &graph));
    EXPECT_CUDA(cuGraphInstantiateWithFlags(&executable, graph, 0));
    EXPECT_CUDA(cuGraphDestroy(graph));
    return executable;
  }

  CUstream streams_[3] = {};
  uint32_t* words_ = nullptr;
  std::vector<std::unique_ptr<std::function<void()>>> closures_;
};

TEST_F(FakeCuda, AStreamKeepsItsOrderAndDoesNotHoldUpTheCaller) {
  std::vector<int> order;
  fake_cuda_pause(streams_[0]);
  for (int i = 0; i < 20; ++i) kernel(streams_[0], [&order, i] { order.push_back(i); });
  EXPECT_EQ(cuStreamQuery(streams_[0]), CUDA_ERROR_NOT_READY);
  EXPECT_EQ(fake_cuda_pending(), 20u);
  fake_cuda_resume(streams_[0]);
  EXPECT_CUDA(cuStreamSynchronize(streams_[0]));
  EXPECT_CUDA(cuStreamQuery(streams_[0]));
  ASSERT_EQ(order.size(), 20u);
  EXPECT_TRUE(std::is_sorted(order.begin(), order.end()));
}

TEST_F(FakeCuda, StreamsRunBesideEachOther) {
  // each kernel ends only when the other has started
  std::atomic<int> started{0};
  for (int i = 0; i < 2; ++i) {
    kernel(streams_[i], [&started] {
      ++started;
      while (started < 2) std::this_thread::yield();
    });
  }
  for (int i = 0; i < 2; ++i) EXPECT_CUDA(cuStreamSynchronize(streams_[i]));
}

TEST_F(FakeCuda, AnEventOrdersTwoStreams) {
  for (int round = 0; round < 30; ++round) {
    int value = 0;
    int seen = -1;
    CUevent recorded = event();
    kernel(streams_[0], [&value] { value = 7; });
    EXPECT_CUDA(cuEventRecord(recorded, streams_[0]));
    EXPECT_CUDA(cuStreamWaitEvent(streams_[1], recorded, 0));
    kernel(streams_[1], [&] { seen = value; });
    EXPECT_CUDA(cuStreamSynchronize(streams_[1]));
    EXPECT_EQ(seen, 7);
    EXPECT_CUDA(cuEventQuery(recorded));
    EXPECT_CUDA(cuEventDestroy_v2(recorded));
  }
}

TEST_F(FakeCuda, AnEventKeepsThePointOfItsRecord) {
  CUevent early = event();
  EXPECT_CUDA(cuEventRecord(early, streams_[0]));
  EXPECT_CUDA(cuStreamWaitValue32_v2(streams_[0], address(0), 1, CU_STREAM_WAIT_VALUE_EQ));
  EXPECT_CUDA(cuEventSynchronize(early));
  EXPECT_CUDA(cuStreamWaitEvent(streams_[1], early, 0));
  EXPECT_CUDA(cuStreamSynchronize(streams_[1]));
  EXPECT_EQ(cuStreamQuery(streams_[0]), CUDA_ERROR_NOT_READY);
  EXPECT_CUDA(cuStreamWriteValue32_v2(streams_[1], address(0), 1, 0));
  EXPECT_CUDA(cuStreamSynchronize(streams_[0]));
}

TEST_F(FakeCuda, AWaitHoldsItsStreamUntilTheWordHasTheValue) {
  const std::pair<unsigned, uint32_t> cases[] = {{CU_STREAM_WAIT_VALUE_EQ, 5},
                                                 {CU_STREAM_WAIT_VALUE_GEQ, 4},
                                                 {CU_STREAM_WAIT_VALUE_AND, 4},
                                                 {CU_STREAM_WAIT_VALUE_NOR, ~5u}};
  int number = 0;
  for (const auto& [flags, value] : cases) {
    SCOPED_TRACE(flags);
    const int word = 16 * number++;
    // nothing is right before the word is written: 0 for all but NOR, which needs all bits set
    __atomic_store_n(&words_[word], flags == CU_STREAM_WAIT_VALUE_NOR ? 5 : 0, __ATOMIC_RELEASE);
    std::atomic<bool> passed{false};
    EXPECT_CUDA(cuStreamWaitValue32_v2(streams_[0], address(word), value, flags));
    kernel(streams_[0], [&passed] { passed = true; });
    std::this_thread::sleep_for(milliseconds(5));
    EXPECT_FALSE(passed);
    const uint32_t release = flags == CU_STREAM_WAIT_VALUE_NOR ? 2 : 5;
    EXPECT_CUDA(cuStreamWriteValue32_v2(streams_[1], address(word), release, 0));
    EXPECT_CUDA(cuStreamSynchronize(streams_[0]));
    EXPECT_TRUE(passed);
  }
}

TEST_F(FakeCuda, WordsCarryAPayloadToTheHostAndBack) {
  // the protocol of a doorbell, 50 times: the host thread is no part of the double
  void* memory;
  EXPECT_CUDA(cuMemHostAlloc(&memory, 64 * sizeof(int), CU_MEMHOSTALLOC_PORTABLE));
  int* const payload = static_cast<int*>(memory);
  std::vector<int> source(64), result(64);
  std::atomic<bool> stop{false};
  std::thread host([&] {
    while (!stop) {
      if (__atomic_load_n(&words_[0], __ATOMIC_ACQUIRE) == 0) {
        std::this_thread::yield();
        continue;
      }
      __atomic_store_n(&words_[0], 0, __ATOMIC_RELAXED);
      for (int i = 0; i < 64; ++i) payload[i] *= 3;
      __atomic_store_n(&words_[16], 1, __ATOMIC_RELEASE);
    }
  });
  for (int round = 0; round < 50; ++round) {
    fake_cuda_set_store_buffer(round & 1);
    std::fill(source.begin(), source.end(), round);
    EXPECT_CUDA(cuMemcpyDtoHAsync_v2(payload, reinterpret_cast<CUdeviceptr>(source.data()), 256,
                                     streams_[0]));
    EXPECT_CUDA(cuStreamWriteValue32_v2(streams_[0], address(0), 1, 0));
    EXPECT_CUDA(cuStreamWaitValue32_v2(streams_[0], address(16), 1, CU_STREAM_WAIT_VALUE_EQ));
    EXPECT_CUDA(cuStreamWriteValue32_v2(streams_[0], address(16), 0, 0));
    EXPECT_CUDA(cuMemcpyHtoDAsync_v2(reinterpret_cast<CUdeviceptr>(result.data()), payload, 256,
                                     streams_[0]));
    EXPECT_CUDA(cuStreamSynchronize(streams_[0]));
    EXPECT_EQ(result, std::vector<int>(64, 3 * round));
  }
  stop = true;
  host.join();
  EXPECT_EQ(report(), "");
}

TEST_F(FakeCuda, TheStoreBufferShowsACopyOnlyBehindAFence) {
  fake_cuda_set_store_buffer(1);
  fake_cuda_set_delays(0, 0);
  uint32_t source = 9;
  words_[32] = 0;
  EXPECT_CUDA(
      cuMemcpyDtoHAsync_v2(&words_[32], reinterpret_cast<CUdeviceptr>(&source), 4, streams_[0]));
  while (fake_cuda_pending()) std::this_thread::yield();
  // the copy is over, yet the doorbell of another stream does not bring it
  EXPECT_CUDA(cuStreamWriteValue32_v2(streams_[1], address(0), 1, 0));
  EXPECT_CUDA(cuStreamSynchronize(streams_[1]));
  EXPECT_EQ(words_[32], 0u);
  EXPECT_CUDA(cuStreamWriteValue32_v2(streams_[0], address(0), 2, 0));
  EXPECT_CUDA(cuStreamSynchronize(streams_[0]));
  EXPECT_EQ(words_[32], 9u);
}

TEST_F(FakeCuda, HostFunctionsOfAllStreamsRunOneAtATime) {
  std::atomic<int> inside{0};
  int most = 0;
  std::vector<std::thread::id> threads;
  for (int i = 0; i < 30; ++i) {
    EXPECT_CUDA(host_function(streams_[i % 3], [&] {
      most = std::max(most, ++inside);
      threads.push_back(std::this_thread::get_id());
      std::this_thread::yield();
      --inside;
    }));
  }
  for (CUstream stream : streams_) EXPECT_CUDA(cuStreamSynchronize(stream));
  EXPECT_EQ(most, 1);
  ASSERT_EQ(threads.size(), 30u);
  EXPECT_EQ(std::count(threads.begin(), threads.end(), threads[0]), 30);
}

TEST_F(FakeCuda, AHostFunctionMayNotCallTheDriver) {
  CUresult got = CUDA_SUCCESS;
  EXPECT_CUDA(host_function(streams_[0], [&] { got = cuStreamQuery(streams_[1]); }));
  EXPECT_CUDA(cuStreamSynchronize(streams_[0]));
  EXPECT_EQ(got, CUDA_ERROR_NOT_PERMITTED);
  EXPECT_EQ(fake_cuda_violations(), 1);
  EXPECT_NE(report().find("cuStreamQuery called inside a host function"), std::string::npos);
}

TEST_F(FakeCuda, AGraphRepeatsWithItsConstants) {
  std::vector<int> seen;
  int value = 1;
  EXPECT_CUDA(cuStreamBeginCapture_v2(streams_[0], CU_CAPTURE_GLOBAL));
  kernel(streams_[0], [&] { seen.push_back(value); });
  EXPECT_CUDA(cuStreamWriteValue32_v2(streams_[0], address(0), 11, 0));
  EXPECT_CUDA(host_function(streams_[0], [&] { seen.push_back(100); }));
  CUstreamCaptureStatus status;
  EXPECT_CUDA(cuStreamIsCapturing(streams_[0], &status));
  EXPECT_EQ(status, CU_CAPTURE_ACTIVE);
  CUgraphExec executable = end_capture(streams_[0]);
  EXPECT_TRUE(seen.empty());  // nothing runs during the capture
  for (value = 2; value < 5; ++value) {
    words_[0] = 0;
    EXPECT_CUDA(cuGraphLaunch(executable, streams_[value % 2]));
    EXPECT_CUDA(cuStreamSynchronize(streams_[value % 2]));
    EXPECT_EQ(words_[0], 11u);
  }
  EXPECT_EQ(seen, (std::vector<int>{2, 100, 3, 100, 4, 100}));
}

TEST_F(FakeCuda, AGraphKeepsForksAndJoins) {
  // fork to a second stream and join: the two branches need each other, the end needs both
  std::atomic<int> started{0};
  int branches = 0;
  int at_end = -1;
  std::mutex mutex;
  auto branch = [&] {
    ++started;
    while (started < 2) std::this_thread::yield();
    std::lock_guard lock(mutex);
    ++branches;
  };
  CUevent fork = event();
  CUevent join = event();
  EXPECT_CUDA(cuStreamBeginCapture_v2(streams_[0], CU_CAPTURE_GLOBAL));
  kernel(streams_[0], [&] { started = branches = 0; });
  EXPECT_CUDA(cuEventRecord(fork, streams_[0]));
  EXPECT_CUDA(cuStreamWaitEvent(streams_[1], fork, 0));
  kernel(streams_[0], branch);
  kernel(streams_[1], branch);
  EXPECT_CUDA(cuEventRecord(join, streams_[1]));
  EXPECT_CUDA(cuStreamWaitEvent(streams_[0], join, 0));
  kernel(streams_[0], [&] { at_end = branches; });
  CUgraphExec executable = end_capture(streams_[0]);
  for (int i = 0; i < 20; ++i) {
    at_end = -1;
    EXPECT_CUDA(cuGraphLaunch(executable, streams_[2]));
    EXPECT_CUDA(cuStreamSynchronize(streams_[2]));
    EXPECT_EQ(at_end, 2);
  }
  CUstreamCaptureStatus status;
  EXPECT_CUDA(cuStreamIsCapturing(streams_[1], &status));
  EXPECT_EQ(status, CU_CAPTURE_NONE);
  EXPECT_CUDA(cuGraphExecDestroy(executable));
}

TEST_F(FakeCuda, LaunchesOfOneGraphFollowEachOther) {
  int inside = 0;
  int most = 0;
  EXPECT_CUDA(cuStreamBeginCapture_v2(streams_[0], CU_CAPTURE_RELAXED));
  kernel(streams_[0], [&] { most = std::max(most, ++inside); });
  kernel(streams_[0], [&] { --inside; });
  CUgraphExec executable = end_capture(streams_[0]);
  for (int i = 0; i < 30; ++i) EXPECT_CUDA(cuGraphLaunch(executable, streams_[i % 3]));
  EXPECT_CUDA(cuCtxSynchronize());
  EXPECT_EQ(most, 1);
}

TEST_F(FakeCuda, CaptureErrors) {
  CUgraph graph;
  CUevent outside = event();
  EXPECT_CUDA(cuEventRecord(outside, streams_[1]));
  EXPECT_EQ(cuStreamBeginCapture_v2(nullptr, CU_CAPTURE_GLOBAL),
            CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);

  EXPECT_CUDA(cuStreamBeginCapture_v2(streams_[0], CU_CAPTURE_GLOBAL));
  EXPECT_EQ(cuStreamWaitEvent(streams_[0], outside, 0), CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
  EXPECT_EQ(cuStreamEndCapture(streams_[0], &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
  EXPECT_EQ(graph, nullptr);

  EXPECT_CUDA(cuStreamBeginCapture_v2(streams_[0], CU_CAPTURE_GLOBAL));
  EXPECT_EQ(cuStreamSynchronize(streams_[0]), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  EXPECT_EQ(cuStreamEndCapture(streams_[0], &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);

  CUevent fork = event();
  EXPECT_CUDA(cuStreamBeginCapture_v2(streams_[0], CU_CAPTURE_GLOBAL));
  EXPECT_CUDA(cuEventRecord(fork, streams_[0]));
  EXPECT_EQ(cuEventQuery(fork), CUDA_ERROR_CAPTURED_EVENT);
  EXPECT_CUDA(cuStreamWaitEvent(streams_[1], fork, 0));
  kernel(streams_[1], [] {});
  EXPECT_EQ(cuStreamEndCapture(streams_[1], &graph), CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
  EXPECT_EQ(cuStreamEndCapture(streams_[0], &graph), CUDA_ERROR_STREAM_CAPTURE_UNJOINED);

  EXPECT_CUDA(cuStreamBeginCapture_v2(streams_[0], CU_CAPTURE_GLOBAL));
  CUresult elsewhere = CUDA_SUCCESS;
  CUcontext context;
  EXPECT_CUDA(cuCtxGetCurrent(&context));
  std::thread([&] {
    cuCtxSetCurrent(context);
    elsewhere = cuStreamEndCapture(streams_[0], &graph);
  }).join();
  EXPECT_EQ(elsewhere, CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
  EXPECT_CUDA(cuStreamEndCapture(streams_[0], &graph));
}

TEST_F(FakeCuda, AnUnsafeCallBreaksAGlobalCaptureUnlessItsThreadIsRelaxed) {
  void* memory;
  CUgraph graph;
  CUcontext context;
  EXPECT_CUDA(cuCtxGetCurrent(&context));
  EXPECT_CUDA(cuStreamBeginCapture_v2(streams_[0], CU_CAPTURE_GLOBAL));
  CUresult elsewhere = CUDA_SUCCESS;
  std::thread([&] {
    cuCtxSetCurrent(context);
    CUstreamCaptureMode mode = CU_CAPTURE_RELAXED;
    EXPECT_CUDA(cuThreadExchangeStreamCaptureMode(&mode));
    EXPECT_EQ(mode, CU_CAPTURE_GLOBAL);
    EXPECT_CUDA(cuMemHostAlloc(&memory, 64, 0));
    EXPECT_CUDA(cuThreadExchangeStreamCaptureMode(&mode));
    EXPECT_EQ(mode, CU_CAPTURE_RELAXED);
    elsewhere = cuMemHostAlloc(&memory, 64, 0);
  }).join();
  EXPECT_EQ(elsewhere, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  EXPECT_EQ(cuStreamEndCapture(streams_[0], &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
  EXPECT_EQ(fake_cuda_violations(), 1);

  // thread-local captures mind their own thread only
  EXPECT_CUDA(cuStreamBeginCapture_v2(streams_[0], CU_CAPTURE_THREAD_LOCAL));
  std::thread([&] {
    cuCtxSetCurrent(context);
    elsewhere = cuMemHostAlloc(&memory, 64, 0);
  }).join();
  EXPECT_CUDA(elsewhere);
  EXPECT_EQ(cuMemHostAlloc(&memory, 64, 0), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  EXPECT_EQ(cuStreamEndCapture(streams_[0], &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
}

TEST_F(FakeCuda, PlannedFailuresComeOnce) {
  fake_cuda_fail_call("cuEventCreate", 2, CUDA_ERROR_OUT_OF_MEMORY);
  CUevent made;
  EXPECT_CUDA(cuEventCreate(&made, 0));
  EXPECT_EQ(cuEventCreate(&made, 0), CUDA_ERROR_OUT_OF_MEMORY);
  EXPECT_CUDA(cuEventCreate(&made, 0));
  EXPECT_EQ(fake_cuda_calls("cuEventCreate"), 3u);
  CUresult got = CUDA_SUCCESS;
  std::thread([&] { got = cuEventCreate(&made, 0); }).join();
  EXPECT_EQ(got, CUDA_ERROR_INVALID_CONTEXT);  // contexts are a thread's own
}

TEST_F(FakeCuda, AfterAContextErrorNothingRunsAndNothingHangs) {
  std::atomic<bool> ran{false};
  EXPECT_CUDA(cuStreamWaitValue32_v2(streams_[0], address(0), 1, CU_STREAM_WAIT_VALUE_EQ));
  EXPECT_CUDA(host_function(streams_[0], [&ran] { ran = true; }));
  EXPECT_CUDA(fake_cuda_launch_fault(streams_[1], CUDA_ERROR_ILLEGAL_ADDRESS));
  EXPECT_EQ(cuStreamSynchronize(streams_[0]), CUDA_ERROR_ILLEGAL_ADDRESS);
  __atomic_store_n(&words_[0], 1, __ATOMIC_RELEASE);
  std::this_thread::sleep_for(milliseconds(5));
  EXPECT_FALSE(ran);
  void* memory;
  EXPECT_EQ(cuMemHostAlloc(&memory, 64, 0), CUDA_ERROR_ILLEGAL_ADDRESS);
}

TEST_F(FakeCuda, ADeadlockIsReportedWithItsWaits) {
  fake_cuda_set_deadlock_timeout(100);
  CUevent never = event();
  EXPECT_CUDA(cuStreamWaitValue32_v2(streams_[0], address(3), 42, CU_STREAM_WAIT_VALUE_EQ));
  EXPECT_CUDA(cuEventRecord(never, streams_[0]));
  EXPECT_CUDA(cuStreamWaitEvent(streams_[1], never, 0));
  EXPECT_EQ(cuStreamSynchronize(streams_[1]), CUDA_ERROR_LAUNCH_TIMEOUT);
  EXPECT_EQ(fake_cuda_deadlocked(), 1);
  const std::string text = report();
  EXPECT_NE(text.find("cuStreamWaitValue32_v2 on stream"), std::string::npos) << text;
  EXPECT_NE(text.find("value 42 (the word is 0)"), std::string::npos) << text;
  EXPECT_NE(text.find("which waits for cuEventRecord"), std::string::npos) << text;
}

TEST_F(FakeCuda, AHostFunctionThatWaitsForOneBehindItIsADeadlock) {
  fake_cuda_set_deadlock_timeout(100);
  std::atomic<bool> inside{false}, release{false}, second{false};
  EXPECT_CUDA(host_function(streams_[0], [&] {
    for (inside = true; !release;) std::this_thread::yield();
    inside = false;
  }));
  while (!inside) std::this_thread::yield();
  EXPECT_CUDA(host_function(streams_[1], [&] { release = second = true; }));
  EXPECT_EQ(cuStreamSynchronize(streams_[0]), CUDA_ERROR_LAUNCH_TIMEOUT);
  EXPECT_NE(report().find("callback thread: inside cuLaunchHostFunc"), std::string::npos);
  release = true;
  while (inside) std::this_thread::yield();
  EXPECT_FALSE(second);
}

TEST_F(FakeCuda, HostFunctionsThatAreNeverCalled) {
  fake_cuda_set_host_functions(0);
  fake_cuda_set_deadlock_timeout(100);
  EXPECT_CUDA(host_function(streams_[0], [] { FAIL(); }));
  EXPECT_EQ(cuStreamSynchronize(streams_[0]), CUDA_ERROR_LAUNCH_TIMEOUT);
}

TEST_F(FakeCuda, TheSharedChannelLetsAWaitHoldUpOtherStreams) {
  for (int shared = 0; shared < 2; ++shared) {
    fake_cuda_set_shared_channel(shared);
    fake_cuda_set_deadlock_timeout(shared ? 100 : 30000);
    const int word = 64 + shared;
    // stream 1's write would end stream 0's wait, but stands behind it in the one channel
    EXPECT_CUDA(cuStreamWaitValue32_v2(streams_[0], address(word), 1, CU_STREAM_WAIT_VALUE_EQ));
    EXPECT_CUDA(cuStreamWriteValue32_v2(streams_[1], address(word), 1, 0));
    EXPECT_EQ(cuStreamSynchronize(streams_[0]), shared ? CUDA_ERROR_LAUNCH_TIMEOUT : CUDA_SUCCESS);
  }
  EXPECT_NE(report().find("shared channel: held up by cuStreamWaitValue32_v2"), std::string::npos);
}

TEST_F(FakeCuda, FreedAndForeignMemoryIsReported) {
  void* memory;
  uint32_t source = 1;
  EXPECT_CUDA(cuMemHostAlloc(&memory, 64, 0));
  const uint64_t before = fake_cuda_host_bytes();
  EXPECT_CUDA(cuMemFreeHost(memory));
  EXPECT_EQ(fake_cuda_host_bytes(), before - 64);
  EXPECT_EQ(cuMemFreeHost(memory), CUDA_ERROR_INVALID_VALUE);
  EXPECT_CUDA(cuMemcpyDtoHAsync_v2(memory, reinterpret_cast<CUdeviceptr>(&source), 4, streams_[0]));
  EXPECT_CUDA(cuStreamSynchronize(streams_[0]));
  EXPECT_EQ(fake_cuda_violations(), 1);
  // words must be mapped
  EXPECT_EQ(cuStreamWriteValue32_v2(streams_[0], reinterpret_cast<CUdeviceptr>(&source), 1, 0),
            CUDA_ERROR_INVALID_VALUE);
  CUdeviceptr mapped;
  void* plain;
  EXPECT_CUDA(cuMemHostAlloc(&plain, 64, CU_MEMHOSTALLOC_PORTABLE));
  EXPECT_EQ(cuMemHostGetDevicePointer_v2(&mapped, plain, 0), CUDA_ERROR_INVALID_VALUE);
}

TEST_F(FakeCuda, StreamMemoryOperationsComeFromCuGetProcAddressOnly) {
  void* function;
  int status;
  EXPECT_CUDA(cuGetProcAddress_v2("cuStreamWaitValue32", &function, 12000, 0, &status));
  EXPECT_EQ(function, reinterpret_cast<void*>(&cuStreamWaitValue32_v2));
  EXPECT_EQ(status, CU_GET_PROC_ADDRESS_SUCCESS);
  EXPECT_EQ(cuGetProcAddress_v2("cuStreamWaitValue32_v2", &function, 12000, 0, &status),
            CUDA_ERROR_NOT_FOUND);
  EXPECT_EQ(status, CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND);
  using Wait = CUresult (*)(CUstream, CUdeviceptr, uint32_t, unsigned);
  const auto bare = reinterpret_cast<Wait>(dlsym(RTLD_DEFAULT, "cuStreamWaitValue32"));
  ASSERT_NE(bare, nullptr);
  EXPECT_EQ(bare(streams_[0], address(0), 0, CU_STREAM_WAIT_VALUE_EQ), CUDA_ERROR_NOT_SUPPORTED);
  EXPECT_EQ(fake_cuda_violations(), 1);
  fake_cuda_set_stream_memory_operations(0);
  EXPECT_EQ(cuStreamWaitValue32_v2(streams_[0], address(0), 0, CU_STREAM_WAIT_VALUE_EQ),
            CUDA_ERROR_NOT_SUPPORTED);
  EXPECT_NE(dlsym(RTLD_DEFAULT, "kt_fake_cuda"), nullptr);
}

}  // namespace
