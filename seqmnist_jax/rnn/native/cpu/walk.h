// Below common.h: a cell without products between units. These never meet, so some vectors of units of one sequence
// take many steps in a row, with all that these hand on in registers.

namespace seqmnist {
namespace {

constexpr int kSliceRows = 1;
// Values of x that were made outside.
constexpr int kInputs = Cell::kFront ? 0 : Cell::kInputs;
// What a step reads and writes: numbers for each unit.
constexpr int kTraffic = Cell::kKept + Cell::kOutputs + Cell::kInputs;
// Steps of one walk: what they read and write stays in the nearer caches until all units have passed.
std::ptrdiff_t most_steps(const Slice& s) {
  return std::clamp<std::ptrdiff_t>((32 << 10) / std::max<std::ptrdiff_t>(1, s.units * kTraffic) / 2 * 2, 16, 128);
}
// Vectors of units in a walk: enough to hide how long a step waits for the one before, as far as registers reach.
constexpr int wide(int registers) {
  const int all = kLanes == 8 || (kLanes == 4 && kTileRows == 4) ? 16 : 32;
  return registers * 4 <= all ? 4 : registers * 2 <= all ? 2 : 1;
}

// Steps of a sequence that run, in the order in which they do.
struct Running {
  Running(const Slice& s, const Arrays& a, std::ptrdiff_t row) {
    const std::ptrdiff_t count = std::clamp<std::ptrdiff_t>(a.lengths[s.first + row], 0, s.time);
    first = s.reverse ? s.time - count : 0, end = first + count;
  }
  // Of at most so many, as many in each chunk.
  std::ptrdiff_t chunk(std::ptrdiff_t most) const {
    const std::ptrdiff_t count = end - first, chunks = (count + most - 1) / most;
    return chunks ? (count + chunks - 1) / chunks : 1;
  }
  std::ptrdiff_t first, end;
};
// Zeros to an array [batch, time, size] at the steps that a sequence has not.
void clear(const Slice& s, const Arrays& a, std::ptrdiff_t row, float* array, std::ptrdiff_t size) {
  const Running running(s, a, row);
  const std::ptrdiff_t count = running.end - running.first;
  float* const from = array + ((s.first + row) * s.time + count) * size;
  std::fill(from, from + (s.time - count) * size, 0.0f);
}
// Calls walk(W, whole, j) for blocks of W vectors of units, then of half as many; the last one may have no whole vector.
template <int W, class Walk>
SEQMNIST_INLINE void for_units(const Slice& s, Walk&& walk, std::ptrdiff_t j = 0) {
  for (; j + W <= (s.hidden + kLanes - 1) / kLanes; j += W)
    if ((j + W) * kLanes <= s.hidden)
      walk(Int<W>{}, std::true_type{}, j);
    else
      walk(Int<W>{}, std::false_type{}, j);
  if constexpr (W > 1) for_units<W / 2>(s, walk, j);
}

// Some vectors of W vectors of units, from and to planes of all units.
template <int N, int W>
struct Held {
  Vec at[W][at_least_one(N)];

  SEQMNIST_INLINE Held(const float* planes, std::ptrdiff_t units, std::ptrdiff_t j) {
    each<0, N * W>([&](auto n) {
      constexpr int i = decltype(n)::value / W, w = decltype(n)::value % W;
      at[w][i] = load(planes + i * units + (j + w) * kLanes);
    });
  }
  SEQMNIST_INLINE void put(float* planes, std::ptrdiff_t units, std::ptrdiff_t j) const {
    each<0, N * W>([&](auto n) {
      constexpr int i = decltype(n)::value / W, w = decltype(n)::value % W;
      store(planes + i * units + (j + w) * kLanes, at[w][i]);
    });
  }
};

// Memory of the next chunk, asked for in this one: in a row, while the walks themselves go to and fro. A number, since
// before an array's begin there is no pointer.
struct Line {
  std::uintptr_t from;
  const std::ptrdiff_t direction;

