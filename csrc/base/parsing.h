// Taking names apart from the front. Not for ISA objects: it has inline functions.
#pragma once

#include <charconv>
#include <string_view>

namespace kt {

// Takes `prefix` off the front of `text` if it stands there.
inline bool take(std::string_view& text, std::string_view prefix) {
  if (!text.starts_with(prefix)) return false;
  text.remove_prefix(prefix.size());
  return true;
}

// Takes a decimal number off the front of `text`; -1 if none stands there or it does not fit.
inline int take_number(std::string_view& text) {
  int value = -1;
  const auto result = std::from_chars(text.data(), text.data() + text.size(), value);
  if (result.ec != std::errc() || value < 0) return -1;
  text.remove_prefix(static_cast<size_t>(result.ptr - text.data()));
  return value;
}

}  // namespace kt
