// The kernels of one layer: those of w13 and those of w2, whose layouts may differ.
#pragma once

#include "kernels/registry.h"
#include "moe/moe_config.h"

namespace kt {

struct LayerKernels {
  KernelSet sets[2];  // by projection

  const KernelSet& of(Projection projection) const { return sets[static_cast<int>(projection)]; }
  const RowwiseOps& rowwise() const { return *sets[0].rowwise; }
  // The rows in tiles, each once; empty without one.
  std::vector<const GemmKernel*> tile_gemms() const;
};

// What kernels a layout wants of a host with these features.
KernelRequest request_for(const PackedLayout& layout, IsaSet isa);

// The kernels of both layouts, of the features and the choice of `like`.
LayerKernels select_layer_kernels(const MoeConfig& config, const KernelRequest& like);

// The choice as text: one line, or one for w13 and one for w2 where they differ.
std::string explain_layer_kernels(const MoeConfig& config, IsaSet isa);

}  // namespace kt
