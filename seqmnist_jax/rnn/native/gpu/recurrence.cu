// A cell over whole sequences on a GPU, forward and backward: all of it but the cell, which is generated (`Cell`).
//
// Sequences of a batch don't meet, so a block takes kSequences of them through all steps and waits for no other block.
// Products are results^T = W^T sources^T: units on the side of 16 rows, sequences on the side of 8 columns. A warp owns 16
// units with all their values, so what belongs to a unit meets in one thread and the stages are plain scalar code. The
// weights stay in registers in 16 bits; only the sources cross shared memory, twice buffered, one barrier a product.
// With 4 sequences every other column is left out: half the scalar work a thread, for batches that leave blocks idle.
//
// Units that one multiprocessor's registers can't hold are shared by a cluster of 4 blocks. A block owns a quarter of them, two
// warps to 16 units, and nobody waits for the whole cluster: what crosses to another block is counted by a barrier there.
// - Forward every block needs the sources of all units: each warp sends its own to all four. The two warps multiply half
//   of the sources each, exchange half of the sums, and each thread goes on with one unit.
// - Backward a block multiplies the cotangents of its own results, for the sources of all units, and sends each owner its
//   part of the sums: two 16-byte words a thread and source, where the cotangents themselves would be twice as many.
// Two buffers are enough. A block sends what step t + 2 needs once it has all that it needs of step t + 1; that was sent, by every
// block, after all its warps that the buffer concerns had read what stood there at step t. No block ends while something
// is sent to it, for it waits for all of that.
//
// Gradients that explode leave float16, whose largest number is 65,504. The way back is therefore launched three times, and the
// last two end at once where there is nothing to mend. They bring the cotangents of each sequence near 8 before each product;
// the second finds the largest of all, the third stores them at the scale that leaves it in float16.
//
// Arrays are [replica, ..., batch, time, ...] outside. What is kept for the way back stands in the order of the threads.

struct Pointers {
  void* at[24];
};

template <int I, int N, class F>
DEVICE void each(F&& f) {
  if constexpr (I < N) {
    f(Int<I>{});
    each<I + 1, N>(f);
  }
}

constexpr int kOwned = kUnits / kBlocks, kOwnedTiles = kOwned / 16;  // units of a block
constexpr int kSplit = kBlocks > 1 ? 2 : 1;                         // warps that share 16 of them
constexpr int kWarps = kOwnedTiles * kSplit, kThreads = 32 * kWarps;
constexpr int kTiles = kUnits / 16 / kSplit;                              // of a warp's weights, of each product
constexpr int kFar = kBlocks / kSplit;                                    // backward, those of one row of tiles
constexpr int kRows = 2 / kSplit, kColumns = kSequences / 4, kPairs = kRows * kColumns;  // of a thread
// The way back in float16 is as exact as TF32, and needs its cotangents scaled; in bfloat16 it has float32's range.
DEVICE u32 pack_back(float a, float b) { return kHalf ? pack_half(a, b) : pack_bfloat(a, b); }
constexpr int kRow = kUnits + 8, kTile = 8 * kRow * 2;             // a source in shared memory, padded against conflicts
constexpr int kRowBack = kOwned + 8, kTileBack = 8 * kRowBack * 2;  // a result's cotangent
constexpr int kParts = kUnits * kSequences * 4;                     // what a block is sent of a source's cotangent
constexpr int kKeptWords = (Cell::kKept * kPairs + 1) / 2, kPiece = kThreads * 4 * kKeptWords;
constexpr int kRecalledBytes = kThreads * 4 * kColumns * Cell::kRecalled;  // carries read back from the sources
constexpr int kStages = 6, kStage = kPiece + kRecalledBytes;
constexpr int kScalarsAhead = 2;
constexpr float kMostHalf = 65504.f;

DEVICE void mma_back(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if (kHalf)
    mma_half(c, a, b0, b1);
  else
    mma_bfloat(c, a, b0, b1);
}

constexpr int sources_of(int round) {
  int n = 0;
  for (int k = 0; k < Cell::kSources; k++) n += Cell::source_round(k) == round;
  return n;
}

// One unit's values of a thread.
struct alignas(4 * kColumns) Columns {
  float v[kColumns];
};

// Where a thread stands: `tile` is its warp's 16 units, `row` the first of its own.
struct Place {
  int tid, lane, warp, rank, tile, half, row, quad, replica, block, batch, time;
  int sequence[kColumns];
  bool inside[kColumns];

  DEVICE Place(int batch, int time, int tiles) : batch(batch), time(time) {
    tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, quad = lane & 3;
    rank = blockIdx.x % kBlocks, tile = kOwnedTiles * rank + warp / kSplit, half = warp % kSplit;
    row = 16 * tile + 8 * half + (lane >> 2);
    const int group = blockIdx.x / kBlocks;
    replica = group / tiles, block = group % tiles;
    for (int c = 0; c < kColumns; c++) {
      sequence[c] = block * kSequences + kColumns * quad + c;
      inside[c] = !kMasked || sequence[c] < batch;
    }
  }
  DEVICE int unit(int pair) const { return row + 8 * (pair / kColumns); }
  DEVICE int column(int pair) const { return pair % kColumns; }
  // Of a warp's sums of a product.
  DEVICE static int sum(int pair) { return 2 * (pair / kColumns) + pair % kColumns; }
  DEVICE u64 index(int c) const { return (u64)replica * batch + (kMasked && !inside[c] ? 0 : sequence[c]); }
  // Of the word in a row of 16-bit numbers that is its: units g and g + 8, or in a cluster two neighbours.
  DEVICE int word() const { return kSplit == 1 ? 16 * warp + 2 * (lane >> 2) : row & ~1; }
  DEVICE bool is_unit(int pair) const { return kHidden == kUnits || unit(pair) < kHidden; }
};

