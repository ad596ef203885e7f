#include "time_freq.h"

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "frame_features.h"
#include "frames.h"

namespace hubert_ecg {
namespace {

#define HUBERT_ECG_SIMD_FILE "time_freq_simd.h"
#include "every_isa.h"

template <class T>
void run(const Tensor& frames, const Tensor& circle, const Tensor& out) {
  check_time_freq<T>(frames, circle, out);
  const RealFft fft(frames.size(1));
  const auto kernel = HUBERT_ECG_BEST(time_freq<T>);
  split_frames(frames.size(0), (2 * fft.n + kTimeFreqFeatures) * 64, [&](int64_t begin, int64_t end, void* scratch) {
    kernel(fft, circle.data<T>(), frames.data<T>(), begin, end, scratch, out.data<T>());
  });
}

}  // namespace

void time_freq_cpu(Tensor frames, Tensor circle, Tensor out) {
  frames.is<double>() ? run<double>(frames, circle, out) : run<float>(frames, circle, out);
}

FrameFeatures time_freq_features(const Tensor& circle) {
  const auto fft = std::make_shared<const RealFft>(circle.size(0));
  const double* const given = circle.data<double>();
  const auto turns = std::make_shared<const std::vector<float>>(given, given + 2 * fft->n);
  const auto kernel = HUBERT_ECG_BEST(time_freq<float>);
  return {kTimeFreqFeatures, (2 * fft->n + kTimeFreqFeatures) * 64,
          [=](const float* frames, int64_t count, void* scratch, float* out) {
            kernel(*fft, turns->data(), frames, 0, count, scratch, out);
          }};
}

}  // namespace hubert_ecg