  template <int N>
  SEQMNIST_INLINE void ask() {
    each<0, N>([&](auto i) {
      __builtin_prefetch(reinterpret_cast<const void*>(from + direction * decltype(i)::value * kBytes), 0, 2);
    });
    from += direction * N * kBytes;
  }
  static constexpr std::ptrdiff_t kBytes = sizeof(Vec);
};

// What both directions read.
template <class Mode, bool kReadsX>
struct Outside {
  const Slice s;
  const Arrays& a;
  // Whether what a walk writes will have left the caches before it is read.
  const bool far;
  const std::ptrdiff_t most;
  Scratch vectors;
  FrontIf<Mode, kReadsX> front;

  Outside(const Sizes& sizes, const Arrays& arrays, std::ptrdiff_t first, std::ptrdiff_t count)
      : s(sizes, first, count),
        a(arrays),
        far(s.time * s.batch * s.units * (s.outputs == kAll ? kTraffic : Cell::kKept) > kCached),
        most(most_steps(s)),
        vectors(Cell::kVectors * s.units, true),
        front(s, a, most, vectors.get() + (Cell::kVectors - Cell::kInputs) * s.units) {
    pad_vectors(s, a.vectors, vectors.get());
  }
  // A vector of units at a step. `inputs` and `x` are the step's; `slot` counts the steps of a chunk.
  struct At {
    const Outside& o;
    const float *inputs, *values;
    std::ptrdiff_t hidden, j, slot;
    int lanes;
    bool far;
    const Vec* params;

    SEQMNIST_INLINE Vec x(int i) const {
      if (Cell::kFront) return o.front(i, slot * o.s.units + j * kLanes);
      return load_some(inputs + i * hidden + j * kLanes, lanes);
    }
    SEQMNIST_INLINE Vec s(int i) const { return broadcast(values[i]); }
    SEQMNIST_INLINE Vec p(int i) const { return params[i]; }
  };

  // What a walk asks in every step, in variables of its own: what it writes might be anything else.
  struct Way {
    const Arrays a;
    float* const kept;
    const std::ptrdiff_t row, first, direction, hidden, kept_size, from, last;
    const bool all, far;

    Way(const Outside& o, std::ptrdiff_t row, std::ptrdiff_t from)
        : a(o.a),
          kept(a.kept),
          row(o.s.first + row),
          first(this->row * o.s.time + o.s.when(0)),
          direction(o.s.reverse ? -1 : 1),
          hidden(o.s.hidden),
          kept_size(o.s.units * Cell::kKept),
          from(from),
          last(o.s.outputs == kLast ? Running(o.s, o.a, row).end - 1 : -1),
          all(o.s.outputs == kAll),
          far(o.far) {}
    // A step, counted through all sequences.
    SEQMNIST_INLINE std::ptrdiff_t at(std::ptrdiff_t step) const { return first + direction * step; }
    // Where the step's output stands, or its cotangent; none if it is not wanted.
    template <class Float>
    SEQMNIST_INLINE Float* y(Float* outputs, std::ptrdiff_t step, std::ptrdiff_t at, Float* none) const {
      if (all) return outputs + at * Cell::kOutputs * hidden;
      return step == last ? outputs + row * Cell::kOutputs * hidden : none;
    }
    // Of an array with so many numbers in a step, and vectors in a vector of units: what stands behind step `end`.
    SEQMNIST_INLINE Line behind(const float* array, std::ptrdiff_t end, int forwards, std::ptrdiff_t size,
                                std::ptrdiff_t vectors) const {
      const std::ptrdiff_t way = direction * forwards;
      const std::ptrdiff_t floats = at(end) * size + (way < 0 ? size - kLanes : 0) + way * vectors * kLanes;
      return {reinterpret_cast<std::uintptr_t>(array) + floats * sizeof(float), way};
    }
    SEQMNIST_INLINE At vector(const Outside& o, std::ptrdiff_t j, std::ptrdiff_t step, std::ptrdiff_t at, int lanes,
                              const Vec* params) const {
      return {o, a.inputs + at * kInputs * hidden, a.x + at * Cell::kFeatures, hidden, j, step - from, lanes, far,
              params};
    }
  };
};

template <class Mode>
struct Forward : Outside<Mode, true> {
  using Base = Outside<Mode, true>;
  using Base::s, Base::a, Base::most, Base::front, Base::vectors;
  using typename Base::Way;
  static constexpr int kWide = wide(Cell::kCarries + Cell::kVectors + 2);

