// Vectors of the machine's own width, and the one product that everything else is made of.
//
// A product runs over "words" of 32 bits. In float32 a word is one number; in bfloat16 it is two,
// neighbours along the axis that is summed over, so that one code walks through both.

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace seqmnist {

// kTileRows x 3 vectors of sums stay in registers: 24 of AVX-512's and NEON's 32, 12 of AVX2's 16.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileRows = 8;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kTileRows = 4;
#elif defined(__aarch64__)  // Compiled, but never run by its authors.
constexpr int kLanes = 4, kTileRows = 8;
#else
constexpr int kLanes = 4, kTileRows = 4;
#endif
// Sizes are padded to this, whole vectors and whole tiles, and interleaved in groups of it.
constexpr int kUnit = kLanes > kTileRows ? kLanes : kTileRows;

typedef float Vec __attribute__((vector_size(4 * kLanes), may_alias));
typedef float UnalignedVec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes), may_alias));
typedef uint32_t BitsVec __attribute__((vector_size(4 * kLanes), may_alias));

#define SEQMNIST_INLINE inline __attribute__((always_inline))

SEQMNIST_INLINE Vec broadcast(float value) { return value - Vec{}; }
// The larger and the smaller one; NaN in x stays.
#if defined(__AVX512F__)
SEQMNIST_INLINE Vec larger(Vec low, Vec x) { return (Vec)_mm512_max_ps((__m512)low, (__m512)x); }
SEQMNIST_INLINE Vec smaller(Vec high, Vec x) { return (Vec)_mm512_min_ps((__m512)high, (__m512)x); }
#else
SEQMNIST_INLINE Vec larger(Vec low, Vec x) { return low > x ? low : x; }
SEQMNIST_INLINE Vec smaller(Vec high, Vec x) { return high < x ? high : x; }
#endif
SEQMNIST_INLINE Vec load(const float* from) { return *reinterpret_cast<const UnalignedVec*>(from); }
SEQMNIST_INLINE void store(float* to, Vec v) { *reinterpret_cast<UnalignedVec*>(to) = v; }

// Loaded once: GCC would load a vector anew for each product that it is in, and AVX2 loads two in the time of two products.
SEQMNIST_INLINE Vec in_register(Vec v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  asm("" : "+x"(v));
#endif
  return v;
}

// The first `lanes` of a vector; the others are read as zero and never written.
SEQMNIST_INLINE Vec load_some(const float* from, int lanes) {
  if (lanes == kLanes) return load(from);
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << lanes) - 1), from);
#else
  Vec v{};
  std::memcpy(&v, from, sizeof(float) * lanes);
  return v;
#endif
}
SEQMNIST_INLINE void store_some(float* to, Vec v, int lanes) {
  if (lanes == kLanes) return store(to, v);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << lanes) - 1), (__m512)v);
#else
  std::memcpy(to, &v, sizeof(float) * lanes);
#endif
}

// The same of a vector; the others become zero: what is computed there may be inf * 0.
SEQMNIST_INLINE Vec only(const Vec& v, int lanes) { return load_some(reinterpret_cast<const float*>(&v), lanes); }

// store_some; past the caches where `far`, for what is read again only much later.
SEQMNIST_INLINE void store_some(float* to, Vec v, int lanes, bool far) {
#if defined(__AVX512F__)
  if (far && lanes == kLanes && reinterpret_cast<std::uintptr_t>(to) % sizeof v == 0)
    return _mm512_stream_ps(to, (__m512)v);
#endif
  store_some(to, v, lanes);
}

// Floats on their way to memory that will be read again only much later: past the caches, a few
// at a time.
class Stream {
 public:
  Stream() = default;
  Stream(const float* from, float* to, std::ptrdiff_t n) : from_(from), to_(to), left_(n) {}
  std::ptrdiff_t left() const { return left_; }
  SEQMNIST_INLINE void move(std::ptrdiff_t n) {
    for (n = n < left_ ? n : left_; n > 0; n -= kLanes) {
      const int lanes = static_cast<int>(n < kLanes ? n : kLanes);
      store_some(to_, load_some(from_, lanes), lanes, true);
      from_ += lanes, to_ += lanes, left_ -= lanes;
    }
  }

