// Runs CUDA C++ kernels on the CPU: a fiber for each thread of a block, and one block after the other.
//
// It knows what the kernels of csrc/cuda use and no more: blocks and warps, dynamic shared memory, __syncthreads, __syncwarp,
// __shfl_xor_sync, __all_sync, float4 and its kin. It reports
//   - threads that wait for ever, and what each waits for;
//   - a __syncthreads that not all threads reach at the same line; warp functions that meet different ones;
//   - a lane that has returned, or that calls with a mask it is not in;
//   - launches that a device would refuse, and an array of 16 bytes that is not aligned (under UBSan).
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

struct Fiber {
  ucontext_t context{};
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#endif
  uint3 thread{};
  unsigned index = 0;
  bool done = false;
  std::string waits_for;  // empty: for nothing
  void* stack = nullptr;
  void* tsan = nullptr;
  bool ignored = false;  // by TSan, since it ended
};

// What a lane brought to a function of its warp.
struct Arrival {
  bool waiting = false;
  unsigned mask = 0;
  std::string where;
  std::uint64_t value = 0, result = 0;
};

struct Machine {
  dim3 grid, block;
  uint3 block_index{};
  std::vector<Fiber> fibers;
  std::vector<Arrival> arrivals;  // one per thread
  std::deque<unsigned> runnable;
  unsigned live = 0, at_barrier = 0;
  std::string barrier;
  Fiber scheduler;
  Fiber* current = nullptr;
  unsigned char* shared = nullptr;
  std::function<void()> kernel;
  std::string error;
  std::string order;
  std::mt19937 random;
  char started = 0, finished = 0;  // addresses that TSan orders by
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

CUDA_EMULATION_INTERNAL inline void wake(std::vector<unsigned> indices) {
  Machine& m = machine();
  if (m.order == "reverse") {
    std::reverse(indices.begin(), indices.end());
  } else if (m.order != "forward") {
    std::shuffle(indices.begin(), indices.end(), m.random);
  }
  for (const unsigned index : indices) {
    m.fibers[index].waits_for.clear();
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

inline std::string place(const char* function, const char* file, int line) {
  const char* name = std::strrchr(file, '/');
  return std::string(function) + " at " + (name ? name + 1 : file) + ":" + std::to_string(line);
}

// ---- barriers and warp functions
CUDA_EMULATION_INTERNAL inline void open_barrier() {
  Machine& m = machine();
  m.at_barrier = 0;
  m.barrier.clear();
  std::vector<unsigned> waiting;
  for (const Fiber& fiber : m.fibers) {
    if (!fiber.done) {
      waiting.push_back(fiber.index);
    }
  }
  wake(waiting);
}

CUDA_EMULATION_INTERNAL inline void barrier(const char* file, int line) {
  const Untracked untracked;
  Machine& m = machine();
  const std::string here = place("__syncthreads", file, line);
  if (m.at_barrier > 0 && m.barrier != here) {
    fail(here + " meets " + m.barrier);
  }
  m.barrier = m.current->waits_for = here;
  release(&m.barrier);
  if (++m.at_barrier == m.live) {
    open_barrier();
  }
  yield();
  acquire(&m.barrier);
}

using Combine = void (*)(Arrival* lanes, unsigned mask);

// All lanes of `mask` arrive, at the same line; the last one has `combine` give each its result.
CUDA_EMULATION_INTERNAL inline std::uint64_t warp_function(unsigned mask, std::uint64_t value, Combine combine,
                                                           const char* function, const char* file, int line) {
  const Untracked untracked;
  Machine& m = machine();
  Fiber& me = *m.current;
  const std::string here = place(function, file, line);
  const unsigned lane = me.index % 32, first = me.index - lane;
  Arrival* lanes = &m.arrivals[first];
  if (!(mask >> lane & 1)) {
    fail(here + ": the calling lane is not in its mask");
  }
  lanes[lane] = {true, mask, here, value, 0};
  std::vector<unsigned> members;
  bool complete = true;
  for (unsigned other = 0; other < 32; ++other) {
    if (!(mask >> other & 1)) {
      continue;
    }
    if (first + other >= m.fibers.size() || m.fibers[first + other].done) {
      fail(here + ": the mask has a lane that has returned");
    }
    members.push_back(first + other);
    if (!lanes[other].waiting) {
      complete = false;
    } else if (lanes[other].where != here || lanes[other].mask != mask) {
      fail(here + " meets " + lanes[other].where);
    }
  }
  me.waits_for = here;
  if (complete) {
    combine(lanes, mask);
    for (const unsigned member : members) {
      m.arrivals[member].waiting = false;
    }
    wake(members);
  }
  yield();
  return lanes[lane].result;
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
  for (const Fiber& fiber : machine().fibers) {
    ++counts[fiber.done ? "returned" : "wait for " + fiber.waits_for];
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
  void* shared = nullptr;  // of its own for each block: to TSan, blocks share nothing but global memory
  if (shared_bytes > 0 && posix_memalign(&shared, 128, shared_bytes) != 0) {
    std::abort();
  }
  std::memset(shared, 0xff, shared_bytes);
  m.shared = static_cast<unsigned char*>(shared);
  m.live = static_cast<unsigned>(m.fibers.size());
  m.at_barrier = 0;
  m.barrier.clear();
  m.runnable.clear();
  m.arrivals.assign(m.fibers.size() + 32, {});
  std::vector<unsigned> indices;
  for (unsigned i = 0; i < m.fibers.size(); ++i) {
    Fiber& fiber = m.fibers[i];
    fiber.index = i;
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
  if (m.fibers.size() < threads) {
    m.fibers.resize(threads);
  }
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

inline void __syncthreads(CUDA_EMULATION_CALLER) { ::cuda_emulation::barrier(file, line); }

inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_EMULATION_CALLER) {
  ::cuda_emulation::Machine& m = ::cuda_emulation::machine();
  void* warp = &m.arrivals[m.current->index / 32 * 32];
  ::cuda_emulation::release(warp);
  ::cuda_emulation::warp_function(mask, 0, [](::cuda_emulation::Arrival*, unsigned) {}, "__syncwarp", file, line);
  ::cuda_emulation::acquire(warp);
}

template <int kXor>
inline void cuda_emulation_exchange(::cuda_emulation::Arrival* lanes, unsigned mask) {
  for (unsigned lane = 0; lane < 32; ++lane) {
    // What a lane outside the mask holds is undefined.
    lanes[lane].result = mask >> (lane ^ kXor) & 1 ? lanes[lane ^ kXor].value : ~std::uint64_t{0};
  }
}

template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int with, CUDA_EMULATION_CALLER) {
  static_assert(sizeof(T) <= 8);
  constexpr ::cuda_emulation::Combine kExchange[] = {cuda_emulation_exchange<1>, cuda_emulation_exchange<2>,
                                                     cuda_emulation_exchange<4>, cuda_emulation_exchange<8>,
                                                     cuda_emulation_exchange<16>};
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = ::cuda_emulation::warp_function(mask, bits, kExchange[__builtin_ctz(with)], "__shfl_xor_sync", file, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int __all_sync(unsigned mask, int predicate, CUDA_EMULATION_CALLER) {
  const auto combine = [](::cuda_emulation::Arrival* lanes, unsigned all) {
    bool result = true;
    for (unsigned lane = 0; lane < 32; ++lane) {
      result = result && (!(all >> lane & 1) || lanes[lane].value != 0);
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
      lanes[lane].result = result;
    }
  };
  return ::cuda_emulation::warp_function(mask, predicate != 0, combine, "__all_sync", file, line) != 0;
}

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
