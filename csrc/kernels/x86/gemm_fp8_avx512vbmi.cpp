// fp8 GEMM on AVX-512 BF16 and VBMI: codes become bf16 by look-up, products are summed in fp32 over
// a group, and the sum is folded into c with the group's scale. 6 rows x 64 columns a tile.
#include "kernels/x86/codes_avx512.h"
#include "kernels/x86/fp8_avx512vbmi.h"

namespace kt {
namespace {

template <int kRows>
struct Tile {
  const uint8_t* a[kRows];
  __m512 sum[kRows][4];

  template <typename Body>
  [[gnu::always_inline]] static inline void for_each(const Body& body) {
    unroll<kRows>([&](auto i) KT_INLINE { unroll<4>([&](auto j) KT_INLINE { body(i, j); }); });
  }

  [[gnu::always_inline]] inline void start_group() {
    for_each([&](auto i, auto j) KT_INLINE { sum[i.value][j.value] = _mm512_setzero_ps(); });
  }

  // The 4 k of a step.
  [[gnu::always_inline]] inline void add(const uint8_t* step, int64_t k) {
    unroll<4>([&](auto j) KT_INLINE {
      const Fp8Pairs w = load_fp8(step + 64 * j.value);
      add_pairs<j.value>(w.first, 2 * k);
      add_pairs<j.value>(w.second, 2 * k + 4);
    });
  }

  // Each pair of activations comes from memory with its product: there is no register for it.
  template <int kLine>
  [[gnu::always_inline]] inline void add_pairs(__m512i w, int64_t at) {
    unroll<kRows>([&](auto i) KT_INLINE {
      asm("vdpbf16ps %2%{1to16%}, %1, %0"
          : "+v"(sum[i.value][kLine])
          : "v"(w), "m"(*reinterpret_cast<const int32_t*>(a[i.value] + at)));
    });
  }

  // c = sum * scale, or c + that behind the first group.
  template <typename Scales>
  [[gnu::always_inline]] inline void end_group(const GemmArgs& args, int row, const uint8_t* at,
                                               bool first) const {
    float* const c = args.c + row * args.c_stride;
    unroll<4>([&](auto j) KT_INLINE {
      const __m512 scale = Scales::scale(at, nullptr, j.value);
      unroll<kRows>([&](auto i) KT_INLINE {
        float* const line = c + i.value * args.c_stride + kLineColumns * j.value;
        const __m512 s = sum[i.value][j.value];
        _mm512_storeu_ps(line, first ? _mm512_mul_ps(s, scale)
                                     : _mm512_fmadd_ps(s, scale, _mm512_loadu_ps(line)));
      });
    });
  }
};

// Reads the panel as one ascending stream. If kPrefetch, fetches half of the next panel.
template <typename Scales, int kRows, bool kPrefetch>
[[gnu::noinline]] void run_fp8(const GemmArgs& args, int row, const uint8_t* next) {
  Tile<kRows> tile;
  unroll<kRows>([&](auto i) KT_INLINE { tile.a[i.value] = row_pointer(args, row + i.value); });
  const uint8_t* panel = args.panel;
  int64_t k = 0;
  while (k < args.k) {
    const bool first = k == 0;
    const int64_t k_end = k + args.group_size < args.k ? k + args.group_size : args.k;
    tile.start_group();
    for (; k < k_end; k += 4, panel += kStepBytes) {
      if constexpr (kPrefetch) {
        prefetch_half<4>(next);
        next += kStepBytes;
      }
      tile.add(panel, k);
    }
    tile.template end_group<Scales>(args, row, panel, first);
    panel += Scales::kBytes;
    if constexpr (kPrefetch) {
      prefetch_half<4>(next);
      next += Scales::kBytes;
    }
  }
}

template <typename Scales>
struct Fp8Tile {
  template <int kRows>
  static void run(const GemmArgs& args, const RowBlock& block) {
    if (const uint8_t* next = prefetch_source(args, block)) {
      run_fp8<Scales, kRows, true>(args, block.row, next);
    } else {
      run_fp8<Scales, kRows, false>(args, block.row, nullptr);
    }
  }
};

}  // namespace

void gemm_bf16_fp8_fp32_6x64x4_avx512vbmi(const GemmArgs& args) {
  for_each_row_block<Fp8Tile<Bf16Scales>, 6>(args);
}
void gemm_bf16_fp8f_fp32_6x64x4_avx512vbmi(const GemmArgs& args) {
  for_each_row_block<Fp8Tile<Fp32Scales>, 6>(args);
}

}  // namespace kt
