// bf16 GEMM in AMX tiles, and int4 expanded to bf16: one sum over all of k in the tiles. TDPBF16PS
// adds even and odd k apart, flushes subnormals and has one chain of sums an output, so a row's
// result does not depend on the rows beside it.
#include "kernels/x86/gemm_amx.h"

namespace kt {
namespace {

// Columns of k in one product.
constexpr int kTileK = kTileBytes / 2;

}  // namespace

void gemm_bf16_bf16_fp32_32x64x2_amxbf16(const GemmArgs& args) {
  multiply_panel<Bf16, float, 1>(
      args, args.k / kTileK, [&](const Sums<float>& sums, const Part& part) {
        for (int i = 0; i < part.rows; ++i) {
          float* const c = args.c + (part.row + i) * args.c_stride + part.column;
          for (int j = 0; j < part.columns; j += kLineColumns)
            _mm512_storeu_ps(c + j, _mm512_load_ps(sums.values + i * part.columns + j));
        }
      });
}

void gemm_s8_int4b_fp32_32x64x2_amxbf16(const GemmArgs& args) {
  multiply_panel<Bf16, float, 4>(
      args, args.k / kTileK,
      [&](const Sums<float>& sums, const Part& part) { store_scaled(args, part, sums); });
}

}  // namespace kt
