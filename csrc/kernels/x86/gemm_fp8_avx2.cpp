// fp8 x bf16 on AVX2: weights become fp32, exactly, and are multiplied by their group's scale,
// rounded once (where scales are below 2^-132, codes times scale may be no number of fp32, and are
// rounded to it). One accumulator an output, k ascending, whatever the number of rows.
//
// A byte moved into the upper half of a word and its exponent right by one is fp16, 2^-8 times the
// value. vcvtph2ps takes subnormal fp16 as it is whatever MXCSR says. The factor meets the sums:
// in the scale it would make infinity of scales from 2^120 on, which MXFP8 has.

#include "kernels/x86/codes_avx2.h"

namespace kt {
namespace {

constexpr int kMaxRows = 6;  // 6 rows x 2 vectors: 12 of 16 registers accumulate
constexpr int kChunk = 64;   // k of weights that are widened at a time: 16 KB stay in L1

// 4 k of 8 columns, at `codes`: the values of k, k + 1, k + 2, k + 3, times `scale`.
inline void widen(const uint8_t* codes, __m256 scale, __m256 (&values)[4]) {
  // (k, k + 1) of eight columns in the lower half, (k + 2, k + 3) in the upper
  const __m256i pairs = _mm256_permute4x64_epi64(load_bytes(codes), 0xd8);
  const __m256i kept = _mm256_set1_epi16(static_cast<int16_t>(0xbf80));
  const __m256i even = _mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(pairs, 8), 1), kept);
  const __m256i odd = _mm256_and_si256(_mm256_srai_epi16(pairs, 1), kept);
  values[0] = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(even)), scale);
  values[1] = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(odd)), scale);
  values[2] = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(even, 1)), scale);
  values[3] = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(odd, 1)), scale);
}

constexpr float kFactor = 256;  // what the sums of widened weights lack

// Where the codes of a group are, and its scales.
template <typename Scales>
struct Fp8Group {
  const uint8_t* codes;
  int64_t size = 0;
  alignas(32) float scales[kPanelColumns];

  explicit Fp8Group(const GemmArgs& args) : codes(args.panel) {}
  // The group from k on, behind the one before it.
  void move_to(int64_t k, const GemmArgs& args) {
    if (k > 0) codes += size * kPanelColumns + Scales::kBytes;
    size = k + args.group_size < args.k ? args.group_size : args.k - k;
    const GroupScales at{codes + size * kPanelColumns, nullptr};
    for (int column = 0; column < kPanelColumns; column += 8)
      _mm256_store_ps(scales + column, Scales::scale(at, column));
  }
};

// bf16 activations of one row as fp32.
inline void widen_row(const uint8_t* a, int64_t count, float* wide) {
  for (int64_t k = 0; k < count; k += 8) _mm256_store_ps(wide + k, load_bf16_scales(a + k * 2));
}

// A single row reads the panel in one stream and keeps its sums in registers.
template <typename Scales>
void multiply_row(const GemmArgs& args) {
  alignas(32) float wide[kChunk];
  const uint8_t* const a = activation_row(args, 0);
  Fp8Group<Scales> group(args);
  __m256 acc[8];
  for (__m256& sum : acc) sum = _mm256_setzero_ps();
  for (int64_t begin = 0; begin < args.k; begin += group.size) {
    group.move_to(begin, args);
    for (int64_t at = 0; at < group.size; at += kChunk) {
      const int64_t count = group.size - at < kChunk ? group.size - at : kChunk;
      widen_row(a + (begin + at) * 2, count, wide);
      const uint8_t* codes = group.codes + at * kPanelColumns;
      for (int64_t k = 0; k < count; k += 4, codes += kStepBytes) {
        for (int line = 0; line < 4; ++line) {
          const auto* const ahead = reinterpret_cast<const char*>(codes) + 4096;
          _mm_prefetch(ahead + line * 64, _MM_HINT_T0);
        }
#pragma GCC unroll 8
        for (int v = 0; v < 8; ++v) {
          __m256 w[4];
          widen(codes + v * 32, _mm256_load_ps(group.scales + v * 8), w);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i)
            acc[v] = _mm256_fmadd_ps(w[i], _mm256_broadcast_ss(wide + k + i), acc[v]);
        }
      }
    }
  }
  for (int v = 0; v < 8; ++v)
    _mm256_storeu_ps(args.c + v * 8, _mm256_mul_ps(acc[v], _mm256_set1_ps(kFactor)));
}

