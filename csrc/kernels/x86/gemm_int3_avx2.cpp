// Codes of 3 bits on AVX2.
#include "kernels/x86/gemm_groups_avx2.h"

namespace kt {

void gemm_s8_int3k_fp32_6x16x16_avx2(const GemmArgs& args) {
  multiply_groups<Codes3, ScalesBlock, 4, 16>(args);
}

void gemm_s8_int3kx_fp32_6x16x4_avx2(const GemmArgs& args) {
  multiply_groups<ExpandedCodes<7, 24>, ExpandedScales<ScalesBlock>, 4, 16>(args);
}
void expand_int3k_avx2(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  expand_groups<Codes3, ScalesBlock>(panel, k, group_size, scratch);
}

}  // namespace kt
