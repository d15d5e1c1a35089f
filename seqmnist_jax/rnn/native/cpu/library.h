// Below all else: what the library gives.

namespace seqmnist {
namespace {

void forward(const Sizes& sizes, const Arrays& arrays, std::ptrdiff_t first, std::ptrdiff_t count) {
  Forward<Precision>(sizes, arrays, first, count).run();
}

void backward(const Sizes& sizes, const Arrays& arrays, std::ptrdiff_t first, std::ptrdiff_t count, float* share) {
  Backward<Precision>(sizes, arrays, first, count, share).run();
}

std::ptrdiff_t share(const Sizes& sizes) { return Share(Slice(sizes, 0, 1)).floats; }

// The sums of a replica's slices, in their order, into the gradients' own layout.
void finish(const Sizes& sizes, const Arrays& a, const float* const* shares, std::ptrdiff_t count) {
  const Slice s(sizes, 0, 1);
  const Share place(s);
  auto add_up = [&](std::ptrdiff_t at, float* to, std::ptrdiff_t j) {
    Vec sum{};
    for (std::ptrdiff_t i = 0; i < count; ++i) sum += load(shares[i] + at);
    store_some(to + j * kLanes, sum, s.lanes(j));
  };
  // A matrix, from a source of so many rows, that is between two rows' beginnings `stride` apart.
  auto finish_matrix = [&](int source, int column, std::ptrdiff_t rows, float* to, std::ptrdiff_t stride) {
    for (int o = 0; o < kOuters; ++o) {
      const Outer outer = Cell::outers[o];
      const int c = column - outer.first;
      if (outer.source != source || c < 0 || c >= outer.width) continue;
      const std::ptrdiff_t W = outer_vectors(o);
      for (std::ptrdiff_t j = 0; j < s.vectors; ++j) {
        const std::ptrdiff_t first = j / W * W, width = std::min(W, s.vectors - first) * outer.width;
        const std::ptrdiff_t panel = place.at[o] + first * units_of(s, source) * outer.width * kLanes;
        for (std::ptrdiff_t i = 0; i < rows; ++i)
          add_up(panel + (i * width + (j - first) * outer.width + c) * kLanes, to + i * stride, j);
      }
    }
  };
  for (int q = 0; q < Cell::kProducts; ++q)
    finish_matrix(Cell::product_source[q], Cell::product_result[q], s.hidden, a.d_weights + q * s.hidden * s.hidden,
                  s.hidden);
  for (int i = 0; Cell::kFront && i < Cell::kInputs; ++i)
    finish_matrix(Cell::kSources, Cell::input_column[i], s.features, a.d_inputs + i * s.hidden,
                  Cell::kInputs * s.hidden);
  for (int i = 0; i < Cell::kSums; ++i)
    for (std::ptrdiff_t j = 0; j < s.vectors; ++j)
      add_up(place.sums + i * s.units + j * kLanes, a.sums + i * s.hidden, j);
}

}  // namespace
}  // namespace seqmnist

extern "C" const seqmnist::Kernel* seqmnist_kernel() {
  using namespace seqmnist;
  static const Kernel kernel = {Cell::kProducts, Cell::kVectors, Cell::kInputs, Cell::kFeatures, Cell::kCarries,
                                Cell::kOutputs,  Cell::kKept,    Cell::kSums,   kSliceRows,      Cell::kFront,
                                forward,         backward,       share,         finish};
  return &kernel;
}
