// Groups of integers to bf16 for tiles: weights with their scales, one function a format; and rows
// of int8 codes, which bf16 holds exactly.
#include "kernels/kernel.h"
#include "kernels/x86/codes_avx512.h"
#include "kernels/x86/pack_bytes_amx.h"
#include "kernels/x86/pairs_avx512bf16.h"

namespace kt {

extern const RowPacking pack_bf16_amxbf16;
extern const RowPacking pack_int8_bf16_amxbf16;

namespace {

// Codes less kOffset in fp32: of byte kByte of unit kUnit of a step, one for each column of line j.
template <typename Codes, int kOffset>
struct CodeValues {
  template <int kUnit, int kByte>
  static inline __m512 load(const uint8_t* step, int j) {
    const Int32x16 codes = Codes::template load<kUnit>(step, j) >> 8 * kByte;
    return to_float((codes & 0xff) - kOffset);
  }
};

// Of 4-bit codes: what index stands for, less kOffset.
template <typename Codes>
constexpr int value_of(int index) {
  return index;
}
template <>
constexpr int value_of<CodesOf<Fp4Table>>(int index) {
  return Fp4Table::kValues[index];
}
template <>
constexpr int value_of<CodesOf<Iq4Table>>(int index) {
  return static_cast<uint8_t>(Iq4Table::kValues[index]);
}

// They select their value by the low bits of a lane; the bits above are not looked at.
template <typename Codes, int kOffset>
  requires(Codes::kStepK == 8 && Codes::kLines == 4)
struct CodeValues<Codes, kOffset> {
  struct Table {
    alignas(64) float values[16];
  };
  static constexpr Table make_table() {
    Table table{};
    for (int i = 0; i < 16; ++i) table.values[i] = static_cast<float>(value_of<Codes>(i) - kOffset);
    return table;
  }
  static constexpr Table kTable = make_table();

  template <int kUnit, int kByte>
  static inline __m512 load(const uint8_t* step, int j) {
    const Int32x16 codes = load_line(step, j) >> (8 * kByte + 4 * kUnit);
    return _mm512_permutexvar_ps(as_bits(codes), _mm512_load_ps(kTable.values));
  }
};

// What turns a code into a weight in the columns of a line.
template <typename Scales>
struct Line {
  __m512 scale, more;  // more: zeros, minima or the columns' scales

  Line(const uint8_t* at, const uint8_t* block, const uint8_t* columns, int j)
      : scale(Scales::scale(at, block, j)) {
    if constexpr (Scales::kForm == Form::kZero) more = to_float(Scales::zero(at, j));
    if constexpr (Scales::kForm == Form::kMinimum) more = Scales::minimum(at, block, j);
    if constexpr (Scales::kForm == Form::kColumn) more = _mm512_load_ps(columns + 64 * j);
  }
  inline __m512 weight(__m512 code) const {
    if constexpr (Scales::kForm == Form::kMinimum) return _mm512_fmadd_ps(code, scale, more);
    if constexpr (Scales::kForm == Form::kZero) code = _mm512_sub_ps(code, more);
    const __m512 weight = _mm512_mul_ps(code, scale);
    return Scales::kForm == Form::kColumn ? _mm512_mul_ps(weight, more) : weight;
  }
};

template <typename Codes, typename Scales>
inline void expand(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  using Values = CodeValues<Codes, code_offset_of<Codes, Scales>()>;
  constexpr int64_t kCodeBytes = 64 * Codes::kLines;
  const int64_t groups = (k + group_size - 1) / group_size;
  const uint8_t* const columns = panel + k / Codes::kStepK * kCodeBytes + groups * Scales::kBytes;
  const uint8_t* block = nullptr;
  for (int32_t begin = 0; begin < k; begin += group_size) {
    if (Scales::kBlockBytes > 0 && begin % kBlockK == 0) {
      block = panel;
      panel += Scales::kBlockBytes;
    }
    const int64_t steps = (k - begin < group_size ? k - begin : group_size) / Codes::kStepK;
    const uint8_t* const at = panel + steps * kCodeBytes;
    for (int j = 0; j < 4; ++j) {
      const Line<Scales> line(at, block, columns, j);
      uint8_t* target = scratch + 64 * j;
      for (const uint8_t* step = panel; step < at; step += kCodeBytes) {
        unroll<Codes::kStepK / 4>([&](auto unit) KT_INLINE {
          constexpr int u = unit.value;
          const __m512i low = pairs_of(line.weight(Values::template load<u, 0>(step, j)),
                                       line.weight(Values::template load<u, 1>(step, j)));
          const __m512i high = pairs_of(line.weight(Values::template load<u, 2>(step, j)),
                                        line.weight(Values::template load<u, 3>(step, j)));
          _mm512_store_si512(target, low);
          _mm512_store_si512(target + kStepBytes, high);
          target += 2 * kStepBytes;
        });
      }
    }
    scratch += steps * (Codes::kStepK / 2) * kStepBytes;
    panel = at + Scales::kBytes;
  }
}

void pack_row(const uint8_t* codes, int32_t k, const float* scales, int32_t a_block,
              uint8_t* packed) {
  for (int32_t at = 0; at < k; at += 32, packed += kTileRows * kTileBytes) {
    const auto* const source = reinterpret_cast<const __m128i*>(codes + at);
    // times 1 where the row has one scale, which is left to the end
    const __m512 scale = _mm512_set1_ps(a_block < k ? scales[at / a_block] : 1.0f);
    const auto value = [&](int i) {
      const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(source + i));
      return _mm512_mul_ps(_mm512_cvtepi32_ps(wide), scale);
    };
    _mm512_storeu_si512(packed, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(value(1), value(0))));
  }
}

}  // namespace

