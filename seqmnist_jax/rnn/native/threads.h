// Work for the threads of XLA's pool, and how a batch is cut for them.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace seqmnist {

// Numbers below 2^-126 would cost hundreds of cycles each.
class FlushDenormals {
#if defined(__SSE__)
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
 public:
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (1u << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

// work(0) .. work(count - 1) on the calling thread and those of XLA's pool that come to help.
// The caller never waits for a helper that has not begun, so a busy pool can't stop it.
inline void parallel_for(::xla::ffi::ThreadPool& pool, std::ptrdiff_t threads, std::ptrdiff_t count,
                         const std::function<void(std::ptrdiff_t)>& work) {
  struct Shared {
    std::atomic<std::ptrdiff_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
    std::exception_ptr error;
  };
  auto shared = std::make_shared<Shared>();
  // A helper that comes late finds nothing left, and does not touch `work`, which may be gone.
  auto help = [shared, count, &work] {
    const FlushDenormals flush;
    for (std::ptrdiff_t i; (i = shared->next.fetch_add(1)) < count;) {
      std::exception_ptr error;
      try {
        work(i);
      } catch (...) {
        error = std::current_exception();
      }
      const std::lock_guard<std::mutex> lock(shared->mutex);
      if (error) shared->error = error;
      if (shared->done.fetch_add(1) + 1 == count) shared->all_done.notify_one();
    }
  };
  for (std::ptrdiff_t i = 1; i < std::min(threads, count); ++i) pool.Schedule([help] { help(); });
  help();
  for (int i = 0; i < 20000 && shared->done.load() < count; ++i) {
#if defined(__SSE__)
    _mm_pause();
#endif
  }
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_done.wait(lock, [&] { return shared->done.load() == count; });
  if (shared->error) std::rethrow_exception(shared->error);
}

// How a batch is cut: all slices of all replicas should keep all threads busy to the end, fill
// the product's tiles, and leave room in the caches.
struct Slices {
  std::ptrdiff_t per_replica, rows;

  Slices(std::ptrdiff_t replicas, std::ptrdiff_t batch, std::ptrdiff_t threads, std::ptrdiff_t tile_rows) {
    constexpr std::ptrdiff_t kMostRows = 64;
    // A multiple of this gives every thread as many slices as the others.
    const std::ptrdiff_t even = std::max<std::ptrdiff_t>(1, threads / std::gcd(replicas, threads));
    std::ptrdiff_t wanted = even;
    while ((batch + wanted - 1) / wanted > kMostRows) wanted += even;
    rows = (batch + wanted - 1) / wanted;
    rows = (rows + tile_rows - 1) / tile_rows * tile_rows;
    rows = std::max<std::ptrdiff_t>(1, std::min(rows, batch));
    per_replica = (batch + rows - 1) / rows;
  }
};

}  // namespace seqmnist
