// Limit of vdpbf16ps.
#include "kernels/kernel.h"
#include "kernels/x86/peak_sums.h"

namespace kt {

uint64_t peak_probe_bf16_avx512bf16(int64_t iterations) {
  const auto step = [](__m512 sum, __m512i a, __m512i w) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(w));
  };
  const __m512i halves = _mm512_set1_epi32(0x3f003f00);    // two bf16 of 0.5
  const __m512i quarters = _mm512_set1_epi32(0x3e803e80);  // two bf16 of 0.25
  return run_peak_sums<24, __m512>(iterations, halves, quarters, step);
}

}  // namespace kt
