// int8 GEMM on AVX-VNNI: activations as unsigned bytes (code + 128), weights signed, 6 rows x 16
// columns a tile. The sums begin at the panel's compensation.
#include "kernels/x86/gemm_avxvnni.h"

namespace kt {
namespace {

constexpr int kMaxRows = 6;  // 6 rows x 2 vectors: 12 of 16 registers accumulate
constexpr int kChunk = 256;  // 16 KB of panel: stays in L1 for all row blocks

// Where the sums of a row block begin: the panel's compensation, the same for each row, or what the
// chunk before left.
struct Start {
  const int32_t* sums;
  int64_t stride;
};

template <int kRows>
void tile(const uint8_t* const (&a)[kRows], const uint8_t* panel, int steps, int column,
          Start start, int32_t* sums, int64_t stride, Prefetch prefetch) {
  constexpr int kVectors = tile_vectors(kRows);
  Int32x8 acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      acc[r][v] = as_int32(load_bytes(start.sums + r * start.stride + column + v * 8));
  }
  const uint8_t* lines = panel + column * 4;
  for (int64_t s = 0; s < steps; ++s, lines += kStepBytes) {
    prefetch.step<kRows>(lines, s, column);
    if constexpr (kRows == 1) {
      const __m256i codes = broadcast_dword(a[0] + s * 4);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        acc[0][v] = dot(acc[0][v], codes, load_bytes(lines + v * 32));
    } else {
      __m256i w[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) w[v] = load_bytes(lines + v * 32);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m256i codes = broadcast_dword(a[r] + s * 4);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) acc[r][v] = dot(acc[r][v], codes, w[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      store_bytes(sums + r * stride + column + v * 8, as_bits(acc[r][v]));
  }
}

// Rows begin .. begin + kRows of the columns of k in [k_begin, k_begin + 4 * steps).
template <int kRows>
void row_block(const GemmArgs& args, int begin, int k_begin, int steps, Prefetch prefetch) {
  const uint8_t* a[kRows];
  for (int r = 0; r < kRows; ++r) a[r] = activation_row(args, begin + r) + k_begin;
  int32_t* sums = reinterpret_cast<int32_t*>(args.c) + begin * args.c_stride;
  const uint8_t* tail = args.panel + int64_t{args.k} * kPanelColumns;
  const Start start =
      k_begin == 0 ? Start{reinterpret_cast<const int32_t*>(tail), 0} : Start{sums, args.c_stride};
  const uint8_t* panel = args.panel + int64_t{k_begin} * kPanelColumns;
  for (int column = 0; column < kPanelColumns; column += tile_vectors(kRows) * 8)
    tile<kRows>(a, panel, steps, column, start, sums, args.c_stride, prefetch);
}

using RowBlockFn = void (*)(const GemmArgs&, int, int, int, Prefetch);
constexpr RowBlockFn kRowBlocks[kMaxRows] = {row_block<1>, row_block<2>, row_block<3>,
                                             row_block<4>, row_block<5>, row_block<6>};

}  // namespace

void gemm_u8_int8_fp32_6x16x4_avxvnni(const GemmArgs& args) {
  for (int k_begin = 0; k_begin < args.k; k_begin += kChunk) {
    const int k_count = args.k - k_begin < kChunk ? args.k - k_begin : kChunk;
    const uint8_t* chunk = args.panel + int64_t{k_begin} * kPanelColumns;
    const uint8_t* after = chunk + int64_t{k_count} * kPanelColumns;
    if (k_begin + k_count == args.k) after = args.next_panel != nullptr ? args.next_panel : chunk;
    for (int i = 0; i < args.m;) {
      const int rows = block_rows(args.m, i, kMaxRows);
      prefetch_rows(args, i + rows, kMaxRows, k_begin, k_count);
      kRowBlocks[rows - 1](args, i, k_begin, k_count / 4, {after, i == 0 ? kStepBytes : 0});
      i += rows;
    }
  }
  scale_int8_sums(args);
}

}  // namespace kt
