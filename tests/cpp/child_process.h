// A part of a test that runs in a fork() of the test's process.
#pragma once

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <exception>
#include <functional>
#include <string>
#include <thread>

namespace kt {

// What `body` returned in the child (short; or the sentence it threw), or how the child ended. It
// is killed after 30 s.
inline std::string in_child(const std::function<std::string()>& body) {
  int ends[2];
  if (pipe(ends) != 0) return "no pipe";
  const pid_t child = fork();
  if (child == 0) {
    std::string text;
    try {
      text = body();
    } catch (const std::exception& error) {
      text = error.what();
    }
    const ssize_t written = write(ends[1], text.data(), text.size());
    _exit(written == static_cast<ssize_t>(text.size()) ? 0 : 1);
  }
  close(ends[1]);
  int status = 0;
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  bool hangs = false;
  while (waitpid(child, &status, WNOHANG) == 0) {
    if (!hangs && std::chrono::steady_clock::now() > deadline) {
      hangs = true;
      kill(child, SIGKILL);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  char buffer[4096];
  const ssize_t bytes = read(ends[0], buffer, sizeof buffer);
  close(ends[0]);
  if (hangs) return "the child hangs";
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
    return "the child ended with status " + std::to_string(status);
  }
  return {buffer, static_cast<size_t>(bytes > 0 ? bytes : 0)};
}

}  // namespace kt
