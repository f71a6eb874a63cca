// What the AMX GEMM kernels share: the instructions, and products of packed rows by 32 or 64
// columns of a panel. No other ISA's file includes it; everything is in an anonymous namespace.
//
// Tiles    C 0 .. 3, then A and B. 32 rows by 32 columns take two tiles of A and two of B and load
//          one tile a product; up to 16 rows by 64 columns take one of A and one of B at a time,
//          five loads for four products, where memory is the limit anyway.
// Columns  a k-step of a panel is 256 bytes, a tile of B 16 k-steps of 64 bytes of them.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/kernel.h"

namespace kt {
namespace {

constexpr int kStepBytes = 256;                      // a k-step of a panel
constexpr int kChunkBytes = kTileRows * kStepBytes;  // the k-steps of one product
constexpr int kPackedTile = kTileRows * kTileBytes;  // rows of one product
constexpr int kBlockRows = 2 * kTileRows;
constexpr int kLineColumns = 16;

// Inline assembly, not intrinsics: g++ 12's do not say that a load reads memory, and take the
// number of a tile as a literal only.
template <int kTile>
inline void load_tile(const uint8_t* source, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(source), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void store_tile(void* target, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)"
               :
               : "r"(target), "r"(stride), "i"(kTile)
               : "memory");
}
template <int kTile>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

// c += a x b: tiles of unsigned by signed, signed by unsigned bytes, of bf16.
struct U8S8 {
  template <int kC, int kA, int kB>
  static void multiply() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }
};
struct S8U8 {
  template <int kC, int kA, int kB>
  static void multiply() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }
};
struct Bf16 {
  template <int kC, int kA, int kB>
  static void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }
};

// Fetches what the thread reads next into the L2 while a block multiplies: kLines lines a product.
// Unrolled, so that the products stay the innermost loop, which the gate on instructions looks at.
template <int kLines>
inline void fetch_lines(const uint8_t*& next) {
  if (next == nullptr) return;
#pragma GCC unroll 64
  for (int i = 0; i < kLines; ++i)
    _mm_prefetch(reinterpret_cast<const char*>(next + 64 * i), _MM_HINT_T1);
  next += 64 * kLines;
}

// C0 .. C3 = zeros
inline void zero_sums() {
  zero_tile<0>();
  zero_tile<1>();
  zero_tile<2>();
  zero_tile<3>();
}

// C0 C1 += rows 0 .. 15, C2 C3 += rows 16 .. 31 by 32 columns, over `chunks` products of k. `b`
// points at the first of the columns. The next panel is 1 / kShorter as long as this one.
template <typename Dot, int kShorter>
inline void add_products_32(const uint8_t* upper, const uint8_t* lower, const uint8_t* b,
                            int64_t chunks, const uint8_t*& next) {
  for (int64_t i = 0; i < chunks; ++i) {
    load_tile<6>(b, kStepBytes);
    load_tile<4>(upper, kTileBytes);
    Dot::template multiply<0, 4, 6>();
    load_tile<5>(lower, kTileBytes);
    Dot::template multiply<2, 5, 6>();
    load_tile<7>(b + 64, kStepBytes);
    Dot::template multiply<1, 4, 7>();
    Dot::template multiply<3, 5, 7>();
    fetch_lines<32 / kShorter>(next);
    upper += kPackedTile;
    lower += kPackedTile;
    b += kChunkBytes;
  }
}

// C0 .. C3 += up to 16 rows by 64 columns.
template <typename Dot, int kShorter>
inline void add_products_16(const uint8_t* a, const uint8_t* b, int64_t chunks,
                            const uint8_t*& next) {
  for (int64_t i = 0; i < chunks; ++i) {
    load_tile<4>(a, kTileBytes);
    load_tile<5>(b, kStepBytes);
    Dot::template multiply<0, 4, 5>();
    load_tile<6>(b + 64, kStepBytes);
    Dot::template multiply<1, 4, 6>();
    load_tile<7>(b + 128, kStepBytes);
    Dot::template multiply<2, 4, 7>();
    load_tile<5>(b + 192, kStepBytes);
    Dot::template multiply<3, 4, 5>();
    fetch_lines<64 / kShorter>(next);
    a += kPackedTile;
    b += kChunkBytes;
  }
}

// The four C tiles beside each other: 32 rows of 32 sums, or 16 rows of 64. 4 KB, so a product's
// sums stay in the L1 until the vector units come to them.
template <typename Sum>
struct alignas(64) Sums {
  Sum values[4 * kTileRows * kLineColumns];
};

