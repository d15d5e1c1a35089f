// The names of native/gpu/machine.h in plain C++: the kernels run on a CPU, a fibre a thread, one cluster after
// another.
//
// It shows what depends on indices, the layout of fragments and barriers: a warp runs as far ahead of the others as the
// barriers let it, or, with EMULATE_REVERSE set, in the other order, or in the order that the number EMULATE_SHUFFLE draws; shared memory that nobody wrote is no number; an
// asynchronous copy is made when it is waited for and not before; what is sent to another block arrives at once, or, with
// EMULATE_LATE set, when it is waited for. Memory is otherwise in order, and speed means nothing. What can't go on is
// told: `emulated::trouble`.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

typedef unsigned u32;
typedef unsigned short u16;
typedef unsigned long long u64;
struct float2 {
  float x, y;
};
struct uint2 {
  u32 x, y;
};
struct uint4 {
  u32 x, y, z, w;
};
#define DEVICE inline
#define __global__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define SHARED(name) char* name = emulated::me->block->shared

namespace emulated {

struct Barrier {
  int arrived = 0;
  unsigned turn = 0;
};
struct Warp {
  Barrier barrier;
  char slots[2][32][64];
};
struct Sent {
  char* to;
  char words[16];
  int bytes;
};
// An mbarrier that waits for one arrival and for bytes.
struct Arrivals {
  int pending = 1;
  long bytes = 0;
  unsigned turn = 0;
  std::vector<Sent> sent;
};
struct Block {
  alignas(128) char shared[1 << 18];
  Barrier all, pairs[16];
  std::map<u32, Arrivals> arrivals;
  std::vector<Warp> warps;
  unsigned index, rank;
};
struct Copy {
  u32 to;
  const void* from;
  int bytes;
};
struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  Block* block;
  Warp* warp;
  unsigned index;
  bool done = false;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};
inline Thread* me;
inline std::vector<std::unique_ptr<Block>> cluster;
inline Barrier whole;
inline int threads_of_cluster;
inline bool late;
inline unsigned long events;  // Barriers passed and threads that ended: none in a round of all warps means that all are stuck.
inline const char* trouble;
inline ucontext_t scheduler;
inline std::function<void()> body;

inline void pause() { swapcontext(&me->context, &scheduler); }
[[noreturn]] inline void stop(const char* why) {
  trouble = why;
  for (;;) pause();
}
inline void wait_for(Barrier& barrier, int all) {
  const unsigned turn = barrier.turn;
  if (++barrier.arrived == all) {
    barrier.arrived = 0;
    barrier.turn++;
    events++;
  }
  while (barrier.turn == turn) pause();
}
inline Arrivals& arrivals_at(u32 address, Block& block) {
  auto found = block.arrivals.find(address);
  if (found == block.arrivals.end()) stop("a barrier that is not made");
  return found->second;
}
inline void deliver(Arrivals& at) {
  for (const auto& one : at.sent) {
    std::memcpy(one.to, one.words, one.bytes);
    at.bytes -= one.bytes;
  }
  at.sent.clear();
  if (at.pending || at.bytes) return;
  at.pending = 1;
  at.turn++;
  events++;
}

// Every lane shows its value and sees those of all 32.
template <class T>
const char (*exchange(const T& mine))[64] {
  static_assert(sizeof(T) <= 64);
  Warp& warp = *me->warp;
  auto& slots = warp.slots[warp.barrier.turn & 1];
  std::memcpy(slots[me->index & 31], &mine, sizeof(T));
  wait_for(warp.barrier, 32);
  return slots;
}

inline void entry() {
  body();
  me->done = true;
  events++;
  pause();
}

