// fp8 times its scales as bf16, for the bf16 kernels of many rows.
#include "kernels/x86/codes_avx512.h"
#include "kernels/x86/fp8_avx512vbmi.h"
#include "kernels/x86/pairs_avx512bf16.h"

namespace kt {
namespace {

// Pairs of bf16 times the scales of their columns.
inline __m512i scale_pairs(__m512i pairs, __m512 scale) {
  const __m512 even = _mm512_castsi512_ps(shift_left_16(pairs));
  const __m512 odd =
      _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  return pairs_of(_mm512_mul_ps(even, scale), _mm512_mul_ps(odd, scale));
}

template <typename Scales>
inline void expand(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  for (int32_t begin = 0; begin < k; begin += group_size) {
    const int32_t size = k - begin < group_size ? k - begin : group_size;
    const uint8_t* const at = panel + int64_t{size} * kPanelColumns;
    __m512 scales[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) scales[j] = Scales::scale(at, nullptr, j);
    for (; panel < at; panel += kStepBytes, scratch += 2 * kStepBytes) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Fp8Pairs w = load_fp8(panel + 64 * j);
        _mm512_store_si512(scratch + 64 * j, scale_pairs(w.first, scales[j]));
        _mm512_store_si512(scratch + kStepBytes + 64 * j, scale_pairs(w.second, scales[j]));
      }
    }
    panel = at + Scales::kBytes;
  }
}

}  // namespace

void expand_fp8_bf16_avx512vbmi(const uint8_t* panel, int32_t k, int32_t group_size,
                                uint8_t* scratch) {
  expand<Bf16Scales>(panel, k, group_size, scratch);
}
void expand_fp8f_bf16_avx512vbmi(const uint8_t* panel, int32_t k, int32_t group_size,
                                 uint8_t* scratch) {
  expand<Fp32Scales>(panel, k, group_size, scratch);
}

}  // namespace kt
