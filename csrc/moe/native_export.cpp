#include "moe/native_export.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/check.h"
#include "base/span.h"

namespace kt {
namespace {

constexpr int64_t kBlock = 128;

// 2^(e - 127) as e; a scale of e8m0 is a power of two that fp32 holds, 2^-127 as a subnormal.
uint8_t e8m0_of(float scale) { return static_cast<uint8_t>(std::bit_cast<uint32_t>(scale) >> 23); }

}  // namespace

NativeForm::NativeForm(const MoeConfig& config, int64_t ranks) : layout_(config.layouts[0]) {
  const bool is_int4 = layout_.format == WeightFormat::kInt4 && layout_.max_rotation == 0;
  const bool is_mx = layout_.format == WeightFormat::kFp4 || layout_.format == WeightFormat::kFp8;
  const bool is_fp8 = layout_.format == WeightFormat::kFp8F &&
                      (layout_.group_size == 0 || layout_.group_size == kBlock);
  KT_CHECK(config.layouts[0] == config.layouts[1] && (is_int4 || is_mx || is_fp8),
           "layer " << config.layer_idx << " has layouts " << config.layouts[0].name() << " and "
                    << config.layouts[1].name()
                    << ", which are written without scales only; give scale addresses of 0.");
  const int64_t rank_columns = config.intermediate_size / ranks;
  // the blocks of gate and of up must not meet within one
  const bool cut_anyway = ranks == 1 && !has_blocks();
  KT_CHECK(cut_anyway || layout_.group_size == 0 || rank_columns % layout_.group_size == 0,
           "the intermediate size " << config.intermediate_size << " in " << ranks
                                    << " ranks cuts a group or block of " << layout_.group_size
                                    << "; use fewer ranks.");
}

bool NativeForm::has_nibbles() const {
  return layout_.format == WeightFormat::kInt4 || layout_.format == WeightFormat::kFp4;
}

bool NativeForm::has_blocks() const {
  return layout_.format == WeightFormat::kFp8F && layout_.group_size != 0;
}

void NativeForm::check_blocks(const ExpertStore& store, int expert) const {
  if (!has_blocks()) return;
  const MoeConfig& config = store.config();
  for (const Projection projection : {Projection::kW13, Projection::kW2}) {
    const bool is_w13 = projection == Projection::kW13;
    const int64_t k = config.depth(projection);
    const int64_t groups = layout_.num_groups(k);
    const int64_t rows = is_w13 ? config.intermediate_size : config.hidden_size;
    // of gate, and as many of up behind them; or of down
    const int64_t panel_rows = is_w13 ? kPackedColumns / 2 : kPackedColumns;
    const int64_t block_panels = kBlock / panel_rows;
    for (int64_t p = 0; p < ceil_div(rows, panel_rows); ++p) {
      const uint8_t* const panel = store.panel(projection, expert, p);
      const uint8_t* const first = store.panel(projection, expert, p - p % block_panels);
      const int64_t count = std::min(panel_rows, rows - p * panel_rows);
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t at = layout_.scale_offset(k, group);
        for (int64_t column = 0; column < kPackedColumns; column += panel_rows) {
          const auto* const scales = reinterpret_cast<const float*>(panel + at) + column;
          const float of_block = reinterpret_cast<const float*>(first + at)[column];
          const float* const other =
              std::find_if(scales, scales + count, [&](float s) { return s != of_block; });
          const char* const matrix = !is_w13 ? "down" : column == 0 ? "gate" : "up";
          KT_CHECK(other == scales + count,
                   "layer " << config.layer_idx << ": expert " << expert << " has blocks of fewer "
                            << "than 128 rows (row " << p * panel_rows + (other - scales) << " of "
                            << matrix << " has a scale of its own), which are written without "
                            << "scales only; give scale addresses of 0.");
        }
      }
    }
  }
}

int64_t NativeForm::weight_bytes(int64_t n, int64_t k) const {
  return has_nibbles() ? n * k / 2 : n * k;
}

int64_t NativeForm::scale_bytes(int64_t n, int64_t k) const {
  const int64_t groups = layout_.group_size == 0 ? 1 : ceil_div(k, layout_.group_size);
  if (has_blocks()) return ceil_div(n, kBlock) * groups * int64_t{sizeof(float)};
  if (layout_.format == WeightFormat::kFp8F) return n * int64_t{sizeof(float)};
  return n * groups * (layout_.format == WeightFormat::kFp8 ? 1 : 2);
}

void NativeForm::write_row(const CodedPanel& panel, int column, int64_t begin, int64_t count,
                           int64_t row, uint8_t* weights, uint8_t* scales) const {
  const uint8_t* const codes = panel.row(column) + begin;
  if (has_nibbles()) {
    uint8_t* const out = weights + row * count / 2;
    for (int64_t i = 0; i < count / 2; ++i)
      out[i] = static_cast<uint8_t>(codes[2 * i] | (codes[2 * i + 1] << 4));
  } else {
    std::memcpy(weights + row * count, codes, count);
  }
  write_scales(panel, column, begin, count, row, scales);
}

void NativeForm::write_scales(const CodedPanel& panel, int column, int64_t begin, int64_t count,
                              int64_t row, uint8_t* scales) const {
  const int64_t group_size = layout_.group_size == 0 ? count : layout_.group_size;
  const int64_t groups = ceil_div(count, group_size);
  const int64_t first = layout_.group_size == 0 ? 0 : begin / group_size;
  const auto scale = [&](int64_t g) { return panel.scale[(first + g) * kPackedColumns + column]; };
  if (layout_.format == WeightFormat::kFp8F) {
    if (has_blocks() && row % kBlock != 0) return;
    float* const out =
        reinterpret_cast<float*>(scales) + (has_blocks() ? row / kBlock : row) * groups;
    for (int64_t g = 0; g < groups; ++g) out[g] = scale(g);
    return;
  }
  if (layout_.format == WeightFormat::kFp8) {
    for (int64_t g = 0; g < groups; ++g) scales[row * groups + g] = e8m0_of(scale(g));
    return;
  }
  // the half of E2M1's doubled codes is in the packed scale
  const float whole = layout_.format == WeightFormat::kFp4 ? 2.0f : 1.0f;
  uint16_t* const out = reinterpret_cast<uint16_t*>(scales) + row * groups;
  for (int64_t g = 0; g < groups; ++g) out[g] = float_to_bf16(whole * scale(g));
}

}  // namespace kt