// Runs `blocks` in clusters of `per_cluster`, with so many bytes of shared memory each; gives what went wrong, or null.
inline const char* launch(unsigned blocks, unsigned threads, unsigned per_cluster, unsigned bytes,
                          std::function<void()> kernel) {
  body = kernel;
  const bool reverse = std::getenv("EMULATE_REVERSE") != nullptr;
  const char* const shuffle = std::getenv("EMULATE_SHUFFLE");
  std::minstd_rand draw(shuffle ? std::atoi(shuffle) : 1);
  late = std::getenv("EMULATE_LATE") != nullptr;
  trouble = nullptr;
  for (unsigned first = 0; first < blocks; first += per_cluster) {
    std::vector<Thread> all(per_cluster * threads);
    cluster.clear();
    whole = Barrier();
    threads_of_cluster = per_cluster * threads;
    for (unsigned rank = 0; rank < per_cluster; rank++) {
      cluster.push_back(std::make_unique<Block>());
      Block* block = cluster.back().get();
      std::memset(block->shared, 0x7f, sizeof block->shared);
      block->warps.resize(threads / 32);
      block->index = first + rank;
      block->rank = rank;
      for (unsigned t = 0; t < threads; t++) {
        Thread& thread = all[rank * threads + t];
        thread.stack.resize(1 << 17);
        thread.block = block;
        thread.warp = &block->warps[t / 32];
        thread.index = t;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, entry, 0);
      }
    }
    std::vector<unsigned> order(all.size() / 32);
    for (unsigned w = 0; w < order.size(); w++) order[w] = reverse ? order.size() - 1 - w : w;
    for (bool any = true; any;) {
      any = false;
      const unsigned long so_far = events;
      if (shuffle) std::shuffle(order.begin(), order.end(), draw);
      for (unsigned w : order) {
        Thread* lanes = &all[32 * w];
        for (unsigned long before = ~0ul; events != before;) {
          before = events;
          for (unsigned l = 0; l < 32; l++) {
            if (lanes[l].done) continue;
            any = true;
            me = &lanes[l];
            swapcontext(&scheduler, &me->context);
          }
        }
      }
      if (any && events == so_far && !trouble) trouble = "all threads wait";
      if (trouble) return trouble;
    }
    for (const auto& block : cluster)
      for (const char* at = block->shared + bytes; at < block->shared + sizeof block->shared; at++)
        if (*at != 0x7f) return trouble = "more shared memory than it asked for";
  }
  return nullptr;
}

struct Index {
  unsigned x;
};
inline u32 bits(float v) {
  u32 b;
  std::memcpy(&b, &v, 4);
  return b;
}
inline float number(u32 b) {
  float v;
  std::memcpy(&v, &b, 4);
  return v;
}
inline float half(u32 b) {
  const u16 low = b;
  _Float16 h;
  std::memcpy(&h, &low, 2);
  return h;
}
inline float bfloat(u32 b) { return number(b << 16); }
// Addresses of the cluster carry the block's number from 1, those of one's own block none.
inline char* shared(u32 address) { return me->block->shared + address; }
constexpr u32 kInBlock = (1 << 24) - 1;

}  // namespace emulated

#define threadIdx (emulated::Index{emulated::me->index})
#define blockIdx (emulated::Index{emulated::me->block->index})

inline void __syncthreads() { emulated::wait_for(emulated::me->block->all, 32 * emulated::me->block->warps.size()); }
inline void pair_barrier(int pair) { emulated::wait_for(emulated::me->block->pairs[pair], 64); }
template <class T>
T __shfl_sync(u32, T v, int lane) {
  auto all = emulated::exchange(v);
  T r;
  std::memcpy(&r, all[lane], sizeof r);
  return r;
}
inline float __shfl_xor_sync(u32, float v, int mask) { return __shfl_sync(~0u, v, (emulated::me->index & 31) ^ mask); }

inline u32 at_rank(u32 address, u32 rank) { return address | (rank + 1) << 24; }
inline void cluster_barrier() { emulated::wait_for(emulated::whole, emulated::threads_of_cluster); }
inline void barrier_init(u32 barrier) { emulated::me->block->arrivals[barrier] = {}; }
inline void barrier_expect(u32 barrier, u32 bytes) {
  auto& at = emulated::arrivals_at(barrier, *emulated::me->block);
  if (at.pending == 0) emulated::stop("a barrier that nobody passed expects more");
  at.pending = 0;
  at.bytes += bytes;
  if (!emulated::late) emulated::deliver(at);
}
inline void barrier_wait(u32 barrier, u32 turn) {
  auto& at = emulated::arrivals_at(barrier, *emulated::me->block);
  while ((at.turn & 1) == turn) {
    long sent = 0;
    for (const auto& one : at.sent) sent += one.bytes;
    if (emulated::late && at.pending == 0 && at.bytes == sent)
      emulated::deliver(at);
    else
      emulated::pause();
  }
}
template <int N>
inline void put_far(u32 to, const u32 (&v)[N], u32 barrier) {
  emulated::Block& block = *emulated::cluster[(to >> 24) - 1];
  if (to >> 24 != barrier >> 24) emulated::stop("words for one block, their barrier in another");
  auto& at = emulated::arrivals_at(barrier & emulated::kInBlock, block);
  emulated::Sent one = {block.shared + (to & emulated::kInBlock), {}, 4 * N};
  std::memcpy(one.words, v, 4 * N);
  at.sent.push_back(one);
  if (!emulated::late) emulated::deliver(at);
}

inline u32 pack_half(float a, float b) {
  const _Float16 v[2] = {static_cast<_Float16>(a), static_cast<_Float16>(b)};
  u32 r;
  std::memcpy(&r, v, 4);
  return r;
}
inline u32 pack_bfloat(float a, float b) {
  auto one = [](float v) { return (emulated::bits(v) + 0x7fff + (emulated::bits(v) >> 16 & 1)) >> 16; };
  return one(a) | one(b) << 16;
}
inline float2 unpack_half(u32 v) { return {emulated::half(v & 0xffff), emulated::half(v >> 16)}; }
inline u32 shared_address(const void* p) {
  return static_cast<u32>(static_cast<const char*>(p) - emulated::me->block->shared);
}

