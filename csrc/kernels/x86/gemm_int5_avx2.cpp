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

void gemm_s8_int5hx_fp32_6x16x4_avx2(const GemmArgs& args) {
  multiply_groups<ExpandedCodes<31, 40>, ExpandedScales<ScalesFp16>, 16, 16>(args);
}
void expand_int5h_avx2(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  expand_groups<Codes5, ScalesFp16>(panel, k, group_size, scratch);
}

void gemm_s8_int5mx_fp32_6x16x4_avx2(const GemmArgs& args) {
  multiply_groups<ExpandedCodes<31, 40>, ExpandedScales<ScalesFp16Min>, 0, 16>(args);
}
void expand_int5m_avx2(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  expand_groups<Codes5, ScalesFp16Min>(panel, k, group_size, scratch);
}

void gemm_s8_int5kmx_fp32_6x16x4_avx2(const GemmArgs& args) {
  multiply_groups<ExpandedCodes<31, 40>, ExpandedScales<ScalesBlockMin>, 0, 16>(args);
}
void expand_int5km_avx2(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  expand_groups<Codes5, ScalesBlockMin>(panel, k, group_size, scratch);
}

}  // namespace kt
