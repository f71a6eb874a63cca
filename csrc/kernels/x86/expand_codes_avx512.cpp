// Unpacks one panel into bytes, for the integer kernels of many rows: one function a format.
#include "kernels/x86/codes_avx512.h"

namespace kt {
namespace {

// Line j of a step of codes, from its unit kUnit on.
template <typename Codes, int kUnit>
inline void expand_line(const uint8_t* step, int j, uint8_t* scratch) {
  _mm512_store_si512(scratch + kStepBytes * kUnit + 64 * j,
                     as_bits(Codes::template load<kUnit>(step, j)));
  if constexpr (4 * kUnit + 4 < Codes::kStepK) expand_line<Codes, kUnit + 1>(step, j, scratch);
}

template <typename Codes, typename Scales>
inline void expand(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  constexpr int64_t kGroupBytes = 4 * kPanelColumns;
  const int64_t groups = (k + group_size - 1) / group_size;
  uint8_t* scales = scratch + int64_t{kPanelColumns} * k;
  uint8_t* more = scales + groups * kGroupBytes;
  const uint8_t* block = nullptr;
  for (int64_t done = 0; done < k; scales += kGroupBytes, more += kGroupBytes) {
    if (Scales::kBlockBytes > 0 && done % kBlockK == 0) {
      block = panel;
      panel += Scales::kBlockBytes;
    }
    const int64_t group_end = done + group_size < k ? done + group_size : k;
    for (; done < group_end; done += Codes::kStepK) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) expand_line<Codes, 0>(panel, j, scratch);
      panel += 64 * Codes::kLines;
      scratch += kStepBytes * (Codes::kStepK / 4);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      _mm512_store_ps(scales + 64 * j, Scales::scale(panel, block, j));
      if constexpr (Scales::kForm == Form::kZero)
        _mm512_store_si512(more + 64 * j, as_bits(Scales::zero(panel, j)));
      if constexpr (Scales::kForm == Form::kMinimum)
        _mm512_store_ps(more + 64 * j, Scales::minimum(panel, block, j));
    }
    panel += Scales::kBytes;
  }
  if constexpr (Scales::kForm == Form::kColumn) {
    // behind the scales: this form has neither zeros nor minima
    for (int j = 0; j < 4; ++j)
      _mm512_store_si512(scales + 64 * j, _mm512_load_si512(panel + 64 * j));
  }
}

}  // namespace

void expand_int6k_avx512(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  expand<Codes6, BlockScales>(panel, k, group_size, scratch);
}
void expand_int5h_avx512(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  expand<Codes5, Fp16Scales>(panel, k, group_size, scratch);
}
void expand_int5m_avx512(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  expand<Codes5, Fp16MinScales>(panel, k, group_size, scratch);
}
void expand_int5km_avx512(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  expand<Codes5, BlockMinScales>(panel, k, group_size, scratch);
}
void expand_int4_avx512(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  expand<Codes4, Bf16Scales>(panel, k, group_size, scratch);
}
void expand_int4h_avx512(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  expand<Codes4, Fp16Scales>(panel, k, group_size, scratch);
}
void expand_int4f_avx512(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  expand<Codes4, Fp32Scales>(panel, k, group_size, scratch);
}
void expand_int4z_avx512(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  expand<Codes4, Fp16ZeroScales>(panel, k, group_size, scratch);
}
void expand_int4m_avx512(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  expand<Codes4, Fp16MinScales>(panel, k, group_size, scratch);
}
void expand_int4km_avx512(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  expand<Codes4, BlockMinScales>(panel, k, group_size, scratch);
}
void expand_int3k_avx512(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  expand<Codes3, BlockScales>(panel, k, group_size, scratch);
}
void expand_int2km_avx512(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  expand<Codes2, BlockMinScales>(panel, k, group_size, scratch);
}
void expand_fp4_avx512(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  expand<CodesOf<Fp4Table>, Bf16Scales>(panel, k, group_size, scratch);
}
void expand_fp4c_avx512(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  expand<CodesOf<Fp4Table>, ColumnScales>(panel, k, group_size, scratch);
}
void expand_iq4h_avx512(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  expand<CodesOf<Iq4Table>, Fp16Scales>(panel, k, group_size, scratch);
}
void expand_iq4k_avx512(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch) {
  expand<CodesOf<Iq4Table>, BlockScales>(panel, k, group_size, scratch);
}

}  // namespace kt
