// LSTM and GRU over whole sequences on a CPU, forward and backward, as XLA custom calls.
//
// Sequences of a batch don't meet, so each core takes a slice of them through all its steps
// and waits for nobody. A step is, for every `kLanes` units: the products of x and h with the
// gates' weights into registers, the gates on top, the new h. Backward: the gates' gradients,
// their product with the transposed weights, and, every few steps, while they are in cache,
// their share of the weights' gradients.
//
// Arrays are [batch, time, features] outside; saved gates are [time, batch, 4 * hidden] in the
// order i, f, g, o (LSTM) and r, z, n, h U_n + b (GRU). Any number of leading axes that vmap
// has added are replicas: each is sliced by itself, with its own weights.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "products.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace seqmnist {
namespace {

namespace ffi = ::xla::ffi;

// ---- Gate functions ----------------------------------------------------------------------

struct Expm1 {
  Vec scale, part;  // e^x - 1 = scale * part + (scale - 1)
};

// x = n log 2 + r; e^r - 1 by a polynomial (relative error 2e-8), then scaled by 2^n. NaN passes.
SEQMNIST_INLINE Expm1 expm1_parts(Vec x) {
  x = smaller(broadcast(87.0f), larger(broadcast(-87.0f), x));
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

// e^-|x| is at most 1, so nothing overflows, and a gate that is nearly open or closed keeps its
// last bits; 1 / (1 + e^-x) would round always the same way there, which adds up over the steps.
SEQMNIST_INLINE Vec exp_of_minus_abs(Vec x) {
  const Expm1 e = expm1_parts(smaller(x, -x));
  return e.scale * e.part + e.scale;
}

SEQMNIST_INLINE Vec sigmoid(Vec x) {
  const Vec e = exp_of_minus_abs(x), small = e / (1.0f + e);
  return x > 0.0f ? 1.0f - small : small;
}

// Two sigmoids at the price of one division.
SEQMNIST_INLINE void sigmoids(Vec& x, Vec& y) {
  const Vec e = exp_of_minus_abs(x), f = exp_of_minus_abs(y), q = 1.0f / ((1.0f + e) * (1.0f + f));
  const Vec small_x = e * (1.0f + f) * q, small_y = f * (1.0f + e) * q;
  x = x > 0.0f ? 1.0f - small_x : small_x;
  y = y > 0.0f ? 1.0f - small_y : small_y;
}

SEQMNIST_INLINE Vec tanh(Vec x) {
  const Expm1 e = expm1_parts(x + x);
  const Vec expm1 = e.scale * e.part + (e.scale - 1.0f);
  return expm1 / (expm1 + 2.0f);
}

// ---- The two cells -----------------------------------------------------------------------

// A cell's four vectors of one sequence and kLanes units: first what the gates are made of
// (`activate` makes the gates, in the order that is saved), or their gradients.
//
// kProducts of them are gates with weights. The gradients' order is such that those of h's
// product are kProducts neighbours from kFromH on, those of x's from kFromX on; gate_of_h and
// gate_of_x name, for each, the gate's place in the weights.

struct Lstm {
  static constexpr int kProducts = 4, kFromH = 0, kFromX = 0, kColumns = 2;
  static constexpr bool kHasMemory = true;
  static constexpr int gate_of_h(int v) { return v; }
  static constexpr int gate_of_x(int v) { return v; }

  static SEQMNIST_INLINE void activate(Vec (&v)[4]) {
    sigmoids(v[0], v[1]);
    v[2] = tanh(v[2]);
    v[3] = sigmoid(v[3]);
  }
  static SEQMNIST_INLINE void advance(const Vec (&v)[4], Vec& h, Vec& c) {
    c = v[1] * c + v[0] * v[2];
    h = v[3] * tanh(c);
  }
  // From the gates, c before the step and after it: the gates' gradients; dh and dc become what
  // of them goes straight to the step before.
  static SEQMNIST_INLINE void differentiate(Vec (&v)[4], Vec, Vec c_before, Vec c, Vec& dh, Vec& dc) {
    const Vec i = v[0], f = v[1], g = v[2], o = v[3], tanh_c = tanh(c);
    dc += dh * o * (1.0f - tanh_c * tanh_c);
    v[0] = dc * g * (i * (1.0f - i));
    v[1] = dc * c_before * (f * (1.0f - f));
    v[2] = dc * i * (1.0f - g * g);
    v[3] = dh * tanh_c * (o * (1.0f - o));
    dc *= f;
    dh = Vec{};
  }
};

struct Gru {
  static constexpr int kProducts = 3, kFromH = 0, kFromX = 1, kColumns = 3;
  static constexpr bool kHasMemory = false;
  // Gradients stand as n of h's product, r, z, n of x's product.
  static constexpr int gate_of_h(int v) { return (v + 2) % 3; }
  static constexpr int gate_of_x(int v) { return v; }

  // v: r, z, x W_n + b, h U_n + b.
  static SEQMNIST_INLINE void activate(Vec (&v)[4]) {
    sigmoids(v[0], v[1]);
    v[2] = tanh(v[2] + v[0] * v[3]);
  }
  static SEQMNIST_INLINE void advance(const Vec (&v)[4], Vec& h, Vec&) { h = v[2] + v[1] * (h - v[2]); }
  static SEQMNIST_INLINE void differentiate(Vec (&v)[4], Vec h_before, Vec, Vec, Vec& dh, Vec&) {
    const Vec r = v[0], z = v[1], n = v[2], h_n = v[3];
    const Vec dn = dh * (1.0f - z) * (1.0f - n * n);
    v[0] = dn * r;
    v[1] = dn * h_n * (r * (1.0f - r));
    v[2] = dh * (h_before - n) * (z * (1.0f - z));
    v[3] = dn;
    dh *= z;
  }
};

// ---- Arrays ------------------------------------------------------------------------------

// Scratch memory that begins at a cache line.
class Scratch {
 public:
  explicit Scratch(std::ptrdiff_t floats, bool zero = false)
      : data_(static_cast<float*>(std::aligned_alloc(64, (sizeof(float) * floats + 127) / 64 * 64))) {
    if (data_ == nullptr) throw std::bad_alloc();
    if (zero) std::memset(data_.get(), 0, sizeof(float) * floats);
  }
  float* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  std::unique_ptr<float, Free> data_;
};

// Where an axis has size zero its arrays are null, which memcpy must not be given.
inline void copy(float* to, const float* from, std::ptrdiff_t n) {
  if (n > 0) std::memcpy(to, from, sizeof(float) * n);
}

// One call's sizes, without replicas.
struct Sizes {
  std::ptrdiff_t batch, time, features, hidden;
  bool reverse;

  // Hidden in padded units and in vectors, features in pairs and in vectors.
  std::ptrdiff_t padded() const { return (hidden + kUnit - 1) / kUnit * kUnit; }
  std::ptrdiff_t vectors() const { return padded() / kLanes; }
  std::ptrdiff_t even_features() const { return (features + 1) / 2 * 2; }
  std::ptrdiff_t feature_vectors() const { return (features + kLanes - 1) / kLanes; }
  std::ptrdiff_t when(std::ptrdiff_t step) const { return reverse ? time - 1 - step : step; }
  // Where the saved gates of vector j of units of sequence b at time t stand: four vectors of
  // lanes(j). Tiles of sequences are contiguous, so that both directions of the loop over time
  // stream; nobody but the two functions below reads this order.
  std::ptrdiff_t saved(std::ptrdiff_t t, std::ptrdiff_t b, std::ptrdiff_t j) const {
    const std::ptrdiff_t first = b / kTileRows * kTileRows, rows = std::min<std::ptrdiff_t>(kTileRows, batch - first);
    return ((t * batch + first) * hidden + j * rows * kLanes + (b - first) * lanes(j)) * 4;
  }
  // Whether what is saved will have left the caches before it is read.
  bool is_large() const { return time * batch * hidden > (2 << 20); }
  // How many of vector j's lanes are units.
  int lanes(std::ptrdiff_t j) const {
    return static_cast<int>(std::clamp<std::ptrdiff_t>(hidden - j * kLanes, 0, kLanes));
  }
};

// One replica's arrays, with the shapes of `layer_fields` and the lists below. Those that are not
// wanted, or not given, are null. What a call may write is its results only.
struct Arrays {
  float *x, *kernel, *recurrent_kernel, *bias, *recurrent_bias, *h0, *c0;
  const int32_t* lengths;
  float *outputs, *gates, *memories;  // made forward, read backward
  float *h, *c;                       // after the last step
  float *d_outputs, *d_h, *d_c;
  float *dx, *dkernel, *drecurrent_kernel, *dbias, *drecurrent_bias, *dh0, *dc0;
};

// Calls work(size, row) for tiles of rows; rows is even, sizes are 8 (or 4) and then 4 and 2.
template <class Work>
SEQMNIST_INLINE void for_tiles(std::ptrdiff_t rows, Work&& work) {
  std::ptrdiff_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) work(std::integral_constant<int, kTileRows>{}, row);
  if (kTileRows > 4 && row + 4 <= rows) {
    work(std::integral_constant<int, 4>{}, row);
    row += 4;
  }
  if (row < rows) work(std::integral_constant<int, 2>{}, row);
}

// Weights [depth, products * hidden] as panels: for each vector of units, each word, each gate.
template <class Mode, class Cell>
void pack_weights(const Sizes& s, const float* weights, std::ptrdiff_t depth, float* packed) {
  constexpr int kGates = Cell::kProducts;
  const std::ptrdiff_t panel = words<Mode>(depth) * kGates * kLanes;
  std::memset(packed, 0, sizeof(float) * s.vectors() * panel);
  for (std::ptrdiff_t k = 0; k < depth; ++k) {
    for (int gate = 0; gate < kGates; ++gate) {
      const float* row = weights + (k * kGates + gate) * s.hidden;
      for (std::ptrdiff_t j = 0; j < s.vectors(); ++j) {
        float* word = packed + j * panel + (k / Mode::kPack * kGates + gate) * kLanes;
        for (int lane = 0; lane < s.lanes(j); ++lane)
          Mode::put(word, lane * Mode::kPack + static_cast<int>(k % Mode::kPack), row[j * kLanes + lane]);
      }
    }
  }
}

// The same weights transposed, for the product of gate gradients with them: columns are the
// `depth` of the weights, two vectors at a time; what is summed over are the gates' units, in
// the gradients' order.
template <class Mode, class Cell>
void pack_transposed(const Sizes& s, const float* weights, std::ptrdiff_t depth, int (*gate_of)(int), float* packed) {
  constexpr int kGates = Cell::kProducts;
  const std::ptrdiff_t columns = (depth + kLanes - 1) / kLanes, summed = s.vectors() * kGates * kLanes;
  std::memset(packed, 0, sizeof(float) * columns * words<Mode>(summed) * kLanes);
  for (std::ptrdiff_t n = 0; n < depth; ++n) {
    const std::ptrdiff_t column = n / kLanes, pair = column / 2 * 2;
    const std::ptrdiff_t width = std::min<std::ptrdiff_t>(2, columns - pair);
    float* panel = packed + pair * words<Mode>(summed) * kLanes + (column - pair) * kLanes;
    for (int v = 0; v < kGates; ++v) {
      const float* row = weights + (n * kGates + gate_of(v)) * s.hidden;
      for (std::ptrdiff_t unit = 0; unit < s.hidden; ++unit) {
        const std::ptrdiff_t k = (unit / kLanes * kGates + v) * kLanes + unit % kLanes;
        Mode::put(panel + k / Mode::kPack * width * kLanes,
                  static_cast<int>(n % kLanes * Mode::kPack + k % Mode::kPack), row[unit]);
      }
    }
  }
}

// Biases as four vectors for each vector of units, in the order that `activate` takes.
template <class Cell>
void pack_biases(const Sizes& s, const Arrays& a, float* packed) {
  std::memset(packed, 0, sizeof(float) * s.vectors() * 4 * kLanes);
  for (std::ptrdiff_t unit = 0; unit < s.hidden; ++unit) {
    float* to = packed + unit / kLanes * 4 * kLanes + unit % kLanes;
    for (int gate = 0; gate < Cell::kProducts; ++gate) {
      to[gate * kLanes] = a.bias[gate * s.hidden + unit];
      if (!Cell::kHasMemory && gate < 2) to[gate * kLanes] += a.recurrent_bias[gate * s.hidden + unit];
    }
    if (!Cell::kHasMemory) to[3 * kLanes] = a.recurrent_bias[2 * s.hidden + unit];
  }
}

// The weights of a forward step, packed.
template <class Mode, class Cell>
struct ForwardWeights {
  ForwardWeights(const Sizes& s, const Arrays& a)
      : x_depth(words<Mode>(s.features)),
        h_depth(words<Mode>(s.hidden)),
        x(s.vectors() * x_depth * Cell::kProducts * kLanes),
        h(s.vectors() * h_depth * Cell::kProducts * kLanes),
        biases(s.vectors() * 4 * kLanes) {
    pack_weights<Mode, Cell>(s, a.kernel, s.features, x.get());
    pack_weights<Mode, Cell>(s, a.recurrent_kernel, s.hidden, h.get());
    pack_biases<Cell>(s, a, biases.get());
  }
  std::ptrdiff_t x_depth, h_depth;
  Scratch x, h, biases;
};

// What `activate` takes, of R sequences and vector j of units: to [R][4] vectors.
// Meanwhile `stream` is emptied: between two parts of a long product its stores cost nothing.
template <class Mode, class Cell, int R>
SEQMNIST_INLINE void preactivate(const ForwardWeights<Mode, Cell>& weights, std::ptrdiff_t j, const float* x,
                                 std::ptrdiff_t x_row, const float* h, std::ptrdiff_t h_row, float* to,
                                 Stream& stream) {
  constexpr int kGates = Cell::kProducts, V = Cell::kColumns;
  const float* bias = weights.biases.get() + j * 4 * kLanes;
  const float* x_panel = weights.x.get() + j * weights.x_depth * kGates * kLanes;
  const float* h_panel = weights.h.get() + j * weights.h_depth * kGates * kLanes;
  for (int first = 0; first < kGates; first += V) {
    Vec sums[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[r][v] = load(bias + (first + v) * kLanes);
    accumulate<Mode, R, V, false>(sums, x, x_row, x_panel + first * kLanes, kGates * kLanes, weights.x_depth);
    if constexpr (!Cell::kHasMemory) {  // The candidate's two products stay apart: r stands between them.
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        store(to + (r * 4 + 2) * kLanes, sums[r][2]);
        sums[r][2] = load(bias + 3 * kLanes);
      }
    }
    constexpr std::ptrdiff_t kPart = 16;
    for (std::ptrdiff_t k = 0; k < weights.h_depth; k += kPart) {
      accumulate<Mode, R, V, false>(sums, h + k, h_row, h_panel + (k * kGates + first) * kLanes, kGates * kLanes,
                                    std::min(kPart, weights.h_depth - k));
      stream.move(4 * kLanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const int place = !Cell::kHasMemory && v == 2 ? 3 : first + v;
        store(to + (r * 4 + place) * kLanes, sums[r][v]);
      }
  }
}

// ---- Forward -----------------------------------------------------------------------------

// All steps of sequences first .. first + count - 1.
template <class Mode, class Cell>
void forward_slice(const Sizes& s, const Arrays& a, std::ptrdiff_t first, std::ptrdiff_t count) {
  const std::ptrdiff_t rows = (count + 1) / 2 * 2, padded = s.padded(), H = s.hidden, T = s.time, F = s.features;
  const ForwardWeights<Mode, Cell> weights(s, a);
  const bool far = s.is_large();
  Scratch gates_tile(kTileRows * 4 * kLanes);
  Stream stream;
  // h before and after the step, as numbers and as words; in float32 these are the same.
  constexpr bool kSame = std::is_same_v<Mode, Float32>;
  const std::ptrdiff_t h_row = words<Mode>(padded);
  Scratch state(2 * rows * padded, true), state_words(kSame ? 0 : 2 * rows * h_row, true);
  Scratch memory(Cell::kHasMemory ? rows * padded : 0, true);
  Scratch x_words(rows * weights.x_depth, true), tile(kTileRows * 4 * kLanes);
  float* h = state.get();
  float* h_new = h + rows * padded;
  float* h_words = kSame ? h : state_words.get();
  float* h_words_new = kSame ? h_new : h_words + rows * h_row;
  float* c = memory.get();
  for (std::ptrdiff_t row = 0; row < count; ++row) {
    copy(h + row * padded, a.h0 + (first + row) * H, H);
    if (Cell::kHasMemory) copy(c + row * padded, a.c0 + (first + row) * H, H);
    for (std::ptrdiff_t j = 0; j < s.vectors() && !kSame; ++j)
      Mode::put_row(h_words + row * h_row, static_cast<int>(j * kLanes), load(h + row * padded + j * kLanes));
  }

  for (std::ptrdiff_t step = 0; step < T; ++step) {
    const std::ptrdiff_t t = s.when(step);
    for (std::ptrdiff_t row = 0; row < count; ++row)
      for (std::ptrdiff_t f = 0; f < F; ++f)
        Mode::put(x_words.get() + row * weights.x_depth, static_cast<int>(f), a.x[((first + row) * T + t) * F + f]);
    for (std::ptrdiff_t j = 0; j < s.vectors(); ++j) {
      const int lanes = s.lanes(j);
      for_tiles(rows, [&](auto size, std::ptrdiff_t row0) {
        constexpr int R = decltype(size)::value;
        preactivate<Mode, Cell, R>(weights, j, x_words.get() + row0 * weights.x_depth, weights.x_depth,
                                   h_words + row0 * h_row, h_row, tile.get(), stream);
        stream.move(stream.left());
        // Saved gates that go far are gathered here first, and leave during the next product.
        float* saved_gates = far ? gates_tile.get() : a.gates + s.saved(t, first + row0, j);
        for (std::ptrdiff_t r = 0; r < R && row0 + r < count; ++r) {
          const std::ptrdiff_t row = row0 + r, at = row * padded + j * kLanes, b = first + row;
          const bool running = t < a.lengths[b];
          Vec v[4], state = load(h + at), memory{};
          for (int i = 0; i < 4; ++i) v[i] = load(tile.get() + (r * 4 + i) * kLanes);
          if (Cell::kHasMemory) memory = load(c + at);
          if (running) {
            Cell::activate(v);
            Cell::advance(v, state, memory);
            state = only(state, lanes);
          }
          store(h_new + at, state);
          if constexpr (!kSame) Mode::put_row(h_words_new + row * h_row, static_cast<int>(j * kLanes), state);
          if (Cell::kHasMemory) store(c + at, memory);
          if (a.outputs) store_some(a.outputs + (b * T + t) * H + j * kLanes, running ? state : Vec{}, lanes, far);
          if (a.gates)
            for (int i = 0; i < 4; ++i) store_some(saved_gates + (r * 4 + i) * lanes, v[i], lanes);
          if (a.memories) store_some(a.memories + (t * s.batch + b) * H + j * kLanes, memory, lanes, far);
        }
        if (a.gates && far)
          stream = Stream(saved_gates, a.gates + s.saved(t, first + row0, j),
                          std::min<std::ptrdiff_t>(R, count - row0) * 4 * lanes);
      });
    }
    std::swap(h, h_new);
    std::swap(h_words, h_words_new);
  }
  stream.move(stream.left());
  for (std::ptrdiff_t row = 0; row < count; ++row) {
    copy(a.h + (first + row) * H, h + row * padded, H);
    if (Cell::kHasMemory) copy(a.c + (first + row) * H, c + row * padded, H);
  }
}

// ---- Backward ----------------------------------------------------------------------------

// A slice's sums over its sequences and steps, packed: for each vector of units, each unit of
// h (or feature of x), the gates in the gradients' order; and four vectors of biases.
template <class Cell>
struct WeightGradients {
  explicit WeightGradients(const Sizes& s)
      : h(s.vectors() * s.padded() * Cell::kProducts * kLanes, true),
        x(s.vectors() * s.even_features() * Cell::kProducts * kLanes, true),
        biases(s.vectors() * 4 * kLanes, true) {}
  Scratch h, x, biases;
};

// sums += (a tile of h or x)^T (gate gradients), both over `depth` words of sequences and steps.
template <class Mode, class Cell, int R>
SEQMNIST_INLINE void add_outer(const float* rows, const float* gradients, std::ptrdiff_t depth, float* sums) {
  constexpr int V = Cell::kColumns;
  for (int first = 0; first < Cell::kProducts; first += V) {
    Vec tile[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) tile[r][v] = load(sums + (r * Cell::kProducts + first + v) * kLanes);
    accumulate<Mode, R, V, true>(tile, rows, 0, gradients + first * kLanes, 4 * kLanes, depth);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) store(sums + (r * Cell::kProducts + first + v) * kLanes, tile[r][v]);
  }
}

// Gradients [rows, gates' units] times packed transposed weights; done(row, column, sum) takes each
// vector, and meanwhile() is called again and again: what it asks of the memory costs nothing here.
template <class Mode, class Cell, class Done, class Meanwhile>
SEQMNIST_INLINE void times_transposed(const Sizes& s, std::ptrdiff_t rows, const float* gradients,
                                      std::ptrdiff_t a_row, std::ptrdiff_t a_panel, const float* packed,
                                      std::ptrdiff_t columns, Done&& done, Meanwhile&& meanwhile) {
  constexpr std::ptrdiff_t depth = words<Mode>(Cell::kProducts * kLanes);
  const std::ptrdiff_t total = s.vectors() * depth;
  auto some = [&](auto width, std::ptrdiff_t column) {
    constexpr int V = decltype(width)::value;
    const float* panel = packed + column * total * kLanes;
    for_tiles(rows, [&](auto size, std::ptrdiff_t row) {
      constexpr int R = decltype(size)::value;
      Vec sums[R][V] = {};
      for (std::ptrdiff_t j = 0; j < s.vectors(); ++j) {
        accumulate<Mode, R, V, false>(sums, gradients + j * a_panel + row * a_row, a_row,
                                      panel + j * depth * V * kLanes, V * kLanes, depth);
        meanwhile();
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) done(row + r, column + v, sums[r][v]);
    });
  };
  std::ptrdiff_t column = 0;
  for (; column + 2 <= columns; column += 2) some(std::integral_constant<int, 2>{}, column);
  if (column < columns) some(std::integral_constant<int, 1>{}, column);
}

template <class Mode, class Cell>
void backward_slice(const Sizes& s, const Arrays& a, std::ptrdiff_t first, std::ptrdiff_t count,
                    WeightGradients<Cell>& sums) {
  constexpr int kGates = Cell::kProducts;
  const std::ptrdiff_t rows = (count + 1) / 2 * 2, padded = s.padded(), H = s.hidden, T = s.time, F = s.features;
  // Steps are gathered until their sequences fill this many rows of the weights' product.
  const std::ptrdiff_t block = std::max<std::ptrdiff_t>(1, 256 / rows);
  // One slot more than are filled: panels a power of two apart would share their cache lines' places.
  const std::ptrdiff_t slots = words<Mode>(block * rows) + 1;
  const std::ptrdiff_t summed = s.vectors() * kGates * kLanes;
  Scratch h_weights(s.vectors() * words<Mode>(summed) * kLanes);
  Scratch x_weights(a.dx ? s.feature_vectors() * words<Mode>(summed) * kLanes : 0);
  pack_transposed<Mode, Cell>(s, a.recurrent_kernel, H, Cell::gate_of_h, h_weights.get());
  if (a.dx) pack_transposed<Mode, Cell>(s, a.kernel, F, Cell::gate_of_x, x_weights.get());
  // Where the gates must be made anew.
  std::unique_ptr<ForwardWeights<Mode, Cell>> forward;
  if (!a.gates) forward = std::make_unique<ForwardWeights<Mode, Cell>>(s, a);
  const std::ptrdiff_t x_row = words<Mode>(F), h_row = words<Mode>(padded);
  Scratch x_words(forward ? rows * x_row : 0, true), h_words(forward ? rows * h_row : 0, true);
  Scratch made(forward ? s.vectors() * rows * 4 * kLanes : 0);

  Scratch dh_scratch(rows * padded, true), dc_scratch(Cell::kHasMemory ? rows * padded : 0, true);
  // Gate gradients of a block, interleaved: [vectors][slots][4] vectors.
  Scratch gradients(s.vectors() * slots * 4 * kLanes, true);
  // Those of the present step, by rows: in float32 the same memory.
  constexpr bool kSame = std::is_same_v<Mode, Float32>;
  constexpr std::ptrdiff_t by_row = words<Mode>(4 * kLanes);
  Scratch gradient_rows(kSame ? 0 : s.vectors() * rows * by_row, true);
  // h before each step and x, interleaved: [groups of kUnit][slots][kUnit].
  const std::ptrdiff_t groups = padded / kUnit, feature_groups = (F + kUnit - 1) / kUnit;
  Scratch h_groups(groups * slots * kUnit, true), x_groups(feature_groups * slots * kUnit, true);
  // What each sequence has had before the present step, and whether it is running in it.
  struct Row {
    const float *h, *c;
    bool running;
  };
  std::vector<Row> now(rows, Row{});
  float* dh = dh_scratch.get();
  float* dc = dc_scratch.get();
  for (std::ptrdiff_t row = 0; row < count; ++row) {
    copy(dh + row * padded, a.d_h + (first + row) * H, H);
    if (Cell::kHasMemory) copy(dc + row * padded, a.d_c + (first + row) * H, H);
  }

  std::ptrdiff_t filled = 0;  // steps in the block
  for (std::ptrdiff_t step = T - 1; step >= 0; --step) {
    const std::ptrdiff_t t = s.when(step), before = s.when(step - 1);
    const std::ptrdiff_t slot0 = filled * rows / Mode::kPack;
    for (std::ptrdiff_t row = 0; row < count; ++row) {
      const std::ptrdiff_t b = first + row, k = filled * rows + row;
      const bool is_first = s.reverse ? t == std::min<std::ptrdiff_t>(a.lengths[b], T) - 1 : t == 0;
      now[row].running = t < a.lengths[b];
      now[row].h = is_first ? a.h0 + b * H : a.outputs + (b * T + before) * H;
      if (Cell::kHasMemory) now[row].c = is_first ? a.c0 + b * H : a.memories + (before * s.batch + b) * H;
      const float* x = a.x + (b * T + t) * F;
      for (std::ptrdiff_t f = 0; f < F; ++f) {
        float* word = x_groups.get() + ((f / kUnit) * slots + k / Mode::kPack) * kUnit + f % kUnit;
        Mode::put(word, static_cast<int>(k % Mode::kPack), x[f]);
        if (forward) Mode::put(x_words.get() + row * x_row, static_cast<int>(f), x[f]);
      }
    }
    if (forward) {
      Stream nothing;
      for (std::ptrdiff_t row = 0; row < count; ++row)
        for (std::ptrdiff_t j = 0; j < s.vectors() && now[row].running; ++j)
          Mode::put_row(h_words.get() + row * h_row, static_cast<int>(j * kLanes),
                        load_some(now[row].h + j * kLanes, s.lanes(j)));
      for (std::ptrdiff_t j = 0; j < s.vectors(); ++j)
        for_tiles(rows, [&](auto size, std::ptrdiff_t row) {
          preactivate<Mode, Cell, decltype(size)::value>(*forward, j, x_words.get() + row * x_row, x_row,
                                                         h_words.get() + row * h_row, h_row,
                                                         made.get() + (j * rows + row) * 4 * kLanes, nothing);
        });
    }

    for (std::ptrdiff_t tile = 0; tile < rows; tile += kTileRows) {
      const std::ptrdiff_t tile_end = std::min(rows, tile + kTileRows);
      for (std::ptrdiff_t b = first + tile; step > 1 && b < first + std::min(count, tile_end); ++b) {
        const std::ptrdiff_t earlier = s.when(step - 2);
        Ahead(a.outputs + (b * T + earlier) * H, H).ask(H);
        if (Cell::kHasMemory) Ahead(a.memories + (earlier * s.batch + b) * H, H).ask(H);
      }
      for (std::ptrdiff_t j = 0; j < s.vectors(); ++j) {
        const int lanes = s.lanes(j);
        Vec bias_sums[4];
        for (int i = 0; i < 4; ++i) bias_sums[i] = load(sums.biases.get() + (j * 4 + i) * kLanes);
        for (std::ptrdiff_t row0 = tile; row0 < tile_end; row0 += 2) {
          Vec v[2][4] = {}, h[2] = {};
          for (int r = 0; r < 2; ++r) {
            const std::ptrdiff_t row = row0 + r, b = first + row, at = row * padded + j * kLanes;
            if (!now[row].running) continue;  // Its gradients pass unchanged.
            h[r] = load_some(now[row].h + j * kLanes, lanes);
            for (int i = 0; i < 4; ++i)
              v[r][i] = forward ? load(made.get() + ((j * rows + row) * 4 + i) * kLanes)
                                : load_some(a.gates + s.saved(t, b, j) + i * lanes, lanes);
            if (forward) Cell::activate(v[r]);
            for (int i = 0; forward && i < 4; ++i) v[r][i] = only(v[r][i], lanes);
            Vec dh_row = load(dh + at), dc_row{}, c_before{}, c{};
            if (a.d_outputs) dh_row += load_some(a.d_outputs + (b * T + t) * H + j * kLanes, lanes);
            if constexpr (Cell::kHasMemory) {
              dc_row = load(dc + at);
              c = load_some(a.memories + (t * s.batch + b) * H + j * kLanes, lanes);
              c_before = load_some(now[row].c + j * kLanes, lanes);
            }
            Cell::differentiate(v[r], h[r], c_before, c, dh_row, dc_row);
            store(dh + at, dh_row);
            if constexpr (Cell::kHasMemory) store(dc + at, dc_row);
          }
          const std::ptrdiff_t slot = slot0 + row0 / Mode::kPack;
          float* interleaved = gradients.get() + (j * slots + slot) * 4 * kLanes;
          for (int i = 0; i < 4; ++i) {
            bias_sums[i] += v[0][i] + v[1][i];
            Vec pair[2];
            const int n = Mode::interleave(v[0][i], v[1][i], pair);
            for (int w = 0; w < n; ++w) store(interleaved + (w * 4 + i) * kLanes, pair[w]);
            if constexpr (!kSame)
              for (int r = 0; r < 2; ++r)
                Mode::put_row(gradient_rows.get() + (j * rows + row0 + r) * by_row, i * kLanes, v[r][i]);
          }
          Vec pair[2];
          const int n = Mode::interleave(h[0], h[1], pair);
          float* group = h_groups.get() + ((j * kLanes / kUnit) * slots + slot) * kUnit + j * kLanes % kUnit;
          for (int w = 0; w < n; ++w) store(group + w * kUnit, pair[w]);
        }
        for (int i = 0; i < 4; ++i) store(sums.biases.get() + (j * 4 + i) * kLanes, bias_sums[i]);
      }
    }

    const float* by_rows = kSame ? gradients.get() + slot0 * 4 * kLanes : gradient_rows.get();
    const std::ptrdiff_t a_panel = (kSame ? slots : rows) * by_row;
    const bool is_saved_ahead = a.gates && step > 0;
    Ahead gates_ahead(is_saved_ahead ? a.gates + s.saved(before, first, 0) : nullptr, is_saved_ahead ? count * 4 * H : 0);
    times_transposed<Mode, Cell>(s, rows, by_rows + words<Mode>(Cell::kFromH * kLanes), by_row, a_panel,
                                 h_weights.get(), s.vectors(), [&](std::ptrdiff_t row, std::ptrdiff_t j, Vec sum) {
                                   // The product first: added to the larger share at the end, it loses least.
                                   float* to = dh + row * padded + j * kLanes;
                                   store(to, load(to) + sum);
                                 },
                                 [&] { gates_ahead.ask(128); });
    if (a.dx)
      times_transposed<Mode, Cell>(s, rows, by_rows + words<Mode>(Cell::kFromX * kLanes), by_row, a_panel,
                                   x_weights.get(), s.feature_vectors(),
                                   [&](std::ptrdiff_t row, std::ptrdiff_t column, Vec sum) {
                                     const std::ptrdiff_t f = column * kLanes;
                                     if (row < count)
                                       store_some(a.dx + ((first + row) * T + t) * F + f, sum,
                                                  static_cast<int>(std::min<std::ptrdiff_t>(kLanes, F - f)));
                                   },
                                   [] {});

    if (++filled == block || step == 0) {
      const std::ptrdiff_t depth = words<Mode>(filled * rows);
      for (std::ptrdiff_t j = 0; j < s.vectors(); ++j) {
        const float* panel = gradients.get() + j * slots * 4 * kLanes;
        auto in_group = [&](const Scratch& all, std::ptrdiff_t i) { return all.get() + i / kUnit * slots * kUnit + i % kUnit; };
        for (std::ptrdiff_t i = 0; i < padded; i += kTileRows)
          add_outer<Mode, Cell, kTileRows>(in_group(h_groups, i), panel + Cell::kFromH * kLanes, depth,
                                           sums.h.get() + (j * padded + i) * kGates * kLanes);
        for_tiles((F + 1) / 2 * 2, [&](auto size, std::ptrdiff_t f) {
          add_outer<Mode, Cell, decltype(size)::value>(in_group(x_groups, f), panel + Cell::kFromX * kLanes, depth,
                                                       sums.x.get() + (j * s.even_features() + f) * kGates * kLanes);
        });
      }
      filled = 0;
    }
  }
  for (std::ptrdiff_t row = 0; row < count; ++row) {
    copy(a.dh0 + (first + row) * H, dh + row * padded, H);
    if (Cell::kHasMemory) copy(a.dc0 + (first + row) * H, dc + row * padded, H);
  }
}

// The sums of a replica's slices, in their order, into the gradients' own layout.
template <class Cell>
void finish(const Sizes& s, const Arrays& a, const std::unique_ptr<WeightGradients<Cell>>* slices, std::ptrdiff_t n) {
  constexpr int kGates = Cell::kProducts;
  auto unpack = [&](Scratch WeightGradients<Cell>::*part, std::ptrdiff_t depth, std::ptrdiff_t padded_depth,
                    int (*gate_of)(int), float* to) {
    for (std::ptrdiff_t k = 0; k < depth; ++k)
      for (int v = 0; v < kGates; ++v)
        for (std::ptrdiff_t j = 0; j < s.vectors(); ++j) {
          const std::ptrdiff_t from = ((j * padded_depth + k) * kGates + v) * kLanes;
          Vec sum{};
          for (std::ptrdiff_t i = 0; i < n; ++i) sum += load((slices[i].get()->*part).get() + from);
          store_some(to + (k * kGates + gate_of(v)) * s.hidden + j * kLanes, sum, s.lanes(j));
        }
  };
  unpack(&WeightGradients<Cell>::h, s.hidden, s.padded(), Cell::gate_of_h, a.drecurrent_kernel);
  unpack(&WeightGradients<Cell>::x, s.features, s.even_features(), Cell::gate_of_x, a.dkernel);
  for (std::ptrdiff_t j = 0; j < s.vectors(); ++j)
    for (int v = 0; v < kGates; ++v)
      for (bool of_h : {false, true}) {
        float* to = of_h ? a.drecurrent_bias : a.dbias;
        if (!to) continue;
        const int place = v + (of_h ? Cell::kFromH : Cell::kFromX);
        Vec sum{};
        for (std::ptrdiff_t i = 0; i < n; ++i) sum += load(slices[i]->biases.get() + (j * 4 + place) * kLanes);
        const int gate = of_h ? Cell::gate_of_h(v) : Cell::gate_of_x(v);
        store_some(to + gate * s.hidden + j * kLanes, sum, s.lanes(j));
      }
}

// ---- XLA's calls -------------------------------------------------------------------------

// An array of a call: its name, its place in Arrays, the shape of one replica. Where it is
// optional it may be empty instead, which means not given or not wanted.
struct Field {
  const char* name;
  float* Arrays::*place;
  std::vector<int64_t> shape;
  bool optional = false;
};

// A checked operand or result. Leading axes, which vmap has added, have the call's size, or 1
// where all replicas share the array.
struct Operand {
  char* data = nullptr;
  std::ptrdiff_t bytes = 0;             // of one replica
  std::vector<std::ptrdiff_t> strides;  // by leading axis, in replicas
};

class Call {
 public:
  Call(ffi::RemainingArgs args, ffi::RemainingRets rets, bool lstm, bool reverse)
      : args_(args), rets_(rets), lstm_(lstm) {
    // x and the recurrent kernel stand first; all else must fit them.
    const auto x = args.get<ffi::AnyBuffer>(0), recurrent_kernel = args.get<ffi::AnyBuffer>(2);
    if (!x || !recurrent_kernel || x->dimensions().size() < 3 || recurrent_kernel->dimensions().size() < 2) {
      fail("x or recurrent_kernel", "is missing or has too few axes");
      return;
    }
    const auto dims = x->dimensions(), weights = recurrent_kernel->dimensions();
    const std::size_t n = dims.size() - 3;
    sizes = {dims[n], dims[n + 1], dims[n + 2], weights[weights.size() - 2], reverse};
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
    if (args_.size() != arg_fields.size() + 1 || rets_.size() != ret_fields.size()) {
      fail("the call", "has another number of arrays");
      return false;
    }
    for (std::size_t i = 0; i < arg_fields.size(); ++i)
      bind_one(arg_fields[i], *args_.get<ffi::AnyBuffer>(i), ffi::DataType::F32);
    for (std::size_t i = 0; i < ret_fields.size(); ++i) {
      const ffi::AnyBuffer buffer = **rets_.get<ffi::AnyBuffer>(i);  // a view; what it is taken from ends here
      bind_one(ret_fields[i], buffer, ffi::DataType::F32);
      prefer_huge_pages(buffer.untyped_data(), buffer.size_bytes());
    }
    bind_one({"lengths", nullptr, {sizes.batch}}, *args_.get<ffi::AnyBuffer>(arg_fields.size()), ffi::DataType::S32);
    return problem.empty();
  }

