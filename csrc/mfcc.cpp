#include "mfcc.h"

#include <limits>

#include "frames.h"

namespace hubert_ecg {
namespace {

// The bins under a mel filter: its triangle touches few of them.
struct Band {
  int64_t first, last;
};

template <class T>
struct MfccTables {
  MfccTables(const Tensor& frames, const Tensor& window, const Tensor& circle, const Tensor& bank, const Tensor& dct)
      : S(frames.size(1)),
        N(circle.size(0)),
        M(bank.size(0)),
        C(dct.size(1)),
        window(window.data<T>()),
        circle(circle.data<T>()),
        bank(bank.data<T>()),
        dct(dct.data<T>()),
        fft(circle.size(0)),
        bands(bank.size(0), Band{0, 0}) {
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t k = 0; k < N / 2; ++k) {
        if (this->bank[m * (N / 2) + k] == 0) continue;
        if (bands[m].last == 0) bands[m].first = k;
        bands[m].last = k + 1;
      }
      if (bands[m].last == 0) continue;
      first_bin = std::min(first_bin, bands[m].first);
      last_bin = std::max(last_bin, bands[m].last);
    }
  }

  int64_t S, N, M, C;
  const T *window, *circle, *bank, *dct;
  RealFft fft;
  std::vector<Band> bands;
  int64_t first_bin = std::numeric_limits<int64_t>::max(), last_bin = 0;
};

#define HUBERT_ECG_SIMD_FILE "mfcc_simd.h"
#include "every_isa.h"

template <class T>
void run(const Tensor& frames, const Tensor& window, const Tensor& circle, const Tensor& bank, const Tensor& dct,
         const Tensor& out) {
  check_mfcc<T>(frames, window, circle, bank, dct, out);
  const MfccTables<T> tables(frames, window, circle, bank, dct);
  const auto kernel = HUBERT_ECG_BEST(mfcc<T>);
  split_frames(frames.size(0), (2 * tables.N + tables.M + tables.C) * 64,
               [&](int64_t begin, int64_t end, void* scratch) {
                 kernel(tables, frames.data<T>(), begin, end, scratch, out.data<T>());
               });
}

}  // namespace

void mfcc_cpu(Tensor frames, Tensor window, Tensor circle, Tensor bank, Tensor dct, Tensor out) {
  frames.is<double>() ? run<double>(frames, window, circle, bank, dct, out)
                      : run<float>(frames, window, circle, bank, dct, out);
}

}  // namespace hubert_ecg
