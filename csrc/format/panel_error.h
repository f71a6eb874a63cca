// What is wrong with one value of a panel, by the row of the matrix that it came from.
#pragma once

#include <cstdint>
#include <source_location>
#include <sstream>
#include <string>

#include "base/check.h"
#include "format/packed_layout.h"

namespace kt {

// "<value> at row <row>, <place> of <matrix> <fault>", e.g. "scale nan at row 70, group 3 of up
// must be finite; repair the checkpoint". Packing knows the row of the panel only; who knows the
// panel says the sentence for its matrix.
class PanelError : public Error {
 public:
  PanelError(const std::string& value, int row, const std::string& place, const std::string& fault,
             std::source_location where = std::source_location::current())
      : Error(sentence_of(value, row, place, "the panel", fault), where.file_name(),
              static_cast<int>(where.line())),
        value_(value),
        place_(place),
        fault_(fault),
        row_(row) {}

  // For panel p of w13, and of a matrix that is named.
  std::string w13_sentence(int64_t p) const {
    constexpr int kHalf = kPackedColumns / 2;
    return sentence_of(value_, kHalf * p + row_ % kHalf, place_, row_ < kHalf ? "gate" : "up",
                       fault_);
  }
  std::string matrix_sentence(const char* matrix, int64_t p) const {
    return sentence_of(value_, kPackedColumns * p + row_, place_, matrix, fault_);
  }

 private:
  static std::string sentence_of(const std::string& value, int64_t row, const std::string& place,
                                 const char* matrix, const std::string& fault) {
    std::ostringstream text;
    text << value << " at row " << row << ", " << place << " of " << matrix << ' ' << fault;
    return text.str();
  }

  std::string value_, place_, fault_;
  int row_;
};

// Runs body() for panel p of a matrix, or of w13 where `matrix` is null, and names the row of the
// matrix where it throws a PanelError.
template <typename F>
void with_matrix_rows(const char* matrix, int64_t p, F&& body) {
  try {
    body();
  } catch (const PanelError& error) {
    throw Error(matrix == nullptr ? error.w13_sentence(p) : error.matrix_sentence(matrix, p),
                error.file(), error.line());
  }
}

// The parts of a sentence, as a stream writes them.
template <typename... Parts>
std::string text_of(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace kt
