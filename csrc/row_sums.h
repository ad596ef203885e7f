// Rows shared among threads, with sums over all of them that do not depend on how.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace hubert_ecg {

// Calls work(first, last, sums) for chunks of rows, `sums` being `width` zeros of the chunk; adds these up in order.
template <class T, class Work>
void for_rows(int64_t rows, int64_t width, T* total, const Work& work) {
  const int64_t chunk = std::max<int64_t>(16, (rows + 255) / 256), chunks = (rows + chunk - 1) / chunk;
  std::vector<T> sums(chunks * width, T(0));
#pragma omp parallel for schedule(static)
  for (int64_t c = 0; c < chunks; ++c) work(c * chunk, std::min(rows, (c + 1) * chunk), sums.data() + c * width);
  std::fill(total, total + width, T(0));
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t i = 0; i < width; ++i) total[i] += sums[c * width + i];
}

}  // namespace hubert_ecg
