#include "moe/layer_kernels.h"

namespace kt {

std::vector<const GemmKernel*> LayerKernels::tile_gemms() const {
  std::vector<const GemmKernel*> found;
  for (const KernelSet& set : sets) {
    const GemmKernel* const tiles = set.tile_gemm();
    if (tiles != nullptr && (found.empty() || found.front() != tiles)) found.push_back(tiles);
  }
  return found;
}

KernelRequest request_for(const PackedLayout& layout, IsaSet isa) {
  KernelRequest request;
  request.weights = layout.format;
  request.isa = isa;
  request.group_size = layout.group_size;
  request.row_scales = layout.has_row_scales();
  return request;
}

LayerKernels select_layer_kernels(const MoeConfig& config, const KernelRequest& like) {
  LayerKernels kernels;
  for (const Projection projection : {Projection::kW13, Projection::kW2}) {
    KernelRequest request = request_for(config.layout(projection), like.isa);
    request.choice = like.choice;
    request.deterministic = like.deterministic;
    kernels.sets[static_cast<int>(projection)] = select_kernels(request);
  }
  return kernels;
}

std::string explain_layer_kernels(const MoeConfig& config, IsaSet isa) {
  const std::string w13 = explain_kernels(request_for(config.layout(Projection::kW13), isa));
  const std::string w2 = explain_kernels(request_for(config.layout(Projection::kW2), isa));
  return w13 == w2 ? w13 : "w13: " + w13 + "; w2: " + w2;
}

}  // namespace kt
