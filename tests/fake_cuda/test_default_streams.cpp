// Handles of the default streams: what they mean, and when the legacy one is refused.
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "fake_cuda/driver_abi.h"
#include "fake_cuda/fake_cuda.h"

namespace {

const auto kLegacy = reinterpret_cast<CUstream>(1);
const auto kPerThread = reinterpret_cast<CUstream>(2);

class DefaultStreams : public testing::Test {
 protected:
  void SetUp() override {
    fake_cuda_reset();
    ASSERT_EQ(cuInit(0), CUDA_SUCCESS);
    ASSERT_EQ(cuDevicePrimaryCtxRetain(&context_, 0), CUDA_SUCCESS);
    ASSERT_EQ(cuCtxSetCurrent(context_), CUDA_SUCCESS);
  }
  void TearDown() override { fake_cuda_reset(); }

  CUcontext context_ = nullptr;
};

TEST_F(DefaultStreams, LegacyHasTwoHandles) {
  fake_cuda_pause(nullptr);
  std::atomic<bool> ran{false};
  const auto run = [](void* argument) { *static_cast<std::atomic<bool>*>(argument) = true; };
  ASSERT_EQ(fake_cuda_launch(kLegacy, run, &ran), CUDA_SUCCESS);
  EXPECT_EQ(cuStreamQuery(nullptr), CUDA_ERROR_NOT_READY);
  fake_cuda_resume(kLegacy);
  EXPECT_EQ(cuStreamSynchronize(nullptr), CUDA_SUCCESS);
  EXPECT_TRUE(ran);
  EXPECT_EQ(cuStreamBeginCapture_v2(kLegacy, CU_CAPTURE_GLOBAL),
            CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
}

TEST_F(DefaultStreams, EachThreadHasOne) {
  fake_cuda_pause(kPerThread);
  ASSERT_EQ(fake_cuda_launch(kPerThread, [](void*) {}, nullptr), CUDA_SUCCESS);
  std::thread other([&] {
    ASSERT_EQ(cuCtxSetCurrent(context_), CUDA_SUCCESS);
    ASSERT_EQ(fake_cuda_launch(kPerThread, [](void*) {}, nullptr), CUDA_SUCCESS);
    EXPECT_EQ(cuStreamSynchronize(kPerThread), CUDA_SUCCESS);
  });
  other.join();
  EXPECT_EQ(cuStreamQuery(kPerThread), CUDA_ERROR_NOT_READY);
  fake_cuda_resume(kPerThread);
  EXPECT_EQ(cuCtxSynchronize(), CUDA_SUCCESS);
}

TEST_F(DefaultStreams, LegacyIsRefusedWhileABlockingStreamIsCaptured) {
  for (const bool blocking : {false, true}) {
    CUstream stream = nullptr;
    const unsigned flags = blocking ? 0u : unsigned{CU_STREAM_NON_BLOCKING};
    ASSERT_EQ(cuStreamCreate(&stream, flags), CUDA_SUCCESS);
    const CUresult wanted = blocking ? CUDA_ERROR_STREAM_CAPTURE_IMPLICIT : CUDA_SUCCESS;
    ASSERT_EQ(cuStreamBeginCapture_v2(stream, CU_CAPTURE_GLOBAL), CUDA_SUCCESS);
    CUstreamCaptureStatus status = CU_CAPTURE_NONE;
    EXPECT_EQ(cuStreamIsCapturing(nullptr, &status), wanted);
    ASSERT_EQ(cuStreamIsCapturing(stream, &status), CUDA_SUCCESS);
    EXPECT_EQ(status, CU_CAPTURE_ACTIVE) << "who only asks spoils nothing";
    EXPECT_EQ(fake_cuda_launch(nullptr, [](void*) {}, nullptr), wanted);
    CUgraph graph = nullptr;
    EXPECT_EQ(cuStreamEndCapture(stream, &graph),
              blocking ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS);
    EXPECT_EQ(fake_cuda_launch(nullptr, [](void*) {}, nullptr), CUDA_SUCCESS);
  }
}

}  // namespace
