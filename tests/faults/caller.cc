// Calls the kernel as XLA does, but with memory and threads that a sanitizer can see.
//
// XLA hands out its arrays from one arena, where a write past an array's end lands in the next
// one, and its pool is not instrumented. Here each array is a heap block of exactly its size, and
// the pool's threads are made and joined by instrumented code.

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/c_api.h"

// XLA's names for what it leaves to its implementation.
struct XLA_FFI_Error {
  std::string message;
};

struct XLA_FFI_ExecutionContext {
  int64_t threads;
  bool late;  // Tasks begin only after the call has returned, as in a pool that was busy.
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::pair<XLA_FFI_Task*, void*>> tasks;
  bool returned = false;

  void work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex);
      changed.wait(lock, [&] { return returned || (!late && !tasks.empty()); });
      if (tasks.empty()) return;
      const auto [task, data] = tasks.front();
      tasks.pop_front();
      lock.unlock();
      task(data);
    }
  }
};

namespace {

XLA_FFI_Error* create_error(XLA_FFI_Error_Create_Args* args) { return new XLA_FFI_Error{args->message}; }
void get_message(XLA_FFI_Error_GetMessage_Args* args) { args->message = args->error->message.c_str(); }
void destroy_error(XLA_FFI_Error_Destroy_Args* args) { delete args->error; }

XLA_FFI_Error* schedule(XLA_FFI_ThreadPool_Schedule_Args* args) {
  const std::lock_guard<std::mutex> lock(args->ctx->mutex);
  args->ctx->tasks.emplace_back(args->task, args->data);
  args->ctx->changed.notify_one();
  return nullptr;
}

XLA_FFI_Error* num_threads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  *args->num_threads = args->ctx->threads;
  return nullptr;
}

const XLA_FFI_Api* api() {
  static const XLA_FFI_Api made = [] {
    XLA_FFI_Api api{};
    api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
    api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
    api.XLA_FFI_Error_Create = create_error;
    api.XLA_FFI_Error_GetMessage = get_message;
    api.XLA_FFI_Error_Destroy = destroy_error;
    api.XLA_FFI_ThreadPool_Schedule = schedule;
    api.XLA_FFI_ThreadPool_NumThreads = num_threads;
    return api;
  }();
  return &made;
}

// Heap blocks in place of a call's arrays.
class Blocks {
 public:
  Blocks(int64_t n, XLA_FFI_Buffer* arrays) : blocks_(arrays, arrays + n) {
    for (XLA_FFI_Buffer& block : blocks_) {
      void* theirs = block.data;
      block.data = std::malloc(bytes(block));
      std::memcpy(block.data, theirs, bytes(block));
      pointers_.push_back(&block);
    }
  }
  ~Blocks() {
    for (XLA_FFI_Buffer& block : blocks_) std::free(block.data);
  }
  void copy_to(XLA_FFI_Buffer* arrays) const {
    for (std::size_t i = 0; i < blocks_.size(); ++i) std::memcpy(arrays[i].data, blocks_[i].data, bytes(blocks_[i]));
  }
  void** pointers() { return pointers_.data(); }

 private:
  static std::size_t bytes(const XLA_FFI_Buffer& buffer) {
    std::size_t size = 4;  // float32 and int32
    for (int64_t axis = 0; axis < buffer.rank; ++axis) size *= buffer.dims[axis];
    return size;
  }
  std::vector<XLA_FFI_Buffer> blocks_;
  std::vector<void*> pointers_;
};

}  // namespace

// Calls `handler` on a pool of `threads`; gives 0, or 1 and the error's message.
extern "C" int seqmnist_call(XLA_FFI_Handler* handler, int64_t threads, bool late, int64_t n_args,
                             XLA_FFI_Buffer* args, int64_t n_rets, XLA_FFI_Buffer* rets, int64_t kernel,
                             int64_t outputs, bool reverse, char* message, std::size_t room) {
  Blocks in(n_args, args), out(n_rets, rets);
  std::vector<XLA_FFI_ArgType> arg_types(n_args, XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> ret_types(n_rets, XLA_FFI_RetType_BUFFER);
  // Sorted by name.
  const char* const names[] = {"kernel", "outputs", "reverse"};
  XLA_FFI_Scalar scalars[] = {
      {XLA_FFI_DataType_S64, &kernel}, {XLA_FFI_DataType_S64, &outputs}, {XLA_FFI_DataType_PRED, &reverse}};
  XLA_FFI_ByteSpan spans[3];
  XLA_FFI_ByteSpan* name_pointers[3];
  void* scalar_pointers[3];
  XLA_FFI_AttrType attr_types[3];
  for (int i = 0; i < 3; ++i) {
    spans[i] = {names[i], std::strlen(names[i])};
    name_pointers[i] = &spans[i];
    scalar_pointers[i] = &scalars[i];
    attr_types[i] = XLA_FFI_AttrType_SCALAR;
  }

  XLA_FFI_ExecutionContext context{threads, late};
  std::vector<std::thread> pool;
  for (int64_t i = 0; i < threads; ++i) pool.emplace_back([&] { context.work(); });

  XLA_FFI_CallFrame frame{};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = api();
  frame.ctx = &context;
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, n_args, arg_types.data(), in.pointers()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, n_rets, ret_types.data(), out.pointers()};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr, 3, attr_types, name_pointers, scalar_pointers};
  XLA_FFI_Error* error = handler(&frame);

  // The call has returned, so its results stand: reading them before the pool is joined lets a
  // sanitizer see a helper that still writes.
  out.copy_to(rets);
  {
    const std::lock_guard<std::mutex> lock(context.mutex);
    context.returned = true;
    context.changed.notify_all();
  }
  for (std::thread& thread : pool) thread.join();
  if (error == nullptr) return 0;
  std::snprintf(message, room, "%s", error->message.c_str());
  delete error;
  return 1;
}
