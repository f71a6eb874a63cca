// main() of the tests that run once a tier: says which tier, and leaves with 77 (CTest: skipped)
// where the host lacks it.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>

#include "base/check.h"
#include "base/cpu_features.h"

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  try {
    std::printf("tier: %s (%s)\n", kt::cpu_features().tier.c_str(),
                kt::isa_name(kt::cpu_features().chosen).c_str());
  } catch (const kt::Error& error) {
    std::printf("skipped: %s\n", error.what());
    return 77;
  }
  return RUN_ALL_TESTS();
}
