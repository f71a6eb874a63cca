// Limit of vpdpbusd.
#include "kernels/kernel.h"
#include "kernels/x86/peak_sums.h"

namespace kt {

uint64_t peak_probe_int8_avx512vnni(int64_t iterations) {
  // not __m512i: more than 16 such accumulators spill
  typedef int32_t Int32x16 __attribute__((vector_size(64)));
  const auto step = [](Int32x16 sum, __m512i a, __m512i w) {
    return reinterpret_cast<Int32x16>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), a, w));
  };
  return run_peak_sums<24, Int32x16>(iterations, _mm512_set1_epi8(3), _mm512_set1_epi8(5), step);
}

}  // namespace kt