  struct At : Base::At {
    Vec* carry;
    float *to_kept, *to_y;

    SEQMNIST_INLINE Vec c(int i) const { return carry[i]; }
    SEQMNIST_INLINE void next(int i, Vec v) const { carry[i] = v; }
    SEQMNIST_INLINE void y(int i, Vec v) const {
      if (to_y) store_some(to_y + i * this->hidden + this->j * kLanes, v, this->lanes, this->far);
    }
    SEQMNIST_INLINE void keep(int i, Vec v) const {
      if (to_kept) store_some(to_kept + (this->j * Cell::kKept + i) * kLanes, v, kLanes, this->far);
    }
  };

  Forward(const Sizes& sizes, const Arrays& arrays, std::ptrdiff_t first, std::ptrdiff_t count)
      : Base(sizes, arrays, first, count), carry(Cell::kCarries * s.units, true) {}

  template <int W, bool kWhole>
  SEQMNIST_ONCE void walk(std::ptrdiff_t row, std::ptrdiff_t j, std::ptrdiff_t from, std::ptrdiff_t to) const {
    const Held<Cell::kVectors, W> params(vectors.get(), s.units, j);
    Held<Cell::kCarries, W> now(carry.get(), s.units, j);
    const int last = kWhole ? kLanes : s.lanes(j + W - 1);
    const Way way(*this, row, from);
    Line inputs_next =
        way.behind(way.a.inputs, to, 1, kInputs * s.hidden, j * (to - from) * kInputs);
    for (std::ptrdiff_t step = from; step < to; ++step) {
      const std::ptrdiff_t at = way.at(step);
      float* const to_kept = way.kept ? way.kept + at * way.kept_size : nullptr;
      float* const to_y = way.y(way.a.outputs, step, at, static_cast<float*>(nullptr));
      inputs_next.template ask<W * kInputs>();
      each<0, W>([&](auto number) {
        constexpr int w = decltype(number)::value;
        Cell::forward(Int<0>{}, At{way.vector(*this, j + w, step, at, w == W - 1 ? last : kLanes, params.at[w]), now.at[w], to_kept, to_y});
      });
    }
    now.put(carry.get(), s.units, j);
  }

  void run() {
    for (std::ptrdiff_t n = 0; n < s.count; ++n) {
      const std::ptrdiff_t row = s.reverse ? s.count - 1 - n : n;
      for (int i = 0; i < Cell::kCarries; ++i)
        copy(carry.get() + i * s.units, a.carry + (i * s.batch + s.first + row) * s.hidden, s.hidden);
      const Running running(s, a, row);
      for (std::ptrdiff_t from = running.first; from < running.end; from += running.chunk(most)) {
        const std::ptrdiff_t to = std::min(running.end, from + running.chunk(most));
        front.make(to - from, [&](std::ptrdiff_t n) { return s.x(a.x, row, s.when(from + n)); });
        for_units<kWide>(s, [&](auto width, auto whole, std::ptrdiff_t j) {
          walk<decltype(width)::value, decltype(whole)::value>(row, j, from, to);
        });
      }
      if (s.outputs == kAll) clear(s, a, row, a.outputs, Cell::kOutputs * s.hidden);
      if (s.outputs == kLast && running.first == running.end) {
        float* const y = a.outputs + (s.first + row) * Cell::kOutputs * s.hidden;
        std::fill(y, y + Cell::kOutputs * s.hidden, 0.0f);
      }
      for (int i = 0; i < Cell::kCarries; ++i)
        copy(a.end + (i * s.batch + s.first + row) * s.hidden, carry.get() + i * s.units, s.hidden);
    }
  }

