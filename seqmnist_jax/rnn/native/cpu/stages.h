// What the stages call, for vectors of units.

#include <cmath>

namespace seqmnist {

SEQMNIST_INLINE Vec vec(Vec v) { return v; }
SEQMNIST_INLINE Vec vec(float value) { return broadcast(value); }

struct Expm1 {
  Vec scale, part;  // e^x - 1 = scale * part + (scale - 1)
};

// x = n log 2 + r; e^r - 1 by a polynomial (relative error 2e-8), then scaled by 2^n. NaN passes.
SEQMNIST_INLINE Expm1 expm1_parts(Vec x) {
  x = smaller(broadcast(88.0f), larger(broadcast(-87.0f), x));
  // Adding and taking off 1.5 * 2^23 rounds to an integer.
  const float rounder = 12582912.0f;
  const Vec n = (x * 1.44269504f + rounder) - rounder;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = broadcast(0.0013946451f);
  p = p * r + 0.008366584f;
  p = p * r + 0.04166628f;
  p = p * r + 0.16666543f;
  p = p * r + 0.5f;
  const IntVec exponent = (__builtin_convertvector(n, IntVec) + 127) << 23;
  return {(Vec)exponent, p * (r * r) + r};
}

SEQMNIST_INLINE Vec exp_(Vec x) {
  // e^88 is nearly the largest number; what is above it overflows here, below.
  const auto is_large = x > 80.0f;
  const Expm1 e = expm1_parts(is_large ? x - 1.0f : x);
  const Vec near = (e.scale * e.part + e.scale) * (is_large ? vec(2.7182818f) : vec(1.0f));
  return x < -87.0f ? vec(0.0f) : near;
}

SEQMNIST_INLINE Vec expm1_(Vec x) {
  const Expm1 e = expm1_parts(x);
  return x > 80.0f ? exp_(x) : e.scale * e.part + (e.scale - 1.0f);
}

// e^-|x| is at most 1, so nothing overflows, and a gate that is nearly open or closed keeps its
// last bits; 1 / (1 + e^-x) would round always the same way there, which adds up over the steps.
SEQMNIST_INLINE Vec logistic_(Vec x) {
  const Expm1 parts = expm1_parts(smaller(x, -x));
  const Vec e = parts.scale * parts.part + parts.scale, small = e / (1.0f + e);
  return x > 0.0f ? 1.0f - small : small;
}
// In 32 bits a gate that holds the state is kept as it is.
SEQMNIST_INLINE Vec signed_logistic_(Vec x) { return logistic_(x); }
SEQMNIST_INLINE Vec opened_(Vec k) { return k; }

SEQMNIST_INLINE Vec tanh_(Vec x) {
  const Expm1 e = expm1_parts(x + x);
  const Vec expm1 = e.scale * e.part + (e.scale - 1.0f);
  return expm1 / (expm1 + 2.0f);
}

// As JAX has them: NaN in either one is NaN.
SEQMNIST_INLINE Vec max_(Vec a, Vec b) { return a != a ? a : larger(a, b); }
SEQMNIST_INLINE Vec min_(Vec a, Vec b) { return a != a ? a : smaller(a, b); }
// A constant of the source is never NaN.
SEQMNIST_INLINE Vec max_(Vec a, float b) { return larger(vec(b), a); }
SEQMNIST_INLINE Vec max_(float a, Vec b) { return larger(vec(a), b); }
SEQMNIST_INLINE Vec min_(Vec a, float b) { return smaller(vec(b), a); }
SEQMNIST_INLINE Vec min_(float a, Vec b) { return smaller(vec(a), b); }
SEQMNIST_INLINE Vec abs_(Vec x) { return (Vec)((BitsVec)x & 0x7fffffffu); }
SEQMNIST_INLINE Vec sign_(Vec x) { return x > 0.0f ? vec(1.0f) : x < 0.0f ? vec(-1.0f) : x; }

template <class F>
SEQMNIST_INLINE Vec by_lanes(Vec x, F&& f) {
  Vec out;
  for (int lane = 0; lane < kLanes; ++lane) out[lane] = f(x[lane]);
  return out;
}
SEQMNIST_INLINE Vec sqrt_(Vec x) {
  return by_lanes(x, [](float v) { return std::sqrt(v); });
}
SEQMNIST_INLINE Vec log_(Vec x) {
  return by_lanes(x, [](float v) { return std::log(v); });
}
SEQMNIST_INLINE Vec log1p_(Vec x) {
  return by_lanes(x, [](float v) { return std::log1p(v); });
}
SEQMNIST_INLINE Vec sin_(Vec x) {
  return by_lanes(x, [](float v) { return std::sin(v); });
}
SEQMNIST_INLINE Vec cos_(Vec x) {
  return by_lanes(x, [](float v) { return std::cos(v); });
}

}  // namespace seqmnist
