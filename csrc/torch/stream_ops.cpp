// torch.ops.kt_kernel, forwards that the stream of a device asks for: submit and sync, capturable.
#include <torch/library.h>

#include <any>
#include <atomic>
#include <vector>

#include "engine/engine.h"
#include "torch/forward_checks.h"

namespace kt {
namespace {

// What submit_on_stream leaves for sync_on_stream.
struct StreamForward {
  DeviceSync* device = nullptr;  // the layer's engine keeps it alive
  DeviceTicket ticket;           // id 0: no tokens, nothing was enqueued
  std::vector<int64_t> sizes;    // of the result
  at::TensorOptions options;
};

CuStream stream_of(int64_t handle) { return reinterpret_cast<CuStream>(handle); }

// The memory of a device: not the CPU's, unless the driver is the tests' double.
void check_device(const at::Tensor& tensor, const at::Tensor& first, const char* name,
                  int64_t stream) {
  KT_CHECK(device_driver_reason().empty(),
           name << " is on " << tensor.device().str() << ", but " << device_driver_reason());
  KT_CHECK(!tensor.is_cpu() || (stream != 0 && device_driver_is_double()),
           name << " is on the CPU; submit_on_stream and sync_on_stream take tensors of a device.");
  KT_CHECK(tensor.device() == first.device(), name << " is on " << tensor.device().str()
                                                   << ", but hidden_states is on "
                                                   << first.device().str() << ".");
  KT_CHECK(tensor.is_contiguous(), name << " has strides; it must be contiguous.");
}

// The layer's input from a slot. The mask is read when the job runs, once: the host may change it
// in place meanwhile, and a forward reads it several times.
class LayerWork {
 public:
  LayerWork(EngineLayer& layer, const DeviceInput& input, const std::optional<at::Tensor>& skip)
      : layer_(layer) {
    input_.dtype = input.dtype;
    input_.id_dtype = input.id_dtype;
    input_.num_tokens = input.num_tokens;
    input_.top_k = input.top_k;
    if (!skip.has_value()) return;
    skip_ = *skip;
    mask_.resize(skip_.numel());
    input_.skip = mask_.data();
  }

  void run(const HostBuffers& buffers) {
    input_.hidden_states = buffers.hidden_states;
    input_.topk_ids = buffers.topk_ids;
    input_.topk_weights = buffers.topk_weights;
    input_.output = buffers.output;
    if (skip_.defined()) {
      const auto* const bytes = reinterpret_cast<const uint8_t*>(skip_.const_data_ptr<bool>());
      for (size_t i = 0; i < mask_.size(); ++i) {
        mask_[i] = __atomic_load_n(&bytes[i], __ATOMIC_RELAXED);
      }
    }
    layer_.run(input_);
  }
  void run_deferred() { layer_.run_deferred(input_); }

 private:
  EngineLayer& layer_;  // its destructor retires the job
  MoeInput input_;
  at::Tensor skip_;
  std::vector<uint8_t> mask_;
};

DeviceWork device_work(EngineLayer& layer, const DeviceInput& input,
                       const std::optional<at::Tensor>& skip) {
  const auto work = std::make_shared<LayerWork>(layer, input, skip);
  DeviceWork out;
  out.run = [work](const HostBuffers& buffers) { work->run(buffers); };
  out.run_deferred = [work](const HostBuffers&) { work->run_deferred(); };
  out.owner = &layer;
  out.layer_idx = layer.layer.config().layer_idx;
  out.chain_position = layer.chain_position();
  return out;
}

at::Tensor submit_on_stream(const at::Tensor& hidden_states, const at::Tensor& topk_ids,
                            const at::Tensor& topk_weights, const std::optional<at::Tensor>& skip,
                            int64_t layer, int64_t stream, int64_t current_stream) {
  std::shared_ptr<EngineLayer> target = find_layer(layer);
  check_device(hidden_states, hidden_states, "hidden_states", stream);
  check_device(topk_ids, hidden_states, "topk_ids", stream);
  check_device(topk_weights, hidden_states, "topk_weights", stream);
  DeviceInput input;
  input.dtype =
      check_forward_arguments(hidden_states, topk_ids, topk_weights, skip, target->layer.config());
  const at::ScalarType ids = topk_ids.scalar_type();
  KT_CHECK(ids == at::kInt || ids == at::kLong,
           "topk_ids is " << c10::toString(ids) << "; on a device it must be int32 or int64.");
  KT_CHECK(topk_weights.scalar_type() == at::kFloat,
           "topk_weights is " << c10::toString(topk_weights.scalar_type())
                              << "; on a device it must be fp32.");
  KT_CHECK(!skip.has_value() || skip->is_contiguous(), "skip has strides; it must be contiguous.");
  input.hidden_states = hidden_states.const_data_ptr();
  input.topk_ids = topk_ids.const_data_ptr();
  input.id_dtype = ids == at::kInt ? DType::kInt32 : DType::kInt64;
  input.topk_weights = topk_weights.const_data_ptr<float>();
  input.num_tokens = static_cast<int>(hidden_states.size(0));
  input.top_k = static_cast<int>(topk_ids.size(1));
  input.hidden_size = static_cast<int>(hidden_states.size(1));

  StreamForward forward;
  forward.sizes = hidden_states.sizes().vec();
  forward.options = hidden_states.options();
  const int ordinal = hidden_states.is_cpu() ? 0 : hidden_states.device().index();
  forward.device = &target->engine->device_sync(ordinal);
  if (input.num_tokens > 0) {
    forward.ticket = forward.device->submit(input, device_work(*target, input, skip),
                                            stream_of(stream), stream_of(current_stream));
  }
  const int64_t ticket = add_pending({std::move(target), 0, std::move(forward), "sync_on_stream"});
  return at::scalar_tensor(ticket, at::kLong).reshape({1});
}

at::Tensor sync_on_stream(const at::Tensor& ticket, const at::Tensor& hidden_states, int64_t stream,
                          int64_t current_stream) {
  KT_CHECK(ticket.numel() == 1 && ticket.scalar_type() == at::kLong && ticket.is_cpu(),
           "ticket must be the tensor that submit_on_stream returned.");
  const PendingForward pending = take_pending(ticket.item<int64_t>(), "sync_on_stream");
  const auto* const forward = std::any_cast<StreamForward>(&pending.output);
  at::Tensor output;
  try {
    KT_CHECK(hidden_states.sizes() == forward->sizes &&
                 hidden_states.dtype() == forward->options.dtype(),
             "sync_on_stream was given hidden_states of shape "
                 << hidden_states.sizes() << ", but submit_on_stream had "
                 << at::IntArrayRef(forward->sizes) << ".");
    output = at::empty(forward->sizes, forward->options);
  } catch (...) {
    // the ticket is spent: nobody else can sync the job
    if (forward->ticket.id != 0) forward->device->abandon(forward->ticket);
    throw;
  }
  if (forward->ticket.id != 0) {
    forward->device->sync(forward->ticket, output.mutable_data_ptr(), stream_of(stream),
                          stream_of(current_stream));
  }
  return output;
}

}  // namespace
}  // namespace kt

// As in moe_ops.cpp, a ticket ties the two together, so that torch.compile keeps both.
TORCH_LIBRARY_FRAGMENT(kt_kernel, m) {
  m.def(
      "submit_on_stream(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, Tensor? skip, "
      "int layer, int stream, int current_stream) -> Tensor",
      kt::composite(&kt::submit_on_stream));
  m.def(
      "sync_on_stream(Tensor ticket, Tensor hidden_states, int stream, int current_stream) -> "
      "Tensor",
      kt::composite(&kt::sync_on_stream));
}
