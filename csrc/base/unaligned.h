// Values at any byte of a buffer. Not for ISA objects: it has inline functions.
#pragma once

#include <cstdint>
#include <cstring>

namespace kt {

template <typename T>
T load(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <typename T>
void store(T value, uint8_t* to) {
  std::memcpy(to, &value, sizeof value);
}

}  // namespace kt