// Weights of up to kChunk k within a group as [k][64].
template <typename Scales>
void widen_chunk(const Fp8Group<Scales>& group, int64_t at, int64_t count, float* wide) {
  const uint8_t* codes = group.codes + at * kPanelColumns;
  for (int64_t k = 0; k < count; k += 4, codes += kStepBytes, wide += 4 * kPanelColumns) {
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) {
      __m256 w[4];
      widen(codes + v * 32, _mm256_load_ps(group.scales + v * 8), w);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) _mm256_store_ps(wide + i * kPanelColumns + v * 8, w[i]);
    }
  }
}

// sum += w * a, rounded once. Written out for the reason in gemm_bf16_avx2.cpp.
inline void add_product(__m256& sum, __m256 w, __m256 a) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(w), "x"(a));
}

template <int kRows>
void tile(const float (*a)[kChunk], const float* weights, int64_t count, bool first, float* c,
          int64_t stride) {
  constexpr int kVectors = tile_vectors(kRows);
  __m256 acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      acc[r][v] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(c + r * stride + v * 8);
  }
  for (int64_t k = 0; k < count; ++k, weights += kPanelColumns) {
    __m256 w[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) w[v] = _mm256_load_ps(weights + v * 8);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m256 row = _mm256_broadcast_ss(&a[r][k]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) add_product(acc[r][v], w[v], row);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) _mm256_storeu_ps(c + r * stride + v * 8, acc[r][v]);
  }
}

// A block of rows and a chunk of weights.
template <int kRows>
void row_block(const GemmArgs& args, int begin, int64_t k, const float* weights, int64_t count) {
  alignas(32) float a[kRows][kChunk];
  for (int r = 0; r < kRows; ++r) widen_row(activation_row(args, begin + r) + k * 2, count, a[r]);
  float* const c = args.c + begin * args.c_stride;
  for (int column = 0; column < kPanelColumns; column += tile_vectors(kRows) * 8)
    tile<kRows>(a, weights + column, count, k == 0, c + column, args.c_stride);
}

using RowBlockFn = void (*)(const GemmArgs&, int, int64_t, const float*, int64_t);
constexpr RowBlockFn kRowBlocks[kMaxRows] = {row_block<1>, row_block<2>, row_block<3>,
                                             row_block<4>, row_block<5>, row_block<6>};

template <typename Scales>
void multiply_rows(const GemmArgs& args) {
  alignas(64) float weights[kChunk * kPanelColumns];
  Fp8Group<Scales> group(args);
  const auto* next = reinterpret_cast<const char*>(args.next_panel);
  for (int64_t begin = 0; begin < args.k; begin += group.size) {
    group.move_to(begin, args);
    for (int64_t at = 0; at < group.size; at += kChunk) {
      const int64_t count = group.size - at < kChunk ? group.size - at : kChunk;
      widen_chunk(group, at, count, weights);
      for (int64_t line = 0; next != nullptr && line < count; ++line, next += 64)
        _mm_prefetch(next, _MM_HINT_T1);
      for (int i = 0; i < args.m;) {
        const int rows = block_rows(args.m, i, kMaxRows);
        prefetch_rows(args, i + rows, kMaxRows, (begin + at) * 2, count * 2);
        kRowBlocks[rows - 1](args, i, begin + at, weights, count);
        i += rows;
      }
    }
  }
  for (int i = 0; i < args.m; ++i) {
    float* const c = args.c + i * args.c_stride;
    for (int column = 0; column < kPanelColumns; column += 8) {
      const __m256 sum = _mm256_loadu_ps(c + column);
      _mm256_storeu_ps(c + column, _mm256_mul_ps(sum, _mm256_set1_ps(kFactor)));
    }
  }
}

template <typename Scales>
void multiply(const GemmArgs& args) {
  if (args.m == 1) {
    multiply_row<Scales>(args);
  } else if (args.m > 1) {
    multiply_rows<Scales>(args);
  }
}

}  // namespace

void gemm_bf16_fp8_fp32_6x16x4_avx2(const GemmArgs& args) { multiply<ScalesBf16>(args); }
void gemm_bf16_fp8f_fp32_6x16x4_avx2(const GemmArgs& args) { multiply<ScalesFp32>(args); }

}  // namespace kt
