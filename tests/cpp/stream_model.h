// A toy MoE model whose streams are the test double's: kernels make inputs, DeviceSync computes the
// CPU's share, kernels spoil the inputs and add the result. What a pass must give: computed beside.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/check.h"
#include "fake_cuda/fake_cuda.h"
#include "runtime/cuda_sync.h"

namespace kt {

inline const CudaDriver& double_driver() {
  static const CudaDriver driver = load_cuda_driver(KT_FAKE_CUDA);
  return driver;
}

inline std::string fake_cuda_text() {
  std::string text(fake_cuda_report(nullptr, 0), ' ');
  fake_cuda_report(text.data(), text.size() + 1);
  return text;
}

struct ModelSizes {
  int num_layers = 2;
  int max_tokens = 8;
  int hidden_size = 6;
  int top_k = 2;
  int num_experts = 5;
  bool int32_ids = false;
  bool defers = false;  // each layer leaves a share to the next, computed after its done
};

// Device memory is host memory here; kernels run on the double's streams. Not to be destroyed while
// streams or graphs refer to it.
class StreamModel {
 public:
  // How a pass uses streams.
  enum class Streams { kOne, kAlternate, kApart };

  explicit StreamModel(const ModelSizes& sizes)
      : mask(sizes.num_experts, 0),
        sizes_(sizes),
        x_(sizes.max_tokens * sizes.hidden_size),
        result_(sizes.num_layers * x_.size()),
        ids_(sizes.max_tokens * sizes.top_k),
        ids32_(ids_.size()),
        weights_(ids_.size()),
        carry_(x_.size()) {}

  // Enqueues a pass of `tokens` tokens on streams[0], with streams[1] as Streams says.
  void enqueue(DeviceSync& sync, int tokens, Streams how, CuStream streams[2]) {
    kernel(streams[0], [this, tokens] { begin(tokens); });
    for (int layer = 0; layer < sizes_.num_layers; ++layer) {
      CuStream own = how == Streams::kAlternate && layer % 2 == 1 ? streams[1] : streams[0];
      order(streams[0], own);
      CuStream given = how == Streams::kApart ? streams[1] : own;
      kernel(own, [this, tokens, layer] { route(tokens, layer, x_, ids_, weights_); });
      const DeviceTicket ticket = submit(sync, tokens, layer, given, own);
      // what SGLang does after submit: masks ids in place, and its GPU experts overwrite x
      kernel(own, [this, tokens] {
        std::fill(ids_.begin(), ids_.end(), int64_t{-1});
        std::fill(ids32_.begin(), ids32_.end(), -1);
        std::fill(weights_.begin(), weights_.end(), 99.0f);
        on_device(tokens, x_);
      });
      float* const result = &result_[layer * x_.size()];
      sync.sync(ticket, result, given, own);
      kernel(own, [this, tokens, result] {
        for (int i = 0; i < tokens * sizes_.hidden_size; ++i) x_[i] += result[i];
      });
      order(own, streams[0]);
    }
  }

  // A kernel that makes the inputs of a layer from those of a pass, and the answer to them.
  void enqueue_inputs(int tokens, int layer, CuStream stream) {
    kernel(stream, [this, tokens, layer] {
      begin(tokens);
      route(tokens, layer, x_, ids_, weights_);
    });
  }
  std::vector<float> expected_share(int number, int tokens, int layer) {
    std::vector<float> x(tokens * sizes_.hidden_size);
    std::vector<int64_t> ids(tokens * sizes_.top_k);
    std::vector<float> weights(ids.size());
    first(number, tokens, x);
    route(tokens, layer, x, ids, weights);
    std::vector<float> out(x.size());
    experts(tokens, layer, x.data(), ids.data(), weights.data(), mask, out.data());
    return out;
  }

  DeviceTicket submit(DeviceSync& sync, int tokens, int layer, CuStream stream, CuStream current) {
    DeviceInput input;
    input.hidden_states = x_.data();
    input.dtype = DType::kFloat32;
    input.topk_ids = sizes_.int32_ids ? static_cast<const void*>(ids32_.data()) : ids_.data();
    input.id_dtype = sizes_.int32_ids ? DType::kInt32 : DType::kInt64;
    input.topk_weights = weights_.data();
    input.num_tokens = tokens;
    input.top_k = sizes_.top_k;
    input.hidden_size = sizes_.hidden_size;
    return sync.submit(input, work(tokens, layer), stream, current);
  }

