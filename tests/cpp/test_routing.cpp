#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "base/check.h"
#include "moe/routing.h"

namespace kt {
namespace {

template <typename Id>
Routing route_all(const std::vector<Id>& ids, const std::vector<float>& weights, int top_k,
                  int num_experts, const std::vector<uint8_t>& skip = {}) {
  Routing routing;
  route(ids.data(), sizeof(Id) == 8 ? DType::kInt64 : DType::kInt32, weights.data(),
        static_cast<int>(ids.size()) / top_k, top_k, num_experts,
        skip.empty() ? nullptr : skip.data(), routing);
  return routing;
}

TEST(Routing, GroupsByExpertThenToken) {
  const std::vector<int64_t> ids = {2, 0,   // token 0
                                    0, 3,   // token 1
                                    2, 0};  // token 2
  const std::vector<float> weights = {0.1f, 0.2f, 0.3f, 0.4f, 0.5f, 0.6f};
  const Routing routing = route_all(ids, weights, 2, 4);
  EXPECT_EQ(routing.experts, (std::vector<int32_t>{0, 2, 3}));
  EXPECT_EQ(routing.offsets, (std::vector<int32_t>{0, 3, 5, 6}));
  EXPECT_EQ(routing.token, (std::vector<int32_t>{0, 1, 2, 0, 2, 1}));
  EXPECT_EQ(routing.weight, (std::vector<float>{0.2f, 0.3f, 0.6f, 0.1f, 0.5f, 0.4f}));
  EXPECT_EQ(routing.max_rows, 3);
}

TEST(Routing, DropsAbsentAndSkipped) {
  const std::vector<int32_t> ids = {-1, 1, 2, -1};
  const Routing routing = route_all(ids, {1, 2, 3, 4}, 2, 3, {0, 1, 0});
  EXPECT_EQ(routing.experts, (std::vector<int32_t>{2}));
  EXPECT_EQ(routing.token, (std::vector<int32_t>{1}));
  EXPECT_EQ(routing.weight, (std::vector<float>{3}));
}

TEST(Routing, NothingLeft) {
  for (const auto& ids : {std::vector<int64_t>{}, std::vector<int64_t>{-1, -1}}) {
    const Routing routing = route_all(ids, std::vector<float>(ids.size(), 1.0f), 2, 4);
    EXPECT_EQ(routing.num_rows(), 0);
    EXPECT_TRUE(routing.experts.empty());
    EXPECT_EQ(routing.offsets, (std::vector<int32_t>{0}));
    EXPECT_EQ(routing.max_rows, 0);
  }
}

TEST(Routing, AnExpertTwiceInOneTokenIsTwoRows) {
  const Routing routing = route_all(std::vector<int64_t>{5, 5}, {0.25f, 0.75f}, 2, 6);
  EXPECT_EQ(routing.token, (std::vector<int32_t>{0, 0}));
  EXPECT_EQ(routing.weight, (std::vector<float>{0.25f, 0.75f}));
}

TEST(Routing, RefusesIdsOutOfRange) {
  for (const int64_t bad : {int64_t{4}, int64_t{-2}, int64_t{1} << 40}) {
    try {
      route_all(std::vector<int64_t>{0, 1, 2, bad}, std::vector<float>(4, 1.0f), 2, 4);
      FAIL() << bad;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find("topk_ids[1, 1] is " + std::to_string(bad)),
                std::string::npos)
          << error.what();
    }
  }
}

TEST(Routing, RandomRoutesKeepEveryPairOnceInOrder) {
  std::mt19937 random(7);
  for (int round = 0; round < 200; ++round) {
    const int num_experts = 1 + static_cast<int>(random() % 40);
    const int top_k = 1 + static_cast<int>(random() % 8);
    const int num_tokens = static_cast<int>(random() % 50);
    std::vector<int32_t> ids(num_tokens * top_k);
    std::vector<float> weights(ids.size());
    std::vector<uint8_t> skip(num_experts);
    for (auto& s : skip) s = random() % 4 == 0;
    for (auto& id : ids) id = static_cast<int32_t>(random() % (num_experts + 1)) - 1;
    std::iota(weights.begin(), weights.end(),
              0.0f);  // weight = flat index, so every row can be traced back
    const Routing routing = route_all(ids, weights, top_k, num_experts, skip);

    std::vector<float> seen;
    for (size_t e = 0; e < routing.experts.size(); ++e) {
      ASSERT_LT(routing.offsets[e], routing.offsets[e + 1]);
      float previous = -1;
      for (int r = routing.offsets[e]; r < routing.offsets[e + 1]; ++r) {
        const int flat = static_cast<int>(routing.weight[r]);
        EXPECT_EQ(ids[flat], routing.experts[e]);
        EXPECT_EQ(routing.token[r], flat / top_k);
        EXPECT_GT(routing.weight[r], previous);
        previous = routing.weight[r];
        seen.push_back(routing.weight[r]);
      }
    }
    const auto wanted =
        std::count_if(ids.begin(), ids.end(), [&](int id) { return id >= 0 && !skip[id]; });
    EXPECT_EQ(static_cast<long>(seen.size()), wanted);
    std::sort(seen.begin(), seen.end());
    EXPECT_EQ(std::adjacent_find(seen.begin(), seen.end()), seen.end());
  }
}

}  // namespace
}  // namespace kt
