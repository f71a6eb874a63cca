// Codes of packed weights as unsigned bytes, and the scales of their groups as fp32, on AVX-512:
// what the kernels for groups of integers and the rows that expand panels share. The bytes are
// those of format/packed_layout.h. Everything is in an anonymous namespace.
//
// Codes     kStepK k in kLines lines of 64 bytes; load<u>() gives the codes of k 4u .. 4u + 3 and
//           columns 16j .. 16j + 15. kOffset: what to take off a code, where it has neither zero
//           nor minimum.
// Scales    kBytes a group, behind its codes; kBlockBytes before each 256 k. Of line j.
#pragma once

#include "kernels/x86/gemm_avx512.h"

namespace kt {
namespace {

inline __m512i all_bytes(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }

inline Int32x16 load_line(const uint8_t* step, int j) {
  return as_int32(_mm512_load_si512(step + 64 * j));
}

// Bits 4u .. 4u + 3, or 2u and 2u + 1, of each byte.
template <int kUnit>
inline Int32x16 nibbles(Int32x16 line) {
  return (kUnit == 0 ? line : line >> 4) & as_int32(all_bytes(0x0f));
}
template <int kUnit>
inline Int32x16 pairs(Int32x16 line) {
  return (kUnit == 0 ? line : line >> 2 * kUnit) & as_int32(all_bytes(3));
}

// value + bit where the mask at `source` has ones: bit 4c + j for byte j of column c.
inline Int32x16 add_bits(Int32x16 value, const uint8_t* source, int bit) {
  uint64_t mask;
  __builtin_memcpy(&mask, source, sizeof mask);
  return as_int32(_mm512_mask_add_epi8(as_bits(value), mask, as_bits(value), all_bytes(bit)));
}

struct Codes8 {
  static constexpr int kStepK = 4, kLines = 4, kOffset = 128, kLinesAtOnce = 2;
  template <int kUnit>
  static inline Int32x16 load(const uint8_t* step, int j) {
    return load_line(step, j) ^ as_int32(all_bytes(0x80));
  }
};

struct Codes6 {
  static constexpr int kStepK = 16, kLines = 12, kOffset = 32, kLinesAtOnce = 4;
  template <int kUnit>
  static inline Int32x16 load(const uint8_t* step, int j) {
    const Int32x16 low = nibbles<kUnit % 2>(load_line(step + kUnit / 2 * kStepBytes, j));
    const Int32x16 high = load_line(step + 2 * kStepBytes, j);
    const Int32x16 bits = kUnit == 0   ? high << 4
                          : kUnit == 1 ? high << 2
                          : kUnit == 2 ? high
                                       : high >> 2;
    return low | (bits & as_int32(all_bytes(0x30)));
  }
};

struct Codes5 {
  static constexpr int kStepK = 8, kLines = 5, kOffset = 16, kLinesAtOnce = 1;
  template <int kUnit>
  static inline Int32x16 load(const uint8_t* step, int j) {
    return add_bits(nibbles<kUnit>(load_line(step, j)), step + kStepBytes + 16 * j + 8 * kUnit, 16);
  }
};

struct Codes4 {
  static constexpr int kStepK = 8, kLines = 4, kOffset = 8, kLinesAtOnce = 4;
  template <int kUnit>
  static inline Int32x16 load(const uint8_t* step, int j) {
    return nibbles<kUnit>(load_line(step, j));
  }
};

struct Codes3 {
  static constexpr int kStepK = 16, kLines = 6, kOffset = 4, kLinesAtOnce = 4;
  template <int kUnit>
  static inline Int32x16 load(const uint8_t* step, int j) {
    const uint8_t* const high = step + kStepBytes + 32 * j + 8 * kUnit;
    return add_bits(pairs<kUnit>(load_line(step, j)), high, 4);
  }
};

struct Codes2 {
  static constexpr int kStepK = 16, kLines = 4, kOffset = 0, kLinesAtOnce = 4;
  template <int kUnit>
  static inline Int32x16 load(const uint8_t* step, int j) {
    return pairs<kUnit>(load_line(step, j));
  }
};

// 4-bit codes that a table maps to others: base/weight_format.cpp has the values.
struct Fp4Table {
  static constexpr int kOffset = 12;
  static constexpr char kValues[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
};
struct Iq4Table {
  static constexpr int kOffset = 128;
  static constexpr char kValues[16] = {1,    24,   45,   63,  79,  93,  106, 118,
                                       -127, -115, -103, -90, -75, -59, -39, -15};
};

template <typename Table>
struct CodesOf {
  static constexpr int kStepK = 8, kLines = 4, kOffset = Table::kOffset, kLinesAtOnce = 4;
  template <int kUnit>
  static inline Int32x16 load(const uint8_t* step, int j) {
    const __m512i table =
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(Table::kValues)));
    return as_int32(_mm512_shuffle_epi8(table, as_bits(Codes4::load<kUnit>(step, j))));
  }
};

// What a group has beside a scale.
enum class Form {
  kOffset,   // nothing: the offset of its code
  kZero,     // a zero
  kMinimum,  // a minimum
  kColumn,   // nothing, but the panel has a scale a column
};

inline __m512 load_fp16(const uint8_t* source) {
  return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(source)));
}
inline __m512i load_unsigned(const uint8_t* source) {
  return _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(source)));
}

