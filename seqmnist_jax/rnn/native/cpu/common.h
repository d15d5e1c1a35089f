// Below the cell: what kernels with products between units and those without have in common.

namespace seqmnist {
namespace {

// Compiled once for tiles of all sizes: of a sum of products a compiler rounds which it likes, and what becomes of a
// sequence must not depend on how many others are in its batch.
#define SEQMNIST_ONCE __attribute__((noinline, noclone))

constexpr int at_least_one(int n) { return n > 0 ? n : 1; }
constexpr int kOuters = Cell::kRounds > 0 || Cell::kFront ? int(std::size(Cell::outers)) : 0,
              kFrontPasses = Cell::kFront ? int(std::size(Cell::front_passes)) : 0;

// Where an axis has size zero its arrays are null, which memcpy must not be given.
inline void copy(float* to, const float* from, std::ptrdiff_t n) {
  if (n > 0) std::memcpy(to, from, sizeof(float) * n);
}

// Calls work(size, row) for tiles of rows; rows is even, sizes are 8 (or 4) and then 4 and 2.
template <class Work>
SEQMNIST_INLINE void for_tiles(std::ptrdiff_t rows, Work&& work) {
  std::ptrdiff_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) work(Int<kTileRows>{}, row);
  if (kTileRows > 4 && row + 4 <= rows) {
    work(Int<4>{}, row);
    row += 4;
  }
  if (row < rows) work(Int<2>{}, row);
}

// Calls work(vectors, j) for blocks of W vectors of units, and one by one for what is left.
template <int W, class Work>
SEQMNIST_INLINE void for_blocks(std::ptrdiff_t vectors, Work&& work) {
  std::ptrdiff_t j = 0;
  for (; j + W <= vectors; j += W) work(Int<W>{}, j);
  if constexpr (W > 1)
    for (; j < vectors; ++j) work(Int<1>{}, j);
}

// Numbers that a call may write and still find in the caches.
constexpr std::ptrdiff_t kCached = 8 << 20;

// A slice's sizes. Features are padded to whole groups.
struct Slice : Sizes {
  std::ptrdiff_t first, count, rows, units, vectors, plane, feature_units, feature_vectors;

