// Deferral: the split of a batch, the share on its way to the next layer, and passes of a small
// model against the same passes written out.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <random>
#include <set>
#include <thread>

#include "base/check.h"
#include "engine/engine.h"

namespace kt {
namespace {

using Bytes = std::vector<uint8_t>;
using Ids = std::vector<int32_t>;

template <typename Id>
DeferralSplit split_of(const std::vector<Id>& ids, const std::vector<float>& weights, int top_k,
                       int num_experts, int max_deferred, const Bytes& skip = {}) {
  DeferralSplit split;
  split.deferred = {99};  // what an earlier batch left
  split_deferred(ids.data(), sizeof(Id) == 8 ? DType::kInt64 : DType::kInt32, weights.data(),
                 static_cast<int>(ids.size()) / top_k, top_k, num_experts,
                 skip.empty() ? nullptr : skip.data(), max_deferred, split);
  return split;
}

TEST(Split, ProtectsTheLargestWeightsOfEachToken) {
  const std::vector<int64_t> ids = {4, 0, 2,   // token 0 protects 0
                                    1, 2, 3};  // token 1 protects 3
  const DeferralSplit split = split_of(ids, {0.2f, 0.5f, 0.3f, 0.1f, 0.4f, 0.5f}, 3, 5, 2);
  EXPECT_EQ(split.deferred, (Ids{1, 2, 4}));
  EXPECT_EQ(split.skip_now, (Bytes{0, 1, 1, 0, 1}));
  EXPECT_EQ(split.skip_deferred, (Bytes{1, 0, 0, 1, 0}));
}

TEST(Split, AnExpertThatOneTokenProtectsIsImmediateForAll) {
  const std::vector<int64_t> ids = {0, 1,   // protects 0
                                    1, 0,   // protects 1
                                    2, 0};  // protects 2
  const DeferralSplit split = split_of(ids, {0.6f, 0.4f, 0.6f, 0.4f, 0.6f, 0.4f}, 2, 4, 1);
  EXPECT_TRUE(split.deferred.empty());
  EXPECT_EQ(split.skip_now, (Bytes{0, 0, 0, 1}));
  EXPECT_EQ(split.skip_deferred, (Bytes{1, 1, 1, 1}));
}

TEST(Split, BreaksTiesByTheLowerSlot) {
  EXPECT_EQ(split_of<int64_t>({3, 1, 2}, {0.5f, 0.5f, 0.5f}, 3, 4, 1).deferred, (Ids{2}));
  EXPECT_EQ(split_of<int64_t>({3, 1, 2}, {0.5f, 0.5f, 0.5f}, 3, 4, 2).deferred, (Ids{1, 2}));
  EXPECT_EQ(split_of<int64_t>({3, 1, 2}, {0.0f, -0.0f, 0.5f}, 3, 4, 1).deferred, (Ids{1}));
}

TEST(Split, ClampsTheNumberOfDeferredExperts) {
  const std::vector<int32_t> ids = {0, 1, 2};
  const std::vector<float> weights = {0.2f, 0.3f, 0.5f};
  EXPECT_TRUE(split_of(ids, weights, 3, 4, 0).deferred.empty());
  EXPECT_TRUE(split_of(ids, weights, 3, 4, -1).deferred.empty());
  for (const int all : {3, 4, 1000}) {
    const DeferralSplit split = split_of(ids, weights, 3, 4, all);
    EXPECT_EQ(split.deferred, (Ids{0, 1, 2}));
    EXPECT_EQ(split.skip_now, (Bytes{1, 1, 1, 1}));
  }
}

TEST(Split, ExpertsElsewhereUseUpPlacesAndAreNeverComputed) {
  // the GPU has 1 and 3; of the first token, 1 takes the only protected place
  const std::vector<int64_t> ids = {1, 0, 2, 3};
  const DeferralSplit split = split_of(ids, {0.6f, 0.4f, 0.6f, 0.4f}, 2, 4, 1, {0, 1, 0, 1});
  EXPECT_EQ(split.deferred, (Ids{0}));
  EXPECT_EQ(split.skip_now, (Bytes{1, 1, 0, 1}));
  EXPECT_EQ(split.skip_deferred, (Bytes{0, 1, 1, 1}));
}

TEST(Split, ASlotWithoutExpertTakesNoPlace) {
  const std::vector<int64_t> ids = {-1, 0,  1,    //
                                    -1, -1, -1};  // a padded row
  const DeferralSplit split = split_of(ids, {0.9f, 0.2f, 0.3f, 0.9f, 0.9f, 0.9f}, 3, 3, 2);
  EXPECT_EQ(split.deferred, (Ids{0}));
  EXPECT_EQ(split.skip_now, (Bytes{1, 0, 1}));
}

TEST(Split, LeavesBadIdsToTheRouting) {
  const DeferralSplit split =
      split_of<int64_t>({3, 0, -7, int64_t{1} << 40}, {1, 1, 1, 1}, 2, 3, 2);
  EXPECT_EQ(split.deferred, (Ids{0}));
}

TEST(Split, CountsNanAsTheLargest) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(split_of<int64_t>({0, 1, 2}, {0.5f, nan, 1e30f}, 3, 3, 2).deferred, (Ids{0, 2}));
  EXPECT_EQ(split_of<int64_t>({0, 1, 2}, {nan, nan, 1e30f}, 3, 3, 2).deferred, (Ids{1, 2}));
}

TEST(Split, OfNothing) {
  const DeferralSplit split = split_of(std::vector<int64_t>{}, {}, 2, 3, 1);
  EXPECT_TRUE(split.deferred.empty());
  EXPECT_EQ(split.skip_now, (Bytes{1, 1, 1}));
}

// The rule written down another way: sort the slots of a token, take the first.
TEST(Split, EqualsTheSortedRuleOnRandomBatches) {
  std::mt19937 random(4);
  const auto below = [&](int limit) { return static_cast<int>(random() % limit); };
  for (int round = 0; round < 3000; ++round) {
    const int num_experts = 1 + below(9);
    const int top_k = 1 + below(5);
    const int num_tokens = below(5);
    const int max_deferred = below(top_k + 2);
    std::vector<int32_t> ids;
    std::vector<float> weights;
    Bytes skip;
    for (int e = 0; e < num_experts; ++e) skip.push_back(below(4) == 0);
    for (int i = 0; i < num_tokens * top_k; ++i) {
      ids.push_back(below(num_experts + 1) - 1);
      weights.push_back(static_cast<float>(below(4)) / 4);  // many ties
    }
    std::set<int> is_protected, used;
    for (int t = 0; t < num_tokens; ++t) {
      std::vector<int> slots;
      for (int s = 0; s < top_k; ++s) {
        if (ids[t * top_k + s] >= 0) slots.push_back(t * top_k + s);
      }
      std::stable_sort(slots.begin(), slots.end(),
                       [&](int a, int b) { return weights[a] > weights[b]; });
      for (size_t i = 0; i < slots.size(); ++i) {
        used.insert(ids[slots[i]]);
        if (static_cast<int>(i) < top_k - max_deferred) is_protected.insert(ids[slots[i]]);
      }
    }
    const DeferralSplit split = split_of(ids, weights, top_k, num_experts, max_deferred, skip);
    Ids deferred;
    for (int e = 0; e < num_experts; ++e) {
      const bool later = used.count(e) > 0 && is_protected.count(e) == 0 && !skip[e];
      if (later) deferred.push_back(e);
      ASSERT_EQ(split.skip_deferred[e], !later);
      ASSERT_EQ(split.skip_now[e], skip[e] || is_protected.count(e) == 0);
      // each expert that is used and here: in one part exactly
      if (used.count(e) > 0 && !skip[e]) {
        ASSERT_NE(split.skip_now[e], split.skip_deferred[e]);
      }
    }
    ASSERT_EQ(split.deferred, deferred);
  }
}

TEST(Chain, GivesAShareToTheNextLayerOfTheSamePassOnly) {
  struct Case {
    int position;
    int num_tokens;
    bool taken;
  };
  for (const Case& next : {Case{3, 5, true}, Case{3, 4, false}, Case{4, 5, false},
                           Case{2, 5, false}, Case{0, 5, false}}) {
    LayerChain chain;
    EXPECT_EQ(chain.take(2, 5).share, nullptr);
    float* share = chain.begin_share(5);
    share[4] = 7;
    chain.end_share(2, 5, nullptr);
    const LayerChain::Taken taken = chain.take(next.position, next.num_tokens);
    EXPECT_EQ(taken.share != nullptr, next.taken);
    EXPECT_EQ(taken.dropped, !next.taken);
    if (taken.share != nullptr) {
      EXPECT_EQ(taken.share[4], 7);
    }
    EXPECT_EQ(chain.take(3, 5).share, nullptr);  // gone either way
    EXPECT_FALSE(chain.take(3, 5).dropped);
  }
}

TEST(Chain, ThrowsTheErrorOfAShareWhereItWouldBeAdded) {
  LayerChain chain;
  const auto error = std::make_exception_ptr(Error("planned", "here", 1));
  chain.end_share(0, 2, error);
  EXPECT_THROW(chain.take(1, 2), Error);
  EXPECT_EQ(chain.take(1, 2).share, nullptr);
  chain.end_share(0, 2, error);
  EXPECT_TRUE(chain.take(0, 2).dropped);  // another pass: nobody's error
}

constexpr int kExperts = 6;
constexpr int kTopK = 3;
constexpr int kHidden = 64;

struct Batch {
  std::vector<float> hidden;
  std::vector<int64_t> ids;
  std::vector<float> weights;
  std::vector<float> output;

