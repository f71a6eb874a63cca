#include "format/panel_codes.h"

#include "base/unaligned.h"

namespace kt {
namespace {

// Nibbles of k .. k + 3 low, of k + 4 .. k + 7 high.
uint32_t nibbles(const uint8_t* code) {
  return (load<uint32_t>(code) & 0x0f0f0f0f) | (load<uint32_t>(code + 4) & 0x0f0f0f0f) << 4;
}

void store_nibbles(uint32_t word, uint8_t* code) {
  store(word & 0x0f0f0f0f, code);
  store(word >> 4 & 0x0f0f0f0f, code + 4);
}

// Two bits each, from `shift` on, of 16 codes: byte j those of j, 4 + j, 8 + j and 12 + j.
uint32_t pairs(const uint8_t* code, int shift) {
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i)
    word |= (load<uint32_t>(code + 4 * i) >> shift & 0x03030303) << (2 * i);
  return word;
}

void add_pairs(uint32_t word, int shift, uint8_t* code) {
  for (int i = 0; i < 4; ++i) {
    const uint32_t two = word >> (2 * i) & 0x03030303;
    store(load<uint32_t>(code + 4 * i) | two << shift, code + 4 * i);
  }
}

// Bit `bit` of the four codes from `code` on, as a nibble; and back.
uint32_t bits_of_four(const uint8_t* code, int bit) {
  return (load<uint32_t>(code) >> bit & 0x01010101) * 0x01020408 >> 24 & 15;
}

void add_bits_to_four(uint32_t nibble, int bit, uint8_t* code) {
  // copies of the nibble 7 bits apart: bit j of it is bit 0 of byte j
  const uint32_t spread = nibble * 0x00204081 & 0x01010101;
  store(load<uint32_t>(code) | spread << bit, code);
}

// A line of single bits has a nibble for each column and four k: even columns are low ones.
void put_nibble(uint32_t nibble, int column, uint8_t* byte) {
  *byte = static_cast<uint8_t>(column % 2 == 0 ? nibble : *byte | nibble << 4);
}

uint32_t get_nibble(int column, const uint8_t* byte) {
  return column % 2 == 0 ? *byte & 15u : *byte >> 4;
}

// Where a line of single bits has the nibble of a column, `words` of 64 bits for each 16 columns.
int nibble_offset(int column, int words) { return column / 16 * words * 8 + column % 16 / 2; }

constexpr uint32_t kSignBits = 0x80808080;  // between unsigned codes and two's complement

}  // namespace

void pack_codes(const CodedPanel& panel, uint8_t* packed) {
  const PackedLayout& layout = panel.layout;
  const int64_t padded_k = panel.padded_k;
  switch (format_info(layout.format).code) {
    case DType::kInt8:
      return for_each_unit<4>(layout, padded_k, packed, [&](int64_t k, int column, uint8_t* part) {
        store(load<uint32_t>(panel.row(column) + k) ^ kSignBits, part + column * 4);
      });
    case DType::kFp8:
      return for_each_unit<4>(layout, padded_k, packed, [&](int64_t k, int column, uint8_t* part) {
        const uint8_t* const code = panel.row(column) + k;
        part += column / 4 * 16 + column % 4 * 2;
        std::memcpy(part, code, 2);
        std::memcpy(part + 8, code + 2, 2);
      });
    case DType::kInt6:
      return for_each_unit<16>(layout, padded_k, packed, [&](int64_t k, int column, uint8_t* part) {
        const uint8_t* const code = panel.row(column) + k;
        part += column * 4;
        store(nibbles(code), part);
        store(nibbles(code + 8), part + kPackedStepBytes);
        store(pairs(code, 4), part + 2 * kPackedStepBytes);
      });
    case DType::kInt5:
      return for_each_unit<8>(layout, padded_k, packed, [&](int64_t k, int column, uint8_t* part) {
        const uint8_t* const code = panel.row(column) + k;
        store(nibbles(code), part + column * 4);
        uint8_t* const line = part + kPackedStepBytes + nibble_offset(column, 2);
        put_nibble(bits_of_four(code, 4), column, line);
        put_nibble(bits_of_four(code + 4, 4), column, line + 8);
      });
    case DType::kInt3:
      return for_each_unit<16>(layout, padded_k, packed, [&](int64_t k, int column, uint8_t* part) {
        const uint8_t* const code = panel.row(column) + k;
        store(pairs(code, 0), part + column * 4);
        uint8_t* const line = part + kPackedStepBytes + nibble_offset(column, 4);
        for (int i = 0; i < 4; ++i) put_nibble(bits_of_four(code + 4 * i, 2), column, line + 8 * i);
      });
    case DType::kInt2:
      return for_each_unit<16>(layout, padded_k, packed, [&](int64_t k, int column, uint8_t* part) {
        store(pairs(panel.row(column) + k, 0), part + column * 4);
      });
    default:  // four bits
      return for_each_unit<8>(layout, padded_k, packed, [&](int64_t k, int column, uint8_t* part) {
        store(nibbles(panel.row(column) + k), part + column * 4);
      });
  }
}

