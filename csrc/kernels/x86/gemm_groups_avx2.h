// Groups of integers on AVX2, for any codes and scales: c as kernel.h has it.
//
// Unsigned codes are multiplied by vpmaddubsw, and as many products are added up in 16 bits as fit:
// 32 k of codes up to 15, 16 k up to 31, 8 k up to 63. Then vpmaddwd widens the sum. Codes of 8
// bits go through vpmaddwd from the start, as gemm_int8_avx2.cpp says: shifted left by 8 and masked
// they are 256 times the even and the odd k. Offsets and zeros leave by the sums of activations.
// Anonymous namespace only.
#pragma once

#include "kernels/x86/codes_avx2.h"

namespace kt {
namespace {

constexpr int kMaxRows = 6;  // 6 rows x 2 vectors: 12 of 16 registers accumulate

// What a kernel is made of. offset: of unsigned codes without zero or minimum.
template <typename CodesOf, typename ScalesOf, int kOffsetOf, int kBlockOf>
struct GroupWeights {
  using Codes = CodesOf;
  using Scales = ScalesOf;
  static constexpr bool kSigned = Codes::kLargest == 128;
  static constexpr int kOffset = kSigned ? 0 : kOffsetOf;
  static constexpr int kBlock = kBlockOf;  // k between two looks at the group's end
  // 4 k of two products each that fit 16 bits, or all of a block
  static constexpr int kWordQuads = kSigned                 ? kBlock / 4
                                    : Codes::kLargest <= 15 ? kBlock / 4
                                    : Codes::kLargest <= 31 ? 4
                                                            : 2;
  // Lines of the next packed panel that one of `passes` passes fetches a block; 6 bytes for scales.
  static constexpr int next_lines(int passes) {
    int bytes = kBlock * (Codes::kBytes / Codes::kStepK + 6);
    if constexpr (Scales::kExpanded) bytes = kBlock * (Codes::kFetchedBytes + 6);
    return (bytes / 64 + passes - 1) / passes;
  }
};

// The panel to fetch: line_bytes 64, or 0 where nothing is to be fetched.
struct NextPanel {
  const char* at;
  int64_t line_bytes;
};

template <typename Weights, int kRows>
inline void fetch_next(NextPanel next, int quad) {
  constexpr int kLines = Weights::next_lines(8 / tile_vectors(kRows));
  for (int line = quad; line < kLines; line += Weights::kBlock / 4)
    _mm_prefetch(next.at + line * next.line_bytes, _MM_HINT_T1);
}

template <typename Weights>
inline __m256i load_quad(const uint8_t* codes, int quad, int column, int v) {
  using Codes = typename Weights::Codes;
  constexpr int kStepQuads = Codes::kStepK / 4;
  return Codes::load(codes + quad / kStepQuads * Codes::kBytes, quad % kStepQuads, column, v);
}

// acc[r][v] = sums of products over kWordQuads times 4 k from quad `first` of a block on, as words.
template <typename Weights, int kRows, int kVectors>
inline void multiply_words(const uint8_t* const (&a)[kRows], int64_t k, int first,
                           const uint8_t* codes, int column, NextPanel next,
                           __m256i (&acc)[kRows][kVectors]) {
#pragma GCC unroll 8
  for (int q = 0; q < Weights::kWordQuads; ++q) {
    const int quad = first + q;
    if constexpr (kRows == 1) {
      const __m256i row = broadcast_dword(a[0] + k + quad * 4);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const __m256i w = load_quad<Weights>(codes, quad, column, v);
        const __m256i product = _mm256_maddubs_epi16(w, row);
        acc[0][v] = q == 0 ? product : _mm256_add_epi16(acc[0][v], product);
        pin(acc[0][v]);
      }
    } else {
      fetch_next<Weights, kRows>(next, quad);
      __m256i w[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) w[v] = load_quad<Weights>(codes, quad, column, v);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m256i row = broadcast_dword(a[r] + k + quad * 4);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          const __m256i product = _mm256_maddubs_epi16(w[v], row);
          acc[r][v] = q == 0 ? product : _mm256_add_epi16(acc[r][v], product);
          pin(acc[r][v]);
        }
      }
      // Loads the lines again for the next quad instead of keeping them: the registers are full.
      asm volatile("" ::: "memory");
    }
  }
}

