// The tile configuration of every AMX kernel, and rows of bytes for tiles.
#include <immintrin.h>

#include "kernels/kernel.h"
#include "kernels/x86/pack_bytes_amx.h"

namespace kt {

extern const TileControl tiles_amxint8;
extern const RowPacking pack_int8_amxint8;

namespace {

// Intel's layout of a configuration (LDTILECFG).
struct alignas(64) TileConfiguration {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfiguration) == 64);

// One shape for all: rows are padded to whole tiles, so nothing ever has to be configured anew.
void configure() {
  constexpr int kTiles = 8;
  TileConfiguration configuration = {};
  configuration.palette = 1;
  for (int tile = 0; tile < kTiles; ++tile) {
    configuration.row_bytes[tile] = kTileBytes;
    configuration.rows[tile] = kTileRows;
  }
  asm volatile("ldtilecfg %0" : : "m"(configuration));
}

void release() { asm volatile("tilerelease"); }

}  // namespace

const TileControl tiles_amxint8 = {"tiles_amxint8", configure, release};
const RowPacking pack_int8_amxint8 = {"pack_int8_amxint8", 1, pack_bytes<1>};

}  // namespace kt
