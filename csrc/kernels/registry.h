// Which kernel runs: the table of kernels.inc and what other libraries add to it, cut to the
// features in use and to what KT_GEMM allows.
#pragma once

#include <deque>
#include <string>
#include <vector>

#include "base/cpu_features.h"
#include "base/dtype.h"
#include "base/weight_format.h"
#include "kernels/kernel.h"

namespace kt {

// The groups of weights a row is for.
enum class Groups {
  kAny,
  kWide,    // beside rows of one scale: a whole row, or a multiple of 64 from 128 on, which is two
            // products in tiles or more
  kNarrow,  // all others
};

enum class GemmSource {
  kNative,  // kernels.inc
  kOneDnn,  // oneDNN's micro-kernels, out of torch (torch/onednn_brgemm.cpp)
};

// Compiles what a row needs for products of depth k. Each thread that is to call its GemmFn calls
// this first, or its first call does the same and takes milliseconds. Allocates.
using PrepareFn = void (*)(int32_t k);

// One row of kernels.inc, or one that register_gemm() added.
struct GemmKernel {
  const char* name;
  IsaSet isa;  // needs all of these
  WeightFormat weights;
  DType a_dtype;  // kInt8, kUint8 (= int8 + 128) or kBFloat16
  int mr;         // rows of its register tile
  int m_from;     // chosen for experts with at least this many rows; 0: only on request
  GemmFn gemm;
  ExpandFn expand;  // not null: the dispatcher expands each panel once and passes the scratch
  GemmSource source = GemmSource::kNative;
  PrepareFn prepare = nullptr;          // null: nothing to compile
  const RowPacking* packing = nullptr;  // not null: it works in tiles, on rows so packed
  Groups groups = Groups::kAny;

  // Whether it sums products of bf16: rounded in an order of its own.
  bool rounds() const;
  // What it multiplies: kBFloat16 or kInt8; codes with groups as either.
  DType multiplied() const;
  // Whether it may be given groups of so many (0: a whole row) beside activations of one scale a
  // row, or of one each block.
  bool fits_groups(int group_size, bool row_scales) const;
};

// Bytes of the scratch that any ExpandFn may want for a panel.
inline int64_t expanded_bytes(int64_t k, int64_t num_groups) {
  return (2 * k + 8 * num_groups + 4) * kPanelColumns;
}

// The sources that select_kernels() may take rows from.
enum class GemmChoice {
  kAuto,    // all, by m_from
  kNative,  // kernels.inc
  kOneDnn,  // oneDNN's row for every m; what it has none for (all but int8, bf16), from kernels.inc
};

// Applies a KT_GEMM value: auto, native or onednn; empty or null: auto.
// Errors   kt::Error naming the value and the allowed words.
GemmChoice parse_gemm_choice(const char* value);

// KT_GEMM, read once; throws what parse_gemm_choice() throws on every call. Thread-safe.
GemmChoice gemm_choice();

// KT_DETERMINISTIC, read once: 1, 0, or empty and unset for 0.
// Errors   kt::Error naming the value and the allowed ones, on every call. Thread-safe.
bool deterministic_asked();

// What kernels are wanted for.
struct KernelRequest {
  WeightFormat weights = WeightFormat::kInt8;
  IsaSet isa = kIsaReference;
  GemmChoice choice = gemm_choice();
  int group_size = 0;      // 0: a whole row
  bool row_scales = true;  // whether activations have one scale a row
  // No row whose bits depend on the rows beside it: bf16 sums of AVX-512 and of tiles differ, and
  // tiles are for experts of some rows only.
  bool deterministic = deterministic_asked();
};

// What the check of a row in tiles found when the first layer was loaded (moe/tile_check.h).
enum class TileVerdict {
  kUnchecked,  // taken as right
  kRight,
  kSlower,  // than oneDNN's row, which takes its place
  kWrong,   // the rows without tiles take its place
};
// kWrong and kUnchecked are given to every row of the same GemmFn, the others to those of the same
// ExpandFn as well. Kernels are to be selected anew where another number of verdicts has been given
// since.
// Thread-safe.
void set_tile_verdict(const GemmKernel& kernel, TileVerdict verdict);
TileVerdict tile_verdict(const GemmKernel& kernel);
uint64_t num_tile_verdicts();

// A kernel and the rows of an expert from which on it is chosen.
struct ChosenGemm {
  const GemmKernel* kernel = nullptr;
  int m_from = 1;
};

// The kernels one method uses on one host. All share a_dtype, so activations are quantized once.
struct KernelSet {
  const RowwiseOps* rowwise = nullptr;
  DType a_dtype = DType::kBFloat16;
  std::vector<ChosenGemm> gemms;            // ascending m_from; the first serves m = 1
  const GemmKernel& for_rows(int m) const;  // last row with m_from <= max(m, 1)
  // The same among the rows that need no packing; there is always one.
  const GemmKernel& for_plain_rows(int m) const;
  // The row in tiles, or null.
  const GemmKernel* tile_gemm() const;
  // Bytes of a value of its packed rows; 0 without one.
  int packed_value_bytes() const;
};

// Adds a row whose source is another library. Its place in the table is that of its isa and m_from:
// the order in which rows are added changes no choice.
//
// Errors   kt::Error: the name is there already; the source is kNative; or bf16 with m_from above
//          1, where bf16 sums, rounded in an order of each row's own, would depend on m.
// Threads  none: called while the program loads, before anything else of this header.
void register_gemm(const GemmKernel& kernel);

// All rows of kernels.inc, then the registered ones, and all RowwiseOps with what they need.
const std::deque<GemmKernel>& list_gemm_kernels();
struct RowwiseKernel {
  IsaSet isa;
  const RowwiseOps* ops;
};
const std::vector<RowwiseKernel>& list_rowwise_kernels();

// The limits of a host, measured by the benches: the probes of the highest feature set within
// `isa`.
struct Probes {
  ReadProbeFn read;
  PeakProbeFn peak;  // multiply-accumulates of `multiplied` (GemmKernel), as the kernels do them
  int64_t operations_per_iteration;
  const char* peak_name;
  bool tiles;  // whether `peak` works in tiles

  // peak(iterations), with the tiles of the calling thread configured for it and released after it.
  uint64_t run_peak(int64_t iterations) const;
};
Probes select_probes(DType multiplied, IsaSet isa);

// Picks, for each m class, the row of the highest feature set within `isa`. Never empty: reference
// is always there.
// Errors   kt::Error: kOneDnn, where oneDNN has no row for these weights within `isa`.
KernelSet select_kernels(const KernelRequest& request);

// The choice as one line of text, e.g. "int8 on avx512: m>=1 gemm_u8_int8_..., rowwise_avx512".
std::string explain_kernels(const KernelRequest& request);

}  // namespace kt
