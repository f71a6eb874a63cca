// Tells objects with threads that they are a fork's copy, which has none.
#pragma once

namespace kt {

// A member of what owns threads. In a child that fork() made, an object is there and its threads
// are not: joining them never ends, what they would do is never done, and a mutex that one of them
// held stays locked. So a copy does nothing: it throws where it is used and is left alone where it
// is destroyed.
class ForkGuard {
 public:
  ForkGuard();
  // Whether the calling process is a fork of the one that made this. One load.
  bool inherited() const;
  // Errors  kt::Error if inherited.
  void check() const;

 private:
  int num_forks_;
};

}  // namespace kt
