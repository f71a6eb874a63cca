#include "moe/tile_check.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>
#include <sstream>

#include "base/cpu_features.h"
#include "moe/forward_pass.h"

namespace kt {
namespace {

constexpr IsaSet kAmx = kIsaAmxInt8 | kIsaAmxBf16;

// More than one block of rows, so that both forms of a block run: 32 and up to 16.
constexpr int kFewestTokens = 40;

// Where bf16 is multiplied, every product is off by at most 2^-8 of itself (two roundings to bf16);
// what counts is that some intermediate values then round to another code of int8, or of bf16. Rows
// modelled with outliers of 10 and 39 times their mean came to 0.009 and 0.012 of the length,
// rotated ones to 0.006. A wrong tile is off by about 1.
constexpr double kLargestDifference = 1.0 / 32;

constexpr int kTimedRounds = 5;

// Activations of about unit variance from a generator of our own: the check must not depend on
// anything but the machine.
std::vector<float> activations(int64_t count) {
  std::vector<float> values(count);
  uint32_t state = 1;
  for (float& value : values) {
    float sum = 0;
    for (int i = 0; i < 4; ++i) {
      state = state * 1664525u + 1013904223u;
      sum += static_cast<float>(state >> 8) * 0x1p-24f;
    }
    value = (sum - 2.0f) * 1.7f;
  }
  return values;
}

// One expert's forward of the same rows by any kernels.
class ExpertRun {
 public:
  ExpertRun(const ExpertStore& store, WorkerPool& pool, MoeScratch& scratch, int expert)
      : store_(store), pool_(pool), scratch_(scratch), reads_(pool.num_threads()) {
    const int hidden_size = store.config().hidden_size;
    // so many that a pass shares their quantization, which is where rows are packed
    const int tokens =
        std::max(kFewestTokens, static_cast<int>(kRedundantValues) / hidden_size + 1);
    hidden_ = activations(int64_t{tokens} * hidden_size);
    output_.resize(hidden_.size());
    ids_.assign(tokens, expert);
    weights_.assign(tokens, 1.0f);
    input_.hidden_states = hidden_.data();
    input_.dtype = DType::kFloat32;
    input_.topk_ids = ids_.data();
    input_.id_dtype = DType::kInt32;
    input_.topk_weights = weights_.data();
    input_.num_tokens = tokens;
    input_.top_k = 1;
    input_.output = output_.data();
    route(ids_.data(), input_.id_dtype, weights_.data(), tokens, 1, store.config().num_experts,
          nullptr, routing_);
  }

  const std::vector<float>& output(const LayerKernels& kernels) {
    ForwardPass(store_, pool_, kernels, routing_, scratch_, input_, reads_).run();
    return output_;
  }

