// What the AVX-512 GEMM kernels share: accumulator types, rows, the split into register tiles. No
// other ISA's file includes it. Everything is in an anonymous namespace, so no instance of it can
// be linked into baseline code.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/kernel.h"

namespace kt {
namespace {

// int32 accumulators. Not __m512i: g++ keeps a second copy of such an accumulator around each
// dot-product intrinsic and spills every tile of more than 16 of them, at half the speed.
typedef int32_t Int32x16 __attribute__((vector_size(64)));
typedef int16_t Int16x32 __attribute__((vector_size(64)));

// Columns of one 64-byte line, and bytes of the four lines of a k-step.
constexpr int kLineColumns = 16;
constexpr int kStepBytes = 256;

inline Int32x16 as_int32(__m512i bits) { return reinterpret_cast<Int32x16>(bits); }
inline Int16x32 as_int16(__m512i bits) { return reinterpret_cast<Int16x32>(bits); }
inline __m512i as_bits(Int16x32 value) { return reinterpret_cast<__m512i>(value); }
inline __m512i as_bits(Int32x16 value) { return reinterpret_cast<__m512i>(value); }

// Vector operators stand where g++ 12's intrinsic reads an "undefined" vector and so warns (GCC bug
// 105593).
inline __m512 to_float(Int32x16 value) { return __builtin_convertvector(value, __m512); }
inline __m512i shift_left_16(__m512i lanes) { return as_bits(as_int32(lanes) << 16); }

// body(Index<0>) .. body(Index<kCount - 1>), all inlined before anything else is done: sums that a
// loop with an index has touched may stay in memory (g++ 12, 2 rows of 4-bit codes).
template <int kIndex>
struct Index {
  static constexpr int value = kIndex;
};
template <int kCount, int kIndex = 0, typename Body>
[[gnu::always_inline]] inline void unroll(const Body& body) {
  if constexpr (kIndex < kCount) {
    body(Index<kIndex>{});
    unroll<kCount, kIndex + 1>(body);
  }
}
#define KT_INLINE __attribute__((always_inline))

inline int32_t row_index(const GemmArgs& args, int i) {
  return args.row_idx != nullptr ? args.row_idx[i] : i;
}

inline const uint8_t* row_pointer(const GemmArgs& args, int i) {
  return static_cast<const uint8_t*>(args.a) + row_index(args, i) * args.a_stride_bytes;
}

// 16 bf16 scales, one line of columns, as fp32.
inline __m512 load_bf16_scales(const uint8_t* source) {
  const __m256i bf16 = _mm256_load_si256(reinterpret_cast<const __m256i*>(source));
  return _mm512_castsi512_ps(shift_left_16(_mm512_maskz_cvtepu16_epi32(0xffff, bf16)));
}

// One packed int4 k-step: the codes + 8 of its first and of its last 4 k, a line of columns each.
inline void load_int4_step(const uint8_t* panel, Int32x16 (&low)[4], Int32x16 (&high)[4]) {
  const Int32x16 nibble = as_int32(_mm512_set1_epi8(0x0f));
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Int32x16 codes = as_int32(_mm512_load_si512(panel + 64 * j));
    low[j] = codes & nibble;
    high[j] = (codes >> 4) & nibble;
  }
}

// The same 4 bytes in each of 16 lanes.
inline __m512i broadcast_4_bytes(const uint8_t* source) {
  int32_t bytes;
  __builtin_memcpy(&bytes, source, sizeof bytes);
  return _mm512_set1_epi32(bytes);
}

// One register tile of work: rows [row, row + rows) of args, number `index` of `count` tiles of the
// panel.
struct RowBlock {
  int row;
  int index;
  int count;
};

// Cuts args.m rows into the fewest blocks of at most kMaxRows, of nearly equal size (7 = 4 + 3),
// and calls Tile::run<rows>(args, block) for each.
template <typename Tile, int kMaxRows>
inline void for_each_row_block(const GemmArgs& args) {
  static_assert(kMaxRows >= 1 && kMaxRows <= 6);
  RowBlock block = {0, 0, (args.m + kMaxRows - 1) / kMaxRows};
  for (; block.index < block.count; ++block.index) {
    const int rows = (args.m - block.row) / (block.count - block.index);
    switch (rows) {
      case 1: Tile::template run<1>(args, block); break;
      case 2:
        if constexpr (kMaxRows >= 2) Tile::template run<2>(args, block);
        break;
      case 3:
        if constexpr (kMaxRows >= 3) Tile::template run<3>(args, block);
        break;
      case 4:
        if constexpr (kMaxRows >= 4) Tile::template run<4>(args, block);
        break;
      case 5:
        if constexpr (kMaxRows >= 5) Tile::template run<5>(args, block);
        break;
      default:
        if constexpr (kMaxRows >= 6) Tile::template run<6>(args, block);
        break;
    }
    block.row += rows;
  }
}

// The start of an fp32 tile: where its rows of activations begin, and results of zero.
template <int kRows, int kLines>
inline void start_fp32_tile(const GemmArgs& args, int row, const uint8_t* (&a)[kRows],
                            __m512 (&total)[kRows][kLines]) {
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    a[i] = row_pointer(args, row + i);
#pragma GCC unroll 4
    for (int j = 0; j < kLines; ++j) total[i][j] = _mm512_setzero_ps();
  }
}

