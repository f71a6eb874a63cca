#include "moe/moe_layer.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "base/check.h"
#include "moe/forward_pass.h"

namespace kt {
namespace {

// Tokens and rows (tokens x top_k) of one pass. They bound the scratch (rows x intermediate_size x
// 4 bytes: 268 MB for DeepSeek-V3) while every expert still sees the 100-200 rows from which
// weights are read once for free.
constexpr int kMaxPassTokens = 4096;
constexpr int kMaxPassRows = 32768;

int64_t bytes_of(DType dtype) { return dtype_bits(dtype) / 8; }

}  // namespace

struct MoeLayer::Counters {
  std::atomic<uint64_t> forwards{0};
  std::atomic<uint64_t> tokens{0};
  std::atomic<uint64_t> rows{0};
  std::atomic<uint64_t> weight_bytes{0};
  std::atomic<uint64_t> busy_ns{0};
};

MoeLayer::MoeLayer(const MoeConfig& config, WorkerPool& pool, std::shared_ptr<MoeScratch> scratch,
                   IsaSet isa)
    : store_(config, pool),
      pool_(pool),
      scratch_(std::move(scratch)),
      isa_(isa),
      kernels_(select_kernels(config.layout.code, isa)),
      counters_(std::make_unique<Counters>()) {}

MoeLayer::~MoeLayer() = default;

void MoeLayer::check_routed_experts() const {
  for (const int expert : routing_.experts) {
    KT_CHECK(store_.has(expert),
             "layer " << config().layer_idx << ": a token was routed to expert " << expert
                      << ", which is not on the CPU and not marked in gpu_experts_mask.");
    KT_CHECK(store_.loaded(expert),
             "layer " << config().layer_idx << ": a token was routed to expert " << expert
                      << ", whose weights were never loaded; call load_weights first.");
  }
}

void MoeLayer::forward(const MoeInput& input) {
  const auto start = std::chrono::steady_clock::now();
  const int hidden_size = config().hidden_size;
  uint64_t weight_bytes = 0;
  uint64_t rows = 0;
  const int pass_tokens = std::clamp(kMaxPassRows / std::max(input.top_k, 1), 1, kMaxPassTokens);
  for (int first = 0; first < input.num_tokens; first += pass_tokens) {
    MoeInput pass = input;
    pass.num_tokens = std::min(pass_tokens, input.num_tokens - first);
    const int64_t skipped_ids = int64_t{first} * input.top_k;
    const int64_t skipped_bytes = int64_t{first} * hidden_size * bytes_of(input.dtype);
    pass.hidden_states = static_cast<const uint8_t*>(input.hidden_states) + skipped_bytes;
    pass.topk_ids =
        static_cast<const uint8_t*>(input.topk_ids) + skipped_ids * bytes_of(input.id_dtype);
    pass.topk_weights = input.topk_weights + skipped_ids;
    pass.output = static_cast<uint8_t*>(input.output) + skipped_bytes;
    try {
      route(pass.topk_ids, pass.id_dtype, pass.topk_weights, pass.num_tokens, pass.top_k,
            config().num_experts, pass.skip, routing_);
    } catch (const Error& error) {
      KT_CHECK(false, "layer " << config().layer_idx << ": " << error.what());
    }
    check_routed_experts();
    if (routing_.num_rows() == 0) {
      std::memset(pass.output, 0, int64_t{pass.num_tokens} * hidden_size * bytes_of(input.dtype));
      continue;
    }
    ForwardPass(store_, pool_, kernels_, routing_, *scratch_, pass).run();
    rows += routing_.num_rows();
    for (const Projection projection : {Projection::kW13, Projection::kW2}) {
      weight_bytes +=
          routing_.experts.size() * store_.num_panels(projection) * store_.panel_bytes(projection);
    }
  }
  const auto elapsed = std::chrono::steady_clock::now() - start;
  counters_->forwards.fetch_add(1, std::memory_order_relaxed);
  counters_->tokens.fetch_add(input.num_tokens, std::memory_order_relaxed);
  counters_->rows.fetch_add(rows, std::memory_order_relaxed);
  counters_->weight_bytes.fetch_add(weight_bytes, std::memory_order_relaxed);
  counters_->busy_ns.fetch_add(
      std::chrono::duration_cast<std::chrono::nanoseconds>(elapsed).count(),
      std::memory_order_relaxed);
}

MoeCounters MoeLayer::counters() const {
  MoeCounters copy;
  copy.forwards = counters_->forwards.load(std::memory_order_relaxed);
  copy.tokens = counters_->tokens.load(std::memory_order_relaxed);
  copy.rows = counters_->rows.load(std::memory_order_relaxed);
  copy.weight_bytes = counters_->weight_bytes.load(std::memory_order_relaxed);
  copy.busy_ns = counters_->busy_ns.load(std::memory_order_relaxed);
  return copy;
}

std::string MoeLayer::explain() const { return explain_kernels(config().layout.code, isa_); }

std::shared_ptr<MoeScratch> make_moe_scratch() { return std::make_shared<MoeScratch>(); }

}  // namespace kt
