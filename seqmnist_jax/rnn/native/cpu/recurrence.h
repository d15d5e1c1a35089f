// A cell over whole sequences on a CPU, forward and backward: all of it but the cell, which is generated (`Cell`).
//
// Sequences of a batch don't meet, so each core takes a slice of them through all its steps and waits for nobody. A round
// of a step is, for every kLanes units (or twice as many) and a tile of sequences: the products into registers, then the
// stage that waited for them. Backward the same with the transposed matrices; the products' cotangents and what they were
// multiplied with are gathered until some steps' worth, still in cache, give their share of the matrices' gradients.
//
// Arrays are as in call.h. Inside, rows are sequences, padded to pairs, and units are padded to kPadding.

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace seqmnist {

constexpr int kMostTerms = 32;

template <int N>
struct Int {
  static constexpr int value = N;
};
template <int I, int N, class F>
SEQMNIST_INLINE void each(F&& f) {
  if constexpr (I < N) {
    f(Int<I>{});
    each<I + 1, N>(f);
  }
}

// Some of a round's products: what they make, and of what. Forward columns are results and terms the sources, of one
// block each; backward columns are sources, and terms are neighbouring results.
struct Term {
  int first, count;
};
struct Pass {
  int round, width, columns[3], terms;
  Term term[kMostTerms];
};
// Some of the values that are made of x.
struct FrontPass {
  int first, width;
};
// Some of the matrices' gradients: of one source with neighbouring columns of the gradients.
struct Outer {
  int source, first, width;
};
// What a source is: a carry before the step, a carry after it, or a value of its own.
enum class Origin { kBefore, kAfter, kOwn };

// Vectors of units that a tile takes: two where one alone would leave most registers idle.
template <class T>
constexpr int vectors_of(const T& list, int round) {
  int most = 0;
  for (const auto& pass : list)
    if (pass.round == round) most = std::max(most, pass.width);
  return most == 1 ? 2 : 1;
}

}  // namespace seqmnist
