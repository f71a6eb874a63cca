// Codes of 5 bits on AVX2.
#include "kernels/x86/gemm_groups_avx2.h"

namespace kt {

void gemm_s8_int5h_fp32_6x16x8_avx2(const GemmArgs& args) {
  multiply_groups<Codes5, ScalesFp16, 16, 16>(args);
}
void gemm_s8_int5m_fp32_6x16x8_avx2(const GemmArgs& args) {
  multiply_groups<Codes5, ScalesFp16Min, 0, 16>(args);
}
void gemm_s8_int5km_fp32_6x16x8_avx2(const GemmArgs& args) {
  multiply_groups<Codes5, ScalesBlockMin, 0, 16>(args);
}

}  // namespace kt
