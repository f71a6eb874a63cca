// bf16 GEMM on AVX-512 BF16: vdpbf16ps, 6 rows x 64 columns a tile. One chain of sums per output
// for every m, so a row's result does not depend on the rows beside it.
#include "kernels/x86/gemm_avx512.h"

namespace kt {
namespace {

struct Tile {
  template <int kRows>
  static void run(const GemmArgs& args, const RowBlock& block) {
    const uint8_t* a[kRows];
    __m512 acc[kRows][4];
    start_fp32_tile(args, block.row, a, acc);
    add_dot_steps(acc, a, args, block, args.k / 2, [](__m512 sum, __m512i pair, __m512i w) {
      return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(pair), reinterpret_cast<__m512bh>(w));
    });
    store_bf16_tile(args, block.row, acc);
  }
};

}  // namespace

void gemm_bf16_bf16_fp32_6x64x2_avx512bf16(const GemmArgs& args) {
  for_each_row_block<Tile, 6>(args);
}

}  // namespace kt