void expand_int8h_bf16_amxbf16(const uint8_t* panel, int32_t k, int32_t group_size,
                               uint8_t* scratch) {
  expand<Codes8, Fp16Scales>(panel, k, group_size, scratch);
}
void expand_int8f_bf16_amxbf16(const uint8_t* panel, int32_t k, int32_t group_size,
                               uint8_t* scratch) {
  expand<Codes8, Fp32Scales>(panel, k, group_size, scratch);
}
void expand_int6k_bf16_amxbf16(const uint8_t* panel, int32_t k, int32_t group_size,
                               uint8_t* scratch) {
  expand<Codes6, BlockScales>(panel, k, group_size, scratch);
}
void expand_int5h_bf16_amxbf16(const uint8_t* panel, int32_t k, int32_t group_size,
                               uint8_t* scratch) {
  expand<Codes5, Fp16Scales>(panel, k, group_size, scratch);
}
void expand_int5m_bf16_amxbf16(const uint8_t* panel, int32_t k, int32_t group_size,
                               uint8_t* scratch) {
  expand<Codes5, Fp16MinScales>(panel, k, group_size, scratch);
}
void expand_int5km_bf16_amxbf16(const uint8_t* panel, int32_t k, int32_t group_size,
                                uint8_t* scratch) {
  expand<Codes5, BlockMinScales>(panel, k, group_size, scratch);
}
void expand_int4_bf16_amxbf16(const uint8_t* panel, int32_t k, int32_t group_size,
                              uint8_t* scratch) {
  expand<Codes4, Bf16Scales>(panel, k, group_size, scratch);
}
void expand_int4h_bf16_amxbf16(const uint8_t* panel, int32_t k, int32_t group_size,
                               uint8_t* scratch) {
  expand<Codes4, Fp16Scales>(panel, k, group_size, scratch);
}
void expand_int4f_bf16_amxbf16(const uint8_t* panel, int32_t k, int32_t group_size,
                               uint8_t* scratch) {
  expand<Codes4, Fp32Scales>(panel, k, group_size, scratch);
}
void expand_int4z_bf16_amxbf16(const uint8_t* panel, int32_t k, int32_t group_size,
                               uint8_t* scratch) {
  expand<Codes4, Fp16ZeroScales>(panel, k, group_size, scratch);
}
void expand_int4m_bf16_amxbf16(const uint8_t* panel, int32_t k, int32_t group_size,
                               uint8_t* scratch) {
  expand<Codes4, Fp16MinScales>(panel, k, group_size, scratch);
}
void expand_int4km_bf16_amxbf16(const uint8_t* panel, int32_t k, int32_t group_size,
                                uint8_t* scratch) {
  expand<Codes4, BlockMinScales>(panel, k, group_size, scratch);
}
void expand_int3k_bf16_amxbf16(const uint8_t* panel, int32_t k, int32_t group_size,
                               uint8_t* scratch) {
  expand<Codes3, BlockScales>(panel, k, group_size, scratch);
}
void expand_int2km_bf16_amxbf16(const uint8_t* panel, int32_t k, int32_t group_size,
                                uint8_t* scratch) {
  expand<Codes2, BlockMinScales>(panel, k, group_size, scratch);
}
void expand_fp4_bf16_amxbf16(const uint8_t* panel, int32_t k, int32_t group_size,
                             uint8_t* scratch) {
  expand<CodesOf<Fp4Table>, Bf16Scales>(panel, k, group_size, scratch);
}
void expand_fp4c_bf16_amxbf16(const uint8_t* panel, int32_t k, int32_t group_size,
                              uint8_t* scratch) {
  expand<CodesOf<Fp4Table>, ColumnScales>(panel, k, group_size, scratch);
}
void expand_iq4h_bf16_amxbf16(const uint8_t* panel, int32_t k, int32_t group_size,
                              uint8_t* scratch) {
  expand<CodesOf<Iq4Table>, Fp16Scales>(panel, k, group_size, scratch);
}
void expand_iq4k_bf16_amxbf16(const uint8_t* panel, int32_t k, int32_t group_size,
                              uint8_t* scratch) {
  expand<CodesOf<Iq4Table>, BlockScales>(panel, k, group_size, scratch);
}

const RowPacking pack_bf16_amxbf16 = {"pack_bf16_amxbf16", 2, pack_bytes<2>};
const RowPacking pack_int8_bf16_amxbf16 = {"pack_int8_bf16_amxbf16", 2, pack_row};

}  // namespace kt
