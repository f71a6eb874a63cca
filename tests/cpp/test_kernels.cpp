// Every row of kernels.inc against the reference row of the same contract, and the rules of
// selection. Integer products must agree bit for bit; bf16 within bf16_gemm_tolerance of the exact
// sum and, for a given kernel, bit for bit for every number of rows. Rows the features in use do
// not support are skipped by name.
#include <gtest/gtest.h>

#include <algorithm>
#include <regex>
#include <set>
#include <string>
#include <vector>

#include "base/cpu_features.h"
#include "format/packed_layout.h"
#include "format/quantize.h"
#include "kernels/registry.h"
#include "random_tensors.h"

namespace kt {

#define KT_EXPAND(symbol, isa) \
  void symbol(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch);
#define KT_GEMM(symbol, isa, weight, activation, mr, m_from, expand) \
  void symbol(const GemmArgs& args);
#include "kernels/kernels.inc"

namespace {

constexpr int kColumns = kPanelColumns;
constexpr int kStride = kColumns + 8;  // of c: the 8 columns behind each row must stay as they are
constexpr float kUntouched = 12345.0f;

const int kRowCounts[] = {0, 1, 2, 3, 5, 6, 7, 8, 13, 64};
const int kDepths[] = {64, 128, 192, 576, 1024};

bool is_supported(IsaSet isa) { return (isa & ~cpu_features().chosen) == 0; }

enum class Fill { kRandom, kLargest, kSmallest, kAlternating };

// One panel with activations, in every form a kernel may ask for.
struct Problem {
  PackedLayout layout;
  int m = 0;
  int k = 0;
  int num_rows = 0;  // of a; at least m
  int group_size = 0;
  int num_groups = 0;
  LineVector<uint8_t> panel;
  LineVector<uint8_t> a_int8;
  LineVector<uint8_t> a_uint8;
  LineVector<uint16_t> a_bf16;
  std::vector<uint16_t> w_bf16;
  std::vector<float> a_scale;
  std::vector<int32_t> group_sum;
  std::vector<int32_t> row_idx;  // empty: rows in order