template <typename Sum>
inline void store_sums_32(Sums<Sum>* sums) {
  constexpr int64_t kStride = 128;
  auto* const bytes = reinterpret_cast<uint8_t*>(sums->values);
  store_tile<0>(bytes, kStride);
  store_tile<1>(bytes + 64, kStride);
  store_tile<2>(bytes + kTileRows * kStride, kStride);
  store_tile<3>(bytes + kTileRows * kStride + 64, kStride);
}

template <typename Sum>
inline void store_sums_16(Sums<Sum>* sums) {
  constexpr int64_t kStride = 256;
  auto* const bytes = reinterpret_cast<uint8_t*>(sums->values);
  store_tile<0>(bytes, kStride);
  store_tile<1>(bytes + 64, kStride);
  store_tile<2>(bytes + 128, kStride);
  store_tile<3>(bytes + 192, kStride);
}

// Rows and columns that one Sums holds.
struct Part {
  int row;      // first row of args
  int rows;     // that are there; the tile's others are padding
  int column;   // first column of the panel
  int columns;  // 32 or 64
};

inline const uint8_t* packed_rows(const GemmArgs& args, int row, int64_t chunks) {
  return static_cast<const uint8_t*>(args.a) + row / kTileRows * chunks * kPackedTile;
}

// C0 .. C3 = the part's rows by its columns of b, over `chunks` products of k. Rows of the lower
// tiles lie `tile_bytes` behind those of the upper.
template <typename Dot, int kShorter>
inline void add_products(const Part& part, const uint8_t* a, int64_t tile_bytes, const uint8_t* b,
                         int64_t chunks, const uint8_t*& next) {
  zero_sums();
  if (part.columns == 32) {
    add_products_32<Dot, kShorter>(a, a + tile_bytes, b, chunks, next);
  } else {
    add_products_16<Dot, kShorter>(a, b, chunks, next);
  }
}

template <typename Sum>
inline void store_sums(const Part& part, Sums<Sum>* sums) {
  if (part.columns == 32) {
    store_sums_32(sums);
  } else {
    store_sums_16(sums);
  }
}

inline int64_t scale_row(const GemmArgs& args, int i) {
  return args.row_idx != nullptr ? args.row_idx[i] : i;
}

// c = sums * a_scale
inline void store_scaled(const GemmArgs& args, const Part& part, const Sums<float>& sums) {
  for (int i = 0; i < part.rows; ++i) {
    const int row = part.row + i;
    const __m512 a_scale = _mm512_set1_ps(args.a_scale[scale_row(args, row)]);
    float* const c = args.c + row * args.c_stride + part.column;
    for (int j = 0; j < part.columns; j += kLineColumns) {
      const __m512 sum = _mm512_load_ps(sums.values + i * part.columns + j);
      _mm512_storeu_ps(c + j, _mm512_mul_ps(sum, a_scale));
    }
  }
}

// What a panel with one sum over all of k costs: each product is issued before the sums of the one
// before it are finished, so that the tiles need not wait for the vector units.
//
// finish(sums, part) turns sums into c.
template <typename Dot, typename Sum, int kShorter, typename Finish>
inline void multiply_panel(const GemmArgs& args, int64_t chunks, Finish finish) {
  Sums<Sum> sums[2];
  Part last{};
  int at = 0;
  const uint8_t* next = args.next_panel;
  for (int row = 0; row < args.m; row += kBlockRows) {
    const int rows = args.m - row < kBlockRows ? args.m - row : kBlockRows;
    const uint8_t* const upper = packed_rows(args, row, chunks);
    const int width = rows > kTileRows ? 32 : 64;
    for (int column = 0; column < kPanelColumns; column += width) {
      const Part part = {row, rows, column, width};
      add_products<Dot, kShorter>(part, upper, chunks * kPackedTile, args.panel + 4 * column,
                                  chunks, next);
      if (last.rows > 0) finish(sums[at ^ 1], last);
      store_sums(part, &sums[at]);
      last = part;
      at ^= 1;
    }
    next = nullptr;
  }
  if (last.rows > 0) finish(sums[at ^ 1], last);
}

// A peak probe: C0 .. C3 += A x B, `iterations` times, on tiles of zeros: the time of a product
// does not depend on its values.
template <typename Dot>
inline uint64_t multiply_zeros(int64_t iterations) {
  zero_sums();
  zero_tile<4>();
  zero_tile<5>();
  for (int64_t i = 0; i < iterations; ++i) {
    Dot::template multiply<0, 4, 5>();
    Dot::template multiply<1, 4, 5>();
    Dot::template multiply<2, 4, 5>();
    Dot::template multiply<3, 4, 5>();
  }
  Sums<int32_t> sums;
  store_sums_32(&sums);
  return static_cast<uint64_t>(sums.values[0]);
}

}  // namespace
}  // namespace kt
