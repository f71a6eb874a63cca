// Panels of every format with codes: positions, round trips, values and refusals.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "base/check.h"
#include "format/coded_panel.h"
#include "format/quantize.h"

namespace kt {
namespace {

constexpr int kColumns = 64;

// Layouts of every format with codes.
std::vector<PackedLayout> coded_layouts() {
  std::vector<PackedLayout> layouts;
  for (const WeightFormatInfo& info : list_weight_formats()) {
    const bool is_block = info.scales == ScaleForm::kBlock || info.scales == ScaleForm::kBlockMin;
    if (info.scales == ScaleForm::kNone) continue;
    if (is_block || info.scales == ScaleForm::kColumn) layouts.push_back({info.format, 16, 0});
    if (has_groups(info.format)) layouts.push_back({info.format, 32, 0});
    if (!is_block && has_groups(info.format)) layouts.push_back({info.format, 96, 0});
    if (!is_block) layouts.push_back({info.format, 0, 0});
  }
  return layouts;
}

// Every code, and scales of every kind that the format's type has.
CodedPanel random_panel(const PackedLayout& layout, int64_t k, std::mt19937* generator) {
  const WeightFormatInfo& info = format_info(layout.format);
  const auto random = [&](int count) { return static_cast<int>((*generator)() % count); };
  const auto number = [&](bool is_half, bool is_short) {
    const auto half = static_cast<uint16_t>(random(0x7c00) | random(2) << 15);
    if (is_half) return fp16_to_float(half);
    const auto bits = static_cast<uint32_t>((random(0x7f80) | random(2) << 15) << 16);
    return std::bit_cast<float>(is_short ? bits : bits | static_cast<uint32_t>(random(65536)));
  };
  CodedPanel panel;
  panel.reset(layout, k);
  for (int column = 0; column < kColumns; ++column) {
    for (int64_t i = 0; i < panel.padded_k; ++i) {
      int code = random(1 << dtype_bits(info.code));
      if (info.scales == ScaleForm::kRow) code = std::max(code, 1);
      if (info.code == DType::kFp8 && code % 128 == 127) --code;
      panel.row(column)[i] = static_cast<uint8_t>(code);
    }
  }
  const ScaleForm form = info.scales;
  const bool is_half =
      form == ScaleForm::kFp16 || form == ScaleForm::kFp16Zero || form == ScaleForm::kFp16Min;
  const bool is_short = form == ScaleForm::kBf16 || form == ScaleForm::kColumn;
  for (float& value : panel.scale) value = number(is_half, is_short);
  for (float& value : panel.column_scale) value = number(false, false);
  for (auto* values : {&panel.minimum, &panel.block_scale, &panel.block_minimum})
    for (float& value : *values) value = number(true, false);
  for (auto* bytes : {&panel.zero, &panel.sub_scale, &panel.sub_minimum})
    for (uint8_t& byte : *bytes) byte = static_cast<uint8_t>(random(256));
  return panel;
}

// The unsigned code of a column at k, read as the header describes the bytes.
int code_in_panel(const PackedLayout& layout, int64_t padded_k, const uint8_t* panel, int column,
                  int64_t k) {
  const WeightFormatInfo& info = format_info(layout.format);
  const int bits = dtype_bits(info.code);
  const bool is_block = info.scales == ScaleForm::kBlock;
  const bool is_block_min = info.scales == ScaleForm::kBlockMin;
  const int scales[] = {0, 0, 2, 2, 4, 3, 4, 1, 2, 2};  // bytes of a group's, by ScaleForm
  const int64_t group = layout.group_size == 0 ? padded_k : layout.group_size;
  // the start of the unit of 16, 8 or 4 k that has k: all that stands before it
  const int unit = info.step_k;
  const int64_t first = k / unit * unit;
  const uint8_t* at = panel + 8 * bits * first + first / group * 64 * scales[int(info.scales)];
  if (is_block || is_block_min) at += (first / 256 + 1) * 64 * (is_block ? 2 : 4);
  const int i = static_cast<int>(k - first), byte = i % 4;
  const auto nibble = [&](const uint8_t* line) {
    return line[column * 4 + byte] >> (i / 4 % 2 * 4) & 15;
  };
  const auto pair = [&](const uint8_t* line) { return line[column * 4 + byte] >> (i / 4 * 2) & 3; };
  const auto bit = [&](const uint8_t* lines, int words) {
    uint64_t word;
    std::memcpy(&word, lines + (column / 16 * words + i / 4) * 8, 8);
    return static_cast<int>(word >> (column % 16 * 4 + byte) & 1);
  };
  switch (info.code) {
    case DType::kInt8: return at[column * 4 + i] ^ 128;
    case DType::kFp8: return at[column / 4 * 16 + i / 2 * 8 + column % 4 * 2 + i % 2];
    case DType::kInt6: return nibble(at + i / 8 * 256) | pair(at + 512) << 4;
    case DType::kInt5: return nibble(at) | bit(at + 256, 2) << 4;
    case DType::kInt3: return pair(at) | bit(at + 256, 4) << 2;
    case DType::kInt2: return pair(at);
    default: return nibble(at);
  }
}

TEST(CodedPanels, HaveTheirCodesWhereTheHeaderSays) {
  std::mt19937 generator(5);
  for (const PackedLayout& layout : coded_layouts()) {
    for (int64_t k : {64, 576}) {
      const CodedPanel panel = random_panel(layout, k, &generator);
      std::vector<uint8_t> bytes(layout.panel_bytes(k));
      pack_panel(panel, bytes.data());
      for (int column = 0; column < kColumns; ++column) {
        for (int64_t i = 0; i < panel.padded_k; ++i) {
          ASSERT_EQ(code_in_panel(layout, panel.padded_k, bytes.data(), column, i),
                    panel.row(column)[i])
              << layout.name() << " k=" << k << " column " << column << " at " << i;
        }
      }
    }
  }
}

TEST(CodedPanels, RoundTripAndWriteEveryByteOnce) {
  std::mt19937 generator(6);
  for (const PackedLayout& layout : coded_layouts()) {
    for (int64_t k : {1, 64, 200, 576, 1030}) {
      const CodedPanel panel = random_panel(layout, k, &generator);
      const int64_t bytes = layout.panel_bytes(k);
      std::vector<uint8_t> packed(bytes + 64, 0xcd), other(bytes + 64, 0x32);
      pack_panel(panel, packed.data());
      pack_panel(panel, other.data());
      EXPECT_TRUE(std::equal(packed.begin(), packed.begin() + bytes, other.begin()))
          << layout.name() << " k=" << k;
      EXPECT_TRUE(
          std::all_of(packed.end() - 64, packed.end(), [](uint8_t byte) { return byte == 0xcd; }));
      CodedPanel back = random_panel({WeightFormat::kInt8, 0, 0}, 300, &generator);
      unpack_panel(layout, k, packed.data(), &back);
      for (int column = 0; column < kColumns; ++column) {
        EXPECT_TRUE(
            std::equal(panel.row(column), panel.row(column) + panel.padded_k, back.row(column)))
            << layout.name() << " k=" << k;
      }
      EXPECT_EQ(back.scale, panel.scale) << layout.name();
      EXPECT_EQ(back.zero, panel.zero) << layout.name();
      EXPECT_EQ(back.minimum, panel.minimum) << layout.name();
      EXPECT_EQ(back.sub_scale, panel.sub_scale) << layout.name();
      EXPECT_EQ(back.sub_minimum, panel.sub_minimum) << layout.name();
      EXPECT_EQ(back.block_scale, panel.block_scale) << layout.name();
      EXPECT_EQ(back.block_minimum, panel.block_minimum) << layout.name();
      EXPECT_EQ(back.column_scale, panel.column_scale) << layout.name();
    }
  }
}

// What one code of a format means, from scales that were chosen by hand.
TEST(CodedPanels, StandForTheValuesOfTheirFormat) {
  struct Case {
    const char* layout;
    int code;
    float value;
  };
  const Case cases[] = {
      {"int8_n64k4_v1", 3, 1.5f * -125},
      {"int8hg32_n64k4_v1", 255, 1.5f * 127},
      {"int8fg32_n64k4_v1", 128, 0},
      {"int8fg32_n64k4_v1", 0, 1.5f * -128},
      {"int6kg16_n64k16_v1", 1, 0.5f * -3 * -31},
      {"int5hg32_n64k8_v1", 31, 1.5f * 15},
      {"int5mg32_n64k8_v1", 31, 1.5f * 31 + 0.25f},
      {"int5kmg32_n64k8_v1", 9, 0.5f * 253 * 9 - 4 * 7},
      {"int4g32_n64k8_v1", 0, 1.5f * -8},
      {"int4hg32_n64k8_v1", 15, 1.5f * 7},
      {"int4f_n64k8_v1", 9, 1.5f},
      {"int4zg32_n64k8_v1", 2, 1.5f * (2 - 16)},
      {"int4mg32_n64k8_v1", 2, 1.5f * 2 + 0.25f},
      {"int4kmg32_n64k8_v1", 15, 0.5f * 253 * 15 - 4 * 7},
      {"int3kg16_n64k16_v1", 0, 0.5f * -3 * -4},
      {"int2kmg16_n64k16_v1", 3, 0.5f * 253 * 3 - 4 * 7},
      {"fp4g32_n64k8_v1", 7, 1.5f * 12},
      {"fp4g32_n64k8_v1", 9, 1.5f * -1},
      {"fp4cg16_n64k8_v1", 15, 1.5f * -12 * 3},
      {"iq4hg32_n64k8_v1", 0, 1.5f * -127},
      {"iq4kg32_n64k8_v1", 15, 0.5f * -3 * 113},
      {"fp8g32_n64k4_v1", 0x7e, 1.5f * 448},
      {"fp8f_n64k4_v1", 0x81, 1.5f * -0x1p-9f},
  };
  for (const Case& test : cases) {
    const PackedLayout layout = PackedLayout::parse(test.layout);
    CodedPanel panel;
    panel.reset(layout, 64);
    panel.row(5)[33] = static_cast<uint8_t>(test.code);
    std::fill(panel.scale.begin(), panel.scale.end(), 1.5f);
    std::fill(panel.zero.begin(), panel.zero.end(), uint8_t{16});
    std::fill(panel.minimum.begin(), panel.minimum.end(), 0.25f);
    std::fill(panel.sub_scale.begin(), panel.sub_scale.end(), static_cast<uint8_t>(-3));
    std::fill(panel.sub_minimum.begin(), panel.sub_minimum.end(), uint8_t{7});
    std::fill(panel.block_scale.begin(), panel.block_scale.end(), 0.5f);
    std::fill(panel.block_minimum.begin(), panel.block_minimum.end(), 4.0f);
    std::fill(panel.column_scale.begin(), panel.column_scale.end(), 3.0f);
    std::vector<uint8_t> packed(layout.panel_bytes(64));
    pack_panel(panel, packed.data());
    std::vector<float> w(kColumns * 64);
    dequantize_panel(layout, 64, packed.data(), w.data());
    EXPECT_EQ(w[5 * 64 + 33], test.value) << test.layout << " code " << test.code;
  }
}

TEST(CodedPanels, AreZerosUntilTheyAreFilled) {
  for (const PackedLayout& layout : coded_layouts()) {
    CodedPanel panel;
    panel.reset(layout, 200);
    std::vector<uint8_t> packed(layout.panel_bytes(200));
    pack_panel(panel, packed.data());
    std::vector<float> w(kColumns * 200, 1.0f);
    dequantize_panel(layout, 200, packed.data(), w.data());
    EXPECT_TRUE(std::all_of(w.begin(), w.end(), [](float value) { return value == 0; }))
        << layout.name();
  }
}

std::string packing_refusal(const CodedPanel& panel) {
  std::vector<uint8_t> packed(panel.layout.panel_bytes(panel.k));
  try {
    pack_panel(panel, packed.data());
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(CodedPanels, RefuseCodesOfOtherFormats) {
  for (const PackedLayout& layout : coded_layouts()) {
    const WeightFormatInfo& info = format_info(layout.format);
    const bool is_fp8 = info.code == DType::kFp8;
    for (int code : {0, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 255}) {
      CodedPanel panel;
      panel.reset(layout, 96);
      panel.row(63)[95] = static_cast<uint8_t>(code);
      const bool is_wrong = is_fp8                           ? code % 128 == 127
                            : info.scales == ScaleForm::kRow ? code == 0
                                                             : code >= 1 << dtype_bits(info.code);
      const std::string sentence = packing_refusal(panel);
      EXPECT_EQ(sentence.find("at row 63, column 95 of the panel") != std::string::npos, is_wrong)
          << layout.name() << " code " << code << ": " << sentence;
    }
  }
}

TEST(CodedPanels, RefuseScalesThatTheirTypeHasNot) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> not_bf16 = {nan, infinity, 1.00390625f, 0x1p-134f};
  const std::vector<float> not_fp16 = {nan, -infinity, 65536.0f, 0x1p-25f, 1.00048828125f};
  const std::vector<float> not_fp32 = {nan, infinity, -infinity};
  int refused = 0;
  for (const PackedLayout& layout : coded_layouts()) {
    const ScaleForm form = format_info(layout.format).scales;
    const auto expect_refused = [&](std::vector<float> CodedPanel::* field,
                                    const std::vector<float>& values) {
      for (float value : values) {
        CodedPanel panel;
        panel.reset(layout, 600);
        if ((panel.*field).empty()) return;
        (panel.*field)[(panel.*field).size() - 7] = value;  // row 57 of the last group
        EXPECT_NE(packing_refusal(panel).find("at row 57"), std::string::npos)
            << layout.name() << " " << value;
        ++refused;
      }
    };
    const bool is_short = form == ScaleForm::kBf16 || form == ScaleForm::kColumn;
    const bool is_whole = form == ScaleForm::kRow || form == ScaleForm::kFp32;
    expect_refused(&CodedPanel::scale, is_short ? not_bf16 : is_whole ? not_fp32 : not_fp16);
    expect_refused(&CodedPanel::minimum, not_fp16);
    expect_refused(&CodedPanel::block_scale, not_fp16);
    expect_refused(&CodedPanel::block_minimum, not_fp16);
    expect_refused(&CodedPanel::column_scale, not_fp32);
  }
  EXPECT_GT(refused, 200);
  CodedPanel panel;
  panel.reset(PackedLayout::parse("int4hg32_n64k8_v1"), 64);
  panel.scale[64 + 3] = 1.00048828125f;
  const std::string sentence = packing_refusal(panel);
  EXPECT_NE(sentence.find("at row 3, group 1 of the panel is no number of fp16"), std::string::npos)
      << sentence;
}

}  // namespace
}  // namespace kt