DEVICE int when(int step, int time) { return kReverse ? time - 1 - step : step; }

// Values of each pair, as matrices to shared memory: [sequence][unit].
template <u32 (*pack)(float, float)>
DEVICE void put(u32 to, const float (&v)[kPairs]) {
  if constexpr (kColumns == 2)
    store_matrices_turned(to, pack(v[0], v[1]), pack(v[2], v[3]));
  else
    store_matrices_turned(to, pack(v[0], 0.f), pack(v[1], 0.f));
}

// Where a thread reads or writes in an array [batch, time, width], for each of its sequences; it walks with the steps, which
// costs a sum where an index costs a product.
template <class T>
struct Walk {
  T* at[kColumns];
  int stride;

  DEVICE void start(const Place& here, T* array, int width, int t, int offset, bool backward = false) {
    stride = kReverse != backward ? -width : width;
    for (int c = 0; c < kColumns; c++) at[c] = array + (here.index(c) * here.time + t) * width + offset;
  }
  DEVICE void advance() {
#pragma unroll
    for (int c = 0; c < kColumns; c++) at[c] += stride;
  }
};

// The same to global memory: rows of a matrix whose columns are units in the order g, g + 8.
template <u32 (*pack)(float, float)>
DEVICE void put_rows(const Place& here, const Walk<u16>& to, int first, const float (&v)[kPairs]) {
#pragma unroll
  for (int c = 0; c < kColumns; c++) {
    const u32 word = pack(v[c], v[c + kColumns]);
    if (!kMasked || here.inside[c]) store_words<1>(to.at[c] + first, &word);
  }
}

// Where a thread of a cluster stands once its warp's matrix is turned: it has two neighbouring units of one sequence.
struct Turned {
  int row, unit;
  bool is_row, inside;  // With 4 sequences every other row is empty, and nobody reads it.
  u64 index;

  DEVICE Turned(const Place& here) {
    const int sequence = here.block * kSequences + (here.lane >> 2) * kColumns / 2;
    row = here.lane >> 2, unit = 16 * here.tile + 8 * here.half + 2 * here.quad;
    is_row = kColumns == 2 || row % 2 == 0, inside = is_row && (!kMasked || sequence < here.batch);
    index = (u64)here.replica * here.batch + (inside ? sequence : 0);
  }
  template <u32 (*pack)(float, float)>
  DEVICE static u32 word(const float (&v)[kPairs]) {
    return turn_matrix(pack(v[0], kColumns == 2 ? v[kPairs - 1] : 0.f));
  }
  // To global memory: rows of a matrix whose columns are units in their order.
  DEVICE void start(Walk<u16>& walk, u16* array, int width, int time, int t) const {
    for (auto& at : walk.at) at = array + (index * time + t) * width + unit;
  }
  DEVICE void put_row(const Walk<u16>& to, int first, u32 word) const {
    if (inside) store_words<1>(to.at[0] + first, &word);
  }
};

// A round's barrier for what other blocks send, one for either buffer.
DEVICE u32 arrivals(u32 barriers, int round, int step) { return barriers + 8 * (2 * (round - 1) + (step & 1)); }
DEVICE void start_cluster(const Place& here, u32 barriers) {
  if (here.tid == 0)
    for (int i = 0; i < 2 * Cell::kRounds; i++) barrier_init(barriers + 8 * i);
  cluster_barrier();
}

template <u32 (*pack)(float, float), class At>
DEVICE void load_weights(u32 (&a)[kTiles][4], At&& at) {
#pragma unroll
  for (int k = 0; k < kTiles; k++) {
    a[k][0] = pack(at(k, 0, 0), at(k, 0, 1));
    a[k][1] = pack(at(k, 8, 0), at(k, 8, 1));
    a[k][2] = pack(at(k, 0, 8), at(k, 0, 9));
    a[k][3] = pack(at(k, 8, 8), at(k, 8, 9));
  }
}

template <int N>
DEVICE void keep(char* piece, int tid, const u32* words) {
  each<0, N / 4>([&](auto i) { store_words<4>(piece + 16 * kThreads * i.value + 16 * tid, words + 4 * i.value); });
  char* rest = piece + 16 * kThreads * (N / 4);
  if constexpr (N & 2) store_words<2>(rest + 8 * tid, words + N / 4 * 4);
  if constexpr (N & 1) store_words<1>(rest + 8 * kThreads * (N >> 1 & 1) + 4 * tid, words + N - 1);
}
template <int N>
DEVICE void fetch(u32 to, const char* piece, int tid) {
  each<0, N / 4>([&](auto i) { fetch_words<4>(to + 16 * kThreads * i.value + 16 * tid, piece + 16 * kThreads * i.value + 16 * tid); });
  const int rest = 16 * kThreads * (N / 4), last = rest + 8 * kThreads * (N >> 1 & 1);
  if constexpr (N & 2) fetch_words<2>(to + rest + 8 * tid, piece + rest + 8 * tid);
  if constexpr (N & 1) fetch_words<1>(to + last + 4 * tid, piece + last + 4 * tid);
}
template <int N>
DEVICE void recall(const char* stage, int tid, u32* words) {
#pragma unroll
  for (int i = 0; i < N / 4; i++) {
    const uint4 v = ((const uint4*)(stage + 16 * kThreads * i))[tid];
    words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
  }
  const char* rest = stage + 16 * kThreads * (N / 4);
  if constexpr (N & 2) {
    const uint2 v = ((const uint2*)rest)[tid];
    words[N / 4 * 4] = v.x, words[N / 4 * 4 + 1] = v.y;
  }
  if constexpr (N & 1) words[N - 1] = ((const u32*)(rest + 8 * kThreads * (N >> 1 & 1)))[tid];
}

