// torch.ops.kt_kernel, the operators on layers: forward, submit and sync, load and export.
#include <torch/library.h>

#include <any>

#include "engine/engine.h"
#include "torch/forward_checks.h"
#include "torch/tensor_checks.h"

namespace kt {
namespace {

// The tensors of one forward, in the form the layer reads. Holds them alive.
struct ForwardTensors {
  at::Tensor hidden_states;  // [num_tokens, hidden_size], contiguous
  at::Tensor topk_ids;       // [num_tokens, top_k] int32 or int64, contiguous
  at::Tensor topk_weights;   // [num_tokens, top_k] fp32, contiguous
  at::Tensor skip;           // [num_experts] bool, or undefined
  at::Tensor output;
  DType dtype;

  MoeInput input() const {
    MoeInput in;
    in.hidden_states = hidden_states.const_data_ptr();
    in.dtype = dtype;
    in.topk_ids = topk_ids.const_data_ptr();
    in.id_dtype = topk_ids.scalar_type() == at::kInt ? DType::kInt32 : DType::kInt64;
    in.topk_weights = topk_weights.const_data_ptr<float>();
    in.num_tokens = static_cast<int>(hidden_states.size(0));
    in.top_k = static_cast<int>(topk_ids.size(1));
    in.skip =
        skip.defined() ? reinterpret_cast<const uint8_t*>(skip.const_data_ptr<bool>()) : nullptr;
    in.output = output.mutable_data_ptr();
    return in;
  }
};

// `own`: copy what would otherwise alias the caller's tensors (the caller may change them after
// submit).
ForwardTensors check_forward(const at::Tensor& hidden_states, const at::Tensor& topk_ids,
                             const at::Tensor& topk_weights, const std::optional<at::Tensor>& skip,
                             const MoeConfig& config, bool own) {
  check_cpu(hidden_states, "hidden_states");
  check_cpu(topk_ids, "topk_ids");
  check_cpu(topk_weights, "topk_weights");
  ForwardTensors tensors;
  tensors.dtype = check_forward_arguments(hidden_states, topk_ids, topk_weights, skip, config);

  const auto taken = [own](const at::Tensor& tensor, at::ScalarType dtype) {
    return tensor.to(dtype, /*non_blocking=*/false, /*copy=*/own).contiguous();
  };
  tensors.hidden_states = taken(hidden_states, hidden_states.scalar_type());
  tensors.topk_ids = taken(topk_ids, topk_ids.scalar_type() == at::kInt ? at::kInt : at::kLong);
  tensors.topk_weights = taken(topk_weights, at::kFloat);
  if (skip.has_value()) tensors.skip = taken(*skip, at::kBool);
  tensors.output = at::empty(hidden_states.sizes(),
                             hidden_states.options().memory_format(at::MemoryFormat::Contiguous));
  return tensors;
}

at::Tensor moe_forward(const at::Tensor& hidden_states, const at::Tensor& topk_ids,
                       const at::Tensor& topk_weights, const std::optional<at::Tensor>& skip,
                       int64_t layer) {
  const std::shared_ptr<EngineLayer> target = find_layer(layer);
  const ForwardTensors tensors = check_forward(hidden_states, topk_ids, topk_weights, skip,
                                               target->layer.config(), /*own=*/false);
  target->engine->run([&] {
    target->run(tensors.input());
    target->run_deferred(tensors.input());
  });
  return tensors.output;
}

at::Tensor submit(const at::Tensor& hidden_states, const at::Tensor& topk_ids,
                  const at::Tensor& topk_weights, const std::optional<at::Tensor>& skip,
                  int64_t layer) {
  std::shared_ptr<EngineLayer> target = find_layer(layer);
  ForwardTensors tensors = check_forward(hidden_states, topk_ids, topk_weights, skip,
                                         target->layer.config(), /*own=*/true);
  const MoeInput input = tensors.input();
  // The jobs keep the inputs only: the output becomes a Python object, which a thread of the pool
  // must not be the last to let go. The pending entry has it, and the layer.
  const at::Tensor output = std::move(tensors.output);
  const uint64_t stream_ticket =
      target->submit(input, std::make_shared<const ForwardTensors>(std::move(tensors)));
  const int64_t ticket = add_pending({std::move(target), stream_ticket, output});
  return at::scalar_tensor(ticket, at::kLong).reshape({1});
}

at::Tensor sync(const at::Tensor& ticket, const at::Tensor& hidden_states) {
  KT_CHECK(ticket.numel() == 1 && ticket.scalar_type() == at::kLong,
           "ticket must be the tensor that submit returned.");
  const PendingForward pending = take_pending(ticket.item<int64_t>());
  pending.layer->engine->stream().wait(pending.stream_ticket);
  const at::Tensor output = std::any_cast<at::Tensor>(pending.output);
  KT_CHECK(output.sizes() == hidden_states.sizes(),
           "sync was given hidden_states of shape " << hidden_states.sizes() << ", but submit had "
                                                    << output.sizes() << ".");
  return output;
}

std::vector<int> expert_list(at::IntArrayRef experts, at::TensorList first, at::TensorList second) {
  KT_CHECK(experts.size() == first.size() && experts.size() == second.size(),
           "got " << experts.size() << " experts, but " << first.size() << " and " << second.size()
                  << " tensors.");
  std::vector<int> ids;
  for (const int64_t expert : experts) ids.push_back(expert_id(expert));
  return ids;
}

void load_experts(int64_t layer, at::IntArrayRef experts, at::TensorList gate, at::TensorList up,
                  at::TensorList down) {
  const std::shared_ptr<EngineLayer> target = find_layer(layer);
  const MoeConfig& config = target->layer.config();
  const std::vector<int> ids = expert_list(experts, gate, up);
  expert_list(experts, gate, down);
  std::vector<at::Tensor> alive;
  std::vector<ExpertStore::Source> sources;
  for (size_t i = 0; i < ids.size(); ++i) {
    const DType dtype = float_dtype(gate[i], "gate");
    const auto take = [&](const at::Tensor& tensor, const char* name, int rows, int columns) {
      check_cpu(tensor, name);
      check_shape(tensor, {rows, columns}, name);
      KT_CHECK(float_dtype(tensor, name) == dtype,
               "gate, up and down of expert " << ids[i] << " differ in dtype.");
      alive.push_back(tensor.contiguous());
      return alive.back().const_data_ptr();
    };
    const void* gate_data = take(gate[i], "gate", config.intermediate_size, config.hidden_size);
    const void* up_data = take(up[i], "up", config.intermediate_size, config.hidden_size);
    const void* down_data = take(down[i], "down", config.hidden_size, config.intermediate_size);
    sources.push_back({ids[i], gate_data, up_data, down_data, dtype});
  }
  target->engine->run([&] { target->layer.store().load(sources); });
}

const uint8_t* packed_data(const at::Tensor& packed, int64_t bytes, const char* name) {
  check_cpu(packed, name);
  KT_CHECK(packed.scalar_type() == at::kByte && packed.is_contiguous() && packed.numel() == bytes,
           name << " is " << packed.numel() << " elements of "
                << c10::toString(packed.scalar_type()) << "; it must be " << bytes
                << " contiguous bytes (uint8).");
  return packed.const_data_ptr<uint8_t>();
}

void load_bias(int64_t layer, at::IntArrayRef experts, at::TensorList gate, at::TensorList up,
               at::TensorList down) {
  const std::shared_ptr<EngineLayer> target = find_layer(layer);
  const MoeConfig& config = target->layer.config();
  const std::vector<int> ids = expert_list(experts, gate, up);
  expert_list(experts, gate, down);
  std::vector<at::Tensor> alive;
  std::vector<ExpertStore::Biases> sources;
  for (size_t i = 0; i < ids.size(); ++i) {
    const auto take = [&](const at::Tensor& tensor, const char* name, int size) {
      check_cpu(tensor, name);
      check_shape(tensor, {size}, name);
      float_dtype(tensor, name);
      alive.push_back(tensor.to(at::kFloat).contiguous());
      KT_CHECK(at::isfinite(alive.back()).all().item<bool>(),
               "layer " << config.layer_idx << ", expert " << ids[i] << ": " << name
                        << " holds NaN or infinity; repair the checkpoint.");
      return alive.back().const_data_ptr<float>();
    };
    const float* gate_data = take(gate[i], "gate_bias", config.intermediate_size);
    const float* up_data = take(up[i], "up_bias", config.intermediate_size);
    sources.push_back({ids[i], gate_data, up_data, take(down[i], "down_bias", config.hidden_size)});
  }
  target->engine->run([&] { target->layer.store().load_biases(sources); });
}

void load_packed(int64_t layer, at::IntArrayRef experts, at::TensorList w13, at::TensorList w2) {
  const std::shared_ptr<EngineLayer> target = find_layer(layer);
  const ExpertStore& store = target->layer.store();
  const std::vector<int> ids = expert_list(experts, w13, w2);
  std::vector<ExpertStore::Packed> sources;
  for (size_t i = 0; i < ids.size(); ++i) {
    const auto bytes = [&](Projection projection) {
      return store.num_panels(projection) * store.panel_bytes(projection);
    };
    sources.push_back({ids[i], packed_data(w13[i], bytes(Projection::kW13), "w13"),
                       packed_data(w2[i], bytes(Projection::kW2), "w2")});
  }
  target->engine->run([&] { target->layer.store().load_packed(sources); });
}

std::tuple<at::Tensor, at::Tensor> export_packed(int64_t layer, int64_t expert) {
  const std::shared_ptr<EngineLayer> target = find_layer(layer);
  const ExpertStore& store = target->layer.store();
  const auto empty = [&](Projection projection) {
    return at::empty({store.num_panels(projection) * store.panel_bytes(projection)}, at::kByte);
  };
  at::Tensor w13 = empty(Projection::kW13);
  at::Tensor w2 = empty(Projection::kW2);
  // in the order of the stream: a load before it is whole
  target->engine->run([&] {
    store.export_packed(expert_id(expert), w13.mutable_data_ptr<uint8_t>(),
                        w2.mutable_data_ptr<uint8_t>());
  });
  return {w13, w2};
}

}  // namespace
}  // namespace kt

// submit gives a ticket that sync consumes: an operator without outputs that mutates nothing it
// declares would be dropped by torch.compile.
TORCH_LIBRARY(kt_kernel, m) {
  m.def(
      "moe_forward(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, Tensor? skip, int "
      "layer) -> Tensor",
      kt::composite(&kt::moe_forward));
  m.def(
      "submit(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, Tensor? skip, int layer) "
      "-> Tensor",
      kt::composite(&kt::submit));
  m.def("sync(Tensor ticket, Tensor hidden_states) -> Tensor", kt::composite(&kt::sync));
  m.def("load_experts(int layer, int[] experts, Tensor[] gate, Tensor[] up, Tensor[] down) -> ()",
        kt::composite(&kt::load_experts));
  m.def(
      "load_bias(int layer, int[] experts, Tensor[] gate_bias, Tensor[] up_bias, Tensor[] "
      "down_bias) -> ()",
      kt::composite(&kt::load_bias));
  m.def("load_packed(int layer, int[] experts, Tensor[] w13, Tensor[] w2) -> ()",
        kt::composite(&kt::load_packed));
  m.def("export_packed(int layer, int expert) -> (Tensor, Tensor)",
        kt::composite(&kt::export_packed));
}