// acc[r][v] = 256 times the sums of products over a block, as integers.
template <typename Weights, int kRows, int kVectors>
inline void multiply_signed(const uint8_t* const (&a)[kRows], int64_t k, const uint8_t* codes,
                            int column, NextPanel next, __m256i (&acc)[kRows][kVectors]) {
  constexpr int kQuads = Weights::kBlock / 4;
  alignas(32) int32_t pairs[2][kRows][kQuads];  // (a[k], a[k + 2]) and (a[k + 1], a[k + 3])
  for (int r = 0; r < kRows; ++r) {
    if constexpr (kQuads == 8) {
      const __m256i row = load_bytes(a[r] + k);
      store_bytes(pairs[0][r], _mm256_srai_epi16(_mm256_slli_epi16(row, 8), 8));
      store_bytes(pairs[1][r], _mm256_srai_epi16(row, 8));
    } else {
      const __m128i row = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a[r] + k));
      _mm_store_si128(reinterpret_cast<__m128i*>(pairs[0][r]),
                      _mm_srai_epi16(_mm_slli_epi16(row, 8), 8));
      _mm_store_si128(reinterpret_cast<__m128i*>(pairs[1][r]), _mm_srai_epi16(row, 8));
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm256_setzero_si256();
  }
#pragma GCC unroll 8
  for (int quad = 0; quad < kQuads; ++quad) {
    if constexpr (kRows > 1) fetch_next<Weights, kRows>(next, quad);
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      __m256i w[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const __m256i bytes = load_quad<Weights>(codes, quad, column, v);
        w[v] = odd == 0 ? _mm256_slli_epi16(bytes, 8)
                        : _mm256_and_si256(bytes, _mm256_set1_epi16(static_cast<int16_t>(0xff00)));
        if constexpr (kRows == 1) {
          const __m256i row = broadcast_dword(&pairs[odd][0][quad]);
          acc[0][v] = _mm256_add_epi32(acc[0][v], _mm256_madd_epi16(w[v], row));
          pin(acc[0][v]);
        }
      }
      if constexpr (kRows == 1) continue;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m256i row = broadcast_dword(&pairs[odd][r][quad]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          acc[r][v] = _mm256_add_epi32(acc[r][v], _mm256_madd_epi16(w[v], row));
          pin(acc[r][v]);
        }
      }
      asm volatile("" ::: "memory");
    }
  }
}

// Widens acc to integer sums and adds those of the group before it; keeps the result in `partial`
// until the group's last.
template <typename Weights, int kRows, int kVectors>
inline void widen(bool first, bool last, int32_t (&partial)[kRows][kVectors * 8],
                  __m256i (&acc)[kRows][kVectors]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = Weights::kSigned ? _mm256_srai_epi32(acc[r][v], 8)
                                   : _mm256_madd_epi16(acc[r][v], _mm256_set1_epi16(1));
    }
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