// The exponent, as it stands in a float's bits, of the power of two that brings a number near 2^target; of 1 where none can.
DEVICE u32 fitting(float largest, int target) {
  const int exponent = bits(largest) >> 23, fits = 2 * 127 + target - exponent;  // 127 is that of 1, 0 of 0, 255 of infinity.
  return exponent == 0 || exponent == 255 ? 127 : fits < 1 ? 1 : fits > 253 ? 253 : fits;
}

// Powers of two that bring the cotangents of a thread's sequences near 8, and back.
struct Fit {
  float down[kColumns], up[kColumns];

  // Of the largest that this thread has; each warp tells its own in a table, which stands until the round's barrier.
  DEVICE void find(const Place& here, const float (&largest)[kColumns], float* peaks) {
#pragma unroll
    for (int c = 0; c < kColumns; c++) {
      float m = largest[c];
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) m = larger(m, __shfl_xor_sync(~0u, m, lanes));
      if (here.lane < 4) peaks[here.warp * kSequences + kColumns * here.quad + c] = m;
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kColumns; c++) {
      float m = 0.f;
      for (int warp = 0; warp < kWarps; warp++) m = larger(m, peaks[warp * kSequences + kColumns * here.quad + c]);
      const u32 exponent = fitting(m, 3);
      down[c] = number(exponent << 23), up[c] = number((254 - exponent) << 23);
    }
  }
};

// Scalars of x, read some steps before they are needed; backward from the last step to the first.
template <bool kBackward>
struct Scalars {
  static constexpr int kCount = at_least_one(Cell::kScalars);
  Walk<const float> from;
  float ahead[kScalarsAhead][kCount][kColumns];

  DEVICE Scalars(const Place& here, const float* x) {
    from.start(here, x, Cell::kScalars, when(kBackward ? here.time - 1 : 0, here.time), 0, kBackward);
    for (int i = 0; i < kScalarsAhead; i++) read(here, i, ahead[i]);
  }
  // Those of a step, the one after that which was read last.
  DEVICE void read(const Place& here, int step, float (&to)[kCount][kColumns]) {
    if (Cell::kScalars == 0) return;
#pragma unroll
    for (int f = 0; f < Cell::kScalars; f++)
#pragma unroll
      for (int c = 0; c < kColumns; c++) to[f][c] = read_once(from.at[c] + f);
    if (step + 1 < here.time) from.advance();
  }
  // Behind a step.
  DEVICE void advance(const Place& here, int step) {
#pragma unroll
    for (int i = 0; i + 1 < kScalarsAhead; i++)
#pragma unroll
      for (int f = 0; f < Cell::kScalars; f++)
#pragma unroll
        for (int c = 0; c < kColumns; c++) ahead[i][f][c] = ahead[i + 1][f][c];
    read(here, step + kScalarsAhead, ahead[kScalarsAhead - 1]);
  }
};

// Values [batch, time, kCount * units] that a pair reads, one step before they are needed.
template <int kCount>
struct Inputs {
  const float* from[kColumns];
  float ahead[at_least_one(kCount)][kPairs];

  DEVICE Inputs(const Place& here, const float* array) {
    for (int c = 0; c < kColumns; c++) from[c] = array + here.index(c) * here.time * kCount * kUnits;
  }
  DEVICE void read(const Place& here, int t) {
#pragma unroll
    for (int j = 0; j < kCount; j++)
#pragma unroll
      for (int i = 0; i < kPairs; i++)
        ahead[j][i] = read_once(from[here.column(i)] + ((u64)t * kCount + j) * kUnits + here.unit(i));
  }
};

// ---- Forward -----------------------------------------------------------------------------

