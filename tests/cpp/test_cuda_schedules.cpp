// Thousands of schedules: random delays on streams and in jobs, random ways to use streams, graphs
// and signals. Each pass must give the synchronous answer.
#include <chrono>

#include "stream_model.h"

namespace kt {
namespace {

using Streams = StreamModel::Streams;

constexpr int kSeeds = 4000;
constexpr std::chrono::seconds kLimit{12};
constexpr int kSeedsPerModel = 25;

class Schedules : public StreamTest {
 protected:
  // One model with its graphs, and passes in schedules of consecutive seeds.
  void run_model(uint32_t seed, int* num_schedules) {
    std::minstd_rand random(seed + 1);
    const auto pick = [&](int count) { return static_cast<int>(random() % count); };
    fake_cuda_set_shared_channel(pick(4) == 0);
    fake_cuda_set_store_buffer(pick(2));
    DeviceSyncOptions options =
        this->options(pick(2) == 0 ? SignalWay::kDoorbell : SignalWay::kHostFunction);
    options.spin_us = pick(3) * 100;
    StreamModel& model = this->model({.num_layers = 1 + pick(3),
                                      .max_tokens = 6,
                                      .int32_ids = pick(2) == 0,
                                      .defers = pick(2) == 0});
    DeviceSync sync(cpu_, 0, options);
    const auto how = static_cast<Streams>(pick(3));
    std::vector<CuGraphExec> graphs;
    if (pick(2) == 0) {
      for (const int tokens : {2, 6}) {
        graphs.push_back(capture([&] { model.enqueue(sync, tokens, how, streams_); }));
      }
    }
    for (int i = 0; i < kSeedsPerModel; ++i) {
      fake_cuda_set_delays(seed + i, pick(4) * 20);
      model.cpu_delay_us = pick(3) * 10;
      model.pass = pick(1000);
      for (uint8_t& skipped : model.mask) skipped = pick(4) == 0;
      const bool replay = !graphs.empty() && pick(3) != 0;
      const int which = pick(2);
      const int tokens = replay ? (which == 0 ? 2 : 6) : 1 + pick(6);
      if (replay) {
        launch(graphs[which]);
      } else {
        model.enqueue(sync, tokens, how, streams_);
      }
      ASSERT_EQ(drain(), kCuSuccess) << fake_cuda_text();
      ASSERT_EQ(model.output(tokens), model.expected(model.pass, tokens)) << "seed " << seed + i;
      sync.check();
      ++*num_schedules;
    }
  }
};

TEST_F(Schedules, AllGiveTheSynchronousAnswer) {
  const auto start = std::chrono::steady_clock::now();
  const uint32_t first = 1'000'003u * testing::UnitTest::GetInstance()->random_seed();
  int num_schedules = 0;
  for (int seed = 0; seed < kSeeds; seed += kSeedsPerModel) {
    run_model(first + seed, &num_schedules);
    ASSERT_FALSE(HasFailure());
    start_device();
    models_.clear();
    if (std::chrono::steady_clock::now() - start > kLimit) break;
  }
  RecordProperty("schedules", num_schedules);
  EXPECT_GE(num_schedules, kSeedsPerModel);
}

}  // namespace
}  // namespace kt