// A single row widens each vector's words at once, so that its integer sums stay in registers.
template <typename Weights, int kVectors>
inline void add_words(const uint8_t* a, const uint8_t* codes, int column, bool first,
                      __m256i (&acc)[1][kVectors]) {
  constexpr int kWordQuads = Weights::kWordQuads;
#pragma GCC unroll 4
  for (int begin = 0; begin < Weights::kBlock / 4; begin += kWordQuads) {
    __m256i row[kWordQuads];
#pragma GCC unroll 8
    for (int q = 0; q < kWordQuads; ++q) row[q] = broadcast_dword(a + (begin + q) * 4);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      __m256i words = _mm256_maddubs_epi16(load_quad<Weights>(codes, begin, column, v), row[0]);
#pragma GCC unroll 8
      for (int q = 1; q < kWordQuads; ++q) {
        const __m256i w = load_quad<Weights>(codes, begin + q, column, v);
        words = _mm256_add_epi16(words, _mm256_maddubs_epi16(w, row[q]));
        pin(words);
      }
      const __m256i sums = _mm256_madd_epi16(words, _mm256_set1_epi16(1));
      acc[0][v] = first && begin == 0 ? sums : _mm256_add_epi32(acc[0][v], sums);
      pin(acc[0][v]);
    }
  }
}

// One block of a group.
template <typename Weights, int kRows, int kVectors>
inline void multiply_block(const uint8_t* const (&a)[kRows], int64_t k, const uint8_t* codes,
                           int column, NextPanel next, bool first, bool last,
                           int32_t (&partial)[kRows][kVectors * 8],
                           __m256i (&acc)[kRows][kVectors]) {
  if constexpr (Weights::kSigned) {
    multiply_signed<Weights>(a, k, codes, column, next, acc);
    widen<Weights>(first, last, partial, acc);
  } else if constexpr (kRows == 1 && Weights::Codes::kLargest > 15) {
    add_words<Weights>(a[0] + k, codes, column, first, acc);
  } else {
    constexpr int kQuads = Weights::kBlock / 4;
#pragma GCC unroll 4
    for (int q = 0; q < kQuads; q += Weights::kWordQuads) {
      multiply_words<Weights>(a, k, q, codes, column, next, acc);
      widen<Weights>(first && q == 0, last && q + Weights::kWordQuads == kQuads, partial, acc);
    }
  }
}

// part[r][v] = fma(float(sum - offset), scale, part), and fma(sum of activations, minimum, .).
template <typename Weights, int kRows, int kVectors>
inline void fold_group(const int32_t* const (&group_sum)[kRows], int64_t group, GroupScales at,
                       int column, const __m256i (&acc)[kRows][kVectors], float* part,
                       int64_t stride) {
  using Scales = typename Weights::Scales;
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const __m256 scale = Scales::scale(at, column + v * 8);
    __m256 minimum = scale;
    __m256i zero = _mm256_setzero_si256();
    if constexpr (Scales::kMinimum) minimum = Scales::minimum(at, column + v * 8);
    if constexpr (Scales::kZero) zero = Scales::zero(at, column + v * 8);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m256i sum_of_a = broadcast_dword(group_sum[r] + group);
      __m256i sum = acc[r][v];
      if constexpr (Scales::kZero) {
        sum = _mm256_sub_epi32(sum, _mm256_mullo_epi32(zero, sum_of_a));
      } else if constexpr (Weights::kOffset == 12) {
        sum = _mm256_sub_epi32(sum, _mm256_slli_epi32(sum_of_a, 3));
        sum = _mm256_sub_epi32(sum, _mm256_slli_epi32(sum_of_a, 2));
      } else if constexpr (Weights::kOffset != 0) {
        constexpr int kLog2 = __builtin_ctz(Weights::kOffset);
        static_assert(1 << kLog2 == Weights::kOffset);
        sum = _mm256_sub_epi32(sum, _mm256_slli_epi32(sum_of_a, kLog2));
      }
      float* const dst = part + r * stride + v * 8;
      __m256 value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, _mm256_loadu_ps(dst));
      if constexpr (Scales::kMinimum)
        value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum_of_a), minimum, value);
      _mm256_storeu_ps(dst, value);
    }
  }
}

template <int kRows>
inline void scale_columns(const float* scales, float* c, int64_t stride) {
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < tile_vectors(kRows); ++v) {
      float* const dst = c + r * stride + v * 8;
      _mm256_storeu_ps(dst, _mm256_mul_ps(_mm256_loadu_ps(dst), _mm256_loadu_ps(scales + v * 8)));
    }
  }
}