  MoeInput input() {
    MoeInput in;
    in.hidden_states = hidden.data();
    in.dtype = DType::kFloat32;
    in.topk_ids = ids.data();
    in.topk_weights = weights.data();
    in.num_tokens = static_cast<int>(ids.size()) / kTopK;
    in.top_k = kTopK;
    in.output = output.data();
    return in;
  }
};

Batch random_batch(int num_tokens, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Batch batch;
  for (int i = 0; i < num_tokens * kHidden; ++i) batch.hidden.push_back(normal(random));
  for (int t = 0; t < num_tokens; ++t) {
    Ids order(kExperts);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    batch.ids.insert(batch.ids.end(), order.begin(), order.begin() + kTopK);
    for (int s = 0; s < kTopK; ++s)
      batch.weights.push_back(static_cast<float>(1 + random() % 100) / 100);
  }
  batch.output.assign(batch.hidden.size(), -1.0f);
  return batch;
}

std::shared_ptr<EngineLayer> make_layer(const std::shared_ptr<Engine>& engine, int layer_idx,
                                        int hidden = kHidden) {
  MoeConfig config;
  config.layer_idx = layer_idx;
  config.num_experts = kExperts;
  config.top_k = kTopK;
  config.hidden_size = hidden;
  config.intermediate_size = 32;
  config.set_layout(PackedLayout::parse("int8_n64k4_r512_v1"));
  for (int e = 0; e < kExperts; ++e) config.expert_ids.push_back(e);
  auto layer = std::make_shared<EngineLayer>(engine, config);
  std::mt19937 random(layer_idx);
  std::normal_distribution<float> normal(0.0f, 0.125f);
  std::vector<std::vector<float>> matrices(3 * kExperts, std::vector<float>(hidden * 32));
  for (auto& matrix : matrices) {
    for (float& value : matrix) value = normal(random);
  }
  std::vector<ExpertStore::Source> sources;
  for (int e = 0; e < kExperts; ++e) {
    sources.push_back({e, matrices[3 * e].data(), matrices[3 * e + 1].data(),
                       matrices[3 * e + 2].data(), DType::kFloat32});
  }
  engine->run([&] { layer->layer.store().load(sources); });
  return layer;
}

// A model of MoE layers 1, 3, 4 and 8, as one with dense layers between them has.
struct Model {
  explicit Model(int num_threads, int max_deferred = 2)
      : engine(std::make_shared<Engine>(num_threads, 1, std::vector<int>{})) {
    for (const int layer_idx : {1, 3, 4, 8}) layers.push_back(make_layer(engine, layer_idx));
    link_layers(layers, std::vector<int>(layers.size(), max_deferred));
  }

