// int8 GEMM on AVX-512 without VNNI: signed activations, products by maddubs and madd, 4 rows x 64
// columns a tile.
#include "kernels/x86/gemm_avx512.h"

namespace kt {
namespace {

struct Tile {
  template <int kRows>
  static void run(const GemmArgs& args, const RowBlock& block) {
    const int64_t steps = args.k / 4;
    const uint8_t* w_scale = args.panel + kStepBytes * steps + 256;
    const __m512i zero = _mm512_setzero_si512();
    const __m512i ones = _mm512_set1_epi16(1);
    const uint8_t* a[kRows];
    Int32x16 acc[kRows][4] = {};
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) a[i] = row_pointer(args, block.row + i);

    for (int64_t step = 0; step < steps; ++step) {
      __m512i codes[kRows];
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) codes[i] = broadcast_4_bytes(a[i] + 4 * step);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        // w * a = |w| * (a with the sign of w). Pairs stay below 2 * 128 * 127, so maddubs never
        // saturates.
        const __m512i w = _mm512_load_si512(args.panel + kStepBytes * step + 64 * j);
        const __m512i w_magnitude = _mm512_abs_epi8(w);
        const __mmask64 w_negative = _mm512_movepi8_mask(w);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
          const __m512i signed_codes = _mm512_mask_sub_epi8(codes[i], w_negative, zero, codes[i]);
          const __m512i pairs = _mm512_maddubs_epi16(w_magnitude, signed_codes);
          acc[i][j] += as_int32(_mm512_madd_epi16(pairs, ones));
        }
      }
    }

    store_int8_tile(args, block.row, acc, w_scale);
  }
};

}  // namespace

void gemm_s8_int8_fp32_4x64x4_avx512(const GemmArgs& args) { for_each_row_block<Tile, 4>(args); }

}  // namespace kt