  // The answer of pass `number`, computed at once.
  std::vector<float> expected(int number, int tokens) {
    std::vector<float> x(tokens * sizes_.hidden_size);
    std::vector<float> carry(x.size(), 0.0f);
    std::vector<int64_t> ids(tokens * sizes_.top_k);
    std::vector<float> weights(ids.size());
    first(number, tokens, x);
    for (int layer = 0; layer < sizes_.num_layers; ++layer) {
      route(tokens, layer, x, ids, weights);
      std::vector<float> out(x.size());
      experts(tokens, layer, x.data(), ids.data(), weights.data(), mask, out.data());
      for (size_t i = 0; i < x.size(); ++i) {
        if (sizes_.defers) out[i] += carry[i];
        carry[i] = 0.125f * x[i];
      }
      on_device(tokens, x);
      for (size_t i = 0; i < x.size(); ++i) x[i] += out[i];
    }
    return x;
  }

  std::vector<float> output(int tokens) const {
    return {x_.begin(), x_.begin() + tokens * sizes_.hidden_size};
  }

  const ModelSizes& sizes() const { return sizes_; }
  void kernel(CuStream stream, std::function<void()> body) {
    bodies_.push_back(std::make_unique<std::function<void()>>(std::move(body)));
    const auto call = [](void* argument) { (*static_cast<std::function<void()>*>(argument))(); };
    KT_CHECK(fake_cuda_launch(stream, call, bodies_.back().get()) == 0, "a kernel was refused.");
  }

  std::vector<uint8_t> mask;         // experts elsewhere; read by each job when it runs
  int pass = 0;                      // read by the first kernel of a pass
  int fail_layer = -1;               // the job of this layer throws
  std::atomic<int> cpu_delay_us{0};  // of each part of a job
  std::function<void(int)> on_job;   // called in each job, with its layer
  std::function<void()> on_done;     // called when a job has written its output

 private:
  void begin(int tokens) {
    first(pass, tokens, x_);
    // beyond the batch: what an earlier, larger one left
    std::fill(x_.begin() + tokens * sizes_.hidden_size, x_.end(), 1e6f);
  }

  void first(int number, int tokens, std::vector<float>& x) const {
    std::minstd_rand random(number * 7919 + tokens);
    for (int i = 0; i < tokens * sizes_.hidden_size; ++i) {
      x[i] = static_cast<float>(random() % 64) / 16.0f;
    }
  }

  // Routes by what x is, so that a wrong x shows in the ids, too.
  void route(int tokens, int layer, const std::vector<float>& x, std::vector<int64_t>& ids,
             std::vector<float>& weights) {
    for (int i = 0; i < tokens * sizes_.top_k; ++i) {
      const int token = i / sizes_.top_k;
      const float value = x[token * sizes_.hidden_size + i % sizes_.top_k];
      const auto code = static_cast<int64_t>(value * 16.0f) + layer + i;
      ids[i] = (code % 7 == 0 ? int64_t{-1} : std::abs(code) % sizes_.num_experts);
      weights[i] = static_cast<float>(std::abs(code) % 8) / 8.0f;
      if (&ids == &ids_) ids32_[i] = static_cast<int32_t>(ids[i]);
    }
  }

  void on_device(int tokens, std::vector<float>& x) const {
    for (int i = 0; i < tokens * sizes_.hidden_size; ++i) x[i] = 0.5f * x[i] + 1.0f;
  }

  template <typename Id>
  void experts(int tokens, int layer, const float* x, const Id* ids, const float* weights,
               const std::vector<uint8_t>& skip, float* out) const {
    for (int t = 0; t < tokens; ++t) {
      for (int h = 0; h < sizes_.hidden_size; ++h) {
        float sum = 0.25f * x[t * sizes_.hidden_size + h];
        for (int s = 0; s < sizes_.top_k; ++s) {
          const auto id = ids[t * sizes_.top_k + s];
          if (id < 0 || id >= sizes_.num_experts || skip[id]) continue;
          sum += weights[t * sizes_.top_k + s] * static_cast<float>(id + 1 + layer + h) / 64.0f;
        }
        out[t * sizes_.hidden_size + h] = sum;
      }
    }
  }

  DeviceWork work(int tokens, int layer) {
    DeviceWork work;
    work.owner = this;
    work.layer_idx = layer;
    work.chain_position = layer;
    work.run = [this, tokens, layer](const HostBuffers& buffers) {
      delay();
      if (on_job) on_job(layer);
      KT_CHECK(layer != fail_layer, "expert 3 is not loaded.");
      const auto* const x = static_cast<const float*>(buffers.hidden_states);
      auto* const out = static_cast<float*>(buffers.output);
      const std::vector<uint8_t> skip = mask;
      if (sizes_.int32_ids) {
        experts(tokens, layer, x, static_cast<const int32_t*>(buffers.topk_ids),
                buffers.topk_weights, skip, out);
      } else {
        experts(tokens, layer, x, static_cast<const int64_t*>(buffers.topk_ids),
                buffers.topk_weights, skip, out);
      }
      for (int i = 0; sizes_.defers && layer > 0 && i < tokens * sizes_.hidden_size; ++i) {
        out[i] += carry_[i];
      }
      if (on_done) on_done();
    };
    // the last layer has no successor
    if (!sizes_.defers || layer + 1 == sizes_.num_layers) return work;
    work.run_deferred = [this, tokens](const HostBuffers& buffers) {
      delay();
      const auto* const x = static_cast<const float*>(buffers.hidden_states);
      for (int i = 0; i < tokens * sizes_.hidden_size; ++i) carry_[i] = 0.125f * x[i];
    };
    return work;
  }

