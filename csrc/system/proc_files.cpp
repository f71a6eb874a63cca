#include "system/proc_files.h"

#include <algorithm>
#include <charconv>
#include <fstream>
#include <sstream>

namespace kt {
namespace {

std::string_view strip(std::string_view text) {
  constexpr std::string_view kBlanks = " \t\r\n";
  const size_t first = text.find_first_not_of(kBlanks);
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(kBlanks) - first + 1);
}

}  // namespace

std::optional<std::string> read_file(const std::string& path) {
  std::ifstream file(path);
  if (!file) return std::nullopt;
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

std::optional<std::string> read_line(const std::string& path) {
  const std::optional<std::string> text = read_file(path);
  if (!text) return std::nullopt;
  return std::string(strip(std::string_view(*text).substr(0, text->find('\n'))));
}

std::optional<uint64_t> parse_number(std::string_view text) {
  uint64_t value = 0;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || stop != end) return std::nullopt;
  return value;
}

std::optional<std::vector<int>> parse_id_list(std::string_view text) {
  constexpr uint64_t kMaxId = 65535;  // the kernel's limits are 8192 CPUs and 1024 nodes
  std::vector<int> ids;
  text = strip(text);
  while (!text.empty()) {
    const size_t comma = std::min(text.find(','), text.size());
    const std::string_view range = text.substr(0, comma);
    const size_t dash = std::min(range.find('-'), range.size());
    const std::optional<uint64_t> first = parse_number(range.substr(0, dash));
    const std::optional<uint64_t> last =
        dash == range.size() ? first : parse_number(range.substr(dash + 1));
    if (!first || !last || *last > kMaxId || *first > *last) return std::nullopt;
    for (uint64_t id = *first; id <= *last; ++id) ids.push_back(static_cast<int>(id));
    text.remove_prefix(std::min(comma + 1, text.size()));
  }
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return ids;
}

std::optional<uint64_t> read_keyed_number(const std::string& path, std::string_view key) {
  const std::optional<std::string> text = read_file(path);
  if (!text) return std::nullopt;
  std::istringstream lines(*text);
  for (std::string line; std::getline(lines, line);) {
    const size_t at = line.find(key);
    if (at == std::string::npos) continue;
    // "Node 0 MemTotal:" has words before the key; "inactive_file" must not match "active_file"
    if (at > 0 && line[at - 1] != ' ') continue;
    std::istringstream rest(line.substr(at + key.size()));
    if (rest.peek() == ':') rest.get();
    uint64_t value = 0;
    if ((rest.peek() == ' ' || rest.peek() == '\t') && rest >> value) return value;
  }
  return std::nullopt;
}

}  // namespace kt