struct Bf16Scales {
  static constexpr Form kForm = Form::kOffset;
  static constexpr int kBytes = 128, kBlockBytes = 0;
  static inline __m512 scale(const uint8_t* at, const uint8_t*, int j) {
    return load_bf16_scales(at + 32 * j);
  }
};

struct ColumnScales : Bf16Scales {
  static constexpr Form kForm = Form::kColumn;
};

struct Fp16Scales {
  static constexpr Form kForm = Form::kOffset;
  static constexpr int kBytes = 128, kBlockBytes = 0;
  static inline __m512 scale(const uint8_t* at, const uint8_t*, int j) {
    return load_fp16(at + 32 * j);
  }
};

struct Fp32Scales {
  static constexpr Form kForm = Form::kOffset;
  static constexpr int kBytes = 256, kBlockBytes = 0;
  static inline __m512 scale(const uint8_t* at, const uint8_t*, int j) {
    return _mm512_load_ps(at + 64 * j);
  }
};

struct Fp16ZeroScales : Fp16Scales {
  static constexpr Form kForm = Form::kZero;
  static constexpr int kBytes = 192;
  static inline Int32x16 zero(const uint8_t* at, int j) {
    return as_int32(load_unsigned(at + 128 + 16 * j));
  }
};

struct Fp16MinScales : Fp16Scales {
  static constexpr Form kForm = Form::kMinimum;
  static constexpr int kBytes = 256;
  static inline __m512 minimum(const uint8_t* at, const uint8_t*, int j) {
    return load_fp16(at + 128 + 32 * j);
  }
};

struct BlockScales {
  static constexpr Form kForm = Form::kOffset;
  static constexpr int kBytes = 64, kBlockBytes = 128;
  static inline __m512 scale(const uint8_t* at, const uint8_t* block, int j) {
    const __m128i c = _mm_load_si128(reinterpret_cast<const __m128i*>(at + 16 * j));
    return _mm512_mul_ps(load_fp16(block + 32 * j), _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(c)));
  }
};

struct BlockMinScales {
  static constexpr Form kForm = Form::kMinimum;
  static constexpr int kBytes = 128, kBlockBytes = 256;
  static inline __m512 scale(const uint8_t* at, const uint8_t* block, int j) {
    return _mm512_mul_ps(load_fp16(block + 32 * j), to_float(as_int32(load_unsigned(at + 16 * j))));
  }
  static inline __m512 minimum(const uint8_t* at, const uint8_t* block, int j) {
    const __m512 b = to_float(as_int32(load_unsigned(at + 64 + 16 * j)));
    return -_mm512_mul_ps(load_fp16(block + 128 + 32 * j), b);
  }
};

template <typename Codes, typename Scales>
constexpr int code_offset_of() {
  return Scales::kForm == Form::kOffset || Scales::kForm == Form::kColumn ? Codes::kOffset : 0;
}

// k of a super-block.
constexpr int kBlockK = 256;

}  // namespace
}  // namespace kt
