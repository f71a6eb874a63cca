// GEMM for groups of integers on AVX-512 VNNI: weights as unsigned codes, activations signed. What
// a code has too much leaves as -offset * group_sum, the first value of each group's integer sum.
// After a group, its sum is folded into the fp32 sum of the block of activations with the scale;
// after a block, that into c. Everything is in an anonymous namespace.
#pragma once

#include "kernels/x86/codes_avx512.h"

namespace kt {
namespace {

// The sums and scales of kRows rows of activations. Not in Tile: these pointers shall stay in
// memory, since in registers over the k-steps they drive vectors out.
template <int kRows>
struct RowScales {
  const int32_t* group_sum[kRows];
  const float* a_scale[kRows];

  RowScales(const GemmArgs& args, int row) {
    const int64_t stride = args.a_block < args.k ? args.a_scale_stride : 1;
    for (int i = 0; i < kRows; ++i) {
      const int64_t index = row_index(args, row + i);
      group_sum[i] = args.a_group_sum + index * args.a_group_sum_stride;
      a_scale[i] = args.a_scale + index * stride;
    }
  }
  [[gnu::always_inline]] inline void forget() { asm volatile("" : "+m"(*this)); }
};

// kRows rows of activations and the sums of kRows x kLines * 16 columns.
template <int kRows, int kLines>
struct Tile {
  const uint8_t* a[kRows];
  __m512 total[kRows][kLines];
  Int32x16 sum[kRows][kLines];

  // body(i, j) for each row and line.
  template <typename Body>
  [[gnu::always_inline]] static inline void for_each(const Body& body) {
    unroll<kRows>([&](auto i) KT_INLINE { unroll<kLines>([&](auto j) KT_INLINE { body(i, j); }); });
  }

  [[gnu::always_inline]] inline void start(const GemmArgs& args, int row) {
    unroll<kRows>([&](auto i) KT_INLINE { a[i.value] = row_pointer(args, row + i.value); });
  }

  // At the start of each block: totals that lived on from the one before would be spilled.
  [[gnu::always_inline]] inline void start_block() {
    for_each([&](auto i, auto j) KT_INLINE { total[i.value][j.value] = _mm512_setzero_ps(); });
  }

  [[gnu::always_inline]] inline void start_group(RowScales<kRows>& rows, int64_t group,
                                                 int offset) {
    rows.forget();
    unroll<kRows>([&](auto i) KT_INLINE {
      const Int32x16 first =
          offset == 0 ? Int32x16{}
                      : as_int32(_mm512_set1_epi32(-offset * rows.group_sum[i.value][group]));
      unroll<kLines>([&](auto j) KT_INLINE { sum[i.value][j.value] = first; });
    });
  }

  // w [kCount] holds 4 k of each column of the lines from kFirst on.
  template <int kFirst, int kCount>
  [[gnu::always_inline]] inline void add(const Int32x16 (&w)[kCount], int64_t k) {
    unroll<kRows>([&](auto i) KT_INLINE {
      const __m512i codes = broadcast_4_bytes(a[i.value] + k);
      unroll<kCount>([&](auto j) KT_INLINE {
        Int32x16& s = sum[i.value][kFirst + j.value];
        s = as_int32(_mm512_dpbusd_epi32(as_bits(s), as_bits(w[j.value]), codes));
      });
    });
  }

  template <int kLine>
  [[gnu::always_inline]] inline void fold_scale(__m512 scale) {
    unroll<kRows>([&](auto i) KT_INLINE {
      __m512& t = total[i.value][kLine];
      t = _mm512_fmadd_ps(to_float(sum[i.value][kLine]), scale, t);
    });
  }

  // sum -= zero * group_sum
  template <int kLine>
  [[gnu::always_inline]] inline void take_zero(Int32x16 zero, const RowScales<kRows>& rows,
                                               int64_t group) {
    unroll<kRows>([&](auto i) KT_INLINE {
      sum[i.value][kLine] -= zero * as_int32(_mm512_set1_epi32(rows.group_sum[i.value][group]));
    });
  }

