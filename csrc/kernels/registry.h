// Which kernel runs: the table of kernels.inc, cut to the features in use.
#pragma once

#include <string>
#include <vector>

#include "base/cpu_features.h"
#include "base/dtype.h"
#include "kernels/kernel.h"

namespace kt {

// One row of kernels.inc.
struct GemmKernel {
  const char* name;
  IsaSet isa;          // needs all of these
  DType weight_dtype;  // kInt8, kInt4 or kBFloat16
  DType a_dtype;       // kInt8, kUint8 (= int8 + 128) or kBFloat16
  int mr;              // rows of its register tile
  int m_from;          // chosen for experts with at least this many rows
  GemmFn gemm;
  ExpandFn expand;  // not null: the dispatcher expands each panel once and passes the scratch
};

// The kernels one method uses on one host. All share a_dtype, so activations are quantized once.
struct KernelSet {
  const RowwiseOps* rowwise = nullptr;
  DType a_dtype = DType::kBFloat16;
  std::vector<const GemmKernel*> gemms;     // ascending m_from; the first has m_from 1
  const GemmKernel& for_rows(int m) const;  // last row with m_from <= max(m, 1)
};

// All rows of kernels.inc, and all RowwiseOps with what they need.
const std::vector<GemmKernel>& list_gemm_kernels();
struct RowwiseKernel {
  IsaSet isa;
  const RowwiseOps* ops;
};
const std::vector<RowwiseKernel>& list_rowwise_kernels();

// The limits of a host, measured by the benches: the probes of the highest feature set within
// `isa`.
struct Probes {
  ReadProbeFn read;
  PeakProbeFn peak;  // multiply-accumulates as the kernels of `weight_dtype` do them
  int64_t operations_per_iteration;
  const char* peak_name;
};
Probes select_probes(DType weight_dtype, IsaSet isa);

// Picks, for each m class, the row of the highest feature set within `isa`. Never empty: reference
// is always there.
KernelSet select_kernels(DType weight_dtype, IsaSet isa);

// The choice as one line of text, e.g. "int8 on avx512: m>=1 gemm_u8_int8_..., rowwise_avx512".
std::string explain_kernels(DType weight_dtype, IsaSet isa);

}  // namespace kt