void unpack_codes(const uint8_t* packed, CodedPanel* panel) {
  const PackedLayout& layout = panel->layout;
  const int64_t padded_k = panel->padded_k;
  const auto code_at = [&](int column, int64_t k) { return panel->row(column) + k; };
  switch (format_info(layout.format).code) {
    case DType::kInt8:
      return for_each_unit<4>(
          layout, padded_k, packed, [&](int64_t k, int column, const uint8_t* part) {
            store(load<uint32_t>(part + column * 4) ^ kSignBits, code_at(column, k));
          });
    case DType::kFp8:
      return for_each_unit<4>(layout, padded_k, packed,
                              [&](int64_t k, int column, const uint8_t* part) {
                                part += column / 4 * 16 + column % 4 * 2;
                                std::memcpy(code_at(column, k), part, 2);
                                std::memcpy(code_at(column, k + 2), part + 8, 2);
                              });
    case DType::kInt6:
      return for_each_unit<16>(
          layout, padded_k, packed, [&](int64_t k, int column, const uint8_t* part) {
            part += column * 4;
            store_nibbles(load<uint32_t>(part), code_at(column, k));
            store_nibbles(load<uint32_t>(part + kPackedStepBytes), code_at(column, k + 8));
            add_pairs(load<uint32_t>(part + 2 * kPackedStepBytes), 4, code_at(column, k));
          });
    case DType::kInt5:
      return for_each_unit<8>(
          layout, padded_k, packed, [&](int64_t k, int column, const uint8_t* part) {
            store_nibbles(load<uint32_t>(part + column * 4), code_at(column, k));
            const uint8_t* const line = part + kPackedStepBytes + nibble_offset(column, 2);
            add_bits_to_four(get_nibble(column, line), 4, code_at(column, k));
            add_bits_to_four(get_nibble(column, line + 8), 4, code_at(column, k + 4));
          });
    case DType::kInt3:
      return for_each_unit<16>(
          layout, padded_k, packed, [&](int64_t k, int column, const uint8_t* part) {
            std::memset(code_at(column, k), 0, 16);
            add_pairs(load<uint32_t>(part + column * 4), 0, code_at(column, k));
            const uint8_t* const line = part + kPackedStepBytes + nibble_offset(column, 4);
            for (int i = 0; i < 4; ++i)
              add_bits_to_four(get_nibble(column, line + 8 * i), 2, code_at(column, k + 4 * i));
          });
    case DType::kInt2:
      return for_each_unit<16>(
          layout, padded_k, packed, [&](int64_t k, int column, const uint8_t* part) {
            std::memset(code_at(column, k), 0, 16);
            add_pairs(load<uint32_t>(part + column * 4), 0, code_at(column, k));
          });
    default:  // four bits
      return for_each_unit<8>(
          layout, padded_k, packed, [&](int64_t k, int column, const uint8_t* part) {
            store_nibbles(load<uint32_t>(part + column * 4), code_at(column, k));
          });
  }
}

}  // namespace kt
