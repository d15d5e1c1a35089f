// Below common.h: a cell whose units meet in products.

namespace seqmnist {
namespace {

constexpr int kRounds = Cell::kRounds, kForwardPasses = std::size(Cell::forward_passes),
              kBackwardPasses = std::size(Cell::backward_passes), kSliceRows = kTileRows;

// The matrices from one source to one result, of which there is at least one: their sum is what multiplies.
struct Matrices {
  Matrices(const Slice& s, const Arrays& a, int source, int result) {
    for (int q = 0; q < Cell::kProducts; ++q)
      if (Cell::product_source[q] == source && Cell::product_result[q] == result)
        at[count++] = a.weights + q * s.hidden * s.hidden;
  }
  float sum(std::ptrdiff_t i) const {
    float sum = at[0][i];
    for (int q = 1; q < count; ++q) sum += at[q][i];
    return sum;
  }
  const float* at[at_least_one(Cell::kProducts)];
  int count = 0;
};

// Matrices as the passes walk through them: for each block of vectors of units, each term, each word that is summed over, the
// vectors of each unit block and column. `depth` is the numbers that a term sums over for one of its count.
template <class Mode, int kPass, bool kBackward>
class Panels {
 public:
  static constexpr Pass pass = kBackward ? Cell::backward_passes[kPass] : Cell::forward_passes[kPass];
  static constexpr int kVectors =
      kBackward ? vectors_of(Cell::backward_passes, pass.round) : vectors_of(Cell::forward_passes, pass.round);

  static std::ptrdiff_t words_of(const Slice& s, int term) {
    return kBackward ? s.vectors * words<Mode>(pass.term[term].count * kLanes) : words<Mode>(s.hidden);
  }
  static std::ptrdiff_t depth(const Slice& s) {
    std::ptrdiff_t sum = 0;
    for (int i = 0; i < pass.terms; ++i) sum += words_of(s, i);
    return sum;
  }
  explicit Panels(const Slice& s, const Arrays& a)
      : row(depth(s) * pass.width * kLanes), data(s.vectors * row, true) {
    for_blocks<kVectors>(s.vectors, [&](auto width, std::ptrdiff_t j) {
      constexpr int W = decltype(width)::value;
      for (int w = 0; w < W; ++w)
        for (int c = 0; c < pass.width; ++c) {
          float* to = data.get() + j * row + (w * pass.width + c) * kLanes;
          for (int i = 0; i < pass.terms; to += words_of(s, i++) * W * pass.width * kLanes)
            for (int n = 0; n < (kBackward ? pass.term[i].count : 1); ++n) put(s, a, j + w, c, i, n, W, to);
        }
    });
  }
  const float* at(std::ptrdiff_t j) const { return data.get() + j * row; }

 private:
  // Vector j of column c, from number n of a term.
  static void put(const Slice& s, const Arrays& a, std::ptrdiff_t j, int c, int i, int n, int W, float* to) {
    const Term term = pass.term[i];
    const Matrices matrices = kBackward ? Matrices(s, a, pass.columns[c], term.first + n)
                                        : Matrices(s, a, term.first, pass.columns[c]);
    for (int lane = 0; lane < s.lanes(j); ++lane)
      for (std::ptrdiff_t summed = 0; summed < s.hidden; ++summed) {
        const std::ptrdiff_t unit = j * kLanes + lane;
        const std::ptrdiff_t word = words<Mode>(term.count * kLanes) * Mode::kPack;
        const std::ptrdiff_t k = kBackward ? summed / kLanes * word + n * kLanes + summed % kLanes : summed;
        Mode::put(to + k / Mode::kPack * W * pass.width * kLanes, static_cast<int>(lane * Mode::kPack + k % Mode::kPack),
                  matrices.sum(kBackward ? unit * s.hidden + summed : summed * s.hidden + unit));
      }
  }

  std::ptrdiff_t row;  // of one vector of units
  Scratch data;
};

// ---- Forward -----------------------------------------------------------------------------

template <class Mode>
struct Forward {
  static constexpr bool kSame = Mode::kPack == 1 && std::is_same_v<Mode, Float32>;

  // One sequence and kLanes units in a stage.
  struct At {
    const Forward& f;
    std::ptrdiff_t row, j, at;
    int lanes;
    const float* tile;
    float* kept;
    std::ptrdiff_t step_and_batch;
    bool running, is_last;

