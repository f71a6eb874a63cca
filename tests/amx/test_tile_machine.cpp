// The tiles do what the manual says: every shape, every malformed configuration, every rounding.
#include <gtest/gtest.h>
#include <immintrin.h>

#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "amx/tile_machine.h"
#include "amx/tile_reference.h"
#include "amx/tile_values.h"

namespace kt_amx {
namespace {

constexpr Product kIntegerProducts[] = {Product::kSignedSigned, Product::kSignedUnsigned,
                                        Product::kUnsignedSigned, Product::kUnsignedUnsigned};
constexpr float kMinNormal = std::numeric_limits<float>::min();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

TileBytes bytes_of(const Tile& tile) {
  TileBytes copy;
  std::memcpy(copy.bytes.data(), tile.row, sizeof tile.row);
  return copy;
}

// Bytes beyond the shape that no instruction may leave there.
void poison_beyond(TileMachine* machine, int tile) {
  for (int row = 0; row < kMaxRows; ++row) {
    const int first = row < machine->config.rows[tile] ? machine->config.colsb[tile] : 0;
    std::memset(machine->tiles[tile].row[row] + first, 0xcc, kMaxColsb - first);
  }
}

void load_all(TileMachine* machine, const TileConfig& config, const TileBytes& c,
              const TileBytes& a, const TileBytes& b) {
  ASSERT_EQ(machine->load_config(&config), Fault::kNone);
  ASSERT_EQ(machine->load(0, c.bytes.data(), 64), Fault::kNone);
  ASSERT_EQ(machine->load(1, a.bytes.data(), 64), Fault::kNone);
  ASSERT_EQ(machine->load(2, b.bytes.data(), 64), Fault::kNone);
}

void check_product(Product product, const TileConfig& config, const TileBytes& c,
                   const TileBytes& a, const TileBytes& b) {
  TileMachine machine;
  load_all(&machine, config, c, a, b);
  for (int tile = 0; tile < 3; ++tile) poison_beyond(&machine, tile);
  ASSERT_EQ(machine.multiply(product, 0, 1, 2), Fault::kNone);
  const TileBytes found = bytes_of(machine.tiles[0]);
  ASSERT_TRUE(same_sums(product, found, reference_product(product, config, c, a, b)))
      << "product " << static_cast<int>(product) << " of m " << int{config.rows[0]} << " n "
      << config.colsb[0] / 4 << " k " << config.colsb[1] / 4;
}

void for_every_shape(const std::function<void(const TileConfig&)>& check) {
  for (int m = 1; m <= 16; ++m) {
    for (int n = 1; n <= 16; ++n) {
      for (int k = 1; k <= 16; ++k) check(config_of_product(m, n, k));
    }
  }
}

TEST(TileMachine, IntegerProductsOfEveryShapeAreExact) {
  std::mt19937 random(1);
  for_every_shape([&](const TileConfig& config) {
    const TileBytes a = random_bytes(random);
    const TileBytes b = random_bytes(random);
    const TileBytes c = random_bytes(random);
    for (const Product product : kIntegerProducts) {
      ASSERT_NO_FATAL_FAILURE(check_product(product, config, c, a, b));
    }
  });
}

TEST(TileMachine, IntegerProductsOfExtremesAreExactAndWrapAround) {
  const TileConfig config = config_of_product(16, 16, 16);
  for (const int left : {0x00, 0x01, 0x7f, 0x80, 0xff}) {
    for (const int right : {0x00, 0x01, 0x7f, 0x80, 0xff}) {
      for (const uint32_t start : {0u, 0x7fffffffu, 0x80000000u, 0xffffffffu}) {
        TileBytes a, b, c;
        a.bytes.fill(static_cast<uint8_t>(left));
        b.bytes.fill(static_cast<uint8_t>(right));
        for (int i = 0; i < 256; ++i) c.set<uint32_t>(0, i, start);
        for (const Product product : kIntegerProducts) {
          ASSERT_NO_FATAL_FAILURE(check_product(product, config, c, a, b));
        }
      }
    }
  }
}

TEST(TileMachine, Bf16ProductsOfEveryShapeHaveTheBitsOfTheModel) {
  std::mt19937 random(2);
  for_every_shape([&](const TileConfig& config) {
    for (int kind = 0; kind < static_cast<int>(Floats::kNumKinds); ++kind) {
      const Floats floats = static_cast<Floats>(kind);
      const TileBytes a = random_bf16_tile(floats, random);
      const TileBytes b = random_bf16_tile(floats, random);
      const TileBytes c = random_float_tile(floats, random);
      ASSERT_NO_FATAL_FAILURE(check_product(Product::kBf16, config, c, a, b));
    }
  });
}

// One step of the sum: two elements of a row of a, two of a column of b.
struct Step {
  float a_even, b_even, a_odd, b_odd;
};

uint16_t bf16_bits(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  EXPECT_EQ(bits & 0xffff, 0u) << value << " is no bf16 number";
  return static_cast<uint16_t>(bits >> 16);
}

// c + the sum of the steps, by the machine.
float sum_of(float c, const std::vector<Step>& steps) {
  TileMachine machine;
  TileBytes a, b, sum;
  for (int k = 0; k < static_cast<int>(steps.size()); ++k) {
    a.set<uint16_t>(0, 2 * k, bf16_bits(steps[k].a_even));
    a.set<uint16_t>(0, 2 * k + 1, bf16_bits(steps[k].a_odd));
    b.set<uint16_t>(k, 0, bf16_bits(steps[k].b_even));
    b.set<uint16_t>(k, 1, bf16_bits(steps[k].b_odd));
  }
  sum.set<float>(0, 0, c);
  load_all(&machine, config_of_product(1, 1, static_cast<int>(steps.size())), sum, a, b);
  EXPECT_EQ(machine.multiply(Product::kBf16, 0, 1, 2), Fault::kNone);
  return bytes_of(machine.tiles[0]).at<float>(0, 0);
}

TEST(Bf16Rounding, EvenAndOddAreSummedApartAndCLast) {
  EXPECT_EQ(sum_of(0, {{0x1p24f, 1, 1, 1}, {1, 1, 1, 1}}), 0x1p24f + 2);
  EXPECT_EQ(sum_of(0x1p24f, {{1, 1, 1, 1}}), 0x1p24f + 2);
}

TEST(Bf16Rounding, TiesGoToEven) {
  EXPECT_EQ(sum_of(0x1p24f, {{1, 1, 0, 0}}), 0x1p24f);
  EXPECT_EQ(sum_of(0x1p24f + 2, {{1, 1, 0, 0}}), 0x1p24f + 4);
  EXPECT_EQ(sum_of(0, {{0x1p24f, 1, 1, 1}}), 0x1p24f);
}

TEST(Bf16Rounding, ProductsAreNotRoundedByThemselves) {
  // 2^-130 alone would be flushed, 2^128 alone would be infinite
  EXPECT_EQ(sum_of(0, {{0x1p-63f, 0x1p-63f, 0, 0}, {0x1p-65f, 0x1p-65f, 0, 0}}),
            0x1p-126f + 0x1p-130f);
  EXPECT_EQ(sum_of(0, {{-0x1p63f, 0x1p64f, 0, 0}, {0x1p64f, 0x1p64f, 0, 0}}), 0x1p127f);
}

TEST(Bf16Rounding, SubnormalResultsAreFlushedAtEveryStep) {
  EXPECT_EQ(sum_of(0, {{0x1p-64f, 0x1p-64f, 0, 0}}), 0);
  EXPECT_EQ(sum_of(0, {{0x1p-63f, 0x1.8p-64f, 0, 0}, {0x1p-63f, 0x1.8p-64f, 0, 0}}), 0);
  EXPECT_EQ(sum_of(0, {{0x1.8p-63f, 0x1p-63f, -0x1p-63f, 0x1p-63f}}), 0);
  EXPECT_EQ(sum_of(0x1.8p-126f, {{-0x1p-63f, 0x1p-63f, 0, 0}}), 0);
  EXPECT_EQ(sum_of(0, {{0x1p-63f, 0x1p-63f, 0, 0}}), kMinNormal);
}

TEST(Bf16Rounding, FlushingLooksAtTheResultOfAnUnboundedExponent) {
  // both are the smallest normal number for who rounds to a subnormal one
  const Step first = {0x1p-63f, 0x1p-63f, 0, 0};
  EXPECT_EQ(sum_of(0, {first, {-0x1p-76f, 0x1p-76f, 0, 0}}), kMinNormal);
  EXPECT_EQ(sum_of(0, {first, {-0x1.8p-75f, 0x1p-76f, 0, 0}}), 0);
}

TEST(Bf16Rounding, SubnormalOperandsAreZeros) {
  const float subnormal = bf16_value(0x0040);
  EXPECT_EQ(sum_of(0, {{subnormal, 0x1p127f, 0, 0}}), 0);
  EXPECT_EQ(sum_of(0, {{0, 0, 0x1p127f, -subnormal}}), 0);
  EXPECT_EQ(sum_of(subnormal, {{0x1p-63f, 0x1p-63f, 0, 0}}), kMinNormal);
  EXPECT_EQ(sum_of(subnormal, {{0, 0, 0, 0}}), 0);
}

TEST(Bf16Rounding, InfinitiesNotANumberAndOverflow) {
  const float nan = bf16_value(0x7fc0);
  EXPECT_EQ(sum_of(0, {{kInfinity, -2, 0, 0}}), -kInfinity);
  EXPECT_EQ(sum_of(0, {{0x1p127f, 2, 0, 0}}), kInfinity);
  EXPECT_EQ(sum_of(0x1.8p127f, {{0x1p127f, 1, 0, 0}}), kInfinity);
  EXPECT_TRUE(std::isnan(sum_of(0, {{kInfinity, 0, 0, 0}})));
  EXPECT_TRUE(std::isnan(sum_of(0, {{kInfinity, bf16_value(0x0001), 0, 0}})));
  EXPECT_TRUE(std::isnan(sum_of(0, {{kInfinity, 1, -kInfinity, 1}})));
  EXPECT_TRUE(std::isnan(sum_of(-kInfinity, {{kInfinity, 1, 0, 0}})));
  EXPECT_TRUE(std::isnan(sum_of(0, {{nan, 0, 0, 0}})));
  EXPECT_TRUE(std::isnan(sum_of(0, {{0, 0, 0, nan}})));
}

TEST(Bf16Rounding, MxcsrIsNeitherReadNorChanged) {
  const unsigned before = _mm_getcsr();
  for (const unsigned rounding : {0x0000u, 0x2000u, 0x4000u, 0x6000u}) {
    _mm_setcsr(0x1f80 | rounding);
    const float tie = sum_of(0x1p24f, {{1, 1, 0, 0}});
    const float flushed = sum_of(0, {{0x1p-64f, 0x1p-64f, 0, 0}});
    const float overflow = sum_of(0, {{0x1p127f, 2, 0, 0}});
    const unsigned after = _mm_getcsr();
    _mm_setcsr(before);
    EXPECT_EQ(tie, 0x1p24f) << rounding;
    EXPECT_EQ(flushed, 0) << rounding;
    EXPECT_EQ(overflow, kInfinity) << rounding;
    EXPECT_EQ(after, 0x1f80 | rounding);
  }
}

TEST(TileConfiguration, EveryMalformedOneFaultsAndChangesNothing) {
  const std::vector<std::pair<std::string, std::function<void(TileConfig*)>>> changes = {
      {"palette 2", [](TileConfig* c) { c->palette = 2; }},
      {"palette 255", [](TileConfig* c) { c->palette = 255; }},
      {"reserved byte 2", [](TileConfig* c) { c->reserved[0] = 1; }},
      {"reserved byte 15", [](TileConfig* c) { c->reserved[13] = 0x80; }},
      {"colsb 65", [](TileConfig* c) { c->colsb[0] = 65; }},
      {"colsb 320", [](TileConfig* c) { c->colsb[7] = 320, c->rows[7] = 1; }},
      {"rows 17", [](TileConfig* c) { c->rows[2] = 17; }},
      {"colsb of tile 8", [](TileConfig* c) { c->colsb[8] = 1; }},
      {"tile 8", [](TileConfig* c) { c->colsb[8] = 64, c->rows[8] = 16; }},
      {"rows of tile 15", [](TileConfig* c) { c->rows[15] = 1; }},
      {"colsb of tile 15", [](TileConfig* c) { c->colsb[15] = 0x100; }},
      {"rows without colsb", [](TileConfig* c) { c->rows[3] = 1; }},
      {"colsb without rows", [](TileConfig* c) { c->colsb[7] = 4; }},
  };
  const TileConfig good = config_of_product(3, 4, 5);
  for (const auto& [name, change] : changes) {
    TileConfig bad = good;
    bad.start_row = 1;
    change(&bad);
    TileMachine machine;
    EXPECT_EQ(machine.load_config(&bad), Fault::kProtection) << name;
    ASSERT_EQ(machine.load_config(&good), Fault::kNone);
    machine.tiles[0].row[0][0] = 7;
    EXPECT_EQ(machine.load_config(&bad), Fault::kProtection) << name;
    TileConfig kept;
    machine.store_config(&kept);
    EXPECT_EQ(std::memcmp(&kept, &good, sizeof kept), 0) << name;
    EXPECT_EQ(machine.tiles[0].row[0][0], 7) << name;
  }
}

TEST(TileConfiguration, EveryShapeOfATileIsTakenAndStoredAsItWas) {
  TileMachine machine;
  for (int rows = 1; rows <= 16; ++rows) {
    for (int colsb = 1; colsb <= 64; ++colsb) {
      TileConfig config;
      config.palette = 1;
      for (int tile = rows % 8; tile < kNumTiles; ++tile) {
        config.rows[tile] = static_cast<uint8_t>(rows);
        config.colsb[tile] = static_cast<uint16_t>(colsb);
      }
      ASSERT_EQ(machine.load_config(&config), Fault::kNone);
      TileConfig stored;
      machine.store_config(&stored);
      ASSERT_EQ(std::memcmp(&stored, &config, sizeof stored), 0);
    }
  }
}

TEST(TileConfiguration, PaletteZeroReleaseAndANewOneZeroTheTiles) {
  const TileConfig config = config_of_product(16, 16, 16);
  TileConfig off = config;  // the rest of it is not looked at
  off.palette = 0;
  off.reserved[3] = 1;
  std::mt19937 random(3);
  const TileBytes full = random_bytes(random);
  TileMachine machine;
  const std::vector<std::function<void()>> ways = {
      [&] { EXPECT_EQ(machine.load_config(&config), Fault::kNone); },
      [&] { EXPECT_EQ(machine.load_config(&off), Fault::kNone); },
      [&] { machine.release(); },
  };
  for (size_t way = 0; way < ways.size(); ++way) {
    ASSERT_EQ(machine.load_config(&config), Fault::kNone);
    ASSERT_EQ(machine.load(2, full.bytes.data(), 64), Fault::kNone);
    ways[way]();
    EXPECT_EQ(bytes_of(machine.tiles[2]), TileBytes()) << way;
    EXPECT_EQ(machine.load(2, full.bytes.data(), 64), way == 0 ? Fault::kNone : Fault::kUndefined);
    TileConfig stored;
    machine.store_config(&stored);
    const TileConfig expected = way == 0 ? config : TileConfig();
    EXPECT_EQ(std::memcmp(&stored, &expected, sizeof stored), 0) << way;
  }
}

TEST(TileTransfers, LoadsAndStoresOfEveryShapeTouchItAlone) {
  std::mt19937 random(4);
  for (int rows = 1; rows <= 16; ++rows) {
    for (int colsb = 4; colsb <= 64; colsb += 4) {
      TileConfig config;
      config.palette = 1;
      config.rows[5] = static_cast<uint8_t>(rows);
      config.colsb[5] = static_cast<uint16_t>(colsb);
      TileMachine machine;
      ASSERT_EQ(machine.load_config(&config), Fault::kNone);
      std::memset(machine.tiles[5].row, 0xcc, sizeof machine.tiles[5].row);
      const TileBytes source = random_bytes(random);
      TileBytes in_tile;
      TileBytes in_memory = random_bytes(random);
      TileBytes stored = in_memory;
      for (int row = 0; row < rows; ++row) {
        // from the last row to the first, a negative stride
        std::memcpy(&in_tile.bytes[64 * row], &source.bytes[64 * (15 - row)], colsb);
        std::memcpy(&in_memory.bytes[64 * row], &in_tile.bytes[64 * row], colsb);
      }
      ASSERT_EQ(machine.load(5, &source.bytes[64 * 15], -64), Fault::kNone);
      ASSERT_EQ(bytes_of(machine.tiles[5]), in_tile);
      ASSERT_EQ(machine.store(5, stored.bytes.data(), 64), Fault::kNone);
      ASSERT_EQ(stored, in_memory);
    }
  }
}

TEST(TileTransfers, GoOnFromTheStartRow) {
  std::mt19937 random(5);
  const TileBytes first = random_bytes(random);
  const TileBytes second = random_bytes(random);
  TileConfig config = config_of_product(16, 16, 16);
  config.start_row = 9;
  TileMachine machine;
  ASSERT_EQ(machine.load_config(&config), Fault::kNone);
  std::memcpy(machine.tiles[0].row, first.bytes.data(), first.bytes.size());
  ASSERT_EQ(machine.load(0, second.bytes.data(), 64), Fault::kNone);
  for (int row = 0; row < 16; ++row) {
    const TileBytes& source = row < 9 ? first : second;
    EXPECT_EQ(std::memcmp(machine.tiles[0].row[row], &source.bytes[64 * row], 64), 0) << row;
  }
  EXPECT_EQ(machine.config.start_row, 0);
  machine.config.start_row = 9;
  TileBytes stored;
  ASSERT_EQ(machine.store(0, stored.bytes.data(), 64), Fault::kNone);
  EXPECT_EQ(stored.at<uint64_t>(8, 7), 0u);
  EXPECT_EQ(std::memcmp(&stored.bytes[64 * 9], &second.bytes[64 * 9], 64 * 7), 0);
  EXPECT_EQ(machine.config.start_row, 0);
  config.start_row = 16;
  ASSERT_EQ(machine.load_config(&config), Fault::kNone);
  EXPECT_EQ(machine.load(0, second.bytes.data(), 64), Fault::kUndefined);
  EXPECT_EQ(machine.store(0, stored.bytes.data(), 64), Fault::kUndefined);
  ASSERT_EQ(machine.zero(0), Fault::kNone);  // and so does every other instruction end a restart
  EXPECT_EQ(machine.load(0, second.bytes.data(), 64), Fault::kNone);
}

TEST(TileTransfers, ZeroZeroesTheWholeTile) {
  TileConfig config = config_of_product(2, 3, 4);
  TileMachine machine;
  ASSERT_EQ(machine.load_config(&config), Fault::kNone);
  std::memset(machine.tiles[0].row, 0xcc, sizeof machine.tiles[0].row);
  ASSERT_EQ(machine.zero(0), Fault::kNone);
  EXPECT_EQ(bytes_of(machine.tiles[0]), TileBytes());
}

TEST(TileFaults, InstructionsOnTilesThatAreNotConfigured) {
  TileBytes memory;
  TileMachine machine;
  const TileConfig config = config_of_product(16, 16, 16);
  for (const bool configured : {false, true}) {
    if (configured) {
      ASSERT_EQ(machine.load_config(&config), Fault::kNone);
    }
    const int tile = configured ? 3 : 0;  // tiles 0 to 2 are those of the configuration
    EXPECT_EQ(machine.load(tile, memory.bytes.data(), 64), Fault::kUndefined);
    EXPECT_EQ(machine.store(tile, memory.bytes.data(), 64), Fault::kUndefined);
    EXPECT_EQ(machine.zero(tile), Fault::kUndefined);
    EXPECT_EQ(machine.multiply(Product::kBf16, tile, 1, 2), Fault::kUndefined);
    EXPECT_EQ(machine.multiply(Product::kBf16, 1, tile, 2), Fault::kUndefined);
    EXPECT_EQ(machine.multiply(Product::kBf16, 1, 2, tile), Fault::kUndefined);
  }
}

TEST(TileFaults, BytesARowThatAreNoMultipleOfFour) {
  TileConfig config = config_of_product(16, 16, 16);
  config.colsb[0] = config.colsb[2] = 62;
  TileMachine machine;
  ASSERT_EQ(machine.load_config(&config), Fault::kNone);
  TileBytes memory;
  EXPECT_EQ(machine.load(0, memory.bytes.data(), 64), Fault::kUndefined);
  EXPECT_EQ(machine.store(0, memory.bytes.data(), 64), Fault::kUndefined);
  EXPECT_EQ(machine.multiply(Product::kSignedSigned, 0, 1, 2), Fault::kUndefined);
  EXPECT_EQ(machine.zero(0), Fault::kNone);
}

TEST(TileFaults, ProductsOfTheSameTileTwice) {
  const TileConfig config = config_of_product(16, 16, 16);
  TileMachine machine;
  ASSERT_EQ(machine.load_config(&config), Fault::kNone);
  for (const auto& [c, a, b] : {std::array{0, 0, 1}, {0, 1, 0}, {1, 0, 0}, {0, 0, 0}}) {
    EXPECT_EQ(machine.multiply(Product::kSignedSigned, c, a, b), Fault::kUndefined) << c << a << b;
  }
  EXPECT_EQ(machine.multiply(Product::kSignedSigned, 2, 0, 1), Fault::kNone);
}

TEST(TileFaults, ProductsOfShapesThatDoNotFit) {
  const TileConfig good = config_of_product(5, 6, 7);
  for (int tile = 0; tile < 3; ++tile) {
    for (const int more : {-1, 1}) {
      TileConfig other_rows = good;
      other_rows.rows[tile] = static_cast<uint8_t>(other_rows.rows[tile] + more);
      TileConfig other_columns = good;
      other_columns.colsb[tile] = static_cast<uint16_t>(other_columns.colsb[tile] + 4 * more);
      for (const TileConfig& config : {other_rows, other_columns}) {
        TileMachine machine;
        ASSERT_EQ(machine.load_config(&config), Fault::kNone);
        for (const Product product : {Product::kSignedSigned, Product::kBf16}) {
          EXPECT_EQ(machine.multiply(product, 0, 1, 2), Fault::kUndefined) << tile << " " << more;
        }
      }
    }
  }
}

}  // namespace
}  // namespace kt_amx