// The places of a panel's codes and scales, group after group.
template <typename Weights>
struct PanelCursor {
  using Scales = typename Weights::Scales;
  const uint8_t* codes;
  GroupScales at;

  explicit PanelCursor(const GemmArgs& args) : codes(args.panel), at{nullptr, nullptr} {
    if constexpr (!Scales::kExpanded) return;
    const int64_t groups = (args.k + args.group_size - 1) / args.group_size;
    at.scales = args.panel + int64_t{args.k} * kPanelColumns;
    at.more = at.scales + groups * kPanelColumns * 4;
  }
  void begin_group(int64_t k) {
    if constexpr (Scales::kHeadBytes == 0) return;
    if (k % 256 != 0) return;
    at.more = codes;
    codes += Scales::kHeadBytes;
  }
  void advance() {
    codes += int64_t{Weights::kBlock} / Weights::Codes::kStepK * Weights::Codes::kBytes;
  }
  // Behind the codes of a group.
  GroupScales scales() const { return Scales::kExpanded ? at : GroupScales{codes, at.more}; }
  void end_group() {
    codes += Scales::kBytes;
    if constexpr (!Scales::kExpanded) return;
    at.scales += kPanelColumns * 4;
    if (Scales::kMinimum || Scales::kZero) at.more += kPanelColumns * 4;
  }
  // Behind the last group.
  const float* column_scales() const {
    return reinterpret_cast<const float*>(Scales::kExpanded ? at.more : codes);
  }
};

// One tile over all k.
template <typename Weights, int kRows>
void tile(const GemmArgs& args, int begin, int column) {
  constexpr int kVectors = tile_vectors(kRows);
  constexpr int kBlock = Weights::kBlock;
  const uint8_t* a[kRows];
  const int32_t* group_sum[kRows];
  for (int r = 0; r < kRows; ++r) {
    a[r] = activation_row(args, begin + r);
    group_sum[r] = args.a_group_sum + source_row(args, begin + r) * args.a_group_sum_stride;
  }
  float* const c = args.c + begin * args.c_stride + column;

  // The passes of the first row block fetch the next panel, a part each. A single row streams and
  // needs no help.
  constexpr int kPasses = 8 / kVectors;
  constexpr int kNextLines = Weights::next_lines(kPasses);
  const bool fetch = args.next_panel != nullptr && begin == 0;
  NextPanel next{reinterpret_cast<const char*>(fetch ? args.next_panel : args.panel),
                 fetch ? 64 : 0};
  next.at += int64_t{args.k} / kBlock * (column / (8 * kVectors)) * kNextLines * next.line_bytes;

  // Results accumulate in memory: they are touched once a group, the registers hold integer sums.
  // In c itself where a row has one scale.
  alignas(32) float block_part[kRows * kVectors * 8];
  const bool one_block = args.a_block >= args.k;
  float* const part = one_block ? c : block_part;
  const int64_t stride = one_block ? args.c_stride : kVectors * 8;
  alignas(32) int32_t partial[kRows][kVectors * 8] = {};
  PanelCursor<Weights> cursor(args);
  int64_t group = 0;
  for (int64_t k = 0, block = 0; k < args.k; ++block) {
    const int64_t block_end = k + args.a_block < args.k ? k + args.a_block : args.k;
    clear_tile<kRows>(part, stride);
    for (; k < block_end; ++group) {
      const int64_t end = k + args.group_size < args.k ? k + args.group_size : args.k;
      cursor.begin_group(k);
      __m256i acc[kRows][kVectors];
      bool first = true;
      do {
        const bool last = k + kBlock == end;
        multiply_block<Weights>(a, k, cursor.codes, column, next, first, last, partial, acc);
        cursor.advance();
        next.at += kNextLines * next.line_bytes;
        k += kBlock;
        first = false;
      } while (k < end);
      fold_group<Weights>(group_sum, group, cursor.scales(), column, acc, part, stride);
      cursor.end_group();
    }
    fold_block<kRows>(args, begin, block, part, stride, c);
  }
  if constexpr (Weights::Scales::kColumn)
    scale_columns<kRows>(cursor.column_scales() + column, c, args.c_stride);
}

