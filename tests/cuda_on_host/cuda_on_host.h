// Runs CUDA kernels on the CPU: launch.h includes this where the compiler is not nvcc.
//
// Each thread of a block is a fiber; the blocks run one after another. What a GPU leaves undefined is an error here, or NaN:
// a barrier or shuffle that not all of its threads reach, a shuffle from a lane that takes no part, shared memory that nobody
// wrote. CUDA_ON_HOST_ORDER=reverse runs the threads from last to first, so that a missing barrier shows in one order or the
// other.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __syncthreads() ::hubert_ecg::host::block().wait(-1, ~0ull)
#define __syncwarp(...) ::hubert_ecg::host::block().sync_warp(::hubert_ecg::host::mask(__VA_ARGS__))
#define __shfl_xor_sync(mask, value, lanes) ::hubert_ecg::host::shuffle(mask, value, ::hubert_ecg::host::lane() ^ (lanes))
#define __shfl_sync(mask, value, from) ::hubert_ecg::host::shuffle(mask, value, from)
#define __shfl_down_sync(mask, value, by) ::hubert_ecg::host::shuffle_along(mask, value, int(by))
#define __shfl_up_sync(mask, value, by) ::hubert_ecg::host::shuffle_along(mask, value, -int(by))
#define threadIdx (::hubert_ecg::host::block().fiber->thread)
#define blockIdx (::hubert_ecg::host::block().index)
#define blockDim (::hubert_ecg::host::block().dim)
#define gridDim (::hubert_ecg::host::block().grid)
#define HUBERT_ECG_SHARED(T, name) T* const name = reinterpret_cast<T*>(::hubert_ecg::host::block().shared)
#define HUBERT_ECG_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                       \
  ::hubert_ecg::host::launch(reinterpret_cast<void*>(kernel), grid, block, shared_bytes, [&] {  \
    kernel(__VA_ARGS__);                                                                        \
  })
#define __ballot_sync(mask, predicate) ::hubert_ecg::host::ballot(mask, predicate)
#define __pipeline_memcpy_async(to, from, bytes) ::hubert_ecg::host::block().copy_later(to, from, bytes)
#define __pipeline_commit() ::hubert_ecg::host::block().commit_copies()
#define __pipeline_wait_prior(batches) ::hubert_ecg::host::block().finish_copies(batches)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(int(bits)); }
inline unsigned __brev(unsigned bits) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (bits >> bit & 1) << (31 - bit);
  return reversed;
}

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidConfiguration = 9;

namespace hubert_ecg {
namespace host {

inline cudaError_t last_error = cudaSuccess;

// An asynchronous copy arrives as late as it may: when its thread waits for it.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

// Where a thread of execution goes on. swapcontext would ask the system for the signal mask at each turn.
struct Place {
  ucontext_t first;
  void* next[5];
  bool begun = false;
};

__attribute__((noinline)) inline void go(Place& from, Place& to) {
  if (__builtin_setjmp(from.next)) return;
  from.begun = true;
  if (to.begun) __builtin_longjmp(to.next, 1);
  setcontext(&to.first);
}

struct Fiber {
  Place place;
  dim3 thread;
  int number;
  bool done;
  std::vector<Copy> open;                  // not committed yet
  std::vector<std::vector<Copy>> batches;  // committed, not waited for
};

// Threads that meet: those of a block (warp -1), or those of a warp that a mask names.
struct Meeting {
  uint64_t mask;
  int arrived = 0;
  int64_t generation = 0;
};

struct Block {
  dim3 index, dim, grid;
  unsigned char* shared = nullptr;
  Fiber* fiber = nullptr;
  int size = 0;
  bool progress = false;
  std::string failure;
  Place scheduler;
  std::deque<Meeting> meetings[33];  // of the block, then of each warp; nearly always by one mask
  std::vector<uint64_t> slots;  // a value of each thread, for the shuffles

  [[noreturn]] void fail(const std::string& why) {
    failure = why + " (thread " + std::to_string(fiber->number) + " of block " + std::to_string(index.x) + ")";
    go(fiber->place, scheduler);
    std::abort();
  }

  static Meeting& meeting_of(std::deque<Meeting>& known, uint64_t mask) {
    for (Meeting& meeting : known)
      if (meeting.mask == mask) return meeting;
    known.push_back({mask});
    return known.back();
  }

  void wait(int warp, uint64_t mask) {
    int expected = size;
    if (warp >= 0) expected = __builtin_popcountll(mask);
    Meeting& meeting = meeting_of(meetings[warp + 1], mask);
    progress = true;
    if (++meeting.arrived == expected) {
      meeting.arrived = 0;
      ++meeting.generation;
      return;
    }
    for (const int64_t generation = meeting.generation; generation == meeting.generation;)
      go(fiber->place, scheduler);
    progress = true;
  }

  void copy_later(void* to, const void* from, size_t bytes) {
    if (bytes != 4 && bytes != 8 && bytes != 16) fail("an asynchronous copy is not of 4, 8 or 16 bytes");
    if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
      fail("an asynchronous copy is not aligned to its size");
    fiber->open.push_back({to, from, bytes});
  }

  void commit_copies() {
    fiber->batches.emplace_back();
    fiber->batches.back().swap(fiber->open);
  }

  void finish_copies(size_t but) {
    std::vector<std::vector<Copy>>& batches = fiber->batches;
    while (batches.size() > but) {
      for (const Copy& copy : batches.front()) std::memcpy(copy.to, copy.from, copy.bytes);
      batches.erase(batches.begin());
    }
  }

