// int4 GEMM on AVX-512 without VNNI: unsigned codes + 8 times signed activations by maddubs, summed
// in int16 over 32 k (8 * 2 * 15 * 128 < 2^15), then in int32 to the end of the group, then folded
// into the fp32 sum of the block of activations.
#include "kernels/x86/gemm_avx512.h"

namespace kt {
namespace {

// The 32 k from `k` on; panel points at the first of 4 steps of 8 k.
template <int kRows>
inline void add_32(Int32x16 (&sum)[kRows][4], const uint8_t* const (&a)[kRows],
                   const uint8_t* panel, int64_t k) {
  Int16x32 pairs[kRows][4] = {};
  // Unrolled, g++ mixes the steps and spills.
#pragma GCC unroll 1
  for (const int64_t k_end = k + 32; k < k_end; k += 8, panel += kStepBytes) {
    Int32x16 low[4];
    Int32x16 high[4];
    load_int4_step(panel, low, high);
#pragma GCC unroll 2
    for (int i = 0; i < kRows; ++i) {
      const __m512i a_low = broadcast_4_bytes(a[i] + k);
      const __m512i a_high = broadcast_4_bytes(a[i] + k + 4);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        pairs[i][j] += as_int16(_mm512_maddubs_epi16(as_bits(low[j]), a_low)) +
                       as_int16(_mm512_maddubs_epi16(as_bits(high[j]), a_high));
      }
    }
  }
  const __m512i ones = _mm512_set1_epi16(1);
#pragma GCC unroll 2
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      sum[i][j] += as_int32(_mm512_madd_epi16(as_bits(pairs[i][j]), ones));
  }
}

// 2 x 64: int16 sums, int32 sums and fp32 results take 24 registers.
struct Tile {
  template <int kRows>
  static void run(const GemmArgs& args, const RowBlock& block) {
    const uint8_t* a[kRows];
    const int32_t* group_sum[kRows];
    __m512 total[kRows][4];
    start_fp32_tile(args, block.row, a, total);
    start_group_sums(args, block.row, group_sum);
    const uint8_t* panel = args.panel;
    const uint8_t* next = prefetch_source(args, block);
    int64_t k = 0;
    for (int64_t group = 0, index = 0; k < args.k; ++group) {
      const int64_t k_end = k + args.group_size < args.k ? k + args.group_size : args.k;
      Int32x16 sum[kRows][4];
#pragma GCC unroll 2
      for (int i = 0; i < kRows; ++i) {
        const Int32x16 first = as_int32(_mm512_set1_epi32(-8 * group_sum[i][group]));
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sum[i][j] = first;
      }
      for (; k < k_end; k += 32, panel += 4 * kStepBytes) {
        if (next != nullptr) {
#pragma GCC unroll 4
          for (int step = 0; step < 4; ++step)
            prefetch_half<4>(next + (panel - args.panel) + kStepBytes * step);
        }
        add_32(sum, a, panel, k);
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m512 scale = load_bf16_scales(panel + 32 * j);
#pragma GCC unroll 2
        for (int i = 0; i < kRows; ++i)
          total[i][j] = _mm512_fmadd_ps(to_float(sum[i][j]), scale, total[i][j]);
      }
      panel += 2 * kPanelColumns;
      if (k % args.a_block != 0 && k < args.k) continue;
      store_block(args, block.row, 0, index++, total);
#pragma GCC unroll 2
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) total[i][j] = _mm512_setzero_ps();
      }
    }
  }
};

}  // namespace

void gemm_s8_int4_fp32_2x64x8_avx512(const GemmArgs& args) { for_each_row_block<Tile, 2>(args); }

}  // namespace kt
