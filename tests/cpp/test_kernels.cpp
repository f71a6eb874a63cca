// Every row of kernels.inc against the reference row of the same contract, and the rules of
// selection. Integer products must agree bit for bit; bf16 within bf16_gemm_tolerance of the exact
// sum and, for a given kernel, bit for bit for every number of rows. Rows the features in use do
// not support are skipped by name.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <regex>
#include <set>
#include <string>
#include <vector>

#include "base/cpu_features.h"
#include "gemm_problem.h"

namespace kt {

#define KT_EXPAND(symbol, isa) \
  void symbol(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch);
#include "kernels/kernels.inc"

namespace {

bool is_supported(IsaSet isa) { return (isa & ~cpu_features().chosen) == 0; }

class GemmTest : public testing::TestWithParam<GemmKernel> {
 protected:
  void SetUp() override {
    if (!is_supported(GetParam().isa)) {
      GTEST_SKIP() << GetParam().name << " needs " << isa_name(GetParam().isa)
                   << "; in use: " << isa_name(cpu_features().chosen);
    }
  }
  static std::vector<int> group_sizes() { return group_sizes_of(GetParam()); }
};
class IntegerGemmTest : public GemmTest {};
class Bf16GemmTest : public GemmTest {};

TEST_P(GemmTest, AgreesWithTheReferenceForAllShapes) { expect_correct_for_all_shapes(GetParam()); }

TEST_P(GemmTest, GivesARowTheSameBitsAmongAnyRows) {
  for (int group_size : group_sizes()) {
    const Problem all = make_problem(layout_of(GetParam().weights, group_size), 64, 576, 64, false,
                                     Fill::kRandom, 7);
    const std::vector<float> expected = run_gemm(GetParam(), all);
    for (int m : kRowCounts) {
      Problem some = all;
      some.m = m;
      for (int i = 0; i < m; ++i) some.row_idx.push_back((i * 37 + m) % 64);
      const std::vector<float> c = run_gemm(GetParam(), some);
      for (int i = 0; i < m; ++i) {
        ASSERT_EQ(first_difference(&c[i * kStride], &expected[some.row(i) * kStride], kColumns), -1)
            << "row " << some.row(i) << " among " << m << " rows, group " << group_size;
      }
    }
  }
}

TEST_P(IntegerGemmTest, HoldsTheLargestSums) {
  for (int group_size : group_sizes()) {
    for (Fill fill : {Fill::kLargest, Fill::kSmallest, Fill::kAlternating}) {
      // one sum over the whole row is what may overflow; a group's is as long as the group
      const int k = group_size == 0 ? kMaxIntegerK : 8192;
      SCOPED_TRACE(testing::Message()
                   << "fill " << static_cast<int>(fill) << " group " << group_size << " k " << k);
      Problem p = make_problem(layout_of(GetParam().weights, group_size), 7, k, 64, false, fill, 3);
      expect_correct(GetParam(), p);
      negate_odd_rows(&p);
      expect_correct(GetParam(), p);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(IntegerGemmTest, KeepsZeroNanAndSubnormalScales) {
  for (int group_size : group_sizes()) {
    const Problem p = make_special_scales_problem(GetParam().weights, group_size);
    expect_correct(GetParam(), p);
    const std::vector<float> c = run_gemm(GetParam(), p);
    for (int j = 0; j < kColumns; ++j) {
      ASSERT_EQ(c[j], 0.0f);
      ASSERT_TRUE(std::isnan(c[kStride + j]));
    }
  }
}

TEST_P(Bf16GemmTest, KeepsInfinityAndNanInTheirRow) {
  Problem p = make_problem(layout_of(DType::kBFloat16, 0), 7, 128, 64, false, Fill::kRandom, 11);
  const std::vector<float> before = run_gemm(GetParam(), p);
  p.a_bf16[2 * p.k + 5] = 0x7f80;   // infinity
  p.a_bf16[5 * p.k + 77] = 0x7fc0;  // NaN
  const std::vector<float> c = run_gemm(GetParam(), p);
  for (int i = 0; i < p.m; ++i) {
    for (int j = 0; j < kColumns; ++j) {
      const float value = c[i * kStride + j];
      if (i == 2) {
        ASSERT_TRUE(std::isinf(value));
      } else if (i == 5) {
        ASSERT_TRUE(std::isnan(value));
      } else {
        ASSERT_TRUE(same_float(value, before[i * kStride + j])) << "row " << i << " column " << j;
      }
    }
  }
}

TEST_P(Bf16GemmTest, TakesSubnormalBf16WithinTheTolerance) {
  Problem p = make_problem(layout_of(DType::kBFloat16, 0), 3, 192, 64, true, Fill::kRandom, 13);
  for (size_t i = 0; i < p.a_bf16.size(); i += 3) p.a_bf16[i] &= 0x807f;
  expect_correct(GetParam(), p);
}

std::vector<GemmKernel> rows_with_bf16_weights(bool is_bf16) {
  std::vector<GemmKernel> rows;
  for (const GemmKernel& kernel : list_gemm_kernels()) {
    if ((kernel.weights == WeightFormat::kBFloat16) == is_bf16) rows.push_back(kernel);
  }
  return rows;
}

std::string row_name(const testing::TestParamInfo<GemmKernel>& test) { return test.param.name; }

INSTANTIATE_TEST_SUITE_P(Rows, GemmTest, testing::ValuesIn(list_gemm_kernels()), row_name);
INSTANTIATE_TEST_SUITE_P(Rows, IntegerGemmTest, testing::ValuesIn(rows_with_bf16_weights(false)),
                         row_name);
INSTANTIATE_TEST_SUITE_P(Rows, Bf16GemmTest, testing::ValuesIn(rows_with_bf16_weights(true)),
                         row_name);

struct ExpandKernel {
  const char* name;
  IsaSet isa;
  ExpandFn expand;
};

const ExpandKernel kExpandKernels[] = {
#define KT_EXPAND(symbol, isa) {#symbol, isa, symbol},
#include "kernels/kernels.inc"
};

class ExpandTest : public testing::TestWithParam<ExpandKernel> {};

TEST_P(ExpandTest, WritesTheReferenceBytes) {
  if (!is_supported(GetParam().isa))
    GTEST_SKIP() << GetParam().name << " needs " << isa_name(GetParam().isa);
  const bool to_bf16 = std::string(GetParam().name).find("bf16") != std::string::npos;
  for (int group_size : {32, 64, 96, 128, 0}) {
    for (int k : kDepths) {
      const Problem p =
          make_problem({DType::kInt4, group_size, 0}, 1, k, 64, false, Fill::kRandom, 17);
      const size_t size = size_t{kColumns} * (to_bf16 ? 2 * p.k : p.k + 4 * p.num_groups);
      LineVector<uint8_t> expected(size + 64, 0xab), scratch(size + 64, 0xab);
      if (to_bf16) {
        // [k / 2][64][2] out of [64, k]
        for (int64_t i = 0; i < int64_t{kColumns} * k; ++i) {
          const int64_t column = i / k, at = i % k;
          std::memcpy(expected.data() + 2 * ((at / 2 * kColumns + column) * 2 + at % 2),
                      &p.w_bf16[i], 2);
        }
      } else {
        expand_int4_reference(p.panel.data(), k, p.group_size, expected.data());
      }
      GetParam().expand(p.panel.data(), k, p.group_size, scratch.data());
      ASSERT_EQ(scratch, expected) << "k " << k << " group " << group_size;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Rows, ExpandTest, testing::ValuesIn(kExpandKernels),
                         [](const auto& test) { return std::string(test.param.name); });

// ---- selection ----

const DType kWeightDTypes[] = {DType::kInt8, DType::kInt4, DType::kBFloat16};

TEST(Registry, NamesSayWhatTheRowsAre) {
  const std::regex grammar(
      "gemm_(s8|u8|bf16)_(int8|int4|int4x|int4b|bf16)_fp32_([0-9]+)x[0-9]+x[0-9]+_([a-z0-9]+)");
  const std::string features = isa_name(~IsaSet{0}) + " reference";
  std::set<std::string> names;
  for (const GemmKernel& kernel : list_gemm_kernels()) {
    std::smatch part;
    const std::string name = kernel.name;
    ASSERT_TRUE(std::regex_match(name, part, grammar)) << name;
    EXPECT_TRUE(names.insert(name).second) << name << " is there twice";
    EXPECT_EQ(part[1] == "bf16", kernel.a_dtype == DType::kBFloat16) << name;
    EXPECT_EQ(part[1] == "u8", kernel.a_dtype == DType::kUint8) << name;
    EXPECT_EQ(part[2].str().substr(0, 4), std::string(format_name(kernel.weights)).substr(0, 4))
        << name;
    EXPECT_EQ(part[2] == "int4x" || part[2] == "int4b", kernel.expand != nullptr) << name;
    EXPECT_EQ(part[4].str().starts_with("amx"), kernel.packing != nullptr) << name;
    EXPECT_EQ(std::stoi(part[3]), kernel.mr) << name;
    EXPECT_NE(features.find(part[4].str()), std::string::npos) << name;
    EXPECT_GE(kernel.m_from, 1) << name;
  }
}

TEST(Registry, ChoosesSupportedRowsForEveryFeatureSet) {
  for (WeightFormat weights : kWeightDTypes) {
    for (IsaSet isa = 0; isa < 2 * kIsaAmxBf16; ++isa) {
      const KernelSet set = select_kernels({weights, isa});
      ASSERT_FALSE(set.gemms.empty());
      ASSERT_EQ(set.gemms.front().m_from, 1);
      for (size_t i = 0; i < set.gemms.size(); ++i) {
        const GemmKernel& kernel = *set.gemms[i].kernel;
        EXPECT_EQ(kernel.isa & ~isa, 0u) << kernel.name << " on " << isa_name(isa);
        EXPECT_EQ(kernel.a_dtype, set.a_dtype) << kernel.name << " on " << isa_name(isa);
        EXPECT_EQ(kernel.weights, weights);
        const int previous = i > 0 ? set.gemms[i - 1].m_from : 0;
        EXPECT_GT(kernel.m_from, previous) << isa_name(isa);
        EXPECT_EQ(&set.for_rows(kernel.m_from), &kernel);
      }
      EXPECT_EQ(&set.for_rows(0), set.gemms.front().kernel);
      EXPECT_EQ(&set.for_rows(1 << 20), set.gemms.back().kernel);
      EXPECT_EQ(set.for_plain_rows(1 << 20).packing, nullptr);
    }
  }
}

TEST(Registry, PrefersTheHighestFeatures) {
  for (WeightFormat weights : kWeightDTypes) {
    for (const auto& [kernel, m_from] : select_kernels({weights, kIsaReference}).gemms) {
      EXPECT_EQ(kernel->isa, kIsaReference) << kernel->name;
    }
    const IsaSet avxvnni = kIsaAvx2 | kIsaAvxVnni;
    for (const auto& [kernel, m_from] : select_kernels({weights, avxvnni}).gemms) {
      EXPECT_EQ(kernel->isa, weights == WeightFormat::kBFloat16 ? kIsaAvx2 : avxvnni)
          << kernel->name;
    }
    for (const auto& [kernel, m_from] :
         select_kernels({weights, kIsaAvx2 | kIsaAvxVnni | kIsaAvx512}).gemms) {
      EXPECT_EQ(kernel->isa & kIsaAvx512, kIsaAvx512) << kernel->name;
    }
  }
  EXPECT_STREQ(select_kernels({DType::kInt8, kIsaReference}).rowwise->name, "rowwise_reference");
  EXPECT_STREQ(select_kernels({DType::kInt8, kIsaAvx2}).rowwise->name, "rowwise_avx2");
  EXPECT_STREQ(select_kernels({DType::kInt8, kIsaAvx2 | kIsaAvx512}).rowwise->name,
               "rowwise_avx512");
}

TEST(Registry, RefusesWeightsWithoutAKernel) {
  try {
    select_kernels({DType::kFloat16, kIsaReference});
    FAIL() << "fp16 weights have no kernel";
  } catch (const std::exception& error) {
    EXPECT_NE(std::string(error.what()).find("fp16"), std::string::npos) << error.what();
  }
}

TEST(Registry, ExplainsWhatItChose) {
  for (WeightFormat weights : kWeightDTypes) {
    const std::string text = explain_kernels({weights, cpu_features().chosen});
    EXPECT_NE(text.find(format_name(weights)), std::string::npos) << text;
    EXPECT_NE(text.find(cpu_features().tier), std::string::npos) << text;
    for (const auto& [kernel, m_from] : select_kernels({weights, cpu_features().chosen}).gemms) {
      EXPECT_NE(text.find(kernel->name), std::string::npos) << text;
    }
  }
}

// The rows of one method share their bits, so an expert's result does not depend on how many tokens
// it got.
TEST(Registry, TheRowsOfOneMethodGiveTheSameBits) {
  for (WeightFormat weights : kWeightDTypes) {
    KernelRequest request{weights, cpu_features().chosen};
    request.group_size = weights == WeightFormat::kInt4 ? 64 : 0;
    request.deterministic = true;
    const KernelSet set = select_kernels(request);
    const Problem p = make_problem(layout_of(weights, 64), 13, 576, 64, true, Fill::kRandom, 23);
    const std::vector<float> expected = run_gemm(*set.gemms[0].kernel, p);
    for (const auto& [kernel, m_from] : set.gemms) {
      const std::vector<float> c = run_gemm(*kernel, p);
      EXPECT_EQ(first_difference(c.data(), expected.data(), static_cast<int64_t>(c.size())), -1)
          << kernel->name;
    }
  }
}

}  // namespace
}  // namespace kt