    SEQMNIST_INLINE Vec c(int i) const { return load(f.now + i * f.s.plane + at); }
    SEQMNIST_INLINE Vec m(int i) const { return load(tile + i * kLanes); }
    SEQMNIST_INLINE Vec x(int i) const {
      if (Cell::kFront) return f.front(i, at);
      return load_some(f.a.inputs + (step_and_batch * Cell::kInputs + i) * f.s.hidden + j * kLanes, lanes);
    }
    SEQMNIST_INLINE Vec s(int i) const { return broadcast(f.a.x[step_and_batch * Cell::kFeatures + i]); }
    SEQMNIST_INLINE Vec p(int i) const { return load(f.vectors.get() + i * f.s.units + j * kLanes); }
    SEQMNIST_INLINE Vec crossed(int i) const { return load(f.cross.get() + i * f.s.plane + at); }
    SEQMNIST_INLINE void cross(int i, Vec v) const { store(f.cross.get() + i * f.s.plane + at, v); }
    SEQMNIST_INLINE void source(int i, Vec v) const {
      Mode::put_row(f.own.get() + i * f.words_plane + row * f.words_row, static_cast<int>(j * kLanes),
                    only(v, lanes));
    }
    SEQMNIST_INLINE void next(int i, Vec v) const {
      v = only(v, lanes);
      store(f.next + i * f.s.plane + at, v);
      if (!kSame && Cell::carry_is_source[i])
        Mode::put_row(f.next_words + i * f.words_plane + row * f.words_row, static_cast<int>(j * kLanes), v);
    }
    SEQMNIST_INLINE void y(int i, Vec v) const {
      if (f.s.outputs == kAll)
        store_some(f.a.outputs + (step_and_batch * Cell::kOutputs + i) * f.s.hidden + j * kLanes, v, lanes, f.far);
      else if (is_last)
        store_some(f.a.outputs + ((f.s.first + row) * Cell::kOutputs + i) * f.s.hidden + j * kLanes, v, lanes);
    }
    // Of a sequence that does not run: the carry stays, and there is no output.
    SEQMNIST_INLINE void hold() const {
      for (int i = 0; i < Cell::kCarries; ++i) next(i, c(i));
      for (int i = 0; i < Cell::kOutputs && f.s.outputs == kAll; ++i) y(i, Vec{});
    }
    SEQMNIST_INLINE void keep(int i, Vec v) const {
      if (kept) store_some(kept + i * kLanes, v, kLanes, f.streams_stores);
    }
  };

  // The same before a product: values that need no carry, of a row that may be padding.
  struct Start {
    const Forward& f;
    std::ptrdiff_t t, row, j;

    SEQMNIST_INLINE std::ptrdiff_t step_and_batch() const {
      return (f.s.first + std::min(row, f.s.count - 1)) * f.s.time + t;
    }
    SEQMNIST_INLINE Vec x(int i) const {
      if (Cell::kFront) return f.front(i, row * f.s.units + j * kLanes);
      return load_some(f.a.inputs + (step_and_batch() * Cell::kInputs + i) * f.s.hidden + j * kLanes, f.s.lanes(j));
    }
    SEQMNIST_INLINE Vec s(int i) const { return broadcast(f.a.x[step_and_batch() * Cell::kFeatures + i]); }
    SEQMNIST_INLINE Vec p(int i) const { return load(f.vectors.get() + i * f.s.units + j * kLanes); }
  };

