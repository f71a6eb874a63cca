// Compiled for AVX2 and FMA. A fused multiply-add that flushes subnormal results cannot be had from
// std::fma and a comparison afterwards: the unit looks at the result rounded to 24 bits with an
// unbounded exponent, which the flushed number does not show any more. So the instruction itself
// runs, with MXCSR set to what TDPBF16PS uses. The interpreter installs itself on hosts that have
// both features only.
#include "amx/tile_machine.h"

#include <immintrin.h>

#include <bit>
#include <cstring>

namespace kt_amx {
namespace {

constexpr int kLanes = kMaxColsb / 4;

bool any_nonzero(const uint8_t* bytes, int count) {
  for (int i = 0; i < count; ++i) {
    if (bytes[i] != 0) return true;
  }
  return false;
}

bool is_error(const TileConfig& config) {
  if (config.palette > 1) return true;
  if (config.palette == 0) return false;
  if (any_nonzero(config.reserved, sizeof config.reserved)) return true;
  for (int tile = 0; tile < 16; ++tile) {
    const int rows = config.rows[tile];
    const int colsb = config.colsb[tile];
    if (tile >= kNumTiles && (rows != 0 || colsb != 0)) return true;
    if (rows > kMaxRows || colsb > kMaxColsb) return true;
    if ((rows == 0) != (colsb == 0)) return true;
  }
  return false;
}

// Only the shape of c counts: the sums beyond it are of rows and columns that are cut off.
struct Shape {
  int rows;
  int columns;
  int depth;
};

void write_row(Tile& tile, int row, const void* values, int bytes) {
  std::memcpy(tile.row[row], values, bytes);
  std::memset(tile.row[row] + bytes, 0, kMaxColsb - bytes);
}

void zero_rows_from(Tile& tile, int row) {
  std::memset(tile.row[row], 0, size_t{kMaxColsb} * (kMaxRows - row));
}

// In integers: the hardware wraps around, and a pointer may not.
char* row_address(const void* memory, int64_t stride_bytes, int row) {
  const uint64_t offset = static_cast<uint64_t>(stride_bytes) * static_cast<uint64_t>(row);
  return reinterpret_cast<char*>(reinterpret_cast<uint64_t>(memory) + offset);
}

template <typename A, typename B>
void multiply_bytes(Tile& c, const Tile& a, const Tile& b, const Shape& shape) {
  // byte j of every element of a row side by side: sums over columns are then sums of vectors
  int32_t spread[kMaxRows][4][kLanes];
  for (int k = 0; k < shape.depth; ++k) {
    for (int n = 0; n < kLanes; ++n) {
      for (int j = 0; j < 4; ++j) spread[k][j][n] = static_cast<B>(b.row[k][4 * n + j]);
    }
  }
  for (int m = 0; m < shape.rows; ++m) {
    uint32_t sums[kLanes];
    std::memcpy(sums, c.row[m], sizeof sums);
    for (int k = 0; k < shape.depth; ++k) {
      for (int j = 0; j < 4; ++j) {
        const int32_t factor = static_cast<A>(a.row[m][4 * k + j]);
        for (int n = 0; n < kLanes; ++n) sums[n] += static_cast<uint32_t>(factor * spread[k][j][n]);
      }
    }
    write_row(c, m, sums, 4 * shape.columns);
  }
}

float bf16_at(const uint8_t* bytes) {
  uint16_t bits;
  std::memcpy(&bits, bytes, sizeof bits);
  return std::bit_cast<float>(uint32_t{bits} << 16);
}

// Out of line, so that no operation leaves the region where MXCSR is set.
[[gnu::noinline]] void multiply_bf16(Tile& c, const Tile& a, const Tile& b, const Shape& shape) {
  float spread[kMaxRows][2][kLanes];
  for (int k = 0; k < shape.depth; ++k) {
    for (int n = 0; n < kLanes; ++n) {
      for (int j = 0; j < 2; ++j) spread[k][j][n] = bf16_at(b.row[k] + 4 * n + 2 * j);
    }
  }
  for (int m = 0; m < shape.rows; ++m) {
    float even[kLanes] = {};
    float odd[kLanes] = {};
    for (int k = 0; k < shape.depth; ++k) {
      const float first = bf16_at(a.row[m] + 4 * k);
      const float second = bf16_at(a.row[m] + 4 * k + 2);
      for (int n = 0; n < kLanes; ++n) {
        even[n] = __builtin_fmaf(first, spread[k][0][n], even[n]);
        odd[n] = __builtin_fmaf(second, spread[k][1][n], odd[n]);
      }
    }
    float sums[kLanes];
    std::memcpy(sums, c.row[m], sizeof sums);
    for (int n = 0; n < kLanes; ++n) sums[n] = sums[n] + (even[n] + odd[n]);
    write_row(c, m, sums, 4 * shape.columns);
  }
}

void multiply_bf16_flushing(Tile& c, const Tile& a, const Tile& b, const Shape& shape) {
  // all exceptions masked, to nearest even, results flushed (bit 15), denormals are zeros (bit 6)
  constexpr unsigned kTileMode = 0x1f80 | 0x8000 | 0x0040;
  const unsigned of_the_thread = _mm_getcsr();
  _mm_setcsr(kTileMode);
  multiply_bf16(c, a, b, shape);
  _mm_setcsr(of_the_thread);
}

}  // namespace

Fault TileMachine::load_config(const void* memory) {
  TileConfig read;
  std::memcpy(&read, memory, sizeof read);
  if (is_error(read)) return Fault::kProtection;
  release();
  if (read.palette != 0) config = read;
  return Fault::kNone;
}

void TileMachine::store_config(void* memory) const { std::memcpy(memory, &config, sizeof config); }

Fault TileMachine::load(int tile, const void* memory, int64_t stride_bytes) {
  if (!can_transfer(tile)) return Fault::kUndefined;
  zero_rows_from(tiles[tile], config.start_row);
  for (int row = config.start_row; row < config.rows[tile]; ++row) {
    write_row(tiles[tile], row, row_address(memory, stride_bytes, row), config.colsb[tile]);
  }
  config.start_row = 0;
  return Fault::kNone;
}

Fault TileMachine::store(int tile, void* memory, int64_t stride_bytes) {
  if (!can_transfer(tile)) return Fault::kUndefined;
  for (int row = config.start_row; row < config.rows[tile]; ++row) {
    std::memcpy(row_address(memory, stride_bytes, row), tiles[tile].row[row], config.colsb[tile]);
  }
  config.start_row = 0;
  return Fault::kNone;
}

Fault TileMachine::zero(int tile) {
  if (!is_valid(tile)) return Fault::kUndefined;
  zero_rows_from(tiles[tile], 0);
  config.start_row = 0;
  return Fault::kNone;
}

void TileMachine::release() {
  config = TileConfig();
  for (Tile& tile : tiles) zero_rows_from(tile, 0);
}

Fault TileMachine::multiply(Product product, int c, int a, int b) {
  if (c == a || c == b || a == b) return Fault::kUndefined;
  if (!has_dwords(c) || !has_dwords(a) || !has_dwords(b)) return Fault::kUndefined;
  const Shape shape = {config.rows[c], config.colsb[c] / 4, config.colsb[a] / 4};
  if (config.rows[a] != shape.rows || config.colsb[b] != config.colsb[c] ||
      config.rows[b] != shape.depth) {
    return Fault::kUndefined;
  }
  Tile& sum = tiles[c];
  const Tile& left = tiles[a];
  const Tile& right = tiles[b];
  switch (product) {
    case Product::kSignedSigned: multiply_bytes<int8_t, int8_t>(sum, left, right, shape); break;
    case Product::kSignedUnsigned: multiply_bytes<int8_t, uint8_t>(sum, left, right, shape); break;
    case Product::kUnsignedSigned: multiply_bytes<uint8_t, int8_t>(sum, left, right, shape); break;
    case Product::kUnsignedUnsigned:
      multiply_bytes<uint8_t, uint8_t>(sum, left, right, shape);
      break;
    case Product::kBf16: multiply_bf16_flushing(sum, left, right, shape); break;
  }
  if (shape.rows < kMaxRows) zero_rows_from(sum, shape.rows);
  config.start_row = 0;
  return Fault::kNone;
}

}  // namespace kt_amx