  Arrays arrays(std::ptrdiff_t replica) const {
    Arrays a{};
    for (const auto& [place, operand] : operands_) {
      if (operand.bytes == 0) continue;
      std::ptrdiff_t offset = 0, rest = replica;
      for (std::size_t axis = leading_.size(); axis-- > 0; rest /= leading_[axis])
        offset += rest % leading_[axis] * operand.strides[axis];
      char* data = operand.data + offset * operand.bytes;
      if (place)
        a.*place = reinterpret_cast<float*>(data);
      else
        a.lengths = reinterpret_cast<const int32_t*>(data);
    }
    return a;
  }

  // Runs work(mode, cell) for the cell and the precision that are wanted.
  template <class Work>
  ffi::Error run(bool bfloat16, Work&& work) const {
    try {
      if (lstm_)
        bfloat16 ? work(BFloat16{}, Lstm{}) : work(Float32{}, Lstm{});
      else
        bfloat16 ? work(BFloat16{}, Gru{}) : work(Float32{}, Gru{});
    } catch (const std::exception& error) {
      return ffi::Error(ffi::ErrorCode::kResourceExhausted, std::string("seqmnist_jax.rnn: ") + error.what());
    }
    return ffi::Error::Success();
  }

  ffi::Error invalid() const { return ffi::Error(ffi::ErrorCode::kInvalidArgument, "seqmnist_jax.rnn: " + problem); }