  Forward(const Sizes& sizes, const Arrays& arrays, std::ptrdiff_t first, std::ptrdiff_t count)
      : s(sizes, first, count),
        a(arrays),
        far(s.is_large()),
        words_row(words<Mode>(s.units)),
        words_plane(s.rows * words_row),
        state(2 * Cell::kCarries * s.plane, true),
        state_words(kSame ? 0 : 2 * Cell::kCarries * words_plane, true),
        own(Cell::kOwn * words_plane, true),
        cross(Cell::kCross * s.plane),
        vectors(Cell::kVectors * s.units, true),
        tile(2 * kTileRows * at_least_one(Cell::kResults) * kLanes),
        gathered(2 * kTileRows * at_least_one(Cell::kKept) * kLanes),
        front(s, a, s.rows, vectors.get() + (Cell::kVectors - Cell::kInputs) * s.units),
        steps(running_steps(s, a)) {
    now = state.get(), next = now + Cell::kCarries * s.plane;
    now_words = kSame ? now : state_words.get();
    next_words = kSame ? next : now_words + Cell::kCarries * words_plane;
    pad_vectors(s, a.vectors, vectors.get());
    for (int i = 0; i < Cell::kCarries; ++i)
      for (std::ptrdiff_t row = 0; row < s.count; ++row) {
        float* to = now + i * s.plane + row * s.units;
        copy(to, a.carry + (i * s.batch + first + row) * s.hidden, s.hidden);
        for (std::ptrdiff_t j = 0; j < s.vectors && !kSame; ++j)
          Mode::put_row(now_words + i * words_plane + row * words_row, static_cast<int>(j * kLanes),
                        load(to + j * kLanes));
      }
    if (s.outputs == kLast)
      for (std::ptrdiff_t row = 0; row < s.count; ++row) {
        float* to = a.outputs + (first + row) * Cell::kOutputs * s.hidden;
        std::fill(to, to + Cell::kOutputs * s.hidden, 0.0f);
      }
  }

  // What a source is multiplied from, in words.
  SEQMNIST_INLINE const float* operand(int source) const {
    const int i = Cell::source_index[source];
    const Origin origin = Cell::source_origin[source];
    return (origin == Origin::kBefore ? now_words : origin == Origin::kAfter ? next_words : own.get()) + i * words_plane;
  }

