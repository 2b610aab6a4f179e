// Runs CUDA C++ kernels on the CPU: a fiber for each thread of a block, and one block after the other.
//
// It knows what the kernels of csrc/cuda use and no more:
//   blocks and warps    threadIdx, blockIdx, gridDim, dynamic shared memory, __syncthreads, __syncwarp
//   warp functions      __shfl_sync, __shfl_up_sync, __shfl_xor_sync, __ballot_sync, __all_sync, for whole warps only
//   matrix products     nvcuda::wmma with 16 x 16 x 16 fragments, fp16 in and fp32 out. Which lane holds which element is left
//                       open by CUDA and scattered here. Sums are rounded towards zero after every product, as the worst device
//                       that the error bound of csrc/README.md allows.
//   asynchronous copies __pipeline_memcpy_async, _commit, _wait_prior. The destination turns to NaN when the copy is issued and
//                       has the data only when its thread waits for them: a missing wait reads NaN, a buffer that is still
//                       being read is spoilt.
//   float4 and its kin, and a few functions of numbers
// It reports
//   - threads that wait for ever, and what each waits for;
//   - a __syncthreads that not all threads reach at the same line; warp functions that meet different ones;
//   - a lane that has returned; lanes that pass different matrices to a function of wmma; what wmma or an asynchronous copy
//     requires of alignment and strides;
//   - launches that a device would refuse, and a vector of 8 or 16 bytes that is not aligned (under UBSan).
// Shared memory starts as NaN and has exactly the size that was asked for, so that ASan sees one byte too far. To TSan every CUDA
// thread is a thread, ordered by nothing but __syncthreads, __syncwarp and the launch: a missing barrier is a data race, also
// where this schedule happened to give the right answer.
//
// CUDA_EMULATION_ORDER=forward (default), reverse or random:SEED chooses who goes on when several can.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#define CUDA_EMULATION_INTERNAL __attribute__((no_sanitize("thread"), noinline))
#else
#define CUDA_EMULATION_INTERNAL
#endif

#define __global__
#define __device__
#define __launch_bounds__(...)
// The line that calls: what is reported, and what tells one barrier from another.
#define CUDA_EMULATION_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct [[gnu::may_alias]] alignas(8) uint2 {
  unsigned x, y;
};
struct [[gnu::may_alias]] alignas(16) float4 {
  float x, y, z, w;
};
struct [[gnu::may_alias]] alignas(16) double2 {
  double x, y;
};

namespace cuda_emulation {

constexpr std::size_t kStackBytes = 128 * 1024;
constexpr unsigned kMaxThreads = 1024;
constexpr std::size_t kMaxSharedBytes = 48 * 1024;  // what a kernel has without asking for more
constexpr int kInvalidConfiguration = 9, kLaunchFailure = 719;  // cudaError_t

struct Place {
  const char* function;
  const char* file;
  int line;

