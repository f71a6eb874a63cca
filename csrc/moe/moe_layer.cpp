#include "moe/moe_layer.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "base/check.h"
#include "moe/forward_pass.h"

namespace kt {
namespace {

// Tokens and rows (tokens x top_k) of one pass. They bound the scratch (rows x intermediate_size x
// 4 bytes: 268 MB for DeepSeek-V3; in tiles rows x (hidden_size + intermediate_size) x 1 or 2 bytes
// besides, up to 600 MB) while every expert still sees the 100-200 rows from which AVX-512 reads
// weights once for free. AMX would take 300 (docs/performance.md).
constexpr int kMaxPassTokens = 4096;
constexpr int kMaxPassRows = 32768;

int64_t bytes_of(DType dtype) { return dtype_bits(dtype) / 8; }

KernelRequest request_of(IsaSet isa) {
  KernelRequest request;
  request.isa = isa;
  return request;
}

}  // namespace

// Written by the one thread that computes, so a plain load and store add without a locked
// instruction.
struct MoeLayer::Counters {
  Counters(int num_experts, int num_threads) : reads(num_threads), expert_counts(num_experts) {}

  template <typename Value>
  static void add(std::atomic<Value>& counter, Value value) {
    counter.store(counter.load(std::memory_order_relaxed) + value, std::memory_order_relaxed);
  }

