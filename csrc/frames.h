// Frames, one to a SIMD lane: what mfcc.cpp and time_freq.cpp share that does not depend on the instruction set.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "isa.h"

namespace hubert_ecg {

struct alignas(64) CacheLine {
  char bytes[64];
};

// Calls work(begin, end, scratch) for ranges that cover the frames, on as many threads as pay. Each thread has
// `scratch_bytes` of its own, on cache lines of its own, allocated once.
template <class Work>
void split_frames(int64_t num_frames, int64_t scratch_bytes, const Work& work) {
  constexpr int64_t kGrain = 16;  // frames in the widest tile
  const int64_t grains = (num_frames + kGrain - 1) / kGrain;
  const int num_threads = static_cast<int>(std::clamp<int64_t>(grains / 8, 1, omp_get_max_threads()));
  const int64_t lines = (scratch_bytes + 63) / 64;
  std::vector<CacheLine> scratch(num_threads * lines);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t begin = grains * thread / team * kGrain,
                  end = std::min(grains * (thread + 1) / team * kGrain, num_frames);
    work(begin, end, scratch.data() + thread * lines);
  }
}

// The Fourier transform of n = leaf * 2^stages real samples: transforms of `leaf` samples, then joined four by four
// (decimation in time, radix 4; once two by two where the number of stages is odd). The leaf is 16 or less where n is a
// power of two, else the odd factor of n, as sums, of two factors where it has them. frames_simd.h runs it.
struct RealFft {
  explicit RealFft(int64_t length) : n(length), leaf(length) {
    int stages = 0;
    for (; leaf % 2 == 0; leaf /= 2) ++stages;
    if (leaf == 1) {
      const int kept = stages <= 4 ? stages : stages % 2 ? 3 : 4;
      leaf <<= kept;
      stages -= kept;
    }
    halves = stages % 2;
    for (int64_t factor = 3; leaf % 2 && factor * factor <= leaf && factor <= kMostRadix; factor += 2)
      if (leaf % factor == 0) radix = factor;
    for (int64_t block = 0; block < n / leaf; ++block) {
      int64_t reversed = 0;
      for (int bit = 0; bit < stages; ++bit) reversed |= (block >> bit & 1) << (stages - 1 - bit);
      first.push_back(reversed);
    }
  }

  static constexpr int64_t kMostRadix = 31;
  int64_t n, leaf, radix = 1;
  bool halves;
  std::vector<int64_t> first;  // the first sample of each leaf; the others follow every n / leaf
};

}  // namespace hubert_ecg
