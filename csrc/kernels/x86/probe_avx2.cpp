// Limits of an AVX2 core: reading memory, int8 by maddubs and madd, fp32 fma.
#include <immintrin.h>

#include "kernels/kernel.h"
#include "kernels/x86/peak_sums.h"

namespace kt {

uint64_t read_probe_avx2(const uint8_t* data, int64_t bytes) {
  constexpr int64_t kAhead = 4096;  // as read_probe_avx512
  constexpr int64_t kStride = 256;
  __m256i sum[8];
  for (__m256i& lane : sum) lane = _mm256_setzero_si256();
  int64_t at = 0;
  for (; at + kStride <= bytes; at += kStride) {
    for (int i = 0; i < 8; ++i) {
      if (i % 2 == 0)
        _mm_prefetch(reinterpret_cast<const char*>(data + at + kAhead + i * 32), _MM_HINT_T1);
      sum[i] = _mm256_xor_si256(
          sum[i], _mm256_load_si256(reinterpret_cast<const __m256i*>(data + at + i * 32)));
    }
  }
  for (; at < bytes; at += 32) {
    sum[0] =
        _mm256_xor_si256(sum[0], _mm256_load_si256(reinterpret_cast<const __m256i*>(data + at)));
  }
  for (int i = 1; i < 8; ++i) sum[0] = _mm256_xor_si256(sum[0], sum[i]);
  alignas(32) uint64_t words[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(words), sum[0]);
  return words[0] ^ words[1] ^ words[2] ^ words[3];
}

// maddubs, madd and add for each 32 products, four sums in flight.
uint64_t peak_probe_int8_avx2(int64_t iterations) {
  typedef int32_t Int32x8 __attribute__((vector_size(32)));
  const auto step = [](Int32x8 sum, __m256i a, __m256i w) {
    const __m256i pairs = _mm256_maddubs_epi16(a, w);
    return sum + reinterpret_cast<Int32x8>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  };
  return run_peak_sums<4, Int32x8>(iterations, _mm256_set1_epi8(3), _mm256_set1_epi8(5), step);
}

uint64_t peak_probe_bf16_avx2(int64_t iterations) {
  const auto step = [](__m256 sum, __m256 a, __m256 w) { return _mm256_fmadd_ps(a, w, sum); };
  return run_peak_sums<12, __m256>(iterations, _mm256_set1_ps(0.5f), _mm256_set1_ps(0.25f), step);
}

}  // namespace kt
