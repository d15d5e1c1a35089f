// What the library of one cell and the library that XLA calls know of each other, and have in common.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace seqmnist {

enum Outputs { kNone = 0, kAll = 1, kLast = 2 };

// One call's sizes, without replicas.
struct Sizes {
  std::ptrdiff_t batch, time, features, hidden;
  int outputs;
  bool reverse;
};

// One replica's arrays. Those that are not wanted, or not given, are null. What a call may write is its results only.
struct Arrays {
  const float* weights;  // [products, hidden, hidden]
  const float* vectors;  // [vectors, hidden]
  const float* inputs;   // [batch, time, inputs, hidden]; where x is multiplied inside, the matrix [features, inputs, hidden]
  const float* x;        // [batch, time, features]
  const float* carry;    // [carries, batch, hidden]: forward before the first step, backward after the last
  const int32_t* lengths;
  float* end;      // [carries, batch, hidden], after the last step
  float* outputs;  // [batch, time, outputs, hidden], or of the last step
  float* kept;     // [time, batch, units, kept], in an order of its own
  const float *d_end, *d_outputs;
  float *d_carry, *d_inputs, *d_weights, *d_x;
  float* sums;  // [sums, hidden]
};

// A cell's numbers and functions. A slice is sequences first .. first + count - 1 for all steps; its share, of so many
// floats and zero at first, takes what it adds to the gradients that all slices have in common.
struct Kernel {
  std::ptrdiff_t products, vectors, inputs, features, carries, outputs, kept, sums, tile_rows;
  bool front;  // whether x is multiplied inside
  void (*forward)(const Sizes&, const Arrays&, std::ptrdiff_t first, std::ptrdiff_t count);
  void (*backward)(const Sizes&, const Arrays&, std::ptrdiff_t first, std::ptrdiff_t count, float* share);
  std::ptrdiff_t (*share)(const Sizes&);
  void (*finish)(const Sizes&, const Arrays&, const float* const* shares, std::ptrdiff_t count);
};

// Hidden units are padded to this, whatever the machine's vectors: what is kept has one size everywhere.
constexpr std::ptrdiff_t kPadding = 16;

namespace {

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

}  // namespace
}  // namespace seqmnist
