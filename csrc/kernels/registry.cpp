#include "kernels/registry.h"

#include <algorithm>
#include <sstream>

#include "base/check.h"

namespace kt {

#define KT_EXPAND(symbol, isa) \
  void symbol(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch);
#define KT_GEMM(symbol, isa, weight, activation, mr, m_from, expand) \
  void symbol(const GemmArgs& args);
#define KT_ROWWISE(symbol, isa) extern const RowwiseOps symbol;
#define KT_READ_PROBE(symbol, isa) uint64_t symbol(const uint8_t* data, int64_t bytes);
#define KT_PEAK_PROBE(symbol, isa, weight, operations) uint64_t symbol(int64_t iterations);
#include "kernels/kernels.inc"

namespace {

// Order of feature sets: the tier first (VEX features such as avxvnni have high bits but stay below
// avx512), then the number of features, then the bits, so that two different sets never tie.
struct IsaRank {
  int tier;
  int count;
  IsaSet isa;
  explicit IsaRank(IsaSet set) : tier(0), count(__builtin_popcount(set)), isa(set) {
    constexpr IsaSet kAmx = kIsaAmxInt8 | kIsaAmxBf16;
    constexpr IsaSet kAvx512 = kIsaAvx512 | kIsaAvx512Vnni | kIsaAvx512Bf16 | kIsaAvx512Vbmi;
    if (set & kAmx) {
      tier = 3;
    } else if (set & kAvx512) {
      tier = 2;
    } else if (set != kIsaReference) {
      tier = 1;
    }
  }
  auto operator<=>(const IsaRank&) const = default;
};

bool is_supported(IsaSet needed, IsaSet isa) { return (needed & ~isa) == 0; }

// The best supported row for experts of exactly m rows: most capable features, then the nearest
// m_from.
const GemmKernel* best_gemm(DType weight_dtype, IsaSet isa, int m) {
  const GemmKernel* best = nullptr;
  for (const GemmKernel& kernel : list_gemm_kernels()) {
    if (kernel.weight_dtype != weight_dtype || !is_supported(kernel.isa, isa) || kernel.m_from > m)
      continue;
    if (best == nullptr || IsaRank(kernel.isa) > IsaRank(best->isa) ||
        (kernel.isa == best->isa && kernel.m_from > best->m_from)) {
      best = &kernel;
    }
  }
  return best;
}

}  // namespace

const GemmKernel& KernelSet::for_rows(int m) const {
  const GemmKernel* chosen = gemms.front();
  for (const GemmKernel* kernel : gemms) {
    if (kernel->m_from <= m) chosen = kernel;
  }
  return *chosen;
}

const std::vector<GemmKernel>& list_gemm_kernels() {
  static const std::vector<GemmKernel> kernels = {
#define KT_GEMM(symbol, isa, weight, activation, mr, m_from, expand) \
  {#symbol, isa, DType::weight, DType::activation, mr, m_from, symbol, expand},
#include "kernels/kernels.inc"
  };
  return kernels;
}

const std::vector<RowwiseKernel>& list_rowwise_kernels() {
  static const std::vector<RowwiseKernel> kernels = {
#define KT_ROWWISE(symbol, isa) {isa, &symbol},
#include "kernels/kernels.inc"
  };
  return kernels;
}

Probes select_probes(DType weight_dtype, IsaSet isa) {
  struct ReadRow {
    IsaSet isa;
    ReadProbeFn read;
  };
  struct PeakRow {
    IsaSet isa;
    DType weight_dtype;
    int64_t operations;
    PeakProbeFn peak;
    const char* name;
  };
  static const std::vector<ReadRow> reads = {
#define KT_READ_PROBE(symbol, isa) {isa, symbol},
#include "kernels/kernels.inc"
  };
  static const std::vector<PeakRow> peaks = {
#define KT_PEAK_PROBE(symbol, isa, weight, operations) \
  {isa, DType::weight, operations, symbol, #symbol},
#include "kernels/kernels.inc"
  };
  // int4 codes are multiplied as bytes
  const DType multiplied = weight_dtype == DType::kInt4 ? DType::kInt8 : weight_dtype;
  const ReadRow* read = nullptr;
  for (const ReadRow& row : reads) {
    if (is_supported(row.isa, isa) && (read == nullptr || IsaRank(row.isa) > IsaRank(read->isa)))
      read = &row;
  }
  const PeakRow* peak = nullptr;
  for (const PeakRow& row : peaks) {
    if (row.weight_dtype != multiplied || !is_supported(row.isa, isa)) continue;
    if (peak == nullptr || IsaRank(row.isa) > IsaRank(peak->isa)) peak = &row;
  }
  KT_CHECK(read != nullptr && peak != nullptr,
           "kernels.inc has no probes for " << dtype_name(weight_dtype) << ".");
  return {read->read, peak->peak, peak->operations, peak->name};
}

KernelSet select_kernels(DType weight_dtype, IsaSet isa) {
  KernelSet set;
  const RowwiseKernel* rowwise = nullptr;
  for (const RowwiseKernel& kernel : list_rowwise_kernels()) {
    if (!is_supported(kernel.isa, isa)) continue;
    if (rowwise == nullptr || IsaRank(kernel.isa) > IsaRank(rowwise->isa)) rowwise = &kernel;
  }
  set.rowwise = rowwise->ops;

  std::vector<int> classes;
  for (const GemmKernel& kernel : list_gemm_kernels()) {
    if (kernel.weight_dtype == weight_dtype && is_supported(kernel.isa, isa)) {
      classes.push_back(kernel.m_from);
    }
  }
  std::sort(classes.begin(), classes.end());
  for (int m_from : classes) {
    const GemmKernel* best = best_gemm(weight_dtype, isa, m_from);
    if (set.gemms.empty() || set.gemms.back() != best) set.gemms.push_back(best);
  }
  KT_CHECK(!set.gemms.empty() && set.gemms.front()->m_from == 1,
           "no kernel multiplies " << dtype_name(weight_dtype)
                                   << " weights; use int8, int4 or bf16 weights.");
  set.a_dtype = set.gemms.front()->a_dtype;
  for (const GemmKernel* kernel : set.gemms) {
    KT_CHECK(kernel->a_dtype == set.a_dtype,
             "kernel "
                 << kernel->name << " reads " << dtype_name(kernel->a_dtype) << " activations but "
                 << set.gemms.front()->name << " reads " << dtype_name(set.a_dtype)
                 << "; give the rows of one feature set in kernels.inc the same activation dtype.");
  }
  return set;
}

std::string explain_kernels(DType weight_dtype, IsaSet isa) {
  const KernelSet set = select_kernels(weight_dtype, isa);
  std::ostringstream text;
  text << dtype_name(weight_dtype) << " on " << isa_tier(isa) << ":";
  for (const GemmKernel* kernel : set.gemms) {
    text << " m>=" << kernel->m_from << " " << kernel->name << ",";
  }
  text << " " << set.rowwise->name;
  return text.str();
}

}  // namespace kt
