// Codes of 2 bits on AVX2.
#include "kernels/x86/gemm_groups_avx2.h"

namespace kt {

void gemm_s8_int2km_fp32_6x16x16_avx2(const GemmArgs& args) {
  multiply_groups<Codes2, ScalesBlockMin, 0, 16>(args);
}

}  // namespace kt
