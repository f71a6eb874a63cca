// Weights of 8, 6, 5, 3 and 2 bits in groups, on AVX-512 VNNI.
#include "kernels/x86/groups_avx512vnni.h"

namespace kt {

void gemm_s8_int8h_fp32_3x64x4_avx512vnni(const GemmArgs& args) {
  multiply_packed<Codes8, Fp16Scales>(args);
}
void gemm_s8_int8f_fp32_3x64x4_avx512vnni(const GemmArgs& args) {
  multiply_packed<Codes8, Fp32Scales>(args);
}
void gemm_s8_int6k_fp32_3x64x16_avx512vnni(const GemmArgs& args) {
  multiply_packed<Codes6, BlockScales>(args);
}
void gemm_s8_int5h_fp32_3x64x8_avx512vnni(const GemmArgs& args) {
  multiply_packed<Codes5, Fp16Scales>(args);
}
void gemm_s8_int5m_fp32_3x64x8_avx512vnni(const GemmArgs& args) {
  multiply_packed<Codes5, Fp16MinScales>(args);
}
void gemm_s8_int5km_fp32_3x64x8_avx512vnni(const GemmArgs& args) {
  multiply_packed<Codes5, BlockMinScales>(args);
}
void gemm_s8_int3k_fp32_3x64x16_avx512vnni(const GemmArgs& args) {
  multiply_packed<Codes3, BlockScales>(args);
}
void gemm_s8_int2km_fp32_3x64x16_avx512vnni(const GemmArgs& args) {
  multiply_packed<Codes2, BlockMinScales>(args);
}

}  // namespace kt