  Scratch carry;
};

template <class Mode>
struct Backward : Outside<Mode, Cell::kBackwardReadsX> {
  using Base = Outside<Mode, Cell::kBackwardReadsX>;
  using Base::s, Base::a, Base::most, Base::front, Base::vectors;
  using typename Base::Way;
  static constexpr bool kSame = Gradients<Mode>::kSame;
  static constexpr int kWide = wide(Cell::kCarries + Cell::kAfter + Cell::kVectors + Cell::kSums + 2);

  struct At : Base::At {
    float* d_inputs;
    Vec *bars, *later, *total;
    const float *from_kept, *d_y;
    float* d_columns;

    SEQMNIST_INLINE Vec k(int, int i) const { return load(from_kept + (this->j * Cell::kKept + i) * kLanes); }
    SEQMNIST_INLINE Vec after(int i) const { return later[i]; }
    SEQMNIST_INLINE void remember(int i, Vec v) const { later[i] = v; }
    SEQMNIST_INLINE Vec dn(int i) const { return bars[i]; }
    SEQMNIST_INLINE void before(int i, Vec v) const { bars[i] = v; }
    SEQMNIST_INLINE Vec dy(int i) const { return load_some(d_y + i * this->hidden + this->j * kLanes, this->lanes); }
    SEQMNIST_INLINE void sum(int i, Vec v) const { total[i] += v; }
    SEQMNIST_INLINE void dx(int i, Vec v) const {
      store_some(d_inputs + i * this->hidden + this->j * kLanes, v, this->lanes, this->far);
    }
    SEQMNIST_INLINE void dm(int i, Vec v) const { store(d_columns + i * kLanes, only(v, this->lanes)); }
  };

  Backward(const Sizes& sizes, const Arrays& arrays, std::ptrdiff_t first, std::ptrdiff_t count, float* share)
      : Base(sizes, arrays, first, count),
        place(s),
        share(share),
        bars(Cell::kCarries * s.units, true),
        after(Cell::kAfter * s.units, true),
        nothing(Cell::kOutputs * s.hidden, true),
        columns(kSame ? 0 : s.vectors * most * Cell::kColumns * kLanes, true),
        gradients(s, a, most, most) {}

  // The columns of the gradients of vector j, of a chunk's step; before they become words of two steps.
  float* columns_of(std::ptrdiff_t j, std::ptrdiff_t slot) const {
    return kSame ? gradients.at(j, slot) : columns.get() + (j * most + slot) * Cell::kColumns * kLanes;
  }

  template <int W, bool kWhole>
  SEQMNIST_ONCE void walk(std::ptrdiff_t row, std::ptrdiff_t j, std::ptrdiff_t from, std::ptrdiff_t to) const {
    const Held<Cell::kVectors, W> params(vectors.get(), s.units, j);
    Held<Cell::kCarries, W> d_carry(bars.get(), s.units, j);
    Held<Cell::kAfter, W> later(after.get(), s.units, j);
    Held<Cell::kSums, W> total(share + place.sums, s.units, j);
    const int last = kWhole ? kLanes : s.lanes(j + W - 1);
    const Way way(*this, row, from);
    const float* const zeros = nothing.get();
    const std::ptrdiff_t asked = j * (to - from);
    Line kept_before = way.behind(way.kept, from - 1, -1, way.kept_size, asked * Cell::kKept),
           inputs_before = way.behind(way.a.inputs, from - 1, -1, kInputs * s.hidden, asked * kInputs),
           d_y_before = way.behind(way.a.d_outputs, from - 1, -1, Cell::kOutputs * s.hidden, asked * Cell::kOutputs);
    for (std::ptrdiff_t step = to - 1; step >= from; --step) {
      const std::ptrdiff_t at = way.at(step);
      const float* const d_y = way.y(way.a.d_outputs, step, at, zeros);
      kept_before.template ask<W * Cell::kKept>();
      inputs_before.template ask<W * kInputs>();
      if (way.all) d_y_before.template ask<W * Cell::kOutputs>();
      each<0, W>([&](auto number) {
        constexpr int w = decltype(number)::value;
        Cell::backward(Int<0>{}, At{way.vector(*this, j + w, step, at, w == W - 1 ? last : kLanes, params.at[w]),
                                    way.a.d_inputs + at * kInputs * way.hidden,
                                    d_carry.at[w],
                                    later.at[w],
                                    total.at[w],
                                    way.kept + at * way.kept_size,
                                    d_y,
                                    Cell::kColumns ? columns_of(j + w, step - from) : nullptr});
      });
    }
    d_carry.put(bars.get(), s.units, j);
    later.put(after.get(), s.units, j);
    total.put(share + place.sums, s.units, j);
  }

