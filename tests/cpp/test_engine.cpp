#include <gtest/gtest.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <initializer_list>
#include <string>
#include <thread>

#include "base/check.h"
#include "child_process.h"
#include "engine/engine.h"
#include "engine/probe.h"

namespace kt {
namespace {

std::string error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

MoeConfig small_config() {
  MoeConfig config;
  config.layer_idx = 3;
  config.num_experts = 4;
  config.top_k = 2;
  config.hidden_size = 128;
  config.intermediate_size = 64;
  config.set_layout(PackedLayout::parse("int8_n64k4_r512_v1"));
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

// close_layer() between a forward's submit and its entry here: nobody would drop it later.
TEST(Pending, AreRefusedForALayerThatWasClosedMeanwhile) {
  const auto engine = std::make_shared<Engine>(1, 1, std::vector<int>{});
  auto layer = std::make_shared<EngineLayer>(engine, small_config());
  const std::weak_ptr<EngineLayer> watch = layer;
  const int64_t handle = register_layer(std::move(layer));
  std::shared_ptr<EngineLayer> found = find_layer(handle);
  std::atomic<bool> ran{false};
  const uint64_t ticket = engine->stream().submit([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    ran = true;
    KT_CHECK(false, "planned");
  });
  close_layer(handle);
  const std::string error = error_of([&] { add_pending({std::move(found), ticket, 0}); });
  EXPECT_NE(error.find("layer 3 was closed"), std::string::npos) << error;
  EXPECT_TRUE(ran) << "the output that it writes goes with the entry";
  EXPECT_TRUE(watch.expired());
}

// At any moment of what other threads do: a lock that they hold is never freed in the child.
TEST(Fork, AnInheritedEngineSaysSoAndHoldsNothingUp) {
  auto engine = std::make_shared<Engine>(2, 1, std::vector<int>{});
  auto layer = std::make_shared<EngineLayer>(engine, small_config());
  const int64_t handle = register_layer(layer);
  std::atomic<bool> stop{false};
  std::thread busy([&, engine, layer] {
    while (!stop) {
      engine->stream().wait(engine->stream().submit([] {}));
      close_layer(register_layer(layer));
    }
  });
  for (int i = 0; i < 20 && !testing::Test::HasFailure(); ++i) {
    EXPECT_EQ(in_child([&]() -> std::string {
                const auto nothing = [] {};
                for (const auto& use : std::initializer_list<std::function<void()>>{
                         [&] { engine->run(nothing); }, [&] { engine->stream().submit(nothing); },
                         [&] { engine->stream().wait(1); }, [&] { engine->device_sync(0); },
                         [&] { engine->for_each_device([](DeviceSync&) {}); },
                         [&] { engine->pool().run({[](const Worker&) {}}); }}) {
                  const std::string error = error_of(use);
                  if (error.find("fork()") == std::string::npos) return "error '" + error + "'";
                }
                if (error_of([&] { find_layer(handle); }) == "") return "the layer is found";
                close_layer(handle);
                layer.reset();
                engine.reset();
                return "ended";
              }),
              "ended");
  }
  stop = true;
  busy.join();
  EXPECT_EQ(find_layer(handle), layer);
  close_layer(handle);
}

// The last references of a child go, too.
TEST(Fork, AnInheritedEngineIsLeftAloneWhereItIsDestroyed) {
  auto layer = std::make_unique<EngineLayer>(std::make_shared<Engine>(2, 1, std::vector<int>{}),
                                             small_config());
  const std::weak_ptr<Engine> watch = layer->engine;
  EXPECT_EQ(in_child([&] {
              layer.reset();
              return std::string(watch.expired() ? "ended" : "still there");
            }),
            "ended");
}

#ifndef __SANITIZE_THREAD__  // it starts no threads in a fork of a process with threads
TEST(Fork, AChildMayHaveAnEngineOfItsOwn) {
  const auto engine = std::make_shared<Engine>(2, 1, std::vector<int>{});
  const int64_t handle = register_layer(std::make_shared<EngineLayer>(engine, small_config()));
  EXPECT_EQ(in_child([&]() -> std::string {
              auto own = std::make_shared<Engine>(2, 1, std::vector<int>{});
              bool ran = false;
              own->run([&] { ran = true; });
              auto layer = std::make_shared<EngineLayer>(own, small_config());
              const int64_t other = register_layer(layer);
              if (other == handle || find_layer(other) != layer) return "wrong handle";
              close_layer(other);
              return ran ? "ran" : "did not run";
            }),
            "ran");
  close_layer(handle);
}
#endif

// A loader's progress is asked for while it loads: for the thread sanitizer.
TEST(Layers, TellWhatIsLoadedWhileTheyLoad) {
  const auto engine = std::make_shared<Engine>(2, 1, std::vector<int>{});
  MoeConfig config = small_config();
  config.expert_ids = {0, 1, 2};
  config.reserved_ids = {3};
  EngineLayer layer(engine, config);
  ExpertStore& store = layer.layer.store();
  const uint64_t bytes = store.bytes();
  const auto matrix = [&](Projection projection) {
    return std::vector<uint8_t>(store.num_panels(projection) * store.panel_bytes(projection));
  };
  const std::vector<uint8_t> w13 = matrix(Projection::kW13);
  const std::vector<uint8_t> w2 = matrix(Projection::kW2);
  EXPECT_FALSE(store.all_loaded());
  std::atomic<bool> loaded{false};
  std::thread loader([&] {
    for (const int expert : {0, 1, 2, 3}) {
      engine->run([&] { store.load_packed({{expert, w13.data(), w2.data()}}); });
    }
    loaded = true;
  });
  while (!loaded) {
    const bool has_last = store.bytes() > bytes;
    EXPECT_TRUE(store.all_loaded() || !has_last);
  }
  loader.join();
  EXPECT_TRUE(store.all_loaded());
  EXPECT_EQ(store.bytes(), bytes / 3 * 4);
}

TEST(Probes, MeasureSomething) {
  const auto engine = std::make_shared<Engine>(2, 1, std::vector<int>{});
  EngineLayer layer(engine, small_config());
  // An absolute speed is no property of the code; that a probe read and multiplied at all is.
  EXPECT_GT(probe_read(layer), 0);
  EXPECT_GT(probe_peak(layer, 1), 0);
  MoeConfig mixed = small_config();
  mixed.layouts[0] = PackedLayout::parse("fp8f_n64k4_v1");
  mixed.layouts[1] = PackedLayout::parse("int8_n64k4_v1");
  EngineLayer of_both(engine, mixed);
  EXPECT_GT(probe_peak(of_both, 1), 0);
  EXPECT_GT(probe_dispatch(*engine), 0);
  MoeConfig empty = small_config();
  empty.expert_ids.clear();
  EngineLayer nothing(engine, empty);
  EXPECT_THROW(probe_read(nothing), Error);
}

}  // namespace
}  // namespace kt
