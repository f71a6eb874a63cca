// Unpacks one int4 panel into bytes, for the int4 kernels of many rows.
#include "kernels/x86/gemm_avx512.h"

namespace kt {

void expand_int4_avx512(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  const __m512i nibble = _mm512_set1_epi8(0x0f);
  uint8_t* scales = scratch + int64_t{kPanelColumns} * k;
  int64_t done = 0;
  while (done < k) {
    const int64_t group_end = done + group_size < k ? done + group_size : k;
    for (; done < group_end; done += 8) {
      // Low nibbles are the 4 k of one step of the scratch, high nibbles those of the next.
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j, panel += 64, scratch += 64) {
        const __m512i codes = _mm512_load_si512(panel);
        _mm512_store_si512(scratch, _mm512_and_si512(codes, nibble));
        _mm512_store_si512(scratch + kStepBytes,
                           _mm512_and_si512(as_bits(as_int32(codes) >> 4), nibble));
      }
      scratch += kStepBytes;
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j, panel += 32, scales += 64)
      _mm512_store_ps(scales, load_bf16_scales(panel));
  }
}

}  // namespace kt
