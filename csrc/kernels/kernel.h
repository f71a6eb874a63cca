// The contracts of all kernels: plain structs and function pointers, on raw memory,
// single-threaded. Included by ISA objects, so it holds no inline function and only <cstdint>.
//
// Letters: m rows of activations (tokens), n output columns, k input columns; nr = 64 columns of a
// panel, mr rows of a register tile. k is always the padded k of the layout (a multiple of 64 for
// integer codes, of 32 for bf16).
#pragma once

#include <cstdint>

namespace kt {

// Output columns of one packed panel; four 64-byte lines of 16 columns a k-step.
// (format/packed_layout.h has the bytes.)
constexpr int kPanelColumns = 64;

// Largest padded k of the integer kernels: 255 * 127 * k must stay below 2^31, and 65536 is the
// round number under it.
constexpr int kMaxIntegerK = 65536;

// c[i, j] = sum_k a[row(i), k] * w[j, k], for one panel of 64 columns, i in [0, m).
//
// Formula   int8   c = (float(sum_k qa * qw) * w_scale[j]) * a_scale[row]
//           groups of integers (base/weight_format.h), for each block b of a_block k ascending:
//                  part = 0; for its groups g ascending:
//                    part = fma(float(sum_{k in g} qa * (u - offset)), scale[g, j], part),
//                           offset that of the format or zero[g, j];
//                    with a minimum: part = fma(float(sum_{k in g} qa), minimum[g, j], part);
//                  acc = part * a_scale[row, b] for the first b, then
//                  acc = fma(part, a_scale[row, b], acc);
//                  c = acc, or acc * t[j] (kColumn)
//                  scale = fp32(s), or d * c (kBlock*); minimum = fp32(m), or -(e * b) (kBlockMin):
//                  both products exact
//           bf16   c = sum_k a * w in fp32, order and rounding free for each kernel but the same
//                  for every m
//           fp8    c = sum over groups of scale[g, j] * sum_{k in g} a * w, as free as bf16; or as
//                  bf16 of bf16(w * scale)
//           integers expanded to bf16: c = (sum_k qa * bf16(w * scale) in fp32) * a_scale[row], or
//                  sum_k bf16(qa * a_scale[row, b]) * bf16(w * scale) with a_block < k
//           Integer sums are exact, so integers give the same bits on every tier, for every m, but
//           where they are expanded to bf16.
// Shapes    a [rows, k] row-major: int8 codes of -127 to 127, the same + 128 as uint8, or bf16 (the
//           kernel's a_dtype), or what RowPacking made of rows 0 .. m - 1 if the kernel has one;
//           a_scale [rows, blocks]; a_group_sum [rows, groups], sum of the int8 codes of each
//           weight group (groups of integers only); panel as PackedLayout describes, or what
//           ExpandFn wrote if the kernel has one; c [m, 64], overwritten.
// Units     a_stride_bytes in bytes, not read where rows are packed; c_stride, a_scale_stride and
//           a_group_sum_stride in elements.
// Tiles     a kernel with packed rows works in AMX tiles: those of the calling thread are
//           configured (TileControl) before the call and stay so.
// Requires  panel and a 64-byte aligned; m >= 0; group_size a multiple of 32 (kBlock*, kColumn: of
//           16), or k for one scale a row; group_size <= k; a_block k, or whole groups and a
//           multiple of 64.
// Threads   re-entrant.
struct GemmArgs {
  const void* a;
  int64_t a_stride_bytes;
  const int32_t* row_idx;      // row(i) = row_idx[i]; null: row(i) = i; packed rows: of scales only
  const float* a_scale;        // null for bf16
  int64_t a_scale_stride;      // not read where a row has one scale: they are side by side
  const int32_t* a_group_sum;  // null but for groups of integers
  int64_t a_group_sum_stride;
  const uint8_t* panel;
  const uint8_t* next_panel;  // what this thread reads next, for prefetch; may be null
  float* c;
  int64_t c_stride;
  int32_t m;
  int32_t k;
  int32_t group_size;   // columns of k under one scale of the weights
  int32_t a_block;      // columns of k under one scale of the activations
  int32_t code_offset;  // expanded integers: what to take off a code, where it has no zero
};
using GemmFn = void (*)(const GemmArgs&);

// Unpacks one panel for many rows: scratch = uint8 codes u as [k/4][64][4], then fp32 scales
// [groups][64], then what the format has of: int32 zeros [groups][64]; fp32 minima [groups][64];
// fp32 t[64] (kColumn). Or, where the kernel multiplies bf16, the value of each weight, rounded to
// nearest even, as [k/2][64][2].
//
// Shapes  scratch holds k * 128 + groups * 512 + 256 bytes, 64-byte aligned.
using ExpandFn = void (*)(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch);

// Rows of one AMX tile, and the bytes of k in one of its rows.
constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;

// How a kernel in tiles wants its rows: in blocks of 16, each [row_bytes / 64][16 rows][64 bytes],
// so that a tile is 1 KB in one piece. row_bytes = k * value_bytes.
struct RowPacking {
  const char* name;
  int value_bytes;  // of one packed value
  // Puts a row of k codes (int8 or the same + 128; bf16) at its place: chunk i of 64 bytes goes to
  // packed + i * 1024. With value_bytes 2 and int8 codes, they become bf16: exactly if a_block is
  // k, else each times its block's scale, rounded to nearest even. Others do not read the scales.
  void (*pack_row)(const uint8_t* codes, int32_t k, const float* scales, int32_t a_block,
                   uint8_t* packed);
};

// The tiles of the calling thread: every one of the eight 16 rows of 64 bytes.
struct TileControl {
  const char* name;
  void (*configure)();
  void (
      *release)();  // back to the state of a new thread, which costs no power and no context switch
};

// Reads every 64-byte line of [data, data + bytes) once, as fast as one thread of the tier can;
// returns the exclusive or of all 8-byte words, so that no read can be left out. bytes a multiple
// of 64, data 64-byte aligned.
using ReadProbeFn = uint64_t (*)(const uint8_t* data, int64_t bytes);

// Runs `iterations` of multiply-accumulate instructions on registers only, or on tiles that were
// configured before: what the GEMMs of the tier could reach at best. Each iteration is the row's
// number of operations (two a multiply-accumulate). Returns something of the sums.
using PeakProbeFn = uint64_t (*)(int64_t iterations);

// What stands between w13 and w2 of an expert, with g = gate[i], u = up[i]:
//
//   kSilu           silu(g) * u
//   kSiluLimit      silu(min(g, limit)) * clamp(u, -limit, limit)            (DeepSeek-V4)
//   kSiluThenLimit  min(silu(g), limit) * clamp(u, -limit, limit)            (Step-3.5)
//   kSwigluAlpha    a = min(g, limit): a * sigmoid(alpha * a) * (clamp(u, -limit, limit) + 1)
//                                                                            (GPT-OSS, MiniMax-M3)
//   kGelu           g * Phi(g) * u, Phi the normal distribution function
//   kGeluTanh       0.5 * g * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 * g^3))) * u
//
// with silu(x) = x * sigmoid(x), sigmoid(x) = 1 / (1 + exp(-x)).
enum class ActivationKind : int32_t {
  kSilu,
  kSiluLimit,
  kSiluThenLimit,
  kSwigluAlpha,
  kGelu,
  kGeluTanh,
};
constexpr int kNumActivationKinds = 6;

// limit and alpha: above 0 (limit may be infinity), not read by the kinds that have none. All zeros
// is kSilu.
struct Activation {
  ActivationKind kind;
  float limit;
  float alpha;
};

// out[i] = the formula of one kind, in the steps of x86/rowwise.h. A NaN in gate or up gives NaN.
//
// Shapes  n a multiple of 16.
using ActivateFn = void (*)(const float* gate, const float* up, float* out, int32_t n, float limit,
                            float alpha);

// Row operations of one tier. Same bits on every tier: each step below is one rounded fp32
// operation, in this order.
struct RowwiseOps {
  const char* name;