  bool operator!=(const Place& other) const {
    return line != other.line || std::strcmp(function, other.function) != 0 || std::strcmp(file, other.file) != 0;
  }
  std::string text() const {
    const char* name = std::strrchr(file, '/');
    return std::string(function) + " at " + (name ? name + 1 : file) + ":" + std::to_string(line);
  }
};

struct AsyncCopy {
  unsigned char* to;
  const unsigned char* from;
  std::size_t bytes;
};

struct Fiber {
  ucontext_t context{};
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#endif
  uint3 thread{};
  unsigned index = 0;
  bool done = false;
  Place waits_for{};
  std::deque<std::vector<AsyncCopy>> copies;  // groups of them, the last one still open
  void* stack = nullptr;
  void* tsan = nullptr;
  bool ignored = false;  // by TSan, since it ended
};

// What a lane brings to a function of its warp, and what it takes away.
struct Arrival {
  std::uint64_t value = 0, result = 0;
  unsigned lane = 0;  // whose value it asks for
};

struct Warp {
  Arrival lanes[32];
  unsigned arrived = 0;  // bits
  bool broken = false;   // a lane has returned
  Place where{};
};

struct Machine {
  dim3 grid, block;
  uint3 block_index{};
  std::vector<Fiber> fibers, fibers_of_last_block;  // they take turns: to TSan, blocks are not ordered by whom they share
  std::vector<Warp> warps;
  std::deque<unsigned> runnable;
  std::vector<unsigned> members;  // of the warp that is woken
  unsigned fibers_of_block = 0, live = 0, at_barrier = 0;
  Place barrier{};
  Fiber scheduler;
  Fiber* current = nullptr;
  unsigned char* shared = nullptr;
  std::function<void()> kernel;
  std::string error;
  std::string order;
  std::mt19937 random;
  char started = 0, finished = 0;  // addresses that TSan orders by
  std::vector<char> orders;        // the same, for this block: its warps and, at the end, its barrier
};

inline Machine& machine() {
  static Machine* one = new Machine;
  return *one;
}

inline unsigned char* shared_memory() { return machine().shared; }

// What the emulation does with its own state is not the kernel's doing: TSan is to overlook it.
struct Untracked {
#if defined(__SANITIZE_THREAD__)
  Untracked() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Untracked() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Untracked() {}
#endif
};

CUDA_EMULATION_INTERNAL inline void release([[maybe_unused]] void* token) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(token);
#endif
}
CUDA_EMULATION_INTERNAL inline void acquire([[maybe_unused]] void* token) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(token);
#endif
}

// ---- from one fiber to another; swapcontext would make a system call each time
#if defined(__x86_64__)
asm(R"(
.text
.weak cuda_emulation_swap
.hidden cuda_emulation_swap
.type cuda_emulation_swap,@function
cuda_emulation_swap:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emulation_swap,.-cuda_emulation_swap
)");
extern "C" void cuda_emulation_swap(void** save, void** load) __attribute__((visibility("hidden")));
#endif

