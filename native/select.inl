// Choosing the largest of unsigned integers. The bits of positive floats order like the floats do.

inline uint32_t bits(float v) {
  uint32_t u;
  memcpy(&u, &v, 4);
  return u;
}
inline float from_bits(uint32_t u) {
  float v;
  memcpy(&v, &u, 4);
  return v;
}
/// Larger for a larger value, then for a lower index; `value` is positive.
inline uint64_t rank_key(float value, uint32_t index) { return static_cast<uint64_t>(bits(value)) << 32 | (~index); }

/// The k-th largest of a[0..n), 1 <= k <= n; reorders `a` so that its k largest come first.
template <class Key>
Key kth_largest(Key* a, int64_t n, int64_t k) {
  int64_t low = 0, high = n - 1;
  const int64_t want = k - 1;
  while (low < high) {
    const Key x = a[low], y = a[low + (high - low) / 2], z = a[high];
    const Key pivot = x > y ? (y > z ? y : x > z ? z : x) : (x > z ? x : y > z ? z : y);
    int64_t i = low, j = high;
    while (i <= j) {
      while (a[i] > pivot) ++i;
      while (a[j] < pivot) --j;
      if (i <= j) {
        const Key held = a[i];
        a[i++] = a[j];
        a[j--] = held;
      }
    }
    if (want <= j) high = j;
    else if (want >= i) low = i;
    else break;
  }
  return a[want];
}

/// Sorts by falling key: insertion for a few, else heapsort (no recursion, no worst case).
inline void sort_falling(uint64_t* a, int64_t n) {
  if (n <= 48) {
    for (int64_t i = 1; i < n; ++i) {
      const uint64_t key = a[i];
      int64_t j = i;
      for (; j > 0 && a[j - 1] < key; --j) a[j] = a[j - 1];
      a[j] = key;
    }
    return;
  }
  // A heap with the smallest key on top: each one taken off goes behind all that are larger.
  const auto sink = [a](int64_t i, int64_t size) {
    const uint64_t key = a[i];
    for (int64_t child = 2 * i + 1; child < size; child = 2 * i + 1) {
      if (child + 1 < size && a[child + 1] < a[child]) ++child;
      if (a[child] >= key) break;
      a[i] = a[child];
      i = child;
    }
    a[i] = key;
  };
  for (int64_t i = n / 2 - 1; i >= 0; --i) sink(i, n);
  for (int64_t size = n - 1; size > 0; --size) {
    const uint64_t smallest = a[0];
    a[0] = a[size];
    a[size] = smallest;
    sink(0, size);
  }
}
