// Compiles H2REC_KERNEL, a file of kernels, once per instruction set, each time in a namespace of that name:
//
//     #define H2REC_KERNEL "residual_quantize.inl"
//     #include "for_each_isa.h"
//
// Inside, kVectorBytes is the width of a vector register, to be used with GCC's vector extensions. The file is included
// inside a nameless namespace, so that operators may use the same names; so it includes nothing itself, and it calls no
// inline function of the standard library: one that was compiled for a wider processor could replace the copy that the
// rest of the program uses.
// H2REC_CHOOSE(f) is then the `f` that this processor runs best.

#include "capability.h"

namespace h2rec::portable {
namespace {
constexpr int kVectorBytes = 16;
#include H2REC_KERNEL
}  // namespace
}  // namespace h2rec::portable

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace h2rec::avx2 {
namespace {
constexpr int kVectorBytes = 32;
#include H2REC_KERNEL
}  // namespace
}  // namespace h2rec::avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
namespace h2rec::avx512 {
namespace {
constexpr int kVectorBytes = 64;
#include H2REC_KERNEL
}  // namespace
}  // namespace h2rec::avx512
#pragma GCC pop_options

#define H2REC_CHOOSE(function)                                          \
  (::h2rec::capability() >= ::h2rec::Capability::kAvx512 ? &::h2rec::avx512::function \
   : ::h2rec::capability() == ::h2rec::Capability::kAvx2 ? &::h2rec::avx2::function   \
                                                         : &::h2rec::portable::function)

#else

#define H2REC_CHOOSE(function) (&::h2rec::portable::function)

#endif