  std::atomic<uint64_t> forwards{0};
  std::atomic<uint64_t> tokens{0};
  std::atomic<uint64_t> rows{0};
  std::atomic<uint64_t> weight_bytes{0};
  std::vector<PanelReads> reads;  // by worker
  std::atomic<uint64_t> barriers{0};
  std::atomic<uint64_t> busy_ns{0};
  std::atomic<uint64_t> deferred_rows{0};
  std::atomic<uint64_t> dropped_shares{0};
  std::vector<std::atomic<int64_t>> expert_counts;
};

MoeLayer::MoeLayer(const MoeConfig& config, WorkerPool& pool, std::shared_ptr<MoeScratch> scratch,
                   IsaSet isa)
    : isa_(isa),
      verdicts_(num_tile_verdicts()),
      kernels_(select_layer_kernels(config, request_of(isa))),
      store_(config, pool),
      pool_(pool),
      scratch_(std::move(scratch)),
      counters_(std::make_unique<Counters>(config.num_experts, pool.num_threads())) {}

MoeLayer::~MoeLayer() = default;

bool MoeLayer::compiles_kernels() const {
  const auto compiles = [](const ChosenGemm& gemm) { return gemm.kernel->prepare != nullptr; };
  return std::any_of(std::begin(kernels_.sets), std::end(kernels_.sets), [&](const KernelSet& set) {
    return std::any_of(set.gemms.begin(), set.gemms.end(), compiles);
  });
}

void MoeLayer::prepare_kernels() {
  const auto prepare = [this](const Worker&) {
    for (const Projection projection : {Projection::kW13, Projection::kW2}) {
      for (const auto& [kernel, m_from] : kernels_.of(projection).gemms) {
        if (kernel->prepare == nullptr) continue;
        kernel->prepare(static_cast<int32_t>(store_.padded_k(projection)));
      }
    }
  };
  pool_.run({prepare});
}

DType MoeLayer::multiplied(Projection projection) const {
  return kernels_.of(projection).gemms.back().kernel->multiplied();
}

void MoeLayer::select_again() {
  verdicts_ = num_tile_verdicts();
  kernels_ = select_layer_kernels(config(), request_of(isa_));
  if (compiles_kernels()) prepare_kernels();
}

TileReport MoeLayer::check_tiles() {
  const std::vector<int>& here = config().expert_ids;
  const auto loaded =
      std::find_if(here.begin(), here.end(), [this](int expert) { return store_.loaded(expert); });
  if (loaded == here.end()) return {};
  TileReport all;
  for (const GemmKernel* const tiles : kernels_.tile_gemms()) {
    if (tile_verdict(*tiles) != TileVerdict::kUnchecked) continue;
    const TileReport report =
        kt::check_tiles(store_, pool_, *scratch_, request_of(isa_), *tiles, *loaded);
    if (report.verdict == TileVerdict::kUnchecked) continue;
    set_tile_verdict(*tiles, report.verdict);
    all.verdict = std::max(all.verdict, report.verdict);
    all.text.append(all.text.empty() ? "" : " ").append(report.text);
  }
  if (!all.text.empty()) select_again();
  return all;
}

void MoeLayer::check_expert(int expert) const {
  KT_CHECK(store_.has(expert),
           "layer " << config().layer_idx << ": a token was routed to expert " << expert
                    << ", which is not on the CPU and not marked in gpu_experts_mask.");
  KT_CHECK(store_.loaded(expert),
           "layer " << config().layer_idx << ": a token was routed to expert " << expert
                    << ", whose weights were never loaded; call load_weights first.");
}

void MoeLayer::forward(const MoeInput& input) {
  compute(input);
  Counters::add<uint64_t>(counters_->forwards, 1);
  Counters::add<uint64_t>(counters_->tokens, input.num_tokens);
  count_ids(input);
}

void MoeLayer::forward_deferred(const MoeInput& input) {
  Counters::add(counters_->deferred_rows, compute(input));
}

// Cuts a batch into passes; returns the rows computed.
uint64_t MoeLayer::compute(const MoeInput& input) {
  const auto start = std::chrono::steady_clock::now();
  const int hidden_size = config().hidden_size;
  const uint64_t barriers = pool_.num_barriers();
  uint64_t weight_bytes = 0;
  uint64_t rows = 0;
  const int pass_tokens = std::clamp(kMaxPassRows / std::max(input.top_k, 1), 1, kMaxPassTokens);
  for (int first = 0; first < input.num_tokens; first += pass_tokens) {
    MoeInput pass = input;
    pass.num_tokens = std::min(pass_tokens, input.num_tokens - first);
    const int64_t skipped_ids = int64_t{first} * input.top_k;
    const int64_t skipped_values = int64_t{first} * hidden_size;
    const int64_t skipped_bytes = skipped_values * bytes_of(input.dtype);
    pass.hidden_states = static_cast<const uint8_t*>(input.hidden_states) + skipped_bytes;
    pass.topk_ids =
        static_cast<const uint8_t*>(input.topk_ids) + skipped_ids * bytes_of(input.id_dtype);
    pass.topk_weights = input.topk_weights + skipped_ids;
    if (input.addend != nullptr) pass.addend = input.addend + skipped_values;
    if (input.fp32_output != nullptr) {
      pass.fp32_output = input.fp32_output + skipped_values;
    } else {
      pass.output = static_cast<uint8_t*>(input.output) + skipped_bytes;
    }
    rows += compute_pass(pass, weight_bytes);
  }
  const auto elapsed = std::chrono::steady_clock::now() - start;
  Counters::add(counters_->rows, rows);
  Counters::add(counters_->weight_bytes, weight_bytes);
  Counters::add<uint64_t>(counters_->barriers, pool_.num_barriers() - barriers);
  Counters::add<uint64_t>(counters_->busy_ns,
                          std::chrono::duration_cast<std::chrono::nanoseconds>(elapsed).count());
  return rows;
}

uint64_t MoeLayer::compute_pass(const MoeInput& pass, uint64_t& weight_bytes) {
  try {
    route(pass.topk_ids, pass.id_dtype, pass.topk_weights, pass.num_tokens, pass.top_k,
          config().num_experts, pass.skip, routing_);
  } catch (const Error& error) {
    KT_CHECK(false, "layer " << config().layer_idx << ": " << error.what());
  }
  for (const int expert : routing_.experts) check_expert(expert);
  if (verdicts_ != num_tile_verdicts()) select_again();
  if (routing_.num_rows() == 0) {
    store_addend(kernels_.rowwise(), pass, config().hidden_size);
    return 0;
  }
  ForwardPass(store_, pool_, kernels_, routing_, *scratch_, pass, counters_->reads).run();
  for (const Projection projection : {Projection::kW13, Projection::kW2}) {
    weight_bytes +=
        routing_.experts.size() * store_.num_panels(projection) * store_.panel_bytes(projection);
  }
  return routing_.num_rows();
}

// After the computation, which has checked the ids: what is refused is not counted.
void MoeLayer::count_ids(const MoeInput& input) {
  const int64_t num_ids = int64_t{input.num_tokens} * input.top_k;
  for (int64_t i = 0; i < num_ids; ++i) {
    const int64_t id = input.id_dtype == DType::kInt64
                           ? static_cast<const int64_t*>(input.topk_ids)[i]
                           : static_cast<const int32_t*>(input.topk_ids)[i];
    if (id >= 0) Counters::add<int64_t>(counters_->expert_counts[id], 1);
  }
}

void MoeLayer::count_dropped_share() { Counters::add<uint64_t>(counters_->dropped_shares, 1); }

MoeCounters MoeLayer::counters() const {
  MoeCounters copy;
  copy.forwards = counters_->forwards.load(std::memory_order_relaxed);
  copy.tokens = counters_->tokens.load(std::memory_order_relaxed);
  copy.rows = counters_->rows.load(std::memory_order_relaxed);
  copy.weight_bytes = counters_->weight_bytes.load(std::memory_order_relaxed);
  for (const PanelReads& reads : counters_->reads) {
    for (const Projection projection : {Projection::kW13, Projection::kW2}) {
      copy.read_bytes +=
          reads.panels[static_cast<int>(projection)].load(std::memory_order_relaxed) *
          store_.panel_bytes(projection);
    }
  }
  copy.barriers = counters_->barriers.load(std::memory_order_relaxed);
  copy.busy_ns = counters_->busy_ns.load(std::memory_order_relaxed);
  copy.deferred_rows = counters_->deferred_rows.load(std::memory_order_relaxed);
  copy.dropped_shares = counters_->dropped_shares.load(std::memory_order_relaxed);
  copy.expert_counts.assign(counters_->expert_counts.begin(), counters_->expert_counts.end());
  return copy;
}

std::string MoeLayer::explain() const { return explain_layer_kernels(config(), isa_); }

std::shared_ptr<MoeScratch> make_moe_scratch() { return std::make_shared<MoeScratch>(); }

}  // namespace kt
