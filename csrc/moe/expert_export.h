// One expert's weights as plain matrices, bf16 or in the form of their files, cut for the ranks of
// a tensor-parallel GPU group.
#pragma once

#include <cstdint>
#include <vector>

#include "moe/expert_store.h"
#include "system/worker_pool.h"

namespace kt {

// Where one expert goes. Rank r holds features r * I / R .. (r + 1) * I / R - 1 of the intermediate
// size I, R = w13.size(), row-major:
//
//   w13[r] [2 * I / R, hidden_size]   gate rows, then up rows
//   w2[r]  [hidden_size, I / R]       columns of down
//
// Without scales they are bf16: bf16 layouts give the bits that were loaded, others what their
// codes stand for (rotated back), rounded. With scales, one for each rank and of both, they are the
// codes and scales of native_export.h; a layout of one scale a row has those of w2 in every rank.
struct ExpertExport {
  int expert = 0;
  std::vector<uint8_t*> w13;
  std::vector<uint8_t*> w2;
  std::vector<uint8_t*> w13_scales;
  std::vector<uint8_t*> w2_scales;

  bool is_native() const { return !w13_scales.empty(); }
};

// Errors  kt::Error, one sentence: an expert without a place on the CPU, no ranks, as many w2 as
// w13 or as many scales as ranks are not given, ranks that do not divide I, a pointer that is null
// or not aligned, buffers that overlap, scales for a layout that is written without.
void check_export(const ExpertStore& store, const ExpertExport& request);

// Writes all ranks on the pool; what check_export() refuses must not come here.
// Errors   kt::Error for an expert that was not loaded, or whose scales have no place in the form
//          of native_export.h; nothing is written then.
// Threads  as ExpertStore's load: between forwards, by the thread that may run the pool.
void write_expert(const ExpertStore& store, WorkerPool& pool, const ExpertExport& request);

}  // namespace kt