  void sync_warp(uint64_t mask) {
    if (!(mask >> (fiber->number % 32) & 1)) fail("a thread calls a warp function whose mask leaves it out");
    wait(fiber->number / 32, mask);
  }
};

inline Block*& current() {
  static Block* running = nullptr;
  return running;
}
inline Block& block() { return *current(); }
inline int lane() { return block().fiber->number % 32; }
inline uint64_t mask(uint64_t given = 0xffffffffu) { return given; }

template <class T>
T shuffle(uint64_t mask, T value, int from) {
  static_assert(sizeof(T) <= 8);
  Block& b = block();
  const int warp = b.fiber->number / 32;
  if (from < 0 || from > 31 || !(mask >> from & 1)) b.fail("a shuffle reads a lane that takes no part");
  std::memcpy(&b.slots[b.fiber->number], &value, sizeof value);
  b.sync_warp(mask);
  std::memcpy(&value, &b.slots[warp * 32 + from], sizeof value);
  b.sync_warp(mask);
  return value;
}

// Up and down: a lane beyond the end of the warp keeps its own value.
template <class T>
T shuffle_along(uint64_t mask, T value, int by) {
  const int from = lane() + by;
  return shuffle(mask, value, from < 0 || from > 31 ? lane() : from);
}

inline unsigned ballot(uint64_t mask, bool predicate) {
  Block& b = block();
  b.slots[b.fiber->number] = predicate;
  b.sync_warp(mask);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) votes |= unsigned(b.slots[b.fiber->number / 32 * 32 + lane] & 1) << lane;
  b.sync_warp(mask);
  return votes;
}

// Dynamic shared memory that kernels have asked for beyond 48 KiB.
inline std::map<void*, size_t>& allowed_shared() {
  static std::map<void*, size_t> bytes;
  return bytes;
}
constexpr size_t kMostShared = 227 << 10;

template <class Kernel>
struct Entry {
  static const Kernel* kernel;
  static void run() {
    (*kernel)();
    block().fiber->done = true;
    block().progress = true;
    go(block().fiber->place, block().scheduler);
  }
};
template <class Kernel>
const Kernel* Entry<Kernel>::kernel;

template <class Kernel>
void launch(void* function, dim3 grid, dim3 dim, size_t shared_bytes, const Kernel& kernel) {
  constexpr size_t kStack = 256 << 10;
  const size_t allowed = std::max<size_t>(48 << 10, allowed_shared()[function]);
  const size_t threads = size_t(dim.x) * dim.y * dim.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0 || threads > 1024 || shared_bytes > allowed) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  const char* const order = std::getenv("CUDA_ON_HOST_ORDER");
  const bool reverse = order && std::string(order) == "reverse";
  // Of all launches, as long as the largest wants.
  static std::unique_ptr<unsigned char[]> stacks;
  static size_t num_stacks = 0;
  if (threads > num_stacks) stacks.reset(new unsigned char[(num_stacks = threads) * kStack]);
  std::vector<Fiber> fibers(threads);
  Entry<Kernel>::kernel = &kernel;
  for (uint64_t at = 0; at < uint64_t(grid.x) * grid.y * grid.z; ++at) {
    Block b;
    // Of the exact size, so that a sanitizer sees an access beyond it.
    void* raw = nullptr;
    if (posix_memalign(&raw, 32, shared_bytes)) throw std::bad_alloc();
    const std::unique_ptr<unsigned char, void (*)(void*)> shared(static_cast<unsigned char*>(raw), std::free);
    std::memset(shared.get(), 0xff, shared_bytes);
    b.shared = shared.get();
    b.grid = grid;
    b.dim = dim;
    b.index = dim3(at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y);
    b.size = int(threads);
    b.slots.resize((threads + 31) / 32 * 32);
    current() = &b;
    for (size_t t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[t];
      fiber.thread = dim3(t % dim.x, t / dim.x % dim.y, t / dim.x / dim.y);
      fiber.number = int(t);
      fiber.done = false;
      fiber.open.clear();
      fiber.batches.clear();
      ucontext_t& first = fiber.place.first;
      fiber.place.begun = false;
      getcontext(&first);
      first.uc_stack.ss_sp = stacks.get() + t * kStack;
      first.uc_stack.ss_size = kStack;
      first.uc_link = nullptr;
      makecontext(&first, Entry<Kernel>::run, 0);
    }
    for (size_t left = threads; left > 0;) {
      b.progress = false;
      left = 0;
      for (size_t t = 0; t < threads; ++t) {
        b.fiber = &fibers[reverse ? threads - 1 - t : t];
        if (!b.fiber->done) go(b.scheduler, b.fiber->place);
        if (!b.failure.empty()) throw std::runtime_error("cuda_on_host: " + b.failure);
        left += !b.fiber->done;
      }
      if (left && !b.progress)
        throw std::runtime_error("cuda_on_host: threads wait at a barrier or shuffle that the others never reach");
    }
  }
}

}  // namespace host

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = host::last_error;
  host::last_error = cudaSuccess;
  return error;
}

// Reaches Python as RuntimeError.
inline void check_cuda(const char* op, cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(op) + ": invalid configuration argument");
}

// Few, so that blocks go round more than once.
inline int num_multiprocessors() { return 2; }
inline int most_shared_bytes() { return host::kMostShared; }

template <class Kernel>
void allow_shared(const char* op, Kernel* kernel, size_t bytes) {
  if (bytes > host::kMostShared) check_cuda(op, cudaErrorInvalidConfiguration);
  host::allowed_shared()[reinterpret_cast<void*>(kernel)] = bytes;
}

}  // namespace hubert_ecg

// Threads take turns at barriers only, so that any read and write between them is atomic.
template <class T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at = old + value;
  return old;
}

#include "numbers_on_host.h"
