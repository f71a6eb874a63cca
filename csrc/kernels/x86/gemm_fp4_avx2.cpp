// Codes of 4 bits with the table of E2M1 on AVX2.
#include "kernels/x86/gemm_groups_avx2.h"

namespace kt {

void gemm_s8_fp4_fp32_6x16x8_avx2(const GemmArgs& args) {
  multiply_groups<CodesFp4, ScalesBf16, 12, 32>(args);
}
void gemm_s8_fp4c_fp32_6x16x8_avx2(const GemmArgs& args) {
  multiply_groups<CodesFp4, ScalesColumn, 12, 16>(args);
}

}  // namespace kt