CUDA_EMULATION_INTERNAL inline void switch_to(Fiber& to) {
  Machine& m = machine();
  Fiber& from = *m.current;
  m.current = &to;
#if defined(__SANITIZE_ADDRESS__)
  static const void* main_stack = nullptr;
  static std::size_t main_size = 0;
  void* fake_stack = nullptr;
  const bool to_main = &to == &m.scheduler;
  __sanitizer_start_switch_fiber(from.done ? nullptr : &fake_stack, to_main ? main_stack : to.stack,
                                 to_main ? main_size : kStackBytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.tsan, 1);  // 1: without making one happen before the other
#endif
#if defined(__x86_64__)
  cuda_emulation_swap(&from.stack_pointer, &to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* stack;
  std::size_t size;
  __sanitizer_finish_switch_fiber(fake_stack, &stack, &size);
#endif
}

CUDA_EMULATION_INTERNAL inline void yield() {
  Machine& m = machine();
  if (m.runnable.empty()) {
    return switch_to(m.scheduler);
  }
  Fiber& next = m.fibers[m.runnable.front()];
  m.runnable.pop_front();
  if (&next != m.current) {
    switch_to(next);
  }
}

CUDA_EMULATION_INTERNAL inline void wake(std::vector<unsigned>& indices) {
  Machine& m = machine();
  if (m.order == "reverse") {
    std::reverse(indices.begin(), indices.end());
  } else if (m.order != "forward") {
    std::shuffle(indices.begin(), indices.end(), m.random);
  }
  for (const unsigned index : indices) {
    m.runnable.push_back(index);
  }
}

[[noreturn]] CUDA_EMULATION_INTERNAL inline void fail(const std::string& message) {
  Machine& m = machine();
  m.error = message + ", in thread " + std::to_string(m.current->index);
  m.runnable.clear();
  switch_to(m.scheduler);  // and never back
  std::abort();
}

// ---- barriers and warp functions
CUDA_EMULATION_INTERNAL inline void open_barrier() {
  Machine& m = machine();
  m.at_barrier = 0;
  std::vector<unsigned> waiting;
  for (unsigned i = 0; i < m.fibers_of_block; ++i) {
    const Fiber& fiber = m.fibers[i];
    if (!fiber.done) {
      waiting.push_back(fiber.index);
    }
  }
  wake(waiting);
}

CUDA_EMULATION_INTERNAL inline void barrier(const char* file, int line) {
  const Untracked untracked;
  Machine& m = machine();
  const Place here{"__syncthreads", file, line};
  if (m.at_barrier > 0 && m.barrier != here) {
    fail(here.text() + " meets " + m.barrier.text());
  }
  m.barrier = m.current->waits_for = here;
  release(&m.orders.back());
  if (++m.at_barrier == m.live) {
    open_barrier();
  }
  yield();
  acquire(&m.orders.back());
}

using Combine = void (*)(Arrival* lanes);

// All lanes of a warp arrive, at the same line; the last one has `combine` give each its result.
CUDA_EMULATION_INTERNAL inline std::uint64_t warp_function(unsigned mask, std::uint64_t value, unsigned lane, Combine combine,
                                                           Place here) {
  const Untracked untracked;
  Machine& m = machine();
  Fiber& me = *m.current;
  Warp& warp = m.warps[me.index / 32];
  if (mask != 0xffffffffu || warp.broken || (me.index | 31) >= m.fibers_of_block) {
    fail(here.text() + ": not all 32 lanes are there, or in the mask");
  }
  if (warp.arrived != 0 && warp.where != here) {
    fail(here.text() + " meets " + warp.where.text());
  }
  warp.where = me.waits_for = here;
  warp.arrived |= 1u << me.index % 32;
  Arrival& mine = warp.lanes[me.index % 32];
  mine.value = value;
  mine.lane = lane;
  if (warp.arrived == mask) {
    combine(warp.lanes);
    warp.arrived = 0;
    std::vector<unsigned>& members = m.members;
    members.resize(32);
    for (unsigned i = 0; i < 32; ++i) {
      members[i] = me.index / 32 * 32 + i;
    }
    wake(members);
  }
  yield();
  return mine.result;
}

// ---- launches
CUDA_EMULATION_INTERNAL inline void run_fiber() {
  Machine& m = machine();
  Fiber& me = *m.current;
#if defined(__SANITIZE_ADDRESS__)
  const void* stack;
  std::size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &size);
#endif
#if defined(__SANITIZE_THREAD__)
  if (me.ignored) {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#endif
  acquire(&m.started);
  m.kernel();
  release(&m.finished);
#if defined(__SANITIZE_THREAD__)
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
  me.ignored = me.done = true;
  m.warps[me.index / 32].broken = true;
  if (--m.live > 0 && m.at_barrier == m.live) {
    open_barrier();  // those that have returned hold nobody up
  }
  yield();
  std::abort();
}

CUDA_EMULATION_INTERNAL inline void prepare(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    fiber.stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
#if defined(__SANITIZE_THREAD__)
    fiber.tsan = __tsan_create_fiber(0);
#endif
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);
#endif
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(static_cast<char*>(fiber.stack) + kStackBytes);
  *--top = nullptr;  // where run_fiber would return to; keeps the alignment that a call leaves
  *--top = reinterpret_cast<void*>(&run_fiber);
  fiber.stack_pointer = top - 6;  // the registers that cuda_emulation_swap restores
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.context, run_fiber, 0);
#endif
}

inline std::string who_waits() {
  std::map<std::string, int> counts;
  for (unsigned i = 0; i < machine().fibers_of_block; ++i) {
    const Fiber& fiber = machine().fibers[i];
    ++counts[fiber.done ? "returned" : "wait for " + fiber.waits_for.text()];
  }
  std::string text = "deadlock:";
  for (const auto& [state, count] : counts) {
    text += " " + std::to_string(count) + " threads " + state + ";";
  }
  return text;
}

