#include "engine/engine.h"

#include <gtest/gtest.h>

#include <thread>

#include "base/check.h"
#include "engine/probe.h"

namespace kt {
namespace {

MoeConfig small_config() {
  MoeConfig config;
  config.layer_idx = 3;
  config.num_experts = 4;
  config.top_k = 2;
  config.hidden_size = 128;
  config.intermediate_size = 64;
  config.layout = PackedLayout::parse("int8_n64k4_r512_v1");
  config.expert_ids = {0, 1, 2, 3};
  return config;
}

TEST(Engine, RunsJobsOnOneThreadInOrder) {
  Engine engine(1, 1, {});
  std::vector<int> order;
  std::thread::id first;
  for (int i = 0; i < 5; ++i) {
    engine.run([&, i] {
      if (i == 0) first = std::this_thread::get_id();
      EXPECT_EQ(std::this_thread::get_id(), first);
      order.push_back(i);
    });
  }
  EXPECT_EQ(order, (std::vector<int>{0, 1, 2, 3, 4}));
  EXPECT_NE(first, std::this_thread::get_id());
}

TEST(Engine, ThrowsTheErrorOfAJob) {
  Engine engine(2, 1, {});
  EXPECT_THROW(engine.run([] { KT_CHECK(false, "planned"); }), Error);
  bool ran = false;
  engine.run([&] { ran = true; });
  EXPECT_TRUE(ran);
}

TEST(Engine, RefusesUnknownNodes) { EXPECT_THROW(Engine(1, 1, {4711}), Error); }

TEST(Layers, AreFoundByHandleUntilClosed) {
  const auto engine = std::make_shared<Engine>(1, 1, std::vector<int>{});
  const int64_t first = register_layer(std::make_shared<EngineLayer>(engine, small_config()));
  const int64_t second = register_layer(std::make_shared<EngineLayer>(engine, small_config()));
  EXPECT_NE(first, second);
  EXPECT_EQ(find_layer(first)->layer.config().layer_idx, 3);
  close_layer(first);
  close_layer(first);  // a second time does nothing
  EXPECT_THROW(find_layer(first), Error);
  EXPECT_NO_THROW(find_layer(second));
  close_layer(second);
  EXPECT_THROW(find_layer(0), Error);
}

TEST(Layers, KeepTheirEngineAlive) {
  auto engine = std::make_shared<Engine>(1, 1, std::vector<int>{});
  const std::weak_ptr<Engine> watch = engine;
  const int64_t handle = register_layer(std::make_shared<EngineLayer>(engine, small_config()));
  engine.reset();
  EXPECT_FALSE(watch.expired());
  close_layer(handle);
  EXPECT_TRUE(watch.expired());
}

TEST(Probes, MeasureSomething) {
  const auto engine = std::make_shared<Engine>(2, 1, std::vector<int>{});
  EngineLayer layer(engine, small_config());
  // An absolute speed is no property of the code; that a probe read and multiplied at all is.
  EXPECT_GT(probe_read(layer), 0);
  EXPECT_GT(probe_peak(layer, 1), 0);
  EXPECT_GT(probe_dispatch(*engine), 0);
  MoeConfig empty = small_config();
  empty.expert_ids.clear();
  EngineLayer nothing(engine, empty);
  EXPECT_THROW(probe_read(nothing), Error);
}

}  // namespace
}  // namespace kt
