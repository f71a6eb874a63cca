// Random MoE layers and batches for tests, the layer in double precision, and how far a layer may
// be from it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "base/cpu_features.h"
#include "base/dtype.h"
#include "moe/moe_layer.h"
#include "moe/moe_scratch.h"

namespace kt {

// A pool of unpinned threads spread over `nodes` groups, so that any split can be tried on any
// machine.
inline PoolPlan plan_of(const std::vector<int>& threads_by_node) {
  PoolPlan plan;
  for (size_t i = 0; i < threads_by_node.size(); ++i) {
    plan.nodes.push_back({static_cast<int>(i), false, std::vector<int>(threads_by_node[i], -1)});
  }
  return plan;
}

struct Weights {
  std::vector<std::vector<float>> gate, up, down;
  std::vector<std::vector<float>> gate_bias, up_bias, down_bias;  // empty: none
};

inline Weights random_weights(const MoeConfig& config, uint32_t seed) {
  std::mt19937 random(seed);
  // He-like scale keeps outputs near 1, so relative and absolute errors mean the same
  std::normal_distribution<float> normal(0.0f,
                                         1.0f / std::sqrt(static_cast<float>(config.hidden_size)));
  Weights weights;
  for (int e = 0; e < config.num_experts; ++e) {
    for (auto* list : {&weights.gate, &weights.up, &weights.down}) {
      std::vector<float> matrix(static_cast<size_t>(config.hidden_size) * config.intermediate_size);
      for (float& value : matrix) value = bf16_to_float(float_to_bf16(normal(random)));
      list->push_back(std::move(matrix));
    }
  }
  return weights;
}

// Of every second expert; the others have zeros.
inline void add_random_biases(const MoeConfig& config, Weights& weights) {
  std::mt19937 random(77);
  std::normal_distribution<float> normal;
  for (int e = 0; e < config.num_experts; ++e) {
    for (auto* list : {&weights.gate_bias, &weights.up_bias, &weights.down_bias}) {
      std::vector<float> bias(list == &weights.down_bias ? config.hidden_size
                                                         : config.intermediate_size);
      if (e % 2 == 0) std::generate(bias.begin(), bias.end(), [&] { return normal(random); });
      list->push_back(std::move(bias));
    }
  }
}

struct Batch {
  int num_tokens = 0;
  int top_k = 0;
  std::vector<float> hidden;
  std::vector<int64_t> ids;
  std::vector<float> weights;

