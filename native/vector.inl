// Vectors of kLanes floats, for one level. Included inside the level's own anonymous namespace.
//
// The level defines kLanes first, and `fma`, `sum`, `root`, `at_least` and `append_lanes` after. Products and sums are never contracted by the compiler
// (-ffp-contract=off), so that a formula gives the same bits wherever it is inlined.

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef float UnalignedVec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
inline Vec splat(float a) { return a - Vec{}; }

/// How a loop over D reads and writes: whole vectors first, then once the part that is left.
struct Whole {
  Vec load(const float* p) const { return ::monosem::MONOSEM_LEVEL::load(p); }
  void store(float* p, Vec v) const { ::monosem::MONOSEM_LEVEL::store(p, v); }
};
struct Part {
  int64_t n;
  Vec load(const float* p) const {
    float lanes[kLanes] = {};
    memcpy(lanes, p, static_cast<size_t>(n) * 4);
    return ::monosem::MONOSEM_LEVEL::load(lanes);
  }
  void store(float* p, Vec v) const {
    float lanes[kLanes];
    ::monosem::MONOSEM_LEVEL::store(lanes, v);
    memcpy(p, lanes, static_cast<size_t>(n) * 4);
  }
};

template <class Body>
inline __attribute__((always_inline)) void each_vector(int64_t d, Body body) {
  int64_t t = 0;
  for (; t + kLanes <= d; t += kLanes) body(t, Whole{});
  if (t < d) body(t, Part{d - t});
}

/// `append_lanes` where there is no instruction for it: the lanes of `mask` behind the `count` numbers that are there.
inline int32_t append_one_by_one(float* upper, uint32_t* place, int32_t count, uint32_t mask, Vec values, uint32_t first) {
  for (; mask; mask &= mask - 1) {
    const int lane = __builtin_ctz(mask);
    upper[count] = values[lane];
    place[count++] = first + static_cast<uint32_t>(lane);
  }
  return count;
}
