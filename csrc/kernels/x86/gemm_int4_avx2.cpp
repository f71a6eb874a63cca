// int4 x int8 by vpmaddubsw: unsigned codes (q + 8) times signed activations, corrected by -8 *
// group_sum.
//
// A product pair is at most 2 * 15 * 127 = 3810, so 8 of them (32 k) add up in 16 bits (30480)
// before one vpmaddwd widens the sum. That makes int4 faster than int8 here.

#include "kernels/x86/gemm_avx2.h"

namespace kt {
namespace {

constexpr int kMaxRows = 6;  // 6 rows x 2 vectors: 12 of 16 registers accumulate
constexpr int kBlock = 32;   // k of one 16-bit accumulation

// Codes k .. k+3 (half 0) or k+4 .. k+7 (half 1) of 8 columns as unsigned bytes, from packed or
// expanded lines.
template <bool kExpanded>
inline __m256i load_codes(const uint8_t* lines, int half, __m256i nibble) {
  if constexpr (kExpanded) return load_bytes(lines + half * kStepBytes);
  const __m256i line = load_bytes(lines);
  return _mm256_and_si256(half == 0 ? line : _mm256_srli_epi16(line, 4), nibble);
}

// Lines of the next packed panel that one of `passes` passes fetches a block: at most 36 bytes a k,
// codes and scales.
constexpr int next_lines(int passes) { return (36 * kBlock / 64 + passes - 1) / passes; }

// acc[r][v] = sums of products over 32 k, as words.
template <int kRows, int kVectors, bool kExpanded>
inline void multiply_block(const uint8_t* const (&a)[kRows], int64_t k, const uint8_t* lines,
                           const char* next, int64_t line_bytes, __m256i (&acc)[kRows][kVectors]) {
  constexpr int kLineStep = kExpanded ? 2 * kStepBytes : kStepBytes;
  const __m256i nibble = _mm256_set1_epi8(15);
#pragma GCC unroll 8
  for (int quad = 0; quad < kBlock / 4; ++quad) {
    const uint8_t* step = lines + quad / 2 * kLineStep;
    if constexpr (kRows == 1) {
      const __m256i row = broadcast_dword(a[0] + k + quad * 4);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const __m256i w = load_codes<kExpanded>(step + v * 32, quad % 2, nibble);
        const __m256i product = _mm256_maddubs_epi16(w, row);
        acc[0][v] = quad == 0 ? product : _mm256_add_epi16(acc[0][v], product);
        pin(acc[0][v]);
      }
    } else {
      for (int line = quad; line < next_lines(8 / kVectors); line += kBlock / 4) {
        _mm_prefetch(next + line * line_bytes, _MM_HINT_T1);
      }
      __m256i w[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        w[v] = load_codes<kExpanded>(step + v * 32, quad % 2, nibble);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m256i row = broadcast_dword(a[r] + k + quad * 4);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          const __m256i product = _mm256_maddubs_epi16(w[v], row);
          acc[r][v] = quad == 0 ? product : _mm256_add_epi16(acc[r][v], product);
          pin(acc[r][v]);
        }
      }
      // Loads the lines again for the other half instead of keeping them: the registers are full.
      asm volatile("" ::: "memory");
    }
  }
}

// Widens the words of acc to integer sums and adds those of the group's earlier blocks; keeps the
// result in `partial` until the group's last block.
template <int kRows, int kVectors>
inline void widen_block(bool first, bool last, int32_t (&partial)[kRows][kVectors * 8],
                        __m256i (&acc)[kRows][kVectors]) {
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm256_madd_epi16(acc[r][v], ones);
  }
  if (!first) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        acc[r][v] = _mm256_add_epi32(acc[r][v], load_bytes(&partial[r][v * 8]));
    }
  }
  if (!last) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) store_bytes(&partial[r][v * 8], acc[r][v]);
    }
  }
}

template <bool kExpanded>
inline __m256 load_scale(const uint8_t* scales, int column) {
  if constexpr (kExpanded) return _mm256_castsi256_ps(load_bytes(scales + column * 4));
  return load_bf16_scales(scales + column * 2);
}

