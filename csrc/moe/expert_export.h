// One expert's weights as plain bf16 matrices, cut for the ranks of a tensor-parallel GPU group.
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
// BF16 layouts give the bits that were loaded; int8 and int4 what their codes stand for (rotated
// back), rounded to bf16.
struct ExpertExport {
  int expert = 0;
  std::vector<uint16_t*> w13;
  std::vector<uint16_t*> w2;
};

// Errors  kt::Error, one sentence: an expert without a place on the CPU, no ranks or as many w2 as
// w13 are not given, a number of ranks that does not divide I, a pointer that is null or odd,
// buffers that overlap.
void check_export(const ExpertStore& store, const ExpertExport& request);

// Writes all ranks on the pool; what check_export() refuses must not come here.
// Errors   kt::Error for an expert that was not loaded; nothing is written then.
// Threads  as ExpertStore's load: between forwards, by the thread that may run the pool.
void write_expert(const ExpertStore& store, WorkerPool& pool, const ExpertExport& request);

}  // namespace kt