  // Some products of R rows and W vectors of units, to `tile` [W][R][results]. Meanwhile `stream` is emptied: between
  // two parts of a long product its stores cost nothing.
  template <int kPass, int W, int R>
  SEQMNIST_INLINE void multiply(const Panels<Mode, kPass, false>& panels, std::ptrdiff_t t, std::ptrdiff_t j,
                                std::ptrdiff_t row, std::ptrdiff_t share) {
    constexpr Pass pass = Panels<Mode, kPass, false>::pass;
    constexpr int V = W * pass.width;
    const std::ptrdiff_t depth = words<Mode>(s.hidden);
    const float* panel = panels.at(j);
    Vec sums[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        sums[r][v] = Cell::start(pass.columns[v % pass.width], Start{*this, t, row + r, j + v / pass.width});
    for (int i = 0; i < pass.terms; ++i) {
      const float* from = operand(pass.term[i].first) + row * words_row;
      for (std::ptrdiff_t k = 0; k < depth; k += kPart) {
        accumulate<Mode, R, V, false>(sums, from + k, words_row, panel + k * V * kLanes, V * kLanes,
                                      std::min(kPart, depth - k));
        stream.move(share);
      }
      panel += depth * V * kLanes;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        store(tile.get() + ((v / pass.width * R + r) * Cell::kResults + pass.columns[v % pass.width]) * kLanes,
              sums[r][v]);
  }

  // A stage on R rows and W vectors of units; where what it keeps goes far it is gathered and left to `stream`.
  template <int kStage, int W>
  SEQMNIST_ONCE void run(std::ptrdiff_t t, std::ptrdiff_t j, std::ptrdiff_t row0, std::ptrdiff_t R) {
    constexpr int kGroup = Cell::group_of_stage[kStage];
    constexpr int kCount = kGroup < 0 ? 0 : Cell::kept_count[kGroup < 0 ? 0 : kGroup];
    const std::ptrdiff_t real = std::min(R, s.count - row0);
    const bool keeps = a.kept && kCount > 0 && real > 0;
    const bool gathers = keeps && far && kStage > 0 && real == s.tile_rows(row0);
    streams_stores = keeps && far && kStage == 0;
    stream.move(stream.left());
    float* kept = !keeps ? nullptr : gathers ? gathered.get() : a.kept + s.kept(kGroup, t, row0, j);
    const std::ptrdiff_t vector = (gathers ? real : keeps ? s.tile_rows(row0) : 0) * kCount * kLanes;
    for (int w = 0; w < W; ++w) {
      const int lanes = s.lanes(j + w);
      for (std::ptrdiff_t r = 0; r < R; ++r) {
        const std::ptrdiff_t row = row0 + r, running = steps[row];
        const At at{*this,
                    row,
                    j + w,
                    row * s.units + (j + w) * kLanes,
                    lanes,
                    tile.get() + (w * R + r) * Cell::kResults * kLanes,
                    kept ? kept + w * vector + r * kCount * kLanes : nullptr,
                    (s.first + row) * s.time + t,
                    t < running,
                    s.outputs == kLast && (s.reverse ? t == 0 : t == running - 1)};
        if (t < running)
          Cell::forward(Int<kStage>{}, at);
        else if (kStage == kRounds && row < s.count)
          at.hold();
      }
    }
    if (gathers) stream = Stream(kept, a.kept + s.kept(kGroup, t, row0, j), W * vector);
  }

  void run() { steps_of(std::make_integer_sequence<int, kForwardPasses>{}); }

  template <int... kPasses>
  void steps_of(std::integer_sequence<int, kPasses...>) {
    const std::tuple<Panels<Mode, kPasses, false>...> panels{Panels<Mode, kPasses, false>(s, a)...};
    const std::ptrdiff_t parts = (words<Mode>(s.hidden) + kPart - 1) / kPart;
    for (std::ptrdiff_t step = 0; step < s.time; ++step) {
      const std::ptrdiff_t t = s.when(step);
      front.make(s.count, [&](std::ptrdiff_t row) { return s.x(a.x, row, t); });
      if constexpr (Cell::kHasStart)
        for (std::ptrdiff_t row = 0; row < s.rows; row += kTileRows)
          for (std::ptrdiff_t j = 0; j < s.vectors; ++j)
            run<0, 1>(t, j, row, std::min<std::ptrdiff_t>(kTileRows, s.rows - row));
      each<1, kRounds + 1>([&](auto round) {
        constexpr int kRound = decltype(round)::value;
        for_blocks<vectors_of(Cell::forward_passes, kRound)>(s.vectors, [&](auto width, std::ptrdiff_t j) {
          constexpr int W = decltype(width)::value;
          for_tiles(s.rows, [&](auto size, std::ptrdiff_t row) {
            constexpr int R = decltype(size)::value;
            const std::ptrdiff_t calls = parts * Cell::forward_terms[kRound];
            const std::ptrdiff_t share = (stream.left() / kLanes + calls - 1) / calls * kLanes;
            each<0, kForwardPasses>([&](auto pass) {
              constexpr int kPass = decltype(pass)::value;
              if constexpr (Cell::forward_passes[kPass].round == kRound)
                multiply<kPass, W, R>(std::get<kPass>(panels), t, j, row, share);
            });
            run<kRound, W>(t, j, row, R);
          });
        });
      });
      std::swap(now, next);
      std::swap(now_words, next_words);
    }
    stream.move(stream.left());
    for (int i = 0; i < Cell::kCarries; ++i)
      for (std::ptrdiff_t row = 0; row < s.count; ++row)
        copy(a.end + (i * s.batch + s.first + row) * s.hidden, now + i * s.plane + row * s.units, s.hidden);
  }

  static constexpr std::ptrdiff_t kPart = 16;
  const Slice s;
  const Arrays& a;
  const bool far;
  const std::ptrdiff_t words_row, words_plane;
  Scratch state, state_words, own, cross, vectors, tile, gathered;
  FrontIf<Mode, true> front;
  const std::vector<std::ptrdiff_t> steps;
  float *now, *next, *now_words, *next_words;
  Stream stream;
  bool streams_stores = false;
};

// ---- Backward ----------------------------------------------------------------------------

// What is asked of the memory some microseconds before it is needed, a little at a time.
class Aheads {
 public:
  void add(const float* from, std::ptrdiff_t n) { aheads_[count_++] = {from, n}, left_ += n; }
  std::ptrdiff_t left() const { return left_; }
  SEQMNIST_INLINE void ask(std::ptrdiff_t n) {
    while (n > 0 && at_ < count_) {
      auto& [from, left] = aheads_[at_];
      const std::ptrdiff_t some = std::min(n, left);
      prefetch(from, some);
      from += some, left -= some, n -= some;
      if (left == 0) ++at_;
    }
  }

 private:
  std::pair<const float*, std::ptrdiff_t> aheads_[at_least_one(Cell::kGroups)];
  int count_ = 0, at_ = 0;
  std::ptrdiff_t left_ = 0;
};

template <class Mode>
struct Backward {
  static constexpr bool kSame = Gradients<Mode>::kSame;

  struct At {
    const Backward& b;
    std::ptrdiff_t row, j, at;
    int lanes;
    const float* tile;
    const float* kept[at_least_one(Cell::kGroups)];
    std::ptrdiff_t step_and_batch;
    bool is_last;
    Vec* total;
    Vec *dms, *remades;

    SEQMNIST_INLINE Vec k(int group, int i) const { return load(kept[group] + i * kLanes); }
    SEQMNIST_INLINE Vec x(int i) const {
      if (Cell::kFront) return b.front(i, at);
      return load_some(b.a.inputs + (step_and_batch * Cell::kInputs + i) * b.s.hidden + j * kLanes, lanes);
    }
    SEQMNIST_INLINE Vec s(int i) const { return broadcast(b.a.x[step_and_batch * Cell::kFeatures + i]); }
    SEQMNIST_INLINE Vec p(int i) const { return load(b.vectors.get() + i * b.s.units + j * kLanes); }
    SEQMNIST_INLINE Vec after(int i) const { return load(b.after.get() + i * b.s.plane + at); }
    SEQMNIST_INLINE void remember(int i, Vec v) const { store(b.after.get() + i * b.s.plane + at, v); }
    SEQMNIST_INLINE Vec dn(int i) const { return load(b.bars.get() + i * b.s.plane + at); }
    SEQMNIST_INLINE void before(int i, Vec v) const { store(b.bars.get() + i * b.s.plane + at, v); }
    SEQMNIST_INLINE Vec dy(int i) const {
      if (b.s.outputs == kAll)
        return load_some(b.a.d_outputs + (step_and_batch * Cell::kOutputs + i) * b.s.hidden + j * kLanes, lanes);
      if (!is_last) return Vec{};
      return load_some(b.a.d_outputs + ((b.s.first + row) * Cell::kOutputs + i) * b.s.hidden + j * kLanes, lanes);
    }
    SEQMNIST_INLINE Vec ds(int i) const { return load(tile + i * kLanes); }
    SEQMNIST_INLINE Vec crossed(int i) const { return load(b.cross.get() + i * b.s.plane + at); }
    SEQMNIST_INLINE void cross(int i, Vec v) const { store(b.cross.get() + i * b.s.plane + at, v); }
    SEQMNIST_INLINE void sum(int i, Vec v) const { total[i] += v; }
    SEQMNIST_INLINE void dx(int i, Vec v) const {
      store_some(b.a.d_inputs + (step_and_batch * Cell::kInputs + i) * b.s.hidden + j * kLanes, v, lanes);
    }
    // Pairs of rows become words together; in float32 a row is its words.
    SEQMNIST_INLINE void dm(int i, Vec v) const {
      v = only(v, lanes);
      if (kSame)
        store(b.gradients.at(j, b.gradients.slot0 + row) + i * kLanes, v);
      else
        dms[i] = v;
    }
    SEQMNIST_INLINE void remade(int i, Vec v) const {
      if (kSame)
        store(b.gradients.group(i, j, b.gradients.slot0 + row), v);
      else
        remades[i] = v;
    }
  };

  Backward(const Sizes& sizes, const Arrays& arrays, std::ptrdiff_t first, std::ptrdiff_t count, float* share)
      : s(sizes, first, count),
        a(arrays),
        block(std::max<std::ptrdiff_t>(1, 256 / s.rows)),
        place(s),
        share(share),
        vectors(Cell::kVectors * s.units, true),
        bars(Cell::kCarries * s.plane, true),
        after(Cell::kAfter * s.plane, true),
        cross(Cell::kCrossBack * s.plane),
        tile(2 * kTileRows * at_least_one(Cell::kSources) * kLanes),
        gradients(s, a, block * s.rows, s.rows),
        front(s, a, s.rows, vectors.get() + (Cell::kVectors - Cell::kInputs) * s.units),
        steps(running_steps(s, a)) {
    pad_vectors(s, a.vectors, vectors.get());
    for (std::ptrdiff_t row = 0; row < s.count; ++row) {
      for (int i = 0; i < Cell::kCarries; ++i)
        copy(bars.get() + i * s.plane + row * s.units, a.d_end + (i * s.batch + first + row) * s.hidden, s.hidden);
      for (int i = 0; i < Cell::kAfter; ++i)
        copy(after.get() + i * s.plane + row * s.units,
             a.carry + (Cell::after_carry[i] * s.batch + first + row) * s.hidden, s.hidden);
    }
  }

  // A stage on R rows and W vectors of units.
  template <int kStage, int W>
  SEQMNIST_ONCE void run(std::ptrdiff_t t, std::ptrdiff_t j0, std::ptrdiff_t row0, std::ptrdiff_t R) {
    for (int w = 0; w < W; ++w) {
      const std::ptrdiff_t j = j0 + w;
      const int lanes = s.lanes(j);
      Vec total[at_least_one(Cell::kSums)], dms[2][at_least_one(Cell::kColumns)] = {},
          remades[2][at_least_one(Cell::kSources)] = {};
#pragma GCC unroll 32
      for (int i = 0; i < Cell::kSums; ++i)
        if (Cell::sum_stage[i] == kStage) total[i] = load(share + place.sums + i * s.units + j * kLanes);
      for (std::ptrdiff_t r = 0; r < R; ++r) {
        const std::ptrdiff_t row = row0 + r, running = steps[row];
        At at{*this,
              row,
              j,
              row * s.units + j * kLanes,
              lanes,
              tile.get() + (w * R + r) * Cell::kSources * kLanes,
              {},
              (s.first + row) * s.time + t,
              s.outputs == kLast && (s.reverse ? t == 0 : t == running - 1),
              total,
              dms[r % 2],
              remades[r % 2]};
        if (t < running) {
          for (int g = 0; g < Cell::kGroups; ++g) at.kept[g] = a.kept + s.kept(g, t, row, j);
          Cell::backward(Int<kStage>{}, at);
        } else {  // Its gradients pass unchanged.
          for (int i = 0; i < Cell::kColumns; ++i)
            if (Cell::column_stage[i] == kStage) at.dm(i, Vec{});
          for (int i = 0; i < Cell::kSources; ++i)
            if (Cell::source_stage[i] == kStage) at.remade(i, Vec{});
          for (int i = 0; i < Cell::kInputs && !Cell::kFront && kStage == 0 && row < s.count; ++i) at.dx(i, Vec{});
        }
        if (!kSame && r % 2 == 1) flush<kStage>(j, row - 1, dms, remades);
      }
#pragma GCC unroll 32
      for (int i = 0; i < Cell::kSums; ++i)
        if (Cell::sum_stage[i] == kStage) store(share + place.sums + i * s.units + j * kLanes, total[i]);
    }
  }

  template <int kStage, int N, int M>
  SEQMNIST_INLINE void flush(std::ptrdiff_t j, std::ptrdiff_t row, const Vec (&dms)[2][N], const Vec (&remades)[2][M]) {
#pragma GCC unroll 16
    for (int i = 0; i < Cell::kColumns; ++i)
      if (Cell::column_stage[i] == kStage) gradients.put(i, j, row, dms[0][i], dms[1][i]);
#pragma GCC unroll 16
    for (int i = 0; i < Cell::kSources; ++i)
      if (Cell::source_stage[i] == kStage) gradients.put_group(i, j, row, remades[0][i], remades[1][i]);
  }

  // The sources' cotangents of R rows and W vectors of units, to `tile` [W][R][sources].
  template <int kPass, int W, int R>
  SEQMNIST_INLINE void multiply(const Panels<Mode, kPass, true>& panels, std::ptrdiff_t j, std::ptrdiff_t row,
                                Aheads& aheads, std::ptrdiff_t part) {
    constexpr Pass pass = Panels<Mode, kPass, true>::pass;
    constexpr int V = W * pass.width;
    const float* panel = panels.at(j);
    const float* rows = gradients.words_of(row);
    Vec sums[R][V] = {};
    for (int i = 0; i < pass.terms; ++i) {
      const std::ptrdiff_t depth = words<Mode>(pass.term[i].count * kLanes);
      const float* from = rows + words<Mode>(pass.term[i].first * kLanes);
      for (std::ptrdiff_t block = 0; block < s.vectors; ++block) {
        accumulate<Mode, R, V, false>(sums, from + block * gradients.row_step(), gradients.by_row, panel, V * kLanes, depth);
        panel += depth * V * kLanes;
        aheads.ask(part);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        store(tile.get() + ((v / pass.width * R + r) * Cell::kSources + pass.columns[v % pass.width]) * kLanes,
              sums[r][v]);
  }

  void run() { steps_of(std::make_integer_sequence<int, kBackwardPasses>{}); }

  template <int... kPasses>
  void steps_of(std::integer_sequence<int, kPasses...>) {
    const std::tuple<Panels<Mode, kPasses, true>...> panels{Panels<Mode, kPasses, true>(s, a)...};
    const std::ptrdiff_t tiles = (s.rows + kTileRows - 1) / kTileRows;
    std::ptrdiff_t filled = 0;  // steps in the block
    for (std::ptrdiff_t step = s.time - 1; step >= 0; --step) {
      const std::ptrdiff_t t = s.when(step);
      gradients.slot0 = filled * s.rows;
      const auto x_of = [&](std::ptrdiff_t row) { return s.x(a.x, row, t); };
      front.make(s.count, x_of);
      if constexpr (Cell::kFront) gradients.take_x(s.count, x_of);
      for (std::ptrdiff_t row = 0; row < s.rows; row += kTileRows) {
        const std::ptrdiff_t end = std::min<std::ptrdiff_t>(s.rows, row + kTileRows);
        for (std::ptrdiff_t b = s.first + row; step > 1 && b < s.first + std::min(s.count, end); ++b) {
          const std::ptrdiff_t earlier = b * s.time + s.when(step - 2);
          if (s.outputs == kAll)
            prefetch(a.d_outputs + earlier * Cell::kOutputs * s.hidden, Cell::kOutputs * s.hidden);
          if (Cell::kInputs > 0 && !Cell::kFront)
            prefetch(a.inputs + earlier * Cell::kInputs * s.hidden, Cell::kInputs * s.hidden);
        }
        for (std::ptrdiff_t j = 0; j < s.vectors; ++j) run<0, 1>(t, j, row, end - row);
      }
      Aheads aheads;
      if (step > 0)
        for (int g = 0; g < Cell::kGroups; ++g) {
          const std::ptrdiff_t n = Cell::kept_count[g] * s.units;
          aheads.add(a.kept + s.kept(g, s.when(step - 1)) + s.first * n, s.count * n);
        }
      const std::ptrdiff_t part =
          aheads.left() / at_least_one(static_cast<int>(tiles * s.vectors * s.vectors / 2 * kBackwardPasses)) / 16 * 16 + 16;
      each<1, kRounds + 1>([&](auto waited) {
        constexpr int kStage = decltype(waited)::value, kRound = kRounds + 1 - kStage;
        for_blocks<vectors_of(Cell::backward_passes, kRound)>(s.vectors, [&](auto width, std::ptrdiff_t j) {
          constexpr int W = decltype(width)::value;
          for_tiles(s.rows, [&](auto size, std::ptrdiff_t row) {
            constexpr int R = decltype(size)::value;
            each<0, kBackwardPasses>([&](auto pass) {
              constexpr int kPass = decltype(pass)::value;
              if constexpr (Cell::backward_passes[kPass].round == kRound)
                multiply<kPass, W, R>(std::get<kPass>(panels), j, row, aheads, part);
            });
            run<kStage, W>(t, j, row, R);
          });
        });
      });
      if constexpr (Cell::kFront)
        if (a.d_x) gradients.give_x(s.count, [&](std::ptrdiff_t row) { return s.x(a.d_x, row, t); });
      if (++filled == block || step == 0) {
        gradients.add_to(share, place, filled * s.rows);
        filled = 0;
      }
    }
    for (int i = 0; i < Cell::kCarries; ++i)
      for (std::ptrdiff_t row = 0; row < s.count; ++row)
        copy(a.d_carry + (i * s.batch + s.first + row) * s.hidden, bars.get() + i * s.plane + row * s.units, s.hidden);
  }

  const Slice s;
  const Arrays& a;
  const std::ptrdiff_t block;
  const Share place;
  float* const share;
  Scratch vectors, bars, after, cross, tile;
  Gradients<Mode> gradients;
  FrontIf<Mode, Cell::kBackwardReadsX> front;
  const std::vector<std::ptrdiff_t> steps;
};

}  // namespace
}  // namespace seqmnist