  Slice(const Sizes& s, std::ptrdiff_t first, std::ptrdiff_t count) : Sizes(s), first(first), count(count) {
    rows = (count + 1) / 2 * 2;
    units = (hidden + kPadding - 1) / kPadding * kPadding;
    vectors = units / kLanes;
    plane = rows * units;
    feature_units = (features + kUnit - 1) / kUnit * kUnit;
    feature_vectors = (features + kLanes - 1) / kLanes;
  }
  // A row's x, or its cotangent, at a time.
  template <class Float>
  SEQMNIST_INLINE Float* x(Float* x, std::ptrdiff_t row, std::ptrdiff_t t) const {
    return x + ((first + row) * time + t) * features;
  }
  // Vector j of a row of x; beyond its features are zeros.
  SEQMNIST_INLINE Vec features_of(const float* row, std::ptrdiff_t j) const {
    return load_some(row + j * kLanes, feature_lanes(j));
  }
  // How many of vector j's lanes are features.
  int feature_lanes(std::ptrdiff_t j) const {
    return static_cast<int>(std::min<std::ptrdiff_t>(kLanes, features - j * kLanes));
  }
  std::ptrdiff_t when(std::ptrdiff_t step) const { return reverse ? time - 1 - step : step; }
  // How many of vector j's lanes are units.
  int lanes(std::ptrdiff_t j) const {
    return static_cast<int>(std::clamp<std::ptrdiff_t>(hidden - j * kLanes, 0, kLanes));
  }
  // What is kept stands in groups, those of a stage together; within a step and a group, tiles of sequences are contiguous,
  // so that both directions of the loop over time stream: for each vector of units, each sequence, the group's vectors.
  std::ptrdiff_t kept(int group, std::ptrdiff_t t) const {
    return (t * Cell::kKept + Cell::kept_before[group]) * batch * units;
  }
  std::ptrdiff_t tile_rows(std::ptrdiff_t row) const {
    return std::min<std::ptrdiff_t>(kTileRows, batch - first - row / kTileRows * kTileRows);
  }
  std::ptrdiff_t kept(int group, std::ptrdiff_t t, std::ptrdiff_t row, std::ptrdiff_t j) const {
    const std::ptrdiff_t tile = row / kTileRows * kTileRows;
    const std::ptrdiff_t vector = ((first + tile) * vectors + j * tile_rows(row) + row - tile) * kLanes;
    return kept(group, t) + vector * Cell::kept_count[group];
  }
  // Whether what is kept will have left the caches before it is read.
  bool is_large() const { return time * batch * units * at_least_one(Cell::kKept) > kCached; }
};

// How many steps a sequence runs; none for the rows that fill up the last pair.
std::vector<std::ptrdiff_t> running_steps(const Slice& s, const Arrays& a) {
  std::vector<std::ptrdiff_t> steps(s.rows, 0);
  for (std::ptrdiff_t row = 0; row < s.count; ++row)
    steps[row] = std::clamp<std::ptrdiff_t>(a.lengths[s.first + row], 0, s.time);
  return steps;
}

// Vectors [number, hidden] padded to units.
void pad_vectors(const Slice& s, const float* vectors, float* to) {
  for (int i = 0; i < Cell::kVectors; ++i) copy(to + i * s.units, vectors + i * s.hidden, s.hidden);
}

// The values of x that stages read, made of rows of x: one plane for each. The matrix is packed as `Panels` has it.
template <class Mode>
class Front {
 public:
  Front(const Slice& s, const Arrays& a, std::ptrdiff_t rows, const float* biases)
      : s(s),
        biases(biases),
        plane(rows * s.units),
        depth(words<Mode>(s.features)),
        panel(depth * Cell::kInputs * kLanes),
        panels(s.vectors * panel, true),
        x(rows * depth + kLanes, true),
        values(Cell::kInputs * plane) {
    for (std::ptrdiff_t j = 0; j < s.vectors; ++j)
      for (const FrontPass& pass : Cell::front_passes)
        for (std::ptrdiff_t f = 0; f < s.features; ++f)
          for (int c = 0; c < pass.width; ++c)
            for (int lane = 0; lane < s.lanes(j); ++lane)
              Mode::put(panels.get() + j * panel + (pass.first * depth + f / Mode::kPack * pass.width + c) * kLanes,
                        static_cast<int>(lane * Mode::kPack + f % Mode::kPack),
                        a.inputs[(f * Cell::kInputs + pass.first + c) * s.hidden + j * kLanes + lane]);
  }

  // Of so many rows of x; `of(row)` is where one stands.
  template <class Of>
  void make(std::ptrdiff_t count, Of&& of) {
    // The last vector of a row may reach into the next one, which is written after it; behind the last row is room.
    for (std::ptrdiff_t row = 0; row < count; ++row)
      for (std::ptrdiff_t j = 0; j < s.feature_vectors; ++j)
        Mode::put_row(x.get() + row * depth, static_cast<int>(j * kLanes), s.features_of(of(row), j));
    each<0, kFrontPasses>([&](auto number) {
      constexpr int pass = decltype(number)::value;
      for_blocks<Cell::front_passes[pass].width == 1 ? 2 : 1>(s.vectors, [&](auto width, std::ptrdiff_t j) {
        for_tiles((count + 1) / 2 * 2, [&](auto size, std::ptrdiff_t row) {
          multiply<pass, decltype(size)::value, decltype(width)::value>(j, row);
        });
      });
    });
  }
  SEQMNIST_INLINE Vec operator()(int i, std::ptrdiff_t at) const { return load(values.get() + i * plane + at); }