 private:
  const float* from_ = nullptr;
  float* to_ = nullptr;
  std::ptrdiff_t left_ = 0;
};

// Asks for floats that will be read some microseconds later: where they stand is too far from what was
// read before for the machine to guess it.
SEQMNIST_INLINE void prefetch(const float* from, std::ptrdiff_t n) {
  for (std::ptrdiff_t i = 0; i < n; i += 16) __builtin_prefetch(from + i, 0, 2);
}

// The nearest bfloat16, ties to even, as the upper half of a float's bits; NaN stays NaN.
SEQMNIST_INLINE uint32_t bfloat16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return bits | 0x400000u;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

// How numbers stand in words. `put` writes number k of a row of words; `put_row` a vector of
// neighbours along the summed axis; `interleave` makes the words of two vectors that are
// neighbours along it, and gives their count; `multiply_add` is sum + word * b.

struct Float32 {
  static constexpr int kPack = 1;
  static void put(float* words, int k, float value) { words[k] = value; }
  static SEQMNIST_INLINE void put_row(float* words, int k, Vec v) { store(words + k, v); }
  static SEQMNIST_INLINE int interleave(Vec even, Vec odd, Vec (&words)[2]) {
    words[0] = even;
    words[1] = odd;
    return 2;
  }
  static SEQMNIST_INLINE Vec multiply_add(Vec sum, float word, Vec b) { return sum + word * b; }
};

#if defined(__AVX512BF16__)

struct BFloat16 {
  static constexpr int kPack = 2;
  static void put(float* words, int k, float value) {
    const uint16_t half = bfloat16_bits(value) >> 16;
    std::memcpy(reinterpret_cast<char*>(words) + 2 * static_cast<std::ptrdiff_t>(k), &half, sizeof half);
  }
  static SEQMNIST_INLINE void put_row(float* words, int k, Vec v) {
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(reinterpret_cast<char*>(words) + 2 * static_cast<std::ptrdiff_t>(k), &halves, sizeof halves);
  }
  static SEQMNIST_INLINE int interleave(Vec even, Vec odd, Vec (&words)[2]) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    words[0] = (Vec)_mm512_permutexvar_epi16(order, halves);
    return 1;
  }
  static SEQMNIST_INLINE Vec multiply_add(Vec sum, float word, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(word), (__m512bh)b);
  }
};

#else

// Without the instruction: numbers rounded to bfloat16, products as in float32 (which are exact).
struct BFloat16 : Float32 {
  static SEQMNIST_INLINE Vec rounded(Vec v) {
    const BitsVec bits = (BitsVec)v;
    const Vec near = (Vec)((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u);
    return v == v ? near : v;
  }
  static void put(float* words, int k, float value) {
    const uint32_t bits = bfloat16_bits(value) & 0xffff0000u;
    std::memcpy(words + k, &bits, sizeof bits);
  }
  static SEQMNIST_INLINE void put_row(float* words, int k, Vec v) { store(words + k, rounded(v)); }
  static SEQMNIST_INLINE int interleave(Vec even, Vec odd, Vec (&words)[2]) {
    return Float32::interleave(rounded(even), rounded(odd), words);
  }
};

#endif

// The words that n numbers take.
template <class Mode>
constexpr std::ptrdiff_t words(std::ptrdiff_t n) {
  return (n + Mode::kPack - 1) / Mode::kPack;
}

// sums [R][V] += A B over `depth` words: R rows of A, V vectors of B's columns.
//
// A by rows: word k of row r at a[r * a_row + k]. A interleaved: at a[k * kUnit + r].
// B: vector v of word k at b[k * b_step + v * b_column].
template <class Mode, int R, int V, bool kInterleaved>
SEQMNIST_INLINE void accumulate(Vec (&sums)[R][V], const float* a, std::ptrdiff_t a_row, const float* b,
                                std::ptrdiff_t b_step, std::ptrdiff_t depth, std::ptrdiff_t b_column = kLanes) {
  for (std::ptrdiff_t k = 0; k < depth; ++k) {
    Vec columns[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) columns[v] = in_register(load(b + k * b_step + v * b_column));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float word = kInterleaved ? a[k * kUnit + r] : a[r * a_row + k];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[r][v] = Mode::multiply_add(sums[r][v], word, columns[v]);
    }
  }
}

}  // namespace seqmnist
