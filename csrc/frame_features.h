// Features of frames, some at a time, to be called from inside a loop over records: no allocation, no threads.
#pragma once
#include <cstdint>
#include <functional>

#include "tensor.h"

namespace hubert_ecg {

struct FrameFeatures {
  int64_t width = 0;
  // What run() works in, from a multiple of 64 bytes on, for one caller at a time.
  int64_t scratch_bytes = 0;
  // frames [count, S], out [count, width] (written)
  std::function<void(const float* frames, int64_t count, void* scratch, float* out)> run;
};

// As mfcc_cpu.
FrameFeatures mfcc_features(const Tensor& window, const Tensor& circle, const Tensor& bank, const Tensor& dct);
// As time_freq_cpu; circle [S, 2] float64.
FrameFeatures time_freq_features(const Tensor& circle);

}  // namespace hubert_ecg
