// The one error type of the library, and the macros that throw it.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace kt {

// What the library throws. what() is one sentence for the user: the value, the limit, the fix.
class Error : public std::runtime_error {
 public:
  Error(const std::string& sentence, const char* file, int line)
      : std::runtime_error(sentence), file_(file), line_(line) {}
  // Where the check stands, for a bug report.
  const char* file() const { return file_; }
  int line() const { return line_; }

 private:
  const char* file_;
  int line_;
};

}  // namespace kt

// Throws kt::Error with a streamed sentence unless `condition` holds:
//   KT_CHECK(k > 0, "k must be positive, got " << k);
#define KT_CHECK(condition, sentence)                           \
  do {                                                          \
    if (!(condition)) [[unlikely]] {                            \
      std::ostringstream kt_sentence;                           \
      kt_sentence << sentence;                                  \
      throw ::kt::Error(kt_sentence.str(), __FILE__, __LINE__); \
    }                                                           \
  } while (0)
