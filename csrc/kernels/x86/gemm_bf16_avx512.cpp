// bf16 GEMM on AVX-512 without BF16: both operands widened to fp32, fma in ascending k, 5 rows x 64
// columns a tile (with 6, g++ spills).
#include "kernels/x86/gemm_avx512.h"

namespace kt {
namespace {

// The even (kOdd false) or odd element of each pair of bf16, as fp32.
template <bool kOdd>
inline __m512 widen(__m512i pairs) {
  if constexpr (kOdd) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u))));
  } else {
    return _mm512_castsi512_ps(shift_left_16(pairs));
  }
}

// acc[i][j] = fma(a, w, acc[i][j]) for one of the two k of a step.
template <bool kOdd, int kRows>
inline void add_half_step(__m512 (&acc)[kRows][4], const uint8_t* const (&a)[kRows],
                          const uint8_t* panel, int64_t step) {
  __m512 w[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j)
    w[j] = widen<kOdd>(_mm512_load_si512(panel + kStepBytes * step + 64 * j));
#pragma GCC unroll 5
  for (int i = 0; i < kRows; ++i) {
    const __m512 value = widen<kOdd>(broadcast_4_bytes(a[i] + 4 * step));
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) acc[i][j] = _mm512_fmadd_ps(value, w[j], acc[i][j]);
  }
}

struct Tile {
  template <int kRows>
  static void run(const GemmArgs& args, const RowBlock& block) {
    const int64_t steps = args.k / 2;
    const uint8_t* panel = args.panel;
    const uint8_t* a[kRows];
    __m512 acc[kRows][4];
    start_fp32_tile(args, block.row, a, acc);
    for (int64_t step = 0; step < steps; ++step) {
      add_half_step<false>(acc, a, panel, step);
      add_half_step<true>(acc, a, panel, step);
    }
    store_bf16_tile(args, block.row, acc);
  }
};

}  // namespace

void gemm_bf16_bf16_fp32_5x64x2_avx512(const GemmArgs& args) { for_each_row_block<Tile, 5>(args); }

}  // namespace kt
