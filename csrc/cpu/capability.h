// What this processor can run, asked at run time: one binary serves them all.
#pragma once

namespace h2rec {

// "avx512" (x86-64-v4), "avx2" (x86-64-v3) or "portable" (whatever the compiler targets by default).
inline const char* cpu_capability() {
#if defined(__x86_64__)
  // Also asks whether the operating system saves the wide registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return "avx512";
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return "avx2";
  }
#endif
  return "portable";
}

}  // namespace h2rec