// The sums of the rows' activation codes, group by group (int4).
template <int kRows>
inline void start_group_sums(const GemmArgs& args, int row, const int32_t* (&group_sum)[kRows]) {
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
    group_sum[i] = args.a_group_sum + row_index(args, row + i) * args.a_group_sum_stride;
}

// The end of a bf16 tile: c = acc.
template <int kRows>
inline void store_bf16_tile(const GemmArgs& args, int row, const __m512 (&acc)[kRows][4]) {
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    float* c = args.c + (row + i) * args.c_stride;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) _mm512_storeu_ps(c + kLineColumns * j, acc[i][j]);
  }
}

// The end of block `index` of the activations, in a tile of 16 * kLines columns from line
// `first_line` on: c = total * a_scale, or what the blocks before it gave plus that.
template <int kRows, int kLines>
inline void store_block(const GemmArgs& args, int row, int first_line, int64_t index,
                        const __m512 (&total)[kRows][kLines]) {
  const int64_t stride = args.a_block < args.k ? args.a_scale_stride : 1;
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    const float* const scales = args.a_scale + row_index(args, row + i) * stride;
    const __m512 a_scale = _mm512_set1_ps(scales[index]);
    float* c = args.c + (row + i) * args.c_stride + kLineColumns * first_line;
    if (index == 0) {
#pragma GCC unroll 4
      for (int j = 0; j < kLines; ++j)
        _mm512_storeu_ps(c + kLineColumns * j, _mm512_mul_ps(total[i][j], a_scale));
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < kLines; ++j) {
        const __m512 before = _mm512_loadu_ps(c + kLineColumns * j);
        _mm512_storeu_ps(c + kLineColumns * j, _mm512_fmadd_ps(total[i][j], a_scale, before));
      }
    }
  }
}

// The end of an int8 tile: c = (float(acc) * w_scale) * a_scale, in this order.
template <int kRows>
inline void store_int8_tile(const GemmArgs& args, int row, const Int32x16 (&acc)[kRows][4],
                            const uint8_t* w_scale) {
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    const __m512 a_scale = _mm512_set1_ps(args.a_scale[row_index(args, row + i)]);
    float* c = args.c + (row + i) * args.c_stride;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512 scaled = _mm512_mul_ps(to_float(acc[i][j]), _mm512_load_ps(w_scale + 64 * j));
      _mm512_storeu_ps(c + kLineColumns * j, _mm512_mul_ps(scaled, a_scale));
    }
  }
}

// Where the block fetches the next panel into the L2 from, or null. The first two blocks of a panel
// bring in two of the four lines of a k-step each, so all of it is there when its turn comes. With
// a single block the caches' own prefetch of one ascending stream is faster: two or four lines a
// k-step cost up to 40 % at 5 and 6 rows (measured on Zen4).
// kLines: those of a k-step, if not four.
template <int kLines = 4>
inline const uint8_t* prefetch_source(const GemmArgs& args, const RowBlock& block) {
  const bool worthwhile = block.count >= 2 && block.index < 2 && args.next_panel != nullptr;
  return worthwhile ? args.next_panel + 64 * (kLines / 2) * block.index : nullptr;
}

