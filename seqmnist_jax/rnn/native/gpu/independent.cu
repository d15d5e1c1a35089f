// A cell whose units see no other, over whole sequences: all of it but the cell, which is generated (`Cell`).
//
// No product joins the units, so a thread takes one unit of one sequence through all steps, its carry in registers, and meets
// nobody. Neighbouring threads have neighbouring units: rows of every array [batch, time, values, units] are read and written
// whole. What a step reads is asked for kAhead steps before. Steps after a sequence's end are not visited.
//
// For the way back the carry after each step is kept, in float32; all else is made again. Where the outputs are those carries
// they are read in their place.

struct Pointers {
  void* at[24];
};

constexpr int kBlocks = 1;  // that work together

// Where a thread stands: `row` counts the sequences of all replicas, `first` and `last` are the first and last steps that run.
struct Place {
  int replica, sequence, unit, batch, length, first, last;
  bool inside;
  u64 row;

  DEVICE Place(int batch, int time, int tiles, const int* lengths) : batch(batch) {
    const int index = blockIdx.x % tiles * kThreads + threadIdx.x;
    replica = blockIdx.x / tiles, sequence = index / kHidden, unit = index % kHidden;
    inside = sequence < batch, row = (u64)replica * batch + sequence;
    length = !inside ? 0 : kMasked ? lengths[row] : time;
    first = kReverse ? length - 1 : 0, last = kReverse ? 0 : length - 1;
  }
  // In an array [carries, batch, units], and [replicas, number, units].
  DEVICE u64 carry(int i) const { return (((u64)replica * Cell::kCarries + i) * batch + sequence) * kHidden + unit; }
  DEVICE u64 vector(int i, int number) const { return ((u64)replica * number + i) * kHidden + unit; }
};

constexpr int kForwards = kReverse ? -1 : 1;  // the next step that runs

// What a step reads of an array: kCount values, `at` from its own place, asked for kAhead steps before they are needed; behind
// the last one of so many steps stands `beyond`.
template <int kAhead, int kCount, int (*at)(int)>
struct Ahead {
  const float* next;
  int left, stride;
  float values[kAhead][at_least_one(kCount)], beyond[at_least_one(kCount)];

  template <class Beyond>
  DEVICE Ahead(const float* next, int steps, int stride, Beyond&& beyond_at) : next(next), left(steps), stride(stride) {
#pragma unroll
    for (int j = 0; j < kCount; j++) beyond[j] = beyond_at(j);
#pragma unroll
    for (int k = 0; k < kAhead; k++) read(k);
  }
  DEVICE Ahead(const float* next, int steps, int stride) : Ahead(next, steps, stride, [](int) { return 0.f; }) {}
  DEVICE void read(int k) {
    if (kCount == 0) return;
#pragma unroll
    for (int j = 0; j < kCount; j++) values[k][j] = left > 0 ? next[at(j)] : beyond[j];
    next += stride, left--;
  }
  template <class To>
  DEVICE void take(int k, To&& to) {
#pragma unroll
    for (int j = 0; j < kCount; j++) to(j, values[k][j]);
    read(k);
  }
};

// step(k) for each step, k being the place of what it reads in an `Ahead`; whole rounds without a question, so that steps overlap.
template <int kAhead, class Step>
DEVICE void walk(int length, Step&& step) {
  int left = length;
  for (; left >= kAhead; left -= kAhead)
#pragma unroll
    for (int k = 0; k < kAhead; k++) step(k);
#pragma unroll
  for (int k = 0; k < kAhead; k++)
    if (k < left) step(k);
}

extern "C" __global__ void __launch_bounds__(kThreads) recurrence_forward(Pointers p, int batch, int time, int tiles) {
  const Place here(batch, time, tiles, (const int*)p.at[5]);
  if (!here.inside) return;
  constexpr int kX = Cell::kInputs * kHidden, kY = Cell::kOutputs * kHidden, kKept = Cell::kStates * kHidden;
  const u64 first = here.row * time + here.first;
  float* out = (float*)p.at[7] + first * kY + here.unit;
  float* kept = (float*)p.at[8] + first * kKept + here.unit;
  Cell::Forward u;
#pragma unroll
  for (int j = 0; j < Cell::kVectors; j++) u.p[j] = ((const float*)p.at[1])[here.vector(j, Cell::kVectors)];
#pragma unroll
  for (int j = 0; j < Cell::kCarries; j++) u.c[j] = ((const float*)p.at[4])[here.carry(j)];
#pragma unroll
  for (int j = 0; j < Cell::kOutputs; j++) u.y[j] = 0.f;
  constexpr int kAhead = Cell::kAhead;
  Ahead<kAhead, Cell::kInputs, Cell::input_at> inputs((const float*)p.at[2] + first * kX + here.unit, here.length, kForwards * kX);
  Ahead<kAhead, Cell::kScalars, Cell::scalar_at> scalars((const float*)p.at[3] + first * Cell::kScalars, here.length,
                                                         kForwards * Cell::kScalars);
  walk<kAhead>(here.length, [&](int k) {
    inputs.take(k, [&](int j, float v) { u.x[j] = v; });
    scalars.take(k, [&](int j, float v) { u.s[j] = v; });
    Cell::forward(Int<0>{}, u);
#pragma unroll
    for (int j = 0; j < Cell::kCarries; j++) u.c[j] = u.next[j];
#pragma unroll
    for (int j = 0; j < Cell::kStates; j++)
      if (kSave && !Cell::kFromOutputs) kept[j * kHidden] = u.c[Cell::state_carry(j)];
#pragma unroll
    for (int j = 0; j < Cell::kOutputs; j++)
      if (kOutputs == kAll) out[j * kHidden] = u.y[j];
    out += kForwards * kY, kept += kForwards * kKept;
  });
#pragma unroll
  for (int j = 0; j < Cell::kCarries; j++) ((float*)p.at[6])[here.carry(j)] = u.c[j];
#pragma unroll
  for (int j = 0; j < Cell::kOutputs; j++) {
    if (kOutputs == kLast) ((float*)p.at[7])[here.row * kY + j * kHidden + here.unit] = u.y[j];
    if (kOutputs == kAll)
      for (int t = here.length; t < time; t++) ((float*)p.at[7])[(here.row * time + t) * kY + j * kHidden + here.unit] = 0.f;
  }
}