extern "C" __global__ void CLUSTER __launch_bounds__(kThreads, 1) recurrence_forward(Pointers p, int batch, int time, int tiles) {
  using Unit = Cell::Forward;
  SHARED(shared);
  const Place here(batch, time, tiles);
  const float* weights = (const float*)p.at[0] + (u64)here.replica * Cell::kProducts * kUnits * kUnits;
  const float* vectors = (const float*)p.at[1] + (u64)here.replica * Cell::kVectors * kUnits;
  const float* carry0 = (const float*)p.at[4] + (u64)here.replica * Cell::kCarries * batch * kUnits;
  const int* lengths = (const int*)p.at[5] + (u64)here.replica * batch;
  float* carry_end = (float*)p.at[6] + (u64)here.replica * Cell::kCarries * batch * kUnits;
  float* outputs = (float*)p.at[7];
  char* piece = (char*)p.at[8] + ((u64)blockIdx.x * time + when(0, time)) * kPiece;

  u32 a[at_least_one(Cell::kProducts)][kTiles][4];
#pragma unroll
  for (int q = 0; q < Cell::kProducts; q++) {
    const float* w = weights + (u64)q * kUnits * kUnits + 16 * here.tile + (here.lane >> 2) +
                     (16 * kTiles * here.half + 2 * here.quad) * kUnits;
    load_weights<pack_half>(a[q], [&](int tile, int row, int k) { return w[(16 * tile + k) * kUnits + row]; });
  }
  Unit u[kPairs];
  int length[kColumns];
#pragma unroll
  for (int i = 0; i < kPairs; i++) {
#pragma unroll
    for (int j = 0; j < Cell::kVectors; j++) u[i].p[j] = vectors[j * kUnits + here.unit(i)];
#pragma unroll
    for (int j = 0; j < Cell::kCarries; j++)
      u[i].c[j] = here.inside[here.column(i)]
                      ? carry0[((u64)j * batch + here.sequence[here.column(i)]) * kUnits + here.unit(i)]
                      : 0.f;
#pragma unroll
    for (int j = 0; j < Cell::kOutputs; j++) u[i].y[j] = 0.f;
  }
  for (int c = 0; c < kColumns; c++) length[c] = !kMasked ? time : here.inside[c] ? lengths[here.sequence[c]] : 0;
  Scalars<false> scalars(here, (const float*)p.at[3]);
  Inputs<Cell::kInputs> inputs(here, (const float*)p.at[2]);
  inputs.read(here, when(0, time));
  const u32 base = shared_address(shared);
  const u32 from = base + 2 * ((here.lane & 7) * kRow + 16 * kTiles * here.half + (here.lane >> 3) * 8);
  const u32 to = base + 2 * ((here.lane & 7) * kRow + 16 * here.warp + ((here.lane >> 3) & 1) * 8);
  u32 words[at_least_one(kKeptWords)];
  // Of a cluster: each lane sends 8 units of one sequence to one block.
  constexpr int kSwap = 2 * Cell::kSources * kTile, kArrivals = kSwap + Cell::kResults * kThreads * 4 * kColumns;
  const Turned turned(here);
  const u32 far = kBlocks > 1 ? at_rank(base, here.quad) : 0;
  const u32 far_row = far + 2 * (turned.row * kRow + 16 * here.tile + 8 * here.half);
  Columns* const swap = (Columns*)(shared + kSwap) + here.tid;
  if constexpr (kBlocks > 1) start_cluster(here, base + kArrivals);

  Walk<u16> saved[at_least_one(Cell::kGroups)];
#pragma unroll
  for (int i = 0; i < Cell::kGroups; i++) {
    const int width = Cell::group_sources(i) * kUnits;
    saved[i].start(here, (u16*)p.at[9 + i], width, when(0, time), here.word());
    if (kBlocks > 1) turned.start(saved[i], (u16*)p.at[9 + i], width, time, when(0, time));
  }
  Walk<float> out;
  out.start(here, outputs, Cell::kOutputs * kUnits, when(0, time), 0);

  for (int step = 0; step < time; step++) {
    const int t = when(step, time);
    const u32 buffer = (step & 1) * Cell::kSources * kTile;
    float m[at_least_one(Cell::kResults)][4] = {};
    float last[at_least_one(Cell::kOutputs)][kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
#pragma unroll
      for (int f = 0; f < Cell::kScalars; f++) u[i].s[f] = scalars.ahead[0][f][here.column(i)];
#pragma unroll
      for (int j = 0; j < Cell::kInputs; j++) u[i].x[j] = inputs.ahead[j][i];
#pragma unroll
      for (int j = 0; j < Cell::kOutputs; j++) last[j][i] = u[i].y[j];
      Cell::forward(Int<0>{}, u[i]);
    }
    // While others work or the products run: what the step before left to store, what a later one will need.
    auto meanwhile = [&] {
      if (kSave && step > 0) {
        keep<kKeptWords>(piece, here.tid, words);
        piece += kReverse ? -kPiece : kPiece;
      }
      scalars.advance(here, step);
      inputs.read(here, when(step + 1 < time ? step + 1 : step, time));
    };
    each<1, Cell::kRounds + 1>([&](auto round) {
      constexpr int kRound = round.value;
      if (kBlocks > 1 && here.tid == 0)
        barrier_expect(arrivals(base + kArrivals, kRound, step), sources_of(kRound) * kUnits * kSequences * 2);
#pragma unroll
      for (int k = 0; k < Cell::kSources; k++)
        if (Cell::source_round(k) == kRound) {
          float v[kPairs];
#pragma unroll
          for (int i = 0; i < kPairs; i++) v[i] = here.is_unit(i) ? u[i].source[k] : 0.f;
          const int group = Cell::source_group(k), first = Cell::source_place(k) * kUnits;
          if constexpr (kBlocks == 1) {
            put<pack_half>(to + buffer + k * kTile, v);
            if (kSave) put_rows<pack_back>(here, saved[group], first, v);
          } else {
            const u32 word = Turned::word<pack_half>(v);
            u32 row[4];
#pragma unroll
            for (int i = 0; i < 4; i++) row[i] = __shfl_sync(~0u, word, (here.lane & ~3) + i);
            if (turned.is_row) put_far(far_row + buffer + k * kTile, row, arrivals(far + kArrivals, kRound, step));
            if (kSave) turned.put_row(saved[group], first, kHalf ? word : Turned::word<pack_back>(v));
          }
        }
      if constexpr (kBlocks == 1) {
        __syncthreads();
      } else {
        if (kRound == 1) meanwhile();
        barrier_wait(arrivals(base + kArrivals, kRound, step), step >> 1 & 1);
      }
#pragma unroll
      for (int k = 0; k < Cell::kSources; k++)
        if (Cell::source_round(k) == kRound)
#pragma unroll
          for (int k2 = 0; k2 < kTiles / 2; k2++) {
            u32 b[4];
            load_matrices(b, from + buffer + k * kTile + k2 * 64);
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
              for (int q = 0; q < Cell::kProducts; q++)
                if (Cell::product_source(q) == k)
                  mma_half(m[Cell::product_result(q)], a[q][2 * k2 + half], b[2 * half], b[2 * half + 1]);
          }
      if (kBlocks == 1 && kRound == 1) meanwhile();
      // A warp's half of the sums over units is worth something with the other's. It gives away the row that is not its own;
      // the place is free again when the other has sent its next sources, without which nobody comes here.
      if constexpr (kSplit == 2) {
#pragma unroll
        for (int j = 0; j < Cell::kResults; j++)
          if (Cell::result_round(j) == kRound) {
            Columns given;
#pragma unroll
            for (int c = 0; c < kColumns; c++) {
              given.v[c] = here.half ? m[j][c] : m[j][2 + c];
              m[j][c] = here.half ? m[j][2 + c] : m[j][c];
            }
            swap[j * kThreads] = given;
          }
        pair_barrier(here.warp / 2);
#pragma unroll
        for (int j = 0; j < Cell::kResults; j++)
          if (Cell::result_round(j) == kRound) {
            const Columns taken = swap[j * kThreads + (here.half ? -32 : 32)];
#pragma unroll
            for (int c = 0; c < kColumns; c++) m[j][c] += taken.v[c];
          }
      }
#pragma unroll
      for (int i = 0; i < kPairs; i++) {
#pragma unroll
        for (int j = 0; j < Cell::kResults; j++)
          if (Cell::result_round(j) == kRound) u[i].m[j] = m[j][Place::sum(i)];
        Cell::forward(round, u[i]);
      }
    });
    if (kSave) {
      float k[2 * at_least_one(kKeptWords)] = {};
#pragma unroll
      for (int i = 0; i < kPairs; i++)
#pragma unroll
        for (int j = 0; j < Cell::kKept; j++) k[j * kPairs + i] = u[i].k[j];
#pragma unroll
      for (int w = 0; w < kKeptWords; w++) words[w] = pack_half(k[2 * w], k[2 * w + 1]);
    }
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      const bool running = !kMasked || t < length[here.column(i)];
#pragma unroll
      for (int j = 0; j < Cell::kCarries; j++) u[i].c[j] = running ? u[i].next[j] : u[i].c[j];
#pragma unroll
      for (int j = 0; j < Cell::kOutputs; j++) {
        if (kOutputs == kAll && here.inside[here.column(i)])
          out.at[here.column(i)][j * kUnits + here.unit(i)] =
              running ? u[i].y[j] : 0.f;
        u[i].y[j] = running ? u[i].y[j] : last[j][i];
      }
    }
#pragma unroll
    for (int i = 0; i < Cell::kGroups; i++)
      if (kSave) saved[i].advance();
    if (kOutputs == kAll) out.advance();
  }
  if (kSave) keep<kKeptWords>(piece, here.tid, words);