// A fragment's place: lane 4 g + q holds of a matrix [16, 16] the words (g, 2 q), (g + 8, 2 q), (g, 2 q + 8), (g + 8, 2 q + 8),
// of [16, 8] the words (2 q, g), (2 q + 8, g), and of the sums (g, 2 q), (g, 2 q + 1) and those of row g + 8.
inline void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, float (*value)(u32)) {
  struct Operands {
    u32 v[6];
  } mine = {{a[0], a[1], a[2], a[3], b0, b1}};
  auto all = emulated::exchange(mine);
  const int lane = emulated::me->index & 31;
  auto element = [&](int from, int word, int odd) {
    u32 v;
    std::memcpy(&v, all[from] + 4 * word, 4);
    return value(v >> 16 * odd & 0xffff);
  };
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; k++)
      sum += element(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2) * element(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
    c[i] += sum;
  }
}
inline void mma_half(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma(c, a, b0, b1, emulated::half); }
inline void mma_bfloat(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma(c, a, b0, b1, emulated::bfloat); }

inline void load_matrices(u32 (&r)[4], u32 address) {
  auto all = emulated::exchange(address);
  const int lane = emulated::me->index & 31;
  for (int m = 0; m < 4; m++) {
    u32 row;
    std::memcpy(&row, all[8 * m + lane / 4], 4);
    std::memcpy(&r[m], emulated::shared(row) + 4 * (lane % 4), 4);
  }
  emulated::exchange(0);  // Nobody writes before all have read.
}
inline void store_matrices_turned(u32 address, u32 v0, u32 v1) {
  struct Rows {
    u32 address, v[2];
  } mine = {address, {v0, v1}};
  auto all = emulated::exchange(mine);
  const int lane = emulated::me->index & 31, m = lane / 8, column = lane % 8;
  if (m > 1) return;
  for (int j = 0; j < 8; j++) {  // Row `column` of the turned matrix: what lanes 4 j + column / 2 hold.
    Rows from;
    std::memcpy(&from, all[4 * j + column / 2], sizeof from);
    const u16 v = from.v[m] >> 16 * (column & 1);
    std::memcpy(emulated::shared(address) + 2 * j, &v, 2);
  }
}

inline u32 turn_matrix(u32 v) {  // Lane 4 r + c has the elements (r, 2 c) and (r, 2 c + 1).
  auto all = emulated::exchange(v);
  const int row = (emulated::me->index & 31) / 4, column = (emulated::me->index & 3) * 2;
  u16 r[2];
  for (int i = 0; i < 2; i++) std::memcpy(&r[i], all[4 * (column + i) + row / 2] + 2 * (row & 1), 2);
  return r[0] | static_cast<u32>(r[1]) << 16;
}
inline void put_word(u32 address, u32 v) { std::memcpy(emulated::shared(address), &v, 4); }
inline u32 bits(float v) { return emulated::bits(v); }
inline float number(u32 v) { return emulated::number(v); }
inline void raise(float* at, float v) { *at = std::fmax(*at, v); }

inline float ex2(float x) { return std::exp2(x); }
inline float rcp(float x) { return 1.f / x; }
inline float tanh_(float x) { return std::tanh(x); }
inline float log_(float x) { return std::log(x); }
inline float log1p_(float x) { return std::log1p(x); }
inline float expm1_(float x) { return std::expm1(x); }
inline float sqrt_(float x) { return std::sqrt(x); }
inline float sin_(float x) { return std::sin(x); }
inline float cos_(float x) { return std::cos(x); }
inline bool is_negative(float x) { return std::signbit(x); }
inline float abs_(float x) { return std::fabs(x); }
inline float max_(float a, float b) { return a != a || a > b ? a : b; }
inline float min_(float a, float b) { return a != a || a < b ? a : b; }
inline float larger(float a, float b) { return std::fmax(a, b); }

template <int N>
inline void store_words(void* p, const u32* v) {
  std::memcpy(p, v, 4 * N);
}
template <int N>
inline void fetch_words(u32 to, const void* from) {
  emulated::me->open.push_back({to, from, 4 * N});
}
inline void fetch_commit() {
  emulated::me->groups.push_back(std::move(emulated::me->open));
  emulated::me->open.clear();
}
template <int N>
inline void fetch_wait() {
  auto& groups = emulated::me->groups;
  for (; groups.size() > N; groups.pop_front())
    for (const auto& copy : groups.front()) std::memcpy(emulated::shared(copy.to), copy.from, copy.bytes);
}
inline float read_once(const float* p) { return *p; }