  Sizes sizes{};
  std::ptrdiff_t replicas = 0;
  std::string problem;

 private:
  void fail(const std::string& name, const std::string& what) {
    if (problem.empty()) problem = name + " " + what;
  }

  void bind_one(const Field& field, const ffi::AnyBuffer& buffer, ffi::DataType type) {
    const auto dims = buffer.dimensions();
    if (buffer.element_type() != type) return fail(field.name, "has the wrong dtype");
    if (dims.size() != leading_.size() + field.shape.size()) return fail(field.name, "has the wrong number of axes");
    Operand operand;
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
    operands_.emplace_back(field.place, operand);
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
  bool lstm_;
  std::vector<int64_t> leading_;
  std::vector<std::pair<float* Arrays::*, Operand>> operands_;
};

// What both calls take, in this order; the lengths come last of all arguments.
std::vector<Field> layer_fields(const Sizes& s, bool lstm) {
  const std::ptrdiff_t gates = (lstm ? 4 : 3) * s.hidden;
  return {{"x", &Arrays::x, {s.batch, s.time, s.features}},
          {"kernel", &Arrays::kernel, {s.features, gates}},
          {"recurrent_kernel", &Arrays::recurrent_kernel, {s.hidden, gates}},
          {"bias", &Arrays::bias, {gates}},
          {"recurrent_bias", &Arrays::recurrent_bias, {lstm ? 0 : gates}},
          {"h0", &Arrays::h0, {s.batch, s.hidden}},
          {"c0", &Arrays::c0, {lstm ? s.batch : 0, s.hidden}}};
}

// The results that are saved for the way back.
std::vector<Field> saved_fields(const Sizes& s, bool lstm) {
  return {{"outputs", &Arrays::outputs, {s.batch, s.time, s.hidden}, true},
          {"gates", &Arrays::gates, {s.time, s.batch, 4 * s.hidden}, true},
          {"memories", &Arrays::memories, {lstm ? s.time : 0, s.batch, s.hidden}, true}};
}

std::vector<Field> operator+(std::vector<Field> a, const std::vector<Field>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

ffi::Error forward(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, bool lstm, bool reverse,
                   bool bfloat16) {
  Call call(args, rets, lstm, reverse);
  const Sizes& s = call.sizes;
  const std::vector<Field> carry = {{"h", &Arrays::h, {s.batch, s.hidden}},
                                    {"c", &Arrays::c, {lstm ? s.batch : 0, s.hidden}}};
  if (!call.bind(layer_fields(s, lstm), carry + saved_fields(s, lstm))) return call.invalid();
  const std::ptrdiff_t threads = std::max<std::ptrdiff_t>(1, pool.num_threads());
  const Slices slices(call.replicas, s.batch, threads, kTileRows);
  return call.run(bfloat16, [&](auto mode, auto cell) {
    parallel_for(pool, threads, call.replicas * slices.per_replica, [&](std::ptrdiff_t i) {
      const std::ptrdiff_t first = i % slices.per_replica * slices.rows;
      forward_slice<decltype(mode), decltype(cell)>(s, call.arrays(i / slices.per_replica), first,
                                                    std::min(slices.rows, s.batch - first));
    });
  });
}

// Where gates is empty they are made anew from outputs; where d_outputs is, only the last step's
// output has a gradient; dx is made where it is not empty.
ffi::Error backward(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, bool lstm, bool reverse,
                    bool bfloat16) {
  Call call(args, rets, lstm, reverse);
  const Sizes& s = call.sizes;
  const std::ptrdiff_t gates = (lstm ? 4 : 3) * s.hidden;
  const std::vector<Field> cotangents = {{"d_h", &Arrays::d_h, {s.batch, s.hidden}},
                                         {"d_c", &Arrays::d_c, {lstm ? s.batch : 0, s.hidden}},
                                         {"d_outputs", &Arrays::d_outputs, {s.batch, s.time, s.hidden}, true}};
  const std::vector<Field> gradients = {{"dh0", &Arrays::dh0, {s.batch, s.hidden}},
                                        {"dc0", &Arrays::dc0, {lstm ? s.batch : 0, s.hidden}},
                                        {"dx", &Arrays::dx, {s.batch, s.time, s.features}, true},
                                        {"dkernel", &Arrays::dkernel, {s.features, gates}},
                                        {"drecurrent_kernel", &Arrays::drecurrent_kernel, {s.hidden, gates}},
                                        {"dbias", &Arrays::dbias, {gates}},
                                        {"drecurrent_bias", &Arrays::drecurrent_bias, {lstm ? 0 : gates}}};
  std::vector<Field> saved = saved_fields(s, lstm);
  saved[0].optional = saved[2].optional = false;
  if (!call.bind(layer_fields(s, lstm) + saved + cotangents, gradients)) return call.invalid();
  const std::ptrdiff_t threads = std::max<std::ptrdiff_t>(1, pool.num_threads());
  const Slices slices(call.replicas, s.batch, threads, kTileRows);
  return call.run(bfloat16, [&](auto mode, auto cell) {
    using Cell = decltype(cell);
    std::vector<std::unique_ptr<WeightGradients<Cell>>> sums(call.replicas * slices.per_replica);
    parallel_for(pool, threads, call.replicas * slices.per_replica, [&](std::ptrdiff_t i) {
      const std::ptrdiff_t first = i % slices.per_replica * slices.rows;
      sums[i] = std::make_unique<WeightGradients<Cell>>(s);
      backward_slice<decltype(mode), Cell>(s, call.arrays(i / slices.per_replica), first,
                                           std::min(slices.rows, s.batch - first), *sums[i]);
    });
    parallel_for(pool, threads, call.replicas, [&](std::ptrdiff_t replica) {
      finish<Cell>(s, call.arrays(replica), sums.data() + replica * slices.per_replica, slices.per_replica);
    });
  });
}

}  // namespace
}  // namespace seqmnist

#define SEQMNIST_BINDING                       \
  xla::ffi::Ffi::Bind()                        \
      .Ctx<xla::ffi::ThreadPool>()             \
      .RemainingArgs()                         \
      .RemainingRets()                         \
      .Attr<bool>("lstm")                      \
      .Attr<bool>("reverse")                   \
      .Attr<bool>("bfloat16")

XLA_FFI_DEFINE_HANDLER_SYMBOL(seqmnist_forward, seqmnist::forward, SEQMNIST_BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(seqmnist_backward, seqmnist::backward, SEQMNIST_BINDING);
