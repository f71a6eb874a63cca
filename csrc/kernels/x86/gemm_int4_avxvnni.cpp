// int4 GEMM on AVX-VNNI: weights as unsigned codes (q + 8), activations signed, 6 rows x 16 columns
// a tile. The excess of 8 leaves as -8 * group_sum, the first value of each group's integer sum.
#include "kernels/x86/gemm_avxvnni.h"

namespace kt {
namespace {

constexpr int kMaxRows = 6;  // 6 rows x 2 vectors: 12 of 16 registers accumulate

// Codes k .. k+3 (half 0) or k+4 .. k+7 (half 1) of 8 columns as unsigned bytes.
inline __m256i unpack(__m256i line, int half) {
  return _mm256_and_si256(half == 0 ? line : _mm256_srli_epi16(line, 4), _mm256_set1_epi8(15));
}

// Adds the products of 8 k, one packed k-step.
template <int kRows, int kVectors>
inline void add_step(const uint8_t* const (&a)[kRows], int64_t k, const uint8_t* lines,
                     Int32x8 (&acc)[kRows][kVectors]) {
  if constexpr (kRows == 1) {
    const __m256i low = broadcast_dword(a[0] + k);
    const __m256i high = broadcast_dword(a[0] + k + 4);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const __m256i line = load_bytes(lines + v * 32);
      acc[0][v] = dot(dot(acc[0][v], unpack(line, 0), low), unpack(line, 1), high);
    }
    return;
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    __m256i w[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) w[v] = unpack(load_bytes(lines + v * 32), half);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m256i row = broadcast_dword(a[r] + k);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        acc[r][v] = dot(acc[r][v], w[v], row);
        // Keeps the order. GCC 12 loads rows ahead of it, and spills.
        asm volatile("" : "+x"(acc[r][v]));
      }
    }
    // Loads the lines again for the other half instead of keeping them, and makes no second set of
    // row pointers for it: the registers are full.
    k += 4;
    asm("" : "+r"(lines), "+r"(k));
  }
}

// One tile over all k. `next` is the panel to fetch, read side by side with this one.
template <int kRows>
void tile(const GemmArgs& args, int begin, int column, const uint8_t* next) {
  constexpr int kVectors = tile_vectors(kRows);
  constexpr int kScaleBytes = kPanelColumns * 2;  // of one group
  const uint8_t* a[kRows];
  const int32_t* group_sum[kRows];
  for (int r = 0; r < kRows; ++r) {
    a[r] = activation_row(args, begin + r);
    group_sum[r] = args.a_group_sum + source_row(args, begin + r) * args.a_group_sum_stride;
  }
  float* const c = args.c + begin * args.c_stride + column;
  // Results accumulate in c itself where a row has one scale.
  alignas(32) float block_part[kRows * kVectors * 8];
  const bool one_block = args.a_block >= args.k;
  float* const part = one_block ? c : block_part;
  const int64_t stride = one_block ? args.c_stride : kVectors * 8;
  const uint8_t* lines = args.panel + column * 4;
  const auto* ahead = reinterpret_cast<const char*>(next) + column * 4;
  int64_t k = 0;
  int64_t block = 0, block_end = 0;
  for (int64_t group = 0; k < args.k; ++group) {
    if (k == block_end) {
      clear_tile<kRows>(part, stride);
      block_end = k + args.a_block < args.k ? k + args.a_block : args.k;
    }
    const int64_t end = k + args.group_size < args.k ? k + args.group_size : args.k;
    Int32x8 acc[kRows][kVectors];
    // Keeps these pointers in memory: in registers over the k-steps they drive others out.
    asm volatile("" : "+m"(group_sum));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Int32x8 first = as_int32(_mm256_set1_epi32(-8 * group_sum[r][group]));
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) acc[r][v] = first;
    }
    for (; k < end; k += 8, lines += kStepBytes, ahead += kStepBytes) {
      if constexpr (kRows > 1) {  // a single row streams and needs no help
        for (int line = 0; line < kVectors / 2; ++line)
          _mm_prefetch(ahead + line * 64, _MM_HINT_T1);
      }
      add_step<kRows, kVectors>(a, k, lines, acc);
    }
    const uint8_t* scales = lines - column * 4 + column * 2;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const __m256 scale = load_bf16_scales(scales + v * 16);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        float* dst = part + r * stride + v * 8;
        const __m256 sum = _mm256_cvtepi32_ps(as_bits(acc[r][v]));
        _mm256_storeu_ps(dst, _mm256_fmadd_ps(sum, scale, _mm256_loadu_ps(dst)));
      }
    }
    lines += kScaleBytes;
    if (kRows > 1 && column < kScaleBytes / 4) {  // two lines: the passes of the left columns do it
      for (int line = 0; line < kVectors / 2; ++line) _mm_prefetch(ahead + line * 64, _MM_HINT_T1);
    }
    ahead += kScaleBytes;
    if (k == block_end) fold_block<kRows>(args, begin, block++, part, stride, c);
  }
}

// The first row block fetches the next panel, each pass its columns of it; the others and the last
// panel ask for lines that are there.
template <int kRows>
void row_block(const GemmArgs& args, int begin) {
  constexpr int kColumns = tile_vectors(kRows) * 8;
  const int64_t part = args.k * kColumns / kPanelColumns;  // bytes of a row that a pass fetches
  const bool fetch = args.next_panel != nullptr && begin == 0;
  for (int column = 0; column < kPanelColumns; column += kColumns) {
    prefetch_rows(args, begin + kRows, kRows, part * (column / kColumns), part);
    tile<kRows>(args, begin, column, fetch ? args.next_panel : args.panel);
  }
}

using RowBlockFn = void (*)(const GemmArgs&, int);
constexpr RowBlockFn kRowBlocks[kMaxRows] = {row_block<1>, row_block<2>, row_block<3>,
                                             row_block<4>, row_block<5>, row_block<6>};

}  // namespace

void gemm_s8_int4_fp32_6x16x8_avxvnni(const GemmArgs& args) {
  for (int i = 0; i < args.m;) {
    const int rows = block_rows(args.m, i, kMaxRows);
    kRowBlocks[rows - 1](args, i);
    i += rows;
  }
}

}  // namespace kt
