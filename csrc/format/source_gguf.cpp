// Sources of GGUF: blocks of 32 or 256 weights as ggml has them (ggml-common.h; the gguf package's
// quants.py decodes the same).
#include <algorithm>
#include <cstring>
#include <iterator>

#include "base/unaligned.h"
#include "format/source_decoders.h"

namespace kt {
namespace {

constexpr int kSmall = 32;  // weights of a block without super-blocks

float half_at(const uint8_t* from) { return fp16_to_float(load<uint16_t>(from)); }

uint8_t* codes_at(CodedPanel* panel, int column, int64_t k) { return panel->row(column) + k; }

// 32 nibbles of 16 bytes: the low ones first.
void halves(const uint8_t* nibbles, uint8_t* code) {
  for (int i = 0; i < 16; ++i) {
    code[i] = nibbles[i] & 15;
    code[16 + i] = nibbles[i] >> 4;
  }
}

// Bit i of 32 to bit 4 of code i.
void add_fifth_bits(uint32_t bits, uint8_t* code) {
  for (int i = 0; i < kSmall; i += 8) {
    // bit j alone in byte j, then in its top bit, whatever it was
    const uint64_t one_each = (bits >> i & uint64_t{255}) * 0x0101010101010101 & 0x8040201008040201;
    const uint64_t top = (one_each + 0x7f7f7f7f7f7f7f7f) & 0x8080808080808080;
    store(load<uint64_t>(code + i) | top >> 3, code + i);
  }
}

// Q4_0, IQ4_NL: d, nibbles. Q4_1: d, m, nibbles.
template <bool kMinimum>
void decode_4(const uint8_t* block, int64_t index, int column, CodedPanel* panel) {
  const int64_t at = index * kPackedColumns + column;
  panel->scale[at] = half_at(block);
  if (kMinimum) panel->minimum[at] = half_at(block + 2);
  halves(block + (kMinimum ? 4 : 2), codes_at(panel, column, index * kSmall));
}

// Q5_0: d, fifth bits, nibbles. Q5_1: d, m, the same.
template <bool kMinimum>
void decode_5(const uint8_t* block, int64_t index, int column, CodedPanel* panel) {
  const int64_t at = index * kPackedColumns + column;
  uint8_t* const code = codes_at(panel, column, index * kSmall);
  panel->scale[at] = half_at(block);
  if (kMinimum) panel->minimum[at] = half_at(block + 2);
  block += kMinimum ? 4 : 2;
  halves(block + 4, code);
  add_fifth_bits(load<uint32_t>(block), code);
}

// d, 32 int8.
void decode_q8_0(const uint8_t* block, int64_t index, int column, CodedPanel* panel) {
  uint8_t* const code = codes_at(panel, column, index * kSmall);
  panel->scale[index * kPackedColumns + column] = half_at(block);
  for (int i = 0; i < kSmall; ++i) code[i] = block[2 + i] ^ 128;
}

// e8m0, nibbles.
void decode_mxfp4(const uint8_t* block, int64_t index, int column, CodedPanel* panel) {
  panel->scale[index * kPackedColumns + column] = e8m0_to_float(block[0], 0.5f);
  halves(block + 1, codes_at(panel, column, index * kSmall));
}

// Where the scales of group `group` of super-block `index` are.
int64_t group_at(int64_t index, int groups, int group, int column) {
  return (index * groups + group) * kPackedColumns + column;
}

// 256 two-bit codes of 64 bytes: of each 32 bytes, bits 0 and 1 are 32 codes, bits 2 and 3 the
// next.
void pairs_of_bits(const uint8_t* bytes, uint8_t* code) {
  for (int half = 0; half < 2; ++half) {
    for (int j = 0; j < 4; ++j, code += 32)
      for (int i = 0; i < 32; ++i) code[i] = bytes[half * 32 + i] >> (2 * j) & 3;
  }
}

// 16 bytes of scale and minimum, 64 of codes, d, dmin.
void decode_q2_k(const uint8_t* block, int64_t index, int column, CodedPanel* panel) {
  for (int g = 0; g < 16; ++g) {
    panel->sub_scale[group_at(index, 16, g, column)] = block[g] & 15;
    panel->sub_minimum[group_at(index, 16, g, column)] = block[g] >> 4;
  }
  panel->block_scale[index * kPackedColumns + column] = half_at(block + 80);
  panel->block_minimum[index * kPackedColumns + column] = half_at(block + 82);
  pairs_of_bits(block + 16, codes_at(panel, column, index * kSuperBlock));
}

// 32 bytes of third bits (bit j of byte i: weight 32 j + i), 64 of codes, 12 of scales, d.
void decode_q3_k(const uint8_t* block, int64_t index, int column, CodedPanel* panel) {
  const uint8_t* const scales = block + 96;
  for (int g = 0; g < 16; ++g) {
    const int low = scales[g % 8] >> (g / 8 * 4) & 15;
    const int high = scales[8 + g % 4] >> (g / 4 * 2) & 3;
    panel->sub_scale[group_at(index, 16, g, column)] = static_cast<uint8_t>((low | high << 4) - 32);
  }
  panel->block_scale[index * kPackedColumns + column] = half_at(block + 108);
  uint8_t* const code = codes_at(panel, column, index * kSuperBlock);
  pairs_of_bits(block + 32, code);
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < 32; ++i) code[32 * j + i] |= (block[i] >> j & 1) << 2;
}

// d, dmin and 12 bytes of eight 6-bit scales and minima: the heads of Q4_K and Q5_K.
void take_scales(const uint8_t* block, int64_t index, int column, CodedPanel* panel) {
  panel->block_scale[index * kPackedColumns + column] = half_at(block);
  panel->block_minimum[index * kPackedColumns + column] = half_at(block + 2);
  const uint8_t* const packed = block + 4;
  for (int g = 0; g < 4; ++g) {
    const int64_t at = group_at(index, 8, g, column), next = group_at(index, 8, g + 4, column);
    panel->sub_scale[at] = packed[g] & 63;
    panel->sub_minimum[at] = packed[g + 4] & 63;
    panel->sub_scale[next] = static_cast<uint8_t>((packed[g + 8] & 15) | packed[g] >> 6 << 4);
    panel->sub_minimum[next] = static_cast<uint8_t>(packed[g + 8] >> 4 | packed[g + 4] >> 6 << 4);
  }
}

// 256 nibbles of 128 bytes: of each 32 bytes the low ones, then the high ones.
void rows_of_nibbles(const uint8_t* bytes, uint8_t* code) {
  for (int j = 0; j < 4; ++j, bytes += 32, code += 64) {
    for (int i = 0; i < 32; ++i) {
      code[i] = bytes[i] & 15;
      code[32 + i] = bytes[i] >> 4;
    }
  }
}

void decode_q4_k(const uint8_t* block, int64_t index, int column, CodedPanel* panel) {
  take_scales(block, index, column, panel);
  rows_of_nibbles(block + 16, codes_at(panel, column, index * kSuperBlock));
}

// The head, 32 bytes of fifth bits (bit j of byte i: weight 32 j + i), nibbles.
void decode_q5_k(const uint8_t* block, int64_t index, int column, CodedPanel* panel) {
  take_scales(block, index, column, panel);
  uint8_t* const code = codes_at(panel, column, index * kSuperBlock);
  rows_of_nibbles(block + 48, code);
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < 32; ++i) code[32 * j + i] |= (block[16 + i] >> j & 1) << 4;
}

