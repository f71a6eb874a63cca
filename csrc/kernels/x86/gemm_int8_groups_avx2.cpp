// Codes of 8 bits with groups on AVX2.
#include "kernels/x86/gemm_groups_avx2.h"

namespace kt {

void gemm_s8_int8h_fp32_6x16x4_avx2(const GemmArgs& args) {
  multiply_groups<Codes8, ScalesFp16, 0, 32>(args);
}
void gemm_s8_int8f_fp32_6x16x4_avx2(const GemmArgs& args) {
  multiply_groups<Codes8, ScalesFp32, 0, 32>(args);
}

}  // namespace kt
