// Limit of vpdpbusd with VEX encoding.
#include "kernels/kernel.h"
#include "kernels/x86/peak_sums.h"

namespace kt {

uint64_t peak_probe_int8_avxvnni(int64_t iterations) {
  typedef int32_t Int32x8 __attribute__((vector_size(32)));
  const auto step = [](Int32x8 sum, __m256i a, __m256i w) {
    const __m256i next = _mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sum), a, w);
    return reinterpret_cast<Int32x8>(next);
  };
  return run_peak_sums<12, Int32x8>(iterations, _mm256_set1_epi8(3), _mm256_set1_epi8(5), step);
}

}  // namespace kt
