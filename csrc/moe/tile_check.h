// Whether the kernels in AMX tiles are right on this machine, and faster than oneDNN's: asked once,
// of one real expert, before any of their results is used.
#pragma once

#include <string>

#include "moe/expert_store.h"
#include "moe/layer_kernels.h"

namespace kt {

class MoeScratch;

struct TileReport {
  TileVerdict verdict = TileVerdict::kRight;
  std::string text;  // one or two sentences with the figures
};

// Runs some rows through `expert` by `tiles`, which `request` chooses for one or both of its
// layouts, and in its place by the kernels of the same features without AMX and by the scalar ones;
// a layout for which it was not chosen is always multiplied without AMX, so that each kernel is
// judged by itself. The same bits are expected of integer sums; where bf16 is multiplied, a
// difference of at most 1/32 of the result's length (tile_check.cpp).
//
// Where they are right, oneDNN has a row for these weights, request.choice is kAuto and neither
// KT_FORCE_ISA nor request.deterministic (of bf16) fixes the choice: times both on the same expert
// and gives kSlower where ours took longer. A choice made by a clock may change between starts;
// nothing of it is kept on disk.
//
// kUnchecked and no text for an expert whose results say nothing, being zeros, not finite or nearly
// subnormal: the next layer is asked.
//
// Threads  as MoeLayer::forward().
// Cost     the scalar kernels: a second for 1e9 weights x rows and thread, with 40 rows or more; an
//          expert of DeepSeek-V3 takes 1 s with two threads and 30 ms with 56.
TileReport check_tiles(const ExpertStore& store, WorkerPool& pool, MoeScratch& scratch,
                       const KernelRequest& request, const GemmKernel& tiles, int expert);

// What the figures of check_tiles() lead to. `times` are medians in seconds; 0: not measured.
TileReport judge_tiles(const GemmKernel& tiles, double difference, const char* other,
                       double tile_seconds, double onednn_seconds);

}  // namespace kt
