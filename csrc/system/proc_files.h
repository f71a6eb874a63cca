// Reading the one-line files of /proc and /sys. Every failure is "not there", never an exception.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace kt {

// The whole file, or nothing if it cannot be read.
std::optional<std::string> read_file(const std::string& path);

// The first line without surrounding blanks, or nothing if the file cannot be read.
std::optional<std::string> read_line(const std::string& path);

// A decimal number that fills the text, or nothing ("max", "-1", "" and overflow included).
std::optional<uint64_t> parse_number(std::string_view text);

// Ids of a kernel list such as "0-3,8,10-11": ascending, without repeats; "" is the empty list.
// Nothing if the text is no such list or names an id above 65535.
std::optional<std::vector<int>> parse_id_list(std::string_view text);

// The number behind `key` in a file of lines "key value" or "key: value kB", in the file's unit.
// Nothing if the file or the key is missing.
std::optional<uint64_t> read_keyed_number(const std::string& path, std::string_view key);

}  // namespace kt
