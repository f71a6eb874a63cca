// bf16 GEMM in AMX tiles, of bf16 weights and of others expanded to bf16: one sum over all of k in
// the tiles. TDPBF16PS adds even and odd k apart, flushes subnormals and has one chain of sums an
// output, so a row's result does not depend on the rows beside it.
#include "kernels/x86/gemm_amx.h"

namespace kt {
namespace {

// Columns of k in one product.
constexpr int kTileK = kTileBytes / 2;

// c = sums. The next panel is 1 / kShorter as long as this one.
template <int kShorter>
inline void multiply(const GemmArgs& args) {
  multiply_panel<Bf16, float, kShorter>(
      args, args.k / kTileK, [&](const Sums<float>& sums, const Part& part) {
        for (int i = 0; i < part.rows; ++i) {
          float* const c = args.c + (part.row + i) * args.c_stride + part.column;
          for (int j = 0; j < part.columns; j += kLineColumns)
            _mm512_storeu_ps(c + j, _mm512_load_ps(sums.values + i * part.columns + j));
        }
      });
}

// The same times a scale a row, where the rows do not carry their scales.
template <int kShorter>
inline void multiply_scaled(const GemmArgs& args) {
  if (args.a_block < args.k) return multiply<kShorter>(args);
  multiply_panel<Bf16, float, kShorter>(
      args, args.k / kTileK,
      [&](const Sums<float>& sums, const Part& part) { store_scaled(args, part, sums); });
}

}  // namespace

void gemm_bf16_bf16_fp32_32x64x2_amxbf16(const GemmArgs& args) { multiply<1>(args); }

void gemm_bf16_fp8b_fp32_32x64x2_amxbf16(const GemmArgs& args) { multiply<2>(args); }

void gemm_s8_int8hb_fp32_32x64x2_amxbf16(const GemmArgs& args) { multiply_scaled<2>(args); }

void gemm_s8_int4b_fp32_32x64x2_amxbf16(const GemmArgs& args) { multiply_scaled<4>(args); }

}  // namespace kt
