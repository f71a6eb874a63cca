// GEMM of expanded panels on AVX-512 VNNI, one function for each form of scales: 4 k of codes in a
// step, fp32 scales behind the codes, behind them what the form has.
#include "kernels/x86/groups_avx512vnni.h"

namespace kt {
namespace {

struct Offsets {
  static constexpr Form kForm = Form::kOffset;
};
struct Zeros {
  static constexpr Form kForm = Form::kZero;
};
struct Minima {
  static constexpr Form kForm = Form::kMinimum;
};
struct Columns {
  static constexpr Form kForm = Form::kColumn;
};

// Folds a group of two lines, whose scales are at `at`, and their zeros or minima at `more`.
template <typename Scales, int kRows>
[[gnu::always_inline]] inline void fold_expanded(Tile<kRows, 2>& tile, const uint8_t* at,
                                                 const uint8_t* more, const RowScales<kRows>& rows,
                                                 int64_t group) {
  unroll<2>([&](auto line) KT_INLINE {
    constexpr int j = line.value;
    if constexpr (Scales::kForm == Form::kZero)
      tile.template take_zero<j>(load_line(more, j), rows, group);
    tile.template fold_scale<j>(_mm512_load_ps(at + 64 * j));
    if constexpr (Scales::kForm == Form::kMinimum)
      tile.template fold_minimum<j>(_mm512_load_ps(more + 64 * j), rows, group);
  });
}

// Reads 32 columns of the scratch of ExpandFn. If kPrefetch, fetches a line a step of the next
// panel, which is packed: half as long or more. The second half of the columns fetches the next
// rows.
template <typename Scales, int kRows, bool kPrefetch>
[[gnu::noinline]] void run_expanded(const GemmArgs& args, const RowBlock& block, int first_line,
                                    const uint8_t* next) {
  constexpr int64_t kGroupBytes = 4 * kPanelColumns;
  const int row = block.row;
  const int offset =
      Scales::kForm == Form::kZero || Scales::kForm == Form::kMinimum ? 0 : args.code_offset;
  const int64_t group_lines =
      first_line > 0 ? next_row_lines_of_group(args, block, kRows) : int64_t{0};
  const int64_t groups = (args.k + args.group_size - 1) / args.group_size;
  Tile<kRows, 2> tile;
  RowScales<kRows> rows(args, row);
  tile.start(args, row);
  const uint8_t* next_rows = tile.a[0] + kRows * args.a_stride_bytes;
  const uint8_t* panel = args.panel + 64 * first_line;
  const uint8_t* scales = panel + int64_t{kPanelColumns} * args.k;
  int64_t k = 0;
  int64_t group = 0;
  for (int64_t index = 0; k < args.k; ++index) {
    const int64_t block_end = k + args.a_block < args.k ? k + args.a_block : args.k;
    tile.start_block();
    for (; k < block_end; ++group, scales += kGroupBytes) {
      const int64_t k_end = k + args.group_size < block_end ? k + args.group_size : block_end;
      tile.start_group(rows, group, offset);
      for (; k < k_end; k += 4, panel += kStepBytes) {
        if constexpr (kPrefetch) {
          _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
          next += 64;
        }
        const Int32x16 codes[2] = {as_int32(_mm512_load_si512(panel)),
                                   as_int32(_mm512_load_si512(panel + 64))};
        tile.template add<0>(codes, k);
      }
      fold_expanded<Scales>(tile, scales, scales + groups * kGroupBytes, rows, group);
      next_rows = prefetch_lines(next_rows, group_lines);
    }
    tile.end_block(args, row, first_line, rows, index);
  }
  if constexpr (Scales::kForm == Form::kColumn)
    scale_columns<kRows, 2>(args, row, first_line, scales);
}

// 6 x 32: the integer sums and the fp32 sums take 24 registers.
template <typename Scales>
struct ExpandedTile {
  template <int kRows>
  static void run(const GemmArgs& args, const RowBlock& block) {
    if (block.index == 0 && args.next_panel != nullptr) {
      // The two halves of the columns fetch one half of the next panel each.
      const int64_t half_bytes = 32 * int64_t{args.k} / 2;
      run_expanded<Scales, kRows, true>(args, block, 0, args.next_panel);
      run_expanded<Scales, kRows, true>(args, block, 2, args.next_panel + half_bytes);
    } else {
      run_expanded<Scales, kRows, false>(args, block, 0, nullptr);
      run_expanded<Scales, kRows, false>(args, block, 2, nullptr);
    }
  }
};

}  // namespace

void gemm_s8_int4x_fp32_6x32x4_avx512vnni(const GemmArgs& args) {
  for_each_row_block<ExpandedTile<Offsets>, 6>(args);
}
void gemm_s8_int4zx_fp32_6x32x4_avx512vnni(const GemmArgs& args) {
  for_each_row_block<ExpandedTile<Zeros>, 6>(args);
}
void gemm_s8_int4mx_fp32_6x32x4_avx512vnni(const GemmArgs& args) {
  for_each_row_block<ExpandedTile<Minima>, 6>(args);
}
void gemm_s8_fp4cx_fp32_6x32x4_avx512vnni(const GemmArgs& args) {
  for_each_row_block<ExpandedTile<Columns>, 6>(args);
}

}  // namespace kt
