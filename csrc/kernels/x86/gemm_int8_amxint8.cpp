// int8 GEMM in AMX tiles: activations as unsigned bytes (code + 128), weights signed, one sum over
// all of k in the tiles (255 * 127 * kMaxIntegerK fits).
#include "kernels/x86/gemm_amx.h"

namespace kt {

void gemm_u8_int8_fp32_32x64x4_amxint8(const GemmArgs& args) {
  const uint8_t* const tail = args.panel + int64_t{args.k} * kPanelColumns;
  // c = (float(sum + compensation) * w_scale) * a_scale, in this order
  multiply_panel<U8S8, int32_t, 1>(
      args, args.k / kTileBytes, [&](const Sums<int32_t>& sums, const Part& part) {
        for (int i = 0; i < part.rows; ++i) {
          const int row = part.row + i;
          const __m512 a_scale = _mm512_set1_ps(args.a_scale[scale_row(args, row)]);
          const int32_t* const sum = sums.values + i * part.columns;
          float* const c = args.c + row * args.c_stride + part.column;
          for (int j = 0; j < part.columns; j += kLineColumns) {
            const uint8_t* const column = tail + 4 * (part.column + j);
            const __m512i whole =
                _mm512_add_epi32(_mm512_load_si512(sum + j), _mm512_load_si512(column));
            const __m512 scaled =
                _mm512_mul_ps(_mm512_cvtepi32_ps(whole), _mm512_load_ps(column + 256));
            _mm512_storeu_ps(c + j, _mm512_mul_ps(scaled, a_scale));
          }
        }
      });
}

}  // namespace kt
