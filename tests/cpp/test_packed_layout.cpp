// Names, sizes and bytes of packed layouts: positions worked by hand, round trips of given codes.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "base/check.h"
#include "format/packed_layout.h"
#include "format/quantize.h"

namespace kt {
namespace {

constexpr int kColumns = 64;

template <typename T>
T read_at(const std::vector<uint8_t>& bytes, int64_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

std::string refusal(const std::string& name) {
  try {
    PackedLayout::parse(name);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(PackedLayoutName, ParsesAndPrintsTheSame) {
  for (const char* name :
       {"int8_n64k4_r512_v1", "int8_n64k4_v1", "int4g32_n64k8_r512_v1", "int4g128_n64k8_v1",
        "int4_n64k8_v1", "int4_n64k8_r64_v1", "int4g96_n64k8_r1024_v1", "int8_n64k4_r32_v1",
        "bf16_n64k2_v1", "int4hg128_n64k8_v1", "int6kg16_n64k16_v1", "fp8fg128_n64k4_v1",
        "fp8f_n64k4_v1", "fp4cg16_n64k8_v1", "iq4kg32_n64k8_v1"}) {
    EXPECT_EQ(PackedLayout::parse(name).name(), name);
  }
}

TEST(PackedLayoutName, GivesTheFields) {
  EXPECT_EQ(PackedLayout::parse("int8_n64k4_r512_v1"), (PackedLayout{WeightFormat::kInt8, 0, 512}));
  EXPECT_EQ(PackedLayout::parse("int4g32_n64k8_r512_v1"),
            (PackedLayout{WeightFormat::kInt4, 32, 512}));
  EXPECT_EQ(PackedLayout::parse("int4_n64k8_v1"), (PackedLayout{WeightFormat::kInt4, 0, 0}));
  EXPECT_EQ(PackedLayout::parse("bf16_n64k2_v1"), (PackedLayout{WeightFormat::kBFloat16, 0, 0}));
}

TEST(PackedLayoutName, RefusesWhatItDoesNotPrint) {
  for (const char* name : {"",
                           "int8",
                           "int8_n64k4",
                           "int8_n64k4_v2",
                           "int8_n64k4_v1 ",
                           "int8_n64k8_v1",
                           "int4_n64k4_v1",
                           "bf16_n64k4_v1",
                           "int8g32_n64k4_v1",
                           "int4g_n64k8_v1",
                           "int4g0_n64k8_v1",
                           "int4g032_n64k8_v1",
                           "int4g-32_n64k8_v1",
                           "int4g48_n64k8_v1",
                           "int4g65568_n64k8_v1",
                           "int4g99999999999_n64k8_v1",
                           "int8_n64k4_r0_v1",
                           "int8_n64k4_r16_v1",
                           "int8_n64k4_r96_v1",
                           "int8_n64k4_r2048_v1",
                           "int8_n64k4_r_v1",
                           "int8_n64k4_r0512_v1",
                           "bf16_n64k2_r512_v1",
                           "fp8_n64k8_v1",
                           "int6k_n64k16_v1",
                           "int6kg64_n64k16_v1",
                           "int4hg32_n64k8_r512_v1",
                           "fp4g16_n64k8_v1",
                           "INT8_n64k4_v1"}) {
    EXPECT_THROW(PackedLayout::parse(name), Error) << name;
  }
}

TEST(PackedLayoutName, RefusalNamesTheStringTheFaultAndTheKnownForms) {
  const std::string sentence = refusal("int4g48_n64k8_v1");
  EXPECT_NE(sentence.find("\"int4g48_n64k8_v1\""), std::string::npos) << sentence;
  EXPECT_NE(sentence.find("multiple of 32"), std::string::npos) << sentence;
  EXPECT_NE(refusal("int9").find("int4g32_n64k8_r512_v1"), std::string::npos);
}

TEST(PackedLayoutName, RefusesToPrintWhatCannotBe) {
  EXPECT_THROW((PackedLayout{WeightFormat::kInt8, 32, 0}.name()), Error);
  EXPECT_THROW((PackedLayout{WeightFormat::kBFloat16, 0, 64}.name()), Error);
  EXPECT_THROW((PackedLayout{WeightFormat::kInt6K, 64, 0}.name()), Error);
  EXPECT_THROW((PackedLayout{WeightFormat::kInt4H, 32, 512}.name()), Error);
}

TEST(PackedLayoutSize, PadsToWholeStepsAndPanels) {
  const PackedLayout int8 = PackedLayout::parse("int8_n64k4_v1");
  const PackedLayout bf16 = PackedLayout::parse("bf16_n64k2_v1");
  EXPECT_EQ(int8.padded_k(1), 64);
  EXPECT_EQ(int8.padded_k(64), 64);
  EXPECT_EQ(int8.padded_k(65), 128);
  EXPECT_EQ(bf16.padded_k(1), 32);
  EXPECT_EQ(bf16.padded_k(33), 64);
  EXPECT_EQ(int8.num_panels(1), 1);
  EXPECT_EQ(int8.num_panels(64), 1);
  EXPECT_EQ(int8.num_panels(65), 2);
  EXPECT_THROW(int8.padded_k(0), Error);
  EXPECT_THROW(int8.num_panels(-1), Error);
  // what would overflow an int or the bytes of a matrix
  EXPECT_THROW(int8.num_panels((int64_t{1} << 30) + 1), Error);
  EXPECT_THROW(int8.panel_bytes(int64_t{1} << 40), Error);
  EXPECT_EQ(int8.matrix_bytes(1 << 30, 1 << 30), (int64_t{1} << 60) + (int64_t{512} << 24));
}

TEST(PackedLayoutSize, CountsBytesOfCodesScalesAndCompensation) {
  // 64 * 576 codes, 64 int32, 64 fp32
  EXPECT_EQ(PackedLayout::parse("int8_n64k4_v1").panel_bytes(576), 36864 + 256 + 256);
  EXPECT_EQ(PackedLayout::parse("int8_n64k4_v1").matrix_bytes(100, 570), 2 * 37376);
  // half a byte a code; 18 groups of 32; 5 groups of 128, the last of 64; one group
  EXPECT_EQ(PackedLayout::parse("int4g32_n64k8_v1").panel_bytes(576), 18432 + 18 * 128);
  EXPECT_EQ(PackedLayout::parse("int4g128_n64k8_v1").panel_bytes(576), 18432 + 5 * 128);
  EXPECT_EQ(PackedLayout::parse("int4_n64k8_v1").panel_bytes(576), 18432 + 128);
  EXPECT_EQ(PackedLayout::parse("bf16_n64k2_v1").panel_bytes(576), 64 * 576 * 2);
  // two groups of 3 bytes; 16 of 1 and two d; 18 of 2, two d and e; 18 of 2 and t
  EXPECT_EQ(PackedLayout::parse("int4zg128_n64k8_v1").panel_bytes(200), 8192 + 64 * 2 * 3);
  EXPECT_EQ(PackedLayout::parse("int6kg16_n64k16_v1").panel_bytes(256), 12288 + 64 * (16 + 2));
  EXPECT_EQ(PackedLayout::parse("int5kmg32_n64k8_v1").panel_bytes(512), 20480 + 64 * (32 + 8));
  EXPECT_EQ(PackedLayout::parse("fp4cg16_n64k8_v1").panel_bytes(64), 2048 + 64 * (8 + 4));
}

TEST(PackedLayoutSize, PanelsAreWholeLines) {
  for (const char* name : {"int8_n64k4_v1", "int4g32_n64k8_v1", "int4g96_n64k8_v1", "int4_n64k8_v1",
                           "bf16_n64k2_v1"}) {
    const PackedLayout layout = PackedLayout::parse(name);
    for (int64_t k = 1; k <= 200; ++k)
      EXPECT_EQ(layout.panel_bytes(k) % 64, 0) << name << " k=" << k;
  }
}

TEST(PackedLayoutGroups, LastMayBeShortAndNoneIsLongerThanTheRow) {
  const PackedLayout g128 = PackedLayout::parse("int4g128_n64k8_v1");
  EXPECT_EQ(g128.num_groups(576), 5);
  EXPECT_EQ(g128.effective_group_size(576), 128);
  EXPECT_EQ(g128.num_groups(40), 1);
  EXPECT_EQ(g128.effective_group_size(40), 64);
  const PackedLayout row = PackedLayout::parse("int4_n64k8_v1");
  EXPECT_EQ(row.num_groups(570), 1);
  EXPECT_EQ(row.effective_group_size(570), 576);
  EXPECT_EQ(PackedLayout::parse("int8_n64k4_v1").num_groups(7168), 1);
}

TEST(PackedLayoutRotation, IsTheLargestPowerOfTwoThatDividesPaddedK) {
  const PackedLayout r512 = PackedLayout::parse("int8_n64k4_r512_v1");
  EXPECT_EQ(r512.rotation_block(576), 64);    // 9 * 64
  EXPECT_EQ(r512.rotation_block(768), 256);   // 3 * 256
  EXPECT_EQ(r512.rotation_block(1536), 512);  // 3 * 512
  EXPECT_EQ(r512.rotation_block(2048), 512);  // limited by max_rotation
  EXPECT_EQ(r512.rotation_block(100), 128);   // of padded k
  EXPECT_EQ(PackedLayout::parse("int8_n64k4_r32_v1").rotation_block(576), 32);
  EXPECT_EQ(PackedLayout::parse("int8_n64k4_v1").rotation_block(576), 0);
}

TEST(PanelBytes, Int8ByHand) {
  const PackedLayout layout = PackedLayout::parse("int8_n64k4_v1");
  std::vector<int8_t> codes(kColumns * 64, 0);
  std::vector<float> scales(kColumns, 0.5f);
  codes[0 * 64 + 0] = 1;      // row 0, k 0: first byte
  codes[17 * 64 + 6] = -127;  // row 17, k 6: step 1, column 17, third byte
  codes[63 * 64 + 63] = 127;  // last code
  scales[17] = 3.0f;
  std::vector<uint8_t> panel(layout.panel_bytes(64));
  pack_panel(layout, 64, codes.data(), scales.data(), panel.data());
  EXPECT_EQ(panel[0], 1);
  EXPECT_EQ(panel[256 + 17 * 4 + 2], 0x81);
  EXPECT_EQ(panel[4095], 127);
  EXPECT_EQ(
      std::count_if(panel.begin(), panel.begin() + 4096, [](uint8_t byte) { return byte != 0; }),
      3);
  EXPECT_EQ(read_at<int32_t>(panel, 4096), -128);
  EXPECT_EQ(read_at<int32_t>(panel, 4096 + 17 * 4), 128 * 127);
  EXPECT_EQ(read_at<int32_t>(panel, 4096 + 63 * 4), -128 * 127);
  EXPECT_EQ(read_at<float>(panel, 4096 + 256 + 17 * 4), 3.0f);
  EXPECT_EQ(read_at<float>(panel, 4096 + 256 + 63 * 4), 0.5f);
}

TEST(PanelBytes, Int4ByHand) {
  const PackedLayout layout = PackedLayout::parse("int4g32_n64k8_v1");
  std::vector<int8_t> codes(kColumns * 64, 0);
  std::vector<float> scales(kColumns * 2);
  for (int i = 0; i < kColumns * 2; ++i) scales[i] = static_cast<float>(i);
  codes[5 * 64 + 1] = -8;   // k 1: byte 1, low nibble
  codes[5 * 64 + 5] = 7;    // k 5: byte 1, high nibble
  codes[5 * 64 + 8] = -3;   // step 1, byte 0, low nibble
  codes[63 * 64 + 63] = 1;  // group 1, step 3, byte 3, high nibble
  std::vector<uint8_t> panel(layout.panel_bytes(64));
  pack_panel(layout, 64, codes.data(), scales.data(), panel.data());
  EXPECT_EQ(panel[5 * 4 + 0], 0x88);
  EXPECT_EQ(panel[5 * 4 + 1], 0xf0);
  EXPECT_EQ(panel[256 + 5 * 4 + 0], 0x85);
  // group 0: 4 steps of 256 bytes, then 64 bf16 scales: column c has scales[c, 0] = 2 c
  EXPECT_EQ(read_at<uint16_t>(panel, 1024 + 5 * 2), float_to_bf16(10.0f));
  const int64_t group1 = 1024 + 128;
  EXPECT_EQ(panel[group1 + 3 * 256 + 63 * 4 + 3], 0x98);
  EXPECT_EQ(read_at<uint16_t>(panel, group1 + 1024 + 63 * 2), float_to_bf16(127.0f));
  EXPECT_EQ(layout.panel_bytes(64), 2 * group1);
}

TEST(PanelBytes, Bf16ByHand) {
  const PackedLayout layout = PackedLayout::parse("bf16_n64k2_v1");
  std::vector<uint16_t> bits(kColumns * 32, 0);
  bits[0 * 32 + 1] = 0x3f80;   // row 0, k 1: second half of the first word
  bits[20 * 32 + 4] = 0x4000;  // step 2, column 20, first half
  std::vector<uint8_t> panel(layout.panel_bytes(32));
  pack_panel(layout, 32, bits.data(), nullptr, panel.data());
  EXPECT_EQ(read_at<uint16_t>(panel, 2), 0x3f80);
  EXPECT_EQ(read_at<uint16_t>(panel, 2 * 256 + 20 * 4), 0x4000);
  EXPECT_EQ(std::count_if(panel.begin(), panel.end(), [](uint8_t byte) { return byte != 0; }), 3);
}

TEST(PanelBytes, W13PutsGateInColumns0To31AndUpIn32To63) {
  constexpr int64_t kRows = 40, kK = 32;
  std::vector<float> gate(kRows * kK), up(kRows * kK);
  for (int64_t i = 0; i < kRows * kK; ++i) {
    gate[i] = static_cast<float>(i / kK + 1);
    up[i] = -gate[i];
  }
  const PackedLayout layout = PackedLayout::parse("bf16_n64k2_v1");
  ASSERT_EQ(num_w13_panels(kRows), 2);
  for (int64_t p = 0; p < 2; ++p) {
    const PanelRows rows = w13_panel_rows(gate.data(), up.data(), DType::kFloat32, kRows, kK, p);
    std::vector<uint8_t> panel(layout.panel_bytes(kK));
    quantize_panel(layout, rows, panel.data(), nullptr);
    for (int column = 0; column < kColumns; ++column) {
      const int64_t row = 32 * p + column % 32;
      const float magnitude = row < kRows ? static_cast<float>(row + 1) : 0.0f;
      EXPECT_EQ(bf16_to_float(read_at<uint16_t>(panel, column * 4)),
                column < 32 ? magnitude : -magnitude);
    }
  }
  EXPECT_THROW(w13_panel_rows(gate.data(), up.data(), DType::kFloat32, kRows, kK, 2), Error);
}

TEST(PanelBytes, MatrixPanelsTakeRowsInOrder) {
  std::vector<float> w(70 * 32);
  for (size_t i = 0; i < w.size(); ++i) w[i] = static_cast<float>(i / 32);
  const PanelRows rows = matrix_panel_rows(w.data(), DType::kFloat32, 70, 32, 1);
  EXPECT_EQ(*static_cast<const float*>(rows.row[5]), 69.0f);
  EXPECT_EQ(rows.row[6], nullptr);
  EXPECT_THROW(matrix_panel_rows(w.data(), DType::kFloat32, 70, 32, 2), Error);
}

TEST(PackPanel, RoundTripsEveryCode) {
  std::mt19937 generator(3);
  for (const char* name : {"int8_n64k4_v1", "int4g32_n64k8_v1", "int4g128_n64k8_v1",
                           "int4g96_n64k8_r512_v1", "int4_n64k8_v1"}) {
    const PackedLayout layout = PackedLayout::parse(name);
    for (int64_t k : {1, 64, 200, 576, 1030}) {
      const int bound = layout.format == WeightFormat::kInt8 ? 127 : 7;
      std::uniform_int_distribution<int> draw(layout.format == WeightFormat::kInt8 ? -127 : -8,
                                              bound);
      std::vector<int8_t> codes(kColumns * layout.padded_k(k));
      std::vector<float> scales(kColumns * layout.num_groups(k));
      for (int8_t& code : codes) code = static_cast<int8_t>(draw(generator));
      for (float& scale : scales) scale = 0.25f * static_cast<float>(draw(generator));
      std::vector<uint8_t> panel(layout.panel_bytes(k) + 64, 0xcd);
      pack_panel(layout, k, codes.data(), scales.data(), panel.data());
      std::vector<int8_t> codes_back(codes.size());
      std::vector<float> scales_back(scales.size());
      unpack_panel(layout, k, panel.data(), codes_back.data(), scales_back.data());
      EXPECT_EQ(codes_back, codes) << name << " k=" << k;
      EXPECT_EQ(scales_back, scales) << name << " k=" << k;
      EXPECT_TRUE(
          std::all_of(panel.end() - 64, panel.end(), [](uint8_t byte) { return byte == 0xcd; }));
    }
  }
}

TEST(PackPanel, RoundTripsBf16) {
  const PackedLayout layout = PackedLayout::parse("bf16_n64k2_v1");
  std::vector<uint16_t> bits(kColumns * layout.padded_k(70)), back(bits.size());
  for (size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint16_t>(i * 31);
  std::vector<uint8_t> panel(layout.panel_bytes(70));
  pack_panel(layout, 70, bits.data(), nullptr, panel.data());
  unpack_panel(layout, 70, panel.data(), back.data(), nullptr);
  EXPECT_EQ(back, bits);
}

TEST(PackPanel, RefusesCodesAndScalesOutsideTheLayout) {
  const PackedLayout int8 = PackedLayout::parse("int8_n64k4_v1");
  const PackedLayout int4 = PackedLayout::parse("int4g32_n64k8_v1");
  std::vector<int8_t> codes(kColumns * 64, 0);
  std::vector<float> scales(kColumns * 2, 1.0f);
  std::vector<uint8_t> panel(int8.panel_bytes(64));
  codes[3 * 64 + 9] = -128;
  try {
    pack_panel(int8, 64, codes.data(), scales.data(), panel.data());
    ADD_FAILURE() << "-128 was packed";
  } catch (const Error& error) {
    const std::string sentence = error.what();
    EXPECT_NE(sentence.find("code -128 at row 3, column 9"), std::string::npos) << sentence;
  }
  for (int code : {-9, 8}) {
    codes[3 * 64 + 9] = static_cast<int8_t>(code);
    EXPECT_THROW(pack_panel(int4, 64, codes.data(), scales.data(), panel.data()), Error);
    EXPECT_NO_THROW(pack_panel(int8, 64, codes.data(), scales.data(), panel.data()));
  }
  codes[3 * 64 + 9] = 0;
  for (float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    scales[7] = bad;
    EXPECT_THROW(pack_panel(int8, 64, codes.data(), scales.data(), panel.data()), Error);
    EXPECT_THROW(pack_panel(int4, 64, codes.data(), scales.data(), panel.data()), Error);
  }
}

}  // namespace
}  // namespace kt