// 128 bytes of nibbles, 64 of two bits more, 16 int8 scales, d. Of each half of the 256: 64 bytes
// of nibbles, the low ones first, and 32 bytes of bits as in Q2_K.
void decode_q6_k(const uint8_t* block, int64_t index, int column, CodedPanel* panel) {
  for (int g = 0; g < 16; ++g) panel->sub_scale[group_at(index, 16, g, column)] = block[192 + g];
  panel->block_scale[index * kPackedColumns + column] = half_at(block + 208);
  uint8_t* const codes = codes_at(panel, column, index * kSuperBlock);
  pairs_of_bits(block + 128, codes);
  for (int half = 0; half < 2; ++half) {
    uint8_t* const code = codes + half * 128;
    for (int i = 0; i < 64; ++i) {
      const uint8_t byte = block[half * 64 + i];
      code[i] = static_cast<uint8_t>(code[i] << 4 | (byte & 15));
      code[64 + i] = static_cast<uint8_t>(code[64 + i] << 4 | byte >> 4);
    }
  }
}

// d, 16 bits of the upper and 4 bytes of the lower parts of eight 6-bit scales, nibbles.
void decode_iq4_xs(const uint8_t* block, int64_t index, int column, CodedPanel* panel) {
  panel->block_scale[index * kPackedColumns + column] = half_at(block);
  const uint16_t high = load<uint16_t>(block + 2);
  for (int g = 0; g < 8; ++g) {
    const int low = block[4 + g / 2] >> (g % 2 * 4) & 15;
    panel->sub_scale[group_at(index, 8, g, column)] =
        static_cast<uint8_t>((low | (high >> (2 * g) & 3) << 4) - 32);
    halves(block + 8 + 16 * g, codes_at(panel, column, index * kSuperBlock + 32 * g));
  }
}

