// Experts written out as bf16, for any cut of ranks, threads and nodes; experts loaded late.
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <tuple>
#include <vector>

#include "base/check.h"
#include "base/dtype.h"
#include "format/quantize.h"
#include "moe/expert_export.h"
#include "random_tensors.h"

namespace kt {
namespace {

constexpr int kExperts = 3;
constexpr uint16_t kUntouched = 0x7fc1;  // a NaN that no weight is

PoolPlan plan_of(const std::vector<int>& threads_by_node) {
  PoolPlan plan;
  for (size_t i = 0; i < threads_by_node.size(); ++i) {
    plan.nodes.push_back({static_cast<int>(i), false, std::vector<int>(threads_by_node[i], -1)});
  }
  return plan;
}

MoeConfig config_of(const std::string& layout, int hidden, int intermediate) {
  MoeConfig config;
  config.layer_idx = 4;
  config.num_experts = kExperts;
  config.top_k = 1;
  config.hidden_size = hidden;
  config.intermediate_size = intermediate;
  config.set_layout(PackedLayout::parse(layout));
  config.expert_ids = {0, 1, 2};
  return config;
}

// gate, up [I, H] and down [H, I] of every expert, bf16 bits.
struct Weights {
  std::vector<std::vector<uint16_t>> matrix;

  Weights(const MoeConfig& config, uint64_t seed) {
    RandomNumbers random(seed);
    for (int i = 0; i < 3 * kExperts; ++i) {
      matrix.emplace_back(static_cast<size_t>(config.hidden_size) * config.intermediate_size);
      for (uint16_t& bits : matrix.back()) bits = float_to_bf16(0.1f * random.normal());
    }
  }
  ExpertStore::Source source(int expert) const {
    return {expert, matrix[3 * expert].data(), matrix[3 * expert + 1].data(),
            matrix[3 * expert + 2].data(), DType::kBFloat16};
  }
};

// Buffers of all ranks with a guard behind each.
struct Ranks {
  std::vector<std::vector<uint16_t>> w13, w2;
  size_t w2_size;

