// int4 GEMM on AVX-512 VNNI: weights as unsigned codes + 8, activations signed. The excess of 8
// leaves as -8 * group_sum, the first value of each group's integer sum. After a group, its sum is
// folded into the fp32 result with the scale.
#include "kernels/x86/gemm_avx512.h"

namespace kt {
namespace {

// kRows rows of activations and the results of kRows x kLines * 16 columns.
template <int kRows, int kLines>
struct Tile {
  const uint8_t* a[kRows];
  __m512 total[kRows][kLines];
  Int32x16 sum[kRows][kLines];

  inline void start(const GemmArgs& args, int row, const int32_t* (&group_sum)[kRows]) {
    start_fp32_tile(args, row, a, total);
    start_group_sums(args, row, group_sum);
  }

  inline void start_group(const int32_t* (&group_sum)[kRows], int64_t group) {
    // Keeps the pointers in memory: in registers over the k-steps they drive vectors out.
    asm volatile("" : "+m"(group_sum));
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const Int32x16 first = as_int32(_mm512_set1_epi32(-8 * group_sum[i][group]));
#pragma GCC unroll 4
      for (int j = 0; j < kLines; ++j) sum[i][j] = first;
    }
  }

  // w [kLines] holds 4 k of each column.
  inline void add(const Int32x16 (&w)[kLines], int64_t k) {
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const __m512i codes = broadcast_4_bytes(a[i] + k);
#pragma GCC unroll 4
      for (int j = 0; j < kLines; ++j) {
        sum[i][j] = as_int32(_mm512_dpbusd_epi32(as_bits(sum[i][j]), as_bits(w[j]), codes));
      }
    }
  }

  inline void fold_group(int j, __m512 scale) {
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
      total[i][j] = _mm512_fmadd_ps(to_float(sum[i][j]), scale, total[i][j]);
  }
};

// The share of a group of k in the lines of next_row_lines(), rounded up. At most what a core keeps
// in flight: a group may be the whole row.
inline int64_t next_row_lines_of_group(const GemmArgs& args, const RowBlock& block, int rows) {
  constexpr int64_t kInFlight = 24;
  const int64_t lines = next_row_lines(args, block, rows, args.k / 8);
  const int64_t share = (lines * args.group_size + args.k - 1) / args.k;
  return share < kInFlight ? share : kInFlight;
}

inline const uint8_t* prefetch_lines(const uint8_t* source, int64_t lines) {
  for (; lines > 0; --lines, source += 64)
    _mm_prefetch(reinterpret_cast<const char*>(source), _MM_HINT_T0);
  return source;
}

// Reads the packed panel, 8 k in a step, low nibbles first, and all 64 columns: one ascending
// stream. If kPrefetch, fetches two lines a step of the next panel; after each group, its share of
// the next rows.
template <int kRows, bool kPrefetch>
inline void run_packed(const GemmArgs& args, const RowBlock& block, const uint8_t* next) {
  const int row = block.row;
  const int64_t group_lines = next_row_lines_of_group(args, block, kRows);
  Tile<kRows, 4> tile;
  const int32_t* group_sum[kRows];
  tile.start(args, row, group_sum);
  const uint8_t* next_rows = tile.a[0] + kRows * args.a_stride_bytes;
  const uint8_t* panel = args.panel;
  int64_t k = 0;
  for (int64_t group = 0; k < args.k; ++group) {
    const int64_t k_end = k + args.group_size < args.k ? k + args.group_size : args.k;
    tile.start_group(group_sum, group);
    for (; k < k_end; k += 8, panel += kStepBytes) {
      if constexpr (kPrefetch) {
        prefetch_two_lines(next);
        next += kStepBytes;
      }
      Int32x16 low[4];
      Int32x16 high[4];
      load_int4_step(panel, low, high);
      tile.add(low, k);
      tile.add(high, k + 4);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) tile.fold_group(j, load_bf16_scales(panel + 32 * j));
    panel += 2 * kPanelColumns;
    if constexpr (kPrefetch) {
      prefetch_two_lines(next);
      next += 2 * kPanelColumns;
    }
    next_rows = prefetch_lines(next_rows, group_lines);
  }
  store_int4_tile(args, row, 0, tile.total);
}

// 3 x 64: the integer sums and the fp32 results take 24 registers, the unpacked weights of a step
// the other 8.
struct PackedTile {
  template <int kRows>
  static void run(const GemmArgs& args, const RowBlock& block) {
    if (const uint8_t* next = prefetch_source(args, block)) {
      run_packed<kRows, true>(args, block, next);
    } else {
      run_packed<kRows, false>(args, block, nullptr);
    }
  }
};

// Reads 32 columns of the scratch of ExpandFn: 4 k in a step, fp32 scales behind the codes. If
// kPrefetch, fetches a line a step of the next panel, which is packed and so half as long. The
// second half of the columns fetches the next rows.
template <int kRows, bool kPrefetch>
inline void run_expanded(const GemmArgs& args, const RowBlock& block, int first_line,
                         const uint8_t* next) {
  const int row = block.row;
  const int64_t group_lines =
      first_line > 0 ? next_row_lines_of_group(args, block, kRows) : int64_t{0};
  Tile<kRows, 2> tile;
  const int32_t* group_sum[kRows];
  tile.start(args, row, group_sum);
  const uint8_t* next_rows = tile.a[0] + kRows * args.a_stride_bytes;
  const uint8_t* panel = args.panel + 64 * first_line;
  const uint8_t* scales = panel + int64_t{kPanelColumns} * args.k;
  int64_t k = 0;
  for (int64_t group = 0; k < args.k; ++group, scales += 4 * kPanelColumns) {
    const int64_t k_end = k + args.group_size < args.k ? k + args.group_size : args.k;
    tile.start_group(group_sum, group);
    for (; k < k_end; k += 4, panel += kStepBytes) {
      if constexpr (kPrefetch) {
        _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
        next += 64;
      }
      const Int32x16 codes[2] = {as_int32(_mm512_load_si512(panel)),
                                 as_int32(_mm512_load_si512(panel + 64))};
      tile.add(codes, k);
    }
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) tile.fold_group(j, _mm512_load_ps(scales + 64 * j));
    next_rows = prefetch_lines(next_rows, group_lines);
  }
  store_int4_tile(args, row, first_line, tile.total);
}

// 6 x 32: the integer sums and the fp32 results take 24 registers.
struct ExpandedTile {
  template <int kRows>
  static void run(const GemmArgs& args, const RowBlock& block) {
    if (block.index == 0 && args.next_panel != nullptr) {
      // The two halves of the columns fetch one half of the next panel each.
      const int64_t half_bytes = 32 * int64_t{args.k} / 2;
      run_expanded<kRows, true>(args, block, 0, args.next_panel);
      run_expanded<kRows, true>(args, block, 2, args.next_panel + half_bytes);
    } else {
      run_expanded<kRows, false>(args, block, 0, nullptr);
      run_expanded<kRows, false>(args, block, 2, nullptr);
    }
  }
};

}  // namespace

void gemm_s8_int4_fp32_3x64x8_avx512vnni(const GemmArgs& args) {
  for_each_row_block<PackedTile, 3>(args);
}

void gemm_s8_int4x_fp32_6x32x4_avx512vnni(const GemmArgs& args) {
  for_each_row_block<ExpandedTile, 6>(args);
}

}  // namespace kt
