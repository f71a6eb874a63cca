// Every row of kernels.inc, the reference among them, against the formula of its contract on
// made-up values, and the rules of selection. Integer products must agree bit for bit; bf16 within
// bf16_gemm_tolerance of the exact sum and, for a given kernel, bit for bit for every number of
// rows. Rows the features in use do not support are skipped by name.
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

// Each kernel is tested in the run of its own tier: those of lower ones have runs of their own.
bool belongs_here(IsaSet isa) {
  return is_supported(isa) && isa_tier(isa) == isa_tier(cpu_features().chosen);
}

class GemmTest : public testing::TestWithParam<GemmKernel> {
 protected:
  void SetUp() override {
    if (!belongs_here(GetParam().isa)) {
      GTEST_SKIP() << GetParam().name << " needs " << isa_name(GetParam().isa)
                   << "; in use: " << isa_name(cpu_features().chosen);
    }
  }
  static std::vector<Grouping> groupings() { return groupings_of(GetParam()); }
};
class IntegerGemmTest : public GemmTest {};
class Bf16GemmTest : public GemmTest {};
class Fp8GemmTest : public GemmTest {};

TEST_P(GemmTest, AgreesWithTheReferenceForAllShapes) { expect_correct_for_all_shapes(GetParam()); }

TEST_P(GemmTest, GivesARowTheSameBitsAmongAnyRows) {
  for (const auto& [group_size, row_scales] : groupings()) {
    const Problem all = make_problem(layout_of(GetParam().weights, group_size), 64, 576, 64, false,
                                     Fill::kRandom, 7, row_scales);
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
  for (const auto& [group_size, row_scales] : groupings()) {
    for (Fill fill : {Fill::kLargest, Fill::kSmallest, Fill::kAlternating}) {
      // one sum over the whole row is what may overflow; a group's is as long as the group
      const int k = group_size == 0 && fill != Fill::kAlternating ? kMaxIntegerK : 1024;
      // one row is a loop of its own in most kernels
      for (const int m : {1, 7}) {
        SCOPED_TRACE(testing::Message() << "m " << m << " fill " << static_cast<int>(fill)
                                        << " group " << group_size << " k " << k);
        Problem p = make_problem(layout_of(GetParam().weights, group_size), m, k, 64, false, fill,
                                 3, row_scales);
        expect_correct(GetParam(), p);
        negate_odd_rows(&p);
        expect_correct(GetParam(), p);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(IntegerGemmTest, KeepsZeroNanAndSubnormalScales) {
  for (const Grouping& grouping : groupings()) {
    const Problem p = make_special_scales_problem(GetParam().weights, grouping);
    expect_correct(GetParam(), p);
    const std::vector<float> c = run_gemm(GetParam(), p);
    for (int j = 0; j < kColumns; ++j) {
      ASSERT_EQ(c[j], 0.0f);
      ASSERT_TRUE(std::isnan(c[kStride + j]));
    }
  }
}

TEST_P(Bf16GemmTest, KeepsInfinityAndNanInTheirRow) {
  Problem p = make_problem(layout_of(GetParam().weights, 0), 7, 128, 64, false, Fill::kRandom, 11);
  const std::vector<float> before = run_gemm(GetParam(), p);
  p.a_bf16[2 * p.k + 5] = 0x7f80;   // infinity
  p.a_bf16[5 * p.k + 77] = 0x7fc0;  // NaN
  const std::vector<float> c = run_gemm(GetParam(), p);
  for (int i = 0; i < p.m; ++i) {
    for (int j = 0; j < kColumns; ++j) {
      const float value = c[i * kStride + j];
      if (i == 2) {
        // fp8 has weights of zero
        ASSERT_TRUE(has_groups(p.layout.format) ? !std::isfinite(value) : std::isinf(value));
      } else if (i == 5) {
        ASSERT_TRUE(std::isnan(value));
      } else {
        ASSERT_TRUE(same_float(value, before[i * kStride + j])) << "row " << i << " column " << j;
      }
    }
  }
}

TEST_P(Bf16GemmTest, TakesSubnormalBf16WithinTheTolerance) {
  Problem p = make_problem(layout_of(GetParam().weights, 0), 3, 192, 64, true, Fill::kRandom, 13);
  for (size_t i = 0; i < p.a_bf16.size(); i += 3) p.a_bf16[i] &= 0x807f;
  expect_correct(GetParam(), p);
}

// `code(column, k)` of fp8 in every group, under one scale.
template <typename Code>
Problem make_fp8_problem(PackedLayout layout, int m, int k, float scale, Code&& code) {
  Problem p = make_problem(layout, m, k, kColumns, false, Fill::kRandom, 31);
  CodedPanel panel;
  panel.reset(layout, k);
  for (int column = 0; column < kColumns; ++column) {
    for (int at = 0; at < k; ++at) panel.row(column)[at] = code(column, at);
  }
  std::fill(panel.scale.begin(), panel.scale.end(), scale);
  pack_panel(panel, p.panel.data());
  return p;
}

// A one among zeros takes each weight out by itself.
TEST_P(Fp8GemmTest, DecodesEveryCode) {
  constexpr int k = 256;
  constexpr float kScale = 0.125f;
  const auto code = [](int column, int at) {
    const int index = (at + 5 * column) % 254;  // every code in each column
    return static_cast<uint8_t>(index < 127 ? index : index + 1);
  };
  for (const int group_size : {32, 0}) {
    for (const int m : {1, 2}) {
      Problem p = make_fp8_problem(layout_of(GetParam().weights, group_size), m, k, kScale, code);
      for (int at = 0; at < k; at += m) {
        std::fill(p.a_bf16.begin(), p.a_bf16.end(), uint16_t{0});
        for (int i = 0; i < m; ++i) p.a_bf16[i * k + at + i] = float_to_bf16(1.0f);
        const std::vector<float> c = run_gemm(GetParam(), p);
        for (int i = 0; i < m * kColumns; ++i) {
          const int column = i % kColumns, row = i / kColumns;
          ASSERT_EQ(c[row * kStride + column], kScale * fp8_to_float(code(column, at + row)))
              << "code " << int{code(column, at + row)} << " at column " << column << ", k "
              << at + row << " of " << m << " rows";
        }
      }
    }
  }
}

// The first and the last of e8m0, with activations that bring the sums back among numbers.
TEST_P(Fp8GemmTest, TakesTheLargestAndTheSmallestScales) {
  const auto code = [](int column, int at) {
    return static_cast<uint8_t>((at * 37 + column * 11) & 0xbf);  // below 2
  };
  for (const float scale : {0x1p127f, 0x1p-127f}) {
    for (const int m : {1, 7}) {
      Problem p = make_fp8_problem(layout_of(GetParam().weights, 32), m, 192, scale, code);
      const float factor = scale > 1 ? 0x1p-30f : 0x1p30f;
      for (uint16_t& a : p.a_bf16) a = float_to_bf16(bf16_to_float(a) * factor);
      const std::vector<float> c = run_gemm(GetParam(), p);
      for (int i = 0; i < m * kColumns; ++i) {
        double exact = 0, magnitude = 0;
        for (int k = 0; k < p.k; ++k) {
          const double w = double{fp8_to_float(code(i % kColumns, k))} * scale;
          const double product = w * bf16_to_float(p.a_bf16[i / kColumns * p.k + k]);
          exact += product;
          magnitude += std::fabs(product);
        }
        const float found = c[i / kColumns * kStride + i % kColumns];
        if (scale < 1 && GetParam().expand != nullptr) {
          // as bf16 the smallest weights are subnormal, which products may take as zero
          ASSERT_LE(std::fabs(found), 2 * magnitude);
          continue;
        }
        const int roundings = p.k + p.num_groups + 2;
        ASSERT_NEAR(found, exact,
                    GetParam().expand == nullptr
                        ? 1.001 * roundings * 0x1p-24 * magnitude
                        : bf16_gemm_tolerance(roundings, magnitude, 8 * factor))
            << "scale " << scale << " row " << i / kColumns << " column " << i % kColumns;
      }
    }
  }
}

std::vector<GemmKernel> rows_of_fp8() {
  std::vector<GemmKernel> rows;
  for (const GemmKernel& kernel : list_gemm_kernels()) {
    if (format_info(kernel.weights).code == DType::kFp8) rows.push_back(kernel);
  }
  return rows;
}

std::vector<GemmKernel> rows_with_bf16_weights(bool is_bf16) {
  std::vector<GemmKernel> rows;
  for (const GemmKernel& kernel : list_gemm_kernels()) {
    if (takes_bf16_rows(kernel.weights) == is_bf16) rows.push_back(kernel);
  }
  return rows;
}

std::string row_name(const testing::TestParamInfo<GemmKernel>& test) { return test.param.name; }

INSTANTIATE_TEST_SUITE_P(Rows, GemmTest, testing::ValuesIn(list_gemm_kernels()), row_name);
INSTANTIATE_TEST_SUITE_P(Rows, IntegerGemmTest, testing::ValuesIn(rows_with_bf16_weights(false)),
                         row_name);
INSTANTIATE_TEST_SUITE_P(Rows, Bf16GemmTest, testing::ValuesIn(rows_with_bf16_weights(true)),
                         row_name);
INSTANTIATE_TEST_SUITE_P(Rows, Fp8GemmTest, testing::ValuesIn(rows_of_fp8()), row_name);

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

// Codes, scales and what else the format has, or its values as bf16, as kernel.h has them.
LineVector<uint8_t> expanded_bytes_of(const Problem& p, bool to_bf16) {
  const PanelValues& v = p.values;
  const int64_t codes = int64_t{kColumns} * p.k * (to_bf16 ? 2 : 1);
  LineVector<uint8_t> bytes(codes);
  for (int64_t i = 0; i < int64_t{kColumns} * p.k; ++i) {
    const int64_t column = i / p.k, k = i % p.k;
    if (to_bf16) {
      std::memcpy(bytes.data() + k / 2 * 256 + column * 4 + k % 2 * 2, &p.w_bf16[i], 2);
    } else {
      bytes[k / 4 * 256 + column * 4 + k % 4] = v.codes[i];
    }
  }
  if (to_bf16) return bytes;
  const auto append = [&](const auto& table) {
    const auto* const raw = reinterpret_cast<const uint8_t*>(table.data());
    bytes.insert(bytes.end(), raw, raw + table.size() * 4);
  };
  append(v.scale);
  if (v.info().scales == ScaleForm::kFp16Zero) append(v.zero);
  append(v.minimum);
  append(v.column);
  return bytes;
}

// Conversions of AVX-512 make subnormal bf16 zero.
void flush_subnormal_bf16(LineVector<uint8_t>& bytes) {
  for (size_t i = 0; i < bytes.size(); i += 2) {
    if ((bytes[i + 1] & 0x7f) == 0 && bytes[i] < 0x80) bytes[i] = 0;
  }
}

TEST_P(ExpandTest, WritesTheBytesOfTheContract) {
  const ExpandKernel& row = GetParam();
  if (!belongs_here(row.isa)) GTEST_SKIP() << row.name << " needs " << isa_name(row.isa);
  for (const GemmKernel& kernel : list_gemm_kernels()) {
    if (kernel.expand != row.expand) continue;
    const bool to_bf16 = kernel.multiplied() == DType::kBFloat16;
    for (const auto& [group_size, row_scales] : groupings_of(kernel)) {
      if (!row_scales) continue;
      for (int k : kDepths) {
        const Problem p =
            make_problem(layout_of(kernel.weights, group_size), 1, k, 64, false, Fill::kRandom, 17);
        LineVector<uint8_t> expected = expanded_bytes_of(p, to_bf16);
        const size_t size = expected.size();
        expected.resize(size + 64, 0xab);
        LineVector<uint8_t> scratch(size + 64, 0xab);
        row.expand(p.panel.data(), k, p.group_size, scratch.data());
        if (to_bf16) {
          flush_subnormal_bf16(scratch);
          flush_subnormal_bf16(expected);
        }
        ASSERT_EQ(scratch, expected) << kernel.name << " k " << k << " group " << group_size;
      }
    }
    return;
  }
  FAIL() << row.name << " is the expand row of no kernel";
}

INSTANTIATE_TEST_SUITE_P(Rows, ExpandTest, testing::ValuesIn(kExpandKernels),
                         [](const auto& test) { return std::string(test.param.name); });

// What the other tests take for granted: the bytes of made-up panels, written here, stand for the
// values that the packer's own reader finds in them.
TEST(MadeUpPanels, AreReadBackByTheFormat) {
  for (const WeightFormatInfo& info : list_weight_formats()) {
    if (!has_groups(info.format)) continue;
    for (const int group_size : group_sizes_of(info.format)) {
      const int k = 576;
      RandomNumbers random(group_size + 1);
      const PackedLayout layout = layout_of(info.format, group_size);
      const PanelValues values = make_panel_values(layout, k, 60, Fill::kRandom, random);
      ASSERT_EQ(static_cast<int64_t>(values.bytes.size()), layout.panel_bytes(k)) << layout.name();
      std::vector<float> weights(size_t{kColumns} * k);
      dequantize_panel(layout, k, values.bytes.data(), weights.data());
      for (int at = 0; at < kColumns * k; ++at) {
        const auto wanted = static_cast<float>(values.value(at % k, at / k));
        // a sum or a product of scales may round twice
        ASSERT_NEAR(weights[at], wanted, std::fabs(wanted) * 0x1p-22f)
            << layout.name() << " column " << at / k << " k " << at % k;
      }
    }
  }
}

// ---- selection ----

std::vector<WeightFormat> all_formats() {
  std::vector<WeightFormat> formats;
  for (const WeightFormatInfo& info : list_weight_formats()) formats.push_back(info.format);
  return formats;
}

TEST(Registry, NamesSayWhatTheRowsAre) {
  std::string formats;
  for (const WeightFormatInfo& info : list_weight_formats())
    formats.append(formats.empty() ? "" : "|").append(info.name);
  const std::regex grammar("gemm_(s8|u8|bf16)_(" + formats +
                           ")([xb]?)_fp32_([0-9]+)x[0-9]+x[0-9]+_([a-z0-9]+)");
  const std::string features = isa_name(~IsaSet{0}) + " reference";
  std::set<std::string> names;
  for (const GemmKernel& kernel : list_gemm_kernels()) {
    std::smatch part;
    const std::string name = kernel.name;
    ASSERT_TRUE(std::regex_match(name, part, grammar)) << name;
    EXPECT_TRUE(names.insert(name).second) << name << " is there twice";
    EXPECT_EQ(part[1] == "bf16", kernel.a_dtype == DType::kBFloat16) << name;
    EXPECT_EQ(part[1] == "u8", kernel.a_dtype == DType::kUint8) << name;
    EXPECT_EQ(part[2], format_name(kernel.weights)) << name;
    EXPECT_EQ(part[3] != "", kernel.expand != nullptr) << name;
    EXPECT_EQ(part[5].str().starts_with("amx"), kernel.packing != nullptr) << name;
    EXPECT_EQ(std::stoi(part[4]), kernel.mr) << name;
    EXPECT_NE(features.find(part[5].str()), std::string::npos) << name;
    EXPECT_GE(kernel.m_from, 1) << name;
  }
}

TEST(Registry, ChoosesSupportedRowsForEveryFeatureSet) {
  for (WeightFormat weights : all_formats()) {
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

bool has_row(WeightFormat weights, IsaSet isa) {
  for (const GemmKernel& kernel : list_gemm_kernels()) {
    if (kernel.weights == weights && kernel.isa == isa) return true;
  }
  return false;
}

TEST(Registry, PrefersTheHighestFeatures) {
  constexpr IsaSet kVnni = kIsaAvx2 | kIsaAvxVnni, kAvx512 = kIsaAvx2 | kIsaAvx512;
  for (WeightFormat weights : all_formats()) {
    for (const auto& [kernel, m_from] : select_kernels({weights, kIsaReference}).gemms) {
      EXPECT_EQ(kernel->isa, kIsaReference) << kernel->name;
    }
    for (const auto& [kernel, m_from] : select_kernels({weights, kVnni}).gemms) {
      EXPECT_EQ(kernel->isa, has_row(weights, kVnni) ? kVnni : kIsaAvx2) << kernel->name;
    }
    if (!has_row(weights, kAvx512)) continue;
    for (const auto& [kernel, m_from] :
         select_kernels({weights, kIsaAvx2 | kIsaAvxVnni | kIsaAvx512}).gemms) {
      EXPECT_EQ(kernel->isa & kIsaAvx512, kIsaAvx512) << kernel->name;
    }
  }
  using F = WeightFormat;
  for (const F weights : {F::kInt8, F::kInt4}) EXPECT_TRUE(has_row(weights, kVnni));
  EXPECT_STREQ(select_kernels({F::kInt8, kIsaReference}).rowwise->name, "rowwise_reference");
  EXPECT_STREQ(select_kernels({F::kInt8, kIsaAvx2}).rowwise->name, "rowwise_avx2");
  EXPECT_STREQ(select_kernels({F::kInt8, kAvx512}).rowwise->name, "rowwise_avx512");
}

TEST(Registry, ExplainsWhatItChose) {
  for (WeightFormat weights : all_formats()) {
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
  for (WeightFormat weights : all_formats()) {
    for (const int group_size : group_sizes_of(weights)) {
      for (const bool row_scales : {true, false}) {
        KernelRequest request{weights, cpu_features().chosen};
        request.group_size = group_size;
        request.row_scales = row_scales;
        request.deterministic = true;
        const KernelSet set = select_kernels(request);
        const Problem p = make_problem(layout_of(weights, group_size), 13, 576, 64, true,
                                       Fill::kRandom, 23, row_scales || takes_bf16_rows(weights));
        const std::vector<float> expected = run_gemm(*set.gemms[0].kernel, p);
        for (const auto& [kernel, m_from] : set.gemms) {
          const std::vector<float> c = run_gemm(*kernel, p);
          EXPECT_EQ(first_difference(c.data(), expected.data(), static_cast<int64_t>(c.size())), -1)
              << kernel->name << " group " << group_size;
        }
      }
    }
  }
}

}  // namespace
}  // namespace kt
