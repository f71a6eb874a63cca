// The whole layer: against a double-precision MoE, and against itself for every thread count, node
// count and batch.
#include <gtest/gtest.h>

#include <tuple>

#include "base/check.h"
#include "moe_problem.h"

namespace kt {
namespace {

const char* const kLayouts[] = {"bf16_n64k2_v1",     "int8_n64k4_r512_v1",
                                "int8_n64k4_v1",     "int4g32_n64k8_r512_v1",
                                "int4g128_n64k8_v1", "int4_n64k8_r512_v1"};

class EveryLayout : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(MoeLayer, EveryLayout, testing::ValuesIn(kLayouts));

// bf16 rounds as its tier does and is left out: only integer sums are the same on every tier.
class IntegerLayout : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(MoeLayer, IntegerLayout,
                         testing::ValuesIn(kLayouts + 1, std::end(kLayouts)));

TEST_P(EveryLayout, EqualsTheFormula) {
  for (const auto& [hidden, intermediate] : {std::pair{128, 192}, {576, 96}, {272, 80}}) {
    const MoeConfig config = config_of(GetParam(), hidden, intermediate);
    const Weights weights = random_weights(config, 11);
    for (const int num_tokens : {1, 2, 7, 40}) {
      const Batch batch = random_batch(config, num_tokens, 5 + num_tokens);
      const std::vector<float> output = run(config, weights, batch, cpu_features().chosen, {2});
      EXPECT_LT(relative_error(output, exact_moe(config, weights, batch)), error_bound(GetParam()))
          << hidden << "x" << intermediate << " tokens " << num_tokens;
    }
  }
}

TEST_P(EveryLayout, SameBitsForEveryThreadAndNodeCount) {
  const MoeConfig config = config_of(GetParam(), 576, 320);
  const Weights weights = random_weights(config, 3);
  for (const int num_tokens : {1, 5, 90}) {
    const Batch batch = random_batch(config, num_tokens, 17);
    const std::vector<float> one = run(config, weights, batch, cpu_features().chosen, {1});
    for (const auto& threads : {std::vector{2}, {3}, {1, 1}, {2, 1}, {1, 1, 1, 1, 1}, {4, 3}}) {
      EXPECT_EQ(run(config, weights, batch, cpu_features().chosen, threads), one)
          << num_tokens << " tokens, " << threads.size() << " nodes";
    }
  }
}

TEST_P(IntegerLayout, BitsDoNotDependOnBatchOrTier) {
  const MoeConfig config = config_of(GetParam(), 320, 192);
  const Weights weights = random_weights(config, 23);
  const Batch all = random_batch(config, 70, 29);
  const std::vector<float> together = run(config, weights, all, cpu_features().chosen, {2});
  EXPECT_EQ(run(config, weights, all, kIsaReference, {2}), together);

  WorkerPool pool(plan_of({2}));
  MoeLayer layer(config, pool, make_moe_scratch(), cpu_features().chosen);
  load(layer, weights);
  for (int t = 0; t < all.num_tokens; t += 9) {
    Batch one{1, all.top_k, {}, {}, {}};
    one.hidden.assign(all.hidden.begin() + t * 320, all.hidden.begin() + (t + 1) * 320);
    one.ids.assign(all.ids.begin() + t * 3, all.ids.begin() + (t + 1) * 3);
    one.weights.assign(all.weights.begin() + t * 3, all.weights.begin() + (t + 1) * 3);
    std::vector<float> output(320);
    layer.forward(one.input(output));
    EXPECT_EQ(output,
              std::vector<float>(together.begin() + t * 320, together.begin() + (t + 1) * 320))
        << t;
  }
}

TEST(MoeLayer, MoreTokensThanOnePass) {
  const MoeConfig config = config_of("int8_n64k4_r512_v1", 64, 32, 3, 1);
  const Weights weights = random_weights(config, 2);
  const Batch batch = random_batch(config, 5000, 4);
  const std::vector<float> output = run(config, weights, batch, cpu_features().chosen, {2});
  EXPECT_LT(relative_error(output, exact_moe(config, weights, batch)), 0.02);
}

TEST(MoeLayer, ScratchIsBoundedByRowsAndNotByTokens) {
  const MoeConfig config = config_of("int8_n64k4_r512_v1", 64, 64, 32, 32);
  WorkerPool pool(plan_of({2}));
  const std::shared_ptr<MoeScratch> scratch = make_moe_scratch();
  MoeLayer layer(config, pool, scratch, cpu_features().chosen);
  load(layer, random_weights(config, 2));
  const auto bytes_after = [&](int num_tokens) {
    Batch batch = random_batch(config, num_tokens, 3);
    for (int64_t& id : batch.ids) id = std::max<int64_t>(id, 0);
    std::vector<float> output(batch.hidden.size());
    layer.forward(batch.input(output));
    return scratch->bytes();
  };
  // 32768 rows are the most of one pass, here of 1024 tokens
  const uint64_t full = bytes_after(1024);
  EXPECT_LT(bytes_after(512 + 1024), full + full / 100);
}

TEST(MoeLayer, TokensWithoutExpertsAreZero) {
  const MoeConfig config = config_of("int8_n64k4_r512_v1", 64, 32);
  const Weights weights = random_weights(config, 2);
  Batch batch = random_batch(config, 4, 4);
  for (int s = 0; s < 3; ++s) batch.ids[3 + s] = -1;
  std::vector<float> output = run(config, weights, batch, cpu_features().chosen, {2});
  EXPECT_EQ(std::vector<float>(output.begin() + 64, output.begin() + 128),
            std::vector<float>(64, 0.0f));
  std::fill(batch.ids.begin(), batch.ids.end(), -1);
  output = run(config, weights, batch, cpu_features().chosen, {2});
  EXPECT_EQ(output, std::vector<float>(output.size(), 0.0f));
}

TEST(MoeLayer, ANanTokenSpoilsOnlyItself) {
  const MoeConfig config = config_of("int4g32_n64k8_r512_v1", 128, 64);
  const Weights weights = random_weights(config, 2);
  Batch batch = random_batch(config, 3, 4);
  std::fill(batch.ids.begin(), batch.ids.end(), 1);
  const std::vector<float> clean = run(config, weights, batch, cpu_features().chosen, {2});
  batch.hidden[128 + 5] = std::nanf("");
  const std::vector<float> output = run(config, weights, batch, cpu_features().chosen, {2});
  EXPECT_EQ(std::vector<float>(output.begin(), output.begin() + 128),
            std::vector<float>(clean.begin(), clean.begin() + 128));
  for (int i = 128; i < 256; ++i) EXPECT_TRUE(std::isnan(output[i])) << i;
}

TEST(MoeLayer, OnlyTheGivenExpertsCostMemory) {
  MoeConfig config = config_of("int8_n64k4_r512_v1", 256, 128, 8);
  WorkerPool pool(plan_of({1}));
  const uint64_t all = ExpertStore(config, pool).bytes();
  config.expert_ids = {1, 6};
  ExpertStore store(config, pool);
  EXPECT_EQ(store.bytes(), all / 4);
  EXPECT_FALSE(store.has(0));
  EXPECT_TRUE(store.has(6));
}

std::string message_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(MoeLayer, RefusesWhatItCannotCompute) {
  MoeConfig config = config_of("int8_n64k4_r512_v1", 64, 32);
  config.expert_ids = {0, 1};
  WorkerPool pool(plan_of({1}));
  MoeLayer layer(config, pool, make_moe_scratch(), cpu_features().chosen);
  Batch batch = random_batch(config, 1, 1);
  std::vector<float> output(64);
  batch.ids = {0, -1, -1};
  EXPECT_EQ(message_of([&] { layer.forward(batch.input(output)); }),
            "layer 7: a token was routed to expert 0, whose weights were never loaded; call "
            "load_weights first.");
  batch.ids = {4, -1, -1};
  EXPECT_EQ(message_of([&] { layer.forward(batch.input(output)); }),
            "layer 7: a token was routed to expert 4, which is not on the CPU and not marked in "
            "gpu_experts_mask.");
  batch.ids = {6, -1, -1};
  EXPECT_EQ(message_of([&] { layer.forward(batch.input(output)); }),
            "layer 7: topk_ids[0, 0] is 6, but expert ids are -1 (absent) or 0 to 5.");

  config.top_k = 9;
  EXPECT_EQ(message_of([&] { check_moe_config(config); }),
            "layer 7: num_experts_per_tok is 9, more than the 6 experts.");
}

TEST(MoeLayer, PackedExpertsRoundTrip) {
  const MoeConfig config = config_of("int4g32_n64k8_r512_v1", 192, 96);
  const Weights weights = random_weights(config, 9);
  const Batch batch = random_batch(config, 6, 1);
  WorkerPool pool(plan_of({2}));
  MoeLayer first(config, pool, make_moe_scratch(), cpu_features().chosen);
  load(first, weights);
  WorkerPool other_pool(plan_of({1, 2}));
  MoeLayer second(config, other_pool, make_moe_scratch(), cpu_features().chosen);
  std::vector<std::vector<uint8_t>> bytes;
  for (int e = 0; e < config.num_experts; ++e) {
    const ExpertStore& store = first.store();
    std::vector<uint8_t> w13(store.num_panels(Projection::kW13) *
                             store.panel_bytes(Projection::kW13));
    std::vector<uint8_t> w2(store.num_panels(Projection::kW2) * store.panel_bytes(Projection::kW2));
    store.export_packed(e, w13.data(), w2.data());
    second.store().load_packed({{e, w13.data(), w2.data()}});
  }
  EXPECT_TRUE(second.store().all_loaded());
  std::vector<float> a(batch.hidden.size());
  std::vector<float> b(batch.hidden.size());
  first.forward(batch.input(a));
  second.forward(batch.input(b));
  EXPECT_EQ(a, b);
}

TEST(MoeLayer, RefusesToLoadAnExpertTwiceInOneCall) {
  const MoeConfig config = config_of("bf16_n64k2_v1", 64, 32);
  const Weights weights = random_weights(config, 1);
  WorkerPool pool(plan_of({2}));
  ExpertStore store(config, pool);
  const ExpertStore::Source source{2, weights.gate[2].data(), weights.up[2].data(),
                                   weights.down[2].data(), DType::kFloat32};
  EXPECT_NE(message_of([&] { store.load({source, source}); }).find("expert 2 is given twice"),
            std::string::npos);
  EXPECT_FALSE(store.loaded(2));
  store.load({source});
  store.load({source});
  EXPECT_TRUE(store.loaded(2));
}

TEST(MoeLayer, AFailedReloadIsNotLoaded) {
  const MoeConfig config = config_of("int8_n64k4_r512_v1", 64, 32);
  WorkerPool pool(plan_of({2}));
  MoeLayer layer(config, pool, make_moe_scratch(), cpu_features().chosen);
  Weights weights = random_weights(config, 1);
  load(layer, weights);
  EXPECT_TRUE(layer.store().all_loaded());
  weights.down[2][5 * 32 + 3] = std::nanf("");
  const std::string message = message_of([&] { load(layer, weights); });
  EXPECT_EQ(
      message.find("layer 7, expert 2: weight nan at row 5, column 3 of down cannot be packed"), 0u)
      << message;
  EXPECT_TRUE(message.ends_with("; repair the checkpoint")) << message;
  EXPECT_FALSE(layer.store().loaded(2));
}

TEST(MoeLayer, CountsWhatItDoes) {
  const MoeConfig config = config_of("int8_n64k4_r512_v1", 64, 32);
  WorkerPool pool(plan_of({1}));
  MoeLayer layer(config, pool, make_moe_scratch(), cpu_features().chosen);
  load(layer, random_weights(config, 1));
  Batch batch = random_batch(config, 2, 1);
  batch.ids = {0, 1, -1, 1, 1, -1};
  std::vector<float> output(batch.hidden.size());
  layer.forward(batch.input(output));
  const MoeCounters counters = layer.counters();
  EXPECT_EQ(counters.forwards, 1u);
  EXPECT_EQ(counters.tokens, 2u);
  EXPECT_EQ(counters.rows, 4u);
  // two experts of w13 (one panel, k = 64) and w2 (one panel, k = 32 padded to 64)
  EXPECT_EQ(counters.weight_bytes, 2u * 2u * (64 * 64 + 512));
  EXPECT_EQ(counters.expert_counts, (std::vector<int64_t>{1, 3, 0, 0, 0, 0}));
}

TEST(MoeLayer, CountsIdsOfExpertsComputedElsewhere) {
  const MoeConfig config = config_of("int8_n64k4_r512_v1", 64, 32);
  WorkerPool pool(plan_of({1}));
  MoeLayer layer(config, pool, make_moe_scratch(), cpu_features().chosen);
  load(layer, random_weights(config, 1));
  Batch batch = random_batch(config, 2, 1);
  std::vector<float> output(batch.hidden.size());
  const std::vector<uint8_t> skip = {0, 1, 0, 0, 0, 1};
  for (const std::vector<int64_t>& ids :
       {std::vector<int64_t>{0, 1, -1, 1, 1, 5}, std::vector<int64_t>{5, 5, -1, -1, -1, -1}}) {
    batch.ids = ids;
    MoeInput input = batch.input(output);
    input.skip = skip.data();
    layer.forward(input);
  }
  const std::vector<int32_t> narrow = {2, 2, 2, -1, 0, 1};
  MoeInput input = batch.input(output);
  input.topk_ids = narrow.data();
  input.id_dtype = DType::kInt32;
  layer.forward(input);
  const std::vector<int64_t> counted = {2, 4, 3, 0, 0, 3};
  EXPECT_EQ(layer.counters().expert_counts, counted);
  EXPECT_EQ(layer.counters().tokens, 6u);

  batch.ids = {0, 0, 0, 0, 0, 6};  // refused: nothing of it is counted
  EXPECT_THROW(layer.forward(batch.input(output)), Error);
  EXPECT_EQ(layer.counters().expert_counts, counted);
  EXPECT_EQ(layer.counters().tokens, 6u);
}

// One rounding: the sum of the experts and the addend, both in fp32, equals the fp32 forward plus
// the addend rounded once.
TEST(MoeLayer, AddsTheAddendBeforeRounding) {
  for (const int num_tokens : {1, 3, 40}) {
    const MoeConfig config = config_of("int8_n64k4_r512_v1", 80, 32);
    const Weights weights = random_weights(config, 1);
    Batch batch = random_batch(config, num_tokens, 2);
    std::fill_n(batch.ids.begin() + (num_tokens - 1) * config.top_k, config.top_k, -1);
    std::vector<uint16_t> hidden;
    for (float& value : batch.hidden) {
      hidden.push_back(float_to_bf16(value));
      value = bf16_to_float(hidden.back());
    }
    WorkerPool pool(plan_of({2}));
    MoeLayer layer(config, pool, make_moe_scratch(), cpu_features().chosen);
    load(layer, weights);
    std::vector<float> plain(hidden.size());
    layer.forward(batch.input(plain));
    const std::vector<float> addend = random_batch(config, num_tokens, 3).hidden;

    std::vector<float> sum(hidden.size(), -1.0f);
    std::vector<uint16_t> rounded(hidden.size(), 1);
    MoeInput input = batch.input(sum);
    input.addend = addend.data();
    layer.forward(input);
    input.dtype = DType::kBFloat16;
    input.hidden_states = hidden.data();
    input.output = rounded.data();
    layer.forward(input);
    std::vector<float> unrounded(hidden.size(), -1.0f);
    input.fp32_output = unrounded.data();
    input.output = nullptr;
    layer.forward_deferred(input);
    for (size_t i = 0; i < sum.size(); ++i) {
      ASSERT_EQ(sum[i], plain[i] + addend[i]) << i;
      ASSERT_EQ(unrounded[i], sum[i]) << i;
      ASSERT_EQ(rounded[i], float_to_bf16(sum[i])) << i;
    }
    EXPECT_EQ(layer.counters().forwards, 3u);
    EXPECT_EQ(layer.counters().deferred_rows * 4, layer.counters().rows);
  }
}

}  // namespace
}  // namespace kt
