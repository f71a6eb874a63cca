// int8 x int8 by 16-bit products, and one row by those of abs and sign.
//
// vpmaddubsw would saturate on u8 x s8, and its cure (abs and sign for every product) costs more
// than a second multiply for several rows: measured on Zen 4, abs/sign reaches 133 Gop/s, this 177,
// vpmaddubsw without the cure 227. More is not to be had this way: 24 products and 24 additions in
// registers take 14.9 cycles there and not 12, because additions go to the two pipes that multiply
// as well; with operands in memory 15.1. (Both operands made once and kept, 75 instructions a step
// and not 80, changed nothing.)
//
// A dword of the panel is one column and k, k+1, k+2, k+3. Shifted left by 8 its words are 256 *
// (w[k], w[k+2]), masked they are 256 * (w[k+1], w[k+3]): two instructions make both operands of
// vpmaddwd, and the factor 256 leaves by one shift at the end of a chunk. 256 * 127 * 127 * kChunk
// must stay below 2^31, so a chunk has at most 512 k.

#include "kernels/x86/gemm_avx2.h"

namespace kt {
namespace {

constexpr int kMaxRows = 6;  // 6 rows x 2 vectors: 12 of 16 registers accumulate
constexpr int kChunk = 256;  // 16 KB of panel: stays in L1 for all row blocks
constexpr int kSteps = kChunk / 4;

// The activations of one row block and chunk as pairs of words: (a[k], a[k+2]) and (a[k+1],
// a[k+3]).
struct ActivationPairs {
  alignas(32) int32_t even[kMaxRows][kSteps];
  alignas(32) int32_t odd[kMaxRows][kSteps];
};

void prepare(const GemmArgs& args, int begin, int rows, int k_begin, int k_count,
             ActivationPairs* pairs) {
  for (int r = 0; r < rows; ++r) {
    const uint8_t* a = activation_row(args, begin + r) + k_begin;
    for (int k = 0; k < k_count; k += 32) {
      const __m256i codes = load_bytes(a + k);
      store_bytes(&pairs->even[r][k / 4], _mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 8));
      store_bytes(&pairs->odd[r][k / 4], _mm256_srai_epi16(codes, 8));
    }
  }
}

template <int kRows>
void tile(const ActivationPairs& pairs, const uint8_t* panel, int steps, int column, bool first,
          int32_t* sums, int64_t stride, Prefetch prefetch) {
  constexpr int kVectors = tile_vectors(kRows);
  const __m256i upper = _mm256_set1_epi16(static_cast<int16_t>(0xff00));
  __m256i acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm256_setzero_si256();
  }
  const uint8_t* lines = panel + column * 4;
  for (int64_t s = 0; s < steps; ++s, lines += kStepBytes) {
    prefetch.step<kRows>(lines, s, column);
    __m256i w[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) w[v] = _mm256_slli_epi16(load_bytes(lines + v * 32), 8);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m256i a = broadcast_dword(&pairs.even[r][s]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        acc[r][v] = _mm256_add_epi32(acc[r][v], _mm256_madd_epi16(w[v], a));
        pin(acc[r][v]);
      }
    }
    // Loads the lines again instead of keeping them: the registers are full.
    asm volatile("" ::: "memory");
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) w[v] = _mm256_and_si256(load_bytes(lines + v * 32), upper);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m256i a = broadcast_dword(&pairs.odd[r][s]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        acc[r][v] = _mm256_add_epi32(acc[r][v], _mm256_madd_epi16(w[v], a));
        pin(acc[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      int32_t* dst = sums + r * stride + column + v * 8;
      __m256i sum = _mm256_srai_epi32(acc[r][v], 8);
      if (!first) sum = _mm256_add_epi32(sum, load_bytes(dst));
      store_bytes(dst, sum);
    }
  }
}

// One row waits for memory, and the fewer instructions a k-step takes, the further ahead the core
// looks: 49 with abs and sign for each product, and no pairs to make, are 4 % faster in a layer
// than 75 on pairs of words. |w| up to 128 as an unsigned byte times a of at most 127: two such
// products stay below 2^15. (a of -128 would keep its sign where w is negative.) A function of its
// own, which test_kernel_gate.py counts apart.
[[gnu::noinline]] void multiply_row(const GemmArgs& args) {
  const __m256i ones = _mm256_set1_epi16(1);
  const uint8_t* const a = activation_row(args, 0);
  const uint8_t* lines = args.panel;
  const Prefetch prefetch = {nullptr, 0};
  __m256i acc[8];
#pragma GCC unroll 8
  for (int v = 0; v < 8; ++v) acc[v] = _mm256_setzero_si256();
  for (int64_t k = 0; k < args.k; k += 4, lines += kStepBytes) {
    prefetch.step<1>(lines, k / 4, 0);
    const __m256i codes = broadcast_dword(a + k);
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) {
      const __m256i w = load_bytes(lines + v * 32);
      const __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(codes, w));
      acc[v] = _mm256_add_epi32(acc[v], _mm256_madd_epi16(products, ones));
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < 8; ++v) store_bytes(args.c + v * 8, acc[v]);
}

template <int kRows>
void row_block(const ActivationPairs& pairs, const uint8_t* panel, int steps, bool first,
               int32_t* sums, int64_t stride, Prefetch prefetch) {
  for (int column = 0; column < kPanelColumns; column += tile_vectors(kRows) * 8) {
    tile<kRows>(pairs, panel, steps, column, first, sums, stride, prefetch);
  }
}

using RowBlockFn = void (*)(const ActivationPairs&, const uint8_t*, int, bool, int32_t*, int64_t,
                            Prefetch);
// From two rows on: block_rows() leaves a single one only where m is 1.
constexpr RowBlockFn kRowBlocks[] = {row_block<2>, row_block<3>, row_block<4>, row_block<5>,
                                     row_block<6>};

}  // namespace

void gemm_s8_int8_fp32_6x16x4_avx2(const GemmArgs& args) {
  if (args.m == 1) {
    multiply_row(args);
    scale_int8_sums(args);
    return;
  }
  ActivationPairs pairs;
  auto* sums = reinterpret_cast<int32_t*>(args.c);
  for (int k_begin = 0; k_begin < args.k; k_begin += kChunk) {
    const int k_count = args.k - k_begin < kChunk ? args.k - k_begin : kChunk;
    const uint8_t* chunk = args.panel + int64_t{k_begin} * kPanelColumns;
    const uint8_t* after = chunk + int64_t{k_count} * kPanelColumns;
    if (k_begin + k_count == args.k) after = args.next_panel != nullptr ? args.next_panel : chunk;
    for (int i = 0; i < args.m;) {
      const int rows = block_rows(args.m, i, kMaxRows);
      prepare(args, i, rows, k_begin, k_count, &pairs);
      prefetch_rows(args, i + rows, kMaxRows, k_begin, k_count);
      kRowBlocks[rows - 2](pairs, chunk, k_count / 4, k_begin == 0, sums + i * args.c_stride,
                           args.c_stride, {after, i == 0 ? kStepBytes : 0});
      i += rows;
    }
  }
  scale_int8_sums(args);
}

}  // namespace kt