 private:
  // Of W vectors of units; more than one only where the pass makes one value of each.
  template <int kPass, int R, int W>
  SEQMNIST_INLINE void multiply(std::ptrdiff_t j, std::ptrdiff_t row) {
    constexpr FrontPass pass = Cell::front_passes[kPass];
    constexpr int V = W * pass.width;
    const std::ptrdiff_t bias_step = pass.width == 1 ? kLanes : s.units, step = pass.width == 1 ? kLanes : plane;
    Vec sums[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[r][v] = load(biases + pass.first * s.units + j * kLanes + v * bias_step);
    accumulate<Mode, R, V, false>(sums, x.get() + row * depth, depth,
                                  panels.get() + j * panel + pass.first * depth * kLanes, pass.width * kLanes, depth,
                                  pass.width == 1 ? panel : kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        store(values.get() + pass.first * plane + (row + r) * s.units + j * kLanes + v * step, sums[r][v]);
  }

  const Slice& s;
  const float* biases;
  const std::ptrdiff_t plane, depth, panel;
  Scratch panels, x, values;
};
struct NoFront {
  NoFront(const Slice&, const Arrays&, std::ptrdiff_t, const float*) {}
  template <class Of>
  void make(std::ptrdiff_t, Of&&) {}
  Vec operator()(int, std::ptrdiff_t) const { return Vec{}; }
};
template <class Mode, bool kHas>
using FrontIf = std::conditional_t<Cell::kFront && kHas, Front<Mode>, NoFront>;

// How many units a source has; behind the last one stands x.
inline std::ptrdiff_t units_of(const Slice& s, int source) {
  return source == Cell::kSources ? s.feature_units : s.units;
}

// Where a slice's share of the sums stands: of each `Outer`, for each block of vectors of units, each unit of the source,
// the vectors; behind them the sums of vectors.
struct Share {
  explicit Share(const Slice& s) {
    for (int i = 0; i < kOuters; ++i) {
      at[i] = floats;
      floats += s.vectors * units_of(s, Cell::outers[i].source) * Cell::outers[i].width * kLanes;
    }
    sums = floats;
    floats += Cell::kSums * s.units;
  }
  std::ptrdiff_t at[at_least_one(kOuters)], sums, floats = 0;
};
constexpr int outer_vectors(int i) { return Cell::outers[i].width == 1 ? 2 : 1; }

// The matrix from the columns of the gradients to features of x, packed as `Panels` has it.
template <class Mode>
class FrontTransposed {
 public:
  explicit FrontTransposed(const Slice& s, const Arrays& a) : panel(depth(s) * kLanes) {
    if (!a.d_x) return;
    data = std::make_unique<Scratch>(s.feature_vectors * panel, true);
    for_blocks<2>(s.feature_vectors, [&](auto width, std::ptrdiff_t at) {
      constexpr int W = decltype(width)::value;
      for (int w = 0; w < W; ++w) {
        float* to = data->get() + at * panel + w * kLanes;
        for (const Term& term : Cell::front_terms) {
          const std::ptrdiff_t word = words<Mode>(term.count * kLanes);
          for (int i = 0; i < Cell::kInputs; ++i) {
            const int n = Cell::input_column[i] - term.first;
            if (n >= 0 && n < term.count) put(s, a, at + w, i, n, W, word, to);
          }
          to += s.vectors * word * W * kLanes;
        }
      }
    });
  }
  const float* at(std::ptrdiff_t j) const { return data->get() + j * panel; }

 private:
  static std::ptrdiff_t depth(const Slice& s) {
    std::ptrdiff_t sum = 0;
    for (const Term& term : Cell::front_terms) sum += s.vectors * words<Mode>(term.count * kLanes);
    return sum;
  }
  // Features of vector j, from the units of column n of a term; columns that serve several values take their sum.
  static void put(const Slice& s, const Arrays& a, std::ptrdiff_t j, int i, int n, int W, std::ptrdiff_t word,
                  float* to) {
    for (int other = 0; other < i; ++other)
      if (Cell::input_column[other] == Cell::input_column[i]) return;
    for (std::ptrdiff_t f = j * kLanes; f < std::min(s.features, (j + 1) * kLanes); ++f)
      for (std::ptrdiff_t unit = 0; unit < s.hidden; ++unit) {
        float sum = 0;
        for (int other = i; other < Cell::kInputs; ++other)
          if (Cell::input_column[other] == Cell::input_column[i])
            sum += a.inputs[(f * Cell::kInputs + other) * s.hidden + unit];
        const std::ptrdiff_t k = unit / kLanes * word * Mode::kPack + n * kLanes + unit % kLanes;
        Mode::put(to + k / Mode::kPack * W * kLanes, static_cast<int>(f % kLanes * Mode::kPack + k % Mode::kPack), sum);
      }
  }

  std::ptrdiff_t panel;
  std::unique_ptr<Scratch> data;
};

// The cotangents of products' results, and of what x's matrix makes where those are others, of the rows of some steps,
// each in a slot; and what was multiplied there. They give their share of the matrices' gradients together, still in cache.
template <class Mode>
class Gradients {
 public:
  static constexpr bool kSame = std::is_same_v<Mode, Float32>;
  static constexpr std::ptrdiff_t by_row = words<Mode>(at_least_one(Cell::kColumns) * kLanes);

  // For so many rows in all, and of one step.
  Gradients(const Slice& s, const Arrays& a, std::ptrdiff_t all_rows, std::ptrdiff_t rows)
      // One more than are filled: panels a power of two apart would share their cache lines' places.
      : slots(words<Mode>(all_rows) + 1),
        s(s),
        step_rows(rows),
        all(s.vectors * slots * Cell::kColumns * kLanes, true),
        rows(kSame ? 0 : s.vectors * rows * by_row, true),
        groups((Cell::kSources * s.units + (Cell::kFront ? s.feature_units : 0)) * slots, true),
        front(s, a) {}

  // Of vector j in a slot: interleaved words of rows, [columns] vectors.
  SEQMNIST_INLINE float* at(std::ptrdiff_t j, std::ptrdiff_t slot) const {
    return all.get() + (j * slots + slot) * Cell::kColumns * kLanes;
  }
  // A source's vector j in a slot; it stands in groups of kUnit units.
  SEQMNIST_INLINE float* group(int source, std::ptrdiff_t j, std::ptrdiff_t slot) const {
    const std::ptrdiff_t unit = source * s.units + j * kLanes;
    return groups.get() + (unit / kUnit * slots + slot) * kUnit + unit % kUnit;
  }
  // A row's columns as words, each vector of units `row_step` from the one before.
  SEQMNIST_INLINE const float* words_of(std::ptrdiff_t row) const {
    return kSame ? at(0, slot0 + row) : rows.get() + row * by_row;
  }
  SEQMNIST_INLINE std::ptrdiff_t row_step() const { return (kSame ? slots : step_rows) * by_row; }

  // Column i of two rows, which become words together; in float32 a row is its words.
  SEQMNIST_INLINE void put(int i, std::ptrdiff_t j, std::ptrdiff_t row, const Vec& even, const Vec& odd) const {
    const std::ptrdiff_t slot = (slot0 + row) / Mode::kPack;
    Vec pair[2];
    const int n = Mode::interleave(even, odd, pair);
    for (int w = 0; w < n; ++w) store(at(j, slot + w) + i * kLanes, pair[w]);
    Mode::put_row(rows.get() + (j * step_rows + row) * by_row, i * kLanes, even);
    Mode::put_row(rows.get() + (j * step_rows + row + 1) * by_row, i * kLanes, odd);
  }

  // A source's vector j of two rows, which become words together.
  SEQMNIST_INLINE void put_group(int source, std::ptrdiff_t j, std::ptrdiff_t row, Vec even, Vec odd) const {
    Vec pair[2];
    const int n = Mode::interleave(even, odd, pair);
    for (int w = 0; w < n; ++w) store(group(source, j, (slot0 + row) / Mode::kPack + w), pair[w]);
  }

  // Rows of x, where their share of its matrix' gradient will read them.
  template <class Of>
  void take_x(std::ptrdiff_t count, Of&& of) const {
    for (std::ptrdiff_t row = 0; row < count; row += 2)
      for (std::ptrdiff_t j = 0; j < s.feature_vectors; ++j)
        put_group(Cell::kSources, j, row, s.features_of(of(row), j),
                  row + 1 < count ? s.features_of(of(row + 1), j) : Vec{});
  }
  // The cotangents of rows of x.
  template <class To>
  void give_x(std::ptrdiff_t count, To&& to) const {
    for_blocks<2>(s.feature_vectors, [&](auto width, std::ptrdiff_t j) {
      for_tiles((count + 1) / 2 * 2, [&](auto size, std::ptrdiff_t row) {
        give_x<decltype(width)::value, decltype(size)::value>(j, row, count, to);
      });
    });
  }
  // The share of the matrices' gradients of so many rows, added to a slice's.
  void add_to(float* share, const Share& place, std::ptrdiff_t count) const {
    each<0, kOuters>([&](auto outer) {
      constexpr int kOuter = decltype(outer)::value;
      for_blocks<outer_vectors(kOuter)>(s.vectors, [&](auto width, std::ptrdiff_t j) {
        add_outer<kOuter, decltype(width)::value>(share + place.at[kOuter], j, words<Mode>(count));
      });
    });
  }

  const std::ptrdiff_t slots;
  std::ptrdiff_t slot0 = 0;  // of the step's first row

 private:
  template <int W, int R, class To>
  SEQMNIST_INLINE void give_x(std::ptrdiff_t j, std::ptrdiff_t row, std::ptrdiff_t count, To&& to) const {
    const float* panel = front.at(j);
    Vec sums[R][W] = {}, made[R][W];
    for (const Term& term : Cell::front_terms) {
      const std::ptrdiff_t depth = words<Mode>(term.count * kLanes);
      for (std::ptrdiff_t block = 0; block < s.vectors; ++block, panel += depth * W * kLanes)
        accumulate<Mode, R, W, false>(sums, words_of(row) + words<Mode>(term.first * kLanes) + block * row_step(), by_row,
                                      panel, W * kLanes, depth);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int w = 0; w < W; ++w)
        made[r][w] = sums[r][w];  // The sums themselves GCC would keep in memory if parts of them were stored.
    for (int r = 0; r < R && row + r < count; ++r)
      for (int w = 0; w < W; ++w) store_some(to(row + r) + (j + w) * kLanes, made[r][w], s.feature_lanes(j + w));
  }

  // That of one matrix, of W vectors of units.
  template <int kOuter, int W>
  SEQMNIST_INLINE void add_outer(float* share, std::ptrdiff_t j, std::ptrdiff_t depth) const {
    constexpr Outer outer = Cell::outers[kOuter];
    constexpr int V = W * outer.width;
    const float* from = at(j, 0) + outer.first * kLanes;
    const std::ptrdiff_t column = outer.width == 1 ? slots * Cell::kColumns * kLanes : kLanes;
    const std::ptrdiff_t units = units_of(s, outer.source);
    float* to = share + j * units * outer.width * kLanes;
    for (std::ptrdiff_t i = 0; i < units; i += kTileRows, to += kTileRows * V * kLanes) {
      const std::ptrdiff_t unit = outer.source * s.units + i;
      Vec sums[kTileRows][V];
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[r][v] = load(to + (r * V + v) * kLanes);
      accumulate<Mode, kTileRows, V, true>(sums, groups.get() + unit / kUnit * slots * kUnit + unit % kUnit, 0, from,
                                           Cell::kColumns * kLanes, depth, column);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) store(to + (r * V + v) * kLanes, sums[r][v]);
    }
  }

  const Slice& s;
  const std::ptrdiff_t step_rows;
  Scratch all, rows, groups;
  const FrontTransposed<Mode> front;
};

}  // namespace
}  // namespace seqmnist