CUDA_EMULATION_INTERNAL inline void run_block(std::size_t shared_bytes) {
  const Untracked untracked;
  Machine& m = machine();
  std::swap(m.fibers, m.fibers_of_last_block);
  if (m.fibers.size() < m.fibers_of_block) {
    m.fibers.resize(m.fibers_of_block);
  }
  void* shared = nullptr;  // of its own for each block: to TSan, blocks share nothing but global memory
  if (shared_bytes > 0) {
    if (posix_memalign(&shared, 128, shared_bytes) != 0) {
      std::abort();
    }
    std::memset(shared, 0xff, shared_bytes);
  }
  m.shared = static_cast<unsigned char*>(shared);
  m.live = m.fibers_of_block;
  m.at_barrier = 0;
  m.runnable.clear();
  m.warps.assign((m.fibers_of_block + 31) / 32, {});
  m.orders = std::vector<char>(m.warps.size() + 1);  // of its own for each block, as well
  std::vector<unsigned> indices;
  for (unsigned i = 0; i < m.fibers_of_block; ++i) {
    Fiber& fiber = m.fibers[i];
    fiber.index = i;
    fiber.copies.assign(1, {});
    fiber.thread = {i % m.block.x, i / m.block.x % m.block.y, i / (m.block.x * m.block.y)};
    fiber.done = false;
    prepare(fiber);
    indices.push_back(i);
  }
  wake(indices);
  m.current = &m.scheduler;
  release(&m.started);
  yield();  // until nobody can go on
  if (m.error.empty() && m.live > 0) {
    m.error = who_waits();
  }
  std::free(shared);
}

// Runs `kernel` in every thread of the grid; 0, or a cudaError_t after saying on stderr what is wrong.
CUDA_EMULATION_INTERNAL inline int launch(dim3 grid, dim3 block, std::size_t shared_bytes, std::function<void()> kernel) {
  Machine& m = machine();
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || shared_bytes > kMaxSharedBytes || grid.x == 0 || grid.x > 0x7fffffffu ||
      grid.y == 0 || grid.y > 0xffffu || grid.z == 0 || grid.z > 0xffffu) {
    std::fprintf(stderr, "cuda_emulation: invalid launch configuration\n");
    return kInvalidConfiguration;
  }
  const char* order = std::getenv("CUDA_EMULATION_ORDER");
  m.order = order ? order : "forward";
  m.random.seed(m.order.rfind("random:", 0) == 0 ? std::stoul(m.order.substr(7)) : 0);
  m.grid = grid;
  m.block = block;
  m.kernel = std::move(kernel);
  m.error.clear();
  m.fibers_of_block = static_cast<unsigned>(threads);
#if defined(__SANITIZE_THREAD__)
  m.scheduler.tsan = __tsan_get_current_fiber();
#endif
  for (std::uint64_t i = 0, blocks = std::uint64_t{grid.x} * grid.y * grid.z; i < blocks && m.error.empty(); ++i) {
    const std::uint64_t b = m.order == "forward" ? i : blocks - 1 - i;
    m.block_index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                     static_cast<unsigned>(b / grid.x / grid.y)};
    run_block(shared_bytes);
  }
  acquire(&m.finished);
  if (m.error.empty()) {
    return 0;
  }
  std::fprintf(stderr, "cuda_emulation: block (%u, %u, %u): %s\n", m.block_index.x, m.block_index.y, m.block_index.z,
               m.error.c_str());
  return kLaunchFailure;
}

}  // namespace cuda_emulation

// ---- what device code calls
#define threadIdx (::cuda_emulation::machine().current->thread)
#define blockIdx (::cuda_emulation::machine().block_index)
#define gridDim (::cuda_emulation::machine().grid)

inline void __syncthreads(CUDA_EMULATION_CALLER) { ::cuda_emulation::barrier(file, line); }

inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_EMULATION_CALLER) {
  ::cuda_emulation::Machine& m = ::cuda_emulation::machine();
  void* warp = &m.orders[m.current->index / 32];
  ::cuda_emulation::release(warp);
  ::cuda_emulation::warp_function(mask, 0, 0, [](::cuda_emulation::Arrival*) {}, {"__syncwarp", file, line});
  ::cuda_emulation::acquire(warp);
}

