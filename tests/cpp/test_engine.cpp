#include <gtest/gtest.h>
#include <sched.h>

#include <chrono>
#include <thread>

#include "base/check.h"
#include "engine/engine.h"
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

TEST(Engine, RunsOnTheCallerAndGivesItsAffinityBack) {
  Engine engine(1, 1, {});
  cpu_set_t before;
  cpu_set_t inside;
  cpu_set_t after;
  ASSERT_EQ(sched_getaffinity(0, sizeof before, &before), 0);
  std::thread::id thread;
  engine.run([&] {
    thread = std::this_thread::get_id();
    sched_getaffinity(0, sizeof inside, &inside);
  });
  ASSERT_EQ(sched_getaffinity(0, sizeof after, &after), 0);
  EXPECT_EQ(thread, std::this_thread::get_id());
  const int cpu = engine.pool().plan().nodes[0].cpus[0];
  if (cpu >= 0) {
    EXPECT_EQ(CPU_COUNT(&inside), 1);
    EXPECT_TRUE(CPU_ISSET(cpu, &inside));
  }
  EXPECT_TRUE(CPU_EQUAL(&before, &after));
}

TEST(Engine, KeepsTheOrderOfItsStream) {
  Engine engine(2, 1, {});
  std::vector<int> order;
  for (int i = 0; i < 100; i += 2) {
    engine.stream().submit([&order, i] { order.push_back(i); });
    engine.run([&order, i] { order.push_back(i + 1); });
  }
  for (int i = 0; i < 100; ++i) EXPECT_EQ(order[i], i);
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

TEST(Pending, AreTakenOnce) {
  const auto engine = std::make_shared<Engine>(1, 1, std::vector<int>{});
  const auto layer = std::make_shared<EngineLayer>(engine, small_config());
  const int64_t first = add_pending({layer, engine->stream().submit([] {}), 1});
  const int64_t second = add_pending({layer, engine->stream().submit([] {}), 2});
  EXPECT_NE(first, second);
  EXPECT_EQ(std::any_cast<int>(take_pending(second).output), 2);
  EXPECT_EQ(std::any_cast<int>(take_pending(first).output), 1);
  EXPECT_THROW(take_pending(first), Error);
  // another operator's ticket is refused, and not spent
  const int64_t other = add_pending({layer, engine->stream().submit([] {}), 3, "wait_written"});
  EXPECT_THROW(take_pending(other), Error);
  EXPECT_THROW(take_pending(other, "sync_on_stream"), Error);
  EXPECT_EQ(std::any_cast<int>(take_pending(other, "wait_written").output), 3);
}

TEST(Pending, ClosingALayerWaitsForItsForwardsAndDropsThem) {
  auto engine = std::make_shared<Engine>(1, 1, std::vector<int>{});
  const std::weak_ptr<Engine> watch = engine;
  auto layer = std::make_shared<EngineLayer>(engine, small_config());
  const int64_t handle = register_layer(layer);
  bool ran = false;
  const int64_t ticket = add_pending({layer, engine->stream().submit([&] {
                                        std::this_thread::sleep_for(std::chrono::milliseconds(20));
                                        ran = true;
                                        KT_CHECK(false, "planned");
                                      }),
                                      0});
  layer.reset();
  engine.reset();
  close_layer(handle);
  EXPECT_TRUE(ran);
  EXPECT_THROW(take_pending(ticket), Error);
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