  int64_t row(int i) const { return row_idx.empty() ? i : row_idx[i]; }
};

int code(Fill fill, RandomNumbers& random, int low, int high, int position) {
  switch (fill) {
    case Fill::kRandom: return random.integer(low, high);
    case Fill::kLargest: return high;
    case Fill::kSmallest: return low;
    case Fill::kAlternating: return position % 2 == 0 ? low : high;
  }
  return 0;
}

void make_activations(Problem* problem, Fill fill, bool gather, RandomNumbers& random) {
  Problem& p = *problem;
  p.num_rows = std::max(1, gather ? p.m + 5 : p.m);
  const int64_t count = int64_t{p.num_rows} * p.k;
  p.a_int8.resize(count);
  p.a_uint8.resize(count);
  p.a_bf16.resize(count);
  p.group_sum.assign(int64_t{p.num_rows} * p.num_groups, 0);
  for (int64_t i = 0; i < count; ++i) {
    const int value = code(fill, random, -127, 127, static_cast<int>(i % p.k / 2));
    p.a_int8[i] = static_cast<uint8_t>(value);
    p.a_uint8[i] = static_cast<uint8_t>(value + 128);
    p.a_bf16[i] = float_to_bf16(random.normal());
    p.group_sum[i / p.k * p.num_groups + i % p.k / p.group_size] += value;
  }
  for (int i = 0; i < p.num_rows; ++i)
    p.a_scale.push_back(0.001f + 0.01f * std::fabs(random.normal()));
  if (gather) {
    for (int i = 0; i < p.m; ++i) p.row_idx.push_back(random.integer(0, p.num_rows - 1));
  }
}

// A panel whose last 64 - n columns are padding.
void make_panel(Problem* problem, Fill fill, int n, RandomNumbers& random) {
  Problem& p = *problem;
  p.panel.resize(p.layout.panel_bytes(p.k));
  if (p.layout.code == DType::kBFloat16) {
    p.w_bf16.assign(int64_t{kColumns} * p.k, 0);
    for (int64_t i = 0; i < int64_t{n} * p.k; ++i) p.w_bf16[i] = float_to_bf16(random.normal());
    pack_panel(p.layout, p.k, p.w_bf16.data(), nullptr, p.panel.data());
    return;
  }
  const int low = p.layout.code == DType::kInt4 ? -8 : -127;
  const int high = p.layout.code == DType::kInt4 ? 7 : 127;
  std::vector<int8_t> codes(int64_t{kColumns} * p.k, 0);
  std::vector<float> scales(int64_t{kColumns} * p.num_groups, 0.0f);
  for (int64_t i = 0; i < int64_t{n} * p.k; ++i) {
    codes[i] = static_cast<int8_t>(code(fill, random, low, high, static_cast<int>(i % p.k)));
  }
  for (int64_t i = 0; i < int64_t{n} * p.num_groups; ++i) {
    // int4 scales are stored as bf16 and may be negative.
    scales[i] = bf16_to_float(float_to_bf16(0.01f * random.normal()));
  }
  pack_panel(p.layout, p.k, codes.data(), scales.data(), p.panel.data());
}

PackedLayout layout_of(DType weight_dtype, int group_size) {
  return {weight_dtype, weight_dtype == DType::kInt4 ? group_size : 0, 0};
}

Problem make_problem(PackedLayout layout, int m, int k, int n, bool gather, Fill fill,
                     uint64_t seed) {
  RandomNumbers random(seed);
  Problem p;
  p.layout = layout;
  p.m = m;
  p.k = k;
  p.group_size = std::min<int>(layout.effective_group_size(k), k);
  p.num_groups = layout.num_groups(k);
  make_activations(&p, fill, gather, random);
  make_panel(&p, fill, n, random);
  return p;
}

// c [m, kStride] of one kernel; the kernel's own ExpandFn is applied first if it has one.
std::vector<float> run_gemm(GemmFn gemm, ExpandFn expand, DType a_dtype, const Problem& p) {
  LineVector<uint8_t> scratch;
  const uint8_t* panel = p.panel.data();
  if (expand != nullptr) {
    scratch.resize(int64_t{p.k} * kColumns + int64_t{p.num_groups} * kColumns * 4);
    expand(panel, p.k, p.group_size, scratch.data());
    panel = scratch.data();
  }
  std::vector<float> c(int64_t{std::max(p.m, 1)} * kStride, kUntouched);
  const bool is_bf16 = a_dtype == DType::kBFloat16;
  GemmArgs args = {};
  args.a = is_bf16                    ? static_cast<const void*>(p.a_bf16.data())
           : a_dtype == DType::kUint8 ? static_cast<const void*>(p.a_uint8.data())
                                      : static_cast<const void*>(p.a_int8.data());
  args.a_stride_bytes = int64_t{p.k} * (is_bf16 ? 2 : 1);
  args.row_idx = p.row_idx.empty() ? nullptr : p.row_idx.data();
  args.a_scale = is_bf16 ? nullptr : p.a_scale.data();
  args.a_group_sum = p.layout.code == DType::kInt4 ? p.group_sum.data() : nullptr;
  args.a_group_sum_stride = p.num_groups;
  args.panel = panel;
  args.next_panel = p.k % 128 == 0 ? p.panel.data() : nullptr;
  args.c = c.data();
  args.c_stride = kStride;
  args.m = p.m;
  args.k = p.k;
  args.group_size = p.layout.code == DType::kInt4 ? p.group_size : 0;
  gemm(args);
  return c;
}

void expect_only_c_written(const std::vector<float>& c, int m) {
  for (size_t i = 0; i < c.size(); ++i) {
    if (static_cast<int>(i / kStride) < m && i % kStride < kColumns) continue;
    ASSERT_EQ(c[i], kUntouched) << "float " << i << " is outside c [" << m << ", 64]";
  }
}

std::vector<float> reference_result(const Problem& p) {
  return p.layout.code == DType::kInt8
             ? run_gemm(gemm_s8_int8_fp32_1x64x4_reference, nullptr, DType::kInt8, p)
             : run_gemm(gemm_s8_int4_fp32_1x64x8_reference, nullptr, DType::kInt8, p);
}

void expect_matches_bf16(const Problem& p, const std::vector<float>& c) {
  for (int i = 0; i < p.m; ++i) {
    for (int j = 0; j < kColumns; ++j) {
      double exact = 0, magnitude = 0, largest = 0;
      for (int k = 0; k < p.k; ++k) {
        const double a = bf16_to_float(p.a_bf16[p.row(i) * p.k + k]);
        const double w = bf16_to_float(p.w_bf16[int64_t{j} * p.k + k]);
        exact += a * w;
        magnitude += std::fabs(a * w);
        largest = std::max({largest, std::fabs(a), std::fabs(w)});
      }
      ASSERT_NEAR(c[i * kStride + j], exact, bf16_gemm_tolerance(p.k, magnitude, largest))
          << "row " << i << " column " << j;
    }
  }
}

void expect_correct(const GemmKernel& kernel, const Problem& p) {
  const std::vector<float> c = run_gemm(kernel.gemm, kernel.expand, kernel.a_dtype, p);
  expect_only_c_written(c, p.m);
  if (p.layout.code == DType::kBFloat16) {
    expect_matches_bf16(p, c);
    return;
  }
  const std::vector<float> expected = reference_result(p);
  const int64_t at = first_difference(c.data(), expected.data(), static_cast<int64_t>(c.size()));
  ASSERT_EQ(at, -1) << "row " << at / kStride << " column " << at % kStride << " is " << c[at]
                    << ", the reference gives " << expected[at];
}

class GemmTest : public testing::TestWithParam<GemmKernel> {
 protected:
  void SetUp() override {
    if (!is_supported(GetParam().isa)) {
      GTEST_SKIP() << GetParam().name << " needs " << isa_name(GetParam().isa)
                   << "; in use: " << isa_name(cpu_features().chosen);
    }
  }
  // The group sizes that make a difference to the kernel; 0 is the whole row.
  std::vector<int> group_sizes() const {
    if (GetParam().weight_dtype != DType::kInt4) return {0};
    return {32, 64, 96, 128, 0};
  }
};
class IntegerGemmTest : public GemmTest {};
class Bf16GemmTest : public GemmTest {};

TEST_P(GemmTest, AgreesWithTheReferenceForAllShapes) {
  uint64_t seed = 1;
  for (int group_size : group_sizes()) {
    for (int k : kDepths) {
      for (int m : kRowCounts) {
        const bool gather = (++seed % 2) == 0;
        const int n = seed % 3 == 0 ? 64 : 64 - static_cast<int>(seed % 61);
        SCOPED_TRACE(testing::Message() << "m " << m << " k " << k << " n " << n << " group "
                                        << group_size << (gather ? " gathered" : ""));
        expect_correct(GetParam(), make_problem(layout_of(GetParam().weight_dtype, group_size), m,
                                                k, n, gather, Fill::kRandom, seed));
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(GemmTest, GivesARowTheSameBitsAmongAnyRows) {
  for (int group_size : group_sizes()) {
    const Problem all = make_problem(layout_of(GetParam().weight_dtype, group_size), 64, 576, 64,
                                     false, Fill::kRandom, 7);
    const std::vector<float> expected =
        run_gemm(GetParam().gemm, GetParam().expand, GetParam().a_dtype, all);
    for (int m : kRowCounts) {
      Problem some = all;
      some.m = m;
      for (int i = 0; i < m; ++i) some.row_idx.push_back((i * 37 + m) % 64);
      const std::vector<float> c =
          run_gemm(GetParam().gemm, GetParam().expand, GetParam().a_dtype, some);
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
      Problem p =
          make_problem(layout_of(GetParam().weight_dtype, group_size), 7, k, 64, false, fill, 3);
      expect_correct(GetParam(), p);
      // The opposite sign in every other row.
      for (int64_t i = 0; i < int64_t{p.num_rows} * p.k; ++i) {
        if (i / p.k % 2 == 0) continue;
        const int value = -static_cast<int8_t>(p.a_int8[i]);
        p.a_int8[i] = static_cast<uint8_t>(value);
        p.a_uint8[i] = static_cast<uint8_t>(value + 128);
      }
      for (int row = 1; row < p.num_rows; row += 2) {
        for (int g = 0; g < p.num_groups; ++g) p.group_sum[row * p.num_groups + g] *= -1;
      }
      expect_correct(GetParam(), p);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(IntegerGemmTest, KeepsZeroNanAndSubnormalScales) {
  for (int group_size : group_sizes()) {
    Problem p = make_problem(layout_of(GetParam().weight_dtype, group_size), 7, 192, 50, false,
                             Fill::kRandom, 5);
    const float scales[] = {
        0.0f, std::numeric_limits<float>::quiet_NaN(), 0x1p-140f, 0x1p-120f, 1.0f, 0x1p100f, 3.0f};
    std::copy(std::begin(scales), std::end(scales), p.a_scale.begin());
    // A row of scale zero or NaN has codes of zero, as quantize writes them.
    for (int i = 0; i < 2; ++i) {
      std::fill_n(p.a_int8.begin() + i * p.k, p.k, uint8_t{0});
      std::fill_n(p.a_uint8.begin() + i * p.k, p.k, uint8_t{128});
      std::fill_n(p.group_sum.begin() + i * p.num_groups, p.num_groups, 0);
    }
    expect_correct(GetParam(), p);
    const std::vector<float> c =
        run_gemm(GetParam().gemm, GetParam().expand, GetParam().a_dtype, p);
    for (int j = 0; j < kColumns; ++j) {
      ASSERT_EQ(c[j], 0.0f);
      ASSERT_TRUE(std::isnan(c[kStride + j]));
    }
  }
}

TEST_P(Bf16GemmTest, KeepsInfinityAndNanInTheirRow) {
  Problem p = make_problem(layout_of(DType::kBFloat16, 0), 7, 128, 64, false, Fill::kRandom, 11);
  const std::vector<float> before = run_gemm(GetParam().gemm, nullptr, GetParam().a_dtype, p);
  p.a_bf16[2 * p.k + 5] = 0x7f80;   // infinity
  p.a_bf16[5 * p.k + 77] = 0x7fc0;  // NaN
  const std::vector<float> c = run_gemm(GetParam().gemm, nullptr, GetParam().a_dtype, p);
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
    if ((kernel.weight_dtype == DType::kBFloat16) == is_bf16) rows.push_back(kernel);
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
  for (int group_size : {32, 64, 96, 128, 0}) {
    for (int k : kDepths) {
      const Problem p =
          make_problem({DType::kInt4, group_size, 0}, 1, k, 64, false, Fill::kRandom, 17);
      const size_t size = size_t{kColumns} * (p.k + 4 * p.num_groups);
      LineVector<uint8_t> expected(size + 64, 0xab), scratch(size + 64, 0xab);
      expand_int4_reference(p.panel.data(), k, p.group_size, expected.data());
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
      "gemm_(s8|u8|bf16)_(int8|int4|int4x|bf16)_fp32_([0-9]+)x[0-9]+x[0-9]+_([a-z0-9]+)");
  const std::string features = isa_name(~IsaSet{0}) + " reference";
  std::set<std::string> names;
  for (const GemmKernel& kernel : list_gemm_kernels()) {
    std::smatch part;
    const std::string name = kernel.name;
    ASSERT_TRUE(std::regex_match(name, part, grammar)) << name;
    EXPECT_TRUE(names.insert(name).second) << name << " is there twice";
    EXPECT_EQ(part[1] == "bf16", kernel.a_dtype == DType::kBFloat16) << name;
    EXPECT_EQ(part[1] == "u8", kernel.a_dtype == DType::kUint8) << name;
    EXPECT_EQ(part[2].str().substr(0, 4), std::string(dtype_name(kernel.weight_dtype)).substr(0, 4))
        << name;
    EXPECT_EQ(part[2] == "int4x", kernel.expand != nullptr) << name;
    EXPECT_EQ(std::stoi(part[3]), kernel.mr) << name;
    EXPECT_NE(features.find(part[4].str()), std::string::npos) << name;
    EXPECT_GE(kernel.m_from, 1) << name;
  }
}

TEST(Registry, ChoosesSupportedRowsForEveryFeatureSet) {
  for (DType weight_dtype : kWeightDTypes) {
    for (IsaSet isa = 0; isa < 2 * kIsaAmxBf16; ++isa) {
      const KernelSet set = select_kernels(weight_dtype, isa);
      ASSERT_FALSE(set.gemms.empty());
      ASSERT_EQ(set.gemms.front()->m_from, 1);
      for (size_t i = 0; i < set.gemms.size(); ++i) {
        const GemmKernel& kernel = *set.gemms[i];
        EXPECT_EQ(kernel.isa & ~isa, 0u) << kernel.name << " on " << isa_name(isa);
        EXPECT_EQ(kernel.a_dtype, set.a_dtype) << kernel.name << " on " << isa_name(isa);
        EXPECT_EQ(kernel.weight_dtype, weight_dtype);
        const int previous = i > 0 ? set.gemms[i - 1]->m_from : 0;
        EXPECT_GT(kernel.m_from, previous) << isa_name(isa);
        EXPECT_EQ(&set.for_rows(kernel.m_from), &kernel);
      }
      EXPECT_EQ(&set.for_rows(0), set.gemms.front());
      EXPECT_EQ(&set.for_rows(1 << 20), set.gemms.back());
    }
  }
}

TEST(Registry, PrefersTheHighestFeatures) {
  for (DType weight_dtype : kWeightDTypes) {
    for (const GemmKernel* kernel : select_kernels(weight_dtype, kIsaReference).gemms) {
      EXPECT_EQ(kernel->isa, kIsaReference) << kernel->name;
    }
    for (const GemmKernel* kernel : select_kernels(weight_dtype, kIsaAvx2 | kIsaAvxVnni).gemms) {
      EXPECT_EQ(kernel->isa & kIsaAvx2, kIsaAvx2) << kernel->name;
    }
    for (const GemmKernel* kernel :
         select_kernels(weight_dtype, kIsaAvx2 | kIsaAvxVnni | kIsaAvx512).gemms) {
      EXPECT_EQ(kernel->isa & kIsaAvx512, kIsaAvx512) << kernel->name;
    }
  }
  EXPECT_STREQ(select_kernels(DType::kInt8, kIsaReference).rowwise->name, "rowwise_reference");
  EXPECT_STREQ(select_kernels(DType::kInt8, kIsaAvx2).rowwise->name, "rowwise_avx2");
  EXPECT_STREQ(select_kernels(DType::kInt8, kIsaAvx2 | kIsaAvx512).rowwise->name, "rowwise_avx512");
}

TEST(Registry, RefusesWeightsWithoutAKernel) {
  try {
    select_kernels(DType::kFloat16, kIsaReference);
    FAIL() << "fp16 weights have no kernel";
  } catch (const std::exception& error) {
    EXPECT_NE(std::string(error.what()).find("fp16"), std::string::npos) << error.what();
  }
}

TEST(Registry, ExplainsWhatItChose) {
  for (DType weight_dtype : kWeightDTypes) {
    const std::string text = explain_kernels(weight_dtype, cpu_features().chosen);
    EXPECT_NE(text.find(dtype_name(weight_dtype)), std::string::npos) << text;
    EXPECT_NE(text.find(cpu_features().tier), std::string::npos) << text;
    for (const GemmKernel* kernel : select_kernels(weight_dtype, cpu_features().chosen).gemms) {
      EXPECT_NE(text.find(kernel->name), std::string::npos) << text;
    }
  }
}

// The rows of one method share their bits, so an expert's result does not depend on how many tokens
// it got.
TEST(Registry, TheRowsOfOneMethodGiveTheSameBits) {
  for (DType weight_dtype : kWeightDTypes) {
    const KernelSet set = select_kernels(weight_dtype, cpu_features().chosen);
    const Problem p =
        make_problem(layout_of(weight_dtype, 64), 13, 576, 64, true, Fill::kRandom, 23);
    const std::vector<float> expected =
        run_gemm(set.gemms[0]->gemm, set.gemms[0]->expand, set.a_dtype, p);
    for (const GemmKernel* kernel : set.gemms) {
      const std::vector<float> c = run_gemm(kernel->gemm, kernel->expand, set.a_dtype, p);
      EXPECT_EQ(first_difference(c.data(), expected.data(), static_cast<int64_t>(c.size())), -1)
          << kernel->name;
    }
  }
}

}  // namespace
}  // namespace kt