  void delay() const {
    if (cpu_delay_us > 0) std::this_thread::sleep_for(std::chrono::microseconds(cpu_delay_us));
  }

  // SGLang's wait_stream.
  void order(CuStream before, CuStream after) {
    if (before == after) return;
    const CudaDriver& driver = double_driver();
    CuEvent event = nullptr;
    check_cuda(driver, driver.event_create(&event, kCuEventDisableTiming), "cuEventCreate");
    check_cuda(driver, driver.event_record(event, before), "cuEventRecord");
    check_cuda(driver, driver.stream_wait_event(after, event, 0), "cuStreamWaitEvent");
    check_cuda(driver, driver.event_destroy(event), "cuEventDestroy");
  }

  const ModelSizes sizes_;
  std::vector<float> x_;
  std::vector<float> result_;
  std::vector<int64_t> ids_;
  std::vector<int32_t> ids32_;
  std::vector<float> weights_;
  std::vector<float> carry_;  // the CPU stream's own
  std::vector<std::unique_ptr<std::function<void()>>> bodies_;
};

// A double that was reset, two streams, a CPU stream.
class StreamTest : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(double_driver().available()) << double_driver().reason;
    ASSERT_TRUE(double_driver().is_double);
    start_device();
  }

  void TearDown() override {
    fake_cuda_set_delays(0, 0);
    EXPECT_EQ(fake_cuda_text(), expected_report_);
    context_.reset();
    fake_cuda_reset();
    // the models go after the streams that run their kernels
    models_.clear();
  }

  void start_device() {
    const CudaDriver& driver = double_driver();
    context_.reset();
    fake_cuda_reset();
    ASSERT_EQ(driver.init(0), kCuSuccess);
    primary_ = std::make_unique<PrimaryContext>(driver, 0);
    context_ = std::make_unique<CurrentContext>(driver, primary_->get());
    for (CuStream& stream : streams_) ASSERT_EQ(driver.stream_create(&stream, 1), kCuSuccess);
  }

  DeviceSyncOptions options(SignalWay way) const {
    DeviceSyncOptions out;
    out.way = way;
    out.spin_us = 200;
    out.timeout_ms = 20'000;
    out.driver = &double_driver();
    return out;
  }

  StreamModel& model(const ModelSizes& sizes = {}) {
    models_.push_back(std::make_unique<StreamModel>(sizes));
    return *models_.back();
  }

  CuGraphExec capture(const std::function<void()>& body) {
    const CudaDriver& driver = double_driver();
    check_cuda(driver, driver.stream_begin_capture(streams_[0], kCuCaptureGlobal), "begin");
    body();
    CuGraph graph = nullptr;
    check_cuda(driver, driver.stream_end_capture(streams_[0], &graph), "cuStreamEndCapture");
    CuGraphExec executable = nullptr;
    check_cuda(driver, driver.graph_instantiate_with_flags(&executable, graph, 0), "instantiate");
    check_cuda(driver, driver.graph_destroy(graph), "cuGraphDestroy");
    return executable;
  }

  void launch(CuGraphExec executable) {
    check_cuda(double_driver(), double_driver().graph_launch(executable, streams_[0]),
               "cuGraphLaunch");
  }

  // Waits until a stream has drained; the driver's result.
  CuResult drain(int stream = 0) {
    CuResult result = kCuNotReady;
    while ((result = double_driver().stream_query(streams_[stream])) == kCuNotReady) {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
    return result;
  }

  CpuStream cpu_;
  CuStream streams_[2] = {};
  std::unique_ptr<PrimaryContext> primary_;
  std::unique_ptr<CurrentContext> context_;
  std::vector<std::unique_ptr<StreamModel>> models_;
  std::string expected_report_;
};

// The same with memory that appears late and random delays, for each way to signal.
class CudaSync : public StreamTest, public testing::WithParamInterface<SignalWay> {
 protected:
  void SetUp() override {
    StreamTest::SetUp();
    fake_cuda_set_store_buffer(1);
    fake_cuda_set_delays(1, 100);
  }
  DeviceSyncOptions options() const { return StreamTest::options(GetParam()); }
};

inline auto each_way() { return testing::Values(SignalWay::kDoorbell, SignalWay::kHostFunction); }

inline std::string way_name(const testing::TestParamInfo<SignalWay>& info) {
  return info.param == SignalWay::kDoorbell ? "Doorbell" : "HostFunction";
}

inline std::string error_text(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

}  // namespace kt