  double seconds(const LayerKernels& kernels) {
    const auto start = std::chrono::steady_clock::now();
    output(kernels);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

 private:
  const ExpertStore& store_;
  WorkerPool& pool_;
  MoeScratch& scratch_;
  std::vector<PanelReads> reads_;
  std::vector<float> hidden_, output_, weights_;
  std::vector<int32_t> ids_;
  Routing routing_;
  MoeInput input_;
};

double length_of(const std::vector<float>& values) {
  double squares = 0;
  for (const float value : values) squares += double{value} * value;
  return std::sqrt(squares);
}

// Whether a result can tell of kernels: not of an expert of zeros, nor where values overflow, or
// come near the subnormal ones, which tiles flush to zero.
bool tells(const std::vector<float>& result) {
  const double smallest = std::ldexp(std::sqrt(static_cast<double>(result.size())), -60);
  const double length = length_of(result);
  return std::isfinite(length) && length >= smallest;
}

// |a - b| / |b|, and 1 where a is not finite.
double relative_difference(const std::vector<float>& a, const std::vector<float>& b) {
  std::vector<float> apart(a.size());
  for (size_t i = 0; i < a.size(); ++i) apart[i] = a[i] - b[i];
  const double difference = length_of(apart) / length_of(b);
  return std::isfinite(difference) ? difference : 1;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

LayerKernels without(const MoeConfig& config, KernelRequest request, IsaSet features) {
  request.isa &= ~features;
  request.choice = GemmChoice::kNative;
  return select_layer_kernels(config, request);
}

// `others` with the kernels of `set` where `chosen` works in `tiles`.
LayerKernels only_at(const GemmKernel& tiles, const LayerKernels& chosen, const LayerKernels& set,
                     const LayerKernels& others) {
  LayerKernels kernels = others;
  for (int i = 0; i < 2; ++i) {
    if (chosen.sets[i].tile_gemm() == &tiles) kernels.sets[i] = set.sets[i];
  }
  return kernels;
}

// oneDNN's row in place of ours, or nothing where there is none or the choice is fixed.
std::optional<LayerKernels> onednn_set(const MoeConfig& config, const KernelRequest& request,
                                       const GemmKernel& tiles) {
  const bool fixed = cpu_features().forced || request.choice != GemmChoice::kAuto ||
                     (request.deterministic && tiles.rounds());
  const WeightFormat weights = config.layouts[0].format;
  if (fixed || !(config.layouts[0] == config.layouts[1])) return std::nullopt;
  for (const GemmKernel& kernel : list_gemm_kernels()) {
    if (kernel.source != GemmSource::kOneDnn || kernel.weights != weights ||
        (kernel.isa & ~request.isa) != 0)
      continue;
    LayerKernels kernels = select_layer_kernels(config, request);
    for (KernelSet& set : kernels.sets) set.gemms = {{&kernel, 1}};
    return kernels;
  }
  return std::nullopt;
}

}  // namespace

TileReport judge_tiles(const GemmKernel& tiles, double difference, const char* other,
                       double tile_seconds, double onednn_seconds) {
  const double allowed = tiles.rounds() ? kLargestDifference : 0;
  TileReport report;
  std::ostringstream text;
  text.precision(3);
  if (!(difference <= allowed)) {
    report.verdict = TileVerdict::kWrong;
    text << tiles.name
         << " is WRONG on this machine: its result for one expert differs from that of " << other
         << " by " << difference << " of its length, and " << allowed
         << " is allowed; it is not used, the kernels without AMX are. Please report this CPU "
            "(python -m kt_kernel.collect_env).";
  } else if (onednn_seconds > 0) {
    const bool slower = onednn_seconds < tile_seconds;
    report.verdict = slower ? TileVerdict::kSlower : TileVerdict::kRight;
    text << "One expert took " << 1e3 * tile_seconds << " ms with " << tiles.name << " and "
         << 1e3 * onednn_seconds << " ms with oneDNN's kernel, so "
         << (slower ? "oneDNN's is used; KT_GEMM=native" : "ours is used; KT_GEMM=onednn")
         << " fixes the other choice.";
  } else {
    text << tiles.name << " gave the right result for one expert.";
  }
  report.text = text.str();
  return report;
}

TileReport check_tiles(const ExpertStore& store, WorkerPool& pool, MoeScratch& scratch,
                       const KernelRequest& request, const GemmKernel& tiles, int expert) {
  const MoeConfig& config = store.config();
  const LayerKernels chosen = select_layer_kernels(config, request);
  const LayerKernels no_amx = without(config, request, kAmx);
  const LayerKernels set = only_at(tiles, chosen, chosen, no_amx);
  ExpertRun run(store, pool, scratch, expert);
  const std::vector<float> ours = run.output(set);
  const std::vector<float> scalar =
      run.output(only_at(tiles, chosen, without(config, request, ~IsaSet{0}), no_amx));
  if (!tells(scalar)) {
    TileReport nothing;
    nothing.verdict = TileVerdict::kUnchecked;
    return nothing;
  }
  double difference = relative_difference(ours, scalar);
  const char* other = "the scalar kernels";
  const double apart = relative_difference(ours, run.output(no_amx));
  if (apart > difference) {
    difference = apart;
    other = "the kernels without AMX";
  }
  const std::optional<LayerKernels> onednn = onednn_set(config, request, tiles);
  std::vector<double> tile_seconds, onednn_seconds;
  for (int round = 0; onednn.has_value() && round < kTimedRounds; ++round) {
    tile_seconds.push_back(run.seconds(set));
    onednn_seconds.push_back(run.seconds(*onednn));
  }
  if (onednn_seconds.empty()) return judge_tiles(tiles, difference, other, 0, 0);
  return judge_tiles(tiles, difference, other, median(tile_seconds), median(onednn_seconds));
}

}  // namespace kt
