// The codes of a panel, in the bits of packed_layout.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "format/coded_panel.h"

namespace kt {

inline constexpr int64_t kPieceColumns = 64;  // k of a piece of the 64 rows that stays in the L1

// Calls body(k, column, part) for every unit of kUnit k, with the place of its codes.
template <int kUnit, typename Byte, typename Body>
void for_each_unit(const PackedLayout& layout, int64_t padded_k, Byte* panel, Body&& body) {
  for (int64_t begin = 0; begin < padded_k; begin += kPieceColumns) {
    const int count = static_cast<int>(std::min(kPieceColumns, padded_k - begin) / kUnit);
    Byte* parts[kPieceColumns / kUnit];
    for (int i = 0; i < count; ++i) parts[i] = panel + layout.code_offset(begin + i * kUnit);
    for (int column = 0; column < kPackedColumns; ++column) {
      for (int i = 0; i < count; ++i) body(begin + i * kUnit, column, parts[i]);
    }
  }
}

// Between the codes of `panel` and those of a packed panel of its layout; both write codes only.
void pack_codes(const CodedPanel& panel, uint8_t* packed);
void unpack_codes(const uint8_t* packed, CodedPanel* panel);

}  // namespace kt