template <typename Weights, int kRows>
void row_block(const GemmArgs& args, int begin) {
  constexpr int kColumns = tile_vectors(kRows) * 8;
  const int64_t part = args.k * kColumns / kPanelColumns;  // bytes of a row that a pass fetches
  for (int column = 0; column < kPanelColumns; column += kColumns) {
    prefetch_rows(args, begin + kRows, kRows, part * (column / kColumns), part);
    tile<Weights, kRows>(args, begin, column);
  }
}

using RowBlockFn = void (*)(const GemmArgs&, int);
template <typename Weights>
constexpr RowBlockFn kRowBlocks[kMaxRows] = {row_block<Weights, 1>, row_block<Weights, 2>,
                                             row_block<Weights, 3>, row_block<Weights, 4>,
                                             row_block<Weights, 5>, row_block<Weights, 6>};

template <typename Codes, typename Scales, int kOffset, int kBlock>
void multiply_groups(const GemmArgs& args) {
  using Weights = GroupWeights<Codes, Scales, kOffset, kBlock>;
  for (int i = 0; i < args.m;) {
    const int rows = block_rows(args.m, i, kMaxRows);
    kRowBlocks<Weights>[rows - 1](args, i);
    i += rows;
  }
}

// Codes and scales as ExpandFn leaves them. Signed codes become unsigned again.
template <typename Codes, typename Scales>
void expand_groups(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  using Weights = GroupWeights<Codes, Scales, 0, Codes::kStepK>;
  const int64_t groups = (k + group_size - 1) / group_size;
  uint8_t* scales = scratch + int64_t{k} * kPanelColumns;
  uint8_t* more = scales + groups * kPanelColumns * 4;
  GemmArgs args = {};
  args.panel = panel;
  PanelCursor<Weights> cursor(args);
  for (int64_t begin = 0; begin < k; begin += group_size) {
    const int64_t end = begin + group_size < k ? begin + group_size : k;
    cursor.begin_group(begin);
    for (int64_t at = begin; at < end; at += Codes::kStepK, cursor.advance()) {
#pragma GCC unroll 4
      for (int quad = 0; quad < Codes::kStepK / 4; ++quad, scratch += kStepBytes) {
#pragma GCC unroll 8
        for (int v = 0; v < 8; ++v) {
          __m256i codes = Codes::load(cursor.codes, quad, 0, v);
          if constexpr (Weights::kSigned)
            codes = _mm256_xor_si256(codes, _mm256_set1_epi8(static_cast<char>(0x80)));
          store_bytes(scratch + v * 32, codes);
        }
      }
    }
    const GroupScales at = cursor.scales();
    for (int column = 0; column < kPanelColumns; column += 8) {
      store_bytes(scales + column * 4, _mm256_castps_si256(Scales::scale(at, column)));
      if constexpr (Scales::kMinimum)
        store_bytes(more + column * 4, _mm256_castps_si256(Scales::minimum(at, column)));
      if constexpr (Scales::kZero) store_bytes(more + column * 4, Scales::zero(at, column));
    }
    scales += kPanelColumns * 4;
    more += Scales::kMinimum || Scales::kZero ? kPanelColumns * 4 : 0;
    cursor.end_group();
  }
  if constexpr (Scales::kColumn) {
    for (int at = 0; at < kPanelColumns * 4; at += 32)
      store_bytes(more + at, load_bytes(cursor.codes + at));
  }
}

}  // namespace
}  // namespace kt
