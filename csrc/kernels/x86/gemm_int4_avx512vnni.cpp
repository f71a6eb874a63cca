// 4-bit weights on AVX-512 VNNI: as they are, and through tables of 16 values.
#include "kernels/x86/groups_avx512vnni.h"

namespace kt {

void gemm_s8_int4_fp32_3x64x8_avx512vnni(const GemmArgs& args) {
  multiply_packed<Codes4, Bf16Scales>(args);
}
void gemm_s8_int4h_fp32_3x64x8_avx512vnni(const GemmArgs& args) {
  multiply_packed<Codes4, Fp16Scales>(args);
}
void gemm_s8_int4f_fp32_3x64x8_avx512vnni(const GemmArgs& args) {
  multiply_packed<Codes4, Fp32Scales>(args);
}
void gemm_s8_int4z_fp32_3x64x8_avx512vnni(const GemmArgs& args) {
  multiply_packed<Codes4, Fp16ZeroScales>(args);
}
void gemm_s8_int4m_fp32_3x64x8_avx512vnni(const GemmArgs& args) {
  multiply_packed<Codes4, Fp16MinScales>(args);
}
void gemm_s8_int4km_fp32_3x64x8_avx512vnni(const GemmArgs& args) {
  multiply_packed<Codes4, BlockMinScales>(args);
}
void gemm_s8_fp4_fp32_3x64x8_avx512vnni(const GemmArgs& args) {
  multiply_packed<CodesOf<Fp4Table>, Bf16Scales>(args);
}
void gemm_s8_fp4c_fp32_3x64x8_avx512vnni(const GemmArgs& args) {
  multiply_packed<CodesOf<Fp4Table>, ColumnScales>(args);
}
void gemm_s8_iq4h_fp32_3x64x8_avx512vnni(const GemmArgs& args) {
  multiply_packed<CodesOf<Iq4Table>, Fp16Scales>(args);
}
void gemm_s8_iq4k_fp32_3x64x8_avx512vnni(const GemmArgs& args) {
  multiply_packed<CodesOf<Iq4Table>, BlockScales>(args);
}

}  // namespace kt
