// Starts kernels that NVRTC made, on XLA's stream. It needs no CUDA to be built: the driver is opened where it runs.
#include <dlfcn.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

struct CUstream_st;
using Stream = CUstream_st*;
using Kernel = void*;

constexpr int kMostPointers = 24, kSharedMemoryAttribute = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
struct Pointers {
  void* at[kMostPointers];
};

struct Driver {
  int (*init)(unsigned);
  int (*load)(void**, const void*, void*, void**, unsigned, void*, void**, unsigned);
  int (*find)(Kernel*, void*, const char*);
  int (*count)(int*);
  int (*device)(int*, int);
  int (*set)(int, int, Kernel, int);
  int (*launch)(Kernel, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream, void**, void**);
  std::string problem;

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (!library) {
      problem = dlerror();
      return;
    }
    auto get = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      if (!function) problem = std::string("the driver has no ") + name;
    };
    get(init, "cuInit");
    get(load, "cuLibraryLoadData");
    get(find, "cuLibraryGetKernel");
    get(count, "cuDeviceGetCount");
    get(device, "cuDeviceGet");
    get(set, "cuKernelSetAttribute");
    get(launch, "cuLaunchKernel");
    if (problem.empty() && init(0)) problem = "the driver does not start";
  }
};

Driver& driver() {
  static Driver it;
  return it;
}

std::mutex mutex;
std::map<int64_t, Kernel>& kernels() {
  static std::map<int64_t, Kernel> all;
  return all;
}

struct Failure : std::string {
  Failure(const char* what, int code) : std::string(std::string(what) + " failed with code " + std::to_string(code)) {}
};

ffi::Error launch(Stream stream, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t kernel, int64_t few_kernel,
                  int64_t few, int64_t tiles, int64_t blocks, int64_t threads, int64_t shared, int64_t few_shared, int64_t batch,
                  int64_t time, int64_t launches) {
  if (args.size() + rets.size() > kMostPointers) return ffi::Error::Internal("the recurrence has too many arrays");
  Pointers pointers{};
  int count = 0;
  for (size_t i = 0; i < args.size(); i++) pointers.at[count++] = args.get<ffi::AnyBuffer>(i)->untyped_data();
  for (size_t i = 0; i < rets.size(); i++) pointers.at[count++] = (*rets.get<ffi::AnyBuffer>(i))->untyped_data();
  // Axes that vmap adds stand in front of each array; to the kernel they are replicas. The first result has 3 of its own.
  int64_t replicas = 1;
  const auto dimensions = (*rets.get<ffi::AnyBuffer>(0))->dimensions();
  for (size_t axis = 0; axis + 3 < dimensions.size(); axis++) replicas *= dimensions[axis];
  if (replicas * batch == 0) return ffi::Error::Success();
  const bool is_few = replicas * batch <= few;
  Kernel found;
  {
    std::lock_guard<std::mutex> lock(mutex);
    found = kernels()[is_few ? few_kernel : kernel];
  }
  if (!found) return ffi::Error::Internal("a kernel of the recurrence is not loaded in this process");
  int sizes[3] = {static_cast<int>(batch), static_cast<int>(time), static_cast<int>(is_few ? 2 * tiles : tiles)};
  int one = 0;  // The last parameter, of a kernel that is launched several times.
  void* parameters[] = {&pointers, &sizes[0], &sizes[1], &sizes[2], &one};
  for (; one < launches; one++)
    if (int code = driver().launch(found, replicas * sizes[2] * blocks, 1, 1, threads, 1, 1, is_few ? few_shared : shared, stream,
                                   parameters, nullptr))
      return ffi::Error::Internal(Failure("cuLaunchKernel", code));
  return ffi::Error::Success();
}

}  // namespace

// Loads the kernel `name` of an image under a number; gives what went wrong, or null.
extern "C" const char* seqmnist_gpu_load(int64_t number, const char* image, const char* name, int shared) {
  static thread_local std::string problem;
  auto say = [&](std::string words) {
    problem = std::move(words);
    return problem.c_str();
  };
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (kernels()[number]) return nullptr;
  }
  // Nobody waits for the lock while the driver loads: it may wait for a device that waits for another one's launch.
  if (!driver().problem.empty()) return say(driver().problem);
  void* library = nullptr;
  Kernel kernel = nullptr;
  if (int code = driver().load(&library, image, nullptr, nullptr, 0, nullptr, nullptr, 0))
    return say(Failure("cuLibraryLoadData", code));
  if (int code = driver().find(&kernel, library, name)) return say(Failure("cuLibraryGetKernel", code));
  // Each device has its own. One that the kernel was not made for may refuse.
  int devices = 0, device = 0, refusal = 0, ready = 0;
  if (int code = driver().count(&devices)) return say(Failure("cuDeviceGetCount", code));
  for (int i = 0; i < devices; i++) {
    int code = driver().device(&device, i);
    if (!code) code = driver().set(kSharedMemoryAttribute, shared, kernel, device);
    if (code) refusal = code;
    else ready++;
  }
  if (!ready) return say(Failure("cuKernelSetAttribute", refusal));
  std::lock_guard<std::mutex> lock(mutex);
  kernels()[number] = kernel;
  return nullptr;
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(seqmnist_gpu_launch, launch,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<Stream>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("kernel")
                                  .Attr<int64_t>("few_kernel")
                                  .Attr<int64_t>("few")
                                  .Attr<int64_t>("tiles")
                                  .Attr<int64_t>("blocks")
                                  .Attr<int64_t>("threads")
                                  .Attr<int64_t>("shared")
                                  .Attr<int64_t>("few_shared")
                                  .Attr<int64_t>("batch")
                                  .Attr<int64_t>("time")
                                  .Attr<int64_t>("launches"),
                              {ffi::Traits::kCmdBufferCompatible});
