#include "mfcc.h"

#include <limits>
#include <memory>

#include "frame_features.h"
#include "frames.h"

namespace hubert_ecg {
namespace {

// The bins under a mel filter: its triangle touches few of them.
template <class T>
struct Band {
  int64_t first, last;
  // Of the frame's energy, what the filter must hold to be trusted in float32.
  T least;
};

template <class T>
std::vector<T> copy(const Tensor& table) {
  int64_t size = 1;
  for (int dim = 0; dim < table.ndim(); ++dim) size *= table.size(dim);
  return std::vector<T>(table.data<double>(), table.data<double>() + size);
}

template <class T>
struct MfccTables {
  MfccTables(const Tensor& window, const Tensor& circle, const Tensor& bank, const Tensor& dct)
      : S(window.size(0)),
        N(circle.size(0)),
        M(bank.size(0)),
        C(dct.size(1)),
        window(copy<T>(window)),
        circle(copy<T>(circle)),
        dct(copy<T>(dct)),
        fft(N) {
    for (int64_t m = 0; m < M; ++m) {
      const double* const weight = bank.data<double>() + m * (N / 2);
      int64_t first = 0, last = N / 2;
      while (first < last && weight[first] == 0) ++first;
      while (first < last && weight[last - 1] == 0) --last;
      this->bank.insert(this->bank.end(), weight + first, weight + last);
      const double most = first < last ? *std::max_element(weight + first, weight + last) : 0;
      bands.push_back({first, last, static_cast<T>(kTrusted * most)});
      if (first == last) continue;
      first_bin = std::min(first_bin, first);
      last_bin = std::max(last_bin, last);
    }
  }

  int64_t S, N, M, C;
  std::vector<T> window, circle, dct;
  RealFft fft;
  std::vector<T> bank;  // the weights of each filter's band, one filter after another
  std::vector<Band<T>> bands;
  int64_t first_bin = std::numeric_limits<int64_t>::max(), last_bin = 0;
};

#define HUBERT_ECG_SIMD_FILE "mfcc_simd.h"
#include "every_isa.h"

template <class T>
int64_t scratch_bytes(const MfccTables<T>& tables) {
  return (2 * tables.N + tables.M + tables.C) * 64;
}

template <class T>
void run(const Tensor& frames, const Tensor& window, const Tensor& circle, const Tensor& bank, const Tensor& dct,
         const Tensor& out) {
  check_mfcc<T>(frames, window, circle, bank, dct, out);
  const MfccTables<T> tables(window, circle, bank, dct);
  const MfccTables<double> exact(window, circle, bank, dct);
  const auto kernel = HUBERT_ECG_BEST(mfcc<T>);
  split_frames(frames.size(0), scratch_bytes(tables), [&](int64_t begin, int64_t end, void* scratch) {
    kernel(tables, exact, frames.data<T>(), begin, end, scratch, out.data<T>());
  });
}

}  // namespace

void mfcc_cpu(Tensor frames, Tensor window, Tensor circle, Tensor bank, Tensor dct, Tensor out) {
  frames.is<double>() ? run<double>(frames, window, circle, bank, dct, out)
                      : run<float>(frames, window, circle, bank, dct, out);
}

FrameFeatures mfcc_features(const Tensor& window, const Tensor& circle, const Tensor& bank, const Tensor& dct) {
  const auto tables = std::make_shared<const MfccTables<float>>(window, circle, bank, dct);
  const auto exact = std::make_shared<const MfccTables<double>>(window, circle, bank, dct);
  const auto kernel = HUBERT_ECG_BEST(mfcc<float>);
  return {tables->C, scratch_bytes(*tables), [=](const float* frames, int64_t count, void* scratch, float* out) {
            kernel(*tables, *exact, frames, 0, count, scratch, out);
          }};
}

}  // namespace hubert_ecg
