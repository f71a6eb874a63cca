// What the tests of topologies and of pool plans compare: lists of CPUs, and warnings as one text.
#pragma once

#include <numeric>
#include <string>
#include <vector>

namespace kt {

using Ints = std::vector<int>;

inline Ints iota(int begin, int end) {
  Ints values(end - begin);
  std::iota(values.begin(), values.end(), begin);
  return values;
}

inline bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

inline std::string all(const std::vector<std::string>& warnings) {
  std::string text;
  for (const std::string& warning : warnings) text += warning + "\n";
  return text;
}

}  // namespace kt