  MoeInput input(std::vector<float>& output) const {
    MoeInput in;
    in.hidden_states = hidden.data();
    in.dtype = DType::kFloat32;
    in.topk_ids = ids.data();
    in.topk_weights = weights.data();
    in.num_tokens = num_tokens;
    in.top_k = top_k;
    in.output = output.data();
    return in;
  }
};

inline Batch random_batch(const MoeConfig& config, int num_tokens, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Batch batch{num_tokens, config.top_k, {}, {}, {}};
  batch.hidden.resize(static_cast<size_t>(num_tokens) * config.hidden_size);
  for (float& value : batch.hidden) value = normal(random);
  for (int i = 0; i < num_tokens * config.top_k; ++i) {
    batch.ids.push_back(static_cast<int64_t>(random() % (config.num_experts + 1)) - 1);
    batch.weights.push_back(static_cast<float>(random() % 1000) / 1000.0f);
  }
  return batch;
}

inline MoeConfig config_of(const std::string& layout, int hidden, int intermediate, int experts = 6,
                           int top_k = 3) {
  MoeConfig config;
  config.layer_idx = 7;
  config.num_experts = experts;
  config.top_k = top_k;
  config.hidden_size = hidden;
  config.intermediate_size = intermediate;
  config.set_layout(PackedLayout::parse(layout));
  for (int e = 0; e < experts; ++e) config.expert_ids.push_back(e);
  return config;
}

inline void load(MoeLayer& layer, const Weights& weights) {
  std::vector<ExpertStore::Source> sources;
  for (const int e : layer.config().expert_ids) {
    sources.push_back(
        {e, weights.gate[e].data(), weights.up[e].data(), weights.down[e].data(), DType::kFloat32});
  }
  layer.store().load(sources);
  std::vector<ExpertStore::Biases> biases;
  for (size_t e = 0; e < weights.gate_bias.size(); e += 2) {
    biases.push_back({static_cast<int>(e), weights.gate_bias[e].data(), weights.up_bias[e].data(),
                      weights.down_bias[e].data()});
  }
  layer.store().load_biases(biases);
}

inline std::vector<float> run(const MoeConfig& config, const Weights& weights, const Batch& batch,
                              IsaSet isa, const std::vector<int>& threads_by_node) {
  WorkerPool pool(plan_of(threads_by_node));
  MoeLayer layer(config, pool, make_moe_scratch(), isa);
  load(layer, weights);
  std::vector<float> output(batch.hidden.size(), -1.0f);
  layer.forward(batch.input(output));
  return output;
}

inline std::vector<double> exact_moe(const MoeConfig& config, const Weights& weights,
                                     const Batch& batch) {
  const int h = config.hidden_size;
  const int n = config.intermediate_size;
  std::vector<double> output(batch.hidden.size(), 0.0);
  for (int t = 0; t < batch.num_tokens; ++t) {
    for (int s = 0; s < batch.top_k; ++s) {
      const int64_t e = batch.ids[t * batch.top_k + s];
      if (e < 0) continue;
      std::vector<double> inner(n);
      for (int j = 0; j < n; ++j) {
        const bool biased = !weights.gate_bias.empty();
        double gate = biased ? weights.gate_bias[e][j] : 0;
        double up = biased ? weights.up_bias[e][j] : 0;
        for (int k = 0; k < h; ++k) {
          gate += double{weights.gate[e][j * h + k]} * batch.hidden[t * h + k];
          up += double{weights.up[e][j * h + k]} * batch.hidden[t * h + k];
        }
        if (config.activation.kind == ActivationKind::kSwigluAlpha) {
          const double limit = config.activation.limit;
          gate = std::min(gate, limit);
          up = std::clamp(up, -limit, limit);
          inner[j] = gate / (1 + std::exp(-gate * config.activation.alpha)) * (up + 1);
        } else {
          inner[j] = gate / (1 + std::exp(-gate)) * up;
        }
      }
      for (int j = 0; j < h; ++j) {
        double sum = weights.down_bias.empty() ? 0 : weights.down_bias[e][j];
        for (int k = 0; k < n; ++k) sum += weights.down[e][j * n + k] * inner[k];
        output[t * h + j] += batch.weights[t * batch.top_k + s] * sum;
      }
    }
  }
  return output;
}

inline double relative_error(const std::vector<float>& got, const std::vector<double>& wanted) {
  double error = 0;
  double signal = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    error += (got[i] - wanted[i]) * (got[i] - wanted[i]);
    signal += wanted[i] * wanted[i];
  }
  return std::sqrt(error / signal);
}

// Relative rms error of a layer. A symmetric code of c steps to each side of a row whose largest
// value is p sigma has an error of p / (c sqrt(12)) of the row. The errors of x, gate and up add in
// squares, and SiLU's slope and the product carry them on with a gain of about 1.3; then come the
// intermediate row and down.
//   bf16  2^-9 for each of two activation roundings, the weights are bf16 already: below 2^-8
//   int8  normal rows, p about 3.3: 0.75 % an operand, so 1.3 x 1.3 % + 1.1 % in squares: 2.0 %.
//         Without rotation the intermediate row, a product of two normals, has p about 6: 1.4 % for
//         that operand, 2.5 % in all; a tenth of the 80-value rows is larger by half: 3 %
//   int4  p about 2.1 in a group of 32 (c = 7.5): 8 % a matrix, so 1.3 x 11 % + 8 % in squares:
//         17 %; p about 2.6 in 128: 21 %; about 3.3 in a row: 26 %. One fifth more for batches of
//         one or two tokens.
inline double error_bound(const std::string& layout) {
  if (layout.starts_with("bf16")) return 1.0 / 256;
  if (layout.starts_with("int8")) return layout.find("_r") == std::string::npos ? 0.03 : 0.02;
  if (layout.starts_with("int4g32")) return 0.20;
  return layout.starts_with("int4g128") ? 0.25 : 0.31;
}

}  // namespace kt
