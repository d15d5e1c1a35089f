// XLA's calls of the cells' kernels: arrays checked, replicas and slices of the batch given to threads.
//
// A cell's kernel is a library of its own, known here by a number. Any number of leading axes that vmap has added are
// replicas: each is sliced by itself, with its own parameters.

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
#include <string>
#include <unordered_map>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "call.h"
#include "xla/ffi/api/ffi.h"

namespace seqmnist {
namespace {

namespace ffi = ::xla::ffi;

std::mutex kernels_mutex;
std::unordered_map<int64_t, const Kernel*> kernels;

const Kernel* kernel_of(int64_t number) {
  const std::lock_guard<std::mutex> lock(kernels_mutex);
  const auto found = kernels.find(number);
  return found == kernels.end() ? nullptr : found->second;
}

// ---- Threads -----------------------------------------------------------------------------

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
void parallel_for(ffi::ThreadPool& pool, std::ptrdiff_t threads, std::ptrdiff_t count,
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

// ---- Arrays ------------------------------------------------------------------------------

// An array of a call: its name, where its place in Arrays is, the shape of one replica. Where it is optional it may be
// empty instead, which means not given or not wanted.
struct Field {
  const char* name;
  void (*put)(Arrays&, void*);
  std::vector<int64_t> shape;
  bool optional = false;
};
#define SEQMNIST_FIELD(name, ...) \
  Field { #name, [](Arrays& a, void* data) { a.name = static_cast<decltype(a.name)>(data); }, __VA_ARGS__ }

// A checked operand or result. Leading axes, which vmap has added, have the call's size, or 1 where all replicas share
// the array.
struct Operand {
  void (*put)(Arrays&, void*) = nullptr;
  char* data = nullptr;
  std::ptrdiff_t bytes = 0;             // of one replica
  std::vector<std::ptrdiff_t> strides;  // by leading axis, in replicas
};

class Call {
 public:
  // The sizes stand in lengths [batch], x [batch, time, features] and the carry [carries, batch, hidden].
  Call(ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t outputs, bool reverse) : args_(args), rets_(rets) {
    const auto x = args.get<ffi::AnyBuffer>(kX), carry = args.get<ffi::AnyBuffer>(kCarry);
    if (!x || !carry || x->dimensions().size() < 3 || carry->dimensions().size() < 3) {
      fail("x or the carry", "is missing or has too few axes");
      return;
    }
    const auto dims = x->dimensions(), units = carry->dimensions();
    const std::size_t n = dims.size() - 3;
    sizes = {dims[n], dims[n + 1], dims[n + 2], units[units.size() - 1], static_cast<int>(outputs), reverse};
    leading_.assign(dims.begin(), dims.begin() + n);
  }

  // Checks all arrays against their fields; gives whether they fit.
  bool bind(const std::vector<Field>& arg_fields, const std::vector<Field>& ret_fields) {
    if (!problem.empty()) return false;
    // Results always have the full leading axes.
    auto result = rets_.get<ffi::AnyBuffer>(0);
    if (!result || (*result)->dimensions().size() < leading_.size()) {
      fail(ret_fields[0].name, "has too few axes");
      return false;
    }
    for (std::size_t axis = 0; axis < leading_.size(); ++axis) leading_[axis] = (*result)->dimensions()[axis];
    replicas = std::accumulate(leading_.begin(), leading_.end(), int64_t{1}, std::multiplies<>());
    if (args_.size() != arg_fields.size() || rets_.size() != ret_fields.size()) {
      fail("the call", "has another number of arrays");
      return false;
    }
    for (std::size_t i = 0; i < arg_fields.size(); ++i) bind_one(arg_fields[i], *args_.get<ffi::AnyBuffer>(i));
    for (std::size_t i = 0; i < ret_fields.size(); ++i) {
      const ffi::AnyBuffer buffer = **rets_.get<ffi::AnyBuffer>(i);  // a view; what it is taken from ends here
      bind_one(ret_fields[i], buffer);
      prefer_huge_pages(buffer.untyped_data(), buffer.size_bytes());
    }
    return problem.empty();
  }

  Arrays arrays(std::ptrdiff_t replica) const {
    Arrays a{};
    for (const Operand& operand : operands_) {
      if (operand.bytes == 0) continue;
      std::ptrdiff_t offset = 0, rest = replica;
      for (std::size_t axis = leading_.size(); axis-- > 0; rest /= leading_[axis])
        offset += rest % leading_[axis] * operand.strides[axis];
      operand.put(a, operand.data + offset * operand.bytes);
    }
    return a;
  }

  ffi::Error invalid() const { return ffi::Error(ffi::ErrorCode::kInvalidArgument, "seqmnist_jax.rnn: " + problem); }

  static constexpr std::size_t kX = 3, kCarry = 4;
  Sizes sizes{};
  std::ptrdiff_t replicas = 0;
  std::string problem;

 private:
  void fail(const std::string& name, const std::string& what) {
    if (problem.empty()) problem = name + " " + what;
  }

  void bind_one(const Field& field, const ffi::AnyBuffer& buffer) {
    const auto dims = buffer.dimensions();
    const auto type = std::string(field.name) == "lengths" ? ffi::DataType::S32 : ffi::DataType::F32;
    if (buffer.element_type() != type) return fail(field.name, "has the wrong dtype");
    if (dims.size() != leading_.size() + field.shape.size()) return fail(field.name, "has the wrong number of axes");
    Operand operand;
    operand.put = field.put;
    operand.strides.assign(leading_.size(), 0);
    std::ptrdiff_t stride = 1, size = 1;
    for (std::size_t axis = leading_.size(); axis-- > 0;) {
      if (dims[axis] != 1 && dims[axis] != leading_[axis]) return fail(field.name, "has another number of replicas");
      if (dims[axis] != 1) operand.strides[axis] = stride;
      stride *= dims[axis];
    }
    bool fits = true;
    for (std::size_t axis = 0; axis < field.shape.size(); ++axis) {
      size *= dims[leading_.size() + axis];
      fits &= dims[leading_.size() + axis] == field.shape[axis];
    }
    if (!fits && !(field.optional && size == 0)) return fail(field.name, "has a shape that does not fit the others");
    operand.data = static_cast<char*>(buffer.untyped_data());
    operand.bytes = size * 4;
    operands_.push_back(operand);
  }

  // Large results in huge pages: XLA may hand out fresh memory at each call, and touching it in
  // small pages costs a tenth of the time.
  static void prefer_huge_pages(const void* data, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::size_t kHuge = 2u << 20;
    if (bytes < 2 * kHuge) return;
    const std::uintptr_t start = (reinterpret_cast<std::uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
    const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / kHuge * kHuge;
    if (end > start) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
  }

  ffi::RemainingArgs args_;
  ffi::RemainingRets rets_;
  std::vector<int64_t> leading_;
  std::vector<Operand> operands_;
};

// The values of x that stages read; or, where x is multiplied inside, the matrix that makes them.
std::vector<int64_t> input_shape(const Sizes& s, const Kernel& k) {
  if (k.front) return {s.features, k.inputs, s.hidden};
  return {s.batch, s.time, k.inputs, s.hidden};
}

// What both calls take first.
std::vector<Field> operand_fields(const Sizes& s, const Kernel& k) {
  return {SEQMNIST_FIELD(weights, {k.products, s.hidden, s.hidden}),
          SEQMNIST_FIELD(vectors, {k.vectors, s.hidden}),
          SEQMNIST_FIELD(inputs, input_shape(s, k)),
          SEQMNIST_FIELD(x, {s.batch, s.time, k.front ? s.features : k.features}),
          SEQMNIST_FIELD(carry, {k.carries, s.batch, s.hidden}),
          SEQMNIST_FIELD(lengths, {s.batch})};
}

std::vector<int64_t> output_shape(const Sizes& s, const Kernel& k) {
  if (s.outputs == kAll) return {s.batch, s.time, k.outputs, s.hidden};
  return {s.outputs == kLast ? s.batch : 0, k.outputs, s.hidden};
}

std::vector<int64_t> kept_shape(const Sizes& s, const Kernel& k) {
  return {s.time, s.batch, (s.hidden + kPadding - 1) / kPadding * kPadding, k.kept};
}

std::vector<Field> operator+(std::vector<Field> a, const std::vector<Field>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

ffi::Error unknown() {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "seqmnist_jax.rnn: the cell's kernel is not loaded");
}

template <class Work>
ffi::Error guarded(Work&& work) {
  try {
    work();
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, std::string("seqmnist_jax.rnn: ") + error.what());
  }
  return ffi::Error::Success();
}

ffi::Error forward(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t number,
                   int64_t outputs, bool reverse) {
  const Kernel* kernel = kernel_of(number);
  if (!kernel) return unknown();
  Call call(args, rets, outputs, reverse);
  const Sizes& s = call.sizes;
  if (!call.bind(operand_fields(s, *kernel), {SEQMNIST_FIELD(end, {kernel->carries, s.batch, s.hidden}),
                                              SEQMNIST_FIELD(outputs, output_shape(s, *kernel)),
                                              SEQMNIST_FIELD(kept, kept_shape(s, *kernel), true)}))
    return call.invalid();
  const std::ptrdiff_t threads = std::max<std::ptrdiff_t>(1, pool.num_threads());
  const Slices slices(call.replicas, s.batch, threads, kernel->tile_rows);
  return guarded([&] {
    parallel_for(pool, threads, call.replicas * slices.per_replica, [&](std::ptrdiff_t i) {
      const std::ptrdiff_t first = i % slices.per_replica * slices.rows;
      kernel->forward(s, call.arrays(i / slices.per_replica), first, std::min(slices.rows, s.batch - first));
    });
  });
}

ffi::Error backward(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t number,
                    int64_t outputs, bool reverse) {
  const Kernel* kernel = kernel_of(number);
  if (!kernel) return unknown();
  Call call(args, rets, outputs, reverse);
  const Sizes& s = call.sizes;
  if (!call.bind(operand_fields(s, *kernel) +
                     std::vector<Field>{SEQMNIST_FIELD(kept, kept_shape(s, *kernel)),
                                        SEQMNIST_FIELD(d_end, {kernel->carries, s.batch, s.hidden}),
                                        SEQMNIST_FIELD(d_outputs, output_shape(s, *kernel))},
                 {SEQMNIST_FIELD(d_carry, {kernel->carries, s.batch, s.hidden}),
                  SEQMNIST_FIELD(d_inputs, input_shape(s, *kernel)),
                  SEQMNIST_FIELD(d_weights, {kernel->products, s.hidden, s.hidden}),
                  SEQMNIST_FIELD(sums, {kernel->sums, s.hidden}),
                  SEQMNIST_FIELD(d_x, {s.batch, s.time, s.features}, true)}))
    return call.invalid();
  const std::ptrdiff_t threads = std::max<std::ptrdiff_t>(1, pool.num_threads());
  const Slices slices(call.replicas, s.batch, threads, kernel->tile_rows);
  return guarded([&] {
    std::vector<std::unique_ptr<Scratch>> shares(call.replicas * slices.per_replica);
    parallel_for(pool, threads, call.replicas * slices.per_replica, [&](std::ptrdiff_t i) {
      const std::ptrdiff_t first = i % slices.per_replica * slices.rows;
      shares[i] = std::make_unique<Scratch>(kernel->share(s), true);
      kernel->backward(s, call.arrays(i / slices.per_replica), first, std::min(slices.rows, s.batch - first),
                       shares[i]->get());
    });
    parallel_for(pool, threads, call.replicas, [&](std::ptrdiff_t replica) {
      std::vector<const float*> of_replica;
      for (std::ptrdiff_t i = 0; i < slices.per_replica; ++i)
        of_replica.push_back(shares[replica * slices.per_replica + i]->get());
      kernel->finish(s, call.arrays(replica), of_replica.data(), slices.per_replica);
    });
  });
}

}  // namespace
}  // namespace seqmnist

// Makes a cell's kernel known by a number.
extern "C" void seqmnist_add(int64_t number, const seqmnist::Kernel* kernel) {
  const std::lock_guard<std::mutex> lock(seqmnist::kernels_mutex);
  seqmnist::kernels[number] = kernel;
}

#define SEQMNIST_BINDING                       \
  xla::ffi::Ffi::Bind()                        \
      .Ctx<xla::ffi::ThreadPool>()             \
      .RemainingArgs()                         \
      .RemainingRets()                         \
      .Attr<int64_t>("kernel")                 \
      .Attr<int64_t>("outputs")                \
      .Attr<bool>("reverse")

XLA_FFI_DEFINE_HANDLER_SYMBOL(seqmnist_forward, seqmnist::forward, SEQMNIST_BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(seqmnist_backward, seqmnist::backward, SEQMNIST_BINDING);
