// bf16 x bf16 by widening both to fp32: one shift or one mask makes the even or odd k of a line.
// One accumulator an output, k ascending, whatever the number of rows.

#include "kernels/x86/gemm_avx2.h"

namespace kt {
namespace {

constexpr int kMaxRows = 6;  // 6 rows x 2 vectors: 12 of 16 registers accumulate
constexpr int kChunk = 128;  // 16 KB of panel: stays in L1 for all row blocks

// The activations of one row block and chunk in fp32; even[r][s] is k = 2s, odd[r][s] is k = 2s
// + 1.
struct WideActivations {
  alignas(32) float even[kMaxRows][kChunk / 2];
  alignas(32) float odd[kMaxRows][kChunk / 2];
};

void prepare(const GemmArgs& args, int begin, int rows, int k_begin, int k_count,
             WideActivations* wide) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u));
  for (int r = 0; r < rows; ++r) {
    const uint8_t* a = activation_row(args, begin + r) + int64_t{k_begin} * 2;
    for (int k = 0; k < k_count; k += 16) {
      const __m256i pairs = load_bytes(a + k * 2);
      store_bytes(&wide->even[r][k / 2], _mm256_slli_epi32(pairs, 16));
      store_bytes(&wide->odd[r][k / 2], _mm256_and_si256(pairs, upper));
    }
  }
}

inline __m256 even_columns(const uint8_t* line) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(load_bytes(line), 16));
}
// The mask is read from memory: in a register it would drive an accumulator of a 6-row tile out.
alignas(32) constexpr uint32_t kUpper[8] = {0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u,
                                            0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u};
inline __m256 odd_columns(const uint8_t* line) {
  __m256 value = _mm256_castsi256_ps(load_bytes(line));
  asm("vandps %1, %0, %0" : "+x"(value) : "m"(kUpper));
  return value;
}

// sum += w * a, rounded once. Written out, as GCC 12 otherwise keeps one of 12 accumulators on the
// stack, in the chain of additions: 68 % of the FMA peak instead of 92 %.
inline void add_product(__m256& sum, __m256 w, __m256 a) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(w), "x"(a));
}

template <int kRows>
void tile(const WideActivations& wide, const uint8_t* panel, int steps, int column, bool first,
          float* c, int64_t stride, Prefetch prefetch) {
  constexpr int kVectors = tile_vectors(kRows);
  __m256 acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(c + r * stride + column + v * 8);
    }
  }
  const uint8_t* lines = panel + column * 4;
  for (int64_t s = 0; s < steps; ++s, lines += kStepBytes) {
    prefetch.step<kRows>(lines, s, column);
    if constexpr (kRows == 1) {
      const __m256 even = _mm256_broadcast_ss(&wide.even[0][s]);
      const __m256 odd = _mm256_broadcast_ss(&wide.odd[0][s]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        acc[0][v] = _mm256_fmadd_ps(even_columns(lines + v * 32), even, acc[0][v]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        acc[0][v] = _mm256_fmadd_ps(odd_columns(lines + v * 32), odd, acc[0][v]);
    } else {
      __m256 w[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) w[v] = even_columns(lines + v * 32);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m256 a = _mm256_broadcast_ss(&wide.even[r][s]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) add_product(acc[r][v], w[v], a);
      }
      // Loads the lines again instead of keeping them: the registers are full.
      asm volatile("" ::: "memory");
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) w[v] = odd_columns(lines + v * 32);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m256 a = _mm256_broadcast_ss(&wide.odd[r][s]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) add_product(acc[r][v], w[v], a);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) _mm256_storeu_ps(c + r * stride + column + v * 8, acc[r][v]);
  }
}

template <int kRows>
void row_block(const WideActivations& wide, const uint8_t* panel, int steps, bool first, float* c,
               int64_t stride, Prefetch prefetch) {
  for (int column = 0; column < kPanelColumns; column += tile_vectors(kRows) * 8) {
    tile<kRows>(wide, panel, steps, column, first, c, stride, prefetch);
  }
}

using RowBlockFn = void (*)(const WideActivations&, const uint8_t*, int, bool, float*, int64_t,
                            Prefetch);
constexpr RowBlockFn kRowBlocks[kMaxRows] = {row_block<1>, row_block<2>, row_block<3>,
                                             row_block<4>, row_block<5>, row_block<6>};

}  // namespace

void gemm_bf16_bf16_fp32_6x16x2_avx2(const GemmArgs& args) {
  WideActivations wide;
  for (int k_begin = 0; k_begin < args.k; k_begin += kChunk) {
    const int k_count = args.k - k_begin < kChunk ? args.k - k_begin : kChunk;
    const uint8_t* chunk = args.panel + int64_t{k_begin} * kPanelColumns * 2;
    const uint8_t* after = chunk + int64_t{k_count} * kPanelColumns * 2;
    if (k_begin + k_count == args.k) after = args.next_panel != nullptr ? args.next_panel : chunk;
    for (int i = 0; i < args.m;) {
      const int rows = block_rows(args.m, i, kMaxRows);
      prepare(args, i, rows, k_begin, k_count, &wide);
      prefetch_rows(args, i + rows, kMaxRows, int64_t{k_begin} * 2, int64_t{k_count} * 2);
      kRowBlocks[rows - 1](wide, chunk, k_count / 2, k_begin == 0, args.c + i * args.c_stride,
                           args.c_stride, {after, i == 0 ? kStepBytes : 0});
      i += rows;
    }
  }
}

}  // namespace kt
