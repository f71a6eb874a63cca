#include "kernels/registry.h"

#include <algorithm>
#include <cstdlib>
#include <sstream>
#include <string_view>

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

std::deque<GemmKernel>& gemm_table() {
  static std::deque<GemmKernel> kernels = {
#define KT_GEMM(symbol, isa, weight, activation, mr, m_from, expand) \
  {#symbol, isa, DType::weight, DType::activation, mr, m_from, symbol, expand},
#include "kernels/kernels.inc"
  };
  return kernels;
}

bool is_in_question(const GemmKernel& kernel, DType weight_dtype, IsaSet isa, GemmChoice choice) {
  return kernel.weight_dtype == weight_dtype && is_supported(kernel.isa, isa) &&
         kernel.m_from > 0 &&
         (kernel.source == GemmSource::kNative || choice != GemmChoice::kNative);
}

// The best supported row for experts of exactly m rows: most capable features, then the nearest
// m_from, then ours before another library's.
const GemmKernel* best_gemm(DType weight_dtype, IsaSet isa, GemmChoice choice, int m) {
  const GemmKernel* best = nullptr;
  for (const GemmKernel& kernel : gemm_table()) {
    if (!is_in_question(kernel, weight_dtype, isa, choice) || kernel.m_from > m) continue;
    if (best == nullptr || IsaRank(kernel.isa) > IsaRank(best->isa) ||
        (kernel.isa == best->isa && kernel.m_from > best->m_from)) {
      best = &kernel;
    }
  }
  return best;
}

// oneDNN's row for these weights. They are the caller's wish, so a lack is an error.
const GemmKernel* onednn_gemm(DType weight_dtype, IsaSet isa) {
  const GemmKernel* found = nullptr;
  for (const GemmKernel& kernel : gemm_table()) {
    if (kernel.source == GemmSource::kOneDnn && kernel.weight_dtype == weight_dtype)
      found = &kernel;
  }
  KT_CHECK(found != nullptr,
           "KT_GEMM=\"onednn\" asks for oneDNN's kernel for "
               << dtype_name(weight_dtype)
               << " weights, but this torch offers none on this CPU: it takes avx512vnni for int8, "
                  "avx512bf16 for bf16, and no ONEDNN_MAX_CPU_ISA below them; give native or auto, "
                  "or unset it.");
  KT_CHECK(is_supported(found->isa, isa),
           "KT_GEMM=\"onednn\" asks for " << found->name << ", which needs " << isa_name(found->isa)
                                          << ", but in use are: " << isa_name(isa)
                                          << "; give native or auto, or unset it.");
  return found;
}

}  // namespace

const GemmKernel& KernelSet::for_rows(int m) const {
  const GemmKernel* chosen = gemms.front();
  for (const GemmKernel* kernel : gemms) {
    if (kernel->m_from <= m) chosen = kernel;
  }
  return *chosen;
}

GemmChoice parse_gemm_choice(const char* value) {
  const std::string_view word(value == nullptr ? "" : value);
  if (word.empty() || word == "auto") return GemmChoice::kAuto;
  if (word == "native") return GemmChoice::kNative;
  KT_CHECK(word == "onednn",
           "KT_GEMM=\"" << word << "\" is no choice of kernels; give auto, native or onednn.");
  return GemmChoice::kOneDnn;
}

GemmChoice gemm_choice() {
  // An initializer that throws leaves the static unset, so that every call throws.
  static const GemmChoice choice = parse_gemm_choice(std::getenv("KT_GEMM"));
  return choice;
}

void register_gemm(const GemmKernel& kernel) {
  for (const GemmKernel& known : gemm_table()) {
    KT_CHECK(std::string_view(known.name) != kernel.name,
             "kernel " << kernel.name << " is registered twice; give each row its own name.");
  }
  KT_CHECK(kernel.source != GemmSource::kNative,
           "kernel " << kernel.name << " has the source kNative; write it into kernels.inc.");
  KT_CHECK(kernel.weight_dtype != DType::kBFloat16 || kernel.m_from <= 1,
           "kernel " << kernel.name << " is for bf16 from " << kernel.m_from
                     << " rows on; a bf16 row serves every m (m_from 1) or none (0).");
  gemm_table().push_back(kernel);
}

const std::deque<GemmKernel>& list_gemm_kernels() { return gemm_table(); }

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

KernelSet select_kernels(DType weight_dtype, IsaSet isa, GemmChoice choice) {
  KernelSet set;
  const RowwiseKernel* rowwise = nullptr;
  for (const RowwiseKernel& kernel : list_rowwise_kernels()) {
    if (!is_supported(kernel.isa, isa)) continue;
    if (rowwise == nullptr || IsaRank(kernel.isa) > IsaRank(rowwise->isa)) rowwise = &kernel;
  }
  set.rowwise = rowwise->ops;

  if (choice == GemmChoice::kOneDnn && weight_dtype != DType::kInt4) {
    const GemmKernel* const kernel = onednn_gemm(weight_dtype, isa);
    set.a_dtype = kernel->a_dtype;
    set.gemms.push_back(kernel);
    return set;
  }
  std::vector<int> classes;
  for (const GemmKernel& kernel : gemm_table()) {
    if (is_in_question(kernel, weight_dtype, isa, choice)) classes.push_back(kernel.m_from);
  }
  std::sort(classes.begin(), classes.end());
  for (int m_from : classes) {
    const GemmKernel* best = best_gemm(weight_dtype, isa, choice, m_from);
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

std::string explain_kernels(DType weight_dtype, IsaSet isa, GemmChoice choice) {
  const KernelSet set = select_kernels(weight_dtype, isa, choice);
  std::ostringstream text;
  text << dtype_name(weight_dtype) << " on " << isa_tier(isa) << ":";
  for (const GemmKernel* kernel : set.gemms) {
    text << " m>=" << (kernel == set.gemms.front() ? 1 : kernel->m_from) << " " << kernel->name
         << ",";
  }
  text << " " << set.rowwise->name;
  return text.str();
}

}  // namespace kt
