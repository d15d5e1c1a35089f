// What the stages call, for the machine's header above it.
constexpr int at_least_one(int n) { return n > 0 ? n : 1; }

template <int N>
struct Int {
  static constexpr int value = N;
};

DEVICE float exp_(float x) { return ex2(1.4426950408889634f * x); }
DEVICE float sign_(float x) { return x > 0.f ? 1.f : x < 0.f ? -1.f : x; }
DEVICE float logistic_(float x) { return 0.5f * tanh_(0.5f * x) + 0.5f; }

// A gate that holds the state for hundreds of steps decides by its distance from 0 or from 1, whichever is smaller: that
// one is computed, and kept in 16 bits, negative where it is the distance from 1.
DEVICE float signed_logistic_(float x) {
  const float e = ex2(-1.4426950408889634f * abs_(x)), small = e * rcp(1.f + e);
  return x > 0.f ? -small : small;
}
DEVICE float opened_(float k) { return is_negative(k) ? 1.f + k : k; }

// The same in full float32, for cells whose numbers are rounded nowhere else.
struct Exact {
  static DEVICE float exp_(float x) { return expf(x); }
  static DEVICE float log_(float x) { return logf(x); }
  static DEVICE float tanh_(float x) { return tanhf(x); }
  static DEVICE float logistic_(float x) { return 1.f / (1.f + expf(-x)); }
  static DEVICE float signed_logistic_(float x) {
    const float e = expf(-abs_(x)), small = e / (1.f + e);
    return x > 0.f ? -small : small;
  }
};
