// Codes of 4 bits with the table of IQ4_NL on AVX2.
#include "kernels/x86/gemm_groups_avx2.h"

namespace kt {

void gemm_s8_iq4h_fp32_6x16x8_avx2(const GemmArgs& args) {
  multiply_groups<CodesIq4, ScalesFp16, 0, 32>(args);
}
void gemm_s8_iq4k_fp32_6x16x8_avx2(const GemmArgs& args) {
  if (args.group_size % 32 == 0) {
    multiply_groups<CodesIq4, ScalesBlock, 0, 32>(args);
  } else {
    multiply_groups<CodesIq4, ScalesBlock, 0, 16>(args);
  }
}

void gemm_s8_iq4hx_fp32_6x16x4_avx2(const GemmArgs& args) {
  multiply_groups<ExpandedCodes<128, 32>, ExpandedScales<ScalesFp16>, 0, 32>(args);
}
void expand_iq4h_avx2(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  expand_groups<CodesIq4, ScalesFp16>(panel, k, group_size, scratch);
}

}  // namespace kt