// Asks for kLines lines 4 KB ahead in the panel, into the L2: with one row the loads are all the
// work, and alone they leave 3 to 5 % of the read bandwidth (int8, one token, Zen 4: 0.85 of it
// with one thread and 0.95 with two, 0.89 and 0.98 with this; at 2 KB and 8 KB between the two).
template <int kLines>
inline void prefetch_ahead(const uint8_t* lines) {
  constexpr int64_t kAheadBytes = 4096;
#pragma GCC unroll 8
  for (int j = 0; j < kLines; ++j)
    _mm_prefetch(reinterpret_cast<const char*>(lines + kAheadBytes + 64 * j), _MM_HINT_T1);
}

// Half of kLines lines, rounded up.
template <int kLines>
inline void prefetch_half(const uint8_t* source) {
#pragma GCC unroll 8
  for (int j = 0; j < (kLines + 1) / 2; ++j)
    _mm_prefetch(reinterpret_cast<const char*>(source + 64 * j), _MM_HINT_T1);
}

// How many lines of the rows behind its own a block fetches, one a k-step, in its last steps. Rows
// without an index lie one behind the other, those of all experts, and a panel of w2 reads them
// anew, from the L3 where the panels before it were of other experts. Without this such a panel
// took 1.27 times what one of w13 takes (int8, 64 rows an expert, 1024 tokens, Zen 4), with it
// 1.02, when ForwardPass walked through the experts with one panel and not four.
inline int64_t next_row_lines(const GemmArgs& args, const RowBlock& block, int rows,
                              int64_t steps) {
  if (args.row_idx != nullptr || block.count < 2) return 0;
  const int64_t lines = rows * args.a_stride_bytes / 64;
  return lines < steps ? lines : steps;
}

// acc[i][j] = dot(acc[i][j], 4 bytes of row i, line j) for one k-step of the panel.
template <int kRows, typename Sum, typename Dot>
inline void add_dot_step(Sum (&acc)[kRows][4], const uint8_t* const (&a)[kRows],
                         const uint8_t* panel, int64_t step, Dot dot) {
  __m512i w[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) w[j] = _mm512_load_si512(panel + kStepBytes * step + 64 * j);
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    const __m512i bytes = broadcast_4_bytes(a[i] + 4 * step);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) acc[i][j] = dot(acc[i][j], bytes, w[j]);
  }
}

// k-steps begin .. end of a tile: fetches two lines a step of `next_panel` if kPanel, and one of
// `next_rows` if kNextRows.
template <bool kPanel, bool kNextRows, int kRows, typename Sum, typename Dot>
inline void add_dot_range(Sum (&acc)[kRows][4], const uint8_t* const (&a)[kRows],
                          const uint8_t* panel, int64_t begin, int64_t end,
                          const uint8_t* next_panel, const uint8_t* next_rows, Dot dot) {
  for (int64_t step = begin; step < end; ++step) {
    if constexpr (kPanel) prefetch_half<4>(next_panel + kStepBytes * step);
    if constexpr (kNextRows) {
      _mm_prefetch(reinterpret_cast<const char*>(next_rows), _MM_HINT_T0);
      next_rows += 64;
    }
    add_dot_step(acc, a, panel, step, dot);
  }
}

// All k-steps of a tile, with the block's share of the next panel and, in the last steps, the rows
// of the next block.
template <int kRows, typename Sum, typename Dot>
inline void add_dot_steps(Sum (&acc)[kRows][4], const uint8_t* const (&a)[kRows],
                          const GemmArgs& args, const RowBlock& block, int64_t steps, Dot dot) {
  const int64_t lines = next_row_lines(args, block, kRows, steps);
  const uint8_t* rows = a[0] + kRows * args.a_stride_bytes;
  const uint8_t* panel = args.panel;
  if (const uint8_t* next = prefetch_source(args, block)) {
    add_dot_range<true, false>(acc, a, panel, 0, steps - lines, next, rows, dot);
    add_dot_range<true, true>(acc, a, panel, steps - lines, steps, next, rows, dot);
  } else {
    add_dot_range<false, false>(acc, a, panel, 0, steps - lines, next, rows, dot);
    add_dot_range<false, true>(acc, a, panel, steps - lines, steps, next, rows, dot);
  }
}

}  // namespace
}  // namespace kt
