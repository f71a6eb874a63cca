// The dot product of the AVX-VNNI kernels; rows, tiles and prefetch are those of gemm_avx2.h.
// Anonymous namespace only.
#pragma once

#include "kernels/x86/gemm_avx2.h"

namespace kt {
namespace {

// int32 accumulators. Not __m256i: see gemm_avx512.h.
typedef int32_t Int32x8 __attribute__((vector_size(32)));

inline Int32x8 as_int32(__m256i bits) { return reinterpret_cast<Int32x8>(bits); }
inline __m256i as_bits(Int32x8 value) { return reinterpret_cast<__m256i>(value); }

// sum + the products of 4 unsigned and 4 signed bytes in each lane. The intrinsic's name says VEX:
// the EVEX form of the instruction is another feature.
inline Int32x8 dot(Int32x8 sum, __m256i unsigned_bytes, __m256i signed_bytes) {
  return as_int32(_mm256_dpbusd_avx_epi32(as_bits(sum), unsigned_bytes, signed_bytes));
}

}  // namespace
}  // namespace kt