namespace cuda_emulation {

inline unsigned lane_of_caller() { return machine().current->index % 32; }

template <typename T>
T shuffle(unsigned mask, T value, unsigned from, Place here) {
  static_assert(sizeof(T) <= 8);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const auto exchange = [](Arrival* lanes) {
    for (unsigned lane = 0; lane < 32; ++lane) {
      lanes[lane].result = lanes[lanes[lane].lane].value;
    }
  };
  bits = warp_function(mask, bits, from, exchange, here);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_emulation

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int from, CUDA_EMULATION_CALLER) {
  return ::cuda_emulation::shuffle(mask, value, from & 31, {"__shfl_sync", file, line});
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int with, CUDA_EMULATION_CALLER) {
  return ::cuda_emulation::shuffle(mask, value, ::cuda_emulation::lane_of_caller() ^ with, {"__shfl_xor_sync", file, line});
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned by, CUDA_EMULATION_CALLER) {
  const unsigned lane = ::cuda_emulation::lane_of_caller();
  return ::cuda_emulation::shuffle(mask, value, lane < by ? lane : lane - by, {"__shfl_up_sync", file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_EMULATION_CALLER) {
  const auto combine = [](::cuda_emulation::Arrival* lanes) {
    std::uint64_t bits = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
      bits |= std::uint64_t{lanes[lane].value != 0} << lane;
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
      lanes[lane].result = bits;
    }
  };
  return static_cast<unsigned>(
      ::cuda_emulation::warp_function(mask, predicate != 0, 0, combine, {"__ballot_sync", file, line}));
}
inline int __all_sync(unsigned mask, int predicate, CUDA_EMULATION_CALLER) {
  return __ballot_sync(mask, predicate, file, line) == 0xffffffffu;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// ---- asynchronous copies: reads and writes are the thread's own, so that TSan and ASan see them
inline void __pipeline_memcpy_async(void* to, const void* from, std::size_t bytes, CUDA_EMULATION_CALLER) {
  if ((bytes != 4 && bytes != 8 && bytes != 16) ||
      (reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from)) % bytes != 0) {
    ::cuda_emulation::fail(::cuda_emulation::Place{"__pipeline_memcpy_async", file, line}.text() + ": size or alignment");
  }
  const ::cuda_emulation::AsyncCopy copy{static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes};
  for (std::size_t i = 0; i < bytes; ++i) {
    copy.to[i] = 0xff;  // it may land from now on
  }
  ::cuda_emulation::machine().current->copies.back().push_back(copy);
}
inline void __pipeline_commit() { ::cuda_emulation::machine().current->copies.emplace_back(); }
inline void __pipeline_wait_prior(std::size_t groups) {
  auto& copies = ::cuda_emulation::machine().current->copies;
  while (copies.size() > groups + 1) {
    for (const ::cuda_emulation::AsyncCopy& copy : copies.front()) {
      for (std::size_t i = 0; i < copy.bytes; ++i) {
        copy.to[i] = copy.from[i];
      }
    }
    copies.pop_front();
  }
}

// ---- fp16 values and matrix products
struct __half {
  std::uint16_t bits;
};

namespace cuda_emulation {

inline float float_of(__half half) {
  const unsigned exponent = half.bits >> 10 & 31, fraction = half.bits & 1023;
  const float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                          : std::ldexp(static_cast<float>(fraction | 1024), static_cast<int>(exponent) - 25);
  return half.bits >> 15 ? -magnitude : magnitude;
}

inline double towards_zero(double sum) {  // to the 24 bits of a float
  std::uint64_t bits;
  std::memcpy(&bits, &sum, sizeof bits);
  bits &= ~std::uint64_t{0x1fffffff};
  std::memcpy(&sum, &bits, sizeof sum);
  return sum;
}

}  // namespace cuda_emulation

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
  static_assert(M == 16 && N == 16 && K == 16);
  static constexpr int num_elements = 8;
  T x[num_elements];
};

namespace detail {

// The element (row * 16 + column) that place i of a lane holds.
inline int element(unsigned lane, int i) { return i * 32 + static_cast<int>(lane * 5 + i * 7) % 32; }

inline void same_matrix(::cuda_emulation::Arrival* lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    lanes[lane].result = lanes[lane].value == lanes[0].value && lanes[lane].lane == lanes[0].lane;
  }
}

template <typename T>
void check(const T* matrix, unsigned stride, ::cuda_emulation::Place here) {
  const auto address = reinterpret_cast<std::uintptr_t>(matrix);
  if (address % 32 != 0 || stride * sizeof(T) % 16 != 0) {
    ::cuda_emulation::fail(here.text() + ": the matrix must be aligned to 32 bytes, its stride to 16");
  }
  if (!::cuda_emulation::warp_function(0xffffffffu, address, stride, same_matrix, here)) {
    ::cuda_emulation::fail(here.text() + ": lanes pass different matrices");
  }
}

using A = fragment<matrix_a, 16, 16, 16, __half, row_major>;
using B = fragment<matrix_b, 16, 16, 16, __half, col_major>;
using C = fragment<accumulator, 16, 16, 16, float>;
struct Operands {
  const A* a;
  const B* b;
  const C* c;
  C* sum;
};

CUDA_EMULATION_INTERNAL inline void multiply(::cuda_emulation::Arrival* lanes) {
  double a[256], b[256], sum[256];  // row-major all of them
  for (unsigned lane = 0; lane < 32; ++lane) {
    const auto* operands = reinterpret_cast<const Operands*>(lanes[lane].value);
    for (int i = 0; i < 8; ++i) {
      const int e = element(lane, i);
      a[e] = ::cuda_emulation::float_of(operands->a->x[i]);
      b[e] = ::cuda_emulation::float_of(operands->b->x[i]);
      sum[e] = operands->c->x[i];
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 16; ++column) {
        double& s = sum[row * 16 + column];
        s = ::cuda_emulation::towards_zero(s + a[row * 16 + k] * b[k * 16 + column]);
      }
    }
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    const auto* operands = reinterpret_cast<const Operands*>(lanes[lane].value);
    for (int i = 0; i < 8; ++i) {
      operands->sum->x[i] = static_cast<float>(sum[element(lane, i)]);
    }
  }
}

}  // namespace detail

