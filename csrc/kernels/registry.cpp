#include "kernels/registry.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <sstream>
#include <string_view>

#include "base/check.h"
#include "kernels/tiles.h"

namespace kt {

#define KT_EXPAND(symbol, isa) \
  void symbol(const uint8_t* panel, int32_t k, int32_t group_size, uint8_t* scratch);
#define KT_PACK(symbol, isa) extern const RowPacking symbol;
#define KT_GEMM(symbol, isa, weight, activation, mr, m_from, expand) \
  void symbol(const GemmArgs& args);
#define KT_TILE_GEMM(symbol, isa, weight, activation, mr, m_from, expand, pack, groups) \
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
  {#symbol, isa, WeightFormat::weight, DType::activation, mr, m_from, symbol, expand},
#define KT_TILE_GEMM(symbol, isa, weight, activation, mr, m_from, expand, pack, groups) \
  {#symbol, isa,    WeightFormat::weight, DType::activation, mr,    m_from,             \
   symbol,  expand, GemmSource::kNative,  nullptr,           &pack, Groups::groups},
#define KT_GEMM_AS(name, symbol, isa, weight, activation, mr, m_from, expand) \
  {#name, isa, WeightFormat::weight, DType::activation, mr, m_from, symbol, expand},
#define KT_TILE_GEMM_AS(name, symbol, isa, weight, activation, mr, m_from, expand, pack, groups) \
  {#name,  isa,    WeightFormat::weight, DType::activation, mr,    m_from,                       \
   symbol, expand, GemmSource::kNative,  nullptr,           &pack, Groups::groups},
#include "kernels/kernels.inc"
  };
  return kernels;
}

// By position in the table, which only grows, while the program loads.
constexpr size_t kMaxKernels = 512;
std::array<std::atomic<TileVerdict>, kMaxKernels> tile_verdicts{};
std::atomic<uint64_t> verdict_count{0};

size_t position_of(const GemmKernel& kernel) {
  size_t position = 0;
  while (std::string_view(gemm_table()[position].name) != kernel.name) ++position;
  return position;
}

bool is_in_place(const GemmKernel& kernel) {
  const TileVerdict verdict = tile_verdict(kernel);
  return verdict != TileVerdict::kSlower && verdict != TileVerdict::kWrong;
}

// Whether a row may be chosen, but for what its check found.
bool fits(const GemmKernel& kernel, const KernelRequest& request) {
  return kernel.weights == request.weights && is_supported(kernel.isa, request.isa) &&
         kernel.m_from > 0 && kernel.fits_groups(request.group_size, request.row_scales) &&
         (kernel.source == GemmSource::kNative || request.choice != GemmChoice::kNative) &&
         !(request.deterministic && kernel.rounds() && kernel.m_from > 1);
}

bool is_in_question(const GemmKernel& kernel, const KernelRequest& request) {
  return fits(kernel, request) && is_in_place(kernel);
}

// The best supported row for experts of exactly m rows: most capable features, then the nearest
// m_from, then ours before another library's.
const GemmKernel* best_gemm(const KernelRequest& request, int m) {
  const GemmKernel* best = nullptr;
  for (const GemmKernel& kernel : gemm_table()) {
    if (!is_in_question(kernel, request) || kernel.m_from > m) continue;
    if (best == nullptr || IsaRank(kernel.isa) > IsaRank(best->isa) ||
        (kernel.isa == best->isa && kernel.m_from > best->m_from)) {
      best = &kernel;
    }
  }
  return best;
}

// Puts oneDNN's row where it was faster than ours in tiles, and drops what is for more rows.
void replace_slower_tiles(const KernelRequest& request, KernelSet& set) {
  if (request.choice != GemmChoice::kAuto) return;
  const GemmKernel* slower = nullptr;
  const GemmKernel* foreign = nullptr;
  for (const GemmKernel& kernel : gemm_table()) {
    if (kernel.weights != request.weights) continue;
    if (tile_verdict(kernel) == TileVerdict::kSlower && fits(kernel, request)) slower = &kernel;
    if (kernel.source == GemmSource::kOneDnn && is_supported(kernel.isa, request.isa))
      foreign = &kernel;
  }
  if (slower == nullptr || foreign == nullptr) return;
  while (set.gemms.back().m_from >= slower->m_from) set.gemms.pop_back();
  set.gemms.push_back({foreign, slower->m_from});
}

// Whether oneDNN has rows for such weights on some CPU.
bool onednn_has(WeightFormat weights) {
  return weights == WeightFormat::kInt8 || weights == WeightFormat::kBFloat16;
}

// oneDNN's row for these weights. They are the caller's wish, so a lack is an error.
const GemmKernel* onednn_gemm(WeightFormat weights, IsaSet isa) {
  const GemmKernel* found = nullptr;
  for (const GemmKernel& kernel : gemm_table()) {
    if (kernel.source == GemmSource::kOneDnn && kernel.weights == weights) found = &kernel;
  }
  KT_CHECK(found != nullptr,
           "KT_GEMM=\"onednn\" asks for oneDNN's kernel for "
               << format_name(weights)
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

bool GemmKernel::rounds() const {
  return takes_bf16_rows(weights) || (packing != nullptr && packing->value_bytes == 2);
}

bool GemmKernel::fits_groups(int group_size, bool row_scales) const {
  const bool wide = row_scales && (group_size == 0 || (group_size >= 128 && group_size % 64 == 0));
  return groups == Groups::kAny || (groups == Groups::kWide) == wide;
}

DType GemmKernel::multiplied() const { return rounds() ? DType::kBFloat16 : DType::kInt8; }

const GemmKernel& KernelSet::for_rows(int m) const {
  const GemmKernel* chosen = gemms.front().kernel;
  for (const ChosenGemm& gemm : gemms) {
    if (gemm.m_from <= m) chosen = gemm.kernel;
  }
  return *chosen;
}

const GemmKernel& KernelSet::for_plain_rows(int m) const {
  const GemmKernel* chosen = gemms.front().kernel;
  for (const ChosenGemm& gemm : gemms) {
    if (gemm.m_from <= m && gemm.kernel->packing == nullptr) chosen = gemm.kernel;
  }
  return *chosen;
}

const GemmKernel* KernelSet::tile_gemm() const {
  for (const ChosenGemm& gemm : gemms) {
    if (gemm.kernel->packing != nullptr) return gemm.kernel;
  }
  return nullptr;
}

int KernelSet::packed_value_bytes() const {
  const GemmKernel* const tiles = tile_gemm();
  return tiles == nullptr ? 0 : tiles->packing->value_bytes;
}

void set_tile_verdict(const GemmKernel& kernel, TileVerdict verdict) {
  // What was found wrong may be the kernel that rows share. What was found right or slower is this
  // row with its own expansion, and says nothing of others.
  const bool is_shared = verdict == TileVerdict::kWrong || verdict == TileVerdict::kUnchecked;
  for (const GemmKernel& row : gemm_table()) {
    if (row.gemm != kernel.gemm || row.packing == nullptr) continue;
    if (!is_shared && row.expand != kernel.expand) continue;
    tile_verdicts[position_of(row)].store(verdict, std::memory_order_relaxed);
  }
  verdict_count.fetch_add(1, std::memory_order_release);
}

TileVerdict tile_verdict(const GemmKernel& kernel) {
  if (kernel.packing == nullptr) return TileVerdict::kUnchecked;
  return tile_verdicts[position_of(kernel)].load(std::memory_order_relaxed);
}

uint64_t num_tile_verdicts() { return verdict_count.load(std::memory_order_acquire); }

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

bool deterministic_asked() {
  // An initializer that throws leaves the static unset, so that every call throws.
  static const bool asked = [] {
    const char* const value = std::getenv("KT_DETERMINISTIC");
    const std::string_view word(value == nullptr ? "" : value);
    KT_CHECK(word.empty() || word == "0" || word == "1",
             "KT_DETERMINISTIC=\"" << word << "\" is neither 0 nor 1; give one of them.");
    return word == "1";
  }();
  return asked;
}

void register_gemm(const GemmKernel& kernel) {
  for (const GemmKernel& known : gemm_table()) {
    KT_CHECK(std::string_view(known.name) != kernel.name,
             "kernel " << kernel.name << " is registered twice; give each row its own name.");
  }
  KT_CHECK(kernel.source != GemmSource::kNative,
           "kernel " << kernel.name << " has the source kNative; write it into kernels.inc.");
  KT_CHECK(kernel.weights != WeightFormat::kBFloat16 || kernel.m_from <= 1,
           "kernel " << kernel.name << " is for bf16 from " << kernel.m_from
                     << " rows on; a bf16 row serves every m (m_from 1) or none (0).");
  KT_CHECK(gemm_table().size() < kMaxKernels,
           "there are " << kMaxKernels << " kernels already; raise kMaxKernels.");
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

Probes select_probes(DType multiplied, IsaSet isa) {
  struct ReadRow {
    IsaSet isa;
    ReadProbeFn read;
  };
  struct PeakRow {
    IsaSet isa;
    DType multiplied;
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
  const ReadRow* read = nullptr;
  for (const ReadRow& row : reads) {
    if (is_supported(row.isa, isa) && (read == nullptr || IsaRank(row.isa) > IsaRank(read->isa)))
      read = &row;
  }
  const PeakRow* peak = nullptr;
  for (const PeakRow& row : peaks) {
    if (row.multiplied != multiplied || !is_supported(row.isa, isa)) continue;
    if (peak == nullptr || IsaRank(row.isa) > IsaRank(peak->isa)) peak = &row;
  }
  KT_CHECK(read != nullptr && peak != nullptr,
           "kernels.inc has no probes for " << dtype_name(multiplied) << ".");
  const bool tiles = (peak->isa & (kIsaAmxInt8 | kIsaAmxBf16)) != 0;
  return {read->read, peak->peak, peak->operations, peak->name, tiles};
}

uint64_t Probes::run_peak(int64_t iterations) const {
  if (tiles) require_tiles();
  const uint64_t sums = peak(iterations);
  release_tiles();
  return sums;
}

KernelSet select_kernels(const KernelRequest& request) {
  const WeightFormat weights = request.weights;
  KernelSet set;
  const RowwiseKernel* rowwise = nullptr;
  for (const RowwiseKernel& kernel : list_rowwise_kernels()) {
    if (!is_supported(kernel.isa, request.isa)) continue;
    if (rowwise == nullptr || IsaRank(kernel.isa) > IsaRank(rowwise->isa)) rowwise = &kernel;
  }
  set.rowwise = rowwise->ops;

  if (request.choice == GemmChoice::kOneDnn && onednn_has(weights)) {
    const GemmKernel* const kernel = onednn_gemm(weights, request.isa);
    set.a_dtype = kernel->a_dtype;
    set.gemms.push_back({kernel, 1});
    return set;
  }
  std::vector<int> classes;
  for (const GemmKernel& kernel : gemm_table()) {
    if (is_in_question(kernel, request)) classes.push_back(kernel.m_from);
  }
  std::sort(classes.begin(), classes.end());
  for (const int m_from : classes) {
    const GemmKernel* best = best_gemm(request, m_from);
    if (set.gemms.empty() || set.gemms.back().kernel != best)
      set.gemms.push_back({best, best->m_from});
  }
  KT_CHECK(!set.gemms.empty() && set.gemms.front().m_from == 1,
           "no kernel multiplies "
               << format_name(weights)
               << " weights here; kernels.inc lists the formats that have kernels.");
  replace_slower_tiles(request, set);
  set.a_dtype = set.gemms.front().kernel->a_dtype;
  for (const auto& [kernel, m_from] : set.gemms) {
    KT_CHECK(kernel->a_dtype == set.a_dtype,
             "kernel " << kernel->name << " reads " << dtype_name(kernel->a_dtype)
                       << " activations but " << set.gemms.front().kernel->name << " reads "
                       << dtype_name(set.a_dtype)
                       << "; give the rows of one feature set in kernels.inc the same activation "
                          "dtype.");
  }
  return set;
}

std::string explain_kernels(const KernelRequest& request) {
  const KernelSet set = select_kernels(request);
  std::ostringstream text;
  text << format_name(request.weights) << " on " << isa_tier(request.isa) << ":";
  for (const auto& [kernel, m_from] : set.gemms)
    text << " m>=" << m_from << " " << kernel->name << ",";
  text << " " << set.rowwise->name;
  return text.str();
}

}  // namespace kt
