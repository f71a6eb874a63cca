// torch.ops.kt_kernel, the operators that write experts into buffers of the caller.
#include <torch/library.h>

#include "engine/engine.h"
#include "moe/expert_export.h"
#include "torch/tensor_checks.h"

namespace kt {
namespace {

std::vector<uint8_t*> buffers(at::IntArrayRef addresses, int64_t tp_count, const char* name) {
  KT_CHECK(static_cast<int64_t>(addresses.size()) == tp_count,
           name << " has " << addresses.size() << " addresses; it must have one for each of the "
                << tp_count << " ranks.");
  std::vector<uint8_t*> pointers;
  for (const int64_t address : addresses) pointers.push_back(reinterpret_cast<uint8_t*>(address));
  return pointers;
}

// Everything that can be refused is refused here, before the write is queued.
int64_t write_expert_to(int64_t layer, int64_t expert, int64_t tp_count, at::IntArrayRef w13_ptrs,
                        at::IntArrayRef w2_ptrs, at::IntArrayRef w13_scale_ptrs,
                        at::IntArrayRef w2_scale_ptrs) {
  std::shared_ptr<EngineLayer> target = find_layer(layer);
  const ExpertStore& store = target->layer.store();
  KT_CHECK(expert >= 0 && expert < store.config().num_experts,
           "layer " << store.config().layer_idx << " has experts 0 to "
                    << store.config().num_experts - 1 << "; expert " << expert
                    << " cannot be written.");
  ExpertExport request{static_cast<int>(expert),
                       buffers(w13_ptrs, tp_count, "w13_ptrs"),
                       buffers(w2_ptrs, tp_count, "w2_ptrs"),
                       {},
                       {}};
  if (!w13_scale_ptrs.empty() || !w2_scale_ptrs.empty()) {
    request.w13_scales = buffers(w13_scale_ptrs, tp_count, "w13_scale_ptrs");
    request.w2_scales = buffers(w2_scale_ptrs, tp_count, "w2_scale_ptrs");
  }
  check_export(store, request);
  // the pending entry keeps layer and engine alive, and close_layer waits for the job
  WorkerPool* const pool = &target->engine->pool();
  const uint64_t stream_ticket = target->engine->stream().submit(
      [&store, pool, request] { write_expert(store, *pool, request); });
  return add_pending({std::move(target), stream_ticket, {}, "wait_written"});
}

void wait_written(int64_t ticket) {
  const PendingForward pending = take_pending(ticket, "wait_written");
  pending.layer->engine->stream().wait(pending.stream_ticket);
}

}  // namespace
}  // namespace kt

// write_expert gives a ticket that wait_written consumes. The buffers belong to the write until
// then.
TORCH_LIBRARY_FRAGMENT(kt_kernel, m) {
  m.def(
      "write_expert(int layer, int expert, int tp_count, int[] w13_ptrs, int[] w2_ptrs, "
      "int[] w13_scale_ptrs, int[] w2_scale_ptrs) -> int",
      kt::composite(&kt::write_expert_to));
  m.def("wait_written(int ticket) -> ()", kt::composite(&kt::wait_written));
}
