// int4 GEMM in AMX tiles, for a scale a row or for groups of several products: activations signed,
// weights as unsigned codes + 8 out of the scratch of expand_int4_avx512. The excess leaves as -8 *
// group_sum. The sums of a group leave the tiles at its end and are folded into fp32 while the next
// group multiplies.
#include "kernels/x86/gemm_amx.h"

namespace kt {
namespace {

constexpr int kShorter = 2;  // the packed panel is half as long as its scratch

// One Part of a panel: its sums of the last group, which are still to be folded, and its fp32 sums.
struct GroupSums {
  Sums<int32_t> group[2];
  Sums<float> total;
};

// total = fma(float(sum - 8 * group_sum), scale, total)
void fold_group(const GemmArgs& args, const Part& part, int64_t group, const uint8_t* scales,
                const Sums<int32_t>& sums, Sums<float>* total) {
  const uint8_t* const scale = scales + 4 * (group * kPanelColumns + part.column);
  for (int i = 0; i < part.rows; ++i) {
    const int64_t row = scale_row(args, part.row + i);
    const __m512i excess =
        _mm512_set1_epi32(-8 * args.a_group_sum[row * args.a_group_sum_stride + group]);
    for (int j = 0; j < part.columns; j += kLineColumns) {
      const int at = i * part.columns + j;
      const __m512 sum =
          _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_load_si512(sums.values + at), excess));
      const __m512 before = group == 0 ? _mm512_setzero_ps() : _mm512_load_ps(total->values + at);
      _mm512_store_ps(total->values + at,
                      _mm512_fmadd_ps(sum, _mm512_load_ps(scale + 4 * j), before));
    }
  }
}

void multiply_part(const GemmArgs& args, const Part& part, const uint8_t*& next) {
  const int64_t chunks = args.k / kTileBytes;
  const int64_t group_chunks = args.group_size / kTileBytes;
  const uint8_t* const scales = args.panel + int64_t{args.k} * kPanelColumns;
  GroupSums sums;
  int64_t group = 0;
  for (int64_t begin = 0; begin < chunks; begin += group_chunks, ++group) {
    const int64_t count = chunks - begin < group_chunks ? chunks - begin : group_chunks;
    const uint8_t* const upper = packed_rows(args, part.row, chunks) + begin * kPackedTile;
    const uint8_t* const b = args.panel + begin * kChunkBytes + 4 * part.column;
    add_products<S8U8, kShorter>(part, upper, chunks * kPackedTile, b, count, next);
    if (group > 0) {
      fold_group(args, part, group - 1, scales, sums.group[(group - 1) & 1], &sums.total);
    }
    store_sums(part, &sums.group[group & 1]);
  }
  fold_group(args, part, group - 1, scales, sums.group[(group - 1) & 1], &sums.total);
  store_scaled(args, part, sums.total);
}

}  // namespace

void gemm_s8_int4x_fp32_32x64x4_amxint8(const GemmArgs& args) {
  const uint8_t* next = args.next_panel;
  for (int row = 0; row < args.m; row += kBlockRows) {
    const int rows = args.m - row < kBlockRows ? args.m - row : kBlockRows;
    const int width = rows > kTileRows ? 32 : 64;
    for (int column = 0; column < kPanelColumns; column += width)
      multiply_part(args, {row, rows, column, width}, next);
    next = nullptr;
  }
}

}  // namespace kt
