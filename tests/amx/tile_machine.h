// The tiles of one thread and what the AMX instructions do to them. Memory operands are plain
// pointers; decoding, signals and the permission of the kernel are elsewhere.
//
// Source  Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, LDTILECFG to
//         TILEZERO and the exception classes AMX-E1 to AMX-E6.
#pragma once

#include <cstdint>

namespace kt_amx {

constexpr int kNumTiles = 8;
constexpr int kMaxRows = 16;
constexpr int kMaxColsb = 64;

// What an instruction raises instead of completing. Then it has changed nothing.
enum class Fault {
  kNone,
  kUndefined,   // #UD, under Linux SIGILL
  kProtection,  // #GP, under Linux SIGSEGV
};

// The products, named by the elements of a and b: TDPBSSD, TDPBSUD, TDPBUSD, TDPBUUD, TDPBF16PS.
enum class Product { kSignedSigned, kSignedUnsigned, kUnsignedSigned, kUnsignedUnsigned, kBf16 };

// The 64 bytes in memory that LDTILECFG reads and STTILECFG writes. Entries 8 to 15 are reserved.
struct TileConfig {
  uint8_t palette = 0;    // 0: tiles not configured, 1: eight tiles
  uint8_t start_row = 0;  // where an interrupted load or store goes on
  uint8_t reserved[14] = {};
  uint16_t colsb[16] = {};  // bytes a row
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

struct Tile {
  alignas(64) uint8_t row[kMaxRows][kMaxColsb] = {};
};

// Value-initialised it is the state of a new thread: no configuration.
//
// Requires  tile numbers below 8, which is all that the decoder lets through; AVX2 and FMA.
// Threads   one machine a thread.
struct TileMachine {
  TileConfig config;
  Tile tiles[kNumTiles];

  // LDTILECFG: takes the 64 bytes and zeroes all tiles. #GP for a configuration that the manual
  // calls an error.
  [[nodiscard]] Fault load_config(const void* memory);
  // STTILECFG: 64 bytes, all zero without a configuration.
  void store_config(void* memory) const;

  // TILELOADD, TILELOADDT1: row r from `memory + r * stride_bytes`; zero beyond the shape.
  [[nodiscard]] Fault load(int tile, const void* memory, int64_t stride_bytes);
  // TILESTORED: the rows and columns of the shape.
  [[nodiscard]] Fault store(int tile, void* memory, int64_t stride_bytes);
  // TILEZERO
  [[nodiscard]] Fault zero(int tile);
  // TILERELEASE
  void release();

  // c += a b, for c [m, n] of 32 bits, a [m, k], b [k, n] of 4 int8 or 2 bf16 an element.
  //
  // int8  c[i, j] += sum_l sum_4 a[i, l][.] * b[l, j][.], modulo 2^32.
  // bf16  even and odd elements are summed apart from zero, one fused multiply-add a step of l;
  //       then c[i, j] = c[i, j] + (even + odd). Each of these operations rounds to nearest even,
  //       takes subnormal operands for zero and flushes subnormal results. MXCSR is neither read
  //       nor changed.
  [[nodiscard]] Fault multiply(Product product, int c, int a, int b);

  // Bytes inside the shape of a tile.
  uint64_t bytes_of(int tile) const { return uint64_t{config.rows[tile]} * config.colsb[tile]; }

 private:
  bool is_valid(int tile) const { return config.palette != 0 && config.rows[tile] != 0; }
  bool has_dwords(int tile) const { return is_valid(tile) && config.colsb[tile] % 4 == 0; }
  bool can_transfer(int tile) const {
    return has_dwords(tile) && config.start_row < config.rows[tile];
  }
};

}  // namespace kt_amx
