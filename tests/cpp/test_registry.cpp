// Rows that other libraries add to the table of kernels, and what KT_GEMM chooses: with made-up
// rows, for the real ones exist in the extension only.
#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "kernels/registry.h"

namespace kt {
namespace {

void multiply_nothing(const GemmArgs&) {}

constexpr IsaSet kVnni = kIsaAvx2 | kIsaAvx512 | kIsaAvx512Vnni;

GemmKernel foreign_row(const char* name, WeightFormat weights, int m_from) {
  const DType a_dtype = weights == WeightFormat::kInt8 ? DType::kUint8 : DType::kBFloat16;
  return {
      name,   kVnni, weights, a_dtype, 32, m_from, multiply_nothing, nullptr, GemmSource::kOneDnn,
      nullptr};
}

std::string error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

TEST(ForeignRows, AreChosenOnRequestOrByTheirRows) {
  const IsaSet all = kVnni | kIsaAvx512Bf16;
  const std::string before = explain_kernels({WeightFormat::kInt8, all, GemmChoice::kAuto});
  EXPECT_NE(error_of([&] {
              select_kernels({WeightFormat::kInt8, all, GemmChoice::kOneDnn});
            }).find("KT_GEMM=\"onednn\""),
            std::string::npos);

  register_gemm(foreign_row("gemm_u8_int8_fp32_32x64x4_test", WeightFormat::kInt8, 0));
  EXPECT_EQ(explain_kernels({WeightFormat::kInt8, all, GemmChoice::kAuto}), before);
  EXPECT_EQ(explain_kernels({WeightFormat::kInt8, all, GemmChoice::kNative}), before);
  for (const IsaSet isa : {kVnni, all}) {
    const KernelSet set = select_kernels({WeightFormat::kInt8, isa, GemmChoice::kOneDnn});
    ASSERT_EQ(set.gemms.size(), 1u);
    EXPECT_EQ(set.a_dtype, DType::kUint8);
    EXPECT_STREQ(set.rowwise->name, "rowwise_avx512");
    for (const int m : {0, 1, 7, 4096})
      EXPECT_STREQ(set.for_rows(m).name, "gemm_u8_int8_fp32_32x64x4_test");
  }
  EXPECT_NE(explain_kernels({WeightFormat::kInt8, all, GemmChoice::kOneDnn})
                .find("m>=1 gemm_u8_int8_fp32_32"),
            std::string::npos);

  // where its features are missing or it has no row, the wish is refused; int4 is always ours
  const std::string missing = error_of([] {
    select_kernels(
        {WeightFormat::kInt8, kIsaAvx2 | kIsaAvx512 | kIsaAvx512Bf16, GemmChoice::kOneDnn});
  });
  EXPECT_NE(missing.find("needs avx2 avx512 avx512vnni, but in use are: avx2 avx512 avx512bf16"),
            std::string::npos)
      << missing;
  EXPECT_NE(error_of([&] {
              select_kernels({WeightFormat::kBFloat16, all, GemmChoice::kOneDnn});
            }).find("for bf16 weights"),
            std::string::npos);
  EXPECT_EQ(explain_kernels({WeightFormat::kInt4, all, GemmChoice::kOneDnn}),
            explain_kernels({WeightFormat::kInt4, all, GemmChoice::kNative}));

  // a row that was measured faster from 16 rows on
  register_gemm(foreign_row("gemm_u8_int8_fp32_16x64x4_test", WeightFormat::kInt8, 16));
  const KernelSet chosen = select_kernels({WeightFormat::kInt8, all, GemmChoice::kAuto});
  EXPECT_EQ(chosen.for_rows(15).source, GemmSource::kNative);
  EXPECT_STREQ(chosen.for_rows(16).name, "gemm_u8_int8_fp32_16x64x4_test");
  EXPECT_EQ(explain_kernels({WeightFormat::kInt8, all, GemmChoice::kNative}), before);
}

TEST(ForeignRows, AreRefusedTwiceAndWhereBitsWouldDependOnTheRows) {
  register_gemm(foreign_row("gemm_bf16_bf16_fp32_32x64x2_test", WeightFormat::kBFloat16, 0));
  const auto refusal = [](const GemmKernel& kernel) {
    return error_of([&] { register_gemm(kernel); });
  };
  EXPECT_NE(refusal(foreign_row("gemm_bf16_bf16_fp32_32x64x2_test", WeightFormat::kBFloat16, 0))
                .find("registered twice"),
            std::string::npos);
  EXPECT_NE(refusal(foreign_row("gemm_bf16_bf16_fp32_16x64x2_test", WeightFormat::kBFloat16, 16))
                .find("bf16 from 16 rows on"),
            std::string::npos);
  GemmKernel native = foreign_row("gemm_u8_int8_fp32_8x64x4_test", WeightFormat::kInt8, 1);
  native.source = GemmSource::kNative;
  EXPECT_NE(refusal(native).find("kernels.inc"), std::string::npos);
}

TEST(GemmChoice, TakesThreeWordsOfKtGemm) {
  EXPECT_EQ(parse_gemm_choice(nullptr), GemmChoice::kAuto);
  EXPECT_EQ(parse_gemm_choice(""), GemmChoice::kAuto);
  EXPECT_EQ(parse_gemm_choice("auto"), GemmChoice::kAuto);
  EXPECT_EQ(parse_gemm_choice("native"), GemmChoice::kNative);
  EXPECT_EQ(parse_gemm_choice("onednn"), GemmChoice::kOneDnn);
  EXPECT_EQ(error_of([] { parse_gemm_choice("ONEDNN"); }),
            "KT_GEMM=\"ONEDNN\" is no choice of kernels; give auto, native or onednn.");
}

}  // namespace
}  // namespace kt
