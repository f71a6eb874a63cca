// The formats of packed weights: what a code is and how its scales are kept. One table, in
// weight_format.cpp; format/packed_layout.h has the bytes. Not for ISA objects.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/dtype.h"

namespace kt {

// The name of a format is its code and the first letters of its scales: h fp16, f fp32, z fp16 with
// a zero point, m fp16 with a minimum, k and km the two levels of GGUF's K-quants, c bf16 with a
// scale a column; none: bf16 groups (int4, fp4, fp8), a row's fp32 scale (int8).
enum class WeightFormat : uint8_t {
  kInt8,
  kInt8H,
  kInt8F,
  kInt6K,
  kInt5H,
  kInt5M,
  kInt5KM,
  kInt4,
  kInt4H,
  kInt4F,
  kInt4Z,
  kInt4M,
  kInt4KM,
  kInt3K,
  kInt2KM,
  kFp4,
  kFp4C,
  kIq4H,
  kIq4K,
  kFp8,
  kFp8F,
  kBFloat16,
};

// The scales of a group of k, [64 columns] of each, behind its codes.
enum class ScaleForm : uint8_t {
  kNone,      // bf16 weights
  kRow,       // fp32, one a row, at the panel's end behind an int32 compensation
  kBf16,      // s
  kFp16,      // s
  kFp32,      // s
  kFp16Zero,  // fp16 s, then uint8 zero: s * (u - zero)
  kFp16Min,   // fp16 s, then fp16 m: s * u + m
  kBlock,     // int8 c; before each 256 k: fp16 d: (d * c) * (u - offset)
  kBlockMin,  // uint8 c, then uint8 b; before each 256 k: fp16 d, then fp16 e: d * c * u - e * b
  kColumn,    // bf16 s; at the panel's end fp32 t, one a column: t * s * (u - offset)
};

// What a code means: value = scale * (unsigned code - offset), where a table maps codes to others
// first.
struct WeightFormatInfo {
  WeightFormat format;
  const char* name;
  DType code;  // kInt2 .. kInt8, kFp4, kIq4, kFp8 or kBFloat16
  ScaleForm scales;
  int code_offset;       // of the unsigned code; 0 with a zero or a minimum, and for floats
  int step_k;            // columns of k in the smallest unit of its lines
  const uint8_t* table;  // 16 unsigned values of 4-bit codes, or null
};

// Every format, in the order of the enumerators.
const std::vector<WeightFormatInfo>& list_weight_formats();
const WeightFormatInfo& format_info(WeightFormat format);
inline const char* format_name(WeightFormat format) { return format_info(format).name; }

// Columns of k under one d of kBlock and kBlockMin.
constexpr int kSuperBlock = 256;

// Whether activations beside it are bf16; else they are int8.
bool takes_bf16_rows(WeightFormat format);
// Whether it keeps a scale, and so needs a sum of activations, for each group of k.
bool has_groups(WeightFormat format);

}  // namespace kt