extern "C" __global__ void __launch_bounds__(kThreads) recurrence_backward(Pointers p, int batch, int time, int tiles) {
  const Place here(batch, time, tiles, (const int*)p.at[5]);
  if (!here.inside) return;
  constexpr int kX = Cell::kInputs * kHidden, kY = Cell::kOutputs * kHidden;
  constexpr int kKept = (Cell::kFromOutputs ? Cell::kOutputs : Cell::kStates) * kHidden;
  const u64 last = here.row * time + here.last;
  const float* bars = (const float*)p.at[9];
  float* dx = (float*)p.at[11] + last * kX + here.unit;
  Cell::Backward u;
  float total[at_least_one(Cell::kSums)] = {};
#pragma unroll
  for (int j = 0; j < Cell::kVectors; j++) u.p[j] = ((const float*)p.at[1])[here.vector(j, Cell::kVectors)];
#pragma unroll
  for (int j = 0; j < Cell::kCarries; j++) {
    u.dn[j] = ((const float*)p.at[8])[here.carry(j)];
    u.after[j] = ((const float*)p.at[6])[here.carry(j)];
  }
#pragma unroll
  for (int j = 0; j < Cell::kOutputs; j++) u.dy[j] = kOutputs == kLast ? bars[here.row * kY + j * kHidden + here.unit] : 0.f;
  constexpr int kAhead = Cell::kAheadBack, kBackwards = -kForwards;
  Ahead<kAhead, Cell::kInputsBack, Cell::input_back_at> inputs((const float*)p.at[2] + last * kX + here.unit, here.length,
                                                               kBackwards * kX);
  Ahead<kAhead, Cell::kScalars, Cell::scalar_at> scalars((const float*)p.at[3] + last * Cell::kScalars, here.length,
                                                         kBackwards * Cell::kScalars);
  Ahead<kAhead, kOutputs == kAll ? Cell::kOutputs : 0, Cell::output_at> outputs(bars + last * kY + here.unit, here.length,
                                                                                kBackwards * kY);
  // The carry before a step stands at the step before; before the first it is the one that was given.
  Ahead<kAhead, Cell::kStates, Cell::state_at> states((const float*)p.at[7] + (last + kBackwards) * kKept + here.unit,
                                                      here.length - 1, kBackwards * kKept, [&](int j) {
                                                        return ((const float*)p.at[4])[here.carry(Cell::state_carry(j))];
                                                      });
  walk<kAhead>(here.length, [&](int k) {
    inputs.take(k, [&](int j, float v) { u.x[Cell::input_back(j)] = v; });
    scalars.take(k, [&](int j, float v) { u.s[j] = v; });
    outputs.take(k, [&](int j, float v) { u.dy[j] = v; });
    states.take(k, [&](int j, float v) { u.c[Cell::state_carry(j)] = v; });
    Cell::backward(Int<0>{}, u);
#pragma unroll
    for (int j = 0; j < Cell::kSums; j++) total[j] += u.sum[j];
#pragma unroll
    for (int j = 0; j < Cell::kInputs; j++) dx[j * kHidden] = u.dx[j];
    dx += kBackwards * kX;
#pragma unroll
    for (int j = 0; j < Cell::kCarries; j++) u.dn[j] = u.before[j];
#pragma unroll
    for (int j = 0; j < Cell::kStates; j++) u.after[Cell::state_carry(j)] = u.c[Cell::state_carry(j)];
    if (kOutputs == kLast)
#pragma unroll
      for (int j = 0; j < Cell::kOutputs; j++) u.dy[j] = 0.f;
  });
#pragma unroll
  for (int j = 0; j < Cell::kCarries; j++) ((float*)p.at[10])[here.carry(j)] = u.dn[j];
#pragma unroll
  for (int j = 0; j < Cell::kSums; j++) ((float*)p.at[12])[(here.row * Cell::kSums + j) * kHidden + here.unit] = total[j];
#pragma unroll
  for (int j = 0; j < Cell::kInputs; j++)
    for (int t = here.length; t < time; t++) ((float*)p.at[11])[(here.row * time + t) * kX + j * kHidden + here.unit] = 0.f;
}