  template <int kLine>
  [[gnu::always_inline]] inline void fold_minimum(__m512 minimum, const RowScales<kRows>& rows,
                                                  int64_t group) {
    unroll<kRows>([&](auto i) KT_INLINE {
      const __m512 of_row = to_float(as_int32(_mm512_set1_epi32(rows.group_sum[i.value][group])));
      total[i.value][kLine] = _mm512_fmadd_ps(of_row, minimum, total[i.value][kLine]);
    });
  }

  // The end of block `index` of the activations, from line `first_line` of the panel on: c = total
  // * a_scale, or what the blocks before it gave plus that.
  [[gnu::always_inline]] inline void end_block(const GemmArgs& args, int row, int first_line,
                                               RowScales<kRows>& rows, int64_t index) {
    rows.forget();
    float* const c = args.c + row * args.c_stride + kLineColumns * first_line;
    if (index == 0) {
      for_each([&](auto i, auto j) KT_INLINE {
        const __m512 scale = _mm512_set1_ps(*rows.a_scale[i.value]);
        _mm512_storeu_ps(c + i.value * args.c_stride + kLineColumns * j.value,
                         _mm512_mul_ps(total[i.value][j.value], scale));
      });
    } else {
      for_each([&](auto i, auto j) KT_INLINE {
        float* const line = c + i.value * args.c_stride + kLineColumns * j.value;
        const __m512 scale = _mm512_set1_ps(rows.a_scale[i.value][index]);
        _mm512_storeu_ps(line,
                         _mm512_fmadd_ps(total[i.value][j.value], scale, _mm512_loadu_ps(line)));
      });
    }
  }
};

// c *= t, a scale a column.
template <int kRows, int kLines>
[[gnu::noinline]] void scale_columns(const GemmArgs& args, int row, int first_line,
                                     const uint8_t* t) {
#pragma GCC unroll 4
  for (int j = 0; j < kLines; ++j) {
    const __m512 scale = _mm512_load_ps(t + 64 * j);
    for (int i = 0; i < kRows; ++i) {
      float* const c = args.c + (row + i) * args.c_stride + kLineColumns * (first_line + j);
      _mm512_storeu_ps(c, _mm512_mul_ps(_mm512_loadu_ps(c), scale));
    }
  }
}

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

// One step of codes, 4 k at a time, of all columns or of one half after the other.
//
// One row is all reading, and codes of 3, 5 and 6 bits read their lines out of order (those of the
// low bits, of the high bits, and the low ones again), which the caches' prefetch does not follow:
// so each step asks for its lines in their order first. Decode through 256 MB on Zen 4, share of
// the read bandwidth without and with: Q6_K 0.76 and 0.92, Q5_K 0.73 and 0.92; Q3_K 1.05 times the
// speed. Codes in four lines are read in order, and gain nothing.
template <typename Codes, int kRows>
[[gnu::always_inline]] inline void add_step(Tile<kRows, 4>& tile, const uint8_t* step, int64_t k) {
  constexpr int kCount = kRows == 3 ? Codes::kLinesAtOnce : 4;
  if constexpr (kRows == 1 && Codes::kLines != 4) {
    unroll<Codes::kLines>([&](auto i) KT_INLINE {
      _mm_prefetch(reinterpret_cast<const char*>(step + 64 * i.value), _MM_HINT_T0);
    });
    asm volatile("" ::: "memory");  // and not after the loads
  }
  unroll<Codes::kStepK / 4>([&](auto unit) KT_INLINE {
    unroll<4 / kCount>([&](auto half) KT_INLINE {
      constexpr int kFirst = half.value * kCount;
      // The second half reads the activations anew: kept, they drive sums out.
      if constexpr (kFirst > 0) asm("" : "+r"(k));
      Int32x16 w[kCount];
      unroll<kCount>([&](auto j) KT_INLINE {
        w[j.value] = Codes::template load<unit.value>(step, kFirst + j.value);
      });
      tile.template add<kFirst>(w, k + 4 * unit.value);
    });
  });
}

// Folds a group of a packed panel, whose scales are at `at` and whose block's at `block`.
template <typename Scales, int kRows>
[[gnu::always_inline]] inline void fold_packed(Tile<kRows, 4>& tile, const uint8_t* at,
                                               const uint8_t* block, const RowScales<kRows>& rows,
                                               int64_t group) {
  unroll<4>([&](auto line) KT_INLINE {
    constexpr int j = line.value;
    if constexpr (Scales::kForm == Form::kZero)
      tile.template take_zero<j>(Scales::zero(at, j), rows, group);
    tile.template fold_scale<j>(Scales::scale(at, block, j));
    if constexpr (Scales::kForm == Form::kMinimum)
      tile.template fold_minimum<j>(Scales::minimum(at, block, j), rows, group);
  });
}

// Reads the packed panel, all 64 columns: one ascending stream. If kPrefetch, fetches half of the
// next panel; after each group, its share of the next rows.
template <typename Codes, typename Scales, int kRows, bool kPrefetch>
[[gnu::noinline]] void run_packed(const GemmArgs& args, const RowBlock& block,
                                  const uint8_t* next) {
  constexpr int kCodeBytes = 64 * Codes::kLines;
  constexpr int kOffset = code_offset_of<Codes, Scales>();
  const int row = block.row;
  const int64_t group_lines = next_row_lines_of_group(args, block, kRows);
  Tile<kRows, 4> tile;
  RowScales<kRows> rows(args, row);
  tile.start(args, row);
  const uint8_t* next_rows = tile.a[0] + kRows * args.a_stride_bytes;
  const uint8_t* panel = args.panel;
  const uint8_t* block_scales = nullptr;
  int64_t k = 0;
  int64_t group = 0;
  for (int64_t index = 0; k < args.k; ++index) {
    const int64_t block_end = k + args.a_block < args.k ? k + args.a_block : args.k;
    tile.start_block();
    for (; k < block_end; ++group) {
      if (Scales::kBlockBytes > 0 && k % kBlockK == 0) {
        block_scales = panel;
        panel += Scales::kBlockBytes;
        if constexpr (kPrefetch) next += Scales::kBlockBytes;
      }
      const int64_t k_end = k + args.group_size < block_end ? k + args.group_size : block_end;
      tile.start_group(rows, group, kOffset);
      for (; k < k_end; k += Codes::kStepK, panel += kCodeBytes) {
        if constexpr (kPrefetch) {
          prefetch_half<Codes::kLines>(next);
          next += kCodeBytes;
        }
        add_step<Codes>(tile, panel, k);
      }
      fold_packed<Scales>(tile, panel, block_scales, rows, group);
      panel += Scales::kBytes;
      if constexpr (kPrefetch) {
        prefetch_half<4>(next);
        next += Scales::kBytes;
      }
      next_rows = prefetch_lines(next_rows, group_lines);
    }
    tile.end_block(args, row, 0, rows, index);
  }
  if constexpr (Scales::kForm == Form::kColumn) scale_columns<kRows, 4>(args, row, 0, panel);
}

// 3 x 64: the integer sums and the fp32 sums take 24 registers, the unpacked weights of a step the
// other 8.
template <typename Codes, typename Scales>
struct PackedTile {
  template <int kRows>
  static void run(const GemmArgs& args, const RowBlock& block) {
    if (const uint8_t* next = prefetch_source<Codes::kLines>(args, block)) {
      run_packed<Codes, Scales, kRows, true>(args, block, next);
    } else {
      run_packed<Codes, Scales, kRows, false>(args, block, nullptr);
    }
  }
};

template <typename Codes, typename Scales>
inline void multiply_packed(const GemmArgs& args) {
  for_each_row_block<PackedTile<Codes, Scales>, 3>(args);
}

}  // namespace
}  // namespace kt