// One tile over all k.
template <int kRows, bool kExpanded>
void tile(const GemmArgs& args, int begin, int column) {
  constexpr int kVectors = tile_vectors(kRows);
  constexpr int kCodeBytes = kExpanded ? kPanelColumns : kPanelColumns / 2;  // of one k
  constexpr int kScaleBytes = kPanelColumns * (kExpanded ? 4 : 2);           // of one group
  const uint8_t* a[kRows];
  const int32_t* group_sum[kRows];
  for (int r = 0; r < kRows; ++r) {
    a[r] = activation_row(args, begin + r);
    group_sum[r] = args.a_group_sum + source_row(args, begin + r) * args.a_group_sum_stride;
  }
  float* c = args.c + begin * args.c_stride + column;
  clear_int4_tile<kRows>(c, args.c_stride);

  // The passes of the first row block fetch the next panel, a part each. A single row streams and
  // needs no help.
  constexpr int kPasses = 8 / kVectors;
  const bool fetch = args.next_panel != nullptr && begin == 0;
  const int64_t line_bytes = fetch ? 64 : 0;
  const auto* next = reinterpret_cast<const char*>(fetch ? args.next_panel : args.panel);
  next += int64_t{args.k} / kBlock * (column / (8 * kVectors)) * next_lines(kPasses) * line_bytes;

  alignas(32) int32_t partial[kRows][kVectors * 8] = {};
  const uint8_t* codes = args.panel;
  const uint8_t* expanded_scales = args.panel + int64_t{args.k} * kPanelColumns;
  for (int64_t k = 0, group = 0; k < args.k; ++group) {
    const int64_t end = k + args.group_size < args.k ? k + args.group_size : args.k;
    __m256i acc[kRows][kVectors];
    int64_t block = k;
    do {
      multiply_block<kRows, kVectors, kExpanded>(a, block, codes + column * 4, next, line_bytes,
                                                 acc);
      widen_block<kRows, kVectors>(block == k, block + kBlock == end, partial, acc);
      block += kBlock;
      codes += kBlock * kCodeBytes;
      next += next_lines(kPasses) * line_bytes;
    } while (block < end);
    k = end;
    const uint8_t* scales = kExpanded ? expanded_scales + group * kScaleBytes : codes;
    if (!kExpanded) codes += kScaleBytes;
    __m256 scale[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) scale[v] = load_scale<kExpanded>(scales, column + v * 8);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m256i correction = _mm256_set1_epi32(8 * group_sum[r][group]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        float* dst = c + r * args.c_stride + v * 8;
        const __m256 sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(acc[r][v], correction));
        _mm256_storeu_ps(dst, _mm256_fmadd_ps(sum, scale[v], _mm256_loadu_ps(dst)));
      }
    }
  }
  scale_int4_tile<kRows>(args, begin, c);
}

template <int kRows, bool kExpanded>
void row_block(const GemmArgs& args, int begin) {
  constexpr int kColumns = tile_vectors(kRows) * 8;
  const int64_t part = args.k * kColumns / kPanelColumns;  // bytes of a row that a pass fetches
  for (int column = 0; column < kPanelColumns; column += kColumns) {
    prefetch_rows(args, begin + kRows, kRows, part * (column / kColumns), part);
    tile<kRows, kExpanded>(args, begin, column);
  }
}

using RowBlockFn = void (*)(const GemmArgs&, int);
template <bool kExpanded>
constexpr RowBlockFn kRowBlocks[kMaxRows] = {row_block<1, kExpanded>, row_block<2, kExpanded>,
                                             row_block<3, kExpanded>, row_block<4, kExpanded>,
                                             row_block<5, kExpanded>, row_block<6, kExpanded>};

template <bool kExpanded>
void run(const GemmArgs& args) {
  for (int i = 0; i < args.m;) {
    const int rows = block_rows(args.m, i, kMaxRows);
    kRowBlocks<kExpanded>[rows - 1](args, i);
    i += rows;
  }
}

}  // namespace

void gemm_s8_int4_fp32_6x16x8_avx2(const GemmArgs& args) { run<false>(args); }

void gemm_s8_int4x_fp32_6x16x4_avx2(const GemmArgs& args) { run<true>(args); }

void expand_int4_avx2(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  const __m256i nibble = _mm256_set1_epi8(15);
  uint8_t* scales = scratch + int64_t{k} * kPanelColumns;
  for (int64_t begin = 0; begin < k; begin += group_size) {
    const int64_t end = begin + group_size < k ? begin + group_size : k;
    for (int64_t at = begin; at < end; at += 8, panel += kStepBytes, scratch += 2 * kStepBytes) {
      for (int line = 0; line < kStepBytes; line += 32) {
        store_bytes(scratch + line, load_codes<false>(panel + line, 0, nibble));
        store_bytes(scratch + kStepBytes + line, load_codes<false>(panel + line, 1, nibble));
      }
    }
    for (int column = 0; column < kPanelColumns; column += 8) {
      _mm256_storeu_ps(reinterpret_cast<float*>(scales) + column, load_scale<false>(panel, column));
    }
    panel += kPanelColumns * 2;
    scales += kPanelColumns * 4;
  }
}

}  // namespace kt
