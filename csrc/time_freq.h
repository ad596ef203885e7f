#pragma once
#include "tensor.h"

namespace hubert_ecg {

constexpr int kTimeFreqFeatures = 16;
// A frame whose standard deviation is at most this share of its peak is flat, as for SciPy: it has no skewness and no
// kurtosis.
template <class T>
constexpr T kFlat = T(sizeof(T) == sizeof(float) ? 1e-6 : 1e-15);
constexpr double kCrestEpsilon = 1e-9;

// Statistics of each row of `frames`, and of its power spectrum |X_k|^2 / S over all S bins: min, max, mean, rms,
// variance, std, power, peak, peak to peak, crest, skewness, kurtosis; max, sum, mean, variance. A frame that is not
// finite gives NaN.
//   frames [F, S] float or double, circle [S, 2]: cos and sin of 2 pi j / S, out [F, 16] (written)
void time_freq_cpu(Tensor frames, Tensor circle, Tensor out);
void time_freq_cuda(Tensor frames, Tensor circle, Tensor out, intptr_t stream);

template <class T>
void check_time_freq(const Tensor& frames, const Tensor& circle, const Tensor& out) {
  HUBERT_ECG_CHECK(frames.is<T>() && frames.contiguous() && frames.ndim() == 2 && frames.size(1) >= 1,
                   "time_freq: frames must be contiguous [F, S >= 1], got ", frames);
  HUBERT_ECG_CHECK(circle.is<T>() && circle.contiguous() && circle.ndim() == 2 && circle.size(0) == frames.size(1) &&
                       circle.size(1) == 2,
                   "time_freq: circle must be [", frames.size(1), ", 2] of the type of frames, got ", circle);
  HUBERT_ECG_CHECK(out.is<T>() && out.contiguous() && out.ndim() == 2 && out.size(0) == frames.size(0) &&
                       out.size(1) == kTimeFreqFeatures,
                   "time_freq: out must be [", frames.size(0), ", 16] of the type of frames, got ", out);
}

}  // namespace hubert_ecg
