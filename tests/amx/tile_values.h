// What the tests of tiles share: configurations, and numbers that find faults.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <random>

#include "amx/tile_machine.h"
#include "amx/tile_reference.h"

namespace kt_amx {

// Tile 0 is c [m, n], tile 1 a [m, k], tile 2 b [k, n]; n and k in elements of 32 bits.
inline TileConfig config_of_product(int m, int n, int k) {
  TileConfig config;
  config.palette = 1;
  const int rows[] = {m, m, k};
  const int columns[] = {n, k, n};
  for (int tile = 0; tile < 3; ++tile) {
    config.rows[tile] = static_cast<uint8_t>(rows[tile]);
    config.colsb[tile] = static_cast<uint16_t>(4 * columns[tile]);
  }
  return config;
}

// A tile's worth of memory, rows of 64 bytes.
struct TileBytes {
  alignas(64) std::array<uint8_t, 1024> bytes = {};

  template <typename T>
  T at(int row, int column) const {
    T value;
    std::memcpy(&value, bytes.data() + 64 * row + sizeof(T) * column, sizeof value);
    return value;
  }
  template <typename T>
  void set(int row, int column, T value) {
    std::memcpy(bytes.data() + 64 * row + sizeof(T) * column, &value, sizeof value);
  }
  bool operator==(const TileBytes&) const = default;
};

inline TileBytes random_bytes(std::mt19937& random) {
  TileBytes tile;
  for (uint8_t& byte : tile.bytes) byte = static_cast<uint8_t>(random());
  return tile;
}

enum class Floats { kTame, kNearUnderflow, kFewBits, kSpecial, kAnyBits, kNumKinds };

// A bf16 number. kNearUnderflow: products of two are around the smallest normal float. kFewBits:
// sums are often halfway between two floats.
inline uint16_t random_bf16(Floats kind, std::mt19937& random) {
  constexpr uint16_t kSpecials[] = {0x0000, 0x8000, 0x0001, 0x807f, 0x0080, 0x3f80, 0xbf80, 0x7f7f,
                                    0xff7f, 0x7f80, 0xff80, 0x7fc0, 0x7f81, 0x0040, 0x2000, 0x5f80};
  const auto within = [&](int low, int high) { return low + random() % (high - low + 1); };
  const auto sign = static_cast<uint32_t>(random() & 0x8000);
  uint32_t bits = 0;
  switch (kind) {
    case Floats::kTame: bits = sign | within(120, 134) << 7 | within(0, 127); break;
    case Floats::kNearUnderflow: bits = sign | within(52, 70) << 7 | within(0, 127); break;
    case Floats::kFewBits: bits = sign | within(121, 133) << 7 | within(0, 1) << 6; break;
    case Floats::kSpecial:
      bits = random() % 8 == 0 ? kSpecials[random() % std::size(kSpecials)]
                               : sign | within(100, 140) << 7 | within(0, 127);
      break;
    default: bits = random() & 0xffff; break;
  }
  return static_cast<uint16_t>(bits);
}

inline TileBytes random_bf16_tile(Floats kind, std::mt19937& random) {
  TileBytes tile;
  for (int i = 0; i < 512; ++i) tile.set<uint16_t>(0, i, random_bf16(kind, random));
  return tile;
}

// Sums to start from: as large as the products, or subnormal, or anything.
inline TileBytes random_float_tile(Floats kind, std::mt19937& random) {
  TileBytes tile;
  for (int i = 0; i < 256; ++i) {
    uint32_t bits = static_cast<uint32_t>(random());
    if (kind == Floats::kTame || kind == Floats::kFewBits) bits = (bits & 0x83ffffff) | 0x3c000000;
    if (kind == Floats::kNearUnderflow) bits &= 0x81ffffff;
    tile.set<uint32_t>(0, i, bits);
  }
  return tile;
}

inline bool a_is_signed(Product product) {
  return product == Product::kSignedSigned || product == Product::kSignedUnsigned;
}

inline bool b_is_signed(Product product) {
  return product == Product::kSignedSigned || product == Product::kUnsignedSigned;
}

// What tile 0 holds after the product, 1024 bytes, by plain arithmetic.
inline TileBytes reference_product(Product product, const TileConfig& config, const TileBytes& c,
                                   const TileBytes& a, const TileBytes& b) {
  const auto number = [](uint8_t byte, bool is_signed) -> int64_t {
    return is_signed ? static_cast<int8_t>(byte) : byte;
  };
  TileBytes sums;
  const int depth = config.colsb[1] / 4;
  for (int i = 0; i < config.rows[0]; ++i) {
    for (int j = 0; j < config.colsb[0] / 4; ++j) {
      if (product == Product::kBf16) {
        const auto left = [&](int l) { return a.at<uint16_t>(i, l); };
        const auto right = [&](int l) { return b.at<uint16_t>(l / 2, 2 * j + l % 2); };
        sums.set<float>(i, j, bf16_element(c.at<float>(i, j), depth, left, right));
        continue;
      }
      int64_t sum = c.at<int32_t>(i, j);
      for (int l = 0; l < 4 * depth; ++l) {
        sum += number(a.at<uint8_t>(i, l), a_is_signed(product)) *
               number(b.at<uint8_t>(l / 4, 4 * j + l % 4), b_is_signed(product));
      }
      sums.set<uint32_t>(i, j, static_cast<uint32_t>(sum));
    }
  }
  return sums;
}

// Whether a tile holds the sums; floats may be any not-a-number where one is expected.
inline bool same_sums(Product product, const TileBytes& found, const TileBytes& expected) {
  if (product != Product::kBf16) return found == expected;
  for (int i = 0; i < 256; ++i) {
    if (!same_float(found.at<float>(0, i), expected.at<float>(0, i))) return false;
  }
  return true;
}

}  // namespace kt_amx
