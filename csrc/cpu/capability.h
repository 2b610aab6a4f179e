// What this processor can run, asked at run time: one binary serves them all.
#pragma once

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace h2rec {

// portable: whatever the compiler targets by default; the others are x86-64-v3, x86-64-v4, and the latter with products of
// bytes.
enum class Capability { kPortable, kAvx2, kAvx512, kAvx512Vnni };

inline const char* name_of(Capability capability) {
  switch (capability) {
    case Capability::kAvx512Vnni:
      return "avx512vnni";
    case Capability::kAvx512:
      return "avx512";
    case Capability::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

inline Capability detect_capability() {
#if defined(__x86_64__)
  // Also asks whether the operating system saves the wide registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return __builtin_cpu_supports("avx512vnni") ? Capability::kAvx512Vnni : Capability::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return Capability::kAvx2;
  }
#endif
  return Capability::kPortable;
}

// The best that the processor has, or less if H2REC_CPU_CAPABILITY names less. Read once.
inline Capability capability() {
  static const Capability chosen = [] {
    const Capability best = detect_capability();
    const char* asked = std::getenv("H2REC_CPU_CAPABILITY");
    for (const Capability lower : {Capability::kPortable, Capability::kAvx2, Capability::kAvx512}) {
      if (asked != nullptr && lower < best && std::strcmp(asked, name_of(lower)) == 0) {
        return lower;
      }
    }
    return best;
  }();
  return chosen;
}

}  // namespace h2rec
