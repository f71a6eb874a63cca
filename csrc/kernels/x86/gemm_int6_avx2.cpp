// Codes of 6 bits on AVX2.
#include "kernels/x86/gemm_groups_avx2.h"

namespace kt {

void gemm_s8_int6k_fp32_6x16x16_avx2(const GemmArgs& args) {
  multiply_groups<Codes6, ScalesBlock, 32, 16>(args);
}

void gemm_s8_int6kx_fp32_6x16x4_avx2(const GemmArgs& args) {
  multiply_groups<ExpandedCodes<63, 48>, ExpandedScales<ScalesBlock>, 32, 16>(args);
}
void expand_int6k_avx2(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  expand_groups<Codes6, ScalesBlock>(panel, k, group_size, scratch);
}

}  // namespace kt
