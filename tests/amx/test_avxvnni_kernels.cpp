// The AVX-VNNI rows of kernels.inc against the reference rows, whatever cpu_features() says of this
// host: where it cannot execute VEX vpdpbusd, the interpreter does.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "amx/interpreter.h"
#include "base/cpu_features.h"
#include "cpp/gemm_problem.h"

namespace kt {

uint64_t peak_probe_int8_avxvnni(int64_t iterations);

namespace {

bool has_avx2() { return (cpu_features().found & kIsaAvx2) != 0; }

// Whether instructions of the product go through the interpreter, which counts them.
bool is_counted() {
  return kt_amx_is_emulating() != 0 && (cpu_features().found & kIsaAvxVnni) == 0;
}

std::vector<GemmKernel> avxvnni_rows() {
  std::vector<GemmKernel> rows;
  for (const GemmKernel& kernel : list_gemm_kernels()) {
    if ((kernel.isa & kIsaAvxVnni) != 0) rows.push_back(kernel);
  }
  return rows;
}

class AvxVnniGemmTest : public testing::TestWithParam<GemmKernel> {
 protected:
  void SetUp() override {
    if (!has_avx2()) GTEST_SKIP() << GetParam().name << " needs avx2 beside vpdpbusd";
  }
  static std::vector<Grouping> groupings() { return groupings_of(GetParam()); }
};

TEST(AvxVnniRows, AreOfBothIntegerWeights) { EXPECT_EQ(avxvnni_rows().size(), 2u); }

TEST_P(AvxVnniGemmTest, AgreesWithTheReferenceForAllShapes) {
  expect_correct_for_all_shapes(GetParam());
}

TEST_P(AvxVnniGemmTest, HoldsTheLargestSums) {
  for (const auto& [group_size, row_scales] : groupings()) {
    for (Fill fill : {Fill::kLargest, Fill::kSmallest, Fill::kAlternating}) {
      // a single sum over the whole row is what may overflow
      const int k = group_size == 0 ? kMaxIntegerK : 1024;
      const int m = group_size == 0 ? 2 : 7;
      SCOPED_TRACE(testing::Message()
                   << "fill " << static_cast<int>(fill) << " group " << group_size << " k " << k);
      Problem p = make_problem(layout_of(GetParam().weights, group_size), m, k, 64, false, fill, 3,
                               row_scales);
      negate_odd_rows(&p);
      expect_correct(GetParam(), p);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(AvxVnniGemmTest, KeepsZeroNanAndSubnormalScales) {
  for (const Grouping& grouping : groupings())
    expect_correct(GetParam(), make_special_scales_problem(GetParam().weights, grouping));
}

// No product is computed twice, and none by another instruction.
TEST_P(AvxVnniGemmTest, MultipliesByVpdpbusdOnly) {
  for (const int m : {1, 2, 5, 13}) {
    const Problem p =
        make_problem(layout_of(GetParam().weights, 64), m, 192, 64, true, Fill::kRandom, 29);
    kt_amx_counters_reset();
    run_gemm(GetParam(), p);
    const uint64_t needed = uint64_t{192} / 4 * 64 / 8 * m;
    EXPECT_EQ(kt_amx_counter("vpdpbusd"), is_counted() ? needed : 0) << m << " rows";
  }
}

INSTANTIATE_TEST_SUITE_P(Rows, AvxVnniGemmTest, testing::ValuesIn(avxvnni_rows()),
                         [](const auto& test) { return std::string(test.param.name); });

TEST(AvxVnniProbe, RunsAsManyInstructionsAsItClaims) {
  if (!has_avx2()) GTEST_SKIP() << "peak_probe_int8_avxvnni needs avx2 beside vpdpbusd";
  const Probes probes = select_probes(DType::kInt8, kIsaAvx2 | kIsaAvxVnni);
  EXPECT_EQ(probes.peak, peak_probe_int8_avxvnni);
  kt_amx_counters_reset();
  probes.peak(10);
  const uint64_t claimed = static_cast<uint64_t>(10 * probes.operations_per_iteration) / 64;
  EXPECT_EQ(kt_amx_counter("vpdpbusd"), is_counted() ? claimed : 0);
}

}  // namespace
}  // namespace kt