using F = WeightFormat;
constexpr DType kNone = DType::kUint8;
const GgufType kTypes[] = {
    {"Q4_0", kSmall, 18, {F::kInt4H, 32, 0}, kNone, decode_4<false>},
    {"Q4_1", kSmall, 20, {F::kInt4M, 32, 0}, kNone, decode_4<true>},
    {"Q5_0", kSmall, 22, {F::kInt5H, 32, 0}, kNone, decode_5<false>},
    {"Q5_1", kSmall, 24, {F::kInt5M, 32, 0}, kNone, decode_5<true>},
    {"Q8_0", kSmall, 34, {F::kInt8H, 32, 0}, kNone, decode_q8_0},
    {"Q2_K", kSuperBlock, 84, {F::kInt2KM, 16, 0}, kNone, decode_q2_k},
    {"Q3_K", kSuperBlock, 110, {F::kInt3K, 16, 0}, kNone, decode_q3_k},
    {"Q4_K", kSuperBlock, 144, {F::kInt4KM, 32, 0}, kNone, decode_q4_k},
    {"Q5_K", kSuperBlock, 176, {F::kInt5KM, 32, 0}, kNone, decode_q5_k},
    {"Q6_K", kSuperBlock, 210, {F::kInt6K, 16, 0}, kNone, decode_q6_k},
    {"IQ4_NL", kSmall, 18, {F::kIq4H, 32, 0}, kNone, decode_4<false>},
    {"IQ4_XS", kSuperBlock, 136, {F::kIq4K, 32, 0}, kNone, decode_iq4_xs},
    {"MXFP4", kSmall, 17, {F::kFp4, 32, 0}, kNone, decode_mxfp4},
    {"BF16", 1, 2, {F::kBFloat16, 0, 0}, DType::kBFloat16, nullptr},
    {"F16", 1, 2, {F::kBFloat16, 0, 0}, DType::kFloat16, nullptr},
    {"F32", 1, 4, {F::kBFloat16, 0, 0}, DType::kFloat32, nullptr},
};

}  // namespace

const GgufType* find_gguf_type(const std::string& name) {
  const auto* const found = std::find_if(std::begin(kTypes), std::end(kTypes),
                                         [&](const GgufType& type) { return name == type.name; });
  return found == std::end(kTypes) ? nullptr : found;
}

std::string list_gguf_types() {
  std::string names;
  for (const GgufType& type : kTypes) names.append(names.empty() ? "" : ", ").append(type.name);
  return names;
}

void decode_gguf(const SourceMatrix& matrix, const SourceRows& rows, CodedPanel* panel) {
  const GgufType& type = *matrix.format.gguf;
  const int64_t blocks = matrix.k / type.columns;
  const auto* block =
      static_cast<const uint8_t*>(matrix.parts[0].data) + rows.first * blocks * type.bytes;
  for (int64_t i = 0; i < rows.count; ++i) {
    for (int64_t index = 0; index < blocks; ++index, block += type.bytes)
      type.decode(block, index, rows.column + static_cast<int>(i), panel);
  }
}

}  // namespace kt