inline void fill_fragment(detail::C& fragment, float value) { std::fill_n(fragment.x, 8, value); }

template <typename Use, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, __half, Layout>& to, const __half* matrix, unsigned stride,
                      CUDA_EMULATION_CALLER) {
  detail::check(matrix, stride, {"wmma::load_matrix_sync", file, line});
  for (int i = 0; i < 8; ++i) {
    const int e = detail::element(::cuda_emulation::lane_of_caller(), i), row = e / 16, column = e % 16;
    to.x[i] = std::is_same_v<Layout, col_major> ? matrix[column * stride + row] : matrix[row * stride + column];
  }
}

inline void store_matrix_sync(float* matrix, const detail::C& from, unsigned stride, layout_t layout,
                              CUDA_EMULATION_CALLER) {
  detail::check(matrix, stride, {"wmma::store_matrix_sync", file, line});
  for (int i = 0; i < 8; ++i) {
    const int e = detail::element(::cuda_emulation::lane_of_caller(), i), row = e / 16, column = e % 16;
    matrix[layout == mem_col_major ? column * stride + row : row * stride + column] = from.x[i];
  }
}

inline void mma_sync(detail::C& sum, const detail::A& a, const detail::B& b, const detail::C& c, CUDA_EMULATION_CALLER) {
  const detail::Operands operands{&a, &b, &c, &sum};
  ::cuda_emulation::warp_function(0xffffffffu, reinterpret_cast<std::uintptr_t>(&operands), 0, detail::multiply,
                                  {"wmma::mma_sync", file, line});
}

}  // namespace nvcuda::wmma