#pragma unroll
  for (int i = 0; i < kPairs; i++) {
    const int c = here.column(i);
    if (!here.inside[c]) continue;
#pragma unroll
    for (int j = 0; j < Cell::kCarries; j++)
      carry_end[((u64)j * batch + here.sequence[c]) * kUnits + here.unit(i)] = u[i].c[j];
#pragma unroll
    for (int j = 0; j < Cell::kOutputs; j++)
      if (kOutputs == kLast) outputs[(here.index(c) * Cell::kOutputs + j) * kUnits + here.unit(i)] = u[i].y[j];
  }
}

// ---- Backward ----------------------------------------------------------------------------

extern "C" __global__ void CLUSTER __launch_bounds__(kThreads, 1) recurrence_backward(Pointers p, int batch, int time, int tiles, int launch) {
  using Unit = Cell::Backward;
  SHARED(shared);
  const Place here(batch, time, tiles);
  const float* weights = (const float*)p.at[0] + (u64)here.replica * Cell::kProducts * kUnits * kUnits;
  const float* vectors = (const float*)p.at[1] + (u64)here.replica * Cell::kVectors * kUnits;
  const float* carry_end = (const float*)p.at[4] + (u64)here.replica * Cell::kCarries * batch * kUnits;
  const int* lengths = (const int*)p.at[5] + (u64)here.replica * batch;
  const char* piece = (const char*)p.at[6] + ((u64)blockIdx.x * time + when(time - 1, time)) * kPiece;
  const float* d_end = (const float*)p.at[7] + (u64)here.replica * Cell::kCarries * batch * kUnits;
  const float* d_outputs = (const float*)p.at[8];
  // The scale, whether something left float16 by it, the largest of all then, and the scale of what is stored. It is a result too.
  float* const scales = (float*)p.at[9] + 4 * here.replica;
  const bool again = kHalf && launch > 0;
  if (again && scales[1] == 0.f) return;
  const float scale = scales[0], unscale = 1.f / scale;
  const float stored = launch == 2 ? number(fitting(scales[2], 14) << 23) : 1.f;
  if (launch == 2 && here.tid == 0) scales[3] = scale * stored;
  float* d_start = (float*)p.at[10 + Cell::kGroups] + (u64)here.replica * Cell::kCarries * batch * kUnits;
  float* d_inputs = (float*)p.at[11 + Cell::kGroups];
  // As many rows as there are blocks of 4 sequences: where a block has 8, its second row is zero.
  float* sums = (float*)p.at[12 + Cell::kGroups] + (u64)(blockIdx.x / kBlocks) * kColumns * Cell::kSums * kUnits;

  const u32 ring = shared_address(shared);
  Walk<const u16> recalled[at_least_one(Cell::kRecalled)];
#pragma unroll
  for (int r = 0; r < Cell::kRecalled; r++) {
    const int k = Cell::recalled_source(r), group = Cell::source_group(k);
    recalled[r].start(here, (const u16*)p.at[10 + group], Cell::group_sources(group) * kUnits, when(time - 1, time),
                      Cell::source_place(k) * kUnits + here.word(), true);
  }
  // Fetches what was kept of a step, the one after that which was fetched last.
  auto get = [&](int step, u32 slot) {
    if (step < time) {
      const u32 stage = ring + slot * kStage;
      fetch<kKeptWords>(stage, piece, here.tid);
      piece -= kReverse ? -kPiece : kPiece;
#pragma unroll
      for (int r = 0; r < Cell::kRecalled; r++) {
#pragma unroll
        for (int c = 0; c < kColumns; c++)
          fetch_words<1>(stage + kPiece + 4 * ((r * kColumns + c) * kThreads + here.tid), recalled[r].at[c]);
        recalled[r].advance();
      }
    }
    fetch_commit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; i++) get(i, i);
  u32 a[at_least_one(Cell::kProducts)][kTiles][4];
#pragma unroll
  for (int q = 0; q < Cell::kProducts; q++) {
    const float* w = weights + (u64)q * kUnits * kUnits + (16 * kFar * here.warp + (here.lane >> 2)) * kUnits +
                     kOwned * here.rank + 2 * here.quad;
    load_weights<pack_back>(a[q], [&](int tile, int row, int k) {
      return w[(16 * (tile / kOwnedTiles) + row) * kUnits + 16 * (tile % kOwnedTiles) + k];
    });
  }
  Unit u[kPairs];
  float total[at_least_one(Cell::kSums)][kRows] = {}, most = 0.f;
  int length[kColumns];
#pragma unroll
  for (int i = 0; i < kPairs; i++) {
    const int c = here.column(i);
#pragma unroll
    for (int j = 0; j < Cell::kVectors; j++) u[i].p[j] = vectors[j * kUnits + here.unit(i)];
#pragma unroll
    for (int j = 0; j < Cell::kCarries; j++) {
      const u64 at = ((u64)j * batch + here.sequence[c]) * kUnits + here.unit(i);
      u[i].dn[j] = here.inside[c] ? d_end[at] * scale : 0.f;
      u[i].after[j] = here.inside[c] ? carry_end[at] : 0.f;
    }
#pragma unroll
    for (int j = 0; j < Cell::kOutputs; j++) u[i].dy[j] = 0.f;
  }
  for (int c = 0; c < kColumns; c++) length[c] = !kMasked ? time : here.inside[c] ? lengths[here.sequence[c]] : 0;
  Scalars<true> scalars(here, (const float*)p.at[3]);
  const u32 base = ring + kStages * kStage;
  const u32 from = base + 2 * ((here.lane & 7) * kRowBack + (here.lane >> 3) * 8);
  const u32 to = base + 2 * ((here.lane & 7) * kRowBack + 16 * here.warp + ((here.lane >> 3) & 1) * 8);
  // Of a cluster: parts of the sums stand in the order of tiles and lanes, those of one block behind another's.
  constexpr int kPart = kStages * kStage + 2 * Cell::kResults * kTileBack, kArrivals = kPart + 2 * Cell::kSources * kParts;
  float* const peaks = (float*)(shared + (kBlocks > 1 ? kArrivals + 16 * Cell::kRounds : kPart));
  constexpr int kLane = 8 * kColumns;
  const Turned turned(here);
  const u32 to_word = base + 2 * (turned.row * kRowBack + turned.unit - kOwned * here.rank);
  u32 far[kFar];
#pragma unroll
  for (int i = 0; i < kFar; i++) far[i] = kBlocks > 1 ? at_rank(ring, (kFar * here.warp + i) / kOwnedTiles) : 0;
  const char* parts = shared + kPart + (32 * (here.tile % kOwnedTiles) + here.lane) * kLane + 4 * kColumns * here.half;
  if constexpr (kBlocks > 1) start_cluster(here, ring + kArrivals);
  Inputs<Cell::kInputsBack> inputs(here, (const float*)p.at[2]);
  Inputs<kOutputs == kAll ? Cell::kOutputs : 0> bars(here, d_outputs);
  inputs.read(here, when(time - 1, time));
  bars.read(here, when(time - 1, time));

  Walk<u16> d_results[at_least_one(Cell::kGroups)];
#pragma unroll
  for (int i = 0; i < Cell::kGroups; i++) {
    u16* const rows = (u16*)p.at[14 + Cell::kGroups + i];
    const int width = Cell::group_results(i) * kUnits, t = when(time - 1, time);
    d_results[i].start(here, rows, width, t, here.word(), true);
    if (kBlocks > 1) turned.start(d_results[i], rows, width, time, t);
  }
  Walk<float> dx;
  dx.start(here, d_inputs, Cell::kInputs * kUnits, when(time - 1, time), 0, true);

  u32 slot = 0;
  for (int step = 0; step < time; step++, slot = slot == kStages - 1 ? 0 : slot + 1) {
    const int t = when(time - 1 - step, time);
    const u32 buffer = (step & 1) * Cell::kResults * kTileBack;
    u32 words[at_least_one(kKeptWords)];
    fetch_wait<kStages - 2>();
    const char* stage = shared + slot * kStage;
    recall<kKeptWords>(stage, here.tid, words);
#pragma unroll
    for (int r = 0; r < Cell::kRecalled; r++)
#pragma unroll
      for (int c = 0; c < kColumns; c++) {
        const float2 v = unpack_half(((const u32*)(stage + kPiece))[(r * kColumns + c) * kThreads + here.tid]);
        if constexpr (kRows == 2)
          u[c].c[Cell::recalled_carry(r)] = v.x, u[c + kColumns].c[Cell::recalled_carry(r)] = v.y;
        else
          u[c].c[Cell::recalled_carry(r)] = here.row & 1 ? v.y : v.x;
      }
    get(step + kStages - 1, slot == 0 ? kStages - 1 : slot - 1);
    bool running[kColumns];
    for (int c = 0; c < kColumns; c++) running[c] = !kMasked || t < length[c];
#pragma unroll
    for (int j = 0; j < Cell::kKept; j++)
#pragma unroll
      for (int i = 0; i < kPairs; i++) {
        const float2 v = unpack_half(words[(j * kPairs + i) / 2]);
        u[i].k[j] = (j * kPairs + i) % 2 ? v.y : v.x;
      }
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      const int c = here.column(i);
#pragma unroll
      for (int f = 0; f < Cell::kScalars; f++) u[i].s[f] = scalars.ahead[0][f][c];
#pragma unroll
      for (int j = 0; j < Cell::kInputsBack; j++) u[i].x[Cell::input_back(j)] = inputs.ahead[j][i];
#pragma unroll
      for (int j = 0; j < Cell::kOutputs; j++) {
        if (kOutputs == kAll) u[i].dy[j] = running[c] ? bars.ahead[j][i] * scale : 0.f;
        // The last output is that of the last step that runs.
        if (kOutputs == kLast) {
          const bool is_last = running[c] && (kReverse ? t == 0 : t == length[c] - 1);
          u[i].dy[j] = is_last ? d_outputs[(here.index(c) * Cell::kOutputs + j) * kUnits + here.unit(i)] * scale : 0.f;
        }
      }
#pragma unroll
      for (int k = 0; k < Cell::kSources; k++) u[i].ds[k] = 0.f;
      Cell::backward(Int<0>{}, u[i]);
    }
    auto meanwhile = [&] {
      scalars.advance(here, step);
      const int next = when(step + 1 < time ? time - 2 - step : 0, time);
      inputs.read(here, next);
      bars.read(here, next);
    };
    each<0, Cell::kRounds>([&](auto waited) {
      constexpr int kRound = Cell::kRounds - waited.value;
      if (kBlocks > 1 && here.tid == 0)
        barrier_expect(arrivals(ring + kArrivals, kRound, step), sources_of(kRound) * kParts);
      float largest[kColumns] = {};
#pragma unroll
      for (int j = 0; j < Cell::kResults; j++)
        if (Cell::result_round(j) == kRound)
#pragma unroll
          for (int i = 0; i < kPairs; i++) {
            const int c = here.column(i);
            u[i].dm[j] = running[c] && here.is_unit(i) ? u[i].dm[j] : 0.f;
            if (kHalf) largest[c] = larger(largest[c], abs_(u[i].dm[j]));
          }
#pragma unroll
      for (int c = 0; c < kColumns; c++) most = larger(most, largest[c]);  // Before a product makes no number of it.
      Fit fit;
      if (again) fit.find(here, largest, peaks);
#pragma unroll
      for (int j = 0; j < Cell::kResults; j++)
        if (Cell::result_round(j) == kRound) {
          float v[kPairs], fitted[kPairs];
#pragma unroll
          for (int i = 0; i < kPairs; i++) {
            v[i] = u[i].dm[j];
            if (again) fitted[i] = v[i] * fit.down[here.column(i)], v[i] *= stored;
          }
          const int group = Cell::result_group(j), first = Cell::result_place(j) * kUnits;
          if constexpr (kBlocks == 1) {
            if (again)
              put<pack_back>(to + buffer + j * kTileBack, fitted);
            else
              put<pack_back>(to + buffer + j * kTileBack, v);
            put_rows<pack_back>(here, d_results[group], first, v);
          } else {
            u32 word = Turned::word<pack_back>(v);
            turned.put_row(d_results[group], first, word);
            if (again) word = Turned::word<pack_back>(fitted);
            if (turned.is_row) put_word(to_word + buffer + j * kTileBack, word);
          }
        }
      __syncthreads();
      float d[at_least_one(Cell::kProducts)][kFar][4] = {};
#pragma unroll
      for (int j = 0; j < Cell::kResults; j++)
        if (Cell::result_round(j) == kRound)
#pragma unroll
          for (int k2 = 0; k2 < (kOwnedTiles + 1) / 2; k2++) {
            u32 b[4];  // Of an odd number of tiles the last two matrices are anything, and not used.
            load_matrices(b, from + buffer + j * kTileBack + k2 * 64);
#pragma unroll
            for (int q = 0; q < Cell::kProducts; q++)
              if (Cell::product_result(q) == j)
#pragma unroll
                for (int i = 0; i < kFar; i++) {
                  const int tile = i * kOwnedTiles + 2 * k2;
                  mma_back(d[q][i], a[q][tile], b[0], b[1]);
                  if (2 * k2 + 1 < kOwnedTiles) mma_back(d[q][i], a[q][tile + 1], b[2], b[3]);
                }
          }
      if (kBlocks == 1 && waited.value == 0) meanwhile();
      if constexpr (kBlocks > 1) {
        const u32 there = kPart + (step & 1) * Cell::kSources * kParts + here.rank * (kParts / kBlocks) + here.lane * kLane;
#pragma unroll
        for (int k = 0; k < Cell::kSources; k++)
          if (Cell::source_round(k) == kRound)
#pragma unroll
            for (int i = 0; i < kFar; i++) {
              u32 part[2 * kColumns];
#pragma unroll
              for (int n = 0; n < 2 * kColumns; n++) {
                float sum = 0.f;
#pragma unroll
                for (int q = 0; q < Cell::kProducts; q++)
                  if (Cell::product_source(q) == k) sum += d[q][i][Place::sum(n)];
                if (again) sum *= fit.up[n % kColumns];
                part[n] = bits(sum);
              }
              put_far(far[i] + there + k * kParts + 32 * kLane * ((kFar * here.warp + i) % kOwnedTiles), part,
                      arrivals(far[i] + kArrivals, kRound, step));
            }
        if (waited.value == 0) meanwhile();
        barrier_wait(arrivals(ring + kArrivals, kRound, step), step >> 1 & 1);
#pragma unroll
        for (int k = 0; k < Cell::kSources; k++)
          if (Cell::source_round(k) == kRound)
#pragma unroll
            for (int block = 0; block < kBlocks; block++) {
              const int at = ((step & 1) * Cell::kSources + k) * kParts + block * (kParts / kBlocks);
              const Columns part = *(const Columns*)(parts + at);
#pragma unroll
              for (int i = 0; i < kPairs; i++) u[i].ds[k] += part.v[here.column(i)];
            }
      }
#pragma unroll
      for (int i = 0; i < kPairs; i++) {
        if (kBlocks == 1)
#pragma unroll
          for (int k = 0; k < Cell::kSources; k++)
            if (Cell::source_round(k) == kRound) {
              int terms = 0;
#pragma unroll
              for (int q = 0; q < Cell::kProducts; q++)
                if (Cell::product_source(q) == k) {
                  const float term = d[q][0][Place::sum(i)];
                  u[i].ds[k] = terms++ ? u[i].ds[k] + term : term;
                }
              if (again) u[i].ds[k] *= fit.up[here.column(i)];
            }
        Cell::backward(Int<waited.value + 1>{}, u[i]);
      }
    });
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      const int c = here.column(i);
#pragma unroll
      for (int j = 0; j < Cell::kSums; j++) total[j][i / kColumns] += running[c] ? u[i].sum[j] : 0.f;
#pragma unroll
      for (int j = 0; j < Cell::kInputs; j++)
        if (here.inside[c])
          dx.at[c][j * kUnits + here.unit(i)] =
              running[c] ? u[i].dx[j] * unscale : 0.f;
#pragma unroll
      for (int j = 0; j < Cell::kCarries; j++) {
        u[i].dn[j] = running[c] ? u[i].before[j] : u[i].dn[j];
        u[i].after[j] = u[i].c[j];
      }
    }
#pragma unroll
    for (int i = 0; i < Cell::kGroups; i++)
      d_results[i].advance();
    if (Cell::kInputs > 0) dx.advance();
  }
  if (launch == 0 && most > kMostHalf) scales[1] = 1.f;
  if (launch == 1) raise(scales + 2, most);
#pragma unroll
  for (int i = 0; i < kPairs; i++)
    if (here.inside[here.column(i)])
#pragma unroll
      for (int j = 0; j < Cell::kCarries; j++)
        d_start[((u64)j * batch + here.sequence[here.column(i)]) * kUnits + here.unit(i)] = u[i].dn[j] * unscale;
#pragma unroll
  for (int j = 0; j < Cell::kSums; j++)
#pragma unroll
    for (int h = 0; h < kRows; h++) {
      float v = total[j][h];
      v += __shfl_xor_sync(~0u, v, 1);
      v += __shfl_xor_sync(~0u, v, 2);
      if (here.quad < kColumns) sums[(here.quad * Cell::kSums + j) * kUnits + here.row + 8 * h] = here.quad == 0 ? v * unscale : 0.f;
    }
}
