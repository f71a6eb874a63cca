// From the parts of a source to codes and scales, one family of formats a file. For source.cpp.
//
// Each fills rows first .. first + count - 1 into columns column .. of a panel that was reset for
// the matrix's k, in a layout that check_source_layout() takes, or in matrix.coded.
#pragma once

#include <cstring>
#include <string>

#include "base/dtype.h"
#include "base/unaligned.h"
#include "format/coded_panel.h"
#include "format/source.h"

namespace kt {

void decode_fp8(const SourceMatrix& matrix, const SourceRows& rows, CodedPanel* panel);
void decode_fp4(const SourceMatrix& matrix, const SourceRows& rows, CodedPanel* panel);
void decode_pack_quantized(const SourceMatrix& matrix, const SourceRows& rows, CodedPanel* panel);
void decode_gptq(const SourceMatrix& matrix, const SourceRows& rows, CodedPanel* panel);
void decode_awq(const SourceMatrix& matrix, const SourceRows& rows, CodedPanel* panel);
void decode_kt(const SourceMatrix& matrix, const SourceRows& rows, CodedPanel* panel);
void decode_gguf(const SourceMatrix& matrix, const SourceRows& rows, CodedPanel* panel);

// Refuses a stored zero point of 15 in the first version of gptq, where a zero is stored less 1. A
// zero of 0 has no place there: vLLM reads 15 as 16, AutoGPTQ as 0, and GPTQModel, which subtracted
// from whole words, as 0 with a borrow from the next zero. Errors: kt::Error naming row and group.
void check_stored_zeros(const SourceMatrix& matrix);
// Whether all zero points of gptq are 8.
bool is_symmetric(const SourceMatrix& matrix);

// A type of GGUF by its name; null: none of those that are known.
const GgufType* find_gguf_type(const std::string& name);
std::string list_gguf_types();

// Blocks of a type: `columns` of k in `bytes`.
using DecodeBlock = void (*)(const uint8_t* block, int64_t index, int column, CodedPanel* panel);
struct GgufType {
  const char* name;
  int columns;
  int bytes;
  PackedLayout coded;
  DType dtype;         // of floats
  DecodeBlock decode;  // null: floats
};

// Element i of a part of fp32, bf16 or fp16.
inline float float_at(const SourcePart& part, int64_t i) {
  const auto* const bytes = static_cast<const uint8_t*>(part.data);
  if (part.dtype == DType::kFloat32) return load<float>(bytes + 4 * i);
  const auto bits = load<uint16_t>(bytes + 2 * i);
  return part.dtype == DType::kBFloat16 ? bf16_to_float(bits) : fp16_to_float(bits);
}

// 2^(code - 127) times `factor`, exact; NaN for 255.
inline float e8m0_to_float(uint8_t code, float factor) {
  const uint32_t bits = code == 255 ? 0x7fc00000u : code == 0 ? 0x00400000u : uint32_t{code} << 23;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value * factor;
}

// dst[2 i], dst[2 i + 1] = low and high nibble of src[i].
inline void spread_nibbles(const uint8_t* src, int64_t count, uint8_t* dst) {
  for (int64_t i = 0; i < count / 2; ++i) {
    dst[2 * i] = src[i] & 15;
    dst[2 * i + 1] = src[i] >> 4;
  }
  if (count % 2 != 0) dst[count - 1] = src[count / 2] & 15;
}

}  // namespace kt
