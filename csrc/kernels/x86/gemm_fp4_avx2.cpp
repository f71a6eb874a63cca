// Codes of 4 bits with the table of E2M1 on AVX2.
#include "kernels/x86/gemm_groups_avx2.h"

namespace kt {

void gemm_s8_fp4_fp32_6x16x8_avx2(const GemmArgs& args) {
  multiply_groups<CodesFp4, ScalesBf16, 12, 32>(args);
}
void gemm_s8_fp4c_fp32_6x16x8_avx2(const GemmArgs& args) {
  multiply_groups<CodesFp4, ScalesColumn, 12, 16>(args);
}

void gemm_s8_fp4x_fp32_6x16x4_avx2(const GemmArgs& args) {
  multiply_groups<ExpandedCodes<24, 32>, ExpandedScales<ScalesBf16>, 12, 32>(args);
}
void expand_fp4_avx2(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  expand_groups<CodesFp4, ScalesBf16>(panel, k, group_size, scratch);
}

void gemm_s8_fp4cx_fp32_6x16x4_avx2(const GemmArgs& args) {
  multiply_groups<ExpandedCodes<24, 32>, ExpandedScales<ScalesColumn>, 12, 16>(args);
}
void expand_fp4c_avx2(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  expand_groups<CodesFp4, ScalesColumn>(panel, k, group_size, scratch);
}

}  // namespace kt
