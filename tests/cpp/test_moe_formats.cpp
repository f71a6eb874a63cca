// Layers whose weights came as codes: made-up panels of every form of scales, and pairs of layouts,
// against a double-precision MoE and against themselves.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "moe_problem.h"
#include "panel_values.h"

namespace kt {
namespace {

using LayoutPair = std::pair<const char*, const char*>;

MoeConfig config_of_pair(const LayoutPair& layouts) {
  MoeConfig config = config_of(layouts.first, 320, 96, 4, 2);
  config.layouts[1] = PackedLayout::parse(layouts.second);
  return config;
}

// The panels of one layer, and its weights as they stand for them.
struct CodedLayer {
  Weights weights;
  std::vector<std::vector<uint8_t>> w13, w2;  // by expert
};

void append_panel(const PanelValues& panel, std::vector<uint8_t>& matrix) {
  matrix.insert(matrix.end(), panel.bytes.begin(), panel.bytes.end());
}

void put_row(const PanelValues& panel, int column, int count, float* row) {
  for (int k = 0; k < count; ++k) row[k] = static_cast<float>(panel.value(k, column));
}

CodedLayer coded_layer(const MoeConfig& config) {
  const int h = config.hidden_size, n = config.intermediate_size;
  const auto panel_of = [&](Projection projection, RandomNumbers& random) {
    const PackedLayout& layout = config.layout(projection);
    const int k = static_cast<int>(layout.padded_k(config.depth(projection)));
    return make_panel_values(layout, k, kPackedColumns, Fill::kRandom, random);
  };
  RandomNumbers random(19);
  CodedLayer layer;
  for (int e = 0; e < config.num_experts; ++e) {
    std::vector<float> gate(n * h), up(n * h), down(h * n);
    std::vector<uint8_t> w13, w2;
    for (int row = 0; row < n; row += 32) {
      const PanelValues panel = panel_of(Projection::kW13, random);
      append_panel(panel, w13);
      for (int j = 0; j < 32; ++j) {
        put_row(panel, j, h, &gate[(row + j) * h]);
        put_row(panel, 32 + j, h, &up[(row + j) * h]);
      }
    }
    for (int row = 0; row < h; row += kPackedColumns) {
      const PanelValues panel = panel_of(Projection::kW2, random);
      append_panel(panel, w2);
      for (int j = 0; j < kPackedColumns; ++j) put_row(panel, j, n, &down[(row + j) * n]);
    }
    layer.weights.gate.push_back(std::move(gate));
    layer.weights.up.push_back(std::move(up));
    layer.weights.down.push_back(std::move(down));
    layer.w13.push_back(std::move(w13));
    layer.w2.push_back(std::move(w2));
  }
  return layer;
}

std::vector<float> run_coded(const MoeConfig& config, const CodedLayer& coded, const Batch& batch,
                             IsaSet isa, const std::vector<int>& threads_by_node) {
  WorkerPool pool(plan_of(threads_by_node));
  MoeLayer layer(config, pool, make_moe_scratch(), isa);
  for (int e = 0; e < config.num_experts; ++e)
    layer.store().load_packed({{e, coded.w13[e].data(), coded.w2[e].data()}});
  std::vector<float> output(batch.hidden.size(), -1.0f);
  layer.forward(batch.input(output));
  return output;
}

// The weights are exact, so the error is that of the activations: of int8 by the terms of
// error_bound() 0.75 % for x in blocks of 128 and 1.4 % for the intermediate values, and 1.3 times
// as much for x in gate and up: 2 %. Made-up zeros of 255 and scales of two levels let a few groups
// outweigh their row, whose error is then that of fewer values: twice as much for one or two
// tokens. Rows as bf16 have 2^-9 for each of two roundings; weights as bf16 as much again.
double activation_bound(const MoeConfig& config) {
  for (const PackedLayout& layout : config.layouts) {
    if (!takes_bf16_rows(layout.format)) return 0.05;
  }
  return 1.0 / 128;
}

// A layout of each form of scales and of each width of codes.
const LayoutPair kIntegerPairs[] = {
    {"int4g128_n64k8_v1", "int4g32_n64k8_v1"},   {"int8hg32_n64k4_v1", "int8hg32_n64k4_v1"},
    {"int8fg128_n64k4_v1", "int4fg64_n64k8_v1"}, {"int4zg128_n64k8_v1", "int4zg32_n64k8_v1"},
    {"int4mg32_n64k8_v1", "int5mg32_n64k8_v1"},  {"int4kmg32_n64k8_v1", "int6kg16_n64k16_v1"},
    {"int5kmg32_n64k8_v1", "int5hg32_n64k8_v1"}, {"int2kmg16_n64k16_v1", "int3kg16_n64k16_v1"},
    {"fp4g32_n64k8_v1", "fp4cg16_n64k8_v1"},     {"iq4kg32_n64k8_v1", "iq4hg32_n64k8_v1"},
    {"int4hg96_n64k8_v1", "int4f_n64k8_v1"},
};
const LayoutPair kFloatPairs[] = {{"fp8g32_n64k4_v1", "fp8g32_n64k4_v1"},
                                  {"fp8fg128_n64k4_v1", "fp8f_n64k4_v1"}};
// Rows of int8 and of bf16 in one layer.
const LayoutPair kMixedPairs[] = {{"fp8fg128_n64k4_v1", "int8hg32_n64k4_v1"},
                                  {"int6kg16_n64k16_v1", "fp8g32_n64k4_v1"}};

std::vector<LayoutPair> all_pairs() {
  std::vector<LayoutPair> pairs(std::begin(kIntegerPairs), std::end(kIntegerPairs));
  pairs.insert(pairs.end(), std::begin(kFloatPairs), std::end(kFloatPairs));
  pairs.insert(pairs.end(), std::begin(kMixedPairs), std::end(kMixedPairs));
  return pairs;
}

std::string pair_name(const testing::TestParamInfo<LayoutPair>& test) {
  return std::string(test.param.first) + "_and_" + test.param.second;
}

class EveryLayoutPair : public testing::TestWithParam<LayoutPair> {};
INSTANTIATE_TEST_SUITE_P(MoeLayer, EveryLayoutPair, testing::ValuesIn(all_pairs()), pair_name);

class IntegerLayoutPair : public testing::TestWithParam<LayoutPair> {};
INSTANTIATE_TEST_SUITE_P(MoeLayer, IntegerLayoutPair, testing::ValuesIn(kIntegerPairs), pair_name);

// So many that experts get 160 rows each: the kernels of expanded panels begin at up to 128.
constexpr int kManyTokens = 400;

TEST_P(EveryLayoutPair, EqualsTheFormula) {
  const MoeConfig config = config_of_pair(GetParam());
  const CodedLayer coded = coded_layer(config);
  for (const int num_tokens : {1, 2, 24, kManyTokens}) {
    const Batch batch = random_batch(config, num_tokens, 6 + num_tokens);
    const std::vector<float> output = run_coded(config, coded, batch, cpu_features().chosen, {2});
    EXPECT_LT(relative_error(output, exact_moe(config, coded.weights, batch)),
              activation_bound(config))
        << num_tokens << " tokens";
  }
}

TEST_P(EveryLayoutPair, SameBitsForEveryThreadAndNodeCount) {
  const MoeConfig config = config_of_pair(GetParam());
  const CodedLayer coded = coded_layer(config);
  for (const int num_tokens : {1, 5, 40}) {
    const Batch batch = random_batch(config, num_tokens, 17);
    const std::vector<float> one = run_coded(config, coded, batch, cpu_features().chosen, {1});
    for (const auto& threads : {std::vector{3}, {2, 1}, {1, 1, 1, 1, 1}}) {
      EXPECT_EQ(run_coded(config, coded, batch, cpu_features().chosen, threads), one)
          << num_tokens << " tokens, " << threads.size() << " nodes";
    }
  }
}

TEST_P(IntegerLayoutPair, BitsDoNotDependOnBatchOrTier) {
  const MoeConfig config = config_of_pair(GetParam());
  const CodedLayer coded = coded_layer(config);
  const int h = config.hidden_size;
  for (const int num_tokens : {70, kManyTokens}) {
    const Batch all = random_batch(config, num_tokens, 29);
    const std::vector<float> together = run_coded(config, coded, all, cpu_features().chosen, {2});
    EXPECT_EQ(run_coded(config, coded, all, kIsaReference, {2}), together) << num_tokens;
    for (int t = 0; t < num_tokens; t += num_tokens / 7) {
      Batch one{1, all.top_k, {}, {}, {}};
      one.hidden.assign(all.hidden.begin() + t * h, all.hidden.begin() + (t + 1) * h);
      one.ids.assign(all.ids.begin() + t * 2, all.ids.begin() + (t + 1) * 2);
      one.weights.assign(all.weights.begin() + t * 2, all.weights.begin() + (t + 1) * 2);
      EXPECT_EQ(run_coded(config, coded, one, cpu_features().chosen, {1}),
                std::vector<float>(together.begin() + t * h, together.begin() + (t + 1) * h))
          << t << " of " << num_tokens;
    }
  }
}

// What the batches above rest on.
TEST(LayerKernels, ReachTheirLastRowsWithManyTokens) {
  const MoeConfig config = config_of_pair(kIntegerPairs[0]);
  const Batch batch = random_batch(config, kManyTokens, 29);
  for (int e = 0; e < config.num_experts; ++e) {
    const auto rows = std::count(batch.ids.begin(), batch.ids.end(), e);
    for (const LayoutPair& layouts : all_pairs()) {
      KernelRequest request;
      request.isa = cpu_features().chosen;
      const LayerKernels kernels = select_layer_kernels(config_of_pair(layouts), request);
      for (const KernelSet& set : kernels.sets) EXPECT_LE(set.gemms.back().m_from, rows);
    }
  }
}

TEST(LayerKernels, MultiplyWhatEachOfTwoLayoutsHas) {
  WorkerPool pool(plan_of({1}));
  for (const auto& [layouts, w13, w2] :
       {std::tuple{LayoutPair{"fp8fg128_n64k4_v1", "int8_n64k4_v1"}, DType::kBFloat16,
                   DType::kInt8},
        std::tuple{LayoutPair{"int8_n64k4_v1", "bf16_n64k2_v1"}, DType::kInt8, DType::kBFloat16}}) {
    const MoeLayer layer(config_of_pair(layouts), pool, make_moe_scratch(), kIsaReference);
    EXPECT_EQ(layer.multiplied(Projection::kW13), w13);
    EXPECT_EQ(layer.multiplied(Projection::kW2), w2);
  }
}

TEST(LayerKernels, AreNamedForEachOfTwoLayouts) {
  WorkerPool pool(plan_of({1}));
  const MoeLayer layer(config_of_pair({"int4kmg32_n64k8_v1", "int6kg16_n64k16_v1"}), pool,
                       make_moe_scratch(), cpu_features().chosen);
  const std::string text = layer.explain();
  EXPECT_NE(text.find("w13: int4km on "), std::string::npos) << text;
  EXPECT_NE(text.find("w2: int6k on "), std::string::npos) << text;
}

}  // namespace
}  // namespace kt
