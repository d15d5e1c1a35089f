// What the kernel uses of the machine, as PTX, and the functions that the stages call. The tests have the same names in
// plain C++, which run on a CPU.
#define DEVICE __device__ __forceinline__
#define SHARED(name) extern __shared__ __align__(16) char name[]
typedef unsigned u32;
typedef unsigned short u16;
typedef unsigned long long u64;


DEVICE u32 pack_half(float a, float b) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(b), "f"(a));
  return r;
}
DEVICE u32 pack_bfloat(float a, float b) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(b), "f"(a));
  return r;
}
DEVICE float2 unpack_half(u32 v) {
  float2 r;
  asm("{.reg .f16 a,b; mov.b32 {a,b},%2; cvt.f32.f16 %0,a; cvt.f32.f16 %1,b;}" : "=f"(r.x), "=f"(r.y) : "r"(v));
  return r;
}
DEVICE u32 shared_address(const void* p) {
  u64 u;
  asm("cvta.to.shared.u64 %0,%1;" : "=l"(u) : "l"(p));
  return (u32)u;
}
#define MMA(NAME, T)                                                                                        \
  DEVICE void NAME(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {                                      \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." T "." T                                           \
                 ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"                                  \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                           \
  }
MMA(mma_half, "f16")
MMA(mma_bfloat, "bf16")
// Four matrices of 8 x 8 halves, whose rows the lanes name.
DEVICE void load_matrices(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// Two of them, turned: a lane's pair stands in one column.
DEVICE void store_matrices_turned(u32 address, u32 v0, u32 v1) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0],{%1,%2};" ::"r"(address), "r"(v0), "r"(v1)
               : "memory");
#else
  const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 row = __shfl_sync(~0u, address, 8 * (i >> 1) + 2 * q + (i & 1)), v = i < 2 ? v0 : v1;
    asm volatile("st.shared.u16 [%0],%1;" ::"r"(row + 2 * g), "h"((u16)(v >> 16 * (i & 1))) : "memory");
  }
#endif
}
// One of them, turned in its registers.
DEVICE u32 turn_matrix(u32 v) {
  u32 r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(r) : "r"(v));
  return r;
}
DEVICE void put_word(u32 address, u32 v) { asm volatile("st.shared.u32 [%0],%1;" ::"r"(address), "r"(v) : "memory"); }
DEVICE u32 bits(float x) { return __float_as_uint(x); }
DEVICE float number(u32 v) { return __uint_as_float(v); }
// To the larger one; neither is negative.
DEVICE void raise(float* at, float v) { atomicMax((int*)at, __float_as_int(v)); }
// For two warps that follow each other.
DEVICE void pair_barrier(int pair) { asm volatile("bar.sync %0,64;" ::"r"(1 + pair) : "memory"); }

// Clusters of blocks. An address in another block's shared memory: as far from the first as in one's own.
DEVICE u32 at_rank(u32 address, u32 rank) {
  u32 r;
  asm("mapa.shared::cluster.u32 %0,%1,%2;" : "=r"(r) : "r"(address), "r"(rank));
  return r;
}
// For all threads, who then see each block's barriers as they were made.
DEVICE void cluster_barrier() {
  asm volatile(
      "fence.mbarrier_init.release.cluster;\n"
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}
// A barrier in shared memory is passed once its block has said how many bytes it expects, and they are there.
DEVICE void barrier_init(u32 barrier) { asm volatile("mbarrier.init.shared::cta.b64 [%0],1;" ::"r"(barrier) : "memory"); }
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// `turn` counts how often it was passed before, as an odd or even number.
DEVICE void barrier_wait(u32 barrier, u32 turn) {
  asm volatile(
      "{.reg .pred passed;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 passed,[%0],%1;\n"
      "@!passed bra again;}" ::"r"(barrier),
      "r"(turn)
      : "memory");
}
// Words to another block, counted by a barrier of that block.
template <int N>
DEVICE void put_far(u32 to, const u32 (&v)[N], u32 barrier) {
  if constexpr (N == 4)
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0],{%1,%2,%3,%4},[%5];" ::"r"(to), "r"(v[0]),
                 "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(barrier)
                 : "memory");
  else
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0],{%1,%2},[%3];" ::"r"(to), "r"(v[0]),
                 "r"(v[1]), "r"(barrier)
                 : "memory");
}
DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float tanh_(float x) {
  float y;
  asm("tanh.approx.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float log_(float x) { return __logf(x); }
DEVICE float log1p_(float x) { return log1pf(x); }
DEVICE float expm1_(float x) { return expm1f(x); }
DEVICE float sqrt_(float x) { return sqrtf(x); }
DEVICE float sin_(float x) { return sinf(x); }
DEVICE float cos_(float x) { return cosf(x); }
DEVICE bool is_negative(float x) { return __float_as_int(x) < 0; }
DEVICE float abs_(float x) { return fabsf(x); }
// NaN in either one is NaN, as in JAX; of `larger` it is the other one.
DEVICE float max_(float a, float b) {
  float y;
  asm("max.NaN.f32 %0,%1,%2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
DEVICE float min_(float a, float b) {
  float y;
  asm("min.NaN.f32 %0,%1,%2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
DEVICE float larger(float a, float b) { return fmaxf(a, b); }

// Global memory that is used once goes past the caches.
template <int N>
DEVICE void store_words(void* p, const u32* v) {
  if constexpr (N == 4)
    asm volatile("st.global.cs.v4.u32 [%0],{%1,%2,%3,%4};" ::"l"(p), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
  else if constexpr (N == 2)
    asm volatile("st.global.cs.v2.u32 [%0],{%1,%2};" ::"l"(p), "r"(v[0]), "r"(v[1]) : "memory");
  else
    asm volatile("st.global.cs.u32 [%0],%1;" ::"l"(p), "r"(v[0]) : "memory");
}
template <int N>
DEVICE void fetch_words(u32 to, const void* from) {
  if constexpr (N == 4)
    asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(to), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0],[%1],%2;" ::"r"(to), "l"(from), "n"(4 * N) : "memory");
}
DEVICE void fetch_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
DEVICE void fetch_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
DEVICE float read_once(const float* p) {
  float v;
  asm volatile("ld.global.nc.f32 %0,[%1];" : "=f"(v) : "l"(p));
  return v;
}