  void forward(size_t i, Batch& batch) {
    engine->run([&] {
      layers[i]->run(batch.input());
      layers[i]->run_deferred(batch.input());
    });
  }

  std::shared_ptr<Engine> engine;
  std::vector<std::shared_ptr<EngineLayer>> layers;
};

// The two parts of a forward, from layers that are not linked.
struct Parts {
  std::vector<float> now, deferred;
};

Parts parts_of(EngineLayer& alone, Batch batch, int max_deferred) {
  const DeferralSplit split = split_of(batch.ids, batch.weights, kTopK, kExperts, max_deferred);
  Parts parts{batch.output, batch.output};
  MoeInput input = batch.input();
  input.skip = split.skip_now.data();
  input.output = parts.now.data();
  alone.engine->run([&] { alone.layer.forward(input); });
  input.skip = split.skip_deferred.data();
  input.output = parts.deferred.data();
  alone.engine->run([&] { alone.layer.forward(input); });
  return parts;
}

void expect_sum(const std::vector<float>& got, const std::vector<float>& a,
                const std::vector<float>& b) {
  ASSERT_EQ(got.size(), a.size());
  for (size_t i = 0; i < got.size(); ++i) ASSERT_EQ(got[i], a[i] + (b.empty() ? 0.0f : b[i])) << i;
}

uint64_t dropped(const Model& model) {
  uint64_t total = 0;
  for (const auto& layer : model.layers) total += layer->layer.counters().dropped_shares;
  return total;
}

TEST(Deferral, EachLayerAddsWhatThePreviousOneDeferred) {
  for (const int max_deferred : {0, 1, 2, 3}) {
    Model model(2, max_deferred);
    Model alone(1, 0);
    for (const int num_tokens : {1, 2, 40}) {
      std::vector<float> carried;
      for (size_t i = 0; i < model.layers.size(); ++i) {
        Batch batch = random_batch(num_tokens, static_cast<uint32_t>(10 * i));
        const bool last = i + 1 == model.layers.size();
        const Parts parts = parts_of(*alone.layers[i], batch, last ? 0 : max_deferred);
        model.forward(i, batch);
        expect_sum(batch.output, parts.now, carried);
        carried = last ? std::vector<float>{} : parts.deferred;
      }
    }
    EXPECT_EQ(dropped(model), 0u);
    EXPECT_EQ(model.layers[3]->layer.counters().deferred_rows, 0u);
    EXPECT_EQ(model.layers[0]->layer.counters().deferred_rows > 0, max_deferred > 0);
  }
}

TEST(Deferral, HasTheSameBitsForEveryThreadCountAndSubmit) {
  std::vector<std::vector<float>> wanted;
  for (const int num_threads : {1, 2, 5}) {
    for (const bool submit : {false, true}) {
      Model model(num_threads);
      for (size_t i = 0; i < model.layers.size(); ++i) {
        const auto batch = std::make_shared<Batch>(random_batch(9, static_cast<uint32_t>(i)));
        if (submit) {
          model.engine->stream().wait(model.layers[i]->submit(batch->input(), batch));
        } else {
          model.forward(i, *batch);
        }
        if (wanted.size() <= i) wanted.push_back(batch->output);
        EXPECT_EQ(batch->output, wanted[i]) << num_threads << " threads, layer " << i;
      }
    }
  }
}

TEST(Deferral, CountsAForwardOnceWhateverItDefers) {
  Model model(1);
  Batch batch = random_batch(5, 1);
  batch.ids[1] = -1;
  model.forward(0, batch);
  const MoeCounters counters = model.layers[0]->layer.counters();
  EXPECT_EQ(counters.forwards, 1u);
  EXPECT_EQ(counters.tokens, 5u);
  EXPECT_EQ(counters.rows, 14u);
  std::vector<int64_t> counted(kExperts);
  for (const int64_t id : batch.ids) {
    if (id >= 0) ++counted[id];
  }
  EXPECT_EQ(counters.expert_counts, counted);
}

TEST(Deferral, NeverAddsTheShareOfAnotherPass) {
  Model model(1);
  Model alone(1, 0);
  Batch given_up = random_batch(1, 1);
  const auto plain = [&](size_t layer, const Batch& batch) {
    return parts_of(*alone.layers[layer], batch, layer == 3 ? 0 : 2);
  };
  // given up after layer 0; the next pass begins anew
  model.forward(0, given_up);
  Batch first = random_batch(1, 2);
  model.forward(0, first);
  expect_sum(first.output, plain(0, first).now, {});
  EXPECT_EQ(dropped(model), 1u);
  // another number of tokens
  Batch wide = random_batch(2, 3);
  model.forward(1, wide);
  expect_sum(wide.output, plain(1, wide).now, {});
  EXPECT_EQ(dropped(model), 2u);
  // a layer left out
  Batch far = random_batch(2, 4);
  model.forward(3, far);
  expect_sum(far.output, plain(3, far).now, {});
  EXPECT_EQ(dropped(model), 3u);
  // the last layer defers nothing, so nothing is lost at the end of a pass
  model.forward(0, first);
  EXPECT_EQ(dropped(model), 3u);
}

TEST(Deferral, ForgetsAForwardWhoseSecondHalfNeverCame) {
  Model model(1);
  Batch batch = random_batch(1, 1);
  model.engine->run([&] { model.layers[0]->run(batch.input()); });
  Batch other = random_batch(1, 2);
  model.engine->run([&] { model.layers[0]->run(other.input()); });
  EXPECT_EQ(dropped(model), 1u);
  bool first = true;
  bool second = false;
  model.engine->run([&] {
    first = model.layers[0]->run_deferred(batch.input());
    second = model.layers[0]->run_deferred(other.input());
  });
  EXPECT_FALSE(first);
  EXPECT_TRUE(second);
}

// What a device may do to its buffers when a pass was given up.
TEST(Deferral, IdsMayChangeBetweenTheParts) {
  Model model(1);
  Batch batch = random_batch(2, 1);
  Batch wanted = random_batch(2, 2);
  const Parts first = parts_of(*Model(1, 0).layers[0], batch, 2);
  model.engine->run([&] {
    model.layers[0]->run(batch.input());
    std::fill(batch.ids.begin(), batch.ids.end(), int64_t{1} << 30);
    std::fill(batch.weights.begin(), batch.weights.end(), 1e30f);
    EXPECT_TRUE(model.layers[0]->run_deferred(batch.input()));
  });
  const Parts second = parts_of(*Model(1, 0).layers[1], wanted, 2);
  model.forward(1, wanted);
  expect_sum(wanted.output, second.now, first.deferred);
}

TEST(Deferral, RefusesInTheFirstPartWhatTheSecondCannotCompute) {
  Model model(1);
  MoeConfig config = model.layers[0]->layer.config();
  config.expert_ids = {0, 1};
  const auto partial = std::make_shared<EngineLayer>(model.engine, config);
  link_layers({partial, model.layers[1]}, {2, 2});
  Batch batch = random_batch(1, 1);
  batch.ids = {0, -1, 5};
  batch.weights = {0.5f, 0.4f, 0.1f};  // 5 is deferred, and not here
  std::string message;
  try {
    model.engine->run([&] { partial->run(batch.input()); });
  } catch (const Error& error) {
    message = error.what();
  }
  EXPECT_NE(message.find("layer 1: a token was routed to expert 5"), std::string::npos) << message;
  model.engine->run([&] { EXPECT_FALSE(partial->run_deferred(batch.input())); });
}

TEST(Deferral, TwoModelsOnOneEngineKeepTheirShares) {
  Model model(2);
  Model other(1);
  std::vector<std::shared_ptr<EngineLayer>> second;
  for (const int layer_idx : {1, 3}) second.push_back(make_layer(model.engine, layer_idx));
  link_layers(second, {2, 2});
  for (size_t i = 0; i < 2; ++i) {
    Batch batch = random_batch(2, static_cast<uint32_t>(i));
    Batch mixed = random_batch(2, static_cast<uint32_t>(i));
    Batch between = random_batch(2, 77);
    other.forward(i, batch);
    model.forward(i, mixed);
    model.engine->run([&] {
      second[i]->run(between.input());
      second[i]->run_deferred(between.input());
    });
    EXPECT_EQ(mixed.output, batch.output);
  }
  EXPECT_EQ(dropped(model), 0u);
}

TEST(Deferral, LinksAreCheckedAndReplaced) {
  Model model(1);
  EXPECT_EQ(model.layers[2]->chain_position(), 2);
  EXPECT_EQ(model.layers[2]->max_deferred(), 2);
  EXPECT_EQ(model.layers[3]->max_deferred(), 0);
  link_layers({model.layers[0], model.layers[2]}, {1, 1});
  EXPECT_EQ(model.layers[2]->chain_position(), 1);
  EXPECT_EQ(model.layers[2]->max_deferred(), 0);
  EXPECT_NO_THROW(link_layers({}, {}));
  EXPECT_THROW(link_layers(model.layers, {1}), Error);
  EXPECT_THROW(link_layers({model.layers[0], model.layers[1]}, {-1, 0}), Error);
  EXPECT_THROW(link_layers({model.layers[0], make_layer(model.engine, 9, 128)}, {1, 1}), Error);
  Model stranger(1);
  EXPECT_THROW(link_layers({model.layers[0], stranger.layers[1]}, {1, 1}), Error);
}

// Submits from two threads with a link between, and layers that go while their second half is
// queued: for the thread sanitizer.
TEST(Deferral, LayersMayGoWhileTheirSecondHalfIsQueued) {
  const auto engine = std::make_shared<Engine>(2, 1, std::vector<int>{});
  const auto pass = [&](int seed) {
    for (int round = 0; round < 20; ++round) {
      std::vector<std::shared_ptr<EngineLayer>> layers = {make_layer(engine, 0),
                                                          make_layer(engine, 1)};
      const auto batch = std::make_shared<Batch>(random_batch(3, seed + round));
      const uint64_t ticket = layers[0]->submit(batch->input(), batch);
      link_layers(layers, {2, 2});
      engine->stream().wait(ticket);
      for (const auto& layer : layers) {
        engine->stream().wait(layer->submit(batch->input(), batch));
        batch->output[0] = 0;  // the caller's from here on
      }
      engine->stream().wait(layers[0]->submit(batch->input(), batch));
    }
  };
  std::thread other(pass, 1000);
  pass(0);
  other.join();
}

}  // namespace
}  // namespace kt
