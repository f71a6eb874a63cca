// int8 GEMM on AVX-512 VNNI: activations as unsigned bytes (code + 128), weights signed, 6 rows x
// 64 columns a tile.
#include "kernels/x86/gemm_avx512.h"

namespace kt {
namespace {

inline Int32x16 dot(Int32x16 sum, __m512i codes, __m512i w) {
  return as_int32(_mm512_dpbusd_epi32(as_bits(sum), codes, w));
}

struct Tile {
  template <int kRows>
  static void run(const GemmArgs& args, const RowBlock& block) {
    const int64_t steps = args.k / 4;
    const uint8_t* tail = args.panel + kStepBytes * steps;
    const uint8_t* a[kRows];
    Int32x16 acc[kRows][4] = {};
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) a[i] = row_pointer(args, block.row + i);
    if constexpr (kRows == 1) {
      // Four accumulators alone would wait for each other, so the odd k-steps have their own;
      // integer sums are exact.
      Int32x16 odd[1][4] = {};
      for (int64_t step = 0; step < steps; step += 2) {
        prefetch_ahead<8>(args.panel + kStepBytes * step);
        add_dot_step(acc, a, args.panel, step, dot);
        add_dot_step(odd, a, args.panel, step + 1, dot);
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) acc[0][j] += odd[0][j];
    } else {
      add_dot_steps(acc, a, args, block, steps, dot);
    }
    // Added at the end: the tail of a panel is far from its start, and sums that began with it
    // would wait for memory once a panel.
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Int32x16 compensation = as_int32(_mm512_load_si512(tail + 64 * j));
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) acc[i][j] += compensation;
    }
    store_int8_tile(args, block.row, acc, tail + 256);
  }
};

}  // namespace

void gemm_u8_int8_fp32_6x64x4_avx512vnni(const GemmArgs& args) {
  for_each_row_block<Tile, 6>(args);
}

}  // namespace kt