  Ranks(const MoeConfig& config, int num_ranks)
      : w2_size(static_cast<size_t>(config.hidden_size) * config.intermediate_size / num_ranks) {
    for (int r = 0; r < num_ranks; ++r) {
      w13.emplace_back(2 * w2_size + 8, kUntouched);
      w2.emplace_back(w2_size + 8, kUntouched);
    }
  }
  ExpertExport request(int expert) {
    ExpertExport request;
    request.expert = expert;
    for (auto& buffer : w13) request.w13.push_back(reinterpret_cast<uint8_t*>(buffer.data()));
    for (auto& buffer : w2) request.w2.push_back(reinterpret_cast<uint8_t*>(buffer.data()));
    return request;
  }
  bool untouched() const {
    for (const auto* list : {&w13, &w2}) {
      for (const auto& buffer : *list) {
        for (const uint16_t bits : buffer) {
          if (bits != kUntouched) return false;
        }
      }
    }
    return true;
  }
};

std::string message_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

// What packing one matrix row by row stands for: the same panels, cut by nothing.
std::vector<uint16_t> packed_value(const MoeConfig& config, const std::vector<uint16_t>& bits,
                                   int64_t n, int64_t k) {
  std::vector<uint16_t> value;
  std::vector<uint8_t> panel(config.layouts[0].panel_bytes(k));
  std::vector<float> rows(64 * k);
  for (int64_t p = 0; p < config.layouts[0].num_panels(n); ++p) {
    quantize_panel(config.layouts[0], matrix_panel_rows(bits.data(), DType::kBFloat16, n, k, p),
                   panel.data(), nullptr);
    dequantize_panel(config.layouts[0], k, panel.data(), rows.data());
    const int64_t count = std::min<int64_t>(64, n - 64 * p);
    for (int64_t i = 0; i < count * k; ++i) value.push_back(float_to_bf16(rows[i]));
  }
  return value;
}

using Case = std::tuple<const char*, int, int, int, std::vector<int>>;
class ExpertExportTest : public testing::TestWithParam<Case> {};

TEST_P(ExpertExportTest, EveryRankGetsItsRowsAndColumns) {
  const auto& [layout, hidden, intermediate, num_ranks, threads] = GetParam();
  const MoeConfig config = config_of(layout, hidden, intermediate);
  const Weights weights(config, 11);
  WorkerPool pool(plan_of(threads));
  ExpertStore store(config, pool);
  store.load({weights.source(0), weights.source(1), weights.source(2)});
  const int expert = 1;
  Ranks ranks(config, num_ranks);
  const ExpertExport request = ranks.request(expert);
  check_export(store, request);
  write_expert(store, pool, request);

  const auto gate = packed_value(config, weights.matrix[3 * expert], intermediate, hidden);
  const auto up = packed_value(config, weights.matrix[3 * expert + 1], intermediate, hidden);
  const auto down = packed_value(config, weights.matrix[3 * expert + 2], hidden, intermediate);
  if (config.layouts[0].format == WeightFormat::kBFloat16) {
    ASSERT_EQ(gate, weights.matrix[3 * expert]);
  }
  const int64_t cut = intermediate / num_ranks;
  int64_t wrong = 0;
  for (int r = 0; r < num_ranks; ++r) {
    for (int64_t i = 0; i < cut; ++i) {
      for (int64_t h = 0; h < hidden; ++h) {
        const int64_t feature = r * cut + i;
        wrong += ranks.w13[r][i * hidden + h] != gate[feature * hidden + h];
        wrong += ranks.w13[r][(cut + i) * hidden + h] != up[feature * hidden + h];
        wrong += ranks.w2[r][h * cut + i] != down[h * intermediate + feature];
      }
    }
    for (size_t i = 0; i < 8; ++i) {
      wrong += ranks.w13[r][2 * ranks.w2_size + i] != kUntouched;
      wrong += ranks.w2[r][ranks.w2_size + i] != kUntouched;
    }
  }
  EXPECT_EQ(wrong, 0);
}

INSTANTIATE_TEST_SUITE_P(
    Cuts, ExpertExportTest,
    testing::Combine(testing::Values("bf16_n64k2_v1", "int8_n64k4_r512_v1",
                                     "int4g32_n64k8_r512_v1"),
                     testing::Values(80, 128), testing::Values(48, 96), testing::Values(1, 2, 3),
                     testing::Values(std::vector<int>{1}, std::vector<int>{2, 1})));

TEST(ExpertExport, WhatCannotBeWrittenIsRefusedAndNothingIsTouched) {
  const MoeConfig config = config_of("bf16_n64k2_v1", 64, 32);
  const Weights weights(config, 5);
  WorkerPool pool(plan_of({1}));
  MoeConfig two = config;
  two.expert_ids = {0, 2};
  ExpertStore store(two, pool);
  store.load({weights.source(0)});
  Ranks ranks(config, 2);
  const auto refused = [&](const std::function<void(ExpertExport&)>& change) {
    ExpertExport request = ranks.request(0);
    change(request);
    return message_of([&] { check_export(store, request); });
  };
  EXPECT_EQ(refused([](ExpertExport&) {}), "");
  EXPECT_EQ(refused([](ExpertExport& r) { r.expert = 3; }),
            "layer 4 has experts 0 to 2; expert 3 cannot be written.");
  EXPECT_EQ(refused([](ExpertExport& r) { r.expert = 1; }),
            "layer 4: expert 1 is not on the CPU and cannot be written.");
  EXPECT_EQ(refused([](ExpertExport& r) { r.w2.pop_back(); }),
            "got 2 buffers for w13 and 1 for w2; give one of each for every rank.");
  EXPECT_EQ(refused([](ExpertExport& r) {
              r.w13.push_back(r.w13[0]);
              r.w2.push_back(r.w2[0]);
            }),
            "the intermediate size 32 cannot be cut into 3 equal ranks.");
  EXPECT_EQ(
      refused([](ExpertExport& r) { r.w2[1] = nullptr; }),
      "a w2 buffer is at address 0; give the address of values in host memory, at a multiple of "
      "2.");
  EXPECT_EQ(refused([](ExpertExport& r) { r.w2[1] = r.w13[0] + 2; }),
            "two buffers of expert 0 overlap; give every rank memory of its own.");
  EXPECT_EQ(message_of([&] { write_expert(store, pool, ranks.request(2)); }),
            "layer 4: expert 2 was not loaded; call load_weights first.");
  EXPECT_TRUE(ranks.untouched());
}

TEST(ReservedExperts, CostMemoryWhenTheyAreLoaded) {
  MoeConfig config = config_of("bf16_n64k2_v1", 1024, 512);
  const Weights weights(config, 9);
  WorkerPool pool(plan_of({1, 1}));
  const uint64_t all = ExpertStore(config, pool).bytes();
  config.expert_ids = {1};
  config.reserved_ids = {0, 2};
  ExpertStore store(config, pool);
  EXPECT_EQ(store.bytes(), all / 3);
  EXPECT_EQ(store.pages().resident_bytes, 0u);
  store.load({weights.source(1)});
  EXPECT_TRUE(store.all_loaded());
  const uint64_t resident = store.pages().resident_bytes;
  // one expert, and at most the rest of one huge page in each of the four arenas
  EXPECT_GE(resident, all / 3);
  EXPECT_LE(resident, all / 3 + 4 * (2u << 20));
  EXPECT_TRUE(store.has(2));
  EXPECT_FALSE(store.loaded(2));
  store.load({weights.source(2)});
  EXPECT_TRUE(store.loaded(2));
  EXPECT_EQ(store.bytes(), all / 3 * 2);
  Ranks ranks(config, 1);
  write_expert(store, pool, ranks.request(2));
  EXPECT_TRUE(std::equal(weights.matrix[6].begin(), weights.matrix[6].end(), ranks.w13[0].begin()));
}

TEST(ReservedExperts, AreNamedOnce) {
  MoeConfig config = config_of("bf16_n64k2_v1", 64, 32);
  config.reserved_ids = {1};
  EXPECT_EQ(message_of([&] { check_moe_config(config); }),
            "layer 4: expert 1 is in both expert_ids and reserved_ids.");
  config.expert_ids = {0};
  config.reserved_ids = {2, 1};
  EXPECT_EQ(message_of([&] { check_moe_config(config); }),
            "layer 4: reserved_ids must ascend within 0 to 2, got 1 after 2.");
}

}  // namespace
}  // namespace kt
