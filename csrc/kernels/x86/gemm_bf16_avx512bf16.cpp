// bf16 GEMM on AVX-512 BF16: vdpbf16ps, 6 rows x 64 columns a tile. One chain of sums per output
// for every m, so a row's result does not depend on the rows beside it.
#include "kernels/x86/gemm_avx512.h"

namespace kt {
namespace {

template <int kRows>
inline void add_step(__m512 (&acc)[kRows][4], const uint8_t* const (&a)[kRows],
                     const uint8_t* panel, int64_t step) {
  __m512i w[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) w[j] = _mm512_load_si512(panel + kStepBytes * step + 64 * j);
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    const __m512i pair = broadcast_4_bytes(a[i] + 4 * step);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      acc[i][j] = _mm512_dpbf16_ps(acc[i][j], reinterpret_cast<__m512bh>(pair),
                                   reinterpret_cast<__m512bh>(w[j]));
    }
  }
}

struct Tile {
  template <int kRows>
  static void run(const GemmArgs& args, const RowBlock& block) {
    const int64_t steps = args.k / 2;
    const uint8_t* a[kRows];
    __m512 acc[kRows][4];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      a[i] = row_pointer(args, block.row + i);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) acc[i][j] = _mm512_setzero_ps();
    }
    if (const uint8_t* next = prefetch_source(args, block)) {
      for (int64_t step = 0; step < steps; ++step) {
        prefetch_two_lines(next + kStepBytes * step);
        add_step(acc, a, args.panel, step);
      }
    } else {
      for (int64_t step = 0; step < steps; ++step) add_step(acc, a, args.panel, step);
    }
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      float* c = args.c + (block.row + i) * args.c_stride;
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) _mm512_storeu_ps(c + kLineColumns * j, acc[i][j]);
    }
  }
};

}  // namespace

void gemm_bf16_bf16_fp32_6x64x2_avx512bf16(const GemmArgs& args) {
  for_each_row_block<Tile, 6>(args);
}

}  // namespace kt