  // dst[i] = float(src[i]) for i < n, 0 for n <= i < padded_n.
  void (*load_bf16)(const uint16_t* src, float* dst, int32_t n, int32_t padded_n);
  void (*load_fp16)(const uint16_t* src, float* dst, int32_t n, int32_t padded_n);

  // Round to nearest even. bf16: NaN stays NaN.
  void (*store_bf16)(const float* src, uint16_t* dst, int32_t n);
  void (*store_fp16)(const float* src, uint16_t* dst, int32_t n);

  // In place, for each block of `block` columns: x = H x / sqrt(block), H the Sylvester-Hadamard
  // matrix. Butterflies with distance 1, 2, 4, ..., block/2: (u, v) -> (u + v, u - v); at the end
  // one multiplication by float(1 / sqrt(block)). block is a power of two from 32 to 1024 that
  // divides n. The transform is its own inverse.
  void (*rotate)(float* x, int32_t n, int32_t block);

  // Symmetric int8 with one scale a row.
  //   amax = max |x|; amax < 2^-100: scale 0, codes 0; amax not finite: scale NaN, codes 0;
  //   else scale = amax / 127, inverse = 127 / amax,
  //        code[i] = round_to_nearest_even(x[i] * inverse).
  // codes[i] = code + offset as a byte (offset 0 or 128). group_sum[g] = sum of code over
  // [g*group_size, (g+1)*group_size), the last group may be short; group_size a multiple of 16;
  // null group_sum: not wanted. n a multiple of 64.
  void (*quantize)(const float* x, int32_t n, int32_t offset, uint8_t* codes, float* scale,
                   int32_t group_size, int32_t* group_sum);

  ActivateFn activate[kNumActivationKinds];  // by ActivationKind

  // out[i] = fma(weight, x[i], out[i]); n a multiple of 16.
  void (*add_scaled)(const float* x, float weight, float* out, int32_t n);
};

}  // namespace kt
