// What stands around the products of an expert, in the whole layer: the activation and biases.
#include <gtest/gtest.h>

#include <cmath>

#include "base/check.h"
#include "moe_problem.h"

namespace kt {
namespace {

class ExpertFunction : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Layouts, ExpertFunction,
                         testing::Values("bf16_n64k2_v1", "int8_n64k4_r512_v1",
                                         "int4g32_n64k8_r512_v1"));

// As of GPT-OSS, with limits that are met often.
TEST_P(ExpertFunction, IsThatOfTheModel) {
  MoeConfig config = config_of(GetParam(), 272, 80);
  config.activation = activation_of("silu", 1.5f, 1.702f);
  Weights weights = random_weights(config, 31);
  add_random_biases(config, weights);
  for (const int num_tokens : {1, 40, 150}) {
    const Batch batch = random_batch(config, num_tokens, 3 + num_tokens);
    const std::vector<float> one = run(config, weights, batch, cpu_features().chosen, {1});
    EXPECT_LT(relative_error(one, exact_moe(config, weights, batch)), error_bound(GetParam()));
    EXPECT_EQ(run(config, weights, batch, cpu_features().chosen, {1, 2}), one);
  }
}

TEST(MoeConfig, NamesActivations) {
  EXPECT_EQ(activation_of("silu", 0, 0).kind, ActivationKind::kSilu);
  EXPECT_EQ(activation_of("silu", 10, 0).kind, ActivationKind::kSiluLimit);
  EXPECT_EQ(activation_of("silu", 7, 1.702f).kind, ActivationKind::kSwigluAlpha);
  EXPECT_TRUE(std::isinf(activation_of("silu", 0, 1.702f).limit));
  EXPECT_EQ(activation_of("silu_then_limit", 7, 0).kind, ActivationKind::kSiluThenLimit);
  EXPECT_EQ(activation_of("gelu", 0, 0).kind, ActivationKind::kGelu);
  EXPECT_EQ(activation_of("gelu_tanh", 0, 0).kind, ActivationKind::kGeluTanh);
  EXPECT_THROW(activation_of("relu2", 0, 0), Error);
  EXPECT_THROW(activation_of("gelu", 7, 0), Error);
  EXPECT_THROW(activation_of("gelu_tanh", 0, 1), Error);
  EXPECT_THROW(activation_of("silu_then_limit", 0, 0), Error);
  EXPECT_THROW(activation_of("silu", -1, 0), Error);
  EXPECT_THROW(activation_of("silu", NAN, 0), Error);
  EXPECT_THROW(activation_of("silu", 7, INFINITY), Error);
}

}  // namespace
}  // namespace kt
