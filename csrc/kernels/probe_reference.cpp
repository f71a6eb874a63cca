// Limits of plain x86-64, so that every tier has a line to be measured against.
#include "kernels/kernel.h"

namespace kt {

uint64_t read_probe_reference(const uint8_t* data, int64_t bytes) {
  const uint64_t* words = reinterpret_cast<const uint64_t*>(data);
  uint64_t sum[4] = {};
  for (int64_t i = 0; i < bytes / 8; i += 4) {
    for (int j = 0; j < 4; ++j) sum[j] ^= words[i + j];
  }
  return sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
}

uint64_t peak_probe_int8_reference(int64_t iterations) {
  int32_t sum[8] = {0, 1, 2, 3, 4, 5, 6, 7};  // equal sums would be computed once
  int32_t a = 3;
  for (int64_t i = 0; i < iterations; ++i) {
    asm volatile("" : "+r"(a));
    for (int32_t& lane : sum) lane += a * 5;
  }
  int64_t all = 0;
  for (const int32_t lane : sum) all += lane;
  return static_cast<uint64_t>(all);
}

uint64_t peak_probe_bf16_reference(int64_t iterations) {
  float sum[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  float a = 0.5f;
  for (int64_t i = 0; i < iterations; ++i) {
    asm volatile("" : "+x"(a));
    for (float& lane : sum) lane += a * 0.25f;
  }
  float all = 0;
  for (const float lane : sum) all += lane;
  return static_cast<uint64_t>(all);
}

}  // namespace kt
