// AMX instructions for tests, by the compiler's intrinsics. The barriers are needed: of GCC 12's
// intrinsics (amxtileintrin.h) the loads do not tell the compiler that they read memory, and those
// of configurations tell it of 8 bytes instead of 64.
//
// Compile with -mamx-tile -mamx-int8 -mamx-bf16.
#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "amx/tile_values.h"

namespace kt_amx {

inline void barrier() { __asm__ volatile("" ::: "memory"); }

inline void load_config(const TileConfig& config) {
  barrier();
  _tile_loadconfig(&config);
}

inline TileConfig stored_config() {
  TileConfig config;
  config.palette = 0xff;
  barrier();
  _tile_storeconfig(&config);
  barrier();
  return config;
}

template <typename Bytes>
void load_operands(const Bytes& c, const Bytes& a, const Bytes& b) {
  barrier();
  _tile_loadd(0, c.bytes.data(), 64);
  _tile_loadd(1, a.bytes.data(), 64);
  _tile_stream_loadd(2, b.bytes.data(), 64);
}

// Tile 0 += tile 1 times tile 2.
inline void multiply(Product product) {
  switch (product) {
    case Product::kSignedSigned: _tile_dpbssd(0, 1, 2); break;
    case Product::kSignedUnsigned: _tile_dpbsud(0, 1, 2); break;
    case Product::kUnsignedSigned: _tile_dpbusd(0, 1, 2); break;
    case Product::kUnsignedUnsigned: _tile_dpbuud(0, 1, 2); break;
    case Product::kBf16: _tile_dpbf16ps(0, 1, 2); break;
  }
}

// Tile 0 in memory of zeros.
inline TileBytes stored_sums() {
  TileBytes sums;
  barrier();
  _tile_stored(0, sums.bytes.data(), 64);
  return sums;
}

inline TileBytes executed_product(Product product, const TileConfig& config, const TileBytes& c,
                                  const TileBytes& a, const TileBytes& b) {
  load_config(config);
  load_operands(c, a, b);
  multiply(product);
  return stored_sums();
}

// ARCH_REQ_XCOMP_PERM for the tiles, as every user of them has to.
inline long request_tiles() { return syscall(SYS_arch_prctl, 0x1023, 18); }

}  // namespace kt_amx
