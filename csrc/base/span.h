// Index arithmetic and the non-owning function reference. Not for ISA objects: it has inline
// functions.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>

namespace kt {

constexpr int64_t ceil_div(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}
constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return ceil_div(value, multiple) * multiple;
}

// Half-open range of indices.
struct IndexRange {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size() const { return end - begin; }
};

// Part `part` of `parts` nearly equal contiguous parts of [0, count); the first parts get the
// remainder.
constexpr IndexRange even_part(int64_t count, int64_t part, int64_t parts) {
  const int64_t base = count / parts;
  const int64_t rest = count % parts;
  const int64_t begin = part * base + (part < rest ? part : rest);
  return {begin, begin + base + (part < rest ? 1 : 0)};
}

// A callable passed by reference: no allocation, no ownership. The callable must outlive the call.
template <typename Signature>
class FunctionRef;

template <typename Result, typename... Args>
class FunctionRef<Result(Args...)> {
 public:
  template <typename F, typename = std::enable_if_t<!std::is_same_v<std::decay_t<F>, FunctionRef>>>
  FunctionRef(F&& callable)  // NOLINT(google-explicit-constructor): a parameter type
      : object_(const_cast<void*>(static_cast<const void*>(std::addressof(callable)))),
        call_([](void* object, Args... args) -> Result {
          return (*static_cast<std::remove_reference_t<F>*>(object))(std::forward<Args>(args)...);
        }) {}
  Result operator()(Args... args) const { return call_(object_, std::forward<Args>(args)...); }

 private:
  void* object_;
  Result (*call_)(void*, Args...);
};

}  // namespace kt