  void run() {
    // The way back through memory too.
    for (std::ptrdiff_t n = 0; n < s.count; ++n) {
      const std::ptrdiff_t row = s.reverse ? n : s.count - 1 - n;
      for (int i = 0; i < Cell::kCarries; ++i)
        copy(bars.get() + i * s.units, a.d_end + (i * s.batch + s.first + row) * s.hidden, s.hidden);
      for (int i = 0; i < Cell::kAfter; ++i)
        copy(after.get() + i * s.units, a.carry + (Cell::after_carry[i] * s.batch + s.first + row) * s.hidden, s.hidden);
      const Running running(s, a, row);
      for (std::ptrdiff_t to = running.end, from; to > running.first; to = from) {
        from = std::max(running.first, to - running.chunk(most));
        const auto x_of = [&](std::ptrdiff_t n) { return s.x(a.x, row, s.when(from + n)); };
        front.make(to - from, x_of);
        for_units<kWide>(s, [&](auto width, auto whole, std::ptrdiff_t j) {
          walk<decltype(width)::value, decltype(whole)::value>(row, j, from, to);
        });
        if constexpr (Cell::kFront) give(row, from, to - from, x_of);
      }
      if (Cell::kFront && a.d_x) clear(s, a, row, a.d_x, s.features);
      if (kInputs) clear(s, a, row, a.d_inputs, kInputs * s.hidden);
      for (int i = 0; i < Cell::kCarries; ++i)
        copy(a.d_carry + (i * s.batch + s.first + row) * s.hidden, bars.get() + i * s.units, s.hidden);
    }
  }

  // What a chunk's columns mean for x and its matrix.
  template <class Of>
  void give(std::ptrdiff_t row, std::ptrdiff_t from, std::ptrdiff_t count, Of&& x_of) {
    // The last one of an odd number has nobody beside it.
    if (count % 2)
      for (std::ptrdiff_t j = 0; j < s.vectors; ++j)
        std::fill(columns_of(j, count), columns_of(j, count) + Cell::kColumns * kLanes, 0.0f);
    for (std::ptrdiff_t j = 0; j < s.vectors && !kSame; ++j)
      for (std::ptrdiff_t n = 0; n < count; n += 2)
        for (int i = 0; i < Cell::kColumns; ++i)
          gradients.put(i, j, n, load(columns_of(j, n) + i * kLanes), load(columns_of(j, n + 1) + i * kLanes));
    if (a.d_x) gradients.give_x(count, [&](std::ptrdiff_t n) { return s.x(a.d_x, row, s.when(from + n)); });
    gradients.take_x(count, x_of);
    gradients.add_to(share, place, count);
  }

  const Share place;
  float* const share;
  Scratch bars, after, nothing, columns;
  Gradients<Mode> gradients;
};

}  // namespace
}  // namespace seqmnist
