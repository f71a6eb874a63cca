// Codes of 4 bits on AVX2: 32 k of them add up in 16 bits, which makes int4 faster than int8 here.
#include "kernels/x86/gemm_groups_avx2.h"

namespace kt {

void gemm_s8_int4_fp32_6x16x8_avx2(const GemmArgs& args) {
  multiply_groups<Codes4, ScalesBf16, 8, 32>(args);
}
void gemm_s8_int4x_fp32_6x16x4_avx2(const GemmArgs& args) {
  multiply_groups<ExpandedCodes<15, 32>, ExpandedScales<ScalesBf16>, 8, 32>(args);
}
void expand_int4_avx2(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  expand_groups<Codes4, ScalesBf16>(panel, k, group_size, scratch);
}

void gemm_s8_int4h_fp32_6x16x8_avx2(const GemmArgs& args) {
  multiply_groups<Codes4, ScalesFp16, 8, 32>(args);
}
void gemm_s8_int4f_fp32_6x16x8_avx2(const GemmArgs& args) {
  multiply_groups<Codes4, ScalesFp32, 8, 32>(args);
}
void gemm_s8_int4z_fp32_6x16x8_avx2(const GemmArgs& args) {
  multiply_groups<Codes4, ScalesFp16Zero, 0, 32>(args);
}
void gemm_s8_int4m_fp32_6x16x8_avx2(const GemmArgs& args) {
  multiply_groups<Codes4, ScalesFp16Min, 0, 32>(args);
}
void gemm_s8_int4km_fp32_6x16x8_avx2(const GemmArgs& args) {
  if (args.group_size % 32 == 0) {
    multiply_groups<Codes4, ScalesBlockMin, 0, 32>(args);
  } else {
    multiply_groups<Codes4, ScalesBlockMin, 0, 16>(args);
  }
}

}  // namespace kt
